"""All steps through the three commands as a user types them: images, pretraining, conversion, detector, AP."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import datasets_root

from loco_det.annotations.synthetic import make_shapes_dataset

ROOT = Path(__file__).resolve().parent.parent
SMALL_DETECTOR = [
    *("MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.0005"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
]


def command(commands: Path, script: str, *args: object, cwd: Path, data: Path) -> str:
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data)}
    line = [str(commands / "python"), str(ROOT / "tools" / script), *map(str, args)]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(folder: Path, results: int) -> None:
    last = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    assert 0 <= last["bbox/AP"] <= 100
    assert 0 <= last["segm/AP"] <= 100
    found = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert len(found) >= results
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= set(found[0])
    assert (folder / "model_final.pth").is_file()


def test_the_road_on_made_up_images(commands: Path, tmp_path: Path) -> None:
    if (datasets_root() / "coco" / "annotations" / "instances_val2017.json").is_file():
        pytest.skip("the test below goes the same road on real images")
    make_shapes_dataset(tmp_path / "datasets", train=8, val=4, size=64, seed=0)
    common = {"cwd": tmp_path, "data": tmp_path / "datasets"}
    images = tmp_path / "datasets" / "shapes" / "train"
    small = ["SOLVER.BATCH_SIZE", 4, "SOLVER.MAX_STEPS", 2, "DATA.IMAGE_SIZE", 32, "DATA.NUM_WORKERS", 0]
    options = ["DATA.PATH", images, "OUTPUT_DIR", "pretrained", *small]
    command(commands, "pretrain_net.py", "--config-file", "configs/pretrain/quickstart.yaml", *options, **common)
    account = command(commands, "convert_to_d2.py", "pretrained/backbone.safetensors", "backbone.pkl", **common)
    assert "converted   100" in account
    options = ["MODEL.WEIGHTS", "backbone.pkl", "OUTPUT_DIR", "detector", *SMALL_DETECTOR]
    options += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    command(
        commands,
        "train_net.py",
        "--config-file",
        "configs/quickstart.yaml",
        "--engine",
        "torchvision",
        *options,
        **common,
    )
    check(tmp_path / "detector", results=1)


def test_the_road_on_real_coco(commands: Path, real_coco: Path, tmp_path: Path) -> None:
    """The user's own three lines, made small by overrides."""
    common = {"cwd": tmp_path, "data": real_coco}
    small = ["SOLVER.BATCH_SIZE", 4, "SOLVER.MAX_STEPS", 1]
    options = ["DATA.PATH", real_coco / "coco" / "train2017", "DATA.IMAGE_SIZE", 64, "DATA.NUM_WORKERS", 0, *small]
    command(commands, "pretrain_net.py", "--config-file", "configs/pretrain/loco_r50.yaml", *options, **common)
    folder = "output/pretrain/loco_r50"
    command(commands, "convert_to_d2.py", f"{folder}/backbone.safetensors", f"{folder}/backbone_d2.pkl", **common)
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MAX_SIZE_TRAIN", 128, "INPUT.MIN_SIZE_TEST", 96]
    options = [*SMALL_DETECTOR, *sizes, "INPUT.MAX_SIZE_TEST", 128, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    options += ["TEST.DETECTIONS_PER_IMAGE", 5]
    engine = ["--engine", "torchvision"]
    command(commands, "train_net.py", "--config-file", "configs/coco_loco_r50.yaml", *engine, *options, **common)
    check(tmp_path / "output" / "coco_loco_r50", results=80)


@pytest.mark.parametrize("script", ["pretrain_net.py", "convert_to_d2.py", "train_net.py"])
def test_bad_input_is_one_sentence_and_status_2(script: str, commands: Path, tmp_path: Path) -> None:
    arguments = ["no.pth", "out.pkl"] if script == "convert_to_d2.py" else ["--config-file", "no.yaml"]
    line = [str(commands / "python"), str(ROOT / "tools" / script), *arguments]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert arguments[-2 if script == "convert_to_d2.py" else -1] in done.stderr
    assert not list(tmp_path.iterdir())
