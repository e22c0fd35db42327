"""Twenty optimiser steps by Detectron2 and by this project from the same state: the same losses.

Model, optimiser, schedule, clipping and precision are each side's own; only the batches and the seed of each iteration
are shared. One thread, where both round alike.
"""

from __future__ import annotations

from typing import Any

import detection_cases as cases
import pytest
import torch

pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]
pytest.importorskip("detectron2")

STEPS = 20
TRAINED_BN = {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "mask_rcnn_R_50_FPN": (cases.FPN,),
    "mask_rcnn_R_50_FPN, frozen": (cases.FPN, {"MODEL.BACKBONE.FREEZE_AT": 5}),
    "mask_rcnn_R_50_C4": (cases.C4,),
    "mask_rcnn_R_50_DC5": (cases.DC5,),
    "cascade_mask_rcnn_R_50_FPN": (cases.FPN, cases.CASCADE),
    "rpn_R_50_FPN": (cases.FPN, cases.RPN_ONLY),
    "fast_rcnn_R_50_FPN": (cases.FPN, cases.FAST, {"MODEL.MASK_ON": False}),
    "scratch_mask_rcnn_R_50_FPN_gn": (cases.FPN, cases.GN, cases.GN_TRUNK),
    "mask_rcnn_X_50_FPN_syncbn": (cases.FPN, cases.X, cases.ALL_SYNCBN),
    "BN, cosine": (cases.FPN, TRAINED_BN, {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR_END": 1e-3}),
    "Nesterov, weight decay": (
        cases.FPN,
        {
            "SOLVER.NESTEROV": True,
            "SOLVER.WEIGHT_DECAY_NORM": 1e-3,
            "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
            "SOLVER.BIAS_LR_FACTOR": 2.0,
            "SOLVER.WARMUP_METHOD": "constant",
        },
    ),
    "clipped by value": (cases.C4, {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01}),
    "clipped by norm": (
        cases.FPN,
        {
            "SOLVER.CLIP_GRADIENTS.ENABLED": True,
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.1,
        },
    ),
    "giou": (cases.FPN, {"MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou"}),
}


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_have_the_same_losses(name: str) -> None:
    theirs, their_model = cases.detectron2_trace(STEPS, *CASES[name])
    ours, our_model = cases.our_trace(STEPS, *CASES[name])
    assert len(ours) == STEPS
    assert len({losses["lr"] for losses in ours}) > 3
    assert sum(ours[-1].values()) != sum(ours[0].values())
    assert ours == theirs
    after = their_model.state_dict()
    for key, tensor in our_model.state_dict().items():
        assert torch.equal(tensor, after[key]), key
