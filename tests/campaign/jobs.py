"""The commands that the campaign ends, damages and repeats, each a second long, and what they leave compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from test_damage import resnet18_tensors
from test_formats import made
from test_probes import write_artifact, write_splits
from test_report import detections
from test_run_folder import EVERY, TIMES, TINY_PRETRAINING, write_images
from tiny_detection import overrides, write_tiny

from campaign.hook import Hook, start, waited
from loco_det.cli import main
from loco_det.convert.load import load_tensors
from loco_det.convert.sources import flatten
from loco_det.detection import loop
from loco_det.report import analysis
from loco_det.report.page import markdown_page
from loco_det.report.runs import find_runs

NOT_COMPARED = (
    "log.txt",
    "SHA256SUMS",
    ".index",
    ".tmp",
)  # ends of names: times and places of writing stand in these
VOLATILE = {*TIMES, "images_per_second", "data_wait_share", "started", "created", "sha256", "seconds", "seen_ns"}


class Job(NamedTuple):
    """A command below the folder "work", which holds `data` (never written to), and `out` and `cache` of one trial."""

    argv: list[str]
    again: tuple[str, ...] = ()  # added when it is run once more
    needs: str = ""  # the folder in `data` that `out` begins as a copy of


def _jobs(work: Path) -> dict[str, Job]:
    data, out = work / "data", work / "out"
    coco = f"{data}/tiny/annotations/instances_val.json@{data}/tiny/val"
    train = ["train", "--engine", "torchvision", "--config-file", "configs/coco_loco_r50.yaml"]
    detector = overrides(OUTPUT_DIR=out, **{**EVERY, "SOLVER__MAX_ITER": 4})
    pretrain = ["pretrain", "--config-file", "configs/pretrain/loco_r18_cifar.yaml", *TINY_PRETRAINING.split()]
    words = ["OUTPUT_DIR", str(out), "DATA.PATH", str(data / "images"), "SOLVER.MAX_STEPS", "3", "LOG_PERIOD", "1"]
    probe = ["probe", str(data / "backbone.safetensors"), "--data", str(data / "classes"), "--protocol", "knn"]
    where = ["--json", str(out / "probe.json"), "--cache", str(work / "cache" / "features"), "--workers", "0"]
    evaluate = ["evaluate", str(data / "results.json"), "--data", coco, "--json", str(out / "numbers.json")]
    return {
        "pretrain": Job([*pretrain, *words], ("--resume",)),
        "train": Job([*train, *detector], ("--resume",)),
        "eval-only": Job([*train, "--eval-only", "--resume", *detector], needs="trained"),
        "data convert": Job(["data", "convert", str(data / "voc"), str(out)]),
        "convert": Job(["convert", str(data / "r18.pth"), str(out / "r18.pkl")]),
        "evaluate": Job([*evaluate, "--bootstrap", "20"]),
        "probe": Job([*probe, *where]),
        "report": Job(["report", str(data / "trained"), "--out", str(out)]),
    }


class Bench:
    """The data of all jobs below `work`, and one trial after another in `work/out` and `work/cache`.

    Without `trained` there is no run for those that need one.
    """

    def __init__(self, work: Path, *, trained: bool = True) -> None:
        self.work, self.data, self.out = work, work / "data", work / "out"
        self.jobs = _jobs(work)
        self.said, self.seen = work / "said.txt", work / "seen.json"
        self.whole: dict[str, dict[str, Any]] = {}  # by job: what an uninterrupted run leaves
        os.environ.update(
            LOCO_DET_CACHE=str(work / "cache"), DETECTRON2_DATASETS=str(self.data), CUDA_VISIBLE_DEVICES=""
        )
        loop.LOG_PERIOD = 3
        sys.modules["tensorboard"] = None  # type: ignore[assignment]  # its files are written beside, in a thread
        self.data.mkdir(parents=True)
        assert waited(start(self._prepare, self.said)) == 0, self.said.read_text()
        if trained:
            assert self.run("train") == 0, self.said.read_text()
            shutil.copytree(self.out, self.data / "trained")

    def _prepare(self) -> None:
        torch.manual_seed(0)
        write_tiny(self.data)
        write_images(self._folder("images"), "a")
        write_splits(self.data / "classes", 6, 3)
        write_artifact(self.data)
        made(self.data / "voc", "voc")
        torch.save(resnet18_tensors(), self.data / "r18.pth")
        (self.data / "results.json").write_text(json.dumps(detections(self.data, 2.0)))

    def _folder(self, name: str) -> Path:
        (self.data / name).mkdir()
        return self.data / name

    def fresh(self, name: str) -> None:
        """`out` and `cache` as before the job's first run."""
        self.begin(self.data / self.jobs[name].needs if self.jobs[name].needs else None)

    def begin(self, out: Path | None) -> None:
        """`out` as a copy of a folder or absent, `cache` absent."""
        for folder in (self.out, self.work / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        if out:
            shutil.copytree(out, self.out)

    def run(self, name: str, *more: str, again: bool = False, hook: Hook | None = None) -> int:
        """The exit status of the job, with `more` arguments, in a child; what it said is in `said`."""

        def work() -> int:
            if hook:
                hook.install()
            status = self.main(name, *more, again=again)
            if hook and hook.at is None:
                self.seen.write_text(json.dumps(hook.seen))
            return status

        return waited(start(work, self.said))

    def main(self, name: str, *more: str, again: bool = False) -> int:
        """The job, with further arguments, in this process."""
        return main([*self.jobs[name].argv, *(self.jobs[name].again if again else ()), *more])

    def operations(self, name: str, *, over: bool = False) -> list[tuple[str, str]]:
        """Every file operation of an uninterrupted run, whose result is kept in `whole`; or of one `over` its files."""
        if not over:
            self.fresh(name)
        assert self.run(name, hook=Hook(self.work)) == 0, self.said.read_text()
        if not over:
            self.whole[name] = left(self.work)
        return [tuple(one) for one in json.loads(self.seen.read_text()) if one[1] != str(self.seen)]

    def last_words(self) -> str:
        return self.said.read_text(errors="replace").strip().rpartition("\n")[2]


def reported(place: Path) -> str:
    """What `report` says of the runs at `place`, but for curves and pictures."""
    runs, missing = find_runs([str(place)]), []
    content = {"title": "", "created": "", "loco_det": "", "backbones": runs.backbones(), "missing": missing}
    content |= {"experiments": analysis.experiments(runs, None, 0, missing), "inputs": analysis.inputs(runs)}
    content |= {"probes": analysis.probe_curves(runs), "other_inputs": analysis.other_inputs(runs)}
    return markdown_page(content) + json.dumps(content)


def left(work: Path) -> dict[str, Any]:
    """{name: content}: all files of `out` and `cache` but locks; raises what reading a half-written one raises."""
    files = [file for top in ("out", "cache") for file in sorted((work / top).rglob("*")) if file.is_file()]
    files = [file for file in files if not file.name.endswith(".lock")]
    return {str(file.relative_to(work)): content(file) for file in files}


def content(file: Path) -> Any:
    """What a file holds, without times."""
    if file.name.endswith(NOT_COMPARED):  # or half written
        return None
    if file.name == "metrics.json":
        text = file.read_text()
        whole, _, cut = text.rpartition("\n")  # a line may be half written, until the run goes on
        return [*(_lasting(json.loads(line)) for line in whole.splitlines()), cut]
    if file.suffix == ".json":
        return _lasting(json.loads(file.read_text()))
    if file.suffix in (".pth", ".pkl", ".safetensors"):
        return {name: np.asarray(tensor) for name, tensor in flatten(file, load_tensors(file))}
    return re.sub(rb"Made \S+ by", b"Made by", file.read_bytes())


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first file that is missing, left over or of another content; "" if there is none."""
    for name in sorted({*found, *expected}):
        if name not in expected:
            return f"{name} is left over"
        if name not in found:
            return f"{name} is missing"
        if not _same(found[name], expected[name]):
            return f"{name} differs"
    return ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
