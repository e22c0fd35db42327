"""Convolution, normalisation, sum and ReLU: rounded as in Detectron2, or folded into one convolution.

With `conv.fast` set, a normalisation that is constant (frozen, or in evaluation) is folded into the weights of its
convolution. On an x86 CPU the convolution then also adds the residual and applies the ReLU, and keeps its weights in
oneDNN's layout. Parameters, buffers, checkpoints and the hash of frozen tensors do not change; results differ by
rounding.

Shape legend: x (B, C, H, W), out channels O, groups G, kernel k.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Packed(NamedTuple):
    """Weights of one convolution with its normalisation folded in; `state` identifies the tensors they come from."""

    state: tuple
    weight: Tensor  # (O, C / G, k, k), in oneDNN's layout if `onednn`
    bias: Tensor | None
    onednn: bool


_packed: WeakKeyDictionary[nn.Conv2d, _Packed] = WeakKeyDictionary()


def convolve(conv: nn.Conv2d, x: Tensor, *, relu: bool = False, add: Tensor | None = None) -> Tensor:
    """Convolution, `conv.norm`, sum with `add` and ReLU: (B, C, H, W) -> (B, O, H', W').

    Args:
        conv: has `norm`, a module or None, and `fast`, whether a constant `norm` is folded into the weights.
        add: not modified; the result shares no memory with it.
    """
    norm = conv.norm
    if not conv.fast or not _is_constant(norm):
        out = conv._conv_forward(x, conv.weight, conv.bias)
        return _finish(out if norm is None else norm(out), add, relu, norm)
    if not len(x) or (torch.is_grad_enabled() and _needs_gradient(conv, x, add)):  # oneDNN accepts no empty batch
        weight, bias = _folded(conv)
        return _finish(conv._conv_forward(x, weight, bias), add, relu)
    with torch.no_grad():
        packed = _pack(conv, x)
        if not packed.onednn:
            return _finish(conv._conv_forward(x, packed.weight, packed.bias), add, relu)
        x = x.to(packed.weight.dtype)
        where = conv.padding, conv.stride, conv.dilation, conv.groups
        if add is None:
            kind = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, packed.weight, packed.bias, *where, kind, [], "")
        return torch.ops.mkldnn._convolution_pointwise(
            x, add.to(x.dtype), packed.weight, packed.bias, *where, "add", 1.0, "relu" if relu else None, [], ""
        )


def _finish(out: Tensor, add: Tensor | None, relu: bool, norm: nn.Module | None = None) -> Tensor:
    if add is not None:
        out += add
    return rectified(out, norm) if relu else out


def rectified(out: Tensor, norm: nn.Module | None) -> Tensor:
    """ReLU of what `norm` gave: in place, unless that is a LayerNorm's view, of which backward would copy the map."""
    gives_view = getattr(norm, "fast", False)
    return F.relu(out) if gives_view and torch.is_grad_enabled() else F.relu_(out)


def _is_constant(norm: nn.Module | None) -> bool:
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return not norm.training and norm.running_mean is not None
    # FrozenBatchNorm2d is in resnet.py, which imports this file.
    return norm is None or (
        hasattr(norm, "running_mean") and not isinstance(norm, nn.modules.instancenorm._InstanceNorm)
    )


def _needs_gradient(conv: nn.Conv2d, x: Tensor, add: Tensor | None) -> bool:
    return x.requires_grad or (add is not None and add.requires_grad) or any(t.requires_grad for t in conv.parameters())


def _folded(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of one convolution equal to `conv` followed by its constant normalisation."""
    norm = conv.norm
    if norm is None:
        return conv.weight, conv.bias
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else norm.bias + shift
    shift = shift if conv.bias is None else shift + conv.bias * scale
    return conv.weight * scale[:, None, None, None], shift


def _pack(conv: nn.Conv2d, x: Tensor) -> _Packed:
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    state = (dtype, *(_identity(t) for t in (*conv.parameters(), *conv.buffers())))
    packed = _packed.get(conv)
    if packed is None or packed.state != state:
        weight, bias = _folded(conv)
        if _onednn_takes(x.device, dtype):
            weight = weight.to(dtype).contiguous().to_mkldnn()
            where = conv.padding, conv.stride, conv.dilation, conv.groups
            weight = torch._C._nn.mkldnn_reorder_conv2d_weight(weight, *where, x.shape)
            packed = _Packed(state, weight, None if bias is None else bias.to(dtype), True)
        elif conv.norm is None:
            packed = _Packed(state, weight, bias, False)
        else:
            packed = _Packed(state, weight.contiguous(memory_format=torch.channels_last), bias, False)
        _packed[conv] = packed
    return packed


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Return address and version, which change when the tensor is replaced, moved or modified."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _onednn_takes(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch._C._get_mkldnn_enabled():
        return False
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):  # an operator of torch's compiler, x86 only
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
