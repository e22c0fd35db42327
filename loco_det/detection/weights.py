"""Loads weights into a detector completely or not at all: a backbone, or a whole detector under Detectron2's names.

A backbone file must fill every tensor of the model's ResNet, a detector file every tensor of the model; missing,
unknown or misshapen tensors are refused by name, because a partly loaded backbone silently costs AP. With `new_heads`,
heads of a detector with other classes or anchors are initialised instead.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.backbones.artifact import Manifest, check_hash, decode_manifest, load_backbone, require_resnet
from loco_det.backbones.names import to_detectron2, to_torchvision
from loco_det.backbones.networks import OWN_NETWORKS
from loco_det.backbones.own import OTHER_BACKBONES, WITH_WEIGHTS
from loco_det.backbones.timm_models import PREFIX, family_positions, parse
from loco_det.backbones.windows import REL_POS, WINDOW_OPTIONS
from loco_det.convert import read_checkpoint
from loco_det.core import config
from loco_det.core.config import shell_value
from loco_det.core.errors import UserError
from loco_det.core.log import log

STAGE = re.compile(r"(stem|res[2-7])\.")
# Detectron2's prefixes of a detector's ResNet: under FPN, alone, and as the head of C4.
PREFIXES = ("backbone.bottom_up.", "backbone.", "roi_heads.")
# Prefixes of a detector's model of timm: under the pyramid of a plain transformer, and under FPN.
TIMM_PREFIXES = ("backbone.net.model.", "backbone.bottom_up.model.")
_OTHER_PREFIXES = (*TIMM_PREFIXES, "backbone.net.module.", "backbone.bottom_up.module.")  # and a user's module
# Parts of a model of timm that a configuration may leave unused: its final normalisation, and its last blocks.
_UNUSED = re.compile(r"(fc_)?norm\..*|(blocks|stages|layers|features|s)\.?\d.*|head\..*")
_PREFIX_TOKENS = ("cls_token", "reg_token")  # unused with windows
# Detectron2's ViT, of ViTDet's own checkpoints: the same names as timm's, without our wrapper of timm's model.
_VITDET = re.compile(r"backbone\.net\.(?=(patch_embed|pos_embed|blocks)\b)")
# Tensors that a file may have and the model lacks: step counters, an ImageNet classifier, and constants of old
# Detectron2 checkpoints.
DROPPED = re.compile(
    r"(.*\.)?num_batches_tracked|(stem\.)?fc\.(weight|bias)|pixel_(mean|std)|.*anchor_generator\.cell_anchors\.\d+"
)
# The parts of a detector whose shape depends on classes, anchors or MODEL.MASK_ON, by display name; each is loaded or
# initialised as a whole.
_HEADS = {
    "box predictor": re.compile(r"roi_heads\.box_predictor\..*"),
    "mask head": re.compile(r"roi_heads\.mask_head\..*"),
    "mask predictor": re.compile(r"roi_heads\.mask_head\.predictor\..*"),
    "RPN's predictor": re.compile(r"proposal_generator\.rpn_head\.(objectness_logits|anchor_deltas)\..*"),
    "predictor of labels": re.compile(r"sem_seg_head\.predictor\..*"),
}
_NEW_HEADS = "initialise the heads that do not fit: loco-det train --new-heads"
RES2 = "MODEL.RESNETS.RES2_OUT_CHANNELS"  # follows from the depth, and is set beside it
TOLERANCE = 0.01  # in 0-255 units: published means are rounded to two or three digits


@dataclass
class Weights:
    """The content of a weights file.

    Attributes:
        path: the file.
        tensors: under Detectron2's names, relative to the ResNet for a backbone, complete for a detector.
        manifest: the manifest of an exported backbone.
        pixels: a detector checkpoint's record of its input (`pixel_facts`).
        state: everything else in a checkpoint: optimiser, schedule, iteration.
        new_heads: {head: names of the model's tensors} initialised because they did not fit; empty for a head
            that the model does not have.
    """

    path: Path
    tensors: dict[str, Tensor]
    manifest: Manifest | None = None
    pixels: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    new_heads: dict[str, list[str]] = field(default_factory=dict)

    @property
    def is_backbone(self) -> bool:
        return self.manifest is not None or any(STAGE.match(name) for name in self.tensors)


def load_weights(model: nn.Module, cfg: CfgNode, *, new_heads: bool = False) -> Weights | None:
    """Load MODEL.WEIGHTS into `model`; with "" it keeps its random initialisation, with a line in the log.

    Args:
        new_heads: keep the initialisation of a detector's heads that do not fit; the log and `Weights.new_heads` list
            them.

    Returns:
        The loaded weights; None for "".

    Raises:
        UserError: the file is missing, damaged, has unknown names, contradicts the configuration, or does not fit.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        own_weights = cfg.MODEL.BACKBONE.NAME.startswith(WITH_WEIGHTS)
        which = "the backbone has its own weights, all other layers start" if own_weights else "every layer starts"
        log.info("MODEL.WEIGHTS is empty: %s from random values", which)
        return None
    weights = read_weights(path)
    apply_weights(model, weights, cfg, new_heads=new_heads)
    return weights


def read_weights(path: str | Path) -> Weights:
    """Read a converted backbone (.pkl), a backbone artifact (.safetensors) or a detector checkpoint.

    Nothing in the file is executed.

    Raises:
        UserError: a URL, a missing or damaged file, or names that are not Detectron2's.
    """
    text = str(path)
    if "://" in text:
        raise UserError(
            f"MODEL.WEIGHTS {text} is not a file; download it, convert it if it is not loco_det's or Detectron2's own "
            "(loco-det convert FILE backbone.pkl), and give the path."
        )
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise UserError(f"MODEL.WEIGHTS {path} does not exist; pretrain and convert a backbone, or correct the path.")
    if path.suffix == ".safetensors":
        tensors, manifest = load_backbone(path)
        if manifest.architecture.startswith(PREFIX):
            return Weights(path, tensors, manifest)
        if manifest.architecture not in OWN_NETWORKS:
            require_resnet(path, manifest)
        return Weights(path, {to_detectron2(name): tensor for name, tensor in tensors.items()}, manifest)
    state = read_checkpoint(path)
    tensors = state.pop("model")
    weights = Weights(path, tensors, state=state)
    note = state.get("loco_det")
    if isinstance(note, (str, bytes)):
        weights.manifest = decode_manifest(note, path)
        check_hash(path, {to_torchvision(name): tensor for name, tensor in tensors.items()}, weights.manifest)
    elif isinstance(note, dict):
        weights.pixels = note.get("pixels")
    if any(name.startswith("backbone.body.") for name in tensors):
        raise UserError(
            f"{path}: is a detector of torchvision's, whose heads are no Detectron2's; take its backbone: "
            f"loco-det convert {path} backbone.pkl --branch backbone.body."
        )
    if not weights.is_backbone and not any(name.startswith(PREFIXES) for name in tensors):
        name = next(iter(tensors))
        raise UserError(
            f"{path}: tensor {name!r} has no name of Detectron2's; convert the file and give the result as "
            f"MODEL.WEIGHTS: loco-det convert {path} backbone.pkl"
        )
    return weights


def apply_weights(model: nn.Module, weights: Weights, cfg: CfgNode, *, new_heads: bool = False) -> None:
    """Copy `weights` into `model`, whose names are Detectron2's; `new_heads` as for `load_weights`.

    Raises:
        UserError: naming the missing, unknown or misshapen tensor, or the contradicting key.
    """
    check_manifest(weights, cfg)
    _check_kind(weights, cfg)
    if any(_VITDET.match(name) for name in weights.tensors) and cfg.MODEL.BACKBONE.NAME.startswith(PREFIX):
        _check_vitdet(weights, cfg)
        weights.tensors = {_VITDET.sub("backbone.net.model.", n): tensor for n, tensor in weights.tensors.items()}
    target = model.state_dict()
    if weights.is_backbone:
        is_timm = cfg.MODEL.BACKBONE.NAME.startswith(PREFIX)
        matched = _match_timm(weights, target, cfg) if is_timm else _match_backbone(weights, target, cfg)
    else:
        if new_heads:
            _drop_heads(weights, target)
        matched = _match_detector(weights, target, cfg)
    _check_finite(weights.path, matched)
    model.load_state_dict(matched, strict=False)
    kind = "backbone" if weights.is_backbone else "detector"
    log.info("loaded %d %s tensors from %s", len(matched), kind, weights.path)


def _check_kind(weights: Weights, cfg: CfgNode) -> None:
    """Refuse weights on a ResNet for another backbone, and the other way round, where no manifest says it."""
    name = cfg.MODEL.BACKBONE.NAME
    is_resnet = any(STAGE.match(re.sub(r"^backbone\.(bottom_up\.)?", "", key)) for key in weights.tensors)
    is_other = any(key.startswith(_OTHER_PREFIXES) for key in weights.tensors)
    if weights.manifest is None and (is_resnet, is_other)[not name.startswith((PREFIX, *WITH_WEIGHTS))]:
        kind = "backbone" if weights.is_backbone else "detector"
        found = "no ResNet" if is_other else "a ResNet"
        raise UserError(
            f"{weights.path} is a {kind} with {found} and MODEL.BACKBONE.NAME is {name}; give weights of that "
            "backbone, or the configuration of these."
        )


def _match_backbone(weights: Weights, target: dict[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    # Detectron2's C4 head has bottlenecks at any depth: below 50 no backbone has its tensors.
    prefixes = PREFIXES if cfg.MODEL.RESNETS.DEPTH >= 50 else PREFIXES[:2]
    places = {}
    for name in target:
        prefix = next((p for p in prefixes if name.startswith(p) and STAGE.match(name.removeprefix(p))), None)
        if prefix:
            places[name.removeprefix(prefix)] = name
    stages = {name.partition(".")[0] for name in places}
    dropped = []
    matched: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        stage = STAGE.match(name)
        if DROPPED.fullmatch(name) or (stage and stage[1] not in stages):
            dropped.append(name)
        elif name not in places:
            own = cfg.MODEL.BACKBONE.NAME in OWN_NETWORKS
            network = cfg.MODEL.BACKBONE.NAME if own else "the model's ResNet"
            keys = "MODEL.BACKBONE.NAME" if own else "MODEL.RESNETS.DEPTH and NORM"
            raise UserError(
                f"{weights.path}: tensor {name} has no place in {network}; set {keys} to those of the weights."
            )
        else:
            _check_shape(weights.path, name, tensor, target[places[name]])
            matched[places[name]] = tensor
    # No backbone is pretrained with deformable convolutions, whose offsets start at zero as in Detectron2, nor with
    # the norm that MoCo's head adds.
    new = re.compile(r".*\.conv2_offset\..*|roi_heads\.res5\.norm\..*")
    _check_complete(weights.path, matched, (place for place in places.values() if not new.fullmatch(place)))
    if dropped:
        log.info("not used from %s: %d tensors, e.g. %s", weights.path, len(dropped), dropped[0])
    return matched


def _match_timm(weights: Weights, target: dict[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    unused = _PREFIX_TOKENS if "window" in parse(cfg.MODEL.BACKBONE.NAME)[1] else ()
    places = {name.removeprefix(prefix): name for name in target for prefix in TIMM_PREFIXES if name.startswith(prefix)}
    matched, dropped = {}, []
    for name, tensor in weights.tensors.items():
        if name in places:
            _check_shape(weights.path, name, tensor, target[places[name]])
            matched[places[name]] = tensor
        elif _UNUSED.fullmatch(name) or name in unused:
            dropped.append(name)
        else:
            raise UserError(
                f"{weights.path}: tensor {name} has no place in the model's backbone; convert the file again"
            )
    # No backbone is pretrained with relative positions: they start at zero, as in ViTDet.
    _check_complete(weights.path, matched, (place for place in places.values() if not place.endswith(REL_POS)))
    if dropped:
        log.info("not used from %s: %d tensors, e.g. %s", weights.path, len(dropped), dropped[0])
    return matched


def _check_vitdet(weights: Weights, cfg: CfgNode) -> None:
    """Refuse a transformer that has the tensors of Detectron2's ViT but not its arithmetic."""
    name, options = parse(cfg.MODEL.BACKBONE.NAME)
    if "window" not in options:
        wrong = "window=14, and rel_pos=64 if it has relative positions"
    elif options.get("positions", family_positions(name)) != "size":
        wrong = "positions=size"
    else:
        return
    raise UserError(
        f"{weights.path} is of ViTDet and MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}; add {wrong} behind its ?."
    )


def _drop_heads(weights: Weights, target: dict[str, Tensor]) -> None:
    """Remove heads that do not fit from the weights and from the model's tensors to fill."""
    for title, names in _HEADS.items():
        given, wanted = (
            {n: t.shape for n, t in all_.items() if names.fullmatch(n)} for all_ in (weights.tensors, target)
        )
        # If both have a mask head, only its predictor depends on the classes.
        if given == wanted or (title == "mask head" and given and wanted):
            continue
        weights.tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in given}
        weights.new_heads[title] = list(wanted)
        for name in wanted:
            del target[name]
        state = (
            f"is initialised: {len(wanted)} tensors of the model keep their random values" if wanted else "is not used"
        )
        log.warning("--new-heads: the %s of %s %s (%s)", title, weights.path, state, next(iter(wanted or given)))
    if not weights.new_heads:
        log.info("--new-heads: every head of %s fits, so all are loaded", weights.path)


def _match_detector(weights: Weights, target: dict[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    _check_task(weights, target, cfg)
    _check_classes(weights, target, cfg)
    masks = [name for name in weights.tensors if name.startswith("roi_heads.mask_head.")]
    if bool(masks) != any(name.startswith("roi_heads.mask_head.") for name in target):
        has = "has" if masks else "has no"
        raise UserError(f"{weights.path} {has} mask head; set MODEL.MASK_ON to {bool(masks)}, or {_NEW_HEADS}.")
    matched: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if name in target:
            _check_shape(weights.path, name, tensor, target[name])
            matched[name] = tensor
        elif not DROPPED.fullmatch(name):
            raise UserError(
                f"{weights.path}: tensor {name} has no place in the model that the configuration describes."
            )
    _check_complete(weights.path, matched, target)
    return matched


def _check_task(weights: Weights, target: dict[str, Tensor], cfg: CfgNode) -> None:
    for head, task in (("roi_heads.", "GeneralizedRCNN"), ("sem_seg_head.", "SemanticSegmentor")):
        there = (any(name.startswith(head) for name in names) for names in (weights.tensors, target))
        if tuple(there) == (True, False):
            raise UserError(
                f"{weights.path} is of a {task} and MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; "
                "the configuration must describe the network that the weights are of."
            )


def _check_classes(weights: Weights, target: dict[str, Tensor], cfg: CfgNode) -> None:
    for name in ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.0.cls_score.weight"):
        if name in weights.tensors and name in target and weights.tensors[name].shape[0] != target[name].shape[0]:
            raise UserError(
                f"{weights.path} was trained for {weights.tensors[name].shape[0] - 1} classes and "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES}; set it, or {_NEW_HEADS}."
            )


def _check_shape(path: Path, name: str, tensor: Tensor, wanted: Tensor) -> None:
    if tensor.shape != wanted.shape:
        of_head = any(names.fullmatch(name) for title, names in _HEADS.items() if title != "mask head")
        other = f", or {_NEW_HEADS}" if of_head else ""
        raise UserError(
            f"{path}: tensor {name} is {tuple(tensor.shape)} and the model takes {tuple(wanted.shape)}; the "
            f"configuration must describe the network that the weights are of{other}."
        )


def _check_complete(path: Path, matched: dict[str, Tensor], needed: Any) -> None:
    missing = [name for name in needed if name not in matched and not DROPPED.fullmatch(name)]
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]} that the model needs is not in it ({len(missing)} in all); the "
            "configuration must describe the network that the weights are of."
        )


def _check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} has values that are not finite; take weights of an earlier step.")


def check_manifest(weights: Weights, cfg: CfgNode) -> None:
    """Refuse weights whose manifest has other pixels or another network than the configuration.

    Raises:
        UserError: naming the key, the weights' value and the configuration's.
    """
    facts: dict[str, Any] = {}
    if weights.manifest is not None:
        m = weights.manifest
        is_timm, is_other = m.architecture.startswith(PREFIX), m.architecture.startswith(OTHER_BACKBONES)
        if cfg.MODEL.BACKBONE.NAME.startswith(WITH_WEIGHTS):
            raise UserError(
                f"{weights.path} is a backbone of {m.architecture} and MODEL.BACKBONE.NAME is "
                f"{cfg.MODEL.BACKBONE.NAME}, which has weights of its own; leave MODEL.WEIGHTS empty."
            )
        if is_other != cfg.MODEL.BACKBONE.NAME.startswith(OTHER_BACKBONES):
            build = m.architecture if is_other else "build_resnet_fpn_backbone"
            raise UserError(
                f"{weights.path} is a backbone of {m.architecture} and MODEL.BACKBONE.NAME is "
                f"{cfg.MODEL.BACKBONE.NAME}; set it to {build}.",
                add=f"MODEL.BACKBONE.NAME {build}",
            )
        if not is_timm and m.stem != "imagenet":
            raise UserError(
                f"{weights.path} has a {m.stem} stem, which no detector has; pretrain with BACKBONE.STEM imagenet."
            )
        facts = {
            "INPUT.FORMAT": m.channel_order,
            "MODEL.PIXEL_MEAN": list(m.pixel_mean),
            "MODEL.PIXEL_STD": list(m.pixel_std),
        }
        if is_other:
            facts["MODEL.BACKBONE.NAME"] = m.architecture
        else:
            facts["MODEL.RESNETS.DEPTH"], facts[RES2] = m.depth, m.stages["res2"].channels
        if not is_other and m.depth >= 50:
            facts["MODEL.RESNETS.STRIDE_IN_1X1"] = m.stride_in_1x1
    elif weights.pixels is not None:
        facts = weights.pixels
    ours = {**pixel_facts(cfg), RES2: config.value(cfg, RES2)}
    check_facts(weights.path, facts, ours, is_backbone=weights.is_backbone)


def check_facts(source: object, facts: Mapping[str, Any], ours: Mapping[str, Any], *, is_backbone: bool = True) -> None:
    """Refuse a configuration with other values than `source`, a file or model, was made with.

    Args:
        facts: keys and values of `source`; those that `ours` lacks do not count.
        ours: keys and values of the configuration.

    Raises:
        UserError: naming every key that differs, and the line that sets them.
    """
    wrong = {
        key: value for key, value in facts.items() if key in ours and not _fits(key, value, ours[key], is_backbone)
    }
    if wrong:
        named = ", ".join(
            f"{key} {json.dumps(value)} and the configuration has {json.dumps(ours[key])}"
            for key, value in wrong.items()
        )
        lines = " ".join(f"{key} {shell_value(value)}" for key, value in wrong.items())
        raise UserError(f"{source} was made with {named}; add {lines}", add=lines)


def pixel_facts(cfg: CfgNode) -> dict[str, Any]:
    """Return the keys that weights depend on but that no shape shows."""
    facts = {
        "INPUT.FORMAT": cfg.INPUT.FORMAT,
        "MODEL.PIXEL_MEAN": list(cfg.MODEL.PIXEL_MEAN),
        "MODEL.PIXEL_STD": list(cfg.MODEL.PIXEL_STD),
    }
    if cfg.MODEL.BACKBONE.NAME.startswith(OTHER_BACKBONES):
        names: tuple[str, ...] = ("BACKBONE.NAME", "FPN.IN_FEATURES")
    else:
        names = ("RESNETS.DEPTH", "RESNETS.STRIDE_IN_1X1")
    return {**facts, **{f"MODEL.{name}": config.value(cfg, f"MODEL.{name}") for name in names}}


def is_same_model(weights: str, ours: str, is_backbone: bool) -> bool:
    """Whether `ours` is timm's model of `weights` with all of its options, and perhaps more, such as drop path.

    A backbone may be given windows; a detector was trained with those that its name says.
    """
    (name, options), (own, chosen) = parse(weights), parse(ours)
    fixed = () if is_backbone else WINDOW_OPTIONS
    return name == own and options.items() <= chosen.items() and all(options.get(k) == chosen.get(k) for k in fixed)


def _fits(key: str, theirs: Any, ours: Any, is_backbone: bool) -> bool:
    is_name = key == "MODEL.BACKBONE.NAME"
    return _agree(theirs, ours) or (is_name and is_same_model(theirs, ours, is_backbone))


def _agree(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_agree, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return abs(a - b) <= TOLERANCE
    return a == b
