"""Cityscapes from the original folders to AP: annotations, both evaluators, submission, and bad input."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from cityscapes_cases import HEIGHT, WIDTH, as_result, draw_ids, noisy_results, write_cityscapes, write_frame
from PIL import Image
from pycocotools import mask as coco_mask

from loco_det.annotations import cityscapes
from loco_det.annotations.cityscapes import (
    CLASSES,
    LABELS,
    VOID,
    Frame,
    cityscapes_frames,
    instances_from_masks,
    instances_from_polygons,
)
from loco_det.annotations.coco import decode_segmentation, load_coco
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.segmentation import rle_lengths
from loco_det.core.errors import UserError
from loco_det.evaluation.cityscapes import (
    cityscapes_outcomes,
    evaluate_cityscapes,
    in_percent,
    write_submission,
)

GROUND_TRUTH = ["gtFine_polygons.json", "gtFine_instanceIds.png", "gtFine_labelIds.png"]
VAL = "cityscapes_fine_instance_seg_val"
shapely = pytest.importorskip("shapely", reason="shapely is not installed (extra cityscapes)")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up ROOT/cityscapes, found by name, with a cache of its own."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    return write_cityscapes(tmp_path)


def official(what: str):
    return pytest.importorskip(f"cityscapesscripts.{what}", reason="cityscapesscripts is not installed")


# --- annotations --------------------------------------------------------------------------------------------------


def test_the_labels_are_the_benchmarks() -> None:
    labels = official("helpers.labels").labels
    assert {label.name: label.id for label in labels} == LABELS
    assert {label.id: label.name for label in labels if label.hasInstances and not label.ignoreInEval} == CLASSES
    assert {label.id for label in labels if label.ignoreInEval} - {-1} == set(VOID)


def test_a_split_reads_as_any_coco_set(root: Path) -> None:
    dataset = load_coco(find_dataset(VAL))
    assert dataset.class_names == tuple(CLASSES.values())
    assert dataset.category_ids == tuple(CLASSES)
    assert len(dataset) == 4
    record = dataset[0]
    assert record.file_name == str(root / "leftImg8bit/val/aachen/aachen_000000_000019_leftImg8bit.png")
    assert (record.height, record.width) == (HEIGHT, WIDTH)
    crowd = np.concatenate([dataset[i].crowd for i in range(4)])
    assert crowd.any()
    assert not crowd.all()


@pytest.mark.parametrize("name", [VAL, f"{VAL}@masks"])
def test_annotations_cover_the_pixels_that_the_benchmark_counts(root: Path, name: str) -> None:
    """Against the bitmaps, object by object: exactly for @masks, within the half pixel of the border for polygons."""
    dataset = load_coco(find_dataset(name))
    for i, frame in enumerate(cityscapes_frames(root, "val")):
        ids, record = np.array(Image.open(frame.instances)), dataset[i]
        # As in Detectron2, what is one pixel wide or high is no object of @masks.
        thin = [v for v in np.unique(ids) if np.ptp(np.nonzero(ids == v), axis=1).min() == 0]
        values = [v for v in np.unique(ids).tolist() if name == VAL or v not in thin]
        expected = {k: np.isin(ids, [v for v in values if v == k or v // 1000 == k]) for k in CLASSES}
        for k, label in enumerate(CLASSES):
            found = np.zeros_like(ids, bool)
            for n in np.flatnonzero(record.classes == k):
                shape = decode_segmentation(record, n)
                if isinstance(shape, list):
                    shape = coco_mask.merge(coco_mask.frPyObjects([p.tolist() for p in shape], HEIGHT, WIDTH))
                found |= coco_mask.decode(shape).astype(bool)
            wrong = (found != expected[label]).sum()
            assert wrong <= (0.12 * expected[label].sum() + 12 if name == VAL else 0)


def test_later_polygons_hide_earlier_ones(tmp_path: Path) -> None:
    objects = [
        {"label": "car", "polygon": [[10, 10], [50, 10], [50, 50], [10, 50]]},
        {"label": "person", "polygon": [[25, 0], [35, 0], [35, 80], [25, 80]]},
    ]
    write_frame(tmp_path, "val", "ulm", 1, objects)
    (frame,) = cityscapes_frames(tmp_path, "val")
    person, car = instances_from_polygons(frame)["annotations"]
    assert (person["category_id"], car["category_id"]) == (24, 26)
    assert len(person["segmentation"]) == 1
    assert len(car["segmentation"]) == 2
    assert person["bbox"] == pytest.approx((25, 0, 36, 81))  # corners are pixels: 25 to 35 are 11 of them
    assert car["bbox"] == pytest.approx((10, 10, 51, 51))


def test_annotations_are_made_once_and_again_when_files_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = cityscapes.coco_format
    monkeypatch.setattr(cityscapes, "coco_format", lambda *args: made.append(1) or original(*args))
    first = find_dataset(VAL)
    assert find_dataset(VAL) == first
    assert len(made) == 1
    assert first.derived
    write_frame(root, "val", "aachen", 0, [{"label": "bus", "polygon": [[0, 0], [50, 0], [50, 50]]}])
    changed = find_dataset(VAL)
    assert changed.annotations != first.annotations
    assert len(made) == 2
    assert [c["name"] for c in json.loads(changed.annotations.read_text())["categories"]] == list(CLASSES.values())


def test_many_frames_are_read_by_several_processes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = cityscapes_frames(root, "val") * 26
    monkeypatch.setattr(cityscapes, "usable_cores", lambda: 2)
    several = list(cityscapes._all(instances_from_masks, frames))
    assert several == [instances_from_masks(frame) for frame in frames[:4]] * 26


def by_name(dicts: list[dict]) -> dict[str, dict]:
    return {Path(d["file_name"]).name: d for d in dicts}


@pytest.mark.detectron2
@pytest.mark.parametrize(("from_json", "to_polygons"), [(True, True), (False, True), (False, False)])
def test_equal_to_detectron2(root: Path, from_json: bool, to_polygons: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("detectron2.data.datasets.cityscapes")
    inside_meta(monkeypatch)
    dicts = theirs.load_cityscapes_instances(
        str(root / "leftImg8bit/val"), str(root / "gtFine/val"), from_json=from_json, to_polygons=to_polygons
    )
    expected = by_name(dicts)
    assert len(expected) == 4
    for frame in cityscapes_frames(root, "val"):
        ours = instances_from_polygons(frame) if from_json else instances_from_masks(frame, to_polygons=to_polygons)
        other = expected[frame.image.name]
        assert (ours["height"], ours["width"]) == (other["height"], other["width"])
        assert len(ours["annotations"]) == len(other["annotations"]) > 0
        for a, b in zip(ours["annotations"], other["annotations"]):
            assert list(CLASSES).index(a["category_id"]) == b["category_id"]
            assert bool(a["iscrowd"]) == bool(b["iscrowd"])
            assert tuple(a["bbox"]) == tuple(b["bbox"])
            if to_polygons:
                assert a["segmentation"] == b["segmentation"]
            else:
                assert a["segmentation"]["counts"].encode() == b["segmentation"]["counts"]


def inside_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectron2's open sources import cityscapesscripts under a name that it has only inside Meta."""
    official("helpers.labels")
    outer = "deeplearning.projects.cityscapesApi"
    for name in ("deeplearning", "deeplearning.projects", outer):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("", ".helpers", ".helpers.labels", ".evaluation", ".evaluation.evalInstanceLevelSemanticLabeling"):
        __import__(f"cityscapesscripts{name}")
        monkeypatch.setitem(sys.modules, f"{outer}.cityscapesscripts{name}", sys.modules[f"cityscapesscripts{name}"])


# --- evaluation ---------------------------------------------------------------------------------------------------


def measure(root: Path, results: list[dict], official: bool) -> dict[str, float]:
    paths = find_dataset(VAL)
    return evaluate_cityscapes(paths.annotations, paths.images, results, official=official)["segm"]


def square(left: int, top: int, side: int) -> list[list[int]]:
    return [[left, top], [left + side - 1, top], [left + side - 1, top + side - 1], [left, top + side - 1]]


BOTH = pytest.mark.parametrize("use_official", [False, True], ids=["fast", "official"])


@BOTH
def test_ap_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_official: bool) -> None:
    """Two cars, one found with certainty .9 and a wrong one with .8: precision 1/2 then 1 at recall 1/2, AP 1/2.
    A person of 20 x 20 found as 20 x 14, IoU .7: right at the thresholds .50, .55, .60 and .65, AP 0.4 (not at .70,
    which is a little more than .7 in the benchmark's array). A bus that is not found: 0. Other classes: NaN."""
    if use_official:
        official("evaluation.evalInstanceLevelSemanticLabeling")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    labels = {"car": [(0, 0), (30, 0)], "person": [(60, 0)], "bus": [(90, 0)]}
    objects = [{"label": "road", "polygon": [[0, 0], [159, 0], [159, 95], [0, 95]]}]
    objects += [{"label": name, "polygon": square(*at, 20)} for name, places in labels.items() for at in places]
    root = tmp_path / "cityscapes"
    write_frame(root, "val", "ulm", 1, objects)
    ids = draw_ids(objects)
    assert (ids == 26000).sum() == 400
    person = ids == 24000
    person[14:] = False
    elsewhere = np.zeros_like(person)
    elsewhere[50:70, 50:70] = True
    results = [
        as_result(ids == 26000, 1, 26, 0.9),
        as_result(elsewhere, 1, 26, 0.8),
        as_result(person, 1, 24, 0.3),
        as_result(elsewhere, 1, 33, 0.9),
    ]
    found = measure(root, results, use_official)
    assert found["AP-car"] == 50
    assert found["AP-person"] == pytest.approx(40)
    assert found["AP-bus"] == 0
    assert math.isnan(found["AP-bicycle"])
    assert found["AP"] == pytest.approx((50 + 40 + 0) / 3)
    assert found["AP50"] == pytest.approx((50 + 100 + 0) / 3)


@BOTH
def test_what_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_official: bool) -> None:
    """Detections on void, on a group and on an object below 100 pixels are neither right nor wrong."""
    if use_official:
        official("evaluation.evalInstanceLevelSemanticLabeling")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    places = {"car": (0, 0, 20), "cargroup": (30, 0, 20), "dynamic": (60, 0, 20)}
    objects = [{"label": "road", "polygon": [[0, 0], [159, 0], [159, 95], [0, 95]]}]
    objects += [{"label": name, "polygon": square(*at)} for name, at in places.items()]
    objects.append({"label": "car", "polygon": square(100, 0, 9)})
    root = tmp_path / "cityscapes"
    write_frame(root, "val", "ulm", 1, objects)
    ids = draw_ids(objects)
    masks = [ids == 26000, ids == 26, ids == 5, ids == 26001]
    assert [mask.sum() for mask in masks] == [400, 400, 400, 81]
    results = [as_result(mask, 1, 26, score) for mask, score in zip(masks, (0.5, 0.9, 0.8, 0.7))]
    assert measure(root, results, use_official)["AP-car"] == 100
    assert measure(root, results[1:], use_official)["AP-car"] == 0
    results.append(as_result(ids == 7, 1, 26, 0.6))  # the road
    # At .6 precision and recall are 0, at .5 they are 1/2 and 1; half a step each: 1/2 * 1/2 + 0 * 1/2.
    assert measure(root, results, use_official)["AP-car"] == 25


@pytest.mark.parametrize("seed", range(4))
def test_both_evaluators_agree_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    official("evaluation.evalInstanceLevelSemanticLabeling")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    root = write_cityscapes(tmp_path, images=5, seed=seed)
    before = sorted(tmp_path.iterdir())
    results = noisy_results(root, find_dataset(VAL).annotations, "val", seed)
    assert len(results) > 30
    fast, slow = measure(root, results, False), measure(root, results, True)
    assert list(fast) == list(slow)
    for name in fast:
        assert fast[name] == slow[name] or (math.isnan(fast[name]) and math.isnan(slow[name])), name
    assert 0 < fast["AP"] < 100
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in before} <= {"cache"}, "files were left behind"


@pytest.mark.parametrize("times", [[1, 1, 1, 1], [2, 0, 1, 3], [0, 0, 4, 0], [0, 0, 0, 0]])
def test_ap_of_a_choice_of_images_is_that_of_copies_of_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: list[int]
) -> None:
    paths = find_dataset(VAL)
    results = noisy_results(root, paths.annotations, "val")
    ours = in_percent(cityscapes_outcomes(paths.annotations, paths.images, results).precision(np.array(times)))
    listed = json.loads(paths.annotations.read_text())["images"]
    if not sum(times):
        assert all(map(math.isnan, ours.values()))
        return
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "copies"))
    source = {}
    for entry, count in zip(listed, times):
        for number in range(count):
            name = entry["file_name"].replace("_000019_", f"_{number:06d}_")
            source[name] = entry["id"]
            for kind, suffix in (("leftImg8bit", ["leftImg8bit.png"]), ("gtFine", GROUND_TRUTH)):
                for end in suffix:
                    old, new = (text.replace("leftImg8bit.png", end) for text in (entry["file_name"], name))
                    (tmp_path / "copies/cityscapes" / kind / "val" / new).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(root / kind / "val" / old, tmp_path / "copies/cityscapes" / kind / "val" / new)
    copies = json.loads(find_dataset(VAL).annotations.read_text())["images"]
    assert len(copies) == sum(times)
    again = [
        {**result, "image_id": entry["id"]}
        for entry in copies
        for result in results
        if result["image_id"] == source[entry["file_name"]]
    ]
    assert ours == pytest.approx(measure(tmp_path, again, False), rel=0, abs=0, nan_ok=True)
    assert ours["AP"] > 0


def test_perfect_results_give_100_and_none_give_0(root: Path) -> None:
    annotations = find_dataset(VAL).annotations
    results = []
    for entry in json.loads(annotations.read_text())["images"]:
        stem = entry["file_name"].removesuffix("_leftImg8bit.png")
        ids = np.array(Image.open(root / "gtFine/val" / f"{stem}_gtFine_instanceIds.png"))
        for value in np.unique(ids[ids >= 1000]).tolist():
            if value // 1000 in CLASSES:
                results.append(as_result(ids == value, entry["id"], value // 1000, 0.5))
    found = measure(root, results, False)
    assert found["AP"] == pytest.approx(100)
    assert measure(root, [], False)["AP"] == 0


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_are_those_of_pycocotools(density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = np.kron(rng.random((5, 7)) < density, np.ones((13, 11))).astype(np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(mask))
        lengths = rle_lengths(encoded["counts"])
        values = np.arange(len(lengths)) % 2
        assert (np.repeat(values, lengths) == mask.ravel(order="F")).all()


@pytest.mark.detectron2
def test_the_official_numbers_are_detectron2s(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    torch = pytest.importorskip("torch")
    inside_meta(monkeypatch)
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import CityscapesInstanceEvaluator
    from detectron2.structures import Instances

    scripts = official("evaluation.evalInstanceLevelSemanticLabeling")
    if not hasattr(np, "in1d"):
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    monkeypatch.setattr(scripts.args, "quiet", True)
    monkeypatch.setattr(scripts, "writeDict2JSON", lambda *_: None)  # fails on NumPy 2's integers
    monkeypatch.chdir(tmp_path)
    paths = find_dataset(VAL)
    MetadataCatalog.pop("made_up_cityscapes", None)
    MetadataCatalog.get("made_up_cityscapes").set(thing_classes=list(CLASSES.values()), gt_dir=str(root / "gtFine/val"))
    results = noisy_results(root, paths.annotations, "val")
    evaluator = CityscapesInstanceEvaluator("made_up_cityscapes")
    evaluator.reset()
    for entry in json.loads(paths.annotations.read_text())["images"]:
        own = [r for r in results if r["image_id"] == entry["id"]]
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_classes = torch.tensor([list(CLASSES).index(r["category_id"]) for r in own])
        instances.scores = torch.tensor([r["score"] for r in own], dtype=torch.float64)
        instances.pred_masks = torch.from_numpy(np.stack([coco_mask.decode(r["segmentation"]) for r in own])).bool()
        evaluator.process([{"file_name": entry["file_name"]}], [{"instances": instances}])
    theirs = evaluator.evaluate()["segm"]
    ours = measure(root, results, False)
    assert (ours["AP"], ours["AP50"]) == (theirs["AP"], theirs["AP50"])


# --- submission ---------------------------------------------------------------------------------------------------


def test_a_submission_has_a_text_file_for_each_image_and_the_masks_it_names(root: Path, tmp_path: Path) -> None:
    paths = find_dataset("cityscapes_fine_instance_seg_test")
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:9, 7:30] = True
    results = [as_result(mask, 2, 33, 0.123456789), as_result(~mask, 2, 24, 1.0)]
    write_submission(paths.annotations, paths.images, results, tmp_path / "out" / "s.zip")
    with zipfile.ZipFile(tmp_path / "out" / "s.zip") as archive:
        names = archive.namelist()
        texts = sorted(n for n in names if n.endswith(".txt"))
        assert len(texts) == 4
        assert len(names) == 6
        listed = json.loads(paths.annotations.read_text())["images"]
        own = Path(listed[1]["file_name"]).stem + "_pred.txt"
        assert [archive.read(n) for n in texts if n != own] == [b""] * 3
        rows = [line.split(" ") for line in archive.read(own).decode().splitlines()]
        assert [(row[1], float(row[2])) for row in rows] == [("33", 0.123456789), ("24", 1.0)]
        with archive.open(rows[0][0]) as file:
            assert (np.array(Image.open(file)) == mask * 255).all()


# --- bad input ----------------------------------------------------------------------------------------------------


def test_what_is_missing_or_damaged_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polygons = root / "gtFine/val/aachen/aachen_000000_000019_gtFine_polygons.json"
    for content, message in (
        ("{", "polygon file"),
        ("[" * 100_000, "polygon file"),
        (json.dumps({"imgHeight": 0, "imgWidth": 5, "objects": []}), "size"),
        (json.dumps({"imgHeight": 5, "imgWidth": 5, "objects": [{"label": "cat", "polygon": []}]}), "label 'cat'"),
        (json.dumps({"imgHeight": 5, "imgWidth": 5, "objects": [{"label": "car", "polygon": [[1]]}]}), "object 0"),
    ):
        polygons.write_text(content)
        with pytest.raises(UserError, match=f"polygons.json.*{message}"):
            find_dataset(VAL)
    polygons.unlink()
    with pytest.raises(UserError, match=r"polygons\.json"):
        find_dataset(VAL)
    with pytest.raises(UserError, match="@boxes"):
        find_dataset(f"{VAL}@boxes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "nowhere"))
    with pytest.raises(UserError, match=r"gtFine_trainvaltest\.zip"):
        find_dataset(VAL)


@pytest.mark.parametrize(
    ("polygon", "size", "message"),
    [
        ([[1, 1], [2**31, 1], [1, 9]], 60, "100,000 pixels away"),
        ([[1, 1], [9, -(2**31)], [1, 9]], 60, "100,000 pixels away"),
        ([[1, 1], [9, 1e300], [1, 9]], 60, "100,000 pixels away"),
        ([[1, 1], [9, float("nan")], [1, 9]], 60, "100,000 pixels away"),
        ([[1, 1], [2000, 9]] * 4000, 60, "outline of more than 1,000,000 pixels"),
        ([[1, 1], [9, 1], [1, 9]], 2**31, "size"),
    ],
    ids=["far", "negative", "huge", "nan", "zigzag", "size"],
)
@pytest.mark.parametrize("label", ["car", "road"])
def test_c9_what_c_code_could_not_bear_is_named(root: Path, polygon: list, size: int, message: str, label: str) -> None:
    path = root / "gtFine/val/aachen/aachen_000000_000019_gtFine_polygons.json"
    path.write_text(
        json.dumps({"imgHeight": size, "imgWidth": size, "objects": [{"label": label, "polygon": polygon}]})
    )
    with pytest.raises(UserError, match=f"polygons.json.*{message}"):
        find_dataset(VAL)


@pytest.mark.parametrize("name", [VAL, f"{VAL}@masks", "cityscapes_fine_sem_seg_val"])
@pytest.mark.parametrize("half", ["leftImg8bit", "gtFine"])
def test_b5_a_half_unpacked_set_is_no_smaller_set(root: Path, name: str, half: str) -> None:
    find_dataset(name)
    for path in (root / half / "val").glob("*/*000001*"):
        path.unlink()
    with pytest.raises(UserError, match=r"000001_000019.*(complete the data set|unpack)"):
        find_dataset(name)


def test_truth_that_is_no_map_of_ids_is_refused(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    with pytest.raises(UserError, match="not a map of instance ids"):
        instances_from_masks(Frame(path, path, path))
    find_dataset(VAL)
    truth = cityscapes_frames(root, "val")[0].instances
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(truth)
    with pytest.raises(UserError, match="4 x 4"):
        measure(root, [as_result(np.ones((HEIGHT, WIDTH), bool), 1, 24, 0.5)], False)


@pytest.mark.parametrize("counts", ["", "P", "0", "PPPP", "0/", "PPPPPPP0"])
def test_run_lengths_that_are_none(root: Path, counts: str) -> None:
    result = as_result(np.ones((HEIGHT, WIDTH), bool), 1, 24, 0.5)
    result["segmentation"]["counts"] = counts
    with pytest.raises(UserError):
        measure(root, [result], False)


def test_without_shapely_polygons_are_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(UserError, match=r"loco_det\[cityscapes\].*@masks"):
        find_dataset(VAL)
    find_dataset(f"{VAL}@masks")


def test_without_cityscapesscripts_the_fast_path_remains(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("cityscapesscripts")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    results = noisy_results(root, find_dataset(VAL).annotations, "val")
    with pytest.raises(UserError, match=r"loco_det\[cityscapes\]"):
        measure(root, results, True)
    assert measure(root, results, False)["AP"] > 0
