"""The linear readout with the paper's schedule: SGD without momentum, rate 30, divided by 10 three times.

LoCo (Xiong, Ren, Urtasun, arXiv 2008.01342) states optimizer, rate, 100 epochs and the division by 10 at epochs 30, 60
and 90. It does not state batch, weight decay, views or initialisation; they follow MoCo's linear evaluation (He et al.,
arXiv 1911.05722, and its code): 256 images, none, a random crop and flip of each training image per epoch, and weights
of deviation 0.01. Features are the pooled maps, not standardised. Each epoch costs a forward of all training images,
shared by all stages, and between the processes of a job: each computes the features of its share of a batch, and all
train the same classifiers on the joined batch, so their number changes nothing but rounding.

Shape legend: B images in a batch, D the stage's channels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loco_det.core.distributed import gather
from loco_det.core.errors import UserError
from loco_det.core.log import Progress
from loco_det.evaluation.probes.crops import crop_batches, steps_an_epoch
from loco_det.evaluation.probes.features import Extractor
from loco_det.evaluation.probes.images import LabelledImages

INITIAL_STD = 0.01


@dataclass(frozen=True)
class PaperRecipe:
    """With other than 100 epochs the rate falls after the same fractions. The rate does not scale with the batch."""

    rate: float = 30.0
    epochs: int = 100
    batch: int = 256
    seed: int = 0

    @property
    def milestones(self) -> list[int]:
        """The epochs, counted from 0, at which the rate is divided by ten."""
        return [-(-self.epochs * tenths // 10) for tenths in (3, 6, 9)]

    def rate_in(self, epoch: int) -> float:
        return self.rate / 10 ** sum(epoch >= milestone for milestone in self.milestones)


def paper_probe(
    extractor: Extractor, stages: list[str], train: LabelledImages, classes: int, recipe: PaperRecipe
) -> dict[str, nn.Linear]:
    """Train a classifier on each stage's pooled features of random crops of `train`; the backbone is not modified.

    Raises:
        UserError: an image cannot be read, or a stage's loss is not finite.
    """
    extractor.backbone.model.eval()
    per_epoch = steps_an_epoch(len(train), recipe.batch, drop_last=False)
    crops = crop_batches(
        train, extractor.size, epochs=recipe.epochs, batch=recipe.batch, seed=recipe.seed, drop_last=False,
        workers=extractor.workers,
    )  # fmt: skip
    batches = (
        (step // per_epoch, *_joined(extractor, images, labels, stages)) for step, (images, labels) in enumerate(crops)
    )
    with Progress(recipe.epochs * per_epoch, "linear probe, paper's recipe") as progress:
        widths = {stage: extractor.backbone.channels[stage] for stage in stages}
        return train_linear(batches, widths, classes, recipe, extractor.device, progress.advance)


def _joined(
    extractor: Extractor, images: Tensor, labels: Tensor, stages: list[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch's pooled features (B, D) and labels (B,), from every process's share of its images."""
    features = extractor.pool(extractor.backbone.input(images, extractor.device), stages)
    return {stage: gather(part) for stage, part in features.items()}, gather(labels.to(extractor.device))


def train_linear(
    batches: Iterable[tuple[int, dict[str, Tensor], Tensor]],
    widths: dict[str, int],
    classes: int,
    recipe: PaperRecipe,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, nn.Linear]:
    """Train one classifier per stage.

    Args:
        batches: epoch, {stage: (B, D) float32 on `device`}, (B,) int64 labels.
        widths: D of each stage.
        advance: called with 1 after each step.

    Raises:
        UserError: a stage's loss is not finite.
    """
    heads = {stage: _initial(width, classes, recipe.seed).to(device) for stage, width in widths.items()}
    optimizer = torch.optim.SGD([p for head in heads.values() for p in head.parameters()], lr=recipe.rate)
    for epoch, features, labels in batches:
        optimizer.param_groups[0]["lr"] = recipe.rate_in(epoch)
        labels = labels.to(device)
        losses = torch.stack([nn.functional.cross_entropy(head(features[s]), labels) for s, head in heads.items()])
        if not losses.isfinite().all():
            stage = list(heads)[losses.isfinite().tolist().index(False)]
            raise UserError(
                f"the loss on {stage} is not finite in epoch {epoch} of --recipe paper, whose rate is fixed; leave the "
                "stage out with --stages, or use --recipe sweep"
            )
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()  # a sum: the stages' gradients are independent
        optimizer.step()
        advance(1)
    return heads


def _initial(width: int, classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head
