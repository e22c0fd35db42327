"""Ridge regression from patches to classes of pixels, in closed form and float64, from sums alone.

Every counted pixel of a mask is a row: its target is one-hot, its features are those of the patch that it is in. All
pixels of a patch share their features, so the sums over pixels are sums over patches that are weighted by their pixels
of each class, and the fit is exactly that of the pixels. Neither features nor pixels are kept: with x the D features,
standardised, and y the K targets, the sums of x, y, x x' and x y' determine the weights of every penalty and their
squared error on any other images. A tenth of the images has sums of its own, on which the penalty is chosen; the final
fit is that of all sums together.

Shape legend: N patches, D dimensions, K classes, L penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loco_det.core.errors import UserError
from loco_det.evaluation.probes.dense import Head, linear_head
from loco_det.evaluation.probes.ridge import STRENGTHS

_CONSTANT = 1e-10  # of a feature's variance relative to its mean square about `shift`; rounding leaves less


class Moments:
    """Sums over pixels, float64: of one, x, y, x x' and x y'."""

    def __init__(self, dimensions: int, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.pixels, self.x, self.y = zeros(), zeros(dimensions), zeros(classes)
        self.xx, self.xy = zeros(dimensions, dimensions), zeros(dimensions, classes)

    def add(self, x: Tensor, counts: Tensor) -> None:
        """Add patches with (N, D) features and (N, K) pixels of each class."""
        pixels = counts.sum(1)
        weighted = x * pixels[:, None]
        self.pixels += pixels.sum()
        self.x += weighted.sum(0)
        self.y += counts.sum(0)
        self.xx.addmm_(weighted.T, x)
        self.xy.addmm_(x.T, counts)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(*self.xy.shape, self.x.device)
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def standardised(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Mean and reciprocal deviation of x (D,), mean of y (K,), correlation of x (D, D) and of x with y (D, K).

        A constant feature has 0 for its reciprocal deviation.
        """
        mean, share = self.x / self.pixels, self.y / self.pixels
        covariance = self.xx / self.pixels - torch.outer(mean, mean)
        variance = covariance.diagonal()
        varies = variance > _CONSTANT * self.xx.diagonal() / self.pixels
        scale = torch.where(varies, variance, 1.0).rsqrt() * varies
        return (
            mean,
            scale,
            share,
            covariance * torch.outer(scale, scale),
            (self.xy / self.pixels - torch.outer(mean, share)) * scale[:, None],
        )

    def error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean over pixels of |y - x weight - bias|^2, for (D, K) and (K,)."""
        linear = (weight * self.xy).sum() + bias @ self.y
        square = (weight * (self.xx @ weight)).sum() + 2 * (self.x @ weight) @ bias
        return (self.pixels - 2 * linear + square) / self.pixels + bias.square().sum()


class DenseRidge:
    """A fitter, see the module.

    Args:
        held: (images,) bool, those on which the penalty is chosen.
    """

    def __init__(self, dimensions: int, classes: int, held: np.ndarray, device: torch.device) -> None:
        self.device = torch.device("cpu") if device.type == "mps" else device  # which lacks float64
        self.held, self.to = held, device
        self.parts = [Moments(dimensions, classes, self.device) for _ in range(2)]
        self.shift: Tensor | None = None

    def add(self, features: Tensor, counts: Tensor, places: Sequence[int]) -> None:
        x, counts = (part.to(self.device).double() for part in (features, counts))
        if self.shift is None:  # sums of squares about a value near the mean lose no digits
            self.shift = x.mean((0, 1))
        x = x - self.shift
        held = torch.from_numpy(self.held[list(places)]).to(self.device)
        for moments, rows in zip(self.parts, (~held, held)):
            moments.add(x[rows].flatten(0, 1), counts[rows].flatten(0, 1))

    def finish(self) -> tuple[Head, dict[str, Any]]:
        kept, held = self.parts
        if not (kept.pixels > 0 and held.pixels > 0):
            raise UserError("--data: the masks of the training images have too few pixels with a class; give more")
        errors = choose_penalty(kept, held, STRENGTHS)
        best = min(errors, key=errors.__getitem__)
        weight, bias = fit(kept + held, best)
        head = linear_head(weight.to(self.to, torch.float32), (bias - self.shift @ weight).to(self.to, torch.float32))
        return head, {
            "lambda": best,
            "lambda_at_edge": best in (STRENGTHS[0], STRENGTHS[-1]),
            "held_out_error": errors[best],
            "held_out_images": int(self.held.sum()),
        }


def choose_penalty(kept: Moments, held: Moments, strengths: Sequence[float]) -> dict[float, float]:
    """Return the error on `held` of the fit to `kept` with each penalty, all from one eigendecomposition."""
    mean, scale, share, correlation, moment = kept.standardised()
    values, vectors = torch.linalg.eigh(correlation)
    values, rotated = values.clamp_(min=0), vectors.T @ moment
    errors = {}
    for strength in strengths:
        weight = scale[:, None] * (vectors @ (rotated / (values + strength)[:, None]))
        errors[strength] = float(held.error(weight, share - mean @ weight))
    return errors


def fit(moments: Moments, strength: float) -> tuple[Tensor, Tensor]:
    """Return (D, K) weights and (K,) biases that minimise the mean over pixels of |y - x W - b|^2 + strength * |V|^2.

    V are the weights of standardised features; so `strength` is in units of such a feature's variance.
    """
    mean, scale, share, correlation, moment = moments.standardised()
    correlation.diagonal().add_(strength)
    weight = scale[:, None] * torch.linalg.solve(correlation, moment)
    return weight, share - mean @ weight
