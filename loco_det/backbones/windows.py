"""Windowed attention and relative positions for timm's plain transformers, as ViTDet has them for fine-tuning.

Most blocks attend inside windows of patches, so that their cost grows with the image's area and not with its square; a
few global blocks attend to the whole map. Maps are padded with zeros to whole windows, after the block's first
normalisation. Cls token and registers have no place in windows and are removed, with their parameters.

With relative positions, row and column distances between query and key each have a learned vector, whose product with
the query is added to the attention's logits; the vectors start at zero.

Shape legend: B maps or windows, h x w patches, C channels, n heads of d channels, N = h * w.
Source: Li et al. 2022, section 3 and appendix; detectron2/modeling/backbone/vit.py and utils.py, whose arithmetic this
has, and whose parameter names where timm's are the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loco_det.core.errors import UserError

REL_POS = ("rel_pos_h", "rel_pos_w")  # names of the parameters of an attention
WINDOW_OPTIONS = ("window", "global_blocks", "rel_pos")  # behind the name of a model of timm


class Windows(NamedTuple):
    """How a transformer's blocks attend.

    Attributes:
        side: of a window, in patches.
        global_blocks: indices of the blocks that attend to the whole map.
        rel_pos: side of the map, in patches, for which the global blocks' relative positions are made; 0: none.
    """

    side: int
    global_blocks: tuple[int, ...]
    rel_pos: int


def add_windows(model: nn.Module, windows: Windows, name: str) -> None:
    """Remove cls token and registers from timm's `model`, and add its relative positions.

    Raises:
        UserError: another model than a plain `VisionTransformer`, or windows that it cannot have.
    """
    from timm.models.vision_transformer import VisionTransformer

    if type(model) is not VisionTransformer or not all(map(_is_plain, model.blocks)):
        raise UserError(f"backbone {name}: is no plain VisionTransformer, which windows need; leave window out")
    depth, (side, global_blocks, rel_pos) = len(model.blocks), windows
    are_numbers = all(type(number) is int for number in (side, rel_pos, *global_blocks))
    if not are_numbers or side < 1 or rel_pos < 0 or not set(global_blocks) <= set(range(depth)):
        raise UserError(
            f"backbone {name}: window and rel_pos are numbers of patches, e.g. window=14&rel_pos=64, and global_blocks "
            f"are indices from 0 to {depth - 1}"
        )
    model.cls_token = model.reg_token = None
    model.num_prefix_tokens = 0
    for index, block in enumerate(model.blocks if rel_pos else ()):
        length = 2 * (rel_pos if index in global_blocks else side) - 1
        for parameter in REL_POS:
            block.attn.register_parameter(parameter, nn.Parameter(torch.zeros(length, block.attn.head_dim)))


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's own, without the parts of an attention that `_attend_relatively` lacks."""
    from timm.models.vision_transformer import Attention, Block

    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    extras = [getattr(block.attn, part, None) for part in ("norm", "gate")]
    return all(extra is None or isinstance(extra, nn.Identity) for extra in extras)


def windowed_maps(
    model: nn.Module, x: Tensor, windows: Windows, positions: Tensor | None, wanted: Collection[int]
) -> dict[int, Tensor]:
    """Return {block: its output (B, C, h, w)} for the blocks in `wanted`.

    Args:
        x: patches (B, h, w, C).
        positions: embeddings (1, h, w, C).
    """
    x = model.norm_pre(model.pos_drop(x if positions is None else x + positions))
    maps = {}
    for index, block in enumerate(model.blocks):
        side = 0 if index in windows.global_blocks else windows.side
        x = x + block.drop_path1(block.ls1(attend(block.attn, block.norm1(x), side)))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        if index in wanted:
            maps[index] = x.permute(0, 3, 1, 2).contiguous()
    return maps


def attend(attention: Any, x: Tensor, side: int) -> Tensor:
    """Apply timm's `Attention` in windows of `side` patches, or for 0 to the whole map: (B, h, w, C) to the same."""
    height, width = x.shape[1:3]
    if side:
        x = partition(x, side)
    tokens = x.flatten(1, 2)
    tokens = attention(tokens) if not hasattr(attention, REL_POS[0]) else _attend_relatively(attention, x)
    x = tokens.view(x.shape)
    return join(x, side, height, width) if side else x


def partition(x: Tensor, side: int) -> Tensor:
    """(B, h, w, C) -> (B * windows, side, side, C), row by row; zeros complete the last ones on the right and below."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(0, 2)


def join(x: Tensor, side: int, height: int, width: int) -> Tensor:
    """Invert `partition`."""
    rows, columns = -(-height // side), -(-width // side)
    x = x.unflatten(0, (-1, rows, columns)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width].contiguous()


def _attend_relatively(attention: Any, x: Tensor) -> Tensor:
    """The attention of (B, h, w, C), with relative positions: (B, N, C)."""
    height, width = x.shape[1:3]
    heads = attention.num_heads
    query, key, value = attention.qkv(x.flatten(1, 2)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query), attention.k_norm(key)
    of_rows, of_columns = relative(attention.rel_pos_h, height), relative(attention.rel_pos_w, width)
    queries = query.unflatten(2, (height, width))
    bias_of_rows = torch.einsum("bnhwd,hkd->bnhwk", queries, of_rows)
    bias_of_columns = torch.einsum("bnhwd,wkd->bnhwk", queries, of_columns)
    bias = (bias_of_rows[..., :, None] + bias_of_columns[..., None, :]).flatten(4, 5).flatten(2, 3)
    dropout = attention.attn_drop.p if attention.training else 0.0
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout)
    return attention.proj_drop(attention.proj(found.transpose(1, 2).flatten(2)))


def relative(table: Tensor, length: int) -> Tensor:
    """Vectors (length, length, d) of query i and key j, from a table (L, d) of distances, first to last.

    A table for another length is resized linearly.
    """
    if len(table) != 2 * length - 1:
        table = F.interpolate(table.T[None], size=2 * length - 1, mode="linear")[0].T
    place = torch.arange(length, device=table.device)
    return table[place[:, None] - place[None, :] + length - 1]
