"""loco-det doctor: each check on a healthy and on a broken machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import cv2
import pytest
import torch
import torchvision

from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.cli import main
from loco_det.commands import doctor
from loco_det.commands.doctor import Check, examine, examine_config
from loco_det.detection import engine_d2

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/coco_loco_r50.yaml"
MACHINE = (
    "python",
    "torch",
    "torchvision",
    "opencv",
    "hotcoco",
    "packages",
    "gpu",
    "detectron2",
    "data sets",
    "disk",
    "shared memory",
)
NEW_LAYERS = ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
WITHOUT_NORMS = [text for part in NEW_LAYERS for text in (f"MODEL.{part}.NORM", "")]
Usage = namedtuple("Usage", "total used free")


def named(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty dataset root, so that a test finds only what it puts there."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


@pytest.fixture
def without_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_d2, "installed", lambda: False)


def add_coco(root: Path, classes: int = 80) -> None:
    (root / "coco" / "annotations").mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": f"c{i}"} for i in range(1, classes + 1)],
    }
    for split in ("train2017", "val2017"):
        (root / "coco" / split).mkdir()
        (root / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-50 with its manifest."""
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    network = ResNet(50)
    save_backbone(path, backbone_tensors(network), describe(network, stem="imagenet", method="loco"))
    return path


# --- the machine ------------------------------------------------------------------------------------------------


def test_a_sound_machine_passes(without_detectron2: None, datasets: Path) -> None:
    add_coco(datasets)
    checks = examine()
    assert tuple(check.name for check in checks) == MACHINE
    assert [check for check in checks if check.status == "fail"] == []
    assert named(checks, "torch").found.startswith(torch.__version__)
    assert "nms and roi_align run on cpu" in named(checks, "torchvision").found
    assert "coco_2017_train, coco_2017_val under" in named(checks, "data sets").found
    assert all(check.advice for check in checks if check.status == "note")


def test_data_sets_of_every_kind_are_listed_and_not_read(without_detectron2: None, datasets: Path) -> None:
    assert "no COCO, LVIS, Pascal VOC or Cityscapes under" in named(examine(), "data sets").found
    places = ("VOC2007/Annotations", "VOC2007/JPEGImages", "VOC2007/ImageSets/Main", "VOC2012/Annotations")
    for place in (*places, "cityscapes/leftImg8bit/val", "cityscapes/gtFine/val", "cityscapes/gtFine/train"):
        (datasets / place).mkdir(parents=True)
    (datasets / "VOC2007/ImageSets/Main/test.txt").write_text("what is listed here is not read")
    check = named(examine(), "data sets")
    assert check.status == "ok"
    listed = check.found.partition(" under ")[0].split(", ")
    assert listed == ["voc_2007_test", "cityscapes_fine_instance_seg_val", "cityscapes_fine_sem_seg_val"]


def test_operators_that_compute_wrongly_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.ops, "nms", lambda boxes, scores, threshold: torch.arange(len(boxes)))
        assert named(examine(), "torchvision").status == "fail"
    with monkeypatch.context() as patch:
        patch.setattr(torchvision.ops, "roi_align", lambda *args, **kwargs: torch.tensor([[[[36.0]]]]))  # not aligned
        check = named(examine(), "torchvision")
    assert check.status == "fail"
    assert "pip install" in check.advice


def test_operators_that_cannot_run_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("Couldn't load custom C++ ops.\nThis can happen if\n...")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    check = named(examine(), "torchvision")
    assert check.status == "fail"
    assert check.found == "RuntimeError: Couldn't load custom C++ ops."


def test_a_package_that_cannot_be_imported_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "jinja2", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    checks = examine()
    assert "timm" in named(checks, "packages").found
    assert "jinja2" in named(checks, "packages").found
    assert named(checks, "packages").status == named(checks, "opencv").status == "fail"
    assert "cv2" in named(checks, "opencv").found


def test_a_machine_without_torch_still_gets_its_table() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.modules['torchvision'] = None\n"
        "from loco_det.cli import main\n"
        f"sys.exit(main(['doctor', '--json', '--config-file', {CONFIG!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    for name in ("torch", "torchvision", "config"):
        assert checks[name]["status"] == "fail"
        assert "torch" in checks[name]["found"]
    assert checks["opencv"]["status"] == "ok"


@pytest.mark.parametrize(
    ("version", "status"), [("2.3.1", "fail"), ("2.4.0+cpu", "ok"), ("2.10.0", "ok"), ("3.0", "ok")]
)
def test_an_old_torch(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor._torch().status == status


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    check = doctor._python()
    assert (check.status, check.advice) == ("fail", "use Python 3.10 or newer")


def test_an_evaluator_that_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    from loco_det.evaluation import coco

    real = coco.evaluate_coco

    def wrong(*args: object, evaluator: str) -> dict:
        results = real(*args, evaluator=evaluator)
        if evaluator == "hotcoco":
            results["bbox"]["AP"] += 1e-6
        return results

    monkeypatch.setattr(coco, "evaluate_coco", wrong)
    check = named(examine(), "hotcoco")
    assert check.status == "fail"
    assert "--evaluator pycocotools" in check.advice


def test_a_broken_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda data, flag: None)
    assert named(examine(), "opencv").status == "fail"


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    device = namedtuple("Device", "name total_memory")("NVIDIA H100", 80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: device)
    problem = [""]
    monkeypatch.setattr(doctor, "_gpu_problem", lambda: problem[0])
    monkeypatch.setattr("loco_det.core.device.usable_cores", lambda: 24)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    check = doctor._gpu()
    assert check.status == "ok"
    assert check.found.startswith("NVIDIA H100 (80 GiB), NVIDIA H100 (80 GiB)")
    assert "12 cores a GPU" in check.found
    monkeypatch.setattr("loco_det.core.device.usable_cores", lambda: 4)
    assert (doctor._gpu().status, "2 cores a GPU" in doctor._gpu().found) == ("note", True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "no NCCL" in doctor._gpu().found
    problem[0] = "RuntimeError: no kernel image"
    assert (doctor._gpu().status, "no kernel image" in doctor._gpu().found) == ("fail", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
    assert doctor._gpu().status == "fail"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([]))
    assert doctor._gpu().status == "note"


def test_detectron2_that_was_compiled_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(engine_d2, "installed", lambda: True)
    monkeypatch.setattr(engine_d2, "version", broken)
    check = doctor._detectron2()
    assert check.status == "fail"
    assert "undefined symbol" in check.found
    assert "--engine torchvision" in check.advice


@pytest.mark.detectron2
def test_detectron2_itself() -> None:
    detectron2 = pytest.importorskip("detectron2")
    assert doctor._detectron2() == Check("detectron2", "ok", f"{detectron2.__version__}, its operators load")


def test_no_data_sets_is_a_note_that_says_where_to_put_them(datasets: Path) -> None:
    check = doctor._data_sets()
    assert check.status == "note"
    assert str(datasets) in check.found
    assert "DETECTRON2_DATASETS" in check.advice


def test_room_on_disk_and_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 * 2**20, 0, 64 * 2**20))
    assert doctor._disk(tmp_path).status == "note"
    if Path("/dev/shm").is_dir():
        assert doctor._shared_memory().status == "fail"
        assert "--shm-size" in doctor._shared_memory().advice
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**29, 0, 2**29))
    if Path("/dev/shm").is_dir():
        assert doctor._shared_memory().status == "note"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**40, 0, 2**40))
    assert doctor._disk(tmp_path / "not" / "yet").status == "ok"
    assert str(tmp_path) in doctor._disk(tmp_path / "not" / "yet").found
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    assert doctor._disk(tmp_path).status == "fail"
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    assert doctor._disk(tmp_path / "file").status == "fail"


# --- a configuration with its data and weights ------------------------------------------------------------------


def config_check(name: str, overrides: list[str], weights: Path | None = None) -> Check:
    return named(examine_config(CONFIG, overrides, weights and str(weights)), name)


def test_a_config_that_is_ready(without_detectron2: None, datasets: Path, backbone: Path, tmp_path: Path) -> None:
    add_coco(datasets)
    checks = examine_config(CONFIG, [*WITHOUT_NORMS, "OUTPUT_DIR", str(tmp_path / "run")], str(backbone))
    assert {check.name: check.status for check in checks} == {
        "config": "ok",
        "data set coco_2017_train": "ok",
        "data set coco_2017_val": "ok",
        "weights": "ok",
        "schedule": "ok",
        "norm": "ok",
        "loaders": "ok",
        "output": "ok",
    }
    assert not (tmp_path / "run").exists()


def test_data_sets_that_are_missing_or_have_other_classes(without_detectron2: None, datasets: Path) -> None:
    check = config_check("data set coco_2017_val", [])
    assert check.status == "fail"
    assert "instances_val2017.json" in check.found
    add_coco(datasets, classes=7)
    check = config_check("data set coco_2017_val", [])
    assert check.status == "fail"
    assert "MODEL.ROI_HEADS.NUM_CLASSES 7" in check.found


def add_data_set(root: Path, name: str, split: str, classes: list[str]) -> None:
    (root / name / "annotations").mkdir(parents=True)
    (root / name / split).mkdir()
    categories = [{"id": i, "name": label} for i, label in enumerate(classes)]
    content = {"images": [], "annotations": [], "categories": categories}
    (root / name / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def test_training_sets_are_compared_and_a_missing_class_is_told_once(
    without_detectron2: None, datasets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_data_set(datasets, "one", "train", ["cat", "dog"])
    add_data_set(datasets, "two", "train", ["dog", "cat"])
    add_data_set(datasets, "few", "val", ["dog"])
    sets = ["DATASETS.TRAIN", "('one_train', 'two_train')", "DATASETS.TEST", "('few_val',)"]
    checks = examine_config(CONFIG, [*sets, "MODEL.ROI_HEADS.NUM_CLASSES", "2"])
    assert named(checks, "data set one_train").status == "ok"
    other = named(checks, "data set two_train")
    assert (other.status, "two_train and one_train differ in their classes" in other.found) == ("fail", True)
    few = named(checks, "data set few_val")
    assert (few.status, few.found) == ("note", "has no category for cat")
    assert "no category" not in caplog.text


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["INPUT.FORMAT", "BGR"], "INPUT.FORMAT"),
        (["MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"], "MODEL.PIXEL_MEAN"),
        (["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"], "MODEL.PIXEL_STD"),
        (["MODEL.RESNETS.DEPTH", "101"], "MODEL.RESNETS.DEPTH"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "MODEL.RESNETS.STRIDE_IN_1X1"),
        (["MODEL.RESNETS.WIDTH_PER_GROUP", "128"], "tensor res2.0.conv1"),
    ],
)
def test_weights_that_contradict_the_config(
    overrides: list[str], key: str, without_detectron2: None, backbone: Path
) -> None:
    check = config_check("weights", overrides, backbone)
    assert check.status == "fail"
    assert key in check.found


def test_weights_from_the_config_missing_damaged_or_none(
    without_detectron2: None, tmp_path: Path, backbone: Path
) -> None:
    assert "backbone_d2.pkl does not exist" in config_check("weights", []).found
    (tmp_path / "cut.safetensors").write_bytes(backbone.read_bytes()[:5000])
    assert config_check("weights", ["MODEL.WEIGHTS", str(tmp_path / "cut.safetensors")]).status == "fail"
    check = config_check("weights", ["MODEL.WEIGHTS", ""])
    assert (check.status, check.found) == ("note", "MODEL.WEIGHTS is empty: random values")


def test_weights_that_do_not_say_their_pixels(without_detectron2: None, tmp_path: Path) -> None:
    torch.save({"model": ResNet(50).state_dict()}, tmp_path / "bare.pth")
    check = config_check("weights", [], tmp_path / "bare.pth")
    assert check.status == "note", check
    assert "PIXEL_MEAN" in check.advice


def test_a_key_that_the_engine_cannot_honour(without_detectron2: None) -> None:
    check = config_check("config", ["MODEL.META_ARCHITECTURE", "RetinaNet"])
    assert check.status == "fail"
    assert "MODEL.META_ARCHITECTURE" in check.found


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.IMS_PER_BATCH", "2"], "would be 0.0025"),  # 0.02 * 2 / 16
        (["SOLVER.BASE_LR", "0.2"], "would be 0.02"),
        (["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0025"], None),
        (["SOLVER.BASE_LR", "0.0001", "SOLVER.OPTIMIZER", "AdamW"], None),  # the rule is SGD's
        (["SOLVER.MAX_ITER", "60000"], "shorten SOLVER.STEPS"),
        (["SOLVER.MAX_ITER", "60000", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], None),
    ],
)
def test_learning_rate_against_the_batch_and_steps_against_the_end(without_detectron2: None, overrides, words) -> None:
    check = config_check("schedule", overrides)
    assert check.status == ("ok" if words is None else "note")
    assert words is None or words in check.advice


@pytest.mark.parametrize(("gpus", "status"), [(0, "note"), (1, "note"), (2, "ok")])
def test_syncbn_without_a_second_gpu(without_detectron2: None, gpus, status, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    check = config_check("norm", ["MODEL.FPN.NORM", "SyncBN"])
    assert check.status == status
    assert "MODEL.FPN.NORM" in check.found
    assert config_check("norm", [*WITHOUT_NORMS, "MODEL.RESNETS.NORM", "FrozenBN"]).status == "ok"


TUNED = ["MODEL.BACKBONE.FREEZE_AT", "2"]


@pytest.mark.parametrize(
    ("overrides", "method", "words"),
    [
        ([*TUNED, "MODEL.RESNETS.NORM", "FrozenBN"], "loco", "set MODEL.RESNETS.NORM SyncBN"),
        ([*TUNED, "MODEL.RESNETS.NORM", "FrozenBN"], "MoCo v1/v2", "set MODEL.RESNETS.NORM SyncBN"),
        ([*TUNED, "MODEL.RESNETS.NORM", "FrozenBN"], "torchvision or timm ResNet", None),
        (["MODEL.RESNETS.NORM", "FrozenBN"], "loco", None),  # frozen
        ([*TUNED, "MODEL.RESNETS.NORM", "BN"], "loco", "have SyncBN"),
        ([*TUNED, "MODEL.RESNETS.NORM", "SyncBN"], "loco", None),
        ([*TUNED, *WITHOUT_NORMS, "MODEL.RESNETS.NORM", "SyncBN"], "loco", "set MODEL.FPN.NORM SyncBN"),
    ],
)
def test_norms_that_break_a_tuned_backbone(
    without_detectron2: None, overrides, method: str, words, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    network = ResNet(50)
    file = tmp_path / "b.safetensors"
    save_backbone(file, backbone_tensors(network), describe(network, stem="imagenet", method=method))
    check = config_check("norm", overrides, file)
    assert check.status == ("ok" if words is None else "note")
    assert words is None or words in check.advice


# --- the answer -------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(datasets: Path) -> None:
    noisy = (
        "import os, sys\nimport loco_det.commands.doctor as doctor\nfrom loco_det.cli import main\n"
        "def noise():\n    print('python noise')\n    os.write(1, b'native noise')\n"
        "    return doctor.Check('noise', 'ok', 'x')\n"
        "doctor._opencv = noise\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", noisy], capture_output=True, text=True, env=environment, timeout=120)
    answer = json.loads(done.stdout)
    assert set(answer) == {"loco_det", "ok", "checks"}
    assert [set(check) for check in answer["checks"]] == [{"name", "status", "found", "advice"}] * len(MACHINE)
    assert answer["ok"] is (done.returncode == 0)
    assert "python noise" in done.stderr
    assert "native noise" in done.stderr


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch):
    """Lets a test say what the examination of the machine finds."""

    def install(*checks: Check) -> None:
        monkeypatch.setattr(doctor, "examine", lambda: list(checks))

    return install


def test_the_status_is_1_only_for_a_failure(found, capsys: pytest.CaptureFixture) -> None:
    found(Check("a", "ok", "fine"), Check("b", "note", "slow [cpu]", "buy one"))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()] == [["check", "status"], ["a", "ok"], ["b", "note"]]
    assert "slow [cpu]" in out
    assert "buy one" in out
    found(Check("a", "ok", "fine"), Check("c", "fail", "broken", "mend it"))
    assert main(["doctor"]) == 1
    assert main(["doctor", "--json"]) == 1
    assert '"ok": false' in capsys.readouterr().out


def test_quiet_shows_only_what_needs_attention(found, capsys: pytest.CaptureFixture) -> None:
    found(Check("aaa", "ok", "fine"), Check("bbb", "note", "slow", "buy one"))
    assert main(["doctor", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "bbb" in out
    assert "aaa" not in out


def test_weights_of_another_project_are_a_note_since_train_converts_them(datasets: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "theirs.pth")
    check = config_check("weights", [], tmp_path / "theirs.pth")
    assert check.status == "note"
    assert "train converts it" in check.advice


@pytest.mark.parametrize(
    ("weights", "status", "text"),
    [("random:resnet18", "ok", "train measures"), ("timm:resnet18", "note", "timm:resnet18 is of another project")],
)
def test_weights_that_are_no_file(
    weights: str, status: str, text: str, datasets: Path, found, capsys: pytest.CaptureFixture
) -> None:
    found()
    main(["doctor", "--json", "--config-file", CONFIG, "--weights", weights])
    check = next(one for one in json.loads(capsys.readouterr().out)["checks"] if one["name"] == "weights")
    assert check["status"] == status
    assert text in check["found"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--weights", "absent.pkl", "--config-file", CONFIG], "absent.pkl does not exist"),
        (["--weights", "absent.pkl"], "give --config-file"),
        (["SOLVER.MAX_ITER", "1"], "give --config-file"),
        (["--config-file", "absent.yaml"], "absent.yaml"),
        (["--config-file", CONFIG, "SOLVER.MAX_ITERS", "1"], "SOLVER.MAX_ITER"),
        (["--config-file", "configs/pretrain/loco_r50.yaml"], "this is a pretraining file"),
    ],
)
def test_bad_input_is_status_2(argv: list[str], text: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--json", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
