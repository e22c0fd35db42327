"""LARS in a few lines, as MAE's linear evaluation defines it: what the optimizers of this package are compared with."""

from __future__ import annotations

import torch
from torch import nn

TRUST = 0.001


class PlainLars:
    """One learning rate for all parameters; those of one dimension are stepped as by SGD and do not decay."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float, weight_decay: float) -> None:
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.moments = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p, moment in zip(self.parameters, self.moments):
            change = p.grad.clone()
            if p.ndim > 1:
                change += self.weight_decay * p
                ours, theirs = p.square().sum().sqrt().item(), change.square().sum().sqrt().item()
                change *= TRUST * ours / theirs if ours > 0 and theirs > 0 else 1.0
            moment.copy_(self.momentum * moment + change)
            p -= lr * moment
