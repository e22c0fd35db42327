"""Two augmented views of one image, by OpenCV: the random crops and colours of SimCLR and MoCo v2.

Shape legend: H x W the decoded image, S the view's side, B images in a batch; pixels are RGB, uint8, 0-255.

The distribution is torchvision's (RandomResizedCrop, RandomHorizontalFlip, RandomApply(ColorJitter),
RandomGrayscale, RandomApply(GaussianBlur), RandomSolarize(128), in this order); sources: SimCLR (arXiv 2002.05709,
appendix A), MoCo v2 (arXiv 2003.04297), BYOL (arXiv 2006.07733) for solarize. With the same parameters a crop, flip,
colour operation, blur or solarize differs from `torchvision.transforms.v2.functional` by at most 1 level of 255, which
`tests/test_views_operations.py` asserts.

A view is a pure function of (bytes, config, seed, epoch, index, view): a counter-based generator gives each its own
stream, in any worker or rank. Views are uint8: a quarter of float32's bytes through workers, pinned memory and the bus;
`normalise` converts them to float in one pass on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from loco_det.core.errors import UserError
from loco_det.images.decode import REDUCTIONS, decode_image, jpeg_size

# Defaults of the keys under AUGMENT.
PRESETS: dict[str, dict[str, Any]] = {
    "simclr": {"CROP_SCALE": (0.08, 1.0), "JITTER": (0.8, 0.8, 0.8, 0.2)},
    "mocov2": {"CROP_SCALE": (0.2, 1.0), "JITTER": (0.4, 0.4, 0.4, 0.1)},
}
_SHARED = {
    "FLIP_PROB": 0.5,
    "JITTER_PROB": 0.8,
    "GRAY_PROB": 0.2,
    "BLUR_PROB": 0.5,
    "BLUR_SIGMA": (0.1, 2.0),
    "SOLARIZE_PROB": 0.0,
}
KEYS = ("PRESET", "CROP_SCALE", "JITTER", *_SHARED)

CROP_RATIO = (3 / 4, 4 / 3)  # width / height
_CROP_ATTEMPTS = 10
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# torchvision and PIL truncate blended values where OpenCV rounds: they agree after subtracting half a level. A little
# less than half, so that whole numbers do not change.
CUT = -0.499
# Affine maps (3, 4) of a pixel: identity, its luma truncated as in torchvision, one, and only the truncation.
_COLOUR = np.eye(3, 4, dtype=np.float32)
_GREY = np.tile(np.float32([*LUMA, CUT]), (3, 1))
_ONE = np.float32([[0, 0, 0, 1]])
_OFFSET = CUT * _ONE
_MOST = 1000.0  # limit of a jitter's strength and of a blur's pixels, against overflow
_MOST_DRAWS = 2 * _CROP_ATTEMPTS + 2 + 15


@dataclass(frozen=True)
class ViewConfig:
    """One view's distribution. Ranges are (low, high); `jitter` is brightness, contrast, saturation, hue."""

    size: int
    crop_scale: tuple[float, float]  # share of the image's area
    flip_prob: float
    jitter: tuple[float, float, float, float]
    jitter_prob: float
    gray_prob: float
    blur_prob: float
    blur_sigma: tuple[float, float]  # pixels of the view
    solarize_prob: float


@dataclass(frozen=True)
class ViewParams:
    """One draw from a ViewConfig; applying it is deterministic."""

    crop: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # (operation, factor) in the order of application
    gray: bool
    blur_sigma: float  # 0: none
    solarize: bool


def view_config(size: int, augment: Mapping[str, Any]) -> ViewConfig:
    """Return the distribution of views of `size` pixels for the keys under AUGMENT.

    A key that is absent, None, [] or -1 takes the preset's value; AUGMENT.PRESET is simclr or mocov2.

    Raises:
        UserError: an unknown key or preset, or a value out of range; names the key.
    """
    unknown = sorted(set(augment) - set(KEYS))
    if unknown:
        raise UserError(f"AUGMENT.{unknown[0]} is no key; use one of {', '.join(KEYS)}")
    preset = augment.get("PRESET", "simclr")
    if preset not in PRESETS:
        raise UserError(f"AUGMENT.PRESET {preset!r} is unknown; use one of {', '.join(PRESETS)}")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"DATA.IMAGE_SIZE {size!r} is not a number of pixels; use 224, or 32 for small images")
    given = {k: v for k, v in augment.items() if v is not None and v != -1 and v not in ([], ())}
    values = {**_SHARED, **PRESETS[preset], **given}
    for key in (key for key in values if key.endswith("_PROB")):
        _numbers(key, [values[key]], 1, 0.0, 1.0)
    return ViewConfig(
        size=size,
        crop_scale=_range("CROP_SCALE", values["CROP_SCALE"], 1.0),
        jitter=_jitter(values["JITTER"]),
        blur_sigma=_range("BLUR_SIGMA", values["BLUR_SIGMA"], _MOST),
        **{key.lower(): float(values[key]) for key in values if key.endswith("_PROB")},
    )


def _numbers(key: str, value: Any, count: int, low: float, high: float) -> tuple[float, ...]:
    good = isinstance(value, Sequence) and len(value) == count
    if not good or not all(isinstance(v, (int, float)) and low <= v <= high for v in value):
        what = f"{count} number{'s' * (count > 1)} from {low:g} to {high:g}"
        raise UserError(f"AUGMENT.{key} {value!r} must be {what}; correct it")
    return tuple(float(v) for v in value)


def _range(key: str, value: Any, high: float) -> tuple[float, float]:
    low, top = _numbers(key, value, 2, 0.0, high)
    if not 0 < low <= top:
        raise UserError(f"AUGMENT.{key} {value!r} must be [low, high] with 0 < low <= high; correct it")
    return low, top


def _jitter(value: Any) -> tuple[float, float, float, float]:
    brightness, contrast, saturation, hue = _numbers("JITTER", value, 4, 0.0, _MOST)
    if hue > 0.5:
        raise UserError(f"AUGMENT.JITTER {value!r}: hue is a share of the colour circle; use at most 0.5")
    return brightness, contrast, saturation, hue


def view_draws(seed: int, epoch: int, index: int) -> tuple[Iterator[float], Iterator[float]]:
    """Yield uniform numbers in [0, 1) for either view; no two of (seed, epoch, index, view) share any."""
    numbers = stream(seed, epoch, index).random(2 * _MOST_DRAWS).tolist()
    return iter(numbers[:_MOST_DRAWS]), iter(numbers[_MOST_DRAWS:])


def stream(seed: int, epoch: int, use: int) -> np.random.Generator:
    """Return the random generator of one use, any unsigned 64-bit integer such as an image's index."""
    # As uint64 arrays, because numpy converts lists of large integers through float64. The counter's lowest word counts
    # the draws; an explicit key skips SeedSequence's hashing.
    key, counter = np.array([seed % 2**64, epoch], np.uint64), np.array([0, use, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw_view(config: ViewConfig, height: int, width: int, draws: Iterator[float]) -> ViewParams:
    """Draw one view's parameters for a H x W image from uniform numbers in [0, 1)."""
    return ViewParams(
        crop=_draw_crop(config.crop_scale, height, width, draws),
        flip=next(draws) < config.flip_prob,
        jitter=_draw_jitter(config.jitter, draws) if next(draws) < config.jitter_prob else (),
        gray=next(draws) < config.gray_prob,
        blur_sigma=_between(*config.blur_sigma, draws) if next(draws) < config.blur_prob else 0.0,
        solarize=next(draws) < config.solarize_prob,
    )


def _between(low: float, high: float, draws: Iterator[float]) -> float:
    return low + (high - low) * next(draws)


def _draw_crop(
    scale: tuple[float, float], height: int, width: int, draws: Iterator[float]
) -> tuple[int, int, int, int]:
    """Draw a crop with uniform area in `scale`, log ratio in CROP_RATIO and position; retry if it does not fit."""
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * _between(*scale, draws)
        ratio = math.exp(_between(low, high, draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(draws) * (height - h + 1)), int(next(draws) * (width - w + 1)), h, w
    # A long, thin image: the largest central crop of legal ratio, torchvision's fallback.
    w = min(width, round(height * CROP_RATIO[1]))
    h = min(height, round(width / CROP_RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _draw_jitter(strengths: Sequence[float], draws: Iterator[float]) -> tuple[tuple[str, float], ...]:
    places = [next(draws) for _ in range(4)]
    factors = [_between(max(0.0, 1 - s), 1 + s, draws) for s in strengths[:3]]
    factors.append(_between(-strengths[3], strengths[3], draws))
    named = list(zip(("brightness", "contrast", "saturation", "hue"), factors, strengths))
    order = sorted(range(4), key=places.__getitem__)
    return tuple((named[i][0], named[i][1]) for i in order if named[i][2] > 0)


def two_views(data: bytes, name: str, config: ViewConfig, seed: int, epoch: int, index: int, out: np.ndarray) -> None:
    """Write both views of an encoded image into `out`, (2, 3, S, S) uint8, contiguous.

    Raises:
        UserError: the image cannot be decoded; names it.
    """
    image, crops, pair = decode_and_draw(data, name, config, seed, epoch, index)
    for crop, params, planes in zip(crops, pair, out):
        finish_view(crop_resize(image, crop, config.size), params, planes)


class Ahead(NamedTuple):
    """What is known of an image's views before decoding: nothing unless it is a JPEG."""

    size: tuple[int, int] | None  # height, width as stored
    pair: list[ViewParams] | None


def draw_ahead(data: bytes, config: ViewConfig, seed: int, epoch: int, index: int) -> Ahead:
    """Draw both views' parameters, if the image's size is known without decoding."""
    size = jpeg_size(data)
    return Ahead(size, None if size is None else _draw_pair(config, size, seed, epoch, index))


def decode_and_draw(
    data: bytes,
    name: str,
    config: ViewConfig,
    seed: int,
    epoch: int,
    index: int,
    ahead: Ahead | None = None,
) -> tuple[np.ndarray, list[tuple[int, int, int, int]], list[ViewParams]]:
    """Return the (h, w, 3) uint8 decoded image, both views' crops of it (top, left, height, width), and all parameters.

    The image is decoded once, and a JPEG at 1/2, 1/4 or 1/8 if each crop keeps S pixels on either side; the crops'
    borders are then rounded to coarse pixels.

    Args:
        ahead: the result of `draw_ahead`, if called.

    Raises:
        UserError: the image cannot be decoded; names it.
    """
    size, pair = ahead or draw_ahead(data, config, seed, epoch, index)
    reduce = 1 if pair is None else reduction(pair, config.size)
    image = decode_image(data, name, reduce=reduce)
    if size is None or image.shape[:2] != _coarse(size, reduce):
        # Rotated by EXIF, so that its crops may need finer pixels; or not a JPEG.
        size = image.shape[:2] if reduce == 1 else size[::-1]
        pair = _draw_pair(config, size, seed, epoch, index)
        if reduce > 1 and (image.shape[:2] != _coarse(size, reduce) or reduction(pair, config.size) < reduce):
            reduce, image = 1, decode_image(data, name)
            pair = _draw_pair(config, image.shape[:2], seed, epoch, index)
    return image, [_reduced(params.crop, reduce, image.shape) for params in pair], pair


def _draw_pair(config: ViewConfig, size: tuple[int, int], seed: int, epoch: int, index: int) -> list[ViewParams]:
    return [draw_view(config, *size, draws) for draws in view_draws(seed, epoch, index)]


def _coarse(size: tuple[int, int], factor: int) -> tuple[int, int]:
    return -(-size[0] // factor), -(-size[1] // factor)


def reduction(pair: Sequence[ViewParams], size: int) -> int:
    """Return the coarsest of 1, 2, 4, 8 at which every crop of `pair` keeps `size` pixels on either side."""
    least = min(min(params.crop[2:]) for params in pair)
    return next((factor for factor in REDUCTIONS if least >= factor * size), 1)


def finish_view(view: np.ndarray, params: ViewParams, out: np.ndarray) -> None:
    """Apply the rest of `params` to a (S, S, 3) resized crop, and write it to `out`, (3, S, S), contiguous."""
    for operation, factor in params.jitter:
        view = _JITTER[operation](view, factor)
    if params.gray:  # one channel suffices until the end
        view = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
    if params.blur_sigma > 0:
        view = blur(view, params.blur_sigma)
    if params.solarize:
        view = solarize(view)
    if params.flip:  # commutes with everything else
        view = cv2.flip(view, 1)
    if params.gray:
        out[:] = view
    else:
        cv2.split(view, list(out))


def _reduced(crop: tuple[int, int, int, int], factor: int, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    if factor == 1:
        return crop
    top, left, height, width = (round(value / factor) for value in crop)
    height, width = min(height, shape[0]), min(width, shape[1])
    return min(top, shape[0] - height), min(left, shape[1] - width), height, width


def crop_resize(image: np.ndarray, crop: tuple[int, int, int, int], size: int) -> np.ndarray:
    """Resample the crop (top, left, height, width) to (size, size, 3), bilinear and antialiased."""
    top, left, height, width = crop
    part = np.ascontiguousarray(image[top : top + height, left : left + width])
    if height <= size and width <= size:  # nothing to alias
        return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
    # OpenCV's bilinear filter skips pixels when shrinking; its area filter differs and is three times slower.
    pixels = torch.from_numpy(part)[None].permute(0, 3, 1, 2)  # a layout that torch treats as channels_last
    resized = interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Multiply every value by `factor` >= 0."""
    return cv2.convertScaleAbs(view, alpha=factor, beta=CUT)


def contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Move values away from (factor > 1) or towards the view's mean luma."""
    mean = sum(weight * value for weight, value in zip(LUMA, cv2.mean(view)))
    return cv2.transform(view, factor * _COLOUR + ((1 - factor) * (mean + CUT)) * _ONE + _OFFSET)


def saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Move values away from (factor > 1) or towards each pixel's luma."""
    return cv2.transform(view, factor * _COLOUR + (1 - factor) * _GREY + _OFFSET)


def hue(view: np.ndarray, shift: float) -> np.ndarray:
    """Rotate the hue by `shift` of a full circle, keeping value and saturation.

    In 8-bit arithmetic and without computing a hue: a rotation by at most half a sextant moves each channel by that
    share of the chroma and clips it to the pixel's largest and smallest value; whole sextants are permutations of
    channels (even ones) and inversions (three sextants). Derived from V - C max(0, min(k, 4 - k, 1)), the closed form
    of HSV to RGB.
    """
    sextants, part = divmod(6.0 * shift + 0.5, 1.0)
    part -= 0.5
    planes = cv2.split(view, list(np.empty((3, *view.shape[:2]), np.uint8)))
    # A negative rotation is a positive one on the mirrored circle, with green and blue exchanged.
    r, g, b = planes if part >= 0 else (planes[0], planes[2], planes[1])
    high, low = cv2.max(cv2.max(r, g), b), cv2.min(cv2.min(r, g), b)
    step = cv2.convertScaleAbs(cv2.subtract(high, low), alpha=abs(part))
    falling, rising = cv2.subtract(high, step), cv2.add(low, step, dst=step)
    turned = []
    for own, after, before in ((r, g, b), (g, b, r), (b, r, g)):
        # own + (target - after), between low and high: the differences saturate at 0, and one of them is.
        target = cv2.compare(after, before, cv2.CMP_GE)  # 255 or 0, and then `falling` or the smaller `rising`
        target = cv2.max(cv2.min(target, falling, dst=target), rising, dst=target)
        up, down = cv2.subtract(target, after), cv2.subtract(after, target, dst=target)
        up = cv2.min(cv2.add(own, up, dst=up), high, dst=up)
        turned.append(cv2.max(cv2.subtract(up, down, dst=up), low, dst=up))
    if part < 0:
        turned[1:] = turned[:0:-1]
    sextants = int(sextants)
    if sextants % 2:
        turned = [cv2.add(cv2.subtract(high, plane, dst=plane), low, dst=plane) for plane in turned]
        sextants -= 3
    third = sextants // 2 % 3
    return cv2.merge(turned[3 - third :] + turned[: 3 - third])


_JITTER = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


def blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Apply Gaussian blur of `sigma` pixels, mirrored at the border and truncated at 3 sigma (0.3 %)."""
    radius = min(math.ceil(3 * sigma), min(view.shape[:2]) - 1)
    kernel = cv2.getGaussianKernel(2 * radius + 1, sigma)
    return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def solarize(view: np.ndarray) -> np.ndarray:
    """Invert values of 128 and more."""
    return np.minimum(view, ~view)


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Convert (B, 3, S, S) uint8 to float32 on the same device, (x - mean) / std with both in 0-255 units.

    Args:
        memory_format: layout of the result, torch.contiguous_format or torch.channels_last.
    """
    if images.device.type != "cpu":
        shift, scale = (of_channels(tuple(values), images.device) for values in (mean, std))
        return images.to(torch.float32, memory_format=memory_format).sub_(shift).div_(scale)
    # In one pass over each image: several passes over floats would wait for memory, a tenth of the time of two views.
    result = torch.empty(images.shape, memory_format=memory_format)
    factors = [(1 / s, -m / s) for m, s in zip(mean, std)]
    if memory_format == torch.contiguous_format:
        for pixels, floats in zip(images.numpy(), result.numpy()):
            _normalise_planes(pixels, factors, floats)
        return result
    planes = np.empty(images.shape[1:], np.float32)
    for pixels, floats in zip(images.numpy(), result.permute(0, 2, 3, 1).numpy()):
        _normalise_planes(pixels, factors, planes)
        cv2.merge(list(planes), dst=floats)
    return result


def _normalise_planes(pixels: np.ndarray, factors: Sequence[tuple[float, float]], out: np.ndarray) -> None:
    for plane, (factor, offset), place in zip(pixels, factors, out):
        cv2.addWeighted(plane, factor, plane, 0, offset, dst=place, dtype=cv2.CV_32F)


@functools.cache
def of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return (3, 1, 1) on the device, cached: sending it for every batch would make the host wait."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
