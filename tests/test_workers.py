"""Loader processes: shared memory that is too small, and processes that die, are one sentence and never a hang."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_detection import tiny_cfg
from torch.utils.data import DataLoader

from loco_det.annotations.instances import Instances
from loco_det.annotations.loader import build_train_loader, check_room
from loco_det.annotations.masks import BitMasks
from loco_det.core import workers
from loco_det.core.errors import UserError
from loco_det.core.workers import check_shared_memory, raising, shared
from loco_det.detection.keys import load_cfg

MIB = 2**20


def room(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """Let shared memory have this much free, and twice that in all."""
    found = (2 * mib * MIB, mib * MIB, mib * MIB)  # total, used, free
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda folder: found)


def test_a_sentence_with_the_size_found_the_size_needed_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 64)
    with pytest.raises(UserError) as refused:
        check_shared_memory(20 * MIB, 4, "DATA.NUM_WORKERS")
    assert str(refused.value) == (
        "/dev/shm has 64 MiB free and 4 loader processes need 160 MiB; set DATA.NUM_WORKERS 1, or enlarge it: docker "
        "run --shm-size=1g"
    )
    assert refused.value.add == "DATA.NUM_WORKERS 1"
    check_shared_memory(20 * MIB, 1, "DATA.NUM_WORKERS")  # what it says to set
    check_shared_memory(8 * MIB, 4, "DATA.NUM_WORKERS")  # 64 of 64 MiB
    with pytest.raises(UserError, match=r"need 65 MiB; set --workers 3"):
        check_shared_memory(8 * MIB + 1, 4, "--workers")
    check_shared_memory(2**60, 0, "DATA.NUM_WORKERS")  # no processes, no need


def test_no_such_folder_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "FOLDER", tmp_path / "absent")
    check_shared_memory(2**60, 4, "DATA.NUM_WORKERS")


def test_training_looks_before_it_starts(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loco_det.annotations.loader.usable_cores", lambda: 4)
    room(monkeypatch, 0)
    build_train_loader(tiny_cfg(tmp_path, DATALOADER__NUM_WORKERS=0))
    with pytest.raises(UserError, match=r"2 loader processes need 1 MiB; set DATALOADER.NUM_WORKERS 0"):
        build_train_loader(tiny_cfg(tmp_path, DATALOADER__NUM_WORKERS=2))


def test_a_machine_needs_room_for_its_own_processes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight processes with two 800 x 1066 images each, or one with sixteen: four workers, two batches ahead."""
    monkeypatch.setattr("loco_det.annotations.loader.usable_cores", lambda: 4)
    cfg, share = load_cfg("", [])[0], 4 * 2 * 2 * 3 * 800 * 1066
    for processes, here, needed in ((1, 1, 8 * share), (8, 8, 8 * share), (64, 8, share), (8, 1, share)):
        monkeypatch.setattr("loco_det.annotations.loader.world_size", lambda count=processes: count)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        room(monkeypatch, -(-needed // MIB))
        check_room(cfg)
        room(monkeypatch, needed // MIB)
        with pytest.raises(UserError, match="4 loader processes need"):
            check_room(cfg)


class Batches:
    """A data set of batches by name; each as large as a page, so that it goes through shared memory."""

    def __getitem__(self, name: str) -> Any:
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "too large":  # what torch raises where /dev/shm is full
            torch.Tensor.share_memory_ = _full
        return [torch.full((1024,), float(len(name)))]


def _full(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nmore")


def loaded(*names: str) -> list[Any]:
    loader = DataLoader(Batches(), sampler=list(names), batch_size=None, num_workers=1, collate_fn=shared, timeout=60)
    return list(raising(loader))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dies", "a loader process died (DataLoader worker (pid"),
        ("too large", "found no room for its batch in shared memory (unable to allocate shared memory(shm) for file"),
    ],
)
def test_a_worker_that_fails_is_one_sentence(name: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 64)
    with pytest.raises(UserError) as refused:
        loaded("ok", name, "ok")
    text = str(refused.value)
    assert said in text
    assert "/dev/shm has 64 of 128 MiB free" in text
    assert "NUM_WORKERS 0" in text
    assert "\n" not in text
    assert "more" not in text.partition("; ")[0]


def test_another_error_stays_itself() -> None:
    def broken() -> Any:
        yield 1
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(raising(broken()))


def test_every_tensor_of_a_batch_is_moved_and_nothing_in_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = BitMasks(torch.zeros(2, 3, 3, dtype=torch.bool))
    one = Instances((3, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), masks=masks)
    batch = [{"image": torch.zeros(3, 4, 4), "instances": one, "name": "a"}, (torch.zeros(0), [torch.ones(1)])]
    tensors = [batch[0]["image"], one.boxes, one.classes, masks.bitmaps, batch[1][0], batch[1][1][0]]
    assert shared(batch) is batch
    assert not any(tensor.is_shared() for tensor in tensors)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: object())
    assert shared(batch) is batch
    assert all(tensor.is_shared() for tensor in tensors)


def test_a_batch_comes_as_it_was() -> None:
    assert [float(batch[0][0]) for batch in loaded("a", "bb")] == [1.0, 2.0]
