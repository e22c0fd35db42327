"""A flipped bit in any file that is read back is detected; the file is remade or refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detection import write_tiny

from loco_det.annotations.converted import derived_file
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import find_dataset
from loco_det.commands import sweep
from loco_det.convert import convert
from loco_det.core.errors import UserError
from loco_det.core.files import cache_folder, read_checked_json, write_checked_json
from loco_det.detection.checkpoint import last_checkpoint
from loco_det.detection.weights import read_weights
from loco_det.images.folders import open_source
from pretrain.checkpoint import latest_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))


def flipped(path: Path, places: int, ends: int = 8, bits: tuple[int, ...] = (0, 6, 7)) -> Iterator[int]:
    """The file with one bit changed, at places spread over it and near both ends; as it was in the end."""
    sound = path.read_bytes()
    spread = np.linspace(0, len(sound) - 1, places).astype(int).tolist()
    for at in sorted({*spread, *range(ends), *range(len(sound) - ends, len(sound))}):
        for bit in bits:
            damaged = bytearray(sound)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            yield at
    path.write_bytes(sound)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused_or_same(read: Callable[[], Any], path: Path, places: int = 100, **more: Any) -> int:
    """How many of the damaged files were refused; every other one must be read as it was written."""
    sound, refused = read(), 0
    for at in flipped(path, places, **more):
        try:
            assert same(read(), sound), f"byte {at} of {path.name} was believed"
        except UserError:
            refused += 1
    return refused


def test_a8_a_flipped_bit_in_a_pretraining_checkpoint(tmp_path: Path) -> None:
    state = {"learner": {"weight": torch.randn(40, 30)}, "optimizer": {"state": [torch.randn(50)]}, "scaler": {}}
    path = save_checkpoint(tmp_path, {**state, "step": 7, "images": 3, "config_hash": "abc"})
    assert refused_or_same(lambda: latest_checkpoint(tmp_path), path) > 100


def test_a8_a_flipped_bit_in_a_detection_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model_0000004.pth"
    torch.save(
        {"model": {"roi_heads.box_head.fc1.weight": torch.randn(40, 30)}, "optimizer": {}, "iteration": 4},
        path,
    )

    def read() -> Any:
        weights = read_weights(path)
        return weights.tensors, weights.state

    assert refused_or_same(read, path) > 100


def test_a8_a_flipped_bit_in_a_pointer_to_the_last_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model_0000004.pth").touch()
    pointer = tmp_path / "last_checkpoint"
    pointer.write_text("model_0000004.pth")
    assert refused_or_same(lambda: last_checkpoint(tmp_path), pointer) > 40


def test_a8_a_flipped_bit_in_a_converted_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(resnet18_tensors(), tmp_path / "r18.pth")
    convert(tmp_path / "r18.pth", tmp_path / "r18.pkl")
    assert (
        refused_or_same(lambda: read_weights(tmp_path / "r18.pkl").tensors, tmp_path / "r18.pkl", 6, ends=1, bits=(6,))
        > 5
    )


def resnet18_tensors() -> dict[str, torch.Tensor]:
    from torchvision.models import resnet18

    return resnet18(num_classes=3).state_dict()


def test_a8_a_flipped_bit_in_a_file_made_from_annotations(tmp_path: Path) -> None:
    made = []

    def make() -> bytes:
        made.append(1)
        return b'{"images": [1, 2, 3]}'

    path = derived_file("some", {"a": 1}, make)
    for changed in (path, path.with_suffix(".sha256")):
        for _ in flipped(changed, 6, ends=2):
            count = len(made)
            assert derived_file("some", {"a": 1}, make).read_bytes() == make()
            made.pop()
            assert len(made) == count + 1
    count = len(made)
    assert derived_file("some", {"a": 1}, make) == path
    assert len(made) == count
    path.with_suffix(".sha256").unlink()  # as an older version left it
    derived_file("some", {"a": 1}, make)
    assert len(made) == count + 1


def test_a8_a_flipped_bit_in_an_index_of_annotations(tmp_path: Path) -> None:
    root = write_tiny(tmp_path / "data")
    annotations = root / "tiny" / "annotations" / "instances_train.json"
    sound = load_index(annotations)
    (file,) = cache_folder().glob("*.index")
    for _ in flipped(file, 40, bits=(6,)):
        index = load_index(annotations)
        assert index.categories == sound.categories
        assert np.array_equal(index.bbox, sound.bbox)
        assert index.segmentations(slice(None)) == sound.segmentations(slice(None))


def test_a8_a_flipped_bit_in_an_index_of_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard(tmp_path / "a.tar", [0, 1, 2])
    sound = names(tmp_path)
    (file,) = (cache_folder() / "shards").glob("*.npz")
    for _ in flipped(file, 80, bits=(6,)):
        assert names(tmp_path) == sound


def names(folder: Path) -> list[tuple[str, bytes]]:
    source = open_source(folder, "tar")
    return [(source.name(i), source.read(i)) for i in range(len(source))]


def shard(path: Path, values: list[int]) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as tar:
        for k, value in enumerate(values):
            data = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(data, "png")
            member = tarfile.TarInfo(f"{k}{value}.png")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))


def replace_keeping_the_time(path: Path, content: bytes) -> None:
    """As `cp -p` and `rsync -t` do: other content of the same size, and the old time of modification."""
    found = path.stat()
    assert len(content) == found.st_size
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_a8_a_shard_changed_with_its_size_and_time_kept(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard(tmp_path / "a.tar", [0, 1, 2])
    names(tmp_path)
    shard(tmp_path / "other.tar", [3, 4, 5])
    other = (tmp_path / "other.tar").read_bytes()
    (tmp_path / "other.tar").unlink()
    replace_keeping_the_time(tmp_path / "a.tar", other)
    assert [name.rpartition("!")[2] for name, _ in names(tmp_path)] == ["03.png", "14.png", "25.png"]


def test_a8_an_annotation_changed_with_its_size_and_time_kept(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    xml = (
        "<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size><object><name>cat</name>"
        "<bndbox><xmin>3</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"
    )
    (tmp_path / "a.xml").write_text(xml)

    def categories() -> list[str]:
        return list(find_dataset(str(tmp_path)).index.categories.values())

    assert categories() == ["cat"]
    replace_keeping_the_time(tmp_path / "a.xml", xml.replace("cat", "dog").encode())
    assert categories() == ["dog"]


def test_a8_a_flipped_bit_in_what_a_sweep_remembers(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    value = {"key": "ab12", "results": {"bbox/AP": 12.25, "segm/AP": None}, "seconds": 3.1, "more": ["é", 1e-9]}
    write_checked_json(path, value)
    assert read_checked_json(path) == value
    for at in flipped(path, 200):
        assert read_checked_json(path) in (None, value), at
    for content in (b"", b"[]", b"[" * 100_000, b'{"sha256": 1}', b"\xff"):
        path.write_bytes(content)
        assert read_checked_json(path) is None
    cell = sweep.Cell("a", 1.0, 0, tmp_path, "ab12", [])
    assert not sweep._is_done(cell)
    write_checked_json(tmp_path / "result.json", value)
    assert sweep._is_done(cell)
    assert sweep._record(cell)["results"] == value["results"]
    for _ in flipped(tmp_path / "result.json", 30):
        assert sweep._record(cell).get("results") in (None, value["results"])
