"""Loads any `BACKBONE` of the command line as a module that returns every stage's output.

| BACKBONE | |
|---|---|
| a file | anything that `loco-det convert` reads, and all of our own backbones |
| `timm:NAME` | timm's model with its pretrained weights, from the local cache or the hub |
| `random:resnet50`, `random:presnet50-cifar` | our untrained network, BatchNorm measured on training images |
| `random:timm:NAME` | timm's model untrained; BatchNorm likewise |

Shape legend: B images of S x S pixels; a stage's output is (B, C, H, W).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.backbones.presnet import PRESNET, PResNet
from loco_det.backbones.resnet import BLOCKS, STAGES, ResNet, measure_batchnorm, tensors_hash
from loco_det.convert import Stated, load_any_backbone
from loco_det.core.errors import UserError
from loco_det.images.views import normalise

_BY_STRIDE = {2: "stem", 4: "res2", 8: "res3", 16: "res4", 32: "res5"}


@dataclass
class Backbone:
    """A backbone and its input format.

    Attributes:
        name: as the user gave it.
        model: (B, 3, S, S) float32 -> {stage: (B, C, H, W)}, in the order of the stages.
        channels: C of every stage.
        order, mean, std: RGB or BGR; 0-255 units in that order.
        image_size: the default S.
        untrained: its BatchNorm statistics have to be measured.
        facts: its description in the JSON record.
    """

    name: str
    model: nn.Module
    channels: dict[str, int]
    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    untrained: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def input(self, images: Tensor, device: torch.device) -> Tensor:
        """Convert (B, 3, S, S) uint8 RGB to the model's input, on the device."""
        images = images.to(device, non_blocking=True)
        return normalise(images.flip(1) if self.order == "BGR" else images, self.mean, self.std)

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Measure an untrained model's BatchNorm statistics on `batches` of `input`."""
        measure_batchnorm(self.model, batches)
        self.model.eval()

    def weights_hash(self) -> str:
        """Return the sha256 over all tensors."""
        return tensors_hash(self.model.state_dict().items())


class _TimmStages(nn.Module):
    """timm's features_only model, with maps by stage name and channels first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        info = model.feature_info
        strides, names = info.reduction(), info.module_name()
        by_stride = len(set(strides)) == len(strides) and set(strides) <= set(_BY_STRIDE)
        # Plain transformers have a single stride: use timm's names.
        self.stage_names = [_BY_STRIDE[s] for s in strides] if by_stride else list(names)
        self.channels = dict(zip(self.stage_names, info.channels()))
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.model(x)
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return dict(zip(self.stage_names, maps))


def load_backbone_for_probe(
    name: str,
    *,
    seed: int = 0,
    image_size: int | None = None,
    branch: str | None = None,
    stated: Stated | None = None,
) -> Backbone:
    """Load the backbone `name`, in eval mode on the CPU; see the module's table.

    Args:
        seed: seed of an untrained model's weights.
        image_size: side of the images; some of timm's models are built for a fixed one.
        branch, stated: options of a file, as for `convert`.

    Raises:
        UserError: no such file or model, or its weights are unavailable.
    """
    kind, _, rest = name.partition(":")
    if kind not in ("random", "timm") and kind != name and not re.search(r"[\\/.]", kind):
        raise UserError(f"backbone {name!r}: the kind {kind!r} is unknown; give a file, timm:NAME or random:resnet50")
    if kind not in ("random", "timm"):
        model, manifest = load_any_backbone(name, branch, stated=stated)
        default = 32 if manifest.stem == "cifar" else 224
        size = manifest.config.get("DATA", {}).get("IMAGE_SIZE", default)
        facts = {"architecture": manifest.architecture, "stem": manifest.stem, "source": manifest.method}
        pixels = (manifest.channel_order, manifest.pixel_mean, manifest.pixel_std)
        return Backbone(name, model, model.channels, *pixels, size, facts=facts)
    if branch is not None or stated:
        raise UserError(f"backbone {name!r}: --branch and the pixel options are for files; leave them out")
    torch.manual_seed(seed)
    if kind == "timm":
        return _timm(name, rest, pretrained=True, image_size=image_size)
    if rest.startswith("timm:"):
        return _timm(name, rest.removeprefix("timm:"), pretrained=False, image_size=image_size)
    return _random(name, rest)


def _random(name: str, rest: str) -> Backbone:
    networks = {**{f"resnet{depth}": partial(ResNet, depth) for depth in BLOCKS}, PRESNET: PResNet}
    models = {f"{network}{suffix}": (network, stem) for network in networks for suffix, stem in _STEMS.items()}
    if rest not in models:
        raise UserError(f"backbone {name!r}: {rest!r} is unknown; use random: with one of {', '.join(models)}")
    network, stem = models[rest]
    model = networks[network](stem=stem).eval()
    facts = {"architecture": network, "stem": stem, "source": "random"}
    size = 32 if stem == "cifar" else 224
    return Backbone(name, model, model.channels, "RGB", IMAGENET_MEAN, IMAGENET_STD, size, untrained=True, facts=facts)


_STEMS = {"": "imagenet", "-cifar": "cifar"}


def _timm(name: str, rest: str, *, pretrained: bool, image_size: int | None) -> Backbone:
    import timm  # takes seconds, so only if needed
    from timm.data import resolve_model_data_config

    if not timm.is_model(rest):
        close = ", ".join(timm.list_models(f"*{rest.split('.')[0]}*")[:5]) or "timm.list_models() shows all"
        raise UserError(f"backbone {name!r}: timm {timm.__version__} has no model {rest!r} ({close})")
    sized = {"img_size": image_size} if image_size and _takes_size(rest) else {}
    try:
        model = timm.create_model(rest, pretrained=pretrained, features_only=True, **sized)
    except Exception as error:  # hub libraries raise various exceptions offline
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = (
            f"connect to the hub once (weights are then in its cache), or give the weights as a file, or use "
            f"random:timm:{rest} for an untrained one"
            if pretrained
            else "choose a model that gives feature maps (features_only)"
        )
        raise UserError(f"backbone {name!r}: timm could not build it ({reason}); {remedy}") from error
    stages = _TimmStages(model).eval()
    config = resolve_model_data_config(model)
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))
    facts = {"architecture": rest, "source": f"timm {timm.__version__}" + ("" if pretrained else ", random")}
    size = config["input_size"][-1]
    return Backbone(name, stages, stages.channels, "RGB", mean, std, size, untrained=not pretrained, facts=facts)


def _takes_size(model: str) -> bool:
    """Whether timm's model has a fixed grid of patches for one image size."""
    import timm

    fixed = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return bool(fixed and fixed.fixed_input_size)


def choose_stages(backbone: Backbone, wanted: list[str] | None) -> list[str]:
    """Return the stages to probe, in the backbone's order; all by default.

    Raises:
        UserError: a stage that this backbone lacks.
    """
    there = list(backbone.channels)
    unknown = [stage for stage in wanted or [] if stage not in there]
    if unknown:
        known = STAGES if set(there) <= set(STAGES) else there
        raise UserError(f"--stages {unknown[0]!r} is no stage of {backbone.name}; use {', '.join(known)}")
    return [stage for stage in there if not wanted or stage in wanted]
