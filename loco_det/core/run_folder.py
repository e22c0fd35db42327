"""Locks a run's folder, and compares a resumed run's configuration with the original."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from loco_det.core.config import flat
from loco_det.core.distributed import is_main
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, file_sha256, os_errors

LOCK = ".lock"
SUMS = "SHA256SUMS"
MAX_SUMS = 1 << 20  # bytes; a run leaves a few lines
_SUMMED = ("config.yaml", "run.json", "metrics.json", "inference*/*.json", "*/inference*/*.json")
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")


@contextlib.contextmanager
def run_folder(folder: str | Path) -> Iterator[None]:
    """Lock OUTPUT_DIR for one run, on its main process; removes temporary files of a killed run.

    While the run works there is no SHA256SUMS. It is written at the end, or after a failure restored if it still holds.
    The system releases the lock when the process ends, however it ends. Without effect on file systems without locks.

    Raises:
        UserError: another run is at work in the folder, or it cannot be written.
    """
    if not is_main():
        yield
        return
    folder = Path(folder)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115 (closed below, with nothing left to write)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers, which may outlive a kill
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "unknown process"
            raise UserError(
                f"{folder}: another run is using it ({holder}); wait for its end, or choose another OUTPUT_DIR"
            ) from None
        except OSError:
            pass
        with os_errors(folder):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
            before = (folder / SUMS).read_bytes() if (folder / SUMS).is_file() else None
            (folder / SUMS).unlink(missing_ok=True)
        try:
            yield
        except UserError:
            with contextlib.suppress(UserError):
                if before is not None and before == _sums(folder):
                    _write_sums(folder, before)
            raise
        _write_sums(folder, _sums(folder))


def _sums(folder: Path) -> bytes:
    """What a run has left, as `sha256sum` lists it."""
    files = sorted(file for pattern in _SUMMED for file in folder.glob(pattern) if file.is_file())
    with os_errors(folder):
        return "".join(f"{file_sha256(file)}  {file.relative_to(folder)}\n" for file in files).encode()


def _write_sums(folder: Path, content: bytes) -> None:
    with atomic_write(folder / SUMS) as file:
        file.write(content)


def check_sums(folder: Path, only: Path | None = None) -> None:
    """Compare what a run left in `folder` with its SHA256SUMS, if it has one; files that are gone are no concern here.

    Args:
        only: compare this file alone.

    Raises:
        UserError: a file is not what the run wrote.
    """
    sums = folder / SUMS
    advice = f"take an intact copy, or delete {sums} to use the files as they are"
    if not sums.is_file():
        return
    try:
        if sums.stat().st_size > MAX_SUMS:
            raise UserError(f"{sums}: is damaged; {advice}")
        for line in sums.read_text(errors="replace").splitlines():
            found = _SUM.fullmatch(line)
            if found is None:
                raise UserError(f"{sums}: is damaged; {advice}")
            file = folder / found[2]
            if (only is None or file == only) and file.is_file() and file_sha256(file) != found[1]:
                raise UserError(f"{file}: is not what the run wrote; {advice}")
    except (OSError, ValueError) as error:  # a name with a NUL
        raise UserError(f"{folder}: cannot be compared with its {SUMS} ({error}); {advice}") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str] = ()) -> dict[str, str]:
    """Return where two configurations differ: {"SOLVER.BASE_LR": "0.1 before, 0.2 now", ...}.

    Args:
        before: nested plain data, as YAML has it.
        now: likewise.
        free: dotted keys that may differ; a trailing dot means all keys below it.
    """
    one, other = flat(before), flat(now)
    return {
        key: f"{one.get(key, 'absent')} before, {other.get(key, 'absent')} now"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
        and not any(key == name or (name.endswith(".") and key.startswith(name)) for name in free)
    }


def summary(found: Mapping[str, str]) -> str:
    """Format `differences` as text: the first three, and the number of the others."""
    shown = "; ".join(f"{key} is {values}" for key, values in list(found.items())[:3])
    return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
