"""ConvNeXt and Swin (both versions of each) as functions of their tensors, to prove conversions with: no module.

They read the names of the authors' files, of dense and sparse convolutions, and timm's. Sources: A ConvNet for the
2020s (Liu et al. 2022); ConvNeXt V2 (Woo et al. 2023), its global response normalisation; Swin Transformer (Liu et al.
2021); Swin Transformer V2 (Liu et al. 2022), its cosine attention, continuous position bias and norms behind attention
and MLP.

Shape legend: B images, a map (B, H, W, C), w the side of a window, N = w * w its tokens, h heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]
CONVNEXT = re.compile(
    r"downsample_layers\.\d\.[01]\.(weight|bias|kernel)|"
    r"stages\.\d\.\d+\.((dwconv|norm|pwconv[12])\.(weight|bias)|dwconv\.kernel|gamma|grn\.(gamma|beta))"
)
SWIN = re.compile(
    r"patch_embed\.(proj|norm)\.(weight|bias)|layers\.\d\.downsample\.(reduction\.weight|norm\.(weight|bias))|"
    r"layers\.\d\.blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12]|attn\.cpb_mlp\.[02])\.(weight|bias)|"
    r"attn\.(relative_position_bias_table|logit_scale|q_bias|v_bias))"
)
# timm's names of a ConvNeXt, and those of FCMAE's pretraining -> the authors'.
_TIMMS_CONVNEXT = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"\.(ln|linear)\.", "."),
)
CONVNEXT_EPS, SWIN_EPS = 1e-6, 1e-5  # of every LayerNorm
MASKED = -100.0  # added to the logits of tokens that are no neighbours, as in the authors' code


def convnext_names(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors under the authors' names."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, to in _TIMMS_CONVNEXT:
            name = re.sub(pattern, to, name)
        renamed[name] = tensor
    return renamed


def convnext(tensors: Tensors, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> the last stage's map, (B, C, H / 32, W / 32); `tensors` by the authors' names."""
    stages = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("stages."))
    for stage in range(stages):
        before = f"downsample_layers.{stage}."
        if stage:
            x = _norm_of_map(tensors, f"{before}0.", x)
        place = 1 if stage else 0  # the stem's convolution comes first, later ones behind their norm
        x = _convolved(tensors, f"{before}{place}.", x)
        if not stage:
            x = _norm_of_map(tensors, f"{before}1.", x)
        for block in _numbered(tensors, f"stages.{stage}."):
            x = x + _convnext_block(block, x)
    return x


def _convnext_block(block: Tensors, x: Tensor) -> Tensor:
    y = _convolved(block, "dwconv.", x, each=True)
    y = _norm(block, "norm.", y.permute(0, 2, 3, 1), CONVNEXT_EPS)
    y = _gelu(F.linear(y, block["pwconv1.weight"].flatten(1), block["pwconv1.bias"]))
    if "grn.gamma" in block:
        size = y.square().sum((1, 2), keepdim=True).sqrt()  # of a channel over the image
        share = size / (size.mean(-1, keepdim=True) + 1e-6)
        y = y + block["grn.gamma"].flatten() * y * share + block["grn.beta"].flatten()
    y = F.linear(y, block["pwconv2.weight"].flatten(1), block["pwconv2.bias"])
    y = y * block["gamma"] if "gamma" in block else y
    return y.permute(0, 3, 1, 2)


def _convolved(tensors: Tensors, name: str, x: Tensor, each: bool = False) -> Tensor:
    """Convolve patches by their side as stride, or with `each` every channel by itself, with as many results as pixels.

    A sparse convolution's `kernel` is (places, inputs, outputs) or (places, channels); rows run fastest over places.
    """
    bias, kernel = tensors[f"{name}bias"], tensors.get(f"{name}kernel")
    if kernel is None:
        kernel = tensors[f"{name}weight"]
        if each:
            return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(kernel))
        return F.conv2d(x, kernel, bias, stride=kernel.shape[-1])
    side = math.isqrt(len(kernel))
    step, margin = (1, side // 2) if each else (side, 0)
    x = F.pad(x, (margin,) * 4)
    y = bias.reshape(1, -1, 1, 1)
    for place, weight in enumerate(kernel):
        row, column = place % side, place // side
        seen = x[:, :, row : x.shape[2] - side + row + 1 : step, column : x.shape[3] - side + column + 1 : step]
        y = y + (seen * weight[:, None, None] if each else torch.einsum("bihw,io->bohw", seen, weight))
    return y


def swin_names(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors with each downsampling counted to the stage behind it, as timm's; the authors' is before."""
    is_theirs = any(name.startswith("layers.0.downsample.") for name in tensors)
    moved = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"layers\.(\d)\.downsample\.(.*)", name)
        moved[f"layers.{int(found[1]) + is_theirs}.downsample.{found[2]}" if found else name] = tensor
    return moved


def swin(tensors: Tensors, x: Tensor, *, window: int) -> Tensor:
    """(B, 3, H, W) -> the last stage's map, (B, C, H / 32, W / 32).

    Args:
        tensors: by `swin_names`.
        window: side of a window on maps that are larger; on smaller ones the map is the window.
    """
    kernel = tensors["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, tensors["patch_embed.proj.bias"], stride=kernel.shape[-1]).permute(0, 2, 3, 1)
    if "patch_embed.norm.weight" in tensors:
        x = _norm(tensors, "patch_embed.norm.", x, SWIN_EPS)
    stages = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    for stage in range(stages):
        if stage:
            x = _merged(tensors, f"layers.{stage}.downsample.", x)
        side = min(window, *x.shape[1:3])
        for number, block in enumerate(_numbered(tensors, f"layers.{stage}.blocks.")):
            shift = side // 2 if number % 2 and min(x.shape[1:3]) > side else 0
            x = _swin_block(block, x, side, shift)
    return x.permute(0, 3, 1, 2)


def _swin_block(block: Tensors, x: Tensor, window: int, shift: int) -> Tensor:
    def mlp(y: Tensor) -> Tensor:
        y = _gelu(F.linear(y, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        return F.linear(y, block["mlp.fc2.weight"], block["mlp.fc2.bias"])

    if "attn.logit_scale" in block:  # version 2: norms behind
        x = x + _norm(block, "norm1.", _windows_attend(block, x, window, shift), SWIN_EPS)
        return x + _norm(block, "norm2.", mlp(x), SWIN_EPS)
    x = x + _windows_attend(block, _norm(block, "norm1.", x, SWIN_EPS), window, shift)
    return x + mlp(_norm(block, "norm2.", x, SWIN_EPS))


def _windows_attend(block: Tensors, x: Tensor, window: int, shift: int) -> Tensor:
    """Attention inside each window of a map that is padded with zeros to whole windows, then shifted."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = (torch.arange(side).roll(-shift) for side in x.shape[1:3])
    x = x[:, rows][:, :, columns]
    out = torch.empty_like(x)
    for top in range(0, x.shape[1], window):
        for left in range(0, x.shape[2], window):
            down, across = slice(top, top + window), slice(left, left + window)
            apart = _distances(rows[down], columns[across])
            far = (apart.abs() >= window).any(-1)  # wrapped round the border: no neighbours
            tokens = x[:, down, across].flatten(1, 2)
            out[:, down, across] = _attend(block, tokens, far * MASKED, window).unflatten(1, (window, window))
    back = out.new_empty(out.shape)
    back[:, rows[:, None], columns[None]] = out
    return back[:, :height, :width]


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Row and column of each token minus those of each other: (N, N, 2)."""
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return places[:, None] - places[None]


def _attend(block: Tensors, x: Tensor, mask: Tensor, window: int) -> Tensor:
    """(B, N, C) tokens of one window, (N, N) mask -> (B, N, C)."""
    apart = _distances(torch.arange(window), torch.arange(window))  # inside the window
    bias = block.get("attn.qkv.bias")
    if "attn.q_bias" in block:
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]])
    q, k, v = F.linear(x, block["attn.qkv.weight"], bias).chunk(3, dim=-1)
    if "attn.logit_scale" in block:
        scale = block["attn.logit_scale"].clamp(max=math.log(100)).exp()  # (h, 1, 1)
        q, k, v = (part.unflatten(-1, (len(scale), -1)).transpose(1, 2) for part in (q, k, v))
        q, k = (part / part.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12) for part in (q, k))
        far = 8 * apart.to(x.dtype) / max(window - 1, 1)
        far = far.sign() * (far.abs() + 1).log2() / 3
        hidden = F.linear(far, block["attn.cpb_mlp.0.weight"], block["attn.cpb_mlp.0.bias"]).relu()
        position = 16 * F.linear(hidden, block["attn.cpb_mlp.2.weight"]).sigmoid()
        logits = q @ k.transpose(-1, -2) * scale
    else:
        table = block["attn.relative_position_bias_table"]  # ((2 w - 1)², h)
        q, k, v = (part.unflatten(-1, (table.shape[1], -1)).transpose(1, 2) for part in (q, k, v))
        place = apart + window - 1
        position = table[place[..., 0] * (2 * window - 1) + place[..., 1]]
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (logits + position.permute(2, 0, 1) + mask).softmax(-1)
    return F.linear((weights @ v).transpose(1, 2).flatten(2), block["attn.proj.weight"], block["attn.proj.bias"])


def _merged(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    """Join each 2 x 2 pixels: upper left, lower left, upper right, lower right."""
    x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
    before = tensors[f"{name}norm.weight"].shape[0] == x.shape[-1]  # version 1
    x = _norm(tensors, f"{name}norm.", x, SWIN_EPS) if before else x
    x = F.linear(x, tensors[f"{name}reduction.weight"])
    return x if before else _norm(tensors, f"{name}norm.", x, SWIN_EPS)


def _numbered(tensors: Tensors, prefix: str) -> list[dict[str, Tensor]]:
    """The tensors of each block below `prefix` by their names in it."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(re.escape(prefix) + r"(\d+)\.(.*)", name):
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor
    return [blocks[number] for number in sorted(blocks)]


def _norm(tensors: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * tensors[f"{name}weight"] + tensors[f"{name}bias"]


def _norm_of_map(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    return _norm(tensors, name, x.permute(0, 2, 3, 1), CONVNEXT_EPS).permute(0, 3, 1, 2)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))
