"""Data sets given as paths, in every place that takes a data set's name."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detection import overrides, tiny_cfg, write_tiny

from loco_det.annotations import classes, paths
from loco_det.annotations.classes import category_ids
from loco_det.annotations.coco import load_coco, readable_annotations
from loco_det.annotations.formats.conversion import convert_annotations
from loco_det.annotations.index import load_index
from loco_det.annotations.instances import Instances
from loco_det.annotations.paths import is_path, split_parts
from loco_det.annotations.registry import Dataset, find_dataset, folder_name
from loco_det.annotations.synthetic import make_shapes_dataset
from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.detection import inference, run_record
from loco_det.detection.train import check_classes

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)


def coco(file: Path, names: list[str], categories: list[dict[str, Any]] = CATEGORIES) -> Path:
    """A COCO file on these images, each with one object of each category."""
    images = [{"id": k, "file_name": name, "width": 40, "height": 30} for k, name in enumerate(names, 1)]
    annotations = [
        {"id": 10 * i["id"] + c["id"], "image_id": i["id"], "category_id": c["id"], "bbox": [1, 2, 9, 8], "area": 72}
        | {"iscrowd": 0}
        for i in images
        for c in categories
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def voc(root: Path, splits: bool = True) -> None:
    """Four images, each with a cat and a dog; of them three in train and one in val."""
    for k in range(4):
        image(root / "JPEGImages" / f"n{k}.jpg")
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{2 + k}</xmin><ymin>3</ymin><xmax>{9 + k}</xmax><ymax>9</ymax>"
            "</bndbox></object>"
            for name in ("cat", "dog")
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"n{k}.xml").write_text(f"<annotation>{objects}</annotation>")
    if splits:
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "train.txt").write_text("n0\nn1\nn2\n")
        (root / "ImageSets" / "Main" / "val.txt").write_text("n3\n")


# --- the spelling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["coco_2017_train", "coco_2017_train@classes_a/b", "cells_train@1pct_seed0", "bccd", "me@home/x.json", "x.jsonl"],
)
def test_a_name_is_no_path(name):
    assert not is_path(name)
    assert folder_name(name) == name


@pytest.mark.parametrize("name", ["./bccd", "a/b", "/a@b", "~/x", "x.json", "x.json@images", "x.XML", "data.yaml@val"])
def test_a_path_is_one(name):
    assert is_path(name)


def test_parts_are_taken_from_the_end_only():
    assert split_parts("/me@home/x@train@10pct_seed0@classes_cat") == (
        "/me@home/x@train",
        ["10pct_seed0", "classes_cat"],
    )
    assert split_parts("x.json@./10pct_seed0") == ("x.json@./10pct_seed0", [])
    assert split_parts("x.json@10pct_seed0") == ("x.json", ["10pct_seed0"])


def test_an_annotation_file_and_a_folder():
    image(Path("my@cells/images/a.jpg"))
    file = coco(Path("my@cells/labels.json"), ["a.jpg"])
    name = "./my@cells/labels.json@my@cells/images"
    paths = find_dataset(name)
    assert paths == Dataset(name, Path("my@cells/images"), file)
    assert len(load_coco(paths)) == 1
    part = find_dataset(f"{name}@classes_dog")
    assert part.derived
    assert load_coco(part).class_names == ("dog",)


@pytest.mark.parametrize("name", ["http://[x/a.jpg", "s3://bucket/a.jpg", "C:\\x\\a.jpg"])
def test_file_names_that_other_machines_wrote(name):
    image(Path("images/a.jpg"))
    coco(Path("x.json"), [name])
    assert Path(load_coco(find_dataset("x.json@images"))[0].file_name) == Path("images/a.jpg")


def test_a_folder_called_as_a_part_is_reached():
    image(Path("10pct_seed0/a.jpg"))
    coco(Path("x.json"), ["a.jpg"])
    assert find_dataset("x.json@./10pct_seed0").images == Path("10pct_seed0")
    assert find_dataset("x.json@./10pct_seed0@10pct_seed0").derived


@pytest.mark.parametrize("names", [["images/a.jpg"], ["a.jpg"]])
def test_the_folder_may_be_left_out_where_it_is_plain(names):
    """Label Studio's COCO export, result.json beside images/, with either way of naming the files."""
    image(Path("export/images/a.jpg"))
    coco(Path("export/result.json"), names)
    for name in ("export/result.json", "./export/result.json"):
        assert len(load_coco(find_dataset(name))) == 1
    assert len(load_coco(find_dataset("./export"))) == 1


@pytest.mark.parametrize("first", ["version", "flags", "shapes_of_masks", "info"])
@pytest.mark.parametrize("name", ["cells.json", "_annotations.coco.json", "result.json"])
def test_a_coco_file_may_begin_with_any_key(first, name):
    image(Path("d/a.jpg"))
    file = coco(Path("d") / name, ["a.jpg"])
    file.write_text(json.dumps({first: "1.0", **json.loads(file.read_text())}))
    for spelling in (f"d/{name}", f"d/{name}@d"):
        assert len(load_coco(find_dataset(spelling))) == 1


def test_roboflows_folders():
    for split in ("train", "valid"):
        image(Path(f"robo/{split}/a.jpg"))
        coco(Path(f"robo/{split}/_annotations.coco.json"), ["a.jpg"])
    paths = find_dataset("robo/valid")
    assert paths == Dataset("robo/valid", Path("robo/valid"), Path("robo/valid/_annotations.coco.json"))
    assert len(load_coco(find_dataset("robo/train@10pct_seed0"))) == 1


def test_cocos_own_layout():
    for split in ("train2017", "val2017"):
        image(Path(f"coco/{split}/a.jpg"))
        coco(Path(f"coco/annotations/instances_{split}.json"), ["a.jpg"])
    coco(Path("coco/annotations/instances_test2017.json"), ["a.jpg"])  # its images are not there
    coco(Path("coco/annotations/captions_val2017.json"), ["a.jpg"])
    for name in ("coco/@val2017", "./coco@val2017"):
        file = Path("coco/annotations/instances_val2017.json")
        assert find_dataset(name) == Dataset(name, Path("coco/val2017"), file)
    assert len(load_coco(find_dataset("coco/@train2017@10pct_seed0"))) == 1
    for name, reason in (("coco/", "has several splits"), ("coco/@test2017", "has no split 'test2017'")):
        with pytest.raises(UserError, match=rf"'{name}' {reason}; put one of @train2017, @val2017 behind the path"):
            find_dataset(name)
    shutil.rmtree("coco/val2017")
    assert find_dataset("coco/").annotations == Path("coco/annotations/instances_train2017.json")


def test_a_folder_of_another_format_and_its_splits(caplog, monkeypatch):
    voc(Path("pets"))
    converted = []

    def convert(source, **where):
        converted.append(source)
        return convert_annotations(source, **where)

    monkeypatch.setattr(paths, "convert_annotations", convert)
    with caplog.at_level(logging.INFO, logger="loco_det"):
        sets = {split: load_coco(find_dataset(f"./pets@{split}")) for split in ("train", "val")}
        find_dataset("./pets@val")
    assert converted == [Path("pets")]
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 3, "val": 1}
    assert sets["val"][0].boxes.tolist() == [[4, 2, 12, 9], [4, 2, 12, 9]]
    assert sets["val"].class_names == sets["train"].class_names == ("cat", "dog")
    told = [line for line in caplog.messages if "read as COCO" in line]
    assert told == ["pets: voc, read as COCO: train 3 images, 6 objects, val 1 images, 2 objects"]
    assert [line for line in caplog.messages if "left out" in line] == []


def test_what_does_not_come_over_is_in_the_log(caplog):
    voc(Path("pets"), splits=False)
    (Path("pets") / "JPEGImages" / "n1.jpg").unlink()
    with caplog.at_level(logging.WARNING, logger="loco_det"):
        assert len(load_coco(find_dataset("./pets"))) == 3
    assert "pets: left out 1 image: it is not there (Annotations/n1.xml: <filename> '')" in caplog.messages


def test_a_changed_file_is_converted_anew():
    voc(Path("pets"), splits=False)
    before = find_dataset("./pets").annotations
    assert find_dataset("./pets").annotations == before
    file = Path("pets/Annotations/n0.xml")
    file.write_text(file.read_text().replace("<name>dog", "<name>wolf", 1))
    dataset = load_coco(find_dataset("./pets"))
    assert dataset.class_names == ("cat", "dog", "wolf")


@pytest.mark.parametrize(
    "settings",
    ["path: ../data\ntrain: images/train", "train: ../data", "train: {cwd}/data", "train: ../data/train.txt"],
)
def test_a_file_that_is_added_where_data_yaml_points_is_seen(settings, tmp_path):
    """The folder lies beside that of the YAML file, so nothing below the source changes."""

    def add(name: str) -> None:
        image(Path(f"data/images/train/{name}.jpg"))
        Path("data/labels/train").mkdir(parents=True, exist_ok=True)
        Path(f"data/labels/train/{name}.txt").write_text("0 0.5 0.5 0.25 0.2\n")
        with open("data/train.txt", "a") as file:
            file.write(f"images/train/{name}.jpg\n")

    Path("conf").mkdir()
    Path("conf/data.yaml").write_text(settings.format(cwd=tmp_path) + "\nnames: [cat]\n")
    counts = []
    for name in "abc":
        add(name)
        for spelling in ("conf/data.yaml", "./conf"):
            counts.append(len(load_coco(find_dataset(spelling))))
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("out", ["pets", "pets/report", "pets/JPEGImages"])
def test_own_output_below_the_source_changes_nothing(out, monkeypatch, caplog):
    """Neither a check, a conversion, a training's files nor the cache there are data."""
    voc(Path("pets"))
    monkeypatch.setenv("LOCO_DET_CACHE", "pets/cache")
    before = find_dataset("./pets@train").annotations
    for command in (["check", "./pets@train", "--workers", "0", "--out", out], ["convert", "pets", out]):
        assert main(["data", *command, "--quiet"]) == 0
    files = {"config.yaml": "", "run.json": "{}", "log.txt": "", "metrics.json": "{}", "model_final.pth": ""}
    for name, text in {**files, "inference/coco_instances_results.json": "[]"}.items():
        path = Path(out) / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert find_dataset("./pets@train").annotations == before
    assert "left out" not in caplog.text
    image(Path(out) / "mine.png")
    assert find_dataset("./pets@train").annotations != before


def test_files_of_other_formats_with_their_images_elsewhere():
    image(Path("photos/a.jpg"))
    shape = {"name": "rect", "x": 1, "y": 2, "width": 5, "height": 6}
    region = {"shape_attributes": shape, "region_attributes": {"label": "cat"}}
    Path("labels").mkdir()
    Path("labels/via.json").write_text(json.dumps({"a.jpg9": {"filename": "a.jpg", "size": 9, "regions": [region]}}))
    dataset = load_coco(find_dataset("labels/via.json@photos"))
    assert dataset[0].boxes.tolist() == [[1, 2, 6, 8]]
    box = '<box label="cat" xtl="1" ytl="2" xbr="6" ybr="8"/>'
    Path("labels/cvat.xml").write_text(
        f'<annotations><image name="a.jpg" subset="Val" width="40" height="30">{box}</image></annotations>'
    )
    for name in ("labels/cvat.xml@photos", "labels/cvat.xml@photos@Val"):
        assert load_coco(find_dataset(name))[0].boxes.tolist() == [[1, 2, 6, 8]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./pets", ["'./pets' has several splits", "@train, @val"]),
        ("./pets@test", ["has no split 'test'", "@train, @val"]),
        ("./gone", ["there is no folder gone; correct the path"]),
        ("./pest@train", ["there is no folder pest; did you mean pets?"]),
        ("./shapes/train", ["'./shapes/train' is the images of a split; write shapes/@train"]),
        ("gone.json@pets", ["there is no file gone.json"]),
        ("~nosuchuser/x", ["there is no folder ~nosuchuser/x"]),
        ("~nosuchuser/x.json", ["there is no file ~nosuchuser/x.json"]),
        ("./" + "x" * 300, ["there is no folder xxx"]),
        ("x" * 300 + ".json", ["there is no file xxx"]),
        ("x.json@" + "x" * 300 + "/y", ["there is no folder xxx"]),
        ("x.json@~nosuchuser/x", ["there is no folder ~nosuchuser/x"]),
        ("./pets/data.yaml@~nosuchuser/x", ["there is no file pets/data.yaml"]),
        ("./pets@~nosuchuser", ["has no split '~nosuchuser'"]),
        ("x.json@gone", ["there is no folder gone", "FILE.json@FOLDER"]),
        ("./plain", ["plain holds no annotations of a known format"]),
        ("./pets@train@0pct_seed0", ["0pct_seed0"]),
        ("bccd", ["./bccd", "FILE.json@FOLDER"]),
    ],
)
def test_what_is_not_there_is_one_sentence(name, words):
    voc(Path("pets"))
    image(Path("plain/a.jpg"))
    coco(Path("x.json"), ["a.jpg"])
    image(Path("shapes/train/a.jpg"))
    coco(Path("shapes/annotations/instances_train.json"), ["a.jpg"])
    with pytest.raises(UserError) as caught:
        find_dataset(name)
    for word in words:
        assert word in str(caught.value)


# --- where names are taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./pets@train", "pets.json@pets/JPEGImages", "robo"])
def test_data_check_takes_it(name, capsys):
    voc(Path("pets"))
    coco(Path("pets.json"), ["n0.jpg", "n1.jpg"])
    shutil.copytree("pets/JPEGImages", "robo")
    coco(Path("robo/_annotations.coco.json"), ["n0.jpg"])
    assert main(["data", "check", name, "--workers", "0", "--out", "out", "--quiet"]) == 0
    answer = json.loads(Path("out/check.json").read_text())
    assert answer["classes"] == {"cat": answer["counts"]["images"], "dog": answer["counts"]["images"]}
    assert "OK to train on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x.json", "x.JSON", "x.json.gz", "x.Json.GZ"])
def test_data_check_takes_every_file_that_training_does(name):
    image(Path("a.jpg"))
    content = coco(Path("x.json"), ["a.jpg"]).read_bytes()
    Path("x.json").unlink()
    Path(name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert len(load_coco(find_dataset(f"./{name}"))) == 1
    assert main(["data", "check", name, "--workers", "0", "--out", "out", "--quiet"]) == 0
    assert json.loads(Path("out/check.json").read_text())["classes"] == {"cat": 1, "dog": 1}


def test_data_check_takes_the_split_of_a_folder_beside_it():
    voc(Path("pets"))
    assert main(["data", "check", "pets@val", "--workers", "0", "--out", "out", "--quiet"]) == 0
    answer = json.loads(Path("out/check.json").read_text())
    assert (answer["data"]["name"], answer["classes"]) == ("./pets@val", {"cat": 1, "dog": 1})


@pytest.mark.parametrize("name", ["pets.zip", "pets.tar.gz", "pets.7z"])
def test_an_archive_is_to_be_unpacked(name, capsys):
    Path(name).write_bytes(b"PK\x03\x04")
    for spelling in (f"./{name}", f"./{name}@train"):
        with pytest.raises(UserError, match=f"{name} is an archive; unpack it"):
            find_dataset(spelling)
    assert main(["data", "convert", name, "out"]) == 2
    assert f"{name} is an archive; unpack it" in capsys.readouterr().err


def test_data_check_takes_a_folder_in_cocos_layout_for_a_detection_set(capsys):
    make_shapes_dataset("drawn", train=2, val=2, size=48)
    assert main(["data", "check", "drawn/shapes", "--out", "out"]) == 2
    assert "'drawn/shapes' has several splits; put one of @train, @val behind the path" in capsys.readouterr().err
    assert main(["data", "check", "drawn/shapes/train", "--out", "out", "--workers", "0", "--quiet"]) == 0
    assert json.loads(Path("out/check.json").read_text())["data"] == "drawn/shapes/train"


def test_data_check_says_of_a_folder_what_training_would(capsys):
    voc(Path("pets"))
    assert main(["data", "check", "pets", "--out", "out"]) == 2
    assert "has several splits" in capsys.readouterr().err
    Path("pets/Annotations/n0.xml").write_text("<annotation><object>")
    assert main(["data", "check", "./pets@train", "--out", "out"]) == 2
    assert "n0.xml is no Pascal VOC annotation" in capsys.readouterr().err


def test_data_check_still_takes_images_alone(capsys):
    image(Path("photos/a.jpg"))
    assert main(["data", "check", "photos", "--workers", "0", "--out", "out", "--quiet"]) == 0
    assert json.loads(Path("out/check.json").read_text())["data"] == "photos"


def test_a_training_on_paths_leaves_its_results_in_its_own_folder(tmp_path):
    write_tiny(tmp_path / "data", images=4)
    tiny = tmp_path / "data" / "tiny"
    train, test = (f"{tiny}/annotations/instances_{s}.json@{tiny}/{s}" for s in ("train", "val"))
    twice = {"DATASETS.TEST": (test, f"{test}@50pct_seed0")}
    arguments = overrides(OUTPUT_DIR="out", DATASETS__TRAIN=(train,), SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    arguments += ["DATASETS.TEST", str(twice["DATASETS.TEST"])]
    before = sorted(path for path in (tmp_path / "data").rglob("*"))
    command = ["train", "--engine", "torchvision", "--config-file", "configs/coco_loco_r50.yaml", *arguments]
    assert main([*command, "--quiet"]) == 0
    assert sorted(path for path in (tmp_path / "data").rglob("*")) == before
    results = sorted(Path("out").rglob("coco_instances_results.json"))
    assert [path.parent.parent.name for path in results] == sorted(map(folder_name, twice["DATASETS.TEST"]))
    told = json.loads(Path("out/run.json").read_text())["datasets"][train]
    assert told["images"] == f"{tiny}/train"


# --- classes by name -------------------------------------------------------------------------------------------------


def permuted(file: Path, out: Path, ids: dict[int, int], names: dict[int, str]) -> Path:
    """A copy of a COCO file whose categories have other ids, by ascending ones in another order."""
    content = json.loads(file.read_text())
    content["annotations"] = [
        a | {"category_id": ids[a["category_id"]]} for a in content["annotations"] if a["category_id"] in ids
    ]
    content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content))
    return out


def perfect_engine(name: str, model_classes: list[str]) -> SimpleNamespace:
    """An engine whose model finds every object of a set, under the numbers of the classes that it was trained on."""
    dataset = load_coco(find_dataset(name))
    numbers = [model_classes.index(label) for label in dataset.class_names]

    def predict(model: Any, batch: list[dict[str, Any]]) -> list[Instances]:
        found = []
        for item in batch:
            record = next(r for r in dataset if r.image_id == item["image_id"])
            classes = torch.tensor([numbers[k] for k in record.classes.tolist()])
            extra = torch.tensor([model_classes.index("red")])  # and one more that may not be in the set
            found.append(
                Instances(
                    (record.height, record.width),
                    torch.cat([torch.from_numpy(record.boxes), torch.tensor([[0.0, 0.0, 3.0, 3.0]])]),
                    scores=torch.tensor([0.9] * len(classes) + [0.1]),
                    classes=torch.cat([classes, extra]),
                )
            )
        return found

    batches = [[{"image_id": record.image_id, "file_name": ""}] for record in dataset]
    return SimpleNamespace(test_batches=lambda cfg, name: batches, predict=predict)


@pytest.mark.parametrize("names", [["red", "green"], ["green", "red"], ["green"]])
def test_a_test_set_is_measured_by_the_names_of_its_classes(tmp_path, names, caplog):
    root = write_tiny(tmp_path / "datasets")
    ids = {"red": 3, "green": 7}
    numbers = {ids[name]: k for k, name in enumerate(names, 1)}
    labels = dict(enumerate(names, 1))
    file = permuted(root / "tiny/annotations/instances_val.json", tmp_path / "v.json", numbers, labels)
    name = f"{file}@{root}/tiny/val"
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TEST=(name,), MODEL__MASK_ON=False)
    with caplog.at_level(logging.WARNING, logger="loco_det"):
        check_classes(cfg, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    assert any("has no category for red" in line for line in caplog.messages) == (names == ["green"])
    engine = perfect_engine(name, ["red", "green"])
    found = inference.evaluate(cfg, torch.nn.Identity(), engine, "pycocotools")
    assert found["bbox"]["AP"] == pytest.approx(100)
    results = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} == set(labels)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({1: "red", 2: "blue"}, ["has (blue), which tiny_train has not", "(red, blue) with (red, green)"]),
        ({1: "red", 2: "green", 3: "blue"}, ["has 3 classes and MODEL.ROI_HEADS.NUM_CLASSES is 2", "(blue)"]),
        ({1: "green", 2: "green"}, ["has a name twice", "(green, green) with (red, green)"]),
    ],
)
def test_classes_that_do_not_match_are_refused_with_both_lists(tmp_path, names, words):
    root = write_tiny(tmp_path / "datasets")
    file = permuted(root / "tiny/annotations/instances_val.json", tmp_path / "v.json", {3: 1, 7: 2}, names)
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TEST=(f"{file}@{root}/tiny/val",))
    with pytest.raises(UserError) as caught:
        check_classes(cfg, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    for word in words:
        assert word in str(caught.value)
    assert "set MODEL.ROI_HEADS.NUM_CLASSES" not in str(caught.value)  # which would only move the contradiction


@pytest.mark.parametrize("folder", ["me@work", "a@b@c", "classes_of@classes_red", "plain"])
def test_classes_are_matched_whatever_the_folders_are_called(tmp_path, folder, monkeypatch):
    """The test set numbers the classes of the training set in the other order."""
    monkeypatch.chdir(tmp_path)
    tiny = write_tiny(tmp_path / "data") / "tiny"
    train = tmp_path / folder / "t.json"
    train.parent.mkdir()
    shutil.copy(tiny / "annotations/instances_train.json", train)
    test = permuted(
        tiny / "annotations/instances_val.json", tmp_path / folder / "v.json", {3: 2, 7: 1}, {1: "green", 2: "red"}
    )
    for root in (f"{tmp_path}/{folder}", f"./{folder}"):
        names = f"{root}/{train.name}@{tiny}/train", f"{root}/{test.name}@{tiny}/val"
        cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=names[:1], DATASETS__TEST=names[1:])
        assert category_ids(cfg, find_dataset(names[1])) == (2, 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("coco_2017_train", "coco_2017_train@10pct_seed0", True),
        ("coco_2017_train", "coco_2017_val", False),  # whose files tell
        ("voc_2007_trainval", "voc_2012_train@10shot_seed0", True),
        ("lvis_v1_train", "lvis_v1_val", True),
        ("cityscapes_fine_instance_seg_train@masks", "cityscapes_fine_instance_seg_val", True),
        ("voc_2007_trainval@classes_cat", "voc_2007_test", False),
        ("./a@b/x.json@10pct_seed0", "./a@b/x.json", True),
        ("./a@b/x.json", "./a@c/x.json", False),
        ("/me@voc_2007_test/x.json", "/me@lvis_v1_val/x.json", False),
    ],
)
def test_sets_that_need_not_be_compared(one, other, same):
    assert classes._is_of_one_family(one, other) == classes._is_of_one_family(other, one) == same


def test_a_data_set_that_is_resolved_is_read_once(tmp_path, monkeypatch):
    root = write_tiny(tmp_path / "datasets")
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TEST=(f"{root}/tiny/annotations/instances_val.json@{root}/tiny/val",))
    read: list[str] = []

    def load(path: Path) -> Any:
        read.append(path.name)
        return load_index(path)

    train, test = find_dataset(cfg.DATASETS.TRAIN[0]), find_dataset(cfg.DATASETS.TEST[0])
    monkeypatch.setattr("loco_det.annotations.registry.load_index", load)
    for _ in range(3):
        load_coco(train)
        readable_annotations(train)
        classes.check_training_classes(cfg, [train, train])
        assert classes.category_ids(cfg, train) == (3, 7)
    assert read == ["instances_train.json"]
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=())
    for _ in range(3):
        assert classes.category_ids(cfg, test) == (3, 7)
        assert classes.missing_classes(cfg, test) == []
    assert read == ["instances_train.json", "instances_val.json"]


def test_without_the_training_set_the_test_sets_own_order_counts(tmp_path):
    write_tiny(tmp_path / "datasets")
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=("gone_train",), DATASETS__TEST=("tiny_val",))
    check_classes(cfg, (), cfg.DATASETS.TEST)
    with pytest.raises(UserError, match="gone_train"):
        check_classes(cfg, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    other = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=("gone_train",), MODEL__ROI_HEADS__NUM_CLASSES=5)
    with pytest.raises(UserError, match=r"tiny_val has 2 classes .* is 5; set MODEL.ROI_HEADS.NUM_CLASSES 2"):
        check_classes(other, (), other.DATASETS.TEST)


def test_two_training_sets_in_another_order_are_refused(tmp_path):
    root = write_tiny(tmp_path / "datasets")
    file = permuted(
        root / "tiny/annotations/instances_train.json", tmp_path / "t.json", {3: 2, 7: 1}, {1: "green", 2: "red"}
    )
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=("tiny_train", f"{file}@{root}/tiny/train"))
    with pytest.raises(UserError, match=r"\(green, red\) and \(red, green\)"):
        check_classes(cfg, cfg.DATASETS.TRAIN, ())


def test_the_record_names_annotations_and_images(tmp_path):
    image(tmp_path / "i" / "a.jpg")
    file = coco(tmp_path / "x.json", ["a.jpg"])
    told = run_record._data_set(f"{file}@{tmp_path}/i")
    assert (told["path"], told["images"]) == (str(file), str(tmp_path / "i"))
