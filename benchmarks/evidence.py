"""What the methods give at equal budget and equal decoder: probes of every stage on CIFAR-10, frozen detection on COCO.

    DETECTRON2_DATASETS=... python benchmarks/evidence.py run --cifar cifar10.zip --out output/evidence \
        --json benchmarks/results/evidence_cpu.json
    python benchmarks/evidence.py page benchmarks/results/evidence_*.json --out docs/results.md

`run` makes every cell (method x seed): pretrain on CIFAR-10's training images, probe each stage, convert, train a
detector of persons on the frozen features and evaluate it. Each is the command that a user would give; it and its
seconds are recorded. What is already in --out is not made again, so a run that was stopped goes on, and several with
--seeds of their own can share it. `page` writes the page, and beside it its pictures, from the figures alone.

JSON: {"setting": {...}, "environment": {...}, "cells": [{"method", "seed", "commands": [[text, seconds], ...],
"probes": {protocol: {stage: {"top1", "top1_interval"}}}, "detection": {"bbox/AP": percent, ...}}]}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout it stands in, installed or not

from loco_det.detection.record import environment
from loco_det.report.drawing import COLOURS
from loco_det.report.plots import save_figure
from loco_det.report.statistics import summarise
from loco_det.runtime import atomic_write, write_json

METHODS = ("random", "gim", "simclr", "loco")
PROTOCOLS = ("knn", "ridge")
STAGES = ("stem", "res2", "res3", "res4", "res5")
NUMBERS = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    run = jobs.add_parser("run")
    run.add_argument("--cifar", type=Path, required=True, help="zip of CIFAR-10 as NAME/{train,test}/CLASS/*.jpg")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--json", type=Path, required=True)
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    run.add_argument("--steps", type=int, default=400, help="pretraining steps of --batch images")
    run.add_argument("--batch", type=int, default=64)
    run.add_argument("--size", type=int, default=64, help="pixels of a view and of a probe's image")
    run.add_argument("--limit", type=int, default=10_000, help="images of each split that the probes take")
    run.add_argument("--iterations", type=int, default=200, help="of detector training, 4 images each")
    run.add_argument("--device", default="cpu")
    page = jobs.add_parser("page")
    page.add_argument("results", type=Path, nargs="+")
    page.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.job == "run":
        measure(args)
    else:
        results = [json.loads(path.read_text()) for path in args.results]
        for result in results:
            save_figure(probe_curves(result), args.out.parent / picture(result))
        with atomic_write(args.out, "w") as file:
            file.write(page_text(results))


# --- running ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    images = unpacked(args.cifar, args.out)
    setting = {name: getattr(args, name) for name in ("steps", "batch", "size", "limit", "iterations", "device")}
    cells = []
    for seed in args.seeds:
        for method in METHODS:
            cells.append(cell(method, seed, images, args))
            where = environment(torch.device(args.device))
            write_json(args.json, {"setting": setting, "environment": where, "cells": cells})


def unpacked(archive: Path, out: Path) -> Path:
    """The folder with train and test: the archive's only one."""
    with zipfile.ZipFile(archive) as file:
        (top,) = {name.partition("/")[0] for name in file.namelist()}
        if not (out / top / "test").is_dir():
            file.extractall(out)
    return out / top


def cell(method: str, seed: int, images: Path, args: argparse.Namespace) -> dict[str, Any]:
    folder = args.out / f"{method}_{seed}"
    backbone, weights = folder / "pretrain" / "backbone.safetensors", folder / "backbone.pkl"
    done: list[tuple[str, float]] = []

    def run(made: Path, *words: object) -> None:
        text = " ".join(["loco-det", *map(str, words)])
        record = made.parent / f".{made.name}.seconds"
        if not record.exists():
            begun = time.monotonic()
            subprocess.run([sys.executable, "-m", "loco_det.cli", *map(str, words)], check=True)
            record.write_text(f"{time.monotonic() - begun:.1f}")
        done.append((text.replace(f"{args.out}/", ""), float(record.read_text())))

    pretraining = {
        "METHOD": method,
        "SEED": seed,
        "DATA.PATH": images / "train",
        "DATA.FORMAT": "folder",
        "DATA.IMAGE_SIZE": args.size,
        "SOLVER.BATCH_SIZE": args.batch,
        "SOLVER.MAX_STEPS": args.steps,
        "DEVICE": args.device,
        "OUTPUT_DIR": folder / "pretrain",
    }
    run(backbone, "pretrain", "--quiet", "--config-file", "configs/pretrain/quickstart.yaml", *pairs(pretraining))
    probes = {}
    for protocol in PROTOCOLS:
        made = folder / f"{protocol}.json"
        told = ("--protocol", protocol, "--image-size", args.size, "--limit", args.limit, "--device", args.device)
        run(made, "probe", backbone, "--data", images, *told, "--no-cache", "--quiet", "--json", made)
        stages = json.loads(made.read_text())["stages"]
        probes[protocol] = {s: {key: stages[s][key] for key in ("top1", "top1_interval")} for s in stages}
    run(weights, "convert", backbone, weights, "--quiet")
    detector = {
        "MODEL.WEIGHTS": weights,
        "MODEL.DEVICE": args.device,
        "MODEL.ROI_HEADS.NUM_CLASSES": 1,
        "DATASETS.TRAIN": "('coco_2017_train@classes_person',)",
        "DATASETS.TEST": "('coco_2017_val@classes_person',)",
        "INPUT.MIN_SIZE_TRAIN": "(160,176,192)",
        "INPUT.MAX_SIZE_TRAIN": 320,
        "INPUT.MIN_SIZE_TEST": 192,
        "INPUT.MAX_SIZE_TEST": 320,
        "INPUT.MASK_FORMAT": "polygon",
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.BASE_LR": 0.005,  # at 0.02 the box head dies: every region gets one score
        "SOLVER.WARMUP_ITERS": 50,
        "SOLVER.MAX_ITER": args.iterations,
        "SOLVER.STEPS": f"({args.iterations * 3 // 4},)",
        "SEED": seed,
        "OUTPUT_DIR": folder / "detector",
    }
    made = folder / "detector" / "metrics.json"
    run(
        made,
        "train",
        "--quiet",
        "--engine",
        "torchvision",
        "--config-file",
        "configs/quickstart.yaml",
        *pairs(detector),
    )
    last = json.loads(made.read_text().splitlines()[-1])
    return {
        "method": method,
        "seed": seed,
        "commands": done,
        "probes": probes,
        "detection": {name: last[name] for name in NUMBERS},
    }


def pairs(settings: dict[str, Any]) -> list[str]:
    return [str(part) for pair in settings.items() for part in pair]


# --- the page ---------------------------------------------------------------------------------------------------


def page_text(results: list[dict[str, Any]]) -> str:
    """docs/results.md from the figures alone."""
    return "\n".join([HEAD, *(section(result) for result in results), TAIL])


def section(result: dict[str, Any]) -> str:
    setting, machine, cells = result["setting"], result["environment"], result["cells"]
    seeds = sorted({cell["seed"] for cell in cells})
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    seconds = sum(spent for cell in cells for _, spent in cell["commands"])
    told = " ".join(f"--{name} {value}" for name, value in setting.items())
    chosen = " ".join(map(str, seeds))
    parts = [
        f"## On {machine['device']}, {len(seeds)} seeds\n",
        f"{setting['steps']} steps of {setting['batch']} images at {setting['size']} pixels on CIFAR-10's training "
        f"images, ResNet-18 with ImageNet's stem; probes from {setting['limit']} training and "
        f"{setting['limit']} test images; detector: {setting['iterations']} iterations of 4 images. The commands took "
        f"{seconds / 3600:.1f} hours together, several at a time or beside other work, on {machine['cores']} cores "
        f"with {machine['threads']} thread(s) each, torch {machine['packages']['torch']}, loco_det "
        f"{machine['loco_det']}. Mean over seeds, in brackets the 95 % interval of the mean.\n",
        f"![Top-1 of every stage's probes, by method]({picture(result)})\n",
    ]
    for protocol in PROTOCOLS:
        present = [s for s in STAGES if s in cells[0]["probes"][protocol]]
        rows = [
            [m, *(number([c["probes"][protocol][s]["top1"] for c in cells if c["method"] == m]) for s in present)]
            for m in methods
        ]
        parts += [f"CIFAR-10, {protocol} probe, top-1 in percent:\n", table(["backbone", *present], rows)]
    rows = [[m, *(number([c["detection"][n] for c in cells if c["method"] == m], 2) for n in NUMBERS)] for m in methods]
    parts += [
        "Persons in 80 + 80 images of COCO, Mask R-CNN on frozen features, percent:\n",
        table(["backbone", *NUMBERS], rows),
    ]
    best = max(statistics.mean(c["detection"]["bbox/AP"] for c in cells if c["method"] == m) for m in methods)
    if best < 1:
        parts += [
            f"No backbone's mean box AP is above {best:.2f}: at this budget and with 80 images to learn from the "
            "detector finds little, whatever it stands on. The columns show that the road runs on real images; tenths "
            "of a point say nothing of the methods. Detection that is learned in minutes is on [quickstart's "
            "page](quickstart.md).\n"
        ]
    parts += [
        "Made by (`DETECTRON2_DATASETS` holds COCO):\n",
        "```text",
        f"python benchmarks/evidence.py run --cifar cifar10.zip --out output/evidence --seeds {chosen} {told} --json "
        f"benchmarks/results/evidence_{setting['device']}.json",
        "```\n",
        "which ran, for each method and seed, such as these:\n",
        "```text",
        *(text for text, _ in cells[-1]["commands"]),
        "```\n",
    ]
    return "\n".join(parts)


def picture(result: dict[str, Any]) -> str:
    """Name of the file with a result's curves, beside the page."""
    return f"results_{result['setting']['device']}.png"


def probe_curves(result: dict[str, Any]) -> Figure:
    """One panel a protocol: top-1 over stages, a line a method, with the interval of the mean over seeds."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    methods = list(dict.fromkeys(cell["method"] for cell in result["cells"]))
    for axes, protocol in zip(figure.subplots(1, len(PROTOCOLS), sharey=True), PROTOCOLS):
        for place, (method, colour) in enumerate(zip(methods, COLOURS)):
            probes = [cell["probes"][protocol] for cell in result["cells"] if cell["method"] == method]
            stages = [stage for stage in STAGES if stage in probes[0]]
            found = [summarise([probe[stage]["top1"] for probe in probes]) for stage in stages]
            means = [f["mean"] for f in found]
            reach = [0 if f["ci95"] is None else f["ci95"][1] - f["mean"] for f in found]
            x = [i + 0.06 * place for i in range(len(stages))]  # side by side, not upon each other
            axes.errorbar(x, means, yerr=reach, color=colour, marker="o", capsize=2, label=method)
        axes.set(title=protocol, xticks=range(len(stages)), xticklabels=stages)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("top-1, %")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    return figure


def number(values: list[float], digits: int = 1) -> str:
    found = summarise(values)
    mean, *ends = (f"{round(x, digits) + 0.0:.{digits}f}" for x in (found["mean"], *(found["ci95"] or ())))  # no -0.0
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


HEAD = """\
# What was measured

Written by `python benchmarks/evidence.py page` from the figures in `benchmarks/results/`, which
`python benchmarks/evidence.py run` made. Random, Greedy InfoMax, SimCLR and LoCo get the same images, steps, decoder,
optimizer and seeds; they differ in `METHOD` alone.

Budgets here are minutes. They show that the whole road is sound and that every stage of every method can be judged;
the order of the methods at such budgets says nothing of their order after hundreds of epochs.
"""

TAIL = """\
## What was not run

- Pretraining on ImageNet, of any method, at any length; so none of the paper's figures were reproduced.
- Transfer to COCO or Cityscapes at full size.
- The table above on a GPU, unless a section says so.
"""

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    main()
