"""Subsets of detection data sets by name: the rule computed by hand, nesting, shots, classes, both engines."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tiny_detection import overrides, tiny_cfg, write_tiny

from loco_det.annotations.registry import find_dataset
from loco_det.annotations.subsets import part_name, part_size
from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.detection.train import train_net

NAME = "many_train"
NUMBER = 300


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory):
    """`many_train`, which has annotations without images to look at, and `tiny_train`, which has both."""
    root = write_tiny(tmp_path_factory.mktemp("data"))
    (root / "many" / "train").mkdir(parents=True)
    (root / "many" / "annotations").mkdir()
    rng = np.random.default_rng(0)
    annotations = [
        {"id": k + 10, "image_id": int(rng.integers(NUMBER)) * 3, "category_id": int(c), "bbox": [0, 0, 5, 5],
         "area": 25, "iscrowd": int(rng.random() < 0.1), "segmentation": [[0, 0, 5.5, 0, 5, 5]]}
        for k, c in enumerate(rng.choice([2, 5, 9], 700, p=[0.7, 0.29, 0.01]))
    ]  # fmt: skip
    content = {
        "info": {"year": 2017},
        "images": [
            {"id": i * 3, "file_name": f"ü{i}.jpg", "height": 9, "width": 9, "license": 1} for i in range(NUMBER)
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 5, "name": "traffic light"}, {"id": 9, "name": "dog"}],
        "annotations": annotations,
    }
    (root / "many/annotations/instances_train.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.setenv("LOCO_DET_CACHE", str(root / "cache"))
        yield root


def read(name: str) -> dict:
    return json.loads(find_dataset(name).annotations.read_text())


def image_ids(name: str) -> set[int]:
    return {image["id"] for image in read(name)["images"]}


@pytest.mark.parametrize(("percent", "count"), [("0.5", 2), ("1", 3), ("2", 6), ("5", 15), ("10", 30), ("100", 300)])
def test_a_share_is_the_first_images_by_hash(percent: str, count: int) -> None:
    whole = read(NAME)
    order = sorted(
        (image["id"] for image in whole["images"]), key=lambda i: hashlib.sha256(f"7 {i}".encode()).hexdigest()
    )
    part = read(f"{NAME}@{percent}pct_seed7")
    kept = set(order[:count])
    assert part["images"] == [image for image in whole["images"] if image["id"] in kept]
    assert part["annotations"] == [a for a in whole["annotations"] if a["image_id"] in kept]
    assert part["categories"] == whole["categories"]


def test_a_share_is_rounded_up_and_exact() -> None:
    for percent in ("0.5", "1", "7", "10", "14", "28", "29", "55", "57", "100"):
        for total in (1, 3, 99, 100, 200, 300, 118287):
            assert part_size(float(percent) / 100, total) == math.ceil(Fraction(percent) * total / 100)


def test_shares_of_a_seed_are_nested_and_seeds_differ() -> None:
    parts = [image_ids(f"{NAME}@{p}pct_seed0") for p in (0.5, 1, 2, 5, 10)]
    assert parts[0] < parts[1] < parts[2] < parts[3] < parts[4]
    assert image_ids(f"{NAME}@10pct_seed1") != parts[4]


def test_the_lists_are_fixed() -> None:
    """These are the published lists: `printf '0 42' | sha256sum` and so on, the smallest hashes of the 300 ids."""
    expected = sorted(range(0, NUMBER * 3, 3), key=lambda i: hashlib.sha256(f"0 {i}".encode()).hexdigest())[:3]
    assert sorted(image_ids(f"{NAME}@1pct_seed0")) == sorted(expected) == [111, 564, 798]


def test_shots_count_objects_of_each_class() -> None:
    whole = read(NAME)
    sets = {}
    for shots in (1, 5, 30):
        part = read(f"{NAME}@{shots}shot_seed3")
        for category in (2, 5, 9):
            own = [a["id"] for a in whole["annotations"] if a["category_id"] == category and not a["iscrowd"]]
            own.sort(key=lambda i: hashlib.sha256(f"3 {i}".encode()).hexdigest())
            found = {a["id"] for a in part["annotations"] if a["category_id"] == category}
            assert found == set(own[:shots])
        assert {image["id"] for image in part["images"]} == {a["image_id"] for a in part["annotations"]}
        assert not any(a["iscrowd"] for a in part["annotations"])
        assert len(part["categories"]) == 3
        sets[shots] = {a["id"] for a in part["annotations"]}
    assert sets[1] < sets[5] < sets[30]
    assert len(sets[5]) == 15


def test_shots_are_objects_of_images_that_are_listed(data: Path) -> None:
    source, target = data / "many", data / "listed"
    whole = json.loads((source / "annotations/instances_train.json").read_text())
    for part in ("train", "annotations"):
        (target / part).mkdir(parents=True)
    gone = {a["image_id"] for a in whole["annotations"][::2]}
    whole["images"] = [image for image in whole["images"] if image["id"] not in gone]
    (target / "annotations/instances_train.json").write_text(json.dumps(whole))
    listed = {image["id"] for image in whole["images"]}
    part = read("listed_train@10shot_seed0")
    for category in (2, 5, 9):
        own = [
            a["id"]
            for a in whole["annotations"]
            if a["category_id"] == category and not a["iscrowd"] and a["image_id"] in listed
        ]
        own.sort(key=lambda i: hashlib.sha256(f"0 {i}".encode()).hexdigest())
        assert {a["id"] for a in part["annotations"] if a["category_id"] == category} == set(own[:10])


def test_classes_alone_and_parts_of_parts() -> None:
    part = read(f"{NAME}@classes_traffic-light+cat")
    assert [c["name"] for c in part["categories"]] == ["cat", "traffic light"]
    assert {a["category_id"] for a in part["annotations"]} == {2, 5}
    assert len(part["images"]) == NUMBER
    both = read(f"{NAME}@classes_dog@1shot_seed0")
    assert [a["category_id"] for a in both["annotations"]] == [9]
    assert len(both["images"]) == 1


def test_a_changed_file_makes_another_part(data: Path) -> None:
    file = data / "many/annotations/instances_train.json"
    first = find_dataset(f"{NAME}@1pct_seed0").annotations
    assert find_dataset(f"{NAME}@1pct_seed0").annotations == first
    content = file.read_text()
    stat = file.stat()
    file.write_text(content + " ")
    assert find_dataset(f"{NAME}@1pct_seed0").annotations != first
    file.write_text(content.replace('"dog"', '"cow"'))  # as long as before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "cow" in find_dataset(f"{NAME}@1pct_seed0").annotations.read_text()
    file.write_text(content)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("1pct", "@1pct, which means nothing"),
        ("0pct_seed0", "means nothing"),
        ("101pct_seed0", "means nothing"),
        ("0shot_seed0", "means nothing"),
        ("", "@, which means nothing"),
        ("masks", "@masks, which means nothing"),
        ("classes_cow", "no class 'cow'; there are cat, traffic-light, dog"),
    ],
)
def test_parts_that_mean_nothing(part: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_dataset(f"{NAME}@{part}")


def test_names_of_parts() -> None:
    assert part_name(0.005, seed=2) == "@0.5pct_seed2"
    assert part_name(0.1) == "@10pct_seed0"
    assert part_name(0.07) == "@7pct_seed0"
    assert part_name(1.0) == part_name() == ""
    assert len(image_ids(f"{NAME}{part_name(1e-9)}")) == 1  # rounded up
    assert part_name(shots=5, seed=1) == "@5shot_seed1"


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_training_on_a_part(engine: str, tmp_path: Path) -> None:
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    steps = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": ()}
    cfg = tiny_cfg(tmp_path, DATASETS__TRAIN=("tiny_train@50pct_seed0",), **steps)
    assert "bbox" in train_net(cfg, engine=engine)


@pytest.mark.parametrize(
    ("option", "name"),
    [(("--fraction", "0.5"), "tiny_train@50pct_seed3"), (("--few-shot", "2"), "tiny_train@2shot_seed3")],
)
def test_options_of_train(option: tuple[str, str], name: str, tmp_path: Path) -> None:
    argv = ["train", "--engine", "torchvision", "--config-file", "configs/coco_loco_r50.yaml", *option, "--quiet"]
    assert main([*argv, *overrides(OUTPUT_DIR=tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=())]) == 0
    assert name in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "options", [("--fraction", "0"), ("--fraction", "2"), ("--few-shot", "0"), ("--fraction", "1", "--few-shot", "1")]
)
def test_options_that_do_not_fit(options: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config-file", "configs/coco_loco_r50.yaml", *options]) == 2
    assert "--fraction" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["classes_person", "1shot_seed0"])
def test_pixel_labels_have_no_parts_by_objects(part: str) -> None:
    with pytest.raises(UserError, match=f"cityscapes_fine_sem_seg_train@{part}: .*by objects.*@10pct_seed0"):
        find_dataset(f"cityscapes_fine_sem_seg_train@{part}")


def test_parts_are_made_where_the_file_system_has_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    wanted = read(f"{NAME}@5pct_seed3")
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert read(f"{NAME}@5pct_seed3") == wanted


def test_parts_of_parts_without_end_are_refused() -> None:
    with pytest.raises(UserError, match="5000 parts of parts; 8 are enough"):
        find_dataset(NAME + "@10pct_seed0" * 5000)


@pytest.mark.parametrize("count", [1, 30, 300])
def test_a_number_of_images_is_the_start_of_the_same_order(count: int) -> None:
    order = sorted(range(0, NUMBER * 3, 3), key=lambda i: hashlib.sha256(f"4 {i}".encode()).hexdigest())
    assert image_ids(f"{NAME}@{count}images_seed4") == set(order[:count])
    assert image_ids(f"{NAME}@30images_seed4") == image_ids(f"{NAME}@10pct_seed4")


@pytest.mark.parametrize(
    ("part", "said"), [("301images_seed0", "asks for 301 images of a set of 300"), ("0images_seed0", "means nothing")]
)
def test_a_number_of_images_that_cannot_be_had(part: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_dataset(f"{NAME}@{part}")
