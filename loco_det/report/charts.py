"""The report's charts as inline SVG, by matplotlib. Text and axes use the page's colour, for light and dark themes."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from loco_det.report.losses import SIZE, UnitLoss, draw_losses

# Readable on white and on black: Okabe and Ito's without the yellow.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8c8c8c")
ERRORS = {
    "Cls": "wrong class",
    "Loc": "poor overlap",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
MEASURES = {"top1": "top-1", "miou": "mean IoU"}  # of probes
_INK = "#010203"  # placeholder for the page's text colour
_LINES = 400  # maximum points drawn of a training curve
_RC = {
    "svg.fonttype": "none",  # text stays text: in the page's font, and searchable
    "svg.hashsalt": "loco_det",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 10,
}

Series = dict[str, list[tuple[list[float], list[float]]]]  # name -> runs, each (xs, ys)


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """Assign each backbone its colour in all charts."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], label: str) -> str:
    """Draw one pair of axes as an SVG element that fills its container's width; `label` is for screen readers."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        out = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).replace(_INK, "currentColor")
    text = _own_ids(text)
    label = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _own_ids(text: str) -> str:
    """Make ids unique on the page: matplotlib restarts figure_1, axes_1 in each SVG."""
    prefix = f"c{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)


def seeds(rows: Sequence[dict[str, Any]], key: str, label: str, colours: dict[str, str]) -> str:
    """Draw every run as a dot, the mean as a bar, its 95 % interval as a line."""

    def draw(axes: Axes) -> None:
        labels = [row["backbone"] for row in reversed(rows)]
        for place, row in enumerate(reversed(rows)):
            numbers = row["numbers"].get(key)
            if not numbers or not numbers["n"]:
                continue
            colour = colours[row["backbone"]]
            axes.barh(place, numbers["mean"], color=colour, height=0.55, alpha=0.45)
            axes.plot(numbers["values"], [place] * numbers["n"], "o", color=colour, markersize=4.5)
            if numbers["ci95"]:
                axes.plot(numbers["ci95"], [place, place], color=_INK, linewidth=1.2)
            labels[place] += f"  {numbers['mean']:.1f}"  # not on the bar, where the interval's line may cross it
        axes.set_yticks(range(len(rows)), labels)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)

    return _svg(draw, (4.6, 0.9 + 0.42 * len(rows)), label)


def curves(named: dict[str, list[float]], label: str, colours: dict[str, str]) -> str:
    """Draw precision over recall."""

    def draw(axes: Axes) -> None:
        for name, precision in named.items():
            recall = [i / (len(precision) - 1) for i in range(len(precision))]
            axes.plot(recall, precision, color=colours[name], label=name, linewidth=1.6)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title=label)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw, (4.2, 3.2), label)


def errors(named: dict[str, dict[str, float]], label: str, colours: dict[str, str]) -> str:
    """Draw the AP50 that each kind of error costs."""

    def draw(axes: Axes) -> None:
        height = 0.8 / len(named)
        for i, (name, found) in enumerate(named.items()):
            places = [-k - i * height for k in range(len(ERRORS))]
            axes.barh(places, [found[kind] for kind in ERRORS], height=0.92 * height, color=colours[name], label=name)
        middle = (len(named) - 1) * height / 2
        axes.set_yticks([-k - middle for k in range(len(ERRORS))], ERRORS.values())
        axes.set(xlabel="AP50 points lost", title=label)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw, (4.6, 3.4), label)


def lines(series: Series, x: str, y: str, label: str, colours: dict[str, str]) -> str:
    """Draw curves over steps, the runs of a backbone in its colour."""

    def draw(axes: Axes) -> None:
        for name, runs in series.items():
            for i, (xs, ys) in enumerate(runs):
                every = max(1, len(xs) // _LINES)
                axes.plot(
                    xs[::every],
                    ys[::every],
                    color=colours[name],
                    linewidth=1.2,
                    alpha=0.8,
                    marker="o" if len(xs) < 12 else "",
                    markersize=3,
                    label=name if i == 0 else None,
                )
        axes.set(xlabel=x, ylabel=y, title=label)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw, (4.2, 3.0), label)


def losses(curves: Sequence[UnitLoss], x: str, colours: dict[str, str]) -> str:
    """Draw the losses of all units of all pretraining runs."""
    return _svg(lambda axes: draw_losses(axes, curves, x, colours), SIZE, "loss of each unit of every pretraining")


def stage_order(backbones: dict[str, dict[str, Any]]) -> list[str]:
    """Every stage of any backbone: those of ResNets in order, then others in order of appearance."""
    known = ("stem", *(f"res{number}" for number in range(2, 8)))
    found = dict.fromkeys(stage for stages in backbones.values() for stage in stages)
    return sorted(found, key=lambda stage: known.index(stage) if stage in known else len(known))


def stages(backbones: dict[str, dict[str, Any]], measure: str, label: str, colours: dict[str, str]) -> str:
    """Draw the measure, one of MEASURES, after each stage, with its interval if there is one."""

    def draw(axes: Axes) -> None:
        names = stage_order(backbones)
        for name, found in backbones.items():
            present = [s for s in names if s in found]
            places, values = [names.index(s) for s in present], [found[s][measure] for s in present]
            axes.plot(places, values, "o-", color=colours[name], label=name, markersize=4)
            for place, stage in zip(places, present):
                interval = found[stage].get(f"{measure}_interval")
                if interval:
                    axes.plot([place, place], interval, color=colours[name], linewidth=1.2)
        slanted = {"rotation": 30, "ha": "right"} if len("".join(names)) > 40 else {}
        axes.set_xticks(range(len(names)), names, **slanted)
        axes.set(ylabel=f"{MEASURES[measure]}, percent", title=label)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw, (4.2, 3.0), label)
