"""Backbones of Hugging Face's transformers, `hf:FOLDER` or `hf:NAME` of its hub: every model that has an AutoBackbone.

| kind | maps |
|---|---|
| hierarchical (Swin, ConvNeXt, ResNet, ...) | `res2`..`res5` by stride 4..32, under the norms that the class has |
| plain (DINOv2, ViTDet, ...) | `stageN` of the last block of each quarter, or those chosen, as the class gives them |

Forward pass and resizing of positions are transformers' own code. Nothing of the folder or the hub is executed: code
beside the weights is refused, and tensors are read from safetensors or by torch's reader of tensors alone. A folder
needs no hub. The pixels are those of its preprocessor_config.json. Needs the extra `hf`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loco_det.backbones.own import HF_PREFIX as PREFIX
from loco_det.backbones.own import OwnBackbone, names_by_stride
from loco_det.backbones.timm_models import evaluate_frozen, quarters, quiet_hub, resized_to_stride
from loco_det.core.errors import UserError, said

# Tensors of a checkpoint that no backbone has.
_DROPPED = re.compile(
    r"(.*\.)?(classifier|cls_classifier|distillation_classifier|pooler|decoder|layernorm|norm|lm_head|head)\..*|"
    r"(.*\.)?(mask_token|position_ids|relative_position_index|num_batches_tracked)"
)
# Norms of detection, which no checkpoint of a classifier has: they begin as 1 and 0; and counters of training steps.
_FRESH = re.compile(r"hidden_states_norms\..*|(.*\.)?num_batches_tracked")
_BLOCK = re.compile(r"(?:.*?\.)?(?:layer|layers|stages|blocks)\.(\d+)\..*")
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_REMEDY = "give the folder of a model that save_pretrained wrote, or its name on the hub"


class Maps(nn.Module):
    """A model of transformers as (B, 3, H, W) -> {stage: map}."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.model.out_features, self.model(pixel_values=x).feature_maps))


class HfBackbone(OwnBackbone):
    """A model of transformers with its weights; see the module's table.

    Args:
        source: folder, or name on the hub.
        map_stride: input pixels per pixel of a plain transformer's map: images are resized to match; None: the patch.
        maps: of a plain transformer, `stageN`, N from 1 to its depth, instead of the quarters' ends.
        image_size: side of its images; None: of its preprocessor.

    Attributes:
        order, pixel_mean, pixel_std: of its preprocessor, in 0-255 units.
        dropped: names of the checkpoint's tensors that the backbone does not have: its classifier and the like.

    Raises:
        UserError: transformers is missing, there is no such model or no AutoBackbone of it, or a tensor is missing.
    """

    def __init__(
        self,
        source: str,
        *,
        map_stride: int | None = None,
        maps: Sequence[str] = (),
        image_size: int | None = None,
    ) -> None:
        name = PREFIX + source
        model, dropped, processor = self._load(name, _place(source), maps, image_size)
        side = image_size or _side(processor, model.config)
        unit = 32 if hasattr(model.config, "depths") else model.config.patch_size
        super().__init__(Maps(model), name, max(side // unit, 1) * unit)
        self.image_size, self.dropped = side, dropped
        self.order, self.pixel_mean, self.pixel_std = _pixels(name, processor)
        self._resize: tuple[int, int] | None = None
        if self.is_plain:
            self._resize = (unit, map_stride or unit)
            self.strides = dict.fromkeys(self.strides, map_stride or unit)
        else:
            names = names_by_stride(list(self.strides.values()))
            self.channels = dict(zip(names, self.channels.values()))
            self.strides = dict(zip(names, self.strides.values()))
        self._names = tuple(self.channels)
        self._ends = self._ends_of_stages(model)
        self.stage_names = ("stem", *self._ends)

    def _load(
        self, name: str, place: Path | str, maps: Sequence[str], image_size: int | None
    ) -> tuple[nn.Module, list[str], dict[str, Any]]:
        """Return the model in evaluation mode, names of tensors that it lacks, and its preprocessor's settings."""
        config, network = configuration(name, place, maps)
        if isinstance(place, Path) and not any((place / file).is_file() for file in _PREPROCESSORS):
            raise UserError(
                f"backbone {name}: has no {_PREPROCESSORS[0]}, which states the pixels; write one with image_mean and "
                "image_std"
            )
        with one_sentence(name):
            from transformers.image_processing_base import ImageProcessingMixin

            processor, _ = ImageProcessingMixin.get_image_processor_dict(place, **_where(place))
            model, info = network.from_pretrained(
                place, config=config, output_loading_info=True, weights_only=True, dtype=torch.float32, **_where(place)
            )
        missing = sorted(key for key in info["missing_keys"] if not _FRESH.fullmatch(key))
        other = sorted(str(key) for key in info["mismatched_keys"])
        unexpected = sorted(key for key in info["unexpected_keys"] if not _DROPPED.fullmatch(key))
        for keys, what in (
            (missing, "has no tensor"),
            (other, "has another shape of"),
            (unexpected, "has no place for tensor"),
        ):
            if keys:
                many = f"{keys[0]} ({len(keys)} in all)"
                raise UserError(f"backbone {name}: {what} {many}; give weights of its config.json")
        return model.eval(), sorted(info["unexpected_keys"]), processor

    def _ends_of_stages(self, model: nn.Module) -> dict[str, int]:
        """Return {stage: number of its last block} in the numbering of the parameters' names."""
        if not self.is_plain:
            return {name: number for number, name in enumerate(self.channels)}
        return quarters(len(model.config.stage_names) - 1)  # behind the stem

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {stage: (B, channels, H / stride, W / stride)}, rounded up for a plain transformer."""
        if self._resize is not None:
            x = resized_to_stride(x, *self._resize)
        return dict(zip(self._names, self.module(x).values()))

    def freeze(self, stages: int) -> None:
        """Freeze the first `stages` stages: no gradients, and evaluation mode for good."""
        ends = list(self._ends.values())
        for name, parameter in self.named_parameters():
            found = _BLOCK.fullmatch(name)
            block = int(found[1]) if found else -1 if ".embed" in name else ends[-1]
            stage = 0 if block < 0 else 1 + sum(end < block for end in ends)
            if stage < stages:
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> HfBackbone:
        super().train(mode)
        evaluate_frozen(self.module)
        return self


def _place(source: str) -> Path | str:
    """A folder as a path, a name on the hub as it is."""
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path.absolute()
    if source.startswith(("/", ".", "~")) or path.exists() or source.count("/") > 1 or not source:
        raise UserError(f"backbone {PREFIX}{source}: no such folder; {_REMEDY}")
    return source


def configuration(name: str, place: Path | str, maps: Sequence[str] = ()) -> tuple[Any, type[nn.Module]]:
    """Return the configuration of the model at `place`, its maps chosen, and its backbone's class.

    Raises:
        UserError: transformers is missing, there is no such model or no AutoBackbone of it.
    """
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
    except ImportError as error:
        raise UserError(f"backbone {name}: needs transformers ({error}); pip install 'loco_det[hf]'") from error
    with one_sentence(name):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **_where(place))
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING or config.model_type == "timm_backbone":
        raise UserError(
            f"backbone {name}: transformers has no AutoBackbone of a {config.model_type}; give a model that has one, "
            "e.g. of dinov2, swin or convnext, or name timm's of it: timm:NAME"
        )
    config.out_features = _chosen(name, config, maps)
    return config, MODEL_FOR_BACKBONE_MAPPING[type(config)]


def _where(place: Path | str) -> dict[str, bool]:
    return {"local_files_only": isinstance(place, Path)}


def _chosen(name: str, config: Any, maps: Sequence[str]) -> list[str]:
    """Names of the stages whose maps are wanted: `maps`, the ends of a plain transformer's quarters, or all."""
    stages = list(config.stage_names)[1:]
    if hasattr(config, "depths"):
        return stages
    unknown = [stage for stage in maps if stage not in stages]
    if unknown:
        raise UserError(f"backbone {name}: has no map {unknown[0]!r}; use {stages[0]} to {stages[-1]}")
    return [stage for stage in stages if stage in maps] or [stages[end] for end in quarters(len(stages)).values()]


def _pixels(name: str, processor: dict[str, Any]) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    """Return order, mean and deviation of a preprocessor, in 0-255 units."""
    scale = processor.get("rescale_factor") or 1 / 255
    unit = 1 / scale if processor.get("do_rescale", True) else 1.0
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not all(
        isinstance(v, list) and len(v) == 3 and all(isinstance(x, (int, float)) for x in v) for v in (mean, std)
    ):
        raise UserError(
            f"backbone {name}: its preprocessor_config.json states no image_mean and image_std of three numbers, which "
            "the weights were trained with; write them into it"
        )
    order = "BGR" if processor.get("do_flip_channel_order") else "RGB"
    return order, tuple(unit * value for value in mean), tuple(unit * value for value in std)


def _side(processor: dict[str, Any], config: Any) -> int:
    """Side of the images that a preprocessor makes."""
    for size in (processor.get("crop_size"), processor.get("size"), getattr(config, "image_size", None)):
        values = list(size.values()) if isinstance(size, dict) else size if isinstance(size, (list, tuple)) else [size]
        sides = [int(value) for value in values if isinstance(value, (int, float))]
        if sides:
            return min(sides)
    return 224


@contextlib.contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Turn what transformers and the hub raise into one sentence, without progress bars and reports meanwhile."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with quiet_hub():
            yield
    except UserError:
        raise
    except Exception as error:  # the library raises anything
        raise UserError(f"backbone {name}: transformers cannot load it ({said(error)}); {_REMEDY}") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
