"""The linear probe: softmax regression on frozen features, for all learning rates of a sweep at once.

Shape legend: N training features, B in a batch, D dimensions, C classes, R learning rates.

All R classifiers use the same batches in the same order, so their products are one (B, D) x (D, R * C) matrix product,
and the result equals that of R separate runs. The rate is chosen on a held-out tenth of the training images and trained
again on all of them. Test images are never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loco_det.annotations.subsets import share_of_each_class
from loco_det.core.errors import UserError

# For batches of 256; features are standardised, so one range suits every stage.
RATES = {
    "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "lars": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
}
HELD_OUT = 0.1


@dataclass(frozen=True)
class Recipe:
    """Training options; `rates` are for batches of 256 and scale with the batch."""

    optimizer: str = "sgd"
    rates: Sequence[float] = RATES["sgd"]
    epochs: int = 100
    batch: int = 256
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Standard:
    """Standardises features to mean 0 and deviation 1 of the training features; constant ones become 0."""

    mean: Tensor  # (D,)
    scale: Tensor  # (D,)

    @staticmethod
    def of(features: Tensor, rows: Tensor | None = None) -> Standard:
        """Measure (N, D) features, or these rows of them, a few thousand at a time."""
        rows = torch.arange(len(features), device=features.device) if rows is None else rows
        chunks, count = rows.split(8192), len(rows)
        mean = sum(features[chunk].double().sum(0) for chunk in chunks) / count
        variance = sum((features[chunk].double() - mean).square().sum(0) for chunk in chunks) / count
        scale = torch.where(variance > 0, variance.rsqrt(), torch.zeros_like(variance))
        return Standard(mean.to(features.dtype), scale.to(features.dtype))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale


def train_classifiers(
    features: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    advance: Callable[[int], None] = lambda _: None,
    *,
    standard: Callable[[Tensor], Tensor] = lambda x: x,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Train R classifiers together.

    Args:
        features: (N, D), on the device to work on. They are not copied as a whole: ImageNet's take 10 GB.
        labels: (N,) int64.
        advance: called with the number of steps done.
        standard: standardises a batch.
        rows: train on these features only.

    Returns:
        weight (R, C, D) and bias (R, C); not finite for rates that diverged.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    start = torch.randn(classes, features.shape[1], generator=generator).to(features) * 0.01
    weights = [nn.Parameter(start.clone()) for _ in recipe.rates]
    biases = [nn.Parameter(torch.zeros(classes).to(features)) for _ in recipe.rates]
    optimizer = _optimizer(recipe, weights, biases)
    rows = torch.arange(len(features), device=features.device) if rows is None else rows
    per_epoch = math.ceil(len(rows) / recipe.batch)
    total = recipe.epochs * per_epoch
    for epoch in range(recipe.epochs):
        order = rows[torch.randperm(len(rows), generator=generator).to(features.device)]
        for number, chosen in enumerate(order.split(recipe.batch)):
            factor = 0.5 * (1 + math.cos(math.pi * (epoch * per_epoch + number) / total))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            logits = torch.addmm(torch.cat(biases), standard(features[chosen]), torch.cat(weights).T)
            logits = logits.view(len(chosen), len(weights), classes).transpose(1, 2)  # (B, C, R)
            target = labels[chosen, None].expand(-1, len(weights))
            loss = nn.functional.cross_entropy(logits, target, reduction="none").mean(0).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # a sum: the rates' gradients are independent
            optimizer.step()
            advance(1)
    return torch.stack(weights).detach(), torch.stack(biases).detach()


def _optimizer(recipe: Recipe, weights: list[nn.Parameter], biases: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD, or LARS with adaptive steps for the weights but not the biases."""
    lars = {"always_adapt": True} if recipe.optimizer == "lars" else {}  # without decay timm's Lars would be SGD
    groups = []
    for rate, weight, bias in zip(recipe.rates, weights, biases):
        peak = rate * recipe.batch / 256
        groups += [
            {"params": [weight], "peak": peak, "weight_decay": recipe.weight_decay, **lars},
            {"params": [bias], "peak": peak, "weight_decay": 0.0},
        ]
    if recipe.optimizer == "lars":
        from timm.optim import Lars  # lazy: importing it takes as long as torch

        return Lars(groups, lr=0.0, momentum=recipe.momentum)
    return torch.optim.SGD(groups, lr=0.0, momentum=recipe.momentum)


def sweep_steps(count: int, recipe: Recipe) -> int:
    """Return the approximate number of `advance(1)` calls of `linear_probe`, for a progress bar."""
    return recipe.epochs * (math.ceil(count * (1 - HELD_OUT) / recipe.batch) + math.ceil(count / recipe.batch))


def linear_probe(
    features: Tensor,
    labels: Tensor,
    classes: int,
    recipe: Recipe,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Callable[[Tensor], Tensor], dict[str, object]]:
    """Choose the rate on held-out images, then train with it on all.

    Args:
        features: (N, D) as extracted. labels: (N,) int64, on the same device.

    Returns:
        A function from features (M, D) to scores (M, C), and facts: the rate, whether it is the first or last of the
        sweep, and every rate's held-out accuracy in percent (None if it diverged).

    Raises:
        UserError: every rate diverged, or the chosen one on all images.
    """
    held = torch.from_numpy(
        share_of_each_class(labels.cpu().numpy(), [str(i) for i in range(len(labels))], HELD_OUT, recipe.seed)
    ).to(features.device)
    kept = torch.ones(len(labels), dtype=torch.bool, device=features.device)
    kept[held] = False
    if not kept.any():
        raise UserError(f"--data: {len(labels)} training images are too few to hold any out; give more, two of a class")
    kept = kept.nonzero().squeeze(1)
    standard = Standard.of(features, kept)
    weight, bias = train_classifiers(features, labels, classes, recipe, advance, standard=standard, rows=kept)
    accuracy = [_accuracy(standard(features[held]), labels[held], w, b) for w, b in zip(weight, bias)]
    if all(a is None for a in accuracy):
        raise UserError(f"the linear probe diverged at every learning rate of {list(recipe.rates)}; lower --rates")
    best = max(range(len(accuracy)), key=lambda r: -1.0 if accuracy[r] is None else accuracy[r])
    final = Recipe(**{**vars(recipe), "rates": (recipe.rates[best],)})
    standard = Standard.of(features)
    weight, bias = train_classifiers(features, labels, classes, final, advance, standard=standard)
    if not weight.isfinite().all():
        raise UserError(
            f"the linear probe diverged at the learning rate that it chose, {final.rates[0]}; lower --rates"
        )
    facts = {
        "rate": recipe.rates[best],
        "rate_at_edge": len(recipe.rates) > 1 and best in (0, len(recipe.rates) - 1),
        "held_out_top1": dict(zip(map(str, recipe.rates), accuracy)),
    }
    return lambda x: standard(x) @ weight[0].T + bias[0], facts


def _accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float | None:
    scores = features @ weight.T + bias
    if not scores.isfinite().all():
        return None
    return 100 * (scores.argmax(1) == labels).double().mean().item()
