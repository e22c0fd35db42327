"""COCO instance annotations as a detector sees them: a view of the index of their file (index.py).

What is kept, and in which order, is what Detectron2 keeps (data/datasets/coco.py), except that boxes without area go
at once.

Shape legend: I images sorted by id, A annotations that are kept, grouped by image and in file order within one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.data.catalog import DatasetPaths
from loco_det.data.index import CocoIndex, doubled_ids, load_index
from loco_det.errors import UserError
from loco_det.runtime import log
from loco_det.structures import rle_lengths


class Rle(msgspec.Struct, gc=False):
    """A run-length encoded mask, compressed (str) or not (run lengths down the columns)."""

    size: tuple[int, int]  # height, width
    counts: str | list[int]


FARTHEST = 100_000  # pixels; a rasteriser takes memory for every pixel of an outline, inside the image or not
_polygons_or_rle = msgspec.json.Decoder(list[list[float]] | Rle | None)


class Segmentations(Sequence[bytes]):
    """Some annotations' segmentations as they stand in the JSON, each read when it is asked for."""

    def __init__(self, index: CocoIndex, rows: np.ndarray):
        self.index, self.rows = index, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> bytes:
        return self.index.segmentations(self.rows[k : k + 1])[0]


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
    segmentations: Sequence[bytes]  # n, as in the JSON; see `decode_segmentation`


@dataclass(frozen=True)
class CocoDataset:
    """`dataset[i]` is the `Record` of image i."""

    paths: DatasetPaths
    index: CocoIndex

    @property
    def class_names(self) -> tuple[str, ...]:
        """By contiguous class, i.e. by ascending category id."""
        return self.index.category_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The category id in the file of every class."""
        return tuple(self.index.category_id.tolist())

    def __len__(self) -> int:
        return len(self.index.image_id)

    def __getitem__(self, i: int) -> Record:
        index = self.index
        rows = np.arange(index.first[i], index.first[i + 1])
        rows = rows[_is_kept(index, rows)]
        return Record(
            os.path.join(self.paths.images, index.file_name[i]),
            int(index.image_id[i]),
            int(index.height[i]),
            int(index.width[i]),
            _corners(index.bbox[rows]),
            _classes(index, rows),
            index.crowd[rows],
            index.annotation_id[rows],
            Segmentations(index, rows),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every annotation the image number, the class and whether it is a crowd: (A,) int64, int64, bool."""
        index = self.index
        rows = np.flatnonzero(_is_kept(index, slice(0, int(index.first[-1]))))
        image = np.repeat(np.arange(len(self)), np.diff(index.first))
        return image[rows], _classes(index, rows), index.crowd[rows]


def _is_kept(index: CocoIndex, rows: np.ndarray | slice) -> np.ndarray:
    return (index.bbox[rows, 2:] > 0).all(1) & index.has_shape[rows]


def _classes(index: CocoIndex, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(index.category_id, index.annotation_category[rows])


def _corners(bbox: np.ndarray) -> np.ndarray:
    # float32 before x + w: Detectron2 adds in float32, and a box is equal only if the rounding is.
    with np.errstate(over="ignore"):
        box = bbox.astype(np.float32)
        box[:, 2:] += box[:, :2]
    return box


def load_coco(paths: DatasetPaths, *, need_annotations: bool = True) -> CocoDataset:
    """Read and check an instances file.

    Args:
        need_annotations: refuse a file without a single usable annotation; False for sets that are only run on.

    Raises:
        UserError: the file is unreadable or malformed, an id is doubled, a category unknown, a size or a box not
            usable, or an image listed but absent.
    """
    index = load_index(paths.annotations)
    path = paths.annotations
    if not len(index.image_id) or not len(index.category_id):
        raise UserError(f"{path} lists no {'categories' if len(index.image_id) else 'images'}; is it the right file?")
    _refuse_defects(paths, index)
    _refuse_absent(paths, index)
    dataset = CocoDataset(paths, index)
    kept = _count_kept(dataset)
    if need_annotations and not kept:
        raise UserError(f"{path} has no usable annotation for its images, so there is nothing to learn from it.")
    return dataset


def _count_kept(dataset: CocoDataset) -> int:
    """How many annotations are kept; says so if some are not."""
    index = dataset.index
    total, listed = len(index.annotation_id), int(index.first[-1])
    kept = int(_is_kept(index, slice(0, listed)).sum())
    if kept < total:
        flat = total - int((index.bbox[:, 2:] > 0).all(1).sum())
        log.warning(
            "%s: left out %d of %d annotations (%d of images not listed, %d with a box without area, "
            "%d with polygons of fewer than three points).",
            *(dataset.paths.annotations, total - kept, total, total - listed, flat, (~index.has_shape).sum()),
        )
    return kept


def decode_segmentation(record: Record, k: int) -> list[np.ndarray] | dict[str, Any] | None:
    """The segmentation of annotation k of an image.

    Returns:
        Polygons as flat float64 arrays x0, y0, x1, y1, ... in pixels, those of fewer than three points left out; or
        an RLE as pycocotools takes it; or None if there is none.

    Raises:
        UserError: it is neither, a polygon leaves every image, or the RLE is not one of the image's pixels.
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
        polygons = [np.array(p, dtype=np.float64) for p in found if len(p) >= 6 and len(p) % 2 == 0]
        if any(np.abs(p).max() > FARTHEST for p in polygons):
            raise UserError(f"{where} has a point more than {FARTHEST:,} pixels away.")
        return polygons
    rle: dict[str, Any] = {"size": list(found.size), "counts": found.counts}
    if found.size != (record.height, record.width):
        raise UserError(f"{where} has size {rle['size']}, the image {[record.height, record.width]}.")
    # pycocotools would leave what runs do not cover as it finds it in memory.
    runs = found.counts
    if isinstance(runs, str):
        try:
            runs = rle_lengths(runs.encode(errors="surrogatepass")).tolist()
        except ValueError:
            runs = []
    if not runs or sum(runs) != record.height * record.width or min(runs) < 0:
        raise UserError(f"{where} has run lengths that do not add up to the image.")
    return coco_mask.frPyObjects(rle, *rle["size"]) if isinstance(found.counts, list) else rle


def _refuse_defects(paths: DatasetPaths, index: CocoIndex) -> None:
    path = paths.annotations
    # The public minival files of COCO 2014 double a few annotation ids; Detectron2 lets them pass too.
    annotation_id = index.annotation_id[:0] if "minival" in path.name else index.annotation_id
    for what, ids in (("image", index.image_id), ("category", index.category_id), ("annotation", annotation_id)):
        if len(doubled := doubled_ids(ids)):
            times = (ids == doubled[0]).sum()
            raise UserError(
                f"{path}: {what} id {doubled[0]} occurs {times} times ({len(doubled)} such ids); ids must be unique."
            )
    for i in np.flatnonzero((index.height <= 0) | (index.width <= 0))[:1]:
        size = f"{index.width[i]} x {index.height[i]}"
        raise UserError(f"{path}: image id {index.image_id[i]} is {size}; correct its size.")
    category = index.annotation_category
    for k in np.flatnonzero(~np.isin(category, index.category_id))[:1]:
        raise UserError(
            f"{path}: annotation id {index.annotation_id[k]} has category_id {category[k]}, not in 'categories'."
        )
    for k in np.flatnonzero(index.ignore)[:1]:
        raise UserError(
            f"{path}: annotation id {index.annotation_id[k]} has 'ignore'; use 'iscrowd' for regions to leave out."
        )
    for k in np.flatnonzero(~np.isfinite(_corners(index.bbox)).all(1))[:1]:
        raise UserError(f"{path}: annotation id {index.annotation_id[k]} has a box that is not finite.")


def _refuse_absent(paths: DatasetPaths, index: CocoIndex) -> None:
    try:
        # One listing instead of one stat an image: a second instead of minutes on a network disk.
        present = set(os.listdir(paths.images))
    except OSError as error:
        raise UserError(f"{paths.images} cannot be listed: {error.strerror}.") from None
    names = index.file_name.tolist()
    absent = [i for i, name in enumerate(names) if name not in present and not (paths.images / name).is_file()]
    if absent:
        raise UserError(
            f"{paths.annotations} lists '{names[absent[0]]}' (image id {index.image_id[absent[0]]}) and "
            f"{len(absent) - 1} other images that are not in {paths.images}; complete the folder or remove them from "
            "the file."
        )
