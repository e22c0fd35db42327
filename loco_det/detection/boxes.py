"""Arithmetic on boxes: overlap, the R-CNN box code, matching, sampling, suppression.

Shape legend: boxes are (N, 4) float32 XYXY in pixels; M ground-truth boxes, K classes.
Every formula rounds exactly as Detectron2's does, so do not reorder the operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torchvision
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss

from loco_det.detection.layers import giou_loss, smooth_l1_loss

# Predicted log-scales are clamped so that a 16 px box does not exceed 1000 px (Detectron's choice).
LOG_SCALE_LIMIT = math.log(1000.0 / 16)

BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")


def area(boxes: torch.Tensor) -> torch.Tensor:
    """(N,) areas in square pixels; negative or zero for degenerate boxes."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def clip(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """(N, 4) boxes with x limited to [0, W] and y to [0, H], where `image_size` is (H, W)."""
    height, width = image_size
    x = boxes[:, 0::2].clamp(min=0, max=width)
    y = boxes[:, 1::2].clamp(min=0, max=height)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def nonempty(boxes: torch.Tensor, min_side: float = 0.0) -> torch.Tensor:
    """(N,) bool: both sides are longer than `min_side` pixels."""
    return (boxes[:, 2] - boxes[:, 0] > min_side) & (boxes[:, 3] - boxes[:, 1] > min_side)


def pairwise_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every box of `a` (M, 4) with every box of `b` (N, 4): (M, N), 0 for empty ones."""
    width = torch.min(a[:, None, 2], b[:, 2]) - torch.max(a[:, None, 0], b[:, 0])
    height = torch.min(a[:, None, 3], b[:, 3]) - torch.max(a[:, None, 1], b[:, 1])
    overlap = width.clamp_(min=0).mul_(height.clamp_(min=0))
    union = area(a)[:, None] + area(b) - overlap
    return torch.where(overlap > 0, overlap / union, overlap.new_zeros(()))


class BoxCoder:
    """Deltas (dx, dy, dw, dh) between a reference box and a target box.

    Source: R-CNN appendix C; detectron2/modeling/box_regression.py `Box2BoxTransform`.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = tuple(float(w) for w in weights)

    def encode(self, references: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return (N, 4) deltas from `references` (N, 4) to `targets` (N, 4)."""
        width, height = references[:, 2] - references[:, 0], references[:, 3] - references[:, 1]
        x, y = references[:, 0] + 0.5 * width, references[:, 1] + 0.5 * height
        target_width, target_height = targets[:, 2] - targets[:, 0], targets[:, 3] - targets[:, 1]
        target_x, target_y = targets[:, 0] + 0.5 * target_width, targets[:, 1] + 0.5 * target_height
        wx, wy, ww, wh = self.weights
        dx, dy = wx * (target_x - x) / width, wy * (target_y - y) / height
        dw, dh = ww * torch.log(target_width / width), wh * torch.log(target_height / height)
        return torch.stack((dx, dy, dw, dh), dim=1)

    def decode(self, deltas: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Apply `deltas` (N, K*4) to `references` (N, 4) -> boxes (N, K*4); always float32, also under autocast."""
        deltas = deltas.float()
        references = references.float()
        width, height = references[:, 2] - references[:, 0], references[:, 3] - references[:, 1]
        x, y = references[:, 0] + 0.5 * width, references[:, 1] + 0.5 * height
        wx, wy, ww, wh = self.weights
        dw = torch.clamp(deltas[:, 2::4] / ww, max=LOG_SCALE_LIMIT)
        dh = torch.clamp(deltas[:, 3::4] / wh, max=LOG_SCALE_LIMIT)
        centre_x = deltas[:, 0::4] / wx * width[:, None] + x[:, None]
        centre_y = deltas[:, 1::4] / wy * height[:, None] + y[:, None]
        half_width = 0.5 * (torch.exp(dw) * width[:, None])
        half_height = 0.5 * (torch.exp(dh) * height[:, None])
        corners = (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height)
        return torch.stack(corners, dim=-1).reshape(deltas.shape)


def regression_loss(
    coder: BoxCoder,
    references: torch.Tensor,
    deltas: torch.Tensor,
    targets: torch.Tensor,
    kind: str,
    beta: float,
) -> torch.Tensor:
    """Sum the box loss of foreground regions (arguments (N, 4); 0-dim result, 0 with a gradient for N = 0).

    Args:
        kind: one of `BOX_LOSSES`; smooth_l1 compares deltas, the others compare decoded boxes.
        beta: threshold between the square and the linear part of smooth L1; 0 is plain L1.
    """
    if kind == "smooth_l1":
        return smooth_l1_loss(deltas, coder.encode(references, targets), beta=beta, reduction="sum")
    boxes = coder.decode(deltas, references)
    function = {"giou": giou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}[kind]
    return function(boxes, targets, reduction="sum")


def match(
    quality: torch.Tensor, thresholds: Sequence[float], labels: Sequence[int], low_quality: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign every candidate the ground truth with the highest IoU, and a label by that IoU.

    Args:
        quality: (M, N) IoU of ground truth and candidates.
        thresholds: T ascending IoUs; a candidate whose best IoU is in [thresholds[i-1], thresholds[i]) gets labels[i].
        labels: T + 1 values of -1 (ignore), 0 (background), 1 (foreground).
        low_quality: also label as foreground every candidate that ties for some ground truth's best IoU. It keeps its
            own best ground truth, which may be another one.

    Returns:
        (N,) int64 index of the ground truth, (N,) int8 label. With no ground truth: 0 and labels[0].
        Source: Faster R-CNN section 3.1.2; detectron2/modeling/matcher.py.
    """
    if quality.numel() == 0:
        index = torch.zeros(quality.shape[1], dtype=torch.int64, device=quality.device)
        return index, torch.full_like(index, labels[0], dtype=torch.int8)
    best, index = quality.max(dim=0)
    label = torch.full_like(index, labels[0], dtype=torch.int8)
    for threshold, value in zip(thresholds, labels[1:]):  # by numbers: tensors would have to be sent to a GPU
        label.masked_fill_(best >= threshold, value)
    if low_quality:
        best_of_truth = quality.max(dim=1, keepdim=True).values
        label.masked_fill_((quality == best_of_truth).any(dim=0), 1)
    return index, label


def sample_labels(
    labels: torch.Tensor, count: int, positive_fraction: float, background: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random indices of at most `count * positive_fraction` foreground, then background up to `count` in total.

    Args:
        labels: (N,) -1 to ignore, `background`, anything else is foreground.

    Returns:
        Foreground and background indices, int64. Draws two `torch.randperm`, foreground first, on the labels'
        device, as Detectron2 does: the same seed chooses the same regions.
    """
    foreground = ((labels != -1) & (labels != background)).nonzero().squeeze(1)
    rest = (labels == background).nonzero().squeeze(1)
    num_foreground = min(len(foreground), int(count * positive_fraction))
    num_rest = min(len(rest), count - num_foreground)
    foreground = foreground[torch.randperm(len(foreground), device=labels.device)[:num_foreground]]
    rest = rest[torch.randperm(len(rest), device=labels.device)[:num_rest]]
    return foreground, rest


def nms_per_class(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return kept indices by descending score; a box suppresses those of its class (or level) above `threshold` IoU."""
    boxes, scores = boxes.float(), scores.float()
    if boxes.is_cuda and 0 < boxes.numel() <= 100_000:  # torchvision's way of so few, which sends a 1 to the GPU
        offsets = classes.to(boxes) * (boxes.max() + 1)
        return torchvision.ops.nms(boxes + offsets[:, None], scores, threshold)
    return torchvision.ops.batched_nms(boxes, scores, classes, threshold)
