"""Multinomial logistic regression from patches to classes, by L-BFGS, with its penalty chosen on held-out images.

The protocol of CAPI (Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling", 2025, and
its code, eval_segmentation.py): a patch's class is that of most of its pixels; features are standardised; C, from 1e-6
to 1e5 in eight steps, is the one with the best mIoU on a tenth of the training images, and the final fit is to all.
Minimised is C * sum of cross entropies + |W|^2 / 2, without a penalty of the biases, as by scikit-learn.

It differs from CAPI where a patch has ignored pixels: they count for nothing, instead of making the patch's class. A
step passes over all patches, so they are kept: at most `MEMORY` bytes of features (and up to three copies of them), the
same number of every image, drawn by the seed. Each C starts at the solution of the one before it and stops after
`ITERATIONS`.

Shape legend: N patches, D dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loco_det.core.errors import UserError
from loco_det.evaluation.labels import scores_of_counts
from loco_det.evaluation.probes.dense import Head, linear_head
from loco_det.evaluation.probes.linear import Standard

PENALTIES = tuple(10.0 ** (-6 + 11 * step / 7) for step in range(8))
ITERATIONS = 100
HISTORY = 10
MEMORY = 2**29


class DenseLogistic:
    """A fitter, see the module.

    Args:
        held: (images,) bool, those on which C is chosen.
    """

    def __init__(self, dimensions: int, held: np.ndarray, seed: int) -> None:
        self.held, self.seed = held, seed
        self.patches = max(1, MEMORY // (4 * dimensions * len(held)))  # of each image
        self.kept: tuple[list[Tensor], list[Tensor], list[bool]] = ([], [], [])

    def add(self, features: Tensor, counts: Tensor, places: Sequence[int]) -> None:
        for image, pixels, place in zip(features, counts.to(features.device), places):
            rows = pixels.sum(1).nonzero()[:, 0]
            if len(rows) > self.patches:
                rng = np.random.default_rng([self.seed, place])
                rows = rows[torch.from_numpy(np.sort(rng.permutation(len(rows))[: self.patches])).to(rows.device)]
            for column, part in zip(self.kept, (image[rows], pixels[rows], [bool(self.held[place])] * len(rows))):
                column.extend(part) if isinstance(part, list) else column.append(part)

    def finish(self) -> tuple[Head, dict[str, Any]]:
        features, counts = torch.cat(self.kept[0]), torch.cat(self.kept[1])
        held = torch.tensor(self.kept[2], dtype=torch.bool, device=features.device)
        if held.all() or not held.any():
            raise UserError("--data: the masks of the training images have too few pixels with a class; give more")
        standard, scores = Standard.of(features[~held]), {}
        start = None
        x, labels, unseen = standard(features[~held]), counts[~held].argmax(1), standard(features[held])
        for penalty in PENALTIES:
            start = fit_logistic(x, labels, counts.shape[1], penalty, start=start)
            scores[penalty] = _miou((unseen @ start[0].T + start[1]).argmax(1), counts[held])
        best = max(scores, key=scores.__getitem__)
        standard = Standard.of(features)
        weight, bias = fit_logistic(standard(features), counts.argmax(1), counts.shape[1], best)
        weight = weight * standard.scale
        facts = {
            "C": best,
            "C_at_edge": best in (PENALTIES[0], PENALTIES[-1]),
            "held_out_miou": {f"{penalty:.3g}": score for penalty, score in scores.items()},
            "held_out_images": int(self.held.sum()),
            "iterations": ITERATIONS,
            "training_patches": len(features),
        }
        return linear_head(weight.T, bias - weight @ standard.mean), facts


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalty: float,
    *,
    iterations: int = ITERATIONS,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimise C * sum of cross entropies + |W|^2 / 2.

    Args:
        features: (N, D). labels: (N,) int64.
        penalty: C.
        start: weights and biases to start at; default 0.

    Returns:
        weights (K, D) and biases (K,), in the features' type.
    """
    shapes = ((classes, features.shape[1]), (classes,))
    values = start or tuple(features.new_zeros(shape) for shape in shapes)
    weight, bias = (value.clone().requires_grad_() for value in values)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=HISTORY, tolerance_grad=1e-7, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    decay = 0.5 / (penalty * len(features))  # the objective divided by C * N

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(torch.addmm(bias, features, weight.T), labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _miou(predicted: Tensor, counts: Tensor) -> float:
    """mIoU in percent if all pixels of a patch are predicted as (N,) its class; they have (N, K) classes."""
    pixels, chosen = counts.double(), predicted[:, None]
    zeros = pixels.new_zeros(counts.shape[1])
    right = zeros.scatter_add(0, predicted, pixels.gather(1, chosen)[:, 0])
    claimed = zeros.scatter_add(0, predicted, pixels.sum(1))
    names = tuple(map(str, range(counts.shape[1])))
    return scores_of_counts(*(part.cpu().numpy() for part in (right, pixels.sum(0), claimed)), names)["IoU"]
