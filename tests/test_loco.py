"""The local step against each unit run and differentiated alone, and its limiting cases."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loco_cases import UNIT_LISTS, build, gradients, obvious_step
from torch import nn
from torch.profiler import ProfilerActivity, profile

from loco_det.core.errors import UserError
from pretrain.loco import LocalTrainer, Unit, plan_passes
from pretrain.memory import SavedBytes


@pytest.mark.parametrize("name", UNIT_LISTS)
def test_every_gradient_equals_that_of_the_units_run_alone(name: str) -> None:
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    backbone, stages, units, decoders, losses = build(UNIT_LISTS[name])
    expected_losses = obvious_step(stages, units, losses, x)
    expected = gradients(backbone, decoders)
    backbone, stages, units, decoders, losses = build(UNIT_LISTS[name])
    got_losses = LocalTrainer([s.module for s in stages], units, losses).step(x)
    assert [v.item() for v in got_losses] == pytest.approx(expected_losses, abs=1e-12)
    assert not any(v.requires_grad for v in got_losses)
    for want, got in zip(expected, gradients(backbone, decoders)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert any(g.abs().max() > 1e-6 for g in expected)


BLOCKS = ["stem", *(f"res{s}.{b}" for s in (2, 3, 4, 5) for b in (0, 1))]  # of ResNet-18


def first_names(block: int) -> list[str]:
    """Every way to say that a unit starts at this block."""
    name = BLOCKS[block]
    return [name, f"{name}-1", name[:-2]] if name.endswith(".0") else [name]


def last_names(block: int) -> list[str]:
    """Every way to say that a unit ends with this block."""
    name = BLOCKS[block]
    return [name, f"{name[:-2]}.0-1", name[:-2]] if name.endswith(".1") else [name]


@st.composite
def unit_lists(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[str]]]:
    """Units that together cover every block, as positions and as names; many are of one block."""
    block = st.integers(0, len(BLOCKS) - 1)
    spans = draw(st.lists(st.tuples(block, block).map(lambda pair: (min(pair), max(pair))), max_size=5))
    spans += [(b, b) for b in range(len(BLOCKS)) if not any(first <= b <= last for first, last in spans)]
    spans = draw(st.permutations(spans))
    names = [
        [draw(st.sampled_from(first_names(first))), draw(st.sampled_from(last_names(last)))] for first, last in spans
    ]
    return spans, names


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(unit_lists(), st.sets(st.sampled_from(BLOCKS), max_size=3))
def test_any_units_at_all_equal_blocks_run_one_by_one(lists: tuple, recompute: set[str]) -> None:
    """The oracle knows blocks only: no stages, no plan; it runs each unit from the image up."""
    spans, names = lists
    backbone, stages, units, decoders, losses = build(names, recompute=sorted(recompute))
    kept = [k for k, stage in enumerate(stages) if stage.recompute]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    LocalTrainer([s.module for s in stages], units, losses, recompute=kept).step(x)
    got = gradients(backbone, decoders)
    counted = [m.num_batches_tracked.item() for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(counted) == {1}

    backbone, _, _, decoders, losses = build(names)
    blocks = [backbone.stem, *(block for s in (2, 3, 4, 5) for block in getattr(backbone, f"res{s}"))]
    for (first, last), loss in zip(spans, losses):
        h = x
        for block in blocks[:first]:
            h = block(h)
        h = h.detach()
        for block in blocks[first : last + 1]:
            h = block(h)
        loss(h).backward()
    for want, have in zip(gradients(backbone, decoders), got):
        torch.testing.assert_close(have, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("recompute", ["first", "all", ["res3", "res4.1"], "res5"])
@pytest.mark.parametrize("name", UNIT_LISTS)
def test_recomputing_changes_no_bit_of_losses_gradients_and_statistics(name: str, recompute: str | list[str]) -> None:
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for again in ("none", recompute):
        backbone, stages, units, decoders, losses = build(UNIT_LISTS[name], recompute=again)
        kept = [k for k, stage in enumerate(stages) if stage.recompute]
        assert bool(kept) == (again != "none")
        values = LocalTrainer([s.module for s in stages], units, losses, recompute=kept).step(x)
        results.append([*values, *gradients(backbone, decoders), *backbone.state_dict().values()])
    for once, twice in zip(*results):
        assert torch.equal(once, twice)


def bytes_kept(method: str, recompute: str | None) -> int:
    """The most that is saved for backward at any time of a step, each storage once."""
    _, stages, units, decoders, losses = build(UNIT_LISTS[method], recompute=recompute)
    kept = [k for k, stage in enumerate(stages) if stage.recompute]
    trainer = LocalTrainer([s.module for s in stages], units, losses, recompute=kept)
    weights = [p for module in (*(stage.module for stage in stages), decoders) for p in module.parameters()]
    saved = SavedBytes(ignore=weights)
    with saved:
        trainer.step(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert saved.now == 0
    return saved.peak


def test_saved_bytes_counts_a_storage_once_and_lets_go() -> None:
    x = torch.ones(10, dtype=torch.float64, requires_grad=True)
    saved = SavedBytes(ignore=[x])
    with saved:
        y = x.exp()  # keeps y
        z = (y * y + y[:4].sum() * x).sum()  # keeps y twice more, its sum and x
        assert saved.now == 80 + 8
        z.backward()
    assert (saved.now, saved.peak) == (0, 88)
    moments, alive = zip(*saved.history)
    assert list(moments) == sorted(moments)
    assert (alive[0], max(alive), alive[-1]) == (80, 88, 0)


def test_local_learning_and_recomputing_keep_less() -> None:
    simclr, loco, gim = (bytes_kept(method, None) for method in ("simclr", "loco", "gim"))
    assert gim < loco < simclr
    assert bytes_kept("loco", "first") < 0.8 * loco
    assert bytes_kept("simclr", "all") < 0.5 * simclr


def test_one_unit_over_everything_is_end_to_end_simclr() -> None:
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    backbone, stages, units, decoders, losses = build(UNIT_LISTS["simclr"])
    assert (len(stages), units) == (1, [Unit(0, 0)])
    LocalTrainer([s.module for s in stages], units, losses).step(x)
    got = gradients(backbone, decoders)
    backbone, _, _, decoders, losses = build(UNIT_LISTS["simclr"])
    losses[0](backbone(x)["res5"]).backward()
    for want, have in zip(gradients(backbone, decoders), got):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


@pytest.mark.parametrize(("method", "loss", "reached"), [("gim", 2, {4}), ("loco", 1, {3, 4}), ("loco", 2, {4, 5})])
def test_a_stage_outside_a_unit_gets_exactly_nothing_from_it(method: str, loss: int, reached: set[int]) -> None:
    backbone, stages, units, _, losses = build(UNIT_LISTS[method])
    only = [f if i == loss else (lambda h: h.sum() * 0) for i, f in enumerate(losses)]
    LocalTrainer([s.module for s in stages], units, only).step(torch.randn(6, 3, 16, 16, dtype=torch.float64))
    for name in ("stem", "res2", "res3", "res4", "res5"):
        touched = any(g.abs().max() > 0 for g in gradients(getattr(backbone, name)))
        assert touched == (name[-1].isdigit() and int(name[-1]) in reached)


def test_batch_statistics_are_updated_once() -> None:
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    backbone, stages, units, _, losses = build(UNIT_LISTS["loco"])
    LocalTrainer([s.module for s in stages], units, losses).step(x)
    other, *_ = build(UNIT_LISTS["loco"])
    other(x)
    for (name, got), want in zip(backbone.state_dict().items(), other.state_dict().values()):
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "costs", "final_after"),
    [("simclr", [3], [0]), ("gim", [3, 3, 3, 3], [0, 1, 2, 3]), ("loco", [3, 4, 4, 3], [1, 2, 3, 3])],
)
def test_the_plan_is_minimal_and_early(method: str, costs: list[int], final_after: list[int]) -> None:
    _, stages, units, _, _ = build(UNIT_LISTS[method])
    plan = plan_passes(units, len(stages))
    assert [1 + sum(1 + p.weights for p in passes) for passes in plan] == costs
    assert [passes[-1].when for passes in plan] == final_after


def test_a_trace_shows_every_forward_loss_and_pass_by_name_and_no_other() -> None:
    """Also that each pass of the plan is run once, as soon as its last loss is known."""
    _, stages, units, _, losses = build(UNIT_LISTS["loco"])
    trainer = LocalTrainer([s.module for s in stages], units, losses)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        trainer.step(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    names = [event.name for event in sorted(trace.events(), key=lambda event: event.time_range.start)]
    assert [name for name in names if name.startswith(("stage ", "unit "))] == [
        "stage 0 forward",
        "stage 1 forward",
        "unit 0 loss",
        "stage 1 input-only pass",
        "stage 0 parameter pass",
        "stage 2 forward",
        "unit 1 loss",
        "stage 2 input-only pass",
        "stage 1 parameter pass",
        "stage 3 forward",
        "unit 2 loss",
        "stage 3 parameter pass",
        "stage 2 parameter pass",
    ]


def test_gradients_are_final_when_on_final_says_so() -> None:
    _, stages, units, _, losses = build(UNIT_LISTS["loco"])
    seen: dict[int, list[torch.Tensor]] = {}
    trainer = LocalTrainer(
        [s.module for s in stages], units, losses, lambda k: seen.update({k: gradients(stages[k].module)})
    )
    trainer.step(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    assert list(seen) == [0, 1, 3, 2]  # 3 before 2: the top stage's gradient flows down into its neighbour
    for k, early in seen.items():
        for a, b in zip(early, gradients(stages[k].module)):
            assert torch.equal(a, b)


def test_a_stage_lets_go_of_its_output_when_its_gradients_are_final() -> None:
    _, stages, units, _, losses = build(UNIT_LISTS["loco"])
    outputs: dict[int, weakref.ref] = {}
    for k, stage in enumerate(stages):
        stage.module.register_forward_hook(lambda *values, k=k: outputs.update({k: weakref.ref(values[-1])}))
    alive: dict[int, set[int]] = {}

    def final(k: int) -> None:
        alive[k] = {other for other, output in outputs.items() if output() is not None}

    LocalTrainer([s.module for s in stages], units, losses, final).step(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    # The newest output, of which the next stage's input is made, is there in any case.
    assert alive == {0: {1}, 1: {2}, 3: {2, 3}, 2: {3}}


def test_on_start_comes_before_the_forward_that_needs_the_weights() -> None:
    _, stages, units, _, losses = build(UNIT_LISTS["loco"])
    calls: list[tuple[str, int]] = []
    for k, stage in enumerate(stages):
        stage.module.register_forward_pre_hook(lambda *_, k=k: calls.append(("forward", k)))
    trainer = LocalTrainer(
        [s.module for s in stages],
        units,
        losses,
        on_final=lambda k: calls.append(("final", k)),
        on_start=lambda k: calls.append(("start", k)),
    )
    trainer.step(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    starts = [call for call in calls if call[0] != "final"]
    assert starts == [(name, k) for k in range(4) for name in ("start", "forward")]
    assert calls.index(("final", 0)) < calls.index(("start", 2))


def test_scale_multiplies_every_gradient() -> None:
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for scale in (None, lambda loss: loss * 8):
        backbone, stages, units, decoders, losses = build(UNIT_LISTS["loco"])
        LocalTrainer([s.module for s in stages], units, losses).step(x, scale=scale)
        results.append(gradients(backbone, decoders))
    for one, eight in zip(*results):
        torch.testing.assert_close(eight, one * 8, rtol=1e-12, atol=0)


def test_frozen_weights_get_no_gradient_and_the_others_get_theirs() -> None:
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    results = []
    for frozen in (False, True):
        backbone, stages, units, decoders, losses = build(UNIT_LISTS["loco"])
        backbone.res3[0].requires_grad_(not frozen)
        LocalTrainer([s.module for s in stages], units, losses).step(x)
        assert all((p.grad is None) == frozen for p in backbone.res3[0].parameters())
        results.append(
            gradients(backbone.stem, backbone.res2, backbone.res3[1], backbone.res4, backbone.res5, decoders)
        )
    for free, beside in zip(*results):
        torch.testing.assert_close(beside, free, rtol=1e-12, atol=0)


def test_stages_partition_the_backbone() -> None:
    for units in UNIT_LISTS.values():
        backbone, stages, spans, _, _ = build(units)
        ids = [id(p) for s in stages for p in s.module.parameters()]
        assert ids == [id(p) for p in backbone.parameters()]
        assert all(b.first <= a.last + 1 for a, b in pairwise(sorted(spans, key=lambda u: u.first)))


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([["res2", "res6"]], "'res6' is not in this backbone"),
        ([["res2", "res5.7"]], "'res5.7' is not in this backbone"),
        ([["res3", "res2"], ["res2", "res5"]], "ends before it starts"),
        ([["res2", "res3"], ["res5", "res5"]], "no unit trains res4.0"),
        ([["res2"]], "is not a"),
        (["res2"], "is not a"),
        ([["stem.1", "res5"]], "'stem.1' is not in this backbone"),
    ],
)
def test_units_that_cannot_be(units: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(units)


@pytest.mark.parametrize(
    ("recompute", "blocks"),
    [
        (None, []),
        ("none", []),
        ("first", BLOCKS[:3]),
        ("all", BLOCKS),
        (["res3", "res4.1"], ["res3.0", "res3.1", "res4.1"]),
        ("[res2, res3.0]", ["res2.0", "res2.1", "res3.0"]),
    ],
)
def test_what_is_recomputed_is_cut_into_the_blocks_that_were_named(recompute: object, blocks: list[str]) -> None:
    _, stages, _, _, _ = build(UNIT_LISTS["loco"], recompute=recompute)
    assert [stage.name for stage in stages if stage.recompute] == blocks


def test_stages_to_recompute_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"SOLVER.RECOMPUTE: 'second' is not in this backbone"):
        build(UNIT_LISTS["loco"], recompute="second")
