"""Seeds, devices, cores and memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from loco_det.core.distributed import local_rank, rank, world_size
from loco_det.core.errors import UserError
from loco_det.core.log import log

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # parameters of mallopt(3)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: with a million small objects, its passes take most of the loading time."""
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
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries use the global generator)
    torch.manual_seed(seed)


def common_seed(seed: int) -> int:
    """Return `seed`; if negative, a number drawn for this run, the same in all processes."""
    if seed >= 2**63:
        raise UserError(f"SEED is {seed}; give less than 2**63.")
    if seed >= 0:
        return seed
    drawn = torch.tensor(np.random.SeedSequence().generate_state(1)[0] % 2**31, dtype=torch.int64)
    if world_size() > 1:
        dist.broadcast(drawn, 0)
    log.info("SEED is %d: this run drew %d; set it to repeat the run", seed, int(drawn))
    return int(drawn)


def keep_freed_memory(limit: int = -1) -> None:
    """Keep large freed blocks in this process instead of returning them to the kernel (glibc only).

    By default glibc allocates blocks above 32 MiB, such as activations, one by one from the kernel and returns each
    when freed, so every training step on a CPU page-faults all of them again.

    Args:
        limit: free bytes at the end of the heap above which memory is returned; -1: never.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # allocate everything on the heap
        mallopt(_M_TRIM_THRESHOLD, limit)


def usable_cores() -> int:
    """Return the number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_processes() -> int:
    """Return the number of this job's processes on this machine, as far as its launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def loader_workers(wanted: int) -> int:
    """Return the data workers of this process: `wanted`, if negative its share of the cores; never more than those."""
    share = max(1, usable_cores() // local_processes())
    return share if wanted < 0 else min(wanted, usable_cores())


@contextlib.contextmanager
def arithmetic(
    device: torch.device, *, benchmark: bool, precision: str = "", deterministic: bool = False
) -> Iterator[None]:
    """Set cuDNN's and torch's arithmetic for a run on `device`, in this context; without effect on a CPU.

    Args:
        benchmark: time cuDNN's algorithms for every new shape and take the fastest.
        precision: of float32 products: highest, high (TF32), medium (bf16); empty leaves torch's default, which is TF32
            in convolutions only.
        deterministic: refuse operations whose result changes from run to run, and choose algorithms that repeat theirs.
    """
    if device.type != "cuda":
        yield
        return
    with contextlib.ExitStack() as after:
        cudnn = torch.backends.cudnn
        after.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = benchmark and not deterministic
        if precision:
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            after.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
            torch.set_float32_matmul_precision(precision)
            cudnn.allow_tf32 = precision != "highest"
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            after.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
            after.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            cudnn.deterministic = True
            torch.use_deterministic_algorithms(True)
        yield


@functools.cache
def has_bf16_units(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this CPU computes in bfloat16 itself (AVX512_BF16, AMX, ARM's BF16); emulated, it is slower than float32.

    Only Linux says so; elsewhere the answer is no.
    """
    with contextlib.suppress(OSError):
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(Path(cpuinfo).read_text().split()))
    return False


def check_bf16(device: torch.device, key: str, other: str) -> None:
    """Refuse bfloat16, the value of `key`, on a GPU without units for it.

    Args:
        other: what to set instead, "KEY VALUE".

    Raises:
        UserError: the GPU is older than Ampere.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{key} is bf16, and this GPU ({name}) has no units for it; set {other}.")


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: auto (CUDA if available), cpu, cuda, cuda:N, mps.

    On several processes "auto" and "cuda" mean the GPU of the local rank. The GPU becomes torch's current one, so that
    what asks for no particular GPU uses it too.

    Raises:
        UserError: not a device, or not available on this machine.
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
        if device.index is not None and world_size() > 1:
            raise UserError(f"device {name!r} is one GPU for {world_size()} processes; use cuda, which is one for each")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # With SLURM's --gpus-per-task a process sees its own GPU only, as number 0.
        own = 0 if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ else local_rank()
        device = torch.device("cuda", own if device.index is None else device.index)
        if device.index >= count:
            raise UserError(f"device {name!r} needs GPU {device.index} but {count} are usable; use auto or cpu")
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name!r} is not usable on this machine; use auto or cpu")
    return device
