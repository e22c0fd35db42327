"""Hierarchical backbones under a detector: windows on any image size, and the norms behind their maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_detection import overrides
from torch import Tensor, nn

from loco_det.backbones.timm_models import TimmBackbone, parse
from loco_det.convert.hierarchical import swin, swin_names
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.feature_cache import use_cache
from loco_det.detection.fpn import FPN
from loco_det.detection.keys import get_cfg
from loco_det.detection.loop import frozen_hashes
from loco_det.detection.rcnn import build_model

CONVNEXT = "convnext_atto?depths=(1,1,1,1)&dims=(8,16,24,32)"
SWIN = "swin_tiny_patch4_window7_224?img_size=96&window_size=3&depths=(2,2,1,2)&embed_dim=24&num_heads=(1,2,4,8)"
SWIN2 = SWIN.replace("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
EPS = {CONVNEXT: 1e-6, SWIN: 1e-5, SWIN2: 1e-5}
BASE = "configs/base_rcnn_fpn.yaml"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def spread(model: nn.Module) -> nn.Module:
    """Weights that no initialisation gives."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def detector(name: str, **changes: object) -> nn.Module:
    given = {"MODEL__BACKBONE__NAME": f"timm:{name}", "MODEL__BACKBONE__FREEZE_AT": 5, "MODEL__MASK_ON": False}
    return build_model(load_config(get_cfg(), BASE, overrides(**{**given, **changes}))[0])


# --- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", [SWIN, SWIN2])
@pytest.mark.parametrize("size", [(96, 96), (80, 112), (128, 224), (100, 150)])
def test_windows_of_any_size_are_those_of_swins_code(member: str, size: tuple[int, int]) -> None:
    """An independent Swin pads, then shifts, in every odd block whose map is larger than a window."""
    name, options = parse(member)
    ours = spread(TimmBackbone(name, **options)).eval().double()
    x = torch.randn(1, 3, *(-(-side // 4) * 4 for side in size), dtype=torch.float64)
    tensors = {key: tensor for key, tensor in ours.model.state_dict().items() if not key.startswith("norm.")}
    with torch.no_grad():
        expected = swin(swin_names(tensors), x, window=3)
        torch.testing.assert_close(ours(x)["res5"], expected, rtol=1e-5, atol=1e-6)


def test_timms_own_windows_join_the_borders() -> None:
    """What is mended: in timm a change of the upper border moves the lower one, which is far away."""
    name, options = parse(SWIN)
    options |= {"depths": (2, 1, 1, 1)}

    def moved(model: TimmBackbone) -> Tensor:
        x = torch.randn(1, 3, 116, 116, generator=torch.Generator().manual_seed(1))
        other = x.clone()
        other[:, :, :4] += 1  # the first row of patches
        with torch.no_grad():
            return (model(other)["res2"] - model(x)["res2"]).abs().amax((0, 1, 3))

    ours = spread(TimmBackbone(name, **options)).eval()
    rows = moved(ours)
    assert len(rows) == 29
    assert (rows[:5] > 0).any()
    assert (rows[6:] == 0).all()
    for block in ours.model.layers[0].blocks:
        del block._attn
    assert (moved(ours)[20:] > 0).any()


# --- norms ------------------------------------------------------------------------------------------------------


def normed(map_: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the channels, pixel by pixel."""
    out = torch.empty_like(map_)
    for index in range(map_.shape[0]):
        for y in range(map_.shape[2]):
            for x in range(map_.shape[3]):
                pixel = map_[index, :, y, x].double()
                mean = pixel.sum() / len(pixel)
                variance = ((pixel - mean) ** 2).sum() / len(pixel)
                out[index, :, y, x] = ((pixel - mean) / (variance + eps) ** 0.5 * weight + bias).float()
    return out


class Given(nn.Module):
    """A backbone of these maps."""

    level_norm_eps = None

    def __init__(self, like: nn.Module, maps: dict[str, Tensor]) -> None:
        super().__init__()
        self.channels, self.strides, self.maps = like.channels, like.strides, maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.maps


@pytest.mark.parametrize("member", list(EPS))
@pytest.mark.parametrize("fast", [False, True])
def test_each_map_is_normalised_as_in_the_authors_code(member: str, fast: bool) -> None:
    pyramid = spread(detector(member).backbone).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        maps = {name: map_ * 1e-2 for name, map_ in pyramid.bottom_up(x).items()}  # so that epsilon shows
        eps = EPS[member]
        expected = {}
        for name, level in zip(maps, (2, 3, 4, 5)):
            norm = getattr(pyramid, f"fpn_norm{level}")
            assert norm.eps == eps
            expected[name] = normed(maps[name], norm.weight, norm.bias, eps)
        plain = FPN(Given(pyramid.bottom_up, expected), list(maps), 16, "", False)
        state = {name: t for name, t in pyramid.state_dict().items() if name.startswith(("fpn_lateral", "fpn_output"))}
        plain.load_state_dict(state)
        wanted = plain(x)
        pyramid.bottom_up.forward = lambda x: maps
        found = speed_up(pyramid, fast)(x)
    for level, map_ in wanted.items():
        torch.testing.assert_close(found[level], map_, rtol=1e-4, atol=1e-4)


def test_which_have_norms_and_how_to_switch() -> None:
    def norms(member: str) -> list[str]:
        names = {name.partition(".")[0] for name, _ in detector(member).backbone.named_parameters()}
        return sorted(name for name in names if name.startswith("fpn_norm"))

    every = [f"fpn_norm{level}" for level in (2, 3, 4, 5)]
    assert norms(CONVNEXT) == norms(SWIN) == norms("regnety_002?level_norm=True") == every
    assert norms("regnety_002") == norms(f"{CONVNEXT}&level_norm=False") == []
    with pytest.raises(UserError, match="level_norm is for hierarchical models; leave it out"):
        TimmBackbone("test_vit", level_norm=True)
    with pytest.raises(UserError, match="level_norm is True or False, not 3"):
        TimmBackbone("test_convnext", level_norm=3)


@pytest.mark.parametrize("frozen", [0, 5])
def test_norms_are_trained_whatever_is_frozen_and_stand_behind_the_cache(frozen: int, tmp_path: Path) -> None:
    model = detector(CONVNEXT, MODEL__BACKBONE__FREEZE_AT=frozen).train()
    sum(map_.square().mean() for map_ in model.backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    graded = {name for name, parameter in model.backbone.named_parameters() if parameter.grad is not None}
    assert {f"fpn_norm{level}.{part}" for level in (2, 3, 4, 5) for part in ("weight", "bias")} <= graded
    assert any(name.startswith("bottom_up.") for name in graded) == (not frozen)
    assert not any("fpn_norm" in name for name in frozen_hashes(model))
    if frozen:
        use_cache(model, get_cfg(), tmp_path)
        x = torch.randn(1, 3, 64, 64)
        model.eval()
        with torch.no_grad():
            first = model.backbone(x)["p2"]
            model.backbone.fpn_norm2.weight += 1
            assert not torch.allclose(model.backbone(x)["p2"], first)


@pytest.mark.detectron2
@pytest.mark.parametrize("size", [(128, 160), (160, 224)])
def test_maps_and_norms_are_detectron2s_swin(size: tuple[int, int]) -> None:
    pytest.importorskip("detectron2")
    import sys
    import types

    import timm.layers

    if "timm.models.layers" not in sys.modules:  # the name that Detectron2's file imports from
        layers = types.ModuleType("timm.models.layers")
        layers.DropPath, layers.to_2tuple = timm.layers.DropPath, timm.layers.to_2tuple
        layers.trunc_normal_, layers.Mlp = timm.layers.trunc_normal_, timm.layers.Mlp
        sys.modules["timm.models.layers"] = layers
    from detectron2.modeling.backbone.swin import SwinTransformer

    _, options = parse(SWIN)
    pyramid = spread(detector(SWIN).backbone).eval()
    shape = {key: options[key] for key in ("window_size", "embed_dim", "depths", "num_heads")}
    theirs = SwinTransformer(**shape, patch_size=4, drop_path_rate=0.0).eval()
    state = {}
    for key, tensor in pyramid.bottom_up.model.state_dict().items():
        place = key.split(".")
        if place[2:3] == ["downsample"]:
            place[1] = str(int(place[1]) - 1)
        state[".".join(place)] = tensor
    for i in range(4):
        norm = getattr(pyramid, f"fpn_norm{i + 2}")
        state |= {f"norm{i}.weight": norm.weight, f"norm{i}.bias": norm.bias}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("relative_position_index" in key for key in missing)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, maps = theirs(x), pyramid.bottom_up(x)
        for i, (stage, map_) in enumerate(maps.items()):
            found = getattr(pyramid, f"fpn_norm{i + 2}")(map_)
            torch.testing.assert_close(found, expected[f"p{i}"], rtol=1e-4, atol=1e-4, msg=stage)
