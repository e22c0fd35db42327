"""Writes a conversion: Detectron2's OUTPUT.pkl and OUTPUT.yaml, or torchvision's names as OUTPUT.pth or
OUTPUT.safetensors, the latter with the manifest.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from loco_det.backbones.artifact import HEADER_KEY, Manifest, encode_manifest, write_backbone
from loco_det.convert.architecture import Architecture


class _Pickler(pickle.Pickler):
    """Pickles an array as numpy.ndarray(shape, dtype text, bytes), which every numpy release can read.

    numpy 2's own format names a module that numpy 1 lacks, and Detectron2 is often installed with numpy 1.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.reshape(-1).view(np.uint8)))
        return NotImplemented


def write_pickle(file: IO[bytes], tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """Write the .pkl, with names relative to the ResNet, which Detectron2 matches in FPN and C4 models alike.

    Args:
        file: output, positioned at its start.
        tensors: Detectron2's names (`stem.conv1.weight`, `res2.0...`) -> float32 CPU tensors.
        manifest: stored as JSON text, which Detectron2 ignores.
    """
    content = {
        "model": {name: tensor.numpy() for name, tensor in tensors.items()},
        "__author__": "loco_det",
        "matching_heuristics": True,
        HEADER_KEY: encode_manifest(manifest),
    }
    file.seek(0)
    file.truncate()
    pickler = _Pickler(file, protocol=4)
    pickler.fast = True  # no memo, so that only one array at a time is in memory twice
    pickler.dump(content)
    file.flush()


def write_torch(file: IO[bytes], tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """Write the .pth: the content of `resnet50().state_dict()` minus classifier and counters; it has no manifest."""
    file.seek(0)
    file.truncate()
    torch.save(tensors, file)
    file.flush()


WRITERS = {".pkl": write_pickle, ".pth": write_torch, ".safetensors": write_backbone}
"""Suffix of the output -> (file, tensors, manifest) -> None; only the .pkl has Detectron2's names."""

CONVERTED, READ = "converted and proven by loco_det.", "keys written by loco_det."  # each ends a fragment's first line


def is_fragment(path: Path) -> bool:
    """Whether `keys_text` wrote the file `path`, so that another conversion may replace it."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return False
    return first.endswith((CONVERTED, READ))


def yaml_text(weights: Path, manifest: Manifest, architecture: Architecture) -> str:
    """Return the YAML fragment for stock Detectron2: the weights, pixels and ResNet keys that these weights need."""
    wide = (architecture.groups, architecture.width_per_group) != (1, 64)
    network = [
        "  RESNETS:",
        f"    DEPTH: {architecture.depth}",
        f"    STRIDE_IN_1X1: {'true' if manifest.stride_in_1x1 else 'false'}",
        f"    RES2_OUT_CHANNELS: {architecture.res2_out_channels}",
        *([f"    NUM_GROUPS: {architecture.groups}"] if wide else []),
        *([f"    WIDTH_PER_GROUP: {architecture.width_per_group}"] if wide else []),
    ]
    title = f"{architecture.name} backbone ({manifest.method}), {CONVERTED}"
    pixels = manifest.channel_order, manifest.pixel_mean, manifest.pixel_std
    return keys_text(title, str(weights.absolute()), *pixels, network)


def keys_text(
    title: str, weights: str, order: str, mean: Sequence[float], std: Sequence[float], network: Sequence[str]
) -> str:
    """Return a YAML fragment of the keys that must agree with weights; `network` are its lines below MODEL."""
    lines = [
        f"# {' '.join(title.split())}",  # text from a file must not end the comment
        "# These keys must agree with the weights: put them into your config, or name this file as its _BASE_.",
        "MODEL:",
        f"  WEIGHTS: {json.dumps(weights, ensure_ascii=False)}",
        f"  PIXEL_MEAN: {json.dumps([float(value) for value in mean])}",
        f"  PIXEL_STD: {json.dumps([float(value) for value in std])}",
        *network,
        "INPUT:",
        f'  FORMAT: "{order}"',
    ]
    return "\n".join(lines) + "\n"


def backbone_name(name: str) -> list[str]:
    """Return the lines of MODEL.BACKBONE.NAME for `keys_text`."""
    return ["  BACKBONE:", f"    NAME: {json.dumps(name, ensure_ascii=False)}"]
