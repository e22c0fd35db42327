"""`loco-det evaluate`: evaluate any program's results as `train` does its own, and compare two of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loco_det import __version__
from loco_det.annotations.registry import Dataset, find_dataset, measure_of
from loco_det.core.errors import UserError
from loco_det.core.files import check_writable, file_sha256, write_json
from loco_det.core.log import log
from loco_det.core.run_folder import check_sums
from loco_det.detection.precomputed import read_proposals
from loco_det.evaluation.bootstrap import Resamplable
from loco_det.evaluation.coco import EVALUATORS, table
from loco_det.evaluation.coco_checks import check_results, read_ground_truth
from loco_det.evaluation.measure import Measure, Results, Subject, check_known_evaluator, measure_class
from loco_det.evaluation.proposals import Proposals
from loco_det.evaluation.results_file import held_types, read_results

# The shapes of a results file that a measure uses; other measures use both.
_TYPES = {"voc": ("bbox",), "cityscapes": ("segm",), "proposals": ("bbox",)}


def run(args: argparse.Namespace) -> None:
    """Evaluate, compare and write.

    Raises:
        UserError: bad arguments, results, data or a file that cannot be written.
    """
    if args.bootstrap < 0:
        raise UserError(f"--bootstrap is {args.bootstrap}; give a number of draws, or 0 for no intervals.")
    if args.json is not None:
        check_writable(args.json)
    files = [args.results] if args.other is None else [args.results, args.other]
    evaluate_files(
        files,
        find_dataset(args.data),
        iou_type=args.iou_type,
        measure=args.measure,
        evaluator=args.evaluator,
        resamples=args.bootstrap,
        out=args.json,
    )


@dataclass(frozen=True)
class _Evaluated:
    """One results file: its number of images, its metrics, and its results as evaluated."""

    path: Path
    images: int
    numbers: Results
    evaluations: list[Resamplable]


def evaluate_files(
    files: Sequence[Path],
    dataset: Dataset,
    *,
    iou_type: str | None = None,
    measure: str | None = None,
    evaluator: str = EVALUATORS[0],
    resamples: int = 1000,
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate one or two results files on a data set; returns the content of `out`.

    Args:
        iou_type: "bbox" or "segm" only; None for the shapes that all files have.
        measure: a module of `evaluation/`; None for the data set's own.
        resamples: draws of the bootstrap over images.
        out: a JSON file to write.

    Raises:
        UserError: invalid results or data set.
    """
    if dataset.secret:
        raise UserError(f"the truth of {dataset.name} is not public; submit the results to its benchmark instead.")
    rows, types, name = _read(files, dataset, iou_type, measure)
    kind = measure_class(name)
    check_known_evaluator(kind, evaluator, dataset.name)
    found = []
    for path, results in zip(files, rows):
        subject = Subject(dataset, path.parent, "segm" in types, (), evaluator, boxes="bbox" in types, labels=path)
        found.append(_evaluated(path, kind(subject), results, resamples))
    content = {
        "loco_det": __version__,
        "data": {"name": dataset.name, "sha256": dataset.index.file.sha256, "images": len(dataset.index.image_id)},
        "measure": name,
        "evaluator": evaluator,
        "bootstrap": resamples,
        "results": [_content(one, resamples) for one in found],
    }
    _show_intervals(content["results"])
    if len(found) == 2 and resamples:
        content["paired"] = _paired(*found, resamples)
    if out is not None:
        write_json(out, content)
    return content


def _read(
    files: Sequence[Path], dataset: Dataset, iou_type: str | None, measure: str | None
) -> tuple[list[list[Any]], tuple[str, ...], str]:
    """Return each file's results in its measure's format, the IoU types to evaluate, and the measure's name.

    All files are read before anything is evaluated.
    """
    if dataset.is_pixels:
        _refuse_choices(f"{dataset.name} has a label for each pixel", dataset.benchmark, iou_type, measure)
        return [_label_files(path, dataset) for path in files], (), dataset.benchmark
    for path in files:
        for folder in path.absolute().parents[1:3]:  # of a run
            check_sums(folder, path.absolute())
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the file of results, as inference/coco_instances_results.json.")
    if all(path.suffix == ".pkl" for path in files):
        _refuse_choices(f"{files[0]} holds proposals", "proposals", iou_type, measure)
        return [_proposals(path, dataset) for path in files], (), "proposals"
    rows = [read_results(path) for path in files]
    # Check only the evaluated shape, so that the other may be missing.
    every = [[iou_type] if iou_type else held_types(path, each) for path, each in zip(files, rows)]
    types = tuple(t for t in ("bbox", "segm") if all(t in held for held in every))
    name = measure or measure_of(dataset.name, "segm" in types)
    types = tuple(t for t in types if t in _TYPES.get(name, types))
    if not types:
        needs = " or ".join(_TYPES.get(name, ("bbox", "segm")))
        raise UserError(
            f"{' and '.join(map(str, files))}: no {needs} to measure {dataset.name} by; give every row one."
        )
    if not any(rows) and iou_type is None and "bbox" in types:
        types = ("bbox",)  # masks may be missing from the ground truth, too
    truth = read_ground_truth(dataset.annotations, types)
    for path, each in zip(files, rows):
        check_results(each, truth, types, source=path)
    return [_as_proposals(each) if name == "proposals" else each for each in rows], types, name


def _refuse_choices(because: str, name: str, iou_type: str | None, measure: str | None) -> None:
    """Raise UserError for options that measure `name` would pass over."""
    for option, value in (("--iou-type", iou_type), ("--measure", None if measure == name else measure)):
        if value is not None:
            raise UserError(f"{because}, so {option} {value} does not apply; leave it out.")


def _label_files(path: Path, dataset: Dataset) -> list[str]:
    if not path.is_dir():
        raise UserError(f"{path}: {dataset.name} has a label for each pixel; give the folder with the *_pred.png.")
    return list(dataset.index.file_name)


def _proposals(path: Path, dataset: Dataset) -> list[Proposals]:
    found, known = read_proposals(path), {str(number): number for number in dataset.index.image_id.tolist()}
    if unknown := found.keys() - known.keys():
        raise UserError(
            f"{path} has proposals of image {min(unknown)}, which {dataset.annotations} does not list; evaluate "
            "against the annotations of the images that were predicted."
        )
    return [Proposals(known[key], *map(torch.from_numpy, each)) for key, each in found.items()]


def _as_proposals(rows: list[dict[str, Any]]) -> list[Proposals]:
    """Convert checked detections to class-agnostic proposals."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["image_id"], []).append(row)
    found = []
    for number, own in by_image.items():
        boxes = torch.tensor([row["bbox"] for row in own], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        found.append(Proposals(number, boxes, torch.tensor([row["score"] for row in own], dtype=torch.float32)))
    return found


def _evaluated(path: Path, measure: Measure, results: list[Any], resamples: int) -> _Evaluated:
    dataset, images = measure.dataset, len(set(map(_image_of, results)))
    log.info("%s: results in %d of the %d images of %s", path, images, len(dataset.index.image_id), dataset.name)
    judged = measure.resamplable(results) if resamples else []  # first, so that `evaluate` takes no second matching
    return _Evaluated(path, images, measure.evaluate(results), judged)


def _image_of(result: Any) -> int | str:
    """Return the image of one result, whatever its measure."""
    if isinstance(result, Proposals):
        return result.image_id
    return result if isinstance(result, str) else result["image_id"]


def _content(one: _Evaluated, resamples: int) -> dict[str, Any]:
    return {
        "path": str(one.path),
        "sha256": None if one.path.is_dir() else file_sha256(one.path),
        "images": one.images,
        "numbers": {
            kind: {name: value if math.isfinite(value) else None for name, value in values.items()}
            for kind, values in one.numbers.items()
        },
        "ci95": {own.kind: own.intervals(resamples) for own in one.evaluations},
    }


def _show_intervals(results: list[dict[str, Any]]) -> None:
    for one in results:
        rows = [
            [f"{kind} {name}", f"{one['numbers'][kind][name]:.3f}", f"{low:.3f} to {high:.3f}"]
            for kind, found in one["ci95"].items()
            for name, (low, high) in found.items()
        ]
        if rows:
            log.info("%s, 95 %% interval:\n%s", one["path"], table([["number", "value", "95 % interval"], *rows]))


def _paired(reference: _Evaluated, one: _Evaluated, resamples: int) -> dict[str, dict[str, Any]]:
    found = {own.kind: own.differences(other, resamples) for own, other in zip(one.evaluations, reference.evaluations)}
    rows = [
        [f"{kind} {name}", f"{each['difference']:+.3f}", "{:+.3f} to {:+.3f}".format(*each["ci95"])]
        for kind, names in found.items()
        for name, each in names.items()
    ]
    head = ["number", "difference", "95 % interval"]
    log.info("%s minus %s, on the same draws of images:\n%s", one.path, reference.path, table([head, *rows]))
    return found
