"""Subsets of a data set, chosen by the hash of their members' names, so that anyone can reproduce them.

For a seed the members are ordered by sha256("SEED NAME"), in hexadecimal; the first n are the subset of n members. So
the subsets of one seed are nested (1 % is part of 10 %), they depend on neither machine, library nor file order, and
`printf '0 42' | sha256sum` gives a member's position.

A detection data set's subset is named NAME@PART, with one or more parts:

| PART | what is kept |
|---|---|
| 1pct_seed0, 0.5pct_seed3 | that share of all listed images, rounded up; an image's name is its id |
| 10000images_seed0 | that many of all listed images |
| 10shot_seed0 | 10 non-crowd objects of each class, or all, and their images; an object's name is its id |
| classes_person+traffic-light | only these classes, with all images; a space is written as - |

As in TFA (Wang et al. 2020, arXiv 2003.06957) shots count objects, and other objects in their images lose their
annotation. Unlike there, the shots of one seed are nested and exact in number.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from loco_det.annotations.converted import derived_file, files_digest
from loco_det.annotations.index import load_index
from loco_det.core.errors import UserError

_SHARE = re.compile(r"(\d+(?:\.\d+)?(?:e-\d+)?)pct_seed(\d{1,18})")  # part_name formats a tiny share as 1e-07
_IMAGES = re.compile(r"(\d{1,18})images_seed(\d{1,18})")
_SHOTS = re.compile(r"(\d{1,18})shot_seed(\d{1,18})")
_CLASSES = re.compile(r"classes_(.+)")


def hashed_order(names: Sequence[str], seed: int) -> np.ndarray:
    """Return (n,) int64 positions in `names`, in hash order; equal names keep their order."""
    digests = [hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).hexdigest() for name in names]
    return np.array(sorted(range(len(names)), key=digests.__getitem__), dtype=np.int64)


def part_size(share: float, total: int) -> int:
    """Return the size of a share in (0, 1] of `total`: rounded up, so at least one, and exact for 1 % of 100."""
    return min(total, max(1, math.ceil(round(share * total, 6))))


def share_of_each_class(labels: np.ndarray, names: Sequence[str], share: float, seed: int) -> np.ndarray:
    """Return ascending positions of `share` of the members of every class, at least one each.

    Args:
        labels: (n,) integers.
        names: n names, as for `hashed_order`.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = hashed_order([names[i] for i in members], seed)
        chosen.append(members[order[: part_size(share, len(members))]])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


# --- parts of detection data sets ---------------------------------------------------------------------------------


class _Image(msgspec.Struct):
    id: int


class _Annotation(msgspec.Struct):
    id: int
    image_id: int
    category_id: int
    iscrowd: int | bool = 0


class _Category(msgspec.Struct):
    id: int
    name: str


class _File(msgspec.Struct):
    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw] = []


class _Listed(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation] = []


Kept = tuple[list[bool], list[bool], list[bool]]  # flags of images, categories, annotations


def part_of(annotations: Path, part: str, name: str) -> Path:
    """Return the COCO file of a part of a COCO file, made if missing.

    Args:
        part: the text after an @, see the module's table.
        name: the set's name with its parts, for messages and the file's name.

    Raises:
        UserError: `part` is invalid or keeps nothing, or the file cannot be read.
    """
    choose = _chooser(part, name)
    facts = {
        "format": 1,
        "file": files_digest([annotations], annotations.parent),
        "path": str(annotations),
        "part": part,
    }
    return derived_file(re.sub(r"[^\w.@+-]", "_", name)[-100:], facts, lambda: _written(annotations, choose, name))


def check_part(part: str, name: str, objects: bool) -> None:
    """Raise UserError for an invalid part, or one that selects by objects if the set has no `objects`."""
    _chooser(part, name)
    if not (objects or _SHARE.fullmatch(part) or _IMAGES.fullmatch(part)):
        raise UserError(
            f"data set {name}: @{part} chooses by objects, and pixel labels are none; use e.g. @10pct_seed0"
        )


def is_part(text: str) -> bool:
    """Whether the text after an @ has the form of a part."""
    return any(pattern.fullmatch(text) for pattern in (_SHARE, _IMAGES, _SHOTS, _CLASSES))


def part_name(share: float | None = None, shots: int | None = None, seed: int = 0) -> str:
    """Return the suffix of a data set's name for a share of its images in (0, 1] or for `shots` objects per class."""
    if shots is not None:
        return f"@{shots}shot_seed{seed}"
    return "" if share in (None, 1) else f"@{100 * share:.10g}pct_seed{seed}"


def _chooser(part: str, name: str) -> Callable[[_Listed], Kept]:
    if found := _SHARE.fullmatch(part):
        share, seed = float(found[1]) / 100, int(found[2])
        if 0 < share <= 1:
            return lambda listed: _some_images(listed, part_size(share, len(listed.images)), seed, name)
    elif found := _IMAGES.fullmatch(part):
        count, seed = int(found[1]), int(found[2])
        if count:
            return lambda listed: _some_images(listed, count, seed, name)
    elif found := _SHOTS.fullmatch(part):
        shots, seed = int(found[1]), int(found[2])
        if shots:
            return lambda listed: _shots(listed, shots, seed)
    elif found := _CLASSES.fullmatch(part):
        return lambda listed: _classes(listed, found[1].split("+"), name)
    raise UserError(
        f"DATASETS: '{name}' ends in @{part}, which means nothing; write a part as @1pct_seed0, "
        "@10000images_seed0, @10shot_seed0 or @classes_person+car."
    )


def _some_images(listed: _Listed, count: int, seed: int, name: str) -> Kept:
    if count > len(listed.images):
        raise UserError(f"DATASETS: '{name}' asks for {count} images of a set of {len(listed.images)}; ask for fewer.")
    order = hashed_order([str(image.id) for image in listed.images], seed)
    rows = set(order[:count].tolist())
    ids = {image.id for row, image in enumerate(listed.images) if row in rows}
    return (
        [image.id in ids for image in listed.images],
        [True] * len(listed.categories),
        [a.image_id in ids for a in listed.annotations],
    )


def _shots(listed: _Listed, shots: int, seed: int) -> Kept:
    images = {image.id for image in listed.images}
    kept: set[int] = set()
    for category in listed.categories:
        own = [
            a.id for a in listed.annotations if a.category_id == category.id and not a.iscrowd and a.image_id in images
        ]
        kept |= {own[k] for k in hashed_order([str(number) for number in own], seed)[:shots].tolist()}
    used = {a.image_id for a in listed.annotations if a.id in kept}
    return (
        [image.id in used for image in listed.images],
        [True] * len(listed.categories),
        [a.id in kept for a in listed.annotations],
    )


def _classes(listed: _Listed, names: list[str], name: str) -> Kept:
    ids = {category.name.replace(" ", "-"): category.id for category in listed.categories}
    unknown = [wanted for wanted in names if wanted not in ids]
    if unknown:
        raise UserError(f"DATASETS: '{name}': there is no class {unknown[0]!r}; there are {', '.join(ids)}.")
    kept = {ids[wanted] for wanted in names}
    return (
        [True] * len(listed.images),
        [category.id in kept for category in listed.categories],
        [a.category_id in kept for a in listed.annotations],
    )


def _written(path: Path, choose: Callable[[_Listed], Kept], name: str) -> bytes:
    try:
        content = load_index(path).readable.read_bytes()
        listed, file = msgspec.json.decode(content, type=_Listed), msgspec.json.decode(content, type=_File)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a COCO annotation file ({error}); check the data set.") from error
    columns = []
    kept = choose(listed)
    for key, keep in zip(("images", "categories", "annotations"), kept):
        rows = [bytes(entry) for entry, wanted in zip(getattr(file, key), keep) if wanted]
        columns.append(f'"{key}":['.encode() + b",".join(rows) + b"]")
    if not any(kept[0]):
        raise UserError(f"DATASETS: '{name}' holds no image; {path} lists too few objects.")
    return b"{" + b",\n".join(columns) + b"}\n"
