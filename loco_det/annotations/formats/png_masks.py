"""Instance masks as images, one per image; pixel values number the objects, 0 is background. One class, "object".

    images/NAME.jpg, masks/NAME.png        or NAME_mask.png, NAME_masks.png, NAME_instances.png, NAME_label.png; the
                                           folder of masks is any whose name ends in mask or masks (PedMasks)

Pixels are numbers of 1, 8, 16 or 32 bits, or palette indices; colours have no meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from loco_det.annotations.formats.files import Tree, Unreadable
from loco_det.annotations.formats.objects import Found, Picture, encoded, mask_box
from loco_det.annotations.formats.splits import split_of_folder
from loco_det.annotations.formats.summary import Summary
from loco_det.images.decode import check_pixels

SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
ONE_CLASS = "object"
_FOLDER = re.compile(r".*masks?", re.IGNORECASE)
_ENDING = re.compile(r"[_-](masks?|instances?|labels?)$", re.IGNORECASE)


def is_mask(path: Path, root: Path) -> bool:
    """Whether a file is a mask, by its suffix and the name of a parent folder below `root`."""
    if path.suffix.lower() not in SUFFIXES or root not in path.parents:
        return False
    return any(_FOLDER.fullmatch(part) for part in path.parent.relative_to(root).parts)


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every mask below the tree's root."""
    masks = [path for path in tree.files if is_mask(path, tree.root)]
    images: dict[str, list[Path]] = {}
    for image in tree.images():
        if not is_mask(image, tree.root):
            images.setdefault(image.stem, []).append(image)
    for path in masks:
        name = tree.name(path)
        candidates = images.get(path.stem) or images.get(_ENDING.sub("", path.stem)) or []
        split = split_of_folder(path, tree.root)
        own = [image for image in candidates if split_of_folder(image, tree.root) == split]
        if len(own) != 1:
            summary.images.add("several images are called as its mask" if own else "it is not there", name)
            continue
        try:
            values = _values(path)
        except Unreadable as error:
            summary.broken.append((str(path), str(error)))
            continue
        yield Picture(own[0], name, list(_objects(values)), split, (values.shape[1], values.shape[0]))


def _values(path: Path) -> np.ndarray:
    """Read (H, W) integers."""
    try:
        with Image.open(path) as image:
            check_pixels(*image.size, "it")
            values = np.array(image)
    except Exception as error:  # PIL's parsers raise various exceptions on hostile bytes
        raise Unreadable(f"it cannot be decoded ({error})") from None
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise Unreadable(f"it has pixels of {values.dtype} and shape {values.shape}, not a number each")
    return values


def _objects(values: np.ndarray) -> Iterator[Found]:
    for value in np.unique(values[values != 0]).tolist():
        mask = encoded(values == value)
        yield Found(f"value {int(value)}", ONE_CLASS, mask_box(mask), mask=mask)
