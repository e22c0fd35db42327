"""`loco-det evaluate`: results of any program measured as `train` measures its own, and two of them compared."""

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
from loco_det.detection.precomputed import read_proposals
from loco_det.evaluation.bootstrap import Judged
from loco_det.evaluation.cityscapes import OFFICIAL
from loco_det.evaluation.coco import EVALUATORS, table
from loco_det.evaluation.coco_checks import check_results, read_ground_truth
from loco_det.evaluation.measure import Measure, Results, Subject, check_known_evaluator, measure_class
from loco_det.evaluation.proposals import Proposals
from loco_det.evaluation.results_file import held_types, read_results

# What a measure takes of the shapes in a results file; the others take both.
_TYPES = {"voc": ("bbox",), "cityscapes": ("segm",), "proposals": ("bbox",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The results, what they are measured on, and how."""
    parser.add_argument(
        "results",
        type=Path,
        metavar="RESULTS",
        help="coco_instances_results.json or any file like it; box_proposals.pkl; of pixel labels a folder",
    )
    parser.add_argument("other", type=Path, nargs="?", metavar="RESULTS2", help="compared with RESULTS on every draw")
    parser.add_argument("--data", required=True, metavar="NAME|ANNOTATIONS", help="a data set as in DATASETS.TEST")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here too")
    parser.add_argument("--iou-type", choices=("bbox", "segm"), help="boxes or masks alone; what there is without it")
    parser.add_argument("--measure", choices=("coco", "lvis", "proposals"), help="instead of the data set's own")
    parser.add_argument("--evaluator", choices=(*EVALUATORS, OFFICIAL), default=EVALUATORS[0])
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="draws of images; 0 for no intervals")


def run(args: argparse.Namespace) -> None:
    """Measure, compare and write.

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
    """One file of results: how many of the images they are of, the numbers, and the results as they were judged."""

    path: Path
    images: int
    numbers: Results
    judged: list[Judged]


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
    """Measure one or two files of results on a data set; returns what `out` holds.

    Args:
        iou_type: "bbox" or "segm" alone; None for what all files have.
        measure: a file of `evaluation/`; None for the data set's own.
        resamples: draws of the bootstrap over images.
        out: a JSON file to write.

    Raises:
        UserError: results or a data set that cannot be used.
    """
    if dataset.secret:
        raise UserError(f"the truth of {dataset.name} is not public; submit the results to its benchmark instead.")
    rows, types, name = _read(files, dataset, iou_type, measure)
    kind = measure_class(name)
    check_known_evaluator(kind, evaluator, dataset.name)
    found = []
    for path, results in zip(files, rows):
        subject = Subject(dataset, path.parent, "segm" in types, (), evaluator, boxes="bbox" in types)
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
    """Each file's results as its measure takes them, the IoU types to measure, and the measure's name.

    Every file is read before anything is measured.
    """
    if dataset.is_pixels:
        return [_label_files(path, dataset) for path in files], (), dataset.benchmark
    for path in files:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the file of results, as inference/coco_instances_results.json.")
    if all(path.suffix == ".pkl" for path in files):
        return [_proposals(path, dataset) for path in files], (), "proposals"
    rows = [read_results(path) for path in files]
    # Only of what is to be measured, so that the other shape may be missing.
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
        types = ("bbox",)  # masks may be missing from the truth, too
    truth = read_ground_truth(dataset.annotations, types)
    for path, each in zip(files, rows):
        check_results(each, truth, types, source=path)
    return [_as_proposals(each) if name == "proposals" else each for each in rows], types, name


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
    """Checked detections without their classes."""
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
    if dataset.is_pixels:
        measure.folder = path
    log.info("%s: results in %d of the %d images of %s", path, images, len(dataset.index.image_id), dataset.name)
    return _Evaluated(path, images, measure.evaluate(results), measure.judge(results) if resamples else [])


def _image_of(result: Any) -> int | str:
    """The image of one result as its measure takes it."""
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
        "ci95": {judged.kind: judged.intervals(resamples) for judged in one.judged},
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
    found = {own.kind: own.differences(other, resamples) for own, other in zip(one.judged, reference.judged)}
    rows = [
        [f"{kind} {name}", f"{each['difference']:+.3f}", "{:+.3f} to {:+.3f}".format(*each["ci95"])]
        for kind, names in found.items()
        for name, each in names.items()
    ]
    head = ["number", "difference", "95 % interval"]
    log.info("%s minus %s, on the same draws of images:\n%s", one.path, reference.path, table([head, *rows]))
    return found
