"""Every path that a GPU would take, walked under a pretended one: no device mix, and only the recorded host waits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import CPU, CUDA, DeviceMix, Pretended, pretended_cuda
from pretended_cuda import waits as WAITS
from tiny_detection import TINY, tiny_cfg
from torch import nn

from loco_det.backbones.artifact import load_backbone
from loco_det.cli import main
from loco_det.core.config import load_config
from loco_det.core.device import check_bf16
from loco_det.core.errors import UserError
from loco_det.detection import loop, onnx
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.keys import get_cfg as detection_keys
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from pretrain import train
from pretrain.defaults import get_cfg
from pretrain.train import pretrain

# --- the pretence itself ----------------------------------------------------------------------------------------


def test_it_computes_what_the_cpu_does_and_says_cuda() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 6, 6)
    net(x)
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    twin.load_state_dict(net.state_dict())
    net(x).sum().backward()
    with pretended_cuda() as waits:
        there = twin.to("cuda")
        waits.clear()
        loss = there(x.to(CUDA, non_blocking=True)).sum()
        loss.backward()
        assert loss.device == CUDA
        assert loss.is_cuda
        assert waits.total() == 0
        grads = [p.grad.cpu() for p in there.parameters()]
    assert all(type(g) is torch.Tensor for g in grads)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters()))


def test_it_refuses_and_counts() -> None:
    with pretended_cuda() as waits:
        x = torch.arange(4.0, device="cuda")
        assert isinstance(x, Pretended)
        for wrong in (lambda: x + torch.ones(4), lambda: x[torch.tensor([1])], lambda: F.linear(x, torch.ones(2, 4))):
            with pytest.raises(DeviceMix):
                wrong()
        for wrong in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError):
                wrong()
        assert x.sum() * torch.tensor(2.0) == 12  # single numbers may mix; 1 wait
        waits.clear()
        cases = {
            x.sum().item: 1, x.tolist: 1, x.cpu: 1, x.nonzero: 1, lambda: x[x > 1]: 1, lambda: bool(x[0]): 1,
            lambda: x.to("cpu", non_blocking=True): 0, lambda: torch.zeros(3).to("cuda"): 1,
            lambda: torch.zeros(3).to("cuda", non_blocking=True): 0, lambda: x * 2: 0, lambda: x[1:3]: 0,
            lambda: torch.zeros(3, device="cuda"): 0, lambda: torch.tensor([1.0], device="cuda"): 1,
            lambda: x.where(x > 1, 0): 0, lambda: x.masked_fill_(x > 9, 0): 0,
        }  # fmt: skip
        for number, (call, want) in enumerate(cases.items()):
            waits.clear()
            call()
            assert waits.total() == want, number


# --- pretraining ------------------------------------------------------------------------------------------------


def configured(folder: Path, output: Path, *more: object):
    text = f"""BACKBONE.NAME resnet18 BACKBONE.STEM cifar BACKBONE.WIDTH 8 DECODER.HIDDEN_DIM 16 DECODER.OUT_DIM 8
        DECODER.CONV_BLOCKS 1 DATA.PATH {folder} DATA.IMAGE_SIZE 16 DATA.NUM_WORKERS 0 SOLVER.BATCH_SIZE 4
        SOLVER.MAX_STEPS 3 SOLVER.WARMUP_EPOCHS 0 LOG_PERIOD 100 KNN.PERIOD 0 OUTPUT_DIR {output}"""
    return load_config(get_cfg(), "", [*text.split(), *map(str, more)])[0]


CASES = {
    "simclr": ("METHOD", "simclr"),
    "gim": ("METHOD", "gim", "SOLVER.STEP_EARLY", False),
    "loco, sgd": ("METHOD", "loco", "SOLVER.OPTIMIZER", "sgd", "SOLVER.RECOMPUTE", "first"),
    "loco, bf16": ("METHOD", "loco", "SOLVER.AMP", "bf16", "LOSS.CHUNK", 3, "SOLVER.OPTIMIZER", "adamw"),
    "loco, fp16": ("METHOD", "loco", "SOLVER.AMP", "fp16", "SOLVER.OPTIMIZER", "sgd"),
    "loco_res2, in parts": ("METHOD", "loco_res2", "SOLVER.ACCUMULATE", 2),
    "soft": ("SHARING.MODE", "soft", "SHARING.PENALTY", 0.01),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pretraining_step_does_not_wait(case: str, noise: Path, tmp_path: Path, monkeypatch) -> None:
    """Between two lines of metrics.json; fp16 must know whether a gradient overflowed."""
    seen = []
    original = train.Monitor.__call__

    def counted(self, step, *args):
        seen.append((step, waits.total(), waits.table()))
        shown = original(self, step, *args)
        waits.clear()
        return shown

    monkeypatch.setattr(train.Monitor, "__call__", counted)
    with pretended_cuda() as waits:
        path = pretrain(configured(noise, tmp_path, "DEVICE", "cuda", *CASES[case]))
    tensors, _ = load_backbone(path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    step, count, table = seen[1]
    assert (step, count) == (1, 1 if "fp16" in case else 0), table


def test_a_run_with_a_line_a_step_a_probe_a_resume_and_views_from_the_device(noise: Path, tmp_path: Path) -> None:
    more = ("DEVICE", "cuda", "KNN.PERIOD", 1, "KNN.K", 1, "LOG_PERIOD", 1, "AUGMENT.DEVICE", "auto")
    with pretended_cuda():
        pretrain(configured(noise, tmp_path, *more, "CHECKPOINT_PERIOD", 2))
        (tmp_path / "checkpoint_00000003.pth").unlink()
        pretrain(configured(noise, tmp_path, *more, "CHECKPOINT_PERIOD", 2), resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert "knn/res5" in lines[-1]


def test_what_it_computes_is_what_the_cpu_computes(noise: Path, tmp_path: Path) -> None:
    with pretended_cuda():
        path = pretrain(configured(noise, tmp_path / "cuda", "DEVICE", "cuda"))
    want = pretrain(configured(noise, tmp_path / "cpu", "DEVICE", "cpu"))
    for name, tensor in load_backbone(want)[0].items():
        torch.testing.assert_close(load_backbone(path)[0][name], tensor, rtol=1e-4, atol=1e-5)


# --- the detector -----------------------------------------------------------------------------------------------

# Host waits of one training iteration (two images), and of the prediction of one image.
ONE_STEP = {"SOLVER__MAX_ITER": 1, "DATASETS__TEST": ()}  # half precision is slow on a CPU
DETECTOR_WAITS = {"step": 23, "image": 7}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, str]]]:
    """Counts and tables of each training iteration and each batch of predictions, of one image each."""
    found: dict[str, list[tuple[int, str]]] = {"step": [], "image": []}
    seed, forward = loop.seed_iteration, TorchvisionEngine.predict

    def seeding(*args):
        found["step"].append((WAITS.total(), WAITS.table()))
        WAITS.clear()
        return seed(*args)

    def predicting(self, model, batch):
        WAITS.clear()
        out = forward(self, model, batch)
        found["image"].append((WAITS.total(), WAITS.table()))
        return out

    monkeypatch.setattr(loop, "seed_iteration", seeding)
    monkeypatch.setattr(TorchvisionEngine, "predict", predicting)
    return found


def within(found: list[tuple[int, str]], most: int) -> None:
    """The second count; the first fills caches."""
    count, table = found[1]
    assert count == most, table


@pytest.mark.parametrize(
    ("changes", "is_counted"),
    [
        ({}, True),
        ({"MODEL__BACKBONE__FREEZE_AT": 4, "SOLVER__AMP__ENABLED": True, **ONE_STEP}, False),
        ({"MODEL__MASK_ON": False, "INPUT__MASK_FORMAT": "bitmask", "SOLVER__CLIP_GRADIENTS__ENABLED": True}, False),
    ],
    ids=["frozen", "tuned in half precision", "boxes"],
)
def test_the_detector_trains_and_is_evaluated(changes, is_counted, tiny_data, counted, tmp_path) -> None:
    changes = {"SOLVER__MAX_ITER": 3, "MODEL__DEVICE": "cuda", **changes}
    with pretended_cuda():
        results = train_net(tiny_cfg(tmp_path, **changes), engine="torchvision")
    assert not results or 0 <= results["bbox"]["AP"] <= 100
    if is_counted:
        within(counted["step"][1:], DETECTOR_WAITS["step"])
        within(counted["image"], DETECTOR_WAITS["image"])


@pytest.mark.parametrize(("chosen", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_detectors_half_precision_is_chosen(chosen, expected, tiny_data, tmp_path, monkeypatch) -> None:
    """And only float16's losses are scaled, a state that the checkpoint keeps."""
    seen, losses = [], TorchvisionEngine.losses

    def watched(self, *args):
        seen.append(torch.get_autocast_dtype("cpu"))
        return losses(self, *args)

    monkeypatch.setattr(TorchvisionEngine, "losses", watched)
    half = {"MODEL__DEVICE": "cuda", "SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": chosen, **ONE_STEP}
    with pretended_cuda():
        train_net(tiny_cfg(tmp_path, **half), engine="torchvision")
    assert seen == [expected]
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert ("grad_scaler" in saved) == (chosen == "fp16")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_bfloat16_is_refused_on_gpus_without_it(tiny_data, noise: Path, tmp_path: Path, monkeypatch) -> None:
    """By training of both kinds, before it; a CPU takes it."""
    half = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": "bf16"}
    with pretended_cuda():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
        said = r"is bf16, and this GPU \(Tesla T4\) has no units for it; set SOLVER.AMP"
        with pytest.raises(UserError, match=f"SOLVER.AMP.DTYPE {said}.DTYPE fp16"):
            train_net(tiny_cfg(tmp_path, MODEL__DEVICE="cuda", **half), engine="torchvision")
        with pytest.raises(UserError, match=f"SOLVER.AMP {said} fp16"):
            pretrain(configured(noise, tmp_path, "DEVICE", "cuda", "SOLVER.AMP", "bf16"))
        check_bf16(CPU, "SOLVER.AMP", "")


def test_predict(tiny_data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = [
        str(part) for key, value in TINY.items() for part in (key, value) if key not in ("MODEL.WEIGHTS", "SEED")
    ]
    model = build_model(load_config(detection_keys(), "configs/coco_loco_r50.yaml", settings)[0])
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    settings[settings.index("MODEL.DEVICE") + 1] = "cuda"
    arguments = ["--config-file", "configs/coco_loco_r50.yaml", "--weights", tmp_path / "detector.pth", "--engine",
                 "torchvision", "--out", tmp_path / "out", "--score-threshold", 0.0, "--opts", *settings]  # fmt: skip
    with pretended_cuda():
        assert main(["predict", str(tiny_data / "tiny" / "val"), *map(str, arguments)]) == 0
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())


def test_an_onnx_file_is_compared_with_the_model_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's TF32 convolutions would differ by more than the limits."""
    seen = []
    monkeypatch.setattr(onnx, "_runtime", lambda: SimpleNamespace(InferenceSession=lambda *_, **__: None))
    monkeypatch.setattr(
        onnx, "_trace", lambda net, image, path: seen.extend(map(type, net.parameters())) or path.touch()
    )
    monkeypatch.setattr(onnx, "_difference", lambda *_: {"boxes": 0.0, "scores": 0.0})
    with pretended_cuda():
        model = build_model(tiny_cfg(tmp_path)).to("cuda").eval()
        assert {type(p) for p in model.parameters()} == {Pretended}
        onnx.export_onnx(model, torch.zeros(3, 64, 64, dtype=torch.uint8), tmp_path / "a.onnx")
    assert set(seen) == {nn.Parameter}


# --- probes -----------------------------------------------------------------------------------------------------

PROBES = {
    "knn": "--k 1",
    "linear": "--epochs 1 --rates 0.1 1",
    "linear --recipe paper": "--epochs 1",
    "ridge": "",
    "semi": "--epochs 1 --labels 50",
}


def test_probes(noise: Path, tmp_path: Path) -> None:
    path = pretrain(configured(noise, tmp_path / "run", "DEVICE", "cpu", "SOLVER.MAX_STEPS", 1))
    fixed = f"--data {noise} --image-size 16 --device cuda --workers 0 --no-cache --json"
    with pretended_cuda():
        for number, (protocol, options) in enumerate(PROBES.items()):
            words = f"probe {path} --protocol {protocol} {options} {fixed} {tmp_path / str(number)}"
            assert main([*words.split(), "--quiet"]) == 0
            assert json.loads((tmp_path / str(number)).read_text())["device"] == "cuda:0"
