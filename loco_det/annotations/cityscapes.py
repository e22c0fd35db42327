"""Cityscapes instances from the original folders, in COCO's format.

    ROOT/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png         images
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_polygons.json         outlines, later ones drawn over earlier ones
    ROOT/gtFine/SPLIT/CITY/NAME_gtFine_instanceIds.png       the benchmark's ground truth

Annotations are those of Detectron2's `load_cityscapes_instances` (data/datasets/cityscapes.py): by default polygons
minus what later ones hide, exteriors only; or the bitmaps, pixel-exact.

Shape legend: H x W the image's size in pixels, 1024 x 2048 in the original.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from loco_det.annotations.converted import derived_file, files_digest
from loco_det.annotations.segmentation import FARTHEST, check_outlines, mask_area
from loco_det.core.device import usable_cores
from loco_det.core.errors import UserError
from loco_det.core.files import read_regular
from loco_det.core.launch import leave_stopping_to_parent
from loco_det.core.log import Progress, log
from loco_det.images.decode import SUFFIXES as IMAGE_SUFFIXES
from loco_det.images.decode import check_pixels, too_large

# Source: cityscapesscripts/helpers/labels.py, compared in a test. Ids from 24 to 33 have instances.
LABELS = {
    "unlabeled": 0, "ego vehicle": 1, "rectification border": 2, "out of roi": 3, "static": 4, "dynamic": 5,
    "ground": 6, "road": 7, "sidewalk": 8, "parking": 9, "rail track": 10, "building": 11, "wall": 12, "fence": 13,
    "guard rail": 14, "bridge": 15, "tunnel": 16, "pole": 17, "polegroup": 18, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26,
    "truck": 27, "bus": 28, "caravan": 29, "trailer": 30, "train": 31, "motorcycle": 32, "bicycle": 33,
    "license plate": -1,
}  # fmt: skip
CLASSES = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
# Label ids of pixels that evaluation ignores.
VOID = (*range(7), 9, 10, 14, 15, 16, 18, 29, 30)
FIRST_INSTANCE = 24
SPLITS = ("train", "val", "test")
PREFIX = "cityscapes_fine_instance_seg_"


class Frame(NamedTuple):
    """The files of one image."""

    image: Path
    instances: Path
    polygons: Path


def is_cityscapes(name: str) -> bool:
    """Whether a name, with or without @parts, is a Cityscapes instance segmentation set."""
    return name.startswith(PREFIX) and name.partition("@")[0].removeprefix(PREFIX) in SPLITS


def cityscapes_frames(root: Path, split: str) -> list[Frame]:
    """Return the images of a split and their annotation files, sorted by city and name.

    Raises:
        UserError: the folders are missing or hold no images.
    """
    images, truth = root / "leftImg8bit" / split, root / "gtFine" / split
    for folder in (images, truth):
        if not folder.is_dir():
            raise UserError(
                f"Data set '{PREFIX}{split}' needs {folder}, which does not exist; unpack leftImg8bit_trainvaltest.zip "
                f"and gtFine_trainvaltest.zip into {root}, or set DETECTRON2_DATASETS to the folder that holds it."
            )
    suffix = "_leftImg8bit.png"
    of_frame: dict[str, Path] = {}  # by CITY/NAME; PNG before what was made of it
    for image in sorted(images.glob("*/*_leftImg8bit.*"), key=lambda image: image.suffix == ".png"):
        if image.suffix.lower() in IMAGE_SUFFIXES:
            of_frame[frame_name(image)] = image
    frames = []
    for name, image in sorted(of_frame.items()):
        stem = truth / name
        frames.append(Frame(image, Path(f"{stem}_gtFine_instanceIds.png"), Path(f"{stem}_gtFine_polygons.json")))
    have = set(of_frame)
    of_truth = (path.relative_to(truth).as_posix() for path in truth.glob("*/*_gtFine_*"))
    lost = sorted({name.partition("_gtFine_")[0] for name in of_truth} - have)
    if frames and lost:
        raise UserError(
            f"{images} lacks {len(lost)} of the images that {truth} is of, {lost[0]}{suffix} first; unpack all of "
            f"leftImg8bit_trainvaltest.zip into {root}."
        )
    if not frames:
        raise UserError(f"{images} holds no CITY/*{suffix}; unpack leftImg8bit_trainvaltest.zip into {root}.")
    return frames


def frame_name(image: Path) -> str:
    """CITY/NAME of .../CITY/NAME_leftImg8bit.png, or .jpg and the like."""
    return f"{image.parent.name}/{image.name.rpartition('_leftImg8bit.')[0]}"


def cityscapes_annotations(root: Path, split: str, *, from_polygons: bool = True) -> Path:
    """Return a split's COCO annotation file, made if missing; file names are relative to leftImg8bit/SPLIT.

    Args:
        from_polygons: use the JSON files; False: exact masks, as RLE, from the instanceIds PNG.

    Raises:
        UserError: a file is missing or malformed, or shapely, needed for polygons, is not installed.
    """
    frames = cityscapes_frames(root, split)
    if from_polygons:
        require_shapely()
    read = [frame.polygons if from_polygons else frame.instances for frame in frames]
    facts = {
        "format": 1,
        "from_polygons": from_polygons,
        "images": [str(frame.image.relative_to(root)) for frame in frames],
        "files": files_digest(read, root),
    }
    folder = root / "leftImg8bit" / split
    kind = "polygons" if from_polygons else "masks"
    return derived_file(
        f"{PREFIX}{split}_{kind}", facts, lambda: json.dumps(coco_format(frames, folder, from_polygons)).encode()
    )


def coco_format(frames: list[Frame], folder: Path, from_polygons: bool) -> dict[str, Any]:
    """Return the content of a COCO annotation file; file names are relative to `folder`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    read = instances_from_polygons if from_polygons else instances_from_masks
    for number, (frame, found) in enumerate(zip(frames, _all(read, frames)), 1):
        name = frame.image.relative_to(folder).as_posix()
        images.append({"id": number, "file_name": name, "height": found["height"], "width": found["width"]})
        for entry in found["annotations"]:
            x0, y0, x1, y1 = entry["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": entry["category_id"],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": mask_area(entry["segmentation"], found["height"], found["width"]),
                    "iscrowd": int(entry["iscrowd"]),
                    "segmentation": entry["segmentation"],
                }
            )
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _all(read: Any, frames: list[Frame]) -> Any:
    """Apply `read` to every frame in order; in several processes if there are enough."""
    cores = usable_cores()
    description = "Cityscapes annotations"
    with Progress(len(frames), description, unit="images") as progress:
        if cores == 1 or len(frames) < 100 or "fork" not in multiprocessing.get_all_start_methods():
            for frame in frames:
                yield read(frame)
                progress.advance()
            return
        log.info("%s: read once, in %d processes, and kept for later runs", description, cores)
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(cores, fork, leave_stopping_to_parent) as pool:
            for found in pool.map(read, frames, chunksize=8):
                yield found
                progress.advance()


# --- polygons ---------------------------------------------------------------------------------------------------


def require_shapely() -> None:
    """Refuse with UserError to go on without shapely."""
    try:
        import shapely  # noqa: F401
    except ImportError as error:
        raise UserError(
            "reading Cityscapes' polygons needs shapely; run pip install 'loco_det[cityscapes]', or name the data set "
            "with @masks at its end and set INPUT.MASK_FORMAT bitmask"
        ) from error


def instances_from_polygons(frame: Frame) -> dict[str, Any]:
    """Return an image's {"height", "width", "annotations": [{"iscrowd", "category_id", "segmentation", "bbox" XYXY}]}.

    Objects are drawn in order, so the last is complete and earlier ones lose what later ones cover. An outline's
    corners are pixels and the official rasteriser draws every pixel that it touches, so it is half a pixel wider than
    the polygon through their centres.
    """
    from shapely.geometry import Polygon

    content = _read_polygons(frame.polygons)
    covered = Polygon()
    annotations = []
    for number, entry in reversed(list(enumerate(content["objects"]))):
        if "deleted" in entry:
            continue
        group = entry["label"].endswith("group")
        name = entry["label"] if entry["label"] in LABELS else entry["label"].removesuffix("group")
        if name not in LABELS:
            raise UserError(f"{frame.polygons}: object {number} has the unknown label {entry['label']!r}; correct it")
        label = LABELS[name]
        if label < 0:
            continue
        try:
            points = np.asarray(entry["polygon"], dtype=float)
            check_outlines([points.reshape(-1)], f"{frame.polygons}: object {number}")
            shape = Polygon(points.astype("f4") + 0.5).buffer(0.5, quad_segs=4)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{frame.polygons}: object {number} is no polygon ({error}); correct it") from error
        if label not in CLASSES:
            covered = covered.union(shape)
            continue
        visible = shape.difference(covered)
        if visible.is_empty:
            continue
        covered = covered.union(shape)
        parts = [part for part in getattr(visible, "geoms", [visible]) if part.geom_type == "Polygon"]
        annotations.append(
            {
                "iscrowd": group,
                "category_id": label,
                "segmentation": [[float(v) for point in part.exterior.coords for v in point] for part in parts],
                "bbox": visible.bounds,
            }
        )
    return {"height": content["imgHeight"], "width": content["imgWidth"], "annotations": annotations}


def _read_polygons(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path))
        sizes = content["imgHeight"], content["imgWidth"]
        labels = [entry["label"] for entry in content["objects"]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); complete the data set") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is no Cityscapes polygon file ({error!r}); take an intact copy") from error
    sized = all(isinstance(size, int) and 0 < size <= FARTHEST for size in sizes)
    if not sized or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: has no usable size or labels; take an intact copy")
    return content


# --- bitmaps ----------------------------------------------------------------------------------------------------


@contextmanager
def opened_map(path: Path, remedy: str = "take an intact copy") -> Iterator[Image.Image]:
    """Open a PNG whose pixels are numbers; read its pixels inside the block.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are judged here
            image = Image.open(io.BytesIO(read_regular(path)))
        check_pixels(*image.size, str(path))
        with image:
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise too_large(str(path)) from error
    except Exception as error:  # PIL raises nearly anything, depending on the damage
        reason = str(error).replace("<_io.BytesIO object at ", "<").split("<")[0].strip()
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from error


def read_instance_ids(path: Path) -> np.ndarray:
    """Read an instanceIds PNG as (H, W) int32: label id * 1000 + object number, or label id for groups and stuff.

    Raises:
        UserError: missing or invalid.
    """
    with opened_map(path) as image:
        ids = np.array(image)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{path}: is {ids.dtype} of shape {ids.shape}, not a map of instance ids; take an intact copy")
    return ids.astype(np.int32)


def instances_from_masks(frame: Frame, *, to_polygons: bool = False) -> dict[str, Any]:
    """Read instances as `instances_from_polygons` does, from the bitmaps: compressed RLE, or outer contours."""
    ids = read_instance_ids(frame.instances)
    annotations = []
    for instance in np.unique(ids[ids >= FIRST_INSTANCE]).tolist():
        label = instance // 1000 if instance >= 1000 else instance
        if label not in CLASSES:
            continue
        mask = np.asfortranarray(ids == instance, dtype=np.uint8)
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = columns[0], rows[0], columns[-1], rows[-1]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        segmentation: Any
        if to_polygons:
            contours = cv2.findContours(mask.copy(), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[-2]
            segmentation = [contour.reshape(-1).tolist() for contour in contours if len(contour) >= 3]
            if not segmentation:
                continue
        else:
            encoded = coco_mask.encode(mask)
            segmentation = {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}
        annotations.append(
            {
                "iscrowd": instance < 1000,
                "category_id": label,
                "segmentation": segmentation,
                "bbox": tuple(float(v) for v in box),
            }
        )
    return {"height": ids.shape[0], "width": ids.shape[1], "annotations": annotations}
