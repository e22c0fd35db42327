"""A data set and a network that train in a second, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image

from loco_det.detection.keys import load_cfg

# A Mask R-CNN whose ResNet-50, pyramid, heads and numbers of regions are as small as they can be, and without norms.
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.FPN.NORM": "",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.NORM": "",
    "MODEL.ROI_MASK_HEAD.NORM": "",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 30,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "INPUT.MIN_SIZE_TRAIN": (64, 72),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "DATASETS.TRAIN": ("tiny_train",),
    "DATASETS.TEST": ("tiny_val",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.STEPS": (4,),
    "SOLVER.WARMUP_ITERS": 2,
    "TEST.DETECTIONS_PER_IMAGE": 10,
    "SEED": 3,
}

# TINY's heads, sizes and batches for any backbone.
_HEADS = (
    "MODEL.FPN",
    "MODEL.ANCHOR",
    "MODEL.RPN",
    "MODEL.ROI",
    "INPUT",
    "DATALOADER",
    "SOLVER.IMS",
    "SOLVER.BASE",
    "TEST",
)
TINY_HEADS = {key: value for key, value in TINY.items() if key.startswith(_HEADS)} | {"MODEL.ROI_BOX_HEAD.CONV_DIM": 16}

# `changes` for weights of a whole ResNet-18.
RESNET_18 = {
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 64,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
}


def overrides(**changes: object) -> list[str]:
    """TINY with changes as KEY VALUE pairs; a key's dots are written as two underscores."""
    merged = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [text for key, value in merged.items() for text in (key, str(value))]


def tiny_cfg(output_dir: Path, **changes: object) -> CfgNode:
    """configs/coco_loco_r50.yaml with TINY and `changes` over it: frozen Mask R-CNN."""
    return load_cfg("configs/coco_loco_r50.yaml", overrides(OUTPUT_DIR=output_dir, **changes))[0]


def write_tiny(root: Path, images: int = 6) -> Path:
    """`tiny_train` and `tiny_val` below `root`: 80 x 64 images with bright boxes of two classes, ids 3 and 7."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = root / "tiny" / split
        folder.mkdir(parents=True)
        listed, annotations = [], []
        for i in range(1, images + 1):
            width, height = (80, 64) if i % 3 else (64, 80)
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            for k in range(2):
                x, y = (int(v) for v in rng.integers(2, 30, 2))
                w, h = (int(v) for v in rng.integers(14, 30, 2))
                pixels[y : y + h, x : x + w, k] = 220
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": i, "category_id": (3, 7)[k], "bbox": [x, y, w, h],
                     "area": w * h, "iscrowd": 0, "segmentation": [[float(v) for v in corners]]}
                )  # fmt: skip
            Image.fromarray(pixels).save(folder / f"{i}.png")
            listed.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]
        path = root / "tiny" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    return root
