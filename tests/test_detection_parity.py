"""The same weights, images and seed through Detectron2 and through this project's detector: no difference at all.

One thread: Detectron2 with two threads differs from itself with one by up to 7e-7 in a score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detection_cases as cases
import pytest
import torch

from loco_det.detection.keys import get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.tta import AugmentedRCNN

pytestmark = [
    pytest.mark.detectron2,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]
pytest.importorskip("detectron2")

BOX_ONLY = {"MODEL.MASK_ON": False}
MAIN = {
    "mask_rcnn_R_50_FPN": (cases.FPN, cases.FULL_WIDTH),
    "faster_rcnn_R_50_FPN": (cases.FPN, cases.FULL_WIDTH, BOX_ONLY),
    "mask_rcnn_R_50_C4": (cases.C4, cases.FULL_WIDTH),
    "faster_rcnn_R_50_C4": (cases.C4, cases.FULL_WIDTH, BOX_ONLY),
    "mask_rcnn_R_18_FPN": (cases.FPN, cases.R18),
    "mask_rcnn_R_34_FPN": (cases.FPN, cases.R18, {"MODEL.RESNETS.DEPTH": 34}),
    "mask_rcnn_R_101_FPN": (cases.FPN, {"MODEL.RESNETS.DEPTH": 101}),
    "mask_rcnn_R_152_FPN": (cases.FPN, {"MODEL.RESNETS.DEPTH": 152}),
    "mask_rcnn_R_50_DC5": (cases.DC5,),
    "fast_rcnn_R_50_FPN": (cases.FPN, cases.FAST, BOX_ONLY),
    "fast_mask_rcnn_R_50_C4": (cases.C4, cases.FAST),
    "rpn_R_50_FPN": (cases.FPN, cases.RPN_ONLY),
    "rpn_R_50_C4": (cases.C4, cases.RPN_ONLY),
    "scratch_mask_rcnn_R_50_FPN_gn": (cases.FPN, cases.GN, cases.GN_TRUNK),
    "scratch_mask_rcnn_R_50_FPN_syncbn": (cases.FPN, cases.ALL_SYNCBN, {"MODEL.BACKBONE.FREEZE_AT": 0}),
    "mask_rcnn_X_101_FPN": (cases.FPN, cases.X, {"MODEL.RESNETS.DEPTH": 101}),
    "cascade_mask_rcnn_R_50_FPN": (cases.FPN, cases.CASCADE),
    "cascade_rcnn_R_50_FPN": (cases.FPN, cases.CASCADE, BOX_ONLY),
    "cascade_mask_rcnn_R_50_DC5_frozen": (cases.DC5, cases.CASCADE, {"MODEL.BACKBONE.FREEZE_AT": 5}),
    "cascade_mask_rcnn_X_50_FPN_gn": (cases.FPN, cases.CASCADE, cases.GN, cases.X, {"MODEL.RESNETS.NORM": "SyncBN"}),
}
OPTIONS = {
    "X": cases.X,
    "frozen": {"MODEL.BACKBONE.FREEZE_AT": 5},
    "fine-tuned BN": {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0},
    "SyncBN": {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.FPN.NORM": "SyncBN"},
    "half-frozen BN": {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 3},
    "FPN BN": {"MODEL.FPN.NORM": "BN", "MODEL.FPN.FUSE_TYPE": "avg"},
    "GN": cases.GN,
    "giou": {"MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou"},
    "diou, ciou": {"MODEL.RPN.BBOX_REG_LOSS_TYPE": "diou", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "ciou"},
    "smooth and weighted": {
        "MODEL.RPN.SMOOTH_L1_BETA": 0.1,
        "MODEL.RPN.LOSS_WEIGHT": 0.7,
        "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 1.3,
        "MODEL.RPN.BBOX_REG_WEIGHTS": (2.0, 2.0, 1.5, 1.5),
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.5,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 2.0,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (8.0, 8.0, 4.0, 4.0),
    },
    "class-agnostic": {
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
    },
    "sigmoid": {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True},
    "predicted boxes": {"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True},
    "ROIAlign": {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign", "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2},
    "ROIPool": {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool", "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIPool"},
    "RPN": {
        "MODEL.RPN.CONV_DIMS": [8, -1],
        "MODEL.RPN.BOUNDARY_THRESH": 4,
        "MODEL.RPN.NMS_THRESH": 0.5,
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0]],
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 5,
    },
    "sampling": {
        "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.05, 0.15],
        "MODEL.ROI_HEADS.IOU_LABELS": [0, -1, 1],
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.5,
        "MODEL.RPN.POSITIVE_FRACTION": 0.2,
    },
    "all detections": {"TEST.DETECTIONS_PER_IMAGE": -1, "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.3},
}
# Largest difference of a gradient over that tensor's largest value: torchvision's DIoU and CIoU, which Detectron2's
# were taken into, add their terms in another order.
GRADIENT_TOLERANCE = {"diou, ciou": 1e-6}
ALL = {**MAIN, **{name: (cases.FPN, option) for name, option in OPTIONS.items()}}


@pytest.fixture(params=ALL)
def pair(one_thread: None, request: pytest.FixtureRequest) -> tuple[Any, Any, float]:
    """Detectron2's model and ours with the same weights, and how far a gradient may differ."""
    return *twins(*ALL[request.param]), GRADIENT_TOLERANCE.get(request.param, 0.0)


def twins(*settings: dict[str, Any]) -> tuple[Any, Any]:
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as detectron2_model

    theirs = cases.formula_weights(detectron2_model(cases.configure(detectron2_cfg(), *settings)))
    ours = build_model(cases.configure(get_cfg(), *settings))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def test_training_and_inference_are_identical(pair: tuple[Any, Any, float]) -> None:
    theirs, ours, tolerance = pair
    check_names(theirs, ours)
    check_training(theirs, ours, tolerance)
    check_inference(theirs, ours)


@pytest.mark.parametrize(
    "name", ["frozen", "fine-tuned BN", "GN", "giou", "mask_rcnn_R_50_DC5", "cascade_rcnn_R_50_FPN", "rpn_R_50_C4"]
)
def test_mixed_precision_rounds_at_the_same_places(name: str) -> None:
    check_training(*twins(*ALL[name]), 0.0, mixed=True)


def check_names(theirs: Any, ours: Any) -> None:
    """Same tensors in the same order, the same ones trained; what we write, Detectron2 loads.

    Only the step counter of a BatchNorm that was frozen is missing here, which Detectron2 keeps and never reads.
    """
    assert shapes(ours) == shapes(theirs)
    assert [(k, p.requires_grad) for k, p in ours.named_parameters()] == [
        (k, p.requires_grad) for k, p in theirs.named_parameters()
    ]
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)


def shapes(model: Any) -> list[tuple[str, torch.Size]]:
    tensors = model.state_dict().items()
    return [(name, t.shape) for name, t in tensors if not name.endswith("num_batches_tracked")]


def check_training(theirs: Any, ours: Any, tolerance: float, mixed: bool = False) -> None:
    from detectron2.utils.events import EventStorage

    theirs.train()
    ours.train()
    torch.manual_seed(5)
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        their_losses = theirs(cases.detectron2_batch(train=True))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        our_losses = ours(cases.our_batch(train=True))
    assert {k: v.item() for k, v in our_losses.items()} == {k: v.item() for k, v in their_losses.items()}
    assert all(loss > 0 for loss in our_losses.values())
    sum(their_losses.values()).backward()
    sum(our_losses.values()).backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        other = theirs_by_name[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            assert (parameter.grad - other).abs().max() <= tolerance * other.abs().max(), name
    # Running statistics of a trained BatchNorm moved alike.
    theirs_after = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs_after[name]), name


@torch.no_grad()
def check_inference(theirs: Any, ours: Any) -> None:
    from detectron2.modeling import GeneralizedRCNN

    theirs.eval()
    ours.eval()
    batch = cases.our_batch(train=False)
    padded = GeneralizedRCNN.preprocess_image(theirs, batch)  # which ProposalNetwork has inside its forward
    tensor, sizes = ours.preprocess(batch)
    assert torch.equal(padded.tensor, tensor)
    assert padded.image_sizes == sizes
    their_features, our_features = theirs.backbone(padded.tensor), ours.backbone(tensor)
    assert list(their_features) == list(our_features)
    assert all(torch.equal(their_features[name], our_features[name]) for name in our_features)
    if theirs.proposal_generator is not None:
        check_proposals(theirs, ours, padded, their_features, our_features)
    check_detections(theirs(cases.detectron2_batch(train=False)), ours(batch))


def check_proposals(theirs: Any, ours: Any, padded: Any, their_features: Any, our_features: Any) -> None:
    their_anchors = theirs.proposal_generator.anchor_generator(
        [their_features[f] for f in theirs.proposal_generator.in_features]
    )
    our_anchors = ours.proposal_generator.anchor_generator(
        [tuple(our_features[f].shape[-2:]) for f in ours.proposal_generator.in_features]
    )
    assert all(torch.equal(a.tensor, b) for a, b in zip(their_anchors, our_anchors))
    their_proposals, _ = theirs.proposal_generator(padded, their_features)
    our_proposals, _ = ours.proposal_generator(our_features, padded.image_sizes)
    for a, b in zip(their_proposals, our_proposals):
        assert torch.equal(a.proposal_boxes.tensor, b.boxes)
        assert torch.equal(a.objectness_logits, b.scores)


def check_detections(theirs: Any, ours: Any) -> None:
    for a, b in zip(theirs, ours, strict=True):
        assert len(b) > 0
        if "proposals" in a:
            a = a["proposals"]
            assert torch.equal(a.proposal_boxes.tensor, b.boxes)
            assert torch.equal(a.objectness_logits, b.scores)
            assert b.classes is None
            assert b.masks is None
            continue
        a = a["instances"]
        assert a.image_size == b.image_size
        assert torch.equal(a.pred_boxes.tensor, b.boxes)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.classes)
        assert a.has("pred_masks") == (b.masks is not None)
        if b.masks is not None:
            assert b.masks.any()
            assert torch.equal(a.pred_masks, b.masks)


AUGMENTABLE = ("mask_rcnn_R_18_FPN", "faster_rcnn_R_50_C4", "mask_rcnn_R_50_DC5", "cascade_mask_rcnn_R_50_FPN")


@torch.no_grad()
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("pair", AUGMENTABLE, indirect=True)
def test_test_time_augmentation_is_identical(pair: tuple[Any, Any, float], flip: bool) -> None:
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import GeneralizedRCNNWithTTA

    theirs, ours, _ = pair
    settings = ({"MODEL.MASK_ON": ours.roi_heads.mask_on}, cases.AUGMENTED, {"TEST.AUG.FLIP": flip})
    theirs, ours = (
        GeneralizedRCNNWithTTA(cases.configure(detectron2_cfg(), *settings), theirs).eval(),
        AugmentedRCNN(cases.configure(get_cfg(), *settings), ours).eval(),
    )
    batch = cases.our_batch(train=False)
    batch[1]["height"], batch[1]["width"] = batch[1]["image"].shape[1:]  # the input is the original
    check_detections(theirs(batch), ours(batch))


@pytest.mark.parametrize("settings", [(cases.FPN,), (cases.FPN, cases.CASCADE, cases.X), (cases.DC5,)])
def test_deformable_stages_infer_alike(settings: tuple[dict[str, Any], ...]) -> None:
    """Inference alone: on a CPU Detectron2 cannot train them."""
    from detectron2.config import get_cfg as detectron2_cfg
    from detectron2.modeling import build_model as detectron2_model

    settings = (*settings, cases.DEFORM)
    theirs = cases.formula_weights(detectron2_model(cases.configure(detectron2_cfg(), *settings)))
    ours = build_model(cases.configure(get_cfg(), *settings))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    check_names(theirs, ours)
    check_inference(theirs, ours)


@pytest.mark.parametrize("pair", ["mask_rcnn_R_50_DC5"], indirect=True)
def test_mixed_precision_trains_alike(pair: tuple[Any, Any, float]) -> None:
    theirs, ours, tolerance = pair
    with torch.autocast("cpu", torch.bfloat16):
        check_training(theirs, ours, tolerance)


@pytest.mark.parametrize("pair", ["mask_rcnn_R_50_DC5"], indirect=True)
def test_an_image_without_objects_trains_alike(pair: tuple[Any, Any, float]) -> None:
    from detectron2.utils.events import EventStorage

    theirs, ours, _ = pair
    for emptied in ([1], [0, 1]):
        their_batch, our_batch = cases.detectron2_batch(train=True), cases.our_batch(train=True)
        none = torch.zeros(0, dtype=torch.int64)
        for index in emptied:
            their_batch[index]["instances"] = their_batch[index]["instances"][none]
            our_batch[index]["instances"] = our_batch[index]["instances"][none]
        torch.manual_seed(1)
        with EventStorage(0):
            their_losses = theirs(their_batch)
        torch.manual_seed(1)
        our_losses = ours(our_batch)
        assert {k: v.item() for k, v in our_losses.items()} == {k: v.item() for k, v in their_losses.items()}


@pytest.mark.parametrize("name", ["coco_loco_r50.yaml", "coco_loco_r50_c4.yaml"])
def test_real_images_through_both_pipelines(real_coco: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Full-size networks on the files of two COCO images, each engine with its own reader; random weights."""
    from loco_det.annotations.registry import find_dataset
    from loco_det.core.config import load_config
    from loco_det.detection.engine_d2 import Detectron2Engine
    from loco_det.detection.engine_torchvision import TorchvisionEngine

    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_coco))
    changes = {"MODEL.DEVICE": "cpu", "INPUT.MIN_SIZE_TEST": 320, "DATALOADER.NUM_WORKERS": 0}
    changes |= {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0, "TEST.DETECTIONS_PER_IMAGE": 20}
    changes |= {"MODEL.RPN.POST_NMS_TOPK_TEST": 50}
    overrides = [str(part) for pair in changes.items() for part in pair]
    cfg = load_config(get_cfg(), Path(__file__).parent.parent / "configs" / name, overrides)[0]
    found = {}
    for engine in (Detectron2Engine(), TorchvisionEngine()):
        model = cases.formula_weights(engine.build_model(cfg)).eval()
        batches = iter(engine.test_batches(cfg, find_dataset("coco_2017_val")))
        with torch.no_grad():
            found[engine.name] = [engine.predict(model, next(batches))[0] for _ in range(2)]
        del model
    for theirs, ours in zip(found["detectron2"], found["torchvision"], strict=True):
        assert len(ours) == 20
        assert theirs.image_size == ours.image_size
        for field in ("boxes", "scores", "classes", "masks"):
            assert torch.equal(getattr(theirs, field), getattr(ours, field)), field
        assert ours.masks.any()
