"""The training loop: what it writes, that a stopped run resumes to the same numbers, and what makes it refuse."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detection import tiny_cfg, write_tiny

from loco_det.annotations.index import load_index
from loco_det.annotations.loader import build_train_loader
from loco_det.annotations.registry import find_dataset
from loco_det.commands import train as command
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.core.launch import launch
from loco_det.detection import engine_d2, loop, run_record, solver
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.keys import get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import choose_engine, train_net

EXACT = {"engine": "torchvision", "eval_only": False, "resume": False, "evaluator": "hotcoco", "fast": False}
LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def every_iteration_is_logged(data, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    monkeypatch.setattr(loop, "LOG_PERIOD", 1)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """Six iterations without interruption: (OUTPUT_DIR, results)."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(data))
        patch.setattr(loop, "LOG_PERIOD", 1)
        changes = {"SOLVER__CHECKPOINT_PERIOD": 4, "TEST__EVAL_PERIOD": 3}
        return folder, train_net(tiny_cfg(folder, **changes), engine="torchvision")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def losses(folder: Path) -> dict[int, dict[str, float]]:
    return {
        line["iteration"]: {k: v for k, v in line.items() if "loss" in k or k == "lr"}
        for line in metrics(folder)
        if "total_loss" in line
    }


def model(folder: Path, name: str = "model_final") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}.pth", weights_only=True)["model"]


def test_a_run_leaves_what_detectron2_leaves(whole):
    folder, results = whole
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.json", "last_checkpoint", "model_0000003.pth", "model_final.pth"} <= names
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert (
        load_config(get_cfg(), folder / "config.yaml")[0].dump()
        == tiny_cfg(folder, SOLVER__CHECKPOINT_PERIOD=4, TEST__EVAL_PERIOD=3).dump()
    )
    detections = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert {d["image_id"] for d in detections} == set(range(1, 7))
    assert {d["category_id"] for d in detections} <= {3, 7}
    assert set(detections[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert set(results) == {"bbox", "segm"}
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-red", "AP-green"} == set(results["bbox"])


def test_metrics_have_detectron2s_names(whole):
    folder, results = whole
    lines = metrics(folder)
    assert list(losses(folder)) == [0, 1, 2, 3, 4, 5]
    for line in lines[:-1]:
        assert {"iteration", "total_loss", "lr", "time", "data_time", "eta_seconds"} | LOSSES <= set(line)
        assert line["total_loss"] == pytest.approx(sum(line[name] for name in LOSSES))
    assert [("bbox/AP" in line) for line in lines] == [False, False, True, False, False, False, True]
    assert lines[-1]["iteration"] == 6
    assert lines[-1]["segm/AP50"] == results["segm"]["AP50"]
    lrs = [lines[i]["lr"] for i in range(6)]
    assert lrs == pytest.approx([0.00001, 0.005005, 0.01, 0.01, 0.001, 0.001])


def test_frozen_tensors_stay_and_all_others_learn(whole):
    folder, _ = whole
    before, after = model(folder, "model_0000003"), model(folder)
    for name, tensor in after.items():
        if name.startswith("backbone.bottom_up."):
            assert torch.equal(tensor, before[name]), name
        elif name.endswith("weight"):
            assert not torch.equal(tensor, before[name]), name


def test_a_stopped_run_resumes_to_the_same_numbers(whole, tmp_path, monkeypatch):
    forward, done = TorchvisionEngine.losses, []

    def stop_in_the_third(*args):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args)

    monkeypatch.setattr(TorchvisionEngine, "losses", stop_in_the_third)
    cfg = tiny_cfg(tmp_path)
    with pytest.raises(UserError, match=r"stopped by SIGTERM after iteration 3.*model_0000002.pth.*--resume"):
        train_net(cfg, engine="torchvision")
    monkeypatch.setattr(TorchvisionEngine, "losses", forward)
    torch.rand(17)  # what happened to the generator in between must not matter
    results = train_net(cfg, engine="torchvision", resume=True)
    folder, expected = whole
    assert losses(tmp_path) == losses(folder)
    assert results == expected
    for name, tensor in model(folder).items():
        assert torch.equal(model(tmp_path)[name], tensor), name


def test_resuming_a_finished_run_only_evaluates(whole, monkeypatch):
    folder, expected = whole
    monkeypatch.setattr(TorchvisionEngine, "train_batches", None)  # would fail
    assert train_net(tiny_cfg(folder), engine="torchvision", resume=True) == expected


def test_evaluation_alone_gives_the_final_numbers(whole, tmp_path):
    folder, expected = whole
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=folder / "model_final.pth")
    for evaluator in ("hotcoco", "pycocotools"):
        assert train_net(cfg, engine="torchvision", eval_only=True, evaluator=evaluator) == expected
    assert not (tmp_path / "model_final.pth").exists()
    assert metrics(tmp_path)[0]["bbox/AP"] == expected["bbox"]["AP"]


def test_resume_without_a_checkpoint_starts_from_the_weights(whole, tmp_path):
    folder, _ = whole
    cfg = tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), DATASETS__TEST=())
    assert train_net(cfg, engine="torchvision", resume=True) == {}
    assert losses(tmp_path)[0]["total_loss"] == losses(folder)[0]["total_loss"]


def test_a_changed_frozen_tensor_is_an_error(tmp_path, monkeypatch):
    step = solver.optimizer_step
    seen = []

    def and_touch_the_backbone(cfg, loss, optimizer, scaler, *rest):
        step(cfg, loss, optimizer, scaler, *rest)
        seen[0].backbone.bottom_up.res4[0].conv1.weight.data += 1e-3

    build = TorchvisionEngine.build_model
    monkeypatch.setattr(TorchvisionEngine, "build_model", lambda self, cfg: seen.append(build(self, cfg)) or seen[0])
    monkeypatch.setattr(solver, "optimizer_step", and_touch_the_backbone)
    cfg = tiny_cfg(tmp_path, SOLVER__MAX_ITER=1, SOLVER__STEPS=(), DATASETS__TEST=())
    with pytest.raises(RuntimeError, match=r"backbone.bottom_up.res4.0.conv1.weight changed"):
        train_net(cfg, engine="torchvision")


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, monkeypatch):
    def broken(self, model, batch):
        return {**model(batch), "loss_mask": torch.tensor(float("nan"), requires_grad=True)}

    monkeypatch.setattr(TorchvisionEngine, "losses", broken)
    with pytest.raises(UserError, match=r"at iteration 0 loss_mask = nan; lower SOLVER.BASE_LR"):
        train_net(tiny_cfg(tmp_path), engine="torchvision")
    assert not (tmp_path / "last_checkpoint").exists()


def test_c5_a_detector_of_other_classes_is_trained_on_with_new_heads(tmp_path):
    given = build_model(tiny_cfg(tmp_path / "other", MODEL__ROI_HEADS__NUM_CLASSES=7)).state_dict()
    torch.save({"model": given}, tmp_path / "other.pth")
    cfg = tiny_cfg(tmp_path / "run", MODEL__WEIGHTS=tmp_path / "other.pth", SOLVER__MAX_ITER=1, SOLVER__STEPS=())
    with pytest.raises(UserError, match=r"for 7 classes .*NUM_CLASSES is 2; .*loco-det train --new-heads"):
        train_net(cfg, engine="torchvision")
    with pytest.raises(UserError, match=r"--new-heads .*--eval-only"):
        train_net(cfg, engine="torchvision", new_heads=True, eval_only=True)
    train_net(cfg, engine="torchvision", new_heads=True)
    found = json.loads((tmp_path / "run/run.json").read_text())["weights"]["new_heads"]
    assert {head: len(names) for head, names in found.items()} == {"box predictor": 4, "mask predictor": 2}


def test_the_record_takes_the_hash_that_the_index_knows(tmp_path, monkeypatch):
    cfg, opened = tiny_cfg(tmp_path), []
    sets = {name: find_dataset(name) for name in ("tiny_train", "tiny_val")}
    for dataset in sets.values():
        load_index(dataset.annotations)
    monkeypatch.setattr(run_record, "open", lambda path, mode: opened.append(path), raising=False)
    run_record.write_record(cfg, "torchvision", None)
    found = json.loads((tmp_path / "run.json").read_text())["datasets"]
    assert opened == []
    for name, dataset in sets.items():
        content = dataset.annotations.read_bytes()
        assert found[name] == {
            "path": str(dataset.annotations.absolute()),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "images": str(dataset.images.absolute()),
        }


def test_a_negative_seed_is_drawn_and_kept_for_the_resume(tmp_path):
    changes = {"SOLVER__STEPS": (), "SOLVER__WARMUP_ITERS": 0, "DATASETS__TEST": ()}
    train_net(tiny_cfg(tmp_path / "a", SEED=-1, SOLVER__MAX_ITER=1, **changes), engine="torchvision")
    seed = torch.load(tmp_path / "a" / "model_final.pth", weights_only=True)["loco_det"]["seed"]
    train_net(tiny_cfg(tmp_path / "a", SEED=-1, SOLVER__MAX_ITER=2, **changes), engine="torchvision", resume=True)
    train_net(tiny_cfg(tmp_path / "b", SEED=seed, SOLVER__MAX_ITER=2, **changes), engine="torchvision")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_fine_tuning_in_mixed_precision_with_clipping_changes_the_backbone(tmp_path):
    cfg = tiny_cfg(
        tmp_path,
        MODEL__BACKBONE__FREEZE_AT=0,
        MODEL__RESNETS__NORM="BN",
        SOLVER__AMP__ENABLED=True,
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
        SOLVER__MAX_ITER=2,
        SOLVER__STEPS=(),
        SOLVER__CHECKPOINT_PERIOD=1,
        DATASETS__TEST=(),
    )
    train_net(cfg, engine="torchvision")
    before, after = model(tmp_path, "model_0000000"), model(tmp_path)
    for part in ("stem.conv1.weight", "res5.1.conv2.weight", "stem.conv1.norm.running_mean"):
        assert not torch.equal(before[f"backbone.bottom_up.{part}"], after[f"backbone.bottom_up.{part}"]), part


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 80}, {}, ["tiny_train has 2 classes", "NUM_CLASSES is 80"]),
        ({"DATASETS__TRAIN": ()}, {}, ["DATASETS.TRAIN is empty"]),
        ({"DATASETS__TRAIN": ("absent_train",)}, {}, ["absent_train", "does not exist"]),
        ({"DATASETS__TEST": ("absent_val",)}, {}, ["absent_val", "does not exist"]),
        ({"DATASETS__TEST": ()}, {"eval_only": True}, ["DATASETS.TEST is empty"]),
        ({}, {"eval_only": True}, ["MODEL.WEIGHTS is empty"]),
        ({}, {"engine": "caffe"}, ["no engine 'caffe'"]),
        ({"MODEL__DEVICE": "gpu"}, {}, ["gpu"]),
        ({"SOLVER__IMS_PER_BATCH": 0}, {}, ["SOLVER.IMS_PER_BATCH is 0"]),
        ({"SOLVER__CHECKPOINT_PERIOD": 0}, {}, ["SOLVER.CHECKPOINT_PERIOD is 0"]),
        ({"GLOBAL__HACK": 2.0}, {}, ["GLOBAL.HACK is 2.0", "--engine detectron2"]),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, changes, arguments, words):
    with pytest.raises(UserError) as refused:
        train_net(tiny_cfg(tmp_path, **changes), **{"engine": "torchvision", **arguments})
    for word in words:
        assert word in str(refused.value)
    assert not (tmp_path / "model_final.pth").exists()


def test_an_empty_output_dir_is_refused():
    with pytest.raises(UserError, match="OUTPUT_DIR is empty"):
        train_net(tiny_cfg(""), engine="torchvision")


def test_a_test_set_of_other_classes_is_refused_before_training(tmp_path, data, monkeypatch):
    annotations = find_dataset("tiny_val").annotations
    content = json.loads(annotations.read_text())
    content["categories"].append({"id": 9, "name": "blue"})
    other = tmp_path / "other"
    (other / "annotations").mkdir(parents=True)
    (other / "val").symlink_to(data / "tiny" / "val")
    (other / "train").symlink_to(data / "tiny" / "train")
    (other / "annotations" / "instances_val.json").write_text(json.dumps(content))
    (other / "annotations" / "instances_train.json").write_bytes(find_dataset("tiny_train").annotations.read_bytes())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=("other_train",), DATASETS__TEST=("other_val",))
    with pytest.raises(UserError, match=r"other_val has 3 classes and MODEL.ROI_HEADS.NUM_CLASSES is 2"):
        train_net(cfg, engine="torchvision")


def test_detectron2_is_asked_for_by_name_only_where_it_is(monkeypatch):
    monkeypatch.setattr(engine_d2, "installed", lambda: False)
    with pytest.raises(UserError, match=r"Detectron2 is not installed here; use --engine torchvision"):
        choose_engine("detectron2")
    assert choose_engine("auto").name == "torchvision"
    monkeypatch.setattr(engine_d2, "installed", lambda: True)
    assert choose_engine("auto").name == "detectron2"


def test_with_detectron2_as_reader_a_training_sets_oddities_are_told_before_its_model_is_built(
    data, tmp_path, monkeypatch, caplog
):
    """This package's loader, which would tell them, is not asked then; nor does it look for the test set's images."""
    content = json.loads(find_dataset("tiny_train").annotations.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = [value / 1000 for value in annotation["bbox"]]
    other = tmp_path / "other" / "annotations"
    other.mkdir(parents=True)
    (other / "instances_train.json").write_text(json.dumps(content))
    (other / "instances_val.json").write_bytes(find_dataset("tiny_val").annotations.read_bytes())
    for split in ("train", "val"):
        (tmp_path / "other" / split).mkdir()  # without images
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = tiny_cfg(tmp_path / "out", DATASETS__TRAIN=("other_train",), DATASETS__TEST=("other_val",))
    monkeypatch.setattr(engine_d2, "installed", lambda: True)

    class Reached(Exception):
        """The data are validated."""

    def build_model(*_):
        raise Reached

    monkeypatch.setattr(engine_d2.Detectron2Engine, "build_model", build_model)
    with pytest.raises(Reached):
        train_net(cfg, engine="detectron2")
    assert "box in units of the image" in caplog.text
    with pytest.raises(UserError, match=r"not in .*other/val"):
        train_net(cfg, engine="torchvision")


def test_two_processes_share_the_work(tmp_path):
    cfg = tiny_cfg(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SOLVER__CHECKPOINT_PERIOD=1)
    launch(command._worker, 2, cfg, EXACT)
    lines = metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [1, 2]  # one writer, and LOG_PERIOD is 20 over there
    assert "bbox/AP" in lines[-1]
    detections = json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())
    images = [d["image_id"] for d in detections]
    assert set(images) == set(range(1, 7))
    assert images == sorted(images)
    assert len(images) == 60  # ten an image, none twice
    assert not any(name.startswith("module.") for name in model(tmp_path))


def test_an_error_in_two_processes_is_one_sentence(tmp_path):
    cfg = tiny_cfg(tmp_path, SOLVER__IMS_PER_BATCH=3)
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH is 3, which 2 processes"):
        launch(command._worker, 2, cfg, EXACT)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.fixture
def third(data, tmp_path_factory, monkeypatch) -> Path:
    """An image of a copy of the data that the third iteration is the first to take."""
    root = shutil.copytree(data, tmp_path_factory.mktemp("bad") / "copy")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    batches = itertools.islice(build_train_loader(tiny_cfg(root / "none")), 3)
    names = [[sample["file_name"] for sample in batch] for batch in batches]
    return Path(next(name for name in names[2] if name not in names[0] + names[1]))


def test_a2_a_training_that_ends_by_its_data_is_saved_and_resumed_when_they_are_mended(whole, third, tmp_path, caplog):
    sound = third.read_bytes()
    cut(third)
    with pytest.raises(UserError, match=rf"1 of .* images.*--max-bad-share 0 .*{third.name}"):
        train_net(tiny_cfg(tmp_path), engine="torchvision", max_bad_share=0)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    third.write_bytes(sound)
    train_net(tiny_cfg(tmp_path), engine="torchvision", resume=True)
    assert losses(tmp_path) == losses(whole[0])
    cut(third)
    train_net(tiny_cfg(tmp_path / "endured"), engine="torchvision", max_bad_share=0.1)
    assert f"{third.name}: " in caplog.text
    assert losses(tmp_path / "endured").keys() == losses(whole[0]).keys()


def test_a2_two_processes_end_together_and_are_saved(third, tmp_path):
    cfg = tiny_cfg(tmp_path, SOLVER__CHECKPOINT_PERIOD=1000)
    cut(third)
    with pytest.raises(UserError, match=rf"--max-bad-share 0 .*{third.name}"):
        launch(command._worker, 2, cfg, {**EXACT, "max_bad_share": 0.0})
    saved = tmp_path / (tmp_path / "last_checkpoint").read_text()
    assert torch.load(saved, weights_only=True)["iteration"] in (0, 1)


@pytest.mark.parametrize("failing", [1, 3])  # at an evaluation; after the last step
def test_a_run_that_precise_batch_norm_ended_is_resumed_with_its_evaluation(failing, tmp_path, monkeypatch):
    """Its statistics depend on sampled regions too, so they must be drawn alike."""
    head = {"NAME": "FastRCNNConvFCHead", "NUM_CONV": 1, "CONV_DIM": 8, "NORM": "BN"}
    changes = {f"MODEL__ROI_BOX_HEAD__{key}": value for key, value in head.items()}
    changes |= {"TEST__PRECISE_BN__ENABLED": True, "TEST__PRECISE_BN__NUM_ITER": 2, "TEST__EVAL_PERIOD": 2}
    changes |= {"MODEL__MASK_ON": False, "SOLVER__MAX_ITER": 4, "SOLVER__STEPS": (3,)}
    train_net(tiny_cfg(tmp_path / "whole", **changes), engine="torchvision")
    recompute = loop.precise_bn.recompute

    def fail(cfg, engine, network, iteration):
        recompute(cfg, engine, network, iteration)
        if iteration == failing:
            for name, value in network.named_buffers():
                if name.startswith("roi_heads.") and name.endswith("running_mean"):
                    value.fill_(7)  # half done
            raise UserError("an image cannot be read")

    monkeypatch.setattr(loop.precise_bn, "recompute", fail)
    cfg = tiny_cfg(tmp_path / "ended", **changes)
    with pytest.raises(UserError, match="an image"):
        train_net(cfg, engine="torchvision")
    assert (tmp_path / "ended/last_checkpoint").read_text() == f"model_{failing:07d}.pth"
    monkeypatch.setattr(loop.precise_bn, "recompute", recompute)
    torch.rand(17)
    train_net(cfg, engine="torchvision", resume=True)
    timeless = [
        [{key: v for key, v in line.items() if "time" not in key and key != "eta_seconds"} for line in metrics(folder)]
        for folder in (tmp_path / "ended", tmp_path / "whole")
    ]
    assert timeless[0] == timeless[1]
    assert sum("bbox/AP" in line for line in timeless[0]) == 2
    for name, tensor in model(tmp_path / "whole").items():
        if not name.endswith("num_batches_tracked"):  # which counts what was repeated
            assert torch.equal(model(tmp_path / "ended")[name], tensor), name


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a2_a_share_out_of_range_is_refused(tmp_path, share):
    with pytest.raises(UserError, match="--max-bad-share"):
        train_net(tiny_cfg(tmp_path), engine="torchvision", max_bad_share=share)


def test_metrics_of_an_earlier_run_are_dropped(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    stale = [json.dumps({"iteration": i, "total_loss": -1.0}) for i in (0, 1, 500)]
    (tmp_path / "metrics.json").write_text("\n".join([*stale, '{"iteration": 7, "tot']) + "\n")
    train_net(tiny_cfg(tmp_path, SOLVER__MAX_ITER=1), engine="torchvision")
    assert all(line.get("total_loss", 0) >= 0 for line in metrics(tmp_path))


# --- checks before the first step -------------------------------------------------------------------------------


@pytest.fixture
def odd_data(tmp_path, monkeypatch) -> Path:
    """The tiny data sets, to be spoiled; their annotation folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_tiny(tmp_path / "data")))
    return tmp_path / "data" / "tiny" / "annotations"


def change(path: Path, spoil: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: c["annotations"][3].pop("segmentation"), "annotation 4 has no segmentation"),
        (lambda c: c["annotations"].clear(), "no annotations at all"),
        (lambda c: c["images"][2].update(file_name="gone.png"), "gone.png"),
        (lambda c: c["annotations"][3].update(id=1), "annotation id that occurs twice"),
    ],
)
def test_a_test_set_that_no_evaluation_takes_stops_a_run_before_its_first_step(odd_data, tmp_path, spoil, words):
    change(odd_data / "instances_val.json", spoil)
    with pytest.raises(UserError, match=words):
        train_net(tiny_cfg(tmp_path / "out"), engine="torchvision")
    assert not list((tmp_path / "out").glob("metrics.json"))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_sets_without_areas_with_odd_spellings_and_a_line_of_pixels_train_to_their_ap(odd_data, tmp_path):
    clean = train_net(tiny_cfg(tmp_path / "clean"), engine="torchvision")

    def odd(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image.update(id=str(image["id"]), width=float(image["width"]), file_name=f"C:\\x\\{image['file_name']}")
        for entry in content["annotations"]:
            entry.update(image_id=float(entry["image_id"]), iscrowd=None, bbox=list(map(str, entry["bbox"])))
            del entry["area"]

    for split in ("train", "val"):
        change(odd_data / f"instances_{split}.json", odd)
    found = train_net(tiny_cfg(tmp_path / "odd"), engine="torchvision")
    assert found["bbox"].keys() == clean["bbox"].keys()
    np.testing.assert_equal(found, clean)

    def line(content: dict[str, Any]) -> None:
        content["images"].append({"id": "99", "file_name": "line.png", "width": 3000, "height": 1})
        extra = {"id": 99, "image_id": "99", "bbox": [5, 0, 900, 1], "segmentation": [[5, 0, 905, 0, 905, 1, 5, 1]]}
        content["annotations"].append({**content["annotations"][0], **extra})

    for split in ("train", "val"):
        change(odd_data / f"instances_{split}.json", line)
        Image.new("RGB", (3000, 1)).save(odd_data.parent / split / "line.png")
    found = train_net(tiny_cfg(tmp_path / "line"), engine="torchvision")
    assert found["bbox"].keys() == clean["bbox"].keys()
