"""`loco-det predict` on files that Detectron2 wrote, by either engine, against Detectron2's own predictor."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from test_predict import CONFIG, SETTINGS
from tiny_detection import write_tiny

from loco_det.cli import main
from loco_det.core.config import load_config
from loco_det.detection import engine_d2
from loco_det.detection.keys import get_cfg

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2")

THRESHOLD = 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, and one detector as Detectron2's checkpointer and as its model zoo write them."""
    from detectron2.checkpoint import DetectionCheckpointer

    root = write_tiny(tmp_path_factory.mktemp("predict_d2"))
    torch.manual_seed(0)
    model = engine_d2.Detectron2Engine().build_model(load_config(get_cfg(), CONFIG, SETTINGS)[0])
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    DetectionCheckpointer(model, str(root)).save("model_final", iteration=5)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    (root / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return root


def expected(place: Path) -> list[list[dict[str, Any]]]:
    """What Detectron2's DefaultPredictor finds in every image, by descending score."""
    from detectron2.engine import DefaultPredictor

    cfg = load_config(get_cfg(), CONFIG, [*SETTINGS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", str(THRESHOLD)])[0]
    native = engine_d2._native(cfg)
    native.MODEL.WEIGHTS = str(place / "model_final.pth")
    native.DATASETS.TEST = ()
    predictor = DefaultPredictor(native)
    found = []
    for path in sorted((place / "tiny" / "val").glob("*.png")):
        instances = predictor(cv2.imread(str(path)))["instances"]
        columns = instances.pred_boxes.tensor, instances.scores, instances.pred_classes, instances.pred_masks
        found.append([dict(zip(("box", "score", "class", "mask"), row)) for row in zip(*columns)])
    return found


@pytest.mark.parametrize("engine", ["torchvision", "detectron2"])
@pytest.mark.parametrize("weights", ["model_final.pth", "zoo.pkl"])
def test_it_finds_what_detectron2_finds(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, engine: str
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(place))
    fixed = ["--config-file", CONFIG, "--weights", place / weights, "--engine", engine, "--out", tmp_path, "--exact"]
    choices = ["--batch-size", 1, "--score-threshold", THRESHOLD, "--opts", *SETTINGS]
    assert main(["predict", *map(str, [place / "tiny" / "val", *fixed, *choices])]) == 0
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    truth = expected(place)
    assert sum(map(len, truth)) == len(results) > 6
    categories = [3, 7]
    for number, theirs in enumerate(truth, start=1):
        ours = [r for r in results if r["image_id"] == number]
        for mine, other in zip(ours, theirs, strict=True):
            corner, opposite = other["box"].split(2)
            assert mine["bbox"] == [*corner.tolist(), *(opposite - corner).tolist()]
            assert mine["score"] == other["score"].item()
            assert mine["category_id"] == categories[other["class"]]
            assert np.array_equal(coco_mask.decode(mine["segmentation"]), other["mask"].numpy())
    assert len(list(tmp_path.glob("*.png"))) == 6
