"""Mutated input for every parser: it is read, or refused in one sentence; nothing else may happen."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import safetensors.torch
import torch
from cityscapes_cases import write_cityscapes
from PIL import Image
from pycocotools import mask as coco_mask
from test_convert_fuzz import PARSERS, PIECES, TENSORS, edited
from test_formats import made
from test_sources_tar import write_shards
from test_voc import write_voc
from tiny_detection import overrides, write_tiny

from campaign.jobs import Bench, reported
from campaign.tally import Tally, guarded, judged
from loco_det.annotations import segmentation
from loco_det.annotations.cityscapes import cityscapes_frames, instances_from_masks, instances_from_polygons
from loco_det.annotations.coco import decode_segmentation, load_coco
from loco_det.annotations.coco_json import parse
from loco_det.annotations.formats.conversion import FORMATS, convert_annotations
from loco_det.annotations.mapper import DetectionMapper, sample_rng
from loco_det.annotations.masks import rasterize
from loco_det.annotations.pixels import read_labels
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.core.config import load_config
from loco_det.core.run_folder import check_sums
from loco_det.detection import keys
from loco_det.detection.precomputed import read_proposals
from loco_det.evaluation.coco import hotcoco_evaluations
from loco_det.evaluation.coco_checks import check_results, read_ground_truth
from loco_det.evaluation.probes.cifar import open_cifar
from loco_det.evaluation.proposals import Proposals, write_proposals
from loco_det.evaluation.results_file import held_types, read_results
from loco_det.images.decode import decode_exactly, decode_image
from loco_det.images.folders import open_source
from pretrain.defaults import get_cfg

Read = Callable[[bytes], object]
ODD = ["null", "[]", "{}", "NaN", "-1", "0", "1e400", "1e-320", '""', "true", "9" * 30, "Infinity", "-0.0", "1e9", "~",
       "18446744073709551616", '"\\ud800"', "\0", "[[[[", "../../x", "%s", "\u00e9", "1_0", "0x10", "2147483648", "&a;",
       "*a", "9" * 5000]  # fmt: skip
WORDS = [*(word.encode() for word in ODD), b"\xff", *PIECES]
_TOKEN = re.compile(rb'"[^"]*"|[-+.\w]+')


def mutated(good: bytes, rng: random.Random) -> bytes:
    """`good` with one to six edits: tokens exchanged, bytes put in and taken out, parts moved, the end cut off."""
    data = good
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at, how = rng.randrange(len(data) + 1), rng.random()
        if how < 0.4:
            found = _TOKEN.search(data, at)
            start, end = found.span() if found else (at, at)
            data = data[:start] + rng.choice(WORDS) + data[end:]
        elif how < 0.7:
            new = rng.choice(PIECES) if rng.random() < 0.3 else rng.randbytes(rng.randint(0, 9))
            data = edited(data, [(rng.random(), new, len(new) if rng.random() < 0.6 else rng.randint(0, 9))])
        elif how < 0.95:
            part = data[at : at + rng.randint(1, 200)]
            to = rng.randrange(len(data) + 1)
            data = data[:to] + part * rng.choice((0, 1, 1, 2, 9)) + data[to + rng.choice((0, len(part))) :]
        else:
            data = data[:at]
    return data


class Fuzzed(NamedTuple):
    """A parser: `begin` makes, in an empty folder, sound inputs and what reads one."""

    count: int  # of inputs in the whole campaign
    begin: Callable[[Path], tuple[list[bytes], Read]]


def fuzz(tally: Tally, bench: Bench, name: str) -> None:
    """Inputs of a parser, each drawn from the seed and its own number."""
    place, cache = bench.work / "fuzz", os.environ["LOCO_DET_CACHE"]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.environ["LOCO_DET_CACHE"] = str(place / "cache")
    begun: list[Any] = []

    def trial(number: int) -> tuple[str, str, bool]:
        if not begun:
            folder = place / f"{os.getpid()}"  # a child that died may have left anything in its own
            folder.mkdir()
            begun.extend(FUZZED[name].begin(folder))
            for good in begun[0]:
                begun[1](good)  # else all below might be refused unread
        rng = random.Random(f"{name} {tally.seed} {number}")
        data = mutated(rng.choice(begun[0]), rng)

        def read() -> None:
            begun[1](data)

        return judged(read)

    guarded(tally, tally.chosen(range(tally.number(FUZZED[name].count, 20))), trial)
    os.environ["LOCO_DET_CACHE"] = cache


class Written(NamedTuple):
    """Puts an input at `path` before it is read."""

    path: Path
    read: Callable[[], object]

    def __call__(self, data: bytes) -> None:
        self.path.write_bytes(data)
        self.read()

    def at(self, make: Callable[[Path], None]) -> None:
        """With something else than a file at the path."""
        good = self.path.read_bytes()
        self.path.unlink()
        try:
            make(self.path)
            self.read()
        finally:
            if self.path.is_dir():
                self.path.rmdir()
            self.path.unlink(missing_ok=True)
            self.path.write_bytes(good)


# --- annotations -------------------------------------------------------------------------------------------------


def _coco(masks: str, folder: Path) -> tuple[list[bytes], Read]:
    root = write_tiny(folder, images=2) / "tiny"
    good = json.loads((root / "annotations" / "instances_val.json").read_text())
    if masks == "bitmask":
        good["annotations"][0]["segmentation"] = _rle(64, 80)
    lenient = {**good, "images": [{**image, "id": str(image["id"])} for image in good["images"]]}
    cfg = load_config(keys.get_cfg(), "configs/coco_loco_r50.yaml", overrides(INPUT__MASK_FORMAT=masks))[0]
    mapper, path = DetectionMapper(cfg, train=True), root / "a.json"

    def read() -> None:
        dataset = load_coco(Dataset("x", root / "val", path), masks=masks)
        for record in dataset:
            for k in range(len(record.boxes)):
                decode_segmentation(record, k)
            mapper(record, sample_rng(0, 0))
        read_ground_truth(path, ("bbox", "segm"))

    return [json.dumps(good).encode(), json.dumps(lenient).encode()], Written(path, read)


def _results(folder: Path) -> tuple[list[bytes], Read]:
    truth = write_tiny(folder, images=2) / "tiny" / "annotations" / "instances_val.json"
    known, path = read_ground_truth(truth, ("bbox", "segm")), folder / "results.json"
    rows = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.5, "bbox": a["bbox"],
         "segmentation": {"size": [64, 80], "counts": "PP12Pd10"}} for a in json.loads(truth.read_text())["annotations"]
    ]  # fmt: skip

    def read() -> None:
        found = read_results(path)
        types = held_types(path, found)
        hotcoco_evaluations(known, check_results(found, known, types, source=path), types)

    return [json.dumps([{**r, "segmentation": _rle(64, 80)} for r in rows]).encode()], Written(path, read)


def _rle(height: int, width: int, compressed: bool = True) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[height // 4 : height // 2, width // 3 :] = 1
    if compressed:
        return {"size": [height, width], "counts": coco_mask.encode(mask)["counts"].decode()}
    flat = mask.reshape(-1, order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [height, width], "counts": np.diff([0, *ends, flat.size]).tolist()}


def _segmentation(_: Path) -> tuple[list[bytes], Read]:
    seeds = [
        _rle(12, 16),
        _rle(12, 16, compressed=False),
        [[1, 1, 9.5, 2, 9, 9]],
        [[0, 0, 15, 0, 15, 11], [1, 2, 3, 4, 5, 6]],
    ]

    def read(data: bytes) -> None:
        found = segmentation.decode(data, 12, 16, "x")
        segmentation.mask_area(found, 12, 16)
        if isinstance(found, list):
            rasterize(found, 12, 16)
        elif found:
            assert coco_mask.decode(found).shape == (12, 16)

    return [json.dumps(seed).encode() for seed in seeds], read


def _format(kind: str, folder: Path, file: str = "") -> tuple[list[bytes], Read]:
    path = made(folder, kind)
    path = folder / file if file else path

    def read() -> None:
        converted = convert_annotations(folder, kind)
        for content in converted.splits.values():
            parse(msgspec.json.encode(content))

    return [path.read_bytes()], Written(path, read)


def _voc_devkit(folder: Path) -> tuple[list[bytes], Read]:
    os.environ["DETECTRON2_DATASETS"] = str(folder)
    (name, *_) = write_voc(folder, "2007", "val", count=2)
    path = folder / "VOC2007" / "Annotations" / f"{name}.xml"
    return [path.read_bytes()], Written(path, lambda: len(find_dataset("voc_2007_val").index.bbox))


def _cityscapes(kind: str, folder: Path) -> tuple[list[bytes], Read]:
    root = write_cityscapes(folder, images=1)
    frame = cityscapes_frames(root, "val")[0]
    if kind == "polygons":
        path, read = frame.polygons, lambda: instances_from_polygons(frame)
    elif kind == "instances":
        path, read = frame.instances, lambda: instances_from_masks(frame)
    else:
        path, read = next(root.glob("gtFine/val/*/*_labelIds.png")), lambda: read_labels(path)
    return [path.read_bytes()], Written(path, read)


def _name(folder: Path) -> tuple[list[bytes], Read]:
    os.environ["DETECTRON2_DATASETS"] = str(write_tiny(folder, images=1))
    os.environ["HOME"] = str(folder)  # what ~ is, so that nobody's own files are walked
    made(folder / "v", "voc")
    seeds = ["tiny_val", "tiny_train@10pct_seed0", "tiny_train@5shot_seed1", f"{folder}/v@all@10pct_seed0",
             f"{folder}/tiny/annotations/instances_val.json@{folder}/tiny/val"]  # fmt: skip

    def read(data: bytes) -> object:
        name = data.decode(errors="surrogateescape")
        if Path(os.path.abspath(name.partition("@")[0].partition("\0")[0])) in folder.parents:
            return None  # a name cut off so early that it is the whole disk, which takes long to walk
        return find_dataset(name).images

    return [s.encode() for s in seeds], read


# --- configurations, checkpoints, runs ---------------------------------------------------------------------------


def _config(detection: bool, folder: Path) -> tuple[list[bytes], Read]:
    defaults = keys.get_cfg() if detection else get_cfg()
    files = [*Path("configs").glob("*.yaml")] if detection else [Path("configs/pretrain/loco_r18_cifar.yaml")]
    path = folder / "a.yaml"
    texts = [re.sub(rb"(?m)^(#.*|_BASE_.*)\n", b"", file.read_bytes()) for file in sorted(files)[:9]]
    return texts, Written(path, lambda: load_config(defaults, path))


def _checkpoint(name: str, folder: Path) -> tuple[list[bytes], Read]:
    safetensors.torch.save_file(TENSORS, folder / "s.safetensors")  # of the index
    parser, path = PARSERS[name], folder / PARSERS[name].name

    class Wrapped(Written):
        def __call__(self, data: bytes) -> None:
            super().__call__(parser.file(data))

    return [parser.good], Wrapped(path, lambda: parser.read(path))


def _run(file: str, folder: Path) -> tuple[list[bytes], Read]:
    shutil.copytree(
        folder.parent.parent / "data" / "trained",
        folder / "run",
        ignore=shutil.ignore_patterns("*.pth", "inference", "SHA256SUMS"),
    )
    path = folder / "run" / file
    good = path.read_bytes() if path.exists() else _PROBE
    return [good], Written(path, lambda: reported(folder / "run"))


_PROBE = json.dumps(
    {"protocol": "linear", "recipe": "sweep", "data": {"path": "d/set.zip", "train_images": 50}, "seed": 0,
     "backbone": {"name": "a/backbone.pkl", "source": "loco", "weights_sha256": "ab"}, "features": {"batchnorm": "x"},
     "stages": {s: {"top1": 20.5, "top1_interval": [19.5, 21.5], "by_percent": {}} for s in ("res4", "res5")}}
).encode()  # fmt: skip


def _sums(folder: Path) -> tuple[list[bytes], Read]:
    (folder / "metrics.json").write_text("{}")
    line = b"44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a  metrics.json\n"
    (folder / "SHA256SUMS").write_bytes(line)
    return [line], Written(folder / "SHA256SUMS", lambda: check_sums(folder))


def _proposals(folder: Path) -> tuple[list[bytes], Read]:
    boxes = torch.tensor([[1.0, 2, 30, 40], [3, 4, 9, 9]])
    path = write_proposals(folder, [Proposals(1, boxes, torch.tensor([0.5, 0.25]))])
    return [path.read_bytes()], Written(path, lambda: read_proposals(path))


# --- images ------------------------------------------------------------------------------------------------------


def _pictures() -> list[bytes]:
    rng, found = np.random.default_rng(0), []
    pixels = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    for kind, mode in (("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("GIF", "P"), ("BMP", "RGB"),
                       ("TIFF", "RGB"), ("WEBP", "RGB"), ("PPM", "L"), ("JPEG2000", "RGB")):  # fmt: skip
        file = io.BytesIO()
        pixels.convert(mode).save(file, kind, **({"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"} if kind == "JPEG" else {}))
        found.append(file.getvalue())
    return found


def _image(_: Path) -> tuple[list[bytes], Read]:
    def read(data: bytes) -> None:
        decode_image(data, "x", reduce=2)
        decode_exactly(data, "x", "BGR")

    return _pictures(), read


def _source(kind: str, folder: Path) -> tuple[list[bytes], Read]:
    """A list, a zip, a shard or CIFAR's files: opened, and every image read."""
    path = folder / f"a.{kind}"
    for k, data in enumerate(_pictures()[:2]):
        (folder / f"{k}.png").write_bytes(data)
    if kind == "list":
        path = path.with_suffix(".txt")
        path.write_text("# images\n0.png\tcat\n1.png\tdog\n")
    elif kind == "zip":
        shutil.make_archive(str(folder / "a"), "zip", folder, ".")
    elif kind == "tar":
        path = sorted(write_shards(folder / "shards").glob("*.tar"))[1]
    else:
        path = folder / "cifar-10-batches-bin" / "test_batch.bin"
        path.parent.mkdir()
        for name in ("test_batch.bin", *(f"data_batch_{k}.bin" for k in range(1, 6))):
            (path.parent / name).write_bytes(bytes([3]) + bytes(3072))

    def read() -> None:
        source = (
            open_cifar(str(path.parent), "test")
            if kind == "cifar"
            else open_source(path, "auto" if kind == "zip" else kind)
        )
        for k in range(min(len(source), 3)):
            source.read(k)
            source.name(k), source.label(k)

    if kind == "cifar":
        (path.parent / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    return [path.read_bytes()], Written(path, read)


FUZZED: dict[str, Fuzzed] = {
    **{f"coco, {masks}": Fuzzed(4_000, partial(_coco, masks)) for masks in ("polygon", "bitmask")},
    "segmentation": Fuzzed(600_000, _segmentation),
    "results": Fuzzed(60_000, _results),
    **{kind: Fuzzed(8_000, partial(_format, kind)) for kind in FORMATS},
    "data.yaml": Fuzzed(5_000, partial(_format, "yolo", file="data.yaml")),
    "voc devkit": Fuzzed(2_000, _voc_devkit),
    **{f"cityscapes {kind}": Fuzzed(4_000, partial(_cityscapes, kind)) for kind in ("polygons", "instances", "labels")},
    "data set names": Fuzzed(15_000, _name),
    "detection config": Fuzzed(5_000, partial(_config, True)),
    "pretraining config": Fuzzed(5_000, partial(_config, False)),
    **{f"checkpoint {name}": Fuzzed(8_000, partial(_checkpoint, name)) for name in PARSERS},
    "proposals": Fuzzed(20_000, _proposals),
    "images": Fuzzed(60_000, _image),
    **{f"images in a {kind}": Fuzzed(10_000, partial(_source, kind)) for kind in ("list", "zip", "tar", "cifar")},
    **{file: Fuzzed(2_000, partial(_run, file)) for file in ("metrics.json", "run.json", "config.yaml", "probe.json")},
    "SHA256SUMS": Fuzzed(50_000, _sums),
}
