"""Detectron2 as the second engine, and unmodified Detectron2 on what this package writes."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_detection import tiny_cfg

from loco_det.annotations.registry import find_dataset
from loco_det.detection.checkpoint import last_checkpoint
from loco_det.detection.engine_d2 import Detectron2Engine
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.train import train_net

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("tiny_data")]
pytest.importorskip("detectron2")

CHANGES = {"SOLVER__MAX_ITER": 3, "SOLVER__STEPS": (2,), "SOLVER__CHECKPOINT_PERIOD": 2}


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """The same short training by both engines: {engine: (OUTPUT_DIR, results)}."""
    found = {}
    for engine in ("torchvision", "detectron2"):
        folder = tmp_path_factory.mktemp(engine)
        found[engine] = folder, train_net(tiny_cfg(folder, **CHANGES), engine=engine)
    return found


def test_both_engines_leave_the_same_files_and_names(runs):
    listings, tables, states = [], [], []
    for folder, results in runs.values():
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
        listings.append([name for name in names if "tfevents" not in name])  # TensorBoard's, named by time and process
        tables.append({kind: set(numbers) for kind, numbers in results.items()})
        states.append(torch.load(folder / "model_final.pth", weights_only=True))
        assert {"loss_mask", "loss_rpn_cls", "total_loss", "lr"} <= set(
            json.loads((folder / "metrics.json").open().readline())
        )
    assert listings[0] == listings[1]
    assert tables[0] == tables[1]
    assert {k: v.shape for k, v in states[0]["model"].items()} == {k: v.shape for k, v in states[1]["model"].items()}


@pytest.mark.parametrize(("writer", "reader"), [("torchvision", "detectron2"), ("detectron2", "torchvision")])
def test_a_checkpoint_of_one_engine_has_the_same_ap_in_the_other(runs, tmp_path, writer, reader):
    folder, expected = runs[writer]
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=folder / "model_final.pth")
    found = train_net(cfg, engine=reader, eval_only=True)
    for kind, numbers in expected.items():
        assert found[kind] == pytest.approx(numbers, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("writer", "reader"), [("torchvision", "detectron2"), ("detectron2", "torchvision")])
def test_a_run_of_one_engine_is_resumed_by_the_other(runs, writer, reader):
    folder, _ = runs[writer]
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    train_net(tiny_cfg(folder, **{**CHANGES, "SOLVER__MAX_ITER": 4}), engine=reader, resume=True)
    state = torch.load(last_checkpoint(folder), weights_only=True)
    assert (state["iteration"], state["scheduler"]["last_epoch"]) == (3, 4)
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert lines[-2]["iteration"] == 3
    (folder / "last_checkpoint").write_text("model_final.pth")


def test_detectron2_is_never_fast(tmp_path):
    """`train` asks for fast forms by default, and the optimiser is this package's in both engines."""
    states = []
    for fast in (False, True):
        folder = tmp_path / str(fast)
        train_net(tiny_cfg(folder, **{**CHANGES, "DATASETS__TEST": ()}), engine="detectron2", fast=fast)
        states.append(torch.load(folder / "model_final.pth", weights_only=True))
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(tensor, states[1]["model"][name]), name


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no way to tell who sent a signal")
def test_batches_come_on_after_a_signal_to_the_workers(tmp_path):
    stream = iter(Detectron2Engine().train_batches(tiny_cfg(tmp_path, DATALOADER__NUM_WORKERS=1), 0))
    next(stream)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}; kill -INT {worker.pid}"], check=True)
    assert len([next(stream) for _ in range(12)]) == 12  # more than were ready
    assert multiprocessing.active_children() == [worker]


@pytest.fixture
def same_batches(monkeypatch) -> None:
    """Both engines train on what this package's loader reads, each in its own form."""
    from detectron2.structures import Boxes, Instances, PolygonMasks

    def theirs(item: dict) -> dict:
        truth = item["instances"]
        masks = PolygonMasks(truth.masks.polygons)
        instances = Instances(truth.image_size, gt_boxes=Boxes(truth.boxes), gt_classes=truth.classes, gt_masks=masks)
        return {**item, "instances": instances}

    ours = TorchvisionEngine().train_batches
    monkeypatch.setattr(
        Detectron2Engine,
        "train_batches",
        lambda self, cfg, start: ([*map(theirs, batch)] for batch in ours(cfg, start)),
    )


@pytest.mark.parametrize(("first", "second"), [("torchvision", "detectron2"), ("detectron2", "torchvision")])
def test_a_run_that_changes_engines_is_the_run_that_does_not(one_thread, same_batches, tmp_path, first, second):
    """Weights, momentum, schedule and every loss go on in the other engine, bit for bit."""
    changes = {
        "SOLVER__MAX_ITER": 6,
        "SOLVER__STEPS": (4,),
        "SOLVER__CHECKPOINT_PERIOD": 3,
        "DATASETS__TEST": (),
        "MODEL__BACKBONE__FREEZE_AT": 2,
        "MODEL__RESNETS__NORM": "BN",
    }
    train_net(tiny_cfg(tmp_path / "whole", **changes), engine=first)
    train_net(tiny_cfg(tmp_path / "parts", **changes), engine=first)
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000002.pth")
    train_net(tiny_cfg(tmp_path / "parts", **changes), engine=second, resume=True)
    whole, parts = (torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("whole", "parts"))
    for name, tensor in whole["model"].items():
        # Detectron2 keeps the step counter of a BatchNorm that it froze; neither reads it.
        assert torch.equal(parts["model"].get(name, tensor), tensor), name
    for mine, other in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], other["momentum_buffer"])
    assert whole["scheduler"] == parts["scheduler"]
    lines = [json.loads((tmp_path / name / "metrics.json").read_text().splitlines()[-1]) for name in ("whole", "parts")]
    assert lines[0]["iteration"] == lines[1]["iteration"] == 5
    # Medians over the run and over its second half; the rate is the last one's.
    assert lines[0]["lr"] == lines[1]["lr"]


def test_auto_takes_detectron2_and_says_so(tmp_path, caplog, monkeypatch):
    import logging

    from loco_det.detection import train

    monkeypatch.setattr(logging.getLogger("loco_det"), "propagate", True)
    with caplog.at_level("INFO", logger="loco_det"):
        train.log_engine(train.choose_engine("auto"))
    assert caplog.messages == ["engine: detectron2"]


def test_stock_detectron2_takes_up_config_and_checkpoint(tmp_path):
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer

    folder = tmp_path / "run"
    cfg = tiny_cfg(folder, **CHANGES)
    train_net(cfg, engine="torchvision")
    theirs = get_cfg()
    theirs.merge_from_file(str(folder / "config.yaml"))
    assert theirs.SOLVER.STEPS == (2,)
    # The name is registered by the engine; stock Detectron2 has its user do that.
    from loco_det.detection.engine_d2 import _register

    _register(find_dataset("tiny_train"))
    trainer = DefaultTrainer(theirs)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 3
    assert trainer.scheduler.last_epoch == 3
    written = torch.load(folder / "model_final.pth", weights_only=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, written["model"][name]), name
    momenta = [state["momentum_buffer"] for state in trainer.optimizer.state_dict()["state"].values()]
    for ours, momentum in zip(written["optimizer"]["state"].values(), momenta):
        assert torch.equal(ours["momentum_buffer"], momentum)


def test_a_detectron2_trainers_checkpoint_is_resumed_here(tmp_path):
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer

    from loco_det.detection.engine_d2 import _register

    cfg = tiny_cfg(tmp_path, DATASETS__TEST=(), **CHANGES)
    _register(find_dataset("tiny_train"))
    theirs = get_cfg()
    theirs.merge_from_other_cfg(cfg)
    trainer = DefaultTrainer(theirs)
    trainer.resume_or_load(resume=False)
    trainer.train()
    longer = tiny_cfg(tmp_path, DATASETS__TEST=(), **{**CHANGES, "SOLVER__MAX_ITER": 5})
    train_net(longer, engine="torchvision", resume=True)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert (state["iteration"], state["scheduler"]["last_epoch"]) == (4, 5)
