"""The interface of a measure on one data set. A module of this folder with a class `Measure` is one;
`loco_det.annotations.registry.measure_of` returns its name for a data set.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loco_det.annotations.registry import Dataset
from loco_det.core.errors import UserError
from loco_det.evaluation.bootstrap import Resamplable

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Subject:
    """The model and data set to measure, and the folder for files.

    Attributes:
        folder: folder for files.
        masks: the model predicts masks.
        boxes: the model predicts boxes; otherwise only masks are measured.
        category_ids: the data set's id of each of the model's classes; None for classes that it lacks.
        evaluator: one of the measure's `evaluators`.
        labels: of pixels, the folder that holds what was predicted; None for sem_seg below `folder`.
    """

    dataset: Dataset
    folder: Path
    masks: bool
    category_ids: tuple[int | None, ...]
    evaluator: str
    boxes: bool = True
    labels: Path | None = None


class Measure(Protocol):
    """Collects a model's predictions image by image, writes and evaluates them.

    Attributes:
        evaluators: values for --evaluator; the first is the default.
    """

    evaluators: tuple[str, ...]

    def __init__(self, subject: Subject) -> None: ...

    def collect(self, image_id: int, file_name: str, found: Any) -> list[Any]:
        """Convert one image's prediction `found` to records that can be sent between processes."""

    def write(self, results: list[Any]) -> None:
        """Write the records of all images to the folder; called on the main process only, like `evaluate`."""

    def evaluate(self, results: list[Any]) -> Results:
        """Return {task: {metric: percent}}; {} if the ground truth is secret."""

    def resamplable(self, results: list[Any]) -> list[Resamplable]:
        """The results matched with the truth, for the numbers of any draw of images; not where the truth is secret.

        To `evaluate` the same list afterwards takes no second matching.
        """


class MatchesOnce:
    """A measure that matches the results of `resamplable` once, and needs no second matching to `evaluate` them."""

    _kept: tuple[list[Any], Any] | None = None

    def match(self, results: list[Any]) -> Any:
        """The results matched with the truth: what the measure's numbers are made of."""
        raise NotImplementedError

    def matched(self, results: list[Any], *, keep: bool = False) -> Any:
        """What `match` gives for `results`, or gave for the same list when it was last to `keep` it."""
        if self._kept is not None and self._kept[0] is results:
            return self._kept[1]
        outcome = self.match(results)
        if keep:
            self._kept = results, outcome
        return outcome


def check_known_evaluator(measure: type[Measure], evaluator: str, name: str) -> None:
    """Check that the evaluator supports the measure of data set `name`.

    Raises:
        UserError: naming both.
    """
    default, *others = measure.evaluators
    if evaluator not in (default, *others):
        known = " or ".join((*others, "nothing"))
        raise UserError(f"--evaluator {evaluator} does not measure {name}; give {known}.")


def measure_class(name: str) -> type[Measure]:
    """Return the class `Measure` of `evaluation/NAME.py`."""
    return importlib.import_module(f"loco_det.evaluation.{name}").Measure
