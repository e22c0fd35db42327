"""COCO evaluation, hotcoco against pycocotools: is it the same, and how much faster?

A made-up validation set that resembles COCO's: about 7 objects an image, of 3 categories, unevenly frequent; masks of
about 220 RLE bytes; crowds; about 70 detections an image, as non-maximum suppression leaves them. Results are in
memory; everything else is timed: for `evaluate_coco` reading the annotation file for the first time (its cache is
emptied before every run), writing that cache, all checks, evaluation and the numbers; for pycocotools, called by hand
as its own example does, `COCO`, `loadRes`, `evaluate` and `accumulate`, without `summarize`. The two take turns, and
the medians are compared.

    python benchmarks/coco_eval.py --json coco_eval.json        # about two minutes on 2 cores
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from _common import parser, report
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loco_det.evaluation.coco import evaluate_coco

H, W, CLASSES = 480, 640, 80
FAST_PER_ROUND = 5  # runs of hotcoco for each of pycocotools


def outline(rng: np.random.Generator, box: np.ndarray) -> list[float]:
    """A ragged closed curve inside an XYWH box, as a COCO polygon."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = 0.5 - 0.125 * rng.random(len(angle))
    points = box[:2] + box[2:] * (0.5 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))
    return points.round(2).ravel().tolist()


def rle(polygon: list[float]) -> dict[str, Any]:
    mask = hotcoco.mask.fr_poly(polygon, H, W)
    return {"size": [H, W], "counts": mask["counts"].decode()}


def made_up_box(rng: np.random.Generator) -> np.ndarray:
    """XYWH; sides of median 50 and mean 85 pixels, as in COCO."""
    size = np.exp(rng.uniform(np.log(8), np.log(320))) * np.exp([0.4, -0.4] * rng.normal(size=1))
    size = np.minimum(size, [W - 2, H - 2])
    return np.concatenate([rng.uniform(0, [W, H] - size), size]).round(2)


def made_up_objects(rng: np.random.Generator, frequency: np.ndarray, image_id: int) -> list[dict[str, Any]]:
    present = rng.choice(CLASSES, size=1 + rng.poisson(2.5), replace=False, p=frequency)
    objects = []
    for _ in range(rng.geometric(1 / 8.3) - 1):
        box = made_up_box(rng)
        polygon, crowd = outline(rng, box), int(rng.random() < 0.012)
        mask = rle(polygon)
        objects.append(
            {
                "image_id": image_id,
                "category_id": int(rng.choice(present)) + 1,
                "bbox": box.tolist(),
                "area": float(hotcoco.mask.area(mask)),
                "iscrowd": crowd,
                "segmentation": mask if crowd else [polygon],
            }
        )
    return objects


def made_up_detections(
    rng: np.random.Generator, objects: list[dict[str, Any]], frequency: np.ndarray, image_id: int
) -> list[dict[str, Any]]:
    """As after non-maximum suppression: one good and one poor box for most objects, other classes' boxes on the same
    objects, and boxes of the background, half of them of a class that the image has."""
    found = []  # (box, category, score)
    for each in objects:
        box, category = np.array(each["bbox"]), each["category_id"]
        for share, spread, right, skill in ((0.85, 0.07, True, 6), (0.7, 0.3, True, 2), (0.9, 0.1, False, 1.5)):
            if rng.random() < share:
                shift = rng.normal(0, spread, 4)
                moved = np.concatenate([box[:2] + shift[:2] * box[2:], box[2:] * np.exp(shift[2:])])
                found.append((moved, category if right else rng.choice(CLASSES, p=frequency) + 1, rng.beta(skill, 2)))
    for _ in range(max(0, rng.poisson(70) - len(found))):
        category = rng.choice(CLASSES, p=frequency) + 1
        if objects and rng.random() < 0.5:
            category = objects[rng.integers(len(objects))]["category_id"]
        found.append((made_up_box(rng), category, rng.beta(1, 5)))
    return [
        {
            "image_id": image_id,
            "category_id": int(category),
            "bbox": box.astype(np.float32).tolist(),
            "score": round(float(score), 3),  # so that there are ties
            "segmentation": rle(outline(rng, box)),
        }
        for box, category, score in found
    ]


def made_up_set(images: int, seed: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO ground truth and results for it."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(2, CLASSES + 2)
    frequency /= frequency.sum()
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    ids = range(1000, 1000 + 7 * images, 7)
    for image_id in ids:
        objects = made_up_objects(rng, frequency, image_id)
        annotations += [{"id": len(annotations) + i, **each} for i, each in enumerate(objects, 1)]
        results += made_up_detections(rng, objects, frequency, image_id)
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in ids],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": f"class{i}"} for i in range(CLASSES)],
    }, results


def by_hand(path: Path, results: list[dict[str, Any]], iou_types: tuple[str, ...]) -> dict[str, COCOeval]:
    """pycocotools; for masks the box is left out, as Detectron2 does, so that sizes are the masks'."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, evaluations = COCO(str(path)), {}
        for iou_type in iou_types:
            other = "segmentation" if iou_type == "bbox" else "bbox"
            found = truth.loadRes([{k: v for k, v in result.items() if k != other} for result in results])
            evaluations[iou_type] = COCOeval(truth, found, iou_type)
            evaluations[iou_type].evaluate()
            evaluations[iou_type].accumulate()
    return evaluations


def numbers_of(evaluation: COCOeval) -> dict[str, float]:
    """AP in percent under Detectron2's names, by the formula of pycocotools' `summarize`."""
    precision = evaluation.eval["precision"][..., -1]
    parts = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0]}
    parts |= {"APs": precision[..., 1], "APm": precision[..., 2], "APl": precision[..., 3]}
    names = [category["name"] for category in evaluation.cocoGt.loadCats(evaluation.params.catIds)]
    parts |= {f"AP-{name}": precision[:, :, k, 0] for k, name in enumerate(names)}
    return {name: float(np.mean(p[p > -1]) * 100) if (p > -1).any() else math.nan for name, p in parts.items()}


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def same(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> bool:
    """Whether every number is the same to the last bit (NaN is the same as NaN)."""
    return a.keys() == b.keys() and all(
        a[t].keys() == b[t].keys()
        and all(a[t][n] == b[t][n] or (math.isnan(a[t][n]) and math.isnan(b[t][n])) for n in a[t])
        for t in a
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=1000)
    arguments.add_argument("--rounds", type=int, default=3)
    args = arguments.parse_args()
    truth, results = made_up_set(args.images)
    seconds: dict[tuple[str, str], list[float]] = {}
    identical = True
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        path.write_text(json.dumps(truth))
        tasks = {"bbox": ("bbox",), "segm": ("segm",), "both": ("bbox", "segm")}
        os.environ["LOCO_DET_CACHE"] = str(cache := Path(folder) / "cache")
        for _ in range(args.rounds):
            for task, iou_types in tasks.items():
                for _ in range(FAST_PER_ROUND):
                    shutil.rmtree(cache, ignore_errors=True)
                    ours, spent = timed(evaluate_coco, path, results, iou_types)
                    seconds.setdefault((task, "hotcoco"), []).append(spent)
                theirs, spent = timed(by_hand, path, results, iou_types)
                seconds.setdefault((task, "pycocotools"), []).append(spent)
                identical &= same(ours, {iou_type: numbers_of(found) for iou_type, found in theirs.items()})
    median = {key: statistics.median(values) for key, values in seconds.items()}
    speedup = {task: median[task, "pycocotools"] / median[task, "hotcoco"] for task in tasks}
    figures = {
        "speedup": speedup["both"],
        "speedup_bbox": speedup["bbox"],
        "speedup_segm": speedup["segm"],
        "identical": identical,
        "seconds": {f"{task} {evaluator}": value for (task, evaluator), value in median.items()},
        "images": args.images,
        "annotations": len(truth["annotations"]),
        "detections": len(results),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(f"{args.images} images, {len(truth['annotations'])} objects, {len(results)} detections")
    print(f"every number identical: {identical}")
    rows = [[task, median[task, "pycocotools"], median[task, "hotcoco"], speedup[task]] for task in tasks]
    report(["", "pycocotools s", "hotcoco s", "speedup"], rows, figures, args.json)


if __name__ == "__main__":
    main()
