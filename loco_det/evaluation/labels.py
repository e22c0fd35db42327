"""Scores of pixel labels of one's own: intersection over union, and accuracy, over all pixels that are not ignored.

IoU of a class is tp / (tp + fp + fn) over the pixels of all images, as in Pascal VOC; its accuracy is tp / (tp + fn).
Means are over the classes that are there or predicted (IoU), or there (accuracy). Cityscapes by name has the measure of
its benchmark, `pixels.py`.

Shape legend: H x W an image; I images; K the classes of the data set.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from loco_det.annotations.cityscapes import opened_map
from loco_det.annotations.pixels import IGNORED
from loco_det.annotations.registry import Dataset
from loco_det.core.errors import UserError
from loco_det.core.log import Progress, log
from loco_det.evaluation.bootstrap import Counted, Resamplable
from loco_det.evaluation.coco import EVALUATORS
from loco_det.evaluation.measure import Subject
from loco_det.evaluation.pixels import write_labels


class Measure:
    """IoU and accuracy. Predictions are PNG files of the data set's values; 255 is a class that it does not have."""

    evaluators = (EVALUATORS[0],)

    def __init__(self, subject: Subject) -> None:
        self.dataset, self.folder = subject.dataset, subject.labels or subject.folder / "sem_seg"
        self.values = np.array([IGNORED if k is None else k for k in subject.category_ids], np.uint8)

    def collect(self, image_id: int, file_name: str, found: Tensor) -> list[str]:
        """Writes the labels of logits, one for each of the model's classes, (.., H, W); gives the image's name."""
        labels = self.values[found.argmax(0).cpu().numpy()]
        write_labels(prediction_file(self.dataset, file_name, self.folder), labels)
        return [file_name]

    def write(self, results: list[str]) -> None:
        log.info("%s: labels of %d images written to %s", self.dataset.name, len(results), self.folder)

    def evaluate(self, results: list[str]) -> dict[str, dict[str, float]]:
        numbers = scores(self.confusions.sum(0), self.dataset.index.category_names)
        log.info("%s: %s", self.dataset.name, ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
        return {"sem_seg": numbers}

    def resamplable(self, results: list[str]) -> list[Resamplable]:
        names = self.dataset.index.category_names

        def measure(times: np.ndarray) -> list[float]:
            return [scores(np.einsum("ikl,i->kl", self.confusions, times), names)["IoU"]]

        return [Counted("sem_seg", ("IoU",), len(self.dataset.index.image_id), measure)]

    @cached_property
    def confusions(self) -> np.ndarray:
        """What `confusions` counts; the predictions are read once."""
        return confusions(self.dataset, self.folder)


def prediction_file(dataset: Dataset, image: str | Path, folder: Path) -> Path:
    """Where the labels that were predicted for an image are: in `folder` as the image in the data set's."""
    return (folder / Path(image).relative_to(dataset.images)).with_suffix("").with_name(f"{Path(image).stem}_pred.png")


def read_pair(dataset: Dataset, row: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes of the truth, or IGNORED, and of the prediction, or IGNORED for none, (H, W) of image `row` of the index.

    Raises:
        UserError: one of the files cannot be used.
    """
    index = dataset.index
    image = dataset.images / index.file_name[row]
    truth = dataset.labels.read(image, (int(index.height[row]), int(index.width[row])))
    path = prediction_file(dataset, image, folder)
    with opened_map(path, "evaluate again") as file:
        found = np.array(file)
    classes = dataset.labels.classes_of(found) if found.dtype.kind in "bui" else np.full(1, -1)
    if found.shape != truth.shape or (classes < 0).any():
        raise UserError(
            f"{path}: is {found.dtype} of shape {found.shape}, or has values that are no classes of {dataset.name}; "
            f"the truth is of shape {truth.shape}."
        )
    return truth, classes


def confusions(dataset: Dataset, folder: Path) -> np.ndarray:
    """(I, K, K + 1) int64: pixels of each class in the truth, a row, predicted as each class, or as none of them.

    Raises:
        UserError: a file cannot be used.
    """
    count = len(dataset.index.category_id)
    found = np.zeros((len(dataset.index.image_id), count, count + 1), np.int64)
    with Progress(len(found), "scores", unit="images") as progress:
        for row, counts in enumerate(found):
            truth, predicted = read_pair(dataset, row, folder)
            counted = truth != IGNORED
            columns = np.minimum(predicted[counted].astype(np.int64), count)
            pairs = truth[counted].astype(np.int64) * (count + 1) + columns
            counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
            progress.advance()
    return found


def scores(confusion: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """The numbers of `scores_of_counts` of a (K, K + 1) confusion."""
    return scores_of_counts(confusion.diagonal(), confusion.sum(1), confusion[:, :-1].sum(0), names)


def scores_of_counts(
    right: np.ndarray, there: np.ndarray, claimed: np.ndarray, names: tuple[str, ...]
) -> dict[str, float]:
    """{"IoU", "fwIoU", "mACC", "pACC", "IoU-NAME", ...} in percent; NaN for a class neither there nor predicted.

    Args:
        right, there, claimed: (K,) pixels that are rightly predicted as each class, that are of it, and that are
            predicted as it.
    """
    right = right.astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = 100 * right / (there + claimed - right)
        accuracy = 100 * right / there
        weighted = float(np.nansum(each * there) / there.sum())
        overall = float(100 * right.sum() / there.sum())
    numbers = {"IoU": _mean(each), "fwIoU": weighted, "mACC": _mean(accuracy), "pACC": overall}
    return {**numbers, **{f"IoU-{name}": float(value) for name, value in zip(names, each)}}


def _mean(values: np.ndarray) -> float:
    valid = values[~np.isnan(values)]
    return float(valid.mean()) if len(valid) else float("nan")
