"""Stages spread over processes: throughput against one process and data parallel, waiting, and a model of more devices.

    python benchmarks/stage_parallel.py --json stages.json --png docs/stage_parallel.png      # four minutes on 2 cores

gloo processes, each pinned to a core and with one thread; with more processes than cores, several share one. ResNet-50
at `--size` pixels, 2 x `--images` views in a step over all processes, float32, LARS, BatchNorm of each process.

    one           the whole step in one process, on one core
    data          each process has the whole network and its share of the images; gradients are averaged
    exact         SOLVER.PARALLEL stages: what one process computes
    streaming     SOLVER.SCHEDULE streaming

A side runs `--steps` steps; `seconds` is the mean of those after the second at the last stage's process, and
`waiting` the share of them that processes wait for messages. `speedup` is over `one` of the same method. The sides of
two processes are measured `--turns` times in turn with `one`, and each figure is the median over turns.

The model (benchmarks/pipeline_model.py) replays what every process computed between its messages; `predicted` is its
step, `relative_error` against the measured one. For 4 to 64 devices it assumes that all devices take as long as the
mean measured stage, and that a message takes `--transfer` of a stage's forward and is sent beside computing. GPipe
and 1F1B run the same stages end to end with four micro-batches a device. Its `speedup` is the work of all devices over
the time of a step. No such machine was measured.

JSON: {"sides": {method: {processes: {side: {"seconds", "speedup", "waiting", "predicted", "relative_error"}}}},
"stages": {method: [seconds]}, "model": {devices: {schedule: {"speedup", "efficiency"}}}, "setting": {...}}.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from _common import parser, report
from pipeline_model import Program, Work, end_to_end_programs, local_programs, seconds_a_step, simulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from loco_det.core.device import keep_freed_memory
from loco_det.core.distributed import rank, replicated, world_size
from loco_det.core.launch import launch
from loco_det.core.log import setup_logging
from pretrain.average import GradientAverage
from pretrain.defaults import get_cfg
from pretrain.optim import build_optimizer
from pretrain.placement import measure_costs
from pretrain.stage_run import StageRun
from pretrain.stepping import Stepping
from pretrain.train import LAYOUT, Learner, local_trainer

METHODS = ("gim", "loco")
DEVICES = (4, 8, 16, 32, 64)
COLOURS = {
    "forward": "#9ecae1",
    "loss": "#fdd049",
    "input-only pass": "#e6550d",
    "parameter pass": "#1b5e8a",
    "wait": "#eeeeee",
}


def configuration(args: Namespace, method: str, schedule: str = "exact"):
    cfg = get_cfg()
    cfg.METHOD, cfg.SOLVER.SCHEDULE, cfg.DATA.IMAGE_SIZE = method, schedule, args.size
    cfg.DECODER.CONV_BLOCKS = 1 if method == "loco" else 0  # the paper's
    return cfg


def images(args: Namespace, share: int = 0, shares: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(share)
    x = torch.randn(2 * args.images // shares, 3, args.size, args.size, generator=generator)
    return x.to(memory_format=LAYOUT)


def pin(number: int) -> None:
    """Run this process on one core with one thread."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    torch.set_num_threads(1)
    keep_freed_memory()


# --- the sides --------------------------------------------------------------------------------------------------


class Recorder:
    """Times of this process's messages: (begin, end, "send" | "receive", channel)."""

    def __init__(self) -> None:
        self.events: list[tuple[float, float, str, tuple]] = []

    def around(self, kind: str, box: object, channel: tuple) -> None:
        """Note every message of a box."""
        original = getattr(box, kind)

        def noted(*args: object) -> object:
            begun = time.perf_counter()
            out = original(*args)
            self.events.append((begun, time.perf_counter(), kind, channel))
            return out

        setattr(box, kind, noted)

    def program(self, begun: float, ended: float) -> Program:
        """Return what was done between two moments."""
        items: Program = []
        for start, end, kind, channel in self.events:
            if begun <= start < ended:
                items += [("compute", start - begun), (kind, channel)]
                begun = end
        return [*items, ("compute", ended - begun)]

    def waiting(self, begun: float, ended: float) -> float:
        return sum(end - start for start, end, kind, _ in self.events if begun <= start < ended)


def one_or_data(args: Namespace, method: str) -> Callable[[bool], None]:
    """A step of the whole network on this process's share of the images."""
    torch.manual_seed(0)
    learner = Learner(configuration(args, method))
    optimizer = build_optimizer(configuration(args, method), learner)
    average = GradientAverage(learner.parameters())
    stepping = Stepping(optimizer, learner.parts(), average, torch.amp.GradScaler("cpu", enabled=False), True)
    stepping.lr = 1e-3
    trainer = local_trainer(learner, stepping)
    x = images(args, rank(), world_size())
    return lambda more: trainer.step(x)


def stages(args: Namespace, method: str, schedule: str, recorder: Recorder) -> Callable[[bool], None]:
    """A step of this process's stages."""
    cfg = configuration(args, method, schedule)
    torch.manual_seed(0)
    learner = Learner(cfg)
    run = StageRun(cfg, learner, build_optimizer(cfg, learner), torch.device("cpu"), lambda v: images(args))
    with replicated(run.place.replicas):
        trainer, stepping = run.build()
    stepping.lr = 1e-3
    me = rank()
    for kind, box, channel in (
        ("receive", trainer.input, ("up", me)),
        ("send", trainer.output, ("up", me + 1)),
        ("send", trainer.to_below, ("down", me - 1)),
        ("receive", trainer.from_above, ("down", me)),
    ):
        if box is not None:
            recorder.around(kind, box, channel)
    x = images(args) if run.place.position == 0 else None

    def step(more: bool) -> None:
        with replicated(run.place.replicas):
            trainer.step(x, more=more)
            if not more:
                trainer.drain()
                stepping.finish()
                trainer.close()

    return step


def timed(args: Namespace, build: Callable[[Recorder], Callable[[bool], None]]) -> dict[str, object]:
    """Run a side; returns the moments at which this process's steps ended, and what it did in each."""
    recorder = Recorder()
    step = build(recorder)
    if world_size() > 1:
        dist.barrier()
    moments = [time.perf_counter()]
    for number in range(args.steps):
        step(number < args.steps - 1)
        moments.append(time.perf_counter())
    steady = list(pairwise(moments))[2:-1]  # the first two fill the pipeline, the last one drains it
    return {
        "seconds": [b - a for a, b in steady],
        "waiting": sum(recorder.waiting(a, b) for a, b in steady),
        "programs": [recorder.program(a, b) for a, b in steady],
    }


def worker(args: Namespace, folder: str, kinds: tuple[str, ...]) -> None:
    """Measure these kinds of sides for both methods in every process."""
    pin(rank())
    found = {}
    for method in METHODS:
        for kind in kinds:
            build = partial(stages, args, method, kind)
            if kind in ("one", "data"):
                build = lambda _, method=method: one_or_data(args, method)  # noqa: E731
            found[f"{method} {kind}"] = timed(args, build)
    (Path(folder) / f"{world_size()}_{rank()}_{time.time_ns()}.json").write_text(json.dumps(found))


def measured(args: Namespace, processes: int, kinds: tuple[str, ...]) -> dict[str, list[dict]]:
    """Measure in `processes` processes; returns each side's results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        launch(worker, processes, args, folder, kinds) if processes > 1 else _alone(args, folder, kinds)
        files = sorted(Path(folder).glob("*.json"), key=lambda path: int(path.name.split("_")[1]))
        parts = [json.loads(path.read_text()) for path in files]
    return {side: [part[side] for part in parts] for side in parts[0]}


def _alone(args: Namespace, folder: str, kinds: tuple[str, ...]) -> None:
    before = os.sched_getaffinity(0)
    try:
        worker(args, folder, kinds)
    finally:
        os.sched_setaffinity(0, before)


def replay(parts: list[dict], streaming: bool) -> float:
    """Return the model's seconds of a step, from what every process computed in its steady steps."""
    programs: list[list[Program]] = [
        [[(kind, value if kind == "compute" else tuple(value)) for kind, value in step] for step in part["programs"]]
        * 4
        for part in parts
    ]
    if streaming:  # a process takes the gradient of the step before
        for device in range(1, len(programs)):
            channel = ("down", device - 1)
            if any(item == ("send", channel) for item in programs[device][0]):
                programs[device] = [[("send", channel), *programs[device][0]], *programs[device][1:]]
    return seconds_a_step(simulate(programs)[0])


# --- figures ----------------------------------------------------------------------------------------------------


def figures_of(parts: list[dict], alone: float, kind: str) -> dict[str, float]:
    """Return one side's figures, from its processes."""
    seconds = statistics.mean(parts[-1]["seconds"])
    total = sum(sum(part["seconds"]) for part in parts)
    found = {
        "seconds": seconds,
        "speedup": alone / seconds,
        "waiting": sum(part["waiting"] for part in parts) / total,
    }
    if kind in ("exact", "streaming") and len(parts) <= len(os.sched_getaffinity(0)):
        found["predicted"] = replay(parts, kind == "streaming")
        found["relative_error"] = found["predicted"] / seconds - 1
    return found


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


def stage_work(args: Namespace, method: str) -> tuple[list[float], Work]:
    """Measure every stage's seconds in a step, and the mean stage's work by kind."""
    cfg = configuration(args, method)
    torch.manual_seed(0)
    learner = Learner(cfg)
    modules = [stage.module for stage in learner.stages]
    losses = [partial(learner.loss, i) for i in range(len(learner.units))]
    x = images(args)
    costs = measure_costs(modules, learner.units, losses, x)
    trainer = local_trainer(learner)
    trainer.step(x)
    with profile(activities=[ProfilerActivity.CPU]) as trace, record_function("step"):
        trainer.step(x)
    sums = {"forward": 0.0, "loss": 0.0, "input-only pass": 0.0, "parameter pass": 0.0}
    counts = dict.fromkeys(sums, 0)
    for event in trace.events():
        if event.name.startswith(("stage ", "unit ")):
            what = event.name.split(" ", 2)[2]
            sums[what] += (event.time_range.end - event.time_range.start) / 1e6
            counts[what] += 1
    mean = [sums[what] / counts[what] if counts[what] else 0.0 for what in sums]
    return costs, Work(*mean)


def balanced(work: Work, method: str, count: int) -> list[Work]:
    """Return the work of devices that take the same time; LoCo's first and last stage do not have all passes."""
    if method == "gim":
        return [work] * count
    first = work.total() / (work.forward + work.parameter)
    last = work.total() / (work.total() - work.input_only)
    return [scaled(work, first), *[work] * (count - 2), scaled(work, last)]


def scaled(work: Work, factor: float) -> Work:
    return Work(*(seconds * factor for seconds in vars(work).values()))


def model(works: dict[str, Work], transfer: float) -> dict[str, dict[str, dict[str, float]]]:
    """Predict 4 to 64 devices with one stage each."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for count in DEVICES:
        rows: dict[str, float] = {}
        for method in METHODS:
            work = works[method]
            for schedule in ("exact", "streaming"):
                devices = balanced(work, method, count)
                programs = local_programs(devices, method, schedule, steps=4 * count + 20)
                ends, _ = simulate(programs, transfer * work.forward)
                done = sum(
                    v for k, v in (item for p in (steps[-1] for steps in programs) for item in p) if k == "compute"
                )
                rows[f"{method} {schedule}"] = done / seconds_a_step(ends)
        work = works["gim"]
        for kind in ("gpipe", "1f1b"):
            parts = 4 * count
            forward, backward = [work.forward] * count, [work.parameter] * count
            ends, _ = simulate(
                end_to_end_programs(forward, backward, parts, kind), transfer * work.forward / parts, parts
            )
            rows[f"end to end {kind}"] = sum(forward + backward) / max(times[-1] for times in ends)
        found[str(count)] = {name: {"speedup": s, "efficiency": s / count} for name, s in rows.items()}
    return found


# --- the picture ------------------------------------------------------------------------------------------------


def draw_worker(args: Namespace, folder: str) -> None:
    """Trace three steady steps of LoCo in every process."""
    pin(rank())
    for schedule in ("exact", "streaming"):
        step = stages(args, "loco", schedule, Recorder())
        for _ in range(3):
            step(True)
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            zero = time.perf_counter()
            with record_function("zero"):
                pass
            for number in range(3):
                step(number < 2)
        events = list(trace.events())
        shift = next(e.time_range.start for e in events if e.name == "zero")
        spans = []
        for e in events:
            if e.name.startswith(("stage ", "unit ", "wait for")):
                what = "wait" if e.name.startswith("wait") else e.name.split(" ", 2)[2]
                spans.append([what, zero + (e.time_range.start - shift) / 1e6, zero + (e.time_range.end - shift) / 1e6])
        (Path(folder) / f"{schedule}_{rank()}.json").write_text(json.dumps(spans))


def draw(args: Namespace) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    with tempfile.TemporaryDirectory() as folder:
        launch(draw_worker, 2, args, folder)
        spans = {p.stem: json.loads(p.read_text()) for p in Path(folder).glob("*.json")}
    figure, axes = plt.subplots(2, figsize=(9, 3.6), layout="constrained")
    for axis, schedule in zip(axes, ("exact", "streaming")):
        rows = [spans[f"{schedule}_{number}"] for number in range(2)]
        zero = min(span[1] for row in rows for span in row)
        for number, row in enumerate(rows):
            for what, begin, end in row:
                axis.barh(number, (end - begin) * 1e3, 0.7, (begin - zero) * 1e3, color=COLOURS[what])
        axis.set_yticks(range(2), [f"process {number}" for number in range(2)])
        axis.set_title(f"LoCo, {schedule}", loc="left", fontsize=11, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds of three steps")
    figure.legend(handles=[Patch(color=c, label=w) for w, c in COLOURS.items()], loc="outside upper center", ncols=5,
                  frameon=False)  # fmt: skip
    figure.savefig(args.png, dpi=110)
    plt.close(figure)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--png", type=Path, metavar="PATH", help="draw three steps of LoCo in two processes there")
    options.add_argument("--turns", type=int, default=2)
    options.add_argument("--steps", type=int, default=7, help="of a side in a turn")
    options.add_argument("--size", type=int, default=64, help="pixels")
    options.add_argument("--images", type=int, default=4, help="of a step over all processes, two views each")
    options.add_argument("--transfer", type=float, default=0.05, help="model: a message's time, of a stage's forward")
    args = options.parse_args()
    setup_logging(quiet=True)
    shown = SimpleNamespace(**{k: v for k, v in vars(args).items() if k != "png"})
    turns: dict[str, dict[int, dict[str, list]]] = {m: {2: {}, 4: {}} for m in METHODS}
    for turn in range(args.turns):
        alone = measured(shown, 1, ("one",))
        for processes in (2, 4) if turn == 0 else (2,):
            found = measured(
                shown, processes, ("data", "exact", "streaming") if processes == 2 else ("exact", "streaming")
            )
            for side, parts in found.items():
                method, kind = side.split()
                base = statistics.mean(alone[f"{method} one"][0]["seconds"])
                of = turns[method][processes]
                of.setdefault("one", []).append({"seconds": base, "speedup": 1.0, "waiting": 0.0})
                of.setdefault(kind, []).append(figures_of(parts, base, kind))
    sides = {m: {str(n): {k: medians(v) for k, v in of.items()} for n, of in by.items()} for m, by in turns.items()}
    pinned = os.sched_getaffinity(0)
    pin(0)
    costs, works = {}, {}
    for method in METHODS:
        costs[method], works[method] = stage_work(args, method)
    os.sched_setaffinity(0, pinned)
    predicted = model(works, args.transfer)
    if args.png is not None:
        draw(args)
    rows = [
        [
            method,
            n,
            kind,
            f["seconds"],
            f["speedup"],
            f["waiting"],
            f.get("predicted", "-"),
            f.get("relative_error", "-"),
        ]
        for method, by in sides.items()
        for n, of in by.items()
        for kind, f in of.items()
    ]
    for count, of in predicted.items():
        print(f"{count} devices: " + ", ".join(f"{name} {f['speedup']:.1f}" for name, f in of.items()))
    setting = {k: v for k, v in vars(args).items() if k not in ("json", "png")}
    setting |= {"torch": torch.__version__, "cores": len(pinned), "work": {m: vars(w) for m, w in works.items()}}
    figures = {"sides": sides, "stages": costs, "model": predicted, "setting": setting}
    report(
        ["method", "processes", "side", "s/step", "speedup", "waiting", "predicted", "error"], rows, figures, args.json
    )


if __name__ == "__main__":
    main()
