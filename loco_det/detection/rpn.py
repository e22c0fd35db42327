"""Region proposal network: scores and labels of anchors, losses, proposals.

Shape legend: B images, L levels, Hi x Wi cells of level i, A anchors per cell, R = sum of Hi*Wi*A anchors in total.
Source: Faster R-CNN section 3.1; detectron2/modeling/proposal_generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.instances import Instances
from loco_det.core.errors import UserError
from loco_det.detection.anchors import AnchorGenerator, spread_over_levels
from loco_det.detection.boxes import (
    BoxCoder,
    clip,
    match,
    nms_per_class,
    nonempty,
    pairwise_iou,
    regression_loss,
    sample_labels,
)
from loco_det.detection.cpu_speed import predict_cells
from loco_det.detection.layers import Conv


class RPNHead(nn.Module):
    """3x3 convolutions shared by all levels, then one score and four deltas for each anchor."""

    def __init__(self, channels: int, anchors: int, hidden: Sequence[int]) -> None:
        super().__init__()
        convs = []
        for width in hidden:
            convs.append(Conv(channels, channels if width == -1 else width, 3, relu=True))
            channels = convs[-1].out_channels
        if len(convs) == 1:
            self.conv: nn.Module = convs[0]
        else:
            self.conv = nn.Sequential()
            for index, conv in enumerate(convs):
                self.conv.add_module(f"conv{index}", conv)
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, anchors * 4, 1)
        for layer in [*convs, self.objectness_logits, self.anchor_deltas]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """L features (B, C, Hi, Wi) -> L logits (B, Hi*Wi*A) and L deltas (B, Hi*Wi*A, 4), anchors' order."""
        logits, deltas = [], []
        for feature in features:
            hidden = self.conv(feature)
            logits.append(self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1))
            raw = self.anchor_deltas(hidden)
            raw = raw.view(len(raw), -1, 4, *raw.shape[-2:])
            deltas.append(raw.permute(0, 3, 4, 1, 2).flatten(1, 3))
        return logits, deltas


class RPN(nn.Module):
    """Scores anchors, trains on sampled ones and proposes the best after non-maximum suppression."""

    fast = False  # compute gradients only at the sampled anchors

    def __init__(self, cfg: CfgNode, channels: dict[str, int], strides: dict[str, int]) -> None:
        super().__init__()
        rpn = cfg.MODEL.RPN
        self.in_features = list(rpn.IN_FEATURES)
        count = len(self.in_features)
        sizes = spread_over_levels(list(cfg.MODEL.ANCHOR_GENERATOR.SIZES), count, "MODEL.ANCHOR_GENERATOR.SIZES")
        ratios = spread_over_levels(
            list(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS), count, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
        )
        per_cell = {len(size) * len(ratio) for size, ratio in zip(sizes, ratios)}
        widths = {channels[name] for name in self.in_features}
        if len(per_cell) != 1 or len(widths) != 1:
            raise UserError(
                "MODEL.RPN.IN_FEATURES must be features of equal channels, with equally many anchors a cell from "
                f"MODEL.ANCHOR_GENERATOR, but have channels {sorted(widths)} and anchors {sorted(per_cell)}"
            )
        self.rpn_head = RPNHead(widths.pop(), per_cell.pop(), list(rpn.CONV_DIMS))
        self.anchor_generator = AnchorGenerator(
            sizes, ratios, [strides[name] for name in self.in_features], cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        )
        self.coder = BoxCoder(rpn.BBOX_REG_WEIGHTS)
        self.settings = rpn
        self.min_side = float(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE)

    def forward(
        self,
        features: dict[str, torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Return every image's proposals and, in training, the losses.

        Args:
            image_sizes: B pairs (H, W) before padding.
            targets: ground truth with `boxes`; in training only.

        Returns:
            B Instances with `boxes` (P, 4) and `scores` (P,), the logits, descending; and `loss_rpn_cls` and
            `loss_rpn_loc`, or no losses.
        """
        maps = [features[name] for name in self.in_features]
        anchors = self.anchor_generator([tuple(m.shape[-2:]) for m in maps])
        few = self.training and self.fast and isinstance(self.rpn_head.conv, Conv)  # cells that need a gradient
        with torch.set_grad_enabled(torch.is_grad_enabled() and not few):
            logits, deltas = self.rpn_head(maps)
        losses = self._losses(anchors, maps if few else None, logits, deltas, image_sizes, targets)
        return self._propose(anchors, logits, deltas, image_sizes), losses

    @torch.no_grad()
    def label_anchors(
        self, anchors: torch.Tensor, target: Instances, image_size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample labels (R,) int8 of one image, 1 object, 0 background, -1 unused; and matched truth (R,) int64."""
        s = self.settings
        index, label = match(pairwise_iou(target.boxes, anchors), s.IOU_THRESHOLDS, s.IOU_LABELS, True)
        if s.BOUNDARY_THRESH >= 0:
            height, width = image_size
            edge = anchors.new_tensor([width, height]) + s.BOUNDARY_THRESH
            inside = (anchors[:, :2] >= -s.BOUNDARY_THRESH).all(1) & (anchors[:, 2:] < edge).all(1)
            label.masked_fill_(~inside, -1)
        positive, negative = sample_labels(label, s.BATCH_SIZE_PER_IMAGE, s.POSITIVE_FRACTION, 0)
        label.fill_(-1).index_fill_(0, positive, 1).index_fill_(0, negative, 0)
        return label, index

    def _losses(
        self,
        anchors: list[torch.Tensor],
        maps: list[torch.Tensor] | None,
        logits: list[torch.Tensor],
        deltas: list[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
        targets: Sequence[Instances] | None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses; with `maps`, recompute logits and deltas with gradient at the sampled anchors."""
        if not self.training:
            return {}
        s = self.settings
        all_anchors = torch.cat(anchors)
        labelled = [self.label_anchors(all_anchors, t, size) for t, size in zip(targets, image_sizes)]
        labels = torch.stack([label for label, _ in labelled])
        image, anchor = (labels >= 0).nonzero(as_tuple=True)
        is_object = labels[image, anchor] == 1
        found = is_object.nonzero().squeeze(1)
        before = accumulate([0, *(len(t) for t in targets)])  # boxes of the images before
        matched = torch.stack([index + count for (_, index), count in zip(labelled, before)])
        truth = torch.cat([t.boxes for t in targets])[matched[image[found], anchor[found]]]
        if maps is None:
            score, delta = (
                torch.cat(logits, dim=1)[image, anchor],
                torch.cat(deltas, dim=1)[image[found], anchor[found]],
            )
        else:
            head = self.rpn_head
            score, delta = predict_cells(head.conv, head.objectness_logits, head.anchor_deltas, maps, image, anchor)
            delta = delta[found]
        location = regression_loss(
            self.coder, all_anchors[anchor[found]], delta, truth, s.BBOX_REG_LOSS_TYPE, s.SMOOTH_L1_BETA
        )
        objectness = F.binary_cross_entropy_with_logits(score, is_object.float(), reduction="sum")
        # Divide by the configured number of regions, so that images with few objects do not weigh more.
        regions = s.BATCH_SIZE_PER_IMAGE * len(targets)
        return {
            "loss_rpn_cls": objectness / regions * s.LOSS_WEIGHT,
            "loss_rpn_loc": location / regions * (s.BBOX_REG_LOSS_WEIGHT * s.LOSS_WEIGHT),
        }

    @torch.no_grad()
    def _propose(
        self,
        anchors: list[torch.Tensor],
        logits: list[torch.Tensor],
        deltas: list[torch.Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Select proposals, without gradient: constants for the second stage, as in Detectron2."""
        s = self.settings
        best = s.PRE_NMS_TOPK_TRAIN if self.training else s.PRE_NMS_TOPK_TEST
        kept = s.POST_NMS_TOPK_TRAIN if self.training else s.POST_NMS_TOPK_TEST
        boxes, scores, levels = [], [], []
        for level, (anchor, logit, delta) in enumerate(zip(anchors, logits, deltas)):
            score, index = logit.topk(min(len(anchor), best), dim=1)
            delta = delta.gather(1, index[:, :, None].expand(-1, -1, 4))
            box = self.coder.decode(delta.reshape(-1, 4), anchor[index.reshape(-1)])
            boxes.append(box.view(len(logit), -1, 4))
            scores.append(score)
            levels.append(torch.full_like(index[0], level))
        level = torch.cat(levels)
        return [
            self._select(image_boxes, image_scores, level, size, kept)
            for image_boxes, image_scores, size in zip(torch.cat(boxes, 1), torch.cat(scores, 1), image_sizes)
        ]

    def _select(
        self,
        boxes: torch.Tensor,
        scores: torch.Tensor,
        level: torch.Tensor,
        image_size: tuple[int, int],
        kept: int,
    ) -> Instances:
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
        boxes = clip(boxes, image_size)
        large = (nonempty(boxes, self.min_side) & finite).nonzero().squeeze(1)
        if self.training and len(large) < len(finite) and not finite.all():
            raise UserError(
                "the RPN predicts infinite or undefined boxes, so training has diverged: lower SOLVER.BASE_LR, "
                "lengthen SOLVER.WARMUP_ITERS or check MODEL.PIXEL_MEAN and PIXEL_STD"
            )
        boxes, scores, level = boxes[large], scores[large], level[large]
        keep = nms_per_class(boxes, scores, level, self.settings.NMS_THRESH)[:kept]
        return Instances(image_size, boxes=boxes[keep], scores=scores[keep])
