"""Frozen features of images: every stage's output, averaged over the image, computed once and cached on disk.

Shape legend: N images, C the stage's channels; features are (N, C) float32.

A cache entry is a folder named by the sha256 of everything that features depend on: the backbone's tensors and
structure, the pixels, size and resampling, the images (names, sizes, modification times) and the device type. It holds
one .npy per stage and its checksum; a file that fails its checksum is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loco_det.core.distributed import barrier, first_of_all, gather, is_main, share_of, world_size
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, stat_line, write_json
from loco_det.core.log import Progress, log
from loco_det.evaluation.probes.backbones import Backbone
from loco_det.evaluation.probes.cifar import CifarSource
from loco_det.evaluation.probes.images import LabelledImages
from loco_det.images.two_views import build_plain_loader

FORMAT = 1
POOLING = "global average"
STATISTICS_IMAGES = 3200  # training images used for the BatchNorm statistics of an untrained backbone
STATISTICS_BATCH = 64


class Extractor:
    """Computes a backbone's features of images, or reads them from the cache.

    Args:
        size: side to which images are scaled and cropped, as in `build_plain_loader`.
        cache: a folder, or None for no cache.
    """

    def __init__(
        self, backbone: Backbone, size: int, device: torch.device, *, batch: int, workers: int, cache: Path | None
    ) -> None:
        self.backbone, self.size, self.device = backbone, size, device
        self.batch, self.workers, self.cache = batch, workers, cache
        backbone.model.to(device)

    def measure(self, images: LabelledImages, seed: int) -> None:
        """Measure an untrained backbone's BatchNorm statistics on some of the training images."""
        few = images.part(min(1.0, STATISTICS_IMAGES / len(images)), seed)
        order = np.random.default_rng(seed).permutation(len(few))  # so that batches have all classes
        index = order[: max(1, len(order) // STATISTICS_BATCH) * STATISTICS_BATCH]
        self.backbone.measure(x for x, _ in self.batches(few.take(index), "batch statistics", batch=STATISTICS_BATCH))

    def __call__(self, images: LabelledImages, stages: list[str], what: str) -> dict[str, Tensor]:
        """Return {stage: (N, C) float32 on the CPU}, in the order of `images`; `what` is the progress bar's text."""
        if self.cache is None:
            return self._extract(images, stages, what)
        facts = self._facts(images)
        folder = self.cache / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        shapes = {stage: (len(images), self.backbone.channels[stage]) for stage in stages}
        found = {stage: _read(folder / f"{stage}.npy", shapes[stage]) for stage in stages}
        # As the main process sees it, since all must agree on what to compute.
        absent = first_of_all([stage for stage, features in found.items() if features is None])
        if absent:
            new = self._extract(images, absent, what)
            if is_main():
                self._store(folder, facts, new)
            barrier()  # until the files are whole
            found.update(new)
        else:
            log.info("%s: features of %d images from the cache", what, len(images))
        return {stage: found[stage] for stage in stages}

    def _store(self, folder: Path, facts: dict[str, Any], features: dict[str, Tensor]) -> None:
        try:
            write_json(folder / "facts.json", facts)
            for stage, part in features.items():
                _write(folder / f"{stage}.npy", part)
        except UserError as error:  # continue without the cache
            log.warning("%s; these features are not cached", error)

    @torch.no_grad()
    def pool(self, x: Tensor, stages: list[str]) -> dict[str, Tensor]:
        """Pool (B, 3, S, S) float32 of `Backbone.input` to {stage: (B, C) float32}, in the backbone's current mode."""
        if not len(x):  # a process without a share of the batch
            return {stage: x.new_zeros(0, self.backbone.channels[stage]) for stage in stages}
        outputs = self.backbone.model(x)
        return {stage: outputs[stage].float().mean((2, 3)) for stage in stages}

    def _extract(self, images: LabelledImages, stages: list[str], what: str) -> dict[str, Tensor]:
        own = images.take(np.arange(len(images))[share_of(len(images))])
        features = {stage: torch.empty(len(own), self.backbone.channels[stage]) for stage in stages}
        self.backbone.model.eval()
        row = 0
        for x, _ in self.batches(own, f"{what} features") if len(own) else ():
            for stage, part in self.pool(x, stages).items():
                features[stage][row : row + len(x)] = part
            row += len(x)
        if world_size() > 1:
            features = {stage: gather(part.to(self.device)).cpu() for stage, part in features.items()}
        for stage, part in features.items():
            if not part.isfinite().all():
                raise UserError(f"{self.backbone.name}: features of {stage} are not finite; take sound weights")
        return features

    def batches(self, images: LabelledImages, what: str, batch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        loader = build_plain_loader(
            images.source,
            self.size,
            batch_size=batch or self.batch,
            num_workers=self.workers,
            indices=images.index,
            pin_memory=self.device.type == "cuda",
        )
        with Progress(len(images), what, unit="images") as progress:
            for part in loader:
                yield self.backbone.input(part.images, self.device), part.labels
                progress.advance(len(part.images))

    def _facts(self, images: LabelledImages) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "weights": self.backbone.weights_hash(),
            "backbone": self.backbone.facts,
            "strides": _strides(self.backbone.model),
            "pixels": [self.backbone.order, list(self.backbone.mean), list(self.backbone.std)],
            "size": self.size,
            "pooling": POOLING,
            "device": self.device.type,
            "images": images_digest(images),
        }


def _strides(model: torch.nn.Module) -> str:
    """Describe the strides, which are no tensors; MSRA's weights differ in them."""
    return hashlib.sha256(str(model).encode()).hexdigest()


def images_digest(images: LabelledImages) -> str:
    """Hash the images' names, order, byte sizes and modification times by sha256; for a zip or shards, the containers'.

    Contents are not read: changes in them by the disk itself are not noticed.
    """
    digest = hashlib.sha256()
    root = Path(images.source.root)
    if images.source.containers or isinstance(images.source, CifarSource):
        files = images.source.containers or sorted(root.iterdir())
        digest.update("".join(_stat(file) for file in files).encode())
        stat = lambda _: ""  # noqa: E731
    else:
        stat = _stat
    for index in images.index.tolist():
        name = images.source.name(index)
        digest.update(f"{os.path.relpath(name, root)}\0{stat(name)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _stat(path: str | Path) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
    return f"{stat_line(found)}\n"


def _write(path: Path, features: Tensor) -> None:
    array = features.numpy()
    with atomic_write(path) as file:
        np.save(file, array)
    write_json(path.with_suffix(".json"), {"sha256": hashlib.sha256(array.data).hexdigest(), "shape": array.shape})


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Read features; None if there are none, or a checksum fails."""
    if not path.exists():
        return None
    try:
        array = np.load(path, allow_pickle=False)
        checksum = json.loads(path.with_suffix(".json").read_text())["sha256"]
        if array.shape == shape and array.dtype == np.float32 and _sha256(array) == checksum:
            return torch.from_numpy(array)
    except Exception:  # hostile bytes make NumPy's reader raise nearly anything
        pass
    log.warning("%s: damaged or not whole, so its features are computed again", path)
    return None


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
