"""Faster and Mask R-CNN: normalise and pad images, backbone, proposals, heads, detections in the original image.

Shape legend: B images; image i is (3, Hi, Wi), the padded batch (B, 3, H, W).
Source: detectron2/modeling/meta_arch/rcnn.py and postprocessing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.detection.boxes import clip, nonempty
from loco_det.detection.fpn import build_backbone
from loco_det.detection.honoured import check_model_keys
from loco_det.detection.masks import paste_masks
from loco_det.detection.cascade import build_roi_heads
from loco_det.detection.rpn import RPN
from loco_det.errors import UserError
from loco_det.structures import Instances


class GeneralizedRCNN(nn.Module):
    """A two-stage detector with Detectron2's parameter names, arithmetic and losses."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        shapes = self.backbone.channels, self.backbone.strides
        known = list(self.backbone.channels)
        for key in ("RPN", "ROI_HEADS"):
            names = list(cfg.MODEL[key].IN_FEATURES)
            if not names or any(name not in known for name in names):
                raise UserError(f"MODEL.{key}.IN_FEATURES {names} must be features of the backbone: {', '.join(known)}")
        self.proposal_generator = RPN(cfg, *shapes)
        self.roi_heads = build_roi_heads(cfg, *shapes)
        # Not persistent: Detectron2's checkpoints do not hold them.
        for name in ("pixel_mean", "pixel_std"):
            value = torch.tensor(cfg.MODEL[name.upper()], dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def forward(self, batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor] | list[Instances]:
        """Losses in training, detections otherwise.

        Args:
            batch: one dict an image as the mapper makes them: `image` uint8 (3, Hi, Wi) in INPUT.FORMAT order,
                `height` and `width` of the original image, and in training `instances` with boxes, classes and,
                for Mask R-CNN, masks, in the coordinates of `image`.

        Returns:
            In training {loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg[, loss_mask]}, 0-dim tensors.
            Otherwise one Instances an image, in the original image's pixels: boxes, scores (descending), classes
            and, for Mask R-CNN, masks (N, height, width) bool.
        """
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)
        targets = [item["instances"].to(images.device) for item in batch] if self.training else None
        proposals, losses = self.proposal_generator(features, sizes, targets)
        detections, head_losses = self.roi_heads(features, proposals, targets)
        if self.training:
            return {**head_losses, **losses}
        return [
            postprocess(detection, item.get("height", size[0]), item.get("width", size[1]))
            for detection, item, size in zip(detections, batch, sizes)
        ]

    def preprocess(self, batch: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Normalised float32 images padded at the right and below with zeros to one size, and their own (Hi, Wi)."""
        device = self.pixel_mean.device
        images = [(item["image"].to(device) - self.pixel_mean) / self.pixel_std for item in batch]
        sizes = [tuple(image.shape[-2:]) for image in images]
        unit = max(self.backbone.size_divisibility, 1)
        height, width = (-(-max(lengths) // unit) * unit for lengths in zip(*sizes))
        padded = images[0].new_zeros((len(images), images[0].shape[0], height, width))
        for row, image, size in zip(padded, images, sizes):
            row[:, : size[0], : size[1]] = image
        return padded, sizes


def postprocess(detections: Instances, height: int, width: int) -> Instances:
    """Carries detections from the network's input to an image of `height` x `width` and pastes their masks.

    Args:
        detections: of one image; `masks`, if any, (N, M, M) float probabilities.

    Returns:
        Boxes scaled and limited to the image, empty ones dropped; masks (N, height, width) bool.
    """
    scale_y, scale_x = height / detections.image_size[0], width / detections.image_size[1]
    boxes = detections.boxes.clone()
    boxes[:, 0::2] *= scale_x
    boxes[:, 1::2] *= scale_y
    boxes = clip(boxes, (height, width))
    keep = nonempty(boxes)
    masks = detections.masks
    return Instances(
        (height, width),
        boxes=boxes[keep],
        classes=detections.classes[keep],
        scores=detections.scores[keep],
        masks=None if masks is None else paste_masks(masks[keep], boxes[keep], (height, width)),
    )


def build_model(cfg: CfgNode) -> GeneralizedRCNN:
    """The detector that a config with Detectron2's keys describes, freshly initialised, on the CPU, in training mode.

    Raises:
        UserError: if a key asks for something that this engine does not have; names key and value.
    """
    check_model_keys(cfg)
    if len(cfg.MODEL.PIXEL_MEAN) != 3 or len(cfg.MODEL.PIXEL_STD) != 3 or 0 in list(cfg.MODEL.PIXEL_STD):
        raise UserError("MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be three numbers, PIXEL_STD without zeros")
    return GeneralizedRCNN(cfg)
