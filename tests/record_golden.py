"""Write tests/golden/detection.json: what an installed Detectron2 computes for small detectors.

Run once for each Detectron2 that should be the reference, from the top of the repository:

    python tests/record_golden.py COMMIT

COMMIT is the Detectron2 commit that is installed; it is noted in the file. Weights and images follow from closed
formulas (tests/detection_cases.py) and sampling takes the first candidates instead of random ones, so the numbers
depend on no random generator.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import detection_cases as cases
import torch

TARGET = Path(__file__).parent / "golden" / "detection.json"

CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "mask_rcnn_R_50_FPN": (cases.FPN,),
    "mask_rcnn_R_50_C4": (cases.C4,),
    "mask_rcnn_R_50_DC5_frozen": (cases.DC5, {"MODEL.BACKBONE.FREEZE_AT": 5}),
    "mask_rcnn_R_50_FPN_options": (
        cases.FPN,
        {
            "MODEL.FPN.FUSE_TYPE": "avg",
            "MODEL.RPN.BOUNDARY_THRESH": 4,
            "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.05, 0.15],
            "MODEL.ROI_HEADS.IOU_LABELS": [0, -1, 1],
            "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True,
            "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5,
            "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
        },
    ),
    "faster_rcnn_R_18_FPN_giou": (
        cases.FPN,
        cases.R18,
        {
            "MODEL.MASK_ON": False,
            "MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
        },
    ),
    "cascade_mask_rcnn_R_50_FPN": (cases.FPN, cases.CASCADE),
    "rpn_R_50_FPN": (cases.FPN, cases.RPN_ONLY),
    "scratch_mask_rcnn_R_50_FPN_gn": (cases.FPN, cases.GN, cases.GN_TRUNK),
    "mask_rcnn_X_50_FPN_syncbn": (cases.FPN, cases.X, cases.ALL_SYNCBN),
    "mask_rcnn_R_50_DC5_augmented": (cases.DC5, cases.AUGMENTED),
}


# Ten steps at a rate at which rounding grows little: 1e-6 of every weight shows as 1e-6 of the loss after them.
TRACED = ("mask_rcnn_R_50_FPN", "mask_rcnn_R_50_C4", "cascade_mask_rcnn_R_50_FPN")
TRACE = 10, {"SOLVER.BASE_LR": 0.002}


def first_ones(count: int, device: Any = None) -> torch.Tensor:
    """Stands in for `torch.randperm`."""
    return torch.arange(count, device=device)


def plain(tensor: torch.Tensor) -> list:
    """Numbers with the seven digits that a float32 holds."""
    if tensor.ndim == 0:
        return float(f"{tensor.item():.7g}")
    return [plain(item) for item in tensor]


def record(settings: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    from detectron2.config import get_cfg
    from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
    from detectron2.utils.events import EventStorage

    cfg = cases.configure(get_cfg(), *settings)
    model = cases.formula_weights(build_model(cfg))
    with mock.patch("torch.randperm", first_ones), EventStorage(0):
        losses = model(cases.detectron2_batch(train=True))
    sum(losses.values()).backward()
    gradients = {n: plain(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
    cases.formula_weights(model).eval()  # a trained BatchNorm has moved
    batch = cases.detectron2_batch(train=False)
    with torch.no_grad():
        images = GeneralizedRCNN.preprocess_image(model, batch)
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
        found = model(batch)
        augmented = GeneralizedRCNNWithTTA(cfg, model)(batch) if cfg.TEST.AUG.ENABLED else []
    return {
        "losses": {name: plain(loss) for name, loss in losses.items()},
        "gradient_norms": gradients,
        "proposals": [
            {"boxes": plain(p.proposal_boxes.tensor[:8]), "logits": plain(p.objectness_logits[:8])} for p in proposals
        ],
        "detections": [detections(item["instances"]) for item in found if "instances" in item],
        "augmented": [detections(item["instances"]) for item in augmented],
    }


def trace(settings: tuple[dict[str, Any], ...]) -> list[dict[str, float]]:
    with mock.patch("torch.randperm", first_ones):
        steps, _ = cases.detectron2_trace(TRACE[0], *settings, TRACE[1])
    return [{name: float(f"{value:.7g}") for name, value in losses.items()} for losses in steps]


def detections(found: Any) -> dict[str, Any]:
    """The first eight of an image."""
    return {
        "boxes": plain(found.pred_boxes.tensor[:8]),
        "scores": plain(found.scores[:8]),
        "classes": found.pred_classes[:8].tolist(),
        "mask_pixels": found.pred_masks[:8].sum(dim=(1, 2)).tolist() if found.has("pred_masks") else None,
    }


def main(commit: str) -> None:
    import detectron2

    torch.set_num_threads(1)
    golden = {
        "recorded_by": "python tests/record_golden.py COMMIT",
        "detectron2": detectron2.__version__,
        "commit": commit,
        "torch": torch.__version__.split("+")[0],
        "cases": {name: record(settings) for name, settings in CASES.items()},
        "traces": {name: trace(CASES[name]) for name in TRACED},
    }
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
