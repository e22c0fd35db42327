"""The known code bases, one row each: the backbone's prefix, its tensor names, and what else its files contain.

A tensor's key is its path in the file: the enclosing dictionaries joined by "/", a colon, its name; a tensor of the
outermost dictionary has its name alone (`conv1.weight`, `state_dict:module.encoder_q.conv1.weight`). The part before
the backbone's own tensor names is the prefix of a branch. If a file has two branches, the caller must choose.
"""

from __future__ import annotations

import re
import shlex
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.convert.architecture import refuse_small_stem
from loco_det.convert.load import in_memory
from loco_det.convert.name_patterns import NAMINGS
from loco_det.core.errors import UserError

MAX_ITEMS = 1_000_000
MAX_TENSORS = 50_000  # a ResNet-152 with its optimizer state has about 1,500
MAX_BACKBONES = 8  # in a file; no code base saves more than three

Rules = tuple[tuple[str, str], ...]
"""(pattern, reason): tensors whose whole name matches are dropped for that reason."""

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Pixels:
    """The pixels of training: mean and std in 0-255 units, in `order`; and the position of the strides."""

    order: str = "RGB"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    stride_in_1x1: bool = False

    def text(self) -> str:
        """Format for display."""
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.order}, mean {mean}, std {std} (0-255), stride in the {'1x1' if self.stride_in_1x1 else '3x3'}"


@dataclass(frozen=True)
class Source:
    """One code base.

    Attributes:
        name: its name in the account.
        branches: branch name -> pattern of that branch's prefix.
        namings: tensor namings behind the prefix, keys of `NAMINGS`.
        inside: rules for tensors to drop behind the chosen branch's prefix.
        outside: rules for tensors to drop in the same dictionary, by name.
        marker: a pattern that some key must match, for rows that would otherwise fit a plainer source.
        pixels: the pixels of its published recipes; None if the file alone does not determine them.
        moves: (pattern, replacement) applied to every key first.
        scale_only: its norms have only scale and shift; the statistics are folded in.
        timm: its network is, or may be, timm's; the proof then also uses timm's.
    """

    name: str
    branches: dict[str, str]
    namings: tuple[str, ...] = ("torchvision",)
    inside: Rules = ()
    outside: Rules = ()
    marker: str = ""
    pixels: Pixels | None = field(default_factory=Pixels)
    moves: Rules = ()
    scale_only: bool = False
    timm: bool = False


CLASSIFIER = (r"fc\.(weight|bias)", "classifier")
HEAD = (r"fc\..+", "projection head")
QUEUE = (r"(module\.)?queue\w*", "queue of negatives")
UNSCALED = Pixels("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))  # torchvision's ToTensor without Normalize
# SwAV's and DeepCluster v2's src/multicropdataset.py and VICRegL's transforms.py divide red by 0.228, not by 0.229.
SWAV = Pixels("RGB", IMAGENET_MEAN, (58.14, 57.12, 57.375))
MSRA = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)
DETECTOR_BLOBS = (
    (r"(fc1000|pred)_[wb]", "classifier"),
    (r"conv1_b", "bias of the stem, which no Detectron uses"),
    (r".+_momentum|lr", "optimizer state"),
    (r"fpn_.+", "feature pyramid"),
    (r"(conv_rpn|rpn_|retnet_).+", "region proposals"),
    (r"(fc[67]|cls_score|bbox_pred|_\[mask\]|mask_|conv5_mask|head_conv|conv_fcn|kps_).*", "box and mask heads"),
)

SOURCES = (
    Source(
        "MoCo v1/v2",
        {
            "query": r"(state_dict:)?(module\.)?encoder_q\.",
            "momentum": r"(state_dict:)?(module\.)?encoder_k\.",
        },
        inside=(HEAD,),
        outside=(QUEUE,),
    ),
    Source(
        "solo-learn",
        {"online": r"state_dict:(backbone|encoder)\.", "momentum": r"state_dict:momentum_(backbone|encoder)\."},
        outside=(
            (r"(momentum_)?(projector|head)\..+", "projection head"),
            (r"(momentum_)?predictor\..+", "prediction head"),
            (r"(momentum_)?classifier\..+", "classifier"),
            (r"prototypes\..+", "prototypes"),
            (r"(transformer_encoder|pos_enc)\..+", "projection head"),
            (r"local_memory_\w+", "memory bank"),
            (r"dino_loss_func\..+", "loss"),
            QUEUE,
        ),
        marker=r"state_dict:((momentum_)?projector|momentum_head)\..+",
    ),
    Source(
        "MoCo v3",
        {
            "base": r"(state_dict:)?(module\.)?base_encoder\.",
            "momentum": r"(state_dict:)?(module\.)?momentum_encoder\.",
        },
        inside=(HEAD,),
        outside=((r"(module\.)?predictor\..+", "prediction head"),),
    ),
    Source(
        "DenseCL or OpenSelfSup",
        {
            "query": r"state_dict:(module\.)?encoder_q\.0\.",
            "momentum": r"state_dict:(module\.)?encoder_k\.0\.",
            "online": r"state_dict:(module\.)?online_net\.0\.",
            "target": r"state_dict:(module\.)?target_net\.0\.",
            "backbone": r"state_dict:(module\.)?backbone\.",
        },
        outside=(
            (r"(module\.)?(neck|(encoder_[qk]|online_net|target_net)\.1)\..+", "projection head"),
            (r"(module\.)?head\..+", "prediction head"),
            QUEUE,
        ),
        marker=r"state_dict:(module\.)?(encoder_q|online_net)\.0\..+",
    ),
    Source(
        "MMPretrain or MMSelfSup",
        {
            "backbone": r"state_dict:(module\.)?backbone\.",
            "momentum": r"state_dict:(module\.)?(encoder_k|target_net|momentum_encoder)\.module\.0\.",
            "ema": r"ema_state_dict:module\.backbone\.",
        },
        outside=(
            (r"(module\.)?(neck|(encoder_k|target_net|momentum_encoder)\.module\.1)\..+", "projection head"),
            (r"((module\.)?(encoder_k|target_net|momentum_encoder)\.)?steps", "step counters"),
            (r"(module\.)?head\..+", "prediction head"),
            (r"(module\.)?(data_preprocessor\.(mean|std)|loss_weight)", "pixel statistics and loss weights"),
            (r"(module\.)?memory_bank\..+", "memory bank"),
            QUEUE,
        ),
        marker=r"state_dict:(module\.)?(neck|head\.(fc|fc_cls|clss|fcs)|\w+\.module)\..+",
    ),
    Source(
        "VISSL",
        {"trunk": r"((classy_state_dict/base_model/model/trunk|model_state_dict):)?(base_model\.)?_feature_blocks\."},
        inside=(CLASSIFIER,),
    ),
    Source(
        "PixPro",
        {"encoder": r"model:(module\.)?encoder\.", "momentum": r"model:(module\.)?encoder_k\."},
        inside=(HEAD,),
        outside=(
            (r"(module\.)?projector\w*\..+", "projection head"),
            (r"(module\.)?(value_transform|predictor)\..+", "prediction head"),
        ),
    ),
    Source(
        "BYOL (PyTorch-BYOL)",
        {
            "online": r"(online_network_state_dict:encoder\.|encoder_state_dict:)",
            "target": r"target_network_state_dict:encoder\.",
        },
        namings=("children",),
        outside=((r"projetion\..+", "projection head"),),  # sic
        pixels=UNSCALED,
    ),
    Source(
        "BYOL (byol-pytorch, BYOL-PyTorch)",
        {
            "online": r"(.+:)?(module\.|learner\.)?(net|online_encoder\.net|online_network\.encoder)\.",
            "target": r"(.+:)?(module\.|learner\.)?(target_encoder\.net|target_network\.encoder)\.",
        },
        namings=("children", "torchvision"),
        inside=(CLASSIFIER,),
        outside=(
            (r"(.+\.)?(online|target)_(encoder|network)\.(projector|projection|projetion)\..+", "projection head"),
            (r"(.+\.)?(online_)?predictor\..+", "prediction head"),
        ),
        marker=r"(.+[.:])?online_(encoder\.net|network\.encoder)\..+",
    ),
    Source(
        "SimSiam",
        {"encoder": r"(state_dict:)?(module\.)?encoder\."},
        inside=(HEAD,),
        outside=((r"(module\.)?predictor\..+", "prediction head"),),
        marker=r"(.+:)?(module\.)?predictor\..+",
    ),
    Source(
        "SimCLR (PyTorch ports)",
        {"encoder": r"(state_dict:)?(module\.)?(backbone|encoder)\."},
        inside=(HEAD,),
        outside=((r"(module\.)?projector\..+", "projection head"),),
        marker=r"(state_dict:)?(module\.)?backbone\.fc\.[02]\.weight|(module\.)?projector\.[02]\.weight",
        pixels=UNSCALED,
    ),
    Source(
        "SwAV or DeepCluster v2",
        {"model": r"(state_dict:)?(module\.)?"},
        inside=((r"(projection_head|prototypes\d*)\..+", "projection head and prototypes"),),
        marker=r"(.+:)?(module\.)?projection_head\..+",
        pixels=SWAV,
    ),
    Source(
        "VICRegL",
        {"backbone": r"model:(module\.)?backbone\."},
        inside=(CLASSIFIER,),
        outside=(
            (r"(module\.)?(maps_)?projector\..+", "projection head"),
            (r"(module\.)?classifier\..+", "classifier"),
        ),
        marker=r"model:(module\.)?(maps_projector|classifier)\..+",
        pixels=SWAV,
    ),
    Source(
        "Barlow Twins or VICReg",
        {"backbone": r"model:(module\.)?backbone\."},
        inside=(CLASSIFIER,),
        outside=((r"(module\.)?(projector|bn)\..+", "projection head"),),
        marker=r"model:(module\.)?projector\..+",
    ),
    Source(
        "DINO",
        {"student": r"student:(module\.)?backbone\.", "teacher": r"teacher:(module\.)?backbone\."},
        outside=((r"(module\.)?head\..+", "projection head"),),
    ),
    Source(
        "lightly",
        {
            "online": r"(state_dict:)?(model\.)?backbone\.",
            "momentum": r"(state_dict:)?(model\.)?(backbone_momentum|key_backbone)\.",
            "student": r"(state_dict:)?(model\.)?student_backbone\.",
            "teacher": r"(state_dict:)?(model\.)?teacher_backbone\.",
        },
        namings=("children", "torchvision"),
        outside=(
            (
                r"(.+\.)?(\w+_)?(projection_head|prediction_head|student_head|teacher_head)(_\w+)?\..+",
                "projection head",
            ),
            (r"(.+\.)?(prototypes|smog)\..+", "prototypes"),
            (r"(.+\.)?(online_classifier|fc)\..+", "classifier"),
            (r"(.+\.)?(memory_bank|queues)\..+", "memory bank"),
            (r"(.+\.)?(\w+_)?criterion(_\w+)?\..+", "loss"),
        ),
        marker=r"(state_dict:)?(.+\.)?(\w+_)?(projection_head|prediction_head|student_head)(_\w+)?\..+",
    ),
    Source(
        "Hugging Face transformers",
        {"model": r"(resnet\.)?"},
        namings=("transformers",),
        outside=((r"classifier\.1\.(weight|bias)", "classifier"),),
    ),
    Source(
        "Detectron2",
        {"backbone": r"(model:)?(backbone\.(bottom_up\.)?)?"},
        namings=("detectron2",),
        inside=((r"(stem\.)?(fc|linear)\.(weight|bias)", "classifier"),),
        outside=(
            (r"backbone\.(fpn_|top_block).+", "feature pyramid"),
            (r"proposal_generator\..+", "region proposals"),
            (r"roi_heads\..+", "box and mask heads"),
            (r"pixel_(mean|std)", "pixel statistics"),
        ),
        pixels=None,
        moves=((r"^(model:)?roi_heads\.res5\.", r"\1backbone.res5."),),
    ),
    Source(
        "Caffe2 with BatchNorm statistics",
        {"model": r"(blobs:)?"},
        namings=("caffe2",),
        inside=DETECTOR_BLOBS,
        marker=r"(blobs:)?res_conv1_bn_riv",
        pixels=None,
    ),
    Source(
        "MSRA (Caffe2)",
        {"model": r"(blobs:)?"},
        namings=("caffe2",),
        inside=DETECTOR_BLOBS,
        pixels=MSRA,
        scale_only=True,
    ),
    Source(
        "timm training run",
        {"model": r"state_dict:", "ema": r"state_dict_ema:"},
        inside=(CLASSIFIER,),
        marker=r"state_dict_ema:.+",
        timm=True,
    ),
    Source(
        "torchvision or timm ResNet",
        {"model": r"((state_dict|model):)?(module\.)?"},
        inside=(CLASSIFIER,),
        timm=True,
    ),
    Source(
        "Lightning module",
        {"": r"state_dict:(\w+\.)+"},
        namings=("torchvision", "children"),
        inside=(HEAD,),
        outside=(
            (r"(.+\.)?(fc|classifier|linear|head)\..+", "classifier"),
            (r"(.+\.)?(projector|projection|projection_head)\..+", "projection head"),
            (r"(.+\.)?(criterion|loss\w*)\..+", "loss"),
        ),
        pixels=None,
    ),
    Source(
        "Sequential ResNet",
        {"model": r"((state_dict|model):)?(module\.)?"},
        namings=("children",),
        inside=((r"9\.(weight|bias)", "classifier"),),
        pixels=None,
    ),
)

WRAPPERS = re.compile(r"(?<![^.:])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names; nobody's network has it in its own."""

COUNTERS = (
    (r"(.+\.)?num_batches_tracked", "batch counters"),
    (r"n_averaged", "counter of averaged weights"),  # of torch's AveragedModel
)
REFUSED = (
    (
        r"(conv1|backbone\.stem)\.[03]\.weight",
        "has a stem of three convolutions (resnet*d, *c, *s), which Detectron2 lacks",
    ),
    (r"layer1\.0\.(se|conv2_se|attn)\..+", "has attention in its blocks (SE, ECA), which Detectron2 lacks"),
    (r"layer1\.0\.conv2\.(conv|fc1)\.weight", "has split-attention blocks (ResNeSt), which Detectron2 lacks"),
    (r"(cls_token|patch_embed\..+)", "is a vision transformer, not a ResNet"),
    (r"stages\.0\.blocks\.0\..+", "is a pre-activation ResNet or ConvNeXt, which Detectron2 lacks"),
)
"""Pattern of a name behind the backbone's prefix -> why such a backbone cannot become a Detectron2 ResNet."""


@dataclass(frozen=True)
class Candidate:
    """One backbone in a file; `source` is None if no row matches its prefix."""

    source: Source | None
    branch: str
    prefix: str
    naming: str


def flatten(path: object, loaded: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) for every tensor in nested plain data; keys as in this module's docstring.

    Raises:
        UserError: nested containers have more than `MAX_ITEMS` items, or more than `MAX_TENSORS` tensors.
    """
    waiting: deque[tuple[str, Any]] = deque([("", loaded)])
    seen = tensors = 0
    while waiting:
        place, container = waiting.popleft()
        items = container if isinstance(container, dict) else dict(enumerate(container))
        seen += len(items)
        if seen > MAX_ITEMS:  # shared containers can expand exponentially
            raise UserError(f"{path}: nests more than {MAX_ITEMS:,} items; save the model's state_dict() alone")
        for name, value in items.items():
            if isinstance(value, Tensor):
                tensors += 1
                if tensors > MAX_TENSORS:
                    raise UserError(
                        f"{path}: names more than {MAX_TENSORS:,} tensors; save the model's state_dict() alone"
                    )
                yield f"{place}:{name}" if place else str(name), value
            elif isinstance(value, dict | list | tuple):
                waiting.append((f"{place}/{name}" if place else str(name), value))


def network_names(path: object, loaded: dict[str, Any]) -> dict[str, tuple[str, Tensor]]:
    """Take wrappers out of the keys of `flatten` and apply the rows' moves: new key -> (key in the file, tensor).

    Raises:
        UserError: as `flatten`, or two tensors get one key.
    """
    moves = [move for source in SOURCES for move in source.moves]
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in flatten(path, loaded):
        new = WRAPPERS.sub("", key)
        for pattern, replacement in moves:
            new = re.sub(pattern, replacement, new)
        if new in found:
            raise UserError(f"{path}: {found[new][0]!r} and {key!r} are the same tensor; remove one of them")
        found[new] = key, tensor
    return found


def candidates(path: object, tensors: dict[str, Tensor]) -> list[Candidate]:
    """Return every backbone among `tensors`, in key order, each with the first row that matches it.

    Raises:
        UserError: there are more than `MAX_BACKBONES`.
    """
    found: list[tuple[str, str]] = []
    for naming, (stem, block, _) in NAMINGS.items():
        for key, tensor in tensors.items():
            prefix = key.removesuffix(stem)
            at_border = not prefix or prefix[-1] in ".:"
            if key.endswith(stem) and at_border and prefix + block in tensors and tensor.ndim == 4:
                found.append((prefix, naming))
        if len(found) > MAX_BACKBONES:
            raise UserError(f"{path}: holds more than {MAX_BACKBONES} backbones; save the one you mean by itself")
    return [next(fitting(tensors, prefix, naming), Candidate(None, prefix, prefix, naming)) for prefix, naming in found]


def fitting(tensors: dict[str, Tensor], prefix: str, naming: str) -> Iterator[Candidate]:
    """Yield the backbone under `prefix` by each row that matches the prefix, in row order."""
    for source in SOURCES:
        if naming not in source.namings:
            continue
        branch = next((b for b, pattern in source.branches.items() if re.fullmatch(pattern, prefix)), None)
        marked = branch is not None and (not source.marker or any(re.fullmatch(source.marker, key) for key in tensors))
        if marked:
            yield Candidate(source, branch, prefix, naming)


def _distinct(tensors: dict[str, Tensor], found: list[Candidate]) -> list[Candidate]:
    """Drop backbones whose tensors all equal an earlier one's: one backbone saved under two names."""
    kept: list[tuple[Candidate, dict[str, Tensor]]] = []
    for candidate in found:
        rename = NAMINGS[candidate.naming][2]
        rest = ((k[len(candidate.prefix) :], t) for k, t in tensors.items() if k.startswith(candidate.prefix))
        own = {rename(name): tensor for name, tensor in rest}
        own = {name: tensor for name, tensor in own.items() if re.match(r"(conv1|bn1|layer[1-4])\.", name)}
        if len(found) == 1 or not any(_same(own, other) for _, other in kept):
            kept.append((candidate, own))
    return [candidate for candidate, _ in kept]


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(in_memory(t), in_memory(other[n])) for n, t in one.items())


def choose(path: object, tensors: dict[str, Tensor], branch: str | None) -> Candidate:
    """Return the backbone to convert; `branch` is a branch's name or the literal prefix of its keys.

    Raises:
        UserError: none, one that Detectron2 cannot build, or several and `branch` is None.
    """
    found = candidates(path, tensors)
    if not found:
        _refuse_other_kinds(path, tensors, r"(.+[.:])?")
        shown = ", ".join(repr(key) for key in list(tensors)[:3]) or "none"
        raise UserError(f"{path}: holds no ResNet backbone (first tensors: {shown}); give a ResNet's weights")
    distinct = _distinct(tensors, found)
    chosen = distinct if branch is None else [c for c in found if branch == c.prefix]
    chosen = chosen or [c for c in distinct if branch == c.branch] or [c for c in found if branch == c.branch]
    choices = " or ".join(f"--branch {shlex.quote(c.branch or c.prefix)}" for c in distinct)
    if not chosen:
        raise UserError(f"{path}: has no branch {branch!r}; choose {choices}")
    if len(chosen) > 1:
        raise UserError(f"{path}: holds {len(distinct)} backbones; choose one with {choices}")
    _refuse_other_kinds(path, tensors, re.escape(chosen[0].prefix))
    refuse_small_stem(path, tuple(tensors[chosen[0].prefix + NAMINGS[chosen[0].naming][0]].shape))
    if chosen[0].source is None and branch is None:
        raise UserError(
            f"{path}: no known code base has its backbone under {chosen[0].prefix!r}; "
            f"to use it, give --branch {shlex.quote(chosen[0].prefix)}"
        )
    return chosen[0]


def _refuse_other_kinds(path: object, tensors: dict[str, Tensor], prefix: str) -> None:
    """Raise UserError if a tensor behind `prefix`, a pattern, belongs to a network that Detectron2 cannot build."""
    for pattern, reason in REFUSED:
        for key in tensors:
            if re.fullmatch(prefix + pattern, key):
                raise UserError(
                    f"{path}: tensor {key!r} shows that it {reason}; give a plain ResNet's weights, or name the "
                    "network: --architecture timm:NAME"
                )
