"""The annotation index: against json.load for every layout of a file, and a cache that is right or rebuilt.

Whether a cache file was rebuilt shows on the disk, under a clock that stands still: with it a rebuilt one
is the same to the last byte.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import pickle
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loco_det.annotations.coco_json import NO_MASK, OTHER, POLYGONS, RLE, TOO_FEW_POINTS
from loco_det.annotations.index import CocoIndex, cache_folder, load_index
from loco_det.core.errors import UserError

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


def shape(segmentation: Any) -> int:
    """What a segmentation is; polygons by Detectron2's rule (data/datasets/coco.py): one has three points or more."""
    if segmentation in (None, []):
        return NO_MASK
    if not isinstance(segmentation, list):
        return RLE if isinstance(segmentation, dict) else OTHER
    return POLYGONS if any(len(p) >= 6 and len(p) % 2 == 0 for p in segmentation) else TOO_FEW_POINTS


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
    assert index.shape.tolist() == [shape(a.get("segmentation")) for a in expected]
    texts = index.segmentations(slice(None))
    missing = object()
    assert [json.loads(t) if t else missing for t in texts] == [a.get("segmentation", missing) for a in expected]


LAYOUTS: dict[str, Callable[[dict], dict]] = {
    "coco": lambda d: d,
    "annotations last": lambda d: {k: d[k] for k in ("categories", "images", "annotations")},
    "annotations first": lambda d: {k: d[k] for k in ("annotations", "categories", "images")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spacing", [{}, {"indent": 3}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_every_number_of_every_layout(tmp_path, layout, spacing):
    assert_is(load_index(path := saved(tmp_path, LAYOUTS[layout](content()), **spacing)), path)


def test_odd_spellings_of_the_same(tmp_path):
    """A list within annotations, a list of their name elsewhere, a key in disguise, all keys twice."""
    plain = content()
    nested = plain | {"annotations": [a | {"more": [{"a": 1}, {"a": [{}, {}]}]} for a in plain["annotations"]]}
    assert_is(load_index(path := saved(tmp_path, nested)), path)
    assert_is(load_index(path := saved(tmp_path, {"info": {"annotations": [{"id": 1}]}, **plain})), path)
    path.write_text(json.dumps(plain).replace('"segmentation"', '"segm\\u0065ntation"', 5))
    assert_is(load_index(path), path)
    path.write_text(json.dumps(content(seed=3))[:-1] + ", " + json.dumps(plain)[1:])  # the last of equal keys counts
    assert_is(load_index(path), path)


def test_a_file_without_annotations_or_images(tmp_path):
    whole = content()
    index = load_index(saved(tmp_path, {k: whole[k] for k in ("images", "categories")}))
    assert (len(index.image_id), len(index.annotation_id), index.first.tolist()) == (9, 0, [0] * 10)
    index = load_index(saved(tmp_path, whole | {"images": []}))
    assert (len(index.image_id), len(index.annotation_id), index.first.tolist()) == (0, 60, [0])
    index = load_index(saved(tmp_path, whole | {"annotations": []}))
    assert len(index.annotation_id) == 0
    assert index.bbox.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace('"bbox": [', '"bbox": ["a", ', 7), ["bbox", "7 x"]),
        (lambda t: t.replace('"image_id": 3,', f'"image_id": {2**63},'), ["image_id", str(2**63)]),
        (lambda t: t[:-9], ["whole JSON"]),
        (lambda t: t[: len(t) // 2], ["whole JSON"]),
        (lambda t: t + "}", ["whole JSON"]),
        (lambda t: "", ["whole JSON"]),
        (lambda t: '{"x":' + "[" * 10**6, ["nested too deep"]),
        (lambda t: t[:-1] + ',"x":' + '{"a":' * 10**6 + "1" + "}" * 10**6 + "}", ["nested too deep"]),
    ],
)
def test_what_is_wrong_is_told(tmp_path, cache, change, words):
    path = tmp_path / "instances.json"
    path.write_text(change(json.dumps(content())))
    with pytest.raises(UserError) as caught:
        load_index(path)
    for word in ["instances.json", *words]:
        assert word in str(caught.value)
    assert not list(cache.glob("*.index"))
    with pytest.raises(UserError, match=r"gone\.json cannot be read"):
        load_index(tmp_path / "gone.json")


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="no regular file"):
            load_index(path)


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch) -> None:
    """The clock stands an hour from now: all files seem to have been written a while ago."""
    now = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: now)


LARGE = 17 << 20  # bytes, from which on a hash is compared only if the stamp is no proof


def large(folder: Path, written: dict[str, Any]) -> Path:
    return saved(folder, {"filling": "x" * LARGE, **written})


def bytes_read() -> int:
    """By this process so far."""
    io = Path("/proc/self/io")
    if not io.is_file():
        pytest.skip("this system does not count what a process reads")
    return int(io.read_text().split()[1])


def test_a_null_url_is_no_url(tmp_path):
    text = content()
    for image in text["images"]:
        image["coco_url"] = None
    path = saved(tmp_path, text)
    assert_is(load_index(path), path)


def test_a_second_load_reads_the_cache_alone(tmp_path, cache, later):
    path = large(tmp_path, content())
    built = load_index(path)
    assert built.mapped
    assert not built.bbox.flags.writeable
    before = bytes_read()
    again = load_index(path)
    assert bytes_read() - before < LARGE // 4
    assert again.mapped
    assert_is(again, path)
    assert [p.suffix for p in sorted(cache.iterdir())] == [".index", ".lock"]


def test_mapped_and_in_memory_are_the_same(tmp_path, monkeypatch):
    path = saved(tmp_path, content())
    mapped = load_index(path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "file" / "cache"))
    own = load_index(path)
    assert (mapped.mapped, own.mapped) == (True, False)
    arrays = {name: value for name, value in vars(mapped).items() if isinstance(value, np.ndarray)}
    assert len(arrays) > 15
    for name, array in arrays.items():
        assert array.dtype == getattr(own, name).dtype
        np.testing.assert_array_equal(array, getattr(own, name))


def test_damage_anywhere_is_found_and_mended(tmp_path, cache, later):
    path = saved(tmp_path, content(count=20))
    load_index(path)
    (file,) = cache.glob("*.index")
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for at in [*range(16), len(whole) - 1, *rng.integers(16, len(whole), 30).tolist()]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1 :])
        assert_is(load_index(path), path)
        assert file.read_bytes() == whole
    for cut in (0, 1, 8, 12, 15, 16, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert_is(load_index(path), path)
        assert file.read_bytes() == whole
    file.write_bytes(whole + b"\0")
    assert_is(load_index(path), path)
    assert file.read_bytes() == whole


def split(whole: bytes) -> tuple[bytes, dict[str, Any], bytes]:
    """Magic number, header and arrays of a cache file."""
    start = 16 + int.from_bytes(whole[12:16], "little")
    return whole[:8], json.loads(whole[16:start]), whole[start:]


def joined(magic: bytes, header: bytes, arrays: bytes) -> bytes:
    header += b" " * (-(len(header) + 16) % 64)
    rest = len(header).to_bytes(4, "little") + header + arrays
    return magic + zlib.crc32(rest).to_bytes(4, "little") + rest


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"columns": []}', b"long", b"huge", b"one column less"],
    ids=range(9),
)
def test_a_whole_cache_file_of_something_else_is_not_used(tmp_path, cache, later, header):
    path = saved(tmp_path, content())
    load_index(path)
    (file,) = cache.glob("*.index")
    whole = file.read_bytes()
    magic, facts, arrays = split(whole)
    assert joined(magic, json.dumps(facts).encode(), arrays) == whole
    if count := {b"long": 1 << 20, b"huge": 1 << 80}.get(header):
        facts["columns"] = {name: ["<f8", [count], 0] for name in facts["columns"]}
        header = json.dumps(facts).encode()
    elif header == b"one column less":
        del facts["columns"]["difficult"]
        header = json.dumps(facts).encode()
    file.write_bytes(joined(magic, header, arrays))
    assert_is(load_index(path), path)
    assert file.read_bytes() == whole


def test_another_files_or_versions_index_is_not_used(tmp_path, cache, later):
    (tmp_path / "other").mkdir()
    path, other = saved(tmp_path, content()), saved(tmp_path / "other", content(seed=1))
    load_index(path)
    (file,) = cache.glob("*.index")
    whole = file.read_bytes()
    load_index(other)
    (foreign,) = set(cache.glob("*.index")) - {file}
    for left in (foreign.read_bytes(), b"LOCOIDX3" + whole[8:]):
        file.write_bytes(left)
        assert_is(load_index(path), path)
        assert file.read_bytes() == whole


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("settled", [True, False])
def test_stale_even_with_the_same_size_and_time(tmp_path, request, settled, size):
    if settled:
        request.getfixturevalue("later")
    path = saved(tmp_path, content()) if size == "small" else large(tmp_path, content())
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


@pytest.mark.parametrize("write", [saved, large])
def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path, monkeypatch, write):
    """The stamp of a file that was just written says nothing."""
    path = write(tmp_path, content())
    young, real = time.time_ns() + 3600 * 10**9, os.fstat

    def one_tick(fd: int) -> SimpleNamespace:
        found = real(fd)
        return SimpleNamespace(
            st_size=found.st_size, st_mode=found.st_mode, st_mtime_ns=young, st_ctime_ns=young, st_ino=1
        )

    monkeypatch.setattr(os, "fstat", one_tick)
    load_index(path)
    path.write_text(path.read_text().replace('"kind 4"', '"wolf 4"'))
    assert load_index(path).categories[4] == "wolf 4"


@pytest.mark.parametrize("write", [saved, large])
def test_writes_through_a_memory_map_are_seen(tmp_path, later, write):
    """The first to a page sets the time of change, those before the page is flushed, half a minute later, do not."""
    path = write(tmp_path, content())
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        at = pages.find(b'"kind 4"') + 1

        def name(text: bytes) -> int:
            pages[at : at + 6] = text
            time.sleep(0.02)  # more than a tick of the clock that stamps files
            return path.stat().st_mtime_ns

        name(b"bear 4")
        if write is large:
            first = name(b"lynx 4")
            with open(path, "rb") as flushed:
                os.fsync(flushed.fileno())
            if name(b"bear 4") == first:
                pytest.skip("this file system does not stamp such writes at all")
        assert load_index(path).categories[4] == "bear 4"
        name(b"wolf 4")
        assert load_index(path).categories[4] == "wolf 4"


def test_a_touched_or_copied_file_is_known_by_its_hash(tmp_path, cache, later):
    path = large(tmp_path, content())
    load_index(path)
    (file,) = cache.glob("*.index")
    magic, facts, arrays = split(file.read_bytes())
    text = path.read_bytes()
    path.unlink()
    path.write_bytes(text)
    os.utime(path, (1e9, 1e9))
    # Arrays that a new reading would replace: only the stamp may be written anew.
    facts["category_names"][0] = "from the cache"
    file.write_bytes(joined(magic, json.dumps(facts).encode(), arrays))
    assert load_index(path).categories[1] == "from the cache"
    before = bytes_read()
    assert load_index(path).categories[1] == "from the cache"
    assert bytes_read() - before < LARGE // 4


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
    path, built, replace = saved(tmp_path, content()), tmp_path / "built", os.replace

    def slow(*args: Any) -> None:
        with open(built, "a") as file:
            file.write("built\n")
        time.sleep(0.3)
        replace(*args)

    monkeypatch.setattr(os, "replace", slow)  # by which a cache file gets its name
    assert in_children(4, lambda _: assert_is(load_index(path), path)) == [0] * 4
    assert built.read_text() == "built\n"


def test_a_killed_builder_leaves_nothing_behind(tmp_path, monkeypatch, cache):
    path = saved(tmp_path, content())

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed(_: int) -> None:
        os.replace = die  # everything is written but the name
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
