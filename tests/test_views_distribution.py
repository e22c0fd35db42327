"""What is drawn is torchvision's distribution: number by number where both draw the same, and in the mass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from view_cases import encode, photograph, two_views, view

from loco_det.core.errors import UserError
from loco_det.images import decode, views
from loco_det.images.decode import decode_image
from loco_det.images.views import ViewConfig, ViewParams, draw_view, reduction, view_config, view_draws

SIMCLR = view_config(224, {"PRESET": "simclr"})


def make_params(transform: v2.Transform, image: torch.Tensor) -> dict:
    """What `transform` draws for the image; torchvision before 0.21 keeps the method private."""
    return (getattr(transform, "make_params", None) or transform._get_params)([image])


def params_of(config: ViewConfig, height: int, width: int, count: int, seed: int = 0) -> list[ViewParams]:
    return [draw_view(config, height, width, view_draws(seed, 0, index)[0]) for index in range(count)]


# --- number by number -------------------------------------------------------------------------------------------


@pytest.fixture
def feed(monkeypatch):
    """Make torchvision take its random numbers from a list of uniform ones, in float64."""
    source: list[float] = []

    def uniform_(tensor, low=0.0, high=1.0):
        return tensor.fill_(low + (high - low) * source.pop(0))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    monkeypatch.setattr(
        torch, "randint", lambda low, high, size: torch.tensor([low + int(source.pop(0) * (high - low))])
    )
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(np.argsort([source.pop(0) for _ in range(n)])))
    torch.set_default_dtype(torch.float64)
    yield source
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (427, 640), (640, 200), (33, 31), (20, 400), (900, 7)])
@pytest.mark.parametrize("preset", views.PRESETS)
def test_same_numbers_give_the_same_crop_and_colours(preset, height, width, feed):
    config = view_config(224, {"PRESET": preset})
    crop = v2.RandomResizedCrop(224, scale=config.crop_scale)
    jitter = v2.ColorJitter(*config.jitter)
    image = torch.zeros(3, height, width)
    for index in range(200):
        draws = list(view_draws(1, 2, index)[0])
        used = iter(draws)
        ours = views._draw_crop(config.crop_scale, height, width, used)
        count = len(draws) - len(list(used))
        feed[:] = draws
        theirs = make_params(crop, image)
        assert ours == (theirs["top"], theirs["left"], theirs["height"], theirs["width"])
        assert len(feed) == len(draws) - count  # and after as many draws

        feed[:] = draws
        theirs = make_params(jitter, image)
        ours = views._draw_jitter(config.jitter, iter(draws))
        assert [name for name, _ in ours] == [
            ("brightness", "contrast", "saturation", "hue")[i] for i in theirs["fn_idx"].tolist()
        ]
        for name, factor in ours:
            assert factor == pytest.approx(theirs[f"{name}_factor"], abs=1e-12)


def test_same_numbers_give_the_same_blur(feed):
    blur = v2.GaussianBlur(23, SIMCLR.blur_sigma)
    for index in range(200):
        number = next(view_draws(1, 2, index)[0])
        feed[:] = [number]
        theirs = make_params(blur, torch.zeros(3, 9, 9))["sigma"]
        assert theirs == pytest.approx([views._between(*SIMCLR.blur_sigma, iter([number]))] * 2, abs=1e-12)


@pytest.mark.parametrize("key", ["flip_prob", "jitter_prob", "gray_prob", "blur_prob", "solarize_prob"])
def test_an_operation_is_applied_to_its_share_independently_of_the_others(key):
    """Every one of the five against its probability, and given each of the others."""
    config = view_config(224, {"SOLARIZE_PROB": 0.3})
    drawn = params_of(config, 427, 640, 4000)
    done = {
        "flip_prob": [p.flip for p in drawn],
        "jitter_prob": [bool(p.jitter) for p in drawn],
        "gray_prob": [p.gray for p in drawn],
        "blur_prob": [p.blur_sigma > 0 for p in drawn],
        "solarize_prob": [p.solarize for p in drawn],
    }
    mine, share = np.array(done.pop(key)), getattr(config, key)
    for part in [np.ones(4000, bool), *(np.array(other) for other in done.values())]:
        assert abs(mine[part].mean() - share) < 4.5 * math.sqrt(share * (1 - share) / part.sum())


def test_crops_lie_inside_any_image():
    for height, width in [(1, 1), (1, 500), (500, 1), (2, 3), (37, 1000), (3000, 40)]:
        for params in params_of(SIMCLR, height, width, 50):
            top, left, h, w = params.crop
            assert h >= 1
            assert w >= 1
            assert 0 <= top <= height - h
            assert 0 <= left <= width - w


def test_strong_jitter_keeps_to_torchvisions_factors():
    """A strength above 1 does not make factors negative."""
    limits = v2.ColorJitter(1.5, 2.0, 1.2, 0.3)
    config = view_config(32, {"JITTER": [1.5, 2.0, 1.2, 0.3], "JITTER_PROB": 1.0})
    drawn = [dict(params.jitter) for params in params_of(config, 50, 60, 400)]
    for name in ("brightness", "contrast", "saturation", "hue"):
        low, high = getattr(limits, name)
        factors = [factor[name] for factor in drawn]
        assert low <= min(factors) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(factors) <= high


def test_the_numbers_of_a_view_are_enough_for_the_longest_draw():
    taken = 0

    def draws():
        """Crops of nearly the whole area, which no 20 x 400 image has room for, and a small one at the last attempt."""
        nonlocal taken
        for number in [0.99, 0.5] * 9 + [0.0] * 40:
            taken += 1
            yield number

    everything = {f"{name}_PROB": 1.0 for name in ("FLIP", "JITTER", "GRAY", "BLUR", "SOLARIZE")}
    params = draw_view(view_config(32, {**everything, "CROP_SCALE": [0.01, 1.0]}), 20, 400, draws())
    assert params.crop[2] < 20  # not the fallback, which takes no numbers for its place
    own, other = view_draws(0, 0, 0)
    assert taken <= len(list(own)) == len(list(other))


# --- in the mass ------------------------------------------------------------------------------------------------


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic, in units of its critical value at a level of 1e-5."""
    both = np.sort(np.concatenate([a, b]))
    gap = np.abs(
        np.searchsorted(np.sort(a), both, "right") / len(a) - np.searchsorted(np.sort(b), both, "right") / len(b)
    ).max()
    critical = math.sqrt(-math.log(1e-5 / 2) / 2) * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))
    return gap / critical


def torchvision_params(config: ViewConfig, height: int, width: int, count: int) -> list[ViewParams]:
    crop, jitter = v2.RandomResizedCrop(224, scale=config.crop_scale), v2.ColorJitter(*config.jitter)
    blur, image = v2.GaussianBlur(23, config.blur_sigma), torch.zeros(3, height, width)
    drawn = []
    for _ in range(count):
        box, colour = make_params(crop, image), make_params(jitter, image)
        names = [("brightness", "contrast", "saturation", "hue")[i] for i in colour["fn_idx"].tolist()]
        drawn.append(
            ViewParams(
                (box["top"], box["left"], box["height"], box["width"]),
                bool(torch.rand(1) < config.flip_prob),
                tuple((n, colour[f"{n}_factor"]) for n in names) if torch.rand(1) < config.jitter_prob else (),
                bool(torch.rand(1) < config.gray_prob),
                make_params(blur, image)["sigma"][0] if torch.rand(1) < config.blur_prob else 0.0,
                False,
            )
        )
    return drawn


def features(drawn: list[ViewParams], height: int, width: int) -> dict[str, np.ndarray]:
    rows = []
    for p in drawn:
        top, left, h, w = p.crop
        factor = dict(p.jitter) or dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 9.0)
        first = ("brightness", "contrast", "saturation", "hue", "none").index(p.jitter[0][0] if p.jitter else "none")
        row = {"area": h * w / (height * width), "shape": w / h, "top": top, "left": left, "first": first}
        row |= {"right": left + w, "flip": p.flip, "gray": p.gray, "sigma": p.blur_sigma, **factor}
        # Products see what single parameters do not: dependence between them.
        row["area x brightness"] = row["area"] * factor["brightness"]
        row["hue x saturation"] = factor["hue"] * factor["saturation"]
        row["shape x sigma"] = row["shape"] * p.blur_sigma
        row["flip x gray x left"] = p.flip * (1 + p.gray) * (1 + left)
        rows.append(row)
    return {name: np.array([row[name] for row in rows], float) for name in rows[0]}


@pytest.mark.parametrize("preset", views.PRESETS)
def test_joint_distribution_of_the_parameters(preset):
    torch.manual_seed(0)
    config = view_config(224, {"PRESET": preset})
    ours = features(params_of(config, 427, 640, 4000), 427, 640)
    theirs = features(torchvision_params(config, 427, 640, 4000), 427, 640)
    far = {name: ks_distance(ours[name], theirs[name]) for name in ours}
    assert max(far.values()) < 1, far


def test_the_test_notices_a_wrong_distribution():
    torch.manual_seed(0)
    theirs = features(torchvision_params(SIMCLR, 427, 640, 4000), 427, 640)
    wrong = features(params_of(view_config(224, {"PRESET": "mocov2"}), 427, 640, 4000), 427, 640)
    far = {name for name in theirs if ks_distance(wrong[name], theirs[name]) > 1}
    assert {"area", "brightness", "contrast", "saturation", "hue"} <= far


def test_distribution_of_the_pixels():
    """Statistics of whole views, ours against torchvision's transform of the same image."""
    torch.manual_seed(0)
    image, size, count = photograph(150, 200), 48, 500
    reference = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
        ]
    )
    planes = torch.tensor(image).permute(2, 0, 1).contiguous()
    theirs = np.stack([reference(planes).permute(1, 2, 0).numpy() for _ in range(count)]).astype(float)
    config = view_config(size, {})
    ours = np.stack([view(image, params, size) for params in params_of(config, 150, 200, count)]).astype(float)

    def statistics(batch: np.ndarray) -> dict[str, np.ndarray]:
        colour = batch.mean((1, 2))
        return {
            "brightness": colour.mean(1),
            "contrast": batch.mean(3).std((1, 2)),
            "red - blue": colour[:, 0] - colour[:, 2],
            "green - blue": colour[:, 1] - colour[:, 2],
            "sharpness": np.abs(np.diff(batch, axis=2)).mean((1, 2, 3)),
            "left - right": (batch[:, :, :24] - batch[:, :, 24:]).mean((1, 2, 3)),
        }

    a, b = statistics(ours), statistics(theirs)
    far = {name: ks_distance(a[name], b[name]) for name in a}
    assert max(far.values()) < 1, far


# --- reproducible, and decoded once -----------------------------------------------------------------------------


def test_views_depend_on_nothing_but_their_four_numbers():
    data = encode(photograph(90, 120))
    config = view_config(32, {})
    first = two_views(data, "x", config, 3, 4, 5)
    np.random.default_rng().random()
    torch.rand(3)
    for again, before in zip(two_views(data, "x", config, 3, 4, 5), first):
        np.testing.assert_array_equal(again, before)
    assert (first[0] != first[1]).any()
    for other in ((4, 4, 5), (3, 5, 5), (3, 4, 6)):
        assert (two_views(data, "x", config, *other)[0] != first[0]).any()


def test_streams_do_not_overlap():
    keys = [(s, e, i) for s in (0, 1, -1, 2**63) for e in (0, 1) for i in (0, 1, 2**40, 2**63)]
    numbers = [draw for key in keys for draws in view_draws(*key) for draw in draws]
    assert len(set(numbers)) == len(numbers)


def test_reduction_keeps_enough_pixels_for_both_crops():
    def pair(a, b):
        return [ViewParams((0, 0, *size), False, (), False, 0.0, False) for size in (a, b)]

    assert reduction(pair((1800, 1800), (2000, 1792)), 224) == 8
    assert reduction(pair((1800, 1800), (2000, 1791)), 224) == 4
    assert reduction(pair((1800, 1800), (500, 448)), 224) == 2
    assert reduction(pair((1800, 1800), (500, 447)), 224) == 1
    assert reduction(pair((1792, 1900), (1791, 2000)), 224) == 4  # either side may be the short one
    assert reduction(pair((2, 2), (2000, 2000)), 224) == 1


def test_a_crop_of_a_coarse_image_lies_in_it_and_at_most_a_pixel_off():
    rng = np.random.default_rng(0)
    for factor in (1, 2, 4, 8):
        for _ in range(500):
            height, width = rng.integers(8, 100, 2).tolist()
            h, w = (int(rng.integers(8, side + 1)) for side in (height, width))
            # At the far border half of the time, where the last coarse pixel may be less than a whole one.
            at_border = rng.random() < 0.5
            top, left = (
                (height - h, width - w) if at_border else (rng.integers(height - h + 1), rng.integers(width - w + 1))
            )
            coarse = -(-height // factor), -(-width // factor)
            found = views._reduced((int(top), int(left), h, w), factor, coarse)
            assert 0 <= found[0] <= coarse[0] - found[2]
            assert 0 <= found[1] <= coarse[1] - found[3]
            assert np.abs(np.array(found) - np.array([top, left, h, w]) / factor).max() <= 1


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_coarse_and_whole_decoding_give_the_same_views(orientation, monkeypatch):
    from PIL import Image

    exif = Image.Exif()
    exif[274] = orientation
    data = encode(photograph(601, 903), exif=exif)
    config = view_config(64, {"CROP_SCALE": (0.5, 1.0), "JITTER_PROB": 0.0})
    reductions = []

    def spy(data, name, order="RGB", reduce=1):
        reductions.append(reduce)
        return decode_image(data, name, order, reduce)

    monkeypatch.setattr(views, "decode_image", spy)
    coarse = [two_views(data, "x", config, 0, 0, index) for index in range(8)]
    assert max(reductions) >= 4
    assert orientation > 4 or min(reductions) >= 2  # turned ones may need a second look
    assert reductions.count(1) < 4  # but most do not
    monkeypatch.setattr(views, "reduction", lambda pair, size: 1)
    whole = [two_views(data, "x", config, 0, 0, index) for index in range(8)]
    assert np.abs(np.array(coarse, float) - np.array(whole)).mean() < 4.5


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_that_opencv_leaves_to_pil_has_the_views_of_the_whole_image(orientation, monkeypatch):
    """PIL does not reduce, so what was drawn ahead for a coarse image does not hold."""
    from PIL import Image

    exif = Image.Exif()
    exif[274] = orientation
    data = encode(photograph(300, 500), exif=exif)
    config = view_config(32, {"CROP_SCALE": (0.5, 1.0)})
    monkeypatch.setattr(decode, "_cv2_pixels", lambda *_: None)
    upright = decode_image(data, "x")
    assert upright.shape[:2] == ((300, 500) if orientation == 1 else (500, 300))
    for index in range(4):
        pair = [draw_view(config, *upright.shape[:2], draws) for draws in view_draws(0, 0, index)]
        for found, params in zip(two_views(data, "x", config, 0, 0, index), pair, strict=True):
            np.testing.assert_array_equal(found, view(upright, params, 32))


def test_an_image_that_exif_turns_is_decoded_finer_where_its_crops_need_it(monkeypatch):
    """The crops drawn for the stored shape may allow what those for the upright one do not."""
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    data = encode(photograph(300, 600), exif=exif)
    config = view_config(64, {"CROP_SCALE": (0.3, 1.0), "JITTER_PROB": 0.0, "GRAY_PROB": 0.0, "BLUR_PROB": 0.0})
    upright = decode_image(data, "x")
    for index in range(200):
        pair = [draw_view(config, 600, 300, draws) for draws in view_draws(0, 0, index)]
        stored = [draw_view(config, 300, 600, draws) for draws in view_draws(0, 0, index)]
        if reduction(pair, 64) < reduction(stored, 64):
            for found, params in zip(two_views(data, "x", config, 0, 0, index), pair):
                np.testing.assert_array_equal(found, view(upright, params, 64))
            break
    else:
        pytest.fail("no such pair was drawn")


def test_every_kind_of_file_has_views():
    for data in (
        encode(photograph(40, 50), "PNG"),
        encode(photograph(40, 50), "WEBP"),
        encode(photograph(1, 1), "PNG"),
    ):
        assert two_views(data, "x", view_config(32, {"SOLARIZE_PROB": 0.5}), 0, 0, 0).std() > 0


# --- configuration ----------------------------------------------------------------------------------------------


def test_unset_keys_take_the_presets_values():
    unset = {"CROP_SCALE": [], "FLIP_PROB": -1.0, "JITTER": None, "BLUR_SIGMA": (), "PRESET": "mocov2"}
    assert view_config(224, unset) == view_config(224, {"PRESET": "mocov2"})
    assert view_config(224, {}).crop_scale == (0.08, 1.0)
    given = view_config(96, {"PRESET": "mocov2", "CROP_SCALE": [0.5, 0.9], "BLUR_PROB": 0.0, "SOLARIZE_PROB": 1})
    assert (given.size, given.crop_scale, given.blur_prob, given.solarize_prob) == (96, (0.5, 0.9), 0.0, 1.0)
    assert given.jitter == (0.4, 0.4, 0.4, 0.1)


def test_presets_are_those_of_the_papers():
    shared = (0.5, 0.8, 0.2, 0.5, (0.1, 2.0), 0.0)
    for preset, crop_scale, jitter in (
        ("simclr", (0.08, 1.0), (0.8, 0.8, 0.8, 0.2)),
        ("mocov2", (0.2, 1.0), (0.4, 0.4, 0.4, 0.1)),
    ):
        found = view_config(224, {"PRESET": preset})
        assert (found.crop_scale, found.jitter) == (crop_scale, jitter)
        rest = (found.flip_prob, found.jitter_prob, found.gray_prob, found.blur_prob, found.blur_sigma)
        assert (*rest, found.solarize_prob) == shared


def test_probabilities_of_zero_and_one():
    off = {f"{name}_PROB": 0.0 for name in ("FLIP", "JITTER", "GRAY", "BLUR", "SOLARIZE")}
    for params in params_of(view_config(32, off), 50, 60, 50):
        assert (params.flip, params.jitter, params.gray, params.blur_sigma, params.solarize) == (
            False,
            (),
            False,
            0,
            False,
        )
    on = dict.fromkeys(off, 1.0)
    for params in params_of(view_config(32, {**on, "JITTER": [0.4, 0, 0, 0.1]}), 50, 60, 50):
        assert (params.flip, params.gray, params.solarize) == (True, True, True)
        assert 0.1 <= params.blur_sigma <= 2.0
        assert sorted(name for name, _ in params.jitter) == ["brightness", "hue"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("PRESET", "byol2"),
        ("CROPSCALE", [0.1, 1]),
        ("CROP_SCALE", [0.5, 0.2]),
        ("CROP_SCALE", [0.0, 1.0]),
        ("CROP_SCALE", [0.2, 1.5]),
        ("CROP_SCALE", 0.2),
        ("FLIP_PROB", 1.5),
        ("GRAY_PROB", -0.5),
        ("BLUR_PROB", "often"),
        ("JITTER", [0.8, 0.8, 0.8]),
        ("JITTER", [0.8, 0.8, 0.8, 0.6]),
        ("JITTER", [-0.8, 0.8, 0.8, 0.1]),
        ("BLUR_SIGMA", [2.0, 0.1]),
    ],
)
def test_unusable_keys_are_named(key, value):
    with pytest.raises(UserError, match=rf"^AUGMENT\.{key} "):
        view_config(224, {key: value})


def test_unusable_size_is_named():
    with pytest.raises(UserError, match=r"DATA\.IMAGE_SIZE"):
        view_config(0, {})
