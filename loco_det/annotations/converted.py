"""COCO annotation files derived from another format or from a larger file.

Each is made once, atomically, in `cache_folder()/annotations`, under a name with the hash of all its inputs. If several
processes need it, one makes it and the others wait.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, cache_folder, file_sha256, locked, stat_line

_CHECKSUM = ".sha256"  # suffix of the file with its checksum


def derived_file(name: str, facts: dict[str, Any], make: Callable[[], bytes]) -> Path:
    """Return the file made by `make` from the inputs `facts`.

    Args:
        name: readable part of the file name.
        facts: plain data that identifies all inputs.
        make: returns the content; called only if the file is missing or has changed.
    """
    digest = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()[:20]
    path = cache_folder() / "annotations" / f"{name}-{digest}.json"
    if not _is_whole(path):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path.with_suffix(".lock")))
            except OSError as error:
                raise UserError(
                    f"{path.parent}: cannot be written ({error.strerror}); set LOCO_DET_CACHE to a folder that can"
                ) from error
            if not _is_whole(path):
                content = make()
                with atomic_write(path) as file:
                    file.write(content)
                with atomic_write(path.with_suffix(_CHECKSUM)) as file:
                    file.write(hashlib.sha256(content).hexdigest().encode())
    return path


def _is_whole(path: Path) -> bool:
    """Whether the file exists with its original content; read once per process unless it changes."""
    try:
        return _has_checksum(path, stat_line(path.stat()), stat_line(path.with_suffix(_CHECKSUM).stat()))
    except OSError:
        return False


@functools.lru_cache(maxsize=256)
def _has_checksum(path: Path, *_: str) -> bool:
    return path.with_suffix(_CHECKSUM).read_bytes() == file_sha256(path).encode()


def files_digest(files: Iterable[Path], root: Path) -> str:
    """Hash the name below `root` and the `stat_line` of each file by sha256, in order; contents are not read.

    Raises:
        UserError: a file is missing.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            found = file.stat()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); complete the data set") from error
        line = f"{os.path.relpath(file, root)} {stat_line(found)}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
