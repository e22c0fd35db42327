"""Made-up images that the tests of the pretraining data share."""

from __future__ import annotations

import io
import itertools

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image

from loco_det.images import views
from loco_det.images.folders import open_source
from loco_det.images.two_views import TwoViews, build_two_view_loader

SIZE = 24  # of the loaders' views
AUGMENTED = ({"AUGMENT__DEVICE": "workers"}, {"AUGMENT__DEVICE": "cpu"})  # where that happens


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: large soft shapes, edges, texture and all colours, as a photograph has."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.zeros((height, width, 3))
    for _ in range(12):
        wave = rng.uniform(-14, 14, 2)
        image += rng.normal(0, 40, 3) * np.sin(wave[0] * x + wave[1] * y + rng.uniform(0, 6.3))[..., None]
    for _ in range(8):
        centre, radius = rng.uniform(0, 1, 2), rng.uniform(0.03, 0.2)
        inside = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
        image[inside] = rng.uniform(-128, 128, 3)
    image += 128 + rng.normal(0, 6, image.shape)
    image = image.clip(0, 255).astype(np.uint8)
    return image


def encode(image: np.ndarray | Image.Image, file_format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if file_format == "JPEG":
        options.setdefault("quality", 95)
    image.save(file, file_format, **options)
    return file.getvalue()


def view(image: np.ndarray, params: views.ViewParams, size: int, reduce: int = 1) -> np.ndarray:
    """The (size, size, 3) view that `params`, drawn for the whole image, make of `image` at 1/reduce of it."""
    out = np.zeros((3, size, size), np.uint8)
    views.finish_view(views.crop_resize(image, views._reduced(params.crop, reduce, image.shape), size), params, out)
    return out.transpose(1, 2, 0)


def two_views(data: bytes, name: str, config: views.ViewConfig, seed: int, epoch: int, index: int) -> np.ndarray:
    """The (2, size, size, 3) views that `views.two_views` writes."""
    out = np.zeros((2, 3, config.size, config.size), np.uint8)
    views.two_views(data, name, config, seed, epoch, index, out)
    return out.transpose(0, 2, 3, 1)


def config(path: object, **changes) -> CfgNode:
    """What the two-view loaders read of a configuration; `DATA__IMAGE_SIZE=32` changes a key."""
    cfg = CfgNode(
        {
            "DATA": {
                "PATH": str(path),
                "IMAGE_SIZE": SIZE,
                "NUM_WORKERS": 0,
                "MAX_BAD_SHARE": 0.01,
                "SHUFFLE_BUFFER": 12,
            },
            "AUGMENT": {"DEVICE": "workers", "PRESET": "simclr"},
            "SOLVER": {"BATCH_SIZE": 8},
            "SEED": 5,
            "DEVICE": "cpu",
        }
    )
    cfg.merge_from_list([value for pair in changes.items() for value in (pair[0].replace("__", "."), pair[1])])
    return cfg


def steps(path: object, count: int, start: int = 0, *, rank: int = 0, world_size: int = 1, **changes) -> list[TwoViews]:
    cfg = config(path, **changes)
    loader = build_two_view_loader(cfg, open_source(cfg.DATA.PATH), rank=rank, world_size=world_size)
    return list(itertools.islice(loader.batches(start), count))


def assert_same(a: list[TwoViews], b: list[TwoViews]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b):
        for x, y in zip(left, right):
            assert torch.equal(x, y)
