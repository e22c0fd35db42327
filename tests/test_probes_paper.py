"""The paper's linear readout: schedule and update against a loop in NumPy, its views, and what the record says."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_probes import COLOURS, SIDE, write_artifact, write_images, write_splits

from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.backbones import load_backbone_for_probe
from loco_det.evaluation.probes.crops import crop_batches, steps_an_epoch
from loco_det.evaluation.probes.features import Extractor
from loco_det.evaluation.probes.images import open_probe_data
from loco_det.evaluation.probes.linear_paper import PaperRecipe, paper_probe, train_linear
from loco_det.images.decode import decode_image
from loco_det.report.analysis import probe_curves
from loco_det.report.runs import find_runs

CPU = torch.device("cpu")
RESNET = {"stem": 64, "res2": 64, "res3": 128, "res4": 256, "res5": 512}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"), 7, 5)


def extractor_of(artifact: Path) -> Extractor:
    return Extractor(load_backbone_for_probe(str(artifact)), SIDE, CPU, batch=9, workers=0, cache=None)


# --- schedule and update ------------------------------------------------------------------------------------------


def test_the_rate_is_divided_by_ten_at_epochs_30_60_and_90() -> None:
    rates = [PaperRecipe().rate_in(epoch) for epoch in range(100)]
    assert rates == pytest.approx([30.0] * 30 + [3.0] * 30 + [0.3] * 30 + [0.03] * 10)
    assert [PaperRecipe(epochs=10).rate_in(e) for e in range(10)] == pytest.approx(
        [30] * 3 + [3] * 3 + [0.3] * 3 + [0.03]
    )
    assert PaperRecipe(epochs=1).rate_in(0) == 30


def plain_descent(
    batches: list[tuple[float, np.ndarray, np.ndarray]], weight: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax regression in float64 by its gradient (p - y) x, a batch's mean, at the rate of each batch."""
    weight, bias = weight.astype(np.float64), np.zeros(classes)
    for rate, x, labels in batches:
        scores = x @ weight.T + bias
        odds = np.exp(scores - scores.max(1, keepdims=True))
        error = odds / odds.sum(1, keepdims=True) - np.eye(classes)[labels]
        weight -= rate * error.T @ x / len(x)
        bias -= rate * error.mean(0)
    return weight, bias


def test_training_equals_a_loop_over_the_gradient() -> None:
    """Two stages at once are two runs of their own, without momentum, decay or scaling by the batch."""
    rng = np.random.default_rng(0)
    recipe = PaperRecipe(epochs=10, seed=4)
    sizes, widths = (11, 5), {"res4": 6, "res5": 9}
    given, rates = [], [30.0] * 3 + [3.0] * 3 + [0.3] * 3 + [0.03]
    for epoch in range(10):
        for size in sizes:
            x = {stage: rng.normal(0.2, 0.1, (size, width)) for stage, width in widths.items()}
            given.append((epoch, x, rng.integers(3, size=size)))
    batches = [
        (epoch, {s: torch.from_numpy(v).float() for s, v in x.items()}, torch.from_numpy(y)) for epoch, x, y in given
    ]
    advanced: list[int] = []
    heads = train_linear(batches, widths, 3, recipe, CPU, advanced.append)
    assert sum(advanced) == 20
    for stage, width in widths.items():
        start = torch.empty(3, width).normal_(0, 0.01, generator=torch.Generator().manual_seed(4)).numpy()
        weight, bias = plain_descent([(rates[e], x[stage], y) for e, x, y in given], start, 3)
        np.testing.assert_allclose(heads[stage].weight.detach(), weight, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(heads[stage].bias.detach(), bias, rtol=1e-3, atol=1e-3)


def test_a_loss_that_is_not_finite_names_the_stage() -> None:
    x = {"res2": torch.zeros(2, 3), "res3": torch.full((2, 3), torch.inf)}
    with pytest.raises(UserError, match=r"the loss on res3 is not finite in epoch 5 .*--stages"):
        train_linear([(5, x, torch.tensor([0, 1]))], {"res2": 3, "res3": 3}, 2, PaperRecipe(), CPU)


# --- views --------------------------------------------------------------------------------------------------------


def test_every_epoch_has_every_image_once_in_new_crops_and_order(images: Path) -> None:
    train = open_probe_data(str(images)).train
    settings = {"epochs": 3, "batch": 8, "seed": 5}
    found = list(crop_batches(train, SIDE, **settings, drop_last=False, workers=0))
    assert [len(labels) for _, labels in found] == [8, 8, 5] * 3
    assert len(found) == 3 * steps_an_epoch(21, 8, drop_last=False)
    epochs = [[torch.cat(part) for part in zip(*found[i : i + 3])] for i in (0, 3, 6)]
    for _, labels in epochs:
        assert torch.bincount(labels).tolist() == [7, 7, 7]
    assert not torch.equal(epochs[0][1], epochs[1][1])
    assert len({crop.numpy().tobytes() for pixels, _ in epochs for crop in pixels}) == 63  # not two are alike
    again = list(crop_batches(train, SIDE, **settings, drop_last=False, workers=2))
    assert all(torch.equal(a, b) for one, two in zip(found, again) for a, b in zip(one, two))
    dropped = list(crop_batches(train, SIDE, **settings, drop_last=True, workers=0))
    assert [len(labels) for _, labels in dropped] == [8, 8] * 3
    assert torch.equal(dropped[0][0], found[0][0])


def test_a_crop_is_a_part_of_its_image_enlarged(images: Path, tmp_path: Path) -> None:
    """An image that is red on the left and blue on the right gives crops with the border anywhere, flipped or not."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16, 2], pixels[:, 16:, 0] = 255, 255
        cv2.imwrite(str(tmp_path / name / "0.png"), pixels)
        cv2.imwrite(str(tmp_path / name / "1.png"), pixels)
    train = open_probe_data(str(tmp_path)).train
    crops = torch.cat([x for x, _ in crop_batches(train, 16, epochs=60, batch=8, seed=0, drop_last=False, workers=0)])
    share = (crops[:, 0] > 127).double().mean((1, 2))  # red
    left, right = (crops[:, 0, :, column].double().mean(1) > 127 for column in (0, -1))
    mixed = (share > 0.1) & (share < 0.9)
    assert 0.3 < (left & ~right)[mixed].double().mean() < 0.7  # a half is flipped
    assert share[mixed].std() > 0.15  # the border is not always in the middle
    assert not crops[:, 1].any()  # no green: colours stay as they are


# --- from images to the record ------------------------------------------------------------------------------------


def flat_images(folder: Path, count: int, seed: int) -> None:
    """Images of one colour each, which every crop and flip leaves as they are."""
    rng = np.random.default_rng(seed)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = np.clip(rng.normal(COLOURS[name], 30), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{i}.png"), np.broadcast_to(colour, (12, 9, 3)))


def test_on_images_of_one_colour_it_is_descent_on_their_features(artifact: Path, tmp_path: Path) -> None:
    """All are in one batch, so the order matters as little as the crops; the loop sees whole images only."""
    flat_images(tmp_path / "train", 6, 0)
    flat_images(tmp_path / "val", 4, 1)
    data = open_probe_data(str(tmp_path))
    extractor = extractor_of(artifact)
    extractor.backbone.model.train()  # must not matter
    recipe = PaperRecipe(rate=0.3, epochs=20)
    before = extractor.backbone.weights_hash()
    heads = paper_probe(extractor, ["res2", "res5"], data.train, 3, recipe)
    assert extractor.backbone.weights_hash() == before
    model = load_backbone_for_probe(str(artifact))
    for stage, head in heads.items():
        x = []
        for index in data.train.index.tolist():
            colour = decode_image(data.train.source.read(index), "x")[0, 0]
            pixels = torch.from_numpy(np.broadcast_to(colour[:, None, None], (1, 3, SIDE, SIDE)).copy())
            with torch.no_grad():
                x.append(model.model(model.input(pixels, CPU))[stage].double().mean((2, 3))[0].numpy())
        start = torch.empty(3, RESNET[stage]).normal_(0, 0.01, generator=torch.Generator().manual_seed(0)).numpy()
        rates = [0.3] * 6 + [0.03] * 6 + [0.003] * 6 + [0.0003] * 2
        weight, bias = plain_descent([(rate, np.stack(x), data.train.labels) for rate in rates], start, 3)
        np.testing.assert_allclose(head.weight.detach(), weight, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(head.bias.detach(), bias, rtol=1e-3, atol=1e-4)


def probe(artifact: Path, data: Path, out: Path, *options: object) -> dict:
    argv = ["probe", artifact, "--data", data, "--json", out, "--workers", 0, "--no-cache", "--quiet", *options]
    assert main([str(a) for a in argv]) == 0
    return json.loads(out.read_text())


def test_the_record_names_the_recipe_and_the_views(artifact: Path, images: Path, tmp_path: Path) -> None:
    options = ("--protocol", "linear", "--epochs", 10)
    paper = probe(artifact, images, tmp_path / "paper.json", *options, "--recipe", "paper")
    assert paper["recipe"] == "paper"
    assert "random crops (8 to 100 % of the area) and flips, anew in each epoch" in paper["features"]["views"]
    assert list(paper["stages"]) == list(RESNET)
    facts = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "rate": 30, "divided_by_10_at": [3, 6, 9]}
    facts |= {"epochs": 10, "batch": 256, "standardised": False}
    for stage, found in paper["stages"].items():
        assert {key: found[key] for key in facts} == facts
        assert found["dimensions"] == RESNET[stage]
    assert probe(artifact, images, tmp_path / "again.json", *options, "--recipe", "paper")["stages"] == paper["stages"]
    sweep = probe(artifact, images, tmp_path / "sweep.json", *options, "--rates", 0.1)
    assert sweep["recipe"] == "sweep"
    assert sweep["features"]["views"] == "features computed once from the centre crop"
    assert "recipe" not in probe(artifact, images, tmp_path / "knn.json", "--protocol", "knn")


def test_reports_keep_the_recipes_apart(artifact: Path, images: Path, tmp_path: Path) -> None:
    options = ("--protocol", "linear", "--epochs", 2, "--stages", "res2")
    probe(artifact, images, tmp_path / "paper.json", *options, "--recipe", "paper")
    probe(artifact, images, tmp_path / "sweep.json", *options, "--rates", 0.1)
    found = probe_curves(find_runs([str(tmp_path)]))
    assert [one["protocol"] for one in found] == ["linear (paper recipe)", "linear"]
    assert all(stages["res2"]["runs"] == 1 for one in found for stages in one["backbones"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--protocol", "knn", "--recipe", "paper"), "--recipe belongs to --protocol linear, not knn"),
        (("--protocol", "linear", "--recipe", "paper", "--rates", "1"), "--rates belongs to --recipe sweep"),
        (("--protocol", "linear", "--recipe", "paper", "--optimizer", "sgd"), "--optimizer belongs to --recipe sweep"),
    ],
)
def test_options_that_nobody_would_read(
    options: tuple[str, ...], message: str, artifact: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["probe", str(artifact), "--data", str(images), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_cannot_be_read_ends_it_with_its_name(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_images(tmp_path, 4)
    (tmp_path / "red" / "1.png").write_bytes(b"\x89PNG")
    argv = ["probe", artifact, "--data", tmp_path, "--protocol", "linear", "--recipe", "paper", "--workers", 0]
    assert main([str(a) for a in argv]) == 2
    assert "1.png" in capsys.readouterr().err
