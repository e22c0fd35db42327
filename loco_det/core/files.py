"""Atomic writes, reads that end, checksummed JSON, locks, and one-sentence errors for unwritable folders."""

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
    """Open a file that appears at `path` complete when the block ends, or not at all if it fails.

    The file is written under a temporary name in the same folder, flushed to disk and renamed. A temporary file that a
    killed process left is overwritten.

    Raises:
        UserError: the folder or file cannot be written, or the disk is full.
    """
    path = Path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path, mode, encoding=None if "b" in mode else "utf-8") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)  # before the lock goes with the file, or the next writer would empty it
            except BaseException:
                os.unlink(file.name)
                raise
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _temporary(path: Path, mode: str, encoding: str | None) -> IO[Any]:
    """The file that is to become `path`: locked, under one name, or under one's own where that cannot be had."""
    try:
        return open(path.with_name(f".{path.name}.tmp"), mode, encoding=encoding, opener=_locked_and_empty)
    except OSError:
        return open(path.with_name(f".{path.name}.{os.getpid()}.tmp"), mode, encoding=encoding)


def _locked_and_empty(name: str, flags: int) -> int:
    """A descriptor for `open`; raises OSError if another process writes the file, or the file system has no locks."""
    fd = os.open(name, flags & ~os.O_TRUNC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            os.unlink(name)
            raise
        if os.fstat(fd).st_ino != os.stat(name).st_ino:  # renamed since it was opened
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        os.ftruncate(fd, 0)
    except OSError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def os_errors(path: str | Path) -> Iterator[None]:
    """Convert an OSError of the block to a UserError: `path` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises again on exit
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or str(cause)
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error


def check_writable(path: str | Path) -> None:
    """Check that a file can be written before hours of work produce it; creates its folder.

    Raises:
        UserError: the folder cannot be written, or `path` is a folder.
    """
    path = Path(path)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def read_regular(path: str | Path) -> bytes:
    """Read a file that somebody gave; refuses what has no end (a device) or no beginning (a FIFO).

    Raises:
        OSError: the file cannot be read, is not regular, or is larger than this machine's memory.
        ValueError: no file can have such a name.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a FIFO it would wait for a writer
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if found.st_size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            raise OSError(errno.EFBIG, "it is larger than the memory", str(path))
        with open(fd, "rb", closefd=False) as file:
            return file.read() if found.st_size else b""  # what the kernel makes up, as in /proc, has no size
    finally:
        os.close(fd)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def write_checked_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON with its sha256 as a further key."""
    write_json(path, {**value, "sha256": _digest(value)})


def read_checked_json(path: str | Path) -> dict[str, Any] | None:
    """Read a file of `write_checked_json`; None if it is missing, unreadable or fails its checksum."""
    try:
        value = json.loads(Path(path).read_bytes())
        return value if isinstance(value, dict) and has_checksum(value) and value.pop("sha256") else None
    except (OSError, ValueError, RecursionError):
        return None


def has_checksum(value: dict[str, Any]) -> bool:
    """Whether what was read from a file is as `write_checked_json` wrote it."""
    return value.get("sha256") == _digest({key: item for key, item in value.items() if key != "sha256"})


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 24))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def stat_line(found: os.stat_result) -> str:
    """Return size and change times as one line, to detect a changed file without reading it.

    Copies that preserve the modification time (`cp -p`, `rsync -t`) still update the inode's change time.
    """
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def cache_folder() -> Path:
    """Return LOCO_DET_CACHE, or loco_det below XDG_CACHE_HOME, or ~/.cache/loco_det."""
    if chosen := os.environ.get("LOCO_DET_CACHE"):
        return Path(os.path.expanduser(chosen))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "loco_det"


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Run the block in one process at a time; the system releases the lock when the process ends, however it ends.

    Without effect on file systems that do not support locks.

    Args:
        path: the lock file; its folder is created.
        waiting: called before waiting for another process.

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
