"""Proposals, their recall, several views and precise BatchNorm against Detectron2, and through both engines."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import detection_cases as cases
import numpy as np
import pytest
import torch
from tiny_detection import tiny_cfg

from loco_det.annotations.mapper import DetectionMapper
from loco_det.annotations.transforms import Crop, Flip, Resize
from loco_det.detection import precise_bn
from loco_det.detection.keys import get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.evaluation.proposals import Proposals, evaluate_proposals

pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread", "tiny_data"),
]
pytest.importorskip("detectron2")

SHORT = {"SOLVER__MAX_ITER": 3, "SOLVER__STEPS": (2,)}
FAST = {
    "MODEL__MASK_ON": False,
    "MODEL__LOAD_PROPOSALS": True,
    "MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals",
}
RUNS: dict[str, dict[str, Any]] = {
    "augmented": {"TEST__AUG__ENABLED": True, "TEST__AUG__MIN_SIZES": (48, 64), "TEST__AUG__MAX_SIZE": 90},
    "proposals": {"MODEL__META_ARCHITECTURE": "ProposalNetwork", "MODEL__MASK_ON": False},
    "fast": FAST,
    "cascade": {"MODEL__ROI_HEADS__NAME": "CascadeROIHeads", "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True},
    "precise": {"MODEL__FPN__NORM": "BN", "TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2},
}


@pytest.fixture(scope="module")
def file_of_proposals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty proposals for each of the six images."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(-5, 40, (6, 20, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (6, 20, 2))], 2).astype(np.float32)
    content = {"ids": list(range(1, 7)), "boxes": list(boxes), "bbox_mode": 0}
    content["objectness_logits"] = list(rng.normal(size=(6, 20)).astype(np.float32))
    path = tmp_path_factory.mktemp("proposals") / "box_proposals.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("writer", "reader"), [("torchvision", "detectron2"), ("detectron2", "torchvision")])
def test_a_checkpoint_of_one_engine_has_the_same_results_in_the_other(
    name: str, writer: str, reader: str, tmp_path: Path, file_of_proposals: Path
) -> None:
    files = {f"DATASETS__PROPOSAL_FILES_{split}": (str(file_of_proposals),) for split in ("TRAIN", "TEST")}
    changes = {**RUNS[name], **SHORT, **(files if name == "fast" else {})}
    written = train_net(tiny_cfg(tmp_path / "written", **changes), engine=writer)
    weights = {"MODEL__WEIGHTS": tmp_path / "written" / "model_final.pth"}
    read = train_net(tiny_cfg(tmp_path / "read", **changes, **weights), engine=reader, eval_only=True)
    assert set(read) == set(written)
    for kind, numbers in written.items():
        assert read[kind] == pytest.approx(numbers, abs=1e-9, nan_ok=True)
    assert ("bbox_TTA" in read) == (name == "augmented")
    assert ("box_proposals" in read) == (name == "proposals")
    for folder in ("inference", "inference_TTA"):
        paths = [tmp_path / run / folder / "coco_instances_results.json" for run in ("written", "read")]
        assert paths[0].exists() == paths[1].exists()
        if paths[0].exists():
            assert json.loads(paths[0].read_text()) == json.loads(paths[1].read_text())


def test_average_recall_is_detectron2s(tmp_path: Path) -> None:
    from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
    from detectron2.structures import Boxes, Instances
    from pycocotools.coco import COCO

    rng = np.random.default_rng(5)
    images, annotations, ours, theirs = [], [], [], []
    for image in range(1, 13):
        images.append({"id": image, "width": 400, "height": 400})
        count = int(rng.integers(0, 9))
        corner, side = rng.uniform(0, 200, (count, 2)), rng.uniform(8, 190, (count, 2))
        for (x, y), (w, h) in zip(corner.tolist(), side.tolist()):
            area = w * h * rng.uniform(0.5, 1)  # of the mask, as in COCO
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": [x, y, w, h],
                 "area": area, "iscrowd": int(rng.uniform() < 0.1)}
            )  # fmt: skip
        near = np.repeat(np.concatenate([corner, corner + side], 1), 30, 0)
        boxes = np.concatenate([near + rng.normal(0, 8, near.shape), rng.uniform(0, 400, (30, 4))])
        boxes = torch.tensor(boxes if image != 7 else np.zeros((0, 4))).float()
        logits = torch.from_numpy(rng.normal(size=len(boxes))).float()
        ours.append(Proposals(image, boxes, logits))
        instances = Instances((400, 400), proposal_boxes=Boxes(boxes), objectness_logits=logits)
        theirs.append({"image_id": image, "proposals": instances})
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}))
    found = evaluate_proposals(path, ours)["box_proposals"]
    areas = {"all": "", "small": "s", "medium": "m", "large": "l"}
    for area, letter in areas.items():
        for limit in (100, 1000):
            stats = _evaluate_box_proposals(theirs, COCO(str(path)), area=area, limit=limit)
            assert found[f"AR{letter}@{limit}"] == float(stats["ar"].item() * 100), (area, limit)


@pytest.mark.parametrize("train", [True, False])
def test_proposals_are_moved_as_detectron2_moves_them(train: bool) -> None:
    from detectron2.data.detection_utils import transform_proposals
    from detectron2.data.transforms import CropTransform, HFlipTransform, ResizeTransform, TransformList
    from detectron2.structures import BoxMode

    rng = np.random.default_rng(2)
    corner = rng.uniform(-20, 150, (300, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 90, (300, 2))], 1).astype(np.float32)
    logits = np.sort(rng.normal(size=300).astype(np.float32))[::-1].copy()
    ours = [Crop(13, 7, 150, 120), Resize(120, 150, 333, 416), Flip(1, 416)]
    theirs = [CropTransform(13, 7, 150, 120), ResizeTransform(120, 150, 333, 416), HFlipTransform(416)]
    cfg = get_cfg()
    cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN, cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST = 150, 40
    for keep in ((0, 1, 2), (1, 2), (1,)):
        moved = DetectionMapper(cfg, train)._proposals((boxes, logits), [ours[i] for i in keep], (333, 416))
        record = {"proposal_boxes": boxes, "proposal_objectness_logits": logits}
        record["proposal_bbox_mode"] = BoxMode.XYXY_ABS
        transforms = TransformList([theirs[i] for i in keep])
        transform_proposals(record, (333, 416), transforms, proposal_topk=150 if train else 40)
        assert torch.equal(moved.boxes, record["proposals"].proposal_boxes.tensor)
        assert torch.equal(moved.scores, record["proposals"].objectness_logits)
        assert len(moved) == (150 if train else 40)


def test_precise_statistics_are_those_of_detectron2s_hook() -> None:
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.engine.hooks import PreciseBN
    from detectron2.modeling import build_model as detectron2_model

    settings = (cases.FPN, cases.ALL_SYNCBN, {"MODEL.BACKBONE.FREEZE_AT": 2, "TEST.PRECISE_BN.NUM_ITER": 3})
    cfg = cases.configure(get_cfg(), *settings)
    theirs = cases.formula_weights(detectron2_model(cases.configure(detectron2_cfg(), *settings))).train()
    ours = cases.formula_weights(build_model(cfg)).train()

    def batches(batch: list[Any]) -> list[list[Any]]:
        return [batch, batch[1:], batch[:1], batch, batch[1:], batch[:1]]

    engine = SimpleNamespace(
        train_batches=lambda cfg, start: batches(cases.our_batch(train=True))[start:],
        losses=lambda model, batch: model(batch),
    )
    hook = PreciseBN(2, theirs, batches(cases.detectron2_batch(train=True)), 3)
    cfg.TEST.EVAL_PERIOD = 2
    for iteration in (1, 3):  # each time the next three batches
        torch.manual_seed(9)
        hook.update_stats()
        torch.manual_seed(9)
        precise_bn.recompute(cfg, engine, ours, iteration)
        after = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, after[name]), name
