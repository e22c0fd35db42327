"""The annotation index: against json.load for every layout of a file, and a cache that is right or rebuilt."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loco_det.data import index as module
from loco_det.data.index import CocoIndex, cache_folder, load_index
from loco_det.errors import UserError

SQUARE = [10.0, 10, 30, 10, 30.5, 30, 1e1, 30]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(count: int = 60, images: int = 9, seed: int = 0) -> dict[str, Any]:
    """Annotations out of order, with every kind of segmentation, some absent keys and some unlisted images."""
    rng = np.random.default_rng(seed)
    kinds = [
        *([SQUARE], [SQUARE, SQUARE], [[1, 2, 3, 4], SQUARE], [[1, 2, 3, 4]], [[1.5] * 7], [[]], [], [[], SQUARE]),
        *({"size": [9, 9], "counts": 'a"}, {"id": [b'}, {"counts": [40, 41], "size": [9, 9]}, None, "missing", "é}, {"),
    ]
    annotations = []
    for k in rng.permutation(count).tolist():
        kind = kinds[k % len(kinds)]
        annotation = {
            "image_id": int(rng.integers(images + 2)) * 3,
            "bbox": rng.uniform(-5, 50, 4).round(3).tolist(),
            "segmentation": kind,
            "area": float(rng.uniform(0, 99)),
            "iscrowd": int(rng.random() < 0.2),
            "category_id": int(rng.integers(5)),
            "note": 'segmentation": [ "annotations": [',
            "id": k - 3,
        }
        if kind == "missing":
            del annotation["segmentation"], annotation["area"], annotation["iscrowd"]
            annotation["ignore"] = k % 2
            annotation["difficult"] = (k // 2) % 2
        annotations.append(annotation)
    return {
        "info": {"description": "made up"},
        "images": [{"id": 3 * i, "file_name": f"ü/{i}.jpg", "height": 9 + i, "width": 40} for i in range(images)][::-1],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"kind {i}"} for i in (4, 1, 2)],
    }


def saved(folder: Path, written: dict[str, Any], **layout: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(written, **layout))
    os.utime(path, (1e9, 1e9))
    return path


def has_shape(segmentation: Any) -> bool:
    """Detectron2's rule (data/datasets/coco.py): of polygons one has three points or more."""
    if not isinstance(segmentation, list) or not segmentation:
        return True
    return any(len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)


def assert_is(index: CocoIndex, path: Path) -> None:
    """Every number of the file, by loops."""
    truth = json.loads(path.read_text())
    images = sorted(truth["images"], key=lambda i: i["id"])
    assert index.image_id.tolist() == [i["id"] for i in images]
    assert index.height.tolist() == [i["height"] for i in images]
    assert index.width.tolist() == [i["width"] for i in images]
    assert index.file_name.tolist() == [i["file_name"] for i in images] == [index.file_name[i] for i in range(9)]
    assert index.categories == {c["id"]: c["name"] for c in sorted(truth["categories"], key=lambda c: c["id"])}
    listed = [[a for a in truth["annotations"] if a["image_id"] == i["id"]] for i in images]
    strays = [a for a in truth["annotations"] if a["image_id"] not in index.image_id]
    assert strays
    assert index.first.tolist() == np.cumsum([0, *map(len, listed)]).tolist()
    expected = [a for group in listed for a in group] + strays
    assert index.annotation_id.tolist() == [a["id"] for a in expected]
    assert index.annotation_image.tolist() == [a["image_id"] for a in expected]
    assert index.annotation_category.tolist() == [a["category_id"] for a in expected]
    assert index.bbox.tolist() == [a["bbox"] for a in expected]
    np.testing.assert_array_equal(index.area, [a.get("area", np.nan) for a in expected])
    assert index.crowd.tolist() == [bool(a.get("iscrowd", 0)) for a in expected]
    assert index.ignore.tolist() == [bool(a.get("ignore", 0)) for a in expected]
    assert index.difficult.tolist() == [bool(a.get("difficult", 0)) for a in expected]
    assert index.has_shape.tolist() == [has_shape(a.get("segmentation")) for a in expected]
    texts = index.segmentations(slice(None))
    missing = object()
    assert [json.loads(t) if t else missing for t in texts] == [a.get("segmentation", missing) for a in expected]


def spy(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """The calls of a function of the module from now on."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or real(*args))
    return calls


LAYOUTS: dict[str, Callable[[dict], dict]] = {
    "coco": lambda d: d,
    "annotations last": lambda d: {k: d[k] for k in ("categories", "images", "annotations")},
    "annotations first": lambda d: {k: d[k] for k in ("annotations", "categories", "images")},
}


@pytest.mark.parametrize("block", [1, 700, 5000, 1 << 24])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spacing", [{}, {"indent": 3}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_every_number_of_every_layout_whatever_the_blocks(tmp_path, monkeypatch, layout, spacing, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(module, "_TAIL", 600)
    assert_is(load_index(path := saved(tmp_path, LAYOUTS[layout](content()), **spacing)), path)


def several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LARGE", 0)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(module.sys, "platform", "linux")


@pytest.mark.parametrize("block", [900, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_by_several_processes(tmp_path, monkeypatch, layout, block):
    several_processes(monkeypatch)
    monkeypatch.setattr(module, "_BLOCK", block)
    for count in (1, 2, 3, 7):
        path = saved(tmp_path, LAYOUTS[layout](content(count)))
        index = load_index(path)
        assert sorted(index.annotation_id.tolist()) == [k - 3 for k in range(count)]
    assert_is(load_index(path := saved(tmp_path, LAYOUTS[layout](content(200)))), path)
    columns, at_once = spy(monkeypatch, "_columns"), spy(monkeypatch, "_parse_at_once")
    clean = content(200)  # of borders in strings
    clean["annotations"] = [a for a in clean["annotations"] if "}, {" not in json.dumps(a)]
    assert_is(load_index(path := saved(tmp_path, LAYOUTS[layout](clean))), path)
    assert not at_once
    seen = sum(len(annotations) for annotations, *_ in columns)
    assert 1 / 5 < seen / len(clean["annotations"]) < 1 / 2  # by this process, which parses the first of three parts


def test_a_helper_that_dies_costs_nothing_but_time(tmp_path, monkeypatch):
    several_processes(monkeypatch)
    real, parent = module._columns, os.getpid()

    def mortal(*args: Any) -> Any:
        return real(*args) if os.getpid() == parent else os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(module, "_columns", mortal)
    monkeypatch.setattr(module, "_BLOCK", 1000)
    assert_is(load_index(path := saved(tmp_path, content(count=200))), path)


def test_blocks_are_taken_where_they_can_be_and_else_not(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 1500)
    at_once, columns = spy(monkeypatch, "_parse_at_once"), spy(monkeypatch, "_columns")
    plain = content()
    for annotation in plain["annotations"]:
        annotation["note"] = ""
    assert_is(load_index(path := saved(tmp_path, plain)), path)
    assert not at_once
    assert len(columns) > 3
    # A key twice, a list within annotations, and a key in disguise.
    nested = plain | {"annotations": [a | {"more": [{"a": 1}, {"a": [{}, {}]}]} for a in plain["annotations"]]}
    assert_is(load_index(path := saved(tmp_path, nested)), path)
    path.write_text(json.dumps(content(seed=3))[:-1] + ", " + json.dumps(plain)[1:])
    assert_is(load_index(path), path)
    path.write_text(json.dumps(plain).replace('"segmentation"', '"segm\\u0065ntation"', 5))
    assert_is(load_index(path), path)
    path.write_text(json.dumps({"info": {"annotations": [{"id": 1}]}, **plain}))
    assert_is(load_index(path), path)
    assert at_once


def test_a_file_without_annotations_or_images(tmp_path):
    whole = content()
    index = load_index(saved(tmp_path, {k: whole[k] for k in ("images", "categories")}))
    assert (len(index.image_id), len(index.annotation_id), index.first.tolist()) == (9, 0, [0] * 10)
    index = load_index(saved(tmp_path, whole | {"images": []}))
    assert (len(index.image_id), len(index.annotation_id), index.first.tolist()) == (0, 60, [0])
    index = load_index(saved(tmp_path, whole | {"annotations": []}))
    assert len(index.annotation_id) == 0
    assert index.bbox.shape == (0, 4)


@pytest.mark.parametrize("block", [50, 1 << 24])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace('"id": 4, "name"', '"id": "4", "name"'), ["categories[0].id"]),
        (lambda t: t.replace('"bbox": [', '"bbox": ["a", ', 7), ["bbox"]),
        (lambda t: t.replace('"image_id": 3,', f'"image_id": {2**63},'), ["image_id"]),
        (lambda t: t[:-9], ["whole JSON"]),
        (lambda t: t[: len(t) // 2], ["whole JSON"]),
        (lambda t: t + "}", ["whole JSON"]),
        (lambda t: "", ["whole JSON"]),
    ],
)
def test_what_is_wrong_is_told_whatever_the_blocks(tmp_path, monkeypatch, cache, change, words, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    path = tmp_path / "instances.json"
    path.write_text(change(json.dumps(content())))
    with pytest.raises(UserError) as caught:
        load_index(path)
    for word in ["instances.json", *words]:
        assert word in str(caught.value)
    assert not list(cache.glob("*.index"))
    with pytest.raises(UserError, match=r"gone\.json cannot be read"):
        load_index(tmp_path / "gone.json")


# --- the cache --------------------------------------------------------------------------------------------------


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all files had been written a while ago."""
    monkeypatch.setattr(module, "_SETTLED_NS", -(10**18))


def test_a_null_url_is_no_url(tmp_path):
    text = content()
    for image in text["images"]:
        image["coco_url"] = None
    path = saved(tmp_path, text)
    assert_is(load_index(path), path)


def test_a_second_load_reads_the_cache_alone(tmp_path, monkeypatch, cache):
    settle(monkeypatch)
    path = saved(tmp_path, content())
    built = load_index(path)
    assert built.mapped
    assert not built.bbox.flags.writeable
    builds, hashes = spy(monkeypatch, "_build"), spy(monkeypatch, "_sha256")
    again = load_index(path)
    assert_is(again, path)
    assert again.mapped
    assert not builds
    assert not hashes
    assert [p.suffix for p in sorted(cache.iterdir())] == [".index", ".lock"]


def test_mapped_and_in_memory_are_the_same(tmp_path, monkeypatch):
    path = saved(tmp_path, content())
    mapped, own = load_index(path), module._build(path)
    assert mapped.mapped
    assert not own.mapped
    for name in module._ARRAYS:
        assert getattr(mapped, name).dtype == getattr(own, name).dtype
        np.testing.assert_array_equal(getattr(mapped, name), getattr(own, name))


def test_damage_anywhere_is_found_and_mended(tmp_path, monkeypatch, cache):
    settle(monkeypatch)
    path = saved(tmp_path, content(count=20))
    load_index(path)
    (file,) = cache.glob("*.index")
    whole = file.read_bytes()
    builds = spy(monkeypatch, "_build")
    rng = np.random.default_rng(0)
    for number, at in enumerate([*range(16), len(whole) - 1, *rng.integers(16, len(whole), 30).tolist()], 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        assert_is(load_index(path), path)
        assert len(builds) == number
        assert file.read_bytes()[16:] != b""
    for cut in (0, 1, 8, 12, 15, 16, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert_is(load_index(path), path)
    file.write_bytes(whole + b"\0")
    assert_is(load_index(path), path)
    assert len(builds) == 47 + 10


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"columns": []}', b"long", b"huge"],
    ids=range(8),
)
def test_a_whole_cache_file_of_something_else_is_not_used(tmp_path, monkeypatch, cache, header):
    settle(monkeypatch)
    path = saved(tmp_path, content())
    load_index(path)
    (file,) = cache.glob("*.index")
    count = {b"long": 1 << 20, b"huge": 1 << 80}.get(header)
    if count:
        columns = {name: ["<f8", [count], 0] for name in module._ARRAYS}
        header = json.dumps({"columns": columns, "source": {}, "category_names": []}).encode()
    rest = len(header).to_bytes(4, "little") + header
    file.write_bytes(module._MAGIC + zlib.crc32(rest).to_bytes(4, "little") + rest)
    builds = spy(monkeypatch, "_build")
    assert_is(load_index(path), path)
    assert len(builds) == 1


def test_another_files_or_versions_index_is_not_used(tmp_path, monkeypatch, cache):
    settle(monkeypatch)
    (tmp_path / "other").mkdir()
    path, other = saved(tmp_path, content()), saved(tmp_path / "other", content(seed=1))
    load_index(path)
    (file,) = cache.glob("*.index")
    load_index(other)
    (foreign,) = set(cache.glob("*.index")) - {file}
    file.write_bytes(foreign.read_bytes())
    assert_is(load_index(path), path)
    monkeypatch.setattr(module, "_MAGIC", b"LOCOIDX9")
    builds = spy(monkeypatch, "_build")
    assert_is(load_index(path), path)
    assert len(builds) == 1
    index, names = load_index(path), module._ARRAYS
    monkeypatch.setattr(module, "_ARRAYS", names[:-1])
    module._save(index, file)
    monkeypatch.setattr(module, "_ARRAYS", names)
    assert_is(load_index(path), path)
    assert len(builds) == 2


@pytest.mark.parametrize("settled", [True, False])
def test_stale_even_with_the_same_size_and_time(tmp_path, monkeypatch, settled):
    if settled:
        settle(monkeypatch)
    path = saved(tmp_path, content())
    load_index(path)
    before = path.stat()
    text = path.read_text()
    with open(path, "r+") as file:  # in place: the same inode
        file.write(text.replace('"kind 4"', '"wolf 4"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert load_index(path).categories[4] == "wolf 4"
    saved(tmp_path, content(seed=2))
    assert_is(load_index(path), path)


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path, monkeypatch):
    """The stamp of a file that was just written says nothing."""
    path = saved(tmp_path, content())
    young = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(module, "_stamp", lambda path: module.Stamp(os.stat(path).st_size, young, young, 1))
    load_index(path)
    path.write_text(path.read_text().replace('"kind 4"', '"wolf 4"'))
    assert load_index(path).categories[4] == "wolf 4"


def test_a_touched_or_copied_file_is_known_by_its_hash(tmp_path, monkeypatch):
    path = saved(tmp_path, content())
    load_index(path)
    builds, hashes = spy(monkeypatch, "_build"), spy(monkeypatch, "_sha256")
    text = path.read_bytes()
    path.unlink()
    path.write_bytes(text)
    assert_is(load_index(path), path)
    assert not builds
    settle(monkeypatch)
    load_index(path)  # writes the new stamp down
    count = len(hashes)
    load_index(path)
    assert len(hashes) == count
    assert not builds


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCO_DET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loco_det"
    load_index(saved(tmp_path, content()))
    assert len(list((tmp_path / "xdg" / "loco_det").glob("instances-*.index"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "loco_det"


def test_a_cache_that_cannot_be_written_costs_one_line(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(logging.getLogger("loco_det"), "propagate", True)
    path = saved(tmp_path, content())
    with caplog.at_level("INFO", logger="loco_det"):
        index = load_index(path)
    assert_is(index, path)
    assert not index.mapped
    (line,) = caplog.messages
    assert "LOCO_DET_CACHE" in line
    assert str(path) in line
    assert_is(pickle.loads(pickle.dumps(index)), path)


def in_children(count: int, work: Callable[[int], None]) -> list[int]:
    """`work` in forked processes at the same time; their exit statuses, negative for a signal."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(number)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def test_processes_at_the_same_time_build_once(tmp_path, monkeypatch):
    settle(monkeypatch)
    path, built = saved(tmp_path, content()), tmp_path / "built"
    real = module._build

    def slow(*args: Any) -> CocoIndex:
        with open(built, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return real(*args)

    monkeypatch.setattr(module, "_build", slow)
    assert in_children(4, lambda _: assert_is(load_index(path), path)) == [0] * 4
    assert built.read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_behind(tmp_path, monkeypatch, cache):
    path = saved(tmp_path, content())

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed(_: int) -> None:
        module.os.replace = die  # everything is written but the name
        load_index(path)

    assert in_children(1, killed) == [-signal.SIGKILL]
    assert len(list(cache.glob(".*.tmp"))) == 1
    assert not list(cache.glob("*.index"))
    assert_is(load_index(path), path)
    assert not list(cache.glob(".*.tmp"))


# --- in use -----------------------------------------------------------------------------------------------------


def test_pickled_it_is_a_path(tmp_path):
    path = saved(tmp_path, content(count=500))
    index = load_index(path)
    packed = pickle.dumps(index)
    assert len(packed) < 1000 < index.bbox.nbytes
    assert_is(pickle.loads(packed), path)
    saved(tmp_path, content(count=500, seed=1))
    with pytest.raises(UserError, match=r"instances\.json was changed"):
        pickle.loads(packed)


def test_forked_processes_read_through_what_they_inherit(tmp_path):
    path = saved(tmp_path, content())
    index = load_index(path)
    index.segmentations(slice(0, 1))
    assert in_children(3, lambda _: assert_is(index, path)) == [0] * 3


def test_a_file_changed_in_use_is_not_read_from(tmp_path):
    path = saved(tmp_path, content())
    index = load_index(path)
    index.segmentations(slice(0, 1))
    os.utime(path)  # the same content
    assert_is(index, path)
    with open(path, "r+") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"instances\.json was changed"):
        index.segmentations(slice(0, 1))
    path = saved(tmp_path, content())
    index = load_index(path)
    path.unlink()
    with pytest.raises(UserError, match=r"instances\.json cannot be read"):
        index.segmentations(slice(0, 1))
