"""The nearest-neighbour probe during pretraining: classification accuracy of each stage's features.

Labels are never trained on: the probe runs between two steps, in evaluation mode, uses no global random number, and
does not change the network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from loco_det.annotations.subsets import share_of_each_class
from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.backbones.resnet import StagedBackbone
from loco_det.core.distributed import gather, rank, world_size
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.evaluation.knn import knn_predict
from loco_det.images.folders import open_source
from loco_det.images.source import Source
from loco_det.images.two_views import build_plain_loader
from loco_det.images.views import normalise

TEST_SHARE = 0.2  # of each class, if KNN.VAL_PATH is empty
BATCH = 64


class KnnProbe:
    """Top-1 accuracy of every stage's globally averaged features by K nearest labelled images.

    Args:
        source: the training images; a fifth of each class are queries, the rest references, unless KNN.VAL_PATH names
            other queries. At most KNN.IMAGES of either are used.
        memory_format: memory format of the network.

    Raises:
        UserError: KNN.VAL_PATH is unreadable, has no classes, or some that the training images lack.
    """

    def __init__(
        self,
        cfg: CfgNode,
        source: Source,
        device: torch.device,
        memory_format: torch.memory_format,
        autocast: Callable[[], object],
    ) -> None:
        self.cfg, self.device, self.memory_format, self.autocast = cfg, device, memory_format, autocast
        self.classes = source.classes
        self.active = cfg.KNN.PERIOD > 0 and len(self.classes) > 1
        if not self.active:
            if cfg.KNN.VAL_PATH and cfg.KNN.PERIOD > 0:
                raise UserError(f"KNN.VAL_PATH is set but the images of DATA.PATH {source.root} have no classes")
            return
        every = np.arange(len(source))
        self.train = self.test = source
        if cfg.KNN.VAL_PATH:
            self.test = _open(cfg.KNN.VAL_PATH)
            unknown = sorted(set(self.test.classes) - set(self.classes))
            if unknown or not self.test.classes:
                what = f"class {unknown[0]!r}, which DATA.PATH lacks" if unknown else "no classes"
                raise UserError(f"KNN.VAL_PATH {cfg.KNN.VAL_PATH} has {what}; take images of the same classes")
            queries, references = np.arange(len(self.test)), every
        else:
            queries = self._subset(source, every, TEST_SHARE)
            references = np.setdiff1d(every, queries)
        self.queries, self.references = self._limited(self.test, queries), self._limited(source, references)
        self.active = len(self.references) > 0  # no references if every class has a single image

    def due(self, done: int, steps_per_epoch: int, total: int) -> bool:
        """Whether to probe after `done` steps: every KNN.PERIOD epochs and at the end."""
        return self.active and (done % (self.cfg.KNN.PERIOD * steps_per_epoch) == 0 or done == total)

    @torch.no_grad()
    def __call__(self, backbone: StagedBackbone) -> dict[str, float]:
        """Return {"knn/res2": percent correct, ...}; unreadable images are skipped."""
        training = backbone.training
        backbone.eval()
        bank, labels = self._features(backbone, self.train, self.references)
        queries, truth = self._features(backbone, self.test, self.queries)
        backbone.train(training)
        if not len(labels) or not len(truth):
            log.warning(
                "the nearest-neighbour probe could read no image of %s",
                self.train.root if not len(labels) else self.test.root,
            )
            return {}
        found = {}
        for stage in backbone.stage_names[1:]:
            scores = knn_predict(
                bank[stage],
                labels,
                queries[stage],
                k=self.cfg.KNN.K,
                temperature=self.cfg.KNN.TEMPERATURE,
                classes=len(self.classes),
            )
            found[f"knn/{stage}"] = 100 * (scores.argmax(1) == truth).float().mean().item()
        shown = ", ".join(f"{name[4:]} {value:.1f}%" for name, value in found.items())
        log.info("%d nearest neighbours, %d images by %d: %s", self.cfg.KNN.K, len(truth), len(labels), shown)
        return found

    def _subset(self, source: Source, index: np.ndarray, share: float) -> np.ndarray:
        labels = np.array([source.label(i) for i in index], np.int64)
        names = [f"{source.classes[label]}/{PurePosixPath(source.name(i)).name}" for i, label in zip(index, labels)]
        return index[share_of_each_class(labels, names, share, self.cfg.SEED)]

    def _limited(self, source: Source, index: np.ndarray) -> np.ndarray:
        most = self.cfg.KNN.IMAGES
        return index if len(index) <= most else self._subset(source, index, most / len(index))

    def _features(
        self, backbone: StagedBackbone, source: Source, index: np.ndarray
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute every stage's (N, C) float32 features and (N,) labels, shared by and returned on all processes."""
        loader = build_plain_loader(
            source,
            self.cfg.DATA.IMAGE_SIZE,
            batch_size=BATCH,
            num_workers=self.cfg.DATA.NUM_WORKERS,
            indices=index[rank() :: world_size()],
            skip_unreadable=True,
        )
        numbers = torch.tensor([self.classes.index(name) for name in source.classes])
        parts: dict[str, list[Tensor]] = {name: [] for name in backbone.stage_names[1:]}
        labels = []
        for batch in loader:
            if not len(batch.labels):
                continue
            x = normalise(batch.images.to(self.device), IMAGENET_MEAN, IMAGENET_STD, self.memory_format)
            with self.autocast():
                outputs = backbone(x)
            for name, found in parts.items():
                found.append(outputs[name].float().mean((2, 3)))
            labels.append(numbers[batch.labels].to(self.device))
        features = {
            name: gather(torch.cat(found) if found else torch.empty(0, backbone.channels[name], device=self.device))
            for name, found in parts.items()
        }
        return features, gather(torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64, device=self.device))


def _open(path: str) -> Source:
    try:
        return open_source(path)
    except UserError as error:  # its message is about the training images
        raise UserError(str(error).replace("DATA.PATH", "KNN.VAL_PATH")) from error
