"""CVAT's XML, "CVAT for images 1.1": one file with all images.

<box>, <polygon>, <mask> and <ellipse> (a polygon) become objects; a rotated <box> becomes the upright box around it.
<polyline>, <points>, <cuboid>, <skeleton> and <tag> are not converted. An image's `subset` is its split. Classes are
those of <meta>, in order, if listed. The file "for video" names no images and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np

from loco_det.annotations.formats.files import Tree
from loco_det.annotations.formats.objects import (
    CURVE_POINTS,
    BadShape,
    Found,
    Picture,
    ellipse,
    extent,
    mask_box,
    number,
    pasted,
    polygon,
    rectangle,
)
from loco_det.annotations.formats.splits import WHOLE
from loco_det.annotations.formats.summary import Summary
from loco_det.core.errors import UserError

SUFFIXES = (".xml",)
ROOT_ELEMENT = "annotations"


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every CVAT file below the tree's root.

    Raises:
        UserError: a file "for video".
    """
    for path, root in summary.documents(tree, tree.with_suffix(*SUFFIXES), ROOT_ELEMENT):
        name = tree.name(path)
        if root.find("track") is not None:
            raise UserError(f"{path} has <track>, as 'CVAT for video'; export it as 'CVAT for images 1.1'.")
        for found in root.iterfind("meta/*/labels/label/name"):
            label = (found.text or "").strip()
            if label and label not in summary.classes:
                summary.classes.append(label)
        for element in root.iterfind("image"):
            given = element.get("name", "")
            match = tree.find(given, path.parent)
            if match is None:
                summary.leave_out_image("it is not there", f"{name}: <image name={given!r}>", len(element))
                continue
            stated = _stated(element)
            # A mask has the size of the actual image: the annotation can state any size.
            objects = list(_objects(element, tree.size(match.image), f"{name}: {given}", summary))
            split = (element.get("subset") or WHOLE,)
            yield Picture(match.image, f"{name}: {given}", objects, split, stated, match.claim)


def _stated(element: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(number(element.get(side))) for side in ("width", "height"))
    except BadShape:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _objects(
    element: ElementTree.Element, size: tuple[int, ...] | None, name: str, summary: Summary
) -> Iterator[Found]:
    for k, item in enumerate(element, 1):
        label = (item.get("label") or "").strip()
        where = f"<{item.tag}> {k} ({label})"
        try:
            if not label:
                raise BadShape("it has no label")
            found = _shape(item, where, label, size)
        except BadShape as error:
            summary.objects.add(str(error), f"{name}: {where}")
            continue
        if item.tag == "ellipse":
            summary.notes.add(f"<ellipse>: a polygon of {CURVE_POINTS} points", f"{name}: {where}")
        if item.tag == "box" and float(item.get("rotation") or 0):
            summary.notes.add("turned <box>: the upright box around it", f"{name}: {where}")
        yield found


def _shape(item: ElementTree.Element, where: str, label: str, size: tuple[int, ...] | None) -> Found:
    if item.tag == "box":
        x0, y0, x1, y1 = (number(item.get(key)) for key in ("xtl", "ytl", "xbr", "ybr"))
        turn = math.radians(number(item.get("rotation") or 0))
        if turn:
            x0, y0, x1, y1 = extent([rectangle((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0, turn)])
        return Found(where, label, (x0, y0, x1, y1))
    if item.tag == "polygon":
        outline = polygon([point.split(",") for point in item.get("points", "").split(";")])
        return Found(where, label, extent([outline]), (outline,))
    if item.tag == "ellipse":
        values = [number(item.get(key)) for key in ("cx", "cy", "rx", "ry")]
        outline = ellipse(*values, number(item.get("rotation") or 0))
        return Found(where, label, extent([outline]), (outline,))
    if item.tag == "mask":
        if size is None:
            raise BadShape("a mask on an image without size")
        left, top, width, height = (int(number(item.get(key))) for key in ("left", "top", "width", "height"))
        mask = pasted(_decoded(item.get("rle", ""), width, height, size), left, top, size[0], size[1])
        return Found(where, label, mask_box(mask), mask=mask)
    raise BadShape(f"<{item.tag}> is no area")


def _decoded(text: str, width: int, height: int, size: tuple[int, ...]) -> np.ndarray:
    """Decode run lengths along the rows, background first, to (height, width) bool."""
    if not (0 < width <= size[0] and 0 < height <= size[1]):
        raise BadShape("its mask is larger than its image")
    runs = np.array([number(word) for word in text.split(",")])
    if (runs < 0).any() or (runs != runs.astype(np.int64)).any() or runs.sum() != width * height:
        raise BadShape("its run lengths do not add up to width x height")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs.astype(np.int64)).reshape(height, width)
