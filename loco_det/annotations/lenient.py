"""Reads annotation files that are not strict COCO but unambiguous.

`rewritten` converts one to a strict file, keeping every key, and counts the values that it reads differently:

| in the file | read as |
|---|---|
| compressed by gzip, a byte-order mark, UTF-16 or UTF-32 | plain UTF-8 |
| NaN, Infinity | null |
| an id as "7" or 7.0 | 7 |
| ids of which one is not a number, such as a UUID | numbers from 1 on, in the order of the ids as text |
| height, width, iscrowd, ignore or difficult as "640", 640.0 or true | 640, or 0 or 1 |
| an area, or one of a bbox's four numbers, as "12.5"; a bbox as "[1, 2, 3, 4]" | the number |
| iscrowd, ignore or difficult null | 0 |
| an area that is null or not a number | absent |
| a bbox that is null, [] or absent | the box around the segmentation |
| no annotation with an id | ids from 1 on |
| a category's name or a file_name as a number; a category without a name | its text; its id |

Everything else is refused in one sentence, with the number of entries of each kind.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from loco_det.annotations.segmentation import box_around, decode
from loco_det.core.device import no_garbage_collection
from loco_det.core.errors import UserError

_GZIP = b"\x1f\x8b"
_MOST_UNPACKED = 1 << 28  # bytes that a compressed file may always unpack to; beyond, 100 times its size
_WHOLE = re.compile(r"\s*([+-]?\d{1,19})(?:\.0*)?\s*")
_INT64 = range(-(2**63), 2**63)
_TABLES = {"images": "image", "categories": "category", "annotations": "annotation"}

Entry = dict[str, msgspec.Raw]
Convert = Callable[[Any], Any]  # returns a valid value itself, None to leave it out; ValueError: the expected type

_decode_file = msgspec.json.Decoder(Entry).decode
_decode_entries = msgspec.json.Decoder(list[Entry]).decode


def rewritten(text: bytes, path: Path) -> tuple[bytes, dict[str, int]]:
    """Convert `text` to a strict annotation file.

    Args:
        path: for messages.

    Returns:
        The file, and the number of entries read differently, by kind.

    Raises:
        UserError: no JSON, no annotation file, or entries without a meaning.
    """
    account = _Account(path)
    try:
        with no_garbage_collection():
            file, tables = _tables(_standard(text, account), path)
            _convert(tables, account)
            account.close()
            lists = {key: b"[" + b",\n".join(map(msgspec.json.encode, tables[key])) + b"]" for key in tables}
            whole = msgspec.json.encode(file | {key: msgspec.Raw(text) for key, text in lists.items()})
            return whole, dict(account.read)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # in a text
        raise account.no_json(error) from None


class _Account:
    """Values read differently and unreadable values, by kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # first refused entry of each kind

    def refuse(self, kind: str, entry: str) -> None:
        self.refused[kind] += 1
        self.first.setdefault(kind, entry)

    def close(self) -> None:
        """Raise UserError if anything was refused."""
        if self.refused:
            kinds = "; ".join(f"{n} x {kind}, the first {self.first[kind]}" for kind, n in self.refused.items())
            raise UserError(f"{self.path} cannot be read: {kinds}. Correct these entries or remove them.")

    def no_json(self, reason: object) -> UserError:
        return UserError(f"{self.path} is not a whole JSON file in UTF-8: {reason}; copy or write it again.")


# --- the text ---------------------------------------------------------------------------------------------------


def _standard(text: bytes, account: _Account) -> bytes:
    """Convert to standard JSON in UTF-8."""
    if text[:2] == _GZIP:
        text = _unpacked(text, account.path)
        account.read["file compressed by gzip"] += 1
    encoding = json.detect_encoding(text)
    if encoding != "utf-8":
        try:
            text = text.decode(encoding).encode()
        except UnicodeError as error:
            raise account.no_json(error) from None
        account.read[f"file in {encoding.replace('-sig', ' with a byte-order mark')}"] += 1
    try:
        _decode_file(text)
    except msgspec.ValidationError:  # `_tables` reports it
        return text
    except RecursionError:
        raise account.no_json("it is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if b"NaN" in text or b"Infinity" in text:
            return _without_nan(text, account)
        raise account.no_json(error) from None
    return text


def _unpacked(text: bytes, path: Path) -> bytes:
    most = max(_MOST_UNPACKED, 100 * len(text))
    unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        whole = unpack.decompress(text, most)
    except zlib.error as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); copy it again.") from None
    if len(whole) == most:
        raise UserError(f"{path} would unpack to more than {most:,} bytes; unpack it by hand if that is right.")
    if not unpack.eof or unpack.unused_data:
        raise UserError(f"{path} is not one whole gzip file; copy it again.")
    return whole


def _without_nan(text: bytes, account: _Account) -> bytes:
    """Replace NaN and Infinity, which Python reads but the standard does not allow, by null."""
    constants: Counter[str] = Counter()
    try:
        value = json.loads(text, parse_constant=lambda name: constants.update([name]))
        text = msgspec.json.encode(value)
    except RecursionError:
        raise account.no_json("it is nested too deep") from None
    except ValueError as error:  # also half a surrogate pair
        raise account.no_json(error) from None
    account.read.update({f"{name}, read as null": count for name, count in constants.items()})
    return text


def _tables(text: bytes, path: Path) -> tuple[Entry, dict[str, list[Entry]]]:
    """Return the whole file and its three lists."""
    try:
        file = _decode_file(text)
        for key in ("images", "categories"):
            if key not in file:
                raise UserError(f"{path} is not a COCO instances file: it has no '{key}'; name the right file.")
        return file, {key: _decode_entries(file.get(key, b"[]")) for key in _TABLES}
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a COCO instances file: {error}; name the right file.") from None


# --- the values -------------------------------------------------------------------------------------------------


def _convert(tables: dict[str, list[Entry]], account: _Account) -> None:
    """Convert the used keys to the strict parser's types."""
    _number_annotations(tables["annotations"], account)
    image_id, category_id, annotation_id = (_ids(tables[key], what, account) for key, what in _TABLES.items())
    required: dict[str, dict[str, tuple[Convert, str]]] = {
        "images": {"height": _WIDE, "width": _WIDE, "id": image_id},  # ids last: messages show the originals
        "categories": {"id": category_id},
        "annotations": {"image_id": image_id, "category_id": category_id, "bbox": _BOX, "id": annotation_id},
    }
    optional = {
        "images": {"file_name": _TEXT, "coco_url": _TEXT},
        "categories": {"name": _TEXT},
        "annotations": {"area": _AREA, "iscrowd": _FLAG, "ignore": _FLAG, "difficult": _FLAG},
    }
    _add_boxes(tables, image_id[0], account)
    for table, what in _TABLES.items():
        for entry in tables[table]:
            for key, (convert, wanted) in optional[table].items():
                if key in entry:
                    _set(entry, key, convert, wanted, what, account)
            for key, (convert, wanted) in required[table].items():
                _set(entry, key, convert, wanted, what, account)
            if what == "category" and "name" not in entry:
                entry["name"] = msgspec.Raw(msgspec.json.encode(str(_value(entry, "id"))))
                account.read["category without a name: its id is taken"] += 1


def _number_annotations(annotations: list[Entry], account: _Account) -> None:
    if any(_value(entry, "id") is not None for entry in annotations):
        return
    for number, entry in enumerate(annotations, 1):
        entry["id"] = msgspec.Raw(msgspec.json.encode(number))
        account.read["annotation without an id: numbered from 1 on"] += 1


def _add_boxes(tables: dict[str, list[Entry]], image_id: Convert, account: _Account) -> None:
    """Give annotations without a box that around their segmentation, if it can be decoded."""
    lacking = [entry for entry in tables["annotations"] if _value(entry, "bbox") in (None, [])]
    sizes: dict[int, tuple[int, int]] = {}
    for entry in tables["images"] if lacking else ():
        with contextlib.suppress(ValueError):
            height, width = (_whole(_value(entry, side)) for side in ("height", "width"))
            sizes[image_id(_value(entry, "id"))] = (height, width)
    for entry in lacking:
        with contextlib.suppress(ValueError, KeyError, UserError):  # what remains without is refused
            size = sizes[image_id(_value(entry, "image_id"))]
            box = box_around(decode(bytes(entry["segmentation"]), *size, "the segmentation"))
            if box is not None:
                entry["bbox"] = msgspec.Raw(msgspec.json.encode(box))
                account.read["annotation without a bbox: that of its segmentation"] += 1


def _set(entry: Entry, key: str, convert: Convert, wanted: str, what: str, account: _Account) -> None:
    value = _value(entry, key)
    try:
        new = convert(value)
    except ValueError:
        shown = f"with {value!r:.60}" if key in entry else "has none"
        account.refuse(f"{what} whose {key} is not {wanted}", f"(id {_value(entry, 'id')!r:.60}) {shown}")
        return
    if new is value and new is not None:
        return
    if new is None:
        del entry[key]
    else:
        entry[key] = msgspec.Raw(msgspec.json.encode(new))
    account.read[f"{what} whose {key} is {_kind(value)}"] += 1


def _ids(entries: list[Entry], what: str, account: _Account) -> tuple[Convert, str]:
    """Return the converter for a table's ids, and for references to them."""
    values = [_value(entry, "id") for entry in entries]
    if all(_is_whole(value) or not _is_id(value) for value in values):
        return _whole, "a whole number"
    numbers = {text: n for n, text in enumerate(sorted({_id_text(value) for value in values if _is_id(value)}), 1)}
    account.read[f"{what} ids in whose place stand numbers from 1 on, in the order of the ids as text"] = len(numbers)

    def number(value: Any) -> int:
        if not _is_id(value):
            raise ValueError
        return numbers.setdefault(_id_text(value), len(numbers) + 1)  # unlisted ids get their own number

    return number, "a number or a text"


def _value(entry: Entry, key: str) -> Any:
    return msgspec.json.decode(entry[key]) if key in entry else None


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list with text"
    names = {str: "text", bool: "true or false", int: "a number", float: "a decimal number", type(None): "null"}
    return names.get(type(value), "an object")


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _id_text(value: str | float) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_whole(value: Any) -> bool:
    try:
        return _whole(value) is not None
    except ValueError:
        return False


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    elif isinstance(value, str) and (match := _WHOLE.fullmatch(value)):
        number = int(match[1])
    else:
        raise ValueError
    if number not in _INT64:
        raise ValueError
    return number


def _flag(value: Any) -> int | None:
    """Convert to 0 or 1; any whole number but 0 is 1 for every reader."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return int(value.strip().lower() == "true")
    return _whole(value)


def _number(value: Any) -> int | float:
    """Convert to a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    number = value if not isinstance(value, str) else float(value)
    if abs(number) > sys.float_info.max or not math.isfinite(number):
        raise ValueError
    return number


def _box(value: Any) -> list[int | float]:
    sides = value
    if isinstance(value, str):
        sides = value.strip(" []()").replace(",", " ").split()
    if not isinstance(sides, list) or len(sides) != 4:
        raise ValueError
    numbers = [_number(side) for side in sides]
    return value if all(new is old for new, old in zip(numbers, sides)) else numbers


def _area(value: Any) -> int | float | None:
    try:
        return _number(value)
    except ValueError:
        return None


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        raise ValueError
    return str(value)


_WIDE = (_whole, "a whole number")
_BOX = (_box, "four numbers")
_AREA = (_area, "a number")
_FLAG = (_flag, "0 or 1")
_TEXT = (_text, "text")
