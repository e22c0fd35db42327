"""Region pooling over one feature map or a pyramid.

Shape legend: N images, R regions over all images, S output side, features (N, C, Hi, Wi).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.ops import roi_align, roi_pool

from loco_det.core.errors import UserError
from loco_det.detection.boxes import area
from loco_det.detection.cpu_speed import roi_align_pyramid
from loco_det.detection.deterministic import deterministic_roi_align

POOLER_TYPES = ("ROIAlignV2", "ROIAlign", "ROIPool")

# A region of 224 x 224 pixels, the size of ImageNet's crops, belongs to the level of stride 16 (FPN equation 1).
CANONICAL_SIDE = 224
CANONICAL_LEVEL = 4


def assign_levels(boxes: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """(R,) int64 pyramid level of each box, log2 of the stride, limited to [lowest, highest].

    Source: FPN equation 1; detectron2/modeling/poolers.py `assign_boxes_to_levels`.
    """
    side = torch.sqrt(area(boxes))
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIDE + 1e-8))
    return level.clamp(min=lowest, max=highest).to(torch.int64)


def with_image(boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Prepend the image index to N tensors (Ri, 4): (R, 5)."""
    image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    return torch.cat([image, torch.cat(list(boxes))], dim=1)


def _by_level(level: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Return the regions of each level, ascending, from (R,) int64 in [0, levels)."""
    if torch.jit.is_tracing():  # counts on the host would become constants
        return [(level == i).nonzero().squeeze(1) for i in range(levels)]
    counts = torch.bincount(level, minlength=levels).tolist()
    return list(level.argsort(stable=True).split(counts))


class RoiPooler(nn.Module):
    """Pools each region from the pyramid level for its size.

    Args:
        side: S.
        strides: strides of the feature maps, ascending powers of two, each twice the previous one.
        sampling_ratio: samples per bin side; 0 means the number of feature cells under the bin.
        kind: one of `POOLER_TYPES`; ROIAlignV2 is ROIAlign with the half-pixel correction.

    Raises:
        UserError: if the strides do not form a pyramid.
    """

    fast = False  # ROIAlign by matrix products, on a CPU

    def __init__(self, side: int, strides: Sequence[int], sampling_ratio: int, kind: str) -> None:
        super().__init__()
        levels = [math.log2(stride) for stride in strides]
        if any(level != levels[0] + i or level % 1 for i, level in enumerate(levels)):
            raise UserError(
                f"MODEL.ROI_HEADS.IN_FEATURES gives feature maps of strides {list(strides)}, which are no pyramid: "
                "name neighbouring levels from fine to coarse"
            )
        self.side, self.strides, self.sampling_ratio, self.kind = side, list(strides), sampling_ratio, kind
        self.lowest, self.highest = int(levels[0]), int(levels[-1])

    def forward(self, features: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return pooled regions (R, C, S, S), in the order of the boxes.

        Args:
            features: one map per level.
            boxes: N tensors (Ri, 4), in input pixels.
        """
        return self.pool(features, with_image(boxes))

    def pool(self, features: Sequence[torch.Tensor], regions: torch.Tensor) -> torch.Tensor:
        """Return pooled regions (R, C, S, S) of regions (R, 5), image index and box."""
        if self.fast and self.kind != "ROIPool":
            return self._align(features, regions)
        if len(features) == 1:
            return self._pool(features[0], regions, self.strides[0])
        level = assign_levels(regions[:, 1:], self.lowest, self.highest) - self.lowest
        chosen = _by_level(level, len(features))
        pooled = [self._pool(f, regions[c], s) for f, c, s in zip(features, chosen, self.strides)]
        return torch.cat(pooled)[torch.cat(chosen).argsort()]

    def _align(self, features: Sequence[torch.Tensor], regions: torch.Tensor) -> torch.Tensor:
        if len(features) == 1:
            level = torch.zeros(len(regions), dtype=torch.int64)
        else:
            level = assign_levels(regions[:, 1:], self.lowest, self.highest) - self.lowest
        scales = [1.0 / stride for stride in self.strides]
        aligned = self.kind == "ROIAlignV2"
        with torch.autocast("cpu", enabled=False):  # always in float32, as torchvision's operator
            return roi_align_pyramid(features, regions, level, self.side, scales, self.sampling_ratio, aligned)

    def _pool(self, feature: torch.Tensor, regions: torch.Tensor, stride: int) -> torch.Tensor:
        size, scale = (self.side, self.side), 1.0 / stride
        regions = regions.to(feature.dtype)
        if self.kind == "ROIPool":
            wide = torch.promote_types(feature.dtype, torch.float32)  # torchvision's CPU kernel needs at least float32
            return roi_pool(feature.to(wide), regions.to(wide), size, scale).to(feature.dtype)
        align = roi_align
        if torch.are_deterministic_algorithms_enabled() and feature.is_cuda:
            align = deterministic_roi_align
        return align(feature, regions, size, scale, self.sampling_ratio, self.kind == "ROIAlignV2")
