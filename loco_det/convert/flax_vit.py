"""big_vision's vision transformer as a function of its file's tensors, to prove conversions of SigLIP with: no module.

Source: google-research/big_vision, models/vit.py (Beyer et al. 2022; Zhai et al. 2023): flax's names and shapes,
kernels (inputs, outputs), attention by head, the GELU's tanh approximation, epsilon 1e-6.

Shape legend: B images, N patches, C channels, h heads, D = C / h; i, o inputs and outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from loco_det.convert.plain_vit import gelu_tanh

LAYOUT = re.compile(
    r"embedding/(kernel|bias)|pos_embedding|Transformer/encoder_norm/(scale|bias)|"
    r"Transformer/encoderblock(_\d+)?/(LayerNorm_[01]/(scale|bias)|MlpBlock_0/Dense_[01]/(kernel|bias)|"
    r"MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias))"
)
_ATTENTION, _STACKED = "MultiHeadDotProductAttention_0", "Transformer/encoderblock/"
Tensors = Mapping[str, Tensor]


def forward(tensors: Tensors, x: Tensor) -> Tensor:
    """(B, 3, H, W), of the size that the positions are for, -> the normalised patches, (B, C, H / patch, W / patch)."""
    kernel = tensors["embedding/kernel"]  # (row, column, i, o)
    side = kernel.shape[0]
    patches = x.unfold(2, side, side).unfold(3, side, side)  # (B, i, H / side, W / side, row, column)
    tokens = torch.einsum("bihwrc,rcio->bhwo", patches, kernel) + tensors["embedding/bias"]
    height, width = tokens.shape[1:3]
    tokens = tokens.flatten(1, 2) + tensors["pos_embedding"]
    for block in blocks(tensors):
        y = _norm(tokens, block["LayerNorm_0/scale"], block["LayerNorm_0/bias"])
        tokens = tokens + _attention(block, y)
        y = _norm(tokens, block["LayerNorm_1/scale"], block["LayerNorm_1/bias"])
        y = gelu_tanh(y @ block["MlpBlock_0/Dense_0/kernel"] + block["MlpBlock_0/Dense_0/bias"])
        tokens = tokens + y @ block["MlpBlock_0/Dense_1/kernel"] + block["MlpBlock_0/Dense_1/bias"]
    tokens = _norm(tokens, tensors["Transformer/encoder_norm/scale"], tensors["Transformer/encoder_norm/bias"])
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def blocks(tensors: Tensors) -> list[dict[str, Tensor]]:
    """The tensors of each block by their names in it; a file of a scanned model stacks those of all blocks."""
    stacked = {name.removeprefix(_STACKED): t for name, t in tensors.items() if name.startswith(_STACKED)}
    if stacked:
        depth = min(map(len, stacked.values()))
        return [{name: tensor[i] for name, tensor in stacked.items()} for i in range(depth)]
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"Transformer/encoderblock_(\d+)/(.*)", name):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    return [found[number] for number in sorted(found)]


def _attention(block: Tensors, x: Tensor) -> Tensor:
    q, k, v = (
        torch.einsum("bni,ihd->bhnd", x, block[f"{_ATTENTION}/{part}/kernel"])
        + block[f"{_ATTENTION}/{part}/bias"][:, None]
        for part in ("query", "key", "value")
    )
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k / math.sqrt(k.shape[-1])).softmax(-1)
    mixed = torch.einsum("bhnm,bhmd->bnhd", weights, v)
    return torch.einsum("bnhd,hdo->bno", mixed, block[f"{_ATTENTION}/out/kernel"]) + block[f"{_ATTENTION}/out/bias"]


def _norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale + bias
