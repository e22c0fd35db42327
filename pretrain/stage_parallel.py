"""The local step with its stages spread over processes (SOLVER.PARALLEL stages).

Process s owns a run of consecutive stages, the decoders of the units that end there, and their optimizer. Activations
go up one hop; the gradient of a unit whose stages lie on several processes comes down. In LoCo a unit has two stages,
so each gradient comes down one hop at most, and no process waits for the top; in GIM none comes down.

Two schedules, which differ in when a process uses the gradients from above:

- **exact**: within the step. The result is that of one process. A process waits for the processes that share a unit
  with it, and meanwhile computes the passes that need nothing from above.
- **streaming**: in the next step, after the next batch's forward. Nobody waits for a gradient. Stages that need one
  from above keep a copy of the weights with which a batch was forwarded, so each gradient is exact for those weights,
  which are by then one update old. Weights with which a batch meets neighbouring stages are at most one update apart.

Shape legend: as in pretrain/loco.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import record_function

from loco_det.core.distributed import rank, world_size
from loco_det.core.errors import UserError
from pretrain.loco import LocalTrainer, Pass, Unit, _Forward

SCHEDULES = ("exact", "streaming")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HEADER = 8  # numbers before a channel's first tensor: dtype, layout, dimensions, their sizes
_AHEAD = 2  # messages that may be under way before the sender waits


# --- places and messages ----------------------------------------------------------------------------------------


@dataclass
class Place:
    """Where this process stands: position `position` of `length` in pipeline `pipeline` of `pipelines`.

    Processes of a pipeline have consecutive ranks, so that neighbours are mostly on one machine.

    Attributes:
        replicas: the processes at this position of all pipelines, which hold the same stages.
        messages: the same processes, for the averaging of gradients.
        up, down: of all processes, for activations and for gradients.
    """

    pipeline: int
    pipelines: int
    position: int
    length: int
    replicas: dist.ProcessGroup
    messages: dist.ProcessGroup
    up: dist.ProcessGroup
    down: dist.ProcessGroup

    @staticmethod
    def of(length: int) -> Place:
        """Join the groups; called by all processes of the job."""
        pipelines = world_size() // length
        pipeline, position = divmod(rank(), length)
        groups = []
        for _ in range(2):
            made = [dist.new_group([d * length + s for d in range(pipelines)]) for s in range(length)]
            groups.append(made[position])
        return Place(pipeline, pipelines, position, length, *groups, dist.new_group(), dist.new_group())

    @property
    def below(self) -> int | None:
        return rank() - 1 if self.position > 0 else None

    @property
    def above(self) -> int | None:
        return rank() + 1 if self.position < self.length - 1 else None

    def owner(self, position: int) -> int:
        """Return the rank at `position` of this pipeline."""
        return self.pipeline * self.length + position


def pipeline_length(processes: int, stages: int) -> int:
    """Return how many processes share one network: as many as possible, at most one for each stage.

    Raises:
        UserError: the processes cannot be divided into equal pipelines.
    """
    length = min(processes, stages)
    if processes % length:
        raise UserError(
            f"SOLVER.PARALLEL stages: {processes} processes are no multiple of the {stages} stages of these units; use "
            f"{stages} or fewer, or a multiple of {stages}"
        )
    return length


class Outbox:
    """Sends tensors of one shape to another process, without waiting for it."""

    def __init__(self, to: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.to, self.group, self.device = to, group, device
        self.under_way: deque[tuple[dist.Work, Tensor]] = deque()
        self.is_last: bool | None = None  # channels last
        self.header: Tensor | None = None
        self.last: Tensor | None = None

    def send(self, tensor: Tensor) -> None:
        if self.is_last is None:  # as the first one
            self.is_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        plain = tensor.detach()
        plain = (plain.permute(0, 2, 3, 1) if self.is_last else plain).contiguous()
        if self.header is None:
            numbers = [_DTYPES.index(tensor.dtype), int(self.is_last), plain.ndim, *plain.shape]
            self.header = torch.tensor(numbers + [0] * (_HEADER - len(numbers)), device=self.device)
            self._start(self.header)
        self.last = plain
        self._start(plain)

    def _start(self, tensor: Tensor) -> None:
        self.under_way.append((dist.isend(tensor, self.to, group=self.group), tensor))
        while len(self.under_way) > _AHEAD:
            self.under_way.popleft()[0].wait()

    def close(self) -> None:
        """Wait until all has arrived."""
        while self.under_way:
            self.under_way.popleft()[0].wait()


class Inbox:
    """Receives what an Outbox of another process sends; the next tensor arrives while the last is worked on."""

    def __init__(self, source: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.source, self.group, self.device = source, group, device
        self.layout: tuple[torch.dtype, bool, list[int]] | None = None
        self.coming: tuple[dist.Work, Tensor] | None = None

    def receive(self, more: bool) -> Tensor:
        """Return the next tensor; `more` says that another one will follow it."""
        if self.layout is None:
            header = torch.zeros(_HEADER, dtype=torch.int64, device=self.device)
            dist.irecv(header, self.source, group=self.group).wait()
            dtype, is_last, ndim, *shape = header.tolist()
            self.layout = _DTYPES[dtype], bool(is_last), shape[:ndim]
        work, tensor = self.coming or self._expect()
        work.wait()
        self.coming = self._expect() if more else None
        return tensor.permute(0, 3, 1, 2) if self.layout[1] else tensor

    def _expect(self) -> tuple[dist.Work, Tensor]:
        dtype, _, shape = self.layout
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        return dist.irecv(tensor, self.source, group=self.group), tensor


# --- the step ---------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """A batch whose passes are not all done."""

    alive: dict[int, _Forward]
    weights: dict[int, dict[str, Tensor]]  # late stage -> the weights of its forward, if they are a copy
    more: bool


class StageTrainer(LocalTrainer):
    """Runs this process's part of the local step.

    Args:
        stages, units, losses: of the whole network; only the own ones are run.
        own: this process's stages.
        place: its neighbours.
        streaming: the schedule.
        on_gradient: called with a parameter whose gradient was computed for a copy of it.
        on_losses: called when the own losses of a step, and so their decoders' gradients, are known.
        on_final, recompute, on_start: as for LocalTrainer, for the own stages.
    """

    def __init__(
        self,
        stages: list[nn.Module],
        units: list[Unit],
        losses: list[Callable[[Tensor], Tensor]],
        own: range,
        place: Place,
        device: torch.device,
        *,
        streaming: bool = False,
        on_gradient: Callable[[nn.Parameter], None] | None = None,
        on_losses: Callable[[], None] | None = None,
        on_final: Callable[[int], None] | None = None,
        recompute: Collection[int] = (),
        on_start: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(stages, units, losses, on_final, recompute, on_start)
        self.own, self.streaming, self.on_gradient, self.on_losses = own, streaming, on_gradient, on_losses
        passes = [p for k in own for p in self.plan[k]]
        self.whens = sorted({p.when for p in passes if p.when >= own.stop})  # known above, in order of arrival
        self.late = {k for k in own if any(p.when >= own.stop for p in self.plan[k])}
        self.input = Inbox(place.below, place.up, device) if place.below is not None else None
        self.output = Outbox(place.above, place.up, device) if place.above is not None else None
        crossing = own.start > 0 and any(p.input for p in self.plan[own.start])
        self.to_below = Outbox(place.below, place.down, device) if crossing else None
        self.from_above = Inbox(place.above, place.down, device) if self.whens else None
        self.batch: _Batch | None = None  # the batch whose gradients from above are still to come

    def step(
        self,
        x: Tensor | None,
        *,
        more: bool = True,
        autocast: Callable[[], object] | None = None,
        before_late: Callable[[], None] | None = None,
    ) -> dict[int, Tensor]:
        """Run one step; its gradients are added to `.grad`, in `streaming` those from above of the step before.

        Args:
            x: (2B, 3, H, W) at the first process, None elsewhere.
            more: whether another step follows.
            autocast: creates the context of the forwards.
            before_late: called before the passes of the step before.

        Returns:
            The losses of the units that end here, detached.
        """
        context = autocast or nullcontext
        if self.input is not None:
            with record_function("wait for activations"):
                x = self.input.receive(more)
        batch = _Batch({}, {}, more)
        losses = self._forward_half(x, batch, context)
        if self.on_losses is not None:
            self.on_losses()
        if not self.streaming:
            self._late_half(batch, context)
            return losses
        before, self.batch = self.batch, batch
        if before is not None:
            if before_late is not None:
                before_late()
            self._late_half(before, context)
        return losses

    def drain(self, autocast: Callable[[], object] | None = None) -> None:
        """Run the passes that are still to come; the weights are then those after the last step."""
        if self.batch is not None:
            batch, self.batch = self.batch, None
            self._late_half(batch, autocast or nullcontext)

    def close(self) -> None:
        """Wait until all messages have arrived."""
        for outbox in (self.output, self.to_below):
            if outbox is not None:
                outbox.close()

    def abandon(self) -> None:
        """End before the last step: answer the neighbours, which expect another message. Called after `drain`."""
        for outbox in (self.output, self.to_below):
            if outbox is not None:
                outbox.send(outbox.last)
        for inbox in (self.input, self.from_above):
            if inbox is not None:
                inbox.coming[0].wait()
        self.close()

    def _forward_half(self, x: Tensor, batch: _Batch, context: Callable[[], object]) -> dict[int, Tensor]:
        losses: dict[int, Tensor] = {}
        for k in self.own:
            if self.on_start is not None:
                self.on_start(k)
            x = x.detach()
            x.requires_grad_(any(p.input for p in self.plan[k]))
            with record_function(f"stage {k} forward"), context(), torch.set_grad_enabled(k not in self.recompute):
                batch.alive[k] = _Forward(x, self._run(k, x, batch))
            x = batch.alive[k].output
            if k == self.own.stop - 1 and self.output is not None:
                self.output.send(x)
            for i in self._ending(k):
                losses[i] = self._loss(i, batch.alive[k], context, None)
            self._passes(k, batch, context)
        return losses

    def _run(self, k: int, x: Tensor, batch: _Batch) -> Tensor:
        if not (self.streaming and k in self.late):
            return self.stages[k](x)
        named = dict(self.stages[k].named_parameters())
        copies = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in named.items()}
        batch.weights[k] = copies
        return functional_call(self.stages[k], copies, (x,))

    def _late_half(self, batch: _Batch, context: Callable[[], object]) -> None:
        expected = [[p for p in self.plan[self.own.stop] if p.when == when and p.input] for when in self.whens]
        left = sum(map(len, expected))
        for when, passes in zip(self.whens, expected):
            for p in passes:
                left -= 1
                with record_function("wait for gradients"):
                    gradient = self.from_above.receive(left > 0 or batch.more)
                batch.alive[self.own.stop - 1].from_above[p.units] = gradient
            self._passes(when, batch, context)

    def _passes(self, when: int, batch: _Batch, context: Callable[[], object]) -> None:
        """Run the own stages' passes whose last loss is that after stage `when`, from the top down."""
        for k in reversed(range(self.own.start, min(when + 1, self.own.stop))):
            for p in self.plan[k]:
                if p.when != when:
                    continue
                with record_function(f"stage {k} {'parameter' if p.weights else 'input-only'} pass"):
                    gradient = self._own_pass(k, batch, p, context)
                if p.input and k == self.own.start:
                    self.to_below.send(gradient)
                elif p.input:
                    batch.alive[k - 1].from_above[p.units] = gradient
                if p.weights:
                    del batch.alive[k]
                    if self.on_final is not None:
                        self.on_final(k)

    def _own_pass(self, k: int, batch: _Batch, p: Pass, context: Callable[[], object]) -> Tensor | None:
        copies = batch.weights.get(k)
        if copies is None:
            return self._pass(k, batch.alive[k], p, context)
        own, self.parameters[k] = self.parameters[k], [c for c in copies.values() if c.requires_grad]
        try:
            gradient = self._pass(k, batch.alive[k], p, context)
            if p.weights:
                for parameter, copy in zip(own, self.parameters[k]):
                    parameter.grad = copy.grad
                    if self.on_gradient is not None:
                        self.on_gradient(parameter)
        finally:
            self.parameters[k] = own
        return gradient
