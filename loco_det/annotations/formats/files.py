"""The files of a data set: one walk over its folders, then images are looked up by name, stem or path.

Only files found by the walk are opened, so a file name in an annotation cannot lead outside the data set: `../../x.png`
matches an `x.png` inside, or nothing. The walk follows links to folders, each folder once, and skips hidden entries,
anything but regular files, and this package's own output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.parse
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from loco_det.annotations.formats.splits import WHOLE, are_apart, split_of_folder
from loco_det.core.files import read_regular
from loco_det.core.outputs import walk_data
from loco_det.images.decode import SUFFIXES as IMAGE_SUFFIXES

_READ = (*IMAGE_SUFFIXES, ".xml", ".json", ".gz", ".yaml", ".yml", ".txt", ".names")  # read by some format
_ORIENTATION = 274  # EXIF's tag; 5 to 8 are rotated by a quarter


class Size(NamedTuple):
    """An image's size in pixels, upright; `turned` if its EXIF data rotate the stored image by a quarter."""

    width: int
    height: int
    turned: bool = False


class Match(NamedTuple):
    """An image that may belong to an annotation; of several annotations the one with the greatest claim gets it.

    A claim starts with 2 for an image at exactly the annotated place, 1 for one there below another root, 0 for one of
    the same name elsewhere, followed by the number of agreeing folders.
    """

    image: Path
    claim: tuple[int, ...]

    def as_second(self) -> Match:
        """Weaken a match found by a fallback, below any claim of the primary lookup."""
        return Match(self.image, (-1, *self.claim))


class Tree:
    """The files of supported suffixes below some folders.

    Attributes:
        source: the user's path, a folder or a file.
        root: the folder itself, or that of the file.
    """

    def __init__(self, source: Path, images: Path | None = None) -> None:
        """`images`: a folder with images, not necessarily below `source`."""
        self.source = Path(os.path.abspath(source))
        self.root = self.source if self.source.is_dir() else self.source.parent
        self.roots: list[Path] = []
        self.files: list[Path] = []
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self._known: set[Path] = set()
        self._sizes: dict[Path, Size | None] = {}
        for folder in [self.root, *([images] if images else [])]:
            self.add(Path(os.path.abspath(folder)))

    def add(self, folder: Path) -> None:
        """Walk a further folder."""
        if any(folder == root or root in folder.parents for root in self.roots):
            return
        self.roots.append(folder)
        for path in sorted(here / name for here, files, _ in walk_data(folder) for name in files):
            if path in self._known or path.suffix.lower() not in _READ or not path.is_file():
                continue
            self._known.add(path)
            self.files.append(path)
            if path.suffix.lower() in IMAGE_SUFFIXES:
                self._by_name[path.name.lower()].append(path)
                self._by_stem[path.stem].append(path)

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Return the files below `root` with one of these suffixes in any case; if the source is a file, that file."""
        if self.source != self.root:
            return [self.source] if self.source.suffix.lower() in suffixes else []
        return [path for path in self.files if path.suffix.lower() in suffixes and self.root in path.parents]

    def images(self, folder: Path | None = None) -> list[Path]:
        """Return all images, or those below a folder."""
        found = [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]
        return found if folder is None else [path for path in found if folder in path.parents]

    def is_file(self, path: Path) -> bool:
        return path in self._known

    def find(self, name: str, near: Path) -> Match | None:
        """Find the image called `name` by an annotation file in the folder `near`, or None.

        A path is tried from there and from every root; else its last part is searched everywhere except in splits that
        `near` or `name` are not in. Of several the one with the longest common end, then the nearest, is taken if it is
        unique. Everything is tried again with %20 and the like decoded.
        """
        decoded = urllib.parse.unquote(name)
        return self._find(path_parts(name), near) or (
            self._find(path_parts(decoded), near) if decoded != name else None
        )

    def _find(self, parts: list[str], near: Path) -> Match | None:
        if not parts:
            return None
        for folder in (near, *self.roots):
            path = Path(os.path.normpath(folder.joinpath(*parts)))
            if path in self._known and path.suffix.lower() in IMAGE_SUFFIXES:
                return Match(path, (2 if folder == near else 1,))
        ends = [part for part in parts if part != ".."]
        candidates = self._by_name.get(ends[-1].lower(), []) if ends else []
        exact = [path for path in candidates if path.name == ends[-1]] or candidates
        split = split_of_folder(Path(*ends[-3:]), Path())[0] if ends else WHOLE
        there = [path for path in exact if path.parent == near or not are_apart(self._split(path), split)]
        return self._best(there, near, lambda path: _common_end(path.parts, ends))

    def find_stem(self, stem: str, near: Path) -> Match | None:
        """Find the image with that stem in the folder most similar to `near`; None for none or several."""
        candidates = self._by_stem.get(stem, [])
        beside = [path for path in candidates if path.parent == near]
        if len(beside) == 1:
            return Match(beside[0], (2,))
        return self._best(candidates, near, lambda path: _common_end(path.parent.parts, near.parts))

    def _best(self, candidates: list[Path], near: Path, agreement: Callable[[Path], int]) -> Match | None:
        """Return the candidate of the greatest claim, if unique and not of another split than `near`."""
        split = self._split(near / "any")
        matches = [
            Match(path, (0, agreement(path), _common_start(path, near)))
            for path in candidates
            if not are_apart(self._split(path), split)
        ]
        matches.sort(key=lambda match: match.claim, reverse=True)
        if len(matches) > 1 and matches[0].claim == matches[1].claim:
            return None
        return matches[0] if matches else None

    def _split(self, path: Path) -> str:
        root = next((root for root in self.roots if root in path.parents), self.root)
        return split_of_folder(path, root)[0]

    def size(self, image: Path) -> Size | None:
        """Return the size from the image's header; None if unreadable."""
        if image not in self._sizes:
            self._sizes[image] = _read_size(image)
        return self._sizes[image]

    def name(self, path: Path) -> str:
        """Return the path for messages, relative to the root if below it."""
        return path.relative_to(self.root).as_posix() if self.root in path.parents else str(path)


def path_parts(name: str) -> list[str]:
    """ "C:\\x\\a.jpg", "file:///x/a%20b.jpg", "/data/local-files/?d=x/a.jpg" -> the parts of the path."""
    if "\0" in name:
        return []
    if "?d=" in name or "://" in name:
        with contextlib.suppress(ValueError):  # not a URL after all: a path
            address = urllib.parse.urlsplit(name)
            name = urllib.parse.parse_qs(address.query).get("d", [urllib.parse.unquote(address.path)])[0]
    name = re.sub(r"^[A-Za-z]:", "", name.strip().replace("\\", "/"))
    return [part for part in name.split("/") if part not in ("", ".")]


def _common_end(path: tuple[str, ...], parts: list[str]) -> int:
    count = 0
    for ours, theirs in zip(reversed(path), reversed(parts)):
        if ours != theirs:
            break
        count += 1
    return count


def _common_start(path: Path, folder: Path) -> int:
    """Count the leading path parts of `folder` that the image shares; one more if the image is in it."""
    shared = os.path.commonpath([path.parent, folder])
    return 2 * len(Path(shared).parts) + (path.parent == folder)


def _read_size(image: Path) -> Size | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(image) as opened:
                width, height = opened.size
                turned = opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # PIL's parsers raise various exceptions on hostile bytes
        return None
    return Size(height, width, True) if turned else Size(width, height)


# --- reading -----------------------------------------------------------------------------------------------------


class Unreadable(Exception):
    """A file is not of its format; the message has the position."""


def read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def read_text(path: Path) -> str:
    """Read text; raises Unreadable if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} is no UTF-8") from None


def read_xml(path: Path) -> ElementTree.Element:
    """Parse an XML file and return its root element.

    A file that declares entities is refused: they can expand a few lines to gigabytes, and no annotation tool writes
    them. Parameter and external entities are declared the same way, and expat fetches no DTD.

    Raises:
        Unreadable: malformed, cut off, or with entities.
    """
    data = read_bytes(path)
    if b"<!ENTITY" in data.replace(
        b"\0", b""
    ):  # UTF-16 has zeros between; expat's other encodings are ASCII-compatible
        raise Unreadable("it declares entities, which are not read")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two for encodings
        raise Unreadable(str(error)) from None


def read_json(path: Path) -> Any:
    """Read a JSON file as plain data, including NaN, which Python's own writer emits.

    Raises:
        Unreadable: malformed, cut off or nested too deep.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise Unreadable("it is nested too deep") from None
    except ValueError as error:  # also an integer with more digits than Python converts
        raise Unreadable(str(error)) from None
