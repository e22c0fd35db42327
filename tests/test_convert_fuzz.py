"""Mutated input through every parser: it loads, or is refused in one sentence; nothing else may be raised.

The suite tries a few of a fixed seed for each parser, the long search as many as one likes:

    python tests/test_convert_fuzz.py --examples 100000 [--seed 0] [--parser zip ...]

prints one line for each parser and stops at the first input that anything else happens to, which it keeps.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from convert_cases import detectron_pkl, torch_zip

from loco_det.backbones.artifact import HEADER_KEY, Manifest, Stage, decode_manifest
from loco_det.convert.architecture import Architecture
from loco_det.convert.export import yaml_text
from loco_det.convert.inspect import inspect
from loco_det.convert.load import in_memory, load_tensors, open_tensors
from loco_det.convert.sources import flatten
from loco_det.core.config import read_settings
from loco_det.core.errors import UserError

TENSORS = {"conv1.weight": torch.arange(12.0).reshape(3, 4), "bn1.bias": torch.ones(3)}
ARRAYS = {name: tensor.numpy() for name, tensor in TENSORS.items()}
MANIFEST = Manifest(
    architecture="resnet18",
    depth=18,
    stem="imagenet",
    stages={"stem": Stage(64, 4), "res2": Stage(64, 4)},
    method="loco",
    units=[["stem", "res2"], ["res3", "res3"]],
    config={"SOLVER": {"BASE_LR": 0.1}},
    proof={"image": "x", "float32": {"stem": {"max_abs": 0.0, "relative": 1e-7}}},
)


def saved(**options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": TENSORS, "epoch": 1}, buffer, **options)
    return buffer.getvalue()


def read_all(path: Path) -> None:
    """Every tensor of the file, mapped and read: a wrong view would crash here."""
    for _, tensor in flatten(path, load_tensors(path)):
        tensor.to(torch.complex128).sum()
    for _, tensor in flatten(path, open_tensors(path)):
        in_memory(tensor)
    report(path)


def report(path: Path) -> None:
    """What --inspect prints, as text and as JSON."""
    found = inspect(path)
    assert all(line.isprintable() for line in found.lines())
    json.loads(json.dumps(found.facts(), allow_nan=False))


def artifact(content: bytes) -> bytes:
    """A safetensors file with `content` as our manifest, its quotes and all inside a header that is sound."""
    return safetensors.torch.save(TENSORS, metadata={HEADER_KEY: content.decode("utf-8", "replace")})


def header(content: bytes) -> bytes:
    """A safetensors file with `content` as its header and the right length before it."""
    return struct.pack("<Q", len(content)) + content + DATA[8 + HEADER :]


DATA = safetensors.torch.save(TENSORS)
HEADER = int.from_bytes(DATA[:8], "little")


@dataclass(frozen=True)
class Parser:
    """One parser: a good input, how mutated bytes become a file of `name`, and who reads it."""

    name: str
    good: bytes
    file: Callable[[bytes], bytes] = bytes
    read: Callable[[Path], None] = read_all


INDEX = json.dumps({"metadata": {"total_size": 60}, "weight_map": dict.fromkeys(TENSORS, "s.safetensors")}, indent=1)
with zipfile.ZipFile(io.BytesIO(saved())) as _archive:
    INNER = _archive.read(next(name for name in _archive.namelist() if name.endswith("data.pkl")))
np.savez(_buffer := io.BytesIO(), **ARRAYS)
ARCHIVE = _buffer.getvalue()
PARSERS = {
    "zip": Parser("modern.pth", saved()),
    "pickle in a zip": Parser("inner.pth", INNER, lambda c: torch_zip(c, {"0": bytes(48), "1": bytes(12)})),
    "legacy": Parser("legacy.pth", saved(_use_new_zipfile_serialization=False)),
    "pickle 2": Parser("arrays.pkl", pickle.dumps({"model": ARRAYS}, protocol=2)),
    "pickle 5": Parser("arrays.pkl", pickle.dumps({"model": ARRAYS}, protocol=5)),
    "python 2": Parser("R-50.pkl", detectron_pkl(TENSORS, "MODEL: {}")),
    "npz": Parser("w.npz", ARCHIVE),
    "safetensors": Parser("w.safetensors", DATA),
    "safetensors header": Parser("w.safetensors", DATA[8 : 8 + HEADER].rstrip(), header),
    "index": Parser("model.safetensors.index.json", INDEX.encode()),
    "manifest": Parser("backbone.safetensors", msgspec.json.encode(MANIFEST), artifact, report),
    "yaml": Parser(
        "weights.yaml", yaml_text(Path("weights.pkl"), MANIFEST, Architecture(18)).encode(), bytes, read_settings
    ),
}


def outcome(folder: Path, parser: Parser, content: bytes) -> bool:
    """Whether `content` is taken; anything raised but a UserError is a failure of the test."""
    path = folder / parser.name
    path.write_bytes(parser.file(content))
    try:
        parser.read(path)
    except UserError as error:
        return "\n" in str(error)  # a refusal is one sentence
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where inputs are written; the index's one shard lies there."""
    folder = tmp_path_factory.mktemp("fuzz")
    safetensors.torch.save_file(TENSORS, folder / "s.safetensors")
    return folder


@pytest.mark.parametrize("name", PARSERS)
def test_the_unchanged_input_is_taken(tmp_path: Path, name: str) -> None:
    """Without this the tests below could pass on parsers that refuse everything."""
    safetensors.torch.save_file(TENSORS, tmp_path / "s.safetensors")
    assert outcome(tmp_path, PARSERS[name], PARSERS[name].good)


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in ("yaml", "manifest", "index")])
def test_truncated(tmp_path: Path, name: str) -> None:
    """At some 200 places all over the file, and at each of its last bytes."""
    parser = PARSERS[name]
    size = len(parser.good)
    cuts = {*range(0, size, 1 + size // 200), *range(size - 40, size)}
    taken = [cut for cut in sorted(cuts) if outcome(tmp_path, parser, parser.good[:cut])]
    assert not taken


@pytest.mark.parametrize("name", ["yaml", "manifest", "index"])
def test_truncated_text(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "s.safetensors")
    for cut in range(0, len(PARSERS[name].good), 3):
        outcome(tmp_path, PARSERS[name], PARSERS[name].good[:cut])


TEXT = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"null", b"NaN", b"1e999", b"-1", b"&a ", b"*a", b"!!", b"\n", b"  "]
CODES = [b"\x80", b"(", b")", b"R", b"b", b"h\x00", b"q\x00", b"}", b"\x93", b"\x8e", b"\x8a\x09", b".", b"0", b"2"]
NUMBERS = [b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"18446744073709551615"]
PIECES = TEXT + CODES + NUMBERS


def edited(content: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    """`content` with a few bytes put in and taken out at several places."""
    for place, new, removed in edits:
        at = int(place * len(content))
        content = content[:at] + new + content[at + removed :]
    return content


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_input_is_taken_or_refused(folder: Path, name: str) -> None:
    search(name, 60, 0, folder)


def test_a_manifest_of_any_text(folder: Path) -> None:
    for text in ("", "null", "[]", "{}", '{"format": 1}', '{"format": 1e999}', "[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(UserError):
            decode_manifest(text, "b.safetensors")


def search(name: str, examples: int, seed: int, folder: Path) -> str:
    """Run one parser on many inputs; return how many were accepted and the slowest time."""
    parser, random, taken, slowest = PARSERS[name], Random(f"{name} {seed}"), 0, 0.0
    started = time.monotonic()
    for number in range(examples):
        edits = []
        for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
            new = random.choice(PIECES) if random.random() < 0.5 else random.randbytes(random.randint(0, 9))
            overwritten = len(new) if random.random() < 0.6 else random.randint(0, 9)
            edits.append((random.random(), new, overwritten))
        content, before = edited(parser.good, edits), time.process_time()  # however busy the machine is
        try:
            taken += outcome(folder, parser, content)
        except BaseException:
            Path("fuzz-failure.bin").write_bytes(parser.file(content))
            print(f"{name}: input {number} of seed {seed} is kept in fuzz-failure.bin")
            raise
        slowest = max(slowest, time.process_time() - before)
    seconds = time.monotonic() - started
    return f"{name}: {examples} inputs, {taken} taken, slowest {slowest:.2f} s, {seconds:.0f} s in all"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--examples", type=int, default=100_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--parser", nargs="*", choices=PARSERS, default=list(PARSERS))
    given_arguments = arguments.parse_args()
    with TemporaryDirectory() as place:
        safetensors.torch.save_file(TENSORS, Path(place) / "s.safetensors")
        for parser_name in given_arguments.parser:
            print(search(parser_name, given_arguments.examples, given_arguments.seed, Path(place)), flush=True)
