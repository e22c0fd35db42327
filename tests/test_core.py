"""Files that are whole or absent, seeds, devices, progress."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import io
import logging
import multiprocessing
import os
import pickle
import platform
import random
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from loco_det.core import log as log_module
from loco_det.core.device import resolve_device, seed_everything
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, read_regular, write_json
from loco_det.core.log import Progress, log, log_failure, logging_to, setup_logging
from loco_det.core.workers import raising

ROOT = Path(__file__).resolve().parent.parent


# --- files ------------------------------------------------------------------------------------------------------


def test_a_written_file_is_there_with_its_folder_and_nothing_else(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b" / "file.bin") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a" / "b" / "file.bin").read_bytes() == b"\x00\xff"
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["file.bin"]


def test_a_failure_in_the_middle_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_write(path, "w") as file:
            file.write("new" * 100_000)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_file_does_not_appear_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path, "w") as file:
        file.write("part")
        file.flush()
        assert not path.exists()
    assert path.read_text() == "part"


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom loco_det.core.files import atomic_write\nfrom loco_det.core.log import log, setup_logging\n"
        "setup_logging(sys.argv[1])\nlog.info('gr\\u00f6\\u00dfe')\n"
        "with atomic_write(sys.argv[1] + '/file', 'w') as file:\n    file.write('gr\\u00f6\\u00dfe')"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **ascii_only}, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"Error" not in done.stderr
    assert (tmp_path / "file").read_bytes() == "größe".encode()
    assert "größe".encode() in (tmp_path / "log.txt").read_bytes()


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(number: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else f"{os.fstat(number).st_size} bytes")
        fsync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("name"), replace(*names)))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"12345")
    assert calls == ["5 bytes", "name", "folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(UserError, match=r"weights.*No space left on device.*free space") as info,
        atomic_write(path) as f,
    ):
        f.write(b"new")
    assert "\n" not in str(info.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


FULL = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")


@FULL
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    for name in (".results.json.tmp", f".results.json.{os.getpid()}.tmp"):  # a device cannot be emptied: the second
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "results.json", {"a": list(range(10_000))})
    assert not (tmp_path / "results.json").exists()
    assert Path("/dev/full").is_char_device(), "the device itself is not removed"


@FULL
def test_a_full_disk_costs_lines_of_the_log_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    setup_logging(tmp_path, quiet=False)
    for number in range(3):
        log.info("line %d", number)
    setup_logging()  # closes the file
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert [told.count(f"line {number}") for number in range(3)] == [1, 1, 1]
    assert told.count("log.txt: cannot be written (No space left on device)") == 1


def test_only_what_has_an_end_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 42)
    for name, reason in (("pipe", "regular file"), ("link", "regular file"), ("sparse", "larger than the memory")):
        with pytest.raises(OSError, match=reason):
            read_regular(tmp_path / name)
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError, match=str(path)):
            read_regular(path)
    (tmp_path / "file").write_bytes(b"content")
    assert read_regular(tmp_path / "file") == b"content"


@pytest.mark.parametrize("place", ["under a file", "onto a folder"])
def test_an_impossible_place_is_bad_input(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "content").mkdir(parents=True)
    path = tmp_path / "file" / "x" if place == "under a file" else tmp_path / "folder"
    with pytest.raises(UserError, match="cannot be written"):
        write_json(path, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("name", "shown"), [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("\udcff", r"\udcff"), ("ü b", "ü b")]
)
def test_a_message_is_one_line_of_text_whatever_it_names(name: str, shown: str) -> None:
    error = UserError(f"{name}: is not there")
    assert str(error) == f"{shown}: is not there"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def _write_slowly(path: str) -> None:
    with atomic_write(path) as file:
        for _ in range(100):
            file.write(b"x" * 10_000)
            file.flush()
            time.sleep(0.01)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(b"old")
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(str(path),))
    process.start()
    deadline = time.monotonic() + 30
    while not any(p.name.endswith(".tmp") and p.stat().st_size for p in tmp_path.iterdir()):
        assert time.monotonic() < deadline, "the writer never began"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:  # and the rest of the killed one is not in the way
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("locks", [True, False])
def test_two_writers_of_one_file_leave_one_of_theirs(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "file"
    process = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(str(path),))
    process.start()
    while not list(tmp_path.glob(".*.tmp")):
        time.sleep(0.01)
    for content in (b"short", b"another"):
        with atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    process.join()
    assert path.read_bytes() == b"x" * 10**6
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": [1] * 1000, "b": object()})
    assert list(tmp_path.iterdir()) == []


# --- logs and progress ------------------------------------------------------------------------------------------


def test_the_log_goes_to_stderr_and_the_folder_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path / "first")
    setup_logging(tmp_path / "second")
    log.info("a line")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("a line") == 1
    assert (tmp_path / "first" / "log.txt").read_text() == ""
    assert (tmp_path / "second" / "log.txt").read_text().count("a line") == 1


def test_quiet_shows_warnings_only_and_stays_until_said_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    setup_logging(quiet=True)
    setup_logging(tmp_path)  # as a command does that was started quietly
    log.info("detail")
    log.warning("trouble")
    err = capsys.readouterr().err
    assert "detail" not in err
    assert "trouble" in err
    assert "detail" in (tmp_path / "log.txt").read_text()
    setup_logging(quiet=False)
    log.info("detail")
    assert "detail" in capsys.readouterr().err


def test_a_log_folder_that_cannot_be_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        setup_logging(tmp_path / "file")


class Clock:
    """time.monotonic that a test moves by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(log_module.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_plain_progress_lines_with_rate_and_eta(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    setup_logging(quiet=False)
    with Progress(1000, "pretrain", initial=100, unit="images") as progress:
        progress.advance(10, loss=1.0)  # too early for a line
        clock.now += 20
        progress.advance(30, loss=0.123456)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    # 40 in 20 s, 860 are left: 430 s
    assert lines[0].endswith("pretrain 140/1000 eta 00:07:10 2 images/s loss 0.1235")


def test_an_eta_of_days(clock: Clock, capsys: pytest.CaptureFixture) -> None:
    setup_logging(quiet=False)
    with Progress(100_001, "train") as progress:
        clock.now += 20
        progress.advance()
    assert "eta 555:33:20" in capsys.readouterr().err  # 2,000,000 s


@pytest.mark.parametrize(("total", "steps"), [(0, [0]), (5, [0, 5, 3]), (3, [1, 1, 1])])
def test_progress_survives_its_limits(
    total: int, steps: list[int], clock: Clock, capsys: pytest.CaptureFixture
) -> None:
    setup_logging(quiet=False)
    with Progress(total, "x") as progress:
        for step in steps:
            clock.now += 11
            progress.advance(step)
    assert len(capsys.readouterr().err.splitlines()) == len(steps)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, kind: str = "xterm", columns: int = 100) -> Terminal:
    """Standard error is one; not a fixture, since pytest sets sys.stderr anew when the test begins."""
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", str(columns))
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_the_bar_of_a_terminal_shows_names_with_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, columns=200)
    setup_logging(quiet=False)
    with Progress(4, "unit [red]") as progress:
        progress.advance(2, **{"loss[res2]": 0.5})
    assert "unit [red]" in terminal.getvalue()
    assert "loss[res2] 0.5" in terminal.getvalue()
    assert "2/4" in terminal.getvalue()

    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    setup_logging(quiet=True)
    with Progress(4, "unit") as progress:
        progress.advance(4)
    assert quiet.getvalue() == ""


def screen(terminal: Terminal) -> list[str]:
    """The lines that stay when all of `terminal` is written, without colours."""
    lines = [""]
    row = 0
    for text in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\n|\r|[^\x1b\n\r]+", terminal.getvalue()):
        if text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text == "\x1b[1A":
            row -= 1
        elif text == "\x1b[2K":
            lines[row] = ""
        elif text[0] not in "\x1b\r":
            lines[row] += text
    return [line.strip() for line in lines if line.strip()]


def test_bars_within_bars_and_lines_between_leave_one_tidy_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_terminal(monkeypatch)
    setup_logging(tmp_path, quiet=False)
    with Progress(2, "train") as outer:
        outer.advance(loss=1.0)
        log.info("half way")
        with Progress(3, "evaluation") as inner:
            inner.advance(3)
        outer.advance(loss=0.5)
    log.info("over")
    shown = screen(terminal)
    assert [line.split()[-1] for line in shown] == ["way", "0.5", "over"]
    assert shown[1].startswith("train")
    written = (tmp_path / "log.txt").read_text()  # which has no bar, so lines instead
    assert "evaluation 3/3 eta 00:00:00" in written
    assert "train 2/2 eta 00:00:00" in written


def test_the_bar_knows_the_eta_of_slow_steps_and_fits_the_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    setup_logging(quiet=False)
    with Progress(4, "train") as progress:
        clock.now += 3600
        progress.advance(loss=0.5, **{f"another_loss_{i}": 0.1 for i in range(9)})
    assert len(screen(terminal)) == 1
    assert "1/4 03:00:00" in screen(terminal)[0]
    assert "loss 0.5" in screen(terminal)[0]
    assert screen(terminal)[0].endswith("…")


def test_a_dumb_terminal_gets_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "dumb")
    setup_logging(quiet=False)
    with Progress(2, "train") as progress:
        progress.advance(2)
    assert terminal.getvalue().count("train 2/2") == 1


def test_the_log_of_a_job_goes_on_under_those_of_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path)
    setup_logging(tmp_path / "a" / "pretrain")
    log.info("first part")
    setup_logging(tmp_path / "a" / "detector")
    log.info("second part")
    assert capsys.readouterr().err.count("part") == 2
    texts = [(tmp_path / name / "log.txt").read_text() for name in (".", "a/pretrain", "a/detector")]
    assert ["first" in text for text in texts] == [True, True, False]
    assert ["second" in text for text in texts] == [True, False, True]


def log_two_lines_and_fail(folder: Path) -> None:
    with logging_to(folder):
        log.info("a line")
        log.warning("trouble")
        raise UserError("a.jpg: broken")


@pytest.mark.parametrize("own", ["root", "none", "quiet"])
def test_a_call_from_python_logs_as_a_command_and_leaves_the_programs_logging_alone(
    own: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root, seen = logging.getLogger(), logging.StreamHandler(sys.stdout)
    level = root.level
    try:
        if own == "root":
            root.addHandler(seen)
            root.setLevel(logging.INFO)
        elif own == "quiet":
            log.setLevel(logging.WARNING)
        before = list(log.handlers), log.level, log.propagate
        with pytest.raises(UserError, match="broken"):
            log_two_lines_and_fail(tmp_path / "run")
        assert (log.handlers, log.level, log.propagate) == before
    finally:
        root.removeHandler(seen)
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert (out.count("a line"), err.count("a line")) == {"root": (1, 0), "none": (0, 1), "quiet": (0, 0)}[own]
    assert out.count("trouble") + err.count("trouble") == 1
    assert err.count("broken") == 0
    written = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.partition(" ")[2].split(" ", 2)[2] for line in written] == [
        *([] if own == "quiet" else ["a line"]), "trouble", "a.jpg: broken"
    ]  # fmt: skip


@pytest.mark.parametrize(("widgets", "drawn"), [(True, True), (False, False)])
def test_a_notebook_gets_a_bar_if_it_can_draw_one(
    widgets: bool,
    drawn: bool,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (object() if widgets else None) if name == "ipywidgets" else find(name),
    )
    at = []  # where a bar is drawn
    monkeypatch.setattr(log_module.RichProgress, "start", lambda self: None)
    monkeypatch.setattr(log_module.RichProgress, "refresh", lambda self: at.append(self.tasks[0].completed))
    setup_logging(tmp_path, quiet=False)
    with Progress(3, "train") as progress:
        at.clear()  # adding the row draws it
        for seconds in (0.1, 0.5, 0.1):
            clock.now += seconds
            progress.advance()
        log.warning("trouble")
    assert at == ([2, 3] if drawn else [])
    err = capsys.readouterr().err
    assert ("train 3/3" in err) != drawn
    assert "trouble" in err
    assert "train 3/3" in (tmp_path / "log.txt").read_text()


def test_the_log_says_what_ended_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(tmp_path)
    log_failure(UserError("a.jpg: broken"))
    log_failure(KeyboardInterrupt())
    try:
        _ = 1 / 0
    except ZeroDivisionError as error:
        log_failure(error)
    first, second, *bug = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("E a.jpg: broken")
    assert second.endswith("E KeyboardInterrupt")
    assert bug[0].endswith("E division by zero")
    assert bug[1].startswith("Traceback")
    assert capsys.readouterr().err == ""  # the terminal has it already


# --- seeds, devices ---------------------------------------------------------------------------------------------


def _draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002 (the global one is meant)


def test_a_seed_decides_every_global_generator() -> None:
    seed_everything(3)
    first = _draws()
    assert first != _draws()
    seed_everything(3)
    assert first == _draws()
    seed_everything(4)
    assert all(a != b for a, b in zip(first, _draws()))


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:99", "meta", "cpu:-2"])
def test_a_device_that_is_not_here_is_bad_input(name: str) -> None:
    with pytest.raises(UserError, match=r"device '.*use auto"):
        resolve_device(name)


def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UserError, match="GPU 2 but 2 are usable"):
        resolve_device("cuda:2")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_blocks_are_kept_for_the_next() -> None:
    """Pages faulted in by taking, writing and freeing blocks of 64 MiB once the heap has grown to what that needs."""
    program = """
import resource, sys, torch
from loco_det.core.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(12):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", program, how], check=True, capture_output=True).stdout)
        for how in ("kept", "default")
    )
    assert kept < 2**20
    assert given_back > 2 * kept  # fewer faults where the kernel gives large pages by itself


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_blocks_above_a_limit_are_given_back() -> None:
    """Resident bytes after half a GiB was written and freed."""
    program = """
import sys
from pathlib import Path
from loco_det.core.device import keep_freed_memory
keep_freed_memory(int(sys.argv[1]))
size = 2**29
b"x" * size
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")))
"""
    kept, limited = (
        1024 * int(subprocess.run([sys.executable, "-c", program, limit], check=True, capture_output=True).stdout)
        for limit in ("-1", str(2**28))
    )
    assert kept - limited > 2**28


# --- errors that a loader's workers return ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("as_sample", [True, False])
def test_an_error_that_a_worker_returns_is_raised_once_it_comes_up(workers, as_sample):
    error = UserError("7.jpg: not a readable image")
    batches = [[1, 2], [3, error] if as_sample else error, [5, 6]]
    come = raising(DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))
    assert next(come) == [1, 2]
    with pytest.raises(UserError, match=r"^7\.jpg: not a readable image$"):
        next(come)
