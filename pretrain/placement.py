"""Which process owns which stages, from measured times (SOLVER.PARALLEL stages)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pretrain.loco import Pass, Unit, plan_passes, running_statistics_kept

REPEATS = 3  # measurements of a stage, of which the fastest counts


def place(costs: Sequence[float], processes: int) -> list[range]:
    """Cut stages of these costs into one run for each process, so that the largest sum is as small as possible.

    Args:
        costs: at least as many as processes.

    Returns:
        Each process's stages. Of several best cuts, the one that gives lower processes less.
    """
    count = len(costs)
    if not 1 <= processes <= count:
        raise ValueError(f"{count} stages for {processes} processes")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {(1, end): (sums[end], 0) for end in range(1, count + 1)}  # (processes, stages) -> largest sum, last start
    for n in range(2, processes + 1):
        for end in range(n, count + 1):
            best[n, end] = min(
                (max(best[n - 1, start][0], sums[end] - sums[start]), start) for start in range(n - 1, end)
            )
    runs, end = [], count
    for n in range(processes, 0, -1):
        start = best[n, end][1]
        runs.append(range(start, end))
        end = start
    return runs[::-1]


def measure_costs(
    stages: list[nn.Module], units: list[Unit], losses: list[Callable[[Tensor], Tensor]], x: Tensor
) -> list[float]:
    """Measure the seconds that each stage takes in one local step on x (2B, 3, H, W), its units' losses included.

    Neither weights nor statistics change, and no gradient is left.
    """
    costs = []
    modules = nn.ModuleList(stages)
    with running_statistics_kept(modules):
        for k, (stage, passes) in enumerate(zip(stages, plan_passes(units, len(stages)))):
            times = [_cost(stage, passes, x) for _ in range(REPEATS)]
            x = times[0][1]
            ending = [loss for unit, loss in zip(units, losses) if unit.last == k]
            costs.append(min(seconds for seconds, _ in times) + sum(_loss_cost(loss, x) for loss in ending))
    return costs


def _cost(stage: nn.Module, passes: list[Pass], x: Tensor) -> tuple[float, Tensor]:
    """Time a forward and every pass; returns seconds and the output, detached."""
    weights = [p for p in stage.parameters() if p.requires_grad]
    begun = _now(x)
    x = x.detach().requires_grad_()
    output = stage(x)
    gradient = torch.ones_like(output)
    for p in passes:
        wanted = [*(weights if p.weights else []), *([x] if p.input else [])]
        if wanted:
            torch.autograd.grad(output, wanted, gradient, retain_graph=True, allow_unused=True)
    return _now(x) - begun, output.detach()


def _loss_cost(loss: Callable[[Tensor], Tensor], x: Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        begun = _now(x)
        features = x.detach().requires_grad_()
        torch.autograd.grad(loss(features), features)
        times.append(_now(x) - begun)
    return min(times)


def _now(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
