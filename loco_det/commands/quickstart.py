"""The command `quickstart`: all steps on made-up images, from data and four backbones to frozen detectors and AP."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loco_det.annotations.coco import load_coco
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.synthetic import make_shapes_dataset
from loco_det.commands.pretrain import pretrain_file
from loco_det.convert import convert
from loco_det.core.errors import UserError
from loco_det.core.files import write_json
from loco_det.core.log import is_quiet, log, setup_logging
from loco_det.detection.keys import load_cfg
from loco_det.detection.train import train_net
from loco_det.report.plots import draw_detections, plot_losses

METHODS = ("random", "gim", "simclr", "loco")
TRAIN_IMAGES, VAL_IMAGES = 400, 100
SHOWN_IMAGES = (2, 3, 4, 5)
SHOWN_SCORE = 0.3


def run(args: argparse.Namespace) -> None:
    """Run all steps with the parsed arguments.

    Raises:
        UserError: a negative seed, or the folder cannot be written.
    """
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more.")
    quickstart(args.out, args.seed)


def quickstart(out: Path, seed: int = 0) -> dict[str, Any]:
    """Pretrain, convert, train and evaluate on the CPU; the same data, budget and schedule for every backbone.

    Args:
        out: folder for everything; each run has its own folder in it.
        seed: of the images, the weights, the augmentation and the sampling.

    Returns:
        {"frozen": {method: {"bbox": {"AP": percent, ...}, "segm": {...}}}, "seed": ..., "seconds": ...}, as written to
        out/results.json; out/detections.png and out/losses.png show it.

    Raises:
        UserError: out cannot be written.
    """
    begun = time.monotonic()
    setup_logging(out)
    root = out.absolute() / "datasets"
    make_shapes_dataset(root, train=TRAIN_IMAGES, val=VAL_IMAGES, seed=seed)
    frozen = {}
    with _datasets_in(root):
        for method in METHODS:
            setup_logging(out)  # after the last run's own log ended
            log.info("%s: pretraining, conversion, detector on its frozen features", method)
            frozen[method] = _evaluate(method, out, seed)
        results = {"frozen": frozen, "seed": seed, "seconds": round(time.monotonic() - begun, 1)}
        write_json(out / "results.json", results)
        _draw(out)
    if not is_quiet():
        print_table(frozen)
    return results


@contextlib.contextmanager
def _datasets_in(root: Path) -> Iterator[None]:
    """Set DETECTRON2_DATASETS to `root` for the block."""
    before = os.environ.get("DETECTRON2_DATASETS")
    os.environ["DETECTRON2_DATASETS"] = str(root)
    try:
        yield
    finally:
        del os.environ["DETECTRON2_DATASETS"]
        if before is not None:
            os.environ["DETECTRON2_DATASETS"] = before


def _evaluate(method: str, out: Path, seed: int) -> dict[str, Any]:
    images = out / "datasets" / "shapes" / "train"
    folder = out / method
    settings = {"METHOD": method, "DATA.PATH": images, "SEED": seed, "OUTPUT_DIR": folder / "pretrain"}
    artifact = pretrain_file(
        "configs/pretrain/quickstart.yaml", [str(part) for pair in settings.items() for part in pair]
    )
    weights = folder / "backbone.pkl"
    convert(artifact, weights)
    setup_logging(folder / "detector")
    settings = {"MODEL.WEIGHTS": weights, "SEED": seed, "OUTPUT_DIR": folder / "detector"}
    overrides = [str(part) for pair in settings.items() for part in pair]
    cfg, _ = load_cfg("configs/quickstart.yaml", overrides)
    return train_net(cfg, engine="torchvision")


def _draw(out: Path) -> None:
    plot_losses({m: out / m / "pretrain" / "metrics.json" for m in METHODS if m != "random"}, out / "losses.png")
    runs = {
        f"frozen {method}": json.loads((out / method / "detector/inference/coco_instances_results.json").read_text())
        for method in METHODS
    }
    dataset = load_coco(find_dataset("shapes_val"))
    draw_detections(dataset, runs, out / "detections.png", images=SHOWN_IMAGES, threshold=SHOWN_SCORE)


def print_table(frozen: dict[str, Any]) -> None:
    """Print box and mask AP of every backbone."""
    table = Table(title="Mask R-CNN R18-FPN on frozen features, made-up shapes")
    table.add_column("backbone")
    columns = [(kind, name) for kind in ("bbox", "segm") for name in ("AP", "AP50", "AP75")]
    for kind, name in columns:
        table.add_column(f"{kind} {name}", justify="right")
    for method, results in frozen.items():
        table.add_row(method, *(f"{results[kind][name]:.1f}" for kind, name in columns))
    Console().print(table)
