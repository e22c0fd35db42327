"""Computes every number of the report, as plain data: means over seeds, paired differences, errors by kind, curves.

AP is what each run recorded. If its detections, or labels, and the ground truth are present, they are evaluated again,
which must reproduce that AP, for the paired bootstrap over images. Runs under COCO's rules are analysed further:
hotcoco provides the errors by kind (TIDE, Bolya et al. 2020) and the precision at every recall.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loco_det.annotations.registry import Dataset, find_dataset, measure_of
from loco_det.core.errors import UserError
from loco_det.core.files import file_sha256
from loco_det.core.log import Progress, log
from loco_det.evaluation.bootstrap import Matched, Resamplable
from loco_det.evaluation.coco import EVALUATORS
from loco_det.evaluation.measure import Subject, measure_class
from loco_det.report.runs import DetectorRun, Runs, source_of_weights
from loco_det.report.statistics import summarise

CURVES = {"0.50": 0, "0.75": 5}  # IoU threshold -> index in .50:.05:.95
AGREES = 1e-6  # percent; covers the JSON round trip of the recorded AP


@dataclass
class EvaluatedRun:
    """A run with its detections, or labels, evaluated again by the measure called `measure`; one entry per kind of
    numbers."""

    run: DetectorRun
    measure: str
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
            if one.measure == "coco":
                analyses[one.run.backbone].append({each.kind: _errors_and_curves(each) for each in one.evaluations})
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
    names = run.config["DATASETS.TEST"]
    if len(names) > 1:
        return "it was tested on several data sets, which are not analysed, so no errors, curves, intervals"
    measure = measure_of(names[0], run.config["MODEL.MASK_ON"])
    what = "labels" if run.is_segmentor else "detections"
    without = "no errors, curves, intervals" if measure == "coco" else "no paired differences"
    if not run.results.exists():
        return f"its {what} (inference/{run.results.name}) are not there, so {without}"
    if run.annotations is None or run.annotations.suffix != ".json":
        return f"its ground truth is not there (set DETECTRON2_DATASETS), so {without}"
    try:
        results = [] if run.is_segmentor else msgspec.json.decode(run.results.read_bytes())
        subject = Subject(_dataset(run, measure), run.results.parent, run.config["MODEL.MASK_ON"], (), EVALUATORS[0])
        evaluations = measure_class(measure)(subject).resamplable(results)
        numbers = [(each.kind, name, again) for each in evaluations for name, again in each.numbers().items()]
    except (UserError, msgspec.DecodeError, RecursionError) as error:
        return f"its {what} cannot be evaluated again, so {without}: {error}"
    for kind, name, again in numbers:
        recorded = run.recorded.get(f"{kind}/{name}")
        if recorded is not None and not math.isclose(again, recorded, abs_tol=AGREES):
            return (
                f"its {what} give {kind} {name} {again:.3f} and metrics.json says {recorded:.3f}; evaluate it "
                f"again with --eval-only. So {without}"
            )
    return EvaluatedRun(run, measure, evaluations)


def _dataset(run: DetectorRun, measure: str) -> Dataset:
    """Return the test set with the annotations that the run recorded; some measures need its folders, too."""
    (name,) = run.config["DATASETS.TEST"]
    if measure in ("cityscapes", "pixels", "labels"):
        return replace(find_dataset(name), annotations=run.annotations)
    return Dataset(name, Path(), run.annotations)


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
        {"protocol", "data", "measure", "backbones": {name: {stage: {"top1", "top1_interval", "top1_std", "runs"}}}},
        "miou" for "top1" where that is the measure. Of several results top1 is the mean and the interval the mean's,
        as in `summarise`; of one, the probe's own.
    """
    groups: dict[tuple[str, str, str], dict[str, dict[str, list[dict[str, Any]]]]] = {}
    for probe in runs.probes:
        for stage, whole in probe.content["stages"].items():
            shares = whole.get("by_percent") if probe.measure == "top1" else None
            for percent, found in ({"": whole} if shares is None else shares).items():
                protocol = f"{probe.protocol}{percent and f' {percent} %'}"
                stages = groups.setdefault((protocol, probe.data, probe.measure), {}).setdefault(probe.backbone, {})
                stages.setdefault(stage, []).append(found)
    return [
        {
            "protocol": protocol,
            "data": data,
            "measure": measure,
            "backbones": {
                name: {stage: _mean(found, measure) for stage, found in stages.items()}
                for name, stages in backbones.items()
            },
        }
        for (protocol, data, measure), backbones in groups.items()
    ]


def _mean(found: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    whole, interval = summarise([one[measure] for one in found]), f"{measure}_interval"
    shown = whole["ci95"] if len(found) > 1 else found[0].get(interval)
    return {measure: whole["mean"], interval: shown, f"{measure}_std": whole["std"], "runs": len(found)}


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
                "weights": record.get("weights") or {"path": source_of_weights(run.config)},
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
