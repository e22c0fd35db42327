"""LVIS: images found by their URL, and AP that is lvis-api's."""

from __future__ import annotations

import json
from pathlib import Path

import lvis_cases
import numpy as np
import pytest
from PIL import Image
from tiny_detection import tiny_cfg

from loco_det.annotations.coco import load_coco
from loco_det.annotations.registry import find_dataset
from loco_det.cli import run_job
from loco_det.core.errors import UserError
from loco_det.detection.inference import check_evaluator
from loco_det.detection.train import train_net
from loco_det.evaluation.lvis import NUMBERS, evaluate_lvis

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lvis.json").read_text())


def write(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lvis_v1_train and lvis_v1_val, made up, with COCO's images of noise."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for seed, split in enumerate(("train", "val")):
        content, _ = lvis_cases.made_up(seed, images=4)
        rng = np.random.default_rng(seed)
        for image in content["images"]:
            file = tmp_path / "coco" / image["coco_url"].partition(".org/")[2]
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (lvis_cases.SIDE, lvis_cases.SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
        write(tmp_path / "lvis" / f"lvis_v1_{split}.json", content)
    return tmp_path


@pytest.mark.parametrize("seed", GOLDEN["sets"])
def test_numbers_are_lvis_apis_to_the_last_bit(seed: str, tmp_path: Path) -> None:
    content, results = lvis_cases.made_up(int(seed))
    found = evaluate_lvis(write(tmp_path / "lvis.json", content), results)
    for kind, numbers in found.items():
        official = GOLDEN["sets"][seed][kind]
        assert numbers == {name: 100 * official[name] for name in NUMBERS}
        assert 0 < numbers["AP"] < numbers["AP50"]
    assert not {found["bbox"][name] for name in NUMBERS} & {found["segm"][name] for name in NUMBERS}


@pytest.mark.parametrize(("surer", "expected"), [(299, 100.0), (300, 0.0)])
def test_the_300_surest_results_of_an_image_count(surer: int, expected: float, tmp_path: Path) -> None:
    """Of any class; classes that an image was not annotated for only use up places."""
    content, (*_, right) = lvis_cases.made_up(0, images=1)
    image, (category, other, absent) = content["images"][0], [c["id"] for c in content["categories"][:3]]
    image["neg_category_ids"] = [absent]
    content["annotations"] = [{**content["annotations"][0], "category_id": category, "bbox": right["bbox"]}]
    results = [{**right, "category_id": category, "score": 0.1}]
    results += [{**right, "category_id": other, "score": 0.5}] * surer
    found = evaluate_lvis(write(tmp_path / "lvis.json", content), results, ("bbox",))["bbox"]
    assert found["AP"] == pytest.approx(expected)


def test_a_class_that_was_not_looked_for_costs_nothing(tmp_path: Path) -> None:
    """The same false detection, in an image that was searched for its class and in one that was not."""
    content, _ = lvis_cases.made_up(0, images=1)
    image, category = content["images"][0], content["categories"][0]["id"]
    box, corners = [10.0, 10.0, 40.0, 40.0], [10.0, 10.0, 50.0, 10.0, 50.0, 50.0]
    content["annotations"] = [
        {"id": 1, "image_id": image["id"], "category_id": category, "bbox": box, "area": 1600.0,
         "segmentation": [corners]}
    ]  # fmt: skip
    right = lvis_cases.result(image["id"], category, 0.5, box, corners)
    other = {**image, "id": image["id"] + 1}
    content["images"].append(other)
    wrong = {**right, "image_id": other["id"], "score": 0.9}
    found = {}
    elsewhere = content["categories"][1]["id"]
    for searched in ([], [category]):
        image["neg_category_ids"], other["neg_category_ids"] = [elsewhere], searched
        found[bool(searched)] = evaluate_lvis(write(tmp_path / "a.json", content), [right, wrong], ("bbox",))["bbox"]
    assert found[False]["AP"] == pytest.approx(100.0)
    assert found[True]["AP"] == pytest.approx(50.0, abs=0.5)  # the surer of two is wrong
    assert np.isnan(found[True]["APc"])


def test_a_file_without_its_searches_is_refused(tmp_path: Path) -> None:
    content, results = lvis_cases.made_up(0)
    for image in content["images"]:
        del image["neg_category_ids"]
    with pytest.raises(UserError, match="no image with neg_category_ids"):
        evaluate_lvis(write(tmp_path / "a.json", content), results)


@pytest.mark.parametrize("segmentation", [None, [], [[1.0, 1.0, 9.0, 9.0]], {"size": [5, 5], "counts": [25]}], ids=str)
def test_mask_ap_without_the_mask_of_an_object_is_refused(segmentation: object, tmp_path: Path) -> None:
    content, results = lvis_cases.made_up(0)
    content["annotations"][1]["segmentation"] = segmentation
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match="annotation 2 "):
        evaluate_lvis(path, results)
    assert evaluate_lvis(path, results, ("bbox",))["bbox"]["AP"] > 0
    del content["annotations"][1]["segmentation"]
    with pytest.raises(UserError, match="annotation 2 "):
        evaluate_lvis(write(path, content), results)


def test_training_and_ap_by_name(root: Path, tmp_path: Path) -> None:
    record = load_coco(find_dataset("lvis_v1_val"))[0]
    assert Path(record.file_name).parts[-2:] == ("val2017", "000000000001.jpg")
    cfg = tiny_cfg(
        tmp_path / "run",
        DATASETS__TRAIN=("lvis_v1_train",),
        DATASETS__TEST=("lvis_v1_val@50pct_seed0",),
        DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler",
        DATALOADER__REPEAT_THRESHOLD=0.5,
        MODEL__ROI_HEADS__NUM_CLASSES=9,
        SOLVER__MAX_ITER=2,
        SOLVER__STEPS=(1,),
    )
    found = train_net(cfg, engine="torchvision")
    assert {kind: tuple(numbers) for kind, numbers in found.items()} == {"bbox": NUMBERS, "segm": NUMBERS}
    with pytest.raises(UserError, match=r"pycocotools does not measure.*give nothing"):
        check_evaluator(cfg, "pycocotools")
    assert run_job("report", [str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "box APr" in page
    assert "no paired differences" not in page
