"""Row C7: pixel labels of one's own by path, Pascal VOC's and Cityscapes' folders, through training and evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapes_cases import write_cityscapes
from PIL import Image
from tiny_detection import overrides, tiny_cfg

from loco_det.annotations.coco import load_coco
from loco_det.annotations.label_folders import read_class_names
from loco_det.annotations.loader import build_train_loader
from loco_det.annotations.registry import Dataset, find_dataset, has_pixels
from loco_det.cli import main
from loco_det.commands.doctor import examine_config
from loco_det.core.errors import UserError
from loco_det.detection.train import check_classes, train_net
from loco_det.evaluation import labels as scores
from loco_det.report.panels import panels
from loco_det.report.runs import find_runs

ENGINES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
HEIGHT, WIDTH = 48, 64


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


def write_mask(path: Path, values: np.ndarray, mode: str = "L") -> None:
    """`values` as the pixels of a PNG; in mode P under a palette whose colours say something else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([(37 * k + 11) % 256 for k in range(768)])
    image.save(path)


def values_of(number: int, classes: int = 3) -> np.ndarray:
    """Rectangles of every class on class 0, and a corner that is ignored."""
    rng = np.random.default_rng(number)
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    for k in range(1, classes):
        y, x = rng.integers(0, 24), rng.integers(0, 32)
        values[y : y + 16, x : x + 20] = k
    values[:6, :6] = 255
    return values


def write_street(
    images: str = "street/images", masks: str = "street/masks", names: tuple[str, ...] = ("a", "b", "c"), **kinds: str
) -> None:
    """Images whose colours follow their masks."""
    for number, name in enumerate(names):
        values = values_of(number)
        image = Path(images, f"{name}{kinds.get('suffix', '.jpg')}")
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([values * 70, 255 - values, values * 3], 2).astype(np.uint8)).save(image)
        write_mask(Path(masks, f"{name}{kinds.get('ending', '.png')}"), values, kinds.get("mode", "L"))


def cfg(folder: Path, train: str, test: str, classes: int = 3, **changes: object):
    return tiny_cfg(
        folder,
        **{
            "MODEL__META_ARCHITECTURE": "SemanticSegmentor",
            "MODEL__SEM_SEG_HEAD__NUM_CLASSES": classes,
            "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
            "DATASETS__TRAIN": (train,),
            "DATASETS__TEST": (test,),
            "SOLVER__MAX_ITER": 2,
            "SOLVER__STEPS": (1,),
            **changes,
        },
    )


def truth(dataset: Dataset) -> dict[str, np.ndarray]:
    """Classes of every image by its file name."""
    loaded = load_coco(dataset, need_annotations=False)
    names = dataset.index.file_name.tolist()
    return {name: r.labels.read(r.file_name, (r.height, r.width)) for name, r in zip(names, loaded)}


def checked(*arguments: str) -> tuple[int, dict]:
    """`loco-det data check`: its status and what it wrote."""
    status = main(["data", "check", *arguments, "--out", "out", "--workers", "0"])
    return status, json.loads(Path("out/check.json").read_text()) if Path("out/check.json").exists() else {}


# --- what a spelling stands for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P"])
def test_values_are_classes_whatever_the_palette(mode: str) -> None:
    write_street(mode=mode)
    Path("street/classes.txt").write_text("road\ncar\n\ntree\n")
    dataset = find_dataset("street/masks@street/images")
    assert dataset.is_pixels
    assert dataset.index.categories == {0: "road", 1: "car", 2: "tree"}
    found = truth(dataset)
    assert list(found) == ["a.jpg", "b.jpg", "c.jpg"]
    for number, values in enumerate(found.values()):
        assert (values == values_of(number)).all()
    (part,) = truth(find_dataset("street/masks@street/images@30pct_seed0"))
    assert part in found


@pytest.mark.parametrize(
    ("images", "masks", "kinds"),
    [
        ("street/images", "street/masks", {"ending": "_mask.png"}),
        ("street/images", "street/labels", {"ending": "_L.png", "suffix": ".png"}),
        ("street/images", "street/ann", {"suffix": ".bmp"}),
        ("street/all", "street/all", {"suffix": ".jpg"}),
        ("street/all", "street/all", {"ending": "_mask.png", "suffix": ".png"}),
        ("street", "street/masks", {"suffix": ".png"}),
        ("street/photos", "street", {"suffix": ".png"}),
    ],
)
def test_masks_find_their_images(images: str, masks: str, kinds: dict[str, str]) -> None:
    write_street(images, masks, **kinds)
    found = truth(find_dataset(f"./{masks}@./{images}"))
    assert [Path(name).stem for name in found] == ["a", "b", "c"]
    for number, values in enumerate(found.values()):
        assert (values == values_of(number)).all()


@pytest.mark.parametrize("names", ["train.txt", "train", "Train rows.txt"])
def test_splits_are_folders_or_lists(names: str) -> None:
    if names == "train":
        write_street("d/images/train", "d/masks/train")
        write_street("d/images/val", "d/masks/val", ("x",))
    else:
        write_street("d/images", "d/masks", ("a", "b", "c", "x"))
        Path("d/images/unlabelled.jpg").write_bytes(b"never opened")
        lines = "a\nb\nc\n" if names == "train.txt" else "/images/a.jpg /masks/a.png\nimages/b.jpg\nc\n"
        Path("d/train.txt").write_text(lines)
        Path("d/val.txt").write_text("x\n")
    found = [[Path(name).stem for name in truth(find_dataset(f"d/masks@d/images@{s}"))] for s in ("train", "val")]
    assert found == [["a", "b", "c"], ["x"]]
    with pytest.raises(UserError, match="put one of @train, @val behind" if names == "train" else "lacks 1 masks"):
        find_dataset("d/masks@d/images")


def write_voc(root: Path) -> None:
    """VOC 2012's layout: palette masks of a few of many images, and lists."""
    names = ("2007_000032", "2007_000039", "2008_000008")
    write_street(f"{root}/JPEGImages", f"{root}/SegmentationClass", names, mode="P")
    write_street(f"{root}/JPEGImages", f"{root}/elsewhere", ("2012_000001",))
    shutil.rmtree(root / "elsewhere")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("2007_000032\n2008_000008\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000039\n")


@pytest.mark.parametrize("spelling", ["VOC2012/SegmentationClass", "VOC2012/SegmentationClass@VOC2012/JPEGImages"])
def test_voc_2012(spelling: str) -> None:
    write_voc(Path("VOC2012"))
    dataset = find_dataset(f"./{spelling}@train")
    assert (len(dataset.index.category_names), dataset.index.category_names[:2]) == (21, ("background", "aeroplane"))
    found = truth(dataset)
    assert list(found) == ["2007_000032.jpg", "2008_000008.jpg"]
    assert (found["2008_000008.jpg"] == values_of(2)).all()
    with pytest.raises(UserError, match="several splits; put one of @train, @val"):
        find_dataset(f"./{spelling}")
    with pytest.raises(UserError, match="no split 'test'; put one of @train, @val"):
        find_dataset(f"./{spelling}@test")


def test_ade20k_counts_its_classes_from_1_and_ignores_0() -> None:
    for split in ("training", "validation"):
        write_street(f"ade/images/{split}", f"ade/annotations/{split}")
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t9\t1\t1\twall", "2\t0.1\t9\t1\t0\tscreen, CRT screen", ""]
    Path("ade/objectInfo150.txt").write_text("\r\n".join(rows), newline="")
    for name in ("ade/annotations/training@ade/images/training", "ade/annotations@ade/images@training"):
        dataset = find_dataset(name)
        assert dataset.index.categories == {1: "wall", 2: "screen, CRT screen"}
        for part in (dataset, find_dataset(f"{name}@40pct_seed0")):
            for file, classes in truth(part).items():
                values = values_of("abc".index(Path(file).stem))
                assert (classes == np.array([255, 0, 1])[values.clip(0, 2)])[values < 255].all()
                assert (classes[values == 255] == 255).all()
    write_mask(Path("ade/annotations/training/a.png"), np.full((HEIGHT, WIDTH), 3, np.uint8))
    with pytest.raises(UserError, match=r"has the value 3 .* the classes are 1 to 2"):
        truth(find_dataset("ade/annotations/training@ade/images/training"))


def test_objects_of_the_same_folder_are_another_data_set() -> None:
    """A name alone tells which is meant; so does a folder whose own name holds an @."""
    assert has_pixels("VOC2012/SegmentationClass@train")
    assert has_pixels("street/masks@street/images@10pct_seed0")
    for name in ("./VOC2012@train", "cells/a.json@cells/images", "a/via.json@b/c@train", "gtFine@leftImg8bit",
                 "cs/gtFine@cs/leftImg8bit@val@masks", "street/masks@train", "coco_2017_train"):  # fmt: skip
        assert not has_pixels(name), name
    Path("me@home/masks").mkdir(parents=True)
    assert not has_pixels("./me@home/masks")
    assert has_pixels("./me@home/masks@./me@home/images")


# --- names of classes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("classes.txt", "\ufeffa\r\nb b\r\n", {0: "a", 1: "b b"}),
        ("class_names.txt", "__ignore__\n_background_\ncat\n", {0: "_background_", 1: "cat"}),
        ("names.json", '["a", "b"]', {0: "a", 1: "b"}),
        ("names.json", '{"3": "a", "1": "b", "255": "void"}', {1: "b", 3: "a"}),
        ("labels.json", '{"a": 4, "b": 2, "void": 255}', {2: "b", 4: "a"}),
        ("classes.yaml", "names:\n  0: a\n  7: b\n", {0: "a", 7: "b"}),
        ("classes.yml", "- a\n- 'no'\n- no\n", None),
        ("classes.yml", "- a\n- no\n", {0: "a", 1: "no"}),
        ("classes.yaml", "classes: [a, b]\nother: 3\n", {0: "a", 1: "b"}),
        ("classes.json", '{"0": "a", "300": "b"}', None),
        ("classes.json", '{"0": "a", "1": "a"}', None),
        ("classes.json", '{"a": "b"}', None),
        ("classes.json", "3", None),
        ("classes.json", "[" * 10**5, None),
        ("classes.yaml", "a: &a {b: *a}", None),
        ("classes.yaml", "[" * 10**5, None),
        ("classes.yaml", "a: !!int ''\n", None),
        ("objectInfo150.txt", "Idx\tName\n1\twall\n2\tsea, ocean\n", {1: "wall", 2: "sea, ocean"}),
        ("objectInfo150.txt", "Idx Name\n1 wall\n", None),
        ("classes.txt", "", None),
        ("classes.txt", "a\n" * 10**6, None),
    ],
)
def test_files_of_names(file: str, text: str, names: dict[int, str] | None) -> None:
    path = Path(file)
    path.write_text(text, newline="")
    if names is not None:
        assert read_class_names(path) == names
        return
    with pytest.raises(UserError, match=rf"^{file}: (does not name classes|each value)"):
        read_class_names(path)


def test_without_names_classes_are_numbered_to_the_greatest_value() -> None:
    write_street()
    assert find_dataset("street/masks@street/images").index.categories == {k: f"class {k}" for k in range(3)}
    for name in ("a", "b", "c"):
        write_mask(Path(f"street/masks/{name}.png"), np.where(values_of(0) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(UserError, match="no class but 0 in its masks; 255 is ignored"):
        find_dataset("street/masks@street/images")


def test_gaps_between_values_make_no_gaps_between_classes(tmp_path: Path) -> None:
    write_street()
    for number, name in enumerate("abc"):
        values = values_of(number)
        write_mask(Path(f"street/masks/{name}.png"), np.where(values == 2, 9, values).astype(np.uint8))
    Path("street/classes.json").write_text('{"0": "road", "1": "car", "9": "tree"}')
    dataset = find_dataset("street/masks@street/images")
    assert all((found == values_of(k)).all() for k, found in enumerate(truth(dataset).values()))
    found = train_net(cfg(tmp_path / "run", dataset.name, dataset.name), engine="torchvision")
    assert set(found["sem_seg"]) >= {"IoU", "IoU-tree"}
    written = np.unique(np.array(Image.open(tmp_path / "run/inference/sem_seg/a_pred.png")))
    assert set(written.tolist()) <= {0, 1, 9}


# --- what is wrong is one sentence, the same everywhere ----------------------------------------------------------


def remove(*paths: str) -> Callable[[], None]:
    return lambda: [Path(path).unlink() for path in paths]


def colours() -> None:
    for name in "ab":
        Image.open(f"street/masks/{name}.png").convert("RGB").save(f"street/masks/{name}.png")


def resized() -> None:
    Image.open("street/masks/b.png").resize((32, 48)).save("street/masks/b.png")


def turned() -> None:
    image = Image.open("street/images/b.jpg")
    exif = image.getexif()
    exif[274] = 6
    image.save("street/images/b.jpg", exif=exif)


def as_jpeg() -> None:
    for name in "abc":
        Image.open(f"street/masks/{name}.png").save(f"street/masks/{name}.jpg")
        Path(f"street/masks/{name}.png").unlink()


def two_masks() -> None:
    shutil.copy("street/masks/a.png", "street/masks/a_mask.png")


def two_images() -> None:
    Image.open("street/images/a.jpg").save("street/images/a.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("street/masks/b.png"), "street/masks lacks 1 masks to go with the files in street/images, b first"),
        (remove("street/images/a.jpg", "street/images/b.jpg"), "street/images lacks 2 images .* a first; complete"),
        (colours, r"masks/a\.png and 1 other masks are pictures in colour \(RGB\); save them with one channel"),
        (resized, r"b\.png is 32 x 48 pixels and its image .*b\.jpg 64 x 48, and 0 other masks"),
        (turned, r"b\.png is 64 x 48 pixels and its image .*b\.jpg, turned upright as its EXIF data say, 48 x 64"),
        (as_jpeg, r"a\.jpg is no mask: its compression changes the classes; save masks as PNG"),
        (two_masks, r"a\.png and .*a_mask\.png are masks of one image; remove one"),
        (two_images, r"a\.jpg and .*a\.png have one mask; remove or rename"),
        (lambda: shutil.rmtree("street/images"), "there is no folder street/images; write MASKS@IMAGES"),
        (lambda: shutil.rmtree("street/masks"), "there is no folder street/masks; write MASKS@IMAGES"),
        (
            lambda: shutil.copy("street/classes.txt", "street/names.txt"),
            r"classes\.txt and names\.txt both name classes",
        ),
    ],
)
def test_training_data_check_and_doctor_say_the_same(
    spoil: Callable[[], None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_street()
    Path("street/classes.txt").write_text("road\ncar\ntree\n")
    spoil()
    name = "street/masks@street/images"
    with pytest.raises(UserError, match=message) as raised:
        train_net(cfg(tmp_path / "run", name, name), engine="torchvision")
    assert not list(tmp_path.glob("run/*.pth"))
    said = str(raised.value)
    assert checked(name)[0] == 2
    assert said in capsys.readouterr().err
    settings = overrides(
        MODEL__META_ARCHITECTURE="SemanticSegmentor", DATASETS__TRAIN=(name,), DATASETS__TEST=(), OUTPUT_DIR="out"
    )
    found = {check.name: check for check in examine_config("configs/coco_loco_r50.yaml", settings)}
    assert (found[f"data set {name}"].status, found[f"data set {name}"].found) == ("fail", said)


def test_a_value_that_is_no_class_is_said_alike_by_training_and_data_check(tmp_path: Path) -> None:
    """Only decoding shows it, so a training endures its share; above that it stops with the sentence."""
    write_street()
    Path("street/classes.txt").write_text("road\ncar\ntree\n")
    values = values_of(1)
    values[10, 3:8] = 77
    write_mask(Path("street/masks/b.png"), values)
    name = "street/masks@street/images"
    said = r"b\.png: has the value 77 in 5 pixels, which is no class; the classes are 0 to 2, and 255 is ignored"
    status, found = checked(name)
    assert status == 1
    assert [(d["kind"], d["count"]) for d in found["defects"]] == [("unusable labels", 1)]
    settings = cfg(tmp_path / "run", name, name, SOLVER__MAX_ITER=4)
    with pytest.raises(UserError, match=said) as raised:
        train_net(settings, engine="torchvision", max_bad_share=0.0)
    (example,) = found["defects"][0]["examples"]
    assert example.rstrip(".") in str(raised.value)
    batches = iter(build_train_loader(settings, max_bad_share=0.5))
    seen = {Path(sample["file_name"]).stem for _ in range(4) for sample in next(batches)}
    assert seen == {"a", "c"}


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """Row B1 for pixels: the test set numbers the classes otherwise, and lacks one."""
    write_street()
    Path("street/classes.txt").write_text("road\ncar\ntree\n")
    write_street("test/images", "test/masks")
    Path("test/masks/classes.json").write_text('{"tree": 0, "road": 1}')
    for number, name in enumerate("abc"):
        write_mask(Path(f"test/masks/{name}.png"), np.array([1, 255, 0, 255], np.uint8)[values_of(number).clip(0, 3)])
    names = "street/masks@street/images", "test/masks@test/images"
    found = train_net(cfg(tmp_path / "run", *names), engine="torchvision")["sem_seg"]
    model = {}
    again = cfg(tmp_path / "again", names[0], names[0], MODEL__WEIGHTS=tmp_path / "run/model_final.pth")
    train_net(again, engine="torchvision", eval_only=True)
    for number, name in enumerate("abc"):
        wanted = values_of(number)
        claimed = np.array(Image.open(tmp_path / f"again/inference/sem_seg/{name}_pred.png"))
        for k in (0, 2):
            kept = (wanted != 255) & (wanted != 1)
            counts = model.setdefault(k, [0, 0])
            counts[0] += int(((wanted == k) & (claimed == k) & kept).sum())
            counts[1] += int((((wanted == k) | (claimed == k)) & kept).sum())
    ious = {k: 100 * right / total if total else np.nan for k, (right, total) in model.items()}
    assert found["IoU-road"] == pytest.approx(ious[0])
    assert found["IoU-tree"] == pytest.approx(ious[2])
    Path("test/masks/classes.json").write_text('{"sky": 0, "road": 1}')
    settings = cfg(tmp_path / "run", *names)
    with pytest.raises(UserError, match=r"\(sky\), which street/masks@street/images has not"):
        check_classes(settings, settings.DATASETS.TRAIN, settings.DATASETS.TEST)


# --- scores ------------------------------------------------------------------------------------------------------


def test_scores_against_pixels_counted_one_by_one(tmp_path: Path) -> None:
    write_street(names=("x/a", "x/b", "y/a"))
    dataset = find_dataset("street/masks@street/images")
    rng, counts = np.random.default_rng(0), np.zeros((3, 4), int)
    for number, name in enumerate(("x/a", "x/b", "y/a")):
        claimed = np.where(
            rng.random((HEIGHT, WIDTH)) < 0.6, values_of(number), rng.choice([0, 1, 2, 255], (HEIGHT, WIDTH))
        )
        file = scores.prediction_file(dataset, dataset.images / f"{name}.jpg", tmp_path / "found")
        assert file == tmp_path / f"found/{name}_pred.png"
        write_mask(file, claimed.astype(np.uint8))
        for wanted, guess in zip(values_of(number).ravel().tolist(), claimed.ravel().tolist()):
            if wanted != 255:
                counts[wanted, min(guess, 3)] += 1
    found = scores.scores(scores.confusions(dataset, tmp_path / "found").sum(0), dataset.index.category_names)
    right = [counts[k, k] for k in range(3)]
    iou = [right[k] / (counts[k].sum() + counts[:, k].sum() - right[k]) for k in range(3)]
    assert found["IoU"] == pytest.approx(100 * sum(iou) / 3)
    assert found["IoU-class 1"] == pytest.approx(100 * iou[1])
    assert found["pACC"] == pytest.approx(100 * sum(right) / counts.sum())
    assert found["mACC"] == pytest.approx(100 * sum(right[k] / counts[k].sum() for k in range(3)) / 3)
    assert found["fwIoU"] == pytest.approx(100 * sum(iou[k] * counts[k].sum() for k in range(3)) / counts.sum())
    assert main(["evaluate", str(tmp_path / "found"), "--data", dataset.name, "--bootstrap", "50"]) == 0
    file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        scores.confusions(dataset, tmp_path / "found")


def test_a_perfect_prediction_has_100_and_an_absent_class_no_number() -> None:
    found = scores.scores(np.array([[4, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]]), ("a", "b", "c"))
    assert [found[k] for k in ("IoU", "fwIoU", "mACC", "pACC", "IoU-a")] == [100] * 5
    assert np.isnan(found["IoU-c"])


# --- from end to end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_train_evaluate_predict_report(engine: str, tmp_path: Path) -> None:
    if engine == "detectron2":
        pytest.importorskip("detectron2")
    write_voc(Path("VOC2012"))
    train, test = ("VOC2012/SegmentationClass@train", "VOC2012/SegmentationClass@val")
    settings = cfg(tmp_path / "run", train, test, 21)
    found = train_net(settings, engine=engine)["sem_seg"]
    assert {"IoU", "pACC", "IoU-background", "IoU-aeroplane"} <= set(found)
    status, told = checked(f"./{test}")
    assert (status, told["classes"]["background"], told["counts"]["images"]) == (0, 1, 1)
    folder = tmp_path / "run/inference/sem_seg"
    assert main(["evaluate", str(folder), "--data", test, "--bootstrap", "0", "--json", "numbers.json"]) == 0
    again = json.loads(Path("numbers.json").read_text())["results"][0]["numbers"]["sem_seg"]
    assert again["IoU"] == pytest.approx(found["IoU"])
    shown = panels(find_runs([str(tmp_path / "run")]).detectors, 1, 0.5, missing := [])
    assert missing == []
    assert all(shown["rows"][0]["pictures"].values())
    assert main(["report", str(tmp_path / "run"), "--out", "report"]) == 0
    weights = ["--weights", str(tmp_path / "run/model_final.pth"), "--config-file", str(tmp_path / "run/config.yaml")]
    arguments = ["predict", "VOC2012/JPEGImages/2007_000039.jpg", "--out", "predicted", "--engine", engine]
    assert main([*arguments, "--exact", *weights]) == 0
    predicted = np.array(Image.open("predicted/sem_seg/2007_000039.jpg_pred.png"))
    assert (predicted == np.array(Image.open(folder / "2007_000039_pred.png"))).all()
    names = json.loads(Path("predicted/sem_seg.json").read_text())["categories"]
    assert names[:2] == [{"id": 0, "name": "background"}, {"id": 1, "name": "aeroplane"}]


@pytest.mark.detectron2
def test_both_engines_see_the_same_labels_under_a_palette() -> None:
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetMapper

    from loco_det.detection import engine_d2

    write_street(mode="P")
    dataset = find_dataset("street/masks@street/images")
    mapper = engine_d2._SemanticMapper(DatasetMapper(is_train=True, augmentations=[], image_format="RGB"), [dataset])
    for record, own in zip(engine_d2._semantic_records(dataset), truth(dataset).values()):
        assert (mapper(record)["sem_seg"].numpy() == own).all()


# --- Cityscapes' other sets --------------------------------------------------------------------------------------


def renamed(root: Path, old: str, new: str) -> None:
    """Every file below `root` whose name holds `old`."""
    for path in sorted(root.rglob(f"*{old}*")):
        if path.is_file():
            path.rename(path.with_name(path.name.replace(old, new)))


def foggy(root: Path) -> None:
    """As the archives have it: three densities of fog for each image, the truth that of the fine set."""
    (root / "leftImg8bit").rename(root / "leftImg8bit_foggy")
    for path in sorted((root / "leftImg8bit_foggy").rglob("*.png")):
        for beta in ("0.005", "0.01", "0.02"):
            shutil.copy(path, path.with_name(f"{path.stem}_foggy_beta_{beta}.png"))
        path.unlink()


def coarse(root: Path) -> None:
    (root / "gtFine").rename(root / "gtCoarse")
    renamed(root / "gtCoarse", "_gtFine_", "_gtCoarse_")
    for kind in ("gtCoarse", "leftImg8bit"):
        (root / kind / "train").rename(root / kind / "train_extra")


def jpeg(root: Path) -> None:
    for path in sorted((root / "leftImg8bit").rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


KINDS = [
    (foggy, "cs/gtFine@cs/leftImg8bit_foggy@train@foggy_beta_0.02", 4),
    (foggy, "cs/gtFine/train@cs/leftImg8bit_foggy/train@foggy_beta_0.005", 4),
    (foggy, "cs/gtFine@cs/leftImg8bit_foggy@train", 12),
    (coarse, "cs/gtCoarse@cs/leftImg8bit@train_extra", 4),
    (coarse, "cs/gtCoarse/train_extra@cs/leftImg8bit/train_extra", 4),
    (jpeg, "cs/gtFine@cs/leftImg8bit@train", 4),
]


@pytest.mark.parametrize(("change", "name", "images"), KINDS)
def test_foggy_coarse_and_jpeg_cityscapes(
    change: Callable[[Path], None], name: str, images: int, tmp_path: Path
) -> None:
    plain = write_cityscapes(tmp_path / "datasets")
    shutil.copytree(plain, "cs")
    change(Path("cs"))
    wanted = truth(find_dataset("cityscapes_fine_sem_seg_train"))
    found = truth(find_dataset(name))
    assert len(found) == images
    for file, labels in found.items():
        frame = Path(file).name.partition("_leftImg8bit")[0]
        (own,) = (values for other, values in wanted.items() if Path(other).name.startswith(frame))
        assert (labels == own).all()
    fine = find_dataset("cityscapes_fine_instance_seg_train@masks").index
    objects = find_dataset(f"{name}@masks").index
    assert not has_pixels(f"{name}@masks")
    assert len(objects.image_id) == images
    assert len(objects.annotation_id) == len(fine.annotation_id) * images // 4
    assert sorted({*map(tuple, objects.bbox.tolist())}) == sorted({*map(tuple, fine.bbox.tolist())})
    pytest.importorskip("shapely")
    fine = find_dataset("cityscapes_fine_instance_seg_train").index
    assert sorted({*map(tuple, find_dataset(f"{name}@polygons").index.bbox.tolist())}) == sorted(
        {*map(tuple, fine.bbox.tolist())}
    )


def test_jpeg_images_under_the_names_of_cityscapes(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path / "datasets")
    before = truth(find_dataset("cityscapes_fine_sem_seg_val"))
    objects = find_dataset("cityscapes_fine_instance_seg_val@masks").index.bbox.tolist()
    jpeg(root)
    after = truth(find_dataset("cityscapes_fine_sem_seg_val"))
    assert [name.replace(".png", ".jpg") for name in before] == list(after)
    assert all((one == other).all() for one, other in zip(before.values(), after.values()))
    assert find_dataset("cityscapes_fine_instance_seg_val@masks").index.bbox.tolist() == objects


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (
            "leftImg8bit/train/aachen",
            "cs/gtFine@cs/leftImg8bit@train",
            r"cs/leftImg8bit lacks 2 images .*train/aachen/",
        ),
        ("gtFine/train/bochum", "cs/gtFine@cs/leftImg8bit@train", r"cs/gtFine lacks 2 masks .*train/bochum/"),
        ("", "cs/gtFine@cs/leftImg8bit", "put one of @test, @train, @val behind"),
        ("", "cs/gtFine@cs/leftImg8bit@train@foggy_beta_0.02", "@foggy_beta_0.02 is neither a list"),
        ("", "cs/leftImg8bit@cs/gtFine@train@masks", "holds no instances called as Cityscapes'"),
    ],
)
def test_half_a_cityscapes_is_refused(spoil: str, name: str, message: str) -> None:
    write_cityscapes(Path("data"))
    Path("data/cityscapes").rename("cs")
    if spoil:
        shutil.rmtree(Path("cs") / spoil)
    with pytest.raises(UserError, match=message):
        find_dataset(name)


def test_a_segmentor_of_masks_of_cityscapes_by_path_writes_label_ids(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    name = "cityscapes/gtFine@cityscapes/leftImg8bit@val"
    torch.manual_seed(0)
    found = train_net(cfg(tmp_path / "run", name, name, 19), engine="torchvision")["sem_seg"]
    shutil.copytree(tmp_path / "cityscapes", tmp_path / "datasets/cityscapes")
    again = cfg(
        tmp_path / "again", *["cityscapes_fine_sem_seg_val"] * 2, 19, MODEL__WEIGHTS=tmp_path / "run/model_final.pth"
    )
    official = train_net(again, engine="torchvision", eval_only=True)["sem_seg"]
    assert found["IoU"] == pytest.approx(official["IoU"])
    assert found["IoU-road"] == pytest.approx(official["IoU-road"], nan_ok=True)
