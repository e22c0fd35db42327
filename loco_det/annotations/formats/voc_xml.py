"""Pascal VOC XML with any classes: one file per image, by labelImg, roLabelImg, Roboflow, CVAT and others.

    Annotations/NAME.xml, JPEGImages/NAME.jpg            in folders of any name, or side by side
    ImageSets/Main/SPLIT.txt                             one NAME per line; without them folders called train, valid,
    ...
                                                         are the splits; else there is one, "all"

The image is the one named like the XML file, as in Detectron2, or if there is none, that of <filename>. Boxes follow
Detectron2's VOC reader (data/datasets/pascal_voc.py): pixels count from 1 and both ends are inside, so xmin 1, xmax 3
is three pixels wide and becomes x 0, width 3. A polygon's points are shifted by the same pixel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from loco_det.annotations.formats.files import IMAGE_SUFFIXES, Tree, Unreadable, read_text
from loco_det.annotations.formats.objects import BadShape, Box, Found, Picture, extent, number, polygon, rectangle
from loco_det.annotations.formats.splits import split_of_folder
from loco_det.annotations.formats.summary import Summary

SUFFIXES = (".xml",)
ROOT_ELEMENT = "annotation"
_SHAPES = ("bndbox", "polygon", "robndbox")
_KNOWN = {*_SHAPES, "name", "pose", "truncated", "difficult", "occluded", "type", "attributes", "actions"}


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every XML file below the tree's root."""
    files = tree.with_suffix(*SUFFIXES)
    splits = _listed_splits(tree, files, summary)
    for path, root in summary.documents(tree, files, ROOT_ELEMENT):
        name = tree.name(path)
        given, count = root.findtext("filename") or "", len(root.findall("object"))
        match = tree.find_stem(path.stem, path.parent)
        if match is None and (named := tree.find(given, path.parent)):
            match = named.as_second()
        if match is None:
            summary.leave_out_image("it is not there", f"{name}: <filename> {given!r}", count)
        elif splits and path.stem not in splits:
            summary.leave_out_image("it is in no list of ImageSets/Main", name, count, match.image)
        else:
            split = splits.get(path.stem) or split_of_folder(path, tree.root)
            objects, stated = list(_objects(root, name, summary)), _size(root, name, summary)
            yield Picture(match.image, name, objects, split, stated, match.claim)


def _listed_splits(tree: Tree, files: list[Path], summary: Summary) -> dict[str, tuple[str, ...]]:
    """Return {image name: its lists in ImageSets/Main}; empty without such lists."""
    splits: dict[str, list[str]] = {}
    known = {path.stem for path in files}
    for path in tree.files:
        if path.suffix != ".txt" or path.parts[-3:-1] != ("ImageSets", "Main"):
            continue
        try:
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        except Unreadable as error:
            summary.broken.append((str(path), str(error)))
            continue
        if lines and all(re.search(r"\s(-1|0|1)$", line) and line not in known for line in lines):
            summary.notes.add("a list of one class with 1, 0 or -1 behind each name is no split", tree.name(path))
            continue
        for line in lines:
            stem = Path(line).stem if Path(line).suffix.lower() in IMAGE_SUFFIXES and line not in known else line
            if stem not in known:
                summary.images.add("it is listed and has no XML file", f"{tree.name(path)}: {line}")
            elif path.stem not in splits.setdefault(stem, []):
                splits[stem].append(path.stem)
    return {stem: tuple(names) for stem, names in splits.items()}


def _size(root: ElementTree.Element, name: str, summary: Summary) -> tuple[int, int] | None:
    """Return (width, height) of <size>; None if it is missing, empty or zero, as some tools write it."""
    try:
        width, height = (int(number(root.findtext(f"size/{side}"))) for side in ("width", "height"))
    except BadShape:
        width = height = 0
    if width > 0 and height > 0:
        return width, height
    summary.notes.add("<size> is missing, empty or 0: read from the image", name)
    return None


def _objects(root: ElementTree.Element, name: str, summary: Summary) -> Iterator[Found]:
    for k, item in enumerate(root.iterfind("object"), 1):
        label = (item.findtext("name") or "").strip()
        where = f"object {k} ({label})"
        if not label:
            summary.objects.add("<name> is missing or empty", f"{name}: object {k}")
            continue
        try:
            box, outline = _shape(item)
        except BadShape as error:
            summary.objects.add(str(error), f"{name}: {where}")
            continue
        if item.find("robndbox") is not None and item.find("bndbox") is None:
            summary.notes.add("<robndbox>: the upright box around the turned one", f"{name}: {where}")
        yield Found(where, label, box, outline, difficult=_flag(item, f"{name}: {where}", summary))
    for child in root:
        for part in child if child.tag == "object" else ():
            if part.tag not in _KNOWN:
                summary.notes.add(f"<{part.tag}> of an object is not read", name)


def _flag(item: ElementTree.Element, where: str, summary: Summary) -> bool:
    text = (item.findtext("difficult") or "0").strip()
    if text not in ("0", "1"):
        summary.notes.add(f"<difficult>{text[:20]}</difficult>: taken as 0", where)
    return text == "1"


def _shape(item: ElementTree.Element) -> tuple[Box, tuple[list[float], ...]]:
    """Return the box x0, y0, x1, y1 in pixels from 0, and the outlines of an <object>."""
    outline = item.find("polygon")
    outlines = () if outline is None else (_outline(outline),)
    if item.find("bndbox") is not None:
        return _from_one(
            *(number(item.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        ), outlines
    if (turned := item.find("robndbox")) is not None:
        cx, cy, width, height, angle = (number(turned.findtext(key)) for key in ("cx", "cy", "w", "h", "angle"))
        return _from_one(*extent([rectangle(cx, cy, width, height, angle)])), outlines
    if outlines:
        return extent(outlines), outlines
    raise BadShape(f"it has none of {', '.join(f'<{shape}>' for shape in _SHAPES)}")


def _from_one(xmin: float, ymin: float, xmax: float, ymax: float) -> Box:
    return xmin - 1, ymin - 1, xmax, ymax


def _outline(element: ElementTree.Element) -> list[float]:
    """Read <x1>, <y1>, <x2>, ... (Roboflow), or <pt> or <point> with <x> and <y>."""
    points = [[pt.findtext("x"), pt.findtext("y")] for pt in element if pt.tag in ("pt", "point")]
    if not points:
        count = sum(re.fullmatch(r"x\d+", child.tag) is not None for child in element)
        points = [[element.findtext(f"x{k}"), element.findtext(f"y{k}")] for k in range(1, count + 1)]
    return [value - 1 for value in polygon(points)]
