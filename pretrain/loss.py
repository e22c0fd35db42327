"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, eq. 1), over the global batch.

Shape legend: b images on this process, B on all of them, D numbers in an embedding; z has the first view of every
image, then the second, (2b, D).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loco_det.core.distributed import gather_replicas, replica_group, replica_rank, replicas


def nt_xent(z: Tensor, temperature: float, chunk: int = 0) -> Tensor:
    """Mean over this process's 2b embeddings of the cross-entropy of finding the other view of the image.

    Candidates are the 2B - 1 other embeddings of all processes; similarities are cosines over `temperature`. The mean
    of this value over processes is the loss of the whole batch, and likewise for the gradients, since the gather
    returns gradients to the process that owns an embedding. Computed in float32 at least.

    Args:
        z: (2b, D), any float type, not normalised; b must be the same on every process.
        temperature: above 0.
        chunk: rows of the (2b, 2B) similarities in memory at a time, so that memory is linear in the batch; recomputed
            in backward. 0: all at once.

    Returns:
        A scalar. With a single image in total there is no negative and the loss is exactly 0.
    """
    with torch.autocast(z.device.type, enabled=False):
        return _nt_xent(F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1), temperature, chunk)


def _nt_xent(z: Tensor, temperature: float, chunk: int) -> Tensor:
    candidates = gather_with_gradient(z)
    offset = replica_rank() * len(z)
    own = torch.arange(len(z), device=z.device) + offset
    other = own.roll(len(z) // 2)
    if not 0 < chunk < len(z):
        return _row_losses(z, candidates, own, other, temperature) / len(z)
    total = z.new_zeros(())
    for rows, me, partner in zip(z.split(chunk), own.split(chunk), other.split(chunk)):
        total = total + checkpoint(
            _row_losses, rows, candidates, me, partner, temperature, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(z)


def _row_losses(rows: Tensor, candidates: Tensor, own: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Sum the rows' cross-entropies; own and other are the indices of each row's two views in candidates."""
    logits = rows @ candidates.T / temperature
    logits = logits.scatter(1, own[:, None], float("-inf"))  # an embedding is not its own candidate
    return F.cross_entropy(logits, other, reduction="sum")


class _Gather(torch.autograd.Function):
    """Concatenate all processes' rows by rank; the backward sums each row's gradient at its owner."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return gather_replicas(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=replica_group())
        return gradient.chunk(replicas())[replica_rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """(n, D) on each process -> (n * processes, D) on all; the same tensor on a single process."""
    return _Gather.apply(x) if replicas() > 1 else x


@torch.no_grad()
def embedding_health(z: Tensor) -> dict[str, Tensor]:
    """Measure collapse (Wang and Isola 2020) of one process's (2b, D) embeddings.

    Returns:
        alignment: mean squared distance of the two views, 0 when they coincide.
        uniformity: log of the mean Gaussian potential of pairs, 0 when everything coincides, about -4 when spread.
        std: mean over dimensions of the standard deviation, times sqrt(D); 0 when collapsed, 1 when spread.
    """
    z = F.normalize(z.float(), dim=1)
    first, second = z.chunk(2)
    return {
        "alignment": (first - second).square().sum(1).mean(),
        "uniformity": torch.pdist(z).square().mul(-2).exp().mean().log(),
        "std": z.std(0).mean() * z.shape[1] ** 0.5,
    }
