"""The interface of an engine: model and data pipeline. Everything else is shared, so engines differ in these only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.annotations.instances import Instances
from loco_det.annotations.registry import Dataset
from loco_det.core.config import Settings

Batch = list[dict[str, Any]]


class Engine(Protocol):
    """`engine_torchvision.TorchvisionEngine` or `engine_d2.Detectron2Engine`.

    Attributes:
        name: torchvision or detectron2, the value of `--engine`.
    """

    name: str

    def check(self, cfg: CfgNode, settings: Settings | None = None) -> None:
        """Raise UserError for keys that this engine does not support; `settings` has their origin."""

    def build_model(self, cfg: CfgNode) -> nn.Module:
        """Build the detector on MODEL.DEVICE, freshly initialised."""

    def train_batches(self, cfg: CfgNode, start: int) -> Iterable[Batch]:
        """Return endless batches of this process's share of SOLVER.IMS_PER_BATCH, from iteration `start` on."""

    def test_batches(self, cfg: CfgNode, dataset: Dataset) -> Iterable[Batch]:
        """Return this process's share of a data set's images, each once; has a length."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return {name: 0-dim tensor} under Detectron2's names; `model` may be wrapped for distributed training."""

    def predict(self, model: nn.Module, batch: Batch) -> list[Instances] | list[Tensor]:
        """Predict in evaluation mode: detections, or a proposal network's proposals, in the original image's pixels.

        A semantic segmentor returns logits (K, height, width) per image.
        """

    def augment(self, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """Wrap `model` with test-time augmentation (TEST.AUG); `predict` accepts the result."""
