"""The range of every number of a pretraining configuration, judged before any image is looked for.

Numbers that depend on other keys are judged where these are read: BACKBONE.WIDTH (pretrain/train.py), SHARING.PENALTY
(pretrain/sharing.py) and AUGMENT.* (loco_det/images/views.py).
"""

from __future__ import annotations

from fvcore.common.config import CfgNode

from loco_det.core import config
from loco_det.core.errors import UserError

_MOST = 10**9  # of what has no other upper limit; a typing error, infinite, or overflows somewhere
# Least and most, both included.
RANGES = {
    "DECODER.CONV_BLOCKS": (0, 1000),
    "DECODER.MLP_LAYERS": (1, 4),
    "DECODER.HIDDEN_DIM": (0, 2**20),
    "DECODER.OUT_DIM": (1, 2**20),
    "LOSS.TEMPERATURE": (1e-6, _MOST),
    "LOSS.CHUNK": (0, _MOST),
    "DATA.IMAGE_SIZE": (1, 2**14),
    "DATA.NUM_WORKERS": (0, _MOST),
    "DATA.SHUFFLE_BUFFER": (1, _MOST),
    "DATA.MAX_BAD_SHARE": (0, 1),
    "SOLVER.BASE_LR": (0, _MOST),
    "SOLVER.MOMENTUM": (0, 1),
    "SOLVER.WEIGHT_DECAY": (0, _MOST),
    "SOLVER.BATCH_SIZE": (1, _MOST),
    "SOLVER.EPOCHS": (0, _MOST),
    "SOLVER.MAX_STEPS": (0, _MOST),
    "SOLVER.WARMUP_EPOCHS": (0, _MOST),
    "KNN.PERIOD": (0, _MOST),
    "KNN.IMAGES": (1, _MOST),
    "KNN.K": (1, _MOST),
    "KNN.TEMPERATURE": (1e-6, _MOST),
    "LOG_PERIOD": (1, _MOST),
    "CHECKPOINT_PERIOD": (1, _MOST),
    "SEED": (-(2**63), 2**63 - 1),
}


def check_numbers(cfg: CfgNode) -> None:
    """Judge every number by its range.

    Raises:
        UserError: naming the key of one that is out of it, or that a run has no length.
    """
    for key, (least, most) in RANGES.items():
        value = config.value(cfg, key)
        if not value >= least:  # nan, too
            raise UserError(f"{key} is {value}; use {least} or more")
        if value > most:
            raise UserError(f"{key} is {value}; use {most} or less")
    if cfg.SOLVER.EPOCHS == cfg.SOLVER.MAX_STEPS == 0:
        raise UserError("SOLVER.EPOCHS and SOLVER.MAX_STEPS are both 0; set one of them")
