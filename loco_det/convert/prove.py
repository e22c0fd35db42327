"""Proves a conversion: one image through the source's model with the weights as read, and through ours as written.

Shape legend: the image is (1, 3, H, W); outputs are compared after the stem's pool and after each of four stages.
torchvision's and timm's ResNets are independent implementations, so a wrong name, stride or norm shows as a difference.
If a code base keeps torchvision's layers under torchvision's names, or in a Sequential, the source model loads the
tensors under the file's own names, without our name table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from loco_det.backbones.resnet import BLOCKS, STAGES
from loco_det.convert.architecture import Architecture
from loco_det.convert.load import in_memory
from loco_det.convert.sources import WRAPPERS
from loco_det.core.errors import UserError
from loco_det.images.decode import read_image

if TYPE_CHECKING:
    from loco_det.convert.report import Account

TOLERANCE = 1e-5
MAX_SIDE = 160
PHOTOGRAPH = "mpl-data/sample_data/grace_hopper.jpg"  # in the wheels of matplotlib, which is a dependency
_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_CHILDREN = {name: str(i) for i, name in enumerate(_LAYERS)}
_STAGES = dict(zip(STAGES, ("maxpool", "layer1", "layer2", "layer3", "layer4")))


@dataclass
class Witness:
    """A network to compare the conversion with.

    Attributes:
        name: its name in the proof.
        model: the network, on the meta device.
        stages: our stage -> the model's module with that stage's output.
        tensors: the source's, under the model's names.
        named: whether the file names this network, which may then have other operations.
    """

    name: str
    model: nn.Module
    stages: dict[str, str]
    tensors: Mapping[str, Tensor]
    named: bool = False


def made_image(height: int = 157, width: int = 221) -> np.ndarray:
    """Return a synthetic image: waves of many lengths in each channel, uint8 (H, W, 3). Odd sides test padding."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * fx / 9 + y * fy / 7 + c) for c, (fx, fy) in enumerate([(1, 0.3), (0.2, 1.7), (4.1, 2.9)])]
    mixed = [waves[c] + 0.7 * np.cos((x * y % (91 + 13 * c)) / 5.0) for c in range(3)]
    return np.clip(127.5 + 74 * np.stack(mixed, axis=-1), 0, 255).astype(np.uint8)


def proof_image(path: str | Path | None, order: str) -> tuple[str, np.ndarray]:
    """Return the image's name, and uint8 (H, W, 3) pixels in `order`, at most `MAX_SIDE` a side.

    The image is `path`, else matplotlib's photograph, else `made_image` if a distribution left that out.
    """
    photograph = _photograph()
    if path is not None:
        name, picture = str(path), read_image(path, order)
    elif photograph is not None:
        name, picture = f"matplotlib's {photograph.name}", read_image(photograph, order)
    else:
        name, picture = "an image made by a formula", made_image()
    step = -(-max(picture.shape[:2]) // MAX_SIDE)
    picture = picture[::step, ::step]
    return f"{name} ({picture.shape[1]} x {picture.shape[0]})", picture


def _photograph() -> Path | None:
    found = importlib.util.find_spec("matplotlib")
    path = Path(found.origin).parent / PHOTOGRAPH if found and found.origin else None
    return path if path and path.is_file() else None


def witnesses(account: Account) -> Iterator[Witness]:
    """Yield the source's own network: torchvision's, and timm's if the file is or may be timm's."""
    arch, converted, stride = account.architecture, account.converted, account.pixels.stride_in_1x1
    model = torchvision_model(arch, stride)
    if account.naming == "children":
        chain = nn.Sequential(*(model.get_submodule(name) for name in _LAYERS))
        stages = {stage: _CHILDREN[name] for stage, name in _STAGES.items()}
        keys = {name: WRAPPERS.sub("", account.keys[name]) for name in converted}
        own = {keys[name][len(account.prefix) :]: tensor for name, tensor in converted.items()}
        yield Witness(f"torchvision {torchvision.__version__} as a Sequential, the file's names", chain, stages, own)
    else:
        names = "the file's names" if account.naming == "torchvision" else "names by our table"
        yield Witness(f"torchvision {torchvision.__version__}, {names}", model, _STAGES, converted)
    if account.timm:
        import timm

        own = _named_timm_model(account)
        name = f"timm {timm.__version__}{f', its {account.network}' if own else ''}, the file's names"
        yield Witness(name, own or timm_model(arch, stride), _STAGES, converted, named=own is not None)


def torchvision_model(architecture: Architecture, stride_in_1x1: bool = False) -> nn.Module:
    """Return torchvision's ResNet on the meta device, in eval mode, without its classifier."""
    block = Bottleneck if architecture.depth >= 50 else BasicBlock
    with torch.device("meta"):
        model = TorchvisionResNet(
            block,
            list(BLOCKS[architecture.depth]),
            groups=architecture.groups,
            width_per_group=architecture.width_per_group,
        )
    model.fc = nn.Identity()
    if stride_in_1x1:
        _stride_first(model)
    return model.eval()


def _stride_first(model: nn.Module) -> None:
    """Move the stride of every bottleneck to its first convolution, as in MSRA's weights."""
    for module in model.modules():
        if type(module).__name__ == "Bottleneck":
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride


def _named_timm_model(account: Account) -> nn.Module | None:
    """Return the timm network that the file names, if it has the recognised network's tensors.

    Other networks can have exactly the tensors of a ResNet: resnetblur50 blurs before it strides.
    """
    import timm

    if not account.network or not timm.is_model(account.network):
        return None
    model = timm.create_model(account.network, num_classes=0)  # it creates the blur filters itself
    shapes = {n: t.shape for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    if shapes != {name: tensor.shape for name, tensor in account.converted.items()}:
        return None
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"))
    if account.pixels.stride_in_1x1:
        _stride_first(model)
    return model.eval()


def timm_model(architecture: Architecture, stride_in_1x1: bool = False) -> nn.Module:
    """Return timm's ResNet, as `torchvision_model`."""
    from timm.models import resnet as timm_resnet

    with torch.device("meta"):
        model = timm_resnet.ResNet(
            timm_resnet.Bottleneck if architecture.depth >= 50 else timm_resnet.BasicBlock,
            BLOCKS[architecture.depth],
            num_classes=0,
            cardinality=architecture.groups,
            base_width=architecture.width_per_group,
        )
    if stride_in_1x1:
        _stride_first(model)
    return model.eval()


def prove(account: Account, exported: Mapping[str, Tensor], image: str | Path | None = None) -> dict[str, Any]:
    """Compare the source of `account` with the result (`exported`, Detectron2's names) stage by stage.

    Only one layer at a time is in memory. Returns {"image", "models", "tolerance", "float64": {stage: {"max_abs",
    "relative"}}, "float32": ...}. "relative" is the largest difference over the largest value of the source's output;
    of several source models the worst counts.

    Raises:
        UserError: a stage differs by more than `TOLERANCE`, or its output is not finite or is all zero.
    """
    pixels = account.pixels
    name, picture = proof_image(image, pixels.order)
    values = (torch.from_numpy(picture.astype(np.float64)) - torch.tensor(pixels.mean)) / torch.tensor(pixels.std)
    x = values.permute(2, 0, 1)[None].contiguous()
    with torch.device("meta"):
        result = account.architecture.build(stride_in_1x1=pixels.stride_in_1x1, norm="FrozenBN").eval()
    sources = list(witnesses(account))
    proof: dict[str, Any] = {"image": name, "models": [w.name for w in sources], "tolerance": TOLERANCE}
    own = {stage: stage for stage in STAGES}
    for kind in ("float64", "float32"):
        dtype = getattr(torch, kind)
        found = _stages(result, own, exported, x.to(dtype))
        compared = []
        for source in sources:
            try:
                expected = _stages(source.model, source.stages, source.tensors, x.to(dtype))
            except RuntimeError as error:
                if not source.named:
                    raise
                raise UserError(f"{source.name} does not take the proof's image ({error}), so it is another network "
                                "than the ResNet that would be written") from error  # fmt: skip
            try:
                compared.append({stage: difference(stage, expected[stage], found[stage]) for stage in STAGES})
            except UserError as error:
                raise UserError(f"{error}; compared with {source.name}") from error
        proof[kind] = {stage: max((c[stage] for c in compared), key=lambda d: d["relative"]) for stage in STAGES}
    return proof


@torch.no_grad()
def _stages(model: nn.Module, stages: dict[str, str], tensors: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Compute every stage's output for `x`, in its dtype."""
    outputs: dict[str, Tensor] = {}
    for module in model.modules():  # buffers that are no weights, such as blur filters
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.is_floating_point():
                module._buffers[name] = buffer.to(x.dtype)
    hooks = [
        model.get_submodule(module).register_forward_hook(
            lambda _module, _inputs, output, stage=stage: outputs.__setitem__(stage, output)
        )
        for stage, module in stages.items()
    ]
    with _layerwise(model, tensors, x.dtype):
        model(x)
    for hook in hooks:
        hook.remove()
    return outputs


@contextmanager
def _layerwise(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Load each layer's tensors only during its own forward, so that never all are in memory.

    Raises:
        RuntimeError: the names and shapes of `tensors` are not exactly the model's.
    """
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    if shapes != {n: tuple(t.shape) for n, t in tensors.items()}:
        odd = sorted(shapes.items() ^ {n: tuple(t.shape) for n, t in tensors.items()}.items())
        raise RuntimeError(f"the model and its tensors differ in {odd[0]}")
    hooks = []
    for prefix, layer in model.named_modules():
        for slots in (layer._parameters, layer._buffers):
            for name, empty in list(slots.items()):
                full = f"{prefix}.{name}" if prefix else name
                if full in tensors:
                    hooks.append(layer.register_forward_pre_hook(_load_before(slots, name, tensors[full], dtype)))
                    hooks.append(layer.register_forward_hook(_free_after(slots, name, empty)))
    yield
    for hook in hooks:
        hook.remove()


def _load_before(slots: dict, name: str, tensor: Tensor, dtype: torch.dtype) -> Any:
    def load(*_: Any) -> None:
        value = in_memory(tensor).to(dtype)
        slots[name] = nn.Parameter(value, requires_grad=False) if isinstance(slots[name], nn.Parameter) else value

    return load


def _free_after(slots: dict, name: str, empty: Tensor) -> Any:
    return lambda *_: slots.__setitem__(name, empty)


def difference(stage: str, expected: Tensor, found: Tensor) -> dict[str, float]:
    largest = expected.abs().max().item()
    apart = (expected - found).abs().max().item() if expected.shape == found.shape else float("nan")
    if not 0 < largest < float("inf"):
        raise UserError(
            f"the output of {stage} is {largest:g} at its largest, so these weights cannot be proven; "
            "take weights that were trained"
        )
    if not apart / largest <= TOLERANCE:
        raise UserError(
            f"{stage} of the converted backbone differs from the source by {apart / largest:.2e} (relative), "
            f"more than {TOLERANCE:g}; check --stride-in-1x1 and report the checkpoint"
        )
    return {"max_abs": apart, "relative": apart / largest}
