"""Fast R-CNN: proposals from a file instead of an RPN (MODEL.LOAD_PROPOSALS, DATASETS.PROPOSAL_FILES_*).

Reads Detectron2's box_proposals.pkl, or Detectron's; a run of META_ARCHITECTURE ProposalNetwork writes one. Nothing in
them is executed. Source: detectron2/data/build.py `load_proposals_into_dataset`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from loco_det.annotations.mapper import ProposalsOfImage
from loco_det.convert.load import load_tensors
from loco_det.core.errors import UserError
from loco_det.core.log import log

OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}
XYXY, XYWH = 0, 1  # of Detectron2's BoxMode, in pixels


def load_proposals(cfg: CfgNode, split: str) -> list[dict[str, ProposalsOfImage]] | None:
    """Load proposals for every data set of DATASETS.TRAIN or TEST (`split`), by image id; None without LOAD_PROPOSALS.

    Raises:
        UserError: not one file per data set, or an invalid file.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return None
    names, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
    if len(names) != len(files):
        raise UserError(
            f"DATASETS.PROPOSAL_FILES_{split} has {len(files)} files for the {len(names)} data sets of "
            f"DATASETS.{split}; MODEL.LOAD_PROPOSALS needs one for each."
        )
    return [read_proposals(file) for file in files]


def read_proposals(path: str | Path) -> dict[str, ProposalsOfImage]:
    """Read {image id: (boxes (P, 4) float32 XYXY in pixels, logits (P,) float32)}, best first.

    Raises:
        UserError: no such file, damaged, not plain data, or not a file of proposals.
    """
    if "://" in str(path):
        raise UserError(f"DATASETS: the proposals {path} are not a file; download them and give the path.")
    proposals = _by_image(path, load_tensors(Path(os.path.expanduser(path))))
    log.info("proposals of %d images from %s", len(proposals), path)
    return proposals


def _by_image(path: str | Path, content: dict[str, Any]) -> dict[str, ProposalsOfImage]:
    content = {OLD_NAMES.get(name, name): value for name, value in content.items()}
    columns = [content.get(name) for name in ("ids", "boxes", "objectness_logits")]
    mode = content.get("bbox_mode", XYXY)
    lists = [column for column in columns if isinstance(column, list | tuple)]
    if len(lists) != 3 or len(set(map(len, lists))) != 1 or not isinstance(mode, int) or mode not in (XYXY, XYWH):
        raise UserError(
            f"{path}: must hold lists 'ids', 'boxes' and 'objectness_logits' of equal length and bbox_mode 0 or 1; "
            "give a box_proposals.pkl."
        )
    found = {}
    for image_id, boxes, logits in zip(*columns):
        boxes, logits = _numbers(path, image_id, "boxes", boxes), _numbers(path, image_id, "logits", logits)
        if boxes.ndim != 2 or boxes.shape[1:] != (4,) or logits.shape != boxes.shape[:1]:
            raise UserError(
                f"{path}: image {image_id} has boxes {boxes.shape} and logits {logits.shape}; they must be (P, 4) and "
                "(P,)."
            )
        order = logits.argsort()[::-1]  # Detectron2's order among ties
        boxes = boxes[order].astype(np.float32)
        if mode == XYWH:
            boxes[:, 2:] += boxes[:, :2]
        found[str(image_id)] = boxes, logits[order].astype(np.float32)
    return found


def _numbers(path: str | Path, image_id: Any, what: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # an unknown dtype, or rows of unequal lengths
        array = np.array(None)
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise UserError(
            f"{path}: image {image_id} has {what} that are no array of finite numbers; correct them or write the file "
            "again."
        )
    return array
