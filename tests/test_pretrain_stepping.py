"""Stepping each part early changes no bit, frees its gradient, and waits for no message before it must."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pretrain import average, stepping
from pretrain.average import GradientAverage
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer, Unit
from pretrain.loss import nt_xent
from pretrain.optim import build_optimizer
from pretrain.stepping import Stepping

UNITS = {
    "simclr": [Unit(0, 3)],
    "gim": [Unit(k, k) for k in range(4)],
    "loco": [Unit(0, 1), Unit(1, 2), Unit(2, 3)],
    "nested": [Unit(0, 1), Unit(0, 3), Unit(2, 2)],
}
OPTIMIZERS = {"lars": 0.1, "lars without decay": 0.0, "sgd": 0.1, "adamw": 0.1}  # weight decay
RATES = (0.5, 0.2, 0.1)  # another one for every step, so that a late step with the wrong one shows


class Link:
    """An all-reduce among two processes that have the same gradients; a message arrives `delay` questions later."""

    def __init__(self, delay: int) -> None:
        self.delay, self.sizes, self.under_way = delay, [], 0

    def send(self, flat: Tensor) -> Message:
        self.sizes.append(flat.numel() * flat.element_size())
        self.under_way += 1
        return Message(self, flat)


class Message:
    def __init__(self, link: Link, flat: Tensor) -> None:
        self.link, self.flat, self.asked = link, flat, 0

    def is_completed(self) -> bool:
        self.asked += 1
        return self.asked > self.link.delay

    def wait(self) -> None:
        self.flat *= 2
        self.link.under_way -= 1


class Run:
    """A small network with everything that steps it."""

    def __init__(
        self, method: str, optimizer: str, *, early: bool, link: Link | None = None, scale: float | None = None
    ) -> None:
        torch.manual_seed(0)
        widths = (3, 6, 8, 8, 10)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.GELU()) for a, b in pairwise(widths)
        ]
        self.heads = [nn.Linear(widths[unit.last + 1], 5) for unit in UNITS[method]]
        self.network = nn.ModuleList([*stages, *self.heads])
        parameters = list(self.network.parameters())
        cfg = get_cfg()
        cfg.SOLVER.OPTIMIZER, cfg.SOLVER.WEIGHT_DECAY = optimizer.split()[0], OPTIMIZERS[optimizer]
        self.optimizer = build_optimizer(cfg, self.network)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        self.average = GradientAverage(parameters, link.send if link else None)
        self.stepping = Stepping(self.optimizer, self.network, self.average, self.scaler, early)
        self.freed: dict[int, list[bool]] = {}
        self.trainer = LocalTrainer(
            stages,
            UNITS[method],
            [partial(self.loss, i) for i in range(len(UNITS[method]))],
            on_final=self.final,
            on_start=lambda k: self.stepping.ready(self.network[k]),
        )
        self.taken: list[nn.Module] = []

    def loss(self, i: int, features: Tensor) -> Tensor:
        self.stepping.ready(self.heads[i])
        self.taken.append(self.heads[i])
        return nt_xent(self.heads[i](features.mean((2, 3))), 0.2)

    def final(self, k: int) -> None:
        self.stepping.final(self.network[k], *self.taken)
        self.taken.clear()
        self.freed[k] = [all(p.grad is None for p in module.parameters()) for module in self.network]

    def steps(self, finish: bool) -> list[Tensor]:
        """Losses, tensors and optimizer state after three steps; `finish` after each of them or after the last."""
        images = torch.randn(len(RATES), 8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        losses = []
        for x, self.stepping.lr in zip(images, RATES):
            scale = self.scaler.scale if self.scaler.is_enabled() else None
            losses += self.trainer.step(x, scale=scale)
            if finish:
                self.stepping.finish()
        self.stepping.finish()
        assert all(p.grad is None for p in self.network.parameters())
        return [*losses, *self.network.state_dict().values(), *moments(self.optimizer)]


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    return [state[parameter][key] for parameter in sorted(state) for key in sorted(state[parameter])]


def obvious(method: str, optimizer: str) -> list[Tensor]:
    """One process, the plain loop: all gradients, then the optimizer."""
    run = Run(method, optimizer, early=False)
    images = torch.randn(len(RATES), 8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    losses = []
    for x, lr in zip(images, RATES):
        run.optimizer.zero_grad()
        losses += LocalTrainer(run.trainer.stages, run.trainer.units, run.trainer.losses).step(x)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    return [*losses, *run.network.state_dict().values(), *moments(run.optimizer)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    assert len(got) == len(want)
    return all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", UNITS)
def test_early_steps_change_no_bit(method: str, optimizer: str) -> None:
    want = obvious(method, optimizer)
    assert same(Run(method, optimizer, early=True).steps(finish=False), want)
    assert same(Run(method, optimizer, early=False).steps(finish=True), want)


@pytest.mark.parametrize("delay", [0, 1, 3, 10**9])
@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("method", UNITS)
def test_neither_does_a_message_that_arrives_late(
    method: str, finish: bool, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = obvious(method, "lars")
    monkeypatch.setattr(average, "replicas", lambda: 2)
    late = Link(delay)
    assert same(Run(method, "lars", early=False, link=late).steps(finish=True), want)
    monkeypatch.setattr(average, "FULL", 600)
    monkeypatch.setattr(stepping, "WORTHWHILE", 100)
    link = Link(delay)
    run = Run(method, "lars", early=True, link=link)
    assert same(run.steps(finish), want)
    for used in (link, late):
        assert used.under_way == 0
        assert sum(used.sizes) == 3 * sum(p.numel() * 4 for p in run.network.parameters())


def test_the_end_of_a_step_waits_for_nothing_and_the_next_forward_for_its_stage_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(average, "replicas", lambda: 2)
    monkeypatch.setattr(stepping, "WORTHWHILE", 0)
    link = Link(delay=10**9)
    run = Run("loco", "sgd", early=True, link=link)
    run.trainer.step(torch.randn(8, 3, 6, 6))
    assert (len(link.sizes), link.under_way) == (4, 4)  # a message for each stage, with the decoders of its time
    left = []

    def ready(k: int) -> None:
        run.stepping.ready(run.network[k])
        left.append([i for i, part in enumerate(run.network) if part in run.stepping.waiting])

    monkeypatch.setattr(run.trainer, "on_start", ready)
    run.trainer.step(torch.randn(8, 3, 6, 6))
    assert left[0] == [1, 2, 3, 4, 5, 6]
    assert left[1] == [2, 3, 4, 5, 6]
    assert left[2] == [0, 3, 4, 6]  # 0 and 4, the first decoder, are final again; 5 shared stage 1's message


def test_gradients_too_small_for_a_message_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "replicas", lambda: 2)
    link = Link(delay=0)
    run = Run("loco", "sgd", early=True, link=link)
    sizes = [sum(p.numel() * 4 for p in module.parameters()) for module in run.network]
    monkeypatch.setattr(stepping, "WORTHWHILE", sizes[0] + sizes[4] + 1)  # more than is final with the first stage
    run.trainer.step(torch.randn(8, 3, 6, 6))
    assert link.sizes == [sizes[0] + sizes[4] + sizes[1] + sizes[5], sizes[3] + sizes[6], sizes[2]]


def test_a_stage_is_stepped_and_its_gradient_freed_while_later_ones_have_yet_to_run() -> None:
    run = Run("loco", "sgd", early=True)
    before = [p.clone() for p in run.network[0].parameters()]
    seen = []
    run.network[2].register_forward_pre_hook(
        lambda *_: seen.append([torch.equal(p, b) for p, b in zip(run.network[0].parameters(), before)])
    )
    run.stepping.lr = 0.5
    run.trainer.step(torch.randn(8, 3, 6, 6))
    assert not seen[0][0]  # the weight; a bias before BatchNorm has next to no gradient
    assert all(map(all, run.freed.values()))
    late = Run("loco", "sgd", early=False)
    late.trainer.step(torch.randn(8, 3, 6, 6))
    assert not any(map(any, list(late.freed.values())[-1:]))


def test_observe_sees_every_averaged_gradient_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, results = torch.randn(8, 3, 6, 6), []
    for link, early, scale in ((None, True, None), (None, False, 8.0), (Link(1), True, None)):
        monkeypatch.setattr(average, "replicas", lambda link=link: 2 if link else 1)
        run, seen = Run("loco", "sgd", early=early, link=link, scale=scale), {}
        run.stepping.observe = lambda part, seen=seen: seen.update({p: p.grad.norm() for p in part})
        run.trainer.step(x, scale=run.scaler.scale if scale else None)
        run.stepping.finish()
        results.append(torch.stack([seen[p] for p in run.network.parameters()]))
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0)


def test_one_gradient_that_overflows_holds_back_every_part() -> None:
    run = Run("gim", "sgd", early=True, scale=2.0**20)
    assert not run.stepping.early
    before = [p.clone() for p in run.network.parameters()]
    run.stepping.lr = 0.5
    run.trainer.step(torch.randn(8, 3, 6, 6), scale=run.scaler.scale)
    next(run.network[3].parameters()).grad[0] = float("inf")
    run.stepping.finish()
    assert all(torch.equal(p, b) for p, b in zip(run.network.parameters(), before))
    assert run.scaler.get_scale() == 2.0**19
    run.trainer.step(torch.randn(8, 3, 6, 6), scale=run.scaler.scale)
    run.stepping.finish()
    after = [p.clone() for p in run.network.parameters()]
    run.stepping.finish()  # nothing is left to do
    assert all(torch.equal(p, a) for p, a in zip(run.network.parameters(), after))
    assert not any(torch.equal(p, b) for p, b in zip(run.network.parameters(), before))


def test_gradients_travel_in_a_group_of_their_own_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    link, calls = Link(delay=0), []

    def all_reduce(flat: Tensor, group: object, async_op: bool) -> Message:
        calls.append((group, async_op))
        return link.send(flat)

    monkeypatch.setattr(average, "replicas", lambda: 2)
    monkeypatch.setattr(average, "dist", SimpleNamespace(new_group=lambda: "own", all_reduce=all_reduce))
    layer = nn.Linear(3, 4)
    means = GradientAverage(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    means.flush()
    assert calls == [("own", True)]
    assert link.under_way == 1


def test_messages_keep_memory_formats_and_are_no_larger_than_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(average, "replicas", lambda: 2)
    monkeypatch.setattr(average, "FULL", 2000)
    layers = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3).double(), nn.Linear(3, 4))
    layers[0].to(memory_format=torch.channels_last)
    link = Link(0)
    means = GradientAverage(send=link.send)
    want = []
    for p in layers.parameters():
        p.grad = torch.randn_like(p)
        want.append(p.grad.clone())
        means.add(p)
    assert not means.is_completed(list(layers[2].parameters()))  # not even sent
    means.wait(list(layers.parameters()))
    for p, mean in zip(layers.parameters(), want):
        assert torch.equal(p.grad, mean)
        assert p.grad.stride() == p.stride()
    assert link.sizes == [(4 * 8 * 9 + 8) * 4, 8 * 8 * 9 * 8, 8 * 8, 16 * 4]
