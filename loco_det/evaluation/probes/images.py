"""The labelled images of a probe, split into training and test images.

| `--data` | trained on | tested on |
|---|---|---|
| anything with `--val` | all of `--data` | all of `--val` |
| a folder or zip holding `train` and `val`, `valid`, `validation` or `test` | `train` | the first of those |
| class folders, a zip of class folders, a list with classes | four fifths | a fifth of each class, by a seeded rule |
| CIFAR as downloaded: `cifar-10-batches-py`, `cifar-100-binary`, ... | the training files | the test file |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from loco_det.annotations.subsets import share_of_each_class
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.cifar import is_cifar, open_cifar
from loco_det.images.folders import open_source
from loco_det.images.source import Source

TEST_FOLDERS = ("val", "valid", "validation", "test")
TEST_SHARE = 0.2


@dataclass(frozen=True)
class LabelledImages:
    """A subset of a source's images.

    Attributes:
        index: (n,) int64, positions in the source.
        labels: (n,) int64, indices of the probe's classes.
    """

    source: Source
    index: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def names(self) -> list[str]:
        """Return CLASS/FILE of every image, which decides its subsets independently of the set's location."""
        return [f"{self.source.classes[self.source.label(i)]}/{_last(self.source.name(i))}" for i in self.index]

    def part(self, share: float, seed: int) -> LabelledImages:
        """Return a share of each class, see `loco_det.annotations.subsets`; smaller shares are part of larger ones."""
        return self.take(share_of_each_class(self.labels, self.names(), share, seed))

    def take(self, rows: np.ndarray) -> LabelledImages:
        """Return the images at `rows`."""
        return replace(self, index=self.index[rows], labels=self.labels[rows])


@dataclass(frozen=True)
class ProbeData:
    """Training and test images; `split` describes the origin of the test images."""

    classes: list[str]
    train: LabelledImages
    test: LabelledImages
    split: str


def open_probe_data(path: str, val: str | None = None, *, limit: int = 0, seed: int = 0) -> ProbeData:
    """Open the images at `path`, see the module's table.

    Args:
        val: path of the test images, if they are not found beside the others.
        limit: approximate maximum of each split, the same share of every class; 0 for all.
        seed: seed of the split and of `limit`.

    Raises:
        UserError: nothing found, no labels, a single class, or test images of a class without training images.
    """
    train, test, split = _open_both(path, val)
    if not train.classes:
        raise UserError(f"--data {path}: its images have no classes; give class folders, or a list with classes")
    if len(train.classes) < 2:
        raise UserError(f"--data {path}: has only the class {train.classes[0]!r}, so there is nothing to tell apart")
    if test is None:
        everything = _labelled(train, train.classes)
        rows = share_of_each_class(everything.labels, everything.names(), TEST_SHARE, seed)
        data = ProbeData(
            train.classes,
            everything.take(np.setdiff1d(np.arange(len(everything)), rows)),
            everything.take(rows),
            f"{TEST_SHARE:.0%} of each class held out by seed {seed}, for there is no test set",
        )
        if len(np.unique(data.train.labels)) < len(train.classes):
            raise UserError(f"--data {path}: a class has a single image; give at least two of each, or --val")
    else:
        data = ProbeData(train.classes, _labelled(train, train.classes), _labelled(test, train.classes), split)
    if limit:
        parts = [half.part(min(1.0, limit / len(half)), seed) for half in (data.train, data.test)]
        data = replace(data, train=parts[0], test=parts[1])
    return data


def _open_both(path: str, val: str | None) -> tuple[Source, Source | None, str]:
    if is_cifar(path) and val is None:
        return open_cifar(path, "train"), open_cifar(path, "test"), "the data set's own test images"
    if val is not None:
        return _whole(path, "--data"), _whole(val, "--val"), f"--val {val}"
    root = Path(path)
    if root.is_dir():
        other = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
        if other and (root / "train").is_dir():
            return _open(root / "train"), _open(root / other), f"the folder {other}"
        return _open(path), None, ""
    whole = _open(path)
    other = next((name for name in TEST_FOLDERS if name in whole.classes), None)
    if other and "train" in whole.classes:
        file = path.partition("!")[0]
        return (
            _open(f"{file}!{_inside(whole, 'train')}"),
            _open(f"{file}!{_inside(whole, other)}"),
            f"the folder {_inside(whole, other)} in the zip",
        )
    return whole, None, ""


def _whole(path: str, option: str) -> Source:
    """Open the images of --data or --val; a folder of two splits would make classes of them."""
    source = _open(path, option)
    splits = {"train", *TEST_FOLDERS} & set(source.classes)
    if "train" in splits and len(splits) > 1:
        raise UserError(f"{option} {path}: holds {' and '.join(sorted(splits))}; name one of them, or leave --val out")
    return source


def _open(path: str | Path, option: str = "--data") -> Source:
    root = Path(path)
    try:
        source = open_source(path)
    except UserError as error:  # its message names pretraining's keys
        if root.is_file() and "DATA.FORMAT" in str(error):
            raise UserError(f"{option} {path}: is no .zip, .tar or .txt list; give one of them, or a folder") from error
        raise UserError(str(error).replace("DATA.PATH", option)) from error
    if type(source) is Source and root.is_dir() and source.classes:  # class folders
        folders = {entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."}
        if empty := folders - set(source.classes):
            raise UserError(f"{option} {path}: class folder {min(empty)} holds no images; fill or remove it")
    return source


def _inside(source: Source, name: str) -> str:
    """Return the path in the zip of the folder for class `name`; all classes share everything above it."""
    number = source.classes.index(name)
    member = next(source.name(i) for i in range(len(source)) if source.label(i) == number)
    parts = PurePosixPath(member.partition("!")[2]).parts
    return "/".join(parts[: parts.index(name) + 1])


def _labelled(source: Source, classes: list[str]) -> LabelledImages:
    if not source.classes:
        raise UserError(f"{source.root}: its images have no classes; give class folders, or a list with classes")
    unknown = sorted(set(source.classes) - set(classes))
    if unknown:
        raise UserError(f"{source.root}: class {unknown[0]!r} is not among the training classes; correct the folders")
    number = np.array([classes.index(name) for name in source.classes], np.int64)
    labels = number[[source.label(i) for i in range(len(source))]]
    return LabelledImages(source, np.arange(len(source), dtype=np.int64), labels)


def _last(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name
