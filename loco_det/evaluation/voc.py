"""Pascal VOC box AP, with the 11 points of VOC 2007 or the area under the curve of later years.

Equals Detectron2's PascalVOCDetectionEvaluator (evaluation/pascal_voc_evaluation.py), which follows the official
development kit: pixels count from 1 and both ends are inside a box, scores are rounded to three digits and coordinates
to one, difficult objects neither count nor are missed.

Shape legend: N detections and G objects of one class, T = 10 IoU thresholds .50:.05:.95.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loco_det.evaluation import coco
from loco_det.evaluation.bootstrap import Counted, Resamplable
from loco_det.evaluation.coco_checks import Detections, GroundTruth, check_results, read_ground_truth

THRESHOLDS = tuple(percent / 100.0 for percent in range(50, 100, 5))


class Measure(coco.Measure):
    """VOC's AP of boxes, by the rules of the data set's year."""

    evaluators = (coco.EVALUATORS[0],)

    @property
    def rules(self) -> str:
        return f"the rules of VOC {2007 if self._is_2007() else 2012}"

    def match(self, results: list[dict[str, Any]]) -> Outcomes:
        return voc_outcomes(self.dataset.annotations, results, eleven_points=self._is_2007())

    def numbers(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        outcomes = self.matched(results)
        return {"bbox": outcomes.numbers(np.ones(outcomes.images, np.int64))}

    def resamplable(self, results: list[dict[str, Any]]) -> list[Resamplable]:
        outcomes = self.matched(results, keep=True)
        names = ("AP", "AP50", "AP75")

        def measure(times: np.ndarray) -> list[float]:
            numbers = outcomes.numbers(times)
            return [numbers[name] for name in names]

        return [Counted("bbox", names, outcomes.images, measure)]

    def _is_2007(self) -> bool:
        return self.dataset.name.startswith("voc_2007")


def evaluate_voc(
    annotations: str | Path, results: list[dict[str, Any]], *, eleven_points: bool
) -> dict[str, dict[str, float]]:
    """Compute average precision in percent.

    Args:
        annotations: ground truth in COCO format with a key "difficult", as `data.voc` writes it.
        results: COCO results with "bbox"; not modified.
        eleven_points: the mean of the best precision at recalls 0, .1, ..., 1, as in VOC 2007; else the area under
            the curve.

    Returns:
        {"bbox": {"AP", "AP50", "AP75", "AP-<class>" ...}}; "AP" and "AP-<class>" are means over the thresholds. A
        class without counted objects is NaN and excluded from the means.

    Raises:
        UserError: as `read_ground_truth` and `check_results`.
    """
    outcomes = voc_outcomes(annotations, results, eleven_points=eleven_points)
    return {"bbox": outcomes.numbers(np.ones(outcomes.images, np.int64))}


def voc_outcomes(annotations: str | Path, results: list[dict[str, Any]], *, eleven_points: bool) -> Outcomes:
    """Match once for AP of any weighting of images; arguments and errors as for `evaluate_voc`."""
    truth = read_ground_truth(annotations, ("bbox",))
    detections = check_results(results, truth, ("bbox",))
    classes = {name: _class(truth, detections, category_id) for category_id, name in truth.categories}
    return Outcomes(classes, len(truth.index.image_id), eleven_points)


@dataclass(frozen=True)
class _Class:
    """The detections of one class, best score first, and its objects.

    Attributes:
        image: (N,) index of each detection's image.
        right, wrong: (T, N) bool, at each threshold; neither for a difficult object.
        object_image: (G,) of the counted objects.
    """

    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    object_image: np.ndarray


@dataclass(frozen=True)
class Outcomes:
    """Matches of every detection, for AP of any weighting of images without matching again.

    Attributes:
        images: number of images.
        eleven_points: as for `evaluate_voc`.
    """

    classes: dict[str, _Class]
    images: int
    eleven_points: bool

    def numbers(self, times: np.ndarray) -> dict[str, float]:
        """Return {"AP", "AP50", "AP75", "AP-<class>" ...} in percent for (images,) weights of the images."""
        by_class = {name: np.array(self._class_ap(each, times)) * 100 for name, each in self.classes.items()}
        known = [values for values in by_class.values() if not np.isnan(values).any()] or [np.full(10, np.nan)]
        means = np.stack(known).mean(0)
        numbers = {"AP": means.mean(), "AP50": means[0], "AP75": means[5]}
        numbers |= {f"AP-{name}": values.mean() for name, values in by_class.items()}
        return {name: float(value) for name, value in numbers.items()}

    def _class_ap(self, found: _Class, times: np.ndarray) -> list[float]:
        """Return the AP of one class at every threshold."""
        count = int(times[found.object_image].sum())
        if not count:
            return [math.nan] * len(THRESHOLDS)
        weights = times[found.image].astype(float)
        both = ((right * weights, wrong * weights) for right, wrong in zip(found.right, found.wrong))
        return [_average_precision(right, wrong, count, self.eleven_points) for right, wrong in both]


def _class(truth: GroundTruth, found: Detections, category_id: int) -> _Class:
    index = truth.index
    rows = truth.rows[index.annotation_category[truth.rows] == category_id]
    difficult = index.difficult[rows]
    chosen = np.flatnonzero(found.category_ids == category_id)
    scores = np.array([float(f"{score:.3f}") for score in found.scores[chosen].tolist()])
    # Rounded scores often tie, and NumPy decides the order of ties: the same call as Detectron2's.
    chosen = chosen[np.argsort(-scores)]
    best, overlap = _best_objects(_inclusive(index.bbox[rows]), index.annotation_image[rows], found, chosen)
    outcomes = [_outcomes(best, overlap > threshold, difficult) for threshold in THRESHOLDS]
    right, wrong = (np.stack(each) for each in zip(*outcomes))
    image = np.searchsorted(index.image_id, found.image_ids[chosen])
    object_image = np.searchsorted(index.image_id, index.annotation_image[rows[~difficult]])
    return _Class(image, right, wrong, object_image)


def _inclusive(bbox: np.ndarray) -> np.ndarray:
    """Convert XYWH from 0 to the corner pixels, counted from 1."""
    return np.concatenate([bbox[:, :2] + 1, bbox[:, :2] + bbox[:, 2:]], 1)


def _best_objects(
    objects: np.ndarray, images: np.ndarray, found: Detections, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return each chosen detection's object (row) of highest IoU and that IoU: (N,) int64, (N,) float64; 0 and -inf if
    its image has no object.
    """
    best, overlap = np.zeros(len(chosen), dtype=np.int64), np.full(len(chosen), -np.inf)
    boxes = _inclusive(found.boxes[chosen].astype(np.float32)).astype(np.float64)
    boxes = np.array([float(f"{v:.1f}") for v in boxes.ravel().tolist()]).reshape(-1, 4)
    order = np.argsort(found.image_ids[chosen], kind="stable")
    ids = found.image_ids[chosen][order]
    for image in np.unique(images):
        own = order[np.searchsorted(ids, image) : np.searchsorted(ids, image, side="right")]
        rows = np.flatnonzero(images == image)
        if len(own):
            iou = _iou(boxes[own], objects[rows])
            best[own], overlap[own] = rows[iou.argmax(1)], iou.max(1)
    return best, overlap


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (N, G) IoU of boxes (N, 4) and (G, 4) with both ends inside."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2]) + 1.0
    inter = sides.clip(0).prod(2)
    area_a, area_b = ((c[:, 2:] - c[:, :2] + 1.0).prod(1) for c in (a, b))
    return inter / (area_a[:, None] + area_b[None] - inter)


def _outcomes(best: np.ndarray, hits: np.ndarray, difficult: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections, best score first, are right and which wrong; `hits` overlap their object `best` enough.

    The first on an object is right, every further one wrong; one on a difficult object is neither.
    """
    if not len(difficult):
        return np.zeros(len(best), dtype=bool), np.ones(len(best), dtype=bool)
    right = np.zeros(len(best), dtype=bool)
    counting = np.flatnonzero(hits & ~difficult[best])
    right[counting[np.unique(best[counting], return_index=True)[1]]] = True
    return right, ~right & ~(hits & difficult[best])


def _average_precision(right: np.ndarray, wrong: np.ndarray, count: int, eleven_points: bool) -> float:
    """Return AP of detections, best score first, with weights `right` and `wrong`, for `count` objects."""
    tp, fp = np.cumsum(right), np.cumsum(wrong)
    recall, precision = tp / count, tp / np.maximum(tp + fp, np.finfo(np.float64).eps)
    if eleven_points:
        return sum(precision[recall >= t].max(initial=0.0) / 11.0 for t in np.arange(0.0, 1.1, 0.1))
    recall = np.concatenate([[0.0], recall, [1.0]])
    envelope = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    steps = np.flatnonzero(np.diff(recall))
    return float(((recall[steps + 1] - recall[steps]) * envelope[steps + 1]).sum())
