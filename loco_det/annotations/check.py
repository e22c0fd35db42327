"""Checks a data set before training: decodes every image and validates every annotation.

A defect stops training (the set would be refused, or an image is unreadable), or is skipped by it, or is a note.
Annotations are checked by the rules of loading a training set (`rules.py`).

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
_CHUNK = 32  # images per task of a worker


class Defect(NamedTuple):
    """One kind of defect: its count, its effect on training, and its first few places.

    Attributes:
        effect: one of `rules.EFFECTS`.
        remedy: what to do about it, if more than to correct it.
    """

    kind: str
    count: int
    effect: str
    examples: list[str]
    remedy: str = ""


class ImageReport(NamedTuple):
    """The result of reading one image: (height, width) upright, or the reason for failure; a digest of its bytes."""

    size: tuple[int, int] | None
    problem: str
    digest: bytes
    bytes: int


class Checked(NamedTuple):
    """The result of either check.

    Attributes:
        counts: totals: images, annotations, bytes, ...
        classes: class name -> images (of an image set) or annotations.
        defects: the defects found, worst first.
        readable: (I,) bool; an annotated image only if it has the annotated size, so that it can be drawn.
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
        max_bad_share: as DATA.MAX_BAD_SHARE; more unreadable images than this stop training.
    """
    reports = list(_in_workers(_SourceImages(source), len(source), workers, "images"))
    names = [source.name(i) for i in range(len(source))]
    bad = [i for i, report in enumerate(reports) if report.size is None]
    effect = STOPS if len(bad) > max_bad_share * len(reports) else LEFT_OUT
    defects = [
        _defect("unreadable image", [reports[i].problem for i in bad], effect),
        _defect("image with the same bytes as another", _same_bytes(reports, names), NOTE),
    ]
    counts = {"images": len(source), **_sizes(reports)}
    classes: dict[str, int] = {}
    if source.classes:
        found = Counter(source.label(i) for i in range(len(source)))
        classes = {name: found[number] for number, name in enumerate(source.classes)}
        counts["classes"] = len(classes)
    return Checked(counts, classes, _found(defects), np.array([report.size is not None for report in reports], bool))


def masks_of(index: CocoIndex) -> str:
    """Return the INPUT.MASK_FORMAT for training on a file's masks; empty if its objects have none."""
    shapes = index.shape[objects(index)]
    if (shapes == RLE).any():
        return "bitmask"
    return "polygon" if (shapes != NO_MASK).any() else ""


def check_coco(paths: Dataset, index: CocoIndex, *, workers: int, masks: str = "") -> Checked:
    """Validate every annotation, and decode every listed image.

    Args:
        masks: check for training with this INPUT.MASK_FORMAT; empty: with boxes only.
    """
    names, absent, renamed = match_files(paths, index)
    files = [os.path.join(paths.images, name) for name in names]
    there = np.ones(len(files), bool)
    there[absent] = False
    reports = [ImageReport(None, "", b"", 0)] * len(files)
    present = np.flatnonzero(there)
    found = _in_workers(_Files([files[i] for i in present]), len(present), workers, "images")
    for i, report in zip(present.tolist(), found, strict=True):
        reports[i] = report
    readable = np.array([report.size is not None for report in reports], bool)
    wrong_size = [i for i in np.flatnonzero(readable) if reports[i].size != (index.height[i], index.width[i])]
    defects = [
        _defect("image that is listed but not there", [files[i] for i in np.flatnonzero(~there)], STOPS),
        _defect("unreadable image", [reports[i].problem for i in np.flatnonzero(there & ~readable)], STOPS),
        _defect(
            "image of another size than the file says",
            [
                f"{files[i]}: {reports[i].size[1]} x {reports[i].size[0]}, "
                f"in the file {index.width[i]} x {index.height[i]}"
                for i in wrong_size
            ],
            STOPS,
        ),
        _defect("image with the same bytes as another", _same_bytes(reports, files), NOTE),
    ]
    readable[wrong_size] = False
    if paths.is_pixels:
        problems, classes = _check_labels(paths, files, workers)
        defects.append(_defect("unusable labels", problems, STOPS))
        counts = {"images": len(files), "classes": len(classes), **_sizes(reports)}
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
        **_sizes(reports),
    }
    classes = {name: found[number] for number, name in index.categories.items()}
    return Checked(counts, classes, _found(defects), readable)


def _check_labels(paths: Dataset, files: list[str], workers: int) -> tuple[list[str], dict[str, int]]:
    """Return the problems of label files, and the number of images per class."""
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
    """Maps chunks of image indices to findings; reads each file once."""

    def __getitem__(self, images: Sequence[int]) -> list[Any]:
        return [self.inspect(i) for i in images]


class _Images(_Chunks):
    """Inspects images."""

    def inspect(self, i: int) -> ImageReport:
        try:
            data, pixels = self.read(i)
        except UserError as error:
            return ImageReport(None, str(error), b"", 0)
        return ImageReport(pixels.shape[:2], "", hashlib.blake2b(data, digest_size=16).digest(), len(data))

    def is_bad(self, report: ImageReport) -> bool:
        return report.size is None


class _SourceImages(_Images):
    """Reads images as pretraining does."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, i: int) -> tuple[bytes, np.ndarray]:
        data = self.source.read(i)
        return data, decode_image(data, self.source.name(i))


class _Files(_Images):
    """Reads images as detection does."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def read(self, i: int) -> tuple[bytes, np.ndarray]:
        data = read_file(self.files[i])
        return data, decode_exactly(data, self.files[i], "BGR")


class _Labels(_Chunks):
    """Inspects an image's pixel labels: problems, and the classes present."""

    def __init__(self, labels: PixelLabels, files: list[str], sizes: list[tuple[int, int]]) -> None:
        self.labels, self.files, self.sizes = labels, files, sizes

    def inspect(self, i: int) -> tuple[list[str], list[int]]:
        try:
            labels = self.labels.read(self.files[i], self.sizes[i])
        except UserError as error:
            return [str(error)], []
        return [], [int(k) for k in np.unique(labels) if k != IGNORED]

    def is_bad(self, report: tuple[list[str], list[int]]) -> bool:
        return bool(report[0])


def _in_workers(dataset: _Chunks, count: int, workers: int, what: str) -> Iterator[Any]:
    """Yield dataset.inspect of every image, in order, with a progress bar."""
    chunks = [list(range(at, min(count, at + _CHUNK))) for at in range(0, count, _CHUNK)]
    bad = 0
    with Progress(count, what, unit="images") as progress:
        for chunk in loader_of(dataset, chunks, workers, False) if count else ():
            yield from chunk
            bad += sum(map(dataset.is_bad, chunk))
            progress.advance(len(chunk), unusable=bad)


def _sizes(reports: Sequence[ImageReport]) -> dict[str, Any]:
    sizes = np.array([report.size for report in reports if report.size is not None]).reshape(-1, 2)
    if not len(sizes):
        return {"bytes": 0}
    short = sizes.min(1)
    return {
        "bytes": sum(report.bytes for report in reports),
        "short side": {"least": int(short.min()), "median": int(np.median(short)), "most": int(short.max())},
    }


def _same_bytes(reports: Sequence[ImageReport], names: Sequence[str]) -> list[str]:
    first: dict[bytes, int] = {}
    found = []
    for i, report in enumerate(reports):
        if report.size is not None and first.setdefault(report.digest, i) != i:
            found.append(f"{names[i]} = {names[first[report.digest]]}")
    return found
