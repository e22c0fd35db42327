"""Test-time augmentation (TEST.AUG): detection on several sizes of an image and their mirror images, merged.

Shape legend: V views of an image, D detections, K classes, M mask side.
Source: detectron2/modeling/test_time_augmentation.py `GeneralizedRCNNWithTTA`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.instances import Instances
from loco_det.annotations.transforms import Flip, Resize, resize_short_side
from loco_det.detection.fast_rcnn import select_detections
from loco_det.detection.rcnn import GeneralizedRCNN, postprocess

VIEWS_AT_ONCE = 3  # Detectron2's; the padded batch size affects the last digits
LEAST_SCORE = 1e-8  # threshold of merged detections: all take part

Transforms = list[Resize | Flip]


class AugmentedRCNN(nn.Module):
    """Runs a detector on every image in each size of TEST.AUG.MIN_SIZES and, with FLIP, mirrored.

    Boxes of all views are merged by non-maximum suppression; the mask of a merged box is the mean over all views.

    Args:
        cfg: uses TEST.AUG, TEST.DETECTIONS_PER_IMAGE and MODEL.ROI_HEADS.
        model: the detector; the caller sets its mode.
    """

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.model = model
        self.settings = cfg.TEST.AUG
        self.num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.limits = LEAST_SCORE, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE
        self.mask_on = cfg.MODEL.MASK_ON

    def forward(self, batch: Sequence[dict[str, Any]]) -> list[Instances]:
        """Return detections of each image as `GeneralizedRCNN` does, in the original image's pixels."""
        return [self._detect(item) for item in batch]

    def _detect(self, item: dict[str, Any]) -> Instances:
        size = item.get("height", item["image"].shape[1]), item.get("width", item["image"].shape[2])
        views, all_transforms = zip(*self._views(item["image"], size))
        found = self._run(views, [None] * len(views), with_masks=False)
        boxes = [invert(one.boxes, transforms) for one, transforms in zip(found, all_transforms)]
        merged = self._merge(boxes, found, size)
        if not self.mask_on:
            return merged
        given = [
            Instances(tuple(view["image"].shape[1:]), apply(merged.boxes, transforms), merged.classes, merged.scores)
            for view, transforms in zip(views, all_transforms)
        ]
        masks = [one.masks for one in self._run(views, given, with_masks=True)]
        flipped = [any(isinstance(step, Flip) for step in transforms) for transforms in all_transforms]
        masks = [mask.flip(2) if flip else mask for mask, flip in zip(masks, flipped)]
        merged.masks = torch.stack(masks).mean(dim=0)
        return postprocess(merged, *size)

    def _views(self, image: torch.Tensor, size: tuple[int, int]) -> list[tuple[dict[str, Any], Transforms]]:
        """Return views of a uint8 (3, H, W) image, each with the transforms from the original of `size`."""
        pixels = image.permute(1, 2, 0).numpy()
        height, width = pixels.shape[:2]
        first: Transforms = [] if (height, width) == size else [Resize(*size, height, width)]
        views = []
        for short in self.settings.MIN_SIZES:
            resize = resize_short_side(height, width, short, self.settings.MAX_SIZE)
            resized = resize.image(pixels)
            views.append((resized, [*first, resize]))
            if self.settings.FLIP:
                flip = Flip(1, resize.new_width)
                views.append((flip.image(resized), [*first, resize, flip]))
        return [({"image": torch.from_numpy(view.transpose(2, 0, 1).copy())}, transforms) for view, transforms in views]

    def _run(self, views: Sequence[Any], given: Sequence[Instances | None], with_masks: bool) -> list[Instances]:
        found: list[Instances] = []
        for start in range(0, len(views), VIEWS_AT_ONCE):
            part = slice(start, start + VIEWS_AT_ONCE)
            known = None if given[start] is None else given[part]
            found += self.model.detect(views[part], known, with_masks)
        return found

    def _merge(self, boxes: list[torch.Tensor], found: Sequence[Instances], size: tuple[int, int]) -> Instances:
        """Merge the detections of one image's views, whose `boxes` are in the original's pixels."""
        classes = torch.cat([one.classes for one in found])
        scores = classes.new_zeros((len(classes), self.num_classes + 1), dtype=torch.float32)
        scores[torch.arange(len(classes), device=classes.device), classes] = torch.cat([one.scores for one in found])
        return select_detections(torch.cat(boxes), scores, size, *self.limits)


def apply(boxes: torch.Tensor, transforms: Transforms) -> torch.Tensor:
    """Transform (D, 4) float32 XYXY boxes from the original to a view, in Detectron2's float32 arithmetic."""
    for step in transforms:
        boxes = _mirror(boxes, step) if isinstance(step, Flip) else _scale(boxes, *step)
    return boxes


def invert(boxes: torch.Tensor, transforms: Transforms) -> torch.Tensor:
    """Transform (D, 4) boxes from a view back to the original."""
    for step in reversed(transforms):
        boxes = _mirror(boxes, step) if isinstance(step, Flip) else _scale(boxes, *step[2:], *step[:2])
    return boxes


def _mirror(boxes: torch.Tensor, flip: Flip) -> torch.Tensor:
    x0, y0, x1, y1 = boxes.unbind(1)
    return torch.stack([flip.length - x1, y0, flip.length - x0, y1], dim=1)


def _scale(boxes: torch.Tensor, height: int, width: int, new_height: int, new_width: int) -> torch.Tensor:
    x, y = new_width * 1.0 / width, new_height * 1.0 / height
    return boxes * boxes.new_tensor([x, y, x, y])
