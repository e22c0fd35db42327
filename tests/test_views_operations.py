"""Each augmentation against torchvision's functional with the same parameters; the bounds are part of the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F
from view_cases import encode, photograph, view

from loco_det.images import views
from loco_det.images.decode import decode_image
from loco_det.images.views import ViewParams, crop_resize, normalise

SIZE = 96


def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    corners = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.uint8)
    return {
        "photograph": photograph(SIZE, SIZE),
        "noise": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        "extreme colours": np.tile(corners.reshape(2, 4, 3), (SIZE // 2, SIZE // 4, 1)),
        "black": np.zeros((SIZE, SIZE, 3), np.uint8),
        "white": np.full((SIZE, SIZE, 3), 255, np.uint8),
    }


def planes(image: np.ndarray) -> torch.Tensor:
    return torch.tensor(image).permute(2, 0, 1).contiguous()


def differences(image: np.ndarray, reference: torch.Tensor) -> np.ndarray:
    assert image.dtype == np.uint8
    reference = reference.permute(1, 2, 0).numpy()
    assert image.shape == reference.shape
    return np.abs(image.astype(int) - reference)


# operation: (torchvision's, factors, largest difference in levels of 255)
POINTWISE = {
    "brightness": (F.adjust_brightness, (0.0, 0.2, 0.63, 1.0, 1.37, 1.8), 1),
    "contrast": (F.adjust_contrast, (0.0, 0.2, 0.63, 1.0, 1.37, 1.8), 1),
    "saturation": (F.adjust_saturation, (0.0, 0.2, 0.63, 1.0, 1.37, 1.8), 1),
    "hue": (F.adjust_hue, (-0.5, -0.2, -0.07, 0.0, 0.01, 0.1, 0.2, 0.5), 1),
}


@pytest.mark.parametrize("picture", pictures())
@pytest.mark.parametrize("operation", POINTWISE)
def test_colour_operations(operation, picture):
    reference, factors, bound = POINTWISE[operation]
    image = pictures()[picture]
    for factor in factors:
        before = image.copy()
        ours = getattr(views, operation)(image, factor)
        np.testing.assert_array_equal(image, before)  # the decoded image serves two views
        worst = differences(ours, reference(planes(image), factor)).max()
        assert worst <= bound, f"{operation} {factor}: {worst}"


@pytest.mark.parametrize("operation", POINTWISE)
def test_colour_operations_do_not_drift(operation):
    """Single levels off, but in both directions: several in a row must not darken or brighten."""
    reference, factors, _ = POINTWISE[operation]
    image = pictures()["photograph"]
    for factor in factors:
        ours = getattr(views, operation)(image, factor).astype(float)
        theirs = reference(planes(image), factor).permute(1, 2, 0).numpy()
        assert abs((ours - theirs).mean()) < (1.01 if factor == 0 else 0.1)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.51, 2.0])
@pytest.mark.parametrize("picture", ["photograph", "noise", "extreme colours", "white"])
def test_blur(picture, sigma):
    image = pictures()[picture]
    assert differences(views.blur(image, sigma), F.gaussian_blur(planes(image), [23, 23], [sigma, sigma])).max() <= 1


def test_blur_of_images_smaller_than_its_kernel():
    for side in (1, 2, 5):
        image = photograph(side, side)
        assert views.blur(image, 2.0).shape == image.shape


def test_solarize_and_flip_are_exact():
    for image in pictures().values():
        assert differences(views.solarize(image), F.solarize(planes(image), 128)).max() == 0
    image = pictures()["photograph"]
    params = ViewParams((0, 0, SIZE, SIZE), True, (), False, 0.0, False)
    assert differences(view(image, params, SIZE), F.horizontal_flip(planes(image))).max() == 0


@pytest.mark.parametrize("picture", pictures())
def test_grey(picture):
    image = pictures()[picture]
    params = ViewParams((0, 0, SIZE, SIZE), False, (), True, 0.0, False)
    assert differences(view(image, params, SIZE), F.rgb_to_grayscale(planes(image), 3)).max() <= 1


CROPS = [
    (0, 0, 300, 400),
    (13, 57, 211, 190),
    (5, 3, 60, 50),
    (0, 0, 96, 96),
    (10, 20, 40, 250),
    (299, 0, 1, 400),
    (7, 7, 1, 1),
]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("noisy", [False, True])
def test_crop_and_resize(crop, noisy):
    image = photograph(300, 400)
    if noisy:  # where a filter that does not average is far off
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    top, left, height, width = crop
    expected = F.resized_crop(planes(image), top, left, height, width, [SIZE, SIZE], antialias=True)
    assert differences(crop_resize(image.copy(), crop, SIZE), expected).max() <= 1


def reference_view(image: np.ndarray, params: ViewParams, size: int) -> torch.Tensor:
    result = F.resized_crop(planes(image), *params.crop, [size, size], antialias=True)
    result = F.horizontal_flip(result) if params.flip else result
    for operation, factor in params.jitter:
        result = POINTWISE[operation][0](result, factor)
    result = F.rgb_to_grayscale(result, 3) if params.gray else result
    result = F.gaussian_blur(result, [23, 23], [params.blur_sigma] * 2) if params.blur_sigma else result
    return F.solarize(result, 128) if params.solarize else result


def test_whole_chain():
    """Every operation at once: single levels add up and contrast magnifies them, but on average little is left."""
    image = photograph(300, 400)
    config = views.view_config(SIZE, {"SOLARIZE_PROB": 0.0})
    differing = []
    for index in range(60):
        params = views.draw_view(config, 300, 400, views.view_draws(7, 0, index)[0])
        difference = differences(view(image, params, SIZE), reference_view(image, params, SIZE))
        differing.append(difference.mean())
        assert difference.mean() < 3
        assert np.quantile(difference, 0.999) <= 8
    assert np.mean(differing) < 1.2


def test_solarize_and_blur_on_grey_follow_the_same_order_as_on_colour():
    image = photograph(120, 120)
    params = ViewParams((4, 6, 100, 110), True, (("brightness", 1.2),), True, 1.3, True)
    difference = differences(view(image, params, SIZE), reference_view(image, params, SIZE))
    # A level across the threshold is inverted in one and not in the other; both are then near 128.
    assert np.quantile(difference, 0.99) <= 3


@pytest.mark.parametrize("factor", [2, 4])
def test_coarse_decoding_changes_views_little(factor):
    image = photograph(1200, 1600)
    data = encode(image)
    params = ViewParams((40, 60, 1000, 1100), False, (), False, 0.0, False)
    whole = view(decode_image(data, "x"), params, 224)
    coarse = view(decode_image(data, "x", reduce=factor), params, 224, factor)
    difference = np.abs(whole.astype(int) - coarse)
    assert difference.mean() < 2.5
    assert difference.mean() < 0.2 * np.abs(whole.astype(int) - np.roll(whole, 3, 1)).mean()  # in place


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def test_normalise_equals_torchvision(device):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    expected = F.normalize(
        F.to_dtype(images, torch.float32, scale=True), [m / 255 for m in mean], [s / 255 for s in std]
    )
    ours = normalise(images.to(device), mean, std)
    assert ours.dtype == torch.float32
    assert ours.device.type == device
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_normalise_gives_the_layout_that_was_asked_for(device):
    """The same numbers; on the device that is no CPU nothing but shapes is computed."""
    images = torch.randint(0, 256, (3, 3, 6, 5), dtype=torch.uint8, device=device)
    plain, last = (
        normalise(images, (100, 110, 120), (50, 60, 70), layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    )
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert last.shape == plain.shape == images.shape
    assert device == "meta" or torch.equal(plain, last)


@pytest.mark.parametrize("shift", [-0.5, -0.31, -0.2, -1 / 12, -0.01, 1 / 12, 0.1, 1 / 6, 0.2, 0.25, 0.43])
def test_hue_of_every_fifth_colour(shift):
    """Every sextant, its borders and all greys, against torchvision and against colorsys in float64."""
    import colorsys

    levels = np.arange(0, 256, 5, dtype=np.uint8)
    image = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 52, 3)
    ours = views.hue(image, shift)
    assert differences(ours, F.adjust_hue(planes(image), shift)).max() <= 1
    for pixel, turned in zip(image.reshape(-1, 3)[::997], ours.reshape(-1, 3)[::997]):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255.0))
        exact = 255 * np.array(colorsys.hsv_to_rgb((h + shift) % 1.0, s, v))
        assert np.abs(turned - exact).max() <= 0.5 + 1e-9  # rounded, no more
