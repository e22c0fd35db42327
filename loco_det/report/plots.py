"""Pictures of a run: detections beside the ground truth, losses over steps. matplotlib, written as PNG."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pycocotools import mask as coco_mask

from loco_det.data.coco import CocoDataset, Record, decode_segmentation
from loco_det.data.images import read_image
from loco_det.errors import UserError
from loco_det.runtime import atomic_write

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")


def plot_losses(metrics: dict[str, Path], out: Path) -> None:
    """One panel a run with the loss of each of its units over steps, all on one scale.

    Args:
        metrics: name -> the run's metrics.json.
        out: the PNG to write.

    Raises:
        UserError: a metrics.json without a "loss/..." value.
    """
    figure = Figure(figsize=(3.6 * len(metrics), 3.2), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (name, path) in zip(panels, metrics.items()):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        units = list(dict.fromkeys(key for line in lines for key in line if key.startswith("loss/")))
        if not units:
            raise UserError(f"{path}: holds no losses; give the metrics.json of a pretraining run")
        for colour, unit in zip(COLOURS, units):
            points = [(line["iteration"], line[unit]) for line in lines if unit in line]
            axes.plot(*zip(*points), color=colour, label=unit.removeprefix("loss/"))
        axes.set(title=name, xlabel="step")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("NT-Xent")
    save_figure(figure, out)


def draw_detections(
    dataset: CocoDataset, runs: dict[str, list[dict[str, Any]]], out: Path, *, images: Sequence[int], threshold: float
) -> None:
    """A row for each image: the ground truth, then each run's detections.

    Args:
        dataset: with annotations.
        runs: name -> COCO results (RLE `segmentation` optional).
        out: the PNG to write.
        images: positions in the dataset.
        threshold: detections with lower scores are left out.
    """
    columns = ["ground truth", *runs]
    figure = Figure(figsize=(2.3 * len(columns), 2.4 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    class_of = {category: i for i, category in enumerate(dataset.category_ids)}
    for row, index in zip(grid, images):
        record = dataset[index]
        pixels = read_image(record.file_name, "RGB")
        _show(row[0], pixels, _annotated(record), dataset.class_names)
        for axes, results in zip(row[1:], runs.values()):
            found = [r for r in results if r["image_id"] == record.image_id and r["score"] >= threshold]
            shapes = [(class_of[r["category_id"]], r["bbox"], _mask(r), r["score"]) for r in found]
            _show(axes, pixels, shapes, dataset.class_names)
    for axes, title in zip(grid[0], columns):
        axes.set_title(title, fontsize=10)
    save_figure(figure, out)


def _annotated(record: Record) -> list[tuple[int, list[float], np.ndarray | None, float | None]]:
    shapes = []
    for k, (x0, y0, x1, y1) in enumerate(record.boxes.tolist()):
        segmentation = decode_segmentation(record, k)
        mask = None
        if isinstance(segmentation, list):
            polygons = coco_mask.frPyObjects([p.tolist() for p in segmentation], record.height, record.width)
            mask = coco_mask.decode(coco_mask.merge(polygons)).astype(bool)
        elif segmentation is not None:
            mask = coco_mask.decode(segmentation).astype(bool)
        shapes.append((int(record.classes[k]), [x0, y0, x1 - x0, y1 - y0], mask, None))
    return shapes


def _mask(result: dict[str, Any]) -> np.ndarray | None:
    return coco_mask.decode(result["segmentation"]).astype(bool) if "segmentation" in result else None


def _show(axes: Axes, pixels: np.ndarray, shapes: list, names: Sequence[str]) -> None:
    axes.axis("off")
    tinted = pixels.astype(np.float32)
    for label, _, mask, _ in shapes:
        if mask is not None:
            colour = [int(COLOURS[label % len(COLOURS)][i : i + 2], 16) for i in (1, 3, 5)]
            tinted[mask] = 0.45 * tinted[mask] + 0.55 * np.array(colour)
    axes.imshow(tinted.astype(np.uint8), interpolation="nearest")
    for label, (x, y, width, height), _, score in shapes:
        colour = COLOURS[label % len(COLOURS)]
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linewidth=1.2))
        text = names[label] if score is None else f"{names[label]} {score:.2f}"
        style = {"facecolor": "black", "alpha": 0.6, "pad": 0.6, "linewidth": 0}
        axes.text(x, y, text, color="white", fontsize=5.5, bbox=style, verticalalignment="bottom", clip_on=True)


def save_figure(figure: Figure, out: Path) -> None:
    """`figure` as a PNG at `out`, atomically and without a display."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with atomic_write(out) as file:
        file.write(buffer.getvalue())
