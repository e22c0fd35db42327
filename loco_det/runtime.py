"""What every long command needs: seeds, device, place among processes, files whole or absent, logs, progress."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from torch import Tensor

from loco_det.errors import UserError

log = logging.getLogger("loco_det")
_LINE = "%(asctime)s %(levelname).1s %(message)s"
_LINE_SECONDS = 10.0  # between two progress lines
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)
_FILE_ONLY = {"file_only": True}  # marks a line whose news the terminal has in another form
_quiet = False
_display: RichProgress | None = None  # what the terminal shows; a bar inside another's block is a further row of it


# --- logs and progress ------------------------------------------------------------------------------------------


class _Console(logging.StreamHandler):
    """Writes to what sys.stderr is now: under a bar that is rich's, which keeps lines and bar apart."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(lambda record: not hasattr(record, "file_only"))

    @property
    def stream(self) -> IO[str]:  # type: ignore[override]
        return sys.stderr


def setup_logging(output_dir: str | Path | None = None, quiet: bool | None = None) -> None:
    """Send the `loco_det` logger to standard error and, on the main process, to OUTPUT_DIR/log.txt.

    With `quiet` standard error gets warnings only and no progress; None leaves that as it is, also in the
    processes that `launch` starts. Ranks other than 0 say only warnings. Calling it again replaces what the last
    call set up, but the log of a folder that `output_dir` lies in goes on: that job is not at its end.

    Raises:
        UserError: the folder or its log.txt cannot be written.
    """
    global _quiet
    if quiet is not None:
        _quiet = quiet
    around = [] if output_dir is None else Path(output_dir).absolute().parents
    for handler in list(log.handlers):
        if not isinstance(handler, logging.FileHandler) or Path(handler.baseFilename).parent not in around:
            log.removeHandler(handler)
            handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    console = _Console()
    console.setLevel(logging.INFO if _shows_progress() else logging.WARNING)
    console.setFormatter(logging.Formatter(_LINE, "%H:%M:%S"))
    log.addHandler(console)
    if output_dir is not None and is_main():
        with os_errors(output_dir):
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(Path(output_dir) / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter(_LINE, "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)


def log_failure(error: BaseException) -> None:
    """Write what ends the command to log.txt, a bug with its traceback; the terminal is told by the command line."""
    bug = not isinstance(error, (UserError, KeyboardInterrupt))
    log.error("%s", str(error) or type(error).__name__, exc_info=error if bug else None, extra=_FILE_ONLY)


def is_quiet() -> bool:
    """Whether only what needs attention is said."""
    return _quiet


def _shows_progress() -> bool:
    return is_main() and not _quiet


class Progress:
    """A progress bar with ETA on a terminal, a plain line every ten seconds elsewhere; in log.txt always the lines.

    `advance(n, loss=..., ...)` moves it on; the fields given last are shown beside the rate.
    """

    def __init__(self, total: int, description: str, initial: int = 0, unit: str = "it") -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = self.initial = initial
        self.started = self.last_line = time.monotonic()
        self.display: RichProgress | None = None

    def __enter__(self) -> Progress:
        global _display
        if _shows_progress() and _is_terminal():
            self.outermost = _display is None
            if _display is None:
                _display = _new_display()
                _display.start()
            self.display = _display
            self.row = _display.add_task(self.description, total=self.total, completed=self.done, eta="", shown="")
        return self

    def __exit__(self, *_: object) -> None:
        global _display
        if self.display is None:
            return
        if self.outermost:
            self.display.stop()
            _display = None
        else:
            self.display.remove_task(self.row)

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """`n` more are done."""
        self.done += n
        now = time.monotonic()
        rate = (self.done - self.initial) / max(now - self.started, 1e-9)
        eta = _duration((self.total - self.done) / rate) if rate else "unknown"
        shown = " ".join([f"{rate:.3g} {self.unit}/s", *(f"{k} {_short(v)}" for k, v in fields.items())])
        if self.display is not None:
            self.display.update(self.row, completed=self.done, eta=eta, shown=shown)
        if now - self.last_line >= _LINE_SECONDS or self.done >= self.total:
            self.last_line = now
            told = _FILE_ONLY if self.display is not None else None
            log.info("%s %d/%d eta %s %s", self.description, self.done, self.total, eta, shown, extra=told)


def _is_terminal() -> bool:
    return _display is not None or (sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal)


def _new_display() -> RichProgress:
    """The ETA is ours: rich's looks back 30 seconds and knows none where a step takes longer."""
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}", style="progress.remaining"),
        # Names may hold [brackets]. They get what room is left, and what does not fit in is left out.
        TextColumn(
            "{task.fields[shown]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        expand=True,
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # what goes elsewhere must get there
    )


def _duration(seconds: float) -> str:
    """3 days and 4 hours are "76:00:00"."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


# --- files ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file object whose content appears at `path` whole when the block ends, and not at all if it fails.

    It is written under a temporary name in the same folder, flushed to the disk and renamed.

    Raises:
        UserError: the folder or file cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def os_errors(path: str | Path) -> Iterator[None]:
    """An OSError of the block is the user's: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error


def check_writable(path: str | Path) -> None:
    """Refuse a file that could not be written, before hours go into what it is to hold; its folder is made.

    Raises:
        UserError: the folder cannot be written, or `path` is one.
    """
    path = Path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON at `path`, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Building a million small objects makes the collector walk them over and over: most of the loading time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- seeds, device ----------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; each rank gets its own stream."""
    seed += rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global one)
    torch.manual_seed(seed)


def common_seed(seed: int) -> int:
    """`seed`, or for a negative one a number drawn for this run, the same in all processes."""
    if seed >= 0:
        return seed
    drawn = torch.tensor(np.random.SeedSequence().generate_state(1)[0] % 2**31, dtype=torch.int64)
    if world_size() > 1:
        drawn = drawn.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(drawn, 0)
    log.info("SEED is %d: this run drew %d; set it to draw the same again", seed, int(drawn))
    return int(drawn)


def keep_freed_memory(limit: int = -1) -> None:
    """Let this process keep large blocks that it frees, where the C library is glibc; elsewhere nothing changes.

    By default glibc takes blocks above 32 MiB, as activations often are, from the kernel one by one and gives each
    back when it is freed, so that every training step on a CPU faults all its pages in anew.

    Args:
        limit: bytes free at the heap's end from which on they are given back; -1: never.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # from the heap, all of them
        mallopt(_M_TRIM_THRESHOLD, limit)


def usable_cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(name: str) -> torch.device:
    """The device called `name`: auto (CUDA where there is one), cpu, cuda, cuda:N, mps.

    On several processes "auto" and "cuda" mean the GPU of this process's local rank.

    Raises:
        UserError: not a device, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank() if device.index is None else device.index)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index >= count:
            raise UserError(f"device {name!r} needs GPU {device.index} but {count} are usable; use auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name!r} is not usable on this machine; use auto or cpu")
    return device


# --- torch.distributed ------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def reduce_mean(values: dict[str, Tensor]) -> dict[str, float]:
    """The mean over processes of each scalar, as floats; one synchronisation for all of them."""
    if not values:
        return {}
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist()))
