"""Layouts of files that timm's filters do not know, under names that timm knows.

| layout | tensors | becomes |
|---|---|---|
| big_vision's ViT, e.g. SigLIP's `.npz` | `Transformer/encoderblock_0/...`, kernels (inputs, outputs) | timm |
| FCMAE's pretraining, a sparse ConvNeXt V2 | `dwconv.kernel` (places, channels), `.ln.`, `.linear.` | a dense one |

Sources: google-research/big_vision, models/vit.py; facebookresearch/ConvNeXt-V2, models/convnextv2_sparse.py and
utils.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
_SCANNED = "Transformer/encoderblock/"
_NAMES = (
    (r"^embedding/", "patch_embed.proj."),
    (r"^pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"\.LayerNorm_0/", ".norm1."),
    (r"\.LayerNorm_1/", ".norm2."),
    (r"\.MlpBlock_0/Dense_0/", ".mlp.fc1."),
    (r"\.MlpBlock_0/Dense_1/", ".mlp.fc2."),
    (r"\.MultiHeadDotProductAttention_0/out/", ".attn.proj."),
    (r"\.(kernel|scale)$", ".weight"),
)


def is_flax(tensors: Tensors) -> bool:
    """Whether the names are those of big_vision's transformer."""
    return "embedding/kernel" in tensors


def known_names(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors of a backbone in a layout that timm knows; others as they are.

    Raises:
        KeyError, RuntimeError: a tensor is missing, or of a shape that no such file has.
    """
    if is_flax(tensors):
        return _from_flax(tensors)
    return _dense(tensors) if any(name.endswith(".kernel") for name in tensors) else dict(tensors)


def _from_flax(tensors: Tensors) -> dict[str, Tensor]:
    """Kernels (inputs, outputs) become (outputs, inputs); those of query, key and value, one matrix."""
    flat: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_SCANNED):  # all blocks in one tensor
            place = name.removeprefix(_SCANNED)
            flat |= {f"{_SCANNED[:-1]}_{i}/{place}": one for i, one in enumerate(tensor.unbind())}
        else:
            flat[name] = tensor
    found: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        if match := re.fullmatch(r"(Transformer/encoderblock_\d+/MultiHead\w+_0/)query/(kernel|bias)", name):
            parts = [flat[f"{match[1]}{part}/{match[2]}"] for part in ("query", "key", "value")]
            block = re.sub(r"\D", "", match[1].split("/")[1])
            joined = torch.cat([part.flatten(-2).T if part.ndim == 3 else part.flatten() for part in parts])
            found[f"blocks.{block}.attn.qkv.{'weight' if match[2] == 'kernel' else 'bias'}"] = joined
        elif not re.search(r"_0/(key|value)/", name):
            for pattern, to in _NAMES:
                name = re.sub(pattern, to, name)
            found[name] = _turned(name, tensor)
    return found


def _turned(name: str, tensor: Tensor) -> Tensor:
    if name == "patch_embed.proj.weight":
        return tensor.permute(3, 2, 0, 1)
    if name.endswith(".attn.proj.weight"):  # (heads, channels of a head, outputs)
        return tensor.flatten(0, 1).T
    return tensor.T if name.startswith("blocks.") and tensor.ndim == 2 else tensor


def _dense(tensors: Tensors) -> dict[str, Tensor]:
    """Kernels of (places[, inputs], outputs) become (outputs, inputs, rows, columns); rows run fastest over places."""
    found = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.(ln|linear)\.", ".", name)
        if name.endswith(".kernel"):
            side = math.isqrt(len(tensor))
            square = tensor.reshape(side, side, -1, tensor.shape[-1])  # column, row, inputs (1 by channel), outputs
            name, tensor = name.removesuffix("kernel") + "weight", square.permute(3, 2, 1, 0)
        elif name.endswith("bias"):
            tensor = tensor.flatten()
        found[name] = tensor
    return found
