"""Views of whole batches against `views.py`, which makes them one by one with the same parameters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from view_cases import encode, photograph, two_views, view

from loco_det.images import batched_views
from loco_det.images.batched_views import Decoded, join_decoded, make_views, packed
from loco_det.images.views import ViewParams, decode_and_draw, view_config

NOTHING = ViewParams(crop=(0, 0, 0, 0), flip=False, jitter=(), gray=False, blur_sigma=0.0, solarize=False)
OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def changed(**changes: object) -> ViewParams:
    return ViewParams(**{**vars(NOTHING), **changes})


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch(images: list[np.ndarray], params: list[ViewParams]) -> Decoded:
    """Both views of an image have the same parameters."""
    return packed([(image, [p.crop] * 2, [p] * 2) for image, p in zip(images, params)], list(range(len(images))))


def assert_close(images: list[np.ndarray], params: list[ViewParams], size: int, levels: int, equal: float) -> None:
    """No value is further than `levels` from the one of `views.py`, and at least the share `equal` is the same."""
    decoded = batch(images, params)
    made = make_views(decoded, size)
    assert made.shape == (2, len(images), 3, size, size)
    assert made.dtype == torch.uint8
    assert made.is_contiguous()
    assert torch.equal(made[0], made[1])
    expected = np.stack([view(image, p, size) for image, p in zip(images, params)])
    difference = np.abs(made[0].permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert difference.max() <= levels, [params[k] for k in np.unique(np.nonzero(difference > levels)[0])]
    assert (difference == 0).mean() >= equal


@pytest.mark.parametrize(
    ("size", "low", "high"), [(32, 32, 33), (24, 30, 200), (96, 40, 240), (224, 180, 500), (1, 1, 5), (3, 1, 9)]
)
def test_crops_of_any_size_and_flips(size: int, low: int, high: int) -> None:
    """Enlarged, shrunk, one of both, up to the image's borders, of images that are not alike in size."""
    rng = np.random.default_rng(size)
    images, params = [], []
    for k in range(12):
        height, width = rng.integers(low, high, 2)
        h, w = (height, width) if k == 0 else (rng.integers(1, height + 1), rng.integers(1, width + 1))
        top, left = ((height - h) * (k % 3) // 2, (width - w) * (k // 3 % 3) // 2)
        images.append(noise(height, width, k))
        params.append(changed(crop=(int(top), int(left), int(h), int(w)), flip=k % 2 == 1))
    assert_close(images, params, size, levels=1, equal=0.9999)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_colour_operations(operation: str) -> None:
    factors = np.linspace(-0.5, 0.5, 41) if operation == "hue" else np.linspace(0, 2, 41)
    images = [noise(40, 40, k) if k % 2 else photograph(40, 40, k) for k in range(len(factors))]
    params = [changed(crop=(0, 0, 40, 40), jitter=((operation, float(factor)),)) for factor in factors]
    assert_close(images, params, 40, levels=1, equal=0.9999)


def test_grey_and_solarize() -> None:
    whole = {"crop": (0, 0, 48, 48)}
    params = [changed(**whole, gray=True), changed(**whole, solarize=True), changed(**whole, gray=True, solarize=True)]
    assert_close([noise(48, 48, k) for k in range(3)], params, 48, levels=0, equal=1)


@pytest.mark.parametrize("size", [1, 2, 4, 40])
def test_blur_reaches_over_the_border_of_small_views(size: int) -> None:
    sigmas = [0.1, 0.3, 0.33, 0.34, 0.9, 1.0, 1.3, 2.0, 4.5]
    images = [noise(size, size, k) for k in range(len(sigmas))] + [np.full((size, size, 3), 255, np.uint8)]
    params = [changed(crop=(0, 0, size, size), blur_sigma=sigma) for sigma in [*sigmas, 2.0]]
    assert_close(images, params, size, levels=1, equal=0.97)


def test_every_order_of_the_colour_operations() -> None:
    rng, orders = np.random.default_rng(0), list(itertools.permutations(OPERATIONS))
    images, params = [], []
    for k, order in enumerate(orders * 2):
        factors = {name: rng.uniform(-0.2, 0.2) if name == "hue" else rng.uniform(0.2, 1.8) for name in order}
        present = order if k < len(orders) else order[: k % 4]  # strengths of 0 leave operations out
        images.append(photograph(50, 60, k))
        params.append(changed(crop=(3, 5, 40, 50), jitter=tuple((name, float(factors[name])) for name in present)))
    assert_close(images, params, 32, levels=2, equal=0.999)


REAL = [
    (32, "JPEG", 160, (32, 33)),
    (64, "PNG", 30, (40, 200)),
    (224, "JPEG", 10, (240, 641)),  # decoded at a half and a quarter too
    (224, "PNG", 6, (200, 641)),
]


def drawn(size: int, kind: str, count: int, sides: tuple[int, int]) -> tuple[list[bytes], Decoded]:
    rng = np.random.default_rng(size)
    images = [(noise if k % 3 == 0 else photograph)(*rng.integers(*sides, 2), k) for k in range(count)]
    files = [encode(image, kind) for image in images]
    config = view_config(size, {"SOLARIZE_PROB": 0.2})
    made = [decode_and_draw(data, "x", config, 5, 3, 100 + k) for k, data in enumerate(files)]
    return files, packed(made, list(range(count)))


@pytest.mark.parametrize(("size", "kind", "count", "sides"), REAL)
def test_drawn_views_are_those_of_one_image_at_a_time(size: int, kind: str, count: int, sides: tuple[int, int]) -> None:
    """The same draws, and at most 2 levels after all operations; all but the blur mostly agree to the bit."""
    files, decoded = drawn(size, kind, count, sides)
    made = make_views(decoded, size).permute(0, 1, 3, 4, 2).numpy().astype(int)
    config = view_config(size, {"SOLARIZE_PROB": 0.2})
    expected = np.stack([two_views(data, "x", config, 5, 3, 100 + k) for k, data in enumerate(files)], 1)
    difference = np.abs(made - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.015
    blurred = decoded.params[:, :, batched_views._SIGMA].numpy() > 0
    assert 0 < blurred.mean() < 1
    assert (difference[~blurred] > 0).mean() < 1e-4


def test_a_view_does_not_depend_on_the_batch_it_is_made_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: alone, in another order, beside a larger image, and with few images' floats at a time."""
    _, decoded = drawn(48, "PNG", 16, (40, 120))
    whole = make_views(decoded, 48)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(make_views(chosen(decoded, order), 48), whole[:, order])
    for k in (0, 7):
        assert torch.equal(make_views(chosen(decoded, [k]), 48)[:, 0], whole[:, k])
    larger = batch([noise(400, 300)], [changed(crop=(0, 0, 400, 300))])
    assert torch.equal(make_views(join_decoded([larger, decoded], pin=False), 48)[:, 1:], whole)
    monkeypatch.setattr(batched_views, "_AT_ONCE", 3 * 120 * 120 * 5)
    assert torch.equal(make_views(decoded, 48), whole)


def chosen(decoded: Decoded, images: list[int]) -> Decoded:
    """Of these images alone, in this order."""
    parts = decoded.pixels.split(decoded.sides.prod(1).tolist())
    pixels = torch.cat([parts[k] for k in images])
    return Decoded(pixels, decoded.sides[images], decoded.params[:, images], decoded.index[images])


def test_a_large_image_costs_its_own_bytes() -> None:
    images = [noise(30, 40, k) for k in range(20)] + [noise(900, 50)]
    decoded = batch(images, [changed(crop=(0, 0, 30, 40))] * 21)
    assert decoded.pixels.numel() == 20 * 30 * 40 * 3 + 900 * 50 * 3
    joined = join_decoded([decoded, chosen(decoded, [3])], pin=False)
    assert joined.pixels.numel() == 21 * 30 * 40 * 3 + 900 * 50 * 3


def test_crops_are_padded_to_others_of_about_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is multiplied is a little more than what the crops hold, and at most so much at a time."""
    rng = np.random.default_rng(0)
    sides = [(int(h), int(h * rng.uniform(0.8, 1.2))) for h in rng.integers(20, 200, 60)] + [(900, 800)]
    params = [changed(crop=(2, 1, h, w)) for h, w in sides]
    decoded = batch([noise(h + 5, w + 9, k) for k, (h, w) in enumerate(sides)], params)
    most = 3 * 200 * 240 * 4
    monkeypatch.setattr(batched_views, "_AT_ONCE", most)
    cut, sizes = batched_views._cut, []
    monkeypatch.setattr(batched_views, "_cut", lambda *args: sizes.append((x := cut(*args)).numel()) or x)
    make_views(decoded, 16)
    assert sorted(sizes)[-2:] == [3 * 900 * 800] * 2  # a crop that is too large comes alone
    assert max(sorted(sizes)[:-2]) <= most
    assert len(sizes) < 60
    own = 2 * 3 * sum(h * w for h, w in sides)
    assert own < sum(sizes) < 1.5 * own


def test_sums_are_exact_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision every product is the same whole number, so no order of summation can matter."""
    product, largest = torch.bmm, []

    def in_double(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        exact, found = product(a.double(), b.double()), product(a, b)
        assert torch.equal(found.double(), exact)
        largest.append(float(exact.max()))
        return found

    monkeypatch.setattr(torch, "bmm", in_double)
    for size, low, high in ((224, 100, 640), (8, 300, 640)):
        params = [changed(crop=(0, 0, low, low), blur_sigma=2.0), changed(crop=(0, 0, high, high), blur_sigma=5.0)]
        decoded = batch([np.full((high, high, 3), 255, np.uint8), noise(high, high)], params)
        make_views(decoded, size)
    assert len(largest) == 2 * 2 + 2 + 2 * 1 + 2
    assert 2**20 < max(largest) < 2**24


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class Literals(TorchFunctionMode):
    """Calls that make a tensor on a device of numbers in Python; a list as an index is one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        index = args[1] if getattr(function, "__name__", "") in ("__getitem__", "__setitem__") else ()
        parts = index if isinstance(index, tuple) else (index,)
        made = function in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None
        if made or any(isinstance(part, (list, np.ndarray)) for part in parts):
            self.found.append((function, index))
        return function(*args, **(kwargs or {}))


def test_the_host_asks_nothing_of_the_device_and_does_not_wait_to_tell_it_something() -> None:
    """A value or a number of elements would make it wait for all that the device has still to do, and so would numbers
    that come from no pinned memory."""
    _, decoded = drawn(32, "PNG", 16, (20, 60))
    decoded = decoded._replace(pixels=decoded.pixels.to("meta"))  # a device of which nothing can be asked
    make_views(decoded, 32)  # constants are kept
    with Calls() as calls, Literals() as literals:
        made = make_views(decoded, 32)
    assert (made.device.type, made.shape) == ("meta", (2, 16, 3, 32, 32))
    assert "bmm" in calls.names
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "unique"} & set(calls.names)
    assert not literals.found


@pytest.mark.cuda
def test_a_gpu_s_host_never_waits() -> None:
    _, decoded = drawn(32, "PNG", 16, (20, 60))
    there = decoded._replace(pixels=decoded.pixels.cuda())
    make_views(there, 32)  # constants are kept
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_views(there, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_parts_are_joined_to_what_one_worker_would_have_made() -> None:
    _, decoded = drawn(32, "PNG", 9, (20, 60))
    parts = [chosen(decoded, list(range(a, b))) for a, b in ((0, 4), (4, 9))]
    joined = join_decoded(parts, pin=False)
    assert all(torch.equal(part, whole) for part, whole in zip(joined, decoded, strict=True))
