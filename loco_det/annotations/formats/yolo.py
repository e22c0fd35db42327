"""YOLO's text files with data.yaml, as Ultralytics reads them; boxes and polygons.

    data.yaml: path, train, val, test, names        each split a folder, a .txt list of images, or several of either
    images/.../NAME.jpg -> labels/.../NAME.txt      the last /images/ of the path becomes /labels/; else side by side
    a line: CLASS cx cy w h                         or CLASS x y x y x y ...; shares of the image's width and height

A folder with classes.txt (labelImg, Label Studio) instead of data.yaml is read, too; its folders are the splits. An
image without a text file has no objects, as in training with YOLO.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from loco_det.annotations.formats.files import Tree, Unreadable, path_parts, read_text
from loco_det.annotations.formats.objects import BadShape, Found, Picture, extent, number, polygon
from loco_det.annotations.formats.splits import split_of_folder
from loco_det.annotations.formats.summary import Summary, printable
from loco_det.core.config import MAX_BYTES
from loco_det.core.errors import UserError

SUFFIXES = (".yaml", ".yml")
CLASS_LISTS = ("classes.txt", "obj.names")
_SPLITS = ("train", "val", "valid", "test")
_ROOTED = re.compile(r"[/\\]|[A-Za-z]:")
_BEYOND = 0.01  # tolerance of coordinates outside 0 to 1, as a share of the image's side


def find_settings(tree: Tree) -> Path | None:
    """Find data.yaml, another top-level YAML file with `names`, or a list of classes; None if there is none."""
    if tree.source != tree.root:
        return tree.source
    at_top = sorted(path for path in tree.with_suffix(*SUFFIXES) if path.parent == tree.root)
    for path in sorted(at_top, key=lambda path: path.stem != "data"):
        try:
            if _read_settings(path).get("names"):
                return path
        except Unreadable:
            if path.stem == "data":
                return path  # reading it reports the error
    return next((path for path in tree.files if path.name in CLASS_LISTS), None)


def add_folders(tree: Tree) -> None:
    """Walk folders outside the source that its data.yaml names, so that `tree` has all files that are read."""
    path = find_settings(tree)
    if path is None or path.suffix.lower() not in SUFFIXES:
        return
    try:
        settings = _read_settings(path)
        _check_paths(settings)
    except Unreadable:
        return  # reported on reading
    root = _root(path, settings)
    tree.add(root)
    for _, entry in _entries(settings):
        place = _place(root, entry)
        for folder in (place, _labels_of(place / "any").parent) if os.path.isdir(place) else ():
            if folder.is_dir():
                tree.add(folder)
        if _is_list(place):
            tree.add(place.parent)


def read(tree: Tree, summary: Summary) -> Iterator[Picture]:
    """Yield the pictures of every split; sets `summary.classes` to the declared names.

    Raises:
        UserError: data.yaml is unreadable, or there is no split or no text file.
    """
    path = find_settings(tree)
    if path is None:
        raise UserError(f"{tree.source} holds no data.yaml with 'names'; name the folder that does, or the file.")
    add_folders(tree)
    keypoints = False
    try:
        if path.name in CLASS_LISTS:
            summary.classes = _listed_names(path)
            images = {image: split_of_folder(image, tree.root) for image in tree.images()}
        else:
            settings = _read_settings(path)
            _check_paths(settings)
            summary.classes = _names(settings)
            keypoints = "kpt_shape" in settings
            images = _images(tree, path, settings, summary)
    except Unreadable as error:
        what = "list of classes" if path.name in CLASS_LISTS else "data.yaml"
        raise UserError(f"{path} is no {what} of YOLO: {error}; correct it.") from None
    labelled = 0
    for image, splits in images.items():
        labels = _labels_of(image)
        there = tree.is_file(labels)
        labelled += there
        if not there:
            summary.notes.add("an image without a text file has no objects", tree.name(image))
        name = tree.name(labels)
        yield Picture(image, name, list(_objects(tree, image, labels, keypoints, summary)) if there else [], splits)
    if not labelled:
        where = f", e.g. {_labels_of(next(iter(images)))}" if images else ""
        raise UserError(f"{path}: not one of its {len(images)} images has a text file of objects{where}.")


# --- data.yaml ---------------------------------------------------------------------------------------------------


def _read_settings(path: Path) -> dict[str, Any]:
    """Return keys with text, a list of texts or, for `names`, {text: text}; constructs nothing in the file."""
    try:
        text = read_text(path)
        if len(text) > MAX_BYTES:
            raise Unreadable(f"it has more than {MAX_BYTES >> 20} MB")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise Unreadable(" ".join(str(error).split())) from None
    except RecursionError:
        raise Unreadable("it is nested too deep") from None
    if not isinstance(root, yaml.MappingNode):
        raise Unreadable("it holds no KEY: VALUE pairs")
    return {key: _plain(value) for key, value in _pairs(root).items()}


def _check_paths(settings: dict[str, Any]) -> None:
    for key in ("path", *_SPLITS):
        value = settings.get(key, "")
        entries = value if isinstance(value, list) and key != "path" else [value]
        if not all(isinstance(entry, str) for entry in entries):
            raise Unreadable(f"'{key}' is no path" + " and no list of paths" * (key != "path"))


def _pairs(node: yaml.MappingNode) -> dict[str, yaml.Node]:
    found: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in found:
            raise Unreadable(f"the key '{key.value}' stands twice, again in line {key.start_mark.line + 1}")
        found[key.value] = value
    return found


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return "" if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [child.value if isinstance(child, yaml.ScalarNode) else None for child in node.value]
    return {key: value.value if isinstance(value, yaml.ScalarNode) else None for key, value in _pairs(node).items()}


def _names(settings: dict[str, Any]) -> list[str]:
    """Return the class names by number."""
    names = settings.get("names")
    if isinstance(names, dict):
        try:
            numbered = {int(key): name for key, name in names.items()}
        except ValueError:
            raise Unreadable("the keys of 'names' are not all whole numbers") from None
        if len(numbered) < len(names):
            raise Unreadable("'names' numbers two of its classes alike")
        if sorted(numbered) != list(range(len(numbered))):
            raise Unreadable(f"'names' does not number its {len(numbered)} classes from 0 on without gaps")
        names = [numbered[k] for k in range(len(numbered))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise Unreadable("'names' is no list of class names and no mapping from numbers to them")
    count = settings.get("nc")
    if isinstance(count, str) and count.isdigit() and int(count) != len(names):
        raise Unreadable(f"'nc' is {count} and 'names' has {len(names)}")
    return _distinct(names)


def _listed_names(path: Path) -> list[str]:
    """Return the class names by number, one per line."""
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not all(names):
        raise Unreadable(f"line {names.index('') + 1} is empty, so that the numbers of the classes below are not clear")
    return _distinct(names)


def _distinct(names: list[str]) -> list[str]:
    """Return distinct names unchanged; two classes of one name would be merged."""
    first: dict[str, int] = {}
    for k, name in enumerate(names):
        if printable(name) != name:
            raise Unreadable(f"the name of class {k}, '{printable(name)}', is no UTF-8")
        if first.setdefault(name, k) != k:
            raise Unreadable(f"the class '{name}' stands twice, as number {first[name]} and {k}")
    return names


def _root(path: Path, settings: dict[str, Any]) -> Path:
    """Return the root folder of splits: 'path', or the YAML file's folder if 'path' does not exist."""
    root = _below(path.parent, settings.get("path") or "")
    return root if os.path.isdir(root) else path.parent


def _below(folder: Path, path: str) -> Path:
    return Path(os.path.normpath(folder / os.path.expanduser(path)))


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (split, folder or list) for all entries of the splits."""
    for split in _SPLITS:
        value = settings.get(split)
        yield from ((split, entry) for entry in (value if isinstance(value, list) else [value]) if entry)


def _place(root: Path, entry: str) -> Path:
    """Return the path of a split's folder or list, also if written on another machine.

    Roboflow's ../ means beside the YAML file. Of an absolute path the longest existing end of at least two parts is
    used: its last part alone could be another split's.
    """
    place = _below(root, entry)
    if os.path.exists(place):
        return place
    parts = path_parts(entry)
    relative = [Path(*parts)] if parts else []
    if parts[:1] == [".."]:
        relative.append(Path(*parts[1:]))
    if _ROOTED.match(entry):
        relative += [Path(*parts[k:]) for k in range(1, len(parts) - 1)]
    return next((_below(root, str(path)) for path in relative if os.path.exists(_below(root, str(path)))), place)


def _is_list(place: Path) -> bool:
    return place.suffix == ".txt" and os.path.isfile(place)


def _images(tree: Tree, path: Path, settings: dict[str, Any], summary: Summary) -> dict[Path, tuple[str, ...]]:
    """Return {image: its splits} in order."""
    root, given = _root(path, settings), settings.get("path")
    if given and not os.path.isdir(_below(path.parent, given)):  # os.path also accepts names that are too long
        summary.notes.add("'path' is not a folder here: taken as that of the YAML file", f"{path.name}: {given}")
    found: dict[Path, tuple[str, ...]] = {}
    for split, entry in _entries(settings):
        for image in _entry(tree, root, split, entry, summary):
            found[image] = tuple(dict.fromkeys((*found.get(image, ()), split)))
    if not found:
        raise Unreadable(
            f"none of its splits ({', '.join(s for s in _SPLITS if s in settings) or 'none named'}) is there"
        )
    return found


def _entry(tree: Tree, root: Path, split: str, entry: str, summary: Summary) -> Iterator[Path]:
    """Yield the images of one folder or list of a split."""
    place = _place(root, entry)
    if os.path.isdir(place):
        yield from tree.images(place)
    elif _is_list(place):
        for line in filter(None, map(str.strip, read_text(place).splitlines())):
            match = tree.find(line, place.parent)
            if match is None:
                summary.images.add("it is listed and not there", f"{place.name}: {line}")
            else:
                yield match.image
    else:
        summary.notes.add(f"the split '{split}' is not there", entry)


# --- labels ------------------------------------------------------------------------------------------------------


def _labels_of(image: Path) -> Path:
    parts = list(image.with_suffix(".txt").parts)
    for k in range(len(parts) - 2, 0, -1):
        if parts[k].lower() == "images":
            parts[k] = {"images": "labels", "IMAGES": "LABELS"}.get(parts[k], "Labels")
            break
    return Path(*parts)


def _objects(tree: Tree, image: Path, labels: Path, keypoints: bool, summary: Summary) -> Iterator[Found]:
    size = tree.size(image)
    if size is None:
        return  # the unreadable image is skipped and counted elsewhere
    try:
        lines = read_text(labels).splitlines()
    except Unreadable as error:
        summary.broken.append((str(labels), str(error)))
        return
    for k, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        where = f"{tree.name(labels)}: line {k}"
        try:
            label = _label(words[0], summary.classes)
            values = _shares(words[1:5] if keypoints else words[1:])
            yield _found(f"line {k} ({label})", label, values, size.width, size.height)
        except BadShape as error:
            summary.objects.add(str(error), where)
            continue
        if keypoints and len(words) > 5:
            summary.notes.add("keypoints do not come over", where)


def _label(word: str, names: list[str]) -> str:
    value = number(word)
    if value != int(value) or not 0 <= value < len(names):
        raise BadShape(f"class {word} is none of the {len(names)} in 'names' (0 to {len(names) - 1})")
    return names[int(value)]


def _shares(words: list[str]) -> list[float]:
    values = [number(word) for word in words]
    if len(values) == 5:
        raise BadShape("6 values, as predictions with a confidence have")
    if len(values) < 4 or (len(values) > 4 and len(values) % 2):
        raise BadShape("neither CLASS cx cy w h nor CLASS x y x y x y ...")
    if any(not -_BEYOND <= value <= 1 + _BEYOND for value in values):
        raise BadShape("coordinates are not shares from 0 to 1")
    return values


def _found(where: str, label: str, values: list[float], width: int, height: int) -> Found:
    if len(values) == 4:
        cx, cy, w, h = values[0] * width, values[1] * height, values[2] * width, values[3] * height
        return Found(where, label, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    outline = polygon([[x * width, y * height] for x, y in zip(values[::2], values[1::2])])
    return Found(where, label, extent([outline]), (outline,))
