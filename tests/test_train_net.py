"""tools/train_net.py as a user runs it: from made-up images and a converted backbone to AP, and bad input."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_detection import RESNET_18, overrides

from loco_det.annotations.synthetic import CLASSES, make_shapes_dataset
from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.cli import run_job
from loco_det.convert import convert

REPOSITORY = Path(__file__).parent.parent
TRAIN_NET = [sys.executable, str(REPOSITORY / "tools" / "train_net.py")]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with made-up images and backbone.pkl, a converted random ResNet-18."""
    folder = tmp_path_factory.mktemp("world")
    make_shapes_dataset(folder, train=8, val=4, size=64, seed=1)
    torch.manual_seed(2)
    net = ResNet(18, norm="BN")
    save_backbone(folder / "b.safetensors", backbone_tensors(net), describe(net, stem="imagenet", method="loco"))
    convert(folder / "b.safetensors", folder / "backbone.pkl")
    return folder


@pytest.fixture
def arguments(world, tmp_path, monkeypatch):
    """The command line of a tiny frozen Mask R-CNN, with `changes` to its overrides."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(world))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def build(*flags: str, config: str = "configs/coco_loco_r50.yaml", **changes: object) -> list[str]:
        standard = {
            **RESNET_18,
            "MODEL__WEIGHTS": world / "backbone.pkl",
            "MODEL__ROI_HEADS__NUM_CLASSES": len(CLASSES),
            "INPUT__MASK_FORMAT": "bitmask",
            "INPUT__MIN_SIZE_TRAIN": (64,),
            "DATASETS__TRAIN": ("shapes_train",),
            "DATASETS__TEST": ("shapes_val",),
            "SOLVER__MAX_ITER": 4,
            "SOLVER__STEPS": (3,),
            "OUTPUT_DIR": tmp_path / "out",
        }
        merged = overrides(**{**standard, **changes})
        return ["--engine", "torchvision", "--config-file", config, *merged, *flags]

    return build


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_from_images_and_backbone_to_ap(commands, arguments, tmp_path):
    line = [str(commands / "python"), TRAIN_NET[1], *arguments()]
    command = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert command.returncode == 0, command.stderr
    out = tmp_path / "out"
    assert {"config.yaml", "log.txt", "metrics.json", "run.json", "model_final.pth", "last_checkpoint"} <= {
        p.name for p in out.iterdir()
    }
    record = json.loads((out / "run.json").read_text())
    weights = (Path(os.environ["DETECTRON2_DATASETS"]) / "backbone.pkl").read_bytes()
    assert record["weights"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert record["weights"]["method"] == "loco"
    assert set(record["datasets"]) == {"shapes_train", "shapes_val"}
    assert record["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
    first, last = lines(out)
    assert first["iteration"] == 3
    assert {"total_loss", "loss_mask", "lr", "time", "data_time"} <= set(first)
    assert {"bbox/AP", "segm/AP", "segm/AP-striped disc"} <= set(last)
    detections = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    truth = json.loads((Path(os.environ["DETECTRON2_DATASETS"]) / "shapes/annotations/instances_val.json").read_text())
    assert {d["image_id"] for d in detections} == {image["id"] for image in truth["images"]}
    assert {d["category_id"] for d in detections} <= {category["id"] for category in truth["categories"]}
    assert all(d["segmentation"]["size"] == [64, 64] for d in detections)
    for text in (command.stderr, (out / "log.txt").read_text()):
        assert re.search(r"train (\d+)/\1 eta 00:00:00 .*it/s loss .* lr .* data \d+% .*loss_mask", text)
        assert text.count("engine: torchvision") == 1

    # The frozen tensors are the backbone file's, through training and checkpoint.
    trained = torch.load(out / "model_final.pth", weights_only=True)["model"]
    torch.manual_seed(2)
    for name, tensor in ResNet(18, norm="BN").state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(trained[f"backbone.bottom_up.{name}"], tensor), name


def test_a_killed_run_resumes_to_the_same_end(arguments, tmp_path):
    # A constant learning rate, so that the length of the run is all that MAX_ITER decides.
    same = {"SOLVER__CHECKPOINT_PERIOD": 2, "SOLVER__WARMUP_ITERS": 0, "SOLVER__STEPS": (), "DATASETS__TEST": ()}
    process = subprocess.Popen([*TRAIN_NET, *arguments(SOLVER__MAX_ITER=10000, **same)], stderr=subprocess.DEVNULL)
    pointer = tmp_path / "out" / "last_checkpoint"
    deadline = time.monotonic() + 120
    while not pointer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = int(pointer.read_text().removeprefix("model_").removesuffix(".pth"))
    length = {"SOLVER__MAX_ITER": last + 3}
    assert run_job("train", arguments("--resume", **length, **same)) == 0
    assert run_job("train", arguments(OUTPUT_DIR=tmp_path / "whole", **length, **same)) == 0
    ours, theirs = (torch.load(tmp_path / d / "model_final.pth", weights_only=True) for d in ("out", "whole"))
    assert ours["iteration"] == theirs["iteration"] == last + 2
    for name, tensor in theirs["model"].items():
        assert torch.equal(ours["model"][name], tensor), name


@pytest.mark.parametrize(("processes", "name"), [(1, "SIGINT"), (2, "SIGTERM")])
def test_a_signal_to_the_whole_job_saves_and_says_how_to_go_on(arguments, tmp_path, processes, name):
    settings = {"SOLVER__MAX_ITER": 10000, "SOLVER__CHECKPOINT_PERIOD": 1, "DATALOADER__NUM_WORKERS": 1}
    command = [*TRAIN_NET, *arguments("--num-gpus", str(processes), **settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "out" / "last_checkpoint").exists():  # then all processes are in the loop
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.Signals[name])
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, said
    assert "Traceback" not in said
    answer = "\nstopping after this step and saving; again to stop now\n"
    assert said.count(answer) == 1  # by the first of the processes
    said = said.replace(answer, "")
    assert re.fullmatch(rf"(.* I .*\n)*error: stopped by {name} after iteration .*\n", said)
    assert (tmp_path / "out" / (tmp_path / "out" / "last_checkpoint").read_text()).is_file()


@pytest.mark.parametrize(
    ("flags", "changes", "words"),
    [
        (["--config-file", "configs/coco_loko_r50.yaml"], {}, ["coco_loko_r50.yaml", "coco_loco_r50.yaml"]),
        (["SOLVER.BASE_LRR", "1.0"], {}, ["the command line", "SOLVER.BASE_LRR", "did you mean SOLVER.BASE_LR"]),
        (["SOLVER.BASE_LR"], {}, ["SOLVER.BASE_LR", "KEY VALUE"]),
        (["SOLVER.BASE_LR", "high"], {}, ["SOLVER.BASE_LR", "float", "'high'"]),
        (
            ["MODEL.META_ARCHITECTURE", "RetinaNet"],
            {},
            ["the command line", "MODEL.META_ARCHITECTURE", "--engine detectron2"],
        ),
        (["MODEL.RESNETS.DEPTH", "34"], {}, ["MODEL.RESNETS.DEPTH", "18", "34"]),
        (["INPUT.FORMAT", "BGR"], {}, ["INPUT.FORMAT", "RGB"]),
        (["MODEL.WEIGHTS", "detectron2://x.pkl"], {}, ["detectron2://x.pkl", "download"]),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], {}, ["6 classes", "80"]),
        (["--num-gpus", "0"], {}, ["--num-gpus is 0"]),
        (["MODEL.DEVICE", "cuda:7"], {}, ["cuda:7"]),
        (["--eval-only"], {"MODEL__WEIGHTS": ""}, ["MODEL.WEIGHTS is empty"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, capsys, flags, changes, words):
    assert run_job("train", [*arguments(**changes), *flags]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert "Traceback" not in said


def test_a_hostile_yaml_is_read_as_data(arguments, tmp_path, capsys):
    path = tmp_path / "evil.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/touched']\n")
    assert run_job("train", ["--config-file", str(path)]) == 2
    assert "OUTPUT_DIR" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()


def test_an_image_that_is_corrupt_or_absent_is_named(arguments, world, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "data"
    make_shapes_dataset(copy, train=2, val=1, size=64, seed=1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(copy))
    victim = sorted((copy / "shapes" / "train").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:50])
    assert run_job("train", arguments("--max-bad-share", "0")) == 2
    assert victim.name in capsys.readouterr().err
    assert run_job("train", arguments()) == 0, "one is endured"
    assert victim.name in capsys.readouterr().err, "and named"
    victim.unlink()
    assert run_job("train", arguments()) == 2
    assert victim.name in capsys.readouterr().err


def test_debug_shows_the_traceback(arguments, capsys):
    assert run_job("train", [*arguments(), "--debug", "SEED", "x"]) == 2
    assert "Traceback" in capsys.readouterr().err
