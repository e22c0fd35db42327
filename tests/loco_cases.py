"""Small nets under lists of units, the slow step that every other one must equal, and patches to pretrain on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from loco_det.backbones.resnet import ResNet
from pretrain.decoders import Decoder, residual_blocks
from pretrain.loco import METHODS, method_units, split_backbone
from pretrain.loss import nt_xent

STAGES = ["res2", "res3", "res4", "res5"]
UNIT_LISTS = {
    **{method: method_units(method, STAGES) for method in METHODS},
    "nested": [["res2", "res5"], ["res3", "res4"]],
    "wide overlaps": [["res2", "res4"], ["res3", "res5"]],
    "same start": [["res2", "res3"], ["res2", "res5"], ["res3", "res5"]],
    "twice the same unit": [["res2", "res5"], ["res2", "res5"]],
    "inside a stage": [["stem", "res2.0"], ["res2.1", "res3.0"], ["res3.0-1", "res4.0"], ["res3.1", "res5.1"]],
    "one block each": [["stem", "stem"]] + [[f"res{s}.{b}"] * 2 for s in (2, 3, 4, 5) for b in (0, 1)],
}


def build(units: list[list[str]], recompute: str | list[str] | None = None, depth: int = 18, **backbone_options: int):
    """A narrow ResNet in float64, its stages and units, and a decoder and loss for each; always the same weights."""
    torch.manual_seed(0)
    backbone = ResNet(depth, stem="cifar", **{"res2_out_channels": 16, **backbone_options}).double()
    stages, spans = split_backbone(backbone, units, recompute)
    decoders = nn.ModuleList(
        Decoder(channels, residual_blocks(channels, 1, {0}), mlp_layers=2, hidden_dim=16, out_dim=8)
        for channels in (backbone.channels[stages[u.last].ends_in] for u in spans)
    ).double()
    losses = [lambda h, d=d: nt_xent(d(h), 0.2) for d in decoders]
    return backbone, stages, spans, decoders, losses


def gradients(*modules: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]


def obvious_step(stages, units, losses, x, autocast=nullcontext, scale=lambda loss: loss) -> list[float]:
    """Every unit by itself: forward from the stop-gradient, one backward through the whole unit."""
    values = []
    for unit, loss in zip(units, losses):
        with autocast():
            h = x
            with torch.no_grad():
                for stage in stages[: unit.first]:
                    h = stage.module(h)
            for stage in stages[unit.first : unit.last + 1]:
                h = stage.module(h)
            value = loss(h)
        scale(value).backward()
        values.append(value.item())
    return values


def write_patches(root: Path) -> Path:
    """train/ and val/ below `root` with two classes of noisy patches."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in (("blue", (220, 30, 30)), ("red", (30, 30, 220))):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(root / split / name / f"{i}.png"), pixels)
    return root
