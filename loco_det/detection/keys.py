"""Detectron2's key tree, and which of its keys the torchvision engine supports.

The tree itself is data, `d2_defaults.yaml`. The tables here list the keys that a user may change and the values that
this engine supports; all other keys must keep their default, and are refused by name. `check_supported` validates a
configuration once, before anything is opened or built; the code that builds the model relies on it. `load_cfg` also
reads this package's own keys (`core/own_keys.py`), which `stock` leaves out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from loco_det.backbones.networks import OWN_NETWORKS
from loco_det.backbones.own import OTHER_BACKBONES
from loco_det.core import config
from loco_det.core.config import Settings, read_settings, read_yaml, refusal
from loco_det.core.own_keys import OWN_KEYS, own_value
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
    "MODEL.BACKBONE.NAME": (
        "build_resnet_backbone",
        "build_resnet_fpn_backbone",
        *OWN_NETWORKS,
        "timm:NAME",
        "hf:FOLDER",
        "python:package.module:function",
    ),
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
    "MODEL.FPN.NORM": ("", "LN", *_NORMS),
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
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "Res5ROIHeads", "Res5ROIHeadsExtraNorm", "CascadeROIHeads"),
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
    "MODEL.ROI_BOX_HEAD.NORM": ("", "LN", *_NORMS),
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
    "MODEL.ROI_MASK_HEAD.NORM": ("", "LN", *_NORMS),
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

# Key -> the accepted values, or None for any value of the key's type.
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


# Detectron2's tasks that training and evaluation do not support with either engine.
_OTHER_TASKS = {
    "MODEL.META_ARCHITECTURE": ("PanopticFPN",),
    "MODEL.KEYPOINT_ON": (True,),
}
# Checked first, since other keys follow from it.
_DECIDING = ("MODEL.META_ARCHITECTURE",)


@functools.cache
def _defaults() -> CfgNode:
    tree: dict[str, Any] = {}
    for key, setting in read_settings(DEFAULTS).items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = setting.value
    return CfgNode(tree)


def get_cfg() -> CfgNode:
    """Return a fresh, mutable copy of every Detectron2 key with its default value."""
    return _defaults().clone()


def whole_tree() -> CfgNode:
    """Return Detectron2's tree with this package's own keys, all with their default value."""
    tree = get_cfg()
    for key, (default, _) in OWN_KEYS.items():
        section, _, last = key.rpartition(".")
        (config.value(tree, section) if section else tree)[last] = default
    return tree


def load_cfg(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> tuple[CfgNode, Settings]:
    """Read a detection configuration, as `load_config` does, over Detectron2's tree and this package's own keys.

    Own keys with their default are left out of the result.
    """
    cfg, settings = config.load_config(whole_tree(), path, overrides)
    unchanged = [key for key, (default, _) in OWN_KEYS.items() if config.value(cfg, key) == default]
    return config.without(cfg, unchanged), settings


def stock(cfg: CfgNode) -> CfgNode:
    """Return `cfg` without this package's own keys, as Detectron2 takes it."""
    return config.without(cfg, [key for key in config.flat(cfg) if key in OWN_KEYS])


def meanings() -> dict[str, str]:
    """Return what each supported key means, in one line."""
    own = {key: one.meaning.replace("`", "") for key, one in OWN_KEYS.items()}
    return read_yaml(DEFAULTS.with_name("meanings.yaml")) | own


def check_supported(cfg: CfgNode, settings: Settings | None = None) -> None:
    """Refuse a configuration that the torchvision engine does not support.

    Args:
        cfg: a complete configuration.
        settings: what the user set (`loco_det.core.config.load_config`), for the origin in messages.

    Raises:
        UserError: naming the origin, the key, its value and the accepted values.
    """
    check_task(cfg, settings)
    defaults = config.flat(_defaults())
    for key in sorted(defaults, key=_DECIDING.__contains__, reverse=True):
        value, default = config.value(cfg, key), defaults[key]
        allowed = SUPPORTED.get(key, ())
        if allowed is None or _plain(value) == _plain(default) or _plain(value) in allowed:
            continue
        if key == "MODEL.BACKBONE.NAME" and str(value).startswith(OTHER_BACKBONES):
            continue
        if allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            reason = f", and the torchvision engine takes {choices}; change it or use --engine detectron2."
        else:
            reason = (
                "; Detectron2 knows this key but the torchvision engine does not support it, so leave it at "
                f"{default!r} or use --engine detectron2."
            )
        raise refusal(cfg, settings, key, reason)
    _check_combinations(cfg, settings)


def check_task(cfg: CfgNode, settings: Settings | None = None) -> None:
    """Refuse early what neither engine supports, or would fail at only after training.

    Args:
        settings: as for `check_supported`.

    Raises:
        UserError: naming the origin, the key and its value.
    """
    for key, others in _OTHER_TASKS.items():
        if config.value(cfg, key) in others:
            reason = (
                "; runs here train and evaluate boxes, instance masks and pixel labels, with either "
                "engine; use Detectron2 itself for other tasks."
            )
            raise refusal(cfg, settings, key, reason)
    if cfg.VIS_PERIOD > 0:
        raise refusal(cfg, settings, "VIS_PERIOD", ", but no run here draws; set it to 0.")
    if cfg.TEST.AUG.ENABLED and (cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN" or cfg.MODEL.LOAD_PROPOSALS):
        needs = "MODEL.META_ARCHITECTURE 'GeneralizedRCNN' and MODEL.LOAD_PROPOSALS False"
        raise refusal(cfg, settings, "TEST.AUG.ENABLED", f", which needs {needs}; set it to False.")
    if cfg.TEST.PRECISE_BN.ENABLED and cfg.TEST.PRECISE_BN.NUM_ITER < 1:
        raise refusal(cfg, settings, "TEST.PRECISE_BN.NUM_ITER", "; give at least 1.")
    if any([type(value) for value in expected] not in _EXPECTED_TYPES for expected in cfg.TEST.EXPECTED_RESULTS):
        reason = "; write each as ['bbox', 'AP', 38.5, 0.2]: task, metric, value and tolerance."
        raise refusal(cfg, settings, "TEST.EXPECTED_RESULTS", reason)
    _check_own_solver(cfg, settings)
    _check_own_sizes(cfg, settings)


def _check_own_solver(cfg: CfgNode, settings: Settings | None) -> None:
    optimizer, betas = own_value(cfg, "SOLVER.OPTIMIZER"), own_value(cfg, "SOLVER.BETAS")
    decay, of_positions = own_value(cfg, "SOLVER.LAYER_DECAY"), own_value(cfg, "SOLVER.WEIGHT_DECAY_POSITIONS")
    if optimizer not in ("SGD", "AdamW"):
        raise refusal(cfg, settings, "SOLVER.OPTIMIZER", "; use SGD or AdamW.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise refusal(cfg, settings, "SOLVER.BETAS", "; give two numbers from 0 to below 1.")
    if optimizer == "SGD" and betas != OWN_KEYS["SOLVER.BETAS"].default:
        raise refusal(cfg, settings, "SOLVER.BETAS", ", which SGD does not have; set SOLVER.OPTIMIZER AdamW.")
    if optimizer == "AdamW" and cfg.SOLVER.NESTEROV:
        raise refusal(cfg, settings, "SOLVER.NESTEROV", ", which AdamW does not have; set it to False.")
    if not 0 < decay <= 1:
        raise refusal(cfg, settings, "SOLVER.LAYER_DECAY", "; give a factor above 0, up to 1.")
    if decay != 1 and cfg.SOLVER.BIAS_LR_FACTOR != 1:
        raise refusal(cfg, settings, "SOLVER.LAYER_DECAY", ", which needs SOLVER.BIAS_LR_FACTOR 1.0; set one of them.")
    if own_value(cfg, "SOLVER.AMP.DTYPE") not in ("auto", "fp16", "bf16"):
        raise refusal(cfg, settings, "SOLVER.AMP.DTYPE", "; use auto, fp16 or bf16.")
    if own_value(cfg, "SOLVER.AMP.DTYPE") != "auto" and not cfg.SOLVER.AMP.ENABLED:
        raise refusal(cfg, settings, "SOLVER.AMP.DTYPE", ", but SOLVER.AMP.ENABLED is False; set that to True.")
    if of_positions is not None and not (type(of_positions) in (int, float) and 0 <= of_positions < math.inf):
        reason = "; give a finite number that is not negative."
        raise refusal(cfg, settings, "SOLVER.WEIGHT_DECAY_POSITIONS", reason)


def _check_own_sizes(cfg: CfgNode, settings: Settings | None) -> None:
    jitter, size = own_value(cfg, "INPUT.SCALE_JITTER"), own_value(cfg, "INPUT.SCALE_JITTER_SIZE")
    square = own_value(cfg, "MODEL.BACKBONE.SQUARE_PAD")
    are_numbers = all(type(scale) in (int, float) for scale in jitter)
    if jitter and not (are_numbers and len(jitter) == 2 and 0 < jitter[0] <= jitter[1] < math.inf):
        raise refusal(cfg, settings, "INPUT.SCALE_JITTER", "; give the least and the largest scale, e.g. [0.1, 2.0].")
    if jitter and cfg.INPUT.CROP.ENABLED:
        raise refusal(cfg, settings, "INPUT.CROP.ENABLED", ", and INPUT.SCALE_JITTER crops already; set one of them.")
    if size < 1:
        raise refusal(cfg, settings, "INPUT.SCALE_JITTER_SIZE", "; give a size in pixels.")
    for key in ("INPUT.SCALE_JITTER_SIZE", "INPUT.SCALE_JITTER_PAD"):
        if not jitter and own_value(cfg, key) != OWN_KEYS[key].default:
            raise refusal(cfg, settings, key, ", but INPUT.SCALE_JITTER is off; set that to e.g. [0.1, 2.0].")
    if not square:
        return
    key = "MODEL.BACKBONE.SQUARE_PAD"
    if square < 0 or square % 32:
        raise refusal(cfg, settings, key, "; give a multiple of 32 pixels, or 0 for no square.")
    if not cfg.MODEL.BACKBONE.NAME.startswith(OTHER_BACKBONES):
        names = f"timm:..., hf:..., python:..., {' or '.join(OWN_NETWORKS)}"
        reason = f", which is for a MODEL.BACKBONE.NAME {names}; leave it out."
        raise refusal(cfg, settings, key, reason)
    sides = {"INPUT.MAX_SIZE_TEST": cfg.INPUT.MAX_SIZE_TEST}
    sides |= {"INPUT.SCALE_JITTER_SIZE": size} if jitter else {"INPUT.MAX_SIZE_TRAIN": cfg.INPUT.MAX_SIZE_TRAIN}
    sides |= {"TEST.AUG.MAX_SIZE": cfg.TEST.AUG.MAX_SIZE} if cfg.TEST.AUG.ENABLED else {}
    for name, side in sides.items():
        if side > square:
            raise refusal(cfg, settings, key, f", and {name} is {side}; lower {name} or raise the square.")


def _check_combinations(cfg: CfgNode, settings: Settings | None) -> None:
    """Refuse keys that are supported one by one but not together."""
    _check_deterministic(cfg, settings)
    model, heads = cfg.MODEL, cfg.MODEL.ROI_HEADS.NAME
    depth, deform = model.RESNETS.DEPTH, list(model.RESNETS.DEFORM_ON_PER_STAGE)
    trained_here = not model.LOAD_PROPOSALS or model.META_ARCHITECTURE == "ProposalNetwork"
    if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" and trained_here:
        needs = "MODEL.LOAD_PROPOSALS True and MODEL.META_ARCHITECTURE 'GeneralizedRCNN'"
        raise refusal(cfg, settings, "MODEL.PROPOSAL_GENERATOR.NAME", f", which needs {needs}; set them.")
    if not heads.startswith("Res5ROIHeads") and not model.ROI_BOX_HEAD.NAME:
        reason = f"; MODEL.ROI_HEADS.NAME {heads!r} needs 'FastRCNNConvFCHead'."
        raise refusal(cfg, settings, "MODEL.ROI_BOX_HEAD.NAME", reason)
    if model.BACKBONE.NAME.startswith(OTHER_BACKBONES):
        _check_no_resnet(cfg, settings)
        return
    for name, needed in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
        if depth < 50 and model.RESNETS[name] != needed:
            reason = f", but MODEL.RESNETS.DEPTH {depth} needs {needed}; change one of them."
            raise refusal(cfg, settings, f"MODEL.RESNETS.{name}", reason)
    if any(deform) and (depth < 50 or len(deform) != 4 or (deform[3] and heads.startswith("Res5ROIHeads"))):
        reason = (
            "; it takes four values, for res2 to res5, needs depth 50 or more, and Res5ROIHeads has no deformable res5."
        )
        raise refusal(cfg, settings, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", reason)


def _check_deterministic(cfg: CfgNode, settings: Settings | None) -> None:
    """Refuse what has no deterministic kernel on a GPU; torchvision's would silently differ from run to run."""
    if not own_value(cfg, "DETERMINISTIC"):
        return
    refused = {
        f"MODEL.ROI_{part}_HEAD.POOLER_TYPE": cfg.MODEL[f"ROI_{part}_HEAD"].POOLER_TYPE == "ROIPool"
        for part in ("BOX", "MASK")
    }
    refused["MODEL.RESNETS.DEFORM_ON_PER_STAGE"] = any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)
    refused["MODEL.META_ARCHITECTURE"] = cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    for key, is_set in refused.items():
        if is_set:
            reason = ", whose gradient on a GPU differs from run to run; change it or set DETERMINISTIC to False."
            raise refusal(cfg, settings, key, reason)


def _check_no_resnet(cfg: CfgNode, settings: Settings | None) -> None:
    """Refuse what only a ResNet can be, for a backbone that is none."""
    name = cfg.MODEL.BACKBONE.NAME
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.MODEL.ROI_HEADS.NAME.startswith("Res5ROIHeads"):
        raise refusal(cfg, settings, "MODEL.ROI_HEADS.NAME", f", whose head is a ResNet's res5; {name} has none.")
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) or cfg.MODEL.RESNETS.RES5_DILATION != 1:
        key = "DEFORM_ON_PER_STAGE" if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) else "RES5_DILATION"
        raise refusal(cfg, settings, f"MODEL.RESNETS.{key}", f", which is for ResNets; leave it out for {name}.")
    if name in OWN_NETWORKS and cfg.MODEL.RESNETS.NORM == "GN":
        raise refusal(cfg, settings, "MODEL.RESNETS.NORM", f", and {name} has widths that 32 groups do not divide.")


def _plain(value: Any) -> Any:
    """Convert tuples to lists at every depth, as in a dumped file."""
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
