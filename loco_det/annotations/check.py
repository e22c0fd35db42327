"""What is wrong with a data set, found before a training meets it: every image decoded, every annotation looked at.

A defect stops a training (it would be refused, or an image could not be read), or is left out by it, or is only worth
knowing. Annotations are judged by the rules that loading a training set follows (`rules.py`).

Shape legend: I images, A annotations, as in annotations/index.py.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils import data as torch_data

from loco_det.annotations.coco import match_files
from loco_det.annotations.coco_json import NO_MASK, RLE
from loco_det.annotations.index import CocoIndex
from loco_det.annotations.pixels import IGNORED, PixelLabels
from loco_det.annotations.registry import Dataset
from loco_det.annotations.rules import COMPUTED, EFFECTS, LEFT_OUT, NOTE, STOPS, Use, findings, kept, objects
from loco_det.core.errors import UserError
from loco_det.core.log import Progress
from loco_det.images.decode import decode_exactly, decode_image, read_file
from loco_det.images.source import Source
from loco_det.images.two_views import loader_of

_EXAMPLES = 5
_CHUNK = 32  # images that a worker takes at a time


class Defect(NamedTuple):
    """One kind of defect: how many there are, what a training does about it, and where the first few stand.

    Attributes:
        effect: one of `rules.EFFECTS`.
        remedy: what to do about it, if there is more to say than to correct it.
    """

    kind: str
    count: int
    effect: str
    examples: list[str]
    remedy: str = ""


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


def masks_of(index: CocoIndex) -> str:
    """The INPUT.MASK_FORMAT that a training on a file's masks needs; empty if its objects have none."""
    shapes = index.shape[objects(index)]
    if (shapes == RLE).any():
        return "bitmask"
    return "polygon" if (shapes != NO_MASK).any() else ""


def check_coco(paths: Dataset, index: CocoIndex, *, workers: int, masks: str = "") -> Checked:
    """Look at every annotation, and read and decode every image that the file lists.

    Args:
        masks: judge as a training with this INPUT.MASK_FORMAT would; empty: as one on boxes alone.
    """
    names, absent, renamed = match_files(paths, index)
    files = [os.path.join(paths.images, name) for name in names]
    there = np.ones(len(files), bool)
    there[absent] = False
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
    if paths.is_pixels:
        problems, classes = _check_labels(paths, files, workers)
        defects.append(_defect("unusable labels", problems, STOPS))
        counts = {"images": len(files), "classes": len(classes), **_sizes(looks)}
        return Checked(counts, classes, _found(defects), readable)
    taken = [f"'{index.file_name[i]}' is taken for '{names[i]}'" for i in renamed[:_EXAMPLES]]
    defects.append(Defect("file name that is not the file's", len(renamed), COMPUTED, taken))
    defects += [Defect(kind, count, COMPUTED, []) for kind, count in index.notes.items()]
    for finding in findings(index, Use("train", masks), EFFECTS, deep=True):
        examples = finding.examples(_EXAMPLES)
        defects.append(Defect(finding.rule.name, len(finding.rows), finding.effect, examples, finding.rule.remedy))
    usable = int(kept(index)[: index.first[-1]].sum())
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


def _check_labels(paths: Dataset, files: list[str], workers: int) -> tuple[list[str], dict[str, int]]:
    """What is wrong with which labels, and in how many images each class is."""
    index = paths.index
    problems, images = [], np.zeros(len(index.category_id), np.int64)
    dataset = _Labels(paths.labels, files, list(zip(index.height.tolist(), index.width.tolist())))
    for problem, classes in _in_workers(dataset, len(files), workers, "labels"):
        problems += problem
        images[classes] += 1
    return problems, dict(zip(index.category_names, images.tolist()))


def _defect(kind: str, examples: Sequence[str], effect: str) -> Defect:
    return Defect(kind, len(examples), effect, list(examples[:_EXAMPLES]))


def _found(defects: list[Defect]) -> list[Defect]:
    return sorted((d for d in defects if d.count), key=lambda defect: EFFECTS.index(defect.effect))


# --- reading every image ----------------------------------------------------------------------------------------


class _Chunks(torch_data.Dataset):
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

    def __init__(self, labels: PixelLabels, files: list[str], sizes: list[tuple[int, int]]) -> None:
        self.labels, self.files, self.sizes = labels, files, sizes

    def look(self, i: int) -> tuple[list[str], list[int]]:
        try:
            labels = self.labels.read(self.files[i], self.sizes[i])
        except UserError as error:
            return [str(error)], []
        return [], [int(k) for k in np.unique(labels) if k != IGNORED]

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
