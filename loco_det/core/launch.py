"""Starts the processes of a job and stops them on SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from loco_det.core.distributed import local_rank, world_size
from loco_det.core.errors import INTERRUPTED, UserError, out_of_memory
from loco_det.core.log import is_quiet, log_failure, setup_logging

_STOPS = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL = 2.0  # seconds in which a second signal is the first one again
_LEAVING = 10.0  # seconds that a process gets to leave by itself, and again after SIGTERM
_TRACEBACK = 4000  # characters of a child's; those of all children must fit into a pipe that is read at the end


class StopSignal:
    """While active, SIGTERM and SIGINT only set `received`, so that a loop can save and leave between two steps.

    A second signal interrupts at once. What comes within two seconds of the first is the same request, which often
    arrives twice: terminals and schedulers tell every process of a job, and its launcher hands on what it was told.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._handle) for s in _STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.received is not None:  # the other copy must not find the old handlers, which end the process
            time.sleep(max(0.0, self._until - time.monotonic()))
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received, self._until = signal.Signals(number).name, time.monotonic() + _SAME_SIGNAL
        elif time.monotonic() > self._until:
            raise KeyboardInterrupt


class CommonStop:
    """Asked once a step by every process: whether one of them was told to stop. All get the same answer.

    Processes tell each other through a group on their hosts, and learn in a step what was told up to the step before:
    nobody waits, neither for a device nor for a process that is a little behind.
    """

    def __init__(self, stop: StopSignal) -> None:
        self.stop = stop
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.told: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self) -> bool:
        told = self.stop.received is not None
        if self.group is None:
            return told
        before = self.told
        flag = torch.tensor([float(told)])
        self.told = flag, dist.all_reduce(flag, group=self.group, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0] > 0)


def leave_stopping_to_parent(_: int = 0) -> None:
    """Fit a worker process for signals that go to a whole job: its parent needs it until the state is saved.

    SIGINT is ignored, and SIGTERM too if it is not the parent's own, which ends the process without a word.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where nobody can tell whose it is
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_if_parent_says, daemon=True).start()


def _exit_if_parent_says() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def launch(worker: Callable[..., Any], processes: int, *args: Any) -> Any:
    """Run `worker(*args)` in every process of the job; returns its value on a single process, else None.

    Under torchrun (WORLD_SIZE in the environment) this process joins that job; otherwise `processes` > 1 starts
    that many here, and hands SIGTERM and SIGINT on to them. The back end is nccl where every process has a GPU of
    its own, else gloo.

    Raises:
        UserError: as the worker raised it, whichever process it was in; a process was killed.
        RuntimeError: with the traceback of any other exception in a process that was started here.
        KeyboardInterrupt: SIGTERM or SIGINT ended processes that were started here and had nothing to save.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _joined(worker, args)
    if processes <= 1:
        return worker(*args)
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (worker, args, processes, port, errors, is_quiet())
    with StopSignal() as stop:
        with _signals_held():  # by the children too, until they are past their imports
            children = torch.multiprocessing.spawn(_spawned, arguments, nprocs=processes, join=False).processes
        killed = _wait(children, stop)
    if not any(child.exitcode for child in children):
        return None
    # The first error is the cause; peers fail after it, by a broken connection.
    is_bad_input, text = (False, "a process ended without a word") if errors.empty() else errors.get()
    if is_bad_input:
        raise UserError(text)
    if stop.received or INTERRUPTED in [child.exitcode for child in children]:
        raise KeyboardInterrupt
    if killed:
        raise UserError(f"{killed}; where it was SIGKILL, memory was mostly short: lower the batch size or the workers")
    raise RuntimeError(text)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """The signals of the block arrive at its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(children: Sequence[Any], stop: StopSignal) -> str:
    """Until all `children` are gone; what `stop` receives is handed on, and none outlives another's failure long.

    Returns:
        Which child was killed, by what, and not from here; empty if none was.
    """
    handed_on = False
    try:
        while all(child.exitcode in (None, 0) for child in children) and not _all_gone(children, 0.1):
            if stop.received and not handed_on:
                handed_on = True
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.Signals[stop.received])
        _all_gone(children, _LEAVING)  # where one failed the rest notice it at their next meeting
        killed = [(i, -child.exitcode) for i, child in enumerate(children) if (child.exitcode or 0) < 0]
        return f"process {killed[0][0]} was ended by {signal.Signals(killed[0][1]).name}" if killed else ""
    finally:
        for end in (lambda child: child.terminate(), lambda child: child.kill()):
            if _all_gone(children, 0):
                break
            for child in children:
                end(child)
            _all_gone(children, _LEAVING)


def _all_gone(children: Sequence[Any], seconds: float) -> bool:
    """Whether no child is alive, after waiting up to `seconds` for that."""
    deadline = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    return all(child.exitcode is not None for child in children)


def _spawned(
    index: int,
    worker: Callable[..., Any],
    args: tuple[Any, ...],
    processes: int,
    port: int,
    errors: Any,
    quiet: bool,
) -> None:
    setup_logging(quiet=quiet)
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place["MASTER_PORT"] = port
    os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")

    told = False

    def tell(error: Exception) -> None:
        nonlocal told
        if not told:
            told = True
            log_failure(error)
            bad_input = error if isinstance(error, UserError) else out_of_memory(error)
            errors.put((bad_input is not None, str(bad_input or traceback.format_exc())[-_TRACEBACK:]))

    def telling(*args: Any) -> None:
        try:
            worker(*args)
        except Exception as error:  # before the process group goes down, so that no peer's comes first
            tell(error)
            raise

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        _joined(telling, args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # which older versions of torch would make a success
    except Exception as error:
        tell(error)
        sys.exit(1)


def _joined(worker: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    processes = int(os.environ["WORLD_SIZE"])
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    on_gpu = gpus >= per_machine
    if on_gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        return worker(*args)
    finally:
        dist.destroy_process_group()
