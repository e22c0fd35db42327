"""`convert --architecture timm:NAME`: files of every layout come over whole, proved, or are refused by one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from loco_det.backbones.artifact import load_backbone
from loco_det.backbones.timm_models import parse
from loco_det.cli import main
from loco_det.convert import plain_vit, read_backbone
from loco_det.convert.timm_models import convert_timm
from loco_det.core.errors import UserError

VIT = "test_vit"
TOKENS = 101  # of VIT: 10 x 10 patches and the cls token


def weights(name: str = VIT) -> dict[str, Tensor]:
    """timm's model with weights that no initialisation gives, so that a lost one shows."""
    torch.manual_seed(0)
    name, options = parse(name)
    state = timm.create_model(name, **options).state_dict()
    return {
        key: t if key.endswith("num_batches_tracked") else torch.rand_like(t) + 0.5 if "var" in key
        else t + 0.1 * torch.randn_like(t)
        for key, t in state.items()
    }  # fmt: skip


def converted(tmp_path: Path, content: object, name: str = VIT, **options: object):
    torch.save(content, tmp_path / "in.pth")
    return convert_timm(str(tmp_path / "in.pth"), tmp_path / "out.safetensors", f"timm:{name}", **options)


def dino(state: dict[str, Tensor]) -> object:
    body = {key: t for key, t in state.items() if not key.startswith("head")}
    student = {f"module.backbone.{key}": t * 2 for key, t in body.items()}
    teacher = {f"backbone.{key}": t for key, t in body.items()}
    return {"student": student, "teacher": {**teacher, "head.last_layer.weight_g": torch.ones(3)}, "epoch": 3}


def mae(state: dict[str, Tensor]) -> object:
    body = {key: t for key, t in state.items() if not key.startswith("head")}
    extra = {
        "mask_token": torch.zeros(1, 1, 64),
        "decoder_embed.weight": torch.ones(2, 64),
        "decoder_pred.bias": torch.ones(2),
    }
    return {"model": {**body, **extra, "decoder_blocks.0.norm1.weight": torch.ones(2)}}


def moco(state: dict[str, Tensor]) -> object:
    return {"state_dict": {f"module.base_encoder.{key}": t for key, t in state.items() if not key.startswith("head")}}


def bare(state: dict[str, Tensor]) -> object:
    return state


@pytest.mark.parametrize(("layout", "branch"), [(bare, None), (dino, "teacher:backbone."), (mae, None), (moco, None)])
def test_every_layout_of_a_vit_comes_over_whole(layout: Callable, branch: str | None, tmp_path: Path) -> None:
    state = weights()
    account = converted(tmp_path, layout(state), branch=branch)
    tensors, manifest = load_backbone(tmp_path / "out.safetensors")
    assert set(tensors) == {key for key in state if not key.startswith("head")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())
    assert manifest.architecture == "timm:test_vit"
    assert manifest.proof["model"].startswith("an independent vision transformer")
    assert manifest.proof["relative"] < 1e-12
    assert account.read == len(tensors) + sum(map(len, account.dropped.values()))


def test_dinov2s_own_file_with_registers_in_chunks(tmp_path: Path) -> None:
    """Its registers have no position, its blocks may be numbered in chunks; timm adds cls token and position."""
    name = "vit_small_patch14_reg4_dinov2"
    state = weights(name)
    original = {key: t for key, t in state.items() if key not in ("reg_token", "pos_embed", "cls_token")}
    cls_position = torch.randn(1, 1, 384)
    original |= {
        "register_tokens": state["reg_token"],
        "mask_token": torch.zeros(1, 384),
        "cls_token": state["cls_token"] - cls_position,
        "pos_embed": torch.cat([cls_position, state["pos_embed"]], dim=1),
    }
    converted(tmp_path, original, name)
    tensors, manifest = load_backbone(tmp_path / "out.safetensors")
    assert set(tensors) == set(state)
    assert all(torch.allclose(tensors[key], state[key], atol=1e-6) for key in state)
    assert manifest.proof["relative"] < 1e-6
    assert manifest.pixel_mean == pytest.approx((123.675, 116.28, 103.53))


PARALLEL = "vit_small_patch16_18x2_224?depth=2&embed_dim=48&num_heads=3&img_size=64"  # blocks without attn and mlp


@pytest.mark.parametrize(
    "name", ["test_convnext", "test_efficientnet", "regnety_002", "vit_small_patch16_dinov3", PARALLEL]
)
def test_other_families_come_over_whole(name: str, tmp_path: Path) -> None:
    state = weights(name)
    account = converted(tmp_path, state, name)
    tensors, manifest = load_backbone(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())
    lost = {key for key in state if not key.endswith("num_batches_tracked")} - set(tensors)
    assert lost <= {key for keys in account.dropped.values() for key in keys}
    assert manifest.proof["relative"] < 1e-9
    last = {"vit_small_patch16_dinov3": "blocks.9-11", PARALLEL: "blocks.1"}
    assert list(manifest.stages)[-1] == last.get(name, "res5")


def test_convnext_in_its_own_layout(tmp_path: Path) -> None:
    """Facebook's file: downsample_layers, pwconv1; the last norm is the classifier's."""
    name, renamed = "convnext_atto", {}
    state = weights(name)
    for key, tensor in state.items():
        key = (
            key.replace("stem.", "downsample_layers.0.").replace(".conv_dw.", ".dwconv.").replace(".mlp.fc", ".pwconv")
        )
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        parts = key.split(".")
        if parts[0] == "stages" and parts[2] == "downsample":
            key = f"downsample_layers.{parts[1]}.{'.'.join(parts[3:])}"
        elif parts[0] == "stages" and parts[2] == "blocks":
            key = ".".join([*parts[:2], *parts[3:]])
        renamed[key] = tensor.flatten(1) if "pwconv" in key and tensor.ndim == 4 else tensor
    converted(tmp_path, {"model": renamed}, name)
    tensors, _ = load_backbone(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())


def test_layer_scale_cannot_be_lost(tmp_path: Path) -> None:
    """DINOv2's weights in a ViT without LayerScale lose it without a word elsewhere (dinov2#65)."""
    state = weights() | {f"blocks.{i}.ls1.gamma": torch.full((64,), 1e-5) for i in range(6)}
    with pytest.raises(UserError, match=r"tensor 'blocks\.0\.ls1\.gamma' has no place in timm:test_vit"):
        converted(tmp_path, state)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: s.pop("blocks.3.norm1.weight"),
            r"no tensor for blocks\.3\.norm1\.weight of timm:test_vit \(1 in all",
        ),
        (lambda s: s.update({"cls_token": torch.ones(1, 1, 65)}), r"cls_token is \(1, 1, 65\) and timm:test_vit takes"),
        (lambda s: s.update({"adapter.weight": torch.ones(2)}), r"'adapter\.weight' has no place .*--drop 'adapter"),
        (lambda s: s.update({"norm.bias": torch.full((64,), torch.nan)}), r"norm\.bias has values that are not finite"),
        (lambda s: s.update({"pos_embed": torch.ones(1, 197, 64)}), r"pos_embed"),
        (lambda s: s.update({"norm.bias": torch.ones(64) * 1j}), r"norm\.bias is torch\.complex64"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("patch_embed")], r"--branch PREFIX"),
        (lambda s: s.update({f"b.{k}": t for k, t in list(s.items())}), r"holds several backbones.*--branch"),
    ],
)
def test_what_does_not_fit_is_one_sentence(change: Callable, said: str, tmp_path: Path) -> None:
    state = weights()
    change(state)
    with pytest.raises(UserError, match=said) as error:
        converted(tmp_path, state)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_wrappers_put_into_names_is_no_part_of_them(wrapper: str, tmp_path: Path) -> None:
    state = weights()
    inside = {name.replace(".attn.", f".{wrapper}.attn."): tensor for name, tensor in state.items()}
    assert inside.keys() != state.keys()
    converted(tmp_path, {"model": {f"{wrapper}.{name}": tensor for name, tensor in inside.items()}})
    tensors, _ = load_backbone(tmp_path / "out.safetensors")
    assert set(tensors) == {key for key in state if not key.startswith("head")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())


def test_no_file_of_the_user_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    save_file({k: t.contiguous() for k, t in weights().items()}, mine)
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"mine\.safetensors: is the input too; give the output another name"):
        convert_timm(str(mine), mine, f"timm:{VIT}")
    assert mine.read_bytes() == before
    detector = tmp_path / "detector.yaml"
    detector.write_text("SOLVER: {MAX_ITER: 6}\n")
    with pytest.raises(UserError, match=r"detector\.yaml: is in the way of the YAML keys of detector\.safetensors"):
        convert_timm(str(mine), tmp_path / "detector.safetensors", f"timm:{VIT}")
    assert detector.read_text() == "SOLVER: {MAX_ITER: 6}\n"
    assert not (tmp_path / "detector.safetensors").exists()
    for _ in range(2):  # its own YAML may be replaced
        convert_timm(str(mine), tmp_path / "out.safetensors", f"timm:{VIT}")


def test_chosen_positions_stand_in_the_manifest_and_the_keys(tmp_path: Path) -> None:
    converted(tmp_path, weights(), f"{VIT}?positions=size")
    assert load_backbone(tmp_path / "out.safetensors")[1].architecture == f"timm:{VIT}?positions=size"
    assert f'NAME: "timm:{VIT}?positions=size"' in (tmp_path / "out.yaml").read_text()
    assert read_backbone(tmp_path / "out.safetensors")[0].positions == "size"


def test_dropped_on_purpose_stands_in_the_manifest(tmp_path: Path) -> None:
    converted(tmp_path, weights() | {"adapter.weight": torch.ones(2)}, drop=["adapter*"])
    assert load_backbone(tmp_path / "out.safetensors")[1].dropped == {"as asked by --drop adapter*": ["adapter.weight"]}


@pytest.mark.parametrize("pattern", ["blocks.*", "nothing*"])
def test_a_pattern_that_drops_nothing_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--drop .* drops nothing"):
        converted(tmp_path, weights(), drop=[pattern])


def test_the_proof_finds_a_lost_register_and_another_number_of_heads() -> None:
    state = {k: t.double() for k, t in weights().items() if not k.startswith("head")}
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64)
    right = plain_vit.forward(state, x, heads=2, eps=1e-6)
    assert right.shape == (1, 64, 10, 10)
    assert not torch.allclose(right, plain_vit.forward(state, x, heads=4, eps=1e-6))
    without = {k: t for k, t in state.items() if k != "cls_token"} | {"pos_embed": state["pos_embed"][:, 1:]}
    assert not torch.allclose(right, plain_vit.forward(without, x, heads=2, eps=1e-6))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({k: t.contiguous() for k, t in weights().items()}, tmp_path / "vit.safetensors")
    out = tmp_path / "out.safetensors"
    argv = ["convert", str(tmp_path / "vit.safetensors"), str(out), "--architecture", "timm:test_vit", "--json"]
    assert main(argv) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["written"] == [str(out), str(out.with_suffix(".yaml"))]
    assert facts["dropped"] == {"classifier": ["head.bias", "head.weight"]}
    assert 'NAME: "timm:test_vit"' in out.with_suffix(".yaml").read_text()
    assert main(["convert", str(out), str(tmp_path / "again.safetensors"), "--architecture", "timm:test_vit"]) == 2
    assert "give it as MODEL.WEIGHTS" in capsys.readouterr().err
    assert (
        main(["convert", str(tmp_path / "vit.safetensors"), str(tmp_path / "o.pkl"), "--architecture", "timm:test_vit"])
        == 2
    )
    assert ".safetensors" in capsys.readouterr().err
