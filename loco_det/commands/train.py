"""The command `train`: its arguments, in Detectron2's style, and the launch of training or evaluation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from loco_det.annotations.subsets import part_name
from loco_det.core import config
from loco_det.core.errors import UserError
from loco_det.core.launch import launch
from loco_det.core.log import setup_logging
from loco_det.core.metrics import check_wandb
from loco_det.detection.keys import load_cfg
from loco_det.evaluation.cityscapes import OFFICIAL
from loco_det.evaluation.coco import EVALUATORS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, engine, overrides and processes."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML file with Detectron2's keys")
    parser.add_argument("--engine", choices=("auto", "torchvision", "detectron2"), default="auto")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUTPUT_DIR/last_checkpoint if there is one"
    )
    parser.add_argument(
        "--new-heads",
        action="store_true",
        help="initialise heads of MODEL.WEIGHTS that do not fit, e.g. of other classes",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes to start here, one GPU each if available"
    )
    parser.add_argument("--evaluator", choices=(*EVALUATORS, OFFICIAL), default=EVALUATORS[0])
    parser.add_argument(
        "--exact", action="store_true", help="torchvision engine on a CPU: Detectron2's numbers bit for bit, slower"
    )
    parser.add_argument(
        "--feature-cache",
        type=Path,
        metavar="DIR",
        help="cache the frozen backbone's features of test images in DIR, for later evaluations",
    )
    parser.add_argument(
        "--train-feature-cache",
        type=Path,
        metavar="DIR",
        help="the same of training images, of one size and mirrored at most",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        metavar="S",
        help="torchvision engine: tolerated share of unusable training images, which are replaced (0.01)",
    )
    parser.add_argument("--fraction", type=float, metavar="F", help="train on a share of the images, 0.01 for 1 %%")
    parser.add_argument("--few-shot", type=int, metavar="K", help="train on K objects of each class")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log metrics.json to Weights & Biases")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="overrides, e.g. SOLVER.BASE_LR 0.01")


def run(args: argparse.Namespace) -> None:
    """Train or evaluate with the parsed arguments.

    Raises:
        UserError: bad arguments, configuration, data or weights.
    """
    from loco_det.detection.train import choose_engine

    check_wandb(args.wandb)
    cfg, settings = load_cfg(args.config_file, args.opts)
    if args.fraction is not None or args.few_shot is not None:
        cfg = _with_part_of_training_set(cfg, args.fraction, args.few_shot)
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus is {args.num_gpus}; give at least 1, which without a GPU means one CPU process.")
    engine = choose_engine(args.engine)
    engine.check(cfg, settings)
    options = {"engine": engine, "eval_only": args.eval_only, "resume": args.resume, "evaluator": args.evaluator}
    options.update(new_heads=args.new_heads, fast=not args.exact, feature_cache=args.feature_cache)
    options.update(train_feature_cache=args.train_feature_cache)
    options.update(max_bad_share=args.max_bad_share, wandb=args.wandb)
    launch(_worker, args.num_gpus, cfg, options)


def _with_part_of_training_set(cfg: CfgNode, fraction: float | None, shots: int | None) -> CfgNode:
    """Return `cfg` with a subset of each set in DATASETS.TRAIN, chosen by SEED (0 if negative)."""
    if fraction is not None and shots is not None:
        raise UserError("--fraction and --few-shot choose different parts of DATASETS.TRAIN; give one of them.")
    if (fraction is not None and not 0 < fraction <= 1) or (shots is not None and shots < 1):
        raise UserError(
            f"--fraction {fraction} --few-shot {shots}: give a share above 0, up to 1, or at least 1 object."
        )
    part = part_name(fraction, shots, max(cfg.SEED, 0))
    return config.changed(cfg, **{"DATASETS.TRAIN": tuple(f"{name}{part}" for name in cfg.DATASETS.TRAIN)})


def _worker(cfg: CfgNode, options: dict[str, Any]) -> dict[str, Any]:
    from loco_det.detection.train import train_net

    setup_logging(cfg.OUTPUT_DIR or None)
    return train_net(cfg, **options)
