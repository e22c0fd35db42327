"""Runs that are killed at critical points and resumed equal the uninterrupted run."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from loco_det.backbones.artifact import load_backbone
from loco_det.core import metrics
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.core.log import setup_logging
from pretrain import checkpoint, train
from pretrain.checkpoint import latest_checkpoint, save_checkpoint
from pretrain.defaults import get_cfg

STEPS = 7
INIT_SCALE = 2.0**126  # overflows in the first step
SETTINGS = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 DECODER.HIDDEN_DIM 16
    DECODER.OUT_DIM 8 DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 1
    SOLVER.BATCH_SIZE 4 SOLVER.MAX_STEPS {STEPS} SOLVER.WARMUP_EPOCHS 1 LOG_PERIOD 1 DEVICE cpu
    CHECKPOINT_PERIOD 2 KNN.PERIOD 1 KNN.K 3 SOLVER.AMP fp16 SOLVER.OPTIMIZER adamw SOLVER.BASE_LR 0.001"""


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_writing() -> None:
    """A checkpoint of which half is on the disk."""
    save = torch.save

    def half(state: object, file: object) -> None:
        save({"learner": state["learner"]}, file)
        file.flush()
        die()

    checkpoint.torch = type("torch", (), {"save": half, "load": torch.load})


def after_the_file_is_there() -> None:
    """The new checkpoint stands, and beside it the old ones that it replaces."""
    write = checkpoint.atomic_write

    @contextmanager
    def deadly(path: Path) -> Iterator[object]:
        with write(path) as file:
            yield file
        die()

    checkpoint.atomic_write = deadly


def in_the_middle_of_a_line() -> None:
    """Half a line of metrics.json."""
    dumps, calls = json.dumps, iter(range(9))

    def cut(values: dict) -> str:
        if next(calls) < 1:
            return dumps(values)
        with open(Path(sys.argv[1]) / "cut" / "metrics.json", "a") as file:
            file.write(dumps(values)[:40])
        die()

    metrics.json = type("json", (), {"dumps": cut, "loads": json.loads})


def between_line_and_checkpoint() -> None:
    """The line of a step is written and its checkpoint is not."""
    train._save = die


def in_the_middle_of_a_step() -> None:
    """Some stages are stepped and others are not."""
    step, calls = train.LocalTrainer.step, iter(range(9))

    def broken(self, *args: object, **options: object) -> object:
        final = self.on_final
        self.on_final = lambda k: (final(k), die() if next(calls) == 5 else None)
        return step(self, *args, **options)

    train.LocalTrainer.step = broken


MOMENTS: list[Callable[[], None]] = [
    in_the_middle_of_a_step,  # before there is any checkpoint
    between_line_and_checkpoint,
    in_the_middle_of_writing,
    after_the_file_is_there,
    in_the_middle_of_a_line,
    in_the_middle_of_writing,  # beside a whole one
    after_the_file_is_there,
]


def live(folder: Path, output: str, moment: Callable[[], None] | None = None, seconds: float = 0) -> int:
    """One process that resumes the run until it is done or killed; returns how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if moment is not None:
                moment()
            options = [*SETTINGS.split(), "DATA.PATH", str(folder / "images"), "OUTPUT_DIR", str(folder / output)]
            train.pretrain(load_config(get_cfg(), "", options)[0], resume=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lives(folder: Path) -> None:
    """Runs in a process of its own, which has made no threads: the whole run, and one that is killed many times."""
    setup_logging(quiet=True)
    # Half precision takes minutes on a CPU; a resume must bring back the scaler, here one that is never at rest.
    train.autocast = lambda *_: nullcontext
    torch.amp.GradScaler = partial(
        torch.amp.GradScaler, init_scale=INIT_SCALE, backoff_factor=2.0**-20, growth_factor=4.0, growth_interval=3
    )
    assert live(folder, "whole") == 0
    for moment in MOMENTS:
        assert live(folder, "cut", moment) == -signal.SIGKILL, moment
    live(folder, "cut", seconds=random.Random(0).uniform(0.3, 0.9))  # some time between its start and its end
    assert live(folder, "cut") == 0


def trace(output: Path) -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_share")} for line in found]


def tensors(value: object) -> list[torch.Tensor]:
    """All tensors and numbers in a checkpoint, in order."""
    if isinstance(value, dict):
        return [t for key in sorted(value, key=str) for t in tensors(value[key])]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors(item)]
    if isinstance(value, str) or value is None:
        return []
    return [torch.as_tensor(value)]


def test_killed_anywhere_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(13):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / str(i % 2) / f"{i:02d}.png"), cv2.resize(coarse, (24, 20)))
    script = "import sys, pathlib, test_pretrain_resume as t; t.lives(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    assert [line["iteration"] for line in trace(tmp_path / "cut")] == list(range(STEPS))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    assert [line["iteration"] for line in trace(tmp_path / "cut") if "knn/res5" in line] == [2, 5, 6]
    whole, cut = (latest_checkpoint(tmp_path / name)[1] for name in ("whole", "cut"))
    assert whole["step"] == STEPS
    assert len(tensors(whole)) == len(tensors(cut)) > 300
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(cut)))
    assert whole["scaler"]["scale"] < INIT_SCALE  # it has met an overflow
    manifests = [load_backbone(tmp_path / name / "backbone.safetensors")[1] for name in ("whole", "cut")]
    assert manifests[0].tensors_sha256 == manifests[1].tensors_sha256
    assert not list((tmp_path / "cut").glob(".*.tmp")), "what the kills left behind"


def test_no_checkpoint_goes_before_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tmp_path, {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000001.pth", "checkpoint_00000002.pth"]


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save(
        {**dict.fromkeys(checkpoint.KEYS, 0), "learner": Trap(tmp_path / "sprung")}, tmp_path / "checkpoint_1.pth"
    )
    with pytest.raises(UserError, match=r"checkpoint_1.pth: not a training state"):
        latest_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000003.pth", "checkpoint_00000004.pth"]
