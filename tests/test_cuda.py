"""On a real GPU: what the pretended one (pretended_cuda.py) cannot show. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loco_cases import UNIT_LISTS, build, gradients
from test_pretended_cuda import configured
from tiny_detection import tiny_cfg

from loco_det.backbones.artifact import load_backbone
from loco_det.core.launch import launch
from loco_det.detection.train import train_net
from pretrain import train
from pretrain.loco import LocalTrainer
from pretrain.sync_batchnorm import _NormaliseOnGpu
from pretrain.train import pretrain

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", ["simclr", "gim", "loco"])
def test_a_step_computes_what_the_cpu_does(name: str) -> None:
    """In float64, where neither TF32 nor the order of sums matters."""
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        backbone, stages, units, decoders, losses = build(UNIT_LISTS[name])
        backbone.to(device), decoders.to(device)
        values = LocalTrainer([s.module for s in stages], units, losses).step(x.to(device))
        results.append([*values, *gradients(backbone, decoders)])
    for want, got in zip(*results):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-10)


def test_pretraining_steps_do_not_wait(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train.Monitor.__call__

    def strict(self, step, *args):
        torch.cuda.set_sync_debug_mode("default")
        shown = original(self, step, *args)
        torch.cuda.set_sync_debug_mode("error" if step == 0 else "default")  # the second step only
        return shown

    monkeypatch.setattr(train.Monitor, "__call__", strict)
    try:
        path = pretrain(configured(noise, tmp_path, "DEVICE", "cuda", "METHOD", "loco"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.isfinite().all() for tensor in load_backbone(path)[0].values())


def test_the_kernels_of_synchronised_batchnorm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one process, whose statistics are BatchNorm's own."""
    monkeypatch.setattr("pretrain.sync_batchnorm.gather_replicas", lambda x: x)
    monkeypatch.setattr("pretrain.sync_batchnorm.dist.all_reduce", lambda x, group: x)
    x = (torch.randn(8, 4, 6, 6, device="cuda") * 2 + 1).to(memory_format=torch.channels_last)
    results = []
    for ours in (False, True):
        norm, y = torch.nn.BatchNorm2d(4).cuda(), x.clone().requires_grad_()
        if ours:
            state = norm.running_mean, norm.running_var
            out = _NormaliseOnGpu.apply(y, norm.weight, norm.bias, *state, norm.eps, norm.momentum)
        else:
            out = norm(y)
        out.square().sum().backward()
        results.append([out, y.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_detector_trains(tiny_data: Path, tmp_path: Path) -> None:
    results = train_net(tiny_cfg(tmp_path, SOLVER__MAX_ITER=3, MODEL__DEVICE="cuda"), engine="torchvision")
    assert 0 <= results["segm"]["AP"] <= 100


def _cpu_job() -> None:
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total == 2


def test_two_processes_on_the_cpu_of_a_machine_with_gpus() -> None:
    launch(_cpu_job, 2)
