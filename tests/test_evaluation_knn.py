"""The nearest-neighbour classifier against a loop in float64, scikit-learn, and cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loco_det.evaluation.knn import knn_predict


def made_up(n: int, m: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clusters that overlap, of unequal length, so that neither normalisation nor the order of neighbours is idle."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g)
    labels = torch.randint(classes, (n,), generator=g)
    lengths = torch.rand(n + m, 1, generator=g) * 9 + 0.1
    drawn = torch.cat([labels, torch.randint(classes, (m,), generator=g)])
    features = (centres[drawn] + torch.randn(n + m, d, generator=g)) * lengths
    return features[:n], labels, features[n:]


def loop(train: np.ndarray, labels: np.ndarray, query: np.ndarray, k: int, temperature: float, classes: int):
    """One query in float64, by the formula of the paper."""
    similar = [float(t @ query) / (math.sqrt(t @ t) * math.sqrt(query @ query)) for t in train]
    votes = [0.0] * classes
    for i in sorted(range(len(train)), key=lambda i: -similar[i])[:k]:
        votes[labels[i]] += math.exp(similar[i] / temperature)
    return [v / sum(votes) for v in votes]


@pytest.mark.parametrize("chunks", [{}, {"chunk": 7, "train_chunk": 11}, {"chunk": 1, "train_chunk": 3}])
@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_equals_a_loop_in_float64(k: int, chunks: dict[str, int]) -> None:
    train, labels, queries = made_up(60, 23, 16, 5)
    found = knn_predict(train, labels, queries, k=k, temperature=0.07, classes=5, **chunks)
    expected = [loop(train.double().numpy(), labels.numpy(), q.double().numpy(), k, 0.07, 5) for q in queries]
    assert found.shape == (23, 5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=2e-5, atol=1e-6)


def test_equals_scikit_learn_on_the_same_features() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    train, labels, queries = made_up(400, 150, 12, 7, seed=1)

    def weight(cosine_distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - cosine_distance) / 0.1)

    oracle = neighbors.KNeighborsClassifier(30, metric="cosine", weights=weight).fit(train.double(), labels)
    expected = oracle.predict_proba(queries.double())
    found = knn_predict(train, labels, queries, k=30, temperature=0.1, classes=7, chunk=40, train_chunk=90)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=1e-6)
    assert (found.argmax(1).numpy() == oracle.predict(queries.double())).all()


def test_one_neighbour_finds_each_feature_itself() -> None:
    train, labels, _ = made_up(50, 1, 8, 4, seed=2)
    found = knn_predict(train, labels, 3 * train, k=1, classes=4)
    torch.testing.assert_close(found, torch.nn.functional.one_hot(labels, 4).float(), rtol=0, atol=0)


def test_a_large_temperature_counts_and_a_small_one_takes_the_nearest() -> None:
    train, labels, queries = made_up(80, 9, 8, 3, seed=3)
    counted = knn_predict(train, labels, queries, k=80, temperature=1e9, classes=3)
    shares = torch.bincount(labels, minlength=3) / 80
    torch.testing.assert_close(counted, shares.expand(9, 3))
    nearest = knn_predict(train, labels, queries, k=80, temperature=1e-6, classes=3)
    torch.testing.assert_close(nearest, knn_predict(train, labels, queries, k=1, classes=3))


def test_a_class_without_training_features_and_zero_features_get_finite_scores() -> None:
    train, labels, queries = made_up(30, 4, 8, 3, seed=4)
    queries[0] = 0
    found = knn_predict(train, labels, queries, classes=6)
    assert found.isfinite().all()
    assert (found[:, 3:] == 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_half_precision_is_compared_in_float32() -> None:
    train, labels, queries = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in made_up(60, 9, 16, 5))
    found = knn_predict(train, labels, queries, classes=5)
    torch.testing.assert_close(found, knn_predict(train.float(), labels, queries.float(), classes=5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3, 5)}, "shapes"),
        ({"train_labels": torch.zeros(9, dtype=torch.int64)}, "9"),
        ({"train_labels": torch.full((10,), 4)}, "to 4"),
        ({"train_labels": torch.full((10,), -1)}, "from -1"),
        ({"k": 0}, "k 0"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"chunk": 0}, "chunk 0"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    arguments = {
        "train_features": torch.ones(10, 4),
        "train_labels": torch.zeros(10, dtype=torch.int64),
        "features": torch.ones(3, 4),
        "classes": 4,
    }
    with pytest.raises(ValueError, match=message):
        knn_predict(**(arguments | change))
