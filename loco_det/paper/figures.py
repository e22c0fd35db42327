"""The paper's pretraining rows: each figure, its configuration, and the choices made here.

Figures are top-1 accuracies in percent of a linear classifier on ImageNet; source: Xiong, Ren, Urtasun, "LoCo: Local
Contrastive Representation Learning", NeurIPS 2020, arXiv 2008.01342. None was reproduced with this software.
`python -m pretrain.paper` prints the table of docs/method.md.
"""

from __future__ import annotations

from typing import NamedTuple

MAIN = "table 1"
DECODER = "decoder ablation"
SHARING = "sharing ablation"
PROGRESSIVE = "Progressive ResNet-50"
CURVES = "training curves"


class Row(NamedTuple):
    """One figure of the paper; `config` is the stem of a file in configs/pretrain/."""

    config: str
    place: str
    words: str
    top1: float | None
    epochs: int
    ours: str = ""  # choices made here because the paper does not state them


_BLOCK = "the block's channels (those of the unit) and kind"
_COPIES = _BLOCK + "; the factor of the penalty; the upper unit's copy is the network that is read out"
_UNITS = _BLOCK + "; res5 has a unit of its own, as without sharing"
_RESIZED = "where and how maps are interpolated; the groups of the last 1x1 of res5 and res6"
ROWS = (
    Row("simclr_r50", MAIN, "SimCLR", 69.8, 800),
    Row("gim_r50", MAIN, "GIM", 64.7, 800),
    Row("loco_r50", MAIN, "LoCo", 69.5, 800, _BLOCK),
    Row("loco_res2_r50", CURVES, "LoCo, losses after res2 to res5", None, 800, "whether the loss on res2 trains it"),
    Row("simclr_r50_100ep", DECODER, "none, end to end", 65.7, 100),
    Row("gim_r50_100ep", DECODER, "none, local", 60.9, 100),
    Row("loco_mlp_r50_100ep", DECODER, "none, local and shared (commented out in the LaTeX)", 64.9, 100),
    Row("simclr_conv_r50_100ep", DECODER, "1 conv block, end to end", 65.6, 100, _BLOCK),
    Row("gim_conv_nods_r50_100ep", DECODER, "1 conv block without downsampling, local", 63.6, 100, _BLOCK),
    Row("gim_conv_r50_100ep", DECODER, "1 conv block, local; sharing ablation: no sharing", 65.1, 100, _BLOCK),
    Row("gim_2conv_r50_100ep", DECODER, "2 conv blocks, local", 65.8, 100, _BLOCK + "; the first halves the map"),
    Row("gim_stage_r50_100ep", DECODER, "1 stage, local", 65.8, 100, "res5's decoder, which has no next stage"),
    Row("gim_full_r50_100ep", DECODER, "full network, local", 65.8, 100, _BLOCK + " throughout"),
    Row("simclr_mlp4_r50_100ep", DECODER, "MLP of 4 layers, end to end", 67.1, 100),
    Row("gim_mlp4_r50_100ep", DECODER, "MLP of 4 layers, local", 62.3, 100),
    Row("loco_r50_100ep", DECODER, "LoCo; sharing ablation: 1 stage", 66.2, 100, _BLOCK),
    Row("loco_mlp4_r50_100ep", DECODER, "LoCo, MLP of 4 layers", 67.5, 100, _BLOCK),
    Row("loco_upper_r50_100ep", SHARING, "upper layer's gradient only", 65.3, 100, _BLOCK),
    Row("loco_soft_1e-4_r50_100ep", SHARING, "L2 penalty 1e-4", 65.5, 100, _COPIES),
    Row("loco_soft_1e-3_r50_100ep", SHARING, "L2 penalty 1e-3", 66.0, 100, _COPIES),
    Row("loco_soft_1e-2_r50_100ep", SHARING, "L2 penalty 1e-2", 65.9, 100, _COPIES),
    Row("loco_share1block_r50_100ep", SHARING, "sharing 1 block", 64.8, 100, _UNITS),
    Row("loco_share2blocks_r50_100ep", SHARING, "sharing 2 blocks", 65.3, 100, _UNITS),
    Row("simclr_presnet50_100ep", PROGRESSIVE, "SimCLR", 66.8, 100, _RESIZED),
    Row("gim_presnet50_100ep", PROGRESSIVE, "GIM", 52.6, 100, _RESIZED),
    Row("loco_presnet50_100ep", PROGRESSIVE, "LoCo", 66.6, 100, f"{_BLOCK}; {_RESIZED}"),
)
EVERYWHERE = (
    "In every row the paper leaves open, and this software sets as in SimCLR's code: the temperature (0.1), the weight "
    "decay (1e-6), the width of the MLP (2048), equal weights of the losses, BatchNorm over all processes (SyncBN). "
    "bfloat16 (SOLVER.AMP) is ours."
)


def table() -> str:
    """Return the rows as a Markdown table, and the choices common to all."""
    lines = [
        "| the paper's row | its place | epochs | the paper, top-1 | ours | configuration | not stated, chosen here |",
        "|---|---|--:|--:|---|---|---|",
    ]
    for row in ROWS:
        figure = "" if row.top1 is None else f"{row.top1:.1f}"
        file = f"`{row.config}.yaml`"
        lines.append(f"| {row.words} | {row.place} | {row.epochs} | {figure} | not run | {file} | {row.ours} |")
    return "\n".join([*lines, "", EVERYWHERE, ""])


if __name__ == "__main__":
    print(table())
