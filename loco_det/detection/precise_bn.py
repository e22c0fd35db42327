"""Precise BatchNorm (TEST.PRECISE_BN): statistics of the current weights, before each evaluation and the last save.

Source: "Rethinking Batch in BatchNorm" (arXiv 2105.07576) section 3, computed by fvcore's `update_bn_stats`; the
schedule and the batches are those of detectron2/engine/hooks.py `PreciseBN`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.core import config
from loco_det.core.log import Progress, log
from loco_det.detection.engine import Engine
from loco_det.detection.layers import get_bn_modules, update_bn_stats


def is_due(cfg: CfgNode, iteration: int) -> bool:
    """Whether to run after `iteration`, counted from 0: before each evaluation and at the end."""
    if not cfg.TEST.PRECISE_BN.ENABLED:
        return False
    done, period = iteration + 1, cfg.TEST.EVAL_PERIOD
    return done == cfg.SOLVER.MAX_ITER or (period > 0 and done % period == 0)


def recompute(cfg: CfgNode, engine: Engine, model: nn.Module, iteration: int) -> None:
    """Replace the statistics of every BatchNorm in training by their mean over TEST.PRECISE_BN.NUM_ITER batches.

    A separate training loader provides the batches, each time the next ones, so that a resumed run uses the same.
    Nothing else of the model changes.

    Args:
        model: in training mode, not wrapped.
        iteration: the last finished one, counted from 0.
    """
    count = cfg.TEST.PRECISE_BN.NUM_ITER
    if not get_bn_modules(model):
        log.info("precise BatchNorm: the model has none in training, so nothing is done")
        return
    earlier = iteration // cfg.TEST.EVAL_PERIOD if cfg.TEST.EVAL_PERIOD > 0 else 0
    cfg = config.changed(cfg, **{"DATALOADER.NUM_WORKERS": 0})  # the training loader already has workers
    batches = iter(engine.train_batches(cfg, earlier * count))
    with Progress(count, "precise BatchNorm", unit="batches") as progress:
        update_bn_stats(_Losses(engine, model), _watched(batches, progress), count)


def _watched(batches: Iterator[Any], progress: Progress) -> Iterator[Any]:
    for batch in batches:
        yield batch
        progress.advance()


class _Losses(nn.Module):
    """The callable that fvcore applies to each batch."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        super().__init__()
        self.engine, self.model = engine, model

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.engine.losses(self.model, batch)
