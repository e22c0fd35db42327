"""Ground-truth instance masks that are cropped and rasterised only for given boxes.

Both classes have a length, are indexed by a bool or integer tensor and crop to boxes; `Instances.masks` holds either.
Results equal those of the same classes in Detectron2's structures/masks.py bit for bit.

Shape legend: N instances, H x W the image in pixels, M the side of a cropped mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import torch
import torchvision.ops  # noqa: F401 (defines torch.ops.torchvision)
from pycocotools import mask as coco_mask

from loco_det.annotations.segmentation import outline_is_long

# Detectron2's minimum box side as a divisor when polygons are scaled to the mask grid.
SHORTEST_SIDE = 0.1
# Fractional bits of a pixel for OpenCV, and the range of its fixed-point numbers around the origin, in pixels.
_SHIFT, _FARTHEST = 4, 2**14


def rasterize(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterise the union of polygons by COCO's rasteriser, or by OpenCV's if outlines would cost COCO's gigabytes.

    Args:
        polygons: flat float arrays x0, y0, x1, y1, ... in pixels, at least three points each; may be empty.
        height, width: size of the mask in pixels.

    Returns:
        (height, width) bool array.
    """
    if not len(polygons):
        return np.zeros((height, width), dtype=bool)
    if outline_is_long(polygons):
        return _filled(polygons, height, width)
    # Six coordinates or more, so pycocotools cannot mistake a polygon for a four-number box.
    encoded = coco_mask.merge(coco_mask.frPyObjects(list(polygons), height, width))
    return coco_mask.decode(encoded).astype(bool)


def _filled(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """As `rasterize`, up to a pixel along the outlines, with memory only for points and mask."""
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        points = np.clip(polygon.reshape(-1, 2) - 0.5, -_FARTHEST, _FARTHEST)  # OpenCV counts from pixel centres
        part = np.zeros((height, width), dtype=np.uint8)
        cv2.fillPoly(part, [np.rint(points * 2**_SHIFT).astype(np.int32)], 1, shift=_SHIFT)
        mask |= part.astype(bool)
    return mask


class PolygonMasks:
    """Masks as lists of polygons, always on the CPU.

    Args:
        polygons: for each of N instances a list of flat coordinate arrays x0, y0, x1, y1, ... in pixels. An
            instance without polygons is an empty mask.

    Raises:
        ValueError: a polygon has an odd number of coordinates or fewer than three points.
    """

    def __init__(self, polygons: Sequence[Sequence[np.ndarray]]):
        self.polygons = [[np.asarray(p, dtype=np.float64) for p in instance] for instance in polygons]
        for polygon in (p for instance in self.polygons for p in instance):
            if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError(f"not a polygon of at least three x, y points: shape {polygon.shape}")

    def __len__(self) -> int:
        return len(self.polygons)

    def __getitem__(self, index: torch.Tensor) -> PolygonMasks:
        """Select instances by a bool (N,) or integer (K,) tensor."""
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        chosen = PolygonMasks([])
        chosen.polygons = [self.polygons[i] for i in index.tolist()]
        return chosen

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PolygonMasks:
        """Return itself: polygons stay on the CPU, the crops go to the device of the boxes."""
        return self

    def nonempty(self) -> torch.Tensor:
        """(N,) bool: the instance has at least one polygon."""
        return torch.tensor([bool(instance) for instance in self.polygons], dtype=torch.bool)

    def bounding_boxes(self) -> torch.Tensor:
        """Return (N, 4) float32 XYXY boxes around the polygons; inf, inf, 0, 0 for an empty mask, as in Detectron2."""
        boxes = torch.tensor([float("inf"), float("inf"), 0.0, 0.0]).repeat(len(self), 1)
        for box, instance in zip(boxes, self.polygons):
            if instance:
                points = torch.from_numpy(np.concatenate(instance).reshape(-1, 2)).float()
                box[:2] = points.amin(0)
                box[2:] = points.amax(0).clamp(min=0)
        return boxes

    def crop_and_resize(self, boxes: torch.Tensor, size: int) -> torch.Tensor:
        """Crop mask i to box i.

        Args:
            boxes: (N, 4) float32 XYXY in pixels, on any device.
            size: M.

        Returns:
            (N, M, M) bool on the device of `boxes`.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} masks")
        crops = np.zeros((len(self), size, size), dtype=bool)
        for crop, polygons, box in zip(crops, self.polygons, boxes.detach().cpu().numpy()):
            crop[:] = rasterize(_to_grid(polygons, box, size), size, size)
        return torch.from_numpy(crops).to(boxes.device)


def _to_grid(polygons: list[np.ndarray], box: np.ndarray, size: int) -> list[np.ndarray]:
    """Transform polygons from the image to the size x size grid that covers the box."""
    # The ratios stay float32 like the box: a float64 ratio would move a few pixels away from Detectron2's.
    sides = [max(side, SHORTEST_SIDE) for side in (box[2] - box[0], box[3] - box[1])]
    ratio = np.array([size / side for side in sides], dtype=np.float64)
    return [((p.reshape(-1, 2) - box[:2]) * ratio).reshape(-1) for p in polygons]


class BitMasks:
    """Masks as bitmaps.

    Indexing keeps the bitmaps and stores indices, so a hundred sampled proposals of ten objects cost ten bitmaps, not a
    hundred.

    Args:
        bitmaps: (U, H, W) bool, the distinct masks.
        index: (N,) int64, the bitmap of each instance; default: all in order.
    """

    def __init__(self, bitmaps: torch.Tensor, index: torch.Tensor | None = None):
        if bitmaps.dim() != 3:
            raise ValueError(f"bitmaps must be (N, H, W), not {tuple(bitmaps.shape)}")
        self.bitmaps = bitmaps.to(torch.bool)
        self.index = torch.arange(len(bitmaps), device=bitmaps.device) if index is None else index

    @property
    def tensor(self) -> torch.Tensor:
        """(N, H, W) bool, one bitmap per instance."""
        return self.bitmaps[self.index]

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: torch.Tensor) -> BitMasks:
        """Select instances by a bool (N,) or integer (K,) tensor."""
        return BitMasks(self.bitmaps, self.index[index.to(self.index.device)])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BitMasks:
        move = partial(torch.Tensor.to, device=device, non_blocking=non_blocking)
        return BitMasks(move(self.bitmaps), move(self.index))

    def nonempty(self) -> torch.Tensor:
        """(N,) bool: at least one pixel is set."""
        return self.bitmaps.flatten(1).any(1)[self.index]

    def bounding_boxes(self) -> torch.Tensor:
        """Return (N, 4) float32 XYXY boxes around the set pixels, whole pixels included; zeros for an empty mask."""
        sides = []
        for used in (self.bitmaps.any(1), self.bitmaps.any(2)):
            count = torch.arange(1, used.shape[1] + 1, device=used.device)
            last = (used * count).amax(1)
            first = used.shape[1] - (used * count.flip(0)).amax(1)
            sides.append((torch.where(used.any(1), first, 0), last))
        (x0, x1), (y0, y1) = sides
        return torch.stack([x0, y0, x1, y1], 1).float()[self.index]

    def crop_and_resize(self, boxes: torch.Tensor, size: int) -> torch.Tensor:
        """Crop mask i to box i: ROIAlign on the bitmap, at least half of the cell covered.

        Args:
            boxes: (N, 4) float32 XYXY in pixels.
            size: M.

        Returns:
            (N, M, M) bool on the device of the bitmaps.
        """
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} masks")
        boxes = boxes.detach().to(self.bitmaps.device, torch.float32)
        rois = torch.cat([self.index[:, None].to(boxes.dtype), boxes], 1)
        # The operator itself: torchvision's function has another form under deterministic algorithms, for a gradient.
        crops = torch.ops.torchvision.roi_align(self.bitmaps[:, None].float(), rois, 1.0, size, size, 0, True)
        return crops[:, 0] >= 0.5
