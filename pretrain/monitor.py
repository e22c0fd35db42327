"""Monitors pretraining: lines of metrics.json, the progress bar's numbers, a warning of collapse."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loco_det.backbones.resnet import StagedBackbone
from loco_det.core.distributed import reduce_mean
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.core.metrics import RunMetrics
from loco_det.images.source import Source
from pretrain.loss import embedding_health

MIN_STD = 0.05  # of the embeddings, 1 when spread over the sphere; collapsed below
NAMED_IMAGES = 4  # in the message about a non-finite loss
HEALTH_IMAGES = 128  # pairs for alignment and uniformity, whose cost is quadratic


class Stopwatch:
    """Measures the time spent waiting for batches."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.since = time.perf_counter()

    def through(self, batches: Iterator) -> Iterator:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block's time from training and from waiting."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def lap(self) -> tuple[float, float]:
        """Return (seconds since the last lap, seconds of them spent waiting)."""
        now = time.perf_counter()
        result = now - self.since, self.waited
        self.since, self.waited = now, 0.0
        return result


class UnreadLosses:
    """Losses kept on the device until they are read, since every read synchronises with the device.

    Args:
        labels: names of the units.
        source: the images, for their names.
    """

    def __init__(self, labels: list[str], source: Source) -> None:
        self.labels, self.source = labels, source
        self.steps: list[tuple[int, Tensor]] = []  # step, index of its first image
        self.losses: list[Tensor] = []  # of all these steps, a step's in the order of the labels

    def add(self, step: int, losses: list[Tensor], indices: Tensor) -> None:
        """Add a step's scalar loss of each unit, and its (b,) image indices; none where they are not known."""
        self.steps.append((step, indices[:NAMED_IMAGES].clone()))
        self.losses += losses

    def read(self) -> None:
        """Check all losses added since the last read.

        Raises:
            UserError: a loss is not finite; names its unit, the first such step, and the images.
        """
        values = torch.stack(self.losses).view(len(self.steps), -1).tolist() if self.steps else []
        for (step, indices), losses in zip(self.steps, values):
            for label, loss in zip(self.labels, losses):
                if not math.isfinite(loss):
                    names = ", ".join(self.source.name(i) for i in indices.tolist())
                    where = f"step {step} (images {names}, ...)" if names else f"step {step}"
                    raise UserError(
                        f"the loss of unit {label} is {loss} at {where}; start again with a lower SOLVER.BASE_LR, a "
                        "higher LOSS.TEMPERATURE or SOLVER.AMP none; nothing of this step was saved"
                    )
        self.steps, self.losses = [], []


class Monitor:
    """Converts a step into the progress bar's numbers and, every `period` steps, a line of metrics.json.

    Args:
        period: steps between two lines.
        batch_size: images per step over all processes.
        backbone: its stages' gradient norms are recorded.
        labels: names of the units, in the order of the losses.
        embeddings: embeddings of the last step by unit, (2b, D).
    """

    def __init__(
        self,
        period: int,
        batch_size: int,
        backbone: StagedBackbone,
        labels: list[str],
        embeddings: dict[int, Tensor],
        stopwatch: Stopwatch,
        metrics: RunMetrics,
    ) -> None:
        self.period, self.batch_size = period, batch_size
        self.backbone, self.labels, self.embeddings = backbone, labels, embeddings
        self.stopwatch, self.metrics = stopwatch, metrics
        self.norms: dict[nn.Parameter, Tensor] = {}
        self.steps = 0
        self.shown: dict[str, float] = {}  # the progress bar's numbers between two lines
        self.warned = False

    def due(self, step: int) -> bool:
        """Whether this step writes a line."""
        return step == 0 or (step + 1) % self.period == 0

    @torch.no_grad()
    def record_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Record the norms of these gradients, whose memory is reused before the step ends."""
        self.norms.update({p: p.grad.norm() for p in parameters if p.grad is not None})

    def __call__(self, step: int, losses: list[Tensor], lr: float, found: dict[str, float]) -> dict[str, float]:
        """Count the step; write a line if one is due or a probe has results (`found`).

        Returns:
            The last line's losses and images a second; between lines nothing is read from the device.
        """
        self.steps += 1
        if not self.due(step) and not found:
            return self.shown
        values = {f"loss/{label}": loss for label, loss in zip(self.labels, losses)}
        for i, label in enumerate(self.labels):
            first, second = self.embeddings[i].chunk(2)
            few = torch.cat([first[:HEALTH_IMAGES], second[:HEALTH_IMAGES]])
            values.update({f"{name}/{label}": value for name, value in embedding_health(few).items()})
        means = reduce_mean({**values, **stage_norms(self.backbone, self.norms)})
        seconds, waiting = self.stopwatch.lap()
        rate = self.steps * self.batch_size / seconds
        self.steps = 0
        extra = {"lr": lr, "images_per_second": rate, "data_wait_share": waiting / seconds}
        self.metrics.write({"iteration": step, **means, **extra, **found})
        self.warned = self.warned or warn_of_collapse(means, step)
        self.shown = {**{k: v for k, v in means.items() if k.startswith("loss/")}, "img/s": rate}
        return self.shown


def warn_of_collapse(means: dict[str, float], step: int) -> bool:
    """Warn of the first unit whose embeddings are nearly all alike, by a line's "std/UNIT"; returns whether one is."""
    for name, value in means.items():
        if name.startswith("std/") and value < MIN_STD:
            log.warning(
                "step %d: the embeddings of unit %s have collapsed (std %.3f of 1); lower SOLVER.BASE_LR or raise the "
                "batch size",
                *(step, name.removeprefix("std/"), value),
            )
            return True
    return False


def stage_norms(backbone: StagedBackbone, norms: dict[nn.Parameter, Tensor]) -> dict[str, Tensor]:
    """Return the Euclidean norm of each stage's gradient from its tensors' norms: {"grad_norm/stem": scalar, ...}."""
    each: dict[str, list[Tensor]] = {}
    for _, stage, block in backbone.blocks():
        each.setdefault(stage, []).extend(norms[p] for p in block.parameters() if p in norms)
    return {f"grad_norm/{stage}": torch.stack(found).norm() for stage, found in each.items() if found}
