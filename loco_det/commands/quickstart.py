"""The command `quickstart`: all steps on made-up images, from data and four backbones to frozen detectors and AP."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loco_det.annotations.check import masks_of
from loco_det.annotations.coco import image_files, load_coco
from loco_det.annotations.paths import coco_splits
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.annotations.subsets import hashed_order
from loco_det.annotations.synthetic import make_shapes_dataset
from loco_det.commands.pretrain import pretrain_file
from loco_det.convert import convert
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, write_json
from loco_det.core.log import is_quiet, log, setup_logging
from loco_det.detection.keys import load_cfg
from loco_det.detection.train import train_net
from loco_det.report.plots import draw_detections, plot_losses

METHODS = ("random", "gim", "simclr", "loco")
TRAIN_IMAGES, VAL_IMAGES = 400, 100
FEW_IMAGES = 96  # of a user's: fewer are pretrained on in smaller batches
OWN_SIDE = 160  # pixels of the shorter side of a user's images
SHOWN_IMAGES, SHOWN_BEST = (2, 3, 4, 5), 3  # images, and detections of each
# Times relative to each other, for the minutes left: roughly those between the steps in the quickstart's log.txt.
DATA_COST, DETECTOR_COST = 0.07, 0.5
PRETRAINING_COST = {"random": 0.05, "gim": 0.85, "simclr": 0.8, "loco": 1.1}
ROBOFLOW = "_annotations.coco.json"
SPLITS = ("train", "trainval", "training", "val", "valid", "validation", "test", "testing", "dev")
TRAIN_NAMES, TEST_NAMES = ("train",), ("val", "test", "dev")  # beginnings of the splits' names


def run(args: argparse.Namespace) -> None:
    """Run all steps with the parsed arguments.

    Raises:
        UserError: a negative seed, the folder cannot be written, or --data cannot be used.
    """
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; give 0 or more.")
    quickstart(args.out, args.seed, args.data)


def quickstart(out: Path, seed: int = 0, data: str | None = None) -> dict[str, Any]:
    """Pretrain, convert, train and evaluate on the CPU; the same data, budget and schedule for every backbone.

    Args:
        out: folder for everything; each run has its own folder in it.
        seed: of the images, the weights, the augmentation and the sampling.
        data: a COCO, Pascal VOC or YOLO folder; None for made-up images.

    Returns:
        {"frozen": {method: {"bbox": {"AP": percent, ...}, "segm": {...}}}, "seed": ..., "seconds": ...}, as written to
        out/results.json; out/detections.png and out/losses.png show it.

    Raises:
        UserError: out cannot be written, or the data cannot be used.
    """
    begun = time.monotonic()
    setup_logging(out)
    stages = Stages([DATA_COST, *(cost for method in METHODS for cost in (PRETRAINING_COST[method], DETECTOR_COST))])
    frozen = {}
    with _datasets_in(out.absolute() / "datasets"):
        stages.begin("reading your images" if data else f"drawing {TRAIN_IMAGES + VAL_IMAGES} images")
        sets = own_sets(data, out) if data else made_up_sets(out, seed)
        for method in METHODS:
            setup_logging(out)  # after the last run's own log ended
            frozen[method] = _evaluate(method, out, seed, sets, stages)
        results = {"frozen": frozen, "seed": seed, "seconds": round(time.monotonic() - begun, 1)}
        write_json(out / "results.json", results)
        _draw(out, sets)
    if not is_quiet():
        print_table(frozen)
        print(verdict(frozen))
        print(f"pictures: {out / 'detections.png'}, {out / 'losses.png'}")
    return results


class Stages:
    """Says what is going on and how long the rest will take, from the time that the stages before have taken.

    Args:
        costs: of each stage, relative to each other.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs, self.number, self.started = list(costs), 0, time.monotonic()

    def begin(self, what: str) -> None:
        """Log the next stage."""
        done, left = sum(self.costs[: self.number]), sum(self.costs[self.number :])
        rest = ""
        if done:
            minutes = (time.monotonic() - self.started) / done * left / 60
            rest = f"; about {minutes:.0f} minutes left" if minutes >= 1.5 else "; about a minute left"
        self.number += 1
        log.info("step %d of %d: %s%s", self.number, len(self.costs), what, rest)


# --- data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """Training and test set by name, the images to pretrain on, and what the configurations need beside these."""

    train: str
    test: str
    images: Path
    pretraining: dict[str, Any] = field(default_factory=dict)
    detector: dict[str, Any] = field(default_factory=dict)


def made_up_sets(out: Path, seed: int) -> Sets:
    """Draw the shapes of `annotations/synthetic.py`."""
    root = out.absolute() / "datasets"
    make_shapes_dataset(root, train=TRAIN_IMAGES, val=VAL_IMAGES, seed=seed)
    return Sets("shapes_train", "shapes_val", root / "shapes" / "train")


def own_sets(data: str, out: Path) -> Sets:
    """Take a training and a test set from a user's folder, at most `TRAIN_IMAGES` and `VAL_IMAGES` of them.

    Raises:
        UserError: no annotated images are found there.
    """
    train, test = _splits(Path(data).absolute(), out)
    train, test = _at_most(train, TRAIN_IMAGES), _at_most(test, VAL_IMAGES)
    dataset = find_dataset(train)
    listed, count = out / "train_images.txt", len(dataset.index.image_id)
    few = {"SOLVER.BATCH_SIZE": max(2, count // 4)} if count < FEW_IMAGES else {}
    with atomic_write(listed, "w") as file:
        file.writelines(f"{path}\n" for path in image_files(dataset))
    masks = masks_of(dataset.index)
    side = {"INPUT.MIN_SIZE_TRAIN": (OWN_SIDE,), "INPUT.MIN_SIZE_TEST": OWN_SIDE}
    side |= {"INPUT.MAX_SIZE_TRAIN": 2 * OWN_SIDE, "INPUT.MAX_SIZE_TEST": 2 * OWN_SIDE}
    detector = {**side, "MODEL.ROI_HEADS.NUM_CLASSES": len(dataset.index.category_names), "MODEL.MASK_ON": bool(masks)}
    return Sets(
        train, test, listed, {"DATA.FORMAT": "list", **few}, {**detector, "INPUT.MASK_FORMAT": masks or "polygon"}
    )


def _splits(folder: Path, out: Path) -> tuple[str, str]:
    """Return the names of a training and a test set in a folder; a single set is divided, four to one."""
    found = {split: f"{folder}/@{split}" for split in coco_splits(folder)}
    for inside in () if found else sorted(path for path in folder.glob("*/") if (path / ROBOFLOW).is_file()):
        found[inside.name] = f"{inside}/"
    if not found:
        found = {split: f"{folder}/@{split}" for split in SPLITS if _is_there(f"{folder}/@{split}")}
    train, test = (
        next((name for start in starts for split, name in found.items() if split.startswith(start)), None)
        for starts in (TRAIN_NAMES, TEST_NAMES)
    )
    if train and test:
        return train, test
    return _divided(find_dataset(train or test or next(iter(found.values()), f"{folder}/")), out)


def _is_there(name: str) -> bool:
    try:
        find_dataset(name)
    except UserError:
        return False
    return True


def _divided(dataset: Dataset, out: Path) -> tuple[str, str]:
    """Write a set's COCO file as two: a fifth of the images, chosen by their names' hash, for the test."""
    whole = json.loads(dataset.annotations.read_bytes())
    order = hashed_order([str(image["id"]) for image in whole["images"]], 0)
    count = max(1, len(order) // 5)
    names = []
    for split, rows in (("train", order[count:]), ("test", order[:count])):
        images = [whole["images"][row] for row in sorted(rows)]
        ids = {image["id"] for image in images}
        part = {"images": images, "annotations": [a for a in whole["annotations"] if a["image_id"] in ids]}
        write_json(out / f"{split}.json", {**part, "categories": whole["categories"]})
        names.append(f"{(out / f'{split}.json').absolute()}@{dataset.images}")
    log.info("%s has one set: %d of its %d images, chosen by hash, are the test", dataset.name, count, len(order))
    return names[0], names[1]


def _at_most(name: str, images: int) -> str:
    count = len(find_dataset(name).index.image_id)
    return name if count <= images else f"{name}@{100 * images / count:.6g}pct_seed0"


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


# --- one backbone -----------------------------------------------------------------------------------------------


def _evaluate(method: str, out: Path, seed: int, sets: Sets, stages: Stages) -> dict[str, Any]:
    folder = out / method
    what = "measuring an untrained network's statistics" if method == "random" else "pretraining without labels"
    stages.begin(f"{method}: {what}")
    settings = {"METHOD": method, "DATA.PATH": sets.images, "SEED": seed, "OUTPUT_DIR": folder / "pretrain"}
    artifact = pretrain_file("configs/pretrain/quickstart.yaml", _words({**settings, **sets.pretraining}))
    weights = folder / "backbone.pkl"
    convert(artifact, weights)
    setup_logging(folder / "detector")
    stages.begin(f"{method}: a detector on the frozen features, and its AP")
    settings = {"MODEL.WEIGHTS": weights, "SEED": seed, "OUTPUT_DIR": folder / "detector"}
    settings |= {"DATASETS.TRAIN": (sets.train,), "DATASETS.TEST": (sets.test,)}
    cfg, _ = load_cfg("configs/quickstart.yaml", _words({**settings, **sets.detector}))
    return train_net(cfg, engine="torchvision", fast=True)


def _words(settings: dict[str, Any]) -> list[str]:
    return [str(part) for pair in settings.items() for part in pair]


def _draw(out: Path, sets: Sets) -> None:
    plot_losses({m: out / m / "pretrain" / "metrics.json" for m in METHODS if m != "random"}, out / "losses.png")
    runs = {
        f"frozen {method}": json.loads((out / method / "detector/inference/coco_instances_results.json").read_text())
        for method in METHODS
    }
    dataset = load_coco(find_dataset(sets.test))
    images = [number for number in SHOWN_IMAGES if number < len(dataset)]
    draw_detections(dataset, runs, out / "detections.png", images=images, best=SHOWN_BEST)


def print_table(frozen: dict[str, Any]) -> None:
    """Print box and mask AP of every backbone, in whole percent: more digits differ between processors."""
    table = Table(title="a small R-CNN on frozen features: AP in percent")
    table.add_column("backbone")
    kinds = [kind for kind in ("bbox", "segm") if kind in next(iter(frozen.values()))]
    columns = [(kind, name) for kind in kinds for name in ("AP", "AP50", "AP75")]
    for kind, name in columns:
        table.add_column(f"{kind} {name}", justify="right")
    for method, results in frozen.items():
        table.add_row(method, *(f"{results[kind][name]:.0f}" for kind, name in columns))
    Console().print(table)


def verdict(frozen: dict[str, Any]) -> str:
    """Return what the table says: which pretrained backbones detect better than the untrained one, by box AP."""
    scores = {method: results["bbox"]["AP"] for method, results in frozen.items()}
    untrained = scores.pop("random")
    better = [method for method, score in scores.items() if score > untrained]
    others = [method for method in scores if method not in better]
    said = f"{' and '.join(better) or 'no pretrained backbone'} detect{'s' * (len(better) < 2)}"
    said = said if others else "every pretrained backbone detects"
    least, most = min(scores.values()), max(scores.values())
    return (
        f"{said} better than the untrained one: box AP {least:.0f} to {most:.0f} against {untrained:.0f}. After "
        "minutes the order of the three says nothing, and the digits differ between processors."
    )
