"""NT-Xent, the contrastive loss of SimCLR (Chen et al. 2020, eq. 1), over the global batch.

Shape legend: b images on this process, B on all of them, D numbers in an embedding; z holds the first view of
every image and then the second, (2b, D).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loco_det.runtime import rank, world_size


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """The mean over this process's 2b embeddings of the cross-entropy of finding the other view of the image.

    Candidates are the 2B - 1 other embeddings of all processes; similarities are cosines over `temperature`. The
    mean of this value over processes is the loss of the whole batch, and so is the mean of the gradients, since
    the gather passes gradients back to the process that owns an embedding. Computed in float32 at least.

    Args:
        z: (2b, D), any float type, not normalised; every process must bring the same b.
        temperature: above 0.

    Returns:
        A scalar. With a single image in all there is no negative and the loss is exactly 0.
    """
    z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
    candidates = gather_with_gradient(z)
    logits = z @ candidates.T / temperature
    rows = torch.arange(len(z), device=z.device)
    offset = rank() * len(z)
    logits[rows, rows + offset] = float("-inf")  # an embedding is no candidate for itself
    return F.cross_entropy(logits, rows.roll(len(z) // 2) + offset)


class _Gather(torch.autograd.Function):
    """All processes' rows in the order of their ranks; the backward sums each row's gradient at its owner."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather_with_gradient(x: Tensor) -> Tensor:
    """(n, D) on each process -> (n * processes, D) on all; the same tensor on a single process."""
    return _Gather.apply(x) if world_size() > 1 else x


@torch.no_grad()
def embedding_health(z: Tensor) -> dict[str, Tensor]:
    """What tells a collapse from learning (Wang and Isola 2020), from one process's (2b, D) embeddings.

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
