"""Any `nn.Module` as a backbone: its maps are found by running it once.

`MODEL.BACKBONE.NAME "python:package.module:function"` names a function without arguments that returns such a module,
with its weights loaded. From Python, `given` takes a module itself and returns a name for this process.
"""

from __future__ import annotations

import importlib
import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loco_det.backbones import timm_models
from loco_det.backbones.networks import OWN_NETWORKS
from loco_det.backbones.resnet import ResNet, StagedBackbone
from loco_det.backbones.timm_models import BY_STRIDE
from loco_det.core.errors import UserError, said

PREFIX = "python:"
HF_PREFIX = "hf:"  # of transformers' models, see hf_models.py
WITH_WEIGHTS = (HF_PREFIX, PREFIX)  # those that bring their weights, so that MODEL.WEIGHTS is for detectors alone
# Beginnings of MODEL.BACKBONE.NAME where the backbone is no ResNet.
OTHER_BACKBONES = (timm_models.PREFIX, HF_PREFIX, PREFIX, *OWN_NETWORKS)
_GIVEN = "given-"
_given: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class OwnBackbone(StagedBackbone):
    """A user's module: (B, 3, H, W) -> a map, several of them, or a dict of maps by name, each (B, C, h, w).

    Maps without names are called by their stride, `stem` (2), `res2` (4) to `res5` (32), or `map0`, `map1`, ... where
    two have the same or another stride.

    Args:
        module: shared, not copied.
        name: for messages.
        image_size: side of the square image that it is run on once.

    Attributes:
        is_plain: all maps have one stride.

    Raises:
        UserError: it is not in float32, does not run on that image, or returns something else.
    """

    def __init__(self, module: nn.Module, name: str, image_size: int = 224) -> None:
        super().__init__()
        self.architecture, self.module, self.image_size = name, module, image_size
        found = self._tried(image_size, image_size, "give another image_size")
        self.is_named = isinstance(found, Mapping)
        maps = list(found.values()) if self.is_named else list(found) if isinstance(found, (list, tuple)) else [found]
        if not maps or any(not isinstance(map_, Tensor) or map_.ndim != 4 for map_ in maps):
            kinds = ", ".join(
                f"{type(map_).__name__} {tuple(map_.shape)}" if isinstance(map_, Tensor) else type(map_).__name__
                for map_ in maps[:5]
            )
            raise UserError(f"backbone {name}: returns {kinds or 'nothing'}; return maps (B, C, H, W)")
        strides = [self._stride(map_, image_size) for map_ in maps]
        names = [str(key) for key in found] if self.is_named else names_by_stride(strides)
        self.stage_names = tuple(names)
        self.channels = {key: map_.shape[1] for key, map_ in zip(names, maps)}
        self.strides = dict(zip(names, strides))
        self.is_plain = len(set(strides)) == 1
        self.depth = len(names)

    def _tried(self, height: int, width: int, remedy: str) -> Any:
        """Run the module, in evaluation, on one image whose every pixel is the mean."""
        module, was_training = self.module, self.module.training
        example = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.zeros(1))
        if example.dtype != torch.float32:
            raise UserError(
                f"backbone {self.architecture}: its weights are {example.dtype}; give it in float32: module.float()"
            )
        try:
            with torch.no_grad():
                return module.eval()(torch.zeros(1, 3, height, width, device=example.device))
        except Exception as error:  # a user's code raises anything
            raise UserError(
                f"backbone {self.architecture}: does not take an image of {height} x {width} pixels ({said(error)}); "
                f"{remedy}"
            ) from error
        finally:
            module.train(was_training)

    def on_oblong(self) -> dict[str, Tensor]:
        """Return the maps of an image that is wider than high, as a detector's are.

        Raises:
            UserError: the module does not take it.
        """
        found = self._tried(self.image_size, self.image_size + 64, "a detector's images have all sizes")
        return self._named(found)

    def _stride(self, map_: Tensor, image_size: int) -> float:
        strides = {image_size / side for side in map_.shape[2:]}
        if len(strides) != 1:
            raise UserError(
                f"backbone {self.architecture}: a square image has a map {tuple(map_.shape)}; return (B, C, H, W)"
            )
        stride = strides.pop()
        return int(stride) if stride == int(stride) else stride

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self._named(self.module(x))

    def _named(self, found: Any) -> dict[str, Tensor]:
        maps = found.values() if self.is_named else found if isinstance(found, (list, tuple)) else [found]
        return dict(zip(self.stage_names, maps))

    def freeze(self, stages: int) -> None:
        """Freeze the whole module for `stages` 5 or more; for 0 and less nothing.

        Raises:
            UserError: a number between, since a module's parts are not known.
        """
        if 0 < stages < 5:
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT {stages}: {self.architecture} has no known stages to freeze; use 5 for all "
                "of it, 0 for nothing"
            )
        if stages >= 5:
            self.requires_grad_(False)
            self.train(self.training)

    def train(self, mode: bool = True) -> OwnBackbone:
        """As always; a frozen module stays in evaluation."""
        is_frozen = not any(parameter.requires_grad for parameter in self.module.parameters())
        return super().train(mode and not is_frozen)


class Quarter(nn.Module):
    """A ResNet with the CIFAR stem on the means over 4 x 4 pixels: (B, 3, H, W) -> maps of strides 4, 8, 16 and 32.

    It sees objects at a quarter of their size, as it does in images of 32 pixels, and its strides are a pyramid's.
    """

    def __init__(self, network: ResNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.network(F.avg_pool2d(x, 4))
        return {name: map_ for name, map_ in maps.items() if name != "stem"}


def names_by_stride(strides: Sequence[float]) -> list[str]:
    """Return `stem` (2), `res2` (4) to `res5` (32), or `map0`, `map1`, ... where strides are equal or others."""
    names = [BY_STRIDE.get(stride, "") for stride in strides]
    return names if all(names) and len(set(names)) == len(names) else [f"map{i}" for i in range(len(strides))]


def given(module: nn.Module, label: str = "") -> str:
    """Return a MODEL.BACKBONE.NAME for `module`, in this process and while something else refers to the module.

    Args:
        label: the name's end, by which a resumed run knows the backbone again; of several modules the last has it.
    """
    known = next((name for name, other in _given.items() if other is module), None)
    name = f"{PREFIX}{_GIVEN}{label}" if label else known or f"{PREFIX}{_GIVEN}{next(_numbers)}"
    _given[name] = module
    return name


def find(name: str) -> nn.Module:
    """Return the module of "python:package.module:function", or one that was `given`.

    Raises:
        UserError: it cannot be imported, or the function fails or returns something else.
    """
    path = name.removeprefix(PREFIX)
    if path.startswith(_GIVEN):
        if name not in _given:
            raise UserError(
                f"MODEL.BACKBONE.NAME {name} was a module given from Python, in another process or gone; add "
                "MODEL.BACKBONE.NAME python:package.module:function, an importable function that returns that module"
            )
        return _given[name]
    place, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(place), function)()
    except Exception as error:  # a user's code raises anything
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: {type(error).__name__}: {said(error)}; write python:package.module:function, "
            "a function without arguments, importable from here"
        ) from error
    if not isinstance(found, nn.Module):
        raise UserError(f"MODEL.BACKBONE.NAME {name}: returns a {type(found).__name__}; return an nn.Module")
    return found
