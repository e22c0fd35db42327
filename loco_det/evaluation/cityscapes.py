"""Cityscapes' instance AP, by the benchmark's own code, or the same numbers by faster code.

Both follow cityscapesscripts/evaluation/evalInstanceLevelSemanticLabeling.py: a detection of a class may match one
object of at least 100 pixels at IoU above .50, .55, ..., .95; pixels of void labels, groups and smaller objects are
ignored; AP is the area under the stepwise precision-recall curve, averaged over thresholds and the 8 classes.

Shape legend: H x W an image in pixels; per class: P detections, G objects and groups, E overlapping pairs of them.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from loco_det.annotations.cityscapes import CLASSES, VOID, frame_name, read_instance_ids
from loco_det.annotations.index import CocoIndex, load_index
from loco_det.annotations.segmentation import rle_lengths
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.log import Progress, log
from loco_det.evaluation import coco
from loco_det.evaluation.bootstrap import Counted, Resamplable
from loco_det.evaluation.coco_checks import Detections, GroundTruth, check_results, read_ground_truth

OVERLAPS = np.arange(0.5, 1.0, 0.05)  # the official array, including its rounding
MIN_PIXELS = 100
OFFICIAL = "cityscapesscripts"


class Measure(coco.Measure):
    """Cityscapes' AP of masks; for the test split, whose ground truth is secret, a zip to submit."""

    evaluators = (coco.EVALUATORS[0], OFFICIAL)

    @property
    def rules(self) -> str:
        return OFFICIAL if self.evaluator == OFFICIAL else "loco_det"

    def evaluate(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        if not self.dataset.secret:
            return super().evaluate(results)
        file = self.folder / "cityscapes_submission.zip"
        write_submission(self.dataset.annotations, self.dataset.images, results, file)
        log.info("%s: its truth is secret; %s can be submitted to cityscapes-dataset.com", self.dataset.name, file)
        return {}

    def match(self, results: list[dict[str, Any]]) -> Outcomes:
        return cityscapes_outcomes(self.dataset.annotations, self.dataset.images, results)

    def numbers(self, results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
        if self.evaluator == OFFICIAL:
            return evaluate_cityscapes(self.dataset.annotations, self.dataset.images, results, official=True)
        return {"segm": in_percent(self.matched(results).precision())}

    def resamplable(self, results: list[dict[str, Any]]) -> list[Resamplable]:
        outcomes, names = self.matched(results, keep=True), ("AP", "AP50")

        def measure(times: np.ndarray) -> list[float]:
            numbers = in_percent(outcomes.precision(times))
            return [numbers[name] for name in names]

        return [Counted("segm", names, outcomes.images, measure)]


def evaluate_cityscapes(
    annotations: Path, images: Path, results: list[dict[str, Any]], *, official: bool = False
) -> dict[str, dict[str, float]]:
    """AP of instance masks.

    Args:
        annotations: the COCO file of `data.cityscapes`, which lists the images.
        images: ROOT/leftImg8bit/SPLIT; the ground truth is in ROOT/gtFine/SPLIT.
        results: masks in COCO's result format.
        official: use cityscapesscripts.

    Returns:
        {"segm": {"AP", "AP50", "AP-person", ...}} in percent; NaN for a class without objects.

    Raises:
        UserError: invalid results or ground truth, or cityscapesscripts is not installed.
    """
    frames, detections = _checked(annotations, images, results)
    precision = _by_cityscapesscripts(frames, detections) if official else Outcomes(frames, detections).precision()
    return {"segm": in_percent(precision)}


def cityscapes_outcomes(annotations: Path, images: Path, results: list[dict[str, Any]]) -> Outcomes:
    """Match once for AP of any weighting of images; arguments and errors as for `evaluate_cityscapes`."""
    return Outcomes(*_checked(annotations, images, results))


def _checked(annotations: Path, images: Path, results: list[dict[str, Any]]) -> tuple[list[_Frame], Detections]:
    truth = read_ground_truth(annotations, ("segm",))
    return _frames(truth.index, images), check_results(results, truth, ("segm",))


def in_percent(precision: np.ndarray) -> dict[str, float]:
    """Convert (8, 10) AP by class and threshold to {"AP", "AP50", "AP-person", ...}; NaN without objects."""
    numbers = dict.fromkeys(("AP", "AP50"), math.nan)
    if not np.isnan(precision).all():
        numbers = {"AP": np.nanmean(precision), "AP50": np.nanmean(np.ascontiguousarray(precision[:, 0]))}
    numbers |= {f"AP-{name}": np.average(row) for name, row in zip(CLASSES.values(), precision)}
    return {name: float(value) * 100 for name, value in numbers.items()}


@dataclass(frozen=True)
class _Frame:
    image_id: int
    name: str  # CITY_000000_000000_leftImg8bit
    size: tuple[int, int]
    truth: Path


def _frames(index: CocoIndex, images: Path) -> list[_Frame]:
    root = images.parent.parent / "gtFine" / images.name
    columns = zip(index.image_id.tolist(), index.file_name.tolist(), index.height.tolist(), index.width.tolist())
    return [
        _Frame(
            image_id,
            Path(name).stem,
            (height, width),
            root / f"{frame_name(images / name)}_gtFine_instanceIds.png",
        )
        for image_id, name, height, width in columns
    ]


# --- our own implementation -------------------------------------------------------------------------------------


@dataclass
class _Class:
    """The matching data of one class, over all images.

    Attributes:
        score, void, pixels: (P,) confidence, void pixels in the ground truth, pixels.
        image: (P,) index of its image.
        object_pixels: (G,). group: (G,) bool. object_image: (G,) as `image`.
        pairs: (E, 3) int64: detection, object, common pixels.
    """

    score: np.ndarray
    void: np.ndarray
    pixels: np.ndarray
    image: np.ndarray
    object_pixels: np.ndarray
    group: np.ndarray
    object_image: np.ndarray
    pairs: np.ndarray


class Outcomes:
    """Matches of every detection, by image, for AP of any weighting of images without matching again.

    Attributes:
        images: number of images.
    """

    def __init__(self, frames: list[_Frame], detections: Detections) -> None:
        self.images = len(frames)
        columns: dict[int, list[list[Any]]] = {label: [[] for _ in range(8)] for label in CLASSES}
        rows_of = _rows_by_image(detections)
        with Progress(len(frames), "matching", unit="images") as progress:
            for place, frame in enumerate(frames):
                _match(place, frame, detections, rows_of.get(frame.image_id, ()), columns)
                progress.advance()
        self._curves = [_curves(_class(columns[label])) for label in CLASSES]

    def precision(self, times: np.ndarray | None = None) -> np.ndarray:
        """Return (8, 10) float64 AP by class and threshold, NaN without objects.

        Args:
            times: (images,) weight of each image; None: 1.
        """
        times = np.ones(self.images, np.int64) if times is None else times
        return np.array([[curve.area(times) for curve in curves] for curves in self._curves])


def _rows_by_image(detections: Detections) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, image_id in enumerate(detections.image_ids.tolist()):
        rows.setdefault(image_id, []).append(row)
    return rows


def _match(place: int, frame: _Frame, detections: Detections, rows: Any, columns: dict[int, list[list[Any]]]) -> None:
    """Add one image to `columns`: the lists of a `_Class`, by class."""
    ids = read_instance_ids(frame.truth)
    if ids.shape != frame.size:
        raise UserError(
            f"{frame.truth} is {ids.shape[1]} x {ids.shape[0]}, its image {frame.size[1]} x {frame.size[0]}"
        )
    flat = ids.ravel(order="F")  # the order of run lengths
    in_image = np.bincount(flat)
    present = np.flatnonzero(in_image)
    labels = np.where(present < 1000, present, present // 1000)
    objects: dict[int, tuple[np.ndarray, int]] = {}
    for label, (*_, object_pixels, group, object_image, _) in columns.items():
        instances = present[labels == label]
        objects[label] = instances, len(object_pixels)
        object_pixels.extend(in_image[instances].tolist())
        group.extend((instances < 1000).tolist())
        object_image.extend([place] * len(instances))
    void = np.array(VOID)
    for row in rows:
        score, in_void, pixels, image, *_, pairs = columns[int(detections.category_ids[row])]
        histogram = np.bincount(flat[_pixels(detections.masks[row])], minlength=max(len(in_image), max(VOID) + 1))
        total = int(histogram.sum())
        if not total:
            continue
        instances, first = objects[int(detections.category_ids[row])]
        shared = histogram[instances]
        pairs.extend((len(score), first + k, int(shared[k])) for k in np.flatnonzero(shared).tolist())
        score.append(detections.scores[row])
        in_void.append(int(histogram[void].sum()))
        pixels.append(total)
        image.append(place)


def _class(columns: list[list[Any]]) -> _Class:
    score, void, pixels, image, object_pixels, group, object_image, pairs = columns
    return _Class(
        np.array(score, np.float64),
        *(np.array(values, np.int64) for values in (void, pixels, image, object_pixels)),
        np.array(group, bool),
        np.array(object_image, np.int64),
        np.array(pairs, np.int64).reshape(-1, 3),
    )


@dataclass
class _Curve:
    """The counted detections at one threshold, by ascending score, and the objects.

    Attributes:
        score, right, image: (D,) float64, 0. or 1., index of its image.
        object_image: (N,) of the counted objects.
    """

    score: np.ndarray
    right: np.ndarray
    image: np.ndarray
    object_image: np.ndarray

    def area(self, times: np.ndarray) -> float:
        """Return AP for weighted images: the area under the precision-recall curve, in the official order of
        arithmetic; NaN without objects.
        """
        objects = int(times[self.object_image].sum())
        if not objects:
            return math.nan
        drawn = times[self.image] > 0
        score, right, count = self.score[drawn], self.right[drawn], times[self.image[drawn]].astype(np.float64)
        if not len(score):
            return 0.0
        cumulative, before = np.cumsum(right * count), np.cumsum(count)
        first = np.flatnonzero(np.append(True, score[1:] != score[:-1]))
        below = np.append(cumulative, 0)[first - 1]  # correct ones with a lower score; the last 0 means none
        tp = cumulative[-1] - below
        fp = before[-1] - np.append(before, 0)[first - 1] - tp
        missed = objects - int(cumulative[-1])
        precision = np.append(tp / (tp + fp), 1.0)
        recall = np.append(tp / (tp + (below + missed)), 0.0)
        widths = np.convolve(np.concatenate([recall[:1], recall, [0.0]]), [-0.5, 0, 0.5], "valid")
        return float(np.dot(precision, widths))


def _curves(found: _Class) -> list[_Curve]:
    """Return one curve per threshold."""
    counts = ~found.group & (found.object_pixels >= MIN_PIXELS)
    detection, target, shared = found.pairs.T
    overlap = shared / (found.object_pixels[target] + found.pixels[detection] - shared)
    # A small group meets both official conditions and is counted twice.
    times = found.group.astype(np.int64) + (found.object_pixels < MIN_PIXELS)
    ignored = found.void.copy()
    np.add.at(ignored, detection, shared * times[target])
    ignored_share = ignored / found.pixels
    return [_at(t, found, counts, overlap, ignored_share) for t in OVERLAPS]


def _at(threshold: float, found: _Class, counts: np.ndarray, overlap: np.ndarray, ignored_share: np.ndarray) -> _Curve:
    """Match at one threshold: of the detections with enough overlap, the most confident is correct, the others
    wrong.
    """
    detection, target, _ = found.pairs.T
    above = overlap > threshold
    matched = np.flatnonzero(above & counts[target])
    matched = matched[np.lexsort((found.score[detection[matched]], target[matched]))]
    right = np.ones(len(matched), bool)
    right[:-1] = target[matched][1:] != target[matched][:-1]
    alone = np.ones(len(found.score), bool)
    alone[detection[above]] = False
    wrong = np.flatnonzero(alone & (ignored_share <= threshold))
    rows = np.concatenate([detection[matched], wrong])
    order = np.argsort(found.score[rows])
    rows, right = rows[order], np.append(right, np.zeros(len(wrong), bool))[order]
    return _Curve(found.score[rows], right.astype(np.float64), found.image[rows], found.object_image[counts])


def _pixels(rle: dict[str, Any]) -> np.ndarray:
    """Return the positions of a mask's pixels in column order, int64."""
    height, width = rle["size"]
    try:
        lengths = rle_lengths(rle["counts"].encode("ascii"))
    except ValueError as error:
        raise UserError(f"a result's mask {error}; write it again") from error
    if ((lengths < 0) | (lengths > height * width)).any() or lengths.sum() != height * width:
        raise UserError(f"a result's mask has run lengths that do not add up to {height} x {width}; write it again")
    ends = np.cumsum(lengths)
    starts, sizes = ends[:-1:2], lengths[1::2]
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum())


# --- by the benchmark's own code --------------------------------------------------------------------------------


def _by_cityscapesscripts(frames: list[_Frame], detections: Detections) -> np.ndarray:
    """Compute `Outcomes.precision` by cityscapesscripts, which reads results from files in a temporary folder."""
    module = official_module("evalInstanceLevelSemanticLabeling")
    with tempfile.TemporaryDirectory(prefix="cityscapes_") as folder:
        for name, content in submission_files(frames, detections):
            (Path(folder) / name).write_bytes(content)
        settings = module.CArgs()
        vars(settings).update(vars(module.args))
        settings.quiet, settings.predictionPath = True, str(Path(folder).resolve())
        settings.gtInstancesFile = str(Path(folder) / "gtInstances.json")
        module.setInstanceLabels(settings)
        truth = [str(frame.truth) for frame in frames]
        found = [str(Path(folder).resolve() / f"{frame.name}_pred.txt") for frame in frames]
        try:
            instances = module.getGtInstances(truth, settings)
            matches = module.matchGtWithPreds(found, truth, instances, settings)
            return _by_class_and_threshold(module, matches, settings)
        except SystemExit as error:  # its way of raising, after printing the error
            raise UserError("cityscapesscripts refused the results (its reason is printed above)") from error


def _by_class_and_threshold(module: ModuleType, matches: dict[str, Any], settings: Any) -> np.ndarray:
    """Return (8, 10) AP, one at a time: where all detections of a class are ignored that code fails, and AP is 0."""
    precision = np.zeros((len(CLASSES), len(OVERLAPS)))
    for row, label in zip(precision, CLASSES.values()):
        for column, threshold in enumerate(OVERLAPS):
            settings.instLabels, settings.overlaps = [label], [threshold]
            try:
                row[column] = module.evaluateMatches(matches, settings)[0, 0, 0]
            except IndexError:
                row[column] = 0.0
    return precision


def official_module(name: str) -> ModuleType:
    """Import a module of cityscapesscripts.evaluation; UserError if it is not installed."""
    try:
        module = importlib.import_module(f"cityscapesscripts.evaluation.{name}")
    except ImportError as error:
        raise UserError(
            f"--evaluator {OFFICIAL} needs cityscapesscripts; run pip install 'loco_det[cityscapes]', or leave the "
            "option out, which gives the same numbers"
        ) from error
    if not hasattr(np, "in1d"):  # removed in NumPy 2.4, but that code calls it
        module.np = _NumpyWithIn1d()
    return module


class _NumpyWithIn1d:
    in1d = staticmethod(np.isin)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


# --- files for the benchmark's server ---------------------------------------------------------------------------


def submission_files(frames: list[_Frame], detections: Detections) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) in the benchmark's format: for each image a text file, and a PNG per detection."""
    rows_of = _rows_by_image(detections)
    for frame in frames:
        lines = []
        for number, row in enumerate(rows_of.get(frame.image_id, ())):
            label = int(detections.category_ids[row])
            name = f"{frame.name}_{number}_{CLASSES[label]}.png"
            yield name, cv2.imencode(".png", coco_mask.decode(detections.masks[row]) * 255)[1].tobytes()
            lines.append(f"{name} {label} {float(detections.scores[row])!r}\n")
        yield f"{frame.name}_pred.txt", "".join(lines).encode()


def write_submission(annotations: Path, images: Path, results: list[dict[str, Any]], path: Path) -> None:
    """Write a zip for submission with the images listed in `annotations`.

    Raises:
        UserError: invalid results, or the file cannot be written.
    """
    index = load_index(annotations)
    frames = _frames(index, images)
    truth = GroundTruth(index, np.zeros(0, np.int64), None)  # the test split's is secret
    detections = check_results(results, truth, ("segm",))
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:  # PNG does not compress
        for name, content in submission_files(frames, detections):
            archive.writestr(name, content)
