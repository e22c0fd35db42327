"""COCO AP: both evaluators against pycocotools called by hand, a count on paper, Detectron2, and hostile input."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loco_det.annotations.instances import Instances
from loco_det.annotations.registry import Dataset
from loco_det.core.errors import UserError
from loco_det.core.log import setup_logging
from loco_det.evaluation import coco
from loco_det.evaluation.coco import (
    EVALUATORS,
    Measure,
    evaluate_coco,
    format_categories,
    format_results,
    instances_to_coco,
    log_categories,
    write_results,
)
from loco_det.evaluation.measure import Subject

H, W = 90, 120
CATEGORY_IDS = [9, 2, 5, 30]  # with gaps, not in order; 30 never occurs
BOTH = ("bbox", "segm")


def square(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def compressed(polygon: list[float]) -> dict[str, Any]:
    rle = mask_util.merge(mask_util.frPyObjects([polygon], H, W))
    return {"size": [H, W], "counts": rle["counts"].decode()}


def uncompressed(polygon: list[float]) -> dict[str, Any]:
    pixels = mask_util.decode(compressed(polygon)).ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels, [1 - pixels[-1]]])))
    return {"size": [H, W], "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def detection(image_id: int, category_id: int, box: list[float], score: float) -> dict[str, Any]:
    mask = compressed(square(*box))
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score, "segmentation": mask}


def made_up_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth and results with everything that evaluators tend to disagree on."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    image_ids = rng.permutation(np.arange(3, 40, 3)).tolist()
    for image_id in image_ids:
        for number in range(rng.integers(0, 7)):  # some images are empty
            box = [*rng.uniform(0, 60, 2).round(1).tolist(), *np.exp(rng.uniform(0.5, 4, 2)).round(1).tolist()]
            polygon, crowd = square(*box), int(rng.random() < 0.2)
            shapes = ([polygon], [polygon, square(5, 5, 3, 4)], compressed(polygon), uncompressed(polygon))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORY_IDS[:3])),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": crowd,
                    "segmentation": shapes[3 if crowd else number % 4],
                }
            )
            for _ in range(rng.integers(0, 5)):
                moved = (np.array(box) + rng.normal(0, 3, 4)).clip(0).round(2).tolist()
                category = annotations[-1]["category_id"] if rng.random() < 0.8 else int(rng.choice(CATEGORY_IDS))
                results.append(detection(image_id, category, moved, float(rng.integers(1, 8)) / 8))  # many ties
    for _ in range(230):  # more than count, in one image and category
        box = rng.uniform(0, 60, 4).round(2).tolist()
        results.append(detection(image_ids[0], 9, box, float(rng.integers(1, 20)) / 20))
    images = [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in image_ids]
    categories = [{"id": i, "name": f"kind {i}"} for i in CATEGORY_IDS]
    order = rng.permutation(len(results))
    return {"images": images, "annotations": annotations, "categories": categories}, [results[i] for i in order]


def oracle(path: Path, results: list[dict[str, Any]], iou_type: str, max_dets: int = 100) -> dict[str, float]:
    """pycocotools as its own example calls it, summary and all."""
    given = copy.deepcopy(results)
    for each in given:
        del each["bbox" if iou_type == "segm" else "segmentation"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(given), iou_type)
        evaluation.params.maxDets = [1, 10, 100] if max_dets == 100 else [max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
        if max_dets == 100:
            evaluation.summarize()
    precision = evaluation.eval["precision"]
    if max_dets == 100:
        values = [value * 100 if value >= 0 else math.nan for value in evaluation.stats[:6]]
        numbers = dict(zip(["AP", "AP50", "AP75", "APs", "APm", "APl"], values))
    else:  # its summary knows 100 alone
        numbers = {"AP": np.mean(precision[..., 0, -1][precision[..., 0, -1] > -1]) * 100}
    for k, category in enumerate(truth.loadCats(sorted(truth.getCatIds()))):
        defined = precision[:, :, k, 0, -1][precision[:, :, k, 0, -1] > -1]
        numbers["AP-" + category["name"]] = np.mean(defined) * 100 if len(defined) else math.nan
    return numbers


def bits(numbers: dict[str, float]) -> dict[str, str]:
    """Equal only where every number is the same double, NaN included."""
    return {name: float(value).hex() for name, value in numbers.items()}


def assert_all_equal(path: Path, results: list[dict[str, Any]]) -> None:
    for iou_types in (BOTH, ("bbox",), ("segm",)):
        found = {e: evaluate_coco(path, results, iou_types, evaluator=e) for e in EVALUATORS}
        for iou_type in iou_types:
            expected = bits(oracle(path, results, iou_type))
            for evaluator in EVALUATORS:
                assert bits(found[evaluator][iou_type]) == expected, (evaluator, iou_type)


def saved(tmp_path: Path, truth: dict[str, Any]) -> Path:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(truth))
    return path


@pytest.mark.parametrize("seed", range(6))
def test_both_evaluators_equal_pycocotools_bit_for_bit(tmp_path, seed):
    truth, results = made_up_set(seed)
    path = saved(tmp_path, truth)
    assert_all_equal(path, results)
    assert 0 < evaluate_coco(path, results)["segm"]["AP"] < 100
    assert math.isnan(evaluate_coco(path, results)["bbox"]["AP-kind 30"])


@pytest.mark.parametrize("seed", [0, 1])
def test_whole_precision_arrays_are_equal(tmp_path, seed):
    truth, results = made_up_set(seed)
    checked = coco.read_ground_truth(saved(tmp_path, truth), BOTH)
    detections = coco.check_results(results, checked, BOTH)
    fast, slow = (coco.Outcomes(checked, detections, BOTH).precision(evaluator) for evaluator in EVALUATORS)
    for iou_type in BOTH:
        assert fast[iou_type].shape == (10, 101, len(CATEGORY_IDS), 4)
        assert np.array_equal(fast[iou_type], slow[iou_type])


@pytest.mark.parametrize("max_dets", [1, 7, 100, 300])
def test_max_dets(tmp_path, max_dets):
    truth, results = made_up_set(3)
    path = saved(tmp_path, truth)
    for iou_type in BOTH:
        expected = oracle(path, results, iou_type, max_dets)
        for evaluator in EVALUATORS:
            found = evaluate_coco(path, results, BOTH, evaluator=evaluator, max_dets=max_dets)[iou_type]
            assert bits({name: found[name] for name in expected}) == bits(expected)


def test_real_annotations_with_perturbed_objects_as_detections(real_coco):
    path = real_coco / "coco" / "annotations" / "instances_val2017.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
    rng = np.random.default_rng(0)
    category_ids = truth.getCatIds()
    results = []
    for annotation in truth.anns.values():
        image = truth.imgs[annotation["image_id"]]
        mask = truth.annToMask(annotation)
        for _ in range(rng.integers(0, 4)):
            moved = np.roll(mask, rng.integers(-6, 7, 2), (0, 1))
            rle = mask_util.encode(np.asfortranarray(moved))
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": annotation["category_id"] if rng.random() < 0.9 else int(rng.choice(category_ids)),
                    "bbox": (np.array(annotation["bbox"]) + rng.normal(0, 4, 4)).clip(0).tolist(),
                    "score": round(float(rng.random()), 2),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    assert any(a["iscrowd"] for a in truth.anns.values())
    assert_all_equal(path, results)


# --- by hand ----------------------------------------------------------------------------------------------------


def small_truth(**changes: Any) -> dict[str, Any]:
    def annotation(number: int, image_id: int, category_id: int, box: list[float]) -> dict[str, Any]:
        return {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [square(*box)],
        }

    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in (1, 2)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            annotation(1, 1, 3, [10, 10, 20, 20]),
            annotation(2, 2, 3, [10, 10, 40, 40]),
            annotation(3, 2, 7, [60, 10, 30, 50]),
        ],
    } | changes


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_numbers_counted_on_paper(tmp_path, evaluator):
    # cat: hit (IoU 1), false alarm, second object missed: precision 1 up to recall .5, 0 beyond -> 51 of 101 levels.
    # dog: IoU 24/30 = .8 exactly on a threshold: found at .50 ... .80, missed at .85, .90, .95.
    results = [
        detection(1, 3, [10, 10, 20, 20], 0.9),
        detection(1, 3, [80, 60, 20, 20], 0.8),
        detection(2, 7, [60, 10, 24, 50], 0.7),
    ]
    found = evaluate_coco(saved(tmp_path, small_truth()), results, ("bbox",), evaluator=evaluator)["bbox"]
    assert found["AP-cat"] == pytest.approx(100 * 51 / 101)
    assert found["AP-dog"] == pytest.approx(100 * 7 / 10)
    assert found["AP"] == pytest.approx((found["AP-cat"] + found["AP-dog"]) / 2)
    assert found["AP50"] == found["AP75"] == pytest.approx((100 * 51 / 101 + 100) / 2)
    assert found["APs"] == pytest.approx(100)  # the hit cat
    assert found["APm"] == pytest.approx((0 + 70) / 2)  # the missed cat and the dog
    assert math.isnan(found["APl"])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_mask_results_are_sized_by_their_mask_not_by_their_box(tmp_path, evaluator):
    # A false alarm whose box is medium and whose mask is small: it counts among small boxes only if sized by mask.
    truth = small_truth(annotations=small_truth()["annotations"][:1])
    alarm = detection(1, 3, [60, 40, 10, 10], 0.95) | {"bbox": [40, 30, 50, 50]}
    found = evaluate_coco(
        saved(tmp_path, truth), [alarm, detection(1, 3, [10, 10, 20, 20], 0.9)], BOTH, evaluator=evaluator
    )
    assert found["bbox"]["APs"] == pytest.approx(100)
    assert found["segm"]["APs"] == pytest.approx(50)
    assert found["bbox"]["AP"] == found["segm"]["AP"] == pytest.approx(50)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_results_are_zero_where_there_was_something_to_find(tmp_path, evaluator):
    truth = small_truth(categories=[*small_truth()["categories"], {"id": 8, "name": "elk"}])
    for numbers in evaluate_coco(saved(tmp_path, truth), [], BOTH, evaluator=evaluator).values():
        assert [numbers[n] for n in ("AP", "AP50", "AP75", "APs", "APm", "AP-cat", "AP-dog")] == [0] * 7
        assert math.isnan(numbers["APl"])
        assert math.isnan(numbers["AP-elk"])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_annotation_id_0_and_absent_iscrowd_do_not_cost_ap(tmp_path, evaluator, caplog):
    annotations = small_truth()["annotations"]
    for number, annotation in enumerate(annotations):
        del annotation["iscrowd"]
        annotation["id"] = number
    path = saved(tmp_path, small_truth(annotations=annotations))
    results = [detection(a["image_id"], a["category_id"], a["bbox"], 0.5) for a in annotations]
    with caplog.at_level("WARNING", logger="loco_det"):
        found = evaluate_coco(path, results, BOTH, evaluator=evaluator)
    assert found["bbox"]["AP"] == found["segm"]["AP"] == pytest.approx(100)
    assert str(path) in caplog.text


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_names_of_classes(tmp_path, evaluator):
    one = small_truth(categories=[{"id": 3, "name": "cat"}], annotations=small_truth()["annotations"][:2])
    assert not any(name.startswith("AP-") for name in evaluate_coco(
        saved(tmp_path, one), [], ("bbox",), evaluator=evaluator)["bbox"])  # fmt: skip
    twins = small_truth(categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}])
    found = evaluate_coco(saved(tmp_path, twins), [], ("bbox",), evaluator=evaluator)["bbox"]
    assert [name for name in found if name.startswith("AP-")] == ["AP-cat (id 3)", "AP-cat (id 7)"]


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_results_stay_as_they_are_and_nothing_is_printed(tmp_path, evaluator, capfd):
    truth, results = made_up_set(5)
    before = copy.deepcopy(results)
    evaluate_coco(saved(tmp_path, truth), results, evaluator=evaluator)
    assert results == before
    assert capfd.readouterr() == ("", "")


def test_annotations_of_unlisted_images_and_categories_do_not_count(tmp_path):
    truth, results = made_up_set(2)
    path = saved(tmp_path, truth)
    before = bits(evaluate_coco(path, results)["segm"])
    stray = truth["annotations"][0]
    truth["annotations"] += [stray | {"id": 9001, "image_id": 99}, stray | {"id": 9002, "category_id": 99}]
    saved(tmp_path, truth)
    assert_all_equal(path, results)
    assert bits(evaluate_coco(path, results)["segm"]) == before


# --- hostile input ----------------------------------------------------------------------------------------------

GOOD = detection(1, 3, [10, 10, 20, 20], 0.9)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (GOOD | {"image_id": 99}, "image_id 99"),
        (GOOD | {"category_id": 4}, "category_id 4"),
        (GOOD | {"image_id": "1"}, "row 2: .* at image_id"),
        (GOOD | {"score": float("nan")}, "row 2 has a score"),
        (GOOD | {"score": float("inf")}, "row 2 has a score"),
        (GOOD | {"score": None}, "row 2: .* at score"),
        (GOOD | {"bbox": [1, 2, 3]}, "row 2: .* at bbox"),
        (GOOD | {"bbox": [1, 2, 3, float("nan")]}, "row 2 has a box"),
        (GOOD | {"bbox": [10, 10, -5, 5]}, "row 2 has a box"),
        (GOOD | {"segmentation": [square(1, 1, 5, 5)]}, "row 2: .* at segmentation"),
        (GOOD | {"segmentation": {"size": [H, W], "counts": ""}}, "counts"),
        (GOOD | {"segmentation": {"size": [W, H], "counts": GOOD["segmentation"]["counts"]}}, "row 2 has a mask"),
        ({k: v for k, v in GOOD.items() if k != "segmentation"}, "segmentation"),
        ({k: v for k, v in GOOD.items() if k != "bbox"}, "bbox"),
        ("not a result", "row 2: "),
    ],
)
def test_malformed_results_are_refused_by_name(tmp_path, evaluator, bad, named):
    with pytest.raises(UserError, match=named):
        evaluate_coco(saved(tmp_path, small_truth()), [GOOD, bad], BOTH, evaluator=evaluator)


def first(**changes: Any) -> dict[str, Any]:
    annotations = small_truth()["annotations"]
    annotations[0] |= changes
    return small_truth(annotations=annotations)


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "instances.json"),
        ('{"images": [', "instances.json"),
        ("[]", "instances.json"),
        (json.dumps({k: v for k, v in small_truth().items() if k != "annotations"}), "annotations"),
        (json.dumps(small_truth(annotations=[])), "no annotations"),
        (json.dumps(small_truth(images=[])), "no images"),
        (
            json.dumps(small_truth(images=small_truth()["images"] * 2)),
            "2 x image id that occurs twice, the first image id 1",
        ),
        (json.dumps(small_truth(categories=small_truth()["categories"] * 2)), "2 x category id that occurs twice"),
        (json.dumps(first(id=2)), "1 x annotation id that occurs twice"),
        (json.dumps(first(id=-1)), "annotation id out of range, the first annotation id -1"),
        (json.dumps(first(id=2**54)), f"annotation id out of range, the first annotation id {2**54}"),
        (json.dumps(first(bbox=[1, 2])), r"bbox is not four numbers, the first \(id 1\)"),
        (json.dumps(first(segmentation=[[1, 1, 9, 1, 9, 1e9]])), "mask of annotation 1 has a point more than 100,000"),
        (
            json.dumps(first(segmentation=[[1, 1, 9, 1, 9, 150_000]])),
            "mask of annotation 1 has a point more than 100,000",
        ),
        (json.dumps(first(segmentation=[[1, 1, 99_999, 2] * 9000 + [1]])), "mask of annotation 1 has an outline"),
        (json.dumps(first(segmentation=[])), "annotation 1 has no segmentation.*boxes only"),
        (json.dumps(first(segmentation=[[1, 2, 3, 4]])), "annotation 1 has no segmentation"),
        (json.dumps(first(segmentation=compressed(square(1, 1, 5, 5)) | {"size": [W, H]})), "mask of annotation 1"),
    ],
)
def test_malformed_ground_truth_is_refused_by_name(tmp_path, evaluator, text, named):
    path = tmp_path / "instances.json"
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        evaluate_coco(path, [GOOD], BOTH, evaluator=evaluator)


def test_boxes_are_evaluated_without_any_mask(tmp_path):
    annotations = [{k: v for k, v in a.items() if k != "segmentation"} for a in small_truth()["annotations"]]
    path = saved(tmp_path, small_truth(annotations=annotations))
    box_only = {k: v for k, v in GOOD.items() if k != "segmentation"}
    assert evaluate_coco(path, [box_only], ("bbox",))["bbox"]["AP-cat"] == pytest.approx(100 * 51 / 101)
    with pytest.raises(UserError, match="boxes only"):
        evaluate_coco(path, [GOOD], BOTH)


def test_other_arguments(tmp_path):
    path = saved(tmp_path, small_truth())
    with pytest.raises(UserError, match=r"missing\.json"):
        evaluate_coco(tmp_path / "missing.json", [GOOD])
    with pytest.raises(UserError, match="no evaluator 'coco'"):
        evaluate_coco(path, [GOOD], evaluator="coco")
    with pytest.raises(UserError, match="at least 1"):
        evaluate_coco(path, [GOOD], max_dets=0)
    with pytest.raises(ValueError, match="keypoints"):
        evaluate_coco(path, [GOOD], ("keypoints",))


# --- predictions in, files and tables out -----------------------------------------------------------------------


def made_up_instances(n: int, seed: int = 0, masks: bool = True) -> Instances:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * torch.tensor([W - 50.0, H - 40.0])
    boxes = torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=g) * 38], 1)
    return Instances(
        (H, W),
        boxes=boxes,
        classes=torch.randint(len(CATEGORY_IDS), (n,), generator=g),
        scores=torch.rand(n, generator=g),
        masks=torch.rand(n, H, W, generator=g) < torch.linspace(0, 1, n)[:, None, None] if masks else None,
    )


def test_instances_to_coco():
    instances = made_up_instances(6)
    results = instances_to_coco(instances, 12, CATEGORY_IDS)
    assert json.loads(json.dumps(results)) == results
    for i, result in enumerate(results):
        assert result["image_id"] == 12
        assert result["category_id"] == CATEGORY_IDS[instances.classes[i]]
        assert result["score"] == instances.scores[i].item()
        x0, y0, x1, y1 = instances.boxes[i]
        assert result["bbox"] == [x0.item(), y0.item(), (x1 - x0).item(), (y1 - y0).item()]
        assert np.array_equal(mask_util.decode(result["segmentation"]), instances.masks[i].numpy())
        rle = mask_util.encode(np.asfortranarray(instances.masks[i].numpy().astype(np.uint8)))
        assert result["segmentation"] == {"size": rle["size"], "counts": rle["counts"].decode()}
    assert "segmentation" not in instances_to_coco(made_up_instances(2, masks=False), 12, CATEGORY_IDS)[0]
    assert instances_to_coco(made_up_instances(0), 12, CATEGORY_IDS) == []


@pytest.mark.parametrize("batch", [1, 4, 10_000])
def test_written_results_read_back(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(coco, "_RESULT_BATCH", batch)
    results = instances_to_coco(made_up_instances(8), 12, CATEGORY_IDS)
    path = write_results(tmp_path, results)
    assert path == tmp_path / "inference" / "coco_instances_results.json"
    assert json.loads(path.read_text()) == results
    assert json.loads(write_results(tmp_path, []).read_text()) == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_results_that_cannot_be_written_leave_the_old_ones(tmp_path):
    path = write_results(tmp_path, [GOOD])
    with pytest.raises(TypeError):
        write_results(tmp_path, [GOOD | {"score": object()}])
    assert json.loads(path.read_text()) == [GOOD]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_results(tmp_path / "file", [GOOD])


def test_table(tmp_path):
    truth, results = made_up_set(0)
    numbers = evaluate_coco(saved(tmp_path, truth), results)
    text = f"{format_results(numbers)}\n\n{format_categories(numbers)}"
    assert "AP per category" not in format_results(numbers)
    for iou_type in BOTH:
        for name, value in numbers[iou_type].items():
            assert name.removeprefix("AP-") in text
            assert f"{value:.3f}" in text
    for block in text.split("\n\n"):
        lines = block.splitlines()[1:]
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("count", [1, 20, 21])
def test_many_categories_go_to_the_file_alone(count: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    numbers = {"bbox": {"AP": 1.0, **{f"AP-class {k}": float(k) for k in range(count)}}}
    setup_logging(tmp_path)
    log_categories(numbers)
    shown, whole = capsys.readouterr().err, (tmp_path / "log.txt").read_text()
    assert all(f"| class {k} " in whole for k in range(count))
    assert ("| class 0 " in shown) == (count <= 20)
    assert ("in log.txt and metrics.json" in shown) == (count > 20)


def test_no_detection_at_all_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth, _ = made_up_set(0)
    subject = Subject(Dataset("x", tmp_path, saved(tmp_path, truth)), tmp_path / "i", False, (1,), EVALUATORS[0])
    Measure(subject).write([])
    assert "no score reached MODEL.ROI_HEADS.SCORE_THRESH_TEST" in caplog.text
    caplog.clear()
    Measure(subject).write([GOOD])
    assert "no score" not in caplog.text


# --- Detectron2 itself ------------------------------------------------------------------------------------------


@pytest.mark.detectron2
def test_equal_to_detectron2(tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes
    from detectron2.structures import Instances as TheirInstances

    truth, _ = made_up_set(4)
    path, name = saved(tmp_path, truth), "loco_det_test_evaluation"
    with contextlib.ExitStack() as stack:
        register_coco_instances(name, {}, str(path), str(tmp_path))
        stack.callback(MetadataCatalog.remove, name)
        stack.callback(DatasetCatalog.remove, name)
        DatasetCatalog.get(name)
        evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
        evaluator.reset()
        results = []
        for number, image in enumerate(truth["images"]):
            ours = made_up_instances(12, seed=number)
            for i, (x0, y0, x1, y1) in enumerate(ours.boxes.round().int().tolist()):
                ours.masks[i] = False
                ours.masks[i, y0:y1, x0:x1] = True
            own = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
            for i, a in enumerate(own[:12]):  # some of them right
                x, y, w, h = a["bbox"]
                ours.boxes[i] = torch.tensor([x, y, x + w, y + h])
                ours.classes[i] = sorted(CATEGORY_IDS).index(a["category_id"])
                with contextlib.redirect_stdout(io.StringIO()):
                    ours.masks[i] = torch.from_numpy(COCO(str(path)).annToMask(a)).bool()
            results += instances_to_coco(ours, image["id"], sorted(CATEGORY_IDS))
            theirs = TheirInstances(
                (H, W),
                pred_boxes=Boxes(ours.boxes.clone()),
                scores=ours.scores,
                pred_classes=ours.classes,
                pred_masks=ours.masks,
            )
            evaluator.process([{"image_id": image["id"]}], [{"instances": theirs}])
        expected = evaluator.evaluate()
    written = json.loads((tmp_path / "theirs" / "coco_instances_results.json").read_text())
    assert json.loads(write_results(tmp_path, results).read_text()) == written
    for chosen in EVALUATORS:
        found = evaluate_coco(path, results, evaluator=chosen)
        for iou_type in BOTH:
            assert 0 < found[iou_type]["AP"] < 100
            assert list(found[iou_type]) == list(expected[iou_type])
            assert bits(found[iou_type]) == bits(expected[iou_type])
