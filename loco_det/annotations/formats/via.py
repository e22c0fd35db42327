"""VIA (VGG Image Annotator) 1 and 2: a saved project, or its annotations exported as JSON.

The class is the value of one region attribute: `class`, `label`, `category`, `name` or `type` if present, else the most
frequent attribute. If regions have no attributes, the class is "object". Circles and ellipses become polygons; points
and lines are not objects.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from loco_det.annotations.formats.files import Tree, read_json
from loco_det.annotations.formats.objects import (
    CURVE_POINTS,
    BadShape,
    Box,
    Found,
    Picture,
    ellipse,
    extent,
    number,
    polygon,
)
from loco_det.annotations.formats.splits import split_of_folder
from loco_det.annotations.formats.summary import Summary

SUFFIXES = (".json",)
ONE_CLASS = "object"
_CLASS_ATTRIBUTES = ("class", "label", "category", "name", "type")


def is_via(content: Any) -> bool:
    """Whether JSON is VIA's, a project or an export."""
    if not isinstance(content, dict):
        return False
    if isinstance(content.get("_via_img_metadata"), dict):
        return True
    entries = list(content.values())
    return bool(entries) and all(isinstance(e, dict) and "filename" in e and "regions" in e for e in entries)


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every VIA file below the tree's root."""
    contents = []
    for path, content in summary.readable(tree.with_suffix(*SUFFIXES), read_json):
        if is_via(content):
            contents.append((path, list(content.get("_via_img_metadata", content).values())))
        else:
            summary.notes.add("a JSON file that is not VIA's", tree.name(path))
    attribute = _class_attribute([entry for _, entries in contents for entry in entries], summary)
    for path, entries in contents:
        for entry in entries:
            given = entry.get("filename") if isinstance(entry, dict) else None
            name = f"{tree.name(path)}: {given}"
            match = tree.find(given, path.parent) if isinstance(given, str) else None
            if match is None:
                summary.leave_out_image("it is not there", name, len(_regions(entry)))
                continue
            objects = list(_objects(_regions(entry), attribute, name, summary))
            split = split_of_folder(match.image, tree.root)
            yield Picture(match.image, name, objects, split, claim=match.claim)


def _regions(entry: Any) -> list[Any]:
    """A list in VIA 2, a mapping from numbers in VIA 1."""
    regions = entry.get("regions") if isinstance(entry, dict) else None
    return list(regions.values()) if isinstance(regions, dict) else regions if isinstance(regions, list) else []


def _class_attribute(entries: list[Any], summary: Summary) -> str | None:
    """Return the attribute whose value is the class; None if no region has any."""
    counts = Counter(
        key
        for entry in entries
        for region in _regions(entry)
        if isinstance(region, dict) and isinstance(region.get("region_attributes"), dict)
        for key in region["region_attributes"]
    )
    named = sorted(
        (key for key in counts if key.lower() in _CLASS_ATTRIBUTES),
        key=lambda key: _CLASS_ATTRIBUTES.index(key.lower()),
    )
    attribute = named[0] if named else max(counts, key=lambda key: (counts[key], key), default=None)
    if attribute is None and any(_regions(entry) for entry in entries):
        summary.notes.add(f"regions have no attributes: their class is '{ONE_CLASS}'", "the whole project")
    elif len(counts) > 1:
        others = ", ".join(sorted(set(counts) - {attribute}))
        summary.notes.add(f"the class is the attribute '{attribute}'; not read: {others}", "the whole project")
    return attribute


def _objects(regions: list[Any], attribute: str | None, name: str, summary: Summary) -> Iterator[Found]:
    for k, region in enumerate(regions):
        where = f"regions[{k}]"
        try:
            if not isinstance(region, dict) or not isinstance(shape := region.get("shape_attributes"), dict):
                raise BadShape("it has no shape_attributes")
            label = _label(region.get("region_attributes"), attribute)
            kind = shape.get("name")
            box, outlines = _shape(kind, shape)
        except BadShape as error:
            summary.objects.add(str(error), f"{name}: {where}")
            continue
        if kind in ("circle", "ellipse"):
            summary.notes.add(f"{kind}: a polygon of {CURVE_POINTS} points", f"{name}: {where}")
        yield Found(f"{where} ({label})", label, box, outlines)


def _label(attributes: Any, attribute: str | None) -> str:
    if attribute is None:
        return ONE_CLASS
    value = attributes.get(attribute) if isinstance(attributes, dict) else None
    if isinstance(value, dict):  # a checkbox: {"cat": true}
        chosen = [key for key, ticked in value.items() if ticked]
        if len(chosen) > 1:
            raise BadShape(f"several classes are ticked in '{attribute}'")
        value = chosen[0] if chosen else None
    if not isinstance(value, (str, int)) or not str(value).strip():
        raise BadShape(f"its attribute '{attribute}' is empty or missing")
    return str(value).strip()


def _shape(kind: Any, shape: dict[str, Any]) -> tuple[Box, tuple[list[float], ...]]:
    if kind == "rect":
        x, y, width, height = (number(shape.get(key)) for key in ("x", "y", "width", "height"))
        return (x, y, x + width, y + height), ()
    if kind == "polygon":
        x, y = shape.get("all_points_x"), shape.get("all_points_y")
        if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
            raise BadShape("all_points_x and all_points_y are not lists of one length")
        outline = polygon(list(zip(x, y)))
        return extent([outline]), (outline,)
    if kind in ("circle", "ellipse"):
        cx, cy = number(shape.get("cx")), number(shape.get("cy"))
        rx, ry = (number(shape.get(key)) for key in (("r", "r") if kind == "circle" else ("rx", "ry")))
        turn = number(shape.get("theta", 0))
        outline = ellipse(cx, cy, rx, ry, math.degrees(turn))
        half = (
            math.hypot(rx * math.cos(turn), ry * math.sin(turn)),
            math.hypot(rx * math.sin(turn), ry * math.cos(turn)),
        )
        return (cx - half[0], cy - half[1], cx + half[0], cy + half[1]), (outline,)
    raise BadShape(f"the shape {str(kind)[:20]!r} is no area")
