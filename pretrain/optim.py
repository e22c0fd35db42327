"""Optimizers and the learning-rate schedule of contrastive pretraining."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import nn


def build_optimizer(cfg: CfgNode, modules: nn.Module) -> torch.optim.Optimizer:
    """Build LARS, SGD or AdamW over all parameters; biases and normalisation get no weight decay.

    LARS applies the trust ratio to every weight of more than one dimension, whatever its decay, and never to biases and
    normalisation, as in SimCLR. timm's ratio is that of You et al. 2017 (arXiv 1708.03888), 0.001 |w| / (|g| + decay
    |w|); SimCLR's and MAE's code divide by |g + decay w|. The two are equal without decay and nearly so at 1e-6. timm
    and MAE multiply the momentum by the learning rate, SimCLR its input, which differs only while the rate changes. The
    schedule sets the learning rate before every step.
    """
    weights = [p for p in modules.parameters() if p.ndim > 1]
    plain = [p for p in modules.parameters() if p.ndim <= 1]
    # Without always_adapt timm's Lars is SGD for parameters without decay.
    lars = {"always_adapt": True} if cfg.SOLVER.OPTIMIZER == "lars" else {}
    groups = [
        {"params": weights, "weight_decay": cfg.SOLVER.WEIGHT_DECAY, **lars},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if cfg.SOLVER.OPTIMIZER == "lars":
        from timm.optim import Lars  # lazy: importing it takes as long as torch

        return Lars(groups, lr=0.0, momentum=cfg.SOLVER.MOMENTUM)
    if cfg.SOLVER.OPTIMIZER == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=cfg.SOLVER.MOMENTUM)
    return torch.optim.AdamW(groups, lr=0.0)


def learning_rate(cfg: CfgNode, total_steps: int, steps_per_epoch: int) -> ParamScheduler:
    """Return the schedule as a function of progress in [0, 1): linear warm-up from 0, then a half cosine to 0.

    The peak is BASE_LR * BATCH_SIZE / 256 for lars and sgd (BATCH_SIZE counts all processes) and BASE_LR itself
    for adamw.
    """
    peak = cfg.SOLVER.BASE_LR
    if cfg.SOLVER.OPTIMIZER != "adamw":
        peak *= cfg.SOLVER.BATCH_SIZE / 256
    share = min(1.0, cfg.SOLVER.WARMUP_EPOCHS * steps_per_epoch / total_steps)
    cosine = CosineParamScheduler(peak, 0.0)
    if share == 0:
        return cosine
    warmup = LinearParamScheduler(0.0, peak)
    if share == 1:
        return warmup
    return CompositeParamScheduler([warmup, cosine], [share, 1 - share], ["rescaled", "rescaled"])
