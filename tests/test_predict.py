"""`loco-det predict`: images, folders and videos in; pictures, COCO JSON and ONNX out."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import detection_cases as cases
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tiny_detection import TINY, write_tiny
from torch import nn

from loco_det.annotations.formats.files import Tree
from loco_det.annotations.instances import Instances
from loco_det.cli import main
from loco_det.commands.predict import places
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.cpu_speed import is_fast, speed_up
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.keys import get_cfg
from loco_det.detection.onnx import OneImage, check_exportable, export_onnx
from loco_det.detection.rcnn import build_model
from loco_det.images.decode import decode_image
from loco_det.images.folders import open_source
from loco_det.images.media import find_media, read_ahead, read_frames

CONFIG = "configs/coco_loco_r50.yaml"
LEFT_OUT = ("MODEL.WEIGHTS", "SEED", "MODEL.ROI_HEADS.SCORE_THRESH_TEST")
SETTINGS = [str(part) for key, value in TINY.items() if key not in LEFT_OUT for part in (key, value)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny data set and `detector.pth`, whose scores are spread widely."""
    root = write_tiny(tmp_path_factory.mktemp("predict"))
    torch.manual_seed(0)
    model = build_model(load_config(get_cfg(), CONFIG, SETTINGS)[0])
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(30)
    torch.save({"model": model.state_dict()}, root / "detector.pth")
    return root


def predict(place: Path, out: Path, *arguments: object) -> int:
    fixed = ["--config-file", CONFIG, "--weights", place / "detector.pth", "--engine", "torchvision", "--out", out]
    return main(["predict", *map(str, [*arguments, *fixed]), "--opts", *SETTINGS])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def datasets(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(place))


@pytest.mark.usefixtures("datasets")
def test_a_folder_gives_pictures_and_json(place: Path, tmp_path: Path) -> None:
    assert predict(place, tmp_path, place / "tiny" / "val", "--score-threshold", 0.3, "--batch-size", 4) == 0
    results, whole = read(tmp_path / "coco_instances_results.json"), read(tmp_path / "instances.json")
    assert [image["file_name"] for image in whole["images"]] == [f"{i}.png" for i in range(1, 7)]
    assert whole["categories"] == [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]
    assert results
    assert {r["category_id"] for r in results} <= {3, 7}
    assert all(r["score"] >= 0.3 for r in results)
    for image in whole["images"]:
        drawn, own = (cv2.imread(str(f / image["file_name"])) for f in (tmp_path, place / "tiny" / "val"))
        assert drawn.shape == own.shape == (image["height"], image["width"], 3)
        mine = [r for r in results if r["image_id"] == image["id"]]
        assert np.array_equal(drawn, own) == (not mine)
        for result in mine:
            assert coco_mask.decode(result["segmentation"]).shape == own.shape[:2]
        own_areas = [a["area"] for a in whole["annotations"] if a["image_id"] == image["id"]]
        assert own_areas == [coco_mask.decode(result["segmentation"]).sum() for result in mine]
    truth = COCO(str(tmp_path / "instances.json"))  # an annotation file, and the list its results
    assert len(truth.loadRes(str(tmp_path / "coco_instances_results.json")).anns) == len(results) == len(truth.anns)


@pytest.mark.usefixtures("datasets")
def test_it_finds_what_an_evaluation_finds(place: Path, tmp_path: Path) -> None:
    train = ["train", "--config-file", CONFIG, "--engine", "torchvision", "--eval-only", "--exact", *SETTINGS]
    weights = ["MODEL.WEIGHTS", str(place / "detector.pth"), "OUTPUT_DIR", str(tmp_path / "run")]
    assert main([*train, *weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3", "DATASETS.TRAIN", "()"]) == 0
    expected = read(tmp_path / "run" / "inference" / "coco_instances_results.json")
    alone = "--batch-size", 1, "--exact", "--score-threshold", 0.3
    assert predict(place, tmp_path, place / "tiny" / "val", *alone, "--no-pictures") == 0
    assert read(tmp_path / "coco_instances_results.json") == expected
    assert not list(tmp_path.glob("*.png"))


def test_a_video_in_gives_a_video(place: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 64))
    for i in range(5):
        writer.write(np.full((64, 80, 3), 40 * i, dtype=np.uint8))
    writer.release()
    assert predict(place, tmp_path / "out", clip, place / "tiny/val/1.png", "--score-threshold", 0) == 0
    images = read(tmp_path / "out" / "instances.json")["images"]
    assert [image.get("frame") for image in images] == [0, 1, 2, 3, 4, None]
    capture = cv2.VideoCapture(str(tmp_path / "out" / "clip.avi.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    frames = []
    while (more := capture.read())[0]:
        frames.append(more[1])
    assert [frame.shape for frame in frames] == [(64, 80, 3)] * 5
    assert frames[0].max() > 50  # what was drawn on black
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "1.png", "clip.avi.mp4", "coco_instances_results.json", "instances.json", "log.txt", "predict.json"
    ]  # fmt: skip


def test_unreadable_inputs_are_named_and_the_others_done(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "in" / "no.mp4").write_bytes(b"no video")
    (tmp_path / "in" / "notes.txt").write_text("ignored in a folder")
    cv2.imwrite(str(tmp_path / "in" / "below" / "good.bmp"), np.zeros((50, 60, 3), dtype=np.uint8))
    assert predict(place, tmp_path / "out", tmp_path / "in") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 inputs" in error
    assert "broken.jpg" in error
    assert "no.mp4" in error
    assert [i["file_name"] for i in read(tmp_path / "out" / "instances.json")["images"]] == ["below/good.bmp"]
    assert (tmp_path / "out" / "below" / "good.bmp.jpg").is_file()


def test_names_come_from_a_file_or_are_numbers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    image, names = place / "tiny/val/1.png", tmp_path / "names.txt"
    assert predict(place, tmp_path, image) == 0
    assert [c["name"] for c in read(tmp_path / "instances.json")["categories"]] == ["class 1", "class 2"]
    names.write_text("cat\n dog \n\n")
    assert predict(place, tmp_path, image, "--classes", names) == 0
    assert read(tmp_path / "instances.json")["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    names.write_text("cat\n")
    assert predict(place, tmp_path, image, "--classes", names) == 2


def grey(path: Path, value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((40, 50, 3), value, dtype=np.uint8))
    return path


def clip(path: Path) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for value in (0, 90):
        writer.write(np.full((48, 64, 3), value, dtype=np.uint8))
    writer.release()
    return path


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that takes no time and finds nothing."""
    monkeypatch.setattr("loco_det.commands.predict.load_detector", lambda cfg, _: (nn.Identity(), cfg))
    monkeypatch.setattr("loco_det.commands.predict.detect", lambda *given: [nothing(p) for p in given[3]])


def nothing(pixels: np.ndarray) -> Instances:
    none = torch.zeros(0)
    return Instances(pixels.shape[:2], boxes=none.reshape(0, 4), classes=none.long(), scores=none)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("blind")
def test_a1_no_input_nor_any_file_of_the_owner_is_written_over(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    one, two = grey(photos / "a.jpg"), grey(photos / "below" / "b.png")
    video, other = clip(photos / "clip.mp4"), grey(tmp_path / "other" / "a.jpg", 200)
    (photos / "instances.json").write_text('{"categories": [{"id": 1, "name": "x"}, {"id": 2, "name": "y"}]}')
    (tmp_path / "link").symlink_to(photos)
    before = contents(photos)
    for inputs, out in (
        ([photos], photos),
        ([one, video], photos),
        ([two], photos / "below"),
        ([one], tmp_path / "link"),
        ([other], photos),  # no input lies there, but the owner's pictures do
        ([grey(tmp_path / "new.jpg"), "--no-pictures"], photos),  # instances.json is the owner's
    ):
        assert predict(place, out, *inputs, "--score-threshold", 0) == 2
        assert "another folder" in capsys.readouterr().err.splitlines()[-1]
        assert contents(photos) == before
    assert predict(place, tmp_path / "out", one, "--export-onnx", one) == 2
    assert contents(photos) == before
    (photos / "instances.json").unlink()
    assert predict(place, photos, photos, "--no-pictures") == 0
    assert len(read(photos / "instances.json")["images"]) == 4
    assert predict(place, photos, one, "--no-pictures", "--classes", photos / "instances.json") == 2


@pytest.mark.usefixtures("blind")
def test_a1_two_inputs_never_share_an_output(place: Path, tmp_path: Path) -> None:
    names = ["p.bmp", "p.bmp.jpg", "a.jpg", "a.jpg.png", "a.jpg.jpg", "q.tif", "q.tif_2.jpg", "q.tif.jpg"]
    for name in names:
        grey(tmp_path / "in" / name)
    grey(tmp_path / "x" / "a.jpg" / "inside.png")  # a folder that is called as another input's file is
    assert predict(place, tmp_path / "out", tmp_path / "in", tmp_path / "x", tmp_path / "in" / "a.jpg") == 0
    images = read(tmp_path / "out" / "instances.json")["images"]
    pictures = [path for path in (tmp_path / "out").rglob("*.*g") if path.is_file()]
    assert len(pictures) == len({image["file_name"] for image in images}) == len(images) == len(names) + 2


def test_b5_no_image_of_a_folder_is_passed_over_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGB", (8, 6), (9, 99, 200))
    read = dict.fromkeys(("a.jpg", "b.JPEG", "c.jpe", "d.jfif"), "JPEG")
    read |= {"e.png": "PNG", "f.gif": "GIF", "g.jp2": "JPEG2000", "h.avif": "AVIF", "i.webp": "WEBP", "j.tif": "TIFF"}
    read |= {"k.bmp": "BMP", "l.dib": "DIB", "m.ppm": "PPM", "n.pnm": "PPM", "o.j2k": "JPEG2000"}
    for name, kind in read.items():
        image.save(tmp_path / name, kind)
    for name in ("x.heic", "y.HEIC", "z.cr2", "notes.txt"):
        (tmp_path / name).write_bytes(b"unread")
    media, unreadable = find_media([tmp_path])
    assert [medium.name for medium in media] == sorted(read)
    assert "skipped images of unsupported formats (1 x .cr2, 2 x .heic)" in caplog.text
    frames = list(read_frames(media, "RGB", unreadable))
    assert {frame.pixels.shape for frame in frames} == {(6, 8, 3)}
    assert not unreadable
    caplog.clear()
    source = open_source(tmp_path, "flat")
    assert [Path(source.name(i)).name for i in range(len(source))] == sorted(read)
    assert all(decode_image(source.read(i), source.name(i)).shape == (6, 8, 3) for i in range(len(source)))
    assert "2 x .heic" in caplog.text


def test_b5_links_in_a_circle_bring_no_image_twice(tmp_path: Path) -> None:
    names = [f"{folder}/{i}.png" for folder in ("a", "b", "b/below") for i in range(8)]
    for name in names:
        grey(tmp_path / "photos" / name)
    elsewhere = grey(tmp_path / "elsewhere" / "c" / "0.png").parent.parent
    links = {"a/up": "..", "a/b": "../b", "b/a": "../a", "b/below/top": "../..", "b/self": ".", "more": elsewhere}
    for link, target in links.items():
        (tmp_path / "photos" / link).symlink_to(target)
    (elsewhere / "back").symlink_to(tmp_path / "photos")
    expected = sorted([*names, "more/c/0.png"])
    assert sorted(medium.name for medium in find_media([tmp_path / "photos"])[0]) == expected
    source = open_source(tmp_path / "photos", "flat")
    assert sorted(source.name(i) for i in range(len(source))) == [f"{tmp_path}/photos/{name}" for name in expected]
    assert set(open_source(tmp_path / "photos", "folder").classes) == {"a", "b", "more"}
    tree = Tree(tmp_path / "photos")
    assert sorted(path.relative_to(tmp_path / "photos").as_posix() for path in tree.images()) == expected


def test_c8_patterns_are_expanded_and_archives_named(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "below/c.png", "odd[1].png"):
        grey(tmp_path / name)
    (tmp_path / "photos.zip").write_bytes(b"PK")

    def found(pattern: str) -> list[str]:
        return [medium.name for medium in find_media([tmp_path / pattern])[0]]

    assert found("?.png") == ["a.png", "b.png"]
    assert found("**/*.png") == ["a.png", "b.png", "c.png", "odd[1].png"]
    assert found("odd[1].png") == ["odd[1].png"]
    for pattern, words in (("*.gif", "no file matches"), ("photos.zip", "unpack it"), ("*.zip", "unpack it")):
        with pytest.raises(UserError, match=words):
            found(pattern)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tif"])
def test_c8_of_an_animated_file_the_first_frame_is_used_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 120, 240)]
    frames[0].save(tmp_path / f"x.{kind}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    (frame,) = read_frames(find_media([tmp_path / f"x.{kind}"])[0], "RGB", [])
    assert frame.pixels.max() == 0
    assert "only the first of its 3 frames is used" in caplog.text
    caplog.clear()
    assert len(list(read_frames(find_media([tmp_path / "still.gif"])[0], "RGB", []))) == 1
    assert not caplog.text


def test_c8_an_image_beyond_the_limit_is_one_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("1", (14_000, 14_000)).save(tmp_path / "huge.png")
    unreadable: list[Path] = []
    assert not list(read_frames(find_media([tmp_path / "huge.png"])[0], "RGB", unreadable))
    assert unreadable == [tmp_path / "huge.png"]
    assert "14000 x 14000 pixels, more than 100 megapixels; cut it into tiles" in caplog.text


def test_a1_pictures_and_labels_of_a_segmentor_are_apart_too(tmp_path: Path) -> None:
    for name in ("a", "a.png", "a_pred.png", "sem_seg/a_pred.png", "sem_seg/clip.mp4/000000.png", "clip.mp4"):
        grey(tmp_path / f"{name}.png").rename(tmp_path / name)
    clip(tmp_path / "clip.mp4")
    media, _ = find_media([tmp_path, tmp_path / "a"], of_input := partial(places, labels=True, pictures=True))
    written = [Path(place) for medium in media for place in of_input(medium.name, medium.is_video)]
    assert len(set(written)) == len(written) == 12
    assert not {folder for place in written for folder in place.parents} & set(written)


@pytest.mark.usefixtures("blind")
def test_a1_own_output_is_never_read(place: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    grey(photos / "a.jpg"), grey(photos / "below" / "b.bmp"), clip(photos / "c.avi")
    expected = ["a.jpg", "below/b.bmp", "c.avi", "c.avi"]
    for out in (photos / "out", photos / "out", photos / "below", photos / "below"):  # below too lie inputs
        rc = predict(place, out, photos)
        assert rc == 0
        assert [image["file_name"] for image in read(out / "instances.json")["images"]] == expected
    grey(photos / "out" / "new.jpg")  # the owner's, wherever it lies
    assert predict(place, tmp_path / "elsewhere", photos) == 0
    found = [image["file_name"] for image in read(tmp_path / "elsewhere" / "instances.json")["images"]]
    assert found == [*expected, "out/new.jpg"]
    drawn = photos / "below" / "below" / "b.bmp.jpg"  # as a shell's pattern may bring it
    assert predict(place, tmp_path / "named", drawn, photos / "a.jpg") == 0
    assert [image["file_name"] for image in read(tmp_path / "named" / "instances.json")["images"]] == ["a.jpg"]
    assert predict(place, tmp_path / "named", drawn) == 2
    source = open_source(photos, "flat")
    assert sorted(Path(source.name(i)).name for i in range(len(source))) == ["a.jpg", "b.bmp", "new.jpg"]


@pytest.mark.usefixtures("blind")
def test_a1_what_a_killed_run_wrote_is_known(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey(tmp_path / "a.jpg"), grey(tmp_path / "b.jpg")

    class Killed(Exception):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("loco_det.commands.predict.Pictures.draw", killed)
        with pytest.raises(Killed):
            predict(place, tmp_path / "out", tmp_path)
    grey(tmp_path / "out" / "a.jpg", 255)  # as if it had been killed after it
    assert predict(place, tmp_path / "out", tmp_path) == 0
    assert [image["file_name"] for image in read(tmp_path / "out" / "instances.json")["images"]] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "damaged", ['{"loco_det": "1', '{"loco_det": "1", "written": 7}', '{"loco_det": "1", "written": [7]}', "[]"]
)
def test_a1_a_damaged_list_of_what_was_written_lists_nothing(tmp_path: Path, damaged: str) -> None:
    grey(tmp_path / "a.jpg")
    (tmp_path / "predict.json").write_text(damaged)
    assert [medium.name for medium in find_media([tmp_path])[0]] == ["a.jpg"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing.jpg"], "nothing.jpg"),
        (["EMPTY"], "no image"),
        (["IMAGE", "--score-threshold", "1.5"], "--score-threshold"),
        (["IMAGE", "--batch-size", "0"], "--batch-size"),
        (["IMAGE", "--weights", "none.pth"], "none.pth"),
        (["IMAGE", "--weights", ""], "--weights"),
        (["IMAGE", "--classes", "none.txt"], "none.txt"),
    ],
)
def test_bad_arguments_are_one_sentence(
    place: Path, tmp_path: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = {"IMAGE": str(place / "tiny/val/1.png"), "EMPTY": str(tmp_path / "empty")}
    arguments = [given.get(argument, argument) for argument in arguments]
    fixed = ["--config-file", CONFIG, "--engine", "torchvision", "--out", str(tmp_path)]
    weights = [] if "--weights" in arguments else ["--weights", str(place / "detector.pth")]
    assert main(["predict", *arguments, *fixed, *weights, "--opts", *SETTINGS]) == 2
    assert named in capsys.readouterr().err


def test_a_backbone_is_no_detector(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(place / "detector.pth", weights_only=True)["model"]
    prefix = "backbone.bottom_up."
    backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    assert predict(place, tmp_path, place / "tiny/val/1.png", "--weights", tmp_path / "backbone.pth") in (0, 2)
    arguments = ["predict", str(place / "tiny/val/1.png"), "--config-file", CONFIG, "--engine", "torchvision"]
    arguments += ["--weights", str(tmp_path / "backbone.pth"), "--out", str(tmp_path), "--opts", *SETTINGS]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "holds a backbone" in capsys.readouterr().err


def test_media_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "x.png"), np.zeros((4, 5, 3), dtype=np.uint8))
    media, unreadable = find_media([tmp_path / "a", tmp_path / "b" / "x.png", tmp_path / "b"])
    assert [m.name for m in media] == ["x.png", "x_2.png", "x_3.png"]
    assert not unreadable
    assert [frame.pixels.shape for frame in read_frames(media, "BGR", [])] == [(4, 5, 3)] * 3


def test_reading_ahead_keeps_order_and_passes_errors_on() -> None:
    assert list(read_ahead(iter(range(7)), 3)) == list(range(7))
    items = (1 // (3 - i) for i in range(5))
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(items, 2))


# --- ONNX -------------------------------------------------------------------------------------------------------

EXPORTED = {
    "FPN": (cases.FPN,),
    "C4": (cases.C4,),
    "C4 boxes": (cases.C4, {"MODEL.MASK_ON": False}),
    "DC5": (cases.DC5,),
    "boxes": (cases.FPN, {"MODEL.MASK_ON": False}),
    "ROIPool": (cases.FPN, {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}),
    "class-agnostic": (
        cases.FPN,
        {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True},
    ),
}


def detector(*settings: dict[str, Any]) -> nn.Module:
    return cases.formula_weights(build_model(cases.configure(get_cfg(), *settings))).eval()


@pytest.mark.parametrize("settings", EXPORTED.values(), ids=EXPORTED)
def test_onnx_finds_the_same_objects(settings: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, image, path = detector(*settings), cases.images()[0], tmp_path / "d" / "model.onnx"
    differences = export_onnx(model, image, path)
    assert set(differences) == {"boxes", "scores"} | ({"masks"} if model.roi_heads.mask_on else set())
    assert max(differences.values()) < 1e-3
    darker = image // 3  # an image that the export did not see, with another number of detections
    found = runtime.InferenceSession(str(path)).run(None, {"image": darker.numpy()})
    with torch.inference_mode():
        (expected,) = model.detect([{"image": darker}])
    assert len(expected) > 0
    assert len(found[0]) == len(expected)
    np.testing.assert_allclose(found[0], expected.boxes.numpy(), atol=1e-2)
    np.testing.assert_allclose(found[1], expected.scores.numpy(), atol=1e-4)
    assert np.array_equal(found[2], expected.classes.numpy())


def test_a_fast_model_is_exported_in_its_exact_form_and_stays_fast(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, image = detector(cases.FPN), cases.images()[0]
    export_onnx(model, image, tmp_path / "exact.onnx")
    export_onnx(speed_up(model), image, tmp_path / "fast.onnx")
    assert (tmp_path / "fast.onnx").read_bytes() == (tmp_path / "exact.onnx").read_bytes()
    assert is_fast(model)


@torch.inference_mode()
def test_the_exported_form_is_the_model() -> None:
    for settings in EXPORTED.values():
        model, image = detector(*settings), cases.images()[1]
        (expected,) = model.detect([{"image": image}])
        found = OneImage(model).eval()(image)
        values = [expected.boxes, expected.scores, expected.classes, expected.masks][: len(found)]
        assert all(torch.equal(a, b) for a, b in zip(found, values))


def test_what_onnx_cannot_say_is_refused_by_name() -> None:
    deformable = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]}
    cascade = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    for settings, named in ((deformable, "DEFORM_ON_PER_STAGE"), (cascade, "CascadeROIHeads")):
        with pytest.raises(UserError, match=named):
            check_exportable(detector(cases.FPN, settings))


def test_without_the_extra_the_sentence_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"loco_det\[onnx\]"):
        export_onnx(detector(cases.FPN), cases.images()[0], tmp_path / "model.onnx")


def test_a_file_that_differs_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("loco_det.detection.onnx.TOLERANCE", {"boxes": -1.0})
    with pytest.raises(UserError, match="differ"):
        export_onnx(detector(cases.FPN), cases.images()[0], tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("here first")
    for path in (tmp_path / "folder", tmp_path / "file" / "model.onnx"):
        with pytest.raises(UserError, match=r"cannot be written"):
            export_onnx(detector(cases.FPN, {"MODEL.MASK_ON": False}), cases.images()[0], path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_predict_exports_too(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    assert predict(place, tmp_path, place / "tiny/val/1.png", "--export-onnx", path) == 0
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("exact", [False, True])
def test_predict_is_fast_on_a_cpu_unless_asked_to_be_exact(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    seen, run = [], TorchvisionEngine.predict
    monkeypatch.setattr(TorchvisionEngine, "predict", lambda *given: (seen.append(is_fast(given[1])), run(*given))[1])
    flags = ["--engine", "torchvision", *(["--exact"] if exact else [])]
    assert predict(place, tmp_path, place / "tiny/val/1.png", *flags) == 0
    assert seen == [not exact]
