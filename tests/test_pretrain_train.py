"""Pretraining from files to artifact: every method, resume after a kill, stops, bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from loco_det.backbones.names import to_detectron2
from loco_det.backbones.resnet import ResNet
from loco_det.commands.pretrain import pretrain_file
from loco_det.convert import read_backbone
from loco_det.core.config import load_config
from loco_det.core.device import has_bf16_units
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.images.folders import open_source
from loco_det.images.indexed import DatasetSource
from loco_det.images.two_views import build_two_view_loader
from pretrain import train
from pretrain.checkpoint import latest_checkpoint
from pretrain.decoders import Decoder
from pretrain.defaults import get_cfg
from pretrain.loss import nt_xent
from pretrain.monitor import stage_norms
from pretrain.train import Learner, local_trainer, pretrain

SMALL = {
    "BACKBONE.NAME": "resnet18",
    "BACKBONE.STEM": "cifar",
    "BACKBONE.WIDTH": "8",
    "DECODER.HIDDEN_DIM": "16",
    "DECODER.OUT_DIM": "8",
    "DATA.IMAGE_SIZE": "32",
    "DATA.NUM_WORKERS": "0",
    "SOLVER.BATCH_SIZE": "4",
    "SOLVER.MAX_STEPS": "3",
    "SOLVER.OPTIMIZER": "adamw",
    "SOLVER.BASE_LR": "0.001",
    "SOLVER.WARMUP_EPOCHS": "0",
    "LOG_PERIOD": "1",
    "DEVICE": "cpu",
}
WHOLE = {"BACKBONE__STEM": "imagenet", "BACKBONE__WIDTH": 64}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.png"), cv2.resize(coarse, (48, 40)))
    return folder


def overrides(images: Path, output: Path, **extra: object) -> list[str]:
    settings = {**SMALL, "DATA.PATH": images, "OUTPUT_DIR": output}
    settings.update({key.replace("__", "."): value for key, value in extra.items()})
    return [str(part) for pair in settings.items() for part in pair]


def config(images: Path, output: Path, **extra: object):
    return load_config(get_cfg(), "", overrides(images, output, **extra))[0]


def trace(output: Path) -> list[dict]:
    """The lines of metrics.json without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    clock = ("images_per_second", "data_wait_share")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


@pytest.mark.parametrize(("method", "units"), [("simclr", 1), ("gim", 4), ("loco", 3)])
def test_every_method_writes_a_backbone_that_says_what_it_is(
    method: str, units: int, images: Path, tmp_path: Path
) -> None:
    path = pretrain(config(images, tmp_path, METHOD=method, **WHOLE))
    tensors, manifest = load_backbone(path)
    ResNet(18).load_state_dict({to_detectron2(k): v for k, v in tensors.items()}, strict=False)
    assert (manifest.method, len(manifest.units), manifest.step, manifest.images) == (method, units, 3, 12)
    assert manifest.architecture == "resnet18"
    assert manifest.config["SOLVER"]["MAX_STEPS"] == 3
    lines = trace(tmp_path)
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert sum(key.startswith("loss/") for key in lines[0]) == units
    assert all(lines[0][f"grad_norm/{stage}"] > 0 for stage in ("stem", "res2", "res3", "res4", "res5"))
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_units_of_ones_own_train_and_are_told_of(images: Path, tmp_path: Path) -> None:
    units = [["res2", "res3.0"], ["res3.1", "res5"], ["res3.0", "res4"]]
    _, manifest = load_backbone(pretrain(config(images, tmp_path, UNITS=units, SOLVER__MAX_STEPS=1)))
    assert (manifest.method, [list(unit) for unit in manifest.units]) == ("custom", units)
    losses = {key for key in trace(tmp_path)[0] if key.startswith("loss/")}
    assert losses == {"loss/res2-res3.0", "loss/res3.1-res5", "loss/res3.0-res4"}


def test_gradient_norms_are_those_of_all_gradients_of_a_stage() -> None:
    torch.manual_seed(0)
    backbone = ResNet(18)
    backbone(torch.randn(2, 3, 32, 32))["res5"].sum().backward()
    norms = stage_norms(backbone, {p: p.grad.norm() for p in backbone.parameters()})
    assert list(norms) == [f"grad_norm/{name}" for name in ("stem", "res2", "res3", "res4", "res5")]
    flat = torch.cat([p.grad.flatten() for p in backbone.res3.parameters()])
    torch.testing.assert_close(norms["grad_norm/res3"], flat.norm(), rtol=1e-5, atol=0)


def test_every_stage_and_decoder_learns(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "a", SOLVER__BASE_LR=0.0, DECODER__CONV_BLOCKS=1))
    pretrain(config(images, tmp_path / "b", DECODER__CONV_BLOCKS=1))
    start, end = (latest_checkpoint(tmp_path / name)[1]["learner"] for name in "ab")
    assert any(name.startswith("decoders.2.blocks.0.") for name in start)
    for name, tensor in start.items():
        if name.endswith("weight"):
            assert not torch.equal(tensor, end[name]), name


def test_each_step_has_its_rate_and_a_run_its_epochs(images: Path, tmp_path: Path) -> None:
    """Three steps an epoch; a warm-up of one of two epochs, then half a cosine."""
    path = pretrain(config(images, tmp_path, SOLVER__MAX_STEPS=0, SOLVER__EPOCHS=2, SOLVER__WARMUP_EPOCHS=1))
    assert load_backbone(path)[1].step == 6
    assert [line["lr"] for line in trace(tmp_path)] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3, 0.75e-3, 0.25e-3])


def test_images_are_normalised_first_views_first_and_channels_last(images: Path, tmp_path: Path) -> None:
    views = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    x = train._input(views)
    assert x.is_contiguous(memory_format=torch.channels_last)
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    np.testing.assert_allclose(x.numpy(), (views.flatten(0, 1).numpy() - mean) / std, rtol=1e-5, atol=1e-5)
    learner = Learner(config(images, tmp_path))
    assert learner.backbone.res3[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_keys_of_the_loss_and_of_recomputing_reach_the_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(train, "nt_xent", lambda z, *options: seen.append(options) or z.sum())
    extra = {"LOSS__TEMPERATURE": 0.3, "LOSS__CHUNK": 2, "SOLVER__RECOMPUTE": "res3"}
    learner = Learner(config(images, tmp_path, **extra))
    trainer = local_trainer(learner)
    trainer.step(torch.randn(4, 3, 32, 32))
    assert seen == [(0.3, 2)] * 3
    assert [learner.stages[k].name for k in sorted(trainer.recompute)] == ["res3.0", "res3.1"]


def test_compile_compiles_every_stage(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether compiled stages are exact is asked elsewhere."""
    ran = []

    def compiled(stage: nn.Module) -> nn.Module:
        stage.register_forward_hook(lambda *_: ran.append(stage))
        return stage

    monkeypatch.setattr(train, "stage_compiler", lambda device: compiled)
    pretrain(config(images, tmp_path, SOLVER__COMPILE=True))
    assert len(ran) == 3 * 4
    assert len(set(ran)) == 4


def test_the_loss_falls_when_there_is_something_to_learn(images: Path, tmp_path: Path) -> None:
    easy = {"AUGMENT__CROP_SCALE": "(0.5, 1.0)", "SOLVER__BATCH_SIZE": 6}
    pretrain(config(images, tmp_path, SOLVER__MAX_STEPS=25, SOLVER__BASE_LR=0.003, **easy))
    lines = trace(tmp_path)
    for key in (k for k in lines[0] if k.startswith("loss/")):
        values = [line[key] for line in lines]
        assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.5


def test_golden_trace(images: Path, tmp_path: Path) -> None:
    """Recorded once from this software: a refactoring must not move it. Differences between platforms are rounding."""
    torch.manual_seed(1)  # what was drawn before is not to matter
    pretrain(config(images, tmp_path, SOLVER__MAX_STEPS=2, **WHOLE))
    losses = [[v for k, v in line.items() if k.startswith("loss/")] for line in trace(tmp_path)]
    assert losses == [pytest.approx(GOLDEN[0], abs=2e-3), pytest.approx(GOLDEN[1], abs=2e-2)]


GOLDEN = ([5.639, 2.901, 1.890], [7.600, 4.769, 2.552])


def test_random_measures_batch_statistics_and_trains_nothing(images: Path, tmp_path: Path) -> None:
    random, manifest = load_backbone(pretrain(config(images, tmp_path / "r", METHOD="random", **WHOLE)))
    torch.manual_seed(0)
    fresh = ResNet(18).state_dict()
    for name, tensor in random.items():
        if "running" not in name:
            assert torch.equal(tensor, fresh[to_detectron2(name)])
    assert random["bn1.running_mean"].abs().max() > 0.01
    loader = build_two_view_loader(config(images, tmp_path), open_source(images))
    means = []
    for batch, _ in zip(loader.batches(0), range(loader.steps_per_epoch)):
        x = train._input(batch.views)
        means.append(F.conv2d(x, fresh["stem.conv1.weight"], stride=2, padding=3).mean((0, 2, 3)))
    torch.testing.assert_close(random["bn1.running_mean"], torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)
    assert (manifest.method, manifest.step, manifest.units) == ("random", 0, [])


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 1), ("resnet50", 4)])
def test_a_narrow_network_goes_through_the_artifact(name: str, blocks: int, images: Path, tmp_path: Path) -> None:
    narrow = {"BACKBONE__NAME": name, "BACKBONE__STEM": "cifar", "BACKBONE__WIDTH": 8}
    path = pretrain(config(images, tmp_path, **narrow, SOLVER__MAX_STEPS=1))
    tensors, manifest = load_backbone(path)
    assert [stage.channels for stage in manifest.stages.values()] == [8, *(8 * blocks * 2**i for i in range(4))]
    model, _ = read_backbone(path)
    widths = {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)}
    assert max(widths) == 64 * blocks
    assert len(tensors) == len([n for n in model.state_dict() if not n.endswith("num_batches_tracked")])
    outputs = model(torch.zeros(1, 3, 32, 32))
    assert [o.shape[1] for o in outputs.values()] == [stage.channels for stage in manifest.stages.values()]


def test_recompute_trains_the_same_and_a_run_may_change_it(images: Path, tmp_path: Path) -> None:
    kept = pretrain(config(images, tmp_path / "a"))
    pretrain(config(images, tmp_path / "b", SOLVER__RECOMPUTE="all", CHECKPOINT_PERIOD=2))
    (tmp_path / "b" / "checkpoint_00000003.pth").unlink()
    again = pretrain(config(images, tmp_path / "b", SOLVER__RECOMPUTE="[res2, res5]"), resume=True)
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    assert load_backbone(kept)[1].tensors_sha256 == load_backbone(again)[1].tensors_sha256


def test_a_run_may_be_augmented_elsewhere_from_some_step_on(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "a"))
    pretrain(config(images, tmp_path / "b", CHECKPOINT_PERIOD=2))
    (tmp_path / "b" / "checkpoint_00000003.pth").unlink()
    pretrain(config(images, tmp_path / "b", AUGMENT__DEVICE="auto"), resume=True)
    for own, other in zip(trace(tmp_path / "a"), trace(tmp_path / "b"), strict=True):
        assert own["loss/res4-res5"] == pytest.approx(other["loss/res4-res5"], abs=0.2)
    assert trace(tmp_path / "a")[:2] == trace(tmp_path / "b")[:2]
    assert trace(tmp_path / "a")[2] != trace(tmp_path / "b")[2]  # a blur rounds otherwise


def test_tar_shards_resume_to_the_same_bits(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards of 7 and 5 images, workers in the second half alone; 3 steps an epoch, resumed inside the second."""
    pytest.importorskip("webdataset", reason="the extra `webdataset` is not installed")
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    files = sorted(images.glob("*.png"))
    for number, part in enumerate((files[:7], files[7:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for file in part:
                archive.add(file, file.name)
    shards = tmp_path / "{0,1}.tar"
    settings = {"SOLVER__MAX_STEPS": 6, "CHECKPOINT_PERIOD": 2, "DATA__SHUFFLE_BUFFER": 6}
    whole = pretrain(config(shards, tmp_path / "cut", **settings))
    expected, lines = load_backbone(whole)[1].tensors_sha256, trace(tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint_00000006.pth").unlink()
    assert latest_checkpoint(tmp_path / "cut")[1]["step"] == 4
    again = pretrain(config(shards, tmp_path / "cut", **settings, DATA__NUM_WORKERS=2), resume=True)
    assert load_backbone(again)[1].tensors_sha256 == expected
    assert trace(tmp_path / "cut") == lines
    with pytest.raises(UserError, match="made with another configuration"):
        pretrain(config(shards, tmp_path / "cut", **{**settings, "DATA__SHUFFLE_BUFFER": 7}), resume=True)


def test_a_python_data_set_trains(images: Path, tmp_path: Path) -> None:
    """The same pixels give the same backbone, whatever they came in."""
    arrays = [cv2.imread(str(file))[:, :, ::-1] for file in sorted(images.glob("*.png"))]
    own = pretrain(config(Path("unused"), tmp_path / "own"), source=DatasetSource(arrays))
    files = pretrain(config(images, tmp_path / "files"))
    manifests = [load_backbone(path)[1] for path in (own, files)]
    assert manifests[0].tensors_sha256 == manifests[1].tensors_sha256
    assert [manifest.dataset for manifest in manifests] == ["list", images.name]


class Noise:
    """A data set that draws its images from NumPy's global generator."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.randint(0, 256, (40, 48, 3)).astype(np.uint8)  # noqa: NPY002


def test_the_seed_decides_what_a_python_data_set_draws(tmp_path: Path) -> None:
    losses = []
    for seed in (0, 0, 1):
        cfg = config(Path("unused"), tmp_path / str(len(losses)), SEED=seed, SOLVER__MAX_STEPS=1, METHOD="gim")
        pretrain(cfg, source=DatasetSource(Noise()))
        losses.append([line["loss/res2-res2"] for line in trace(tmp_path / str(len(losses)))])
    assert losses[0] == losses[1] != losses[2]


def test_resume_needs_the_same_configuration(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path))
    with pytest.raises(UserError, match="made with another configuration"):
        pretrain(config(images, tmp_path, LOSS__TEMPERATURE=0.5), resume=True)
    assert load_config(get_cfg(), tmp_path / "config.yaml")[0].LOSS.TEMPERATURE == 0.1  # still the run's own
    assert pretrain(config(images, tmp_path, LOG_PERIOD=7), resume=True).is_file()


def test_a_key_that_an_older_release_lacked_had_its_default(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path))
    checkpoint, values = latest_checkpoint(tmp_path)
    before = yaml.safe_load(values["config"])
    del before["SOLVER"]["ACCUMULATE"], before["FLOAT32_PRECISION"]
    checkpoint.unlink()  # mapped into memory
    torch.save({**values, "config": yaml.safe_dump(before), "config_hash": "another"}, checkpoint)
    with pytest.raises(UserError, match=r"another configuration \(SOLVER.ACCUMULATE is 1 before, 2 now\)"):
        pretrain(config(images, tmp_path, SOLVER__ACCUMULATE=2), resume=True)
    assert pretrain(config(images, tmp_path), resume=True).is_file()


def test_a_run_may_change_where_and_how_fast_it_goes_and_nothing_else(images: Path, tmp_path: Path) -> None:
    free = {
        "OUTPUT_DIR",
        "DEVICE",
        "LOG_PERIOD",
        "CHECKPOINT_PERIOD",
        "DATA.NUM_WORKERS",
        "DATA.PATH",
        "AUGMENT.DEVICE",
    }
    free |= {"SOLVER.RECOMPUTE", "SOLVER.COMPILE", "SOLVER.STEP_EARLY", "SOLVER.PARALLEL"}
    free |= {"CUDNN_BENCHMARK", "DETERMINISTIC"}
    free |= {f"KNN.{key}" for key in get_cfg().KNN}

    def leaves(node: CfgNode, above: str = "") -> Iterator[tuple[CfgNode, str, str]]:
        for key, value in node.items():
            if isinstance(value, CfgNode):
                yield from leaves(value, f"{above}{key}.")
            else:
                yield node, key, f"{above}{key}"

    cfg = get_cfg()
    before, found = train.config_hash(cfg), set()
    for node, key, name in list(leaves(cfg)):
        value, node[key] = node[key], "something else"
        if train.config_hash(cfg) == before:
            found.add(name)
        node[key] = value
    assert found == free


def test_a_damaged_checkpoint_is_named_and_the_one_before_works(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path, CHECKPOINT_PERIOD=2))
    newest = tmp_path / "checkpoint_00000003.pth"
    newest.write_bytes(newest.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"checkpoint_00000003.pth: damaged.*resume from checkpoint_00000002.pth"):
        pretrain(config(images, tmp_path, CHECKPOINT_PERIOD=2), resume=True)
    newest.unlink()
    pretrain(config(images, tmp_path, CHECKPOINT_PERIOD=2), resume=True)
    assert [line["iteration"] for line in trace(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {"state_dict": {}}])
def test_a_checkpoint_of_something_else_is_named(content: object, images: Path, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint_00000003.pth")
    with pytest.raises(UserError, match=r"checkpoint_00000003.pth: .*not a training state .* to start again"):
        pretrain(config(images, tmp_path), resume=True)


def test_resume_needs_as_many_images(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path / "run"))
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for path in sorted(images.iterdir())[1:]:
        (fewer / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"made with 12 images and DATA.PATH .*fewer has 11"):
        pretrain(config(fewer, tmp_path / "run"), resume=True)


def test_a_run_begun_anew_is_resumed_and_not_the_one_before(images: Path, tmp_path: Path) -> None:
    pretrain(config(images, tmp_path, CHECKPOINT_PERIOD=1))
    again = config(images, tmp_path, CHECKPOINT_PERIOD=1, SEED=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.UnreadLosses, "add", lambda self, step, *_: 1 / (1 - step))  # it fails after one step
        with pytest.raises(ZeroDivisionError):
            pretrain(again)
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_00000001.pth"]
    assert pretrain(again, resume=True).is_file()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_says_how_to_go_on(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.Monitor.__call__

    def interrupted(self, step, *values):
        if step == 1:
            os.kill(os.getpid(), signal.Signals[name])
        return original(self, step, *values)

    monkeypatch.setattr(train.Monitor, "__call__", interrupted)
    with pytest.raises(UserError, match=f"stopped by {name} after step 2; --resume"):
        pretrain(config(images, tmp_path))
    assert latest_checkpoint(tmp_path)[1]["step"] == 2


def test_a_signal_in_the_last_step_changes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.Monitor.__call__

    def interrupted(self, step, *values):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *values)

    monkeypatch.setattr(train.Monitor, "__call__", interrupted)
    assert load_backbone(pretrain(config(images, tmp_path)))[1].step == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("unit", [0, 1, 2])
def test_the_first_unit_whose_loss_is_not_finite_is_named(
    unit: int, value: float, images: Path, tmp_path: Path
) -> None:
    labels, finite = ["low", "middle", "high"], [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]
    broken = [torch.tensor(value) if k == unit else loss for k, loss in enumerate(finite)]
    unread = train.UnreadLosses(labels, open_source(images))
    unread.read()
    unread.add(5, finite, torch.tensor([0, 1]))
    unread.read()
    unread.add(6, finite, torch.tensor([3, 4]))
    unread.add(7, broken, torch.tensor([5, 2]))
    unread.add(8, [torch.tensor(float("nan"))] * 3, torch.tensor([1, 9]))
    message = rf"loss of unit {labels[unit]} is {value} at step 7 \(images \S*05.png, \S*02.png, \.\.\.\)"
    with pytest.raises(UserError, match=message):
        unread.read()


@pytest.mark.parametrize("periods", [{"LOG_PERIOD": 4}, {"LOG_PERIOD": 99, "CHECKPOINT_PERIOD": 5}])
def test_a_loss_that_is_read_late_is_told_of_as_if_at_once_and_never_saved(
    periods: dict[str, int], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite in the second unit in the third step alone, of which neither line nor checkpoint is due."""
    calls = []

    def broken(z: torch.Tensor, *options: object) -> torch.Tensor:
        calls.append(len(z))
        return nt_xent(z, *options) * (float("inf") if len(calls) == 3 * 2 + 2 else 1)

    monkeypatch.setattr(train, "nt_xent", broken)
    cfg = config(images, tmp_path, SOLVER__MAX_STEPS=9, SOLVER__BASE_LR=0.0, **periods)
    source = open_source(images)
    batch = next(build_two_view_loader(cfg, source).batches(2))
    names = ", ".join(source.name(i) for i in batch.index.tolist())
    with pytest.raises(UserError, match=rf"unit res3-res4 is inf at step 2 \(images {re.escape(names)}, "):
        pretrain(cfg)
    assert not list(tmp_path.glob("checkpoint_*"))
    assert [line["iteration"] for line in trace(tmp_path)] == [0]


class Reads(TorchDispatchMode):
    """Counts in each step how often the host asks for a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.steps[-1] += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_nothing_is_read_from_the_device_in_a_step_without_a_line(
    amp: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD, since AdamW reads its step counts, which lie on the host."""
    reads, advance, shown = Reads(), train.Progress.advance, []

    def counted(self, n: int = 1, **fields: float) -> None:
        shown.append(fields)
        reads.steps.append(0)  # what is left of this step counts with the next
        advance(self, n, **fields)

    monkeypatch.setattr(train.Progress, "advance", counted)
    tolist = torch.Tensor.tolist

    def told(tensor: torch.Tensor) -> object:
        reads.steps[-1] += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", told)
    sgd = {"SOLVER__OPTIMIZER": "sgd", "SOLVER__AMP": amp, "SOLVER__MAX_STEPS": 9, "LOG_PERIOD": 4}
    cfg = config(images, tmp_path, **sgd)
    with reads:
        pretrain(cfg)
    per_step = reads.steps[:9]
    assert [count > 0 for count in per_step] == [step in (0, 3, 7) for step in range(9)]
    lines = trace(tmp_path)
    for step, fields in enumerate(shown):  # the bar shows the last line
        line = max((line for line in lines if line["iteration"] <= step), key=lambda line: line["iteration"])
        assert fields.items() >= {k: v for k, v in line.items() if k.startswith("loss/")}.items()


def test_a_loss_that_is_not_finite_stops_with_unit_step_and_files(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss of unit res\d-res\d is nan at step \d \(images .*png"):
        pretrain(config(images, tmp_path, SOLVER__BASE_LR=1e9))


def test_the_library_leaves_the_log_to_the_command(images: Path, tmp_path: Path) -> None:
    handlers = list(log.handlers)
    pretrain(config(images, tmp_path / "a", METHOD="random"))
    assert log.handlers == handlers
    assert not (tmp_path / "a" / "log.txt").exists()
    pretrain_file("", overrides(images, tmp_path / "b", METHOD="random"))
    assert (tmp_path / "b" / "log.txt").read_text().count("wrote ") == 1


def test_a_collapse_is_warned_of_once(images: Path, tmp_path: Path) -> None:
    """At a rate of 0 nothing collapses; embeddings that are all alike do."""
    pretrain_file("", overrides(images, tmp_path / "a", SOLVER__BASE_LR=0.0))
    assert "collapsed" not in (tmp_path / "a" / "log.txt").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "forward", lambda self, x: self.mlp(x.mean((2, 3))) * 1e-4 + 1)
        pretrain_file("", overrides(images, tmp_path / "b"))
    text = (tmp_path / "b" / "log.txt").read_text()
    assert text.count("the embeddings of unit res2-res3 have collapsed (std 0.0") == 1
    assert text.count("collapsed") == 1


def test_stepping_late_is_the_same_and_a_run_may_change_it(images: Path, tmp_path: Path) -> None:
    settings = {"SOLVER__MAX_STEPS": 5, "LOG_PERIOD": 4, "CHECKPOINT_PERIOD": 4}  # some steps end with neither
    early = pretrain(config(images, tmp_path / "a", **settings))
    pretrain(config(images, tmp_path / "b", **settings, SOLVER__STEP_EARLY=False))
    (tmp_path / "b" / "checkpoint_00000005.pth").unlink()
    late = pretrain(config(images, tmp_path / "b", **settings), resume=True)
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    assert load_backbone(early)[1].tensors_sha256 == load_backbone(late)[1].tensors_sha256


def test_unreadable_images_are_skipped_up_to_the_share(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "00.png").write_bytes(b"")
    assert pretrain(config(folder, tmp_path / "a", DATA__MAX_BAD_SHARE=0.1)).is_file()
    with pytest.raises(UserError, match=r"1 of 12 images cannot be read.*MAX_BAD_SHARE 0"):
        pretrain(config(folder, tmp_path / "b", DATA__MAX_BAD_SHARE=0.0))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("METHOD", "byol", "METHOD is 'byol'"),
        ("BACKBONE__NAME", "resnet51", "BACKBONE.NAME is 'resnet51'"),
        ("BACKBONE__STEM", "patch", "BACKBONE.STEM is 'patch'"),
        ("BACKBONE__NORM", "LN", "BACKBONE.NORM is 'LN'"),
        ("BACKBONE__WIDTH", 16, "BACKBONE.WIDTH is 16 with BACKBONE.STEM imagenet; use 64"),
        ("DECODER__MLP_LAYERS", 5, "DECODER.MLP_LAYERS is 5"),
        ("DECODER__OUT_DIM", 0, "DECODER.OUT_DIM"),
        ("SOLVER__OPTIMIZER", "adam", "SOLVER.OPTIMIZER is 'adam'"),
        ("SOLVER__AMP", "fp8", "SOLVER.AMP is 'fp8'"),
        ("SOLVER__BATCH_SIZE", 0, "SOLVER.BATCH_SIZE is 0"),
        ("SOLVER__RECOMPUTE", "some", "SOLVER.RECOMPUTE: 'some'"),
        ("LOSS__CHUNK", -1, "LOSS.CHUNK is -1"),
        ("SOLVER__RECOMPUTE", 3, "SOLVER.RECOMPUTE is 3"),
        ("DEVICE", "cuda:99", "cuda:99"),
        ("LOSS__TEMPERATURE", 0.0, "LOSS.TEMPERATURE is 0"),
        ("LOG_PERIOD", 0, "LOG_PERIOD is 0; use 1 or more"),
        ("CHECKPOINT_PERIOD", 0, "CHECKPOINT_PERIOD is 0; use 1 or more"),
        ("SOLVER__BASE_LR", -0.1, "SOLVER.BASE_LR is -0.1; use 0 or more"),
        ("SOLVER__WARMUP_EPOCHS", -1.0, "SOLVER.WARMUP_EPOCHS is -1"),
        ("SOLVER__EPOCHS", 0, "SOLVER.EPOCHS"),
        ("SOLVER__MAX_STEPS", -1, "SOLVER.MAX_STEPS is -1; use 0 or more"),
        ("SOLVER__MOMENTUM", -1.0, "SOLVER.MOMENTUM is -1.0; use 0 or more"),
        ("SOLVER__WEIGHT_DECAY", "1e999", "SOLVER.WEIGHT_DECAY is inf; use 1000000000 or less"),
        ("UNITS", "[['res2','res4']]", "no unit trains res5"),
        ("AUGMENT__PRESET", "moco", "AUGMENT.PRESET 'moco'"),
        ("AUGMENT__DEVICE", "tpu", "AUGMENT.DEVICE is 'tpu'"),
    ],
)
def test_bad_values_are_named_before_files_are_opened(key: str, value: object, message: str, tmp_path: Path) -> None:
    extra = {**WHOLE, **({"SOLVER__MAX_STEPS": 0} if key == "SOLVER__EPOCHS" else {})}
    with pytest.raises(UserError, match=message):  # before the missing images are noticed
        pretrain(config(tmp_path / "missing", tmp_path / "run", **{**extra, key: value}))
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path / "missing")):
        pretrain(config(tmp_path / "missing", tmp_path / "run"))


def test_a_batch_larger_than_the_data_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SOLVER\.BATCH_SIZE is 13 but DATA\.PATH .* has 12 images"):
        pretrain(config(images, tmp_path, SOLVER__BATCH_SIZE=13))


@pytest.mark.parametrize(("key", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_precision_that_was_asked_for_is_used(
    key: str, dtype: torch.dtype, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "has_bf16_units", lambda: True)
    with train.autocast(config(images, tmp_path, SOLVER__AMP=key), torch.device("cpu"))():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype


def test_bf16_is_off_where_the_cpu_has_no_units_for_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(train, "has_bf16_units", lambda: False)
    pretrain(config(images, tmp_path / "a", SOLVER__AMP="bf16"))
    pretrain(config(images, tmp_path / "b"))
    assert [line["loss/res2-res3"] for line in trace(tmp_path / "a")] == [
        line["loss/res2-res3"] for line in trace(tmp_path / "b")
    ]
    assert "no units for it" in caplog.text


@pytest.mark.parametrize(
    ("flags", "has"),
    [("flags : fpu avx512_bf16 amx_tile", True), ("flags : amx_bf16", True), ("Features : fp asimd bf16", True),
     ("flags : fpu avx512f avx512bw", False)],
)  # fmt: skip
def test_units_for_bf16_are_read_from_the_cpus_flags(flags: str, has: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(flags)
    assert has_bf16_units(str(tmp_path / "cpuinfo")) is has
    assert not has_bf16_units(str(tmp_path / "absent"))


def test_mixed_precision_trains(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "has_bf16_units", lambda: True)
    pretrain(config(images, tmp_path / "a", SOLVER__AMP="bf16"))
    pretrain(config(images, tmp_path / "b"))
    for low, full in zip(trace(tmp_path / "a")[:1], trace(tmp_path / "b")[:1]):
        assert low["loss/res2-res3"] == pytest.approx(full["loss/res2-res3"], rel=0.05)
        assert low != full


def test_the_scaler_of_fp16_changes_nothing_where_nothing_overflows(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, for half precision takes minutes on a CPU; scales are powers of two."""
    plain = pretrain(config(images, tmp_path / "a", SOLVER__STEP_EARLY=False))
    monkeypatch.setattr(train, "autocast", lambda *_: nullcontext)
    scaled = pretrain_file("", overrides(images, tmp_path / "b", SOLVER__AMP="fp16", CHECKPOINT_PERIOD=1))
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    assert load_backbone(plain)[1].tensors_sha256 == load_backbone(scaled)[1].tensors_sha256
    assert latest_checkpoint(tmp_path / "b")[1]["scaler"]["_growth_tracker"] == 3
    assert "SOLVER.AMP fp16: the optimizer steps at the end" in (tmp_path / "b" / "log.txt").read_text()


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_optimizers(optimizer: str, images: Path, tmp_path: Path) -> None:
    pretrain(
        config(images, tmp_path, SOLVER__OPTIMIZER=optimizer, SOLVER__BASE_LR=0.1 if optimizer != "adamw" else 1e-3)
    )
    assert trace(tmp_path)[-1]["loss/res2-res3"] < 10


def test_lars_adapts_in_a_run_without_decay(images: Path, tmp_path: Path) -> None:
    """Its first step moves a weight by rate x 0.001 of its own norm, whatever the gradient."""
    changes = {"SOLVER__OPTIMIZER": "lars", "SOLVER__WEIGHT_DECAY": 0.0, "SOLVER__MAX_STEPS": 1}
    before, after = (
        load_backbone(pretrain(config(images, tmp_path / str(rate), SOLVER__BASE_LR=rate, **changes)))[0]
        for rate in (1e-9, 64.0)  # for 256 images: 4 have a rate of 1
    )
    for name, weight in before.items():
        if weight.ndim > 1:
            assert (after[name] - weight).norm().item() == pytest.approx(0.001 * weight.norm().item(), rel=1e-3)
