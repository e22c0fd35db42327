"""What is measured of a model on one data set. Each file of this folder that has a class `Measure` is one; its name is
what `loco_det.annotations.registry.measure_of` gives for a data set.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loco_det.annotations.registry import Dataset
from loco_det.core.errors import UserError
from loco_det.evaluation.bootstrap import Judged

Results = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Subject:
    """What is measured, and where its files go.

    Attributes:
        folder: for files.
        masks: the model has them.
        boxes: the model has them; without them masks alone are measured.
        category_ids: the data set's id of each of the model's classes; None for one that it does not have.
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
    """Collects what a model finds, image by image, writes it down and judges it.

    Attributes:
        evaluators: what --evaluator may name; the first is what stands there if nothing is said.
    """

    evaluators: tuple[str, ...]

    def __init__(self, subject: Subject) -> None: ...

    def collect(self, image_id: int, file_name: str, found: Any) -> list[Any]:
        """What is kept of one image, ready to travel between processes; `found` is what the engine's predict gave."""

    def write(self, results: list[Any]) -> None:
        """Write what all images gave into the folder; called on the main process alone, as is `evaluate`."""

    def evaluate(self, results: list[Any]) -> Results:
        """{task: {metric: percent}}; {} where the truth is secret."""

    def judge(self, results: list[Any]) -> list[Judged]:
        """The results matched with the truth, for the numbers of any draw of images; not where the truth is secret.

        To `evaluate` the same list afterwards takes no second matching.
        """


class MatchesOnce:
    """A measure that matches the results of `judge` once, and needs no second matching to `evaluate` them."""

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
    """Refuse an evaluator that does not know the measure of data set `name`.

    Raises:
        UserError: naming both.
    """
    default, *others = measure.evaluators
    if evaluator not in (default, *others):
        known = " or ".join((*others, "nothing"))
        raise UserError(f"--evaluator {evaluator} does not measure {name}; give {known}.")


def measure_class(name: str) -> type[Measure]:
    """The class `Measure` of `evaluation/NAME.py`."""
    return importlib.import_module(f"loco_det.evaluation.{name}").Measure
