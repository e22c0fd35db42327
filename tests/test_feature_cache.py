"""The cache of frozen features: the same numbers bit for bit, computed once, and refused where inputs vary."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode
from tiny_detection import overrides, tiny_cfg, write_tiny
from torch import nn

from loco_det.backbones import own
from loco_det.core.errors import UserError
from loco_det.detection import engine_d2, feature_cache
from loco_det.detection.fpn import Trunk
from loco_det.detection.keys import load_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net

RESULTS = Path("inference") / "coco_instances_results.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set and two detectors: `a.pth`, and `b.pth` with other heads on the same backbone."""
    root = write_tiny(tmp_path_factory.mktemp("cache"))
    torch.manual_seed(0)
    model = build_model(tiny_cfg(root))
    for name in ("a", "b"):
        torch.save({"model": model.state_dict()}, root / f"{name}.pth")
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    return root


@pytest.fixture(autouse=True)
def datasets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(place))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that went through the backbone."""
    shapes: list[tuple[int, ...]] = []
    compute = Trunk._compute
    monkeypatch.setattr(Trunk, "_compute", lambda self, x: (shapes.append(tuple(x.shape)), compute(self, x))[1])
    return shapes


def evaluate(place: Path, out: Path, detector: str, cache: Path | None, fast: bool, **changes: Any) -> bytes:
    cfg: CfgNode = tiny_cfg(out, MODEL__WEIGHTS=place / f"{detector}.pth", **changes)
    train_net(cfg, engine="torchvision", eval_only=True, fast=fast, feature_cache=cache)
    return (out / RESULTS).read_bytes()


@pytest.mark.parametrize("fast", [False, True])
def test_every_image_is_computed_once_and_results_are_the_same(
    place: Path, tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    cache = tmp_path / "cache"
    expected = {name: evaluate(place, tmp_path / name, name, None, fast) for name in "ab"}
    assert expected["a"] != expected["b"]
    assert len(computed) == 12
    computed.clear()
    assert evaluate(place, tmp_path / "filling", "a", cache, fast) == expected["a"]
    assert len(computed) == len(list(cache.glob("*.pt"))) == 6
    for name in "ab":  # other heads on the same backbone
        assert evaluate(place, tmp_path / "reading", name, cache, fast) == expected[name]
    assert len(computed) == 6
    evaluate(place, tmp_path / "smaller", "a", cache, fast, INPUT__MIN_SIZE_TEST=48)
    evaluate(place, tmp_path / "other", "a", cache, not fast)  # other rounding
    assert len(computed) == len(list(cache.glob("*.pt"))) == 18
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")  # as FLOAT32_PRECISION asks of a GPU
    evaluate(place, tmp_path / "coarser", "a", cache, fast)
    assert len(computed) == len(list(cache.glob("*.pt"))) == 24


def test_other_weights_find_nothing_and_training_does_not_look(
    place: Path, tmp_path: Path, computed: list[tuple[int, ...]]
) -> None:
    cache = tmp_path / "cache"
    evaluate(place, tmp_path / "a", "a", cache, False)
    state = torch.load(place / "a.pth")
    state["model"]["backbone.bottom_up.res3.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, place / "c.pth")
    computed.clear()
    evaluate(place, tmp_path / "c", "c", cache, False)
    assert len(computed) == 6
    computed.clear()
    cfg = tiny_cfg(tmp_path / "train", MODEL__WEIGHTS=place / "a.pth", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    train_net(cfg, engine="torchvision", feature_cache=cache)
    assert [shape[0] for shape in computed] == [2, 2]  # two steps of two images, and an evaluation from disk


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MODEL__BACKBONE__FREEZE_AT": 4}, "MODEL.BACKBONE.FREEZE_AT 4 leaves res5"),
        ({"TEST__AUG__ENABLED": True}, "TEST.AUG.ENABLED"),
    ],
)
def test_refused_where_features_or_inputs_vary(
    place: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        evaluate(place, tmp_path, "a", tmp_path / "cache", False, **changes)


def test_refused_for_detectron2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_d2, "installed", lambda: True)
    with pytest.raises(UserError, match="--engine torchvision"):
        train_net(tiny_cfg(tmp_path), engine="detectron2", feature_cache=tmp_path)


def test_a_disk_that_fills_up_costs_the_files_and_nothing_else(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = evaluate(place, tmp_path / "a", "a", None, False)
    save, written = torch.save, []

    def save_two(value: object, file: object) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(save(value, file))

    monkeypatch.setattr(feature_cache.torch, "save", save_two)
    assert evaluate(place, tmp_path / "full", "a", tmp_path / "cache", False) == expected
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert caplog.text.count("No space left") == 1


def test_a_folder_that_cannot_be_written_is_refused_at_once(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        evaluate(place, tmp_path / "a", "a", tmp_path / "file", False)
    assert not (tmp_path / "a" / RESULTS).exists()


def one_bit_of_a_tensor_changed(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    tensor = max(torch.load(path).values(), key=torch.Tensor.numel)
    data[data.index(bytes(tensor.untyped_storage().tolist()))] ^= 1
    return bytes(data)


def test_a_damaged_file_is_made_again(
    place: Path, tmp_path: Path, computed: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    expected = evaluate(place, tmp_path / "a", "a", cache, False)
    whole = {path: path.read_bytes() for path in sorted(cache.glob("*.pt"))}
    first, second, third, *_ = whole
    first.write_bytes(whole[first][:-100])
    second.write_bytes(b"")
    third.write_bytes(one_bit_of_a_tensor_changed(third))
    computed.clear()
    assert evaluate(place, tmp_path / "again", "a", cache, False) == expected
    assert len(computed) == 3
    assert all(f"{path} is damaged" in caplog.text for path in (first, second, third))
    assert {path: path.read_bytes() for path in whole} == whole


def test_another_version_of_the_software_reads_nothing(
    place: Path, tmp_path: Path, computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    evaluate(place, tmp_path / "a", "a", cache, False)
    computed.clear()
    monkeypatch.setattr("loco_det.detection.feature_cache.__version__", "99")
    evaluate(place, tmp_path / "b", "a", cache, False)
    assert len(computed) == 6


# --- training images --------------------------------------------------------------------------------------------


def trained(out: Path, cache: Path | None, fast: bool = False, **changes: Any) -> tuple[dict[str, Any], list[str], Any]:
    """AP, the lines of losses without times, and the tensors of the detector after three epochs of six images."""
    sizes = {"INPUT__MIN_SIZE_TRAIN": (64,), "SOLVER__MAX_ITER": 9, "SOLVER__STEPS": ()}
    cfg = tiny_cfg(out, **{**sizes, **changes})
    found = train_net(cfg, engine="torchvision", fast=fast, train_feature_cache=cache)
    tensors = torch.load(out / "model_final.pth", weights_only=True)["model"]
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return found, [{k: v for k, v in line.items() if k.startswith(("loss", "total"))} for line in lines], tensors


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.usefixtures("one_thread")
def test_training_images_are_computed_once_and_nothing_else_changes(
    tmp_path: Path, computed: list[tuple[int, ...]], fast: bool
) -> None:
    """Six images and their mirror images, in batches of two that one size pads alike or not."""
    without = trained(tmp_path / "without", None, fast)
    computed.clear()
    filling = trained(tmp_path / "filling", tmp_path / "cache", fast)
    once = [shape for shape in computed if shape[0] == 1]
    files = sorted((tmp_path / "cache").glob("*.pt"))
    assert len(once) - 6 == len(files)  # the evaluation computes its six images itself
    assert 6 < len(files) < 18
    computed.clear()
    reading = trained(tmp_path / "reading", tmp_path / "cache", fast)
    assert len(computed) == 6
    assert sorted((tmp_path / "cache").glob("*.pt")) == files
    assert str(filling[:2]) == str(reading[:2])
    assert all(torch.equal(tensor, reading[2][name]) for name, tensor in filling[2].items())
    for name, tensor in without[2].items():
        torch.testing.assert_close(filling[2][name], tensor, rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(filling[1], without[1], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert filling[0]["bbox"]["AP"] == pytest.approx(without[0]["bbox"]["AP"], abs=0.5)


@pytest.mark.usefixtures("one_thread")
def test_a_batch_of_one_image_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    one = {"SOLVER__IMS_PER_BATCH": 1, "SOLVER__MAX_ITER": 7, "INPUT__RANDOM_FLIP": "vertical"}
    without, cached = (trained(tmp_path / name, folder, **one) for name, folder in (("a", None), ("b", tmp_path / "c")))
    assert str(without[:2]) == str(cached[:2])
    assert all(torch.equal(tensor, cached[2][name]) for name, tensor in without[2].items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"INPUT__MIN_SIZE_TRAIN": (64, 72)}, r"set INPUT\.MIN_SIZE_TRAIN \(64, 72\) to one size, or leave it out"),
        ({"INPUT__CROP__ENABLED": True}, r"is for images of one fixed size; set INPUT\.CROP\.ENABLED False"),
        ({"MODEL__BACKBONE__FREEZE_AT": 4}, r"--train-feature-cache needs a frozen backbone, but .*FREEZE_AT 4 leaves"),
    ],
)
def test_training_images_that_vary_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        trained(tmp_path, tmp_path / "cache", **changes)
    assert not list(tmp_path.rglob("*.pt"))


def test_large_scale_jitter_is_refused() -> None:
    cfg = load_cfg("configs/base_rcnn_vit.yaml", ["INPUT.SCALE_JITTER", "[0.1, 2.0]"])[0]
    with pytest.raises(UserError, match=r"set INPUT\.SCALE_JITTER \(\), or leave it out"):
        feature_cache.check_cacheable(cfg, "torchvision", training=True)
    feature_cache.check_cacheable(cfg, "torchvision")


def test_both_caches_of_a_frozen_module_are_kept_apart(tmp_path: Path, computed: list[tuple[int, ...]]) -> None:
    """A module stays in evaluation while it is trained on; its training images still do not go to the other cache."""
    module = nn.Conv2d(3, 8, 16, 16)
    keys = {"MODEL__BACKBONE__NAME": own.given(module), "MODEL__BACKBONE__FREEZE_AT": 5, "INPUT__MIN_SIZE_TRAIN": (64,)}
    given = overrides(**keys, OUTPUT_DIR=tmp_path / "run", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    cfg = load_cfg("configs/base_rcnn_vit.yaml", [*given, "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"])[0]
    train_net(cfg, engine="torchvision", feature_cache=tmp_path / "test")
    assert [shape[0] for shape in computed] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert len(list((tmp_path / "test").glob("*.pt"))) == 6
    train_net(cfg, engine="torchvision", feature_cache=tmp_path / "test", train_feature_cache=tmp_path / "train")
    assert len(list((tmp_path / "test").glob("*.pt"))) == 6
    assert len(list((tmp_path / "train").glob("*.pt"))) == 4
