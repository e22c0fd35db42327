"""Anchors and region pooling against loops, and against the numbers in Detectron2's own unit tests."""

from __future__ import annotations

import math

import pytest
import torch

from loco_det.core.errors import UserError
from loco_det.detection.anchors import AnchorGenerator, cell_anchors, spread_over_levels
from loco_det.detection.poolers import RoiPooler, assign_levels


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3])
def test_anchors_equal_a_loop(offset: float) -> None:
    sizes, ratios, strides = [[32, 50], [64, 90]], [[0.5, 1.0, 2.0], [0.5, 1.0, 2.0]], [8, 16]
    grids = [(5, 7), (3, 4)]
    levels = AnchorGenerator(sizes, ratios, strides, offset)(grids)
    for level, (height, width) in enumerate(grids):
        expected = []
        for row in range(height):
            for column in range(width):
                x, y = (column + offset) * strides[level], (row + offset) * strides[level]
                for size in sizes[level]:
                    for ratio in ratios[level]:
                        w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
                        expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        torch.testing.assert_close(levels[level], torch.tensor(expected), rtol=1e-6, atol=1e-4)


def test_anchors_have_the_numbers_of_detectron2s_test() -> None:
    generator = AnchorGenerator([[32, 64]], [[0.25, 1, 4]], [4], 0.0)
    first = [
        [-32, -8, 32, 8],
        [-16, -16, 16, 16],
        [-8, -32, 8, 32],
        [-64, -16, 64, 16],
        [-32, -32, 32, 32],
        [-16, -64, 16, 64],
    ]
    expected = torch.tensor(first + [[a + 4, b, c + 4, d] for a, b, c, d in first], dtype=torch.float32)
    assert torch.equal(generator([(1, 2)])[0], expected)
    assert torch.equal(AnchorGenerator([[32, 64]], [[0.25, 1, 4]], [4], 0.5)([(1, 2)])[0], expected + 2)


def test_anchors_are_no_part_of_a_checkpoint() -> None:
    generator = AnchorGenerator([[32]], [[1.0]], [4], 0.0)
    assert not generator.state_dict()
    assert len(generator.cells()) == 1
    assert cell_anchors([10], [1.0]).tolist() == [[-5, -5, 5, 5]]


def test_lists_spread_over_levels() -> None:
    assert spread_over_levels([32, 64], 2, "KEY") == [[32, 64], [32, 64]]
    assert spread_over_levels([[32, 64]], 3, "KEY") == [[32, 64]] * 3
    assert spread_over_levels([[32], [64]], 2, "KEY") == [[32], [64]]
    for bad in ([[32], [64]], [], "32"):
        with pytest.raises(UserError, match="KEY"):
            spread_over_levels(bad, 3, "KEY")


def test_levels_equal_a_loop_and_change_at_powers_of_two() -> None:
    sides = [1.0, 20.0, 111.99, 112.01, 223.9, 224.1, 447.9, 448.1, 895.0, 897.0, 5000.0]
    boxes = torch.tensor([[10.0, 20.0, 10 + s, 20 + s] for s in sides])
    expected = [min(5, max(2, math.floor(4 + math.log2(side / 224)))) for side in sides]
    assert assign_levels(boxes, 2, 5).tolist() == expected
    # Of shape only the area counts: 448 x 112 is 224 squared; a box without area goes to the finest level.
    assert assign_levels(torch.tensor([[0.0, 0, 448.1, 112.1], [5, 5, 5, 5]]), 2, 5).tolist() == [4, 2]


def test_pooling_from_a_pyramid_equals_pooling_each_box_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    strides = [4, 8, 16, 32]
    features = [torch.randn(2, 3, 512 // s, 640 // s, generator=generator) for s in strides]
    corner = torch.rand(2, 12, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 5 + torch.rand(2, 12, 2, generator=generator) ** 3 * 500], dim=2)
    pooled = RoiPooler(7, strides, 0, "ROIAlignV2")(features, list(boxes))
    levels = [assign_levels(image, 2, 5) - 2 for image in boxes]
    assert len(torch.cat(levels).unique()) > 2
    for image in range(2):
        for number in range(12):
            level = int(levels[image][number])
            alone = RoiPooler(7, [strides[level]], 0, "ROIAlignV2")(
                [features[level][image : image + 1]], [boxes[image, number][None]]
            )
            assert torch.equal(pooled[image * 12 + number], alone[0])


def test_pooling_no_regions_gives_none_and_keeps_the_gradient() -> None:
    features = [torch.ones(1, 3, 16, 16, requires_grad=True), torch.ones(1, 3, 8, 8, requires_grad=True)]
    pooled = RoiPooler(7, [4, 8], 0, "ROIAlignV2")(features, [torch.zeros(0, 4)])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert features[0].grad is not None


def test_strides_that_are_no_pyramid_are_refused() -> None:
    for strides in ([4, 16], [8, 4], [6]):
        with pytest.raises(UserError, match=r"MODEL\.ROI_HEADS\.IN_FEATURES"):
            RoiPooler(7, strides, 0, "ROIAlignV2")
