"""The t-SNE picture of a stage: which images, their coordinates, the numbers beside it, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_probes import COLOURS, SIDE, write_artifact, write_splits

from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.images import open_probe_data
from loco_det.evaluation.probes.tsne import balanced, compactness, draw, embed
from loco_det.report.runs import find_runs

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"), 4, 8)


def run(artifact: Path, images: Path, *options: object) -> int:
    argv = ["probe", artifact, "--data", images, "--protocol", "knn", "--workers", 0, "--no-cache", "--quiet", *options]
    return main([str(a) for a in argv])


# --- numbers ------------------------------------------------------------------------------------------------------


def clusters(spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 4], 7)
    centres = {label: rng.normal(size=60) for label in (0, 1, 4)}
    return np.stack([centres[k] + spread * rng.normal(size=60) for k in labels]).astype(np.float32), labels


@needs_sklearn
@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_compactness_by_its_definition(spread: float) -> None:
    """Rousseeuw's (b - a) / max(a, b) and the ratio of mean distances, by loops over pairs."""
    features, labels = clusters(spread)
    distance = [[float(np.linalg.norm(x.astype(float) - y)) for y in features.astype(float)] for x in features]
    within, between, silhouettes = [], [], []
    for i, label in enumerate(labels):
        to = {k: [distance[i][j] for j in range(21) if labels[j] == k and j != i] for k in (0, 1, 4)}
        within += to[label]
        between += [d for k in to if k != label for d in to[k]]
        a, b = np.mean(to[label]), min(np.mean(to[k]) for k in to if k != label)
        silhouettes.append((b - a) / max(a, b))
    found = compactness(features, labels)
    assert found["silhouette"] == pytest.approx(np.mean(silhouettes), abs=1e-6)
    assert found["within_over_between"] == pytest.approx(np.mean(within) / np.mean(between), rel=1e-6)
    assert compactness(7 * features, labels) == pytest.approx(found, rel=1e-4)


@needs_sklearn
def test_tighter_clusters_are_more_compact() -> None:
    tight, loose = (compactness(*clusters(spread)) for spread in (0.1, 2.0))
    assert tight["silhouette"] > 0.8 > 0.2 > loose["silhouette"]
    assert tight["within_over_between"] < 0.2 < 0.8 < loose["within_over_between"]


@needs_sklearn
def test_coordinates_depend_on_the_seed_alone_and_keep_clusters_together() -> None:
    features, labels = clusters(0.1)
    points, perplexity = embed(features, 3)
    assert points.shape == (21, 2)
    assert perplexity == pytest.approx(20 / 3)  # 30 is too much for 21 images
    np.testing.assert_array_equal(points, embed(features, 3)[0])
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + np.where(np.eye(21), np.inf, 0)
    nearest = apart.argmin(1)
    assert (labels[nearest] == labels).all()


def test_the_picture_shows_every_point_in_its_classs_colour() -> None:
    labels = np.array([0, 2, 2, 5])
    points = np.arange(8.0).reshape(4, 2)
    figure = draw(points, labels, ["a", "b", "c", "d", "e", "f"], "loco/backbone, res5")
    (axes,) = figure.axes
    assert axes.get_title() == "loco/backbone, res5"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c", "f"]
    for dots, label in zip(axes.collections, (0, 2, 5)):
        np.testing.assert_array_equal(dots.get_offsets(), points[labels == label])
    assert len({tuple(dots.get_facecolor()[0]) for dots in axes.collections}) == 3


# --- which images -------------------------------------------------------------------------------------------------


def test_the_first_ten_classes_have_as_many_images_each(tmp_path: Path) -> None:
    names = [f"c{i:02d}" for i in range(12)]
    write_images_of(tmp_path / "train", dict.fromkeys(names, 2))
    write_images_of(tmp_path / "val", {name: 6 for name in names if name != "c03"} | {"c05": 4})
    test = open_probe_data(str(tmp_path)).test
    shown = balanced(test, 500, 0)
    assert np.unique(shown.labels).tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]  # c03 has no test image
    assert np.bincount(shown.labels)[np.unique(shown.labels)].tolist() == [4] * 10  # as many as c05 has
    few = balanced(test, 25, 0)
    assert np.bincount(few.labels)[np.unique(few.labels)].tolist() == [2] * 10
    assert set(few.index) < set(shown.index)
    assert set(balanced(test, 25, 1).index) != set(few.index)
    with pytest.raises(UserError, match=r"19 images of 10 classes .*--tsne-images"):
        balanced(test, 19, 0)


def write_images_of(folder: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / name / f"{i}.png")


# --- the command --------------------------------------------------------------------------------------------------


@needs_sklearn
def test_a_probe_leaves_a_picture_and_its_numbers(artifact: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "p.json"
    picture = tmp_path / "pictures" / "loco.png"
    assert run(artifact, images, "--json", out, "--tsne", picture, "--tsne-images", 18) == 0
    with Image.open(picture) as opened:
        assert opened.format == "PNG"
        assert min(opened.size) > 300
    found = json.loads(picture.with_suffix(".json").read_text())
    points = found.pop("points")
    assert json.loads(out.read_text())["tsne"] == found
    assert (found["stage"], found["images"], found["classes"]) == ("res5", 18, list(COLOURS))
    assert (found["pca_dimensions"], found["seed"], found["backbone"]) == (18, 0, str(artifact))
    assert -1 <= found["silhouette"] <= 1
    assert found["within_over_between"] > 0
    assert [point["class"] for point in points] == [name for name in COLOURS for _ in range(6)]
    assert all((images / "val" / point["image"]).is_file() for point in points)
    assert len({(point["x"], point["y"]) for point in points}) == 18
    assert len(find_runs([str(tmp_path)]).probes) == 1  # the numbers are no probe's


@needs_sklearn
def test_the_stage_is_the_last_that_is_probed_and_its_features_those_of_the_model(
    artifact: Path, images: Path, tmp_path: Path
) -> None:
    from loco_det.evaluation.probes.backbones import load_backbone_for_probe
    from loco_det.evaluation.probes.features import Extractor

    assert run(artifact, images, "--stages", "res3", "res2", "--tsne", tmp_path / "a.png") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["stage"], found["images"]) == ("res3", 24)
    test = open_probe_data(str(images)).test
    extractor = Extractor(
        load_backbone_for_probe(str(artifact)), SIDE, torch.device("cpu"), batch=5, workers=0, cache=None
    )
    features = extractor(test, ["res3"], "x")["res3"].numpy()
    assert found["silhouette"] == pytest.approx(compactness(features, test.labels)["silhouette"], abs=1e-5)


def test_what_cannot_be_drawn_is_refused_before_the_work(
    artifact: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        (("--tsne", tmp_path / "a.pdf"), "a.pdf: the picture is a PNG"),
        (("--tsne-images", 20), "--tsne-images belongs to --tsne PNG"),
        (("--tsne", tmp_path / "a.png", "--tsne-images", 0), "--tsne-images is 0"),
        (("--tsne", tmp_path / "a.png", "--json", tmp_path / "a.json"), "give one of them another name"),
        (("--tsne", tmp_path / "a.png", "--tsne-images", 5), "fewer than two of each class"),
    ):
        if importlib.util.find_spec("sklearn") or "sklearn" in message:
            assert run(artifact, images, *options) == 2
            error = capsys.readouterr().err
            assert message in error
            assert "features" not in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(artifact, images, "--tsne", tmp_path / "a.png") == 2
    assert "pip install scikit-learn" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_sklearn
def test_a_stage_that_says_the_same_of_all_images_is_refused(tmp_path: Path, images: Path, capsys) -> None:
    model = ResNet(18, stem="cifar")
    for p in model.res4.parameters():
        torch.nn.init.zeros_(p)
    save_backbone(tmp_path / "x.safetensors", backbone_tensors(model), describe(model, stem="cifar", method="loco"))
    options = ("--image-size", SIDE, "--stages", "res4", "--tsne", tmp_path / "a.png")
    assert run(tmp_path / "x.safetensors", images, *options) == 2
    assert "the same features at res4" in capsys.readouterr().err
