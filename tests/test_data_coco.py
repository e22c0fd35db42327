"""COCO files: what is kept, what is refused and how, and equality with Detectron2's reader."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from loco_det.annotations.coco import CocoDataset, decode_segmentation, load_coco
from loco_det.annotations.registry import COCO_NAMES, Dataset, find_dataset, measure_of
from loco_det.annotations.segmentation import rle_lengths
from loco_det.core.errors import UserError

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
CONTENT = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "height": 40, "width": 50},
        {"id": 4, "file_name": "a.jpg", "height": 60, "width": 30},
        {"id": 7, "file_name": "sub/ü.jpg", "height": 40, "width": 50},
    ],
    "categories": [{"id": 90, "name": "zebra"}, {"id": 3, "name": "apple"}, {"id": 17, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 17, "bbox": [10.1, 10.2, 20.3, 20.4], "segmentation": SQUARE},
        {"id": 2, "image_id": 4, "category_id": 90, "bbox": [0, 5.5, 7, 9], "iscrowd": 0, "segmentation": SQUARE * 2},
        {
            **{"id": 3, "image_id": 9, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 4.0], "iscrowd": 1},
            "segmentation": {"size": [40, 50], "counts": [100, 30, 40 * 50 - 130]},
        },
        {"id": 4, "image_id": 9, "category_id": 3, "bbox": [1.5, 2, 3, 4], "segmentation": [[1, 2, 3, 4], [1, 2, 3]]},
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [2.5, 2, 3, 4], "segmentation": [[1, 2, 3, 4], SQUARE[0]]},
        {"id": 6, "image_id": 9, "category_id": 3, "bbox": [3.5, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6, 7]]},
        {"id": 7, "image_id": 9, "category_id": 3, "bbox": [4.5, 2, 3, 4], "segmentation": []},
        {"id": 8, "image_id": 9, "category_id": 3, "bbox": [5.5, 2, 3, 4]},
        {"id": 9, "image_id": 9, "category_id": 3, "bbox": [6.5, 2, 3, 4], "segmentation": [[]]},
    ],
}


def write(folder: Path, content: dict | str | bytes) -> Dataset:
    paths = Dataset("made_val", folder / "val", folder / "instances.json")
    (paths.images / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "b.jpg", "sub/ü.jpg"):
        (paths.images / name).touch()
    content = json.dumps(content) if isinstance(content, dict) else content
    paths.annotations.write_bytes(content.encode() if isinstance(content, str) else content)
    return paths


def changed(**changes) -> dict:
    """CONTENT with, e.g., annotations__0__bbox=... set."""
    content = copy.deepcopy(CONTENT)
    for place, value in changes.items():
        *path, last = [int(p) if p.isdigit() else p for p in place.split("__")]
        node = content
        for p in path:
            node = node[p]
        node[last] = value
    return content


def test_tables(tmp_path):
    dataset = load_coco(write(tmp_path, CONTENT))
    assert dataset.class_names == ("apple", "cat", "zebra")
    assert dataset.category_ids == (3, 17, 90)
    assert [dataset[i].image_id for i in range(len(dataset))] == [4, 7, 9]
    assert [Path(dataset[i].file_name).name for i in range(3)] == ["a.jpg", "ü.jpg", "b.jpg"]
    first, empty, last = (dataset[i] for i in range(3))
    assert (first.height, first.width) == (60, 30)
    assert first.classes.tolist() == [2]
    assert first.boxes.dtype == np.float32
    assert first.boxes.tolist() == [[0.0, 5.5, 7.0, 14.5]]
    assert len(empty.boxes) == len(empty.segmentations) == 0
    assert last.annotation_ids.tolist() == [1, 3, 5, 7, 8]
    assert last.crowd.tolist() == [False, True, False, False, False]
    assert last.classes.tolist() == [1, 0, 0, 0, 0]
    np.testing.assert_array_equal(decode_segmentation(last, 0), SQUARE)
    flat = np.zeros(40 * 50, dtype=np.uint8)
    flat[100:130] = 1  # RLE runs down the columns
    np.testing.assert_array_equal(coco_mask.decode(decode_segmentation(last, 1)), flat.reshape(50, 40).T)
    np.testing.assert_array_equal(decode_segmentation(last, 2), SQUARE)
    assert decode_segmentation(last, 3) is None
    assert decode_segmentation(last, 4) is None


def test_objects_are_numbered_by_image_and_not_by_id(tmp_path):
    dataset = load_coco(write(tmp_path, CONTENT))
    image, label, crowd = dataset.objects()
    assert image.tolist() == [0, 2, 2, 2, 2, 2]
    assert label.tolist() == [k for record in dataset for k in record.classes.tolist()]
    assert crowd.tolist() == [k for record in dataset for k in record.crowd.tolist()]


@pytest.mark.parametrize("image_id", [-3, 1, 5, 8, 12345])
def test_annotations_of_images_that_are_not_listed_belong_to_none(tmp_path, image_id):
    expected = [record.annotation_ids.tolist() for record in load_coco(write(tmp_path, CONTENT))]
    assert expected[0] == [2]
    dataset = load_coco(write(tmp_path, changed(annotations__1__image_id=image_id)))
    assert [record.annotation_ids.tolist() for record in dataset] == [[], *expected[1:]]
    assert dataset.objects()[0].tolist() == [2] * len(expected[2])


def test_minival_files_may_double_annotation_ids(tmp_path):
    """The public ones of COCO 2014 do."""
    paths = write(tmp_path, changed(annotations__4__id=3))
    minival = replace(paths, annotations=tmp_path / "instances_minival2014.json")
    paths.annotations.rename(minival.annotations)
    assert load_coco(minival)[2].annotation_ids.tolist() == [1, 3, 3, 7, 8]


def test_far_corners_are_added_in_float32(tmp_path):
    """As Detectron2 does: in float64 some would be another number."""
    rng = np.random.default_rng(0)
    boxes = np.hstack([rng.uniform(0, 1000, (50, 2)), rng.uniform(1, 500, (50, 2))]).round(2)
    annotations = [{"id": k, "image_id": 9, "category_id": 3, "bbox": box} for k, box in enumerate(boxes.tolist())]
    found = load_coco(write(tmp_path, {**CONTENT, "annotations": annotations}))[2].boxes
    expected = [
        [np.float32(x), np.float32(y), np.float32(x) + np.float32(w), np.float32(y) + np.float32(h)]
        for x, y, w, h in boxes
    ]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    assert (found[:, 2] != (boxes[:, 0] + boxes[:, 2]).astype(np.float32)).any()


def test_polygons_of_half_points_are_left_out_of_a_segmentation(tmp_path):
    mixed = [[1, 2, 3, 4, 5, 6, 7], SQUARE[0], [1, 2, 3, 4], [8, 8, 9, 9, 8, 9]]
    dataset = load_coco(write(tmp_path, changed(annotations__0__segmentation=mixed)))
    assert [p.tolist() for p in decode_segmentation(dataset[2], 0)] == [SQUARE[0], [8, 8, 9, 9, 8, 9]]


def test_boxes_without_area_are_counted_in_one_line(tmp_path, caplog, monkeypatch):
    content = changed(annotations__0__bbox=[5, 5, 0, 7], annotations__1__bbox=[5, 5, 7, -1.0])
    content["annotations"][2]["image_id"] = 12345
    monkeypatch.setattr(logging.getLogger("loco_det"), "propagate", True)
    dataset = load_coco(write(tmp_path, content))
    assert [k for record in dataset for k in record.annotation_ids.tolist()] == [5, 7, 8]
    (line,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "left out 6 of 9" in line
    assert "1 x annotation of an image that is not listed, 2 x box without area, 3 x polygons of fewer" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["whole JSON"]),
        (json.dumps(CONTENT)[:-50], ["whole JSON"]),
        (b'{"images": [], "categories": [{"id": 1, "name": "\xff"}]}', ["UTF-8"]),
        ("[]", ["COCO instances"]),
        ({"images": []}, ["categories"]),
        ({"images": [], "categories": CONTENT["categories"]}, ["no images"]),
        (changed(annotations=[a | {"iscrowd": 1} for a in CONTENT["annotations"]]), ["no object that is not a crowd"]),
        ({"images": CONTENT["images"], "categories": []}, ["no categories"]),
        (changed(annotations=[]), ["no usable annotation"]),
        (changed(annotations__4__category_id=8), ["annotation id 5", "category_id 8", "list it under 'categories'"]),
        (changed(annotations__4__id=3), ["annotation id 3", "occurs twice"]),
        (changed(images__2__id=9), ["image id 9"]),
        (changed(categories__0__id=17), ["category id 17"]),
        (changed(annotations__2__bbox=[1, 2, 3]), ["bbox", "(id 3)"]),
        (changed(annotations__2__bbox=None, annotations__2__segmentation=[]), ["bbox", "(id 3)"]),
        (changed(annotations__2__bbox=[1e300, 0, 1, 1]), ["annotation id 3", "finite"]),
        (changed(annotations__2__image_id="nine"), ["image_id", "(id 3)"]),
        (changed(annotations__2__ignore=1), ["annotation id 3", "ignore"]),
        (changed(images__1__height=0), ["image id 4", "30 x 0"]),
        (changed(images__1__width="wide"), ["width", "(id 4)"]),
        (changed(images__1__file_name="gone.jpg"), ["'gone.jpg'", "image id 4", "val"]),
    ],
)
def test_bad_file_is_one_sentence_naming_file_and_id(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        load_coco(write(tmp_path, content))
    message = str(caught.value)
    assert "\n" not in message
    for word in ["instances.json", *words]:
        assert word in message


def test_a_set_to_run_on_may_have_no_annotations(tmp_path):
    content = {k: CONTENT[k] for k in ("images", "categories")}
    dataset = load_coco(write(tmp_path, content), need_annotations=False)
    assert len(dataset) == 3
    assert dataset[2].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("segmentation", "word"),
    [
        ("abc", "neither"),
        ([1, 2, 3], "neither"),
        ([["x"] * 6], "neither"),
        ({"size": [40, 50]}, "neither"),
        ({"size": [50, 40], "counts": "abc"}, "[50, 40]"),
        ({"size": [40, 50], "counts": [1, 2]}, "add up"),
        ({"size": [40, 50], "counts": [3000, -1000]}, "add up"),
        ({"size": [40, 50], "counts": [2**40, 2000 - 2**40]}, "add up"),
        ({"size": [40, 50], "counts": []}, "add up"),
        ({"size": [40, 50], "counts": ""}, "add up"),  # the mask would be what memory happens to hold
        ({"size": [40, 50], "counts": "5"}, "add up"),
        ({"size": [40, 50], "counts": "PPP" * 20}, "add up"),  # a number that does not end
        ({"size": [40, 50], "counts": "5\u00e9"}, "add up"),
        ([[1, 1, 9, 1, 9, 1e9]], "100,000 pixels"),  # drawn, it would take gigabytes
        ([[1, 1, 9, 1, 9, -1e300]], "100,000 pixels"),
        ([[1, 1, 99_999, 2] * 3000], "1,000,000 pixels"),
        ([[1, 1, 99_999, 2, 1, 3]] * 6, "1,000,000 pixels"),
    ],
)
def test_bad_segmentation_is_named_when_it_is_used(tmp_path, segmentation, word):
    dataset = load_coco(write(tmp_path, changed(annotations__0__segmentation=segmentation)))
    with pytest.raises(UserError, match="annotation id 1") as caught:
        decode_segmentation(dataset[2], 0)
    assert word in str(caught.value)
    assert "b.jpg" in str(caught.value)


def test_a_long_outline_within_the_limit_is_no_error(tmp_path):
    comb = [[float(v) for x in range(0, 9000, 2) for v in (x, 0, x, 100, x + 1, 100, x + 1, 0)]]  # 909,000 pixels
    dataset = load_coco(write(tmp_path, changed(annotations__0__segmentation=comb)))
    assert [p.tolist() for p in decode_segmentation(dataset[2], 0)] == comb


def test_run_lengths_in_pycocotools_text_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.3, 0.5, 1.0):
        for height, width in ((1, 1), (7, 3), (40, 50), (300, 200)):
            mask = np.asfortranarray(rng.random((height, width)) < density, dtype=np.uint8)
            flat = np.concatenate([[0], mask.ravel(order="F"), [2]])  # runs begin with that of zeros
            ends = np.flatnonzero(np.diff(flat))
            assert rle_lengths(coco_mask.encode(mask)["counts"]).tolist() == np.diff(ends, prepend=0).tolist()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "breaks off"),
        (b"0P", "breaks off"),
        (b"0/", "no digits"),
        (b"0\xff", "no digits"),
        (b"P" * 7 + b"0", "large"),
    ],
)
def test_a_text_that_holds_no_run_lengths(text, word):
    with pytest.raises(ValueError, match=word):
        rle_lengths(text)
    assert rle_lengths(b"P" * 6 + b"1").tolist() == [2**30]


def test_dataset_names(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder, split, file in (("coco", "val2017", "val2017_100"), ("my_set", "train", "train")):
        (tmp_path / folder / split).mkdir(parents=True)
        (tmp_path / folder / "annotations").mkdir(exist_ok=True)
        (tmp_path / folder / "annotations" / f"instances_{file}.json").touch()
    found = find_dataset("coco_2017_val_100")
    assert found.images == tmp_path / "coco" / "val2017"
    assert found.annotations == tmp_path / "coco" / "annotations" / "instances_val2017_100.json"
    assert find_dataset("my_set_train").images == tmp_path / "my_set" / "train"
    for name in ("coco_2017_train", "my_set_val"):
        with pytest.raises(UserError, match="DETECTRON2_DATASETS"):
            find_dataset(name)
    for name in ("train", "val@10pct_seed0", "shapes", "_train", "shapes_"):
        with pytest.raises(UserError, match="NAME_SPLIT"):
            find_dataset(name)
    monkeypatch.delenv("DETECTRON2_DATASETS")
    with pytest.raises(UserError, match="datasets"):
        find_dataset("coco_2017_train")


# Source: Detectron2 data/datasets/builtin.py, _PREDEFINED_SPLITS_COCO["coco"].
PUBLIC = {
    "coco_2014_train": ("train2014", "instances_train2014.json"),
    "coco_2014_val": ("val2014", "instances_val2014.json"),
    "coco_2014_minival": ("val2014", "instances_minival2014.json"),
    "coco_2014_valminusminival": ("val2014", "instances_valminusminival2014.json"),
    "coco_2017_train": ("train2017", "instances_train2017.json"),
    "coco_2017_val": ("val2017", "instances_val2017.json"),
    "coco_2017_test": ("test2017", "image_info_test2017.json"),
    "coco_2017_test-dev": ("test2017", "image_info_test-dev2017.json"),
    "coco_2017_val_100": ("val2017", "instances_val2017_100.json"),
}


def test_cocos_names_mean_detectron2s_places(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    for images, file in PUBLIC.values():
        (folder / images).mkdir(exist_ok=True)
        (folder / "annotations" / file).touch()
    assert set(COCO_NAMES) == set(PUBLIC)
    for name, (images, file) in PUBLIC.items():
        assert find_dataset(name) == Dataset(name, folder / images, folder / "annotations" / file)


def test_a_benchmarks_own_measure_is_that_of_its_parts():
    for part in ("", "@10pct_seed0"):
        assert measure_of(f"voc_2007_test{part}", masks=False) == "voc"
        assert measure_of(f"lvis_v1_val{part}", masks=True) == "lvis"
        assert measure_of(f"cityscapes_fine_instance_seg_val{part}", masks=True) == "cityscapes"
        assert measure_of(f"cityscapes_fine_instance_seg_val{part}", masks=False) == "coco"
        assert measure_of(f"coco_2017_val{part}", masks=True) == "coco"
        assert measure_of(f"cityscapes_fine_sem_seg_val{part}", masks=True) == "pixels"


def assert_equal_to_detectron2(dataset: CocoDataset, name: str) -> None:
    data = pytest.importorskip("detectron2.data")
    from detectron2.data.datasets import load_coco_json
    from detectron2.structures import BoxMode

    theirs = load_coco_json(str(dataset.paths.annotations), str(dataset.paths.images), name)
    meta = data.MetadataCatalog.get(name)
    assert list(dataset.class_names) == meta.thing_classes
    assert {c: k for k, c in enumerate(dataset.category_ids)} == meta.thing_dataset_id_to_contiguous_id
    assert len(dataset) == len(theirs)
    for i, their in enumerate(theirs):
        ours = dataset[i]
        assert (ours.file_name, ours.image_id) == (their["file_name"], their["image_id"])
        assert (ours.height, ours.width) == (their["height"], their["width"])
        assert len(ours.boxes) == len(their["annotations"])
        for k, annotation in enumerate(their["annotations"]):
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            assert ours.boxes[k].tolist() == box
            assert ours.classes[k] == annotation["category_id"]
            assert ours.crowd[k] == annotation.get("iscrowd", 0)
            segmentation = decode_segmentation(ours, k)
            expected = annotation.get("segmentation")
            if isinstance(expected, dict):
                np.testing.assert_array_equal(coco_mask.decode(segmentation), coco_mask.decode(expected))
            else:
                assert [p.tolist() for p in segmentation or []] == (expected or [])


@pytest.mark.detectron2
def test_equal_to_detectron2_on_every_oddity(tmp_path):
    assert_equal_to_detectron2(load_coco(write(tmp_path, CONTENT)), "made_oddities")


@pytest.mark.detectron2
@pytest.mark.parametrize("split", ["train", "val"])
def test_equal_to_detectron2_on_real_coco(real_coco, monkeypatch, split):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_coco))
    assert_equal_to_detectron2(load_coco(find_dataset(f"coco_2017_{split}")), f"coco_2017_{split}")
