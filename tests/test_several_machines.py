"""Two torchrun agents on the loopback, with two gloo processes each, as on two machines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from test_pretrain_distributed import step, steps
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from loco_det.core.device import local_processes
from loco_det.core.distributed import local_rank, rank, world_size
from loco_det.core.launch import launch

METHODS = ("simclr", "loco")


def _agent(node: int, port: int, job: str, folder: str) -> None:
    """What `torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d` does on each machine."""
    os.environ.pop("WORLD_SIZE", None)
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=2,
        run_id=job,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        start_method="fork",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, JOBS[job])(folder)
    except ChildFailedError as error:
        Path(folder, f"failed{node}").write_text(str(error))
        os._exit(1)
    os._exit(0)


def _everything(folder: str) -> None:
    torch.set_num_threads(1)
    launch(_compare, 1, folder)


def _compare(folder: str) -> None:
    """SyncBN, the loss over all processes, and early messages; rank 3 is late for each."""
    found = {"place": (rank(), local_rank(), world_size(), local_processes())}
    for method in METHODS:
        time.sleep(0.2 * (rank() == 3))
        found[method] = step(method, 0, ()), steps(method)
    torch.save(found, Path(folder) / f"{rank()}.pt")


def _die(folder: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's handler, which a fork inherits
    launch(_dead_rank, 1, folder)


def _dead_rank(folder: str) -> None:
    Path(folder, f"pid{rank()}").write_text(str(os.getpid()))
    step("loco", 0, ())
    if rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        torch.distributed.all_reduce(torch.ones(1))


JOBS = {"compare": _everything, "die": _die}


def _run(job: str, folder: Path) -> list[int | None]:
    """Start both agents; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    agents = [context.Process(target=_agent, args=(node, port, job, str(folder))) for node in range(2)]
    for agent in agents:
        agent.start()
    try:
        for agent in agents:
            agent.join(100)
        return [agent.exitcode for agent in agents]
    finally:
        for agent in agents:
            agent.kill()


def test_two_machines_of_two_processes_equal_one(tmp_path: Path) -> None:
    assert _run("compare", tmp_path) == [0, 0], [path.read_text() for path in tmp_path.glob("failed*")]
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in range(4)]
    assert [one["place"] for one in found] == [(0, 0, 4, 2), (1, 1, 4, 2), (2, 0, 4, 2), (3, 1, 4, 2)]
    for method in METHODS:
        whole, many = step(method, 0, ()), steps(method)
        losses = torch.stack([one[method][0].pop("losses") for one in found]).mean(0)
        torch.testing.assert_close(losses, whole.pop("losses"), rtol=1e-12, atol=0)
        for one in found:
            for name, want in whole.items():
                torch.testing.assert_close(one[method][0][name], want, rtol=1e-10, atol=1e-12)
            for got, want in zip(one[method][1][1:], many[1:]):  # the first are losses of a process
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_dead_process_ends_all_and_is_named(tmp_path: Path) -> None:
    assert _run("die", tmp_path) == [1, 1]
    told = "\n".join(path.read_text() for path in tmp_path.glob("failed*"))
    assert "rank      : 3" in told
    assert "SIGKILL" in told
    for path in tmp_path.glob("pid*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
