"""Data sets given as paths; other formats than COCO's are converted into the cache.

    FILE.json[@IMAGES]              a COCO annotation file and its image folder, which may be omitted if it is the
                                    file's own folder or `images` in it
    FOLDER                          with _annotations.coco.json (Roboflow) or COCO's result.json (Label Studio) in it
    FOLDER@SPLIT                    COCO's own layout: FOLDER/annotations/instances_SPLIT.json, images in FOLDER/SPLIT
    SOURCE[@IMAGES][@SPLIT]         a folder or file that `loco-det data convert` reads (`formats/`)

each optionally with @PART, as for names (`subsets.py`). A path has a / before its first @, or ends there in .json,
.xml, .yaml or .yml; anything else is a name. Text after an @ that has the form of a part is one, so write a folder
called 10pct_seed0 as ./10pct_seed0.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from loco_det.annotations.converted import derived_file, files_digest
from loco_det.annotations.formats import yolo
from loco_det.annotations.formats.conversion import ARCHIVES, VERSION, Converted, convert_annotations
from loco_det.annotations.formats.files import Tree
from loco_det.annotations.formats.recognition import json_format, recognise
from loco_det.annotations.formats.summary import lines
from loco_det.annotations.index import load_index
from loco_det.annotations.subsets import is_part
from loco_det.core.errors import UserError
from loco_det.core.log import log

ANNOTATION_FILE = re.compile(r"(.*?\.(?:json|json\.gz|xml|ya?ml))(?:@(.*))?", re.IGNORECASE | re.DOTALL)
COCO_FILES = ("_annotations.coco.json", "result.json")  # files that are found in a given folder
_logged: set[Path] = set()


class Place(NamedTuple):
    """The image folder and COCO file of a path; `derived` if the file was made here."""

    images: Path
    annotations: Path
    derived: bool


def is_path(name: str) -> bool:
    """Whether a data set's name, with or without anything after an @, is a path."""
    head = name.partition("@")[0]
    return "/" in head or head.startswith("~") or ANNOTATION_FILE.fullmatch(head) is not None


def local_path(text: str) -> Path:
    """Expand ~ and ~user, unless there is no such user.

    Check existence by os.path: a Path raises OSError for a name that is too long.
    """
    return Path(os.path.expanduser(text))


def split_parts(name: str) -> tuple[str, list[str]]:
    """Split a path into itself without parts, and its parts."""
    pieces, parts = name.split("@"), []
    while len(pieces) > 1 and is_part(pieces[-1]):
        parts.insert(0, pieces.pop())
    return "@".join(pieces), parts


def find_path(whole: str) -> Place:
    """Return the place of a path without parts.

    Raises:
        UserError: something is missing or of no known format, or a split must be named.
    """
    found = ANNOTATION_FILE.fullmatch(whole)
    if found and not os.path.isdir(local_path(whole)):
        return _of_file(whole, local_path(found[1]), found[2])
    source, split = local_path(whole), None
    if not os.path.isdir(source) and "@" in whole:
        head, _, split = whole.rpartition("@")
        source = local_path(head)
    if source.suffix.lower() in ARCHIVES and os.path.isfile(source):
        raise UserError(f"DATASETS: '{whole}': {source} is an archive; unpack it and name the folder.")
    if not os.path.isdir(source):
        folders = [path.name for path in source.parent.glob("*") if path.is_dir()]
        close = get_close_matches(source.name, folders, n=1)
        hint = f"did you mean {source.parent / close[0]}?" if close else "correct the path."
        raise UserError(f"DATASETS: '{whole}': there is no folder {source}; {hint}")
    for file in (source / name for name in COCO_FILES):
        if split is None and file.is_file() and _may_be_coco(file):
            return Place(_default_images(file), file, False)
    if splits := coco_splits(source):
        split = _chosen_split(whole, list(splits), split)
        return Place(source / split, splits[split], False)
    if source.name in coco_splits(source.parent):
        raise UserError(f"DATASETS: '{whole}' is the images of a split; write {source.parent}/@{source.name}")
    return _converted(whole, source, None, split)


def coco_splits(folder: Path) -> dict[str, Path]:
    """Return the annotation file of every split of a folder in COCO's layout; none if it is in another."""
    files = {file.stem.removeprefix("instances_"): file for file in folder.glob("annotations/instances_*.json")}
    return {split: files[split] for split in sorted(files) if (folder / split).is_dir()}


def _of_file(whole: str, file: Path, rest: str | None) -> Place:
    if not os.path.isfile(file):
        raise UserError(f"DATASETS: '{whole}': there is no file {file}; correct the path.")
    if file.name.lower().endswith((".json", ".json.gz")) and _may_be_coco(file):
        images = _default_images(file) if rest is None else local_path(rest)
        if not os.path.isdir(images):
            raise UserError(
                f"DATASETS: '{whole}': there is no folder {images}; write FILE.json@FOLDER with the images' folder."
            )
        return Place(images, file, False)
    images, split = None, None
    if rest is not None:
        head, _, tail = rest.rpartition("@")
        if os.path.isdir(local_path(rest)):
            images = local_path(rest)
        elif head and os.path.isdir(local_path(head)):
            images, split = local_path(head), tail
        elif head or "/" in tail:
            raise UserError(f"DATASETS: '{whole}': there is no folder {head or tail}; correct the path.")
        else:
            split = tail
    return _converted(whole, file, images, split)


def _may_be_coco(file: Path) -> bool:
    """Whether JSON may be COCO's; unrecognised JSON may, so that COCO's parser reports what it lacks."""
    return json_format(file) in ("coco", None)


def _default_images(file: Path) -> Path:
    """Return the file's folder, or `images` in it if its first image is there and not beside the file."""
    names = load_index(file).file_name
    inside = file.parent / "images"
    beside = not len(names) or (file.parent / names[0]).is_file() or not (inside / names[0]).is_file()
    return file.parent if beside else inside


# --- other formats -----------------------------------------------------------------------------------------------


def is_annotated(path: Path) -> bool:
    """Whether a folder or file is one of the above, so that its images have annotations."""
    if not os.path.isdir(path):
        return ANNOTATION_FILE.fullmatch(path.name) is not None
    if any((path / name).is_file() for name in COCO_FILES) or coco_splits(path):
        return True
    return bool(set(recognise(Tree(path))) - {"coco"})


def _converted(whole: str, source: Path, images: Path | None, split: str | None) -> Place:
    """Return the COCO file of one split, made if missing; the log reports once what was not converted."""
    tree = Tree(source, images)
    yolo.add_folders(tree)  # otherwise changes in folders that a data.yaml names elsewhere would not be noticed
    facts = {
        "format": VERSION,
        "source": str(tree.source),
        "images": None if images is None else str(images.absolute()),
        "files": files_digest(tree.files, tree.root),
    }
    made: list[Converted] = []

    def conversion() -> Converted:
        if not made:
            made.append(convert_annotations(source, images=images))
        return made[0]

    title = re.sub(r"[^\w.+-]", "_", source.name)[-60:] or "data"
    file = derived_file(f"{title}-summary", facts, lambda: msgspec.json.encode(conversion().summary))
    summary = msgspec.json.decode(file.read_bytes())
    split = _chosen_split(whole, list(summary["splits"]), split)
    _log_summary(source, file, summary)
    # After a conversion, keep all splits of the source.
    files = {
        name: derived_file(
            f"{title}-split",
            {**facts, "split": name},
            lambda name=name: msgspec.json.encode(conversion().splits[name]),
        )
        for name in (summary["splits"] if made else [split])
    }
    return Place(Path(summary["image_folder"]), files[split], True)


def _chosen_split(whole: str, splits: list[str], split: str | None) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split not in splits:
        which = "has several splits" if split is None else f"has no split '{split}'"
        remedy = ", ".join(f"@{name}" for name in splits)
        raise UserError(f"DATASETS: '{whole}' {which}; put one of {remedy} behind the path.")
    return split


def _log_summary(source: Path, file: Path, summary: dict[str, Any]) -> None:
    if file in _logged:
        return
    _logged.add(file)
    counts = ", ".join(f"{k} {v['images']} images, {v['objects']} objects" for k, v in summary["splits"].items())
    log.info("%s: %s, read as COCO: %s", source, summary["format"], counts)
    for line in lines(summary):
        log.warning("%s: %s", source, line)
