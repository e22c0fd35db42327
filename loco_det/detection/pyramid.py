"""ViTDet's simple feature pyramid: p2 to p6 from the one map of a plain vision transformer.

Source: Exploring Plain Vision Transformer Backbones for Object Detection (Li et al. 2022), section 3;
detectron2/modeling/backbone/vit.py, whose parameter names and arithmetic this has.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from loco_det.backbones.resnet import make_norm
from loco_det.core.errors import UserError
from loco_det.detection.layers import Conv

SCALES = (4.0, 2.0, 1.0, 0.5)
STRIDE = 16  # of the map: p2 to p5 then have strides 4 to 32


class OneStride(Protocol):
    """A backbone whose maps all have one stride."""

    channels: dict[str, int]
    strides: dict[str, float]

    def __call__(self, x: torch.Tensor) -> dict[str, torch.Tensor]: ...


class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 by convolutions of one of stride 16, and p6 by subsampling p5.

    Args:
        net: the backbone; several maps of it are concatenated along their channels.
        out_channels: channels of every level.
        norm: "" for biases instead, or a normalisation's name; ViTDet's is LN.

    Raises:
        UserError: a map of another stride, for which anchors and poolers would be wrong.
    """

    def __init__(self, net: OneStride, out_channels: int, norm: str) -> None:
        super().__init__()
        if set(net.strides.values()) != {STRIDE}:
            raise UserError(
                f"the feature pyramid of a plain backbone needs maps of stride {STRIDE}, and its strides are "
                f"{sorted(set(net.strides.values()))}; give maps of stride {STRIDE} alone"
            )
        self.net = net
        channels = sum(net.channels.values())
        for scale in SCALES:
            layers: list[nn.Module] = []
            inputs = channels
            if scale > 1:
                inputs = channels // 2
                layers.append(nn.ConvTranspose2d(channels, inputs, 2, 2))
            if scale > 2:
                layers += [make_norm(norm, inputs) if norm else nn.Identity(), nn.GELU()]
                layers.append(nn.ConvTranspose2d(inputs, channels // 4, 2, 2))
                inputs = channels // 4
            if scale < 1:
                layers.append(nn.MaxPool2d(2, 2))
            layers += [Conv(inputs, out_channels, 1, norm), Conv(out_channels, out_channels, 3, norm)]
            self.add_module(f"simfp_{int(math.log2(STRIDE / scale))}", nn.Sequential(*layers))
        self.strides = {f"p{level}": 2**level for level in range(2, 7)}
        self.channels = dict.fromkeys(self.strides, out_channels)
        self.size_divisibility = 32

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) with H and W multiples of 32 -> {"p2": (B, C, H/4, W/4), ..., "p6": (B, C, H/64, W/64)}."""
        maps = list(self.net(images).values())
        x = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        outputs = {f"p{level}": getattr(self, f"simfp_{level}")(x) for level in range(2, 6)}
        outputs["p6"] = F.max_pool2d(outputs["p5"], kernel_size=1, stride=2)
        return outputs
