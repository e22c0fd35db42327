"""A plain vision transformer as a function of its tensors, to prove conversions with: no module.

It reads the names that timm's, DINO's, iBOT's, MAE's, MoCo v3's, DeiT's, DINOv2's and DINOv3's files share, and CLIP's.
Sources: Dosovitskiy et al. 2021; LayerScale, Touvron et al. 2021; registers, Darcet et al. 2024; SwiGLU as in DINOv2;
rotary positions, DINOv3 (Siméoni et al. 2025); the norm before the blocks and "quick" GELU, CLIP (Radford et al. 2021).

Shape legend: B images, N tokens with the prefix (cls, registers), C channels, h heads, D = C / h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = re.compile(
    r"cls_token|pos_embed|reg_token|register_tokens|storage_tokens|mask_token|patch_embed\.proj\.(weight|bias)|"
    r"(norm|norm_pre)\.(weight|bias)|"
    r"blocks\.(\d+\.)?\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.(fc1|fc2|w12|w3))\.(weight|bias)|"
    r"blocks\.(\d+\.)?\d+\.(attn\.(q_bias|v_bias)|(ls[12]\.gamma|gamma_[12]))"
)
# CLIP's names -> those of `LAYOUT`.
_CLIPS = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a CLIP's vision tower under the names and shapes of `LAYOUT`; others as they are."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, to in _CLIPS:
            name = re.sub(pattern, to, name)
        whole = name in ("cls_token", "pos_embed")  # CLIP's have no dimension of the batch
        renamed[name] = tensor.reshape(1, -1, tensor.shape[-1]) if whole else tensor
    return renamed


def forward(
    tensors: Mapping[str, Tensor], x: Tensor, *, heads: int, eps: float, base: float = 0.0, gelu: str = "erf"
) -> Tensor:
    """(B, 3, H, W), of the size that the positions are for, -> the last block's patch tokens, normalised.

    No tensor shows what is given beside them.

    Args:
        tensors: names as `LAYOUT`.
        heads: of attention.
        eps: of every LayerNorm.
        base: of DINOv3's rotary positions; 0: none.
        gelu: "erf", exact; "quick", CLIP's x * sigmoid(1.702 x); "tanh", the other approximation.

    Returns:
        (B, C, H / patch, W / patch).
    """
    kernel = tensors["patch_embed.proj.weight"]
    patches = F.conv2d(x, kernel, tensors.get("patch_embed.proj.bias"), stride=kernel.shape[-1])
    height, width = patches.shape[-2:]
    tokens = patches.flatten(2).transpose(1, 2)
    positions, cls = tensors.get("pos_embed"), tensors.get("cls_token")
    registers = next((tensors[n] for n in ("register_tokens", "storage_tokens", "reg_token") if n in tensors), None)
    prefix = [part for part in (cls, registers) if part is not None]
    covered = 0 if positions is None else positions.shape[1] - tokens.shape[1]  # tokens of the prefix with a position
    inside = torch.cat([torch.zeros_like(tokens[:, :0]), *(part.expand(len(x), -1, -1) for part in prefix)], dim=1)
    tokens = torch.cat([inside[:, :covered], tokens], dim=1)
    tokens = tokens if positions is None else tokens + positions
    # Tokens without a position stand behind those with one (DINOv2's registers), or are all of the prefix (DeiT III).
    tokens = torch.cat([tokens[:, :covered], inside[:, covered:], tokens[:, covered:]], dim=1)
    tokens = _norm(tensors, "norm_pre.", tokens, eps) if "norm_pre.weight" in tensors else tokens
    angles = _angles(height, width, tokens.shape[2] // heads, base).to(x) if base else None
    for block in _blocks(tensors):
        tokens = tokens + _scaled(block, "1", _attention(block, _norm(block, "norm1.", tokens, eps), heads, angles))
        tokens = tokens + _scaled(block, "2", _mlp(block, _norm(block, "norm2.", tokens, eps), gelu))
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


def _angles(height: int, width: int, head: int, base: float) -> Tensor:
    """(H * W, D) angles by which queries and keys of D channels are turned: rows, columns, and both once more."""
    periods = (base ** (2 * torch.arange(head // 4) / (head // 2))).double()  # of float32, as the authors' code
    rows, columns = ((2 * ((torch.arange(side) + 0.5) / side) - 1).double() for side in (height, width))
    of_rows, of_columns = (2 * torch.pi * place[:, None] / periods for place in (rows, columns))
    both = torch.cat([of_rows.repeat_interleave(width, 0), of_columns.repeat(height, 1)], dim=1)
    return both.repeat(1, 2)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the last tokens of (B, h, N, D), those with `angles`: channel i with channel i + D / 2."""
    first = x.shape[2] - len(angles)
    rest, x = x[:, :, :first], x[:, :, first:]
    half = x.shape[-1] // 2
    across = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return torch.cat([rest, x * angles.cos() + across * angles.sin()], dim=2)


def _attention(block: Mapping[str, Tensor], x: Tensor, heads: int, angles: Tensor | None) -> Tensor:
    bias = block.get("attn.qkv.bias")
    if bias is None and "attn.q_bias" in block:
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]])
    if angles is not None and bias is not None:  # DINOv3's keys have none: its file masks them
        bias = bias * torch.tensor([1, 0, 1]).to(bias).repeat_interleave(x.shape[2])
    parts = F.linear(x, block["attn.qkv.weight"], bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)  # (B, h, N, C / h)
    if angles is not None:
        q, k = _turned(q, angles), _turned(k, angles)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    return F.linear(mixed, block["attn.proj.weight"], block.get("attn.proj.bias"))


def _mlp(block: Mapping[str, Tensor], x: Tensor, gelu: str) -> Tensor:
    if "mlp.w12.weight" in block:
        gate, value = F.linear(x, block["mlp.w12.weight"], block["mlp.w12.bias"]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, block["mlp.w3.weight"], block["mlp.w3.bias"])
    hidden = F.linear(x, block["mlp.fc1.weight"], block["mlp.fc1.bias"])
    if gelu == "quick":
        hidden = hidden * torch.sigmoid(1.702 * hidden)
    elif gelu == "tanh":
        hidden = gelu_tanh(hidden)
    else:
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])


def gelu_tanh(x: Tensor) -> Tensor:
    """The GELU's approximation by tanh (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
