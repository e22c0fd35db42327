"""A COCO annotation file as compact arrays, in a cache that every process maps into its memory.

The JSON is parsed once. Everything but the segmentations becomes arrays, a tenth of the file; of a segmentation only
its place in the JSON is kept, and its bytes are read when it is used. Nothing is judged here: what a training set
leaves out is decided in `coco.py`, what an evaluation refuses in `evaluation/coco_checks.py`.

A cache file is used if its checksum is right and the JSON is the one it was made of: the same by size, times and
inode, or, where these differ or are too young to be telling, by its sha256. Anything else is built anew.

Shape legend: K categories, I images, A annotations. Categories and images are sorted by id, annotations grouped by
image, in the file's order within one, those of unlisted images last.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import chain, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from loco_det.data.packed import PackedStrings
from loco_det.errors import UserError
from loco_det.processes import leave_stopping_to_parent
from loco_det.runtime import atomic_write, log, usable_cores

_MAGIC = b"LOCOIDX3"  # another number whenever a cache file holds something else
_ALIGN = 64
_BLOCK = 1 << 20  # bytes of JSON parsed at a time: they and what comes of them stay in the processor's cache
_TAIL = 1 << 13  # bytes at a block's end that are searched for the border of two annotations
_HASHED = 1 << 24  # bytes hashed at a time; with fewer the thread that does it waits for the parser each time
_LARGE = 1 << 26  # bytes of JSON from which on several processes read
_MOST_PARTS = 4
# A file changed so shortly before it was looked at can change again without another time stamp.
_SETTLED_NS = 2_000_000_000


class Stamp(NamedTuple):
    """By what a file is known to be unchanged without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class AnnotationFile:
    """The JSON that an index was made of, for reading segmentations; it refuses to read from another content.

    Attributes:
        sha256: of the content, in hexadecimal.
        stamp: of the file when it had this content.
        seen_ns: when the stamp was taken, nanoseconds since the epoch.
    """

    def __init__(self, path: Path, sha256: str, stamp: Stamp, seen_ns: int):
        self.path, self.sha256, self.stamp, self.seen_ns = path, sha256, Stamp(*stamp), seen_ns
        self._fd: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationFile, (self.path, self.sha256, self.stamp, self.seen_ns)

    def __del__(self, close: Any = os.close) -> None:  # at the interpreter's end `os` may be gone
        if getattr(self, "_fd", None) is not None:
            close(self._fd)

    def read(self, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """The bytes at some places. A process that was forked off reads through the same descriptor.

        Raises:
            UserError: the file cannot be read or has another content by now.
        """
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY)
            now = Stamp.of(os.fstat(self._fd))
            if now != self.stamp:
                if now.size != self.stamp.size or _sha256(self.path) != self.sha256:
                    raise UserError(f"{self.path} was changed while it was in use; start again.")
                self.stamp = now  # touched or moved
            return [os.pread(self._fd, n, start) for start, n in zip(starts, lengths)]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from None


@dataclass(frozen=True)
class CocoIndex:
    """All of an annotation file. The arrays are in this process's memory or, read-only, in the mapped cache file.

    Pickled, a mapped index is the path of its JSON.
    """

    file: AnnotationFile
    category_names: tuple[str, ...]
    category_id: np.ndarray  # (K,) int64, ascending
    image_id: np.ndarray  # (I,) int64, ascending
    height: np.ndarray  # (I,) int64, pixels
    width: np.ndarray  # (I,) int64, pixels
    name_data: np.ndarray  # see `file_name`
    name_offsets: np.ndarray
    first: np.ndarray  # (I + 1,) int64: annotations first[i] to first[i + 1] belong to image i
    annotation_id: np.ndarray  # (A,) int64
    annotation_image: np.ndarray  # (A,) int64, an image id, from first[I] on of images that are not listed
    annotation_category: np.ndarray  # (A,) int64, a category id
    bbox: np.ndarray  # (A, 4) float64: x, y, width, height in pixels
    area: np.ndarray  # (A,) float64, square pixels; NaN where the file says nothing
    crowd: np.ndarray  # (A,) bool
    ignore: np.ndarray  # (A,) bool, the key "ignore"
    difficult: np.ndarray  # (A,) bool, the key "difficult", of Pascal VOC
    has_shape: np.ndarray  # (A,) bool: False for polygons of which none has three points
    segmentation_start: np.ndarray  # (A,) int64, byte in the JSON
    segmentation_length: np.ndarray  # (A,) int64, bytes; 0 where there is none
    mapped: bool = False

    @property
    def path(self) -> Path:
        """The annotation file."""
        return self.file.path

    @property
    def file_name(self) -> PackedStrings:
        """The I file names."""
        return PackedStrings(self.name_data, self.name_offsets)

    @property
    def categories(self) -> dict[int, str]:
        """{category id: name} in ascending order of ids, that is in the order of a model's classes."""
        return dict(zip(self.category_id.tolist(), self.category_names))

    def segmentations(self, rows: np.ndarray | slice) -> list[bytes]:
        """The segmentations of some annotations as they stand in the JSON; b"" where there is none.

        Raises:
            UserError: as `AnnotationFile.read`.
        """
        return self.file.read(self.segmentation_start[rows].tolist(), self.segmentation_length[rows].tolist())

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mapped:
            return _load_same, (self.path, self.file.sha256)
        return CocoIndex, tuple(getattr(self, field.name) for field in fields(self))


_ARRAYS = tuple(field.name for field in fields(CocoIndex) if field.type == "np.ndarray")


def cache_folder() -> Path:
    """LOCO_DET_CACHE, or loco_det below XDG_CACHE_HOME, or ~/.cache/loco_det."""
    if chosen := os.environ.get("LOCO_DET_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loco_det"


def load_index(annotations: str | Path) -> CocoIndex:
    """The index of a COCO annotation file, from the cache or else built and put there.

    Of several processes one builds and the others wait. Where the cache cannot be written, the index stays in memory
    and one line says so.

    Raises:
        UserError: the file is unreadable or no COCO annotation file.
    """
    path = Path(annotations).absolute()
    cache = _cache_file(path)
    index = _open(cache, path)
    if index is not None and _unchanged(index.file):
        return index
    with _locked(cache, path):
        index = _open(cache, path)  # built while this process waited
        if index is not None and _unchanged(index.file):
            return index
        index = _confirmed(index) or _build(path)
        try:
            if _is_settled(index.file) or not index.mapped:
                _save(index, cache)
                index = _open(cache, path) or index
        except (UserError, OSError) as error:
            log.info("the index of %s is not cached: %s (LOCO_DET_CACHE names another place)", path, error)
    return index


def doubled_ids(ids: np.ndarray) -> np.ndarray:
    """Those that occur more than once, ascending."""
    if (np.diff(ids) > 0).all():  # as files are written, and no sorting
        return ids[:0]
    ids = np.sort(ids)
    return np.unique(ids[1:][ids[1:] == ids[:-1]])


def _load_same(path: Path, sha256: str) -> CocoIndex:
    index = load_index(path)
    if index.file.sha256 != sha256:
        raise UserError(f"{path} was changed while it was in use; start again.")
    return index


# --- whether a cached index is of this file ---------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _stamp(path: Path) -> Stamp:
    try:
        return Stamp.of(os.stat(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _is_settled(file: AnnotationFile) -> bool:
    return file.seen_ns - max(file.stamp.mtime_ns, file.stamp.ctime_ns) > _SETTLED_NS


def _unchanged(file: AnnotationFile) -> bool:
    return _is_settled(file) and _stamp(file.path) == file.stamp


def _confirmed(index: CocoIndex | None) -> CocoIndex | None:
    """The index with the file's present stamp if the file still has the content that the index was made of."""
    if index is None:
        return None
    path, seen = index.path, time.time_ns()
    stamp = _stamp(path)
    if stamp.size != index.file.stamp.size or _sha256(path) != index.file.sha256 or _stamp(path) != stamp:
        return None
    return replace(index, file=AnnotationFile(path, index.file.sha256, stamp, seen))


# --- the cache file ---------------------------------------------------------------------------------------------
# magic, crc32 of all that follows, length of the header, header (JSON), arrays at multiples of _ALIGN after it


def _cache_file(path: Path) -> Path:
    place = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return cache_folder() / f"{path.stem}-{place}.index"


def _save(index: CocoIndex, cache: Path) -> None:
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    columns, end = {}, 0
    for name, array in arrays.items():
        columns[name] = (array.dtype.str, array.shape, end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    file = index.file
    source = {"sha256": file.sha256, "stamp": file.stamp, "seen_ns": file.seen_ns}
    header = json.dumps({"source": source, "category_names": index.category_names, "columns": columns}).encode()
    header += b" " * (-(len(header) + 16) % _ALIGN)
    parts = [len(header).to_bytes(4, "little"), header]
    for array in arrays.values():
        parts += [np.ascontiguousarray(array).data.cast("B") if array.size else b"", bytes(-array.nbytes % _ALIGN)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    with atomic_write(cache) as out:
        out.writelines([_MAGIC, checksum.to_bytes(4, "little"), *parts])


def _open(cache: Path, path: Path) -> CocoIndex | None:
    """A cache file mapped into memory; None if there is none that is whole and of this version."""
    try:
        with open(cache, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # absent or empty
        return None
    # The arrays are small enough to be read whole each time: no cheaper test finds a flipped bit.
    if (
        len(data) < 16
        or data[:8] != _MAGIC
        or zlib.crc32(memoryview(data)[12:]) != int.from_bytes(data[8:12], "little")
    ):
        return None
    start = 16 + int.from_bytes(data[12:16], "little")
    try:
        header = json.loads(data[16:start])
        if set(header["columns"]) != set(_ARRAYS):
            return None
        arrays = {
            name: np.frombuffer(data, dtype, math.prod(shape), start + offset).reshape(shape)
            for name, (dtype, shape, offset) in header["columns"].items()
        }
        source = AnnotationFile(path, **header["source"])
        return CocoIndex(source, tuple(header["category_names"]), **arrays, mapped=True)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):  # whole, and not written here
        return None


@contextlib.contextmanager
def _locked(cache: Path, path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when that process ends, however it ends.

    Where there is no lock to be had, builders may work side by side, and the last one's file remains.
    """
    lock = None
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = open(cache.with_suffix(".lock"), "w")  # noqa: SIM115 (closed below)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that builds the index", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.parent.glob(f".{cache.name}.*.tmp"):  # by a builder that was killed
            left.unlink()
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


# --- from the JSON ----------------------------------------------------------------------------------------------

_Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Category(msgspec.Struct, gc=False):
    id: _Int64
    name: str


class _Image(msgspec.Struct, gc=False):
    id: _Int64
    height: _Int64
    width: _Int64
    file_name: str = ""  # evaluation needs none
    coco_url: str | None = None  # LVIS names its images by it; many a converter writes null


class _Annotation(msgspec.Struct, gc=False):
    id: _Int64
    image_id: _Int64
    category_id: _Int64
    bbox: tuple[float, float, float, float]
    area: float = math.nan
    iscrowd: int | bool = 0
    ignore: int | bool = 0
    difficult: int | bool = 0
    segmentation: msgspec.Raw = msgspec.Raw()


class _File(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] = []


class _Part(msgspec.Struct):
    images: list[_Image] = []
    categories: list[_Category] = []
    annotations: list[_Annotation] = []


_decode_annotations = msgspec.json.Decoder(list[_Annotation]).decode
_decode_part = msgspec.json.Decoder(_Part).decode
_ANNOTATIONS = re.compile(rb'"annotations"\s*:\s*\[')
_BORDER = re.compile(rb"\}\s*,\s*\{")
_NUMBER = b"0123456789+-.eE \t\r\n"  # what is left of polygons without it is brackets and commas
_POLYGONS = re.compile(rb"\[\[,*\](?:,\[,*\])*\]")

_ENOUGH = range(5, 1 << 62, 2)  # commas of a polygon with three points or more

Columns = dict[str, np.ndarray]


def _build(path: Path) -> CocoIndex:
    seen = time.time_ns()
    stamp = _stamp(path)
    try:
        with no_garbage_collection(), _helpers(stamp.size) as (helpers, parts):
            digest = helpers.submit(_sha256, path)
            try:
                images, categories, columns = _parse_in_blocks(path, helpers, parts)
                sha256 = digest.result()
            except (msgspec.MsgspecError, UnicodeDecodeError, _Indivisible, BrokenExecutor):
                images, categories, columns = _parse_at_once(path, path.read_bytes())
                sha256 = _sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if _stamp(path) != stamp:
        raise UserError(f"{path} was changed while it was read; start again.")
    images.sort(key=attrgetter("id"))
    categories.sort(key=attrgetter("id"))
    names = PackedStrings.pack(
        [image.file_name or "/".join((image.coco_url or "").split("/")[-2:]) for image in images]
    )
    table = {name: _integers(images, name) for name in ("id", "height", "width")}
    return CocoIndex(
        AnnotationFile(path, sha256, stamp, seen),
        category_names=tuple(category.name for category in categories),
        category_id=_integers(categories, "id"),
        image_id=table["id"],
        height=table["height"],
        width=table["width"],
        name_data=names.data,
        name_offsets=names.offsets,
        **_grouped(table["id"], columns),
    )


def _grouped(image_id: np.ndarray, columns: Columns) -> Columns:
    """The columns ordered by image, and `first`."""
    owner = columns["annotation_image"]
    row = np.searchsorted(image_id, owner)
    listed = np.append(image_id, 0)[row] == owner if len(image_id) else np.zeros(len(owner), dtype=bool)
    row[~listed | (row == len(image_id))] = len(image_id)
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], np.arange(len(image_id) + 1))
    return {"first": first, **{name: column.take(order, 0) for name, column in columns.items()}}


class _Indivisible(Exception):
    """The file is not one that can be parsed in blocks."""


@contextlib.contextmanager
def _helpers(size: int) -> Iterator[tuple[Executor, int]]:
    """Who works on a file of this size beside this process, and into how many parts to cut it.

    A large file on several cores gets processes, forked as a loader's workers are, which themselves may not fork.
    """
    cores = usable_cores() if sys.platform == "linux" else 1
    if size < _LARGE or cores == 1 or multiprocessing.current_process().daemon:
        with ThreadPoolExecutor(1) as threads:
            yield threads, 1
        return
    parts = min(cores, _MOST_PARTS)
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(parts, fork, leave_stopping_to_parent) as processes:
        yield processes, parts


def _parse_in_blocks(path: Path, helpers: Executor, parts: int) -> tuple[list[_Image], list[_Category], Columns]:
    """A block of annotations at a time, which takes a fifth of the memory and less time than all at once.

    That a text between two guessed borders parses as a list proves that the second border is right if the first is,
    and the first of all is. Whatever does not fit is left to the parser of the whole file.
    """
    head, borders = _head_and_borders(path, parts)
    later = [helpers.submit(_parse_range, path, *each) for each in pairwise([*borders[1:], None])]
    found = [_parse_range(path, borders[0], [*borders, None][1]), *(each.result() for each in later)]
    rest = found[-1][0]
    if (head.images and rest.images) or (head.categories and rest.categories):
        raise _Indivisible  # the last of equal keys counts
    images, categories = head.images or rest.images, head.categories or rest.categories
    if not images or not categories:
        raise _Indivisible
    columns = [part for _, own in found for part in own]
    return images, categories, {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}


def _head_and_borders(path: Path, parts: int) -> tuple[_Part, list[int]]:
    """What stands before the annotations, and at which bytes of the file the parts of their list begin."""
    text = b""
    with open(path, "rb") as file:
        while not (begin := _list_of_annotations(text)):
            block = file.read(max(_BLOCK, len(text)))
            if not block:
                raise _Indivisible
            text += block
        start, size = begin.end(), os.fstat(file.fileno()).st_size
        borders = [start]
        for part in range(1, parts):
            file.seek(at := start + (size - start) * part // parts)
            border = _BORDER.search(file.read(_BLOCK))
            if border and at + border.end() - 1 > borders[-1]:
                borders.append(at + border.end() - 1)
    return _decode_part(text[:start] + b"]}"), borders


def _parse_range(path: Path, start: int, stop: int | None) -> tuple[_Part, list[Columns]]:
    """The annotations from byte `start` to the border before byte `stop`, or to the list's end and with it what comes
    after."""
    text, columns = b"", []
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK if stop is None else min(_BLOCK, stop - start - len(text))):
            text = b"".join([text, block])
            borders = [*_BORDER.finditer(text, max(0, len(text) - _TAIL))] or [*_BORDER.finditer(text)]
            if not borders:
                continue
            end, begins = borders[-1].start() + 1, borders[-1].end() - 1
            try:
                annotations = _decode_annotations(b"".join([b"[", memoryview(text)[:end], b"]"]))
            except msgspec.DecodeError:  # the list ends within, if nothing is wrong
                if stop is not None:
                    raise
                text += file.read()
                break
            columns.append(_columns(annotations, text, start))
            start, text = start + begins, text[begins:]
    if stop is not None:
        # Up to the next part stand one more annotation and, after its end, a comma.
        rest = _Part(annotations=_decode_annotations(b"[" + text.rstrip().removesuffix(b",") + b"]"))
    elif _list_of_annotations(text):
        raise _Indivisible
    else:
        rest = _decode_part(b'{"annotations":[' + text)
    columns.append(_columns(rest.annotations, text, start))
    return _Part(rest.images, rest.categories), columns


def _list_of_annotations(text: bytes) -> re.Match[bytes] | None:
    """The first match of _ANNOTATIONS, looked for at the speed of `find`."""
    at = text.find(b'"annotations"')
    while at >= 0 and not (found := _ANNOTATIONS.match(text, at)):
        at = text.find(b'"annotations"', at + 1)
    return found if at >= 0 else None


def _parse_at_once(path: Path, text: bytes) -> tuple[list[_Image], list[_Category], Columns]:
    try:
        found = msgspec.json.decode(text, type=_File)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not a COCO instances file: {error}{_id_at(text, str(error))}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole JSON file in UTF-8: {error}; copy or write it again.") from None
    return found.images, found.categories, _columns(found.annotations, text, 0)


def _columns(annotations: list[_Annotation], text: bytes, start: int) -> Columns:
    """The columns that describe annotations, in the order of the list, which stands in `text`; that starts at byte
    `start` of the file."""
    count = len(annotations)
    places = np.array(_places(annotations, text), dtype=np.int64).reshape(count, 3)
    return {
        "annotation_id": _integers(annotations, "id"),
        "annotation_image": _integers(annotations, "image_id"),
        "annotation_category": _integers(annotations, "category_id"),
        "bbox": np.fromiter(
            chain.from_iterable(map(attrgetter("bbox"), annotations)), dtype=np.float64, count=4 * count
        ).reshape(count, 4),
        "area": np.fromiter(map(attrgetter("area"), annotations), dtype=np.float64, count=count),
        "crowd": _booleans(annotations, "iscrowd"),
        "ignore": _booleans(annotations, "ignore"),
        "difficult": _booleans(annotations, "difficult"),
        "has_shape": places[:, 2].astype(bool),
        "segmentation_start": places[:, 0] + start,
        "segmentation_length": places[:, 1].copy(),
    }


def _integers(items: Sequence[Any], name: str) -> np.ndarray:
    return np.fromiter(map(attrgetter(name), items), dtype=np.int64, count=len(items))


def _booleans(items: Sequence[Any], name: str) -> np.ndarray:
    return np.fromiter(map(attrgetter(name), items), dtype=bool, count=len(items))


def _places(annotations: list[_Annotation], text: bytes) -> list[tuple[int, int, bool]]:
    """Of every segmentation where it starts in `text`, its length, and `_has_shape`.

    A place is right if the bytes there are those of the segmentation, so a wrong guess cannot mislead.
    """
    places, at, gap, verdicts = [], 0, 0, {}
    for annotation in annotations:
        raw = bytes(annotation.segmentation)
        if not raw:
            places.append((0, 0, True))
            continue
        guess = text.find(b'"segmentation"', at) + gap
        if not text.startswith(raw, guess):  # mostly because the gap is not known yet
            guess = text.find(raw, max(at, guess - gap))
            guess = text.find(raw) if guess < 0 else guess
            gap = guess - text.rfind(b'"segmentation"', 0, guess)
        at = guess + len(raw)
        # One polygon, enough points: nearly all, told by its commas alone.
        if raw.find(b"]") == len(raw) - 2 and raw[0] == 91 and raw.count(b",") in _ENOUGH:
            places.append((guess, len(raw), True))
            continue
        form = raw.translate(None, _NUMBER) if raw[0] == 91 else b""
        verdict = verdicts.get(form)
        if verdict is None:
            verdict = verdicts[form] = _has_shape(form)
        places.append((guess, len(raw), verdict))
    return places


def _has_shape(form: bytes) -> bool:
    """Whether brackets and commas are polygons of which at least one has three points or more. What is malformed is
    told with its annotation id once it is used, and an empty list is no polygon at all: both count as a shape."""
    if not _POLYGONS.fullmatch(form):
        return True
    lengths = [polygon.count(b",") + 1 for polygon in form[2:-2].split(b"],[")]
    return any(n >= 6 and n % 2 == 0 for n in lengths)


def _id_at(text: bytes, message: str) -> str:
    """The id of the entry that a validation message points at by its number, for people who grep for it."""
    place = re.search(r"\$\.(\w+)\[(\d+)\]", message)
    if not place:
        return ""
    try:
        entry = msgspec.json.decode(text, type=dict[str, msgspec.Raw])[place[1]]
        found = msgspec.json.decode(entry, type=list[msgspec.Raw])[int(place[2])]
        return f" (id {msgspec.json.decode(found)['id']})"
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Building a million small objects makes the collector walk them over and over: most of the loading time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
