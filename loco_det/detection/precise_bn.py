"""Precise BatchNorm (TEST.PRECISE_BN): statistics of the weights as they are, before each evaluation and the last save.

Source: "Rethinking Batch in BatchNorm" (arXiv 2105.07576) section 3; fvcore's `update_bn_stats`, which does the work;
when it runs and on which batches is as in detectron2/engine/hooks.py `PreciseBN`.
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
    """Whether it runs after `iteration`, counted from 0: before each evaluation and at the end."""
    if not cfg.TEST.PRECISE_BN.ENABLED:
        return False
    done, period = iteration + 1, cfg.TEST.EVAL_PERIOD
    return done == cfg.SOLVER.MAX_ITER or (period > 0 and done % period == 0)


def recompute(cfg: CfgNode, engine: Engine, model: nn.Module, iteration: int) -> None:
    """Replace the statistics of every BatchNorm in training by their mean over TEST.PRECISE_BN.NUM_ITER batches.

    The batches are those of a training loader of its own, each time the next ones, so that a resumed run takes the
    same. Nothing else of the model changes.

    Args:
        model: in training mode, not wrapped.
        iteration: after which it runs, counted from 0.
    """
    count = cfg.TEST.PRECISE_BN.NUM_ITER
    if not get_bn_modules(model):
        log.info("precise BatchNorm: the model has none in training, so nothing is done")
        return
    earlier = iteration // cfg.TEST.EVAL_PERIOD if cfg.TEST.EVAL_PERIOD > 0 else 0
    cfg = config.changed(cfg, **{"DATALOADER.NUM_WORKERS": 0})  # the training loader has workers already
    batches = iter(engine.train_batches(cfg, earlier * count))
    with Progress(count, "precise BatchNorm", unit="batches") as progress:
        update_bn_stats(_Losses(engine, model), _watched(batches, progress), count)


def _watched(batches: Iterator[Any], progress: Progress) -> Iterator[Any]:
    for batch in batches:
        yield batch
        progress.advance()


class _Losses(nn.Module):
    """What fvcore calls with each batch."""

    def __init__(self, engine: Engine, model: nn.Module) -> None:
        super().__init__()
        self.engine, self.model = engine, model

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.engine.losses(self.model, batch)
