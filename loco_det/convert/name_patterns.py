"""Maps each code base's names of a ResNet's tensors to torchvision's names."""

from __future__ import annotations

import re

from loco_det.backbones.names import to_torchvision
from loco_det.core.errors import UserError

_CHILDREN = {"0.": "conv1.", "1.": "bn1.", "4.": "layer1.", "5.": "layer2.", "6.": "layer3.", "7.": "layer4."}
_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_BRANCH = {"1": ("downsample.0", "downsample.1"), **{f"2{c}": (f"conv{k}", f"bn{k}") for k, c in enumerate("abc", 1)}}


def _children(name: str) -> str:
    """Map a name in `nn.Sequential(*resnet.children())` to torchvision's."""
    start, dot, rest = name.partition(".")
    return _CHILDREN.get(start + dot, start + dot) + rest


def _detectron2(name: str) -> str:
    try:
        return to_torchvision(name)
    except UserError:
        return name


def _transformers(name: str) -> str:
    """Map a name in transformers' ResNetModel to torchvision's."""
    if match := re.fullmatch(r"embedder\.embedder\.(convolution|normalization)\.(\w+)", name):
        return f"{'conv1' if match[1] == 'convolution' else 'bn1'}.{match[2]}"
    block = r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(layer\.(\d+)|shortcut)\.(convolution|normalization)\.(\w+)"
    if match := re.fullmatch(block, name):
        stage, number, _, k, kind, leaf = match.groups()
        convolution = kind == "convolution"
        part = f"{'conv' if convolution else 'bn'}{int(k) + 1}" if k else f"downsample.{0 if convolution else 1}"
        return f"layer{int(stage) + 1}.{number}.{part}.{leaf}"
    return name


def _caffe2(name: str) -> str:
    """Map a blob of Caffe2's Detectron (`res2_0_branch2a_w`) to torchvision's name."""
    if name == "conv1_w":
        return "conv1.weight"
    if match := re.fullmatch(r"res_conv1_bn_(s|b|rm|riv)", name):
        return f"bn1.{_NORM[match[1]]}"
    if match := re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])_(w|bn_(s|b|rm|riv))", name):
        stage, number, branch, _, norm = match.groups()
        convolution, batch_norm = _BRANCH[branch]
        part = f"{batch_norm}.{_NORM[norm]}" if norm else f"{convolution}.weight"
        return f"layer{int(stage) - 1}.{number}.{part}"
    return name


NAMINGS = {
    # naming: (name of the stem's convolution, name of the first block's, function to torchvision's names)
    "torchvision": ("conv1.weight", "layer1.0.conv1.weight", lambda name: name),
    "children": ("0.weight", "4.0.conv1.weight", _children),
    "detectron2": ("stem.conv1.weight", "res2.0.conv1.weight", _detectron2),
    "transformers": (
        "embedder.embedder.convolution.weight",
        "encoder.stages.0.layers.0.layer.0.convolution.weight",
        _transformers,
    ),
    "caffe2": ("conv1_w", "res2_0_branch2a_w", _caffe2),
}
"""Functions leave a name that is not their naming's as it is."""
