"""The learning rate of every step and what each optimizer does to a weight, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from fvcore.common.config import CfgNode
from plain_lars import PlainLars
from torch import Tensor, nn

from pretrain.defaults import get_cfg
from pretrain.optim import build_optimizer, learning_rate


def solver(**values: object) -> CfgNode:
    cfg = get_cfg()
    cfg.SOLVER.update(values)
    return cfg


@pytest.mark.parametrize(("warmup", "rising"), [(0.0, 0), (0.5, 2), (2.5, 10), (10.0, 40), (99.0, 40)])
@pytest.mark.parametrize(("optimizer", "peak"), [("lars", 0.6), ("sgd", 0.6), ("adamw", 0.3)])
def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine(
    optimizer: str, peak: float, warmup: float, rising: int
) -> None:
    """40 steps, 4 an epoch; a warm-up that is longer than the run ends with it."""
    cfg = solver(OPTIMIZER=optimizer, BASE_LR=0.3, BATCH_SIZE=512, WARMUP_EPOCHS=warmup)
    schedule = learning_rate(cfg, 40, 4)
    for step in range(40):
        share = (step - rising) / max(1, 40 - rising)
        want = peak * step / rising if step < rising else peak * (1 + math.cos(math.pi * share)) / 2
        assert schedule(step / 40) == pytest.approx(want, abs=1e-12)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)).double()


def step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_biases_and_normalisation_do_not_decay(optimizer: str) -> None:
    """Where the gradient is zero nothing but the decay is left."""
    layers = network()
    before = [p.detach().clone() for p in layers.parameters()]
    built = build_optimizer(solver(OPTIMIZER=optimizer, WEIGHT_DECAY=0.2), layers)
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    step(built, 0.5)
    for p, old in zip(layers.parameters(), before):
        torch.testing.assert_close(p.detach(), old * 0.9 if p.ndim > 1 else old, rtol=1e-12, atol=0)


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_momentum_is_the_configured_one_and_biases_are_stepped_as_by_sgd(optimizer: str) -> None:
    layers = network()
    before = [p.detach().clone() for p in layers.parameters()]
    built = build_optimizer(solver(OPTIMIZER=optimizer, MOMENTUM=0.75, WEIGHT_DECAY=0.2), layers)
    for _ in range(2):
        for p in layers.parameters():
            p.grad = torch.ones_like(p)
        step(built, 0.5)
    for p, old in zip(layers.parameters(), before):
        if p.ndim == 1:
            torch.testing.assert_close(p.detach(), old - 0.5 * (1 + 1.75), rtol=1e-12, atol=1e-12)


def test_lars_scales_a_weights_step_by_the_ratio_of_its_norms() -> None:
    layers = network()
    weight = layers[0].weight
    before, gradient = weight.detach().clone(), torch.randn_like(weight)
    built = build_optimizer(solver(OPTIMIZER="lars", WEIGHT_DECAY=0.2), layers)
    weight.grad = gradient.clone()  # timm 1.0.9 writes into the gradient
    step(built, 0.5)
    ratio = 0.001 * before.norm() / (gradient.norm() + 0.2 * before.norm())
    torch.testing.assert_close(weight.detach(), before - 0.5 * ratio * (gradient + 0.2 * before), rtol=1e-6, atol=0)


def five_steps(optimizer: str, decay: float, zeroed: bool = False) -> list[Tensor]:
    """All tensors after five steps with seeded gradients, at another rate each; "plain" is the oracle."""
    layers = network()
    if zeroed:
        nn.init.zeros_(layers[0].weight)
    oracle = PlainLars(list(layers.parameters()), 0.9, decay)
    built = None
    if optimizer != "plain":
        built = build_optimizer(solver(OPTIMIZER=optimizer, MOMENTUM=0.9, WEIGHT_DECAY=decay), layers)
    g = torch.Generator().manual_seed(2)
    for lr in (0.5, 4.8, 3.0, 1.0, 0.1):
        for p in layers.parameters():
            p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)
        if built is None:
            oracle.step(lr)
        else:
            step(built, lr)
    return [p.detach() for p in layers.parameters()]


@pytest.mark.parametrize("zeroed", [False, True])
def test_lars_without_decay_is_lars(zeroed: bool) -> None:
    """timm adds 1e-8 to the gradient's norm, so to eight digits; a weight of zeros is stepped as by SGD at first."""
    for got, want in zip(five_steps("lars", 0.0, zeroed), five_steps("plain", 0.0, zeroed)):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_lars_at_the_recipes_decay_is_lars_to_four_digits() -> None:
    """timm divides by |g| + decay |w|, the oracle by |g + decay w|: apart by a share of at most 2 decay |w| / |g|."""
    start = [p.detach() for p in network().parameters()]
    for old, got, want in zip(start, five_steps("lars", 1e-6), five_steps("plain", 1e-6)):
        torch.testing.assert_close(got - old, want - old, rtol=1e-4, atol=1e-9)


def test_lars_is_not_sgd() -> None:
    """Weights move otherwise with and without decay; biases and normalisation as by SGD, which never adapts."""
    for decay in (0.0, 1e-6):
        for p, got, sgd in zip(network().parameters(), five_steps("lars", decay), five_steps("sgd", decay)):
            assert torch.equal(got, sgd) == (p.ndim == 1)
