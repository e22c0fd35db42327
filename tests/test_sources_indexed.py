"""Data sets that are Python objects give the pixels that they hold, whatever form their items have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from view_cases import encode, photograph

from loco_det.core.errors import UserError
from loco_det.images.decode import decode_image
from loco_det.images.folders import open_source
from loco_det.images.indexed import TORCHVISION, DatasetSource
from loco_det.images.source import Source
from loco_det.images.two_views import build_plain_loader

PIXELS = [photograph(12 + i, 20, seed=i) for i in range(4)]
KINDS = ["dog", "cat", "dog", "emu"]


def planes(image: np.ndarray) -> torch.Tensor:
    return torch.tensor(image).permute(2, 0, 1)


FORMS = {
    "PIL": Image.fromarray,
    "array": lambda image: image,
    "tensor": planes,
    "floats": lambda image: planes(image).float() / 255,
    "bytes": lambda image: encode(image, "PNG"),
    "huggingface bytes": lambda image: {"bytes": encode(image, "PNG"), "path": None},
}
ITEMS = {
    "alone": lambda image, kind: image,
    "tuple": lambda image, kind: (image, kind, "more"),
    "mapping": lambda image, kind: {"image": image, "label": kind},
}


def pixels(source: Source, index: int) -> np.ndarray:
    return decode_image(source.read(index), source.name(index))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("item", ITEMS)
def test_every_form_of_item(form, item):
    source = DatasetSource([ITEMS[item](FORMS[form](image), kind) for image, kind in zip(PIXELS, KINDS)])
    assert len(source) == 4
    for index, image in enumerate(PIXELS):
        np.testing.assert_array_equal(pixels(source, index), image)
    if item == "alone":
        assert (source.classes, source.label(0)) == ([], None)
    else:
        assert source.classes == ["cat", "dog", "emu"]
        assert [source.classes[source.label(i)] for i in range(4)] == KINDS


def test_floats_between_two_levels_become_the_nearer_one():
    levels = torch.tensor([0.0, 0.4, 0.6, 1.0, 126.7, 254.4, 254.6, 255.0])
    source = DatasetSource([(levels / 255).expand(3, 1, 8)])
    assert pixels(source, 0)[0, :, 1].tolist() == [0, 0, 1, 1, 127, 254, 255, 255]


def test_paths_columns_and_given_labels(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(PIXELS[0], "PNG"))
    source = DatasetSource([{"picture": str(path), "kind": 3}], image="picture", label="kind", labels=[11])
    np.testing.assert_array_equal(pixels(source, 0), PIXELS[0])
    assert source.classes == ["11"]
    assert DatasetSource([{"picture": path, "kind": 3}], image="picture", label="kind").classes == ["3"]


@pytest.mark.parametrize(
    ("targets", "names", "classes", "labels"),
    [
        ([10, 2, 10, 9], None, ["2", "9", "10"], [2, 0, 2, 1]),  # by number
        (["b", "B", "a", "b"], None, ["B", "a", "b"], [2, 0, 1, 2]),
        ([-1, -1, -1, -1], None, [], [None] * 4),  # torchvision's unlabelled images
        ([-1, 0, 1, 1], None, ["-1", "0", "1"], [0, 1, 2, 2]),
        ([1, 0, 1, 1], ["cat", "dog", "emu"], ["cat", "dog", "emu"], [1, 0, 1, 1]),
        ([1, 0, 3, 1], ["cat", "dog", "emu"], ["0", "1", "3"], [1, 0, 2, 1]),  # names that do not fit
        (["x", "y", "x", "x"], ["cat", "dog"], ["x", "y"], [0, 1, 0, 0]),
    ],
)
def test_labels_of_a_data_set_become_classes(targets, names, classes, labels):
    class Set(list):
        pass

    dataset = Set(PIXELS)
    dataset.targets = targets
    dataset.classes = names
    source = DatasetSource(dataset)
    assert source.classes == classes
    assert [source.label(i) for i in range(4)] == labels


def test_grey_alpha_16_bit_and_turned_items_are_treated_as_their_files_would_be():
    grey = PIXELS[0][:, :, 0]
    deep = grey.astype(np.uint16) * 256 + 99
    turned = Image.fromarray(PIXELS[0])
    turned.getexif()[274] = 6
    alpha = np.dstack([PIXELS[0], grey])
    items = [grey, grey[:, :, None], torch.tensor(grey)[None], Image.fromarray(deep), alpha, turned]
    source = DatasetSource(items)
    for index in range(4):
        np.testing.assert_array_equal(pixels(source, index), np.repeat(grey[:, :, None], 3, 2))
    np.testing.assert_array_equal(pixels(source, 4), PIXELS[0])
    np.testing.assert_array_equal(pixels(source, 5), np.rot90(PIXELS[0], -1))


class Faulty:
    classes = ("a", "b")
    targets = torch.tensor([1, 0, 1])

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple:
        if index == 1:
            raise KeyError("gone")
        return Image.fromarray(PIXELS[index]), 5


def test_an_item_that_cannot_be_had_is_an_unreadable_image():
    source = DatasetSource(Faulty())
    assert source.classes == ["a", "b"]
    assert [source.label(i) for i in range(3)] == [1, 0, 1]
    with pytest.raises(UserError, match=r"Faulty\[1\]: the data set gives no such item \('gone'\)"):
        source.read(1)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"img": PIXELS[0]}, "no column 'image' among img"),
        (np.zeros((4, 4, 3), np.float32), r"an array of float32 \(4, 4, 3\)"),
        (np.zeros((3, 4, 5), np.uint8), r"an array of uint8 \(3, 4, 5\)"),
        (torch.zeros(4, 4), r"a tensor of \(4, 4\)"),
        (torch.full((3, 4, 4), -1.0), "floats from -1 to -1"),
        (torch.full((3, 4, 4), float("nan")), "floats from nan to nan"),
        (7, "a int is no image"),
        ({"bytes": None, "path": "absent.png"}, "no such image file"),
    ],
)
def test_items_that_are_no_images_are_refused_by_number(item, message):
    with pytest.raises(UserError, match=message):
        DatasetSource([item]).read(0)


def test_data_sets_that_cannot_be_used():
    with pytest.raises(UserError, match="list: the data set is empty"):
        DatasetSource([])
    with pytest.raises(UserError, match="2 labels for 1 images"):
        DatasetSource([PIXELS[0]], labels=[1, 2])


def test_torchvision_by_name(tmp_path):
    for number, kind in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / kind
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(encode(PIXELS[number], "PNG"))
    source = open_source(tmp_path, "torchvision:EuroSAT")
    assert source.classes == ["Forest", "River"]
    for index in range(2):
        np.testing.assert_array_equal(pixels(source, index), PIXELS[index])
        assert source.label(index) == index
    (batch,) = build_plain_loader(source, 8, batch_size=4)
    assert batch.labels.tolist() == [0, 1]


def test_torchvisions_images_are_those_for_training():
    for name, options in TORCHVISION.items():
        training = ({}, {"train": True}, {"split": "train"}, {"split": "trainval"})
        assert options in (({"split": "unlabeled"},) if name == "STL10" else training)


def test_torchvision_names_that_a_configuration_may_give(tmp_path):
    from torchvision import datasets

    for name in TORCHVISION:
        if hasattr(datasets, name):  # releases differ
            with pytest.raises(UserError, match=f"torchvision does not find {name} there"):
                open_source(tmp_path, f"torchvision:{name}")
    for name in ("DatasetFolder", "__builtins__", "utils", ""):
        with pytest.raises(UserError, match="is unknown; use one of CIFAR10"):
            open_source(tmp_path, f"torchvision:{name}")


def test_huggingface_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `huggingface` is not installed")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"img": [{"bytes": encode(image, "PNG"), "path": None} for image in PIXELS], "kind": [1, 0, 1, 1]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    for path in (tmp_path / "one", tmp_path / "both" / "train"):
        source = open_source(path)
        assert source.classes == ["cat", "dog"]
        assert [source.label(i) for i in range(4)] == [1, 0, 1, 1]
        for index, image in enumerate(PIXELS):
            assert source.read(index) == encode(image, "PNG")  # still encoded
            np.testing.assert_array_equal(pixels(source, index), image)
    with pytest.raises(UserError, match="holds the splits test, train"):
        open_source(tmp_path / "both")
    with pytest.raises(UserError, match=r"none of its columns \(text\) is of images"):
        open_source(tmp_path / "texts", "huggingface")
    with pytest.raises(UserError, match="not readable as a Hugging Face data set"):
        open_source(Path(tmp_path), "huggingface")
