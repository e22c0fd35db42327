"""Reads what the commands of a plan left behind: accuracies, AP, losses, compactness, each by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loco_det.core.errors import UserError
from loco_det.paper.plan import BACKBONE, DONE, PlannedRow, Step, commands_of
from loco_det.report.losses import UnitLoss, at_end, unit_losses
from loco_det.report.runs import PretrainRun, find_runs, last_scores
from loco_det.report.statistics import summarise

BySeed = dict[int, float]
_PROBES = {"linear.json": "linear", "knn.json": "kNN", "ridge.json": "ridge"}  # file of a probe -> column
_SCORES = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
_COMPACTNESS = {"silhouette": "silhouette", "within_over_between": "within / between"}


@dataclass(frozen=True)
class Result:
    """A row with our numbers: column -> seed -> value."""

    row: PlannedRow
    ours: dict[str, BySeed] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether every command of the row has been run."""
        return bool(self.row.chains) and all(chain.done for chain in self.row.chains)


def results(rows: Sequence[PlannedRow]) -> list[Result]:
    """Return the rows with the numbers that are there; a row that was not run has none."""
    found = []
    for row in rows:
        ours: dict[str, BySeed] = {}
        for chain in row.chains:
            for step in chain.steps:
                for column, value in _numbers(step).items():
                    ours.setdefault(column, {})[chain.seed] = value
        found.append(Result(row, ours))
    return found


def _numbers(step: Step) -> dict[str, float]:
    if not step.made.is_file():
        return {}
    if step.made.name == DONE:
        scores = last_scores(step.made.parent) or {}
        return {column: scores[key] for key, column in _SCORES.items() if scores.get(key) is not None}
    if step.made.name == "tsne.json":
        facts = _read(step)
        return {column: facts[key] for key, column in _COMPACTNESS.items()}
    if column := _PROBES.get(step.made.name):
        stages = _read(step)["stages"]
        column = "top-1" if "paper" in step.words else column
        return {column: stages[list(stages)[-1]]["top1"]}
    return {}


def _read(step: Step) -> dict[str, Any]:
    try:
        return json.loads(step.made.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{step.made}: is damaged ({error}); remove it and give the same command again") from error


def pretrained(rows: Sequence[PlannedRow]) -> list[Step]:
    """Return the finished pretrainings of a plan, each once."""
    return [step for step in commands_of(rows) if step.made.name == BACKBONE and step.made.is_file()]


def losses(rows: Sequence[PlannedRow]) -> tuple[list[UnitLoss], str, dict[str, dict[str, BySeed]]]:
    """Return every unit's curve of the first seed, the unit of x, and {row's label: {unit: {seed: `at_end`}}}."""
    ends: dict[str, dict[str, BySeed]] = {}
    shown: list[PretrainRun] = []
    for row in rows:
        for chain in row.chains:
            if not chain.done:
                continue
            (run,) = find_runs([f"{row.label}={chain.steps[0].made.parent}"]).pretrainings
            curves, _ = unit_losses([run], [])
            for curve in curves:
                ends.setdefault(row.label, {}).setdefault(curve.unit, {})[chain.seed] = at_end(curve.y)
            if run.backbone not in [one.backbone for one in shown]:
                shown.append(run)
    curves, x = unit_losses(shown, []) if shown else ([], "step")
    return curves, x, ends


def mean(values: BySeed) -> str:
    """Format the mean, and in brackets its 95 % interval where there are several seeds."""
    found = summarise(list(values.values()))
    if found["mean"] is None:
        return ""
    digits = 1 if abs(found["mean"]) >= 10 else 2
    if found["ci95"] is None:
        return f"{found['mean']:.{digits}f}"
    low, high = found["ci95"]
    return f"{found['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def to_paper(values: BySeed, paper: float | None) -> str:
    """Format ours minus the paper's, with a star if the 95 % interval of ours leaves the paper's out."""
    found = summarise(list(values.values()))
    if found["mean"] is None or paper is None:
        return ""
    outside = found["ci95"] is not None and not found["ci95"][0] <= paper <= found["ci95"][1]
    return f"{found['mean'] - paper:+.{1 if abs(paper) >= 10 else 2}f}{' *' if outside else ''}"


def to_first(values: BySeed, first: BySeed) -> str:
    """Format the difference to another row, seed by seed, with a star if its 95 % interval leaves zero out."""
    common = sorted(set(values) & set(first))
    found = summarise([values[seed] - first[seed] for seed in common])
    if found["mean"] is None or not math.isfinite(found["mean"]):
        return ""
    if found["ci95"] is None:
        return f"{found['mean']:+.1f}"
    low, high = found["ci95"]
    return f"{found['mean']:+.1f} [{low:+.1f}, {high:+.1f}]{'' if low <= 0 <= high else ' *'}"
