"""Anchors: the fixed boxes that the RPN scores and regresses.

Shape legend: L feature levels, Hi x Wi cells of level i, A anchors a cell (sizes x aspect ratios).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from loco_det.core.errors import UserError


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> torch.Tensor:
    """Anchors of one cell, centred on the origin, sizes varying slowest.

    Args:
        sizes: square roots of the anchors' areas, in input pixels.
        aspect_ratios: height over width.

    Returns:
        (A, 4) float32 XYXY. Source: Faster R-CNN section 3.1.1; detectron2/modeling/anchor_generator.py.
    """
    boxes = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            boxes.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
    return torch.tensor(boxes, dtype=torch.float32)


def spread_over_levels(values: Sequence, levels: int, key: str) -> list[Sequence[float]]:
    """Expand a config value to one list per level; as in Detectron2, a single list applies to all levels.

    Raises:
        UserError: if `values` is empty or its length is neither 1 nor `levels`; names the config key.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"{key} must be a non-empty list of numbers or of lists, not {values!r}")
    if not isinstance(values[0], Sequence):
        return [values] * levels
    if len(values) == 1:
        return list(values) * levels
    if len(values) != levels:
        raise UserError(
            f"{key} has {len(values)} lists but MODEL.RPN.IN_FEATURES names {levels} features; give 1 or {levels}"
        )
    return list(values)


class AnchorGenerator(nn.Module):
    """Shifts the cell anchors over the grid of every level.

    Args:
        sizes: L lists of anchor sizes in input pixels.
        aspect_ratios: L lists of height over width.
        strides: L strides in input pixels.
        offset: position of the first anchor's centre, in strides, within [0, 1).
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float,
    ) -> None:
        super().__init__()
        self.strides = list(strides)
        self.offset = offset
        for level, (size, ratio) in enumerate(zip(sizes, aspect_ratios)):
            # Not persistent: not in Detectron2's checkpoints.
            self.register_buffer(f"cell{level}", cell_anchors(size, ratio), persistent=False)

    def cells(self) -> list[torch.Tensor]:
        """Return L tensors (A, 4): the anchors of one cell of each level."""
        return [getattr(self, f"cell{level}") for level in range(len(self.strides))]

    def forward(self, grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Return the anchors of every level.

        Args:
            grids: L pairs (Hi, Wi).

        Returns:
            L tensors (Hi*Wi*A, 4) float32 XYXY in input pixels, in the order row, column, anchor.
        """
        levels = []
        for (height, width), stride, cell in zip(grids, self.strides, self.cells()):
            start = self.offset * stride
            y = torch.arange(start, height * stride, stride, dtype=torch.float32, device=cell.device)
            x = torch.arange(start, width * stride, stride, dtype=torch.float32, device=cell.device)
            centres = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1).repeat(1, 2)
            levels.append((centres[:, None] + cell[None]).reshape(-1, 4))
        return levels
