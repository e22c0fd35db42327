"""Files that were made to do harm: read or refused in one sentence, in seconds and a gigabyte, and nothing runs."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from convert_cases import hostile_files
from PIL import Image

from campaign.fuzz import FUZZED, Written
from campaign.jobs import Bench
from campaign.tally import Tally, guarded, judged
from loco_det.convert import read_backbone_tensors
from loco_det.convert.inspect import inspect

_LAUGHS = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10 if k else "ha"}">' for k in range(12))
_YAML_BOMB = "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9) if k else 'x'}]\n" for k in range(30))
_MEGA = 1 << 20

CONTENTS: dict[str, Callable[[], bytes]] = {
    "empty": bytes,
    "zeros": lambda: bytes(_MEGA),
    "ones": lambda: b"\xff" * _MEGA,
    "open lists": lambda: b"[" * _MEGA,
    "closed lists": lambda: b"[" * 100_000 + b"]" * 100_000,
    "open objects": lambda: b'{"a":' * 200_000,
    "a number of many digits": lambda: b"9" * _MEGA,
    "numbers without end": lambda: b'{"shapes": [' + b"1e999, " * 10_000 + b"-1" + b"0" * 5000 + b"]}",
    "a key ten times": lambda: b'{"images": [], "annotations": [], ' * 10 + b"}" * 10,
    "many keys": lambda: json.dumps({f"k{k}": {} for k in range(100_000)}).encode(),
    "a long line": lambda: b"x" * (10 * _MEGA),
    "many lines": lambda: b"x y\n" * 100_000,
    "halves of surrogates": lambda: b'{"images": "\\ud800", "\\udfff": [{"file_name": "\\ud800"}]}',
    "another encoding": lambda: '\ufeff{"images": []}'.encode("utf-16"),
    "escapes of a terminal": lambda: b"\x1b[2J\x1b]0;title\x07\n",
    "a page of a web server": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "XML that laughs": lambda: f"<!DOCTYPE a [{_LAUGHS}]><annotation>&a11;</annotation>".encode(),
    "XML from elsewhere": lambda: b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
    "XML without a bottom": lambda: b"<a>" * 100_000,
    "XML in UTF-7": lambda: b'<?xml version="1.0" encoding="utf-7"?><annotations>+ADw-</annotations>',
    "YAML of aliases": lambda: _YAML_BOMB.encode(),
    "YAML that calls": lambda: b"names: !!python/object/apply:os.system ['touch /tmp/loco_det_canary']\n",
    "YAML in itself": lambda: b"a: &a [*a]\nnames: *a\n",
    "a packed gigabyte": lambda: gzip.compress(bytes(1 << 28), 9),
    "a zip of zeros": lambda: _zip_of(bytes(1 << 28)),
}


def _zip_of(content: bytes) -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/a.png", content)
    return file.getvalue()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with contextlib.chdir(path.parent) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        socket.socket(socket.AF_UNIX).bind(path.name)


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


PLACES: dict[str, Callable[[Path], None]] = {
    "a pipe": _fifo,
    "a socket": _socket,
    "four terabytes of nothing": _sparse,
    "a folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
    "a link to nothing": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "a link to a process's memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to a process's files": lambda path: path.symlink_to("/proc/self/maps"),
}


def _png(width: int, height: int, data: bytes = b"", more: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _coco(width: int, height: int, shape: Any, **more: Any) -> bytes:
    images = [{"id": 1, "file_name": "1.png", "width": width, "height": height}]
    one = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [1, 1, 5, 5],
        "area": 25,
        "iscrowd": 0,
        "segmentation": shape,
    }
    return json.dumps(
        {"images": images, "annotations": [{**one, **more}], "categories": [{"id": 1, "name": "a"}]}
    ).encode()


_THREE = [0, 0, 9, 0, 9, 9]
_CIRCLE = [v for k in range(200_000) for v in (1e5 * np.cos(k).item(), 1e5 * np.sin(k).item())]
OWN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a PNG of ten gigapixels": ("images", lambda: _png(100_000, 100_000, zlib.compress(bytes(_MEGA)))),
    "a PNG of 2^62 pixels": ("images", lambda: _png(2**31 - 1, 2**31 - 1)),
    "a PNG of no pixels": ("images", lambda: _png(0, 0)),
    "a PNG whose pixels are a bomb": ("images", lambda: _png(10, 10, zlib.compress(bytes(1 << 28)))),
    "a JPEG of four gigapixels": ("images", lambda: _jpeg(65535, 65535)),
    "a JPEG of no height": ("images", lambda: _jpeg(16, 0)),
    "a GIF of any size": ("images", lambda: b"GIF89a\xff\xff\xff\xff\xf0\0\0" + bytes(768) + b",\0\0\0\0\xff\xff"),
    "a BMP upside down": ("images", lambda: b"BM" + struct.pack("<12xIii28x", 40, -(2**31), -(2**31))),
    "a TIFF that leads to itself": ("images", lambda: b"II*\0\x08\0\0\0\x00\0\x08\0\0\0"),
    "a PPM of any size": ("images", lambda: b"P6\n999999999 999999999\n255\n" + bytes(100)),
    "an SVG": ("images", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
    "an RLE of 10^12 pixels": ("segmentation", lambda: b'{"size": [1000000, 1000000], "counts": [1000000000000]}'),
    "an RLE of 2^64 pixels": ("segmentation", lambda: json.dumps({"size": [2**32] * 2, "counts": [2**64]}).encode()),
    "an RLE of negative runs": ("segmentation", lambda: b'{"size": [12, 16], "counts": [-8, 200]}'),
    "an RLE that wraps": ("segmentation", lambda: b'{"size": [12, 16], "counts": [4294967296, 192]}'),
    "an RLE of many runs": ("segmentation", lambda: b'{"size": [12, 16], "counts": [' + b"0," * _MEGA + b"192]}"),
    "a polygon of 200,000 points": ("segmentation", lambda: json.dumps([_CIRCLE]).encode()),
    "a polygon of huge numbers": ("segmentation", lambda: b"[[1e308, -1e308, 1e308, 1e308, -1e308, 0]]"),
    "a million polygons": ("segmentation", lambda: json.dumps([[0, 0, 1, 0, 1, 1]] * 100_000).encode()),
    "COCO of a vast image": ("coco, bitmask", lambda: _coco(10**6, 10**6, {"size": [10**6] * 2, "counts": [10**12]})),
    "COCO of an endless image": ("coco, bitmask", lambda: _coco(2**63 - 1, 2**63 - 1, [_THREE])),
    "COCO with a far box": ("coco, polygon", lambda: _coco(80, 64, [_THREE], bbox=[1e300] * 4)),
    "COCO that leads away": ("coco, polygon", lambda: _coco(80, 64, [_THREE]).replace(b"1.png", b"/dev/zero")),
    "results of a vast mask": ("results", lambda: b'[{"image_id": 1, "category_id": 3, "score": 1, '
                                                   b'"segmentation": {"size": [1000000, 1000000], "counts": "0"}}]'),
    "a list that leads away": ("images in a list", lambda: b"/dev/zero\n/proc/self/mem\n/etc/passwd\n"),
    "YOLO of huge shares": ("yolo", lambda: b"0 1e308 1e308 1e308 1e308\n1 nan inf -inf 0\n" * 1000),
    "data.yaml that leads away": ("data.yaml", lambda: b"train: /\nval: /proc\nnames: [a]\n"),
    "a name of a part of all": ("data set names", lambda: b"tiny_val" + b"@10pct_seed0" * 5000),
    "a name of a long path": ("data set names", lambda: b"./" + b"a/" * 100_000),
}  # fmt: skip


def hostile(tally: Tally, bench: Bench) -> None:
    """Every content and kind of file in the place of each file that is read; files of one format's own; pickles."""
    place, cache = bench.work / "hostile", os.environ["LOCO_DET_CACHE"]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    canary = place / "canary"
    pickles = place / "pickles"
    pickles.mkdir()
    files = hostile_files(pickles, canary)
    trials: list[tuple[str, str]] = [("checkpoint file", file.name) for file in files]
    trials += [(parser, name) for parser in FUZZED for name in (*CONTENTS, *PLACES)] + [("own", name) for name in OWN]
    os.environ["LOCO_DET_CACHE"] = str(place / "cache")
    begun: dict[str, Callable[[bytes], object]] = {}

    def reader(parser: str) -> Callable[[bytes], object]:
        if parser not in begun:
            folder = place / f"{os.getpid()}-{len(begun)}"
            folder.mkdir(parents=True)
            begun[parser] = FUZZED[parser].begin(folder)[1]
        return begun[parser]

    def trial(number: int) -> tuple[str, str, bool]:
        parser, name = trials[number]

        def read() -> str | None:
            if parser == "checkpoint file":
                inspect(pickles / name)
                read_backbone_tensors(pickles / name)
            elif parser == "own":
                reader(OWN[name][0])(OWN[name][1]())
            elif name in CONTENTS:
                reader(parser)(CONTENTS[name]())
            elif isinstance(read_it := reader(parser), Written):
                read_it.at(PLACES[name])
            return "code ran" if canary.exists() or Path("/tmp/loco_det_canary").exists() else None

        outcome, detail, refused = judged(read)
        return outcome, detail and f"{parser}, {name}: {detail}", refused

    step = max(1, round(1 / max(tally.share, 1e-3)))
    guarded(tally, tally.chosen(range(0, len(trials), step)), trial, lambda number: ", ".join(trials[number]))
    os.environ["LOCO_DET_CACHE"] = cache
