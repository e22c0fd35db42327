"""Proposal recall, test-time augmentation and precise BatchNorm."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import detection_cases as cases
import numpy as np
import pytest
import torch
from tiny_detection import tiny_cfg

from loco_det.annotations.registry import find_dataset
from loco_det.core.errors import UserError
from loco_det.detection import precise_bn
from loco_det.detection.engine_d2 import Detectron2Engine
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.fast_rcnn import select_detections
from loco_det.detection.inference import check_expected
from loco_det.detection.keys import check_supported, get_cfg
from loco_det.detection.precomputed import read_proposals
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.detection.tta import AugmentedRCNN, apply, invert
from loco_det.evaluation.proposals import Proposals, best_covers, evaluate_proposals

pytestmark = pytest.mark.usefixtures("one_thread", "tiny_data")

SHORT = {"SOLVER__MAX_ITER": 2, "SOLVER__STEPS": (1,)}
RPN_ONLY = {"MODEL__META_ARCHITECTURE": "ProposalNetwork", "MODEL__MASK_ON": False}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# --- proposals alone ---------------------------------------------------------------------------------------------


def test_a_proposal_network_trains_and_its_recall_is_measured(tmp_path: Path) -> None:
    results = train_net(tiny_cfg(tmp_path, **RPN_ONLY, **SHORT), engine="torchvision")
    assert set(results) == {"box_proposals"}
    assert set(results["box_proposals"]) == {f"AR{a}@{n}" for a in ("", "s", "m", "l") for n in (100, 1000)}
    assert 0 < results["box_proposals"]["AR@100"] <= 100
    assert {"loss_rpn_cls", "loss_rpn_loc"} <= set(metrics(tmp_path)[0])
    assert metrics(tmp_path)[-1]["box_proposals/AR@100"] == results["box_proposals"]["AR@100"]
    with (tmp_path / "inference" / "box_proposals.pkl").open("rb") as file:
        written = pickle.load(file)
    assert written["ids"] == [1, 2, 3, 4, 5, 6]
    assert written["bbox_mode"] == 0
    for boxes, logits in zip(written["boxes"], written["objectness_logits"], strict=True):
        assert 0 < len(boxes) <= 20
        assert boxes.shape == (len(logits), 4)
        assert (np.diff(logits) <= 0).all()
        assert boxes.max() <= 80  # pixels of the original image


def slow_recall(truth: list[list[float]], boxes: list[list[float]], threshold: float) -> float:
    """Objects found at an IoU, pairs taken greedily by descending IoU; all in Python's float64."""

    def iou(a: list[float], b: list[float]) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        overlap = max(width, 0) * max(height, 0)
        return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)

    pairs = sorted(((iou(t, b), i, j) for i, t in enumerate(truth) for j, b in enumerate(boxes)), reverse=True)
    seen: set[tuple[str, int]] = set()
    hits = 0
    for value, i, j in pairs:
        if ("t", i) not in seen and ("b", j) not in seen:
            seen |= {("t", i), ("b", j)}
            hits += value >= threshold
    return hits / len(truth)


def test_average_recall_is_that_of_a_slow_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    images, annotations, proposals, recalls = [], [], [], []
    for image in range(1, 9):
        images.append({"id": image, "width": 300, "height": 300})
        corner, side = rng.uniform(0, 100, (5, 2)), rng.uniform(20, 120, (5, 2))
        truth = np.concatenate([corner, corner + side], 1)
        boxes = np.repeat(truth, 3, 0) + rng.normal(0, 12, (15, 4))
        for k, (x0, y0, x1, y1) in enumerate(truth):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": int(k == 4),
                 "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            )  # fmt: skip
        proposals.append(Proposals(image, torch.tensor(boxes).float(), torch.from_numpy(rng.normal(size=15)).float()))
        recalls.append([slow_recall(truth[:4].tolist(), boxes.tolist(), t / 100) for t in range(50, 100, 5)])
    path = tmp_path / "truth.json"
    categories = [{"id": 1, "name": "thing"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    found = evaluate_proposals(path, proposals)["box_proposals"]
    assert found["AR@100"] == pytest.approx(100 * np.mean(recalls), abs=1e-4)
    assert found["AR@1000"] == found["AR@100"]  # there are 15
    sizes = {"s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
    counts = {k: sum(a < x["area"] <= b for x in annotations if not x["iscrowd"]) for k, (a, b) in sizes.items()}
    assert all(counts.values())
    perfect = [
        Proposals(i["id"], torch.tensor([[x, y, x + w, y + h] for x, y, w, h in mine]), torch.zeros(len(mine)))
        for i in images
        for mine in [[a["bbox"] for a in annotations if a["image_id"] == i["id"]]]
    ]
    assert set(evaluate_proposals(path, perfect)["box_proposals"].values()) == {100.0}


def test_each_proposal_serves_one_object() -> None:
    assert best_covers(np.float32([[0.9, 0.8], [0.1, 0.3]])).tolist() == pytest.approx([0.9, 0.3])
    assert best_covers(np.float32([[0.6, 0.8]])).tolist() == pytest.approx([0.8, 0.0])


def test_no_objects_have_no_recall(tiny_data: Path) -> None:
    annotations = tiny_data / "tiny" / "annotations" / "instances_val.json"
    found = evaluate_proposals(annotations, [Proposals(1, torch.zeros(0, 4), torch.zeros(0))])
    assert np.isnan(found["box_proposals"]["AR@100"])


# --- proposals from a file ---------------------------------------------------------------------------------------

FAST = {
    "MODEL__MASK_ON": False,
    "MODEL__LOAD_PROPOSALS": True,
    "MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals",
}


def write_proposals_of(path: Path, changes: dict[str, Any] | None = None) -> Path:
    """Five proposals for each of the six images, in Detectron2's form."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 40, (6, 5, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (6, 5, 2))], 2).astype(np.float32)
    logits = rng.normal(size=(6, 5)).astype(np.float32)
    content = {"ids": [1, 2, 3, 4, 5, 6], "boxes": list(boxes), "objectness_logits": list(logits), "bbox_mode": 0}
    path.write_bytes(pickle.dumps({**content, **(changes or {})}))
    return path


def test_fast_rcnn_trains_on_the_proposals_of_an_rpn(tmp_path: Path) -> None:
    train_net(tiny_cfg(tmp_path / "rpn", **RPN_ONLY, **SHORT), engine="torchvision")
    file = str(tmp_path / "rpn" / "inference" / "box_proposals.pkl")
    files = {"DATASETS__PROPOSAL_FILES_TRAIN": (file,), "DATASETS__PROPOSAL_FILES_TEST": (file,)}
    results = train_net(tiny_cfg(tmp_path / "fast", **FAST, **files, **SHORT), engine="torchvision")
    assert set(results) == {"bbox"}
    losses = {name for name in metrics(tmp_path / "fast")[0] if name.startswith("loss")}
    assert losses == {"loss_cls", "loss_box_reg"}
    assert not any("proposal_generator" in k for k in torch.load(tmp_path / "fast" / "model_final.pth")["model"])


def test_proposals_move_with_their_image(tmp_path: Path) -> None:
    file = write_proposals_of(tmp_path / "p.pkl")
    files = {"DATASETS__PROPOSAL_FILES_TEST": (str(file),), "DATASETS__PRECOMPUTED_PROPOSAL_TOPK_TEST": 3}
    cfg = tiny_cfg(tmp_path, **FAST, **files, INPUT__MIN_SIZE_TEST=128)
    content = pickle.loads(file.read_bytes())
    for batch in TorchvisionEngine().test_batches(cfg, find_dataset("tiny_val")):
        found, image_id = batch[0]["proposals"], batch[0]["image_id"]
        best = np.argsort(-content["objectness_logits"][image_id - 1])[:3]
        expected = 2 * content["boxes"][image_id - 1][best]
        width, height = (160, 128) if image_id % 3 else (128, 160)
        expected = np.minimum(expected, [width, height, width, height])
        assert found.image_size == (height, width)
        assert torch.equal(found.boxes, torch.tensor(expected, dtype=torch.float32))
        assert found.scores.tolist() == content["objectness_logits"][image_id - 1][best].tolist()


def test_old_and_relative_forms_of_the_file_are_read(tmp_path: Path) -> None:
    new = read_proposals(write_proposals_of(tmp_path / "new.pkl"))
    content = pickle.loads((tmp_path / "new.pkl").read_bytes())
    old = {"indexes": content["ids"], "scores": content["objectness_logits"], "bbox_mode": 1}
    old["boxes"] = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1) for b in content["boxes"]]
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(old, protocol=2))
    read = read_proposals(tmp_path / "old.pkl")
    assert list(read) == list(new) == ["1", "2", "3", "4", "5", "6"]
    for name in new:
        np.testing.assert_allclose(read[name][0], new[name][0], rtol=1e-6)
        assert (read[name][1] == new[name][1]).all()
        assert (np.diff(new[name][1]) <= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [1]}, "equal length"),
        ({"boxes": None}, "equal length"),
        ({"bbox_mode": 4}, "bbox_mode 0 or 1"),
        ({"boxes": [np.zeros((5, 3))] * 6}, r"image 1 has boxes \(5, 3\) and logits \(5,\)"),
        ({"boxes": [np.zeros((4, 4))] * 6}, r"image 1 has boxes \(4, 4\) and logits \(5,\)"),
        ({"boxes": [np.full((5, 4), np.nan)] * 6}, "image 1 has boxes that are no array of finite"),
        ({"boxes": [[["a"] * 4] * 5] * 6}, "image 1 has boxes that are no array of finite"),
        ({"boxes": [print] * 6}, "image 1 has boxes that are no array of finite"),
        ({"boxes": [[[0.0] * 4] * 4 + [[0.0] * 3]] * 6}, r"p\.pkl: image 1 has boxes that are no array of finite"),
        ({"objectness_logits": [[1.0, 2.0, [3.0]]] * 6}, r"p\.pkl: image 1 has logits that are no array of finite"),
        ({"bbox_mode": np.zeros(2)}, "bbox_mode 0 or 1"),
    ],
)
def test_a_bad_file_of_proposals_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_proposals(write_proposals_of(tmp_path / "p.pkl", changes))


def test_proposals_of_a_dtype_that_numpy_lacks_are_refused(tmp_path: Path) -> None:
    boxes, logits = torch.zeros(5, 4, dtype=torch.bfloat16), torch.zeros(5)
    torch.save({"ids": [7], "boxes": [boxes], "objectness_logits": [logits]}, tmp_path / "p.pth")
    with pytest.raises(UserError, match="image 7 has boxes that are no array of finite"):
        read_proposals(tmp_path / "p.pth")


def test_proposals_must_fit_the_data_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PROPOSAL_FILES_TEST has 0 files for the 1 data sets"):
        TorchvisionEngine().test_batches(tiny_cfg(tmp_path, **FAST), find_dataset("tiny_val"))
    for file, message in (("https://a/b.pkl", "not a file"), (str(tmp_path / "absent.pkl"), "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_proposals(file)
    (tmp_path / "p.pkl").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UserError, match="damaged or incomplete"):
        read_proposals(tmp_path / "p.pkl")
    content = pickle.loads(write_proposals_of(tmp_path / "p.pkl").read_bytes())
    for key in ("ids", "boxes", "objectness_logits"):
        content[key] = content[key][:5]
    (tmp_path / "p.pkl").write_bytes(pickle.dumps(content))
    cfg = tiny_cfg(tmp_path, DATASETS__PROPOSAL_FILES_TEST=(str(tmp_path / "p.pkl"),), **FAST)
    with pytest.raises(UserError, match="has none for image 6"):
        list(TorchvisionEngine().test_batches(cfg, find_dataset("tiny_val")))


# --- several views of an image -----------------------------------------------------------------------------------


def detectors(**test: Any) -> tuple[torch.nn.Module, AugmentedRCNN]:
    cfg = cases.configure(get_cfg(), cases.FPN, {f"TEST.AUG.{key}": value for key, value in test.items()})
    model = cases.formula_weights(build_model(cfg)).eval()
    return model, AugmentedRCNN(cfg, model)


@torch.no_grad()
def test_one_view_of_the_same_size_is_the_detector_itself() -> None:
    model, augmented = detectors(MIN_SIZES=(76,), MAX_SIZE=200, FLIP=False)
    batch = cases.our_batch(train=False)[1:]  # its short side is 76
    plain, seen = model(batch)[0], augmented(batch)[0]
    torch.testing.assert_close(seen.boxes, plain.boxes, rtol=1e-5, atol=1e-4)
    assert torch.equal(seen.scores, plain.scores)
    assert torch.equal(seen.classes, plain.classes)
    assert (seen.masks != plain.masks).float().mean() < 1e-3


@torch.no_grad()
def test_a_mirrored_image_has_mirrored_detections() -> None:
    _, augmented = detectors(MIN_SIZES=(60, 88), MAX_SIZE=130, FLIP=True)
    image = cases.images(((64, 96),))[0]
    seen, mirrored = augmented([{"image": image}])[0], augmented([{"image": image.flip(2)}])[0]
    width = torch.tensor(96.0)
    flipped = torch.stack([width - mirrored.boxes[:, 2], mirrored.boxes[:, 1],
                           width - mirrored.boxes[:, 0], mirrored.boxes[:, 3]], 1)  # fmt: skip
    torch.testing.assert_close(flipped, seen.boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(mirrored.scores, seen.scores, rtol=0, atol=1e-4)
    assert (mirrored.masks.flip(2) != seen.masks).float().mean() < 0.01


def test_invert_undoes_apply() -> None:
    _, augmented = detectors(MIN_SIZES=(60, 88), MAX_SIZE=110, FLIP=True)
    boxes = torch.tensor([[10.0, 20, 60, 70], [0, 0, 200, 150]])
    views = augmented._views(cases.images(((75, 100),))[0], (150, 200))
    assert [tuple(view["image"].shape) for view, _ in views] == [(3, 60, 80)] * 2 + [(3, 83, 110)] * 2
    for view, transforms in views:
        height, width = view["image"].shape[1:]
        there = apply(boxes, transforms)
        torch.testing.assert_close(there[1], torch.tensor([0.0, 0, width, height]), rtol=0, atol=1e-4)
        torch.testing.assert_close(invert(there, transforms), boxes, rtol=0, atol=1e-3)


def test_an_augmented_evaluation_stands_beside_the_plain_one(tmp_path: Path) -> None:
    changes = {"TEST__AUG__ENABLED": True, "TEST__AUG__MIN_SIZES": (48, 64), "TEST__AUG__MAX_SIZE": 90}
    results = train_net(tiny_cfg(tmp_path, **changes, **SHORT), engine="torchvision")
    assert set(results) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
    assert set(results["bbox"]) == set(results["bbox_TTA"])
    assert metrics(tmp_path)[-1]["segm_TTA/AP50"] == results["segm_TTA"]["AP50"]
    plain, augmented = (
        json.loads((tmp_path / folder / "coco_instances_results.json").read_text())
        for folder in ("inference", "inference_TTA")
    )
    assert plain
    assert augmented
    assert plain != augmented


def test_selection_keeps_every_score_above_the_threshold() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]])
    scores = torch.tensor([[0.9, 0.0, 0], [0.8, 0.0, 0], [0.0, 1e-7, 0]])
    found = select_detections(boxes, scores, (55, 100), 1e-8, 0.5, -1)
    assert found.boxes.tolist() == [[0, 0, 10, 10], [50, 50, 60, 55]]
    assert found.classes.tolist() == [0, 1]


# --- expectations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([["bbox", "AP", 40.0, 0.5]], None),
        ([["bbox", "AP", 40.2, 0.5], ["segm", "AP", 35, 1]], None),
        ([["bbox", "AP", 41.0, 0.5]], r"bbox AP is 40\.3000; TEST\.EXPECTED_RESULTS says 41\.0 within 0\.5"),
        ([["segm", "APs", 1.0, 100.0]], "segm APs is nan"),
        ([["keypoints", "AP", 1.0, 1.0]], "keypoints AP is not measured"),
        ([["bbox", "AP9", 1.0, 1.0]], "bbox AP9 is not measured"),
    ],
)
def test_results_are_held_to_what_is_expected(expected: list[Any], message: str | None) -> None:
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = expected
    results = {"bbox": {"AP": 40.3}, "segm": {"AP": 35.5, "APs": float("nan")}}
    if message is None:
        check_expected(cfg, results)
    else:
        with pytest.raises(UserError, match=message):
            check_expected(cfg, results)


def test_a_run_that_misses_its_expectation_fails(tmp_path: Path) -> None:
    cfg = tiny_cfg(tmp_path, TEST__EXPECTED_RESULTS=[["bbox", "AP", 99.0, 0.1]], **SHORT)
    with pytest.raises(UserError, match=r"TEST\.EXPECTED_RESULTS says 99\.0"):
        train_net(cfg, engine="torchvision")
    assert (tmp_path / "model_final.pth").exists()
    assert "bbox/AP" in metrics(tmp_path)[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TEST.AUG.ENABLED": True, "MODEL.META_ARCHITECTURE": "ProposalNetwork"}, r"TEST\.AUG\.ENABLED is True"),
        (cases.FAST | {"TEST.AUG.ENABLED": True}, r"TEST\.AUG\.ENABLED is True"),
        ({"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 0}, r"TEST\.PRECISE_BN\.NUM_ITER is 0"),
        ({"VIS_PERIOD": 20}, r"VIS_PERIOD is 20"),
        ({"MODEL.META_ARCHITECTURE": "PanopticFPN"}, r"MODEL\.META_ARCHITECTURE is 'PanopticFPN'; .*either engine"),
        ({"TEST.EXPECTED_RESULTS": [["bbox", 40.0]]}, r"TEST\.EXPECTED_RESULTS is \[\['bbox', 40\.0\]\]; write each"),
    ],
)
def test_what_would_fail_after_training_is_refused_before(settings: dict[str, Any], message: str) -> None:
    for check in (check_supported, Detectron2Engine().check):
        with pytest.raises(UserError, match=message):
            check(cases.configure(get_cfg(), settings))


# --- precise BatchNorm -------------------------------------------------------------------------------------------

PRECISE = {
    "MODEL__FPN__NORM": "BN",
    "TEST__PRECISE_BN__ENABLED": True,
    "TEST__PRECISE_BN__NUM_ITER": 3,
    "DATASETS__TEST": (),
}


def test_precise_statistics_are_those_of_the_batches(tmp_path: Path) -> None:
    cfg = tiny_cfg(tmp_path, **PRECISE)
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    precise_bn.recompute(cfg, TorchvisionEngine(), model, cfg.SOLVER.MAX_ITER - 1)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in after.items():
        statistic = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(value, before[name]) == (not ("fpn" in name and statistic)), name
    seen: list[torch.Tensor] = []
    norm = model.backbone.fpn_lateral3.norm
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().double()))
    batches = iter(TorchvisionEngine().train_batches(cfg, 0))
    for _ in range(3):
        model(next(batches))
    pixels = torch.cat([x.transpose(0, 1).flatten(1) for x in seen], dim=1)
    name = "backbone.fpn_lateral3.norm.running"
    torch.testing.assert_close(after[f"{name}_mean"].double(), pixels.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after[f"{name}_var"].double(), pixels.var(1), rtol=2e-2, atol=1e-4)


def test_it_runs_before_evaluations_and_at_the_end() -> None:
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD = 10, 4
    assert not any(precise_bn.is_due(cfg, i) for i in range(10))
    cfg.TEST.PRECISE_BN.ENABLED = True
    assert [i for i in range(10) if precise_bn.is_due(cfg, i)] == [3, 7, 9]
    cfg.TEST.EVAL_PERIOD = 0
    assert [i for i in range(10) if precise_bn.is_due(cfg, i)] == [9]


def test_a_resumed_run_has_the_same_precise_statistics(tmp_path: Path) -> None:
    changes = {**PRECISE, "TEST__EVAL_PERIOD": 2, "SOLVER__MAX_ITER": 4, "SOLVER__STEPS": (3,)}
    finals = []
    for name in ("whole", "resumed"):
        cfg = tiny_cfg(tmp_path / name, SOLVER__CHECKPOINT_PERIOD=2, **changes)
        train_net(cfg, engine="torchvision")
        if name == "resumed":
            (tmp_path / name / "last_checkpoint").write_text("model_0000001.pth")
            train_net(cfg, engine="torchvision", resume=True)
        finals.append(torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"])
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    halfway = torch.load(tmp_path / "whole" / "model_0000001.pth", weights_only=True)["model"]
    name = "backbone.fpn_lateral3.norm.running_mean"
    assert not torch.equal(finals[0][name], halfway[name])
