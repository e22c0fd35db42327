"""Computes every number of the report, as plain data: means over seeds, paired differences, errors by kind, curves.

AP is what each run recorded. If its detections and the ground truth are present, they are evaluated again, which must
reproduce that AP, and analysed: hotcoco provides the paired bootstrap over images, the errors by kind (TIDE, Bolya et
al. 2020) and the precision at every recall. Pixel labels and the instances of Cityscapes, which have measures of their
own, are evaluated again image by image, for the same bootstrap.
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
from loco_det.evaluation.bootstrap import Counted, Matched, Resamplable
from loco_det.evaluation.cityscapes import count_instances
from loco_det.evaluation.coco import match
from loco_det.evaluation.coco_checks import check_results, read_ground_truth
from loco_det.evaluation.pixels import count_labels
from loco_det.report.runs import DetectorRun, Runs
from loco_det.report.statistics import summarise

CURVES = {"0.50": 0, "0.75": 5}  # IoU threshold -> index in .50:.05:.95
AGREES = 1e-6  # percent; covers the JSON round trip of the recorded AP


@dataclass
class EvaluatedRun:
    """A run with its evaluated detections, or labels; one entry per kind of numbers."""

    run: DetectorRun
    evaluations: list[Resamplable]


def experiments(runs: Runs, baseline: str | None, resamples: int, missing: list[str]) -> list[dict[str, Any]]:
    """Analyse each experiment, in the order of its first run; whatever is unavailable is added to `missing`.

    Args:
        baseline: the backbone that others are compared with; None for the first of each experiment.
        resamples: draws of the paired bootstrap over images; 0 for none.

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
    """List the keys in which experiments of one title differ, with this run's values."""
    others = [group[0].experiment for group in groups.values() if group[0].title == title]
    own = run.experiment
    keys = [key for key in own if any(other.get(key) != own[key] for other in others)]
    return ", ".join(f"{key} {own[key]}" for key in keys[:4]) + (", ..." if len(keys) > 4 else "")


def _experiment(
    group: list[DetectorRun], baseline: str | None, resamples: int, missing: list[str], progress: Progress
) -> dict[str, Any]:
    names = list(dict.fromkeys(run.backbone for run in group))
    first = baseline if baseline in names else names[0]
    analyses: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    paired = []
    for seed in dict.fromkeys(run.seed for run in group):
        for one, reference in _of_one_seed(group, seed, first, missing, progress):
            analyses[one.run.backbone].append(_analyse(one))
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
                "analysis": _mean_analysis(analyses[name]),
            }
        )
    return {"baseline": first, "backbones": rows, "paired": paired, "resamples": resamples}


def _of_one_seed(
    group: list[DetectorRun], seed: int, first: str, missing: list[str], progress: Progress
) -> Iterator[tuple[EvaluatedRun, EvaluatedRun | None]]:
    """Yield each run of a seed with the baseline's, or None for the baseline; keeps two evaluations alive at most."""
    runs = sorted((run for run in group if run.seed == seed), key=lambda run: run.backbone != first)
    reference = None
    for run in runs:
        one = evaluate_again(run)
        progress.advance()
        if isinstance(one, str):
            missing.append(f"{run.path}: {one}")
            continue
        same = reference is not None and reference.run.annotations == run.annotations
        yield one, reference if same and run.backbone != first else None
        if run.backbone == first and reference is None:
            reference = one


def evaluate_again(run: DetectorRun) -> EvaluatedRun | str:
    """Evaluate the run's predictions; returns the reason if that is impossible."""
    if len(run.config["DATASETS.TEST"]) > 1:
        return "it was tested on several data sets, which are not analysed, so no errors, curves, intervals"
    if run.is_segmentor or (run.config["MODEL.MASK_ON"] and is_cityscapes(run.config["DATASETS.TEST"][0])):
        return _evaluate_by_image(run)
    own = [name for name in run.config["DATASETS.TEST"] if measure_of(name, run.config["MODEL.MASK_ON"]) != "coco"]
    if own:
        return f"{own[0]} has a measure of its own, which is not analysed, so no errors, curves, intervals"
    if not run.results.is_file():
        return "its detections (inference/coco_instances_results.json) are not there, so no errors, curves, intervals"
    annotations = run.annotations
    if annotations is None or annotations.suffix != ".json":
        return "its COCO ground truth is not there (set DETECTRON2_DATASETS), so no errors, curves, intervals"
    kinds = ("bbox", "segm") if run.config["MODEL.MASK_ON"] else ("bbox",)
    try:
        truth = read_ground_truth(annotations, kinds)
        results = msgspec.json.decode(run.results.read_bytes())
        evaluations = match(truth, check_results(results, truth, kinds), kinds)
    except (UserError, msgspec.DecodeError) as error:
        return f"its detections cannot be evaluated again: {error}"
    for each in evaluations:
        precision = np.asarray(each.evaluation.eval["precision"])[:, :, :, 0, -1]
        again, recorded = 100 * precision[precision > -1].mean(), run.recorded.get(f"{each.kind}/AP")
        if recorded is not None and not math.isclose(again, recorded, abs_tol=AGREES):
            return (
                f"its detections give {each.kind} AP {again:.3f} and metrics.json says {recorded:.3f}; evaluate it "
                "again with --eval-only. No errors, curves, intervals"
            )
    return EvaluatedRun(run, [*evaluations])


def _evaluate_by_image(run: DetectorRun) -> EvaluatedRun | str:
    """`evaluate_again` for measures other than COCO's AP: pixel labels, and instances of Cityscapes."""
    what = "labels" if run.is_segmentor else "detections"
    if run.annotations is None:
        return "its ground truth is not there (set DETECTRON2_DATASETS), so no paired differences"
    if not run.results.exists():
        return f"its {what} (inference/{run.results.name}) are not there, so no paired differences"
    try:
        counted = _count(run)
    except (UserError, msgspec.DecodeError) as error:
        return f"its {what} cannot be counted again, so no paired differences: {error}"
    for name, again in counted.numbers().items():
        recorded = run.recorded.get(f"{counted.kind}/{name}")
        if recorded is not None and not math.isclose(again, recorded, abs_tol=AGREES):
            return (
                f"its {what} give {name} {again:.3f} and metrics.json says {recorded:.3f}; evaluate it again with "
                "--eval-only. No paired differences"
            )
    return EvaluatedRun(run, [counted])


def _count(run: DetectorRun) -> Counted:
    paths = find_dataset(run.config["DATASETS.TEST"][0])
    if run.is_segmentor:
        images = [paths.images / name for name in load_index(run.annotations).file_name.tolist()]
        return count_labels(images, run.results)
    return count_instances(paths.annotations, paths.images, msgspec.json.decode(run.results.read_bytes()))


def _analyse(run: EvaluatedRun) -> dict[str, dict[str, Any]]:
    return {one.kind: _errors_and_curves(one) for one in run.evaluations if isinstance(one, Matched)}


def _errors_and_curves(matched: Matched) -> dict[str, Any]:
    """Return errors and curves of one evaluation."""
    evaluation = matched.evaluation
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


def _mean_analysis(analyses: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Average the results of `_errors_and_curves` over runs, for each IoU type."""
    if not analyses:
        return None
    mean = {}
    for kind in analyses[0]:
        parts = [one[kind] for one in analyses]
        mean[kind] = {
            "curves": {k: np.mean([p["curves"][k] for p in parts], axis=0).tolist() for k in parts[0]["curves"]},
            "errors": {k: float(np.mean([p["errors"][k] for p in parts])) for k in parts[0]["errors"]},
            "counts": {k: float(np.mean([p["counts"][k] for p in parts])) for k in parts[0]["counts"]},
        }
    return mean


def _compare(reference: EvaluatedRun, one: EvaluatedRun, resamples: int) -> dict[str, Any]:
    """Compute the paired bootstrap over images."""
    log.info("bootstrap: %s against %s, seed %d", one.run.backbone, reference.run.backbone, one.run.seed)
    found: dict[str, Any] = {"backbone": one.run.backbone, "seed": one.run.seed}
    for own, others in zip(one.evaluations, reference.evaluations):
        found["images"], found[own.kind] = own.images, own.differences(others, resamples)
    return found


def probe_curves(runs: Runs) -> list[dict[str, Any]]:
    """Return one entry per protocol (for few labels, per share of them) and data set, with its number of images.

    Returns:
        {"protocol", "data", "backbones": {name: {stage: {"top1", "top1_interval", "top1_std", "runs"}}}}. Of several
        results top1 is the mean and the interval the mean's, as in `summarise`; of one, the probe's own.
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
    """Return the inputs of each detector run, from its run.json."""
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
    """Return the inputs of each pretraining run and each probe, from their files."""
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
