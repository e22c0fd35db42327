"""Frozen maps of a backbone, streamed, and the scores of what is predicted from them for each pixel.

Shape legend: B images of S x S pixels in a batch; a stage's map is (B, D, G, G), a grid of P = G * G patches;
K classes; a mask is (H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loco_det.annotations.pixels import IGNORED
from loco_det.core.errors import UserError
from loco_det.core.log import Progress
from loco_det.evaluation.bootstrap import Counted
from loco_det.evaluation.labels import scores_of_counts
from loco_det.evaluation.probes.backbones import Backbone
from loco_det.evaluation.probes.features import STATISTICS_BATCH, STATISTICS_IMAGES
from loco_det.evaluation.probes.pixel_images import PixelBatch, PixelImages, pixel_batches

RESAMPLES = 1000
_ON_CPU, _ELSEWHERE = 2**20, 2**26  # scores that are upsampled at a time

Head = Callable[[Tensor], Tensor]  # (B, D, G, G) maps -> (B, K, G, G) scores, the greatest is the class


class Fitter(Protocol):
    """Learns a head from a stream of patches."""

    def add(self, features: Tensor, counts: Tensor, places: Sequence[int]) -> None:
        """Add (B, P, D) patches with their pixels of each class, (B, P, K), of the images at `places`."""

    def finish(self) -> tuple[Head, dict[str, Any]]:
        """Return the head, and what was chosen for it."""


class DenseExtractor:
    """Computes a backbone's maps of images scaled to S x S.

    Args:
        size: S.
        batch: images at a time.
    """

    def __init__(self, backbone: Backbone, size: int, device: torch.device, *, batch: int, workers: int) -> None:
        self.backbone, self.size, self.device = backbone, size, device
        self.batch, self.workers = batch, workers
        backbone.model.to(device).eval()

    def grids(self, stages: Sequence[str]) -> dict[str, int]:
        """G of each stage.

        Raises:
            UserError: S is no multiple of a stage's stride, so that its patches would not tile the image.
        """
        found = {}
        for stage, map_ in self.maps(torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8), stages).items():
            found[stage], stride = map_.shape[2], self.backbone.model.strides[stage]
            if map_.shape[2] != map_.shape[3] or abs(found[stage] * stride - self.size) > 1e-6 * self.size:
                raise UserError(
                    f"--image-size {self.size} is no multiple of {stride:g}, the stride of {stage} in "
                    f"{self.backbone.name}; use {stride * max(1, round(self.size / stride)):g}"
                )
        return found

    def measure(self, images: PixelImages, seed: int) -> None:
        """Measure an untrained backbone's BatchNorm statistics on some of the training images."""
        order = np.random.default_rng(seed).permutation(len(images))[:STATISTICS_IMAGES]
        order = order[: max(1, len(order) // STATISTICS_BATCH) * STATISTICS_BATCH]
        batches = pixel_batches(images, self.size, _nothing, batch=STATISTICS_BATCH, workers=self.workers, order=order)
        self.backbone.measure(self.backbone.input(batch.images, self.device) for batch in batches)

    def batches(
        self, images: PixelImages, target: Callable[[np.ndarray], Any], what: str, **options: Any
    ) -> Iterator[PixelBatch]:
        """Yield batches of `pixel_batches` under a progress bar called `what`."""
        options = {"batch": self.batch, "workers": self.workers, **options}
        with Progress(len(images), what, unit="images") as progress:
            for batch in pixel_batches(images, self.size, target, **options):
                yield batch
                progress.advance(len(batch.places))

    @torch.no_grad()
    def maps(self, images: Tensor, stages: Sequence[str]) -> dict[str, Tensor]:
        """(B, 3, S, S) uint8 RGB -> {stage: (B, D, G, G) float32 on the device}.

        Raises:
            UserError: a map is not finite.
        """
        outputs = self.backbone.model(self.backbone.input(images, self.device))
        found = {stage: outputs[stage].float() for stage in stages}
        for stage, map_ in found.items():
            if not map_.isfinite().all():
                raise UserError(f"{self.backbone.name}: features of {stage} are not finite; take sound weights")
        return found


def _nothing(mask: np.ndarray) -> None:
    """For images whose labels do not matter."""


def as_patches(maps: Tensor) -> Tensor:
    """(B, D, G, G) -> (B, P, D), row by row."""
    return maps.flatten(2).transpose(1, 2)


def linear_head(weight: Tensor, bias: Tensor) -> Head:
    """The head of (D, K) weights and (K,) biases."""
    kernel, bias = weight.T[:, :, None, None].float().contiguous(), bias.float()
    return lambda maps: functional.conv2d(maps, kernel, bias)


# --- scores -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def count_pixels(
    extractor: DenseExtractor, heads: Mapping[str, Head], images: PixelImages, classes: int
) -> dict[str, np.ndarray]:
    """Count, of each image and stage, the pixels rightly predicted as each class, of each class, and predicted as it.

    Returns:
        {stage: (images, 3, K) int64}.
    """
    found = {stage: np.zeros((len(images), 3, classes), np.int64) for stage in heads}
    for batch in extractor.batches(images, torch.from_numpy, "test images"):
        for stage, maps in extractor.maps(batch.images, list(heads)).items():
            for place, scores, mask in zip(batch.places, heads[stage](maps), batch.targets):
                found[stage][place] = pixel_counts(scores, mask.to(scores.device)).cpu().numpy()
    return found


def pixel_counts(scores: Tensor, mask: Tensor) -> Tensor:
    """Predict each pixel of a mask from (K, G, G) scores that are upsampled bilinearly to its size, and count.

    Args:
        mask: (H, W) uint8 classes or IGNORED, whose pixels count for nothing.

    Returns:
        (3, K) int64, as `count_pixels`.
    """
    classes = len(scores)
    pairs = mask.long() * classes + upsampled_classes(scores, *mask.shape)
    table = torch.bincount(pairs.flatten(), minlength=(IGNORED + 1) * classes).view(-1, classes)[:classes]
    return torch.stack([table.diagonal(), table.sum(1), table.sum(0)])


def upsampled_classes(scores: Tensor, height: int, width: int) -> Tensor:
    """(K, G, G) -> (height, width) int64: the class of the greatest score after bilinear upsampling.

    The same as `interpolate` without `align_corners`, as two matrix products, a few rows at a time: on a CPU they stay
    in its cache, which takes half the time.
    """
    rows, columns = (_linear_weights(scores, size) for size in (height, width))
    across = scores @ columns.T
    most = (_ON_CPU if scores.device.type == "cpu" else _ELSEWHERE) // (len(scores) * width)
    return torch.cat([(part @ across).max(0).indices for part in rows.split(max(1, most))])


def _linear_weights(scores: Tensor, size: int) -> Tensor:
    """(size, G): how much of each of G values is in each of `size` that they are linearly upsampled to."""
    identity = torch.eye(scores.shape[1], dtype=scores.dtype, device=scores.device)
    return functional.interpolate(identity[None], size=size, mode="linear", align_corners=False)[0].T


def segmentation_scores(counts: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Scores in percent of (images, 3, K) counts, over the pixels of all images.

    Returns:
        {"miou", "miou_interval": [low, high], "pixel_accuracy", "iou": {class: percent, or None for one that is neither
        there nor predicted}}. mIoU is the mean over the other classes. The interval is the middle 95 % over `RESAMPLES`
        bootstrap samples of the images; training is not repeated. None where no pixel counts.
    """

    def numbers(total: np.ndarray) -> dict[str, float]:
        return scores_of_counts(*total, classes)

    flat = counts.reshape(len(counts), -1).astype(np.float64)  # exact, and multiplied faster

    def measure(times: np.ndarray) -> list[float]:
        return [numbers((times @ flat).reshape(counts.shape[1:]))["IoU"]]

    whole = numbers(counts.sum(0))
    interval = Counted("sem_seg", ("IoU",), len(counts), measure).intervals(RESAMPLES).get("IoU")
    finite = {name: float(value) if np.isfinite(value) else None for name, value in whole.items()}
    return {
        "miou": finite["IoU"],
        "miou_interval": interval,
        "pixel_accuracy": finite["pACC"],
        "iou": {name: finite[f"IoU-{name}"] for name in classes},
    }
