"""Label Studio's JSON export: a list of tasks, coordinates in percent of the image's width and height.

Of several annotations of a task the first that was not cancelled counts; predictions never do. A rotated rectangle
becomes the upright box around it, an ellipse a polygon. Brushes (Label Studio's own run-length code) are not converted:
export them as COCO with masks or as PNG.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loco_det.annotations.formats.files import IMAGE_SUFFIXES, Match, Size, Tree, read_json
from loco_det.annotations.formats.objects import (
    CURVE_POINTS,
    BadShape,
    Found,
    Picture,
    ellipse,
    extent,
    number,
    polygon,
)
from loco_det.annotations.formats.splits import split_of_folder
from loco_det.annotations.formats.summary import Summary
from loco_det.core.errors import UserError

SUFFIXES = (".json",)
_RESULTS = ("annotations", "completions")  # the latter before version 1.0
MIN_KEYS = frozenset(("annotator", "annotation_id"))  # in an entry of JSON-MIN
_UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # prefix of uploaded file names
_NO_SHAPE = frozenset(("choices", "textarea", "rating", "number", "relation", "taxonomy", "pairwise", "datetime"))


def is_label_studio(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(t, dict) and "data" in t for t in content)


def is_json_min(content: Any) -> bool:
    """Whether JSON is Label Studio's short export, which does not distinguish shapes from other results."""
    return isinstance(content, list) and any(
        isinstance(t, dict) and MIN_KEYS & set(t) and "data" not in t for t in content
    )


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every export below the tree's root.

    Raises:
        UserError: an export as JSON-MIN, or of tasks without annotations.
    """
    for path, content in summary.readable(tree.with_suffix(*SUFFIXES), read_json):
        if is_json_min(content):
            raise UserError(f"{path} is Label Studio's JSON-MIN, which is not read; export it as JSON.")
        if not is_label_studio(content):
            summary.notes.add("a JSON file that is not Label Studio's", tree.name(path))
            continue
        if not any(key in task for task in content for key in _RESULTS):
            raise UserError(f"{path} holds tasks without 'annotations'; export them as JSON when they have some.")
        for k, task in enumerate(content):
            yield from _picture(tree, path, f"{tree.name(path)}: [{k}]", task, summary)


def _picture(tree: Tree, path: Path, name: str, task: dict[str, Any], summary: Summary) -> Iterator[Picture]:
    given, match = _image(tree, path, task.get("data"))
    annotations = next((task[key] for key in _RESULTS if isinstance(task.get(key), list)), [])
    done = [a for a in annotations if isinstance(a, dict) and not a.get("was_cancelled")]
    results = [a["result"] if isinstance(a.get("result"), list) else [] for a in done]
    if match is None:
        summary.leave_out_image("it is not there", f"{name}: {given}", len(results[0]) if results else 0)
        return
    if not results:
        summary.leave_out_image("its task has no annotation", f"{name}: {given}", 0, match.image)
        return
    for other in filter(None, results[1:]):
        summary.objects.add("of another annotation of the same task than the first", name, len(other))
    size = tree.size(match.image)
    objects = [] if size is None else list(_objects(results[0], size, name, summary))
    yield Picture(match.image, name, objects, split_of_folder(match.image, tree.root), claim=match.claim)


def _image(tree: Tree, path: Path, data: Any) -> tuple[str, Match | None]:
    """Return a task's name for its image, and the image."""
    texts = [value for value in data.values() if isinstance(value, str)] if isinstance(data, dict) else []
    named = [text for text in texts if Path(text.partition("&")[0]).suffix.lower() in IMAGE_SUFFIXES]
    for text in named or texts:
        found = tree.find(text, path.parent)
        uploaded = _UPLOADED.fullmatch(text.rpartition("/")[2])
        if found is None and uploaded:
            found = tree.find(uploaded[1], path.parent)
            found = found and found.as_second()
        if found is not None:
            return text, found
    return repr((named or texts or [""])[0]), None


def _objects(results: list[Any], size: Size, name: str, summary: Summary) -> Iterator[Found]:
    labels = {str(r.get("id")): r for r in results if isinstance(r, dict) and r.get("type") == "labels"}
    for k, result in enumerate(results):
        where = f"result[{k}]"
        kind = str(result.get("type")) if isinstance(result, dict) else ""
        if kind in _NO_SHAPE or (kind == "labels" and _shape_of(results, result)):
            continue  # describes the image, or is the class of the shape with the same id
        try:
            value = result.get("value") if isinstance(result, dict) else None
            if not isinstance(value, dict) or not kind:
                raise BadShape("it has no type or no value")
            shape = kind.removesuffix("labels")
            label = _label(kind, value, labels.get(str(result.get("id"))))
            found = _shape(f"{where} ({label})", label, shape, value, size)
        except BadShape as error:
            summary.objects.add(str(error), f"{name}: {where}")
            continue
        if shape == "ellipse":
            summary.notes.add(f"ellipse: a polygon of {CURVE_POINTS} points", f"{name}: {where}")
        if shape == "rectangle" and value.get("rotation"):
            summary.notes.add("turned rectangle: the upright box around it", f"{name}: {where}")
        yield found


def _shape_of(results: list[Any], result: dict[str, Any]) -> bool:
    return any(isinstance(r, dict) and r is not result and r.get("id") == result.get("id") for r in results)


def _label(kind: str, value: dict[str, Any], apart: Any) -> str:
    """Return the class, from the shape itself or from the `labels` with its id."""
    found = value.get(kind) or value.get("labels")
    if not found and isinstance(apart, dict) and isinstance(apart.get("value"), dict):
        found = apart["value"].get("labels")
    if not isinstance(found, list) or not found or not isinstance(found[0], str) or not found[0].strip():
        raise BadShape("it has no label")
    if len(found) > 1:
        raise BadShape("it has several labels")
    return found[0].strip()


def _shape(where: str, label: str, kind: str, value: dict[str, Any], size: Size) -> Found:
    """Convert the shape to pixels. Rectangles rotate clockwise about their upper left corner, in pixel space."""
    across, down = size.width / 100, size.height / 100
    if kind == "rectangle":
        x, y, width, height = (number(value.get(key)) for key in ("x", "y", "width", "height"))
        x, y, width, height = x * across, y * down, width * across, height * down
        turn = math.radians(number(value.get("rotation") or 0))
        if not turn:
            return Found(where, label, (x, y, x + width, y + height))
        cos, sin = math.cos(turn), math.sin(turn)
        corners = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)]
        return Found(
            where, label, extent([[v for a, b in corners for v in (x + a * cos - b * sin, y + a * sin + b * cos)]])
        )
    if kind == "polygon":
        points = polygon(value.get("points"))
        outline = [v * (across, down)[k % 2] for k, v in enumerate(points)]
        return Found(where, label, extent([outline]), (outline,))
    if kind == "ellipse":
        cx, cy, rx, ry = (number(value.get(key)) for key in ("x", "y", "radiusX", "radiusY"))
        outline = ellipse(cx * across, cy * down, rx * across, ry * down, number(value.get("rotation") or 0))
        return Found(where, label, extent([outline]), (outline,))
    if kind == "brush":
        raise BadShape("a brush mask in Label Studio's own run-length code; export it as COCO or PNG")
    raise BadShape(f"a result of type {kind[:20]!r} is no area")
