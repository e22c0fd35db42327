"""The nearest-neighbour probe during pretraining: right, and without any effect on the training."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from loco_det.backbones.names import to_detectron2
from loco_det.backbones.resnet import ResNet
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.evaluation.knn import knn_predict
from loco_det.images.folders import open_source
from loco_det.images.two_views import build_plain_loader
from pretrain.defaults import get_cfg
from pretrain.probe import KnnProbe
from pretrain.train import pretrain

SETTINGS = """BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 DECODER.HIDDEN_DIM 16
    DECODER.OUT_DIM 8 DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0
    SOLVER.BATCH_SIZE 4 SOLVER.MAX_STEPS 7 SOLVER.OPTIMIZER adamw SOLVER.BASE_LR 0.001
    SOLVER.WARMUP_EPOCHS 0 LOG_PERIOD 4 DEVICE cpu KNN.K 3"""


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of six and seven images that differ in colour, but not wholly."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for name, count, tint in (("cat", 6, (60, 0, 0)), ("dog", 7, (0, 0, 60))):
        (folder / name).mkdir()
        for i in range(count):
            coarse = rng.integers(0, 190, (5, 6, 3)) + tint
            cv2.imwrite(str(folder / name / f"{i}.png"), cv2.resize(coarse.astype(np.uint8), (24, 20)))
    return folder


def config(data: Path, output: Path, **extra: object):
    options = [*SETTINGS.split(), "DATA.PATH", str(data), "OUTPUT_DIR", str(output)]
    for key, value in extra.items():
        options += [key.replace("__", "."), str(value)]
    return load_config(get_cfg(), "", options)[0]


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def oracle(backbone: Path, train: list[tuple[Path, int]], test: list[tuple[Path, int]], k: int) -> dict[str, float]:
    """Percent right by loops in float64, one image at a time."""
    network = ResNet(18, stem="cifar", res2_out_channels=8, stem_channels=8).double().eval()
    tensors = {to_detectron2(name): t for name, t in load_backbone(backbone)[0].items()}
    assert not network.load_state_dict(tensors, strict=False).unexpected_keys

    def features(path: Path) -> dict[str, np.ndarray]:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        source = open_source(path.parent.parent)
        index = next(i for i in range(len(source)) if source.name(i) == str(path))
        pixels = next(iter(build_plain_loader(source, 16, batch_size=1, indices=[index]))).images[0].double()
        assert image.shape == (20, 24, 3)
        x = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        with torch.no_grad():
            return {name: h.mean((2, 3))[0].numpy() for name, h in network(x[None]).items()}

    bank = [(features(path), label) for path, label in train]
    right = dict.fromkeys(("res2", "res3", "res4", "res5"), 0)
    for path, truth in test:
        asked = features(path)
        for stage in right:
            cosines = []
            for other, label in bank:
                a, b = asked[stage], other[stage]
                cosines.append((float(a @ b / np.sqrt((a @ a) * (b @ b))), label))
            votes = {0: 0.0, 1: 0.0}
            for cosine, label in sorted(cosines, reverse=True)[:k]:
                votes[label] += np.exp(cosine / 0.07)
            right[stage] += max(votes, key=votes.get) == truth
    return {f"knn/{stage}": 100 * count / len(test) for stage, count in right.items()}


def test_it_counts_right_and_training_is_the_same_without_it(classes: Path, tmp_path: Path) -> None:
    with_it = pretrain(config(classes, tmp_path / "a", KNN__PERIOD=1, KNN__VAL_PATH=classes))
    without = pretrain(config(classes, tmp_path / "b", KNN__PERIOD=0, LOG_PERIOD=1))
    assert load_backbone(with_it)[1].tensors_sha256 == load_backbone(without)[1].tensors_sha256
    found = lines(tmp_path / "a")
    assert [line["iteration"] for line in found] == [0, 2, 3, 5, 6]  # LOG_PERIOD 4, three steps an epoch, the end
    assert [line["iteration"] for line in found if "knn/res5" in line] == [2, 5, 6]
    every_step = lines(tmp_path / "b")
    assert [line["iteration"] for line in every_step] == list(range(7))
    for line in found:
        same = {k: v for k, v in line.items() if k.startswith(("loss", "grad", "std", "lr"))}
        assert same == {k: every_step[line["iteration"]][k] for k in same}
    every = [(path, int(path.parent.name == "dog")) for path in sorted(classes.glob("*/*.png"))]
    want = oracle(with_it, every, every, 3)
    assert {key: value for key, value in found[-1].items() if key.startswith("knn")} == pytest.approx(want)


def test_a_fifth_of_each_class_are_queries_and_the_rest_references(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes)

    def probe(**extra: object) -> KnnProbe:
        cfg = config(classes, tmp_path, **extra)
        return KnnProbe(cfg, source, torch.device("cpu"), torch.contiguous_format, torch.no_grad)

    half = probe()
    assert sorted([*half.queries, *half.references]) == list(range(13))
    assert [source.label(i) for i in half.queries] == [0, 0, 1, 1]
    assert list(probe().queries) == list(half.queries)
    few = probe(KNN__IMAGES=5)
    assert set(few.references) < set(half.references)
    assert 5 <= len(few.references) <= 6
    assert [probe().due(done, 3, 40) for done in (29, 30, 31, 40)] == [False, True, False, True]
    assert not probe(KNN__PERIOD=0).due(40, 3, 40)
    torch.manual_seed(0)
    backbone = ResNet(18, stem="cifar").train()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    random = torch.random.get_rng_state()
    first = half(backbone)
    assert first == half(backbone)
    assert backbone.training
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())


def test_features_are_means_over_each_stages_map_of_normalised_images(classes: Path, tmp_path: Path) -> None:
    source = open_source(classes)
    cfg = config(classes, tmp_path)
    probe = KnnProbe(cfg, source, torch.device("cpu"), torch.contiguous_format, torch.no_grad)
    torch.manual_seed(0)
    network = ResNet(18, stem="cifar").eval()
    found, labels = probe._features(network, source, np.array([3, 8, 1]))
    assert labels.tolist() == [0, 1, 0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for row, index in enumerate((3, 8, 1)):
        pixels = next(iter(build_plain_loader(source, 16, batch_size=1, indices=[index]))).images.double()
        with torch.no_grad():
            maps = network.double()((pixels - mean) / std)
        network.float()
        for stage, rows in found.items():
            torch.testing.assert_close(rows[row], maps[stage][0].mean((1, 2)).float(), rtol=1e-3, atol=1e-4)


def test_unreadable_images_are_left_out(classes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(classes, data)
    source = open_source(data)
    cfg = config(data, tmp_path, KNN__VAL_PATH=data)
    probe = KnnProbe(cfg, source, torch.device("cpu"), torch.contiguous_format, torch.no_grad)
    (data / "cat" / "0.png").write_bytes(b"no image")
    _, labels = probe._features(ResNet(18, stem="cifar").eval(), source, probe.references)
    assert labels.tolist() == [0] * 5 + [1] * 7
    for path in data.glob("*/*.png"):
        path.write_bytes(b"")
    assert probe(ResNet(18, stem="cifar")) == {}


def test_classes_are_matched_by_name_if_other_images_have_fewer(classes: Path, tmp_path: Path) -> None:
    shutil.copytree(classes / "dog", tmp_path / "val" / "dog")
    cfg = config(classes, tmp_path, KNN__VAL_PATH=tmp_path / "val")
    probe = KnnProbe(cfg, open_source(classes), torch.device("cpu"), torch.contiguous_format, torch.no_grad)
    _, truth = probe._features(ResNet(18, stem="cifar").eval(), probe.test, probe.queries)
    assert truth.tolist() == [1] * 7  # the second class of the training, the first of these


def test_the_configured_neighbours_and_precision_are_used(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, dtypes = [], set()
    monkeypatch.setattr(
        "pretrain.probe.knn_predict", lambda *_, **options: seen.append(options) or knn_predict(*_, **options)
    )
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    cfg = config(classes, tmp_path, KNN__TEMPERATURE=0.5)
    backbone = ResNet(18, stem="cifar")
    backbone.res5.register_forward_hook(lambda *values: dtypes.add(values[-1].dtype))
    KnnProbe(cfg, open_source(classes), torch.device("cpu"), torch.contiguous_format, autocast)(backbone)
    assert seen == [{"k": 3, "temperature": 0.5, "classes": 2}] * 4
    assert dtypes == {torch.bfloat16}


def test_a_single_image_of_each_class_leaves_none_to_answer(classes: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(classes / name / "0.png", tmp_path / "data" / name)
    cfg = config(tmp_path / "data", tmp_path)
    probe = KnnProbe(cfg, open_source(tmp_path / "data"), torch.device("cpu"), torch.contiguous_format, torch.no_grad)
    assert not probe.due(40, 4, 40)


def test_without_classes_there_is_no_probe(classes: Path, tmp_path: Path) -> None:
    pretrain(config(classes / "cat", tmp_path, KNN__PERIOD=1, SOLVER__MAX_STEPS=1))
    assert not any(key.startswith("knn") for line in lines(tmp_path) for key in line)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("PERIOD", -1, "KNN.PERIOD is -1"),
        ("K", 0, "KNN.K is 0"),
        ("IMAGES", 0, "KNN.IMAGES is 0"),
        ("TEMPERATURE", 0.0, "KNN.TEMPERATURE is 0"),
        ("VAL_PATH", "/no/such", "KNN.VAL_PATH /no/such"),
        ("VAL_PATH", "FLAT", "has no classes"),
        ("VAL_PATH", "OTHER", "class 'owl', which DATA.PATH lacks"),
    ],
)
def test_bad_values_are_named(key: str, value: object, message: str, classes: Path, tmp_path: Path) -> None:
    if value == "OTHER":
        shutil.copytree(classes / "cat", tmp_path / "other" / "owl")
    value = {"FLAT": classes / "dog", "OTHER": tmp_path / "other"}.get(value, value)
    with pytest.raises(UserError, match=message):
        pretrain(config(classes, tmp_path / "out", **{f"KNN__{key}": value}))
