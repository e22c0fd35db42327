"""Cityscapes through the train command's code: a few steps, official AP, and the file that can be submitted."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cityscapes_cases import noisy_results, write_cityscapes
from tiny_detection import tiny_cfg

from loco_det.annotations.registry import find_dataset
from loco_det.cli import run_job
from loco_det.core.errors import UserError
from loco_det.detection.train import train_net
from loco_det.evaluation.cityscapes import cityscapes_outcomes, evaluate_cityscapes, in_percent
from loco_det.report.analysis import experiments
from loco_det.report.runs import find_runs

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


def test_paired_bootstrap_against_all_draws_of_three_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_cityscapes(tmp_path / "three", images=3)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "three"))
    paths = find_dataset(f"{NAME}_val")
    train_net(cfg(tmp_path / "one"), engine="torchvision")
    (tmp_path / "one/SHA256SUMS").unlink()  # the results below are not what the run wrote
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    outcomes = {}
    for seed, name in enumerate(("one", "two")):
        results = noisy_results(root, paths.annotations, "val", seed)
        (tmp_path / name / "inference/coco_instances_results.json").write_text(json.dumps(results))
        numbers = evaluate_cityscapes(paths.annotations, paths.images, results)["segm"]
        flat = {f"segm/{key}": None if math.isnan(value) else value for key, value in numbers.items()}
        (tmp_path / name / "metrics.json").write_text(json.dumps({"iteration": 1, **flat}) + "\n")
        outcomes[name] = cityscapes_outcomes(paths.annotations, paths.images, results)

    def difference(images: tuple[int, ...]) -> float:
        times = np.bincount(images, minlength=3)
        one, two = (in_percent(outcomes[name].precision(times))["AP50"] for name in ("one", "two"))
        return two - one

    missing: list[str] = []
    runs = find_runs([f"{n}={tmp_path / n}" for n in ("one", "two")])
    (found,) = experiments(runs, None, 2000, missing)
    assert missing == []
    (pair,) = found["paired"]
    drawn = [difference(images) for images in itertools.product(range(3), repeat=3)]
    assert (pair["backbone"], pair["images"], set(pair["segm"])) == ("two", 3, {"AP", "AP50"})
    assert pair["segm"]["AP50"]["difference"] == pytest.approx(difference((0, 1, 2)))
    # One image three times is one draw of 27, so the least and the greatest difference have more than 2.5 % each.
    assert pair["segm"]["AP50"]["ci95"] == pytest.approx([min(drawn), max(drawn)])
    argv = [*(f"{n}={tmp_path / n}" for n in ("one", "two")), "--bootstrap", "10", "--out", str(tmp_path / "page")]
    assert run_job("report", argv) == 0
    page = (tmp_path / "page/index.html").read_text()
    assert "10 resamples of 3 images" in page

    lines = (tmp_path / "two/metrics.json").read_text()
    (tmp_path / "two/metrics.json").write_text(lines.replace('"segm/AP": ', '"segm/AP": 1'))
    experiments(find_runs([f"{n}={tmp_path / n}" for n in ("one", "two")]), None, 10, missing)
    assert "evaluate it again" in missing.pop()
    (tmp_path / "two/inference/coco_instances_results.json").unlink()
    experiments(runs, None, 10, missing)
    assert "coco_instances_results.json) are not there, so no paired differences" in missing.pop()


def test_exact_masks_and_boxes_alone(tmp_path: Path) -> None:
    masks = cfg(tmp_path / "m", DATASETS__TRAIN=(f"{NAME}_train@masks",), INPUT__MASK_FORMAT="bitmask")
    assert "AP" in train_net(masks, engine="torchvision")["segm"]
    boxes = train_net(cfg(tmp_path / "b", MODEL__MASK_ON=False), engine="torchvision")
    assert set(boxes) == {"bbox"}  # the benchmark has no measure of boxes: COCO's


@pytest.mark.parametrize(
    ("evaluator", "changes", "message"),
    [
        ("pycocotools", {}, "pycocotools does not measure.*cityscapesscripts or nothing"),
        ("cityscapesscripts", {"MODEL__MASK_ON": False}, "cityscapesscripts does not measure.*pycocotools or nothing"),
    ],
)
def test_evaluators_that_do_not_fit_are_refused_first(evaluator: str, changes: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        train_net(cfg(tmp_path, **changes), engine="torchvision", evaluator=evaluator)
    assert not (tmp_path / "metrics.json").exists()
