"""Draws boxes, masks and pixel classes on an image, by OpenCV; used by the whole package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.annotations import pixels
from loco_det.annotations.coco import Record, decode_segmentation

# Okabe and Ito's colours, distinguishable with colour blindness.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_SHADE, _LABEL_SHADE = 0.45, 0.6  # opacity of a mask's, and of a pixel class's, colour
_PAD = 2  # pixels around a text
_FONT = cv2.FONT_HERSHEY_SIMPLEX


class Shape(NamedTuple):
    """One instance: its class, box [x, y, width, height] in pixels, (H, W) bool mask or None, score or None."""

    label: int
    box: Sequence[float]
    mask: np.ndarray | None = None
    score: float | None = None


def draw_instances(pixels: np.ndarray, shapes: Sequence[Shape], names: Sequence[str], width: int = 0) -> np.ndarray:
    """Draw instances on an image, those with the highest scores on top.

    Args:
        pixels: (H, W, 3) uint8 RGB; not modified.
        shapes: in pixels of that image.
        names: the text of each class.
        width: width of the result in pixels, with proportional height; 0 for the image's own.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    canvas = _canvas(pixels, width)
    size, scale = canvas.shape[1::-1], (width or pixels.shape[1]) / pixels.shape[1]
    line = max(1, round(min(size) / 240))
    ordered = sorted(shapes, key=lambda shape: -1.0 if shape.score is None else shape.score)
    for shape in ordered:
        if shape.mask is not None:
            _tint(canvas, cv2.resize(shape.mask.astype(np.uint8), size, interpolation=cv2.INTER_LINEAR), shape, line)
    for shape in ordered:
        x, y, w, h = (v * scale for v in shape.box)
        corners = (round(x), round(y)), (round(x + w), round(y + h))
        cv2.rectangle(canvas, *corners, _rgb(shape.label), line, cv2.LINE_AA)
    for shape in ordered:
        text = names[shape.label] if shape.score is None else f"{names[shape.label]} {shape.score:.2f}"
        _write(canvas, text, (shape.box[0] * scale, shape.box[1] * scale), _rgb(shape.label), line)
    return canvas


def draw_labels(pixels: np.ndarray, labels: np.ndarray, colours: np.ndarray, width: int = 0) -> np.ndarray:
    """Colour every pixel by its class; labels that are no class leave it unchanged.

    Args:
        pixels: (H, W, 3) uint8 RGB; not modified.
        labels: (H, W) classes.
        colours: (K, 3) uint8 RGB.
        width: as for `draw_instances`.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    canvas = _canvas(pixels, width)
    labels = cv2.resize(labels.astype(np.uint16), canvas.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    inside = labels < len(colours)
    canvas[inside] = (1 - _LABEL_SHADE) * canvas[inside] + _LABEL_SHADE * colours[labels[inside]]
    return canvas


def draw_legend(names: Sequence[str], colours: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the names on plates of their colours, in rows of the width of a picture of `shape` (h, w, ...).

    Returns:
        (rows, w, 3) uint8 RGB, white between the plates.
    """
    size = _text_size(shape)
    places, x, y = [], 0, 0
    for name in names:
        width, height = _plate_size(name, size)
        if x and x + width > shape[1]:
            x, y = 0, y + height
        places.append((x, y + height))
        x += width + _PAD
    canvas = np.full((places[-1][1], shape[1], 3), 255, np.uint8)
    for name, colour, corner in zip(names, colours.tolist(), places):
        _plate(canvas, name, corner, tuple(colour), size)
    return canvas


def class_colours(names: Sequence[str]) -> np.ndarray:
    """Return (K, 3) uint8 RGB: Cityscapes' colours for its classes, else Pascal VOC's colour map without black."""
    if tuple(names) == pixels.CLASSES:
        return np.array(pixels.COLOURS, np.uint8)
    colours = np.zeros((len(names), 3), np.uint8)
    for label, colour in enumerate(colours, start=1):
        for bit in range(
            24
        ):  # VOC's map: the label's bits, three by three, are the colours' bits from the highest down
            colour[bit % 3] |= (label >> bit & 1) << 7 - bit // 3
    return colours


def annotated_shapes(record: Record) -> list[Shape]:
    """Return the ground truth of one image as shapes."""
    shapes = []
    for k, (x0, y0, x1, y1) in enumerate(record.boxes.tolist()):
        segmentation = decode_segmentation(record, k)
        mask = None
        if isinstance(segmentation, list):
            polygons = coco_mask.frPyObjects([p.tolist() for p in segmentation], record.height, record.width)
            mask = coco_mask.decode(coco_mask.merge(polygons)).astype(bool)
        elif segmentation is not None:
            mask = coco_mask.decode(segmentation).astype(bool)
        shapes.append(Shape(int(record.classes[k]), [x0, y0, x1 - x0, y1 - y0], mask))
    return shapes


def detected_shapes(results: Sequence[dict[str, Any]], category_ids: Sequence[int], threshold: float) -> list[Shape]:
    """Return COCO results of one image that score at least `threshold`; `category_ids` are in class order."""
    label = {category: i for i, category in enumerate(category_ids)}
    return [
        Shape(
            label[r["category_id"]],
            r["bbox"],
            coco_mask.decode(r["segmentation"]).astype(bool) if "segmentation" in r else None,
            r["score"],
        )
        for r in results
        if r["score"] >= threshold
    ]


def _canvas(pixels: np.ndarray, width: int) -> np.ndarray:
    """Copy the image, scaled to `width` unless 0."""
    scale = width / pixels.shape[1] if width else 1.0
    if scale == 1:
        return pixels.copy()
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(pixels, (width, max(1, round(pixels.shape[0] * scale))), interpolation=how)


def _rgb(label: int) -> tuple[int, int, int]:
    colour = COLOURS[label % len(COLOURS)]
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _tint(canvas: np.ndarray, mask: np.ndarray, shape: Shape, line: int) -> None:
    inside = mask > 0
    canvas[inside] = ((1 - _SHADE) * canvas[inside] + _SHADE * np.array(_rgb(shape.label))).astype(np.uint8)
    edges, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, edges, -1, _rgb(shape.label), line, cv2.LINE_AA)


def _write(canvas: np.ndarray, text: str, corner: tuple[float, float], colour: tuple[int, int, int], line: int) -> None:
    """Draw a label on a plate of the class's colour above the box's corner, inside the image."""
    size = _text_size(canvas.shape)
    width, height = _plate_size(text, size)
    x = int(np.clip(corner[0] - line / 2, 0, max(0, canvas.shape[1] - width)))
    _plate(canvas, text, (x, int(np.clip(corner[1], height, canvas.shape[0]))), colour, size)


def _text_size(shape: tuple[int, ...]) -> float:
    return max(0.32, min(shape[:2]) / 900)


def _plate_size(text: str, size: float) -> tuple[int, int]:
    (width, height), below = cv2.getTextSize(text, _FONT, size, 1)
    return width + 2 * _PAD, height + below + _PAD


def _plate(canvas: np.ndarray, text: str, corner: tuple[int, int], colour: tuple[int, int, int], size: float) -> None:
    """Draw text on a plate whose lower left corner is `corner`."""
    x, bottom = corner
    width, height = _plate_size(text, size)
    cv2.rectangle(canvas, (x, bottom - height), (x + width, bottom), colour, cv2.FILLED)
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 128
    ink = (255, 255, 255) if dark else (0, 0, 0)
    below = cv2.getTextSize(text, _FONT, size, 1)[1]
    cv2.putText(canvas, text, (x + _PAD, bottom - below), _FONT, size, ink, 1, cv2.LINE_AA)
