"""What benchmarks/memory.py counts, against the tensors of a plain forward, and the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import memory
import pytest
import torch
from torch import Tensor, nn

from loco_det.backbones.resnet import Conv2d
from pretrain.memory import kept, learner_of

ROOT = Path(__file__).resolve().parent.parent
NARROW = {"STEM": "cifar", "WIDTH": 8}


def storages(backbone: nn.Module, x: Tensor) -> dict[str, dict[int, int]]:
    """{place: bytes} of what each stage must keep, the stem's with res2's: inputs of convolutions and of BatchNorm,
    results of ReLUs, and BatchNorm's mean and deviation of every channel; without the images."""
    found: dict[str, dict[int, int]] = {}
    alive = []

    def keep(stage: str, tensor: Tensor) -> None:
        alive.append(tensor)
        if tensor.data_ptr() != x.data_ptr():
            found.setdefault(stage, {})[tensor.data_ptr()] = tensor.untyped_storage().nbytes()

    def convolution(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        keep(stage_of[module], inputs[0])
        if module not in shortcuts:  # their sum with the block's last convolution is not kept before its ReLU
            keep(stage_of[module], out)

    def batchnorm(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> None:
        for tensor in (inputs[0], torch.empty_like(module.bias), torch.empty_like(module.bias)):
            keep(stage_of[module], tensor)

    stage_of = {m: name.split(".")[0].replace("stem", "res2") for name, m in backbone.named_modules()}
    shortcuts = {m for name, m in backbone.named_modules() if name.endswith("shortcut")}
    for module in stage_of:
        if isinstance(module, Conv2d):
            module.register_forward_hook(convolution)
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(batchnorm)
    with torch.no_grad():
        backbone(x)
    return found


@pytest.mark.parametrize("name", ["resnet18", "presnet50"])
def test_the_backbones_bytes_are_those_of_the_stages_alive_at_a_time(name: str) -> None:
    x = torch.randn(4, 3, 20, 20)
    stages = storages(learner_of(name, "simclr", **NARROW).backbone, x)
    order = sorted(stages)
    together = {
        "simclr": [order],
        "gim": [[stage] for stage in order],
        "loco": [list(pair) for pair in zip(order, order[1:])],  # noqa: RUF007
    }
    for method, groups in together.items():
        most = max(sum({k: v for stage in group for k, v in stages[stage].items()}.values()) for group in groups)
        whole, backbone = kept(learner_of(name, method, **NARROW), x)
        assert backbone == most, method
        assert whole > backbone


def test_only_loco_has_the_halving_block() -> None:
    counts = {m: [len(d.blocks) for d in learner_of("resnet18", m).decoders] for m in memory.PAPER["resnet50"]}
    assert counts == {"simclr": [0], "gim": [0] * 4, "loco": [1] * 3}


def test_savings_are_end_to_end_by_method() -> None:
    figures = memory.measure("resnet50", torch.randn(2, 3, 32, 32))
    for method, saving in {"simclr": 1, "gim": 1.81, "loco": 1.28}.items():
        assert figures[method]["paper"] == saving
        for kind in ("", "backbone_"):
            ratio = figures["simclr"][f"{kind}bytes"] / figures[method][f"{kind}bytes"]
            assert figures[method][f"{kind}saving"] == ratio
    assert figures["gim"]["saving"] > figures["loco"]["saving"] > 1


def test_the_pages_figures_are_the_committed_ones() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "memory_cpu.json").read_text())
    page = (ROOT / "docs" / "local_learning.md").read_text()
    titles = {"resnet50": "ResNet-50", "presnet50": "PResNet-50", "timm:vit_small_patch16_224": "ViT-S/16"}
    assert titles.keys() == memory.PAPER.keys() == figures.keys() - {"setting"}
    for name, title in titles.items():
        for method, label in (("gim", "GIM"), ("loco", "LoCo")):
            found = figures[name][method]
            cells = (found["saving"], found["backbone_saving"], found["paper"])
            assert (
                f"| {title}, {label} | "
                + " | ".join("no ViT" if cell is None else f"{cell:.2f}" for cell in cells)
                + " |"
                in page
            )
