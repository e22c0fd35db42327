"""A made-up LVIS set: rare and common classes, images annotated for some of them only, results of all kinds.

No mask fills its box, a result's mask is moved on its own, and one image has more results than count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

SIDE, CLASSES, CROWD = 240, 9, 380
FREQUENCIES = ("r", "c", "f")


def made_up(seed: int, images: int = 12) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(content of an annotation file, results with boxes and masks)."""
    rng = np.random.default_rng(seed)
    categories = [
        {"id": 3 * k + 2, "name": f"class {k}", "frequency": FREQUENCIES[k % 3], "image_count": 1, "instance_count": 1}
        for k in range(CLASSES)
    ]
    listed, annotations, results = [], [], []
    for number in range(1, images + 1):
        present = rng.choice(CLASSES, rng.integers(1, 5), replace=False).tolist()
        absent = [k for k in range(CLASSES) if k not in present]
        listed.append(
            {
                "id": 7 * number,
                "width": SIDE,
                "height": SIDE,
                "coco_url": f"http://images.cocodataset.org/val2017/{number:012d}.jpg",
                "neg_category_ids": [3 * k + 2 for k in rng.choice(absent, 2, replace=False).tolist()],
                "not_exhaustive_category_ids": [3 * k + 2 for k in present if rng.random() < 0.3],
            }
        )
        for k in present:
            for _ in range(rng.integers(1, 4)):
                box = rectangle(rng)
                polygon = outline(box, rng)
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": 7 * number, "category_id": 3 * k + 2, "bbox": box,
                     "area": float(coco_mask.area(encoded(polygon))), "segmentation": [polygon]}
                )  # fmt: skip
                for _ in range(rng.integers(0, 3)):
                    moved = [v + float(rng.integers(-4, 5)) for v in box[:2]] + box[2:]
                    category = k if rng.random() < 0.8 else int(rng.integers(CLASSES))
                    score = round(float(rng.random()), 2)
                    shifted = [v + float(rng.integers(-3, 4)) for v in polygon]
                    results.append(result(7 * number, 3 * category + 2, score, moved, shifted))
        for _ in range(CROWD if number == 1 else 3):
            box = rectangle(rng)
            score = round(0.2 + 0.8 * float(rng.random()), 2)
            results.append(result(7 * number, 3 * int(rng.integers(CLASSES)) + 2, score, box, outline(box, rng)))
    return {"images": listed, "annotations": annotations, "categories": categories}, results


def rectangle(rng: np.random.Generator) -> list[float]:
    """x, y, w, h: small, medium and large ones."""
    side = rng.integers((6, 6), (220, 220))
    corner = rng.integers((4, 4), SIDE - 4 - side)
    return [float(v) for v in (*corner, *side)]


def outline(box: list[float], rng: np.random.Generator) -> list[float]:
    """A polygon with one corner on each side of the box."""
    x, y, w, h = box
    (top, bottom), (right, left) = rng.integers(1, w, 2).tolist(), rng.integers(1, h, 2).tolist()
    return [x + top, y, x + w, y + right, x + bottom, y + h, x, y + left]


def encoded(polygon: list[float]) -> dict[str, Any]:
    return coco_mask.frPyObjects([polygon], SIDE, SIDE)[0]


def result(image_id: int, category_id: int, score: float, box: list[float], polygon: list[float]) -> dict[str, Any]:
    rle = encoded(polygon)
    segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, "segmentation": segmentation}
