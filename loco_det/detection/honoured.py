"""The keys of Detectron2's config tree that the model reads, and the values it has an answer to.

`None` means any value of the key's type. A key that is absent here does not reach the model.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode

from loco_det.detection.boxes import BOX_LOSSES
from loco_det.detection.poolers import POOLER_TYPES
from loco_det.errors import UserError

_EXPECTED_TYPES = [[str, str, value, tolerance] for value in (int, float) for tolerance in (int, float)]
_NORMS = ("BN", "SyncBN", "FrozenBN", "GN")

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
