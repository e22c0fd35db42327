"""Moves one step's images from the workers to the device, in one piece.

Shape legend: B images in this process's batch, S the view's side.

A worker makes one tensor of both views. If the device is a GPU, it is pinned and copied unchanged on a separate stream,
one batch ahead: the next step's pixels are transferred during the current one. On a CPU it is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loco_det.core.errors import UserError
from loco_det.images.batched_views import Decoded, join_decoded, make_views


class TwoViews(NamedTuple):
    """One step's images of this process."""

    views: Tensor  # (2, B, 3, S, S) uint8: the first view of every image, then the second
    index: Tensor  # (B,) int64 on the host, source index of the image actually used


# A worker's result for a step: its images and the unreadable ones, or the error that ends the run. Errors are returned
# because a DataLoader would wrap a raised one in the worker's traceback.
WorkerResult = tuple[TwoViews | Decoded, list[tuple[int, str]]] | UserError


def joined(parts: Sequence[WorkerResult], pin: bool) -> WorkerResult:
    """Join several workers' results into one step, its pixels optionally in pinned memory."""
    errors = [part for part in parts if isinstance(part, UserError)]
    if errors:
        return errors[0]
    images, bad = [part[0] for part in parts], [image for part in parts for image in part[1]]
    if len(parts) == 1 and not pin:
        return images[0], bad
    join = join_decoded if isinstance(images[0], Decoded) else _join_views
    return join(images, pin), bad


def _join_views(parts: Sequence[TwoViews], pin: bool) -> TwoViews:
    counts = [len(part.index) for part in parts]
    views = torch.empty(2, sum(counts), *parts[0].views.shape[2:], dtype=torch.uint8, pin_memory=pin)
    for place, part in zip(views.split(counts, 1), parts):
        place.copy_(part.views)
    return TwoViews(views, torch.cat([part.index for part in parts]))


def prefetch(
    results: Iterator[WorkerResult], device: torch.device, deliver: Callable[[WorkerResult], WorkerResult]
) -> Iterator[WorkerResult]:
    """Yield each result moved to the device by `deliver`; on a GPU the next one is sent before the step begins."""
    if device.type != "cuda":
        yield from map(deliver, results)
        return
    stream, ahead = torch.cuda.Stream(device), None
    for result in results:
        if ahead is not None:
            _await(ahead, stream, device)
        with torch.cuda.stream(stream):
            coming = deliver(result)
        if ahead is not None:
            yield ahead
        ahead = coming
    if ahead is not None:
        _await(ahead, stream, device)
        yield ahead


def _await(result: WorkerResult, stream: torch.cuda.Stream, device: torch.device) -> None:
    """Make the device, not the host, wait for a batch on `stream`."""
    step = torch.cuda.current_stream(device)
    step.wait_stream(stream)
    if not isinstance(result, UserError):
        result[0].views.record_stream(step)  # its memory belongs to the other stream and must not be reused too early


def deliver_views(result: WorkerResult, device: torch.device) -> WorkerResult:
    """Move a worker's views to the device."""
    if isinstance(result, UserError):
        return result
    (views, index), bad = result
    return TwoViews(views.to(device, non_blocking=True), index), bad


def deliver_decoded(result: WorkerResult, device: torch.device, makes: torch.device, size: int) -> WorkerResult:
    """Make the views of a worker's decoded images on the device `makes`, and move them to `device`."""
    if isinstance(result, UserError):
        return result
    decoded, bad = result
    pin = (makes.type, device.type) == ("cpu", "cuda")
    views = make_views(decoded._replace(pixels=decoded.pixels.to(makes, non_blocking=True)), size, pin)
    return TwoViews(views.to(device, non_blocking=True), decoded.index), bad
