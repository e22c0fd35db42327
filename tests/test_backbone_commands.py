"""Every command takes a vision transformer and a module of one's own as it takes a ResNet, or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from tiny_detection import RESNET_18, overrides, tiny_cfg
from torch import nn

import loco_det
from loco_det.cli import main
from loco_det.commands import sweep
from loco_det.convert import convert
from loco_det.convert.timm_models import convert_timm
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.keys import get_cfg
from loco_det.detection.onnx import export_onnx
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.detection.weights import load_weights

VIT, FPN = "configs/base_rcnn_vit.yaml", "configs/base_rcnn_fpn.yaml"
HALF = [127.5, 127.5, 127.5]  # the pixels of timm's test models
OWN_KEYS = ("SEED", "MODEL.WEIGHTS", "OUTPUT_DIR")  # of every run
MODULE = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.GELU())
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Any:
    """`vit.safetensors`, `resnet.pth`, `resnet.pkl`, and a module that Python can import."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "vit.pth")
    convert_timm(str(folder / "vit.pth"), folder / "vit.safetensors", "timm:test_vit")
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet.pth")
    convert(folder / "resnet.pth", folder / "resnet.pkl")
    (folder / "own_module_of_a_test.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


BACKBONES = {
    "vit": {"MODEL__BACKBONE__NAME": "timm:test_vit", "MODEL__PIXEL_MEAN": HALF, "MODEL__PIXEL_STD": HALF},
    "module": {"MODEL__BACKBONE__NAME": "python:own_module_of_a_test:build"},
}


def pairs(**changes: object) -> list[str]:
    """TINY on a plain backbone as KEY VALUE pairs, without those that every run sets."""
    fixed = {"MODEL__BACKBONE__FREEZE_AT": 5, "MODEL__MASK_ON": True, "MODEL__ROI_BOX_HEAD__CONV_DIM": 16}
    given = overrides(**{**fixed, **changes})
    keys = zip(given[::2], given[1::2])
    return [text for key, value in keys if key not in OWN_KEYS for text in (key, value)]


def plain_cfg(**changes: object):
    return load_config(get_cfg(), VIT, [*pairs(**changes), "SEED", "3", "MODEL.WEIGHTS", ""])[0]


# --- sweep ------------------------------------------------------------------------------------------------------


def test_a_sweep_over_a_vit_and_a_module(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in this process, one after the other."""
    ran: list[list[str]] = []

    def here(command: list[str], *_: object) -> tuple[int, float]:
        ran.append(command[command.index("loco_det.cli") + 1 :])
        return main(ran[-1]), 0.0

    monkeypatch.setattr(sweep, "run_process", here)
    monkeypatch.setattr(sweep, "launch_all", lambda args, cells, run, **_: [(cell, run(cell, {})) for cell in cells])
    given = [place / "vit.safetensors", "python:own_module_of_a_test:build"]
    argv = ["sweep", "--config-file", VIT, "--out", tmp_path, "--engine", "torchvision", "--backbones", *given]
    argv += ["--set", *pairs(SOLVER__MAX_ITER=1, SOLVER__STEPS=())]
    assert main([str(one) for one in argv]) == 0
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [cell["backbone"] for cell in cells] == ["vit", "build"]
    assert all("bbox/AP" in cell["results"] for cell in cells)
    vit, module = ({key: one[i + 1] for i, key in enumerate(one[:-1])} for one in ran)
    assert vit["MODEL.BACKBONE.NAME"] == "timm:test_vit"  # with its pixels: the configuration has ImageNet's
    assert vit["MODEL.PIXEL_MEAN"] == str(HALF)
    assert (module["MODEL.BACKBONE.NAME"], module["MODEL.WEIGHTS"]) == ("python:own_module_of_a_test:build", "")
    assert main([str(one) for one in argv]) == 0
    assert len(ran) == 2


def test_a_sweep_names_backbones_and_keeps_options() -> None:
    named = sweep._named(["timm:test_vit?positions=size", "python:a.b:build", "x=c/backbone.pkl", "d/backbone.pkl"])
    assert named == {
        "test_vit": "timm:test_vit?positions=size",
        "build": "python:a.b:build",
        "x": "c/backbone.pkl",
        "d": "d/backbone.pkl",
    }


def test_options_of_the_configuration_stay(place: Path, tmp_path: Path) -> None:
    for configured, kept in (("timm:test_vit?drop_path_rate=0.1", True), ("timm:test_vit2", False)):
        keys = sweep._backbone(tmp_path, "vit", str(place / "vit.safetensors"), configured).keys
        assert ("MODEL.BACKBONE.NAME" not in keys) == kept


# --- doctor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_doctor(kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("loco_det.commands.doctor.examine", list)
    monkeypatch.setattr("loco_det.detection.engine_d2.installed", lambda: False)
    weights = ["--weights", str(place / "vit.safetensors")] if kind == "vit" else []

    def look(**changes: object) -> dict[str, dict[str, str]]:
        keys = [*pairs(**BACKBONES[kind] | changes), "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)]
        main(["doctor", "--json", "--config-file", VIT, *weights, *keys])
        return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}

    found = look()
    assert {check["status"] for name, check in found.items() if name != "schedule"} <= {"ok", "note"}, found
    assert (found["weights"]["status"], found["config"]["status"]) == ("ok", "ok")
    wrong = {"MODEL__PIXEL_MEAN": [1.0, 2, 3]} if kind == "vit" else {"MODEL__FPN__IN_FEATURES": ["res5"]}
    said = "was made with MODEL.PIXEL_MEAN" if kind == "vit" else "has no map 'res5'; its maps are res4"
    assert said in look(**wrong)["weights"]["found"]


# --- predict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_predict_finds_what_an_evaluation_finds_with_and_without_augmentation(
    kind: str, place: Path, tiny_data: Path, tmp_path: Path
) -> None:
    changes = BACKBONES[kind] | {"TEST__AUG__MIN_SIZES": (48, 64), "TEST__AUG__ENABLED": True}
    cfg = plain_cfg(**changes)
    model = build_model(cfg)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(tmp_path / "run"), str(tmp_path / "detector.pth")
    train_net(cfg, engine="torchvision", eval_only=True, fast=True)
    fixed = ["--config-file", VIT, "--weights", tmp_path / "detector.pth", "--engine", "torchvision", "--no-pictures"]
    for augmented, folder in ((True, "inference_TTA"), (False, "inference")):
        options = pairs(**changes | {"TEST__AUG__ENABLED": augmented})
        out = tmp_path / folder
        argv = ["predict", tiny_data / "tiny" / "val", *fixed, "--score-threshold", 0, "--batch-size", 1, "--out", out]
        assert main([str(one) for one in [*argv, "--opts", *options]]) == 0
        found, expected = (
            json.loads((path / "coco_instances_results.json").read_text()) for path in (out, tmp_path / "run" / folder)
        )
        assert len(found) > 10
        assert found == expected


def test_one_pass_is_exported(place: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["predict", tiny_data, "--config-file", VIT, "--weights", "x.pth", "--out", tmp_path, "--export-onnx", "y"]
    assert main([str(one) for one in [*argv, "--opts", *pairs(TEST__AUG__ENABLED=True)]]) == 2
    assert "--export-onnx exports one pass" in capsys.readouterr().err


EXPORTED = {
    "vit": (VIT, "timm:test_vit"),
    "patches of 14": (VIT, "timm:vit_small_patch14_dinov2?depth=2&embed_dim=24&num_heads=2&img_size=56&positions=timm"),
    "rotary": (VIT, "timm:vit_small_patch16_dinov3?depth=2&embed_dim=32&num_heads=2"),
    "convnext": (FPN, "timm:convnext_atto?depths=(1,1,1,1)&dims=(8,16,24,32)"),
    "module": (VIT, "python:own_module_of_a_test:build"),
}


@pytest.mark.parametrize("kind", list(EXPORTED))
def test_onnx_finds_the_same_objects(kind: str, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    base, name = EXPORTED[kind]
    torch.manual_seed(0)
    given = overrides(MODEL__BACKBONE__NAME=name, MODEL__BACKBONE__FREEZE_AT=5, MODEL__ROI_BOX_HEAD__CONV_DIM=16)
    model = build_model(load_config(get_cfg(), base, given)[0]).eval()
    for parameter in model.parameters():  # not the zeros of an initialisation
        parameter.data += 0.02 * torch.randn_like(parameter)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    differences = export_onnx(model, images[0], tmp_path / "model.onnx")
    assert max(differences.values()) < 1e-2
    found = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"image": images[1].numpy()})
    with torch.inference_mode():
        (expected,) = model.detect([{"image": images[1]}])
    assert len(found[0]) == len(expected) > 0
    np.testing.assert_allclose(found[0], expected.boxes.numpy(), atol=5e-2)


class Unknown(nn.Module):
    """An operation that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = nn.functional.avg_pool2d(x, 16).repeat(1, 4, 1, 1)
        return small * torch.special.bessel_j0(small)


def test_what_onnx_lacks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("loco_det.backbones.own.find", lambda name: Unknown())
    model = build_model(plain_cfg(MODEL__BACKBONE__NAME="python:any:thing")).eval()
    with pytest.raises(UserError, match=r"cannot be exported to ONNX \(.*bessel_j0.*\); predict with") as error:
        export_onnx(model, torch.zeros(3, 64, 64, dtype=torch.uint8), tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# --- freezing by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_freezing_by_hand(name: str, stages: int) -> None:
    """FREEZE_AT counts stages from the first: those have no gradient, all others have one."""
    base = VIT if name == "test_vit" else FPN
    changes = {"MODEL__BACKBONE__NAME": f"timm:{name}", "MODEL__BACKBONE__FREEZE_AT": stages, "MODEL__MASK_ON": False}
    cfg = load_config(get_cfg(), base, overrides(**changes, MODEL__ROI_BOX_HEAD__CONV_DIM=16))[0]
    torch.manual_seed(0)
    model = build_model(cfg).train()
    trunk = model.backbone.net if name == "test_vit" else model.backbone.bottom_up
    maps = model.backbone(torch.randn(2, 3, 64, 64))
    sum(map_.square().mean() for map_ in maps.values()).backward()
    graded = {n for n, parameter in trunk.model.named_parameters() if parameter.grad is not None}
    expected = {n for stage in trunk.stage_names[stages:] for n in trunk.parts[stage]}
    assert graded == expected
    assert expected
    assert {n for stage in trunk.stage_names[:stages] for n in trunk.parts[stage]}


@pytest.mark.parametrize("stages", [1, 4])
def test_a_module_is_frozen_as_a_whole_or_not_at_all(stages: int, place: Path) -> None:
    with pytest.raises(UserError, match=rf"FREEZE_AT {stages}: .*has no known stages to freeze; use 5 for all"):
        build_model(plain_cfg(**BACKBONES["module"], MODEL__BACKBONE__FREEZE_AT=stages))


# --- one sentence -----------------------------------------------------------------------------------------------


def test_a_resnet_is_no_transformer(place: Path, tmp_path: Path) -> None:
    for file in ("resnet.pth", "resnet.pkl"):
        with pytest.raises(UserError, match=r"holds a ResNet \(.*conv1\.weight\), and timm:test_vit is none; leave"):
            convert_timm(str(place / file), tmp_path / "out.safetensors", "timm:test_vit")
    both = {"student": torch.load(place / "vit.pth"), "teacher": torch.load(place / "resnet.pth")}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(UserError, match="holds several backbones; choose one: --branch"):
        convert_timm(str(tmp_path / "both.pth"), tmp_path / "out.safetensors", "timm:test_vit")
    convert_timm(str(tmp_path / "both.pth"), tmp_path / "out.safetensors", "timm:test_vit", branch="student:")
    cfg = tiny_cfg(tmp_path)
    resnet = build_model(cfg).state_dict()
    bare = {n.removeprefix("backbone.bottom_up."): t for n, t in resnet.items() if "bottom_up" in n}
    for name, content, said in (
        ("bare", bare, "is a backbone with a ResNet and MODEL.BACKBONE.NAME is timm:test_vit"),
        ("detector", resnet, "is a detector with a ResNet and MODEL.BACKBONE.NAME is timm:test_vit"),
    ):
        torch.save({"model": content}, tmp_path / f"{name}.pth")
        other = plain_cfg(**BACKBONES["vit"])
        other.defrost()
        other.MODEL.WEIGHTS = str(tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=said):
            load_weights(build_model(other), other)
    vit = build_model(plain_cfg(**BACKBONES["vit"])).state_dict()
    torch.save({"model": vit}, tmp_path / "vit.pth")
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"is a detector with no ResNet and MODEL\.BACKBONE\.NAME is build_resnet_fpn"):
        load_weights(build_model(cfg), cfg)


def test_a_module_takes_no_backbone_file(place: Path) -> None:
    cfg = plain_cfg(**BACKBONES["module"])
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(place / "vit.safetensors")
    with pytest.raises(UserError, match=r"which has weights of its own; leave MODEL\.WEIGHTS empty"):
        load_weights(build_model(cfg), cfg)


def test_wrong_stages_are_told_in_the_backbones_own_names(tmp_path: Path) -> None:
    given = overrides(MODEL__BACKBONE__NAME="timm:test_convnext", MODEL__FPN__IN_FEATURES=["stages.0", "res5"])
    with pytest.raises(UserError, match=r"and timm:test_convnext has res2 \(stride 4\), res3") as error:
        build_model(load_config(get_cfg(), FPN, given)[0])
    assert "RESNETS" not in str(error.value)
    with pytest.raises(UserError, match=r"resnet18 has .*res5 \(stride 32\).*\(MODEL\.RESNETS\.OUT_FEATURES"):
        build_model(tiny_cfg(tmp_path, MODEL__FPN__IN_FEATURES=["res2", "layer3"], **RESNET_18))


def test_weights_of_the_hub_without_a_network_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["convert", "timm:vit_tiny_patch16_224", str(tmp_path / "out.safetensors")]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "vit_tiny_patch16_224: its weights are not in the cache and cannot be fetched" in lines[0]
    assert "connect to the hub once" in lines[0]
    assert not (tmp_path / "out.safetensors").exists()


TWICE = {"iterations": 1, "train": "tiny_train", "test": "tiny_val", "device": "cpu"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": None}, "train None: give a data set by name or path, e.g. 'coco_2017_train'"),
        ({"test": ["tiny_val"]}, r"test \['tiny_val'\]: give a data set"),
        ({"settings": [1]}, r"settings \[1\]: give a dict of Detectron2's keys"),
        ({"settings": {1: 2}}, r"settings \{1: 2\}: give a dict"),
        ({"settings": {"SOLVER.BASE_RL": 1}}, "SOLVER.BASE_RL"),
        ({"protocol": None}, "protocol None: use one of frozen"),
    ],
)
def test_detection_from_python_is_refused_in_one_sentence(changes: dict[str, Any], said: str, tiny_data: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        loco_det.evaluate_detection("random:timm:test_vit", **TWICE | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"settings": [1]}, "has no option --settings"),
        ({"data": None}, "data None: give"),
        ({"protocol": None}, "protocol"),
        ({"limit": "many"}, "--limit"),
        ({"protocol": "knn", "k": "x"}, "--k"),
    ],
)
def test_a_probe_from_python_is_refused_in_one_sentence(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        loco_det.probe("random:resnet18-cifar", **{"data": tmp_path, **options})
    assert "\n" not in str(error.value)
