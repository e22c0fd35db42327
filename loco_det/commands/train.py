"""The command `train`: launches training or evaluation, and ends with its numbers and what to do next."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from loco_det.annotations.coco import image_files
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.subsets import part_name
from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.core import config
from loco_det.core.distributed import first_of_all, is_main
from loco_det.core.errors import UserError
from loco_det.core.key_table import print_keys
from loco_det.core.launch import launch
from loco_det.core.log import is_quiet, log, setup_logging
from loco_det.core.metrics import check_wandb
from loco_det.detection.checkpoint import last_checkpoint
from loco_det.detection.keys import load_cfg, meanings, whole_tree

RANDOM = "random:"  # of weights: an untrained network
SHOWN = ("AP", "AP50", "AP75", "IoU")  # of a data set's numbers, in the last line


def run(args: argparse.Namespace) -> None:
    """Train or evaluate with the parsed arguments.

    Raises:
        UserError: bad arguments, configuration, data or weights.
    """
    from loco_det.detection.train import choose_engine

    if args.keys is not None:
        print_keys(whole_tree(), meanings(), args.keys)
        return
    check_wandb(args.wandb)
    overrides = [*args.opts, *(["MODEL.WEIGHTS", args.weights] if args.weights else [])]
    cfg, settings = load_cfg(args.config_file, overrides)
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


def _with_random_weights(cfg: CfgNode, resume: bool) -> CfgNode:
    """Return `cfg` with an untrained backbone in a file, which the main process writes unless a checkpoint is resumed.

    Raises:
        UserError: in every process: no such network, no training images, or classes that are not the model's.
    """
    path, problem = Path(cfg.OUTPUT_DIR) / "random_backbone.safetensors", None  # (message, what to add)
    if is_main():
        try:
            if not (resume and last_checkpoint(cfg.OUTPUT_DIR)):
                _write_random(cfg, path)
        except UserError as error:
            problem = str(error), error.add
    if problem := first_of_all(problem):
        raise UserError(*problem)
    return config.changed(cfg, **{"MODEL.WEIGHTS": str(path)})


def _write_random(cfg: CfgNode, path: Path) -> None:
    """Write the network that MODEL.WEIGHTS names, its BatchNorm statistics measured on the training images."""
    from loco_det.detection.train import check_classes
    from loco_det.evaluation.probes.backbones import load_backbone_for_probe, measure_on

    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty; name a data set to measure the untrained network's statistics on")
    check_classes(cfg, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)  # before the time that measuring takes
    backbone = load_backbone_for_probe(str(cfg.MODEL.WEIGHTS), seed=max(cfg.SEED, 0))
    files = [file for name in cfg.DATASETS.TRAIN for file in image_files(find_dataset(name))]
    log.info("%s: measuring its BatchNorm statistics on training images", cfg.MODEL.WEIGHTS)
    measure_on(backbone, files, max(cfg.SEED, 0))
    stem = backbone.facts.get("stem") or ("patch" if backbone.model.is_plain else "timm")
    pixels = {"channel_order": backbone.order, "pixel_mean": backbone.mean, "pixel_std": backbone.std}
    save_backbone(
        path, backbone_tensors(backbone.model), describe(backbone.model, stem=stem, method="random", **pixels)
    )
    log.info("wrote %s, a random %s", path, backbone.facts["architecture"])


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
    if str(cfg.MODEL.WEIGHTS).startswith(RANDOM):
        cfg = _with_random_weights(cfg, options["resume"])
    found = train_net(cfg, **options)
    if is_main() and not is_quiet():
        print("\n".join(last_words(cfg, found)))
    return found


def last_words(cfg: CfgNode, found: dict[str, Any]) -> list[str]:
    """Return what is said at the end of a run: its numbers in one line for each data set, its files, what to do next.

    Args:
        found: what `train_net` returned.
    """
    one = len(cfg.DATASETS.TEST) == 1
    by_set = {cfg.DATASETS.TEST[0]: found} if one and found else found
    lines = [f"{name}: {_numbers(numbers)}" for name, numbers in by_set.items()]
    folder = shlex.quote(cfg.OUTPUT_DIR)
    lines.append(f"in {folder}: checkpoints, metrics.json, log.txt{', inference/' if found else ''}")
    needs_more = cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" or cfg.MODEL.LOAD_PROPOSALS  # than an image
    following = [] if needs_more else [f"loco-det predict {folder} photo.jpg"]
    if found:
        following.append(f"loco-det report {folder} --out {shlex.quote(f'{cfg.OUTPUT_DIR}/report')}")
    return [*lines, *(f"next: {line}" for line in following)]


def _numbers(results: dict[str, dict[str, float]]) -> str:
    """One line of a data set's main numbers: "bbox AP 31.2, AP50 50.1; segm AP 28.0, AP50 47.3"."""
    parts = []
    for task, numbers in results.items():
        shown = [f"{name} {value:.1f}" for name, value in numbers.items() if name in SHOWN]
        parts.append(
            f"{task} {', '.join(shown or [f'{name} {value:.1f}' for name, value in list(numbers.items())[:3]])}"
        )
    return "; ".join(parts)
