"""The losses of several pretraining runs in one chart, as in the paper's appendix: a line for each unit.

A run's units share a hue, from light (lowest) to dark (uppermost), and are labelled with the stage in which they end,
"loco res3". A run with a single unit over the whole backbone, end to end, is dashed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loco_det.report.runs import PretrainRun

SIZE = (7.2, 4.2)  # inches
_NAME = r"[A-Za-z_]\w*(?:\.\d+(?:-\d+)?)?"  # res3, res3.1, res3.0-1
_UNIT = re.compile(rf"loss/{_NAME}-(?P<stage>[A-Za-z_]\w*)(?:\.(?:\d+-)?(?P<block>\d+))?")
_WHITE, _BLACK = 0.6, 0.35  # share of white and black in the colours of the lowest and the uppermost unit
_POINTS = 400  # maximum points drawn of a line
_SMOOTHED = 50  # a point is the mean over about one part in 50 of the run
_BEGINNING = 0.05  # share of a run, with its steep losses, that the axis need not fit
_IN_A_COLUMN = 18  # entries per column of the legend


@dataclass(frozen=True)
class UnitLoss:
    """One unit's loss in one run.

    Attributes:
        backbone: the run's name.
        unit: the stage in which the unit ends, "res3", or the block, "res3.1".
        x, y: (n,) float64, steps or epochs, and the smoothed loss.
        shade: from 0 for the run's lowest unit to 1 for its uppermost.
        alone: the run has no other unit.
    """

    backbone: str
    unit: str
    x: np.ndarray
    y: np.ndarray
    shade: float
    alone: bool


def unit_losses(runs: Sequence[PretrainRun], missing: list[str]) -> tuple[list[UnitLoss], str]:
    """Return every unit with at least two losses of every run, lowest first, and the unit of x: "epoch" or "step".

    x is epochs if every run has left a backbone, which records the images per epoch.

    Args:
        missing: runs without such a unit are added, except those that train nothing.
    """
    shown = [(run, losses) for run in runs if (losses := _losses(run))]
    drawn = {run.path for run, _ in shown}
    missing += [
        f"{run.path}: {run.backbone}: fewer than two losses in metrics.json, so no curve"
        for run in runs
        if run.path not in drawn and run.config["METHOD"] != "random"
    ]
    in_epochs = all(run.steps_per_epoch for run, _ in shown)
    found = []
    for run, losses in shown:
        scale = run.steps_per_epoch if in_epochs else 1
        for place, (unit, points) in enumerate(losses.items()):
            x, y = np.array(points, dtype=np.float64).T
            shade = place / (len(losses) - 1) if len(losses) > 1 else 1.0
            found.append(UnitLoss(run.backbone, unit, x / scale, smoothed(y), shade, len(losses) == 1))
    return found, "epoch" if in_epochs else "step"


def _losses(run: PretrainRun) -> dict[str, list[tuple[int, float]]]:
    """Map unit -> (step, loss) of each line of metrics.json with losses, lowest unit first."""
    keys = {
        key: match for key in dict.fromkeys(k for line in run.metrics for k in line) if (match := _UNIT.fullmatch(key))
    }
    ends = {key: m["stage"] + (f".{m['block']}" if m["block"] else "") for key, m in keys.items()}
    again = Counter(ends.values())
    found = {}
    for key in sorted(keys, key=lambda key: _height(keys[key])):
        pairs = [(line.get("iteration"), line.get(key)) for line in run.metrics]
        points = [pair for pair in pairs if all(isinstance(value, (int, float)) for value in pair)]  # NaN is null
        if len(points) > 1:
            found[ends[key] if again[ends[key]] == 1 else key.removeprefix("loss/")] = points
    return found


def _height(unit: re.Match[str]) -> tuple[int, float]:
    number = re.search(r"\d+", unit["stage"])  # the stem has no number
    return int(number[0]) if number else -1, float(unit["block"] or "inf")


def at_end(losses: Sequence[float] | np.ndarray) -> float:
    """Return the loss at the end of a run: the mean over its last twentieth, since one batch's varies too much."""
    return float(np.mean(losses[-max(1, len(losses) // 20) :]))


def smoothed(y: np.ndarray) -> np.ndarray:
    """Smooth (n,) -> (n,) by the mean over a hundredth of all values on either side, or as many as there are."""
    places, reach = np.arange(len(y)), len(y) // (2 * _SMOOTHED)
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(y))
    sums = np.concatenate([[0.0], y.cumsum()])
    return (sums[end] - sums[first]) / (end - first)


def shade_of(colour: str, shade: float) -> tuple[float, ...]:
    """Return a unit's RGB in [0, 1]: `colour` itself halfway, lighter below, darker above."""
    other, most = (1.0, _WHITE) if shade < 0.5 else (0.0, _BLACK)
    share = most * abs(2 * shade - 1)
    return tuple(float((1 - share) * part + share * other) for part in matplotlib.colors.to_rgb(colour))


def draw_losses(axes: Axes, curves: Sequence[UnitLoss], x: str, colours: dict[str, str]) -> None:
    """Draw all curves on one pair of axes, with their legend beside it.

    Args:
        curves: at least one.
        x: the unit of x.
        colours: colour of each backbone.
    """
    named: set[str] = set()
    for curve in curves:
        label = f"{curve.backbone} {curve.unit}"
        every = max(1, len(curve.x) // _POINTS)
        axes.plot(
            *(values[::every] for values in (curve.x, curve.y)),
            color=shade_of(colours[curve.backbone], curve.shade),
            linestyle="--" if curve.alone else "-",
            linewidth=1.8 if curve.alone else 1.4,
            zorder=3 if curve.alone else 2,  # a dashed line above another shows both
            label=None if label in named else label,  # another seed of the same unit
        )
        named.add(label)
    title = "loss of each unit" + (", dashed: end to end" if any(curve.alone for curve in curves) else "")
    axes.set(xlabel=x, ylabel="NT-Xent", title=title)
    axes.set_ylim(*_limits(curves))
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=-(-len(named) // _IN_A_COLUMN), frameon=False, fontsize=8
    )


def _limits(curves: Sequence[UnitLoss]) -> tuple[float, float]:
    late = [curve.y[int(_BEGINNING * len(curve.y)) :] for curve in curves]
    low, high = min(y.min() for y in late), max(y.max() for y in late)
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def losses_figure(curves: Sequence[UnitLoss], x: str, colours: dict[str, str]) -> Figure:
    """Draw the chart alone, on white."""
    figure = Figure(figsize=SIZE, dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw_losses(axes, curves, x, colours)
    return figure
