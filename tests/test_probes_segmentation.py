"""`loco-det probe --protocol segmentation`: heads, scores and command against slow loops and scikit-learn."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.evaluation.probes import dense, dense_logistic
from loco_det.evaluation.probes.backbones import Backbone
from loco_det.evaluation.probes.dense import DenseExtractor, linear_head, pixel_counts, segmentation_scores
from loco_det.evaluation.probes.dense_knn import DenseKnn, sampled, vote
from loco_det.evaluation.probes.dense_linear import (
    DenseRecipe,
    factor,
    flipped,
    initial_head,
    pixel_loss,
    train_dense_linear,
)
from loco_det.evaluation.probes.dense_logistic import PENALTIES, DenseLogistic, fit_logistic
from loco_det.evaluation.probes.dense_ridge import DenseRidge, Moments, choose_penalty, fit
from loco_det.evaluation.probes.pixel_images import open_pixel_data, patch_counts, scaled_mask
from loco_det.evaluation.probes.segmentation import METHODS, DenseSettings, probe_segmentation

CLASSES = 3
SIDE = 16
COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)


def sklearn(module: str):
    return pytest.importorskip(f"sklearn.{module}", reason="scikit-learn is not installed")


def mask_of(number: int, side: int = SIDE) -> np.ndarray:
    """Every class in rectangles, and a corner that is ignored."""
    rng = np.random.default_rng(number)
    mask = np.zeros((side, side), np.uint8)
    for k in range(1, CLASSES):
        y, x = rng.integers(0, side // 2, 2)
        mask[y : y + side // 2, x : x + side // 3] = k
    mask[-2:, -3:] = 255
    return mask


def write_set(root: Path, count: int = 6, first: int = 0, side: int = SIDE, noise: float = 0) -> str:
    """Images whose colours are their classes, those of ignored pixels misleading; returns the data set's name."""
    for folder in (root / "masks", root / "images"):
        folder.mkdir(parents=True)
    for number in range(first, first + count):
        mask = mask_of(number, side)
        image = COLOURS[np.where(mask == 255, 0, mask)] + np.random.default_rng(number).normal(
            0, noise, (side, side, 3)
        )
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    (root / "classes.txt").write_text("road\ncar\ntree\n")
    return f"{root}/masks@{root}/images"


class Pixels(nn.Module):
    """Stride 1: the map is the image."""

    strides: ClassVar = {"pixels": 1}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"pixels": x}


def extractor(batch: int = 4) -> DenseExtractor:
    backbone = Backbone("stub", Pixels(), {"pixels": 3}, "RGB", (127.5,) * 3, (50.0,) * 3, SIDE)
    return DenseExtractor(backbone, SIDE, torch.device("cpu"), batch=batch, workers=0)


def patches(images: int, count: int = 9, dimensions: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(images, count, dimensions) of unequal scale, the last constant; pixels of each class, a quarter without any."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(images, count, dimensions, generator=g) * torch.logspace(-1, 1, dimensions) + 300
    features[..., -1] = 7.3
    counts = torch.randint(0, 5, (images, count, CLASSES), generator=g).float()
    counts *= 1 + 3 * (features[..., :1] > 300)  # some dependence on the features
    counts[:, ::4] = 0
    return features, counts


def as_pixels(features: Tensor, counts: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A row for every pixel: (pixels, D) float64 features and (pixels,) classes."""
    rows, classes = [], []
    for x, pixels in zip(features.flatten(0, -2), counts.flatten(0, -2)):
        for k in range(CLASSES):
            rows += [x.double().numpy()] * int(pixels[k])
            classes += [k] * int(pixels[k])
    return np.stack(rows), np.array(classes)


# --- ridge --------------------------------------------------------------------------------------------------------


def moments_of(features: Tensor, counts: Tensor, shift: float = 300) -> Moments:
    moments = Moments(features.shape[-1], CLASSES, torch.device("cpu"))
    for x, pixels in zip(features, counts):
        moments.add(x.double() - shift, pixels.double())
    return moments


@pytest.mark.parametrize("strength", [1e-4, 0.3])
def test_ridge_from_sums_equals_scikit_learns_on_every_pixel(strength: float) -> None:
    features, counts = patches(3)
    rows, classes = as_pixels(features - 300, counts)
    deviation = rows.std(0)
    deviation[-1] = 1
    scaled = (rows - rows.mean(0)) / deviation
    scaled[:, -1] = 0
    oracle = sklearn("linear_model").Ridge(alpha=strength * len(rows)).fit(scaled, np.eye(CLASSES)[classes])
    weight, bias = fit(moments_of(features, counts), strength)
    found = rows @ weight.numpy() + bias.numpy()
    np.testing.assert_allclose(found, oracle.predict(scaled), rtol=1e-8, atol=1e-9)
    assert (weight[-1] == 0).all()  # of the constant feature


def test_the_error_of_every_penalty_is_that_of_its_predictions_of_held_out_pixels() -> None:
    features, counts = patches(5)
    kept, held = moments_of(features[:3], counts[:3]), moments_of(features[3:], counts[3:])
    rows, classes = as_pixels(features[3:] - 300, counts[3:])
    strengths = (1e-5, 1e-2, 1.0, 50.0)
    errors = choose_penalty(kept, held, strengths)
    for strength in strengths:
        weight, bias = fit(kept, strength)
        total = 0.0
        for row, k in zip(rows, classes):
            for c in range(CLASSES):
                total += (float(row @ weight[:, c].numpy() + bias[c]) - (c == k)) ** 2
        assert errors[strength] == pytest.approx(total / len(rows), rel=1e-8)


def test_ridge_chooses_the_least_error_and_fits_all_images() -> None:
    features, counts = patches(6)
    held = np.array([False, True, False, False, True, False])
    fitter = DenseRidge(4, CLASSES, held, torch.device("cpu"))
    for places in ([3, 1], [0], [5, 2, 4]):  # in any order and batches
        fitter.add(features[places], counts[places], places)
    head, facts = fitter.finish()
    errors = choose_penalty(moments_of(features[~held], counts[~held]), moments_of(features[held], counts[held]),
                            [10.0 ** (p / 2) for p in range(-12, 5)])  # fmt: skip
    assert facts["lambda"] == min(errors, key=errors.get)
    assert facts["held_out_error"] == pytest.approx(min(errors.values()), rel=1e-7)
    weight, bias = fit(moments_of(features, counts), facts["lambda"])
    maps = features.transpose(1, 2).unflatten(2, (3, 3))
    wanted = (features.double() - 300) @ weight + bias
    torch.testing.assert_close(head(maps).flatten(2).transpose(1, 2).double(), wanted, rtol=1e-3, atol=1e-3)


# --- logistic regression ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
def test_logistic_regression_equals_scikit_learns(penalty: float) -> None:
    features, counts = patches(4, seed=2)
    x = ((features - 300) / torch.logspace(-1, 1, 4)).flatten(0, 1)[:, :3].double()
    labels = counts.flatten(0, 1).argmax(1)
    oracle = sklearn("linear_model").LogisticRegression(C=penalty, tol=1e-10, max_iter=5000).fit(x, labels)
    weight, bias = fit_logistic(x, labels, CLASSES, penalty, iterations=1000)
    np.testing.assert_allclose(weight, oracle.coef_, rtol=1e-4, atol=1e-6)
    # Adding a number to all biases changes nothing.
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), rtol=1e-4, atol=1e-5)


def test_logistic_regression_from_another_start_ends_alike() -> None:
    features, counts = patches(4, seed=2)
    x, labels = (features - 300).flatten(0, 1).double()[:, :2], counts.flatten(0, 1).argmax(1)
    start = (torch.full((CLASSES, 2), 3.0).double(), torch.ones(CLASSES).double())
    one, other = (fit_logistic(x, labels, CLASSES, 0.5, iterations=1000, start=s) for s in (None, start))
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)


def test_logistic_probe_chooses_c_by_the_miou_of_held_out_pixels() -> None:
    features, counts = patches(6, seed=3)
    held = np.array([False, True, False, False, True, False])
    fitter = DenseLogistic(4, held, seed=0)
    fitter.add(features[:4], counts[:4], range(4))
    fitter.add(features[4:], counts[4:], range(4, 6))
    head, facts = fitter.finish()

    there = counts.sum(2) > 0
    train = there & ~torch.from_numpy(held)[:, None]
    mean, scale = features[train].mean(0), features[train].std(0, unbiased=False)
    scale[-1] = torch.inf
    scores, start = {}, None
    for penalty in PENALTIES:
        x = (features[train] - mean) / scale
        start = fit_logistic(x, counts[train].argmax(1), CLASSES, penalty, start=start)
        right, union = np.zeros(CLASSES), np.zeros(CLASSES)
        for row, pixels in zip(features[there & ~train], counts[there & ~train]):
            claimed = int((start[0] @ ((row - mean) / scale) + start[1]).argmax())
            for k in range(CLASSES):
                right[k] += float(pixels[k]) * (k == claimed)
                union[k] += float(pixels.sum() if k == claimed else pixels[k])
        scores[penalty] = 100 * (right[union > 0] / union[union > 0]).mean()
    assert facts["C"] == max(scores, key=scores.get)
    assert list(facts["held_out_miou"].values()) == pytest.approx(list(scores.values()), abs=1e-6)
    assert facts["training_patches"] == int(there.sum())

    # The head takes features as they are.
    x = features[there]
    scale[-1] = torch.inf
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    deviation[-1] = torch.inf
    weight, bias = fit_logistic((x - mean) / deviation, counts[there].argmax(1), CLASSES, facts["C"])
    wanted = ((features - mean) / deviation) @ weight.T + bias
    found = head(features.transpose(1, 2).unflatten(2, (3, 3))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.softmax(2), wanted.softmax(2), atol=5e-3, rtol=5e-3)


def test_logistic_probe_keeps_no_more_patches_than_the_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_logistic, "MEMORY", 6 * 4 * 4 * 2 + 1)  # two patches of 4 float32 of each of 6 images
    features, counts = patches(6)
    fitter = DenseLogistic(4, np.array([True] + [False] * 5), seed=0)
    fitter.add(features, counts, range(6))
    assert [len(part) for part in fitter.kept[0]] == [2] * 6
    for image, pixels, rows, classes in zip(features, counts, *fitter.kept[:2]):
        found = [int((image == row).all(1).nonzero()) for row in rows]
        assert (pixels[found] == classes).all()
        assert (pixels[found].sum(1) > 0).all()


# --- nearest neighbours -------------------------------------------------------------------------------------------


def test_votes_equal_a_loop_over_all_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    bank = nn.functional.normalize(torch.randn(40, 5, generator=g), dim=1)
    shares = torch.rand(40, CLASSES, generator=g).softmax(1)
    maps = torch.randn(2, 5, 3, 3, generator=g) * 9
    found = vote(maps, bank, shares, k=7, temperature=0.1)
    for b, y, x in itertools.product(range(2), range(3), range(3)):
        query = maps[b, :, y, x].double().numpy()
        cosines = [float(query @ key.double().numpy()) / math.sqrt(float(query @ query)) for key in bank]
        near = sorted(range(40), key=lambda i: -cosines[i])[:7]
        weights = [math.exp(cosines[i] / 0.1) for i in near]
        wanted = sum(w * shares[i].double().numpy() for w, i in zip(weights, near)) / sum(weights)
        np.testing.assert_allclose(found[b, :, y, x], wanted, rtol=1e-4)


def test_the_sample_prefers_rare_classes_by_the_protocols_keys() -> None:
    _, counts = patches(1, count=25, seed=5)
    image = counts[0]
    image[3, :2] = 0  # of the last class alone
    uniform = np.random.default_rng(4).random(25, np.float32)
    keys = {}
    for p in range(25):
        if image[p].sum():
            number = sum(sum(bool(image[q, k]) for q in range(25)) for k in range(CLASSES) if image[p, k])
            keys[p] = number * float(uniform[p])
    wanted = sorted(keys, key=keys.get)
    for count in (4, 1000):  # more than there are
        assert sampled(image, count, np.random.default_rng(4)).tolist() == wanted[:count]


def test_the_memory_has_shares_of_counted_pixels_and_does_not_depend_on_batches() -> None:
    features, counts = patches(4)
    fitters = [DenseKnn(k=3, temperature=0.02, patches=2, seed=1) for _ in range(2)]
    fitters[0].add(features, counts, range(4))
    for place in range(4):
        fitters[1].add(features[place : place + 1], counts[place : place + 1], [place])
    maps = features.transpose(1, 2).unflatten(2, (3, 3))
    (head, facts), (other, _) = (fitter.finish() for fitter in fitters)
    assert facts == {"k": 3, "temperature": 0.02, "patches_an_image": 2, "memory": 8}
    torch.testing.assert_close(head(maps), other(maps))
    torch.testing.assert_close(head(maps).sum(1), torch.ones(4, 3, 3))


# --- the trained head ---------------------------------------------------------------------------------------------


def slow_bilinear(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """(K, G, G) -> (K, height, width), pixel by pixel; a pixel's centre is at (i + 0.5) / height of the side."""
    out = np.zeros((len(scores), height, width))
    for y, x in itertools.product(range(height), range(width)):
        at = []
        for i, side, grid in ((y, height, scores.shape[1]), (x, width, scores.shape[2])):
            place = min(max((i + 0.5) * grid / side - 0.5, 0), grid - 1)
            low = int(place)
            at.append(((low, 1 - (place - low)), (min(low + 1, grid - 1), place - low)))
        for (row, a), (column, b) in itertools.product(*at):
            out[:, y, x] += a * b * scores[:, row, column]
    return out


def test_the_loss_is_the_mean_over_counted_pixels_of_upsampled_logits() -> None:
    logits = torch.randn(2, CLASSES, 3, 3, generator=torch.Generator().manual_seed(0))
    masks = torch.stack([torch.from_numpy(mask_of(n)) for n in range(2)])
    total = counted = 0.0
    for one, mask in zip(logits.double().numpy(), masks.numpy()):
        up = slow_bilinear(one, SIDE, SIDE)
        for y, x in itertools.product(range(SIDE), range(SIDE)):
            if mask[y, x] != 255:
                total += math.log(np.exp(up[:, y, x]).sum()) - up[mask[y, x], y, x]
                counted += 1
    assert float(pixel_loss(logits, masks)) == pytest.approx(total / counted, rel=1e-5)
    assert pixel_loss(logits, torch.full_like(masks, 255)) == 0


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    factors = [factor(step, 40_000) for step in range(40_000)]
    assert int(np.argmax(factors)) == 1500
    assert max(factors) == pytest.approx(1)
    assert (np.diff(factors[:1501]) > 0).all()
    assert (np.diff(factors[1500:]) < 0).all()
    assert 0 < factors[0] < 1e-3
    assert 0 < factors[-1] < 1e-4
    assert [factor(0, 1), *(factor(step, 2) for step in range(2))] == [1, 1, 0.5]


def test_images_and_masks_are_mirrored_together() -> None:
    images, masks = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).byte(), torch.arange(32).view(2, 4, 4).byte()
    mirrored, labels = flipped(images, masks, np.array([False, True]))
    assert torch.equal(mirrored[0], images[0])
    assert torch.equal(labels[0], masks[0])
    for y, x in itertools.product(range(4), range(4)):
        assert torch.equal(mirrored[1, :, y, x], images[1, :, y, 3 - x])
        assert labels[1, y, x] == masks[1, y, 3 - x]


def test_the_head_is_batchnorm_and_a_convolution_by_the_seed() -> None:
    norm, conv = initial_head(50, 40, seed=3)
    assert isinstance(norm, nn.BatchNorm2d)
    assert conv.kernel_size == (1, 1)
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (conv.bias == 0).all()
    assert torch.equal(conv.weight, initial_head(50, 40, seed=3)[1].weight)
    assert not torch.equal(conv.weight, initial_head(50, 40, seed=4)[1].weight)
    assert (DenseRecipe().rate, DenseRecipe().weight_decay, DenseRecipe().batch) == (1e-3, 1e-3, 16)


def test_training_equals_plain_steps_of_adamw_on_mirrored_batches(tmp_path: Path) -> None:
    images = open_pixel_data(write_set(tmp_path / "all", count=7, noise=40)).train
    recipe = DenseRecipe(epochs=4, batch=4, seed=5)
    head = train_dense_linear(extractor(batch=3), ["pixels"], images, CLASSES, recipe)["pixels"]

    oracle, rng = initial_head(3, CLASSES, seed=5), np.random.default_rng(5)
    optimizer = torch.optim.AdamW(oracle.parameters(), weight_decay=1e-3)
    for step in range(4):  # 5 images: one batch of 4 an epoch
        order, mirrored = rng.permutation(5)[:4], rng.random(4) < 0.5
        pairs = [images.read(int(place)) for place in order]
        pairs = [(x[:, ::-1], mask[:, ::-1]) if flip else (x, mask) for (x, mask), flip in zip(pairs, mirrored)]
        x = torch.from_numpy(np.stack([(x.astype(np.float32) - 127.5) / 50 for x, _ in pairs])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([mask for _, mask in pairs]).astype(np.int64))
        optimizer.param_groups[0]["lr"] = 1e-3 * (1, 3 / 4, 1 / 2, 1 / 4)[step]
        optimizer.zero_grad()
        nn.functional.cross_entropy(oracle(x), masks, ignore_index=255).backward()
        optimizer.step()
    for name, wanted in oracle.state_dict().items():
        torch.testing.assert_close(head.state_dict()[name], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head(x)[:1], head(x[:1]))  # the other images of a batch do not matter


# --- pixels and patches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "grid"), [(16, 16, 4), (13, 29, 5), (3, 4, 6)])
def test_a_pixel_counts_in_the_patch_that_its_centre_is_in(height: int, width: int, grid: int) -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
    wanted = np.zeros((grid, grid, CLASSES))
    for y, x in itertools.product(range(height), range(width)):
        if mask[y, x] != 255:
            wanted[math.floor((y + 0.5) / height * grid), math.floor((x + 0.5) / width * grid), mask[y, x]] += 1
    found = patch_counts(mask, grid, CLASSES)
    assert (found.view(grid, grid, CLASSES).numpy() == wanted).all()
    assert found.sum() == (mask != 255).sum()


def test_a_scaled_mask_has_the_nearest_pixels() -> None:
    mask = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7)
    found = scaled_mask(mask, 4)
    for y, x in itertools.product(range(4), range(4)):
        away = [
            abs((y + 0.5) / 4 - (v + 0.5) / 5) + abs((x + 0.5) / 4 - (u + 0.5) / 7) for v in range(5) for u in range(7)
        ]
        assert found[y, x] == mask.ravel()[np.argmin(away)]
    assert (scaled_mask(mask_of(0), SIDE).numpy() == mask_of(0)).all()


@pytest.mark.parametrize("together", [1, 200, 10**6])  # scores upsampled at a time: rows of their own, some, all
@pytest.mark.parametrize(("height", "width"), [(16, 16), (11, 23)])
def test_counts_equal_loops_over_pixels(
    height: int, width: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_ON_CPU", together)
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(CLASSES, 4, 4))
    mask = rng.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
    wanted = np.zeros((3, CLASSES))
    predicted = slow_bilinear(scores, height, width).argmax(0)
    for y, x in itertools.product(range(height), range(width)):
        if mask[y, x] != 255:
            wanted[0, mask[y, x]] += mask[y, x] == predicted[y, x]
            wanted[1, mask[y, x]] += 1
            wanted[2, predicted[y, x]] += 1
    found = pixel_counts(torch.from_numpy(scores).float(), torch.from_numpy(mask))
    assert (found.numpy() == wanted).all()


def counts_of(truths: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> np.ndarray:
    parts = [
        [
            [int(((t == k) & (p == k)).sum()), int((t == k).sum()), int(((p == k) & (t != 255)).sum())]
            for k in range(classes)
        ]
        for t, p in zip(truths, predictions)
    ]
    return np.array(parts).transpose(0, 2, 1)


def test_miou_equals_loops_and_leaves_absent_classes_out() -> None:
    rng = np.random.default_rng(0)
    truths = [rng.choice(np.array([0, 1, 2, 255], np.uint8), (8, 8)) for _ in range(5)]
    predictions = [rng.choice(np.array([0, 1, 2], np.uint8), (8, 8)) for _ in range(5)]
    names = ("a", "b", "c", "never")
    found = segmentation_scores(counts_of(truths, predictions, 4), names)
    ious, right, total = [], 0, 0
    for k in range(3):
        inter = union = 0
        for t, p in zip(truths, predictions):
            for one, other in zip(t.ravel().tolist(), p.ravel().tolist()):
                if one != 255:
                    inter += one == k and other == k
                    union += one == k or other == k
        ious.append(100 * inter / union)
        right, total = right + inter, total + sum(int((t == k).sum()) for t in truths)
    assert found["miou"] == pytest.approx(np.mean(ious))
    assert found["iou"] == {**dict(zip("abc", map(pytest.approx, ious))), "never": None}
    assert found["pixel_accuracy"] == pytest.approx(100 * right / total)
    low, high = found["miou_interval"]
    assert low < found["miou"] < high


def test_intervals_in_limiting_cases() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (8, 8)).astype(np.uint8)
    guess = rng.integers(0, 3, (8, 8)).astype(np.uint8)
    names = ("a", "b", "c")
    alike = segmentation_scores(counts_of([truth] * 7, [guess] * 7, 3), names)
    assert alike["miou_interval"] == pytest.approx([alike["miou"]] * 2)  # whichever images are drawn
    perfect = segmentation_scores(counts_of([truth, guess], [truth, guess], 3), names)
    assert (perfect["miou"], perfect["miou_interval"], perfect["pixel_accuracy"]) == (100, [100, 100], 100)
    wrong = segmentation_scores(counts_of([truth], [(truth + 1) % 3], 3), names)
    assert (wrong["miou"], wrong["miou_interval"]) == (0, [0, 0])
    # Of two images of one pixel each, one right: both draws of both, and two of one each.
    two = counts_of([np.zeros((1, 1)), np.zeros((1, 1))], [np.zeros((1, 1)), np.ones((1, 1))], 2)
    assert segmentation_scores(two, ("a", "b"))["miou_interval"] == [0, 100]


# --- ignored pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ridge", "logistic", "knn"])
def test_patches_without_counted_pixels_change_nothing(method: str) -> None:
    features, counts = patches(6)
    odd = features.clone()
    odd[counts.sum(2) == 0] = torch.tensor([1e3, -1e3, 5.0, 9.0])
    held = np.array([False, True, False, False, True, False])
    make: dict[str, Callable] = {
        "ridge": lambda: DenseRidge(4, CLASSES, held, torch.device("cpu")),
        "logistic": lambda: DenseLogistic(4, held, seed=0),
        "knn": lambda: DenseKnn(3, 0.02, 5, seed=0),
    }
    maps = features.transpose(1, 2).unflatten(2, (3, 3))
    heads = []
    for x in (features, odd):
        fitter = make[method]()
        fitter.add(x, counts, range(6))
        heads.append(fitter.finish()[0](maps))
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-3)


def test_ignored_pixels_change_no_score(tmp_path: Path) -> None:
    """Ignored pixels of every training and test image are repainted; their masks stay."""
    names = {}
    for half, first in (("train", 0), ("val", 20)):
        names[half] = write_set(tmp_path / half, first=first, noise=60)
    data = open_pixel_data(names["train"], names["val"])
    settings = DenseSettings("ridge")
    before = probe_segmentation(extractor(), ["pixels"], data, settings)["pixels"]
    for file in sorted(tmp_path.glob("*/images/*.png")):
        pixels = np.array(Image.open(file))
        mask = np.array(Image.open(str(file).replace("images", "masks")))
        pixels[mask == 255] = 255 - pixels[mask == 255]
        Image.fromarray(pixels).save(file)
    after = probe_segmentation(extractor(), ["pixels"], data, settings)["pixels"]
    assert before["miou"] == pytest.approx(after["miou"], abs=1e-3)
    assert 40 < before["miou"] < 100
    assert before["lambda"] == after["lambda"]


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_maps_that_determine_the_class_give_100(method: str, tmp_path: Path) -> None:
    data = open_pixel_data(write_set(tmp_path / "train"), write_set(tmp_path / "val", first=20))
    found = probe_segmentation(extractor(), ["pixels"], data, DenseSettings(method, epochs=100))["pixels"]
    assert (found["miou"], found["miou_interval"], found["pixel_accuracy"]) == (100, [100, 100], 100)
    assert found["iou"] == {"road": 100, "car": 100, "tree": 100}
    assert (found["grid"], found["dimensions"], found["stride"], found["norm"]) == (SIDE, 3, 1, "none")


def test_maps_that_say_nothing_predict_the_most_frequent_class(tmp_path: Path) -> None:
    class Nothing(Pixels):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"pixels": torch.ones_like(x)}

    data = open_pixel_data(write_set(tmp_path / "train"), write_set(tmp_path / "val", first=20))
    probe = extractor()
    probe.backbone.model = Nothing()
    found = probe_segmentation(probe, ["pixels"], data, DenseSettings("ridge"))["pixels"]
    total = np.bincount(np.concatenate([mask_of(20 + n).ravel() for n in range(6)]), minlength=256)
    share = 100 * total[0] / total[:CLASSES].sum()
    assert found["iou"] == {"road": pytest.approx(share), "car": 0, "tree": 0}


def test_the_split_is_the_seeds_and_limits_keep_some(tmp_path: Path) -> None:
    name = write_set(tmp_path / "all", count=20)
    one, again, other = (open_pixel_data(name, seed=seed) for seed in (0, 0, 1))
    assert (len(one.train), len(one.test)) == (16, 4)
    assert one.test.names == again.test.names != other.test.names
    assert not set(one.train.names) & set(one.test.names)
    few = open_pixel_data(name, name, limit=5)
    assert (len(few.train), len(few.test)) == (5, 5)
    assert set(few.train.names) == set(few.test.names) < set(one.train.names + one.test.names)
    image, mask = few.train.read(2)
    number = int(Path(few.train.names[2]).stem)
    assert (mask == mask_of(number)).all()
    assert (image == np.array(Image.open(tmp_path / f"all/images/{number}.png"))).all()


def test_classes_of_the_test_images_are_matched_by_name(tmp_path: Path) -> None:
    name = write_set(tmp_path / "train")
    write_set(tmp_path / "val", first=20)
    (tmp_path / "val/classes.txt").write_text("tree\ncar\n")  # road is not named
    for number in range(20, 26):
        mask = np.array([255, 1, 0, 255], np.uint8)[mask_of(number).clip(0, 3)]
        Image.fromarray(mask).save(tmp_path / f"val/masks/{number}.png")
    data = open_pixel_data(name, f"{tmp_path}/val/masks@{tmp_path}/val/images")
    found = probe_segmentation(extractor(), ["pixels"], data, DenseSettings("ridge"))["pixels"]
    assert found["iou"] == {"car": 100, "tree": 100}


def probe(backbone: str, data: str, *options: object) -> int:
    argv = [
        "probe",
        backbone,
        "--data",
        data,
        "--protocol",
        "segmentation",
        "--workers",
        0,
        "--device",
        "cpu",
        *options,
    ]
    return main([str(a) for a in argv])


@pytest.mark.parametrize(
    ("backbone", "stage", "grid", "norm", "method", "options", "chosen"),
    [
        ("random:resnet18-cifar", "res3", 16, "none", "ridge", ("--stages", "res3"), "lambda"),
        ("random:resnet18-cifar", "res5", 4, "none", "knn", ("--k", 5, "--patches", 3), "memory"),
        ("random:timm:test_vit", "blocks.5", 2, "final", "logistic", ("--image-size", 32), "C"),
        ("random:timm:test_vit", "blocks.5", 2, "final", "linear",
         ("--image-size", 32, "--epochs", 1), "optimizer"),
    ],
)  # fmt: skip
def test_the_command(
    backbone: str,
    stage: str,
    grid: int,
    norm: str,
    method: str,
    options: tuple,
    chosen: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    name, out = write_set(tmp_path / "all", count=10, side=40, noise=20), tmp_path / "out.json"
    assert probe(backbone, name, "--method", method, "--json", out, *options) == 0
    found = json.loads(out.read_text())
    ((where, numbers),) = found["stages"].items()
    assert where == stage
    assert (numbers["grid"], numbers["norm"]) == (grid, norm)
    assert chosen in numbers
    assert (found["protocol"], found["method"], found["features"]["image_size"]) == ("segmentation", method, 32)
    assert found["data"]["test_images"] == 2
    assert found["data"]["classes"] == ["road", "car", "tree"]
    assert 0 <= numbers["miou_interval"][0] <= numbers["miou"] <= numbers["miou_interval"][1] <= 100
    table = " ".join(capsys.readouterr().out.split())
    for text in (stage, f"{numbers['miou']:.2f}", "32 x 32", method, "own size"):
        assert text in table


def test_the_command_gives_the_same_numbers_again_and_for_any_batch(tmp_path: Path) -> None:
    name = write_set(tmp_path / "all", count=10, side=40, noise=20)
    numbers = []
    for batch in (3, 16):
        out = tmp_path / f"{batch}.json"
        options = ("--method", "ridge", "--stages", "stem", "--batch-size", batch, "--quiet")
        assert probe("random:resnet18-cifar", name, *options, "--json", out) == 0
        numbers.append(json.loads(out.read_text())["stages"]["stem"])
    assert numbers[0]["miou"] == pytest.approx(numbers[1]["miou"], abs=0.1)
    assert numbers[0]["held_out_error"] == pytest.approx(numbers[1]["held_out_error"], rel=1e-4)


# --- wrong input --------------------------------------------------------------------------------------------------


def grey_only(root: Path) -> str:
    name = write_set(root)
    for file in root.glob("masks/*.png"):
        Image.new("L", (SIDE, SIDE), 255).save(file)
    return name


def objects(root: Path) -> str:
    root.mkdir()
    (root / "a.json").write_text('{"images": [], "annotations": [], "categories": []}')
    return f"{root}/a.json@{root}"


def damaged(root: Path) -> str:
    name = write_set(root)
    (root / "masks/2.png").write_bytes(b"nothing")
    return name


def one_class(root: Path) -> str:
    name = write_set(root)
    (root / "classes.txt").write_text("road\n")
    return name


def lone(root: Path) -> str:
    return write_set(root, count=2)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (write_set, (), "--protocol segmentation and --method belong together"),
        (write_set, ("--method", "ridge", "--k", 3), "--k belongs to --protocol knn and segmentation --method knn"),
        (write_set, ("--method", "knn", "--epochs", 3), "--epochs belongs to"),
        (write_set, ("--method", "knn", "--patches", 0), "--patches is 0"),
        (write_set, ("--method", "knn", "--tsne", "a.png"), "--tsne plots pooled features"),
        (
            write_set,
            ("--method", "ridge", "--image-size", 33),
            "--image-size 33 is no multiple of 8, the stride of res5",
        ),
        (write_set, ("--method", "ridge", "--stages", "res9"), "'res9' is no stage"),
        (grey_only, ("--method", "ridge"), "too few pixels with a class"),
        (grey_only, ("--method", "logistic"), "too few pixels with a class"),
        (grey_only, ("--method", "knn"), "no pixel of the training images' masks has a class"),
        (objects, ("--method", "ridge"), "has objects and no pixel labels"),
        (damaged, ("--method", "ridge"), "masks/2.png"),
        (one_class, ("--method", "ridge"), "has only the class 'road'"),
        (lone, ("--method", "ridge"), "leaves 1 training images"),
    ],
)
def test_bad_input_gives_one_sentence(
    make: Callable[[Path], str], options: tuple, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = make(tmp_path / "all")
    assert probe("random:resnet18-cifar", name, "--quiet", *options) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert error.count("\n") == 0


def test_bad_test_images_give_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = write_set(tmp_path / "all")
    for case, said in (
        (grey_only(tmp_path / "grey"), "no pixel of the test images' masks has a class"),
        (f"{tmp_path}/masks@{tmp_path}/nowhere", "--val '"),
        ("cityscapes_fine_sem_seg_val", "cityscapes"),
    ):
        assert probe("random:resnet18-cifar", name, "--val", case, "--method", "ridge", "--quiet") == 2
        assert said in capsys.readouterr().err
    write_set(tmp_path / "other")
    (tmp_path / "other/classes.txt").write_text("road\ncar\nsky\n")
    other = f"{tmp_path}/other/masks@{tmp_path}/other/images"
    assert probe("random:resnet18-cifar", name, "--val", other, "--method", "ridge", "--quiet") == 2
    assert "class 'sky' is not among the training classes" in capsys.readouterr().err


def test_the_report_shows_a_segmentation_probe(tmp_path: Path) -> None:
    out = tmp_path / "results/dense.json"
    out.parent.mkdir()
    options = ("--method", "ridge", "--quiet", "--json", out)
    assert probe("random:resnet18-cifar", write_set(tmp_path / "all"), *options) == 0
    ((stage, found),) = json.loads(out.read_text())["stages"].items()
    for path in (out, out.parent):
        assert main(["report", str(path), "--out", str(tmp_path / "report")]) == 0
        lines = (tmp_path / "report/report.md").read_text().splitlines()
        heading = next(i for i, line in enumerate(lines) if line.startswith("## segmentation (ridge, "))
        table = [line for line in lines[heading:] if line.startswith("|")]
        assert table[0] == f"| backbone, mean IoU | runs | {stage} |"
        assert f"| 1 | {found['miou']:.1f}" in table[2]


def test_maps_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(Pixels):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"pixels": x / 0}

    data = open_pixel_data(write_set(tmp_path / "train"))
    broken = extractor()
    broken.backbone.model = Broken()
    with pytest.raises(UserError, match="features of pixels are not finite"):
        probe_segmentation(broken, ["pixels"], data, DenseSettings("ridge"))


def test_a_linear_head_multiplies_every_patch() -> None:
    g = torch.Generator().manual_seed(0)
    maps, weight, bias = (
        torch.randn(2, 4, 3, 3, generator=g),
        torch.randn(4, 5, generator=g),
        torch.randn(5, generator=g),
    )
    found = linear_head(weight.double(), bias.double())(maps)
    for b, y, x in itertools.product(range(2), range(3), range(3)):
        torch.testing.assert_close(found[b, :, y, x], maps[b, :, y, x] @ weight + bias)
