"""Time and memory of Mask R-CNN on a frozen ViT-S/16, against Detectron2's ViTDet and torchvision's classes.

    OMP_NUM_THREADS=1 python benchmarks/vit_detection.py --json vit_detection.json      # about four minutes

The others' backbones are frozen likewise: Detectron2's own ViTDet, and timm's ViT under torchvision's MaskRCNN, as a
user would put them together (`Pyramid` and `torchvision_side` below; torchvision itself has no pyramid of a plain ViT).
All have ViTDet's simple feature pyramid and heads (configs/base_rcnn_vit.yaml), the same weights, images, anchors,
numbers of proposals and samples, and attention over the whole image. Detectron2's ViT has no cls token; torchvision
samples regions at 2 x 2 points where the others choose the number by their size. Sides take turns as in
detection_step.py, which this uses: a training step is forward, backward and SGD on two images, an inference step two
images one after the other; `peak` is how far the process's memory rose. Seconds are of the processor, which other
programs on the machine hardly change: run it with one thread, since those that wait for each other count too.

The side `freed` is a training step of this package that gives freed memory back to the system.

JSON: the ratios train, infer (time) and their peaks of this package over Detectron2, null where it is not installed,
and over torchvision.
"""

from __future__ import annotations

import copy
import functools
import re
import statistics
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import detection_step
import torch
from _common import parser, report
from detection_step import (
    DETECTIONS,
    IMAGES,
    configuration,
    engine_step,
    predictors,
    sample_images,
    take_turns,
    torchvision_settings,
    torchvision_step,
    usual_step,
)
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.backbones.timm_models import TimmBackbone
from loco_det.detection import engine_d2
from loco_det.detection.engine_d2 import Detectron2Engine
from loco_det.detection.engine_torchvision import TorchvisionEngine

NAME = "vit_small_patch16_224"
THEIRS = "benchmark_vitdet"


def make_weights(cfg: CfgNode, samples: list[dict[str, Any]], folder: Path) -> Path:
    """A state_dict, random, whose class scores are scaled until every image has its detections."""
    torch.manual_seed(0)
    model = TorchvisionEngine().build_model(cfg).eval()
    predictor = model.roi_heads.box_predictor.cls_score
    with torch.no_grad():
        while min(len(found) for found in model(samples)) < DETECTIONS:
            predictor.weight *= 2
        predictor.weight *= 1.7
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def vitdet_side(job: str, cfg: CfgNode, state: dict[str, torch.Tensor], samples: list[dict[str, Any]]) -> Any:
    """Detectron2's own ViT and pyramid under its own heads."""
    import timm.layers
    from detectron2.modeling import BACKBONE_REGISTRY
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT
    from detectron2.structures import Boxes, Instances, PolygonMasks

    if "timm.models.layers" not in sys.modules:  # the name that Detectron2's file imports from
        layers = types.ModuleType("timm.models.layers")
        layers.DropPath, layers.Mlp = timm.layers.DropPath, timm.layers.Mlp
        sys.modules["timm.models.layers"] = layers

    def build(native: Any, _: Any) -> nn.Module:
        width, heads = TimmBackbone(NAME).channels["blocks.9-11"], 6
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        vit = ViT(img_size=224, embed_dim=width, depth=12, num_heads=heads, norm_layer=norm)
        return SimpleFeaturePyramid(vit, "last_feat", 256, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm="LN")

    BACKBONE_REGISTRY._do_register(THEIRS, build)
    cfg = copy.deepcopy(cfg)
    cfg.defrost()
    cfg.MODEL.BACKBONE.NAME = THEIRS
    cfg.freeze()
    model = Detectron2Engine().build_model(cfg)
    renamed = {name.replace(".net.model.", ".net."): tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert set(unexpected) == {"backbone.net.cls_token"}, unexpected
    assert all("pixel_" in name or "anchor" in name for name in missing), missing
    model.backbone.net.requires_grad_(False)
    converted = []
    for sample in samples:
        ours = sample["instances"]
        theirs = Instances(ours.image_size, gt_boxes=Boxes(ours.boxes), gt_classes=ours.classes)
        theirs.gt_masks = PolygonMasks(ours.masks.polygons)
        converted.append({**sample, "instances": theirs})
    return engine_step(Detectron2Engine(), job, cfg, model, converted, usual_step)


class Pyramid(nn.Module):
    """timm's ViT under ViTDet's pyramid, as a backbone for torchvision: maps "0" (stride 4) to "3" (32), and "pool"."""

    def __init__(self, out_channels: int = 256) -> None:
        import timm
        from torchvision.models.convnext import LayerNorm2d
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        self.out_channels = out_channels
        self.vit = timm.create_model(NAME, num_classes=0, dynamic_img_size=True)
        self.vit.norm = nn.Identity()  # the pyramid reads the last block's map as it is
        width = self.vit.embed_dim
        norm = functools.partial(LayerNorm2d, eps=1e-6)
        conv = functools.partial(Conv2dNormActivation, norm_layer=norm, activation_layer=None)

        def halved(channels: int) -> nn.Module:
            return nn.ConvTranspose2d(channels, channels // 2, 2, 2)

        starts = [
            [halved(width), norm(width // 2), nn.GELU(), halved(width // 2)],
            [halved(width)],
            [],
            [nn.MaxPool2d(2, 2)],
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(*start, conv(channels, out_channels, kernel_size=1), conv(out_channels, out_channels))
            for start, channels in zip(starts, (width // 4, width // 2, width, width))
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        (last,) = self.vit.forward_intermediates(images, indices=1, norm=False, intermediates_only=True)
        maps = {str(number): level(last) for number, level in enumerate(self.levels)}
        return {**maps, "pool": nn.functional.max_pool2d(maps["3"], 1, stride=2)}


def torchvision_side(job: str, cfg: CfgNode, state: dict[str, torch.Tensor], samples: list[dict[str, Any]]) -> Any:
    """torchvision's MaskRCNN with its own anchors, poolers and heads of the form that ViTDet has."""
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign

    backbone = Pyramid()
    channels, maps = backbone.out_channels, ["0", "1", "2", "3"]
    norm = functools.partial(LayerNorm2d, eps=1e-6)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    model = MaskRCNN(
        backbone,
        **torchvision_settings(cfg),
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        box_roi_pool=MultiScaleRoIAlign(maps, 7, 2),
        box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm_layer=norm),
        mask_roi_pool=MultiScaleRoIAlign(maps, 14, 2),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
    ).to(cfg.MODEL.DEVICE)
    model.load_state_dict(torchvision_names(state, cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    backbone.vit.requires_grad_(False)
    return torchvision_step(job, cfg, model, samples)


def torchvision_names(state: dict[str, torch.Tensor], classes: int) -> dict[str, torch.Tensor]:
    """A state_dict under the names of `torchvision_side`'s model."""
    renamed = (
        (r"backbone\.net\.model", "backbone.vit"),
        (r"backbone\.simfp_(\d)", lambda found: f"backbone.levels.{int(found[1]) - 2}"),
        (r"proposal_generator\.rpn_head\.conv\.conv(\d)", r"rpn.head.conv.\1"),
        (r"proposal_generator\.rpn_head\.objectness_logits", "rpn.head.cls_logits"),
        (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn.head.bbox_pred"),
        (r"roi_heads\.box_head\.fc1", "roi_heads.box_head.5"),
        (r"(roi_heads\.(?:box|mask)_head)\.(?:conv|mask_fcn)(\d)", lambda found: f"{found[1]}.{int(found[2]) - 1}"),
        (r"roi_heads\.mask_head\.deconv", "roi_heads.mask_predictor.conv5_mask"),
    )
    result = predictors(state, classes)
    for name, tensor in state.items():
        if ".box_predictor." in name or ".mask_head.predictor." in name:
            continue
        module, leaf = name.rsplit(".", 1)
        is_norm = module.endswith(".norm")
        module = module.removesuffix(".norm")
        # torchvision's convolutions with a norm or an activation are sequences of those.
        is_conv = f"{module}.norm.weight" in state or ".rpn_head.conv." in module
        for pattern, to in renamed:
            module = re.sub(f"^{pattern}", to, module)
        result[f"{module}.{int(is_norm)}.{leaf}" if is_conv else f"{module}.{leaf}"] = tensor
    return result


detection_step.MAKE |= {
    "detectron2": vitdet_side,
    "torchvision": torchvision_side,
    "freed": functools.partial(detection_step.our_side, keep=False),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--turns", type=int, default=2, help="steps of each side that count")
    options.add_argument("--size", type=int, default=320, help="short side in pixels")
    args = options.parse_args()
    vit = {"MODEL__MASK_ON": True, "MODEL__BACKBONE__NAME": f"timm:{NAME}", "MODEL__FPN__IN_FEATURES": ["blocks.11"]}
    cfg = configuration("base_rcnn_vit.yaml", args.device, args.size, **vit)
    samples, source = sample_images(cfg, args.size)
    jobs = {"train": "frozen", "infer": "infer"}
    sides = [f"ours:{job}" for job in jobs.values()]
    if engine_d2.installed() and source != "made up":
        sides += [f"detectron2:{job}" for job in jobs.values()]
    else:
        print("Detectron2 or COCO's images are not here; its sides are left out")
    sides += ["freed:frozen", *(f"torchvision:{job}" for job in jobs.values())]
    with tempfile.TemporaryDirectory() as folder:
        path = make_weights(cfg, samples, Path(folder))
        kinds = {"frozen": cfg, "finetune": cfg}
        clock = "processor" if args.device == "cpu" else "wall"
        turns, peaks = take_turns(sides, kinds, dict.fromkeys(kinds, path), samples, args.turns, clock)

    def over(name: str) -> tuple[float, float]:
        """Time and peak memory of this package over another side's."""
        ours = f"ours:{name.partition(':')[2]}"
        return statistics.median(turn[ours] / turn[name] for turn in turns), peaks[ours] / peaks[name]

    seconds = {name: statistics.median(turn[name] for turn in turns) for name in sides}
    ratios = {name: over(name) for name in sides}
    figures: dict[str, Any] = {
        f"{title}{what}_over_{library}": ratios[f"{library}:{job}"][i] if f"{library}:{job}" in ratios else None
        for library in ("detectron2", "torchvision")
        for i, what in enumerate(("", "_peak"))
        for title, job in jobs.items()
    }
    figures |= {
        "seconds": seconds,
        "seconds_of_turns": turns,
        "peak_bytes": peaks,
        "setting": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "images": source,
            "sizes": [list(sample["image"].shape[1:]) for sample in samples],
            "turns": args.turns,
        },
    }
    rows = [[name, seconds[name] * 1e3, IMAGES / seconds[name], peaks[name] / 1e6, *ratios[name]] for name in sides]
    report(["side", "ms", "images/s", "peak MB", "time of ours", "peak of ours"], rows, figures, args.json)


if __name__ == "__main__":
    main()
