"""`loco-det data check`: every kind of defect is found, counted and named, and sets the exit status."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from view_cases import encode, photograph, two_views

from loco_det.annotations.coco import load_coco
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import Dataset
from loco_det.annotations.rules import COMPUTED, EFFECTS, LEFT_OUT, NOTE, STOPS, SUSPECT, Use, findings
from loco_det.cli import main
from loco_det.core.errors import UserError
from loco_det.images.views import view_config

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch, request) -> None:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    if "real_coco" not in request.fixturenames:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        path = tmp_path / "images" / ("cat" if i < 4 else "dog") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photograph(40 + i, 60, seed=i)))
    return tmp_path / "images"


def annotation(number: int, image: int, **changes: Any) -> dict[str, Any]:
    sound = {"id": number, "image_id": image, "category_id": 1 + number % 2, "bbox": [2, 2, 10, 10], "area": 100}
    return {**sound, "iscrowd": 0, "segmentation": SQUARE, **changes}


def sound() -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in range(1, 5)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [annotation(10 + i, 1 + i % 3, bbox=[2, 2, 10, 10 + i]) for i in range(6)],
    }


def write(tmp_path: Path, content: dict[str, Any]) -> Dataset:
    """As the data set pets_val."""
    root = tmp_path / "datasets" / "pets"
    paths = Dataset("pets_val", root / "val", root / "annotations" / "instances_val.json")
    paths.images.mkdir(parents=True, exist_ok=True)
    paths.annotations.parent.mkdir(exist_ok=True)
    for i in range(1, 5):
        (paths.images / f"{i}.jpg").write_bytes(encode(photograph(40, 60, seed=i)))
    paths.annotations.write_text(json.dumps(content))
    return paths


def check(*arguments: object) -> tuple[int, dict[str, Any]]:
    status = main(["data", "check", *map(str, arguments), "--workers", "0", "--out", "out", "--quiet"])
    return status, json.loads(Path("out/check.json").read_text())


def kinds(answer: dict[str, Any]) -> dict[str, tuple[int, str]]:
    return {defect["kind"]: (defect["count"], defect["effect"]) for defect in answer["defects"]}


# --- image sets -------------------------------------------------------------------------------------------------


def test_a_sound_image_set(folder, capsys):
    status, answer = check(folder)
    assert status == 0
    assert answer["ok"] is True
    assert answer["defects"] == []
    assert answer["classes"] == {"cat": 4, "dog": 2}
    assert answer["counts"]["images"] == 6
    assert answer["counts"]["bytes"] == sum(file.stat().st_size for file in folder.rglob("*.jpg"))
    assert answer["counts"]["short side"] == {"least": 40, "median": 42, "most": 45}
    assert [Path(picture).name for picture in answer["pictures"]] == ["histogram.png", "two_views.png"]
    text = capsys.readouterr().out
    assert "OK to pretrain on the images of images" in text
    assert "####" in text


def test_unreadable_and_doubled_images(folder):
    (folder / "cat" / "0.jpg").write_bytes(b"\xff\xd8\xffnothing")
    (folder / "dog" / "9.jpg").write_bytes((folder / "dog" / "4.jpg").read_bytes())
    status, answer = check(folder)
    assert status == 1
    assert kinds(answer) == {"unreadable image": (1, STOPS), "image with the same bytes as another": (1, NOTE)}
    assert "cat/0.jpg: not a readable image" in answer["defects"][0]["examples"][0]
    assert "9.jpg = " in answer["defects"][1]["examples"][0]
    status, answer = check(folder, "--max-bad-share", 0.2)
    assert status == 0
    assert kinds(answer)["unreadable image"] == (1, LEFT_OUT)


def test_json_is_all_that_is_printed(folder, capsys):
    status, answer = check(folder, "--json", "--format", "flat")
    assert json.loads(capsys.readouterr().out) == answer
    assert (status, answer["classes"]) == (0, {})


def test_every_source_is_checked(folder, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(folder.rglob("*.jpg")):
            archive.write(file, file.relative_to(folder))
    (tmp_path / "set.txt").write_text("\n".join(f"{file}\tx" for file in folder.rglob("*.jpg")))
    assert check(tmp_path / "set.zip")[1]["classes"] == {"cat": 4, "dog": 2}
    assert check(tmp_path / "set.txt")[1]["classes"] == {"x": 6}


def test_shards_in_braces_are_checked(folder, tmp_path, capsys):
    import tarfile

    pytest.importorskip("webdataset", reason="the extra `webdataset` is not installed")
    files = sorted(folder.rglob("*.jpg"))
    for k in range(2):
        with tarfile.open(tmp_path / f"train-{k:04}.tar", "w") as archive:
            for file in files[3 * k : 3 * k + 3]:
                archive.add(file, file.name)
    for braces in (f"{tmp_path}/train-{{0000..0001}}.tar", "./train-{0000..0001}.tar", "train-{0000..0001}.tar"):
        status, answer = check(braces)
        assert (status, answer["counts"]["images"], answer["data"]) == (0, 6, braces)
    for gone in ("./train-{0000..0002}.tar", "./train-{0..3.tar", "./gone.tar", "./gone.zip", "./gone.txt"):
        assert main(["data", "check", gone, "--out", "out"]) == 2
        said = capsys.readouterr().err
        assert "DATA.PATH" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["x" * 300, "x" * 300 + "_train", "./" + "x" * 300, "x" * 300 + ".json", "x/" + "y" * 300 + ".tar"]
)
def test_a_name_that_no_file_can_have_is_bad_input(name, capsys):
    for arguments in (["check", name], ["check", name, "--annotations", name], ["convert", name, "out"]):
        assert main(["data", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("form", ["auto", "folder", "flat"])
@pytest.mark.parametrize("out", ["images/report", "images", "images/cat"])
def test_its_own_pictures_below_the_images_are_not_checked(folder, out, form):
    for _ in range(2):
        arguments = ["images", "--format", form, "--workers", "0", "--out", out, "--quiet"]
        assert main(["data", "check", *arguments]) == 0
        answer = json.loads(Path(out, "check.json").read_text())
        assert answer["counts"]["images"] == 6
        assert answer["classes"] == ({} if form == "flat" else {"cat": 4, "dog": 2})


def test_nothing_to_check_is_bad_input(folder, capsys):
    for arguments in (["absent"], ["pets_train"], [folder, "--annotations", "absent.json"], [folder, "--format", "x"]):
        assert main(["data", "check", *map(str, arguments), "--quiet"]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("option", ["--seed -1", "--workers -1", "--size 0"])
def test_a_number_that_means_nothing_is_refused_by_its_option(option, folder, capsys):
    assert main(["data", "check", str(folder), *option.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {option.replace(' ', ' is ')}; give")
    assert said.count("\n") == 1


def test_a_class_may_be_called_like_a_formula(folder):
    (folder / "cat").rename(folder / "$a_{$")
    status, answer = check(folder)
    assert (status, answer["classes"]) == (0, {"$a_{$": 4, "dog": 2})


def test_the_sheet_shows_each_image_and_its_views(folder):
    check(folder, "--size", 32)
    sheet = cv2.imread("out/two_views.png")
    assert sheet.shape[1] == 2 * (3 * 32 + 8) + 3 * 8  # two groups of three tiles
    headings = sheet[:20, :, 0] < 200  # one above each of the six pictures
    for left in (8 + group * (3 * 32 + 8 + 8) + tile * (32 + 4) for group in range(2) for tile in range(3)):
        assert headings[:, left : left + 32].any()
    views = two_views((folder / "cat" / "0.jpg").read_bytes(), "x", view_config(32, {}), 0, 0, 0)
    for number, shown in enumerate(views):
        left = 8 + (32 + 4) * (1 + number)
        np.testing.assert_array_equal(sheet[20 + 8 : 20 + 40, left : left + 32, ::-1], shown)


# --- annotations ------------------------------------------------------------------------------------------------


def test_a_sound_detection_set(tmp_path):
    write(tmp_path, sound())
    for arguments in (
        ["pets_val"],
        ["datasets/pets/val", "--annotations", "datasets/pets/annotations/instances_val.json"],
    ):
        status, answer = check(*arguments)
        assert status == 0
        assert answer["defects"] == []
        assert answer["classes"] == {"cat": 3, "dog": 3}
        counts = answer["counts"]
        assert (counts["images"], counts["annotations"], counts["usable annotations"]) == (4, 6, 6)
        assert counts["images without annotations"] == 1
        assert [Path(p).name for p in answer["pictures"]] == ["histogram.png", "annotated.png", "two_views.png"]
        assert cv2.imread("out/annotated.png").std() > 20


def rle(counts: list[int], size: tuple[int, int] = (40, 60)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}


# kind: (effect, count, how an otherwise sound file gets it)
DEFECTS: dict[str, tuple[str, int, Any]] = {
    "image that is listed but not there": (STOPS, 1, lambda c: c["images"][3].update(file_name="gone.jpg")),
    "image of another size than the file says": (STOPS, 1, lambda c: c["images"][3].update(height=41)),
    "image id that occurs twice": (STOPS, 1, lambda c: c["images"].append(c["images"][3])),
    "category id that occurs twice": (STOPS, 1, lambda c: c["categories"].append({"id": 2, "name": "emu"})),
    "annotation id that occurs twice": (STOPS, 1, lambda c: c["annotations"][0].update(id=11)),
    "image without a size": (STOPS, 1, lambda c: c["images"][3].update(width=0)),
    "annotation of a category that is not listed": (
        STOPS,
        2,
        lambda c: [a.update(category_id=7) for a in c["annotations"][:2]],
    ),
    "annotation with the key 'ignore'": (STOPS, 1, lambda c: c["annotations"][2].update(ignore=1)),
    "malformed segmentation": (
        STOPS,
        3,
        lambda c: [
            c["annotations"][0].update(segmentation=rle([5, 5])),
            c["annotations"][1].update(segmentation=rle([2400], (60, 40))),
            c["annotations"][2].update(segmentation="none"),
        ],
    ),
    "annotation of an image that is not listed": (LEFT_OUT, 1, lambda c: c["annotations"].append(annotation(99, 77))),
    "box without area": (
        LEFT_OUT,
        2,
        lambda c: [c["annotations"][0].update(bbox=[1, 1, 0, 5]), c["annotations"][1].update(bbox=[1, 1, 4, -1])],
    ),
    "polygons of fewer than three points": (
        LEFT_OUT,
        1,
        lambda c: c["annotations"][0].update(segmentation=[[1, 1, 2, 2]]),
    ),
    "box outside its image": (
        NOTE,
        2,
        lambda c: [c["annotations"][0].update(bbox=[60, 2, 9, 9]), c["annotations"][1].update(bbox=[-9, 2, 9, 9])],
    ),
    "box that reaches beyond its image": (NOTE, 1, lambda c: c["annotations"][0].update(bbox=[50, 2, 12, 9])),
    "annotation with the box and category of another": (
        NOTE,
        2,
        lambda c: c["annotations"].append({**c["annotations"][0], "id": 99}),
    ),
    "annotation whose 'area' is 0 or less": (NOTE, 1, lambda c: c["annotations"][0].update(area=0)),
    "category name that occurs twice": (NOTE, 1, lambda c: c["categories"][1].update(name="cat")),
    "category without annotations": (NOTE, 1, lambda c: c["categories"].append({"id": 3, "name": "emu"})),
}
# What cannot be had alone.
IMPLIED = {
    "image without a size": {"image of another size than the file says"},
    "image id that occurs twice": {"image with the same bytes as another"},
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_each_defect_is_found_alone(kind, tmp_path, capsys):
    effect, count, spoil = DEFECTS[kind]
    content = copy.deepcopy(sound())
    spoil(content)
    paths = write(tmp_path, content)
    status, answer = check("pets_val")
    found = kinds(answer)
    assert found.pop(kind) == (count, effect)
    assert found.keys() <= IMPLIED.get(kind, set())
    assert answer["ok"] is (effect != STOPS)
    assert status == (1 if effect == STOPS else 0)
    assert kind in capsys.readouterr().out
    if kind in ("malformed segmentation", "image of another size than the file says"):
        return  # training meets these when it comes to the image
    if effect == STOPS:  # what is said to stop a training does
        with pytest.raises(UserError):
            load_coco(paths)
    else:
        load_coco(paths)


def test_boxes_that_no_training_can_use_and_unreadable_images(tmp_path):
    content = sound()
    for number, wide in enumerate((1e308, 1e39, 1e30)):  # the last is finite in float32
        content["annotations"][number]["bbox"] = [2, 2, wide, 10]
    paths = write(tmp_path, content)
    (paths.images / "4.jpg").write_bytes(b"nothing")
    status, answer = check("pets_val")
    assert status == 1
    assert kinds(answer) == {
        "unreadable image": (1, STOPS),
        "box that is not finite": (2, STOPS),
        "box that reaches beyond its image": (1, NOTE),
    }
    with pytest.raises(UserError, match="not finite"):
        load_coco(paths)


def test_an_image_of_another_size_is_named_and_not_drawn(tmp_path):
    """Its masks would be of the size that the file says."""
    content = sound()
    content["images"][0]["height"] = 2**40
    write(tmp_path, content)
    status, answer = check("pets_val")
    assert status == 1
    assert kinds(answer)["image of another size than the file says"] == (1, STOPS)
    assert [Path(p).name for p in answer["pictures"]] == ["histogram.png", "annotated.png", "two_views.png"]


def test_a_set_without_a_usable_annotation(tmp_path):
    content = sound()
    for entry in content["annotations"]:
        entry["bbox"] = [0, 0, 0, 0]
    write(tmp_path, content)
    status, answer = check("pets_val")
    assert status == 1
    assert kinds(answer)["no usable annotation at all"] == (1, STOPS)
    write(tmp_path, {**content, "annotations": []})
    status, answer = check("pets_val")
    assert status == 1
    assert kinds(answer)["no usable annotation at all"] == (1, STOPS)


def test_the_verdict_names_the_keys_that_it_holds_for(tmp_path, capsys):
    def verdict(*arguments: str) -> tuple[int, str]:
        status, _ = check("pets_val", *arguments)
        return status, capsys.readouterr().out

    content = sound()
    write(tmp_path, content)
    assert verdict()[1].endswith(
        "OK to train on pets_val with masks (INPUT.MASK_FORMAT polygon): nothing stands against it\n"
    )
    content["annotations"][0]["segmentation"] = rle([100, 50, 2250])
    write(tmp_path, content)
    status, text = verdict()
    assert status == 0
    assert "\nOK to train on pets_val with masks (INPUT.MASK_FORMAT bitmask)" in text
    status, text = verdict("--masks", "polygon")
    assert status == 1
    assert "stops training: 1 x object whose mask is an RLE and not polygons; set INPUT.MASK_FORMAT bitmask" in text
    assert "\nNOT OK to train on pets_val with masks (INPUT.MASK_FORMAT polygon)" in text
    del content["annotations"][1]["segmentation"]
    write(tmp_path, content)
    status, text = verdict()
    assert status == 1
    assert "1 x object without a mask; give it one, or set MODEL.MASK_ON False" in text
    status, text = verdict("--masks", "none")
    assert status == 0
    assert "\nOK to train on pets_val with boxes alone (MODEL.MASK_ON False)" in text


def test_all_crowds_are_nothing_to_learn_from(tmp_path):
    content = sound()
    for entry in content["annotations"]:
        entry["iscrowd"] = 1
    write(tmp_path, content)
    status, answer = check("pets_val")
    assert status == 1
    assert kinds(answer) == {"no object that is not a crowd": (1, STOPS)}


def test_what_is_probably_wrong_is_said_in_the_verdict(tmp_path, capsys):
    content = sound()
    for entry in content["annotations"]:
        entry["bbox"] = [side / 60 for side in entry["bbox"]]
    write(tmp_path, content)
    status, answer = check("pets_val")
    assert status == 0
    assert kinds(answer)["box in units of the image and not in pixels"] == (6, SUSPECT)
    text = capsys.readouterr().out
    assert "probably wrong: 6 x box in units of the image and not in pixels; multiply x and width" in text
    assert "but look at what is probably wrong" in text


def test_what_is_read_otherwise_than_it_stands_is_counted(tmp_path):
    content = sound()
    for image in content["images"]:
        image.update(id=str(image["id"]), file_name="val\\" + image["file_name"])
    for entry in content["annotations"][:2]:
        entry["area"] = None
    write(tmp_path, content)
    status, answer = check("pets_val")
    assert status == 0
    assert kinds(answer) == {
        "image whose id is text": (4, COMPUTED),
        "file name that is not the file's": (4, COMPUTED),
        "annotation whose area is null": (2, COMPUTED),
        "annotation without an area": (2, COMPUTED),
    }
    assert answer["classes"] == {"cat": 3, "dog": 3}
    assert [Path(p).name for p in answer["pictures"]] == ["histogram.png", "annotated.png", "two_views.png"]


def test_a_file_that_is_no_annotation_file_is_bad_input(tmp_path, capsys):
    paths = write(tmp_path, sound())
    paths.annotations.write_text("{")
    assert main(["data", "check", "pets_val", "--quiet"]) == 2
    assert "instances_val.json" in capsys.readouterr().err


def test_against_a_loop_over_random_boxes(tmp_path):
    """The vectorised tests of boxes against the plain reading of their names."""
    rng = np.random.default_rng(0)
    content = sound()
    boxes = np.round(rng.uniform(-30, 70, (300, 4)), 1).tolist()
    content["annotations"] = [annotation(i, int(rng.integers(1, 6)), bbox=box) for i, box in enumerate(boxes)]
    index = load_index(write(tmp_path, content).annotations)
    defects = {found.rule.name: len(found.rows) for found in findings(index, Use("train"), EFFECTS)}
    flat = outside = beyond = 0
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        if w <= 0 or h <= 0:
            flat += 1
        elif entry["image_id"] == 5:
            outside += x + w <= 0 or y + h <= 0
            beyond += (x < -1 or y < -1) and x + w > 0 and y + h > 0
        elif x >= 60 or y >= 40 or x + w <= 0 or y + h <= 0:
            outside += 1
        else:
            beyond += x < -1 or y < -1 or x + w > 61 or y + h > 41
    assert defects["box without area"] == flat > 50
    assert defects["box outside its image"] == outside > 10
    assert defects["box that reaches beyond its image"] == beyond > 10


def test_real_coco(real_coco):
    status, answer = check("coco_2017_val")
    assert status == 0
    assert answer["counts"]["images"] == 80
    assert answer["counts"]["annotations"] == sum(answer["classes"].values())
