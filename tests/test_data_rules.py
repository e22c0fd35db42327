"""The rules of a sound annotation file: `data check` says OK exactly where a training runs, whatever is wrong."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from test_data_check import DEFECTS, annotation, rle, sound, write

from loco_det.annotations.check import STOPS, check_coco, masks_of
from loco_det.annotations.coco import load_coco, match_files, readable_annotations
from loco_det.annotations.index import load_index
from loco_det.annotations.mapper import DetectionMapper, sample_rng
from loco_det.annotations.rules import COMPUTED, EFFECTS, LEFT_OUT, RULES, SUSPECT, Use, findings
from loco_det.core.errors import UserError
from loco_det.detection.keys import get_cfg
from loco_det.evaluation.coco import evaluate_coco

MASKS = ("", "polygon", "bitmask")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def warnings(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("loco_det"), "propagate", True)
    return caplog


# --- OK means OK ------------------------------------------------------------------------------------------------

# What else can be wrong with a file or not, beside test_data_check.DEFECTS.
MORE: dict[str, Any] = {
    "sound": lambda c: None,
    "one object without a mask": lambda c: c["annotations"][1].pop("segmentation"),
    "one with a null mask": lambda c: c["annotations"][1].update(segmentation=None),
    "one with no polygon": lambda c: c["annotations"][1].update(segmentation=[]),
    "a crowd without a mask": lambda c: c["annotations"][1].update(segmentation=None, iscrowd=1),
    "a crowd of RLE": lambda c: c["annotations"][1].update(segmentation=rle([100, 50, 2250]), iscrowd=1),
    "a malformed crowd": lambda c: c["annotations"][1].update(segmentation="x", iscrowd=1),
    "one RLE": lambda c: c["annotations"][1].update(segmentation=rle([100, 50, 2250])),
    "a malformed RLE": lambda c: c["annotations"][1].update(segmentation=rle([100, 50])),
    "all RLE": lambda c: [a.update(segmentation=rle([100, 50, 2250])) for a in c["annotations"]],
    "all crowds": lambda c: [a.update(iscrowd=1) for a in c["annotations"]],
    "all crowds of RLE": lambda c: [a.update(iscrowd=1, segmentation=rle([100, 50, 2250])) for a in c["annotations"]],
    "no mask at all": lambda c: [a.pop("segmentation") for a in c["annotations"]],
    "no area": lambda c: [a.pop("area") for a in c["annotations"]],
    "no annotation": lambda c: c["annotations"].clear(),
    "all flat": lambda c: [a.update(bbox=[3, 3, 0, 0]) for a in c["annotations"]],
    "a far point": lambda c: c["annotations"][0].update(segmentation=[[1, 1, 9, 1, 9, 1e9]]),
    "a flat box without a mask": lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 1], segmentation=None),
    "a stray without a mask": lambda c: c["annotations"].append(annotation(99, 77, segmentation=None)),
    "two points and a polygon": lambda c: c["annotations"][0]["segmentation"].insert(0, [1, 1, 2, 2]),
    "a list of nothing": lambda c: c["annotations"][0].update(segmentation=[[]]),
    "names elsewhere": lambda c: [i.update(file_name="C:\\x\\val\\" + i["file_name"]) for i in c["images"]],
    "two names for one file": lambda c: c["images"][0].update(file_name="x/2.jpg"),
}
SPOILS = MORE | {kind: spoil for kind, (_, _, spoil) in DEFECTS.items()}


def trains(paths: Any, masks: str) -> bool:
    """Whether a training goes through every image, by doing so; of masks the mapper alone is asked."""
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = bool(masks), masks or "polygon"
    mapper = DetectionMapper(cfg, train=True)
    try:
        dataset = load_coco(paths)
        for number, record in enumerate(dataset):
            mapper(record, sample_rng(0, number))
    except UserError:
        return False
    return True


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", SPOILS)
def test_ok_is_said_exactly_where_a_training_runs(tmp_path, kind, masks):
    content = copy.deepcopy(sound())
    SPOILS[kind](content)
    paths = write(tmp_path, content)
    checked = check_coco(paths, load_index(paths.annotations), workers=0, masks=masks)
    assert (not checked.stops) == trains(paths, masks), [d.kind for d in checked.stops]
    if not checked.stops:
        load_coco(paths, masks=masks)


@pytest.mark.parametrize("seed", range(12))
def test_ok_is_said_exactly_where_a_training_runs_with_several_defects(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = copy.deepcopy(sound())
    for kind in rng.choice(sorted(set(SPOILS) - {"no annotation", "no mask at all", "no area"}), 2, replace=False):
        SPOILS[kind](content)
    paths = write(tmp_path, content)
    for masks in MASKS:
        checked = check_coco(paths, load_index(paths.annotations), workers=0, masks=masks)
        assert (not checked.stops) == trains(paths, masks)


def test_every_rule_is_hit_by_a_test():
    """A rule that no test hits could be deleted unnoticed."""
    tested = set(DEFECTS) | {
        *("no images at all", "no categories at all", "no annotations at all, so there is nothing to measure against"),
        *("image id out of range", "category id out of range", "annotation id out of range"),  # test_evaluation_coco
        *("box that is not finite", "no usable annotation at all", "no object that is not a crowd"),
        *("object without a mask", "object whose mask is an RLE and not polygons", "annotation without an area"),
        *(rule.name for rule in RULES if SUSPECT in (rule.train, rule.evaluate)),
    }
    assert {rule.name for rule in RULES} - tested == set()


@pytest.mark.parametrize(
    ("kind", "masks"),
    [
        *(("sound", "polygon"), ("one RLE", "bitmask"), ("all RLE", "bitmask"), ("no mask at all", "")),
        *(("a crowd of RLE", "polygon"), ("one object without a mask", "polygon"), ("all crowds of RLE", "")),
    ],
)
def test_the_mask_format_that_a_file_needs(tmp_path, kind, masks):
    content = sound()
    SPOILS[kind](content)
    assert masks_of(load_index(write(tmp_path, content).annotations)) == masks


def test_an_error_names_count_first_entry_and_remedy(tmp_path):
    content = sound()
    for entry in content["annotations"][2:5]:
        del entry["segmentation"]
    paths = write(tmp_path, content)
    load_coco(paths)
    with pytest.raises(UserError) as caught:
        load_coco(paths, masks="polygon")
    first = min((a["image_id"], a["id"]) for a in content["annotations"][2:5])
    message = str(caught.value)
    assert f"3 x object without a mask, the first annotation id {first[1]} of image id {first[0]}" in message
    assert "MODEL.MASK_ON False" in message
    content = sound()
    content["annotations"][0]["segmentation"] = rle([2400])
    with pytest.raises(UserError, match=r"1 x .* RLE .*annotation id 10.*INPUT\.MASK_FORMAT bitmask"):
        load_coco(write(tmp_path, content), masks="polygon")


# --- boxes that are none ----------------------------------------------------------------------------------------


def many(seed: int, count: int = 200, masks: bool = False) -> dict[str, Any]:
    """Objects all over images of 400 x 300."""
    rng = np.random.default_rng(seed)
    content = sound()
    for image in content["images"]:
        image.update(height=300, width=400)
    content["annotations"] = []
    for k in range(count):
        w, h = rng.uniform(8, 60, 2)
        x, y = rng.uniform(0, 400 - w), rng.uniform(0, 300 - h)
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]] if masks else None
        content["annotations"].append(annotation(k, 1 + k % 4, bbox=[x, y, w, h], segmentation=polygon))
    return content


def to_units(box: list[float]) -> list[float]:
    return [box[0] / 400, box[1] / 300, box[2] / 400, box[3] / 300]


def to_corners(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


WRONG = {
    "box in units of the image and not in pixels": to_units,
    "box that seems to be x1, y1, x2, y2": to_corners,
    "box far from its polygon, of up to 300 compared": lambda b: [(b[0] + 200) % 340, (b[1] + 150) % 240, *b[2:]],
}


def suspects(tmp_path: Path, content: dict[str, Any]) -> dict[str, int]:
    index = load_index(write(tmp_path, content).annotations)
    return {found.rule.name: len(found.rows) for found in findings(index, Use("train"), (SUSPECT,))}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("kind", WRONG)
def test_most_boxes_decide_whether_a_file_is_suspect(tmp_path, warnings, kind, share):
    content = many(0, masks="polygon" in kind)
    wrong = content["annotations"][: int(share * 200)]
    for entry in wrong:
        entry["bbox"] = WRONG[kind](entry["bbox"])
    found = suspects(tmp_path, content)
    assert found.keys() == ({kind} if share > 0.5 else set())
    load_coco(write(tmp_path, content))
    load_coco(write(tmp_path, content), need_annotations=False)
    said = [r.getMessage() for r in warnings.records if kind in r.getMessage()]
    assert len(said) == (share > 0.5)
    if said:
        assert found[kind] >= 0.9 * min(len(wrong), 300)
        assert "instances_val.json" in said[0]


@pytest.mark.parametrize("seed", range(5))
def test_sound_boxes_of_any_size_are_not_suspect(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = many(seed, masks=True)
    for entry in content["annotations"]:
        w, h = rng.uniform(1, (400, 300), 2) ** rng.uniform(0.3, 1)
        x, y = rng.uniform(0, 400 - w), rng.uniform(0, 300 - h)
        entry["bbox"] = [x, y, w, h]
        entry["segmentation"] = [[x, y, x + w, y, x + w / 2, y + h]]
    assert suspects(tmp_path, content) == {}


def test_large_sound_boxes_in_the_corner_are_not_suspect(tmp_path):
    """Read as corners they would lie in their images, too."""
    content = many(0)
    for k, entry in enumerate(content["annotations"]):
        entry["bbox"] = [k % 20, k % 15, 250 + k % 50, 200 + k % 40]
    assert suspects(tmp_path, content) == {}


def test_a_sample_of_a_large_file_is_compared(tmp_path):
    content = many(0, count=3000, masks=True)
    for entry in content["annotations"]:
        entry["bbox"] = [(entry["bbox"][0] + 200) % 340, *entry["bbox"][1:]]
    ((kind, count),) = suspects(tmp_path, content).items()
    assert "polygon" in kind
    assert 150 < count <= 300


# --- areas that are computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_an_absent_area_is_the_masks_or_the_boxes(tmp_path, warnings, evaluator):
    """APs, APm and APl depend on it; the twin has pycocotools' areas written in."""
    rng = np.random.default_rng(0)
    content = sound()
    for image in content["images"]:
        image.update(height=300, width=400)
    content["annotations"], results = [], []
    for k in range(60):
        x, y, w, h = [*rng.uniform(0, 200, 2).tolist(), *rng.uniform(10, 99, 2).tolist()]
        triangle = [[x, y, x + w, y, x, y + h]]
        area = coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(triangle, 300, 400)))
        entry = annotation(k + 1, 1 + k % 4, bbox=[x, y, w, h], segmentation=triangle, area=float(area))
        if k % 3 == 0:
            del entry["segmentation"]
            entry["area"] = w * h
        elif k % 3 == 1:
            entry["segmentation"] = coco_mask.frPyObjects(triangle, 300, 400)[0]
            entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
        content["annotations"].append(entry)
        result = {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": float(rng.random())}
        results.append({**result, "bbox": [x + float(rng.normal(0, 6)), y, w, h]})
    expected = evaluate_coco(write(tmp_path, content).annotations, results, ("bbox",), evaluator=evaluator)["bbox"]
    for entry in content["annotations"][10:]:
        del entry["area"]
    path = write(tmp_path, content).annotations
    assert evaluate_coco(path, results, ("bbox",), evaluator=evaluator)["bbox"] == expected
    assert all(5 < expected[name] < 100 for name in ("AP", "APs", "APm"))
    (line,) = [r.getMessage() for r in warnings.records if "area" in r.getMessage()]
    assert "50 of 60" in line
    index = load_index(path)
    assert np.isnan(index.area).sum() == 50
    found = {f.rule.name: f.effect for f in findings(index, Use("train"), EFFECTS)}
    assert found["annotation without an area"] == COMPUTED


def test_a_malformed_mask_has_its_boxs_area_where_boxes_are_measured(tmp_path):
    content = sound()
    content["annotations"][0].update(segmentation="none", bbox=[2, 2, 10, 10])
    del content["annotations"][0]["area"]
    box = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "score": 1.0}
    path = write(tmp_path, content).annotations
    assert evaluate_coco(path, [box], ("bbox",))["bbox"]["APs"] > 0
    with pytest.raises(UserError, match="no segmentation that can be evaluated"):
        evaluate_coco(path, [], ("bbox", "segm"))


# --- file names -------------------------------------------------------------------------------------------------

NAMES = {
    "a b.jpg": ["a%20b.jpg", "D:\\photos\\a b.jpg", "http://example.org/train/a%20b.jpg?size=large"],
    "sub/c.jpg": ["sub\\c.jpg", "val/sub/c.jpg", "/data/val/sub/c.jpg", "C:/sub/c.jpg", "file:///x/sub/c.jpg"],
    "50%.jpg": ["val/50%.jpg", "val\\50%25.jpg", "50%25.jpg"],
    "d.jpg": ["..\\imgs\\d.jpg", "../../media/upload/1/d.jpg", "x/../d.jpg", "D.JPG", "X\\D.jpg"],
    "E.JPG": ["e.jpg", "../e.JPG"],
    "ü.jpg": ["%C3%BC.jpg", "s3://bucket/val/%C3%BC.jpg", " ü.jpg "],
}


def folder_of(tmp_path: Path, names: list[str], files: list[str]) -> Any:
    content = sound()
    content["images"] = [{"id": i, "file_name": name, "height": 40, "width": 60} for i, name in enumerate(names, 1)]
    content["annotations"] = [annotation(1, 1), annotation(2, 1, category_id=1)]
    paths = write(tmp_path, content)
    for path in paths.images.iterdir():
        path.unlink()
    for file in files:
        (paths.images / file).parent.mkdir(exist_ok=True)
        (paths.images / file).touch()
    return paths


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in NAMES.items() for name in names])
def test_a_name_that_was_written_elsewhere_finds_its_file(tmp_path, warnings, file, name):
    paths = folder_of(tmp_path, [name, "other.jpg"], [file, "other.jpg"])
    dataset = load_coco(paths)
    assert [record.file_name for record in dataset] == [str(paths.images / file), str(paths.images / "other.jpg")]
    (line,) = [r.getMessage() for r in warnings.records if "file names" in r.getMessage()]
    assert "1 file names" in line
    assert name in line
    checked = json.loads(readable_annotations(paths).read_bytes())
    assert [image["file_name"] for image in checked["images"]] == [file, "other.jpg"]
    assert checked["annotations"] == json.loads(paths.annotations.read_bytes())["annotations"]


def test_a_file_of_that_very_name_comes_first(tmp_path):
    paths = folder_of(tmp_path, ["a%20b.jpg", "a b.jpg"], ["a%20b.jpg", "a b.jpg"])
    matched = match_files(paths, load_index(paths.annotations))
    assert list(matched.names) == ["a%20b.jpg", "a b.jpg"]
    assert (matched.absent, matched.renamed) == ([], [])
    assert readable_annotations(paths) == paths.annotations


@pytest.mark.parametrize(
    "names",
    [
        ["cat/1.jpg", "dog/1.jpg"],  # which of them is 1.jpg?
        ["1.jpg", "x/1.jpg"],
        ["../val/1.jpg", "other.jpg"],  # leaves the folder: never
        ["gone.jpg", "other.jpg"],
        ["..", "other.jpg"],
        ["OTHER.jpg", "other.jpg"],  # two images cannot be one file
        ["", "other.jpg"],
        ["x" * 5000, "other.jpg"],
        ["\0", "other.jpg"],
    ],
)
def test_a_name_that_means_no_file_or_two_images_is_refused(tmp_path, names):
    paths = folder_of(tmp_path, names, ["1.jpg", "other.jpg"])
    absent = match_files(paths, load_index(paths.annotations)).absent
    if names[0].startswith("../"):
        assert absent == []  # as it stands it is a file
        return
    assert absent
    with pytest.raises(UserError, match="complete the folder"):
        load_coco(paths)


def test_a_name_of_another_case_must_mean_one_file(tmp_path):
    paths = folder_of(tmp_path, ["x/A.JPG", "other.jpg"], ["A.jpg", "a.jpg", "other.jpg"])
    assert match_files(paths, load_index(paths.annotations)).absent == [0]


def test_a_name_with_dots_is_never_looked_for_outside_the_folder(tmp_path):
    paths = folder_of(tmp_path, ["x/../../d.jpg", "other.jpg"], ["other.jpg"])
    (paths.images.parent / "d.jpg").touch()
    assert match_files(paths, load_index(paths.annotations)).absent == [0]


def test_a_lenient_file_is_readable_for_others_by_its_copy(tmp_path):
    content = sound()
    for image in content["images"]:
        image["id"] = str(image["id"])
    paths = write(tmp_path, content)
    assert json.loads(readable_annotations(paths).read_bytes()) == sound()


def test_left_out_is_what_no_record_has(tmp_path):
    content = sound()
    content["annotations"] += [annotation(98, 77), annotation(99, 1, bbox=[1, 1, 0, 3])]
    content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
    paths = write(tmp_path, content)
    there = {k for record in load_coco(paths) for k in record.annotation_ids.tolist()}
    index = load_index(paths.annotations)
    out = {int(index.annotation_id[row]) for f in findings(index, Use("train"), (LEFT_OUT,)) for row in f.rows}
    assert out == {a["id"] for a in content["annotations"]} - there == {10, 98, 99}
    assert STOPS not in {f.effect for f in findings(index, Use("train"), EFFECTS)}
