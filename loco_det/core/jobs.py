"""Runs many commands: as processes here, each by torchrun, or as SLURM jobs through submitit."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any, TypeVar

from loco_det.core.errors import UserError
from loco_det.core.log import log

_LAST_LINES = 3  # shown of a failed command whose last line is no error message
_running: set[subprocess.Popen] = set()  # commands of this process
Item = TypeVar("Item")


def check_launcher(args: argparse.Namespace) -> None:
    """Raise UserError for fewer than one process or job."""
    if args.num_gpus < 1 or args.jobs < 1:
        raise UserError(f"--num-gpus is {args.num_gpus} and --jobs {args.jobs}; give at least 1 for each")


def command_line(words: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Return the command of `loco-det WORDS` with the launcher's number of processes, for a job that takes it."""
    if args.launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.num_gpus}"]
        return [sys.executable, "-m", *torchrun, "-m", "loco_det.cli", *words]
    job, *rest = words
    return [sys.executable, "-m", "loco_det.cli", job, "--num-gpus", str(args.num_gpus), *rest]


class Gpus:
    """The GPUs of this machine, lent to jobs, so that two of them never share one.

    Args:
        visible: numbers or names of the GPUs; without any, jobs run on the CPU.
        each: GPUs of a job.

    Raises:
        UserError: a job needs more than there are.
    """

    def __init__(self, visible: list[str], each: int) -> None:
        if visible and each > len(visible):
            raise UserError(f"--num-gpus is {each} and {len(visible)} GPUs are usable; lower it")
        self.free: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.are_there = bool(visible)
        for at in range(0, len(visible) - each + 1, each):
            self.free.put(",".join(visible[at : at + each]))

    @contextlib.contextmanager
    def lent(self) -> Iterator[dict[str, str]]:
        """Wait for a job's GPUs; yields the environment that shows only them."""
        if not self.are_there:
            yield {}
            return
        taken = self.free.get()
        try:
            yield {"CUDA_VISIBLE_DEVICES": taken}
        finally:
            self.free.put(taken)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] or [str(number) for number in range(count)]


def run_process(command: Sequence[str], output: IO[Any], lock: IO[Any], shown: Mapping[str, str]) -> tuple[int, float]:
    """Run a command; returns its exit status and the processor time that it and its children used, in seconds.

    The process inherits the lock, so that it stays locked if only this one is killed. It has its own session:
    `launch_all` forwards a signal once, while a second one from the terminal would keep it from saving.

    Args:
        output: gets what it prints.
        lock: an open file that is locked.
        shown: added to its environment.
    """
    streams = {"stdout": output, "stderr": subprocess.STDOUT, "env": {**os.environ, **shown}}
    with subprocess.Popen(command, **streams, pass_fds=[lock.fileno()], start_new_session=True) as process:
        _running.add(process)
        try:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, used.ru_utime + used.ru_stime
        except ChildProcessError:  # another thread that ended it had its status first
            return process.wait(), 0.0
        except BaseException:
            process.terminate()
            raise
        finally:
            _running.discard(process)


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process, unless another one has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def last_words(output: Path) -> str:
    """Return the error message that a command's output ends in, or its last lines."""
    lines = output.read_text(errors="replace").strip().splitlines()
    lines = lines[-1 if lines and lines[-1].startswith("error: ") else -_LAST_LINES :]
    return " / ".join(lines) or "it printed nothing"


def launch_all(
    args: argparse.Namespace,
    items: Sequence[Item],
    run: Callable[[Item, Mapping[str, str]], str | None],
    *,
    on_cpu: bool,
    workers: int,
) -> Iterator[tuple[Item, str | None]]:
    """Run `run(item, environment)` for every item by the launcher of `args`.

    Args:
        run: returns an item's problem or None; `environment` shows its processes the GPUs that are theirs.
        on_cpu: whether items use no GPU.
        workers: data workers of each process, which need cores of a SLURM job.

    Yields:
        Each item as it ends, with its problem or None.
    """
    if not items:
        return
    if args.launcher == "submitit":
        yield from _submit(args, items, run, workers)
        return
    gpus = Gpus([] if on_cpu else visible_gpus(), args.num_gpus)

    def here(item: Item) -> str | None:
        with gpus.lent() as shown:
            return run(item, shown)

    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(here, item): item for item in items}
        try:
            for future in as_completed(running):
                yield running[future], _problem(future)
        except BaseException:  # cancel waiting items; running ones save and exit
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                process.terminate()
            raise


def _problem(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except (OSError, UserError) as error:  # the folder cannot be written: fails this item only
        return str(error)


def _submit(
    args: argparse.Namespace,
    items: Sequence[Item],
    run: Callable[[Item, Mapping[str, str]], str | None],
    workers: int,
) -> Iterator[tuple[Item, str | None]]:
    executor = submitit_executor(args, workers)
    jobs = {executor.submit(run, item, {}): item for item in items}
    log.info("submitted %d jobs; their logs are in %s", len(jobs), args.out / "submitit")
    while jobs:
        for job in [job for job in jobs if job.done()]:
            yield jobs.pop(job), _outcome(job)
        time.sleep(min(5.0, 0.2 * len(jobs)))


def _outcome(job: Any) -> str | None:
    try:
        return job.result()
    except Exception as error:  # killed, timed out or lost by the cluster: fails this item only
        return f"job {job.job_id} failed: {str(error).strip().splitlines()[-1][:300]}"


def submitit_executor(args: argparse.Namespace, workers: int) -> Any:
    """Return the executor that submits one job per item; each process has `workers` data workers.

    Raises:
        UserError: submitit is not installed or the cluster is unavailable.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher submitit needs submitit; run pip install 'loco_det[submitit]'") from error
    folder = args.out.absolute() / "submitit"
    try:
        executor = submitit.AutoExecutor(folder=str(folder), cluster=args.cluster)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--cluster {args.cluster}: {error}; use slurm or local") from error
    gpus = args.num_gpus if executor.cluster != "local" or visible_gpus() else 0
    # Each process and each of its data workers needs a core; SLURM's default is one for all.
    cores = args.num_gpus * (1 + workers)
    executor.update_parameters(
        name="loco-det", timeout_min=args.timeout, gpus_per_node=gpus, tasks_per_node=1, cpus_per_task=cores
    )
    if args.partition:
        executor.update_parameters(slurm_partition=args.partition)
    return executor
