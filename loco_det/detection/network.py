"""What every network here begins with: normalised, padded images and the backbone.

Shape legend: B images; image i is (3, Hi, Wi), the padded batch (B, 3, H, W).
Source: detectron2/modeling/meta_arch/rcnn.py, structures/image_list.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.core.errors import UserError
from loco_det.detection.fpn import build_backbone

Batch = Sequence[dict[str, Any]]


class Network(nn.Module):
    """The backbone that a configuration describes and the pixels that it expects."""

    fast = False  # set for all parts by `cpu_speed.speed_up`

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        # Not persistent: Detectron2's checkpoints do not hold them.
        for name in ("pixel_mean", "pixel_std"):
            value = torch.tensor(cfg.MODEL[name.upper()], dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, value, persistent=False)

    def _check_features(self, section: str, names: Sequence[str]) -> None:
        known = list(self.backbone.channels)
        if not names or any(name not in known for name in names):
            raise UserError(
                f"MODEL.{section}.IN_FEATURES {list(names)} must be features of the backbone: {', '.join(known)}"
            )

    def preprocess(self, batch: Batch) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Normalised float32 images padded at the right and below with zeros to one size, and their own (Hi, Wi)."""
        device = self.pixel_mean.device
        images = [(item["image"].to(device) - self.pixel_mean) / self.pixel_std for item in batch]
        return pad(images, self.backbone.size_divisibility, 0), [tuple(image.shape[-2:]) for image in images]


def pad(images: Sequence[torch.Tensor], unit: int, value: float) -> torch.Tensor:
    """(..., Hi, Wi) tensors as (B, ..., H, W): `value` at the right and below, H and W multiples of `unit`, if any."""
    unit = max(unit, 1)
    height, width = (-(-max(lengths) // unit) * unit for lengths in zip(*(image.shape[-2:] for image in images)))
    padded = images[0].new_full((len(images), *images[0].shape[:-2], height, width), value)
    for row, image in zip(padded, images):
        row[..., : image.shape[-2], : image.shape[-1]] = image
    return padded
