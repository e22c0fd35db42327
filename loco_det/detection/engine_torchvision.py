"""The engine that needs nothing but PyPI: this package's own model and data pipeline.

An engine is a module with these functions; `engine_d2` is the other. Training, checkpoints and evaluation are one
and the same for both, so that a difference between them is a difference of model or data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.data.loader import build_test_loader, build_train_loader
from loco_det.detection import rcnn
from loco_det.detection.augmented import AugmentedRCNN
from loco_det.detection.precomputed import load_proposals
from loco_det.detection.schema import check_honoured
from loco_det.structures import Instances

NAME = "torchvision"


def check(cfg: CfgNode) -> None:
    """Refuse keys that this engine does not honour."""
    check_honoured(cfg)


def build_model(cfg: CfgNode) -> nn.Module:
    """The detector on MODEL.DEVICE, freshly initialised."""
    return rcnn.build_model(cfg).to(cfg.MODEL.DEVICE)


def train_batches(cfg: CfgNode, start: int) -> Iterable[list[dict[str, Any]]]:
    """Endless batches of this process's share of SOLVER.IMS_PER_BATCH, from iteration `start` on."""
    return build_train_loader(cfg, start_iter=start, proposals=load_proposals(cfg, "TRAIN"))


def test_batches(cfg: CfgNode, dataset: str) -> Iterable[list[dict[str, Any]]]:
    """This process's share of a data set's images, each once."""
    proposals = load_proposals(cfg, "TEST")
    return build_test_loader(cfg, dataset, proposals and proposals[list(cfg.DATASETS.TEST).index(dataset)])


def losses(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """{name: 0-dim tensor} under Detectron2's names; `model` may be wrapped for distributed training."""
    return model(batch)


def predict(model: nn.Module, batch: list[dict[str, Any]]) -> list[Instances] | list[Tensor]:
    """Detections, or a proposal network's proposals, of a model in evaluation mode, in the original image's pixels.

    A semantic segmentor's are logits (K, height, width) for each image.
    """
    return model(batch)


def augment(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """`model` with test-time augmentation (TEST.AUG); `predict` takes it as it takes the model."""
    return AugmentedRCNN(cfg, model)
