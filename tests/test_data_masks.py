"""Masks against slow loops, and against Detectron2's own classes where it is installed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from loco_det.annotations.masks import BitMasks, PolygonMasks, rasterize


def star(rng: np.random.Generator, size: float = 60) -> np.ndarray:
    """A random star-shaped polygon (flat x, y) whose points lie in [0, size]."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    radius = rng.uniform(0.1, 0.5, len(angle)) * size
    return (size / 2 + np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]).reshape(-1)


def inside(x: float, y: float, polygon: np.ndarray) -> tuple[bool, float]:
    """Even-odd rule and the distance to the nearest edge, by a loop over edges."""
    points = polygon.reshape(-1, 2)
    odd, nearest = False, np.inf
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
        if (y0 > y) != (y1 > y) and x < (x1 - x0) * (y - y0) / (y1 - y0) + x0:
            odd = not odd
        edge = np.array([x1 - x0, y1 - y0])
        t = np.clip(np.dot([x - x0, y - y0], edge) / max(np.dot(edge, edge), 1e-12), 0, 1)
        nearest = min(nearest, np.hypot(x - x0 - t * edge[0], y - y0 - t * edge[1]))
    return odd, nearest


def test_rasterized_pixels_away_from_edges_follow_the_even_odd_rule():
    rng = np.random.default_rng(0)
    for _ in range(3):
        polygons = [star(rng, 40), star(rng, 24) + 4]
        mask = rasterize(polygons, 40, 44)
        assert mask.shape == (40, 44)
        checked = 0
        for y in range(40):
            for x in range(44):
                found = [inside(x + 0.5, y + 0.5, p) for p in polygons]
                if min(distance for _, distance in found) > 1:
                    assert mask[y, x] == any(odd for odd, _ in found)
                    checked += 1
        assert checked > 500


def test_polygon_crop_is_the_polygon_moved_to_the_grid_by_hand():
    rng = np.random.default_rng(1)
    for _ in range(20):
        polygon = star(rng)
        x0, y0, w, h = (float(v) for v in rng.uniform([0, 0, 5, 5], [30, 30, 40, 40]).astype(np.float32))
        x0, y0, x1, y1 = (float(np.float32(v)) for v in (x0, y0, x0 + w, y0 + h))
        moved = []
        for x, y in polygon.reshape(-1, 2):
            ratio_x = float(np.float32(28) / np.float32(np.float32(x1) - np.float32(x0)))
            ratio_y = float(np.float32(28) / np.float32(np.float32(y1) - np.float32(y0)))
            moved += [(x - x0) * ratio_x, (y - y0) * ratio_y]
        expected = coco_mask.decode(coco_mask.frPyObjects([moved], 28, 28))[..., 0]
        crop = PolygonMasks([[polygon]]).crop_and_resize(torch.tensor([[x0, y0, x1, y1]]), 28)
        assert crop.dtype == torch.bool
        assert crop.shape == (1, 28, 28)
        np.testing.assert_array_equal(crop[0].numpy(), expected)


@pytest.mark.parametrize(("side", "counted"), [(0.5, 0.5), (0.11, 0.11), (0.05, 0.1), (0.0, 0.1)])
def test_polygon_crops_of_thin_boxes_take_a_tenth_of_a_pixel_for_the_shortest_side(side, counted):
    """Half of the box lies inside the polygon, whose edge stands at x = 8."""
    polygon = np.array([0.0, 0, 8, 0, 8, 20, 0, 20])
    left = 8 - counted / 2
    crop = PolygonMasks([[polygon]]).crop_and_resize(torch.tensor([[left, 4, left + side, 12]]), 28)[0]
    inside = torch.arange(28) + 0.5 < 14
    assert torch.equal(crop, inside.expand(28, 28))


def test_bitmap_crop_on_whole_cells_is_the_majority_of_each_cell():
    rng = np.random.default_rng(2)
    bitmaps = torch.from_numpy(rng.random((3, 32, 48)) < 0.5)
    boxes = torch.tensor([[0, 0, 48, 32], [8, 4, 24, 20], [0, 0, 8, 8]]).float()
    # Each grid cell of side s covers s x s pixels and ROIAlign samples s x s points at the pixels' centres.
    crops = BitMasks(bitmaps).crop_and_resize(boxes, 8)
    for bitmap, (x0, y0, x1, y1), crop in zip(bitmaps.numpy(), boxes.int().tolist(), crops.numpy()):
        for r in range(8):
            for c in range(8):
                h, w = (y1 - y0) // 8, (x1 - x0) // 8
                cell = bitmap[y0 + r * h : y0 + (r + 1) * h, x0 + c * w : x0 + (c + 1) * w]
                assert crop[r, c] == (cell.mean() >= 0.5)


def test_indexing_keeps_polygons_and_bitmaps_in_step():
    rng = np.random.default_rng(3)
    polygons = [[star(rng)], [star(rng), star(rng) + 2], [star(rng)]]
    bits = torch.from_numpy(np.stack([rasterize(p, 64, 64) for p in polygons]))
    boxes = torch.tensor([[0, 0, 64, 64], [10, 10, 50, 50], [5, 20, 61, 44], [0, 0, 30, 30]]).float()
    chosen = torch.tensor([2, 0, 1, 2])
    for masks in (PolygonMasks(polygons), BitMasks(bits)):
        again = masks[chosen]
        assert len(again) == 4
        crops = again.crop_and_resize(boxes, 14)
        for i, k in enumerate(chosen):
            alone = masks[k[None]].crop_and_resize(boxes[i : i + 1], 14)
            assert torch.equal(crops[i], alone[0])
        assert len(masks[torch.tensor([True, False, True])]) == 2
        assert len(masks[torch.tensor([], dtype=torch.int64)]) == 0
        assert masks[torch.tensor([], dtype=torch.int64)].crop_and_resize(boxes[:0], 14).shape == (0, 14, 14)
    assert torch.equal(BitMasks(bits)[chosen].tensor, bits[chosen])
    polygons[0].clear()
    bits[0] = False
    for masks in (PolygonMasks(polygons), BitMasks(bits)):
        assert masks[chosen].nonempty().tolist() == [True, False, True, True]
        assert torch.equal(masks[chosen].bounding_boxes(), masks.bounding_boxes()[chosen])


def test_bounding_boxes_and_empty_masks():
    rng = np.random.default_rng(4)
    polygons = [[star(rng), star(rng) + 3], [], [star(rng)]]
    bits = torch.from_numpy(np.stack([rasterize(p, 64, 80) for p in polygons]))
    assert PolygonMasks(polygons).nonempty().tolist() == [True, False, True]
    assert BitMasks(bits).nonempty().tolist() == [True, False, True]
    for i in (0, 2):
        points = np.concatenate(polygons[i]).reshape(-1, 2).astype(np.float32)
        box = PolygonMasks(polygons).bounding_boxes()[i].numpy()
        np.testing.assert_array_equal(box, [*points.min(0), *points.max(0)])
        rows, columns = np.nonzero(bits[i].numpy())
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert BitMasks(bits).bounding_boxes()[i].tolist() == expected
    assert BitMasks(bits).bounding_boxes()[1].tolist() == [0, 0, 0, 0]
    outside = PolygonMasks([[np.array([-9.0, -8, -3, -8, -3, -2])]])  # Detectron2's boxes reach back to the image
    assert outside.bounding_boxes().tolist() == [[-9, -8, 0, 0]]


@pytest.mark.parametrize("bad", [np.arange(4.0), np.arange(7.0), np.zeros((3, 2))])
def test_what_is_not_a_polygon_is_refused(bad):
    with pytest.raises(ValueError, match="polygon"):
        PolygonMasks([[bad]])


@pytest.mark.detectron2
def test_equal_to_detectron2():
    theirs = pytest.importorskip("detectron2.structures")
    rng = np.random.default_rng(5)
    polygons = [[star(rng) for _ in range(rng.integers(1, 4))] for _ in range(30)]
    start = rng.uniform(-5, 40, (30, 2))
    boxes = torch.from_numpy(np.hstack([start, start + rng.uniform(0, 40, (30, 2))])).float()
    boxes[0, 2:] = boxes[0, :2]  # a box without area
    boxes[1, 2:] = boxes[1, :2] + 0.05  # thinner than the shortest side
    bits = torch.from_numpy(np.stack([rasterize(p, 64, 64) for p in polygons]))
    bits[3] = False
    chosen = torch.from_numpy(rng.integers(0, 30, 30))
    for size in (14, 28):
        expected = theirs.PolygonMasks(polygons)[chosen].crop_and_resize(boxes, size)
        assert torch.equal(PolygonMasks(polygons)[chosen].crop_and_resize(boxes, size), expected)
        expected = theirs.BitMasks(bits[chosen]).crop_and_resize(boxes, size)
        assert torch.equal(BitMasks(bits)[chosen].crop_and_resize(boxes, size), expected)
    assert torch.equal(
        PolygonMasks(polygons).bounding_boxes(), theirs.PolygonMasks(polygons).get_bounding_boxes().tensor
    )
    assert torch.equal(BitMasks(bits).bounding_boxes(), theirs.BitMasks(bits).get_bounding_boxes().tensor)


def test_c9_outlines_too_long_for_cocos_rasteriser_are_filled_by_the_even_odd_rule(monkeypatch):
    rng = np.random.default_rng(1)
    monkeypatch.setattr("loco_det.annotations.segmentation.LONGEST", 10)
    far = np.array([-90.0, 5, 400, 20, 3, 300])
    for polygons in ([star(rng, 40), star(rng, 24) + 4], [star(rng, 40)], [far]):
        found = rasterize(polygons, 40, 44)
        assert found.dtype == bool
        for y, x in itertools.product(range(40), range(44)):
            places = [inside(x + 0.5, y + 0.5, polygon) for polygon in polygons]
            if min(distance for _, distance in places) > 1.5:
                assert found[y, x] == any(odd for odd, _ in places)


def test_c9_a_zigzag_that_fits_its_image_is_drawn_when_it_is_scaled_up():
    zigzag = np.stack([np.tile([0.0, 59.0], 8000), np.linspace(0, 59, 16000)], 1).reshape(-1)  # 944,000 pixels long
    masks = PolygonMasks([[zigzag]])
    assert rasterize([zigzag * 2000], 800, 800).shape == (800, 800)  # it would take COCO's rasteriser 375 GB
    crops = masks.crop_and_resize(torch.tensor([[30.0, 30, 30.05, 30.05]]), 28)
    assert crops.shape == (1, 28, 28)
