"""A pickle reader that runs nothing: it interprets the instructions itself and knows only plain data and arrays.

`pickle.load` calls whatever a file names. Here a name is only ever a word, answered from the table in `builders`
or refused; nothing is imported. No size in the file is believed before the bytes for it were seen, and what is
copied is charged against what was read, so memory stays within a small multiple of the file's size. Long runs of
bytes, which are the weights, are passed over and stay in the file.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from loco_det.convert.builders import (
    BUILDERS,
    INERT,
    Array,
    DType,
    Name,
    Record,
    Refused,
    admitted,
    array,
    finished,
    key,
    set_items,
)
from loco_det.convert.stored import Span

MAX_INSTRUCTIONS = 2_000_000  # a ResNet-152 with its optimizer state takes about 30,000
LONG = 4096  # bytes, from which on data stay in the file
SLACK = 2**16  # copies allowed beyond what was read

MALFORMED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""What damaged bytes make a parser raise."""


@dataclass
class _Machine:
    """The pickle virtual machine, less everything that calls."""

    persistent: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    position: int = 0
    copied: int = 0

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def charge(self, *values: Any) -> None:
        """Count what building from `values` may copy: a short file must not copy one long value many times."""
        self.copied += sum(len(v) for v in values if isinstance(v, str | list | tuple | dict | set | frozenset))
        if self.copied > self.position + SLACK:
            raise Refused("copies the same data many times over")


def read_pickle(
    stream: Any,
    persistent: Callable[[Any], Any] | None = None,
    span: Callable[[int, int], Span] | None = None,
    instructions: int = MAX_INSTRUCTIONS,
) -> Any:
    """One pickle of at most so many `instructions` from `stream`, a file with read, readline, tell and seek, which is
    left just behind it.

    `persistent` answers persistent ids, which torch uses for storages. `span` gives the bytes at (start, size) of
    `stream`; without it they are copied. Containers come back as dict, list, tuple and set; numpy's arrays as
    `Array`; `TensorView` stands for torch's tensors.

    Raises:
        Refused: the pickle names anything but plain data and arrays.
        MALFORMED: damaged.
    """
    machine = _Machine(persistent or _no_persistent)
    for count, (name, argument, position) in enumerate(_instructions(stream, span)):
        if count > instructions:
            raise Refused(f"has more than {instructions:,} pickle instructions")
        machine.position = position
        if name == "STOP":
            break
        if name in _PUSH_ARGUMENT:
            machine.stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _OPERATIONS:
            _OPERATIONS[name](machine, argument)
        else:
            raise Refused(f"uses the pickle instruction {name}, which plain data never needs")
    return machine.stack.pop()


def _instructions(stream: Any, span: Callable[[int, int], Span] | None) -> Iterator[tuple[str, Any, int]]:
    """(name, argument, place) of every instruction, endlessly: the reader stops at STOP."""
    while True:
        position = stream.tell()
        code = stream.read(1).decode("latin1")
        if code not in pickletools.code2op:
            raise ValueError(f"no pickle instruction {code!r}" if code else "a pickle without its end")
        opcode = pickletools.code2op[code]
        argument = None
        if opcode.arg is not None:
            argument = span and opcode.name in _DATA and _in_place(stream, _DATA[opcode.name], span)
            argument = argument or opcode.arg.reader(stream)
        yield opcode.name, argument, position


def _in_place(stream: Any, length: str, span: Callable[[int, int], Span]) -> Span | None:
    """The bytes whose length stands next in `stream`, passed over; None, and nothing read, if they are short."""
    start = stream.tell()
    head = stream.read(struct.calcsize(length))
    (size,) = struct.unpack(length, head)
    if size < LONG:
        stream.seek(start)
        return None
    stream.seek(size, 1)  # a ValueError where the file ends before
    return span(start + len(head), size)


def _no_persistent(_: Any) -> Any:
    raise Refused("refers to data outside the pickle (a persistent id)")


def _mark(m: _Machine, _: Any) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _put(m: _Machine, index: int | None) -> None:
    m.memo[len(m.memo) if index is None else index] = m.stack[-1]


def _append(m: _Machine, _: Any) -> None:
    value = m.stack.pop()
    _top(m, list).append(value)


def _appends(m: _Machine, _: Any) -> None:
    items = m.pop_mark()
    _top(m, list).extend(items)


def _setitem(m: _Machine, _: Any) -> None:
    value, name = m.stack.pop(), m.stack.pop()
    set_items(_top(m, dict), [name, value])


def _setitems(m: _Machine, _: Any) -> None:
    items = m.pop_mark()
    set_items(_top(m, dict), items)


def _additems(m: _Machine, _: Any) -> None:
    items = m.pop_mark()
    _top(m, set).update(key(item) for item in items)


def _top(m: _Machine, kind: type) -> Any:
    top = m.stack[-1]
    if isinstance(top, Record):  # a settings library's own list or dict: what is in it is not needed
        return kind()
    if type(top) is not kind:
        raise ValueError(f"{kind.__name__} items for a {type(top).__name__}")
    return top


def _dict(m: _Machine, _: Any) -> None:
    target: dict = {}
    set_items(target, m.pop_mark())
    m.stack.append(target)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def build(m: _Machine, _: Any) -> None:
        items = tuple(m.stack[-count:])
        if len(items) != count:
            raise ValueError("a tuple of too few items")
        m.stack[-count:] = [items]

    return build


def _push(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(make())


def _from_mark(make: Callable[[list], Any]) -> Callable[[_Machine, Any], None]:
    def build(m: _Machine, _: Any) -> None:
        made = make(m.pop_mark())  # before the stack is looked up: it is another one afterwards
        m.stack.append(made)

    return build


def _get(m: _Machine, index: int) -> None:
    m.stack.append(m.memo[index])


def _global(m: _Machine, argument: str | None) -> None:
    if argument is None:  # STACK_GLOBAL
        name, module = m.stack.pop(), m.stack.pop()
    else:
        module, _, name = argument.partition(" ")
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a global whose name is not text")
    full = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
    if not admitted(full):
        raise Refused(f"asks for {full[:80]!r}, which is no plain data")
    m.stack.append(Name(full))


def _reduce(m: _Machine, _: Any) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise Refused("calls something that is not the name of a plain type")
    if function.name in BUILDERS:
        m.charge(*arguments)
        m.stack.append(BUILDERS[function.name](*(finished(a) for a in arguments)))
    elif INERT.fullmatch(function.name):
        m.stack.append(Record(function.name))
    else:
        raise Refused(f"calls {function.name}")


def _build(m: _Machine, _: Any) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if isinstance(target, Array):
        _version, shape, dtype, fortran, data = state
        m.charge(data)
        target.value = array(data, dtype, shape, "F" if fortran else "C")
    elif isinstance(target, DType):
        target.order = state[1]
    elif type(target) is not dict and not isinstance(target, Record):
        # An OrderedDict's own attributes (torch's `_metadata`) and a settings object's are not needed.
        raise Refused(f"sets attributes of a {type(target).__name__}")


_DATA = {"BINSTRING": "<i", "BINBYTES": "<I", "BINBYTES8": "<Q", "BYTEARRAY8": "<Q"}
"""Instructions that carry data -> how the length before them is written."""
_PUSH = re.compile(
    r"(BIN)?INT[12]?|LONG[14]?|(BIN)?FLOAT|(SHORT_)?(BIN)?STRING|(SHORT_)?(BIN)?UNICODE8?|(SHORT_)?BINBYTES8?|BYTEARRAY8"
)
_PUSH_ARGUMENT = frozenset(code.name for code in pickletools.opcodes if _PUSH.fullmatch(code.name))
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "NONE": _push(lambda: None),
    "NEWTRUE": _push(lambda: True),
    "NEWFALSE": _push(lambda: False),
    "EMPTY_LIST": _push(list),
    "EMPTY_DICT": _push(dict),
    "EMPTY_TUPLE": _push(tuple),
    "EMPTY_SET": _push(set),
    "MARK": _mark,
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _put,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "LIST": _from_mark(list),
    "TUPLE": _from_mark(tuple),
    "FROZENSET": _from_mark(lambda items: frozenset(key(item) for item in items)),
    "DICT": _dict,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "ADDITEMS": _additems,
    "GLOBAL": _global,
    "STACK_GLOBAL": _global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "BUILD": _build,
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.stack.pop())),
}
