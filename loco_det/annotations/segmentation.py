"""Decodes an annotation's segmentation, and validates it before any C code sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.core.errors import UserError

# A rasteriser needs 200 bytes per pixel of an outline, inside the image or not, and crashes without memory.
FARTHEST = 100_000  # pixels from the origin
LONGEST = 1_000_000  # pixels of all outlines of a mask

Segmentation = list[np.ndarray] | dict[str, Any] | None  # polygons, or an RLE in pycocotools' format


class _Rle(msgspec.Struct, gc=False):
    """A run-length encoded mask, compressed (str) or not (run lengths down the columns)."""

    size: tuple[int, int]  # height, width
    counts: str | list[int]


_polygons_or_rle = msgspec.json.Decoder(list[list[float]] | _Rle | None)


def decode(encoded: bytes, height: int, width: int, where: str) -> Segmentation:
    """Decode the segmentation of one annotation.

    Args:
        encoded: its JSON; b"" if there is none.
        height, width: of the image, pixels.
        where: its name in messages.

    Returns:
        Polygons as flat float64 arrays x0, y0, x1, y1, ... in pixels, without those of fewer than three points; or an
        RLE in pycocotools' format; or None if there is none.

    Raises:
        UserError: neither, or an RLE that does not fit the image; or as `check_outlines`.
    """
    try:
        found = _polygons_or_rle.decode(encoded) if encoded else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where} is neither a list of polygons nor an RLE ({error}).") from None
    if not found:
        return None
    if isinstance(found, list):
        polygons = [np.array(p, dtype=np.float64) for p in found if len(p) >= 6 and len(p) % 2 == 0]
        check_outlines(polygons, where)
        return polygons
    rle: dict[str, Any] = {"size": list(found.size), "counts": found.counts}
    if found.size != (height, width):
        raise UserError(f"{where} has size {rle['size']}, the image {[height, width]}.")
    if height * width >= 1 << 32:
        raise UserError(f"{where} is of {height} x {width} pixels, more than run lengths of 32 bits can count.")
    # pycocotools would leave pixels without a run uninitialised.
    runs = found.counts
    if isinstance(runs, str):
        try:
            runs = rle_lengths(runs.encode(errors="surrogatepass")).tolist()
        except ValueError:
            runs = []
    if not runs or sum(runs) != height * width or min(runs) < 0:
        raise UserError(f"{where} has run lengths that do not add up to the image.")
    return coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(found.counts, list) else rle


def rle_lengths(counts: bytes) -> np.ndarray:
    """Decode the run lengths, int64, of a compressed RLE: zeros and ones in turn. Their range is not checked.

    Each character minus 48 holds five bits of a signed number, lowest first, and a sixth bit if more follow; from the
    fourth number on it is the difference to the last but one. Source: pycocotools common/maskApi.c, rleFrString.

    Raises:
        ValueError: invalid RLE; the message has the reason, e.g. "breaks off in the middle of a number".
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise ValueError("holds characters that are no digits")
    last = np.flatnonzero((codes & 32) == 0)
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("breaks off in the middle of a number")
    first = np.concatenate([[0], last[:-1] + 1])
    digits = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if digits.max() > 6:  # lengths have 32 bits
        raise ValueError("holds a number that is too large")
    values = np.add.reduceat((codes & 31) << (5 * digits), first)
    values -= np.where(codes[last] & 16, 1 << (5 * (last - first + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def check_outlines(polygons: Sequence[np.ndarray], where: str) -> None:
    """Raise UserError for outlines that would cost a rasteriser gigabytes.

    Args:
        polygons: flat float64 arrays x0, y0, x1, y1, ... in pixels.
        where: their name in messages.
    """
    for p in polygons:
        if not max(-p.min(), p.max()) <= FARTHEST:
            raise UserError(f"{where} has a point more than {FARTHEST:,} pixels away.")
    if outline_is_long(polygons):
        raise UserError(f"{where} has an outline of more than {LONGEST:,} pixels.")


def outline_is_long(polygons: Sequence[np.ndarray]) -> bool:
    """Whether a rasteriser would need more memory than `check_outlines` allows, e.g. after polygons are scaled."""
    most = sum(len(p) / 2 * (p.max() - p.min()) for p in polygons)
    return most > LONGEST and sum(map(_outline, polygons)) > LONGEST


def _outline(polygon: np.ndarray) -> float:
    """Return the length in pixels; a diagonal counts as its longer side, as rasterisers step along it."""
    points = polygon[: len(polygon) // 2 * 2].reshape(-1, 2)
    return np.abs(points - np.roll(points, -1, 0)).max(1).sum()


def mask_area(segmentation: Segmentation | list[list[float]], height: int, width: int) -> float | None:
    """Return a mask's area in pixels, COCO's measure of an object's size; None without a mask."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        polygons = [np.asarray(p).tolist() for p in segmentation]
        segmentation = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return float(coco_mask.area(segmentation))


def box_around(segmentation: Segmentation) -> list[float] | None:
    """Return the smallest box around what `decode` returned as COCO's XYWH, pixels; None without a mask."""
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        return coco_mask.toBbox(segmentation).tolist()
    x0, y0, x1, y1 = extent(segmentation).tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def extent(polygons: list[np.ndarray]) -> np.ndarray:
    """Return (4,) float64 XYXY: the smallest box around polygons."""
    points = np.concatenate(polygons).reshape(-1, 2)
    return np.concatenate([points.min(0), points.max(0)])
