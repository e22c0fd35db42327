"""Steps each part of the network, a stage or a decoder, as soon as its gradient allows.

A part's gradient is final in the middle of a local step. On one process the part is stepped at once and its gradient
freed, before the stages above have run. On several, the gradient is being averaged meanwhile, and the part is stepped
when it arrives: at the end of a later stage, or at the latest before the part runs again, in the next step. So the
large messages of the top stages, which are final last, are sent while the next step's lower stages run. Every optimizer
of this package treats parameters separately, so the result is bitwise the same.

With fp16's loss scaling one non-finite gradient must skip the whole step, so everything is stepped at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from pretrain.average import WORTHWHILE, GradientAverage


class Stepping:
    """Averages and steps the parts of a network.

    Args:
        optimizer: over all parameters of all parts; LARS, SGD or AdamW without clipping.
        parts: modules that are stepped one at a time; no parameter is in two.
        average: averages their gradients over processes.
        scaler: fp16's; otherwise disabled.
        early: step each part as early as possible. False, or an enabled scaler: everything in `finish`.

    Attributes:
        lr: learning rate for gradients that become final from now on.
        observe: if set, called with each part's parameters before they are stepped, their `.grad` averaged and
            unscaled.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Iterable[nn.Module],
        average: GradientAverage,
        scaler: torch.amp.GradScaler,
        early: bool,
    ) -> None:
        self.optimizer, self.average, self.scaler = optimizer, average, scaler
        self.parts = {part: list(part.parameters()) for part in parts}
        self.early = early and not scaler.is_enabled()
        self.lr = 0.0
        self.observe: Callable[[list[nn.Parameter]], None] | None = None
        self.waiting: dict[nn.Module, float] = {}  # part -> learning rate of its step
        self.split: dict[nn.Module, list[list[nn.Parameter]]] = {}  # part -> its share of the optimizer's groups
        for part, parameters in self.parts.items():
            own = set(parameters)
            self.split[part] = [[p for p in group["params"] if p in own] for group in optimizer.param_groups]

    def final(self, *parts: nn.Module) -> None:
        """Mark these parts' gradients as final on this process; step every part that is ready."""
        self.waiting.update(dict.fromkeys(parts, self.lr))
        self.average.flush(WORTHWHILE)
        if self.early:
            for part in [part for part in self.waiting if self.average.is_completed(self.parts[part])]:
                self.ready(part)

    def ready(self, part: nn.Module) -> None:
        """Update the part's weights, because they are needed now."""
        if self.early and part in self.waiting:
            self.average.wait(self.parts[part])
            self._step(part, self.waiting.pop(part))

    def finish(self) -> None:
        """Update all weights and free all gradients."""
        if self.early:
            for part in list(self.waiting):
                self.ready(part)
            return
        if not self.waiting:
            return
        for parameters in self.parts.values():
            self.average.wait(parameters)
        self.scaler.unscale_(self.optimizer)
        for parameters in self.parts.values():
            self._observe(parameters)
        self._set_rate(self.lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.waiting.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, part: nn.Module, lr: float) -> None:
        self._observe(self.parts[part])
        self._set_rate(lr)
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [
            {**group, "params": some} for group, some in zip(groups, self.split[part]) if some
        ]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        for p in self.parts[part]:
            p.grad = None

    def _observe(self, parameters: list[nn.Parameter]) -> None:
        if self.observe is not None:
            self.observe(parameters)

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
