"""Loads any `BACKBONE` of the command line as a module that returns every stage's output.

| BACKBONE | |
|---|---|
| a file | anything that `loco-det convert` reads, and all of our own backbones |
| `timm:NAME` | timm's model with its pretrained weights, from the local cache or the hub |
| `hf:FOLDER`, `hf:NAME` | a model of transformers with its weights (extra `hf`) |
| `random:resnet50`, `random:presnet50-cifar` | our untrained network, BatchNorm measured on training images |
| `random:timm:NAME` | timm's model untrained; BatchNorm likewise |

Shape legend: B images of S x S pixels; a stage's output is (B, C, H, W).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.backbones.hf_models import HfBackbone
from loco_det.backbones.networks import NETWORKS, build_network
from loco_det.backbones.own import OwnBackbone
from loco_det.backbones.resnet import STAGES, measure_batchnorm, tensors_hash
from loco_det.backbones.timm_models import TimmBackbone, parse
from loco_det.convert import Stated, read_backbone
from loco_det.core.errors import UserError
from loco_det.images.decode import read_image
from loco_det.images.indexed import DatasetSource
from loco_det.images.two_views import build_plain_loader
from loco_det.images.views import normalise

MEASURED, MEASURED_BATCH = 512, 32  # images for the statistics of an untrained backbone


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
        branch: of the file.
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
    branch: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def input(self, images: Tensor, device: torch.device) -> Tensor:
        """Convert (B, 3, S, S) uint8 RGB to the model's input, on the device."""
        images = images.to(device, non_blocking=True)
        return normalise(images.flip(1) if self.order == "BGR" else images, self.mean, self.std)

    def features(self, images: Any, *, pooled: bool = False, batch: int = 64) -> dict[str, Tensor]:
        """Compute the maps of images, without a graph.

        Args:
            images: (B, 3, S, S) uint8 RGB, as they are; or a list of paths, PIL images or (H, W, 3) uint8 RGB arrays,
                which are scaled and centre-cropped to `image_size`.
            pooled: average each map over the image: (B, C) instead of (B, C, h, w).
            batch: images at a time.

        Raises:
            UserError: an image that cannot be read, something else than a list of images, or no images at a time.
        """
        if not isinstance(batch, int) or batch < 1:
            raise UserError(f"batch {batch!r}: give a whole number of at least 1")
        device = next((t.device for t in self.model.parameters()), torch.device("cpu"))
        parts: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for some in _batches(images, self.image_size, batch):
                for stage, map_ in self.model(self.input(some, device)).items():
                    parts.setdefault(stage, []).append(map_.float().mean((2, 3)) if pooled else map_)
        return {stage: torch.cat(maps) for stage, maps in parts.items()}

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Measure an untrained model's BatchNorm statistics on `batches` of `input`."""
        measure_batchnorm(self.model, batches)
        self.model.eval()

    def weights_hash(self) -> str:
        """Return the sha256 over all tensors."""
        return tensors_hash(self.model.state_dict().items())


def _batches(images: Any, size: int, batch: int) -> Iterator[Tensor]:
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise UserError(f"images are {tuple(images.shape)} {images.dtype}; give (B, 3, S, S) uint8, or a list")
        yield from images.split(batch)
        return
    if not isinstance(images, Sequence) or isinstance(images, (str, bytes)) or not len(images):
        kind = type(images).__name__
        raise UserError(f"images are a {kind}; give a list of paths, images or arrays, [image] for one, or a batch")
    pictures = [_picture(image) for image in images]
    for found in build_plain_loader(DatasetSource(pictures, root="images"), size, batch_size=batch):
        yield found.images


def _picture(image: Any) -> Any:
    return Image.fromarray(read_image(image, "RGB")) if isinstance(image, (str, Path)) else image


def own_backbone(
    module: nn.Module,
    image_size: int,
    order: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    untrained: bool = False,
) -> Backbone:
    """Wrap a module of the user; `order`, `mean`, `std` and `untrained` as in `Backbone`, None for ImageNet's pixels.

    Raises:
        UserError: it gives no maps, or the pixels are no three numbers in 0-255 units.
    """
    name = type(module).__name__
    for key, values in (("mean", mean), ("std", std)):
        numbers = values if isinstance(values, (list, tuple)) else [None]
        least = 0 if key == "mean" else 1e-6
        sound = len(numbers) == 3 and all(isinstance(v, (int, float)) and least <= v <= 255 for v in numbers)
        if values is not None and not sound:
            raise UserError(f"backbone {name}: {key} {values!r} is no list of three numbers in 0-255 units")
    if mean and 0 < max(mean) <= 1:
        scaled = [round(255 * value, 3) for value in mean]
        raise UserError(
            f"backbone {name}: mean {mean!r} is in 0-1 units; multiply mean and std by 255: mean={scaled}, std=..."
        )
    if order not in ("RGB", "BGR"):
        raise UserError(f"backbone {name}: order {order!r} is neither RGB nor BGR")
    model = OwnBackbone(module, name, image_size).eval()
    facts = {"architecture": name, "source": "a module"}
    pixels = (order, tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD))
    return Backbone(name, model, model.channels, *pixels, image_size, untrained=untrained, facts=facts)


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
        image_size: side of the images; None: the backbone's own; some of timm's models are built for a fixed one.
        branch, stated: options of a file, as for `convert`.

    Raises:
        UserError: no such file or model, or its weights are unavailable.
    """
    kind, _, rest = name.partition(":")
    if kind not in _KINDS and kind != name and not re.search(r"[\\/.]", kind):
        raise UserError(
            f"backbone {name!r}: the kind {kind!r} is unknown; give a file, timm:NAME, hf:FOLDER or random:resnet50"
        )
    if kind not in _KINDS:
        if re.fullmatch(r"[\w-]+", name) and not Path(name).exists():
            raise UserError(
                f"backbone {name!r}: there is no such file; for a model of timm write timm:{name}, for its untrained "
                f"network random:timm:{name}"
            )
        model, manifest = read_backbone(name, branch, stated=stated)
        default = 32 if manifest.stem == "cifar" else getattr(model, "image_size", 224)
        size = image_size or manifest.config.get("DATA", {}).get("IMAGE_SIZE", default)
        facts = {"architecture": manifest.architecture, "stem": manifest.stem, "source": manifest.method}
        pixels = (manifest.channel_order, manifest.pixel_mean, manifest.pixel_std)
        return Backbone(name, model, model.channels, *pixels, size, branch=branch, facts=facts)
    if branch is not None or stated:
        raise UserError(f"backbone {name!r}: --branch and the pixel options are for files; leave them out")
    torch.manual_seed(seed)
    if kind == "hf":
        found = HfBackbone(rest, image_size=image_size).eval()
        facts = {"architecture": name, "source": "transformers"}
        pixels = (found.order, found.pixel_mean, found.pixel_std)
        return Backbone(name, found, found.channels, *pixels, found.image_size, facts=facts)
    if kind == "timm":
        return _timm(name, rest, pretrained=True, image_size=image_size)
    if rest.startswith("timm:"):
        return _timm(name, rest.removeprefix("timm:"), pretrained=False, image_size=image_size)
    return _random(name, rest, image_size)


_KINDS = ("random", "timm", "hf")


def _random(name: str, rest: str, image_size: int | None) -> Backbone:
    models = {f"{network}{suffix}": (network, stem) for network in NETWORKS for suffix, stem in _STEMS.items()}
    if rest not in models:
        raise UserError(f"backbone {name!r}: {rest!r} is unknown; use random: with one of {', '.join(models)}")
    network, stem = models[rest]
    model = build_network(network, stem=stem).eval()
    facts = {"architecture": network, "stem": stem, "source": "random"}
    size = image_size or (32 if stem == "cifar" else 224)
    return Backbone(name, model, model.channels, "RGB", IMAGENET_MEAN, IMAGENET_STD, size, untrained=True, facts=facts)


_STEMS = {"": "imagenet", "-cifar": "cifar"}


def _timm(name: str, rest: str, *, pretrained: bool, image_size: int | None) -> Backbone:
    import timm  # takes seconds, so only if needed

    timm_name, options = parse(rest)
    model = TimmBackbone(timm_name, pretrained=pretrained, image_size=image_size, **options).eval()
    facts = {"architecture": rest, "source": f"timm {timm.__version__}" + ("" if pretrained else ", random")}
    pixels = ("RGB", model.pixel_mean, model.pixel_std)
    return Backbone(name, model, model.channels, *pixels, model.image_size, untrained=not pretrained, facts=facts)


def measure_on(backbone: Backbone, images: Sequence[Path], seed: int) -> None:
    """Measure an untrained backbone's BatchNorm statistics on some images, chosen by `seed`: the baseline "random"."""
    order = np.random.default_rng(seed).permutation(len(images))[:MEASURED]
    # Whole batches: the statistics of a smaller last one would count as much as theirs.
    whole = max(1, len(order) // MEASURED_BATCH) * MEASURED_BATCH
    source = DatasetSource([images[i] for i in order[:whole]], root="images")
    loader = build_plain_loader(source, backbone.image_size, batch_size=MEASURED_BATCH)
    backbone.measure(backbone.input(found.images, torch.device("cpu")) for found in loader)


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
