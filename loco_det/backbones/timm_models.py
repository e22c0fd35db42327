"""timm's models as backbones: hierarchical ones (ConvNeXt, Swin, RegNet, ...) and plain vision transformers.

| kind | stages | a stage's map |
|---|---|---|
| hierarchical | `stem` if it has a map of its own, then `res2`..`res5` by stride 4..32 | the model's own |
| plain ViT | `stem`, then the blocks in four quarters, `blocks.0-2`..`blocks.9-11` for depth 12 | its patch tokens |

Maps come from timm's `forward_intermediates`, so cls token, registers, LayerScale, RoPE and all other parts of a family
are timm's own code. What detection needs beside it is here: images of any size, maps of stride 16 for every patch, and
freezing by stage.

A plain ViT's map must have stride 16 for the pyramid (`detection/pyramid.py`); a patch of 14 or 8 pixels gives another
stride, which is no power of two or not 16. `TimmBackbone` therefore resizes images by patch / 16 (bilinear, no
antialiasing when enlarging) before the patch embedding, if `map_stride` is 16. An image of 512 pixels becomes 448 for a
patch of 14: both have 32 x 32 patches.
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loco_det.backbones.resnet import StagedBackbone
from loco_det.backbones.timm_swin import LEVEL_NORMS, use_any_size
from loco_det.backbones.windows import Windows, add_windows, windowed_maps
from loco_det.core.errors import UserError

PREFIX = "timm:"
QUARTERS = 4
BY_STRIDE = {2: "stem", 4: "res2", 8: "res3", 16: "res4", 32: "res5"}
# How learned position embeddings are resized, all bicubic: timm's own code (antialiased), to the new size without
# antialiasing (MAE, ViTDet), or by a scale factor to which 0.1 pixels are added (DINO, iBOT, DINOv2 without registers).
POSITIONS = ("timm", "size", "offset")
_OF_THE_HUB = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")  # modules that fetch weights
# Arguments of `TimmBackbone` and timm that the caller chooses, so that they cannot stand behind a name.
_SET_ELSEWHERE = ("name", "pretrained", "num_classes", "features_only", "map_stride", "maps", "image_size")


class TimmBackbone(StagedBackbone):
    """A model of timm, without its classifier; see the module's table.

    Args:
        name: timm's name, e.g. "vit_small_patch14_dinov2.lvd142m".
        pretrained: load timm's weights, from the local cache or the hub.
        map_stride: input pixels per pixel of a plain ViT's map: images are resized to match; None: the patch.
        maps: of a plain ViT, instead of the quarters' ends, which are normalised: "blocks.N" is a block's output,
            "norm(blocks.N)" the same under the model's final normalisation, "norm" that of the last block.
        positions: how learned position embeddings are resized for other grids, one of `POSITIONS`; None: as the
            family's own code does it (`family_positions`). Families that use RoPE alone have none to resize.
        level_norm: of a hierarchical one, whether a detector puts a LayerNorm behind each map; None: as its authors'
            detection code does it (`timm_swin.LEVEL_NORMS`).
        image_size: side for which a model is built that takes one size only; None: the option img_size, or timm's own.
        window: side of the windows in which the blocks of a plain ViT attend, in patches; None: all attend to the whole
            map, and the cls token and registers take part (`windows.py`).
        global_blocks: with windows, indices of the blocks that attend to the whole map; None: the quarters' last.
        rel_pos: with windows, side of the whole map in patches for which relative positions are made; None: none.
        options: further arguments of the model's constructor, e.g. `drop_path_rate`.

    Attributes:
        is_plain: one stride for all blocks.
        patch: pixels of a plain ViT's patch.
        pixel_mean, pixel_std: RGB, 0-255 units, of timm's recipe.
        image_size: side of its images.
        level_norm_eps: epsilon of the norm that a detector puts behind each map; None: no norm.

    Raises:
        UserError: timm lacks the model, its weights are unavailable, or it gives no feature maps.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        map_stride: int | None = None,
        maps: Sequence[str] = (),
        positions: str | None = None,
        level_norm: bool | None = None,
        image_size: int | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | int | None = None,
        rel_pos: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        attention = {"window": window, "global_blocks": global_blocks, "rel_pos": rel_pos}
        given = {"positions": positions, "level_norm": level_norm, **attention}
        chosen = {key: value for key, value in given.items() if value is not None}
        named = {**options, **chosen}
        self.architecture = PREFIX + name + "?" * bool(named) + "&".join(f"{k}={v}" for k, v in named.items())
        self.options = options
        self.model = create(name, pretrained=pretrained, image_size=image_size, **options)
        use_any_size(self.model)
        config = self.model.pretrained_cfg
        is_flexible = getattr(self.model, "dynamic_img_size", False)
        size = options.get("img_size") or image_size or config["input_size"][1:]
        size = (size, size) if isinstance(size, int) else tuple(size)
        self.fixed_size = size if config["fixed_input_size"] and not is_flexible else None
        features = list(getattr(self.model, "feature_info", []))
        if not features or not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"backbone {PREFIX}{name}: timm gives no feature maps of it; choose a model that has them")
        self.is_plain = len({feature["reduction"] for feature in features}) == 1 and len(features) > 1
        self.patch = features[0]["reduction"] if self.is_plain else 0
        self.depth = len(features)
        self.map_stride = (map_stride or self.patch) if self.is_plain else None
        if self.is_plain:
            self._plain(features, maps)
        else:
            self._hierarchical(features)
        self.positions = positions or family_positions(name)
        self.windows = None
        if attention.keys() & chosen.keys():
            self.windows = self._windows(**attention)
        self.level_norm_eps = self._level_norm(level_norm)
        parts = self._parts()
        self.model.prune_intermediate_layers(list(self.indices.values()), prune_norm=not self.normed, prune_head=True)
        _resize_positions_as(self.model, self.positions, name)
        left = {name for name, _ in self.model.named_parameters()}
        self.parts = {stage: [name for name in names if name in left] for stage, names in parts.items()}
        mean, std = pixels(self.model)
        self.pixel_mean, self.pixel_std = mean, std
        self.image_size = size[-1]

    def _plain(self, features: Sequence[dict[str, Any]], maps: Sequence[str]) -> None:
        ends = quarters(self.depth)
        self.stage_names = ("stem", *ends)
        chosen = [(name, *self._block(name)) for name in maps] or [(stage, last, True) for stage, last in ends.items()]
        self.indices = {name: index for name, index, _ in sorted(chosen, key=lambda one: one[1])}
        self.normed = {name for name, _, is_normed in chosen if is_normed}
        self.ends = {stage: features[last]["module"] for stage, last in ends.items()}
        self.channels = {name: features[index]["num_chs"] for name, index in self.indices.items()}
        self.strides = dict.fromkeys(self.indices, self.map_stride)

    def _windows(self, window: int | None, global_blocks: Sequence[int] | int | None, rel_pos: int | None) -> Windows:
        if global_blocks is None:
            global_blocks = tuple(quarters(self.depth).values())
        chosen = global_blocks if isinstance(global_blocks, (tuple, list)) else (global_blocks,)
        windows = Windows(window or 0, tuple(chosen), rel_pos or 0)
        add_windows(self.model, windows, self.architecture)
        return windows

    def _block(self, name: str) -> tuple[int, bool]:
        """The number of the block that a map is of, and whether it is normalised."""
        found = re.fullmatch(r"norm|blocks\.(\d+)|norm\(blocks\.(\d+)\)", name)
        number = None if found is None else int(found[1] or found[2] or self.depth - 1)
        if found is None or number >= self.depth:
            raise UserError(
                f"backbone {self.architecture}: has no map {name!r}; use norm, blocks.N or norm(blocks.N), N from 0 "
                f"to {self.depth - 1}"
            )
        return number, not name.startswith("blocks")

    def _hierarchical(self, features: Sequence[dict[str, Any]]) -> None:
        self.ends, self.indices, self.channels, self.strides, self.normed = {}, {}, {}, {}, set()
        for index, feature in enumerate(features):
            name = BY_STRIDE.get(feature["reduction"])
            if name is None:
                continue
            self.ends[name] = feature["module"]  # several of one stride: the last of them
            self.indices[name] = index
            self.channels[name], self.strides[name] = feature["num_chs"], feature["reduction"]
        self.stage_names = (*(() if "stem" in self.ends else ("stem",)), *self.ends)

    def _level_norm(self, wanted: bool | None) -> float | None:
        if self.is_plain and wanted is not None:
            raise UserError(f"backbone {self.architecture}: level_norm is for hierarchical models; leave it out")
        if not isinstance(wanted, bool) and wanted is not None:
            raise UserError(f"backbone {self.architecture}: level_norm is True or False, not {wanted!r}")
        usual = LEVEL_NORMS.get(type(self.model).__name__)
        return usual if wanted is None else (usual or 1e-6) if wanted else None

    def _parts(self) -> dict[str, list[str]]:
        """Names of the parameters of every stage: those registered up to the end of the stage's last module."""
        order = {name: i for i, (name, _) in enumerate(self.model.named_modules())}
        ends = []
        for stage, module in self.ends.items():
            inside = [i for name, i in order.items() if name == module or name.startswith(f"{module}.")]
            if not inside:
                raise UserError(f"backbone {self.architecture}: timm names {module} the end of {stage}, which it lacks")
            ends.append(max(inside))
        if "stem" not in self.ends:
            first = next(iter(self.ends.values()))
            ends.insert(0, order[first.rpartition(".")[0] if self.is_plain else first])
        ends[-1] = len(order)
        parts: dict[str, list[str]] = {name: [] for name in self.stage_names}
        for name, _ in self.model.named_parameters():
            place = order[name.rpartition(".")[0]]
            parts[self.stage_names[bisect.bisect_left(ends, place)]].append(name)
        return parts

    def freeze(self, stages: int) -> None:
        """Freeze the first `stages` stages: no gradients, and evaluation mode for good (BatchNorm, drop path)."""
        for stage in self.stage_names[: max(0, stages)]:
            for name in self.parts[stage]:
                self.model.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        evaluate_frozen(self.model)
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {stage: (B, channels, H / stride, W / stride)} for every stage that has a map, rounded up."""
        if self.is_plain:
            x = self.resized(x)
        if self.fixed_size and tuple(x.shape[2:]) != self.fixed_size:
            takes, given = (f"{height} x {width}" for height, width in (self.fixed_size, x.shape[2:]))
            raise UserError(
                f"backbone {self.architecture}: takes images of {takes} pixels only, and these are {given}; choose a "
                "family whose positions can be resized"
            )
        wanted = sorted(set(self.indices.values()))
        if self.windows:
            of_index = self._windowed_maps(x, wanted)
        else:
            maps = self.model.forward_intermediates(x, indices=wanted, output_fmt="NCHW", intermediates_only=True)
            of_index = dict(zip(wanted, maps))
        return {
            name: self._normalised(of_index[index]) if name in self.normed else of_index[index]
            for name, index in self.indices.items()
        }

    def _windowed_maps(self, x: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
        patches = self.model.patch_embed(x)
        grid, positions = tuple(patches.shape[1:3]), self.model.pos_embed
        if positions is not None:
            old = tuple(self.model.patch_embed.grid_size)
            positions = resize_positions(positions[:, -old[0] * old[1] :], grid, old, self.positions).unflatten(1, grid)
        return windowed_maps(self.model, patches, self.windows, positions, wanted)

    def _normalised(self, x: Tensor) -> Tensor:
        return self.model.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def resized(self, x: Tensor) -> Tensor:
        """Resize images so that a map of this plain ViT has ceil(H / map_stride) x ceil(W / map_stride) pixels."""
        return resized_to_stride(x, self.patch, self.map_stride)


def quarters(depth: int) -> dict[str, int]:
    """Divide `depth` blocks into `QUARTERS` parts or fewer, longer first: {"blocks.FIRST-LAST" or "blocks.N": LAST}."""
    ends = {}
    for part in np.array_split(range(depth), min(QUARTERS, depth)):
        first, last = int(part[0]), int(part[-1])
        ends[f"blocks.{first}-{last}" if last > first else f"blocks.{last}"] = last
    return ends


def evaluate_frozen(model: nn.Module) -> None:
    """Set all modules whose parameters are frozen to evaluation mode."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def resized_to_stride(x: Tensor, patch: int, stride: int) -> Tensor:
    """Resize (B, 3, H, W) to ceil(H / stride) x ceil(W / stride) patches, padded with zeros to a multiple of stride."""
    size = [-(-side // stride) * patch for side in x.shape[2:]]
    if list(x.shape[2:]) == size:
        return x
    whole = [-(-side // stride) * stride for side in x.shape[2:]]
    x = F.pad(x, (0, whole[1] - x.shape[3], 0, whole[0] - x.shape[2]))
    if stride == patch:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=patch < stride)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split "timm:NAME?KEY=VALUE&..." into timm's name and options of the constructor, e.g. `drop_path_rate=0.1`.

    Raises:
        UserError: an option without a value.
    """
    name, _, query = text.removeprefix(PREFIX).partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, is_given, value = part.partition("=")
        if not is_given or not key.isidentifier():
            raise UserError(f"{text}: {part!r} is no KEY=VALUE; write e.g. {PREFIX}{name}?drop_path_rate=0.1")
        if key in _SET_ELSEWHERE:
            raise UserError(f"{text}: {key} is no option behind the name; leave it out")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def create(name: str, *, pretrained: bool, image_size: int | None, **options: Any) -> nn.Module:
    """Create timm's model `name` without a classifier, for images of any size where its family allows that.

    Elsewhere it takes images of `image_size` pixels a side, if given.

    Raises:
        UserError: no such model, or its weights are unavailable.
    """
    import timm  # takes seconds, so only if needed

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "timm.list_models() shows all"
        raise UserError(f"backbone {PREFIX}{name}: timm {timm.__version__} has no model {name!r} ({close})")
    sized = {"img_size": image_size} if image_size else {}
    for flexible in ({"dynamic_img_size": True}, {"strict_img_size": False}, sized, {}):
        try:
            with quiet_hub():
                return timm.create_model(name, pretrained=pretrained, num_classes=0, **options, **flexible)
        except TypeError as error:  # the family has no such argument
            if flexible and any(key in str(error) for key in flexible):
                continue
            reason = error
        except Exception as error:  # hub libraries raise various exceptions offline
            reason = error
        break
    said = " ".join(str(reason).split())[:200] or type(reason).__name__
    remedy = "choose another model or other options"
    if pretrained:
        remedy = f"give its weights as a file, or use random:{PREFIX}{name} for an untrained one"
        if isinstance(reason, OSError) or type(reason).__module__.partition(".")[0] in _OF_THE_HUB:
            raise UserError(
                f"backbone {PREFIX}{name}: its weights are not in the cache and cannot be fetched "
                f"({type(reason).__name__}); connect to the hub once, {remedy}"
            )
    raise UserError(f"backbone {PREFIX}{name}: timm could not build it ({said}); {remedy}")


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's client from logging its retries: what fails in the end is one error."""
    loggers = [logging.getLogger(name) for name in _OF_THE_HUB]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def pixels(model: nn.Module) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of timm's recipe for `model`: RGB, 0-255 units."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, std = (tuple(255 * value for value in config[key]) for key in ("mean", "std"))
    return mean, std


def family_positions(name: str) -> str:
    """Return the member of `POSITIONS` that the code of the model's family uses."""
    model, _, tag = name.partition(".")
    if "dinov2" in model and "reg4" not in model:
        return "offset"
    if tag.startswith("dino"):
        return "offset"
    return "size" if tag.startswith("mae") else "timm"


def resize_positions(table: Tensor, grid: tuple[int, int], old: tuple[int, int], how: str) -> Tensor:
    """Resize (1, old[0] * old[1], C) position embeddings to (1, grid[0] * grid[1], C), in float32.

    Args:
        how: see `POSITIONS`.
    """
    if grid == old:
        return table
    if how == "timm":
        from timm.layers import resample_abs_pos_embed

        return resample_abs_pos_embed(table, new_size=list(grid), old_size=list(old), num_prefix_tokens=0)
    image = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    if how == "size":
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    else:
        factors = tuple((new + 0.1) / before for new, before in zip(grid, old))
        image = F.interpolate(image, scale_factor=factors, mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


def _resize_positions_as(model: nn.Module, how: str, name: str) -> None:
    """Let `model` resize its position embeddings by `resize_positions`, or leave it timm's own code."""
    from timm.models.vision_transformer import VisionTransformer

    if how not in POSITIONS:
        raise UserError(f"position embeddings are resized as one of {', '.join(POSITIONS)}, not {how!r}")
    if how == "timm" or getattr(model, "pos_embed", None) is None:
        return
    if type(model) is not VisionTransformer:
        raise UserError(
            f"backbone {PREFIX}{name}: a {type(model).__name__} resizes its positions as timm does; use timm"
        )
    model._pos_embed = MethodType(_embed_with(how), model)


def _embed_with(how: str) -> Any:
    def embed(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) patches -> (B, prefix + H * W, C) tokens, positions added."""
        grid = tuple(x.shape[1:3])
        x = x.flatten(1, 2)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        own = 0 if self.no_embed_class else self.num_prefix_tokens
        of_patches = resize_positions(self.pos_embed[:, own:], grid, tuple(self.patch_embed.grid_size), how)
        x = torch.cat([*prefix, x + of_patches], dim=1)
        if own:
            x = torch.cat([x[:, :own] + self.pos_embed[:, :own], x[:, own:]], dim=1)
        return self.pos_drop(x)

    return embed
