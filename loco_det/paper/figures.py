"""The paper's figures with their places, and the configuration of each pretraining row with the choices made here.

Source: Xiong, Ren, Urtasun, "LoCo: Local Contrastive Representation Learning", NeurIPS 2020, arXiv 2008.01342. None was
reproduced with this software. Accuracies are top-1 in percent of a linear classifier on ImageNet; AP is in percent, of
boxes and of masks. `python -m loco_det.paper.figures` prints the table of docs/method.md.
"""

from __future__ import annotations

from typing import NamedTuple

MAIN = "table 1"
DECODER = "decoder ablation"
SHARING = "sharing ablation"
PROGRESSIVE = "Progressive ResNet-50"
CURVES = "training curves"
DETECTION = "frozen Mask R-CNN"


class Row(NamedTuple):
    """One figure of the paper; `config` is the stem of a file in configs/pretrain/."""

    config: str
    place: str
    words: str
    top1: float | None
    epochs: int
    ours: str = ""  # what the paper does not state and was chosen here; letters are keys of CHOSEN


CHOSEN = {
    "a": "the block's channels (those of the unit) and kind",
    "b": "whether the last 1x1 convolution belongs to res5",
    "c": "the factor of the penalty; the upper unit's copy is the network that is read out",
    "d": "res5 has a unit of its own, as without sharing",
    "e": "where and how maps are interpolated; the groups of the last 1x1 of res5 and res6",
}
ROWS = (
    Row("simclr_r50", MAIN, "SimCLR", 69.8, 800),
    Row("gim_r50", MAIN, "GIM", 64.7, 800),
    Row("loco_r50", MAIN, "LoCo", 69.5, 800, "a"),
    Row("simclr_sh50", MAIN, "SimCLR, ShuffleNet v2-50", 69.1, 800, "b"),
    Row("gim_sh50", MAIN, "GIM, ShuffleNet v2-50", 63.5, 800, "b"),
    Row("loco_sh50", MAIN, "LoCo, ShuffleNet v2-50", 69.3, 800, "a, b"),
    Row("loco_res2_r50", CURVES, "LoCo, losses after res2 to res5", None, 800, "whether the loss on res2 trains it"),
    Row("simclr_r50_100ep", DECODER, "none, end to end", 65.7, 100),
    Row("gim_r50_100ep", DECODER, "none, local", 60.9, 100),
    Row("loco_mlp_r50_100ep", DECODER, "none, local and shared (commented out in the LaTeX)", 64.9, 100),
    Row("simclr_conv_r50_100ep", DECODER, "1 conv block, end to end", 65.6, 100, "a"),
    Row("gim_conv_nods_r50_100ep", DECODER, "1 conv block without downsampling, local", 63.6, 100, "a"),
    Row("gim_conv_r50_100ep", DECODER, "1 conv block, local; sharing ablation: no sharing", 65.1, 100, "a"),
    Row("gim_2conv_r50_100ep", DECODER, "2 conv blocks, local", 65.8, 100, "a; the first halves the map"),
    Row("gim_stage_r50_100ep", DECODER, "1 stage, local", 65.8, 100, "res5's decoder, which has no next stage"),
    Row("gim_full_r50_100ep", DECODER, "full network, local", 65.8, 100, "a, throughout"),
    Row("simclr_mlp4_r50_100ep", DECODER, "MLP of 4 layers, end to end", 67.1, 100),
    Row("gim_mlp4_r50_100ep", DECODER, "MLP of 4 layers, local", 62.3, 100),
    Row("loco_r50_100ep", DECODER, "LoCo; sharing ablation: 1 stage", 66.2, 100, "a"),
    Row("loco_mlp4_r50_100ep", DECODER, "LoCo, MLP of 4 layers", 67.5, 100, "a"),
    Row("loco_upper_r50_100ep", SHARING, "upper layer's gradient only", 65.3, 100, "a"),
    Row("loco_soft_1e-4_r50_100ep", SHARING, "L2 penalty 1e-4", 65.5, 100, "a, c"),
    Row("loco_soft_1e-3_r50_100ep", SHARING, "L2 penalty 1e-3", 66.0, 100, "a, c"),
    Row("loco_soft_1e-2_r50_100ep", SHARING, "L2 penalty 1e-2", 65.9, 100, "a, c"),
    Row("loco_share1block_r50_100ep", SHARING, "sharing 1 block", 64.8, 100, "a, d"),
    Row("loco_share2blocks_r50_100ep", SHARING, "sharing 2 blocks", 65.3, 100, "a, d"),
    Row("simclr_presnet50_100ep", PROGRESSIVE, "SimCLR", 66.8, 100, "e"),
    Row("gim_presnet50_100ep", PROGRESSIVE, "GIM", 52.6, 100, "e"),
    Row("loco_presnet50_100ep", PROGRESSIVE, "LoCo", 66.6, 100, "a, e"),
    Row("simclr_sh50_100ep", DETECTION, "SimCLR, ShuffleNet v2-50", None, 100, "b"),
    Row("gim_sh50_100ep", DETECTION, "GIM, ShuffleNet v2-50", None, 100, "b"),
    Row("loco_sh50_100ep", DETECTION, "LoCo, ShuffleNet v2-50", None, 100, "a, b"),
)
METHODS = {"random": "random", "supervised": "supervised", "simclr": "SimCLR", "gim": "GIM", "loco": "LoCo"}
NETWORKS = {"r50": "ResNet-50", "sh50": "ShuffleNet v2-50", "presnet50": "PResNet-50"}
Pair = tuple[float, float]  # box AP, mask AP

# (data, method, network) -> AP by epochs of pretraining; a supervised backbone has its own number of them, written 0.
FROZEN: dict[tuple[str, str, str], dict[int, Pair]] = {
    ("coco", "supervised", "r50"): {0: (33.9, 31.3)},
    ("coco", "simclr", "r50"): {100: (32.2, 29.9), 800: (34.8, 32.2)},
    ("coco", "gim", "r50"): {100: (27.7, 25.7), 800: (29.3, 27.0)},
    ("coco", "loco", "r50"): {100: (32.6, 30.1), 800: (34.5, 32.0)},
    ("coco", "simclr", "sh50"): {100: (32.5, 30.1), 800: (33.4, 30.9)},
    ("coco", "gim", "sh50"): {100: (27.3, 25.4), 800: (28.9, 26.9)},
    ("coco", "loco", "sh50"): {100: (31.8, 29.4), 800: (33.6, 31.2)},
    ("cityscapes", "supervised", "r50"): {0: (33.2, 27.1)},
    ("cityscapes", "simclr", "r50"): {100: (33.2, 28.6), 800: (34.8, 30.1)},
    ("cityscapes", "gim", "r50"): {100: (30.0, 24.6), 800: (30.7, 26.0)},
    ("cityscapes", "loco", "r50"): {100: (33.2, 28.4), 800: (34.2, 29.5)},
    ("cityscapes", "simclr", "sh50"): {100: (33.3, 28.0), 800: (33.9, 28.7)},
    ("cityscapes", "gim", "sh50"): {100: (29.1, 23.9), 800: (29.6, 23.9)},
    ("cityscapes", "loco", "sh50"): {100: (33.1, 27.7), 800: (33.0, 28.1)},
}
# (images, method) -> AP by epochs of pretraining, ResNet-50, mean of 5 splits; 0 as above, and for random weights.
FEW: dict[tuple[str, str], dict[int, Pair]] = {
    ("10k", "random"): {0: (23.5, 22.0)},
    ("10k", "supervised"): {0: (26.0, 23.8)},
    ("10k", "simclr"): {100: (25.6, 23.9), 800: (27.2, 25.2)},
    ("10k", "gim"): {100: (22.6, 20.8), 800: (24.4, 22.4)},
    ("10k", "loco"): {100: (26.1, 24.2), 800: (27.8, 25.6)},
    ("1k", "random"): {0: (2.5, 2.5)},
    ("1k", "supervised"): {0: (10.4, 10.1)},
    ("1k", "simclr"): {100: (11.3, 11.4), 800: (13.9, 14.1)},
    ("1k", "gim"): {100: (9.7, 9.6), 800: (11.5, 11.7)},
    ("1k", "loco"): {100: (11.7, 11.8), 800: (13.9, 13.8)},
}
# Network -> how many times less memory than end to end; the networks are BACKBONE.NAMEs.
SAVINGS = {
    "resnet50": {"simclr": 1.0, "gim": 1.81, "loco": 1.28},
    "presnet50": {"simclr": 1.0, "gim": 4.56, "loco": 2.76},
}
# Method -> the loss of each unit, by its last stage, at the end of 800 epochs; read off a figure, to about 0.02.
FINAL_LOSSES = {
    "simclr": {"res5": 1.22},
    "gim": {"res2": 2.72, "res3": 2.07, "res4": 1.62, "res5": 1.43},
    "loco_res2": {"res2": 1.79, "res3": 1.31, "res4": 1.23, "res5": 1.19},
}
# The paper's rows of the ablation of sharing, in its order; all have one block before the MLP.
SHARING_ROWS = (
    "gim_conv_r50_100ep",
    "loco_upper_r50_100ep",
    "loco_soft_1e-4_r50_100ep",
    "loco_soft_1e-3_r50_100ep",
    "loco_soft_1e-2_r50_100ep",
    "loco_share1block_r50_100ep",
    "loco_share2blocks_r50_100ep",
    "loco_r50_100ep",
)
EVERYWHERE = (
    "In every row the paper leaves open, and this software sets as in SimCLR's code: the temperature (0.1), the weight "
    "decay (1e-6), the width of the MLP (2048), equal weights of the losses, BatchNorm over all processes (SyncBN). "
    "bfloat16 (SOLVER.AMP) is ours."
)


def table() -> str:
    """Return the pretraining rows as a Markdown table, its legend, and the choices common to all."""
    lines = [
        "| the paper's row | its place | epochs | top-1 | configuration | not stated, chosen here |",
        "|---|---|--:|--:|---|---|",
    ]
    for row in ROWS:
        figure = "" if row.top1 is None else f"{row.top1:.1f}"
        file = f"`{row.config}.yaml`"
        lines.append(f"| {row.words} | {row.place} | {row.epochs} | {figure} | {file} | {row.ours} |")
    legend = [f"- {letter}: {choice}" for letter, choice in CHOSEN.items()]
    return "\n".join([*lines, "", *legend, "", EVERYWHERE, ""])


if __name__ == "__main__":
    print(table())
