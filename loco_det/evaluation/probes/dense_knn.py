"""Nearest-neighbour segmentation: each patch takes the classes of the training patches most similar to it.

The protocol of Hummingbird (Balazevic et al., "Towards In-Context Scene Understanding", NeurIPS 2023): a patch's label
is the share of each class among its pixels, and a query's the mean of its k nearest patches' labels, weighted by
softmax(cosine / T), with k = 30 and T = 0.02. The memory has the same number of patches of every training image, drawn
with preference for classes that fill few patches of it: a patch's key is a uniform number times the sum, over the
classes in it, of the patches of the image that have the class, and the smallest keys are kept.

The paper's memory of 10,240,000 patches is nearly every patch of its data sets; here it is `PATCHES` an image, so that
the search costs less than the backbone. Ignored pixels count for no share, and patches without others are left out.

Shape legend: B images in a batch, P patches of each, D dimensions, K classes, N patches in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from loco_det.core.errors import UserError
from loco_det.evaluation.knn import nearest
from loco_det.evaluation.probes.dense import Head, as_patches

NEIGHBOURS, TEMPERATURE, PATCHES = 30, 0.02, 8
_QUERIES, _KEYS = 512, 65536  # compared at a time


class DenseKnn:
    """A fitter, see the module.

    Args:
        k: neighbours; all if there are fewer.
        temperature: T.
        patches: kept of each image.
    """

    def __init__(self, k: int, temperature: float, patches: int, seed: int) -> None:
        self.k, self.temperature, self.patches, self.seed = k, temperature, patches, seed
        self.features: list[Tensor] = []
        self.shares: list[Tensor] = []

    def add(self, features: Tensor, counts: Tensor, places: Sequence[int]) -> None:
        for image, pixels, place in zip(features, counts.cpu(), places):
            rows = sampled(pixels, self.patches, np.random.default_rng([self.seed, place]))
            self.features.append(normalize(image[rows.to(image.device)], dim=1))
            self.shares.append((pixels[rows] / pixels[rows].sum(1, keepdim=True)).to(image.device))

    def finish(self) -> tuple[Head, dict[str, Any]]:
        bank, shares = torch.cat(self.features), torch.cat(self.shares)
        if not len(bank):
            raise UserError("--data: no pixel of the training images' masks has a class; give other images")
        k = min(self.k, len(bank))
        facts = {"k": k, "temperature": self.temperature, "patches_an_image": self.patches, "memory": len(bank)}
        return lambda maps: vote(maps, bank, shares, k, self.temperature), facts


def sampled(counts: Tensor, patches: int, rng: np.random.Generator) -> Tensor:
    """Return the rows, at most `patches`, that are drawn from an image's (P, K) counts, see the module."""
    there = counts > 0
    keys = there.float() @ there.sum(0).float() * torch.from_numpy(rng.random(len(counts), np.float32))
    keys[~there.any(1)] = torch.inf
    return keys.argsort()[: min(patches, int(there.any(1).sum()))]


def vote(maps: Tensor, bank: Tensor, shares: Tensor, k: int, temperature: float) -> Tensor:
    """Return the votes for each class.

    Args:
        maps: (B, D, G, G).
        bank: (N, D), of length 1. shares: (N, K).

    Returns:
        (B, K, G, G); they sum to 1 over the classes.
    """
    queries = as_patches(maps).flatten(0, 1)
    votes = []
    for part in queries.split(_QUERIES):
        similarity, index = nearest(normalize(part, dim=1), bank, k, _KEYS)
        weights = (similarity / temperature).softmax(1)
        votes.append(torch.einsum("mn,mnk->mk", weights, shares[index]))
    return torch.cat(votes).view(len(maps), -1, shares.shape[1]).transpose(1, 2).unflatten(2, maps.shape[2:])
