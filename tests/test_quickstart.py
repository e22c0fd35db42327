"""Output and files of `loco-det quickstart`; test_road.py runs all steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loco_det.annotations.coco import load_coco
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.synthetic import make_shapes_dataset
from loco_det.cli import main
from loco_det.commands import quickstart
from loco_det.commands.quickstart import Stages, own_sets, verdict
from loco_det.core.log import log, setup_logging
from loco_det.images.folders import open_source
from loco_det.report.plots import draw_detections

METRICS = {kind: {"AP": 1.0, "AP50": 2.0, "AP75": 0.5} for kind in ("bbox", "segm")}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data, conversion, training or pictures."""

    def train_net(cfg: Any, engine: str, fast: bool) -> dict[str, Any]:
        log.info("trained in %s", cfg.OUTPUT_DIR)
        return METRICS

    for name in ("make_shapes_dataset", "convert", "_draw"):
        monkeypatch.setattr(quickstart, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(quickstart, "train_net", train_net)
    monkeypatch.setattr(quickstart, "pretrain_file", pretrain)


def pretrain(config: str, overrides: list[str]) -> Path:
    folder = Path(overrides[overrides.index("OUTPUT_DIR") + 1])
    setup_logging(folder)
    log.info("pretrained in %s", folder)
    return folder / "backbone.safetensors"


def test_each_run_has_its_log_and_the_whole_has_all(stubs: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(quiet=False)
    quickstart.quickstart(tmp_path)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    whole = [line for line in lines if " I step " not in line]
    assert len(whole) == 2 * len(quickstart.METHODS)
    assert len(lines) - len(whole) == 1 + 2 * len(quickstart.METHODS)
    for at, method in enumerate(quickstart.METHODS):
        pretrained = (tmp_path / method / "pretrain" / "log.txt").read_text().splitlines()
        trained = (tmp_path / method / "detector" / "log.txt").read_text().splitlines()
        assert [line.split(" I ")[1] for line in pretrained + trained if " I step " not in line] == [
            f"pretrained in {tmp_path / method / 'pretrain'}",
            f"trained in {tmp_path / method / 'detector'}",
        ]
        own = [line for line in pretrained + trained if " I step " not in line]
        assert whole[2 * at : 2 * at + 2] == own
    assert "backbone" in capsys.readouterr().out


def test_quiet_prints_no_table(stubs: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(quiet=True)
    quickstart.quickstart(tmp_path)
    out, err = capsys.readouterr()
    assert out == err == ""
    assert (tmp_path / "results.json").exists()


# --- what it says -----------------------------------------------------------------------------------------------


def test_the_message_names_who_is_better_and_not_by_how_many_digits() -> None:
    def scores(**values: float) -> dict[str, Any]:
        return {method: {"bbox": {"AP": value}} for method, value in values.items()}

    one = verdict(scores(random=4.4, gim=13.7, simclr=9.1, loco=12.9))
    assert one.startswith("every pretrained backbone detects better than the untrained one: box AP 9 to 14 against 4.")
    assert verdict(scores(random=10.0, gim=11.0, simclr=9.0, loco=9.0)).startswith("gim detects better")
    assert verdict(scores(random=10.0, gim=9.0, simclr=9.0, loco=9.0)).startswith("no pretrained backbone detects")


def test_a_line_says_what_is_going_on_and_how_long(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = [0.0]
    monkeypatch.setattr(quickstart.time, "monotonic", lambda: clock[0])
    setup_logging(tmp_path)
    stages = Stages([1.0, 2.0, 7.0])
    stages.begin("first")
    clock[0] = 60.0
    stages.begin("second")
    clock[0] = 180.0
    stages.begin("third")
    said = [line.split(" I ")[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said == [
        "step 1 of 3: first",
        "step 2 of 3: second; about 9 minutes left",
        "step 3 of 3: third; about 7 minutes left",
    ]


def test_every_column_of_the_picture_shows_something(tmp_path: Path) -> None:
    """Detections of the lowest scores are drawn, too, the best of them, with their score."""
    make_shapes_dataset(tmp_path, train=2, val=2, size=64, seed=0)
    name = f"{tmp_path}/shapes/annotations/instances_val.json@{tmp_path}/shapes/val"
    dataset = load_coco(find_dataset(name))
    shown = {}

    def drawn(pixels: np.ndarray, shapes: Any, *args: Any, **options: Any) -> np.ndarray:
        shown.setdefault(len(shown), list(shapes))
        return pixels

    results = [
        {"image_id": dataset[0].image_id, "category_id": dataset.category_ids[0], "bbox": [1, 1, 9, 9], "score": score}
        for score in (0.001, 0.004, 0.002, 0.003)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loco_det.report.plots.draw_instances", drawn)
        draw_detections(dataset, {"weak": results}, tmp_path / "a.png", images=[0], best=3)
    assert [shape.score for shape in shown[1]] == [0.004, 0.003, 0.002]
    assert (tmp_path / "a.png").stat().st_size > 1000


# --- on the user's own folder -----------------------------------------------------------------------------------


def coco_folder(folder: Path) -> Path:
    make_shapes_dataset(folder, train=6, val=4, size=64, seed=0)
    return folder / "shapes"


def roboflow_folder(folder: Path) -> Path:
    source = coco_folder(folder / "source")
    for split, theirs in (("train", "train"), ("val", "valid")):
        shutil.copytree(source / split, folder / "robo" / theirs)
        shutil.copy(
            source / "annotations" / f"instances_{split}.json", folder / "robo" / theirs / "_annotations.coco.json"
        )
    return folder / "robo"


def yolo_folder(folder: Path) -> Path:
    for split, count in (("train", 6), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / "yolo" / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (i, 9, 9)).save(folder / "yolo" / "images" / split / f"{i}.jpg")
            (folder / "yolo" / "labels" / split / f"{i}.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    (folder / "yolo" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return folder / "yolo"


@pytest.mark.parametrize(
    ("make", "classes", "masks"),
    [(coco_folder, 6, "bitmask"), (roboflow_folder, 6, "bitmask"), (yolo_folder, 2, "")],
)
def test_splits_classes_and_masks_of_a_folder_are_found(make: Any, classes: int, masks: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    sets = own_sets(str(make(tmp_path)), tmp_path / "out")
    assert [len(find_dataset(name).index.image_id) for name in (sets.train, sets.test)] == [6, 4]
    assert sets.detector["MODEL.ROI_HEADS.NUM_CLASSES"] == classes
    assert sets.detector["MODEL.MASK_ON"] is bool(masks)
    assert sets.detector["INPUT.MASK_FORMAT"] == (masks or "polygon")
    assert len(open_source(str(sets.images), "list")) == 6
    assert sets.pretraining["SOLVER.BATCH_SIZE"] == 2  # the configuration's would not fit


def test_one_set_is_divided_without_an_image_in_both(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    alone = tmp_path / "alone"
    shutil.copytree(folder / "train", alone)
    shutil.copy(folder / "annotations" / "instances_train.json", alone / "_annotations.coco.json")
    out = tmp_path / "out"
    out.mkdir()
    sets = own_sets(str(alone), out)
    ids = [set(find_dataset(name).index.image_id.tolist()) for name in (sets.train, sets.test)]
    whole = json.loads((folder / "annotations" / "instances_train.json").read_text())
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {image["id"] for image in whole["images"]}
    assert len(ids[1]) == 1
    objects = [len(find_dataset(name).index.annotation_id) for name in (sets.train, sets.test)]
    assert sum(objects) == len(whole["annotations"])


def test_of_a_large_set_a_share_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "TRAIN_IMAGES", 3)
    (tmp_path / "out").mkdir()
    sets = own_sets(str(coco_folder(tmp_path)), tmp_path / "out")
    assert len(find_dataset(sets.train).index.image_id) == 3
    assert len(find_dataset(sets.test).index.image_id) == 4
    assert len(open_source(str(sets.images), "list")) == 3


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_annotations_is_bad_input(there: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if there:
        (tmp_path / "images").mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / "0.jpg")
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "images")]) == 2
    assert str(tmp_path / "images") in capsys.readouterr().err.splitlines()[-1]


def test_the_users_folder_reaches_both_trainings(stubs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def train_net(cfg: Any, engine: str, fast: bool) -> dict[str, Any]:
        seen.append(cfg)
        return {"bbox": METRICS["bbox"]}

    monkeypatch.setattr(quickstart, "train_net", train_net)
    setup_logging(quiet=False)
    quickstart.quickstart(tmp_path / "out", data=str(yolo_folder(tmp_path)))
    assert len(seen) == len(quickstart.METHODS)
    for cfg in seen:
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
        assert not cfg.MODEL.MASK_ON
        assert (f"{tmp_path}/yolo/@train",) == cfg.DATASETS.TRAIN
