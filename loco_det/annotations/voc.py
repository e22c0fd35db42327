"""Converts Pascal VOC's XML files in an unpacked VOCdevkit to COCO format.

    ROOT/VOC2007/{Annotations/*.xml, ImageSets/Main/SPLIT.txt, JPEGImages/*.jpg}

Names, classes, boxes and the training on difficult objects are those of Detectron2 (data/datasets/pascal_voc.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from loco_det.annotations.converted import derived_file, files_digest
from loco_det.annotations.formats.files import Unreadable, read_text, read_xml
from loco_det.core.errors import UserError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# name: (folder below the root, split)
VOC_SETS = {
    f"voc_{year}_{split}": (f"VOC{year}", split)
    for year, splits in (("2007", ("trainval", "train", "val", "test")), ("2012", ("trainval", "train", "val")))
    for split in splits
}


def image_number(file_id: str | int) -> int:
    """ "000005" -> 5, "2008_000008" -> 2008000008: convert VOC's image names to COCO's ids; numbers are unchanged."""
    return int(str(file_id).replace("_", ""))


def voc_annotations(name: str, root: Path) -> tuple[Path, Path]:
    """Return the image folder of one of `VOC_SETS` and its annotations as a COCO file, made if missing.

    Raises:
        UserError: the set is missing or incomplete, an XML file is malformed, or the cache cannot be written.
    """
    missing = next((path for path in voc_places(name, root) if not path.exists()), None)
    if missing:
        raise UserError(
            f"Dataset '{name}' needs {missing}, which does not exist; put it there or set DETECTRON2_DATASETS to the "
            f"folder that holds {VOC_SETS[name][0]} (now '{root}')."
        )
    listing, annotations, images = voc_places(name, root)
    try:
        file_ids = read_text(listing).split()
    except Unreadable as error:
        raise UserError(f"{listing}: cannot be read ({error}); take an intact copy of the data set.") from None
    files = [listing, *(annotations / f"{file_id}.xml" for file_id in file_ids)]
    facts = {"format": 1, "files": files_digest(files, annotations.parent)}
    return images, derived_file(name, facts, lambda: msgspec.json.encode(_as_coco(annotations, file_ids)))


def voc_places(name: str, root: Path) -> tuple[Path, Path, Path]:
    """Return the list of a set's images, the folder of its XML files and that of its images."""
    folder, split = root / VOC_SETS[name][0], VOC_SETS[name][1]
    return folder / "ImageSets" / "Main" / f"{split}.txt", folder / "Annotations", folder / "JPEGImages"


def _as_coco(folder: Path, file_ids: list[str]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file_id in file_ids:
        path = folder / f"{file_id}.xml"
        try:
            image_id = image_number(file_id)
            tree = read_xml(path)
            size = {side: int(tree.findtext(f"size/{side}", "")) for side in ("height", "width")}
            objects = [_as_annotation(each) for each in tree.iterfind("object")]
        except (Unreadable, ValueError) as error:
            raise UserError(f"{path} is not a Pascal VOC annotation: {error}.") from None
        images.append({"id": image_id, "file_name": f"{file_id}.jpg", **size})
        annotations += [{"id": len(annotations) + k, "image_id": image_id, **each} for k, each in enumerate(objects, 1)]
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _as_annotation(found: ElementTree.Element) -> dict[str, Any]:
    name = found.findtext("name", "")
    if name not in CLASSES:
        raise ValueError(f"there is no class '{name}'; name a folder of other classes by its path, as ./VOC2007@train")
    # Pixels count from 1 and both ends are inside: xmin 1, xmax W is the full width.
    x0, y0, x1, y1 = (float(found.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        raise ValueError(f"a box of a '{name}' is not finite")
    width, height = x1 - (x0 - 1), y1 - (y0 - 1)
    return {
        "category_id": CLASSES.index(name) + 1,
        "bbox": [x0 - 1, y0 - 1, width, height],
        "area": width * height,
        "iscrowd": 0,
        "difficult": int(found.findtext("difficult", "0").strip() == "1"),  # some write a word for 0
    }
