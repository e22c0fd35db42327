"""Annotation files that are not written as COCO writes its own: read as their clean twins, or refused in a sentence."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import logging
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loco_det.annotations.coco_json import MALFORMED, Content, parse
from loco_det.annotations.index import CocoIndex, load_index
from loco_det.annotations.lenient import rewritten
from loco_det.annotations.subsets import part_of
from loco_det.core.errors import UserError
from loco_det.evaluation.coco import evaluate_coco

H, W = 60, 80


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def square(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def clean(seed: int = 0, images: int = 6, objects: int = 30) -> dict[str, Any]:
    """Written as COCO writes its files, ids in no order."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 40, (objects, 2)), rng.uniform(3, 20, (objects, 2))], 1).round(2).tolist()
    numbers = rng.permutation(100)[:images].tolist()
    return {
        "info": {"year": 2026},
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in numbers],
        "categories": [{"id": i, "name": f"kind {i}"} for i in (7, 3)],
        "annotations": [
            {
                "id": 500 - k,
                "image_id": int(rng.choice(numbers)),
                "category_id": int(rng.choice([7, 3])),
                "bbox": box,
                "area": round(box[2] * box[3], 3),
                "iscrowd": int(k % 9 == 0),
                "segmentation": square(*box),
            }
            for k, box in enumerate(boxes)
        ],
    }


def saved(folder: Path, written: dict[str, Any] | bytes, name: str = "instances.json") -> Path:
    path = folder / name
    path.write_bytes(written if isinstance(written, bytes) else json.dumps(written).encode())
    return path


def each(table: str, **changes: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    """Changes these values of every entry of a table."""

    def change(content: dict[str, Any]) -> None:
        for entry in content[table]:
            for key, convert in changes.items():
                entry[key] = convert(entry.get(key))

    return change


def without(table: str, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for entry in content[table]:
            for key in keys:
                del entry[key]

    return change


def together(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for one in changes:
            one(content)

    return change


def flag(value: Any) -> Any:
    return None if value == 0 else value


# name: (how a clean file gets it, what the message says)
SPELLINGS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "image ids as text": (
        together(each("images", id=str), each("annotations", image_id=str)),
        "6 x image whose id is text",
    ),
    "image ids as text in images alone": (each("images", id=str), "6 x image whose id is text"),
    "ids with a decimal point": (
        together(
            each("images", id=float),
            each("annotations", image_id=float, category_id=float, id=float),
            each("categories", id=float),
        ),
        "30 x annotation whose id is a decimal number",
    ),
    "ids as text with a decimal point": (each("annotations", category_id="{}.0".format), "category_id is text"),
    "iscrowd null where it is 0": (each("annotations", iscrowd=flag), "26 x annotation whose iscrowd is null"),
    "iscrowd as text": (each("annotations", iscrowd=str), "30 x annotation whose iscrowd is text"),
    "iscrowd with a decimal point": (each("annotations", iscrowd=float), "iscrowd is a decimal number"),
    "sizes with a decimal point": (each("images", width=float, height=float), "6 x image whose width is a decimal"),
    "sizes as text": (each("images", width=str, height=str), "6 x image whose height is text"),
    "boxes of text": (each("annotations", bbox=lambda b: list(map(str, b))), "30 x annotation whose bbox is a list"),
    "boxes as text": (each("annotations", bbox=str), "30 x annotation whose bbox is text"),
    "areas as text": (each("annotations", area=str), "30 x annotation whose area is text"),
    "NaN in an unused field": (each("annotations", score=lambda _: math.nan), "30 x NaN, read as null"),
    "an infinite licence": (each("images", license=lambda _: -math.inf), "6 x -Infinity, read as null"),
    "ignore and difficult null": (each("annotations", ignore=lambda _: None, difficult=lambda _: None), "30 x"),
    "file_name as a number": (each("images", file_name=lambda n: int(n[:-4])), "6 x image whose file_name is a number"),
}


def assert_same(found: CocoIndex, expected: CocoIndex, *, but: set[str] = frozenset()) -> None:
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray) and name not in {"segmentation_start", "segmentation_length", *but}:
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)
    assert found.category_names == expected.category_names
    assert list(map(json.loads, found.segmentations(slice(None)))) == list(
        map(json.loads, expected.segmentations(slice(None)))
    )


def warnings_of(caplog: pytest.LogCaptureFixture, path: Path) -> list[str]:
    return [r.getMessage() for r in caplog.records if str(path) in r.getMessage() and "is not strict COCO" in r.message]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_read_as_its_clean_twin_and_told_once(tmp_path, caplog, monkeypatch, spelling):
    change, words = SPELLINGS[spelling]
    content = clean()
    twin = load_index(saved(tmp_path, content, "twin.json"))
    odd = copy.deepcopy(content)
    change(odd)
    path = saved(tmp_path, odd)
    monkeypatch.setattr(logging.getLogger("loco_det"), "propagate", True)
    with caplog.at_level("INFO", logger="loco_det"):
        found, again = load_index(path), load_index(path)
    but = {"name_data", "name_offsets"} if "file_name" in spelling else set()
    assert_same(found, twin, but=but)
    assert_same(again, twin, but=but)
    assert again.mapped
    assert again.notes == found.notes != {}
    (line,) = warnings_of(caplog, path)
    assert words in line
    assert str(found.readable) in line


@pytest.mark.parametrize("spelling", ["null", "absent", "no number", "NaN"])
def test_an_area_that_is_none_is_absent(tmp_path, spelling):
    change = {
        "null": each("annotations", area=lambda _: None),
        "absent": without("annotations", "area"),
        "no number": each("annotations", area=lambda _: "large"),
        "NaN": each("annotations", area=lambda _: math.nan),
    }[spelling]
    content = clean()
    twin = load_index(saved(tmp_path, content, "twin.json"))
    change(content)
    found = load_index(saved(tmp_path, content))
    assert np.isnan(found.area).all()
    assert_same(found, twin, but={"area"})


@pytest.mark.parametrize("box", [None, [], "absent"])
@pytest.mark.parametrize("ids", [int, str, "{}-uuid".format])
def test_a_box_that_is_none_is_that_of_the_mask(tmp_path, box, ids):
    content = clean()
    for k, annotation in enumerate(content["annotations"]):
        x, y, w, h = annotation["bbox"] = [10 + k, 5, 7, 11 + k % 3]
        mask = np.zeros((H, W), dtype=bool)
        mask[y : y + h, x : x + w] = True
        runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=not mask[-1, -1])), prepend=0)
        rle = {"size": [H, W], "counts": runs.tolist()}
        annotation["segmentation"] = rle if k % 2 else [*square(x, y, 2, 2), *square(x + 2, y + 2, w - 2, h - 2)]
    together(each("images", id=ids), each("annotations", image_id=ids))(content)
    twin = load_index(saved(tmp_path, content, "twin.json"))
    for annotation in content["annotations"]:
        annotation["bbox"] = box
        if box == "absent":
            del annotation["bbox"]
    found = load_index(saved(tmp_path, content))
    assert_same(found, twin)
    assert found.notes["annotation without a bbox: that of its segmentation"] == 30


def test_a_box_cannot_be_had_from_a_mask_that_is_none(tmp_path):
    content = clean()
    for segmentation in ([], [[1, 2, 3, 4]], {"size": [H, W + 1], "counts": [1]}, "x", None):
        content["annotations"][0] |= {"bbox": None, "segmentation": segmentation}
        with pytest.raises(UserError, match=r"1 x annotation whose bbox is not four numbers, the first \(id 500\)"):
            load_index(saved(tmp_path, content))
    content["annotations"][0] |= {"image_id": 12345, "segmentation": square(1, 2, 3, 4)}  # an image without a size
    with pytest.raises(UserError, match="1 x annotation whose bbox"):
        load_index(saved(tmp_path, content))


@pytest.mark.parametrize("change", [without("annotations", "id"), each("annotations", id=lambda _: None)])
def test_annotations_of_which_none_has_an_id_are_numbered(tmp_path, change):
    content = clean()
    for number, annotation in enumerate(content["annotations"], 1):
        annotation["id"] = number
    twin = load_index(saved(tmp_path, content, "twin.json"))
    change(content)
    found = load_index(saved(tmp_path, content))
    assert_same(found, twin)
    assert found.notes == {"annotation without an id: numbered from 1 on": 30}


ENCODINGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "byte-order mark": (lambda t: b"\xef\xbb\xbf" + t, "utf-8 with a byte-order mark"),
    "utf-16": (lambda t: t.decode().encode("utf-16"), "utf-16"),
    "utf-16 without a mark": (lambda t: t.decode().encode("utf-16-be"), "utf-16-be"),
    "gzip": (gzip.compress, "compressed by gzip"),
    "gzip of a byte-order mark": (lambda t: gzip.compress(b"\xef\xbb\xbf" + t, mtime=0), "compressed by gzip"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_encodings(tmp_path, encoding):
    encode, words = ENCODINGS[encoding]
    content = clean()
    content["categories"][0]["name"] = "Wölfe"
    twin = load_index(saved(tmp_path, content, "twin.json"))
    path = saved(tmp_path, encode(json.dumps(content, ensure_ascii=False).encode()), "instances.json.gz")
    found = load_index(path)
    assert_same(found, twin)
    assert words in ", ".join(found.notes)


def test_a_category_without_a_name_is_called_by_its_id(tmp_path):
    content = clean()
    content["categories"][0]["name"] = 7
    del content["categories"][1]["name"]
    assert load_index(saved(tmp_path, content)).categories == {3: "3", 7: "7"}
    content["categories"][1]["name"] = None
    assert load_index(saved(tmp_path, content)).categories == {3: "3", 7: "7"}


def test_every_key_that_is_not_used_stays(tmp_path):
    """LVIS reads more of them than an index holds."""
    content = clean()
    extra = {"neg_category_ids": [3], "nested": [{"a": [1.5, None, "x"]}], "id": 1.0}
    content["images"][0] |= extra
    content["categories"][0]["frequency"] = "r"
    content["more"] = {"deep": [[]]}
    index = load_index(saved(tmp_path, content))
    assert index.notes == {"image whose id is a decimal number": 1}
    again = json.loads(index.readable.read_bytes())
    assert again["images"][0] == content["images"][0] | {"id": 1}
    assert again == content


def test_ids_that_are_numbered_anew_meet_whatever_their_spelling(tmp_path):
    content = clean(images=3)
    each("images", id=dict(zip([i["id"] for i in content["images"]], ["b", 7, "10"])).get)(content)
    for entry, image in zip(content["annotations"], [7.0, "7", 7, "b", "10", 10, "elsewhere", 10.0]):
        entry["image_id"] = image
    del content["annotations"][8:]
    index = load_index(saved(tmp_path, content))
    assert index.image_id.tolist() == [1, 2, 3]  # "10", "7", "b"
    assert np.diff(index.first).tolist() == [3, 3, 1]
    assert index.annotation_image.tolist() == [1, 1, 1, 2, 2, 2, 3, 4]


# --- against pycocotools ----------------------------------------------------------------------------------------


def quiet_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_pycocotools_reads(tmp_path, spelling):
    content = clean()
    SPELLINGS[spelling][0](content)
    theirs, ours = quiet_coco(path := saved(tmp_path, content)), load_index(path)
    assert ours.image_id.tolist() == sorted(map(int, map(number, theirs.imgs)))
    assert ours.category_id.tolist() == sorted(theirs.cats)
    rows = {number: k for k, number in enumerate(ours.annotation_id.tolist())}
    assert sorted(rows) == sorted(map(int, theirs.anns))
    for annotation in theirs.anns.values():
        k = rows[int(annotation["id"])]
        assert ours.annotation_image[k] == int(number(annotation["image_id"]))
        assert ours.annotation_category[k] == int(number(annotation["category_id"]))
        assert ours.area[k] == number(annotation["area"])
        assert ours.crowd[k] == bool(number(annotation["iscrowd"]) or 0)
        box = json.loads(annotation["bbox"]) if isinstance(annotation["bbox"], str) else annotation["bbox"]
        assert ours.bbox[k].tolist() == list(map(number, box))


def detections(content: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Many equal scores, whose order is that of the images."""
    rng = np.random.default_rng(seed)
    found = []
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        for _ in range(3):
            box = (np.array([x, y, w, h]) + rng.normal(0, 1.5, 4)).clip(0.5).tolist()
            score = float(rng.integers(1, 4)) / 4
            found.append({key: annotation[key] for key in ("image_id", "category_id")} | {"bbox": box, "score": score})
    return found


def their_ap(path: Path, results: list[dict[str, Any]]) -> float:
    truth = quiet_coco(path)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_ap_of_a_file_with_uuids_is_pycocotools_own_under_our_numbers(tmp_path):
    content = clean(images=9, objects=60)
    results = detections(content)
    rng = np.random.default_rng(5)
    names = {image["id"]: str(uuid.UUID(bytes=rng.bytes(16))) for image in content["images"]}
    each("images", id=names.get)(content)
    each("annotations", image_id=names.get)(content)
    path = saved(tmp_path, content)
    index = load_index(path)
    numbers = {name: n for n, name in enumerate(sorted(names.values()), 1)}
    assert index.image_id.tolist() == list(range(1, 10))
    for image in content["images"]:
        assert index.file_name[numbers[image["id"]] - 1] == image["file_name"]
    theirs = [result | {"image_id": names[result["image_id"]]} for result in results]
    ours = [result | {"image_id": numbers[names[result["image_id"]]]} for result in results]
    expected = their_ap(path, theirs)
    assert 5 < expected < 95
    for evaluator in ("hotcoco", "pycocotools"):
        assert evaluate_coco(path, ours, ("bbox",), evaluator=evaluator)["bbox"]["AP"] == pytest.approx(
            expected, abs=1e-12
        )
    assert their_ap(index.readable, ours) == expected  # the copy is a file for everybody
    each("annotations", id=lambda n: f"object {n}")(content)  # which pycocotools does not match with
    found = evaluate_coco(saved(tmp_path, content), ours, ("bbox",))["bbox"]["AP"]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_ap_of_a_spelling_is_that_of_its_clean_twin(tmp_path, spelling):
    content = clean(3)
    results = detections(content)
    expected = evaluate_coco(saved(tmp_path, content, "twin.json"), results, ("bbox",))["bbox"]
    SPELLINGS[spelling][0](content)
    found = evaluate_coco(saved(tmp_path, content), results, ("bbox",))["bbox"]
    assert {k: v for k, v in found.items() if v == v} == {k: v for k, v in expected.items() if v == v}
    assert found.keys() == expected.keys()
    assert 5 < expected["AP"] < 95


def test_a_part_of_such_a_file(tmp_path):
    content = clean()
    together(each("images", id=str), each("annotations", image_id=str))(content)
    part = json.loads(part_of(saved(tmp_path, content), "50pct_seed0", "odd_train@50pct_seed0").read_bytes())
    whole = json.loads(
        part_of(saved(tmp_path, clean(), "twin.json"), "50pct_seed0", "twin_train@50pct_seed0").read_bytes()
    )
    assert part == whole


# --- what cannot be read ----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "three numbers": (
        lambda c: [a.update(bbox=[1, 2, 3]) for a in c["annotations"][4:9]],
        ["5 x annotation whose bbox", "(id 496) with [1, 2, 3]"],
    ),
    "no box": (without("annotations", "bbox", "segmentation"), ["30 x annotation whose bbox", "has none"]),
    "an infinite box": (lambda c: c["annotations"][0].update(bbox=[0, 0, math.inf, 1]), ["1 x", "(id 500)"]),
    "a number too large": (lambda c: c["annotations"][0].update(bbox=[0, 0, 10**400, 1]), ["1 x", "(id 500)"]),
    "a broken width": (lambda c: c["images"][1].update(width=80.5), ["1 x image whose width", "80.5"]),
    "no height": (without("images", "height"), ["6 x image whose height is not a whole number"]),
    "no id": (lambda c: c["annotations"][0].pop("id"), ["1 x annotation whose id", "has none"]),
    "null for an id": (lambda c: c["images"][0].update(id=None), ["1 x image whose id", "None"]),
    "true for an id": (lambda c: c["images"][0].update(id=True), ["1 x image whose id", "True"]),
    "a list for an id": (lambda c: c["categories"][0].update(id=[7]), ["1 x category whose id", "[7]"]),
    "a name for a category": (
        lambda c: [a.update(category_id="cat") for a in c["annotations"]],
        ["30 x annotation whose category_id is not a whole number", "'cat'"],
    ),
    "maybe a crowd": (lambda c: c["annotations"][2].update(iscrowd="maybe"), ["iscrowd is not 0 or 1", "'maybe'"]),
    "a list for a name": (lambda c: c["images"][0].update(file_name=["a.jpg"]), ["file_name is not text"]),
    "two kinds": (
        lambda c: (c["images"][0].update(width="x"), c["annotations"][0].update(bbox=None, segmentation=[])),
        ["1 x image whose width", "1 x annotation whose bbox"],
    ),
    "no categories": (lambda c: c.pop("categories"), ["has no 'categories'"]),
    "an entry that is none": (lambda c: c["annotations"].append(None), ["Expected `object`, got `null`"]),
    "an object of images": (lambda c: c.update(images={}), ["Expected `array`, got `object`"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_one_sentence_for_all_of_a_kind(tmp_path, cache, kind):
    spoil, words = REFUSED[kind]
    content = clean()
    spoil(content)
    with pytest.raises(UserError) as caught:
        load_index(saved(tmp_path, content))
    message = str(caught.value)
    for word in ["instances.json", *words]:
        assert word in message
    assert "\n" not in message
    assert len(message) < 600
    assert not list(cache.glob("*.index"))
    assert not list(cache.glob("*.json"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (gzip.compress(b"x" * 1000, mtime=0)[:-20], "gzip"),
        (gzip.compress(b'{"images": []}', mtime=0) + b"more", "gzip"),
        (b"\x1f\x8bnothing", "gzip"),
        (b"\xff\xfe{", "utf-16"),
        (b'{"images": [{"id": NaN', "whole JSON"),
        (b'{"a": NaN, "b": "\\ud800", "images": []}', "surrogates"),
        (b'{"images": [], "categories": [{"id": 1, "name": "\\ud800"}]}', "whole JSON"),
        (b'{"images": [], "note": "NaN", "categories": [}', "whole JSON"),
        (b'{"images": [], "categories": [{"id": "x", "name": "\xff"}]}', "UTF-8"),
        (b'{"a": NaN, "b": ' + b"[" * 10**6, "nested too deep"),
    ],
)
def test_broken_texts(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        load_index(saved(tmp_path, text))
    assert "instances.json" in str(caught.value)


def test_a_file_that_unpacks_to_far_more_than_it_is(tmp_path):
    bomb = gzip.compress(b'{"images": [' + b" " * (1 << 28), 1, mtime=0)
    assert len(bomb) < 2 << 20
    with pytest.raises(UserError, match="would unpack to more than"):
        load_index(saved(tmp_path, bomb))


# --- the copy ---------------------------------------------------------------------------------------------------


def odd(seed: int = 0) -> dict[str, Any]:
    content = clean(seed)
    each("images", id=str)(content)
    return content


def test_a_copy_that_is_damaged_or_gone_is_made_again(tmp_path):
    path = saved(tmp_path, odd())
    twin = load_index(saved(tmp_path, clean(), "twin.json"))
    whole = load_index(path).readable.read_bytes()
    for damage in (
        lambda p: p.unlink(),
        lambda p: p.write_bytes(whole.replace(b"7", b"8")),
        lambda p: p.write_bytes(b""),
    ):
        damage(load_index(path).readable)
        index = load_index(path)
        assert_same(index, twin)
        assert index.readable.read_bytes() == whole


def test_a_changed_original_is_read_again(tmp_path):
    path = saved(tmp_path, odd())
    load_index(path)
    saved(tmp_path, odd(1))
    assert_same(load_index(path), load_index(saved(tmp_path, clean(1), "twin.json")))
    saved(tmp_path, clean(2))  # and one that needs no copy
    index = load_index(path)
    assert index.copy is None
    assert index.readable == path
    assert_same(index, load_index(saved(tmp_path, clean(2), "twin.json")))


def test_where_no_copy_can_be_written_it_says_where_else(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="LOCO_DET_CACHE"):
        load_index(saved(tmp_path, odd()))


# --- any bytes --------------------------------------------------------------------------------------------------


def plain_reading(text: bytes) -> dict[str, Any] | None:
    """What a file says by json.loads and loops, if it is written as COCO writes its own; None if it is not."""
    try:
        content = json.loads(text.decode("utf-8"), parse_constant=lambda _: [])
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no UTF-8
        images = sorted(content["images"], key=lambda i: i["id"])
        categories = sorted(content["categories"], key=lambda c: c["id"])
        annotations = content.get("annotations", [])
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None

    def is_whole(*values: Any) -> bool:
        return all(type(v) is int and -(2**63) <= v < 2**63 for v in values)

    def is_number(v: Any) -> bool:
        return type(v) in (int, float) and math.isfinite(v) and abs(v) < 1e300

    sound = (
        all(is_whole(i.get("id"), i.get("height"), i.get("width")) for i in images)
        and all(type(i.get("file_name", "")) is str and not i.get("coco_url") for i in images)
        and all(is_whole(c.get("id")) and type(c.get("name")) is str for c in categories)
        and all(is_whole(a.get("id"), a.get("image_id"), a.get("category_id")) for a in annotations)
        and all(
            type(a.get("bbox")) is list and len(a["bbox"]) == 4 and all(map(is_number, a["bbox"])) for a in annotations
        )
        and all(is_number(a.get("area", 0)) and type(a.get("iscrowd", 0)) in (int, bool) for a in annotations)
    )
    if not sound:
        return None
    listed = {i["id"] for i in images}
    order = [a for i in listed and sorted(listed) for a in annotations if a["image_id"] == i]
    order += [a for a in annotations if a["image_id"] not in listed]
    return {
        "image_id": [i["id"] for i in images],
        "annotation_id": [a["id"] for a in order],
        "bbox": [[float(v) for v in a["bbox"]] for a in order],
        "crowd": [bool(a.get("iscrowd", 0)) for a in order],
        "categories": [c["name"] for c in categories],
        "segmentations": [a.get("segmentation", "missing") for a in order],
    }


SMALL = json.dumps(clean(images=2, objects=3)).encode()
PIECES = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"NaN",
    b"-",
    b".",
    b"e9",
    b"null",
    b"true",
    b"1e999",
    b"\\ud800",
    b"\xff",
]


def read(text: bytes) -> tuple[Content, list[bytes]]:
    """As an index is made, without its cache; and all segmentations."""
    try:
        content = parse(text)
    except MALFORMED:
        text, _ = rewritten(text, Path("instances.json"))
        content = parse(text)
    places = zip(*(content.columns[f"segmentation_{what}"].tolist() for what in ("start", "length")))
    return content, [text[start : start + length] for start, length in places]


def assert_read_as(text: bytes, expected: dict[str, Any]) -> None:
    content, texts = read(text)
    for name in ("image_id", "annotation_id", "bbox", "crowd"):
        assert content.columns[name].tolist() == expected[name]
    assert list(content.category_names) == expected["categories"]
    found = [json.loads(t, parse_constant=lambda _: []) if t else "missing" for t in texts]
    assert [e if f is None else f for f, e in zip(found, expected["segmentations"])] == expected["segmentations"]


@settings(max_examples=700, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SMALL) - 1),
            st.integers(0, 12),
            st.one_of(st.sampled_from(PIECES), st.binary(max_size=3)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_bytes_are_refused_or_read_as_json_and_loops_read_them(edits):
    text = SMALL
    for at, cut, piece in edits:
        text = text[:at] + piece + text[at + cut :]
    if expected := plain_reading(text):
        assert_read_as(text, expected)
        return
    with contextlib.suppress(UserError):
        read(text)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.just("7"),
    st.just([]),
    st.just({}),
)


KEYS = (
    *("id", "height", "width", "file_name", "coco_url", "name", "image_id", "category_id", "bbox", "area"),
    *("iscrowd", "ignore", "difficult", "segmentation"),
)


@settings(max_examples=700, deadline=None, derandomize=True)
@given(st.sampled_from(["images", "categories", "annotations"]), st.sampled_from(KEYS), VALUES)
def test_any_value_anywhere_is_read_or_refused(table, key, value):
    content = clean(images=2, objects=3)
    content[table][0][key] = value
    with contextlib.suppress(UserError):
        found, texts = read(json.dumps(content).encode())
        assert (len(found.columns["image_id"]), len(found.columns["annotation_id"])) == (2, 3)
        for text in texts:
            json.loads(text)
