"""Cityscapes instance AP: this package's matching against the benchmark's own code, on the same made-up results.

Images of 1024 x 2048 with 20 objects and 60 detections each; both sides from the same results in memory to the same
numbers, which are compared with ==, taking turns in one process; medians. Needs the extra cityscapes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import _common
import cv2
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.annotations.cityscapes import CLASSES, cityscapes_frames, coco_format
from loco_det.core.files import write_json
from loco_det.core.log import setup_logging
from loco_det.evaluation.cityscapes import evaluate_cityscapes

HEIGHT, WIDTH = 1024, 2048


def draw(rng: np.random.Generator, objects: int) -> np.ndarray:
    """(H, W) uint16 instance ids: ellipses over road."""
    ids = np.full((HEIGHT, WIDTH), 7, np.uint16)
    ids[:100] = 5
    for number in range(objects):
        value = int(rng.choice(list(CLASSES))) * 1000 + number
        centre, axes = rng.integers((0, 0), (WIDTH, HEIGHT)).tolist(), rng.integers(12, 110, 2).tolist()
        cv2.ellipse(ids, centre, axes, float(rng.uniform(0, 180)), 0, 360, value, -1)
    return ids


def detect(rng: np.random.Generator, ids: np.ndarray, image_id: int, detections: int) -> list[dict]:
    """Results at objects of the image, a little shifted, some of another class."""
    present = [value for value in np.unique(ids).tolist() if value >= 1000]
    results = []
    for _ in range(detections):
        value = int(rng.choice(present))
        mask = np.roll(ids == value, rng.integers(-12, 13, 2), (0, 1))
        encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        label = value // 1000 if rng.random() < 0.8 else int(rng.choice(list(CLASSES)))
        segmentation = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
        results.append(
            {"image_id": image_id, "category_id": label, "score": float(rng.random()), "segmentation": segmentation}
        )
    return results


def make(root: Path, images: int) -> tuple[Path, list[dict]]:
    """The made-up val split below `root`; returns its annotation file and the results."""
    rng, results = np.random.default_rng(0), []
    for number in range(images):
        ids, name = draw(rng, 20), f"ulm_{number:06d}_000019"
        for kind, suffix, content in (
            ("leftImg8bit", "leftImg8bit", np.zeros((8, 8), np.uint8)),
            ("gtFine", "gtFine_instanceIds", ids),
        ):
            (root / kind / "val" / "ulm").mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / kind / "val" / "ulm" / f"{name}_{suffix}.png"), content)
        results += detect(rng, ids, number + 1, 60)
    annotations = root / "annotations.json"
    write_json(
        annotations, coco_format(cityscapes_frames(root, "val"), root / "leftImg8bit" / "val", from_polygons=False)
    )
    return annotations, results


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    setup_logging(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        annotations, results = make(Path(folder), args.images)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        numbers = {}
        for _ in range(args.repeats):
            for official in (True, False):
                begun = time.perf_counter()
                images = Path(folder) / "leftImg8bit" / "val"
                numbers[official] = evaluate_cityscapes(annotations, images, results, official=official)["segm"]
                seconds[official].append(time.perf_counter() - begun)
    same = all(a == b or (a != a and b != b) for a, b in zip(numbers[True].values(), numbers[False].values()))
    official, ours = (statistics.median(seconds[side]) / args.images for side in (True, False))
    figures = {
        "images": args.images,
        "cores": os.cpu_count(),
        "cityscapesscripts_seconds_per_image": official,
        "loco_det_seconds_per_image": ours,
        "speedup": official / ours,
        "identical": same,
        "AP": numbers[False]["AP"],
    }
    rows = [["cityscapesscripts", official], ["loco_det", ours], ["ratio", official / ours], ["identical", same]]
    _common.report(["evaluator", "s an image"], rows, figures, args.json)


if __name__ == "__main__":
    main()
