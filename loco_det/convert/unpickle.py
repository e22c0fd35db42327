"""Reads a pickle as plain data: Python's own unpickler, with an allow-list of what a name may stand for.

`pickle.load` imports and calls whatever a file names. Here nothing is imported. A name on the list is answered by a
function of this module that trusts none of its arguments; any other becomes a `LeftOut`, and what the file calls with
it, sets on it or puts into it is dropped. Tensors and long runs of bytes stay in the file, as views of its pages.

The machine is CPython's `pickle._Unpickler` (Lib/pickle.py), the one in Python. The one in C hashes nested tuples
until the process crashes, allocates a memo as long as the largest index in the file, and copies every byte.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

LONG = 4096  # bytes, from which on data stay in the file
MAX_NAME = 256  # letters
MAX_DIMENSIONS = 16
MAX_NUMBERS = 2**48  # of a tensor: their bytes can still be counted in 64 bits
SLACK = 2**16  # letters and items that may be copied beyond the length of what was read
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")  # numpy's codes of the dtypes that torch has


class Refused(Exception):
    """The file asks for what plain data never needs; the message completes "FILE ..."."""


@dataclass(frozen=True)
class LeftOut:
    """What stands in place of anything that is not plain data: only its name, and nothing of it was run."""

    name: str

    def _drop(self, *_: Any) -> None:
        """What a pickle puts into it."""

    append = extend = add = __setitem__ = _drop

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Built:
    """What pickle makes first and fills later: a numpy array, or numpy's dtype as its code."""

    value: np.ndarray | LeftOut | str | None = None


@dataclass(frozen=True, eq=False)
class Storage:
    """`size` bytes of a mapped file from `start`, and the dtype that their class names."""

    data: mmap.mmap
    start: int
    size: int
    dtype: torch.dtype


Storages = Callable[[str, torch.dtype, int], Storage | LeftOut]
"""(key, dtype, number of elements) -> where the file has torch's storage of that key."""


def read_pickle(data: mmap.mmap, storages: Storages | None = None) -> Any:
    """The pickle at the place of `data`, which is left just behind it.

    Returns:
        Nested dict, list, tuple and set of text, numbers, bytes (`LONG` ones as a uint8 array over the file's pages),
        torch.dtype, tensors over the file's pages, `Built` with an array, functions of the list, and `LeftOut`.

    Raises:
        Refused: the file asks for what plain data never needs.
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
            struct.error, pickle.UnpicklingError: damaged.
    """
    return _Unpickler(data, storages).load()


class _Instructions(dict):
    """Code -> what it does. What is missing is damage, or reaches for what is outside the pickle."""

    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"no plain data has the pickle instruction {bytes([code])!r}")


class _Unpickler(pickle._Unpickler):
    def __init__(self, data: mmap.mmap, storages: Storages | None) -> None:
        super().__init__(data)
        self.data, self.readline, self.storages, self.copied = data, data.readline, storages, 0
        self.left_out: dict[str, LeftOut] = {}

    def load(self) -> Any:
        """As pickle's, less the reading ahead."""
        self.metastack, self.stack, self.proto = [], [], 0
        self.append, take, dispatch = self.stack.append, self.data.read, self.dispatch
        try:
            while True:
                dispatch[take(1)[0]](self)
        except pickle._Stop as stop:
            return stop.value

    def read(self, size: int) -> bytes | np.ndarray:
        """The next bytes; what is long is not read but given as an array over the file's pages."""
        if size < LONG:
            return self.data.read(size)
        start = self.data.tell()
        self.data.seek(size, 1)  # a ValueError where the file ends before
        return np.frombuffer(self.data, np.uint8, size, start)

    def find_class(self, module: str, name: str) -> Any:
        """What the file gets for a name: nothing is looked up but the list."""
        if len(module) + len(name) > MAX_NAME:
            raise Refused(f"has a name of {len(module) + len(name):,} letters")
        full = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        shown = "".join(c if c.isprintable() else "?" for c in full)
        return _NAMES.get(full) or self.left_out.setdefault(shown, LeftOut(shown))

    def persistent_load(self, reference: Any) -> Storage | LeftOut:
        """The storage of torch's ("storage", class, key, location, number of elements[, None])."""
        known = isinstance(reference, tuple) and reference[:1] in (("storage",), ("module",))
        if self.storages is None or not known:
            raise Refused("refers to data outside the file (a persistent id)")
        if isinstance(reference[1], LeftOut):  # an unknown storage, or the class of a whole module
            return reference[1]
        _, dtype, key, _, numel, *view = reference
        whole = isinstance(dtype, torch.dtype) and isinstance(key, str) and type(numel) is int and numel >= 0
        if not whole or any(v is not None for v in view):
            raise ValueError("a storage without class, key or size")
        return self.storages(key, dtype, numel)

    def _decode_string(self, value: bytes | np.ndarray) -> str | np.ndarray:
        """Python 2's text, which is an array's data where it is long."""
        return value if isinstance(value, np.ndarray) else value.decode("latin1")

    def _instantiate(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple | list):
            raise ValueError(f"a {type(arguments).__name__} for arguments")
        if isinstance(function, FunctionType):  # of the list: there are no others here
            self.copied += sum(len(a) for a in arguments if isinstance(a, str | list | tuple | dict | set | frozenset))
            if self.copied > self.data.tell() + SLACK:
                raise Refused("copies the same data many times over")
            function = function(*arguments)
        elif not isinstance(function, LeftOut):
            raise Refused(f"calls a {type(function).__name__}")
        self.append(function)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._instantiate(function, arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name, which nothing on the list has
        self.load_reduce()

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Built) and not isinstance(state, tuple):
            raise ValueError(f"a {type(state).__name__} for an array's state")
        if isinstance(target, Built) and isinstance(target.value, str):
            target.value = f"{state[1]}{target.value}" if state[1] in ("<", ">", "|", "=") else "?"
        elif isinstance(target, Built):
            _version, shape, dtype, fortran, data = state
            target.value = _array(data, dtype, shape, "F" if fortran else "C").value
        elif not isinstance(target, dict | LeftOut):  # an OrderedDict's attributes (torch's `_metadata`) are not needed
            raise Refused(f"sets attributes of a {type(target).__name__}")


def _filling(code: bytes, keys: slice, kind: type | None = None, target: int = 0) -> Callable[[_Unpickler], None]:
    """pickle's own instruction, once `keys` of the stack may be keys and what it fills is a `kind`: not a tensor.

    That stands at `target` of the stack, or before the mark.
    """
    load = pickle._Unpickler.dispatch[code[0]]

    def checked(machine: _Unpickler) -> None:
        for value in machine.stack[keys]:
            _key(value)
        if kind is not None:
            filled = machine.stack[target] if target else machine.metastack[-1][-1]
            if not isinstance(filled, (kind, LeftOut)):
                raise ValueError(f"items of a {kind.__name__} for a {type(filled).__name__}")
        load(machine)

    return checked


_ALL, _EVERY_OTHER, _NONE = slice(None), slice(None, None, 2), slice(0)
_CHANGED = {
    pickle.REDUCE: _Unpickler.load_reduce,
    pickle.NEWOBJ: _Unpickler.load_reduce,
    pickle.NEWOBJ_EX: _Unpickler.load_newobj_ex,
    pickle.BUILD: _Unpickler.load_build,
    pickle.BYTEARRAY8: pickle._Unpickler.load_binbytes8,  # which allocates nothing before it has read
    pickle.FRAME: lambda machine: machine.read(8),  # how much to read ahead
    pickle.APPEND: _filling(pickle.APPEND, _NONE, list, -2),
    pickle.APPENDS: _filling(pickle.APPENDS, _NONE, list),
    pickle.SETITEM: _filling(pickle.SETITEM, slice(-2, -1), dict, -3),
    pickle.SETITEMS: _filling(pickle.SETITEMS, _EVERY_OTHER, dict),
    pickle.ADDITEMS: _filling(pickle.ADDITEMS, _ALL, set),
    pickle.FROZENSET: _filling(pickle.FROZENSET, _ALL),
    pickle.DICT: _filling(pickle.DICT, _EVERY_OTHER),
}
_OUTSIDE = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
_Unpickler.dispatch = _Instructions(pickle._Unpickler.dispatch)
_Unpickler.dispatch.update({code[0]: load for code, load in _CHANGED.items()})
for _code in _OUTSIDE:
    del _Unpickler.dispatch[_code[0]]


# What the names on the list make ------------------------------------------------------------------------------------


def _key(value: Any) -> Hashable:
    """`value` if it may be a dictionary's key or a set's member: hashing deeper tuples could overflow the stack."""
    for member in value if isinstance(value, tuple) else (value,):
        if not isinstance(member, str | int | float | bytes | LeftOut | None):
            raise Refused(f"uses a {type(member).__name__} as a dictionary key or set member")
        if isinstance(member, int) and member.bit_length() > 64:
            raise Refused("uses a number beyond 64 bits as a dictionary key or set member")
    return value


def _pairs(items: Any = ()) -> dict:
    pairs = [*items.items()] if isinstance(items, dict) else items
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        raise ValueError("a dictionary of no pairs")
    return {_key(key): value for key, value in pairs}


def _members(items: Any = ()) -> frozenset:
    if not isinstance(items, list | tuple | set | frozenset):
        raise ValueError(f"a set of the members of a {type(items).__name__}")
    return frozenset(map(_key, items))


def _bytes(data: Any = b"") -> Any:
    if not isinstance(data, bytes | np.ndarray):  # bytes(n) would allocate whatever the file asks for
        raise Refused("makes bytes of something that is not bytes")
    return data


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes text as {encoding!r:.30}")
    return text.encode("latin1")


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or any(type(v) is not int or not 0 <= v < 2**40 for v in values):
        raise ValueError("a shape or stride that is no tuple of sizes")
    if len(values) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(values)} dimensions")
    return tuple(values)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any = None, negated: Any = None
) -> Tensor | LeftOut:
    """The view of a storage, once it is certain in exact integers that it lies inside; numbers count elements."""
    if isinstance(storage, LeftOut):
        return storage
    if negated or storage.dtype in _QUANTISED.values():  # or conjugated: it is not what is stored
        return LeftOut("tensor that is no plain one")
    dtype = dtype or storage.dtype
    shape, stride, (offset,) = _integers(shape), _integers(stride), _integers([offset])
    count = math.prod(shape)
    if len(shape) != len(stride) or count > MAX_NUMBERS:
        raise ValueError(f"a tensor of shape {list(shape)} and strides {list(stride)}")
    extent = sum((n - 1) * step for n, step in zip(shape, stride)) + 1 if count else 0
    if (offset + extent) * dtype.itemsize > storage.size:
        raise ValueError(f"a tensor of shape {list(shape)} that does not fit its {storage.size} stored bytes")
    if not extent:
        return torch.empty(shape, dtype=dtype)
    start = storage.start + offset * dtype.itemsize
    return torch.frombuffer(storage.data, dtype=dtype, count=extent, offset=start).as_strided(shape, stride)


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Built:
    """A numpy array over `data`: bytes of the file, or the text that Python 3 makes of them for Python 2."""
    code = dtype.value if isinstance(dtype, Built) else dtype
    if not _NUMBERS.fullmatch(code):
        return Built(LeftOut("numpy.ndarray of no numbers"))
    flat = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, np.dtype(code))
    shape = _integers((shape,) if type(shape) is int else shape)
    if math.prod(shape) != flat.size:
        raise ValueError(f"an array of shape {list(shape)} with {flat.nbytes} stored bytes")
    return Built(flat.reshape(shape, order="F" if order == "F" else "C"))


def _scalar(dtype: Any, data: Any) -> Any:
    value = _array(data, dtype, ()).value
    return value if isinstance(value, LeftOut) else value.item()


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
_QUANTISED = {"QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32}
_NEWER = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
_NAMES: dict[str, Callable[..., Any] | torch.dtype] = {
    **{str(dtype): dtype for dtype in (*_STORAGES.values(), *_NEWER)},
    **{
        f"torch.{place}{kind}Storage": dtype
        for kind, dtype in (_STORAGES | _QUANTISED).items()
        for place in ("", "cuda.")
    },
    "torch.storage.UntypedStorage": torch.uint8,  # counted in bytes
    "torch.Size": lambda values=(): _integers(values),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda s, o, n, t, _grad, _hooks, neg=None: _tensor(s, o, n, t, None, neg),
    "torch._utils._rebuild_tensor_v3": lambda s, o, n, t, _grad, _hooks, kind, neg=None: _tensor(s, o, n, t, kind, neg),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "numpy.dtype": lambda code, *_: Built(code if isinstance(code, str) and len(code) < 4 else "?"),
    "numpy.ndarray": lambda shape, dtype, data: _array(data, dtype, shape),
    "numpy.core.multiarray._reconstruct": lambda *_: Built(),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda _factory=None, items=(): _pairs(items),
    "builtins.set": lambda items=(): set(_members(items)),
    "builtins.frozenset": _members,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _encode,
}
