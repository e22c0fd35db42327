"""Maps an annotated image on disk to the detector's training input.

Equals Detectron2's default mapper (data/dataset_mapper.py) for the same random draws, bit for bit: image, boxes,
classes and masks. Two differences are intended: coordinates written as whole numbers in JSON are scaled like any
others, while Detectron2 truncates their decimals; and the padding of large-scale jitter belongs to no object, while
Detectron2 adds it to every mask that is written as an RLE.

Shape legend: H x W the image after the transforms, N its annotated objects.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from pycocotools import mask as coco_mask

from loco_det.annotations.coco import Record, decode_segmentation, size_problem
from loco_det.annotations.instances import Instances
from loco_det.annotations.masks import BitMasks, PolygonMasks, rasterize
from loco_det.annotations.transforms import (
    ScaleJitter,
    Transform,
    check_input,
    draw_scale_jitter,
    draw_transforms,
    resize_short_side,
)
from loco_det.core.errors import UserError
from loco_det.core.own_keys import own_value
from loco_det.images.decode import read_image

# Pixels; objects with a box no wider or higher than this after the transforms are dropped.
SMALLEST_SIDE = 1e-5

# Boxes (P, 4) float32 XYXY in pixels of the original image and logits (P,) float32, best first.
ProposalsOfImage = tuple[np.ndarray, np.ndarray]


def sample_rng(seed: int, position: int) -> np.random.RandomState:
    """Return the random generator of one sample, which depends only on the run's seed and the position in the stream.

    RandomState, because its stream is fixed forever, unlike Generator's, and because Detectron2 uses it, so that
    equality is testable.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, position])))


class DetectionMapper:
    """Converts a `Record` into the model's input dict.

    Args:
        cfg: Detectron2's keys; uses INPUT, MODEL.META_ARCHITECTURE, MODEL.MASK_ON and
            DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*.
        train: with random transforms and "instances"; otherwise resized for testing, without them.

    Raises:
        UserError: an invalid value in INPUT.
    """

    def __init__(self, cfg: CfgNode, train: bool):
        check_input(cfg.INPUT)
        self.input = cfg.INPUT
        self.with_masks = bool(cfg.MODEL.MASK_ON)
        self.semantic = cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
        self.train = train
        scales = own_value(cfg, "INPUT.SCALE_JITTER")
        square = own_value(cfg, "INPUT.SCALE_JITTER_SIZE"), own_value(cfg, "INPUT.SCALE_JITTER_PAD")
        self.jitter = ScaleJitter(*scales, *square) if scales else None
        limits = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        self.most_proposals = limits[0 if train else 1]

    def __call__(
        self,
        record: Record,
        rng: np.random.RandomState | None = None,
        proposals: ProposalsOfImage | None = None,
    ) -> dict[str, Any]:
        """Map one sample.

        Args:
            rng: source of the random transforms; for training only.
            proposals: precomputed, in the original image.

        Returns:
            file_name, image_id, height, width: as in the record, i.e. of the original image.
            image: (3, H, W) uint8 in INPUT.FORMAT order.
            instances: training only, `Instances` in pixels of `image` without crowds and empty objects.
            sem_seg: instead, for a semantic segmentor, (H, W) int64 classes or IGNORED of annotations/pixels.py.
            empty_masks: training only, if there are any, ids of annotations dropped because their mask has no pixel,
                regardless of the transforms.
            proposals: if given, the best non-empty DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{TRAIN,TEST}, as `Instances` in
                pixels of `image` with boxes and scores.

        Raises:
            UserError: the image is unreadable or of another size, or a segmentation missing or malformed.
        """
        image = read_image(record.file_name, self.input.FORMAT)
        if image.shape[:2] != (record.height, record.width):
            found = image.shape[1], image.shape[0]
            raise UserError(size_problem(record.file_name, found, record.image_id, (record.width, record.height)))
        transforms = self._transforms(record, rng)
        for transform in transforms:
            image = transform.image(image)
        sample: dict[str, Any] = {
            "file_name": record.file_name,
            "image_id": record.image_id,
            "height": record.height,
            "width": record.width,
            "image": torch.from_numpy(image.transpose(2, 0, 1).copy()),
        }
        if self.train and self.semantic:
            sample["sem_seg"] = self._labels(record, transforms)
        elif self.train:
            empty: list[int] = []
            sample["instances"] = self._instances(record, transforms, image.shape[:2], empty)
            if empty:
                sample["empty_masks"] = empty
        if proposals is not None:
            sample["proposals"] = self._proposals(proposals, transforms, image.shape[:2])
        return sample

    def _transforms(self, record: Record, rng: np.random.RandomState | None) -> list[Transform]:
        if self.train and self.jitter:
            return draw_scale_jitter(self.jitter, self.input.RANDOM_FLIP, record.height, record.width, rng)
        if self.train:
            return draw_transforms(self.input, record.height, record.width, rng)
        if self.input.MIN_SIZE_TEST == 0:
            return []
        size = (record.height, record.width, self.input.MIN_SIZE_TEST, self.input.MAX_SIZE_TEST)
        return [resize_short_side(*size)]

    def _labels(self, record: Record, transforms: list[Transform]) -> torch.Tensor:
        labels = record.labels.read(record.file_name, (record.height, record.width))
        for transform in transforms:
            labels = transform.labels(labels)
        return torch.from_numpy(labels.astype(np.int64))

    def _instances(
        self, record: Record, transforms: list[Transform], size: tuple[int, int], empty: list[int]
    ) -> Instances:
        """Build the instances; appends to `empty` the annotations whose mask has no pixel."""
        rows = np.flatnonzero(~record.crowd)
        boxes = move_boxes(record.boxes[rows].astype(np.float64), transforms, size)
        instances = Instances(
            size,
            boxes=torch.from_numpy(boxes).float(),
            classes=torch.from_numpy(record.classes[rows]),
        )
        keep = torch.ones(len(rows), dtype=torch.bool)
        if self.with_masks:
            instances.masks = self._masks(record, rows, transforms, size, empty)
            keep = instances.masks.nonempty()
            if self.input.CROP.ENABLED or self.jitter:
                # A clipped box of a clipped object is not tight: a triangle's tip may lie outside the window.
                instances.boxes = instances.masks.bounding_boxes()
        sides = instances.boxes[:, 2:] - instances.boxes[:, :2]
        return instances[keep & (sides > SMALLEST_SIDE).all(1)]

    def _proposals(self, proposals: ProposalsOfImage, transforms: list[Transform], size: tuple[int, int]) -> Instances:
        boxes = torch.from_numpy(move_boxes(proposals[0], transforms, size))
        moved = Instances(size, boxes=boxes, scores=torch.from_numpy(proposals[1]))
        keep = (boxes[:, 2:] - boxes[:, :2] > 0).all(1).nonzero().squeeze(1)
        return moved[keep[: self.most_proposals]]

    def _masks(
        self,
        record: Record,
        rows: np.ndarray,
        transforms: list[Transform],
        size: tuple[int, int],
        empty: list[int],
    ) -> PolygonMasks | BitMasks:
        as_polygons = self.input.MASK_FORMAT == "polygon"
        masks: list[Any] = []
        for k in rows:
            segmentation = decode_segmentation(record, k)
            which = f"{record.file_name}: annotation id {record.annotation_ids[k]}"
            if segmentation is None:
                raise UserError(f"{which} has no segmentation; set MODEL.MASK_ON False to train on boxes alone.")
            if isinstance(segmentation, list):
                moved = segmentation
                for transform in transforms:
                    moved = transform.polygons(moved)
                masks.append(moved if as_polygons else rasterize(moved, *size))
                drawn = as_polygons or masks[-1].any() or rasterize(segmentation, record.height, record.width).any()
                if not drawn:
                    empty.append(int(record.annotation_ids[k]))
                continue
            if as_polygons:
                raise UserError(f"{which} is an RLE and not a polygon; set INPUT.MASK_FORMAT bitmask.")
            bitmap = coco_mask.decode(segmentation)
            if not coco_mask.area(segmentation):
                empty.append(int(record.annotation_ids[k]))
            for transform in transforms:
                bitmap = transform.mask(bitmap)
            masks.append(bitmap.astype(bool))
        if as_polygons:
            return PolygonMasks(masks)
        return BitMasks(torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *size, dtype=torch.bool))


def move_boxes(boxes: np.ndarray, transforms: list[Transform], size: tuple[int, int]) -> np.ndarray:
    """Transform (N, 4) XYXY boxes and clip them to an image of `size` (H, W); keeps their dtype."""
    corners = boxes.reshape(-1, 2)
    for transform in transforms:
        corners = transform.points(corners)
    corners = np.clip(corners, 0, np.array(size[::-1], corners.dtype)).reshape(-1, 2, 2)
    return np.concatenate([corners.min(1), corners.max(1)], 1)
