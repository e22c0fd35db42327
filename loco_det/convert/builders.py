"""What a pickle may name, and what each name makes: plain containers, numpy arrays, views of torch storages.

Arrays and tensors are never made here, only described (`Stored`, `TensorView`).

`BUILDERS` holds every name that is answered, by a function of this module that trusts none of its arguments.
`INERT` are settings objects that training scripts save beside the weights; they become an inert `Record`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loco_det.convert.stored import Span, Stored, contiguous_stride

MAX_DIMENSIONS = 16
MAX_LENGTH = 2**40  # of one dimension: products of such numbers still fit where torch multiplies them


class Refused(Exception):
    """The file asks for something that is not plain data; the message completes "FILE ..."."""


@dataclass
class Name:
    """A global that the file names, never looked up."""

    name: str


@dataclass
class Record:
    """An object of a class that is not plain data, kept only as its class's name."""

    name: str


@dataclass
class DType:
    """numpy's dtype while it is built: code "f4", byte order "<", ">" or "|"."""

    code: str
    order: str = "|"


@dataclass
class Array:
    """A numpy array while it is built; pickle makes it empty and gives it its data later."""

    value: Stored | None = None


@dataclass(frozen=True)
class StorageRef:
    """One storage that a torch file refers to; `numel` counts elements, or bytes where `dtype` is None."""

    key: str
    dtype: torch.dtype | None
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A strided view of one storage, checked by `check_view`; numbers count elements."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_NEWER = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = {str(dtype): dtype for dtype in (*_STORAGES.values(), *_NEWER)}
_NUMPY = {
    "b1": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
"""numpy's code of a dtype, less its byte order."""


def finished(value: Any) -> Any:
    """A built array in place of its placeholder; anything else as it is."""
    if not isinstance(value, Array):
        return value
    if value.value is None:
        raise ValueError("an array without data")
    return value.value


def key(value: Any) -> Hashable:
    """`value` if it may be a dictionary key or set member.

    Tuples may not, because hashing a deeply nested one overflows the C stack; nor may numbers beyond 64 bits,
    which can be chosen to collide.
    """
    if not isinstance(value, str | int | float | bytes | None):
        raise Refused(f"uses a {type(value).__name__} as a dictionary key or set member")
    if isinstance(value, int) and value.bit_length() > 64:
        raise Refused("uses a number beyond 64 bits as a dictionary key or set member")
    return value


def set_items(target: dict, items: Sequence[Any]) -> None:
    """Put items k, v, k, v ... into `target`; a key given twice is refused."""
    if len(items) % 2:
        raise ValueError("a dictionary key without a value")
    for name, value in zip(items[::2], items[1::2]):
        if key(name) in target:
            raise Refused(f"gives the key {name!r:.100} twice in one dictionary")
        target[name] = value


def integers(values: Any) -> tuple[int, ...]:
    """A shape or stride as a tuple of whole numbers.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(values, tuple | list) or any(type(v) is not int or v < 0 for v in values):
        raise ValueError("a shape or stride that is no tuple of whole numbers")
    if len(values) > MAX_DIMENSIONS or max(values, default=0) > MAX_LENGTH:
        raise ValueError("a shape or stride of absurd size")
    return tuple(values)


def storage_dtype(name: Any) -> torch.dtype | None:
    """The dtype of the storage class that a persistent id names; None for an untyped one.

    Raises:
        ValueError: it is no storage class.
    """
    if isinstance(name, Name):
        if name.name == "torch.storage.UntypedStorage":
            return None
        if dtype := _storage(name.name):
            return dtype
    raise ValueError("a storage of no known class")


def check_view(storage: StorageRef, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> TensorView:
    """The view, once it is certain in exact integers that it lies inside its storage and does not multiply it.

    Raises:
        ValueError: it does not.
    """
    size, stride, (offset,) = integers(size), integers(stride), integers([offset])
    numel = storage.numel if storage.dtype is not None else storage.numel // dtype.itemsize
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1
    if len(size) != len(stride) or count > numel or (count and last > numel):
        raise ValueError(f"a tensor of shape {list(size)} that does not fit its {numel} stored elements")
    return TensorView(storage, dtype, offset, size, stride)


def array(data: Any, dtype: Any, shape: Any, order: str = "C") -> Stored:
    """A numpy array over `data` (a span of the file, bytes, or text where Python 2 wrote them).

    Raises:
        Refused: its elements are not numbers.
        ValueError: data, dtype and shape do not agree.
    """
    if isinstance(data, str):
        data = data.encode("latin1")
    code = dtype if isinstance(dtype, str) else dtype.order + dtype.code
    kind = _NUMPY.get(code.lstrip("<>=|"))
    if kind is None:
        raise Refused(f"has an array whose elements are {code[:20]!r}, not numbers")
    if isinstance(data, bytes):
        data = Span(data, 0, len(data))
    if not isinstance(data, Span):
        raise Refused("has an array whose data are not bytes")
    shape = integers([shape] if type(shape) is int else shape)
    if math.prod(shape) * kind.itemsize != data.size:
        raise ValueError(f"an array of shape {list(shape)} with {data.size} stored bytes")
    stride = contiguous_stride(shape, fortran=order == "F")
    return Stored(data, kind, 0, shape, stride, swapped=code.startswith(">"))


def _storage(name: str) -> torch.dtype | None:
    match = re.fullmatch(r"torch\.(?:cuda\.)?(\w+)Storage", name)
    return _STORAGES.get(match.group(1)) if match else None


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorView:
    if not isinstance(storage, StorageRef) or storage.dtype is None:
        raise ValueError("a tensor without a storage")
    return check_view(storage, storage.dtype, offset, size, stride)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorView:
    dtype = rest[2]
    if not isinstance(storage, StorageRef) or storage.dtype is not None or not isinstance(dtype, Name):
        raise ValueError("a tensor without a storage or dtype")
    return check_view(storage, _DTYPES[dtype.name], offset, size, stride)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes text as {encoding!r:.30}")
    return text.encode("latin1")


def _bytes(data: Any = b"") -> bytes | Span:
    if not isinstance(data, bytes | Span):  # bytes(n) would allocate whatever the file asks for
        raise Refused("makes bytes of something that is not bytes")
    return data


def _pairs(items: Any = ()) -> dict:
    target: dict = {}
    for name, value in items.items() if isinstance(items, dict) else items:
        set_items(target, [name, value])
    return target


def _members(items: Any = ()) -> frozenset:
    return frozenset(key(item) for item in items)


BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda factory=None, items=(): _pairs(items),
    "builtins.set": lambda items=(): set(_members(items)),
    "builtins.frozenset": _members,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _encode,
    "torch.Size": lambda values=(): integers(values),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "numpy.dtype": lambda code, *_: DType(code),
    "numpy.ndarray": lambda shape, dtype, data: Array(array(data, dtype, shape)),
    "numpy.core.multiarray._reconstruct": lambda *_: Array(),
    "numpy.core.multiarray.scalar": lambda dtype, data: array(data, dtype, ()).read().item(),
    "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order: Array(array(data, dtype, shape, order)),
}
INERT = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w+|pathlib\._local\.\w+|datetime\.\w+|typing\.Any"
    r"|torch\.device|torch\.serialization\._get_layout|(copyreg|copy_reg)\._reconstructor"
    r"|(omegaconf|pytorch_lightning|lightning|lightning_fabric|mmengine|mmcv|fvcore|yacs|detectron2)\.[\w.]+"
)
_WORDS = frozenset(  # admitted as an argument only: calling one is refused
    [f"builtins.{name}" for name in ("list", "dict", "int", "float", "str", "bool", "object")]
    + ["torch.storage.UntypedStorage", *_DTYPES]
)


def admitted(name: str) -> bool:
    """Whether a pickle may name `name` at all."""
    return name in BUILDERS or name in _WORDS or bool(INERT.fullmatch(name)) or _storage(name) is not None
