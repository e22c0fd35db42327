"""Batches for training and testing a detector.

Training follows an infinite stream of image indices, the same in every process: shuffled epoch after epoch from the
seed alone. Process r of R takes positions r, r + R, r + 2R, ..., groups images of equal orientation into batches, and
draws a sample's transforms from (seed, position). So the batches after iteration k do not depend on resuming or on the
number of workers. The streams are those of Detectron2's samplers (data/samplers/distributed_sampler.py) for the same
seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch.utils import data as torch_data
from torch.utils.data import DataLoader

from loco_det.annotations.classes import category_ids, check_training_classes
from loco_det.annotations.coco import CocoDataset, load_coco
from loco_det.annotations.mapper import DetectionMapper, ProposalsOfImage, sample_rng
from loco_det.annotations.registry import Dataset, find_dataset, has_pixels
from loco_det.core.device import common_seed, local_processes, usable_cores
from loco_det.core.distributed import rank, world_size
from loco_det.core.errors import UserError
from loco_det.core.launch import leave_stopping_to_parent
from loco_det.core.log import log
from loco_det.core.own_keys import own_value
from loco_det.core.workers import check_shared_memory, raising, shared
from loco_det.images.unusable import SUBSTITUTES, Unusable

MAX_BAD_SHARE = 0.01  # tolerated share of training images that fail to decode
# Extra keys of a sample from a worker: images that it replaces, and its own if an object was skipped.
_REPLACED, _INCOMPLETE = "_replaced", "_incomplete"

Precomputed = Sequence[Mapping[str, ProposalsOfImage]]


class Loader:
    """An iterable of batches, each a list of the mapper's dicts.

    `len` is the number of batches of a test loader; a training loader has none and restarts at its `start_iter` on each
    iteration.

    Attributes:
        datasets: the annotations, for class names or ids.
        bad: images of a training set that this process failed to decode so far; None for a test set, which skips no
            image.
    """

    def __init__(self, datasets: list[CocoDataset], batches: DataLoader, bad: Unusable | None):
        self.datasets, self.batches, self.bad = datasets, batches, bad

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in raising(self.batches):
            for sample in batch if self.bad is not None else ():
                self.bad.count(sample.pop(_REPLACED, ()))
                self.bad.count(sample.pop(_INCOMPLETE, ()), "these objects are left out")
            yield batch


def build_train_loader(
    cfg: CfgNode,
    start_iter: int = 0,
    proposals: Precomputed | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Loader:
    """Build endless batches of this process: SOLVER.IMS_PER_BATCH images over all processes.

    Args:
        cfg: Detectron2's keys; uses DATASETS.TRAIN, DATALOADER, INPUT, SOLVER.IMS_PER_BATCH, SEED, MODEL.MASK_ON,
            MODEL.DEVICE and MODEL.ROI_HEADS.NUM_CLASSES.
        start_iter: number of batches to skip, for resuming. A negative SEED is drawn anew and cannot be resumed
            exactly.
        proposals: for each of DATASETS.TRAIN, proposals by image id.
        max_bad_share: tolerated share of images that fail to decode. A neighbour replaces such an image, depending on
            the data only, so that resumed and uninterrupted runs are equal.

    Raises:
        UserError: a data set is invalid or does not fit the configuration; while iterating, more images than
            `max_bad_share` are unusable.
    """
    if not len(cfg.DATASETS.TRAIN):
        raise UserError("DATASETS.TRAIN names no data set; name one, such as ('coco_2017_train',).")
    total, processes = cfg.SOLVER.IMS_PER_BATCH, world_size()
    if total < 1 or total % processes:
        raise UserError(f"SOLVER.IMS_PER_BATCH is {total}, which {processes} processes cannot share equally.")
    check_room(cfg)
    datasets = [_load(cfg, find_dataset(name), train=True) for name in cfg.DATASETS.TRAIN]
    check_training_classes(cfg, [dataset.paths for dataset in datasets])
    chosen = [_trainable(cfg, dataset) for dataset in datasets]
    seed = common_seed(cfg.SEED)
    wide = np.concatenate([(d.index.width > d.index.height)[rows] for d, rows in zip(datasets, chosen)])
    batches = _TrainBatches(
        stream=_sampler(cfg, datasets, chosen, seed),
        wide=wide,
        size=total // processes,
        grouped=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        start=start_iter,
    )
    samples = _TrainSamples(datasets, chosen, DetectionMapper(cfg, train=True), seed, proposals, wide)
    names = "DATASETS.TRAIN " + ", ".join(cfg.DATASETS.TRAIN)
    return _loader(cfg, datasets, samples, batches, Unusable(len(wide), max_bad_share, names, "--max-bad-share"))


def build_test_loader(
    cfg: CfgNode, dataset: Dataset, proposals: Mapping[str, ProposalsOfImage] | None = None
) -> Loader:
    """Yield each image of a data set once, one per batch; each process has a contiguous share.

    `proposals` are by image id.

    Raises:
        UserError: the data set is invalid or does not fit the configuration.
    """
    annotated = _load(cfg, dataset, train=False)
    share = np.array_split(np.arange(len(annotated)), world_size())[rank()]
    mapper = DetectionMapper(cfg, train=False)
    known = None if proposals is None else [proposals]
    samples = _Samples([annotated], [np.arange(len(annotated))], mapper, None, known)
    return _loader(cfg, [annotated], samples, [[(i, i)] for i in share.tolist()])


class _OtherData(UserError):
    """A file belongs to another data set, so no image can replace it."""


class _Samples(torch_data.Dataset):
    """Mapped samples by (position in the stream, image index), or the UserError of a bad one, for `raising`."""

    def __init__(
        self,
        datasets: list[CocoDataset],
        chosen: list[np.ndarray],
        mapper: DetectionMapper,
        seed: int | None,
        proposals: Precomputed | None,
    ):
        self.datasets, self.mapper, self.seed, self.proposals = datasets, mapper, seed, proposals
        self.dataset = np.repeat(np.arange(len(chosen)), [len(rows) for rows in chosen])
        self.row = np.concatenate(chosen)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any] | UserError:
        try:
            return self._sample(*place)
        except UserError as error:
            return UserError(str(error))  # without its cause, which may not be picklable

    def _sample(self, position: int, image: int) -> dict[str, Any]:
        record = self.datasets[self.dataset[image]][self.row[image]]
        rng = None if self.seed is None else sample_rng(self.seed, position)
        return self.mapper(record, rng, self._proposals(self.dataset[image], record.image_id))

    def _proposals(self, dataset: int, image_id: int) -> ProposalsOfImage | None:
        if self.proposals is None:
            return None
        found = self.proposals[dataset].get(str(image_id))
        if found is None:
            raise _OtherData(
                f"DATASETS: the file of proposals for {self.datasets[dataset].paths.name} has none for image "
                f"{image_id}; it is of another data set."
            )
        return found


class _TrainSamples(_Samples):
    """Replaces an unusable image by the next of its orientation, with the original's transforms.

    The main process counts them by the keys _REPLACED and _INCOMPLETE.
    """

    def __init__(self, *args: Any):
        *args, self.wide = args
        super().__init__(*args)

    def _sample(self, position: int, image: int) -> dict[str, Any]:
        replaced: list[tuple[int, str]] = []
        for other in self._and_neighbours(image):
            try:
                sample = super()._sample(position, other)
            except _OtherData:
                raise
            except UserError as error:
                replaced.append((other, str(error)))
                continue
            if empty := sample.pop("empty_masks", None):
                ids = ", ".join(map(str, empty[:3])) + (", ..." if len(empty) > 3 else "")
                sample[_INCOMPLETE] = [(other, f"{sample['file_name']}: the mask of annotation id {ids} has no pixel")]
            return {**sample, _REPLACED: replaced} if replaced else sample
        others = f" (nor can {len(replaced) - 1} others in its place)" if len(replaced) > 1 else ""
        raise UserError(f"{replaced[0][1].rstrip('.')}{others}.")

    def _and_neighbours(self, image: int) -> Iterator[int]:
        yield image
        like = np.flatnonzero(self.wide == self.wide[image])
        after = np.searchsorted(like, image) + np.arange(1, min(SUBSTITUTES, len(like)))
        yield from like[after % len(like)].tolist()


class _TrainBatches:
    """Endless batches of (position, image index) for this process.

    Args:
        stream: infinite image indices over all processes, restarted on each iteration.
        wide: (images,) bool, wider than high.
        size: images per batch.
        grouped: separate wide images from the others, which saves padding.
        start: number of batches to skip.
    """

    def __init__(self, stream: TrainingStream, wide: np.ndarray, size: int, grouped: bool, start: int):
        self.stream, self.size, self.start = stream, size, start
        self.group = (wide & bool(grouped)).tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for position, image in itertools.islice(enumerate(self.stream), rank(), None, world_size()):
            group = self.group[image]
            waiting[group].append((position, image))
            if len(waiting[group]) == self.size:
                yield waiting[group]
                waiting[group] = []


class TrainingStream:
    """Endless image indices: epoch after epoch, each in a new order.

    Args:
        count: number of images.
        seed: seed of the order and of the rounding below.
        repeat: (count,) float32 >= 1, mean number of times an image occurs per epoch: its integer part, plus one with
            the probability of its fraction. Default: once.
    """

    def __init__(self, count: int, seed: int, repeat: torch.Tensor | None = None):
        self.count, self.seed, self.repeat = count, seed, repeat

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            images = torch.arange(self.count)
            if self.repeat is not None:
                more = torch.rand(self.count, generator=generator) < self.repeat.frac()
                images = images.repeat_interleave(self.repeat.long() + more)
            yield from images[torch.randperm(len(images), generator=generator)].tolist()


def repeat_factors(images: np.ndarray, labels: np.ndarray, count: int, threshold: float, root: bool) -> torch.Tensor:
    """Return how often to repeat each image so that rare classes occur more often (LVIS, arXiv 1908.03195, app. B.2).

    A class in a share f < threshold of the images has factor threshold / f, or its square root; an image has the
    largest factor of its classes, at least 1.

    Args:
        images, labels: (A,) image index and class of every annotation.
        count: number of images.

    Returns:
        (count,) float32.
    """
    pairs = np.unique(np.stack([images, labels]), axis=1)
    share = np.bincount(pairs[1]) / count
    factor = threshold / np.maximum(share, 1e-12)
    result = np.ones(count)
    np.maximum.at(result, pairs[0], (np.sqrt(factor) if root else factor)[pairs[1]])
    return torch.from_numpy(result).float()


def _load(cfg: CfgNode, dataset: Dataset, train: bool) -> CocoDataset:
    check_kind(cfg, dataset.name)
    masks = ("polygon" if cfg.INPUT.MASK_FORMAT == "polygon" else "bitmask") if cfg.MODEL.MASK_ON else ""
    annotated = load_coco(dataset, need_annotations=train and not dataset.is_pixels, masks=masks)
    if not train:
        category_ids(cfg, dataset)
    return annotated


def check_kind(cfg: CfgNode, name: str) -> None:
    """Raise UserError if MODEL.META_ARCHITECTURE does not fit a data set's kind of labels."""
    semantic = has_pixels(name)
    if semantic != (cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"):
        wanted = "SemanticSegmentor" if semantic else "GeneralizedRCNN"
        other = "another data set" if semantic else "pixel labels, by path as MASKS@IMAGES, street/masks@street/images"
        raise UserError(
            f"data set {name} has {'pixel labels' if semantic else 'objects and no pixel labels'}, and "
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; set it to {wanted}, or name {other}."
        )


def _trainable(cfg: CfgNode, dataset: CocoDataset) -> np.ndarray:
    """Return the images to train on: with DATALOADER.FILTER_EMPTY_ANNOTATIONS those with a non-crowd object."""
    rows = np.arange(len(dataset))
    if dataset.paths.is_pixels:
        log.info("%s: %d images with labels of %d classes", dataset.paths.name, len(rows), len(dataset.class_names))
        return rows
    image, _, crowd = dataset.objects()
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        rows = np.unique(image[~crowd])
    log.info(
        "%s: %d of %d images, %d objects of %d classes",
        *(dataset.paths.name, len(rows), len(dataset), (~crowd).sum(), len(dataset.class_names)),
    )
    return rows


def _sampler(cfg: CfgNode, datasets: list[CocoDataset], chosen: list[np.ndarray], seed: int) -> TrainingStream:
    count = sum(len(rows) for rows in chosen)
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingStream(count, seed)
    if name != "RepeatFactorTrainingSampler":
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN must be TrainingSampler or RepeatFactorTrainingSampler, not '{name}'."
        )
    images, labels, before = [], [], 0
    for dataset, rows in zip(datasets, chosen):
        number = np.full(len(dataset), -1)
        number[rows] = np.arange(before, before + len(rows))
        image, label, _ = dataset.objects()
        images.append(number[image][number[image] >= 0])
        labels.append(label[number[image] >= 0])
        before += len(rows)
    settings = cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
    return TrainingStream(count, seed, repeat_factors(np.concatenate(images), np.concatenate(labels), count, *settings))


def _loader(
    cfg: CfgNode, datasets: list[CocoDataset], samples: _Samples, batches: Any, bad: Unusable | None = None
) -> Loader:
    workers = cfg.DATALOADER.NUM_WORKERS
    if workers < 0:
        raise UserError(f"DATALOADER.NUM_WORKERS must be 0 or more, not {workers}.")
    torch_loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=min(workers, usable_cores()),  # more only cost memory
        collate_fn=_as_list,
        worker_init_fn=leave_stopping_to_parent,
        pin_memory=torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu",
        # Workers get their seeds from here, not from the global generator, whose state a resumed run restores.
        generator=torch.Generator().manual_seed(samples.seed or 0),
    )
    return Loader(datasets, torch_loader, bad)


def _as_list(samples: Sequence[Any]) -> list[Any]:
    return shared(list(samples))


def check_room(cfg: CfgNode) -> None:
    """Refuse more workers than shared memory has room for, by this machine's batch of the largest training image (4:3).

    Raises:
        UserError: as `check_shared_memory`.
    """
    short = max(cfg.INPUT.MIN_SIZE_TRAIN, default=0)
    image = 3 * short * min(cfg.INPUT.MAX_SIZE_TRAIN, short * 4 // 3)
    if own_value(cfg, "INPUT.SCALE_JITTER"):
        image = 3 * own_value(cfg, "INPUT.SCALE_JITTER_SIZE") ** 2
    images = cfg.SOLVER.IMS_PER_BATCH * min(local_processes(), world_size()) // world_size()
    workers = min(cfg.DATALOADER.NUM_WORKERS, usable_cores())
    check_shared_memory(image * images, workers, "DATALOADER.NUM_WORKERS")
