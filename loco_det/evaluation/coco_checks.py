"""Validates COCO ground truth and results: refuses everything that an evaluator would silently misread.

pycocotools and hotcoco agree bitwise on valid input and differ on invalid input (duplicate ids, id 0, results of other
images), so every evaluation starts here.

Shape legend: N results, H x W an image's size in pixels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import hotcoco
import msgspec
import numpy as np

from loco_det.annotations.index import CocoIndex, load_index
from loco_det.annotations.rules import EVALUATE, refuse
from loco_det.annotations.segmentation import FARTHEST, LONGEST, check_outlines, decode, mask_area
from loco_det.core.device import no_garbage_collection
from loco_det.core.errors import UserError
from loco_det.core.log import log

_Int = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]  # an annotation file has no larger ids either
_Box = tuple[float, float, float, float]  # x, y, width, height in pixels
_Polygon = Annotated[list[float], msgspec.Meta(min_length=6)]  # pycocotools would read four numbers as a box


class _Rle(msgspec.Struct, gc=False):
    size: tuple[_Int, _Int]
    counts: Annotated[str, msgspec.Meta(min_length=1)]


class _AnyRle(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


_decode_masks = msgspec.json.Decoder(list[Annotated[list[_Polygon], msgspec.Meta(min_length=1)] | _AnyRle]).decode
_RESULT_FIELDS = {"bbox": ("bbox", _Box), "segm": ("segmentation", _Rle)}


@dataclass(frozen=True)
class GroundTruth:
    """Validated ground truth for both evaluators: the index of a file, without annotations that do not count.

    Attributes:
        rows: (N,) int64, the counted annotations in the index.
        masks: their N segmentations, polygons or RLE dicts; None for boxes only.
    """

    index: CocoIndex
    rows: np.ndarray
    masks: list[Any] | None

    @property
    def path(self) -> Path:
        return self.index.path

    @property
    def categories(self) -> list[tuple[int, str]]:
        """(id, name), ascending by id."""
        return list(self.index.categories.items())


def read_ground_truth(annotations: str | Path, iou_types: Sequence[str]) -> GroundTruth:
    """Read and validate an annotation file for an evaluation of `iou_types` ("bbox", "segm").

    A missing `iscrowd` means 0; a missing area is computed, with a line in the log. Annotations of unlisted images or
    categories do not count, as in pycocotools.

    Raises:
        UserError: the file is missing or not a COCO annotation file, a rule of `annotations/rules.py` stops an
            evaluation, or (for "segm") an object has no usable mask.
    """
    index = load_index(annotations)
    refuse(index, EVALUATE)
    index = _with_areas(index)
    rows = np.flatnonzero(np.isin(index.annotation_category[: index.first[-1]], index.category_id))
    masks = _read_masks(index, rows) if "segm" in iou_types else None
    if (index.annotation_id == 0).any():
        _tell(index.path, "has annotation id 0, whose matches pycocotools (and Detectron2) count as misses; here they "
                          "count as matches.")  # fmt: skip
    return GroundTruth(index, rows, masks)


def _with_areas(index: CocoIndex) -> CocoIndex:
    """Complete the index's areas: a missing one is the mask's, or else the box's."""
    missing = np.flatnonzero(np.isnan(index.area))
    if not len(missing):
        return index
    _tell(index.path, f"has {len(missing)} of {len(index.area)} annotations without an area; theirs are those of their "
                      "masks, or of their boxes where they have no mask")  # fmt: skip
    area = index.area.copy()
    owner = np.searchsorted(index.first, missing, "right") - 1
    for row, i, text in zip(missing.tolist(), owner.tolist(), index.segmentations(missing)):
        found = None
        if i < len(index.image_id):
            size = int(index.height[i]), int(index.width[i])
            with contextlib.suppress(UserError):  # malformed masks are refused if masks are evaluated
                found = mask_area(decode(text, *size, ""), *size)
        area[row] = index.bbox[row, 2] * index.bbox[row, 3] if found is None else found
    return replace(index, area=area, mapped=False)


@cache
def _tell(path: Path, what: str) -> None:
    """Warn of a file once, however often it is read."""
    log.warning("%s %s", path, what)


def _read_masks(index: CocoIndex, rows: np.ndarray) -> list[Any]:
    path, remedy = index.path, "give each object a mask or evaluate boxes only"
    texts = [text or b"null" for text in index.segmentations(rows)]
    try:
        with no_garbage_collection():
            masks = _decode_masks(b"[" + b",".join(texts) + b"]")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        place = re.match(r".*`\$\[(\d+)\]", str(error))
        which = f"annotation {index.annotation_id[rows[int(place[1])]]}" if place else "an annotation"
        raise UserError(f"{path}: {which} has no segmentation that can be evaluated: {error}; {remedy}.") from error
    owner = np.repeat(np.arange(len(index.image_id)), np.diff(index.first))
    for k, mask in enumerate(masks):
        if isinstance(mask, list):
            if not _is_small(mask):
                which = f"{path}: the mask of annotation {index.annotation_id[rows[k]]}"
                check_outlines([np.array(polygon) for polygon in mask], which)
        else:
            i = owner[rows[k]]
            size = (index.height[i], index.width[i])
            if mask.size != size:
                raise UserError(
                    f"{path}: the mask of annotation {index.annotation_id[rows[k]]} is {list(mask.size)} but image "
                    f"{index.image_id[i]} is {[int(n) for n in size]}; write both as [height, width] of the same image."
                )
            masks[k] = {"size": list(mask.size), "counts": mask.counts}
    return masks


def _is_small(polygons: list[list[float]]) -> bool:
    """Whether `check_outlines` would accept them by the bounds of its points alone; makes no arrays."""
    length = 0.0
    for polygon in polygons:
        low, high = min(polygon), max(polygon)
        if low < -FARTHEST or high > FARTHEST:
            return False
        length += len(polygon) / 2 * (high - low)
    return length <= LONGEST


@dataclass(frozen=True)
class Detections:
    """Validated results as columns.

    Attributes:
        image_ids, category_ids: (N,) int64.
        scores: (N,) float64.
        boxes: (N, 4) float64, x, y, width, height; zeros for masks only.
        masks: N dicts of compressed RLE; None for boxes only.
        areas: (N,) float64, the masks' pixels; None for boxes only.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[dict[str, Any]] | None
    areas: np.ndarray | None = None


_REMEDIES = {
    "image_id": "evaluate against the annotations of the images that were predicted",
    "category_id": "give each class the id that it has there, which is not its place in a model's list",
}


def check_results(
    results: list[dict[str, Any]],
    truth: GroundTruth,
    iou_types: Sequence[str],
    source: str | Path = "the detection results",
) -> Detections:
    """Validate the results for an evaluation of `iou_types`; `results` are not modified.

    Args:
        source: name in messages, where rows are counted from 1.

    Raises:
        UserError: a field is missing, mistyped or not finite, a width or height is negative, a mask has another size
            than its image, or `truth` lacks the image or category.
    """
    fields = [("image_id", _Int), ("category_id", _Int), ("score", float), *(_RESULT_FIELDS[t] for t in iou_types)]
    try:
        with no_garbage_collection():
            records = msgspec.convert(results, list[msgspec.defstruct("Detection", fields, gc=False)])
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter of halves of a surrogate pair
        place = re.match(r"(.*) - at `\$\[(\d+)\](.*)`", str(error))
        which = f"row {int(place[2]) + 1}: {place[1]}{place[3] and f' at {place[3][1:]}'}" if place else str(error)
        raise UserError(
            f"{source}: not in COCO's result format, {which}; "
            f"each row needs {', '.join(name for name, _ in fields)} as plain numbers, lists and compressed RLE."
        ) from error
    count, columns = len(records), {}
    for key, known in (("image_id", truth.index.image_id), ("category_id", truth.index.category_id)):
        columns[key] = np.fromiter(map(attrgetter(key), records), np.int64, count)
        if len(unknown := np.flatnonzero(~np.isin(columns[key], known))):
            raise UserError(
                f"{source}: row {unknown[0] + 1} has {key} {columns[key][unknown[0]]}, which {truth.path} does not "
                f"list ({_REMEDIES[key]})."
            )
    scores, boxes, masks = np.fromiter(map(attrgetter("score"), records), float, count), np.zeros((count, 4)), None
    areas: np.ndarray | None = None
    _refuse(source, "a score that is not finite", ~np.isfinite(scores))
    if "bbox" in iou_types:
        boxes = np.fromiter(chain.from_iterable(map(attrgetter("bbox"), records)), float, 4 * count).reshape(-1, 4)
        wrong = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1)
        _refuse(source, "a box that is not finite or has a negative width or height", wrong)
    if "segm" in iou_types:
        masks = [result["segmentation"] for result in results]
        found = np.fromiter(chain.from_iterable(map(attrgetter("segmentation.size"), records)), np.int64, 2 * count)
        image = np.searchsorted(truth.index.image_id, columns["image_id"])
        size = np.stack([truth.index.height[image], truth.index.width[image]], 1)
        _refuse(source, "a mask of another [height, width] than its image", (found.reshape(-1, 2) != size).any(1))
        areas = _areas(masks)
        if areas is None:
            wrong = np.array([_areas([mask]) is None for mask in masks])
            _refuse(source, "a mask whose run lengths cannot be read or do not fit into its image", wrong)
    return Detections(columns["image_id"], columns["category_id"], scores, boxes, masks, areas)


def _areas(masks: list[dict[str, Any]]) -> np.ndarray | None:
    """Return the pixels of each mask; None if one cannot be read."""
    try:
        return np.asarray(hotcoco.mask.area(masks), dtype=np.float64)
    except (ValueError, TypeError):  # the latter of text that is no UTF-8
        return None


def _refuse(source: str | Path, what: str, wrong: np.ndarray) -> None:
    where = np.flatnonzero(wrong)
    if len(where):
        raise UserError(f"{source}: row {where[0] + 1} has {what}; mend or leave out such rows.")
