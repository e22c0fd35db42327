"""Caches the features of a frozen backbone on disk, for evaluations and trainings that repeat the same images.

In a sweep over seeds or shares of the data, all detectors share one frozen backbone. With a cache each test image goes
through it once: DIR gets one file per image, named by the hash of everything its content depends on, so files are never
stale and several runs can share DIR. Reading returns the computed features bit for bit, in the same layout and the
network's dtype (float32, except under autocast).

Training images are cached as they enter the network, resized, mirrored or not, and padded to their batch's size. Each
goes through the backbone alone, so that a file does not depend on the others of its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det import __version__
from loco_det.backbones.resnet import BatchNorm, is_still, tensors_hash
from loco_det.convert.load import load_tensors
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, check_writable
from loco_det.core.log import log
from loco_det.core.own_keys import own_value

Features = dict[str, Tensor]


class FeatureCache:
    """Stores the features that a network computes of each input.

    Args:
        folder: folder of the files.
        identity: hash of the network's weights and configuration.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.logged = self.full = False

    def __call__(self, x: Tensor, compute: Callable[[Tensor], Features], fast: bool) -> Features:
        """Return `compute(x)`, from disk if present.

        A file with a wrong checksum is rewritten. After the first failed write, as on a full disk, nothing more is
        written.

        Args:
            x: (B, 3, H, W).
            fast: `compute` may round differently from Detectron2.
        """
        path = self.folder / f"{self._key(x, fast)}.pt"
        if path.is_file() and (features := _read(path, x.device)) is not None:
            return features
        features = compute(x)
        if not self.logged:
            size = sum(tensor.numel() * tensor.element_size() for tensor in features.values())
            log.info("feature cache %s: this image takes %.1f MB", self.folder, size / 1e6)
            self.logged = True
        if not self.full:
            self._write(path, features)
        return features

    def _write(self, path: Path, features: Features) -> None:
        try:
            with atomic_write(path) as file:
                torch.save(features, file)
        except UserError as error:  # the evaluation continues without it
            self.full = True
            log.warning("feature cache: %s; further features are not cached", error)

    def _key(self, x: Tensor, fast: bool) -> str:
        """Hash weights, configuration, image, software and everything else that affects rounding."""
        place = torch.cuda.get_device_name(x.device) if x.is_cuda else torch.backends.cpu.get_cpu_capability()
        products = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32  # FLOAT32_PRECISION
        precision = fast, torch.is_autocast_enabled(x.device.type), torch.get_num_threads(), *products
        software = __version__, torch.__version__, torchvision.__version__
        settings = self.identity, *software, x.device.type, place, *precision
        return hashlib.sha256(f"{settings} {tensors_hash([('x', x)])}".encode()).hexdigest()


def _read(path: Path, device: torch.device) -> Features | None:
    """Read the features in a file; None if its checksums are wrong."""
    try:
        features = load_tensors(path)
    except UserError:
        log.warning("feature cache: %s is damaged and rewritten", path)
        return None
    return {name: tensor.to(device) for name, tensor in features.items()}


def check_cacheable(cfg: CfgNode, engine: str, *, training: bool = False) -> None:
    """Check that engine and configuration allow a cache of test or of training images, before a model is built.

    Raises:
        UserError: the engine has no cache, or augmentation other than mirroring changes the inputs.
    """
    option = _option(training)
    if engine != "torchvision":
        raise UserError(f"{option} is the torchvision engine's; add --engine torchvision, or leave it out.")
    reason = _varying(cfg) if training else "set TEST.AUG.ENABLED False" if cfg.TEST.AUG.ENABLED else ""
    if reason:
        raise UserError(f"{option} is for images of one fixed size; {reason}, or leave it out.")


def _varying(cfg: CfgNode) -> str:
    """What to change so that a training image has one form and its mirror image; empty: nothing."""
    if own_value(cfg, "INPUT.SCALE_JITTER"):
        return "set INPUT.SCALE_JITTER ()"
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if isinstance(sizes, (tuple, list)) and len(set(sizes)) > 1:
        return f"set INPUT.MIN_SIZE_TRAIN {tuple(sizes)} to one size"
    return "set INPUT.CROP.ENABLED False" if cfg.INPUT.CROP.ENABLED else ""


def _option(training: bool) -> str:
    return "--train-feature-cache" if training else "--feature-cache"


def use_cache(model: nn.Module, cfg: CfgNode, folder: Path, *, training: bool = False) -> None:
    """Let a loaded detector read its frozen backbone's features from `folder`, in evaluation or in training.

    Raises:
        UserError: the backbone is not entirely frozen, or the folder cannot be written.
    """
    backbone = model.backbone
    trunk = getattr(backbone, "bottom_up", getattr(backbone, "net", backbone))
    moving = [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]
    moving += [name for name, m in trunk.named_modules() if isinstance(m, BatchNorm) and not is_still(m)]
    if moving:
        raise UserError(
            f"{_option(training)} needs a frozen backbone, but MODEL.BACKBONE.FREEZE_AT {cfg.MODEL.BACKBONE.FREEZE_AT} "
            f"leaves {moving[0]} to training; raise it (5 freezes everything), or leave the option out."
        )
    check_writable(folder / "features.pt")
    settings = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.dump()
    identity = tensors_hash(trunk.state_dict().items()), settings, trunk.out_features
    cache = FeatureCache(folder, hashlib.sha256(repr(identity).encode()).hexdigest())
    setattr(trunk, "train_cache" if training else "cache", cache)
