"""Semantic segmentation on the pyramid: a class for every pixel (Panoptic FPN, arXiv 1901.02446, section 3, "semantic
segmentation branch"), with Detectron2's parameter names, arithmetic and loss.

Shape legend: B images, K classes; the padded batch is (B, 3, H, W), level p of stride s (B, C, H/s, W/s).
Source: detectron2/modeling/meta_arch/semantic_seg.py, modeling/postprocessing.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.core.errors import UserError
from loco_det.detection.fpn import Batch, Network, pad
from loco_det.detection.layers import Conv, c2_msra_fill


class SemSegFPNHead(nn.Module):
    """3x3 convolutions and doublings of all levels to one stride, summed, and a 1x1 convolution to the classes.

    Args:
        cfg: uses MODEL.SEM_SEG_HEAD.
        channels, strides: of the backbone's features, by name.

    Raises:
        UserError: the head does not fit these features.
    """

    def __init__(self, cfg: CfgNode, channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
        super().__init__()
        head = cfg.MODEL.SEM_SEG_HEAD
        self.stride, self.loss_weight, self.ignored = head.COMMON_STRIDE, head.LOSS_WEIGHT, head.IGNORE_VALUE
        self.in_features = sorted(head.IN_FEATURES, key=strides.__getitem__)
        _check(cfg, [strides[name] for name in self.in_features])
        width = head.CONVS_DIM
        for name in self.in_features:
            layers: list[nn.Module] = []
            for k in range(max(1, int(math.log2(strides[name] / self.stride)))):
                conv = Conv(width if k else channels[name], width, 3, head.NORM, relu=True)
                c2_msra_fill(conv)
                layers.append(conv)
                if strides[name] != self.stride:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.add_module(name, nn.Sequential(*layers))
        self.predictor = Conv(width, head.NUM_CLASSES, 1)
        c2_msra_fill(self.predictor)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits (B, K, H, W), float32."""
        total = None
        for name in self.in_features:
            x = getattr(self, name)(features[name])
            total = x if total is None else total + x
        logits = self.predictor(total).float()
        return F.interpolate(logits, scale_factor=self.stride, mode="bilinear", align_corners=False)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted mean cross entropy, 0-dim, over pixels of `targets` (B, H, W) int64 not ignored."""
        return F.cross_entropy(logits, targets, ignore_index=self.ignored) * self.loss_weight


def _check(cfg: CfgNode, strides: list[int]) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    if cfg.MODEL.BACKBONE.NAME != "build_resnet_fpn_backbone" or max(strides) > 32:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES {list(head.IN_FEATURES)} must be levels up to stride 32 of "
            "MODEL.BACKBONE.NAME 'build_resnet_fpn_backbone'"
        )
    finest = min(strides)
    if head.COMMON_STRIDE not in (1, 2, 4, 8, 16, 32) or finest < head.COMMON_STRIDE:
        raise UserError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {head.COMMON_STRIDE}; give a power of two up to the finest level's "
            f"stride {finest}"
        )
    if head.NORM == "GN" and head.CONVS_DIM % 32:
        raise UserError(f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {head.CONVS_DIM}; NORM GN needs a multiple of 32")


class SemanticSegmentor(Network):
    """Backbone and head, with Detectron2's names, arithmetic and loss."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self._check_features("SEM_SEG_HEAD", cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
        self.sem_seg_head = SemSegFPNHead(cfg, self.backbone.channels, self.backbone.strides)

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Tensor]:
        """Return the loss in training, logits otherwise.

        Args:
            batch: one dict per image, as made by the mapper: `image` uint8 (3, Hi, Wi) in INPUT.FORMAT order,
                `height` and `width` of the original image, and in training `sem_seg` (Hi, Wi) int64, classes or
                MODEL.SEM_SEG_HEAD.IGNORE_VALUE.

        Returns:
            In training {loss_sem_seg}, a 0-dim tensor. Otherwise (K, height, width) float32 for each image.
        """
        images, sizes = self.preprocess(batch)
        logits = self.sem_seg_head(self.backbone(images))
        if self.training:
            targets = [item["sem_seg"].to(logits.device) for item in batch]
            padded = pad(targets, self.padding_unit, self.sem_seg_head.ignored)
            return {"loss_sem_seg": self.sem_seg_head.loss(logits, padded)}
        return [
            to_original(one, size, item.get("height", size[0]), item.get("width", size[1]))
            for one, size, item in zip(logits, sizes, batch)
        ]


def to_original(logits: Tensor, size: tuple[int, int], height: int, width: int) -> Tensor:
    """Crop and resize (K, H, W) logits of a padded image of `size` to (K, height, width)."""
    logits = logits[None, :, : size[0], : size[1]]
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)[0]
