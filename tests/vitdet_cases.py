"""A small ViTDet, the same to Detectron2 (its LazyConfig) and to this package, with weights from closed formulas."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from detection_cases import formula_weights, images
from torch import Tensor

SQUARE, CLASSES = 160, 5  # the square holds both images; its map has 10 x 10 patches

# The same network as `lazy_model`, for configs/coco_vitdet_b.yaml.
OVERRIDES = {
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "timm:test_vit?positions=size&window=4&global_blocks=2,5&rel_pos=8",
    "MODEL.BACKBONE.SQUARE_PAD": SQUARE,
    "MODEL.FPN.IN_FEATURES": ["blocks.5"],
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[12], [24], [48], [72], [96]],
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.02,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
    "INPUT.MAX_SIZE_TEST": SQUARE,
    "INPUT.SCALE_JITTER_SIZE": SQUARE,
    "TEST.DETECTIONS_PER_IMAGE": 20,
}


def overrides(**changes: Any) -> list[str]:
    """OVERRIDES with changes as KEY VALUE pairs; a key's dots are written as two underscores."""
    merged = OVERRIDES | {key.replace("__", "."): value for key, value in changes.items()}
    return [text for key, value in merged.items() for text in (key, str(value))]


def lazy_model() -> Any:
    """Detectron2's common/models/mask_rcnn_vitdet.py with a ViT of timm's test_vit's size, not yet built."""
    from detectron2 import model_zoo

    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    net = model.backbone.net
    net.img_size, net.embed_dim, net.depth, net.num_heads, net.mlp_ratio = 8 * 16, 64, 6, 2, 3
    net.pretrain_img_size, net.window_size, net.window_block_indexes, net.drop_path_rate = 160, 4, [0, 1, 3, 4], 0.0
    model.backbone.out_channels, model.backbone.square_pad = 16, SQUARE
    rpn, heads = model.proposal_generator, model.roi_heads
    rpn.head.in_channels, rpn.anchor_generator.sizes = 16, [[12], [24], [48], [72], [96]]
    rpn.pre_nms_topk, rpn.post_nms_topk = (2000, 100), (1000, 40)
    heads.num_classes = CLASSES
    heads.box_head.input_shape.channels = heads.mask_head.input_shape.channels = 16
    heads.box_head.conv_dims, heads.box_head.fc_dims, heads.mask_head.conv_dims = [16] * 4, [32], [16] * 5
    heads.box_predictor.input_shape.channels, heads.box_predictor.test_score_thresh = 32, 0.02
    heads.box_predictor.test_topk_per_image = 20
    return model


def of_vitdet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors under the names of ViTDet's checkpoints."""
    return {name.replace("backbone.net.model.", "backbone.net."): tensor for name, tensor in state.items()}


def fill(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gives tensors under ViTDet's names their values, by these names."""
    named = {re.sub(r"\.norm(\d)\.", r".norm\1.norm.", name): tensor for name, tensor in state.items()}
    formula_weights(SimpleNamespace(state_dict=lambda: named))
    state["backbone.net.pos_embed"].mul_(50)  # of the size of the patches
    return state


def batch() -> list[dict[str, Any]]:
    """Two images of the sizes of the golden outputs, originals of twice their size."""
    return [{"image": one, "height": 2 * one.shape[1], "width": 2 * one.shape[2]} for one in images()]


def padded_maps(backbone: torch.nn.Module) -> dict[str, Tensor]:
    """The pyramid of an image, padded to the square."""
    image = images()[0].float() / 60 - 2
    whole = torch.zeros(1, 3, SQUARE, SQUARE)
    whole[0, :, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        return backbone(whole)
