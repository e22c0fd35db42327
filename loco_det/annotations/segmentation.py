"""What the segmentation of an annotation says, checked before any C code sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.annotations.instances import rle_lengths
from loco_det.core.errors import UserError

# A rasteriser takes 200 bytes for every pixel of an outline, inside the image or not, and crashes where it gets none.
FARTHEST = 100_000  # pixels from the origin
LONGEST = 1_000_000  # pixels of all outlines of a mask

Segmentation = list[np.ndarray] | dict[str, Any] | None  # polygons, or an RLE as pycocotools takes it


class _Rle(msgspec.Struct, gc=False):
    """A run-length encoded mask, compressed (str) or not (run lengths down the columns)."""

    size: tuple[int, int]  # height, width
    counts: str | list[int]


_polygons_or_rle = msgspec.json.Decoder(list[list[float]] | _Rle | None)


def decode(encoded: bytes, height: int, width: int, where: str) -> Segmentation:
    """The segmentation of one annotation.

    Args:
        encoded: as it stands in the JSON; b"" where there is none.
        height, width: of the image, pixels.
        where: what it is, for messages.

    Returns:
        Polygons as flat float64 arrays x0, y0, x1, y1, ... in pixels, those of fewer than three points left out; or
        an RLE as pycocotools takes it; or None if there is none.

    Raises:
        UserError: it is neither, or an RLE that is not one of the image's pixels; or as `check_outlines`.
    """
    try:
        found = _polygons_or_rle.decode(encoded) if encoded else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
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
    # pycocotools would leave what runs do not cover as it finds it in memory.
    runs = found.counts
    if isinstance(runs, str):
        try:
            runs = rle_lengths(runs.encode(errors="surrogatepass")).tolist()
        except ValueError:
            runs = []
    if not runs or sum(runs) != height * width or min(runs) < 0:
        raise UserError(f"{where} has run lengths that do not add up to the image.")
    return coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(found.counts, list) else rle


def check_outlines(polygons: Sequence[np.ndarray], where: str) -> None:
    """Raises UserError for what a rasteriser would take gigabytes for.

    Args:
        polygons: flat float64 arrays x0, y0, x1, y1, ... in pixels.
        where: what they are, for messages.
    """
    most = 0.0
    for p in polygons:
        low, high = p.min(), p.max()
        if not max(-low, high) <= FARTHEST:
            raise UserError(f"{where} has a point more than {FARTHEST:,} pixels away.")
        most += len(p) / 2 * (high - low)
    if most > LONGEST and sum(map(_outline, polygons)) > LONGEST:
        raise UserError(f"{where} has an outline of more than {LONGEST:,} pixels.")


def _outline(polygon: np.ndarray) -> float:
    """Its length in pixels, diagonals counted as their longer side, as a rasteriser steps along it."""
    points = polygon[: len(polygon) // 2 * 2].reshape(-1, 2)
    return np.abs(points - np.roll(points, -1, 0)).max(1).sum()


def mask_area(segmentation: Segmentation, height: int, width: int) -> float | None:
    """The pixels of a mask, by which COCO measures an object's size; None if there is no mask."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in segmentation], height, width))
    return float(coco_mask.area(segmentation))


def extent(polygons: list[np.ndarray]) -> np.ndarray:
    """(4,) float64 XYXY: the smallest box around polygons."""
    points = np.concatenate(polygons).reshape(-1, 2)
    return np.concatenate([points.min(0), points.max(0)])
