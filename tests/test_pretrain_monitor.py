"""A line of metrics.json against loops over what it was made from, on a clock that the test moves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode

from loco_det.backbones.resnet import ResNet
from loco_det.core.errors import UserError
from loco_det.core.metrics import RunMetrics
from pretrain import monitor
from pretrain.defaults import get_cfg
from pretrain.monitor import HEALTH_IMAGES, Monitor, Stopwatch, UnreadLosses


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def batches(clock: Clock, seconds: float) -> Iterator[int]:
    """Three batches, each of which is so long in coming."""
    for i in range(3):
        clock.now += seconds
        yield i


def test_a_lap_counts_waiting_and_training_but_no_pause(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in watch.through(batches(clock, 0.5)):
        clock.now += 2
    assert watch.lap() == (7.5, 1.5)
    clock.now += 1
    with watch.paused():
        clock.now += 50
    assert watch.lap() == (1, 0)


def watch_run(cfg: CfgNode, *rest: Any) -> Monitor:
    return Monitor(cfg.LOG_PERIOD, cfg.SOLVER.BATCH_SIZE, *rest, RunMetrics(cfg))


def test_a_line_tells_what_happened_since_the_one_before(clock: Clock, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.LOG_PERIOD, cfg.SOLVER.BATCH_SIZE = str(tmp_path), 2, 8
    backbone = ResNet(18, res2_out_channels=16)
    embeddings = {0: torch.randn(6, 4), 1: torch.randn(6, 4)}
    watch = Stopwatch()
    watching = watch_run(cfg, backbone, ["low", "high"], embeddings, watch)
    generator = torch.Generator().manual_seed(0)
    for step, _ in enumerate(watch.through(batches(clock, 0.5))):
        clock.now += 1.5
        for p in backbone.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        watching.record_gradients(list(backbone.parameters()))
        watching(step, [torch.tensor(1.0 + step), torch.tensor(2.0 + step)], 0.1 * (step + 1), {"knn/res5": 50.0})
    first, *_, last = (json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines())
    assert (first["iteration"], first["images_per_second"], first["data_wait_share"]) == (0, 4, 0.25)
    assert (last["iteration"], last["images_per_second"], last["data_wait_share"]) == (2, 4, 0.25)
    assert (last["loss/low"], last["loss/high"], last["knn/res5"]) == (3, 4, 50)
    assert last["lr"] == pytest.approx(0.3)
    for name in ("stem", "res2", "res3", "res4", "res5"):
        flat = torch.cat([p.grad.flatten() for p in getattr(backbone, name).parameters()])
        assert last[f"grad_norm/{name}"] == pytest.approx(flat.norm().item(), rel=1e-5)


def test_steps_without_a_line_count_for_the_next(clock: Clock, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.LOG_PERIOD, cfg.SOLVER.BATCH_SIZE = str(tmp_path), 3, 8
    watch = Stopwatch()
    watching = watch_run(cfg, ResNet(18, res2_out_channels=16), ["all"], {0: torch.randn(6, 4)}, watch)
    for step in range(6):
        clock.now += 2
        watching(step, [torch.tensor(1.0)], 0.1, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 2, 5]
    assert [line["images_per_second"] for line in lines] == [4, 4, 4]


@pytest.mark.parametrize(("spread", "warned"), [(0.04, True), (0.06, False)])
def test_collapse_is_a_spread_below_a_twentieth_of_the_sphere(
    spread: float, warned: bool, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    watch = Stopwatch()
    clock.now += 1
    z = 1 + spread * torch.randn(2 * HEALTH_IMAGES, 256, generator=torch.Generator().manual_seed(0))
    watching = watch_run(cfg, ResNet(18, res2_out_channels=16), ["all"], {0: z}, watch)
    watching(0, [torch.tensor(1.0)], 0.1, {})
    assert ("the embeddings of unit all have collapsed" in caplog.text) == warned


def test_health_is_of_each_units_own_embeddings_and_of_the_first_pairs(clock: Clock, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    watch = Stopwatch()
    few = [torch.randn(2 * HEALTH_IMAGES, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    more = {
        i: torch.cat([z.chunk(2)[0], torch.ones(9, 3), z.chunk(2)[1], -torch.ones(9, 3)]) for i, z in enumerate(few)
    }
    clock.now += 1
    watching = watch_run(cfg, ResNet(18, res2_out_channels=16), ["low", "high"], more, watch)
    watching(0, [torch.tensor(1.0)] * 2, 0.1, {})
    line = json.loads((tmp_path / "metrics.json").read_text())
    for label, z in zip(("low", "high"), few):
        want = {f"{name}/{label}": value.item() for name, value in monitor.embedding_health(z).items()}
        assert {key: line[key] for key in want} == pytest.approx(want)


@pytest.mark.parametrize(("indices", "at"), [([7, 8], r"step 3 \(images 7, 8, \.\.\.\)"), ([], "step 3")])
def test_a_loss_that_is_not_finite_is_told_with_its_images_where_they_are_known(indices: list[int], at: str) -> None:
    unread = UnreadLosses(["low", "high"], SimpleNamespace(name=str))
    for step, loss in ((2, 1.0), (3, torch.nan), (4, torch.nan)):
        unread.add(step, [torch.tensor(1.0), torch.tensor(loss)], torch.tensor(indices, dtype=torch.int64))
    with pytest.raises(UserError, match=f"^the loss of unit high is nan at {at}; start again with a lower"):
        unread.read()
