"""Checkpoints for the conversion tests: ResNets with random tensors, and malicious files."""

from __future__ import annotations

import collections
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with random statistics and affine terms, so that no two tensors could be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(1 if name.endswith("weight") else 0, 0.1, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return model


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def caffe2_name(name: str) -> str:
    """Caffe2 Detectron's name of a torchvision ResNet tensor."""
    leaf = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    if name.startswith(("conv1.", "bn1.")):
        return "conv1_w" if name == "conv1.weight" else f"res_conv1_bn_{leaf[name.split('.')[-1]]}"
    stage, block, part, *rest = name.split(".")
    branch = "1" if part == "downsample" else "2" + "abc"[int(part[-1]) - 1]
    norm = part.startswith("bn") or rest[0] == "1"
    return f"res{int(stage[-1]) + 1}_{block}_branch{branch}_" + (f"bn_{leaf[rest[-1]]}" if norm else "w")


class Reduce:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Begotten:
    """Pickles as an object whose making takes arguments by name (NEWOBJ_EX), and makes a folder."""

    def __new__(cls, *, folder: str) -> Begotten:
        os.mkdir(folder)
        made = super().__new__(cls)
        made.folder = folder
        return made

    def __getnewargs_ex__(self) -> tuple:
        return (), {"folder": self.folder}

    def __getstate__(self) -> None:
        return None


class Stateful:
    """Pickles as an object that makes a folder when it is given its state (BUILD)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __setstate__(self, state: dict) -> None:
        os.mkdir(state["folder"])


class _Items:
    """Pickles as an empty container of `kind` that is given items, which make a folder."""

    def __init__(self, kind: type, folder: str) -> None:
        self.call = (
            (kind, (), None, iter([folder]), None) if kind is List else (kind, (), None, None, iter([(folder, 0)]))
        )

    def __reduce__(self) -> tuple:
        return self.call


class List(list):
    def append(self, folder: str) -> None:
        os.mkdir(folder)

    def extend(self, folders: list[str]) -> None:
        os.mkdir(next(iter(folders)))


class Dict(dict):
    def __setitem__(self, folder: str, _: object) -> None:
        os.mkdir(folder)


def begotten(folder: str) -> Begotten:
    """One whose folder is yet to be made."""
    made = object.__new__(Begotten)
    made.folder = folder
    return made


TRAPS = {
    "reduce": lambda folder: Reduce(os.mkdir, folder),
    "newobj_ex": begotten,
    "build": Stateful,
    "append": lambda folder: _Items(List, folder),
    "setitem": lambda folder: _Items(Dict, folder),
    "nested": lambda folder: [[{"a": ({"b": Reduce(os.mkdir, folder)},)}]],
    "chain": lambda folder: Reduce(getattr, Reduce(__import__, "os"), "mkdir"),
    "called": lambda folder: Reduce(list, Reduce(map, os.mkdir, [folder])),
}
"""Way to run code -> what, when it is unpickled, makes the folder of that name or reaches for what could."""


def raw_traps(folder: Path) -> dict[str, bytes]:
    """Ways to make `folder` that no pickler writes, as instructions that leave one thing on the stack."""
    name, path = _name("os", "mkdir"), _text(str(folder))
    return {
        "inst": b"(" + path + b"ios\nmkdir\n",
        "obj": b"(" + name + path + b"o",
        "stack_global": _text("os") + _text("mkdir") + b"\x93" + path + b"\x85R",
        "renamed": _name("posix", "mkdir") + path + b"\x85R",
        "memo": name + b"q\x070" + b"h\x07" + path + b"\x85R",
    }


def _raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def pickles_that_run(canary: Path) -> dict[str, bytes]:
    """Pickles that make a plain `pickle.load` create `canary`, or try to reach code, each by another way."""
    import builtins
    import functools
    import operator
    import runpy
    import subprocess

    touch = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w')"
    evil = Reduce(os.system, touch)
    objects = np.empty(1, dtype=object)
    objects[0] = evil
    calls = {
        "system": evil,
        "popen": Reduce(subprocess.Popen, ["touch", str(canary)]),
        "check_call": Reduce(subprocess.check_call, ["touch", str(canary)]),
        "eval": Reduce(eval, python),
        "exec": Reduce(exec, python),
        "open": Reduce(open, str(canary), "w"),
        "import": Reduce(builtins.__import__, "antigravity"),
        "getattr": Reduce(getattr, Reduce(builtins.__import__, "os"), "system"),
        "partial": Reduce(functools.partial, os.system, touch),
        "methodcaller": Reduce(operator.methodcaller, "system", touch),
        "attrgetter": Reduce(operator.attrgetter, "system"),
        "runpy": Reduce(runpy.run_path, str(canary)),
        "compile": Reduce(compile, python, "x", "exec"),
        "map": Reduce(list, Reduce(map, os.system, [touch])),
        "nested": Reduce(pickle.loads, pickle.dumps(evil)),
        "torch_nested": Reduce(torch.storage._load_from_bytes, pickle.dumps(evil)),
        "torch_load": Reduce(torch.load, str(canary)),
        "numpy_object": objects,
        "deep_in_dict": {"state_dict": {"conv1.weight": [0, (evil,)]}},
        "as_key": Reduce(collections.OrderedDict, [[Reduce(os.system, touch), 1]]),
        "factory": Reduce(collections.defaultdict, os.system),
        "codec": Reduce(__import__("_codecs").encode, "evil", "rot13"),
        "module_object": nn.Linear(2, 2),
        "rebuild_type": Reduce(torch._utils._rebuild_sparse_tensor, os.system, (touch,)),
    }
    found = {name: pickle.dumps(value, protocol=4) for name, value in calls.items()}
    found["extension_2"] = _raw(b"\x83\x01\x00")
    found["extension_4"] = _raw(b"\x84\x01\x00\x00\x00")
    found["buffer"] = _raw(b"\x97")
    found["module_persid"] = _raw(_text("module"), _name("os", "system"), b"\x86Q")
    found["protocol_0"] = pickle.dumps(evil, protocol=0)
    found["protocol_2"] = pickle.dumps(evil, protocol=2)
    found["inst"] = b"(S'" + touch.encode() + b"'\nios\nsystem\n."
    found["obj"] = b"(" + _name("os", "system") + b"S'" + touch.encode() + b"'\no."
    found["extension"] = _raw(b"\x82\x01")
    found["stack_global"] = _raw(_text("os"), _text("system"), b"\x93", _text(touch), b"\x85R")
    found["memo_global"] = _raw(_text("os"), b"q\x00", _text("system"), b"0h\x00", _text("system"), b"\x93)R")
    found["dotted"] = _raw(_text("collections"), _text("OrderedDict.__init__.__globals__"), b"\x93)R")
    found["setstate"] = _raw(_name("collections", "OrderedDict"), b"}", _text("__call__"), _name("os", "system"), b"sb")
    found["newobj"] = _raw(_name("subprocess", "Popen"), _text(touch), b"\x85\x81")
    found["persid"] = b"Pos.system\n."
    found["binpersid"] = _raw(_text("storage"), _name("os", "system"), _text("0"), _text("cpu"), b"K\x01", b"tQ")
    found["call_a_word"] = _raw(_name("builtins", "object"), b")R")
    found["call_a_dict"] = _raw(b"}", b")R")
    return found


def pickles_that_swell() -> dict[str, bytes]:
    """Short pickles that cost a naive reader gigabytes, hours or its stack."""
    deep = 200_000
    laughs = (
        b"}"
        + _text("a")
        + b"K\x01s"
        + b"".join(
            b"q" + bytes([i]) + b"0}" + _text("a") + b"h" + bytes([i]) + b"s" + _text("b") + b"h" + bytes([i]) + b"s"
            for i in range(60)
        )
    )
    collide = b"".join(
        b"\x8b" + struct.pack("<I", 9 + 1) + (k * (2**61 - 1)).to_bytes(10, "little", signed=True) + b"N"
        for k in range(1, 20_000)
    )
    encode = _name("_codecs", "encode") + b"h\x00" + _text("latin1") + b"\x86R"
    return {
        "names": _raw(_text("x" * 500_000), b"q\x000h\x00h\x00\x930" * 100_000, b"N"),
        "line": b"c" + b"x" * 500_000 + b"\ny\n" + b"0c" + b"z" * 500_000 + b"\ny\n.",
        "order": _raw(_dtype(b"X" + struct.pack("<I", 300_000) + b"<" * 300_000), _array_of(b"h\x05") * 300),
        "code": _raw(_dtype(_text("<"), "f" * 300_000), _array_of(b"h\x05") * 300),
        "bytearray8": _raw(b"\x96" + struct.pack("<Q", 2**36)),
        "bytearray": _raw(_name("builtins", "bytearray"), b"\x8a\x05" + (10**11).to_bytes(5, "little"), b"\x85R"),
        "bytes": _raw(_name("builtins", "bytes"), b"\x8a\x05" + (10**11).to_bytes(5, "little"), b"\x85R"),
        "memo_index": _raw(b"N", b"r" + struct.pack("<I", 2**32 - 1)),
        "long_bytes": _raw(b"\x8e" + struct.pack("<Q", 2**60)),
        "long_text": _raw(b"\x8d" + struct.pack("<Q", 2**60)),
        "long_frame": _raw(b"\x95" + struct.pack("<Q", 2**63)),
        "deep_list": _raw(b"]" * deep, b"a" * (deep - 1)),
        "deep_tuple": _raw(b")", b"\x85" * deep),
        "deep_key": _raw(b"}", b")", b"\x85" * deep, b"Ns"),
        "marks": _raw(b"(" * deep),
        "circle": _raw(b"}q\x00", _text("a"), b"h\x00s"),
        "laughs": _raw(laughs),
        "collisions": _raw(b"}(", collide, b"u"),
        "copies": _raw(_text("x" * 60_000), b"q\x000", encode * 9000),
        "digits": b"L" + b"9" * 2_000_000 + b"L\n.",
        "instructions": _raw(b"N0" * 1_100_000, b"N"),
        "twice": _raw(b"}(", _text("a"), b"N", _text("a"), b"Nu"),
        "array_shape": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
        "array_negative": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"J\xff\xff\xff\xff\x85"),
        "array_void": pickle.dumps(np.zeros(3, dtype="V8")),
        "array_text": pickle.dumps(np.array(["abc"])),
        "array_fields": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        "array_empty": _raw(_name("numpy.core.multiarray", "_reconstruct"), b")R"),
    }


def _dtype(order: bytes, code: str = "f4") -> bytes:
    """numpy's dtype of `code`, with the instructions `order` for its byte order, in memo 5."""
    head = _name("numpy", "dtype") + _text(code) + b"\x85Rq\x05"
    return head + b"(K\x03" + order + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb0"


def _array_of(dtype: bytes) -> bytes:
    """An array of no elements, dropped again."""
    make = _name("numpy.core.multiarray", "_reconstruct") + b")R"
    return make + b"(K\x01K\x00\x85" + dtype + b"\x89C\x00tb0"


def torch_zip(content: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file like torch.save's round the pickle `content`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        for key, data in (storages or {"0": b"\0" * 64}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def torch_legacy(content: bytes, storages: bytes = b"\x80\x02].") -> bytes:
    """A file as torch before 1.6 wrote it round the pickle `content`, `storages` behind it."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = (0x1950A86A20F9469CFC6C, 1001, system)
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + content + storages


def torch_legacy_of(tensor: Tensor, views: int) -> bytes:
    """A file as torch before 1.6 wrote it, with `tensor` in it as `views` tensors over one unaligned storage."""
    for padding in range(4):  # until the storage starts at an odd place
        buffer = io.BytesIO()
        content = {"pad": "x" * padding, "views": [tensor.view(tensor.shape) for _ in range(views)]}
        torch.save(content, buffer, _use_new_zipfile_serialization=False)
        if (len(buffer.getvalue()) - tensor.nbytes) % 4:
            return buffer.getvalue()
    raise AssertionError("every padding aligns")


def _tensor(
    numel: int, offset: int, size: tuple, stride: tuple, storage: str = "FloatStorage", key: str = "0"
) -> bytes:
    """The pickle of {"conv1.weight": tensor}, with these numbers in torch's way of writing one."""
    head = _text("storage") + _name("torch", storage) + _text(key) + _text("cpu")
    numbers = _number(offset) + _numbers(size) + _numbers(stride)
    arguments = b"((" + head + _number(numel) + b"tQ" + numbers + b"\x89}t"
    return _raw(b"}", _text("conv1.weight"), _name("torch._utils", "_rebuild_tensor_v2"), arguments, b"Rs")


def _tensors_abused() -> dict[str, bytes]:
    """Pickles that use a tensor of a billion numbers, all of them one, as something else: torch would fill it, copy it,
    or make of it a billion tensors."""
    tensor = _tensor(16, 0, (2**30,), (0,)).partition(_text("conv1.weight"))[2][:-2]
    ordered, make = _name("collections", "OrderedDict"), _name("numpy.core.multiarray", "_reconstruct") + b")R"
    return {
        name: _raw(content)
        for name, content in {
            "append": tensor + b"Na",
            "appends": tensor + b"(Ne",
            "setitem": tensor + b"NK\x01s",
            "setitems": tensor + b"(NK\x01u",
            "additems": tensor + b"(K\x01\x90",
            "build": make + tensor + b"b",
            "arguments": ordered + tensor + b"R",
            "pairs": ordered + tensor + b"\x85R",
            "pair": ordered + b"]" + tensor + b"a\x85R",
            "members": _name("builtins", "frozenset") + tensor + b"\x85R",
            "array": _name("numpy", "ndarray") + b"K\x01\x85" + _text("<f4") + tensor + b"\x87R",
        }.items()
    }


def _numbers(values: tuple) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


def _number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensors_that_lie() -> dict[str, bytes]:
    """torch zip files whose 64-byte storage is described as something else."""
    return {
        "size": torch_zip(_tensor(16, 0, (10**12,), (1,))),
        "numel": torch_zip(_tensor(2**40, 0, (2**40,), (1,))),
        "stride_0": torch_zip(_tensor(16, 0, (10**9, 10**9), (0, 0))),
        "stride_0_wrap": torch_zip(_tensor(16, 0, (2**39, 2**39), (0, 0))),
        **{f"{name}_a_tensor": torch_zip(content) for name, content in _tensors_abused().items()},
        "overflow": torch_zip(_tensor(16, 0, (2**32, 2**32), (2**32, 2**32))),
        "wrap": torch_zip(_tensor(16, 0, (2,), (2**62,))),
        "offset": torch_zip(_tensor(16, 2**62, (1,), (1,))),
        "negative_offset": torch_zip(_tensor(16, -4, (4,), (1,))),
        "negative_size": torch_zip(_tensor(16, 0, (-1,), (1,))),
        "negative_stride": torch_zip(_tensor(16, 8, (4,), (-1,))),
        "dimensions": torch_zip(_tensor(16, 0, (1,) * 5000, (1,) * 5000)),
        "zero_by_huge": torch_zip(_tensor(16, 0, (0, 2**62), (1, 1))),
        "short_storage": torch_zip(_tensor(17, 0, (17,), (1,))),
        "no_storage": torch_zip(_tensor(16, 0, (16,), (1,), key="7")),
        "outside": torch_zip(_tensor(16, 0, (16,), (1,), key="../../../../etc/passwd")),
        "kind": torch_zip(_tensor(16, 0, (16,), (1,), storage="EvilStorage")),
        "quantised": torch_zip(_tensor(16, 0, (16,), (1,), storage="QInt8Storage")),
        "complex": torch_zip(_tensor(8, 0, (8,), (1,), storage="ComplexFloatStorage")),
    }


def zips_that_lie() -> dict[str, bytes]:
    good = pickle.dumps({"a": 1}, protocol=2)
    found = {
        "bomb": torch_zip(_raw(b"N0" * 1_000_000, b"N"), compression=zipfile.ZIP_DEFLATED),
        "storage_bomb": torch_zip(_tensor(2**26, 0, (2**26,), (1,)), {"0": b"\0" * 2**28}, zipfile.ZIP_DEFLATED),
        "no_pickle": torch_zip(good).replace(b"archive/data.pkl", b"archive/data.txt"),
        "traversal": torch_zip(good).replace(b"archive/", b"../../x/"),
        "checksum": torch_zip(good).replace(good, good[:-2] + b"2."),
        "big_endian": torch_zip(good).replace(b"little", b"bigbig"),
        "duplicate": torch_zip(good).replace(b"archive/byteorder", b"archive/data/0\0\0\0"),
    }
    entry = found["no_pickle"]
    at = entry.index(b"PK\x01\x02")
    found["sizes"] = entry[: at + 20] + struct.pack("<II", 2**31, 2**31) + entry[at + 28 :]
    found["offsets"] = entry[: at + 42] + struct.pack("<I", 2**31) + entry[at + 46 :]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("a/code/__torch__.py", "evil")
    found["torchscript"] = buffer.getvalue()
    # Many directory entries that all point at one large stored entry.
    data = torch_zip(good, {"0": b"\0" * 100_000})
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    name = data.index(b"archive/data/0", start)
    record = data[name - 46 : name + len(b"archive/data/0")]
    records = data[start:end] + b"".join(record.replace(b"data/0", b"dat%03d" % i) for i in range(500))
    length = struct.pack("<HHII", 504, 504, len(records), start)
    found["overlap"] = data[:start] + records + data[end : end + 8] + length + data[end + 20 :]
    return found


def safetensors_that_lie() -> dict[str, bytes]:
    def file(header: object, data: bytes = b"\0" * 16) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def entry(shape: list, offsets: list, dtype: str = "F32") -> dict:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    return {
        "length": struct.pack("<Q", 2**63) + b"{}",
        "length_mid": struct.pack("<Q", 2**24) + b'{"a":1}',
        "beyond": file({"a": entry([100], [0, 400])}),
        "shape": file({"a": entry([2**40, 2**40], [0, 16])}),
        "overlap": file({"a": entry([4], [0, 16]), "b": entry([4], [0, 16])}),
        "gap": file({"a": entry([1], [8, 12])}),
        "backwards": file({"a": entry([4], [16, 0])}),
        "negative": file({"a": entry([-4], [0, 16])}),
        "dtype": file({"a": entry([4], [0, 16], "EVIL")}),
        "deep": file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "no_json": file(b"{not json at all"),
        "twice": file(b'{"a":%s,"a":%s}' % ((json.dumps(entry([4], [0, 16])).encode(),) * 2)),
        "utf": file(b'{"\xff\xfe":1}'),
        "nan": file(b'{"a":NaN}'),
    }


def indexes_that_lie() -> dict[str, bytes]:
    def index(places: object) -> bytes:
        return json.dumps({"metadata": {}, "weight_map": places}).encode()

    return {
        "traversal": index({"a": "../../../../etc/passwd"}),
        "absolute": index({"a": "/dev/zero"}),
        "itself": index({"a": "itself.safetensors.index.json"}),
        "absent": index({"a": "nowhere.safetensors"}),
        "pickle": index({"a": "pickle-system.pkl"}),
        "list": index(["a"]),
        "number": index({"a": 1}),
        "deep": b'{"weight_map":' * 50_000,
        "long": index({str(i): f"{i}.safetensors" for i in range(200_000)}),
        "twice": b'{"weight_map": {"a": "x.bin", "a": "x.bin"}}',
        "digits": b'{"weight_map": {"a": ' + b"9" * 100_000 + b"}}",
    }


def crowds() -> dict[str, bytes]:
    """Files of thousands of backbones or tensors, most of them the same few under many names."""
    one = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(1)}
    many = {f"{i}.{name}": tensor for i in range(3000) for name, tensor in one.items()}
    crowded = {str(i): {str(j): one["layer1.0.conv1.weight"] for j in range(20)} for i in range(10)}
    shared = {str(i): crowded for i in range(4000)}
    places = {str(i): one for i in range(40)}
    found = {"crowd-backbones": many, "crowd-shared": {"a": one, **shared}, "crowd-places": places}
    contents = {}
    for name, value in found.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        contents[name] = buffer.getvalue()
    return contents


def manifests_that_lie() -> dict[str, bytes]:
    texts = {
        "deep": '{"format":1,"config":' + '{"a":' * 100_000,
        "list": "[" * 100_000,
        "number": '{"format": 1e999}',
        "type": '{"format":1,"architecture":7}',
        "unknown": '{"format":1,"evil":"x"}',
        "empty": "",
    }
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    return {name: safetensors.torch.save(state, metadata={"loco_det": text}) for name, text in texts.items()}


def hostile_files(folder: Path, canary: Path) -> list[Path]:
    """Write the whole corpus into `folder`; none of it is a usable checkpoint."""
    files: dict[str, bytes] = {}
    for name, content in {**pickles_that_run(canary), **pickles_that_swell()}.items():
        files[f"pickle-{name}.pkl"] = content
        if len(content) < 100_000 and name != "laughs":  # which takes seconds however it is wrapped
            files[f"zip-{name}.pth"] = torch_zip(content)
            files[f"legacy-{name}.pt"] = torch_legacy(content)
    for group in (tensors_that_lie(), zips_that_lie()):
        files.update({f"torch-{name}.ckpt": content for name, content in group.items()})
    files.update({f"st-{name}.safetensors": content for name, content in safetensors_that_lie().items()})
    files.update({f"{name}.safetensors.index.json": content for name, content in indexes_that_lie().items()})
    files.update({f"ours-{name}.safetensors": content for name, content in manifests_that_lie().items()})
    files.update({f"{name}.pth": content for name, content in crowds().items()})
    huge = struct.pack("<q", 2**30)
    files["legacy-short.pt"] = torch_legacy(_tensor(2**30, 0, (2**30,), (1,)), pickle.dumps(["0"]) + huge)
    files["zip-repeats.pth"] = torch_zip(_tensor(16, 0, (2**28,), (0,)))
    files["legacy-copies.pt"] = torch_legacy_of(torch.zeros(2**18), views=3000)
    files.update(
        {
            "empty.pth": b"",
            "byte.pkl": b"\x80",
            "page.pth": b"<!DOCTYPE html><html></html>",
            "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "packed.pth": gzip.compress(torch_zip(b"N.")),
            "noise.bin": bytes(range(255, 0, -1)) * 20,
            "tar.pth.tar": b"sys_info\0" + b"\0" * 600,
            "elf.bin": b"\x7fELF" + b"\0" * 100,
        }
    )
    paths = []
    for name, content in files.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    return paths


def python2_pickle(value: object) -> bytes:
    """What Python 2's cPickle with protocol 2 writes for dicts, text, numbers and numpy arrays, as Detectron saved."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2_pickle(key) + python2_pickle(item) for key, item in value.items()) + b"u"
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    shape = b"(" + b"".join(map(python2_pickle, value.shape)) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return empty + b"(K\x01" + shape + dtype + b"\x89" + python2_pickle(value.astype("<f4").tobytes()) + b"tb"


def detectron_pkl(blobs: dict[str, Tensor], cfg: str | None = None) -> bytes:
    """A .pkl of Detectron: the blobs by themselves (R-50.pkl), or beside the text of the configuration (a model)."""
    arrays = {name: tensor.numpy() for name, tensor in blobs.items()}
    content = python2_pickle(arrays if cfg is None else {"blobs": arrays, "cfg": cfg})
    return b"\x80\x02" + content + b"."
