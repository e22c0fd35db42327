"""Converts a data set of any format to COCO files, one per split, with a summary of what was and was not converted.

Images stay where they are: file names are relative to the deepest folder that holds all of them. Classes are one list
for all splits, numbered as in the source or else alphabetically, with ids from 1; an image and its annotations have the
same ids in all splits. Coordinates are unchanged, also across the border.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loco_det import __version__
from loco_det.annotations.formats import cvat, label_studio, labelme, png_masks, via, voc_xml, yolo
from loco_det.annotations.formats.files import Tree
from loco_det.annotations.formats.objects import Found, Picture, area
from loco_det.annotations.formats.recognition import recognise
from loco_det.annotations.formats.summary import Summary, printable
from loco_det.annotations.segmentation import FARTHEST, mask_area
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, write_json
from loco_det.core.outputs import CONVERTED, SUMMARY, is_converted

VERSION = 2  # of the output; increase when the same files give another result
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_PLAIN = re.compile(r"\w[\w-]{,39}")  # split names that can be file names
_BEYOND = 1.0  # pixels across the border without a note, for rounding


class Format(NamedTuple):
    """One format: its reader, and its name in messages."""

    read: Callable[[Tree, Summary], Iterable[Picture]]
    name: str


FORMATS = {
    "voc": Format(voc_xml.read, "Pascal VOC annotation"),
    "yolo": Format(yolo.read, "YOLO label file"),
    "labelme": Format(labelme.read, "LabelMe file"),
    "via": Format(via.read, "VIA file"),
    "labelstudio": Format(label_studio.read, "Label Studio export"),
    "cvat": Format(cvat.read, "CVAT file"),
    "png": Format(png_masks.read, "mask"),
}


class Converted(NamedTuple):
    """A converted data set.

    Attributes:
        splits: {name: content of a COCO file}.
        images: the folder that file names are relative to.
        summary: plain data.
    """

    splits: dict[str, dict[str, Any]]
    images: Path
    summary: dict[str, Any]


def _chosen(tree: Tree, kind: str) -> str:
    if kind != "auto":
        if kind not in FORMATS:
            raise UserError(f"--format {kind} is none of auto, {', '.join(FORMATS)}.")
        return kind
    found = recognise(tree)
    if not found and tree.source.suffix.lower() in ARCHIVES:
        raise UserError(f"{tree.source} is an archive; unpack it and name the folder.")
    if not found:
        raise UserError(
            f"{tree.source} holds no annotations of a known format (coco, {', '.join(FORMATS)}); name the folder that "
            "holds both them and the images, or name the format: loco-det data convert --format. Of other formats "
            "(CSV, CreateML, KITTI, ...) export COCO with the program that made them."
        )
    if found == ["coco"]:
        raise UserError(
            f"{tree.source} is in COCO's format already; name the annotation file and its image folder as "
            "FILE.json@FOLDER in DATASETS.TRAIN."
        )
    if len(found) > 1:
        raise UserError(f"{tree.source} holds annotations of several formats; give one of --format {', '.join(found)}.")
    return found[0]


# --- to COCO -----------------------------------------------------------------------------------------------------


def convert_annotations(source: Path, kind: str = "auto", images: Path | None = None) -> Converted:
    """Read a folder or an annotation file of any of `FORMATS`.

    Args:
        kind: a key of `FORMATS`, or "auto".
        images: a folder with the images, if they are not below `source`.

    Raises:
        UserError: no or several formats, a damaged annotation file, nothing to train on.
    """
    tree = Tree(_existing(source), images)
    kind = _chosen(tree, kind)
    summary = Summary()
    declared = FORMATS[kind].read(tree, summary)
    pictures = list(_usable(tree, declared, summary))
    summary.refuse_broken(FORMATS[kind].name)
    _count_others(tree, kind, summary)
    kept = {id(picture): list(_usable_objects(tree, picture, summary)) for picture in pictures}
    if not any(kept.values()):
        raise UserError(f"{source}: no object could be converted as {kind}; {_why_nothing(summary)}.")
    names = _classes(kept.values(), summary)
    pictures.sort(key=lambda picture: str(picture.image))
    folder = Path(os.path.commonpath([picture.image.parent for picture in pictures]))
    splits = _content(tree, pictures, kept, names, folder, kind)
    return Converted(splits, folder, _plain(source, kind, folder, splits, names, summary))


def _classes(kept: Iterable[list[Found]], summary: Summary) -> list[str]:
    """Return the declared classes, then further classes of objects, alphabetically."""
    counts = Counter(each.label for objects in kept for each in objects)
    others = sorted(set(counts) - set(summary.classes))
    for label in others if summary.classes else ():
        summary.notes.add("a class that is not declared is put behind those that are", label, counts[label])
    return [*summary.classes, *others]


def _existing(source: Path) -> Path:
    if not (os.path.isdir(source) or os.path.isfile(source)):
        raise UserError(f"{source}: no such folder or file; correct the path.")
    return source


def _why_nothing(summary: Summary) -> str:
    """Return the most frequent reason for which objects were left out, and that of images."""
    told = []
    for what, reasons in (("objects", summary.objects), ("images", summary.images)):
        if reasons.found:
            reason, (count, examples) = max(reasons.found.items(), key=lambda item: item[1][0])
            told.append(f"{what} left out, {count} x: {reason} ({examples[0]})")
    return "; ".join(told) or "the annotations have none"


def _usable(tree: Tree, pictures: Iterable[Picture], summary: Summary) -> Iterator[Picture]:
    """Yield pictures with a readable image of the annotated size that no other annotation has claimed."""
    pictures = list(pictures)
    owners: dict[Path, Picture] = {}
    for picture in pictures:
        if picture.image not in owners or picture.claim > owners[picture.image].claim:
            owners[picture.image] = picture
    for picture in pictures:
        owner = owners[picture.image]
        size, where = tree.size(picture.image), f"{picture.file}: {tree.name(picture.image)}"
        reason = ""
        if size is None:
            reason = "it cannot be read"
        elif picture is not owner and picture.claim == owner.claim:
            reason = "it is annotated a second time"
        elif picture is not owner:
            reason, where = "it is not there", f"{where} is that of {owner.file}"
        elif not _is_text(str(picture.image)):
            reason = "its name is no UTF-8"
        elif picture.stated not in (None, size[:2]):
            turned = size.turned and picture.stated == (size.height, size.width)
            reason = "its EXIF data turn it, and it was annotated unturned" if turned else "it has another size"
            where += " is {} x {}, in the annotation {} x {}".format(size.width, size.height, *picture.stated)
        summary.seen.add(picture.image)
        if reason:
            summary.leave_out_image(reason, where, len(picture.objects))
        else:
            yield picture


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _count_others(tree: Tree, kind: str, summary: Summary) -> None:
    """Count images without annotation in the source."""
    for image in tree.images():
        if image not in summary.seen and not (kind == "png" and png_masks.is_mask(image, tree.root)):
            summary.images.add("no annotation names it", tree.name(image))


def _usable_objects(tree: Tree, picture: Picture, summary: Summary) -> Iterator[Found]:
    """Yield the objects with an area inside their image."""
    size = tree.size(picture.image)
    assert size is not None
    for found in picture.objects:
        x0, y0, x1, y1 = found.box
        where = f"{picture.file}: {found.where}"
        values = [*found.box, *(value for outline in found.polygons for value in outline)]
        if not _is_text(found.label):
            reason = "its class has a name that is no UTF-8"
        elif max(map(abs, values)) > FARTHEST:
            reason = f"a coordinate more than {FARTHEST:,} pixels away"
        elif x1 <= x0 or y1 <= y0 or (found.polygons and not area(found.polygons)):
            reason = "no area"
        elif x0 >= size.width or y0 >= size.height or x1 <= 0 or y1 <= 0:
            reason = "outside its image"
        else:
            if min(x0, y0) < -_BEYOND or x1 > size.width + _BEYOND or y1 > size.height + _BEYOND:
                summary.notes.add("it reaches over the border of its image: kept as it is", where)
            yield found
            continue
        summary.objects.add(reason, where)


def _content(
    tree: Tree, pictures: list[Picture], kept: dict[int, list[Found]], names: list[str], folder: Path, kind: str
) -> dict[str, dict[str, Any]]:
    categories = [{"id": k, "name": name} for k, name in enumerate(names, 1)]
    numbers = {name: k for k, name in enumerate(names, 1)}
    splits: dict[str, dict[str, Any]] = {}
    count = 0
    for image_id, picture in enumerate(pictures, 1):
        size = tree.size(picture.image)
        assert size is not None
        name = picture.image.relative_to(folder).as_posix()
        listed = {"id": image_id, "file_name": name, "width": size.width, "height": size.height}
        annotations = []
        for found in kept[id(picture)]:
            count += 1
            annotations.append(_annotation(count, image_id, numbers[found.label], found))
        for split in picture.splits:
            made_by = {"description": f"{CONVERTED} {__version__} from {kind}"}
            content = splits.setdefault(
                split, {"info": made_by, "images": [], "annotations": [], "categories": categories}
            )
            content["images"].append(listed)
            content["annotations"] += annotations
    return dict(sorted(splits.items()))


def _annotation(number: int, image_id: int, category_id: int, found: Found) -> dict[str, Any]:
    x0, y0, x1, y1 = found.box
    content = {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": 0,
    }
    if found.mask is not None:
        content |= {"segmentation": found.mask, "area": mask_area(found.mask, *found.mask["size"])}
    elif found.polygons:
        content |= {"segmentation": [list(outline) for outline in found.polygons], "area": area(found.polygons)}
    if found.difficult:
        content["difficult"] = 1
    return content


def _plain(
    source: Path, kind: str, folder: Path, splits: dict[str, Any], names: list[str], summary: Summary
) -> dict[str, Any]:
    counts = {}
    for split, content in splits.items():
        found = Counter(annotation["category_id"] for annotation in content["annotations"])
        counts[split] = {
            "images": len(content["images"]),
            "objects": len(content["annotations"]),
            "with_mask": sum("segmentation" in annotation for annotation in content["annotations"]),
            "objects_per_class": {name: found[k] for k, name in enumerate(names, 1)},
        }
    return {
        "loco_det": __version__,
        "source": printable(str(source)),
        "format": kind,
        "image_folder": str(folder),
        "classes": names,
        "splits": counts,
        "images_left_out": summary.images.plain(),
        "objects_left_out": summary.objects.plain(),
        "notes": summary.notes.plain(),
    }


# --- to disk -----------------------------------------------------------------------------------------------------


def write_conversion(converted: Converted, out: Path) -> dict[str, Path]:
    """Write OUT/annotations/SPLIT.json and OUT/conversion.json; returns {split: file}.

    Raises:
        UserError: a file of that name exists and no conversion wrote it, or the folder cannot be written.
    """
    names = _file_names(converted.splits)
    files = {split: out / "annotations" / f"{names[split]}.json" for split in converted.splits}
    for path in files.values():
        if path.exists() and not is_converted(path):
            raise UserError(f"{path} is there and was not written by a conversion; name another folder for OUT.")
    for split, path in files.items():
        with atomic_write(path) as file:
            file.write(msgspec.json.encode(converted.splits[split]))
    write_json(out / SUMMARY, converted.summary)
    return files


def _file_names(splits: Collection[str]) -> dict[str, str]:
    """Return each split's file name, its own if valid; names differ by more than case."""
    names = {split.casefold(): split for split in splits if _PLAIN.fullmatch(split)}
    numbered = (f"split_{k}" for k in itertools.count(1))
    for split in splits:
        if split not in names.values():
            names[next(name for name in numbered if name not in names)] = split
    return {split: split if name == split.casefold() else name for name, split in names.items()}
