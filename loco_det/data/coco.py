"""COCO instance annotations as compact tables.

The JSON is parsed once into flat arrays, which worker processes share and which can be memory-mapped; segmentations,
nine tenths of a file, stay the bytes they were in it until an image is used. What is kept, and in which order, is
what Detectron2 keeps (data/datasets/coco.py), except that boxes without area go at once.

Shape legend: I images sorted by id, A annotations grouped by image and in file order within one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.data.catalog import DatasetPaths
from loco_det.errors import UserError
from loco_det.runtime import log


class _Category(msgspec.Struct):
    id: int
    name: str


class _Image(msgspec.Struct):
    id: int
    file_name: str
    height: int
    width: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int | bool = 0
    ignore: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] = []


class _Rle(msgspec.Struct):
    size: tuple[int, int]
    counts: str | list[int]


_polygons_or_rle = msgspec.json.Decoder(list[list[float]] | _Rle | None)


class PackedBytes:
    """Many byte strings in one array.

    Attributes:
        data: (total,) uint8.
        offsets: (count + 1,) int64, where each string starts.
    """

    def __init__(self, strings: list[Any]):
        # A str is packed as UTF-8, anything else must be a buffer of bytes.
        strings = [s.encode() if isinstance(s, str) else memoryview(s) for s in strings]
        self.data = np.frombuffer(b"".join(strings), dtype=np.uint8)
        self.offsets = np.cumsum([0, *(len(s) for s in strings)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        return self.data[self.offsets[i] : self.offsets[i + 1]].tobytes()


class Record(NamedTuple):
    """One image and its n annotations."""

    file_name: str  # full path
    image_id: int
    height: int
    width: int
    boxes: np.ndarray  # (n, 4) float32 XYXY, pixels
    classes: np.ndarray  # (n,) int64, contiguous
    crowd: np.ndarray  # (n,) bool
    annotation_ids: np.ndarray  # (n,) int64
    segmentations: list[bytes]  # n, as in the JSON; see `decode_segmentation`


@dataclass
class CocoDataset:
    """The tables; `dataset[i]` is the `Record` of image i."""

    paths: DatasetPaths
    class_names: tuple[str, ...]  # by contiguous class, i.e. by ascending category id
    category_ids: tuple[int, ...]  # contiguous class -> category id in the file
    image_id: np.ndarray  # (I,) int64
    height: np.ndarray  # (I,) int64
    width: np.ndarray  # (I,) int64
    file_name: PackedBytes  # I, relative to paths.images
    first: np.ndarray  # (I + 1,) int64: annotations first[i] to first[i + 1] belong to image i
    annotation_id: np.ndarray  # (A,) int64
    box: np.ndarray  # (A, 4) float32 XYXY
    label: np.ndarray  # (A,) int64 contiguous class
    crowd: np.ndarray  # (A,) bool
    segmentation: PackedBytes  # A

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, i: int) -> Record:
        rows = slice(int(self.first[i]), int(self.first[i + 1]))
        return Record(
            os.path.join(self.paths.images, self.file_name[i].decode()),
            int(self.image_id[i]),
            int(self.height[i]),
            int(self.width[i]),
            self.box[rows],
            self.label[rows],
            self.crowd[rows],
            self.annotation_id[rows],
            [self.segmentation[k] for k in range(rows.start, rows.stop)],
        )


def load_coco(paths: DatasetPaths, *, need_annotations: bool = True) -> CocoDataset:
    """Read and check an instances file.

    Args:
        need_annotations: refuse a file without a single usable annotation; False for sets that are only run on.

    Raises:
        UserError: the file is unreadable or malformed, an id is doubled, a category unknown, a size or a box not
            usable, or an image listed but absent.
    """
    path = paths.annotations
    content = _parse(path)
    images = sorted(content.images, key=lambda image: image.id)
    categories = sorted(content.categories, key=lambda category: category.id)
    if not images or not categories:
        raise UserError(f"{path} lists no {'images' if not images else 'categories'}; is it the right file?")
    # The public minival files of COCO 2014 double a few annotation ids; Detectron2 lets them pass too.
    annotations = [] if "minival" in path.name else content.annotations
    for what, items in (("image", images), ("category", categories), ("annotation", annotations)):
        _refuse_doubles(path, what, np.array([item.id for item in items], dtype=np.int64))
    for image in images:
        if image.height <= 0 or image.width <= 0:
            raise UserError(f"{path}: image id {image.id} is {image.width} x {image.height}; correct its size.")
    _refuse_absent(paths, images)
    table = _annotation_table(path, content.annotations, images, categories)
    if need_annotations and not len(table["label"]):
        raise UserError(f"{path} has no usable annotation for its images, so there is nothing to learn from it.")
    return CocoDataset(
        paths,
        class_names=tuple(category.name for category in categories),
        category_ids=tuple(category.id for category in categories),
        image_id=np.array([image.id for image in images], dtype=np.int64),
        height=np.array([image.height for image in images], dtype=np.int64),
        width=np.array([image.width for image in images], dtype=np.int64),
        file_name=PackedBytes([image.file_name for image in images]),
        **table,
    )


def decode_segmentation(record: Record, k: int) -> list[np.ndarray] | dict[str, Any] | None:
    """The segmentation of annotation k of an image.

    Returns:
        Polygons as flat float64 arrays x0, y0, x1, y1, ... in pixels, those of fewer than three points left out; or
        an RLE as pycocotools takes it; or None if there is none.

    Raises:
        UserError: it is neither, or the RLE is of another size than the image.
    """
    encoded = record.segmentations[k]
    where = f"{record.file_name}: the segmentation of annotation id {record.annotation_ids[k]}"
    try:
        found = _polygons_or_rle.decode(encoded) if encoded else None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is neither a list of polygons nor an RLE ({error}).") from None
    if not found:
        return None
    if isinstance(found, list):
        return [np.array(p, dtype=np.float64) for p in found if len(p) >= 6 and len(p) % 2 == 0]
    rle: dict[str, Any] = {"size": list(found.size), "counts": found.counts}
    if found.size != (record.height, record.width):
        raise UserError(f"{where} has size {rle['size']}, the image {[record.height, record.width]}.")
    if isinstance(found.counts, list):
        if sum(found.counts) != record.height * record.width or min(found.counts) < 0:
            raise UserError(f"{where} has run lengths that do not add up to the image.")
        rle = coco_mask.frPyObjects(rle, *rle["size"])
    return rle


def _parse(path: Path) -> _File:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return msgspec.json.decode(text, type=_File)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not a COCO instances file: {error}{_id_at(text, str(error))}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole JSON file in UTF-8: {error}; copy or write it again.") from None


def _id_at(text: bytes, message: str) -> str:
    """The id of the entry that a validation message points at by its number, for people who grep for it."""
    place = re.search(r"\$\.(\w+)\[(\d+)\]", message)
    if not place:
        return ""
    try:
        entry = msgspec.json.decode(text, type=dict[str, msgspec.Raw])[place[1]]
        found = msgspec.json.decode(entry, type=list[msgspec.Raw])[int(place[2])]
        return f" (id {msgspec.json.decode(found)['id']})"
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return ""


def _refuse_doubles(path: Path, what: str, ids: np.ndarray) -> None:
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) != len(ids):
        doubled = distinct[counts > 1]
        raise UserError(
            f"{path}: {what} id {doubled[0]} occurs {counts.max()} times ({len(doubled)} such ids); ids must be unique."
        )


def _refuse_absent(paths: DatasetPaths, images: list[_Image]) -> None:
    try:
        # One listing instead of one stat an image: a second instead of minutes on a network disk.
        present = set(os.listdir(paths.images))
    except OSError as error:
        raise UserError(f"{paths.images} cannot be listed: {error.strerror}.") from None
    absent = [i for i in images if i.file_name not in present and not (paths.images / i.file_name).is_file()]
    if absent:
        raise UserError(
            f"{paths.annotations} lists '{absent[0].file_name}' (image id {absent[0].id}) and {len(absent) - 1} other "
            f"images that are not in {paths.images}; complete the folder or remove them from the file."
        )


def _annotation_table(
    path: Path, annotations: list[_Annotation], images: list[_Image], categories: list[_Category]
) -> dict[str, Any]:
    """The columns of `CocoDataset` that describe annotations, checked, filtered and grouped by image."""
    box = np.array([a.bbox for a in annotations], dtype=np.float64).reshape(-1, 4)
    label_of = {category.id: k for k, category in enumerate(categories)}
    row_of = {image.id: k for k, image in enumerate(images)}
    for a in annotations:
        if a.category_id not in label_of:
            raise UserError(f"{path}: annotation id {a.id} has category_id {a.category_id}, not in 'categories'.")
        if a.ignore:
            raise UserError(f"{path}: annotation id {a.id} has 'ignore'; use 'iscrowd' for regions to leave out.")
    with np.errstate(over="ignore"):
        # float32 before x + w: Detectron2 adds in float32, and a box is equal only if the rounding is.
        box = box.astype(np.float32)
        box[:, 2:] += box[:, :2]
    if len(wrong := np.flatnonzero(~np.isfinite(box).all(1))):
        raise UserError(f"{path}: annotation id {annotations[wrong[0]].id} has a box that is not finite.")

    row = np.array([row_of.get(a.image_id, -1) for a in annotations], dtype=np.int64)
    has_area = np.array([a.bbox[2] > 0 and a.bbox[3] > 0 for a in annotations], dtype=bool)
    has_shape = np.array([_usable(a.segmentation) for a in annotations], dtype=bool)
    keep = np.flatnonzero((row >= 0) & has_area & has_shape)
    if len(keep) < len(annotations):
        log.warning(
            "%s: left out %d of %d annotations (%d of images not listed, %d with a box without area, "
            "%d with polygons of fewer than three points).",
            *(path, len(annotations) - len(keep), len(annotations)),
            *((row < 0).sum(), (~has_area).sum(), (~has_shape).sum()),
        )
    keep = keep[np.argsort(row[keep], kind="stable")]
    kept = [annotations[k] for k in keep]
    return {
        "first": np.searchsorted(row[keep], np.arange(len(images) + 1)),
        "annotation_id": np.array([a.id for a in kept], dtype=np.int64),
        "box": box[keep],
        "label": np.array([label_of[a.category_id] for a in kept], dtype=np.int64),
        "crowd": np.array([bool(a.iscrowd) for a in kept], dtype=bool),
        "segmentation": PackedBytes([a.segmentation for a in kept]),
    }


def _usable(segmentation: msgspec.Raw) -> bool:
    """False for polygons of which none has three points. Counts brackets and commas: a full parse costs as much as
    the rest of the file."""
    text = bytes(segmentation)
    if not text.startswith(b"[") or (text.strip(b"[] \t\r\n") == b"" and text.count(b"[") == 1):
        return True
    if text.count(b"[") == 2:
        numbers = text.count(b",") + 1
        return numbers >= 6 and numbers % 2 == 0
    try:
        return any(len(p) >= 6 and len(p) % 2 == 0 for p in msgspec.json.decode(text, type=list[list[msgspec.Raw]]))
    except msgspec.DecodeError:
        return True  # malformed: told with its annotation id once it is used
