"""Kinds of input that once failed, by row, and the tests that hold each; with those that belong to no other file.

A row is a kind and not an example: a new example of one belongs in the tests that are named here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_detection import tiny_cfg, write_tiny

from loco_det.core.errors import UserError
from loco_det.detection.train import train_net
from loco_det.detection.weights import read_weights

TESTS = Path(__file__).parent

# Row: the kind, and "file: test, test" or, where all of a file's tests with its prefix are meant, "file".
ROWS = {
    "A1": ("outputs over inputs", ["predict"]),
    "A2": ("one unusable image or object among many", ["data_loader", "train_loop", "run_folder"]),
    "A3": (
        "test sets that no evaluation takes",
        [
            "rows",
            "run_folder",
            "train_loop: a_test_set_that_no_evaluation_takes_stops_a_run_before_its_first_step, "
            "sets_without_areas_with_odd_spellings_and_a_line_of_pixels_train_to_their_ap",
            "data_rules: an_absent_area_is_the_masks_or_the_boxes",
        ],
    ),
    "A4": ("another run in the same folder", ["run_folder"]),
    "A5": ("two jobs in one folder", ["run_folder"]),
    "A6": ("kills between checkpoint, evaluation and line", ["run_folder"]),
    "A7": ("disks that are full", ["run_folder", "core: a_full_disk_is_one_sentence_and_leaves_the_old_file"]),
    "A8": ("a flipped bit, a file changed with its time kept", ["damage"]),
    "B1": (
        "classes in another order",
        [
            "paths: a_test_set_is_measured_by_the_names_of_its_classes, "
            "classes_that_do_not_match_are_refused_with_both_lists",
            "label_folders: classes_are_matched_by_name",
        ],
    ),
    "B2": (
        "boxes in other units",
        ["data_rules: most_boxes_decide_whether_a_file_is_suspect, sound_boxes_of_any_size_are_not_suspect"],
    ),
    "B3": (
        "OK where a training would stop",
        [
            "data_rules: ok_is_said_exactly_where_a_training_runs",
            "paths: data_check_says_of_a_folder_what_training_would",
            "label_folders: training_data_check_and_doctor_say_the_same",
        ],
    ),
    "B4": ("another network with a ResNet's tensors; pixels from 0 to 1", ["convert_proof"]),
    "B5": (
        "images passed over in silence",
        ["predict", "images", "cityscapes", "label_folders: half_a_cityscapes_is_refused"],
    ),
    "B6": ("fractions that differ in the last digit", ["sweep"]),
    "B7": ("annotations that changed before a resume", ["rows"]),
    "C1": (
        "Pascal VOC XML of one's own",
        [
            "formats: voc_with_classes_and_file_names_of_its_owner, a_size_that_is_missing_comes_from_the_image, "
            "voc_words_for_difficult, voc_polygons_and_turned_boxes"
        ],
    ),
    "C2": ("annotation tools' formats", ["formats: yolo_in_the_ways_that_data_yaml_is_written, labelme_shapes, via, "
                                         "label_studio, cvat, png_masks, every_format_is_tried_here"]),
    "C3": ("data sets by path", ["paths: an_annotation_file_and_a_folder, roboflows_folders, "
                                 "the_folder_may_be_left_out_where_it_is_plain"]),
    "C4": ("COCO files in another spelling", ["data_lenient: a_spelling_is_read_as_its_clean_twin_and_told_once, "
                                                         "what_cannot_be_read_is_one_sentence_for_all_of_a_kind"]),
    "C5": ("a detector of other classes as weights", ["train_weights", "train_loop"]),
    "C6": ("results of another program", ["evaluate"]),
    "C7": (
        "pixel labels of one's own, VOC 2012, foggy and coarse Cityscapes, .jpg",
        ["label_folders: voc_2012, foggy_coarse_and_jpeg_cityscapes, "
         "train_evaluate_predict_report, masks_find_their_images"],
    ),
    "C8": ("patterns, archives, large and animated files; lists", ["predict", "sources"]),
    "C9": ("the thinnest images, the longest outlines", ["data_mapper", "data_masks", "cityscapes"]),
    "D1": ("the stride of Caffe's ResNets in torchvision's layout", ["convert_proof"]),
    "D2": ("mmengine's message_hub", ["convert_load: objects_beside_the_tensors_are_left_out_and_counted"]),
    "D3": ("defaultdict(int), OmegaConf", ["convert_load: settings_objects_are_left_out_and_never_made, "
                                           "what_torch_holds_for_safe_is_read_alike"]),
    "D4": ("files that fit a row by accident", ["convert_sources"]),
    "D5": ("another network beside the ResNet", ["convert_sources"]),
    "D6": ("heads inside the ResNet", ["convert_sources"]),
    "D7": (
        "unconverted files as weights",
        [
            "rows",
            "train_weights: torchvision_names_are_sent_to_the_converter, what_is_no_local_file_is_refused",
            "convert_load: what_is_no_file_of_its_own, archives_are_told_apart",
        ],
    ),
    "D8": ("objects beside the weights", ["convert_load: the_account_names_what_was_left_out"]),
    "D9": ("pixels of each row", ["convert_sources"]),
    "E": ("hostile and absurd files", ["hostile", "convert_load: hostile_files_do_nothing",
                                       "data_index: writes_through_a_memory_map_are_seen",
                                       "feature_cache: a_damaged_file_is_made_again",
                                       "report: names_are_text_and_never_markup"]),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_tests(row: str) -> None:
    for entry in ROWS[row][1]:
        file, _, names = entry.partition(": ")
        text = (TESTS / f"test_{file}.py").read_text()
        wanted = names.split(", ") if names else [f"{row.lower()}_"]
        for name in wanted:
            assert re.search(rf"^def test_{name}{'' if name.endswith('_') else '[(]'}", text, re.MULTILINE), (
                file,
                name,
            )


# --- A3 ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_jpeg(path: Path) -> None:
    Image.open(path).save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[:-20])


def turned(path: Path) -> None:
    image = Image.open(path)
    exif = image.getexif()
    exif[274] = 6
    image.save(path, exif=exif)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"4\.png: not a readable image"),
        (cut_jpeg, r"4\.png: not a readable image"),
        (lambda path: path.write_bytes(b""), r"4\.png: the file is empty"),
        (lambda path: path.write_text("no image"), r"4\.png: not a readable image"),
        (lambda path: Image.open(path).resize((10, 20)).save(path), r"4\.png is 10 x 20 pixels but annotated"),
        (turned, r"4\.png is 64 x 80 pixels but annotated .* as 80 x 64"),
    ],
)
def test_a3_a_bad_image_of_the_test_set_stops_a_run_before_its_first_step(
    spoil: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_tiny(tmp_path)))
    spoil(tmp_path / "tiny/val/4.png")
    with pytest.raises(UserError, match=message):
        train_net(tiny_cfg(tmp_path / "run"), engine="torchvision")
    assert not list((tmp_path / "run").glob("*.pth"))


# --- B7 ----------------------------------------------------------------------------------------------------------


def test_b7_a_resume_on_annotations_that_changed_is_refused_and_the_record_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_tiny(tmp_path)))
    run = tmp_path / "run"
    train_net(tiny_cfg(run, SOLVER__MAX_ITER=1, SOLVER__STEPS=()), engine="torchvision")
    record, annotations = (run / "run.json").read_bytes(), tmp_path / "tiny/annotations/instances_train.json"
    content = json.loads(annotations.read_text())
    content["annotations"][0]["bbox"][2] += 1
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model_final\.pth is of a run on other annotations than those of tiny_train"):
        train_net(tiny_cfg(run, SOLVER__MAX_ITER=2, SOLVER__STEPS=()), engine="torchvision", resume=True)
    assert (run / "run.json").read_bytes() == record


# --- D7 ----------------------------------------------------------------------------------------------------------


def test_d7_the_folder_of_a_distributed_checkpoint_is_told_how_to_join(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(UserError, match=r"join its folder first: python -m torch\.distributed\.checkpoint"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="is no regular file"):
        read_weights("/dev/zero")
