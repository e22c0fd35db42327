"""webdataset's tar shards, for data sets larger than one disk: read front to back, shuffled and resumable.

A sample is a sequence of files with a common name up to the first dot: `000017.jpg`, and `000017.cls` with its class as
text, if labelled. webdataset (extra `webdataset`) finds the shards and reads their streams. An index of the headers is
built once and cached (`core.files.cache_folder`), and again when a shard's size or time changes. With it an epoch's
order is known before reading, independent of workers and ranks, and resuming starts reading at the next image.

Order of an epoch: the shards, concatenated in an order drawn for the epoch, are cut into S equal runs of images (a
shard on a cut is read by both neighbours, each its part; the remainder at the end, less than a batch, differs between
epochs). Each run has its own shuffle buffer, and each global batch takes equally many images from every run. Runs, not
batches, are assigned to ranks and workers.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, cache_folder, stat_line
from loco_det.core.log import Progress
from loco_det.images.decode import SUFFIXES
from loco_det.images.source import Source
from loco_det.images.views import stream

_SHARDS, _BUFFER = 2**63 + 1, 2**63 + 2  # random streams beyond any image's index
_MOST_RUNS = 64
_LONGEST_LABEL = 1 << 16  # bytes
_INDEX_VERSION = 2


class TarSource(Source):
    """Labelled or unlabelled images in tar shards; `run` reads them in training order, `read` any single one."""

    def __init__(self, root: str, shards: Sequence[Path], index: dict[str, np.ndarray]) -> None:
        names = index["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
        self.containers = self.shards = [str(shard) for shard in shards]
        # (shards + 1,): index of each shard's first image.
        self.starts = np.concatenate([[0], np.cumsum(index["counts"])])
        self._place = index["place"]  # (images, 3): first header of the sample; the image's offset and size
        labels = index["labels"].tobytes().decode().split("\0") if len(index["labels"]) else None
        super().__init__(root, names, labels)
        if labels and all(name.isdecimal() for name in self.classes):  # numeric order: 2 before 10
            order = sorted(range(len(self.classes)), key=lambda k: int(self.classes[k]))
            self._labels = np.argsort(order).astype(np.int32)[self._labels]
            self.classes = [self.classes[k] for k in order]

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard(index)]}!{self._names[index]}"

    def read(self, index: int) -> bytes:
        shard, (_, offset, size) = self.shards[self._shard(index)], self._place[index].tolist()
        try:
            with open(shard, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise UserError(f"{shard}: cannot be read ({error.strerror}); check the file and its rights") from error
        if len(data) != size:
            raise UserError(f"{self.name(index)}: the shard ends inside it; take an intact one")
        return data

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def runs(self, batch: int, world_size: int) -> int:
        """Return the number of runs per epoch: the most, up to one per shard and 64, that divide a global batch.

        If the ranks cannot share these, the next number that they can; powers of two always can, with at least as many
        shards as ranks.
        """
        most = next(n for n in range(min(_MOST_RUNS, len(self.shards), batch), 0, -1) if batch % n == 0)
        if most % world_size == 0:
            return most
        return next(n for n in range(max(most, world_size), 0, -1) if batch % n == 0 and n % world_size == 0)

    def run(
        self, run: int, length: int, *, buffer: int, seed: int, epoch: int, first: int = 0
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (image, encoded bytes) of one run of an epoch, from `first` on in the order after the shuffle buffer.

        Args:
            length: images in a run.
            buffer: size of its shuffle buffer, in images.

        Raises:
            UserError: a shard is damaged or has changed.
        """
        images = self._images(run * length, length, seed, epoch)
        order = buffered_order(length, buffer, stream(seed, epoch, _BUFFER + run))
        due = np.empty(length, np.int64)
        due[order] = np.arange(length)
        reader = self._read_through(images, due >= first)
        waiting: dict[int, bytes] = {}
        for place in order[first:].tolist():
            while place not in waiting:
                here, data = next(reader)
                waiting[here] = data
            yield int(images[place]), waiting.pop(place)

    def _images(self, first: int, length: int, seed: int, epoch: int) -> np.ndarray:
        """Return the images at positions first, first + 1, ... of the epoch's concatenated shards."""
        shards = stream(seed, epoch, _SHARDS).permutation(len(self.shards))
        counts = np.diff(self.starts)[shards]
        ends = np.cumsum(counts)
        places = np.arange(first, first + length)
        at = np.searchsorted(ends, places, "right")
        return self.starts[shards[at]] + places - (ends - counts)[at]

    def _read_through(self, images: np.ndarray, wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Yield (position, bytes) of the wanted images; each shard is opened at its first wanted one."""
        tariterators = _webdataset().tariterators
        shards = np.searchsorted(self.starts, images, "right") - 1
        for shard in dict.fromkeys(shards[wanted].tolist()):
            places = np.flatnonzero((shards == shard) & wanted)
            path = self.shards[shard]
            try:
                with open(path, "rb") as file:
                    file.seek(int(self._place[images[places[0]], 0]))  # a header: from here on the file is a tar, too
                    files = tariterators.tar_file_expander([{"url": path, "stream": file}], select_files=_is_image)
                    samples = tariterators.group_by_keys(files)
                    for place in range(places[0], places[-1] + 1):
                        sample = next(samples)
                        suffix = next(name for name in sample if f".{name}" in SUFFIXES)
                        if f"{sample['__key__']}.{suffix}".lower() != self._names[images[place]].lower():
                            raise UserError(f"{path}: has changed since it was indexed; start again")
                        if wanted[place]:
                            yield place, sample[suffix]
            except (OSError, tarfile.TarError, StopIteration, ValueError) as error:
                raise UserError(
                    f"{path}: not readable as a tar ({type(error).__name__}); take an intact shard"
                ) from error


def buffered_order(count: int, buffer: int, generator: np.random.Generator) -> np.ndarray:
    """Return the (count,) order in which 0, 1, ... leave a shuffle buffer: a random one goes, the next replaces it."""
    held = list(range(min(max(buffer, 1), count)))
    order = np.empty(count, np.int64)
    coming = len(held)
    for k, draw in enumerate(generator.random(count).tolist()):
        slot = int(draw * len(held))
        order[k] = held[slot]
        if coming < count:
            held[slot] = coming
            coming += 1
        else:
            held[slot] = held[-1]
            held.pop()
    return order


def open_tar(path: str, root: Path) -> TarSource:
    """Open `path`: a shard, a folder of shards, or a brace pattern: `train-{0000..0146}.tar`.

    Raises:
        UserError: no shard, not a plain tar, or no image in them; names the shard.
    """
    _webdataset()
    shards = sorted(root.glob("*.tar")) if os.path.isdir(root) else [Path(name) for name in expand_braces(path)]
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing or not shards:
        what = f"shard {missing[0]} is not there" if missing else "no .tar in this folder"
        raise UserError(f"DATA.PATH {path}: {what}; correct the path")
    facts = [(str(shard.resolve()), stat_line(shard.stat())) for shard in shards]
    digest = hashlib.sha256(repr((_INDEX_VERSION, SUFFIXES, facts)).encode()).hexdigest()
    cache = cache_folder() / "shards" / f"{digest}.npz"
    index = _cached(cache, len(shards))
    if index is None:
        index = _index(path, shards)
        try:
            with atomic_write(cache) as file:
                np.savez(file, **index)
        except UserError:  # continue without the cache
            pass
    return TarSource(path, shards, index)


def expand_braces(path: str) -> list[str]:
    """Expand `a-{00..02}.tar` to a-00.tar, a-01.tar, a-02.tar."""
    if "{" not in path:
        return [path]
    try:
        return list(_webdataset().shardlists.expand_urls(path))
    except ValueError as error:
        raise UserError(f"DATA.PATH {path}: {error}; correct the braces, as in train-{{000..099}}.tar") from None


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "DATA.FORMAT tar needs webdataset, which is not installed: pip install 'loco_det[webdataset]'"
        ) from None
    return webdataset


def _cached(path: Path, shards: int) -> dict[str, np.ndarray] | None:
    """Read the saved index; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            index = {name: file[name] for name in ("names", "place", "counts", "labels")}
    except Exception:  # hostile bytes make NumPy's reader raise nearly anything
        return None
    images = int(index["counts"].sum())
    sound = len(index["counts"]) == shards and index["place"].shape == (images, 3)
    return index if sound and index["names"].tobytes().count(b"\0") == images - 1 else None


def _index(path: str, shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """Index all samples from the shards' headers, skipping the bytes of images."""
    names: list[str] = []
    labels: list[str] = []
    place: list[tuple[int, int, int]] = []
    counts = []
    with Progress(len(shards), "index of tar shards", unit="shards") as progress:
        for shard in shards:
            before = len(names)
            for name, where, label in _samples(shard):
                names.append(name)
                place.append(where)
                labels.append(label)
            counts.append(len(names) - before)
            progress.advance()
    if not names:
        raise UserError(f"DATA.PATH {path}: no images in these shards (looked for {' '.join(SUFFIXES)})")
    if any(labels) and not all(labels):
        raise UserError(f"DATA.PATH {path}: {names[labels.index('')]} has no .cls while others have one; add it")
    text = ("\0".join(names).encode("utf-8", "surrogateescape"), "\0".join(labels).encode() if any(labels) else b"")
    return {
        "names": np.frombuffer(text[0], np.uint8),
        "labels": np.frombuffer(text[1], np.uint8),
        "place": np.array(place, np.int64),
        "counts": np.array(counts, np.int64),
    }


def _samples(shard: Path) -> Iterator[tuple[str, tuple[int, int, int], str]]:
    """Yield (file name, (first header, offset, size), class or "") of every image, grouped as in webdataset."""
    found: dict[str, Any] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # otherwise it keeps them all
                key, suffix = _split(member.name)
                if not member.isreg() or not key:
                    continue
                if key != found.get("key"):
                    yield from _finished(found)
                    found = {"key": key, "header": member.offset, "label": ""}
                if f".{suffix}" in SUFFIXES and "image" not in found:
                    found["image"] = (member.name, member.offset_data, member.size)
                elif suffix == "cls":
                    found["label"] = tar.extractfile(member).read(_LONGEST_LABEL).decode().strip()
            tar.fileobj.seek(tar.offset)
            # tarfile treats a truncated or damaged header as the end.
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"at byte {tar.offset:,} is neither a header nor the end")
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:  # the latter two of sizes that cannot be
        raise UserError(f"{shard}: not readable as a plain tar ({error}); take an intact, uncompressed one") from error
    yield from _finished(found)


def _finished(found: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int, int], str]]:
    if "image" in found:
        name, offset, size = found["image"]
        yield name, (found["header"], offset, size), found["label"]


def _split(name: str) -> tuple[str, str]:
    """Split a name as webdataset does into (key, lower-case suffix); empty for hidden files and `__meta__` ones."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2].lower()) if match and not re.match(r"__[^/]*__($|/)", name) else ("", "")


def _is_image(name: str) -> bool:
    return f".{_split(name)[1]}" in SUFFIXES
