"""`loco-det sweep`: the grid, nothing twice, failures apart, launchers, and one real cell."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_detection import RESNET_18, overrides, write_tiny

from loco_det import arguments as command_arguments
from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.cli import main
from loco_det.commands import sweep
from loco_det.core import jobs
from loco_det.core.errors import UserError

CONFIG = "configs/coco_loco_r50.yaml"
# Stands for `train`: counts its calls, fails for seed 2, writes what train writes.
FAKE = """
import json, pathlib, sys
folder, seed, fraction = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with open(folder / "calls", "a") as file:
    file.write("x")
if seed == 2 and not (folder.parent / "mended").exists():
    print("some text"); print("error: out of luck"); sys.exit(2)
lines = [{"iteration": 0, "total_loss": 1.0}, {"iteration": 9, "bbox/AP": 10 * seed + fraction, "segm/AP": None}]
(folder / "metrics.json").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sweep,
        "_command",
        lambda args, weights, fraction, seed, folder: [
            sys.executable,
            "-c",
            FAKE,
            str(folder),
            str(seed),
            str(fraction),
        ],
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two .pkl files, which are used as they are."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.pkl").write_bytes(name.encode())
    return tmp_path


def run(out: Path, *options: object, config: str = CONFIG) -> int:
    return main([str(a) for a in ("sweep", "--config-file", config, "--out", out, *options)])


def calls(out: Path) -> dict[str, int]:
    return {str(f.parent.relative_to(out)): len(f.read_text()) for f in out.rglob("calls")}


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_grid_is_run_once_and_failures_stay_apart(
    weights: Path, fake: None, jobs: int, capsys: pytest.CaptureFixture
) -> None:
    out = weights / "out"
    grid = ("--backbones", weights / "a.pkl", weights / "b.pkl", "--seeds", 0, 1, 2, "--fractions", 1.0, 0.1)
    assert run(out, *grid, "--jobs", jobs) == 1
    text = capsys.readouterr()
    assert len(calls(out)) == 12
    assert set(calls(out).values()) == {1}
    assert "status 2: error: out of luck" in text.err
    assert "6.00 ± 7.07" in text.out  # of 0 + 1 and 10 + 1 at fraction 1
    record = json.loads((out / "sweep.json").read_text())
    assert sum(cell["done"] for cell in record["cells"]) == 8
    assert len(record["failed"]) == 4
    result = json.loads((out / "a/fraction-0.1_seed-1/result.json").read_text())
    assert result["results"] == {"bbox/AP": 10.1, "segm/AP": None}
    for name in "ab":  # now what failed works: only that is run again
        (out / name / "mended").touch()
    assert run(out, *grid, "--jobs", jobs) == 0
    assert {k for k, n in calls(out).items() if n == 2} == {
        f"{name}/fraction-{f}_seed-2" for name in "ab" for f in ("1", "0.1")
    }
    assert run(out, *grid) == 0
    assert max(calls(out).values()) == 2
    assert "11.00 ± 10.00" in capsys.readouterr().out


def test_one_bad_backbone_does_not_stop_the_others(weights: Path, fake: None, capsys: pytest.CaptureFixture) -> None:
    (weights / "c.pth").write_bytes(b"nothing")
    files = (weights / "c.pth", weights / "none.pkl", f"mine={weights / 'a.pkl'}")
    assert run(weights / "out", "--backbones", *files) == 1
    assert calls(weights / "out") == {"mine/fraction-1_seed-0": 1}
    err = capsys.readouterr().err
    assert "c.pth" in err
    assert "none.pkl: no such file" in err


def test_other_settings_are_not_mixed_in(weights: Path, fake: None, capsys: pytest.CaptureFixture) -> None:
    out, options = weights / "out", ("--backbones", weights / "a.pkl")
    assert run(out, *options) == 0
    assert run(out, *options, "--set", "SOLVER.BASE_LR", 0.5) == 1
    assert "choose another --out" in capsys.readouterr().err
    (weights / "a.pkl").write_bytes(b"other")
    assert run(out, *options) == 1
    assert calls(out) == {"a/fraction-1_seed-0": 1}


def test_a_cell_that_another_sweep_runs_is_left_alone(weights: Path, fake: None, capsys: pytest.CaptureFixture) -> None:
    folder = weights / "out/a/fraction-1_seed-0"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(weights / "out", "--backbones", weights / "a.pkl") == 1
    assert "another sweep" in capsys.readouterr().err
    assert not calls(weights / "out")


def test_the_same_cell_twice_is_one_cell(weights: Path, fake: None, capsys: pytest.CaptureFixture) -> None:
    grid = ("--backbones", weights / "a.pkl", "--seeds", 1, 1, 3, "--fractions", 1.0, 1)
    assert run(weights / "out", *grid) == 0
    assert calls(weights / "out") == {f"a/fraction-1_seed-{seed}": 1 for seed in (1, 3)}
    assert "21.00 ± 14.14" in capsys.readouterr().out  # of 11 and 31


def test_b6_fractions_that_differ_anywhere_have_folders_of_their_own(weights: Path, fake: None) -> None:
    out = weights / "out"
    grid = ("--backbones", weights / "a.pkl", "--seeds", 1, "--fractions", 0.1, 0.1000001, 1.0)
    assert run(out, *grid) == 0
    folders = {f"a/fraction-{text}_seed-1": 1 for text in ("0.1", "0.1000001", "1")}
    assert calls(out) == folders
    assert [cell["results"]["bbox/AP"] for cell in json.loads((out / "sweep.json").read_text())["cells"]] == [
        10.1,
        10.1000001,
        11.0,
    ]


def test_a_folder_that_cannot_be_written_is_the_failure_of_its_cell(
    weights: Path, fake: None, capsys: pytest.CaptureFixture
) -> None:
    (weights / "out").mkdir()
    (weights / "out" / "a").write_text("in the way")
    assert run(weights / "out", "--backbones", weights / "a.pkl", weights / "b.pkl") == 1
    assert calls(weights / "out") == {"b/fraction-1_seed-0": 1}
    assert str(weights / "out" / "a") in capsys.readouterr().err


# A sweep of two cells whose process waits until it is told to stop, and then needs a moment to save.
WAITING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands it on as ignored
from loco_det.commands import sweep
from loco_det.cli import main
CELL = '''
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.2); (folder / "saved").touch(); sys.exit(2)
signal.signal(signal.SIGTERM, save)
(folder / "started.tmp").write_text(str(__import__("os").getpid())); (folder / "started.tmp").rename(folder / "started")
time.sleep(600)
'''
sweep._command = lambda args, weights, fraction, seed, folder: [sys.executable, "-c", CELL, str(folder)]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def waiting(weights: Path) -> Iterator[tuple[subprocess.Popen, list[str], Path]]:
    """A sweep whose first cell runs, its arguments, and that cell's folder."""
    out = weights / "out"
    argv = ["sweep", "--config-file", CONFIG, "--out", str(out), "--backbones", str(weights / "a.pkl")]
    argv += ["--seeds", "0", "1"]
    folder = out / "a" / "fraction-1_seed-0"
    with subprocess.Popen([sys.executable, "-c", WAITING, *argv], stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "started").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        yield process, argv, folder
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_cell_save_and_starts_no_other(waiting, number: int) -> None:
    process, _, folder = waiting
    process.send_signal(number)
    assert process.wait(60) == 130
    assert (folder / "saved").exists()
    assert not (folder.parent / "fraction-1_seed-1" / "started").exists()


def test_a_cell_outlives_a_killed_sweep_and_stays_taken(waiting, fake: None, capsys: pytest.CaptureFixture) -> None:
    process, argv, folder = waiting
    process.kill()
    process.wait(60)
    try:
        assert main(argv) == 1
        assert f"{folder}: another sweep is running it" in capsys.readouterr().err
        assert not (folder / "calls").exists()
        assert (folder.parent / "fraction-1_seed-1" / "result.json").exists()
    finally:
        os.kill(int((folder / "started").read_text()), signal.SIGKILL)


def test_a_run_without_a_result_is_not_done(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_command", lambda *_: [sys.executable, "-c", "print('all well')"])
    assert run(weights / "out", "--backbones", weights / "a.pkl") == 1
    assert not list((weights / "out").rglob("result.json"))


def test_submitit_runs_cells_as_jobs(weights: Path, fake: None) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    options = ("--backbones", weights / "a.pkl", "--seeds", 0, 2, "--launcher", "submitit", "--cluster", "local")
    assert run(weights / "out", *options) == 1
    assert calls(weights / "out") == {f"a/fraction-1_seed-{seed}": 1 for seed in (0, 2)}
    assert (weights / "out/a/fraction-1_seed-0/result.json").is_file()
    assert not (weights / "out/a/fraction-1_seed-2/result.json").exists()
    assert list((weights / "out" / "submitit").iterdir())


def test_no_two_cells_share_a_gpu(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cells, three at a time, two GPUs each, on a machine with five of which CUDA_VISIBLE_DEVICES names some."""
    code = """
import json, os, pathlib, sys, time
folder, shown = pathlib.Path(sys.argv[1]), os.environ["CUDA_VISIBLE_DEVICES"]
taken = [pathlib.Path(sys.argv[2]) / name for name in shown.split(",")]
for path in taken:
    path.mkdir()  # fails if another cell has it
time.sleep(0.2)
for path in taken:
    path.rmdir()
(folder / "gpus").write_text(shown)
(folder / "metrics.json").write_text(json.dumps({"bbox/AP": 1.0}) + chr(10))
"""
    there = weights / "there"
    there.mkdir()
    monkeypatch.setattr(
        sweep, "_command", lambda a, w, fraction, seed, folder: [sys.executable, "-c", code, str(folder), str(there)]
    )
    monkeypatch.setattr(jobs, "visible_gpus", lambda: ["3", "5", "GPU-a", "GPU-b", "7"])
    options = ("--backbones", weights / "a.pkl", "--seeds", 0, 1, 2, 3, "--jobs", 3, "--num-gpus", 2)
    assert run(weights / "out", *options) == 0
    used = {path.read_text() for path in (weights / "out").rglob("gpus")}
    assert used <= {"3,5", "GPU-a,GPU-b"}


def test_more_gpus_than_there_are_and_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--num-gpus is 3 and 2 GPUs are usable"):
        jobs.Gpus(["0", "1"], 3)
    with jobs.Gpus([], 3).lent() as shown:
        assert shown == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, want in (("", ["0", "1"]), ("4, GPU-x", ["4", "GPU-x"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert jobs.visible_gpus() == want


def test_a_submitted_job_asks_for_the_cores_of_its_loaders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {}

    class Executor:
        cluster = "slurm"

        def __init__(self, **_: object) -> None:
            pass

        def update_parameters(self, **values: object) -> None:
            asked.update(values)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    args = SimpleNamespace(out=tmp_path, cluster=None, num_gpus=2, timeout=1, partition=None)
    jobs.submitit_executor(args, workers=7)
    assert (asked["gpus_per_node"], asked["cpus_per_task"]) == (2, 16)


def test_submitit_that_is_not_there(weights: Path, fake: None, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    options = ("--backbones", weights / "a.pkl", "--launcher", "submitit")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run(weights / "out", *options) == 2
    assert "loco_det[submitit]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fractions", "0"), "--fractions"),
        (("--seeds", "-1"), "--seeds"),
        (("--jobs", "0"), "--jobs"),
        (("--set", "SEED", "3"), "SEED: the sweep sets it itself"),
        (("MODEL.WEIGHTS", "x.pkl"), "MODEL.WEIGHTS: the sweep sets it itself"),
        (("--set", "SOLVER.BASE_LR", "high"), "SOLVER.BASE_LR"),
        (("--backbones", "x/a.pkl", "y/a.pkl"), "used twice"),
        (("--feature-cache", "x", "--engine", "torchvision", "--set", "TEST.AUG.ENABLED", "True"), "TEST.AUG"),
    ],
)
def test_bad_options(options: tuple, message: str, weights: Path, fake: None, capsys: pytest.CaptureFixture) -> None:
    assert run(weights / "out", "--backbones", weights / "a.pkl", *options) == 2
    assert message in capsys.readouterr().err
    assert not calls(weights / "out")


def arguments(**changes: object):
    import argparse

    parser = argparse.ArgumentParser()
    command_arguments.sweep(parser)
    args = parser.parse_args(["--backbones", "a", "--config-file", CONFIG, "--out", "o"])
    vars(args).update(changes)
    return args


def test_commands_of_the_launchers() -> None:
    plain = sweep._command(arguments(num_gpus=2), {"MODEL.WEIGHTS": "w.pkl"}, 0.1, 3, Path("f"))
    assert plain[:4] == [sys.executable, "-m", "loco_det.cli", "train"]
    assert plain[plain.index("--num-gpus") + 1] == "2"
    assert plain[plain.index("--fraction") + 1] == "0.1"
    near = sweep._command(arguments(), {"MODEL.WEIGHTS": "w.pkl"}, 0.1000001, 3, Path("f"))
    assert near[near.index("--fraction") + 1] == "0.1000001"
    assert plain[-6:] == ["MODEL.WEIGHTS", "w.pkl", "SEED", "3", "OUTPUT_DIR", "f"]
    assert "--resume" in plain
    watched = sweep._command(arguments(wandb="grid"), {"MODEL.WEIGHTS": "w.pkl"}, 1.0, 0, Path("f"))
    assert watched[watched.index("--wandb") + 1] == "grid"
    assert not {"--wandb", "--feature-cache"} & set(plain)
    cached = sweep._command(arguments(feature_cache=Path("kept")), {"MODEL.WEIGHTS": "w.pkl"}, 1.0, 0, Path("f"))
    assert cached[cached.index("--feature-cache") + 1] == str(Path("kept").absolute())
    trained = sweep._command(arguments(train_feature_cache=Path("kept")), {"MODEL.WEIGHTS": "w.pkl"}, 1.0, 0, Path("f"))
    assert trained[trained.index("--train-feature-cache") + 1] == str(Path("kept").absolute())
    torchrun = sweep._command(arguments(num_gpus=2, launcher="torchrun"), {"MODEL.WEIGHTS": "w.pkl"}, 1.0, 0, Path("f"))
    assert torchrun[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    assert "--fraction" not in torchrun
    assert "--num-gpus" not in torchrun


def test_a_real_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a pretraining artifact to AP; the second sweep starts no process."""
    write_tiny(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent))
    torch.manual_seed(0)
    net = ResNet(18)
    (tmp_path / "loco").mkdir()
    artifact = tmp_path / "loco" / "backbone.safetensors"
    save_backbone(artifact, backbone_tensors(net), describe(net, stem="imagenet", method="loco"))
    pairs = overrides(**RESNET_18, SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    tiny = [
        t for k, v in zip(pairs[::2], pairs[1::2]) if k not in ("SEED", "MODEL.WEIGHTS", "OUTPUT_DIR") for t in (k, v)
    ]
    options = ("--backbones", artifact, "--fractions", 0.5, "--engine", "torchvision")
    out = tmp_path / "out"
    assert run(out, *options, "--set", *tiny) == 0, (out / "loco/fraction-0.5_seed-0/train.txt").read_text()
    folder = out / "loco" / "fraction-0.5_seed-0"
    assert "bbox/AP" in json.loads((folder / "result.json").read_text())["results"]
    assert "tiny_train@50pct_seed0" in (folder / "config.yaml").read_text()
    monkeypatch.setattr(sweep, "run_process", None)
    assert run(out, *options, "--set", *tiny) == 0
