"""Every family of backbones, by a small random member: conversion with its proof, features, detection, local learning.

`python tests/test_backbone_families.py` writes the table of docs/tutorials/vit.md from what this finds.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_detection import overrides
from torch import nn

from loco_det.annotations.instances import Instances
from loco_det.api import load_backbone
from loco_det.backbones.artifact import load_backbone as load_artifact
from loco_det.backbones.timm_blocks import TimmBlocks
from loco_det.backbones.timm_models import parse
from loco_det.convert.timm_models import convert_timm
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.fpn import FPN
from loco_det.detection.keys import get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.weights import load_weights

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "vit.md"
BEGIN, END = "<!-- families: python tests/test_backbone_families.py -->\n", "<!-- /families -->\n"
SMALL = "depth=4&embed_dim=48&num_heads=3"


@dataclass(frozen=True)
class Family:
    """One row: its title, the layouts of files that are recognised, and a small member."""

    title: str
    layouts: str
    member: str


FAMILIES = (
    Family("ViT, DeiT", "timm's; DeiT's, MoCo v3's", f"vit_tiny_patch16_224?{SMALL}&img_size=64"),
    Family("DeiT III", "timm's", f"deit3_small_patch16_224?{SMALL}&img_size=64"),
    Family("MAE", "timm's; MAE's", f"vit_base_patch16_224.mae?{SMALL}&img_size=64"),
    Family("DINO, iBOT", "timm's; teacher and student", f"vit_small_patch16_224.dino?{SMALL}&img_size=64"),
    Family("DINOv2", "timm's; DINOv2's", f"vit_small_patch14_dinov2?{SMALL}&img_size=56"),
    Family("DINOv2 with registers", "timm's; DINOv2's", f"vit_small_patch14_reg4_dinov2?{SMALL}&img_size=56"),
    Family("DINOv3", "timm's; Meta's", f"vit_small_patch16_dinov3?{SMALL}&img_size=64"),
    Family("EVA-02", "timm's", f"eva02_tiny_patch14_224?{SMALL}&img_size=56"),
    Family("CLIP", "timm's; OpenAI's, open_clip's", f"vit_base_patch16_clip_224?{SMALL}&img_size=64"),
    Family("SigLIP", "timm's; open_clip's, big_vision's", f"vit_base_patch16_siglip_224?{SMALL}&img_size=64"),
    Family("Perception Encoder", "timm's", f"vit_pe_core_tiny_patch16_384?{SMALL}&img_size=64"),
    Family("ConvNeXt", "timm's; ConvNeXt's", "convnext_atto?depths=(1,1,1,1)&dims=(8,16,24,32)"),
    Family(
        "ConvNeXt v2, FCMAE", "timm's; ConvNeXt V2's, sparse too", "convnextv2_atto?depths=(1,1,1,1)&dims=(8,16,24,32)"
    ),
    Family("Swin", "timm's; Swin's", "swin_tiny_patch4_window7_224?depths=(1,1,1,1)&embed_dim=24&num_heads=(1,2,4,8)"),
    Family("Swin v2", "timm's; Swin's", "swinv2_tiny_window8_256?depths=(1,1,1,1)&embed_dim=24&num_heads=(1,2,4,8)"),
    Family("RegNet", "timm's", "regnety_002"),
    Family("EfficientNet", "timm's", "test_efficientnet"),
    Family("PVT v2", "timm's", "pvt_v2_b0"),
)


@dataclass
class Found:
    """What a family can do."""

    pyramid: str
    proof: str
    local: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def look(family: Family, folder: Path) -> Found:
    """Convert, compute features, build a detector, take a step frozen and tuned: what the row claims."""
    torch.manual_seed(0)
    name, options = parse(family.member)
    state = timm.create_model(name, **options).state_dict()
    torch.save(state, folder / "in.pth")
    weights = folder / "out.safetensors"
    convert_timm(str(folder / "in.pth"), weights, f"timm:{family.member}")
    tensors, manifest = load_artifact(weights)
    assert all(torch.equal(tensor, state[key]) for key, tensor in tensors.items())
    assert manifest.proof["relative"] < 1e-9

    backbone = load_backbone(weights)
    maps = backbone.features(torch.randint(0, 256, (1, 3, *2 * (backbone.image_size,)), dtype=torch.uint8))
    assert {stage: map_.shape[1] for stage, map_ in maps.items()} == backbone.channels
    assert all(map_.isfinite().all() for map_ in maps.values())

    for frozen in (True, False):
        model = detector(family, weights, frozen)
        losses = model.train()([sample()])
        sum(losses.values()).backward()
        trunk = model.backbone.net if hasattr(model.backbone, "net") else model.backbone.bottom_up
        has = {name: parameter.grad is not None for name, parameter in trunk.model.named_parameters()}
        assert not any(has.values()) if frozen else sum(has.values()) > 0.8 * len(has)
        assert all(loss.isfinite() for loss in losses.values())
    pyramid = "FPN" if isinstance(model.backbone, FPN) else "simple"
    proof = "independent" if manifest.proof["model"].startswith("an independent") else "timm's"
    return Found(pyramid, proof, local(family))


def detector(family: Family, weights: Path, frozen: bool) -> nn.Module:
    """A Faster R-CNN on the converted weights."""
    manifest = load_artifact(weights)[1]
    base = "base_rcnn_vit.yaml" if any("blocks" in stage for stage in manifest.stages) else "base_rcnn_fpn.yaml"
    changes = {
        "MODEL__WEIGHTS": weights,
        "MODEL__BACKBONE__NAME": manifest.architecture,
        "MODEL__BACKBONE__FREEZE_AT": 5 if frozen else 0,
        "MODEL__PIXEL_MEAN": list(manifest.pixel_mean),
        "MODEL__PIXEL_STD": list(manifest.pixel_std),
        "MODEL__ROI_BOX_HEAD__CONV_DIM": 16,
    }
    cfg = load_config(get_cfg(), base, overrides(**changes))[0]
    model = build_model(cfg)
    load_weights(model, cfg)
    return model


def sample() -> dict[str, Any]:
    """One image with one object."""
    boxes, classes = torch.tensor([[8.0, 8, 40, 44]]), torch.tensor([1])
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": image, "height": 64, "width": 96, "instances": Instances((64, 96), boxes=boxes, classes=classes)}


def local(family: Family) -> str:
    """What units of local learning are, or that the family is refused."""
    name, options = parse(family.member)
    options = {**options, "drop_path_rate": 0.0}
    try:
        blocks = TimmBlocks(name, image_size=options.pop("img_size", 64), **options)
    except UserError:
        return "-"
    return "blocks" if blocks.is_plain else "stages"


def table(found: dict[Family, Found]) -> str:
    rows = [
        "| family | files recognised | proof | pyramid | detection | probes | local learning |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, one in found.items():
        cells = (family.title, family.layouts, one.proof, one.pyramid, "frozen, tuned", "yes", one.local)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: re.sub(r"\W+", "-", family.title))
def test_a_family_does_what_its_row_says(family: Family, folder: Path) -> None:
    row = table({family: look(family, folder)}).splitlines()[-1]
    assert row in PAGE.read_text().splitlines(), "run: python tests/test_backbone_families.py"


def test_the_table_has_these_rows() -> None:
    page = PAGE.read_text()
    rows = page[page.index(BEGIN) + len(BEGIN) : page.index(END)].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [family.title for family in FAMILIES]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        written = table({family: look(family, Path(place)) for family in FAMILIES})
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + written + text[text.index(END) :])
