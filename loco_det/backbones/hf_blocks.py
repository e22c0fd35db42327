"""transformers' models as a sequence of blocks, for pretraining by local losses: each block reads the one before.

| kind | blocks | between them |
|---|---|---|
| plain (DINOv2, DINOv3, ViTDet, ...) | `stem`, `blocks.0`, `blocks.1`, ... in four stages | tokens (B, N, C), or maps |
| hierarchical (ConvNeXt, ResNet, ...) | `stem`, `res2`, ... `res5` | maps (B, C, h, w) |

Only the folder's config.json is read; weights begin from random values. Cls token and registers take part in the
blocks, and `to_map` leaves them out for the decoders. The final norm belongs to the last block. Norms that a class has
behind its maps for detection stay 1 and 0.

Modules are transformers' own. How they are called is recorded from one batch, and a model is refused unless its blocks,
run one after the other on other images, give its own outputs bit for bit: some pass more than one tensor (Swin). The
recording is of evaluation, so DINOv3's rotary positions are not scaled at random, as they are in its training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.backbones.hf_models import HfBackbone, configuration, one_sentence
from loco_det.core.errors import UserError, said
from loco_det.core.files import atomic_write

_LISTS = ("layer", "layers", "stages", "blocks")  # names of a model's list of blocks
_SIZES = ("image_size", "pretrain_image_size")  # keys of the side of images


class Block(nn.Module):
    """A module of the model, called as the model calls it: what the block below gives -> its first output.

    Args:
        module: reads that and `others`.
        others, named: what else it is given, always the same.
        norm: behind it.
    """

    def __init__(
        self, module: nn.Module, others: tuple[Any, ...], named: dict[str, Any], norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.module, self.norm = module, norm or nn.Identity()
        self.others, self.named = others, named

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(_first(self.module(x, *self.others, **self.named)))

    def move_constants(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply what moves or casts the parameters to the other tensors, e.g. DINOv3's rotary positions."""
        self.others, self.named = _mapped(fn, self.others), _mapped(fn, self.named)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        self.move_constants(fn)
        return super()._apply(fn, recurse)


class PatchTokens(nn.Module):
    """Tokens (B, N, C), the last h * w of them an image's patches, -> their map (B, C, h, w)."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -self.grid[0] * self.grid[1] :].transpose(1, 2).unflatten(2, self.grid)


class _Call(NamedTuple):
    """One call of a module: what it was given, and what it gave."""

    module: nn.Module
    given: tuple[Any, ...]
    named: dict[str, Any]
    output: Any


class HfBlocks(HfBackbone):
    """A model of transformers that can be trained block by block, untrained; see the module's table.

    Args:
        source: folder with a config.json, or name on the hub.
        image_size: side of the images, for which the model is built.

    Raises:
        UserError: transformers cannot build the model, or it is no sequence of blocks, or has random layers.
    """

    def __init__(self, source: str, *, image_size: int) -> None:
        super().__init__(source, image_size=image_size)
        patch = getattr(self.module.model.config, "patch_size", 1)
        if self.is_plain and image_size % patch:
            takes = f"takes images in patches of {patch} pixels, and these are {image_size}"
            raise self._refusal(takes, "let DATA.IMAGE_SIZE be a multiple")
        # Those of a plain one are named by their blocks, as timm's.
        self.channels = dict(zip(self._ends, self.channels.values()))
        self.strides = dict(zip(self._ends, self.strides.values()))
        self._names = tuple(self.channels)
        self.eval()
        modules = self._modules_of_blocks()
        self._blocks = self._cut(modules)
        self._check_sequence(modules)
        self.train()

    def blocks(self) -> list[tuple[str, str, nn.Module]]:
        """Return (name, stage, module) of every block in order; see the module's table."""
        return self._blocks

    def to_map(self) -> PatchTokens | None:
        side = self.image_size // self.module.model.config.patch_size if self._has_tokens else 0
        return PatchTokens((side, side)) if side else None

    def write_folder(self, folder: Path, weights: str, names: Iterable[str]) -> None:
        """Make `folder` one that transformers and `hf:` read: the files beside its safetensors `weights`.

        Args:
            names: of all tensors in that file.
        """
        config = self.module.model.config
        config.architectures = [type(self.module.model).__name__]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, weights)}
        files = {
            "config.json": config.to_json_string(),
            "preprocessor_config.json": json.dumps(_pixels(self.image_size), indent=2),
            "model.safetensors.index.json": json.dumps(index, indent=2),
        }
        for name, text in files.items():
            with atomic_write(folder / name, "w") as file:
                file.write(text)

    def _load(
        self, name: str, place: Path | str, maps: Sequence[str], image_size: int | None
    ) -> tuple[nn.Module, list[str], dict[str, Any]]:
        """Build the model with random weights, for images of `image_size` and ImageNet's pixels."""
        config, network = configuration(name, place, maps)
        for key, value in config.to_dict().items():
            if "drop" in key and isinstance(value, float) and value:
                raise UserError(
                    f"backbone {name}: has random layers ({key} {value:g}), which resuming cannot repeat; set {key} to "
                    "0 in its config.json"
                )
        with one_sentence(name):
            for key in _SIZES:
                if isinstance(side := getattr(config, key, None), (int, tuple, list)):
                    setattr(config, key, image_size if isinstance(side, int) else [image_size, image_size])
            if hasattr(config, "use_mask_token"):
                config.use_mask_token = False  # it would have no gradient
            return network(config), [], _pixels(image_size)

    def _modules_of_blocks(self) -> list[nn.Module]:
        model = self.module.model
        count = len(model.config.stage_names) - 1  # without the stem
        for name, module in model.named_modules():
            is_list = isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in _LISTS
            if is_list and len(module) == count:
                return list(module)
        raise self._refusal("has no list of blocks")

    @torch.no_grad()
    def _run(self, seed: int) -> tuple[Tensor, list[_Call], dict[str, Tensor]]:
        """Run the whole model on images from a seed; returns them, the calls in order of their ends, and the maps."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(2, 3, self.image_size, self.image_size, generator=generator)
        calls: list[_Call] = []
        handles = [
            module.register_forward_hook(lambda *call: calls.append(_Call(*call)), with_kwargs=True)
            for module in self.module.model.modules()
        ]
        try:
            maps = self(x)
        except Exception as error:  # transformers' families raise various exceptions
            takes = f"cannot take images of {self.image_size} pixels ({said(error)})"
            raise self._refusal(takes, "change DATA.IMAGE_SIZE") from error
        finally:
            for handle in handles:
                handle.remove()
        return x, calls, maps

    def _cut(self, modules: list[nn.Module]) -> list[tuple[str, str, nn.Module]]:
        calls = self._run(1)[1]
        of_blocks = [call for call in calls if call.module in modules]
        if [call.module for call in of_blocks] != modules or not all(call.given for call in of_blocks):
            raise self._refusal("does not call its blocks once each, in order")
        inside = {module for block in modules for module in block.modules()}
        stems = [call for call in calls if call.module not in inside and _first(call.output) is of_blocks[0].given[0]]
        if not stems or not stems[-1].given:
            raise self._refusal("changes what its blocks read")
        stem = stems[-1]  # the outermost
        self._has_tokens = self.is_plain and _first(stem.output).ndim == 3
        norms = [module for module in self.module.model.children() if isinstance(module, nn.LayerNorm)]
        found = [("stem", "stem", Block(stem.module, stem.given[1:], stem.named))]
        for (stage, last), first in zip(self._ends.items(), [0, *(end + 1 for end in self._ends.values())]):
            for i in range(first, last + 1):
                norm = norms[0] if len(norms) == 1 and i == len(modules) - 1 else None
                block = Block(modules[i], of_blocks[i].given[1:], of_blocks[i].named, norm)
                found.append((f"blocks.{i}" if self.is_plain else stage, stage, block))
        return found

    @torch.no_grad()
    def _check_sequence(self, modules: list[nn.Module]) -> None:
        """Compare the blocks, run one after the other on other images, with the model's own forward pass."""
        x, calls, maps = self._run(2)
        outputs = {call.module: _first(call.output) for call in calls}
        is_same, to_map = True, self.to_map()
        for number, (_, stage, block) in enumerate(self._blocks):
            before, version = x, x._version
            x = block(before)
            is_same &= before._version == version  # recomputing reads it again
            is_last = number == len(modules)
            if self.is_plain and is_last:  # under the final norm
                is_same &= torch.equal(to_map(x) if to_map else x, maps[stage])
            elif number:
                is_same &= torch.equal(x, outputs[modules[number - 1]])
                is_same &= self.is_plain or x.shape == maps[stage].shape
        if not is_same:
            raise self._refusal("is no sequence of blocks that each read one tensor alone and leave it as it is")

    def _refusal(self, reason: str, remedy: str = "pretrain another family, e.g. DINOv2 or ConvNeXt") -> UserError:
        return UserError(f"backbone {self.architecture}: {reason}; {remedy}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HfBlocks:
        for _, _, block in self._blocks:
            block.move_constants(fn)
        return super()._apply(fn, recurse)


def _pixels(image_size: int | None) -> dict[str, Any]:
    """A preprocessor's settings: ImageNet's pixels, which pretraining uses."""
    mean, std = ([round(value / 255, 6) for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _mapped(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `fn` to the tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {key: _mapped(fn, one) for key, one in value.items()}
    return type(value)(_mapped(fn, one) for one in value) if type(value) in (tuple, list) else value
