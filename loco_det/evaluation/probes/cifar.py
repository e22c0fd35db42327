"""Reads CIFAR-10 and CIFAR-100 as downloaded, the "python" and the "binary" version, without unpickling.

Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. A row is 3072 bytes, the red, green and blue plane of 32 x 32
pixels; in the binary version one label byte stands before it, or two (coarse, fine) in CIFAR-100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from loco_det.convert.load import load_tensors
from loco_det.core.errors import UserError
from loco_det.core.files import read_regular
from loco_det.images.source import Source

_TEN = [f"data_batch_{i}" for i in range(1, 6)]
# folder: {split: files}, file of class names and its key, key of labels or label bytes before a row
_PYTHON = {
    "cifar-10-batches-py": ({"train": _TEN, "test": ["test_batch"]}, ("batches.meta", "label_names"), "labels"),
    "cifar-100-python": ({"train": ["train"], "test": ["test"]}, ("meta", "fine_label_names"), "fine_labels"),
}
_BINARY = {
    "cifar-10-batches-bin": (
        {"train": [f"{name}.bin" for name in _TEN], "test": ["test_batch.bin"]},
        "batches.meta.txt",
        1,
    ),
    "cifar-100-binary": ({"train": ["train.bin"], "test": ["test.bin"]}, "fine_label_names.txt", 2),
}
_PIXELS = 3 * 32 * 32
_HEADER = b"P6 32 32 255\n"


class CifarSource(Source):
    """Images in arrays; `read` returns each as a PPM, which any decoder reads losslessly."""

    def __init__(self, root: Path, split: str, pixels: np.ndarray, labels: list[str]) -> None:
        super().__init__(str(root), [f"{split}-{i:05d}" for i in range(len(labels))], labels)
        self._pixels = pixels  # (n, 3072) uint8

    def read(self, index: int) -> bytes:
        planes = self._pixels[index].reshape(3, 32, 32)
        return _HEADER + planes.transpose(1, 2, 0).tobytes()


def is_cifar(path: str) -> bool:
    """Whether `path` is an unpacked folder of a CIFAR download."""
    return Path(path).is_dir() and Path(path).name in (*_PYTHON, *_BINARY)


def open_cifar(path: str, split: str) -> CifarSource:
    """Open the "train" or "test" images of a CIFAR folder, with the data set's class names.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    root = Path(path)
    if root.name in _PYTHON:
        splits, (names_file, names_key), label_key = _PYTHON[root.name]
        names = [_text(name) for name in _pickled(root / names_file, names_key)]
        parts = [_python_part(root / file, label_key) for file in splits[split]]
    else:
        splits, names_file, before = _BINARY[root.name]
        names = [name for name in _bytes(root / names_file).decode("utf-8", "replace").split() if name]
        parts = [_binary_part(root / file, before) for file in splits[split]]
    pixels, labels = (np.concatenate(column) for column in zip(*parts))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(f"{root}: has labels from {labels.min()} to {labels.max()} for {len(names)} class names")
    return CifarSource(root, split, pixels, [names[label] for label in labels])


def _python_part(file: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(_pickled(file, "data"))
    labels = np.asarray(_pickled(file, label_key), dtype=np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise UserError(f"{file}: holds {pixels.shape} {pixels.dtype}, not a row of {_PIXELS} bytes for each label")
    return pixels, labels


def _binary_part(file: Path, before: int) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(_bytes(file), np.uint8)
    if not data.size or data.size % (before + _PIXELS):
        raise UserError(f"{file}: has {data.size} bytes, not whole rows of {before + _PIXELS}; take an intact copy")
    rows = data.reshape(-1, before + _PIXELS)
    return rows[:, before:], rows[:, before - 1].astype(np.int64)


def _pickled(file: Path, key: str) -> Any:
    if not file.is_file():
        raise UserError(f"{file}: no such file; take an intact copy of the data set")
    content = {_text(name): value for name, value in load_tensors(file).items()}
    if key not in content:
        raise UserError(f"{file}: has no {key!r}; take an intact copy of the data set")
    return content[key]


def _text(name: Any) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def _bytes(file: Path) -> bytes:
    try:
        return read_regular(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); take an intact copy of the data set") from error
