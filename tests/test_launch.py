"""Jobs of several processes, and signals: a stopped job saves, and a failure is reported once."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode

from loco_det.annotations.synthetic import CLASSES, make_shapes_dataset
from loco_det.core import launch as launch_module
from loco_det.core import log as log_module
from loco_det.core.config import load_config
from loco_det.core.device import seed_everything
from loco_det.core.distributed import rank, reduce_mean, world_size
from loco_det.core.errors import UserError
from loco_det.core.files import write_json
from loco_det.core.launch import StopSignal, launch, leave_stopping_to_parent
from loco_det.core.log import log, setup_logging
from loco_det.core.metrics import RunMetrics
from loco_det.images.folders import open_source
from loco_det.images.two_views import build_two_view_loader
from pretrain.defaults import get_cfg as pretraining_keys

ROOT = Path(__file__).resolve().parent.parent
ANSWER = "\nstopping after this step and saving; again to stop now\n"  # once, whatever the number of processes


def test_a_signal_waits_for_the_step_and_a_second_interrupts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(launch_module, "_SAME_SIGNAL", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGTERM"
        assert capfd.readouterr().err == ANSWER  # at once
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_twice_is_one_also_when_the_loop_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "_SAME_SIGNAL", 0.6)
    late = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])  # which would end this test
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        late.start()
    assert not late.is_alive()
    assert stop.received == "SIGTERM"


def _worker_process(ready: multiprocessing.synchronize.Event) -> None:
    leave_stopping_to_parent()
    ready.set()
    time.sleep(600)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no way to tell who sent a signal")
def test_a_worker_ends_when_its_parent_says_and_at_no_other_signal() -> None:
    ready = multiprocessing.Event()
    worker = multiprocessing.Process(target=_worker_process, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    for name in ("TERM", "INT"):
        subprocess.run(["sh", "-c", f"kill -{name} {worker.pid}"], check=True)  # from another process
        worker.join(0.3)
        assert worker.exitcode is None, name
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def _two_view_batches(root: Path) -> Iterator:
    settings = ["DATA.IMAGE_SIZE", 16, "DATA.NUM_WORKERS", 1, "SOLVER.BATCH_SIZE", 2]
    cfg = load_config(pretraining_keys(), "", [str(text) for text in settings])[0]
    return build_two_view_loader(cfg, open_source(str(root / "shapes" / "train"))).batches(0)


def _detection_batches(root: Path) -> Iterator:
    # Here, for the processes of the jobs below import this file, and these two import torchvision.
    from loco_det.annotations.loader import build_train_loader
    from loco_det.detection.keys import get_cfg as detection_keys

    settings = ["DATASETS.TRAIN", ("shapes_train",), "DATALOADER.NUM_WORKERS", 1, "SOLVER.IMS_PER_BATCH", 2]
    settings += ["MODEL.ROI_HEADS.NUM_CLASSES", len(CLASSES), "INPUT.MASK_FORMAT", "bitmask"]
    cfg = load_config(detection_keys(), "", [str(text) for text in settings])[0]
    return iter(build_train_loader(cfg))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no way to tell who sent a signal")
@pytest.mark.parametrize("batches", [_two_view_batches, _detection_batches])
def test_batches_come_on_after_a_signal_to_the_workers(
    batches: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shapes_dataset(tmp_path, train=4, val=1, size=48, seed=1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    stream = batches(tmp_path)
    next(stream)
    for worker in multiprocessing.active_children():
        subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}; kill -INT {worker.pid}"], check=True)
    assert len([next(stream) for _ in range(12)]) == 12  # more than were ready
    assert len(multiprocessing.active_children()) == 1


# --- several processes ------------------------------------------------------------------------------------------


def _report(folder: str) -> None:
    setup_logging()
    log.info("from %d", rank())
    mean = reduce_mean({"a": torch.tensor(float(rank())), "b": torch.tensor(4)})
    with RunMetrics(CfgNode({"OUTPUT_DIR": folder})) as metrics:
        metrics.write({"rank": rank()})
    seed_everything(0)
    found = {
        "world": world_size(),
        "mean": mean,
        "draw": float(torch.rand(())),
        "quiet": log_module._quiet,
        "shown": log_module._shows_progress(),
        "on this machine": os.environ["LOCAL_WORLD_SIZE"],
    }
    write_json(Path(folder) / f"{rank()}.json", found)


def test_two_processes_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as a torchrun of one process around this one leaves it
    setup_logging(quiet=True)
    assert launch(_report, 2, str(tmp_path)) is None
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    for found in (first, second):
        assert found["world"] == 2
        assert found["mean"] == {"a": 0.5, "b": 4.0}
        assert found["on this machine"] == "2"
        assert found["quiet"] is True
        assert found["shown"] is False
    assert first["draw"] != second["draw"]
    assert (tmp_path / "metrics.json").read_text() == '{"rank": 0}\n'


def _fail(kind: str) -> None:
    if rank() == 1 and kind == "memory":
        torch.empty(2**48)
    elif rank() == 1:
        raise UserError("images/7.jpg is damaged; remove it") if kind == "user" else ValueError("a bug")
    torch.distributed.barrier()


def test_bad_input_in_a_child_is_bad_input_here(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"^images/7.jpg is damaged; remove it$"):
        launch(_fail, 2, "user")
    assert capfd.readouterr().err == ""


def test_memory_that_is_short_in_a_child_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^memory is short; .*allocate"):
        launch(_fail, 2, "memory")


def test_a_bug_in_a_child_is_a_bug_here() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in _fail.*ValueError: a bug"):
        launch(_fail, 2, "bug")


def _kill_one() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def test_a_killed_process_is_named_and_not_how_its_peers_failed() -> None:
    with pytest.raises(UserError, match=r"^process 1 was ended by SIGKILL; .* memory"):
        launch(_kill_one, 2)


# A job of two processes, started in a session of its own.
TOLD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands it on as ignored
import test_launch
from loco_det.core.launch import launch
try:
    launch(test_launch._signalled, 2, *sys.argv[1:])
except (test_launch.UserError, KeyboardInterrupt) as error:
    print(type(error).__name__, error)
"""


def _signalled(folder: str, how: str) -> None:
    with StopSignal() if how != "unprepared" else contextlib.nullcontext() as stop:
        (Path(folder) / f"started{os.getpid()}").touch()
        while stop is None or stop.received is None:
            time.sleep(0.05)
        (Path(folder) / f"told{rank()}").touch()
        time.sleep(0.5 if how == "saves" else 600)
        (Path(folder) / f"saved{rank()}").touch()
        raise UserError(f"stopped by {stop.received}")


@contextlib.contextmanager
def _job(folder: Path, how: str) -> Iterator[subprocess.Popen]:
    """The job when both processes are at work; none of them is left when the block ends."""
    command = [sys.executable, "-c", TOLD, str(folder), how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT / "tests", start_new_session=True, **pipes) as process:
        try:
            _until(folder, "started*", process)
            yield process
        finally:
            for started in folder.glob("started*"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(started.name.removeprefix("started")), signal.SIGKILL)
                    pytest.fail(f"{started.name} was left")
            process.kill()


def _until(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("name", "to"), [("SIGINT", os.kill), ("SIGTERM", os.killpg)])
def test_a_signal_to_the_job_or_its_first_process_lets_all_save(name: str, to: Callable, tmp_path: Path) -> None:
    with _job(tmp_path, "saves") as process:
        to(process.pid, signal.Signals[name])
        out, err = process.communicate(timeout=120)
    assert (out, err) == (f"UserError stopped by {name}\n", ANSWER)
    assert len(list(tmp_path.glob("saved*"))) == 2


def test_what_has_nothing_to_save_is_interrupted(tmp_path: Path) -> None:
    with _job(tmp_path, "unprepared") as process:
        os.kill(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=120) == ("KeyboardInterrupt \n", "")


def test_a_second_signal_ends_all_processes_at_once(tmp_path: Path) -> None:
    with _job(tmp_path, "hangs") as process:
        os.kill(process.pid, signal.SIGINT)
        _until(tmp_path, "told*", process)
        time.sleep(launch_module._SAME_SIGNAL + 0.1)
        os.kill(process.pid, signal.SIGINT)
        assert process.communicate(timeout=120) == ("KeyboardInterrupt \n", ANSWER)
    assert not list(tmp_path.glob("saved*"))


def test_one_process_runs_here_and_returns() -> None:
    assert launch(lambda a: (os.getpid(), a), 1, 5) == (os.getpid(), 5)
    assert world_size() == 1
    assert reduce_mean({}) == {}
    assert reduce_mean({"x": torch.tensor(2.5, requires_grad=True)}) == {"x": 2.5}


def test_under_torchrun_the_process_joins_that_job(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = {}
    monkeypatch.setattr(
        launch_module.dist, "init_process_group", lambda b, timeout: joined.update(backend=b, t=timeout)
    )
    monkeypatch.setattr(launch_module.dist, "destroy_process_group", lambda: joined.update(left=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch(lambda: "value", 1) == "value"
    assert joined == {"backend": "gloo", "t": timedelta(hours=2), "left": True}
    # On a machine with GPUs both back ends, since the run's device need not be one, whatever their number.
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for name, number in (("LOCAL_RANK", 3), ("SLURM_LOCALID", 1)):
        monkeypatch.setenv(name, str(number))
        assert launch(lambda: "value", 1) == "value"
        assert joined["backend"] == "cpu:gloo,cuda:nccl"
        assert chosen.pop() == 1
        monkeypatch.delenv(name)
