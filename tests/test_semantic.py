"""Semantic segmentation of Cityscapes: labels, head and loss against slow arithmetic, scores against the benchmark."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cityscapes_cases import write_cityscapes
from PIL import Image
from tiny_detection import tiny_cfg

from loco_det.annotations import pixels as data
from loco_det.annotations.cityscapes import read_instance_ids
from loco_det.annotations.coco import load_coco
from loco_det.annotations.loader import build_train_loader
from loco_det.annotations.mapper import DetectionMapper, sample_rng
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.transforms import Crop, Resize
from loco_det.cli import run_job
from loco_det.commands.doctor import examine_config
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.keys import check_supported, get_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import check_classes, train_net
from loco_det.evaluation import pixels as scores
from loco_det.report.analysis import experiments
from loco_det.report.panels import panels
from loco_det.report.runs import find_runs, last_scores

NAME = "cityscapes_fine_sem_seg"
ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
HEAD = "sem_seg_head."


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cityscapes(tmp_path_factory.mktemp("data"), images=3)


@pytest.fixture(autouse=True)
def _found(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tree.parent))


def cfg(folder: Path, **changes: object):
    return tiny_cfg(
        folder,
        **{
            "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
            "MODEL__SEM_SEG_HEAD__NUM_CLASSES": 19,
            "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
            "DATASETS__TRAIN": (f"{NAME}_train",),
            "DATASETS__TEST": (f"{NAME}_val",),
            "SOLVER__MAX_ITER": 2,
            "SOLVER__STEPS": (1,),
            **changes,
        },
    )


def frames(tree: Path, split: str = "val") -> list[Path]:
    return sorted((tree / "leftImg8bit" / split).glob("*/*.png"))


# --- labels -----------------------------------------------------------------------------------------------------


def test_classes_ids_categories_and_sizes_are_the_benchmarks() -> None:
    helpers = pytest.importorskip("cityscapesscripts.helpers.labels")
    module = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    wanted = sorted((label for label in helpers.labels if 0 <= label.trainId < 255), key=lambda label: label.trainId)
    assert [label.name for label in wanted] == list(data.CLASSES)
    assert [label.id for label in wanted] == data.LABEL_IDS.tolist()
    assert [label.color for label in wanted] == list(data.COLOURS)
    for name, members in scores.CATEGORIES.items():
        assert [label.trainId for label in wanted if label.category == name] == list(members)
    assert {data.CLASSES[k]: size for k, size in scores.INSTANCE_PIXELS.items()} == {
        name: size for name, size in module.args.avgClassSize.items() if name in data.CLASSES
    }
    values = np.arange(34, dtype=np.uint8)
    assert data.to_classes(values, Path("a_labelIds.png")).tolist() == [helpers.id2label[i].trainId for i in range(34)]


def test_train_ids_stand_in_where_label_ids_are_missing(tree: Path, tmp_path: Path) -> None:
    image = frames(tree)[0]
    from_ids = data.read_labels(data.label_file(image))
    assert set(np.unique(from_ids)) > {0, data.IGNORED}
    shutil.copytree(tree, tmp_path / "copy")
    image = frames(tmp_path / "copy")[0]
    ids = data.label_file(image)
    Image.fromarray(from_ids).save(ids.with_name(ids.name.replace("labelIds", "labelTrainIds")))
    assert data.label_file(image) == ids
    ids.unlink()
    assert data.label_file(image).name.endswith("_labelTrainIds.png")
    assert (data.read_labels(data.label_file(image)) == from_ids).all()
    data.label_file(image).unlink()
    with pytest.raises(UserError, match=r"labelIds\.png does not exist"):
        data.label_file(image)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 77, np.uint8), "unknown label 77"),
        (np.zeros((4, 4, 3), np.uint8), "not a map of labels"),
        (np.zeros((4, 4), np.uint16), "not a map of labels"),
        (b"no picture", "cannot be read"),
    ],
)
def test_what_is_no_map_of_labels_is_refused(pixels: np.ndarray | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a_gtFine_labelIds.png"
    path.write_bytes(pixels) if isinstance(pixels, bytes) else Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match=message):
        data.read_labels(path)


@pytest.mark.parametrize(("place", "value"), [(11, 2), (36, 2), (45, 77)], ids=["header", "length", "pixels"])
def test_a_damaged_png_is_one_sentence(place: int, value: int, tree: Path, tmp_path: Path) -> None:
    """Of labels, instance ids and predictions; PIL has another exception for each kind of damage."""
    shutil.copytree(tree, tmp_path / "cityscapes")
    image = frames(tmp_path / "cityscapes")[0]
    scores.write_prediction(tmp_path, image, np.zeros((96, 160), np.uint8))
    label = data.label_file(image)
    readers = {
        label: data.read_labels,
        label.with_name(label.name.replace("labelIds", "instanceIds")): read_instance_ids,
        scores.prediction_file(tmp_path, image): lambda _: scores.read_pair(image, tmp_path),
    }
    for path, reader in readers.items():
        whole = path.read_bytes()
        reader(path)
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
            reader(path)
        path.write_bytes(whole)


def test_a_split_is_listed_with_its_classes_and_no_annotation() -> None:
    found = load_coco(find_dataset(f"{NAME}_train"), need_annotations=False)
    assert (len(found), found.class_names, found.category_ids[0]) == (3, data.CLASSES, 7)
    assert [(r.height, r.width) for r in found] == [(96, 160)] * 3
    assert len(load_coco(find_dataset(f"{NAME}_train@33pct_seed0"), need_annotations=False)) == 1


def test_other_labels_make_another_list(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same images: run.json has the hash of this list for what was trained on."""
    lists = [find_dataset(f"{NAME}_val").annotations.read_bytes()]
    shutil.copytree(tree, tmp_path / "cityscapes")
    label = data.label_file(frames(tmp_path / "cityscapes")[0])
    with Image.open(label) as image:
        values = np.array(image)
    values[0, 0] = 8 if values[0, 0] == 7 else 7
    Image.fromarray(values).save(label)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    lists.append(find_dataset(f"{NAME}_val").annotations.read_bytes())
    one, other = ({**json.loads(text), "info": None} for text in lists)
    assert one == other
    assert lists[0] != lists[1]


def test_labels_follow_their_image_through_crop_resize_and_flip(tmp_path: Path) -> None:
    """Each pixel has the label of the pixel that the drawn transforms bring there, by PIL's nearest neighbours."""
    settings = cfg(tmp_path, INPUT__CROP__ENABLED=True, INPUT__CROP__TYPE="absolute", INPUT__CROP__SIZE=(48, 64))
    record = load_coco(find_dataset(f"{NAME}_train"), need_annotations=False)[0]
    truth = data.read_labels(data.label_file(record.file_name)).astype(int)
    mapper, flipped = DetectionMapper(settings, train=True), set()
    for seed in range(6):
        sample = mapper(record, sample_rng(seed, 0))
        drawn = mapper._transforms(record, sample_rng(seed, 0))
        crop = next(t for t in drawn if isinstance(t, Crop))
        size = next(t for t in drawn if isinstance(t, Resize))
        place = np.arange(truth.size, dtype=np.int32).reshape(truth.shape)  # of each pixel in the original
        place = place[crop.y : crop.y + crop.h, crop.x : crop.x + crop.w]
        shape = size.new_width, size.new_height
        place = np.array(Image.fromarray(place).resize(shape, Image.Resampling.NEAREST))
        flipped.add(len(drawn) == 3)
        if len(drawn) == 3:
            place = place[:, ::-1]
        assert sample["sem_seg"].dtype == torch.int64
        assert (sample["sem_seg"].numpy() == truth.ravel()[place]).all()
        assert sample["sem_seg"].shape == sample["image"].shape[1:]
        assert "instances" not in sample
    assert flipped == {True, False}


# --- head and loss ----------------------------------------------------------------------------------------------


def test_logits_and_loss_follow_from_the_tensors_one_by_one(tmp_path: Path) -> None:
    """The head written out, in float64: each level doubled until it has stride 4, summed, classified, enlarged."""
    settings = cfg(tmp_path, MODEL__SEM_SEG_HEAD__LOSS_WEIGHT=0.5)
    torch.manual_seed(0)
    model = build_model(settings)
    batch = next(iter(build_train_loader(settings)))
    model.train()
    loss = model(batch)["loss_sem_seg"].item()
    state = {k.removeprefix(HEAD): v.double() for k, v in model.state_dict().items() if k.startswith(HEAD)}
    assert {k.split(".")[0] for k in state} == {"p2", "p3", "p4", "p5", "predictor"}
    images, _ = model.preprocess(batch)
    with torch.no_grad():
        features = model.backbone(images)
    total = 0
    for level, doublings in (("p2", 0), ("p3", 1), ("p4", 2), ("p5", 3)):
        x = features[level].double()
        for k in range(max(1, doublings)):
            place = f"{level}.{2 * k}"
            x = F.conv2d(x, state[f"{place}.weight"], padding=1)
            x = F.group_norm(x, 32, state[f"{place}.norm.weight"], state[f"{place}.norm.bias"]).relu()
            if doublings:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    logits = F.conv2d(total, state["predictor.weight"], state["predictor.bias"])
    logits = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    picked = []
    for one, item in zip(logits.log_softmax(1), batch):
        labels = item["sem_seg"]
        for y, x in zip(*np.nonzero((labels != 255).numpy())):
            picked.append(-one[labels[y, x], y, x])
    assert loss == pytest.approx(0.5 * torch.stack(picked).mean().item(), rel=1e-5)
    model.eval()
    with torch.no_grad():
        found = model(batch)
    for one, given, item in zip(found, logits, batch):
        height, width = item["image"].shape[1:]
        wanted = F.interpolate(given[None, :, :height, :width], (item["height"], item["width"]), mode="bilinear")[0]
        assert one.shape == (19, item["height"], item["width"])
        assert (one - wanted).abs().max() < 1e-4


def test_frozen_features_stay_and_the_head_learns(tmp_path: Path) -> None:
    model = build_model(cfg(tmp_path))
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"backbone", "sem_seg_head"}
    assert not any(p.requires_grad for p in model.backbone.bottom_up.parameters())
    finetune = "configs/cityscapes_semantic_loco_r50_finetune.yaml"
    with torch.device("meta"):
        model = build_model(load_config(get_cfg(), finetune, ["MODEL.RESNETS.NORM", "BN"])[0])
    assert all(p.requires_grad for p in model.parameters())


# --- scores -----------------------------------------------------------------------------------------------------


def predicted(tree: Path, folder: Path, seed: int, classes: int = 19) -> None:
    """The truth with patches of other classes; where it is ignored, anything."""
    rng = np.random.default_rng(seed)
    for image in frames(tree):
        labels = data.read_labels(data.label_file(image))
        labels = np.where(labels == data.IGNORED, rng.integers(0, classes, labels.shape), labels) % classes
        for _ in range(6):
            y, x = rng.integers(0, 80), rng.integers(0, 130)
            labels[y : y + 24, x : x + 40] = rng.integers(classes)
        scores.write_prediction(folder, image, labels)


@pytest.mark.parametrize(("seed", "classes"), [(0, 19), (1, 19), (2, 12), (3, 1)])
def test_scores_are_the_benchmarks_to_the_last_bit(seed: int, classes: int, tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    predicted(tree, tmp_path, seed, classes)
    ours = scores.evaluate_semantic(frames(tree), tmp_path)["sem_seg"]
    official = scores.evaluate_semantic(frames(tree), tmp_path, official=True)["sem_seg"]
    assert list(ours) == list(official)
    assert ours == pytest.approx(official, rel=0, abs=0, nan_ok=True)
    assert not np.isnan([ours[k] for k in ("IoU", "iIoU", "IoU_sup", "iIoU_sup")]).any()


def test_scores_by_hand(tmp_path: Path) -> None:
    """Road left, car right; the prediction takes the car's upper half for road. A column of void counts nowhere."""
    root = tmp_path / "cityscapes"
    image = root / "leftImg8bit" / "val" / "aachen" / "aachen_000000_000019_leftImg8bit.png"
    truth = np.full((4, 9), 7)
    truth[:, 4:8], truth[:, 8] = 26, 0
    stem = root / "gtFine" / "val" / "aachen" / "aachen_000000_000019_gtFine"
    stem.parent.mkdir(parents=True)
    Image.fromarray(truth.astype(np.uint8)).save(f"{stem}_labelIds.png")
    Image.fromarray(np.where(truth == 26, 26001, truth).astype(np.uint16)).save(f"{stem}_instanceIds.png")
    found = np.zeros((4, 9), np.uint8)
    found[2:, 4:8] = 13
    scores.write_prediction(tmp_path, image, found)
    result = scores.evaluate_semantic([image], tmp_path)["sem_seg"]
    assert result["IoU-road"] == pytest.approx(100 * 16 / 24)
    assert result["IoU-car"] == 50.0
    assert np.isnan(result["IoU-sky"])
    assert result["IoU"] == pytest.approx((100 * 16 / 24 + 50) / 2)
    assert result["iIoU"] == pytest.approx(50.0)  # one object: its weight cancels, and no road is taken for a car
    with Image.open(scores.prediction_file(tmp_path, image)) as written:
        assert np.unique(np.array(written)).tolist() == [7, 26]


def test_a_missing_or_foreign_prediction_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        scores.evaluate_semantic(frames(tree), tmp_path)
    scores.write_prediction(tmp_path, frames(tree)[0], np.zeros((2, 2), np.uint8))
    with pytest.raises(UserError, match="of shape"):
        scores.evaluate_semantic(frames(tree), tmp_path)


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_training_both_evaluators_and_a_submission(engine: str, tree: Path, tmp_path: Path) -> None:
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    found = train_net(cfg(tmp_path / "run"), engine=engine)
    assert {"IoU", "iIoU", "IoU_sup", "iIoU_sup", "IoU-road"} <= set(found["sem_seg"])
    written = sorted(path.name for path in (tmp_path / "run/inference/sem_seg").iterdir())
    assert written == sorted(f"{image.stem}_pred.png" for image in frames(tree))
    weights = {"MODEL__WEIGHTS": tmp_path / "run/model_final.pth"}
    test = cfg(tmp_path / "test", DATASETS__TEST=(f"{NAME}_test",), **weights)
    assert train_net(test, engine=engine, eval_only=True) == {}
    with zipfile.ZipFile(tmp_path / "test/inference/cityscapes_submission.zip") as archive:
        assert len(archive.namelist()) == 3
    pytest.importorskip("cityscapesscripts")
    run = cfg(tmp_path / "eval", **weights)
    again = train_net(run, engine=engine, eval_only=True, evaluator="cityscapesscripts")
    assert again["sem_seg"] == pytest.approx(found["sem_seg"], rel=0, abs=0, nan_ok=True)


def test_report_and_sweep_know_the_scores(tmp_path: Path) -> None:
    found = train_net(cfg(tmp_path / "run"), engine="torchvision")["sem_seg"]
    assert last_scores(tmp_path / "run")["sem_seg/IoU"] == pytest.approx(found["IoU"])
    assert run_job("report", [str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    (experiment,) = report["experiments"]
    assert experiment["title"].startswith("Semantic segmentation FPN, frozen, cityscapes_fine_sem_seg_train")
    assert experiment["backbones"][0]["numbers"]["sem_seg/IoU"]["mean"] == pytest.approx(found["IoU"])
    page = (tmp_path / "report/index.html").read_text()
    for text in ("sem_seg IoU_sup", "sem_seg IoU, from scratch", "traffic light", "not evaluated"):
        assert text in page


@pytest.fixture
def judged(tree: Path, tmp_path: Path) -> Path:
    """Runs `one` and `two` with other labels, and the scores that belong to them."""
    train_net(cfg(tmp_path / "runs/one"), engine="torchvision")
    shutil.copytree(tmp_path / "runs/one", tmp_path / "runs/two")
    for seed, name in enumerate(("one", "two")):
        run = tmp_path / "runs" / name
        (run / "SHA256SUMS").unlink()
        predicted(tree, run / "inference/sem_seg", seed)
        found = scores.evaluate_semantic(frames(tree), run / "inference/sem_seg")["sem_seg"]
        flat = {f"sem_seg/{key}": None if np.isnan(value) else value for key, value in found.items()}
        (run / "metrics.json").write_text(json.dumps({"iteration": 1, **flat}) + "\n")
    return tmp_path / "runs"


def test_paired_bootstrap_against_all_draws_of_three_images(judged: Path, tree: Path) -> None:
    missing: list[str] = []
    (found,) = experiments(find_runs([f"{n}={judged / n}" for n in ("one", "two")]), None, 2000, missing)
    assert missing == []
    (pair,) = found["paired"]

    def iou(name: str, images: tuple[Path, ...]) -> float:
        return scores.evaluate_semantic(images, judged / name / "inference/sem_seg")["sem_seg"]["IoU"]

    drawn = [iou("two", images) - iou("one", images) for images in itertools.product(frames(tree), repeat=3)]
    assert (pair["backbone"], pair["images"]) == ("two", 3)
    assert pair["sem_seg"]["IoU"]["difference"] == pytest.approx(iou("two", frames(tree)) - iou("one", frames(tree)))
    # One image three times is one draw of 27, so the least and the greatest difference have more than 2.5 % each.
    assert pair["sem_seg"]["IoU"]["ci95"] == pytest.approx([min(drawn), max(drawn)])


def test_pictures_show_truth_and_labels_and_what_is_missing(judged: Path, tree: Path) -> None:
    predictions = judged / "one/inference/sem_seg"
    runs = find_runs([f"{n}={judged / n}" for n in ("one", "two")])
    missing: list[str] = []
    panel = panels(runs.detectors, 2, 0.5, missing)
    assert missing == []
    assert [list(row["pictures"]) for row in panel["rows"]] == [["ground truth", "one", "two"]] * 2
    shown = frames(tree)[0], frames(tree)[2]
    assert [row["image"] for row in panel["rows"]] == [image.name for image in shown]
    seen = {data.CLASSES[k] for image in shown for k in np.unique(data.read_labels(data.label_file(image))) if k < 255}
    colours = {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in zip(data.CLASSES, data.COLOURS)}
    assert seen <= {name for name, _ in panel["legend"]}
    assert all(colours[name] == colour for name, colour in panel["legend"])
    for row, image in zip(panel["rows"], shown):
        drawn = decoded(row["pictures"]["one"])
        with Image.open(scores.prediction_file(predictions, image)) as file, Image.open(image) as photo:
            shape = drawn.shape[1::-1]
            labels = np.array(file.resize(shape, Image.Resampling.NEAREST))
            pixels = np.array(photo.resize(shape, Image.Resampling.BICUBIC)).astype(float)
        table = dict(zip(data.LABEL_IDS.tolist(), data.COLOURS))
        expected = 0.4 * pixels + 0.6 * np.array([[table[k] for k in line] for line in labels.tolist()])
        own, other = (np.abs(picture - expected).mean() for picture in (drawn, decoded(row["pictures"]["two"])))
        assert own < 13, "more than JPEG does to noise"
        assert other > 2 * own
    scores.prediction_file(predictions, frames(tree)[0]).unlink()
    panel = panels(runs.detectors, 2, 0.5, missing)
    assert [row["pictures"]["one"] for row in panel["rows"]] == [None, None]
    assert all(row["pictures"]["two"] for row in panel["rows"])
    experiments(runs, None, 10, missing)
    assert len(missing) == 3
    assert "no pictures" in missing[0]
    assert "no paired differences" in missing[1]
    assert "one has no such run" in missing[2]


def decoded(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(float)


def test_doctor_looks_at_the_right_head() -> None:
    config = "configs/cityscapes_semantic_loco_r50.yaml"
    names = [f"data set {NAME}_{split}" for split in ("train", "val")]
    found = {check.name: check for check in examine_config(config, ["MODEL.WEIGHTS", ""])}
    assert [(found[name].status, found[name].found) for name in names] == [("ok", "19 classes, as in the config")] * 2
    found = {check.name: check for check in examine_config(config, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "54"])}
    assert found[names[0]].status == "fail"


def test_data_check_reads_the_labels(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tree, tmp_path / "cityscapes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def check() -> tuple[int, dict]:
        status = run_job("data", ["check", f"{NAME}_train", "--out", str(tmp_path / "out"), "--workers", "0"])
        return status, json.loads((tmp_path / "out/check.json").read_text())

    status, found = check()
    assert (status, found["counts"]["images"], found["classes"]["road"]) == (0, 3, 3)
    labels = data.label_file(frames(tmp_path / "cityscapes", "train")[1])
    Image.fromarray(np.full((96, 160), 200, np.uint8)).save(labels)
    status, found = check()
    assert (status, found["classes"]["road"]) == (1, 2)
    assert [d["kind"] for d in found["defects"]] == ["unusable labels"]
    assert "unknown label 200" in found["defects"][0]["examples"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DATASETS__TEST": ("cityscapes_fine_instance_seg_val@masks",)}, "no pixel labels.*set it to GeneralizedRCNN"),
        ({"MODEL__META_ARCHITECTURE": "GeneralizedRCNN"}, "has pixel labels.*set it to SemanticSegmentor"),
        ({"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 54}, r"has 19 classes and MODEL\.SEM_SEG_HEAD\.NUM_CLASSES is 54"),
    ],
)
def test_what_does_not_fit_is_refused_first(changes: dict, message: str, tmp_path: Path) -> None:
    settings = cfg(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        check_classes(settings, settings.DATASETS.TRAIN, settings.DATASETS.TEST)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SEM_SEG_HEAD__IN_FEATURES": ("p2", "p6")}, "up to stride 32"),
        ({"SEM_SEG_HEAD__IN_FEATURES": ("res2",)}, "must be features of the backbone"),
        ({"SEM_SEG_HEAD__COMMON_STRIDE": 8}, "COMMON_STRIDE is 8"),
        ({"SEM_SEG_HEAD__CONVS_DIM": 20}, "multiple of 32"),
        ({"SEM_SEG_HEAD__NAME": "Other"}, "SEM_SEG_HEAD.NAME is 'Other'"),
    ],
)
def test_heads_that_cannot_be_made_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    def make() -> None:
        changed = cfg(tmp_path, **{f"MODEL__{key}": value for key, value in changes.items()})
        check_supported(changed)
        build_model(changed)

    with pytest.raises(UserError, match=message):
        make()


# --- Detectron2 -------------------------------------------------------------------------------------------------


@pytest.mark.detectron2
@pytest.mark.parametrize("norm", ["GN", ""])
def test_loss_gradients_and_logits_are_detectron2s(norm: str, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    from loco_det.detection import engine_d2

    settings = cfg(tmp_path, MODEL__SEM_SEG_HEAD__NORM=norm, MODEL__SEM_SEG_HEAD__LOSS_WEIGHT=0.5)
    torch.manual_seed(0)
    ours, theirs = build_model(settings), engine_d2.Detectron2Engine().build_model(settings)
    weights = {k: v for k, v in ours.state_dict().items() if "num_batches_tracked" not in k}
    known = {k: v for k, v in theirs.state_dict().items() if "num_batches_tracked" not in k}
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in known.items()}
    theirs.load_state_dict(weights, strict=False)
    batch = next(iter(build_train_loader(settings)))
    found = [engine_d2.Detectron2Engine().losses(model.train(), batch)["loss_sem_seg"] for model in (ours, theirs)]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-6)
    for loss in found:
        loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        logits = [engine_d2.Detectron2Engine().predict(model.eval(), batch) if model is theirs else model.eval()(batch)
                  for model in (ours, theirs)]  # fmt: skip
    for one, other in zip(*logits):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.detectron2
def test_labels_of_a_sample_are_what_detectron2s_mapper_makes(tmp_path: Path) -> None:
    """For the same draws, from the ids that were downloaded."""
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as d2

    from loco_det.detection import engine_d2

    settings = cfg(tmp_path)
    mapper = DetectionMapper(settings, train=True)
    records = engine_d2._semantic_records(find_dataset(f"{NAME}_train"))
    for k, (record, theirs) in enumerate(
        zip(load_coco(find_dataset(f"{NAME}_train"), need_annotations=False), records)
    ):
        sample = mapper(record, sample_rng(k, 0))
        steps = [
            d2.ResizeTransform(t.height, t.width, t.new_height, t.new_width) if isinstance(t, Resize)
            else d2.HFlipTransform(t.length) for t in mapper._transforms(record, sample_rng(k, 0))
        ]  # fmt: skip
        other = DatasetMapper(is_train=True, augmentations=steps, image_format="RGB")
        found = engine_d2._SemanticMapper(other, [find_dataset(f"{NAME}_train")])(theirs)
        assert (found["image"] == sample["image"]).all()
        assert (found["sem_seg"] == sample["sem_seg"]).all()


@pytest.mark.detectron2
@pytest.mark.parametrize(("writer", "reader"), [("torchvision", "detectron2"), ("detectron2", "torchvision")])
def test_a_checkpoint_of_one_engine_has_the_same_scores_in_the_other(writer: str, reader: str, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    written = train_net(cfg(tmp_path / "written"), engine=writer)["sem_seg"]
    weights = {"MODEL__WEIGHTS": tmp_path / "written/model_final.pth"}
    read = train_net(cfg(tmp_path / "read", **weights), engine=reader, eval_only=True)["sem_seg"]
    assert read == pytest.approx(written, abs=0.01, nan_ok=True)  # a pixel whose two best logits tie may change
