"""The training loop of both engines: step, check, log, save, evaluate.

The random state of an iteration depends only on SEED, iteration and process, so on a CPU a stopped and resumed run
gives the numbers of an uninterrupted one on the same machine.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.backbones.resnet import is_still, tensors_hash
from loco_det.core.distributed import barrier, first_of_all, rank, reduce_mean, world_size
from loco_det.core.errors import UserError
from loco_det.core.launch import StopSignal
from loco_det.core.log import Progress, log
from loco_det.core.metrics import RunMetrics
from loco_det.detection import precise_bn, solver
from loco_det.detection.checkpoint import Checkpointer, last_checkpoint
from loco_det.detection.engine import Engine
from loco_det.detection.inference import evaluate, flatten

# Further keys of a checkpoint's note: values of the last iterations, and that the last one's line is not yet written.
RECENT, LINE_DUE = "recent", "line_due"
LOG_PERIOD = 20  # iterations between two lines of metrics.json, and the window of their medians


class StoppedError(UserError):
    """A signal ended the training, whose last complete iteration is saved.

    Attributes:
        what: what happened, as a clause.
    """

    def __init__(self, signal: str | None, done: int, path: Path) -> None:
        self.what = f"stopped by {signal or 'a signal'} after iteration {done}"
        super().__init__(f"{self.what}; {path} holds the run, continue with --resume.")


@dataclass
class Run:
    """One training run in one process; `wrapped` is `model`, or its distributed wrapper."""

    cfg: CfgNode
    engine: Engine
    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: solver.Schedule
    scaler: torch.amp.GradScaler
    checkpointer: Checkpointer
    start: int
    device: torch.device
    batches: Iterable[Any]  # of iteration `start` and later
    recent: dict[str, deque[float]] = field(default_factory=dict)
    done: int | None = None  # last iteration whose state is complete; None during an iteration, and once saved

    def remember(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.recent.setdefault(name, deque(maxlen=LOG_PERIOD)).append(value)


def train(run: Run, evaluator: str, metrics: RunMetrics) -> None:
    """Run iterations run.start to SOLVER.MAX_ITER, with logs, checkpoints and periodic evaluation; no final one."""
    last = run.cfg.SOLVER.MAX_ITER - 1
    periodic = run.checkpointer.periodic()
    run.wrapped.train()
    metrics.trim(run.start - bool(run.checkpointer.note.get(LINE_DUE)))
    for name, values in run.checkpointer.note.get(RECENT, {}).items():
        run.recent[name] = deque(values, maxlen=LOG_PERIOD)
    log.info(
        "training: iterations %d to %d, %d frozen tensors", run.start, last + 1, len(run.checkpointer.note["frozen"])
    )
    with StopSignal() as stop, Progress(last + 1, "train", run.start) as progress, _save_on_failure(run):
        if run.checkpointer.note.pop(LINE_DUE, False):
            _precise_statistics(run, run.start - 1)
            _write_line(run, run.start - 1, evaluator, metrics)
            periodic.step(run.start - 1)
        elif run.start > last and (saved := last_checkpoint(run.cfg.OUTPUT_DIR)) and saved.name != "model_final.pth":
            periodic.step(last)  # killed between the last periodic checkpoint and this one
        for iteration, stopped in _steps(run, stop):
            run.checkpointer.note[RECENT] = {name: list(values) for name, values in run.recent.items()}
            run.checkpointer.note[LINE_DUE] = True
            _precise_statistics(run, iteration)
            progress.advance(**_shown(run, _metrics(run, iteration)))
            if stopped and iteration < last:
                path = run.checkpointer.save(f"model_{iteration:07d}", iteration)
                run.done = None
                barrier()
                raise StoppedError(stop.received, iteration + 1, path)
            _write_line(run, iteration, evaluator, metrics)
            run.checkpointer.note[LINE_DUE] = False
            periodic.step(iteration)  # last: metrics.json already has what a checkpoint holds
    check_frozen(run.checkpointer.note["frozen"], frozen_hashes(run.model))


@contextlib.contextmanager
def _save_on_failure(run: Run) -> Iterator[None]:
    """Save the last complete iteration if the code after it fails: an unreadable image, an evaluation."""
    try:
        yield
    except Exception:
        if run.done is not None:
            run.checkpointer.save(f"model_{run.done:07d}", run.done)
        raise


def _precise_statistics(run: Run, iteration: int) -> None:
    """Recompute BatchNorm's statistics if due; seeded by the iteration, since a resumed run may have to repeat it."""
    if precise_bn.is_due(run.cfg, iteration):
        seed_iteration(run.cfg.SEED, iteration)
        precise_bn.recompute(run.cfg, run.engine, run.model, iteration)


def _write_line(run: Run, iteration: int, evaluator: str, metrics: RunMetrics) -> None:
    """Write an iteration's line of metrics.json, if any: medians every LOG_PERIOD, and a due evaluation."""
    cfg, last = run.cfg, run.cfg.SOLVER.MAX_ITER - 1
    line: dict[str, Any] = {}
    if (iteration + 1) % LOG_PERIOD == 0 or iteration == last:
        line = _metrics(run, iteration)
    if cfg.TEST.EVAL_PERIOD > 0 and (iteration + 1) % cfg.TEST.EVAL_PERIOD == 0 and iteration < last:
        try:
            found = evaluate(cfg, run.model, run.engine, evaluator)
            line = {"iteration": iteration, **line, **flatten(found)}
        except UserError as error:
            if world_size() > 1:  # the other processes wait for this one
                raise UserError(f"{error} (TEST.EVAL_PERIOD 0 trains on without this evaluation)") from error
            log.error("evaluation after iteration %d failed, training continues: %s", iteration + 1, error)
    if line:
        metrics.write(line)


def _steps(run: Run, stop: StopSignal) -> Iterator[tuple[int, bool]]:
    """Run the optimiser steps; yields (iteration, whether any process received a signal to stop)."""
    batches = iter(run.batches)
    for iteration in range(run.start, run.cfg.SOLVER.MAX_ITER):
        began = time.perf_counter()
        seed_iteration(run.cfg.SEED, iteration)
        batch = _next_of_all(batches, run.device)
        waited = time.perf_counter() - began
        with solver.autocast(run.cfg, run.device, run.model):
            losses = run.engine.losses(run.wrapped, batch)
        run.done = None
        shown: dict[str, float] = {}

        def read(losses: dict[str, Tensor] = losses, shown: dict[str, float] = shown, at: int = iteration) -> None:
            flag = torch.full((), float(stop.received is not None), device=run.device)
            shown.update(reduce_mean({**losses, "stop": flag}))
            check_finite({name: value for name, value in shown.items() if name != "stop"}, at)

        solver.optimizer_step(run.cfg, sum(losses.values()), run.optimizer, run.scaler, read)
        stopped = shown.pop("stop") > 0
        lr = max(run.optimizer.param_groups, key=lambda group: len(group["params"]))["lr"]
        run.schedule.step()
        times = {"time": time.perf_counter() - began, "data_time": waited}
        run.remember({"total_loss": sum(shown.values()), **shown, **times})
        run.recent["lr"] = deque([lr])
        run.done = iteration
        yield iteration, stopped


def _next_of_all(batches: Iterator[Any], device: torch.device) -> Any:
    """Return this process's next batch, if every process has one: else a peer would wait in its step and save nothing.

    Raises:
        UserError: of any process.
    """
    if world_size() == 1:
        return next(batches)
    try:
        batch, failure = next(batches), None
    except UserError as error:
        batch, failure = None, str(error)
    if reduce_mean({"failed": torch.tensor(float(failure is not None), device=device)})["failed"] > 0:
        raise UserError(first_of_all(failure))
    return batch


def seed_iteration(seed: int, iteration: int) -> None:
    """Seed torch's generators for one iteration of this process, so that checkpoints need no random state."""
    state = np.random.SeedSequence([seed, iteration, rank()]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)


def check_finite(losses: dict[str, float], iteration: int) -> None:
    """Raise UserError naming the losses that are not finite."""
    bad = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"at iteration {iteration} {', '.join(bad)}; lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True."
        )


def _metrics(run: Run, iteration: int) -> dict[str, Any]:
    """Return one line of metrics.json: medians of the last LOG_PERIOD iterations, as Detectron2 writes them."""
    left = run.cfg.SOLVER.MAX_ITER - iteration - 1
    medians = {name: median(values) for name, values in run.recent.items()}
    return {"iteration": iteration, "eta_seconds": left * medians["time"], **medians}


def _shown(run: Run, line: dict[str, Any]) -> dict[str, float | str]:
    """Return the progress bar's fields: losses, seconds per step and the share spent waiting for data."""
    return {
        "loss": line["total_loss"],
        "lr": line["lr"],
        "s/it": line["time"],
        "data": f"{100 * line['data_time'] / line['time']:.0f}%",
        **{name: value for name, value in line.items() if name.startswith("loss")},
        "mem": f"{_memory(run.device):.0f}M",
    }


def _memory(device: torch.device) -> float:
    """Return peak memory so far in MiB, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """Return sha256 of each tensor that training must not change: frozen parameters and frozen normalisation."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for prefix, module in model.named_modules():
        if is_still(module):
            buffers = module.named_buffers(recurse=False)
            # Detectron2's keeps an unused step counter of the original BatchNorm.
            frozen.update({f"{prefix}.{name}": b for name, b in buffers if name != "num_batches_tracked"})
    return {name: tensors_hash([(name, tensor)]) for name, tensor in frozen.items()}


def check_frozen(before: dict[str, str], after: dict[str, str]) -> None:
    """Raise RuntimeError naming a frozen tensor that changed: the result would not be a frozen readout."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise RuntimeError(f"frozen tensor {changed[0]} changed during training ({len(changed)} of {len(before)})")
