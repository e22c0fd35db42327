"""Recognises the ResNet that tensors belong to, by names and shapes, and checks every tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loco_det.backbones.names import to_torchvision
from loco_det.backbones.resnet import BLOCKS, STEM_CHANNELS, ResNet, stage_channels
from loco_det.convert.load import in_memory
from loco_det.core.errors import UserError

_NAMES = {
    (32, 4): "resnext{}_32x4d",
    (32, 8): "resnext{}_32x8d",
    (64, 4): "resnext{}_64x4d",
    (1, 128): "wide_resnet{}_2",
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # float32 holds every value of the other two


@dataclass(frozen=True)
class Architecture:
    """A ResNet with the 7x7 stem; `groups` and `width_per_group` are Detectron2's NUM_GROUPS, WIDTH_PER_GROUP."""

    depth: int
    groups: int = 1
    width_per_group: int = 64

    @property
    def name(self) -> str:
        """torchvision's name of the network."""
        if (self.groups, self.width_per_group) == (1, 64):
            return f"resnet{self.depth}"
        plain = f"resnet{{}}_{self.groups}x{self.width_per_group}"
        return _NAMES.get((self.groups, self.width_per_group), plain).format(self.depth)

    @property
    def res2_out_channels(self) -> int:
        return stage_channels(self.depth)["res2"]

    def build(self, *, stride_in_1x1: bool = False, norm: str = "BN") -> ResNet:
        """Build the backbone with fresh weights."""
        return ResNet(
            self.depth,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            groups=self.groups,
            width_per_group=self.width_per_group,
        )


def recognise(path: object, tensors: dict[str, Tensor]) -> Architecture:
    """Recognise the ResNet of `tensors` (torchvision's names) by block counts and the shapes of stem and block.

    Raises:
        UserError: not a ResNet that Detectron2 can build.
    """
    if "conv1.weight" not in tensors:
        raise UserError(f"{path}: tensor 'conv1.weight' of every ResNet is missing; take a whole file")
    stem = tuple(tensors["conv1.weight"].shape)
    refuse_small_stem(path, stem)
    if stem != (STEM_CHANNELS, 3, 7, 7):
        raise UserError(f"{path}: 'conv1.weight' has shape {list(stem)}, not [64, 3, 7, 7]; give a standard ResNet")
    counts = tuple(len({n.split(".")[1] for n in tensors if n.startswith(f"layer{s}.")}) for s in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in tensors
    depths = [d for d, blocks in BLOCKS.items() if blocks == counts and (d >= 50) == bottleneck]
    if not depths:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(
            f"{path}: has {list(counts)} {kind} blocks, which is no ResNet-18, 34, 50, 101 or 152; give one of them"
        )
    if "bn1.weight" in tensors and "bn1.running_mean" not in tensors:
        raise UserError(
            f"{path}: 'bn1' has no running statistics, so it is GroupNorm or another norm; give a BatchNorm ResNet"
        )
    second = tensors.get("layer1.0.conv2.weight")
    if not bottleneck or second is None or second.ndim != 4 or not 0 < second.shape[1] <= second.shape[0]:
        return Architecture(depths[0])
    groups = second.shape[0] // second.shape[1]
    return Architecture(depths[0], groups, second.shape[0] // groups)


def refuse_small_stem(path: object, stem: tuple[int, ...]) -> None:
    """Raise UserError if the stem's convolution, of shape `stem`, is the 3x3 one for small images."""
    if stem[2:] == (3, 3):
        raise UserError(
            f"{path}: has the 3x3 stem for small images (CIFAR), but Detectron2's stem is 7x7 with stride 2 and a "
            "pool; pretrain with BACKBONE.STEM imagenet, or evaluate such a file of loco-det pretrain in Python: "
            "loco_det.evaluate_detection"
        )


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_shapes(
    path: object, tensors: dict[str, Tensor], architecture: Architecture, key: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Check that `tensors` are the ResNet's: complete, of the right shape, of a dtype in `DTYPES`; returns them.

    `key` maps torchvision's name to the tensor's name in the file.

    Raises:
        UserError: naming the first invalid tensor.
    """
    with torch.device("meta"):
        model = architecture.build()
    expected = {
        to_torchvision(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    for name in expected:
        if name not in tensors:
            raise UserError(f"{path}: tensor {key(name)!r} of a {architecture.name} is missing; take a whole file")
    for name, tensor in tensors.items():
        if name not in expected:
            raise UserError(f"{path}: tensor {key(name)!r} is unknown in a {architecture.name}; remove it")
        if tuple(tensor.shape) != expected[name]:
            shapes = f"{list(tensor.shape)}, not {list(expected[name])}"
            raise UserError(f"{path}: tensor {key(name)!r} has shape {shapes}; give a {architecture.name}'s weights")
        if tensor.dtype not in DTYPES:
            kind = dtype_name(tensor)
            raise UserError(f"{path}: tensor {key(name)!r} is {kind}, not float32; save the weights in float32")
    return tensors


def checked_tensors(
    path: object, tensors: dict[str, Tensor], architecture: Architecture, key: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Read `tensors` into memory as float32 after `check_shapes`, and check that all values are finite.

    Raises:
        UserError: as `check_shapes`, or naming the first tensor with an invalid value.
    """
    read: dict[str, Tensor] = {}
    for name, tensor in check_shapes(path, tensors, architecture, key).items():
        values = read[name] = in_memory(tensor).float().contiguous()
        lowest, highest = torch.aminmax(values)  # NaN if any value is; unlike isfinite it allocates no second tensor
        if not torch.isfinite(lowest + highest):
            raise UserError(f"{path}: tensor {key(name)!r} has NaN or infinite values; take a sound checkpoint")
        if name.endswith("running_var") and lowest < 0:
            raise UserError(f"{path}: tensor {key(name)!r} has negative variances; take a sound checkpoint")
    return read
