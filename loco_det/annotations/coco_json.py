"""The JSON of a COCO annotation file as columns, in one pass that checks types and leaves segmentations encoded.

Strict: other spellings than COCO's are errors here and may still be read by `lenient.py`.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from loco_det.core.device import no_garbage_collection
from loco_det.images.packed import PackedStrings

# The kind of a segmentation, by brackets and commas only; `segmentation.py` decodes it.
NO_MASK, POLYGONS, TOO_FEW_POINTS, RLE, OTHER = range(5)

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)  # what `parse` raises

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Category(msgspec.Struct, gc=False):
    id: _Int64
    name: str


class _Image(msgspec.Struct, gc=False):
    id: _Int64
    height: _Int64
    width: _Int64
    file_name: str = ""  # not needed for evaluation
    coco_url: str | None = None  # LVIS's file name; often null in converted files


class _Annotation(msgspec.Struct, gc=False):
    id: _Int64
    image_id: _Int64
    category_id: _Int64
    bbox: tuple[float, float, float, float]
    area: float = math.nan
    iscrowd: int | bool = 0
    ignore: int | bool = 0
    difficult: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] = []


_decode = msgspec.json.Decoder(_File).decode

_KEY = b'"segmentation"'
_NUMBER = b"0123456789+-.eE \t\r\n"  # polygons without these are brackets and commas
_POLYGONS = re.compile(rb"\[\[,*\](?:,\[,*\])*\]")
_ENOUGH = range(5, 1 << 62, 2)  # numbers of commas of a polygon with at least three points

Columns = dict[str, np.ndarray]


class Content(NamedTuple):
    """A file's content; `columns` are arrays of `index.CocoIndex` by name."""

    category_names: tuple[str, ...]
    columns: Columns


def parse(text: bytes) -> Content:
    """Parse a whole annotation file into columns.

    Raises:
        MALFORMED: not in COCO's strict format.
    """
    with no_garbage_collection():
        file = _decode(text)
        images = sorted(file.images, key=attrgetter("id"))
        categories = sorted(file.categories, key=attrgetter("id"))
        names = PackedStrings.pack([_name(image) for image in images])
        image_id = _integers(images, "id")
        columns = {
            "category_id": _integers(categories, "id"),
            "image_id": image_id,
            "height": _integers(images, "height"),
            "width": _integers(images, "width"),
            "name_data": names.data,
            "name_offsets": names.offsets,
            **_by_image(image_id, _annotations(file.annotations, text)),
        }
        return Content(tuple(category.name for category in categories), columns)


def _name(image: _Image) -> str:
    return image.file_name or "/".join((image.coco_url or "").split("/")[-2:])


def _annotations(annotations: list[_Annotation], text: bytes) -> Columns:
    """Return the columns of annotations, in list order."""
    count = len(annotations)
    boxes = chain.from_iterable(map(attrgetter("bbox"), annotations))
    return {
        "annotation_id": _integers(annotations, "id"),
        "annotation_image": _integers(annotations, "image_id"),
        "annotation_category": _integers(annotations, "category_id"),
        "bbox": np.fromiter(boxes, np.float64, 4 * count).reshape(count, 4),
        "area": np.fromiter(map(attrgetter("area"), annotations), np.float64, count),
        "crowd": np.fromiter(map(attrgetter("iscrowd"), annotations), bool, count),
        "ignore": np.fromiter(map(attrgetter("ignore"), annotations), bool, count),
        "difficult": np.fromiter(map(attrgetter("difficult"), annotations), bool, count),
        **_segmentations(annotations, text),
    }


def _by_image(image_id: np.ndarray, columns: Columns) -> Columns:
    """Sort the columns by image, and add `first`."""
    owner = columns["annotation_image"]
    row = np.searchsorted(image_id, owner)
    listed = np.append(image_id, 0)[row] == owner if len(image_id) else np.zeros(len(owner), dtype=bool)
    row[~listed | (row == len(image_id))] = len(image_id)
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(len(image_id) + 1))
    return {"first": first, **{name: column.take(order, 0) for name, column in columns.items()}}


def _integers(items: Sequence[Any], name: str) -> np.ndarray:
    return np.fromiter(map(attrgetter(name), items), dtype=np.int64, count=len(items))


def _segmentations(annotations: list[_Annotation], text: bytes) -> Columns:
    """Return every segmentation's start in `text`, its length (0 if there is none), and its kind.

    A guessed position is verified against the segmentation's bytes, so a wrong guess is harmless.
    """
    starts, lengths, shapes = array("q"), array("q"), bytearray()
    at, gap, known = 0, 0, {}
    for annotation in annotations:
        raw = bytes(annotation.segmentation)
        start = 0
        if raw:
            start = text.find(_KEY, at) + gap
            if not text.startswith(raw, start):  # usually because the gap is not known yet
                start = text.find(raw, max(at, start - gap))
                start = text.find(raw) if start < 0 else start
                gap = start - text.rfind(_KEY, 0, start)
            at = start + len(raw)
        starts.append(start)
        lengths.append(len(raw))
        # One polygon with enough points: nearly all, recognised by its commas alone.
        if raw[:1] == b"[" and raw.find(b"]") == len(raw) - 2 and raw.count(b",") in _ENOUGH:
            shapes.append(POLYGONS)
        else:
            form = raw.translate(None, _NUMBER) if raw[:1] == b"[" else raw[:4]
            if form not in known:
                known[form] = _shape(form)
            shapes.append(known[form])
    return {
        "segmentation_start": np.frombuffer(starts, np.int64) if starts else np.zeros(0, np.int64),
        "segmentation_length": np.frombuffer(lengths, np.int64) if lengths else np.zeros(0, np.int64),
        "shape": np.frombuffer(bytes(shapes), np.uint8),
    }


def _shape(form: bytes) -> int:
    """Classify brackets and commas without numbers, or the first bytes of anything else."""
    if form in (b"", b"[]", b"null"):
        return NO_MASK
    if form[:1] == b"{":
        return RLE
    if not _POLYGONS.fullmatch(form):
        return OTHER
    lengths = [polygon.count(b",") + 1 for polygon in form[2:-2].split(b"],[")]
    return POLYGONS if any(n >= 6 and n % 2 == 0 for n in lengths) else TOO_FEW_POINTS
