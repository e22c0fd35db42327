"""Logging to standard error and log.txt, and progress with ETA."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from loco_det.core.errors import UserError
from loco_det.core.files import os_errors

log = logging.getLogger("loco_det")
_LINE = "%(asctime)s %(levelname).1s %(message)s"
_LINE_SECONDS = 10.0  # between two progress lines
_DRAWING_SECONDS = 0.5  # between two drawings of a notebook's bar
FILE_ONLY = {"file_only": True}  # marks lines that the terminal shows in another form
_quiet = False
_display: RichProgress | None = None  # the active display; a bar inside another's block becomes a row of it


class _Console(logging.StreamHandler):
    """Writes to the current sys.stderr: under a progress bar rich's, which keeps lines and bar apart."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.addFilter(lambda record: not hasattr(record, "file_only"))

    @property
    def stream(self) -> IO[str]:  # type: ignore[override]
        return sys.stderr


class _File(logging.FileHandler):
    """Handler of log.txt; a full disk is reported once and does not end the run."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            log.warning("%s: cannot be written (%s); lines are missing from it", self.baseFilename, error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what is still to be written
            super().close()


def setup_logging(output_dir: str | Path | None = None, quiet: bool | None = None) -> None:
    """Send the `loco_det` logger to standard error and, on the main process, to OUTPUT_DIR/log.txt.

    With `quiet` standard error gets only warnings and no progress; None keeps the current setting, also in the
    processes that `launch` starts. Ranks other than 0 log only warnings. Calling it again replaces the previous set-up,
    but keeps the log of a folder that contains `output_dir`, whose job is still running.

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
    log.addHandler(_console())
    if output_dir is not None and _is_main():
        log.addHandler(_file(output_dir))


@contextlib.contextmanager
def logging_to(output_dir: str | Path) -> Iterator[None]:
    """Log a call from Python as a command's run: to standard error and OUTPUT_DIR/log.txt, with the error that ends it.

    Where the program's own logging, or a command's in this process, shows these lines already, only the file is added.
    A level that the program gave the logger holds. Afterwards the logger is as before.

    Raises:
        UserError: the folder or its log.txt cannot be written.
    """
    added, before = [_file(output_dir)] if _is_main() else [], (log.level, log.propagate)
    if not (log.hasHandlers() and log.isEnabledFor(logging.INFO)):
        added.append(_console())
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
    for handler in added:
        log.addHandler(handler)
    try:
        yield
    except BaseException as error:
        log_failure(error)
        raise
    finally:
        for handler in added:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(before[0])
        log.propagate = before[1]


def _console() -> _Console:
    console = _Console()
    console.setLevel(logging.INFO if _shows_progress() else logging.WARNING)
    console.setFormatter(logging.Formatter(_LINE, "%H:%M:%S"))
    return console


def _file(output_dir: str | Path) -> _File:
    with os_errors(output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        file = _File(Path(output_dir) / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter(_LINE, "%Y-%m-%d %H:%M:%S"))
    return file


def log_failure(error: BaseException) -> None:
    """Write the error that ends the command to log.txt, with traceback for a bug; the command line prints it itself."""
    bug = not isinstance(error, (UserError, KeyboardInterrupt))
    log.error("%s", str(error) or type(error).__name__, exc_info=error if bug else None, extra=FILE_ONLY)


def is_quiet() -> bool:
    """Whether only warnings and errors are shown."""
    return _quiet


def _shows_progress() -> bool:
    return _is_main() and not _quiet


def _is_main() -> bool:
    """Whether this is the job's main process; a process without torch, which takes seconds to import, has no job."""
    if sys.modules.get("torch") is None:
        return True
    from loco_det.core.distributed import is_main

    return is_main()


class Progress:
    """A bar with ETA on a terminal or in a notebook, elsewhere a line every ten seconds; log.txt always gets the lines.

    `advance(n, loss=..., ...)` moves it by n; the last given fields are shown beside the rate.
    """

    def __init__(self, total: int, description: str, initial: int = 0, unit: str = "it") -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = self.initial = initial
        self.started = self.last_line = self.drawn = time.monotonic()
        self.display: RichProgress | None = None

    def __enter__(self) -> Progress:
        global _display
        if _shows_progress() and _shows_bars():
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
        """Add `n` completed items."""
        self.done += n
        now = time.monotonic()
        rate = (self.done - self.initial) / max(now - self.started, 1e-9)
        eta = _duration((self.total - self.done) / rate) if rate else "unknown"
        shown = " ".join([f"{rate:.3g} {self.unit}/s", *(f"{k} {_short(v)}" for k, v in fields.items())])
        if self.display is not None:
            is_due = now - self.drawn >= _DRAWING_SECONDS or self.done >= self.total
            draw = is_due and not self.display.live.auto_refresh
            self.drawn = now if draw else self.drawn
            self.display.update(self.row, completed=self.done, eta=eta, shown=shown, refresh=draw)
        if now - self.last_line >= _LINE_SECONDS or self.done >= self.total:
            self.last_line = now
            destination = FILE_ONLY if self.display is not None else None
            log.info("%s %d/%d eta %s %s", self.description, self.done, self.total, eta, shown, extra=destination)


def _shows_bars() -> bool:
    """Whether standard error is a terminal, or a notebook with ipywidgets, without which rich draws nothing there."""
    if _display is not None:
        return True
    console = Console(stderr=True)
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return sys.stderr.isatty() and not console.is_dumb_terminal


def _new_display() -> RichProgress:
    """Create the display with our own ETA: rich's averages over 30 seconds and has none for slower steps.

    A notebook's is drawn by `advance`: what is printed while rich draws in its thread would be drawn over.
    """
    console = Console(stderr=True)
    return RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}", style="progress.remaining"),
        # Names may contain [brackets]. They are cut to the remaining width.
        TextColumn(
            "{task.fields[shown]}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
        ),
        expand=True,
        auto_refresh=not console.is_jupyter,
        console=console,
        redirect_stderr=not console.is_jupyter,
        redirect_stdout=sys.stdout.isatty(),  # keep redirected output where it is
    )


def _duration(seconds: float) -> str:
    """Format seconds: 3 days and 4 hours are "76:00:00"."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
