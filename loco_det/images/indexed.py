"""Opens Python data sets with `__len__` and `__getitem__` as a `Source`, including torchvision's and Hugging Face's.

    source = DatasetSource(torchvision.datasets.STL10("data", split="unlabeled"))
    source = DatasetSource([{"picture": array, "kind": "cat"}, ...], image="picture", label="kind")
    pretrain(cfg, source=source)

An item is an image, an (image, label, ...) tuple or a mapping with columns; an image is PIL's, an (H, W), (H, W, 1),
(H, W, 3) or (H, W, 4) uint8 array, a (1 or 3, H, W) tensor of uint8 or of floats in [0, 1], encoded bytes, a path, or
Hugging Face's {"bytes", "path"}.

In a configuration, DATA.FORMAT `torchvision:NAME` opens one of the classes in `TORCHVISION` on the files under
DATA.PATH (nothing is downloaded), and `huggingface` a folder that `save_to_disk` wrote (extra `huggingface`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from loco_det.core.errors import UserError
from loco_det.images.decode import pil_rgb, read_file
from loco_det.images.source import Source

# torchvision's classes for configurations, and the arguments that select their training images.
TORCHVISION: dict[str, dict[str, Any]] = {
    "CIFAR10": {"train": True},
    "CIFAR100": {"train": True},
    "Country211": {"split": "train"},
    "DTD": {"split": "train"},
    "EuroSAT": {},
    "FGVCAircraft": {"split": "trainval"},
    "FashionMNIST": {"train": True},
    "Flowers102": {"split": "train"},
    "Food101": {"split": "train"},
    "GTSRB": {"split": "train"},
    "Imagenette": {"split": "train"},
    "MNIST": {"train": True},
    "OxfordIIITPet": {"split": "trainval"},
    "PCAM": {"split": "train"},
    "RenderedSST2": {"split": "train"},
    "STL10": {"split": "unlabeled"},
    "SUN397": {},
    "SVHN": {"split": "train"},
}


class DatasetSource(Source):
    """Images of any indexable object.

    Args:
        dataset: has `__len__` and `__getitem__`; read in worker processes, so it must support fork and pickling.
        image: column of the image, for mappings.
        label: column of its class, a number or a name; "" for none. Tuples have it second.
        labels: one class name or number per image, instead of the data set's.
        root: name in messages.

    Raises:
        UserError: no images, or inconsistent labels.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image: str = "image",
        label: str = "label",
        labels: Sequence[Any] | None = None,
        root: str = "",
    ) -> None:
        root = root or type(dataset).__name__
        count = len(dataset)
        if not count:
            raise UserError(f"{root}: the data set is empty")
        self.dataset, self._image, self._length = dataset, image, count
        found = _labels(dataset, label) if labels is None else list(labels)
        if found is not None and len(found) != count:
            raise UserError(f"{root}: {len(found)} labels for {count} images; give one each")
        super().__init__(root, [], None)
        if found is not None:
            self._set_labels(found, _class_names(dataset, label))

    def _set_labels(self, found: Sequence[Any], names: Sequence[str] | None) -> None:
        values = [value.item() if isinstance(value, (Tensor, np.generic)) else value for value in found]
        if names is not None and all(isinstance(v, int) and 0 <= v < len(names) for v in values):
            self.classes = [str(name) for name in names]
            self._labels = np.array(values, np.int32)
            return
        order = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        if order == [-1]:  # torchvision's mark for unlabelled images
            return
        self.classes = [str(value) for value in order]
        numbers = {value: number for number, value in enumerate(order)}
        self._labels = np.array([numbers[value] for value in values], np.int32)

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return f"{self.root}[{index}]"

    def identity(self) -> str:
        """Return Hugging Face's fingerprint, else sha256 of number, labels, and the first, middle and last image."""
        mark = getattr(self.dataset, "_fingerprint", None)
        if isinstance(mark, str):
            return mark
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update(b"" if self._labels is None else self._labels.tobytes())
        for index in (0, len(self) // 2, len(self) - 1):
            digest.update(self.read(index))
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        try:
            item = self.dataset[index]
        except UserError:
            raise
        except Exception as error:  # third-party code
            raise UserError(f"{self.name(index)}: the data set gives no such item ({error})") from error
        if isinstance(item, Mapping) and not {"bytes", "path"} <= item.keys():
            if self._image not in item:
                raise UserError(
                    f"{self.name(index)}: no column {self._image!r} among {', '.join(map(str, item))}; name the image's"
                )
            item = item[self._image]
        elif isinstance(item, (tuple, list)):
            item = item[0]
        return _encoded(item, self.name(index))


def _labels(dataset: Any, column: str) -> Sequence[Any] | None:
    """Return labels available without opening images: torchvision's attributes, Hugging Face's column."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(dataset, attribute, None)
        if values is not None and not callable(values):
            return list(values)
    samples = getattr(dataset, "_samples", None) or getattr(dataset, "samples", None)
    if samples and isinstance(samples[0], tuple) and len(samples[0]) == 2:
        return [label for _, label in samples]
    if column and column in getattr(dataset, "features", {}):
        return list(dataset[column])
    if isinstance(dataset, (list, tuple)):
        items = [item.get(column) if isinstance(item, Mapping) else _second(item) for item in dataset]
        return items if all(item is not None for item in items) else None
    return None


def _second(item: Any) -> Any:
    return item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None


def _class_names(dataset: Any, column: str) -> Sequence[str] | None:
    names = getattr(dataset, "classes", None) or getattr(getattr(dataset, "features", {}).get(column), "names", None)
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names] if names else None


def _encoded(image: Any, name: str) -> bytes:
    """Encode an image losslessly for `decode_image`: encoded bytes unchanged, others as PPM."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, (str, Path)):
        return read_file(image)
    if isinstance(image, Tensor):
        image = _array(image, name)
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise UserError(f"{name}: an array of {image.dtype} {image.shape}; give uint8 pixels (H, W) or (H, W, 3)")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"{name}: a {type(image).__name__} is no image; give PIL's, an array, a tensor, bytes or a path"
        )
    pixels = pil_rgb(image, name)
    return b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def _array(tensor: Tensor, name: str) -> np.ndarray:
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise UserError(f"{name}: a tensor of {tuple(tensor.shape)}; give (3, H, W) or (1, H, W)")
    if tensor.is_floating_point():
        low, high = tensor.min().item(), tensor.max().item()
        if not (low >= 0 and high <= 1):
            raise UserError(f"{name}: floats from {low:g} to {high:g}; give 0 to 1, before any normalisation")
        tensor = (tensor * 255).round().byte()
    return np.ascontiguousarray(tensor.permute(1, 2, 0).cpu().numpy())


def open_torchvision(name: str, root: Path) -> DatasetSource:
    """Open one of torchvision's data sets in `root`.

    Raises:
        UserError: a name not in `TORCHVISION`, or missing files.
    """
    if name not in TORCHVISION:
        raise UserError(f"DATA.FORMAT torchvision:{name} is unknown; use one of {', '.join(sorted(TORCHVISION))}")
    from torchvision import datasets

    try:
        dataset = getattr(datasets, name)(str(root), download=False, **TORCHVISION[name])
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise UserError(f"DATA.PATH {root}: torchvision does not find {name} there ({error})") from error
    return DatasetSource(dataset, root=str(root))


def open_huggingface(root: Path) -> DatasetSource:
    """Open the images of a folder that `save_to_disk` wrote, still encoded; labels from the first column of classes.

    Raises:
        UserError: `datasets` is not installed, or the folder has several splits or no column of images.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"DATA.PATH {root} is a Hugging Face data set, which needs: pip install 'loco_det[huggingface]'"
        ) from None
    if (root / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in root.iterdir() if (folder / "state.json").is_file())
        raise UserError(f"DATA.PATH {root} holds the splits {', '.join(splits)}; set it to one of these folders")
    try:
        dataset = datasets.load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise UserError(f"DATA.PATH {root}: not readable as a Hugging Face data set ({error})") from error
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not images:
        raise UserError(f"DATA.PATH {root}: none of its columns ({', '.join(dataset.features)}) is of images")
    label = next((name for name, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)), "")
    dataset = dataset.cast_column(images[0], datasets.Image(decode=False))
    source = DatasetSource(dataset, image=images[0], label=label, root=str(root))
    source.containers = sorted(file["filename"] for file in dataset.cache_files)
    return source
