"""Batches of labelled images for training: a new random crop (8 to 100 % of the area) and flip in each epoch.

Shape legend: B images in a batch, S their side.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from loco_det.core.distributed import share_of
from loco_det.core.errors import UserError
from loco_det.core.workers import raising
from loco_det.evaluation.probes.images import LabelledImages
from loco_det.images.decode import decode_image
from loco_det.images.two_views import loader_of
from loco_det.images.views import crop_resize, draw_view, finish_view, view_config, view_draws

VIEWS = "random crops (8 to 100 % of the area) and flips, anew in each epoch"
CROP_AND_FLIP = {"JITTER_PROB": 0.0, "GRAY_PROB": 0.0, "BLUR_PROB": 0.0}


def steps_an_epoch(count: int, batch: int, drop_last: bool) -> int:
    """Return the batches per epoch of `count` images: `drop_last` drops an incomplete one, but keeps at least one."""
    return max(1, count // batch) if drop_last else -(-count // batch)


def crop_batches(
    images: LabelledImages, size: int, *, epochs: int, batch: int, seed: int, drop_last: bool, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of all epochs, each epoch in a new order; with several processes each one's share of a batch.

    Args:
        size: S.
        seed: seed of orders, crops and flips, which depend on nothing else, not on the number of workers.
        drop_last: drop an incomplete last batch.
        workers: number of data workers.

    Returns:
        (B, 3, S, S) uint8 RGB and (B,) int64 labels.

    Raises:
        UserError: an image cannot be read.
    """
    requests = _Requests(len(images), epochs, batch, seed, drop_last)
    return raising(loader_of(_Crops(images, size, seed), requests, workers, False))


class _Crops(Dataset):
    """[(epoch, row of `images`), ...] -> ((B, 3, S, S) uint8, (B,) labels), or the UserError that ends the run."""

    def __init__(self, images: LabelledImages, size: int, seed: int) -> None:
        self.images, self.seed = images, seed
        self.config = view_config(size, CROP_AND_FLIP)

    def __getitem__(self, requests: list[tuple[int, int]]) -> tuple[Tensor, Tensor] | UserError:
        out = np.empty((len(requests), 3, self.config.size, self.config.size), np.uint8)
        rows = [row for _, row in requests]
        try:
            for image, (epoch, row) in zip(out, requests):
                self._draw(image, epoch, int(self.images.index[row]))
        except UserError as error:
            return error
        return torch.from_numpy(out), torch.from_numpy(self.images.labels[rows])

    def _draw(self, out: np.ndarray, epoch: int, index: int) -> None:
        pixels = decode_image(self.images.source.read(index), self.images.source.name(index))
        draws, _ = view_draws(self.seed, epoch, index)
        params = draw_view(self.config, *pixels.shape[:2], draws)
        finish_view(crop_resize(pixels, params.crop, self.config.size), params, out)


class _Requests:
    """Yields (epoch, row) of every batch."""

    def __init__(self, count: int, epochs: int, batch: int, seed: int, drop_last: bool) -> None:
        self.count, self.epochs, self.batch, self.seed = count, epochs, batch, seed
        self.steps = steps_an_epoch(count, batch, drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng(self.seed)
        for epoch in range(self.epochs):
            order = rng.permutation(self.count)
            for step in range(self.steps):
                rows = order[step * self.batch : (step + 1) * self.batch]
                yield [(epoch, int(row)) for row in rows[share_of(len(rows))]]
