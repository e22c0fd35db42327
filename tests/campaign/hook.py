"""Stops a process, or fails, at one of its file operations: opening to write, each write, fsync, rename, remove, mkdir.

What libraries written in other languages do to files is not seen; every file of this project that they write is renamed
into its place afterwards, which is.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir", "os.link": "link"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_ON_A_FULL_DISK = ("open", "write", "fsync", "mkdir", "link")


class Hook:
    """Watches the operations below `root`.

    Args:
        at: the operation, counted from 0, at which something happens; None to list them all in `seen`.
        failure: the errno that this operation and those after it fail with; None to be killed there. A write that is
            killed writes half.
    """

    def __init__(self, root: Path, at: int | None = None, failure: int | None = None) -> None:
        self.root, self.at, self.failure = f"{root}{os.sep}", at, failure
        self.seen: list[tuple[str, str]] = []

    def install(self) -> None:
        """For the rest of this process's life."""
        fsync, opened = os.fsync, io.open

        def counted_fsync(fd: Any) -> None:
            number = fd if isinstance(fd, int) else fd.fileno()
            self.meet("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(fd)

        def counted_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            found = opened(file, mode, *args, **options)
            watched = set(mode) & set("wax+") and self._is_below(file) and not str(file).endswith("log.txt")
            return _Counted(found, self, os.fspath(file)) if watched else found

        os.fsync = counted_fsync
        builtins.open = io.open = counted_open
        sys.addaudithook(self._audit)

    def meet(self, kind: str, path: str, before: Callable[[], None] = lambda: None) -> None:
        """One operation is about to be done."""
        if not self._is_below(path):
            return
        number = len(self.seen)
        self.seen.append((kind, path))
        if self.at is None or number < self.at:
            return
        if self.failure is None:
            before()
            os.kill(os.getpid(), signal.SIGKILL)
        if (
            number == self.at
            or (self.failure == errno.ENOSPC and kind in _ON_A_FULL_DISK)
            or self.failure == errno.EROFS
        ):
            raise OSError(self.failure, os.strerror(self.failure), path)

    def _is_below(self, path: Any) -> bool:
        with contextlib.suppress(TypeError, ValueError):
            return not isinstance(path, int) and os.path.abspath(os.fsdecode(path)).startswith(self.root)
        return False

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & _WRITING:
            self.meet("open", args[0])
        elif event in _EVENTS:
            self.meet(_EVENTS[event], args[0])


class _Counted:
    """A file whose writes count."""

    def __init__(self, file: Any, hook: Hook, path: str) -> None:
        self._file, self._hook, self._path = file, hook, path

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._hook.meet("write", self._path, half)
        return self._file.write(data)

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def start(work: Callable[[], int | None], output: Path) -> int:
    """A child of this process that does `work` and says what it has to in `output`; its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        status = work() or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def waited(child: int, seconds: float = 300.0) -> int:
    """The exit status of a child, negative for a signal, -1000 where it had to be killed after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1000
        time.sleep(0.005)
