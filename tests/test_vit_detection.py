"""Detectors on timm's backbones: the pyramid, what training changes, and weights that do not belong to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_detection import overrides

from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import LayerNorm, ResNet
from loco_det.convert.timm_models import convert_timm
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.feature_cache import use_cache
from loco_det.detection.keys import check_supported, get_cfg
from loco_det.detection.loop import frozen_hashes
from loco_det.detection.pyramid import SimpleFeaturePyramid
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.detection.weights import load_weights

HALF = [127.5, 127.5, 127.5]  # the pixels of timm's test models
CONFIGS = {"test_vit": "configs/base_rcnn_vit.yaml", "test_convnext": "configs/base_rcnn_fpn.yaml"}
EXACT = {"engine": "torchvision", "fast": False}


def tiny(output: Path, name: str, **changes: object):
    """A Mask R-CNN of a few kilobytes on timm's `name`."""
    changes = {
        "MODEL__BACKBONE__NAME": f"timm:{name}",
        "MODEL__BACKBONE__FREEZE_AT": 5,
        "MODEL__MASK_ON": True,
        "MODEL__PIXEL_MEAN": HALF,
        "MODEL__PIXEL_STD": HALF,
        "MODEL__ROI_BOX_HEAD__CONV_DIM": 16,
        "OUTPUT_DIR": output,
        **changes,
    }
    return load_config(get_cfg(), CONFIGS[name], overrides(**changes))[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted weights of both."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for name in CONFIGS:
        torch.manual_seed(0)
        torch.save(timm.create_model(name).state_dict(), folder / "in.pth")
        found[name] = folder / f"{name}.safetensors"
        convert_timm(str(folder / "in.pth"), found[name], f"timm:{name}")
    return found


class OneMap(torch.nn.Module):
    """A backbone of one stride: the image's means over squares."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.channels, self.strides = {"map": 8}, {"map": stride}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        small = F.avg_pool2d(x, self.strides["map"])
        return {"map": torch.cat([small, small.square(), small[:, :2]], dim=1)}


def test_the_pyramids_levels_by_hand() -> None:
    """Each level as loops over the transposed convolutions' taps, the norm and two plain convolutions say."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(OneMap(16), 4, "LN").double()
    for parameter in pyramid.parameters():
        parameter.data = torch.randn_like(parameter) * 0.5
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found = pyramid(images)
        x = pyramid.net(images)["map"]

        def upsampled(conv: torch.nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
            out = x.new_zeros(len(x), conv.out_channels, 2 * x.shape[2], 2 * x.shape[3])
            for dy in range(2):
                for dx in range(2):
                    tap = torch.einsum("bchw,co->bohw", x, conv.weight[:, :, dy, dx])
                    out[:, :, dy::2, dx::2] = tap + conv.bias[:, None, None]
            return out

        def normed(norm: LayerNorm, x: torch.Tensor) -> torch.Tensor:
            mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
            return (x - mean) / (variance + 1e-6) ** 0.5 * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

        def ended(layers: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
            for conv in layers[-2:]:
                x = normed(conv.norm, F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2))
            return x

        p2, p3 = pyramid.simfp_2, pyramid.simfp_3
        once = normed(p2[1], upsampled(p2[0], x))
        once = 0.5 * once * (1 + torch.erf(once / 2**0.5))
        expected = {
            "p2": ended(p2, upsampled(p2[3], once)),
            "p3": ended(p3, upsampled(p3[0], x)),
            "p4": ended(pyramid.simfp_4, x),
            "p5": ended(pyramid.simfp_5, F.max_pool2d(x, 2)),
        }
        expected["p6"] = expected["p5"][:, :, ::2, ::2]
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for level, map_ in expected.items():
        torch.testing.assert_close(found[level], map_, rtol=1e-9, atol=1e-11)
        assert map_.shape[2:] == tuple(-(-side // pyramid.strides[level]) for side in (64, 96))


def test_a_wrong_stride_is_refused() -> None:
    with pytest.raises(UserError, match=r"needs maps of stride 16, and its strides are \[14\]"):
        SimpleFeaturePyramid(OneMap(14), 4, "LN")


def test_the_fast_norm_is_the_exact_one_up_to_rounding() -> None:
    torch.manual_seed(0)
    norm, x = LayerNorm(12), torch.randn(2, 12, 5, 7) * 3 + 1
    norm.weight.data, norm.bias.data = torch.rand(12), torch.randn(12)
    exact = norm(x)
    assert torch.allclose(speed_up(norm)(x), exact, atol=1e-5)
    assert norm.fast


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True]}, r"DEFORM_ON_PER_STAGE .*is for ResNets"),
        ({"MODEL__RESNETS__RES5_DILATION": 2}, r"RES5_DILATION .*is for ResNets; leave it out for timm:test_vit"),
        ({"MODEL__ROI_HEADS__NAME": "Res5ROIHeads"}, r"whose head is a ResNet's res5; timm:test_vit has none"),
    ],
)
def test_what_only_a_resnet_can_be_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        check_supported(tiny(tmp_path, "test_vit", **changes))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_frozen_readout_changes_nothing_of_the_backbone(
    name: str, weights: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    cfg = tiny(tmp_path / "run", name, MODEL__WEIGHTS=weights[name], SOLVER__MAX_ITER=3)
    results = train_net(cfg, **EXACT)
    assert np.isfinite(results["bbox"]["AP"])
    assert set(results) == {"bbox", "segm"}
    start = build_model(cfg)
    load_weights(start, cfg)
    trained = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    before = start.state_dict()
    assert set(trained) == set(before)
    of_backbone = [key for key in before if ".model." in key]
    assert of_backbone
    assert all(torch.equal(before[key], trained[key]) for key in of_backbone)
    readout = [key for key in before if key not in of_backbone and key.endswith("weight")]
    assert any(not torch.equal(before[key], trained[key]) for key in readout)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_tuned_backbone_learns_above_what_is_frozen(
    name: str, weights: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    options = {
        "MODEL__BACKBONE__NAME": f"timm:{name}?drop_path_rate=0.1",
        "MODEL__BACKBONE__FREEZE_AT": 2,
        "SOLVER__MAX_ITER": 2,
    }
    cfg = tiny(tmp_path / "run", name, MODEL__WEIGHTS=weights[name], SOLVER__BASE_LR=0.1, **options)
    train_net(cfg, **EXACT)
    start = build_model(cfg)
    load_weights(start, cfg)
    trunk = start.backbone.net if name == "test_vit" else start.backbone.bottom_up
    trained = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    prefix = "backbone.net.model." if name == "test_vit" else "backbone.bottom_up.model."
    same = {n: torch.equal(p, trained[prefix + n]) for n, p in trunk.model.named_parameters()}
    frozen = {n for stage in trunk.stage_names[:2] for n in trunk.parts[stage]}
    assert all(same[n] for n in frozen)
    assert any(not same[n] for n in set(same) - frozen)


@pytest.mark.parametrize("frozen", [5, 0])
def test_statistics_of_a_frozen_batchnorm_are_held_to_it(frozen: int, tmp_path: Path) -> None:
    """timm's own BatchNorm stays in the frozen network, so the run's proof and the cache must know that it is still."""
    file = CONFIGS["test_convnext"]
    changes = {"MODEL__BACKBONE__NAME": "timm:test_efficientnet", "MODEL__BACKBONE__FREEZE_AT": frozen}
    model = build_model(load_config(get_cfg(), file, overrides(OUTPUT_DIR=tmp_path, **changes))[0])
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 5
    hashed = {name for name in frozen_hashes(model) if "running_" in name}
    assert hashed == ({f"{n}.{b}" for n in norms for b in ("running_mean", "running_var")} if frozen else set())
    if frozen:
        use_cache(model, get_cfg(), tmp_path / "cache")
    else:
        with pytest.raises(UserError, match=r"leaves .* to training"):
            use_cache(model, get_cfg(), tmp_path / "cache")


def test_cached_features_are_the_computed_ones(weights: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    cfg = tiny(tmp_path / "run", "test_vit", MODEL__WEIGHTS=weights["test_vit"], SOLVER__MAX_ITER=1)
    first = train_net(cfg, feature_cache=tmp_path / "cache", **EXACT)
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 6
    again = train_net(cfg, eval_only=True, resume=True, feature_cache=tmp_path / "cache", **EXACT)
    plain = train_net(cfg, eval_only=True, resume=True, **EXACT)
    assert str(first) == str(again) == str(plain)
    other = tiny(tmp_path / "b", "test_vit", MODEL__WEIGHTS="", SOLVER__MAX_ITER=1)
    train_net(other, feature_cache=tmp_path / "cache", **EXACT)
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 12


def test_weights_of_another_backbone_are_one_sentence(weights: dict[str, Path], tmp_path: Path) -> None:
    resnet = tmp_path / "resnet.safetensors"
    network = ResNet(18)
    save_backbone(resnet, backbone_tensors(network), describe(network, stem="imagenet", method="random"))

    def load(name: str, path: Path, **changes: object) -> None:
        cfg = tiny(tmp_path, name, MODEL__WEIGHTS=path, **changes)
        load_weights(build_model(cfg), cfg)

    with pytest.raises(UserError, match=r"is a backbone of resnet18 and MODEL\.BACKBONE\.NAME is timm:test_vit; set"):
        load("test_vit", resnet, MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53])
    with pytest.raises(UserError, match=r"was made with MODEL\.BACKBONE\.NAME \"timm:test_convnext\""):
        load("test_vit", weights["test_convnext"])
    with pytest.raises(UserError, match=r"was made with MODEL\.PIXEL_MEAN \[127\.5, 127\.5, 127\.5\]"):
        load("test_vit", weights["test_vit"], MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53])
    with pytest.raises(UserError, match=r"is build_resnet_fpn_backbone; set it to timm:test_vit"):
        load("test_vit", weights["test_vit"], MODEL__BACKBONE__NAME="build_resnet_fpn_backbone",
             MODEL__RESNETS__OUT_FEATURES=["res2", "res3", "res4", "res5"],
             MODEL__FPN__IN_FEATURES=["res2", "res3", "res4", "res5"], MODEL__FPN__NORM="")  # fmt: skip
    load("test_vit", weights["test_vit"], MODEL__FPN__IN_FEATURES=["blocks.2"])  # unused blocks and norm


def test_a_detector_remembers_its_norm_and_blocks(weights: dict[str, Path], tiny_data: Path, tmp_path: Path) -> None:
    """No shape shows them."""
    cfg = tiny(tmp_path / "run", "test_vit", MODEL__WEIGHTS=weights["test_vit"], SOLVER__MAX_ITER=1)
    train_net(cfg, **EXACT)
    final = tmp_path / "run" / "model_final.pth"
    other = tiny(tmp_path / "b", "test_vit", MODEL__WEIGHTS=final, MODEL__FPN__IN_FEATURES=["blocks.5"])
    with pytest.raises(UserError, match=r"was made with MODEL\.FPN\.IN_FEATURES \[\] and the configuration has"):
        load_weights(build_model(other), other)


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("norm", ["LN", "GN"])
def test_the_pyramid_is_detectron2s_bit_for_bit(norm: str) -> None:
    pytest.importorskip("detectron2")
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid as Theirs

    class Net(OneMap, Backbone):
        def output_shape(self) -> dict:
            return {"map": ShapeSpec(channels=128, stride=16)}

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"map": super().forward(x)["map"].repeat(1, 16, 1, 1)}

    net = Net(16)
    net.channels = {"map": 128}
    torch.manual_seed(0)
    theirs = Theirs(net, "map", 64, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm=norm)
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = SimpleFeaturePyramid(net, 64, norm)
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 96, 160)
    found, expected = ours(images), theirs(images)
    assert list(found) == list(expected)
    assert all(torch.equal(found[level], expected[level]) for level in expected)
    assert ours.strides == {name: spec.stride for name, spec in theirs.output_shape().items()}


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_detectron2s_engine_trains_the_same_detector(
    name: str, weights: dict[str, Path], tiny_data: Path, tmp_path: Path
) -> None:
    """The same module stands in its registry: the same names, and the same losses of a batch."""
    pytest.importorskip("detectron2")
    from loco_det.detection.engine_d2 import Detectron2Engine
    from loco_det.detection.engine_torchvision import TorchvisionEngine

    cfg = tiny(tmp_path / "run", name, MODEL__WEIGHTS=weights[name], SOLVER__MAX_ITER=2)
    ours, theirs = TorchvisionEngine().build_model(cfg), Detectron2Engine().build_model(cfg)
    names = [key for key in theirs.state_dict() if "anchor_generator" not in key and not key.startswith("pixel_")]
    assert sorted(names) == sorted(ours.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = ours.eval().backbone(x), theirs.eval().backbone(x)
    assert all(torch.equal(found[level], expected[level]) for level in found)
    results = train_net(cfg, engine="detectron2")
    assert set(results) == {"bbox", "segm"}
    assert np.isfinite(results["bbox"]["AP"])
