"""Loaders: endless, resumable batches of two views per image, for pretraining; plain views in order, for probes.

Shape legend: B images in this process's batch, S the view's side; views are uint8 RGB, (2, B, 3, S, S), and plain
images (B, 3, S, S), for `views.normalise` on the device.

Step t of a run is batch t % steps_per_epoch of epoch t // steps_per_epoch. Its content is a function of (data, seed, t)
only: workers only decide who computes it, ranks split the same global batch, and resuming means starting at t. Workers
continue across epochs, so that small sets do not wait for the queue to refill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from loco_det.core import distributed
from loco_det.core.device import keep_freed_memory, loader_workers, local_processes, resolve_device
from loco_det.core.errors import UserError
from loco_det.core.launch import leave_stopping_to_parent
from loco_det.core.workers import check_shared_memory, raising, shared
from loco_det.images.batched_views import packed
from loco_det.images.batches import TwoViews, WorkerResult, deliver_decoded, deliver_views, joined, prefetch
from loco_det.images.decode import decode_image
from loco_det.images.source import Source
from loco_det.images.tar import TarSource
from loco_det.images.unusable import SUBSTITUTES, Unusable
from loco_det.images.views import (
    Ahead,
    ViewConfig,
    ViewParams,
    crop_resize,
    decode_and_draw,
    draw_ahead,
    finish_view,
    stream,
    view_config,
)

_TOGETHER = 16  # images whose crops are held before augmentation
_ORDER_STREAM = 2**63  # a counter beyond any image's index


class PlainBatch(NamedTuple):
    """Images for a probe."""

    images: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,) int64, -1 without labels
    index: Tensor  # (B,) int64


class _ViewDataset(Dataset):
    """(epoch, image indices) -> WorkerResult."""

    def __init__(self, source: Source, config: ViewConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed

    def __getitem__(self, request: tuple[int, Sequence[int]]) -> WorkerResult:
        epoch, indices = request
        try:
            return self.process(epoch, ((int(index), None) for index in indices), len(indices))
        except UserError as error:
            return error

    def process(self, epoch: int, images: Iterable[tuple[int, bytes | None]], count: int) -> WorkerResult:
        """Process `count` images, each given by its index and, if already read, its bytes.

        Raises:
            UserError: an image and all its possible substitutes are unreadable.
        """
        raise NotImplementedError

    def _decoded(
        self,
        epoch: int,
        index: int,
        data: bytes | None,
        ahead: Ahead | None,
        used: list[int],
        bad: list[tuple[int, str]],
    ) -> tuple[np.ndarray, list[tuple[int, int, int, int]], list[ViewParams]]:
        """Return `decode_and_draw` of an image or else of the next readable one; appends its index to `used`.

        Raises:
            UserError: none is readable.
        """
        tried = min(SUBSTITUTES, len(self.source))
        for image in ((index + substitute) % len(self.source) for substitute in range(tried)):
            try:
                data = self.source.read(image) if data is None else data
                # Use the original image's draws, else a neighbour would come twice with the same views.
                made = decode_and_draw(data, self.source.name(image), self.config, self.seed, epoch, index, ahead)
                used.append(image)
                return made
            except UserError as error:
                bad.append((image, str(error)))
                data = ahead = None
        others = f" (nor can {tried - 1} others in its place)" if tried > 1 else ""
        raise UserError(f"{bad[-tried][1].rstrip('.')}{others}")


class DecodedDataset(_ViewDataset):
    """Returns decoded images, for `batched_views.make_views`."""

    def process(self, epoch: int, images: Iterable[tuple[int, bytes | None]], count: int) -> WorkerResult:
        used, bad = [], []
        decoded = [self._decoded(epoch, *image, None, used, bad) for image in images]
        return packed(decoded, used), bad


class TwoViewDataset(_ViewDataset):
    """Returns finished views."""

    def process(self, epoch: int, images: Iterable[tuple[int, bytes | None]], count: int) -> WorkerResult:
        size, images = self.config.size, iter(images)
        views = torch.empty(2, count, 3, size, size, dtype=torch.uint8)
        used, bad, row = [], [], 0
        # Each kind of work runs on several images before the next: after a decoding the caches hold neither the
        # interpreter nor the augmentation code, and everything that follows takes half as long again.
        while group := list(islice(images, _TOGETHER)):
            ahead = [self._drawn(epoch, index, data) for index, data in group]
            cropped = [
                self._cropped(*self._decoded(epoch, index, data, known, used, bad))
                for (index, _), (data, known) in zip(group, ahead)
            ]
            for crops, pair in cropped:
                for crop, params, planes in zip(crops, pair, views.numpy()[:, row]):
                    finish_view(crop, params, planes)
                row += 1
        return TwoViews(views, torch.tensor(used)), bad

    def _cropped(
        self, image: np.ndarray, crops: list[tuple[int, int, int, int]], pair: list[ViewParams]
    ) -> tuple[list[np.ndarray], list[ViewParams]]:
        """Return the resized crops, and release the image."""
        return [crop_resize(image, crop, self.config.size) for crop in crops], pair

    def _drawn(self, epoch: int, index: int, data: bytes | None) -> tuple[bytes | None, Ahead | None]:
        """Return an image's bytes and its views' parameters, as far as available; `_decoded` reports errors."""
        try:
            data = self.source.read(index) if data is None else data
        except UserError:
            return None, None
        return data, draw_ahead(data, self.config, self.seed, epoch, index)


class _Steps:
    """Endless (epoch, this rank's image indices) from `start` on, in a new order for every epoch."""

    def __init__(self, images: int, batch: int, seed: int, rank: int, world_size: int) -> None:
        self.images, self.batch, self.seed, self.rank, self.world_size = images, batch, seed, rank, world_size
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        whole = self.batch * self.world_size
        step, steps_per_epoch, order = self.start, self.images // whole, None
        while True:
            epoch, position = divmod(step, steps_per_epoch)
            if order is None or position == 0:
                order = epoch_order(self.images, self.seed, epoch)
            first = position * whole + self.rank * self.batch
            yield epoch, order[first : first + self.batch]
            step += 1


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """Return the (images,) int64 permutation of one epoch."""
    return stream(seed, epoch, _ORDER_STREAM).permutation(images)


class TarViews(IterableDataset):
    """Endless WorkerResults of this worker's runs of tar shards; see images/tar.py.

    Args:
        batch: images per step of this rank.
        start: the first step.
    """

    def __init__(
        self, dataset: _ViewDataset, batch: int, buffer: int, rank: int, world_size: int, start: int = 0
    ) -> None:
        self.dataset, self.start = dataset, start
        self.source: TarSource = dataset.source
        self.runs = self.source.runs(batch * world_size, world_size)
        self.own = np.arange(self.runs).reshape(world_size, -1)[rank]
        self.share = batch // len(self.own)  # images per step and run
        self.steps = len(self.source) // (batch * world_size)
        self.buffer = max(1, buffer // self.runs)

    def __iter__(self) -> Iterator[WorkerResult]:
        worker = get_worker_info()
        own = self.own if worker is None else np.array_split(self.own, worker.num_workers)[worker.id]
        step, runs = self.start, None
        while True:
            epoch, position = divmod(step, self.steps)
            if runs is None or position == 0:
                runs = [self._run(int(number), epoch, position) for number in own]
            images = (next(run) for run in runs for _ in range(self.share))
            try:
                yield self.dataset.process(epoch, images, self.share * len(own))
            except UserError as error:
                yield error
            step += 1

    def _run(self, number: int, epoch: int, position: int) -> Iterator[tuple[int, bytes]]:
        return self.source.run(
            number,
            self.steps * self.share,
            buffer=self.buffer,
            seed=self.dataset.seed,
            epoch=epoch,
            first=position * self.share,
        )


class TwoViewLoader:
    """Iterates over a run's steps; see `build_two_view_loader`.

    Attributes:
        steps_per_epoch: whole global batches in the data; the remaining images differ between epochs.
        bad: unreadable images found so far by this process, index -> reason.
    """

    def __init__(
        self,
        source: Source,
        steps_per_epoch: int,
        max_bad_share: float,
        results: Callable[[int], Iterator[WorkerResult]],
    ) -> None:
        self.source, self.steps_per_epoch = source, steps_per_epoch
        self.bad = Unusable(len(source), max_bad_share, f"DATA.PATH {source.root}", "DATA.MAX_BAD_SHARE")
        self._results = results

    def batches(self, start: int = 0) -> Iterator[TwoViews]:
        """Yield the batches of steps start, start + 1, ... without end.

        Raises:
            UserError: more than DATA.MAX_BAD_SHARE of the images are unreadable.
        """
        for views, bad in raising(self._results(start)):
            self.bad.count(bad)
            yield views


def build_two_view_loader(
    cfg: CfgNode, source: Source, *, rank: int | None = None, world_size: int | None = None
) -> TwoViewLoader:
    """Build the loader for AUGMENT.*, DATA.*, SOLVER.BATCH_SIZE, SEED and DEVICE; its views are on that device.

    Args:
        cfg: a pretraining configuration; SOLVER.BATCH_SIZE counts images of all ranks.
        rank: this process's rank; default torch.distributed's, like `world_size`.

    Raises:
        UserError: an invalid value, or fewer images than one batch; names the key.
    """
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    batch = cfg.SOLVER.BATCH_SIZE
    if batch < 1 or batch % world_size:
        raise UserError(f"SOLVER.BATCH_SIZE is {batch}; use a multiple of {world_size} processes")
    if batch > len(source):
        fits = f"SOLVER.BATCH_SIZE {_fitting_batch(len(source), world_size)}"
        raise UserError(
            f"SOLVER.BATCH_SIZE is {batch} but DATA.PATH {source.root} has {len(source)} images; add {fits}", add=fits
        )
    if not 0 <= cfg.DATA.MAX_BAD_SHARE <= 1:
        raise UserError(f"DATA.MAX_BAD_SHARE is {cfg.DATA.MAX_BAD_SHARE}; use a share from 0 to 1")
    device = resolve_device(cfg.DEVICE)
    makes = augmenting_device(cfg.AUGMENT.DEVICE, device)
    config = view_config(cfg.DATA.IMAGE_SIZE, {k: v for k, v in cfg.AUGMENT.items() if k != "DEVICE"})
    dataset = (TwoViewDataset if makes is None else DecodedDataset)(source, config, cfg.SEED)
    pin = (makes or device).type == "cuda"
    share, place, workers = batch // world_size, (rank, world_size), cfg.DATA.NUM_WORKERS
    _check_room(cfg, share, world_size)
    if isinstance(source, TarSource):
        results = _tar_results(dataset, share, cfg.DATA.SHUFFLE_BUFFER, place, workers, pin)
    else:
        results = _results(dataset, share, place, workers, pin)
    deliver = partial(deliver_views, device=device)
    if makes is not None:
        deliver = partial(deliver_decoded, device=device, makes=makes, size=config.size)
    return TwoViewLoader(
        source, len(source) // batch, cfg.DATA.MAX_BAD_SHARE, lambda start: prefetch(results(start), device, deliver)
    )


def _fitting_batch(images: int, world_size: int) -> int:
    """The largest power of 2 up to 256 and a quarter of the images, as a multiple of the processes."""
    most = max(1, min(256, images // 4))
    return max(1, 2 ** (most.bit_length() - 1) // world_size) * world_size


def _check_room(cfg: CfgNode, share: int, world_size: int) -> None:
    """Refuse more workers than this machine's shared memory has room for: two views of each image of a batch."""
    workers = min(local_processes(), world_size) * loader_workers(cfg.DATA.NUM_WORKERS)
    check_shared_memory(2 * share * 3 * cfg.DATA.IMAGE_SIZE**2, workers, "DATA.NUM_WORKERS")


def augmenting_device(name: str, device: torch.device) -> torch.device | None:
    """Return the device on which AUGMENT.DEVICE augments whole batches for a run on `device`; None: in the workers."""
    devices = {"workers": None, "auto": device, device.type: device, str(device): device, "cpu": torch.device("cpu")}
    if name not in devices:
        raise UserError(f"AUGMENT.DEVICE is {name!r} and the run is on {device}; use workers, auto or cpu")
    return devices[name]


def _results(
    dataset: _ViewDataset, batch: int, place: tuple[int, int], num_workers: int, pin_memory: bool
) -> Callable[[int], Iterator[WorkerResult]]:
    steps = _Steps(len(dataset.source), batch, dataset.seed, *place)
    loader = loader_of(dataset, steps, num_workers, pin_memory)

    def results(start: int) -> Iterator[WorkerResult]:
        steps.start = start
        return iter(loader)

    return results


def _tar_results(
    dataset: _ViewDataset, batch: int, buffer: int, place: tuple[int, int], num_workers: int, pin_memory: bool
) -> Callable[[int], Iterator[WorkerResult]]:
    if buffer < 1:
        raise UserError(f"DATA.SHUFFLE_BUFFER is {buffer}; use a number of images, such as 4096, or 1 for none")

    def results(start: int) -> Iterator[WorkerResult]:
        views = TarViews(dataset, batch, buffer, *place, start)
        loader = loader_of(views, None, min(loader_workers(num_workers), len(views.own)), False)
        parts = iter(loader)
        while True:  # workers take turns, each with its runs' part of the same step
            yield joined([next(parts) for _ in range(max(1, loader.num_workers))], pin_memory)

    return results


class PlainDataset(Dataset):
    """Image indices -> PlainBatch, or the UserError that ends the run."""

    def __init__(self, source: Source, size: int, short_side: int, skip_unreadable: bool = False) -> None:
        self.source, self.size, self.short_side, self.skip_unreadable = source, size, short_side, skip_unreadable

    def __getitem__(self, indices: Sequence[int]) -> PlainBatch | UserError:
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        read = []
        for index in indices:
            try:
                pixels = decode_image(self.source.read(index), self.source.name(index))
            except UserError as error:
                if self.skip_unreadable:
                    continue
                return error
            cv2.split(centre(pixels, self.size, self.short_side), list(images[len(read)].numpy()))
            read.append(index)
        labels = [-1 if (label := self.source.label(i)) is None else label for i in read]
        return PlainBatch(images[: len(read)], *(torch.tensor(v, dtype=torch.int64) for v in (labels, read)))


def centre(image: np.ndarray, size: int, short_side: int) -> np.ndarray:
    """Scale an (H, W, 3) image to `short_side` and crop its centre, in one resampling: (size, size, 3)."""
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * size / short_side))
    return crop_resize(image, ((height - side) // 2, (width - side) // 2, side, side), size)


class PlainLoader:
    """Iterates over PlainBatch once, in the order of `indices`."""

    def __init__(self, dataset: PlainDataset, batches: list[list[int]], num_workers: int, pin_memory: bool) -> None:
        self._loader = loader_of(dataset, batches, num_workers, pin_memory)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[PlainBatch]:
        yield from raising(self._loader)


def build_plain_loader(
    source: Source,
    size: int,
    *,
    batch_size: int,
    num_workers: int = 0,
    short_side: int | None = None,
    indices: Sequence[int] | None = None,
    pin_memory: bool = False,
    skip_unreadable: bool = False,
) -> PlainLoader:
    """Build a loader of images scaled to `short_side` pixels on their short side and centre-cropped to `size`.

    Args:
        short_side: default size x 8 / 7 (256 for 224), or `size` below 96.
        indices: the images to load, in this order; default all.
        skip_unreadable: skip such images; batches may then be smaller and even empty.

    Raises:
        UserError: while iterating, an image is unreadable and not skipped; names it.
    """
    if short_side is None:
        short_side = size if size < 96 else round(size * 8 / 7)
    wanted = [int(i) for i in (range(len(source)) if indices is None else indices)]
    batches = [wanted[at : at + batch_size] for at in range(0, len(wanted), batch_size)]
    return PlainLoader(PlainDataset(source, size, short_side, skip_unreadable), batches, num_workers, pin_memory)


def loader_of(dataset: Dataset, requests: Any, num_workers: int, pin_memory: bool) -> DataLoader:
    """Build a DataLoader that returns dataset[request] for every request, in order and unchanged."""
    if num_workers < -1:
        raise UserError(f"DATA.NUM_WORKERS is {num_workers}; use -1 for a share of the cores, or 0 or more")
    num_workers = loader_workers(num_workers)  # more than cores only cost memory; results are the same
    return DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        collate_fn=shared,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0 and requests is not None,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # so that the global generator is not used
    )


def prepare_worker(_: int = 0) -> None:
    """Prepare a worker process: one thread, freed memory kept, and stop signals left to the parent.

    Every image's buffer is freed and allocated again; by default glibc returns it to the system each time, and faulting
    it in again costs a quarter of the decoding time.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    leave_stopping_to_parent()
    keep_freed_memory(256 * 2**20)  # limited: there are many workers, and some huge images
