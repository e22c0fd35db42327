"""Reads a weights file of any usual kind as plain data and tensors, and never runs what is in it.

zip, legacy torch and pickle files go through the restricted reader in `unpickle`, safetensors through safetensors.
The kind is told from the content, not from the name. Tensors are views of the mapped file: what is not looked at is
not read, and nothing is larger than the file.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loco_det.convert.builders import Array, Refused, StorageRef, TensorView, finished, storage_dtype
from loco_det.convert.unpickle import MALFORMED, read_pickle
from loco_det.errors import UserError

MAX_DEPTH = 64
MAX_HEADER = 25 * 2**20
MAX_SENTENCE = 300
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_OTHER_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch it with git lfs pull",
    b"\x1f\x8b": "is gzip-compressed; decompress it first",
    b"<": "is a web page; download the weights themselves",
    b"\x89HDF": "is an HDF5 file; export it as PyTorch or safetensors weights",
}
Resolver = Callable[[TensorView], Tensor]


def load_tensors(path: str | Path) -> dict[str, Any]:
    """The whole content of a weights file: nested dicts, lists and tuples of tensors, numbers and strings.

    Tensors are CPU tensors of the stored dtype that share the file's pages; treat them as read-only. Settings
    objects of known libraries are left out (None in their place). A safetensors file is one flat dict, and so are
    the files together that a `*.index.json` names.

    Raises:
        UserError: missing, damaged, of no known kind, or asking for anything but plain data.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            if not start:
                raise UserError(f"{path}: is empty; take an intact copy")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable pages, never the file itself
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); give a weights file that exists") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in damaged text: the file is read or refused either way
            loaded = _reader(path, start)(path, data)
    except Refused as error:
        sentence = f"{path}: {error}"[:MAX_SENTENCE]
        raise UserError(f"{sentence}; nothing was run, save the tensors alone and convert those") from error
    except (*MALFORMED, RuntimeError, SafetensorError, zipfile.BadZipFile) as error:
        reason = " ".join(f"{error}".split())[:MAX_SENTENCE] or type(error).__name__
        raise UserError(f"{path}: is damaged or incomplete ({reason}); take an intact copy") from error
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise UserError(f"{path}: holds a {kind}, not a dictionary of tensors; save the model's state_dict()")
    return loaded


def _reader(path: Path, start: bytes) -> Callable[[Path, mmap.mmap], Any]:
    if start.startswith(b"PK\x03\x04"):
        return _read_zip
    if start.startswith(_LEGACY_START):
        return _read_legacy
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return _read_safetensors
    if start.lstrip().startswith(b"{") and path.name.endswith(".index.json"):
        return _read_index
    if start[0] == 0x80 or path.suffix in (".pkl", ".pickle"):
        return lambda _, data: _plain(read_pickle(data), _no_storage)
    for magic, what in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {what}")
    raise UserError(f"{path}: is no torch, safetensors or pickle file; give a .pth, .pt, .safetensors or .pkl")


def _no_storage(_: TensorView) -> Tensor:
    raise Refused("holds torch tensors in a plain pickle")


# torch's zip files ------------------------------------------------------------------------------------------------


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    entries = _zip_entries(path, data)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any("/code/" in name for name in entries):
        raise Refused("is a zip archive but not one that torch.save wrote (TorchScript is not read)")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and _checked(data, *entries[f"{root}byteorder"]) != b"little":
        raise Refused("was written on a big-endian machine")
    seen: dict[str, tuple[int, int]] = {}

    def resolve(view: TensorView) -> Tensor:
        key = view.storage.key
        if key not in seen:
            offset, size, checksum = entries[f"{root}data/{key}"]
            _checked(data, offset, size, checksum)
            seen[key] = offset, size
        return _view(data, *seen[key], view)

    content = bytes(_checked(data, *entries[pickles[0]]))
    return _plain(read_pickle(io.BytesIO(content), storage_ref), resolve)


def _zip_entries(path: Path, data: mmap.mmap) -> dict[str, tuple[int, int, int]]:
    """Name -> (offset, size, CRC-32 or 0) of every entry, all of them stored as they are and inside the file."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    if any(info.compress_type or info.compress_size != info.file_size for info in infos):
        raise Refused("is a compressed zip archive, which torch.save never writes")
    if sum(info.file_size for info in infos) > len(data):
        raise Refused("has zip entries that overlap")
    entries: dict[str, tuple[int, int, int]] = {}
    for info in infos:
        header = data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"no zip entry where {info.filename[:80]!r} should start")
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.filename in entries or offset + info.file_size > len(data):
            raise ValueError(f"zip entry {info.filename[:80]!r} is cut short or there twice")
        entries[info.filename] = offset, info.file_size, info.CRC
    return entries


def _checked(data: mmap.mmap, offset: int, size: int, checksum: int) -> memoryview:
    """The entry's bytes, once their CRC-32 was seen to be right; torch writes 0 where it was told to write none."""
    content = memoryview(data)[offset : offset + size]
    if checksum and zlib.crc32(content) != checksum:
        raise ValueError("a checksum does not match")
    return content


def storage_ref(reference: Any) -> StorageRef:
    """What torch's persistent id ("storage", class, key, location, number of elements[, None]) stands for.

    Raises:
        Refused, ValueError: it is no such id.
    """
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise Refused("refers to data outside the file (an unknown persistent id)")
    _, kind, key, _, numel, *view = reference
    if not isinstance(key, str) or type(numel) is not int or numel < 0 or any(v is not None for v in view):
        raise ValueError("a storage without key or size")
    return StorageRef(key, storage_dtype(kind), numel)


# torch's files from before 1.6 ------------------------------------------------------------------------------------


def _read_legacy(_: Path, data: mmap.mmap) -> Any:
    magic, version, system = read_pickle(data), read_pickle(data), read_pickle(data)
    if magic != _LEGACY_MAGIC or version != 1001 or not system["little_endian"]:
        raise Refused("is a torch file of an unknown version or byte order")
    references: dict[str, StorageRef] = {}

    def remember(reference: Any) -> StorageRef:
        found = storage_ref(reference)
        return references.setdefault(found.key, found)

    content = read_pickle(data, remember)
    places: dict[str, tuple[int, int]] = {}
    for key in read_pickle(data):  # then each storage: its number of elements in 8 bytes, and its data
        found = references[key]
        (numel,) = struct.unpack("<q", data.read(8))
        size = numel * (found.dtype.itemsize if found.dtype else 1)
        if numel != found.numel or data.tell() + size > len(data):
            raise ValueError(f"storage {key[:40]!r} is cut short")
        places[key] = data.tell(), size
        data.seek(size, 1)
    return _plain(content, lambda view: _view(data, *places[view.storage.key], view))


# safetensors ------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path, data: mmap.mmap) -> dict[str, Tensor]:
    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_unique)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise Refused(f"names {max(names, key=names.count)!r:.100} twice in its header")
    return found


# An index of several files -----------------------------------------------------------------------------------------


def _read_index(path: Path, data: mmap.mmap) -> dict[str, Tensor]:
    """All tensors of the files beside `path` that a model.safetensors.index.json names, as one flat dict."""
    index = json.loads(bytes(data[: MAX_HEADER + 1]), object_pairs_hook=_unique)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path}: has no weight_map of tensor and file names; take an intact copy")
    found: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
            raise UserError(f"{path}: names {shard!r:.100}, which is no weights file beside it; take an intact copy")
        tensors = load_tensors(path.with_name(shard))
        named = {name for name, file in places.items() if file == shard}
        if tensors.keys() != named:
            odd = min(map(str, tensors.keys() ^ named))
            raise UserError(f"{path}: tensor {odd!r:.100} is in only one of {shard} and its index; take both anew")
        found.update(tensors)
    return found


# What was read, as plain data -------------------------------------------------------------------------------------


def _view(data: mmap.mmap, start: int, size: int, view: TensorView) -> Tensor:
    """The tensor whose elements stand at `start` in the mapped file; `size` bytes are its storage's."""
    item = view.dtype.itemsize
    elements = sum((n - 1) * step for n, step in zip(view.size, view.stride)) + 1
    if 0 in view.size:
        return torch.empty(view.size, dtype=view.dtype)
    if (view.offset + elements) * item > size:
        raise ValueError(f"a tensor of shape {list(view.size)} that does not fit its {size} stored bytes")
    start += view.offset * item
    if start % item:  # legacy files align nothing
        copy = bytearray(memoryview(data)[start : start + elements * item])
        flat = torch.frombuffer(copy, dtype=view.dtype)
    else:
        flat = torch.frombuffer(data, dtype=view.dtype, count=elements, offset=start)
    return flat.as_strided(view.size, view.stride)


def _plain(value: Any, resolve: Resolver) -> Any:
    """Nested containers with tensors in them; what is shared in `value` stays shared."""
    done: dict[int, Any] = {}

    def convert(item: Any, depth: int) -> Any:
        if isinstance(item, str | int | float | bytes | None):
            return item
        if id(item) not in done:
            if depth > MAX_DEPTH:
                raise Refused(f"nests containers more than {MAX_DEPTH} deep, or in a circle")
            done[id(item)] = build(item, depth + 1)
        return done[id(item)]

    def build(item: Any, depth: int) -> Any:
        if isinstance(item, dict):
            return {key: convert(value, depth) for key, value in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(convert(value, depth) for value in item)
        if isinstance(item, TensorView):
            return resolve(item)
        if isinstance(item, Array):
            array, item.value = finished(item), None  # one array at a time is in memory twice
            return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
        return item if isinstance(item, set | frozenset) else None

    return convert(value, 0)


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The header's metadata of a safetensors file that `load_tensors` could read; empty for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
