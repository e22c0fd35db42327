"""The detection loaders: sharding, resuming, grouping, repeat factors, bad data, and Detectron2's own streams."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from test_data_mapper import assert_instances_equal

from loco_det.annotations import loader as module
from loco_det.annotations.loader import Loader, TrainingStream, build_test_loader, build_train_loader, repeat_factors
from loco_det.annotations.mapper import sample_rng
from loco_det.annotations.registry import find_dataset
from loco_det.core import device
from loco_det.core.errors import UserError
from loco_det.detection import train
from loco_det.detection.keys import get_cfg


def make(root: Path, name: str, count: int = 11, empty: int = 0, crowd: int = 0, classes: int = 3) -> None:
    """NAME_train of `count` images, every third wide; the last `empty` without objects, `crowd` before with crowds."""
    rng = np.random.default_rng(0)
    (root / name / "train").mkdir(parents=True)
    (root / name / "annotations").mkdir()
    images, annotations = [], []
    for i in range(count):
        h, w = (20, 30) if i % 3 == 0 else (30, 20)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root / name / "train" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": h, "width": w})
        if i < count - empty:
            annotations.append(
                {
                    **{"id": i, "image_id": i, "category_id": i % classes, "iscrowd": int(i >= count - empty - crowd)},
                    **{"bbox": [2.0, 3.0, 9.0, 8.0], "segmentation": [[2.0, 3.0, 11.0, 3.0, 11.0, 11.0, 2.0, 11.0]]},
                }
            )
    categories = [{"id": c, "name": f"c{c}"} for c in range(classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / name / "annotations" / "instances_train.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def config(*overrides) -> CfgNode:
    cfg = get_cfg()
    small = ["INPUT.MIN_SIZE_TRAIN", (20, 24), "INPUT.MAX_SIZE_TRAIN", 40, "INPUT.MIN_SIZE_TEST", 20]
    data = ["DATASETS.TRAIN", ("made_train",), "DATALOADER.NUM_WORKERS", 0, "SEED", 5, "SOLVER.IMS_PER_BATCH", 2]
    model = ["MODEL.MASK_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*small, *data, *model, *overrides])
    return cfg


def take(loader: Loader, count: int) -> list[list[dict]]:
    return list(itertools.islice(iter(loader), count))


def assert_same(ours: list[list[dict]], theirs: list[list[dict]]) -> None:
    assert [[s["image_id"] for s in b] for b in ours] == [[s["image_id"] for s in b] for b in theirs]
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs)):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].boxes, b["instances"].boxes)


def as_rank(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setattr(module, "rank", lambda: rank)
    monkeypatch.setattr(module, "world_size", lambda: world)


@pytest.mark.parametrize("grouping", [True, False])
def test_workers_and_resuming_change_nothing(root, grouping):
    make(root, "made")
    cfg = config("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
    whole = take(build_train_loader(cfg), 16)
    assert_same(take(build_train_loader(cfg, start_iter=9), 7), whole[9:])
    cfg.DATALOADER.NUM_WORKERS = 3
    loader = build_train_loader(cfg)
    assert_same(take(loader, 16), whole)
    assert_same(take(build_train_loader(cfg, start_iter=9), 7), whole[9:])
    assert_same(take(loader, 2), whole[:2])
    # The same image is not transformed alike each time, and another seed is another order.
    seen = [s for b in whole for s in b if s["image_id"] == whole[0][0]["image_id"]]
    assert any(not torch.equal(s["image"], seen[0]["image"]) for s in seen[1:])
    cfg.SEED = 6
    assert [s["image_id"] for b in take(build_train_loader(cfg), 16) for s in b] != [
        s["image_id"] for b in whole for s in b
    ]


def test_global_random_state_neither_matters_nor_moves(root):
    make(root, "made")
    cfg = config()
    first = take(build_train_loader(cfg), 3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 (that it does not matter is the point)
    before = torch.get_rng_state()
    assert_same(take(build_train_loader(cfg), 3), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_process_sees_its_share_and_all_see_each_image_once_an_epoch(root, monkeypatch, world):
    make(root, "made", count=11)
    cfg = config("SOLVER.IMS_PER_BATCH", world, "DATALOADER.ASPECT_RATIO_GROUPING", False)
    seen = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        seen.append([s["image_id"] for b in take(build_train_loader(cfg), 22) for s in b])
    stream = [i for together in zip(*seen) for i in together]  # as positions 0, 1, 2, ... of the shared stream
    for epoch in range(2):
        assert sorted(stream[11 * epoch : 11 * (epoch + 1)]) == list(range(11))

    tested = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        loader = build_test_loader(cfg, find_dataset("made_train"))
        batches = list(loader)
        assert len(loader) == len(batches)
        assert all(len(batch) == 1 for batch in batches)
        tested += [batch[0]["image_id"] for batch in batches]
    assert tested == list(range(11))


def test_batches_are_of_one_orientation_and_lose_no_image(root):
    make(root, "made", count=12)
    batches = take(build_train_loader(config("SOLVER.IMS_PER_BATCH", 4)), 60)
    for batch in batches:
        assert len({s["width"] > s["height"] for s in batch}) == 1
    count = Counter(s["image_id"] for b in batches for s in b)
    assert set(count) == set(range(12))
    assert max(count.values()) - min(count.values()) <= 2
    mixed = take(build_train_loader(config("DATALOADER.ASPECT_RATIO_GROUPING", False)), 20)
    assert any(len({s["width"] > s["height"] for s in b}) == 2 for b in mixed)


def test_square_images_go_with_the_high_ones_whatever_is_left_out(root):
    make(root, "made", count=16)
    file = root / "made" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for i in (4, 7, 13):
        Image.new("RGB", (25, 25)).save(root / "made" / "train" / f"{i}.png")
        content["images"][i] |= {"height": 25, "width": 25}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (0, 1, 5)]
    file.write_text(json.dumps(content))
    batches = take(build_train_loader(config("SOLVER.IMS_PER_BATCH", 3)), 40)
    wide = {i for i in range(16) if i % 3 == 0 and i not in (4, 7, 13)}
    groups = [{s["image_id"] for s in batch} for batch in batches]
    assert all(ids <= wide or not ids & wide for ids in groups)
    assert set().union(*groups) == set(range(16)) - {0, 1, 5}
    assert any(ids & {4, 7, 13} and ids - {4, 7, 13} for ids in groups)


def test_no_two_samples_of_a_run_are_drawn_from_the_same_numbers(root, monkeypatch):
    make(root, "made", count=5)
    drawn = []
    monkeypatch.setattr(module, "sample_rng", lambda *key: drawn.append(key) or sample_rng(*key))
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        take(build_train_loader(config("DATALOADER.ASPECT_RATIO_GROUPING", False)), 20)
    assert sorted(drawn) == [(5, position) for position in range(40)]


def test_no_more_workers_than_cores(root, monkeypatch):
    make(root, "made")
    for cores, workers in ((1, 1), (2, 2), (8, 3)):
        monkeypatch.setattr(module, "usable_cores", lambda cores=cores: cores)
        assert build_train_loader(config("DATALOADER.NUM_WORKERS", 3)).batches.num_workers == workers


def test_seed_0_is_a_seed_and_a_negative_one_is_none(root):
    make(root, "made")
    whole = take(build_train_loader(config("SEED", 0)), 8)
    assert_same(take(build_train_loader(config("SEED", 0)), 8), whole)
    orders = {
        tuple(s["image_id"] for b in take(build_train_loader(config("SEED", -1)), 8) for s in b) for _ in range(3)
    }
    assert len(orders) > 1


def test_a_seed_is_drawn_in_one_way(root, monkeypatch):
    make(root, "made")
    assert module.common_seed is train.common_seed is device.common_seed
    with monkeypatch.context() as patch:
        patch.setattr(module, "common_seed", {-1: 7}.get)
        drawn = take(build_train_loader(config("SEED", -1)), 4)
    assert_same(drawn, take(build_train_loader(config("SEED", 7)), 4))


def test_images_without_objects_are_left_out_unless_wanted(root):
    make(root, "made", count=10, empty=2, crowd=3)
    ids = {s["image_id"] for b in take(build_train_loader(config()), 40) for s in b}
    assert ids == set(range(5))
    wanted = take(build_train_loader(config("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)), 40)
    assert {s["image_id"] for b in wanted for s in b} == set(range(10))
    assert {len(s["instances"]) for b in wanted for s in b if s["image_id"] >= 5} == {0}
    assert len(build_test_loader(config(), find_dataset("made_train"))) == 10


def test_two_data_sets_make_one_epoch(root):
    make(root, "made", count=4)
    make(root, "more", count=3)
    cfg = config("DATASETS.TRAIN", ("made_train", "more_train"), "SOLVER.IMS_PER_BATCH", 1)
    epoch = [b[0]["file_name"] for b in take(build_train_loader(cfg), 200)]
    assert len(set(epoch)) == 7
    make(root, "else", classes=4)
    with pytest.raises(UserError, match="4 classes"):
        build_train_loader(config("DATASETS.TRAIN", ("made_train", "else_train")))
    file = root / "more" / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace('"c2"', '"cat"'))
    with pytest.raises(UserError, match="more_train and made_train differ"):
        build_train_loader(cfg)


def test_repeat_factors_by_a_loop():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 50, 120), rng.integers(0, 12, 120) ** 2 // 12
    for root, threshold in itertools.product((True, False), (0.0, 0.2, 0.5)):
        expected = []
        for image in range(50):
            factor = 1.0
            for label in labels[images == image]:
                share = len({i for i, k in zip(images, labels) if k == label}) / 50
                factor = max(factor, (threshold / share) ** (0.5 if root else 1.0))
            expected.append(factor)
        np.testing.assert_allclose(repeat_factors(images, labels, 50, threshold, root), expected, rtol=1e-6)


def test_repeated_images_come_as_often_as_their_factor_says():
    repeat = torch.tensor([1.0, 1.25, 2.5, 3.0])
    epochs = 2000
    count = Counter(itertools.islice(iter(TrainingStream(4, 0, repeat)), int(epochs * repeat.sum())))
    for image, factor in enumerate(repeat.tolist()):
        assert count[image] / epochs == pytest.approx(factor, rel=0.03)


def test_repeat_factor_sampler_is_wired(root):
    make(root, "made", count=13)
    file = root / "made" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    # Image 1 is filtered out, so that image numbers of the file and of the stream differ.
    content["annotations"].pop(1)
    for annotation in content["annotations"]:
        annotation["category_id"] = 2 if annotation["id"] == 4 else 1
    file.write_text(json.dumps(content))
    cfg = config("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.75)
    count = Counter(s["image_id"] for b in take(build_train_loader(cfg), 7 * 10) for s in b)
    assert count[4] == pytest.approx(3 * 10, abs=4)  # sqrt(0.75 / (1 / 12)) = 3
    cfg.DATALOADER.REPEAT_SQRT = False
    count = Counter(s["image_id"] for b in take(build_train_loader(cfg), 10 * 10) for s in b)
    assert count[4] == pytest.approx(9 * 10, abs=10)


def test_repeat_factors_count_classes_over_all_data_sets_and_crowds_too(root, monkeypatch):
    make(root, "made", count=7, empty=1)
    make(root, "more", count=5, crowd=2, classes=3)
    file = root / "more" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 if annotation["image_id"] < 4 else 2  # the last is a crowd
    content["annotations"].append({**content["annotations"][0], "id": 99, "image_id": 4, "category_id": 1})
    file.write_text(json.dumps(content))
    streams = []
    monkeypatch.setattr(module, "TrainingStream", lambda *args: streams.append(args) or TrainingStream(*args))
    build_train_loader(
        config(
            *("DATASETS.TRAIN", ("made_train", "more_train"), "DATALOADER.REPEAT_THRESHOLD", 0.9),
            *("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        )
    )
    # Left out: an image without objects and one with nothing but a crowd.
    classes = [{i % 3} for i in range(6)] + [{1}, {1}, {1}, {1, 2}]
    share = [sum(k in own for own in classes) / len(classes) for k in range(3)]
    expected = [max(1.0, *((0.9 / share[k]) ** 0.5 for k in own)) for own in classes]
    ((count, seed, repeat),) = streams
    assert (count, seed) == (10, 5)
    np.testing.assert_allclose(repeat, expected, rtol=1e-6)
    assert len({round(factor, 3) for factor in expected}) == 3


def test_each_process_has_its_share_of_a_batch(root, monkeypatch):
    make(root, "made")
    for world, size in ((1, 6), (2, 3), (3, 2)):
        as_rank(monkeypatch, world - 1, world)
        assert {len(batch) for batch in take(build_train_loader(config("SOLVER.IMS_PER_BATCH", 6)), 4)} == {size}


def test_proposals_are_those_of_the_images_own_data_set(root):
    names = ("made", "more")
    box = np.float32([[2, 3, 12, 13]])
    proposals = []
    for k, name in enumerate(names):
        make(root, name, count=4)
        proposals.append({str(i): (box, np.float32([10 * k + i])) for i in range(4)})
    cfg = config("DATASETS.TRAIN", tuple(f"{name}_train" for name in names), "SOLVER.IMS_PER_BATCH", 1)
    found = {
        (Path(s["file_name"]).parts[-3], s["image_id"]): s["proposals"].scores.tolist()
        for (s,) in take(build_train_loader(cfg, proposals=proposals), 40)
    }
    assert found == {(name, i): [10 * k + i] for k, name in enumerate(names) for i in range(4)}
    tested = build_test_loader(cfg, find_dataset("more_train"), proposals[1])
    assert [s["proposals"].scores.tolist() for (s,) in tested] == [[10], [11], [12], [13]]
    del proposals[1]["2"]
    with pytest.raises(UserError, match="more_train has none for image 2"):
        list(build_test_loader(cfg, find_dataset("more_train"), proposals[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_training_with_its_name_and_no_traceback(root, workers):
    make(root, "made")
    (root / "made" / "train" / "7.png").write_bytes(b"\x89PNG broken")
    cfg = config("DATALOADER.NUM_WORKERS", workers)
    with pytest.raises(UserError, match=r"7\.png") as caught:
        take(build_train_loader(cfg), 20)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match=r"7\.png"):
        list(build_test_loader(cfg, find_dataset("made_train")))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["DATASETS.TRAIN", ()], "DATASETS.TRAIN"),
        (["DATASETS.TRAIN", ("gone_train",)], "gone"),
        (["SOLVER.IMS_PER_BATCH", 0], "IMS_PER_BATCH"),
        (["DATALOADER.NUM_WORKERS", -1], "NUM_WORKERS"),
        (["DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"], "SAMPLER_TRAIN"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", 80], "has 3 classes and MODEL.ROI_HEADS.NUM_CLASSES is 80"),
    ],
)
def test_what_does_not_fit_is_named(root, overrides, words):
    make(root, "made")
    with pytest.raises(UserError, match=words):
        build_train_loader(config(*overrides))


def test_a_batch_that_processes_cannot_share_is_refused(root, monkeypatch):
    make(root, "made")
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(UserError, match="6, which 4 processes"):
        build_train_loader(config("SOLVER.IMS_PER_BATCH", 6))


def test_only_crowds_leave_nothing_to_train_on(root):
    make(root, "made", count=3, crowd=3)
    with pytest.raises(UserError, match=r"instances_train\.json"):
        build_train_loader(config())


@pytest.mark.detectron2
def test_streams_and_factors_equal_detectron2():
    samplers = pytest.importorskip("detectron2.data.samplers")
    theirs = itertools.islice(iter(samplers.TrainingSampler(13, seed=7)), 100)
    assert list(itertools.islice(iter(TrainingStream(13, 7)), 100)) == list(theirs)
    rng = np.random.default_rng(0)
    images, labels = np.sort(rng.integers(0, 50, 120)), rng.integers(0, 12, 120) ** 2 // 12
    records = [{"annotations": [{"category_id": int(k)} for k in labels[images == i]]} for i in range(50)]
    for root, threshold in itertools.product((True, False), (0.0, 0.2, 0.5)):
        expected = samplers.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, threshold, sqrt=root
        )
        factors = repeat_factors(images, labels, 50, threshold, root)
        assert torch.equal(factors, expected)
        theirs = itertools.islice(iter(samplers.RepeatFactorTrainingSampler(expected, seed=3)), 300)
        assert list(itertools.islice(iter(TrainingStream(50, 3, factors)), 300)) == list(theirs)


@pytest.mark.detectron2
def test_batches_hold_the_images_of_detectron2s_batches(root):
    data = pytest.importorskip("detectron2.data")
    from detectron2.data.datasets import load_coco_json

    make(root, "made", count=20, empty=2, crowd=3)
    folder = root / "made"
    records = load_coco_json(str(folder / "annotations" / "instances_train.json"), str(folder / "train"), "made_train")
    records = data.build.filter_images_with_only_crowd_annotations(records)
    theirs = data.build_detection_train_loader(
        records, mapper=dict, sampler=data.samplers.TrainingSampler(15, seed=5), total_batch_size=4
    )
    expected = [[s["image_id"] for s in b] for b in itertools.islice(iter(theirs), 30)]
    found = take(build_train_loader(config("SOLVER.IMS_PER_BATCH", 4)), 30)
    assert [[s["image_id"] for s in b] for b in found] == expected


BATCHES = {
    "stock": [],
    "several sizes": ["INPUT.MIN_SIZE_TRAIN", (18, 40), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"],
    "bitmasks, vertical": ["INPUT.MASK_FORMAT", "bitmask", "INPUT.RANDOM_FLIP", "vertical"],
    "cut bitmasks": ["INPUT.MASK_FORMAT", "bitmask", "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.6, 0.7]],
    "boxes": [
        *("MODEL.MASK_ON", False, "INPUT.CROP.ENABLED", True),
        *("INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [15, 12]),
    ],
    "rare classes": ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9],
    "all images, mixed": ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "DATALOADER.ASPECT_RATIO_GROUPING", False],
}


@pytest.mark.detectron2
@pytest.mark.parametrize("setting", BATCHES)
def test_batches_equal_detectron2s(root, setting):
    """From one configuration to the same pixels, boxes, classes and masks in the same batches.

    The global generator that Detectron2's mapper draws from is put where ours stands at the same position of the
    stream, since a worker's seed is another there.
    """
    data = pytest.importorskip("detectron2.data")
    from detectron2.config import get_cfg as their_get_cfg
    from detectron2.data.datasets import register_coco_instances

    make(root, "made", count=20, empty=2, crowd=3)
    file = root / "made" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a | {"category_id": 2 if a["id"] % 9 == 4 else 1} for a in content["annotations"]]
    file.write_text(json.dumps(content))
    cfg = config("SOLVER.IMS_PER_BATCH", 4, *BATCHES[setting])
    name = f"made_{setting}_train"
    register_coco_instances(name, {}, str(file), str(root / "made" / "train"))
    their_cfg = their_get_cfg()
    their_cfg.merge_from_other_cfg(cfg)
    their_cfg.DATASETS.TRAIN = (name,)
    mapper, positions = data.DatasetMapper(their_cfg, is_train=True), itertools.count()

    def mapped(record: dict) -> dict:
        np.random.set_state(sample_rng(cfg.SEED, next(positions)).get_state())  # noqa: NPY002 (theirs)
        return mapper(record)

    theirs = iter(data.build_detection_train_loader(their_cfg, mapper=mapped))
    for ours in take(build_train_loader(cfg), 12):
        for found, expected in zip(ours, next(theirs), strict=True):
            assert (found["image_id"], found["file_name"]) == (expected["image_id"], expected["file_name"])
            assert torch.equal(found["image"], expected["image"])
            assert_instances_equal(found["instances"], expected["instances"])
