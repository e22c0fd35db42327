"""Every number on the page, as plain data: means over seeds, paired differences, errors by kind, curves.

AP is what each run recorded. Where its detections and the ground truth are at hand they are evaluated once more,
which must give that AP again, and are then taken apart: hotcoco has the paired bootstrap over images, the errors by
kind (TIDE, Bolya et al. 2020) and the precision at every recall. Pixel labels and the instances of Cityscapes, which
have measures of their own, are counted once more likewise, an image at a time, for the same bootstrap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from loco_det.annotations.cityscapes import is_cityscapes
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import find_dataset, measure_of
from loco_det.core.errors import UserError
from loco_det.core.files import file_sha256
from loco_det.core.log import Progress, log
from loco_det.evaluation import labels
from loco_det.evaluation.bootstrap import Counted, Judged, Matched
from loco_det.evaluation.cityscapes import count_instances
from loco_det.evaluation.coco import match
from loco_det.evaluation.coco_checks import check_results, read_ground_truth
from loco_det.evaluation.pixels import count_labels
from loco_det.report.runs import DetectorRun, Runs
from loco_det.report.statistics import summarise

CURVES = {"0.50": 0, "0.75": 5}  # IoU threshold -> its place among .50:.05:.95
AGREES = 1e-6  # percent; the recorded AP went through JSON, nothing else


@dataclass
class Taken:
    """A run with its detections, or labels, as they were judged; one entry for each kind of numbers."""

    run: DetectorRun
    judged: list[Judged]


def experiments(runs: Runs, baseline: str | None, resamples: int, missing: list[str]) -> list[dict[str, Any]]:
    """One entry for each experiment, in the order of its first run; what there is not is added to `missing`.

    Args:
        baseline: the backbone that others are compared with; None for the first of each experiment.
        resamples: of the paired bootstrap over images; 0 for none.

    Raises:
        UserError: no run has `baseline`'s name.
    """
    if baseline is not None and baseline not in {run.backbone for run in runs.detectors}:
        names = ", ".join(dict.fromkeys(run.backbone for run in runs.detectors))
        raise UserError(f"--baseline {baseline}: no run has this backbone; there are {names}")
    groups: dict[str, list[DetectorRun]] = {}
    for run in runs.detectors:
        if not run.recorded:
            missing.append(f"{run.path}: {run.backbone}, seed {run.seed}: not evaluated yet, so it is in no table")
            continue
        groups.setdefault(json.dumps(run.experiment, sort_keys=True, default=str), []).append(run)
    titles = [group[0].title for group in groups.values()]
    found = []
    with Progress(sum(map(len, groups.values())), "report", unit="runs") as progress:
        for group, title in zip(groups.values(), titles):
            shown = title if titles.count(title) == 1 else f"{title} ({_differences(group[0], groups, title)})"
            found.append(
                {
                    "title": shown,
                    "config": group[0].experiment,
                    **_experiment(group, baseline, resamples, missing, progress),
                }
            )
    return found


def _differences(run: DetectorRun, groups: dict[str, list[DetectorRun]], title: str) -> str:
    """The keys that tell experiments of one title apart, with this run's values."""
    others = [group[0].experiment for group in groups.values() if group[0].title == title]
    own = run.experiment
    keys = [key for key in own if any(other.get(key) != own[key] for other in others)]
    return ", ".join(f"{key} {own[key]}" for key in keys[:4]) + (", ..." if len(keys) > 4 else "")


def _experiment(
    group: list[DetectorRun], baseline: str | None, resamples: int, missing: list[str], progress: Progress
) -> dict[str, Any]:
    names = list(dict.fromkeys(run.backbone for run in group))
    first = baseline if baseline in names else names[0]
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    paired = []
    for seed in dict.fromkeys(run.seed for run in group):
        for one, reference in _of_one_seed(group, seed, first, missing, progress):
            taken[one.run.backbone].append({j.kind: _apart(j) for j in one.judged if isinstance(j, Matched)})
            if reference is not None and resamples:
                paired.append(_compare(reference, one, resamples))
            elif one.run.backbone != first and resamples:
                missing.append(f"{one.run.path}: no paired difference, for {first} has no such run of seed {seed}")
    rows = []
    for name in names:
        own = [run for run in group if run.backbone == name]
        keys = dict.fromkeys(key for run in own for key in run.recorded)
        rows.append(
            {
                "backbone": name,
                "seeds": [run.seed for run in own],
                "runs": [str(run.path) for run in own],
                "numbers": {key: summarise([run.recorded.get(key) for run in own]) for key in keys},
                "apart": _mean_apart(taken[name]),
            }
        )
    return {"baseline": first, "backbones": rows, "paired": paired, "resamples": resamples}


def _of_one_seed(
    group: list[DetectorRun], seed: int, first: str, missing: list[str], progress: Progress
) -> Iterator[tuple[Taken, Taken | None]]:
    """Each run of a seed with that of the baseline, None for the baseline itself; two evaluations alive at a time."""
    runs = sorted((run for run in group if run.seed == seed), key=lambda run: run.backbone != first)
    reference = None
    for run in runs:
        one = take_apart(run)
        progress.advance()
        if isinstance(one, str):
            missing.append(f"{run.path}: {one}")
            continue
        same = reference is not None and reference.run.annotations == run.annotations
        yield one, reference if same and run.backbone != first else None
        if run.backbone == first and reference is None:
            reference = one


def take_apart(run: DetectorRun) -> Taken | str:
    """What the run found, evaluated, or why it cannot be."""
    if len(run.config["DATASETS.TEST"]) > 1:
        return "it was tested on several data sets, which are not taken apart, so no errors, curves, intervals"
    if run.is_segmentor or (run.config["MODEL.MASK_ON"] and is_cityscapes(run.config["DATASETS.TEST"][0])):
        return _count_pixels(run)
    own = [name for name in run.config["DATASETS.TEST"] if measure_of(name, run.config["MODEL.MASK_ON"]) != "coco"]
    if own:
        return f"{own[0]} has a measure of its own, which is not taken apart, so no errors, curves, intervals"
    if not run.results.is_file():
        return "its detections (inference/coco_instances_results.json) are not there, so no errors, curves, intervals"
    annotations = run.annotations
    if annotations is None or annotations.suffix != ".json":
        return "its COCO ground truth is not there (set DETECTRON2_DATASETS), so no errors, curves, intervals"
    kinds = ("bbox", "segm") if run.config["MODEL.MASK_ON"] else ("bbox",)
    try:
        truth = read_ground_truth(annotations, kinds)
        results = msgspec.json.decode(run.results.read_bytes())
        judged = match(truth, check_results(results, truth, kinds), kinds)
    except (UserError, msgspec.DecodeError, RecursionError) as error:
        return f"its detections cannot be evaluated again: {error}"
    for each in judged:
        precision = np.asarray(each.evaluation.eval["precision"])[:, :, :, 0, -1]
        again, recorded = 100 * precision[precision > -1].mean(), run.recorded.get(f"{each.kind}/AP")
        if recorded is not None and not math.isclose(again, recorded, abs_tol=AGREES):
            return (
                f"its detections give {each.kind} AP {again:.3f} and metrics.json says {recorded:.3f}; evaluate it "
                "again with --eval-only. No errors, curves, intervals"
            )
    return Taken(run, [*judged])


def _count_pixels(run: DetectorRun) -> Taken | str:
    """`take_apart` of what is judged pixel by pixel and not by COCO's AP: labels, and instances of Cityscapes."""
    what = "labels" if run.is_segmentor else "detections"
    if run.annotations is None:
        return "its ground truth is not there (set DETECTRON2_DATASETS), so no paired differences"
    if not run.results.exists():
        return f"its {what} (inference/{run.results.name}) are not there, so no paired differences"
    try:
        counted = _counted(run)
    except (UserError, msgspec.DecodeError, RecursionError) as error:
        return f"its {what} cannot be counted again, so no paired differences: {error}"
    for name, again in counted.numbers().items():
        recorded = run.recorded.get(f"{counted.kind}/{name}")
        if recorded is not None and not math.isclose(again, recorded, abs_tol=AGREES):
            return (
                f"its {what} give {name} {again:.3f} and metrics.json says {recorded:.3f}; evaluate it again with "
                "--eval-only. No paired differences"
            )
    return Taken(run, [counted])


def _counted(run: DetectorRun) -> Counted:
    paths = find_dataset(run.config["DATASETS.TEST"][0])
    if run.is_segmentor and paths.benchmark == "labels":
        return labels.count_labels(paths, run.results)
    if run.is_segmentor:
        images = [paths.images / name for name in load_index(run.annotations).file_name.tolist()]
        return count_labels(images, run.results)
    return count_instances(paths.annotations, paths.images, msgspec.json.decode(run.results.read_bytes()))


def _apart(judged: Matched) -> dict[str, Any]:
    """Errors and curves of one evaluation."""
    evaluation = judged.evaluation
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # thresholds, recalls, categories
    curves = {}
    for name, place in CURVES.items():
        defined = np.ma.masked_less(precision[place], 0)
        curves[name] = defined.mean(1).filled(0).tolist()
    errors = evaluation.tide_errors()
    return {
        "curves": curves,
        "errors": {name: 100 * float(value) for name, value in errors["delta_ap"].items()},
        "counts": {name: int(value) for name, value in errors["counts"].items()},
    }


def _mean_apart(taken: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean over runs of what `_apart` found, for each IoU type."""
    if not taken:
        return None
    mean = {}
    for kind in taken[0]:
        parts = [one[kind] for one in taken]
        mean[kind] = {
            "curves": {k: np.mean([p["curves"][k] for p in parts], axis=0).tolist() for k in parts[0]["curves"]},
            "errors": {k: float(np.mean([p["errors"][k] for p in parts])) for k in parts[0]["errors"]},
            "counts": {k: float(np.mean([p["counts"][k] for p in parts])) for k in parts[0]["counts"]},
        }
    return mean


def _compare(reference: Taken, one: Taken, resamples: int) -> dict[str, Any]:
    """The paired bootstrap over images."""
    log.info("bootstrap: %s against %s, seed %d", one.run.backbone, reference.run.backbone, one.run.seed)
    found: dict[str, Any] = {"backbone": one.run.backbone, "seed": one.run.seed}
    for own, others in zip(one.judged, reference.judged):
        found["images"], found[own.kind] = own.images, own.differences(others, resamples)
    return found


def probe_curves(runs: Runs) -> list[dict[str, Any]]:
    """One entry for each protocol (of few labels: each share of them) and data set, with the number of its images.

    Returns:
        {"protocol", "data", "backbones": {name: {stage: {"top1", "top1_interval", "top1_std", "runs"}}}}. Of several
        results top1 is the mean and the interval that of the mean, as in `summarise`; of one, the probe's own.
    """
    groups: dict[tuple[str, str], dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for probe in runs.probes:
        for stage, whole in probe.content["stages"].items():
            for percent, found in whole.get("by_percent", {"": whole}).items():
                protocol = f"{probe.protocol}{percent and f' {percent} %'}"
                stages = groups.setdefault((protocol, probe.data), {}).setdefault(probe.backbone, {})
                stages.setdefault(stage, []).append(found)
    return [
        {
            "protocol": protocol,
            "data": data,
            "backbones": {n: {s: _mean_top1(found) for s, found in stages.items()} for n, stages in backbones.items()},
        }
        for (protocol, data), backbones in groups.items()
    ]


def _mean_top1(found: list[dict[str, Any]]) -> dict[str, Any]:
    whole = summarise([one["top1"] for one in found])
    interval = whole["ci95"] if len(found) > 1 else found[0].get("top1_interval")
    return {"top1": whole["mean"], "top1_interval": interval, "top1_std": whole["std"], "runs": len(found)}


def inputs(runs: Runs) -> list[dict[str, Any]]:
    """What went into each detector run, as its run.json says."""
    found = []
    for run in runs.detectors:
        record = run.record or {}
        found.append(
            {
                "run": str(run.path),
                "backbone": run.backbone,
                "engine": record.get("engine"),
                "seed": run.seed,
                "started": record.get("started"),
                "weights": record.get("weights") or {"path": run.config["MODEL.WEIGHTS"]},
                "datasets": record.get("datasets"),
                "environment": record.get("environment"),
                "config_sha256": file_sha256(run.path / "config.yaml"),
            }
        )
    return found


def other_inputs(runs: Runs) -> list[dict[str, Any]]:
    """What went into each pretraining and each probe, as its files say."""
    found = []
    for run in runs.pretrainings:
        facts = {"run": str(run.path), "backbone": run.backbone, "seed": run.config.get("SEED"), "weights": None}
        digest = file_sha256(run.path / "config.yaml")
        found.append({**facts, "sha256": None, "data": run.config.get("DATA.PATH"), "config_sha256": digest})
    for probe in runs.probes:
        facts = {"run": str(probe.path), "backbone": probe.backbone, "seed": probe.content.get("seed")}
        weights = {"weights": probe.facts("backbone").get("name"), "sha256": probe.weights}
        found.append({**facts, **weights, "data": probe.facts("data").get("path"), "config_sha256": None})
    return found
