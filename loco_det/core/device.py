"""Seeds, devices, cores and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from loco_det.core.distributed import local_rank, rank, world_size
from loco_det.core.errors import UserError
from loco_det.core.log import log

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)


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


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; each rank gets its own stream."""
    seed += rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries draw from the global one)
    torch.manual_seed(seed)


def common_seed(seed: int) -> int:
    """`seed`, or for a negative one a number drawn for this run, the same in all processes."""
    if seed >= 2**63:
        raise UserError(f"SEED is {seed}; give less than 2**63.")
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
