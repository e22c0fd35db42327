"""Cityscapes through the train command's code: a few steps, official AP, and the file that can be submitted."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from cityscapes_cases import write_cityscapes
from tiny_detection import tiny_cfg

from loco_det.detection.train import train_net
from loco_det.errors import UserError

pytest.importorskip("shapely", reason="shapely is not installed (extra cityscapes)")

NAME = "cityscapes_fine_instance_seg"
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("data")
    write_cityscapes(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.setenv("LOCO_DET_CACHE", str(root / "cache"))
        yield root


def cfg(folder: Path, **changes: object):
    return tiny_cfg(
        folder,
        **{
            "MODEL__ROI_HEADS__NUM_CLASSES": 8,
            "DATASETS__TRAIN": (f"{NAME}_train",),
            "DATASETS__TEST": (f"{NAME}_val",),
            "SOLVER__MAX_ITER": 2,
            "SOLVER__STEPS": (1,),
            **changes,
        },
    )


def available(engine: str) -> None:
    if engine == "detectron2":
        pytest.importorskip("detectron2")


@pytest.mark.parametrize("engine", ENGINES)
def test_training_and_both_evaluators(engine: str, tmp_path: Path) -> None:
    available(engine)
    found = train_net(cfg(tmp_path / "run"), engine=engine)
    assert set(found) == {"segm"}
    assert {"AP", "AP50", "AP-car", "AP-bicycle"} <= set(found["segm"])
    assert json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    last = json.loads((tmp_path / "run/metrics.json").read_text().splitlines()[-1])
    assert last["segm/AP"] == found["segm"]["AP"]
    pytest.importorskip("cityscapesscripts")
    weights = {"MODEL__WEIGHTS": tmp_path / "run/model_final.pth"}
    again = train_net(cfg(tmp_path / "eval", **weights), engine=engine, eval_only=True, evaluator="cityscapesscripts")
    assert again["segm"] == pytest.approx(found["segm"], rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_test_split_leaves_a_submission(engine: str, tmp_path: Path) -> None:
    available(engine)
    run = cfg(tmp_path, DATASETS__TEST=(f"{NAME}_test",), SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    assert train_net(run, engine=engine) == {}
    with zipfile.ZipFile(tmp_path / "inference/cityscapes_submission.zip") as archive:
        names = archive.namelist()
    assert sum(name.endswith("_pred.txt") for name in names) == 4
    assert sum(name.endswith(".png") for name in names) > 0


def test_exact_masks_and_boxes_alone(tmp_path: Path) -> None:
    masks = cfg(tmp_path / "m", DATASETS__TRAIN=(f"{NAME}_train@masks",), INPUT__MASK_FORMAT="bitmask")
    assert "AP" in train_net(masks, engine="torchvision")["segm"]
    boxes = train_net(cfg(tmp_path / "b", MODEL__MASK_ON=False), engine="torchvision")
    assert set(boxes) == {"bbox"}  # the benchmark has no measure of boxes: COCO's


@pytest.mark.parametrize(
    ("evaluator", "changes", "message"),
    [
        ("pycocotools", {}, "pycocotools does not measure.*cityscapesscripts or nothing"),
        ("cityscapesscripts", {"MODEL__MASK_ON": False}, "cityscapesscripts does not measure.*hotcoco"),
    ],
)
def test_evaluators_that_do_not_fit_are_refused_first(evaluator: str, changes: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        train_net(cfg(tmp_path, **changes), engine="torchvision", evaluator=evaluator)
    assert not (tmp_path / "metrics.json").exists()
