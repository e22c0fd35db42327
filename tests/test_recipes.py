"""Other papers' recipes: the settings that their sources state, MoCo's extra norm, and LoCo's detector."""

from __future__ import annotations

from pathlib import Path

import detection_cases as cases
import pytest
import torch
from torch import nn

from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.core.config import flat
from loco_det.detection.keys import get_cfg, load_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.weights import load_weights
from loco_det.paper.figures import FEW, FROZEN

ROOT = Path(__file__).resolve().parent.parent / "configs"
# What facebookresearch/moco, detection/configs, says, written by hand.
MOCO = {
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "TEST.PRECISE_BN.ENABLED": True,
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TEST": 800,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
}
VOC = {
    **MOCO,
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "DATASETS.TRAIN": ("voc_2007_trainval", "voc_2012_trainval"),
    "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
    "SOLVER.STEPS": (18000, 22000),
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.WARMUP_ITERS": 100,
}
COCO = {**MOCO, "MODEL.MASK_ON": True, "SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000}
BOB = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.BACKBONE.FREEZE_AT": 5,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": 10.0,
    "SOLVER.OPTIMIZER": "AdamW",
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "SOLVER.AMP.ENABLED": True,
    "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
}
# LoCo's experiments and appendix.
LOCO = {
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
    "MODEL.MASK_ON": True,
}
FROZEN_LOCO = {**LOCO, "MODEL.BACKBONE.FREEZE_AT": 5, "MODEL.RESNETS.NORM": "FrozenBN"}
TUNED_LOCO = {
    **LOCO,
    "MODEL.RESNETS.NORM": "SyncBN",
    "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800),
    "SOLVER.IMS_PER_BATCH": 16,
}
STATED = {
    "recipes/moco_coco_r50_c4_2x": COCO,
    "recipes/moco_voc_r50_c4_24k": VOC,
    "recipes/densecl_voc_r50_c4_24k": VOC,
    "recipes/bob_coco_r50_frozen": BOB,
    **{f"paper/{data}_{method}_{network}": FROZEN_LOCO for data, method, network in FROZEN},
    **{
        f"paper/coco_{size}_{method}_r50": {
            **TUNED_LOCO,
            "MODEL.BACKBONE.FREEZE_AT": 0 if method == "random" else 2,
            "SOLVER.MAX_ITER": {"10k": 60000, "1k": 15000}[size],
            "DATASETS.TRAIN": (f"coco_2017_train@{ {'10k': 10000, '1k': 1000}[size] }images_seed0",),
        }
        for size, method in FEW
    },
}


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_has_its_sources_settings(name: str) -> None:
    found = flat(load_cfg(ROOT / f"{name}.yaml")[0])
    assert {key: found[key] for key in STATED[name]} == STATED[name]


def test_the_headers_say_the_papers_figures() -> None:
    for (data, method, network), figures in FROZEN.items():
        text = (ROOT / "paper" / f"{data}_{method}_{network}.yaml").read_text()
        assert all(f"{box:.1f} / {mask:.1f}" in text for box, mask in figures.values())
        assert "ours: not run" in text
    for (size, method), figures in FEW.items():
        text = (ROOT / "paper" / f"coco_{size}_{method}_r50.yaml").read_text()
        assert all(f"{box:.1f} / {mask:.1f}" in text for box, mask in figures.values())


@pytest.mark.parametrize("data", ["coco", "cityscapes"])
@pytest.mark.parametrize("method", ["loco", "gim", "simclr", "supervised"])
def test_the_plain_names_are_the_papers_protocol(data: str, method: str) -> None:
    plain, paper = (flat(load_cfg(ROOT / folder / f"{data}_{method}_r50.yaml")[0]) for folder in ("", "paper"))
    assert {key for key in plain if plain[key] != paper[key]} == {"OUTPUT_DIR"}


# --- MoCo's head ------------------------------------------------------------------------------------------------

EXTRA = {"MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm", "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}


def test_the_extra_norm_comes_after_res5() -> None:
    plain = cases.configure(get_cfg(), cases.C4, {**EXTRA, "MODEL.ROI_HEADS.NAME": "Res5ROIHeads"})
    head, without = (build_model(cfg).roi_heads for cfg in (cases.configure(get_cfg(), cases.C4, EXTRA), plain))
    head.load_state_dict(without.state_dict(), strict=False)
    x = torch.randn(2, head.res5[0].conv1.in_channels, 6, 6)
    norm = nn.BatchNorm2d(head.res5.norm.num_features)
    with torch.no_grad():
        torch.testing.assert_close(head.res5(x), norm(without.res5(x)))


def test_a_backbone_leaves_the_extra_norm_as_it_is(tmp_path: Path) -> None:
    cfg = cases.configure(get_cfg(), cases.C4, cases.FULL_WIDTH, EXTRA)
    network, path = ResNet(50), tmp_path / "b.safetensors"
    save_backbone(path, backbone_tensors(network), describe(network, stem="imagenet", method="loco"))
    settings = {"MODEL.WEIGHTS": str(path), "INPUT.FORMAT": "RGB", "MODEL.RESNETS.STRIDE_IN_1X1": False}
    settings |= {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "MODEL.PIXEL_STD": [58.395, 57.12, 57.375]}
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    model = build_model(cfg)
    load_weights(model, cfg)
    assert torch.equal(model.roi_heads.res5[2].conv3.weight, network.res5[2].conv3.weight)
    assert torch.equal(model.roi_heads.res5.norm.weight, torch.ones(2048))


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_both_engines_have_mocos_head() -> None:
    pytest.importorskip("detectron2")
    cfg = cases.configure(get_cfg(), cases.C4, EXTRA)
    cases.both_losses(cfg)
