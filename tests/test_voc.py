"""Pascal VOC: its XML against a parse by hand and Detectron2's, its AP against a slow loop and Detectron2's."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from tiny_detection import RESNET_18, overrides

from loco_det.annotations.coco import load_coco
from loco_det.annotations.index import load_index
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.voc import CLASSES, VOC_SETS, image_number
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.inference import build_measure
from loco_det.detection.keys import get_cfg
from loco_det.evaluation.voc import evaluate_voc

NAMES = ("car", "cat", "person", "tvmonitor")


def write_voc(root: Path, year: str, split: str, count: int = 12, seed: int = 0) -> list[str]:
    """A made-up VOCdevkit of noise images of 60 x 50 pixels with 0 to 5 objects; every third is difficult."""
    rng = np.random.default_rng(seed)
    folder = root / f"VOC{year}"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    ids = [f"{k:06d}" if year == "2007" else f"2008_{k:06d}" for k in rng.permutation(900)[:count].tolist()]
    for file_id in ids:
        tree = ElementTree.Element("annotation")
        size = ElementTree.SubElement(tree, "size")
        for side, pixels in (("width", 60), ("height", 50), ("depth", 3)):
            ElementTree.SubElement(size, side).text = str(pixels)
        for k in range(rng.integers(0, 6)):
            item = ElementTree.SubElement(tree, "object")
            x0, y0 = rng.integers(1, 30, 2).tolist()
            values = {
                "name": NAMES[rng.integers(4)],
                "pose": "Left",
                "truncated": "0",
                "difficult": str(int(k % 3 == 2)),
            }
            for key, value in values.items():
                ElementTree.SubElement(item, key).text = value
            box = ElementTree.SubElement(item, "bndbox")
            corners = {
                "xmax": x0 + int(rng.integers(5, 30)),
                "xmin": x0,
                "ymin": y0,
                "ymax": y0 + int(rng.integers(5, 20)),
            }
            for key, value in corners.items():
                ElementTree.SubElement(box, key).text = str(value)
        ElementTree.ElementTree(tree).write(folder / "Annotations" / f"{file_id}.xml")
        pixels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{file_id}.jpg")
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return ids


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path


def objects_of(root: Path, year: str, file_id: str) -> list[tuple[str, list[int], bool]]:
    """(class, corners as in the XML, difficult)"""
    tree = ElementTree.parse(root / f"VOC{year}" / "Annotations" / f"{file_id}.xml")
    return [
        (
            o.findtext("name"),
            [int(o.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")],
            o.findtext("difficult") == "1",
        )
        for o in tree.findall("object")
    ]


def detections(root: Path, year: str, ids: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """COCO results: moved, doubled, mistaken and invented objects; scores tie, coordinates are quarters."""
    rng = np.random.default_rng(seed)
    found = []
    for file_id in ids:
        for name, (x0, y0, x1, y1), _ in objects_of(root, year, file_id) * 2 + [("cat", [3, 3, 30, 30], False)]:
            x, y = (np.round((np.array([x0 - 1, y0 - 1]) + rng.normal(0, 2, 2)) * 4) / 4).clip(0).tolist()
            w, h = (np.array([x1 - x0 + 1, y1 - y0 + 1]) + rng.integers(-2, 3, 2)).clip(1).tolist()
            label = CLASSES.index(name if rng.random() < 0.8 else NAMES[rng.integers(4)]) + 1
            found.append(
                {"image_id": image_number(file_id), "category_id": label, "bbox": [x, y, float(w), float(h)],
                 "score": float(np.float32(rng.integers(1, 30) / 30))}
            )  # fmt: skip
    return found


# --- the data set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("year", "split"), [("2007", "trainval"), ("2007", "test"), ("2012", "val")])
def test_the_xml_files_become_a_data_set(root, year, split):
    ids = write_voc(root, year, split)
    dataset = load_coco(find_dataset(f"voc_{year}_{split}"))
    assert dataset.class_names == CLASSES
    assert len(dataset) == len(ids) == 12
    difficult = dict(zip(dataset.index.annotation_id.tolist(), dataset.index.difficult.tolist()))
    for file_id, record in zip(sorted(ids), dataset):
        expected = objects_of(root, year, file_id)
        assert record.file_name == str(root / f"VOC{year}" / "JPEGImages" / f"{file_id}.jpg")
        assert (record.height, record.width, record.image_id) == (50, 60, image_number(file_id))
        assert [CLASSES[k] for k in record.classes] == [name for name, _, _ in expected]
        assert record.boxes.tolist() == [[x0 - 1, y0 - 1, x1, y1] for _, (x0, y0, x1, y1), _ in expected]
        assert [difficult[k] for k in record.annotation_ids.tolist()] == [d for _, _, d in expected]


def test_what_is_missing_or_malformed_is_named(root, monkeypatch):
    with pytest.raises(UserError, match="VOC2007"):
        find_dataset("voc_2007_test")
    ids = write_voc(root, "2007", "test")
    path = root / "VOC2007" / "Annotations" / f"{ids[3]}.xml"
    whole = path.read_text()
    for broken in (whole[:-20], whole.replace("<width>60", "<width>wide"), whole.replace(
        "</annotation>", "<object><name>unicorn</name></object></annotation>")):  # fmt: skip
        path.unlink()
        path.write_text(broken)
        os.utime(path.parent)
        with pytest.raises(UserError, match=rf"{ids[3]}\.xml is not a Pascal VOC annotation"):
            find_dataset("voc_2007_test")
    path.unlink()
    with pytest.raises(UserError, match=rf"{ids[3]}\.xml: cannot be read"):
        find_dataset("voc_2007_test")
    path.write_text(whole)
    (root / "file").touch()
    monkeypatch.setenv("LOCO_DET_CACHE", str(root / "file"))
    with pytest.raises(UserError, match="LOCO_DET_CACHE"):
        find_dataset("voc_2007_test")


def test_changed_xml_files_are_read_again(root):
    ids = write_voc(root, "2007", "test")
    before = load_index(find_dataset("voc_2007_test").annotations)
    write_voc(root, "2007", "test", seed=1)
    after = load_index(find_dataset("voc_2007_test").annotations)
    assert sorted(map(image_number, ids)) == before.image_id.tolist() != after.image_id.tolist()


def test_a_set_is_made_once(root, monkeypatch):
    write_voc(root, "2007", "test")
    first = find_dataset("voc_2007_test").annotations
    monkeypatch.setattr("loco_det.annotations.voc._as_coco", lambda *_: pytest.fail("it was made already"))
    assert find_dataset("voc_2007_test").annotations == first
    assert first.parent == root / "cache" / "annotations"


def test_a_part_is_measured_as_the_whole(root, tmp_path):
    write_voc(root, "2007", "test")
    cfg = load_config(get_cfg(), "", ["MODEL.ROI_HEADS.NUM_CLASSES", "20"])[0]
    for part in ("", "@50pct_seed0"):
        measure = build_measure(cfg, find_dataset(f"voc_2007_test{part}"), "hotcoco", tmp_path)
        (numbers,) = measure.evaluate([]).values()
        assert "AP-car" in numbers
        assert "APs" not in numbers  # COCO's


# --- AP ---------------------------------------------------------------------------------------------------------


def slow_ap(root: Path, year: str, ids: list[str], found: list[dict], name: str, threshold: float) -> float:
    """One class, detection by detection and level by level, as the development kit describes it."""
    truth = {image_number(i): [(b, d, [False]) for n, b, d in objects_of(root, year, i) if n == name] for i in ids}
    count = sum(not d for objects in truth.values() for _, d, _ in objects)
    if not count:
        return math.nan
    own = [d for d in found if CLASSES[d["category_id"] - 1] == name]
    scores = np.array([float(f"{d['score']:.3f}") for d in own])
    tp, curve = 0, []
    fp = 0
    for k in np.argsort(-scores):
        x, y, w, h = own[k]["bbox"]
        a = [float(f"{v:.1f}") for v in (x + 1, y + 1, x + w, y + h)]
        best, overlap = None, -1.0
        for b, difficult, taken in truth[own[k]["image_id"]]:
            iw, ih = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
            inter = max(iw, 0) * max(ih, 0)
            union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - inter
            if inter / union > overlap:
                best, overlap = (difficult, taken), inter / union
        if overlap > threshold and best[0]:
            pass
        elif overlap > threshold and not best[1][0]:
            best[1][0] = True
            tp += 1
        else:
            fp += 1
        curve.append((tp / count, tp / max(tp + fp, 1e-16)))
    if year == "2007":
        return sum(max([p for r, p in curve if r >= t], default=0) for t in np.arange(0, 1.1, 0.1)) / 11
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in curve}):
        area += (recall - before) * max(p for r, p in curve if r >= recall)
        before = recall
    return area


@pytest.mark.parametrize("year", ["2007", "2012"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ap_is_that_of_a_slow_loop(root, year, seed):
    ids = write_voc(root, year, "val", seed=seed)
    found = detections(root, year, ids, seed)
    before = [dict(d) for d in found]
    numbers = evaluate_voc(find_dataset(f"voc_{year}_val").annotations, found, eleven_points=year == "2007")["bbox"]
    assert found == before
    expected = {n: [100 * slow_ap(root, year, ids, found, n, t / 100) for t in range(50, 100, 5)] for n in CLASSES}
    for name, values in expected.items():
        assert numbers[f"AP-{name}"] == pytest.approx(np.mean(values), nan_ok=True)
    known = np.array([values for values in expected.values() if not math.isnan(values[0])])
    assert len(known) == 4
    means = known.mean(0)
    assert numbers["AP"] == pytest.approx(means.mean())
    assert (numbers["AP50"], numbers["AP75"]) == pytest.approx((means[0], means[5]))
    assert 20 < numbers["AP50"] < 90


@pytest.mark.parametrize("eleven_points", [True, False])
def test_limits(root, eleven_points):
    ids = write_voc(root, "2007", "val")
    path = find_dataset("voc_2007_val").annotations
    perfect = [
        {"image_id": image_number(i), "category_id": CLASSES.index(n) + 1, "score": 0.5,
         "bbox": [float(x0 - 1), float(y0 - 1), float(x1 - x0 + 1), float(y1 - y0 + 1)]}
        for i in ids for n, (x0, y0, x1, y1), _ in objects_of(root, "2007", i)
    ]  # fmt: skip
    for found, value in ((perfect, 100), ([], 0)):
        numbers = evaluate_voc(path, found, eleven_points=eleven_points)["bbox"]
        assert [numbers[k] for k in ("AP", "AP50", "AP75", "AP-cat")] == pytest.approx([value] * 4)
        assert math.isnan(numbers["AP-boat"])


# --- both engines -----------------------------------------------------------------------------------------------


def voc_cfg(output_dir: Path) -> Any:
    tiny = overrides(**RESNET_18, OUTPUT_DIR=output_dir, MODEL__MASK_ON=False, MODEL__ROI_HEADS__NUM_CLASSES=20)
    names = ["DATASETS.TRAIN", "('voc_2007_trainval',)", "DATASETS.TEST", "('voc_2007_test',)"]
    return load_config(get_cfg(), "configs/coco_loco_r50_faster.yaml", [*tiny, *names])[0]


def train_and_test(root: Path, engine: str) -> dict[str, Any]:
    from loco_det.detection.train import train_net

    write_voc(root, "2007", "trainval", count=4)
    write_voc(root, "2007", "test", count=3, seed=1)
    cfg = voc_cfg(root / "output")
    results = train_net(cfg, engine=engine)
    assert set(results["bbox"]) == {"AP", "AP50", "AP75", *(f"AP-{name}" for name in CLASSES)}
    return results


def test_training_and_evaluation_by_the_torchvision_engine(root):
    train_and_test(root, "torchvision")


@pytest.mark.detectron2
def test_training_and_evaluation_by_detectron2(root):
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_pascal_voc

    names = ("voc_2007_trainval", "voc_2007_test")
    for name in names:  # its own look for DETECTRON2_DATASETS when it is imported
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        register_pascal_voc(name, str(root / "VOC2007"), VOC_SETS[name][1], 2007)
    train_and_test(root, "detectron2")


@pytest.mark.detectron2
@pytest.mark.parametrize("year", ["2007", "2012"])
def test_records_and_ap_equal_detectron2(root, year):
    pytest.importorskip("detectron2")
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_voc_instances, register_pascal_voc
    from detectron2.evaluation import PascalVOCDetectionEvaluator
    from detectron2.structures import Boxes, Instances

    ids = write_voc(root, year, "val", count=30)
    dataset = load_coco(find_dataset(f"voc_{year}_val"))
    theirs = {r["image_id"]: r for r in load_voc_instances(str(root / f"VOC{year}"), "val", CLASSES)}
    for file_id, ours in zip(sorted(ids), dataset):
        assert ours.file_name == theirs[file_id]["file_name"]
        assert (ours.height, ours.width) == (theirs[file_id]["height"], theirs[file_id]["width"])
        assert ours.boxes.tolist() == [a["bbox"] for a in theirs[file_id]["annotations"]]
        assert ours.classes.tolist() == [a["category_id"] for a in theirs[file_id]["annotations"]]

    found = detections(root, year, ids)
    for absent in (CLASSES.index(name) for name in CLASSES if name not in NAMES):  # it fails on a class without any
        found.append(
            {"image_id": image_number(ids[0]), "category_id": absent + 1, "bbox": [1.0, 1, 5, 5], "score": 0.5}
        )
    name = f"voc_test_{year}_{root.name}"
    register_pascal_voc(name, str(root / f"VOC{year}"), "val", int(year), NAMES)
    MetadataCatalog.get(name)
    evaluator = PascalVOCDetectionEvaluator(name)
    evaluator.reset()
    order = sorted(ids, key=image_number)
    for file_id in order:
        own = [d for d in found if d["image_id"] == image_number(file_id) and CLASSES[d["category_id"] - 1] in NAMES]
        boxes = torch.tensor([d["bbox"] for d in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((50, 60), pred_boxes=Boxes(boxes), scores=torch.tensor([d["score"] for d in own]))
        instances.pred_classes = torch.tensor([NAMES.index(CLASSES[d["category_id"] - 1]) for d in own])
        evaluator.process([{"image_id": file_id}], [{"instances": instances}])
    expected = evaluator.evaluate()["bbox"]
    found.sort(key=lambda d: d["image_id"])
    numbers = evaluate_voc(dataset.paths.annotations, found, eleven_points=year == "2007")["bbox"]
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, abs=1e-9)
