"""Mask loss and pasting against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loco_det.annotations.masks import BitMasks, PolygonMasks
from loco_det.detection.masks import (
    _paste_in_chunks,
    _paste_near_boxes,
    logits_of_classes,
    mask_loss,
    paste_masks,
)


def soft_pixel(mask: list[list[float]], box: list[float], x: int, y: int) -> float:
    """Bilinear value of the mask at the centre of image pixel (x, y); zero beyond the mask's outer cells."""
    side = len(mask)
    u = (x + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
    v = (y + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
    value = 0.0
    for row in (math.floor(v), math.floor(v) + 1):
        for column in (math.floor(u), math.floor(u) + 1):
            if 0 <= row < side and 0 <= column < side:
                value += mask[row][column] * (1 - abs(v - row)) * (1 - abs(u - column))
    return value


def cases() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(5, 6, 6, generator=generator)
    boxes = torch.tensor(
        [[3.2, 4.1, 15.7, 18.3], [0, 0, 30, 22], [-4.5, 10, 5.5, 27.5], [10.4, 3.3, 10.9, 4.1], [20, 2, 29.99, 3]]
    )
    return masks, boxes


def test_pasting_equals_a_loop_over_pixels() -> None:
    masks, boxes = cases()
    pasted = paste_masks(masks, boxes, (22, 30))
    assert pasted.dtype == torch.bool
    assert pasted.shape == (5, 22, 30)
    checked = 0
    for mask, box, result in zip(masks.tolist(), boxes.tolist(), pasted.tolist()):
        for y in range(22):
            for x in range(30):
                value = soft_pixel(mask, box, x, y)
                if abs(value - 0.5) > 1e-4:  # float32 may round a value on the threshold either way
                    assert result[y][x] == (value >= 0.5), (x, y, value)
                    checked += result[y][x]
    assert checked > 100


def test_a_full_mask_fills_its_box_to_within_half_a_cell() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 5.0, 38.0, 33.0]]), (50, 60))[0]
    expected = torch.zeros(50, 60, dtype=torch.bool)
    expected[5:33, 10:38] = True
    assert torch.equal(pasted, expected)


def test_both_ways_of_pasting_agree() -> None:
    masks, boxes = cases()
    near = _paste_near_boxes(masks, boxes, (22, 30), 0.5)
    for pixels in (1, 1500, 10**6):
        assert torch.equal(_paste_in_chunks(masks, boxes, (22, 30), 0.5, pixels), near)


def test_pasting_nothing() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (7, 9)).shape == (0, 7, 9)


def test_mask_loss_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, 8, 8, generator=generator)
    classes = torch.tensor([2, 0, 1, 1, 2])
    triangle, square = np.array([2.0, 2, 20, 3, 11, 21]), np.array([5.0, 5, 25, 5, 25, 25, 5, 25])
    polygons = PolygonMasks([[triangle], [square], [triangle, square]])
    bits = BitMasks(torch.rand(2, 30, 40, generator=generator) > 0.5)
    boxes = [torch.tensor([[1.0, 1, 20, 22], [4, 6, 26, 24], [0, 0, 25, 25]]), torch.tensor([[3.0, 3, 30, 20]] * 2)]
    total, count = 0.0, 0
    regions = [(polygons, boxes[0], i) for i in range(3)] + [(bits, boxes[1], i) for i in range(2)]
    for logit, label, (masks, image_boxes, index) in zip(logits, classes.tolist(), regions):
        chosen = torch.tensor([index])
        target = masks[chosen].crop_and_resize(image_boxes[chosen], 8)[0].tolist()
        for y in range(8):
            for x in range(8):
                z = float(logit[label, y, x])
                total += math.log1p(math.exp(-z)) + (0.0 if target[y][x] else z)
                count += 1
    loss = mask_loss(logits_of_classes(logits, classes), [polygons, bits], boxes)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_an_image_without_foreground_takes_no_part() -> None:
    square = np.array([5.0, 5, 25, 5, 25, 25, 5, 25])
    logits = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2))
    masks, box, none = PolygonMasks([[square]]), torch.tensor([[4.0, 4, 26, 24]]), torch.zeros(0, 4)
    alone = mask_loss(logits, [masks], [box])
    assert torch.equal(mask_loss(logits, [None, masks], [none, box]), alone)


def test_no_foreground_at_all_gives_zero_with_a_gradient() -> None:
    logits = torch.zeros(0, 8, 8, requires_grad=True)
    loss = mask_loss(logits, [None], [torch.zeros(0, 4)])
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None


def test_class_agnostic_logits_serve_every_class() -> None:
    logits = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 2, 2)
    classes = torch.tensor([2, 0])
    assert torch.equal(logits_of_classes(logits, classes), torch.stack([logits[0, 2], logits[1, 0]]))
    assert torch.equal(logits_of_classes(logits[:, :1], classes), logits[:, 0])
