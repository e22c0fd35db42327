"""A COCO annotation file as compact arrays, in a cache that every process memory-maps.

The JSON is parsed once (`coco_json.py`). Everything but the segmentations becomes arrays, a tenth of the file;
segmentations are kept as offsets into the JSON and read on use. Of a file that is not strict COCO, a strict copy is
made (`lenient.py`). Validation is in `rules.py`.

A cache file is valid if its checksum is right and the JSON is unchanged: by size, times and inode, or, if these differ
or are too recent, and always for a small file, by its sha256. Otherwise it is rebuilt.

Shape legend: K categories, I images, A annotations. Categories and images are sorted by id, annotations grouped by
image, in file order within one, those of unlisted images last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import stat
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loco_det.annotations.coco_json import MALFORMED, parse
from loco_det.annotations.lenient import rewritten
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, cache_folder, file_sha256, locked, read_regular
from loco_det.core.log import log
from loco_det.images.packed import PackedStrings

_MAGIC = b"LOCOIDX4"  # increase when the cache format changes
_ALIGN = 64
_SMALL = 1 << 24  # bytes of JSON up to which the hash is always compared, in a hundredth of a second
# A file changed this shortly before it was read can change again without a new time stamp.
_SETTLED_NS = 2_000_000_000


class Stamp(NamedTuple):
    """The properties by which a file is known to be unchanged without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class AnnotationFile:
    """The JSON of an index, for reading segmentations; refuses to read changed content.

    Attributes:
        sha256: of the content, in hexadecimal.
        stamp: of the file with this content.
        seen_ns: time of the stamp, nanoseconds since the epoch.
    """

    def __init__(self, path: Path, sha256: str, stamp: Stamp, seen_ns: int):
        self.path, self.sha256, self.stamp, self.seen_ns = path, sha256, Stamp(*stamp), seen_ns
        self._fd: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AnnotationFile, (self.path, self.sha256, self.stamp, self.seen_ns)

    def facts(self) -> dict[str, Any]:
        """Return its attributes except the path, as plain data."""
        return {"sha256": self.sha256, "stamp": self.stamp, "seen_ns": self.seen_ns}

    def __del__(self, close: Any = os.close) -> None:  # at interpreter exit `os` may be gone
        if getattr(self, "_fd", None) is not None:
            close(self._fd)

    def read(self, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Read bytes at the given offsets. Forked processes share the descriptor.

        Raises:
            UserError: the file cannot be read or its content has changed.
        """
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY)
            now = Stamp.of(os.fstat(self._fd))
            if now != self.stamp:
                if now.size != self.stamp.size or file_sha256(self.path) != self.sha256:
                    raise UserError(f"{self.path} was changed while it was in use; start again.")
                self.stamp = now  # touched or moved
            return [os.pread(self._fd, n, start) for start, n in zip(starts, lengths)]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from None


@dataclass(frozen=True)
class CocoIndex:
    """A complete annotation file. Arrays are in memory or, read-only, in the mapped cache file.

    A mapped index is pickled as the path of its JSON.
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
    annotation_image: np.ndarray  # (A,) int64, an image id; from first[I] on of unlisted images
    annotation_category: np.ndarray  # (A,) int64, a category id
    bbox: np.ndarray  # (A, 4) float64: x, y, width, height in pixels
    area: np.ndarray  # (A,) float64, square pixels; NaN if missing
    crowd: np.ndarray  # (A,) bool
    ignore: np.ndarray  # (A,) bool, the key "ignore"
    difficult: np.ndarray  # (A,) bool, the key "difficult", of Pascal VOC
    shape: np.ndarray  # (A,) uint8: NO_MASK, POLYGONS, TOO_FEW_POINTS, RLE or OTHER of coco_json.py
    segmentation_start: np.ndarray  # (A,) int64, byte in the JSON
    segmentation_length: np.ndarray  # (A,) int64, bytes; 0 if there is none
    copy: AnnotationFile | None = None  # strict copy that was read instead, if the file is not strict COCO
    notes: dict[str, int] = field(default_factory=dict)  # numbers of entries that were read differently, by kind
    mapped: bool = False

    @property
    def path(self) -> Path:
        """The annotation file."""
        return self.file.path

    @property
    def readable(self) -> Path:
        """The annotation file, or its strict copy, for any reader of COCO files."""
        return (self.copy or self.file).path

    @property
    def file_name(self) -> PackedStrings:
        """The I file names."""
        return PackedStrings(self.name_data, self.name_offsets)

    @property
    def categories(self) -> dict[int, str]:
        """{category id: name} by ascending id, the order of a model's classes."""
        return dict(zip(self.category_id.tolist(), self.category_names))

    def segmentations(self, rows: np.ndarray | slice) -> list[bytes]:
        """Read encoded segmentations of some annotations from the JSON; b"" if there is none.

        Raises:
            UserError: as `AnnotationFile.read`.
        """
        starts, lengths = self.segmentation_start[rows].tolist(), self.segmentation_length[rows].tolist()
        return (self.copy or self.file).read(starts, lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mapped:
            return _load_same, (self.path, self.file.sha256)
        return CocoIndex, tuple(getattr(self, f.name) for f in fields(self))


_WAITING = "%s: waiting for another process that builds the index"
_ARRAYS = tuple(f.name for f in fields(CocoIndex) if f.type == "np.ndarray")


def load_index(annotations: str | Path) -> CocoIndex:
    """Load the index of a COCO annotation file from the cache; built and cached if missing.

    If several processes need it, one builds it and the others wait. If the cache cannot be written, the index stays in
    memory, with a line in the log. Values that were read differently are logged once.

    Raises:
        UserError: unreadable or not a COCO annotation file, or its strict copy cannot be written.
    """
    path = Path(annotations).absolute()
    cache = _cache_file(path)
    index = _open(cache, path)
    if index is None or not _unchanged(index.file):
        index = _renewed(cache, path)
    if index.copy is not None:
        _log_notes(path, index.readable, ", ".join(f"{count} x {kind}" for kind, count in index.notes.items()))
    return index


def _renewed(cache: Path, path: Path) -> CocoIndex:
    """Rebuild the index and its cache file under the lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # without locks builders work in parallel, and the last one's file remains
            stack.enter_context(locked(cache.with_suffix(".lock"), lambda: log.info(_WAITING, path)))
            for left in cache.parent.glob(f".{escape(cache.stem)}.*.tmp"):  # of a killed builder
                left.unlink()
        index = _open(cache, path)  # built while this process waited
        if index is not None and _unchanged(index.file):
            return index
        index = _confirmed(index) or _build(path, cache)
        try:
            if _is_settled(index.file) or not index.mapped:
                _save(index, cache)
                index = _open(cache, path) or index
        except (UserError, OSError) as error:
            log.info("the index of %s is not cached: %s (set LOCO_DET_CACHE to another folder)", path, error)
    return index


@functools.cache  # once per process
def _log_notes(path: Path, copy: Path, notes: str) -> None:
    log.warning("%s is not strict COCO and was read as %s: %s", path, copy, notes)


def _load_same(path: Path, sha256: str) -> CocoIndex:
    index = load_index(path)
    if index.file.sha256 != sha256:
        raise UserError(f"{path} was changed while it was in use; start again.")
    return index


# --- validity of a cached index -----------------------------------------------------------------------------------


def _stamp(path: Path) -> Stamp:
    """Return the file's stamp after flushing it to disk.

    Linux updates the times of a memory-mapped page only on the first write after a flush, not on later ones, which may
    follow for half a minute: only for a flushed file every change shows. Opening it also makes a network file system
    refresh the stamp.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path} is no regular file; name an annotation file.")
        fd = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not supported by the file system
                os.fsync(fd)
            return Stamp.of(os.fstat(fd))
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _is_settled(file: AnnotationFile) -> bool:
    return file.seen_ns - max(file.stamp.mtime_ns, file.stamp.ctime_ns) > _SETTLED_NS


def _unchanged(file: AnnotationFile) -> bool:
    if _stamp(file.path) != file.stamp:
        return False
    return _is_settled(file) if file.stamp.size > _SMALL else file_sha256(file.path) == file.sha256


def _confirmed(index: CocoIndex | None) -> CocoIndex | None:
    """Return the index with the file's current stamp if the content is unchanged, else None."""
    if index is None:
        return None
    path, seen = index.path, time.time_ns()
    stamp = _stamp(path)
    if stamp.size != index.file.stamp.size or file_sha256(path) != index.file.sha256 or _stamp(path) != stamp:
        return None
    return replace(index, file=AnnotationFile(path, index.file.sha256, stamp, seen))


# --- the cache file ---------------------------------------------------------------------------------------------
# magic, crc32 of everything that follows, length of the header, header (JSON), arrays at multiples of _ALIGN


def _cache_file(path: Path) -> Path:
    place = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return cache_folder() / f"{path.stem}-{place}.index"


def _save(index: CocoIndex, cache: Path) -> None:
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    columns, end = {}, 0
    for name, array in arrays.items():
        columns[name] = (array.dtype.str, array.shape, end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    facts = {
        "source": index.file.facts(),
        "copy": index.copy and index.copy.facts(),
        "notes": dict(index.notes),
        "category_names": index.category_names,
        "columns": columns,
    }
    header = json.dumps(facts).encode()
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
    """Map a cache file into memory; None unless it is complete and of this version."""
    try:
        with open(cache, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # missing or empty
        return None
    # The arrays are small enough to be read completely each time; no cheaper test detects a flipped bit.
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
        source, copy, notes = AnnotationFile(path, **header["source"]), None, dict(header["notes"])
        if header["copy"] is not None:
            copy = AnnotationFile(cache.with_suffix(".json"), **header["copy"])
            if file_sha256(copy.path) != copy.sha256:
                return None
        return CocoIndex(source, tuple(header["category_names"]), **arrays, copy=copy, notes=notes, mapped=True)
    except (ArithmeticError, LookupError, OSError, RecursionError, TypeError, ValueError):  # not a file of ours
        return None


# --- from the JSON ----------------------------------------------------------------------------------------------


def _build(path: Path, cache: Path) -> CocoIndex:
    """Build a file's index in memory; if the file is not strict COCO, write a strict copy beside `cache`."""
    seen = time.time_ns()
    stamp = _stamp(path)
    try:
        text = read_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    copy, notes = None, {}
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(lambda: hashlib.sha256(text).hexdigest())
        try:
            content = parse(text)
        except MALFORMED:
            text_of_copy, notes = rewritten(text, path)
            content = parse(text_of_copy)
            copy = _written(cache.with_suffix(".json"), text_of_copy)
        file = AnnotationFile(path, digest.result(), stamp, seen)
    if _stamp(path) != stamp:
        raise UserError(f"{path} was changed while it was read; start again.")
    return CocoIndex(file, content.category_names, **content.columns, copy=copy, notes=notes)


def _written(path: Path, text: bytes) -> AnnotationFile:
    try:
        with atomic_write(path) as file:
            file.write(text)
    except UserError as error:
        raise UserError(f"{error} (set LOCO_DET_CACHE to another folder for copies of annotation files)") from None
    return AnnotationFile(path, hashlib.sha256(text).hexdigest(), _stamp(path), time.time_ns())
