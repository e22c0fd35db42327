"""Average recall of class-agnostic box proposals, and Detectron2's file format for them.

Shape legend: P proposals and G annotated objects of one image.
Source: detectron2/evaluation/coco_evaluation.py `_evaluate_box_proposals`, with equal numbers.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import box_iou

from loco_det.annotations.index import CocoIndex
from loco_det.annotations.instances import Instances
from loco_det.core.files import atomic_write
from loco_det.core.log import log
from loco_det.evaluation.bootstrap import Counted, Resamplable
from loco_det.evaluation.coco import EVALUATORS
from loco_det.evaluation.coco_checks import read_ground_truth
from loco_det.evaluation.measure import MatchesOnce, Subject

AREAS = {"": (0.0, 1e5**2), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e5**2)}
LIMITS = (100, 1000)


class Proposals(NamedTuple):
    """Proposals of one image: boxes (P, 4) XYXY in its pixels and logits (P,), both float32 on the CPU."""

    image_id: int
    boxes: torch.Tensor
    logits: torch.Tensor


class Measure(MatchesOnce):
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
        numbers = self.matched(results).numbers()
        log.info("%s: %s", self.dataset.name, ", ".join(f"{k} {v:.3f}" for k, v in numbers["box_proposals"].items()))
        return numbers

    def match(self, results: list[Proposals]) -> Outcomes:
        return proposal_outcomes(self.dataset.annotations, results)

    def resamplable(self, results: list[Proposals]) -> list[Resamplable]:
        return [self.matched(results, keep=True).counted()]


def evaluate_proposals(annotations: str | Path, proposals: Sequence[Proposals]) -> dict[str, dict[str, float]]:
    """Compute average recall in percent over IoU .50:.05:.95, under Detectron2's names.

    Proposals are assigned to objects greedily by IoU, each to one object; crowds are left out. As in Detectron2,
    objects of images without any proposal do not count.

    Args:
        annotations: ground truth in COCO format.
        proposals: proposals of every image.

    Returns:
        {"box_proposals": {"AR@100", "ARs@100", "ARm@100", "ARl@100", "AR@1000", ...}}; the letter is the size of
        objects, the number the proposals per image. NaN without objects.

    Raises:
        UserError: as `read_ground_truth`.
    """
    return proposal_outcomes(annotations, proposals).numbers()


@dataclass(frozen=True)
class Outcomes:
    """What became of every object.

    Attributes:
        covers: by name of the number the place of each object's image, and the object's IoU with its own proposal.
        images: how many there are.
    """

    covers: dict[str, tuple[np.ndarray, np.ndarray]]
    images: int

    def numbers(self) -> dict[str, dict[str, float]]:
        """As `evaluate_proposals`."""
        return {"box_proposals": {name: _average_recall(found) for name, (_, found) in self.covers.items()}}

    def counted(self) -> Counted:
        """Average recall for any draw of images."""
        # Of each object the share of thresholds at which it is covered, and its image.
        shares = {name: (image, _hits(found).mean(0)) for name, (image, found) in self.covers.items()}

        def measure(times: np.ndarray) -> list[float]:
            weighted = ((times[image], share) for image, share in shares.values())
            return [100 * float(w @ share / w.sum()) if w.any() else math.nan for w, share in weighted]

        return Counted("box_proposals", tuple(shares), self.images, measure)


def proposal_outcomes(annotations: str | Path, proposals: Sequence[Proposals]) -> Outcomes:
    """What `evaluate_proposals` makes its numbers of; takes and raises the same."""
    index = read_ground_truth(annotations, ("bbox",)).index
    return Outcomes(_covers(_cases(index, proposals)), len(index.image_id))


class _Case(NamedTuple):
    """One image: its index, IoU (P, G) float32 of its proposals, best first, and objects, area (G,)."""

    place: int
    iou: np.ndarray
    area: np.ndarray


def _cases(index: CocoIndex, proposals: Sequence[Proposals]) -> list[_Case]:
    """Return the images that have both objects and proposals."""
    objects = {}
    for k, image_id in enumerate(index.image_id.tolist()):
        rows = np.arange(index.first[k], index.first[k + 1])
        if len(rows := rows[~index.crowd[rows]]):
            objects[image_id] = (k, index.bbox[rows], index.area[rows])
    return [_case(p, *objects[p.image_id]) for p in proposals if p.image_id in objects and len(p.boxes)]


def _covers(cases: Sequence[_Case]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Map each number's name to every counted object's image index and IoU with its assigned proposal."""
    covers = {}
    for limit in LIMITS:
        for letter, (least, most) in AREAS.items():
            places, found = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
            for place, iou, area in cases:
                found.append(best_covers(iou[:limit][:, (area >= least) & (area <= most)]))
                places.append(np.full(len(found[-1]), place))
            covers[f"AR{letter}@{limit}"] = np.concatenate(places), np.concatenate(found)
    return covers


def _case(proposals: Proposals, place: int, bbox: np.ndarray, area: np.ndarray) -> _Case:
    """Build the case of an image whose objects' boxes are XYWH."""
    order = proposals.logits.sort(descending=True)[1]
    truth = torch.from_numpy(np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], 1)).float()
    iou = box_iou(proposals.boxes[order], truth).numpy()
    return _Case(place, iou, area.astype(np.float32))


def _average_recall(covers: np.ndarray) -> float:
    if not len(covers):
        return float("nan")
    return float((torch.from_numpy(_hits(covers)).float().sum(1) / float(len(covers))).mean()) * 100


def _hits(covers: np.ndarray) -> np.ndarray:
    """Return (T, G) bool: which objects are covered at each of the thresholds .50:.05:.95."""
    thresholds = torch.arange(0.5, 0.95 + 1e-5, 0.05, dtype=torch.float32)
    return (torch.from_numpy(covers) >= thresholds[:, None]).numpy()


def best_covers(iou: np.ndarray) -> np.ndarray:
    """Return (G,) IoU of each object with its assigned proposal, best covered object first; 0 without one.

    Args:
        iou: (P, G) float32; each proposal is assigned once.
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

    Both programs read it through DATASETS.PROPOSAL_FILES_TRAIN and PROPOSAL_FILES_TEST.
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
