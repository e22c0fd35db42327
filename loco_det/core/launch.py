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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from loco_det.core.device import usable_cores
from loco_det.core.distributed import is_main, local_rank, world_size
from loco_det.core.errors import INTERRUPTED, UserError, out_of_memory
from loco_det.core.log import is_quiet, log_failure, setup_logging

_STOPS = (signal.SIGTERM, signal.SIGINT)
_SAME_SIGNAL = 2.0  # seconds within which repeated signals count as one
_LEAVING = 10.0  # seconds for a process to exit by itself, and again after SIGTERM
_PATIENCE = timedelta(hours=2)  # for work that rank 0 does alone: measuring AP, writing to a slow disk
_TRACEBACK = 4000  # maximum length of a child's; those of all children must fit into one pipe


class StopSignal:
    """While active, SIGTERM and SIGINT only set `received`, so that a loop can save and stop between two steps.

    The main process answers the first one at once, on standard error. A second signal interrupts at once. Signals
    within two seconds of the first count as the same request: terminals and schedulers signal every process of a job,
    and its launcher forwards what it receives. Outside the main thread, where Python has no signal handlers, signals
    stay as they are.
    """

    def __init__(self, answer: str = "stopping after this step and saving; again to stop now") -> None:
        self.received: str | None = None
        self.answer = answer if is_main() else ""

    def __enter__(self) -> StopSignal:
        handled = _STOPS if threading.current_thread() is threading.main_thread() else ()
        self._before = {s: signal.signal(s, self._handle) for s in handled}
        return self

    def __exit__(self, *_: object) -> None:
        if self.received is not None:  # a repeated signal must not reach the old handlers, which end the process
            time.sleep(max(0.0, self._until - time.monotonic()))
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received, self._until = signal.Signals(number).name, time.monotonic() + _SAME_SIGNAL
            if self.answer:
                os.write(2, f"\n{self.answer}\n".encode())  # sys.stderr may be in the middle of a write
        elif time.monotonic() > self._until:
            raise KeyboardInterrupt


class CommonStop:
    """Called once per step by every process: whether any of them received a stop signal. All return the same value.

    Processes exchange signals through a CPU process group; each step returns the state of `lag` steps before, so nobody
    waits for a device or for a process that is so many steps behind.
    """

    def __init__(self, stop: StopSignal, lag: int = 1) -> None:
        self.stop, self.lag = stop, lag
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.pending: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def __call__(self) -> bool:
        received = self.stop.received is not None
        if self.group is None:
            return received
        flag = torch.tensor([float(received)])
        self.pending.append((flag, dist.all_reduce(flag, group=self.group, async_op=True)))
        if len(self.pending) <= self.lag:
            return False
        before, work = self.pending.popleft()
        work.wait()
        return bool(before > 0)


def leave_stopping_to_parent(_: int = 0) -> None:
    """Set up a worker process for signals to the whole job: its parent needs it until the state is saved.

    Ignores SIGINT, and SIGTERM unless it comes from the parent, which then ends the process silently.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where the sender is unknown
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def launch(worker: Callable[..., Any], processes: int, *args: Any) -> Any:
    """Run `worker(*args)` in every process of the job; returns its value on a single process, else None.

    Under torchrun (WORLD_SIZE in the environment) this process joins that job; otherwise `processes` > 1 starts that
    many here and forwards SIGTERM and SIGINT to them. Tensors on GPUs travel by nccl, those on the CPU by gloo.

    Raises:
        UserError: as the worker raised it, in any process; or a process was killed.
        RuntimeError: with the traceback of any other exception in a process that was started here.
        KeyboardInterrupt: SIGTERM or SIGINT ended processes started here that had nothing to save.
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
    with StopSignal(answer="") as stop:  # the processes answer
        with _signals_held():  # by the children too, until they are past their imports
            children = torch.multiprocessing.spawn(_spawned, arguments, nprocs=processes, join=False).processes
        killed = _wait(children, stop)
    if not any(child.exitcode for child in children):
        return None
    # The first error is the cause; peers then fail with broken connections.
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
    """Defer the block's signals to its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(children: Sequence[Any], stop: StopSignal) -> str:
    """Wait until all `children` have exited; forwards the signal in `stop`, and ends the others soon after one fails.

    Returns:
        Which child was killed, and by which signal, unless killed from here; empty if none was.
    """
    handed_on = False
    try:
        while all(child.exitcode in (None, 0) for child in children) and not _all_gone(children, 0.1):
            if stop.received and not handed_on:
                handed_on = True
                for child in children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.Signals[stop.received])
        _all_gone(children, _LEAVING)  # after a failure the others notice at their next collective
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
    """Wait up to `seconds`; return whether all children have exited."""
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

    reported = False

    def report(error: Exception) -> None:
        nonlocal reported
        if not reported:
            reported = True
            log_failure(error)
            bad_input = error if isinstance(error, UserError) else out_of_memory(error)
            errors.put((bad_input is not None, str(bad_input or traceback.format_exc())[-_TRACEBACK:]))

    def reporting(*args: Any) -> None:
        try:
            worker(*args)
        except Exception as error:  # before the process group is destroyed, so that it is the first error
            report(error)
            raise

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
            torch.set_num_threads(max(1, usable_cores() // processes))
        _joined(reporting, args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # older torch would make it a success
    except Exception as error:
        report(error)
        sys.exit(1)


def _joined(worker: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # Both where there are GPUs: which one is used follows from a tensor's device, so a run on the CPU works there too.
    # Barriers and Python objects go by gloo, which neither occupies a GPU nor aborts the job while rank 0 is busy.
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        return worker(*args)
    finally:
        dist.destroy_process_group()
