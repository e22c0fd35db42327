"""The torchvision engine: this package's own model and data pipeline, from PyPI only; see `engine.Engine`."""

from __future__ import annotations

from collections.abc import Iterable

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.annotations.instances import Instances
from loco_det.annotations.loader import MAX_BAD_SHARE, build_test_loader, build_train_loader
from loco_det.annotations.registry import Dataset
from loco_det.core.config import Settings
from loco_det.detection import rcnn
from loco_det.detection.engine import Batch
from loco_det.detection.keys import check_supported
from loco_det.detection.precomputed import load_proposals
from loco_det.detection.tta import AugmentedRCNN


class TorchvisionEngine:
    """See `engine.Engine`.

    Args:
        max_bad_share: tolerated share of training images that fail to decode.
    """

    name = "torchvision"

    def __init__(self, max_bad_share: float = MAX_BAD_SHARE) -> None:
        self.max_bad_share = max_bad_share

    def check(self, cfg: CfgNode, settings: Settings | None = None) -> None:
        check_supported(cfg, settings)

    def build_model(self, cfg: CfgNode) -> nn.Module:
        return rcnn.build_model(cfg).to(cfg.MODEL.DEVICE)

    def train_batches(self, cfg: CfgNode, start: int) -> Iterable[Batch]:
        return build_train_loader(cfg, start, load_proposals(cfg, "TRAIN"), self.max_bad_share)

    def test_batches(self, cfg: CfgNode, dataset: Dataset) -> Iterable[Batch]:
        proposals = load_proposals(cfg, "TEST")
        return build_test_loader(cfg, dataset, proposals and proposals[list(cfg.DATASETS.TEST).index(dataset.name)])

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return model(batch)

    def predict(self, model: nn.Module, batch: Batch) -> list[Instances] | list[Tensor]:
        return model(batch)

    def augment(self, cfg: CfgNode, model: nn.Module) -> nn.Module:
        return AugmentedRCNN(cfg, model)
