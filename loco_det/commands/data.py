"""`loco-det data`: check a data set with pictures, convert any tool's annotations to COCO, or draw a made-up set."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from loco_det import __version__
from loco_det.annotations.check import Checked, check_coco, check_source, masks_of
from loco_det.annotations.coco import CocoDataset, match_files
from loco_det.annotations.formats.conversion import convert_annotations, write_conversion
from loco_det.annotations.formats.summary import lines
from loco_det.annotations.index import CocoIndex, load_index
from loco_det.annotations.paths import is_annotated, is_path
from loco_det.annotations.registry import COCO_NAMES, Dataset, find_dataset, folder_name
from loco_det.annotations.rules import SUSPECT, finite_boxes
from loco_det.annotations.synthetic import CLASS_NAMES, draw_shapes
from loco_det.core.config import shell_value
from loco_det.core.errors import UserError
from loco_det.core.files import write_json
from loco_det.images.folders import open_source
from loco_det.images.source import Source
from loco_det.images.views import view_config
from loco_det.report.contact_sheet import annotated_sheet, two_view_sheet
from loco_det.report.plots import save_figure

PAIRS, ANNOTATED = 10, 12  # images on the sheets
IMAGE_FILES = (".tar", ".zip", ".txt")  # files that DATA.PATH accepts besides folders
BARS, BAR_WIDTH = 20, 30  # classes in the text; characters of the longest bar
PLOTTED = 100  # classes in histogram.png
ACTIONS_OF = {"annotations": "check", "out": "check", "train": "shapes", "test": "shapes"}  # of options
SIZES = {"check": 224, "convert": 224, "shapes": 128}  # pixels
TRAIN_SHAPES, TEST_SHAPES = 120, 40  # images


class Target(NamedTuple):
    """What to check: an image set, or images with their COCO annotations."""

    name: str
    source: Source | None
    paths: Dataset | None


def run(args: argparse.Namespace) -> int:
    """Check, convert or draw, and print; returns 0, or 1 if the check found a defect that stops training.

    Raises:
        UserError: nothing to check or to convert, an invalid annotation file, or a folder that is taken.
    """
    _check_options(args)
    if args.action == "convert":
        return _convert(args)
    if args.action == "shapes":
        return _draw_shapes(args)
    target = _target(args)
    out = args.out or Path("output") / "data_check" / folder_name(target.name)
    masks = ""
    if target.paths is None:
        checked = check_source(target.source, workers=args.workers, max_bad_share=args.max_bad_share)
    else:
        index = load_index(target.paths.annotations)
        masks = _masks(args.masks, target, index)
        checked = check_coco(target.paths, index, workers=args.workers, masks=masks)
    pictures = _pictures(args, target, checked, out)
    answer = {
        "loco_det": __version__,
        "data": args.path
        if target.paths is None
        else {k: str(getattr(target.paths, k)) for k in ("name", "images", "annotations", "derived")},
        "ok": not checked.stops,
        "masks": masks,
        "counts": checked.counts,
        "defects": [defect._asdict() for defect in checked.defects],
        "classes": checked.classes,
        "pictures": [str(path) for path in pictures],
    }
    write_json(out / "check.json", answer)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        _print(target, checked, masks, [out / "check.json", *pictures])
    return 1 if checked.stops else 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what the action does not take, and numbers out of range; completes --size."""
    if args.action == "convert" and args.to is None:
        raise UserError("data convert takes SRC OUT: what to convert, and the folder for annotations/*.json.")
    for option, action in ACTIONS_OF.items():
        value = getattr(args, option)
        if value is not None and args.action != action:
            raise UserError(f"--{option} {value} is of data {action}; leave it out of data {args.action}.")
    if args.action != "convert" and args.to is not None:
        remedy = f"give {args.to} as --out {args.to} if the pictures belong there"
        remedy = remedy if args.action == "check" else f"leave {args.to} out"
        raise UserError(f"data {args.action} takes one PATH; {remedy}.")
    args.size = SIZES[args.action] if args.size is None else args.size
    for option, value, least in (("seed", args.seed, 0), ("workers", args.workers, 0), ("size", args.size, 1)):
        if value < least:
            raise UserError(f"--{option} is {value}; give {least} or more.")


def _target(args: argparse.Namespace) -> Target:
    if args.annotations is not None:
        folder = Path(args.path)
        for path, there in ((folder, os.path.isdir(folder)), (args.annotations, os.path.isfile(args.annotations))):
            if not there:
                raise UserError(f"{path}: not there; --annotations FILE goes with PATH, the folder of its images")
        name = args.annotations.stem
        return Target(name, None, Dataset(name, folder, args.annotations))
    place = Path(args.path.partition("!")[0])
    if args.path in COCO_NAMES or (not os.path.exists(place) and _is_name(args.path)):
        return Target(args.path, None, find_dataset(args.path))
    of_images = place.suffix.lower() in IMAGE_FILES and not os.path.isdir(place)  # a pattern of shards is not a file
    folder_of_split = os.path.isdir(args.path.rpartition("@")[0])
    annotated = is_annotated(place) if os.path.exists(place) else is_path(args.path) or folder_of_split
    if args.format == "auto" and annotated and not of_images:
        name = args.path if is_path(args.path) else f"./{args.path}"
        return Target(name, None, find_dataset(name))
    return Target(Path(args.path).stem or "data", open_source(args.path, args.format), None)


def _masks(requested: str, target: Target, index: CocoIndex) -> str:
    """INPUT.MASK_FORMAT of the training to check for; empty for boxes only or pixel labels."""
    if target.paths.is_pixels or requested == "none":
        return ""
    return masks_of(index) if requested == "auto" else requested


def _is_name(text: str) -> bool:
    return "_" in text and not set(text) & set("/\\.{!")


def _convert(args: argparse.Namespace) -> int:
    """Write COCO files of all splits; report what was converted and what was not."""
    converted = convert_annotations(Path(args.path), args.format)
    files = write_conversion(converted, args.to)
    if args.json:
        print(json.dumps(converted.summary, indent=1))
        return 0
    summary = converted.summary
    print(f"{args.path}: {summary['format']}, images in {summary['image_folder']}, which stay there")
    table = Table(box=None, pad_edge=False)
    for column in ("split", "images", "objects", "with mask", *summary["classes"][:BARS]):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in summary["splits"].items():
        each = list(counts["objects_per_class"].values())[:BARS]
        table.add_row(split, *map(str, (counts["images"], counts["objects"], counts["with_mask"], *each)))
    _console().print(table)
    if len(summary["classes"]) > BARS:
        print(f"... and {len(summary['classes']) - BARS} more classes, in conversion.json")
    for line in lines(summary):
        print(line)
    for split, file in files.items():
        print(f"{split}: DATASETS.TRAIN \"('{file}@{converted.images}',)\"")
    print(f"MODEL.ROI_HEADS.NUM_CLASSES {len(summary['classes'])}")
    return 0


def _draw_shapes(args: argparse.Namespace) -> int:
    """Draw the made-up set; print its splits, its classes and a line that trains on it."""
    folder = Path(args.path)
    if os.path.realpath(folder) == os.path.realpath("."):
        raise UserError(f"{args.path} is the working directory; name a new folder: loco-det data shapes shapes")
    train, test = args.train, args.test
    splits = {"train": TRAIN_SHAPES if train is None else train, "test": TEST_SHAPES if test is None else test}
    draw_shapes(folder, splits, args.size, args.seed)
    names = {split: f"{folder}/@{split}" for split in splits}
    names = {split: name if is_path(name) else f"./{name}" for split, name in names.items()}  # an @ in the folder
    if args.json:
        print(json.dumps({**names, "classes": CLASS_NAMES}, indent=1))
        return 0
    for split, count in splits.items():
        print(f"{names[split]}: {count} images of {args.size} x {args.size} pixels")
    print(f"{len(CLASS_NAMES)} classes: {', '.join(CLASS_NAMES)}")
    data = " ".join(f"DATASETS.{split.upper()} {shell_value((name,))}" for split, name in names.items())
    keys = f"MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64 MODEL.ROI_HEADS.NUM_CLASSES {len(CLASS_NAMES)}"
    print(f"next: loco-det train --config-file configs/laptop.yaml --weights random:resnet18 {keys} {data}")
    return 0


def _console() -> Console:
    return Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)


def _pictures(args: argparse.Namespace, target: Target, checked: Checked, out: Path) -> list[Path]:
    """Draw the sample pictures; returns the files written."""
    written = []
    if checked.classes:
        written.append(out / "histogram.png")
        in_images = target.paths is None or target.paths.is_pixels
        _histogram(checked.classes, "images" if in_images else "annotations", written[-1])
    readable = np.flatnonzero(checked.readable)
    if not len(readable):
        return written
    rng = np.random.default_rng(args.seed)
    config = view_config(args.size, {"PRESET": args.preset})
    chosen = np.sort(rng.choice(readable, min(PAIRS, len(readable)), replace=False))
    if target.paths is None:
        images = [(target.source.read(int(i)), target.source.name(int(i))) for i in chosen]
    else:
        index = load_index(target.paths.annotations)
        names = match_files(target.paths, index).names
        files = [target.paths.images / names[int(i)] for i in chosen]
        images = [(file.read_bytes(), str(file)) for file in files]
        written += _annotated(CocoDataset(target.paths, index, names), readable, rng, out)
    written.append(out / "two_views.png")
    two_view_sheet(images, config, args.seed, written[-1])
    return written


def _annotated(dataset: CocoDataset, readable: np.ndarray, rng: np.random.Generator, out: Path) -> list[Path]:
    index = dataset.index
    drawable = finite_boxes(index) & np.isin(index.annotation_category, index.category_id)
    before = np.concatenate([[0], np.cumsum(drawable)])
    whole = before[index.first[1:]] - before[index.first[:-1]] == np.diff(index.first)
    candidates = readable[(whole & (np.diff(index.first) > 0))[readable]]
    chosen = np.sort(rng.choice(candidates, min(ANNOTATED, len(candidates)), replace=False))
    if annotated_sheet(dataset, chosen.tolist(), out / "annotated.png"):
        return [out / "annotated.png"]
    return []


def _histogram(classes: dict[str, int], unit: str, out: Path) -> None:
    """Horizontal bars, most frequent on top; logarithmic if counts differ by more than a factor of 50."""
    top = sorted(classes.items(), key=lambda item: -item[1])
    shown = top if len(top) <= PLOTTED else [*top[: PLOTTED // 2], *top[-PLOTTED // 2 :]]
    names, values = zip(*shown[::-1])
    figure = Figure(figsize=(7, 1 + 0.17 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(shown)), values, color="#0072B2", height=0.75)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=2, fontsize=6)
    axes.margins(x=0.08)  # for the counts
    axes.set_yticks(range(len(shown)), [name[:40] for name in names], fontsize=7, parse_math=False)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    positive = [value for value in values if value]
    if positive and max(positive) > 50 * min(positive):
        axes.set_xscale("log")
        axes.set_xlim(left=max(0.5, min(positive) * 0.5))
    rest = "" if len(shown) == len(top) else f", the {PLOTTED // 2} most and the {PLOTTED // 2} least frequent"
    axes.set(xlabel=unit, title=f"{sum(classes.values())} {unit} of {len(classes)} classes{rest}")
    axes.title.set_fontsize(9)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out)


def _print(target: Target, checked: Checked, masks: str, files: list[Path]) -> None:
    console = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in checked.counts.items():
        table.add_row(name, _worded(value))
    console.print(table)
    if checked.classes:
        console.print()
        _print_classes(console, checked.classes)
    console.print()
    for defect in checked.defects:
        remedy = f"; {defect.remedy}" if defect.remedy else ""
        console.print(f"{defect.effect}: {defect.count} x {defect.kind}{remedy}")
        for example in defect.examples:
            console.print(f"    {example}")
    for file in files:
        console.print(f"wrote {file}")
    kinds = len(checked.stops)
    verdict = f"{kinds} kind{'s' * (kinds != 1)} of defect would stop it" if kinds else "nothing stands against it"
    if not kinds and any(defect.effect == SUSPECT for defect in checked.defects):
        verdict = f"nothing stops it, but look at what is {SUSPECT}"
    what = f"train on {target.name}"
    if target.paths is None:
        what = f"pretrain on the images of {target.name}"
    elif not target.paths.is_pixels:
        what += f" with masks (INPUT.MASK_FORMAT {masks})" if masks else " with boxes alone (MODEL.MASK_ON False)"
    console.print(f"{'NOT ' * bool(kinds)}OK to {what}: {verdict}")


def _worded(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"


def _print_classes(console: Console, classes: dict[str, int]) -> None:
    top = sorted(classes.items(), key=lambda item: -item[1])
    most = max(1, top[0][1])
    shown = top if len(top) <= BARS else top[:BARS]
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, count in shown:
        table.add_row(name, f"{count:>8,}", "#" * round(BAR_WIDTH * count / most))
    console.print(table)
    if len(top) > len(shown):
        console.print(f"... and {len(top) - len(shown)} more classes, the rarest {top[-1][0]} with {top[-1][1]:,}")
