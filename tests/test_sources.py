"""Sources give the same images and labels whichever way they are packed, and refuse what holds none."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

import numpy as np
import pytest

from loco_det.core.errors import UserError
from loco_det.images.folders import ZipSource, open_source
from loco_det.images.packed import PackedStrings
from loco_det.images.source import Source

FILES = [
    "dog/b.jpg",
    "dog/a.JPEG",
    "dog/more/z.png",
    "dog/m.webp",
    "cat 2/ä.jpg",
    "cat 2/x.jpg",
    "Zebra/1.bmp",
    "cat/0.jpg",
]


def contents(name: str) -> bytes:
    return f"not decoded here: {name}".encode() * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents(name))
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "dog" / "._b.jpg").write_text("resource fork")
    return root


def packed(folder: Path, target: Path, prefix: str = "", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(target, "w", method) as archive:
        for name in FILES:
            archive.write(folder / name, prefix + name)
        archive.writestr(prefix + "readme.txt", "no image")
        archive.writestr("__MACOSX/" + FILES[0], "resource fork")
    return target


def listing(source: Source) -> dict[str, tuple[bytes, str | None]]:
    """Name below the data's root -> (bytes, class name)."""
    return {
        next(name for name in FILES if source.name(i).replace("!", "/").endswith("/" + name)): (
            source.read(i),
            None if source.label(i) is None else source.classes[source.label(i)],
        )
        for i in range(len(source))
    }


EXPECTED = {name: (contents(name), name.split("/")[0]) for name in FILES}
UNLABELLED = {name: (contents(name), None) for name in FILES}


@pytest.mark.parametrize("format", ["auto", "folder"])
def test_class_folders_come_in_torchvisions_order(folder, format):
    from torchvision.datasets import ImageFolder  # here, as every spawned process below imports this file

    source, reference = open_source(folder, format), ImageFolder(folder)
    samples = [sample for sample in reference.samples if not Path(sample[0]).name.startswith(".")]
    assert source.classes == reference.classes
    assert [(source.name(i), source.label(i)) for i in range(len(source))] == samples
    assert listing(source) == EXPECTED


def test_flat_folder_has_no_labels(folder):
    source = open_source(folder, "flat")
    assert listing(source) == UNLABELLED
    assert source.classes == []


def test_auto_takes_a_folder_with_images_at_its_top_for_flat(folder):
    (folder / "top.jpg").write_bytes(b"x")
    source = open_source(folder)
    assert (len(source), source.classes, source.label(0)) == (len(FILES) + 1, [], None)


def test_text_list(folder, tmp_path):
    path = folder / "train.txt"
    path.write_text("# a comment\n\n" + "\n".join(FILES) + "\n", encoding="utf-8")
    assert listing(open_source(path)) == UNLABELLED
    path.write_text("\n".join(FILES), encoding="utf-8-sig")  # as some editors save it, with a mark in front
    assert listing(open_source(path)) == UNLABELLED
    elsewhere = tmp_path / "absolute.lst"
    elsewhere.write_text("".join(f"{folder / name}\t{name.split('/')[0]}\r\n" for name in FILES), encoding="utf-8")
    assert listing(open_source(elsewhere, "list")) == EXPECTED
    assert open_source(elsewhere, "list").classes == ["Zebra", "cat", "cat 2", "dog"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    ("prefix", "inner"), [("", ""), ("set/train/", ""), ("set/train/", "!set/train"), ("set/", "!set/")]
)
def test_zip(folder, tmp_path, method, prefix, inner):
    path = packed(folder, tmp_path / "set.zip", prefix, method)
    source = open_source(f"{path}{inner}")
    assert listing(source) == EXPECTED
    order = open_source(folder)
    assert [source.name(i).split("!" + prefix)[1] for i in range(len(source))] == [
        os.path.relpath(order.name(i), folder) for i in range(len(order))
    ]
    assert source.classes == order.classes


def test_a_part_of_a_zip(folder, tmp_path):
    path = tmp_path / "both.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "train2", "test"):
            for name in FILES[:3] if split == "test" else FILES:
                archive.write(folder / name, f"{split}/{name}")
    assert open_source(path).classes == ["test", "train", "train2"]
    assert len(open_source(f"{path}!test")) == 3
    assert listing(open_source(f"{path}!train")) == EXPECTED
    assert len(open_source(f"{path}!train/cat")) == 1
    with pytest.raises(UserError, match=r"no images in folder val of this zip"):
        open_source(f"{path}!val")


def test_zip_with_images_at_its_top_has_no_labels(tmp_path):
    path = tmp_path / "flat.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/1.jpg", b"x")
        archive.writestr("set/deeper/2.jpg", b"y")
    source = open_source(path)
    assert (source.classes, source.label(1), source.read(1)) == ([], None, b"y")


def read_all(source: Source) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


def large_zip(path: Path) -> Path:
    """With members larger than a file buffer, so that every read reaches the file."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(8):
            archive.writestr(f"{i}.jpg", rng.bytes(100_000))
    return path


def test_zip_is_read_by_many_processes_at_once(folder, tmp_path):
    source = open_source(packed(folder, tmp_path / "set.zip"))
    expected = read_all(source)
    with get_context("spawn").Pool(2) as pool:
        assert pool.map(read_all, [source] * 4) == [expected] * 4


@pytest.mark.skipif("fork" not in get_all_start_methods(), reason="no fork here")
def test_a_forked_reader_does_not_move_its_parents_file(tmp_path):
    source = open_source(large_zip(tmp_path / "set.zip"))
    expected = read_all(source)
    handle = source._file().fileno()
    os.lseek(handle, 7, os.SEEK_SET)
    context = get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(read_all(source)))  # inherits the open file
    child.start()
    assert results.get() == expected
    child.join()
    assert os.lseek(handle, 0, os.SEEK_CUR) == 7


def test_zip_is_read_by_many_threads_at_once(tmp_path):
    source = open_source(large_zip(tmp_path / "set.zip"))
    expected = read_all(source)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: read_all(source), range(64))) == [expected] * 64


def test_a_source_travels_to_workers(folder, tmp_path):
    for path in (folder, packed(folder, tmp_path / "set.zip")):
        source = open_source(path)
        source.read(0)
        copy = pickle.loads(pickle.dumps(source))
        assert listing(copy) == EXPECTED
        assert copy.classes == source.classes


def test_names_and_labels_take_little_memory_of_their_own():
    names = [f"class_{i % 10}/image_{i:07d}.jpg" for i in range(20000)]
    source = Source("root", names, [name.split("/")[0] for name in names])
    assert len(pickle.dumps(source)) < 60 * len(names)
    assert source.name(19999) == os.path.join("root", names[-1])
    assert source.label(19999) == 9


def test_an_image_larger_than_its_zip_can_hold_is_refused_before_memory_is_taken(folder, tmp_path):
    """Sizes that the index of a zip claims, in its entries' fields at 20 (packed) and 24 (unpacked)."""
    made = packed(folder, tmp_path / "a.zip")
    whole = made.read_bytes()
    for field in (20, 24):
        at = whole.index(b"PK\x01\x02") + field
        made.write_bytes(whole[:at] + b"\xf0\xff\xff\x7f" + whole[at + 4 :])
        with pytest.raises(UserError, match=r"\.\w+ is larger than can be in it"):
            open_source(made)


def test_a_pipe_is_neither_a_zip_nor_an_image_nor_a_list(tmp_path):
    for name in ("a.zip", "a.txt", "b.png"):
        os.mkfifo(tmp_path / name)
    for name in ("a.zip", "a.txt"):
        with pytest.raises(UserError, match=rf"{name}: is no regular file"):
            open_source(tmp_path / name)
    with pytest.raises(UserError, match=r"b\.png: cannot be read \(it is no regular file\)"):
        open_source(tmp_path, "flat").read(0)


def test_damage_inside_a_zip_is_named(folder, tmp_path):
    path = packed(folder, tmp_path / "set.zip", method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    at = data.find(contents("dog/b.jpg"))
    data[at + 5] ^= 0xFF
    path.write_bytes(data)
    source = open_source(path)
    bad = next(i for i in range(len(source)) if source.name(i).endswith("dog/b.jpg"))
    with pytest.raises(UserError, match=r"set\.zip!dog/b\.jpg: damaged inside the zip"):
        source.read(bad)
    assert len(read_all_but(source, bad)) == len(FILES) - 1


def test_damage_inside_a_packed_member_is_named(folder, tmp_path):
    path = packed(folder, tmp_path / "set.zip")
    source = open_source(path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("dog/b.jpg").header_offset
    data[offset + 45 : offset + 60] = b"\xff" * 15
    path.write_bytes(data)
    bad = next(i for i in range(len(source)) if source.name(i).endswith("dog/b.jpg"))
    with pytest.raises(UserError, match=r"set\.zip!dog/b\.jpg: "):
        source.read(bad)


def read_all_but(source: Source, bad: int) -> list[bytes]:
    return [source.read(i) for i in range(len(source)) if i != bad]


def test_an_image_gone_since_is_named(folder):
    source = open_source(folder)
    shutil.rmtree(folder / "cat")
    gone = next(i for i in range(len(source)) if source.name(i).endswith("cat/0.jpg"))
    with pytest.raises(UserError, match=r"cat/0\.jpg: no such image file"):
        source.read(gone)


def refused(path: object, format: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        open_source(path, format)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_a_source(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "text.zip").write_text("this is no zip")
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "latin.txt").write_bytes("ä.jpg".encode("latin-1"))
    (tmp_path / "mixed.txt").write_text("a.jpg\tcat\nb.jpg\n")
    half = packed(folder, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(half[: len(half) // 2])
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.jpg", "x" * 100)

    assert "DATA.PATH is empty" in refused("")
    assert "no such file or folder" in refused(tmp_path / "absent")
    assert "no such file or folder" in refused(f"{tmp_path / 'absent.zip'}!train")
    assert "no images in this folder" in refused(empty)
    assert "notes.pdf is a file" in refused(tmp_path / "notes.pdf")
    assert "is a folder" in refused(folder, "zip")
    assert "is a file" in refused(tmp_path / "text.zip", "folder")
    assert "not a readable zip" in refused(tmp_path / "text.zip")
    assert "not a readable zip" in refused(tmp_path / "half.zip")
    assert "no images in this zip" in refused(tmp_path / "texts.zip")
    assert "odd.zip: a.jpg is encrypted or packed unusually" in refused(tmp_path / "odd.zip")
    assert "lists no images" in refused(tmp_path / "none.txt")
    assert "UTF-8" in refused(tmp_path / "latin.txt")
    assert "b.jpg has no class" in refused(tmp_path / "mixed.txt")
    assert "DATA.FORMAT 'lmdb' is unknown" in refused(folder, "lmdb")
    assert "no .tar in this folder" in refused(folder, "tar")


@pytest.mark.parametrize("between", [" ", ",", ", ", "\t", "   "])
def test_c8_lists_of_other_programs_name_classes_after_a_space_or_comma(tmp_path, between):
    names = ["a b.jpg", "sub.jpg/c.PNG", "d, e.avif"]
    (tmp_path / "list.txt").write_text("".join(f"{name}{between}{k}\n" for k, name in enumerate(names)))
    source = open_source(tmp_path / "list.txt")
    assert [source.name(i) for i in range(3)] == [str(tmp_path / name) for name in names]
    assert [source.classes[source.label(i)] for i in range(3)] == ["0", "1", "2"]


def test_c8_paths_with_spaces_and_commas_are_whole_without_a_class(tmp_path):
    names = ["a.jpg b.jpg", "c.png, d.jpg", "e.jpg"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    source = open_source(tmp_path / "list.txt")
    assert [source.name(i) for i in range(3)] == [str(tmp_path / name) for name in names]
    assert not source.classes


@pytest.mark.parametrize("between", [",", " ", ":", ", "])
def test_c8_several_folders_are_told_how(folder, tmp_path, between):
    shutil.copytree(folder, tmp_path / "more")
    assert "make one folder with links" in refused(f"{folder}{between}{tmp_path / 'more'}")
    assert "make one folder with links" in refused(f"['{folder}'{between}'{tmp_path / 'more'}']")
    assert "correct the path" in refused(f"{folder}{between}{tmp_path / 'none'}")


def test_an_encrypted_zip_is_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "locked.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", "x" * 100)
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag in the member's own header and in the zip's index
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "locked.zip: a.jpg is encrypted" in refused(path)


def test_linked_class_folders_are_followed_and_hidden_ones_are_not(folder, tmp_path):
    shutil.move(folder / "dog", tmp_path / "elsewhere")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "a.jpg").write_bytes(b"x")
    assert listing(open_source(folder)) == EXPECTED


def test_class_folders_asked_for_must_be_class_folders(folder):
    (folder / "unicorn").mkdir()
    assert open_source(folder, "auto").classes == ["Zebra", "cat", "cat 2", "dog"]
    assert "class folder unicorn holds no images" in refused(folder, "folder")
    (folder / "unicorn").rmdir()
    (folder / "top.jpg").write_bytes(b"x")
    assert "top.jpg lies in no class folder" in refused(folder, "folder")


def test_zip64_and_comments(tmp_path):
    """Offsets come from the index whatever stands around the members."""
    path = tmp_path / "prefixed.zip"
    data = bytes(range(256)) * 3
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("a/1.png", "w", force_zip64=True) as member:
            member.write(data)
        archive.comment = b"PK\x03\x04 in a comment"
    path.write_bytes(b"#!/bin/sh\n# self-extracting\n" + path.read_bytes())
    source = open_source(path)
    assert isinstance(source, ZipSource)
    assert source.read(0) == data


def test_packed_names_are_those_that_went_in():
    names = ["", "a.jpg", "ü/日本.png", os.fsdecode(b"not utf-8 \xff.jpg"), "\ud800", ""]
    packed_names = PackedStrings.pack(names)
    assert list(packed_names) == packed_names.tolist() == list(pickle.loads(pickle.dumps(packed_names))) == names
    assert [packed_names[-i] for i in range(1, 7)] == names[::-1]
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            packed_names[beyond]
    assert PackedStrings.pack([]).tolist() == []
