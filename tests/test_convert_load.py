"""Safe loading: the tensors that torch, numpy and safetensors give, and nothing from a file that means harm."""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from convert_cases import hostile_files, pickles_that_run, torch_zip
from torch import nn

from loco_det.convert import load_backbone_weights
from loco_det.convert.load import load_tensors
from loco_det.errors import UserError


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


@pytest.mark.parametrize("name", ["c.pth", "c.pt", "c.pth.tar", "c.ckpt", "pytorch_model.bin"])
@pytest.mark.parametrize("modern", [True, False])
def test_torch_files_read_as_torch_reads_them(tmp_path: Path, name: str, modern: bool) -> None:
    path = tmp_path / name
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=modern)
    assert_same(load_tensors(path), torch.load(path, weights_only=False))


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="torch 2.4 cannot save uint16")
def test_newer_dtypes_read_as_torch_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"a": torch.arange(5).to(torch.uint16)}, path)
    assert_same(load_tensors(path), torch.load(path, weights_only=True))


def test_settings_objects_are_left_out_and_never_made(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"args": argparse.Namespace(lr=1), "out": Path("x"), "model": {"a": torch.ones(2)}}, path)
    assert_same(load_tensors(path), {"args": None, "out": None, "model": {"a": torch.ones(2)}})


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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of hostile files; `canary` beside it must never appear."""
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    folder.mkdir()
    hostile_files(folder, folder.parent / "canary")
    return folder


def test_hostile_files_do_nothing(corpus: Path) -> None:
    """Every file of the corpus: no code runs, one sentence, at most seconds; all of it within 1 GiB of memory."""
    paths = list(corpus.iterdir())
    assert len(paths) >= 60
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from loco_det.convert import load_backbone_weights\n"
        "from loco_det.convert.inspect import inspect\n"
        "from loco_det.errors import UserError\n"
        "def kibibytes(field):\n"  # not ru_maxrss, which remembers the process that this one was forked from
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(field))\n"
        "before = kibibytes('VmRSS')\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    started = time.process_time()\n"
        "    try:\n"
        "        load_backbone_weights(path)\n"
        "        print('LOADED', path.name)\n"
        "    except UserError as error:\n"
        "        try:\n"
        "            inspect(path).lines()\n"
        "        except UserError as again:\n"
        "            assert '\\n' not in str(again)\n"
        "        print('refused', path.name, repr(str(error)), time.process_time() - started, sep='\\t')\n"
        "print('memory', kibibytes('VmHWM') - before, sep='\\t')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(corpus)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, memory = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(paths)
    for verdict, name, sentence, seconds in lines:
        assert verdict == "refused"
        assert name in sentence
        assert "\\n" not in sentence
        assert len(sentence) < 600 + len(str(corpus))
        assert float(seconds) < 10
    assert int(memory[1]) < 2**20  # KiB
    assert not (corpus.parent / "canary").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pickle-system.pkl", "asks for 'posix.system', which is no plain data"),
        ("zip-numpy_object.pth", "asks for 'posix.system'"),
        ("legacy-obj.pt", "asks for 'os.system'"),
        ("pickle-extension.pkl", "the pickle instruction EXT1"),
        ("pickle-bytearray.pkl", "makes bytes of something"),
        ("pickle-copies.pkl", "copies the same data many times"),
        ("pickle-deep_key.pkl", "uses a tuple as a dictionary key"),
        ("pickle-collisions.pkl", "a number beyond 64 bits"),
        ("pickle-deep_list.pkl", "more than 64 deep"),
        ("pickle-circle.pkl", "or in a circle"),
        ("pickle-laughs.pkl", "nests more than 1,000,000 items"),
        ("pickle-instructions.pkl", "more than 2,000,000 pickle instructions"),
        ("pickle-twice.pkl", "gives the key 'a' twice"),
        ("torch-stride_0.ckpt", "does not fit its 16 stored elements"),
        ("torch-short_storage.ckpt", "does not fit its 64 stored bytes"),
        ("torch-bomb.ckpt", "compressed zip"),
        ("torch-overlap.ckpt", "has zip entries that overlap"),
        ("torch-checksum.ckpt", "a checksum does not match"),
        ("torch-torchscript.ckpt", "TorchScript"),
        ("crowd-backbones.pth", "holds more than 8 backbones"),
        ("crowd-places.pth", "holds more than 8 backbones"),
        ("crowd-shared.pth", "names more than 50,000 tensors"),
        ("legacy-copies.pt", "holds no ResNet backbone"),
        ("traversal.safetensors.index.json", "names '../../../../etc/passwd', which is no weights file beside it"),
        ("ours-deep.safetensors", "its manifest cannot be read"),
        ("st-twice.safetensors", "names 'a' twice"),
    ],
)
def test_each_guard_is_the_one_that_refuses(corpus: Path, name: str, said: str) -> None:
    """One guard may hide another's failure: each must be seen to act on the file made for it."""
    with pytest.raises(UserError, match=re.escape(said)):
        load_backbone_weights(corpus / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("e.pth", b"", "is empty"),
        ("p.pth", b"<html>", "web page"),
        ("l.pth", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("n.pth", b"noise noise noise noise", "no torch, safetensors or pickle"),
        ("r.pkl", pickle.dumps([1, 2]), "holds a list"),
        ("z.pth", torch_zip(pickle.dumps(argparse.ArgumentParser)), "argparse.ArgumentParser"),
    ],
)
def test_sentences(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_tensors(tmp_path / name)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_tensors(path)
