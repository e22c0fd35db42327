"""Boxes, masks and labels on an image, by OpenCV: the one way in which this package draws instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.data.coco import Record, decode_segmentation

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
_SHADE = 0.45  # of a mask's colour over the image
_FONT = cv2.FONT_HERSHEY_SIMPLEX


class Shape(NamedTuple):
    """One instance: its class, box [x, y, width, height] in pixels, (H, W) bool mask or None, score or None."""

    label: int
    box: Sequence[float]
    mask: np.ndarray | None = None
    score: float | None = None


def draw_instances(pixels: np.ndarray, shapes: Sequence[Shape], names: Sequence[str], width: int = 0) -> np.ndarray:
    """The image with its instances on it, those with the highest scores on top.

    Args:
        pixels: (H, W, 3) uint8 RGB; left as it is.
        shapes: in pixels of that image.
        names: the text of each class.
        width: of the result in pixels, its height in proportion; 0 for the image's own.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    height, own = pixels.shape[:2]
    scale = width / own if width else 1.0
    size = (max(1, round(own * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = cv2.resize(pixels, size, interpolation=how) if scale != 1 else pixels.copy()
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


def annotated_shapes(record: Record) -> list[Shape]:
    """The ground truth of one image."""
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
    """COCO results of one image that score at least `threshold`; `category_ids` are in the order of the classes."""
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


def _rgb(label: int) -> tuple[int, int, int]:
    colour = COLOURS[label % len(COLOURS)]
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _tint(canvas: np.ndarray, mask: np.ndarray, shape: Shape, line: int) -> None:
    inside = mask > 0
    canvas[inside] = ((1 - _SHADE) * canvas[inside] + _SHADE * np.array(_rgb(shape.label))).astype(np.uint8)
    edges, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, edges, -1, _rgb(shape.label), line, cv2.LINE_AA)


def _write(canvas: np.ndarray, text: str, corner: tuple[float, float], colour: tuple[int, int, int], line: int) -> None:
    """A label on a plate of the class's colour above the box's corner, kept inside the image."""
    size = max(0.32, min(canvas.shape[:2]) / 900)
    (width, height), below = cv2.getTextSize(text, _FONT, size, 1)
    pad = 2
    x = int(np.clip(corner[0] - line / 2, 0, max(0, canvas.shape[1] - width - 2 * pad)))
    bottom = int(np.clip(corner[1], height + below + pad, canvas.shape[0]))
    cv2.rectangle(canvas, (x, bottom - height - below - pad), (x + width + 2 * pad, bottom), colour, cv2.FILLED)
    dark = np.dot(colour, (0.299, 0.587, 0.114)) < 128
    ink = (255, 255, 255) if dark else (0, 0, 0)
    cv2.putText(canvas, text, (x + pad, bottom - below), _FONT, size, ink, 1, cv2.LINE_AA)
