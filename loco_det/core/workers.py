"""Loader processes: the shared memory that they need, and one sentence where it is too small or a process dies.

A worker hands its batch over in shared memory, on Linux files in /dev/shm, of which Docker gives 64 MiB. If it left
that to its queue, as a DataLoader does, a batch that does not fit would be lost and waited for for ever.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from loco_det.core.errors import UserError

_Batch = TypeVar("_Batch")

FOLDER = Path("/dev/shm")
AHEAD = 2  # batches that each worker keeps ready
MIB = 2**20


def free_shared_memory() -> tuple[int, int] | None:
    """Return the free and all bytes of shared memory; None where the system has no such folder (macOS)."""
    try:
        total, _used, free = shutil.disk_usage(FOLDER)
    except OSError:
        return None
    return free, total


def check_shared_memory(batch: int, workers: int, key: str) -> None:
    """Refuse more loader processes than shared memory has room for, before they start.

    Args:
        batch: bytes of a batch, at least.
        workers: their number.
        key: that sets it, for the message.

    Raises:
        UserError: naming the size found, the size needed and what to set.
    """
    found, needed = free_shared_memory(), workers * AHEAD * batch
    if found is None or needed <= found[0]:
        return
    fitting = found[0] // (AHEAD * batch)
    docker = f"docker run --shm-size={-(-2 * needed // 2**30)}g"
    raise UserError(
        f"{FOLDER} has {found[0] // MIB} MiB free and {workers} loader processes need {-(-needed // MIB)} MiB; set "
        f"{key} {fitting}, or enlarge it: {docker}",
        add=f"{key} {fitting}" if "." in key else "",
    )


def shared(batch: Any) -> Any:
    """Return a batch with its tensors in shared memory, or the UserError of one that does not fit; for `collate_fn`.

    In the main process nothing is moved. Walks tuples, lists, dicts and objects of this package.
    """
    import torch

    if torch.utils.data.get_worker_info() is None:
        return batch
    try:
        for tensor in _tensors(batch):
            tensor.share_memory_()
    except RuntimeError as error:
        return UserError(
            f"a loader process found no room for its batch in shared memory ({_first_line(error)}); {_state()}"
        )
    return batch


def _tensors(item: Any) -> Iterator[Any]:
    if hasattr(item, "share_memory_"):
        yield item
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from _tensors(part)
    elif type(item).__module__.startswith("loco_det."):  # Instances, and the masks in them
        yield from _tensors(list(vars(item).values()))


def raising(batches: Iterable[_Batch | UserError]) -> Iterator[_Batch]:
    """Yield a loader's batches; raise the UserErrors that its data set returns as a batch or as a sample in one.

    If a worker raised such an error, the DataLoader would wrap it in the worker's traceback.

    Raises:
        UserError: the first one found; or a worker died.
    """
    try:
        for batch in batches:
            for part in batch if isinstance(batch, list) else (batch,):
                if isinstance(part, UserError):
                    raise part
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a loader process died ({_first_line(error)}); {_state()}") from error


def _state() -> str:
    found = free_shared_memory()
    size = f"{FOLDER} has {found[0] // MIB} of {found[1] // MIB} MiB free; " if found else ""
    return (
        f"{size}set DATA.NUM_WORKERS 0, DATALOADER.NUM_WORKERS 0 or --workers 0, or give more memory, in Docker "
        "--shm-size=8g"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
