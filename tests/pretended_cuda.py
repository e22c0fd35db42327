"""A pretended GPU: CPU values that say `cuda:0`, refuse what CUDA refuses, and count what the host waits for.

A `Pretended` tensor holds a CPU tensor. Every operation on it, autograd's too, arrives in `__torch_dispatch__`:

- tensors of the CPU among its operands, other than single numbers, are an error, as with CUDA;
- `.numpy()` is an error, and so are, under deterministic algorithms, operations that have none;
- operations that need a value on the host before they can go on are counted by the line of this project that asked:
  `item`, `bool`, `tolist`, `nonzero`, indexing with a mask, `nms`, and copies to and from the host, unless they are
  `non_blocking`.

It proves device logic and counts waits; it runs no CUDA kernel, and shows nothing about time, memory or streams.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
OURS = (str(ROOT / "loco_det"), str(ROOT / "pretrain"))
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default,
         aten.masked_select.default, aten._unique2.default}  # fmt: skip
# No deterministic kernel on CUDA, by torch.use_deterministic_algorithms; torchvision's own raise nothing there.
UNREPEATED = {
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "nll_loss2d_forward",
    "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward", "reflection_pad2d_backward",
    "grid_sampler_2d_backward", "put_", "histc", "_roi_align_backward", "_roi_pool_backward", "_deform_conv2d_backward",
}  # fmt: skip
COPIES = {aten.copy_.default, aten._to_copy.default}


class DeviceMix(RuntimeError):
    """Tensors of two devices meet."""


class Waits:
    """Counts of host waits by (what, file:line of this project)."""

    def __init__(self) -> None:
        self.by_line: Counter[tuple[str, str]] = Counter()

    def add(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        where = "elsewhere"
        if frame is not None:
            where = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        self.by_line[what, where] += 1

    def total(self) -> int:
        return sum(self.by_line.values())

    def clear(self) -> None:
        self.by_line.clear()

    def table(self) -> str:
        return "\n".join(f"{count:5} {what:24} {where}" for (what, where), count in self.by_line.most_common())


waits = Waits()


class Pretended(Tensor):
    """A CPU tensor that says it is on `cuda:0`."""

    elem: Tensor
    __slots__ = ("elem",)

    @staticmethod
    def __new__(cls, elem: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CPU,  # what autograd's engine sees; a real CUDA device would need its threads
            requires_grad=False,
        )
        made.elem = elem
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        waits.add("tolist")
        return self.elem.detach().tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.elem!r})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = Pretended(self.elem.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: int) -> Any:  # a checkpoint holds tensors
        return self.elem.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _check_operands(func, args, kwargs)
        _count(func, args)
        name = func.name().split("::")[1]
        if name.split(".")[0] in UNREPEATED and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        if name in EMULATED:
            return tree_map(_wrap, EMULATED[name](*tree_map(_unwrap, args)))
        inner_args, inner_kwargs = tree_map(_unwrap, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if func.namespace == "c10d":
            return out if not isinstance(out, tuple) else (args[0] if isinstance(out[0], list) else out[0], *out[1:])
        if func is aten.copy_.default and not isinstance(args[0], Pretended):
            return args[0]  # to the host, in place
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_wrap, out))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _unwrap(x: Any) -> Any:
    return x.elem if isinstance(x, Pretended) else x


def _wrap(x: Any) -> Any:
    return Pretended(x) if isinstance(x, Tensor) and not isinstance(x, Pretended) else x


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _check_operands(func: Any, args: Any, kwargs: dict) -> None:
    if func in COPIES or func.namespace == "c10d":
        return
    found = list(_tensors([*args, *kwargs.values()]))
    strangers = [t for t in found if not isinstance(t, Pretended) and t.ndim]
    if strangers and any(isinstance(t, Pretended) for t in found):
        raise DeviceMix(f"{func}: tensors on cuda:0 and cpu, {tuple(strangers[0].shape)}")


def _count(func: Any, args: Any) -> None:
    name = func.name().split("::")[1]
    if func in WAITS or name in ("nms", "repeat_interleave.Tensor"):
        waits.add(name)
    elif name.startswith(("index.", "index_put", "_index_put", "_unsafe_index")):
        masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        single = name.startswith(("index_put", "_index_put")) and args[2].numel() == 1  # then a masked_fill
        if masks and not single:
            waits.add("mask index")
    elif func is aten.copy_.default:
        here, there = (isinstance(t, Pretended) for t in args[:2])
        blocks = not (len(args) > 2 and args[2])
        if here != there and blocks:
            waits.add("copy to host" if there else "copy from host")


# --- kernels that exist for CUDA only ---------------------------------------------------------------------------


def _channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _shaped(v: Tensor, x: Tensor) -> Tensor:
    return v.view([-1 if d == 1 else 1 for d in range(x.ndim)])


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float() if x.itemsize < 4 else x, _channels(x), correction=0)
    return mean, (variance + eps).rsqrt()


def _gather(x, means, inverses, running_mean, running_var, share, eps, counts) -> tuple[Tensor, Tensor]:
    weights = (counts / counts.sum())[:, None]
    mean = (means * weights).sum(0)
    variance = ((inverses**-2 - eps + (means - mean) ** 2) * weights).sum(0)
    if running_mean is not None:
        running_mean.lerp_(mean, share)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), share)
    return mean, (variance + eps).rsqrt()


def _elemt(x, weight, bias, mean, inverse, eps) -> Tensor:
    return ((x - _shaped(mean, x)) * _shaped(inverse * weight, x) + _shaped(bias, x)).to(x.dtype)


def _reduce(gradient, x, mean, inverse, weight, *_: bool) -> tuple[Tensor, ...]:
    total = gradient.sum(_channels(x))
    along = (gradient * (x - _shaped(mean, x))).sum(_channels(x))
    return total, along, along * inverse, total.clone()


def _backward(gradient, x, mean, inverse, weight, total, along, counts) -> Tensor:
    n = counts.sum()
    centred = gradient - _shaped(total / n, x) - (x - _shaped(mean, x)) * _shaped(inverse**2 * along / n, x)
    return (centred * _shaped(inverse * weight, x)).to(x.dtype)


EMULATED = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _backward,
}


# --- the device -------------------------------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class _Device(TorchFunctionMode):
    """Creates and moves tensors to the pretended device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("to", "cpu", "cuda") and args and isinstance(args[0], Tensor):
            return self._moved(func, name, args, kwargs)
        if name == "pin_memory":
            return args[0]
        if name == "one_hot":  # makes tensors inside, on what it takes for the CPU
            return tree_map(_wrap, func(*tree_map(_unwrap, args), **kwargs))
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
            if name in ("tensor", "as_tensor"):
                waits.add(f"torch.{name} on the device")
            return tree_map(_wrap, func(*args, **kwargs))
        if kwargs.get("device") is not None and any(isinstance(a, Pretended) for a in args):  # new_zeros(device=cpu)
            return func(*tree_map(_unwrap, args), **kwargs)
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        target = {"cpu": CPU, "cuda": CUDA}.get(name, kwargs.pop("device", None))
        if name == "to":
            if rest and isinstance(rest[0], Tensor):
                other = rest.pop(0)
                target, kwargs["dtype"] = other.device, other.dtype
            elif rest and isinstance(rest[0], (str, torch.device)):
                target = torch.device(rest.pop(0))
            if rest and isinstance(rest[0], torch.dtype):
                kwargs["dtype"] = rest.pop(0)
            if rest and isinstance(rest[0], bool):
                kwargs["non_blocking"] = rest.pop(0)
        else:
            rest = []
        blocks = not kwargs.pop("non_blocking", False)
        if kwargs.get("dtype", 0) is None:
            kwargs.pop("dtype")
        here, there = isinstance(tensor, Pretended), target is None or _is_cuda(target)
        if target is not None and here != there:
            if blocks:
                waits.add("copy to host" if here else "copy from host")
            tensor = _Move.apply(tensor)
        return Tensor.to(tensor, **kwargs) if kwargs else tensor


class _Move(torch.autograd.Function):
    """From one device to the other, always a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.elem.clone() if isinstance(x, Pretended) else Pretended(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.elem.clone() if isinstance(gradient, Pretended) else Pretended(gradient.clone())


def _no_grad(self: Any) -> None:
    self.without = torch.no_grad()
    self.without.__enter__()


class _Stream:
    """A stream that does at once what it is told."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def pretended_cuda(gpus: int = 1) -> Iterator[Waits]:
    """In this context `cuda` is a device, and `waits` counts from zero."""
    autocast, scaler, enabled = torch.autocast, torch.amp.GradScaler, torch.is_autocast_enabled
    load = torch.load

    def on_cpu(device: str) -> str:
        return "cpu" if device == "cuda" else device

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(on_cpu(device_type), *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Device():
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(torch.amp, "autocast", Autocast)
        patch.setattr(torch.amp, "GradScaler", lambda device="cuda", **kw: scaler(on_cpu(device), **kw))
        patch.setattr(torch, "is_autocast_enabled", lambda device="cuda": enabled(on_cpu(device)))
        patch.setattr(torch, "load", lambda *a, **kw: load(*a, **{**kw, "map_location": "cpu"}))
        patch.setattr(Tensor, "record_stream", lambda *_: None)
        # Wrappers cannot be made in inference mode; decorators made of it before are changed, too.
        patch.setattr(torch.inference_mode, "__enter__", _no_grad)
        patch.setattr(torch.inference_mode, "__exit__", lambda self, *_: self.without.__exit__(None, None, None))
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: gpus,
            "set_device": lambda _: None,
            "current_device": lambda: 0,
            "synchronize": lambda *_: None,
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": lambda *_: None,
            "get_device_name": lambda *_: "pretended",
            "get_device_capability": lambda *_: (8, 0),
            "Stream": _Stream,
            "stream": lambda stream: stream,
            "current_stream": _Stream,
            "is_bf16_supported": lambda *_: True,
            "is_current_stream_capturing": lambda: False,
        }.items():
            patch.setattr(torch.cuda, name, value)
        if hasattr(torch, "accelerator"):
            patch.setattr(torch.accelerator, "current_stream", _Stream)
        # A module's parameters are replaced, not given other data in place, which a wrapper has none of.
        replaced = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        waits.clear()
        try:
            yield waits
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(replaced)
