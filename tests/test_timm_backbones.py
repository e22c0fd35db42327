"""Any backbone of timm: its maps are timm's own, its stages really follow each other, and what is frozen stays so."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from loco_det.backbones.timm_models import POSITIONS, TimmBackbone, family_positions, parse, resize_positions
from loco_det.core.errors import UserError

PLAIN = ("test_vit", "test_vit3", "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224")
HIERARCHICAL = (
    "test_convnext",
    "test_convnext2",
    "test_efficientnet",
    "test_resnet",
    "regnety_002",
    "pvt_v2_b0",
    "swin_s3_tiny_224",
)


def backbone(name: str, **options: object) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, **options).eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def both_ways(ours: TimmBackbone, name: str) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """timm's whole model with the same weights, our maps of an image, and what timm's modules gave for it."""
    whole = timm.create_model(name).eval()
    whole.load_state_dict(ours.model.state_dict(), strict=False)
    x = torch.randn(1, 3, *whole.pretrained_cfg["input_size"][1:])
    kept: dict[str, torch.Tensor] = {}
    for stage, module in ours.ends.items():
        hook = lambda _m, _i, out, stage=stage: kept.__setitem__(stage, out)  # noqa: E731
        whole.get_submodule(module).register_forward_hook(hook)
    with torch.no_grad():
        found = ours(x)
        whole.forward_features(x)
    return whole, found, kept


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_maps_are_timms_tokens(name: str) -> None:
    ours = backbone(name)
    whole, found, kept = both_ways(ours, name)
    assert ours.stage_names == ("stem", *found)
    assert len(found) == 4
    for stage, tokens in kept.items():
        tokens = whole.norm(tokens)[:, whole.num_prefix_tokens :]
        assert torch.equal(found[stage].flatten(2).transpose(1, 2), tokens)
        assert found[stage].shape[1] == ours.channels[stage]


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_a_hierarchical_maps_are_those_of_timms_modules(name: str) -> None:
    ours = backbone(name)
    _, found, kept = both_ways(ours, name)
    assert list(found)[-4:] == ["res2", "res3", "res4", "res5"]
    for stage, map_ in found.items():
        other = kept[stage] if kept[stage].shape == map_.shape else kept[stage].permute(0, 3, 1, 2)
        assert torch.equal(map_, other)
        assert map_.shape[1:] == (ours.channels[stage], *2 * (ours.image_size // ours.strides[stage],))


@pytest.mark.parametrize("name", [*PLAIN, *HIERARCHICAL])
def test_every_parameter_is_of_one_stage_and_a_stage_moves_no_map_before_it(name: str) -> None:
    ours = backbone(name, map_stride=16)
    names = [name for part in ours.parts.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in ours.model.named_parameters())
    assert list(ours.parts) == list(ours.stage_names)
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        before = ours(x)
    for number, stage in enumerate(ours.stage_names):
        changed = [p for n, p in ours.model.named_parameters() if n in ours.parts[stage]]
        kept = [p.detach().clone() for p in changed]
        assert changed, stage
        with torch.no_grad():
            for parameter in changed:
                parameter += 0.05 * torch.randn_like(parameter)
            after = ours(x)
            for parameter, value in zip(changed, kept):
                parameter.copy_(value)
        for other, map_ in after.items():
            same = torch.equal(map_, before[other])
            is_norm = ours.normed and stage == ours.stage_names[-1]  # the final normalisation is applied to every map
            assert same == (ours.stage_names.index(other) < number) or is_norm


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", (95, 130)), ("test_convnext", (96, 160)), ("regnety_002", (96, 160))]
)
def test_maps_of_any_size_have_the_stated_strides(name: str, size: tuple[int, int]) -> None:
    ours = backbone(name, map_stride=16)
    with torch.no_grad():
        found = ours(torch.randn(2, 3, *size))
    for stage, map_ in found.items():
        assert map_.shape[2:] == tuple(-(-side // ours.strides[stage]) for side in size)


def test_a_patch_of_14_gives_stride_16_by_resizing_the_image() -> None:
    ours = backbone("eva02_tiny_patch14_224", map_stride=16)
    own = backbone("eva02_tiny_patch14_224")
    x = torch.randn(1, 3, 128, 192)
    small = F.interpolate(x, size=(112, 168), mode="bilinear", align_corners=False, antialias=True)
    with torch.no_grad():
        found, expected = ours(x), own(small)
    assert ours.strides == dict.fromkeys(found, 16)
    assert own.strides == dict.fromkeys(found, 14)
    for stage, map_ in found.items():
        assert map_.shape[2:] == (8, 12)
        assert torch.equal(map_, expected[stage])


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "regnety_002"])
@pytest.mark.parametrize("stages", [0, 2, 5])
def test_what_is_frozen_has_no_gradient_and_stays_in_evaluation(name: str, stages: int) -> None:
    ours = backbone(name, drop_path_rate=0.5)
    ours.freeze(stages)
    ours.train()
    x = torch.randn(2, 3, 64, 64)
    buffers = {n: b.clone() for n, b in ours.named_buffers()}
    maps = ours(x)
    last = list(maps.values())[-1]
    assert last.requires_grad == (stages < 5)
    if stages < 5:
        last.sum().backward()
    frozen = {n for stage in ours.stage_names[:stages] for n in ours.parts[stage]}
    for n, parameter in ours.model.named_parameters():
        assert parameter.requires_grad == (n not in frozen)
        assert n not in frozen or parameter.grad is None
    for n, buffer in ours.named_buffers():
        owner = n.removeprefix("model.").rpartition(".")[0]
        if any(other.rpartition(".")[0] == owner for other in frozen):
            assert torch.equal(buffer, buffers[n])
    if stages == 5:
        again = ours(x)
        assert all(torch.equal(again[stage], maps[stage]) for stage in maps)  # no drop path, no batch statistics


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, torch's."""
    d, a = np.abs(distance), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def resized_slowly(table: np.ndarray, grid: tuple[int, int], ratios: tuple[float, float]) -> np.ndarray:
    """(h, w, C) -> (*grid, C): every sample by its sixteen neighbours; `ratios` are old pixels per new one."""
    out = np.zeros((*grid, table.shape[2]))
    for y in range(grid[0]):
        for x in range(grid[1]):
            sy, sx = ((i + 0.5) * ratio - 0.5 for i, ratio in zip((y, x), ratios))
            for dy in range(-1, 3):
                for dx in range(-1, 3):
                    iy, ix = int(np.floor(sy)) + dy, int(np.floor(sx)) + dx
                    weight = cubic(np.array(sy - iy)) * cubic(np.array(sx - ix))
                    clamped = table[np.clip(iy, 0, len(table) - 1), np.clip(ix, 0, table.shape[1] - 1)]
                    out[y, x] += weight * clamped
    return out


@pytest.mark.parametrize("how", ["size", "offset"])
def test_positions_are_resized_as_the_formula_says(how: str) -> None:
    table, old, grid = torch.randn(1, 5 * 5, 3), (5, 5), (8, 11)
    found = resize_positions(table, grid, old, how)[0].reshape(*grid, 3).numpy()
    added = 0.1 if how == "offset" else 0.0
    ratios = tuple(before / (new + added) for before, new in zip(old, grid))
    assert found == pytest.approx(resized_slowly(table[0].reshape(*old, 3).numpy(), grid, ratios), abs=1e-5)
    assert torch.equal(resize_positions(table, old, old, how), table)


def test_each_family_resizes_its_positions_in_its_own_way() -> None:
    assert family_positions("vit_small_patch14_dinov2.lvd142m") == "offset"
    assert family_positions("vit_small_patch14_reg4_dinov2.lvd142m") == "timm"
    assert family_positions("vit_small_patch16_224.dino") == "offset"
    assert family_positions("vit_base_patch16_224.mae") == "size"
    assert family_positions("vit_base_patch16_224.augreg_in21k") == "timm"
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        maps = {how: next(reversed(backbone("test_vit", positions=how)(x).values())) for how in POSITIONS}
        own = backbone("test_vit", positions="size")
        native = torch.randn(1, 3, *own.model.pretrained_cfg["input_size"][1:])
        same = [next(reversed(backbone("test_vit", positions=how)(native).values())) for how in POSITIONS]
    assert not torch.equal(maps["timm"], maps["size"])
    assert not torch.equal(maps["size"], maps["offset"])
    assert all(torch.allclose(map_, same[0], atol=1e-5) for map_ in same)  # nothing to resize


def test_chosen_maps() -> None:
    ours = backbone("test_vit", maps=["norm", "blocks.2", "norm(blocks.2)", "blocks.5"])
    assert list(ours.channels) == ["blocks.2", "norm(blocks.2)", "norm", "blocks.5"]
    x = torch.randn(1, 3, 64, 64)
    tokens: list[torch.Tensor] = []
    whole = timm.create_model("test_vit", dynamic_img_size=True).eval()
    whole.load_state_dict(ours.model.state_dict(), strict=False)
    for number in (2, 5):
        whole.blocks[number].register_forward_hook(lambda _m, _i, out: tokens.append(out))
    with torch.no_grad():
        whole.forward_features(x)
        expected = [tokens[0], whole.norm(tokens[0]), whole.norm(tokens[1]), tokens[1]]
        for map_, one in zip(ours(x).values(), expected):
            assert torch.equal(map_.flatten(2).transpose(1, 2), one[:, 1:])
    fewer = backbone("test_vit", maps=["blocks.2"])
    assert not any(name.startswith(("blocks.3", "norm.")) for name, _ in fewer.model.named_parameters())


def test_options_stand_behind_the_name() -> None:
    assert parse("timm:vit?drop_path_rate=0.1&img_size=(2,3)&positions=size") == (
        "vit",
        {"drop_path_rate": 0.1, "img_size": (2, 3), "positions": "size"},
    )
    with pytest.raises(UserError, match=r"'drop' is no KEY=VALUE; write e\.g\. timm:vit\?drop_path_rate=0\.1"):
        parse("timm:vit?drop")
    for key in ("name", "pretrained", "num_classes", "map_stride", "maps", "image_size"):
        with pytest.raises(UserError, match=rf"timm:vit\?{key}=3: {key} is no option behind the name; leave it out"):
            parse(f"timm:vit?{key}=3")
    chosen = backbone("test_vit", positions="size", drop_path_rate=0.1).architecture
    assert parse(chosen) == ("test_vit", {"drop_path_rate": 0.1, "positions": "size"})


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit_smal_patch16", {}, "has no model"),
        ("test_vit", {"maps": ["blocks.6"]}, "has no map 'blocks.6'; use norm"),
        ("mvitv2_tiny", {}, "which it lacks"),
        ("test_vit", {"positions": "bilinear"}, "timm, size, offset"),
        ("vit_small_patch16_dinov3", {"pos": 1}, "could not build it"),
    ],
)
def test_bad_names_and_options_are_one_sentence(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        TimmBackbone(name, **options)
    assert "\n" not in str(error.value)


def test_a_model_for_one_size_refuses_others() -> None:
    ours = backbone("test_vit_relpos")
    with torch.no_grad():
        assert next(reversed(ours(torch.zeros(1, 3, 160, 160)).values())).shape[2:] == (10, 10)
        with pytest.raises(UserError, match="takes images of 160 x 160 pixels only, and these are 96 x 96"):
            ours(torch.zeros(1, 3, 96, 96))
