"""Cityscapes' pixel-level scores: IoU of classes and categories, and its instance-weighted form.

Both implementations follow cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py. IoU is tp / (tp + fp + fn)
over all pixels that are not ignored; iIoU counts a pixel of an instance with the class's mean instance size over its
own, so that small objects weigh as much as large ones. Scores are means over classes, or over categories (_sup).

Shape legend: H x W an image; K = 19 classes.
"""

from __future__ import annotations

import functools
import math
import operator
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from loco_det.annotations.cityscapes import opened_map, read_instance_ids
from loco_det.annotations.pixels import CLASSES, IGNORED, LABEL_IDS, label_file, read_labels
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.log import Progress, log
from loco_det.evaluation.bootstrap import Counted, Resamplable
from loco_det.evaluation.cityscapes import OFFICIAL, official_module
from loco_det.evaluation.coco import EVALUATORS
from loco_det.evaluation.measure import Subject

# Source of both tables: helpers/labels.py and the evaluation itself; compared in a test.
CATEGORIES = {
    "flat": range(0, 2),
    "construction": range(2, 5),
    "object": range(5, 8),
    "nature": range(8, 10),
    "sky": range(10, 11),
    "human": range(11, 13),
    "vehicle": range(13, 19),
}
# Mean pixels per instance in the training set, by class.
INSTANCE_PIXELS = {
    11: 3462.4756337644, 12: 3930.4788056518, 13: 12794.0202738185, 14: 27855.1264367816, 15: 35732.1511111111,
    16: 67583.7075812274, 17: 6298.7200839748, 18: 4672.3249222261,
}  # fmt: skip
_CLASS_OF = np.full(256, IGNORED, np.uint8)  # by label id
_CLASS_OF[LABEL_IDS] = np.arange(len(CLASSES))


class Measure:
    """Cityscapes' scores of pixel labels; for the test split, whose ground truth is secret, a zip to submit."""

    evaluators = (EVALUATORS[0], OFFICIAL)

    def __init__(self, subject: Subject) -> None:
        self.dataset, self.evaluator = subject.dataset, subject.evaluator
        self.folder = subject.labels or subject.folder / "sem_seg"

    def collect(self, image_id: int, file_name: str, found: Tensor) -> list[str]:
        """Write the labels of (K, H, W) logits; returns the image's name."""
        write_prediction(self.folder, file_name, found.argmax(0).cpu().numpy())
        return [file_name]

    def write(self, results: list[str]) -> None:
        log.info("%s: labels of %d images written to %s", self.dataset.name, len(results), self.folder)

    def evaluate(self, results: list[str]) -> dict[str, dict[str, float]]:
        images = self._images()
        if self.dataset.secret:
            file = self.folder.parent / "cityscapes_submission.zip"
            write_submission(images, self.folder, file)
            log.info("%s: its truth is secret; %s can be submitted to cityscapes-dataset.com", self.dataset.name, file)
            return {}
        if self.evaluator == OFFICIAL:
            scores = _by_cityscapesscripts(images, self.folder)
        else:
            scores, self.confusions = _by_histograms(images, self.folder)
        numbers = _in_percent(scores)
        log.info("%s: %s", self.dataset.name, ", ".join(f"{k} {v:.3f}" for k, v in numbers["sem_seg"].items()))
        return numbers

    def resamplable(self, results: list[str]) -> list[Resamplable]:
        """Mean IoU; the labels are read when its first number is asked for, if `evaluate` has not read them then."""

        def measure(times: np.ndarray) -> list[float]:
            return [100 * float(mean_iou(np.einsum("ikl,i->kl", self.confusions, times)))]

        return [Counted("sem_seg", ("IoU",), len(self._images()), measure)]

    @cached_property
    def confusions(self) -> np.ndarray:
        """(images, K, K) int64, as `confusion_of`."""
        return np.stack([confusion_of(*read_pair(image, self.folder)) for image in self._images()])

    def _images(self) -> list[Path]:
        return [self.dataset.images / file for file in self.dataset.index.file_name.tolist()]


def prediction_file(folder: Path, image: str | Path) -> Path:
    """Return the path of an image's predicted labels; the benchmark's own pattern."""
    return folder / f"{Path(image).stem}_pred.png"


def write_prediction(folder: Path, image: str | Path, classes: np.ndarray) -> None:
    """Write (H, W) classes, 0 to 18, as a PNG of the benchmark's label ids."""
    write_labels(prediction_file(folder, image), LABEL_IDS[classes])


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write (H, W) uint8 or uint16 labels as PNG pixel values."""
    with atomic_write(path) as file:
        Image.fromarray(labels).save(file, format="PNG")


def labels_to_coco(labels: np.ndarray, image: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one result per category present: COCO's stuff format, with Detectron2's file_name.

    Args:
        labels: (H, W) category ids.
        image: with id and file_name.

    Returns:
        Dicts of image_id, file_name, category_id and segmentation, a compressed RLE whose counts are a str.
    """
    results = []
    for category in np.unique(labels).tolist():
        rle = coco_mask.encode(np.asfortranarray(labels == category, dtype=np.uint8))
        segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
        found = {"image_id": image["id"], "file_name": image["file_name"], "category_id": category}
        results.append({**found, "segmentation": segmentation})
    return results


def write_submission(images: Sequence[Path], folder: Path, path: Path) -> None:
    """Write a zip of the predictions for `images`, in the format of the benchmark's server."""
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:  # PNG does not compress
        for image in images:
            archive.write(prediction_file(folder, image), prediction_file(folder, image).name)


def evaluate_semantic(images: Sequence[Path], folder: Path, *, official: bool = False) -> dict[str, dict[str, float]]:
    """Score the files of `write_prediction` in `folder` for `images` in their original folders.

    Args:
        official: use cityscapesscripts, which needs labelIds.

    Returns:
        {"sem_seg": {"IoU", "iIoU", "IoU_sup", "iIoU_sup", "IoU-road", ...}} in percent; NaN for a class neither present
        nor predicted.

    Raises:
        UserError: invalid files, or cityscapesscripts is not installed.
    """
    return _in_percent(_by_cityscapesscripts(images, folder) if official else _by_histograms(images, folder)[0])


def _in_percent(scores: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"sem_seg": {name: 100 * value for name, value in scores.items()}}


# --- our own implementation -------------------------------------------------------------------------------------


def _by_histograms(images: Sequence[Path], folder: Path) -> tuple[dict[str, float], np.ndarray]:
    """The scores, and (images, K, K) int64, as `confusion_of`."""
    confusions = np.zeros((len(images), len(CLASSES), len(CLASSES)), np.int64)
    right = dict.fromkeys((*INSTANCE_PIXELS, "human", "vehicle"), 0.0)  # weighted pixels of instances
    wrong = dict(right)
    with Progress(len(images), "scores", unit="images") as progress:
        for confusion, image in zip(confusions, images):
            truth, predicted = read_pair(image, folder)
            confusion += confusion_of(truth, predicted)
            _add_instances(image, predicted, right, wrong)
            progress.advance()
    confusion = confusions.sum(0)
    one = [_score(confusion, range(k, k + 1)) for k in range(len(CLASSES))]
    weighted = [_weighted(confusion, range(k, k + 1), right[k], wrong[k]) for k in INSTANCE_PIXELS]
    groups = [_score(confusion, members) for members in CATEGORIES.values()]
    both = [_weighted(confusion, CATEGORIES[name], right[name], wrong[name]) for name in ("human", "vehicle")]
    scores = {"IoU": _mean(one), "iIoU": _mean(weighted), "IoU_sup": _mean(groups), "iIoU_sup": _mean(both)}
    return {**scores, **{f"IoU-{name}": value for name, value in zip(CLASSES, one)}}, confusions


def read_pair(image: Path, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of the ground truth, or IGNORED, and of the prediction, (H, W) uint8 each.

    Raises:
        UserError: invalid file.
    """
    path = prediction_file(folder, image)
    truth = read_labels(label_file(image))
    with opened_map(path, "evaluate again") as file:
        found = np.array(file)
    if found.shape != truth.shape or found.dtype != np.uint8 or (_CLASS_OF[found] == IGNORED).any():
        raise UserError(
            f"{path}: is {found.dtype} of shape {found.shape}, or has labels that are not evaluated; the truth is of "
            f"shape {truth.shape}."
        )
    return truth, _CLASS_OF[found]


def confusion_of(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return (K, K) int64: pixels by class in the ground truth (rows) and in the prediction (columns)."""
    counted = truth != IGNORED
    pairs = truth[counted].astype(np.int64) * len(CLASSES) + predicted[counted]
    return np.bincount(pairs, minlength=len(CLASSES) ** 2).reshape(len(CLASSES), len(CLASSES))


def mean_iou(confusions: np.ndarray) -> np.ndarray:
    """Return the mean IoU (a fraction) of each of (..., K, K) confusions, over classes present or predicted; (...)."""
    right = np.diagonal(confusions, axis1=-2, axis2=-1)
    total = confusions.sum(-1) + confusions.sum(-2) - right
    there = total > 0
    return np.divide(right, total, out=np.zeros(right.shape), where=there).sum(-1) / there.sum(-1)


def _add_instances(image: Path, predicted: np.ndarray, right: dict, wrong: dict) -> None:
    """Add the weighted pixels of every instance to its class and its category, in the official order."""
    name = label_file(image).name.rpartition("_")[0]
    ids = read_instance_ids(label_file(image).with_name(f"{name}_instanceIds.png")).ravel()
    sizes = np.bincount(ids)
    present = np.flatnonzero(sizes)
    present = present[present > 1000]
    row = np.full(len(sizes), -1)
    row[present] = np.arange(len(present))
    inside = row[ids] >= 0
    pairs = row[ids[inside]] * len(CLASSES) + predicted.ravel()[inside]
    found = np.bincount(pairs, minlength=len(present) * len(CLASSES)).reshape(-1, len(CLASSES))
    for instance, counts in zip(present.tolist(), found):
        k = int(_CLASS_OF[instance // 1000])
        if k not in INSTANCE_PIXELS:
            continue
        weight = INSTANCE_PIXELS[k] / float(sizes[instance])
        category = "human" if k in CATEGORIES["human"] else "vehicle"
        for key, hits in ((k, counts[k]), (category, counts[CATEGORIES[category]].sum())):
            right[key] += float(hits) * weight
            wrong[key] += float(sizes[instance] - hits) * weight


def _false_positives(confusion: np.ndarray, members: range) -> int:
    return int(confusion[:, members].sum() - confusion[np.ix_(members, members)].sum())


def _score(confusion: np.ndarray, members: range) -> float:
    right = int(confusion[np.ix_(members, members)].sum())
    total = int(confusion[members].sum()) + _false_positives(confusion, members)
    return right / total if total else math.nan


def _weighted(confusion: np.ndarray, members: range, right: float, wrong: float) -> float:
    total = right + _false_positives(confusion, members) + wrong
    return right / total if total else math.nan


def _mean(values: list[float]) -> float:
    valid = [value for value in values if not math.isnan(value)]
    # Added one by one as in the benchmark; from Python 3.12 on sum() compensates rounding.
    return functools.reduce(operator.add, valid) / len(valid) if valid else math.nan


# --- by the benchmark's own code --------------------------------------------------------------------------------


def _by_cityscapesscripts(images: Sequence[Path], folder: Path) -> dict[str, float]:
    module = official_module("evalPixelLevelSemanticLabeling")
    truth = [label_file(image) for image in images]
    for path in truth:
        if not path.name.endswith("_labelIds.png"):
            raise UserError(f"--evaluator {OFFICIAL} needs labelIds beside {path}; unpack gtFine_trainvaltest.zip.")
    settings = module.CArgs()
    vars(settings).update(vars(module.args))
    settings.quiet, settings.JSONOutput = True, False
    predictions = [str(prediction_file(folder, image)) for image in images]
    try:
        found = module.evaluateImgLists(predictions, [str(path) for path in truth], settings)
    except SystemExit as error:
        raise UserError(f"{OFFICIAL} refused the files in {folder}; its reason stands above") from error
    names = {"IoU": "Classes", "iIoU": "InstClasses", "IoU_sup": "Categories", "iIoU_sup": "InstCategories"}
    scores = {name: found[f"averageScore{official}"] for name, official in names.items()}
    return {**scores, **{f"IoU-{name}": found["classScores"][name] for name in CLASSES}}
