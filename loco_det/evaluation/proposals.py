"""Average recall of class-free box proposals, and Detectron2's file of them.

Shape legend: P proposals and G annotated objects of one image.
Source: detectron2/evaluation/coco_evaluation.py `_evaluate_box_proposals`, whose numbers these are.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from loco_det.annotations.instances import Instances
from loco_det.core.files import atomic_write
from loco_det.core.log import log
from loco_det.evaluation.coco import EVALUATORS
from loco_det.evaluation.coco_checks import read_ground_truth
from loco_det.evaluation.measure import Subject

AREAS = {"": (0.0, 1e5**2), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e5**2)}
LIMITS = (100, 1000)


class Proposals(NamedTuple):
    """Proposals of one image: boxes (P, 4) XYXY in its pixels and logits (P,), both float32 on the CPU."""

    image_id: int
    boxes: torch.Tensor
    logits: torch.Tensor


class Measure:
    """Average recall of a proposal network's boxes."""

    evaluators = EVALUATORS

    def __init__(self, subject: Subject) -> None:
        self.dataset, self.folder = subject.dataset, subject.folder

    def collect(self, image_id: int, file_name: str, found: Instances) -> list[Proposals]:
        return [Proposals(image_id, found.boxes.float().cpu(), found.scores.float().cpu())]

    def write(self, results: list[Proposals]) -> None:
        results.sort(key=lambda proposals: proposals.image_id)
        file = write_proposals(self.folder.parent, results)
        log.info("%s: proposals of %d images written to %s", self.dataset.name, len(results), file)

    def evaluate(self, results: list[Proposals]) -> dict[str, dict[str, float]]:
        numbers = evaluate_proposals(self.dataset.annotations, results)
        log.info("%s: %s", self.dataset.name, ", ".join(f"{k} {v:.3f}" for k, v in numbers["box_proposals"].items()))
        return numbers


def evaluate_proposals(annotations: str | Path, proposals: Sequence[Proposals]) -> dict[str, dict[str, float]]:
    """Average recall in percent over IoU .50:.05:.95, under Detectron2's names.

    Each object counts with the best proposal that no better covered object has taken; crowds are left out. As in
    Detectron2, objects of images without any proposal do not count either.

    Args:
        annotations: ground truth in COCO format.
        proposals: of every image.

    Returns:
        {"box_proposals": {"AR@100", "ARs@100", "ARm@100", "ARl@100", "AR@1000", ...}}; the letter is the size of the
        objects, the number how many proposals of an image count. NaN where there is no object to find.

    Raises:
        UserError: as `read_ground_truth`.
    """
    index = read_ground_truth(annotations, ("bbox",)).index
    objects = {}
    for k, image_id in enumerate(index.image_id.tolist()):
        rows = np.arange(index.first[k], index.first[k + 1])
        if len(rows := rows[~index.crowd[rows]]):
            objects[image_id] = (index.bbox[rows], index.area[rows])
    cases = [_case(p, *objects[p.image_id]) for p in proposals if p.image_id in objects and len(p.boxes)]
    recalls = {}
    for limit in LIMITS:
        for letter, (least, most) in AREAS.items():
            chosen = [iou[:limit][:, (area >= least) & (area <= most)] for iou, area in cases]
            recalls[f"AR{letter}@{limit}"] = _average_recall(chosen)
    return {"box_proposals": recalls}


def _case(proposals: Proposals, bbox: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU (P, G) float32, best proposals first, and area (G,) of one image's objects, whose boxes are XYWH."""
    order = proposals.logits.sort(descending=True)[1]
    truth = torch.from_numpy(np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], 1)).float()
    iou = box_iou(proposals.boxes[order], truth).numpy()
    return iou, area.astype(np.float32)


def _average_recall(cases: list[np.ndarray]) -> float:
    found = np.concatenate([np.zeros(0, np.float32), *map(best_covers, cases)])
    count = len(found)
    if not count:
        return float("nan")
    thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05, dtype=torch.float32)
    hits = (torch.from_numpy(found) >= thresholds[:, None]).float().sum(1)
    return float((hits / float(count)).mean()) * 100


def best_covers(iou: np.ndarray) -> np.ndarray:
    """(G,) IoU of each object with its own proposal, best covered object first; 0 where no proposal is left.

    Args:
        iou: (P, G) float32; each proposal serves one object.
    """
    iou = iou.copy()
    covers = np.zeros(iou.shape[1], np.float32)
    for index in range(min(iou.shape)):
        best = iou.argmax(0)
        values = iou[best, np.arange(iou.shape[1])]
        thing = int(values.argmax())
        covers[index] = values[thing]
        iou[best[thing], :] = -1
        iou[:, thing] = -1
    return covers


def write_proposals(output_dir: str | Path, proposals: Sequence[Proposals]) -> Path:
    """Write OUTPUT_DIR/inference/box_proposals.pkl as Detectron2 does; returns its path.

    It is what DATASETS.PROPOSAL_FILES_TRAIN and PROPOSAL_FILES_TEST name, in either program.
    """
    path = Path(output_dir) / "inference" / "box_proposals.pkl"
    content = {
        "boxes": [p.boxes.numpy() for p in proposals],
        "objectness_logits": [p.logits.numpy() for p in proposals],
        "ids": [p.image_id for p in proposals],
        "bbox_mode": 0,  # XYXY in pixels
    }
    with atomic_write(path) as file:
        pickle.dump(content, file)
    return path
