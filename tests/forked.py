"""A few gloo processes forked from the test's own: no import of torch in each of them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _child(number: int, count: int, worker: Callable[..., Any], folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=count)
        torch.save(worker(*args), f"{folder}/result{number}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error{number}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # nothing of the test run's is to be torn down


def forked(count: int, worker: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Run `worker(*args)` in `count` processes of one job; returns their values by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_child, args=(i, count, worker, str(folder), args)) for i in range(count)]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(300)
    finally:
        for child in children:
            child.kill()  # one that still runs waits for the others
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not errors, "\n".join(errors)
    assert all(child.exitcode == 0 for child in children), [child.exitcode for child in children]
    return [torch.load(folder / f"result{i}", weights_only=False) for i in range(count)]
