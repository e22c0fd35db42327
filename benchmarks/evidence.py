"""The paper's claim in small: SimCLR, GIM and LoCo with their own decoders on CIFAR-10, probed at every stage.

    python benchmarks/evidence.py rates --cifar cifar10.zip --out output/evidence
    python benchmarks/evidence.py run   --cifar cifar10.zip --out output/evidence
    python benchmarks/evidence.py detect --data BCCD --out output/evidence
    python benchmarks/evidence_page.py

`rates` chooses each method's learning rate on images that are held out of the training images; with --rows it shows
what that of other rows would be. `run` pretrains every row with every seed and probes it on CIFAR-10's test images.
`detect` trains a detector on each of these networks, frozen, and on an untrained one. evidence_page.py writes
docs/results.md, its pictures and README's table.

Each cell is made by the commands that a user would give. One JSON a cell lies in benchmarks/results/evidence/, and a
cell that has one is not made again. Several processes may work at once, on cells of their own; a run that was stopped
goes on where it was.

A row's METHOD, UNITS, DECODER and SHARING are those of the paper's configuration of the same name under
configs/pretrain/; configs/pretrain/evidence_*.yaml hold what all rows share.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout it stands in, installed or not

from loco_det.annotations.registry import find_dataset
from loco_det.core.device import has_bf16_units
from loco_det.core.files import write_json
from loco_det.core.log import log, setup_logging
from loco_det.detection.run_record import environment
from loco_det.paper import plan
from loco_det.paper.data import PRETRAINED, unpack

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
BLOCKS = [f"res{stage}.{block}" for stage in (2, 3, 4, 5) for block in (0, 1)]  # of ResNet-18
SEEDS = (0, 1, 2)
RATES = (0.0625, 0.125, 0.25, 0.5, 1.0)
RATES_OF = {"r18": RATES, "presnet": RATES[:3]}  # of each network; every row of r18 has its best among those three
RATE_EPOCHS = 6


@dataclass(frozen=True)
class Row:
    """One method on one network: `config` is the paper's configuration whose switches it has."""

    network: str  # r18 | presnet
    config: str
    rate_of: str  # the row whose learning rate it has
    units: list[list[str]] | None = None  # instead of the configuration's


ROWS = {
    "simclr": Row("r18", "simclr_r50", "simclr"),
    "gim": Row("r18", "gim_r50", "gim"),
    "gim_conv": Row("r18", "gim_conv_r50_100ep", "gim"),
    "loco_mlp": Row("r18", "loco_mlp_r50_100ep", "loco"),
    "loco": Row("r18", "loco_r50", "loco"),
    "loco_res2": Row("r18", "loco_res2_r50", "loco"),
    "gim_blocks": Row("r18", "gim_r50", "gim", [[block, block] for block in BLOCKS]),
    "loco_blocks": Row("r18", "loco_r50", "loco", [list(pair) for pair in pairwise(BLOCKS)]),
    "simclr_presnet": Row("presnet", "simclr_r50", "simclr_presnet"),
    "gim_presnet": Row("presnet", "gim_r50", "gim_presnet"),
    "loco_presnet": Row("presnet", "loco_r50", "loco_presnet"),
}


def main() -> None:
    args = arguments().parse_args()
    setup_logging()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.job == "detect":
        args.data = args.data.resolve()
        detect(args)
        return
    images = unpacked(args.cifar, args.out)
    if args.job == "rates":
        choose_rates(args)
    else:
        measure(args, images)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    ones_own_rate = [row for row in ROWS if ROWS[row].rate_of == row]
    resnets = [row for row in ROWS if ROWS[row].network == "r18"]
    for name, rows in {"rates": ones_own_rate, "run": list(ROWS), "detect": resnets}.items():
        job = jobs.add_parser(name)
        job.add_argument("--rows", nargs="+", choices=resnets if name == "detect" else list(ROWS), default=rows)
        job.add_argument("--out", type=Path, required=True, help="checkpoints, features and backbones")
        if name != "rates":
            job.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
        if name != "detect":
            job.add_argument("--cifar", type=Path, required=True, help="zip of CIFAR-10: NAME/{train,test}/CLASS/*.jpg")
    told = "a detection set with the splits train and test, e.g. in Pascal VOC's folders"
    jobs.choices["detect"].add_argument("--data", type=Path, required=True, help=told)
    return parser


def switches(row: Row) -> dict[str, Any]:
    """{"METHOD": "loco", "DECODER.CONV_BLOCKS": 1, ...}: what the paper's configuration sets, its bases included."""
    return {**plan.switches(row.config), **({"UNITS": row.units} if row.units else {})}


# --- images -----------------------------------------------------------------------------------------------------


def unpacked(archive: Path, out: Path) -> Path:
    """The folder with train and test, the archive's only one; beside it data.LISTS."""
    folder = out / plan.folder_in(archive)
    unpack(archive, folder, out)
    return folder


# --- cells ------------------------------------------------------------------------------------------------------


def choose_rates(args: argparse.Namespace) -> None:
    """Pretrain each method briefly with each rate, then probe its last stage by ridge on the images held out."""
    for name in args.rows:
        rates = RATES_OF[ROWS[name].network]
        for rate in rates:
            made = RESULTS / f"rate_{name}_{rate:g}.json"
            with claimed(made, args.out) as mine:
                if mine:
                    write_json(made, rate_cell(name, rate, args.out))
        if all((RESULTS / f"rate_{name}_{rate:g}.json").is_file() for rate in rates):
            log.info("%s: rate %g", name, best_rate(name))


def best_rate(name: str) -> float:
    """The rate that `rates` found best for a row."""
    scores = {}
    for rate in RATES_OF[ROWS[name].network]:
        file = RESULTS / f"rate_{name}_{rate:g}.json"
        if not file.is_file():
            raise SystemExit(f"{file} is not there; run: python benchmarks/evidence.py rates --rows {name} ...")
        scores[rate] = json.loads(file.read_text())["held_out_top1"]
    return max(scores, key=scores.get)


def rate_cell(name: str, rate: float, out: Path) -> dict[str, Any]:
    folder = out / f"rate_{name}_{rate:g}"
    commands = Commands(out)
    backbone = pretrain(commands, ROWS[name], folder, rate, seed=100, epochs=RATE_EPOCHS)
    told = ("--data", out / plan.small_images(ROWS[name].network), "--val", out / "held_out.txt")
    found = probe(commands, backbone, folder, "ridge", told)
    last = list(found)[-1]
    return {"row": name, "rate": rate, "epochs": RATE_EPOCHS, "stage": last, "held_out_top1": found[last]["top1"],
            "commands": commands.done}  # fmt: skip


def measure(args: argparse.Namespace, images: Path) -> None:
    for seed in args.seeds:
        for name in args.rows:
            made = RESULTS / f"{name}_{seed}.json"
            with claimed(made, args.out) as mine:
                if mine:
                    write_json(made, cell(name, seed, args.out, images))


def cell(name: str, seed: int, out: Path, images: Path) -> dict[str, Any]:
    """Pretrain and probe; everything that the page says of it."""
    folder, row, rate = out / f"{name}_{seed}", ROWS[name], best_rate(ROWS[name].rate_of)
    commands = Commands(out)
    backbone = pretrain(commands, row, folder, rate, seed)
    probes = {}
    for protocol, options in plan.SMALL_PROBES.items():
        told = ("--data", images, *options, "--cache", folder / "features")
        probes[protocol] = probe(commands, backbone, folder, protocol, told)
    return {
        "row": name,
        "network": row.network,
        "seed": seed,
        "rate": rate,
        "switches": switches(row),
        "images": PRETRAINED[plan.small_images(row.network)],
        "environment": environment(torch.device("cpu")),
        "precision": "bfloat16" if has_bf16_units() else "float32",  # what SOLVER.AMP bf16 is here
        "commands": commands.done,
        "losses": losses(folder / "metrics.json"),
        "probes": probes,
    }


def pretrain(commands: Commands, row: Row, folder: Path, rate: float, seed: int, epochs: int | None = None) -> Path:
    settings = {
        **switches(row),
        "SOLVER.BASE_LR": rate,
        "SEED": seed,
        "DATA.PATH": commands.out / plan.small_images(row.network),
    }
    settings |= {"OUTPUT_DIR": folder, **({"SOLVER.EPOCHS": epochs} if epochs else {})}
    config, made = ROOT / "configs" / "pretrain" / f"evidence_{row.network}.yaml", folder / "backbone.safetensors"
    commands.run(made, "pretrain", "--quiet", "--resume", "--config-file", config, *plan.words_of(settings))
    return made


def probe(
    commands: Commands, backbone: Path, folder: Path, protocol: str, told: tuple[object, ...]
) -> dict[str, dict[str, Any]]:
    """{stage: {"top1", "top1_interval"}}"""
    made = folder / f"{protocol}.json"
    commands.run(made, "probe", backbone, "--protocol", protocol, *told, "--workers", 0, "--quiet", "--json", made)
    stages = json.loads(made.read_text())["stages"]
    return {stage: {key: found[key] for key in ("top1", "top1_interval")} for stage, found in stages.items()}


def losses(metrics: Path) -> dict[str, list[list[float]]]:
    """{unit: [[step, loss], ...]} with about 60 points, each the mean of the lines since the one before."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if any(key.startswith("loss/") for key in line)]
    size = max(1, len(lines) // 60)
    found: dict[str, list[list[float]]] = {}
    for some in (lines[at : at + size] for at in range(0, len(lines), size)):
        for key in (key for key in some[0] if key.startswith("loss/")):
            mean = statistics.fmean(line[key] for line in some)
            found.setdefault(key.removeprefix("loss/"), []).append([some[-1]["iteration"] + 1, round(mean, 4)])
    return found


# --- detection --------------------------------------------------------------------------------------------------


def detect(args: argparse.Namespace) -> None:
    """Train a detector on every row's frozen network and on an untrained one, then let `report` compare them."""
    cells = [(row, seed) for seed in args.seeds for row in ("random", *args.rows)]
    for row, seed in cells:
        with claimed(found_by(row, seed, args.out), args.out, f"frozen_{row}_{seed}") as mine:
            if mine:
                detector(row, seed, args)
    made = RESULTS / "detection.json"
    with claimed(made, args.out) as mine:
        if mine and all(found_by(*cell, args.out).is_file() for cell in cells):
            write_json(made, comparison(cells, args))


def found_by(row: str, seed: int, out: Path) -> Path:
    return out / f"frozen_{row}_{seed}" / "inference" / "coco_instances_results.json"


def detector(row: str, seed: int, args: argparse.Namespace) -> list[tuple[str, float]]:
    """Train and evaluate a detector on the frozen network that `run` pretrained, or "random"; the commands."""
    commands, folder = Commands(args.out, args.data), args.out / f"frozen_{row}_{seed}"
    backbone = args.out / f"{row}_{seed}" / "backbone.safetensors"
    if row == "random":
        settings = {"METHOD": row, "SEED": seed, "DATA.PATH": args.out / "train.txt", "OUTPUT_DIR": backbone.parent}
        config = ROOT / "configs" / "pretrain" / "evidence_r18.yaml"
        commands.run(backbone, "pretrain", "--quiet", "--resume", "--config-file", config, *plan.words_of(settings))
    elif not backbone.is_file():
        raise SystemExit(f"{backbone} is not there; run: python benchmarks/evidence.py run --rows {row} ...")
    told = (backbone, "--data", args.data, "--out", folder, "--seed", seed)
    commands.run(found_by(row, seed, args.out), *told, program="benchmarks/frozen_detector.py")
    return commands.done


def comparison(cells: list[tuple[str, int]], args: argparse.Namespace) -> dict[str, Any]:
    """AP of every row, mean and interval over seeds, and each seed's paired bootstrap, as `report` gives them."""
    commands = [detector(*cell, args) for cell in cells]  # nothing is made again
    last = Commands(args.out, args.data)
    made = args.out / "frozen_report" / "report.json"
    runs = [f"{row}={args.out}/frozen_{row}_{seed}" for row, seed in cells]
    made.unlink(missing_ok=True)  # it may be of other rows and seeds
    last.run(made, "report", "--quiet", *runs, "--baseline", "simclr", "--out", made.parent)
    (experiment,) = json.loads(made.read_text())["experiments"]
    return {
        "data": args.data.name,
        "images": {split: len(find_dataset(f"{args.data}@{split}").index.file_name) for split in ("train", "test")},
        "seeds": args.seeds,
        "rows": {row["backbone"]: row["numbers"] for row in experiment["backbones"]},
        "paired": experiment["paired"],
        "resamples": experiment["resamples"],
        "environment": environment(torch.device("cpu")),
        "commands": [*commands[-1], *last.done],
        "seconds": sum(seconds for some in commands for _, seconds in some),
    }


# --- commands ---------------------------------------------------------------------------------------------------


class Commands:
    """Runs commands, remembers what was run and its processor time; what is there already is not made again."""

    def __init__(self, out: Path, data: Path | None = None) -> None:
        self.out = out
        self.shown = {f"{ROOT}/": "", f"{out}/": "", **({str(data): data.name} if data else {})}  # instead of paths
        self.done: list[tuple[str, float]] = []  # command, seconds of processor time

    def run(self, made: Path, *words: object, program: str = "") -> None:
        """Run `loco-det WORDS`, or with the file of a `program` that, which makes the file `made`."""
        text = " ".join([f"python {program}" if program else "loco-det", *map(str, words)])
        for path, name in self.shown.items():
            text = text.replace(path, name)
        clock = made.with_name(f".{made.name}.seconds")
        spent = float(clock.read_text()) if clock.exists() else 0.0
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            log.info(text)
            begun = processor_seconds()
            line = [sys.executable, *([program] if program else ["-m", "loco_det.cli"]), *map(str, words)]
            with subprocess.Popen(line, cwd=ROOT) as process:
                while process.poll() is None:  # the clock is kept up, for a run that is killed and resumed counts whole
                    clock.write_text(f"{spent + seconds_of(process.pid):.1f}")
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(20)
            spent += processor_seconds() - begun
            clock.write_text(f"{spent:.1f}")
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, line)
        self.done.append((text, spent))


def processor_seconds() -> float:
    """What all commands run so far have used: other work on the machine does not show."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of(pid: int) -> float:
    """Processor time of a running child and of those of its own children that have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def claimed(made: Path, out: Path, name: str = "") -> Iterator[bool]:
    """Whether the cell whose file is `made` is for this process to make: not there, and nobody is at it.

    Args:
        name: of the cell; the file's without it.
    """
    with open(out / f".{name or made.stem}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not made.exists()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
