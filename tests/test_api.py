"""`import loco_det` in a notebook: load, look, probe, detect, with a module of one's own too."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from tiny_detection import TINY_HEADS as SMALL
from tiny_detection import overrides
from torch import nn

import loco_det
from loco_det import api
from loco_det.annotations.coco import image_files
from loco_det.annotations.registry import find_dataset
from loco_det.backbones import own
from loco_det.backbones.own import OwnBackbone
from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.fpn import build_backbone
from loco_det.detection.keys import load_cfg
from loco_det.evaluation.probes.backbones import measure_on

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "notebook.ipynb"


class Maps(nn.Module):
    """Four strides, each a colour mean over squares times a weight."""

    def __init__(self, strides: tuple[int, ...] = (4, 8, 16, 32)) -> None:
        super().__init__()
        self.sides = strides
        mixed = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [1, -1, 0]]
        self.weight = nn.Parameter(torch.tensor(mixed, dtype=torch.float32)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [F.conv2d(F.avg_pool2d(x, stride, ceil_mode=True), self.weight) for stride in self.sides]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes told apart by their colour."""
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.clip(rng.integers(0, 50, (40, 48, 3)) + colour, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_what_is_offered_is_short_and_documented() -> None:
    assert dir(loco_det) == ["__version__", "evaluate_detection", "load_backbone", "probe"]
    assert all(len(getattr(loco_det, name).__doc__) > 200 for name in loco_det.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        loco_det.train  # noqa: B018


def test_features_of_files_arrays_and_a_batch_are_the_same(classes: Path) -> None:
    backbone = loco_det.load_backbone("random:resnet18-cifar")
    files = sorted(classes.glob("red/*.png"))[:3]
    arrays = [np.asarray(Image.open(file)) for file in files]
    found = backbone.features(files)
    assert {stage: tuple(map_.shape) for stage, map_ in found.items()}["res5"] == (3, 512, 4, 4)
    again = backbone.features(arrays, batch=2)
    pooled = backbone.features([Image.open(file) for file in files], pooled=True)
    for stage, map_ in found.items():
        assert torch.allclose(again[stage], map_, atol=1e-5)
        assert torch.allclose(pooled[stage], map_.mean((2, 3)), atol=1e-5)
    batch = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        expected = backbone.model((batch.float() - mean) / std)
    assert torch.allclose(backbone.features(batch)["res5"], expected["res5"], atol=1e-4)
    with pytest.raises(UserError, match="uint8"):
        backbone.features(batch.float())


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("grey.png", r"images are a str; give a list"),
        (None, r"images are a NoneType; give a list"),
        ([], r"images are a list; give a list"),
        (
            np.zeros((8, 8, 3), np.uint8),
            r"images are a ndarray; give a list of .*, \[image\] for one",
        ),
    ],
)
def test_what_are_no_images(images: object, said: str) -> None:
    backbone = loco_det.load_backbone(Maps(), image_size=64)
    with pytest.raises(UserError, match=said):
        backbone.features(images)
    with pytest.raises(UserError, match="batch -1: give a whole number of at least 1"):
        backbone.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), batch=-1)


@pytest.mark.parametrize("pixels", [{"std": (0, 0, 0)}, {"mean": 3}, {"mean": ("a", "b", "c")}, {"std": (1, 1)}])
def test_what_are_no_pixels(pixels: dict[str, object]) -> None:
    with pytest.raises(UserError, match="is no list of three numbers in 0-255 units"):
        loco_det.load_backbone(Maps(), image_size=64, **pixels)


def test_pixels_in_0_to_1_units_are_told() -> None:
    with pytest.raises(UserError, match=r"0-1 units; multiply mean and std by 255: mean=\[127.5, 102.0, 0.0\]"):
        loco_det.load_backbone(Maps(), image_size=64, mean=[0.5, 0.4, 0.0], std=[0.5, 0.5, 0.5])
    assert loco_det.load_backbone(Maps(), image_size=64, mean=[0, 0, 0], std=[1, 1, 1]).std == (1, 1, 1)


@pytest.mark.parametrize(
    ("source", "said"),
    [("resnet18", "for a model of timm write timm:resnet18, for its untrained network random:timm:resnet18"),
     (len, "give an nn.Module"), (nn.Identity, "give an nn.Module")],
)  # fmt: skip
def test_what_is_no_backbone(source: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        loco_det.load_backbone(source)


def test_a_given_module_is_kept_while_it_is_referred_to() -> None:
    module = Maps()
    name = own.given(module)
    assert own.given(module) == name
    assert own.find(name) is module
    del module
    with pytest.raises(UserError, match="was a module given from Python, in another process or gone"):
        own.find(name)


def test_a_module_of_ones_own() -> None:
    backbone = loco_det.load_backbone(Maps(), mean=(0, 0, 0), std=(255, 255, 255), image_size=64)
    assert backbone.channels == {"res2": 5, "res3": 5, "res4": 5, "res5": 5}
    assert backbone.model.strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    assert backbone.features(white, pooled=True)["res4"].tolist() == [[1, 1, 1, 3, 0]]
    named = OwnBackbone(Named(), "mine", 64)
    assert named.stage_names == ("a", "b")
    assert OwnBackbone(Maps((7, 14)), "mine", 56).stage_names == ("map0", "map1")


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x[:, :, ::2, ::2], "b": x}


class Wrong(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> object:
        if self.how == "raises":
            raise RuntimeError("wants 512 x 512")
        return {"vector": x.mean((2, 3)), "nothing": [], "skewed": x[:, :, ::2], "text": "map"}[self.how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", r"does not take an image of 64 x 64 pixels \(wants 512 x 512\); give another image_size"),
        ("vector", r"returns Tensor \(1, 3\); return maps"),
        ("nothing", "returns nothing"),
        ("skewed", r"a square image has a map \(1, 3, 32, 64\); return \(B, C, H, W\)"),
        ("text", "returns str"),
    ],
)
def test_modules_that_give_no_maps(how: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        loco_det.load_backbone(Wrong(how), image_size=64)


def test_a_probe_is_the_commands(classes: Path, tmp_path: Path) -> None:
    options = {"protocol": "ridge", "image_size": 32, "no_cache": True, "workers": 0}
    found = loco_det.probe("random:resnet18-cifar", classes, **options)
    assert set(found.rows) == {"stem", "res2", "res3", "res4", "res5"}
    assert found["stages"]["res5"]["top1"] == found.rows["res5"]["top1"]
    assert str(found).splitlines()[0].split()[0] in found.rows["res5"]
    mine = loco_det.load_backbone(Maps(), image_size=64)
    own_ = loco_det.probe(mine, classes, protocol="knn", workers=0, no_cache=True, k=3)
    assert own_.rows["res5"]["top1"] == 100  # colours
    with pytest.raises(UserError, match="no option --kk"):
        loco_det.probe("random:resnet18-cifar", classes, kk=3)
    assert json.dumps(found)
    if pandas := pytest.importorskip("pandas", reason="pandas is not installed"):
        assert isinstance(found.to_pandas(), pandas.DataFrame)


def test_a_segmentation_probe_takes_a_module(tmp_path: Path) -> None:
    """Two colours, a half of each image each: the module's map says which."""
    for split in ("images", "masks"):
        (tmp_path / split).mkdir()
    for i in range(8):
        pixels, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
        pixels[:, :32, 0], pixels[:, 32:, 2], mask[:, 32:] = 200 + i, 200 - i, 1
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "masks" / "classes.txt").write_text("red\nblue\n")
    mine = loco_det.load_backbone(Maps((16,)), image_size=64)
    data = f"{tmp_path / 'masks'}@{tmp_path / 'images'}"
    found = loco_det.probe(mine, data, protocol="segmentation", method="knn", workers=0, patches=4, k=1)
    assert found.rows["res4"]["miou"] == 100
    assert found["backbone"]["name"] == "Maps"


@pytest.mark.parametrize(
    "source",
    ["module", "random:timm:test_vit", "random:timm:test_convnext", "random:resnet18", "random:resnet18-cifar"],
)
def test_detection(source: str, tiny_data: Path, tmp_path: Path) -> None:
    backbone = loco_det.load_backbone(Maps() if source == "module" else source)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 2, "device": "cpu", "settings": SMALL}
    found = loco_det.evaluate_detection(backbone, masks=True, output=tmp_path / "run", **options)
    assert set(found.rows) == {"bbox", "segm"}
    assert 0 <= found["bbox"]["AP"] <= 100
    assert found.folder == tmp_path / "run"
    assert (tmp_path / "run" / "model_final.pth").is_file()
    assert str(found).splitlines()[1].startswith("bbox")
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_cifar_stem_sees_means_over_squares_of_four_pixels() -> None:
    backbone = loco_det.load_backbone("random:resnet18-cifar")
    found = api._for_a_pyramid(backbone)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    squares = images.view(2, 3, 16, 4, 24, 4).mean((3, 5))
    with torch.no_grad():
        maps, expected = found.model(images), backbone.model(squares)
    assert list(maps) == ["res2", "res3", "res4", "res5"]
    assert found.model.strides == {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert found.channels == {stage: map_.shape[1] for stage, map_ in maps.items()}
    for stage, map_ in maps.items():
        torch.testing.assert_close(map_, expected[stage])
    plain = loco_det.load_backbone("random:resnet18")
    assert api._for_a_pyramid(plain) is plain


def test_an_untrained_cifar_stem_is_measured_on_images_of_its_own_size(tiny_data: Path) -> None:
    """Not on quarters of them, as a detector's are."""
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 1, "device": "cpu", "settings": SMALL}
    run = loco_det.evaluate_detection("random:resnet18-cifar", **options)
    tensors = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
    backbone = loco_det.load_backbone("random:resnet18-cifar")
    measure_on(backbone, image_files(find_dataset("tiny_train")), 0)
    for name, tensor in backbone.model.state_dict().items():
        if name.endswith("running_mean"):
            (found,) = (there for key, there in tensors.items() if key.endswith(f"network.{name}"))
            torch.testing.assert_close(found, tensor)


def test_every_evaluation_begins_with_the_same_weights(tiny_data: Path) -> None:
    """Frozen, then tuned: the second is not frozen too, and neither changes the user's module."""
    module = Maps().requires_grad_(False)
    before = module.weight.clone()
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 2, "device": "cpu", "settings": SMALL}
    for protocol, is_trained in (("frozen", False), ("all", True)):
        run = loco_det.evaluate_detection(module, protocol=protocol, **options)
        tensors = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
        weight = next(tensor for name, tensor in tensors.items() if name.endswith("module.weight"))
        assert torch.equal(weight, before) != is_trained
        assert torch.equal(module.weight, before)
    with ThreadPoolExecutor(1) as other:  # a thread, where Python has no signal handlers
        assert other.submit(loco_det.evaluate_detection, module, **{**options, "iterations": 1}).result().rows


class Normed(Maps):
    """With a BatchNorm on each map; of square images alone, if `is_square`."""

    def __init__(self, is_square: bool = False) -> None:
        super().__init__()
        self.norm, self.is_square = nn.BatchNorm2d(5), is_square

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.is_square and x.shape[2] != x.shape[3]:
            raise RuntimeError("196 positions")
        return [self.norm(map_) for map_ in super().forward(x)]


def test_statistics_of_a_module_are_measured_if_it_is_untrained(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Normed().requires_grad_(False).train()
    never = "BatchNorm statistics were never measured"
    assert loco_det.evaluate_detection(module, iterations=1, **OPTIONS).rows
    assert never in capsys.readouterr().err
    untrained = loco_det.load_backbone(Normed().requires_grad_(False), image_size=64, untrained=True)
    run = loco_det.evaluate_detection(untrained, iterations=1, **OPTIONS)
    assert never not in capsys.readouterr().err
    assert "random weights: the AP that a trained backbone has to exceed" in str(run)
    tensors = torch.load(run.folder / "model_final.pth", weights_only=True)["model"]
    (mean,) = (tensor for name, tensor in tensors.items() if name.endswith("norm.running_mean"))
    assert mean.abs().min() > 0.01
    assert module.training
    assert not module.norm.running_mean.any()
    assert not untrained.model.module.norm.running_mean.any()


@pytest.mark.parametrize("how", ["square", "nan"])
def test_a_module_that_no_detector_can_use(how: str, tiny_data: Path) -> None:
    backbone = loco_det.load_backbone(Normed(how == "square"), image_size=64)
    if how == "nan":
        nn.init.constant_(backbone.model.module.norm.bias, float("nan"))
    said = {
        "square": r"an image of 64 x 128 pixels \(196 positions\); a detector's images have all sizes",
        "nan": "its map res2 of an image of one colour is not finite",
    }
    with pytest.raises(UserError, match=said[how]):
        loco_det.evaluate_detection(backbone, iterations=1, **OPTIONS)


def test_a_named_module_of_square_images_is_refused_as_a_detectors() -> None:
    module = Normed(is_square=True)
    cfg, _ = load_cfg("base_rcnn_fpn.yaml", ["MODEL.BACKBONE.NAME", own.given(module)])
    with pytest.raises(UserError, match=r"an image of 224 x 288 pixels \(196 positions\)"):
        build_backbone(cfg)


def test_masks_are_read_in_the_form_that_the_file_has(tmp_path: Path) -> None:
    assert main(["data", "shapes", str(tmp_path / "cells"), "--train", "2", "--test", "2"]) == 0  # RLE
    data = {"train": f"{tmp_path / 'cells'}/@train", "test": f"{tmp_path / 'cells'}/@test"}
    settings = {**SMALL, "MODEL.ROI_HEADS.NUM_CLASSES": 6}
    options = {**OPTIONS, **data, "settings": settings}
    found = loco_det.evaluate_detection(Maps(), masks=True, iterations=1, **options)
    assert set(found.rows) == {"bbox", "segm"}


def test_another_runs_folder_is_left_alone(tiny_data: Path, tmp_path: Path) -> None:
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 1, "device": "cpu", "settings": SMALL}
    (tmp_path / "config.yaml").write_text("VERSION: 2\n")
    (tmp_path / "backbone.safetensors").write_bytes(b"of another run")
    with pytest.raises(UserError, match="holds another run; give another output"):
        loco_det.evaluate_detection("random:timm:test_vit", output=tmp_path, **options)
    assert (tmp_path / "backbone.safetensors").read_bytes() == b"of another run"
    with pytest.raises(UserError, match="cannot be made a folder"):
        loco_det.evaluate_detection(Maps(), output=tmp_path / "config.yaml", **options)
    with pytest.raises(UserError, match="iterations '3': give a whole number"):
        loco_det.evaluate_detection(Maps(), **{**options, "iterations": "3"})


OPTIONS = {"train": "tiny_train", "test": "tiny_val", "device": "cpu", "settings": SMALL}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """This process gets the signal in the step of that number, from 1."""
    forward, done = TorchvisionEngine.losses, []

    def losses(*args: object) -> object:
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), number)
        return forward(*args)

    monkeypatch.setattr(TorchvisionEngine, "losses", losses)


def test_detection_says_what_it_does_and_leaves_the_logger_as_it_was(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    log = logging.getLogger("loco_det")
    before = list(log.handlers), log.level, log.propagate
    found = loco_det.evaluate_detection(Maps(), iterations=3, output=tmp_path / "run", **OPTIONS)
    out, err = capsys.readouterr()
    assert out == ""
    first = (
        "training Faster R-CNN on Maps (frozen): 3 iterations on the 6 images of tiny_train, then a test on the 6 "
        f"images of tiny_val; in {tmp_path / 'run'}"
    )
    written = (tmp_path / "run" / "log.txt").read_text()
    for text in (err, written):
        assert text.splitlines()[0].endswith(f" I {first}")
        assert text.count("train 3/3 eta 00:00:00") == 1
        assert text.count(" evaluation 6/6") + text.count(" evaluation 3/3") >= 1
    assert (log.handlers, log.level, log.propagate) == before
    settings = {**SMALL, "SOLVER.BASE_LR": 1e30}
    with pytest.raises(UserError, match=r"SOLVER\.BASE_LR"):
        loco_det.evaluate_detection(Maps(), iterations=3, output=tmp_path / "b", **{**OPTIONS, "settings": settings})
    assert "lower SOLVER.BASE_LR" in (tmp_path / "b" / "log.txt").read_text().splitlines()[-1]
    assert (log.handlers, log.level, log.propagate) == before
    assert found.notes[0] in str(found)


def test_small_heads_are_the_same_whatever_the_pyramid() -> None:
    keys = [text for key, value in api._small_keys().items() for text in (key, str(value))]
    plain, staged = (load_cfg(f"base_rcnn_{kind}.yaml", keys)[0].MODEL for kind in ("vit", "fpn"))
    assert plain.RPN == staged.RPN
    assert {**plain.ROI_BOX_HEAD, "NORM": ""} == staged.ROI_BOX_HEAD  # of convolutions, and there are none


def test_the_page_has_every_argument_with_its_default_and_what_small_changes() -> None:
    page = (NOTEBOOK.parent.parent / "is_my_backbone_good.md").read_text()
    table = page.split("## Arguments of evaluate_detection")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    defaults = {name: row[1].strip("`") for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    parameters = list(inspect.signature(loco_det.evaluate_detection).parameters.values())[1:]
    empty = inspect.Parameter.empty
    assert defaults == {p.name: "" if p.default is empty else repr(p.default).replace("'", '"') for p in parameters}
    (small,) = [row[2] for row in rows if row[0] == "`small`"]
    keys, base = api._small_keys(), load_cfg("base_rcnn_fpn.yaml", [])[0]
    for key, said in (
        ("INPUT.MIN_SIZE_TEST", "images of {} instead of {} pixels"),
        ("SOLVER.IMS_PER_BATCH", "batches of {} instead of {}"),
        ("MODEL.FPN.OUT_CHANNELS", "a pyramid of {} instead of {} channels"),
    ):
        section, *path = key.split(".")
        before = base[section]
        for name in path:
            before = before[name]
        assert said.format(keys[key], before) in small
    assert f"a rate of {keys['SOLVER.BASE_LR']} with clipped" in small


def test_a_result_says_how_to_read_it(tiny_data: Path) -> None:
    rows = {"bbox": {"AP": 1.5, "APl": float("nan")}}
    cfg = load_cfg("base_rcnn_fpn.yaml", overrides(SOLVER__MAX_ITER=7, OUTPUT_DIR="runs/a"))[0]
    notes = api._notes(cfg, rows, loco_det.load_backbone(Maps(), image_size=64))
    assert notes[0] == (
        "7 iterations of 2 images, from the 6 images of tiny_train; tested on the 6 images of tiny_val; in runs/a"
    )
    assert notes[1].startswith("nan: no such object in the test set")
    assert "load_backbone(the same module with random weights, untrained=True): " in notes[2]
    assert "too few: raise them" in notes[2]
    del rows["bbox"]["APl"]
    for source, said in (
        ("random:timm:test_vit", "random weights: the AP that a trained backbone has to exceed"),
        ("file", 'evaluate_detection("random:resnet18", ...)'),
    ):
        backbone = loco_det.load_backbone("random:resnet18" if source == "file" else source, image_size=64)
        backbone.untrained = source != "file"
        notes = api._notes(cfg, rows, backbone)
        assert len(notes) == 2
        assert said in notes[1]
    timm = loco_det.load_backbone("random:timm:test_vit")
    timm.untrained = False
    assert 'evaluate_detection("random:timm:test_vit", ...)' in api._notes(cfg, rows, timm)[1]


@pytest.mark.parametrize("source", ["module", "random:timm:test_vit"])
def test_ctrl_c_keeps_the_run_and_the_same_call_continues_it(
    source: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Maps() if source == "module" else source
    whole = loco_det.evaluate_detection(source, iterations=4, output=tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt) as stopped:
            loco_det.evaluate_detection(source, iterations=4, output=tmp_path / "run", **OPTIONS)
    assert str(stopped.value) == (
        f"stopped by SIGINT after iteration 2; {tmp_path / 'run'} holds the run, and the same call with resume=True "
        "continues it"
    )
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000001.pth"
    with pytest.raises(UserError, match=r"holds another run; .* or continue with resume=True"):
        loco_det.evaluate_detection(source, iterations=4, output=tmp_path / "run", **OPTIONS)
    found = loco_det.evaluate_detection(source, iterations=4, output=tmp_path / "run", resume=True, **OPTIONS)
    assert found == whole
    ours, theirs = (torch.load(tmp_path / d / "model_final.pth", weights_only=True)["model"] for d in ("run", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert "resumed from" in (tmp_path / "run" / "log.txt").read_text()


def test_another_backbone_does_not_resume_a_run(tiny_data: Path, tmp_path: Path) -> None:
    """Its checkpoint would replace the weights to be evaluated, and the first backbone's AP be returned again."""
    run = {"iterations": 1, "output": tmp_path / "run", "resume": True, **OPTIONS}
    first = loco_det.evaluate_detection("random:timm:test_vit", **run)  # resume without a run starts one
    assert loco_det.evaluate_detection("random:timm:test_vit", **run) == first
    other = loco_det.load_backbone("random:timm:test_vit")
    next(other.model.parameters()).data.add_(1)
    kept = (tmp_path / "run" / "backbone.safetensors").read_bytes()
    with pytest.raises(
        UserError, match="holds a run of another backbone than random:timm:test_vit; give another output"
    ):
        loco_det.evaluate_detection(other, **run)
    assert (tmp_path / "run" / "backbone.safetensors").read_bytes() == kept
    with pytest.raises(UserError, match="resume=True: give the output"):
        loco_det.evaluate_detection(Maps(), iterations=1, resume=True, **OPTIONS)


def interrupted(*_: object) -> None:
    """What Python does at Ctrl-C, where SIGINT is not ignored as in a shell's background job."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["training", "evaluation"])
def test_an_interrupted_call_leaves_no_temporary_folder(
    moment: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if moment == "training":
        stop_at(monkeypatch, 2, signal.SIGTERM)
    else:
        monkeypatch.setattr(TorchvisionEngine, "test_batches", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"its temporary folder is removed; output=DIR would keep the run"):
        loco_det.evaluate_detection(Maps(), iterations=3, **OPTIONS)
    with pytest.raises(UserError, match=r"SOLVER\.BASE_RL"):
        loco_det.evaluate_detection(Maps(), iterations=3, **{**OPTIONS, "settings": {"SOLVER.BASE_RL": 1}})
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_training_keeps_what_was_trained(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(TorchvisionEngine, "test_batches", lambda *_: [][0])
    with pytest.raises(IndexError):
        loco_det.evaluate_detection(Maps(), iterations=1, **OPTIONS)
    (folder,) = tmp_path.iterdir()
    assert (folder / "model_final.pth").is_file()
    assert "IndexError" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("source", ["random:resnet18", "file"])
def test_the_asked_size_is_the_size_of_the_images(source: str, classes: Path, tmp_path: Path) -> None:
    if source == "file":
        source = str(tmp_path / "resnet.pth")
        torch.save(torchvision.models.resnet18().state_dict(), source)
    backbone = loco_det.load_backbone(source, image_size=64)
    assert backbone.features(sorted(classes.glob("red/*.png"))[:1])["res5"].shape == (1, 512, 2, 2)


def test_bad_sizes_and_half_precision_are_one_sentence() -> None:
    for size in (0, -1, 64.5, "64"):
        with pytest.raises(UserError, match="give a whole number of pixels"):
            loco_det.load_backbone(Maps(), image_size=size)
    with pytest.raises(UserError, match=r"weights are torch\.float16; give it in float32"):
        loco_det.load_backbone(Maps().half(), image_size=64)


def test_detection_refuses(tiny_data: Path, tmp_path: Path) -> None:
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 1, "device": "cpu", "settings": SMALL}
    with pytest.raises(UserError, match="use one of frozen, finetune, all"):
        loco_det.evaluate_detection(Maps(), protocol="linear", **options)
    with pytest.raises(UserError, match=r"needs maps of stride 16, and its strides are \[8\]"):
        loco_det.evaluate_detection(Maps((8,)), output=tmp_path / "a", **options)
    with pytest.raises(UserError, match="has no stages that are known here"):
        loco_det.evaluate_detection(Maps(), protocol="finetune", output=tmp_path / "b", **options)


def test_maps_of_other_names_are_one_sentence(tiny_data: Path, tmp_path: Path) -> None:
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 1, "device": "cpu", "settings": SMALL}
    with pytest.raises(UserError, match=r"has no map res2; its maps are a, b\. Return a dict of maps called res2"):
        loco_det.evaluate_detection(Named(), output=tmp_path / "c", **options)


def test_a_function_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_backbone.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Conv2d(3, 7, 16, 16)\ndef wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = own.find("python:my_backbone:build")
    assert OwnBackbone(module, "x").strides == {"res4": 16}
    for name, said in (
        ("python:my_backbone:wrong", "returns a int; return an nn.Module"),
        ("python:my_backbone:gone", "AttributeError.*python:package.module:function"),
        ("python:my_backbone_2:build", "ModuleNotFoundError"),
        ("python:given-99", "a module given from Python, in another process or gone"),
    ):
        with pytest.raises(UserError, match=said):
            own.find(name)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code cell, in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    namespace: dict[str, object] = {}
    for cell in cells:
        assert cell["outputs"] == []
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), namespace)
    assert 0 <= namespace["result"]["bbox"]["AP"] <= 100
