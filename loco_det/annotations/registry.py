"""Finds a data set on disk by its name.

The root is the environment variable DETECTRON2_DATASETS, default ./datasets; names of COCO and Pascal VOC are
Detectron2's (data/datasets/builtin.py; voc.py has VOC's). Any other name FOO_SPLIT is a COCO-format set in the same
layout:

    ROOT/FOO/SPLIT/                               images
    ROOT/FOO/annotations/instances_SPLIT.json     annotations

LVIS's images are COCO's: ROOT/coco/{train2017,val2017}/ and ROOT/lvis/lvis_v1_{train,val}.json. Cityscapes
(`cityscapes.py`, pixel labels: `pixels.py`) is read in its original folders; NAME@masks uses its bitmaps instead of its
polygons. NAME@1pct_seed0 and the like are subsets of any of them (`subsets.py`); pixel labels have percentages only. A
path can replace a name: of objects (`paths.py`), as in cells/annotations.json@cells/images; of pixel labels
(`label_folders.py`), as in street/masks@street/images.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from loco_det.annotations.cityscapes import PREFIX, SPLITS, cityscapes_annotations, is_cityscapes
from loco_det.annotations.index import CocoIndex, load_index
from loco_det.annotations.label_folders import find_folders, folder_annotations, is_labels_path
from loco_det.annotations.paths import find_path, is_path, split_parts
from loco_det.annotations.pixels import PREFIX as SEMANTIC
from loco_det.annotations.pixels import PixelLabels, is_semantic, semantic_annotations
from loco_det.annotations.subsets import check_part, part_of
from loco_det.annotations.voc import VOC_SETS, voc_annotations, voc_places
from loco_det.core.errors import UserError

# name: (image folder, annotation file) below ROOT/coco
_COCO = {
    "coco_2014_train": ("train2014", "instances_train2014"),
    "coco_2014_val": ("val2014", "instances_val2014"),
    "coco_2014_minival": ("val2014", "instances_minival2014"),
    "coco_2014_valminusminival": ("val2014", "instances_valminusminival2014"),
    "coco_2017_train": ("train2017", "instances_train2017"),
    "coco_2017_val": ("val2017", "instances_val2017"),
    "coco_2017_val_100": ("val2017", "instances_val2017_100"),
    "coco_2017_test": ("test2017", "image_info_test2017"),
    "coco_2017_test-dev": ("test2017", "image_info_test-dev2017"),
}

COCO_NAMES = tuple(_COCO)
LVIS_NAMES = ("lvis_v1_train", "lvis_v1_val")
MAX_PARTS = 8  # of a name: a part of a part of ...


@dataclass(frozen=True)
class Dataset:
    """A data set, resolved once from its name.

    Attributes:
        name: as in the configuration, parts included.
        images: the folder that file names are relative to.
        annotations: a JSON file in COCO's format.
        derived: the file was made here from another format or file, so it must be registered in Detectron2.
        benchmark: from `benchmark_of`.
        secret: the ground truth is not public, so results can only be submitted.
    """

    name: str
    images: Path
    annotations: Path
    derived: bool = False
    benchmark: str = "coco"
    secret: bool = False

    @cached_property
    def index(self) -> CocoIndex:
        """The index of the annotation file, read once."""
        return load_index(self.annotations)

    @cached_property
    def labels(self) -> PixelLabels:
        """Of a data set of pixels."""
        return PixelLabels(self.annotations, self.images, self.index.category_id, self.index.category_names)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("index", "labels")}

    @property
    def is_pixels(self) -> bool:
        return self.benchmark in ("pixels", "labels")


def datasets_root() -> Path:
    """Return the root folder of data sets."""
    return Path(os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets")))


def present_datasets() -> list[str]:
    """Return the known names whose files or folders exist; nothing is read, so they may be incomplete."""
    root = datasets_root()
    there = {name: (root / "coco" / i, root / "coco" / "annotations" / f"{a}.json") for name, (i, a) in _COCO.items()}
    there.update({name: (root / "coco", root / "lvis" / f"{name}.json") for name in LVIS_NAMES})
    there.update({name: voc_places(name, root) for name in VOC_SETS})
    for split in SPLITS:
        folders = tuple(root / "cityscapes" / kind / split for kind in ("leftImg8bit", "gtFine"))
        there.update({f"{prefix}{split}": folders for prefix in (PREFIX, SEMANTIC)})
    return [name for name, paths in there.items() if all(path.exists() for path in paths)]


def benchmark_of(name: str) -> str:
    """Return a data set's benchmark: coco, lvis, voc, cityscapes; of pixel labels pixels (Cityscapes) or labels."""
    whole = name.partition("@")[0]
    families = {
        "cityscapes": is_cityscapes(name),
        "pixels": is_semantic(name),
        "labels": is_labels_path(name),
        "voc": whole in VOC_SETS,
        "lvis": whole in LVIS_NAMES,
    }
    return next((family for family, member in families.items() if member), "coco")


def measure_of(name: str, masks: bool) -> str:
    """Return the measure, a module of `evaluation/`, for detections with or without masks: Cityscapes' needs masks."""
    benchmark = benchmark_of(name)
    return "coco" if benchmark == "cityscapes" and not masks else benchmark


def folder_name(name: str) -> str:
    """Return a folder name for results on a data set: its name, or a path's end and a digest of the whole."""
    if not is_path(name):
        return name
    end = re.sub(r"[^\w.@+-]+", "_", name).strip("_")[-60:]
    return f"{end}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def find_dataset(name: str) -> Dataset:
    """Find a data set by its name; its files exist.

    Args:
        name: e.g. `coco_2017_train`, `voc_2007_test`, or FOO_SPLIT; optionally with @PART (`annotations/subsets.py`);
            or a path (`annotations/paths.py`).

    Raises:
        UserError: the name has no split, the folder or file is missing, or the part is invalid.
    """
    if is_path(name):
        whole, parts = split_parts(name)
        masks = False
    else:
        whole, *parts = name.split("@")
        masks = is_cityscapes(whole) and parts[:1] == ["masks"]
        parts = parts[masks:]
    if len(parts) > MAX_PARTS:
        raise UserError(f"data set {whole}: {len(parts)} parts of parts; {MAX_PARTS} are enough, leave the others out")
    for part in parts:
        check_part(part, name, objects=not has_pixels(whole))  # before anything is read
    dataset = _find_path(whole) if is_path(name) else _find_whole(whole, masks)
    for part in parts:
        dataset = replace(dataset, annotations=part_of(dataset.annotations, part, name), derived=True)
    return replace(dataset, name=name, benchmark=benchmark_of(name))


def has_pixels(name: str) -> bool:
    """Whether a data set has a label for each pixel and no objects, from its name or path."""
    return is_semantic(name) or is_labels_path(name)


def _find_path(whole: str) -> Dataset:
    folders = find_folders(whole)
    if folders is None:
        return Dataset(whole, *find_path(whole))
    return Dataset(whole, folders.images, folder_annotations(whole, folders), derived=True)


def _find_whole(name: str, masks: bool) -> Dataset:
    root = datasets_root()
    if is_cityscapes(name):
        split, folder = name.removeprefix(PREFIX), root / "cityscapes"
        annotations = cityscapes_annotations(folder, split, from_polygons=not masks)
        images = folder / "leftImg8bit" / split
        return Dataset(name, images, annotations, derived=True, secret=split == "test")
    if is_semantic(name):
        split, folder = name.removeprefix(SEMANTIC), root / "cityscapes"
        images, annotations = folder / "leftImg8bit" / split, semantic_annotations(folder, split)
        return Dataset(name, images, annotations, derived=True, secret=split == "test")
    if name in VOC_SETS:
        return Dataset(name, *voc_annotations(name, root))
    if name in _COCO:
        folder, (images, annotations) = root / "coco", _COCO[name]
    elif name in LVIS_NAMES:
        return _existing(Dataset(name, root / "coco", root / "lvis" / f"{name}.json"), root)
    else:
        stem, _, split = name.rpartition("_")
        if not stem or not split:
            raise UserError(
                f"DATASETS: '{name}' is neither a COCO name such as coco_2017_train nor of the form NAME_SPLIT, "
                "which stands for ROOT/NAME/SPLIT/ and ROOT/NAME/annotations/instances_SPLIT.json; a path has a slash "
                f"in it, ./{name}, or is FILE.json@FOLDER."
            )
        folder, images, annotations = root / stem, split, f"instances_{split}"
    return _existing(Dataset(name, folder / images, folder / "annotations" / f"{annotations}.json"), root)


def _existing(dataset: Dataset, root: Path) -> Dataset:
    for path, there in ((dataset.annotations, os.path.isfile), (dataset.images, os.path.isdir)):
        if not there(path):
            raise UserError(
                f"Dataset '{dataset.name}' needs {path}, which does not exist; put it there or set "
                f"DETECTRON2_DATASETS to the folder that holds the datasets (now '{root}')."
            )
    return dataset
