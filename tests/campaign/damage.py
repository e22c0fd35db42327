"""Files of every kind that is read back, each with one bit changed: harmless, refused or made again; never believed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from test_damage import same
from test_formats import made
from test_sources_tar import write_shards
from tiny_detection import write_tiny

from campaign.jobs import Bench, reported
from campaign.tally import Tally, guarded, judged
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import find_dataset
from loco_det.backbones.artifact import load_backbone
from loco_det.core.files import cache_folder, write_checked_json
from loco_det.detection.checkpoint import last_checkpoint
from loco_det.detection.feature_cache import FeatureCache
from loco_det.detection.weights import read_weights
from loco_det.evaluation.probes import features
from loco_det.images.folders import open_source
from pretrain.checkpoint import latest_checkpoint

FLIPS = 150  # of each kind in the whole campaign


class Kept(NamedTuple):
    """A file that is written and read back; `read` gives what it is good for, or refuses it."""

    file: Path
    read: Callable[[], Any]


def flip(tally: Tally, bench: Bench, name: str) -> None:
    """One bit of a file changed at a time, all over it and often near its ends, and the file read as it always is."""
    os.environ["LOCO_DET_CACHE"] = str(bench.work / "kept")
    shutil.rmtree(bench.work / "kept", ignore_errors=True)
    kept: list[Any] = []

    def trial(number: int) -> tuple[str, str, bool]:
        if not kept:  # in the child, which may compute
            kept.append(KEPT[name](bench))
            kept.append(kept[0].read())
        at, bit = _place(f"{tally.seed} {number}", kept[0].file.stat().st_size)
        whole = kept[0].file.read_bytes()
        kept[0].file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        found = judged(
            lambda: None if same(kept[0].read(), kept[1]) else f"byte {at}, bit {bit} of {kept[0].file.name}"
        )
        kept[0].file.write_bytes(whole)
        return found

    guarded(tally, tally.chosen(range(tally.number(FLIPS, 10))), trial)
    os.environ["LOCO_DET_CACHE"] = str(bench.work / "cache")


def _place(seed: str, size: int) -> tuple[int, int]:
    rng = random.Random(seed)
    near = rng.choice((None, None, range(min(200, size)), range(max(0, size - 400), size)))
    return rng.choice(near if near else range(size)), rng.randrange(8)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value)) if value.dtype.kind in "biuf" else value.tolist()
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value


def _weights(path: Path) -> Kept:
    def read() -> Any:
        found = read_weights(path)
        return found.tensors, found.state, _plain(found.manifest)

    return Kept(path, read)


def _pretraining(bench: Bench) -> Kept:
    bench.operations("pretrain")
    shutil.copytree(bench.out, bench.work / "kept" / "pretraining")
    (*_, path) = sorted((bench.work / "kept" / "pretraining").glob("checkpoint_*.pth"))
    return Kept(path, lambda: latest_checkpoint(path.parent))


def _trained(bench: Bench, name: str) -> Path:
    shutil.copytree(bench.data / "trained", bench.work / "kept" / "trained")
    return bench.work / "kept" / "trained" / name


def _converted(bench: Bench, name: str) -> Path:
    bench.operations("convert")
    shutil.copytree(bench.out, bench.work / "kept" / "converted")
    return bench.work / "kept" / "converted" / name


def _backbone(bench: Bench) -> Kept:
    path = bench.work / "kept" / "backbone.safetensors"
    path.parent.mkdir()
    shutil.copy(bench.data / "backbone.safetensors", path)
    return Kept(path, lambda: [_plain(part) for part in load_backbone(path)])


def _maps(bench: Bench) -> Kept:
    torch.manual_seed(0)
    x, maps = torch.randn(1, 3, 8, 8), {"res4": torch.randn(1, 8, 4, 4)}
    folder = bench.work / "kept" / "maps"
    folder.mkdir(parents=True)

    def read() -> Any:
        return FeatureCache(folder, "some")(x, lambda _: maps, False)

    read()
    (path,) = folder.iterdir()
    return Kept(path, read)


def _pooled(bench: Bench, suffix: str) -> Kept:
    torch.manual_seed(0)
    path, values = bench.work / "kept" / "res5.npy", torch.randn(20, 8)

    def read() -> Any:
        found = features._read(path, (20, 8))
        return values if found is None else found  # computed again

    features._write(path, values)
    return Kept(path.with_suffix(suffix), read)


def _index(bench: Bench, lenient: bool = False) -> Kept:
    root = write_tiny(bench.work / "kept" / "data")
    file = root / "tiny" / "annotations" / "instances_val.json"
    if lenient:
        content = json.loads(file.read_text())
        content["images"] = [{**image, "id": str(image["id"])} for image in content["images"]]
        file.write_text(json.dumps(content))

    def read() -> Any:
        index = load_index(file)
        return index.categories, _plain(index.bbox), _plain(index.image_id), index.segmentations(slice(None))

    read()
    (path,) = cache_folder().glob("*.json" if lenient else "*.index")
    return Kept(path, read)


def _derived(bench: Bench, suffix: str) -> Kept:
    made(bench.work / "kept" / "voc", "voc")
    dataset = find_dataset(str(bench.work / "kept" / "voc"))

    def read() -> Any:
        return find_dataset(dataset.name).annotations.read_bytes()

    return Kept(dataset.annotations.with_suffix(suffix), read)


def _shards(bench: Bench) -> Kept:
    folder = write_shards(bench.work / "kept" / "shards")

    def read() -> Any:
        source = open_source(folder, "tar")
        return [(source.name(i), source.read(i)) for i in range(len(source))], source.classes

    read()
    (path,) = (cache_folder() / "shards").glob("*.npz")
    return Kept(path, read)


def _cell(bench: Bench) -> Kept:
    from loco_det.commands import sweep

    path = bench.work / "kept" / "cell" / "result.json"
    write_checked_json(path, {"key": "ab12", "results": {"bbox/AP": 12.25}, "seconds": 3.1})
    cell = sweep.Cell("a", 1.0, 0, path.parent, "ab12", [])
    sound = sweep._record(cell)
    return Kept(path, lambda: sweep._record(cell) if sweep._is_done(cell) else sound)  # else it is made again


def _reported(path: Path, place: Path) -> Kept:
    """A file that `report` reads of what lies at `place`."""

    return Kept(path, lambda: reported(place))


def _of_a_run(bench: Bench, name: str) -> Kept:
    path = _trained(bench, name)
    return _reported(path, bench.work / "kept" / "trained")


def _probed(bench: Bench) -> Kept:
    bench.operations("probe")
    path = bench.work / "kept" / "probe.json"
    path.parent.mkdir(exist_ok=True)
    shutil.copy(bench.out / "probe.json", path)
    return _reported(path, path)


def _pointer(bench: Bench) -> Kept:
    path = _trained(bench, "last_checkpoint")
    return Kept(path, lambda: last_checkpoint(path.parent))


KEPT: dict[str, Callable[[Bench], Kept]] = {
    "pretrain checkpoint": _pretraining,
    "train checkpoint": lambda bench: _weights(_trained(bench, "model_final.pth")),
    "last_checkpoint": _pointer,
    "backbone": _backbone,
    "converted pkl": lambda bench: _weights(_converted(bench, "r18.pkl")),
    "feature maps": _maps,
    "probe features": lambda bench: _pooled(bench, ".npy"),
    "probe features' checksum": lambda bench: _pooled(bench, ".json"),
    "index": _index,
    "standard copy": lambda bench: _index(bench, lenient=True),
    "derived annotations": lambda bench: _derived(bench, ".json"),
    "derived checksum": lambda bench: _derived(bench, ".sha256"),
    "shard index": _shards,
    "sweep result": _cell,
    "run.json": lambda bench: _of_a_run(bench, "run.json"),
    "metrics.json": lambda bench: _of_a_run(bench, "metrics.json"),
    "config.yaml": lambda bench: _of_a_run(bench, "config.yaml"),
    "results": lambda bench: _of_a_run(bench, "inference/coco_instances_results.json"),
    "probe.json": _probed,
}
