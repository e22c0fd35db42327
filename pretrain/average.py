"""Averaging gradients over processes while later stages still run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from loco_det.runtime import world_size


class GradientAverage:
    """`start` sends gradients that are final on their way, one message for a stage; `finish` waits for all."""

    def __init__(self) -> None:
        self.under_way: list[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = []

    def start(self, parameters: list[nn.Parameter]) -> None:
        """Begin to average the `.grad` of these parameters; on a single process there is nothing to do."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if world_size() == 1 or not gradients:
            return
        flat = _flatten_dense_tensors(gradients)
        self.under_way.append((dist.all_reduce(flat, async_op=True), flat, gradients))

    def finish(self) -> None:
        """Every started gradient now holds the mean over processes."""
        for work, flat, gradients in self.under_way:
            work.wait()
            flat /= world_size()
            for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients)):
                gradient.copy_(mean)
        self.under_way.clear()
