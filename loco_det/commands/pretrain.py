"""The command `pretrain`: arguments, processes and logging around `pretrain.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fvcore.common.config import CfgNode

from loco_det.core.config import Settings, load_config
from loco_det.core.errors import UserError
from loco_det.core.launch import launch
from loco_det.core.log import setup_logging
from loco_det.core.metrics import check_wandb
from pretrain.defaults import get_cfg
from pretrain.train import pretrain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, overrides and processes, in Detectron2's style."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, e.g. configs/pretrain/*.yaml")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR, if any"
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes to start here, one GPU each if available"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="also log metrics.json to Weights & Biases")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides, e.g. DATA.PATH images SEED 1")


def run(args: argparse.Namespace) -> None:
    """Train a backbone with the parsed arguments.

    Raises:
        UserError: bad arguments, configuration or data.
    """
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus is {args.num_gpus}; give at least 1, which without a GPU means one CPU process")
    check_wandb(args.wandb)
    cfg, settings = load_config(get_cfg(), args.config_file, args.opts)
    launch(_worker, args.num_gpus, cfg, settings, args.resume, args.wandb)


def _worker(cfg: CfgNode, settings: Settings, resume: bool, wandb: str | None) -> Path:
    setup_logging(cfg.OUTPUT_DIR)
    return pretrain(cfg, resume, wandb=wandb, settings=settings)


def pretrain_file(config: str, overrides: list[str]) -> Path:
    """Pretrain in this process from a YAML file and overrides; returns the path of backbone.safetensors."""
    cfg, settings = load_config(get_cfg(), config, overrides)
    setup_logging(cfg.OUTPUT_DIR)
    return pretrain(cfg, settings=settings)
