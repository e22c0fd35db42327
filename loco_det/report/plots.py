"""Pictures of a run as PNG, by matplotlib: detections beside the ground truth, losses over steps."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loco_det.annotations.coco import CocoDataset
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.images.decode import read_image
from loco_det.report.drawing import COLOURS, annotated_shapes, detected_shapes, draw_instances

PANEL_WIDTH = 460  # width of a drawn image in pixels; smaller images are enlarged


def plot_losses(metrics: dict[str, Path], out: Path) -> None:
    """Draw one panel per run with the loss of each unit over steps, on a common scale.

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
    dataset: CocoDataset,
    runs: dict[str, list[dict[str, Any]]],
    out: Path,
    *,
    images: Sequence[int],
    threshold: float = 0.0,
    best: int | None = None,
) -> None:
    """Draw one row per image: the ground truth, then each run's detections.

    Args:
        dataset: with annotations.
        runs: name -> COCO results (RLE `segmentation` optional).
        out: the PNG to write.
        images: positions in the dataset.
        threshold: minimum score of the detections drawn.
        best: most detections drawn in an image, those of the highest scores; None for all.
    """
    columns = ["ground truth", *runs]
    figure = Figure(figsize=(2.3 * len(columns), 2.4 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, index in zip(grid, images):
        record = dataset[index]
        pixels = read_image(record.file_name, "RGB")
        shown = [annotated_shapes(record)]
        for results in runs.values():
            found = [r for r in results if r["image_id"] == record.image_id]
            found = sorted(found, key=lambda r: -r["score"])[:best]
            shown.append(detected_shapes(found, dataset.category_ids, threshold))
        for axes, shapes in zip(row, shown):
            axes.axis("off")
            axes.imshow(draw_instances(pixels, shapes, dataset.class_names, width=PANEL_WIDTH))
    for axes, title in zip(grid[0], columns):
        axes.set_title(title, fontsize=10)
    save_figure(figure, out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write `figure` as PNG to `out`, atomically and without a display."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with atomic_write(out) as file:
        file.write(buffer.getvalue())
