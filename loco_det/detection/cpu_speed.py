"""Fast forms of a detector's parts for CPUs: the same formulas up to rounding.

`speed_up` sets `fast` on every part of a network that has two forms. A network starts exact: its numbers match
Detectron2's bit for bit. On a GPU it stays exact, because the fast forms have not been measured there. Folded
normalisation (backbones/folding.py) follows the same switch.

Shape legend: B images, N anchors, K classes, R regions over all images, S pooled side, L levels, feature l
(B, C, Hl, Wl), T cells along an axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKS_AT_ONCE = 64  # regions whose masks are computed together


def speed_up(model: nn.Module, on: bool = True) -> nn.Module:
    """Switch every part of `model` that has two forms to the fast form, or with `on` False to the exact one.

    Returns `model`. A model on a GPU stays exact. Detectron2's own models have no such parts.
    """
    on = on and all(parameter.device.type == "cpu" for parameter in model.parameters())
    for part in model.modules():
        if hasattr(type(part), "fast"):
            part.fast = on
    return model


def is_fast(model: nn.Module) -> bool:
    """Whether a detector of either engine uses its fast form."""
    return getattr(model, "fast", False)


def bump_versions(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A fused optimiser does not bump tensor versions, by which cached weights are invalidated."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            torch.autograd.graph.increment_version(parameter)


# --- RPN and mask head ------------------------------------------------------------------------------------------


def predict_cells(
    conv: nn.Conv2d,
    objectness: nn.Conv2d,
    deltas: nn.Conv2d,
    features: Sequence[Tensor],
    image: Tensor,
    anchor: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predict an RPN head's logits (N,) and deltas (N, 4) at N anchors only.

    The RPN's loss samples a few hundred anchors; forward and backward visit only their cells.

    Args:
        conv, objectness, deltas: the head's 3x3 convolution, which ends in a ReLU, and its two 1x1 convolutions.
        features: L maps (B, C, Hi, Wi).
        image, anchor: (N,) int64, the anchor as its index among all levels' anchors of an image.
    """
    per_cell = objectness.out_channels
    cell = torch.div(anchor, per_cell, rounding_mode="floor")
    patches, order, before = [], [], 0
    for feature in features:
        height, width = feature.shape[-2:]
        mine = ((cell >= before) & (cell < before + height * width)).nonzero().squeeze(1)
        patches.append(cell_patches(feature, image[mine], cell[mine] - before))
        order.append(mine)
        before += height * width
    place = torch.cat(order).argsort()
    patch = torch.cat(patches)[place]
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # in the order of the patches: row, column, channel
    hidden = F.relu_(F.linear(patch, weight, conv.bias))
    scores = F.linear(hidden, objectness.weight.flatten(1), objectness.bias)
    found = F.linear(hidden, deltas.weight.flatten(1), deltas.bias)
    index = (anchor % per_cell)[:, None]
    found = found.view(len(found), per_cell, 4).gather(1, index[:, :, None].expand(-1, -1, 4))
    return scores.gather(1, index).squeeze(1), found.squeeze(1)


def cell_patches(feature: Tensor, image: Tensor, cell: Tensor) -> Tensor:
    """Return the 3x3 neighbourhoods (N, 9 * C) of N cells of a feature (B, C, H, W), zero-padded.

    Args:
        image, cell: (N,) int64, the cell as row * W + column.
    """
    channels, height, width = feature.shape[1:]
    around = torch.arange(-1, 2)
    y = torch.div(cell, width, rounding_mode="floor")[:, None, None] + around[:, None]
    x = (cell % width)[:, None, None] + around
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    index = (image[:, None, None] * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    rows = feature.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, index.flatten())
    return (rows * inside.flatten()[:, None]).view(len(cell), 9 * channels)


def logits_of_own_class(deconv: nn.ConvTranspose2d, predictor: nn.Conv2d, x: Tensor, classes: Tensor) -> Tensor:
    """Compute the last two layers of a mask head as matrix products, for each region's own class only.

    The four pixels that the deconvolution makes of one stay adjacent until they are logits.

    Args:
        deconv: 2x2, stride 2.
        predictor: 1x1 to K classes, or to one class-agnostic.
        x: (R, C, S, S).
        classes: (R,) int64 in [0, K).

    Returns:
        (R, 2S, 2S).
    """
    # In backward each part needs the gradient of its hidden map, the largest of the network, and no longer than that.
    parts = zip(x.split(MASKS_AT_ONCE), classes.split(MASKS_AT_ONCE))
    return torch.cat([_logits_of_part(deconv, predictor, *part) for part in parts])


def _logits_of_part(deconv: nn.ConvTranspose2d, predictor: nn.Conv2d, x: Tensor, classes: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    weight = deconv.weight.permute(2, 3, 1, 0).reshape(-1, channels)  # two rows, two columns, out channels
    cells = x.permute(0, 2, 3, 1).reshape(-1, channels)
    hidden = F.relu_(F.linear(cells, weight, deconv.bias.repeat(4)))
    chosen = classes if predictor.out_channels > 1 else torch.zeros_like(classes)
    weight = predictor.weight.flatten(1)[chosen]
    logits = torch.bmm(hidden.view(count, 4 * height * width, weight.shape[1]), weight[:, :, None])
    logits = logits.view(count, height, width, 2, 2).transpose(2, 3).reshape(count, 2 * height, 2 * width)
    return logits + predictor.bias[chosen][:, None, None]


# --- ROIAlign ---------------------------------------------------------------------------------------------------
#
# A bin is the mean of samples on a grid in it, each a bilinear mean of four cells. Along each axis a region is a matrix
# of weights, bins by cells, and its pooled features are Wy F Wx'. torchvision's operator instead visits every sample of
# every channel on one thread, and takes four times (forward) to ten times (backward) as long.
# Source of the arithmetic: torchvision/csrc/ops/cpu/roi_align_kernel.cpp.


def roi_align_pyramid(
    features: Sequence[Tensor],
    regions: Tensor,
    level: Tensor,
    side: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool each region from its own level by ROIAlign, as `torchvision.ops.roi_align` up to rounding.

    Args:
        features: L maps.
        regions: (R, 5) image number and XYXY box in input pixels.
        level: (R,) int64 in [0, L).
        side: S.
        scales: feature cells per pixel of each level.
        sampling_ratio: samples per bin side; 0 means the number of cells under the bin.
        aligned: with the half-pixel correction.

    Returns:
        (R, C, S, S) of the features' dtype.
    """
    places, weights = [], []
    for index, (feature, scale) in enumerate(zip(features, scales)):
        chosen = (level == index).nonzero().squeeze(1)
        boxes = regions[chosen, 1:].to(precision(feature)) * scale
        vertical, horizontal = region_weights(boxes, feature.shape[-2:], side, sampling_ratio, aligned)
        (rows, top, bottom), (columns, left, right) = vertical, horizontal
        image = regions[chosen, 0].to(torch.int64)
        places.append(torch.stack([chosen, image, top, bottom, left, right], dim=1).tolist())
        weights.append((rows, columns))
    return _Pool.apply(places, weights, side, *features)


Axis = tuple[Tensor, Tensor, Tensor]
"""What `axis_weights` returns."""


def region_weights(
    boxes: Tensor, shape: Sequence[int], side: int, sampling_ratio: int, aligned: bool
) -> tuple[Axis, Axis]:
    """Return the vertical and the horizontal weights of regions.

    Args:
        boxes: (R, 4) XYXY in cells.
        shape: (H, W) of the feature.
        side, sampling_ratio, aligned: as for `roi_align_pyramid`.
    """
    boxes = boxes - (0.5 if aligned else 0.0)
    lengths = boxes[:, 2:] - boxes[:, :2]
    lengths = lengths if aligned else lengths.clamp(min=1.0)
    vertical = axis_weights(boxes[:, 1], lengths[:, 1], shape[0], side, sampling_ratio)
    return vertical, axis_weights(boxes[:, 0], lengths[:, 0], shape[1], side, sampling_ratio)


def axis_weights(start: Tensor, length: Tensor, cells: int, side: int, ratio: int) -> Axis:
    """Return the weight of each cell in each bin along one axis.

    Args:
        start, length: (R,) of the regions, in cells.
        cells: T.
        side: S.
        ratio: samples per bin; 0 means the number of cells under it.

    Returns:
        (R, S, T) float32 weights; (R,) int64 first cell with a weight and (R,) the one after the last, equal if there
        is none.
    """
    samples = torch.full_like(start, ratio) if ratio > 0 else torch.ceil(length / side)
    k = torch.arange(int(samples.max().clamp(min=0)) if len(samples) else 0, device=start.device)
    size, samples = (length / side)[:, None, None], samples[:, None, None]
    position = (
        start[:, None, None] + torch.arange(side, device=start.device)[:, None] * size + (k + 0.5) * size / samples
    )
    used = (k < samples) & (position >= -1.0) & (position <= cells)  # samples further outside are 0
    position = torch.where(used, position.clamp(min=0), 0)
    low = position.to(torch.int64).clamp(max=cells - 1)
    high = (low + 1).clamp(max=cells - 1)
    beyond = torch.where(low < cells - 1, position - low, 0)
    share = used / samples.clamp(min=1)
    weights = start.new_zeros(len(start), side, cells)
    weights.scatter_add_(2, low, (1 - beyond) * share)
    weights.scatter_add_(2, high, torch.where(used, beyond, 0) * share)
    some = used.flatten(1).any(1)
    if not len(k):
        return weights, some.to(torch.int64), some.to(torch.int64)
    first = torch.where(used, low, cells).flatten(1).amin(1)
    last = torch.where(used, high, -1).flatten(1).amax(1) + 1
    return weights, torch.where(some, first, 0), torch.where(some, last, 0)


class _Pool(torch.autograd.Function):
    """ROIAlign as matrix products; `places` lists per level its regions' (region, image, top, bottom, left, right)."""

    @staticmethod
    def forward(ctx: Any, places: list, weights: list, side: int, *features: Tensor) -> Tensor:
        channels, dtype = features[0].shape[1], precision(features[0])
        out = torch.empty(sum(map(len, places)), channels, side, side, dtype=dtype)
        pooled = torch.empty(side, side, channels, dtype=dtype)
        with _one_thread():
            for feature, rois, (rows, columns) in zip(features, places, weights):
                cells = feature.to(dtype).permute(0, 2, 3, 1).contiguous()
                for i, (region, *place) in enumerate(rois):
                    area, (top, bottom, left, right) = _cells(cells, *place), place[1:]
                    if area is None:
                        out[region] = 0
                        continue
                    across = torch.mm(rows[i, :, top:bottom], area).view(side, -1, channels)
                    torch.bmm(columns[i, :, left:right].expand(side, -1, -1), across, out=pooled)
                    out[region].copy_(pooled.permute(2, 0, 1))  # while it is cached
        ctx.places, ctx.weights = places, weights
        ctx.like = [(feature.shape, feature.dtype) for feature in features]
        return out.to(features[0].dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.to(precision(gradient))
        channels, side = gradient.shape[1:3]
        results: list[Tensor | None] = []
        with _one_thread():
            levels = zip(ctx.like, ctx.places, ctx.weights, ctx.needs_input_grad[3:])
            for ((images, _, height, width), dtype), rois, (rows, columns), needed in levels:
                if not needed:
                    results.append(None)
                    continue
                cells = gradient.new_zeros(images, height, width, channels)
                for i, (region, *place) in enumerate(rois):
                    area, (top, bottom, left, right) = _cells(cells, *place), place[1:]
                    if area is not None:
                        pooled = gradient[region].permute(1, 2, 0).contiguous()
                        across = torch.bmm(columns[i, :, left:right].t().expand(side, -1, -1), pooled)
                        area.addmm_(rows[i, :, top:bottom].t(), across.view(side, -1))
                results.append(cells.permute(0, 3, 1, 2).to(dtype))
        return None, None, None, *results


def precision(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _cells(cells: Tensor, image: int, top: int, bottom: int, left: int, right: int) -> Tensor | None:
    """Return the cells under a region as a matrix view (rows, columns * C); None if there are none."""
    if top >= bottom or left >= right:
        return None
    width, channels = cells.shape[2:]
    return cells[image, top:bottom, left:right].as_strided(
        (bottom - top, (right - left) * channels), (width * channels, 1)
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread for thousands of small products, each cheaper than waking other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
