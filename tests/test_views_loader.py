"""The loaders: what a step holds depends on data, seed and step alone; unreadable images are counted and replaced."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from view_cases import AUGMENTED, SIZE, assert_same, config, encode, photograph, steps, two_views

from loco_det.core.errors import UserError
from loco_det.images import tar
from loco_det.images import two_views as loaders
from loco_det.images.folders import open_source
from loco_det.images.two_views import TwoViewLoader, build_plain_loader, build_two_view_loader, epoch_order
from loco_det.images.views import view_config

IMAGES = 23


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(IMAGES):
        path = tmp_path / ("even" if i % 2 == 0 else "odd") / f"{i:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photograph(40 + i, 60, seed=i)))
    return tmp_path


def test_a_batch_is_the_two_views_of_its_images(folder):
    (batch,) = steps(folder, 1)
    source = open_source(folder)
    assert batch.views.shape == (2, 8, 3, SIZE, SIZE)
    assert batch.views.dtype == torch.uint8
    assert batch.index.dtype == torch.int64
    for row, index in enumerate(batch.index.tolist()):
        first, second = two_views(source.read(index), "x", view_config(SIZE, {}), 5, 0, index)
        np.testing.assert_array_equal(batch.views[0, row].permute(1, 2, 0), first)
        np.testing.assert_array_equal(batch.views[1, row].permute(1, 2, 0), second)


def test_a_batch_of_any_epoch_and_size_is_the_two_views_of_its_images(folder):
    """More images than are augmented together, and a step that is an epoch."""
    source = open_source(folder)
    for epoch, batch in enumerate(steps(folder, 3, SOLVER__BATCH_SIZE=20)):
        for row, index in enumerate(batch.index.tolist()):
            expected = two_views(source.read(index), "x", view_config(SIZE, {}), 5, epoch, index)
            np.testing.assert_array_equal(batch.views[0, row].permute(1, 2, 0), expected[0])
            np.testing.assert_array_equal(batch.views[1, row].permute(1, 2, 0), expected[1])


def test_orders_and_views_share_no_random_numbers():
    orders = [loaders._ORDER_STREAM, tar._SHARDS, *(tar._BUFFER + run for run in range(tar._MOST_RUNS))]
    assert len(set(orders)) == len(orders)
    assert min(orders) >= 2**63  # no image has such an index
    assert max(orders) < 2**64


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_rest(folder):
    source = open_source(folder)
    loader = build_two_view_loader(config(folder), source)
    assert loader.steps_per_epoch == 2
    epochs = [torch.cat([b.index for b in steps(folder, 2, 2 * epoch)]).tolist() for epoch in range(12)]
    for indices in epochs:
        assert len(set(indices)) == 16
        assert max(indices) < IMAGES
    assert len({tuple(indices) for indices in epochs}) == len(epochs)
    assert set().union(*epochs) == set(range(IMAGES))  # nobody is left out for ever


def test_order_is_uniform():
    first = np.array([epoch_order(5, 0, epoch)[0] for epoch in range(2000)])
    counts = np.bincount(first, minlength=5)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("where", AUGMENTED)
def test_workers_change_nothing(folder, workers, where, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert_same(steps(folder, 5, DATA__NUM_WORKERS=workers, **where), steps(folder, 5, **where))


@pytest.mark.parametrize("where", AUGMENTED)
def test_ranks_split_the_same_batch(folder, where):
    whole = steps(folder, 5, **where)
    parts = [steps(folder, 5, rank=rank, world_size=2, **where) for rank in range(2)]
    for all_images, *halves in zip(whole, *parts):
        assert torch.equal(all_images.views, torch.cat([half.views for half in halves], 1))
        assert torch.equal(all_images.index, torch.cat([half.index for half in halves]))
    for rank in range(2):
        loader = build_two_view_loader(config(folder), open_source(folder), rank=rank, world_size=2)
        assert loader.steps_per_epoch == IMAGES // 8


@pytest.mark.parametrize("start", [0, 1, 2, 5])
@pytest.mark.parametrize("where", AUGMENTED)
def test_resuming_is_starting_there(folder, start, where):
    assert_same(steps(folder, 7 - start, start, **where), steps(folder, 7, **where)[start:])


def test_a_loader_can_start_again(folder):
    cfg = config(folder, DATA__NUM_WORKERS=1)
    loader = build_two_view_loader(cfg, open_source(folder))
    first = list(itertools.islice(loader.batches(1), 2))
    again = list(itertools.islice(loader.batches(1), 2))
    assert_same(first, again)


def test_the_seed_matters_and_the_global_generator_does_not(folder):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = steps(folder, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(steps(folder, 2), batches)
    assert not torch.equal(steps(folder, 2, SEED=6)[0].index, batches[0].index)


# --- unreadable images ------------------------------------------------------------------------------------------


def damage(folder: Path, *numbers: int) -> list[str]:
    paths = [next(folder.rglob(f"{number:03d}.jpg")) for number in numbers]
    for path in paths:
        path.write_bytes(path.read_bytes()[:300])
    return [path.name for path in paths]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", AUGMENTED)
def test_unreadable_images_are_named_once_and_replaced(folder, workers, where, caplog):
    names = damage(folder, 4, 6, 9)  # 4 and 6 are neighbours in class order
    cfg = config(folder, DATA__MAX_BAD_SHARE=0.2, DATA__NUM_WORKERS=workers, **where)
    source = open_source(folder)
    loader = build_two_view_loader(cfg, source)
    with caplog.at_level(logging.WARNING, "loco_det"):
        logging.getLogger("loco_det").propagate = True
        batches = list(itertools.islice(loader.batches(), 24))
    assert sorted(Path(source.name(i)).name for i in loader.bad) == names
    for name in names:
        assert sum(name in record.message for record in caplog.records) == 1
    used = torch.cat([batch.index for batch in batches]).tolist()
    assert not {Path(source.name(i)).name for i in used} & set(names)
    assert_same(batches, steps(folder, 24, DATA__MAX_BAD_SHARE=0.2, **where))  # the same ones in their place every time


def test_many_unreadable_images_do_not_flood_the_log(tmp_path, caplog):
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.jpg" for i in range(100)))
    results = [(f"step {i}", [(i, f"image {i} is broken"), (0, "image 0 is broken")]) for i in range(70)]
    loader = TwoViewLoader(open_source(tmp_path / "list.txt"), 1, 1.0, lambda start: iter(results))
    with caplog.at_level(logging.WARNING, "loco_det"):
        logging.getLogger("loco_det").propagate = True
        assert list(loader.batches()) == [views for views, _ in results]
    named = [int(record.message.split()[1]) for record in caplog.records]
    assert named == [*range(20), 31, 63]  # then the 32nd and the 64th
    assert list(loader.bad) == list(range(70))


def test_a_substitute_is_not_a_copy_of_its_own_views(folder):
    damage(folder, 4)
    source = open_source(folder)
    bad = next(i for i in range(IMAGES) if source.name(i).endswith("004.jpg"))
    for batch in steps(folder, 20, DATA__MAX_BAD_SHARE=0.2, SOLVER__BATCH_SIZE=23):
        rows = (batch.index == bad + 1).nonzero().flatten().tolist()
        assert len(rows) == 2
        assert not torch.equal(batch.views[0, rows[0]], batch.views[0, rows[1]])


@pytest.mark.parametrize("where", AUGMENTED)
def test_a_substitute_of_another_size_has_the_views_of_itself(tmp_path, where):
    """What was drawn ahead for the image that breaks off does not hold for its neighbour."""
    whole = encode(photograph(200, 300))
    (tmp_path / "0.jpg").write_bytes(whole[: len(whole) - 99])
    (tmp_path / "1.jpg").write_bytes(encode(photograph(298, 199, seed=1)))
    source = open_source(tmp_path)
    changes = {"DATA__MAX_BAD_SHARE": 0.5, "SOLVER__BATCH_SIZE": 2}  # one of two: no more than half
    (batch,) = steps(tmp_path, 1, **changes, **where)
    bound = 0 if where == AUGMENTED[0] else 2
    assert batch.index.tolist() == [1, 1]
    for row, index in enumerate(epoch_order(2, 5, 0).tolist()):
        expected = two_views(source.read(1), "x", view_config(SIZE, {}), 5, 0, index)
        assert np.abs(batch.views[0, row].permute(1, 2, 0).numpy().astype(int) - expected[0]).max() <= bound
        assert np.abs(batch.views[1, row].permute(1, 2, 0).numpy().astype(int) - expected[1]).max() <= bound


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_unreadable_images_end_the_run(folder, workers):
    damage(folder, 4, 6, 9)
    with pytest.raises(
        UserError, match=r"3 of 23 images cannot be read.*DATA\.MAX_BAD_SHARE 0\.1 .*\.jpg: not a readable"
    ):
        steps(folder, 24, DATA__MAX_BAD_SHARE=0.1, DATA__NUM_WORKERS=workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", AUGMENTED)
def test_a_set_of_unreadable_images_ends_at_once(folder, workers, where):
    damage(folder, *range(IMAGES))
    with pytest.raises(UserError, match=rf"not a readable image.* \(nor can {IMAGES - 1} others in its place\)$"):
        steps(folder, 1, DATA__MAX_BAD_SHARE=1.0, DATA__NUM_WORKERS=workers, **where)


def test_a_limited_number_of_images_is_tried_in_the_place_of_one(folder, monkeypatch):
    monkeypatch.setattr("loco_det.images.two_views.SUBSTITUTES", 3)
    damage(folder, *range(IMAGES))
    with pytest.raises(UserError, match=r"\(nor can 2 others in its place\)$") as found:
        steps(folder, 1, DATA__MAX_BAD_SHARE=1.0, DATA__NUM_WORKERS=0)
    first = epoch_order(IMAGES, 5, 0).tolist()[0]
    assert open_source(str(folder)).name(first) in str(found.value), "the image asked for is named"


def test_share_zero_tolerates_none(folder):
    damage(folder, 4)
    with pytest.raises(UserError, match="1 of 23 images"):
        steps(folder, 24, DATA__MAX_BAD_SHARE=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SOLVER__BATCH_SIZE": 24}, r"SOLVER\.BATCH_SIZE is 24 but DATA\.PATH .* has 23 images"),
        ({"SOLVER__BATCH_SIZE": 0}, r"SOLVER\.BATCH_SIZE is 0"),
        ({"DATA__NUM_WORKERS": -2}, r"DATA\.NUM_WORKERS is -2"),
        ({"DATA__MAX_BAD_SHARE": 1.5}, r"DATA\.MAX_BAD_SHARE is 1\.5"),
        ({"DATA__IMAGE_SIZE": -3}, r"DATA\.IMAGE_SIZE -3"),
        ({"AUGMENT__PRESET": "none"}, r"AUGMENT\.PRESET 'none'"),
    ],
)
def test_unusable_values_are_named(folder, changes, message):
    with pytest.raises(UserError, match=message):
        steps(folder, 1, **changes)


def test_ranks_must_divide_the_batch(folder):
    with pytest.raises(UserError, match="multiple of 3 processes"):
        steps(folder, 1, rank=0, world_size=3)


# --- plain images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_plain_images_in_order_with_labels(folder, workers):
    source = open_source(folder)
    loader = build_plain_loader(source, SIZE, batch_size=10, num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert len(loader) == len(batches) == 3
        assert torch.cat([b.index for b in batches]).tolist() == list(range(IMAGES))
        labels = torch.cat([b.labels for b in batches]).tolist()
        assert [source.classes[label] for label in labels] == [Path(source.name(i)).parent.name for i in range(IMAGES)]
    assert batches[0].images.shape == (10, 3, SIZE, SIZE)
    assert batches[0].images.dtype == torch.uint8


def test_plain_images_of_a_subset_without_labels(folder):
    (batch,) = build_plain_loader(open_source(folder, "flat"), SIZE, batch_size=10, indices=[7, 3])
    assert batch.index.tolist() == [7, 3]
    assert batch.labels.tolist() == [-1, -1]


@pytest.mark.parametrize(("height", "width"), [(256, 341), (400, 256), (300, 300)])
def test_plain_images_are_the_middle_of_the_resized_image(tmp_path, height, width):
    image = photograph(height, width)
    (tmp_path / "a.png").write_bytes(encode(image, "PNG"))
    (batch,) = build_plain_loader(open_source(tmp_path), 112, batch_size=1)
    reference = v2.Compose([v2.Resize(128, antialias=True), v2.CenterCrop(112)])(torch.tensor(image).permute(2, 0, 1))
    difference = (batch.images[0].int() - reference.int()).abs().float()
    shifted = (batch.images[0].int() - reference.int().roll(2, -1)).abs().float()
    assert difference.mean() < 4  # the crop is rounded to whole pixels before rather than after resizing
    assert difference.mean() < 0.5 * shifted.mean()


def test_the_middle_is_the_square_of_whole_pixels_nearest_to_it(monkeypatch):
    crops = []
    monkeypatch.setattr(loaders, "crop_resize", lambda image, crop, size: crops.append(crop))
    for height, width in ((256, 341), (99, 120), (500, 333), (3, 1)):
        loaders.centre(np.zeros((height, width, 3), np.uint8), 224, 256)
        top, left, h, w = crops[-1]
        assert h == w
        assert abs(h - max(1, min(height, width) * 224 / 256)) <= 0.5
        assert abs(top + h / 2 - height / 2) <= 0.5
        assert abs(left + w / 2 - width / 2) <= 0.5


def test_small_plain_images_are_kept_whole(tmp_path):
    image = photograph(32, 32)
    (tmp_path / "a.png").write_bytes(encode(image, "PNG"))
    (batch,) = build_plain_loader(open_source(tmp_path), 32, batch_size=4)
    np.testing.assert_array_equal(batch.images[0].permute(1, 2, 0), image)


@pytest.mark.parametrize(("size", "short_side"), [(32, 32), (95, 95), (96, 110), (224, 256)])
def test_images_of_96_pixels_and_more_lose_a_border(tmp_path, size, short_side):
    (tmp_path / "a.png").write_bytes(encode(photograph(130, 150), "PNG"))
    source = open_source(tmp_path)
    (found,) = build_plain_loader(source, size, batch_size=1)
    (expected,) = build_plain_loader(source, size, batch_size=1, short_side=short_side)
    assert torch.equal(found.images, expected.images)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_plain_image_is_an_error(folder, workers):
    damage(folder, 4)
    loader = build_plain_loader(open_source(folder), SIZE, batch_size=8, num_workers=workers)
    with pytest.raises(UserError, match=r"004\.jpg: not a readable image"):
        list(loader)


def test_unreadable_plain_images_are_left_out_where_asked(folder):
    source = open_source(folder)
    everything = list(build_plain_loader(source, SIZE, batch_size=8))
    names = damage(folder, 4, 6, 9)
    bad = [i for i in range(IMAGES) if Path(source.name(i)).name in names]
    batches = list(build_plain_loader(source, SIZE, batch_size=8, skip_unreadable=True))
    assert len(batches) == len(everything)
    for found, whole in zip(batches, everything):
        kept = [row for row, index in enumerate(whole.index.tolist()) if index not in bad]
        for column, expected in zip(found, whole):
            assert torch.equal(column, expected[kept])


def test_real_zip_of_photographs(real_coco, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "coco.zip", "w") as archive:
        for path in sorted((real_coco / "coco" / "val2017").glob("*.jpg"))[:8]:
            archive.write(path, f"val2017/{path.name}")
    (batch,) = steps(tmp_path / "coco.zip", 1, DATA__IMAGE_SIZE=64, DATA__NUM_WORKERS=1)
    assert batch.views[0].float().std() > 20
