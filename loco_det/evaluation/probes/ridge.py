"""The ridge classifier: least squares to +1 and -1, in closed form, with its strength chosen by leave-one-out.

Shape legend: N training features, D dimensions, C classes, L strengths.

W minimises |Y - (X - mean) W - b|^2 + lambda |W|^2 with Y = +1 for an image's class and -1 for the others, as in
scikit-learn's RidgeClassifier. One eigendecomposition of the D x D covariance serves every lambda, and the
leave-one-out error needs no refitting: it is the residual divided by 1 - leverage (Cook and Weisberg, Residuals and
Influence in Regression, 1982, section 2.2). All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Times N: lambda in units of the variance of a standardised feature.
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-12, 5))
CHUNK = 8192


@dataclass(frozen=True)
class Ridge:
    """A fitted classifier.

    Attributes:
        weight: (D, C) float64. bias: (C,) float64.
        strength: the lambda chosen.
        errors: lambda -> mean squared leave-one-out error.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    errors: dict[float, float]

    def __call__(self, features: Tensor) -> Tensor:
        """(M, D) -> (M, C) float64 scores."""
        return features.to(self.weight) @ self.weight + self.bias


@torch.no_grad()
def fit_ridge(
    features: Tensor,
    labels: Tensor,
    classes: int,
    strengths: tuple[float, ...] | None = None,
    standard: Callable[[Tensor], Tensor] = lambda x: x,
) -> Ridge:
    """Fit on (N, D) features and (N,) labels, on the features' device, a few thousand at a time.

    Args:
        strengths: candidate lambdas; default `STRENGTHS` times N.
        standard: standardises some features; also those that are scored must be standardised.

    Raises:
        ValueError: fewer than two features, or inconsistent shapes or strengths.
    """
    count = len(features)
    lambdas = strengths or tuple(count * value for value in STRENGTHS)
    if count < 2 or labels.shape != (count,) or min(lambdas) <= 0:
        raise ValueError(f"{count} features, {tuple(labels.shape)} labels, strengths {lambdas}")
    labels = labels.to(features.device)
    mean = sum(standard(part).double().sum(0) for part in features.split(CHUNK)) / count
    covariance = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    moment = features.new_zeros(features.shape[1], classes, dtype=torch.float64)
    target_mean = torch.bincount(labels, minlength=classes).double() * (2 / count) - 1
    for part, target in zip(features.split(CHUNK), labels.split(CHUNK)):
        x = standard(part).double() - mean
        covariance += x.T @ x
        moment += x.T @ (_targets(target, classes) - target_mean)
    values, vectors = torch.linalg.eigh(covariance)
    values, rotated = values.clamp_(min=0), vectors.T @ moment
    squared = torch.zeros(len(lambdas), dtype=torch.float64)
    for part, target in zip(features.split(CHUNK), labels.split(CHUNK)):
        z = (standard(part).double() - mean) @ vectors
        y = _targets(target, classes) - target_mean
        for i, strength in enumerate(lambdas):
            shrunk = 1 / (values + strength)
            leverage = (z.square() @ shrunk + 1 / count).clamp(max=1 - 1e-12)  # 1 / count: for the fitted mean
            residual = y - z @ (shrunk[:, None] * rotated)
            squared[i] += (residual / (1 - leverage)[:, None]).square().sum().cpu()
    errors = dict(zip(lambdas, (squared / (count * classes)).tolist()))
    best = min(errors, key=errors.__getitem__)
    weight = vectors @ (rotated / (values + best)[:, None])
    return Ridge(weight, target_mean - mean @ weight, best, errors)


def _targets(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels.long(), classes).double() * 2 - 1
