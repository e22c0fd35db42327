"""Two weaker forms of sharing, the paper's ablation: which units train a stage that several cover.

`SHARING.MODE` hard is LoCo itself, in pretrain/loco.py: all units that cover a stage train it. Here:

- **upper**: only a stage's uppermost unit trains it, the one with the highest first stage (or those, if several start
  there). The lower units' gradient propagates through the stage to those below, as in hard.
- **soft**: every unit has its own copy of its stages. If several units cover stage k, the uppermost unit's copy is the
  backbone's own (of several with the same first stage, the first in the list); the others have private copies,
  initially equal. A penalty ties them: lambda * sum of (copy - backbone)^2 over all trainable tensors, added once to
  the sum of the units' losses for every private copy, and differentiated for both sides.

Not stated in the paper, so chosen here for soft: the penalty is neither halved nor averaged, and includes norms'
weights and biases; the backbone consists of the uppermost copies; a unit reads the backbone's output of the stage below
its first, detached; each copy has its own BatchNorm running statistics, which the penalty ignores.

Source: Xiong, Ren, Urtasun, NeurIPS 2020, arXiv 2008.01342, ablation of sharing.
Shape legend: as in pretrain/loco.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pretrain.loco import LocalTrainer, Pass, Unit, running_statistics_kept

# --- upper ------------------------------------------------------------------------------------------------------


def plan_upper_passes(units: list[Unit], stages: int) -> list[list[Pass]]:
    """Return the passes of each stage, one per first stage of its units; the highest is last and has the weights.

    A pass of units that continue above needs their pass there. The parameter pass also waits for the stage's other
    passes, because it frees the activations; with nested units it may run later than its own losses are known.
    """
    plan: list[list[Pass]] = []
    above: dict[int, int] = {}  # first stage -> step at which those units' pass through the stage above runs
    for k in reversed(range(stages)):
        groups = {
            first: frozenset(i for i, unit in enumerate(units) if unit.covers(k) and unit.first == first)
            for first in sorted({unit.first for unit in units if unit.covers(k)})
        }
        when = {first: max([above.get(first, 0), *(units[i].last for i in some)]) for first, some in groups.items()}
        top = max(groups)
        when[top] = max(when.values())
        plan.append([Pass(some, when[first], weights=first == top, input=first < k) for first, some in groups.items()])
        above = when
    return plan[::-1]


class UpperTrainer(LocalTrainer):
    """The local step in which only its uppermost unit trains each stage; arguments as for LocalTrainer."""

    def __init__(self, stages: list[nn.Module], units: list[Unit], *args: Any, **options: Any) -> None:
        super().__init__(stages, units, *args, **options)
        self.plan = plan_upper_passes(units, len(stages))


# --- soft -------------------------------------------------------------------------------------------------------


def number_copies(units: list[Unit], stages: int) -> dict[tuple[int, int], int]:
    """Map (unit, stage) -> the part that is the unit's copy of the stage.

    Parts below `stages` are the backbone's stages; higher ones are private copies, by stage and then by unit.
    """
    parts: dict[tuple[int, int], int] = {}
    private = stages
    for k in range(stages):
        covering = [i for i, unit in enumerate(units) if unit.covers(k)]
        uppermost = max(covering, key=lambda i: units[i].first)
        for i in covering:
            parts[i, k] = k if i == uppermost else private
            private += i != uppermost
    return parts


def private_copies(stages: list[nn.Module], units: list[Unit]) -> list[nn.Module]:
    """Return the units' private copies, equal to the backbone's stages, in the order of `number_copies`."""
    return [copy.deepcopy(stages[k]) for (_, k), part in number_copies(units, len(stages)).items() if part != k]


class SoftTrainer:
    """Runs every unit through its own copies and accumulates the gradients of losses and penalty in `.grad`.

    No weight is in two units, so a unit is differentiated as a whole once its loss is known.

    Args:
        stages: the backbone's, in order; stage k reads stage k-1's output.
        copies: the private copies, in the order of `private_copies`.
        units: any list; together they cover every stage.
        losses: per unit, from its last stage's output (2B, C, H, W) to a scalar.
        penalty: lambda.
        on_final: called with a part (a stage's index, or the number of stages plus a copy's index) once its gradients
            are final, in the middle of the step.
        on_start: called with a part before its weights are read.
    """

    def __init__(
        self,
        stages: list[nn.Module],
        copies: list[nn.Module],
        units: list[Unit],
        losses: list[Callable[[Tensor], Tensor]],
        penalty: float,
        on_final: Callable[[int], None] | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> None:
        self.stages, self.modules = stages, [*stages, *copies]
        self.units, self.losses, self.penalty = units, losses, penalty
        self.on_final, self.on_start = on_final, on_start
        self.parts = number_copies(units, len(stages))

    def step(
        self,
        x: Tensor,
        *,
        autocast: Callable[[], object] | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Run one forward and compute all gradients, added to `.grad`; arguments and result as for LocalTrainer.step.

        The penalty is in the gradients, not in the returned losses.
        """
        context = autocast or nullcontext
        paths: dict[int, Tensor] = {}  # unit -> output of its latest copy
        losses: dict[int, Tensor] = {}
        x = x.detach()
        for k in range(len(self.stages)):
            parts = {i: part for (i, stage), part in self.parts.items() if stage == k}
            if self.on_start is not None:
                for part in sorted(parts.values()):
                    self.on_start(part)
            self._penalise(k, [self.modules[part] for part in parts.values() if part != k], scale)
            x = self._forward(k, x, parts, paths, context)
            for i in [i for i in parts if self.units[i].last == k]:
                losses[i] = self._backward(i, paths.pop(i), context, scale)
        return [losses[i] for i in range(len(self.units))]

    def _penalise(self, k: int, copies: list[nn.Module], scale: Callable | None) -> None:
        """Initialise the gradients of stage k's parts with the penalty's.

        Before the loss's, so that a backward writes each gradient once, complete, as GradientAverage requires.
        """
        pairs = [(own, p) for c in copies for own, p in zip(c.parameters(), self.stages[k].parameters())]
        pairs = [(own, p) for own, p in pairs if p.requires_grad]
        if not (pairs and self.penalty):
            return
        total = self.penalty * sum((own - p).square().sum() for own, p in pairs)
        wanted = list(dict.fromkeys(p for pair in pairs for p in pair))
        for p, gradient in zip(wanted, torch.autograd.grad(scale(total) if scale else total, wanted)):
            p.grad = gradient if p.grad is None else p.grad + gradient

    def _forward(
        self, k: int, x: Tensor, parts: dict[int, int], paths: dict[int, Tensor], context: Callable[[], object]
    ) -> Tensor:
        """Run stage k in each of its copies; returns the backbone's output (2B, C, H, W), detached.

        If units are nested, a unit may reach a stage of the backbone through a private copy below. The backbone's
        output then needs another forward, which determines the running statistics.
        """
        output = None
        for i, part in parts.items():
            first = self.units[i].first
            strayed = part == k and any(self.parts[i, below] != below for below in range(first, k))
            statistics = running_statistics_kept(self.modules[part]) if strayed else nullcontext()
            with record_function(f"unit {i} stage {k} forward"), context(), statistics:
                paths[i] = self.modules[part](x if first == k else paths[i])
            if part == k and not strayed:
                output = paths[i].detach()
        if output is None:
            with record_function(f"stage {k} forward"), context(), torch.no_grad():
                output = self.stages[k](x)
        return output

    def _backward(self, i: int, features: Tensor, context: Callable[[], object], scale: Callable | None) -> Tensor:
        """Compute unit i's loss, detached, and its gradient in all that the unit owns."""
        with record_function(f"unit {i} loss and backward"):
            with context():
                loss = self.losses[i](features)
            (scale(loss) if scale else loss).backward()
        if self.on_final is not None:
            for part in sorted(part for (unit, _), part in self.parts.items() if unit == i):
                self.on_final(part)
        return loss.detach()
