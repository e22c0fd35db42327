"""Files that appear whole or not at all, those that are read to their end, and an unwritable folder as one sentence."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from loco_det.core.errors import UserError


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
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save fails once more on its way out
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
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


def read_regular(path: str | Path) -> bytes:
    """The content of a regular file. A device has no end and a FIFO no beginning, so neither is read.

    Raises:
        OSError: the file cannot be read, or is none; its strerror says why.
        ValueError: the name is none that a file can have.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a FIFO it would wait for a writer
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read() if found.st_size else b""  # what the kernel makes up, as in /proc, has no size
    finally:
        os.close(fd)


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON at `path`, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def write_checked_json(path: str | Path, value: dict[str, Any]) -> None:
    """`value` as `write_json` writes it, with the sha256 of it beside its keys."""
    write_json(path, {**value, "sha256": _digest(value)})


def read_checked_json(path: str | Path) -> dict[str, Any] | None:
    """What `write_checked_json` wrote; None if the file is not there, cannot be read or is not as it was written."""
    try:
        value = json.loads(Path(path).read_bytes())
        return value if isinstance(value, dict) and value.pop("sha256", None) == _digest(value) else None
    except (OSError, ValueError, RecursionError):
        return None


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 24))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def stat_line(found: os.stat_result) -> str:
    """By what a file is known to be unchanged without reading it: its size, and its times of change.

    A copy that keeps the time of modification (`cp -p`, `rsync -t`) sets that of the inode all the same.
    """
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def cache_folder() -> Path:
    """LOCO_DET_CACHE, or loco_det below XDG_CACHE_HOME, or ~/.cache/loco_det."""
    if chosen := os.environ.get("LOCO_DET_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "loco_det"


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """One process at a time runs the block; the system releases the lock when that process ends, however it ends.

    On a file system without locks nobody waits.

    Args:
        path: the lock file; its folder is made.
        waiting: called before this process waits for another.

    Raises:
        OSError: the file cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
