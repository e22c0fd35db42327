"""The sweep job: every backbone with every seed and every share of the training images, each a `train` of its own.

    OUT/backbones/NAME.pkl              what was converted for it
    OUT/NAME/fraction-0.1_seed-0/       a cell: the run's OUTPUT_DIR, with train.txt, what it printed
        result.json                     there when the cell is done, and only then
    OUT/sweep.json                      all cells

A cell is known by the hash of all that goes into it; one that is done is never run again, one that was stopped goes on
from its last checkpoint, one that failed is tried again by the next sweep.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from loco_det.convert import convert
from loco_det.core import config
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.core.files import file_sha256, read_checked_json, read_regular, write_checked_json, write_json
from loco_det.core.log import Progress, log, setup_logging
from loco_det.core.metrics import check_wandb
from loco_det.detection.feature_cache import check_cacheable
from loco_det.detection.keys import get_cfg
from loco_det.detection.train import choose_engine

LAUNCHERS = ("local", "torchrun", "submitit")
RESULT = "result.json"
OUTPUT = "train.txt"
MEASURES = ("/AP", "/IoU")  # how the names of those end that the table shows
_LAST_LINES = 3  # of a failed run, shown where the last one is no sentence
_running: set[subprocess.Popen] = set()  # cells of this process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid, what every cell shares, and who runs the cells."""
    parser.add_argument("--backbones", nargs="+", required=True, metavar="[NAME=]FILE", help="anything `convert` reads")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a detection config, as for `train`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--fractions", nargs="+", type=float, default=[1.0], metavar="F", help="of the training images")
    parser.add_argument("--engine", choices=("auto", "torchvision", "detectron2"), default="auto")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes for each cell")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time; submitit takes all at once")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local")
    parser.add_argument("--cluster", default=None, help="submitit: slurm or local (default: what is there)")
    parser.add_argument("--partition", help="submitit: of slurm")
    parser.add_argument("--timeout", type=int, default=24 * 60, metavar="MIN", help="submitit: of a cell, in minutes")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="as for `train`, shared by all cells")
    parser.add_argument("--wandb", metavar="PROJECT", help="as for `train`, for every cell")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="overrides for every cell")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        folder: its OUTPUT_DIR.
        key: sha256 of what goes into it.
        command: the arguments of its process.
    """

    backbone: str
    fraction: float
    seed: int
    folder: Path
    key: str
    command: list[str]


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet; 1 if a cell failed.

    Raises:
        UserError: arguments that mean nothing, or OUT holds cells of other settings.
    """
    shared = _check(args)
    setup_logging(args.out)
    failed: dict[str, str] = {}
    cells: list[Cell] = []
    for name, file in _named(args.backbones).items():
        try:
            cells += _cells(args, shared, name, _weights(args.out, name, file))
        except UserError as error:  # of this backbone alone
            log.error("%s: %s", name, error)
            failed[name] = str(error)
    waiting = [cell for cell in cells if not _is_done(cell)]
    log.info("%d cells, %d of them done; what one prints is in its %s", len(cells), len(cells) - len(waiting), OUTPUT)
    with Progress(len(waiting), "cells") as progress:
        for cell, problem in _launch(args, waiting):
            if problem:
                log.error("%s: %s", cell.folder, problem)
                failed[str(cell.folder)] = problem
            progress.advance(failed=len(failed))
    if not args.quiet:
        _print(cells, failed)
    write_json(args.out / "sweep.json", {"cells": [_record(cell) for cell in cells], "failed": failed})
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> dict[str, Any]:
    """Check the arguments; returns what all cells share and what would change their numbers, but not who runs them."""
    check_wandb(args.wandb)
    if any(not 0 < fraction <= 1 for fraction in args.fractions):
        raise UserError(f"--fractions {args.fractions}: give shares above 0, up to 1")
    if min(args.seeds) < 0:
        raise UserError(f"--seeds {args.seeds}: give 0 or more; a negative one would be drawn anew each time")
    if args.num_gpus < 1 or args.jobs < 1:
        raise UserError("--num-gpus and --jobs must be at least 1")
    taken = {"MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"} & set(args.set[::2])
    if taken:
        raise UserError(f"--set {min(taken)}: the sweep sets it itself; leave it out")
    cfg, settings = load_config(get_cfg(), args.config_file, args.set)
    engine = choose_engine(args.engine)
    engine.check(cfg, settings)  # a mistake would fail every cell
    if args.feature_cache:
        check_cacheable(cfg, engine.name)
    common = config.changed(cfg, OUTPUT_DIR="", SEED=0, **{"MODEL.WEIGHTS": ""})
    return {"config": common.dump(), "engine": args.engine, "num_gpus": args.num_gpus}


def _named(backbones: list[str]) -> dict[str, Path]:
    """{name: file}; a file without NAME= goes by the name of its folder if its own says nothing."""
    found: dict[str, Path] = {}
    for text in backbones:
        name, equals, file = text.partition("=")
        path = Path(file if equals else text)
        if not equals:
            name = path.parent.name if path.stem in ("backbone", "backbone_d2") and path.parent.name else path.stem
        if not name or name in found or name == "backbones" or "/" in name:
            raise UserError(f"--backbones {text}: {name!r} cannot name it here, or is there twice; write NAME={path}")
        found[name] = path
    return found


def _weights(out: Path, name: str, file: Path) -> Path:
    """The weights that `train` takes: the file itself if it is a .pkl, else what `convert` makes of it, once."""
    if file.suffix == ".pkl":
        if not file.is_file():
            raise UserError(f"{file}: no such file; correct the path")
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


def _cells(args: argparse.Namespace, shared: dict[str, Any], name: str, weights: Path) -> list[Cell]:
    content = _sha256(weights)
    cells = []
    for fraction in dict.fromkeys(args.fractions):  # the same cell twice would count as two seeds
        for seed in dict.fromkeys(args.seeds):
            facts = {**shared, "weights": content, "fraction": fraction, "seed": seed}
            key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
            folder = args.out.absolute() / name / f"fraction-{_digits(fraction)}_seed-{seed}"
            cells.append(Cell(name, fraction, seed, folder, key, _command(args, weights, fraction, seed, folder)))
    for cell in cells:
        told = cell.folder / "cell.json"
        if not told.is_file():
            continue
        before = read_checked_json(told)
        if before is None:
            raise UserError(f"{told} is damaged; remove it if the cell is of this sweep, or choose another --out")
        if before["key"] != cell.key:
            raise UserError(f"{cell.folder} was made with another config, engine or weights; choose another --out")
    return cells


def _digits(fraction: float) -> str:
    """All that it takes to tell a fraction from every other, in the shortest way."""
    short = f"{fraction:g}"
    return short if float(short) == fraction else repr(fraction)


def _command(args: argparse.Namespace, weights: Path, fraction: float, seed: int, folder: Path) -> list[str]:
    start = [sys.executable, "-m", "loco_det.cli"]
    processes = ["--num-gpus", str(args.num_gpus)]
    if args.launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.num_gpus}"]
        start, processes = [sys.executable, "-m", *torchrun, "-m", "loco_det.cli"], []
    part = [] if fraction == 1 else ["--fraction", _digits(fraction)]
    more = ["--wandb", args.wandb] if args.wandb else []
    more += ["--feature-cache", str(args.feature_cache.absolute())] if args.feature_cache else []
    own = {"MODEL.WEIGHTS": weights, "SEED": seed, "OUTPUT_DIR": folder}
    overrides = [*args.set, *(str(text) for pair in own.items() for text in pair)]
    options = ["--config-file", args.config_file, "--engine", args.engine, "--resume", *processes, *part, *more]
    return [*start, "train", *options, *overrides]


def _is_done(cell: Cell) -> bool:
    """A result that is damaged does not count: the cell's last checkpoint is evaluated again."""
    return (read_checked_json(cell.folder / RESULT) or {}).get("key") == cell.key


# --- running ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> str | None:
    """Run a cell to its end; None, or what went wrong in one sentence."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / ".lock", "w") as lock:
        if not _locked(lock):
            return "another sweep is running it"
        if _is_done(cell):  # meanwhile, by another
            return None
        write_checked_json(cell.folder / "cell.json", {**asdict(cell), "folder": str(cell.folder)})
        begun = time.time()
        with open(cell.folder / OUTPUT, "a") as output:
            status = _train(cell.command, output, lock)
        results = _results(cell.folder) if status == 0 else None
        if results is None:
            lines = (cell.folder / OUTPUT).read_text(errors="replace").strip().splitlines()
            lines = lines[-1 if lines and lines[-1].startswith("error: ") else -_LAST_LINES :]
            return f"train ended with status {status}: {' / '.join(lines) or 'it printed nothing'}"
        done = {"key": cell.key, "results": results, "seconds": round(time.time() - begun, 1)}
        write_checked_json(cell.folder / RESULT, done)
    return None


def _train(command: list[str], output: IO[Any], lock: IO[Any]) -> int:
    """The exit status.

    The process holds the lock too, so that the cell stays taken if the sweep alone is killed. It has a session of its
    own: `_launch` hands a signal on once, while a second one, from the terminal, would keep it from saving.
    """
    streams = {"stdout": output, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **streams, pass_fds=[lock.fileno()], start_new_session=True) as process:
        _running.add(process)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            _running.discard(process)


def _locked(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _results(folder: Path) -> dict[str, float] | None:
    """The last line of metrics.json that has an AP or IoU, as {"bbox/AP": percent, ...}."""
    try:
        lines = read_regular(folder / "metrics.json").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            return None  # a damaged last evaluation is none
        if isinstance(values, dict) and any(name.endswith(MEASURES) for name in values):
            return {name: value for name, value in values.items() if "/AP" in name or "sem_seg/" in name}
    return None


def _launch(args: argparse.Namespace, cells: list[Cell]) -> Iterator[tuple[Cell, str | None]]:
    """Each cell as it ends, with what went wrong or None."""
    if not cells:
        return
    if args.launcher == "submitit":
        yield from _submit(args, cells)
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run_cell, cell): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], _problem(future)
        except BaseException:  # what is not started stays so; what runs saves its state and leaves
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                process.terminate()
            raise


def _problem(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except (OSError, UserError) as error:  # its folder cannot be written: this cell alone
        return str(error)


def _submit(args: argparse.Namespace, cells: list[Cell]) -> Iterator[tuple[Cell, str | None]]:
    executor = submitit_executor(args)
    jobs = {executor.submit(run_cell, cell): cell for cell in cells}
    log.info("submitted %d jobs; their logs are in %s", len(jobs), args.out / "submitit")
    while jobs:
        for job in [job for job in jobs if job.done()]:
            yield jobs.pop(job), _outcome(job)
        time.sleep(min(5.0, 0.2 * len(jobs)))


def _outcome(job: Any) -> str | None:
    try:
        return job.result()
    except Exception as error:  # killed, timed out, lost by the cluster: all of this cell alone
        return f"job {job.job_id} failed: {str(error).strip().splitlines()[-1][:300]}"


def submitit_executor(args: argparse.Namespace) -> Any:
    """What hands cells to a cluster, a job each.

    Raises:
        UserError: submitit is not installed or the cluster is not there.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher submitit needs submitit; run pip install 'loco_det[submitit]'") from error
    folder = args.out.absolute() / "submitit"
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=args.cluster)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--cluster {args.cluster}: {error}; use slurm or local") from error
    gpus = args.num_gpus if executor.cluster != "local" or _has_gpu() else 0
    executor.update_parameters(name="loco-det", timeout_min=args.timeout, gpus_per_node=gpus, tasks_per_node=1)
    if args.partition:
        executor.update_parameters(slurm_partition=args.partition)
    return executor


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
