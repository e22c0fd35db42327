"""Rank and size of the job, and collectives: barrier, mean, broadcast of the first value."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    """Return this process's number on its machine, from torchrun or, if srun started it, from SLURM."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def is_main() -> bool:
    return rank() == 0


_replicas: dist.ProcessGroup | None = None  # None: all processes of the job
_is_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """In this context this process computes by itself: losses and statistics are over its own images."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


@contextmanager
def replicated(group: dist.ProcessGroup) -> Iterator[None]:
    """In this context only `group` holds the same weights as this process; the job's others hold other stages."""
    global _replicas
    before, _replicas = _replicas, group
    try:
        yield
    finally:
        _replicas = before


def replica_group() -> dist.ProcessGroup | None:
    """Return the group of the processes with the same weights, for collectives; None for the whole job."""
    return _replicas


def replica_rank() -> int:
    if _is_alone:
        return 0
    return rank() if _replicas is None else dist.get_rank(_replicas)


def replicas() -> int:
    """Return the number of processes with the same weights, which share a batch."""
    if _is_alone:
        return 1
    return world_size() if _replicas is None else dist.get_world_size(_replicas)


def gather_replicas(x: Tensor) -> Tensor:
    """Concatenate (n, ...) of all replicas by rank, (n * replicas, ...); n must be the same."""
    gathered = x.new_empty(replicas() * len(x), *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.14
    gather(gathered, x.contiguous(), group=_replicas)
    return gathered


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def reduce_mean(values: dict[str, Tensor]) -> dict[str, float]:
    """Average each scalar over processes, as floats, with one synchronisation."""
    if not values:
        return {}
    stacked = torch.stack([v.detach().float() for v in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(values, stacked.tolist()))


def first_of_all(value: Any) -> Any:
    """Return the first value by rank that is not None; values are plain data."""
    found = [value]
    if world_size() > 1:
        found = [None] * world_size()
        dist.all_gather_object(found, value)
    return next((one for one in found if one is not None), None)


def share_of(count: int) -> slice:
    """Return this process's part of `count` rows: consecutive, all of one length but perhaps the last ones."""
    size = -(-count // world_size())
    return slice(min(rank() * size, count), min((rank() + 1) * size, count))


def gather(x: Tensor) -> Tensor:
    """Concatenate rows (n, ...) of all processes by rank; n may differ."""
    if world_size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = int(torch.stack(counts).max())
    padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts)])


def same_on_all(tensors: Iterable[Tensor]) -> None:
    """Overwrite these tensors, which every process gives in the same order, with rank 0's."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def on_cpu(value: Any) -> Any:
    """Copy every tensor in a state of dictionaries and lists to the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(part) for part in value)
    return value.cpu() if isinstance(value, Tensor) else value


def of_rank_0(value: Any) -> Any:
    """Return rank 0's value, plain data or tensors on the CPU."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def averaged(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap `model` to average gradients over processes, without broadcasting buffers at every step."""
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # older torch
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **{buffers: False})
