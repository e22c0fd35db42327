"""Objects of annotation files, and the conversion of their shapes to boxes, polygons and masks.

Shape legend: H x W the image's size in pixels. Coordinates are pixels from the image's upper left corner, x to the
right; a polygon is a flat list x0, y0, x1, y1, ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
_LARGEST = 1e12  # limit of coordinates and angles, so that arithmetic stays finite
CURVE_POINTS = 32  # corners of the polygon for a circle or an ellipse


class BadShape(Exception):
    """A shape that cannot be an object; the message is the reason, without place or value."""


class Found(NamedTuple):
    """One object: its place in the file, its class, its box and optionally its outline or mask."""

    where: str  # "object 3 (cat)"
    label: str
    box: Box
    polygons: tuple[list[float], ...] = ()
    mask: dict[str, Any] | None = None  # compressed RLE whose counts are a str
    difficult: bool = False


class Picture(NamedTuple):
    """One image with its objects.

    `stated` is the annotated (width, height) of its coordinates; None if there is none. `claim` is the confidence that
    the annotation belongs to this image, see `files.Match`.
    """

    image: Path
    file: str  # the annotation file, for messages
    objects: list[Found]
    splits: tuple[str, ...]
    stated: tuple[int, int] | None = None
    claim: tuple[int, ...] = ()


def number(value: Any) -> float:
    """Convert a number or its text to a finite number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadShape("a coordinate is missing")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise BadShape("a coordinate is no number") from None
    if not math.isfinite(result):
        raise BadShape("a coordinate is not finite")
    if abs(result) > _LARGEST:
        raise BadShape(f"a number beyond {_LARGEST:.0e}")
    return result


def polygon(points: Any) -> list[float]:
    """Flatten [[x, y], ...] of at least three points."""
    if not isinstance(points, (list, tuple)) or any(
        not isinstance(point, (list, tuple)) or len(point) != 2 for point in points
    ):
        raise BadShape("its points are not pairs of numbers")
    if len(points) < 3:
        raise BadShape("a polygon of fewer than three points")
    return [number(value) for point in points for value in point]


def extent(polygons: Sequence[list[float]]) -> Box:
    """Return the smallest upright box around polygons."""
    x = [value for each in polygons for value in each[::2]]
    y = [value for each in polygons for value in each[1::2]]
    return min(x), min(y), max(x), max(y)


def ellipse(cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> list[float]:
    """Return a polygon on an ellipse, rotated clockwise as seen in the image."""
    if rx <= 0 or ry <= 0:
        raise BadShape("no area")
    angle = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    return _turned(rx * np.cos(angle), ry * np.sin(angle), cx, cy, math.radians(degrees))


def rectangle(cx: float, cy: float, width: float, height: float, radians: float) -> list[float]:
    """Return the corners of a rectangle, rotated clockwise about its centre."""
    if width <= 0 or height <= 0:
        raise BadShape("no area")
    x, y = np.array([-1, 1, 1, -1]) * width / 2, np.array([-1, -1, 1, 1]) * height / 2
    return _turned(x, y, cx, cy, radians)


def _turned(x: np.ndarray, y: np.ndarray, cx: float, cy: float, radians: float) -> list[float]:
    cos, sin = math.cos(radians), math.sin(radians)
    return np.stack([cx + x * cos - y * sin, cy + x * sin + y * cos], 1).reshape(-1).tolist()


def area(polygons: Sequence[list[float]]) -> float:
    """Return the area of non-overlapping outlines, in square pixels (shoelace formula)."""
    total = 0.0
    for each in polygons:
        x, y = np.array(each[::2]), np.array(each[1::2])
        total += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    return total


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """Encode an (H, W) bool mask as compressed RLE for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def mask_box(rle: dict[str, Any]) -> Box:
    """Return the box around a mask's pixels; without area if there are none."""
    x, y, width, height = coco_mask.toBbox(rle).tolist()
    return x, y, x + width, y + height


def pasted(part: np.ndarray, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    """Paste a (h, w) bool mask at x, y into an image of `width` x `height` pixels and encode it as RLE.

    Raises:
        BadShape: entirely outside.
    """
    h, w = part.shape
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if right <= left or bottom <= top:
        raise BadShape("outside its image")
    whole = np.zeros((height, width), bool)
    whole[top:bottom, left:right] = part[top - y : bottom - y, left - x : right - x]
    return encoded(whole)
