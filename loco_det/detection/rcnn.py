"""Faster and Mask R-CNN, and the RPN alone: from images through backbone, proposals and heads to detections.

Source: detectron2/modeling/meta_arch/rcnn.py and postprocessing.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode

from loco_det.annotations.instances import Instances
from loco_det.core.errors import UserError
from loco_det.detection.boxes import clip, nonempty
from loco_det.detection.cascade import build_roi_heads
from loco_det.detection.fpn import Batch, Network
from loco_det.detection.masks import paste_masks
from loco_det.detection.rpn import RPN
from loco_det.detection.semantic import SemanticSegmentor


class ProposalNetwork(Network):
    """Backbone and RPN with Detectron2's parameter names, arithmetic and losses."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.proposal_generator: RPN | None = None
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN":
            self._check_features("RPN", cfg.MODEL.RPN.IN_FEATURES)
            self.proposal_generator = RPN(cfg, self.backbone.channels, self.backbone.strides)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor] | list[Instances]:
        """Losses in training, proposals otherwise.

        Args:
            batch: one dict per image, as made by the mapper: `image` uint8 (3, Hi, Wi) in INPUT.FORMAT order, `height`
                and `width` of the original image, and in training `instances` with boxes, classes and, for Mask R-CNN,
                masks, in the coordinates of `image`; for a Fast R-CNN also `proposals`.

        Returns:
            In training {loss_rpn_cls, loss_rpn_loc}, 0-dim tensors. Otherwise one Instances per image, in the original
            image's pixels: boxes, and scores (logits, descending).
        """
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)
        proposals, losses = self.proposal_generator(features, sizes, self.targets(batch))
        return losses if self.training else to_original(proposals, batch)

    def targets(self, batch: Batch) -> list[Instances] | None:
        """Ground truth on the model's device, in training."""
        return [item["instances"].to(self.pixel_mean.device) for item in batch] if self.training else None


class GeneralizedRCNN(ProposalNetwork):
    """A two-stage detector with Detectron2's parameter names, arithmetic and losses."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self._check_features("ROI_HEADS", cfg.MODEL.ROI_HEADS.IN_FEATURES)
        self.roi_heads = build_roi_heads(cfg, self.backbone.channels, self.backbone.strides)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor] | list[Instances]:
        """Losses in training, detections otherwise; `batch` as for `ProposalNetwork`.

        Returns:
            In training {loss_rpn_cls, loss_rpn_loc, loss_cls, loss_box_reg[, loss_mask]}, 0-dim tensors; a cascade
            has loss_cls_stage0, loss_box_reg_stage0 and so on.
            Otherwise one Instances per image, in the original image's pixels: boxes, scores (descending), classes
            and, for Mask R-CNN, masks (N, height, width) bool.
        """
        if not self.training:
            return to_original(self.detect(batch), batch)
        images, sizes = self.preprocess(batch)
        features, targets = self.backbone(images), self.targets(batch)
        proposals, losses = self.propose(batch, features, sizes, targets)
        return {**self.roi_heads(features, proposals, targets), **losses}

    def propose(
        self,
        batch: Batch,
        features: dict[str, torch.Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Instances] | None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Return the RPN's proposals and losses, or the `proposals` in the batch and no losses."""
        if self.proposal_generator is None:
            return [item["proposals"].to(self.pixel_mean.device) for item in batch], {}
        return self.proposal_generator(features, sizes, targets)

    def detect(
        self, batch: Batch, given: Sequence[Instances] | None = None, with_masks: bool = True
    ) -> list[Instances]:
        """Return detections in pixels of each `image` of the batch.

        Args:
            given: detections to predict masks for; None to detect first.
            with_masks: add masks (Ri, M, M) of float probabilities, if the model has a mask branch.
        """
        images, sizes = self.preprocess(batch)
        features = self.backbone(images)
        if given is None:
            given = self.roi_heads(features, self.propose(batch, features, sizes, None)[0])
        if with_masks:
            self.roi_heads.predict_masks(features, given)
        return list(given)


def to_original(found: Sequence[Instances], batch: Batch) -> list[Instances]:
    """Apply `postprocess` for each image's `height` and `width` in the batch; default: its own size."""
    return [
        postprocess(one, item.get("height", one.image_size[0]), item.get("width", one.image_size[1]))
        for one, item in zip(found, batch)
    ]


def postprocess(detections: Instances, height: int, width: int) -> Instances:
    """Scale detections or proposals from the network's input to `height` x `width` pixels and paste their masks.

    Args:
        detections: of one image; `masks`, if present, (N, M, M) float probabilities.

    Returns:
        Boxes scaled and clipped to the image, empty ones dropped; masks (N, height, width) bool.
    """
    scale_y, scale_x = height / detections.image_size[0], width / detections.image_size[1]
    boxes = detections.boxes.clone()
    boxes[:, 0::2] *= scale_x
    boxes[:, 1::2] *= scale_y
    boxes = clip(boxes, (height, width))
    keep = nonempty(boxes).nonzero().squeeze(1)
    masks = detections.masks
    return Instances(
        (height, width),
        boxes=boxes[keep],
        classes=None if detections.classes is None else detections.classes[keep],
        scores=detections.scores[keep],
        masks=None if masks is None else paste_masks(masks[keep], boxes[keep], (height, width)),
    )


def build_model(cfg: CfgNode) -> Network:
    """Build the network for a config with Detectron2's keys, freshly initialised, on the CPU, in training mode.

    Args:
        cfg: valid for `keys.check_supported`.

    Raises:
        UserError: incompatible keys; names key and value.
    """
    if len(cfg.MODEL.PIXEL_MEAN) != 3 or len(cfg.MODEL.PIXEL_STD) != 3 or 0 in list(cfg.MODEL.PIXEL_STD):
        raise UserError("MODEL.PIXEL_MEAN and MODEL.PIXEL_STD must be three numbers, PIXEL_STD without zeros")
    kinds = {
        "GeneralizedRCNN": GeneralizedRCNN,
        "ProposalNetwork": ProposalNetwork,
        "SemanticSegmentor": SemanticSegmentor,
    }
    return kinds[cfg.MODEL.META_ARCHITECTURE](cfg)
