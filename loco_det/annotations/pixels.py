"""Pixel labels: a class for each pixel, from Cityscapes' original folders or from masks of one's own.

Of Cityscapes, 19 classes, everything else ignored:

    ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png          as downloaded: the benchmark's 34 label ids
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png     as written by its preparation script, used if the other is
                                                             missing: classes 0 to 18, 255 ignored

A data set is listed as a COCO file without annotations, whose categories are the classes. The labels of an image are
found by its name; of one's own (`label_folders.py`) the list says where they are.

Shape legend: H x W the image's size in pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from loco_det.annotations.cityscapes import LABELS, SPLITS, cityscapes_frames, opened_map
from loco_det.annotations.converted import derived_file, files_digest
from loco_det.core.errors import UserError

# Source of names and colours: cityscapesscripts/helpers/labels.py, compared in a test; the class is the index in this
# list.
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
LABEL_IDS = np.array([LABELS[name] for name in CLASSES], np.uint8)
COLOURS = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)),
    *((250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0)),
    *((0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
IGNORED = 255
PREFIX = "cityscapes_fine_sem_seg_"
_UNKNOWN = 254  # unused as a class


def is_semantic(name: str) -> bool:
    """Whether a name, with or without @parts, is a Cityscapes pixel-label set."""
    return name.partition("@")[0].removeprefix(PREFIX) in SPLITS and name.startswith(PREFIX)


def semantic_annotations(root: Path, split: str) -> Path:
    """Return the list of a split's images in COCO's format, made if missing.

    Raises:
        UserError: the folders or an image's labels are missing.
    """
    images = [frame.image for frame in cityscapes_frames(root, split)]
    labels = [label_file(image) for image in images]
    names = [image.relative_to(root).as_posix() for image in images]
    facts = {"format": 2, "images": names, "files": files_digest(labels, root)}
    return derived_file(f"{PREFIX}{split}", facts, lambda: _listed(images, labels, root / "leftImg8bit" / split))


def _listed(images: list[Path], labels: list[Path], folder: Path) -> bytes:
    entries, digest = [], hashlib.sha256()  # of the labels, so that the file's own hash depends on them
    for number, (image, label) in enumerate(zip(images, labels), 1):
        digest.update(label.read_bytes())
        name = image.relative_to(folder).as_posix()
        with opened_map(label) as opened:
            width, height = opened.size
        entries.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": int(number), "name": name} for number, name in zip(LABEL_IDS, CLASSES)]
    info = {"labels_sha256": digest.hexdigest()}
    return json.dumps({"info": info, "images": entries, "annotations": [], "categories": categories}).encode()


def label_file(image: str | Path) -> Path:
    """Return the label file of ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png.

    Raises:
        UserError: there are none.
    """
    image = Path(image)
    *_, split, city, name = image.parts
    stem = image.parents[3] / "gtFine" / split / city / name.rpartition("_leftImg8bit")[0]
    for kind in ("labelIds", "labelTrainIds"):
        path = Path(f"{stem}_gtFine_{kind}.png")
        if path.is_file():
            return path
    raise UserError(f"{stem}_gtFine_labelIds.png does not exist; unpack gtFine_trainvaltest.zip once more.")


def to_classes(values: np.ndarray, path: Path) -> np.ndarray:
    """Convert label values to uint8 classes, or IGNORED; the file name of `path` determines the kind of values.

    Raises:
        UserError: an invalid value.
    """
    table = np.full(256, _UNKNOWN, np.uint8)
    if path.name.endswith("_labelTrainIds.png"):
        table[[*range(len(CLASSES)), IGNORED]] = [*range(len(CLASSES)), IGNORED]
    else:
        table[: max(LABELS.values()) + 1] = IGNORED
        table[LABEL_IDS] = np.arange(len(CLASSES))
    classes = table[values]
    if (classes == _UNKNOWN).any():
        raise UserError(f"{path}: has the unknown label {values[classes == _UNKNOWN][0]}; take an intact copy.")
    return classes


def read_labels(path: Path) -> np.ndarray:
    """Read a label file as (H, W) uint8 classes, or IGNORED.

    Raises:
        UserError: missing or invalid.
    """
    with opened_map(path) as image:
        found = np.array(image)
    if found.ndim != 2 or found.dtype != np.uint8:
        raise UserError(f"{path}: is {found.dtype} of shape {found.shape}, not a map of labels; take an intact copy.")
    return to_classes(found, path)


# --- of any data set --------------------------------------------------------------------------------------------


class _Image(msgspec.Struct):
    file_name: str
    labels: str | None = None
    ignored: int | None = None  # a value beside 255


class _List(msgspec.Struct):
    images: list[_Image]


class PixelLabels:
    """The labels of a data set's images: where each file is, and which classes its values are.

    Args:
        annotations: the list of the images, which says where the labels of one's own sets are.
        images: the folder that file names are relative to.
        ids: the value of each class.
        names: the classes.
    """

    def __init__(self, annotations: Path, images: Path, ids: Sequence[int], names: Sequence[str]) -> None:
        self.annotations, self.images, self.ids = annotations, images, np.asarray(ids, np.int64)
        self.of_cityscapes = tuple(names) == CLASSES

    @cached_property
    def _listed(self) -> list[_Image]:
        return msgspec.json.decode(self.annotations.read_bytes(), type=_List).images

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of labels by that of the image, where the list says it."""
        return {str(self.images / image.file_name): image.labels for image in self._listed if image.labels}

    @cached_property
    def _ignored(self) -> list[int]:
        """The values that are ignored."""
        return [IGNORED, *{image.ignored for image in self._listed if image.ignored is not None}]

    def file(self, image: str | Path) -> Path:
        """The file of labels of an image, whose path begins with the folder of images.

        Raises:
            UserError: there is none.
        """
        found = self._files.get(str(image))
        return label_file(image) if found is None else Path(found)

    def read(self, image: str | Path, size: tuple[int, int]) -> np.ndarray:
        """(H, W) uint8 classes, or IGNORED, of an image of `size` (H, W).

        Raises:
            UserError: its file of labels is missing, unreadable, in colours, of another size, or has a value that is
                no class.
        """
        path = self.file(image)
        labels = self._read(path)
        if labels.shape != size:
            raise UserError(
                f"{path} is {labels.shape[1]} x {labels.shape[0]} pixels and its image {size[1]} x {size[0]}; correct "
                "the one or the other."
            )
        return labels

    def _read(self, path: Path) -> np.ndarray:
        if self.of_cityscapes and path.stem.endswith(("_labelIds", "_labelTrainIds")):
            return read_labels(path)
        values = read_values(path)
        classes = self.classes_of(values)
        if (unknown := values[classes == _NO_CLASS]).size:
            raise UserError(
                f"{path}: has the value {unknown[0]} in {unknown.size} pixels, which is no class; the classes are "
                f"{_ranges(self.ids)}, and {IGNORED} is ignored: correct the mask or name the class in classes.txt."
            )
        return classes.astype(np.uint8)

    def classes_of(self, values: np.ndarray) -> np.ndarray:
        """Classes, IGNORED, or a negative number for what is neither, int16, of (...) values of a mask."""
        table = np.full(257, _NO_CLASS, np.int16)
        table[self._ignored] = IGNORED
        table[self.ids] = np.arange(len(self.ids))
        return table[np.where((values < 0) | (values > 255), 256, values)]


_NO_CLASS = -1


def read_values(path: Path) -> np.ndarray:
    """(H, W) whole numbers of a mask, grey or places in a palette.

    Raises:
        UserError: missing, damaged, or a picture in colours.
    """
    with opened_map(path) as image:
        found = np.array(image)
    if found.ndim != 2 or found.dtype.kind not in "bui":
        raise UserError(
            f"{path}: has pixels of {found.dtype} and shape {found.shape} and not one class each; save it with one "
            "channel, grey or with a palette, whose values are the classes."
        )
    return found.astype(np.int64) if found.dtype != np.uint8 else found


def _ranges(ids: np.ndarray) -> str:
    """ "0 to 4, 7 to 9" for ascending ids."""
    parts = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
