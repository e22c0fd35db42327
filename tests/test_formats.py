"""`loco-det data convert`: each format as its tool writes it, boxes computed by hand, and what is wrong with files.

Images are 40 x 30 pixels (width x height) unless a test says otherwise.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from loco_det.annotations.formats.conversion import FORMATS, Converted, convert_annotations, write_conversion
from loco_det.annotations.formats.files import Tree
from loco_det.annotations.formats.recognition import json_format, recognise
from loco_det.cli import main
from loco_det.core.errors import UserError

SIZE = (40, 30)


def image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 60)).save(path)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def boxes(converted: Converted, split: str = "all") -> dict[str, list[tuple[str, list[float]]]]:
    """{file name: [(class, box rounded to 6 digits)]} of a split."""
    content = converted.splits[split]
    names = {c["id"]: c["name"] for c in content["categories"]}
    found: dict[str, list[tuple[str, list[float]]]] = {entry["file_name"]: [] for entry in content["images"]}
    files = {entry["id"]: entry["file_name"] for entry in content["images"]}
    for a in content["annotations"]:
        found[files[a["image_id"]]].append((names[a["category_id"]], [round(v, 6) for v in a["bbox"]]))
    return found


def reasons(converted: Converted, key: str = "objects_left_out") -> dict[str, int]:
    return {entry["reason"]: entry["count"] for entry in converted.summary[key]}


def annotations(converted: Converted, split: str = "all") -> list[dict[str, Any]]:
    return converted.splits[split]["annotations"]


def mask_of(annotation: dict[str, Any]) -> np.ndarray:
    rle = annotation["segmentation"]
    return coco_mask.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)


# --- Pascal VOC --------------------------------------------------------------------------------------------------


def voc(
    path: Path, *objects: str, size: str = "<size><width>40</width><height>30</height></size>", name: str = ""
) -> None:
    write(path, f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>")


def thing(name: str, box: tuple[Any, ...] | None, extra: str = "") -> str:
    sides = ("xmin", "ymin", "xmax", "ymax")
    inside = "" if box is None else f"<bndbox>{''.join(f'<{s}>{v}</{s}>' for s, v in zip(sides, box))}</bndbox>"
    return f"<object><name>{name}</name>{inside}{extra}</object>"


def test_voc_with_classes_and_file_names_of_its_owner(tmp_path):
    image(tmp_path / "images" / "cell-a.png")
    image(tmp_path / "images" / "ünï 2.jpg")
    voc(tmp_path / "annotations" / "cell-a.xml", thing(" WBC ", (1, 1, 3, 3)), thing("RBC", (10.5, 2, 20.5, 30)))
    voc(tmp_path / "annotations" / "ünï 2.xml", thing("RBC", (5, 5, 5, 5)))
    converted = convert_annotations(tmp_path)
    # Detectron2: pixels from 1, both ends inside
    assert boxes(converted) == {
        "cell-a.png": [("WBC", [0, 0, 3, 3]), ("RBC", [9.5, 1, 11, 29])],
        "ünï 2.jpg": [("RBC", [4, 4, 1, 1])],
    }
    assert converted.splits["all"]["categories"] == [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}]
    assert converted.images == tmp_path / "images"
    assert [a["area"] for a in annotations(converted)] == [9, 11 * 29, 1]
    assert converted.summary["objects_left_out"] == converted.summary["images_left_out"] == []


def test_voc_lists_are_splits_and_lists_of_one_class_are_not(tmp_path):
    for k in range(4):
        image(tmp_path / "JPEGImages" / f"{k}.jpg")
        voc(tmp_path / "Annotations" / f"{k}.xml", thing("x", (1, 1, 9, 9)))
    main_lists = tmp_path / "ImageSets" / "Main"
    write(main_lists / "train.txt", "0\n1\n")
    write(main_lists / "val.txt", "2.jpg\n7\n")
    write(main_lists / "trainval.txt", "0\n1\n2\n")
    write(main_lists / "x_train.txt", "0  1\n1 -1\n")
    converted = convert_annotations(tmp_path)
    assert {split: sorted(boxes(converted, split)) for split in converted.splits} == {
        "train": ["0.jpg", "1.jpg"],
        "trainval": ["0.jpg", "1.jpg", "2.jpg"],
        "val": ["2.jpg"],
    }
    ids = {split: {i["file_name"]: i["id"] for i in content["images"]} for split, content in converted.splits.items()}
    assert ids["trainval"] == ids["train"] | ids["val"]
    left_out = reasons(converted, "images_left_out")
    assert left_out == {"it is listed and has no XML file": 1, "it is in no list of ImageSets/Main": 1}
    assert "a list of one class with 1, 0 or -1 behind each name is no split" in reasons(converted, "notes")


def test_voc_folders_called_as_splits_are_splits(tmp_path):
    for split in ("train", "valid"):
        image(tmp_path / split / "a.jpg")
        voc(tmp_path / split / "a.xml", thing("x", (1, 1, 4 if split == "train" else 8, 4)))
    converted = convert_annotations(tmp_path)
    assert boxes(converted, "train") == {"train/a.jpg": [("x", [0, 0, 4, 4])]}
    assert boxes(converted, "valid") == {"valid/a.jpg": [("x", [0, 0, 8, 4])]}
    assert converted.images == tmp_path


@pytest.mark.parametrize(
    "size", ["", "<size/>", "<size><width/><height/></size>", "<size><width>0</width><height>0</height></size>"]
)
def test_a_size_that_is_missing_comes_from_the_image(tmp_path, size):
    image(tmp_path / "a.jpg", (33, 21))
    voc(tmp_path / "a.xml", thing("x", (1, 1, 9, 9)), size=size)
    converted = convert_annotations(tmp_path)
    (entry,) = converted.splits["all"]["images"]
    assert (entry["width"], entry["height"]) == (33, 21)
    assert reasons(converted, "notes") == {"<size> is missing, empty or 0: read from the image": 1}


def test_voc_words_for_difficult(tmp_path):
    image(tmp_path / "a.jpg")
    flags = ("<difficult>1</difficult>", "<difficult>Unspecified</difficult>", "<difficult/>", "")
    voc(tmp_path / "a.xml", *(thing("x", (1, 1, 5 + k, 5), flag) for k, flag in enumerate(flags)))
    converted = convert_annotations(tmp_path)
    assert [a.get("difficult", 0) for a in annotations(converted)] == [1, 0, 0, 0]
    assert reasons(converted, "notes") == {"<difficult>Unspecified</difficult>: taken as 0": 1}


def test_voc_polygons_and_turned_boxes(tmp_path):
    image(tmp_path / "a.jpg")
    numbered = "<polygon><x1>2</x1><y1>2</y1><x2>12</x2><y2>2</y2><x3>12</x3><y3>7</y3></polygon>"
    points = "<polygon>" + "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in ((1, 1), (5, 1), (5, 9))) + "</polygon>"
    quarter = f"<robndbox><cx>20</cx><cy>15</cy><w>10</w><h>4</h><angle>{np.pi / 2}</angle></robndbox>"
    voc(
        tmp_path / "a.xml",
        thing("both", (2, 2, 12, 7), numbered),
        thing("outline", None, points),
        thing("turned", None, quarter),
        thing("nothing", None),
        thing("part", (1, 1, 9, 9), "<part><name>head</name></part>"),
    )
    converted = convert_annotations(tmp_path)
    assert boxes(converted)["a.jpg"] == [
        ("both", [1, 1, 11, 6]),
        ("outline", [0, 0, 4, 8]),
        # 4 wide and 10 high about (20, 15): 18 to 22 and 10 to 20, counted from 1 with both ends inside
        ("turned", [17, 9, 5, 11]),
        ("part", [0, 0, 9, 9]),
    ]
    first, second = annotations(converted)[:2]
    assert first["segmentation"] == [[1, 1, 11, 1, 11, 6]]
    assert first["area"] == 25
    assert second["segmentation"] == [[0, 0, 4, 0, 4, 8]]
    assert reasons(converted) == {"it has none of <bndbox>, <polygon>, <robndbox>": 1}
    notes = reasons(converted, "notes")
    assert notes["<robndbox>: the upright box around the turned one"] == 1
    assert notes["<part> of an object is not read"] == 1


def test_objects_that_cannot_be_learnt_from_are_counted_and_named(tmp_path):
    image(tmp_path / "a.jpg")
    bad = {
        "a coordinate is not finite": [("nan", 1, 5, 5), (1, 1, "inf", 5)],
        "a coordinate is no number": [("one", 1, 5, 5)],
        "a coordinate is missing": [(1, 1, 5)],
        "no area": [(5, 5, 4, 9), (9, 5, 2, 9)],
        "outside its image": [(60, 5, 70, 9), (-9, 5, 0, 9)],
        "a coordinate more than 100,000 pixels away": [(1, 1, 2**31, 5)],
    }
    objects = [thing("x", box) for each in bad.values() for box in each]
    voc(tmp_path / "a.xml", thing("x", (1, 1, 5, 5)), thing("", (1, 1, 5, 5)), thing("x", (-9, 1, 50, 5)), *objects)
    converted = convert_annotations(tmp_path)
    expected = {reason: len(each) for reason, each in bad.items()} | {"<name> is missing or empty": 1}
    assert reasons(converted) == expected
    assert boxes(converted)["a.jpg"] == [("x", [0, 0, 5, 5]), ("x", [-10, 0, 60, 5])]  # as it is
    assert reasons(converted, "notes") == {"it reaches over the border of its image: kept as it is": 1}
    examples = {entry["reason"]: entry["examples"] for entry in converted.summary["objects_left_out"]}
    assert examples["no area"] == ["a.xml: object 8 (x)", "a.xml: object 9 (x)"]


def test_images_that_do_not_fit_are_counted_with_their_objects(tmp_path):
    for name in ("good", "other", "broken", "turned", "lonely"):
        image(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", SIZE).save(tmp_path / "turned.jpg", exif=exif)
    for name in ("good", "broken", "turned", "gone"):
        voc(tmp_path / f"{name}.xml", thing("x", (1, 1, 5, 5)), name=f"{name}.jpg")
    voc(
        tmp_path / "other.xml",
        *[thing("x", (1, 1, 5, 5))] * 2,
        size="<size><width>41</width><height>30</height></size>",
    )
    converted = convert_annotations(tmp_path)
    assert list(boxes(converted)) == ["good.jpg"]
    assert reasons(converted, "images_left_out") == {
        "it is not there": 1,
        "it cannot be read": 1,
        "it has another size": 1,
        "its EXIF data turn it, and it was annotated unturned": 1,
        "no annotation names it": 1,
    }
    assert reasons(converted) == {"its image is left out": 5}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<annotation><object><name>x", ["a.xml is no Pascal VOC annotation", "line 1"]),
        ("", ["a.xml is no Pascal VOC annotation"]),
        ('<?xml version="1.0" encoding="gb2312"?><annotation/>', ["a.xml", "multi-byte"]),
        (
            '<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><filename>&b;</filename></annotation>',
            ["a.xml", "declares entities"],
        ),
        (
            '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation><filename>&a;</filename></annotation>',
            ["a.xml", "declares entities"],
        ),
    ],
)
def test_a_damaged_or_hostile_xml_file_is_one_sentence(tmp_path, capsys, content, words):
    for name in "ab":
        image(tmp_path / f"{name}.jpg")
    voc(tmp_path / "b.xml", thing("x", (1, 1, 5, 5)))
    write(tmp_path / "a.xml", content)
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in (*words, "restore the file"):
        assert word in said
    assert not (tmp_path / "out").exists()


def test_entities_in_utf_16_are_refused_too(tmp_path):
    image(tmp_path / "a.jpg")
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY a "aa">]><annotation>&a;</annotation>'
    (tmp_path / "a.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="declares entities"):
        convert_annotations(tmp_path)


@pytest.mark.parametrize("name", ["../secret.jpg", "../../x/../secret.jpg", "{root}/secret.jpg", "a\0b.jpg", "..", ""])
def test_a_file_name_never_leads_out_of_the_source(tmp_path, name):
    image(tmp_path / "secret.jpg")
    image(tmp_path / "set" / "good.jpg")
    said = name.format(root=tmp_path)
    via = {
        "1": {"filename": said, "regions": [region("rect", x=1, y=1, width=5, height=5)]},
        "2": {"filename": "good.jpg", "regions": [region("rect", x=1, y=1, width=5, height=5)]},
    }
    write(tmp_path / "set" / "via.json", via)
    converted = convert_annotations(tmp_path / "set")
    assert list(boxes(converted)) == ["good.jpg"]
    assert reasons(converted, "images_left_out") == {"it is not there": 1}


@pytest.mark.parametrize(
    "name", ["http://[x/a.jpg", "s3://[::1/b/a.jpg", "/data/local-files/?d=[x/a.jpg", "//[x/a.jpg"]
)
def test_what_looks_like_an_address_and_is_none_is_a_path(tmp_path, name):
    image(tmp_path / "a.jpg")
    entry = {"filename": name, "regions": [region("rect", x=1, y=1, width=5, height=5)]}
    write(tmp_path / "via.json", {"1": entry})
    assert list(boxes(convert_annotations(tmp_path))) == ["a.jpg"]


def test_links_in_a_circle_are_walked_once_and_hidden_files_not_at_all(tmp_path):
    image(tmp_path / "a.jpg")
    voc(tmp_path / "a.xml", thing("x", (1, 1, 5, 5)))
    write(tmp_path / "._a.xml", "not xml")
    write(tmp_path / "__MACOSX" / "a.xml", "not xml")
    (tmp_path / "loop").symlink_to(tmp_path)
    image(tmp_path / "one" / "b.jpg")
    image(tmp_path.parent / f"{tmp_path.name}-elsewhere" / "c.jpg")
    (tmp_path / "two").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    (tmp_path / "two" / "down").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "up").symlink_to(tmp_path / "two")
    os.mkfifo(tmp_path / "pipe.xml")
    converted = convert_annotations(tmp_path)
    assert list(boxes(converted)) == ["a.jpg"]
    assert reasons(converted, "images_left_out") == {"no annotation names it": 2}  # b.jpg and c.jpg, each once


# --- which image an annotation is of ---------------------------------------------------------------------------


def owners(converted: Converted) -> dict[str, list[str]]:
    """{file name: classes}, over all splits."""
    return {
        name: [label for label, _ in objects]
        for split in converted.splits
        for name, objects in boxes(converted, split).items()
    }


BOX = (1, 1, 9, 9)


@pytest.mark.parametrize(
    ("images", "files"),
    [
        (["valid/1.jpg"], ["train/1.xml", "valid/1.xml"]),
        (["images/valid/1.jpg"], ["labels/train/1.xml", "labels/valid/1.xml"]),
        (["VOC2012/JPEGImages/1.jpg"], ["VOC2007/Annotations/1.xml", "VOC2012/Annotations/1.xml"]),
        (["x/2/1.jpg"], ["y/1/1.xml", "y/2/1.xml"]),
    ],
)
def test_an_image_that_is_missing_takes_no_other_files_image(tmp_path, images, files):
    for name in images:
        image(tmp_path / name)
    for name in files:
        voc(tmp_path / name, thing(name, BOX))
    converted = convert_annotations(tmp_path)
    assert owners(converted) == {Path(images[0]).name: [files[1]]}
    assert reasons(converted, "images_left_out") == {"it is not there": 1}


@pytest.mark.parametrize("kind", ["voc", "via", "cvat", "labelme"])
def test_an_image_of_another_split_is_no_substitute(tmp_path, kind):
    """Nothing but a file of the other split is called as the image that is missing."""
    image(tmp_path / "images" / "valid" / "1.jpg")
    image(tmp_path / "images" / "train" / "2.jpg")
    for name in ("1", "2"):
        said, folder = f"../images/train/{name}.jpg", tmp_path / "labels" / "train"
        if kind == "voc":
            voc(folder / f"{name}.xml", thing("x", BOX), name=f"{name}.jpg")
        elif kind == "labelme":
            labelme(folder / f"{name}.json", drawn("x", "rectangle", [1, 2], [5, 7]), imagePath=f"../{said}")
        elif kind == "via":
            there = {} if name == "1" else json.loads((tmp_path / "v.json").read_text())
            entry = {"filename": said, "regions": [region("rect", {"l": "x"}, x=1, y=2, width=4, height=5)]}
            write(tmp_path / "v.json", {**there, name: entry})
        else:
            box = '<box label="x" xtl="1" ytl="2" xbr="6" ybr="8"/>'
            elements = "".join(f'<image name="train/{k}.jpg">{box}</image>' for k in "12")
            write(tmp_path / "a.xml", f"<annotations>{elements}</annotations>")
    converted = convert_annotations(tmp_path, kind)
    assert owners(converted) == {"2.jpg": ["x"]}
    assert reasons(converted, "images_left_out") == {"it is not there": 1, "no annotation names it": 1}


def test_what_counts_first_has_the_image_whatever_the_order(tmp_path):
    """VOC goes by the file's own name, LabelMe by imagePath; the other files name an image that is not theirs."""
    image(tmp_path / "voc" / "b.jpg")
    for stem in "abc":
        voc(tmp_path / "voc" / f"{stem}.xml", thing(stem, BOX), name="b.jpg")
    assert owners(convert_annotations(tmp_path / "voc")) == {"b.jpg": ["b"]}
    image(tmp_path / "labelme" / "b.jpg")
    for stem in "abc":
        said = "gone.jpg" if stem == "b" else "other.jpg" if stem == "a" else "b.jpg"
        labelme(tmp_path / "labelme" / f"{stem}.json", drawn(stem, "rectangle", [1, 2], [5, 7]), imagePath=said)
    converted = convert_annotations(tmp_path / "labelme")
    assert owners(converted) == {"b.jpg": ["c"]}
    assert reasons(converted, "images_left_out") == {"it is not there": 2}


def test_a_place_that_is_named_counts_more_than_a_name(tmp_path):
    image(tmp_path / "b" / "1.jpg")
    entries = [
        {"filename": said, "regions": [region("rect", {"l": said}, x=1, y=2, width=4, height=5)]}
        for said in ("a/1.jpg", "C:\\data\\b\\1.jpg", "b/1.jpg", "1.jpg")
    ]
    for order in (entries, entries[::-1]):
        write(tmp_path / "v.json", dict(enumerate(order)))
        converted = convert_annotations(tmp_path)
        assert owners(converted) == {"1.jpg": ["b/1.jpg"]}
        assert reasons(converted, "images_left_out") == {"it is not there": 3}


def test_a_yolo_list_does_not_take_the_image_of_another_split(tmp_path):
    yolo(tmp_path, "train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    image(tmp_path / "images" / "val" / "only.jpg")
    write(tmp_path / "train.txt", "./images/train/a.jpg\n./images/train/only.jpg\n")
    converted = convert_annotations(tmp_path)
    assert list(boxes(converted, "train")) == ["train/a.jpg"]
    assert list(boxes(converted, "val")) == ["val/a.jpg", "val/only.jpg"]


# --- YOLO --------------------------------------------------------------------------------------------------------


def yolo(root: Path, yaml: str = "train: images/train\nval: images/val\nnames: [cat, dog]\n") -> None:
    for split in ("train", "val"):
        image(root / "images" / split / "a.jpg")
    write(root / "labels" / "train" / "a.txt", "0 0.5 0.5 0.25 0.2\n1 0.1 0.1 0.5 0.1 0.5 0.6\n")
    write(root / "labels" / "val" / "a.txt", "1 0.25 0.5 0.5 1\n")
    write(root / "data.yaml", yaml)


TRAIN = [("cat", [15, 12, 10, 6]), ("dog", [4, 3, 16, 15])]  # of 40 x 30
VAL = [("dog", [0, 0, 20, 30])]


@pytest.mark.parametrize(
    "yaml",
    [
        "train: images/train\nval: images/val\nnames: [cat, dog]\n",
        "path: .\ntrain: ../images/train\nval: images/val\nnames: {1: dog, 0: cat}\nnc: 2\n",
        "path: ~nosuchuser/x\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n",
        f"path: {'x' * 300}\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n",
        "path: /nowhere/at/all\ntrain: [images/train]\nval: images/val\ntest:\nnames:\n  0: cat\n  1: dog\n",
        "train: train.txt\nval: images/val\ntest: ../test/images\nnames: ['cat', 'dog']\n",
    ],
)
def test_yolo_in_the_ways_that_data_yaml_is_written(tmp_path, yaml):
    yolo(tmp_path, yaml)
    write(tmp_path / "train.txt", "./images/train/a.jpg\n/elsewhere/images/train/gone.jpg\n")
    converted = convert_annotations(tmp_path)
    assert boxes(converted, "train") == {"train/a.jpg": TRAIN}
    assert boxes(converted, "val") == {"val/a.jpg": VAL}
    assert converted.images == tmp_path / "images"
    assert annotations(converted, "train")[1]["segmentation"] == [[4, 3, 20, 3, 20, 18]]
    assert annotations(converted, "train")[1]["area"] == 120  # half of 16 x 15
    assert [c["name"] for c in converted.splits["val"]["categories"]] == ["cat", "dog"]
    if "train.txt" in yaml:
        assert reasons(converted, "images_left_out") == {"it is listed and not there": 1}
        assert reasons(converted, "notes") == {"the split 'test' is not there": 1}


def test_yolo_beside_its_images_elsewhere_and_by_file(tmp_path):
    yolo(tmp_path / "data", "")
    write(tmp_path / "data" / "data.yaml", "")
    file = write(tmp_path / "conf" / "mine.yaml", "path: ../data\ntrain: images/train\nnames: [no, yes]\n")
    converted = convert_annotations(file)
    assert boxes(converted, "train") == {"a.jpg": [("no", TRAIN[0][1]), ("yes", TRAIN[1][1])]}  # YAML 1.1's booleans
    (tmp_path / "data" / "data.yaml").unlink()
    write(tmp_path / "data" / "classes.txt", "cat\ndog\n")
    assert boxes(convert_annotations(tmp_path / "data"), "val") == {"val/a.jpg": VAL}


@pytest.mark.parametrize(
    ("root", "split"),
    [
        ("C:\\data\\set", "images\\train"),
        (".", "C:\\data\\set\\images\\train"),
        (".", "D:/set/images/train/"),
        (".", "/content/set/images/train"),
        (".", "..\\images\\train"),
        ("", ".\\images\\train\\"),
        ("", "C:\\lists\\sub\\train.txt"),
    ],
)
def test_yolo_paths_of_another_machine(tmp_path, root, split):
    yolo(tmp_path, f"path: {root}\r\ntrain: {split}\r\nnames: [cat, dog]\r\n")
    write(tmp_path / "sub" / "train.txt", "C:\\set\\images\\train\\a.jpg\r\n")
    assert boxes(convert_annotations(tmp_path), "train") == {"a.jpg": TRAIN}


@pytest.mark.parametrize(
    "split", ["/content/other/train", "C:\\x\\train", "../other/train", "other/train", "'C:'", "\\"]
)
def test_a_yolo_split_is_no_other_folder_of_its_last_name(tmp_path, split):
    yolo(tmp_path, f"train: {split}\nval: images/val\nnames: [cat, dog]\n")
    image(tmp_path / "train" / "a.jpg")
    assert list(convert_annotations(tmp_path).splits) == ["val"]


@pytest.mark.parametrize(("images", "labels"), [("Images", "Labels"), ("IMAGES", "LABELS"), ("images", "labels")])
def test_yolo_folders_in_capitals(tmp_path, images, labels):
    image(tmp_path / images / "train" / "a.JPG")
    write(tmp_path / labels / "train" / "a.txt", "0 0.5 0.5 0.25 0.2\n")
    file = write(tmp_path / "data.YAML", f"train: {images}/train\nnames: [cat]\n")
    for source in (tmp_path, file):
        assert boxes(convert_annotations(source), "train") == {"a.JPG": TRAIN[:1]}


@pytest.mark.parametrize("split", ["{root}/data/images/train", "../data/images/train", "{root}/data/images", "../data"])
def test_yolo_labels_of_a_split_that_lies_elsewhere(tmp_path, split):
    yolo(tmp_path / "data")
    (tmp_path / "data" / "data.yaml").unlink()
    (tmp_path / "data" / "images" / "val" / "a.jpg").unlink()
    file = write(tmp_path / "conf" / "data.yaml", f"train: {split.format(root=tmp_path)}\nnames: [cat, dog]\n")
    for source in (file, file.parent):
        assert boxes(convert_annotations(source), "train") == {"a.jpg": TRAIN}


def test_yolo_lines_that_cannot_be_read_are_counted(tmp_path):
    yolo(tmp_path)
    lines = [
        ("2 0.5 0.5 0.1 0.1", "class 2 is none of the 2 in 'names' (0 to 1)"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is none of the 2 in 'names' (0 to 1)"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is none of the 2 in 'names' (0 to 1)"),
        ("0 nan 0.5 0.1 0.1", "a coordinate is not finite"),
        ("cat 0.5 0.5 0.1 0.1", "a coordinate is no number"),
        ("0 200 150 40 40", "coordinates are not shares from 0 to 1"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 values, as predictions with a confidence have"),
        ("0 0.5 0.5", "neither CLASS cx cy w h nor CLASS x y x y x y ..."),
        ("0 0.5 0.5 0 0.1", "no area"),
    ]
    write(tmp_path / "labels" / "train" / "a.txt", "1.0 0.5 0.5 0.25 0.2\n\n" + "\n".join(line for line, _ in lines))
    image(tmp_path / "images" / "train" / "empty.jpg")
    converted = convert_annotations(tmp_path)
    assert boxes(converted, "train") == {"train/a.jpg": [("dog", [15, 12, 10, 6])], "train/empty.jpg": []}
    assert reasons(converted) == {reason: 1 for _, reason in lines}
    assert converted.summary["objects_left_out"][0]["examples"] == ["labels/train/a.txt: line 3"]
    assert reasons(converted, "notes") == {"an image without a text file has no objects": 1}


def test_yolo_poses_come_over_as_boxes(tmp_path):
    yolo(tmp_path, "train: images/train\nnames: [cat, dog]\nkpt_shape: [1, 3]\n")
    write(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.25 0.2 0.5 0.5 2\n")
    converted = convert_annotations(tmp_path)
    assert boxes(converted, "train") == {"a.jpg": [TRAIN[0]]}
    assert reasons(converted, "notes")["keypoints do not come over"] == 1


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("train: [images", ["data.yaml is no data.yaml of YOLO"]),
        ("[" * 20000, ["data.yaml", "nested too deep"]),
        ("names: " + "x" * (1 << 22), ["data.yaml", "it has more than 1 MB"]),
        ("names: [cat, dog]\n", ["data.yaml", "none named"]),
        ("train: nowhere\nnames: [cat, dog]\n", ["data.yaml", "none of its splits (train) is there"]),
        ("train: images/train\nnames: {0: cat, 2: dog}\n", ["does not number its 2 classes from 0 on"]),
        ("train: images/train\nnames: {a: cat}\n", ["whole numbers"]),
        ("train: {a: b}\nnames: [cat, dog]\n", ["data.yaml", "'train' is no path and no list of paths"]),
        ("train: images/train\nval: [images/val, [x]]\nnames: [cat, dog]\n", ["'val' is no path and no list of paths"]),
        ("path: [images]\ntrain: train\nnames: [cat, dog]\n", ["'path' is no path"]),
        ("train: ~nosuchuser/x\nnames: [cat, dog]\n", ["none of its splits (train) is there"]),
        (f"train: {'x' * 300}\nnames: [cat, dog]\n", ["none of its splits (train) is there"]),
        ('train: "a\\0b.txt"\nnames: [cat, dog]\n', ["none of its splits (train) is there"]),
        ("train: images/train\nnames: cat\n", ["no list of class names"]),
        ("train: images/train\nnames: [cat, dog, cat]\n", ["data.yaml", "'cat' stands twice, as number 0 and 2"]),
        ("train: images/train\nnames: {0: cat, 1: dog, 2: dog}\n", ["'dog' stands twice, as number 1 and 2"]),
        ("train: images/train\nnames:\n  0: cat\n  0: dog\n", ["the key '0' stands twice, again in line 4"]),
        ("train: images/train\nnames: {0: cat, 00: dog}\n", ["numbers two of its classes alike"]),
        ("train: images/train\nnames: [cat]\nnames: [dog]\n", ["the key 'names' stands twice", "line 3"]),
        ("train: images/train\nnames: [cat, dog]\nnc: 3\n", ["'nc' is 3 and 'names' has 2"]),
        ("train: images/bare\nnames: [cat, dog]\n", ["not one of its 1 images has a text file", "labels/bare/a.txt"]),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_one_sentence(tmp_path, capsys, yaml, words):
    yolo(tmp_path, yaml)
    image(tmp_path / "images" / "bare" / "a.jpg")
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "out"), "--format", "yolo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.parametrize("name", ["classes.txt", "obj.names"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat\ndog\ncat\n", "is no list of classes of YOLO: the class 'cat' stands twice, as number 0 and 2"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ("cat \r\ndog\r\n\r\n", ""),
    ],
)
def test_a_list_of_classes_numbers_each_once(tmp_path, name, text, words):
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / name).write_bytes(text.encode())
    if not words:
        assert convert_annotations(tmp_path).summary["classes"] == ["cat", "dog"]
        return
    with pytest.raises(UserError, match=words) as caught:
        convert_annotations(tmp_path, "yolo")
    assert str(tmp_path / name) in str(caught.value)


def test_yaml_tags_and_aliases_make_nothing(tmp_path):
    bomb = "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 'x'}]\n" for k in range(30))
    evil = f"names: !!python/object/apply:os.system ['touch {tmp_path}/touched']\n"
    yolo(tmp_path, bomb + "train: images/train\n" + evil)
    converted = convert_annotations(tmp_path, "yolo")
    assert converted.summary["classes"] == [f"touch {tmp_path}/touched"]  # plain text
    assert not (tmp_path / "touched").exists()


# --- LabelMe -----------------------------------------------------------------------------------------------------


def png(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def labelme(path: Path, *shapes: dict[str, Any], **other: Any) -> None:
    sound = {"version": "5.0", "flags": {}, "shapes": list(shapes), "imagePath": f"{path.stem}.jpg", "imageData": None}
    write(path, {**sound, "imageHeight": SIZE[1], "imageWidth": SIZE[0], **other})


def drawn(label: Any, kind: str, *points: list[float], group: int | None = None, **other: Any) -> dict[str, Any]:
    return {"label": label, "points": list(points), "group_id": group, "shape_type": kind, "flags": {}, **other}


def test_labelme_shapes(tmp_path):
    image(tmp_path / "images" / "a.jpg")
    labelme(
        tmp_path / "labels" / "a.json",
        drawn("cat", "polygon", [1, 2], [11, 2], [11, 12]),
        drawn("dog", "rectangle", [20, 9], [10, 4]),  # from any corner
        drawn("disc", "circle", [20, 15], [23, 19]),  # radius 5
        drawn("blob", "mask", [3, 4], [5, 5], mask=png(np.array([[0, 1, 0], [1, 1, 0]]))),
        drawn("cat", "polygon", [0, 0], [4, 0], [4, 4], group=1),
        drawn("cat", "polygon", [10, 10], [14, 10], [14, 14], group=1),
        drawn("dog", "polygon", [0, 0], [2, 0], [2, 2], group=1),
        drawn("cat", "line", [0, 0], [2, 0]),
        drawn("cat", "point", [0, 0]),
        drawn("cat", "polygon", [0, 0], [2, 0]),
        drawn("cat", "polygon", [0, 0], [2, 0], [3, "x"]),
        drawn("", "polygon", [0, 0], [2, 0], [3, 3]),
        imagePath="..\\images\\a.jpg",
    )
    converted = convert_annotations(tmp_path)
    assert converted.summary["format"] == "labelme"
    assert boxes(converted)["a.jpg"] == [
        ("cat", [1, 2, 10, 10]),
        ("dog", [10, 4, 10, 5]),
        ("disc", [15, 10, 10, 10]),
        ("blob", [3, 4, 2, 2]),
        ("cat", [0, 0, 14, 14]),
        ("dog", [0, 0, 2, 2]),
    ]
    polygon, rectangle, disc, blob, joined, _ = annotations(converted)
    assert polygon["area"] == 50
    assert "segmentation" not in rectangle
    assert disc["area"] == pytest.approx(np.pi * 25, rel=0.01)
    assert np.argwhere(mask_of(blob)).tolist() == [[4, 4], [5, 3], [5, 4]]  # row, column
    assert blob["area"] == 3
    assert joined["segmentation"] == [[0, 0, 4, 0, 4, 4], [10, 10, 14, 10, 14, 14]]
    assert joined["area"] == 16
    assert reasons(converted) == {
        "shape_type 'line' is no area": 1,
        "shape_type 'point' is no area": 1,
        "a polygon of fewer than three points": 1,
        "a coordinate is no number": 1,
        "it has no label": 1,
    }
    assert reasons(converted, "notes") == {"circle: a polygon of 32 points": 1}


def test_labelme_hostile_values(tmp_path):
    image(tmp_path / "a.jpg")
    text = (
        '{"imagePath": "a.jpg", "imageWidth": 40, "imageHeight": 30, "shapes": ['
        '{"label": "x", "shape_type": "rectangle", "points": [[1, 2], [5, 7]]},'
        '{"label": "x", "shape_type": "rectangle", "points": [[NaN, 2], [5, 7]]},'
        '{"label": "x", "shape_type": "mask", "points": [[1, 2], [5, 7]], "mask": "AAAA"},'
        '{"label": "x", "shape_type": "mask", "points": [[1, 2], [5, 7]]},'
        '{"label": {"a": 1}, "shape_type": "rectangle", "points": 3}, 7]}'
    )
    write(tmp_path / "a.json", text)
    converted = convert_annotations(tmp_path)
    assert boxes(converted)["a.jpg"] == [("x", [1, 2, 4, 5])]
    assert reasons(converted) == {
        "a coordinate is not finite": 1,
        "its mask is no PNG in base64": 2,
        "it has no label": 2,
    }


@pytest.mark.parametrize("content", ['{"shapes": [{"label"', "[" * 100000, '{"shapes": 1' + "0" * 5000 + "}", "\xff"])
def test_a_damaged_json_file_is_one_sentence(tmp_path, capsys, content):
    for name in "ab":
        image(tmp_path / f"{name}.jpg")
    labelme(tmp_path / "b.json", drawn("x", "rectangle", [1, 2], [5, 7]))
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "a.json is no LabelMe file" in said


def test_an_image_that_is_only_inside_the_json_is_said(tmp_path):
    image(tmp_path / "b.jpg")
    labelme(tmp_path / "a.json", drawn("x", "rectangle", [1, 2], [5, 7]), imageData="AAAA")
    labelme(tmp_path / "b.json", drawn("x", "rectangle", [1, 2], [5, 7]))
    converted = convert_annotations(tmp_path)
    assert reasons(converted, "images_left_out") == {"it is not there, only inside the JSON (imageData)": 1}


# --- VIA ---------------------------------------------------------------------------------------------------------


def region(kind: str, attributes: dict[str, Any] | None = None, **shape: Any) -> dict[str, Any]:
    return {"shape_attributes": {"name": kind, **shape}, "region_attributes": attributes or {}}


@pytest.mark.parametrize("layout", ["project", "export", "via 1"])
def test_via(tmp_path, layout):
    image(tmp_path / "a.jpg")
    regions: Any = [
        region("rect", {"kind": "x", "label": "cat"}, x=1, y=2, width=5, height=6),
        region("polygon", {"label": "dog"}, all_points_x=[0, 8, 8], all_points_y=[0, 0, 4]),
        region("circle", {"label": "cat"}, cx=20, cy=15, r=5),
        region("ellipse", {"label": {"cat": True, "dog": False}}, cx=20, cy=15, rx=6, ry=2, theta=np.pi / 2),
        region("polyline", {"label": "cat"}, all_points_x=[0, 8], all_points_y=[0, 0]),
        region("point", {"label": "cat"}, cx=1, cy=1),
        region("polygon", {"label": "cat"}, all_points_x=[0, 8, 8], all_points_y=[0, 0]),
        region("rect", {"kind": "x"}, x=1, y=2, width=5, height=6),
        region("rect", {"label": "cat"}, x=1, y=2, width=0, height=6),
        {"shape_attributes": None},
    ]
    entry = {"filename": "a.jpg", "size": 1, "regions": regions, "file_attributes": {}}
    content: Any = {"a.jpg1": entry}
    if layout == "via 1":
        entry["regions"] = {str(k): each for k, each in enumerate(regions)}
    if layout == "project":
        content = {"_via_settings": {}, "_via_img_metadata": content, "_via_attributes": {}}
    write(tmp_path / "via_project.json", content)
    converted = convert_annotations(tmp_path)
    assert converted.summary["format"] == "via"
    assert boxes(converted)["a.jpg"] == [
        ("cat", [1, 2, 5, 6]),
        ("dog", [0, 0, 8, 4]),
        ("cat", [15, 10, 10, 10]),
        ("cat", [18, 9, 4, 12]),
    ]
    assert annotations(converted)[3]["area"] == pytest.approx(np.pi * 12, rel=0.01)
    assert reasons(converted) == {
        "the shape 'polyline' is no area": 1,
        "the shape 'point' is no area": 1,
        "all_points_x and all_points_y are not lists of one length": 1,
        "its attribute 'label' is empty or missing": 1,
        "it has no shape_attributes": 1,
        "no area": 1,
    }
    assert "the class is the attribute 'label'; not read: kind" in reasons(converted, "notes")


def test_numbers_that_would_overflow_are_counted(tmp_path):
    image(tmp_path / "a.jpg")
    huge = 1e308
    regions = [
        region("ellipse", cx=9, cy=9, rx=3, ry=4, theta=huge),
        region("ellipse", cx=9, cy=9, rx=huge, ry=huge),
        region("polygon", all_points_x=[-huge, huge, 5], all_points_y=[0, huge, 5]),
        region("rect", x=huge, y=2, width=huge, height=6),
        region("rect", x=1, y=2, width=5, height=6),
        region("rect", x=1, y=2, width=10**400, height=6),
    ]
    write(tmp_path / "b.json", {"a": {"filename": "a.jpg", "regions": regions}})
    converted = convert_annotations(tmp_path)
    assert boxes(converted)["a.jpg"] == [("object", [1, 2, 5, 6])]
    assert reasons(converted) == {"a number beyond 1e+12": 4, "a coordinate is no number": 1}


def test_text_that_is_no_utf_8_is_left_out(tmp_path, capsys):
    """Half a surrogate pair, as JSON can hold it, and file names of other bytes."""
    image(tmp_path / "src" / "a.jpg")
    image(tmp_path / "src" / "b.jpg")
    os.rename(tmp_path / "src" / "b.jpg", os.fsencode(tmp_path / "src") + b"/\xff.jpg")
    rect = {"x": 1, "y": 2, "width": 5, "height": 6}
    regions = [region("rect", {"label": label}, **rect) for label in ("\ud800", "cat")]
    entries = {"1": {"filename": "\ud800.jpg", "regions": []}, "2": {"filename": "a.jpg", "regions": regions}}
    write(tmp_path / "src" / "via.json", entries)
    converted = convert_annotations(tmp_path / "src")
    assert boxes(converted) == {"a.jpg": [("cat", [1, 2, 5, 6])]}
    assert reasons(converted) == {"its class has a name that is no UTF-8": 1}
    assert reasons(converted, "images_left_out") == {"it is not there": 1, "no annotation names it": 1}
    json.dumps(converted.summary, ensure_ascii=False).encode()
    for flag in ([], ["--json"]):
        assert main(["data", "convert", str(tmp_path / "src"), str(tmp_path / "out"), *flag]) == 0
    yolo(tmp_path / "yolo", 'train: images/train\nnames: [cat, "\\uD800"]\n')
    with pytest.raises(UserError, match="the name of class 1"):
        convert_annotations(tmp_path / "yolo")


def test_via_without_attributes_has_one_class(tmp_path):
    image(tmp_path / "a.jpg")
    write(tmp_path / "b.json", {"a": {"filename": "a.jpg", "regions": [region("rect", x=1, y=2, width=5, height=6)]}})
    assert boxes(convert_annotations(tmp_path))["a.jpg"] == [("object", [1, 2, 5, 6])]


# --- Label Studio ------------------------------------------------------------------------------------------------


def result(kind: str, label: str | None = "cat", number: str = "r", **value: Any) -> dict[str, Any]:
    labels = {} if label is None else {kind: [label]}
    return {"id": number, "type": kind, "original_width": 40, "original_height": 30, "value": {**value, **labels}}


def test_label_studio(tmp_path):
    image(tmp_path / "images" / "1a2b3c4d-photo one.jpg")
    image(tmp_path / "images" / "b.jpg")
    results = [
        result("rectanglelabels", x=10, y=20, width=50, height=40),
        result("rectanglelabels", "dog", x=50, y=20, width=25, height=20, rotation=90),
        result("polygonlabels", points=[[0, 0], [20, 0], [20, 50]]),
        result("ellipselabels", x=50, y=50, radiusX=10, radiusY=20),
        result("rectangle", None, "7", x=0, y=0, width=10, height=10),
        result("labels", "bird", "7"),
        result("brushlabels", format="rle", rle=[0, 1, 2]),
        result("keypointlabels", x=1, y=1, width=1),
        result("choices", None),
        result("rectanglelabels", None, x=10, y=20, width=50, height=40),
    ]
    second = {"result": [result("rectanglelabels", x=1, y=2, width=5, height=4)] * 3}
    export = [
        {
            "id": 1,
            "data": {"image": "/data/upload/2/1a2b3c4d-photo%20one.jpg"},
            "annotations": [{"was_cancelled": True, "result": results[:1]}, {"result": results}, second],
        },
        {"id": 2, "data": {"image": "/data/local-files/?d=some/where/b.jpg"}, "annotations": [{"result": results[:1]}]},
        {"id": 3, "data": {"image": "s3://bucket/gone.jpg"}, "annotations": [{"result": results[:1]}]},
        {"id": 4, "data": {"image": "https://host/images/b.jpg?x=1"}, "annotations": []},
    ]
    write(tmp_path / "project-1.json", export)
    converted = convert_annotations(tmp_path)
    assert converted.summary["format"] == "labelstudio"
    assert boxes(converted) == {
        "1a2b3c4d-photo one.jpg": [
            ("cat", [4, 6, 20, 12]),
            # corner (20, 6), 10 x 6 pixels, a quarter clockwise: 6 to the left and 10 down
            ("dog", [14, 6, 6, 10]),
            ("cat", [0, 0, 8, 15]),
            ("cat", [16, 9, 8, 12]),
            ("bird", [0, 0, 4, 3]),
        ],
        "b.jpg": [("cat", [4, 6, 20, 12])],
    }
    assert reasons(converted) == {
        "a brush mask in Label Studio's own run-length code; export it as COCO or PNG": 1,
        "a result of type 'keypoint' is no area": 1,
        "it has no label": 1,
        "of another annotation of the same task than the first": 3,
        "its image is left out": 1,
    }
    assert reasons(converted, "images_left_out") == {"it is not there": 1, "its task has no annotation": 1}


def test_json_min_is_refused(tmp_path):
    """Its entries are flat: the task's data, the answers under their names in the labelling interface, and these."""
    image(tmp_path / "a.jpg")
    shape = {"x": 1, "y": 2, "width": 3, "height": 4, "rotation": 0, "rectanglelabels": ["c"]}
    answer = {**shape, "original_width": 40, "original_height": 30}
    entry = {"image": "/data/upload/1/a.jpg", "id": 1, "label": [answer], "annotator": 1, "annotation_id": 1}
    more = {"created_at": "2024-01-01T00:00:00Z", "updated_at": "2024-01-01T00:00:00Z", "lead_time": 2.5}
    for content in ([{**entry, **more}], [{"kind": "none", **more, "id": 2, "annotator": 1}] * 2000):
        write(tmp_path / "x.json", content)
        for kind in ("auto", "labelstudio"):
            with pytest.raises(UserError, match=r"x.json is Label Studio's JSON-MIN, .* export it as JSON"):
                convert_annotations(tmp_path, kind)


def test_tasks_that_nobody_has_annotated_are_refused(tmp_path):
    image(tmp_path / "a.jpg")
    write(tmp_path / "x.json", [{"id": 1, "data": {"image": "a.jpg"}, "predictions": []}])
    with pytest.raises(UserError, match=r"x.json holds tasks without 'annotations'"):
        convert_annotations(tmp_path)


# --- CVAT --------------------------------------------------------------------------------------------------------

CVAT = """<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>
<meta><task><labels><label><name>dog</name></label><label><name>cat</name></label></labels></task></meta>
<image id="0" name="a.jpg" subset="Train" width="40" height="30">
  <box label="cat" xtl="1.5" ytl="2" xbr="11.5" ybr="12" occluded="0"/>
  <box label="cat" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90"/>
  <polygon label="dog" points="0,0;8,0;8,4"/>
  <mask label="dog" rle="1, 2, 3" left="5" top="7" width="3" height="2"/>
  <ellipse label="cat" cx="20" cy="15" rx="6" ry="2"/>
  <polyline label="cat" points="0,0;8,0"/><points label="cat" points="1,1"/><cuboid label="cat"/><tag label="cat"/>
  <mask label="dog" rle="1,2" left="5" top="7" width="3" height="2"/>
  <mask label="dog" rle="0,4000000000" left="0" top="0" width="2000000" height="2000"/>
  <polygon label="dog" points="0,0;8"/>
</image>
<image id="1" name="sub/b.jpg" subset="Validation" width="40" height="30"/>
<image id="2" name="gone.jpg" width="40" height="30"><box label="cat" xtl="1" ytl="2" xbr="11" ybr="12"/></image>
</annotations>"""


def test_cvat(tmp_path):
    image(tmp_path / "images" / "Train" / "a.jpg")
    image(tmp_path / "images" / "Validation" / "sub" / "b.jpg")
    write(tmp_path / "annotations.xml", CVAT)
    converted = convert_annotations(tmp_path)
    assert converted.summary["format"] == "cvat"
    assert converted.summary["classes"] == ["dog", "cat"]
    assert boxes(converted, "Train") == {
        "Train/a.jpg": [
            ("cat", [1.5, 2, 10, 10]),
            ("cat", [13, 7, 4, 10]),  # 10 x 4 about (15, 12), turned by a quarter
            ("dog", [0, 0, 8, 4]),
            ("dog", [6, 7, 2, 1]),
            ("cat", [14, 13, 12, 4]),
        ]
    }
    # one pixel of background, two of the mask, three of background, along the rows of 3 x 2
    assert np.argwhere(mask_of(annotations(converted, "Train")[3])).tolist() == [[7, 6], [7, 7]]
    assert boxes(converted, "Validation") == {"Validation/sub/b.jpg": []}
    assert reasons(converted) == {
        "<polyline> is no area": 1,
        "<points> is no area": 1,
        "<cuboid> is no area": 1,
        "<tag> is no area": 1,
        "its run lengths do not add up to width x height": 1,
        "its mask is larger than its image": 1,
        "its points are not pairs of numbers": 1,
        "its image is left out": 1,
    }


def test_cvat_masks_are_never_larger_than_the_image_that_is_there(tmp_path):
    """81 terabytes of pixels are stated, of which the mask covers a few."""
    for name in "ab":
        image(tmp_path / f"{name}.jpg")
    mask = '<mask label="d" rle="5,995" left="0" top="0" width="1000" height="1"/>'
    box = '<box label="d" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    side = "9000000"
    elements = (
        f'<image name="a.jpg" width="{side}" height="{side}">{mask}</image>'
        f'<image name="b.jpg" width="40" height="30">{box}</image>'
    )
    write(tmp_path / "a.xml", f"<annotations>{elements}</annotations>")
    converted = convert_annotations(tmp_path)
    assert boxes(converted) == {"b.jpg": [("d", [1, 1, 4, 4])]}
    assert reasons(converted) == {"its mask is larger than its image": 1}
    assert reasons(converted, "images_left_out") == {"it has another size": 1}


def test_cvat_for_video_is_refused(tmp_path):
    image(tmp_path / "a.jpg")
    write(tmp_path / "annotations.xml", '<annotations><track id="0" label="x"/></annotations>')
    with pytest.raises(UserError, match="CVAT for video"):
        convert_annotations(tmp_path)


# --- PNG masks ---------------------------------------------------------------------------------------------------


def test_png_masks(tmp_path):
    values = np.zeros((30, 40), np.uint16)
    values[2:5, 3:9] = 300
    values[20, 30] = 300  # one object of two pieces
    values[10:12, 0:4] = 7
    image(tmp_path / "PNGImages" / "a.png")
    image(tmp_path / "PNGImages" / "b.png")
    image(tmp_path / "PNGImages" / "c.png")
    (tmp_path / "PedMasks").mkdir()
    Image.fromarray(values).save(tmp_path / "PedMasks" / "a_mask.png")
    palette = Image.fromarray((values > 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "PedMasks" / "b.png")
    Image.fromarray(values.astype(np.uint8)[:20]).save(tmp_path / "PedMasks" / "c.png")
    converted = convert_annotations(tmp_path)
    assert converted.summary["format"] == "png"
    assert boxes(converted) == {
        "a.png": [("object", [0, 10, 4, 2]), ("object", [3, 2, 28, 19])],
        "b.png": [("object", [0, 2, 31, 19])],
    }
    second = annotations(converted)[1]
    assert (mask_of(second) == (values == 300)).all()
    assert second["area"] == 19
    assert reasons(converted, "images_left_out") == {"it has another size": 1}


def test_a_mask_in_colours_or_damaged_is_refused(tmp_path):
    image(tmp_path / "images" / "a.png")
    image(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"masks/a.png is no mask: .*not a number each"):
        convert_annotations(tmp_path)
    data = (tmp_path / "masks" / "a.png").read_bytes()
    (tmp_path / "masks" / "a.png").write_bytes(data[:40])
    with pytest.raises(UserError, match=r"masks/a.png is no mask: it cannot be decoded"):
        convert_annotations(tmp_path)


# --- all of them -------------------------------------------------------------------------------------------------


LONG = "x" * 100_000  # more than is read of a file's beginning
COCO_PARTS = {"info": {"version": "1"}, "images": [{"id": 1}], "annotations": [], "categories": [{"id": 1}]}
TOLD = [
    (COCO_PARTS, "coco"),
    ({"version": "1.0", **COCO_PARTS}, "coco"),
    ({"flags": {}, "version": "1.0", **COCO_PARTS}, "coco"),
    ({"info": {"filename": "a", "regions": "b"}, **COCO_PARTS}, "coco"),
    ({"images": [{"filename": "a.jpg", "regions": [], "shapes": []}], "categories": []}, "coco"),
    ({"annotations": [{"text": LONG}], "images": [], "categories": []}, "coco"),
    ({"meta": LONG, **COCO_PARTS}, "coco"),
    ({"licenses": [{"name": f'"images": [{{ \\ {LONG}'}], **COCO_PARTS}, "coco"),
    ({"version": "5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg"}, "labelme"),
    ({"imageData": LONG, "shapes": [], "imagePath": "a.jpg"}, "labelme"),
    ({"version": "5.0", "shapes": [{"label": LONG}], "imagePath": "a.jpg"}, "labelme"),
    ({"_via_settings": {"text": LONG}, "_via_img_metadata": {}}, "via"),
    ({"a.jpg1": {"filename": "a.jpg", "regions": []}}, "via"),
    ({"a.jpg1": {"filename": "a.jpg", "size": 1, "regions": [LONG]}}, "via"),
    ([{"id": 1, "annotations": [], "data": {}}], "labelstudio"),
    ([{"id": 1, "annotations": [{"result": LONG}], "data": {}}], "labelstudio"),
    ([{"image": "a.jpg", "id": 1, "label": [], "annotator": 1, "annotation_id": 1}], "labelstudio"),
    ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], None),
    ({"type": "FeatureCollection", "features": []}, None),
    ({"images": []}, None),
    ([], None),
    ({}, None),
    ("images annotations", None),
]


@pytest.mark.parametrize(("content", "kind"), TOLD)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_the_format_of_a_json_file(tmp_path, content, kind, encoding):
    text = json.dumps(content, indent=1)
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding))
    beyond = encoding == "gzip" and ("meta" in content or "licenses" in content)  # all keys are read of plain JSON only
    assert json_format(path) == (None if beyond else kind)


def test_a_long_file_is_not_parsed_to_tell_its_format(tmp_path):
    """What comes after the beginning is no JSON at all, or of another format."""
    image(tmp_path / "a.jpg")
    write(tmp_path / "a.json", '{"info": {}, "images": [' + LONG)
    assert recognise(Tree(tmp_path)) == ["coco"]
    write(tmp_path / "a.json", '{"version": "5", "shapes": [' + LONG)
    assert recognise(Tree(tmp_path)) == ["labelme"]
    (tmp_path / "a.json").unlink()
    write(tmp_path / "a.xml", "<?xml version='1.0'?><annotations>" + LONG)
    assert recognise(Tree(tmp_path)) == ["cvat"]


def test_two_formats_are_not_guessed_between(tmp_path):
    image(tmp_path / "a.jpg")
    voc(tmp_path / "a.xml", thing("x", (1, 1, 3, 3)))
    labelme(tmp_path / "a.json", drawn("y", "rectangle", [1, 2], [5, 7]))
    assert recognise(Tree(tmp_path)) == ["voc", "labelme"]
    with pytest.raises(UserError, match="--format voc, labelme"):
        convert_annotations(tmp_path)
    assert boxes(convert_annotations(tmp_path, "labelme"))["a.jpg"] == [("y", [1, 2, 4, 5])]
    assert boxes(convert_annotations(tmp_path, "voc"))["a.jpg"] == [("x", [0, 0, 3, 3])]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "out"], ["nowhere", "no such folder"]),
        (["plain", "out"], ["plain holds no annotations of a known format", "voc, yolo"]),
        (["plain", "out", "--format", "vok"], ["--format vok is none of auto, voc"]),
        (["plain"], ["SRC OUT"]),
        (
            ["plain", "out", "--annotations", "a.json"],
            ["--annotations a.json is of data check", "leave it out of data convert"],
        ),
        (["plain", "--out", "out"], ["SRC OUT"]),
        (["plain", "out", "--out", "there"], ["--out there is of data check"]),
        (["coco", "out"], ["COCO's format already", "FILE.json@FOLDER"]),
        (["empty", "out"], ["no object could be converted as voc", "no area", "a.xml: object 1 (x)"]),
        (["strangers", "out"], ["no object could be converted as voc", "it is not there"]),
        (["plain", "out"], ["CSV, CreateML, KITTI", "export COCO"]),
        (["nothing", "out"], ["no object could be converted as voc; the annotations have none."]),
        (
            ["lines", "out"],
            [
                "converted as cvat; objects left out, 2 x: <polyline> is no area (annotations.xml: a.jpg: <polyline> ",
                "images left out, 1 x: no annotation names it (b.jpg)",
            ],
        ),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    image(Path("plain/a.jpg"))
    write(Path("coco/x.json"), {"images": [], "annotations": [], "categories": []})
    image(Path("empty/a.jpg"))
    voc(Path("empty/a.xml"), thing("x", (5, 5, 2, 2)))
    voc(Path("strangers/b.xml"), thing("x", (1, 1, 2, 2)))
    image(Path("nothing/a.jpg"))
    voc(Path("nothing/a.xml"), "")
    image(Path("lines/a.jpg"))
    image(Path("lines/b.jpg"))
    drawings = "".join(f'<{kind} label="x" points="1,1;5,5"/>' for kind in ("points", "polyline", "polyline"))
    write(Path("lines/annotations.xml"), f'<annotations><image name="a.jpg">{drawings}</image></annotations>')
    assert main(["data", "convert", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


def test_the_command_tells_what_to_type_and_never_writes_over_a_strangers_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    yolo(tmp_path / "pets")
    before = {path: path.read_bytes() for path in (tmp_path / "pets").rglob("*") if path.is_file()}
    for _ in range(2):  # its own files may be written anew
        assert main(["data", "convert", "pets", "out"]) == 0
    said = capsys.readouterr().out
    assert f"DATASETS.TRAIN \"('out/annotations/train.json@{tmp_path}/pets/images',)\"" in said
    assert "MODEL.ROI_HEADS.NUM_CLASSES 2" in said
    assert before == {path: path.read_bytes() for path in (tmp_path / "pets").rglob("*") if path.is_file()}
    written = json.loads(Path("out/annotations/train.json").read_text())
    assert written == convert_annotations(Path("pets")).splits["train"]
    told = json.loads(Path("out/conversion.json").read_text())
    assert told["splits"]["train"]["objects_per_class"] == {"cat": 1, "dog": 1}
    assert told["splits"]["train"]["with_mask"] == 1
    write(Path("out/annotations/val.json"), {"mine": 1})
    assert main(["data", "convert", "pets", "out"]) == 2
    assert "val.json is there and was not written by a conversion" in capsys.readouterr().err
    assert json.loads(Path("out/annotations/val.json").read_text()) == {"mine": 1}


def test_no_two_splits_share_a_file(tmp_path):
    subsets = ["my split", "split_1", "Split_2", "SPLIT_2", "a/b", "../..", "x" * 300, "Train", "train", "-", "ß", "ss"]
    for k in range(len(subsets)):
        image(tmp_path / "src" / f"{k}.jpg")
    box = '<box label="d" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    elements = "".join(f'<image name="{k}.jpg" subset="{name}">{box}</image>' for k, name in enumerate(subsets))
    write(tmp_path / "src" / "a.xml", f"<annotations>{elements}</annotations>")
    files = write_conversion(convert_annotations(tmp_path / "src"), tmp_path / "out")
    assert set(files) == set(subsets)
    assert len({path.name.casefold() for path in files.values()}) == len(subsets)
    assert {path.parent for path in files.values()} == {tmp_path / "out" / "annotations"}
    assert files["split_1"].name == "split_1.json"
    for k, name in enumerate(subsets):
        assert [entry["file_name"] for entry in json.loads(files[name].read_text())["images"]] == [f"{k}.jpg"]


@pytest.mark.parametrize("out", [".", "out", "images"])
def test_what_a_conversion_wrote_into_its_source_is_no_part_of_it(tmp_path, out):
    image(tmp_path / "images" / "a.jpg")
    labelme(tmp_path / "images" / "a.json", drawn("x", "rectangle", [1, 2], [5, 7]))
    first = convert_annotations(tmp_path)
    write_conversion(first, tmp_path / out)
    assert convert_annotations(tmp_path) == first
    labelme(tmp_path / out / "annotations" / "b.json", drawn("x", "rectangle", [1, 2], [5, 7]))
    image(tmp_path / "b.jpg")
    assert len(annotations(convert_annotations(tmp_path))) == 2  # an owner's own file beside ours is read


def test_pycocotools_reads_what_comes_out(tmp_path):
    from pycocotools.coco import COCO

    yolo(tmp_path / "pets")
    assert main(["data", "convert", str(tmp_path / "pets"), str(tmp_path / "out"), "--quiet"]) == 0
    coco = COCO(str(tmp_path / "out" / "annotations" / "train.json"))
    (annotation,) = coco.loadAnns(coco.getAnnIds(catIds=[2]))
    assert coco.annToMask(annotation).shape == (30, 40)


def made(root: Path, kind: str) -> Path:
    """A small source of a format; the file of it that is going to be damaged."""
    box = region("rect", {"l": "c"}, x=1, y=2, width=3, height=4)
    if kind == "yolo":
        yolo(root)
        return root / "labels" / "train" / "a.txt"
    if kind == "png":
        image(root / "images" / "a.png")
        (root / "masks").mkdir()
        Image.fromarray(np.eye(30, 40, dtype=np.uint8)).save(root / "masks" / "a.png")
        return root / "masks" / "a.png"
    image(root / "images" / "Train" / "a.jpg")
    if kind == "voc":
        turned = "<robndbox><cx>9</cx><cy>9</cy><w>4</w><h>5</h><angle>0.3</angle></robndbox>"
        voc(root / "a.xml", thing("x", (1, 1, 5, 5), "<difficult>0</difficult>"), thing("z", None, turned))
    elif kind == "cvat":
        write(root / "a.xml", CVAT)
    elif kind == "labelme":
        mask = png(np.eye(3))
        shapes = [drawn("d", "circle", [9, 9], [9, 12], group=1), drawn("m", "mask", [3, 4], [5, 6], mask=mask)]
        labelme(root / "a.json", drawn("c", "polygon", [1, 2], [11, 2], [11, 12], group=1), *shapes)
    elif kind == "via":
        curve = region("ellipse", {"l": "c"}, cx=9, cy=9, rx=3, ry=4, theta=0.3)
        write(root / "a.json", {"a.jpg1": {"filename": "a.jpg", "size": 1, "regions": [box, curve]}})
    else:
        results = [result("rectanglelabels", x=1, y=2, width=30, height=40, rotation=3), result("labels", "cat", "r")]
        write(root / "a.json", [{"data": {"image": "/data/upload/a.jpg"}, "annotations": [{"result": results}]}])
    return next(path for path in root.glob("a.*"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_read_or_refused_and_never_a_bug(tmp_path, kind):
    """Values exchanged for others, bytes cut out and changed, the end cut off: a result or one sentence."""
    rng, file = random.Random(0), made(tmp_path, kind)
    whole = file.read_bytes()
    assert convert_annotations(tmp_path).summary["format"] == kind
    others = [
        b"null",
        b"[]",
        b"{}",
        b"NaN",
        b"-1",
        b"1e400",
        b'""',
        b"true",
        b"9" * 30,
        b"\xff",
        b"<x/>",
        b"[[1]]",
        b"-",
    ]
    sentences = []
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            values = list(re.finditer(rb'[0-9.]+|"[^"]*"|\[[^\[\]]*\]|null|<[^>]*>', data)) or [re.match(b"", data)]
            start, end = rng.choice(values).span()
            how = rng.random()
            if how < 0.7:
                data[start:end] = rng.choice(others)
            elif how < 0.8:
                del data[end:]
            elif how < 0.9:
                del data[start : start + 9]
            else:
                data[start : start + 1] = bytes([rng.randrange(256)])
        file.write_bytes(data)
        try:
            convert_annotations(tmp_path, kind)
        except UserError as error:
            sentences.append(str(error))
    assert sentences
    assert not [sentence for sentence in sentences if "\n" in sentence]


def test_a_class_that_is_not_declared_comes_behind_the_others(tmp_path):
    image(tmp_path / "a.jpg")
    boxes_of = "".join(f'<box label="{name}" xtl="1" ytl="2" xbr="6" ybr="8"/>' for name in ("wolf", "cat"))
    labels = "<meta><job><labels><label><name>cat</name></label></labels></job></meta>"
    write(tmp_path / "a.xml", f'<annotations>{labels}<image name="a.jpg">{boxes_of}</image></annotations>')
    converted = convert_annotations(tmp_path)
    assert converted.summary["classes"] == ["cat", "wolf"]
    assert "a class that is not declared is put behind those that are" in reasons(converted, "notes")


def test_every_format_is_tried_here() -> None:
    text = Path(__file__).read_text()
    assert set(FORMATS) == {
        name for name in FORMATS if f"def test_{name.replace('labelstudio', 'label_studio')}" in text
    }
