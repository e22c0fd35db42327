"""Exact accumulation against the graph of all parts at once, and its limiting cases."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from loco_cases import UNIT_LISTS, build, gradients
from torch import Tensor, nn

from loco_det.backbones.artifact import load_backbone
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from pretrain.accumulate import Accumulation
from pretrain.check import check
from pretrain.checkpoint import latest_checkpoint
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer
from pretrain.loss import nt_xent
from pretrain.memory import SavedBytes
from pretrain.train import pretrain

IMAGES = 4  # two views each


def split(x: Tensor, parts: int) -> list[Tensor]:
    """(2b, ...) -> the two views of each part's images."""
    return [pair.flatten(0, 1) for pair in x.unflatten(0, (2, -1)).chunk(parts, 1)]


def slow_loss(z: Tensor) -> Tensor:
    """NT-Xent of SimCLR's equation 1 at temperature 0.2, pair by pair."""
    z, n = z / z.norm(dim=1, keepdim=True), len(z)
    total = 0.0
    for i in range(n):
        others = torch.stack([z[i] @ z[j] / 0.2 for j in range(n) if j != i])
        total = total - z[i] @ z[(i + n // 2) % n] / 0.2 + others.exp().sum().log()
    return total / n


def all_at_once(stages, units, decoders, x: Tensor, parts: int) -> list[float]:
    """Every unit alone, the graph of all parts in memory."""
    values = []
    for unit, decoder in zip(units, decoders):
        halves = ([], [])
        for h in split(x, parts):
            for k in range(unit.last + 1):
                h = stages[k].module(h.detach() if k == unit.first else h)
            for half, z in zip(halves, decoder(h).chunk(2)):
                half.append(z)
        loss = slow_loss(torch.cat([*halves[0], *halves[1]]))
        loss.backward()
        values.append(loss.item())
    return values


def accumulated(stages, units, decoders, x: Tensor, parts: int, **options) -> list[Tensor]:
    kept = [k for k, stage in enumerate(stages) if stage.recompute]
    trainer = LocalTrainer([s.module for s in stages], units, [], recompute=kept)
    step = Accumulation(trainer, list(decoders), lambda _, z: nt_xent(z, 0.2))
    return step.step([partial(torch.clone, part) for part in split(x, parts)], **options)


def images() -> Tensor:
    return torch.randn(2 * IMAGES, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("recompute", [None, "first"])
@pytest.mark.parametrize("name", UNIT_LISTS)
def test_every_gradient_is_that_of_the_whole_batchs_loss(name: str, recompute: str | None) -> None:
    """BatchNorm by part in both, so that n matters to neither."""
    backbone, stages, units, decoders, _ = build(UNIT_LISTS[name], res2_out_channels=16)
    want_losses = all_at_once(stages, units, decoders, images(), 2)
    want = gradients(backbone, decoders)
    backbone, stages, units, decoders, _ = build(UNIT_LISTS[name], recompute, res2_out_channels=16)
    losses = accumulated(stages, units, decoders, images(), 2)
    assert [v.item() for v in losses] == pytest.approx(want_losses, abs=1e-11)
    assert not any(v.requires_grad for v in losses)
    for expected, got in zip(want, gradients(backbone, decoders)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert any(g.abs().max() > 1e-6 for g in want)


@pytest.mark.parametrize("name", ["simclr", "gim", "loco"])
def test_with_still_statistics_the_number_of_parts_changes_nothing(name: str) -> None:
    results = []
    for parts in (0, 1, 2, 4):
        backbone, stages, units, decoders, losses = build(UNIT_LISTS[name], res2_out_channels=16)
        backbone.eval(), decoders.eval()
        if parts:
            values = accumulated(stages, units, decoders, images(), parts)
        else:
            values = LocalTrainer([s.module for s in stages], units, losses).step(images())
        results.append([*values, *gradients(backbone, decoders)])
    for other in results[1:]:
        for want, got in zip(results[0], other):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_one_part_is_the_ordinary_step_and_more_are_not() -> None:
    results = []
    for parts in (0, 1, 2):
        backbone, stages, units, decoders, losses = build(UNIT_LISTS["loco"], res2_out_channels=16)
        if parts:
            accumulated(stages, units, decoders, images(), parts)
        else:
            LocalTrainer([s.module for s in stages], units, losses).step(images())
        results.append([*gradients(backbone, decoders), *backbone.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results[:2]))
    assert not all(torch.allclose(a, b) for a, b in zip(results[0], results[2]))  # BatchNorm by part


def test_running_statistics_see_every_part_once_and_in_order() -> None:
    backbone, stages, units, decoders, _ = build(UNIT_LISTS["loco"], "first", res2_out_channels=16)
    accumulated(stages, units, decoders, images(), 4)
    other, _, _, heads, _ = build(UNIT_LISTS["loco"], res2_out_channels=16)
    for part in split(images(), 4):
        outputs = other(part)
        for unit, head in zip(("res3", "res4", "res5"), heads):
            head(outputs[unit])
    for got, want in ((backbone, other), (decoders, heads)):
        for name, buffer in got.named_buffers():
            torch.testing.assert_close(buffer, dict(want.named_buffers())[name], rtol=1e-12, atol=1e-14)


def test_each_stage_is_forwarded_twice_a_part_and_memory_is_a_parts() -> None:
    peaks = {}
    for parts, count in ((1, 1), (4, 4), (4, 1)):  # (the parts of the batch, those that are run)
        _, stages, units, decoders, _ = build(UNIT_LISTS["loco"], res2_out_channels=16)
        forwards = [0] * len(stages)
        for k, stage in enumerate(stages):
            stage.module.register_forward_hook(lambda *_, k=k, n=forwards: n.__setitem__(k, n[k] + 1))
        trainer = LocalTrainer([s.module for s in stages], units, [])
        step = Accumulation(trainer, list(decoders), lambda _, z: z.square().sum())
        saved = SavedBytes(ignore=[p for m in (*(s.module for s in stages), decoders) for p in m.parameters()])
        with saved:
            step.step([partial(torch.clone, part) for part in split(images(), parts)[:count]])
        assert forwards == [2 * count] * len(stages)
        assert saved.now == 0
        peaks[parts, count] = saved.peak
    assert peaks[4, 4] == peaks[4, 1]
    assert peaks[4, 4] < 0.3 * peaks[1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_scaling_and_half_precision(dtype: torch.dtype | None) -> None:
    """Both passes see the same rounding, so scaling by a power of two scales every gradient exactly."""
    results = []
    for scale in (None, lambda loss: loss * 8):
        backbone, stages, units, decoders, _ = build(UNIT_LISTS["loco"], res2_out_channels=16)
        backbone.float(), decoders.float()
        options = {"autocast": partial(torch.autocast, "cpu", dtype)} if dtype else {}
        values = accumulated(stages, units, decoders, images().float(), 2, scale=scale, **options)
        results.append((values, gradients(backbone, decoders)))
    assert results[0][0] == results[1][0]
    for one, eight in zip(results[0][1], results[1][1]):
        assert torch.equal(eight, one * 8)
        assert one.isfinite().all()


# --- the program ------------------------------------------------------------------------------------------------


def run(folder: Path, output: Path, resume: bool = False, **extra: object) -> dict[str, Tensor]:
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 DECODER.HIDDEN_DIM 16 DECODER.OUT_DIM 8
        DATA.PATH {folder} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 8 SOLVER.MAX_STEPS 3
        SOLVER.OPTIMIZER adamw SOLVER.BASE_LR 0.001 SOLVER.WARMUP_EPOCHS 0 KNN.PERIOD 0
        DEVICE cpu OUTPUT_DIR {output}"""
    more = [str(part) for key, value in extra.items() for part in (key.replace("__", "."), value)]
    return load_backbone(pretrain(load_config(get_cfg(), "", [*text.split(), *more])[0], resume))[0]


def test_the_program_accumulates_steps_early_and_resumes(noise: Path, tmp_path: Path) -> None:
    want = run(noise, tmp_path / "a", SOLVER__ACCUMULATE=4)
    late = run(noise, tmp_path / "b", SOLVER__ACCUMULATE=4, SOLVER__STEP_EARLY=False, SOLVER__RECOMPUTE="first")
    run(noise, tmp_path / "c", SOLVER__ACCUMULATE=4, CHECKPOINT_PERIOD=2)
    (tmp_path / "c" / "checkpoint_00000003.pth").unlink()
    again = run(noise, tmp_path / "c", True, SOLVER__ACCUMULATE=4, CHECKPOINT_PERIOD=2)
    for name, tensor in want.items():
        assert torch.equal(late[name], tensor)
        assert torch.equal(again[name], tensor)
    assert not torch.equal(run(noise, tmp_path / "d")["conv1.weight"], want["conv1.weight"])
    counted = {int(v) for k, v in latest_checkpoint(tmp_path / "a")[1]["learner"].items() if k.endswith("tracked")}
    assert counted == {12}  # of 3 steps of 4 parts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("SOLVER.ACCUMULATE 3 SOLVER.BATCH_SIZE 8", r"SOLVER\.ACCUMULATE is 3; use a divisor of SOLVER\.BATCH_SIZE 8"),
        ("SOLVER.ACCUMULATE 2 SHARING.MODE soft", r"SOLVER\.ACCUMULATE is 2, but SHARING\.MODE soft"),
        ("SOLVER.ACCUMULATE 0", r"SOLVER\.ACCUMULATE is 0; use 1 or more"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(*load_config(get_cfg(), "", settings.split()))


def test_an_upper_sharing_has_its_own_passes(noise: Path, tmp_path: Path) -> None:
    hard, upper = (run(noise, tmp_path / m, SOLVER__ACCUMULATE=2, SHARING__MODE=m) for m in ("hard", "upper"))
    assert not torch.equal(hard["layer1.0.conv1.weight"], upper["layer1.0.conv1.weight"])


def test_gradients_of_a_part_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same images: every gradient travels once, complete."""
    from test_pretrain_stepping import Link

    from pretrain import average
    from pretrain.average import GradientAverage

    monkeypatch.setattr(average, "replicas", lambda: 2)
    backbone, stages, units, decoders, _ = build(UNIT_LISTS["loco"], res2_out_channels=16)
    everything = nn.ModuleList([backbone, decoders])
    link = Link(0)
    means = GradientAverage(everything.parameters(), link.send)
    trainer = LocalTrainer([s.module for s in stages], units, [])
    step = Accumulation(trainer, list(decoders), lambda _, z: nt_xent(z, 0.2), means)
    step.step([partial(torch.clone, part) for part in split(images(), 2)])
    means.wait(list(everything.parameters()))
    assert sum(link.sizes) == sum(p.numel() * 8 for p in everything.parameters())
    got = gradients(everything)
    backbone, stages, units, decoders, _ = build(UNIT_LISTS["loco"], res2_out_channels=16)
    accumulated(stages, units, decoders, images(), 2)
    for want, mean in zip(gradients(backbone, decoders), got):
        torch.testing.assert_close(mean, want, rtol=1e-12, atol=1e-14)
