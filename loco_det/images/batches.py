"""One step's images on their way from the workers to the device, in one piece.

Shape legend: B images in this process's batch, S the view's side.

A worker makes one tensor of both views. It is pinned where the device is a GPU, and copied there as it is, on a stream
of its own and one batch ahead: while a step computes, the next one's pixels travel. On a CPU it is not copied at all.
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
    index: Tensor  # (B,) int64 on the host, the image in the source that was really used


# What a worker gives for a step: its images and the unreadable ones met, or the error that ends the run. Errors are
# returned because a DataLoader would wrap one that is raised in a worker in its traceback.
Answer = tuple[TwoViews | Decoded, list[tuple[int, str]]] | UserError


def joined(parts: Sequence[Answer], pin: bool) -> Answer:
    """One step out of what several workers made of it, its pixels in pinned memory if asked."""
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


def delivered(answers: Iterator[Answer], device: torch.device, deliver: Callable[[Answer], Answer]) -> Iterator[Answer]:
    """Each answer as `deliver` brings it to the device; on a GPU the next one is on its way before the step begins."""
    if device.type != "cuda":
        yield from map(deliver, answers)
        return
    stream, ahead = torch.cuda.Stream(device), None
    for answer in answers:
        if ahead is not None:
            _await(ahead, stream, device)
        with torch.cuda.stream(stream):
            coming = deliver(answer)
        if ahead is not None:
            yield ahead
        ahead = coming
    if ahead is not None:
        _await(ahead, stream, device)
        yield ahead


def _await(answer: Answer, stream: torch.cuda.Stream, device: torch.device) -> None:
    """Let the device, not the host, wait for a batch that travels on `stream`."""
    step = torch.cuda.current_stream(device)
    step.wait_stream(stream)
    if not isinstance(answer, UserError):
        answer[0].views.record_stream(step)  # its memory is the other stream's, and must not be given away too early


def deliver_views(answer: Answer, device: torch.device) -> Answer:
    """A worker's views, on the device."""
    if isinstance(answer, UserError):
        return answer
    (views, index), bad = answer
    return TwoViews(views.to(device, non_blocking=True), index), bad


def deliver_decoded(answer: Answer, device: torch.device, makes: torch.device, size: int) -> Answer:
    """The views of a worker's decoded images, on the device; they are made on the device `makes`."""
    if isinstance(answer, UserError):
        return answer
    decoded, bad = answer
    pin = (makes.type, device.type) == ("cpu", "cuda")
    views = make_views(decoded._replace(pixels=decoded.pixels.to(makes, non_blocking=True)), size, pin)
    return TwoViews(views.to(device, non_blocking=True), decoded.index), bad
