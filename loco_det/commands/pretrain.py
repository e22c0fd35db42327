"""The command `pretrain`: processes and logging around `pretrain.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fvcore.common.config import CfgNode

from loco_det.core.config import Settings, load_config
from loco_det.core.errors import UserError
from loco_det.core.key_table import print_keys
from loco_det.core.log import setup_logging
from pretrain.defaults import get_cfg, meanings


def run(args: argparse.Namespace) -> None:
    """Train a backbone with the parsed arguments.

    Raises:
        UserError: bad arguments, configuration or data.
    """
    if args.keys is not None:
        print_keys(get_cfg(), meanings(), args.keys)
        return
    if not args.config_file:
        raise UserError("--config-file is missing; give one, as loco-det configs pretrain lists them")
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus is {args.num_gpus}; give at least 1, which without a GPU means one CPU process")
    cfg, settings = load_config(get_cfg(), args.config_file, args.opts)
    from loco_det.core.launch import launch  # imports torch, which takes seconds: after what is answered without it
    from loco_det.core.metrics import check_wandb

    check_wandb(args.wandb)
    launch(_worker, args.num_gpus, cfg, settings, args.resume, args.wandb)


def _worker(cfg: CfgNode, settings: Settings, resume: bool, wandb: str | None) -> Path:
    from pretrain.train import pretrain

    setup_logging(cfg.OUTPUT_DIR)
    return pretrain(cfg, resume, wandb=wandb, settings=settings)


def pretrain_file(config: str, overrides: list[str]) -> Path:
    """Pretrain in this process from a YAML file and overrides; returns the path of backbone.safetensors."""
    from pretrain.train import pretrain

    cfg, settings = load_config(get_cfg(), config, overrides)
    setup_logging(cfg.OUTPUT_DIR)
    return pretrain(cfg, settings=settings)
