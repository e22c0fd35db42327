"""Deformable convolutions in chosen ResNet stages (MODEL.RESNETS.DEFORM_ON_PER_STAGE).

Shape legend: B images, C channels, H x W pixels of a feature.
Source: Deformable Convolutional Networks (arXiv 1703.06211); Detectron2's modeling/backbone/resnet.py
`DeformBottleneckBlock`. The arithmetic is torchvision's `deform_conv2d`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import deform_conv2d

from loco_det.backbones.resnet import Bottleneck, Conv2d, Residual

OFFSETS = 2 * 3 * 3  # y and x of each of the kernel's nine points


class DeformConv2d(nn.Module):
    """A 3x3 convolution whose nine points are shifted by given offsets, with its normalisation as `.norm`.

    Args:
        conv: the plain convolution to replace; its weight and normalisation are reused.
    """

    def __init__(self, conv: Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight
        self.norm = conv.norm
        self.geometry = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) and offsets (B, 18, H', W') in input pixels, y before x -> (B, out, H', W')."""
        wide = torch.promote_types(x.dtype, torch.float32)  # torchvision's CPU kernel needs at least float32
        out = deform_conv2d(x.to(wide), offsets.to(wide), self.weight.to(wide), **self.geometry)
        return self.norm(out.to(x.dtype))


class DeformBottleneck(Residual):
    """A bottleneck with a deformable 3x3 convolution; its offsets start at zero, without effect.

    Args:
        block: the plain bottleneck, whose layers it reuses.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        plain = block.conv2
        self.shortcut = block.shortcut
        self.conv1 = block.conv1
        geometry = {"stride": plain.stride, "padding": plain.padding, "dilation": plain.dilation}
        self.conv2_offset = nn.Conv2d(plain.in_channels, OFFSETS, 3, **geometry)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = DeformConv2d(plain)
        self.conv3 = block.conv3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride)."""
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out, self.conv2_offset(out)))
        out = self.conv3(out)
        out += self.beside(x)
        return F.relu_(out)


def deformable(stage: nn.Sequential) -> nn.Sequential:
    """Make every 3x3 convolution of a stage of bottlenecks deformable."""
    return nn.Sequential(*(DeformBottleneck(block) for block in stage))
