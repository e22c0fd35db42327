"""The same images with the ground truth and with each backbone's predictions, as small JPEGs for the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from loco_det.annotations.coco import CocoDataset, Record, load_coco
from loco_det.annotations.pixels import IGNORED
from loco_det.annotations.registry import Dataset, benchmark_of, find_dataset
from loco_det.core.errors import UserError
from loco_det.evaluation import labels
from loco_det.evaluation.pixels import read_pair
from loco_det.images.decode import read_image
from loco_det.report.drawing import Shape, annotated_shapes, class_colours, detected_shapes, draw_instances, draw_labels
from loco_det.report.runs import DetectorRun

WIDTH = 420  # pixels of one picture
QUALITY = 80


def panels(runs: list[DetectorRun], count: int, threshold: float, missing: list[str]) -> dict[str, Any]:
    """Draw the panels of one experiment: the first run of each backbone that has predictions.

    Args:
        runs: runs of one experiment.
        count: number of images, evenly spread over those with objects or labels.
        threshold: minimum score of the detections drawn.
        missing: whatever is unavailable is added.

    Returns:
        {"note", "legend": [[class, "#rrggbb"], ...], "rows": [{"image": file name, "pictures": {"ground truth" or
        backbone: data URI, or None if unavailable}}]}; {} if there is nothing to show.
    """
    shown = {run.backbone: run for run in reversed(runs) if run.results.exists()}
    if not shown or not count:
        return {}
    shown = {name: shown.get(name) for name in dict.fromkeys(run.backbone for run in runs)}
    reference = next(run for run in shown.values() if run)
    labelled = reference.is_segmentor
    try:
        dataset = load_coco(_paths(reference), need_annotations=not labelled)
        filled = range(len(dataset)) if labelled else sorted(set(dataset.objects()[0].tolist()))
        records = [dataset[i] for i in _spread(filled, count)]
        pixels = [read_image(record.file_name, "RGB") for record in records]
        truth = [_truth(record) if labelled else annotated_shapes(record) for record in records]
    except UserError as error:
        missing.append(f"pictures of {reference.title}: {error}")
        return {}
    columns: dict[str, list[Any] | None] = {"ground truth": truth}
    for name, run in shown.items():
        columns[name] = None
        try:
            if run and run.annotations != reference.annotations:
                raise UserError(f"it was tested on other images than {reference.path}")
            if run:
                columns[name] = (
                    _labels(run, dataset, records) if labelled else _detections(run, dataset, records, threshold)
                )
        except (UserError, msgspec.DecodeError, KeyError, TypeError, ValueError, RecursionError) as error:
            missing.append(f"{run.path}: no pictures: {error}")
    rows = []
    for i, record in enumerate(records):
        drawn = {n: column and _draw(pixels[i], column[i], dataset.class_names) for n, column in columns.items()}
        rows.append({"image": record.file_name.rpartition("/")[2], "pictures": drawn})
    if labelled:
        legend = _legend(columns, dataset.class_names)
        return {"note": "What has no colour is not evaluated.", "legend": legend, "rows": rows}
    return {"note": f"Detections with a score of at least {threshold:g}.", "legend": [], "rows": rows}


def _legend(columns: dict[str, list[np.ndarray] | None], names: Sequence[str]) -> list[list[str]]:
    """Return names and colours of the classes present in the pictures."""
    seen = {k for column in columns.values() for labels in column or () for k in np.unique(labels).tolist()}
    colours = class_colours(names).tolist()
    return [[names[k], "#{:02x}{:02x}{:02x}".format(*colours[k])] for k in sorted(seen - {IGNORED})]


def _truth(record: Record) -> np.ndarray:
    return record.labels.read(record.file_name, (record.height, record.width))


def _labels(run: DetectorRun, dataset: CocoDataset, records: Sequence[Record]) -> list[np.ndarray]:
    """Load the predicted classes (H, W) of each image."""
    if dataset.paths.benchmark == "pixels":
        return [read_pair(Path(record.file_name), run.results)[1] for record in records]
    rows = np.searchsorted(dataset.index.image_id, [record.image_id for record in records])
    return [labels.read_pair(dataset.paths, row, run.results)[1] for row in rows.tolist()]


def _detections(
    run: DetectorRun, dataset: CocoDataset, records: Sequence[Record], threshold: float
) -> list[list[Shape]]:
    """Load the detections of each image."""
    found: dict[int, list[dict[str, Any]]] = {record.image_id: [] for record in records}
    for result in msgspec.json.decode(run.results.read_bytes()):
        if result["image_id"] in found:
            found[result["image_id"]].append(result)
    return [detected_shapes(results, dataset.category_ids, threshold) for results in found.values()]


def _draw(pixels: np.ndarray, what: np.ndarray | list[Shape], names: Sequence[str]) -> str:
    """Draw labels or instances on the image, as a data URI."""
    if isinstance(what, np.ndarray):
        drawn = draw_labels(pixels, what, class_colours(names), WIDTH)
    else:
        drawn = draw_instances(pixels, what, names, WIDTH)
    _, data = cv2.imencode(".jpg", drawn[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def _paths(run: DetectorRun) -> Dataset:
    """Locate the run's test set.

    Raises:
        UserError: its ground truth or its images are missing.
    """
    annotations = run.annotations
    if annotations is None or annotations.suffix != ".json":
        raise UserError("the ground truth is not there; set DETECTRON2_DATASETS")
    name = run.config["DATASETS.TEST"][0]
    try:
        paths = find_dataset(name)
        if paths.annotations.resolve() == annotations.resolve():
            return paths
    except UserError:
        pass
    # It is not below DETECTRON2_DATASETS, or another set of that name is; try the run's own path.
    recorded = (((run.record or {}).get("datasets") or {}).get(name) or {}).get("images")
    images = (
        Path(recorded)
        if isinstance(recorded, str)
        else annotations.parent.parent / annotations.stem.removeprefix("instances_")
    )
    if not images.is_dir():
        raise UserError(f"the images of {name} are not there; set DETECTRON2_DATASETS")
    return Dataset(name, images, annotations, benchmark=benchmark_of(name))


def _spread(filled: Sequence[int], count: int) -> list[int]:
    """Choose `count` entries, evenly spread, so that the choice depends on the data set only."""
    count = min(count, len(filled))
    return [filled[(2 * k + 1) * len(filled) // (2 * count)] for k in range(count)]
