"""The made-up set: repeatable, sound as a COCO set, and not solvable by colour."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from loco_det.annotations.coco import load_coco
from loco_det.annotations.loader import build_train_loader
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.synthetic import CLASS_NAMES, LEAST_VISIBLE, draw_image, make_shapes_dataset
from loco_det.cli import _parsed, _parser, main
from loco_det.core.errors import UserError
from loco_det.detection.keys import get_cfg, load_cfg
from loco_det.detection.train import check_classes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return root, make_shapes_dataset(root, train=24, val=12, size=64, seed=3)


def test_the_seed_decides_every_pixel(made, tmp_path):
    root, paths = made
    make_shapes_dataset(tmp_path / "again", train=24, val=12, size=64, seed=3)
    make_shapes_dataset(tmp_path / "other", train=24, val=12, size=64, seed=4)
    files = sorted(p.relative_to(root) for p in root.rglob("*.*") if p.is_file())
    assert len(files) == 24 + 12 + 2
    assert all((root / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert not any((root / f).read_bytes() == (tmp_path / "other" / f).read_bytes() for f in files)
    train = {(root / "shapes" / "train" / f"{i:06d}.png").read_bytes() for i in range(24)}
    val = {p.read_bytes() for p in paths["shapes_val"].images.iterdir()}
    assert len(train) == 24
    assert not train & val


def test_annotations_are_the_visible_parts(made):
    _, paths = made
    for split, count in (("train", 24), ("val", 12)):
        coco = COCO(str(paths[f"shapes_{split}"].annotations))
        assert len(coco.imgs) == count
        for image_id, image in coco.imgs.items():
            pixels = cv2.imread(str(paths[f"shapes_{split}"].images / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (64, 64, 3)
            assert coco.imgToAnns[image_id]
            total = np.zeros((64, 64), dtype=int)
            for annotation in coco.imgToAnns[image_id]:
                mask = coco.annToMask(annotation)
                rows, columns = np.nonzero(mask)
                x, y, w, h = annotation["bbox"]
                assert (x, y) == (columns.min(), rows.min())
                assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
                assert annotation["area"] == mask.sum()
                total += mask
            assert total.max() <= 1


def test_no_object_is_hidden_beyond_recognition():
    hidden = []
    for i in range(30):
        _, objects = draw_image(64, np.random.default_rng(i))
        hidden += [visible.sum() for _, visible in objects]
    # The smallest shape, a star of radius 0.12 S, covers about 1.1 r^2 pixels.
    assert min(hidden) >= LEAST_VISIBLE * 1.0 * (0.12 * 64) ** 2 * 0.5
    assert len(hidden) > 60


def test_classes_are_balanced_and_their_colours_say_nothing():
    colours, classes = [], []
    for i in range(250):
        pixels, objects = draw_image(64, np.random.default_rng([9, i]))
        for kind, visible in objects:
            inside = pixels[visible].astype(float)
            colours.append([*inside.mean(0), *inside.std(0)])
            classes.append(kind)
    colours, classes = np.array(colours), np.array(classes)
    share = np.bincount(classes, minlength=len(CLASS_NAMES)) / len(classes)
    assert share.min() > 0.1
    # Nearest class mean of colour and contrast, learnt on one half: hardly above the share of the largest class.
    half = len(classes) // 2
    scaled = (colours - colours.mean(0)) / colours.std(0)
    means = np.stack([scaled[:half][classes[:half] == k].mean(0) for k in range(len(CLASS_NAMES))])
    guess = ((scaled[half:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == classes[half:]).mean() < share.max() + 0.12


def test_found_by_name_and_loaded_for_training(made, monkeypatch):
    root, paths = made
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    for name, there in paths.items():
        assert find_dataset(name) == there
    assert load_coco(paths["shapes_val"]).class_names == CLASS_NAMES
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", ("shapes_train",), "MODEL.ROI_HEADS.NUM_CLASSES", len(CLASS_NAMES)])
    cfg.merge_from_list(["MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask", "INPUT.MIN_SIZE_TRAIN", (64,)])
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 4, "SEED", 1])
    for batch in itertools.islice(iter(build_train_loader(cfg)), 6):
        for sample in batch:
            assert sample["image"].shape == (3, 64, 64)
            for box, mask in zip(sample["instances"].boxes, sample["instances"].masks.tensor):
                rows, columns = np.nonzero(mask.numpy())
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_what_is_there_is_kept_or_refused(tmp_path):
    paths = make_shapes_dataset(tmp_path, train=2, val=1, size=48)
    before = paths["shapes_train"].annotations.stat().st_mtime_ns
    assert make_shapes_dataset(tmp_path, train=2, val=1, size=48) == paths
    assert paths["shapes_train"].annotations.stat().st_mtime_ns == before
    for other in ({"train": 3}, {"seed": 1}, {"size": 64}):
        with pytest.raises(UserError, match="shapes exists"):
            make_shapes_dataset(tmp_path, **{"train": 2, "val": 1, "size": 48, **other})
    (tmp_path / "mine" / "shapes").mkdir(parents=True)
    (tmp_path / "mine" / "shapes" / "holiday.txt").write_text("keep me")
    with pytest.raises(UserError, match="shapes exists"):
        make_shapes_dataset(tmp_path / "mine", train=2, val=1, size=48)
    assert (tmp_path / "mine" / "shapes" / "holiday.txt").read_text() == "keep me"
    assert not (tmp_path / ".shapes.half").exists()


def test_an_interrupted_run_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("loco_det.annotations.synthetic._annotation", stop)
    with pytest.raises(KeyboardInterrupt):
        make_shapes_dataset(tmp_path, train=2, val=1, size=48)
    assert not (tmp_path / "shapes").exists()
    monkeypatch.undo()
    paths = make_shapes_dataset(tmp_path, train=2, val=1, size=48)
    assert len(json.loads(paths["shapes_train"].annotations.read_text())["images"]) == 2


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.shapes cannot be written"):
        make_shapes_dataset(tmp_path / "file", train=1, val=1, size=48)


@pytest.mark.parametrize("arguments", [{"train": 0}, {"val": -1}, {"size": 20}])
def test_senseless_sizes_are_refused(tmp_path, arguments):
    with pytest.raises(UserError, match="made-up"):
        make_shapes_dataset(tmp_path, **arguments)
    assert not any(tmp_path.iterdir())


# --- the command ------------------------------------------------------------------------------------------------


def pixels(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.png")}


def test_the_command_draws_into_the_folder_that_is_given(tmp_path, monkeypatch, capsys):
    """The pixels are those of `make_shapes_dataset`, and the line to type names data with the model's classes."""
    monkeypatch.chdir(tmp_path)
    argv = ["--train", "3", "--test", "2", "--size", "48", "--seed", "5"]
    assert main(["data", "shapes", "my cells", *argv]) == 0
    said, line = capsys.readouterr().out.rsplit("next: loco-det ", 1)
    assert (
        "my cells/@train: 3 images of 48 x 48 pixels\nmy cells/@test: 2 images of 48 x 48 pixels\n6 classes: " in said
    )
    make_shapes_dataset("same", train=3, val=2, size=48, seed=5)
    ours, theirs = pixels(tmp_path / "my cells"), pixels(tmp_path / "same" / "shapes")
    assert ours == {name.replace("val/", "test/"): data for name, data in theirs.items()}
    name, *argv = shlex.split(line)
    args = _parsed(_parser(name, None), argv)
    cfg, _ = load_cfg(args.config_file, args.opts)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("my cells/@train",), ("my cells/@test",))
    check_classes(cfg, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    assert [len(find_dataset(name).index.image_id) for name in ("my cells/@train", "my cells/@test")] == [3, 2]


def test_the_commands_json_names_the_splits_even_with_an_at_in_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "shapes", "a@b", "--train", "1", "--test", "1", "--size", "48", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["classes"] == list(CLASS_NAMES)
    assert [len(find_dataset(answer[split]).index.image_id) for split in ("train", "test")] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("shapes x --train 0", "train 0, test 40, size 128"),
        ("shapes x --size 20", "size 20"),
        ("shapes x --seed -1", "--seed is -1; give 0 or more"),
        ("shapes x y", "data shapes takes one PATH; leave y out"),
        ("shapes x --out y", "--out y is of data check; leave it out of data shapes"),
        ("check x --train 3", "--train 3 is of data shapes; leave it out of data check"),
        ("convert x y --test 3", "--test 3 is of data shapes; leave it out of data convert"),
        ("shapes .", ". is the working directory; name a new folder"),
        ("shapes full", "full exists and is not 'loco_det made-up shapes"),
        ("shapes full/keep", "full/keep cannot be written (Not a directory)"),
    ],
)
def test_what_the_command_cannot_draw_is_one_sentence(arguments, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("mine")
    assert main(["data", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert word in said
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "keep"]
