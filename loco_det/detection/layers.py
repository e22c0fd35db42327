"""Layers of the detector: its convolution, and the initialisers, losses and precise BatchNorm of fvcore.

The convolution has Detectron2's parameter names; Detectron2 uses the same parts of fvcore.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loco_det.backbones.folding import convolve, rectified
from loco_det.backbones.resnet import LayerNorm, make_norm

# Newer torch warns when fvcore compiles an unused loss; importing this package must not warn.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    from fvcore.nn import giou_loss, smooth_l1_loss, update_bn_stats
    from fvcore.nn.precise_bn import get_bn_modules
    from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill

__all__ = ["Conv", "c2_msra_fill", "c2_xavier_fill", "get_bn_modules", "giou_loss", "run_convs", "smooth_l1_loss",
           "update_bn_stats"]  # fmt: skip


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


def run_convs(convs: Iterable[Conv], x: torch.Tensor) -> torch.Tensor:
    """Run convolutions one after another, (B, C, H, W) -> (B, out, H, W), and keep less of them for backward.

    A LayerNorm keeps its input, and the convolution and ReLU behind it the map between them: two maps a layer. Here
    the map between is made again in backward, from what the LayerNorm keeps: the same bits.
    """
    convs = list(convs)
    if not (torch.is_grad_enabled() and all(conv.relu and isinstance(conv.norm, LayerNorm) for conv in convs)):
        for conv in convs:
            x = conv(x)
        return x
    norm = None
    for conv in convs:
        x = checkpoint(_between_norms, norm, conv, x, use_reentrant=False, preserve_rng_state=False)
        norm = conv.norm
    return x if norm is None else rectified(norm(x), norm)


def _between_norms(norm: LayerNorm | None, conv: Conv, x: torch.Tensor) -> torch.Tensor:
    if norm is not None:
        x = rectified(norm(x), norm)
    return conv._conv_forward(x, conv.weight, conv.bias)
