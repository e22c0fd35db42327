"""A made-up Cityscapes tree: small images of overlapping polygons, drawn as the benchmark's own tools draw them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from loco_det.annotations.cityscapes import CLASSES, LABELS

HEIGHT, WIDTH = 96, 160


def draw_ids(objects: list[dict[str, Any]], height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """instanceIds as cityscapesscripts/preparation/json2instanceImg.py makes them, (H, W) int32."""
    image = Image.new("I", (width, height), 0)
    pen, seen = ImageDraw.Draw(image), {}
    for entry in objects:
        if entry.get("deleted"):
            continue
        group = entry["label"] not in LABELS
        label = LABELS[entry["label"].removesuffix("group") if group else entry["label"]]
        value = label
        if not group and 24 <= label <= 33:
            value = label * 1000 + seen.get(label, 0)
            seen[label] = seen.get(label, 0) + 1
        if value >= 0:
            pen.polygon([tuple(point) for point in entry["polygon"]], fill=value)
    return np.array(image)


def random_objects(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Road first, then `count` polygons of things, stuff and groups at random places, large and tiny."""
    names = [
        *CLASSES.values(),
        "car",
        "person",
        "cargroup",
        "persongroup",
        "caravan",
        "dynamic",
        "sky",
        "license plate",
    ]
    objects: list[dict[str, Any]] = [{"label": "road", "polygon": [[0, 40], [WIDTH, 40], [WIDTH, HEIGHT], [0, HEIGHT]]}]
    for _ in range(count):
        centre = rng.integers((0, 0), (WIDTH, HEIGHT))
        radius = rng.integers(3, 26)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        points = np.clip(np.round(points), 0, (WIDTH - 1, HEIGHT - 1)).astype(int)
        if len(np.unique(points, axis=0)) > 2:
            objects.append({"label": names[rng.integers(len(names))], "polygon": points.tolist()})
    objects.append({"label": "car", "polygon": [[1, 1], [30, 1], [30, 20]], "deleted": 1})
    return objects


def write_frame(root: Path, split: str, city: str, number: int, objects: list[dict[str, Any]], seed: int = 0) -> str:
    """One image with its two annotation files; returns its name without suffixes."""
    name = f"{city}_{number:06d}_000019"
    ids = draw_ids(objects)
    rng = np.random.default_rng(seed + number)
    pixels = rng.integers(0, 90, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    pixels[..., 0] += ((ids % 37) * 4).astype(np.uint8)
    for kind, suffix in (("leftImg8bit", "leftImg8bit.png"), ("gtFine", "gtFine_polygons.json")):
        folder = root / kind / split / city
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "leftImg8bit":
            Image.fromarray(pixels).save(folder / f"{name}_{suffix}")
        else:
            content = {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}
            (folder / f"{name}_{suffix}").write_text(json.dumps(content))
            Image.fromarray(ids.astype(np.uint16)).save(folder / f"{name}_gtFine_instanceIds.png")
            Image.fromarray(np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)).save(
                folder / f"{name}_gtFine_labelIds.png"
            )
    return name


def write_cityscapes(datasets: Path, images: int = 4, seed: int = 0) -> Path:
    """`cityscapes` below `datasets` with train, val and test; returns it."""
    root, rng = datasets / "cityscapes", np.random.default_rng(seed)
    for split in ("train", "val", "test"):
        for number in range(images):
            objects = (
                random_objects(rng, 14)
                if split != "test"
                else [{"label": "out of roi", "polygon": [[0, 0], [9, 0], [9, 9]]}]
            )
            write_frame(root, split, ("aachen", "bochum")[number % 2], number, objects, seed)
    return root


def as_result(mask: np.ndarray, image_id: int, category_id: int, score: float) -> dict[str, Any]:
    """A COCO result of a (H, W) bool mask."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
    return {"image_id": image_id, "category_id": category_id, "score": score, "segmentation": segmentation}


def noisy_results(root: Path, annotations: Path, split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Detections near the truth of every image: shifted, doubled, of other classes, on void, empty, tied scores."""
    rng = np.random.default_rng(seed)
    results = []
    for entry in json.loads(annotations.read_text())["images"]:
        stem = entry["file_name"].removesuffix("_leftImg8bit.png")
        ids = np.array(Image.open(root / "gtFine" / split / f"{stem}_gtFine_instanceIds.png"))
        for value in np.unique(ids).tolist():
            label = value if value < 1000 else value // 1000
            if label not in (*CLASSES, 0, 5, 29):
                continue
            for _ in range(rng.integers(0, 4)):
                shift = rng.integers(-3, 4, 2) if rng.random() < 0.7 else (0, 0)
                mask = np.roll(ids == value, shift, (0, 1))
                category = label if label in CLASSES and rng.random() < 0.8 else int(rng.choice(list(CLASSES)))
                results.append(as_result(mask, entry["id"], category, round(float(rng.random()), 1)))
        results.append(as_result(np.zeros_like(ids, bool), entry["id"], 26, 0.99))
        results.append(as_result(rng.random(ids.shape) < 0.1, entry["id"], 24, 0.5))
    return results
