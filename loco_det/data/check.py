"""What is wrong with a data set, found before a training meets it: every image decoded, every annotation looked at.

A defect stops a training (it would be refused, or an image could not be read), or is left out by it, or is only worth
knowing. What stops and what is left out is what `data/coco.py` and `data/mapper.py` do, which Detectron2 does too.

Shape legend: I images, A annotations, as in data/index.py.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from loco_det.data.catalog import DatasetPaths
from loco_det.data.coco import Record, Segmentations, decode_segmentation
from loco_det.data.images import decode_exactly, decode_image, read_file
from loco_det.data.index import CocoIndex, doubled_ids
from loco_det.data.semantic import IGNORED, is_semantic, label_file, read_labels
from loco_det.data.source import Source
from loco_det.data.twoview import loader_of
from loco_det.errors import UserError
from loco_det.runtime import Progress

STOPS, LEFT_OUT, NOTE = "stops training", "left out", "note"
_EXAMPLES = 5
_CHUNK = 32  # images that a worker takes at a time
_BEYOND = 1.0  # pixels that a box may reach over the border; files round


class Defect(NamedTuple):
    """One kind of defect: how many there are, what a training does about it, and where the first few stand."""

    kind: str
    count: int
    effect: str
    examples: list[str]


class Look(NamedTuple):
    """What reading one image found: (height, width) upright, or why there is none; a digest of its bytes."""

    size: tuple[int, int] | None
    problem: str
    digest: bytes
    bytes: int


class Checked(NamedTuple):
    """The result of either check.

    Attributes:
        counts: what there is: images, annotations, bytes, ...
        classes: class name -> images (of an image set) or annotations.
        defects: those that were found, worst first.
        readable: (I,) bool; an annotated image only if it has the size that its file says, or nothing could be drawn.
    """

    counts: dict[str, Any]
    classes: dict[str, int]
    defects: list[Defect]
    readable: np.ndarray

    @property
    def stops(self) -> list[Defect]:
        return [defect for defect in self.defects if defect.effect == STOPS]


def check_source(source: Source, *, workers: int, max_bad_share: float) -> Checked:
    """Read and decode every image of a set without annotations.

    Args:
        max_bad_share: as DATA.MAX_BAD_SHARE; more unreadable images than this stop a training.
    """
    looks = list(_in_workers(_SourceImages(source), len(source), workers, "images"))
    names = [source.name(i) for i in range(len(source))]
    bad = [i for i, look in enumerate(looks) if look.size is None]
    effect = STOPS if len(bad) > max_bad_share * len(looks) else LEFT_OUT
    defects = [
        _defect("unreadable image", [looks[i].problem for i in bad], effect),
        _defect("image with the same bytes as another", _same_bytes(looks, names), NOTE),
    ]
    counts = {"images": len(source), **_sizes(looks)}
    classes: dict[str, int] = {}
    if source.classes:
        found = Counter(source.label(i) for i in range(len(source)))
        classes = {name: found[number] for number, name in enumerate(source.classes)}
        counts["classes"] = len(classes)
    return Checked(counts, classes, _found(defects), np.array([look.size is not None for look in looks], bool))


def check_coco(paths: DatasetPaths, index: CocoIndex, *, workers: int) -> Checked:
    """Look at every annotation, and read and decode every image that the file lists."""
    names = index.file_name.tolist()
    files = [os.path.join(paths.images, name) for name in names]
    there = np.array([os.path.isfile(file) for file in files], bool)
    looks = [Look(None, "", b"", 0)] * len(files)
    present = np.flatnonzero(there)
    found = _in_workers(_Files([files[i] for i in present]), len(present), workers, "images")
    for i, look in zip(present.tolist(), found, strict=True):
        looks[i] = look
    readable = np.array([look.size is not None for look in looks], bool)
    wrong_size = [i for i in np.flatnonzero(readable) if looks[i].size != (index.height[i], index.width[i])]
    defects = [
        _defect("image that is listed but not there", [files[i] for i in np.flatnonzero(~there)], STOPS),
        _defect("unreadable image", [looks[i].problem for i in np.flatnonzero(there & ~readable)], STOPS),
        _defect(
            "image of another size than the file says",
            [
                f"{files[i]}: {looks[i].size[1]} x {looks[i].size[0]}, in the file {index.width[i]} x {index.height[i]}"
                for i in wrong_size
            ],
            STOPS,
        ),
        _defect("image with the same bytes as another", _same_bytes(looks, files), NOTE),
    ]
    readable[wrong_size] = False
    if is_semantic(paths.name):
        problems, classes = _check_labels(files, index, workers)
        defects.append(_defect("unusable labels", problems, STOPS))
        counts = {"images": len(files), "classes": len(classes), **_sizes(looks)}
        return Checked(counts, classes, _found(defects), readable)
    defects += annotation_defects(index, minival="minival" in paths.annotations.name)
    first, last = index.first[0], index.first[-1]
    usable = int(_kept(index)[first:last].sum())
    if not usable:
        defects.append(Defect("no usable annotation at all", 1, STOPS, []))
    annotated = np.diff(index.first) > 0
    found = Counter(index.annotation_category.tolist())
    counts = {
        "images": len(files),
        "images without annotations": int((~annotated).sum()),
        "annotations": len(index.annotation_id),
        "usable annotations": usable,
        "crowd annotations": int(index.crowd.sum()),
        "categories": len(index.category_id),
        **_sizes(looks),
    }
    classes = {name: found[number] for number, name in index.categories.items()}
    return Checked(counts, classes, _found(defects), readable)


def _check_labels(files: list[str], index: CocoIndex, workers: int) -> tuple[list[str], dict[str, int]]:
    """What is wrong with which labels, and in how many images each class is."""
    problems, images = [], np.zeros(len(index.category_id), np.int64)
    dataset = _Labels(files, list(zip(index.height.tolist(), index.width.tolist())))
    for problem, classes in _in_workers(dataset, len(files), workers, "labels"):
        problems += problem
        images[classes] += 1
    return problems, dict(zip(index.category_names, images.tolist()))


def annotation_defects(index: CocoIndex, minival: bool = False) -> list[Defect]:
    """Every kind of defect in an annotation file by itself, those not found with a count of 0.

    Args:
        minival: the file is one of COCO 2014's minival files, which double some annotation ids and are let pass.
    """
    ids, image, box = index.annotation_id, index.annotation_image, index.bbox
    x, y, w, h = box.T
    listed = np.isin(image, index.image_id)
    row = np.searchsorted(index.image_id, image[listed])
    height, width = np.full(len(ids), np.inf), np.full(len(ids), np.inf)
    height[listed], width[listed] = index.height[row], index.width[row]
    finite = finite_boxes(index)
    area = finite & (w > 0) & (h > 0)
    with np.errstate(over="ignore"):
        right, bottom = x + w, y + h
    outside = area & ((x >= width) | (y >= height) | (right <= 0) | (bottom <= 0))
    beyond = (
        area & ~outside & ((x < -_BEYOND) | (y < -_BEYOND) | (right > width + _BEYOND) | (bottom > height + _BEYOND))
    )

    def of(mask: np.ndarray) -> list[str]:
        return _Lazy(
            np.flatnonzero(mask), lambda k: f"annotation id {ids[k]} of image id {image[k]}: box {_box(box[k])}"
        )

    def doubled(values: np.ndarray, what: str) -> list[str]:
        return [f"{what} id {value}" for value in doubled_ids(values)]

    keys = np.column_stack([image, index.annotation_category, box])[finite & ~index.crowd]
    again = np.zeros(len(ids), bool)
    if len(keys):
        _, where, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        again[finite & ~index.crowd] = (counts > 1)[where.reshape(-1)]
    names = Counter(index.category_names)
    used = np.isin(index.category_id, index.annotation_category)
    small = np.flatnonzero((index.height <= 0) | (index.width <= 0))
    return [
        _defect("image id that occurs twice", doubled(index.image_id, "image"), STOPS),
        _defect("category id that occurs twice", doubled(index.category_id, "category"), STOPS),
        _defect("annotation id that occurs twice", doubled(ids, "annotation"), NOTE if minival else STOPS),
        _defect("image without a size", [f"image id {index.image_id[i]}" for i in small], STOPS),
        _defect(
            "annotation of a category that is not listed",
            of(~np.isin(index.annotation_category, index.category_id)),
            STOPS,
        ),
        _defect("annotation with the key 'ignore'", of(index.ignore), STOPS),
        _defect("box that is not finite", of(~finite), STOPS),
        _defect("malformed segmentation", _malformed(index), STOPS),
        _defect("annotation of an image that is not listed", of(~listed), LEFT_OUT),
        _defect("box without area", of(finite & ~area), LEFT_OUT),
        _defect("polygons of fewer than three points", of(~index.has_shape), LEFT_OUT),
        _defect("box outside its image", of(outside), NOTE),
        _defect("box that reaches beyond its image", of(beyond), NOTE),
        _defect("annotation with the box and category of another", of(again), NOTE),
        _defect("annotation whose 'area' is 0 or less", of(index.area <= 0), NOTE),
        _defect("category name that occurs twice", [name for name, count in names.items() if count > 1], NOTE),
        _defect("category without annotations", [n for n, u in zip(index.category_names, used) if not u], NOTE),
    ]


def finite_boxes(index: CocoIndex) -> np.ndarray:
    """(A,) bool: the corners are finite in float32, as a training computes them."""
    with np.errstate(over="ignore", invalid="ignore"):
        box = index.bbox.astype(np.float32)
        return np.isfinite(box[:, :2] + box[:, 2:]).all(1) & np.isfinite(box).all(1)


class _Lazy(Sequence[str]):
    """Texts that are made only when they are looked at: there may be a million of them."""

    def __init__(self, rows: np.ndarray, text: Any) -> None:
        self.rows, self.text = rows, text

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return [self.text(k) for k in self.rows[i]] if isinstance(i, slice) else self.text(self.rows[i])


def _box(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in box) + "]"


def _malformed(index: CocoIndex) -> list[str]:
    """Every segmentation decoded, an image at a time."""
    found, names = [], index.file_name
    with Progress(len(index.image_id), "segmentations", unit="images") as progress:
        for i in range(len(index.image_id)):
            rows = np.arange(index.first[i], index.first[i + 1])
            record = Record(
                names[i],
                int(index.image_id[i]),
                int(index.height[i]),
                int(index.width[i]),
                index.bbox[rows],
                rows,
                index.crowd[rows],
                index.annotation_id[rows],
                Segmentations(index, rows),
            )
            for k in range(len(rows)):
                try:
                    decode_segmentation(record, k)
                except UserError as error:
                    found.append(str(error))
            progress.advance()
    return found


def _kept(index: CocoIndex) -> np.ndarray:
    return (index.bbox[:, 2:] > 0).all(1) & index.has_shape


def _defect(kind: str, examples: Sequence[str], effect: str) -> Defect:
    return Defect(kind, len(examples), effect, list(examples[:_EXAMPLES]))


def _found(defects: list[Defect]) -> list[Defect]:
    order = (STOPS, LEFT_OUT, NOTE)
    return sorted((d for d in defects if d.count), key=lambda defect: order.index(defect.effect))


# --- reading every image ----------------------------------------------------------------------------------------


class _Chunks(Dataset):
    """Chunks of numbers -> what there is to say of each, with one reading of every file."""

    def __getitem__(self, images: Sequence[int]) -> list[Any]:
        return [self.look(i) for i in images]


class _Images(_Chunks):
    """Looks."""

    def look(self, i: int) -> Look:
        try:
            data, pixels = self.read(i)
        except UserError as error:
            return Look(None, str(error), b"", 0)
        return Look(pixels.shape[:2], "", hashlib.blake2b(data, digest_size=16).digest(), len(data))

    def is_bad(self, look: Look) -> bool:
        return look.size is None


class _SourceImages(_Images):
    """As pretraining reads them."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, i: int) -> tuple[bytes, np.ndarray]:
        data = self.source.read(i)
        return data, decode_image(data, self.source.name(i))


class _Files(_Images):
    """As detection reads them."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def read(self, i: int) -> tuple[bytes, np.ndarray]:
        data = read_file(self.files[i])
        return data, decode_exactly(data, self.files[i], "BGR")


class _Labels(_Chunks):
    """What is wrong with an image's labels, and the classes in it."""

    def __init__(self, files: list[str], sizes: list[tuple[int, int]]) -> None:
        self.files, self.sizes = files, sizes

    def look(self, i: int) -> tuple[list[str], list[int]]:
        file = label_file(self.files[i])
        try:
            labels = read_labels(file)
        except UserError as error:
            return [str(error)], []
        fits = labels.shape == self.sizes[i]
        problem = [] if fits else [f"{file} has shape {labels.shape} and its image {self.sizes[i]}"]
        return problem, [int(k) for k in np.unique(labels) if k != IGNORED]

    def is_bad(self, look: tuple[list[str], list[int]]) -> bool:
        return bool(look[0])


def _in_workers(dataset: _Chunks, count: int, workers: int, what: str) -> Iterator[Any]:
    """dataset.look of every image, in order, with a progress bar."""
    chunks = [list(range(at, min(count, at + _CHUNK))) for at in range(0, count, _CHUNK)]
    bad = 0
    with Progress(count, what, unit="images") as progress:
        for answer in loader_of(dataset, chunks, workers, False) if count else ():
            yield from answer
            bad += sum(map(dataset.is_bad, answer))
            progress.advance(len(answer), unusable=bad)


def _sizes(looks: Sequence[Look]) -> dict[str, Any]:
    sizes = np.array([look.size for look in looks if look.size is not None]).reshape(-1, 2)
    if not len(sizes):
        return {"bytes": 0}
    short = sizes.min(1)
    return {
        "bytes": sum(look.bytes for look in looks),
        "short side": {"least": int(short.min()), "median": int(np.median(short)), "most": int(short.max())},
    }


def _same_bytes(looks: Sequence[Look], names: Sequence[str]) -> list[str]:
    first: dict[bytes, int] = {}
    found = []
    for i, look in enumerate(looks):
        if look.size is not None and first.setdefault(look.digest, i) != i:
            found.append(f"{names[i]} = {names[first[look.digest]]}")
    return found
