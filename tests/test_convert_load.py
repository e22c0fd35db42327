"""Safe loading: the tensors that torch, numpy and safetensors give, and nothing from a malicious file."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import datetime
import enum
import functools
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint.metadata as distributed
import torchvision
from convert_cases import TRAPS, Reduce, hostile_files, pickles_that_run, raw_traps, torch_legacy, torch_zip
from torch import nn

from loco_det.convert import read_backbone_tensors
from loco_det.convert.inspect import inspect
from loco_det.convert.load import in_memory, left_out, load_tensors, open_tensors
from loco_det.convert.report import take_account
from loco_det.convert.unpickle import LeftOut
from loco_det.core.errors import UserError


def training_checkpoint() -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0)
    return {
        "state_dict": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "views": [base[3:7], base.reshape(4, 6).T, base[::5], base.reshape(2, 3, 4)[:, 1], torch.tensor(5.0)],
        "empty": torch.zeros(0, 3),
        "kinds": [torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.half, torch.uint8, torch.bool)],
        "size": model[0].weight.shape,
        "plain": {"epoch": 3, "arch": "resnet18", "lr": 0.1, "none": None, "flag": True, "big": 2**40, "b": b"xy"},
        "set": {1, 2},
        "counts": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"a": [1]}),
    }


def assert_same(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair)
    else:
        assert found == expected


@pytest.mark.parametrize("name", ["c.pth", "c.pth.tar", "c.ckpt", "pytorch_model.bin"])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("modern", [True, False])
def test_torch_files_read_as_torch_reads_them(tmp_path: Path, name: str, modern: bool, protocol: int) -> None:
    path = tmp_path / name
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=modern, pickle_protocol=protocol)
    expected = torch.load(path, weights_only=False)
    assert_same(open_tensors(path), expected)
    assert_same(load_tensors(path), expected)
    assert left_out(open_tensors(path)) == {}


PLAIN = {
    "state_dict": lambda: torchvision.models.resnet18().state_dict(),
    "tied": lambda: dict.fromkeys("abc", torch.arange(5.0)),
    "parameters": lambda: dict(nn.Linear(2, 3).named_parameters()),
    "counted": lambda: {"c": collections.Counter("aab"), "o": collections.OrderedDict(a=1), "s": {1, "a"}},
    "tuple keys": lambda: {("a", 1): torch.ones(2), 3: None, -1.5: True, b"b": torch.Size([2])},
    "repeated": lambda: {"e": torch.ones(1).expand(3, 4), "r": torch.ones(3, 1).expand(3, 4)},
    "dtypes": lambda: {
        "t": torch.float16,
        "l": [torch.zeros(2, dtype=d) for d in (torch.int8, torch.bool, torch.cdouble)],
    },
}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_what_torch_holds_for_safe_is_read_alike(tmp_path: Path, name: str, modern: bool) -> None:
    path = tmp_path / "c.pth"
    torch.save(PLAIN[name](), path, _use_new_zipfile_serialization=modern)
    assert_same(load_tensors(path), torch.load(path, weights_only=True))
    assert left_out(load_tensors(path)) == {}


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch 2.4 cannot save uint16")
def test_newer_dtypes_read_as_torch_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.arange(5).to(torch.uint16)}, path)
    assert_same(load_tensors(path), torch.load(path, weights_only=True))


def test_settings_objects_are_left_out_and_never_made(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"args": argparse.Namespace(lr=1), "out": Path("x"), "model": {"a": torch.ones(2)}}, path)
    place, args = type(Path("x")), LeftOut("argparse.Namespace")
    posix = LeftOut(f"{place.__module__}.{place.__name__}")
    assert_same(load_tensors(path), {"args": args, "out": posix, "model": {"a": torch.ones(2)}})
    assert left_out(load_tensors(path)) == {"argparse.Namespace": ["args"], posix.name: ["out"]}


class Colour(enum.Enum):
    """A setting that a script of one's own might save."""

    RED = 1


class HistoryBuffer:
    """As mmengine's, which names functions through `getattr`."""

    def __init__(self) -> None:
        self.history = np.arange(3)
        self.methods = {"mean": self.mean}

    def mean(self) -> float:
        return self.history.mean()


OBJECTS = {
    "history": HistoryBuffer(),
    "partial": functools.partial(int, base=2),
    "enum": Colour.RED,
    "deque": collections.deque([1, 2], maxlen=3),
    "function": np.mean,
    "named": collections.namedtuple("Point", "x y")(1, 2),
    "object array": np.array([1, "a", None], dtype=object),
    "text array": np.array(["abc"]),
    "date": datetime.date(2020, 1, 1),
    "device": torch.device("cpu"),
    "module": nn.Linear(2, 2),
    "sparse": torch.eye(2).to_sparse(),
    "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
}
globals()["Point"] = type(OBJECTS["named"])  # where pickle looks for it


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_objects_beside_the_tensors_are_left_out_and_counted(tmp_path: Path, modern: bool, protocol: int) -> None:
    path, weights = tmp_path / "c.pth", {"a": torch.ones(2), "b": torch.arange(3)}
    plain = {"default": collections.defaultdict(int, a=1), "of dicts": collections.defaultdict(dict, b={"c": 2})}
    content = {**plain, "objects": [*OBJECTS.values()], "keys": {Colour.RED: 1}, "model": weights}
    torch.save(content, path, _use_new_zipfile_serialization=modern, pickle_protocol=protocol)
    loaded = load_tensors(path)
    assert_same(loaded["model"], weights)
    assert_same({key: loaded[key] for key in plain}, plain)
    assert all(isinstance(item, LeftOut) for item in loaded["objects"])
    assert [str(key) for key in loaded["keys"]] == [f"{__name__}.Colour"]
    keys = sorted(key for keys in left_out(loaded).values() for key in keys)
    assert keys == sorted(f"objects:{i}" for i in range(len(OBJECTS)))


def test_the_account_names_what_was_left_out(tmp_path: Path) -> None:
    state = torchvision.models.resnet18().state_dict()
    torch.save({"state_dict": state, "hub": {"a": HistoryBuffer(), "b": HistoryBuffer()}}, tmp_path / "epoch_1.pth")
    name = f"{__name__}.HistoryBuffer"
    account, _ = take_account("x", open_tensors(tmp_path / "epoch_1.pth"))
    assert account.left_out == account.facts()["left_out"] == {name: ["hub:a", "hub:b"]}
    assert f"left out      2 settings that are no plain data, unexecuted (2 {name})" in account.lines()
    assert any(
        line.endswith(f"2 settings that are no plain data, unexecuted (2 {name})")
        for line in inspect(tmp_path / "epoch_1.pth").lines()
    )


def test_an_object_in_place_of_a_tensor_is_refused(tmp_path: Path) -> None:
    state = dict(torchvision.models.resnet18().state_dict())
    state["layer2.0.conv1.weight"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"'layer2.0.conv1.weight' is a torch.*, not a plain tensor; save it as one"):
        read_backbone_tensors(tmp_path / "a.pth")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"holds no tensors, but objects .*Linear.*model.state_dict\(\)"):
        read_backbone_tensors(tmp_path / "b.pth")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "c": generator.normal(size=(2, 3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(generator.normal(size=(3, 5))),
        "big_endian": np.arange(4, dtype=">i4"),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 2)),
        "bool": np.array([True, False]),
    }
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({**arrays, "number": np.float64(0.5)}, protocol=protocol))
    loaded = load_tensors(path)
    assert loaded.pop("number") == 0.5
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(loaded[name].numpy(), array)
        assert loaded[name].shape == array.shape


def test_python_2_pickles_read(tmp_path: Path) -> None:
    data = np.array([1.5, -2.0], dtype="<f4").tobytes()
    text = (
        b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + data + b"tbs."
    )
    assert np.array_equal(pickle.loads(text, encoding="latin1")["conv1_w"], [1.5, -2.0])
    (tmp_path / "R-50.pkl").write_bytes(text)
    assert_same(load_tensors(tmp_path / "R-50.pkl"), {"conv1_w": torch.tensor([1.5, -2.0])})


def test_safetensors_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4)}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    assert_same(load_tensors(tmp_path / "w.safetensors"), tensors)


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<f2", "<i8", "<i4", "|u1", "|b1"])
def test_numpy_archives_read_as_numpy_reads_them(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "params/a": (9 * rng.random((3, 4, 2))).astype(dtype),
        "params/columns": np.asfortranarray((9 * rng.random((5, 3))).astype(dtype)),
        "scalar": np.array(3).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with np.load(tmp_path / "a.npz") as expected:
        found = load_tensors(tmp_path / "a.npz")
        assert found.keys() == set(expected.keys())
        for name, tensor in found.items():
            assert tensor.shape == expected[name].shape
            assert np.array_equal(in_memory(tensor).numpy(), expected[name])


class _Trap:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (open, (str(self.canary), "w"))


def npz(*arrays: tuple[str, str, int]) -> Callable[[Path], None]:
    """An archive whose headers say what they like: (name, header's dictionary, bytes behind it)."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, header, count in arrays:
                text = header.encode() + b"\n"
                archive.writestr(name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(count))

    return write


def header(dtype: str = "<f4", shape: str = "(2,)") -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: np.savez(path, a=np.array([_Trap(path.with_name("ran"))])), "pickled objects in 'a.npy'"),
        (lambda path: np.savez_compressed(path, a=np.ones(9)), "is a compressed zip archive"),
        (npz(("a.npy", header(), 9)), "another size than its header says"),
        (npz(("a.npy", header(), 7)), "another size than its header says"),
        (npz(("a.npy", header(shape="(2**40,)"), 8)), "is damaged"),
        (npz(("a.npy", header(shape="(9" * 30 + ",)"), 8)), "does not begin as an array"),
        (npz(("a.npy", header(shape="(1099511627776,)"), 8)), "another size than its header says"),
        (npz(("a.npy", header(shape="(-2, -1)"), 8)), "does not begin as an array"),
        (npz(("a.npy", header(dtype=">f4"), 8)), "holds an array of '>f4'"),
        (npz(("a.npy", header(dtype="<c8"), 16)), "holds an array of '<c8'"),
        (npz(("a.npy", header(dtype="|S4"), 8)), r"holds an array of '\|S4'"),
        (npz(("a.npy", "(" * 5000, 8)), "is damaged"),
        (npz(("a.npy", "{" + "'x': 1, " * 5000 + "}", 8)), "is damaged"),
        (npz(("a.npy", "__import__('os').system('true')", 8)), "is damaged"),
        (npz(("a.npy", header(), 8), ("data.pkl", header(), 8)), "'data.pkl' is no array"),
        (npz(("a.npy", header(), 8), ("a.npy", header(), 8)), "cut short or there twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_numpy_archive_that_lies_is_refused(write: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    with pytest.raises(UserError, match=said) as error:
        load_tensors(tmp_path / "a.npz")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def sharded(folder: Path, suffix: str = "safetensors") -> tuple[Path, dict[str, torch.Tensor]]:
    """Two shards and their index, as huggingface_hub lays them out."""
    tensors = {"a": torch.randn(2, 3), "b": torch.arange(4), "c": torch.ones(1)}
    files = {f"model-0000{n}-of-00002.{suffix}": names for n, names in ((1, ["a", "b"]), (2, ["c"]))}
    for file, names in files.items():
        save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
        save({name: tensors[name] for name in names}, folder / file)
    places = {name: file for file, names in files.items() for name in names}
    path = folder / f"model.{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": places}))
    return path, tensors


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_reads_as_its_files_together(tmp_path: Path, suffix: str) -> None:
    path, tensors = sharded(tmp_path, suffix)
    assert_same(load_tensors(path), tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d": "model-00002-of-00002.safetensors"}, "tensor 'd' is in only one of model-00002"),
        ({"c": "model-00001-of-00002.safetensors"}, "tensor 'c' is in only one of model-00001"),
        ({"c": "model-00003-of-00002.safetensors"}, "names model-00003-of-00002.safetensors, which is not beside it"),
        ({"c": "../x.safetensors"}, "is no weights file beside it"),
        ({"c": "/etc/passwd"}, "is no weights file beside it"),
        ({"c": "model.safetensors.index.json"}, "is no weights file beside it"),
        ({"c": 3}, "no weight_map of tensor and file names"),
        (None, "no weight_map of tensor and file names"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, change: dict | None, said: str) -> None:
    path, _ = sharded(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"] = None if change is None else index["weight_map"] | change
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape(said)):
        load_tensors(path)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"weight_map": {"a": 1, "a": 2}}', b"{\xff}", b'{"a":' * 100_000])
def test_a_damaged_index_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.index\.json"):
        load_tensors(tmp_path / "m.index.json")


def test_the_corpus_would_harm_a_plain_reader(tmp_path: Path) -> None:
    """Without this the next test could pass on files that do nothing."""
    canary = tmp_path / "canary"
    content = pickles_that_run(canary)
    harmed = []
    for name in ("system", "check_call", "eval", "exec", "open", "nested", "numpy_object", "map", "protocol_0", "inst"):
        pickle.loads(content[name])
        harmed.append(canary.exists())
        canary.unlink(missing_ok=True)
    assert all(harmed)


def formats(protocol: int) -> dict[str, Callable[[Any, Path], object]]:
    """What writes an object with `protocol`, by the name of the file."""
    found = {"plain.pkl": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=protocol))}
    if protocol >= 2:
        for name, modern in (("zip.pth", True), ("legacy.pth", False)):
            found[name] = functools.partial(torch.save, pickle_protocol=protocol, _use_new_zipfile_serialization=modern)
    return found


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("trap", TRAPS)
def test_no_way_to_run_code_runs_it(tmp_path: Path, trap: str, protocol: int) -> None:
    """The trap is sprung by pickle itself; here it is left out, and the tensors beside it are read."""
    if trap == "newobj_ex" and protocol < 2:
        return  # there is none
    canary, weights = tmp_path / "canary", np.arange(4.0)
    if trap != "chain":  # which only reaches for a function
        with contextlib.suppress(TypeError, KeyError):
            pickle.loads(pickle.dumps(TRAPS[trap](str(canary)), protocol=protocol))
        assert canary.exists()
        canary.rmdir()
    for name, write in formats(protocol).items():
        write({"before": TRAPS[trap](str(canary)), "w": weights, "after": [TRAPS[trap](str(canary))]}, tmp_path / name)
        loaded = load_tensors(tmp_path / name)
        assert np.array_equal(loaded["w"], weights)
        assert left_out(loaded)
        assert not canary.exists()


@pytest.mark.parametrize("trap", raw_traps(Path("x")))
def test_no_instruction_runs_code(tmp_path: Path, trap: str) -> None:
    canary = tmp_path / "canary"
    content = b"\x80\x04}(" + b"X\x01\x00\x00\x00wK\x05" + b"X\x01\x00\x00\x00x" + raw_traps(canary)[trap] + b"u."
    assert pickle.loads(content) == {"w": 5, "x": None}
    canary.rmdir()
    (tmp_path / "zip.pth").write_bytes(torch_zip(content))
    (tmp_path / "legacy.pth").write_bytes(torch_legacy(content))
    (tmp_path / "plain.pkl").write_bytes(content)
    for path in sorted(tmp_path.iterdir()):
        loaded = load_tensors(path)
        assert loaded["w"] == 5
        assert list(left_out(loaded).values()) == [["x"]]
        assert not canary.exists()


def test_registered_extensions_are_not_run(tmp_path: Path) -> None:
    """A code that another library has registered, and whose function pickle has cached, as it does at first use."""
    copyreg.add_extension("os", "mkdir", 231)
    try:
        assert pickle.loads(b"\x80\x02\x82\xe7.") is os.mkdir
        (tmp_path / "a.pkl").write_bytes(b"\x80\x02}X\x01\x00\x00\x00a\x82\xe7s.")
        with pytest.raises(UserError, match=r"no plain data has the pickle instruction b'\\x82'"):
            load_tensors(tmp_path / "a.pkl")
    finally:
        copyreg.remove_extension("os", "mkdir", 231)


def test_a_file_cannot_change_what_the_next_one_gets(tmp_path: Path) -> None:
    """Setting attributes of a name on the list is refused, or it would last as long as the process."""
    for name, state in (("collections OrderedDict", b"}"), ("torch FloatStorage", b"}"), ("numpy dtype", b"(N}t")):
        module, attribute = name.split()
        key = b"X\x08\x00\x00\x00__code__K\x01s"
        state = state.replace(b"}", b"}" + key)
        (tmp_path / "a.pkl").write_bytes(
            b"\x80\x02}X\x01\x00\x00\x00ac" + f"{module}\n{attribute}\n".encode() + state + b"bs."
        )
        with pytest.raises(UserError, match="sets attributes of a"):
            load_tensors(tmp_path / "a.pkl")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of hostile files; `canary` beside it must never appear."""
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    folder.mkdir()
    hostile_files(folder, folder.parent / "canary")
    return folder


def test_hostile_files_do_nothing(corpus: Path) -> None:
    """Every file of the corpus: no code runs, one sentence; all of it within half a gigabyte of memory."""
    paths = list(corpus.iterdir())
    assert len(paths) >= 60
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from loco_det.convert import read_backbone_tensors\n"
        "from loco_det.convert.inspect import inspect\n"
        "from loco_det.core.errors import UserError\n"
        "def kibibytes(field):\n"  # not ru_maxrss, which remembers the process that this one was forked from
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(field))\n"
        "before = kibibytes('VmRSS')\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try:\n"
        "        read_backbone_tensors(path)\n"
        "        print('LOADED', path.name)\n"
        "    except UserError as error:\n"
        "        try:\n"
        "            inspect(path).lines()\n"
        "        except UserError as again:\n"
        "            assert '\\n' not in str(again)\n"
        "        print('refused', path.name, repr(str(error)), sep='\\t')\n"
        "print('memory', kibibytes('VmHWM') - before, sep='\\t')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(corpus)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, memory = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(paths)
    for verdict, name, sentence in lines:
        assert verdict == "refused"
        assert name in sentence
        assert "\\n" not in sentence
        assert len(sentence) < 600 + len(str(corpus))
    assert int(memory[1]) < 2**19  # KiB
    assert not (corpus.parent / "canary").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pickle-system.pkl", "holds a posix.system, not a dictionary of tensors"),
        ("zip-numpy_object.pth", "holds a numpy.ndarray of no numbers"),
        ("legacy-obj.pt", "holds a os.system"),
        ("pickle-extension.pkl", r"the pickle instruction b'\x82'"),
        ("pickle-extension_2.pkl", r"the pickle instruction b'\x83'"),
        ("pickle-extension_4.pkl", r"the pickle instruction b'\x84'"),
        ("pickle-buffer.pkl", r"the pickle instruction b'\x97'"),
        ("pickle-persid.pkl", "refers to data outside the file"),
        ("zip-persid.pth", "refers to data outside the file"),
        ("zip-module_persid.pth", "holds a os.system"),
        ("pickle-call_a_dict.pkl", "calls a dict"),
        ("pickle-names.pkl", "has a name of 1,000,000 letters"),
        ("pickle-line.pkl", "has a name of 500,001 letters"),
        ("legacy-short.pt", "is damaged or incomplete (seek out of range)"),
        ("zip-repeats.pth", "its tensors amount to more than the file holds"),
        ("pickle-bytearray.pkl", "makes bytes of something"),
        ("pickle-copies.pkl", "copies the same data many times"),
        ("pickle-deep_key.pkl", "uses a tuple as a dictionary key"),
        ("pickle-collisions.pkl", "a number beyond 64 bits"),
        ("pickle-deep_list.pkl", "more than 64 deep"),
        ("pickle-circle.pkl", "or in a circle"),
        ("pickle-laughs.pkl", "nests more than 1,000,000 items"),
        ("torch-stride_0.ckpt", "a tensor of shape [1000000000, 1000000000] and strides [0, 0]"),
        ("torch-stride_0_wrap.ckpt", "a tensor of shape [549755813888, 549755813888]"),
        ("torch-append_a_tensor.ckpt", "items of a list for a Tensor"),
        ("torch-appends_a_tensor.ckpt", "items of a list for a Tensor"),
        ("torch-setitem_a_tensor.ckpt", "items of a dict for a Tensor"),
        ("torch-setitems_a_tensor.ckpt", "items of a dict for a Tensor"),
        ("torch-additems_a_tensor.ckpt", "items of a set for a Tensor"),
        ("torch-build_a_tensor.ckpt", "a Tensor for an array's state"),
        ("torch-arguments_a_tensor.ckpt", "a Tensor for arguments"),
        ("torch-pairs_a_tensor.ckpt", "a dictionary of no pairs"),
        ("torch-pair_a_tensor.ckpt", "a dictionary of no pairs"),
        ("torch-members_a_tensor.ckpt", "a set of the members of a Tensor"),
        ("torch-size.ckpt", "does not fit its 64 stored bytes"),
        ("torch-wrap.ckpt", "no tuple of sizes"),
        ("torch-short_storage.ckpt", "does not fit its 64 stored bytes"),
        ("torch-quantised.ckpt", "holds no tensors, but objects that are not read (tensor that is no plain one)"),
        ("pickle-bytes.pkl", "makes bytes of something"),
        ("torch-big_endian.ckpt", "was written on a big-endian machine"),
        ("torch-bomb.ckpt", "compressed zip"),
        ("torch-overlap.ckpt", "has zip entries that overlap"),
        ("torch-no_pickle.ckpt", "but not one that torch.save wrote"),
        ("torch-torchscript.ckpt", "TorchScript"),
        ("crowd-backbones.pth", "holds more than 8 backbones"),
        ("crowd-places.pth", "holds more than 8 backbones"),
        ("crowd-shared.pth", "names more than 50,000 tensors"),
        ("legacy-copies.pt", "its tensors amount to more than the file holds"),
        ("traversal.safetensors.index.json", "names '../../../../etc/passwd', which is no weights file beside it"),
        ("ours-deep.safetensors", "its manifest cannot be read"),
        ("st-twice.safetensors", "names 'a' twice"),
    ],
)
def test_each_guard_is_the_one_that_refuses(corpus: Path, name: str, said: str) -> None:
    """One guard may hide another's failure: each must be seen to act on the file made for it."""
    with pytest.raises(UserError, match=re.escape(said)):
        read_backbone_tensors(corpus / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.pth", b"", "is empty"),
        ("p.pth", b"<html>", "web page"),
        ("l.pth", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("n.pth", b"noise noise noise noise", "no torch, safetensors or pickle"),
        ("r.pkl", pickle.dumps([1, 2]), "holds a list"),
        (
            "z.pth",
            torch_zip(pickle.dumps(argparse.ArgumentParser)),
            "holds a argparse.ArgumentParser, not a dictionary",
        ),
        ("d.distcp", b"PK\x03\x04", "dcp_to_torch"),
        ("0.metadata", pickle.dumps(Reduce(distributed.Metadata, {})), "dcp_to_torch"),
    ],
)
def test_sentences(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_tensors(tmp_path / name)


def test_what_is_no_file_of_its_own(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "link.pth").symlink_to("/dev/zero")
    for path in (tmp_path / "absent.pth", tmp_path, tmp_path / "fifo.pth", tmp_path / "link.pth"):
        with pytest.raises(UserError, match="cannot be read"):
            load_tensors(path)
    with pytest.raises(UserError, match=r"maps: is empty, or no file on a disk"):
        load_tensors("/proc/self/maps")
    with pytest.raises(UserError, match="is a URL; download the file"):
        load_tensors("https://example.org/w.pth")
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(UserError, match=f"dcp_to_torch {tmp_path} model.pth"):
        load_tensors(tmp_path)


def test_archives_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match="is a TorchScript archive; save its state_dict"):
        load_tensors(path)
    save = re.search(r"torch\.save\(.*\)", str(refusal(path))).group()
    exec(save.replace("'weights.pth'", repr(str(tmp_path / "weights.pth"))), {"torch": torch})
    assert load_tensors(tmp_path / "weights.pth").keys() == {"weight", "bias"}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.write(tmp_path / "weights.pth", "run/model.pth")
        with pytest.raises(UserError, match=r"is a zip archive that holds 'run/model.pth'; unzip it"):
            load_tensors(path)


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        load_tensors(path)
    return refused.value
