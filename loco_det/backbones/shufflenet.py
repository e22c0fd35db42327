"""ShuffleNet v2-50: the ShuffleNet v2 of ResNet-50's depth, 2.3 GFLOPs at 224 pixels.

Source: ShuffleNet v2 (Ma et al., ECCV 2018, arXiv 1807.11164), sections 3.2 and 4 and its table of large models: a 3x3
convolution of stride 2 with 64 channels, max pooling, 3, 4, 6 and 3 units of 244, 488, 976 and 1952 channels at strides
4, 8, 16 and 32, and a 1x1 convolution to 2048. LoCo (arXiv 2008.01342) pretrains it beside ResNet-50.

Not stated there, so chosen here: the first unit of res2, which widens its map but does not halve it, has the two
branches of a halving unit with stride 1; the last 1x1 convolution is the last block of res5, so that the uppermost loss
trains it and probes read what the classifier would.

Shape legend: x (B, C, H, W); a unit's two branches have half of its output's channels each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loco_det.backbones.resnet import Conv2d, Residual, StagedBackbone, Stem

SHUFFLENET = "shufflenetv2_50"  # its name: BACKBONE.NAME, MODEL.BACKBONE.NAME, a manifest's architecture
STEM_CHANNELS = 64
_UNITS = {"res2": (3, 122), "res3": (4, 244), "res4": (6, 488), "res5": (3, 976)}  # units, channels of a branch
_LAST = 2048


class ShuffleStem(Stem):
    """imagenet: 3x3 stride 2 and a 3x3 max pool of stride 2. cifar: one 3x3 convolution at full resolution."""

    def __init__(self, kind: str, norm: str, channels: int) -> None:
        super().__init__(kind, norm, channels)
        self.conv1 = Conv2d(3, channels, 3, norm, stride=2 if self.pool else 1)


class Unit(Residual):
    """1x1, depthwise 3x3, 1x1 beside half of the input or, in a stage's first unit, beside depthwise 3x3 and 1x1.

    Args:
        inputs: C of the input.
        branch: channels of each branch; inputs = 2 * branch unless `first`.
        first: of its stage: both branches read the whole input.
    """

    def __init__(self, inputs: int, branch: int, stride: int, norm: str, first: bool) -> None:
        super().__init__()
        self.first = first
        if first:
            self.side1 = Conv2d(inputs, inputs, 3, norm, stride=stride, groups=inputs)
            self.side2 = Conv2d(inputs, branch, 1, norm)
        self.conv1 = Conv2d(inputs if first else branch, branch, 1, norm)
        self.conv2 = Conv2d(branch, branch, 3, norm, stride=stride, groups=branch)
        self.conv3 = Conv2d(branch, branch, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (self.side2(self.side1(x), relu=True), x) if self.first else x.chunk(2, dim=1)
        right = self.conv3(self.conv2(self.conv1(right, relu=True)), relu=True)
        return shuffled(torch.cat([left, right], dim=1))


class Pointwise(Residual):
    """A 1x1 convolution and ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        self.conv1 = Conv2d(inputs, outputs, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x, relu=True)


def shuffled(x: Tensor) -> Tensor:
    """Interleave the two halves of the channels: 0, C/2, 1, C/2 + 1, ..."""
    return x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2)


class ShuffleNet(StagedBackbone):
    """ShuffleNet v2-50: children are `stem` and `res2`..`res5`.

    Args:
        stem: imagenet or cifar.
        norm: a name for `resnet.make_norm`.
        stem_channels: scales all other channels, rounded down; 64 is the network of the paper.
    """

    def __init__(self, *, stem: str = "imagenet", norm: str = "BN", stem_channels: int = STEM_CHANNELS) -> None:
        super().__init__()
        first = 4 if stem == "imagenet" else 1
        self.architecture, self.depth = SHUFFLENET, 50
        self.stage_names = ("stem", *_UNITS)
        self.channels, self.strides = {"stem": stem_channels}, {"stem": first}
        self.stem = ShuffleStem(stem, norm, stem_channels)
        inputs = stem_channels
        for level, (name, (count, branch)) in enumerate(_UNITS.items()):
            branch, stride = branch * stem_channels // STEM_CHANNELS, 1 if level == 0 else 2
            blocks: list[nn.Module] = [Unit(inputs, branch, stride, norm, first=True)]
            blocks += [Unit(2 * branch, branch, 1, norm, first=False) for _ in range(count - 1)]
            inputs = 2 * branch
            if name == "res5":
                blocks.append(Pointwise(inputs, inputs := _LAST * stem_channels // STEM_CHANNELS, norm))
            self.add_module(name, nn.Sequential(*blocks))
            self.channels[name], self.strides[name] = inputs, first * 2**level
