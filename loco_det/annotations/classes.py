"""Maps the model's classes to a data set's categories: by name, independent of their ids.

A model's classes are those of its training data, by ascending category id. A test set may number them differently and
may lack some; a set with further classes is refused, because they could never be predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from loco_det.annotations.paths import split_parts
from loco_det.annotations.registry import Dataset, benchmark_of, find_dataset, has_pixels
from loco_det.core.config import value
from loco_det.core.errors import UserError

_SHOWN = 12  # maximum number of names in a message


def num_classes_key(name: str) -> str:
    """Return the key with the number of classes of the model for a data set."""
    return f"MODEL.{'SEM_SEG_HEAD' if has_pixels(name) else 'ROI_HEADS'}.NUM_CLASSES"


def check_count(cfg: CfgNode, name: str, classes: int) -> None:
    """Raise UserError if a data set's number of classes is not the model's."""
    key = num_classes_key(name)
    expected = value(cfg, key)
    if classes != expected:
        line = f"{key} {classes}"
        raise UserError(f"data set {name} has {classes} classes and {key} is {expected}; set {line}.", add=line)


def check_training_classes(cfg: CfgNode, training_sets: Sequence[Dataset]) -> None:
    """Raise UserError if training sets do not have the model's number of classes, or have different classes."""
    first: tuple[str, Sequence[str]] | None = None
    for dataset in training_sets:
        name, names = dataset.name, dataset.index.category_names
        check_count(cfg, name, len(names))
        first = first or (name, names)
        if names != first[1]:
            raise UserError(
                f"DATASETS.TRAIN: {name} and {first[0]} differ in their classes or their order, {_listed(names)} and "
                f"{_listed(first[1])}; give both files the same categories with the same ids."
            )


def category_ids(cfg: CfgNode, dataset: Dataset) -> tuple[int | None, ...]:
    """Return a test set's category id for every class of the model; None for classes that it lacks.

    The model's classes are those of DATASETS.TRAIN. If that is unavailable, or has another number of classes than the
    model (which was then trained on something else), the test set's own classes are used.

    Raises:
        UserError: the set has a class that the model lacks, or duplicate names in another order, or, without
            DATASETS.TRAIN, another number of classes than the model.
    """
    name, categories = dataset.name, dataset.index.categories
    trained = _trained_classes(cfg, name)
    own = tuple(categories.values())
    if trained is None or own == trained[1]:
        check_count(cfg, name, len(own))
        return tuple(categories)
    training_set, names = trained
    doubled = len(set(own)) < len(own) or len(set(names)) < len(names)
    if doubled or not set(own) <= set(names):
        unknown = [label for label in own if label not in names]
        counts = (
            f"has {len(own)} classes and {num_classes_key(name)} is {len(names)}: it " if len(own) > len(names) else ""
        )
        why = (
            f"has {_listed(unknown)}, which {training_set} has not"
            if unknown
            else "or the training set has a name twice"
        )
        raise UserError(
            f"data set {name} {counts}{why}; classes are matched by name, here {_listed(own)} with {_listed(names)}, "
            "so rename the categories, or name in DATASETS.TRAIN what the model was trained on."
        )
    ids = {label: number for number, label in categories.items()}
    return tuple(ids.get(label) for label in names)


def missing_classes(cfg: CfgNode, dataset: Dataset) -> list[str]:
    """Return the model's classes that a test set lacks; they are not measured."""
    trained = _trained_classes(cfg, dataset.name)
    ids = category_ids(cfg, dataset)
    return [] if trained is None else [label for label, number in zip(trained[1], ids) if number is None]


def _trained_classes(cfg: CfgNode, name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the first training set and its classes, if available and compatible with the model."""
    if not cfg.DATASETS.TRAIN or _is_of_one_family(cfg.DATASETS.TRAIN[0], name):
        return None
    training_set = cfg.DATASETS.TRAIN[0]
    try:
        names = find_dataset(training_set).index.category_names
    except UserError:
        return None
    return (training_set, names) if len(names) == value(cfg, num_classes_key(training_set)) else None


def _is_of_one_family(one: str, other: str) -> bool:
    """Whether two data sets belong to one benchmark and so have the same classes, without reading them."""
    (whole, parts), (other_whole, other_parts) = split_parts(one), split_parts(other)
    if any(part.startswith("classes_") for part in (*parts, *other_parts)):
        return False
    return whole == other_whole or benchmark_of(one) == benchmark_of(other) not in ("coco", "labels")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"({shown}{f', ... {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''})"
