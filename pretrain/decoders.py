"""Decoders: what turns a unit's output into the vector that its loss sees.

The paper's second ingredient is a deeper decoder; here any method, end-to-end SimCLR too, can have the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loco_det.backbone import BasicBlock, Bottleneck
from loco_det.errors import UserError


class Decoder(nn.Module):
    """Residual blocks, global average pool, MLP: (2B, C, H, W) -> (2B, out_dim).

    Args:
        channels: C, of the unit's last stage.
        conv_blocks: residual blocks that keep shape and channels; bottlenecks where C is a multiple of 256.
        mlp_layers: 2 or 3 linear layers; every hidden one is followed by BatchNorm and ReLU, as in SimCLR's code.
        hidden_dim: width of the hidden layers; 0 means C.
        out_dim: size of the embedding.
        norm: BN, or SyncBN on several processes.

    Raises:
        UserError: naming the configuration key that cannot be.
    """

    def __init__(
        self, channels: int, *, conv_blocks: int, mlp_layers: int, hidden_dim: int, out_dim: int, norm: str = "BN"
    ) -> None:
        super().__init__()
        if mlp_layers not in (2, 3):
            raise UserError(f"DECODER.MLP_LAYERS is {mlp_layers}; use 2 or 3")
        if conv_blocks < 0 or hidden_dim < 0 or out_dim < 1:
            raise UserError("DECODER.CONV_BLOCKS and HIDDEN_DIM must be 0 or more and OUT_DIM at least 1")
        self.blocks = nn.Sequential(*(_block(channels, norm) for _ in range(conv_blocks)))
        hidden = hidden_dim or channels
        layers: list[nn.Module] = []
        width = channels
        for _ in range(mlp_layers - 1):
            layers += [nn.Linear(width, hidden, bias=False), _norm1d(norm, hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.mlp = nn.Sequential(*layers, nn.Linear(width, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        # The mean as a quotient: the gradient is then one number for a whole map, not a map, in any layout.
        total = x.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        return self.mlp(total / (x.shape[2] * x.shape[3]))


def _norm1d(norm: str, width: int) -> nn.Module:
    return nn.SyncBatchNorm(width) if norm == "SyncBN" else nn.BatchNorm1d(width)


def _block(channels: int, norm: str) -> nn.Module:
    if channels % 256:
        return BasicBlock(channels, channels, 1, norm)
    return Bottleneck(channels, channels, 1, norm, middle=channels // 4, groups=1, stride_in_1x1=False, dilation=1)
