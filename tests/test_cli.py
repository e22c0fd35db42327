"""The command line: options and exit status common to all jobs, in this process and as a user starts it."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from loco_det import __version__, arguments, cli
from loco_det.cli import JOBS, main, run_job
from loco_det.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {"pretrain": "pretrain_net.py", "convert": "convert_to_d2.py", "train": "train_net.py"}


def shell(*command: object, **kwargs: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch):
    """Installs `run` as the only job, called "work"; returns a function that starts it."""

    def install(run, add_arguments=lambda parser: None, logs: bool = False):
        monkeypatch.setattr(cli, "JOBS", {"work": "do something"})
        monkeypatch.setattr(cli, "OWN_LOG", set() if logs else {"work"})
        monkeypatch.setattr(arguments, "work", add_arguments, raising=False)
        module = SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, "loco_det.commands.work", module)
        return lambda *argv: run_job("work", list(argv), prog="loco-det work")

    return install


# --- the frame --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_the_jobs(value: int | None, status: int, job) -> None:
    assert job(lambda args: value)() == status


def bad_input(args: argparse.Namespace) -> None:
    raise UserError("images/7.jpg is damaged; remove it")


def test_bad_input_is_one_sentence_and_status_2(job, capsys: pytest.CaptureFixture) -> None:
    assert job(bad_input)() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: images/7.jpg is damaged; remove it\n"


def test_debug_adds_the_traceback(job, capsys: pytest.CaptureFixture) -> None:
    assert job(bad_input)("--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in bad_input" in err
    assert err.endswith("error: images/7.jpg is damaged; remove it\n")


def test_an_interrupt_is_status_130(job, capsys: pytest.CaptureFixture) -> None:
    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    assert job(interrupted)() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_interrupts_too_and_only_while_the_job_runs(job, capsys: pytest.CaptureFixture) -> None:
    def told(args: argparse.Namespace) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    assert job(told)() == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_during_imports_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def load(name: str) -> None:
        assert name == "loco_det.commands.train"
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", load)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_job_runs_in_any_thread(job) -> None:
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(job(lambda args: None)()))
    thread.start()
    thread.join()
    assert statuses == [0]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**48), lambda: np.empty(2**48)])
def test_memory_that_is_short_is_one_sentence(allocate: Callable, job, capsys: pytest.CaptureFixture) -> None:
    assert job(lambda args: allocate())() == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: memory is short; .* batches .*allocate.*\n", err)
    assert job(lambda args: allocate())("--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_bad_input(job) -> None:
    with pytest.raises(ZeroDivisionError):
        job(lambda args: 1 / 0)()


def test_quiet_reaches_the_log_and_the_job(job, capsys: pytest.CaptureFixture) -> None:
    from loco_det.core.log import log

    def talk(args: argparse.Namespace) -> None:
        log.info("detail")
        log.warning("trouble")
        seen.append(args.quiet)

    seen: list[bool] = []
    start = job(talk, logs=True)
    start("--quiet")
    assert "trouble" in (err := capsys.readouterr().err)
    assert "detail" not in err
    start()
    assert "detail" in capsys.readouterr().err
    assert seen == [True, False]


def test_options_may_stand_between_the_overrides(job) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--resume", action="store_true")
        parser.add_argument("opts", nargs="*")

    seen: list[argparse.Namespace] = []
    job(seen.append, add_arguments)("A.B", "1", "--resume", "SEED", "-1", "--quiet", "X", "")
    assert seen[0].opts == ["A.B", "1", "SEED", "-1", "X", ""]
    assert seen[0].resume
    assert seen[0].quiet


@pytest.mark.parametrize("takes_overrides", [True, False])
def test_the_line_to_type_is_for_commands_that_take_it(
    takes_overrides: bool, job, capsys: pytest.CaptureFixture
) -> None:
    def refuse(args: argparse.Namespace) -> None:
        raise UserError("too many; add A.B 1", add="A.B 1")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        if takes_overrides:
            parser.add_argument("opts", nargs="*")

    assert job(refuse, add_arguments)() == 2
    assert ("type: loco-det work" in capsys.readouterr().err) == takes_overrides


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], "A.B 1 A.C \"('x',)\""),
        (["A.B", "2", "--resume"], "A.B 1 --resume A.C \"('x',)\""),
        (["A.C", "y", "A.B", "2", "A.B", "3"], "A.C \"('x',)\" A.B 2 A.B 1"),
        (["D.E", "('a',)", "F.G", "$5 a'b"], """D.E "('a',)" F.G '$5 a'"'"'b' A.B 1 A.C "('x',)\""""),
    ],
)
def test_the_line_to_type_has_the_right_values_in_place_of_the_wrong_ones(
    given: list[str], shown: str, job, capsys: pytest.CaptureFixture
) -> None:
    def refuse(args: argparse.Namespace) -> None:
        raise UserError("wrong", add="A.B 1 A.C \"('x',)\"")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--resume", action="store_true")
        parser.add_argument("opts", nargs="*")

    assert job(refuse, add_arguments)(*given) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"type: loco-det work {shown}"


@pytest.mark.parametrize("argv", [["--nonsense"], ["surplus"]])
def test_unknown_arguments_are_status_2(argv: list[str], job, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as info:
        job(lambda args: None)(*argv)
    assert info.value.code == 2
    assert argv[0] in capsys.readouterr().err


# --- loco-det ---------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom loco_det.cli import main\ntry:\n    main(['--help'])\n"
        "finally:\n    heavy = {'torch', 'cv2', 'rich', 'numpy', 'yaml', 'pretrain'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))"
    )
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "HEAVY []" in done.stdout
    for name, text in JOBS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout


def test_what_needs_no_torch_is_answered_without(tmp_path: Path) -> None:
    """Tables and bad configurations: torch takes seconds to import."""
    config = ["pretrain", "--config-file", "configs/pretrain/loco_r50.yaml"]
    lines = {0: [["configs"], ["pretrain", "--keys", "SOLVER"]]}
    lines[2] = [["configs", "no", "such"], ["pretrain", "--config-file", "absent.yaml"], [*config, "SOLVER.EPOCH", "1"]]
    code = (
        "import sys\nfrom loco_det.cli import main\n"
        f"for status, lines in {lines}.items():\n"
        "    for line in lines: assert main(line) == status, line\n"
        "print('HEAVY', {'torch', 'cv2'} & set(sys.modules))"
    )
    done = shell("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY set()\n")
    assert len(done.stderr.splitlines()) == 3


@pytest.mark.parametrize("name", ["commands.pretrain, pretrain.train", "commands.convert", "commands.doctor"])
def test_a_command_that_needs_no_torchvision_starts_without(name: str) -> None:
    """It takes as long to import as torch itself, and so does timm."""
    code = f"import sys, loco_det.{name}\nprint({{'torchvision', 'timm', 'matplotlib'}} & set(sys.modules))"
    done = shell("-c", code)
    assert done.stdout == "set()\n", done.stderr


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert capsys.readouterr().out == f"loco-det {__version__}\n"


def test_no_command_is_the_help(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: loco-det")


@pytest.mark.parametrize("argv", [["prtrain"], ["--quiet"]])
def test_an_unknown_command_is_status_2(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", JOBS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as info:
        main([name, "--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: loco-det {name} ")
    assert "--debug" in out
    assert "--quiet" in out


def test_every_file_of_commands_is_a_job() -> None:
    files = {file.stem for file in (ROOT / "loco_det" / "commands").glob("*.py")} - {"__init__"}
    assert files == set(JOBS)


def test_processes_resume_and_overrides_reach_the_pretraining(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, runs = [], []
    monkeypatch.setattr("loco_det.core.launch.launch", lambda *values: calls.append(values))
    config = str(ROOT / "configs/pretrain/loco_r50.yaml")
    assert main(["pretrain", "--config-file", config, "--num-gpus", "2", "--resume", "SEED", "7"]) == 0
    assert main(["pretrain", "--config-file", config]) == 0
    monkeypatch.setattr("pretrain.train.pretrain", lambda cfg, resume, **_: runs.append((cfg.SEED, resume)))
    monkeypatch.setattr("loco_det.commands.pretrain.setup_logging", lambda folder: None)
    for worker, _, *values in calls:
        worker(*values)
    assert [processes for _, processes, *_ in calls] == [2, 1]
    assert runs == [(7, True), (0, False)]


def test_quickstart_gets_its_folder_and_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from loco_det.commands import quickstart

    calls = []
    monkeypatch.setattr(quickstart, "quickstart", lambda *values: calls.append(values))
    assert main(["quickstart", "--out", str(tmp_path), "--seed", "3"]) == 0
    assert calls == [(tmp_path, 3, None)]


# --- bad input to the real commands -----------------------------------------------------------------------------

BAD = {
    "pretrain without its file": (["pretrain", "--config-file", "absent.yaml"], "absent.yaml"),
    "pretrain with a misspelt key": (
        ["pretrain", "--config-file", "configs/pretrain/loco_r50.yaml", "SOLVER.EPOCH", "1"],
        "SOLVER.EPOCH",
    ),
    "pretrain with half an override": (
        ["pretrain", "--config-file", "configs/pretrain/loco_r50.yaml", "SEED"],
        "SEED",
    ),
    "pretrain on a folder that is not there": (
        ["pretrain", "--config-file", "pretrain/loco_r18_cifar.yaml", "DATA.PATH", "absent/images"],
        "absent/images",
    ),
    "pretrain by no process": (
        ["pretrain", "--config-file", "configs/pretrain/loco_r50.yaml", "--num-gpus", "0"],
        "--num-gpus is 0",
    ),
    "convert without its file": (["convert", "absent.pth", "out.pkl"], "absent.pth"),
    "train without its file": (["train", "--config-file", "coco_loco_r5.yaml"], "coco_loco_r50.yaml"),
    "train by no process": (["train", "--config-file", "coco_loco_r50.yaml", "--num-gpus", "0"], "--num-gpus is 0"),
    "train with a wrong type": (
        ["train", "--config-file", "coco_loco_r50.yaml", "SOLVER.MAX_ITER", "many"],
        "SOLVER.MAX_ITER",
    ),
    "train without data": (["train", "--config-file", "coco_loco_r50.yaml"], "coco_2017_train"),
    "doctor without its file": (["doctor", "--config-file", "absent.yaml"], "absent.yaml"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_to_a_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    argv, named = BAD[name]
    monkeypatch.chdir(tmp_path)  # configs are found with the package
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert main([*argv, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_runs_from_anywhere_without_an_installation(name: str, tmp_path: Path) -> None:
    arguments = {"convert": ["absent.pth", "out.pkl"]}.get(name, ["--config-file", "absent.yaml"])
    done = shell(ROOT / "tools" / TOOLS[name], *arguments, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "absent" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- a run that is stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "workers", "name", "send"),
    [(1, 1, "SIGTERM", os.killpg), (2, 1, "SIGINT", os.killpg)],
)
def test_a_stopped_pretraining_saves_and_says_how_to_go_on(
    processes: int, workers: int, name: str, send: Callable, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(16):
        cv2.imwrite(str(tmp_path / "images" / f"{i}.jpg"), random.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    settings = {
        "DATA.PATH": tmp_path / "images",
        "DATA.IMAGE_SIZE": 32,
        "DATA.NUM_WORKERS": workers,
        "SOLVER.BATCH_SIZE": 4,
        "SOLVER.MAX_STEPS": 100_000,
        "DEVICE": "cpu",
        "LOG_PERIOD": 1,
        "OUTPUT_DIR": tmp_path / "run",
    }
    config = ["--config-file", ROOT / "configs" / "pretrain" / "loco_r18_cifar.yaml"]
    command = [sys.executable, str(ROOT / "tools" / "pretrain_net.py"), *map(str, config)]
    command += ["--num-gpus", str(processes)]
    command += [str(part) for pair in settings.items() for part in pair]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    metrics = tmp_path / "run" / "metrics.json"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.1)
    send(process.pid, signal.Signals[name])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    last = err.splitlines()[-1]
    assert last.startswith(f"error: stopped by {name} after step ")
    assert err.count("again to stop now") == 1
    assert "Traceback" not in err
    assert "--resume" in last
    assert not (tmp_path / "run" / "backbone.safetensors").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))
