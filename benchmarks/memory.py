"""Bytes that a training step keeps for its backward: end to end against GIM and LoCo, ResNet-50, PResNet-50, ViT-S/16.

    python benchmarks/memory.py --json benchmarks/results/memory_cpu.json           # a minute on one core

A step is forward and backward of two views of each image at 224 px, float32. Counted is the peak of what autograd has
saved (saved_bytes.py), each storage once, without what lives on anyway: weights and running statistics. It grows
with the number of images, so the ratios hardly depend on it; what does not grow (weights, their gradients, the
optimizer's state) and the buffers of single operations are left out. Units and decoders are the paper's: SimCLR and GIM
with an MLP of two layers, LoCo with a halving residual block before it. Two countings: everything, and the backbone
alone, without the images (the input of the first convolution) and without what decoders and losses keep.

JSON: {backbone: {method: {"bytes", "saving", "backbone_bytes", "backbone_saving", "paper"}}, "setting": {...}}; a
saving is end to end : method, as in the paper, which has no vision transformer (null).
"""

from __future__ import annotations

from functools import partial

import torch
from _common import parser, report
from saved_bytes import SavedBytes
from torch import Tensor

from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer
from pretrain.train import LAYOUT, Learner

PAPER = {
    "resnet50": {"simclr": 1.0, "gim": 1.81, "loco": 1.28},
    "presnet50": {"simclr": 1.0, "gim": 4.56, "loco": 2.76},
    "timm:vit_small_patch16_224": {"simclr": None, "gim": None, "loco": None},
}


def learner_of(backbone: str, method: str, size: int = 224, **keys: object) -> Learner:
    """`method` with the paper's decoder on `backbone`, for images of `size`; `keys` are further ones of BACKBONE."""
    cfg = get_cfg()
    cfg.METHOD, cfg.BACKBONE.NAME, cfg.DECODER.CONV_BLOCKS = method, backbone, int(method == "loco")
    cfg.DATA.IMAGE_SIZE = size
    cfg.BACKBONE.update(keys)
    torch.manual_seed(0)
    return Learner(cfg)


def kept(learner: Learner, x: Tensor) -> tuple[int, int]:
    """The peak of the bytes saved in a step on `x` (2B, 3, S, S): all of them, and those of the backbone alone."""
    weights = [*learner.parameters(), *learner.buffers()]

    def apart(i: int, features: Tensor) -> Tensor:
        with SavedBytes():  # an account of its own: the one outside does not see what is saved in here
            return learner.loss(i, features)

    peaks = []
    for loss, ignored in ((learner.loss, weights), (apart, [*weights, x])):
        losses = [partial(loss, i) for i in range(len(learner.units))]
        trainer = LocalTrainer([stage.module for stage in learner.stages], learner.units, losses)
        with SavedBytes(ignored) as saved:
            trainer.step(x)
        learner.zero_grad(set_to_none=True)
        peaks.append(saved.peak)
    return peaks[0], peaks[1]


def measure(backbone: str, x: Tensor) -> dict[str, dict[str, float | None]]:
    """The figures of every method on `backbone`."""
    peaks = {method: kept(learner_of(backbone, method, x.shape[-1]), x) for method in PAPER[backbone]}
    return {
        method: {
            "bytes": peak[0],
            "saving": peaks["simclr"][0] / peak[0],
            "backbone_bytes": peak[1],
            "backbone_saving": peaks["simclr"][1] / peak[1],
            "paper": PAPER[backbone][method],
        }
        for method, peak in peaks.items()
    }


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
