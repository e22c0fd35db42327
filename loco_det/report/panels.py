"""The same images with the ground truth and with each backbone's detections, as small JPEGs for the page."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import msgspec

from loco_det.data.catalog import DatasetPaths, find_dataset
from loco_det.data.coco import CocoDataset, load_coco
from loco_det.data.images import read_image
from loco_det.errors import UserError
from loco_det.report.drawing import annotated_shapes, detected_shapes, draw_instances
from loco_det.report.runs import DetectorRun

WIDTH = 420  # pixels of one picture
QUALITY = 80


def panels(runs: list[DetectorRun], count: int, threshold: float, missing: list[str]) -> list[dict[str, Any]]:
    """Rows of pictures, one row an image: [{"image": file name, "pictures": {"ground truth" or backbone: data URI}}].

    Args:
        runs: of one experiment; each backbone's first run is shown.
        count: how many images, spread evenly over those that have objects.
        threshold: detections with lower scores are left out.
        missing: what there is not is added to it.
    """
    first: dict[str, DetectorRun] = {}
    for run in runs:
        first.setdefault(run.backbone, run)
    shown = {name: run for name, run in first.items() if run.results.is_file()}
    if not shown or not count:
        return []
    dataset = _dataset(next(iter(shown.values())), missing)
    if dataset is None:
        return []
    wanted = _spread(dataset, count)
    try:
        truth = {i: dataset[i] for i in wanted}
        found = {name: _results(run, {record.image_id for record in truth.values()}) for name, run in shown.items()}
        rows = []
        for record in truth.values():
            pixels = read_image(record.file_name, "RGB")
            pictures = {"ground truth": annotated_shapes(record)}
            for name, results in found.items():
                own = [r for r in results if r["image_id"] == record.image_id]
                pictures[name] = detected_shapes(own, dataset.category_ids, threshold)
            drawn = {n: _uri(draw_instances(pixels, s, dataset.class_names, WIDTH)) for n, s in pictures.items()}
            rows.append({"image": record.file_name.rpartition("/")[2], "pictures": drawn})
    except (UserError, msgspec.DecodeError, KeyError) as error:
        missing.append(f"pictures of detections: {error}")
        return []
    return rows


def _dataset(run: DetectorRun, missing: list[str]) -> CocoDataset | None:
    """The run's test set, with its images, if both are there."""
    annotations = run.annotations
    if annotations is None or annotations.suffix != ".json":
        missing.append("pictures of detections: the ground truth is not there; set DETECTRON2_DATASETS")
        return None
    name = run.config["DATASETS.TEST"][0]
    try:
        paths = find_dataset(name)
    except UserError:  # it may still lie where the run found it
        paths = DatasetPaths(name, annotations.parent.parent / annotations.stem.removeprefix("instances_"), annotations)
    try:
        return load_coco(paths)
    except UserError as error:
        missing.append(f"pictures of detections: {error}")
        return None


def _spread(dataset: CocoDataset, count: int) -> list[int]:
    """Positions of images with objects, evenly spread, so that the choice depends on nothing but the data set."""
    filled = sorted(set(dataset.objects()[0].tolist()))
    count = min(count, len(filled))
    return [filled[(2 * k + 1) * len(filled) // (2 * count)] for k in range(count)]


def _results(run: DetectorRun, image_ids: set[int]) -> list[dict[str, Any]]:
    return [r for r in msgspec.json.decode(run.results.read_bytes()) if r["image_id"] in image_ids]


def _uri(pixels: Any) -> str:
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
