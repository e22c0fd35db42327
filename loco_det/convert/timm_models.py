"""Converts weights of any backbone that timm can build: vision transformers, ConvNeXt, Swin and others.

    loco-det convert dinov2_vits14.pth dinov2.safetensors --architecture timm:vit_small_patch14_dinov2

The result is our artifact with timm's names, beside it the keys that a detector needs. timm's own filters rename the
layouts of other code bases (DINO, DINOv2, MAE, MoCo v3, ConvNeXt, Swin, CLIP, ...), `layouts` those that they do not
know (SigLIP's for JAX, FCMAE's sparse one). What is left out without a word is found by experiment: a tensor of the
file that no tensor of the result depends on must be one of a named kind.

Proof: a vision transformer is compared with `plain_vit` or `flax_vit`, a ConvNeXt or Swin with `hierarchical`,
independent implementations that read the file's own names; another network with timm's own, loaded from the result.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loco_det.backbones.artifact import HEADER_KEY, Manifest, backbone_tensors, describe, save_backbone
from loco_det.backbones.timm_models import PREFIX, TimmBackbone, create, parse
from loco_det.backbones.timm_swin import SWINS
from loco_det.convert import flax_vit, hierarchical, plain_vit
from loco_det.convert.export import CONVERTED, backbone_name, is_fragment, keys_text
from loco_det.convert.layouts import is_flax, known_names
from loco_det.convert.load import check_sums, in_memory, open_tensors, safetensors_metadata
from loco_det.convert.report import shown
from loco_det.convert.sources import Pixels, network_names
from loco_det.convert.stated import Stated
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write

# The first tensor of a backbone in the layouts that timm's filters know.
_FIRST = re.compile(
    r"(?P<prefix>(?:.*[.:/])?)(patch_embed\.(proj|backbone\.proj|patch_embedding|proj\.0)\.weight|"
    r"stem(\.0|\.conv|_conv)?\.weight|"
    r"conv_stem\.weight|conv1\.weight|downsample_layers\.0\.0\.weight|stem\.conv1?\.conv\.weight|"
    r"embeddings\.patch_embedding\.weight|patch_embed1?\.proj\.weight|embedding/kernel)"
)
_OF_RESNET = re.compile(r"(.*[.:])?(layer1|res2)\.0\.conv1\.weight")
# Tensors that no backbone has: (names behind the prefix or in the whole file, why they are dropped).
_DROPPED = (
    (r"(.*\.)?num_batches_tracked", "step counters"),
    (r"(head|fc|classifier|heads|last_layer)\..*", "classifier"),
    (r"norm\.(weight|bias)", "final normalisation, behind the last map"),
    (
        r"(attn_pool|projector|proj_head|projection|neck|ibot_head|dino_head|predictor)\..*|proj|projection",
        "projection",
    ),
    (r"mask_token|masked_embed", "the token of masked patches"),
    (r"local_cls_norm\..*", "normalisation of pretraining's local crops"),
    (r"(decoder.*|(pred|proj)\.(weight|bias))", "decoder of reconstruction"),
    (r"MAPHead_0/.*", "pooling by attention"),
    (
        r"(.*\.)?(relative_position_index|attn_mask|relative_coords_table|rope(_embed)?\.periods|qkv\.bias_mask)",
        "constants",
    ),
)


@dataclass
class TimmAccount:
    """What became of every tensor of a file; `facts` and `lines` as those of `report.Account`."""

    source: str
    architecture: str
    prefix: str
    read: int
    converted: dict[str, Tensor]
    dropped: dict[str, list[str]]
    pixels: Pixels
    proof: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return account and proof as plain data, for JSON."""
        return {
            "source": self.source,
            "branch": self.prefix,
            "architecture": self.architecture,
            "pixels": {"order": self.pixels.order, "mean": self.pixels.mean, "std": self.pixels.std},
            "read": self.read,
            "converted": sorted(self.converted),
            "dropped": self.dropped,
            "proof": self.proof,
        }

    def lines(self) -> list[str]:
        """Return account and proof as aligned plain text."""
        kind = f"float64 max|d| {self.proof['max_abs']:.2e}, relative {self.proof['relative']:.2e}"
        rows = [
            ("source", f"{self.source}, branch {self.prefix}" if self.prefix else self.source),
            ("backbone", self.architecture),
            ("pixels", f"{self.pixels.order}, mean {self.pixels.mean}, std {self.pixels.std}"),
            ("read", f"{self.read:4d} tensors"),
            ("converted", f"{len(self.converted):4d}"),
            ("dropped", f"{sum(map(len, self.dropped.values())):4d}"),
            *((f"  {len(keys):4d}", f"{why} ({shown(keys)})") for why, keys in self.dropped.items()),
        ]
        lines = [f"{label:<10} {text}" for label, text in rows]
        return [*lines, "", f"proof: {self.proof['image']} through {self.proof['model']}", f"{'':10} {kind}"]


def convert_timm(
    source: str,
    output: str | Path,
    architecture: str,
    *,
    branch: str | None = None,
    drop: Sequence[str] = (),
    stated: Stated | None = None,
) -> TimmAccount:
    """Convert `source` to the artifact `output`, with a YAML of keys beside it; returns the account with the proof.

    Args:
        source: a weights file, or timm:NAME for timm's own weights, from its cache or the hub.
        architecture: timm:NAME, or timm:NAME?KEY=VALUE&... with options of the model's constructor.
        branch: prefix of the backbone's tensors, if the file holds several.
        drop: shell patterns of further tensors to drop.
        stated: pixels of training, if they are not those of timm's recipe of that name.

    Raises:
        UserError: an invalid file or option, a tensor without a place, or the proof fails; nothing is left at `output`.
    """
    output = Path(output)
    if not architecture.startswith(PREFIX):
        raise UserError(f"--architecture {architecture}: give {PREFIX}NAME, e.g. {PREFIX}vit_small_patch16_224")
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: weights of {architecture} are written as .safetensors; end the name so")
    if output.resolve() == Path(source).resolve():
        raise UserError(f"{output}: is the input too; give the output another name")
    fragment = output.with_suffix(".yaml")
    if fragment.exists() and not is_fragment(fragment):
        raise UserError(f"{fragment}: is in the way of the YAML keys of {output.name}; give the output another name")
    name, options = parse(architecture)
    backbone = TimmBackbone(name, pretrained=source == architecture, **options).eval()
    model = backbone.model
    pixels = Pixels("RGB", backbone.pixel_mean, backbone.pixel_std)
    if source.startswith(PREFIX):
        if source != architecture:
            raise UserError(f"{source}: is another model than --architecture {architecture}; leave one of them out")
        tensors = backbone_tensors(backbone)
        account = TimmAccount(source, architecture, "", len(tensors), tensors, {}, pixels)
        own: Mapping[str, Tensor] = account.converted
    else:
        account, own = _take(Path(source), backbone, branch, drop, pixels)
    if stated:
        if stated.stride_in_1x1 is not None:
            raise UserError(f"{architecture}: has no 1x1 stride to state; leave --stride-in-1x1 out")
        account.pixels = stated.complete(source, 0, account.pixels)
    counters = {n: t for n, t in model.state_dict().items() if n.endswith("num_batches_tracked")}
    model.load_state_dict({**account.converted, **counters})
    try:
        account.proof = _prove(backbone, own)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    manifest = describe_timm(
        backbone,
        account.source,
        account.pixels,
        proof=account.proof,
        dropped={why: keys for why, keys in account.dropped.items() if why.startswith("as asked")},
    )
    save_backbone(output, account.converted, manifest)
    with atomic_write(fragment, "w") as file:
        file.write(yaml_text(output, manifest))
    return account


def describe_timm(backbone: TimmBackbone, method: str, pixels: Pixels, **fields: Any) -> Manifest:
    """Return the manifest of a backbone of timm; `method` says where its weights are from."""
    known = {"channel_order": pixels.order, "pixel_mean": pixels.mean, "pixel_std": pixels.std}
    return describe(backbone, stem="patch" if backbone.is_plain else "timm", method=method, **known, **fields)


def load_timm(path: Path, tensors: Mapping[str, Tensor], manifest: Manifest) -> TimmBackbone:
    """Build the backbone of an artifact (converted or pretrained), in evaluation mode, and load all its tensors.

    Raises:
        UserError: they are not what the manifest says.
    """
    name, options = parse(manifest.architecture)
    backbone = TimmBackbone(name, **options)
    counters = {n: t for n, t in backbone.model.state_dict().items() if n.endswith("num_batches_tracked")}
    try:
        backbone.model.load_state_dict({**tensors, **counters}, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its tensors are not what its manifest says ({reason}); write it again") from error
    return backbone.eval()


def yaml_text(weights: Path, manifest: Manifest) -> str:
    """Return the YAML fragment with the keys of a detector that must agree with these weights."""
    title = f"{manifest.architecture} backbone ({manifest.method}), {CONVERTED}"
    pixels = manifest.channel_order, manifest.pixel_mean, manifest.pixel_std
    return keys_text(title, str(weights.absolute()), *pixels, backbone_name(manifest.architecture))


def _take(
    path: Path, backbone: TimmBackbone, branch: str | None, drop: Sequence[str], pixels: Pixels
) -> tuple[TimmAccount, dict[str, Tensor]]:
    """Account for every tensor of the file; returns the account, and the backbone's tensors under the file's names."""
    loaded = open_tensors(path)
    check_sums(path)
    if HEADER_KEY in safetensors_metadata(path):
        raise UserError(f"{path}: is a backbone that loco-det wrote already; give it as MODEL.WEIGHTS")
    everything = {key: tensor for key, (_, tensor) in network_names(path, loaded).items()}
    _refuse_resnet(path, everything, backbone)
    prefix = _prefix(path, everything, branch, backbone.architecture)
    _check_activation(path, everything, backbone)
    own = {key.removeprefix(prefix): in_memory(tensor) for key, tensor in everything.items() if key.startswith(prefix)}
    result = _filtered(backbone, own)
    wanted = {n: t for n, t in backbone.model.state_dict().items() if not n.endswith("num_batches_tracked")}
    for name, tensor in wanted.items():
        if name not in result:
            count = len(wanted.keys() - result.keys())
            raise UserError(
                f"{path}: has no tensor for {name} of {backbone.architecture} ({count} in all are missing); give "
                "the --architecture that the weights are of"
            )
        if result[name].shape != tensor.shape:
            raise UserError(
                f"{path}: {name} is {tuple(result[name].shape)} and {backbone.architecture} takes "
                f"{tuple(tensor.shape)}; give the --architecture that the weights are of"
            )
        if not result[name].is_floating_point():
            raise UserError(
                f"{path}: {name} is {result[name].dtype}, no floating-point weights; take the original file"
            )
        if not torch.isfinite(result[name]).all():
            raise UserError(f"{path}: {name} has values that are not finite; take an intact checkpoint")
    if backbone.is_plain and "pos_embed" in own and own["pos_embed"].ndim == 3:
        have, takes = own["pos_embed"].shape[1], wanted["pos_embed"].shape[1] if "pos_embed" in wanted else 0
        if takes and abs(have - takes) > backbone.model.num_prefix_tokens:
            raise UserError(
                f"{path}: pos_embed has {have} positions and {backbone.architecture} {takes}, for another image size; "
                "give the --architecture of that size"
            )
    _check_periods(path, own, backbone)
    unused, whole = _unused(backbone, own, {name: result[name] for name in wanted}), _names_of_whole(backbone)
    dropped: dict[str, list[str]] = {}
    for key in everything:
        short = key.removeprefix(prefix)
        if key.startswith(prefix) and short not in unused:
            continue
        why = _why(key, short, drop, inside=key.startswith(prefix))
        if why is None and short in whole:
            why = "the model's layers behind its last map"
        if why is None and short.endswith(".qkv.bias") and _is_without_effect(key, everything):
            why = "biases that are zero"
        if why is None:
            raise UserError(
                f"{path}: tensor {key!r} has no place in {backbone.architecture}: give the --architecture that the "
                f"weights are of, or drop it on purpose: --drop '{key}'"
            )
        dropped.setdefault(why, []).append(key)
    for pattern in drop:
        if f"as asked by --drop {pattern}" not in dropped:
            raise UserError(
                f"{path}: --drop {pattern} drops nothing: {backbone.architecture} needs what it matches, or it matches "
                "nothing; leave it out"
            )
    converted = {name: result[name].float().contiguous() for name in wanted}
    account = TimmAccount("weights file", backbone.architecture, prefix, len(everything), converted, dropped, pixels)
    return account, {name: tensor for name, tensor in own.items() if name not in unused}


def _prefix(path: Path, tensors: Mapping[str, Tensor], branch: str | None, architecture: str) -> str:
    """The prefix of the backbone's tensors: `branch`, or the only one that the file has."""
    found = sorted({match["prefix"] for key in tensors if (match := _FIRST.fullmatch(key))}, key=len)
    if branch is not None:
        if not any(key.startswith(branch) for key in tensors):
            raise UserError(f"{path}: no tensor's name begins with {branch!r}; --branch is one of {', '.join(found)}")
        return branch
    if not found:
        first = next(iter(tensors), "nothing")
        raise UserError(
            f"{path}: has no first layer of {architecture} in a known layout (it holds {first} ...); give the prefix "
            "of its tensors: --branch PREFIX"
        )
    if len(found) > 1:
        raise UserError(f"{path}: holds several backbones; choose one: --branch {' or --branch '.join(found)}")
    return found[0]


def _refuse_resnet(path: Path, tensors: Mapping[str, Tensor], backbone: TimmBackbone) -> None:
    """Raise UserError if the file holds a ResNet and nothing else, and `backbone` is none."""
    first = next((name for name in tensors if _OF_RESNET.fullmatch(name)), None)
    others = [name for name in tensors if _FIRST.fullmatch(name) and not name.endswith("conv1.weight")]
    if first is not None and not others and not any(_OF_RESNET.fullmatch(name) for name in backbone.model.state_dict()):
        raise UserError(
            f"{path}: holds a ResNet ({first}), and {backbone.architecture} is none; leave --architecture out: "
            f"loco-det convert {path} backbone.pkl"
        )


def _check_activation(path: Path, tensors: Mapping[str, Tensor], backbone: TimmBackbone) -> None:
    """Raise UserError for OpenAI's CLIP and big_vision's in a model of another activation, which no tensor shows."""
    activation = getattr(getattr(getattr(backbone.model, "blocks", [None])[0], "mlp", None), "act", None)
    if "input_resolution" in tensors and type(activation).__name__ != "QuickGELU":
        raise UserError(
            f"{path}: is OpenAI's CLIP, whose activation is QuickGELU, and that of {backbone.architecture} is "
            f"{type(activation).__name__}; give an --architecture with quickgelu in its name, e.g. "
            f"{PREFIX}vit_base_patch16_clip_quickgelu_224"
        )
    if any(name.endswith("embedding/kernel") for name in tensors) and type(activation).__name__ != "GELUTanh":
        raise UserError(
            f"{path}: is big_vision's, whose activation is the GELU's tanh approximation, and that of "
            f"{backbone.architecture} is {type(activation).__name__}; add the option act_layer=gelu_tanh to the name, "
            f"e.g. '{PREFIX}vit_base_patch16_siglip_224?act_layer=gelu_tanh'"
        )


def _check_periods(path: Path, own: Mapping[str, Tensor], backbone: TimmBackbone) -> None:
    """Raise UserError if DINOv3's rotary periods, a constant in its file, are others than the model's."""
    theirs, ours = own.get("rope_embed.periods"), getattr(getattr(backbone.model, "rope", None), "periods", None)
    if theirs is None:
        return
    if ours is None or theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours.float(), rtol=2**-7):
        raise UserError(f"{path}: rope_embed.periods are not those of {backbone.architecture}; give its --architecture")


def _filtered(backbone: TimmBackbone, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names, by the filter of the model's family where timm has one."""
    module = sys.modules[type(backbone.model).__module__]
    renamed: Callable[..., Any] | None = getattr(module, "checkpoint_filter_fn", None)
    wanted = {name for name in backbone.model.state_dict() if not name.endswith("num_batches_tracked")}
    with _one_sentence(backbone):
        tensors = known_names(tensors)
    if renamed is None or wanted <= tensors.keys():
        return dict(tensors)
    prefix = "visual." if "class_embedding" in tensors else ""  # by which timm knows CLIP's layout
    given = {prefix + name: tensor for name, tensor in tensors.items()}
    with _one_sentence(backbone), contextlib.redirect_stdout(io.StringIO()):  # timm's filter of DINOv3 prints
        return dict(renamed(given, backbone.model))


@contextlib.contextmanager
def _one_sentence(backbone: TimmBackbone) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:150]
        raise UserError(
            f"these weights are in no layout of {backbone.architecture} that timm knows ({said}); give the "
            "--architecture that they are of"
        ) from error


def _unused(backbone: TimmBackbone, own: Mapping[str, Tensor], result: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors on which no tensor of `result`, the filtered ones, depends: found by spoiling each of them."""
    addresses = {tensor.data_ptr() for tensor in result.values()}
    unused = set()
    for name, tensor in own.items():
        if tensor.data_ptr() in addresses:
            continue
        spoiled = {**own, name: torch.full_like(tensor, torch.nan, dtype=torch.float32)}
        try:
            after = _filtered(backbone, spoiled)
        except UserError:
            continue
        if not any(torch.isnan(after[key]).any() for key in result if after[key].is_floating_point()):
            unused.add(name)
    return unused


def _names_of_whole(backbone: TimmBackbone) -> set[str]:
    """Names of the tensors of timm's whole model, with the layers that give no map and its classifier."""
    import timm

    with torch.device("meta"):
        return set(timm.create_model(parse(backbone.architecture)[0], **backbone.options).state_dict())


def _is_without_effect(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a bias is zero wherever its mask, if the file has one (DINOv3's keys), lets it through."""
    bias, mask = in_memory(tensors[key]), tensors.get(f"{key}_mask")
    return not (bias if mask is None else bias[in_memory(mask) != 0]).any()


def _why(key: str, short: str, drop: Sequence[str], *, inside: bool) -> str | None:
    for pattern in drop:
        if fnmatchcase(key, pattern) or fnmatchcase(short, pattern):
            return f"as asked by --drop {pattern}"
    for names, why in _DROPPED:
        if re.fullmatch(names, short):
            return why
    return None if inside else "beside the chosen backbone"


def _independent(backbone: TimmBackbone, own: Mapping[str, Tensor], x: Tensor) -> tuple[str, Tensor] | None:
    """The last map by a function of the file's tensors, and the name of its network; None for families without one."""
    model = backbone.model
    kind = type(model).__name__
    if is_flax(own):
        is_whole = all(flax_vit.LAYOUT.fullmatch(name) for name in own)
        return ("vision transformer", flax_vit.forward(own, x)) if is_whole else None
    if backbone.is_plain:
        tensors = plain_vit.clip_names(own)
        rope = getattr(model, "rope", None)
        base = 0.0 if rope is None else rope.temperature if type(rope).__name__ == "RotaryEmbeddingDinoV3" else None
        if base is None or not all(plain_vit.LAYOUT.fullmatch(name) for name in tensors):
            return None
        activation = type(model.blocks[0].mlp.act).__name__
        is_gated = any(".mlp.w12." in name for name in tensors)
        gelu = {"GELU": "erf", "QuickGELU": "quick", "GELUTanh": "tanh"}.get(activation, "erf" if is_gated else None)
        if gelu is None:
            return None
        heads, eps = model.blocks[0].attn.num_heads, model.norm.eps
        return "vision transformer", plain_vit.forward(tensors, x, heads=heads, eps=eps, base=base, gelu=gelu)
    if kind == "ConvNeXt":
        tensors, block = hierarchical.convnext_names(own), model.stages[0].blocks[0]
        is_the_authors = type(block.mlp.act).__name__ == "GELU" and block.norm.eps == hierarchical.CONVNEXT_EPS
        if is_the_authors and all(hierarchical.CONVNEXT.fullmatch(name) for name in tensors):
            return "ConvNeXt", hierarchical.convnext(tensors, x)
    if kind in SWINS:
        tensors, attention = hierarchical.swin_names(own), model.layers[0].blocks[0].attn
        is_resized = any(getattr(attention, "pretrained_window_size", ()))  # positions of another window
        if all(hierarchical.SWIN.fullmatch(name) for name in tensors) and not is_resized:
            return "Swin", hierarchical.swin(tensors, x, window=attention.window_size[0])
    return None


@torch.no_grad()
def _prove(backbone: TimmBackbone, own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compare the last map of the result with the source's network in float64, on an image of the model's own size."""
    import timm

    from loco_det.convert.prove import TOLERANCE, difference, made_image  # lazy: it imports torchvision

    embedding = getattr(backbone.model, "patch_embed", None)
    built_for = getattr(embedding, "img_size", None) if backbone.is_plain else None
    height, width = built_for or 2 * (backbone.image_size,)
    picture = torch.from_numpy(made_image(height, width)).permute(2, 0, 1)[None].double()
    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (backbone.pixel_mean, backbone.pixel_std)
    )
    x = (picture - mean) / std
    model = backbone.double()
    found = list(model(x).values())[-1]
    independent = _independent(backbone, {name: tensor.double() for name, tensor in own.items()}, x)
    if independent is not None:
        kind, expected = independent
        witness = f"an independent {kind} that reads the file's names"
    else:
        config = backbone.model.pretrained_cfg
        network = create(config["architecture"], pretrained=False, image_size=None, **backbone.options).double().eval()
        network.load_state_dict(model.model.state_dict(), strict=False)  # layers behind the last map stay random
        outputs: list[Tensor] = []
        if backbone.is_plain:
            tokens = network.forward_features(x)[:, model.model.num_prefix_tokens :]
            outputs.append(tokens.transpose(1, 2).reshape(found.shape))
        else:
            last = network.get_submodule(list(backbone.ends.values())[-1])
            last.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
            network.forward_features(x)
        expected = outputs[0] if outputs[0].shape == found.shape else outputs[0].permute(0, 3, 1, 2)
        witness = f"timm {timm.__version__}'s own forward pass"
    model.float()
    numbers = difference("the last map", expected, found)
    return {"image": f"an image of {width} x {height}", "model": witness, "tolerance": TOLERANCE, **numbers}
