"""COCO instance annotations for a detector: a view of their file's index (index.py).

The kept annotations and their order are Detectron2's (data/datasets/coco.py), except that boxes without area are
dropped at once.

Shape legend: I images sorted by id, A kept annotations, grouped by image, in file order within one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np

from loco_det.annotations.converted import derived_file
from loco_det.annotations.index import CocoIndex
from loco_det.annotations.pixels import PixelLabels
from loco_det.annotations.registry import Dataset
from loco_det.annotations.rules import LEFT_OUT, RUN, Use, corners, findings, kept, refuse, warn
from loco_det.annotations.segmentation import Segmentation, decode
from loco_det.core.device import usable_cores
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.images.decode import image_size
from loco_det.images.packed import PackedStrings


class Segmentations(Sequence[bytes]):
    """Encoded segmentations of some annotations, each read from the JSON on access."""

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
    labels: PixelLabels | None = None  # of a set with a label for each pixel


@dataclass(frozen=True)
class CocoDataset:
    """`dataset[i]` is the `Record` of image i."""

    paths: Dataset
    index: CocoIndex
    file_name: PackedStrings  # the images, below paths.images

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by contiguous class, i.e. by ascending category id."""
        return self.index.category_names

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The file's category id of every class."""
        return tuple(self.index.category_id.tolist())

    def __len__(self) -> int:
        return len(self.index.image_id)

    def __getitem__(self, i: int) -> Record:
        index = self.index
        rows = np.arange(index.first[i], index.first[i + 1])
        rows = rows[kept(index, rows)]
        return Record(
            os.path.join(self.paths.images, self.file_name[i]),
            int(index.image_id[i]),
            int(index.height[i]),
            int(index.width[i]),
            corners(index.bbox[rows]),
            _classes(index, rows),
            index.crowd[rows],
            index.annotation_id[rows],
            Segmentations(index, rows),
            self.paths.labels if self.paths.is_pixels else None,
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def objects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return every annotation's image index, class and crowd flag: (A,) int64, int64, bool."""
        index = self.index
        rows = np.flatnonzero(kept(index, slice(0, int(index.first[-1]))))
        image = np.repeat(np.arange(len(self)), np.diff(index.first))
        return image[rows], _classes(index, rows), index.crowd[rows]


def _classes(index: CocoIndex, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(index.category_id, index.annotation_category[rows])


def load_coco(paths: Dataset, *, need_annotations: bool = True, masks: str = "") -> CocoDataset:
    """Read and validate an instances file.

    Args:
        need_annotations: for training; False if the detector only runs on the images.
        masks: INPUT.MASK_FORMAT for training masks, else empty.

    Raises:
        UserError: the file is unreadable or malformed, a rule of `rules.py` stops its use, or a listed image is
            missing.
    """
    index = paths.index
    use = Use("train", masks) if need_annotations else RUN
    refuse(index, use)
    names, absent, renamed = match_files(paths, index)
    if absent:
        raise UserError(
            f"{paths.annotations} lists '{names[absent[0]]}' (image id {index.image_id[absent[0]]}) and "
            f"{len(absent) - 1} other images that are not in {paths.images}; complete the folder or remove them from "
            "the file."
        )
    if renamed:
        log.warning(
            "%s: %d file names are not those of the files in %s; the first, '%s', is taken for '%s'.",
            *(index.path, len(renamed), paths.images, index.file_name[renamed[0]], names[renamed[0]]),
        )
    _log_skipped(index, use)
    warn(index, use)
    return CocoDataset(paths, index, names)


def image_files(dataset: Dataset) -> list[Path]:
    """Return the images of a data set, as absolute paths; its annotations need not be valid.

    Raises:
        UserError: an image has no file.
    """
    found = load_coco(dataset, need_annotations=False)
    return [(dataset.images / found.file_name[i]).absolute() for i in range(len(found))]


def check_images(dataset: CocoDataset) -> None:
    """Raise UserError if an image of the set cannot be read or has another size than its annotations.

    Reads headers and ends of the files, which reveals most damage.
    """

    def problem(i: int) -> str:
        path = os.path.join(dataset.paths.images, dataset.file_name[i])
        try:
            height, width = image_size(path)
        except UserError as error:
            return str(error)
        listed = int(dataset.index.width[i]), int(dataset.index.height[i])
        if listed == (width, height):
            return ""
        return size_problem(path, (width, height), dataset.index.image_id[i], listed)

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = [text for text in pool.map(problem, range(len(dataset))) if text]
    if found:
        others = f" (and {len(found) - 1} others of {dataset.paths.name})" if len(found) > 1 else ""
        raise UserError(f"{found[0].rstrip('.')}{others}.")


def size_problem(path: str, found: tuple[int, int], image_id: int, listed: tuple[int, int]) -> str:
    """Return the message about an image of another (width, height) than its annotations."""
    return (
        f"{path} is {found[0]} x {found[1]} pixels but annotated (image id {image_id}) as {listed[0]} x {listed[1]}; "
        "correct the one or the other."
    )


def _log_skipped(index: CocoIndex, use: Use) -> None:
    total, used = len(index.annotation_id), int(kept(index)[: index.first[-1]].sum())
    if used < total:
        kinds = [f"{len(found.rows)} x {found.rule.name}" for found in findings(index, use, (LEFT_OUT,))]
        log.warning("%s: left out %d of %d annotations (%s).", index.path, total - used, total, ", ".join(kinds))


def decode_segmentation(record: Record, k: int) -> Segmentation:
    """Decode the segmentation of annotation k of an image; see `segmentation.decode`.

    Raises:
        UserError: malformed.
    """
    where = f"{record.file_name}: the segmentation of annotation id {record.annotation_ids[k]}"
    return decode(record.segmentations[k], record.height, record.width, where)


# --- files ------------------------------------------------------------------------------------------------------


class Matched(NamedTuple):
    """The files of a set's images.

    Attributes:
        names: file names below the image folder.
        absent: images without a file.
        renamed: images whose file name differs from the annotated one.
    """

    names: PackedStrings
    absent: list[int]
    renamed: list[int]


def match_files(paths: Dataset, index: CocoIndex) -> Matched:
    """Find the files of the listed images.

    A name without a file is interpreted as written on another machine: with backslashes, %20, a drive, a URL, leading
    folders or "..", or, for files directly in the folder, letters of another case. It must match exactly one file,
    which no other name matches.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        # One listing instead of one stat an image: a second instead of minutes on a network disk.
        present = set(os.listdir(paths.images))
    except OSError as error:
        raise UserError(f"{paths.images} cannot be listed: {error.strerror}.") from None

    def is_there(name: str) -> bool:
        return name in present or os.path.isfile(os.path.join(paths.images, name))

    names = index.file_name.tolist()
    lost = [i for i, name in enumerate(names) if name not in present and not is_there(name)]
    if not lost:
        return Matched(index.file_name, [], [])
    cases = Counter(map(str.lower, present))
    alone = {name.lower(): name for name in present if cases[name.lower()] == 1}

    def meant_by(name: str) -> str | None:
        spellings = list(_spellings(name))
        of_another_case = (alone[text.lower()] for text in spellings if text.lower() in alone)
        return next(filter(is_there, spellings), None) or next(of_another_case, None)

    meant = {i: meant_by(names[i]) for i in lost}
    claims = Counter(names) + Counter(name for name in meant.values() if name)
    found = {i: name for i, name in meant.items() if name and claims[name] == 1}
    matched = PackedStrings.pack([found.get(i, name) for i, name in enumerate(names)])
    return Matched(matched, [i for i in lost if i not in found], list(found))


def _spellings(name: str) -> Iterator[str]:
    """What a file may be called that another machine calls `name`, the longest first."""
    below = name.replace("\\", "/").strip()
    if "://" in below:
        with contextlib.suppress(ValueError):  # no address after all: a path
            below = urlsplit(below).path
    for text in dict.fromkeys((below, unquote(below))):
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if ".." in parts:  # of the other machine, too
            parts = parts[len(parts) - parts[::-1].index("..") :]
        yield from ("/".join(parts[k:]) for k in range(len(parts)))


def readable_annotations(paths: Dataset) -> Path:
    """The annotation file, or for one that only this package reads, or whose file names are no files', a copy that
    every reader of COCO files takes.

    Raises:
        UserError: as `load_index` and `match_files`.
    """
    index = paths.index
    names, _, renamed = match_files(paths, index)
    if not renamed:
        return index.readable
    by_id = dict(zip(index.image_id.tolist(), names.tolist()))

    def make() -> bytes:
        content = msgspec.json.decode(index.readable.read_bytes(), type=dict[str, msgspec.Raw])
        images = msgspec.json.decode(content["images"], type=list[dict[str, Any]])
        renamed = [image | {"file_name": by_id[image["id"]]} for image in images]
        return msgspec.json.encode(content | {"images": renamed})

    facts = {"format": 1, "sha256": index.file.sha256, "names": hashlib.sha256(names.data.tobytes()).hexdigest()}
    return derived_file(re.sub(r"[^\w.@+-]", "_", paths.name)[-100:], facts, make)
