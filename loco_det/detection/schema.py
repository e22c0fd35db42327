"""Detectron2's key tree, and which of its keys the torchvision engine honours.

The tree itself is data, `d2_defaults.yaml`. The table here says of every key that a user may change whether this
engine takes any value or only some; all other keys are known, must keep their default, and are refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from loco_det.config import Setting, collect_settings
from loco_det.detection.honoured import MODEL_KEYS, check_test_keys, lookup
from loco_det.errors import UserError

DEFAULTS = Path(__file__).with_name("d2_defaults.yaml")

# Key -> the values taken, or None for any value of the key's type. MODEL_KEYS says the same of the model.
HONOURED: dict[str, tuple[Any, ...] | None] = {
    **MODEL_KEYS,
    "VERSION": (2,),
    "OUTPUT_DIR": None,
    "SEED": None,
    "CUDNN_BENCHMARK": None,
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "MODEL.DEVICE": None,
    "MODEL.LOAD_PROPOSALS": None,
    "MODEL.WEIGHTS": None,
    "DATASETS.TRAIN": None,
    "DATASETS.TEST": None,
    "DATASETS.PROPOSAL_FILES_TRAIN": None,
    "DATASETS.PROPOSAL_FILES_TEST": None,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": None,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": None,
    "DATALOADER.NUM_WORKERS": None,
    "DATALOADER.ASPECT_RATIO_GROUPING": None,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": None,
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": None,
    "DATALOADER.REPEAT_SQRT": None,
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MIN_SIZE_TRAIN": None,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": None,
    "INPUT.MIN_SIZE_TEST": None,
    "INPUT.MAX_SIZE_TEST": None,
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "INPUT.CROP.ENABLED": None,
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": None,
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.MAX_ITER": None,
    "SOLVER.BASE_LR": None,
    "SOLVER.BASE_LR_END": None,
    "SOLVER.MOMENTUM": None,
    "SOLVER.NESTEROV": None,
    "SOLVER.WEIGHT_DECAY": None,
    "SOLVER.WEIGHT_DECAY_NORM": None,
    "SOLVER.WEIGHT_DECAY_BIAS": None,
    "SOLVER.BIAS_LR_FACTOR": None,
    "SOLVER.GAMMA": None,
    "SOLVER.STEPS": None,
    "SOLVER.NUM_DECAYS": None,
    "SOLVER.WARMUP_FACTOR": None,
    "SOLVER.WARMUP_ITERS": None,
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.RESCALE_INTERVAL": None,
    "SOLVER.CHECKPOINT_PERIOD": None,
    "SOLVER.IMS_PER_BATCH": None,
    "SOLVER.REFERENCE_WORLD_SIZE": None,
    "SOLVER.CLIP_GRADIENTS.ENABLED": None,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": None,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": None,
    "SOLVER.AMP.ENABLED": None,
    "TEST.EVAL_PERIOD": None,
    "TEST.EXPECTED_RESULTS": None,
    "TEST.AUG.ENABLED": None,
    "TEST.AUG.MIN_SIZES": None,
    "TEST.AUG.MAX_SIZE": None,
    "TEST.AUG.FLIP": None,
    "TEST.PRECISE_BN.ENABLED": None,
    "TEST.PRECISE_BN.NUM_ITER": None,
}


# Of Detectron2's tasks those that neither engine's training and evaluation here is made for.
_OTHER_TASKS = {
    "MODEL.META_ARCHITECTURE": ("PanopticFPN",),
    "MODEL.KEYPOINT_ON": (True,),
}
# Judged first, since it says more clearly than any key that follows from it what is asked for.
_DECIDING = ("MODEL.META_ARCHITECTURE",)


@functools.cache
def _defaults() -> CfgNode:
    tree: dict[str, Any] = {}
    for key, setting in collect_settings(DEFAULTS).items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = setting.value
    return CfgNode(tree)


def get_cfg() -> CfgNode:
    """A fresh copy of every Detectron2 key with its default value, open to changes."""
    return _defaults().clone()


def values(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Every key of a configuration with its value, without the sections: {"SOLVER.BASE_LR": 0.001, ...}."""
    flat: dict[str, Any] = {}
    for name, value in cfg.items():
        flat.update(values(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {prefix + name: value})
    return flat


def check_task(cfg: CfgNode, settings: Mapping[str, Setting] | None = None) -> None:
    """Refuse what a run here could not do with either engine, before it costs time.

    Raises:
        UserError: naming the place, the key and its value.
    """
    for key, others in _OTHER_TASKS.items():
        value = lookup(cfg, key)
        if value in others:
            raise UserError(
                f"{_origin(key, settings)}{key} is {value!r}; runs here train and evaluate boxes, instance masks "
                "and Cityscapes' pixel labels, with either engine; use Detectron2 itself for other tasks."
            )
    if cfg.VIS_PERIOD > 0:
        where = _origin("VIS_PERIOD", settings)
        raise UserError(f"{where}VIS_PERIOD is {cfg.VIS_PERIOD}, but no run here draws; set it to 0.")
    check_test_keys(cfg)


def _origin(key: str, settings: Mapping[str, Setting] | None) -> str:
    """The file and line where the user set a key, as the beginning of a sentence."""
    return f"{settings[key].origin}: " if settings and key in settings else ""


def check_honoured(cfg: CfgNode, settings: Mapping[str, Setting] | None = None) -> None:
    """Refuse a configuration that asks for what the torchvision engine does not do.

    Args:
        cfg: a complete configuration.
        settings: what the user wrote (`loco_det.config.collect_settings`), to say where.

    Raises:
        UserError: naming the place, the key, its value and the values that can stand there.
    """
    check_task(cfg, settings)
    defaults = values(_defaults())
    for key in sorted(defaults, key=_DECIDING.__contains__, reverse=True):
        value, default = lookup(cfg, key), defaults[key]
        allowed = HONOURED.get(key, ())
        if allowed is None or _plain(value) == _plain(default) or _plain(value) in allowed:
            continue
        where = _origin(key, settings)
        if not allowed:
            raise UserError(
                f"{where}{key} is {value!r}; Detectron2 knows this key but the torchvision engine does not honour it, "
                f"so leave it at {default!r} or use --engine detectron2."
            )
        choices = " or ".join(repr(choice) for choice in allowed)
        raise UserError(
            f"{where}{key} is {value!r}, and the torchvision engine takes {choices}; change it or use "
            "--engine detectron2."
        )


def _plain(value: Any) -> Any:
    """Tuples as lists at every depth: a dumped file has only lists."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
