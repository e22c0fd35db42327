"""ShuffleNet v2-50 against its table and torchvision's blocks, from pretraining to probes, and it and PResNet-50 under
a detector of either engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import detection_cases as cases
import pytest
import torch
import torch.nn.functional as F
from convert_cases import randomised
from loco_cases import gradients, obvious_step, write_patches
from tiny_detection import tiny_cfg, write_tiny
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual

from loco_det.backbones.artifact import Stage, backbone_tensors, describe, load_backbone, save_backbone
from loco_det.backbones.names import to_detectron2, to_torchvision
from loco_det.backbones.networks import build_network
from loco_det.backbones.presnet import PResNet
from loco_det.backbones.shufflenet import ShuffleNet, shuffled
from loco_det.cli import main
from loco_det.convert import convert, read_backbone
from loco_det.core.errors import UserError
from loco_det.detection.fpn import build_backbone
from loco_det.detection.keys import check_supported, get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.detection.weights import load_weights
from pretrain.decoders import build_decoder
from pretrain.defaults import get_cfg as pretrain_cfg
from pretrain.loco import LocalTrainer, method_units, split_backbone
from pretrain.loss import nt_xent
from pretrain.train import pretrain

STAGES = ["res2", "res3", "res4", "res5"]
# The table of large models in ShuffleNet v2: units, channels and the side of the map at 224 pixels.
TABLE = {"res2": (3, 244, 56), "res3": (4, 488, 28), "res4": (6, 976, 14), "res5": (3, 1952, 7)}


# --- the network ------------------------------------------------------------------------------------------------


def test_costs_and_shapes_are_those_of_the_table() -> None:
    work: list[int] = []
    with torch.device("meta"):
        network = ShuffleNet()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            taps = module.kernel_size[0] ** 2 * module.in_channels // module.groups
            module.register_forward_hook(lambda m, _, out, taps=taps: work.append(out.numel() * taps))
    outputs = network(torch.empty(1, 3, 224, 224, device="meta"))
    for name, (units, channels, side) in TABLE.items():
        blocks = getattr(network, name)
        assert len(blocks) == units + (name == "res5")
        assert blocks[units - 1].conv3.out_channels * 2 == channels
        assert outputs[name].shape == (1, 2048 if name == "res5" else channels, side, side)
        assert network.strides[name] == 224 // side
        assert network.channels[name] == outputs[name].shape[1]
    assert (sum(work) + 2048 * 1000) / 1e9 == pytest.approx(2.3, abs=0.01)


def as_torchvision(blocks: nn.Sequential, stride: int) -> nn.Sequential:
    """The units of a stage as torchvision's, with the same tensors."""
    made = []
    for index, unit in enumerate(blocks):
        if not hasattr(unit, "conv2"):
            continue
        first, half = index == 0, unit.conv3.out_channels
        theirs = InvertedResidual(unit.conv1.in_channels if first else 2 * half, 2 * half, 2 if first else 1)
        pairs = [
            (unit.conv1, theirs.branch2[0:2]),
            (unit.conv2, theirs.branch2[3:5]),
            (unit.conv3, theirs.branch2[5:7]),
        ]
        if first:
            theirs.branch1[0].stride = theirs.branch2[3].stride = (stride, stride)
            pairs += [(unit.side1, theirs.branch1[0:2]), (unit.side2, theirs.branch1[2:4])]
        for ours, (conv, norm) in pairs:
            conv.weight.data = ours.weight.data
            norm.load_state_dict(ours.norm.state_dict())
        made.append(theirs)
    return nn.Sequential(*made)


@pytest.mark.parametrize(("stem", "size"), [("imagenet", (64, 96)), ("cifar", (16, 8))])
def test_every_stage_equals_torchvisions_blocks(stem: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = randomised(ShuffleNet(stem=stem, stem_channels=8)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        outputs = network(x)
        conv = network.stem.conv1
        h = F.relu(conv.norm(F.conv2d(x, conv.weight, stride=2 if stem == "imagenet" else 1, padding=1)))
        h = F.max_pool2d(h, 3, 2, 1) if stem == "imagenet" else h
        torch.testing.assert_close(outputs["stem"], h)
        for name in STAGES:
            blocks = getattr(network, name)
            h = as_torchvision(blocks, 1 if name == "res2" else 2).double().eval()(h)
            if name == "res5":
                h = F.relu(blocks[-1].conv1.norm(F.conv2d(h, blocks[-1].conv1.weight)))
            torch.testing.assert_close(outputs[name], h, rtol=1e-9, atol=1e-11)


def test_shuffling_interleaves_the_halves() -> None:
    x = torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2)
    assert torch.equal(shuffled(x), x[:, [0, 3, 1, 4, 2, 5]])


@pytest.mark.parametrize("width", [1, 8, 17, 64])
def test_any_width_has_all_blocks(width: int) -> None:
    with torch.device("meta"):
        network = build_network("shufflenetv2_50", width=width)
        outputs = network(torch.empty(1, 3, 64, 64, device="meta"))
    assert [len(getattr(network, name)) for name in STAGES] == [3, 4, 6, 4]
    assert {name: out.shape[1] for name, out in outputs.items()} == network.channels
    assert network.channels["res5"] == 2048 * width // 64


def test_every_tensor_has_a_name_in_torchvisions_style() -> None:
    with torch.device("meta"):
        names = list(ShuffleNet().state_dict())
    theirs = [to_torchvision(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [to_detectron2(name) for name in theirs] == names
    assert {"layer2.0.side1.weight", "layer2.0.sidebn2.running_var", "layer4.3.conv1.weight"} <= set(theirs)


# --- from pretraining to probes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["simclr", "gim", "loco"])
def test_a_local_step_equals_the_units_run_alone(method: str) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def build(recompute: str | None = None):
        torch.manual_seed(0)
        backbone = ShuffleNet(stem="cifar", stem_channels=4).double()
        stages, spans = split_backbone(backbone, method_units(method, STAGES), recompute)
        settings = {**pretrain_cfg().DECODER, "CONV_BLOCKS": 1, "HIDDEN_DIM": 8, "OUT_DIM": 4}
        decoders = nn.ModuleList(build_decoder(settings, backbone, stages[s.last].ends_in) for s in spans).double()
        return backbone, stages, spans, decoders, [lambda h, d=d: nt_xent(d(h), 0.2) for d in decoders]

    backbone, stages, spans, decoders, losses = build()
    expected = [*obvious_step(stages, spans, losses, x), *gradients(backbone, decoders)]
    for recompute in (None, "all"):
        backbone, stages, spans, decoders, losses = build(recompute)
        again = [k for k, stage in enumerate(stages) if stage.recompute]
        values = LocalTrainer([s.module for s in stages], spans, losses, recompute=again).step(x)
        for want, got in zip(expected, [*(v.item() for v in values), *gradients(backbone, decoders)], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patches(tmp_path_factory.mktemp("images"))


def pretrained(images: Path, out: Path) -> Path:
    cfg = pretrain_cfg()
    settings = {
        "BACKBONE.NAME": "shufflenetv2_50", "BACKBONE.STEM": "cifar", "BACKBONE.WIDTH": 8, "DECODER.HIDDEN_DIM": 16,
        "DECODER.CONV_BLOCKS": 1, "DATA.PATH": str(images / "train"), "DATA.IMAGE_SIZE": 16, "DATA.NUM_WORKERS": 0,
        "SOLVER.BATCH_SIZE": 8, "SOLVER.MAX_STEPS": 2, "LOG_PERIOD": 1, "DEVICE": "cpu", "OUTPUT_DIR": str(out),
    }  # fmt: skip
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    cfg.freeze()
    return pretrain(cfg)


def test_a_run_is_written_read_and_probed(images: Path, tmp_path: Path) -> None:
    artifact = pretrained(images, tmp_path)
    tensors, manifest = load_backbone(artifact)
    assert (manifest.architecture, manifest.stem, manifest.units[0]) == ("shufflenetv2_50", "cifar", ["res2", "res3"])
    assert manifest.stages["res5"] == Stage(256, 8)
    network, _ = read_backbone(artifact)
    assert isinstance(network, ShuffleNet)
    assert torch.equal(tensors["layer2.0.side2.weight"], network.res3[0].side2.weight)
    assert torch.equal(tensors["layer2.0.sidebn1.running_mean"], network.res3[0].side1.norm.running_mean)
    out = tmp_path / "p.json"
    argv = ["probe", str(artifact), "--data", str(images), "--json", str(out), "--workers", "0", "--no-cache"]
    assert main([*argv, "--quiet", "--protocol", "ridge"]) == 0
    found = json.loads(out.read_text())["stages"]
    assert {name: at["dimensions"] for name, at in found.items()} == {"stem": 8, "res2": 30, "res3": 60, "res4": 122,
                                                                      "res5": 256}  # fmt: skip
    with pytest.raises(UserError, match=r"is a ShuffleNet v2-50, .* with MODEL\.BACKBONE\.NAME shufflenetv2_50"):
        convert(artifact, tmp_path / "b.pkl")


# --- under a detector -------------------------------------------------------------------------------------------

UNDER_FPN = {
    "shufflenetv2_50": {"stages": STAGES, "make": ShuffleNet},
    "presnet50": {"stages": ["res2", "res3", "res5", "res7"], "make": PResNet},
}


def settings_of(name: str, freeze: int = 5, norm: str = "FrozenBN") -> dict[str, Any]:
    return {
        "MODEL__BACKBONE__NAME": name,
        "MODEL__BACKBONE__FREEZE_AT": freeze,
        "MODEL__FPN__IN_FEATURES": UNDER_FPN[name]["stages"],
        "MODEL__RESNETS__NORM": norm,
    }


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full-size backbone of each kind, with random statistics."""
    found = {}
    for name, facts in UNDER_FPN.items():
        torch.manual_seed(3)
        network = randomised(facts["make"]())
        found[name] = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        save_backbone(found[name], backbone_tensors(network), describe(network, stem="imagenet", method="loco"))
    return found


def by_matrix(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation by a matrix for each axis."""
    matrices = []
    for old, new in zip(x.shape[2:], size):
        matrix = torch.zeros(new, old, dtype=x.dtype)
        for i in range(new):
            at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
            matrix[i, int(at)] += 1 - (at - int(at))
            matrix[i, min(int(at) + 1, old - 1)] += at - int(at)
        matrices.append(matrix)
    return torch.einsum("ih,bchw,jw->bcij", matrices[0], x, matrices[1])


@pytest.mark.parametrize("name", UNDER_FPN)
def test_the_trunk_gives_the_networks_maps_at_strides_that_halve(
    name: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=artifacts[name], **settings_of(name))
    check_supported(cfg)
    model = build_model(cfg).eval()
    load_weights(model, cfg)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.backbone.bottom_up(x)
        whole = read_backbone(artifacts[name])[0](x)
    assert list(maps) == UNDER_FPN[name]["stages"]
    for level, (stage, map_) in enumerate(maps.items()):
        stride = 4 * 2**level
        assert model.backbone.bottom_up.strides[stage] == stride
        torch.testing.assert_close(map_, by_matrix(whole[stage], (64 // stride, 96 // stride)), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in model.backbone.bottom_up.parameters())


@pytest.mark.parametrize("name", UNDER_FPN)
@pytest.mark.parametrize("tuned", [False, True])
def test_a_detector_trains_on_it(
    name: str, tuned: bool, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_tiny(tmp_path)))
    chosen = settings_of(name, 2, "BN") if tuned else settings_of(name)
    cfg = tiny_cfg(tmp_path / "run", MODEL__WEIGHTS=artifacts[name], SOLVER__MAX_ITER=1, SOLVER__STEPS=(), **chosen)
    assert set(train_net(cfg, engine="torchvision")) == {"bbox", "segm"}
    after = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    before = {f"backbone.bottom_up.{to_detectron2(k)}": v for k, v in load_backbone(artifacts[name])[0].items()}
    changed = {k.split(".")[2] for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed == (set(UNDER_FPN[name]["make"](stem_channels=8).stage_names[2:]) if tuned else set())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone"},
            r"backbone of shufflenetv2_50 .* set it to shufflenetv2",
        ),
        (settings_of("presnet50"), r'made with MODEL\.BACKBONE\.NAME "shufflenetv2_50"'),
        ({"MODEL__FPN__IN_FEATURES": ["res2", "res9"]}, "must name stages of shufflenetv2_50: stem, res2"),
        ({"MODEL__FPN__IN_FEATURES": []}, "must name stages of shufflenetv2_50"),
        ({"MODEL__RESNETS__NORM": "GN"}, "32 groups"),
        ({"MODEL__RESNETS__RES5_DILATION": 2}, "is for ResNets"),
        ({"INPUT__FORMAT": "BGR"}, r'INPUT\.FORMAT "RGB" and the configuration has "BGR"'),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], said: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    whole = {**settings_of("shufflenetv2_50"), "MODEL__WEIGHTS": artifacts["shufflenetv2_50"], **changes}
    cfg = tiny_cfg(tmp_path, **whole)

    def load() -> None:
        check_supported(cfg)
        load_weights(build_model(cfg), cfg)

    with pytest.raises(UserError, match=said):
        load()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("presnet50", r"has no place in presnet50; set MODEL\.BACKBONE\.NAME to those"),
        (
            "build_resnet_fpn_backbone",
            r"has no place in the model's ResNet; set MODEL\.RESNETS\.DEPTH and NORM to those",
        ),
    ],
)
def test_a_tensor_without_a_place_names_the_keys_of_its_network(name: str, said: str, tmp_path: Path) -> None:
    torch.save({"res2.0.conv9.weight": torch.zeros(1)}, tmp_path / "other.pth")
    settings = settings_of(name) if name in UNDER_FPN else {}
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=tmp_path / "other.pth", **settings)
    with pytest.raises(UserError, match=said):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize("frozen", [-1, 0, 4, 5, 7])
def test_five_freezes_all_of_presnets_seven_stages(frozen: int) -> None:
    settings = {key.replace("__", "."): value for key, value in settings_of("presnet50", frozen).items()}
    trunk = build_backbone(cases.configure(get_cfg(), cases.FPN, settings)).bottom_up
    still = [s for s in trunk.stage_names if not any(p.requires_grad for p in getattr(trunk, s).parameters())]
    assert still == {0: [], -1: [], 4: ["stem", "res2", "res3", "res4"]}.get(frozen, list(trunk.stage_names))
    assert len(trunk.stage_names) == 7


def test_presnets_neighbouring_stages_are_too_near_for_a_pyramid() -> None:
    cfg = cases.configure(get_cfg(), cases.FPN, {"MODEL.BACKBONE.NAME": "presnet50"})
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    with pytest.raises(UserError, match=r"has strides \[4, 8, 8, 16\]"):
        build_backbone(cfg)


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNDER_FPN)
def test_both_engines_have_the_same_losses_gradients_and_detections(name: str) -> None:
    pytest.importorskip("detectron2")
    settings = {key.replace("__", "."): value for key, value in settings_of(name, 2, "BN").items()}
    cfg = cases.configure(get_cfg(), cases.FPN, settings)
    ours, theirs, our_losses, their_losses = cases.both_losses(cfg)
    for losses in (our_losses, their_losses):
        sum(losses.values()).backward()
    for (key, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), key
        assert one.grad is None or torch.equal(one.grad, two.grad), key
    with torch.no_grad():
        found = ours.eval()(cases.our_batch(train=False))
        expected = theirs.eval()(cases.detectron2_batch(train=False))
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.boxes, two["instances"].pred_boxes.tensor)
        assert torch.equal(one.scores, two["instances"].scores)
