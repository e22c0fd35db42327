"""Nothing that a run has made is lost or taken for another run's: one run a folder, --resume only of the same run, and
metrics.json of a run that was killed and resumed is that of the run that was not."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_detection import tiny_cfg, write_tiny

from loco_det.backbones.artifact import load_backbone
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.core.metrics import RunMetrics
from loco_det.core.run_folder import SUMS, check_sums, differences, run_folder, summary
from loco_det.detection import loop
from loco_det.detection.checkpoint import Checkpointer
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.train import train_net
from loco_det.images.indexed import DatasetSource
from pretrain.checkpoint import save_checkpoint
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer
from pretrain.train import pretrain


class Killed(BaseException):
    """Ends a run where it stands: no handler of a failure sees it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def environment(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    monkeypatch.setattr(loop, "LOG_PERIOD", 3)


# --- the folder -------------------------------------------------------------------------------------------------


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """`folder` while a run is at work in it, in a process whose number is given."""
    code = "import sys\nfrom loco_det.core.run_folder import run_folder\n"
    code += "with run_folder(sys.argv[1]):\n    print(flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process.pid
        process.kill()


def test_a5_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "run") as number, pytest.raises(UserError, match=rf"\(process {number} on "):
        run_folder(tmp_path / "run").__enter__()
    with run_folder(tmp_path / "run"):  # it is free again, though the other was killed
        pass


def test_a5_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    code = "import os, sys, time\nfrom loco_det.core.run_folder import run_folder\n"
    code += "with run_folder(sys.argv[1]):\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True) as process:
        process.wait()
        try:
            with run_folder(tmp_path):
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("job", ["train", "pretrain"])
def test_a5_both_jobs_hold_their_folder(job: str, tmp_path: Path, images: Path) -> None:
    jobs = {
        "train": lambda: train_net(tiny_cfg(tmp_path), engine="torchvision"),
        "pretrain": lambda: pretrain(tiny_pretraining(tmp_path, images)),
    }
    with held_by_another(tmp_path), pytest.raises(UserError, match="another run is using it"):
        jobs[job]()
    assert {file.name for file in tmp_path.iterdir()} == {".lock"}


def test_a7_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".model_0000003.pth.123.tmp").write_bytes(b"half")
    (tmp_path / "own.tmp").write_bytes(b"the user's")
    with run_folder(tmp_path):
        assert {file.name for file in tmp_path.iterdir()} == {".lock", "own.tmp"}


def test_what_a_finished_run_left_is_known_by_its_checksums(tmp_path: Path) -> None:
    def run(line: str, fail: bool = False) -> None:
        with run_folder(tmp_path):
            assert not (tmp_path / SUMS).exists(), "it would be wrong while the run is at work"
            if fail:
                raise UserError("refused")
            (tmp_path / "metrics.json").write_text(line)
            (tmp_path / "inference").mkdir(exist_ok=True)
            (tmp_path / "inference" / "results.json").write_text(line)

    run("[1]")
    lines = [line.split("  ") for line in (tmp_path / SUMS).read_text().splitlines()]
    assert lines == [[hashlib.sha256(b"[1]").hexdigest(), name] for name in ("inference/results.json", "metrics.json")]
    check_sums(tmp_path)
    with pytest.raises(UserError, match="refused"):
        run("", fail=True)
    check_sums(tmp_path)
    assert (tmp_path / SUMS).exists(), "a run that is refused takes nothing from the earlier one"
    (tmp_path / "metrics.json").write_text("[2]")
    for only in (None, tmp_path / "metrics.json"):
        with pytest.raises(UserError, match=r"metrics.json: is not what the run wrote; .* delete .*SHA256SUMS"):
            check_sums(tmp_path, only)
    check_sums(tmp_path, tmp_path / "inference" / "results.json")
    with pytest.raises(UserError, match="refused"):
        run("", fail=True)
    assert not (tmp_path / SUMS).exists(), "what was changed is not vouched for"
    (tmp_path / SUMS).write_text("no sums\n")
    with pytest.raises(UserError, match="SHA256SUMS: is damaged"):
        check_sums(tmp_path)


def test_differences_names_the_keys_that_count() -> None:
    before = {"A": {"B": 1, "C": [1, 2]}, "D": "x", "KNN": {"K": 1}, "GONE": 1}
    now = {"A": {"B": 2, "C": [1, 2]}, "D": "y", "KNN": {"K": 2}, "NEW": None}
    found = differences(before, now, ("D", "KNN."))
    assert found == {"A.B": "1 before, 2 now", "GONE": "1 before, absent now"}
    assert summary(found) == "A.B is 1 before, 2 now; GONE is 1 before, absent now"
    assert summary(dict.fromkeys("abcde", "1 before, 2 now")).endswith("; and 2 more")


# --- pretraining ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), "a")


def write_images(folder: Path, prefix: str) -> Path:
    rng = np.random.default_rng(0)
    for i in range(8):
        cv2.imwrite(str(folder / f"{prefix}{i}.png"), rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    return folder


TINY_PRETRAINING = """BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 DECODER.HIDDEN_DIM 8 DECODER.OUT_DIM 8
    DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 4 SOLVER.MAX_STEPS 2 CHECKPOINT_PERIOD 1 DEVICE cpu"""


def tiny_pretraining(output: Path, images: Path, *more: object) -> Any:
    words = [*TINY_PRETRAINING.split(), "OUTPUT_DIR", str(output), "DATA.PATH", str(images), *map(str, more)]
    return load_config(get_cfg(), "configs/pretrain/loco_r18_cifar.yaml", words)[0]


def test_a4_pretraining_does_not_resume_an_earlier_run(tmp_path: Path, images: Path) -> None:
    """Run A is done; run B begins in its folder and is killed before its first checkpoint."""
    pretrain(tiny_pretraining(tmp_path / "run", images))
    kept = {file.name for file in (tmp_path / "run").glob("checkpoint_*.pth")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train._save", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pretrain(tiny_pretraining(tmp_path / "run", images, "SEED", 5))
    assert {file.name for file in (tmp_path / "run").glob("earlier_run_*")} == {f"earlier_run_{name}" for name in kept}
    again = pretrain(tiny_pretraining(tmp_path / "run", images, "SEED", 5), resume=True)
    alone = pretrain(tiny_pretraining(tmp_path / "alone", images, "SEED", 5))
    assert load_backbone(again)[1].tensors_sha256 == load_backbone(alone)[1].tensors_sha256
    assert not list((tmp_path / "run").glob("earlier_run_*")), "they go when this run has a checkpoint"


def test_a7_what_a_run_killed_after_its_last_save_did_not_delete_goes_when_it_is_resumed(
    tmp_path: Path, images: Path
) -> None:
    cfg = tiny_pretraining(tmp_path, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.train.write_backbone", lambda *_: die())
        with pytest.raises(Killed):
            pretrain(cfg)
    kept = {file.name for file in tmp_path.glob("*.pth")}
    for name in ("checkpoint_00000000.pth", "earlier_run_checkpoint_00000009.pth"):
        (tmp_path / name).write_bytes(b"old")
    pretrain(cfg, resume=True)
    assert {file.name for file in tmp_path.glob("*.pth")} == kept


def test_a4_pretraining_names_what_differs(tmp_path: Path, images: Path) -> None:
    pretrain(tiny_pretraining(tmp_path / "run", images))
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"another configuration \(SOLVER.BASE_LR is \S+ before, 0.25 now\)"):
        pretrain(tiny_pretraining(tmp_path / "run", images, "SOLVER.BASE_LR", 0.25), resume=True)
    (tmp_path / "others").mkdir()
    others = write_images(tmp_path / "others", "b")
    with pytest.raises(UserError, match="images of other names"):
        pretrain(tiny_pretraining(tmp_path / "run", others), resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    (tmp_path / "moved").mkdir()
    moved = write_images(tmp_path / "moved", "a")
    pretrain(tiny_pretraining(tmp_path / "run", moved), resume=True)  # the same names elsewhere are the same


def test_a7_a_full_disk_is_a_sentence_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    state = {"learner": torch.zeros(10), "step": 1}
    save_checkpoint(tmp_path, state)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
        with pytest.raises(UserError, match=r"checkpoint_00000002.pth: cannot be written .*free space"):
            save_checkpoint(tmp_path, {"learner": torch.zeros(2**20), "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_00000001.pth"]


# --- detection --------------------------------------------------------------------------------------------------


def test_a4_a_new_run_is_never_resumed_from_an_earlier_one(tmp_path: Path) -> None:
    short = {"SOLVER__MAX_ITER": 2, "SOLVER__STEPS": (), "DATASETS__TEST": ()}
    train_net(tiny_cfg(tmp_path / "run", **short), engine="torchvision")
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_write_line", lambda *_: (_ for _ in ()).throw(Killed))
        patch.setattr(log, "warning", lambda text, *values: warned.append(text % values))
        with pytest.raises(Killed):
            train_net(tiny_cfg(tmp_path / "run", SEED=9, **short), engine="torchvision")
    assert (tmp_path / "run" / "model_final.pth").is_file(), "the earlier run's model is the user's"
    assert [text for text in warned if f"{tmp_path / 'run'} holds a run already; this one begins anew" in text]
    train_net(tiny_cfg(tmp_path / "run", SEED=9, **short), engine="torchvision", resume=True)
    train_net(tiny_cfg(tmp_path / "alone", SEED=9, **short), engine="torchvision")
    again, alone = (torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("run", "alone"))
    for name, tensor in alone.items():
        assert torch.equal(again[name], tensor), name


def test_a4_detection_names_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": (), "DATASETS__TEST": ()}
    train_net(tiny_cfg(tmp_path / "run", **short), engine="torchvision")
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"another configuration \(SOLVER.BASE_LR is 0.01 before, 0.02 now\)"):
        train_net(tiny_cfg(tmp_path / "run", SOLVER__BASE_LR=0.02, **short), engine="torchvision", resume=True)
    own = write_tiny(tmp_path / "own")
    file = own / "tiny" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(own))
    with pytest.raises(UserError, match=r"other annotations than those of tiny_train"):
        train_net(tiny_cfg(tmp_path / "run", **short), engine="torchvision", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_a4_a_run_may_be_lengthened(tmp_path: Path) -> None:
    short = {"SOLVER__STEPS": (), "DATASETS__TEST": ()}
    train_net(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, **short), engine="torchvision")
    train_net(tiny_cfg(tmp_path, SOLVER__MAX_ITER=2, **short), engine="torchvision", resume=True)
    state = torch.load(tmp_path / "model_final.pth")
    assert state["iteration"] == 1
    assert "MAX_ITER: 2\n" in state["loco_det"]["config"]


def test_a4_a_new_run_that_is_refused_leaves_the_earlier_one_resumable(tmp_path: Path) -> None:
    short = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": (), "DATASETS__TEST": ()}
    train_net(tiny_cfg(tmp_path, **short), engine="torchvision")
    kept = {name: (tmp_path / name).read_text() for name in ("last_checkpoint", "run.json", "config.yaml")}
    absent = write_tiny(tmp_path / "absent")
    (absent / "tiny" / "train" / "4.png").unlink()
    place = f"{absent / 'tiny' / 'annotations' / 'instances_train.json'}@{absent / 'tiny' / 'train'}"
    for wrong, key in (
        ({"SOLVER__CHECKPOINT_PERIOD": 0}, "SOLVER.CHECKPOINT_PERIOD"),
        ({"SOLVER__BASE_LR": -1.0}, "learning rate|SOLVER.BASE_LR"),
        ({"DATASETS__TRAIN": (place,)}, r"4\.png"),
    ):
        with pytest.raises(UserError, match=key):
            train_net(tiny_cfg(tmp_path, **{**short, **wrong}), engine="torchvision")
    assert {name: (tmp_path / name).read_text() for name in kept} == kept


def test_a4_pretraining_that_is_refused_leaves_the_earlier_run_resumable(tmp_path: Path, images: Path) -> None:
    pretrain(tiny_pretraining(tmp_path, images))
    names = {file.name for file in tmp_path.glob("*.pth")}
    with pytest.raises(UserError):
        pretrain(tiny_pretraining(tmp_path, images, "KNN.VAL_PATH", images, "KNN.PERIOD", 1))
    with pytest.raises(UserError, match="METHOD random"):
        pretrain(tiny_pretraining(tmp_path, images, "METHOD", "random"), resume=True)
    assert {file.name for file in tmp_path.glob("*.pth")} == names


def test_a4_what_may_differ_may(tmp_path: Path) -> None:
    """Thresholds of testing, and where the training set lies."""
    own = write_tiny(tmp_path / "here")
    short = {"SOLVER__STEPS": (), "DATASETS__TEST": ()}

    def named(root: Path) -> tuple[str]:
        return (f"{root / 'tiny' / 'annotations' / 'instances_train.json'}@{root / 'tiny' / 'train'}",)

    train_net(tiny_cfg(tmp_path / "run", SOLVER__MAX_ITER=1, DATASETS__TRAIN=named(own), **short), engine="torchvision")
    own.rename(tmp_path / "there")
    changes = {"MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.3, "DATASETS__TRAIN": named(tmp_path / "there")}
    again = tiny_cfg(tmp_path / "run", SOLVER__MAX_ITER=2, **changes, **short)
    train_net(again, engine="torchvision", resume=True)
    assert torch.load(tmp_path / "run" / "model_final.pth")["iteration"] == 1
    with pytest.raises(UserError, match=r"SOLVER.MAX_ITER is 1; .*has done 2"):
        train_net(tiny_cfg(tmp_path / "run", SOLVER__MAX_ITER=1, **changes, **short), engine="torchvision", resume=True)


def test_a4_evaluation_of_the_last_checkpoint_is_of_the_model_it_holds(tmp_path: Path) -> None:
    train_net(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), DATASETS__TEST=()), engine="torchvision")
    record = (tmp_path / "run.json").read_text()
    other = tiny_cfg(tmp_path, MODEL__ANCHOR_GENERATOR__SIZES=[[4], [8], [16], [32], [64]])
    with pytest.raises(UserError, match=r"MODEL.ANCHOR_GENERATOR.SIZES is"):
        train_net(other, engine="torchvision", eval_only=True, resume=True)
    train_net(tiny_cfg(tmp_path, SOLVER__BASE_LR=0.5), engine="torchvision", eval_only=True, resume=True)
    assert (tmp_path / "run.json").read_text() == record
    with pytest.raises(UserError, match="no last_checkpoint to evaluate"):
        train_net(tiny_cfg(tmp_path / "empty"), engine="torchvision", eval_only=True, resume=True)


def test_a4_images_out_of_objects_are_known_by_more_than_their_number() -> None:
    rng = np.random.default_rng(0)
    one, other = ([rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(4)] for _ in range(2))
    assert DatasetSource(one).identity() == DatasetSource(list(one)).identity()
    assert DatasetSource(one).identity() != DatasetSource(other).identity()


EVERY = {"SOLVER__CHECKPOINT_PERIOD": 2, "TEST__EVAL_PERIOD": 2, "SOLVER__MAX_ITER": 7}
TIMES = ("time", "data_time", "eta_seconds")


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(data))
        patch.setattr(loop, "LOG_PERIOD", 3)
        train_net(tiny_cfg(folder, **EVERY), engine="torchvision")
    return lines(folder)


def on_call(number: int, before: bool, action: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose call `number` runs `action` before or after it."""
    calls = iter(range(1000))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == number
        if now and before:
            action()
        result = function(*args, **kwargs)
        if now and not before:
            action()
        return result

    return wrapped


def die() -> None:
    raise Killed


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("name", "number"), [("evaluate", 1), ("write", 2), ("save", 1), ("save", 2)])
def test_a6_wherever_a_run_is_killed_its_metrics_are_those_of_the_whole(
    name: str, number: int, before: bool, whole: list[dict[str, float]], tmp_path: Path
) -> None:
    cfg = tiny_cfg(tmp_path, **EVERY)
    owner = {"save": Checkpointer, "write": RunMetrics}.get(name, loop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, on_call(number, before, die, getattr(owner, name)))
        with pytest.raises(Killed):
            train_net(cfg, engine="torchvision")
    train_net(cfg, engine="torchvision", resume=True)
    assert lines(tmp_path) == whole


@pytest.mark.parametrize("iteration", [3, 5])  # an evaluation is due, and in the last also the medians
def test_a6_a_stop_in_an_iteration_whose_line_is_due(
    iteration: int, whole: list[dict[str, float]], tmp_path: Path
) -> None:
    cfg = tiny_cfg(tmp_path, **EVERY)
    with pytest.MonkeyPatch.context() as patch:
        stop = on_call(iteration, True, lambda: os.kill(os.getpid(), signal.SIGTERM), TorchvisionEngine.losses)
        patch.setattr(TorchvisionEngine, "losses", stop)
        with pytest.raises(UserError, match="stopped by SIGTERM"):
            train_net(cfg, engine="torchvision")
    train_net(cfg, engine="torchvision", resume=True)
    assert lines(tmp_path) == whole


def test_a6_a_line_that_was_due_is_not_written_twice(whole: list[dict[str, float]], tmp_path: Path) -> None:
    """Stopped in an iteration whose line is due, resumed, killed before the next checkpoint, resumed."""
    cfg = tiny_cfg(tmp_path, **EVERY)
    with pytest.MonkeyPatch.context() as patch:
        stop = on_call(3, True, lambda: os.kill(os.getpid(), signal.SIGTERM), TorchvisionEngine.losses)
        patch.setattr(TorchvisionEngine, "losses", stop)
        with pytest.raises(UserError, match="stopped by SIGTERM"):
            train_net(cfg, engine="torchvision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchvisionEngine, "losses", on_call(1, True, die, TorchvisionEngine.losses))
        with pytest.raises(Killed):
            train_net(cfg, engine="torchvision", resume=True)
    train_net(cfg, engine="torchvision", resume=True)
    assert lines(tmp_path) == whole


def test_a6_a_run_killed_between_its_last_two_checkpoints_ends_with_both(tmp_path: Path) -> None:
    """The last iteration saves under its number, then as model_final."""
    cfg = tiny_cfg(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SOLVER__CHECKPOINT_PERIOD=2)
    train_net(cfg, engine="torchvision")
    final = (tmp_path / "model_final.pth").read_bytes()
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    train_net(cfg, engine="torchvision", resume=True)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)
    whole = torch.load(io.BytesIO(final), weights_only=True)
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in whole["model"].items())


def test_a2_pretraining_that_images_end_is_saved(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    images = write_images(tmp_path / "images", "a")
    cfg = tiny_pretraining(tmp_path / "run", images, "SOLVER.MAX_STEPS", 9, "CHECKPOINT_PERIOD", 100)
    step = LocalTrainer.step

    def damage(self: LocalTrainer, *args: Any, **options: Any) -> Any:
        for file in images.glob("*.png"):
            file.write_bytes(b"no image")
        return step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalTrainer, "step", damage)
        with pytest.raises(UserError):
            pretrain(cfg)
    assert list((tmp_path / "run").glob("checkpoint_*.pth"))


def test_a3_an_evaluation_that_fails_does_not_end_a_training(
    whole: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UserError("img/7.png is damaged")

    said: list[str] = []
    monkeypatch.setattr(loop.log, "error", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(loop, "evaluate", on_call(0, True, fail, loop.evaluate))
    train_net(tiny_cfg(tmp_path, **EVERY), engine="torchvision")
    assert said == ["evaluation after iteration 2 failed, training continues: img/7.png is damaged"]
    assert lines(tmp_path) == [line for line in whole if line["iteration"] != 1]


def test_a_disk_too_full_for_the_lock_is_one_sentence(tmp_path: Path) -> None:
    """Closing the file must not write what could not be written before."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"), run_folder(tmp_path / "run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_sums_of_terabytes_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / SUMS, "wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(UserError, match="SHA256SUMS: is damaged"):
        check_sums(tmp_path)
