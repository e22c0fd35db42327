"""Ridge, linear probe and scores against scikit-learn, brute force, and runs of torch's optimizers one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from plain_lars import PlainLars
from torch import Tensor, nn

from loco_det.annotations.subsets import hashed_order, part_size, share_of_each_class
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.linear import Recipe, Standard, linear_probe, sweep_steps, train_classifiers
from loco_det.evaluation.probes.ridge import fit_ridge
from loco_det.evaluation.probes.scores import bootstrap_interval, top_scores

CLASSES = 4


def clusters(count: int, dimensions: int = 6, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """(count, dimensions) float32 features of overlapping classes, off centre and of unequal scale; labels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, dimensions, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.randint(CLASSES, (count,), generator=g)
    noise = torch.randn(count, dimensions, generator=g) * spread
    return (centres[labels] + noise) * torch.logspace(-1, 1, dimensions) + 3, labels


# --- ridge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dimensions"), [(60, 6), (12, 20)])  # more images than dimensions, and fewer
def test_ridge_equals_scikit_learn(count: int, dimensions: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    features, labels = clusters(count, dimensions)
    test, _ = clusters(40, dimensions, seed=1)
    oracle = linear_model.RidgeClassifier(alpha=2.5).fit(features.double(), labels)
    fitted = fit_ridge(features, labels, CLASSES, (2.5,))
    np.testing.assert_allclose(fitted(test).numpy(), oracle.decision_function(test.double()), rtol=1e-7, atol=1e-8)
    assert (fitted(test).argmax(1).numpy() == oracle.predict(test.double())).all()


@pytest.mark.parametrize(("count", "dimensions"), [(60, 6), (12, 20)])
def test_ridge_chooses_as_scikit_learn_does(count: int, dimensions: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    features, labels = clusters(count, dimensions)
    strengths = tuple(10.0**p for p in range(-3, 5))
    oracle = linear_model.RidgeClassifierCV(alphas=strengths).fit(features.double(), labels)
    assert fit_ridge(features, labels, CLASSES, strengths).strength == oracle.alpha_


def test_leave_one_out_equals_refitting_without_each_image() -> None:
    features, labels = clusters(25)
    strengths = (0.1, 3.0, 100.0)
    targets = nn.functional.one_hot(labels, CLASSES).double().numpy() * 2 - 1
    x = features.double().numpy()
    fitted = fit_ridge(features, labels, CLASSES, strengths)
    for strength in strengths:
        squared = []
        for i in range(len(x)):
            kept = np.delete(np.arange(len(x)), i)
            mean, target_mean = x[kept].mean(0), targets[kept].mean(0)
            centred = x[kept] - mean
            w = np.linalg.solve(centred.T @ centred + strength * np.eye(6), centred.T @ (targets[kept] - target_mean))
            squared.append((targets[i] - target_mean - (x[i] - mean) @ w) ** 2)
        assert fitted.errors[strength] == pytest.approx(np.mean(squared), rel=1e-9)
    assert fitted.strength == min(fitted.errors, key=fitted.errors.__getitem__)


def test_ridge_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(50)
    whole = fit_ridge(features, labels, CLASSES)
    monkeypatch.setattr("loco_det.evaluation.probes.ridge.CHUNK", 7)
    parts = fit_ridge(features, labels, CLASSES)
    assert parts.strength == whole.strength
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-9, atol=1e-12)


def test_ridge_shrinks_to_the_class_shares() -> None:
    """An infinite lambda leaves the mean of the targets; a duplicated dimension changes no prediction."""
    features, labels = clusters(50)
    features = features.double()
    shares = nn.functional.one_hot(labels, CLASSES).double().mean(0) * 2 - 1
    torch.testing.assert_close(fit_ridge(features, labels, CLASSES, (1e18,))(features[:1])[0], shares)
    twice = fit_ridge(torch.cat([features, features], 1), labels, CLASSES, (8.0,))
    once = fit_ridge(features * 2**0.5, labels, CLASSES, (8.0,))
    torch.testing.assert_close(twice(torch.cat([features, features], 1)), once(features * 2**0.5))


@pytest.mark.parametrize(("count", "strengths"), [(1, None), (5, (0.0,))])
def test_ridge_refuses(count: int, strengths: tuple[float, ...] | None) -> None:
    features, labels = clusters(count)
    with pytest.raises(ValueError, match="strengths"):
        fit_ridge(features, labels, CLASSES, strengths)


# --- linear -------------------------------------------------------------------------------------------------------


def alone(features: Tensor, labels: Tensor, recipe: Recipe, rate: float) -> tuple[Tensor, Tensor]:
    """One classifier by a plain loop: nn.Linear, torch's SGD or the few lines of LARS, a cosine."""
    g = torch.Generator().manual_seed(recipe.seed)
    model = nn.Linear(features.shape[1], CLASSES)
    with torch.no_grad():
        model.weight.copy_(torch.randn(CLASSES, features.shape[1], generator=g) * 0.01)
        model.bias.zero_()
    groups = [{"params": [model.weight], "weight_decay": recipe.weight_decay}, {"params": [model.bias]}]
    sgd = torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum)
    lars = PlainLars([model.weight, model.bias], recipe.momentum, recipe.weight_decay)
    steps = recipe.epochs * -(-len(features) // recipe.batch)
    step = 0
    for _ in range(recipe.epochs):
        order = torch.randperm(len(features), generator=g)
        for at in range(0, len(features), recipe.batch):
            rows = order[at : at + recipe.batch]
            lr = rate * recipe.batch / 256 * 0.5 * (1 + np.cos(np.pi * step / steps))
            for group in sgd.param_groups:
                group["lr"] = lr
            model.zero_grad()
            nn.functional.cross_entropy(model(features[rows]), labels[rows]).backward()
            sgd.step() if recipe.optimizer == "sgd" else lars.step(lr)
            step += 1
    return model.weight.detach(), model.bias.detach()


# timm's LARS divides by |g| + decay |w| and the plain one by |g + decay w|, which are the same without decay alone.
@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 1e-3), ("sgd", 0.0), ("lars", 0.0)])
def test_all_rates_at_once_equal_each_rate_alone(optimizer: str, decay: float) -> None:
    features, labels = clusters(70)
    features = Standard.of(features)(features)
    recipe = Recipe(optimizer, (0.1, 1.0, 20.0), epochs=4, batch=32, weight_decay=decay, seed=3)
    weight, bias = train_classifiers(features, labels, CLASSES, recipe)
    assert weight.shape == (3, CLASSES, 6)
    for r, rate in enumerate(recipe.rates):
        expected = alone(features, labels, recipe, rate)
        torch.testing.assert_close(weight[r], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[r], expected[1], rtol=1e-4, atol=1e-5)


def test_lars_is_not_sgd() -> None:
    features, labels = clusters(70)
    sgd, lars = (train_classifiers(features, labels, CLASSES, Recipe(o, (0.1,), epochs=1))[0] for o in ("sgd", "lars"))
    assert (sgd - lars).abs().max() > 0.01 * sgd.abs().max()


def test_a_rate_that_diverges_leaves_the_others_alone() -> None:
    features, labels = clusters(70)
    features = Standard.of(features)(features)
    recipe = Recipe("sgd", (0.3, 1e30), epochs=3, batch=32, weight_decay=1e-3)
    weight, _ = train_classifiers(features, labels, CLASSES, recipe)
    only, _ = train_classifiers(features, labels, CLASSES, Recipe("sgd", (0.3,), epochs=3, batch=32, weight_decay=1e-3))
    assert not weight[1].isfinite().all()
    torch.testing.assert_close(weight[0], only[0])


def test_long_training_reaches_the_optimum_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    features, labels = clusters(200)
    x = Standard.of(features)(features)
    decay = 0.01
    recipe = Recipe("sgd", (0.5,), epochs=300, batch=200, weight_decay=decay)
    weight, bias = train_classifiers(x, labels, CLASSES, recipe)
    # torch adds decay / 2 |w|^2 to the mean loss, scikit-learn 1 / (2 C) |w|^2 to the sum.
    oracle = linear_model.LogisticRegression(C=1 / (decay * 200), tol=1e-10, max_iter=10000).fit(x.double(), labels)
    torch.testing.assert_close(weight[0], torch.tensor(oracle.coef_).float(), atol=2e-3, rtol=0)
    centred = torch.tensor(oracle.intercept_).float()
    torch.testing.assert_close(bias[0] - bias[0].mean(), centred - centred.mean(), atol=2e-3, rtol=0)


def test_the_probe_chooses_a_rate_that_learns_without_seeing_the_test_images() -> None:
    features, labels = clusters(400, spread=0.7)
    test, truth = clusters(200, seed=5, spread=0.7)
    recipe = Recipe("sgd", (1e-7, 0.1, 1e30), epochs=20, batch=64, weight_decay=1e-5)
    advanced: list[int] = []
    classifier, facts = linear_probe(features, labels, CLASSES, recipe, advanced.append)
    assert facts["rate"] == 0.1
    assert facts["rate_at_edge"] is False
    assert facts["held_out_top1"]["1e+30"] is None
    assert facts["held_out_top1"]["0.1"] > facts["held_out_top1"]["1e-07"]
    assert top_scores(classifier(test), truth)["top1"] > 85
    assert abs(len(advanced) - sweep_steps(400, recipe)) <= recipe.epochs
    with pytest.raises(UserError, match="--rates"):
        linear_probe(features, labels, CLASSES, Recipe("sgd", (1e30, 1e32), epochs=2, batch=64, weight_decay=1e-3))


def test_standardising() -> None:
    features, _ = clusters(300)
    features[:, 2] = 5.0
    out = Standard.of(features)(features)
    torch.testing.assert_close(out.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    expected = torch.ones(6)
    expected[2] = 0
    torch.testing.assert_close(out.std(0, correction=0), expected, atol=1e-5, rtol=0)


# --- scores -------------------------------------------------------------------------------------------------------


def test_top_scores_by_hand() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [float("nan"), 1, 2, 3, 4, 5]])
    found = top_scores(scores, torch.tensor([0, 4, 5, 0]))
    assert found["top1"] == 25
    assert found["top5"] == 50
    assert found["top1_interval"][0] <= 25 <= found["top1_interval"][1]
    assert top_scores(torch.eye(3), torch.arange(3))["top1_interval"] == [100, 100]


def test_the_interval_is_that_of_resampling_images() -> None:
    hits = np.r_[np.ones(37), np.zeros(63)]
    drawn = np.random.default_rng(1).choice(hits, (20_000, 100)).mean(1) * 100
    low, high = np.percentile(drawn, (2.5, 97.5))
    found = bootstrap_interval(37, 100)
    assert found == pytest.approx([low, high], abs=1.01)
    assert bootstrap_interval(37, 100) == found


# --- subsets ------------------------------------------------------------------------------------------------------


def test_the_rule_of_subsets_can_be_worked_out_by_hand() -> None:
    import hashlib

    names = [str(i) for i in range(50)]
    expected = sorted(range(50), key=lambda i: hashlib.sha256(f"7 {i}".encode()).hexdigest())
    assert hashed_order(names, 7).tolist() == expected
    assert hashed_order(names, 7).tolist() != hashed_order(names, 8).tolist()
    # printf '0 42' | sha256sum: a230f2..., and a55581... for 43
    assert hashed_order(["43", "42"], 0).tolist() == [1, 0]


def test_shares_are_stratified_nested_and_independent_of_order() -> None:
    labels = np.array([0] * 200 + [1] * 50 + [2] * 3)
    names = [f"{label}/{i}" for i, label in enumerate(labels)]
    parts = [set(share_of_each_class(labels, names, share, 0).tolist()) for share in (0.01, 0.1, 0.5, 1.0)]
    for small, large in itertools.pairwise(parts):
        assert small < large
    assert [np.bincount(labels[sorted(p)]).tolist() for p in parts] == [
        [2, 1, 1],
        [20, 5, 1],
        [100, 25, 2],
        [200, 50, 3],
    ]
    shuffled = np.random.default_rng(0).permutation(len(labels))
    again = share_of_each_class(labels[shuffled], [names[i] for i in shuffled], 0.1, 0)
    assert {names[i] for i in parts[1]} == {names[shuffled[i]] for i in again}


@pytest.mark.parametrize(("share", "total", "size"), [(0.01, 100, 1), (0.07, 100, 7), (0.1, 3, 1), (1.0, 5, 5)])
def test_part_sizes(share: float, total: int, size: int) -> None:
    assert part_size(share, total) == size
