"""The local step in half precision, and one loss scale for several units."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from loco_cases import UNIT_LISTS, build, gradients, obvious_step
from torch import nn

from loco_det.backbones.resnet import Conv2d
from pretrain.loco import LocalTrainer


def half_works(dtype: torch.dtype) -> bool:
    """Whether this CPU and torch can differentiate a convolution in `dtype`."""
    layer = nn.Conv2d(1, 1, 1)
    try:
        with torch.autocast("cpu", dtype):
            layer(torch.ones(1, 1, 2, 2)).sum().backward()
    except RuntimeError:
        return False
    return True


def small(units: list[list[str]], recompute: str | None = None):
    """Stages, units, losses and all modules, in float32."""
    backbone, stages, spans, decoders, losses = build(units, recompute)
    return stages, spans, losses, nn.ModuleList([backbone.float(), decoders.float()])


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1024.0)], ids=["bf16", "scaled fp16"]
)
@pytest.mark.parametrize("name", ["gim", "loco", "inside a stage"])
def test_every_gradient_equals_that_of_the_units_run_alone(name: str, dtype: torch.dtype, scale: float) -> None:
    """Both round what the other rounds, except that this step adds units' gradients before a stage, not after."""
    if not half_works(dtype):
        pytest.skip(f"no {dtype} convolutions on this CPU")
    options = {"autocast": partial(torch.autocast, "cpu", dtype), "scale": lambda loss: loss * scale}
    stages, units, losses, everything = small(UNIT_LISTS[name])
    expected_losses = obvious_step(stages, units, losses, images(), **options)
    expected = gradients(everything)
    stages, units, losses, everything = small(UNIT_LISTS[name])
    got_losses = LocalTrainer([s.module for s in stages], units, losses).step(images(), **options)
    assert [loss.item() for loss in got_losses] == expected_losses  # the forwards are the same to the last bit
    for want, got in zip(expected, gradients(everything)):
        assert (got - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()
    if name == "gim":  # no sums
        assert all(torch.equal(got, want) for want, got in zip(expected, gradients(everything)))


def test_recomputing_in_half_precision_changes_no_bit() -> None:
    if not half_works(torch.bfloat16):
        pytest.skip("no bfloat16 convolutions on this CPU")
    results = []
    for recompute in ("none", "all"):
        stages, units, losses, everything = small(UNIT_LISTS["loco"], recompute)
        kept = [k for k, stage in enumerate(stages) if stage.recompute]
        trainer = LocalTrainer([s.module for s in stages], units, losses, recompute=kept)
        values = trainer.step(images(), autocast=partial(torch.autocast, "cpu", torch.bfloat16))
        results.append([*values, *gradients(everything)])
    assert kept
    assert all(torch.equal(once, twice) for once, twice in zip(*results))


def test_half_precision_is_used() -> None:
    dtypes = set()
    stages, units, losses, _ = small(UNIT_LISTS["loco"])
    watched = [lambda h, loss=loss: dtypes.add(h.dtype) or loss(h) for loss in losses]
    trainer = LocalTrainer([s.module for s in stages], units, watched)
    trainer.step(images(), autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    assert dtypes == {torch.bfloat16}


def test_an_overflow_in_one_unit_skips_the_step_for_all_and_halves_the_scale() -> None:
    stages, units, losses, everything = small(UNIT_LISTS["loco"])
    overflowing = [losses[0], lambda h: losses[1](h) * 1e37, losses[2]]  # finite, but not when scaled
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    optimizer = torch.optim.SGD(everything.parameters(), lr=0.1)
    modules = [s.module for s in stages]

    def step(losses: list) -> list[torch.Tensor]:
        before = [p.detach().clone() for p in everything.parameters()]
        optimizer.zero_grad()
        values = LocalTrainer(modules, units, losses).step(images(), scale=scaler.scale)
        assert all(torch.isfinite(value) for value in values)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return [p.detach() - old for p, old in zip(everything.parameters(), before)]

    assert not any(change.any() for change in step(overflowing))
    assert scaler.get_scale() == 2.0**11
    assert all(change.isfinite().all() for change in step(losses))
    assert scaler.state_dict()["_growth_tracker"] == 1
    assert any(change.any() for change in step(losses))
    assert scaler.get_scale() == 2.0**12


def test_scaling_leaves_the_step_that_is_taken_unchanged() -> None:
    """A scale that is a power of two is exact, so training with it is training without it."""
    results = []
    for enabled in (False, True):
        stages, units, losses, everything = small(UNIT_LISTS["loco"])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        optimizer = torch.optim.SGD(everything.parameters(), lr=0.1)
        LocalTrainer([s.module for s in stages], units, losses).step(images(), scale=scaler.scale)
        scaler.step(optimizer)
        scaler.update()
        results.append([p.detach().clone() for p in everything.parameters()])
    for plain, scaled in zip(*results):
        assert torch.equal(plain, scaled)


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_strided_convolution_over_a_strip_has_the_gradient_of_its_sum(kernel: int, size: tuple[int, int]) -> None:
    """oneDNN leaves parts of this bf16 gradient unwritten on a map one pixel wide; memory holds anything there."""
    conv = Conv2d(16, 16, kernel, "BN", stride=2)
    x = torch.randn(4, 16, *size)
    out = torch.randn_like(conv._conv_forward(x, conv.weight, None))
    for memory in (float("nan"), 1e30):
        dirt = [torch.full((conv.weight.numel(),), memory, dtype=t) for t in (torch.bfloat16, torch.float32) * 4]
        del dirt
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = torch.autograd.grad(conv._conv_forward(x, conv.weight, None), conv.weight, out.bfloat16())
        padded, expected = F.pad(x, [kernel // 2] * 4), torch.zeros_like(conv.weight)
        for r, c in itertools.product(range(out.shape[2]), range(out.shape[3])):
            patch = padded[:, :, 2 * r : 2 * r + kernel, 2 * c : 2 * c + kernel]
            expected += torch.einsum("bo,bikl->oikl", out[:, :, r, c], patch)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())
