"""The validity rules for annotation files, used by training, evaluation and `data check`.

Loading a file raises the first rule that stops its use; `loco-det data check` prints all that apply.

Shape legend: I images, K categories, A annotations, in the order of their index (index.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from loco_det.annotations.coco_json import NO_MASK, POLYGONS, RLE, TOO_FEW_POINTS
from loco_det.annotations.index import CocoIndex
from loco_det.annotations.segmentation import decode, extent
from loco_det.core.errors import UserError
from loco_det.core.log import Progress, log

STOPS = "stops training"  # or the other use that the file is read for
SUSPECT = "probably wrong"
LEFT_OUT = "left out"
COMPUTED = "computed"
NOTE = "note"
EFFECTS = (STOPS, SUSPECT, LEFT_OUT, COMPUTED, NOTE)

FILE, IMAGES, CATEGORIES, ANNOTATIONS = "file", "image", "category", "annotation"

_LARGEST_ID = 2**53  # hotcoco's ids are unsigned and stored in float64 columns
_BEYOND = 1.0  # pixels that a box may exceed the border, for rounding
_SAMPLE = 300  # polygons that are compared with their boxes
_MOST = 0.5  # share of the boxes from which on the whole file is suspect
_OVERLAP = 0.1  # minimum IoU of a box with its polygon's


class Use(NamedTuple):
    """The purpose for which a file is read.

    Attributes:
        purpose: "train", "run" (a detector runs on the images) or "evaluate".
        masks: for training INPUT.MASK_FORMAT, "polygon" or "bitmask"; empty for boxes only.
    """

    purpose: str
    masks: str = ""


RUN, EVALUATE = Use("run"), Use("evaluate")


@dataclass(frozen=True)
class Rule:
    """One way in which a file can be invalid or suspect.

    Attributes:
        name: noun for a matching entry, in the singular.
        of: FILE, IMAGES, CATEGORIES or ANNOTATIONS.
        hits: index -> (1,), (I,), (K,) or (A,) bool.
        remedy: what to do about it.
        train, run, evaluate: the effect on such a use; empty if irrelevant.
        masks: the values of `Use.masks` for which it is relevant.
        deep: needs every mask decoded, so that loading leaves it to the use of a mask.
        describe: index, row -> the problem of one entry, if more specific than the entry's own description.
    """

    name: str
    of: str
    hits: Callable[[CocoIndex], np.ndarray]
    remedy: str
    train: str = ""
    run: str = ""
    evaluate: str = ""
    masks: tuple[str, ...] = ("", "polygon", "bitmask")
    deep: bool = False
    describe: Callable[[CocoIndex, int], str] | None = None

    def effect(self, use: Use) -> str:
        return getattr(self, use.purpose) if use.masks in self.masks else ""


class Finding(NamedTuple):
    """A rule that matches a file, and the matching rows."""

    rule: Rule
    effect: str
    index: CocoIndex
    rows: np.ndarray

    def examples(self, count: int) -> list[str]:
        """Return descriptions of the first few matching entries."""
        return [(self.rule.describe or _DESCRIBE[self.rule.of])(self.index, int(row)) for row in self.rows[:count]]

    def sentence(self) -> str:
        """The complete message, with the file and the remedy."""
        first = "".join(f", the first {example}" for example in self.examples(1) if example)
        count = f"{len(self.rows)} x " if self.rule.of != FILE else ""
        return f"{self.index.path}: {count}{self.rule.name}{first}; {self.rule.remedy}."


def findings(index: CocoIndex, use: Use, effects: Sequence[str], *, deep: bool = False) -> Iterator[Finding]:
    """Yield the matching rules with these effects, in list order; with `deep` also those that decode every mask."""
    for rule in RULES:
        effect = rule.effect(use)
        if effect in effects and (deep or not rule.deep):
            rows = np.flatnonzero(rule.hits(index))
            if len(rows):
                yield Finding(rule, effect, index, rows)


def refuse(index: CocoIndex, use: Use) -> None:
    """Raise UserError for the first rule that stops the use."""
    for finding in findings(index, use, (STOPS,)):
        raise UserError(finding.sentence())


def warn(index: CocoIndex, use: Use) -> None:
    """Log what is probably wrong with the whole file."""
    for finding in findings(index, use, (SUSPECT,)):
        log.warning("%s", finding.sentence())


# --- helpers of the rules -------------------------------------------------------------------------------------------


def kept(index: CocoIndex, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return (n,) bool for some annotations: kept by training and its data set."""
    return (index.bbox[rows, 2] > 0) & (index.bbox[rows, 3] > 0) & (index.shape[rows] != TOO_FEW_POINTS)


def corners(bbox: np.ndarray) -> np.ndarray:
    """Convert (n, 4) float64 x, y, width, height to float32 XYXY."""
    # float32 before x + w: Detectron2 adds in float32, and equality requires the same rounding.
    with np.errstate(over="ignore"):
        box = bbox.astype(np.float32)
        box[:, 2:] += box[:, :2]
    return box


def _all(columns: np.ndarray) -> np.ndarray:
    """Reduce (n, 4) bool by `all(1)`, ten times as fast: (n,)."""
    return columns[:, 0] & columns[:, 1] & columns[:, 2] & columns[:, 3]


def finite_boxes(index: CocoIndex) -> np.ndarray:
    """Return (A,) bool: corners are finite in float32, as computed in training."""
    return _all(np.isfinite(corners(index.bbox)))


def objects(index: CocoIndex) -> np.ndarray:
    """Return (A,) bool: training targets, i.e. kept non-crowd annotations of a listed image."""
    found = kept(index) & ~index.crowd
    found[index.first[-1] :] = False
    return found


def _sizes(index: CocoIndex) -> tuple[np.ndarray, np.ndarray]:
    """Return (A,) float64 height and width of each annotation's image; infinite if unlisted."""
    strays = len(index.annotation_id) - int(index.first[-1])
    return tuple(
        np.append(np.repeat(side, np.diff(index.first)).astype(float), np.full(strays, np.inf))
        for side in (index.height, index.width)
    )


def _repeated(ids: np.ndarray) -> np.ndarray:
    """Return (n,) bool: occurred before."""
    again, ascending = np.zeros(len(ids), bool), np.sort(ids)
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(ids, kind="stable")  # much slower
        again[order[1:]] = ids[order[1:]] == ids[order[:-1]]
    return again


def _is_minival(index: CocoIndex) -> bool:
    """Whether the file is a public minival of COCO 2014, whose few duplicate annotation ids Detectron2 also accepts."""
    return "minival" in index.path.name


def _no_id(ids: np.ndarray) -> np.ndarray:
    return (ids < 0) | (ids > _LARGEST_ID)


def _one(hit: bool) -> np.ndarray:
    return np.array([hit])


def _beyond(index: CocoIndex) -> tuple[np.ndarray, np.ndarray]:
    """Return (A,) bool twice: valid boxes outside their image, and those that reach beyond it."""
    x, y, w, h = index.bbox.T
    height, width = _sizes(index)
    area = finite_boxes(index) & (w > 0) & (h > 0)
    with np.errstate(over="ignore"):
        right, bottom = x + w, y + h
    outside = area & ((x >= width) | (y >= height) | (right <= 0) | (bottom <= 0))
    over = (x < -_BEYOND) | (y < -_BEYOND) | (right > width + _BEYOND) | (bottom > height + _BEYOND)
    return outside, area & ~outside & over


def _twins(index: CocoIndex) -> np.ndarray:
    looked_at = finite_boxes(index) & ~index.crowd
    keys = np.column_stack([index.annotation_image, index.annotation_category, index.bbox])[looked_at]
    again = np.zeros(len(looked_at), bool)
    if len(keys):
        _, where, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        again[looked_at] = (counts > 1)[where.reshape(-1)]
    return again


def _same_names(index: CocoIndex) -> np.ndarray:
    names = np.array(index.category_names, dtype=object)
    return np.array([(names[:k] == name).any() for k, name in enumerate(names)], bool)


# --- implausible boxes ----------------------------------------------------------------------------------------------


def _if_most(hit: np.ndarray, of: np.ndarray) -> np.ndarray:
    return hit if hit.sum() > _MOST * of.sum() else np.zeros_like(hit)


def _in_units(index: CocoIndex) -> np.ndarray:
    """Match boxes that are relative to the image instead of in pixels."""
    looked_at = objects(index)
    height, width = _sizes(index)
    inside = _all((index.bbox >= 0) & (index.bbox <= 1 + 1e-3))
    return _if_most(looked_at & inside & (np.minimum(height, width) > 2), looked_at)


def _as_corners(index: CocoIndex) -> np.ndarray:
    """Match boxes that are x1, y1, x2, y2: as such they fit their images, as x, y, width, height many do not."""
    looked_at = objects(index)
    height, width = _sizes(index)
    x, y, right, bottom = index.bbox.T
    fits = looked_at & (right > x) & (bottom > y) & (right <= width + _BEYOND) & (bottom <= height + _BEYOND)
    over = fits & ((x + right > width + _BEYOND) | (y + bottom > height + _BEYOND))
    return _if_most(fits, looked_at) & (over.sum() > 0.25 * looked_at.sum())


def _far_from_polygon(index: CocoIndex) -> np.ndarray:
    """Match boxes far from their polygon, in a sample evenly spread over the file."""
    candidates = np.flatnonzero(objects(index) & finite_boxes(index) & (index.shape == POLYGONS))
    rows = candidates[np.linspace(0, len(candidates) - 1, min(_SAMPLE, len(candidates))).astype(int)]
    far, seen = np.zeros(len(index.annotation_id), bool), np.zeros(len(index.annotation_id), bool)
    for row, text in zip(rows.tolist(), index.segmentations(rows)):
        try:
            polygons = decode(text, 0, 0, "")
        except UserError:  # reported by another rule
            continue
        seen[row] = True
        x, y, w, h = index.bbox[row]
        far[row] = _iou(np.array([x, y, x + w, y + h]), extent(polygons)) < _OVERLAP
    return _if_most(far, seen)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the IoU of two XYXY boxes; a polygon on a line, without area, counts as a pixel wide."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    areas = [np.maximum(box[2:] - box[:2], 1).prod() for box in (a, b)]
    both = np.maximum(sides, 0).prod()
    return both / (sum(areas) - both)


# --- masks ------------------------------------------------------------------------------------------------------


def describe_mask(index: CocoIndex, row: int) -> str:
    """Return the description of an annotation's segmentation for messages."""
    return f"the segmentation of annotation id {index.annotation_id[row]} of image id {index.annotation_image[row]}"


def _problem(index: CocoIndex, row: int) -> str:
    """Return why a segmentation is unusable; empty if it is valid."""
    i = int(np.searchsorted(index.first, row, "right")) - 1
    size = int(index.height[i]), int(index.width[i])
    try:
        decode(index.segmentations(slice(row, row + 1))[0], *size, describe_mask(index, row))
    except UserError as error:
        return str(error).rstrip(".")
    return ""


def _malformed(index: CocoIndex) -> np.ndarray:
    rows = np.flatnonzero(objects(index))
    bad = np.zeros(len(index.annotation_id), bool)
    with Progress(len(rows), "segmentations", unit="annotations") as progress:
        for row in rows.tolist():
            bad[row] = bool(_problem(index, row))
            progress.advance()
    return bad


# --- the list -----------------------------------------------------------------------------------------------------

_DESCRIBE: dict[str, Callable[[CocoIndex, int], str]] = {
    FILE: lambda index, row: "",
    IMAGES: lambda index, i: f"image id {index.image_id[i]}, {index.width[i]} x {index.height[i]}",
    CATEGORIES: lambda index, k: f"category id {index.category_id[k]}, '{index.category_names[k]}'",
    ANNOTATIONS: lambda index, k: (
        f"annotation id {index.annotation_id[k]} of image id {index.annotation_image[k]}, category_id "
        f"{index.annotation_category[k]}, box [{', '.join(f'{value:.6g}' for value in index.bbox[k])}]"
    ),
}
_ALWAYS = {"train": STOPS, "run": STOPS, "evaluate": STOPS}
_DETECTOR = {"train": STOPS, "run": STOPS}
_MASKS = ("polygon", "bitmask")
_UNIQUE = "give each an id of its own"
_RANGE = "use ids from 0 to 2^53, which evaluators need"

RULES: Sequence[Rule] = (
    Rule("no images at all", FILE, lambda f: _one(not len(f.image_id)), "name the right file", **_ALWAYS),
    Rule("no categories at all", FILE, lambda f: _one(not len(f.category_id)), "name the right file", **_ALWAYS),
    Rule(
        "no annotations at all, so there is nothing to measure against",
        FILE,
        lambda f: _one(not len(f.annotation_id)),
        "use an annotated set",
        evaluate=STOPS,
    ),
    Rule("image id that occurs twice", IMAGES, lambda f: _repeated(f.image_id), _UNIQUE, **_ALWAYS),
    Rule("category id that occurs twice", CATEGORIES, lambda f: _repeated(f.category_id), _UNIQUE, **_ALWAYS),
    Rule(
        "annotation id that occurs twice",
        ANNOTATIONS,
        lambda f: _repeated(f.annotation_id) & (not _is_minival(f)),
        _UNIQUE,
        **_DETECTOR,
    ),
    Rule(
        "annotation id that occurs twice",
        ANNOTATIONS,
        lambda f: _repeated(f.annotation_id) & _is_minival(f),
        _UNIQUE,
        train=NOTE,
        run=NOTE,
    ),
    Rule(
        "annotation id that occurs twice",
        ANNOTATIONS,
        lambda f: _repeated(f.annotation_id),
        _UNIQUE,
        evaluate=STOPS,
    ),
    Rule("image id out of range", IMAGES, lambda f: _no_id(f.image_id), _RANGE, evaluate=STOPS),
    Rule("category id out of range", CATEGORIES, lambda f: _no_id(f.category_id), _RANGE, evaluate=STOPS),
    Rule("annotation id out of range", ANNOTATIONS, lambda f: _no_id(f.annotation_id), _RANGE, evaluate=STOPS),
    Rule(
        "image without a size",
        IMAGES,
        lambda f: (f.height <= 0) | (f.width <= 0),
        "write its height and width in pixels",
        **_DETECTOR,
    ),
    Rule(
        "annotation of a category that is not listed",
        ANNOTATIONS,
        lambda f: ~np.isin(f.annotation_category, f.category_id),
        "list it under 'categories' or remove them",
        **_DETECTOR,
        evaluate=LEFT_OUT,
    ),
    Rule(
        "annotation with the key 'ignore'",
        ANNOTATIONS,
        lambda f: f.ignore,
        "use 'iscrowd' for regions to leave out",
        **_DETECTOR,
    ),
    Rule("box that is not finite", ANNOTATIONS, lambda f: ~finite_boxes(f), "correct it or remove it", **_DETECTOR),
    Rule(
        "no usable annotation at all",
        FILE,
        lambda f: _one(not kept(f)[: f.first[-1]].any()),
        "there is nothing to learn from; name another file or complete it",
        train=STOPS,
    ),
    Rule(
        "no object that is not a crowd",
        FILE,
        lambda f: _one(kept(f)[: f.first[-1]].any() and not objects(f).any()),
        "there is nothing to learn from; write iscrowd 0 where an annotation is one object",
        train=STOPS,
    ),
    Rule(
        "object without a mask",
        ANNOTATIONS,
        lambda f: objects(f) & (f.shape == NO_MASK),
        "give it one, or set MODEL.MASK_ON False to train on boxes alone",
        train=STOPS,
        masks=_MASKS,
    ),
    Rule(
        "object whose mask is an RLE and not polygons",
        ANNOTATIONS,
        lambda f: objects(f) & (f.shape == RLE),
        "set INPUT.MASK_FORMAT bitmask",
        train=STOPS,
        masks=("polygon",),
    ),
    Rule(
        "malformed segmentation",
        ANNOTATIONS,
        _malformed,
        "correct it or remove the annotation",
        train=STOPS,
        masks=_MASKS,
        deep=True,
        describe=_problem,
    ),
    Rule(
        "box in units of the image and not in pixels",
        ANNOTATIONS,
        _in_units,
        "multiply x and width by the image's width, y and height by its height",
        train=SUSPECT,
    ),
    Rule(
        "box that seems to be x1, y1, x2, y2",
        ANNOTATIONS,
        _as_corners,
        "write x, y, width, height",
        train=SUSPECT,
    ),
    Rule(
        f"box far from its polygon, of up to {_SAMPLE} compared",
        ANNOTATIONS,
        _far_from_polygon,
        "see which of the two is right and in pixels",
        train=SUSPECT,
    ),
    Rule(
        "annotation of an image that is not listed",
        ANNOTATIONS,
        lambda f: np.arange(len(f.annotation_id)) >= f.first[-1],
        "list the image or remove them",
        train=LEFT_OUT,
        run=LEFT_OUT,
        evaluate=LEFT_OUT,
    ),
    Rule(
        "box without area",
        ANNOTATIONS,
        lambda f: finite_boxes(f) & ~((f.bbox[:, 2] > 0) & (f.bbox[:, 3] > 0)),
        "correct its width and height or remove it",
        train=LEFT_OUT,
        run=LEFT_OUT,
    ),
    Rule(
        "polygons of fewer than three points",
        ANNOTATIONS,
        lambda f: f.shape == TOO_FEW_POINTS,
        "correct them or remove the annotation",
        train=LEFT_OUT,
        run=LEFT_OUT,
    ),
    Rule(
        "annotation without an area",
        ANNOTATIONS,
        lambda f: np.isnan(f.area),
        "an evaluation takes its mask's, or its box's where it has no mask",
        train=COMPUTED,
        evaluate=COMPUTED,
    ),
    Rule("box outside its image", ANNOTATIONS, lambda f: _beyond(f)[0], "correct it or remove it", train=NOTE),
    Rule("box that reaches beyond its image", ANNOTATIONS, lambda f: _beyond(f)[1], "cut it", train=NOTE),
    Rule("annotation with the box and category of another", ANNOTATIONS, _twins, "remove one", train=NOTE),
    Rule("annotation whose 'area' is 0 or less", ANNOTATIONS, lambda f: f.area <= 0, "correct it", train=NOTE),
    Rule("category name that occurs twice", CATEGORIES, _same_names, "give them different names", train=NOTE),
    Rule(
        "category without annotations",
        CATEGORIES,
        lambda f: ~np.isin(f.category_id, f.annotation_category),
        "it is a class that is never learned",
        train=NOTE,
    ),
)
