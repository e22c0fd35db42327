"""`loco-det paper`: each table and figure of the LoCo paper as one command, its figures beside ours."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loco_det.core import config
from loco_det.core.device import resolve_device
from loco_det.core.errors import UserError
from loco_det.core.files import write_json
from loco_det.core.jobs import (
    check_launcher,
    command_line,
    last_words,
    launch_all,
    run_process,
    try_lock,
)
from loco_det.core.log import Progress, log, setup_logging
from loco_det.core.run_folder import summary
from loco_det.detection.run_record import environment
from loco_det.paper import costs
from loco_det.paper.data import prepare
from loco_det.paper.page import write_page
from loco_det.paper.plan import (
    SPLITS,
    TARGETS,
    Chain,
    Options,
    PlannedRow,
    Step,
    commands_of,
    plan,
)
from loco_det.paper.results import pretrained
from loco_det.paper.settings import changed_from_plan, configuration

OF_OBJECTS = ("detection", "few_labels", "pictures")  # at small scale --data is a detection set
OUTPUT = "commands.txt"  # beside what a command makes: all that it prints
_AUTOMATIC_WORKERS = 8  # cores to ask a cluster for, where data workers share those that there are (NUM_WORKERS -1)
_SEEDS = {"full": (0,), "small": (0, 1, 2)}


def run(args: argparse.Namespace) -> int:
    """List the targets, or plan, run and write the page of one; returns 1 if a command failed.

    Raises:
        UserError: bad arguments, data or settings.
    """
    if args.target is None:
        _list_targets()
        return 0
    options = _options(args)
    rows = plan(args.target, options)
    steps = commands_of(rows)
    for step in steps:  # an error here would fail every row
        if step.words[0] in ("pretrain", "train"):
            configuration(step)
    failed: dict[str, str] = {}
    if args.dry_run:
        _print_plan(args, rows)
        return 0
    setup_logging(args.out)
    if not args.page:
        prepare(options, args.target in OF_OBJECTS)
        _print_plan(args, rows)
        failed = _run_all(args, rows)
    savings = _savings(options.out) if args.target == "memory" else None
    page = write_page(args.target, rows, options, environment(resolve_device("auto")), savings, _changed(rows))
    log.info("wrote %s", page)
    return 1 if failed else 0


def _list_targets() -> None:
    table = Table("target", "what it is", box=None, pad_edge=False)
    for name, words in TARGETS.items():
        table.add_row(name, words)
    Console().print(table)


def _options(args: argparse.Namespace) -> Options:
    check_launcher(args)
    if not args.data:
        what = "the folder of ImageNet" if args.scale == "full" else (
            "a detection set with the splits train and test" if args.target in OF_OBJECTS else "CIFAR-10, zip or folder"
        )  # fmt: skip
        raise UserError(f"--data is missing; give {what}")
    seeds = args.seeds or (SPLITS if args.target == "few_labels" else _SEEDS[args.scale])
    if min(seeds) < 0:
        raise UserError(f"--seeds {args.seeds}: give 0 or more")
    if args.supervised and not Path(args.supervised).is_file():
        raise UserError(f"--supervised {args.supervised}: no such file; correct the path")
    return Options(
        scale=args.scale,
        data=os.path.abspath(os.path.expanduser(args.data)),
        out=args.out.absolute(),
        seeds=tuple(dict.fromkeys(seeds)),
        pretrain=tuple(args.set_pretrain),
        train=tuple(args.set_train),
        supervised=args.supervised and os.path.abspath(args.supervised),
    )


# --- the plan ---------------------------------------------------------------------------------------------------


def _print_plan(args: argparse.Namespace, rows: Sequence[PlannedRow]) -> None:
    """Print every command to run with its cost, and the sums."""
    steps = commands_of(rows)
    measure = (lambda job, cfg: costs.Measured(1, 0.0, 0.0, 0, 0)) if args.no_measure else costs.measure_step
    found = costs.costs(steps, args.num_gpus, args.scale == "small", measure)
    table = Table("command", "state", "steps", "hours", "GiB", box=None, pad_edge=False)
    for step in steps:
        cost = found.get(step)
        numbers = ("", "", "") if cost is None else _shown(cost, args.no_measure)
        table.add_row(
            f"{step.words[0]} {step.made.relative_to(args.out.absolute())}",
            "done" if cost is None else "to run",
            *numbers,
        )
    if not args.quiet:
        Console(width=None if Console().is_terminal else 200).print(table)
    hours = sum(cost.hours for cost in found.values())
    most = max((cost.bytes for cost in found.values()), default=0) / 2**30
    log.info("%d commands, %d of them done", len(steps), len(steps) - len(found))
    if found and not args.no_measure:
        log.info(
            "expected: %.1f hours one after another, at most %.1f GiB in a process; from a step measured on %s, "
            "without reading images and evaluation",
            *(hours, most, resolve_device("auto")),
        )  # fmt: skip
    for row in rows:
        if row.why:
            log.warning("%s is left out: %s", row.label, row.why)


def _shown(cost: costs.Cost, unmeasured: bool) -> tuple[str, str, str]:
    if unmeasured:
        return f"{cost.steps:,}", "", ""
    return f"{cost.steps:,}", f"{cost.hours:.2f}", f"{cost.bytes / 2**30:.2f}"


# --- running ----------------------------------------------------------------------------------------------------


def _run_all(args: argparse.Namespace, rows: Sequence[PlannedRow]) -> dict[str, str]:
    """Run what is not done: first backbones that several chains need, then the chains; returns the failures."""
    chains = [chain for row in rows for chain in row.chains if not chain.done]
    firsts = [chain.steps[0] for chain in chains]
    shared = [step for step in dict.fromkeys(firsts) if firsts.count(step) > 1 and not step.made.exists()]
    failed: dict[str, str] = {}
    told = {"on_cpu": args.scale == "small", "workers": _most_workers(chains)}
    for items in ([Chain(0, (step,)) for step in shared], chains):
        items = [chain for chain in items if str(chain.steps[0].made) not in failed]  # their backbone has failed
        with Progress(len(items), "rows and seeds") as progress:
            for chain, problem in launch_all(args, items, _Runner(args), **told):
                if problem:
                    log.error("%s: %s", chain.steps[-1].made.parent, problem)
                    failed[str(chain.steps[-1].made)] = problem
                progress.advance(failed=len(failed))
    return failed


def _most_workers(chains: Sequence[Chain]) -> int:
    """Return the most data workers for which a command of the chains needs cores, for each process."""
    keys = {"pretrain": "DATA.NUM_WORKERS", "train": "DATALOADER.NUM_WORKERS"}
    steps = [step for chain in chains for step in chain.steps if step.words[0] in keys]
    found = [config.value(configuration(step), keys[step.words[0]]) for step in steps]
    return max([0, *(_AUTOMATIC_WORKERS if count < 0 else count for count in found)])


class _Runner:
    """Runs a chain's commands in order, here or on another machine; returns None, or the problem in one sentence."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self, chain: Chain, shown: Mapping[str, str]) -> str | None:
        for step in chain.steps:
            if problem := run_step(step, self.args, shown):
                return problem
        return None


def run_step(step: Step, args: argparse.Namespace, shown: Mapping[str, str]) -> str | None:
    """Run one command, with `shown` in its environment, unless it is done; returns None, or the problem."""
    folder = step.made.parent
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{step.made.name}.lock", "w") as lock:
        if not try_lock(lock):
            return "another command is at it"
        if step.made.exists():
            return None
        spent = float(step.clock.read_text()) if step.clock.exists() else 0.0
        with open(folder / OUTPUT, "a") as output:
            status, seconds = run_process(command_line(step.words, args), output, lock, shown)
        step.clock.write_text(f"{spent + seconds:.1f}")
        if status or not step.made.exists():
            return f"{step.words[0]} ended with status {status}: {last_words(folder / OUTPUT)}"
    return None


# --- what the page needs ----------------------------------------------------------------------------------------


def _savings(out: Path) -> dict[str, Any]:
    """Return what each method saves of memory, counted once and kept in OUT/memory_savings.json."""
    path = out / "memory_savings.json"
    if not path.is_file():
        log.info("counting the bytes that a step keeps, on ResNet-50 and PResNet-50 at %d pixels", costs.MEMORY_SIZE)
        write_json(path, costs.memory_savings())
    return json.loads(path.read_text())


def _changed(rows: Sequence[PlannedRow]) -> dict[str, str]:
    """Return the finished pretrainings whose settings are not those planned, with what differs."""
    found = {step.made.parent.name: changed_from_plan(step) for step in pretrained(rows)}
    return {name: summary(changes) for name, changes in found.items() if changes}
