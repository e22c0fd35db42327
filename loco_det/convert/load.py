"""Reads any usual weights file as plain data and tensors, without executing anything in it.

`unpickle` reads torch's files and pickles, the safetensors library its own format; an archive of numpy (.npz) is
read here. The content, not the name, decides the kind. Tensors are views of the memory-mapped file.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loco_det.convert.unpickle import Built, LeftOut, Refused, Storage, read_pickle
from loco_det.core.errors import UserError

MAX_DEPTH = 64
MAX_HEADER = 25 * 2**20
MAX_ARRAY_HEADER = 2**16
MAX_SENTENCE = 300
MAX_VIEWS = 8  # limit of all tensors' size in multiples of the file's, for tied weights,
SMALL = 2**24  # and a number of bytes that is always allowed
_LEGACY = re.compile(rb"(\x80.)?(\x95.{8})?(\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19|L119547037146038801333356L\n)\.", re.DOTALL)
# The beginning of a .npy file as numpy writes it: dtype, order, and shape of plain numbers.
_ARRAY = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)"
    rb"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), \} *\n",
    re.DOTALL,
)
_DISTRIBUTED = (
    "is a part of a distributed checkpoint; join its folder first: "
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} model.pth"
)
_OTHER_KINDS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; fetch it with git lfs pull",
    b"\x1f\x8b": "is gzip-compressed; decompress it first",
    b"<": "is a web page; download the weights themselves",
    b"\x89HDF": "is an HDF5 file; export it as PyTorch or safetensors weights",
}


def load_tensors(path: str | Path) -> dict[str, Any]:
    """Read as `open_tensors`, verify with `check_sums`, and align tensors for arithmetic.

    Raises:
        UserError: as `open_tensors` and `check_sums`.
    """
    opened = open_tensors(path)
    check_sums(path)

    def aligned(item: Any) -> Any:
        odd = isinstance(item, Tensor) and item.data_ptr() % item.dtype.itemsize
        return in_memory(item) if odd else item

    return _mapped(opened, aligned)


def open_tensors(path: str | Path) -> dict[str, Any]:
    """Open a weights file: nested dicts, lists and tuples of tensors, numbers and strings.

    Tensors are CPU tensors of the stored dtype over the mapped file, not yet read. Treat them as read-only, and pass
    them through `in_memory` for arithmetic: in old files they are unaligned. A `LeftOut` replaces anything but plain
    data, such as settings objects. A safetensors file is one flat dict, and so are all the files of a `*.index.json`.

    Raises:
        UserError: missing, damaged, or of no known kind.
    """
    path = Path(path)
    data = _pages(path)
    with _as_user_error(path):
        opened = _KINDS[_kind(path, data[:512])](path, data)
    if isinstance(opened, LeftOut) and opened.name.startswith("torch.distributed."):
        raise UserError(f"{path}: {_DISTRIBUTED.format(path.parent)}")
    if not isinstance(opened, dict):
        what = opened.name if isinstance(opened, LeftOut) else type(opened).__name__
        raise UserError(
            f"{path}: holds a {what}, not a dictionary of tensors; save the model's state_dict() and give it"
        )
    return opened


def in_memory(tensor: Tensor) -> Tensor:
    """Copy a tensor into contiguous memory, byte by byte, because its address may be unaligned for its dtype."""
    if not tensor.numel():
        return tensor.clone()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().copy()
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


def check_sums(path: str | Path) -> None:
    """Verify the checksums of an opened torch zip file, which reads all of it.

    Raises:
        UserError: a checksum is wrong, or the file cannot be read.
    """
    path = Path(path)
    data = _pages(path)
    with _as_user_error(path):
        if _kind(path, data[:512]) in _ZIPS:
            with zipfile.ZipFile(path) as archive:
                for info in filter(lambda info: info.CRC, archive.infolist()):  # 0 if torch wrote no checksums
                    with archive.open(info) as entry:
                        while entry.read(2**20):
                            pass


def left_out(content: dict[str, Any]) -> dict[str, list[str]]:
    """Map type name -> keys (as in `sources`) of everything left out of `open_tensors`' result; shared objects once."""
    found: dict[str, list[str]] = {}
    waiting, seen = deque([("", content)]), set()
    while waiting:
        place, container = waiting.popleft()
        for name, item in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(item, LeftOut):
                found.setdefault(item.name, []).append(f"{place}:{name}" if place else str(name))
            elif isinstance(item, dict | list | tuple) and id(item) not in seen:
                seen.add(id(item))
                waiting.append((f"{place}/{name}" if place else str(name), item))
    return found


def _pages(path: Path) -> mmap.mmap:
    """Map the file copy-on-write: writing to the pages does not change the file."""
    if re.match(r"\w+:/", str(path)):
        raise UserError(f"{path}: is a URL; download the file and give its path")
    try:
        if (path / ".metadata").is_file() or path.suffix == ".distcp":
            raise UserError(f"{path}: {_DISTRIBUTED.format(path if path.is_dir() else path.parent)}")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: cannot be read (is no regular file); give a weights file")
        if not status.st_size:
            raise UserError(f"{path}: is empty, or no file on a disk; take an intact copy")
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a weights file that exists") from error


_DAMAGED = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError)


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    """Convert exceptions of a parser on damaged or hostile bytes to a UserError of one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in damaged text: the file is read or refused either way
            yield
    except Refused as error:
        sentence = f"{path}: {error}"[:MAX_SENTENCE]
        raise UserError(f"{sentence}; nothing was run, save the tensors alone and convert those") from error
    except (*_DAMAGED, ValueError, struct.error, pickle.UnpicklingError, SafetensorError, zipfile.BadZipFile) as error:
        reason = " ".join(f"{error}".split())[:MAX_SENTENCE] or type(error).__name__
        raise UserError(f"{path}: is damaged or incomplete ({reason}); take an intact copy") from error


def file_kind(path: str | Path) -> str:
    """Return the kind of file that `open_tensors` detects."""
    with open(path, "rb") as file:
        return _kind(Path(path), file.read(512))


def _kind(path: Path, start: bytes) -> str:
    if start.startswith(b"PK\x03\x04"):
        first = start[30 : 30 + int.from_bytes(start[26:28], "little")]
        return "numpy (zip)" if first.endswith(b".npy") else "torch (zip)"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if start.lstrip().startswith(b"{") and path.name.endswith(".index.json"):
        return "index of weights files"
    if _LEGACY.match(start):
        return "torch (before 1.6)"
    if start[0] == 0x80 or path.suffix in (".pkl", ".pickle"):
        return "pickle"
    if start[257:262] == b"ustar":
        raise UserError(f"{path}: is a tar archive (torch before 0.1.10, or a packed folder); save it anew with torch")
    for magic, what in _OTHER_KINDS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {what}")
    raise UserError(f"{path}: is no torch, safetensors or pickle file; give a .pth, .pt, .safetensors or .pkl")


def _read_npz(path: Path, data: mmap.mmap) -> dict[str, Tensor]:
    """Read the arrays that numpy.savez wrote; those of objects are pickles, and refused."""
    with zipfile.ZipFile(path) as archive:
        places = _zip_places(data, archive.infolist())
    other = next((name for name in places if not name.endswith(".npy")), None)
    if other is not None:
        raise ValueError(f"{other!r:.100} is no array of numpy's")
    return {name.removesuffix(".npy"): _array(data, name, *place) for name, place in sorted(places.items())}


def _array(data: mmap.mmap, name: str, start: int, size: int) -> Tensor:
    """Map one .npy file of `size` bytes at `start`; two bytes without a type are bfloat16, which numpy lacks."""
    header = _ARRAY.match(data[start : start + min(size, MAX_ARRAY_HEADER)])
    if header is None:
        raise ValueError(f"{name!r:.100} does not begin as an array of numpy's")
    kind, order, sides = (part.decode() for part in header.groups())
    if "O" in kind:
        raise Refused(f"holds pickled objects in {name!r:.100}")
    if not re.fullmatch(r"[<|][biuf][1248]|[<|]V2", kind):
        raise Refused(f"holds an array of {kind!r:.20} in {name!r:.100}")
    shape = tuple(int(side) for side in sides.split(",") if side.strip())
    dtype = np.dtype(np.int16 if kind.endswith("V2") else kind)
    if math.prod(shape) * dtype.itemsize != size - header.end():
        raise ValueError(f"array {name!r:.100} is of another size than its header says")
    flat = np.frombuffer(data, dtype, math.prod(shape), start + header.end())
    tensor = torch.from_numpy(flat.reshape(shape, order="F" if order == "True" else "C"))
    return tensor.view(torch.bfloat16) if kind.endswith("V2") else tensor


def _read_zip(path: Path, data: mmap.mmap) -> Any:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    names = [info.filename for info in infos]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        save = f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        raise UserError(f"{path}: is a TorchScript archive; save its state_dict: {save}")
    pickles = [name for name in names if re.fullmatch(r".*/data\.pkl", name)]
    if len(pickles) != 1:
        inside = next((n for n in names if re.search(r"\.(pth|pt|tar|ckpt|bin|pkl|safetensors)$", n)), None)
        what = f"that holds {inside[:100]!r}" if inside else "but not one that torch.save wrote"
        raise UserError(f"{path}: is a zip archive {what}; unzip it and give the weights file")
    places, root = _zip_places(data, infos), pickles[0].removesuffix("data.pkl")
    start, size = places.get(f"{root}byteorder", (0, 0))
    if data[start : start + size] not in (b"little", b""):
        raise Refused("was written on a big-endian machine")

    def storage(key: str, dtype: torch.dtype, _: int) -> Storage:
        return Storage(data, *places[f"{root}data/{key}"], dtype)

    data.seek(places[pickles[0]][0])
    return _plain(data, read_pickle(data, storage))


def _zip_places(data: mmap.mmap, infos: list[zipfile.ZipInfo]) -> dict[str, tuple[int, int]]:
    """Return (start, size) of every entry of an archive by name, all of them uncompressed and inside the file."""
    if any(info.compress_type or info.compress_size != info.file_size for info in infos):
        raise Refused("is a compressed zip archive, which torch.save and numpy.savez never write")
    if sum(info.file_size for info in infos) > len(data):
        raise Refused("has zip entries that overlap")
    places: dict[str, tuple[int, int]] = {}
    for info in infos:
        header = data[info.header_offset : info.header_offset + 30]
        start = info.header_offset + 30 + sum(struct.unpack("<26x2H", header))
        if header[:4] != b"PK\x03\x04" or info.filename in places or start + info.file_size > len(data):
            raise ValueError(f"zip entry {info.filename[:80]!r} is cut short or there twice")
        places[info.filename] = start, info.file_size
    return places


def _read_legacy(_: Path, data: mmap.mmap) -> Any:
    """Read torch's format before 1.6: five pickles, the fourth the content, then the storages one after another."""
    _magic, version, system = read_pickle(data), read_pickle(data), read_pickle(data)
    if version != 1001 or not system["little_endian"]:
        raise Refused("is a torch file of an unknown version or byte order")
    sizes: dict[str, tuple[torch.dtype, int]] = {}
    begin = data.tell()
    read_pickle(data, lambda key, *size: sizes.setdefault(key, size) and LeftOut("storage"))  # once for the sizes
    places = {}
    for key in read_pickle(data):
        dtype, numel = sizes[key]
        if (numel,) != struct.unpack("<q", data.read(8)):
            raise ValueError(f"storage {key[:40]!r} is of another size than its tensors")
        places[key] = Storage(data, data.tell(), numel * dtype.itemsize, dtype)
        data.seek(places[key].size, 1)  # a ValueError where the file ends before
    data.seek(begin)
    return _plain(data, read_pickle(data, lambda key, *_: places[key]))


def _read_safetensors(path: Path, data: mmap.mmap) -> dict[str, Tensor]:
    json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_unique)
    with safe_open(path, framework="pt") as file:  # which also maps the file
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise Refused(f"names {max(names, key=names.count)!r:.100} twice in its header")
    return found


def safetensors_metadata(path: str | Path) -> dict[str, str]:
    """Return the header's metadata of a valid safetensors file; empty for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError:
        return {}


def _read_index(path: Path, data: mmap.mmap) -> dict[str, Tensor]:
    """Read all tensors of the files beside `path` listed in a model.safetensors.index.json, as one flat dict."""
    index = json.loads(data[: MAX_HEADER + 1], object_pairs_hook=_unique)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{path}: has no weight_map of tensor and file names; take an intact copy")
    found: dict[str, Tensor] = {}
    for shard in dict.fromkeys(places.values()):
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", shard):
            raise UserError(f"{path}: names {shard!r:.100}, which is no weights file beside it; take an intact copy")
        if not path.with_name(shard).is_file():
            raise UserError(f"{path}: names {shard:.100}, which is not beside it; fetch all of its files")
        tensors = load_tensors(path.with_name(shard))
        named = {name for name, file in places.items() if file == shard}
        if tensors.keys() != named:
            odd = min(map(str, tensors.keys() ^ named))
            raise UserError(f"{path}: tensor {odd!r:.100} is in only one of {shard} and its index; take both anew")
        found.update(tensors)
    return found


_ZIPS = ("torch (zip)", "numpy (zip)")
_KINDS: dict[str, Callable[[Path, mmap.mmap], Any]] = {
    "numpy (zip)": _read_npz,
    "torch (zip)": _read_zip,
    "torch (before 1.6)": _read_legacy,
    "pickle": lambda _, data: _plain(data, read_pickle(data)),
    "safetensors": _read_safetensors,
    "index of weights files": _read_index,
}


def _plain(data: mmap.mmap, content: Any) -> Any:
    """Convert arrays in `content` to tensors, and remove objects that only a pickle has.

    Raises:
        ValueError: its tensors are far larger than the file, by repeating a few numbers.
    """
    allowed = MAX_VIEWS * len(data) + SMALL

    def leaf(item: Any) -> Any:
        nonlocal allowed
        if isinstance(item, Built):
            item = LeftOut("numpy.dtype") if isinstance(item.value, str) else item.value
            if not isinstance(item, LeftOut):
                native = item.astype(item.dtype.newbyteorder("="), copy=not item.flags.writeable)
                item = torch.from_numpy(native)
        elif isinstance(item, np.ndarray):
            item = item.tobytes()
        if isinstance(item, Tensor):
            allowed -= item.nbytes
            if allowed < 0:
                raise ValueError("its tensors amount to more than the file holds")
        known = isinstance(item, Tensor | LeftOut | bytes | set | frozenset | torch.dtype)
        return item if known else LeftOut(getattr(item, "__name__", type(item).__name__))

    return _mapped(content, leaf)


def _mapped(value: Any, leaf: Callable[[Any], Any], done: dict[int, Any] | None = None, depth: int = 0) -> Any:
    """Apply `leaf` to everything in nested containers that is not plain; shared objects stay shared."""
    done = {} if done is None else done
    if isinstance(value, str | int | float | bytes | None):
        return value
    if id(value) in done:
        return done[id(value)]
    if depth > MAX_DEPTH:
        raise Refused(f"nests containers more than {MAX_DEPTH} deep, or in a circle")
    if isinstance(value, dict):
        made = {key: _mapped(item, leaf, done, depth + 1) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        made = type(value)(_mapped(item, leaf, done, depth + 1) for item in value)
    else:
        made = leaf(value)
    done[id(value)] = made
    return made
