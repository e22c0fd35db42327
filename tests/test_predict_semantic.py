"""`loco-det predict` with a semantic segmentor: coloured pictures, a legend, labels as PNG, COCO's JSON for stuff."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapes_cases import write_cityscapes
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tiny_detection import TINY

from loco_det.annotations import pixels
from loco_det.cli import main
from loco_det.core.config import load_config
from loco_det.detection.keys import get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.report.drawing import class_colours, draw_labels, draw_legend

CONFIG = "configs/cityscapes_semantic_loco_r50.yaml"
LEFT_OUT = ("MODEL.WEIGHTS", "SEED", "DATASETS.TRAIN", "DATASETS.TEST")
SETTINGS = [str(part) for key, value in TINY.items() if key not in LEFT_OUT for part in (key, value)]
SETTINGS += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"]
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a made-up Cityscapes and `segmentor.pth`, which finds several classes in an image."""
    root = tmp_path_factory.mktemp("segment")
    write_cityscapes(root, images=3)
    torch.manual_seed(0)
    model = build_model(load_config(get_cfg(), CONFIG, SETTINGS)[0])
    torch.save({"model": model.state_dict()}, root / "segmentor.pth")
    return root


def predict(place: Path, out: Path, *arguments: object) -> int:
    fixed = ["--config-file", CONFIG, "--weights", place / "segmentor.pth", "--out", out]
    engine = [] if "--engine" in arguments else ["--engine", "torchvision"]
    return main(["predict", *map(str, [*arguments, *fixed]), *engine, "--opts", *SETTINGS])


def val(place: Path) -> Path:
    return place / "cityscapes" / "leftImg8bit" / "val"


@pytest.mark.parametrize("engine", ENGINES)
def test_labels_are_those_of_an_evaluation(
    engine: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(place))
    changes = ["MODEL.WEIGHTS", str(place / "segmentor.pth"), "OUTPUT_DIR", str(tmp_path / "run")]
    train_net(load_config(get_cfg(), CONFIG, [*SETTINGS, *changes])[0], engine=engine, eval_only=True)
    assert predict(place, tmp_path / "out", val(place), "--engine", engine, "--batch-size", 2, "--exact") == 0
    written = sorted((tmp_path / "out" / "sem_seg").glob("*/*.png"))
    evaluated = sorted((tmp_path / "run" / "inference" / "sem_seg").glob("*.png"))
    assert [path.name for path in written] == [path.name for path in evaluated] != []
    for mine, theirs in zip(written, evaluated):
        labels = np.array(Image.open(mine))
        assert np.array_equal(labels, np.array(Image.open(theirs)))
        assert len(np.unique(labels)) > 1


def test_the_json_says_what_the_pngs_say(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))  # Cityscapes' classes are known all the same
    assert predict(place, tmp_path, val(place), "--no-pictures") == 0
    results = json.loads((tmp_path / "sem_seg_predictions.json").read_text())
    truth = COCO(str(tmp_path / "sem_seg.json"))
    assert [c["name"] for c in truth.dataset["categories"]] == list(pixels.CLASSES)
    assert len(truth.imgs) == 3
    for image in truth.imgs.values():
        labels = np.array(Image.open(tmp_path / "sem_seg" / f"{image['file_name'].removesuffix('.png')}_pred.png"))
        again = np.zeros_like(labels)
        for result in (r for r in results if r["file_name"] == image["file_name"]):
            assert result["image_id"] == image["id"]
            again[coco_mask.decode(result["segmentation"]).astype(bool)] = result["category_id"]
        assert np.array_equal(again, labels)
        own = truth.imgToAnns[image["id"]]
        assert {a["category_id"]: a["area"] for a in own} == {k: (labels == k).sum() for k in np.unique(labels)}
        for a in own:
            rows, columns = np.nonzero(labels == a["category_id"])
            corner, size = (columns.min(), rows.min()), (np.ptp(columns) + 1, np.ptp(rows) + 1)
            assert a["bbox"] == [*corner, *size]
    assert not list(tmp_path.rglob("*leftImg8bit.png"))


def test_pictures_are_coloured_over_a_legend(place: Path, tmp_path: Path) -> None:
    image = sorted(val(place).glob("*/*.png"))[0]
    assert predict(place, tmp_path, image) == 0
    drawn, own = np.array(Image.open(tmp_path / image.name)), np.array(Image.open(image))
    labels = np.array(Image.open(tmp_path / "sem_seg" / f"{image.stem}_pred.png"))
    assert drawn.shape[1] == own.shape[1]
    assert drawn.shape[0] > own.shape[0]
    legend = {tuple(colour) for colour in drawn[own.shape[0] :].reshape(-1, 3).tolist()}
    for k, label in enumerate(pixels.LABEL_IDS.tolist()):
        colour, inside = pixels.COLOURS[k], labels == label
        assert (colour in legend) == bool(inside.any()), pixels.CLASSES[k]
        expected = 0.4 * own[inside] + 0.6 * np.array(colour)
        assert np.abs(drawn[: own.shape[0]][inside] - expected).max(initial=0) < 1


def test_a_video_keeps_its_frames_and_labels(place: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for i in range(3):
        writer.write(np.full((64, 80, 3), 60 * i, dtype=np.uint8))
    writer.release()
    assert predict(place, tmp_path / "out", clip) == 0
    images = json.loads((tmp_path / "out" / "sem_seg.json").read_text())["images"]
    assert [image["frame"] for image in images] == [0, 1, 2]
    assert sorted(p.name for p in (tmp_path / "out/sem_seg/clip.avi").iterdir()) == [f"00000{i}.png" for i in range(3)]
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.avi.mp4"))
    shapes = []
    while (more := capture.read())[0]:
        shapes.append(more[1].shape)
    assert len(shapes) == 3
    assert shapes[0][0] > 64
    assert shapes[0][1] == 80


def test_other_classes_take_ids_and_colours_of_their_own(place: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {k}" for k in range(1, 20)))
    image = sorted(val(place).glob("*/*.png"))[0]
    assert predict(place, tmp_path, image, "--classes", names) == 0
    labels = np.array(Image.open(tmp_path / "sem_seg" / f"{image.stem}_pred.png"))
    assert set(np.unique(labels).tolist()) <= set(range(1, 20))
    # VOC's colour map as its development kit lists it: aeroplane, bicycle, bird, ..., tvmonitor is class 20.
    assert class_colours(names.read_text().split("\n"))[[0, 1, 2, 3, 18]].tolist() == [
        [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 192, 0]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--score-threshold", "0.3"], "takes no --score-threshold"),
        (["--export-onnx", "x.onnx"], "takes no --score-threshold"),
        (["--classes", "two.txt"], "names 2 classes and the model has 19"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], named: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "two.txt").write_text("a\nb\n")
    arguments = [str(tmp_path / a) if a.endswith((".txt", ".onnx")) else a for a in arguments]
    assert predict(place, tmp_path / "out", sorted(val(place).glob("*/*.png"))[0], *arguments) == 2
    assert named in capsys.readouterr().err


def test_labels_by_hand() -> None:
    pixels = np.full((2, 3, 3), 100, np.uint8)
    labels = np.array([[0, 1, 255], [1, 1, 0]])
    colours = np.array([[200, 0, 0], [0, 0, 50]], np.uint8)
    drawn = draw_labels(pixels, labels, colours)
    assert drawn[0].tolist() == [[160, 40, 40], [40, 40, 70], [100, 100, 100]]
    assert np.array_equal(draw_labels(pixels, labels, colours, width=6)[::2, ::2], drawn)
    rows = [draw_legend(["ab"] * count, np.repeat(colours[:1], count, 0), (50, 40)).shape for count in (1, 2, 5)]
    assert [height // rows[0][0] for height, *_ in rows] == [1, 1, 3]
    assert {width for _, width, _ in rows} == {40}
