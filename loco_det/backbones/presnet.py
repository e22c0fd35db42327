"""Progressive ResNet-50 (PResNet-50): six stages of three blocks, with similar memory and work in each.

Source: LoCo (Xiong, Ren, Urtasun, NeurIPS 2020), its section on memory and its table of the architecture. Maps shrink
by bilinear interpolation instead of strided convolution, 56, 36, 24, 16, 12 and 8 pixels wide for images of 224.

The paper does not state the position of the interpolation, and its table of blocks contradicts its table of costs (4.16
GFLOPs, and 4.14 for ResNet-50). This implementation follows the costs:

- The interpolation replaces a ResNet's stride: before the first 3x3 convolution of a stage's first block, and before
  its shortcut, an ungrouped 1x1 convolution. The 1x1 before that 3x3 still has the larger map.
- The last 1x1 of res5's and res6's blocks is never grouped. The table groups it in the second and third block, which
  would give 3.79 GFLOPs, 14.85 % of them in res6.

| share in percent | res2 | res3 | res4 | res5 | res6 | res7 |
|---|---|---|---|---|---|---|
| multiplications, paper | 13.50 | 14.63 | 14.77 | 16.62 | 20.45 | 20.04 |
| multiplications, here | 13.47 | 14.66 | 14.76 | 16.63 | 20.43 | 20.05 |
| activations, paper | 15.46 | 10.96 | 19.48 | 17.31 | 19.48 | 17.31 |
| activations, here | 15.10 | 10.70 | 21.39 | 16.90 | 19.01 | 16.90 |

Convolutions alone (the 7x7 counts with res2) are 4.14 GFLOPs here; a classifier for 1000 classes and two operations per
input of BatchNorm make it 4.16 (ResNet-50: 4.09 and 4.11). Activations are the outputs of the blocks' convolutions
without shortcuts, each at its stage's size, which reproduces the paper's shares of ResNet-50 to the last digit. Those
of PResNet-50 would need 128, 128 and 512 channels in res4; the paper's text, its table of blocks and the
multiplications give 144, 144 and 576, used here.

Not stated, so chosen here: bilinear interpolation is torch's without `align_corners` and antialiasing; for images of
another size a map is the previous one times 36/56, 24/36, 16/24, 12/16 or 8/12, rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from loco_det.backbones.resnet import BasicBlock, Conv2d, Residual, StagedBackbone, Stem
from loco_det.core.errors import UserError

PRESNET = "presnet50"  # its name: BACKBONE.NAME, a manifest's architecture
STEM_CHANNELS = 32
_BLOCKS = 3  # of every stage
_STEM_SIDE = 56


@dataclass(frozen=True)
class _Stage:
    """A stage at full width."""

    side: int  # of its maps, for 56 pixels after the stem
    outputs: int  # channels
    middle: int = 0  # channels inside a bottleneck; 0: basic blocks
    groups: int = 1  # in a bottleneck's first 1x1 and its 3x3
    last_groups: int = 1  # in its last 1x1, except in the first block


_STAGES = {
    "res2": _Stage(56, 56),
    "res3": _Stage(36, 96),
    "res4": _Stage(24, 576, middle=144),
    "res5": _Stage(16, 1024, middle=256, groups=2),
    "res6": _Stage(12, 2048, middle=512, groups=16),
    "res7": _Stage(8, 4096, middle=1024, groups=128, last_groups=128),
}


class Resize(nn.Module):
    """Bilinear interpolation to `new` pixels for every `old` ones: (B, C, H, W) -> (B, C, H new / old, W new / old).

    Sides are rounded half up, and at least 1.
    """

    def __init__(self, old: int, new: int) -> None:
        super().__init__()
        self.old, self.new = old, new

    def forward(self, x: Tensor) -> Tensor:
        if self.old == self.new:
            return x
        size = [max(1, (2 * side * self.new + self.old) // (2 * self.old)) for side in x.shape[2:]]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PBasicBlock(BasicBlock):
    """Two 3x3 convolutions, and the shortcut, on the resized map."""

    def __init__(self, inputs: int, outputs: int, norm: str, resize: Resize) -> None:
        super().__init__(inputs, outputs, 1, norm)
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.resize(x))


class PBottleneck(Residual):
    """1x1 on the incoming map; 3x3, 1x1 and the shortcut on the resized one."""

    def __init__(
        self, inputs: int, outputs: int, norm: str, resize: Resize, *, middle: int, groups: int, last_groups: int
    ) -> None:
        super().__init__()
        self.resize = resize
        self.shortcut = Conv2d(inputs, outputs, 1, norm) if inputs != outputs else None
        self.conv1 = Conv2d(inputs, middle, 1, norm, groups=groups)
        self.conv2 = Conv2d(middle, middle, 3, norm, groups=groups)
        self.conv3 = Conv2d(middle, outputs, 1, norm, groups=last_groups)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.resize(self.conv1(x, relu=True)), relu=True)
        return self.conv3(out, relu=True, add=self.beside(self.resize(x)))


class PResNet(StagedBackbone):
    """PResNet-50: children are `stem` and `res2`..`res7`.

    Args:
        stem: as for `backbone.Stem`: imagenet or cifar.
        norm: a name for `backbone.make_norm`.
        stem_channels: scales all other channels: 32 is the paper's network; 4, 8, ... 28 are narrower ones with the
            same numbers of blocks and groups.

    Raises:
        UserError: another `stem_channels`.
    """

    def __init__(self, *, stem: str = "imagenet", norm: str = "BN", stem_channels: int = STEM_CHANNELS) -> None:
        super().__init__()
        if stem_channels not in range(4, STEM_CHANNELS + 1, 4):
            raise UserError(f"{PRESNET} has no stem of {stem_channels} channels; use a multiple of 4 up to 32")
        first = 4 if stem == "imagenet" else 1
        self.architecture, self.depth = PRESNET, 50
        self.stage_names = ("stem", *_STAGES)
        self.channels, self.strides = {"stem": stem_channels}, {"stem": first}
        self.stem = Stem(stem, norm, stem_channels)
        before = _Stage(_STEM_SIDE, STEM_CHANNELS)
        for name, stage in _STAGES.items():
            self.add_module(name, _make_stage(before, stage, norm, stem_channels))
            self.channels[name] = _narrowed(stage.outputs, stem_channels)
            self.strides[name] = first * _STEM_SIDE / stage.side
            before = stage


def _make_stage(before: _Stage, stage: _Stage, norm: str, stem_channels: int) -> nn.Sequential:
    inputs, outputs, middle = (_narrowed(c, stem_channels) for c in (before.outputs, stage.outputs, stage.middle))
    blocks: list[nn.Module] = []
    for index in range(_BLOCKS):
        resize = Resize(before.side if index == 0 else stage.side, stage.side)
        if not middle:
            block: nn.Module = PBasicBlock(inputs, outputs, norm, resize)
        else:
            last_groups = 1 if index == 0 else stage.last_groups
            groups = {"groups": stage.groups, "last_groups": last_groups}
            block = PBottleneck(inputs, outputs, norm, resize, middle=middle, **groups)
        blocks.append(block)
        inputs = outputs
    return nn.Sequential(*blocks)


def _narrowed(channels: int, stem_channels: int) -> int:
    return channels * stem_channels // STEM_CHANNELS
