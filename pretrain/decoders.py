"""Decoders: map a unit's output to the embedding for its loss.

The paper's LoCo has one residual block that halves the map before the pooling; its SimCLR and GIM have only the MLP,
and its ablations try other depths. Here any method can have any decoder. Not stated in the paper, so chosen here: the
blocks keep the unit's channels and have the kind (basic or bottleneck) of the unit's last block (for the stem, of the
first stage; networks of timm and transformers get bottlenecks); every hidden linear layer is followed by BatchNorm and
ReLU. Below the last stage a plain vision transformer's map is its residual stream, without the final normalisation;
BatchNorm behind the first linear layer removes its scale.
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from loco_det.backbones.resnet import BasicBlock, Bottleneck, StagedBackbone, initialise
from loco_det.core.errors import UserError


class Decoder(nn.Module):
    """Residual blocks, global average pool, MLP: (2B, C, H, W) -> (2B, out_dim).

    Args:
        channels: channels before the pool: C, unless `blocks` change it.
        blocks: modules before the pool, usually from `residual_blocks`.
        mlp_layers: number of linear layers; hidden ones are followed by BatchNorm and ReLU, as in SimCLR's code.
        hidden_dim: width of the hidden layers; 0 means `channels`.
        out_dim: size of the embedding.
        norm: BN, or SyncBN on several processes.
    """

    def __init__(
        self,
        channels: int,
        blocks: nn.Sequential | None = None,
        *,
        mlp_layers: int,
        hidden_dim: int,
        out_dim: int,
        norm: str = "BN",
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential() if blocks is None else blocks
        hidden = hidden_dim or channels
        layers: list[nn.Module] = []
        width = channels
        for _ in range(mlp_layers - 1):
            layers += [nn.Linear(width, hidden, bias=False), _norm1d(norm, hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(width, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.mlp(_Pool.apply(x))


class _Pool(torch.autograd.Function):
    """Global average pool, (2B, C, H, W) -> (2B, C) in float32 at least, whose gradient stays one number for each map.

    Autograd's would expand before it casts to half precision, and so write whole maps.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype, wide = x.shape, x.dtype, torch.promote_types(x.dtype, torch.float32)
        return x.sum((2, 3), dtype=wide) / (x.shape[2] * x.shape[3])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        each = gradient / (ctx.shape[2] * ctx.shape[3])
        return each.to(ctx.dtype)[:, :, None, None].expand(ctx.shape)


def build_decoder(settings: dict[str, Any], backbone: StagedBackbone, stage: str, norm: str = "BN") -> Decoder:
    """Build the decoder of the DECODER keys for a unit that ends in `stage`, e.g. "res3".

    `CONV` selects the modules before the pool:

    - "blocks": `CONV_BLOCKS` residual blocks, the first of which halves the map if `DOWNSAMPLE`;
    - "stage": the architecture of the backbone's next stage, with fresh weights. The last stage has no next one: it
      gets its own number of blocks, the first of which halves the map (not stated in the paper);
    - "full": as many blocks as the whole backbone, halving where its stages shrink the map (their channels are not
      stated).

    Raises:
        UserError: the unit ends in a stem whose channels are not known.
    """
    if stage not in backbone.channels:
        raise UserError(
            f"UNITS: a unit ends in the stem of {backbone.architecture}; end it in {backbone.stage_names[1]}"
        )
    channels = backbone.channels[stage]
    kind, blocks = settings["CONV"], settings["CONV_BLOCKS"]
    later = backbone.stage_names[backbone.stage_names.index(stage) + 1 :]
    if kind == "stage" and later:
        conv = copy.deepcopy(nn.Sequential(*(block for _, name, block in backbone.blocks() if name == later[0])))
        initialise(conv)
        channels = backbone.channels[later[0]]
    else:
        depths = list(Counter(name for _, name, _ in backbone.blocks()[1:]).values())
        count, halved = {
            "blocks": (blocks, {0} if settings["DOWNSAMPLE"] else set()),
            "stage": (depths[-1], {0}),
            "full": (sum(depths), set(accumulate(depths[:-1]))),
        }[kind]
        conv = residual_blocks(channels, count, halved, bottleneck=_ends_in_bottleneck(backbone, stage), norm=norm)
    if (to_map := backbone.to_map()) is not None:
        conv.insert(0, to_map)
    sizes = {key: settings[key.upper()] for key in ("mlp_layers", "hidden_dim", "out_dim")}
    return Decoder(channels, conv, **sizes, norm=norm)


def residual_blocks(
    channels: int, count: int, halved: set[int], *, bottleneck: bool = False, norm: str = "BN"
) -> nn.Sequential:
    """Return `count` blocks of `channels` channels; those at the positions `halved` halve the map."""
    return nn.Sequential(*(_block(channels, 2 if i in halved else 1, bottleneck, norm) for i in range(count)))


def _block(channels: int, stride: int, bottleneck: bool, norm: str) -> nn.Module:
    if not bottleneck:
        return BasicBlock(channels, channels, stride, norm)
    middle = max(1, channels // 4)
    return Bottleneck(channels, channels, stride, norm, middle=middle, groups=1, stride_in_1x1=False, dilation=1)


def _ends_in_bottleneck(backbone: StagedBackbone, stage: str) -> bool:
    """Whether the stage's last block is not a basic one; the stem has no block, so the first stage's counts."""
    ending = backbone.stage_names[1] if stage == "stem" else stage
    return not isinstance([block for _, name, block in backbone.blocks() if name == ending][-1], BasicBlock)


def _norm1d(norm: str, width: int) -> nn.Module:
    return nn.SyncBatchNorm(width) if norm == "SyncBN" else nn.BatchNorm1d(width)
