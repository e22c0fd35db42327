"""The trained linear head: BatchNorm and a 1 x 1 convolution on frozen maps, the loss at the resolution of the masks.

The head and the schedule are those of DINOv2 and DINOv3 (Oquab et al. 2023, Simeoni et al. 2025, linear segmentation):
AdamW, learning rate 1e-3, weight decay 1e-3, 16 images a step, a linear warm-up over the first 1,500 of 40,000 steps
and then a linear fall to 0, weights of deviation 0.01, logits upsampled bilinearly before the cross entropy, ignored
pixels left out. 40,000 steps of 16 are 32 epochs of ADE20K; here it is the epochs that are fixed.

Their random scales and crops are left out, for the maps of all protocols here are those of whole images at one size;
images are flipped, each with probability 1/2 anew in each epoch. So an epoch costs a forward of all training images,
and nothing is kept.

Shape legend: B images in a batch, S their side, D dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from loco_det.annotations.pixels import IGNORED
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.dense import DenseExtractor, Head
from loco_det.evaluation.probes.pixel_images import PixelImages, scaled_mask

WARMUP = 1500 / 40_000  # of all steps
INITIAL_STD = 0.01
EPOCHS = 32


@dataclass(frozen=True)
class DenseRecipe:
    """Training options."""

    epochs: int = EPOCHS
    rate: float = 1e-3
    weight_decay: float = 1e-3
    batch: int = 16
    seed: int = 0

    def facts(self) -> dict[str, Any]:
        """What the record says of it."""
        return {
            "optimizer": "adamw",
            "rate": self.rate,
            "weight_decay": self.weight_decay,
            "epochs": self.epochs,
            "batch": self.batch,
            "views": "whole images, flipped with probability 1/2",
        }


def factor(step: int, steps: int) -> float:
    """The learning rate of `step`, counted from 0, relative to its peak."""
    warmup = round(WARMUP * steps)
    return min((step + 1) / (warmup + 1), (steps - step) / (steps - warmup))


def train_dense_linear(
    extractor: DenseExtractor, stages: Sequence[str], images: PixelImages, classes: int, recipe: DenseRecipe
) -> dict[str, Head]:
    """Train a head on each stage's maps; the stages share every batch.

    Raises:
        UserError: an image cannot be read, or a loss is not finite.
    """
    widths = {stage: extractor.backbone.channels[stage] for stage in stages}
    heads = {stage: initial_head(width, classes, recipe.seed).to(extractor.device) for stage, width in widths.items()}
    optimizer = torch.optim.AdamW(
        [p for head in heads.values() for p in head.parameters()], lr=recipe.rate, weight_decay=recipe.weight_decay
    )
    batch = min(recipe.batch, len(images))
    steps = recipe.epochs * (len(images) // batch)  # an incomplete last batch is dropped
    step, rng = 0, np.random.default_rng(recipe.seed)
    for epoch in range(recipe.epochs):
        order = rng.permutation(len(images))[: len(images) // batch * batch]
        target = partial(scaled_mask, size=extractor.size)
        what = f"linear heads, epoch {epoch + 1} of {recipe.epochs}"
        for part in extractor.batches(images, target, what, order=order, batch=batch):
            optimizer.param_groups[0]["lr"] = recipe.rate * factor(step, steps)
            pixels, masks = flipped(part.images, torch.stack(part.targets), rng.random(batch) < 0.5)
            losses = _losses(heads, extractor.maps(pixels, stages), masks.to(extractor.device))
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()  # a sum: the stages' gradients are independent
            optimizer.step()
            step += 1
        for stage, loss in losses.items():
            if not loss.isfinite():
                raise UserError(f"the loss on {stage} is not finite in epoch {epoch}; leave it out with --stages")
    return {stage: head.eval() for stage, head in heads.items()}


def initial_head(width: int, classes: int, seed: int) -> nn.Sequential:
    """BatchNorm and a 1 x 1 convolution, (B, D, G, G) -> (B, K, G, G)."""
    conv = nn.Conv2d(width, classes, 1)
    nn.init.normal_(conv.weight, std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(conv.bias)
    return nn.Sequential(nn.BatchNorm2d(width), conv)


def flipped(images: Tensor, masks: Tensor, which: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mirror (B, 3, S, S) images and (B, S, S) masks where `which`, (B,) bool, says so."""
    chosen = torch.from_numpy(which)
    images, masks = images.clone(), masks.clone()
    images[chosen], masks[chosen] = images[chosen].flip(3), masks[chosen].flip(2)
    return images, masks


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross entropy over the counted pixels of (B, S, S) masks of (B, K, G, G) logits; 0 without such pixels."""
    upsampled = functional.interpolate(logits, size=masks.shape[1:], mode="bilinear", align_corners=False)
    total = functional.cross_entropy(upsampled, masks.long(), ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)


def _losses(heads: dict[str, Callable[[Tensor], Tensor]], maps: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
    return {stage: pixel_loss(head(maps[stage]), masks) for stage, head in heads.items()}
