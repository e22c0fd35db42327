"""The one container that data, detector and evaluator hand to each other, and how the text of a mask is read.

Shape legend: N instances in an image, H x W its height and width in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
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
        """The instances that a bool (N,) or int64 (K,) tensor selects."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> Instances:
        return self._map(lambda value: value.to(device))

    def _map(self, function: Any) -> Instances:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "image_size"}
        return Instances(self.image_size, **{k: None if v is None else function(v) for k, v in values.items()})


def rle_lengths(counts: bytes) -> np.ndarray:
    """Run lengths, int64, of a compressed RLE: zeros first, then ones, in turn. They may be anything.

    Five bits a character from 48 on, lowest first, the sixth says that more follow, the value is signed, and from the
    fourth on it is the difference to the one before last. Source: pycocotools common/maskApi.c, rleFrString.

    Raises:
        ValueError: the text is none, "breaks off in the middle of a number" and the like.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise ValueError("holds characters that are no digits")
    last = np.flatnonzero((codes & 32) == 0)
    if not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("breaks off in the middle of a number")
    first = np.concatenate([[0], last[:-1] + 1])
    digits = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if digits.max() > 6:  # lengths are of 32 bits
        raise ValueError("holds a number that is too large")
    values = np.add.reduceat((codes & 31) << (5 * digits), first)
    values -= np.where(codes[last] & 16, 1 << (5 * (last - first + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
