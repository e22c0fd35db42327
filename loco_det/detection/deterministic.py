"""ROIAlign with a deterministic gradient, for DETERMINISTIC on a GPU.

torchvision's kernel sums the gradient by atomic additions, in any order. Its deterministic form, for torch.compile,
takes every cell of the map as a sample of every bin where the sampling ratio is 0, too many for a detector. Here the
forward is torchvision's kernel, in which no two threads write to one place, and the backward products of matrices.

Shape legend: B images, R regions, S pooled side, features (B, C, H, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loco_det.detection.cpu_speed import precision, region_weights

REGIONS_AT_ONCE = 64  # in a backward: 150 MB for 256 channels of a map 336 cells wide


def deterministic_roi_align(
    feature: Tensor, regions: Tensor, size: tuple[int, int], scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Pool regions as `torchvision.ops.roi_align` does, with its gradient up to rounding.

    Args:
        regions: (R, 5) image number and XYXY box in input pixels, without a gradient.
        size: (S, S).
        scale: feature cells per pixel.
        sampling_ratio: samples per bin side; 0 means the number of cells under the bin.
        aligned: with the half-pixel correction.

    Returns:
        (R, C, S, S).
    """
    return _Align.apply(feature, regions, size[0], scale, sampling_ratio, aligned)


class _Align(torch.autograd.Function):
    """Keeps the weights of each region's bins along each axis, (R, S, H) and (R, S, W), and the images (R,)."""

    @staticmethod
    def forward(
        ctx: Any, feature: Tensor, regions: Tensor, side: int, scale: float, sampling_ratio: int, aligned: bool
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            boxes = regions[:, 1:].to(precision(feature)) * scale
            (rows, *_), (columns, *_) = region_weights(boxes, feature.shape[-2:], side, sampling_ratio, aligned)
            ctx.save_for_backward(rows, columns, regions[:, 0])
            ctx.shape, ctx.dtype = feature.shape, feature.dtype
        return torch.ops.torchvision.roi_align(feature, regions, scale, side, side, sampling_ratio, aligned)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, images = ctx.saved_tensors
        gradient = gradient.to(rows.dtype)
        total = gradient.new_zeros(ctx.shape)
        for image in range(len(total)):
            for some in (images == image).nonzero().squeeze(1).split(REGIONS_AT_ONCE):
                across = torch.einsum("rcij,rjx->ricx", gradient[some], columns[some])
                total[image] += torch.einsum("riy,ricx->cyx", rows[some], across)
        return total.to(ctx.dtype), None, None, None, None, None
