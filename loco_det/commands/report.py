"""`loco-det report`: runs on disk -> index.html, report.md, report.json and pretraining_losses.png."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loco_det import __version__
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, write_json
from loco_det.core.log import log
from loco_det.report import analysis
from loco_det.report.charts import Series, colour_of
from loco_det.report.losses import losses_figure, unit_losses
from loco_det.report.page import html_page, markdown_page
from loco_det.report.panels import panels
from loco_det.report.plots import save_figure
from loco_det.report.runs import Runs, find_runs

# Title -> key of metrics.json, for the curves of a detector's training.
CURVES = {"total loss": "total_loss", "box AP": "bbox/AP", "mask AP": "segm/AP", "mean IoU": "sem_seg/IoU"}
LOSSES = "pretraining_losses.png"


def run(args: argparse.Namespace) -> None:
    """Write the report.

    Raises:
        UserError: no such runs, unreadable files, or a folder that cannot be written.
    """
    if args.bootstrap < 0 or args.images < 0:
        raise UserError("--bootstrap and --images are numbers of resamples and images; give 0 or more.")
    report(
        find_runs(args.runs),
        args.out,
        title=args.title,
        baseline=args.baseline,
        resamples=args.bootstrap,
        images=args.images,
        threshold=args.score_threshold,
    )


def report(
    runs: Runs,
    out: Path,
    *,
    title: str,
    baseline: str | None = None,
    resamples: int = 1000,
    images: int = 4,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Write out/index.html, out/report.md, out/report.json, and for pretraining runs out/pretraining_losses.png.

    Returns the content of report.json.

    Args:
        runs: from `find_runs`.
        out: output folder, created if missing.
        title: title of the page.
        baseline: the backbone that the others are compared with; None for the first.
        resamples: draws of the paired bootstrap over images.
        images: number of images shown with ground truth and predictions.
        threshold: minimum score of the detections shown.

    Raises:
        UserError: an unknown baseline, or `out` cannot be written.
    """
    missing: list[str] = []
    content: dict[str, Any] = {
        "title": title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "loco_det": __version__,
        "backbones": runs.backbones(),
        "experiments": analysis.experiments(runs, baseline, resamples, missing),
        "probes": analysis.probe_curves(runs),
        "inputs": analysis.inputs(runs),
        "other_inputs": analysis.other_inputs(runs),
    }
    shown, titles = [], {}
    for experiment in content["experiments"]:
        paths = {path for row in experiment["backbones"] for path in row["runs"]}
        group = [one for one in runs.detectors if str(one.path) in paths]
        shown.append(panels(group, images, threshold, missing))
        titles.update(dict.fromkeys(paths, experiment["title"]))
    losses = unit_losses(runs.pretrainings, missing)
    content["missing"] = list(dict.fromkeys(missing))
    page = html_page(content, training_series(runs, titles), losses, shown)
    if losses[0]:
        save_figure(losses_figure(*losses, colour_of(content["backbones"])), out / LOSSES)
    write_json(out / "report.json", content)
    for name, text in (("report.md", markdown_page(content)), ("index.html", page)):
        with atomic_write(out / name, "w") as file:
            file.write(text)
    for text in content["missing"]:
        log.warning("%s", text)
    log.info("wrote %s", out / "index.html")
    return content


def training_series(runs: Runs, titles: dict[str, str]) -> dict[str, dict[str, Series]]:
    """Map heading -> title -> curves over steps: a detector's loss and scores during training, one heading per
    experiment.

    Args:
        titles: experiment titles by run folder.
    """
    found: dict[str, dict[str, Series]] = {}

    def add(heading: str, title: str, backbone: str, points: list[tuple[float, float]]) -> None:
        if len(points) > 1:
            series = found.setdefault(heading, {}).setdefault(title, {})
            series.setdefault(backbone, []).append(tuple(map(list, zip(*points))))

    for one in runs.detectors:
        for title, key in CURVES.items():
            points = [(m["iteration"], m[key]) for m in one.metrics if m.get(key) is not None and "iteration" in m]
            add(titles.get(str(one.path), one.title), title, one.backbone, points)
    return found
