"""Two gloo processes against one process that sees the whole batch."""

from __future__ import annotations

import json
import os
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.backbones.artifact import load_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.core.config import load_config
from loco_det.core.distributed import gather, rank, world_size
from loco_det.core.errors import UserError
from loco_det.core.launch import launch
from loco_det.images.folders import open_source
from pretrain import sync_batchnorm, train
from pretrain.accumulate import Accumulation
from pretrain.average import GradientAverage
from pretrain.defaults import get_cfg
from pretrain.loco import LocalTrainer, Unit, running_statistics_kept
from pretrain.loss import nt_xent
from pretrain.optim import build_optimizer
from pretrain.probe import KnnProbe
from pretrain.stepping import Stepping
from pretrain.sync_batchnorm import SyncBatchNorm, sync_anywhere
from pretrain.train import pretrain as pretrain_with_relu

UNITS = {"simclr": [Unit(0, 2)], "gim": [Unit(k, k) for k in range(3)], "loco": [Unit(0, 1), Unit(1, 2)]}
REAL = ["SOLVER.OPTIMIZER", "lars", "SOLVER.BASE_LR", "0.3", "SOLVER.MAX_STEPS", "1"]
LATE = ["SOLVER.MAX_STEPS", "5", "LOG_PERIOD", "10", "CHECKPOINT_PERIOD", "4"]
CASES = [(method, chunk, recompute) for method in UNITS for chunk, recompute in ((0, ()), (3, (0, 2)))]


def pretrain(cfg: CfgNode) -> Path:
    """The whole program with GELU for every ReLU.

    A ReLU's gradient jumps at zero: in float32 one of the three million inputs of a step here lies so near that another
    order of summation gives it the other sign, which moves single weight gradients by a fiftieth.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("relu", "relu_"):
            patch.setattr(F, name, lambda x, inplace=False: F.gelu(x))
        return pretrain_with_relu(cfg)


def step(method: str, chunk: int, recompute: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Loss, gradients and statistics of a small network, on this process's share of four images."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), SyncBatchNorm(4), nn.GELU()).double() for c in (3, 4, 4)]
    heads = [nn.Sequential(nn.Linear(4, 6), SyncBatchNorm(6), nn.Linear(6, 5)).double() for _ in UNITS[method]]
    views = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64) * 3 + 5
    x = views.chunk(world_size(), dim=1)[rank()].flatten(0, 1)
    losses = [lambda h, head=head: nt_xent(head(h.mean((2, 3))), 0.2, chunk) for head in heads]
    modules = nn.ModuleList([*stages, *heads])
    average = GradientAverage(modules.parameters())
    values = LocalTrainer(stages, UNITS[method], losses, lambda _: average.flush(), recompute).step(x)
    average.wait(list(modules.parameters()))
    gradients = {name: p.grad for name, p in modules.named_parameters()}
    return {"losses": torch.stack(values), **gradients, **dict(modules.named_buffers())}


def steps(method: str) -> list[torch.Tensor]:
    """Losses of five steps in float64 at LARS's full learning rate, and all tensors after them."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Conv2d(c, 6, 3, padding=1, bias=False), SyncBatchNorm(6), nn.GELU()).double()
        for c in (3, 6, 6)
    ]
    heads = [nn.Linear(6, 5).double() for _ in UNITS[method]]
    modules = nn.ModuleList([*stages, *heads])
    optimizer = build_optimizer(get_cfg(), modules)
    average = GradientAverage(modules.parameters())
    stepping = Stepping(optimizer, modules, average, torch.amp.GradScaler("cpu", enabled=False), early=True)
    stepping.lr = 0.3

    def loss(i: int, features: torch.Tensor) -> torch.Tensor:
        stepping.ready(heads[i])
        return nt_xent(heads[i](features.mean((2, 3))), 0.1)

    losses = [partial(loss, i) for i in range(len(heads))]
    final, ready = (lambda k, to=to: to(stages[k]) for to in (stepping.final, stepping.ready))
    trainer = LocalTrainer(stages, UNITS[method], losses, final, on_start=ready)
    values = []
    for _ in range(5):
        views = torch.randn(2, 8, 3, 6, 6, dtype=torch.float64)
        values += trainer.step(views.chunk(world_size(), dim=1)[rank()].flatten(0, 1))
        stepping.final(*heads)
    stepping.finish()
    return [torch.stack(values), *modules.state_dict().values()]


def accumulated(method: str) -> dict[str, torch.Tensor]:
    """As `step`, in two parts; a part is the same four views of each process, so BatchNorm sees the same images."""
    torch.manual_seed(0)
    stages = [nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), SyncBatchNorm(4), nn.GELU()).double() for c in (3, 4, 4)]
    heads = [nn.Sequential(nn.Linear(4, 6), SyncBatchNorm(6), nn.Linear(6, 5)).double() for _ in UNITS[method]]
    pooled = [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head) for head in heads]
    views = torch.randn(2, 8, 3, 6, 6, dtype=torch.float64) * 3 + 5
    parts = [part.chunk(world_size(), 1)[rank()].flatten(0, 1) for part in views.chunk(2, 1)]
    modules = nn.ModuleList([*stages, *heads])
    average = GradientAverage(modules.parameters())
    local = LocalTrainer(stages, UNITS[method], [], lambda _: average.flush())
    trainer = Accumulation(local, pooled, lambda _, z: nt_xent(z, 0.2), average)
    values = trainer.step([part.clone for part in parts])
    average.wait(list(modules.parameters()))
    gradients = {name: p.grad for name, p in modules.named_parameters()}
    return {"losses": torch.stack(values), **gradients, **dict(modules.named_buffers())}


def run_of_late_messages(cfg: CfgNode) -> None:
    """No gradient travels before it is asked for; the probe keeps what it is shown after the last step."""

    def probe(self, backbone: nn.Module) -> dict[str, float]:
        torch.save(backbone.state_dict(), Path(cfg.OUTPUT_DIR) / f"probed{rank()}.pt")
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.average.FULL", 2**60)
        patch.setattr("pretrain.stepping.WORTHWHILE", 2**60)
        patch.setattr(train.KnnProbe, "due", lambda self, done, *_: done == 5)
        patch.setattr(train.KnnProbe, "__call__", probe)
        pretrain(cfg)


def features(labelled: str, output: str) -> list[torch.Tensor]:
    """What the nearest-neighbour probe compares, and the labels."""
    settings = ["DATA.PATH", labelled, "DATA.IMAGE_SIZE", "16", "DATA.NUM_WORKERS", "0"]
    cfg = configuration(settings, output, "loco")
    probe = KnnProbe(cfg, open_source(labelled), torch.device("cpu"), torch.contiguous_format, nullcontext)
    torch.manual_seed(0)
    found, labels = probe._features(ResNet(18, stem="cifar").eval(), probe.train, probe.references)
    return [labels, found["res5"]]


def worker(settings: list[str], labelled: str, folder: str) -> None:
    """Everything that needs two processes, in one start of them."""
    torch.save(features(labelled, folder), Path(folder) / f"features{rank()}.pt")
    run_of_late_messages(configuration([*settings, *LATE], f"{folder}/late", "loco"))
    torch.save([step(*case) for case in CASES], Path(folder) / f"{rank()}.pt")
    torch.save([accumulated(method) for method in UNITS], Path(folder) / f"accumulated{rank()}.pt")
    torch.save(gather(torch.arange(3 * rank() * 2).view(-1, 2) + 10), Path(folder) / f"gathered{rank()}.pt")
    torch.save([steps(method) for method in UNITS], Path(folder) / f"steps{rank()}.pt")
    for method in UNITS:
        pretrain(configuration(settings, f"{folder}/{method}", method))
        pretrain(configuration([*settings, *REAL], f"{folder}/real_{method}", method))
    stopped = configuration([*settings, "SOLVER.MAX_STEPS", "5"], f"{folder}/stopped", "loco")
    (Path(folder) / f"stopped{rank()}").write_text(stopped_run(stopped))


def stopped_run(cfg: CfgNode) -> str:
    """What a run says in this process when only process 1 gets a signal, in its second step."""
    original = train.Monitor.__call__

    def interrupted(self, step, *args):
        if (rank(), step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Monitor, "__call__", interrupted)
        with pytest.raises(UserError) as error:
            pretrain(cfg)
    return str(error.value)


def configuration(settings: list[str], output: str, method: str):
    return load_config(get_cfg(), "", [*settings, "OUTPUT_DIR", output, "METHOD", method])[0]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (48, 40)))
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.NORM SyncBN DECODER.HIDDEN_DIM 16 DECODER.OUT_DIM 8
        DECODER.CONV_BLOCKS 1 DATA.PATH {folder} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 8
        SOLVER.MAX_STEPS 2 SOLVER.OPTIMIZER sgd SOLVER.BASE_LR 0.001 SOLVER.WARMUP_EPOCHS 0 LOSS.TEMPERATURE 1.0
        LOG_PERIOD 1 DEVICE cpu"""
    return text.split()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes; seven images of them are references."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for i in range(9):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        cv2.imwrite(str(folder / str(i % 2) / f"{i}.png"), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    return str(folder)


@pytest.fixture(scope="module")
def two(settings: list[str], labelled: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(worker, 2, settings, labelled, str(folder))
    return folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i][:2])))
def test_a_step_of_two_processes_equals_one(case: int, two: Path) -> None:
    first, second = (torch.load(two / f"{r}.pt", weights_only=True)[case] for r in (0, 1))
    whole = step(*CASES[case])
    mean = (first.pop("losses") + second.pop("losses")) / 2
    torch.testing.assert_close(mean, whole.pop("losses"), rtol=1e-12, atol=0)
    for name, want in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], want, rtol=1e-10, atol=1e-12)
        assert want.abs().max() > 0


@pytest.mark.parametrize("number", range(3), ids=list(UNITS))
def test_a_step_in_parts_of_two_processes_equals_one(number: int, two: Path) -> None:
    first, second = (torch.load(two / f"accumulated{r}.pt", weights_only=True)[number] for r in (0, 1))
    whole = accumulated(list(UNITS)[number])
    torch.testing.assert_close((first.pop("losses") + second.pop("losses")) / 2, whole.pop("losses"))
    for name, want in whole.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", UNITS)
def test_a_run_of_two_processes_equals_one(method: str, two: Path, settings: list[str], tmp_path: Path) -> None:
    path = pretrain(configuration(settings, str(tmp_path), method))
    lines = [
        [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        for folder in (tmp_path, two / method)
    ]
    assert len(lines[0]) == 2
    for one, other in zip(*lines):
        losses = {k: v for k, v in one.items() if k.startswith("loss/")}
        assert losses == pytest.approx({k: other[k] for k in losses}, rel=4e-6)
    together, _ = load_backbone(two / method / "backbone.safetensors")
    for name, tensor in load_backbone(path)[0].items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", UNITS)
def test_a_step_at_the_recipes_rate_equals_one(method: str, two: Path, settings: list[str], tmp_path: Path) -> None:
    path = pretrain(configuration([*settings, *REAL], str(tmp_path), method))
    other = two / f"real_{method}"
    one, both = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, other))
    for key in (k for k in one if k.startswith("loss/")):
        assert both[key] == pytest.approx(one[key], rel=1e-6)
    start = pretrain(configuration([*settings, *REAL, "SOLVER.BASE_LR", "0"], str(tmp_path / "start"), method))
    before, alone, together = (load_backbone(p)[0] for p in (start, path, other / "backbone.safetensors"))
    weights = [name for name in alone if not name.endswith("num_batches_tracked")]
    before, alone, together = (torch.cat([t[name].flatten() for name in weights]) for t in (before, alone, together))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    assert (together - alone).norm() <= 1e-6 * alone.norm()
    # A step so small that all are alike would pass too. Half the last bit of each weight is rounded away in storing it.
    assert (together - alone).norm() <= 1e-3 * (alone - before).norm() + 2**-24 * alone.norm()


@pytest.mark.parametrize("number", range(3), ids=list(UNITS))
def test_many_steps_at_a_high_rate_equal_one_in_double_precision(number: int, two: Path) -> None:
    first, second = (torch.load(two / f"steps{r}.pt", weights_only=True)[number] for r in (0, 1))
    alone = steps(list(UNITS)[number])
    first[0] = second[0] = (first[0] + second[0]) / 2
    for one, other, want in zip(first, second, alone):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-12)
    assert (alone[0][:1] - alone[0][-1:]).abs() > 1e-3


def test_weights_are_up_to_date_whenever_they_are_saved_or_probed(
    two: Path, settings: list[str], tmp_path: Path
) -> None:
    """Between two lines of metrics.json parts wait for their gradients into the next step."""
    run_of_late_messages(configuration([*settings, *LATE], str(tmp_path), "loco"))
    for done in (4, 5):
        alone, together = (
            torch.load(folder / f"checkpoint_{done:08d}.pth", weights_only=True) for folder in (tmp_path, two / "late")
        )
        for name, want in alone["learner"].items():
            torch.testing.assert_close(together["learner"][name], want, rtol=1e-5, atol=1e-5)
        # The weights hardly move at this rate; momenta show every step that is missing.
        one, both = (
            torch.cat([s["momentum_buffer"].flatten() for _, s in sorted(state["optimizer"]["state"].items())])
            for state in (alone, together)
        )
        assert (both - one).norm() <= 1e-4 * one.norm()
    for number in (0, 1):
        for name, seen in torch.load(two / "late" / f"probed{number}.pt", weights_only=True).items():
            assert torch.equal(seen, together["learner"][f"backbone.{name}"])


def test_processes_share_the_images_of_a_probe(two: Path, labelled: str, tmp_path: Path) -> None:
    labels, rows = features(labelled, str(tmp_path))
    order = [*range(0, 7, 2), *range(1, 7, 2)]
    for number in (0, 1):
        all_labels, all_rows = torch.load(two / f"features{number}.pt", weights_only=True)
        assert all_labels.tolist() == labels[order].tolist()
        torch.testing.assert_close(all_rows, rows[order], rtol=1e-5, atol=1e-6)


def test_rows_are_gathered_though_one_process_has_none(two: Path) -> None:
    for number in (0, 1):
        assert torch.load(two / f"gathered{number}.pt").tolist() == [[10, 11], [12, 13], [14, 15]]


def test_a_signal_to_one_process_stops_all_after_the_same_step(two: Path) -> None:
    """The one after that in which the signal came: by then the other process has heard of it."""
    assert (two / "stopped0").read_text().startswith("stopped by a signal after step 3;")
    assert (two / "stopped1").read_text().startswith("stopped by SIGTERM after step 3;")
    assert [path.name for path in (two / "stopped").glob("checkpoint_*")] == ["checkpoint_00000003.pth"]


def test_alone_it_is_torch_batchnorm_and_statistics_can_be_kept() -> None:
    x = torch.randn(4, 3, 5, 5)
    own, theirs = SyncBatchNorm(3), nn.BatchNorm2d(3)
    assert torch.equal(own(x), theirs(x))
    assert torch.equal(own.running_var, theirs.running_var)
    with running_statistics_kept(own):
        assert torch.equal(own(x), theirs(x))
    assert not torch.equal(own.running_var, theirs.running_var)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were another process, with the same images."""
    monkeypatch.setattr(sync_batchnorm, "replicas", lambda: 2)
    monkeypatch.setattr(sync_batchnorm.dist, "all_reduce", lambda sums, group: sums.mul_(2))


@pytest.mark.usefixtures("twin")
def test_statistics_may_be_a_mean_over_batches_and_evaluation_changes_none() -> None:
    own, theirs = SyncBatchNorm(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5) * 3 + 1
        torch.testing.assert_close(own(x), theirs(torch.cat([x, x]))[:4])
    for _ in range(2):
        for name, want in theirs.state_dict().items():
            torch.testing.assert_close(own.state_dict()[name], want)
        own.eval(), theirs.eval()
        torch.testing.assert_close(own(x), theirs(x))


@pytest.mark.usefixtures("twin")
def test_half_precision_is_summed_in_float32() -> None:
    """Far from zero, where the variance of bfloat16 numbers in bfloat16 is noise."""
    g = torch.Generator().manual_seed(0)
    half = (torch.randn(8, 3, 5, 5, generator=g) + 20).bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    gradient = torch.randn(8, 3, 5, 5, generator=g).bfloat16()
    own, theirs = SyncBatchNorm(3), nn.BatchNorm2d(3)
    got, want = own(half), theirs(torch.cat([full, full]))[:8]
    got.backward(gradient)
    theirs(torch.cat([full, full])).backward(torch.cat([gradient, gradient]).float())
    assert got.dtype == half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.01, atol=0.01)
    torch.testing.assert_close(half.grad.float(), full.grad / 2, rtol=0.01, atol=0.01)
    torch.testing.assert_close(own.weight.grad, theirs.weight.grad / 2, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(own.bias.grad, theirs.bias.grad / 2, rtol=1e-4, atol=1e-3)


def test_a_norm_that_is_replaced_keeps_its_tensors_and_settings() -> None:
    old = nn.SyncBatchNorm(3, eps=0.1, momentum=0.2)
    for tensor in (*old.parameters(), old.running_mean, old.running_var):
        nn.init.uniform_(tensor, 1, 2)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(old))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sync_anywhere(model)
    assert type(model[1][0]) is SyncBatchNorm
    assert (model[1][0].eps, model[1][0].momentum) == (0.1, 0.2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)
