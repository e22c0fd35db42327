"""Validates a pretraining configuration once, before images are read or a network is built.

UNITS and SOLVER.RECOMPUTE name blocks of the backbone and are validated when it is split (pretrain/loco.py).
"""

from __future__ import annotations

from fvcore.common.config import CfgNode

from loco_det.backbones.networks import NETWORKS
from loco_det.backbones.own import HF_PREFIX
from loco_det.backbones.presnet import PRESNET
from loco_det.backbones.resnet import STEM_CHANNELS
from loco_det.backbones.timm_models import PREFIX
from loco_det.core import config
from loco_det.core.config import Settings, refusal
from loco_det.core.device import resolve_device
from loco_det.core.distributed import world_size
from loco_det.images.two_views import augmenting_device
from loco_det.images.views import view_config
from pretrain.loco import METHODS
from pretrain.stage_parallel import SCHEDULES

_MOST = 10**9  # for values without another upper limit; more is a typing error, infinite, or overflows
# Minimum and maximum, both inclusive.
RANGES = {
    "DECODER.CONV_BLOCKS": (0, 1000),
    "DECODER.MLP_LAYERS": (1, 4),
    "DECODER.HIDDEN_DIM": (0, 2**20),
    "DECODER.OUT_DIM": (1, 2**20),
    "LOSS.TEMPERATURE": (1e-6, _MOST),
    "LOSS.CHUNK": (0, _MOST),
    "DATA.IMAGE_SIZE": (1, 2**14),
    "DATA.NUM_WORKERS": (-1, _MOST),
    "DATA.SHUFFLE_BUFFER": (1, _MOST),
    "DATA.MAX_BAD_SHARE": (0, 1),
    "SOLVER.BASE_LR": (0, _MOST),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WEIGHT_DECAY": (0, _MOST),
    "SOLVER.BATCH_SIZE": (1, _MOST),
    "SOLVER.ACCUMULATE": (1, _MOST),
    "SOLVER.EPOCHS": (0, _MOST),
    "SOLVER.MAX_STEPS": (0, _MOST),
    "SOLVER.WARMUP_EPOCHS": (0, _MOST),
    "KNN.PERIOD": (0, _MOST),
    "KNN.IMAGES": (1, _MOST),
    "KNN.K": (1, _MOST),
    "KNN.TEMPERATURE": (1e-6, _MOST),
    "LOG_PERIOD": (1, _MOST),
    "CHECKPOINT_PERIOD": (1, _MOST),
    "SHARING.PENALTY": (0, _MOST),
    "SEED": (-(2**63), 2**63 - 1),
}
_OTHERS = (PREFIX, HF_PREFIX)  # beginnings of names of networks that are not this package's
NO_RECOMPUTE = (None, "none", "", [], ())
CHOICES = {
    "BACKBONE.STEM": ("imagenet", "cifar"),
    "BACKBONE.NORM": ("BN", "SyncBN"),
    "DECODER.CONV": ("blocks", "stage", "full"),
    "SHARING.MODE": ("hard", "upper", "soft"),
    "SOLVER.OPTIMIZER": ("lars", "sgd", "adamw"),
    "SOLVER.PARALLEL": ("data", "stages"),
    "SOLVER.SCHEDULE": SCHEDULES,
    "SOLVER.AMP": ("none", "bf16", "fp16"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
}


def check(cfg: CfgNode, settings: Settings | None = None) -> None:
    """Refuse a value that is invalid, alone or in combination.

    Args:
        cfg: a complete configuration.
        settings: what the user set (`loco_det.core.config.load_config`), for the origin in messages.

    Raises:
        UserError: naming the origin, the key, its value and the accepted values.
    """
    for key, (least, most) in RANGES.items():
        value = config.value(cfg, key)
        if not value >= least:  # also for NaN
            raise refusal(cfg, settings, key, f"; use {least} or more")
        if value > most:
            raise refusal(cfg, settings, key, f"; use {most} or less")
    for key, choices in CHOICES.items():
        if config.value(cfg, key) not in choices:
            raise refusal(cfg, settings, key, f"; use one of {', '.join(choices)}")
    if not cfg.UNITS and cfg.METHOD not in (*METHODS, "random"):
        raise refusal(cfg, settings, "METHOD", f"; use one of {', '.join(METHODS)} or random, or set UNITS")
    _check_solver(cfg, settings)
    _check_parallel(cfg, settings)
    _check_backbone(cfg, settings)
    _check_decoder(cfg, settings)
    _check_sharing(cfg, settings)
    augmenting_device(cfg.AUGMENT.DEVICE, resolve_device(cfg.DEVICE))
    view_config(cfg.DATA.IMAGE_SIZE, {key: value for key, value in cfg.AUGMENT.items() if key != "DEVICE"})


def _check_solver(cfg: CfgNode, settings: Settings | None) -> None:
    if cfg.SOLVER.EPOCHS == cfg.SOLVER.MAX_STEPS == 0:
        raise refusal(cfg, settings, "SOLVER.EPOCHS", ", and so is SOLVER.MAX_STEPS; set one of them")
    if cfg.SOLVER.PARALLEL == "data" and cfg.SOLVER.BATCH_SIZE % world_size():
        raise refusal(cfg, settings, "SOLVER.BATCH_SIZE", f"; use a multiple of {world_size()} processes")
    parts, processes = cfg.SOLVER.ACCUMULATE, world_size()
    if parts > 1 and cfg.SOLVER.BATCH_SIZE % (parts * processes):
        remedy = f"use a divisor of SOLVER.BATCH_SIZE {cfg.SOLVER.BATCH_SIZE} over {processes} process(es)"
        raise refusal(cfg, settings, "SOLVER.ACCUMULATE", f"; {remedy}")


def _check_parallel(cfg: CfgNode, settings: Settings | None) -> None:
    """Check SOLVER.PARALLEL and SOLVER.SCHEDULE with the keys that go with neither."""
    streaming = cfg.SOLVER.SCHEDULE == "streaming"
    if cfg.SOLVER.PARALLEL == "data":
        if streaming:
            raise refusal(cfg, settings, "SOLVER.SCHEDULE", ", which is for SOLVER.PARALLEL stages; use exact")
        return
    if world_size() == 1:
        reason = ", but there is one process; start several with --num-gpus or torchrun, or use data"
        raise refusal(cfg, settings, "SOLVER.PARALLEL", reason)
    refused = {
        "SOLVER.AMP": cfg.SOLVER.AMP == "fp16" and "its loss scale is one for all stages; use bf16 or none",
        "SOLVER.ACCUMULATE": cfg.SOLVER.ACCUMULATE > 1 and "a process sees a batch once; use 1",
        "SOLVER.COMPILE": cfg.SOLVER.COMPILE and "stages are not compiled there; use False",
        "SHARING.MODE": cfg.SHARING.MODE != "hard" and "only hard sharing is spread over processes; use hard",
        "METHOD": cfg.METHOD == "random" and not cfg.UNITS and "nothing is trained; use SOLVER.PARALLEL data",
        "SOLVER.RECOMPUTE": streaming
        and cfg.SOLVER.RECOMPUTE not in NO_RECOMPUTE
        and "streaming would recompute with newer weights; use none",
    }
    for key, remedy in refused.items():
        if remedy:
            raise refusal(cfg, settings, key, f" with SOLVER.PARALLEL stages, where {remedy}")


def _check_backbone(cfg: CfgNode, settings: Settings | None) -> None:
    name, width, stem = cfg.BACKBONE.NAME, cfg.BACKBONE.WIDTH, cfg.BACKBONE.STEM
    is_other = name.startswith(_OTHERS)
    if not is_other and name not in NETWORKS:
        names = f"{', '.join(NETWORKS)}, {PREFIX}NAME or {HF_PREFIX}FOLDER"
        raise refusal(cfg, settings, "BACKBONE.NAME", f"; use one of {names}")
    for key, default in (("STEM", "imagenet"), ("WIDTH", STEM_CHANNELS)):
        if is_other and cfg.BACKBONE[key] != default:
            reason = f", which is for ResNets; leave it {default}, {name} has its own"
            raise refusal(cfg, settings, f"BACKBONE.{key}", reason)
    if not 1 <= width <= STEM_CHANNELS or (width < STEM_CHANNELS and stem != "cifar"):
        remedy = f"use {STEM_CHANNELS}, or 1 to {STEM_CHANNELS} with STEM cifar (detectors are built for all channels)"
        raise refusal(cfg, settings, "BACKBONE.WIDTH", f" with BACKBONE.STEM {stem}; {remedy}")
    if name == PRESNET and width % 8:
        raise refusal(cfg, settings, "BACKBONE.WIDTH", f" with BACKBONE.NAME {PRESNET}; use a multiple of 8")


def _check_decoder(cfg: CfgNode, settings: Settings | None) -> None:
    kind, blocks = cfg.DECODER.CONV, cfg.DECODER.CONV_BLOCKS
    if kind != "blocks" and cfg.BACKBONE.NAME.startswith(_OTHERS):
        raise refusal(cfg, settings, "DECODER.CONV", f", which is for ResNets; {cfg.BACKBONE.NAME} needs blocks")
    if not cfg.DECODER.DOWNSAMPLE and not blocks:
        reason = ", which is for the blocks that DECODER.CONV_BLOCKS counts, and that is 0; leave it True"
        raise refusal(cfg, settings, "DECODER.DOWNSAMPLE", reason)
    if kind != "blocks" and blocks:
        raise refusal(cfg, settings, "DECODER.CONV_BLOCKS", f", but DECODER.CONV {kind} counts its own; set it to 0")


def _check_sharing(cfg: CfgNode, settings: Settings | None) -> None:
    mode, penalty = cfg.SHARING.MODE, cfg.SHARING.PENALTY
    if mode == "soft" and cfg.SOLVER.ACCUMULATE > 1:
        reason = ", but SHARING.MODE soft differentiates its penalty once a step; set it to 1"
        raise refusal(cfg, settings, "SOLVER.ACCUMULATE", reason)
    if penalty and mode != "soft":
        reason = f" and ties copies, which SHARING.MODE {mode} has none of; set SHARING.MODE soft or SHARING.PENALTY 0"
        raise refusal(cfg, settings, "SHARING.PENALTY", reason)
    if mode == "soft" and cfg.SOLVER.RECOMPUTE not in NO_RECOMPUTE:
        reason = ", but SHARING.MODE soft keeps every activation until its unit has its loss; set SOLVER.RECOMPUTE none"
        raise refusal(cfg, settings, "SOLVER.RECOMPUTE", reason)
