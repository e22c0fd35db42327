"""Small detectors, images and weights that come from closed formulas, the same on every machine.

The parity tests, the recorded golden outputs and the tests of the model share them.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

CLASSES = 5

COMMON = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.PIXEL_STD": [57.0, 58.0, 59.0],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 64,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 150,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 80,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.02,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 12,
    "TEST.DETECTIONS_PER_IMAGE": 20,
}
FPN = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[12], [24], [48], [72], [96]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
}
C4 = {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
}
DC5 = {
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RPN.IN_FEATURES": ["res5"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
}
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    # Small overlaps, so that random boxes are foreground in every stage.
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.2],
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.2, 0.3, 0.4),
}
GN = {
    "MODEL.FPN.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 2,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
}
X = {"MODEL.RESNETS.NUM_GROUPS": 4, "MODEL.RESNETS.STRIDE_IN_1X1": False}
RPN_ONLY = {"MODEL.META_ARCHITECTURE": "ProposalNetwork", "MODEL.MASK_ON": False}
FAST = {"MODEL.LOAD_PROPOSALS": True, "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}
AUGMENTED = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (60, 88), "TEST.AUG.MAX_SIZE": 130}
GN_TRUNK = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.BACKBONE.FREEZE_AT": 0,
}
DEFORM = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}
R18 = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
}
ALL_SYNCBN = {
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}
FULL_WIDTH = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
}


# Last layers whose output must stay small enough to leave something to decide.
GAINS = {"conv2_offset": 0.5, "objectness": 0.3, "anchor_deltas": 0.1, "cls_score": 0.2, "bbox_pred": 0.3}


def configure(cfg: Any, *settings: dict[str, Any]) -> Any:
    """`cfg` (this project's or Detectron2's defaults) as a small detector; later settings win."""
    merged = {key: value for part in (COMMON, *settings) for key, value in part.items()}
    cfg.merge_from_list([item for pair in merged.items() for item in pair])
    return cfg


def hashed(name: str, count: int) -> np.ndarray:
    """`count` float64 numbers in [-1, 1) that look random and follow from `name` by integer arithmetic alone."""
    x = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))
    for _ in range(2):
        x &= np.uint64(0xFFFFFFFF)
        x = (x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B)
    x &= np.uint64(0xFFFFFFFF)
    return (x ^ (x >> np.uint64(16))).astype(np.float64) / 2.0**31 - 1.0


def formula_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter and statistic a value by its name, of a size that keeps activations alive."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = hashed(name, tensor.numel()).reshape(tuple(tensor.shape))
            if "norm." in name:
                centre, spread = {"weight": (0.6, 0.3), "running_var": (1.0, 0.5)}.get(name.rsplit(".", 1)[1], (0, 0.1))
                values = centre + spread * values
            elif tensor.ndim > 1:
                fan_in = tensor[0].numel()
                gain = next((g for key, g in GAINS.items() if key in name), 1.0)
                values = values * (6.0 / fan_in) ** 0.5 * gain
            else:
                values = values * 0.1
            tensor.copy_(torch.from_numpy(values))
    return model


def images(sizes: tuple[tuple[int, int], ...] = ((90, 125), (76, 96))) -> list[torch.Tensor]:
    """uint8 (3, H, W) images: waves, blocks and a little noise."""
    result = []
    for index, (height, width) in enumerate(sizes):
        y, x = np.mgrid[0:height, 0:width]
        noise = hashed(f"image{index}", 3 * height * width).reshape(3, height, width)
        planes = [(x * (3 + c) + y * (5 - c) + index * 40) % 256 // 32 * 32 for c in range(3)]
        pixels = np.stack(planes) + ((x // 17 + y // 13) % 2 * 60)[None] + 20 * noise
        result.append(torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)))
    return result


def objects(index: int) -> tuple[torch.Tensor, torch.Tensor, list[list[np.ndarray]]]:
    """Boxes (N, 4), classes (N,) and triangles of the index-th image."""
    boxes = torch.tensor([[8, 10, 40, 52], [30, 20, 85, 70], [50, 5, 72, 30.5]], dtype=torch.float32)[index:]
    classes = torch.tensor([1, 4, 0])[index:]
    triangles = [[np.array([a, b, c, b, (a + c) / 2, d])] for a, b, c, d in boxes.tolist()]
    return boxes, classes, triangles


def proposals(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (30, 4) and descending logits (30,) of the index-th image, for a detector without an RPN."""
    corners = torch.from_numpy(hashed(f"proposals{index}", 120).reshape(30, 4)).float()
    x0, y0 = 30 * (1 + corners[:, 0]), 25 * (1 + corners[:, 1])
    boxes = torch.stack([x0, y0, x0 + 20 + 15 * (1 + corners[:, 2]), y0 + 15 + 10 * (1 + corners[:, 3])], dim=1)
    return boxes, torch.linspace(3, -2, 30)


def our_batch(train: bool) -> list[dict[str, Any]]:
    """The two images as this project's mapper hands them over, originals of twice their size."""
    from loco_det.annotations.instances import Instances
    from loco_det.annotations.masks import PolygonMasks

    batch = []
    for index, image in enumerate(images()):
        item = {"image": image, "height": 2 * image.shape[1], "width": 2 * image.shape[2] + 1}
        if train:
            boxes, classes, polygons = objects(index)
            item["instances"] = Instances(tuple(image.shape[1:]), boxes, classes, masks=PolygonMasks(polygons))
        boxes, logits = proposals(index)
        item["proposals"] = Instances(tuple(image.shape[1:]), boxes, scores=logits)
        batch.append(item)
    return batch


def detectron2_batch(train: bool) -> list[dict[str, Any]]:
    """The same two images as Detectron2's mapper hands them over."""
    from detectron2.structures import Boxes, Instances, PolygonMasks

    batch = []
    for index, image in enumerate(images()):
        item = {"image": image, "height": 2 * image.shape[1], "width": 2 * image.shape[2] + 1}
        if train:
            boxes, classes, polygons = objects(index)
            item["instances"] = Instances(
                tuple(image.shape[1:]),
                gt_boxes=Boxes(boxes),
                gt_classes=classes,
                gt_masks=PolygonMasks(polygons),
            )
        boxes, logits = proposals(index)
        item["proposals"] = Instances(tuple(image.shape[1:]), proposal_boxes=Boxes(boxes), objectness_logits=logits)
        batch.append(item)
    return batch


def both_losses(cfg: Any) -> tuple[torch.nn.Module, torch.nn.Module, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Build `cfg` by both engines, with the same names and losses; returns our model, theirs, our losses, theirs."""
    from detectron2.utils.events import EventStorage

    from loco_det.detection.engine_d2 import Detectron2Engine
    from loco_det.detection.rcnn import build_model

    theirs = formula_weights(Detectron2Engine().build_model(cfg)).train()
    ours = formula_weights(build_model(cfg)).train()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.manual_seed(1)
    with EventStorage(0):
        their_losses = theirs(detectron2_batch(train=True))
    torch.manual_seed(1)
    our_losses = ours(our_batch(train=True))
    assert {k: v.item() for k, v in our_losses.items()} == {k: v.item() for k, v in their_losses.items()}
    return ours, theirs, our_losses, their_losses


def _solver(steps: int) -> dict[str, Any]:
    return {
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": steps,
        "SOLVER.STEPS": (int(0.6 * steps), int(0.8 * steps)),
        "SOLVER.WARMUP_ITERS": steps // 4,
    }


def detectron2_trace(steps: int, *settings: dict[str, Any]) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """Learning rate and losses of `steps` optimiser steps by Detectron2, and the model after them."""
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as detectron2_model
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils.events import EventStorage

    cfg = configure(detectron2_cfg(), _solver(steps), *settings)
    model = formula_weights(detectron2_model(cfg)).train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    trace = []
    for iteration in range(steps):
        torch.manual_seed(iteration)
        with EventStorage(iteration):
            losses = model(detectron2_batch(train=True))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        trace.append({"lr": optimizer.param_groups[0]["lr"], **{k: v.item() for k, v in losses.items()}})
        optimizer.step()
        scheduler.step()
    return trace, model


def our_trace(steps: int, *settings: dict[str, Any]) -> tuple[list[dict[str, float]], torch.nn.Module]:
    """The same by this project."""
    from loco_det.detection import solver
    from loco_det.detection.keys import get_cfg
    from loco_det.detection.rcnn import build_model

    cfg = configure(get_cfg(), _solver(steps), *settings)
    model = formula_weights(build_model(cfg)).train()
    optimizer = solver.build_optimizer(cfg, model)
    schedule = solver.build_schedule(cfg, optimizer)
    scaler = solver.grad_scaler(cfg, torch.device("cpu"))
    trace = []
    for iteration in range(steps):
        torch.manual_seed(iteration)
        losses = model(our_batch(train=True))
        trace.append({"lr": optimizer.param_groups[0]["lr"], **{k: v.item() for k, v in losses.items()}})
        solver.optimizer_step(cfg, sum(losses.values()), optimizer, scaler)
        schedule.step()
    return trace, model
