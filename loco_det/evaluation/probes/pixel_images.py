"""The images of a dense probe, whose masks have a class for each pixel, split into training and test images.

`--data` and `--val` take what the pixel data sets of this package are called by (`annotations/registry.py`): folders by
path, MASKS@IMAGES, and Cityscapes by name. Without `--val` a fifth of the images is held out by a seeded rule.

Images are scaled to S x S pixels, the aspect ratio not kept, so that every pixel of the mask counts; masks keep their
own H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data

from loco_det.annotations.pixels import IGNORED
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.annotations.subsets import hashed_order, part_size
from loco_det.core.errors import UserError
from loco_det.core.workers import raising
from loco_det.evaluation.probes.images import TEST_SHARE
from loco_det.images.decode import decode_image, read_file
from loco_det.images.two_views import loader_of
from loco_det.images.views import crop_resize


@dataclass(frozen=True)
class PixelImages:
    """Some images of a data set of pixel labels.

    Attributes:
        rows: (n,) int64, positions in the data set's index.
        table: (256,) uint8, the probe's class, or IGNORED, of each class of the data set.
    """

    dataset: Dataset
    rows: np.ndarray
    table: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def classes(self) -> np.ndarray:
        """The probe's classes that the data set names, ascending."""
        return np.unique(self.table[self.table != IGNORED])

    @cached_property
    def names(self) -> list[str]:
        """The file names below the data set's folder of images."""
        names = self.dataset.index.file_name
        return [names[row] for row in self.rows.tolist()]

    def take(self, places: np.ndarray) -> PixelImages:
        """The images at `places`, ascending or not."""
        return replace(self, rows=self.rows[places])

    def part(self, share: float, seed: int) -> np.ndarray:
        """Ascending places of a share of the images, by `hashed_order` of their names."""
        return np.sort(hashed_order(self.names, seed)[: part_size(share, len(self))])

    def read(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, (H, W, 3) uint8 RGB, and its classes or IGNORED, (H, W) uint8.

        Raises:
            UserError: one of the files is missing or unreadable, or their sizes differ.
        """
        path = self.dataset.images / self.names[place]
        pixels = decode_image(read_file(path), str(path))
        return pixels, self.table[self.dataset.labels.read(path, pixels.shape[:2])]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "names"}


class PixelData(NamedTuple):
    """Training and test images; `split` describes the origin of the test images."""

    classes: tuple[str, ...]
    train: PixelImages
    test: PixelImages
    split: str


def open_pixel_data(path: str, val: str | None = None, *, limit: int = 0, seed: int = 0) -> PixelData:
    """Open the data sets called `path` and, of test images, `val`.

    Args:
        limit: maximum of images of each; 0 for all.
        seed: seed of the split and of `limit`.

    Raises:
        UserError: no such data set, no pixel labels, classes of the test images that the others lack, or fewer than
            two training images or classes.
    """
    dataset = _find(path, "--data")
    classes = dataset.index.category_names
    train, split = _images(dataset, classes, "--data"), f"--val {val}"
    if len(classes) < 2:
        raise UserError(f"--data {path}: has only the class {classes[0]!r}, so there is nothing to tell apart")
    if val is not None:
        test = _images(_find(val, "--val"), classes, "--val")
    else:
        held = train.part(TEST_SHARE, seed)
        train, test = train.take(np.setdiff1d(np.arange(len(train)), held)), train.take(held)
        split = f"{TEST_SHARE:.0%} of the images held out by seed {seed}, for there is no --val"
    if limit:
        train, test = (half.take(half.part(min(1.0, limit / len(half)), seed)) for half in (train, test))
    if len(train) < 2:
        raise UserError(
            f"--data {path}: leaves {len(train)} training images; give at least two, beside the test images"
        )
    return PixelData(classes, train, test, split)


def _find(name: str, option: str) -> Dataset:
    try:
        dataset = find_dataset(name)
    except UserError as error:  # its message names the configuration's key
        raise UserError(str(error).replace("DATASETS:", option)) from error
    if not dataset.is_pixels:
        raise UserError(
            f"{option} {name}: has objects and no pixel labels; give them by path as MASKS@IMAGES, e.g. "
            "street/masks@street/images, or Cityscapes by name"
        )
    if dataset.secret:
        raise UserError(f"{option} {name}: the labels of these images are not public; take the val split")
    return dataset


def _images(dataset: Dataset, classes: Sequence[str], option: str) -> PixelImages:
    table = np.full(256, IGNORED, np.uint8)
    for number, name in enumerate(dataset.index.category_names):
        if name not in classes:
            raise UserError(
                f"{option} {dataset.name}: class {name!r} is not among the training classes; name the classes of both "
                "alike in classes.txt"
            )
        table[number] = classes.index(name)
    return PixelImages(dataset, np.arange(len(dataset.index.image_id)), table)


# --- batches ----------------------------------------------------------------------------------------------------


class PixelBatch(NamedTuple):
    """Some images; `targets` has of each mask what the loader's `target` makes of it."""

    images: Tensor  # (B, 3, S, S) uint8 RGB
    targets: list[Any]
    places: list[int]


def pixel_batches(
    images: PixelImages,
    size: int,
    target: Callable[[np.ndarray], Any],
    *,
    batch: int,
    workers: int,
    order: np.ndarray | None = None,
) -> Iterator[PixelBatch]:
    """Yield the images in batches, in `order` (places; default as they are).

    Args:
        size: S.
        target: what to make of an image's (H, W) uint8 classes; computed in the workers, so it can be pickled.

    Raises:
        UserError: an image or mask cannot be read.
    """
    places = np.arange(len(images)) if order is None else order
    requests = [places[at : at + batch].tolist() for at in range(0, len(places), batch)]
    return raising(loader_of(_Samples(images, size, target), requests, workers, False))


class _Samples(torch_data.Dataset):
    """[place, ...] -> PixelBatch, or the UserError that ends the run."""

    def __init__(self, images: PixelImages, size: int, target: Callable[[np.ndarray], Any]) -> None:
        self.images, self.size, self.target = images, size, target

    def __getitem__(self, places: list[int]) -> PixelBatch | UserError:
        pixels = np.empty((len(places), self.size, self.size, 3), np.uint8)
        targets = []
        try:
            for out, place in zip(pixels, places):
                image, mask = self.images.read(place)
                out[:] = crop_resize(image, (0, 0, *image.shape[:2]), self.size)
                targets.append(self.target(mask))
        except UserError as error:
            return error
        return PixelBatch(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), targets, places)


def patch_counts(mask: np.ndarray, grid: int, classes: int) -> Tensor:
    """Count the pixels of each class in each of grid x grid equal cells of a mask.

    A pixel belongs to the cell that its centre is in. Ignored pixels count for nothing.

    Args:
        mask: (H, W) uint8 classes or IGNORED.

    Returns:
        (grid * grid, classes) float32.
    """
    rows, columns = ((2 * np.arange(side) + 1) * grid // (2 * side) for side in mask.shape)
    bins = (rows * grid)[:, None] + columns
    bins = bins * (classes + 1) + np.minimum(mask, classes)
    counts = np.bincount(bins.ravel(), minlength=grid * grid * (classes + 1)).reshape(grid * grid, classes + 1)
    return torch.from_numpy(counts[:, :-1].astype(np.float32))


def scaled_mask(mask: np.ndarray, size: int) -> Tensor:
    """The (size, size) uint8 pixels of a mask that are nearest to those of its image scaled to `size`."""
    rows, columns = ((2 * np.arange(size) + 1) * side // (2 * size) for side in mask.shape)
    return torch.from_numpy(mask[rows[:, None], columns])
