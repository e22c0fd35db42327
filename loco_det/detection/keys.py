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

from loco_det.core.config import Setting, collect_settings
from loco_det.core.errors import UserError
from loco_det.detection.boxes import BOX_LOSSES
from loco_det.detection.poolers import POOLER_TYPES

DEFAULTS = Path(__file__).with_name("d2_defaults.yaml")
_EXPECTED_TYPES = [[str, str, value, tolerance] for value in (int, float) for tolerance in (int, float)]
_NORMS = ("BN", "SyncBN", "FrozenBN", "GN")

# Keys that the model reads -> the values it supports; None: any value of the key's type.
MODEL_KEYS: dict[str, tuple[Any, ...] | None] = {
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN", "ProposalNetwork", "SemanticSegmentor"),
    "MODEL.MASK_ON": None,
    "MODEL.KEYPOINT_ON": (False,),
    "MODEL.PIXEL_MEAN": None,
    "MODEL.PIXEL_STD": None,
    "MODEL.BACKBONE.NAME": ("build_resnet_backbone", "build_resnet_fpn_backbone"),
    "MODEL.BACKBONE.FREEZE_AT": None,
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": None,
    "MODEL.RESNETS.NORM": _NORMS,
    "MODEL.RESNETS.NUM_GROUPS": None,
    "MODEL.RESNETS.WIDTH_PER_GROUP": None,
    "MODEL.RESNETS.STRIDE_IN_1X1": None,
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": None,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": None,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": None,
    "MODEL.RESNETS.DEFORM_MODULATED": (False,),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": (1,),
    "MODEL.FPN.IN_FEATURES": None,
    "MODEL.FPN.OUT_CHANNELS": None,
    "MODEL.FPN.NORM": ("", *_NORMS),
    "MODEL.FPN.FUSE_TYPE": ("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN", "PrecomputedProposals"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": None,
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.ANCHOR_GENERATOR.SIZES": None,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": None,
    "MODEL.ANCHOR_GENERATOR.OFFSET": None,
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.IN_FEATURES": None,
    "MODEL.RPN.BOUNDARY_THRESH": None,
    "MODEL.RPN.IOU_THRESHOLDS": None,
    "MODEL.RPN.IOU_LABELS": None,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": None,
    "MODEL.RPN.POSITIVE_FRACTION": None,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": None,
    "MODEL.RPN.BBOX_REG_WEIGHTS": None,
    "MODEL.RPN.SMOOTH_L1_BETA": None,
    "MODEL.RPN.LOSS_WEIGHT": None,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": None,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": None,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": None,
    "MODEL.RPN.POST_NMS_TOPK_TEST": None,
    "MODEL.RPN.NMS_THRESH": None,
    "MODEL.RPN.CONV_DIMS": None,
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads"),
    "MODEL.ROI_HEADS.NUM_CLASSES": None,
    "MODEL.ROI_HEADS.IN_FEATURES": None,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": None,
    "MODEL.ROI_HEADS.IOU_LABELS": None,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": None,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": None,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": None,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": None,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": None,
    "MODEL.ROI_BOX_HEAD.NAME": ("", "FastRCNNConvFCHead"),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": BOX_LOSSES,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": None,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": None,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": None,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": None,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": None,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": POOLER_TYPES,
    "MODEL.ROI_BOX_HEAD.NUM_FC": None,
    "MODEL.ROI_BOX_HEAD.FC_DIM": None,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": None,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": None,
    "MODEL.ROI_BOX_HEAD.NORM": ("", *_NORMS),
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": None,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": None,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": None,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": None,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": None,
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": None,
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": None,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": None,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": None,
    "MODEL.ROI_MASK_HEAD.NORM": ("", *_NORMS),
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": None,
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": POOLER_TYPES,
    "MODEL.SEM_SEG_HEAD.NAME": ("SemSegFPNHead",),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": None,
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": (255,),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": None,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": None,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": None,
    "MODEL.SEM_SEG_HEAD.NORM": ("", *_NORMS),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": None,
    "TEST.DETECTIONS_PER_IMAGE": None,
}

# Key -> the values taken, or None for any value of the key's type.
SUPPORTED: dict[str, tuple[Any, ...] | None] = {
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


def check_supported(cfg: CfgNode, settings: Mapping[str, Setting] | None = None) -> None:
    """Refuse a configuration that asks for what the torchvision engine does not do.

    Args:
        cfg: a complete configuration.
        settings: what the user wrote (`loco_det.core.config.collect_settings`), to say where.

    Raises:
        UserError: naming the place, the key, its value and the values that can stand there.
    """
    check_task(cfg, settings)
    defaults = values(_defaults())
    for key in sorted(defaults, key=_DECIDING.__contains__, reverse=True):
        value, default = lookup(cfg, key), defaults[key]
        allowed = SUPPORTED.get(key, ())
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


def check_model_keys(cfg: CfgNode) -> None:
    """Refuses a config that this engine would have to answer with another model than the one asked for.

    Raises:
        UserError: names the key, its value and what can stand there.
    """
    precomputed = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    if precomputed and (not cfg.MODEL.LOAD_PROPOSALS or cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork"):
        raise UserError(
            "MODEL.PROPOSAL_GENERATOR.NAME is 'PrecomputedProposals'; that needs MODEL.LOAD_PROPOSALS True and "
            "MODEL.META_ARCHITECTURE 'GeneralizedRCNN'"
        )
    for key, allowed in MODEL_KEYS.items():
        value = lookup(cfg, key)
        value = list(value) if isinstance(value, tuple) else value
        if allowed is not None and value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise UserError(
                f"{key} is {value!r}, which the torchvision engine does not have; set it to {choices}, or use "
                "--engine detectron2"
            )
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH < 50:
        needed = {"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1, "NUM_GROUPS": 1}
        for name, value in needed.items():
            if resnets[name] != value:
                raise UserError(f"MODEL.RESNETS.{name} is {resnets[name]}, but depth {resnets.DEPTH} needs {value}")
    heads, deform = cfg.MODEL.ROI_HEADS.NAME, list(resnets.DEFORM_ON_PER_STAGE)
    if any(deform) and (resnets.DEPTH < 50 or len(deform) != 4 or (deform[3] and heads == "Res5ROIHeads")):
        raise UserError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {deform}; it takes four values, for res2 to res5, needs depth 50 or "
            "more, and Res5ROIHeads has no deformable res5"
        )
    if heads != "Res5ROIHeads" and not cfg.MODEL.ROI_BOX_HEAD.NAME:
        raise UserError(f"MODEL.ROI_BOX_HEAD.NAME is empty; {heads} needs 'FastRCNNConvFCHead'")


def check_test_keys(cfg: CfgNode) -> None:
    """Refuses what would fail in either engine only after the training, at the last evaluation.

    Raises:
        UserError: names the key.
    """
    if cfg.TEST.AUG.ENABLED and (cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.LOAD_PROPOSALS):
        raise UserError(
            "TEST.AUG.ENABLED is True, which needs MODEL.META_ARCHITECTURE 'GeneralizedRCNN' and MODEL.LOAD_PROPOSALS "
            "False; set it to False"
        )
    if cfg.TEST.PRECISE_BN.ENABLED and cfg.TEST.PRECISE_BN.NUM_ITER < 1:
        raise UserError(f"TEST.PRECISE_BN.NUM_ITER is {cfg.TEST.PRECISE_BN.NUM_ITER}; give at least 1.")
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if [type(value) for value in expected] not in _EXPECTED_TYPES:
            raise UserError(
                f"TEST.EXPECTED_RESULTS has {expected!r}; write each as ['bbox', 'AP', 38.5, 0.2]: task, metric, value "
                "and tolerance"
            )


def lookup(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node
