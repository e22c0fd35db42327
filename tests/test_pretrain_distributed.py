"""Two gloo processes against one process that sees the whole batch."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.artifact import load_backbone
from loco_det.config import load_config
from loco_det.errors import UserError
from loco_det.runtime import launch, rank, world_size
from pretrain import train
from pretrain.average import GradientAverage
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer, Unit, running_statistics_kept
from pretrain.loss import nt_xent
from pretrain.sync_batchnorm import SyncBatchNorm
from pretrain.train import pretrain

UNITS = {"simclr": [Unit(0, 2)], "gim": [Unit(k, k) for k in range(3)], "loco": [Unit(0, 1), Unit(1, 2)]}
CASES = [(method, chunk, recompute) for method in UNITS for chunk, recompute in ((0, ()), (3, (0, 2)))]


def step(method: str, chunk: int, recompute: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Loss, gradients and statistics of a small network, on this process's share of four images."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), SyncBatchNorm(4), nn.GELU()).double() for c in (3, 4, 4)]
    heads = [nn.Sequential(nn.Linear(4, 6), SyncBatchNorm(6), nn.Linear(6, 5)).double() for _ in UNITS[method]]
    views = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64) * 3 + 5
    x = views.chunk(world_size(), dim=1)[rank()].flatten(0, 1)
    losses = [lambda h, head=head: nt_xent(head(h.mean((2, 3))), 0.2, chunk) for head in heads]
    average = GradientAverage()
    trainer = LocalTrainer(stages, UNITS[method], losses, lambda k: average.start(trainer.parameters[k]), recompute)
    values = trainer.step(x)
    average.start([p for head in heads for p in head.parameters()])
    average.finish()
    modules = nn.ModuleList([*stages, *heads])
    gradients = {name: p.grad for name, p in modules.named_parameters()}
    return {"losses": torch.stack(values), **gradients, **dict(modules.named_buffers())}


def worker(settings: list[str], folder: str) -> None:
    """Everything that needs two processes, in one start of them."""
    torch.save([step(*case) for case in CASES], Path(folder) / f"{rank()}.pt")
    for method in UNITS:
        pretrain(configuration(settings, f"{folder}/{method}", method))
    (Path(folder) / f"stopped{rank()}").write_text(stopped_run(configuration(settings, f"{folder}/stopped", "loco")))


def stopped_run(cfg: CfgNode) -> str:
    """What a run says in this process when only process 1 gets a signal."""
    original = train.Monitor.__call__

    def interrupted(self, *args):
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Monitor, "__call__", interrupted)
        with pytest.raises(UserError) as error:
            pretrain(cfg)
    return str(error.value)


def configuration(settings: list[str], output: str, method: str):
    return load_config(get_cfg(), "", [*settings, "OUTPUT_DIR", output, "METHOD", method])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (48, 40)))
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.NORM SyncBN DECODER.HIDDEN_DIM 16 DECODER.OUT_DIM 8
        DECODER.CONV_BLOCKS 1 DATA.PATH {folder} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 8
        SOLVER.MAX_STEPS 2 SOLVER.OPTIMIZER sgd SOLVER.BASE_LR 0.001 SOLVER.WARMUP_EPOCHS 0 LOSS.TEMPERATURE 1.0
        LOG_PERIOD 1 DEVICE cpu"""
    return text.split()


@pytest.fixture(scope="module")
def two(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(worker, 2, settings, str(folder))
    return folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:2])))
def test_a_step_of_two_processes_equals_one(case: int, two: Path) -> None:
    first, second = (torch.load(two / f"{r}.pt", weights_only=True)[case] for r in (0, 1))
    whole = step(*CASES[case])
    mean = (first.pop("losses") + second.pop("losses")) / 2
    torch.testing.assert_close(mean, whole.pop("losses"), rtol=1e-12, atol=0)
    for name, want in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], want, rtol=1e-10, atol=1e-13)
        assert want.abs().max() > 0


@pytest.mark.parametrize("method", UNITS)
def test_a_run_of_two_processes_equals_one(method: str, two: Path, settings: list[str], tmp_path: Path) -> None:
    path = pretrain(configuration(settings, str(tmp_path), method))
    lines = [
        [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        for folder in (tmp_path, two / method)
    ]
    assert len(lines[0]) == 2
    for one, other in zip(*lines):
        losses = {k: v for k, v in one.items() if k.startswith("loss/")}
        assert losses == pytest.approx({k: other[k] for k in losses}, rel=1e-6)
    together, _ = load_backbone(two / method / "backbone.safetensors")
    for name, tensor in load_backbone(path)[0].items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-6, atol=1e-6)


def test_a_signal_to_one_process_stops_all_after_the_same_step(two: Path) -> None:
    assert (two / "stopped0").read_text().startswith("stopped by a signal after step 1;")
    assert (two / "stopped1").read_text().startswith("stopped by SIGTERM after step 1;")
    assert len(list((two / "stopped").glob("checkpoint_00000001.pth"))) == 1


def test_alone_it_is_torch_batchnorm_and_statistics_can_be_kept() -> None:
    x = torch.randn(4, 3, 5, 5)
    own, theirs = SyncBatchNorm(3), nn.BatchNorm2d(3)
    assert torch.equal(own(x), theirs(x))
    assert torch.equal(own.running_var, theirs.running_var)
    with running_statistics_kept(own):
        assert torch.equal(own(x), theirs(x))
    assert not torch.equal(own.running_var, theirs.running_var)
