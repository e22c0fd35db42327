"""Trains a detector with either engine, from a configuration to a checkpoint and its AP.

OUTPUT_DIR gets Detectron2's files: config.yaml, metrics.json, model_*.pth, last_checkpoint,
inference/coco_instances_results.json; and run.json with the run's inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det import __version__
from loco_det.annotations import loader
from loco_det.annotations.classes import check_training_classes, missing_classes
from loco_det.annotations.registry import find_dataset
from loco_det.core import config
from loco_det.core.device import (
    arithmetic,
    check_bf16,
    common_seed,
    keep_freed_memory,
    resolve_device,
    seed_everything,
)
from loco_det.core.distributed import averaged, barrier, is_main, world_size
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.log import log
from loco_det.core.metrics import RunMetrics
from loco_det.core.own_keys import own_value
from loco_det.core.run_folder import run_folder
from loco_det.detection import engine_d2, solver
from loco_det.detection.checkpoint import (
    FREE_IN_EVALUATION,
    Checkpointer,
    check_same_run,
    identity,
    last_checkpoint,
    read_last,
    retire_checkpoints,
)
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.engine import Engine
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.feature_cache import check_cacheable, use_cache
from loco_det.detection.foreign_weights import with_own_weights
from loco_det.detection.inference import check_data, check_evaluator, check_expected, evaluate_finally, flatten
from loco_det.detection.loop import Run, check_frozen, frozen_hashes, train
from loco_det.detection.run_record import write_record
from loco_det.detection.weights import apply_weights, load_weights


def train_net(
    cfg: CfgNode,
    *,
    engine: str | Engine = "auto",
    eval_only: bool = False,
    resume: bool = False,
    new_heads: bool = False,
    evaluator: str = "hotcoco",
    fast: bool = False,
    feature_cache: Path | None = None,
    train_feature_cache: Path | None = None,
    max_bad_share: float | None = None,
    wandb: str | None = None,
) -> dict[str, Any]:
    """Train and evaluate the detector of `cfg`, in this process's share of the job.

    Args:
        cfg: Detectron2's key tree (`keys.get_cfg`), complete.
        engine: "torchvision", "detectron2", or "auto": Detectron2 if it can be imported. Or an engine whose `check`
            accepted `cfg`.
        eval_only: only evaluate MODEL.WEIGHTS, or with `resume` the last checkpoint.
        resume: continue from OUTPUT_DIR/last_checkpoint if there is one.
        new_heads: if MODEL.WEIGHTS are a detector's, initialise its heads that do not fit.
        evaluator: "hotcoco" or "pycocotools".
        fast: on a CPU, let the torchvision engine's numbers differ from Detectron2's by rounding (`cpu_speed`).
        feature_cache: cache the frozen backbone's features of test images in this folder.
        train_feature_cache: the same of training images, which must have one size.
        max_bad_share: tolerated share of training images that fail to decode; None for the torchvision engine's
            default. Detectron2's loader tolerates none.
        wandb: W&B project to log metrics.json to.

    Returns:
        On the main process {"bbox": {"AP": percent, ...}, "segm": {...}}; with several DATASETS.TEST {name: {...}},
        without any {}.

    Raises:
        UserError: bad configuration, data or weights; a non-finite loss; a stop by signal; a result that contradicts
            TEST.EXPECTED_RESULTS.
        RuntimeError: a frozen tensor changed.
    """
    if not cfg.OUTPUT_DIR:
        raise UserError("OUTPUT_DIR is empty; name the folder for checkpoints and results.")
    if new_heads and eval_only:
        raise UserError("--new-heads starts heads from random values, which --eval-only would measure; leave one out.")
    if isinstance(engine, str):
        engine = choose_engine(engine)
        engine.check(cfg)
    if max_bad_share is not None:
        engine = tolerant(engine, max_bad_share)
    log_engine(engine)
    check_evaluator(cfg, evaluator)
    caches = [(feature_cache, False), (None if eval_only else train_feature_cache, True)]
    caches = [(folder, training) for folder, training in caches if folder is not None]
    for _, training in caches:
        check_cacheable(cfg, engine.name, training=training)
    drawn, written = cfg.SEED < 0, cfg
    with run_folder(cfg.OUTPUT_DIR), RunMetrics(cfg, wandb, resume) as metrics, contextlib.ExitStack() as stack:
        cfg = _prepare(cfg, eval_only)
        stack.enter_context(_arithmetic(cfg, eval_only))
        if not eval_only:
            check_data(cfg, own_reader=engine.name != "detectron2")
        model = engine.build_model(cfg)
        speed_up(model, fast)
        if eval_only:
            _load_for_evaluation(model, cfg, engine, resume)
        else:
            run = start_run(cfg, engine, model, resume, drawn, new_heads=new_heads)
        _write_config(written)
        for folder, training in caches:
            use_cache(model, cfg, folder, training=training)
        if not eval_only:
            train(run, evaluator, metrics)
        results = evaluate_finally(cfg, model, engine, evaluator)
        if eval_only:
            metrics.write(flatten(results))
        elif results:
            metrics.write({"iteration": cfg.SOLVER.MAX_ITER, **flatten(results)})
        check_expected(cfg, results)
    return results


def choose_engine(name: str) -> Engine:
    """Return the engine called `name`.

    Raises:
        UserError: an unknown name, or Detectron2 is not installed.
    """
    if name not in ("auto", "torchvision", "detectron2"):
        raise UserError(f"There is no engine {name!r}; use auto, torchvision or detectron2.")
    if name == "detectron2" and not engine_d2.installed():
        raise UserError("Detectron2 is not installed here; use --engine torchvision, or install it.")
    use_detectron2 = name == "detectron2" or (name == "auto" and engine_d2.installed())
    return engine_d2.Detectron2Engine() if use_detectron2 else TorchvisionEngine()


def log_engine(engine: Engine) -> None:
    """Log the chosen engine, and whether Detectron2 was unavailable."""
    log.info("engine: %s%s", engine.name, "" if engine_d2.installed() else " (Detectron2 is not installed)")


def tolerant(engine: Engine, max_bad_share: float) -> Engine:
    """Return an engine that tolerates a share of unusable training images.

    Raises:
        UserError: not a share, or the engine is Detectron2's.
    """
    if not 0 <= max_bad_share <= 1:
        raise UserError(f"--max-bad-share is {max_bad_share}; give a share from 0 to 1.")
    if engine.name != "torchvision":
        raise UserError("--max-bad-share needs --engine torchvision: Detectron2's loader ends at the first bad image.")
    return TorchvisionEngine(max_bad_share)


# --- before the first step --------------------------------------------------------------------------------------


def _prepare(cfg: CfgNode, eval_only: bool) -> CfgNode:
    """Run checks that would otherwise fail late, and seed; returns the effective configuration."""
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty; name a data set to train on, e.g. ('coco_2017_train',).")
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty; name a data set to evaluate on, e.g. ('coco_2017_val',).")
    check_classes(cfg, () if eval_only else cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    cfg = solver.scale_to_world_size(cfg, world_size())
    device, seed = str(detector_device(cfg.MODEL.DEVICE)), common_seed(cfg.SEED)
    cfg = config.changed(cfg, SEED=seed, **{"MODEL.DEVICE": device})
    if not eval_only and solver.half_type(cfg, torch.device(device)) is torch.bfloat16:
        check_bf16(torch.device(device), "SOLVER.AMP.DTYPE", "SOLVER.AMP.DTYPE fp16")
    if cfg.MODEL.DEVICE == "cpu" and not eval_only:
        keep_freed_memory()
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
    synced = [part for part in parts if cfg.MODEL[part].NORM == "SyncBN"]
    if synced and cfg.MODEL.DEVICE == "cpu" and world_size() > 1:
        raise UserError(f"MODEL.{synced[0]}.NORM is SyncBN, which needs GPUs on several processes; set it to BN.")
    seed_everything(cfg.SEED)
    return cfg


def _arithmetic(cfg: CfgNode, eval_only: bool) -> contextlib.AbstractContextManager[None]:
    benchmark, exact = cfg.CUDNN_BENCHMARK and not eval_only, own_value(cfg, "DETERMINISTIC")
    device, precision = torch.device(cfg.MODEL.DEVICE), cfg.FLOAT32_PRECISION
    return arithmetic(device, benchmark=benchmark, precision=precision, deterministic=exact)


def _write_config(cfg: CfgNode) -> None:
    """Write config.yaml, only after a refused --resume can no longer overwrite the folder's configuration."""
    if is_main():
        with atomic_write(Path(cfg.OUTPUT_DIR) / "config.yaml", "w") as file:
            file.write(cfg.dump())
    barrier()


def check_classes(cfg: CfgNode, train: Sequence[str], test: Sequence[str]) -> None:
    """Check before training that every data set exists and that its classes are the model's.

    Raises:
        UserError: a set is missing, or its classes do not fit the model or those of the training set.
    """
    for name in (*train, *test):
        loader.check_kind(cfg, name)
    check_training_classes(cfg, [find_dataset(name) for name in train])
    for dataset in map(find_dataset, test):
        missing = missing_classes(cfg, dataset)
        if missing:
            log.warning("%s has no category for %s: AP is over the other classes", dataset.name, ", ".join(missing))


def detector_device(name: str) -> torch.device:
    """Return MODEL.DEVICE, or the CPU instead of cuda without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():  # Detectron2's default, rarely set by hand
        log.warning("MODEL.DEVICE is cuda and this machine has no usable GPU: running on the CPU")
        name = "cpu"
    return resolve_device(name)


def _load_for_evaluation(model: nn.Module, cfg: CfgNode, engine: Engine, resume: bool) -> None:
    last = read_last(cfg.OUTPUT_DIR) if resume else None
    if last is not None:
        before = (last.state or {}).get("loco_det") or {}
        check_same_run(last.path, before, {"config": cfg.dump(), "annotations": {}}, FREE_IN_EVALUATION)
        apply_weights(model, last, cfg)
        return
    if resume:
        raise UserError(f"{cfg.OUTPUT_DIR} has no last_checkpoint to evaluate; leave --resume out for MODEL.WEIGHTS.")
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS is empty, so there is nothing to evaluate; give a detector's checkpoint.")
    weights = load_weights(model, cfg)
    if last_checkpoint(cfg.OUTPUT_DIR) is None:  # else run.json is the training's
        write_record(cfg, engine.name, weights)


def start_run(
    cfg: CfgNode, engine: Engine, model: nn.Module, resume: bool, drawn: bool, *, new_heads: bool = False
) -> Run:
    """Set up weights, optimiser and schedule, from MODEL.WEIGHTS or, with `resume`, from the last checkpoint.

    `drawn`: the configuration gave no SEED; `new_heads` as for `train_net`.
    """
    last = read_last(cfg.OUTPUT_DIR) if resume else None
    if resume and last is None:
        left = "; its model_*.pth are of an earlier run" if any(Path(cfg.OUTPUT_DIR).glob("model_*.pth")) else ""
        log.log(WARNING if left else INFO, "%s has no last_checkpoint to resume: starting anew%s", cfg.OUTPUT_DIR, left)
    weights = load_weights(model, with_own_weights(cfg), new_heads=new_heads) if last is None else None
    device = torch.device(cfg.MODEL.DEVICE)
    optimizer = solver.build_optimizer(cfg, model)
    schedule = solver.build_schedule(cfg, optimizer)
    scaler = solver.grad_scaler(cfg, device)
    note = {"version": __version__, "engine": engine.name, "seed": cfg.SEED, **identity(cfg)}
    checkpointer = Checkpointer(cfg, model, optimizer, schedule, scaler, note)
    checkpointer.periodic()  # validates its period
    start = 0
    if last is not None:
        start = checkpointer.restore(last, drawn)
        if drawn:  # a run without SEED continues with the one drawn at its start
            cfg = checkpointer.cfg = config.changed(cfg, SEED=note["seed"])
            note.update(identity(cfg))
        if start > cfg.SOLVER.MAX_ITER:
            raise UserError(
                f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}; {last.path} has done {start}, so give at least that."
            )
        log.info("resumed from %s: %d of %d iterations are done", last.path, start, cfg.SOLVER.MAX_ITER)
    wrapped = averaged(model, device) if world_size() > 1 else model
    frozen = frozen_hashes(model)  # after the wrapper has synchronised the processes
    check_frozen(note.setdefault("frozen", frozen), frozen)
    batches = engine.train_batches(cfg, start) if start < cfg.SOLVER.MAX_ITER else ()
    if last is None:  # after all checks of this run
        retire_checkpoints(cfg.OUTPUT_DIR)
        write_record(cfg, engine.name, weights)
    return Run(cfg, engine, model, wrapped, optimizer, schedule, scaler, checkpointer, start, device, batches)
