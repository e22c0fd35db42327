"""Both views of a whole batch as tensor operations: the pixels of `views.py`, on any device, in few large steps.

Shape legend: B images in the batch, P pixels in total, n views that are made together, H x W the largest of their
crops, S the view's side. Intermediate views are (n, S, 3, S) float32 tensors of whole numbers from 0 to 255: row,
channel, column.

Workers decode and draw (`views.decode_and_draw`) exactly as for `views.py`; this module does the rest. Pixels are
stored image after image, so a large image costs only its own bytes; crops are padded only to the largest of those that
are resized together, which are of similar size. A crop is resized by one matrix product along its columns and one along
its rows, whatever its size; a flip reverses the rows of the first matrix, and a blur is another pair of products. Every
view has its own order of colour operations: at each position of the order, views with the same operation are processed
together.

Weights are fixed-point numbers, in two parts if they have many bits, so that every sum is a whole number below 2^24,
which float32 holds exactly: the order of summation does not matter, nor do batch size, padding and device. Bits and
rounding are those of the routines in `views.py`: OpenCV's `resize` (11 bits) for crops enlarged on both sides,
otherwise torch's antialiased `interpolate` (15 and more); OpenCV's `transform` (10) for saturation. OpenCV's blur has
no fixed bits and may differ by 1 level of 255.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loco_det.images.views import CUT, LUMA, ViewParams, of_channels

_OPERATIONS = ("brightness", "contrast", "saturation", "hue")
# Columns of the parameters: the crop, four operations in order (or -1), their four factors, the rest.
_PLACE, _FACTOR = 4, 8
_FLIP, _GRAY, _SIGMA, _SOLARIZE = 12, 13, 14, 15
_AT_ONCE = 2**25  # padded crop values that are floats at once
_PART = 256  # bound of the lower part of a weight of many bits
_BLUR_BITS, _BLUR_KEPT = 16, 3  # bits of a weight; of the fraction of a level between the two products


class Decoded(NamedTuple):
    """One step's decoded images of this process, and the parameters of their views."""

    pixels: Tensor  # (P, 3) uint8 RGB, row by row of each image
    sides: Tensor  # (B, 2) int64, each image's height and width
    params: Tensor  # (2, B, 16) float64, a `ViewParams` a row; crops are those of the decoded image
    index: Tensor  # (B,) int64, source index of the image actually used


# --- on the host ------------------------------------------------------------------------------------------------


def packed(
    images: Sequence[tuple[np.ndarray, Sequence[tuple[int, int, int, int]], Sequence[ViewParams]]], index: Sequence[int]
) -> Decoded:
    """Pack the results of `views.decode_and_draw` into one batch; `index` are the source indices."""
    pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image, _, _ in images]))
    sides = torch.tensor([image.shape[:2] for image, _, _ in images])
    rows = [[_row(crops[view], pair[view]) for _, crops, pair in images] for view in range(2)]
    return Decoded(pixels, sides, torch.tensor(rows, dtype=torch.float64), torch.tensor(index))


def _row(crop: tuple[int, int, int, int], params: ViewParams) -> list[float]:
    absent = 4 - len(params.jitter)
    places = [_OPERATIONS.index(name) for name, _ in params.jitter] + [-1] * absent
    factors = [factor for _, factor in params.jitter] + [0.0] * absent
    return [*crop, *places, *factors, params.flip, params.gray, params.blur_sigma, params.solarize]


def join_decoded(parts: Sequence[Decoded], pin: bool) -> Decoded:
    """Join parts into one batch, its pixels optionally in pinned memory."""
    pixels = torch.empty(sum(len(part.pixels) for part in parts), 3, dtype=torch.uint8, pin_memory=pin)
    torch.cat([part.pixels for part in parts], out=pixels)
    sides, params, index = zip(*(part[1:] for part in parts))
    return Decoded(pixels, torch.cat(sides), torch.cat(params, 1), torch.cat(index))


# --- on the device ----------------------------------------------------------------------------------------------


def make_views(decoded: Decoded, size: int, pin: bool = False) -> Tensor:
    """Return (2, B, 3, S, S) uint8 views on the device of the pixels.

    Args:
        decoded: its pixels on any device, the rest on the host, which groups the views.
        pin: return them in pinned memory, if that device is the host.
    """
    pixels, params = decoded.pixels, decoded.params.flatten(0, 1)
    device, count = pixels.device, len(params)
    values = _sent(params.float() if device.type == "mps" else params, device)  # no float64
    places = _sent(_places_of_crops(decoded), device)
    crops = torch.cat([values[:, 2:4], values[:, _FLIP, None]], 1)
    x = torch.empty(count, size, 3, size, device=device)
    for (resize, sides), rows in _groups(device, *_resizings(params.numpy(), size)):
        x.index_copy_(0, rows, resize(_cut(pixels, places[rows], *sides), crops[rows], size))
    for (operation, column), rows in _groups(device, *_changes(params.numpy())):
        x.index_copy_(0, rows, operation(x.index_select(0, rows), values[rows, column].view(-1, 1, 1, 1)))
    views = torch.empty(count, 3, size, size, dtype=torch.uint8, device=device, pin_memory=pin)
    return views.copy_(x.transpose(1, 2)).unflatten(0, (2, count // 2))


def _places_of_crops(decoded: Decoded) -> Tensor:
    """Return (2 B, 4) int64: a crop's first pixel, row stride in pixels, height and width."""
    top, left, height, width = decoded.params[..., :4].long().unbind(2)
    stride = decoded.sides[:, 1]
    areas = decoded.sides.prod(1)
    first = areas.cumsum(0) - areas + top * stride + left
    return torch.stack([first, stride.expand_as(first), height, width], 2).flatten(0, 1)


def _cut(pixels: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """Cut (n, H, 3, W) float32 crops from their upper left corners on, repeating their last row and column."""
    first, stride, own_height, own_width = places[:, :, None, None].unbind(1)
    row = torch.arange(height, device=pixels.device).view(-1, 1).minimum(own_height - 1)
    column = torch.arange(width, device=pixels.device).minimum(own_width - 1)
    number = first + row * stride + column
    cut = pixels.index_select(0, number.flatten()).view(*number.shape, 3).transpose(2, 3)
    return cut.to(torch.float32, memory_format=torch.contiguous_format)


def _resizings(table: np.ndarray, size: int) -> tuple[list[tuple[Callable, tuple[int, int]]], list[np.ndarray]]:
    """Group views: (resizing function of `views.crop_resize`, size of the largest crop), and the rows of each group."""
    sides = table[:, 2:4].astype(int)
    shrinks = (sides > size).any(1)
    what, rows = [], []
    for resize, which in ((_enlarged, ~shrinks), (_shrunk, shrinks)):
        for some in _alike(sides, np.flatnonzero(which)):
            what.append((resize, tuple(sides[some].max(0).tolist())))
            rows.append(some)
    return what, rows


def _alike(sides: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield rows by crop area, in groups of at most _AT_ONCE padded values or a single crop."""
    rows = rows[np.argsort(sides[rows].prod(1), kind="stable")]
    first, largest = 0, (0, 0)
    for k, own in enumerate(sides[rows].tolist()):
        largest = (max(largest[0], own[0]), max(largest[1], own[1]))
        if first < k and 3 * (k + 1 - first) * largest[0] * largest[1] > _AT_ONCE:
            yield rows[first:k]
            first, largest = k, tuple(own)
    if first < len(rows):
        yield rows[first:]


def _changes(table: np.ndarray) -> tuple[list[tuple[Callable, int]], list[np.ndarray]]:
    """Return (operation, column of its parameter) in order of application, and the rows of views that have it."""
    jitter = (_brightness, _contrast, _saturation, _hue)
    what = [(jitter[number], _FACTOR + place) for place in range(4) for number in range(4)]
    which = [table[:, _PLACE + place] == number for place in range(4) for number in range(4)]
    for operation, column in ((_gray, _GRAY), (_blur, _SIGMA), (_solarize, _SOLARIZE)):
        what.append((operation, column))
        which.append(table[:, column] > 0)
    return what, [np.flatnonzero(chosen) for chosen in which]


def _groups(device: torch.device, what: Sequence, rows: Sequence[np.ndarray]) -> list[tuple]:
    """Return (what, int64 rows on the device) for non-empty rows; all rows are sent together."""
    parts = _sent(torch.from_numpy(np.concatenate(rows)), device).split([len(some) for some in rows])
    return [(one, part) for one, part in zip(what, parts) if len(part)]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a small host tensor to the device without synchronising."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# --- crop, resize, flip -----------------------------------------------------------------------------------------


def _enlarged(x: Tensor, crops: Tensor, size: int) -> Tensor:
    """Enlarge (n, H, 3, W) crops, at most S high and wide, to (n, S, 3, S), as OpenCV does.

    Args:
        crops: (n, 3), heights, widths and flip flags.

    OpenCV rounds the sum along the columns down to 1/128 of a level, both terms along the rows down to a quarter, and
    their sum to a level.
    """
    height, width, flip = crops[:, :, None, None].unbind(1)
    first, second = _linear(width, size, x.shape[3])
    x = _by_columns(x, _flipped(first + second, flip)).mul_(2**-4).floor_()
    upper, lower = _by_rows(x, _parts(torch.cat(_linear(height, size, x.shape[1]), 1))).chunk(2, 1)
    first, second = lower.div_(_PART).floor_().add_(upper).div_(_PART).floor_().chunk(2, 1)
    return (first + second).add_(2).mul_(2**-2).floor_()


def _linear(length: Tensor, size: int, extent: int) -> tuple[Tensor, Tensor]:
    """Return (n, S, extent) weights in 1/2048 of the pixel before each new pixel's centre, and of the one after it.

    Args:
        length: (n, 1, 1), the part of the extent that is the crop.
    """
    new, old, length = _places(length, size, extent)
    place = (length * (2 * new + 1) - size) / (2 * size)  # of whole numbers: a single rounding
    before = place.floor()
    share = place - before
    last = length - 1
    first = (old == before.clamp(min=0)) * torch.round((1 - share) * 2048)
    return first, (old == (before + 1).minimum(last)) * torch.round(share * 2048)


def _shrunk(x: Tensor, crops: Tensor, size: int) -> Tensor:
    """Shrink (n, H, 3, W) crops to (n, S, 3, S), antialiased as in torch, rounded to levels after the columns.

    Arguments as for `_enlarged`.
    """
    height, width, flip = crops[:, :, None, None].unbind(1)
    weights, bits = _triangle(width, size, x.shape[3])
    x = _whole(*_by_columns(x, _parts(_flipped(weights, flip))).chunk(2, 3), bits)
    weights, bits = _triangle(height, size, x.shape[1])
    return _whole(*_by_rows(x, _parts(weights)).chunk(2, 1), bits).clamp_(0, 255)


def _triangle(length: Tensor, size: int, extent: int) -> tuple[Tensor, Tensor]:
    """Return (n, S, extent) whole-number weights and (n, 1, 1, 1) bits: they sum to 2^bits.

    As many bits as keep a crop's largest weight below 2^15, up to 22.
    """
    new, old, whole = _places(length, size, extent)
    reach = 2 * whole.clamp(min=size)
    weights = (reach - (2 * size * old - whole * (2 * new + 1) + size).abs()).clamp_(min=0)
    weights = (weights * (old < whole)).to(length.dtype)
    weights /= weights.sum(2, keepdim=True)
    largest = weights.amax((1, 2), keepdim=True)
    powers = 2.0 ** torch.arange(1, 23, device=weights.device)
    bits = (largest * powers + 0.5 < 2**15).sum(2, keepdim=True)
    return (weights * 2.0**bits + 0.5).floor_().float(), bits.unsqueeze(3)


def _places(length: Tensor, size: int, extent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (S, 1) indices of the new pixels, (extent,) of the old ones, and the crop's length."""
    new = torch.arange(size, dtype=torch.float32, device=length.device).view(-1, 1)
    return new, torch.arange(extent, dtype=torch.float32, device=length.device), length.float()


def _flipped(weights: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip > 0, weights.flip(1), weights)


# --- products of whole numbers ----------------------------------------------------------------------------------


def _by_columns(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply each row of (n, H, 3, W) values by its image's (n, K, W) weights: (n, H, 3, K)."""
    n, height, channels, width = x.shape
    return torch.bmm(x.reshape(n, height * channels, width), weights.transpose(1, 2)).view(n, height, channels, -1)


def _by_rows(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply each column of (n, H, 3, W) values by its image's (n, K, H) weights: (n, K, 3, W)."""
    n, height, channels, width = x.shape
    return torch.bmm(weights, x.reshape(n, height, channels * width)).view(n, -1, channels, width)


def _parts(weights: Tensor) -> Tensor:
    """Split (n, S, extent) whole numbers into quotient and remainder of 256: (n, 2 S, extent)."""
    upper = (weights / _PART).floor_()
    return torch.cat([upper, weights - _PART * upper], 1)


def _whole(upper: Tensor, lower: Tensor, bits: Tensor | int) -> Tensor:
    """Combine products with both `_parts`, divide by 2^bits and round half up."""
    half, unit = 2.0 ** (bits - 9), 2.0 ** (8 - bits)
    return (lower / _PART).floor_().add_(upper).add_(half).mul_(unit).floor_()


# --- colours: (n, S, 3, S) values and their (n, 1, 1, 1) parameters -> values, as in `views.py` ------------------


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _scaled(x, factor, CUT).abs_().round_().clamp_(max=255)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    means = x.sum((1, 3)).to(factor.dtype) / x.shape[1] ** 2
    luma = sum(weight * means[:, channel] for channel, weight in enumerate(LUMA)).view(-1, 1, 1, 1)
    return _scaled(x, factor, ((1 - factor) * (luma + CUT)).float() + CUT).round_().clamp_(0, 255)


def _scaled(x: Tensor, factor: Tensor, offset: Tensor | float) -> Tensor:
    """Return x factor + offset, rounded to float32 once, as by a fused multiply-add."""
    return x.to(factor.dtype).mul_(factor.float()).add_(offset).float()


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    rest = (1 - factor).float()
    grey = rest * of_channels(LUMA, x.device).view(3, 1)
    own, others = ((factor.float() + grey) * 1024).round_(), (grey * 1024).round_()
    offset = ((rest * CUT + CUT + 0.5) * 1024).round_()
    luma = (x * others).sum(2, keepdim=True)
    return (x * (own - others)).add_(luma).add_(offset).mul_(2**-10).floor_().clamp_(0, 255)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    turn = 6 * shift + 0.5
    sextants = turn.floor()
    part = (turn - sextants - 0.5).float()
    direction = torch.where(part < 0, -1, 1)
    channel = torch.arange(3, device=x.device).view(1, 1, 3, 1)
    x = _channels(x, direction * channel)
    high, low = x.amax(2, keepdim=True), x.amin(2, keepdim=True)
    step = ((high - low) * part.abs()).round_()
    falling, rising = high - step, low + step
    after, before = x.roll(-1, 2), x.roll(1, 2)
    target = torch.where(after >= before, torch.maximum(falling, rising), rising)
    x = (x + target - after).maximum(low).minimum(high)
    odd = sextants % 2
    x = torch.where(odd > 0, high + low - x, x)
    return _channels(x, direction * (channel - ((sextants - 3 * odd) / 2).long()))


def _channels(x: Tensor, order: Tensor) -> Tensor:
    """Permute the channels of each view by the (n, 1, 3, 1) order, modulo 3."""
    return x.gather(2, (order % 3).expand_as(x))


def _gray(x: Tensor, _: Tensor) -> Tensor:
    weights = of_channels((9798.0, 19235.0, 3735.0), x.device)  # LUMA in 15 bits
    return (x * weights.view(3, 1)).sum(2, keepdim=True).add_(2**14).mul_(2**-15).floor_().expand_as(x)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    weights = _parts(_gaussian(sigma.view(-1, 1), x.shape[1]))
    x = _whole(*_by_columns(x, weights).chunk(2, 3), _BLUR_BITS - _BLUR_KEPT)
    return _whole(*_by_rows(x, weights).chunk(2, 1), _BLUR_BITS + _BLUR_KEPT).clamp_(0, 255)


def _gaussian(sigma: Tensor, size: int) -> Tensor:
    """Return (n, S, S) whole-number weights in 2^-16 for (n, 1) deviations, cut off and mirrored as in `views.blur`."""
    distance = torch.arange(2 * size, dtype=sigma.dtype, device=sigma.device)
    curve = torch.exp(-((distance / sigma) ** 2) / 2) * (distance <= torch.ceil(3 * sigma).clamp(max=size - 1))
    curve = (curve * 2**20).round_().float()  # whole, so that their sum is exact
    curve[:, -1] = 0
    place = torch.arange(size, device=sigma.device)
    total, nothing = place + place[:, None], torch.full((size, size), 2 * size - 1, device=sigma.device)
    mirrored_low = torch.where(place > 0, total, nothing)  # column 0 is its own mirror image
    mirrored_high = torch.where(place < size - 1, 2 * (size - 1) - total, nothing)
    taps = torch.stack([(place - place[:, None]).abs(), mirrored_low, mirrored_high])
    weights = curve.index_select(1, taps.flatten()).view(-1, *taps.shape).sum(1)
    weights /= weights.sum(2, keepdim=True)
    return (weights * 2**_BLUR_BITS + 0.5).floor_()


def _solarize(x: Tensor, _: Tensor) -> Tensor:
    return torch.minimum(x, 255 - x)
