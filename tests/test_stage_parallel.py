"""Stages spread over processes against the same steps in one process."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import forked
from torch import Tensor, nn

from loco_det.backbones.artifact import load_backbone
from loco_det.core.config import load_config
from loco_det.core.distributed import rank, replica_rank, replicas, replicated, world_size
from loco_det.core.errors import UserError
from loco_det.core.log import log
from pretrain import stage_run
from pretrain.average import GradientAverage
from pretrain.check import check
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer, Unit
from pretrain.loss import nt_xent
from pretrain.placement import measure_costs, place
from pretrain.stage_parallel import Place, StageTrainer, pipeline_length
from pretrain.stage_run import StageSteps, check_spans
from pretrain.stepping import Stepping
from pretrain.sync_batchnorm import SyncBatchNorm
from pretrain.train import pretrain

UNITS = {
    "simclr": [Unit(0, 3)],
    "gim": [Unit(k, k) for k in range(4)],
    "loco": [Unit(0, 1), Unit(1, 2), Unit(2, 3)],
    "loco_res2": [Unit(0, 0), Unit(0, 1), Unit(1, 2), Unit(2, 3)],
    "nested": [Unit(0, 3), Unit(1, 1), Unit(1, 2)],
}
RATES = (0.2, 0.1, 0.3, 0.15)  # of each step
STEPS = len(RATES)


def network(units: list[Unit], norm: type[nn.Module] = nn.BatchNorm2d) -> tuple[list[nn.Module], list[nn.Module]]:
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 5, 3, padding=1), norm(5), nn.GELU()).double() for c in (3, 5, 5, 5)]
    return stages, [nn.Linear(5, 4).double() for _ in units]


def batches(share: int = 0, shares: int = 1) -> list[Tensor]:
    """Each step's (2b, 3, 6, 6) views of one share of the images."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(2, 4, 3, 6, 6, dtype=torch.float64, generator=generator) for _ in range(STEPS)]
    return [v.chunk(shares, 1)[share].flatten(0, 1) for v in views]


def head_loss(head: nn.Module, h: Tensor) -> Tensor:
    return nt_xent(head(h.mean((2, 3))), 0.2)


def one_process(name: str) -> dict[str, Tensor]:
    """The plain loop: all gradients of a step, then SGD."""
    stages, heads = network(UNITS[name])
    modules = nn.ModuleList([*stages, *heads])
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.0, momentum=0.9)
    trainer = LocalTrainer(stages, UNITS[name], [partial(head_loss, head) for head in heads])
    for rate, x in zip(RATES, batches()):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        trainer.step(x)
        optimizer.step()
    return dict(modules.state_dict())


def delayed(name: str, owners: list[range]) -> dict[str, Tensor]:
    """Streaming, by definition: a stage steps with a gradient from above a batch later, at the rate of its batch."""
    stages, heads = network(UNITS[name])
    units = UNITS[name]
    modules = nn.ModuleList([*stages, *heads])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0, momentum=0.9) for m in modules]
    owner = [next(s for s, own in enumerate(owners) if k in own) for k in range(4)]
    late = {k for k in range(4) if any(u.covers(k) and owner[u.last] > owner[k] for u in units)}
    waiting: dict[int, list[Tensor]] = {}

    def step(k: int, number: int) -> None:
        optimizers[k].param_groups[0]["lr"] = RATES[number]
        optimizers[k].step()

    for number, x in enumerate(batches()):
        for m in modules:
            m.zero_grad()
        LocalTrainer(stages, units, [partial(head_loss, head) for head in heads]).step(x)
        found = {k: [p.grad.clone() for p in stages[k].parameters()] for k in range(4)}
        for k in range(4):
            gradients = waiting.pop(k, None) if k in late else found[k]
            if gradients is not None:
                for p, gradient in zip(stages[k].parameters(), gradients):
                    p.grad = gradient
                step(k, number - (k in late))
        for i in range(len(heads)):
            step(4 + i, number)
        waiting = {k: found[k] for k in late}
    for k, gradients in waiting.items():
        for p, gradient in zip(stages[k].parameters(), gradients):
            p.grad = gradient
        step(k, STEPS - 1)
    return dict(modules.state_dict())


def spread(name: str, schedule: str, recompute: tuple[int, ...] = (), pipelines: int = 1) -> dict[str, Tensor]:
    """This process's tensors after the same steps."""
    length = world_size() // pipelines
    where = Place.of(length)
    own = place([1.0] * 4, length)[where.position]
    units = UNITS[name]
    stages, heads = network(units, SyncBatchNorm if pipelines > 1 else nn.BatchNorm2d)
    modules = nn.ModuleList([*stages, *heads])
    mine = [*(stages[k] for k in own), *(h for h, unit in zip(heads, units) if unit.last in own)]
    optimizer = torch.optim.SGD(modules.parameters(), lr=0.0, momentum=0.9)
    with replicated(where.replicas):
        assert (replicas(), replica_rank()) == (pipelines, where.pipeline)
        average = GradientAverage([p for m in mine for p in m.parameters()], group=where.messages)
        stepping = Stepping(optimizer, mine, average, torch.amp.GradScaler("cpu", enabled=False), early=True)
        taken: list[nn.Module] = []

        def loss(i: int, h: Tensor) -> Tensor:
            stepping.ready(heads[i])
            taken.append(heads[i])
            return head_loss(heads[i], h)

        def final(*modules: nn.Module) -> None:
            stepping.final(*modules, *taken)
            taken.clear()

        trainer = StageTrainer(
            stages,
            units,
            [partial(loss, i) for i in range(len(heads))],
            own,
            where,
            torch.device("cpu"),
            streaming=schedule == "streaming",
            on_gradient=average.add,
            on_losses=final,
            on_final=lambda k: final(stages[k]),
            recompute=recompute,
            on_start=lambda k: stepping.ready(stages[k]),
        )
        for number, x in enumerate(batches(where.pipeline, pipelines)):
            stepping.lr = RATES[number]
            trainer.step(
                x if where.position == 0 else None,
                more=number < STEPS - 1,
                before_late=lambda n=number: setattr(stepping, "lr", RATES[n - 1]),
            )
            stepping.lr = RATES[number]
        trainer.drain()
        stepping.finish()
        trainer.close()
    owned = {id(m) for m in mine}
    names = [name for name, m in modules.named_children() if id(m) in owned]
    return {key: v for key, v in modules.state_dict().items() if key.split(".")[0] in names}


CASES = [(name, "exact", again) for name in UNITS for again in ((), (0, 1, 2))]
CASES += [(name, "streaming", ()) for name in ("gim", "loco", "loco_res2")]


def everything() -> list[dict[str, Tensor]]:
    return [spread(*case) for case in CASES]


@pytest.fixture(scope="module", params=[2, 4])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    return forked(request.param, everything, tmp_path_factory.mktemp("several"))


def union(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Every tensor exactly once."""
    merged = dict(itertools.chain.from_iterable(part.items() for part in parts))
    assert len(merged) == sum(map(len, parts))
    return merged


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:2])))
def test_any_number_of_processes_equals_one(case: int, several: list) -> None:
    name, schedule, _ = CASES[case]
    got = union([found[case] for found in several])
    want = one_process(name) if schedule == "exact" else delayed(name, place([1.0] * 4, len(several)))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-10, atol=1e-12)
    start = network(UNITS[name])[0][0][0].weight
    assert (want["0.0.weight"] - start).abs().max() > 1e-3


def test_streaming_is_exact_for_gim_and_another_run_for_loco() -> None:
    for name, same in (("gim", True), ("loco", False)):
        one, late = one_process(name), delayed(name, place([1.0] * 4, 4))
        assert all(torch.equal(a, b) for a, b in zip(one.values(), late.values())) == same


def two_by_two() -> list[dict[str, Tensor]]:
    return [spread(name, "exact", pipelines=2) for name in ("loco", "gim")]


def test_two_pipelines_of_two_processes_share_a_batch(tmp_path: Path) -> None:
    """With SyncBN and the loss over both pipelines they equal one process with the whole batch."""
    found = forked(4, two_by_two, tmp_path)
    for number, name in enumerate(("loco", "gim")):
        want = one_process(name)
        for pipeline in (found[:2], found[2:]):
            got = union([part[number] for part in pipeline])
            for key, tensor in want.items():
                torch.testing.assert_close(got[key], tensor, rtol=1e-9, atol=1e-11)


def test_a_gradient_from_above_has_the_rate_of_its_own_step() -> None:
    """In a run, whose rate changes with every step."""
    seen: list[float] = []

    def step(x, *, more: bool, autocast, before_late: Callable[[], None]) -> dict[int, Tensor]:
        seen.append(steps.stepping.lr)
        before_late()
        seen.append(steps.stepping.lr)
        return {}

    run = SimpleNamespace(cfg=get_cfg())
    steps = StageSteps(run, None, None, 10, None, lambda progress: 1 - progress, nullcontext, None, None)
    steps.trainer, steps.stepping, steps.counted = SimpleNamespace(step=step), SimpleNamespace(), 0
    for number in (3, 4):
        steps._step(number, None)
        seen.append(steps.stepping.lr)
    assert seen == pytest.approx([0.7, 0.8, 0.7, 0.6, 0.7, 0.6])


# --- places -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_the_placement_is_the_best_of_all_cuts(processes: int) -> None:
    generator = np.random.default_rng(processes)
    for _ in range(20):
        costs = generator.uniform(0.1, 3, 7).tolist()
        cuts = itertools.combinations(range(1, 7), processes - 1)
        best = min(max(sum(costs[a:b]) for a, b in zip((0, *c), (*c, 7))) for c in cuts)
        runs = place(costs, processes)
        assert [k for run in runs for k in run] == list(range(7))
        assert all(len(run) for run in runs)
        assert max(sum(costs[k] for k in run) for run in runs) == pytest.approx(best)


def test_costs_are_measured_without_a_trace() -> None:
    stages, heads = network(UNITS["loco"])
    stages[1].register_parameter("unused", nn.Parameter(torch.ones(1)))
    before = [v.clone() for m in (*stages, *heads) for v in m.state_dict().values()]
    costs = measure_costs(stages, UNITS["loco"], [partial(head_loss, h) for h in heads], batches()[0])
    assert len(costs) == 4
    assert min(costs) > 0
    after = [v for m in (*stages, *heads) for v in m.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(p.grad is None for m in (*stages, *heads) for p in m.parameters())


def test_numbers_of_processes_that_fit_and_that_do_not() -> None:
    assert [pipeline_length(n, 4) for n in (1, 2, 3, 4, 8, 64)] == [1, 2, 3, 4, 4, 4]
    with pytest.raises(UserError, match=r"6 processes are no multiple of the 4 stages"):
        pipeline_length(6, 4)


def test_streaming_refuses_a_unit_over_three_processes() -> None:
    check_spans(["a", "b"], [(0, 1), (1, 2)], [range(0, 1), range(1, 2), range(2, 3)], "streaming")
    check_spans(["a"], [(0, 2)], [range(0, 1), range(1, 2), range(2, 3)], "exact")
    with pytest.raises(UserError, match=r"unit b lies on 3 processes"):
        check_spans(["a", "b"], [(0, 1), (0, 2)], [range(0, 1), range(1, 2), range(2, 3)], "streaming")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("SOLVER.PARALLEL stages", r"SOLVER\.PARALLEL is 'stages', but there is one process"),
        ("SOLVER.SCHEDULE streaming", r"SOLVER\.SCHEDULE is 'streaming', which is for SOLVER\.PARALLEL stages"),
    ],
)
def test_one_process_has_no_stages_to_spread(settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(*load_config(get_cfg(), "", settings.split()))


@pytest.mark.parametrize(
    "settings",
    [
        "SOLVER.AMP fp16", "SOLVER.ACCUMULATE 2", "SOLVER.COMPILE True", "SHARING.MODE upper", "METHOD random",
        "SOLVER.SCHEDULE streaming SOLVER.RECOMPUTE first",
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_refused(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.check.world_size", lambda: 2)
    key = settings.split()[-2]
    with pytest.raises(UserError, match=rf"{key} is .* with SOLVER\.PARALLEL stages"):
        check(*load_config(get_cfg(), "", ["SOLVER.PARALLEL", "stages", *settings.split()]))


# --- the program ------------------------------------------------------------------------------------------------


def run(images: Path, output: Path, *more: object, resume: bool = False) -> Path:
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 BACKBONE.NORM SyncBN DECODER.HIDDEN_DIM 16
        DECODER.OUT_DIM 8 DATA.PATH {images} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 4
        SOLVER.MAX_STEPS 6 SOLVER.OPTIMIZER adamw SOLVER.BASE_LR 0.001 SOLVER.WARMUP_EPOCHS 1 LOG_PERIOD 2
        KNN.PERIOD 3 KNN.K 1 CHECKPOINT_PERIOD 3 DEVICE cpu OUTPUT_DIR {output}"""
    return pretrain(load_config(get_cfg(), "", [*text.split(), *map(str, more)])[0], resume)


STAGES = ("SOLVER.PARALLEL", "stages")


class Said(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def at_step(number: int, what: Callable[[], None]) -> Callable[..., dict[int, Tensor]]:
    """A step of StageTrainer that calls `what` before the given one, at rank 1."""
    original, steps = StageTrainer.step, itertools.count()

    def step(self, *args, **options):
        if rank() == 1 and next(steps) == number:
            what()
        return original(self, *args, **options)

    return step


def measured_but_equal(*args: object) -> list[float]:
    """So that the placement does not depend on the clock."""
    assert len(measure_costs(*args)) == 4
    return [1.0] * 4


def programs(images: Path, folder: Path) -> tuple[list[str], str]:
    """Returns what the exact run logs, and how the stopped one ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_run, "measure_costs", measured_but_equal)
        said = Said()
        log.addHandler(said)
        log.setLevel(logging.INFO)
        run(images, folder / "exact", *STAGES)
        log.removeHandler(said)
        with pytest.raises(UserError, match=r"has 8 images; add SOLVER\.BATCH_SIZE"):  # and replaces nothing
            run(images, folder / "exact", *STAGES, "SOLVER.BATCH_SIZE", 16, "SOLVER.MAX_STEPS", 0)
        with patch.context() as signalled:
            signalled.setattr(StageTrainer, "step", at_step(0, lambda: os.kill(os.getpid(), signal.SIGTERM)))
            with pytest.raises(UserError) as stopped:
                run(images, folder / "stopped", *STAGES)
        run(images, folder / "stopped", *STAGES, resume=True)
        streaming = (*STAGES, "SOLVER.SCHEDULE", "streaming")
        run(images, folder / "streaming", *streaming)
        run(images, folder / "cut", *streaming)
        if rank() == 0:
            (folder / "cut" / "checkpoint_00000006.pth").unlink()
        run(images, folder / "cut", *streaming, resume=True)
    return said.lines, str(stopped.value)


def dies(images: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_run, "measure_costs", measured_but_equal)
        patch.setattr(StageTrainer, "step", at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        run(images, folder / "dies", *STAGES)


def test_a_process_that_dies_ends_its_neighbour(noise: Path, tmp_path: Path) -> None:
    """The launcher then names it (test_launch)."""
    with pytest.raises(AssertionError, match=r"(?s)RuntimeError.*(by peer|Broken pipe)"):
        forked(2, dies, tmp_path / "job", noise, tmp_path)


def lines(folder: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_share")} for line in read]


def test_the_program_logs_saves_and_resumes_as_with_one_process(noise: Path, tmp_path: Path) -> None:
    (said, stopped), (_, also) = forked(2, programs, tmp_path / "job", noise, tmp_path)
    assert "process 0: stem..res2.1, res3.0..res3.1 (50% of the work)" in said
    assert [line[:18] for line in said if " MiB" in line] == ["process 0: at most", "process 1: at most"]
    assert stopped.startswith("stopped by a signal after step 4;")
    assert also.startswith("stopped by SIGTERM after step 4;")
    want = load_backbone(run(noise, tmp_path / "one"))[0]
    for name, tensor in load_backbone(tmp_path / "exact" / "backbone.safetensors")[0].items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)
    one: dict[int, dict] = {}
    many: dict[int, dict] = {}
    for found, folder in ((one, "one"), (many, "exact")):
        for line in lines(tmp_path / folder):
            found.setdefault(line["iteration"], {}).update(line)
    assert one.keys() == many.keys()
    for step in (0, 1, 3, 5):
        assert many[step] == pytest.approx(one[step], rel=2e-3, abs=1e-5)
    resumed = load_backbone(tmp_path / "stopped" / "backbone.safetensors")[0]
    for name, tensor in load_backbone(tmp_path / "exact" / "backbone.safetensors")[0].items():
        assert torch.equal(resumed[name], tensor)
    a, b = (torch.load(tmp_path / d / "checkpoint_00000006.pth", weights_only=True) for d in ("exact", "one"))
    assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    assert a["config_hash"] == b["config_hash"]
    # One process continues what two began.
    (tmp_path / "exact" / "checkpoint_00000006.pth").unlink()
    again = load_backbone(run(noise, tmp_path / "exact", resume=True))[0]
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)
    whole, cut = (load_backbone(tmp_path / d / "backbone.safetensors")[0] for d in ("streaming", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not all(torch.allclose(whole[name], want[name], rtol=1e-4) for name in want)
