"""The images of the small scale: CIFAR-10 unpacked and listed, and the training images of a detection set."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

from loco_det.annotations.registry import find_dataset
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, locked
from loco_det.paper.plan import Options, detection_images, labelled

# Of CIFAR-10's training images: those of each list to pretrain on, the second in the first; held out to choose rates.
PRETRAINED = {"train.txt": 10_000, "train_half.txt": 5_000}
HELD_OUT = 10_000
LISTS = (*PRETRAINED, "held_out.txt")


def prepare(options: Options, objects: bool) -> None:
    """Unpack and list what the small scale pretrains on; what is there already is left as it is.

    Args:
        objects: `options.data` is a detection set.

    Raises:
        UserError: the data are missing or not what they should be.
    """
    if not os.path.exists(options.data):
        raise UserError(f"--data {options.data}: there is no such file or folder; correct the path")
    if options.is_small and objects:
        list_detection_images(options)
    elif options.is_small:
        unpack(Path(options.data), labelled(options), options.out)


def unpack(data: Path, folder: Path, out: Path) -> None:
    """Unpack a zip of `folder` into `out`, unless `data` is that folder, and write the lists of its images there.

    Raises:
        UserError: it has no folder train.
    """
    with locked(out / ".unpacking.lock"):
        if all((out / name).is_file() for name in LISTS):
            return
        if folder != data and not (out / LISTS[0]).is_file():  # which follows the images
            with zipfile.ZipFile(data) as file:
                file.extractall(out)
        train = folder / "train"
        if not train.is_dir():
            raise UserError(f"--data {data}: has no folder train of class folders; give CIFAR-10 as images")
        count = sum(1 for _ in train.glob("*/*"))
        write_lists(train, out, PRETRAINED["train.txt"], min(HELD_OUT, count // 5))


def write_lists(train: Path, out: Path, pretrained: int, held_out: int) -> None:
    """Write train.txt, train_half.txt and held_out.txt, with the same number of images of each class.

    Args:
        pretrained: images of train.txt; train_half.txt has half of them.
    """
    lines: dict[str, list[str]] = {name: [] for name in LISTS}
    root = os.path.relpath(train, out) if train.is_relative_to(out) else str(train.absolute())
    classes = sorted(folder.name for folder in train.iterdir() if folder.is_dir())
    for name in classes:
        files = sorted(path.name for path in (train / name).iterdir())
        random.Random(f"0 {name}").shuffle(files)
        held, kept = held_out // len(classes), pretrained // len(classes)
        chosen = files[held : held + kept]
        chosen_of = {
            "train.txt": chosen,
            "train_half.txt": chosen[: (len(chosen) + 1) // 2],
            "held_out.txt": files[:held],
        }
        for list_name, those in chosen_of.items():
            lines[list_name] += [f"{root}/{name}/{file}\t{name}" for file in those]
    for list_name, content in lines.items():
        with atomic_write(out / list_name, "w") as file:
            file.write("\n".join(content) + "\n")


def list_detection_images(options: Options) -> None:
    """Write the list of a detection set's training images, in the order of its annotations."""
    path = detection_images(options)
    if path.is_file():
        return
    found = find_dataset(f"{options.data}@train")
    with atomic_write(path, "w") as file:
        file.writelines(f"{(found.images / name).absolute()}\n" for name in found.index.file_name.tolist())
