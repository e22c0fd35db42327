"""The box branch: a head over pooled regions, class scores and class-specific boxes, their losses and detections.

Shape legend: R regions over all images, K classes (index K is background), S pooled side.
Source: Fast R-CNN; detectron2/modeling/roi_heads/fast_rcnn.py and box_head.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.instances import Instances
from loco_det.core.errors import UserError
from loco_det.detection.boxes import BoxCoder, clip, nms_per_class, regression_loss
from loco_det.detection.layers import Conv, c2_msra_fill, c2_xavier_fill, run_convs


class BoxHead(nn.Module):
    """(R, C, S, S) -> (R, `out_channels`) through NUM_CONV 3x3 convolutions and NUM_FC linear layers, ReLU after each.

    Without linear layers the result stays (R, CONV_DIM, S, S) and `out_channels` counts all of it.
    """

    def __init__(self, cfg: CfgNode, channels: int) -> None:
        super().__init__()
        head = cfg.MODEL.ROI_BOX_HEAD
        if head.NUM_CONV + head.NUM_FC < 1:
            raise UserError(
                "MODEL.ROI_BOX_HEAD.NUM_CONV and NUM_FC are both 0; StandardROIHeads needs at least one layer"
            )
        self.convs, self.fcs = [], []
        for index in range(head.NUM_CONV):
            self.add_module(f"conv{index + 1}", Conv(channels, head.CONV_DIM, 3, head.NORM, relu=True))
            self.convs.append(f"conv{index + 1}")
            channels = head.CONV_DIM
        size = channels * head.POOLER_RESOLUTION**2
        for index in range(head.NUM_FC):
            self.add_module(f"fc{index + 1}", nn.Linear(size, head.FC_DIM))
            self.fcs.append(f"fc{index + 1}")
            size = head.FC_DIM
        self.out_channels = size
        # After all layers exist, as in Detectron2, so that a seed gives the same weights.
        for name in self.convs:
            c2_msra_fill(getattr(self, name))
        for name in self.fcs:
            c2_xavier_fill(getattr(self, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = run_convs((getattr(self, name) for name in self.convs), x)
        if self.fcs:
            x = x.flatten(1)
        for name in self.fcs:
            x = F.relu_(getattr(self, name)(x))
        return x


class BoxPredictor(nn.Module):
    """Linear class scores (R, K+1) and box deltas (R, K*4), or (R, 4) if class-agnostic.

    Args:
        channels: length of a region's features.
        box_weights: weights of the box code; default MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS.
    """

    def __init__(self, cfg: CfgNode, channels: int, box_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        head = cfg.MODEL.ROI_BOX_HEAD
        self.num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.cls_score = nn.Linear(channels, self.num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 if head.CLS_AGNOSTIC_BBOX_REG else 4 * self.num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)
        self.coder = BoxCoder(head.BBOX_REG_WEIGHTS if box_weights is None else box_weights)
        self.settings = head
        self.score_threshold = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        self.nms_threshold = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
        self.max_detections = cfg.TEST.DETECTIONS_PER_IMAGE

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, ...) region features -> scores (R, K+1) and deltas (R, K*4 or 4)."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(
        self,
        scores: torch.Tensor,
        deltas: torch.Tensor,
        boxes: torch.Tensor,
        classes: torch.Tensor,
        truth: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return `loss_cls` and `loss_box_reg` of sampled regions.

        Args:
            boxes: (R, 4) regions.
            classes: (R,) int64 in [0, K].
            truth: (R, 4) matched ground truth; arbitrary for background.
        """
        foreground = (classes < self.num_classes).nonzero().squeeze(1)
        if deltas.shape[1] == 4:
            deltas = deltas[foreground]
        else:
            deltas = deltas.view(-1, self.num_classes, 4)[foreground, classes[foreground]]
        s = self.settings
        box_loss = regression_loss(
            self.coder, boxes[foreground], deltas, truth[foreground], s.BBOX_REG_LOSS_TYPE, s.SMOOTH_L1_BETA
        )
        # Divided by all regions, not foreground ones: every foreground region then has the same weight in every batch.
        return {
            "loss_cls": self._class_loss(scores, classes),
            "loss_box_reg": box_loss / max(len(classes), 1) * s.BBOX_REG_LOSS_WEIGHT,
        }

    def _class_loss(self, scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        if not len(classes):
            return scores.sum() * 0.0
        if self.settings.USE_SIGMOID_CE:
            truth = F.one_hot(classes, self.num_classes + 1)[:, :-1].to(scores.dtype)
            each = F.binary_cross_entropy_with_logits(scores[:, :-1], truth, reduction="none")
            return each.sum() / len(classes)
        return F.cross_entropy(scores, classes)

    @torch.no_grad()
    def boxes_of_classes(self, deltas: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Return (R, 4) predicted boxes of the given classes; background uses the last class's."""
        decoded = self.coder.decode(deltas, boxes).view(len(boxes), deltas.shape[1] // 4, 4)
        chosen = classes.clamp(0, decoded.shape[1] - 1)
        return decoded[torch.arange(len(boxes), device=boxes.device), chosen]

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Return (R, K+1) probabilities from class scores."""
        return scores.sigmoid() if self.settings.USE_SIGMOID_CE else F.softmax(scores, dim=-1)

    def detect(self, scores: torch.Tensor, deltas: torch.Tensor, proposals: Sequence[Instances]) -> list[Instances]:
        """Return every image's detections, by `select_detections`.

        Args:
            scores, deltas: predictions for the regions of all `proposals`, in their order.
        """
        boxes = self.coder.decode(deltas, torch.cat([p.boxes for p in proposals]))
        return self.select(boxes, self.probabilities(scores), proposals)

    def select(self, boxes: torch.Tensor, scores: torch.Tensor, proposals: Sequence[Instances]) -> list[Instances]:
        """Select every image's detections from boxes (R, K*4 or 4) and probabilities (R, K+1) of all regions."""
        counts = [len(p) for p in proposals]
        limits = self.score_threshold, self.nms_threshold, self.max_detections
        return [
            select_detections(b, s, p.image_size, *limits)
            for b, s, p in zip(boxes.split(counts), scores.split(counts), proposals)
        ]


def select_detections(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    image_size: tuple[int, int],
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
) -> Instances:
    """Select the detections of one image: `boxes`, `scores`, `classes`, by descending score.

    Args:
        boxes: (R, K*4), or (R, 4) for all classes.
        scores: (R, K+1), the last column is background.
        image_size: (H, W), to which boxes are clipped.
        score_threshold: detections must score above it.
        nms_threshold: IoU above which a better detection of the same class suppresses another.
        max_detections: negative for no limit.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    chosen = scores > score_threshold
    if not torch.jit.is_tracing():  # ONNX's file keeps them
        chosen &= finite[:, None]
    region, classes = chosen.nonzero(as_tuple=True)
    scores = scores[region, classes]
    boxes = boxes.view(boxes.shape[0], boxes.shape[1] // 4, 4)  # len() would be a constant in a trace
    boxes = boxes[region, classes if boxes.shape[1] > 1 else torch.zeros_like(classes)]
    boxes = clip(boxes, image_size)
    keep = nms_per_class(boxes, scores, classes, nms_threshold)
    if max_detections >= 0:
        keep = keep[:max_detections]
    return Instances(image_size, boxes=boxes[keep], classes=classes[keep], scores=scores[keep])
