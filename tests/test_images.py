"""Every kind of image file has one stated treatment, in both readers."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from loco_det.core.errors import UserError
from loco_det.images import decode
from loco_det.images.decode import decode_image, jpeg_size, read_image

HEIGHT, WIDTH = 37, 53


def smooth_rgb(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], 2).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def jpeg(**options) -> bytes:
    return encode(Image.fromarray(smooth_rgb()), "JPEG", quality=95, **options)


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(smooth_rgb()).quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def with_alpha() -> Image.Image:
    return Image.fromarray(np.dstack([smooth_rgb(), np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))]))


KINDS = {
    "jpeg": jpeg,
    "progressive": lambda: jpeg(progressive=True),
    "subsampled": lambda: jpeg(subsampling=2),
    "grey jpeg": lambda: encode(Image.fromarray(smooth_rgb()).convert("L"), "JPEG"),
    "cmyk jpeg": lambda: encode(Image.fromarray(smooth_rgb()).convert("CMYK"), "JPEG"),
    "rotated jpeg": lambda: jpeg(exif=exif(6)),
    "grey png": lambda: encode(Image.fromarray(smooth_rgb()).convert("L"), "PNG"),
    "bilevel png": lambda: encode(Image.fromarray(smooth_rgb()).convert("1"), "PNG"),
    "palette png": lambda: encode(Image.fromarray(smooth_rgb()).quantize(16), "PNG"),
    "palette png with transparency": lambda: encode(palette_with_transparency(), "PNG"),
    "alpha png": lambda: encode(with_alpha(), "PNG"),
    "grey alpha png": lambda: encode(Image.fromarray(smooth_rgb()).convert("LA"), "PNG"),
    "rotated png": lambda: encode(Image.fromarray(smooth_rgb()), "PNG", exif=exif(8)),
    "webp": lambda: encode(Image.fromarray(smooth_rgb()), "WEBP", quality=90),
    "gif": lambda: encode(Image.fromarray(smooth_rgb()), "GIF"),
    "tiff": lambda: encode(Image.fromarray(smooth_rgb()), "TIFF"),
    "bmp": lambda: encode(Image.fromarray(smooth_rgb()), "BMP"),
}


def pil_oracle(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def write(tmp_path: Path):
    def to_file(data: bytes) -> Path:
        path = tmp_path / "image.bin"
        path.write_bytes(data)
        return path

    return to_file


@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_agree_on_every_8_bit_kind(kind, write):
    data = KINDS[kind]()
    exact = read_image(write(data), "RGB")
    fast = decode_image(data, "x")
    assert exact.dtype == fast.dtype == np.uint8
    assert exact.shape == fast.shape
    # OpenCV and PIL may carry different builds of libjpeg; the same build gives 0.
    assert np.abs(exact.astype(int) - fast).max() <= (2 if data[:2] == b"\xff\xd8" else 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "rotated" not in kind])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_upright_files_read_as_pil_converts_them(kind, write):
    data = KINDS[kind]()
    np.testing.assert_array_equal(read_image(write(data), "RGB"), pil_oracle(data))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation, file_format, write):
    """The stored raster is what EXIF's definition makes of the upright one; both readers must give it back."""
    upright = smooth_rgb(48, 64)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif(orientation), **options)
    for pixels in (read_image(write(data), "RGB"), decode_image(data, "x")):
        assert pixels.shape == upright.shape
        assert np.abs(pixels.astype(int) - upright).max() <= (4 if file_format == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["jpeg", "alpha png", "rotated jpeg"])
def test_bgr_is_rgb_reversed(kind, write):
    data = KINDS[kind]()
    path = write(data)
    np.testing.assert_array_equal(read_image(path, "BGR"), read_image(path, "RGB")[:, :, ::-1])
    np.testing.assert_array_equal(decode_image(data, "x", "BGR"), decode_image(data, "x")[:, :, ::-1])


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_an_opencv_without_the_rgb_flag_gives_the_same(order, monkeypatch):
    data = {kind: KINDS[kind]() for kind in ("jpeg", "grey jpeg", "rotated jpeg")}
    expected = {kind: decode_image(data[kind], "x", order, reduce=2) for kind in data}
    monkeypatch.setattr(decode, "_READ_RGB", None)
    for kind in data:
        np.testing.assert_array_equal(decode_image(data[kind], "x", order, reduce=2), expected[kind])


def test_16_bit_grey_keeps_the_high_byte_for_pretraining(write):
    values = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) * 31 % 65536).astype(np.uint16)
    data = encode(Image.fromarray(values), "PNG")
    pixels = decode_image(data, "x")
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[:, :, None], 3, 2))


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 256]], np.uint16),
        np.array([[0, 60_000]], np.uint16),
        np.array([[0, 70_000, -5]], np.int32),
        np.float32([[0, 300]]),
        np.float32([[0, 0.9]]),
        np.float32([[0, 1]]),
    ],
)
def test_b5_detection_refuses_grey_that_it_would_make_white_or_black(write, values):
    path = write(encode(Image.fromarray(values), "TIFF"))
    with pytest.raises(UserError, match=r"grey values reach .*8 bits a channel"):
        read_image(path, "RGB")


def test_b5_16_bit_files_of_8_bit_values_are_read(write):
    values = np.array([[0, 7, 255]], np.uint16)
    for path in (write(encode(Image.fromarray(values), kind)) for kind in ("PNG", "TIFF")):
        np.testing.assert_array_equal(read_image(path, "RGB")[..., 0], values)


def test_32_bit_integers_are_read_as_16_bit_values():
    values = np.array([[0, 255, 256, 65535, 70000, -5]], np.int32)
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(values), "TIFF"), "x")[0, :, 1], [0, 0, 1, 255, 255, 0]
    )


def test_floating_point_is_refused_by_name():
    data = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(UserError, match=r"depth\.tif: floating-point"):
        decode_image(data, "depth.tif")


def test_detection_reads_integers_and_floats_as_pil_clips_them(write):
    for values in (np.array([[0, 7, 255, -5]], np.int32), np.float32([[0, 0.9, 7.2, 254.5, -5]])):
        pixels = read_image(write(encode(Image.fromarray(values), "TIFF")), "RGB")
        expected = np.clip(values, 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame_of_several(file_format, write):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 120, 240)]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=50)
    for pixels in (read_image(write(data), "RGB"), decode_image(data, "x")):
        assert pixels.shape == (8, 8, 3)
        assert pixels.max() == 0


BROKEN = {
    "empty": lambda: b"",
    "text": lambda: b"<html>404 not found</html>" * 50,
    "only the magic": lambda: b"\xff\xd8\xff",
    "header alone": lambda: jpeg()[:30],
    "half a jpeg": lambda: jpeg()[: len(jpeg()) // 2],
    "half a progressive jpeg": lambda: jpeg(progressive=True)[: len(jpeg(progressive=True)) // 2],
    "jpeg without its last bytes": lambda: jpeg()[:-20],
    "jpeg without its end marker": lambda: jpeg()[:-2],
    "half a jpeg whose thumbnail is whole": lambda: jpeg_with_thumbnail()[:-400],
    "half a png": lambda: (png := encode(Image.fromarray(smooth_rgb()), "PNG"))[: len(png) // 2],
    "half a cmyk jpeg": lambda: KINDS["cmyk jpeg"]()[:700],
}


def jpeg_with_thumbnail() -> bytes:
    thumbnail = encode(Image.fromarray(smooth_rgb(8, 8)), "JPEG")
    segment = b"Exif\x00\x00" + thumbnail
    whole = jpeg()
    return whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_by_name_and_quietly(kind, write, capfd):
    data = BROKEN[kind]()
    path = write(data)
    with pytest.raises(UserError, match=r"cat\.jpg: ") as error:
        decode_image(data, "cat.jpg")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"image\.bin"):
        read_image(path, "RGB")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if "jpeg" in kind])
def test_opencv_is_not_asked_about_a_jpeg_that_breaks_off(kind, monkeypatch):
    """Releases before 5 would fill what is missing with grey and say nothing."""
    monkeypatch.setattr(decode, "_cv2_pixels", lambda *_: pytest.fail("OpenCV was asked"))
    with pytest.raises(UserError):
        decode_image(BROKEN[kind](), "cat.jpg")


def test_trailing_bytes_after_a_whole_jpeg_are_harmless():
    np.testing.assert_array_equal(decode_image(jpeg() + b"\0" * 999, "x"), decode_image(jpeg(), "x"))


def test_a_thumbnail_does_not_disturb_a_whole_jpeg():
    np.testing.assert_array_equal(decode_image(jpeg_with_thumbnail(), "x"), decode_image(jpeg(), "x"))
    assert jpeg_size(jpeg_with_thumbnail()) == (HEIGHT, WIDTH)


def test_odd_metadata_of_a_sound_image_warns_of_nothing(write):
    data = KINDS["palette png with transparency"]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pil_oracle(data)
        assert caught  # PIL has something to say of it
        caught.clear()
        decode_image(data, "x")
        read_image(write(data), "RGB")
    assert not caught


DAMAGED_EXIF = {
    "no header": b"Exif\0\0no header of a TIFF at all",
    "tags beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "nothing": b"Exif\0\0",
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("damage", DAMAGED_EXIF)
def test_damaged_exif_of_a_sound_image_is_no_exif(damage, file_format, write):
    plain = encode(Image.fromarray(smooth_rgb()), file_format)
    data = encode(Image.fromarray(smooth_rgb()), file_format, exif=DAMAGED_EXIF[damage])
    assert len(data) > len(plain)
    np.testing.assert_array_equal(read_image(write(data), "RGB"), read_image(write(plain), "RGB"))
    np.testing.assert_array_equal(decode_image(data, "x"), decode_image(plain, "x"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jpg: no such image file"):
        read_image(tmp_path / "absent.jpg", "RGB")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path, "RGB")
    with pytest.raises(UserError, match=r"a\\x00b\.jpg': names no file"):
        read_image(f"{tmp_path}/a\0b.jpg", "RGB")


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_decoding_is_the_image_scaled_down(reduce):
    y, x = np.mgrid[:203, :317]
    whole = np.stack([127 + 100 * np.sin(x / 40), 127 + 100 * np.cos(y / 30), x * 0.5 + y * 0.2], 2).astype(np.uint8)
    data = encode(Image.fromarray(whole), "JPEG", quality=95)
    small = decode_image(data, "x", reduce=reduce)
    assert small.shape == (-(-203 // reduce), -(-317 // reduce), 3)
    rows, columns = 203 // reduce, 317 // reduce
    mean = whole[: rows * reduce, : columns * reduce].reshape(rows, reduce, columns, reduce, 3).mean((1, 3))
    assert np.abs(small[:rows, :columns] - mean).mean() < 2.0
    np.testing.assert_array_equal(decode_image(data, "x", "BGR", reduce)[..., ::-1], small)


def test_size_is_read_only_from_what_would_be_reduced():
    assert jpeg_size(jpeg()) == (HEIGHT, WIDTH)
    assert jpeg_size(jpeg(exif=exif(6))) == (HEIGHT, WIDTH)  # as stored
    assert jpeg_size(KINDS["cmyk jpeg"]()) is None
    assert jpeg_size(KINDS["grey png"]()) is None
    assert jpeg_size(KINDS["grey jpeg"]()) == jpeg_size(KINDS["progressive"]()) == (HEIGHT, WIDTH)
    filled = jpeg()[:2] + b"\xff" * 3 + jpeg()[2:]  # any marker may have fill bytes before it (T.81, B.1.1.2)
    assert jpeg_size(filled) == (HEIGHT, WIDTH)
    frame = jpeg().index(b"\xff\xc0")
    assert jpeg_size(jpeg()[: frame + 4] + b"\x0c" + jpeg()[frame + 5 :]) is None  # 12 bits a sample


def test_real_photographs_decode_alike(real_coco):
    for path in sorted((real_coco / "coco" / "val2017").glob("*.jpg"))[:12]:
        fast, exact = decode_image(path.read_bytes(), path.name), read_image(path, "RGB")
        assert np.abs(fast.astype(int) - exact).max() <= 2


@pytest.mark.detectron2
@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_equal_to_detectron2(order, write):
    utils = pytest.importorskip("detectron2.data.detection_utils")
    for kind, make in KINDS.items():
        path = write(make())
        expected = utils.read_image(str(path), format=order)
        np.testing.assert_array_equal(read_image(path, order), expected, err_msg=kind)
    for orientation in range(1, 9):
        path = write(jpeg(exif=exif(orientation)))
        np.testing.assert_array_equal(read_image(path, order), utils.read_image(str(path), format=order))


@pytest.mark.detectron2
def test_equal_to_detectron2_on_real_photographs(real_coco):
    utils = pytest.importorskip("detectron2.data.detection_utils")
    for path in sorted((real_coco / "coco" / "val2017").glob("*.jpg"))[:12]:
        np.testing.assert_array_equal(read_image(path, "BGR"), utils.read_image(str(path), format="BGR"))


INKS = {
    (0, 0, 0, 0): (255, 255, 255),
    (0, 0, 0, 255): (0, 0, 0),
    (255, 0, 0, 0): (0, 255, 255),
    (0, 255, 255, 0): (255, 0, 0),
}


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_inks_of_cmyk_are_their_colours(ink, file_format, write):
    """An Adobe JPEG stores them inverted; read as they stand, white would be black."""
    data = encode(Image.new("CMYK", (16, 16), ink), file_format)
    assert file_format != "JPEG" or b"Adobe" in data
    for pixels in (read_image(write(data), "RGB"), decode_image(data, "x")):
        assert np.abs(pixels.astype(int) - INKS[ink]).max() <= 2


def test_16_bit_colour_keeps_the_high_byte(write):
    values = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    data = cv2.imencode(".png", values[:, :, ::-1])[1].tobytes()
    for pixels in (read_image(write(data), "RGB"), decode_image(data, "x")):
        np.testing.assert_array_equal(pixels, (values >> 8).astype(np.uint8))


def test_a_jpeg_damaged_inside_but_whole_is_read_as_libjpeg_resumes(write, capfd):
    data = bytearray(KINDS["jpeg"]())
    at = len(data) // 2
    data[at : at + 4] = b"\x12\x34\x56\x78"
    fast, exact = decode_image(bytes(data), "x"), read_image(write(bytes(data)), "RGB")
    assert fast.shape == exact.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(fast[:8], decode_image(jpeg(), "x")[:8])
