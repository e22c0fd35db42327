"""LVIS AP: each image counts only for the classes annotated in it as present or absent, with means by frequency.

Computed by hotcoco, which on the tests' made-up sets equals the benchmark's own code (lvis-api 0.5.3) bitwise, in its
protocol: 300 detections an image over all classes. Source of the names:
detectron2/evaluation/lvis_evaluation.py.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hotcoco

from loco_det.core.errors import UserError
from loco_det.evaluation import coco
from loco_det.evaluation.bootstrap import Matched, Resamplable, in_every_draw
from loco_det.evaluation.coco_checks import check_results, read_ground_truth

MAX_DETECTIONS = 300  # per image, over all classes
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
_SHAPE = {"bbox": "bbox", "segm": "segmentation"}


class Measure(coco.Measure):
    """LVIS's AP of boxes, and of masks if the model has them."""

    evaluators = (coco.EVALUATORS[0],)
    rules = "the rules of LVIS"

    def numbers(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        return evaluate_lvis(self.dataset.annotations, results, self.iou_types)

    def resamplable(self, results: list[dict[str, Any]]) -> list[Resamplable]:
        truth = _read_truth(self.dataset.annotations, results, self.iou_types)
        images = len(truth.get_img_ids())
        matched = []
        for iou_type in self.iou_types:
            found, nothing = (_evaluation(truth, each, iou_type) for each in (results, []))
            matched.append(Matched(iou_type, found, nothing, _usual_numbers(truth), images))
        return matched


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
    truth = _read_truth(annotations, results, iou_types)
    return {iou_type: _numbers(_evaluation(truth, results, iou_type)) for iou_type in iou_types}


def _read_truth(annotations: str | Path, results: list[dict[str, Any]], iou_types: Sequence[str]) -> hotcoco.COCO:
    """Load the annotation file, after validating it and the results."""
    checked = read_ground_truth(annotations, iou_types)
    check_results(results, checked, iou_types)
    try:
        truth = hotcoco.LVIS(str(checked.index.readable))
    except (ValueError, OSError) as error:
        raise UserError(f"{annotations} is no LVIS annotation file ({error}); take an intact copy.") from error
    if not any(image.get("neg_category_ids") for image in truth.load_imgs(truth.get_img_ids())):
        raise UserError(f"{annotations} has no image with neg_category_ids, so it is not LVIS's; take an intact copy.")
    return truth


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


def _usual_numbers(truth: hotcoco.COCO) -> tuple[str, ...]:
    """Return the numbers of `NUMBERS` that are defined in practically every draw of images."""
    frequency = {category["id"]: category.get("frequency") for category in truth.load_cats(truth.get_cat_ids())}
    images: dict[str, set[int]] = {name: set() for name in NUMBERS}
    for each in truth.load_anns(truth.get_ann_ids()):
        sizes = [name for name, (least, most) in coco.AREAS.items() if least <= each["area"] <= most]
        for name in (*NUMBERS[:3], *sizes, f"AP{frequency[each['category_id']]}"):
            images.get(name, set()).add(each["image_id"])
    return tuple(name for name in NUMBERS if in_every_draw(len(images[name]), len(truth.get_img_ids())))
