"""The mask branch: a small fully convolutional head, its loss, and pasting masks into the image.

Shape legend: R regions, K classes (1 if class-agnostic), S pooled side, M = 2S mask side, H x W image pixels.
Source: Mask R-CNN section 3; detectron2/modeling/roi_heads/mask_head.py and layers/mask_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.masks import PolygonMasks
from loco_det.detection.cpu_speed import logits_of_own_class
from loco_det.detection.layers import Conv, c2_msra_fill, run_convs

# Pixels sampled at once when masks are pasted together, on a GPU: 1 GiB of float32.
PASTE_PIXELS = 2**28


class MaskHead(nn.Module):
    """(R, C, S, S) pooled regions and their classes (R,) in [0, K) -> (R, M, M) logits of each region's class."""

    fast = False  # compute the logits of the region's own class only

    def __init__(self, cfg: CfgNode, channels: int) -> None:
        super().__init__()
        head = cfg.MODEL.ROI_MASK_HEAD
        self.convs = []
        for index in range(head.NUM_CONV):
            self.add_module(f"mask_fcn{index + 1}", Conv(channels, head.CONV_DIM, 3, head.NORM, relu=True))
            self.convs.append(f"mask_fcn{index + 1}")
            channels = head.CONV_DIM
        self.deconv = nn.ConvTranspose2d(channels, head.CONV_DIM, 2, stride=2)
        classes = 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.predictor = nn.Conv2d(head.CONV_DIM, classes, 1)
        for name in [*self.convs, "deconv"]:  # after all layers, so that a seed gives Detectron2's weights
            c2_msra_fill(getattr(self, name))
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        x = run_convs((getattr(self, name) for name in self.convs), x)
        if self.fast:
            return logits_of_own_class(self.deconv, self.predictor, x, classes)
        return logits_of_classes(self.predictor(F.relu_(self.deconv(x))), classes)


def logits_of_classes(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Select (R, M, M): the mask of each region's class, or the class-agnostic one."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(logits.shape[0], device=logits.device), classes]  # len() is a constant in a trace


def mask_loss(logits: torch.Tensor, masks: Sequence[Any], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean binary cross-entropy over all pixels of all foreground regions; 0 with a gradient if there are none.

    Args:
        logits: (R, M, M), of each region's class.
        masks: per image its Ri ground-truth masks, one per region (`PolygonMasks` or `BitMasks`).
        boxes: per image its regions (Ri, 4); a target is the mask cropped to the region.
    """
    if not len(logits):
        return logits.sum() * 0
    if isinstance(next(m for m, b in zip(masks, boxes) if len(b)), PolygonMasks):  # rasterised on the host
        boxes = torch.cat(list(boxes)).cpu().split([len(b) for b in boxes])
    cropped = [m.crop_and_resize(b, logits.shape[-1]) for m, b in zip(masks, boxes) if len(b)]
    targets = torch.cat(cropped).to(logits.device, non_blocking=True).float()
    return F.binary_cross_entropy_with_logits(logits, targets)


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> torch.Tensor:
    """Resize each mask to its box and threshold it.

    Args:
        masks: (R, M, M) float probabilities.
        boxes: (R, 4) in the image's pixels.
        image_size: (H, W).

    Returns:
        (R, H, W) bool.
    """
    if masks.device.type == "cpu":
        return _paste_near_boxes(masks, boxes, image_size, threshold)
    return _paste_in_chunks(masks, boxes, image_size, threshold, PASTE_PIXELS)


def _paste_near_boxes(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float
) -> torch.Tensor:
    """Paste one mask at a time, and only around its box: on a CPU every pixel takes time."""
    height, width = image_size
    result = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    for index, box in enumerate(boxes):
        x0, y0 = (int(v) for v in (box[:2].floor() - 1).clamp(min=0))
        x1, y1 = min(int(box[2].ceil()) + 1, width), min(int(box[3].ceil()) + 1, height)
        soft = _sample(masks[index : index + 1], box[None], (y0, y1), (x0, x1))
        result[index, y0:y1, x0:x1] = soft[0] >= threshold
    return result


def _paste_in_chunks(
    masks: torch.Tensor, boxes: torch.Tensor, image_size: tuple[int, int], threshold: float, pixels: int
) -> torch.Tensor:
    """Paste many masks at once, into at most `pixels` pixels: on a GPU every call takes time."""
    height, width = image_size
    result = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    step = max(1, pixels // max(1, height * width))
    for start in range(0, len(masks), step):
        part = slice(start, start + step)
        result[part] = _sample(masks[part], boxes[part], (0, height), (0, width)) >= threshold
    return result


def _sample(masks: torch.Tensor, boxes: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> torch.Tensor:
    """Return (R, rows, columns) bilinear samples at pixel centres, zero outside the mask."""
    y = torch.arange(*rows, device=masks.device, dtype=torch.float32) + 0.5
    x = torch.arange(*columns, device=masks.device, dtype=torch.float32) + 0.5
    x0, y0, x1, y1 = boxes.split(1, dim=1)
    y = (y - y0) / (y1 - y0) * 2 - 1
    x = (x - x0) / (x1 - x0) * 2 - 1
    shape = (len(masks), y.shape[1], x.shape[1])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(masks[:, None], grid.to(masks.dtype), align_corners=False)[:, 0]
