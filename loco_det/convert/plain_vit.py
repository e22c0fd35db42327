"""A plain vision transformer as a function of its tensors, to prove conversions with: no module, no name table.

It reads the names that timm's, DINO's, iBOT's, MAE's, MoCo v3's, DeiT's and DINOv2's files share. Sources: Dosovitskiy
et al. 2021; LayerScale, Touvron et al. 2021; registers, Darcet et al. 2024; SwiGLU as in DINOv2.

Shape legend: B images, N tokens with the prefix (cls, registers), C channels, h heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = re.compile(
    r"cls_token|pos_embed|reg_token|register_tokens|mask_token|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)|"
    r"blocks\.(\d+\.)?\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.(fc1|fc2|w12|w3))\.(weight|bias)|"
    r"blocks\.(\d+\.)?\d+\.(attn\.(q_bias|v_bias)|(ls[12]\.gamma|gamma_[12]))"
)


def forward(tensors: Mapping[str, Tensor], x: Tensor, *, heads: int, eps: float) -> Tensor:
    """(B, 3, H, W), of the size that the positions are for, -> the last block's patch tokens, normalised.

    Args:
        tensors: names as `LAYOUT`.
        heads: of attention; no tensor's shape says it.
        eps: of every LayerNorm.

    Returns:
        (B, C, H / patch, W / patch).
    """
    kernel = tensors["patch_embed.proj.weight"]
    patches = F.conv2d(x, kernel, tensors.get("patch_embed.proj.bias"), stride=kernel.shape[-1])
    height, width = patches.shape[-2:]
    tokens = patches.flatten(2).transpose(1, 2)
    positions, cls = tensors.get("pos_embed"), tensors.get("cls_token")
    registers = tensors.get("register_tokens", tensors.get("reg_token"))
    prefix = [part for part in (cls, registers) if part is not None]
    covered = 0 if positions is None else positions.shape[1] - tokens.shape[1]  # tokens of the prefix with a position
    inside = torch.cat([torch.zeros_like(tokens[:, :0]), *(part.expand(len(x), -1, -1) for part in prefix)], dim=1)
    tokens = torch.cat([inside[:, :covered], tokens], dim=1)
    tokens = tokens if positions is None else tokens + positions
    # Tokens without a position stand behind those with one (DINOv2's registers), or are all of the prefix (DeiT III).
    tokens = torch.cat([tokens[:, :covered], inside[:, covered:], tokens[:, covered:]], dim=1)
    for block in _blocks(tensors):
        tokens = tokens + _scaled(block, "1", _attention(block, _norm(block, "norm1.", tokens, eps), heads))
        tokens = tokens + _scaled(block, "2", _mlp(block, _norm(block, "norm2.", tokens, eps)))
    tokens = _norm(tensors, "norm.", tokens, eps)[:, inside.shape[1] :]
    return tokens.transpose(1, 2).reshape(len(x), -1, height, width)


def _blocks(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each block by their names in it; DINOv2's files may number chunks before blocks."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"blocks\.(?:\d+\.)?(\d+)\.([a-z].*)", name):
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor
    return [blocks[number] for number in sorted(blocks)]


def _norm(tensors: Mapping[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * tensors[f"{name}weight"] + tensors[f"{name}bias"]


def _scaled(block: Mapping[str, Tensor], part: str, x: Tensor) -> Tensor:
    gamma = block.get(f"ls{part}.gamma", block.get(f"gamma_{part}"))
    return x if gamma is None else x * gamma


def _attention(block: Mapping[str, Tensor], x: Tensor, heads: int) -> Tensor:
    bias = block.get("attn.qkv.bias")
    if bias is None and "attn.q_bias" in block:
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]])
    parts = F.linear(x, block["attn.qkv.weight"], bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)  # (B, h, N, C / h)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return F.linear(mixed, block["attn.proj.weight"], block.get("attn.proj.bias"))


def _mlp(block: Mapping[str, Tensor], x: Tensor) -> Tensor:
    if "mlp.w12.weight" in block:
        gate, value = F.linear(x, block["mlp.w12.weight"], block["mlp.w12.bias"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, block["mlp.w3.weight"], block["mlp.w3.bias"])
    hidden = F.linear(x, block["mlp.fc1.weight"], block["mlp.fc1.bias"])
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
