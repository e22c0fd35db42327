"""timm's models as a sequence of blocks, for pretraining by local losses: each block reads the map of the one before.

| kind | blocks | a block |
|---|---|---|
| plain `VisionTransformer` | `stem`, `blocks.0`, `blocks.1`, ... in four stages | timm's; the last with the norm |
| hierarchical | `stem`, `res2`, ... `res5` | all modules up to the end of that stage |

All blocks exchange maps (B, C, h, w). A transformer's tokens are the pixels of its map, row by row, so its models are
built without cls token and registers, which have no place in a map. Conversion between the two copies nothing: the map
of (B, N, C) tokens is one in channels_last.

Modules are timm's own, under timm's names, so a pretrained model is loaded by `TimmBackbone` as it is. Not every model
is a sequence: some pass more than a map (masks, rotations, a finer map), or run their modules in another order. A model
is therefore run once in both ways when it is built, and refused unless every map is the same, bit for bit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from loco_det.backbones.timm_models import PREFIX, TimmBackbone, create
from loco_det.backbones.windows import WINDOW_OPTIONS
from loco_det.core.errors import UserError, said

_NO_PREFIX = {"class_token": False, "reg_tokens": 0, "global_pool": ""}  # "token", the usual pooling, needs the token
_OF_DETECTORS = ("pretrained", "map_stride", "maps", "positions", "level_norm", "image_size", *WINDOW_OPTIONS)


class PatchEmbedding(nn.Module):
    """The stem of a plain transformer: images (B, 3, H, W) -> patches with positions, (B, C, H / patch, W / patch).

    Images have the size for which the model was built.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.pos_embed = model.patch_embed, model.pos_embed
        self.rest = nn.Sequential(model.pos_drop, model.patch_drop, model.norm_pre)
        self.grid = tuple(model.patch_embed.grid_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(1, -2)  # from (B, h, w, C), or tokens already
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed
        return self.rest(tokens).transpose(1, 2).unflatten(2, self.grid)


class TokenBlock(nn.Module):
    """A block that reads tokens (B, N, C), and the norm behind it: a map (B, C, h, w) -> one of the same shape."""

    def __init__(self, block: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.block(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class ChannelsLast(nn.Module):
    """A stage whose modules read (B, h, w, C), or images (B, 3, H, W) if it is the first: a map -> a map."""

    def __init__(self, stage: nn.Module, is_first: bool) -> None:
        super().__init__()
        self.stage, self.is_first = stage, is_first

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x if self.is_first else x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimmBlocks(TimmBackbone):
    """A model of timm that can be trained block by block, untrained; see the module's table.

    `architecture` names the options with which it was built, also those added here: no cls token, the image's size.

    Args:
        name: timm's name, e.g. "vit_tiny_patch16_224".
        image_size: side of the images.
        options: further arguments of the model's constructor, e.g. `patch_size`.

    Raises:
        UserError: timm cannot build the model, or it is no sequence of blocks on maps, or has random layers.
    """

    def __init__(self, name: str, *, image_size: int, **options: Any) -> None:
        for key in _OF_DETECTORS:
            if key in options:
                raise UserError(f"backbone {PREFIX}{name}: {key} is no option of pretraining; leave it out")
        options = {**options, **_added(name, image_size, options)}
        super().__init__(name, **options)
        self._blocks = list(self._transformer_blocks(image_size) if self.is_plain else self._stages())
        self._refuse_random_layers()
        if self.fixed_size and self.fixed_size != (image_size, image_size):
            height, width = self.fixed_size
            takes = f"takes images of {height} x {width} pixels only, and these are {image_size}"
            raise self._refusal(takes, f"add img_size={image_size} to its options, or change DATA.IMAGE_SIZE")
        self._check_sequence(image_size)

    def blocks(self) -> list[tuple[str, str, nn.Module]]:
        """Return (name, stage, module) of every block in order; see the module's table."""
        return self._blocks

    def _transformer_blocks(self, image_size: int) -> Iterator[tuple[str, str, nn.Module]]:
        from timm.models.vision_transformer import VisionTransformer

        model = self.model
        if not isinstance(model, VisionTransformer):
            raise self._refusal(f"is a {type(model).__name__}, and of plain networks only VisionTransformer has blocks")
        if model.num_prefix_tokens:
            raise self._refusal("has a cls token or registers", "leave class_token and reg_tokens out of its options")
        if tuple(model.patch_embed.img_size) != (image_size, image_size) or image_size % self.patch:
            height, width = model.patch_embed.img_size
            takes = f"takes images of {height} x {width} pixels in patches of {self.patch}, and these are {image_size}"
            raise self._refusal(takes, "let DATA.IMAGE_SIZE be img_size, and a multiple of patch_size")
        yield "stem", "stem", PatchEmbedding(model)
        ends = [int(end.rpartition(".")[2]) for end in self.ends.values()]
        for i, block in enumerate(model.blocks):
            stage = self.stage_names[1 + bisect_left(ends, i)]
            yield f"blocks.{i}", stage, TokenBlock(block, model.norm if i == ends[-1] else None)

    def _stages(self) -> Iterator[tuple[str, str, nn.Module]]:
        modules = list(_flattened(self.model))
        inside = {
            end: [i for i, (name, _) in enumerate(modules) if name == end or name.startswith(f"{end}.")]
            for end in self.ends.values()
        }
        if not all(inside.values()):
            end = next(end for end, found in inside.items() if not found)
            raise self._refusal(f"its stage's end, {end}, is inside another module")
        cuts = [0, *(found[-1] + 1 for found in inside.values())]
        if "stem" not in self.ends:
            cuts.insert(1, next(iter(inside.values()))[0])
        is_nhwc = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        for stage, (start, stop) in zip(self.stage_names, pairwise(cuts)):
            module: nn.Module = nn.Sequential(*(module for _, module in modules[start:stop]))
            yield stage, stage, ChannelsLast(module, is_first=start == 0) if is_nhwc else module

    @torch.no_grad()
    def _check_sequence(self, image_size: int) -> None:
        """Compare the maps of the blocks, run one after the other, with those of timm's own forward pass."""
        self.eval()
        x = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        try:
            expected = self(x)
        except Exception as error:  # timm's families raise various exceptions
            raise self._refusal(
                f"cannot take images of {image_size} pixels ({said(error)})", "change DATA.IMAGE_SIZE"
            ) from error
        found: dict[str, Tensor] = {}
        overwriting: list[str] = []
        try:
            for name, stage, block in self._blocks:
                before, version = x, x._version
                x = found[stage] = block(before)
                if before._version != version:
                    overwriting.append(name)
        except Exception:  # as above: modules that cannot be called with one map
            found = {}
        if overwriting:  # recomputing reads it again
            raise self._refusal(f"its {overwriting[0]} overwrites its input")
        # Of a plain transformer only the last map has the final norm in both.
        compared = [self.stage_names[-1]] if self.is_plain else list(expected)
        if not all(stage in found and torch.equal(found[stage], expected[stage]) for stage in compared):
            raise self._refusal("is no sequence of blocks that each read one map alone")
        self.train()

    def _refuse_random_layers(self) -> None:
        used = {module for _, _, block in self._blocks for module in block.modules()}
        for name, module in self.model.named_modules():
            rate = getattr(module, "drop_prob", 0) or getattr(module, "prob", 0)
            if isinstance(module, nn.modules.dropout._DropoutNd):
                rate = module.p
            if rate and module in used:
                has = (
                    f"has a random layer ({name}: {type(module).__name__} of {rate:.3g}), which resuming cannot repeat"
                )
                raise self._refusal(has, f"set its rate to 0, e.g. {PREFIX}NAME?drop_path_rate=0")

    def _refusal(
        self, reason: str, remedy: str = "pretrain another family, e.g. a ViT, ConvNeXt or RegNet"
    ) -> UserError:
        return UserError(f"backbone {self.architecture}: {reason}; {remedy}")


def _added(name: str, image_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a plain transformer needs beside `options`; builds it without weights to see."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = create(name, pretrained=False, image_size=None, **options)
    if not isinstance(model, VisionTransformer):
        return {}
    added = dict(_NO_PREFIX) if model.num_prefix_tokens else {}
    if tuple(model.patch_embed.img_size) != (image_size, image_size):
        added["img_size"] = image_size
    return {key: value for key, value in added.items() if key not in options}


def _flattened(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the children in order of registration, of an `nn.Sequential` its own children instead, by full name."""
    for name, child in module.named_children():
        if type(child) is nn.Sequential:
            yield from _flattened(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
