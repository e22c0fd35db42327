"""COCO box and mask AP from predictions in COCO's result format, by hotcoco or by pycocotools.

Both evaluators give bitwise the same numbers; hotcoco is the default, pycocotools the one that papers quote. Input on
which they could differ is refused first (coco_checks.py).

Shape legend: N instances of one image, H x W its size in pixels; T = 10 IoU thresholds .50:.05:.95, R = 101 recall
levels, K categories in ascending order of their ids, A = 4 area ranges (all, small, medium, large).
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import hotcoco
import msgspec
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loco_det.annotations.index import CocoIndex
from loco_det.annotations.instances import Instances
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.log import FILE_ONLY, log
from loco_det.evaluation.bootstrap import Matched, Resamplable, in_every_draw
from loco_det.evaluation.coco_checks import Detections, GroundTruth, check_results, read_ground_truth
from loco_det.evaluation.measure import MatchesOnce, Subject

SHOWN_CATEGORIES = 20  # more go to log.txt alone
EVALUATORS = ("hotcoco", "pycocotools")
SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")
AREAS = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e10)}  # square pixels, both ends inclusive
_RESULT_BATCH = 10_000  # results encoded at once when writing

# --- evaluation -------------------------------------------------------------------------------------------------


def evaluate_coco(
    annotations: str | Path,
    results: list[dict[str, Any]],
    iou_types: Sequence[str] = ("bbox", "segm"),
    *,
    evaluator: str = "hotcoco",
    max_dets: int = 100,
) -> dict[str, dict[str, float]]:
    """Compute average precision in percent, under Detectron2's names.

    Args:
        annotations: ground truth in COCO format.
        results: COCO results, e.g. from `instances_to_coco`; not modified. An empty list gives AP 0.
        iou_types: "bbox" and/or "segm".
        evaluator: "hotcoco", or "pycocotools" for the reference; the numbers are the same.
        max_dets: detections that count per image and category, highest score first.

    Returns:
        {iou type: {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-<class>" ...}}; NaN without objects. With a single
        class there is no "AP-<class>", as in Detectron2. Sizes are by box area for "bbox" and by mask area for "segm"
        (detectron2/evaluation/coco_evaluation.py).

    Raises:
        UserError: as `read_ground_truth` and `check_results`, or an unknown evaluator.
    """
    if evaluator not in EVALUATORS:
        raise UserError(f"There is no evaluator '{evaluator}'; choose one of {', '.join(EVALUATORS)}.")
    if max_dets < 1:
        raise UserError(f"The number of detections per image is {max_dets}; it must be at least 1.")
    if not iou_types or not set(iou_types) <= {"bbox", "segm"}:
        raise ValueError(f"iou_types must be some of 'bbox', 'segm', not {iou_types!r}")
    truth = read_ground_truth(annotations, iou_types)
    return Outcomes(truth, check_results(results, truth, iou_types), iou_types, max_dets).numbers(evaluator)


@dataclass
class Outcomes:
    """Sound results beside their truth; hotcoco matches them once, when its numbers are first asked for."""

    truth: GroundTruth
    detections: Detections
    iou_types: Sequence[str]
    max_dets: int = 100

    @cached_property
    def evaluations(self) -> dict[str, hotcoco.COCOeval]:
        """As `hotcoco_evaluations`."""
        return hotcoco_evaluations(self.truth, self.detections, self.iou_types, self.max_dets)

    def precision(self, evaluator: str) -> dict[str, np.ndarray]:
        """{iou type: precision (T, R, K, A) float64, -1 where undefined}."""
        if evaluator == "pycocotools":
            return _pycocotools(self.truth, self.detections, self.iou_types, self.max_dets)
        return {iou_type: np.asarray(e.eval["precision"])[..., -1] for iou_type, e in self.evaluations.items()}

    def numbers(self, evaluator: str) -> dict[str, dict[str, float]]:
        """As `evaluate_coco`."""
        precision = self.precision(evaluator)
        return {iou_type: _summarise(values, self.truth.categories) for iou_type, values in precision.items()}

    def judged(self) -> list[Resamplable]:
        """What hotcoco draws images of, for each IoU type."""
        none = Detections(*(np.zeros(0, np.int64) for _ in range(2)), np.zeros(0), np.zeros((0, 4)), [])
        nothing = cache(partial(hotcoco_evaluations, self.truth, none, self.iou_types))
        names, images = usual_numbers(self.truth), len(self.truth.index.image_id)
        return [Matched(t, found, nothing, names, images) for t, found in self.evaluations.items()]


def hotcoco_evaluations(
    truth: GroundTruth, detections: Detections, iou_types: Sequence[str], max_dets: int = 100
) -> dict[str, hotcoco.COCOeval]:
    """Return {iou type: hotcoco's evaluation, evaluated and accumulated}, for more than AP.

    Raises:
        UserError: hotcoco cannot read the ground truth.
    """
    index, rows = truth.index, truth.rows
    try:
        gt = hotcoco.COCO.from_arrays(
            _images(index),
            _categories(truth),
            index.annotation_image[rows],
            index.annotation_category[rows],
            index.bbox[rows],
            ids=index.annotation_id[rows],
            area=index.area[rows],
            iscrowd=index.crowd[rows],
            segmentation=truth.masks,
        )
    except ValueError as error:
        raise UserError(f"hotcoco cannot take {truth.path} ({error}); try --evaluator pycocotools.") from error
    d = detections
    columns = np.column_stack([d.image_ids, d.boxes, d.scores, d.category_ids]).astype(np.float64)
    evaluations = {}
    for iou_type in iou_types:
        if iou_type == "bbox" or not len(columns):
            dt = gt.load_res(columns)
        else:
            dt = gt.load_res(columns, segmentation=d.masks)
            dt.update_anns(ids=np.arange(1, len(d.areas) + 1), area=d.areas)  # hotcoco used the box's
        evaluation = hotcoco.COCOeval(gt, dt, iou_type)
        evaluation.params.max_dets = [max_dets]  # sufficient for AP
        evaluation.evaluate()
        evaluation.accumulate()
        evaluations[iou_type] = evaluation
    return evaluations


def usual_numbers(truth: GroundTruth, groups: dict[str, list[int]] | None = None) -> tuple[str, ...]:
    """Those of `SUMMARY` and of `groups` that practically every draw of images has an object for.

    Args:
        groups: further numbers, each with the ids of the categories that it is a mean over.
    """
    index, rows = truth.index, truth.rows[~truth.index.crowd[truth.rows]]
    area, category, image = index.area[rows], index.annotation_category[rows], index.annotation_image[rows]
    chosen = dict.fromkeys(SUMMARY, np.ones(len(rows), bool))
    chosen |= {name: (area >= least) & (area <= most) for name, (least, most) in AREAS.items()}
    chosen |= {name: np.isin(category, ids) for name, ids in (groups or {}).items()}
    with_object = {name: len(np.unique(image[those])) for name, those in chosen.items()}
    return tuple(name for name, count in with_object.items() if in_every_draw(count, len(index.image_id)))


def _pycocotools(
    truth: GroundTruth, detections: Detections, iou_types: Sequence[str], max_dets: int
) -> dict[str, np.ndarray]:
    """As `Outcomes.precision`, in pycocotools' standard protocol."""
    precision = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
        gt = COCO()
        gt.dataset = {
            "images": _images(truth.index),
            "categories": _categories(truth),
            "annotations": _annotations(truth),
        }
        gt.createIndex()
        for iou_type in iou_types:
            evaluation = COCOeval(gt, _load_res(gt, detections, iou_type), iou_type)
            evaluation.params.maxDets = [*(n for n in (1, 10) if n < max_dets), max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
            precision[iou_type] = evaluation.eval["precision"][..., -1]
    return precision


def _images(index: CocoIndex) -> list[dict[str, Any]]:
    columns = zip(index.image_id.tolist(), index.height.tolist(), index.width.tolist())
    return [{"id": i, "height": h, "width": w} for i, h, w in columns]


def _categories(truth: GroundTruth) -> list[dict[str, Any]]:
    return [{"id": i, "name": name} for i, name in truth.categories]


def _annotations(truth: GroundTruth) -> list[dict[str, Any]]:
    """Number annotations from 1: for pycocotools id 0 means no match."""
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    index, rows = truth.index, truth.rows
    columns = (index.annotation_image, index.annotation_category, index.bbox, index.area, index.crowd.astype(int))
    masks = [None] * len(rows) if truth.masks is None else truth.masks
    values = zip(*(column[rows].tolist() for column in columns), masks)
    return [{"id": number, **dict(zip(keys, each))} for number, each in enumerate(values, 1)]


def _load_res(gt: COCO, d: Detections, iou_type: str) -> COCO:
    """Give each result its box or its mask, not both: pycocotools takes the size from a box if there is one."""
    if not len(d.scores):
        empty = COCO()  # loadRes requires a first result
        empty.dataset = {**gt.dataset, "annotations": []}
        empty.createIndex()
        return empty
    key, shapes = ("bbox", d.boxes.tolist()) if iou_type == "bbox" else ("segmentation", d.masks)
    columns = zip(d.image_ids.tolist(), d.category_ids.tolist(), d.scores.tolist(), shapes)
    return gt.loadRes([{"image_id": i, "category_id": c, "score": s, key: shape} for i, c, s, shape in columns])


def _summarise(precision: np.ndarray, categories: list[tuple[int, str]]) -> dict[str, float]:
    every, small, medium, large = np.moveaxis(precision, -1, 0)
    selections = {"AP": every, "AP50": every[0], "AP75": every[5], "APs": small, "APm": medium, "APl": large}
    if len(categories) > 1:
        names = [name for _, name in categories]
        for k, (category_id, name) in enumerate(categories):
            label = name if names.count(name) == 1 else f"{name} (id {category_id})"
            selections[f"AP-{label}"] = every[..., k]
    return {name: _percent(values) for name, values in selections.items()}


def _percent(precision: np.ndarray) -> float:
    defined = precision[precision > -1]  # 1-D: the summation order is independent of the memory layout
    return float(np.mean(defined) * 100) if defined.size else math.nan


class Measure(MatchesOnce):
    """COCO's AP of boxes, and of masks where the model has them; see `evaluation/measure.py`."""

    evaluators: tuple[str, ...] = EVALUATORS
    rules = ""  # name of the protocol in the log; default: the evaluator

    def __init__(self, subject: Subject) -> None:
        self.dataset, self.folder, self.evaluator = subject.dataset, subject.folder, subject.evaluator
        self.category_ids = subject.category_ids
        self.iou_types = ("bbox",) * subject.boxes + ("segm",) * subject.masks

    def collect(self, image_id: int, file_name: str, found: Instances) -> list[dict[str, Any]]:
        """Return COCO results, without those of classes that the data set lacks."""
        results = instances_to_coco(found, image_id, self.category_ids)
        return [result for result in results if result["category_id"] is not None]

    def write(self, results: list[dict[str, Any]]) -> None:
        file = write_results(self.folder.parent, results, self.folder.name)
        log.info("%s: %d detections written to %s", self.dataset.name, len(results), file)
        if not results:
            log.warning(
                "0 detections: no score reached MODEL.ROI_HEADS.SCORE_THRESH_TEST; mostly training was too short "
                "(SOLVER.MAX_ITER) or its rate too low (SOLVER.BASE_LR)"
            )

    def evaluate(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        numbers = self.numbers(results)
        protocol = self.rules or self.evaluator
        log.info("%s, by %s:\n%s", self.dataset.name, protocol, format_results(numbers))
        log_categories(numbers)
        return numbers

    def match(self, results: list[dict[str, Any]]) -> Any:
        truth = read_ground_truth(self.dataset.annotations, self.iou_types)
        return Outcomes(truth, check_results(results, truth, self.iou_types), self.iou_types)

    def numbers(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        return self.matched(results).numbers(self.evaluator)

    def resamplable(self, results: list[dict[str, Any]]) -> list[Resamplable]:
        return self.matched(results, keep=True).judged()


# --- predictions in, files and tables out -----------------------------------------------------------------------


def instances_to_coco(instances: Instances, image_id: int, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Convert detections of one image to COCO's result format.

    Args:
        instances: boxes (N, 4) XYXY in the original image, scores (N,), classes (N,) and optionally masks
            (N, H, W) bool; on any device.
        image_id: the image's id in the annotation file.
        category_ids: the dataset's category id of every class.

    Returns:
        N dicts of image_id, category_id, bbox [x, y, width, height], score and, with masks, segmentation as
        compressed RLE whose counts are a str, ready for JSON.
    """
    boxes = instances.boxes.cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(instances.classes.tolist(), boxes.tolist(), instances.scores.tolist())
    results = [
        {"image_id": image_id, "category_id": category_ids[c], "bbox": box, "score": score} for c, box, score in columns
    ]
    if instances.masks is not None:
        for result, mask in zip(results, instances.masks.cpu().numpy()):
            rle = hotcoco.mask.encode(mask)  # same bytes as pycocotools' encoder in a third of its time
            result["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
    return results


def write_results(output_dir: str | Path, results: list[dict[str, Any]], folder: str = "inference") -> Path:
    """Write OUTPUT_DIR/`folder`/coco_instances_results.json atomically; returns its path.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(output_dir) / folder / "coco_instances_results.json"
    with atomic_write(path) as file:
        file.write(b"[")
        for start in range(0, len(results), _RESULT_BATCH):
            batch = msgspec.json.encode(results[start : start + _RESULT_BATCH])
            file.write((b"," if start else b"") + batch[1:-1])
        file.write(b"]")
    return path


def format_results(results: dict[str, dict[str, float]]) -> str:
    """Format the numbers of `evaluate_coco` as text: a table without the categories for each IoU type."""
    tables = []
    for iou_type, numbers in results.items():
        summary = {name: value for name, value in numbers.items() if not name.startswith("AP-")}
        tables.append(f"{iou_type} AP:\n" + table([list(summary), [f"{v:.3f}" for v in summary.values()]]))
    return "\n\n".join(tables)


def format_categories(results: dict[str, dict[str, float]]) -> str:
    """Format the AP of each category as text: a table for each IoU type; empty for a single category."""
    tables = []
    for iou_type, numbers in results.items():
        cells = [
            cell for name, value in numbers.items() if name.startswith("AP-") for cell in (name[3:], f"{value:.3f}")
        ]
        if cells:
            columns = min(6, len(cells))
            cells += [""] * (-len(cells) % columns)
            rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
            tables.append(f"{iou_type} AP per category:\n" + table([["category", "AP"] * (columns // 2), *rows]))
    return "\n\n".join(tables)


def log_categories(results: dict[str, dict[str, float]]) -> None:
    """Log the AP of each category; of more than `SHOWN_CATEGORIES` the terminal is told only where it is."""
    count = max((sum(name.startswith("AP-") for name in numbers) for numbers in results.values()), default=0)
    if count > SHOWN_CATEGORIES:
        log.info("AP of each of %d categories: in log.txt and metrics.json of a run, in the --json of evaluate", count)
    if count:
        log.info("%s", format_categories(results), extra=FILE_ONLY if count > SHOWN_CATEGORIES else None)


def table(rows: list[list[str]]) -> str:
    """Format rows of cells as a Markdown table; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
