"""Reads images, folders of them and videos as one stream of frames, and writes videos, by OpenCV."""

from __future__ import annotations

import glob
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np

from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.core.outputs import own_names, walk_data
from loco_det.images.decode import SUFFIXES, Order, count_frames, log_unread, read_image

PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


class Medium(NamedTuple):
    """One file.

    Attributes:
        name: its path below the input.
        frames: 1 for an image; an estimate of at least 1 for a video.
        rate: frames a second of a video; 0 for an image.
    """

    path: Path
    name: str
    frames: int = 1
    rate: float = 0.0

    @property
    def is_video(self) -> bool:
        return self.rate > 0


class Frame(NamedTuple):
    """(H, W, 3) uint8 pixels of an image or of a video's frame `index`."""

    medium: Medium
    index: int
    pixels: np.ndarray


def find_media(
    inputs: Sequence[str | Path], places: Callable[[str, bool], Sequence[str]] = lambda name, is_video: [name]
) -> tuple[list[Medium], list[Path]]:
    """Find the files of `inputs`, files and folders; of a folder all images and videos below it, by name.

    Output of `predict` is skipped with a line in the log, whether it is in a folder or an input itself.

    Args:
        places: maps a name, possibly a video's, to the relative paths of the files to be written.

    Returns:
        The media, with names whose output files are all distinct, and the videos that OpenCV cannot open.

    Raises:
        UserError: an input is missing, or a folder has no usable file.
    """
    files: list[tuple[Path, Path]] = []
    for given in itertools.chain.from_iterable(map(_expanded, inputs)):
        if given.is_dir():
            everything = _data_below(given)
            below = [path for path in everything if path.suffix.lower() in (*SUFFIXES, *VIDEOS)]
            log_unread(str(given), [path.name for path in everything])
            if not below:
                raise UserError(f"{given}: no image or video in this folder; name another, or the files themselves.")
            files += [(path, path.relative_to(given)) for path in below]
        elif given.suffix.lower() in PACKED and given.is_file():
            raise UserError(f"{given}: is an archive; unpack it and name the folder.")
        elif not given.is_file():
            raise UserError(f"{given}: no such file or folder; correct the path.")
        elif own_names(given.parent, [given.name]):
            log.warning("%s: written by this package, not an input: skipped", given)
        else:
            files.append((given, Path(given.name)))
    if not files:
        raise UserError(f"{', '.join(map(str, inputs))}: nothing but what predict wrote; name your own images.")
    found, unreadable, taken = [], [], Places()
    for path, relative in files:
        is_video = path.suffix.lower() in VIDEOS
        name = next(name for name in _names(relative) if taken.add(places(name, is_video)))
        medium = _video(path, name) if is_video else Medium(path, name)
        if medium is None:
            log.warning("%s: not a video that OpenCV can read: skipped", path)
            unreadable.append(path)
        else:
            found.append(medium)
    return found, unreadable


def _expanded(given: str | Path) -> list[Path]:
    """Expand a pattern, if no file has that name and no shell has expanded it."""
    path = Path(given)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise UserError(f"{given}: no file matches this pattern; correct it.")
    return found


def _data_below(folder: Path) -> list[Path]:
    return sorted(path for here, names, _ in walk_data(folder) for path in map(here.joinpath, names) if path.is_file())


def _names(path: Path) -> Iterator[str]:
    """Yield the path, then numbered variants without end: in its last part or, if a folder is in the way, its first."""
    yield path.as_posix()
    top = Path(path.parts[0])
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}_{number}{path.suffix}").as_posix()
        yield Path(f"{top.stem}_{number}{top.suffix}", *path.parts[1:]).as_posix()


class Places:
    """Output files, as relative paths; no file is another's folder."""

    def __init__(self) -> None:
        self.files: set[PurePosixPath] = set()
        self.folders: set[PurePosixPath] = set()

    def add(self, names: Iterable[str]) -> bool:
        """Reserve all of these files if they do not conflict with earlier ones; returns whether they were reserved."""
        files = set(map(PurePosixPath, names))
        folders = {folder for file in files for folder in file.parents}
        if not (files.isdisjoint(self.files) and files.isdisjoint(self.folders) and folders.isdisjoint(self.files)):
            return False
        self.files |= files
        self.folders |= folders
        return True


def _video(path: Path, name: str) -> Medium | None:
    capture = cv2.VideoCapture(str(path))
    try:
        rate = capture.get(cv2.CAP_PROP_FPS)
        frames = max(1, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        return Medium(path, name, frames, rate if 0 < rate < 1000 else 25.0) if capture.isOpened() else None
    finally:
        capture.release()


def read_frames(media: Sequence[Medium], order: Order, unreadable: list[Path]) -> Iterator[Frame]:
    """Yield every image and every frame of every video, in order; unreadable ones are logged and appended."""
    for medium in media:
        try:
            if medium.is_video:
                yield from _frames(medium, order)
            else:
                yield Frame(medium, 0, read_image(medium.path, order))
                if (frames := count_frames(medium.path)) > 1:
                    log.warning(
                        "%s: only the first of its %d frames is used; for all, save a video", medium.path, frames
                    )
        except UserError as error:
            log.warning("%s: left out", error)
            unreadable.append(medium.path)


def _frames(medium: Medium, order: Order) -> Iterator[Frame]:
    capture = cv2.VideoCapture(str(medium.path))
    try:
        index = 0
        while True:
            more, pixels = capture.read()
            if not more:
                break
            yield Frame(medium, index, pixels if order == "BGR" else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            index += 1
        if not index:
            raise UserError(f"{medium.path}: not one frame can be decoded")
    finally:
        capture.release()


def read_ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """Yield the same items, up to `count` of them prepared ahead by another thread."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item


class VideoWriter:
    """Context manager for an MPEG-4 file that appears when all frames are written, or not at all."""

    def __init__(self, path: Path, rate: float, width: int, height: int) -> None:
        self.path, self.partial = path, path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = cv2.VideoWriter(str(self.partial), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
        if not self.writer.isOpened():
            raise UserError(f"{path}: this OpenCV cannot write a video there; see the folder and its codecs.")

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, pixels: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 RGB."""
        self.writer.write(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: object, *_: object) -> None:
        self.writer.release()
        if kind is None:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink(missing_ok=True)
