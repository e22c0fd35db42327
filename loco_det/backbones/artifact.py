"""The backbone on disk: `backbone.safetensors`, the only interface between pretraining and everything else.

Tensors have torchvision's names, those of timm's and transformers' models their own; the header's key "loco_det" holds
a JSON manifest that describes them and the pixels they expect. Reading one executes nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loco_det import __version__
from loco_det.backbones.hf_models import HfBackbone
from loco_det.backbones.names import to_torchvision
from loco_det.backbones.networks import OWN_NETWORKS
from loco_det.backbones.own import HF_PREFIX
from loco_det.backbones.resnet import StagedBackbone, tensors_hash
from loco_det.backbones.timm_models import PREFIX, TimmBackbone
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write

FORMAT = 1
HEADER_KEY = "loco_det"
_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\Z')  # ends a manifest: the hash of it without this
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Stage(msgspec.Struct, frozen=True):
    """One stage's output: channels, and input pixels per output pixel."""

    channels: int
    stride: int | float  # fractional for interpolated maps (loco_det/backbones/presnet.py)


class Manifest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The description in a backbone file; `pixel_mean` and `pixel_std` are in 0-255 units, in `channel_order`."""

    format: int = FORMAT
    architecture: str
    depth: int
    stem: str
    stages: dict[str, Stage]
    method: str
    units: list[list[str]] = []
    decoder: dict[str, Any] = {}
    channel_order: Literal["RGB", "BGR"] = "RGB"
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[Positive, Positive, Positive] = IMAGENET_STD
    stride_in_1x1: bool = False
    config: dict[str, Any] = {}
    config_hash: str = ""
    step: int = 0
    dataset: str = ""
    images: int = 0
    loco_det_version: str = __version__
    tensors_sha256: str = ""
    proof: dict[str, Any] = {}
    dropped: dict[str, list[str]] = {}  # tensors of the converted file that the user dropped, by pattern


def describe(backbone: StagedBackbone, *, stem: str, method: str, **fields: Any) -> Manifest:
    """Return the manifest of a pretrained `backbone`; `fields` are any further fields."""
    stages = {name: Stage(backbone.channels[name], backbone.strides[name]) for name in backbone.channels}
    return Manifest(
        architecture=backbone.architecture,
        depth=backbone.depth,
        stem=stem,
        stages=stages,
        method=method,
        **fields,
    )


def backbone_tensors(backbone: StagedBackbone) -> dict[str, Tensor]:
    """Return the backbone's tensors on the CPU, in float32, without counters.

    Their names are torchvision's, those of timm's and transformers' models their own.
    """
    model, rename = backbone, to_torchvision
    if isinstance(backbone, (TimmBackbone, HfBackbone)):
        model, rename = backbone.model if isinstance(backbone, TimmBackbone) else backbone.module.model, str
    return {
        rename(name): tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def save_backbone(path: str | Path, tensors: dict[str, Tensor], manifest: Manifest) -> Manifest:
    """Write tensors (torchvision's or timm's names) and manifest to `path`, atomically; returns the written manifest.

    Raises:
        UserError: the file cannot be written.
    """
    manifest = msgspec.structs.replace(manifest, tensors_sha256=tensors_hash(tensors.items()))
    with atomic_write(path) as file:
        write_backbone(file, tensors, manifest)
    return manifest


def write_backbone(file: IO[bytes], tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """Write the artifact to `file`, an open named file, positioned at its start."""
    header = {HEADER_KEY: encode_manifest(manifest)}  # one key: safetensors does not order several
    save_file(tensors, file.name, metadata=header)  # by name, which avoids a second copy
    file.seek(0, os.SEEK_END)


def load_backbone(path: str | Path) -> tuple[dict[str, Tensor], Manifest]:
    """Load tensors under torchvision's or timm's names, and the manifest, and verify the tensors' hash.

    Raises:
        UserError: no such file, damaged, not a loco_det backbone, of a newer format, or modified tensors.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such backbone file; run loco-det pretrain first or correct the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); write it again") from error
    if header is None:
        raise UserError(f"{path}: has no loco_det manifest; it is not a backbone that loco-det wrote")
    manifest = decode_manifest(header, path)
    check_hash(path, tensors, manifest)
    return tensors, manifest


def check_hash(path: str | Path, tensors: dict[str, Tensor], manifest: Manifest) -> None:
    """Raise UserError unless `tensors` (torchvision's names) have the manifest's hash."""
    if tensors_hash(tensors.items()) != manifest.tensors_sha256:
        raise UserError(f"{path}: its tensors do not match the sha256 in its manifest; take an intact copy")


def require_resnet(path: str | Path, manifest: Manifest) -> None:
    """Raise UserError if the backbone is not a ResNet of Detectron2, torchvision or timm."""
    if manifest.architecture.startswith(PREFIX):
        raise UserError(
            f"{path}: is timm's {manifest.architecture.removeprefix(PREFIX)}, no ResNet; give it as MODEL.WEIGHTS with "
            f"MODEL.BACKBONE.NAME {manifest.architecture}, or to loco-det probe"
        )
    if manifest.architecture.startswith(HF_PREFIX):
        raise UserError(
            f"{path}: is a model of transformers; name its folder, which has its configuration too: "
            f"{HF_PREFIX}{Path(path).parent}"
        )
    if manifest.architecture in OWN_NETWORKS:
        raise UserError(
            f"{path}: is a {OWN_NETWORKS[manifest.architecture]}, which no ResNet of Detectron2, torchvision or timm "
            f"can hold; give it as MODEL.WEIGHTS with MODEL.BACKBONE.NAME {manifest.architecture}, or to loco-det probe"
        )


def encode_manifest(manifest: Manifest) -> str:
    """A manifest as JSON, with a checksum at its end."""
    text = msgspec.json.encode(manifest).decode()
    return f'{text[:-1]},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}'


def decode_manifest(text: str | bytes, path: str | Path) -> Manifest:
    """Decode a manifest from JSON; errors name `path`.

    Raises:
        UserError: malformed, changed since it was written, or written by a newer format.
    """
    text = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if seal := _SEAL.search(text):
        text = text[: seal.start()] + b"}"
        if hashlib.sha256(text).hexdigest().encode() != seal[1]:
            raise UserError(f"{path}: its manifest does not match the sha256 at its end; take an intact copy")
    try:
        found = msgspec.json.decode(text, type=dict[str, Any]).get("format")
        if found != FORMAT:
            raise UserError(f"{path}: manifest format {found!r} is not {FORMAT}; use the loco_det that wrote it")
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UserError(f"{path}: its manifest cannot be read ({error}); write the file again") from error
