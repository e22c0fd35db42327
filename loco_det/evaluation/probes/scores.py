"""Top-1 and top-5 accuracy with intervals.

Shape legend: M test images, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 10_000
TOP = (1, 5)


def top_scores(scores: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float | list[float]]:
    """Compute the percentage of images with their label among the 1 and the 5 highest scores, with intervals.

    Args:
        scores: (M, C) floating, any scale; a score that is not finite ranks last.
        labels: (M,) integers.
        seed: seed of the resampling.

    Returns:
        {"top1": percent, "top1_interval": [low, high], "top5": ..., "top5_interval": ...}. The interval is the middle
        95 % over `RESAMPLES` bootstrap samples of the test images (percentiles; training is not repeated, so it
        excludes the variation between seeds).
    """
    scores = scores.nan_to_num(-torch.inf, posinf=-torch.inf)
    ranked = scores.topk(min(max(TOP), scores.shape[1]), dim=1).indices
    hit = ranked == labels.to(ranked.device)[:, None]
    out: dict[str, float | list[float]] = {}
    for top in TOP:
        right, total = int(hit[:, :top].sum()), len(labels)
        out[f"top{top}"] = 100 * right / total
        out[f"top{top}_interval"] = bootstrap_interval(right, total, seed)
    return out


def bootstrap_interval(right: int, total: int, seed: int = 0) -> list[float]:
    """[low, high] in percent of the share right / total over bootstrap samples.

    Drawing `total` answers with replacement from `right` ones and zeros and counting the ones is drawing from a
    binomial distribution, so no sample needs to be made.
    """
    drawn = np.random.default_rng(seed).binomial(total, right / total, RESAMPLES)
    return [float(value) for value in np.percentile(drawn, (2.5, 97.5)) * 100 / total]
