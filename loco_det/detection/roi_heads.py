"""RoI heads: sampling of proposals in training, box and mask branches, with or without an FPN.

Shape legend: B images, Ri regions of image i, R over all images, K classes (index K is background).
Source: detectron2/modeling/roi_heads/roi_heads.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.instances import Instances
from loco_det.backbones.resnet import make_norm, make_stage
from loco_det.core.errors import UserError
from loco_det.detection.boxes import match, pairwise_iou, sample_labels
from loco_det.detection.fast_rcnn import BoxHead, BoxPredictor
from loco_det.detection.masks import MaskHead, mask_loss
from loco_det.detection.poolers import RoiPooler, with_image

Features = dict[str, torch.Tensor]
Maps = Sequence[torch.Tensor]
Losses = dict[str, torch.Tensor]

EXTRA_NORM = "Res5ROIHeadsExtraNorm"  # MoCo's name of the C4 head with a norm after res5

# Regions pooled at once in inference: 13 MB (7 x 7) and 6 MB (14 x 14) of 256 channels, enough for full speed.
BOXES_AT_ONCE = 256
MASKS_AT_ONCE = 32


@dataclass
class Sample:
    """Regions of one image that train the heads.

    Attributes:
        boxes: (Ri, 4), foreground regions first.
        classes: (Ri,) int64 in [0, K].
        truth: (Ri, 4) matched ground truth; the region itself if the image has none.
        index: (Ri,) int64 matched ground truth.
        masks: the image's ground-truth masks or None.
        foreground: number of foreground regions, which `masks` are for; 0 if not known.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    truth: torch.Tensor
    index: torch.Tensor
    masks: Any
    foreground: int = 0


def make_sample(
    boxes: torch.Tensor, classes: torch.Tensor, index: torch.Tensor, target: Instances, foreground: int = 0
) -> Sample:
    """Return the `Sample` of regions with known classes and matches."""
    truth = target.boxes[index] if len(target) else boxes
    return Sample(boxes, classes, truth, index, target.masks, foreground)


def box_losses(
    predictor: BoxPredictor, scores: torch.Tensor, deltas: torch.Tensor, samples: Sequence[Sample]
) -> Losses:
    """Return `loss_cls` and `loss_box_reg` of the regions of all images."""
    return predictor.losses(
        scores,
        deltas,
        torch.cat([s.boxes for s in samples]),
        torch.cat([s.classes for s in samples]),
        torch.cat([s.truth for s in samples]),
    )


def share_masks(logits: torch.Tensor, detections: Sequence[Instances]) -> None:
    """Set `masks` of each image's detections, (Ri, M, M) float probabilities, from logits (R, M, M)."""
    for detection, masks in zip(detections, logits.sigmoid().split([len(d) for d in detections])):
        detection.masks = masks


class RoiHeads(nn.Module):
    """Sampling of regions and the mask loss; subclasses differ in pooling."""

    def __init__(self, cfg: CfgNode, strides: dict[str, int]) -> None:
        super().__init__()
        self.settings = cfg.MODEL.ROI_HEADS
        self.in_features = list(self.settings.IN_FEATURES)
        self.num_classes = self.settings.NUM_CLASSES
        self.box_pooler = make_pooler(cfg.MODEL.ROI_BOX_HEAD, [strides[name] for name in self.in_features])

    @torch.no_grad()
    def sample(self, proposals: Sequence[Instances], targets: Sequence[Instances]) -> list[Sample]:
        """Match proposals (and the ground truth itself) with the ground truth, and sample a batch from each image."""
        s = self.settings
        samples = []
        for proposal, target in zip(proposals, targets):
            boxes = torch.cat([proposal.boxes, target.boxes]) if s.PROPOSAL_APPEND_GT else proposal.boxes
            index, classes = self.label(boxes, target, s.IOU_THRESHOLDS, s.IOU_LABELS)
            objects, rest = sample_labels(classes, s.BATCH_SIZE_PER_IMAGE, s.POSITIVE_FRACTION, self.num_classes)
            chosen = torch.cat([objects, rest])
            samples.append(make_sample(boxes[chosen], classes[chosen], index[chosen], target, len(objects)))
        return samples

    def label(
        self, boxes: torch.Tensor, target: Instances, thresholds: Sequence[float], labels: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return every box's matched ground truth (Ri,) int64, and class (Ri,) int64 in [0, K], -1 to ignore it."""
        index, label = match(pairwise_iou(target.boxes, boxes), thresholds, labels, False)
        if not len(target):
            return index, torch.full_like(index, self.num_classes)
        classes = target.classes[index]
        classes.masked_fill_(label == 0, self.num_classes).masked_fill_(label == -1, -1)
        return index, classes

    def mask_losses(self, pooled: torch.Tensor, samples: Sequence[Sample]) -> Losses:
        """Return `loss_mask` of the foreground regions, whose pooled features are (R, C, S, S)."""
        classes = torch.cat([s.classes[: s.foreground] for s in samples])
        masks = [s.masks[s.index[: s.foreground]] if s.foreground else None for s in samples]
        boxes = [s.boxes[: s.foreground] for s in samples]
        return {"loss_mask": mask_loss(self.mask_head(pooled, classes), masks, boxes)}


class StandardROIHeads(RoiHeads):
    """Box and mask branches with separate poolers (FPN, DC5)."""

    fast = False  # predict a chunk of regions at a time

    def __init__(self, cfg: CfgNode, channels: dict[str, int], strides: dict[str, int]) -> None:
        super().__init__(cfg, strides)
        widths = {channels[name] for name in self.in_features}
        if len(widths) != 1:
            raise UserError(f"MODEL.ROI_HEADS.IN_FEATURES {self.in_features} differ in channels: {sorted(widths)}")
        width = widths.pop()
        self.train_on_predictions = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        self.make_box_branch(cfg, width)
        self.mask_on = cfg.MODEL.MASK_ON
        if self.mask_on:
            self.mask_pooler = make_pooler(cfg.MODEL.ROI_MASK_HEAD, [strides[name] for name in self.in_features])
            self.mask_head = MaskHead(cfg, width)

    def make_box_branch(self, cfg: CfgNode, width: int) -> None:
        self.box_head = BoxHead(cfg, width)
        self.box_predictor = BoxPredictor(cfg, self.box_head.out_channels)

    def forward(
        self, features: Features, proposals: Sequence[Instances], targets: Sequence[Instances] | None = None
    ) -> Losses | list[Instances]:
        """Losses in training, detections otherwise; `predict_masks` adds their masks."""
        maps = [features[name] for name in self.in_features]
        if not self.training:
            return self.predict_boxes(maps, proposals)
        samples = self.sample(proposals, targets)
        losses = self.train_boxes(maps, samples, targets)
        if self.mask_on:
            foreground = [s.boxes[: s.foreground] for s in samples]
            losses.update(self.mask_losses(self.mask_pooler(maps, foreground), samples))
        return losses

    def train_boxes(self, maps: Maps, samples: list[Sample], targets: Sequence[Instances]) -> Losses:
        """Return the box branch's losses; with TRAIN_ON_PRED_BOXES replace the boxes of `samples` by predicted ones."""
        scores, deltas = self.box_predictor(self.box_head(self.box_pooler(maps, [s.boxes for s in samples])))
        losses = box_losses(self.box_predictor, scores, deltas, samples)
        if self.train_on_predictions:
            for sample, delta in zip(samples, deltas.detach().split([len(s.boxes) for s in samples])):
                sample.boxes = self.box_predictor.boxes_of_classes(delta, sample.boxes, sample.classes)
        return losses

    def predict_boxes(self, maps: Maps, proposals: Sequence[Instances]) -> list[Instances]:
        """Return every image's detections, without masks."""
        scores, deltas = [], []
        for part in self.chunked(with_image([p.boxes for p in proposals]), BOXES_AT_ONCE):
            score, delta = self.box_predictor(self.box_head(self.box_pooler.pool(maps, part)))
            scores.append(score)
            deltas.append(delta)
        return self.box_predictor.detect(torch.cat(scores), torch.cat(deltas), proposals)

    def predict_masks(self, features: Features, detections: Sequence[Instances]) -> None:
        """Add soft masks (Ri, M, M) to given boxes and classes; does nothing without a mask branch."""
        if self.mask_on:
            maps = [features[name] for name in self.in_features]
            regions = with_image([d.boxes for d in detections])
            classes = torch.cat([d.classes for d in detections])
            parts = zip(self.chunked(regions, MASKS_AT_ONCE), self.chunked(classes, MASKS_AT_ONCE))
            logits = [self.mask_head(self.mask_pooler.pool(maps, r), c) for r, c in parts]
            share_masks(torch.cat(logits), detections)

    def chunked(self, rows: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        """Split into chunks to save memory."""
        return rows.split(count) if self.fast else [rows]


class Res5ROIHeads(RoiHeads):
    """Both branches share one pooler and the ResNet's last stage (C4; ResNet paper, appendix A).

    As Res5ROIHeadsExtraNorm with a further MODEL.RESNETS.NORM after it: MoCo (arXiv 1911.05722) section 4.2.
    """

    def __init__(self, cfg: CfgNode, channels: dict[str, int], strides: dict[str, int]) -> None:
        super().__init__(cfg, strides)
        resnets = cfg.MODEL.RESNETS
        width = 8 * resnets.RES2_OUT_CHANNELS
        if len(self.in_features) != 1 or channels[self.in_features[0]] != width // 2:
            raise UserError(
                f"MODEL.ROI_HEADS.IN_FEATURES {self.in_features} must be the one stage below res5, ['res4'], for "
                "Res5ROIHeads"
            )
        # Three bottlenecks at every depth, as in Detectron2.
        self.res5 = make_stage(
            "res5",
            50,
            norm=resnets.NORM,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            groups=resnets.NUM_GROUPS,
            width_per_group=resnets.WIDTH_PER_GROUP,
            res2_out_channels=resnets.RES2_OUT_CHANNELS,
        )
        if cfg.MODEL.ROI_HEADS.NAME == EXTRA_NORM:
            self.res5.add_module("norm", make_norm(resnets.NORM, width))
        self.box_predictor = BoxPredictor(cfg, width)
        self.mask_on = cfg.MODEL.MASK_ON
        if self.mask_on:
            self.mask_head = MaskHead(cfg, width)

    def forward(
        self, features: Features, proposals: Sequence[Instances], targets: Sequence[Instances] | None = None
    ) -> Losses | list[Instances]:
        """Losses in training, detections otherwise; `predict_masks` adds their masks."""
        regions = self.sample(proposals, targets) if self.training else proposals
        pooled = self._pool(features, regions)
        scores, deltas = self.box_predictor(pooled.mean(dim=[2, 3]))
        if not self.training:
            return self.box_predictor.detect(scores, deltas, proposals)
        losses = box_losses(self.box_predictor, scores, deltas, regions)
        if self.mask_on:
            parts = zip(pooled.split([len(s.boxes) for s in regions]), regions)
            losses.update(self.mask_losses(torch.cat([part[: s.foreground] for part, s in parts]), regions))
        return losses

    def predict_masks(self, features: Features, detections: Sequence[Instances]) -> None:
        """Add soft masks (Ri, M, M) to given boxes and classes; does nothing without a mask branch."""
        if self.mask_on:
            classes = torch.cat([d.classes for d in detections])
            share_masks(self.mask_head(self._pool(features, detections), classes), detections)

    def _pool(self, features: Features, regions: Sequence[Any]) -> torch.Tensor:
        return self.res5(self.box_pooler([features[self.in_features[0]]], [r.boxes for r in regions]))


def make_pooler(head: CfgNode, strides: Sequence[int]) -> RoiPooler:
    """Build the pooler of a MODEL.ROI_BOX_HEAD or MODEL.ROI_MASK_HEAD node."""
    return RoiPooler(head.POOLER_RESOLUTION, strides, head.POOLER_SAMPLING_RATIO, head.POOLER_TYPE)
