"""Reads a weights file of any usual kind as plain data and tensors, and never runs what is in it.

zip, legacy torch and pickle files go through the restricted reader in `unpickle`; safetensors checks the header of
its own. The kind is told from the content, not from the name. Opening a file reads what describes its tensors and
not one of their bytes; nothing that is made of it is larger than the file.
"""

from __future__ import annotations

import io
import json
import mmap
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loco_det.convert.builders import Array, Refused, StorageRef, TensorView, finished, storage_dtype
from loco_det.convert.stored import CHUNK, Allowance, Span, Stored, contiguous_stride
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
_SAFETENSORS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
Resolver = Callable[[TensorView], Stored]


def load_tensors(path: str | Path) -> dict[str, Any]:
    """The whole content of a weights file: nested dicts, lists and tuples of tensors, numbers and strings.

    Tensors are CPU tensors of the stored dtype, most of them sharing the file's pages; treat them as read-only.
    Settings objects of known libraries are left out (None in their place). A safetensors file is one flat dict, and
    so are the files together that a `*.index.json` names.

    Raises:
        UserError: missing, damaged, of no known kind, or asking for anything but plain data.
    """
    opened = open_tensors(path)
    stored: list[Stored] = []
    _mapped(opened, lambda item: stored.append(item) if isinstance(item, Stored) else None)
    spans = {(id(s.span.data), s.span.start): s.span.size for s in stored}
    allowance = Allowance(4 * sum(spans.values()) + CHUNK)  # tied weights are copied once for each of their names
    with _one_sentence(Path(path)):
        return _mapped(opened, lambda item: item.view(allowance) if isinstance(item, Stored) else item)


def open_tensors(path: str | Path) -> dict[str, Any]:
    """As `load_tensors`, with a `Stored` in place of every tensor: nothing of the tensors is read.

    Raises:
        UserError: as `load_tensors`; a damaged tensor shows when it is read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            if not start:
                raise UserError(f"{path}: is empty; take an intact copy")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable pages, never the file itself
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); give a weights file that exists") from error
    with _one_sentence(path):
        opened = _reader(path, start)(path, data)
    if not isinstance(opened, dict):
        kind = type(opened).__name__
        raise UserError(f"{path}: holds a {kind}, not a dictionary of tensors; save the model's state_dict()")
    return opened


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turns what damaged or hostile bytes make a parser raise into a UserError of one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in damaged text: the file is read or refused either way
            yield
    except Refused as error:
        sentence = f"{path}: {error}"[:MAX_SENTENCE]
        raise UserError(f"{sentence}; nothing was run, save the tensors alone and convert those") from error
    except (*MALFORMED, RuntimeError, SafetensorError, zipfile.BadZipFile) as error:
        reason = " ".join(f"{error}".split())[:MAX_SENTENCE] or type(error).__name__
        raise UserError(f"{path}: is damaged or incomplete ({reason}); take an intact copy") from error


def file_kind(path: str | Path) -> str:
    """What kind of file `open_tensors` takes `path` for."""
    with open(path, "rb") as file:
        return _KINDS.get(_reader(Path(path), file.read(512)), "pickle")


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
        return lambda _, data: _plain(read_pickle(data, None, _spans(data)), _no_storage)
    if start[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive (torch before 0.1.10, or a packed folder); save it anew with torch")
    for magic, what in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {what}")
    raise UserError(f"{path}: is no torch, safetensors or pickle file; give a .pth, .pt, .safetensors or .pkl")


def _spans(data: mmap.mmap) -> Callable[[int, int], Span]:
    return lambda start, size: Span(data, start, size)


def _no_storage(_: TensorView) -> Stored:
    raise Refused("holds torch tensors in a plain pickle")


# torch's zip files ------------------------------------------------------------------------------------------------


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    entries = _zip_entries(path, data)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1 or any("/code/" in name for name in entries):
        raise Refused("is a zip archive but not one that torch.save wrote (TorchScript is not read)")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and entries[f"{root}byteorder"].content() != b"little":
        raise Refused("was written on a big-endian machine")

    def resolve(view: TensorView) -> Stored:
        entry = entries[f"{root}data/{view.storage.key}"]

        def check() -> None:
            with _one_sentence(path):
                entry.check()

        return _stored(entry.span, view, check)

    return _plain(read_pickle(io.BytesIO(entries[pickles[0]].content()), storage_ref), resolve)


@dataclass
class _Entry:
    """A file in a zip archive; torch writes a checksum of 0 where it was told to write none."""

    span: Span
    checksum: int
    checked: bool = False

    def check(self) -> None:
        if self.checksum and not self.checked and self.span.crc32() != self.checksum:
            raise ValueError("a checksum does not match")
        self.checked = True

    def content(self) -> bytes:
        self.check()
        return bytes(self.span.copy())


def _zip_entries(path: Path, data: mmap.mmap) -> dict[str, _Entry]:
    """Every entry by its name, all of them stored as they are and inside the file."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    if any(info.compress_type or info.compress_size != info.file_size for info in infos):
        raise Refused("is a compressed zip archive, which torch.save never writes")
    if sum(info.file_size for info in infos) > len(data):
        raise Refused("has zip entries that overlap")
    entries: dict[str, _Entry] = {}
    for info in infos:
        header = data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"no zip entry where {info.filename[:80]!r} should start")
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.filename in entries or offset + info.file_size > len(data):
            raise ValueError(f"zip entry {info.filename[:80]!r} is cut short or there twice")
        entries[info.filename] = _Entry(Span(data, offset, info.file_size), info.CRC)
    return entries


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

    content = read_pickle(data, remember, _spans(data))
    places: dict[str, Span] = {}
    for key in read_pickle(data):  # then each storage: its number of elements in 8 bytes, and its data
        found = references[key]
        (numel,) = struct.unpack("<q", data.read(8))
        size = numel * (found.dtype.itemsize if found.dtype else 1)
        if numel != found.numel or data.tell() + size > len(data):
            raise ValueError(f"storage {key[:40]!r} is cut short")
        places[key] = Span(data, data.tell(), size)
        data.seek(size, 1)
    return _plain(content, lambda view: _stored(places[view.storage.key], view))


# safetensors ------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path, data: mmap.mmap) -> dict[str, Stored]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size], object_pairs_hook=_unique)
    with safe_open(path, framework="pt"):  # which checks that shapes, dtypes and offsets agree and fill the file
        header.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(header.items()):
        if entry["dtype"] not in _SAFETENSORS:
            raise Refused(f"holds tensor {name!r:.100} as {entry['dtype']}, which no ResNet is stored as")
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        span = Span(data, 8 + size + start, end - start)
        found[name] = Stored(span, _SAFETENSORS[entry["dtype"]], 0, shape, contiguous_stride(shape))
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise Refused(f"names {max(names, key=names.count)!r:.100} twice in its header")
    return found


# An index of several files -----------------------------------------------------------------------------------------


def _read_index(path: Path, data: mmap.mmap) -> dict[str, Stored]:
    """All tensors of the files beside `path` that a model.safetensors.index.json names, as one flat dict."""
    index = json.loads(bytes(data[: MAX_HEADER + 1]), object_pairs_hook=_unique)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path}: has no weight_map of tensor and file names; take an intact copy")
    found: dict[str, Stored] = {}
    for shard in dict.fromkeys(places.values()):
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
            raise UserError(f"{path}: names {shard!r:.100}, which is no weights file beside it; take an intact copy")
        if not path.with_name(shard).is_file():
            raise UserError(f"{path}: names {shard:.100}, which is not beside it; fetch all of its files")
        tensors = open_tensors(path.with_name(shard))
        named = {name for name, file in places.items() if file == shard}
        if tensors.keys() != named:
            odd = min(map(str, tensors.keys() ^ named))
            raise UserError(f"{path}: tensor {odd!r:.100} is in only one of {shard} and its index; take both anew")
        found.update(tensors)
    return found


_KINDS = {
    _read_zip: "torch (zip)",
    _read_legacy: "torch (before 1.6)",
    _read_safetensors: "safetensors",
    _read_index: "index of weights files",
}


# What was read, as plain data -------------------------------------------------------------------------------------


def _stored(storage: Span, view: TensorView, check: Callable[[], None] | None = None) -> Stored:
    """The tensor that is `view` of a storage, once it is certain that the storage has the bytes for it."""
    stored = Stored(storage, view.dtype, view.offset, view.size, view.stride, check=check)
    if (view.offset + stored.extent()) * view.dtype.itemsize > storage.size:
        raise ValueError(f"a tensor of shape {list(view.size)} that does not fit its {storage.size} stored bytes")
    return stored


def _plain(value: Any, resolve: Resolver) -> Any:
    """`value` with a `Stored` for every tensor and array, and nothing of what only a pickle knows."""

    def leaf(item: Any) -> Any:
        if isinstance(item, TensorView):
            return resolve(item)
        if isinstance(item, Array):
            return finished(item)
        if isinstance(item, Span):
            return bytes(item.copy())
        return item if isinstance(item, set | frozenset | Stored) else None

    return _mapped(value, leaf)


def _mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Nested containers with `leaf` of all that is neither container nor plain; what is shared stays shared."""
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
        return leaf(item)

    return convert(value, 0)


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The header's metadata of a safetensors file that `load_tensors` could read; empty for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}
