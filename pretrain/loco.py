"""The paper in one file: units, the stop-gradient between them, and one exact local training step.

LoCo (Xiong, Ren, Urtasun, NeurIPS 2020), SimCLR end to end and Greedy InfoMax (GIM) differ only in their units. A
**unit** is a range of consecutive stages trained by one contrastive loss. Its gradient stops at its first stage. Units
may overlap: the stage that two units share is the last stage of the lower one, so part of its decoder, and the first of
the upper one, whose loss it propagates to the unit below.

    simclr   [res2 res3 res4 res5]                      one loss, end to end
    gim      [res2] [res3] [res4] [res5]                no overlap, no gradient between stages
    loco     [res2 res3] [res3 res4] [res4 res5]        each inner stage is in two units (the paper's figure 1)
    loco_res2  [res2] and loco's                        a loss after every stage (the paper's training curves)

These are the four stages of a ResNet; other backbones follow the same pattern over their own stages, plain vision
transformers over the quarters of their blocks.

Shape legend: B images, two views each, so stages run on a batch of 2B; D numbers in an embedding.

**The step.** Each stage is forwarded once, from a detached input, so autograd's graph ends at its borders. After the
last stage of a unit the unit's loss is computed, and its gradient propagates down explicitly, one vector-Jacobian
product per stage. Call U(k, t) the units that cover stage k and start at t or below. These sets are nested; the
largest, all units that cover k, trains k's weights:

- the *parameter pass* of k propagates the summed gradient of all units covering k through k. It is the only pass that
  computes weight gradients, and it also computes the input gradient if none of those units starts at k.
- each smaller set must be propagated separately, because the others' gradient stops at a start further up: one
  *input-only pass* per set, without weight gradients.

A pass runs as soon as the last unit in its set has its loss. After the parameter pass the stage's activations are freed
and its gradients are final, before the stages above have run.

A *recomputed* stage keeps only its input and repeats its forward in each of its passes; such stages are cut into single
blocks, so that one block's activations are alive at a time. Values and gradients are bitwise the same, and only the
first forward updates BatchNorm's running statistics.

Forwards, losses and passes are named in profiler traces; benchmarks/step_timeline.py draws them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from loco_det.backbones.resnet import StagedBackbone
from loco_det.core.errors import UserError

METHODS = ("simclr", "gim", "loco", "loco_res2")


# --- units ------------------------------------------------------------------------------------------------------


def method_units(method: str, stages: Sequence[str]) -> list[list[str]]:
    """Return the [first, last] stage names of each unit of `method`, one of METHODS, over `stages`: res2 and above."""
    neighbours = [list(pair) for pair in pairwise(stages)]
    return {
        "simclr": [[stages[0], stages[-1]]],
        "gim": [[stage, stage] for stage in stages],
        "loco": neighbours,
        "loco_res2": [[stages[0], stages[0]], *neighbours],
    }[method]


@dataclass(frozen=True)
class Unit:
    """Stages `first`..`last` (indices, both inclusive) trained by one loss."""

    first: int
    last: int

    def covers(self, stage: int) -> bool:
        return self.first <= stage <= self.last


@dataclass(frozen=True)
class Stage:
    """A run of the backbone's blocks without a unit border; a single block if it is recomputed."""

    name: str
    module: nn.Sequential
    ends_in: str  # the backbone's stage of its last block, e.g. "res3"
    recompute: bool


def split_backbone(
    backbone: StagedBackbone, units: list[list[str]], recompute: str | list[str] | None = None
) -> tuple[list[Stage], list[Unit]]:
    """Cut the backbone into stages at the borders of `units` and at every recomputed block.

    Args:
        backbone: its modules are shared with the stages, not copied.
        units: [first, last] pairs of stage names: "res3", or some of its blocks, "res3.1" or "res3.0-1". "stem" may be
            named; otherwise it belongs to the block above it.
        recompute: the stages (names as above) whose activations are not kept; "first" means the stem and the stage
            above it, "all" every stage, "none" or None no stage. A string may also list names, "res2, res3".

    Returns:
        The stages in order and, for each pair, the unit over them.

    Raises:
        UserError: an unknown name, a unit that ends before it starts, a block without a unit.
    """
    blocks = backbone.blocks()
    names = [name for name, _, _ in blocks]
    again = _recomputed(list(backbone.stage_names[:2]) if recompute == "first" else recompute, names)
    spans = []
    for pair in units:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"UNITS: {pair!r} is not a [first, last] pair of stage names such as [res2, res3]")
        (first, _), (_, last) = (_block_range(str(name), names, "UNITS") for name in pair)
        spans.append((first, last))
    if not any("stem" in map(str, pair) for pair in units):
        spans = [(0 if first == 1 else first, last) for first, last in spans]
    for (first, last), pair in zip(spans, units):
        if last < first:
            raise UserError(f"UNITS: {list(pair)} ends before it starts; give the lower stage first")
    for position, name in enumerate(names):
        if not any(first <= position <= last for first, last in spans):
            raise UserError(f"UNITS: no unit trains {name}; add one that covers it")
    starts = {0} | {first for first, _ in spans} | {last + 1 for _, last in spans}
    starts = sorted((starts | again | {block + 1 for block in again}) - {len(blocks)})
    stages = [_stage(blocks[a:b], a in again) for a, b in zip(starts, [*starts[1:], len(blocks)])]
    return stages, [Unit(starts.index(first), _stage_of(last, starts)) for first, last in spans]


def _recomputed(recompute: str | list[str] | None, blocks: list[str]) -> set[int]:
    """Return the positions of the blocks whose activations are not kept."""
    if recompute in (None, "none"):
        return set()
    if recompute == "all":
        return set(range(len(blocks)))
    if isinstance(recompute, str):  # a list of words on the command line
        recompute = re.findall(r"[^\s,\[\]]+", recompute)
    if not isinstance(recompute, (list, tuple)):
        raise UserError(f"SOLVER.RECOMPUTE is {recompute!r}; use none, first, all or a list such as [res2, res3]")
    ranges = [_block_range(str(name), blocks, "SOLVER.RECOMPUTE") for name in recompute]
    return {block for first, last in ranges for block in range(first, last + 1)}


def _block_range(name: str, blocks: list[str], key: str) -> tuple[int, int]:
    """Return the positions of the first and last block of `name` in the configuration's `key`."""
    match = re.fullmatch(r"([a-z]+\d?)(?:\.(\d+)(?:-(\d+))?)?", name)
    if match:
        stage, low, high = match.groups()
        own = [i for i, block in enumerate(blocks) if block.split(".")[0] == stage]
        first = int(low) if low else 0
        last = int(high) if high else first if low else len(own) - 1
        if own and first <= last < len(own):
            return own[first], own[last]
    raise UserError(f"{key}: {name!r} is not in this backbone; its blocks are {blocks[0]}, {blocks[1]} .. {blocks[-1]}")


def _stage_of(block: int, starts: list[int]) -> int:
    return max(i for i, start in enumerate(starts) if start <= block)


def _stage(blocks: list[tuple[str, str, nn.Module]], recompute: bool) -> Stage:
    names, stages, modules = zip(*blocks)
    name = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
    return Stage(name, nn.Sequential(*modules), stages[-1], recompute)


# --- one step ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One vector-Jacobian product through a stage, for the gradient of some of the units that cover it."""

    units: frozenset[int]
    when: int  # the stage after whose forward the last of these units has its loss
    weights: bool  # the parameter pass: computes weight gradients, then frees the activations
    input: bool  # the gradient continues to the stage below


def plan_passes(units: list[Unit], stages: int) -> list[list[Pass]]:
    """Return the passes of each stage in execution order; the last one is its parameter pass.

    In units of one forward the parameter pass costs 2 and an input-only pass 1, so inner stages of LoCo cost 4
    including their forward, and all stages of GIM and SimCLR 3.
    """
    plan = []
    for k in range(stages):
        covering = {i for i, unit in enumerate(units) if unit.covers(k)}
        passes = []
        for start in sorted({units[i].first for i in covering}):
            some = frozenset(i for i in covering if units[i].first <= start)
            when = max(units[i].last for i in some)
            passes.append(Pass(some, when, weights=some == covering, input=start < k))
        plan.append(passes)
    return plan


@dataclass
class _Forward:
    """A stage's forward, kept until its parameter pass, and the gradients received at its output.

    For a recomputed stage `output` has no graph.
    """

    input: Tensor
    output: Tensor
    from_losses: dict[int, Tensor] = field(default_factory=dict)  # unit that ends here -> gradient
    from_above: dict[frozenset[int], Tensor] = field(default_factory=dict)  # units of the pass above -> gradient


class _Catch(torch.autograd.Function):
    """Identity whose backward stores the incoming gradient unchanged, possibly an expanded small tensor, and ends."""

    @staticmethod
    def forward(ctx, output: Tensor, unit: int, gradients: dict[int, Tensor]) -> Tensor:
        ctx.unit, ctx.gradients = unit, gradients
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradients[ctx.unit] = gradient
        return None, None, None


class LocalTrainer:
    """Runs the stages under their units' losses and accumulates every gradient in `.grad`.

    Args:
        stages: in order; stage k reads stage k-1's output.
        units: any list; together they cover every stage.
        losses: per unit, from its last stage's output (2B, C, H, W) to a scalar (a decoder and NT-Xent).
        on_final: called with a stage's index once its weight gradients are final, in the middle of the step; the place
            for an all-reduce.
        on_start: called with a stage's index just before its forward; the last moment to update its weights from the
            previous step.
        recompute: indices of the stages that keep no activations.
    """

    def __init__(
        self,
        stages: list[nn.Module],
        units: list[Unit],
        losses: list[Callable[[Tensor], Tensor]],
        on_final: Callable[[int], None] | None = None,
        recompute: Collection[int] = (),
        on_start: Callable[[int], None] | None = None,
    ) -> None:
        self.stages, self.units, self.losses, self.recompute = stages, units, losses, frozenset(recompute)
        self.plan = plan_passes(units, len(stages))
        self.parameters = [[p for p in stage.parameters() if p.requires_grad] for stage in stages]
        self.on_final, self.on_start = on_final, on_start

    def step(
        self,
        x: Tensor,
        *,
        autocast: Callable[[], object] | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Run one forward and compute all gradients, added to `.grad` as by backward.

        Args:
            x: (2B, 3, H, W), the first view of every image, then the second.
            autocast: creates the context of the forwards; gradients are computed outside it.
            scale: scales a loss before its gradient is computed (fp16's loss scaling).

        Returns:
            Each unit's loss, detached scalars.
        """
        context = autocast or nullcontext
        alive: dict[int, _Forward] = {}
        losses: dict[int, Tensor] = {}
        for k, stage in enumerate(self.stages):
            if self.on_start is not None:
                self.on_start(k)
            x = x.detach()  # the stop-gradient: autograd does not see the stage below
            x.requires_grad_(any(p.input for p in self.plan[k]))
            with record_function(f"stage {k} forward"), context(), torch.set_grad_enabled(k not in self.recompute):
                alive[k] = _Forward(x, stage(x))
            x = alive[k].output
            for i in self._ending(k):
                losses[i] = self._loss(i, alive[k], context, scale)
            self._walk_down(k, alive, context)
        return [losses[i] for i in range(len(self.units))]

    def _ending(self, k: int) -> list[int]:
        return [i for i, unit in enumerate(self.units) if unit.last == k]

    def _loss(self, i: int, top: _Forward, context: Callable[[], object], scale: Callable | None) -> Tensor:
        """Compute unit i's loss and its decoder's gradients; its own gradient is stored at its last stage."""
        with record_function(f"unit {i} loss"):
            with context():
                loss = self.losses[i](_Catch.apply(top.output.detach().requires_grad_(), i, top.from_losses))
            (scale(loss) if scale else loss).backward()
        return loss.detach()

    def _walk_down(self, when: int, alive: dict[int, _Forward], context: Callable[[], object]) -> None:
        """Run every pass completed by the losses known after stage `when`, from the top down."""
        for k in range(when, -1, -1):
            for p in self.plan[k]:
                if p.when == when:
                    with record_function(f"stage {k} {'parameter' if p.weights else 'input-only'} pass"):
                        gradient = self._pass(k, alive[k], p, context)
                    if p.input:
                        alive[k - 1].from_above[p.units] = gradient
                    if p.weights:
                        del alive[k]
                        if self.on_final is not None:
                            self.on_final(k)

    def _pass(self, k: int, at: _Forward, p: Pass, context: Callable[[], object]) -> Tensor | None:
        parts = [gradient for i, gradient in at.from_losses.items() if i in p.units]
        through = frozenset(i for i in p.units if self.units[i].covers(k + 1))
        if through:
            parts.append(at.from_above[through])
        gradient = sum(parts[1:], start=parts[0])
        input, output = at.input, at.output
        if k in self.recompute:
            input = at.input.detach().requires_grad_(p.input)
            with context(), running_statistics_kept(self.stages[k]):
                output = self.stages[k](input)
        if not p.weights:
            return torch.autograd.grad(output, input, gradient, retain_graph=k not in self.recompute)[0]
        wanted = [*self.parameters[k], input] if p.input else self.parameters[k]
        torch.autograd.backward(output, gradient, inputs=wanted)
        return input.grad


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """In this context forwards compute the same, but do not update BatchNorm's running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False  # in training mode: uses batch statistics, writes none
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
