"""LVIS AP: each image counts only for the classes annotated in it as present or absent, with means by frequency.

Computed by hotcoco, which on the tests' made-up sets equals the benchmark's own code (lvis-api 0.5.3) bitwise, in its
protocol: 300 detections an image over all classes. Source of the names:
detectron2/evaluation/lvis_evaluation.py.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import hotcoco

from loco_det.core.errors import UserError
from loco_det.evaluation import coco
from loco_det.evaluation.bootstrap import Matched, Resamplable
from loco_det.evaluation.coco_checks import GroundTruth, check_results, read_ground_truth

MAX_DETECTIONS = 300  # per image, over all classes
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
_SHAPE = {"bbox": "bbox", "segm": "segmentation"}


class Measure(coco.Measure):
    """LVIS's AP of boxes, and of masks if the model has them."""

    evaluators = (coco.EVALUATORS[0],)
    rules = "the rules of LVIS"

    def match(self, results: list[dict[str, Any]]) -> Outcomes:
        return lvis_outcomes(self.dataset.annotations, results, self.iou_types)

    def numbers(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        return self.matched(results).numbers()


def evaluate_lvis(
    annotations: str | Path, results: list[dict[str, Any]], iou_types: Sequence[str] = ("bbox", "segm")
) -> dict[str, dict[str, float]]:
    """Compute average precision in percent.

    Args:
        annotations: an LVIS annotation file, whose images list their annotated classes.
        results: COCO results; not modified.
        iou_types: "bbox" and/or "segm".

    Returns:
        {iou type: {"AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"}}: the last three over rare, common
        and frequent classes. Sizes are by box area for "bbox" and by mask area for "segm". NaN without objects.

    Raises:
        UserError: as `read_ground_truth` and `check_results`, or the file is not LVIS's.
    """
    return lvis_outcomes(annotations, results, iou_types).numbers()


@dataclass
class Outcomes:
    """Validated results with the annotation file, as checked and as hotcoco's, and the evaluated IoU types."""

    checked: GroundTruth
    truth: hotcoco.COCO
    results: list[dict[str, Any]]
    iou_types: Sequence[str]
    evaluations: dict[str, hotcoco.COCOeval] = field(default_factory=dict)

    def numbers(self) -> dict[str, dict[str, float]]:
        """Compute as `evaluate_lvis`; evaluations that are not resampled are in memory one at a time."""
        return {iou_type: _numbers(self._evaluation(iou_type)) for iou_type in self.iou_types}

    def _evaluation(self, iou_type: str) -> hotcoco.COCOeval:
        return self.evaluations.get(iou_type) or _evaluation(self.truth, self.results, iou_type)

    def judged(self) -> list[Resamplable]:
        """What hotcoco draws images of, for each IoU type."""
        self.evaluations = self.evaluations or _evaluations(self.truth, self.results, self.iou_types)
        nothing = cache(partial(_evaluations, self.truth, [], self.iou_types))
        names, images = _usual_numbers(self.checked, self.truth), len(self.checked.index.image_id)
        return [Matched(t, found, nothing, names, images) for t, found in self.evaluations.items()]


def lvis_outcomes(annotations: str | Path, results: list[dict[str, Any]], iou_types: Sequence[str]) -> Outcomes:
    """What `evaluate_lvis` makes its numbers of; takes and raises the same."""
    checked = read_ground_truth(annotations, iou_types)
    check_results(results, checked, iou_types)
    try:
        truth = hotcoco.LVIS(str(checked.index.readable))
    except (ValueError, OSError) as error:
        raise UserError(f"{annotations} is no LVIS annotation file ({error}); take an intact copy.") from error
    if not any(image.get("neg_category_ids") for image in truth.load_imgs(truth.get_img_ids())):
        raise UserError(f"{annotations} has no image with neg_category_ids, so it is not LVIS's; take an intact copy.")
    return Outcomes(checked, truth, results, iou_types)


def _evaluations(
    truth: hotcoco.COCO, results: list[dict[str, Any]], iou_types: Sequence[str]
) -> dict[str, hotcoco.COCOeval]:
    return {iou_type: _evaluation(truth, results, iou_type) for iou_type in iou_types}


def _evaluation(truth: hotcoco.COCO, results: list[dict[str, Any]], iou_type: str) -> hotcoco.COCOeval:
    keys = ("image_id", "category_id", "score", _SHAPE[iou_type])  # with a box a mask's size would be the box's
    found = hotcoco.LVISResults(truth, [{key: r[key] for key in keys} for r in results], max_dets=MAX_DETECTIONS)
    evaluation = hotcoco.LVISEval(truth, found, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its table
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _numbers(evaluation: hotcoco.COCOeval) -> dict[str, float]:
    numbers = evaluation.get_results()
    return {name: 100 * numbers[name] if numbers[name] > -1 else float("nan") for name in NUMBERS}


def _usual_numbers(checked: GroundTruth, truth: hotcoco.COCO) -> tuple[str, ...]:
    """Those of `NUMBERS` that practically every draw of images has an object for."""
    groups: dict[str, list[int]] = {name: [] for name in NUMBERS[-3:]}
    for category in truth.load_cats(truth.get_cat_ids()):
        groups.get(f"AP{category.get('frequency')}", []).append(category["id"])
    return coco.usual_numbers(checked, groups)
