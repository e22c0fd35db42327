"""The command `sweep`: trains every backbone with every seed on every fraction of the training images.

    OUT/backbones/NAME.pkl              converted backbones; of timm:NAME .safetensors
    OUT/NAME/fraction-0.1_seed-0/       a cell: the run's OUTPUT_DIR, with train.txt, its output
        result.json                     exists only once the cell is done
    OUT/sweep.json                      all cells

A cell is identified by the hash of all its inputs. A finished cell is never run again, a stopped one continues from its
last checkpoint, and the next sweep retries a failed one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from rich.console import Console
from rich.table import Table

from loco_det.backbones import own, timm_models
from loco_det.backbones.artifact import HEADER_KEY, decode_manifest, load_backbone
from loco_det.backbones.hf_models import HfBackbone
from loco_det.backbones.own import OTHER_BACKBONES, WITH_WEIGHTS
from loco_det.backbones.resnet import tensors_hash
from loco_det.convert import convert
from loco_det.convert.load import safetensors_metadata
from loco_det.convert.timm_models import convert_timm
from loco_det.core import config
from loco_det.core.errors import UserError
from loco_det.core.files import file_sha256, read_checked_json, write_checked_json, write_json
from loco_det.core.jobs import (
    check_launcher,
    command_line,
    last_words,
    launch_all,
    run_process,
    try_lock,
)
from loco_det.core.log import Progress, log, setup_logging
from loco_det.core.metrics import check_wandb
from loco_det.detection.feature_cache import check_cacheable
from loco_det.detection.keys import load_cfg
from loco_det.detection.train import choose_engine
from loco_det.detection.weights import is_same_model
from loco_det.report.runs import MEASURES, last_scores

RESULT = "result.json"
OUTPUT = "train.txt"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        folder: its OUTPUT_DIR.
        key: sha256 of all its inputs.
        command: the arguments of its process.
    """

    backbone: str
    fraction: float
    seed: int
    folder: Path
    key: str
    command: list[str]


@dataclass(frozen=True)
class Backbone:
    """A backbone as `train` takes it.

    Attributes:
        content: hash of its weights.
        keys: what puts it under a detector; MODEL.WEIGHTS at least.
    """

    content: str
    keys: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Run unfinished cells; returns 1 if a cell failed.

    Raises:
        UserError: invalid arguments, or OUT has cells of other settings.
    """
    cfg, shared = _check(args)
    setup_logging(args.out)
    failed: dict[str, str] = {}
    cells: list[Cell] = []
    for name, source in _named(args.backbones).items():
        try:
            cells += _cells(args, shared, name, _backbone(args.out, name, source, cfg.MODEL.BACKBONE.NAME))
        except UserError as error:  # concerns this backbone only
            log.error("%s: %s", name, error)
            failed[name] = str(error)
    waiting = [cell for cell in cells if not _is_done(cell)]
    log.info("%d cells, %d of them done; what one prints is in its %s", len(cells), len(cells) - len(waiting), OUTPUT)
    told = {"on_cpu": cfg.MODEL.DEVICE == "cpu", "workers": cfg.DATALOADER.NUM_WORKERS}
    with Progress(len(waiting), "cells") as progress:
        for cell, problem in launch_all(args, waiting, run_cell, **told):
            if problem:
                log.error("%s: %s", cell.folder, problem)
                failed[str(cell.folder)] = problem
            progress.advance(failed=len(failed))
    if not args.quiet:
        _print(cells, failed)
    write_json(args.out / "sweep.json", {"cells": [_record(cell) for cell in cells], "failed": failed})
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> tuple[CfgNode, dict[str, Any]]:
    """Check the arguments; returns the configuration, and what all cells share that affects their numbers."""
    check_wandb(args.wandb)
    if any(not 0 < fraction <= 1 for fraction in args.fractions):
        raise UserError(f"--fractions {args.fractions}: give shares above 0, up to 1")
    if min(args.seeds) < 0:
        raise UserError(f"--seeds {args.seeds}: give 0 or more; a negative one would be drawn anew each time")
    check_launcher(args)
    if not args.config_file:
        raise UserError("--config-file is missing; give a configuration of train, as loco-det configs lists them")
    overrides = [*args.set, *args.opts]
    taken = {"MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"} & set(overrides[::2])
    if taken:
        raise UserError(f"{min(taken)}: the sweep sets it itself; leave it out")
    cfg, settings = load_cfg(args.config_file, overrides)
    engine = choose_engine(args.engine)
    engine.check(cfg, settings)  # an error here would fail every cell
    for folder, training in ((args.feature_cache, False), (args.train_feature_cache, True)):
        if folder:
            check_cacheable(cfg, engine.name, training=training)
    common = config.changed(cfg, OUTPUT_DIR="", SEED=0, **{"MODEL.WEIGHTS": ""})
    return cfg, {"config": common.dump(), "engine": args.engine, "num_gpus": args.num_gpus}


def _named(backbones: list[str]) -> dict[str, str]:
    """Return {name: source}; without NAME= a file is named after itself, or its folder if its own name is generic."""
    found: dict[str, str] = {}
    for text in backbones:
        name, equals, source = text.partition("=")
        if text.startswith((timm_models.PREFIX, *WITH_WEIGHTS)):  # an equals sign is of its options
            name, source = re.split(r"[:/]", text.partition("?")[0])[-1], text
        elif not equals:
            path, source = Path(text), text
            name = path.parent.name if path.stem in ("backbone", "backbone_d2") and path.parent.name else path.stem
        if not name or name in found or name == "backbones" or "/" in name:
            raise UserError(
                f"--weights {text}: {name!r} is not a valid name here, or is used twice; write NAME={source}"
            )
        found[name] = source
    return found


def _backbone(out: Path, name: str, source: str, configured: str) -> Backbone:
    """Return a backbone as `train` takes it: a file is used as it is, or converted once.

    `configured` is the configuration's MODEL.BACKBONE.NAME; it stays if it is the same model with more options.
    """
    if source.startswith(own.PREFIX):
        module = own.find(source)
        return Backbone(tensors_hash(module.state_dict().items()), {"MODEL.BACKBONE.NAME": source, "MODEL.WEIGHTS": ""})
    if source.startswith(own.HF_PREFIX):
        model = HfBackbone(source.removeprefix(own.HF_PREFIX))
        pixels = _pixel_keys(model.order, model.pixel_mean, model.pixel_std)
        keys = {"MODEL.BACKBONE.NAME": source, "MODEL.WEIGHTS": "", **pixels}
        return Backbone(tensors_hash(model.state_dict().items()), keys)
    if source.startswith(timm_models.PREFIX):
        weights = out.absolute() / "backbones" / f"{name}.safetensors"
        if not weights.is_file() or load_backbone(weights)[1].architecture != source:
            log.info("%s: taking %s", name, source)
            convert_timm(source, weights, source)
    else:
        weights = _weights(out, name, Path(source))
    keys: dict[str, Any] = {"MODEL.WEIGHTS": weights}
    if weights.suffix == ".safetensors":
        manifest = load_backbone(weights)[1]
        if not is_same_model(manifest.architecture, configured, True):
            keys["MODEL.BACKBONE.NAME"] = manifest.architecture
        keys.update(_pixel_keys(manifest.channel_order, manifest.pixel_mean, manifest.pixel_std))
    return Backbone(_sha256(weights), keys)


def _pixel_keys(order: str, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    return {"INPUT.FORMAT": order, "MODEL.PIXEL_MEAN": list(mean), "MODEL.PIXEL_STD": list(std)}


def _weights(out: Path, name: str, file: Path) -> Path:
    """Return weights for `train`: the file itself if it is a .pkl or timm's, else its conversion, made once."""
    if file.suffix == ".pkl":
        if not file.is_file():
            raise UserError(f"{file}: no such file; correct the path")
        return file.absolute()
    header = safetensors_metadata(file).get(HEADER_KEY) if file.is_file() else None
    if header is not None and decode_manifest(header, file).architecture.startswith(OTHER_BACKBONES):
        return file.absolute()
    target, note = out.absolute() / "backbones" / f"{name}.pkl", out / "backbones" / f"{name}.json"
    source, made = _sha256(file), read_checked_json(note) or {}
    if not target.is_file() or made != {"source_sha256": source, "target_sha256": _sha256(target)}:
        log.info("%s: converting %s", name, file)
        convert(file, target)
        write_checked_json(note, {"source_sha256": source, "target_sha256": _sha256(target)})
    return target


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the path") from error


def _cells(args: argparse.Namespace, shared: dict[str, Any], name: str, backbone: Backbone) -> list[Cell]:
    cells = []
    more = {key: str(value) for key, value in backbone.keys.items() if key != "MODEL.WEIGHTS"}
    shared = {**shared, **({"backbone": more} if more else {})}
    for fraction in dict.fromkeys(args.fractions):  # a repeated cell would count as two seeds
        for seed in dict.fromkeys(args.seeds):
            facts = {**shared, "weights": backbone.content, "fraction": fraction, "seed": seed}
            key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
            folder = args.out.absolute() / name / f"fraction-{_digits(fraction)}_seed-{seed}"
            command = _command(args, backbone.keys, fraction, seed, folder)
            cells.append(Cell(name, fraction, seed, folder, key, command))
    for cell in cells:
        record = cell.folder / "cell.json"
        if not record.is_file():
            continue
        before = read_checked_json(record)
        if before is None:
            raise UserError(f"{record} is damaged; remove it if the cell is of this sweep, or choose another --out")
        if before["key"] != cell.key:
            raise UserError(f"{cell.folder} was made with another config, engine or weights; choose another --out")
    return cells


def _digits(fraction: float) -> str:
    """Format a fraction with the fewest digits that distinguish it."""
    short = f"{fraction:g}"
    return short if float(short) == fraction else repr(fraction)


def _command(args: argparse.Namespace, keys: dict[str, Any], fraction: float, seed: int, folder: Path) -> list[str]:
    part = [] if fraction == 1 else ["--fraction", _digits(fraction)]
    more = ["--wandb", args.wandb] if args.wandb else []
    for option, cache in (("--feature-cache", args.feature_cache), ("--train-feature-cache", args.train_feature_cache)):
        more += [option, str(cache.absolute())] if cache else []
    last = {**keys, "SEED": seed, "OUTPUT_DIR": folder}
    overrides = [*args.set, *args.opts, *(str(text) for pair in last.items() for text in pair)]
    files = [word for file in args.config_file for word in ("--config-file", file)]
    options = [*files, "--engine", args.engine, "--resume", *part, *more]
    return command_line(["train", *options, *overrides], args)


def _is_done(cell: Cell) -> bool:
    """Whether the cell has an intact result; with a damaged one its last checkpoint is evaluated again."""
    return (read_checked_json(cell.folder / RESULT) or {}).get("key") == cell.key


# --- running ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, shown: Mapping[str, str]) -> str | None:
    """Run a cell with `shown` added to its environment; returns None, or the problem in one sentence."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / ".lock", "w") as lock:
        if not try_lock(lock):
            return "another sweep is running it"
        if _is_done(cell):  # another sweep finished it meanwhile
            return None
        write_checked_json(cell.folder / "cell.json", {**asdict(cell), "folder": str(cell.folder)})
        begun = time.time()
        with open(cell.folder / OUTPUT, "a") as output:
            status, _ = run_process(cell.command, output, lock, shown)
        results = last_scores(cell.folder) if status == 0 else None
        if results is None:
            return f"train ended with status {status}: {last_words(cell.folder / OUTPUT)}"
        done = {"key": cell.key, "results": results, "seconds": round(time.time() - begun, 1)}
        write_checked_json(cell.folder / RESULT, done)
    return None


# --- the record -------------------------------------------------------------------------------------------------


def _record(cell: Cell) -> dict[str, Any]:
    facts = {"backbone": cell.backbone, "fraction": cell.fraction, "seed": cell.seed, "folder": str(cell.folder)}
    found = read_checked_json(cell.folder / RESULT)
    return {**facts, "done": found is not None, **(found or {})}


def _print(cells: list[Cell], failed: dict[str, str]) -> None:
    table = Table(title="mean and standard deviation over seeds")
    for column in ("backbone", "share", "seeds"):
        table.add_column(column)
    done = [_record(cell) for cell in cells if _is_done(cell)]
    measures = sorted({name for row in done for name in row["results"] if name.endswith(MEASURES)})
    for measure in measures:
        table.add_column(measure, justify="right")
    groups = dict.fromkeys((cell.backbone, cell.fraction) for cell in cells)
    for backbone, fraction in groups:
        rows = [row["results"] for row in done if (row["backbone"], row["fraction"]) == (backbone, fraction)]
        cells_of = [_mean([row[m] for row in rows if row.get(m) is not None]) for m in measures]
        table.add_row(backbone, _digits(fraction), str(len(rows)), *cells_of)
    console = Console()
    console.print(table)
    if failed:
        console.print(f"{len(failed)} failed; the same command tries them again", markup=False)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"
