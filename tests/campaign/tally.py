"""Counts what happened to each trial, and runs trials that may crash, hang or swell in a process of their own."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from loco_det.core.errors import UserError

OUTCOMES = ("survived", "lost", "silent", "unhandled")
MEMORY = 1 << 30  # bytes that one trial may add
SECONDS = 5.0  # of CPU time that one trial may take
PATIENCE = 120.0  # seconds that one trial may wait for anything
_BROKEN = 71  # exit status of a child that failed outside a trial
SHOWN = 5  # failures of one part that are printed; all are counted


@dataclass
class Tally:
    """The trials of one part.

    Attributes:
        part: its name, as --only takes it.
        share: how many trials to make, as a share of the whole campaign's.
        seed: of everything that is drawn.
        only: the one trial to make, by its number; None for all.
    """

    part: str
    share: float = 1.0
    seed: int = 0
    only: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, object]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    skipped: str = ""
    seconds: float = 0.0

    def number(self, whole: int, least: int = 1) -> int:
        """How many trials where the whole campaign makes `whole`."""
        return max(least, round(whole * self.share))

    def chosen(self, trials: Iterable[int]) -> list[int]:
        return [trial for trial in trials if self.only in (None, trial)]

    def add(self, trial: int, outcome: str, detail: str = "", *, refused: bool = False) -> None:
        self.counts[outcome] += 1
        self.refused += refused
        if outcome == "survived":
            return
        kind = f"{outcome}: {detail[:60]}"
        self.kinds[kind] += 1
        command = f"python tests/campaign/run.py --only '{self.part}' --seed {self.seed} --index {trial}"
        if self.kinds[kind] == 1:
            self.failures.append({"outcome": outcome, "detail": detail, "repeat": command})
            if len(self.failures) <= SHOWN:
                print(f"{self.part}: {outcome}: {detail}\n  {command}", flush=True)

    @property
    def tried(self) -> int:
        return sum(self.counts.values())

    def plain(self) -> dict[str, object]:
        counts = {name: self.counts[name] for name in OUTCOMES}
        more = {"skipped": self.skipped} if self.skipped else {}
        return {"tried": self.tried, **counts, "refused": self.refused, "minutes": round(self.seconds / 60, 2),
                "failures": self.failures, **more}  # fmt: skip


def judged(read: Callable[[], str | None]) -> tuple[str, str, bool]:
    """(outcome, detail, refused) of one reading: `read` says what is silently wrong, or nothing."""
    try:
        wrong = read()
    except UserError as error:
        told = str(error)
        return ("unhandled", f"several lines: {told!r}", True) if "\n" in told else ("survived", "", True)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        name = Path(last.filename).name
        return "unhandled", f"{type(error).__name__} in {name}:{last.lineno} ({str(error)[:200]})", False
    return ("silent", wrong, False) if wrong else ("survived", "", False)


def guarded(
    tally: Tally,
    trials: list[int],
    trial: Callable[[int], tuple[str, str, bool]],
    title: Callable[[int], str] = str,
) -> None:
    """Make trials in a child that may take `MEMORY` and, for each, `SECONDS`; one that ends it is unhandled.

    Args:
        trial: gives (outcome, detail, refused) of a number.
        title: what a number stands for.
    """
    shared = np.frombuffer(mmap.mmap(-1, 64), np.float64)  # trials done; CPU time and time at the last one's start
    while trials:
        shared[:3] = 0, -1, time.monotonic()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _make(trials, trial, shared, writing)
        os.close(writing)
        ended = _follow(tally, trials, child, reading, shared)
        done = int(shared[0])
        if ended:
            tally.add(trials[done], "unhandled", f"{title(trials[done])}: {ended}")
            done += 1
        trials = trials[done:]


def _make(trials: list[int], trial: Callable[[int], tuple[str, str, bool]], shared: np.ndarray, writing: int) -> None:
    errors = os.dup(2)
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        for standard in (1, 2):  # C code writes there, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
        for number in trials:
            shared[1:3] = time.process_time(), time.monotonic()
            outcome, detail, refused = trial(number)
            text = "\t".join([str(number), outcome, " ".join(detail.split())[:400], str(int(refused))])
            os.write(writing, f"{text}\n".encode("utf-8", "replace"))
            shared[0] += 1
        os._exit(0)
    except BaseException:
        os.write(errors, traceback.format_exc().encode())
        os._exit(_BROKEN)


def _follow(tally: Tally, trials: list[int], child: int, reading: int, shared: np.ndarray) -> str:
    """Counts what the child says until it is gone; how it ended, if not by itself."""
    ended, rest = "", b""
    os.set_blocking(reading, False)
    tick, stat = os.sysconf("SC_CLK_TCK"), Path(f"/proc/{child}/stat")
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reading, 1 << 16):
                rest += data
        *lines, rest = rest.split(b"\n")
        for line in lines:
            number, outcome, detail, refused = line.decode().split("\t")
            tally.add(int(number), outcome, detail, refused=refused == "1")
        if gone:
            break
        times = stat.read_text().rpartition(")")[2].split()[11:13]
        if shared[1] >= 0 and sum(map(int, times)) / tick - shared[1] > SECONDS:
            ended = f"takes more than {SECONDS:.0f} s of CPU time"
        elif shared[1] >= 0 and time.monotonic() - shared[2] > PATIENCE:
            ended = f"waits more than {PATIENCE:.0f} s"
        if ended:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    os.close(reading)
    code = os.waitstatus_to_exitcode(status)
    if code == _BROKEN:
        sys.exit(f"{tally.part}: the campaign itself is broken")
    return ended or ("" if code == 0 else f"the process ended with status {code}")
