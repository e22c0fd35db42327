"""Two gloo processes against one process that sees the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from loco_det.runtime import launch, rank, world_size
from pretrain.average import GradientAverage
from pretrain.loco import LocalTrainer, Unit
from pretrain.loss import nt_xent

UNITS = {"simclr": [Unit(0, 2)], "gim": [Unit(k, k) for k in range(3)], "loco": [Unit(0, 1), Unit(1, 2)]}


def run(method: str, chunk: int = 0) -> dict[str, torch.Tensor]:
    """Loss and gradients of a small network without batch statistics, on this process's share of four images."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.GELU()).double() for c in (3, 4, 4)]
    heads = [nn.Linear(4, 5).double() for _ in UNITS[method]]
    views = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
    x = views.chunk(world_size(), dim=1)[rank()].flatten(0, 1)
    losses = [lambda h, head=head: nt_xent(head(h.mean((2, 3))), 0.2, chunk) for head in heads]
    average = GradientAverage()
    trainer = LocalTrainer(stages, UNITS[method], losses, lambda k: average.start(trainer.parameters[k]))
    values = trainer.step(x)
    average.start([p for head in heads for p in head.parameters()])
    average.finish()
    named = nn.ModuleList([*stages, *heads]).named_parameters()
    return {"losses": torch.stack(values), **{name: p.grad for name, p in named}}


def worker(method: str, chunk: int, folder: str) -> None:
    torch.save(run(method, chunk), Path(folder) / f"{rank()}.pt")


@pytest.mark.parametrize(("method", "chunk"), [("simclr", 0), ("gim", 0), ("loco", 0), ("loco", 3)])
def test_two_processes_equal_one(method: str, chunk: int, tmp_path: Path) -> None:
    launch(worker, 2, method, chunk, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    whole = run(method)
    torch.testing.assert_close(
        (first.pop("losses") + second.pop("losses")) / 2, whole.pop("losses"), rtol=1e-12, atol=0
    )
    for name, want in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], want, rtol=1e-11, atol=1e-14)
        assert want.abs().max() > 0
