"""Backbones of a detector: normalised, padded images to ResNet stages (C4, DC5) or a feature pyramid of any backbone.

Shape legend: B images, image i (3, Hi, Wi), padded to (B, 3, H, W); a feature of stride s is (B, C, H/s, W/s).
Both backbones have `channels` and `strides` (by feature name) and `size_divisibility` (0: no padding beyond the
largest image of the batch).
Source: detectron2/modeling/meta_arch/rcnn.py, structures/image_list.py, modeling/backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.backbones import own
from loco_det.backbones.hf_models import HfBackbone
from loco_det.backbones.networks import OWN_NETWORKS
from loco_det.backbones.presnet import PRESNET, PResNet
from loco_det.backbones.resnet import LayerNorm, ResNet, freeze
from loco_det.backbones.shufflenet import ShuffleNet
from loco_det.backbones.timm_models import PREFIX, TimmBackbone, parse
from loco_det.core.errors import UserError
from loco_det.core.own_keys import own_value
from loco_det.detection.deformable import deformable
from loco_det.detection.feature_cache import FeatureCache
from loco_det.detection.layers import Conv, c2_xavier_fill
from loco_det.detection.pyramid import STRIDE, SimpleFeaturePyramid
from loco_det.detection.weights import check_facts, pixel_facts

Batch = Sequence[dict[str, Any]]


class Trunk(nn.Module):
    """Mixin of a detector's backbones: builds no graph if it is entirely frozen, and reads features from a cache.

    Attributes:
        out_features: the stages whose maps it returns.
        level_norm_eps: epsilon of a norm that a feature pyramid puts behind each map; None: no norm.
        cache: of features in evaluation.
        train_cache: of features in training.
        in_training: the mode that the detector was set to, while a frozen module may stay in evaluation.
    """

    size_divisibility = 0
    fast = False  # form of its convolutions; the cache separates the two
    out_features: tuple[str, ...]
    cache: FeatureCache | None = None
    train_cache: FeatureCache | None = None
    in_training = True
    level_norm_eps: float | None = None

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) normalised images -> {stage: feature} for the stages of `out_features`."""
        cache = self.train_cache if self.in_training else self.cache
        if cache is None:
            return self._compute(x)
        if not self.in_training:
            return cache(x, self._compute, self.fast)
        found = [cache(one[None], self._compute, self.fast) for one in x]
        return {name: torch.cat([maps[name] for maps in found]) for name in found[0]}

    def train(self, mode: bool = True) -> Trunk:
        self.in_training = mode
        return super().train(mode)

    def _compute(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        trained = any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self._maps(x)

    def _maps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: map_ for name, map_ in super().forward(x).items() if name in self.out_features}


class ResNetTrunk(Trunk, ResNet):
    """A detector's ResNet, its first MODEL.BACKBONE.FREEZE_AT stages frozen."""

    def __init__(self, cfg: CfgNode) -> None:
        resnets = cfg.MODEL.RESNETS
        unknown = [name for name in resnets.OUT_FEATURES if name not in ("stem", "res2", "res3", "res4", "res5")]
        if unknown or not resnets.OUT_FEATURES:
            raise UserError(
                f"MODEL.RESNETS.OUT_FEATURES {list(resnets.OUT_FEATURES)} must name one or more of stem, res2, "
                "res3, res4, res5"
            )
        super().__init__(
            resnets.DEPTH,
            norm=resnets.NORM,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            groups=resnets.NUM_GROUPS,
            width_per_group=resnets.WIDTH_PER_GROUP,
            res2_out_channels=resnets.RES2_OUT_CHANNELS,
            stem_channels=resnets.STEM_OUT_CHANNELS,
            res5_dilation=resnets.RES5_DILATION,
            last_stage=max(resnets.OUT_FEATURES, key=("stem", "res2", "res3", "res4", "res5").index),
        )
        self.out_features = tuple(resnets.OUT_FEATURES)
        for name, deform in zip(self.stage_names[1:], resnets.DEFORM_ON_PER_STAGE):
            if deform:
                setattr(self, name, deformable(getattr(self, name)))
        for name in self.stage_names[: max(0, cfg.MODEL.BACKBONE.FREEZE_AT)]:
            freeze(getattr(self, name))

    def _maps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = {}
        for name in self.stage_names:  # those that are not asked for are freed at once
            x = getattr(self, name)(x)
            if name in self.out_features:
                maps[name] = x
        return maps


class StagedTrunk(Trunk):
    """Mixin of a detector's other networks: the maps of MODEL.FPN.IN_FEATURES, each resized to a power of two.

    The stride of a map is the power of two nearest to its own, so that the pyramid's levels halve one another: 4, 8, 16
    and 32 for PResNet-50's res2, res3, res5 and res7, whose own are 4, 6.2, 14 and 28. MODEL.RESNETS.NORM is the
    network's normalisation; its first MODEL.BACKBONE.FREEZE_AT stages are frozen, and for 5 or more, as in every other
    backbone, all of them: PResNet-50 has seven.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(norm=cfg.MODEL.RESNETS.NORM)
        wanted = list(cfg.MODEL.FPN.IN_FEATURES)
        unknown = [name for name in wanted if name not in self.channels]
        if unknown or not wanted:
            raise UserError(
                f"MODEL.FPN.IN_FEATURES {wanted} must name stages of {self.architecture}: {', '.join(self.channels)}"
            )
        self.out_features = tuple(wanted)
        self.strides = {name: 2 ** round(math.log2(stride)) for name, stride in self.strides.items()}
        frozen = cfg.MODEL.BACKBONE.FREEZE_AT
        for name in self.stage_names[: max(0, frozen) if frozen < 5 else None]:
            freeze(getattr(self, name))

    def _maps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for name, map_ in super()._maps(x).items():
            size = [-(-side // self.strides[name]) for side in x.shape[2:]]
            same = list(map_.shape[2:]) == size
            found[name] = map_ if same else F.interpolate(map_, size=size, mode="bilinear", align_corners=False)
        return found


class PResNetTrunk(StagedTrunk, PResNet):
    """A detector's Progressive ResNet-50, `presnet50`."""


class ShuffleNetTrunk(StagedTrunk, ShuffleNet):
    """A detector's ShuffleNet v2-50, `shufflenetv2_50`."""


class TimmTrunk(Trunk, TimmBackbone):
    """A detector's model of timm, `timm:NAME`, its first MODEL.BACKBONE.FREEZE_AT stages frozen.

    MODEL.FPN.IN_FEATURES names its maps: stages of a hierarchical one; of a plain transformer, at stride 16, "norm",
    "blocks.N" or "norm(blocks.N)" (see `TimmBackbone`), and none for the last block's, normalised.
    """

    def __init__(self, cfg: CfgNode) -> None:
        name, options = parse(cfg.MODEL.BACKBONE.NAME)
        wanted = list(cfg.MODEL.FPN.IN_FEATURES)
        super().__init__(name, map_stride=STRIDE, maps=wanted or ["norm"], **options)
        self.out_features = tuple(self.channels if self.is_plain else wanted)
        self.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


class FPN(nn.Module):
    """Feature pyramid p2..p5 over res2..res5, and p6 by subsampling p5.

    Source: FPN section 3; detectron2/modeling/backbone/fpn.py.

    Args:
        bottom_up: the backbone; with its `level_norm_eps` each map goes through a LayerNorm, `fpn_norm2` to 5, first.
            These are of the pyramid: they are trained on a frozen backbone too, as in Swin's and ConvNeXt's code.
        in_features: its stages from fine to coarse, each half the size of the previous one, the last of stride 32.
        out_channels: channels of every level.
        norm: "" for biases instead, or a normalisation's name.
        average: halve the sum of lateral and top-down features.
    """

    def __init__(self, bottom_up: Trunk, in_features: list[str], out_channels: int, norm: str, average: bool) -> None:
        super().__init__()
        strides = [bottom_up.strides.get(name) for name in in_features]
        if not strides or None in strides or any(32 >> i != s for i, s in enumerate(reversed(strides))):
            known = ", ".join(f"{name} (stride {stride})" for name, stride in bottom_up.strides.items())
            where = " (MODEL.RESNETS.OUT_FEATURES, RES5_DILATION 1)" if isinstance(bottom_up, ResNet) else ""
            raise UserError(
                f"MODEL.FPN.IN_FEATURES {list(in_features)} has strides {strides}, and {bottom_up.architecture} has "
                f"{known}; name neighbouring ones from fine to coarse, ending in one of stride 32{where}"
            )
        self.in_features = tuple(in_features)
        self.average = average
        self.levels = [int(math.log2(stride)) for stride in strides]
        for name, level in zip(in_features, self.levels):
            lateral = Conv(bottom_up.channels[name], out_channels, 1, norm)
            output = Conv(out_channels, out_channels, 3, norm)
            c2_xavier_fill(lateral)
            c2_xavier_fill(output)
            if bottom_up.level_norm_eps is not None:
                self.add_module(f"fpn_norm{level}", LayerNorm(bottom_up.channels[name], bottom_up.level_norm_eps))
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        self.bottom_up = bottom_up
        self.strides = {f"p{level}": 2**level for level in [*self.levels, self.levels[-1] + 1]}
        self.channels = dict.fromkeys(self.strides, out_channels)
        self.size_divisibility = strides[-1]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) with H and W multiples of 32 -> {"p2": (B, C, H/4, W/4), ..., "p6": (B, C, H/64, W/64)}."""
        features = self.bottom_up(images)
        outputs: dict[str, torch.Tensor] = {}
        above: torch.Tensor | None = None
        for name, level in reversed(list(zip(self.in_features, self.levels))):
            x = features[name]
            if self.bottom_up.level_norm_eps is not None:
                x = getattr(self, f"fpn_norm{level}")(x)
            x = getattr(self, f"fpn_lateral{level}")(x)
            if above is not None:
                x = x + F.interpolate(above, scale_factor=2.0, mode="nearest")
                x = x / 2 if self.average else x
            above = x
            outputs[f"p{level}"] = getattr(self, f"fpn_output{level}")(x)
        coarsest = self.levels[-1]
        outputs[f"p{coarsest + 1}"] = F.max_pool2d(outputs[f"p{coarsest}"], kernel_size=1, stride=2)
        return {name: outputs[name] for name in self.strides}


class HfTrunk(Trunk, HfBackbone):
    """A detector's model of transformers, `hf:FOLDER`, its first MODEL.BACKBONE.FREEZE_AT stages frozen.

    MODEL.FPN.IN_FEATURES names its maps: stages of a hierarchical one, `stageN` of a plain transformer, and none for
    that of its last block.
    """

    def __init__(self, cfg: CfgNode) -> None:
        wanted = list(cfg.MODEL.FPN.IN_FEATURES)
        super().__init__(cfg.MODEL.BACKBONE.NAME.removeprefix(own.HF_PREFIX), map_stride=STRIDE, maps=wanted)
        mean, std = ([round(value, 4) for value in values] for values in (self.pixel_mean, self.pixel_std))
        facts = {"INPUT.FORMAT": self.order, "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
        check_facts(self.architecture, facts, pixel_facts(cfg))
        self.out_features = tuple(wanted or list(self.channels)[-1:]) if self.is_plain else tuple(wanted)
        if self.is_plain:
            self.channels = {stage: self.channels[stage] for stage in self.out_features}
            self.strides = dict.fromkeys(self.out_features, STRIDE)
        self.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


class OwnTrunk(Trunk, own.OwnBackbone):
    """A detector's module of the user, `python:package.module:function`, frozen as a whole or not at all."""

    def __init__(self, cfg: CfgNode) -> None:
        name, wanted = cfg.MODEL.BACKBONE.NAME, list(cfg.MODEL.FPN.IN_FEATURES)
        module = own.find(name)
        super().__init__(module, name)
        if not isinstance(module, own.OwnBackbone):  # of one given from Python it is known
            self.on_oblong()
        unknown = [stage for stage in wanted if stage not in self.channels]
        if unknown:
            known = ", ".join(self.channels)
            raise UserError(f"MODEL.FPN.IN_FEATURES: {name} has no map {unknown[0]!r}; its maps are {known}")
        self.out_features = tuple(wanted or self.channels)
        self.channels = {stage: self.channels[stage] for stage in self.out_features}
        self.strides = {stage: self.strides[stage] for stage in self.out_features}
        self.is_plain = len(set(self.strides.values())) == 1
        self.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


def build_backbone(cfg: CfgNode) -> ResNetTrunk | FPN | SimpleFeaturePyramid:
    """Build the backbone named by MODEL.BACKBONE.NAME, its first MODEL.BACKBONE.FREEZE_AT stages frozen."""
    fpn = cfg.MODEL.FPN
    kind = cfg.MODEL.BACKBONE.NAME.partition(":")[0] + ":"
    others = {PREFIX: TimmTrunk, own.HF_PREFIX: HfTrunk, own.PREFIX: OwnTrunk}
    if kind in others:
        trunk = others[kind](cfg)
        if trunk.is_plain:
            return SimpleFeaturePyramid(trunk, fpn.OUT_CHANNELS, fpn.NORM)
    elif cfg.MODEL.BACKBONE.NAME in OWN_NETWORKS:
        trunk = PResNetTrunk(cfg) if cfg.MODEL.BACKBONE.NAME == PRESNET else ShuffleNetTrunk(cfg)
    else:
        trunk = ResNetTrunk(cfg)
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone":
        return trunk
    return FPN(trunk, list(fpn.IN_FEATURES), fpn.OUT_CHANNELS, fpn.NORM, fpn.FUSE_TYPE == "avg")


class Network(nn.Module):
    """Base of every network: its backbone, and the normalisation and padding of images.

    Attributes:
        padding_unit: padded images have multiples of it as sides.
    """

    fast = False  # set for all parts by `cpu_speed.speed_up`

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.square_pad = own_value(cfg, "MODEL.BACKBONE.SQUARE_PAD")
        self.padding_unit = self.square_pad or self.backbone.size_divisibility
        # Not persistent: not in Detectron2's checkpoints.
        for name in ("pixel_mean", "pixel_std"):
            value = torch.tensor(cfg.MODEL[name.upper()], dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def _check_features(self, section: str, names: Sequence[str]) -> None:
        known = list(self.backbone.channels)
        if not names or any(name not in known for name in names):
            raise UserError(
                f"MODEL.{section}.IN_FEATURES {list(names)} must be features of the backbone: {', '.join(known)}"
            )

    def preprocess(self, batch: Batch) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Return normalised float32 images, zero-padded on the right and bottom to one size, and each (Hi, Wi)."""
        device = self.pixel_mean.device
        images = [(item["image"].to(device, non_blocking=True) - self.pixel_mean) / self.pixel_std for item in batch]
        sizes = [tuple(image.shape[-2:]) for image in images]
        if self.square_pad and max(map(max, sizes)) > self.square_pad:
            height, width = max(sizes, key=max)
            raise UserError(
                f"MODEL.BACKBONE.SQUARE_PAD is {self.square_pad}, and an image has {height} x {width} pixels after "
                "resizing; raise it, or lower the sizes of INPUT and TEST.AUG."
            )
        return pad(images, self.padding_unit, 0), sizes


def pad(images: Sequence[torch.Tensor], unit: int, value: float) -> torch.Tensor:
    """Stack (..., Hi, Wi) tensors as (B, ..., H, W), padded with `value` on the right and bottom.

    H and W are the smallest multiples of `unit` that hold all; for 0 the largest height and width.
    """
    unit = max(unit, 1)
    height, width = (-(-max(lengths) // unit) * unit for lengths in zip(*(image.shape[-2:] for image in images)))
    padded = images[0].new_full((len(images), *images[0].shape[:-2], height, width), value)
    for row, image in zip(padded, images):
        row[..., : image.shape[-2], : image.shape[-1]] = image
    return padded
