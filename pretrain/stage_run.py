"""A pretraining run whose stages are spread over processes (SOLVER.PARALLEL stages): steps, metrics, checkpoints.

Every process builds the whole network, so that checkpoints and probes are the ordinary ones; it runs and steps its own
stages only, and keeps their activations and optimizer state only. The weights of the others are copies, renewed from
their owners before a checkpoint, a probe and the end.
"""

from __future__ import annotations

import resource
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.core.distributed import alone, is_main, of_rank_0, on_cpu, replicated, world_size
from loco_det.core.errors import UserError
from loco_det.core.launch import CommonStop, StopSignal
from loco_det.core.log import Progress, log
from loco_det.core.metrics import RunMetrics
from loco_det.images.source import Source
from loco_det.images.two_views import TwoViewLoader
from pretrain.average import GradientAverage
from pretrain.loco import running_statistics_kept
from pretrain.loss import embedding_health
from pretrain.monitor import HEALTH_IMAGES, Stopwatch, UnreadLosses, warn_of_collapse
from pretrain.placement import measure_costs, place
from pretrain.stage_parallel import Place, StageTrainer, pipeline_length
from pretrain.stepping import Stepping

MEASURED_IMAGES = 4  # per view, for the placement


def check_spans(labels: list[str], spans: list[tuple[int, int]], owners: list[range], schedule: str) -> None:
    """Refuse units that the streaming schedule cannot run.

    Args:
        labels, spans: names of the units, and their first and last stage.
        owners: each process's stages.

    Raises:
        UserError: a unit lies on more than two processes.
    """
    if schedule != "streaming":
        return
    for label, (first, last) in zip(labels, spans):
        touched = [s for s, own in enumerate(owners) if first < own.stop and last >= own.start]
        if len(touched) > 2:
            raise UserError(
                f"SOLVER.SCHEDULE streaming: unit {label} lies on {len(touched)} processes, so that weights would be "
                "more than one update apart; use SOLVER.SCHEDULE exact, or fewer processes"
            )


class Owned:
    """Which parts of a learner this process owns, and the exchange of the others.

    Args:
        parts: modules in one order on every process, and for each the position in the pipeline that owns it.
    """

    def __init__(self, where: Place, parts: list[tuple[nn.Module, int]], optimizer: torch.optim.Optimizer) -> None:
        self.place, self.parts, self.optimizer = where, parts, optimizer
        self.modules = [part for part, position in parts if position == where.position]
        self.parameters = [p for part in self.modules for p in part.parameters()]

    def forget(self) -> None:
        """Free the optimizer state of what others own."""
        own = set(self.parameters)
        for p in [p for p in self.optimizer.state if p not in own]:
            del self.optimizer.state[p]

    def renew(self) -> None:
        """Copy every part's weights and statistics from its owner in pipeline 0."""
        for part, position in self.parts:
            for tensor in part.state_dict().values():
                dist.broadcast(tensor, position)

    def optimizer_state(self) -> dict[str, Any] | None:
        """Return the state of all parameters at rank 0, as one process would have it, else None."""
        state = on_cpu(self.optimizer.state_dict())
        found: list[Any] = [None] * world_size()
        mine = state["state"] if self.place.pipeline == 0 else {}
        dist.gather_object(mine, found if is_main() else None)
        if not is_main():
            return None
        merged = {number: values for part in found for number, values in part.items()}
        return {**state, "state": dict(sorted(merged.items()))}


class Lines:
    """Lines of metrics.json whose numbers come from several processes, none of which waits for another.

    Each process fills in what it has; the sums arrive while later steps run.

    Args:
        names: of all numbers, in one order on every process.
        pipelines: sums are divided by.
        write: called at rank 0 with (step, numbers, extra).
    """

    def __init__(self, names: list[str], pipelines: int, write: Callable[[int, dict, dict], None]) -> None:
        self.names, self.pipelines, self.write = names, pipelines, write
        self.group = dist.new_group(backend="gloo")
        self.under_way: deque[tuple[int, Tensor, dist.Work, dict]] = deque()

    def add(self, step: int, own: dict[str, Tensor], extra: dict[str, float]) -> None:
        values = torch.zeros(len(self.names), dtype=torch.float64)
        if own:
            found = torch.stack([v.detach().double() for v in own.values()]).cpu()
            values[[self.names.index(name) for name in own]] = found
        self.under_way.append((step, values, dist.all_reduce(values, group=self.group, async_op=True), extra))
        self.flush(wait=False)

    def flush(self, wait: bool = True) -> None:
        """Write the lines that are complete, or all."""
        while self.under_way and (wait or self.under_way[0][2].is_completed()):
            step, values, work, extra = self.under_way.popleft()
            work.wait()
            if is_main():
                self.write(step, dict(zip(self.names, (values / self.pipelines).tolist())), extra)


class StageRun:
    """One process of the run.

    Args:
        learner: the whole network (a `pretrain.train.Learner`), on the device.
        optimizer: of all its parameters.
        prepare: from views (2, b, 3, S, S) uint8 to the network's input.
    """

    def __init__(
        self, cfg: CfgNode, learner: Any, optimizer: torch.optim.Optimizer, device: torch.device, prepare: Callable
    ) -> None:
        self.cfg, self.learner, self.device, self.prepare = cfg, learner, device, prepare
        self.place = Place.of(pipeline_length(world_size(), len(learner.stages)))
        self.owners = self._owners()
        self.own = self.owners[self.place.position]
        spans = [(unit.first, unit.last) for unit in learner.units]
        check_spans(learner.unit_labels, spans, self.owners, cfg.SOLVER.SCHEDULE)
        parts = [(stage.module, self._position(k)) for k, stage in enumerate(learner.stages)]
        parts += [(decoder, self._position(unit.last)) for decoder, unit in zip(learner.decoders, learner.units)]
        self.owned = Owned(self.place, parts, optimizer)
        self.norms: dict[nn.Parameter, Tensor] = {}

    def _position(self, stage: int) -> int:
        return next(s for s, own in enumerate(self.owners) if stage in own)

    def _owners(self) -> list[range]:
        """Place the stages by their times at rank 0; logs the result."""
        learner, size = self.learner, self.cfg.DATA.IMAGE_SIZE
        costs = []
        if is_main():
            x = torch.zeros(2, MEASURED_IMAGES, 3, size, size, dtype=torch.uint8, device=self.device)
            stages = [stage.module for stage in learner.stages]
            losses = [lambda h, d=decoder: d(h).square().mean() for decoder in learner.decoders]
            with alone(), running_statistics_kept(learner.decoders):
                costs = measure_costs(stages, learner.units, losses, self.prepare(x))
        costs = of_rank_0(costs)
        owners = place(costs, self.place.length)
        total = sum(costs)
        for s, own in enumerate(owners):
            names = ", ".join(learner.stages[k].name for k in own)
            log.info("process %d: %s (%.0f%% of the work)", s, names, 100 * sum(costs[k] for k in own) / total)
        return owners

    def build(self) -> tuple[StageTrainer, Stepping]:
        """Build the step and what steps the own parts."""
        learner, cfg = self.learner, self.cfg
        average = GradientAverage(self.owned.parameters, group=self.place.messages)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        stepping = Stepping(self.owned.optimizer, self.owned.modules, average, scaler, early=True)
        taken: list[nn.Module] = []

        def loss(i: int, features: Tensor) -> Tensor:
            stepping.ready(learner.decoders[i])
            taken.append(learner.decoders[i])
            return learner.loss(i, features)

        def final(*modules: nn.Module) -> None:
            stepping.final(*modules, *taken)
            taken.clear()

        trainer = StageTrainer(
            [stage.module for stage in learner.stages],
            learner.units,
            [partial(loss, i) for i in range(len(learner.units))],
            self.own,
            self.place,
            self.device,
            streaming=cfg.SOLVER.SCHEDULE == "streaming",
            on_gradient=average.add,
            on_losses=final,
            on_final=lambda k: final(learner.stages[k].module),
            recompute=[k for k, stage in enumerate(learner.stages) if stage.recompute],
            on_start=lambda k: stepping.ready(learner.stages[k].module),
        )
        return trainer, stepping

    def numbers(self, losses: dict[int, Tensor]) -> dict[str, Tensor]:
        """Return what this process knows of a line of metrics.json; squared gradient norms, which can be added."""
        values: dict[str, Tensor] = {}
        for i, loss in losses.items():
            label = self.learner.unit_labels[i]
            first, second = self.learner.embeddings[i].chunk(2)
            values[f"loss/{label}"] = loss
            few = torch.cat([first[:HEALTH_IMAGES], second[:HEALTH_IMAGES]])
            values.update({f"{name}/{label}": value for name, value in embedding_health(few).items()})
        for _, stage, block in self.learner.backbone.blocks():
            for p in block.parameters():
                if p in self.norms:
                    key = f"grad_norm/{stage}"
                    values[key] = values.get(key, 0.0) + self.norms[p].square()
        return values

    def names(self) -> list[str]:
        """Return the names of all numbers of a line, in one order on every process."""
        each = ("loss", "alignment", "uniformity", "std")
        labels = [f"{name}/{label}" for name in each for label in dict.fromkeys(self.learner.unit_labels)]
        return labels + [f"grad_norm/{stage}" for stage in self.learner.backbone.stage_names]

    def record_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        with torch.no_grad():
            self.norms.update({p: p.grad.norm() for p in parameters if p.grad is not None})

    def log_memory(self) -> None:
        """Log every process's peak memory."""
        found: list[Any] = [None] * world_size()
        dist.all_gather_object(found, peak_memory(self.device))
        for number, peak in enumerate(found):
            log.info("process %d: at most %.0f MiB", number, peak)


def peak_memory(device: torch.device) -> float:
    """Return this process's peak memory in MiB: the GPU's, or its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@dataclass
class StageSteps:
    """The steps of this process, with their lines, checkpoints and probes.

    Args:
        loader: of this pipeline's share of the images.
        total: number of steps.
        schedule: learning rate by progress.
        probe: the nearest-neighbour probe, or what looks like one.
        save: writes a checkpoint of a step, given the optimizer's state at rank 0.
    """

    run: StageRun
    source: Source
    loader: TwoViewLoader
    total: int
    metrics: RunMetrics
    schedule: Callable[[float], float]
    autocast: Callable[[], object]
    probe: Any
    save: Callable[[int, dict[str, Any] | None], None]
    warned: bool = False  # of a collapse

    def train(self, start: int) -> None:
        """Run all steps from `start`."""
        run, cfg, where = self.run, self.run.cfg, self.run.place
        run.owned.forget()
        with replicated(where.replicas):
            self.trainer, self.stepping = run.build()
            self.waited, self.counted = Stopwatch(), 0
            batches = self.waited.through(self.loader.batches(start)) if where.position == 0 else None
            self.unread = UnreadLosses(run.learner.unit_labels, self.source)
            self.lines = Lines(run.names(), where.pipelines, self._write)
            log.info(
                "%s, %s, %d processes in %d pipelines: %d images, %d steps of %d images on %s",
                *(cfg.METHOD, cfg.SOLVER.SCHEDULE, world_size(), where.pipelines),
                *(len(self.source), self.total, cfg.SOLVER.BATCH_SIZE, run.device),
            )
            with StopSignal() as stop, Progress(self.total, "pretrain", start, unit="it") as progress:
                should_stop = CommonStop(stop, lag=where.length + 1)
                for step in range(start, self.total):
                    x = run.prepare(next(batches).views) if batches is not None else None
                    self._step(step, x)
                    progress.advance()
                    stopped = step + 1 < self.total and should_stop()
                    self._pause(step + 1, stopped)
                    if stopped:
                        by = stop.received or "a signal"
                        raise UserError(f"stopped by {by} after step {step + 1}; --resume continues from there")
            self.trainer.close()
            run.log_memory()

    def _step(self, step: int, x: Tensor | None) -> None:
        """Run one step, with its line of metrics.json if one is due."""
        run, done = self.run, step + 1
        is_due = step == 0 or done % run.cfg.LOG_PERIOD == 0
        rate, before = (self.schedule(max(at, 0) / self.total) for at in (step, step - 1))
        self.stepping.observe = run.record_gradients if is_due else None
        self.stepping.lr = rate
        losses = self.trainer.step(
            x,
            more=done < self.total,
            autocast=self.autocast,
            before_late=lambda: setattr(self.stepping, "lr", before),  # the passes of the step before have its rate
        )
        self.stepping.lr = rate
        self._keep(step, losses)
        self.counted += 1
        if is_due:
            self.unread.read()
            self.stepping.finish()  # with gradients that other pipelines still average, which the line needs
            seconds, waiting = self.waited.lap()
            images = self.counted * run.cfg.SOLVER.BATCH_SIZE
            extra = {"lr": rate, "images_per_second": images / seconds, "data_wait_share": waiting / seconds}
            self.lines.add(step, run.numbers(losses), extra)
            self.counted = 0

    def _write(self, step: int, numbers: dict[str, float], extra: dict[str, float]) -> None:
        norms = {name: value**0.5 for name, value in numbers.items() if name.startswith("grad_norm/")}
        self.metrics.write({"iteration": step, **numbers, **norms, **extra})
        self.warned = self.warned or warn_of_collapse(numbers, step)

    def _keep(self, step: int, losses: dict[int, Tensor]) -> None:
        """Add a step's own losses to those to check; others' are checked where they are, and stand as zeros."""
        if losses:
            zero = torch.zeros_like(next(iter(losses.values())))
            each = [losses.get(i, zero) for i in range(len(self.run.learner.units))]
            self.unread.add(step, each, torch.empty(0, dtype=torch.int64))

    def _pause(self, done: int, stopped: bool) -> None:
        """Probe and save if due, with all weights up to date; all processes wait for each other."""
        run = self.run
        saving = stopped or done == self.total or done % run.cfg.CHECKPOINT_PERIOD == 0
        probing = self.probe.due(done, self.loader.steps_per_epoch, self.total)
        if not (saving or probing):
            return
        self.unread.read()
        self.trainer.drain(self.autocast)
        self.stepping.finish()
        self.lines.flush()
        run.owned.renew()
        with self.waited.paused():
            found = self.probe(run.learner.backbone) if probing else {}
        if found and is_main():
            self.metrics.write({"iteration": done - 1, **found})
        if saving:
            self.save(done, run.owned.optimizer_state())
        if stopped:
            self.trainer.abandon()
