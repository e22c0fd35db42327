"""What an engine is: a model and its data pipeline. Training, checkpoints and evaluation are one and the same for all,
so that a difference between engines is one of model or data.
"""

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
        name: torchvision or detectron2, as `--engine` takes it.
    """

    name: str

    def check(self, cfg: CfgNode, settings: Settings | None = None) -> None:
        """Refuse, with UserError, keys that this engine does not support; `settings` says who set them."""

    def build_model(self, cfg: CfgNode) -> nn.Module:
        """The detector on MODEL.DEVICE, freshly initialised."""

    def train_batches(self, cfg: CfgNode, start: int) -> Iterable[Batch]:
        """Endless batches of this process's share of SOLVER.IMS_PER_BATCH, from iteration `start` on."""

    def test_batches(self, cfg: CfgNode, dataset: Dataset) -> Iterable[Batch]:
        """This process's share of a data set's images, each once; it has a length."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{name: 0-dim tensor} under Detectron2's names; `model` may be wrapped for distributed training."""

    def predict(self, model: nn.Module, batch: Batch) -> list[Instances] | list[Tensor]:
        """Detections, or a proposal network's proposals, of a model in evaluation mode, in the original image's pixels.

        A semantic segmentor's are logits (K, height, width) for each image.
        """

    def augment(self, cfg: CfgNode, model: nn.Module) -> nn.Module:
        """`model` with test-time augmentation (TEST.AUG); `predict` takes it as it takes the model."""
