"""Reads a pickle as plain data: Python's own unpickler with an allowlist of names.

`pickle.load` imports and calls whatever a file names. Here nothing is imported. Functions of this module, which trust
none of their arguments, implement the allowed names; any other name becomes a `LeftOut`, and the file's calls to it,
attributes and items are discarded. Tensors and long byte strings stay in the file, as views of the mapped pages.

The unpickler is CPython's pure-Python `pickle._Unpickler` (Lib/pickle.py). The C version hashes nested tuples until the
process crashes, allocates a memo as long as the largest index in the file, and copies every byte.
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

LONG = 4096  # bytes from which on data stays in the file
MAX_NAME = 256  # characters
MAX_DIMENSIONS = 16
MAX_NUMBERS = 2**48  # elements of a tensor; their bytes still fit into 64 bits
SLACK = 2**16  # characters and items that may be copied beyond the length of the input
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)")  # numpy's codes of torch's dtypes


class Refused(Exception):
    """The file requires something that plain data never does; the message completes "FILE ..."."""


@dataclass(frozen=True)
class LeftOut:
    """Placeholder for anything but plain data: only its name is kept, nothing was executed."""

    name: str

    def _drop(self, *_: Any) -> None:
        """Discard an item that a pickle adds."""

    append = extend = add = __setitem__ = _drop

    def __str__(self) -> str:
        return self.name


@dataclass(eq=False)
class Built:
    """An object that pickle creates first and fills later: a numpy array, or a numpy dtype as its code."""

    value: np.ndarray | LeftOut | str | None = None


@dataclass(frozen=True, eq=False)
class Storage:
    """`size` bytes of a mapped file from `start`, and the dtype of their storage class."""

    data: mmap.mmap
    start: int
    size: int
    dtype: torch.dtype


Storages = Callable[[str, torch.dtype, int], Storage | LeftOut]
"""(key, dtype, number of elements) -> where the file has torch's storage of that key."""


def read_pickle(data: mmap.mmap, storages: Storages | None = None) -> Any:
    """Read the pickle at the position of `data`, which then points just behind it.

    Returns:
        Nested dict, list, tuple and set of text, numbers, bytes (`LONG` ones as a uint8 array over the mapped file),
        torch.dtype, tensors over the mapped file, `Built` with an array, allowlisted functions, and `LeftOut`.

    Raises:
        Refused: the file requires something that plain data never does.
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError, ValueError,
            struct.error, pickle.UnpicklingError: damaged.
    """
    return _Unpickler(data, storages).load()


class _Opcodes(dict):
    """Opcode -> handler. A missing opcode is damage, or reaches outside the pickle."""

    def __missing__(self, code: int) -> None:
        raise pickle.UnpicklingError(f"no plain data has the pickle instruction {bytes([code])!r}")


class _Unpickler(pickle._Unpickler):
    def __init__(self, data: mmap.mmap, storages: Storages | None) -> None:
        super().__init__(data)
        self.data, self.readline, self.storages, self.copied = data, data.readline, storages, 0
        self.left_out: dict[str, LeftOut] = {}

    def load(self) -> Any:
        """Load as pickle does, without read-ahead."""
        self.metastack, self.stack, self.proto = [], [], 0
        self.append, take, dispatch = self.stack.append, self.data.read, self.dispatch
        try:
            while True:
                dispatch[take(1)[0]](self)
        except pickle._Stop as stop:
            return stop.value

    def read(self, size: int) -> bytes | np.ndarray:
        """Return the next bytes; long data as an array over the mapped file, unread."""
        if size < LONG:
            return self.data.read(size)
        start = self.data.tell()
        self.data.seek(size, 1)  # ValueError if the file ends earlier
        return np.frombuffer(self.data, np.uint8, size, start)

    def find_class(self, module: str, name: str) -> Any:
        """Look a name up in the allowlist only."""
        if len(module) + len(name) > MAX_NAME:
            raise Refused(f"has a name of {len(module) + len(name):,} letters")
        full = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        shown = "".join(c if c.isprintable() else "?" for c in full)
        return _NAMES.get(full) or self.left_out.setdefault(shown, LeftOut(shown))

    def persistent_load(self, reference: Any) -> Storage | LeftOut:
        """Return the storage for torch's ("storage", class, key, location, number of elements[, None])."""
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
        """Decode Python 2's text; long text is an array's data."""
        return value if isinstance(value, np.ndarray) else value.decode("latin1")

    def _instantiate(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple | list):
            raise ValueError(f"a {type(arguments).__name__} for arguments")
        if isinstance(function, FunctionType):  # allowlisted: there are no other functions
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
        self.stack.pop()  # keyword arguments, which no allowlisted name takes
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
        elif not isinstance(target, dict | LeftOut):  # attributes of an OrderedDict (torch's `_metadata`) are ignored
            raise Refused(f"sets attributes of a {type(target).__name__}")


def _checked(code: bytes, keys: slice, kind: type | None = None, target: int = 0) -> Callable[[_Unpickler], None]:
    """Wrap pickle's own opcode handler: checks that `keys` of the stack are valid keys and that the target is a `kind`.

    The target is at index `target` of the stack, or before the mark.
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
    pickle.BYTEARRAY8: pickle._Unpickler.load_binbytes8,  # allocates nothing before it has read
    pickle.FRAME: lambda machine: machine.read(8),  # read-ahead size, ignored
    pickle.APPEND: _checked(pickle.APPEND, _NONE, list, -2),
    pickle.APPENDS: _checked(pickle.APPENDS, _NONE, list),
    pickle.SETITEM: _checked(pickle.SETITEM, slice(-2, -1), dict, -3),
    pickle.SETITEMS: _checked(pickle.SETITEMS, _EVERY_OTHER, dict),
    pickle.ADDITEMS: _checked(pickle.ADDITEMS, _ALL, set),
    pickle.FROZENSET: _checked(pickle.FROZENSET, _ALL),
    pickle.DICT: _checked(pickle.DICT, _EVERY_OTHER),
}
_OUTSIDE = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)
_Unpickler.dispatch = _Opcodes(pickle._Unpickler.dispatch)
_Unpickler.dispatch.update({code[0]: load for code, load in _CHANGED.items()})
for _code in _OUTSIDE:
    del _Unpickler.dispatch[_code[0]]


# Implementations of the allowlisted names ---------------------------------------------------------------------------


def _key(value: Any) -> Hashable:
    """Return `value` if it is a valid dictionary key or set member: hashing deeper tuples could overflow the stack."""
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
    if not isinstance(data, bytes | np.ndarray):  # bytes(n) would allocate any size
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
    """Return the view of a storage after checking its bounds in exact integers; numbers count elements."""
    if isinstance(storage, LeftOut):
        return storage
    if negated or storage.dtype in _QUANTISED.values():  # or conjugated: differs from the stored data
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
    """Return a numpy array over `data`: bytes of the file, or the text that Python 3 writes for Python 2."""
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
    "torch.storage.UntypedStorage": torch.uint8,  # in bytes
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
