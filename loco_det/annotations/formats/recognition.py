"""Recognises the format of a folder or file by the first bytes of its files.

COCO files may have gigabytes, so only the keys at the beginning are parsed, down to those of the first entry of a list
or mapping. If they are inconclusive, the names of all keys are read.
"""

from __future__ import annotations

import errno
import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import msgspec

from loco_det.annotations.formats import cvat, label_studio, png_masks, voc_xml, yolo
from loco_det.annotations.formats.files import Tree
from loco_det.core.errors import UserError

_HEAD = 1 << 16  # bytes
_PEEKED = 100  # JSON files that are opened to recognise a folder
_GZIP = b"\x1f\x8b"
_TOKEN = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"(\s*:)?|[\[\]{}]|"', re.DOTALL)


def recognise(tree: Tree) -> list[str]:
    """Return the formats of `conversion.FORMATS`, or "coco", that a folder or file may have; several, or none.

    Raises:
        UserError: a file cannot be read.
    """
    found = _of_xml(tree.with_suffix(*voc_xml.SUFFIXES))
    if yolo.find_settings(tree) if tree.source == tree.root else tree.source.suffix.lower() in yolo.SUFFIXES:
        found.append("yolo")
    files = [path for path in tree.with_suffix(".json", ".gz") if path.name.lower().endswith((".json", ".json.gz"))]
    of_json = {name for path in files[:_PEEKED] if (name := json_format(path))}
    found += sorted(of_json - {"coco"} or of_json)
    if not found and tree.source == tree.root and any(png_masks.is_mask(path, tree.root) for path in tree.files):
        found.append("png")
    return found


def _of_xml(files: list[Path]) -> list[str]:
    """Return the kind of the first valid XML file; if all are damaged VOC, whose reader reports the error."""
    broken = False
    for path in files:
        tag = _root_element(_head(path)[0])
        if tag in (voc_xml.ROOT_ELEMENT, cvat.ROOT_ELEMENT):
            return ["voc" if tag == voc_xml.ROOT_ELEMENT else "cvat"]
        broken |= tag is None
    return ["voc"] if broken else []


def _root_element(head: bytes) -> str | None:
    if b"<!ENTITY" in head.replace(b"\0", b""):
        return None  # entities are never expanded, see `files.read_xml`
    parser = ElementTree.XMLPullParser(["start"])
    try:
        parser.feed(head)
        return next((element.tag for _, element in parser.read_events()), None)
    except (ElementTree.ParseError, ValueError, LookupError):  # the latter two for encodings
        return None


# --- JSON --------------------------------------------------------------------------------------------------------


class _Keys(NamedTuple):
    """The keys of a list or mapping, and those of its first entry; `all` if the first set is complete."""

    own: set[str]
    first: set[str]
    all: bool


def json_format(path: Path) -> str | None:
    """Return a format of `conversion.FORMATS`, "coco", or None for other JSON and for invalid JSON.

    Raises:
        UserError: the file cannot be read.
    """
    head, whole = _head(path)
    encoding = json.detect_encoding(head)
    text = head.decode(encoding, "replace")
    opening = text.lstrip()[:1]
    found = _format(opening, _keys(text, whole))
    if found is None and not whole and opening == "{":
        try:
            keys = msgspec.json.decode(path.read_bytes().decode(encoding), type=dict[str, msgspec.Raw])
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        found = _format("{", _Keys(set(keys), set(), True))
    return found


def _format(opening: str, keys: _Keys) -> str | None:
    own, first = keys.own, keys.first

    def has(found: set[str], *names: str) -> bool:
        """Whether all names were found, or one if not all keys are known."""
        return set(names) <= found or (not keys.all and not found.isdisjoint(names))

    if opening == "[":
        tasks = "data" in first or (not keys.all and "annotations" in first)
        return "labelstudio" if tasks or label_studio.MIN_KEYS & first else None
    if has(own, "images", "annotations") or has(own, "images", "categories"):
        return "coco"
    if any(key.startswith("_via_") for key in own) or has(first, "filename", "regions"):
        return "via"
    return "labelme" if has(own, "shapes", "imagePath") or (not keys.all and "imageData" in own) else None


def _keys(text: str, whole: bool) -> _Keys:
    own: set[str] = set()
    first: set[str] = set()
    depth = entries = 0
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            entries += depth == 2
        elif token[0] in "]}":
            depth -= 1
        elif token[0] == '"':  # cut off
            break
        elif token[2] and depth == 1:
            own.add(token[1])
        elif token[2] and depth == 2 and entries == 1:
            first.add(token[1])
    return _Keys(own, first, whole)


def _head(path: Path) -> tuple[bytes, bool]:
    """Return the first bytes of a file, decompressed if it is gzip; and whether they are all."""
    try:
        if not path.is_file():
            raise OSError(errno.EINVAL, "is no regular file")
        with open(path, "rb") as file:
            data = file.read(_HEAD)
            whole = not file.read(1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not data.startswith(_GZIP):
        return data, whole
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        return unpacker.decompress(data, _HEAD), unpacker.eof
    except zlib.error:
        return b"", True
