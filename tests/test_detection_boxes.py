"""Box arithmetic against loops over single boxes, and against the numbers in Detectron2's own unit tests."""

from __future__ import annotations

import math
import random

import pytest
import torch

from loco_det.detection.boxes import (
    BOX_LOSSES,
    LOG_SCALE_LIMIT,
    BoxCoder,
    area,
    clip,
    match,
    nms_per_class,
    nonempty,
    pairwise_iou,
    regression_loss,
    sample_labels,
)


def random_boxes(count: int, seed: int, side: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * side], dim=1)


def iou_of_two(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = width * height
    if overlap <= 0:
        return 0.0
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def test_iou_equals_a_loop() -> None:
    a, b = random_boxes(13, 0), random_boxes(17, 1)
    # Degenerate: a point, a line, two boxes that only touch.
    a = torch.cat([a, torch.tensor([[5.0, 5, 5, 5], [5, 5, 9, 5], [0, 0, 2, 2]])])
    b = torch.cat([b, torch.tensor([[5.0, 5, 5, 5], [2, 0, 4, 2]])])
    expected = torch.tensor([[iou_of_two(x, y) for y in b.tolist()] for x in a.tolist()])
    torch.testing.assert_close(pairwise_iou(a, b), expected, rtol=1e-5, atol=1e-7)
    assert pairwise_iou(a[:0], b).shape == (0, 19)
    assert pairwise_iou(a, b[:0]).shape == (16, 0)


def test_iou_has_the_numbers_of_detectron2s_test() -> None:
    whole = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    parts = torch.tensor(
        [[0.0, 0, 1, 1], [0, 0, 0.5, 1], [0, 0, 1, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0.5, 0.5, 1.5, 1.5]]
    )
    expected = torch.tensor([1.0, 0.5, 0.5, 0.25, 0.25, 0.25 / 1.75]).repeat(2, 1)
    torch.testing.assert_close(pairwise_iou(whole, parts), expected)


def test_clip_and_nonempty() -> None:
    boxes = torch.tensor([[-5.0, -6, 7, 8], [90, 40, 130, 70], [150, 10, 160, 20], [10, 10, 14, 40]])
    clipped = clip(boxes, (50, 100))
    assert clipped.tolist() == [[0, 0, 7, 8], [90, 40, 100, 50], [100, 10, 100, 20], [10, 10, 14, 40]]
    assert nonempty(clipped).tolist() == [True, True, False, True]
    assert nonempty(clipped, 4.0).tolist() == [True, True, False, False]
    assert area(clipped).tolist() == [56, 100, 0, 120]


def decode_one(delta: list[float], box: list[float], weights: tuple[float, ...]) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights))
    x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
    width *= math.exp(min(dw, math.log(1000 / 16)))
    height *= math.exp(min(dh, math.log(1000 / 16)))
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coder_equals_a_loop_and_inverts(weights: tuple[float, ...]) -> None:
    coder = BoxCoder(weights)
    references, targets = random_boxes(40, 2), random_boxes(40, 3)
    deltas = coder.encode(references, targets)
    for delta, box, target in zip(deltas.tolist(), references.tolist(), targets.tolist()):
        width, height = box[2] - box[0], box[3] - box[1]
        assert delta[0] == pytest.approx(
            weights[0] * (target[0] + target[2] - box[0] - box[2]) / 2 / width, rel=1e-4, abs=1e-4
        )
        assert delta[3] == pytest.approx(weights[3] * math.log((target[3] - target[1]) / height), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(coder.decode(deltas, references), targets, rtol=1e-4, atol=1e-3)
    noise = torch.randn(40, 12, generator=torch.Generator().manual_seed(4)) * 3
    expected = [
        [v for k in range(3) for v in decode_one(row[4 * k : 4 * k + 4], box, weights)]
        for row, box in zip(noise.tolist(), references.tolist())
    ]
    torch.testing.assert_close(coder.decode(noise, references), torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_decoded_boxes_grow_by_at_most_1000_over_16() -> None:
    coder = BoxCoder((1.0, 1.0, 2.0, 1.0))
    box = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    grown = coder.decode(torch.tensor([[0.0, 0.0, 1e6, 3.0]]), box)
    assert float(grown[0, 2] - grown[0, 0]) == pytest.approx(1000, rel=1e-5)
    assert float(grown[0, 3] - grown[0, 1]) == pytest.approx(16 * math.exp(3.0), rel=1e-5)
    at_limit = torch.tensor([[0.0, 0.0, 2 * LOG_SCALE_LIMIT, 3.0]])
    torch.testing.assert_close(coder.decode(at_limit, box), grown)
    assert coder.decode(torch.zeros(1, 4, dtype=torch.float16), box).dtype == torch.float32


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_loss_vanishes_on_the_target_and_for_no_regions(kind: str) -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, targets = random_boxes(6, 5), random_boxes(6, 6)
    exact = coder.encode(boxes, targets)
    assert float(regression_loss(coder, boxes, exact, targets, kind, 0.0)) == pytest.approx(0, abs=1e-3)
    assert float(regression_loss(coder, boxes, exact + 1, targets, kind, 0.0)) > 0.1
    none = torch.zeros(0, 4, requires_grad=True)
    loss = regression_loss(coder, boxes[:0], none, targets[:0], kind, 0.0)
    assert loss.item() == 0
    loss.backward()
    assert none.grad is not None


@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_smooth_l1_equals_a_loop(beta: float) -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, targets = random_boxes(9, 7), random_boxes(9, 8)
    deltas = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for row, wanted in zip(deltas.tolist(), coder.encode(boxes, targets).tolist()):
        for difference in (abs(p - t) for p, t in zip(row, wanted)):
            total += 0.5 * difference**2 / beta if difference < beta else difference - 0.5 * beta
    loss = regression_loss(coder, boxes, deltas, targets, "smooth_l1", beta)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_giou_equals_a_loop() -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, targets = random_boxes(9, 9), random_boxes(9, 10)
    total = 0.0
    for a, b in zip(boxes.tolist(), targets.tolist()):
        width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
        hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
        total += 1 - (width * height / union - (hull - union) / hull)
    loss = regression_loss(coder, boxes, torch.zeros(9, 4), targets, "giou", 0.0)
    assert loss.item() == pytest.approx(total, rel=1e-4)


def match_by_loops(
    quality: list[list[float]], thresholds: list[float], labels: list[int], low_quality: bool
) -> tuple[list[int], list[int]]:
    truths, candidates = len(quality), len(quality[0])
    index, label = [], []
    for n in range(candidates):
        column = [quality[m][n] for m in range(truths)]
        best = max(range(truths), key=lambda m: (column[m], -m))
        index.append(best)
        label.append(labels[sum(column[best] >= t for t in thresholds)])
    if low_quality:
        for row in quality:
            for n in range(candidates):
                if row[n] == max(row):
                    label[n] = 1
    return index, label


@pytest.mark.parametrize("low_quality", [True, False])
def test_match_equals_loops(low_quality: bool) -> None:
    generator = torch.Generator().manual_seed(11)
    for _ in range(30):
        truths, candidates = (int(v) for v in torch.randint(1, 12, (2,), generator=generator))
        # Coarse values, so that ties and values on a threshold happen.
        quality = torch.randint(0, 11, (truths, candidates), generator=generator) / 10
        index, label = match(quality, [0.3, 0.7], [0, -1, 1], low_quality)
        # Python compares float64: take the thresholds as float32 holds them.
        thresholds = torch.tensor([0.3, 0.7]).tolist()
        assert (index.tolist(), label.tolist()) == match_by_loops(quality.tolist(), thresholds, [0, -1, 1], low_quality)


def test_match_has_the_numbers_of_detectron2s_test() -> None:
    quality = torch.tensor([[0.15, 0.45, 0.2, 0.6], [0.3, 0.65, 0.05, 0.1], [0.05, 0.4, 0.25, 0.4]])
    index, label = match(quality, [0.3, 0.7], [0, -1, 1], True)
    assert index.tolist() == [1, 1, 2, 0]
    assert label.tolist() == [-1, 1, 0, 1]


def test_low_quality_match_keeps_the_truth_it_overlaps_most() -> None:
    quality = torch.tensor([[0.6, 0.1], [0.65, 0.8]])
    index, label = match(quality, [0.3, 0.7], [0, -1, 1], True)
    assert label.tolist() == [1, 1]  # candidate 0 is the best of truth 0 ...
    assert index.tolist() == [1, 1]  # ... and belongs to truth 1 all the same


def test_match_without_ground_truth_is_background() -> None:
    index, label = match(torch.zeros(0, 5), [0.3, 0.7], [0, -1, 1], True)
    assert index.tolist() == label.tolist() == [0] * 5
    assert label.dtype == torch.int8


@pytest.mark.parametrize(("count", "fraction"), [(20, 0.5), (20, 0.0), (200, 0.25), (4, 1.0)])
def test_sampling_fills_its_quota_and_no_more(count: int, fraction: float) -> None:
    labels = torch.tensor([random.Random(3).choice([-1, 0, 7, 7, 2]) for _ in range(30)] + [7] * 40 + [1] * 12)
    torch.manual_seed(0)
    foreground, background = sample_labels(labels, count, fraction, 7)
    candidates = int(((labels != 7) & (labels != -1)).sum())
    assert len(foreground) == min(candidates, int(count * fraction))
    assert len(background) == min(int((labels == 7).sum()), count - len(foreground))
    assert all(labels[i] not in (-1, 7) for i in foreground)
    assert all(labels[i] == 7 for i in background)
    chosen = foreground.tolist() + background.tolist()
    assert len(set(chosen)) == len(chosen)


def test_sampling_draws_foreground_then_background_from_randperm() -> None:
    labels = torch.tensor([0, 1, 0, -1, 1, 1, 0, 0])
    torch.manual_seed(17)
    foreground, background = sample_labels(labels, 4, 0.5, 0)
    torch.manual_seed(17)
    first, second = torch.randperm(3)[:2], torch.randperm(4)[:2]
    assert foreground.tolist() == torch.tensor([1, 4, 5])[first].tolist()
    assert background.tolist() == torch.tensor([0, 2, 6, 7])[second].tolist()


@pytest.mark.parametrize("count", [0, 1, 60, 1200])
def test_nms_equals_a_greedy_loop(count: int) -> None:
    """1200 boxes take torchvision's class by class path, 60 its shifted coordinates."""
    boxes = random_boxes(count, 12, side=40.0 if count < 100 else 150.0)
    generator = torch.Generator().manual_seed(13)
    scores = torch.randperm(count, generator=generator) / max(1, count)
    classes = torch.randint(0, 3, (count,), generator=generator)
    kept: list[int] = []
    iou = pairwise_iou(boxes, boxes).tolist()
    label = classes.tolist()
    for candidate in scores.argsort(descending=True).tolist():
        if all(label[k] != label[candidate] or iou[k][candidate] <= 0.5 for k in kept):
            kept.append(candidate)
    assert nms_per_class(boxes, scores, classes, 0.5).tolist() == kept
    assert count < 2 or len(kept) < count
