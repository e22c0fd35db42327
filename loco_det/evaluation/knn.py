"""The weighted nearest-neighbour classifier on frozen features: exact, and chunked to fit into memory.

Each of the k training features most similar to a query votes for its class with weight exp(similarity / T) (Wu et al.,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4; k = 20 and
T = 0.07 are what DINO evaluates with). Similarity is the cosine.

Shape legend: N training features, M queries, D dimensions, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    classes: int,
    chunk: int = 1024,
    train_chunk: int = 65536,
) -> Tensor:
    """Compute the votes of every query's k nearest neighbours for every class.

    The whole similarity matrix is never in memory: `chunk` queries at a time are compared with `train_chunk` training
    features, and the best k so far are merged. The chunk sizes affect only the last bit of a similarity and the choice
    among equally similar k-th neighbours.

    Args:
        train_features: (N, D) floating; normalised here. Half precision is compared in float32.
        train_labels: (N,) integers in [0, C).
        features: (M, D), on the device to compute on.
        k: number of neighbours; all N if that is less.
        temperature: T > 0 in the weight exp(similarity / T).
        classes: C.
        chunk: queries at a time.
        train_chunk: training features at a time.

    Returns:
        (M, C) float32 scores that sum to 1 over the classes: the votes divided by their sum.

    Raises:
        ValueError: shapes that do not fit, labels outside [0, C), no training feature, or an option out of range.
    """
    _check(train_features, train_labels, features, k, temperature, classes, min(chunk, train_chunk))
    dtype = torch.promote_types(features.dtype, torch.float32)
    labels = train_labels.to(features.device, torch.int64)
    bank = normalize(train_features.to(features.device, dtype), dim=1)
    k = min(k, len(bank))
    scores = torch.empty(len(features), classes, device=features.device)
    for start in range(0, len(features), chunk):
        queries = normalize(features[start : start + chunk].to(dtype), dim=1)
        similarity, index = nearest(queries, bank, k, train_chunk)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the largest: any small T works
        votes = weights.new_zeros(len(queries), classes).scatter_add_(1, labels[index], weights)
        scores[start : start + chunk] = votes / weights.sum(1, keepdim=True)
    return scores


def _check(
    train_features: Tensor, train_labels: Tensor, features: Tensor, k: int, temperature: float, classes: int, chunk: int
) -> None:
    if train_features.ndim != 2 or features.ndim != 2 or train_features.shape[1] != features.shape[1]:
        raise ValueError(f"features of shapes {tuple(train_features.shape)} and {tuple(features.shape)}")
    if train_labels.shape != train_features.shape[:1] or not len(train_labels):
        raise ValueError(f"{tuple(train_labels.shape)} labels for {len(train_features)} training features")
    if train_labels.min() < 0 or train_labels.max() >= classes:
        raise ValueError(f"labels from {train_labels.min()} to {train_labels.max()} for {classes} classes")
    if k < 1 or chunk < 1 or not temperature > 0:
        raise ValueError(f"k {k}, chunk {chunk} and temperature {temperature} must all be positive")


def nearest(queries: Tensor, bank: Tensor, k: int, train_chunk: int) -> tuple[Tensor, Tensor]:
    """Find the k rows of a bank with the largest products with each query; see `knn_predict` on chunks.

    Args:
        queries: (m, D). bank: (N, D). Of length 1 their products are cosines.

    Returns:
        (m, k) products, descending, and their rows of `bank`.
    """
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), train_chunk):
        part = queries @ bank[start : start + train_chunk].T
        value, row = part.topk(min(k, part.shape[1]), dim=1)
        best, index = torch.cat([best, value], 1), torch.cat([index, row + start], 1)
        best, kept = best.topk(min(k, best.shape[1]), dim=1)
        index = index.gather(1, kept)
    return best, index
