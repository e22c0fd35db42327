"""Bytes that a training step keeps for its backward: end to end against GIM and LoCo, ResNet-50, PResNet-50, ViT-S/16.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json           # a minute on one core

A step is forward and backward of two views of each image at 224 px, float32. Counted is the peak of what autograd has
saved (pretrain/memory.py), each storage once, without what lives on anyway: weights and running statistics. It grows
with the number of images, so the ratios hardly depend on it; what does not grow (weights, their gradients, the
optimizer's state) and the buffers of single operations are left out. Units and decoders are the paper's: SimCLR and GIM
with an MLP of two layers, LoCo with a halving residual block before it. Two countings: everything, and the backbone
alone, without the images (the input of the first convolution) and without what decoders and losses keep.

JSON: {backbone: {method: {"bytes", "saving", "backbone_bytes", "backbone_saving", "paper"}}, "setting": {...}}; a
saving is end to end : method, as in the paper, which has no vision transformer (null).
"""

from __future__ import annotations

import torch
from _common import parser, report
from torch import Tensor

from loco_det.paper.figures import SAVINGS
from pretrain.memory import savings
from pretrain.train import LAYOUT

PAPER = {**SAVINGS, "timm:vit_small_patch16_224": {"simclr": None, "gim": None, "loco": None}}


def measure(backbone: str, x: Tensor) -> dict[str, dict[str, float | None]]:
    """The figures of every method on `backbone`, and the paper's saving."""
    return {method: {**found, "paper": PAPER[backbone][method]} for method, found in savings(backbone, x).items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=4, help="images, two views each")
    options.add_argument("--size", type=int, default=224, help="pixels")
    args = options.parse_args()
    x = torch.randn(2 * args.images, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    found = {backbone: measure(backbone, x.to(memory_format=LAYOUT)) for backbone in PAPER}
    rows = [
        [backbone, method, f["bytes"] / 1e6, f["saving"], f["backbone_bytes"] / 1e6, f["backbone_saving"], f["paper"]]
        for backbone, methods in found.items()
        for method, f in methods.items()
    ]
    header = ["backbone", "method", "MB", "saving", "MB of backbone", "saving", "paper's saving"]
    setting = {"device": "cpu", "torch": torch.__version__, "images": args.images, "size": args.size}
    report(header, rows, {**found, "setting": setting}, args.json)


if __name__ == "__main__":
    main()
