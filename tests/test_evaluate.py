"""`loco-det evaluate`: the evaluators' numbers, intervals against loops over draws, bad results files."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shlex
import shutil
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import lvis_cases
import numpy as np
import pytest
import torch
from cityscapes_cases import noisy_results, write_cityscapes
from test_docs import DOCS
from test_evaluation_coco import bits, made_up_set, oracle, saved
from test_report import _resampled_ap
from test_semantic import predicted
from test_voc import detections as voc_detections
from test_voc import slow_ap, write_voc

import loco_det.evaluation as measures
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.cli import run_job
from loco_det.core.run_folder import run_folder
from loco_det.evaluation.bootstrap import Counted
from loco_det.evaluation.cityscapes import evaluate_cityscapes
from loco_det.evaluation.lvis import NUMBERS, evaluate_lvis
from loco_det.evaluation.measure import Subject
from loco_det.evaluation.pixels import evaluate_semantic
from loco_det.evaluation.proposals import Proposals, evaluate_proposals, write_proposals
from loco_det.evaluation.voc import evaluate_voc

BOTH = ("bbox", "segm")


def evaluated(tmp_path: Path, *argv: object) -> dict[str, Any]:
    out = tmp_path / "out.json"
    out.unlink(missing_ok=True)
    assert run_job("evaluate", [*map(str, argv), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refused(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert run_job("evaluate", [*map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def without(results: list[dict], key: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k != key} for row in results]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path, dict, list[dict]]:
    """An annotation file and a results file with boxes and masks, and what they hold."""
    truth, results = made_up_set(0)
    return saved(tmp_path, truth), write(tmp_path / "results.json", results), truth, results


# --- COCO -------------------------------------------------------------------------------------------------------


def test_c6_the_numbers_are_those_of_pycocotools(coco, tmp_path, capsys):
    path, file, _, results = coco
    for evaluator in ("hotcoco", "pycocotools"):
        found = evaluated(tmp_path, file, "--data", path, "--evaluator", evaluator, "--bootstrap", 0)
        (one,) = found["results"]
        for kind in BOTH:
            numbers = {name: math.nan if value is None else value for name, value in one["numbers"][kind].items()}
            assert bits(numbers) == bits(oracle(path, results, kind))
        assert (found["measure"], one["ci95"], one["images"]) == ("coco", {}, len({r["image_id"] for r in results}))
        assert "paired" not in found
    assert "bbox AP:" in capsys.readouterr().err


def test_c6_what_the_rows_have_is_measured(coco, tmp_path):
    path, _, truth, results = coco
    for given, options, kinds in (
        (without(results, "segmentation"), (), {"bbox"}),
        (without(results, "bbox"), (), {"segm"}),
        (without(results[:9], "bbox") + results[9:], ("--iou-type", "segm"), {"segm"}),
        (results, ("--iou-type", "bbox"), {"bbox"}),
    ):
        file = write(tmp_path / "some.json", given)
        found = evaluated(tmp_path, file, "--data", path, "--bootstrap", 0, *options)["results"][0]["numbers"]
        assert set(found) == kinds
        for kind in kinds:
            assert found[kind]["AP"] == oracle(path, results, kind)["AP"]
    truth["annotations"] = without(truth["annotations"], "segmentation")
    assert set(evaluated(tmp_path, write(tmp_path / "none.json", []), "--data", saved(tmp_path, truth),
                         "--bootstrap", 0)["results"][0]["numbers"]) == {"bbox"}  # fmt: skip


def test_c6_intervals_and_differences_against_a_loop_over_pycocotools(tmp_path):
    truth, results = made_up_set(2)
    for number, image in enumerate(truth["images"], 1):  # as the loop numbers them
        for row in truth["annotations"] + results:
            if row["image_id"] == image["id"]:
                row["new"] = number
        image["id"] = number
    for row in truth["annotations"] + results:
        row["image_id"] = row.pop("new")
    other = copy.deepcopy(results)
    for row in other[::2]:
        row["bbox"][0] += 2
    path, images = saved(tmp_path, truth), len(truth["images"])
    files = [write(tmp_path / f"{name}.json", found) for name, found in (("a", results), ("b", other))]
    found = evaluated(tmp_path, *files, "--data", path, "--iou-type", "bbox", "--bootstrap", 500)
    rng = np.random.default_rng(5)
    draws = [rng.integers(1, images + 1, images) for _ in range(40)]
    drawn = np.array([[_resampled_ap(truth, rows, chosen) for rows in (results, other)] for chosen in draws])
    whole = [_resampled_ap(truth, rows, np.arange(1, images + 1)) for rows in (results, other)]
    for column, one in enumerate(found["results"]):
        low, high = one["ci95"]["bbox"]["AP"]
        assert one["numbers"]["bbox"]["AP"] == pytest.approx(whole[column])
        assert high - low == pytest.approx(2 * 1.96 * drawn[:, column].std(), rel=0.4)  # 40 draws are few
        assert (high + low) / 2 == pytest.approx(drawn[:, column].mean(), abs=2 * drawn[:, column].std())
    pair = found["paired"]["bbox"]["AP"]
    assert pair["difference"] == pytest.approx(whole[1] - whole[0])
    assert pair["ci95"][1] - pair["ci95"][0] == pytest.approx(3.92 * (drawn[:, 1] - drawn[:, 0]).std(), rel=0.5)


def test_c6_a_file_differs_from_itself_by_nothing_and_a_perfect_one_is_100(coco, tmp_path):
    path, file, truth, _ = coco
    found = evaluated(tmp_path, file, file, "--data", path, "--bootstrap", 20)
    assert all(each == {"difference": 0, "ci95": [0, 0]} for kind in BOTH for each in found["paired"][kind].values())
    right = [{**a, "score": 1.0} for a in truth["annotations"] if not a["iscrowd"]]
    perfect = write(tmp_path / "p.json", without(right, "segmentation"))
    found = evaluated(tmp_path, perfect, "--data", path, "--bootstrap", 50)["results"][0]
    assert found["numbers"]["bbox"]["AP"] == pytest.approx(100)
    assert found["ci95"]["bbox"]["AP"] == pytest.approx([100, 100])


def test_c6_a_size_that_few_images_have_gets_no_interval(tmp_path):
    """A draw without any large object has no APl: taken as 0, a perfect detector's interval would begin at 0."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 300, "width": 300} for i in range(1, 21)]
    boxes = [[0, 0, 200, 200] if i == 1 else [0, 0, 20, 20] for i in range(1, 21)]
    rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in enumerate(boxes, 1)]  # fmt: skip
    path = saved(tmp_path, {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]})
    file = write(tmp_path / "results.json", [{**row, "score": 0.5} for row in rows])
    (found,) = evaluated(tmp_path, file, "--data", path, "--bootstrap", 100)["results"]
    assert found["numbers"]["bbox"]["APl"] == pytest.approx(100)
    assert set(found["ci95"]["bbox"]) == {"AP", "AP50", "AP75", "APs"}


def test_c6_proposals_of_a_size_that_few_images_have_get_no_interval(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 300, "width": 300} for i in range(1, 21)]
    rows = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, side, side], "area": side**2, "iscrowd": 0}
            for i, side in enumerate([200] + [20] * 19, 1)]  # fmt: skip
    path = saved(tmp_path, {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]})
    file = write(tmp_path / "results.json", [{**row, "score": 0.5} for row in rows])
    found = evaluated(tmp_path, file, file, "--data", path, "--measure", "proposals", "--bootstrap", 50)
    assert found["results"][0]["numbers"]["box_proposals"]["ARl@100"] == pytest.approx(100)
    usual = {"AR@100", "ARs@100", "AR@1000", "ARs@1000"}
    assert set(found["results"][0]["ci95"]["box_proposals"]) == set(found["paired"]["box_proposals"]) == usual


@pytest.mark.parametrize(("empty", "kept"), [(0, True), (2, True), (3, False)])
def test_c6_one_draw_in_a_thousand_may_lack_a_number(empty, kept):
    """A number of 2000 draws that the first few have no object for."""
    values = iter([1.0] + [math.nan] * empty + [1.0] * (2000 - empty))
    found = Counted("bbox", ("AP",), 3, lambda times: [next(values)]).intervals(2000)
    assert found == ({"AP": [1.0, 1.0]} if kept else {})


# --- other measures ---------------------------------------------------------------------------------------------


def test_c6_lvis(tmp_path):
    content, results = lvis_cases.made_up(0)
    path = write(tmp_path / "lvis.json", content)
    file, other = write(tmp_path / "r.json", results), write(tmp_path / "o.json", results[::2])
    found = evaluated(tmp_path, file, other, "--data", path, "--measure", "lvis", "--bootstrap", 30)
    for rows, one in zip((results, results[::2]), found["results"]):
        assert one["numbers"] == {
            kind: {name: None if math.isnan(value) else value for name, value in numbers.items()}
            for kind, numbers in evaluate_lvis(path, rows).items()
        }
        low, high = one["ci95"]["bbox"]["AP"]
        assert 0 <= low <= high <= 100
    whole = [one["numbers"]["segm"]["AP"] for one in found["results"]]
    assert found["paired"]["segm"]["AP"]["difference"] == pytest.approx(whole[1] - whole[0])


def test_c6_lvis_without_an_area_and_with_an_annotation_that_does_not_count(tmp_path):
    content, results = lvis_cases.made_up(0)
    file, options = write(tmp_path / "r.json", results), ("--measure", "lvis", "--bootstrap", 30)
    whole = evaluated(tmp_path, file, "--data", write(tmp_path / "lvis.json", content), *options)["results"]
    assert whole[0]["ci95"]["segm"]
    for annotation in content["annotations"][:3]:
        del annotation["area"]  # that of its mask, so nothing changes
    unlisted = {**content["annotations"][0], "id": 10_000, "category_id": 1}
    content["annotations"] = [unlisted, *content["annotations"]]
    found = evaluated(tmp_path, file, "--data", write(tmp_path / "lvis.json", content), *options)["results"]
    assert found == whole


def test_c6_lvis_what_few_images_have_gets_no_interval(tmp_path):
    """Of 20 images six have a medium object, as few as nearly every draw has one of; one has one of a rare class."""
    classes = [{"id": 1, "name": "a", "frequency": "f"}, {"id": 2, "name": "b", "frequency": "r"}]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 300, "width": 300, "neg_category_ids": [2] * (i > 1),
               "not_exhaustive_category_ids": []} for i in range(1, 21)]  # fmt: skip
    objects = [(i, 1, 20) for i in range(1, 21)] + [(i, 1, 40) for i in range(1, 7)] + [(1, 2, 20)]
    objects += [(i, 3, 200) for i in range(1, 21)]  # large, of a class that is not listed
    rows = [{"id": number, "image_id": i, "category_id": category, "bbox": [0, 0, side, side], "area": side**2}
            for number, (i, category, side) in enumerate(objects, 1)]  # fmt: skip
    file = write(tmp_path / "results.json", [{**row, "score": 0.5} for row in rows if row["category_id"] < 3])
    del rows[20]["area"]  # of a medium one
    path = saved(tmp_path, {"images": images, "annotations": rows, "categories": classes})
    (found,) = evaluated(tmp_path, file, "--data", path, "--measure", "lvis", "--bootstrap", 100)["results"]
    assert found["numbers"]["bbox"]["APr"] == pytest.approx(100)
    assert set(found["ci95"]["bbox"]) == {"AP", "AP50", "AP75", "APs", "APm", "APf"}
    assert found["ci95"]["bbox"]["APf"] == pytest.approx([100, 100])


@pytest.mark.parametrize("year", ["2007", "2012"])
def test_c6_voc_against_slow_draws_of_images(tmp_path, monkeypatch, year):
    """An image drawn twice is two images, so AP of a draw is that of a list of images with repetitions."""
    ids = write_voc(tmp_path / "sets", year, "val", count=3)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    rows = voc_detections(tmp_path / "sets", year, ids)
    dataset = find_dataset(f"voc_{year}_val")
    found = evaluated(tmp_path, write(tmp_path / "r.json", rows), "--data", dataset.name, "--bootstrap", 600)
    (one,) = found["results"]
    whole = evaluate_voc(dataset.annotations, rows, eleven_points=year == "2007")["bbox"]
    assert one["numbers"]["bbox"]["AP50"] == whole["AP50"]
    names = [name[3:] for name, value in whole.items() if name.startswith("AP-") and not math.isnan(value)]
    assert whole["AP50"] == pytest.approx(
        100 * np.mean([slow_ap(tmp_path / "sets", year, ids, rows, name, 0.5) for name in names])
    )
    drawn = []
    for chosen in itertools.product(range(3), repeat=3):
        content = json.loads(dataset.annotations.read_text())
        own = [content["images"][k]["id"] for k in chosen]
        moved, repeated = [], {**content, "images": [], "annotations": []}
        for new, (k, old) in enumerate(zip(chosen, own), 1):
            repeated["images"].append({**content["images"][k], "id": new})
            for a in content["annotations"]:
                if a["image_id"] == old:
                    repeated["annotations"].append({**a, "image_id": new, "id": len(repeated["annotations"]) + 1})
            moved += [{**row, "image_id": new} for row in rows if row["image_id"] == old]
        path = write(tmp_path / "repeated.json", repeated)
        drawn.append(evaluate_voc(path, moved, eleven_points=year == "2007")["bbox"]["AP50"])
    # One image three times is one draw of 27, so the least and the greatest have more than 2.5 % each.
    assert one["ci95"]["bbox"]["AP50"] == pytest.approx([min(drawn), max(drawn)], abs=0.5)  # equal scores tie at random


def test_c6_cityscapes_and_its_pixels(tmp_path, monkeypatch, capsys):
    root = write_cityscapes(tmp_path / "sets", images=3)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    dataset = find_dataset("cityscapes_fine_instance_seg_val")
    rows = noisy_results(root, dataset.annotations, "val", 0)
    file = write(tmp_path / "r.json", rows)
    found = evaluated(tmp_path, file, file, "--data", dataset.name, "--bootstrap", 50)
    expected = evaluate_cityscapes(dataset.annotations, dataset.images, rows)["segm"]
    assert found["results"][0]["numbers"]["segm"]["AP"] == pytest.approx(expected["AP"])
    assert found["paired"]["segm"]["AP50"] == {"difference": 0, "ci95": [0, 0]}
    assert "is not public" in refused(capsys, file, "--data", "cityscapes_fine_instance_seg_test")

    predicted(root, tmp_path / "labels", 0)
    pixels = find_dataset("cityscapes_fine_sem_seg_val")
    found = evaluated(tmp_path, tmp_path / "labels", "--data", pixels.name, "--bootstrap", 50)["results"][0]
    images = [pixels.images / name for name in pixels.index.file_name]
    expected = evaluate_semantic(images, tmp_path / "labels")["sem_seg"]["IoU"]
    assert found["numbers"]["sem_seg"]["IoU"] == pytest.approx(expected)
    low, high = found["ci95"]["sem_seg"]["IoU"]
    assert low <= expected <= high
    assert "a label for each pixel" in refused(capsys, file, "--data", pixels.name)


def test_c6_proposals_of_a_pickle_and_of_detections_without_their_classes(coco, tmp_path):
    path, _, _, results = coco
    by_image = {}
    for row in results:
        by_image.setdefault(row["image_id"], []).append(row)
    proposals = []
    for number, own in by_image.items():
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in own)])
        proposals.append(Proposals(number, boxes.float(), torch.tensor([row["score"] for row in own])))
    expected = evaluate_proposals(path, proposals)["box_proposals"]
    file = write_proposals(tmp_path, proposals)
    (one,) = evaluated(tmp_path, file, "--data", path, "--bootstrap", 100)["results"]
    (same,) = evaluated(tmp_path, write(tmp_path / "r.json", results), "--data", path, "--measure", "proposals",
                        "--bootstrap", 100)["results"]  # fmt: skip
    for found in (one, same):
        numbers = {
            name: math.nan if value is None else value for name, value in found["numbers"]["box_proposals"].items()
        }
        assert numbers == pytest.approx(expected, nan_ok=True)
    low, high = one["ci95"]["box_proposals"]["AR@100"]
    assert low <= expected["AR@100"] <= high
    assert low < high


# --- once -------------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[object]:
    """Grows by one whenever a function is called."""
    function, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args: calls.append(1) or function(*args))
    return calls


@pytest.mark.parametrize("draws", [0, 5])
def test_c6_results_are_matched_once(coco, tmp_path, monkeypatch, draws):
    """COCO's and LVIS's intervals need the matching of no results at all besides."""
    path, file, _, _ = coco
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    content, found = lvis_cases.made_up(0, images=3)
    lvis_path, lvis_file = write(tmp_path / "lvis.json", content), write(tmp_path / "l.json", found)
    ids = write_voc(tmp_path / "sets", "2007", "val", count=3)
    voc_file = write(tmp_path / "v.json", voc_detections(tmp_path / "sets", "2007", ids))
    root = write_cityscapes(tmp_path / "sets", images=2)
    dataset = find_dataset("cityscapes_fine_instance_seg_val")
    city_file = write(tmp_path / "c.json", noisy_results(root, dataset.annotations, "val", 0))
    predicted(root, tmp_path / "labels", 0)
    for module, name, calls, argv in (
        (measures.coco, "hotcoco_evaluations", 2 if draws else 1, (file, "--data", path)),
        (measures.coco, "hotcoco_evaluations", 2 if draws else 0, (file, "--data", path, "--evaluator", "pycocotools")),
        (measures.coco, "_pycocotools", 1, (file, "--data", path, "--evaluator", "pycocotools")),
        (measures.lvis, "_evaluation", 4 if draws else 2, (lvis_file, "--data", lvis_path, "--measure", "lvis")),
        (measures.voc, "_best_objects", 20, (voc_file, "--data", "voc_2007_val")),  # for each class
        (measures.cityscapes, "_match", 2, (city_file, "--data", dataset.name)),  # for each image
        (measures.pixels, "read_pair", 2, (tmp_path / "labels", "--data", "cityscapes_fine_sem_seg_val")),
        (measures.proposals, "_cases", 1, (file, "--data", path, "--measure", "proposals")),
    ):
        with monkeypatch.context() as patch:
            count = counted(patch, module, name)
            evaluated(tmp_path, *argv, "--bootstrap", draws)
        assert len(count) == calls, (module.__name__, name)


def test_c6_what_is_odd_in_the_annotations_is_told_once(coco, capsys):
    path, file, truth, _ = coco
    del truth["annotations"][0]["area"]
    path.write_text(json.dumps(truth))
    assert run_job("evaluate", [str(file), str(file), "--data", str(path), "--bootstrap", "5"]) == 0
    assert capsys.readouterr().err.count("without an area") == 1


def test_c6_an_evaluation_alone_keeps_nothing(coco, monkeypatch):
    """As in training: what was matched is free once its numbers are there, of LVIS's one kind at a time."""
    path, _, _, results = coco
    made = []

    class Watched(measures.coco.Outcomes):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(measures.coco, "Outcomes", Watched)
    subject = Subject(Dataset("x", Path(), path), Path(), True, (), "hotcoco")
    measure = measures.coco.Measure(subject)
    numbers = measure.evaluate(results)
    assert [one() for one in made] == [None]
    assert [one.kind for one in measure.resamplable(results)] == [*BOTH]
    assert bits(measure.evaluate(results)["segm"]) == bits(numbers["segm"])
    assert len(made) == 2

    class Evaluation:
        def __init__(self, *_: object) -> None:
            assert all(one() is None for one in alive)
            alive.append(weakref.ref(self))

        def get_results(self) -> dict[str, float]:
            return dict.fromkeys(NUMBERS, 0.5)

    alive: list[weakref.ref] = []
    monkeypatch.setattr(measures.lvis, "_evaluation", Evaluation)
    content, found = lvis_cases.made_up(0, images=2)
    path.write_text(json.dumps(content))
    measures.lvis.Measure(subject).evaluate(found)
    assert len(alive) == 2


# --- bad files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.update(category_id=0), r"row 3 has category_id 0, which .*\.json does not list .*its place"),
        (lambda row: row.update(image_id=4), r"row 3 has image_id 4, which .* does not list"),
        (lambda row: row.update(image_id="9"), "row 3: Expected `int`, got `str` at image_id"),
        (lambda row: row.update(image_id=2**63 + 5), r"row 3: .*at image_id"),
        (lambda row: row.update(image_id=-(10**30)), r"row 3: .*at image_id"),
        (lambda row: row.update(category_id=10**30), r"row 3: .*at category_id"),
        (lambda row: row["segmentation"].update(size=[10**30, 9]), r"row 3: .*at segmentation.size"),
        (lambda row: row.update({"\ud800": 1}), "not in COCO's result format"),
        (lambda row: row["segmentation"].update(counts="-"), "row 3 has a mask whose run lengths cannot be read"),
        (lambda row: row["segmentation"].update(counts="oooo6"), "row 3 has a mask whose run lengths .* do not fit"),
        (lambda row: row.update(score=None), "row 3: Expected `float`, got `null` at score"),
        (lambda row: row.pop("score"), "row 3: .*missing required field `score`"),
        (lambda row: row.update(score=math.nan), "row 3 has a score that is not finite"),
        (lambda row: row.update(bbox=[1, 2, 3]), "row 3: .*bbox"),
        (lambda row: row.update(bbox=[1, 2, -3, 4]), "row 3 has a box .* negative width"),
        (lambda row: row.pop("bbox"), "row 3 has no bbox, which other rows have.*--iou-type segm"),
        (lambda row: row.update(segmentation={"size": [9, 9], "counts": "a"}), "row 3 has a mask of another"),
        (lambda row: row.update(segmentation=[[1, 1, 5, 1, 5, 5]]), "row 3: .*segmentation.*compressed RLE"),
    ],
)
def test_c6_a_bad_row_is_named_with_its_file(coco, capsys, change, words):
    path, file, _, results = coco
    change(results[2])
    write(file, results)
    line = refused(capsys, file, "--data", path)
    assert re.search(words, line), line
    assert str(file) in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no JSON"),
        (b'[{"image_id": 1', "is no JSON"),
        (b"\xff\xfe[", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"annotations": []}', "holds an object with annotations"),
        (b"3", "holds no list"),
        (b'[{"image_id": 3}, 4]', "row 2 is no object"),
        (b'[{"image_id": 3, "category_id": 9, "score": 1}]', "row 1 has neither bbox nor segmentation"),
    ],
)
def test_c6_a_file_that_is_no_results_file_is_one_sentence(coco, capsys, content, words):
    path, file, _, _ = coco
    file.write_bytes(content)
    line = refused(capsys, file, "--data", path)
    assert words in line
    assert str(file) in line


def test_results_of_a_run_that_were_changed_are_refused(coco, tmp_path, capsys):
    annotations, results = coco[0], coco[1]
    inside = tmp_path / "run" / "inference" / "results.json"
    inside.parent.mkdir(parents=True)
    with run_folder(tmp_path / "run"):
        write(inside, json.loads(results.read_text()))
    evaluated(tmp_path, inside, "--data", annotations, "--bootstrap", 0)
    inside.write_text(inside.read_text().replace("1", "2", 1))
    assert "results.json: is not what the run wrote" in refused(capsys, inside, "--data", annotations)


def test_c6_nothing_is_measured_before_all_is_known_to_be_sound(coco, tmp_path, capsys):
    path, file, _, _ = coco
    assert "no such file" in refused(capsys, file, tmp_path / "no.json", "--data", path)
    assert "is a folder" in refused(capsys, tmp_path, "--data", path)
    assert "--bootstrap is -1" in refused(capsys, file, "--data", path, "--bootstrap", -1)
    assert "does not measure" in refused(capsys, file, "--data", path, "--evaluator", "cityscapesscripts")
    assert "cannot be written" in refused(capsys, file, "--data", path, "--json", tmp_path)
    boxes, masks = (write(tmp_path / f"{key}.json", without(json.loads(file.read_text()), key))
                    for key in ("segmentation", "bbox"))  # fmt: skip
    assert "no bbox or segm" in refused(capsys, boxes, masks, "--data", path)


def test_c6_options_that_would_be_passed_over_are_refused(coco, tmp_path, monkeypatch, capsys):
    path, *_ = coco
    file = write_proposals(tmp_path, [Proposals(3, torch.zeros(1, 4), torch.zeros(1))])
    write_cityscapes(tmp_path / "sets", images=1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    for given, data in ((file, path), (tmp_path, "cityscapes_fine_sem_seg_val")):
        for option in (("--iou-type", "bbox"), ("--measure", "coco")):
            assert f"so {' '.join(option)} does not apply; leave it out" in refused(
                capsys, given, "--data", data, *option
            )
    evaluated(tmp_path, file, "--data", path, "--measure", "proposals", "--bootstrap", 0)


def test_every_command_of_the_page_runs(coco, tmp_path, monkeypatch):
    """The names of the page stand for files of the test's own."""
    page = (DOCS / "evaluation.md").read_text()
    commands = re.findall(r"^loco-det (evaluate .*)$", page, re.MULTILINE)
    assert len(commands) > 3
    content, found = lvis_cases.made_up(0)
    sets = tmp_path / "sets"
    (sets / "coco/val2017").mkdir(parents=True)
    (sets / "coco/annotations").mkdir()
    shutil.copy(coco[0], sets / "coco/annotations/instances_val2017.json")
    (sets / "lvis").mkdir()
    write(sets / "lvis/lvis_v1_val.json", content)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(sets))
    monkeypatch.chdir(tmp_path)
    shutil.copy(coco[0], tmp_path / "annotations.json")
    for name in ("results.json", "other.json", "output/inference/coco_instances_results.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, coco[3])
    write(tmp_path / "lvis_results.json", found)
    for command in commands:
        assert run_job(*(lambda words: (words[0], words[1:]))(shlex.split(command))) == 0, command
