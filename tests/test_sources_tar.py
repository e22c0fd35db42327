"""Tar shards: every image once an epoch, the same order for any workers and ranks, resuming at the exact sample."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from view_cases import AUGMENTED, SIZE, assert_same, config, encode, photograph, steps, two_views

from loco_det.core.errors import UserError
from loco_det.evaluation.probes.features import images_digest
from loco_det.evaluation.probes.images import LabelledImages
from loco_det.images import tar
from loco_det.images.batches import TwoViews, joined
from loco_det.images.folders import open_source
from loco_det.images.tar import buffered_order
from loco_det.images.two_views import build_plain_loader, build_two_view_loader
from loco_det.images.views import view_config

wds = pytest.importorskip("webdataset", reason="the extra `webdataset` is not installed")

COUNTS = (9, 2, 14, 7, 5)  # images in each shard: no number of workers or ranks divides them
IMAGES, BATCH = sum(COUNTS), 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCO_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def write_shards(folder: Path, labels: bool = True) -> Path:
    """As webdataset's own writer packs them; the picture's number stands in its brightness and its class."""
    folder.mkdir(parents=True)
    number = 0
    for shard, count in enumerate(COUNTS):
        with wds.TarWriter(str(folder / f"train-{shard:04d}.tar")) as writer:
            for _ in range(count):
                sample = {"__key__": f"a/{number:06d}", "jpg": encode(photograph(20 + number, 30, seed=number))}
                sample |= {"cls": number % 12} if labels else {}
                writer.write({**sample, "json": {"more": "x" * number * 100}})
                number += 1
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_a_source_like_any_other(shards):
    source = open_source(shards)
    assert len(source) == IMAGES
    assert source.classes == [str(k) for k in range(12)]  # by number: 2 before 10
    for number in range(IMAGES):
        assert source.read(number) == encode(photograph(20 + number, 30, seed=number))
        assert source.label(number) == number % 12
        assert source.name(number).endswith(f".tar!a/{number:06d}.jpg")
    assert source.name(9).startswith(str(shards / "train-0001.tar!"))
    (batch,) = build_plain_loader(source, SIZE, batch_size=99)
    assert batch.labels.tolist() == [number % 12 for number in range(IMAGES)]


def test_paths_that_mean_shards(shards, tmp_path):
    everything = [open_source(shards).read(i) for i in range(IMAGES)]
    for path in (f"{shards}/train-{{0000..0004}}.tar", shards):
        for format in ("auto", "tar"):
            source = open_source(path, format)
            assert [source.read(i) for i in range(len(source))] == everything
    assert len(open_source(shards / "train-0002.tar")) == COUNTS[2]
    assert len(open_source(f"{shards}/train-000{{0,3}}.tar")) == COUNTS[0] + COUNTS[3]
    unlabelled = open_source(write_shards(tmp_path / "unlabelled", labels=False))
    assert (unlabelled.classes, unlabelled.label(3)) == ([], None)


def test_the_index_is_what_webdataset_reads(shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = list(wds.DataPipeline(wds.SimpleShardList(urls), wds.tarfile_to_samples()))
    source = open_source(shards)
    assert [source.read(i) for i in range(len(source))] == [sample["jpg"] for sample in theirs]
    assert [str(source.label(i)) for i in range(len(source))] == [sample["cls"].decode() for sample in theirs]


def test_odd_names_are_grouped_as_webdataset_groups_them(tmp_path):
    """A key ends at the name's first dot; without one, hidden or webdataset's own, a file belongs to no sample."""
    names = ("v1.2/1.jpg", "v1.2/1.png", "v1.2/1.left.jpg", "2.seg.png", "2.JPG", "3.left.jpg", "4.txt", "4.webp")
    skipped = (".hidden.jpg", "v1.2/._5.jpg", "__meta__/6.jpg", "none")
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as archive:
        for name in (*names[:3], *skipped, *names[3:]):
            add(archive, name, f"bytes of {name}".encode())
        folder = tarfile.TarInfo("7.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    source = open_source(path)
    found = {source.name(i).partition("!")[2]: source.read(i) for i in range(len(source))}
    assert found == {name: f"bytes of {name}".encode() for name in ("v1.2/1.jpg", "2.JPG", "4.webp")}
    theirs = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples())
    images = [next((s[k] for k in s if k in ("jpg", "png", "webp")), None) for s in theirs]
    assert list(found.values()) == [image for image in images if image is not None]
    assert [data for _, data in source.run(0, 3, buffer=1, seed=0, epoch=0)] == list(found.values())


def test_a_batch_is_the_two_views_of_its_images(shards):
    source = open_source(shards)
    for step, batch in enumerate(steps(shards, 6)):
        for row, index in enumerate(batch.index.tolist()):
            first, second = two_views(source.read(index), "x", view_config(SIZE, {}), 5, step // 4, index)
            np.testing.assert_array_equal(batch.views[0, row].permute(1, 2, 0), first)
            np.testing.assert_array_equal(batch.views[1, row].permute(1, 2, 0), second)


def test_an_epoch_shows_every_image_at_most_once_and_drops_the_rest(shards):
    assert build_two_view_loader(config(shards), open_source(shards)).steps_per_epoch == IMAGES // BATCH == 4
    epochs = [torch.cat([b.index for b in steps(shards, 4, 4 * epoch)]).tolist() for epoch in range(12)]
    for indices in epochs:
        assert len(set(indices)) == 4 * BATCH
    assert len({tuple(indices) for indices in epochs}) == len(epochs)
    assert set().union(*epochs) == set(range(IMAGES))  # nobody is left out for ever


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("where", AUGMENTED)
def test_workers_change_nothing(shards, workers, where, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert_same(steps(shards, 6, DATA__NUM_WORKERS=workers, **where), steps(shards, 6, **where))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_split_the_same_batch(shards, world_size):
    whole = steps(shards, 6)
    parts = [steps(shards, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
    for all_images, *shares in zip(whole, *parts):
        assert torch.equal(all_images.views, torch.cat([share.views for share in shares], 1))
        assert torch.equal(all_images.index, torch.cat([share.index for share in shares]))


def test_more_ranks_than_shards_still_show_every_image_at_most_once(shards):
    """Eight runs out of five shards: most shards lie on a cut."""
    ranks = [steps(shards, 4, rank=rank, world_size=8) for rank in range(8)]
    indices = [index for batches in ranks for batch in batches for index in batch.index.tolist()]
    assert len(set(indices)) == len(indices) == 4 * BATCH


@pytest.mark.parametrize("start", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", AUGMENTED)
def test_resuming_is_starting_there(shards, start, workers, where):
    assert_same(steps(shards, 9 - start, start, DATA__NUM_WORKERS=workers, **where), steps(shards, 9, **where)[start:])


def test_resuming_neither_decodes_nor_opens_what_is_over(shards, monkeypatch):
    source = open_source(shards)
    opened = []
    real = open
    monkeypatch.setattr(tar, "open", lambda path, mode: opened.append(path) or real(path, mode), raising=False)
    rest = list(source.run(0, IMAGES, buffer=2, seed=0, epoch=0, first=IMAGES - 3))
    assert len(rest) == 3
    assert len(opened) <= 2
    opened.clear()
    assert list(source.run(0, IMAGES, buffer=2, seed=0, epoch=0))[-3:] == rest
    assert len(opened) == len(COUNTS)  # each shard once, front to back


@pytest.mark.parametrize(("count", "buffer"), [(1, 1), (10, 1), (50, 7), (50, 50), (20, 1000)])
def test_shuffle_buffer(count, buffer):
    """Against a list that images really pass through; an image never leaves before it could have come in."""
    order = buffered_order(count, buffer, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(count))
    assert all(image < place + buffer for place, image in enumerate(order.tolist()))
    if buffer == 1:
        assert order.tolist() == list(range(count))
    else:
        assert order.tolist() != list(range(count)) or count < 3


def test_a_full_shuffle_buffer_is_uniform():
    firsts = [buffered_order(6, 6, np.random.default_rng(seed))[2] for seed in range(3000)]
    assert np.abs(np.bincount(firsts, minlength=6) - 500).max() < 5 * np.sqrt(500)


def test_each_run_of_each_epoch_is_shuffled_in_its_own_way(shards):
    source, orders, epochs = open_source(shards), set(), {}
    for seed, epoch, run in itertools.product(range(2), range(2), range(4)):

        def images(buffer, run=run, epoch=epoch, seed=seed):
            return [image for image, _ in source.run(run, 9, buffer=buffer, seed=seed, epoch=epoch)]

        straight, shuffled = images(1), images(4)
        assert sorted(shuffled) == sorted(straight)
        place = [straight.index(image) for image in shuffled]
        assert all(p < k + 4 for k, p in enumerate(place))
        orders.add(tuple(place))
        epochs.setdefault((seed, epoch), []).extend(straight)
    assert len(orders) == 16
    assert len({tuple(order) for order in epochs.values()}) == 4  # the shards too come in another order


def test_a_shard_that_was_cut_off_since_is_named(shards):
    source = open_source(shards)
    path = shards / "train-0004.tar"
    os.truncate(path, int(source._place[IMAGES - 1, 1]) + 5)
    with pytest.raises(UserError, match=r"train-0004\.tar!a/000036\.jpg: the shard ends inside it"):
        source.read(IMAGES - 1)
    assert source.read(IMAGES - 2)
    path.unlink()
    with pytest.raises(UserError, match=r"train-0004\.tar: cannot be read"):
        source.read(IMAGES - 2)


def test_unreadable_images_are_replaced_by_a_neighbour_and_counted(shards):
    path = shards / "train-0002.tar"
    bad = 13
    source = open_source(shards)
    with open(path, "r+b") as file:
        file.seek(int(source._place[bad, 1]))
        file.write(b"\0" * 50)
    cfg = config(shards, DATA__MAX_BAD_SHARE=0.5)
    loader = build_two_view_loader(cfg, open_source(shards))
    batches = list(itertools.islice(loader.batches(), 12))
    assert list(loader.bad) == [bad]
    assert "train-0002.tar!a/000013.jpg: not a readable image" in loader.bad[bad]
    assert bad not in torch.cat([batch.index for batch in batches])
    assert_same(batches[5:], steps(shards, 7, 5, DATA__MAX_BAD_SHARE=0.5))
    with pytest.raises(UserError, match="1 of 37 images cannot be read"):
        steps(shards, 12, DATA__MAX_BAD_SHARE=0.0, DATA__NUM_WORKERS=1)


def test_a_step_of_several_workers_is_all_of_their_parts():
    """Their images in order, every unreadable one, and the error of whichever met one."""
    parts = []
    for k in range(3):
        views = torch.arange(2 * (k + 1) * 3, dtype=torch.uint8).view(2, k + 1, 3, 1, 1) + 50 * k
        parts.append((TwoViews(views, torch.arange(k + 1) + 10 * k), [(k, f"bad {k}")]))
    (views, index), bad = joined(parts, pin=False)
    assert views[:, :, 0].flatten(1).tolist() == [[0, 50, 53, 100, 103, 106], [3, 56, 59, 109, 112, 115]]
    assert views.is_contiguous()
    assert index.tolist() == [0, 10, 11, 20, 21, 22]
    assert bad == [(0, "bad 0"), (1, "bad 1"), (2, "bad 2")]
    assert joined(parts[:1], pin=False)[0].views is parts[0][0].views
    error = UserError("a damaged shard")
    assert joined([*parts, error], pin=False) is joined([error], pin=False) is error


def test_all_runs_together_hold_no_more_than_the_shuffle_buffer(shards, monkeypatch):
    source, buffers = open_source(shards), []
    run = source.run
    monkeypatch.setattr(source, "run", lambda *args, **named: buffers.append(named["buffer"]) or run(*args, **named))
    for size, held in ((12, 12), (13, 12), (4096, 4096), (1, 4)):  # four runs, each of at least one image
        buffers.clear()
        next(build_two_view_loader(config(shards, DATA__SHUFFLE_BUFFER=size), source).batches())
        assert len(buffers) == 4
        assert sum(buffers) == held


# --- the index's cache ------------------------------------------------------------------------------------------


def test_the_index_is_made_once_and_again_when_a_shard_changes(shards, cache, monkeypatch):
    open_source(shards)
    (file,) = cache.glob("*.npz")
    made = []
    build = tar._index
    monkeypatch.setattr(tar, "_index", lambda *args: made.append(1) or build(*args))
    assert len(open_source(shards)) == IMAGES
    assert not made
    whole = file.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # in the zip's directory; flags stand 8 bytes on, the method 10
    flips = [(8, 1), (8, 64), (10, 1), (10, 8)]  # encrypted, strongly, no method at all, deflated
    flipped = [whole[: entry + at] + bytes([whole[entry + at] ^ bit]) + whole[entry + at + 1 :] for at, bit in flips]
    for damage in (b"", b"PK nonsense", whole[:300], *flipped):
        file.write_bytes(damage)
        assert len(open_source(shards)) == IMAGES
    assert len(made) == 7
    with tarfile.open(shards / "train-0001.tar", "a") as archive:
        add(archive, "new.jpg", encode(photograph(9, 9)))
        add(archive, "new.cls", b"3")
    assert len(open_source(shards)) == IMAGES + 1
    assert len(made) == 8


@pytest.mark.parametrize("change", ["place", "counts", "names"])
def test_an_index_whose_parts_do_not_fit_is_made_again(shards, cache, change):
    open_source(shards)
    (file,) = cache.glob("*.npz")
    with np.load(file) as saved:
        index = dict(saved)
    whole = file.read_bytes()
    np.savez(file, **{**index, change: index[change][:-1] if change != "names" else index[change][:-20]})
    source = open_source(shards)
    assert source.read(IMAGES - 1) == encode(photograph(20 + IMAGES - 1, 30, seed=IMAGES - 1))
    assert file.read_bytes() == whole


def test_a_shard_that_changes_under_a_run_is_noticed(shards):
    source = open_source(shards)
    with tarfile.open(shards / "train-0002.tar", "w") as archive:
        add(archive, "x.jpg", b"x" * 700)
        add(archive, "y.jpg", b"x" * 700)
    with pytest.raises(UserError, match=r"train-0002\.tar: (has changed|not readable)"):
        list(source.run(0, IMAGES, buffer=2, seed=0, epoch=0))


def test_other_images_of_the_same_sizes_under_a_run_are_noticed(tmp_path):
    path = tmp_path / "one.tar"

    def write(*names):
        with tarfile.open(path, "w") as archive:
            for name in names:
                add(archive, name, b"x" * 700)

    write("a.jpg", "b.jpg", "c.jpg")
    source = open_source(path)
    write("a.jpg", "c.jpg", "b.jpg")
    with pytest.raises(UserError, match=r"one\.tar: has changed since it was indexed"):
        list(source.run(0, 3, buffer=1, seed=0, epoch=0))


def test_what_cannot_be_shards(shards, tmp_path):
    def refused(path: object, format: str = "tar") -> str:
        with pytest.raises(UserError) as error:
            open_source(path, format)
        assert "\n" not in str(error.value)
        return str(error.value)

    half = tmp_path / "half.tar"
    half.write_bytes((shards / "train-0002.tar").read_bytes()[:5000])
    (tmp_path / "text.tar").write_text("no tar at all" * 100)
    with tarfile.open(tmp_path / "none.tar", "w") as archive:
        archive.add(half, "readme.txt")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(half, "a.jpg")
    with tarfile.open(tmp_path / "mixed.tar", "w") as archive:
        for name in ("a.jpg", "a.cls", "b.jpg"):
            add(archive, name, b"7")
    assert "half.tar: not readable as a plain tar" in refused(half)
    whole = (Path(shards) / "train-0000.tar").read_bytes()
    with tarfile.open(Path(shards) / "train-0000.tar") as tar:
        headers = [member.offset for member in tar.getmembers()]
    damaged = bytearray(whole)
    damaged[headers[2] + 148 : headers[2] + 156] = b"notasum!"
    for content in (whole[: headers[2]], whole[: headers[2] + 100], bytes(damaged)):  # to tarfile these are ends
        half.write_bytes(content)
        assert f"at byte {headers[2]:,} is neither a header nor the end" in refused(half)
    assert "text.tar: not readable as a plain tar" in refused(tmp_path / "text.tar")
    assert "packed.tar: not readable as a plain tar" in refused(tmp_path / "packed.tar")
    assert "no images in these shards" in refused(tmp_path / "none.tar")
    assert "b.jpg has no .cls while others have one" in refused(tmp_path / "mixed.tar")
    assert "train-0005.tar is not there" in refused(f"{shards}/train-{{0003..0005}}.tar")
    assert "absent.tar is not there" in refused(tmp_path / "absent.tar")


def test_the_missing_extra_is_named(shards, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(UserError, match=r"pip install 'loco_det\[webdataset\]'"):
        open_source(shards)


def test_a_probe_knows_shards_by_their_files(shards):
    """Cached features belong to these shards: the same digest again, another once a shard was written anew."""
    labels = np.zeros(IMAGES, np.int64)
    images = LabelledImages(open_source(shards), np.arange(IMAGES), labels)
    before = images_digest(images)
    assert images_digest(LabelledImages(open_source(shards), np.arange(IMAGES), labels)) == before
    path = shards / "train-0001.tar"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 5))
    assert images_digest(images) != before
