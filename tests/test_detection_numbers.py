"""The numbers that Detectron2's own unit tests state hold here; each test names the file that states them.

Numbers that depend on random draws assume, as there, that torch's generator gives the same stream for ever. Anchors,
IoU, matching, RPN and box branch have theirs in the test files of those parts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from loco_det.annotations.instances import Instances
from loco_det.annotations.loader import repeat_factors
from loco_det.annotations.mapper import move_boxes
from loco_det.annotations.masks import BitMasks, PolygonMasks, rasterize
from loco_det.annotations.transforms import Crop, Flip
from loco_det.backbones.resnet import Conv2d
from loco_det.detection import solver
from loco_det.detection.boxes import BoxCoder, regression_loss
from loco_det.detection.deformable import DeformConv2d
from loco_det.detection.fast_rcnn import BoxPredictor
from loco_det.detection.fpn import build_backbone
from loco_det.detection.keys import get_cfg
from loco_det.detection.masks import paste_masks
from loco_det.detection.poolers import RoiPooler
from loco_det.detection.roi_heads import StandardROIHeads
from loco_det.detection.rpn import RPN


def test_roi_heads_losses() -> None:
    """tests/modeling/test_roi_heads.py, test_roi_heads."""
    torch.manual_seed(121)
    cfg = get_cfg()
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
    cfg.MODEL.MASK_ON = True
    torch.rand(2, 20, 30)
    features = {"res4": torch.rand(2, 1024, 1, 2)}
    truth = [([[1, 1, 3, 3], [2, 2, 6, 6]], [2, 1]), ([[1, 5, 2, 8], [7, 3, 10, 5]], [1, 2])]
    targets = [
        Instances((15, 15), torch.tensor(b).float(), torch.tensor(c), masks=BitMasks(torch.rand(2, 15, 15) > 0.5))
        for b, c in truth
    ]
    rpn = RPN(cfg, {"res4": 1024}, {"res4": 16})
    heads = StandardROIHeads(cfg, {"res4": 1024}, {"res4": 16})
    with torch.no_grad():
        proposals, losses = rpn(features, [(10, 10), (20, 30)], targets)
        losses.update(heads(features, proposals, targets))
    expected = {
        "loss_cls": 4.5253729820251465,
        "loss_box_reg": 0.009785720147192478,
        "loss_mask": 0.693184494972229,
        "loss_rpn_cls": 0.08186662942171097,
        "loss_rpn_loc": 0.1104838103055954,
    }
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_rpn_keeps_the_width_where_none_is_given() -> None:
    """tests/modeling/test_rpn.py, test_rpn_conv_dims_not_set."""
    cfg = get_cfg()
    cfg.MODEL.RPN.CONV_DIMS = [-1, -1, -1]
    rpn = RPN(cfg, {"res4": 1024}, {"res4": 16})
    assert [conv.out_channels for conv in rpn.rpn_head.conv] == [1024, 1024, 1024]


def test_infinite_scores_leave_the_other_proposals() -> None:
    """tests/modeling/test_rpn.py, test_find_rpn_proposals_inf."""
    cfg = get_cfg()
    rpn = RPN(cfg, {"res4": 8}, {"res4": 16}).eval()
    anchors = rpn.anchor_generator([(3, 3)])
    logits, deltas = torch.rand(3, len(anchors[0])), torch.rand(3, len(anchors[0]), 4)
    logits[1][3:5] = float("inf")
    found = rpn._propose(anchors, [logits], [deltas], [(100, 100)] * 3)
    assert all(len(one) > 0 and torch.isfinite(one.scores).all() for one in found)


def test_no_regions_have_no_loss_and_a_gradient() -> None:
    """tests/modeling/test_fast_rcnn.py, test_fast_rcnn_empty_batch."""
    predictor = BoxPredictor(get_cfg(), 10)
    scores, deltas = torch.randn(0, 81, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    empty = torch.zeros(0, 4)
    losses = predictor.losses(scores, deltas, empty, torch.zeros(0, dtype=torch.int64), empty)
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert scores.grad is not None
    assert deltas.grad is not None


@pytest.mark.parametrize(
    ("kind", "half", "total"), [("diou", 0.53125, 1.78125), ("ciou", 0.5345, 1.7845)], ids=["diou", "ciou"]
)
def test_distance_losses(kind: str, half: float, total: float) -> None:
    """tests/layers/test_losses.py: equal boxes, half a box inside the other, two that touch at a corner."""
    boxes = torch.tensor([[-1.0, -1, 1, 1], [-1, -1, 1, 1], [0, 0, 1, 1]])
    targets = torch.tensor([[-1.0, -1, 1, 1], [0, -1, 1, 1], [1, 1, 2, 2]])
    coder, none = BoxCoder((1, 1, 1, 1)), torch.zeros(1, 4)
    losses = [regression_loss(coder, b[None], none, t[None], kind, 0.0).item() for b, t in zip(boxes, targets)]
    assert losses == pytest.approx([0, half, 1.25], rel=1e-5, abs=1e-5)
    assert regression_loss(coder, boxes, none.repeat(3, 1), targets, kind, 0.0).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("kind", "first"), [("ROIAlign", 7.5), ("ROIAlignV2", 4.5)])
def test_region_pooling(kind: str, first: float, fast: bool) -> None:
    """tests/layers/test_roi_align.py, test_forward_output: with and without the half-pixel correction."""
    image = torch.arange(25.0).reshape(1, 1, 5, 5)
    pooler = RoiPooler(4, [1], 0, kind)
    pooler.fast = fast
    pooled = pooler([image], [torch.tensor([[1.0, 1, 3, 3]])])
    expected = first + 2.5 * torch.arange(4.0)[:, None] + 0.5 * torch.arange(4.0)
    torch.testing.assert_close(pooled[0, 0], expected)


def test_pooling_an_empty_region_and_no_image() -> None:
    """tests/layers/test_roi_align.py, test_empty_box and test_empty_batch."""
    image = torch.rand(1, 1, 5, 5, requires_grad=True)
    pooled = RoiPooler(7, [1], 0, "ROIAlignV2")([image], [torch.tensor([[3.0, 4, 5, 4]])])
    assert pooled.shape == (1, 1, 7, 7)
    assert not pooled.any()
    pooled.sum().backward()
    assert not image.grad.any()
    assert RoiPooler(7, [1], 0, "ROIAlignV2")([torch.zeros(0, 3, 10, 10)], [torch.zeros(0, 4)]).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("undefined", [math.inf, math.nan])
def test_undefined_features_have_no_detections(undefined: float) -> None:
    """tests/modeling/test_model_e2e.py, test_roiheads_inf_nan_data."""
    cfg = get_cfg()
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.MASK_ON = "FastRCNNConvFCHead", 2, True
    heads = StandardROIHeads(cfg, {"res4": 256}, {"res4": 16}).eval()
    features = {"res4": torch.full((1, 256, 32, 32), undefined)}
    proposals = [Instances((510, 510), torch.tensor([[10.0, 10, 20, 20]]), scores=torch.ones(1))]
    with torch.no_grad():
        found = heads(features, proposals)
        heads.predict_masks(features, found)
    assert [len(one) for one in found] == [0]


def test_a_backbone_ends_with_the_last_stage_that_is_asked_for() -> None:
    """tests/layers/test_blocks.py, test_resnet_unused_stages."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    for stages, there in ((["res2"], "2"), (["res2", "res5"], "2345")):
        cfg.MODEL.RESNETS.OUT_FEATURES = stages
        assert [n for n in "2345" if hasattr(build_backbone(cfg), f"res{n}")] == list(there)


def test_a_deformable_convolution() -> None:
    """tests/layers/test_deformable.py, test_forward_output_on_cpu: every point half a pixel further."""
    layer = DeformConv2d(Conv2d(1, 1, 3, "FrozenBN"))
    torch.nn.init.ones_(layer.weight)
    layer.norm = torch.nn.Identity()
    found = layer(torch.arange(25.0).reshape(1, 1, 5, 5), torch.full((1, 18, 5, 5), 0.5))
    expected = [
        [30, 41.25, 48.75, 45, 28.75],
        [62.25, 81, 90, 80.25, 50.25],
        [99.75, 126, 135, 117.75, 72.75],
        [105, 131.25, 138.75, 120, 73.75],
        [71.75, 89.25, 93.75, 80.75, 49.5],
    ]
    torch.testing.assert_close(found[0, 0], torch.tensor(expected))


def test_pasting_undoes_cropping(real_coco: Path) -> None:
    """tests/layers/test_mask_ops.py, test_crop_paste_consistency: the first 100 objects of real images."""
    truth = json.loads((real_coco / "coco" / "annotations" / "instances_val2017.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    overlaps: dict[type, list[float]] = {PolygonMasks: [], BitMasks: []}
    for item in [item for item in truth["annotations"] if not item["iscrowd"]][:100]:
        size, (x, y, w, h) = sizes[item["image_id"]], item["bbox"]
        polygons = [np.array(polygon, dtype=np.float64) for polygon in item["segmentation"]]
        box, whole = torch.tensor([[x, y, x + w, y + h]]), torch.from_numpy(rasterize(polygons, *size)).bool()
        for masks in (PolygonMasks([polygons]), BitMasks(whole[None])):
            (pasted,) = paste_masks(masks.crop_and_resize(box, 28).float(), box, size)
            overlaps[type(masks)].append(((pasted & whole).sum() / (pasted | whole).sum()).item())
    assert np.mean(overlaps[PolygonMasks]) > 0.94
    assert np.mean(overlaps[BitMasks]) > 0.95


def test_boxes_round_masks() -> None:
    """tests/structures/test_masks.py, test_get_bounding_box."""
    first = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]])
    second = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    masks = torch.stack([first, second, torch.zeros(4, 4, dtype=torch.int64)]).bool()
    expected = [[1, 0, 4, 4], [1, 1, 3, 4], [0, 0, 0, 0]]
    assert BitMasks(masks).bounding_boxes().tolist() == expected
    for x0, y0, x1, y1 in expected[:2]:
        corners = [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]
        assert PolygonMasks([corners]).bounding_boxes().tolist() == [[x0, y0, x1, y1]]
        drawn = torch.from_numpy(rasterize(corners, 4, 4)).bool()
        assert BitMasks(drawn[None]).bounding_boxes().tolist() == [[x0, y0, x1, y1]]


def test_flipped_and_cropped_annotations() -> None:
    """tests/data/test_detection_utils.py, test_transform_simple_annotation and test_crop."""
    box = np.array([[10.0, 10, 200, 300]])
    assert move_boxes(box, [Flip(1, 400)], (400, 400)).tolist() == [[200, 10, 390, 300]]
    polygon = np.array([10.0, 10, 100, 100, 100, 10])
    assert Flip(1, 400).polygons([polygon])[0].tolist() == [390, 10, 300, 100, 300, 10]
    assert move_boxes(np.array([[10.0, 10, 200, 400]]), [Crop(300, 300, 10, 10)], (10, 10)).tolist() == [[0, 0, 0, 10]]


def schedule(name: str, **changes: float) -> list[float]:
    """The learning rate at the start and after each of 30 steps."""
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = name, 5.0, 30
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = (10, 15, 20), 5, 0.001
    cfg.merge_from_list([item for pair in changes.items() for item in (f"SOLVER.{pair[0]}", pair[1])])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5.0)
    multiplied = solver.build_schedule(cfg, optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(30):
        multiplied.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_schedules() -> None:
    """tests/test_scheduler.py, test_warmup_multistep and test_warmup_cosine."""
    steps = [0.005, 1.004, 2.003, 3.002, 4.001] + [5.0] * 5 + [0.5] * 5 + [0.05] * 5 + [0.005] * 11
    assert schedule("WarmupMultiStepLR") == pytest.approx(steps)
    cosine = schedule("WarmupCosineLR")
    assert cosine[0] == pytest.approx(0.005)
    assert cosine[5:30] == pytest.approx([2.5 * (1 + math.cos(math.pi * i / 30)) for i in range(5, 30)])


def test_repeat_factors() -> None:
    """tests/data/test_sampler.py, test_repeat_factors_from_category_frequency."""
    found = repeat_factors(np.array([0, 0, 1]), np.array([0, 1, 0]), 3, 0.5, True)
    torch.testing.assert_close(found, torch.tensor([math.sqrt(3 / 2), 1.0, 1.0]))
