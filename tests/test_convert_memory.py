"""A conversion costs the backbone, not the checkpoint: memory is measured in a process of its own, format by format."""

from __future__ import annotations

import gc
import json
import pickle
import select
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from convert_cases import detectron_pkl, randomised

from loco_det.backbones.names import to_detectron2
from loco_det.convert import read_backbone_tensors
from loco_det.convert.load import in_memory, load_tensors, open_tensors
from loco_det.convert.sources import flatten
from loco_det.core.errors import UserError

MB = 2**20
HUGE = 96 * MB
SCRIPT = """
import ctypes, sys
import cv2, safetensors.torch, timm, torch, torchvision
from loco_det.convert import Stated, convert
for dtype in (torch.float32, torch.float64):  # the kernels' own memory is not the conversion's
    torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8, dtype=dtype), torch.ones(4, 3, 3, 3, dtype=dtype))
stated = Stated("RGB", (1.0, 1.0, 1.0), (9.0, 9.0, 9.0))
for source in sys.argv[2:]:
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier conversion freed must not hide what this one takes
    print("ready", flush=True)
    input()
    convert(source, sys.argv[1], **({"stated": stated} if source.endswith(".pkl") else {"branch": "query"}))
    print("done", flush=True)
"""


def own_memory(process: int) -> int:
    """Bytes in memory that are the process's own: no page of a mapped file that it has not written to is among them."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def peaks(folder: Path, sources: list[Path]) -> list[int]:
    """How much memory of its own a process takes more while it converts each of the files, looked at all the time."""
    command = [sys.executable, "-c", SCRIPT, str(folder / "out.pkl"), *map(str, sources)]
    grown = []
    with (
        (folder / "stderr").open("w+") as stderr,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
    ):
        for _ in sources:
            said = child.stdout.readline()
            assert said == "ready\n", (said, (folder / "stderr").read_text()[-2000:])
            before = largest = own_memory(child.pid)
            child.stdin.write("\n")
            child.stdin.flush()
            while not select.select([child.stdout], [], [], 0.001)[0]:
                largest = max(largest, own_memory(child.pid))
            said = child.stdout.readline()
            assert said == "done\n", (said, (folder / "stderr").read_text()[-2000:])
            grown.append(largest - before)
    return grown


def moco_like() -> tuple[dict, int]:
    """A MoCo checkpoint whose queue and optimizer state are far larger than its backbone; and the backbone's bytes."""
    state = randomised(torchvision.models.resnet18()).state_dict()
    size = sum(t.nbytes for n, t in state.items() if "num_batches" not in n and not n.startswith("fc."))
    both = {f"module.encoder_{q}.{n}": t + 0 for q in "qk" for n, t in state.items()}
    huge = [torch.zeros(128, HUGE // 4 // 128) for _ in range(3)]
    optimizer = {"state": {i: {"exp_avg": tensor} for i, tensor in enumerate(huge[1:])}}
    return {"state_dict": {**both, "module.queue": huge[0]}, "optimizer": optimizer}, size


def shards(folder: Path, content: dict) -> Path:
    """The state dict and the rest in two safetensors files, and their index."""
    flat = dict(content["state_dict"])
    parts = [flat, {"module.queue2": content["optimizer"]["state"][0]["exp_avg"]}]
    places = {}
    for number, part in enumerate(parts):
        safetensors.torch.save_file(part, folder / f"model-{number}.safetensors")
        places.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder / "model.safetensors.index.json"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """At most 1.5 times the backbone and the largest tensor of the file, whatever else is in it, for every format.

    What is counted is the process's own memory. Pages of a mapped file are in memory while there is room for them, and
    how many is for the system to say.
    """
    content, size = moco_like()
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(content["state_dict"], tmp_path / "one.safetensors")
    start = "module.encoder_q."
    own = {k.removeprefix(start): t for k, t in content["state_dict"].items() if k.startswith(start)}
    arrays = {to_detectron2(k): t.numpy() for k, t in own.items() if not k.startswith("fc.")}
    arrays |= {f"roi_heads.{i}": np.zeros(HUGE // 4, np.float32) for i in range(3)}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol=4))
    sources = [tmp_path / name for name in ("zip.pth", "legacy.pth", "one.safetensors", "arrays.pkl")]
    sources.append(shards(tmp_path, content))
    del content, own, arrays
    grown = dict(zip((path.name for path in sources), peaks(tmp_path, sources), strict=True))
    print(f"{size / MB:.0f} MiB of backbone;", {name: f"{taken / MB:.0f} MiB" for name, taken in grown.items()})
    assert size < HUGE
    assert max(grown.values()) <= 1.5 * size + HUGE


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    return dict(flatten(path, open_tensors(path)))


def test_views_of_every_kind_are_mapped_and_copied_whole(tmp_path: Path) -> None:
    """What is opened agrees with what was saved on dtype, shape and values, wherever it lies; a copy is contiguous."""
    base = torch.arange(24.0)
    content = {
        "a": base.reshape(4, 6).T,
        "b": base[::5],
        "c": torch.tensor(3, dtype=torch.int64),
        "d": torch.ones(0, 2),
        "e": torch.ones(2, dtype=torch.complex64),
        "f": torch.ones(3).to(torch.float8_e4m3fn),
        "g": torch.tensor([1.5]).expand(2, 4),
    }
    for padding in range(8):  # in old files, which align nothing, every address comes up
        for modern in (True, False):
            padded = {"x" * padding: 0, **content}
            torch.save(padded, tmp_path / "c.pth", _use_new_zipfile_serialization=modern)
            opened = tensors_in(tmp_path / "c.pth")
            assert opened.keys() == content.keys()
            for key, tensor in content.items():
                assert (opened[key].dtype, opened[key].shape) == (tensor.dtype, tensor.shape)
                found = in_memory(opened[key])
                assert found.is_contiguous()
                assert found.data_ptr() % found.dtype.itemsize == 0
                wide = torch.complex64 if tensor.is_complex() else torch.float64  # float8 has no equality of its own
                assert torch.equal(found.to(wide), tensor.to(wide))
            for tensor in dict(flatten("c.pth", load_tensors(tmp_path / "c.pth"))).values():
                assert tensor.data_ptr() % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("modern", [True, False])
def test_what_was_read_goes_with_its_last_name(tmp_path: Path, modern: bool) -> None:
    """And not when the garbage collector comes by: a checkpoint is gigabytes."""
    torch.save({"a": [torch.zeros(5)]}, tmp_path / "c.pth", _use_new_zipfile_serialization=modern)
    gc.collect()
    gc.disable()
    try:
        gone = [weakref.ref(read(tmp_path / "c.pth")["a"][0]) for read in (open_tensors, load_tensors)]
        assert [found() for found in gone] == [None, None]
    finally:
        gc.enable()


def test_arrays_of_any_byte_order_and_layout(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(7, 300)).astype(np.float32)
    for protocol in (2, 4, 5):
        content = {"<": array, ">": array.astype(">f4"), "F": np.asfortranarray(array), "T": array[:, ::2]}
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        for key, tensor in tensors_in(tmp_path / "w.pkl").items():
            assert np.array_equal(in_memory(tensor).numpy(), content[key]), (protocol, key)
    (tmp_path / "w.pkl").write_bytes(detectron_pkl({"conv1_w": torch.from_numpy(array)}))
    assert np.array_equal(in_memory(tensors_in(tmp_path / "w.pkl")["conv1_w"]).numpy(), array)


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2000)}, tmp_path / "c.pth")
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": np.zeros(2000, np.float32)}, protocol=5))
    for path in (tmp_path / "c.pth", tmp_path / "w.pkl"):
        before = path.read_bytes()
        open_tensors(path)["a"].fill_(7)
        assert path.read_bytes() == before


def test_a_changed_bit_is_found(tmp_path: Path) -> None:
    """torch's own reader passes over the checksums of a zip file."""
    path = tmp_path / "c.pth"
    torch.save({"a": torch.arange(12.0), "b": torch.ones(5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(12.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert open_tensors(path)["b"].sum() == 5
    for read in (load_tensors, read_backbone_tensors):
        with pytest.raises(UserError, match=r"c\.pth: is damaged or incomplete \(Bad CRC-32"):
            read(path)


@pytest.mark.parametrize("modern", [True, False])
def test_many_views_of_one_storage_are_not_copied_without_end(tmp_path: Path, modern: bool) -> None:
    """A megabyte must not become a terabyte: not by views of one storage, nor by numbers that a view repeats."""
    path, storage = tmp_path / "c.pth", torch.zeros(2**18)
    for views in (3000, 3):  # 3 as tied weights have
        torch.save({"v": [storage.view(-1) for _ in range(views)]}, path, _use_new_zipfile_serialization=modern)
        if views == 3:
            assert len(load_tensors(path)["v"]) == 3
            continue
        with pytest.raises(UserError, match="its tensors amount to more than the file holds"):
            load_tensors(path)
    torch.save({"v": torch.zeros(1).expand(2**12, 2**12)}, path, _use_new_zipfile_serialization=modern)
    with pytest.raises(UserError, match="its tensors amount to more than the file holds"):
        open_tensors(path)
