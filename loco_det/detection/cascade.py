"""Cascade R-CNN: consecutive box branches, each refining the previous boxes and trained at a higher IoU.

Shape legend: B images, Ri regions of image i, R over all images, K classes (index K is background).
Source: Cascade R-CNN (arXiv 1712.00726); detectron2/modeling/roi_heads/cascade_rcnn.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.instances import Instances
from loco_det.core.errors import UserError
from loco_det.detection.boxes import clip, nonempty
from loco_det.detection.fast_rcnn import BoxHead, BoxPredictor
from loco_det.detection.roi_heads import (
    EXTRA_NORM,
    Losses,
    Maps,
    Res5ROIHeads,
    RoiHeads,
    Sample,
    StandardROIHeads,
    box_losses,
    make_sample,
)


class CascadeROIHeads(StandardROIHeads):
    """`box_head` and `box_predictor` are lists, one entry per stage; the mask branch uses the first stage's regions."""

    def make_box_branch(self, cfg: CfgNode, width: int) -> None:
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        first = list(self.settings.IOU_THRESHOLDS), list(self.settings.IOU_LABELS)
        self.overlaps = list(cascade.IOUS)
        if not self.overlaps or len(cascade.BBOX_REG_WEIGHTS) != len(self.overlaps):
            raise UserError(
                f"MODEL.ROI_BOX_CASCADE_HEAD has {len(self.overlaps)} IOUS and {len(cascade.BBOX_REG_WEIGHTS)} "
                "BBOX_REG_WEIGHTS; give one of each for every stage"
            )
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            raise UserError("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False; CascadeROIHeads needs True")
        if first != (self.overlaps[:1], [0, 1]):
            raise UserError(
                f"MODEL.ROI_HEADS.IOU_THRESHOLDS and IOU_LABELS are {first[0]} and {first[1]}; CascadeROIHeads takes "
                f"the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS and two labels, {self.overlaps[:1]} and [0, 1]"
            )
        if self.train_on_predictions:
            raise UserError(
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True, which CascadeROIHeads (Detectron2's too) does not "
                "read; set it to False"
            )
        heads, predictors = [], []
        for weights in cascade.BBOX_REG_WEIGHTS:  # alternating, the order in which Detectron2 draws initial values
            heads.append(BoxHead(cfg, width))
            predictors.append(BoxPredictor(cfg, heads[-1].out_channels, weights))
        self.box_head = nn.ModuleList(heads)
        self.box_predictor = nn.ModuleList(predictors)

    def train_boxes(self, maps: Maps, samples: list[Sample], targets: Sequence[Instances]) -> Losses:
        """Return `loss_cls_stageN` and `loss_box_reg_stageN`; stage N > 0 trains on all boxes of the previous stage."""
        losses: Losses = {}
        sizes = [target.image_size for target in targets]
        for stage, predictor in enumerate(self.box_predictor):
            regions = [s.boxes for s in samples]
            scores, deltas = self._predict(stage, maps, regions)
            found = box_losses(predictor, scores, deltas, samples)
            losses.update({f"{name}_stage{stage}": loss for name, loss in found.items()})
            if stage + 1 < len(self.overlaps):
                refined = self._refine(stage, deltas, regions, sizes)
                samples = self._relabel(self.overlaps[stage + 1], refined, targets)
        return losses

    def predict_boxes(self, maps: Maps, proposals: Sequence[Instances]) -> list[Instances]:
        """Return the boxes of the last stage, scored by the mean probability of all stages."""
        sizes = [proposal.image_size for proposal in proposals]
        regions = [proposal.boxes for proposal in proposals]
        probabilities = []
        for stage, predictor in enumerate(self.box_predictor):
            scores, deltas = self._predict(stage, maps, regions)
            probabilities.append(predictor.probabilities(scores))
            if stage + 1 < len(self.overlaps):
                regions = self._refine(stage, deltas, regions, sizes)
        boxes = predictor.coder.decode(deltas, torch.cat(regions))
        return predictor.select(boxes, sum(probabilities) * (1.0 / len(probabilities)), proposals)

    def _predict(self, stage: int, maps: Maps, regions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.box_pooler(maps, regions)
        if pooled.requires_grad:
            # The losses of the stages are summed, but the shared features get their mean gradient.
            share = 1.0 / len(self.box_head)
            pooled.register_hook(lambda gradient: gradient * share)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    @torch.no_grad()
    def _refine(
        self, stage: int, deltas: torch.Tensor, regions: list[torch.Tensor], sizes: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Return a stage's boxes, detached for the next one and clipped to the image."""
        boxes = self.box_predictor[stage].coder.decode(deltas, torch.cat(regions))
        return [clip(b, size) for b, size in zip(boxes.split([len(r) for r in regions]), sizes)]

    @torch.no_grad()
    def _relabel(self, overlap: float, boxes: list[torch.Tensor], targets: Sequence[Instances]) -> list[Sample]:
        samples = []
        for box, target in zip(boxes, targets):
            box = box[nonempty(box)]
            index, classes = self.label(box, target, [overlap], [0, 1])
            samples.append(make_sample(box, classes, index, target))
        return samples


def build_roi_heads(cfg: CfgNode, channels: dict[str, int], strides: dict[str, int]) -> RoiHeads:
    """Build the heads named by MODEL.ROI_HEADS.NAME."""
    kinds = {
        "StandardROIHeads": StandardROIHeads,
        "CascadeROIHeads": CascadeROIHeads,
        "Res5ROIHeads": Res5ROIHeads,
        EXTRA_NORM: Res5ROIHeads,
    }
    return kinds[cfg.MODEL.ROI_HEADS.NAME](cfg, channels, strides)
