"""A made-up detection set: textured shapes over clutter, in COCO format, from a seed.

A class is a shape with a texture: a striped disc and a dotted disc are two classes, and so are a striped disc and a
striped star. Colours carry no class information, and plain shapes and textured blobs of no class lie between the
objects. Each image is a scene: its objects share the class and the grain of their textures, while every object has
random colours and all images have similar grey clouds. So colour and brightness, which dominate an untrained network's
features, are noise here, and what two crops of an image share, which contrastive learning finds, is what distinguishes
the classes.

Objects occlude each other; masks are the visible parts, pixel-exact (RLE, so train on them with INPUT.MASK_FORMAT
bitmask).

Shape legend: S the side of an image in pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.annotations.registry import Dataset
from loco_det.core.errors import UserError

SHAPES = ("disc", "star", "cross")
TEXTURES = ("striped", "dotted")
CLASSES = tuple((shape, texture) for shape in SHAPES for texture in TEXTURES)
CLASS_NAMES = tuple(f"{texture} {shape}" for shape, texture in CLASSES)
# Distractors: class shapes without texture, and class textures on a shapeless blob.
DISTRACTORS = (*((shape, "plain") for shape in SHAPES), *(("blob", texture) for texture in TEXTURES))

GREYS = (90.0, 165.0)  # the darkest and lightest cloud
LEAST_VISIBLE = 0.4  # share of an object that must stay visible
VERSION = 2  # of the drawing; increase when the images change


class Grain(NamedTuple):
    """Period and direction of a scene's textures."""

    period: float  # pixels
    turn: float  # radians


def make_shapes_dataset(
    root: str | Path, train: int = 400, val: int = 100, size: int = 128, seed: int = 0
) -> dict[str, Dataset]:
    """Draw the set in ROOT/shapes, where `find_dataset` expects shapes_train and shapes_val; see `draw_shapes`.

    Args:
        train, val: number of images.

    Returns:
        The paths of "shapes_train" and "shapes_val".
    """
    folder, splits = Path(root) / "shapes", {"train": train, "val": val}
    draw_shapes(folder, splits, size, seed)
    return {
        f"shapes_{split}": Dataset(f"shapes_{split}", folder / split, _annotation_file(folder, split))
        for split in splits
    }


def draw_shapes(folder: Path, splits: Mapping[str, int], size: int = 128, seed: int = 0) -> None:
    """Draw the set in COCO's layout: the images of a split in FOLDER/SPLIT, FOLDER/annotations/instances_SPLIT.json.

    The same arguments give the same pixels. An existing set with the same arguments is kept.

    Args:
        splits: the number of images of each.
        size: S, at least 48.
        seed: at least 0.

    Raises:
        UserError: invalid numbers or size, or the folder holds something else or cannot be written.
    """
    numbers = ", ".join(f"{split} {count}" for split, count in splits.items())
    if min(splits.values()) < 1 or size < 48:
        raise UserError(
            f"The made-up set needs an image or more in each split, of 48 pixels or more, not {numbers}, size {size}."
        )
    made_by = f"loco_det made-up shapes {VERSION}: {numbers}, size {size}, seed {seed}"
    # Drawn in a temporary folder and renamed, so that an interrupted run leaves no incomplete set.
    half = folder.parent / f".{folder.name}.half"
    try:
        if folder.exists() and any(folder.iterdir()):
            if all(_made_by(_annotation_file(folder, split)) == made_by for split in splits):
                return
            raise UserError(f"{folder} exists and is not '{made_by}'; remove it or choose another folder.")
        shutil.rmtree(half, ignore_errors=True)
        for number, (split, count) in enumerate(splits.items()):
            _make_split(half, split, count, size, (seed, number), made_by)
        if folder.exists():
            folder.rmdir()
        half.rename(folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}); free space or choose another folder."
        ) from None


def _annotation_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def draw_image(size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one image.

    Returns:
        (S, S, 3) uint8 pixels, and each object's class and (S, S) bool visible part.
    """
    image = _background(size, rng)
    theme = int(rng.integers(len(CLASSES)))
    grain = Grain(rng.uniform(0.06, 0.14) * size, rng.uniform(0, 2 * np.pi))
    wanted = [(theme, *CLASSES[theme])] * int(rng.integers(5, 9))
    wanted += [(-1, *DISTRACTORS[k]) for k in rng.integers(0, len(DISTRACTORS), int(rng.integers(0, 2)))]
    placed: list[tuple[int, np.ndarray, int]] = []  # class, visible part, total pixels
    for kind, shape, texture in (wanted[k] for k in rng.permutation(len(wanted))):
        for _ in range(8):
            centre, radius = rng.uniform(0.1, 0.9, 2) * size, rng.uniform(0.12, 0.2) * size
            alpha = _shape(shape, centre, radius, size, rng)
            covered = alpha > 0.5
            rest = [visible & ~covered for _, visible, _ in placed]
            if all(r.sum() >= LEAST_VISIBLE * whole for r, (_, _, whole) in zip(rest, placed)):
                image += alpha[..., None] * (_texture(texture, grain, size, rng) - image)
                placed = [(k, r, whole) for r, (k, _, whole) in zip(rest, placed)]
                placed.append((kind, covered, int(covered.sum())))
                break
    image += rng.normal(0, 6, image.shape)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return pixels, [(kind, visible) for kind, visible, _ in placed if kind >= 0]


def _make_split(folder: Path, split: str, count: int, size: int, seed: tuple[int, int], made_by: str) -> None:
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    for i in range(count):
        pixels, objects = draw_image(size, np.random.default_rng([*seed, i]))
        name = f"{i:06d}.png"
        (folder / split / name).write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        images.append({"id": i + 1, "file_name": name, "height": size, "width": size})
        for kind, visible in objects:
            annotations.append(_annotation(len(annotations) + 1, i + 1, kind, visible))
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASS_NAMES)]
    content = {
        "info": {"description": made_by},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (folder / "annotations").mkdir(exist_ok=True)
    _annotation_file(folder, split).write_bytes(msgspec.json.encode(content))


def _annotation(number: int, image: int, kind: int, visible: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(visible.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": kind + 1,
        "iscrowd": 0,
        "area": float(visible.sum()),
        "bbox": [float(v) for v in coco_mask.toBbox(rle)],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }


def _made_by(annotations: Path) -> str | None:
    try:
        return msgspec.json.decode(annotations.read_bytes())["info"]["description"]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _colours(rng: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw two colours (3,) in 0-255 whose greys differ by at least `contrast`, so that textures survive greyscale."""
    while True:
        one, other = rng.uniform(0, 255, (2, 3))
        if abs(one.mean() - other.mean()) >= contrast:
            return one, other


def _noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return an (S, S) smooth random field in about 0-1 with `cells` bumps along a side."""
    return cv2.resize(rng.random((cells, cells)), (size, size), interpolation=cv2.INTER_CUBIC)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S, 3) float64: grey clouds with strokes and spots of random colours, similar in all images."""
    cloud = 0.7 * _noise(size, 4, rng) + 0.3 * _noise(size, max(size // 6, 4), rng)
    image = np.repeat((GREYS[0] + (GREYS[1] - GREYS[0]) * cloud)[..., None], 3, axis=2)
    for _ in range(12):
        colour = tuple(rng.uniform(0, 255, 3))
        start, end = rng.uniform(0, size, (2, 2))
        end = start + (end - start) * 0.4
        if rng.random() < 0.5:
            points = (tuple(start.astype(int).tolist()), tuple(end.astype(int).tolist()))
            cv2.line(image, *points, colour, int(rng.integers(1, 3)))
        else:
            cv2.circle(image, tuple(start.astype(int).tolist()), int(rng.integers(2, 4)), colour, -1)
    return image


def _shape(kind: str, centre: np.ndarray, radius: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S) float64 in 0-1: the share of each pixel that the shape covers."""
    if kind == "disc":
        angle, length = np.linspace(0, 2 * np.pi, 48, endpoint=False), np.ones(48)
    elif kind == "star":
        angle, length = np.linspace(0, 2 * np.pi, 10, endpoint=False), np.where(np.arange(10) % 2, 0.42, 1.15)
    elif kind == "cross":
        arm = np.arctan2(0.34, 1.0)
        angle = (np.array([-arm, arm, np.pi / 4]) + np.pi / 2 * np.arange(4)[:, None]).reshape(-1)
        length = np.tile([1.06, 1.06, 0.34 * 2**0.5], 4)
    elif kind == "blob":
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        length = 0.75 + sum(rng.uniform(0.05, 0.2) * np.sin(k * angle + rng.uniform(0, 6.3)) for k in (2, 3))
    else:
        raise ValueError(kind)
    angle = angle + rng.uniform(0, 2 * np.pi)
    points = centre + radius * length[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    fine = np.zeros((4 * size, 4 * size), dtype=np.uint8)
    cv2.fillPoly(fine, [np.round(points * 4 - 0.5).astype(np.int32)], 255)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA) / 255.0


def _texture(kind: str, grain: Grain, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return (S, S, 3) float64: a texture over the whole image."""
    one, other = _colours(rng, 60)
    y, x = np.mgrid[:size, :size] * (2 * np.pi / grain.period)
    u = x * np.cos(grain.turn) + y * np.sin(grain.turn) + rng.uniform(0, 2 * np.pi)
    v = y * np.cos(grain.turn) - x * np.sin(grain.turn) + rng.uniform(0, 2 * np.pi)
    if kind == "striped":
        wave = np.sin(u)
    elif kind == "dotted":
        wave = np.sin(u) + np.sin(v) - 0.4
    elif kind == "plain":
        wave = 0.4 * (_noise(size, 3, rng) - 0.5)
    else:
        raise ValueError(kind)
    return one + (other - one) * (0.5 + 0.5 * np.tanh(3 * wave))[..., None]
