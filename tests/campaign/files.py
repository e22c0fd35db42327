"""Runs that are killed, that cannot write, that meet another in one place, and files that a disk has changed."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from campaign.hook import Hook, start, waited
from campaign.jobs import Bench, difference, left
from campaign.tally import Tally
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import find_dataset

POINTS = {"pretrain": 40, "train": 40, "eval-only": 25, "data convert": 25, "convert": 20, "evaluate": 20, "probe": 30,
          "report": 15}  # fmt: skip
FAILURES = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}


def spread(operations: list[tuple[str, str]], count: int) -> list[int]:
    """The numbers of `count` operations: of writes some, spread evenly, for most are alike; else all, if they fit."""
    writes = [n for n, (kind, _) in enumerate(operations) if kind == "write"]
    others = [n for n, (kind, _) in enumerate(operations) if kind != "write"]
    kept = _evenly(others, count * 2 // 3 if len(writes) > count // 3 else count - len(writes))
    return sorted(kept + _evenly(writes, count - len(kept)))


def _evenly(numbers: list[int], count: int) -> list[int]:
    return numbers if len(numbers) <= count else [numbers[k * len(numbers) // count] for k in range(count)]


def kill(tally: Tally, bench: Bench, name: str) -> None:
    """SIGKILL at file operations of a job; run again, it must end as if nothing had been."""
    for point in tally.chosen(spread(bench.operations(name), tally.number(POINTS[name], 2))):
        bench.fresh(name)
        status = bench.run(name, hook=Hook(bench.work, point))
        if status != -signal.SIGKILL:
            tally.add(point, "unhandled", f"the run ended with {status} before its operation {point}")
            continue
        _go_on(tally, bench, name, point)


def _go_on(tally: Tally, bench: Bench, name: str, trial: int, other: dict[str, object] | None = None) -> None:
    """What a run has left is whole, and the job run again ends as the uninterrupted one did, or with `other`."""
    try:
        left(bench.work)
    except Exception as error:
        tally.add(trial, "lost", f"a file is half written ({type(error).__name__}: {error})")
        return
    if status := bench.run(name, again=True):
        outcome = "unhandled" if "Traceback" in bench.said.read_text(errors="replace") else "lost"
        tally.add(trial, outcome, f"run again it ends with {status}: {bench.last_words()}")
        return
    found = difference(left(bench.work), bench.whole[name])
    if found and other is not None:
        found = difference(left(bench.work), other)
    tally.add(trial, "survived" if not found else "silent" if found.endswith("differs") else "lost", found)


def fail(tally: Tally, bench: Bench, name: str) -> None:
    """File operations that fail, over an earlier run's files: one sentence, nothing half written, and it can go on."""
    bench.operations(name)
    before = bench.work / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(bench.data / bench.jobs[name].needs if bench.jobs[name].needs else bench.out, before)
    bench.begin(before)
    operations = bench.operations(name, over=True)
    trials = [(point, code) for point in spread(operations, tally.number(POINTS[name] // 3)) for code in FAILURES]
    for trial in tally.chosen(range(len(trials))):
        point, code = trials[trial]
        bench.begin(before)
        status = bench.run(name, hook=Hook(bench.work, point, FAILURES[code]))
        if not _said_well(tally, bench, trial, status, f"{code} at {operations[point]}"):
            continue
        _go_on(tally, bench, name, trial, _without_failed(bench, name))


def _without_failed(bench: Bench, name: str) -> dict[str, object]:
    """What the uninterrupted job left, without the line of an evaluation that the log says has failed.

    A run that goes on behind that evaluation does not repeat it.
    """
    whole = dict(bench.whole[name])
    for done in re.findall(r"evaluation after iteration (\d+) failed", bench.said.read_text(errors="replace")):
        key = next(key for key in whole if key.endswith("metrics.json"))
        lines = [line for line in whole[key] if line]
        whole[key] = [line for line in lines if "bbox/AP" not in line or line["iteration"] != int(done) - 1] + [""]
    return whole


def _said_well(tally: Tally, bench: Bench, trial: int, status: int, what: str) -> bool:
    said = bench.said.read_text(errors="replace")
    if "Traceback" in said or status not in (0, 2) or (status == 2 and not bench.last_words().startswith("error: ")):
        tally.add(trial, "unhandled", f"{what}: status {status}: {bench.last_words()}")
        return False
    return True


def full_disk(tally: Tally, bench: Bench) -> None:
    """Each job in an OUTPUT_DIR that is a small file system, and again in the same when it has room."""
    sizes = [4096, 65536, 1 << 20, 10 << 20, 40 << 20]
    trials = [(name, size) for name in bench.jobs if not bench.jobs[name].needs for size in sizes]
    for trial in tally.chosen(range(0, len(trials), max(1, round(1 / max(tally.share, 0.02))))):
        name, size = trials[trial]
        if name not in bench.whole:
            bench.operations(name)
        bench.fresh(name)
        bench.out.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(bench.out)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            tally.skipped = "no file system can be mounted here"
            return
        try:
            status = bench.run(name)
            if _said_well(tally, bench, trial, status, f"{name} on {size} bytes"):
                subprocess.run(["mount", "-o", "remount,size=1g", str(bench.out)], check=True)
                _go_on(tally, bench, name, trial)
        finally:
            subprocess.run(["umount", str(bench.out)], check=True)


# --- two at once -------------------------------------------------------------------------------------------------


def race(tally: Tally, bench: Bench, name: str) -> None:
    """Two processes at the same thing, started up to a run's length apart; what they leave is what one leaves."""
    act: Callable[[], int] = _RACES.get(name, lambda: 0)
    if name in bench.jobs:
        bench.operations(name)
    for trial in tally.chosen(range(tally.number(10, 2))):
        bench.fresh(name) if name in bench.jobs else shutil.rmtree(bench.work / "cache", ignore_errors=True)
        delay = random.Random(f"{tally.seed} {trial}").choice((0.0, 0.0, 0.02, 0.1, 0.3, 0.6))
        statuses, said = _both(bench, name, act, delay)
        refused = any("another run is" in text for text in said)
        if sorted(statuses) not in ([0, 0], [0, 2]) or (2 in statuses and not refused):
            tally.add(trial, "unhandled", f"statuses {statuses}: {[text.strip()[-200:] for text in said]}")
        else:
            found = difference(left(bench.work), bench.whole[name]) if name in bench.jobs else ""
            tally.add(trial, "lost" if found else "survived", found, refused=refused)


def _both(bench: Bench, name: str, act: Callable[[], int], delay: float) -> tuple[list[int], list[str]]:
    """Exit statuses and words of both."""

    def work(seconds: float) -> int:
        time.sleep(seconds)
        return bench.main(name) if name in bench.jobs else act()

    files = [bench.work / f"said{k}.txt" for k in (0, 1)]
    children = [start(partial(work, k * delay), file) for k, file in enumerate(files)]
    return [waited(child) for child in children], [file.read_text(errors="replace") for file in files]


def _index() -> int:
    root = Path(os.environ["DETECTRON2_DATASETS"])
    index = load_index(root / "tiny" / "annotations" / "instances_val.json")
    return 0 if len(index.image_id) == 6 and len(index.segmentations(slice(None))) == 12 else 1


def _derived() -> int:
    root = Path(os.environ["DETECTRON2_DATASETS"])
    return 0 if len(find_dataset(f"{root / 'voc'}").index.annotation_id) == 2 else 1


_RACES: dict[str, Callable[[], int]] = {"index": _index, "derived": _derived}
RACES = ("pretrain", "train", "data convert", "convert", "probe", *_RACES)


# --- workers and processes ---------------------------------------------------------------------------------------

_WORKERS = {"pretrain": "DATA.NUM_WORKERS", "train": "DATALOADER.NUM_WORKERS", "probe": "--workers"}
AGREE = [*((name, (key, n)) for name, key in _WORKERS.items() for n in "12"),
         *(("eval-only", ("--num-gpus", n)) for n in "23")]  # fmt: skip
_SETTINGS = ("config.yaml", "run.json")  # which name the number of workers or processes


def agree(tally: Tally, bench: Bench) -> None:
    """Every file is the same whatever the number of workers, and an evaluation's whatever that of processes."""
    for trial in tally.chosen(range(len(AGREE) if tally.share >= 1 else 1)):
        name, more = AGREE[trial]
        bench.operations(name)
        bench.fresh(name)
        if status := bench.run(name, *more):
            tally.add(trial, "unhandled", f"{name} {' '.join(more)} ends with {status}: {bench.last_words()}")
            continue
        one, other = (
            {name: content for name, content in files.items() if not name.endswith(_SETTINGS)}
            for files in (left(bench.work), bench.whole[name])
        )
        found = difference(one, other)
        tally.add(trial, "silent" if found else "survived", f"{name} {' '.join(more)}: {found}" if found else "")
