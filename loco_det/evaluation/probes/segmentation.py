"""The segmentation probe: how well heads on a backbone's frozen maps predict the class of each pixel.

| method | head | file |
|---|---|---|
| `ridge` | least squares to the classes of pixels, in closed form | `dense_ridge.py` |
| `knn` | nearest patches of the training images | `dense_knn.py` |
| `logistic` | multinomial logistic regression, L-BFGS | `dense_logistic.py` |
| `linear` | BatchNorm and 1 x 1 convolution, trained | `dense_linear.py` |

All predict a score for each class and patch; scores are upsampled bilinearly to the mask's own resolution, and the
greatest is the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loco_det.core.errors import UserError
from loco_det.evaluation.probes.backbones import Backbone
from loco_det.evaluation.probes.dense import (
    DenseExtractor,
    Fitter,
    Head,
    as_patches,
    count_pixels,
    segmentation_scores,
)
from loco_det.evaluation.probes.dense_knn import NEIGHBOURS, PATCHES, TEMPERATURE, DenseKnn
from loco_det.evaluation.probes.dense_linear import DenseRecipe, train_dense_linear
from loco_det.evaluation.probes.dense_logistic import DenseLogistic
from loco_det.evaluation.probes.dense_ridge import DenseRidge
from loco_det.evaluation.probes.linear import HELD_OUT
from loco_det.evaluation.probes.pixel_images import PixelData, PixelImages, patch_counts

METHODS = ("ridge", "knn", "logistic", "linear")
MASKS = "predictions are upsampled bilinearly to each mask's own size"


@dataclass(frozen=True)
class DenseSettings:
    """The method, one of `METHODS`, and its options."""

    method: str
    k: int = NEIGHBOURS
    temperature: float = TEMPERATURE
    patches: int = PATCHES
    epochs: int = DenseRecipe.epochs
    seed: int = 0


def image_size(backbone: Backbone, stages: Sequence[str]) -> int:
    """The backbone's own side of images, rounded down to a multiple of the coarsest stride of `stages`."""
    stride = max(backbone.model.strides[stage] for stage in stages)
    return int(stride * max(1, backbone.image_size // stride))


def probe_segmentation(
    extractor: DenseExtractor, stages: Sequence[str], data: PixelData, settings: DenseSettings
) -> dict[str, dict[str, Any]]:
    """Fit a head to each stage's maps of the training images, and score its predictions of the test images.

    Returns:
        {stage: the numbers of `segmentation_scores` for the classes that the test images name, the map's facts, and
        what was chosen}.

    Raises:
        UserError: the images' size does not suit a stage, or an image or mask cannot be read or has no classes.
    """
    grids = extractor.grids(stages)
    fitted = fit_heads(extractor, grids, data.train, len(data.classes), settings)
    counts = count_pixels(extractor, {stage: head for stage, (head, _) in fitted.items()}, data.test, len(data.classes))
    if not next(iter(counts.values()))[:, 1].any():
        raise UserError(f"{data.split}: no pixel of the test images' masks has a class; give other images")
    known = data.test.classes
    names = tuple(data.classes[number] for number in known)
    return {
        stage: {
            **segmentation_scores(counts[stage][:, :, known], names),
            **map_facts(extractor, stage, grid),
            **fitted[stage][1],
        }
        for stage, grid in grids.items()
    }


def map_facts(extractor: DenseExtractor, stage: str, grid: int) -> dict[str, Any]:
    """What a stage's map is: its channels and side, and whether it went through the model's final normalisation."""
    normed = stage in getattr(extractor.backbone.model, "normed", ())
    return {
        "dimensions": extractor.backbone.channels[stage],
        "grid": grid,
        "stride": extractor.size / grid,
        "norm": "final" if normed else "none",
    }


def fit_heads(
    extractor: DenseExtractor, grids: dict[str, int], images: PixelImages, classes: int, settings: DenseSettings
) -> dict[str, tuple[Head, dict[str, Any]]]:
    """Return {stage: its head, what was chosen}; the maps are computed once, or once an epoch by `linear`."""
    if settings.method == "linear":
        recipe = DenseRecipe(epochs=settings.epochs, seed=settings.seed)
        heads = train_dense_linear(extractor, list(grids), images, classes, recipe)
        return {stage: (head, recipe.facts()) for stage, head in heads.items()}
    held = np.zeros(len(images), bool)
    held[images.part(HELD_OUT, settings.seed)] = True
    fitters = {stage: _fitter(extractor, stage, classes, held, settings) for stage in grids}
    target = partial(_counts_of_grids, grids=sorted(set(grids.values())), classes=classes)
    for batch in extractor.batches(images, target, "training images"):
        maps = extractor.maps(batch.images, list(grids))
        for stage, fitter in fitters.items():
            counts = torch.stack([target[grids[stage]] for target in batch.targets])
            fitter.add(as_patches(maps[stage]), counts, batch.places)
    return {stage: fitter.finish() for stage, fitter in fitters.items()}


def _fitter(extractor: DenseExtractor, stage: str, classes: int, held: np.ndarray, settings: DenseSettings) -> Fitter:
    dimensions = extractor.backbone.channels[stage]
    if settings.method == "ridge":
        return DenseRidge(dimensions, classes, held, extractor.device)
    if settings.method == "logistic":
        return DenseLogistic(dimensions, held, settings.seed)
    return DenseKnn(settings.k, settings.temperature, settings.patches, settings.seed)


def _counts_of_grids(mask: np.ndarray, grids: Sequence[int], classes: int) -> dict[int, Tensor]:
    return {grid: patch_counts(mask, grid, classes) for grid in grids}
