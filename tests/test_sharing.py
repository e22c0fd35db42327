"""The paper's weaker forms of sharing against each unit differentiated alone, and against separate networks."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loco_cases import UNIT_LISTS, build, gradients, obvious_step
from torch import Tensor, nn

from loco_det.backbones.artifact import load_backbone
from loco_det.backbones.names import to_detectron2
from loco_det.backbones.resnet import ResNet
from loco_det.core.config import load_config
from loco_det.core.distributed import rank, world_size
from loco_det.core.errors import UserError
from loco_det.core.launch import launch
from pretrain import train
from pretrain.average import GradientAverage
from pretrain.checkpoint import latest_checkpoint
from pretrain.compiling import stage_compiler
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer, Unit
from pretrain.loss import nt_xent
from pretrain.memory import SavedBytes
from pretrain.sharing import SoftTrainer, UpperTrainer, private_copies
from pretrain.stepping import Stepping
from pretrain.train import Learner, local_trainer, pretrain

STAGES = 5
SPANS = {
    "simclr": [(0, 4)],
    "gim": [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)],
    "loco": [(0, 1), (1, 2), (2, 3), (3, 4)],
    "nested": [(0, 4), (1, 2)],
    "nested twice": [(2, 2), (0, 4), (1, 3)],
    "nested, listed upside down": [(1, 3), (0, 4), (1, 2)],
    "wide overlaps": [(0, 3), (1, 4), (2, 4)],
    "same start": [(0, 1), (0, 4), (1, 4)],
    "twice the same unit": [(0, 4), (0, 4)],
}


@st.composite
def spans_over_all_stages(draw: st.DrawFn) -> list[tuple[int, int]]:
    stage = st.integers(0, STAGES - 1)
    spans = draw(st.lists(st.tuples(stage, stage).map(sorted).map(tuple), max_size=5))
    spans += [(k, k) for k in range(STAGES) if not any(first <= k <= last for first, last in spans)]
    return draw(st.permutations(spans))


class Net:
    """Five small stages with BatchNorm in training mode, in float64, and a head for each unit."""

    def __init__(self, spans: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        widths = (3, 6, 5, 6, 7, 5)
        self.spans, self.units = spans, [Unit(*span) for span in spans]
        self.stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.GELU()).to(dtype)
            for a, b in pairwise(widths)
        ]
        self.heads = [nn.Linear(widths[last + 1], 4).to(dtype) for _, last in spans]
        self.losses = [lambda h, head=head: nt_xent(head(h.mean((2, 3))), 0.2) for head in self.heads]
        self.x = torch.randn(6, 3, 7, 7, dtype=dtype)


def uppermost(spans: list[tuple[int, int]], k: int) -> int:
    """Of the units that cover stage k one with the highest first stage, the earliest listed."""
    found = -1
    for i, (first, last) in enumerate(spans):
        if first <= k <= last and (found < 0 or first > spans[found][0]):
            found = i
    return found


# --- upper ------------------------------------------------------------------------------------------------------


def upper_alone(stages: list, spans: list, heads: list, losses: list, x: Tensor) -> list[Tensor]:
    """Gradients of all stages and heads: every unit differentiated alone, and then some gradients thrown away."""
    parameters = [p for module in [*stages, *heads] for p in module.parameters()]
    stage_of = {p: k for k, stage in enumerate(stages) for p in stage.parameters()}
    total = {p: torch.zeros_like(p) for p in parameters}
    for (first, last), loss in zip(spans, losses):
        h = x
        for stage in stages[:first]:
            h = stage(h)
        h = h.detach()
        for stage in stages[first : last + 1]:
            h = stage(h)
        for p, gradient in zip(parameters, torch.autograd.grad(loss(h), parameters, allow_unused=True)):
            k = stage_of.get(p)
            if gradient is not None and (k is None or first == spans[uppermost(spans, k)][0]):
                total[p] += gradient
    return list(total.values())


def same(got: list[Tensor], want: list[Tensor], rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("recompute", ["none", "all", ["res3", "res4.1"]], ids=str)
@pytest.mark.parametrize("name", UNIT_LISTS)
def test_upper_equals_units_differentiated_alone(name: str, recompute: str | list[str]) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    _, stages, units, decoders, losses = build(UNIT_LISTS[name], recompute)
    modules = [stage.module for stage in stages]
    kept = [k for k, stage in enumerate(stages) if stage.recompute]
    UpperTrainer(modules, units, losses, recompute=kept).step(x)
    got = gradients(*modules, *decoders)
    _, stages, units, decoders, losses = build(UNIT_LISTS[name], recompute)
    modules, spans = [stage.module for stage in stages], [(unit.first, unit.last) for unit in units]
    same(got, upper_alone(modules, spans, list(decoders), losses, x))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(spans_over_all_stages(), st.sets(st.integers(0, STAGES - 1), max_size=2))
def test_upper_is_right_for_any_units(spans: list[tuple[int, int]], recompute: set[int]) -> None:
    net, other = Net(spans), Net(spans)
    saved = SavedBytes()
    with saved:
        UpperTrainer(net.stages, net.units, net.losses, recompute=recompute).step(net.x)
    assert saved.now == 0
    same(gradients(*net.stages, *net.heads), upper_alone(other.stages, spans, other.heads, other.losses, other.x))
    assert {int(m.num_batches_tracked) for stage in net.stages for m in stage if hasattr(m, "running_mean")} == {1}


@pytest.mark.parametrize("name", ["loco", "wide overlaps", "nested twice"])
def test_a_lower_unit_reaches_those_below_through_a_stage_that_does_not_learn_from_it(name: str) -> None:
    """In LoCo only the shared stages differ from hard; above, every other weight's gradient is the same."""
    results = []
    for trainer in (LocalTrainer, UpperTrainer):
        net = Net(SPANS[name])
        trainer(net.stages, net.units, net.losses).step(net.x)
        results.append([*(gradients(stage) for stage in net.stages), gradients(*net.heads)])
    starts = [{first for first, last in SPANS[name] if first <= k <= last} for k in range(STAGES)]
    for k, (hard, upper) in enumerate(zip(*results)):
        if k == STAGES or len(starts[k]) == 1:
            same(upper, hard)
        else:
            assert any((a - b).abs().max() > 1e-6 for a, b in zip(hard, upper))


@pytest.mark.parametrize("name", ["simclr", "gim"])
def test_upper_is_hard_where_no_stage_is_shared(name: str) -> None:
    results = []
    for trainer in (LocalTrainer, UpperTrainer):
        net = Net(SPANS[name])
        results.append([*trainer(net.stages, net.units, net.losses).step(net.x), *gradients(*net.stages, *net.heads)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", SPANS)
def test_upper_says_once_that_a_stage_is_final_and_then_it_is(name: str) -> None:
    net = Net(SPANS[name])
    seen: dict[int, list[Tensor]] = {}

    def final(k: int) -> None:
        assert k not in seen
        seen[k] = gradients(net.stages[k])

    UpperTrainer(net.stages, net.units, net.losses, on_final=final).step(net.x)
    assert sorted(seen) == list(range(STAGES))
    assert all(torch.equal(a, b) for k, early in seen.items() for a, b in zip(early, gradients(net.stages[k])))


def test_upper_costs_what_hard_costs_in_loco() -> None:
    plans = [
        trainer([nn.Identity() for _ in range(STAGES)], Net(SPANS["loco"]).units, []).plan
        for trainer in (LocalTrainer, UpperTrainer)
    ]
    hard, upper = ([[(p.when, p.weights, p.input) for p in passes] for passes in plan] for plan in plans)
    assert upper == hard


# --- soft -------------------------------------------------------------------------------------------------------


def private(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(unit, stage) of every copy that is not the backbone's, by stage and then by unit."""
    return [
        (i, k)
        for k in range(STAGES)
        for i, (first, last) in enumerate(spans)
        if first <= k <= last and i != uppermost(spans, k)
    ]


def soft(net: Net, apart: float = 0.0) -> list[nn.Module]:
    """Private copies, each some way off the backbone's stage."""
    torch.manual_seed(1)
    copies = private_copies(net.stages, net.units)
    with torch.no_grad():
        for p in [p for module in copies for p in module.parameters()]:
            p += apart * torch.randn_like(p)
    return copies


class Separate:
    """A whole network for every unit, of which it uses its stages; and one loss, of which autograd does the rest."""

    def __init__(self, spans: list[tuple[int, int]], apart: float, dtype: torch.dtype = torch.float64) -> None:
        self.net = net = Net(spans, dtype)
        copies = soft(net, apart)
        self.networks = [copy.deepcopy(net.stages) for _ in spans]
        for (i, k), module in zip(private(spans), copies):
            self.networks[i][k].load_state_dict(module.state_dict())

    def readout(self, k: int) -> nn.Module:
        return self.networks[uppermost(self.net.spans, k)][k]

    def step(
        self, penalty: float, autocast: Callable = nullcontext, scale: Callable = lambda loss: loss
    ) -> tuple[list[float], list[Tensor], list[Tensor]]:
        """Losses; gradients of the readout's stages, the private copies and the heads; these modules' buffers."""
        net = self.net
        watched = [copy.deepcopy(self.readout(k)) for k in range(STAGES)]  # for the readout's own statistics
        with autocast(), torch.no_grad():
            outputs = [net.x]
            for stage in watched:
                outputs.append(stage(outputs[-1]))
        with autocast():
            values = []
            for i, (first, last) in enumerate(net.spans):
                h = outputs[first]
                for k in range(first, last + 1):
                    h = self.networks[i][k](h)
                values.append(net.losses[i](h))
        pairs = [(self.networks[i][k], self.readout(k)) for i, k in private(net.spans)]
        distance = sum(((a - b) ** 2).sum() for one, two in pairs for a, b in zip(one.parameters(), two.parameters()))
        scale(sum(values) + penalty * distance).backward()
        copies = [one for one, _ in pairs]
        modules = [*(self.readout(k) for k in range(STAGES)), *copies, *net.heads]
        return (
            [value.item() for value in values],
            gradients(*modules),
            [buffer for module in [*watched, *copies] for buffer in module.buffers()],
        )


def soft_step(spans: list, penalty: float, apart: float, dtype: torch.dtype = torch.float64, **options: Callable):
    """As `Separate.step`, by the trainer."""
    net = Net(spans, dtype)
    copies = soft(net, apart)
    losses = SoftTrainer(net.stages, copies, net.units, net.losses, penalty).step(net.x, **options)
    buffers = [buffer for module in [*net.stages, *copies] for buffer in module.buffers()]
    assert not any(loss.requires_grad for loss in losses)
    return [loss.item() for loss in losses], gradients(*net.stages, *copies, *net.heads), buffers


@pytest.mark.parametrize("name", SPANS)
def test_soft_equals_separate_networks_under_one_loss(name: str) -> None:
    spans = SPANS[name]
    for got, want in zip(soft_step(spans, 0.3, 0.1), Separate(spans, 0.1).step(0.3)):
        same([torch.as_tensor(v) for v in got], [torch.as_tensor(v) for v in want])


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(spans_over_all_stages(), st.sampled_from([0.0, 0.5]))
def test_soft_is_right_for_any_units(spans: list[tuple[int, int]], penalty: float) -> None:
    for got, want in zip(soft_step(spans, penalty, 0.1), Separate(spans, 0.1).step(penalty)):
        same([torch.as_tensor(v) for v in got], [torch.as_tensor(v) for v in want])


def test_copies_are_equal_at_the_start_and_share_nothing() -> None:
    net = Net(SPANS["wide overlaps"])
    copies = private_copies(net.stages, net.units)
    assert len(copies) == len(private(net.spans)) == 6
    for (_, k), module in zip(private(net.spans), copies):
        for (name, own), theirs in zip(module.state_dict().items(), net.stages[k].state_dict().values()):
            assert torch.equal(own, theirs), name
            assert own.data_ptr() != theirs.data_ptr()


def test_soft_without_overlap_is_gim() -> None:
    losses, got, buffers = soft_step(SPANS["gim"], 0.0, 0.0)
    net = Net(SPANS["gim"])
    values = LocalTrainer(net.stages, net.units, net.losses).step(net.x)
    assert losses == pytest.approx([value.item() for value in values], abs=1e-12)
    same(got, gradients(*net.stages, *net.heads))
    same(buffers, [buffer for stage in net.stages for buffer in stage.buffers()])


@pytest.mark.parametrize("name", SPANS)
def test_gradients_of_equal_copies_add_up_to_hard_sharing(name: str) -> None:
    """Whatever the penalty, which is at its minimum there."""
    net, other = Net(SPANS[name]), Net(SPANS[name])
    copies = soft(net)
    SoftTrainer(net.stages, copies, net.units, net.losses, 10.0).step(net.x)
    LocalTrainer(other.stages, other.units, other.losses).step(other.x)
    for (_, k), module in zip(private(net.spans), copies):
        for p, own in zip(net.stages[k].parameters(), module.parameters()):
            p.grad += own.grad
    same(gradients(*net.stages, *net.heads), gradients(*other.stages, *other.heads))


def test_the_penalty_moves_no_mean_of_the_copies() -> None:
    """It pulls both sides by the same force, so it drops out of the sum over a stage and its copies."""
    sums = []
    for penalty in (0.0, 2.0):
        net = Net(SPANS["wide overlaps"])
        copies = soft(net, apart=0.3)
        SoftTrainer(net.stages, copies, net.units, net.losses, penalty).step(net.x)
        totals = [gradients(stage) for stage in net.stages]
        for (_, k), module in zip(private(net.spans), copies):
            totals[k] = [a + b for a, b in zip(totals[k], gradients(module))]
        sums.append([total for stage in totals for total in stage])
    same(*sums)


@pytest.mark.parametrize("name", SPANS)
def test_soft_asks_for_weights_before_it_reads_them_and_says_once_when_they_are_final(name: str) -> None:
    net = Net(SPANS[name])
    modules = [*net.stages, *soft(net, 0.1)]
    started: set[int] = set()
    seen: dict[int, list[Tensor]] = {}

    def begin(part: int) -> None:
        assert part not in started
        assert all(p.grad is None for p in modules[part].parameters())  # nothing was computed with its old weights
        started.add(part)

    def forward(part: int, *_: object) -> None:
        assert part in started

    def final(part: int) -> None:
        assert part not in seen
        seen[part] = gradients(modules[part])

    for part, module in enumerate(modules):
        module.register_forward_pre_hook(partial(forward, part))
    SoftTrainer(net.stages, modules[STAGES:], net.units, net.losses, 0.5, final, begin).step(net.x)
    assert sorted(seen) == list(range(len(modules)))
    assert all(torch.equal(a, b) for part, early in seen.items() for a, b in zip(early, gradients(modules[part])))


def test_soft_adds_to_the_gradients_that_are_there() -> None:
    net = Net(SPANS["loco"])
    copies = soft(net, 0.1)
    trainer = SoftTrainer(net.stages, copies, net.units, net.losses, 0.5)
    trainer.step(net.x)
    once = gradients(*net.stages, *copies, *net.heads)
    trainer.step(net.x)
    same(gradients(*net.stages, *copies, *net.heads), [2 * gradient for gradient in once])


def test_soft_lets_go_of_a_unit_once_it_has_learnt() -> None:
    net = Net(SPANS["loco"])
    copies = soft(net)
    kept = []
    saved = SavedBytes(ignore=[p for module in [*net.stages, *copies, *net.heads] for p in module.parameters()])
    losses = [lambda h, loss=loss: kept.append(saved.now) or loss(h) for loss in net.losses]
    with saved:
        SoftTrainer(net.stages, copies, net.units, losses, 0.5).step(net.x)
    assert saved.now == 0
    assert max(kept) < sum(kept) / 2  # by far not all units at a time


# --- precision, compiling, scaling ------------------------------------------------------------------------------


def trainers(net: Net, apart: float, made: Callable = lambda module: module) -> dict[str, tuple]:
    """Each mode's trainer and its modules."""
    copies = soft(net, apart)
    stages = [made(stage) for stage in net.stages]
    return {
        "upper": (UpperTrainer(stages, net.units, net.losses), [*net.stages, *net.heads]),
        "soft": (
            SoftTrainer(stages, [made(module) for module in copies], net.units, net.losses, 0.5),
            [*net.stages, *copies, *net.heads],
        ),
    }


@pytest.mark.parametrize("mode", ["upper", "soft"])
def test_scale_multiplies_every_gradient(mode: str) -> None:
    results = []
    for scale in (None, lambda loss: loss * 8):
        net = Net(SPANS["loco"])
        trainer, modules = trainers(net, 0.1)[mode]
        losses = trainer.step(net.x, scale=scale)
        results.append((losses, gradients(*modules)))
    (losses, one), (same_losses, eight) = results
    assert all(torch.equal(a, b) for a, b in zip(losses, same_losses))
    same(eight, [8 * gradient for gradient in one], rtol=1e-12, atol=1e-15)


def test_soft_in_half_precision_equals_separate_networks_in_it() -> None:
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    options = {"autocast": autocast, "scale": lambda loss: loss * 1024}
    spans = SPANS["nested twice"]
    losses, got, _ = soft_step(spans, 0.5, 0.1, torch.float32, **options)
    expected, want, _ = Separate(spans, 0.1, torch.float32).step(0.5, **options)
    assert losses == expected
    assert losses != soft_step(spans, 0.5, 0.1, torch.float32)[0]
    for one, other in zip(got, want):
        assert (one - other).norm() <= 2 * torch.finfo(torch.bfloat16).eps * other.norm()


@pytest.mark.parametrize(("mode", "name"), [("upper", "loco"), ("soft", "nested twice")])
def test_compiled_stages_equal_eager_ones(mode: str, name: str) -> None:
    results = []
    for made in (lambda module: module, stage_compiler(torch.device("cpu"), "aot_eager")):
        torch.compiler.reset()
        net = Net(SPANS[name])
        trainer, modules = trainers(net, 0.1, made)[mode]
        for _ in range(2):
            losses = trainer.step(net.x)
        results.append([*losses, *gradients(*modules), *(buffer for module in modules for buffer in module.buffers())])
    same(*results)


# --- parts of a stage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "last"), [(1, "0"), (2, "1")])
def test_the_first_blocks_of_the_next_stage_are_shared_by_a_list_of_units(blocks: int, last: str) -> None:
    units = [["res2", f"res3.{last}"], ["res3", f"res4.{last}"], ["res4", f"res5.{last}"], ["res5", "res5"]]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    backbone, stages, spans, decoders, losses = build(units, depth=34, res2_out_channels=8, stem_channels=8)
    covered = {p: sum(span.covers(k) for span in spans) for k, s in enumerate(stages) for p in s.module.parameters()}
    for name in ("stem", "res2", "res3", "res4", "res5"):
        each = list(getattr(backbone, name)) if name != "stem" else [backbone.stem]
        times = [{covered[p] for p in block.parameters()} for block in each]
        shared = blocks if name > "res2" and name != "stem" else 0
        assert times == [{2}] * shared + [{1}] * (len(each) - shared)
    LocalTrainer([s.module for s in stages], spans, losses).step(x)
    got = gradients(backbone, decoders)
    backbone, stages, spans, decoders, losses = build(units, depth=34, res2_out_channels=8, stem_channels=8)
    obvious_step(stages, spans, losses, x)
    same(got, gradients(backbone, decoders))


# --- the program ------------------------------------------------------------------------------------------------

MODES = {"hard": [], "upper": ["SHARING.MODE", "upper"], "soft": ["SHARING.MODE", "soft", "SHARING.PENALTY", "0.01"]}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (48, 40)))
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 16 DECODER.HIDDEN_DIM 16 DECODER.OUT_DIM 8
        DATA.PATH {folder} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 4 SOLVER.MAX_STEPS 3
        SOLVER.OPTIMIZER lars SOLVER.BASE_LR 3.0 SOLVER.WARMUP_EPOCHS 0 LOG_PERIOD 1 DEVICE cpu"""
    return text.split()


def configuration(options: list[str], output: Path, *more: object):
    return load_config(get_cfg(), "", [*options, "OUTPUT_DIR", str(output), *map(str, more)])[0]


def trace(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_share")} for line in lines]


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_stopped_ends_in_the_same_bits_and_writes_the_backbone_alone(
    mode: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain(configuration(options, tmp_path / "whole", *MODES[mode]))
    original = train.Monitor.__call__

    def interrupted(self, step, *values):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *values)

    with monkeypatch.context() as patch:
        patch.setattr(train.Monitor, "__call__", interrupted)
        with pytest.raises(UserError, match="after step 1; --resume"):
            pretrain(configuration(options, tmp_path / "cut", *MODES[mode]))
    cut = pretrain(configuration(options, tmp_path / "cut", *MODES[mode]), resume=True)
    assert trace(tmp_path / "whole") == trace(tmp_path / "cut")
    states = [latest_checkpoint(tmp_path / name)[1] for name in ("whole", "cut")]
    for name, tensor in states[0]["learner"].items():
        assert torch.equal(tensor, states[1]["learner"][name]), name
    tensors, manifest = load_backbone(cut)
    assert load_backbone(whole)[1].tensors_sha256 == manifest.tensors_sha256
    assert manifest.config["SHARING"]["MODE"] == mode
    backbone = ResNet(18, stem="cifar", res2_out_channels=16, stem_channels=16)
    missing, unexpected = backbone.load_state_dict({to_detectron2(k): v for k, v in tensors.items()}, strict=False)
    assert not missing
    assert not unexpected
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, states[0]["learner"][f"backbone.{name}"]), name


def test_modes_share_their_first_step_and_part_in_the_next(options: list[str], tmp_path: Path) -> None:
    for mode, keys in MODES.items():
        pretrain(configuration(options, tmp_path / mode, *keys))
    first, *rest = zip(*(trace(tmp_path / mode) for mode in MODES))
    losses = [{key: value for key, value in line.items() if key.startswith("loss/")} for line in first]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert len({line["loss/res4-res5"] for line in rest[-1]}) == 3


def test_copies_learn_and_the_penalty_holds_them(options: list[str], tmp_path: Path) -> None:
    apart = []
    for penalty in (0, 1):
        keys = ["SHARING.MODE", "soft", "SHARING.PENALTY", penalty, "SOLVER.OPTIMIZER", "sgd", "SOLVER.BASE_LR", 10]
        pretrain(configuration(options, tmp_path / str(penalty), *keys))
        state = latest_checkpoint(tmp_path / str(penalty))[1]["learner"]
        copies = {name: tensor for name, tensor in state.items() if name.startswith("copies.0.")}  # unit 0's of res3
        own = {f"copies.0.{i}.{name}": tensor for i in (0, 1) for name, tensor in part(state, f"backbone.res3.{i}.")}
        assert copies.keys() == own.keys()
        apart.append(sum((copies[name] - own[name]).norm() for name in copies if name.endswith("weight")))
    assert apart[0] > 1.2 * apart[1] > 0


def part(state: dict[str, Tensor], prefix: str) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix)]


@pytest.mark.parametrize("mode", ["upper", "soft"])
def test_stepping_late_or_with_scaled_losses_is_the_same(
    mode: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nested units. fp16 in float32, for half precision takes minutes on a CPU; scales are powers of two."""
    monkeypatch.setattr(train, "autocast", lambda *_: nullcontext)
    units = ["UNITS", "[['res2','res5'],['res3','res4'],['res3','res5']]"]
    shas = set()
    for number, keys in enumerate(([], ["SOLVER.STEP_EARLY", "False"], ["SOLVER.AMP", "fp16"])):
        path = pretrain(configuration(options, tmp_path / str(number), *MODES[mode], *units, *keys))
        shas.add(load_backbone(path)[1].tensors_sha256)
    assert len(shas) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["SHARING.MODE", "weak"], "SHARING.MODE is 'weak'; use one of hard, upper, soft"),
        (["SHARING.MODE", "soft", "SHARING.PENALTY", "-0.1"], "SHARING.PENALTY is -0.1; use 0 or more"),
        (["SHARING.MODE", "soft", "SHARING.PENALTY", "1e999"], "SHARING.PENALTY is inf; use .* or less"),
        (["SHARING.PENALTY", "0.1"], "SHARING.PENALTY is 0.1 .* SHARING.MODE hard .*; set SHARING.MODE soft or"),
        (["SHARING.MODE", "upper", "SHARING.PENALTY", "1"], "SHARING.PENALTY is 1.0 .* SHARING.MODE upper"),
        (["SHARING.MODE", "soft", "SOLVER.RECOMPUTE", "first"], "SHARING.MODE soft .*; set SOLVER.RECOMPUTE none"),
        (["METHOD", "random", "SHARING.MODE", "weak"], "SHARING.MODE is 'weak'; use one of hard, upper, soft"),
        (["METHOD", "random", "SHARING.PENALTY", "0.1"], "SHARING.PENALTY is 0.1 .* SHARING.MODE hard"),
    ],
)
def test_bad_values_are_named(keys: list[str], message: str, options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(configuration(options, tmp_path, *keys))
    assert not list(tmp_path.glob("*.safetensors"))


# --- several processes ------------------------------------------------------------------------------------------


def three_steps(cfg) -> dict[str, Tensor]:
    """All tensors after three steps in float64 on this process's share of eight images, and the last losses."""
    torch.manual_seed(0)
    learner = Learner(cfg).double()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.0, momentum=0.9)
    average = GradientAverage(learner.parameters())
    stepping = Stepping(optimizer, learner.parts(), average, torch.amp.GradScaler("cpu", enabled=False), early=True)
    trainer = local_trainer(learner, stepping)
    for lr in (0.3, 0.2, 0.1):
        stepping.lr = lr
        views = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
        losses = trainer.step(views.chunk(world_size(), dim=1)[rank()].flatten(0, 1))
    stepping.finish()
    return {"losses": torch.stack(losses), **learner.state_dict()}


def worker(options: list[str], folder: str) -> None:
    found = {mode: three_steps(configuration(options, Path(folder), *MODES[mode])) for mode in ("upper", "soft")}
    torch.save(found, Path(folder) / f"{rank()}.pt")


def test_two_processes_equal_one(options: list[str], tmp_path: Path) -> None:
    options = [*options, "BACKBONE.NORM", "SyncBN", "LOSS.TEMPERATURE", "1.0"]
    launch(worker, 2, options, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    for mode in ("upper", "soft"):
        alone = three_steps(configuration(options, tmp_path, *MODES[mode]))
        assert any(name.startswith("copies.") for name in alone) == (mode == "soft")
        first[mode]["losses"] = second[mode]["losses"] = (first[mode]["losses"] + second[mode]["losses"]) / 2
        for name, want in alone.items():
            assert torch.equal(first[mode][name], second[mode][name])
            torch.testing.assert_close(first[mode][name], want, rtol=1e-8, atol=1e-11)
