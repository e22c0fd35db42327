"""Averaging gradients over processes while later stages still run.

A gradient joins a bucket as soon as autograd has written it. A bucket is sent when it is full, or at the end of a stage
if it is large enough; it is waited for only when its weights are about to be stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loco_det.core.distributed import replicas

FULL = 25 * 2**20  # bytes at which a bucket is sent, as in torch's DistributedDataParallel
WORTHWHILE = 2**20  # minimum bytes to send at the end of a stage; less waits for the next, to save latency


class Work(Protocol):
    """An all-reduce in progress, the interface of `torch.distributed.Work`."""

    def wait(self) -> object: ...

    def is_completed(self) -> bool: ...


class _Bucket:
    """Gradients sent as one flat tensor, of which each `.grad` becomes a view."""

    def __init__(self, parameters: list[nn.Parameter], send: Callable[[Tensor], Work], processes: int) -> None:
        self.processes = processes
        self.flat = torch.empty(
            sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        start = 0
        for p in parameters:
            view = self.flat.as_strided(p.shape, p.stride(), start)  # channels_last stays channels_last
            p.grad = view.copy_(p.grad)
            start += p.numel()
        self.work: Work | None = send(self.flat)

    def is_completed(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.flat /= self.processes
            self.work = None


class GradientAverage:
    """Replaces each `.grad` by its mean over processes; without effect on a single process.

    Every process must add the same gradients in the same order, as processes that run the same steps do.

    Args:
        parameters: their gradients are added as autograd writes them, so each may be written once per step.
        send: starts to sum a flat tensor over processes in place; by default an all-reduce. On a CPU it has a process
            group of its own, so that small messages of BatchNorm and the loss do not queue behind large ones. On GPUs
            all messages share one group: two NCCL communicators must not have operations under way at the same time.
        group: for the messages, instead of these.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] = (),
        send: Callable[[Tensor], Work] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.processes, self.is_paused = replicas(), False
        self.alone = self.processes == 1
        self.gathered: list[nn.Parameter] = []
        self.sent: dict[nn.Parameter, _Bucket] = {}
        self.send = send
        if self.alone:
            return
        parameters = list(parameters)
        if send is None:
            if group is None and all(p.device.type == "cpu" for p in parameters):
                group = dist.new_group()
            self.send = lambda flat: dist.all_reduce(flat, group=group, async_op=True)
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.add)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this context gradients are not final: autograd adds to them, and none is sent."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def add(self, parameter: nn.Parameter) -> None:
        """Add this parameter's gradient, which is final."""
        if self.alone or self.is_paused or parameter.grad is None:
            return
        if self.gathered and self.gathered[0].dtype != parameter.dtype:
            self.flush()
        self.gathered.append(parameter)
        if self._bytes() >= FULL:
            self.flush()

    def flush(self, least: int = 0) -> None:
        """Send the current bucket, if it has at least `least` bytes."""
        if self.gathered and self._bytes() >= least:
            bucket = _Bucket(self.gathered, self.send, self.processes)
            self.sent.update(dict.fromkeys(self.gathered, bucket))
            self.gathered = []

    def is_completed(self, parameters: list[nn.Parameter]) -> bool:
        """Whether `wait` would return at once, as far as this process knows."""
        if any(p in self.sent and not self.sent[p].is_completed() for p in parameters):
            return False
        waiting = set(self.gathered)
        return waiting.isdisjoint(parameters)

    def wait(self, parameters: list[nn.Parameter]) -> None:
        """Wait until these gradients, if added, hold the mean over processes."""
        if not set(self.gathered).isdisjoint(parameters):
            self.flush()
        for p in parameters:
            if p in self.sent:
                self.sent.pop(p).wait()

    def _bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.gathered)
