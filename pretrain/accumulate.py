"""Exact accumulation (`SOLVER.ACCUMULATE`): the loss of a large batch with the activations of a part of it.

Averaging the gradients of parts would compare an image with its own part only. Here every image has the negatives of
the whole batch, as in GradCache (Gao et al. 2021, arXiv 2101.06983), for any list of units:

1. each part is forwarded through all stages and decoders without a graph; only the embeddings are kept;
2. each unit's loss of all embeddings gives every embedding's gradient;
3. each part takes the ordinary local step, in which the loss's gradient at its embeddings is the one from 2.

Every stage is forwarded once more than in the ordinary step, however many units cover it, and a unit's gradient still
runs through its own stages only. A BatchNorm normalises a part by the part's statistics, the same in both passes, and
updates its running statistics in the second. So the result depends on the number of parts as far as BatchNorm does;
otherwise it is that of the whole batch.

Shape legend: b images of this process, two views each, in n parts of b / n; D numbers in an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pretrain.average import GradientAverage
from pretrain.loco import LocalTrainer, running_statistics_kept


class Accumulation:
    """Runs a local step on a batch that is given in parts; all gradients are added to `.grad`.

    Args:
        trainer: of the stages and units; its losses are not used, and its `on_final` is called in the last part only.
        decoders: of each unit, from its last stage's output (2b/n, C, H, W) to embeddings (2b/n, D).
        contrast: (unit, the embeddings of all parts (2b, D), first views before second views) to the loss, a scalar.
        average: told not to send gradients before the last part.
        on_decode: called with a unit before its decoder's weights are read.
        on_last: called with a unit before its decoder's gradients become final.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        decoders: Sequence[nn.Module],
        contrast: Callable[[int, Tensor], Tensor],
        average: GradientAverage | None = None,
        on_decode: Callable[[int], None] | None = None,
        on_last: Callable[[int], None] | None = None,
    ) -> None:
        self.trainer, self.decoders, self.contrast, self.average = trainer, decoders, contrast, average
        self.on_decode, self.on_last, self.on_final = on_decode, on_last, trainer.on_final

    def step(
        self,
        parts: Sequence[Callable[[], Tensor]],
        *,
        autocast: Callable[[], object] | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Run one step; `autocast` and `scale` as for LocalTrainer.step.

        Args:
            parts: each makes its (2b/n, 3, H, W) images, the first view of every image, then the second. Called twice.

        Returns:
            Each unit's loss, detached scalars.
        """
        context = autocast or nullcontext
        embeddings = [self._embed(part(), context) for part in parts]
        losses, gradients = zip(*(self._contrast(i, [z[i] for z in embeddings], scale) for i in self._units()))
        del embeddings
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            known = [(loss, gradient[number]) for loss, gradient in zip(losses, gradients)]
            self.trainer.losses = [partial(self._loss, i, *known[i], is_last) for i in self._units()]
            self.trainer.on_final = self.on_final if is_last else None
            with ExitStack() as stack:
                if self.average is not None and not is_last:
                    stack.enter_context(self.average.paused())
                self.trainer.step(part(), autocast=autocast)
        return list(losses)

    def _units(self) -> range:
        return range(len(self.trainer.units))

    @torch.no_grad()
    def _embed(self, x: Tensor, context: Callable[[], object]) -> list[Tensor]:
        """Return the embeddings of one part, (2b/n, D) for each unit."""
        found: dict[int, Tensor] = {}
        for k, stage in enumerate(self.trainer.stages):
            if self.trainer.on_start is not None:
                self.trainer.on_start(k)
            with record_function(f"stage {k} embedding forward"), context(), running_statistics_kept(stage):
                x = stage(x)
            for i in [i for i, unit in enumerate(self.trainer.units) if unit.last == k]:
                if self.on_decode is not None:
                    self.on_decode(i)
                with record_function(f"unit {i} embedding"), context(), running_statistics_kept(self.decoders[i]):
                    found[i] = self.decoders[i](x)
        return [found[i] for i in self._units()]

    def _contrast(self, i: int, parts: list[Tensor], scale: Callable | None) -> tuple[Tensor, list[Tensor]]:
        """Return unit i's detached loss, and its (scaled) gradient at the embeddings of each part."""
        views = [part.chunk(2) for part in parts]
        z = torch.cat([first for first, _ in views] + [second for _, second in views]).requires_grad_()
        loss = self.contrast(i, z)
        (gradient,) = torch.autograd.grad(scale(loss) if scale else loss, z)
        pairs = zip(*(half.chunk(len(parts)) for half in gradient.chunk(2)))
        return loss.detach(), [torch.cat(pair) for pair in pairs]

    def _loss(self, i: int, loss: Tensor, gradient: Tensor, is_last: bool, features: Tensor) -> Tensor:
        z = self.decoders[i](features)
        if is_last and self.on_last is not None:
            self.on_last(i)
        return _Known.apply(z, loss, gradient)


class _Known(torch.autograd.Function):
    """A loss whose value and gradient at the embeddings are known."""

    @staticmethod
    def forward(ctx, z: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None, None]:
        return *ctx.saved_tensors, None, None
