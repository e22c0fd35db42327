"""The convolution of the pyramid and of the heads: optional normalisation and ReLU, Detectron2's parameter names."""

from __future__ import annotations

import torch
from torch import nn

from loco_det.backbones.folding import convolve
from loco_det.backbones.resnet import make_norm


class Conv(nn.Conv2d):
    """A stride-1 convolution (B, C, H, W) -> (B, out, H, W) with a bias, or with `.norm` instead of it.

    Args:
        norm: "" or a name that `loco_det.backbones.resnet.make_norm` knows.
        relu: ends in a ReLU.
    """

    fast = False  # fold a constant normalisation into the weights

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: str = "", relu: bool = False) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
        self.norm = make_norm(norm, outputs) if norm else None
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(self, x, relu=self.relu)
