"""LabelMe JSON: one file per image, beside it or elsewhere below the folder.

Shapes with the same label and `group_id` are parts of one object, as in LabelMe's own converter. A rectangle is a box
without mask, alone or as a part; a circle becomes a polygon; points and lines are not objects.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from loco_det.annotations.formats.files import Size, Tree, read_json
from loco_det.annotations.formats.objects import (
    CURVE_POINTS,
    BadShape,
    Box,
    Found,
    Picture,
    ellipse,
    extent,
    mask_box,
    number,
    pasted,
    polygon,
)
from loco_det.annotations.formats.splits import split_of_folder
from loco_det.annotations.formats.summary import Summary

SUFFIXES = (".json",)
_PARTLESS = ("point", "points", "line", "linestrip")


def is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every LabelMe file below the tree's root."""
    for path, content in summary.readable(tree.with_suffix(*SUFFIXES), read_json):
        name = tree.name(path)
        if not is_labelme(content):
            summary.notes.add("a JSON file without 'shapes' and 'imagePath' is not LabelMe's", name)
            continue
        given = content["imagePath"] if isinstance(content["imagePath"], str) else ""
        match = tree.find(given, path.parent)
        if match is None and (alike := tree.find_stem(path.stem, path.parent)):
            match = alike.as_second()
        if match is None:
            inside = ", only inside the JSON (imageData)" if content.get("imageData") else ""
            summary.leave_out_image(f"it is not there{inside}", f"{name}: imagePath {given!r}", len(content["shapes"]))
            continue
        size = tree.size(match.image)
        objects = [] if size is None else list(_objects(content["shapes"], size, name, summary))
        split = split_of_folder(path, tree.root)
        yield Picture(match.image, name, objects, split, _stated(content), match.claim)


def _stated(content: dict[str, Any]) -> tuple[int, int] | None:
    sides = content.get("imageWidth"), content.get("imageHeight")
    return sides if all(isinstance(side, int) and side > 0 for side in sides) else None


def _objects(shapes: list[Any], size: Size, name: str, summary: Summary) -> Iterator[Found]:
    groups: dict[tuple[Any, ...], list[Found]] = {}
    for k, shape in enumerate(shapes):
        where = f"shapes[{k}]"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not shape["label"].strip():
            summary.objects.add("it has no label", f"{name}: {where}")
            continue
        label = shape["label"].strip()
        try:
            found = _part(shape, f"{where} ({label})", label, size)
        except BadShape as error:
            summary.objects.add(str(error), f"{name}: {where} ({label})")
            continue
        if shape.get("shape_type") == "circle":
            summary.notes.add(f"circle: a polygon of {CURVE_POINTS} points", f"{name}: {where}")
        group = shape.get("group_id")
        key = (label, k) if group is None else (label, "group", str(group))
        groups.setdefault(key, []).append(found)
    for parts in groups.values():
        yield parts[0] if len(parts) == 1 else _joined(parts, name, summary)


def _joined(parts: list[Found], name: str, summary: Summary) -> Found:
    """Join the parts of one object: their outlines, or, if a part has none, the box around all."""
    x0, y0, x1, y1 = zip(*(part.box for part in parts))
    box: Box = min(x0), min(y0), max(x1), max(y1)
    first = parts[0]
    if all(part.polygons for part in parts):
        return first._replace(box=box, polygons=tuple(outline for part in parts for outline in part.polygons))
    summary.notes.add("a group of boxes, or of masks of several kinds: one box around it", f"{name}: {first.where}")
    return first._replace(box=box, polygons=(), mask=None)


def _part(shape: dict[str, Any], where: str, label: str, size: Size) -> Found:
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind in ("polygon", "rotation"):
        outline = polygon(points)
        return Found(where, label, extent([outline]), (outline,))
    if kind == "rectangle":
        return Found(where, label, extent([_points(points, 2)]))
    if kind == "circle":
        cx, cy, x, y = _points(points, 2)[:4]
        radius = float(np.hypot(x - cx, y - cy))
        outline = ellipse(cx, cy, radius, radius)
        return Found(where, label, (cx - radius, cy - radius, cx + radius, cy + radius), (outline,))
    if kind == "mask":
        x, y = _points(points, 1)[:2]
        mask = pasted(_decoded(shape.get("mask")), round(x), round(y), size.width, size.height)
        return Found(where, label, mask_box(mask), mask=mask)
    raise BadShape(
        f"shape_type {str(kind)[:20]!r} is no area" if kind in _PARTLESS else f"unknown shape_type {str(kind)[:20]!r}"
    )


def _points(points: Any, least: int) -> list[float]:
    if (
        not isinstance(points, list)
        or len(points) < least
        or any(not isinstance(point, list) or len(point) != 2 for point in points)
    ):
        raise BadShape(f"its points are not {least} or more pairs of numbers")
    return [number(value) for point in points for value in point]


def _decoded(text: Any) -> np.ndarray:
    """Decode a base64 PNG to (h, w) bool."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            return np.asarray(image.convert("L")) > 0
    except Exception:  # PIL's parsers raise various exceptions on hostile bytes
        raise BadShape("its mask is no PNG in base64") from None
