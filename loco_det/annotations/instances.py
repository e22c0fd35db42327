"""The container for objects that data, detector and evaluator exchange.

Shape legend: N instances in an image, H x W its height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class Instances:
    """Annotated or detected objects of one image; a field that does not apply is None.

    Attributes:
        image_size: (H, W) in pixels; `boxes` and `masks` are in this image's coordinates.
        boxes: (N, 4) float32, XYXY, absolute pixels.
        classes: (N,) int64 in [0, number of classes).
        scores: (N,) float32 in [0, 1], for detections.
        masks: anything of length N that a bool or integer tensor indexes: `PolygonMasks` or `BitMasks` from
            `loco_det.annotations.masks` for ground truth, a (N, H, W) bool tensor for detections.
    """

    image_size: tuple[int, int]
    boxes: torch.Tensor
    classes: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    masks: Any = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: torch.Tensor) -> Instances:
        """Select instances by a bool (N,) or int64 (K,) tensor."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Instances:
        """Move to `device`; to a GPU without waiting for the copy."""
        if torch.device(device).type == "cuda":
            return self._map(lambda value: value.to(device, non_blocking=True))
        return self._map(lambda value: value.to(device))

    def _map(self, function: Any) -> Instances:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "image_size"}
        return Instances(self.image_size, **{k: None if v is None else function(v) for k, v in values.items()})
