"""What COCO ground truth and results must hold for an AP: everything an evaluator would silently misread is refused.

pycocotools and hotcoco agree to the last bit on sound input and differ on unsound input (ids given twice, id 0,
results of other images), so an evaluation starts here.

Shape legend: N results, H x W an image's size in pixels.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from loco_det.errors import UserError
from loco_det.runtime import log

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # hotcoco's ids are unsigned and travel in float64 columns
_Box = tuple[float, float, float, float]  # x, y, width, height in pixels
_Polygon = Annotated[list[float], msgspec.Meta(min_length=6)]  # four numbers would be a box to pycocotools


class _Image(msgspec.Struct, gc=False):
    id: _Id
    height: int
    width: int


class _Category(msgspec.Struct, gc=False):
    id: _Id
    name: str


class _Rle(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: Annotated[str, msgspec.Meta(min_length=1)]


class _AnyRle(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


class _Annotation(msgspec.Struct, gc=False):
    id: _Id
    image_id: int
    category_id: int
    bbox: _Box
    area: float
    iscrowd: int | bool = 0


class _MaskAnnotation(_Annotation, gc=False, kw_only=True):
    segmentation: Annotated[list[_Polygon], msgspec.Meta(min_length=1)] | _AnyRle


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


class _MaskFile(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_MaskAnnotation]


_RESULT_FIELDS = {"bbox": ("bbox", _Box), "segm": ("segmentation", _Rle)}


@dataclass(frozen=True)
class GroundTruth:
    """A COCO annotation file that both evaluators read alike.

    Attributes:
        path: the file.
        sizes: image id -> (H, W).
        categories: (id, name), ascending by id.
    """

    path: Path
    sizes: dict[int, tuple[int, int]]
    categories: list[tuple[int, str]]


def read_ground_truth(annotations: str | Path, iou_types: Sequence[str]) -> GroundTruth:
    """Read and check an annotation file for an evaluation of `iou_types` ("bbox", "segm").

    A missing `iscrowd` means 0. Annotations of unlisted images or categories do not count, as in pycocotools.

    Raises:
        UserError: the file is missing, is no COCO annotation file, has nothing to measure against, has an id
            twice, or (for "segm") an object without a usable mask.
    """
    path = Path(annotations)
    remedy = "; give each object a mask or evaluate boxes only" if "segm" in iou_types else ""
    try:
        with no_garbage_collection():
            file = msgspec.json.decode(path.read_bytes(), type=_MaskFile if "segm" in iou_types else _File)
    except OSError as error:
        raise UserError(f"The annotation file {path} cannot be read ({error.strerror}); check the path.") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is not a COCO annotation file that can be evaluated: {error}{remedy}.") from error
    for key in ("images", "categories", "annotations"):
        entries = getattr(file, key)
        if not entries:
            raise UserError(f"{path} lists no {key}, so there is nothing to measure against; use an annotated set.")
        if len({entry.id for entry in entries}) < len(entries):
            raise UserError(f"{path} has the same id twice under '{key}'; number them uniquely.")
    sizes = {image.id: (image.height, image.width) for image in file.images}
    if "segm" in iou_types:
        _check_rle_sizes(path, file.annotations, sizes)
    if any(a.id == 0 for a in file.annotations):
        log.warning("%s has annotation id 0, whose matches pycocotools (and Detectron2) count as misses;"
                    " here they count as matches.", path)  # fmt: skip
    return GroundTruth(path, sizes, sorted((c.id, c.name) for c in file.categories))


def _check_rle_sizes(path: Path, annotations: list[_MaskAnnotation], sizes: dict[int, tuple[int, int]]) -> None:
    for a in annotations:
        if isinstance(a.segmentation, _AnyRle) and a.segmentation.size != sizes.get(a.image_id, a.segmentation.size):
            raise UserError(
                f"{path}: the mask of annotation {a.id} is {list(a.segmentation.size)} but image {a.image_id} is "
                f"{list(sizes[a.image_id])}; write both as [height, width] of the same image."
            )


@dataclass(frozen=True)
class Detections:
    """Checked results as columns.

    Attributes:
        image_ids, category_ids: (N,) int64.
        scores: (N,) float64.
        boxes: (N, 4) float64, x, y, width, height; zeros where only masks were asked for.
        masks: N dicts of compressed RLE; None where only boxes were asked for.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    masks: list[dict[str, Any]] | None


def check_results(results: list[dict[str, Any]], truth: GroundTruth, iou_types: Sequence[str]) -> Detections:
    """The results that an evaluation of `iou_types` needs; `results` stay as they are.

    Raises:
        UserError: a result lacks a field or has it in another type, is not finite, has a negative width or
            height, a mask of another size than its image, or an image or category that `truth` does not have.
    """
    fields = [("image_id", int), ("category_id", int), ("score", float), *(_RESULT_FIELDS[t] for t in iou_types)]
    try:
        with no_garbage_collection():
            records = msgspec.convert(results, list[msgspec.defstruct("Detection", fields, gc=False)])
    except msgspec.ValidationError as error:
        raise UserError(
            f"The detection results are not in COCO's result format: {error}; "
            f"each needs {', '.join(name for name, _ in fields)} as plain numbers, lists and compressed RLE."
        ) from error
    ids = []
    for key, known in (("image_id", truth.sizes), ("category_id", dict(truth.categories))):
        ids.append([getattr(r, key) for r in records])
        unknown = set(ids[-1]).difference(known)
        if unknown:
            raise UserError(
                f"The detection results have {key} {min(unknown)}, which {truth.path} does not list; "
                "evaluate against the annotations of the images that were predicted."
            )
    scores, boxes, masks = np.array([r.score for r in records]), np.zeros((len(records), 4)), None
    _refuse("a score that is not finite", ~np.isfinite(scores))
    if "bbox" in iou_types and records:
        boxes = np.array([r.bbox for r in records])
        wrong = ~np.isfinite(boxes).all(1) | (boxes[:, 2:] < 0).any(1)
        _refuse("a box that is not finite or has a negative width or height", wrong)
    if "segm" in iou_types:
        masks = [result["segmentation"] for result in results]
        wrong = [r.segmentation.size != truth.sizes[r.image_id] for r in records]
        _refuse("a mask of another [height, width] than its image", wrong)
    return Detections(*(np.array(column, dtype=np.int64) for column in ids), scores, boxes, masks)


def _refuse(what: str, wrong: np.ndarray | list[bool]) -> None:
    where = np.flatnonzero(wrong)
    if len(where):
        raise UserError(f"Detection result number {where[0]} has {what}; mend or leave out such results.")


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Building a million small objects makes the collector walk them over and over: most of the loading time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
