"""Time and memory of Mask R-CNN on a frozen ViT-S/16, against Detectron2's ViTDet with its backbone frozen.

    OMP_NUM_THREADS=1 python benchmarks/vit_detection.py --json vit_detection.json      # about four minutes

Both have ViTDet's simple feature pyramid and heads (configs/base_rcnn_vit.yaml), the same weights, images, anchors,
proposals and samples, and attention over the whole image. Detectron2's ViT has no cls token. Sides take turns as in
detection_step.py, which this uses: a training step is forward, backward and SGD on two images, an inference step two
images one after the other; `peak` is how far the process's memory rose. Seconds are of the processor, which other
programs on the machine hardly change: run it with one thread, since those that wait for each other count too.

JSON: the ratios train, infer (time) and their peaks of this package over Detectron2, null where it is not installed.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import detection_step
import torch
from _common import parser, report
from detection_step import DETECTIONS, IMAGES, configuration, engine_step, sample_images, take_turns, usual_step
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


detection_step.MAKE["detectron2"] = vitdet_side


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--turns", type=int, default=2, help="steps of each side that count")
    options.add_argument("--size", type=int, default=320, help="short side in pixels")
    args = options.parse_args()
    vit = {"MODEL__MASK_ON": True, "MODEL__BACKBONE__NAME": f"timm:{NAME}", "MODEL__FPN__IN_FEATURES": ["blocks.11"]}
    cfg = configuration("base_rcnn_vit.yaml", args.device, args.size, **vit)
    samples, source = sample_images(cfg, args.size)
    sides = [f"ours:{job}" for job in ("frozen", "infer")]
    if engine_d2.installed() and source != "made up":
        sides += [f"detectron2:{job}" for job in ("frozen", "infer")]
    else:
        print("Detectron2 or COCO's images are not here; its sides are left out")
    with tempfile.TemporaryDirectory() as folder:
        path = make_weights(cfg, samples, Path(folder))
        kinds = {"frozen": cfg, "finetune": cfg}
        clock = "processor" if args.device == "cpu" else "wall"
        turns, peaks = take_turns(sides, kinds, dict.fromkeys(kinds, path), samples, args.turns, clock)

    def over(job: str) -> float | None:
        names = f"ours:{job}", f"detectron2:{job}"
        return statistics.median(turn[names[0]] / turn[names[1]] for turn in turns) if names[1] in sides else None

    seconds = {name: statistics.median(turn[name] for turn in turns) for name in sides}
    ratios = {"train": over("frozen"), "infer": over("infer")}
    memory = {
        job: peaks[f"ours:{job}"] / peaks[f"detectron2:{job}"] if f"detectron2:{job}" in peaks else None
        for job in ("frozen", "infer")
    }
    figures = {
        "train_over_detectron2": ratios["train"],
        "infer_over_detectron2": ratios["infer"],
        "train_peak_over_detectron2": memory["frozen"],
        "infer_peak_over_detectron2": memory["infer"],
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
    rows = [[name, seconds[name] * 1e3, IMAGES / seconds[name], peaks[name] / 1e6] for name in sides]
    report(["side", "ms", "images/s", "peak MB"], rows, {}, None)
    rows = [[key, value if value is not None else "-"] for key, value in figures.items() if "_over_" in key]
    report(["ratio", ""], rows, figures, args.json)


if __name__ == "__main__":
    main()
