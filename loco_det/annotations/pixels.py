"""Cityscapes' pixel labels, from the original folders: 19 classes, everything else is ignored.

    ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png          as downloaded: the benchmark's 34 label ids
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png     as written by its preparation script, used if the other is
                                                             missing: classes 0 to 18, 255 ignored

A data set is listed as a COCO file without annotations, whose categories are the classes; an image's labels are found
by its name. Shape legend: H x W the image's size in pixels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

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
    stem = image.parents[3] / "gtFine" / split / city / name.removesuffix("_leftImg8bit.png")
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
