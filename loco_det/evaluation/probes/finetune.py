"""The semi-supervised probe: fine-tunes the whole backbone and a linear classifier on 1 % or 10 % of the labels.

`annotations/subsets.py` selects the labelled images: the lists are fixed by the seed, have the same share of every
class, and the smaller is part of the larger. Training uses a random crop (8 to 100 % of the area) and a flip, as in
SimCLR (arXiv 2002.05709, section 4.3 and appendix B.5); testing the plain view.

Shape legend: B images in a batch, S their side, C classes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loco_det.core.errors import UserError
from loco_det.core.log import Progress
from loco_det.evaluation.probes.backbones import Backbone
from loco_det.evaluation.probes.crops import crop_batches, steps_an_epoch
from loco_det.evaluation.probes.features import Extractor
from loco_det.evaluation.probes.images import LabelledImages

LARGEST_BATCH, SMALLEST_BATCH, STEPS_AN_EPOCH = 256, 16, 10


@dataclass(frozen=True)
class FineTuning:
    """SGD with momentum and a half cosine; one rate for all parameters, defined for batches of 256."""

    rate: float = 0.05
    epochs: int = 60
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0


def batch_size(labels: int) -> int:
    """Return the batch size: 256, or less for at least ten steps per epoch, but at least 16."""
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, labels // STEPS_AN_EPOCH))


def finetune(
    backbone: Backbone,
    stage: str,
    train: LabelledImages,
    classes: int,
    size: int,
    recipe: FineTuning,
    device: torch.device,
    *,
    workers: int = 0,
) -> nn.Module:
    """Train a copy of the backbone and a classifier on `stage`; `backbone` is not modified.

    Returns:
        A module (B, 3, S, S) float32 of `Backbone.input` -> (B, C) scores, in eval mode.

    Raises:
        UserError: an image cannot be read, or the loss is not finite.
    """
    torch.manual_seed(recipe.seed)
    model = _Classifier(copy.deepcopy(backbone.model), stage, backbone.channels[stage], classes).to(device).train()
    scale = recipe.rate * recipe.batch / 256
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    total = recipe.epochs * steps_an_epoch(len(train), recipe.batch, drop_last=True)
    batches = crop_batches(
        train, size, epochs=recipe.epochs, batch=recipe.batch, seed=recipe.seed, drop_last=True, workers=workers
    )
    with Progress(total, f"fine-tuning on {len(train)} labels") as progress:
        for step, (images, labels) in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = scale * 0.5 * (1 + math.cos(math.pi * step / total))
            scores = model(backbone.input(images, device))
            loss = nn.functional.cross_entropy(scores, labels.to(device))
            if not loss.isfinite():
                remedy = "lower --rates" if step else "take sound weights"
                raise UserError(f"the loss of fine-tuning {backbone.name} is {loss.item()} at step {step}; {remedy}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.advance(loss=loss.item())
    return model.eval()


class _Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, stage: str, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.stage = backbone, stage
        self.head = nn.Linear(channels, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[self.stage].float().mean((2, 3)))


@torch.no_grad()
def predict(model: nn.Module, extractor: Extractor, images: LabelledImages) -> Tensor:
    """Return (N, C) scores of `images` on the CPU.

    Raises:
        UserError: an image cannot be read, or a score is not finite.
    """
    scores = torch.cat([model(x).cpu() for x, _ in extractor.batches(images, "test")])
    if not scores.isfinite().all():  # the last step's loss precedes its update
        raise UserError("fine-tuning ended in scores that are not finite; lower --rates")
    return scores
