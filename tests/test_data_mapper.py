"""The detection mapper: limiting cases, hostile input, and equality with Detectron2's for the same random draws."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from pycocotools import mask as coco_mask

from loco_det.annotations.coco import CocoDataset, decode_segmentation, load_coco
from loco_det.annotations.mapper import DetectionMapper, sample_rng
from loco_det.annotations.masks import rasterize
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.annotations.transforms import (
    Crop,
    Flip,
    ScaleJitter,
    draw_scale_jitter,
    draw_transforms,
    resize_short_side,
)
from loco_det.core.errors import UserError
from loco_det.detection.keys import get_cfg, load_cfg


def config(*overrides) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.MASK_ON", True, *overrides])
    return cfg


def make_dataset(folder: Path, rle: bool = False) -> CocoDataset:
    """Three noise images with three polygons (or RLEs) each and one crowd."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    images, annotations = [], []
    for i, (h, w) in enumerate([(50, 70), (80, 41), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / "train" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": h, "width": w})
        for _ in range(3):
            angle = np.sort(rng.uniform(0, 2 * np.pi, 8))
            radius = rng.uniform(4, 20, 8)
            points = np.stack([w / 2 + radius * np.cos(angle), h / 2 + radius * np.sin(angle)], 1)
            points = np.clip(points + rng.uniform(-15, 15, 2), 0, (w, h)).round(2)
            low, side = points.min(0), np.ptp(points, axis=0)
            segmentation = [points.reshape(-1).tolist()]
            if rle:
                mask = rasterize([points.reshape(-1)], h, w)
                runs = np.diff(np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=~mask[0, 0], append=2)))
                segmentation = {"size": [h, w], "counts": [0] * int(mask[0, 0]) + runs.tolist()}
            annotations.append(
                {
                    **{"id": len(annotations), "image_id": i, "category_id": int(rng.integers(1, 4)), "iscrowd": 0},
                    **{"bbox": [*low.tolist(), *side.tolist()], "segmentation": segmentation},
                }
            )
        crowd = {"size": [h, w], "counts": [10, 100, h * w - 110]}
        annotations.append(
            {
                **{"id": len(annotations), "image_id": i, "category_id": 1, "iscrowd": 1},
                **{"bbox": [0.5, 0.5, 9.0, 9.0], "segmentation": crowd},
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": f"c{c}"} for c in (1, 2, 3)],
    }
    paths = Dataset("made_train", folder / "train", folder / "instances.json")
    paths.annotations.write_text(json.dumps(content))
    return load_coco(paths)


def test_nothing_drawn_leaves_everything_as_it_is(tmp_path):
    dataset = make_dataset(tmp_path)
    cfg = config("INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.RANDOM_FLIP", "none", "INPUT.FORMAT", "RGB")
    record = dataset[0]
    sample = DetectionMapper(cfg, train=True)(record, sample_rng(0, 0))
    assert sample["image"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["image"].numpy(), np.asarray(Image.open(record.file_name)).transpose(2, 0, 1))
    assert sample["instances"].image_size == (50, 70)
    np.testing.assert_array_equal(sample["instances"].boxes.numpy(), record.boxes[~record.crowd])
    np.testing.assert_array_equal(sample["instances"].classes.numpy(), record.classes[~record.crowd])
    bgr = DetectionMapper(config("INPUT.MIN_SIZE_TEST", 0), train=False)(record)
    assert torch.equal(bgr["image"], sample["image"].flip(0))
    assert "instances" not in bgr


def test_test_time_resize_keeps_the_original_size_in_the_record(tmp_path):
    record = make_dataset(tmp_path)[1]
    cfg = config("INPUT.MIN_SIZE_TEST", 100, "INPUT.MAX_SIZE_TEST", 150)
    sample = DetectionMapper(cfg, train=False)(record)
    assert tuple(sample["image"].shape) == (3, 150, 77)  # 41 / 80 * 150 = 76.9
    assert (sample["height"], sample["width"]) == (80, 41)


@pytest.mark.parametrize("axis", [0, 1])
def test_flipping_twice_is_nothing_and_masks_follow_the_image(axis):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    polygon = rng.uniform(5, 25, 12)
    flip = Flip(axis, image.shape[axis])
    np.testing.assert_array_equal(flip.image(flip.image(image)), image)
    np.testing.assert_allclose(flip.polygons(flip.polygons([polygon]))[0], polygon)
    # A box of whole pixels has the same pixels before and after.
    square = np.array([4.0, 7, 12, 7, 12, 20, 4, 20])
    np.testing.assert_array_equal(rasterize(flip.polygons([square]), 30, 40), flip.mask(rasterize([square], 30, 40)))


def shoelace(polygons: list[np.ndarray]) -> float:
    return sum(abs(np.dot(p[::2], np.roll(p[1::2], 1)) - np.dot(p[1::2], np.roll(p[::2], 1))) / 2 for p in polygons)


def test_cropped_polygons_tile_the_polygon_and_stay_in_their_window():
    rng = np.random.default_rng(0)
    for trial in range(200):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 15)))
        points = 32 + np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(3, 32, (len(angle), 1))
        if trial % 2:
            points = points.round()  # corners on the cutting lines
        if len(angle) == 3 or np.diff(angle, append=angle[0] + 2 * np.pi).max() > 3:
            continue  # star-shaped round the centre, hence simple, only without a gap of half a turn
        polygon = points.reshape(-1)
        x, y = (int(v) for v in rng.integers(10, 54, 2))
        whole = 0.0
        for window in (Crop(0, 0, x, y), Crop(x, 0, 64 - x, y), Crop(0, y, x, 64 - y), Crop(x, y, 64 - x, 64 - y)):
            parts = window.polygons([polygon])
            whole += shoelace(parts)
            for part in parts:
                assert (part >= 0).all()
                assert (part[::2] <= window.w).all()
                assert (part[1::2] <= window.h).all()
        assert whole == pytest.approx(shoelace([polygon]), rel=1e-9)


def test_a_polygon_round_the_corner_of_the_window_leaves_two_parts_without_the_corner():
    # A thin L whose bend lies outside: its two arms reach into the window, its corner does not.
    polygon = np.array([-5.0, -5, 20, -5, 20, 3, 15, 3, 15, -2, -2, -2, -2, 15, 3, 15, 3, 20, -5, 20])
    parts = Crop(0, 0, 30, 30).polygons([polygon])
    boxes = sorted([*p.reshape(-1, 2).min(0), *p.reshape(-1, 2).max(0)] for p in parts)
    assert boxes == [[0, 15, 3, 20], [15, 0, 20, 3]]


def test_crop_draws_lie_in_the_image_and_boxes_are_tight(tmp_path):
    dataset = make_dataset(tmp_path)
    cfg = config("INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.3, 0.5], "INPUT.MIN_SIZE_TRAIN", (0,))
    mapper = DetectionMapper(cfg, train=True)
    lost = 0
    for position in range(60):
        record = dataset[position % 3]
        sample = mapper(record, sample_rng(1, position))
        _, h, w = sample["image"].shape
        assert round(0.3 * record.height) <= h <= record.height
        assert round(0.5 * record.width) <= w <= record.width
        found = sample["instances"]
        lost += 3 - len(found)
        for box, instance in zip(found.boxes, found.masks.polygons):
            points = np.concatenate(instance).reshape(-1, 2)
            np.testing.assert_allclose(box, [*points.min(0), *points.max(0)], rtol=1e-5)
            assert (points >= 0).all()
            assert (points <= (w, h)).all()
    assert lost > 0


def test_random_numbers_are_a_function_of_seed_and_position():
    draws = [sample_rng(seed, position).rand() for seed in (0, 1) for position in range(50)]
    assert len(set(draws)) == 100
    assert draws[7] == sample_rng(0, 7).rand()
    flips = [sample_rng(3, position).rand() < 0.5 for position in range(1000)]
    assert 440 < sum(flips) < 560


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "L"),
        ("INPUT.MASK_FORMAT", "rle"),
        ("INPUT.RANDOM_FLIP", "both"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "uniform"),
        ("INPUT.MIN_SIZE_TRAIN", ()),
        ("INPUT.MIN_SIZE_TRAIN", (-1,)),
        ("INPUT.MAX_SIZE_TRAIN", 0),
        ("INPUT.MAX_SIZE_TEST", -1),
        ("INPUT.MIN_SIZE_TEST", -800),
        ("INPUT.CROP.TYPE", "any"),
        ("INPUT.CROP.SIZE", [1.5, 0.5]),
    ],
)
def test_meaningless_input_keys_are_named(key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        DetectionMapper(config("INPUT.CROP.ENABLED", True, key, value), train=True)


def test_range_needs_two_sizes():
    with pytest.raises(UserError, match="MIN_SIZE_TRAIN"):
        DetectionMapper(config("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"), train=True)


def test_bad_images_and_segmentations_are_named(tmp_path):
    mapper = DetectionMapper(config(), train=True)
    record = make_dataset(tmp_path)[0]
    with pytest.raises(UserError, match=r"0\.png is 70 x 50 pixels"):
        mapper(record._replace(height=51), sample_rng(0, 0))
    with pytest.raises(UserError, match=r"annotated .* as 71 x 50"):
        mapper(record._replace(width=71), sample_rng(0, 0))
    with pytest.raises(UserError, match="annotation id 0 has no segmentation"):
        mapper(record._replace(segmentations=[b"[]"] * 4), sample_rng(0, 0))
    with pytest.raises(UserError, match=r"annotation id 0 .*neither a list of polygons nor an RLE"):
        mapper(record._replace(segmentations=[b"[" * 100_000] * 4), sample_rng(0, 0))
    with pytest.raises(UserError, match="annotation id 0 is an RLE"):
        mapper(make_dataset(tmp_path / "rle", rle=True)[0], sample_rng(0, 0))
    boxes_only = DetectionMapper(config("MODEL.MASK_ON", False), train=True)
    assert boxes_only(record._replace(segmentations=[b"[]"] * 4), sample_rng(0, 0))["instances"].masks is None
    file = Path(record.file_name)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"0\.png"):
        mapper(record, sample_rng(0, 0))


SETTINGS = {
    "shapes": [],
    "range": ["INPUT.MIN_SIZE_TRAIN", (40, 130), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"],
    "narrow range": ["INPUT.MIN_SIZE_TRAIN", (60, 62), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"],
    "long": ["INPUT.MIN_SIZE_TRAIN", (60, 100, 140), "INPUT.MAX_SIZE_TRAIN", 120, "INPUT.FORMAT", "RGB"],
    "vertical": ["INPUT.RANDOM_FLIP", "vertical", "INPUT.MIN_SIZE_TRAIN", (0, 50)],
    "none": ["INPUT.RANDOM_FLIP", "none", "INPUT.MASK_FORMAT", "bitmask"],
    "bitmask": ["INPUT.MASK_FORMAT", "bitmask", "INPUT.MIN_SIZE_TRAIN", (90,)],
    "boxes": ["MODEL.MASK_ON", False, "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.5, 0.6]],
    "crop": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.4, 0.5], "INPUT.MASK_FORMAT", "bitmask"],
    "absolute": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [30, 20]],
    "steps": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", [30, 60]],
    "relative": ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", [0.7, 0.4]],
}


def drawn_by_hand(cfg: CfgNode, height: int, width: int, rng: np.random.RandomState):
    """What Detectron2 draws, in its order: the window x, y, w, h; the new height and width; whether to flip."""
    x, y, w, h = 0, 0, width, height
    if cfg.CROP.ENABLED:
        first, second = cfg.CROP.SIZE
        if cfg.CROP.TYPE == "absolute":
            h, w = min(first, height), min(second, width)
        elif cfg.CROP.TYPE == "absolute_range":
            h = rng.randint(min(first, height), min(second, height) + 1)
            w = rng.randint(min(first, width), min(second, width) + 1)
        else:
            shares = np.array([first, second])
            if cfg.CROP.TYPE == "relative_range":
                shares = shares + rng.rand(2) * (1 - shares)
            h, w = math.floor(height * shares[0] + 0.5), math.floor(width * shares[1] + 0.5)
        y, x = rng.randint(0, height - h + 1), rng.randint(0, width - w + 1)
    sizes = cfg.MIN_SIZE_TRAIN
    if cfg.MIN_SIZE_TRAIN_SAMPLING == "range":
        short = rng.randint(sizes[0], sizes[1] + 1)
    else:
        short = sizes[rng.randint(0, len(sizes))]
    # Exact, so that a half is a half.
    scale = min(Fraction(int(short), min(h, w)), Fraction(cfg.MAX_SIZE_TRAIN, max(h, w))) if short else Fraction(1)
    new = math.floor(h * scale + Fraction(1, 2)), math.floor(w * scale + Fraction(1, 2))
    flipped = cfg.RANDOM_FLIP != "none" and rng.uniform() < 0.5
    return (x, y, w, h), new, flipped


def moved(corners: np.ndarray, window: tuple, size: tuple[int, int], flipped: bool, vertical: bool) -> np.ndarray:
    """(P, 2) points of the original image in the image of `size` that `drawn_by_hand` tells of."""
    (x, y, w, h), (height, width) = window, size
    found = []
    for px, py in corners.reshape(-1, 2).astype(np.float64):
        px, py = (px - x) * width / w, (py - y) * height / h
        found.append((width - px if flipped and not vertical else px, height - py if flipped and vertical else py))
    return np.array(found)


def limited_box(box: np.ndarray, size: tuple[int, int], *change) -> np.ndarray:
    (ax, ay), (bx, by) = moved(box, change[0], size, *change[1:])
    height, width = size
    return np.array([max(min(ax, bx), 0), max(min(ay, by), 0), min(max(ax, bx), width), min(max(ay, by), height)])


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sample_is_what_its_draws_make_of_the_image_its_boxes_and_its_masks(tmp_path, setting):
    """Pixels by PIL, everything else object by object from the definitions."""
    cfg = config("INPUT.MIN_SIZE_TRAIN", (60, 75, 90), *SETTINGS[setting])
    rle = cfg.INPUT.MASK_FORMAT == "bitmask" or (cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON)
    cfg.INPUT.MASK_FORMAT = "bitmask" if rle else "polygon"
    dataset, mapper, flips = make_dataset(tmp_path, rle), DetectionMapper(cfg, train=True), set()
    for i, position in itertools.product(range(3), range(8)):
        record, found = dataset[i], mapper(dataset[i], sample_rng(i, position))
        window, size, flipped = drawn_by_hand(cfg.INPUT, record.height, record.width, sample_rng(i, position))
        flips.add(flipped)
        vertical = cfg.INPUT.RANDOM_FLIP == "vertical"

        def pixels(whole, filter, window=window, size=size, axis=int(not vertical), flipped=flipped):
            x, y, w, h = window
            resized = np.asarray(Image.fromarray(whole[y : y + h, x : x + w]).resize(size[::-1], filter))
            return np.flip(resized, axis) if flipped else resized

        image = pixels(np.asarray(Image.open(record.file_name)), Image.Resampling.BILINEAR)
        if cfg.INPUT.FORMAT == "BGR":
            image = image[:, :, ::-1]
        np.testing.assert_array_equal(found["image"].numpy(), image.transpose(2, 0, 1))
        instances, boxes, classes, masks = found["instances"], [], [], []
        assert instances.image_size == size
        for k in range(3):  # the fourth is a crowd
            box, mask = limited_box(record.boxes[k], size, window, flipped, vertical), None
            segmentation = decode_segmentation(record, k)
            if rle:
                mask = pixels(coco_mask.decode(segmentation), Image.Resampling.NEAREST).astype(bool)
                if not mask.any():
                    continue
                if cfg.INPUT.CROP.ENABLED:
                    rows, columns = np.nonzero(mask)
                    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            elif cfg.MODEL.MASK_ON:
                mask = moved(segmentation[0], window, size, flipped, vertical).reshape(-1)
            if box[2] - box[0] > 1e-5 and box[3] - box[1] > 1e-5:
                boxes.append(box)
                classes.append(record.classes[k])
                masks.append(mask)
        assert instances.classes.tolist() == classes
        np.testing.assert_allclose(instances.boxes.numpy(), np.reshape(boxes, (-1, 4)), rtol=1e-5, atol=1e-4)
        if rle:
            assert len(instances.masks) == len(masks)
            for ours, mask in zip(instances.masks.tensor.numpy(), masks, strict=True):
                np.testing.assert_array_equal(ours, mask)
        elif cfg.MODEL.MASK_ON:
            for ours, mask in zip(instances.masks.polygons, masks, strict=True):
                np.testing.assert_allclose(ours, [mask], rtol=1e-9, atol=1e-9)
    assert flips == ({False} if cfg.INPUT.RANDOM_FLIP == "none" else {False, True})


JITTER = {
    "vitdet": [],
    "padded": ["INPUT.SCALE_JITTER_PAD", "True"],
    "enlarged": ["INPUT.SCALE_JITTER", "(1.5, 3.0)", "INPUT.FORMAT", "RGB"],
    "boxes": ["MODEL.MASK_ON", "False", "INPUT.SCALE_JITTER_PAD", "True", "INPUT.RANDOM_FLIP", "vertical"],
    "never mirrored": ["INPUT.RANDOM_FLIP", "none", "INPUT.SCALE_JITTER_SIZE", "33"],
}


def jittered(setting: str) -> CfgNode:
    """Scales as far apart as ViTDet's, in a square of some pixels."""
    common = ["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask"]
    return load_cfg(
        "", [*common, "INPUT.SCALE_JITTER", "(0.1, 2.0)", "INPUT.SCALE_JITTER_SIZE", "61", *JITTER[setting]]
    )[0]


@pytest.mark.parametrize("setting", JITTER)
def test_scale_jitter_is_a_flip_a_resize_and_a_window(tmp_path, setting):
    """Pixels by PIL, sizes in fractions, and what lies beyond the image in the square is grey and no object's."""
    cfg = jittered(setting)
    side, flip = cfg.INPUT.get("SCALE_JITTER_SIZE", 1024), cfg.INPUT.RANDOM_FLIP
    dataset, mapper, seen = make_dataset(tmp_path, rle=True), DetectionMapper(cfg, train=True), set()
    for i, position in itertools.product(range(3), range(12)):
        record, found, rng = dataset[i], mapper(dataset[i], sample_rng(i, position)), sample_rng(i, position)
        flipped = flip != "none" and rng.uniform() < 0.5
        scale = Fraction(rng.uniform(*cfg.INPUT.SCALE_JITTER)) * Fraction(side, max(record.height, record.width))
        height, width = (round(length * scale) for length in (record.height, record.width))
        share = Fraction(rng.uniform())
        y, x = (round(max(length - side, 0) * share) for length in (height, width))
        square = bool(cfg.INPUT.get("SCALE_JITTER_PAD"))
        size = (side, side) if square else (min(height, side), min(width, side))
        seen.add((flipped, height > side or width > side))

        def pixels(
            whole,
            filter,
            beyond,
            axis=int(flip != "vertical"),
            flipped=flipped,
            new=(width, height),
            at=(y, x),
            size=size,
        ):
            whole = np.flip(whole, axis) if flipped else whole
            resized = np.asarray(Image.fromarray(whole).resize(new, filter))
            part = resized[at[0] : at[0] + side, at[1] : at[1] + side]
            full = np.full((*size, *part.shape[2:]), beyond, np.uint8)
            full[: part.shape[0], : part.shape[1]] = part
            return full

        image = pixels(np.asarray(Image.open(record.file_name)), Image.Resampling.BILINEAR, 128)
        image = image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1]
        np.testing.assert_array_equal(found["image"].numpy(), image.transpose(2, 0, 1))
        boxes, classes, masks = [], [], []
        for k in range(3):
            mask = pixels(coco_mask.decode(decode_segmentation(record, k)), Image.Resampling.NEAREST, 0).astype(bool)
            ax, ay, bx, by = record.boxes[k].astype(np.float64)
            if flipped and flip == "vertical":
                ay, by = record.height - by, record.height - ay
            elif flipped:
                ax, bx = record.width - bx, record.width - ax
            across, down = width / record.width, height / record.height
            corners = np.array([ax * across - x, ay * down - y, bx * across - x, by * down - y])
            box = corners.clip(0, [size[1], size[0]] * 2)
            if cfg.MODEL.MASK_ON:
                if not mask.any():
                    continue
                rows, columns = np.nonzero(mask)
                box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            if box[2] - box[0] > 1e-5 and box[3] - box[1] > 1e-5:
                boxes.append(box)
                classes.append(record.classes[k])
                masks.append(mask)
        assert found["instances"].image_size == size
        assert found["instances"].classes.tolist() == classes
        np.testing.assert_allclose(found["instances"].boxes, np.reshape(boxes, (-1, 4)), rtol=1e-5, atol=1e-4)
        if cfg.MODEL.MASK_ON:
            np.testing.assert_array_equal(found["instances"].masks.tensor, np.reshape(masks, (-1, *size)))
    assert len(seen) == {"enlarged": 2, "never mirrored": 2}.get(setting, 4)


def test_jittered_polygons_stay_in_the_window_and_keep_their_shape(tmp_path):
    """Boxes are those of the polygons' parts inside the square."""
    overrides = ["MODEL.MASK_ON", "True", "INPUT.SCALE_JITTER", "(0.8, 2.0)", "INPUT.SCALE_JITTER_SIZE", "61"]
    mapper = DetectionMapper(load_cfg("", [*overrides, "INPUT.SCALE_JITTER_PAD", "True"])[0], train=True)
    dataset, compared = make_dataset(tmp_path), 0
    for i, position in itertools.product(range(3), range(6)):
        found = mapper(dataset[i], sample_rng(i, position))["instances"]
        for box, instance in zip(found.boxes.numpy(), found.masks.polygons, strict=True):
            points = np.concatenate(instance).reshape(-1, 2)
            np.testing.assert_allclose(box, [*points.min(0), *points.max(0)], rtol=1e-5, atol=1e-5)
            assert (points >= 0).all()
            assert (points <= 61).all()
            compared += 1
    assert compared > 20


def test_padding_of_pixel_labels_is_ignored(tmp_path):
    overrides = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "INPUT.SCALE_JITTER_PAD", "True",
                 "INPUT.SCALE_JITTER", "(0.5, 0.5)", "INPUT.SCALE_JITTER_SIZE", "64"]  # fmt: skip
    record = make_dataset(tmp_path)[0]  # 50 x 70
    record = record._replace(labels=SimpleNamespace(read=lambda file, size: np.ones(size, np.uint8)))
    labels = DetectionMapper(load_cfg("", overrides)[0], train=True)(record, sample_rng(0, 0))["sem_seg"]
    expected = torch.full((64, 64), 255)
    expected[:23, :32] = 1  # 70 pixels become 32, and 50 become 22.9
    assert torch.equal(labels, expected)


def test_jitter_leaves_a_pixel_of_the_thinnest_image():
    for seed, (h, w) in enumerate([(1, 3000), (3000, 1), (1, 1)]):
        image = np.zeros((h, w, 3), np.uint8)
        for transform in draw_scale_jitter(ScaleJitter(0.1, 2.0, 64, False), "none", h, w, np.random.RandomState(seed)):
            image = transform.image(image)
        assert min(image.shape) > 0


def test_objects_beside_the_window_are_left_out(tmp_path):
    """A box that the window's border flattens in one direction has a side still."""
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [20, 20]]
    cfg = config("MODEL.MASK_ON", False, "INPUT.MIN_SIZE_TRAIN", (0,), *crop)
    record = make_dataset(tmp_path)[0]
    boxes = np.float32([[0, 0, 9, 50], [0, 40, 70, 50], [25, 15, 45, 35], [0, 0, 9, 9]])  # the last a crowd
    record = record._replace(boxes=boxes, classes=np.arange(4))
    flat = set()
    for position in range(30):
        window, size, flipped = drawn_by_hand(cfg.INPUT, 50, 70, sample_rng(0, position))
        sides = [b[2:] - b[:2] for b in (limited_box(box, size, window, flipped, False) for box in boxes[:3])]
        found = DetectionMapper(cfg, train=True)(record, sample_rng(0, position))["instances"]
        assert found.classes.tolist() == [k for k, (w, h) in enumerate(sides) if w > 0 and h > 0]
        flat |= {(bool(w > 0), bool(h > 0)) for w, h in sides}
    assert flat > {(True, False), (False, True)}


def test_bitmaps_that_shrinking_loses_are_left_out(tmp_path):
    cfg = config("INPUT.MASK_FORMAT", "bitmask", "INPUT.MIN_SIZE_TRAIN", (16,), "INPUT.RANDOM_FLIP", "none")
    record = make_dataset(tmp_path)[2]  # 64 x 64, so every fourth pixel of both axes stays
    dots = [np.zeros((64, 64), np.uint8) for _ in range(4)]
    for k in range(4):
        dots[k][10, 8 + k] = 1
    resized = [np.asarray(Image.fromarray(dot).resize((16, 16), Image.Resampling.NEAREST)) for dot in dots]
    kept = [k for k in range(4) if resized[k].any()]
    assert len(kept) == 1
    runs = [{"size": [64, 64], "counts": [64 * (8 + k) + 10, 1, 64 * 64 - 64 * (8 + k) - 11]} for k in range(4)]
    record = record._replace(
        crowd=np.zeros(4, bool), classes=np.arange(4), segmentations=[json.dumps(run).encode() for run in runs]
    )
    found = DetectionMapper(cfg, train=True)(record, sample_rng(0, 0))["instances"]
    assert found.classes.tolist() == kept
    np.testing.assert_array_equal(found.masks.tensor.numpy(), [resized[kept[0]].astype(bool)])


@pytest.mark.parametrize("train", [True, False])
def test_the_best_proposals_with_an_area_follow_the_image(tmp_path, train):
    limits = ["DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", 4, "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", 6]
    crop = ["INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [30, 32]]
    cfg = config("INPUT.MIN_SIZE_TRAIN", (60, 75), "INPUT.MIN_SIZE_TEST", 70, *crop, *limits)
    dataset, mapper, left_out = make_dataset(tmp_path), DetectionMapper(cfg, train), 0
    for i, position in itertools.product(range(3), range(4)):
        record, rng = dataset[i], np.random.default_rng(position)
        low = rng.uniform(0, 30, (12, 2))
        boxes = np.hstack([low, low + rng.uniform(1, 12, (12, 2))]).astype(np.float32)
        boxes[1, 2] = boxes[1, 0]  # no area
        boxes[2] += 500  # outside
        scores = np.sort(rng.normal(size=12).astype(np.float32))[::-1].copy()
        sample = mapper(record, sample_rng(i, position), (boxes, scores))
        if train:
            window, size, flipped = drawn_by_hand(cfg.INPUT, record.height, record.width, sample_rng(i, position))
        else:
            window, size, flipped = (0, 0, record.width, record.height), tuple(sample["image"].shape[1:]), False
        expected = [limited_box(box, size, window, flipped, False) for box in boxes]
        kept = [k for k, box in enumerate(expected) if box[2] > box[0] and box[3] > box[1]]
        left_out += 12 - len(kept)
        kept = kept[: 4 if train else 6]
        found = sample["proposals"]
        assert found.image_size == size
        assert found.scores.tolist() == scores[kept].tolist()
        np.testing.assert_allclose(found.boxes, np.reshape([expected[k] for k in kept], (-1, 4)), rtol=1e-5, atol=1e-4)
    assert left_out > (36 if train else 23)  # the window cuts some off


def test_a_polygon_that_only_touches_the_window_leaves_nothing():
    square = np.array([0.0, 0, 10, 0, 10, 10, 0, 10])
    for window in (Crop(10, 0, 5, 10), Crop(0, 10, 10, 5), Crop(10, 10, 5, 5), Crop(20, 0, 5, 5)):
        assert window.polygons([square]) == []
    spike = np.array([0.0, 0, 10, 0, 10, 10, 5, 10, 5, 15, 5, 10, 0, 10])  # of no width beyond the square
    assert Crop(0, 10, 20, 20).polygons([spike]) == []


def assert_equal_to_detectron2(dataset: CocoDataset, cfg: CfgNode, name: str, train: bool, draws: int = 6) -> None:
    """Detectron2's mapper and ours on every image, `draws` times, its global generator in the state of ours."""
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg as their_get_cfg
    from detectron2.data import DatasetMapper
    from detectron2.data.datasets import load_coco_json

    from loco_det.detection import engine_d2

    their_cfg = their_get_cfg()
    their_cfg.INPUT.update(cfg.INPUT)
    their_cfg.MODEL.MASK_ON = cfg.MODEL.MASK_ON
    theirs = DatasetMapper(their_cfg, is_train=train, **(engine_d2._scale_jitter(cfg) if train else {}))
    ours = DetectionMapper(cfg, train)
    records = load_coco_json(str(dataset.paths.annotations), str(dataset.paths.images), name)
    for i, their_record in enumerate(records):
        for position in range(draws):
            rng = sample_rng(i, position)
            np.random.set_state(rng.get_state())  # noqa: NPY002 (Detectron2 draws from the global one)
            expected, found = theirs(their_record), ours(dataset[i], rng)
            assert torch.equal(found["image"], expected["image"])
            assert {k: found[k] for k in found if k not in ("image", "instances")} == {
                k: expected[k] for k in expected if k not in ("image", "instances")
            }
            if train:
                assert_instances_equal(found["instances"], expected["instances"])


def assert_instances_equal(found, expected) -> None:
    assert found.image_size == expected.image_size
    assert torch.equal(found.boxes, expected.gt_boxes.tensor)
    assert torch.equal(found.classes, expected.gt_classes)
    if not expected.has("gt_masks"):
        assert not found.masks or len(found.masks) == 0
    elif hasattr(expected.gt_masks, "polygons"):
        for ours, theirs in zip(found.masks.polygons, expected.gt_masks.polygons, strict=True):
            assert [p.tolist() for p in ours] == [p.tolist() for p in theirs]
    else:
        assert torch.equal(found.masks.tensor, expected.gt_masks.tensor)


@pytest.mark.detectron2
@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_to_detectron2(tmp_path, setting):
    cfg = config(*SETTINGS[setting])
    # Cutting polygons needs shapely in Detectron2, and starts them at another point: RLEs are cut exactly.
    rle = cfg.INPUT.MASK_FORMAT == "bitmask" or (cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON)
    if rle:
        cfg.INPUT.MASK_FORMAT = "bitmask"
    assert_equal_to_detectron2(make_dataset(tmp_path, rle), cfg, f"made_{setting}", train=True)


@pytest.mark.detectron2
@pytest.mark.parametrize("setting", [name for name in JITTER if name != "padded"])
def test_scale_jitter_equals_detectron2s(tmp_path, setting):
    """Masks as RLEs, which are cut exactly."""
    assert_equal_to_detectron2(make_dataset(tmp_path, True), jittered(setting), f"made_lsj_{setting}", train=True)


@pytest.mark.detectron2
def test_padded_polygons_equal_detectron2s(tmp_path):
    """Polygons, drawn after scales at which nothing is cut; shapely lets them start at another corner."""
    pytest.importorskip("shapely")
    cfg = load_cfg("", ["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", "bitmask", "INPUT.SCALE_JITTER", "(0.3, 1.0)",
                        "INPUT.SCALE_JITTER_SIZE", "61", "INPUT.SCALE_JITTER_PAD", "True"])[0]  # fmt: skip
    assert_equal_to_detectron2(make_dataset(tmp_path), cfg, "made_lsj_polygon", train=True)


@pytest.mark.detectron2
def test_detectron2_adds_the_padding_to_masks_and_we_do_not(tmp_path):
    """The one difference: an RLE's padding is 255 there, which counts as the object."""
    pytest.importorskip("detectron2")
    with pytest.raises(AssertionError):
        assert_equal_to_detectron2(make_dataset(tmp_path, True), jittered("padded"), "made_lsj_padded", train=True)


@pytest.mark.detectron2
def test_equal_to_detectron2_at_test_time(tmp_path):
    cfg = config("INPUT.MIN_SIZE_TEST", 70, "INPUT.MAX_SIZE_TEST", 100)
    assert_equal_to_detectron2(make_dataset(tmp_path), cfg, "made_test", train=False, draws=1)


@pytest.mark.detectron2
def test_cropped_polygons_equal_detectron2_as_shapes():
    pytest.importorskip("shapely")
    pytest.importorskip("detectron2")
    from fvcore.transforms.transform import CropTransform

    rng = np.random.default_rng(0)
    for _ in range(200):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 10))
        points = 32 + np.stack([np.cos(angle), np.sin(angle)], 1) * rng.uniform(3, 32, (10, 1))
        window = (*(int(v) for v in rng.integers(0, 30, 2)), *(int(v) for v in rng.integers(10, 34, 2)))
        found = Crop(*window).polygons([points.reshape(-1)])
        expected = [p.reshape(-1) for p in CropTransform(*window).apply_polygons([points])]
        assert len(found) == len(expected)
        assert shoelace(found) == pytest.approx(shoelace(expected))
        assert not found or np.concatenate(found).reshape(-1, 2).min(0) == pytest.approx(
            np.concatenate(expected).reshape(-1, 2).min(0)
        )


@pytest.mark.detectron2
@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_equal_to_detectron2_on_real_coco(real_coco, monkeypatch, masks):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_coco))
    dataset = load_coco(find_dataset("coco_2017_val"))
    assert dataset.objects()[2].any()
    cfg = config("INPUT.MASK_FORMAT", masks, "INPUT.MIN_SIZE_TRAIN", (320, 400), "INPUT.MAX_SIZE_TRAIN", 500)
    assert_equal_to_detectron2(dataset, cfg, "coco_2017_val", train=True, draws=1)


def test_resize_keeps_the_long_side_within_the_limit():
    for h, w in [(100, 37), (37, 100), (50, 50), (480, 640)]:
        for short, longest in [(20, 1000), (200, 333), (800, 1333)]:
            resize = resize_short_side(h, w, short, longest)
            sides = sorted((resize.new_height, resize.new_width))
            assert sides[1] <= longest
            assert sides[0] == short or sides[1] == longest
            assert abs(resize.new_width / resize.new_height - w / h) < 0.1 * w / h


@pytest.mark.parametrize("kind", ["relative", "relative_range", "absolute", "absolute_range"])
@pytest.mark.parametrize(("h", "w"), [(1, 3000), (3000, 1), (1, 1)])
def test_c9_a_window_has_a_pixel_of_the_thinnest_image(kind, h, w):
    size = [0.3, 0.3] if kind.startswith("relative") else [200, 300]
    cfg = config("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", kind, "INPUT.CROP.SIZE", size).INPUT
    for seed in range(20):
        image = np.zeros((h, w, 3), np.uint8)
        for transform in draw_transforms(cfg, h, w, np.random.RandomState(seed)):
            image = transform.image(image)
            assert min(image.shape) > 0


def test_resize_leaves_a_pixel_of_the_thinnest_image():
    for h, w in [(1, 3000), (3000, 1), (2, 100_000)]:
        resize = resize_short_side(h, w, 800, 1333)
        assert min(resize.new_height, resize.new_width) == 1
        assert max(resize.new_height, resize.new_width) == 1333
        assert resize.image(np.zeros((h, w, 3), np.uint8)).shape == (resize.new_height, resize.new_width, 3)
