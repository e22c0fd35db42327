"""The proof: one image through torchvision's ResNet with the weights as read, and through ours as written.

Shape legend: the image is (1, 3, H, W); outputs are compared after the stem's pool and after each of four stages.
torchvision's ResNet is an implementation of its own, so a wrong name, stride or norm shows as a difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from loco_det.backbone import BLOCKS, STAGES
from loco_det.convert.architecture import Architecture
from loco_det.convert.sources import Pixels
from loco_det.data.images import read_image
from loco_det.errors import UserError

TOLERANCE = 1e-5
MAX_SIDE = 512
_MODULES = {"stem": "maxpool", "res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


def made_image(height: int = 157, width: int = 221) -> np.ndarray:
    """A picture from a formula: waves of many lengths in each channel, uint8 (H, W, 3). Odd sides test padding."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * fx / 9 + y * fy / 7 + c) for c, (fx, fy) in enumerate([(1, 0.3), (0.2, 1.7), (4.1, 2.9)])]
    mixed = [waves[c] + 0.7 * np.cos((x * y % (91 + 13 * c)) / 5.0) for c in range(3)]
    return np.clip(127.5 + 74 * np.stack(mixed, axis=-1), 0, 255).astype(np.uint8)


def source_model(tensors: dict[str, Tensor], architecture: Architecture, stride_in_1x1: bool) -> nn.Module:
    """torchvision's ResNet holding `tensors` (its names), in eval mode, its classifier removed."""
    block = Bottleneck if architecture.depth >= 50 else BasicBlock
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = TorchvisionResNet(
            block,
            list(BLOCKS[architecture.depth]),
            groups=architecture.groups,
            width_per_group=architecture.width_per_group,
        )
    model.fc = nn.Identity()
    model.to_empty(device="cpu")
    counters = {name: torch.tensor(0) for name, _ in model.named_buffers() if name.endswith("num_batches_tracked")}
    model.load_state_dict({**tensors, **counters}, strict=True)
    if stride_in_1x1:
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    return model.eval()


def prove(
    tensors: dict[str, Tensor],
    exported: dict[str, Tensor],
    architecture: Architecture,
    pixels: Pixels,
    image: str | Path | None = None,
) -> dict[str, Any]:
    """Compare source (`tensors`, torchvision's names) and result (`exported`, Detectron2's names) stage by stage.

    Returns {"image", "tolerance", "float64": {stage: {"max_abs", "relative"}}, "float32": ...}, where relative means
    the largest difference over the largest value of the source's output.

    Raises:
        UserError: a stage differs by more than `TOLERANCE`, or its output is not finite or zero everywhere.
    """
    picture = made_image() if image is None else read_image(image, pixels.order)
    step = -(-max(picture.shape[:2]) // MAX_SIDE)
    picture = picture[::step, ::step]
    height, width = picture.shape[:2]
    values = (torch.from_numpy(picture.astype(np.float64)) - torch.tensor(pixels.mean)) / torch.tensor(pixels.std)
    x = values.permute(2, 0, 1)[None].contiguous()
    name = "an image made by a formula" if image is None else str(image)
    proof: dict[str, Any] = {"image": f"{name} ({width} x {height})", "tolerance": TOLERANCE}
    source = source_model(tensors, architecture, pixels.stride_in_1x1)
    result = architecture.build(stride_in_1x1=pixels.stride_in_1x1, norm="FrozenBN").eval()
    result.load_state_dict(exported, strict=True)
    for kind in ("float64", "float32"):
        dtype = getattr(torch, kind)
        with torch.no_grad():
            expected = _stages(source.to(dtype), x.to(dtype))
            found = result.to(dtype)(x.to(dtype))
        proof[kind] = {stage: _difference(stage, expected[stage], found[stage]) for stage in STAGES}
    return proof


def _stages(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, stage=stage: outputs.__setitem__(stage, output)
        )
        for stage, module in _MODULES.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return outputs


def _difference(stage: str, expected: Tensor, found: Tensor) -> dict[str, float]:
    largest = expected.abs().max().item()
    difference = (expected - found).abs().max().item() if expected.shape == found.shape else float("nan")
    if not 0 < largest < float("inf"):
        raise UserError(
            f"the output of {stage} is {largest:g} at its largest, so these weights cannot be proven; "
            "take weights that were trained"
        )
    if not difference / largest <= TOLERANCE:
        raise UserError(
            f"{stage} of the converted backbone differs from the source by {difference / largest:.2e} (relative), "
            f"more than {TOLERANCE:g}; check --stride-in-1x1 and report the checkpoint"
        )
    return {"max_abs": difference, "relative": difference / largest}
