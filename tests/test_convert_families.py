"""Checkpoints in their authors' own layouts: recognised, every tensor accounted for, proved independently of timm.

Each layout is written here from timm's tensors by the inverse of what the authors' code says, never by timm's filters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from loco_det.backbones.artifact import load_backbone
from loco_det.backbones.timm_models import parse
from loco_det.convert import hierarchical, plain_vit
from loco_det.convert.timm_models import convert_timm
from loco_det.core.errors import UserError

State = dict[str, Tensor]
SMALL = "depth=2&embed_dim=48&num_heads=3"
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CLIPS = ((122.771, 116.746, 104.094), (68.501, 66.632, 70.323))
HALF = ((127.5,) * 3, (127.5,) * 3)


def weights(member: str) -> State:
    """timm's model with weights that no initialisation gives, so that a lost one shows."""
    torch.manual_seed(0)
    name, options = parse(member)
    state = timm.create_model(name, **options).state_dict()
    return {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in state.items()}


def renamed(state: State, *swaps: tuple[str, str]) -> State:
    result = {}
    for name, tensor in state.items():
        for pattern, to in swaps:
            name = re.sub(pattern, to, name)
        result[name] = tensor
    return result


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith(("head", "fc_norm"))}


def clips_tower(state: State) -> State:
    """A vision tower as OpenAI's code and open_clip name it."""
    tower = renamed(
        body(state),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
        (r"^norm_pre\.", "ln_pre."),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.(\d+)\.norm", r"transformer.resblocks.\1.ln_"),
        (r"^blocks\.", "transformer.resblocks."),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj\.", "attn.out_proj."),
        (r"mlp\.fc1\.", "mlp.c_fc."),
        (r"mlp\.fc2\.", "mlp.c_proj."),
    )
    tower["class_embedding"] = tower["class_embedding"].flatten()
    tower["positional_embedding"] = tower["positional_embedding"][0]
    return {**prefixed(tower, "visual."), "visual.proj": torch.ones(48, 8)}


TEXT = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "token_embedding.weight": torch.ones(9, 4)}
TEXT |= {"positional_embedding": torch.ones(7, 4), "ln_final.bias": torch.ones(4), "text_projection": torch.ones(4, 8)}
TEXT |= {"logit_scale": torch.tensor(4.6)}


def openai(state: State) -> object:
    sizes = {name: torch.tensor(value) for name, value in (("input_resolution", 64), ("context_length", 7))}
    return {**clips_tower(state), **TEXT, **sizes, "vocab_size": torch.tensor(9)}


def open_clip(state: State) -> object:
    return {"epoch": 3, "state_dict": prefixed({**clips_tower(state), **TEXT}, "module.")}


def siglip(state: State) -> object:
    """open_clip's file: timm's tower as a trunk, pooled by attention."""
    text = {"text.token_embedding.weight": torch.ones(9, 4), "logit_bias": torch.tensor(1.0)}
    return {**prefixed(state, "visual.trunk."), **text}


def ibot(state: State) -> object:
    extra = {"head.mlp.0.weight": torch.ones(3), "backbone.masked_embed": torch.ones(1, 48)}
    teacher = prefixed(body(state), "backbone.") | extra
    return {"teacher": prefixed(teacher, "module."), "epoch": 3}


def dinov2(state: State) -> object:
    return {**body(state), "mask_token": torch.zeros(1, 48)}


def dinov3(state: State) -> object:
    """Meta's file: masked biases of the keys, storage tokens, periods in bfloat16 as stored there."""
    layers = renamed(
        body(state), (r"gamma_([12])$", r"ls\1.gamma"), (r"^reg_token$", "storage_tokens"), (r"[qv]_bias$", "")
    )
    layers = {name: tensor for name, tensor in layers.items() if not name.endswith("attn.")}
    periods = 100 ** (torch.arange(4) / 4)  # of 16 channels a head
    extra = {"rope_embed.periods": periods.bfloat16().float(), "mask_token": torch.zeros(1, 48)}
    extra |= {"local_cls_norm.weight": torch.ones(48)}
    for block in range(2):
        name = f"blocks.{block}.attn."
        q, v = (state.get(f"{name}{part}_bias", torch.zeros(48)) for part in "qv")
        extra[f"{name}qkv.bias"] = torch.cat([q, torch.full((48,), 5.0), v])  # 5: masked, so without effect
        extra[f"{name}qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(48)
    return {**layers, **extra}


def convnext(state: State) -> object:
    layers = renamed(
        state,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc", ".pwconv"),
        (r"\.mlp\.grn\.weight$", ".grn.gamma"),
        (r"\.mlp\.grn\.bias$", ".grn.beta"),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
    for name, tensor in layers.items():
        if ".grn." in name:
            layers[name] = tensor.view(1, 1, 1, -1)
        elif "pwconv" in name and tensor.ndim == 4:
            layers[name] = tensor.flatten(1)
    return {"model": layers}


def fcmae(state: State) -> object:
    """Without norm and classifier."""
    return {"model": {n: t for n, t in convnext(state)["model"].items() if not n.startswith(("norm.", "head."))}}


def siglip_for_jax(state: State) -> dict[str, np.ndarray]:
    """big_vision's: both towers in one archive, heads a dimension of their own, pooled by attention."""
    body = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "MAPHead_0/probe": torch.ones(1, 1, 48),
        "MAPHead_0/MultiHeadDotProductAttention_0/query/kernel": torch.ones(48, 3, 16),
    }
    for i in range(2):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for place in (0, 1):
            body[f"{theirs}/LayerNorm_{place}/scale"] = state[f"{ours}.norm{place + 1}.weight"]
            body[f"{theirs}/LayerNorm_{place}/bias"] = state[f"{ours}.norm{place + 1}.bias"]
            body[f"{theirs}/MlpBlock_0/Dense_{place}/kernel"] = state[f"{ours}.mlp.fc{place + 1}.weight"].T
            body[f"{theirs}/MlpBlock_0/Dense_{place}/bias"] = state[f"{ours}.mlp.fc{place + 1}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_0"
        for name, weight, bias in zip(
            ("query", "key", "value"),
            state[f"{ours}.attn.qkv.weight"].split(48),
            state[f"{ours}.attn.qkv.bias"].split(48),
        ):
            by_head = [rows.T for rows in weight.split(16)]  # (inputs, channels of a head)
            body[f"{attention}/{name}/kernel"] = torch.stack(by_head, dim=1)
            body[f"{attention}/{name}/bias"] = torch.stack(bias.split(16))
        columns = state[f"{ours}.attn.proj.weight"].split(16, dim=1)
        body[f"{attention}/out/kernel"] = torch.stack([part.T for part in columns])
        body[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
    text = {"params/txt/Embed_0/embedding": torch.ones(9, 4), "params/t": torch.tensor(2.3), "params/b": torch.ones(1)}
    return {name: tensor.numpy() for name, tensor in {**prefixed(body, "params/img/"), **text}.items()}


def scanned(state: State) -> dict[str, np.ndarray]:
    """The same with all blocks in one array, as newer models of big_vision keep them."""
    content = siglip_for_jax(state)
    first = "params/img/Transformer/encoderblock_0/"
    for name in [name for name in content if name.startswith(first)]:
        rest = name.removeprefix(first)
        both = [content.pop(f"params/img/Transformer/encoderblock_{i}/{rest}") for i in range(2)]
        content[f"params/img/Transformer/encoderblock/{rest}"] = np.stack(both)
    return content


def sparse(state: State) -> object:
    """FCMAE's checkpoint of pretraining: MinkowskiEngine's kernels, with the decoder."""
    layers = {}
    for name, tensor in fcmae(state)["model"].items():
        is_stem = name.startswith("downsample_layers.0.")
        if name.endswith("weight") and tensor.ndim == 4 and not is_stem:
            places = range(tensor.shape[-1])
            name = name.replace("weight", "kernel")  # rows run fastest
            by_place = [tensor[:, :, row, column].T for column in places for row in places]
            tensor = torch.stack([part[0] if ".dwconv." in name else part for part in by_place])
        elif (name.endswith("bias") and ".dwconv." in name) or re.fullmatch(r"downsample_layers\.[1-3]\.1\.bias", name):
            tensor = tensor[None]
        elif ".grn." in name:
            tensor = tensor.reshape(1, -1)
        if not is_stem:
            name = re.sub(r"(pwconv\d)\.", r"\1.linear.", name)
            name = re.sub(r"(\.norm|downsample_layers\.\d\.0)\.", r"\1.ln.", name)
        layers[f"encoder.{name}"] = tensor
    extra = {"mask_token": torch.zeros(1, 8, 1, 1), "proj.weight": torch.ones(8, 32, 1, 1), "proj.bias": torch.ones(8)}
    extra |= {"decoder.0.dwconv.weight": torch.ones(8, 1, 7, 7), "pred.weight": torch.ones(4, 8, 1, 1)}
    return {"model": layers | extra, "epoch": 3}


def swin(state: State) -> object:
    """Microsoft's file: a stage's downsampling is at its end, and tables are stored."""
    layers = {
        re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name): tensor
        for name, tensor in renamed(state, (r"^head\.fc\.", "head.")).items()
    }
    for stage in range(4):
        layers[f"layers.{stage}.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    return {"model": layers | {"layers.0.blocks.1.attn_mask": torch.zeros(9, 4, 4)}, "epoch": 300}


DINOV3 = f"vit_small_patch16_dinov3?{SMALL}&img_size=64"
DINOV3_BIASED = f"vit_small_patch16_dinov3_qkvb?{SMALL}&img_size=64"
SIGLIP = f"vit_base_patch16_siglip_224?{SMALL}&img_size=64&act_layer=gelu_tanh"
SWIN = "swin_tiny_patch4_window7_224?img_size=96&window_size=3&depths=(2,2,1,1)&embed_dim=24&num_heads=(1,2,4,8)"
SWIN2 = "swinv2_tiny_window8_256?img_size=96&window_size=3&depths=(2,2,1,1)&embed_dim=24&num_heads=(1,2,4,8)"
LAYOUTS: dict[str, tuple[str, Callable[[State], object], str | None, tuple, str]] = {
    # title: member, layout, branch, pixels, what the proof compares with
    "CLIP of OpenAI": (f"vit_base_patch16_clip_quickgelu_224?{SMALL}&img_size=64", openai, None, CLIPS, "vision"),
    "CLIP of open_clip": (f"vit_base_patch16_clip_224?{SMALL}&img_size=64", open_clip, None, CLIPS, "vision"),
    "SigLIP of open_clip": (f"vit_base_patch16_siglip_224?{SMALL}&img_size=64", siglip, None, HALF, "vision"),
    "iBOT": (f"vit_small_patch16_224.dino?{SMALL}&img_size=64", ibot, None, IMAGENET, "vision"),
    "DINOv2": (f"vit_small_patch14_dinov2?{SMALL}&img_size=56", dinov2, None, IMAGENET, "vision"),
    "DINOv3": (DINOV3, dinov3, None, IMAGENET, "vision"),
    "DINOv3 with biases": (DINOV3_BIASED, dinov3, None, IMAGENET, "vision"),
    "ConvNeXt": ("convnext_tiny?depths=(1,2,1,1)&dims=(8,16,24,32)", convnext, None, IMAGENET, "ConvNeXt"),
    "ConvNeXt v2": ("convnextv2_atto?depths=(1,2,1,1)&dims=(8,16,24,32)", convnext, None, IMAGENET, "ConvNeXt"),
    "FCMAE": ("convnextv2_atto.fcmae?depths=(1,2,1,1)&dims=(8,16,24,32)", fcmae, None, IMAGENET, "ConvNeXt"),
    "FCMAE in pretraining": (
        "convnextv2_atto.fcmae?depths=(1,2,1,1)&dims=(8,16,24,32)", sparse, None, IMAGENET, "ConvNeXt"
    ),
    "SigLIP of big_vision": (SIGLIP, siglip_for_jax, None, HALF, "vision"),
    "SigLIP of big_vision, scanned": (SIGLIP, scanned, None, HALF, "vision"),
    "Swin": (SWIN, swin, None, IMAGENET, "Swin"),
    "Swin v2": (SWIN2, swin, None, IMAGENET, "Swin"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.mark.parametrize("title", list(LAYOUTS))
def test_a_file_in_its_authors_layout_comes_over_whole(title: str, tmp_path: Path) -> None:
    member, layout, branch, pixels, witness = LAYOUTS[title]
    state = weights(member)
    content = layout(state)
    account = convert_timm(str(saved(content, tmp_path)), tmp_path / "out.safetensors", f"timm:{member}", branch=branch)
    tensors, manifest = load_backbone(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())
    behind = {key for key in state if key.startswith(("head", "fc_norm", "attn_pool", "norm."))}
    assert set(state) - set(tensors) <= behind | {key for key in state if "rope" in key}
    stored = content.get("model", content.get("state_dict", content.get("teacher", content)))
    assert account.read == len(stored)
    dropped = {name for names in account.dropped.values() for name in names}
    assert dropped < {str(name) for name in flat(content)}
    assert manifest.proof["model"].startswith(f"an independent {witness}")
    assert manifest.proof["relative"] < 1e-6
    assert manifest.pixel_mean == pytest.approx(pixels[0], abs=1e-3)
    assert manifest.pixel_std == pytest.approx(pixels[1], abs=1e-3)


def saved(content: dict, folder: Path) -> Path:
    if any(isinstance(value, np.ndarray) for value in content.values()):
        np.savez(folder / "in.npz", **content)
        return folder / "in.npz"
    torch.save(content, folder / "in.pth")
    return folder / "in.pth"


def flat(content: object, prefix: str = "") -> list[str]:
    """Names of all tensors, those of inner dicts behind their key."""
    names = []
    for key, value in content.items():
        names += flat(value, f"{prefix}{key}:") if isinstance(value, dict) else [f"{prefix}{key}", key]
    return names


# The independent networks are timm's, of every family, and lose what they lose: in float64.


@pytest.mark.parametrize("title", ["DINOv3 with biases", "CLIP of OpenAI", "ConvNeXt v2", "Swin", "Swin v2"])
def test_an_independent_network_is_timms_and_every_tensor_moves_it(title: str) -> None:
    member = LAYOUTS[title][0]
    name, options = parse(member)
    state = weights(member)
    network = timm.create_model(name, **options).eval().double()
    network.load_state_dict(state, strict=True)
    size = options.get("img_size", 64)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)

    def run(tensors: State) -> Tensor:
        tensors = {key: tensor.double() for key, tensor in tensors.items()}
        if "Swin" in title:
            return hierarchical.swin(hierarchical.swin_names(tensors), x, window=3)
        if "ConvNeXt" in title:
            return hierarchical.convnext(hierarchical.convnext_names(tensors), x)
        base, gelu = (100.0 if "DINOv3" in title else 0.0), "quick" if "CLIP" in title else "erf"
        eps = network.norm.eps
        return plain_vit.forward(plain_vit.clip_names(tensors), x, heads=3, eps=eps, base=base, gelu=gelu)

    kept = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
    if "Swin" in title or "ConvNeXt" in title:
        kept = {key: tensor for key, tensor in kept.items() if not key.startswith("norm.")}
    with torch.no_grad():
        found = run(kept)
        maps = network.forward_intermediates(x, indices=1, norm="Swin" not in title and "Conv" not in title)[1]
        torch.testing.assert_close(found, maps[-1], rtol=1e-6, atol=1e-6)
        of_each_kind = {re.sub(r"\d+", "N", key): key for key in kept}
        for key in of_each_kind.values():
            tensor = kept[key]
            moved = run(kept | {key: tensor + 0.05 * torch.randn_like(tensor)})
            assert not torch.allclose(moved, found, rtol=1e-7, atol=1e-9), key


def test_big_visions_file_is_what_timm_reads_of_it(tmp_path: Path) -> None:
    """timm's own loader of .npz as another witness, which also fills what is dropped here."""
    path = saved(siglip_for_jax(weights(SIGLIP)), tmp_path)
    name, options = parse(SIGLIP)
    network = timm.create_model(name, **{**options, "global_pool": "avg", "fc_norm": False})
    timm.models.vision_transformer._load_weights(network, str(path), "params/img/")
    convert_timm(str(path), tmp_path / "out.safetensors", f"timm:{SIGLIP}")
    theirs = network.state_dict()
    tensors, _ = load_backbone(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())


def test_big_visions_bfloat16_and_another_activation(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in weights(SIGLIP).items()}
    content = siglip_for_jax({name: tensor.float() for name, tensor in state.items()})
    half = {name: torch.from_numpy(a).bfloat16().view(torch.int16).numpy().view("V2") for name, a in content.items()}
    path = saved(half, tmp_path)
    convert_timm(str(path), tmp_path / "out.safetensors", f"timm:{SIGLIP}")
    tensors, _ = load_backbone(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in tensors.items())
    exact = SIGLIP.replace("&act_layer=gelu_tanh", "")
    with pytest.raises(UserError, match=r"tanh approximation, and that of .* is GELU; add the option act_layer=gelu_t"):
        convert_timm(str(path), tmp_path / "out.safetensors", f"timm:{exact}")


@pytest.mark.parametrize(
    ("title", "change", "said"),
    [
        ("SigLIP of big_vision", ("Transformer/encoderblock_1/LayerNorm_0/scale", None), r"no tensor for blocks\.1\.n"),
        ("SigLIP of big_vision", ("Transformer/encoderblock_2/LayerNorm_0/scale", (48,)), "has no place in"),
        (
            "SigLIP of big_vision",
            ("Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", (48, 9)),
            r"mlp\.fc1\.weight is",
        ),
        ("SigLIP of big_vision", ("embedding/kernel", (48,)), "in no layout of"),
        ("SigLIP of big_vision", ("pos_embedding", (1, 4, 48)), r"pos_embed is \(1, 4, 48\)"),
        ("SigLIP of big_vision", ("cls", (1, 1, 48)), r"'params/img/cls' has no place in"),
        ("FCMAE in pretraining", ("stages.1.0.dwconv.kernel", (48, 16)), "in no layout of"),
        (
            "FCMAE in pretraining",
            ("stages.1.0.dwconv.kernel", None),
            r"no tensor for stages\.1\.blocks\.0\.conv_dw\.weight",
        ),
        ("FCMAE in pretraining", ("stages.1.9.grn.gamma", (1, 64)), "no layout of|has no place in"),
    ],
)
def test_what_these_layouts_lack_is_one_sentence(title: str, change: tuple, said: str, tmp_path: Path) -> None:
    member, layout = LAYOUTS[title][:2]
    content = layout(weights(member))
    tensors, prefix = (content, "params/img/") if "SigLIP" in title else (content["model"], "encoder.")
    name, shape = prefix + change[0], change[1]
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = np.ones(shape, np.float32) if "SigLIP" in title else torch.ones(shape)
    with pytest.raises(UserError, match=said) as error:
        convert_timm(str(saved(content, tmp_path)), tmp_path / "out.safetensors", f"timm:{member}")
    assert "\n" not in str(error.value)


def test_openais_clip_in_a_model_of_another_activation_is_refused(tmp_path: Path) -> None:
    member = f"vit_base_patch16_clip_224?{SMALL}&img_size=64"
    torch.save(openai(weights(member)), tmp_path / "in.pth")
    with pytest.raises(UserError, match=r"is OpenAI's CLIP, whose activation is QuickGELU, .* is GELU; give an --arch"):
        convert_timm(str(tmp_path / "in.pth"), tmp_path / "out.safetensors", f"timm:{member}")


def test_dinov3s_biases_cannot_be_lost(tmp_path: Path) -> None:
    torch.save(dinov3(weights(DINOV3_BIASED)), tmp_path / "in.pth")
    with pytest.raises(UserError, match=r"tensor 'blocks\.0\.attn\.qkv\.bias' has no place in timm:vit_small"):
        convert_timm(str(tmp_path / "in.pth"), tmp_path / "out.safetensors", f"timm:{DINOV3}")


def test_dinov3s_periods_are_those_of_the_model(tmp_path: Path) -> None:
    content = dinov3(weights(DINOV3))
    content["rope_embed.periods"] = content["rope_embed.periods"] * 1.02
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(UserError, match=r"rope_embed\.periods are not those of timm:vit_small_patch16_dinov3"):
        convert_timm(str(tmp_path / "in.pth"), tmp_path / "out.safetensors", f"timm:{DINOV3}")


def test_layer_scale_of_any_family_cannot_be_lost(tmp_path: Path) -> None:
    """A gamma that is dropped, or a register, is refused by name whatever the layout."""
    for member, layout, more in (
        (f"vit_small_patch16_224.dino?{SMALL}&img_size=64", dinov2, "blocks.0.ls1.gamma"),
        (f"vit_base_patch16_clip_224?{SMALL}&img_size=64", open_clip, None),
        ("convnextv2_atto?depths=(1,2,1,1)&dims=(8,16,24,32)", convnext, "stages.0.0.gamma"),
    ):
        content = layout(weights(member))
        tensors = content.get("model", content.get("state_dict", content))
        name = more or "module.visual.transformer.resblocks.0.ls_1.gamma"
        tensors[name] = torch.full((48,), 1e-5)
        torch.save(content, tmp_path / "in.pth")
        with pytest.raises(UserError, match=re.escape(name)):
            convert_timm(str(tmp_path / "in.pth"), tmp_path / "out.safetensors", f"timm:{member}")
