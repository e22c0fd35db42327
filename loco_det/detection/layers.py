"""Layers of the detector: its convolution, and the initialisers, losses and precise BatchNorm of fvcore.

The convolution has Detectron2's parameter names; Detectron2 uses the same parts of fvcore.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

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

    A convolution and a ReLU keep the map between them, and a LayerNorm before them its own input: two maps a layer.
    Here the map between is made again in backward, from what the LayerNorm keeps: the same bits.
    """
    made: _Again | None = None
    for conv in convs:
        with _kept_as(x, made) if made else nullcontext():
            if not (torch.is_grad_enabled() and conv.relu and isinstance(conv.norm, LayerNorm)):
                x, made = conv(x), None
                continue
            raw = conv._conv_forward(x, conv.weight, conv.bias)
        x, made = conv.norm(raw), _Again(conv.norm, raw.detach())
        with saved_tensors_hooks(
            lambda _, made=made: made, lambda again: again()
        ):  # a ReLU keeps nothing but its result
            x = rectified(x, conv.norm)
    return x


class _Again:
    """Makes the output of a LayerNorm and ReLU again, once for the two that ask for it in a backward pass."""

    def __init__(self, norm: LayerNorm, x: torch.Tensor) -> None:
        self.norm, self.x = norm, x
        self.output: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        if self.output is None:
            self.output = F.relu_(self.norm(self.x))
            return self.output
        output, self.output = self.output, None
        return output


def _kept_as(x: torch.Tensor, made: _Again) -> saved_tensors_hooks:
    """Operations in this context that would keep `x` for backward keep `made` instead."""
    where, shape = x.data_ptr(), x.shape

    def pack(kept: torch.Tensor) -> torch.Tensor | _Again:
        return made if kept.data_ptr() == where and kept.shape == shape else kept

    return saved_tensors_hooks(pack, lambda kept: kept() if isinstance(kept, _Again) else kept)
