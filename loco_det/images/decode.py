"""Decodes image files: one exact reader for detection, one fast reader for pretraining.

Shape legend: H x W height and width in pixels, after EXIF rotation.

`read_image` returns exactly what Detectron2's `detection_utils.read_image` returns, or refuses. `decode_image` decodes
JPEG with OpenCV, and everything else, and JPEGs that OpenCV mishandles, with PIL. Their behaviour:

| file | read_image | decode_image |
|---|---|---|
| grey, 8 bits | the grey value in all three channels | the same |
| 16 bits, grey | refused above 255, where PIL would clip it to white | high byte (value // 256) |
| 16 bits, colour | high byte, as PIL reads it | the same |
| 32-bit integer | refused above 255 | high byte of 16 (value // 256), clipped |
| floating point | refused above 255, or with nothing above 1 | refused: its range is unknown |
| CMYK, YCCK | PIL's conversion | the same |
| palette | looked up | the same |
| alpha, transparent palette | alpha dropped, colours kept as stored | the same |
| EXIF orientation | applied | the same |
| animated or several pages | first frame | the same |
| truncated, zero bytes, not an image | refused | the same |
| JPEG without its end marker | refused | the same |
| JPEG damaged inside but complete | as libjpeg resumes | the same |

Refused means UserError naming the file.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from loco_det.core.errors import UserError
from loco_det.core.files import read_regular
from loco_det.core.log import log

Order = Literal["RGB", "BGR"]

# Image suffixes in a folder, a zip or a shard, in lower case; Pillow reads all of them without a plug-in.
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif"),
)
# Image suffixes that are not read; they are counted in the log, not skipped silently.
UNREAD = (
    ".heic",
    ".heif",
    ".jxl",
    ".svg",
    ".psd",
    ".exr",
    ".hdr",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
    ".raw",
    ".dcm",
)

_EXIF_ORIENTATION = 274
# EXIF orientations 2-8 name the position of the first row and column; these bring them back to top and left.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# cv2's IMREAD_REDUCED_COLOR_n without its colour bit, which would mean BGR; libjpeg then skips DCT coefficients.
_REDUCED = {1: 0, 2: 16, 4: 32, 8: 64}
# OpenCV before 4.11 has no RGB flag.
_READ_RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)
REDUCTIONS = (8, 4, 2)
_ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PN": b"IEND"}  # of a JPEG and a PNG, by their beginning
MOST_MEGAPIXELS = 100  # of an image that is decoded, which takes some ten bytes a pixel
_BYTES_OF_A_PIXEL = 8  # at most, in a file
_LIMIT = "LOCO_DET_MAX_MEGAPIXELS"
_TOO_LARGE = f"cut it into tiles or scale it down, or set {_LIMIT} if the memory suffices"


def log_unread(where: str, names: Iterable[str]) -> None:
    """Log the number of files in a folder that are images of unsupported formats, by suffix."""
    counts = Counter(suffix for suffix in (Path(name).suffix.lower() for name in names) if suffix in UNREAD)
    if counts:
        kinds = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(counts.items()))
        log.warning("%s: skipped images of unsupported formats (%s); save them as PNG or JPEG", where, kinds)


def read_image(path: str | Path, order: Order) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 pixels, equal to Detectron2's `read_image(path, format=order)`.

    Source: Detectron2 data/detection_utils.py (PIL decoding, EXIF orientation, conversion to RGB).

    Raises:
        UserError: missing, unreadable, truncated or not an image.
    """
    return decode_exactly(read_file(path), str(path), order)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width), upright, of an image file that `read_image` can read as far as header and end tell.

    Where the end is not that of a whole JPEG or PNG, or the file is of another kind, it is decoded.

    Raises:
        UserError: as `read_image`.
    """
    try:
        if not os.path.isfile(path):  # of which opening alone may not end
            return read_image(path, "RGB").shape[:2]
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = _ENDS.get(file.read(3))
            file.seek(-min(os.path.getsize(path), 1 << 16), os.SEEK_END)
            if end and end in file.read():
                file.seek(0)
                image = Image.open(file)
                check_pixels(*image.size, str(path))
                width, height = image.size
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) > 4
                return (width, height) if turned else (height, width)
    except UserError:
        raise
    except Exception:  # by what is wrong with the file, which decoding tells
        pass
    return read_image(path, "RGB").shape[:2]


def decode_exactly(data: bytes, name: str, order: Order) -> np.ndarray:
    """Decode bytes as `read_image` does; `name` is for error messages.

    Raises:
        UserError: empty, truncated or not an image.
    """
    return _pil_pixels(data, name, order, exact=True)


def read_file(path: str | Path) -> bytes:
    """Read the bytes of an image file.

    Raises:
        UserError: missing or unreadable.
    """
    try:
        check_bytes(os.path.getsize(path), str(path))
        return read_regular(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file; correct the path or restore the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error
    except ValueError as error:  # a NUL
        raise UserError(f"{str(path)!r}: names no file ({error}); correct the path") from error


def decode_image(data: bytes, name: str, order: Order = "RGB", reduce: int = 1) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 pixels; `name` is for error messages.

    Args:
        reduce: 1, 2, 4 or 8. A JPEG decoded by OpenCV is returned at 1/reduce of its size, rounded up, which is faster;
            other images ignore it, so compare the shape with `jpeg_size`.

    Raises:
        UserError: empty, truncated, not an image, or pixels of unknown range.
    """
    header = _jpeg_header(data)
    if header is not None:
        check_pixels(header[1], header[0], name)
    if header is not None and header[2] and data.rfind(b"\xff\xd9", header[3]) >= 0:
        pixels = _cv2_pixels(data, order, reduce)
        if pixels is not None:
            return pixels
    return _pil_pixels(data, name, order, exact=False)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) as stored in a JPEG, before EXIF rotation; None if `decode_image` would not reduce it."""
    header = _jpeg_header(data)
    return header[:2] if header is not None and header[2] else None


def _cv2_pixels(data: bytes, order: Order, reduce: int) -> np.ndarray | None:
    buffer = np.frombuffer(data, np.uint8)
    try:
        if order == "RGB" and _READ_RGB is not None:
            return cv2.imdecode(buffer, _READ_RGB | _REDUCED[reduce])
        pixels = cv2.imdecode(buffer, cv2.IMREAD_COLOR | _REDUCED[reduce])
    except cv2.error:  # e.g. too large for OpenCV: PIL then gives the reason
        return None
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if pixels is not None and order == "RGB" else pixels


def _jpeg_header(data: bytes) -> tuple[int, int, bool, int] | None:
    """Return (height, width, 8-bit grey or three colours?, offset of the first scan); None if `data` is no JPEG.

    OpenCV before 5 accepts a truncated JPEG and fills the rest with grey. After the first scan's header an end-of-image
    marker can only be the real one (ITU-T T.81, B.1.1: entropy-coded 0xff is followed by 0x00 or a restart marker);
    an EXIF thumbnail, which also ends with a marker, comes before it.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    size: tuple[int, int, bool] | None = None
    at, end = 2, len(data)
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:
            return None if size is None else (*size, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 10 <= end:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            size = (height, width, data[at + 4] == 8 and data[at + 9] in (1, 3))
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _pil_pixels(data: bytes, name: str, order: Order, *, exact: bool) -> np.ndarray:
    if not data:
        raise UserError(f"{name}: the file is empty; restore or remove it")
    try:
        # PIL warns of odd metadata on standard error; only the pixels matter here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            check_pixels(*image.size, name)
            pixels = _to_rgb(_upright(image), name, exact)
    except UserError:
        raise
    except Exception as error:  # PIL's parsers raise various exceptions on hostile bytes
        if isinstance(error, Image.DecompressionBombError):  # by which Pillow refuses to open it
            raise too_large(name) from error
        reason = str(error).replace("<_io.BytesIO object at ", "<").split("<")[0].strip()
        raise UserError(f"{name}: not a readable image ({reason}); restore or remove it") from error
    return np.ascontiguousarray(pixels[:, :, ::-1]) if order == "BGR" else pixels


def most_pixels() -> int:
    """How many pixels an image may have that is decoded; Pillow's own limit is raised to as many.

    Raises:
        UserError: LOCO_DET_MAX_MEGAPIXELS is no number of them.
    """
    given = os.environ.get(_LIMIT, str(MOST_MEGAPIXELS))
    if not given.isdecimal() or not 0 < int(given) <= 10**5:
        raise UserError(f"{_LIMIT} is {given!r}; give whole megapixels, such as {MOST_MEGAPIXELS}.")
    most = int(given) * 10**6
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, most)
    return most


def too_large(name: str) -> UserError:
    """What to tell of an image that Pillow holds for a decompression bomb, and so does not say how large it is."""
    return UserError(f"{name}: has more than {most_pixels() // 10**6} megapixels; {_TOO_LARGE}")


def check_bytes(count: int, name: str) -> None:
    """Refuse with UserError, before it is read or unpacked, a file of more bytes than any image has that is decoded."""
    if count > _BYTES_OF_A_PIXEL * most_pixels():
        raise UserError(f"{name}: has {count >> 20} MiB, more than an image of {most_pixels() // 10**6} megapixels")


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse with UserError, before it is decoded, an image that would take much memory, whatever its bytes are."""
    most = most_pixels()
    if width * height > most:
        raise UserError(f"{name}: has {width} x {height} pixels, more than {most // 10**6} megapixels; {_TOO_LARGE}")


def count_frames(path: str | Path) -> int:
    """Return the number of frames or pages of an image file; 1 if unknown."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a photograph and its previews
    except Exception:  # damaged after its first frame
        return 1


def pil_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Convert an opened image to (H, W, 3) uint8 pixels, as `decode_image` does for its file.

    Raises:
        UserError: pixels of unknown range.
    """
    check_pixels(*image.size, name)
    return _to_rgb(_upright(image), name, exact=False)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged metadata of a valid image: Detectron2 ignores it too
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image, name: str, exact: bool) -> np.ndarray:
    if exact and (image.mode == "F" or image.mode.startswith("I")):
        _check_range(image, name)
    if not exact and image.mode == "F":
        raise UserError(f"{name}: floating-point pixels have no known range; save it with 8 or 16 bits a channel")
    if not exact and image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) // 256, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _check_range(image: Image.Image, name: str) -> None:
    """Refuse grey of more than 8 bits whose values exceed the 8 bits that detection reads."""
    values = np.asarray(image)
    largest = values.max(initial=0)
    if largest > 255 or (image.mode == "F" and largest <= 1):
        raise UserError(
            f"{name}: its grey values reach {largest:g}, of which the 8 bits that detection reads leave only white or "
            "black; save it with 8 bits a channel, each value divided by 256 where it has 16"
        )
