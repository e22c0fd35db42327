"""ResNets as a list of stages, under Detectron2's parameter names; freezing, and the hash that proves it.

Shape legend: B images of H x W pixels; `stem` has stride 4 (imagenet) or 1 (cifar), each of res3, res4, res5 halves the
map. Pretraining and detector use the same class, so nothing can be lost between the two. Arithmetic and initialisation
follow Detectron2's modeling/backbone/resnet.py, which for `stride_in_1x1=False` is torchvision's ResNet v1.5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loco_det.backbones.folding import convolve

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STAGES = ("stem", "res2", "res3", "res4", "res5")
STEM_CHANNELS = 64


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with constant statistics and affine parameters, all buffers.

    Source: Detectron2 layers/batch_norm.py. If the input needs a gradient, scale and shift are applied as a product,
    which saves one activation less for backward than `F.batch_norm`.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + "num_batches_tracked", None)  # unused training step counter
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LayerNorm(nn.Module):
    """Normalisation over the channels of a map (B, C, H, W), with Detectron2's arithmetic.

    Source: detectron2/layers/batch_norm.py.
    """

    fast = False  # torch's own kernel; the result is a view

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.fast:
            rows = x.permute(0, 2, 3, 1)
            return F.layer_norm(rows, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
        centred = x - x.mean(1, keepdim=True)
        x = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


_NORMS = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "GN": lambda channels: nn.GroupNorm(32, channels),
    "LN": LayerNorm,
}


def make_norm(name: str, channels: int) -> nn.Module:
    """Build Detectron2's normalisation `name`: BN, SyncBN, FrozenBN, GN or LN."""
    return _NORMS[name](channels)


class Conv2d(nn.Conv2d):
    """A bias-free convolution with its normalisation as `.norm`, as in Detectron2."""

    fast = False  # fold a constant normalisation into the weights

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: str, **kwargs: int) -> None:
        dilation = kwargs.get("dilation", 1)
        super().__init__(inputs, outputs, kernel, padding=dilation * (kernel // 2), bias=False, **kwargs)
        self.norm = make_norm(norm, outputs)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, relu: bool = False, add: Tensor | None = None) -> Tensor:
        """Apply convolution and normalisation; optionally the sum with `add` and a ReLU."""
        return convolve(self, x, relu=relu, add=add)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # On a map one pixel wide the horizontal stride has no effect. With a stride above 1, oneDNN (as of torch 2.14)
        # leaves part of the weight's bf16 gradient unwritten there: uninitialised memory becomes gradient.
        if input.shape[-1] == 1 and self.stride[1] > 1:
            stride = (self.stride[0], 1)
            return F.conv2d(input, weight, bias, stride, self.padding, self.dilation, self.groups)
        return super()._conv_forward(input, weight, bias)


class Stem(nn.Module):
    """imagenet: 7x7 stride 2 and a 3x3 max pool of stride 2. cifar: one 3x3 convolution at full resolution."""

    def __init__(self, kind: str, norm: str, channels: int) -> None:
        super().__init__()
        self.pool = kind == "imagenet"
        kernel, stride = (7, 2) if self.pool else (3, 1)
        self.conv1 = Conv2d(3, channels, kernel, norm, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x, relu=True)
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pool else x


class Residual(nn.Module):
    """Base of all blocks: (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    shortcut: nn.Module | None

    def beside(self, x: Tensor) -> Tensor:
        """Compute the shortcut, after the convolutions before the last, in Detectron2's order: it decides the order in
        which gradients of block, shortcut and pyramid are summed, and so the last digit.
        """
        return x if self.shortcut is None else self.shortcut(x)


class BasicBlock(Residual):
    """Two 3x3 convolutions (depth 18 and 34)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, dilation: int = 1) -> None:
        super().__init__()
        new = inputs != outputs or stride != 1
        self.shortcut = Conv2d(inputs, outputs, 1, norm, stride=stride) if new else None
        self.conv1 = Conv2d(inputs, outputs, 3, norm, stride=stride, dilation=dilation)
        self.conv2 = Conv2d(outputs, outputs, 3, norm, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x, relu=True)
        return self.conv2(out, relu=True, add=self.beside(x))


class Bottleneck(Residual):
    """1x1, 3x3, 1x1 convolutions (depth 50 and up); MSRA's weights put the stride in the first 1x1."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        norm: str,
        *,
        middle: int,
        groups: int,
        stride_in_1x1: bool,
        dilation: int,
    ) -> None:
        super().__init__()
        new = inputs != outputs or stride != 1
        self.shortcut = Conv2d(inputs, outputs, 1, norm, stride=stride) if new else None
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = Conv2d(inputs, middle, 1, norm, stride=first)
        self.conv2 = Conv2d(middle, middle, 3, norm, stride=second, groups=groups, dilation=dilation)
        self.conv3 = Conv2d(middle, outputs, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(out, relu=True, add=self.beside(x))


def make_stage(
    name: str,
    depth: int,
    *,
    norm: str = "BN",
    stride_in_1x1: bool = False,
    groups: int = 1,
    width_per_group: int = 64,
    res2_out_channels: int | None = None,
    stem_channels: int = STEM_CHANNELS,
    dilation: int = 1,
) -> nn.Sequential:
    """Build one of res2..res5 as a sequence of blocks; with `dilation` 2 the stage keeps its input's resolution.

    Input (B, channels of the previous stage, H, W); output `stage_channels(...)[name]` channels at half the size
    (res2: the same size).
    """
    level = STAGES.index(name) - 1
    channels = stage_channels(depth, res2_out_channels, stem_channels)
    inputs, outputs = channels[STAGES[level]], channels[name]
    blocks = []
    for index in range(BLOCKS[depth][level]):
        stride = 2 if index == 0 and level > 0 and dilation == 1 else 1
        if depth < 50:
            block: nn.Module = BasicBlock(inputs, outputs, stride, norm, dilation)
        else:
            block = Bottleneck(
                inputs,
                outputs,
                stride,
                norm,
                middle=groups * width_per_group * 2**level,
                groups=groups,
                stride_in_1x1=stride_in_1x1,
                dilation=dilation,
            )
        blocks.append(block)
        inputs = outputs
    return nn.Sequential(*blocks)


def stage_channels(
    depth: int, res2_out_channels: int | None = None, stem_channels: int = STEM_CHANNELS
) -> dict[str, int]:
    """Return the output channels of every stage, {"stem": 64, "res2": 256, ..., "res5": 2048} for depth 50."""
    res2 = res2_out_channels or (64 if depth < 50 else 256)
    return {"stem": stem_channels, **{name: res2 * 2**i for i, name in enumerate(STAGES[1:])}}


def stage_strides(stem: str = "imagenet") -> dict[str, int]:
    """Return the input pixels per pixel of each stage's output."""
    first = 4 if stem == "imagenet" else 1
    return {name: first * 2 ** max(0, i - 1) for i, name in enumerate(STAGES)}


class StagedBackbone(nn.Module):
    """Base of every backbone: `stem` and one `nn.Sequential` of blocks per stage, so that any part can run alone.

    Attributes:
        architecture: its name, e.g. "resnet50".
        depth: number of weighted layers in the name.
        stage_names: its children in order, from "stem" on.
        channels: channels of each stage's output.
        strides: input pixels per pixel of each stage's output; fractional for interpolated maps.
    """

    architecture: str
    depth: int
    stage_names: tuple[str, ...]
    channels: dict[str, int]
    strides: dict[str, float]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> every stage's output by name, (B, channels[name], H / strides[name], ...), rounded."""
        outputs = {}
        for name in self.stage_names:
            x = outputs[name] = getattr(self, name)(x)
        return outputs

    def blocks(self) -> list[tuple[str, str, nn.Module]]:
        """Return (name, stage, module) of every block in order, e.g. "res3.1" of "res3"; each reads the one before."""
        inner = [(f"{name}.{i}", name, b) for name in self.stage_names[1:] for i, b in enumerate(getattr(self, name))]
        return [("stem", "stem", self.stem), *inner]

    def to_map(self) -> nn.Module | None:
        """Return a module that makes a map (B, C, h, w) of what a block gives; None where that is one already."""
        return None


class ResNet(StagedBackbone):
    """A ResNet of `depth` 18, 34, 50, 101 or 152 up to and including `last_stage`: `stem`, `res2`..`last_stage`."""

    def __init__(
        self,
        depth: int,
        *,
        stem: str = "imagenet",
        norm: str = "BN",
        stride_in_1x1: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        res2_out_channels: int | None = None,
        stem_channels: int = STEM_CHANNELS,
        res5_dilation: int = 1,
        last_stage: str = "res5",
    ) -> None:
        super().__init__()
        self.architecture, self.depth = f"resnet{depth}", depth
        self.stage_names = STAGES[: STAGES.index(last_stage) + 1]
        channels = stage_channels(depth, res2_out_channels, stem_channels)
        self.channels = {name: channels[name] for name in self.stage_names}
        strides = stage_strides(stem)
        if res5_dilation == 2:
            strides["res5"] = strides["res4"]
        self.strides = {name: strides[name] for name in self.stage_names}
        self.stem = Stem(stem, norm, stem_channels)
        for name in self.stage_names[1:]:
            stage = make_stage(
                name,
                depth,
                norm=norm,
                stride_in_1x1=stride_in_1x1,
                groups=groups,
                width_per_group=width_per_group,
                res2_out_channels=res2_out_channels,
                stem_channels=stem_channels,
                dilation=res5_dilation if name == "res5" else 1,
            )
            self.add_module(name, stage)


def narrow(depth: int, width: int) -> dict[str, int]:
    """Return the options of a `ResNet` whose stem has `width` instead of 64 channels, and stages in proportion."""
    return {
        "stem_channels": width,
        "res2_out_channels": width if depth < 50 else 4 * width,
        "width_per_group": width,
    }


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Initialise as at construction: Kaiming normal for convolutions, 1 and 0 for normalisation."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            part.reset_parameters()


def freeze(module: nn.Module) -> nn.Module:
    """Freeze `module`: no parameter requires a gradient, every BatchNorm becomes a frozen one.

    Source: Detectron2 CNNBlockBase.freeze. Children are replaced in place; a BatchNorm given itself is returned as its
    frozen replacement.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps).to(module.running_mean)  # its device and dtype
        frozen.load_state_dict(module.state_dict())
        return frozen
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
    for name, child in module.named_children():
        replacement = freeze(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


BatchNorm = nn.modules.batchnorm._BatchNorm


def is_still(module: nn.Module) -> bool:
    """Whether a module is a normalisation whose statistics training does not change.

    That is this package's or Detectron2's FrozenBatchNorm2d, or a BatchNorm without a trainable parameter: those of
    timm's models, which stay in evaluation (`timm_models.TimmBackbone.train`).
    """
    if isinstance(module, BatchNorm):
        return not any(parameter.requires_grad for parameter in module.parameters())
    return type(module).__name__ == "FrozenBatchNorm2d"


@torch.no_grad()
def measure_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set a random model's BatchNorm statistics to plain means over `batches` of (B, 3, H, W).

    Without them activations grow or vanish with depth and "random" would be a degenerate baseline. The model is left in
    training mode.
    """
    norms = [m for m in model.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.momentum for m in norms]
    for norm in norms:
        norm.train()  # of a frozen module of one's own, which otherwise stays in evaluation
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, dtypes, shapes and bytes by sha256, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda item: item[0]):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
