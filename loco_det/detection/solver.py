"""Optimiser, schedule, clipping and precision of detector training, with Detectron2's arithmetic.

All values come from `cfg.SOLVER`; sources are detectron2/solver/build.py and lr_scheduler.py (v0.6), and for AdamW and
the decay by layers ViTDet (detectron2/modeling/backbone/vit.py `get_vit_lr_decay_rate`).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fvcore.common.config import CfgNode
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from torch import Tensor, nn

from loco_det.core import config
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.core.own_keys import own_value
from loco_det.detection.cpu_speed import bump_versions, is_fast

NORMS = (
    nn.modules.batchnorm._BatchNorm,  # BatchNorm1d to 3d and SyncBatchNorm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# A block of a plain transformer below its pyramid: this package's, and in Detectron2's ViT.
_BLOCK = re.compile(r"backbone\.net\.(?:model\.)?blocks\.(\d+)\.")
_BELOW_BLOCKS = re.compile(r"backbone\.net\.(?:model\.)?(patch_embed|norm_pre|pos_embed|cls_token|reg_token)\b")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD | torch.optim.AdamW:
    """Build SOLVER.OPTIMIZER for the trainable parameters: a group per set of hyperparameters, in order of appearance.

    The order is Detectron2's, so that a checkpoint's optimiser state fits both engines.

    Raises:
        UserError: the model has no trainable parameter, or a SOLVER value is out of range.
    """
    solver = cfg.SOLVER
    for key in ("BASE_LR", "MOMENTUM", "WEIGHT_DECAY"):
        if not (math.isfinite(solver[key]) and solver[key] >= 0):
            raise UserError(f"SOLVER.{key} is {solver[key]}; give a finite number that is not negative.")
    if solver.NESTEROV and solver.MOMENTUM <= 0:
        raise UserError("SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0.")
    groups: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    seen: set[int] = set()
    factors = layer_factors(model, own_value(cfg, "SOLVER.LAYER_DECAY"))
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                options = _options(cfg, module, name, factors.get(f"{place}.{name}", 1.0))
                groups.setdefault(options, []).append(parameter)
    if not groups:
        raise UserError("No parameter of the model is trainable; lower MODEL.BACKBONE.FREEZE_AT.")
    fused = is_fast(model)  # one pass over memory, without a copy of all gradients
    params = [{**dict(options), "params": parameters} for options, parameters in groups.items()]
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": not fused, "fused": fused}
    if own_value(cfg, "SOLVER.OPTIMIZER") == "AdamW":
        optimizer = torch.optim.AdamW(params, betas=own_value(cfg, "SOLVER.BETAS"), **common)
    else:
        optimizer = torch.optim.SGD(params, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **common)
    if fused:
        optimizer.register_step_post_hook(bump_versions)
    return optimizer


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return {name of a parameter: factor of its learning rate} for a plain transformer's parameters; others have 1.

    Of n blocks, the last has `decay`, the first decay ** n, and what is below the blocks decay ** (n + 1).

    Raises:
        UserError: a decay other than 1, and the model has no plain transformer.
    """
    if decay == 1:
        return {}
    names = [name for name, _ in model.named_parameters()]
    block = {name: int(found[1]) for name in names if (found := _BLOCK.match(name))}
    if not block:
        raise UserError(
            f"SOLVER.LAYER_DECAY is {decay}, which is for timm's plain transformers, and this backbone is none; set it "
            "to 1.0."
        )
    count = max(block.values()) + 1
    below = {name: decay ** (count + 1) for name in names if _BELOW_BLOCKS.match(name)}
    return below | {name: decay ** (count - index) for name, index in block.items()}


def _options(cfg: CfgNode, module: nn.Module, name: str, factor: float) -> tuple[tuple[str, float], ...]:
    solver, of_positions = cfg.SOLVER, own_value(cfg, "SOLVER.WEIGHT_DECAY_POSITIONS")
    options = {"lr": solver.BASE_LR * factor}
    if isinstance(module, NORMS):
        options["weight_decay"] = solver.WEIGHT_DECAY_NORM
    if name == "pos_embed" and of_positions is not None:
        options["weight_decay"] = float(of_positions)
    if name == "bias":
        if solver.BIAS_LR_FACTOR != 1.0:
            options["lr"] = solver.BASE_LR * solver.BIAS_LR_FACTOR
        if solver.WEIGHT_DECAY_BIAS is not None:
            options["weight_decay"] = solver.WEIGHT_DECAY_BIAS
    return tuple(options.items())


class Schedule:
    """Sets every group's learning rate to its base rate times a function of the number of iterations.

    `state_dict` has the format of Detectron2's LRMultiplier.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, multiplier: Callable[[float], float], length: int) -> None:
        self.optimizer, self.multiplier, self.length = optimizer, multiplier, length
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.iteration = 0
        self._apply()

    def step(self) -> None:
        """Advance by one iteration."""
        self.iteration += 1
        self._apply()

    def _apply(self) -> None:
        if self.iteration >= self.length:
            return  # after the last iteration; fvcore's schedulers end before 1.0
        factor = self.multiplier(self.iteration / self.length)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * factor

    def state_dict(self) -> dict[str, Any]:
        return {"base_lrs": self.base_lrs, "last_epoch": self.iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base_lrs, self.iteration = list(state["base_lrs"]), int(state["last_epoch"])
        self._apply()


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Schedule:
    """Build the schedule SOLVER.LR_SCHEDULER_NAME, with warm-up, over SOLVER.MAX_ITER iterations.

    Raises:
        UserError: an unknown name or method, or values out of range.
    """
    return Schedule(optimizer, lr_multiplier(cfg), cfg.SOLVER.MAX_ITER)


def lr_multiplier(cfg: CfgNode) -> ParamScheduler:
    """Return the multiplier of the base learning rate as a function of progress in [0, 1)."""
    solver = cfg.SOLVER
    if solver.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER is {solver.MAX_ITER}; give at least 1.")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        main: ParamScheduler = _multi_step(solver)
    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        if not 0 <= solver.BASE_LR_END <= solver.BASE_LR or solver.BASE_LR == 0:
            raise UserError(
                f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; give a value from 0 to SOLVER.BASE_LR ({solver.BASE_LR})."
            )
        main = CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR)
    elif solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        if not 0 < solver.NUM_DECAYS < solver.MAX_ITER:
            raise UserError(f"SOLVER.NUM_DECAYS is {solver.NUM_DECAYS}; give 1 to SOLVER.MAX_ITER - 1.")
        main = StepWithFixedGammaParamScheduler(1.0, solver.NUM_DECAYS, solver.GAMMA, solver.MAX_ITER)
    else:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}; use WarmupMultiStepLR, WarmupCosineLR or "
            "WarmupStepWithFixedGammaLR."
        )
    return _with_warmup(main, solver)


def _multi_step(solver: CfgNode) -> ParamScheduler:
    steps = list(solver.STEPS)
    if any(type(step) is not int or step <= 0 for step in steps) or steps != sorted(set(steps)):
        raise UserError(f"SOLVER.STEPS is {tuple(steps)}; give positive whole numbers in ascending order.")
    used = [step for step in steps if step < solver.MAX_ITER]
    if used != steps:
        log.info("SOLVER.STEPS %s lie at or after SOLVER.MAX_ITER and have no effect", steps[len(used) :])
    if len(used) >= solver.MAX_ITER:
        raise UserError(f"SOLVER.STEPS has {len(used)} entries for {solver.MAX_ITER} iterations; give fewer.")
    return MultiStepParamScheduler(
        [solver.GAMMA**k for k in range(len(used) + 1)], num_updates=solver.MAX_ITER, milestones=used
    )


def _with_warmup(main: ParamScheduler, solver: CfgNode) -> ParamScheduler:
    if solver.WARMUP_ITERS < 0:
        raise UserError(f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}; give 0 or more.")
    share = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    start = solver.WARMUP_FACTOR * main(0.0)
    if solver.WARMUP_METHOD == "linear":
        warmup: ParamScheduler = LinearParamScheduler(start, main(0.0 if solver.RESCALE_INTERVAL else share))
    elif solver.WARMUP_METHOD == "constant":
        warmup = ConstantParamScheduler(start)
    else:
        raise UserError(f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}; use linear or constant.")
    return CompositeParamScheduler(
        [warmup, main],
        lengths=[share, 1 - share],
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
    )


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale a configuration made for SOLVER.REFERENCE_WORLD_SIZE processes to `world_size`.

    The batch per process stays, the learning rate grows and the schedule shrinks with the total batch
    (detectron2 DefaultTrainer.auto_scale_workers). 0 switches this off.

    Raises:
        UserError: the batch cannot be divided by REFERENCE_WORLD_SIZE.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    if reference < 0 or cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, which does not divide SOLVER.IMS_PER_BATCH "
            f"{cfg.SOLVER.IMS_PER_BATCH}; change one of them."
        )
    scale = world_size / reference
    periods = ("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
    scaled = {
        "SOLVER.IMS_PER_BATCH": round(cfg.SOLVER.IMS_PER_BATCH * scale),
        "SOLVER.BASE_LR": cfg.SOLVER.BASE_LR * scale,
        "SOLVER.STEPS": tuple(round(step / scale) for step in cfg.SOLVER.STEPS),
        "SOLVER.REFERENCE_WORLD_SIZE": world_size,
        **{key: round(config.value(cfg, key) / scale) for key in periods},
    }
    cfg = config.changed(cfg, **scaled)
    log.info(
        "scaled from %d to %d processes: batch %d, learning rate %g, %d iterations",
        *(reference, world_size, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER),
    )
    return cfg


def half_type(cfg: CfgNode, device: torch.device) -> torch.dtype | None:
    """Return the type of SOLVER.AMP on `device`; None without SOLVER.AMP.ENABLED."""
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = own_value(cfg, "SOLVER.AMP.DTYPE")
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "bf16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16}[name]


def autocast(cfg: CfgNode, device: torch.device, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast of one forward pass, to `half_type`."""
    dtype = half_type(cfg, device)
    if dtype is None:
        return contextlib.nullcontext()
    # A fast RPN first scores all cells without gradients. Until torch 2.10 autocast cached the weight casts of that
    # pass, so that the sampled cells gave its biases no gradient either.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=not is_fast(model))


def grad_scaler(cfg: CfgNode, device: torch.device) -> torch.amp.GradScaler:
    """Return the loss scaler for float16; disabled for other types."""
    return torch.amp.GradScaler(device.type, enabled=half_type(cfg, device) is torch.float16)


def optimizer_step(
    cfg: CfgNode,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    read: Callable[[], None] = lambda: None,
) -> None:
    """Run backward of the total loss (a scalar), clipping, and the optimiser's update; frees the gradients.

    `read` is called before the update, and may wait for the device, which has the backward to do meanwhile.
    """
    scaler.scale(loss).backward()
    read()
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        scaler.unscale_(optimizer)
        clip_gradients(cfg, (p for group in optimizer.param_groups for p in group["params"]))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()  # now, so that the next forward pass can use their memory


def clip_gradients(cfg: CfgNode, parameters: Iterable[nn.Parameter]) -> None:
    """Clip each parameter's gradient separately, as Detectron2 does: by value, or by its own norm.

    Raises:
        UserError: SOLVER.CLIP_GRADIENTS.CLIP_TYPE is neither.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    for parameter in parameters:
        if clip.CLIP_TYPE == "value":
            nn.utils.clip_grad_value_(parameter, clip.CLIP_VALUE)
        elif clip.CLIP_TYPE == "norm":
            nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)
        else:
            raise UserError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; use value or norm.")
