"""Row E: files that are hostile or absurd cost one sentence, neither memory nor time, and never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_detection import overrides, tiny_cfg, write_tiny

from loco_det.annotations.cityscapes import opened_map
from loco_det.annotations.coco import load_coco
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.annotations.segmentation import decode
from loco_det.cli import main
from loco_det.convert.load import open_tensors
from loco_det.core.config import load_config, read_yaml
from loco_det.core.errors import LONGEST, UserError
from loco_det.core.files import read_regular
from loco_det.core.metrics import JsonLines
from loco_det.detection.checkpoint import last_checkpoint
from loco_det.detection.keys import get_cfg
from loco_det.detection.train import train_net
from loco_det.images.decode import decode_exactly, decode_image, image_size, read_image
from loco_det.images.folders import open_source
from loco_det.report.runs import find_runs, last_scores


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))


# --- pixels ------------------------------------------------------------------------------------------------------


def huge_jpeg() -> bytes:
    """A whole JPEG of 16 x 16 pixels whose header says 20000 x 20000."""
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 30)).save(data, "JPEG")
    at = data.getvalue().index(b"\xff\xc0") + 5
    return data.getvalue()[:at] + struct.pack(">HH", 20000, 20000) + data.getvalue()[at + 4 :]


def huge_png(side: int = 13_300) -> bytes:
    """A PNG of 177 megapixels in a few bytes: its header alone is whole."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data", [huge_jpeg(), huge_png(), huge_png(30_000)], ids=["jpeg", "png", "png-bomb"])
def test_e_the_pixels_of_a_header_are_counted_before_any_is_decoded(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.png").write_bytes(data)

    def opened() -> None:
        with opened_map(tmp_path / "x.png"):
            pass

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reader in (
        lambda: decode_image(data, "x.png"),
        lambda: decode_exactly(data, "x.png", "BGR"),
        lambda: read_image(tmp_path / "x.png", "RGB"),
        lambda: image_size(tmp_path / "x.png"),
        opened,
    ):
        with pytest.raises(UserError, match=r"x\.png: has .*more than 100 megapixels"):
            reader()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10, "KiB"
    monkeypatch.setenv("LOCO_DET_MAX_MEGAPIXELS", "many")
    with pytest.raises(UserError, match="LOCO_DET_MAX_MEGAPIXELS is 'many'; give whole megapixels"):
        decode_image(data, "x.png")


def test_e_the_number_of_pixels_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (1500, 1000)).save(tmp_path / "x.png")
    monkeypatch.setenv("LOCO_DET_MAX_MEGAPIXELS", "1")
    with pytest.raises(UserError, match="1500 x 1000 pixels, more than 1 megapixels"):
        read_image(tmp_path / "x.png", "RGB")
    monkeypatch.setenv("LOCO_DET_MAX_MEGAPIXELS", "2")
    assert read_image(tmp_path / "x.png", "RGB").shape == (1000, 1500, 3)


@pytest.mark.parametrize("command", ["data check", "pretrain", "probe", "predict", "train"])
def test_e_every_command_counts_pixels(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a set with one such image among sound ones; no command needs more memory than for the others."""
    write_tiny(tmp_path)
    folder = tmp_path / "tiny/train"
    (folder / "1.png").write_bytes(huge_png())
    tiny = overrides(OUTPUT_DIR=tmp_path / "run", SOLVER__MAX_ITER=2, SOLVER__STEPS=(1,))
    arguments = {
        "data check": ["data", "check", str(folder), "--workers", "0", "--out", str(tmp_path / "out")],
        "pretrain": [
            *(
                "pretrain",
                "--config-file",
                "configs/pretrain/quickstart.yaml",
                "DATA.PATH",
                str(folder),
                "DEVICE",
                "cpu",
            ),
            *(
                "OUTPUT_DIR",
                str(tmp_path / "run"),
                "DATA.NUM_WORKERS",
                "0",
                "SOLVER.BATCH_SIZE",
                "4",
                "DATA.IMAGE_SIZE",
            ),
            *("32", "SOLVER.EPOCHS", "1", "SOLVER.WARMUP_EPOCHS", "0", "DATA.MAX_BAD_SHARE", "0.0"),
        ],
        "probe": ["probe", "none.pth", "--data", str(folder), "--protocol", "knn"],
        "predict": ["predict", str(folder), "--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "out")],
        "train": [
            *(
                "train",
                "--config-file",
                "configs/coco_loco_r50.yaml",
                "--engine",
                "torchvision",
                "--max-bad-share",
                "0",
            ),
            *tiny,
        ],
    }[command]
    if command == "probe":  # its images are read by the reader of pretraining
        with pytest.raises(UserError, match="more than 100 megapixels"):
            decode_image(open_source(str(folder)).read(0), "1.png")
        return
    if command == "predict":
        config = tmp_path / "c.yaml"
        config.write_text(tiny_cfg(tmp_path / "run").dump())
        train_net(
            tiny_cfg(tmp_path / "w", SOLVER__MAX_ITER=1, SOLVER__STEPS=(), DATASETS__TRAIN=("tiny_val",)),
            engine="torchvision",
        )
        arguments = [*arguments, "--config-file", str(config), "--no-pictures", "--engine", "torchvision"]
        arguments[arguments.index(str(tmp_path / "w.pth"))] = str(tmp_path / "w/model_final.pth")
    if command == "train":
        listed = json.loads((tmp_path / "tiny/annotations/instances_train.json").read_text())
        listed["images"][0].update(width=13_300, height=13_300)
        (tmp_path / "tiny/annotations/instances_train.json").write_text(json.dumps(listed))
    assert main(arguments) == (1 if command == "data check" else 2)
    said = capfd.readouterr()
    assert "1.png: has 13300 x 13300 pixels, more than 100 megapixels" in said.out + said.err
    assert "Traceback" not in said.err


# --- regular files -----------------------------------------------------------------------------------------------


@pytest.fixture
def fifo(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        os.mkfifo(tmp_path / name)
        return tmp_path / name

    return make


def test_e_only_regular_files_are_read(tmp_path: Path, fifo: Callable[[str], Path]) -> None:
    """Where reading would wait for ever, this test would too."""
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    pipe, cut = fifo("pipe"), fifo("pipe.json")
    dataset = Dataset("x", tmp_path, cut)
    with pytest.raises(OSError, match="is no regular file"):
        read_regular(pipe)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    assert read_regular("/proc/self/maps") == b"", "a file that has no size"
    for path, reader in (
        (tmp_path / "zero.png", lambda path: read_image(path, "RGB")),
        (pipe, lambda path: read_image(path, "RGB")),
        (pipe, image_size),
        (pipe, open_tensors),
        (Path("/proc/self/maps"), open_tensors),
        (pipe, read_yaml),
        (cut, load_index),
        (cut, lambda _: load_coco(dataset)),
        (fifo("list.txt"), open_source),
        (fifo("x.zip"), open_source),
        (fifo("x.tar"), open_source),
        (pipe, lambda path: open_source(path, "list")),
        (pipe, lambda path: opened_map(path).__enter__()),
        (pipe, lambda path: load_config(get_cfg(), path)),
    ):
        with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
            reader(path)
    (tmp_path / "c.yaml").write_text(f"_BASE_: {pipe}\n")
    with pytest.raises(UserError, match="does not exist"):
        load_config(get_cfg(), tmp_path / "c.yaml")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/last_checkpoint")
    assert last_checkpoint(tmp_path / "run") is None


def test_e_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "d/a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "d/x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "d/a/y.png")
    (tmp_path / "d/a/up").symlink_to("..")
    (tmp_path / "d/self").symlink_to("self")
    (tmp_path / "d/one").symlink_to("two")
    (tmp_path / "d/two").symlink_to("one")
    assert len(open_source(str(tmp_path / "d"))) == 2


# --- YAML and JSON -----------------------------------------------------------------------------------------------


def test_e_a_base_that_is_named_twice_31_times_over_is_read_once(tmp_path: Path) -> None:
    for k in range(31):
        (tmp_path / f"f{k}.yaml").write_text(f"_BASE_: [f{k + 1}.yaml, ./f{k + 1}.yaml]\n")
    (tmp_path / "f31.yaml").write_text("SEED: 7\n")
    assert load_config(get_cfg(), tmp_path / "f0.yaml")[0].SEED == 7
    for k in range(300):
        (tmp_path / f"g{k}.yaml").write_text(f"_BASE_: g{k + 1}.yaml\n")
    with pytest.raises(UserError, match="is the _BASE_ of more than 100 files"):
        load_config(get_cfg(), tmp_path / "g0.yaml")


MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k}\n  <<: [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MERGES, "aliases expand to more than 200000 values"),
        ("SEED: !!int ''", "'' is not of type int"),
        ("SOLVER: {BASE_LR: !!float ''}", "'' is not of type float"),
        ("SEED: " + ":".join("1" * 100_000), "a number of 199999 characters; write at most 100"),
        ("SOLVER: {BASE_LR: " + ":".join("1" * 1000) + ".5}", "a number of 2001 characters"),
        ("SEED: 0x" + "f" * 5000, "a number of 5002 characters"),
        ("SEED: " + "x" * 5000, "SEED takes a value of type int"),
        ("x" * 1000 + ": 1", "there is no key"),
        ("_BASE_: " + "x" * 5000, "does not exist"),
        ("_BASE_: ~nouser/x.yaml", "does not exist"),
        ('_BASE_: "a\\0b"', "does not exist"),
        ("A: " + "[" * 10_000, "is nested too deeply"),
        ("A: &a [*a]", "an alias refers to the value that contains it"),
        ("SOLVER: {BASE_LR: " + "9" * 99 + "}", None),
    ],
)
def test_e_yaml_that_would_take_memory_or_time(text: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text + "\n")
    if message is None:
        assert load_config(get_cfg(), tmp_path / "c.yaml")[0].SOLVER.BASE_LR > 1e98
        return
    with pytest.raises(UserError, match=message) as raised:
        load_config(get_cfg(), tmp_path / "c.yaml")
    assert len(str(raised.value)) < LONGEST + 10


@pytest.mark.parametrize("name", ["x" * 5000, "~nouser/x.yaml", "a\0b", "/dev/zero"])
def test_e_names_of_no_configuration(name: str) -> None:
    with pytest.raises(UserError, match="There is no configuration file"):
        load_config(get_cfg(), name)
    with pytest.raises(UserError):
        load_config(get_cfg(), "", ["SOLVER.BASE_LR", "9" * 400])
    with pytest.raises(UserError):
        find_dataset(f"./{name}")
    with pytest.raises(UserError):
        open_source(name)


@pytest.mark.parametrize(
    "text",
    ['{"images":' + "[" * 10**6, '{"info":' + '{"a":' * 10**6 + "1" + "}" * 10**6 + "}", "[" * 10**6],
    ids=["lists", "objects", "list"],
)
def test_e_coco_json_nested_a_million_deep(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        load_index(tmp_path / "a.json")
    results = tmp_path / "r.json"
    results.write_text(text)
    write_tiny(tmp_path)
    assert main(["evaluate", str(results), "--data", "tiny_val"]) == 2


@pytest.mark.parametrize("side", [10**6, 65_536])
def test_e_rle_of_a_million_squared_pixels(side: int) -> None:
    rle = json.dumps({"size": [side, side], "counts": [side * side]}).encode()
    with pytest.raises(UserError, match="more than run lengths of 32 bits can count"):
        decode(rle, side, side, "x")
    with pytest.raises(UserError, match="has size"):
        decode(rle, 64, 80, "x")
    with pytest.raises(UserError, match="do not add up"):
        decode(b'{"size": [64, 80], "counts": [1000000000000]}', 64, 80, "x")


# --- files of runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of a detector, with a probe's result beside it."""
    root = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.setenv("DETECTRON2_DATASETS", str(write_tiny(root)))
    patch.setenv("LOCO_DET_CACHE", str(root / "cache"))
    train_net(tiny_cfg(root / "runs/det", SOLVER__MAX_ITER=2, SOLVER__STEPS=(1,)), engine="torchvision")
    patch.undo()
    stages = {"res5": {"top1": 50.0, "top1_interval": [25.0, 75.0]}}
    facts = {"data": {"path": "x", "train_images": 6}, "backbone": {"name": "b", "weights_sha256": "0" * 64}}
    (root / "runs/probe.json").write_text(json.dumps({"stages": stages, "protocol": "knn", "seed": 0, **facts}))
    return root / "runs"


def set_in(file: str, place: list[str], value: object) -> Callable[[Path], None]:
    def change(runs: Path) -> None:
        path = runs / file
        lines = path.read_text().splitlines() if path.name == "metrics.json" else [path.read_text()]
        content = (yaml.unsafe_load if path.suffix == ".yaml" else json.loads)(
            lines[-1] if len(lines) > 1 else lines[0]
        )
        node = content
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        lines[-1] = json.dumps(content)
        path.write_text("\n".join(lines) + "\n")

    return change


def written(file: str, data: bytes) -> Callable[[Path], None]:
    return lambda runs: (runs / file).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("det/run.json", ["datasets"], 3), r"run\.json: is damaged .*datasets"),
        (set_in("det/run.json", ["environment", "packages"], [1]), r"run\.json: is damaged"),
        (set_in("det/run.json", ["weights"], {"sha256": 5}), r"run\.json: is damaged"),
        (set_in("det/run.json", ["seed"], None), r"run\.json: is damaged .*seed"),
        (set_in("det/run.json", ["weights"], {"\ud800": 1}), r"run\.json: is damaged"),
        (set_in("det/run.json", ["datasets"], {"tiny_val": {}}), r"run\.json: is damaged"),
        (set_in("det/config.yaml", ["DATASETS", "TEST"], "tiny_val"), r"config\.yaml: DATASETS\.TEST: is damaged"),
        (set_in("det/config.yaml", ["SEED"], []), r"config\.yaml: SEED: is damaged"),
        (set_in("det/metrics.json", ["bbox/AP"], "high"), r"metrics\.json: line \d: is damaged"),
        (set_in("probe.json", ["stages", "res5", "top1_interval"], ["NaN", 3]), r"probe\.json: is damaged"),
        (set_in("probe.json", ["stages", "res5"], {"miou": 3, "miou_interval": [1, {}]}), r"probe\.json: is damaged"),
        (set_in("probe.json", ["stages", "res5"], {"miou": 3, "by_percent": 3, "top1": "x"}), None),
        (set_in("probe.json", ["backbone", "name"], ["b"]), r"probe\.json: is damaged"),
        (set_in("probe.json", ["seed"], {}), r"probe\.json: is damaged"),
        (written("det/metrics.json", b"\xff\xfe{}\n{}\n"), r"metrics\.json: cannot be read"),
        (written("det/metrics.json", b"[" * 200_000 + b"\n{}\n"), r"metrics\.json: line 1 is no JSON"),
        (written("det/config.yaml", b"\xff"), r"config\.yaml cannot be read"),
        (written("det/run.json", b"[" * 200_000), r"run\.json: is damaged"),
        (written("det/inference/coco_instances_results.json", b"[" * 200_000), None),
        (written("det/inference/coco_instances_results.json", b'[{"image_id": {}}]'), None),
        (written("det/last_checkpoint", b"\xff" * 5000), None),
    ],
)
def test_e_damaged_files_of_a_run_in_a_report(
    change: Callable[[Path], None], message: str | None, trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One sentence, or a report that says what is missing."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trained.parent))
    shutil.copytree(trained, tmp_path / "runs")
    (tmp_path / "runs/det/SHA256SUMS").unlink()  # by which any change is known
    change(tmp_path / "runs")
    if message is not None:
        with pytest.raises(UserError, match=message):
            find_runs([str(tmp_path / "runs/det"), str(tmp_path / "runs/probe.json")])
        return
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--bootstrap", "2"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_e_names_in_report_md_are_text(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(trained.parent))
    name = "<script>alert(1)</script>|`x`[a](javascript:b)"
    arguments = [f"{name}={trained / 'det'}", f"{name}={trained / 'probe.json'}"]
    assert main(["report", *arguments, "--out", str(tmp_path / "out"), "--bootstrap", "2"]) == 0
    for file in ("report.md", "index.html"):
        text = (tmp_path / "out" / file).read_text()
        assert "<script>alert" not in text, file
    text = (tmp_path / "out/report.md").read_text()
    assert "&lt;script>alert(1)&lt;/script>\\|\\`x\\`[a]\\(javascript:b)" in text


@pytest.mark.parametrize(
    "data", [b"\xff\n", b"[" * 200_000 + b"\n", b'{"iteration": "x"}\n', b'{"iteration": []}\n', b"[]\n"]
)
def test_e_a_damaged_metrics_json_neither_stops_a_resumed_run_nor_a_sweep(data: bytes, tmp_path: Path) -> None:
    line = b'{"iteration": 3, "bbox/AP": 1.5}\n'
    (tmp_path / "metrics.json").write_bytes(line + data)
    assert last_scores(tmp_path) in (None, {"bbox/AP": 1.5})
    JsonLines(tmp_path).trim(4)
    assert (tmp_path / "metrics.json").read_bytes() == line


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "..", "\udcff"])
def test_e_a_damaged_last_checkpoint(text: str, tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match="which is gone; write the name"):
        last_checkpoint(tmp_path)


# --- archives ----------------------------------------------------------------------------------------------------


def tar_with(size: bytes) -> bytes:
    """Two images in a tar; the size in the second header is `size`, under a right checksum."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("a.jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 100
            tar.addfile(member, io.BytesIO(bytes(100)))
    header = bytearray(data.getvalue()[1024:1536])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data.getvalue()[:1024] + bytes(header) + data.getvalue()[1536:]


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"zzzzzzzzzzz\0", bytes(12)]
)
def test_e_sizes_in_a_tar_that_cannot_be(size: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_with(size))
    with contextlib.suppress(UserError):
        source = open_source(str(tmp_path / "x.tar"))
        for k in range(len(source)):
            source.read(k)


def test_e_damaged_zips(tmp_path: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(3):
            archive.writestr(f"t/{k}.jpg", bytes(500))
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data.getvalue())
        for place in rng.integers(len(damaged), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        (tmp_path / "x.zip").write_bytes(damaged)
        try:
            source = open_source(str(tmp_path / "x.zip"))
        except UserError:
            continue
        for k in range(len(source)):
            try:
                source.read(k)
            except UserError:
                continue


def test_e_a_member_that_unpacks_to_more_than_any_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCO_DET_MAX_MEGAPIXELS", "1")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(20 << 20))
    with pytest.raises(UserError, match=r"a\.jpg: has 20 MiB, more than an image of 1 megapixels"):
        open_source(str(tmp_path / "x.zip")).read(0)
    (tmp_path / "a.jpg").write_bytes(bytes(20 << 20))
    with pytest.raises(UserError, match=r"a\.jpg: has 20 MiB"):
        read_image(tmp_path / "a.jpg", "RGB")


# --- Pascal VOC by its name --------------------------------------------------------------------------------------

XML = (
    "<annotation><size><width>80</width><height>64</height></size><object><name>cat</name><difficult>{}</difficult><bndbox>"
    "<xmin>1</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>40</ymax></bndbox></object></annotation>"
)
ENTITIES = '<!DOCTYPE a [<!ENTITY a "x">]>' + XML.format("&a;", 30)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (('<?xml version="1.0" encoding="utf-16"?>' + XML.format(0, 30)).encode("utf-16"), None),
        (XML.format("Unspecified", 30).encode(), None),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "unknown encoding"),
        (b'<?xml version="1.0" encoding="ucs-4"?><annotation/>', "encoding"),
        (ENTITIES.encode(), "it declares entities"),
        (XML.format(0, "nan").encode(), "is not finite"),
        (XML.format(0, "1e999").encode(), "is not finite"),
        (XML.format(0, 30).replace("80", "9" * 5000).encode(), "not a Pascal VOC annotation"),
        (b"<a>" * 100_000, "not a Pascal VOC annotation"),
        (b"", "not a Pascal VOC annotation"),
    ],
)
def test_e_xml_of_any_encoding(data: bytes, message: str | None, tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/trainval.txt").write_text("000001\n")
    (root / "Annotations/000001.xml").write_bytes(data)
    if message is None:
        assert find_dataset("voc_2007_trainval").index.bbox.tolist() == [[0, 1, 30, 39]]
        assert not find_dataset("voc_2007_trainval").index.difficult.any()
    else:
        with pytest.raises(UserError, match=message):
            find_dataset("voc_2007_trainval")
    (root / "ImageSets/Main/val.txt").write_bytes(b"\xff\xfe0\0")
    with pytest.raises(UserError, match=r"val\.txt: cannot be read"):
        find_dataset("voc_2007_val")


# --- checkpoints -------------------------------------------------------------------------------------------------

SLOW = """
import io, pickle, resource, sys, torch, zipfile
from pathlib import Path
from loco_det.convert.load import open_tensors
from loco_det.core.errors import UserError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_tensors(Path(sys.argv[1]))
except UserError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def long_names() -> bytes:
    """A megabyte of globals with long names, each asked for once."""
    names = b"".join(b"c" + b"a" * 500 + b"\nB%d\n0" % k for k in range(2000))
    return b"\x80\x02" + names + b"}."


def storage_of_nothing() -> bytes:
    """360 bytes that claim a tensor of 350 million numbers."""
    data = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(1)}}, data)
    whole = data.getvalue()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    entries[name] = entries[name].replace(b"K\x01tq", b"J" + struct.pack("<i", 350_000_000) + b"tq")
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for key, value in entries.items():
            archive.writestr(key, value)
    return out.getvalue()


@pytest.mark.parametrize("make", [long_names, storage_of_nothing])
def test_e_a_small_checkpoint_takes_little_memory(make: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(make())
    command = [sys.executable, "-c", SLOW, str(tmp_path / "x.pkl")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(found.stdout) < 200 << 10, "KiB"
