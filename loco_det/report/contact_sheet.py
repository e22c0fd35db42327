"""Contact sheets of a data set as PNG, by OpenCV: images with their pretraining views, or with their annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from loco_det.annotations.coco import CocoDataset
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.log import log
from loco_det.images.decode import decode_image, read_image
from loco_det.images.views import ViewConfig, two_views
from loco_det.report.drawing import annotated_shapes, draw_instances

_GAP = 8  # pixels between pictures
_CAPTION = 18  # pixels of text below one
_HEADING = 20  # pixels of text above the columns
_PAPER, _INK = 255, (70, 70, 70)
_LONG = 44  # characters of a caption


def two_view_sheet(images: Sequence[tuple[bytes, str]], config: ViewConfig, seed: int, out: Path) -> None:
    """Draw each image beside its two views of the first epoch, two images per row.

    Args:
        images: (encoded, name), all of them readable.
        out: the PNG to write.
    """
    tile = config.size
    cells = []
    for number, (data, name) in enumerate(images):
        pixels = decode_image(data, name)
        views = np.empty((2, 3, tile, tile), np.uint8)
        two_views(data, name, config, seed, 0, number, views)
        first, second = (np.ascontiguousarray(view.transpose(1, 2, 0)) for view in views)
        row = np.hstack([_fitted(pixels, tile), _blank(tile, _GAP // 2), first, _blank(tile, _GAP // 2), second])
        cells.append(_captioned(row, Path(name).name))
    sheet = _columns(cells, 2)
    headings = [(_GAP + column * (cells[0].shape[1] + _GAP), tile) for column in range(min(2, len(cells)))]
    _write(np.vstack([_headed(sheet.shape[1], headings), sheet]), out)


def annotated_sheet(dataset: CocoDataset, images: Sequence[int], out: Path, width: int = 380, columns: int = 3) -> bool:
    """Draw images with boxes, masks and class names in equal columns; images with an invalid mask are skipped.

    Args:
        images: positions in the data set, all of them readable.
        out: the PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    cells = []
    for record in (dataset[i] for i in images):
        pixels = read_image(record.file_name, "RGB")
        try:
            shapes = [shape._replace(box=_inside(shape.box, *pixels.shape[:2])) for shape in annotated_shapes(record)]
        except UserError as error:
            log.warning("not on the sheet: %s", error)
            continue
        drawn = draw_instances(pixels, shapes, dataset.class_names, width)
        caption = f"{Path(record.file_name).name}  {len(shapes)} annotation{'s' * (len(shapes) != 1)}"
        cells.append(_captioned(drawn, caption))
    if cells:
        _write(_columns(cells, columns), out)
    return bool(cells)


def _inside(box: Sequence[float], height: int, width: int) -> list[float]:
    """Clip [x, y, width, height] to the image, because OpenCV draws no lines to far-away points."""
    x, y, w, h = box
    left, right = np.clip([x, x + w], 0, width - 1)
    top, bottom = np.clip([y, y + h], 0, height - 1)
    return [left, top, right - left, bottom - top]


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _fitted(pixels: np.ndarray, side: int) -> np.ndarray:
    """Fit the whole image into a square of `side`."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    square = _blank(side, side)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = small
    return square


def _captioned(picture: np.ndarray, text: str) -> np.ndarray:
    plate = _blank(_CAPTION, picture.shape[1])
    text = text if len(text) <= _LONG else f"...{text[-_LONG:]}"
    cv2.putText(plate, text, (0, _CAPTION - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.38, _INK, 1, cv2.LINE_AA)
    return np.vstack([picture, plate])


def _headed(width: int, rows: Sequence[tuple[int, int]]) -> np.ndarray:
    """Name the three pictures of each (left edge, side of a picture) in a strip of `width`."""
    strip = _blank(_HEADING, width)
    for left, tile in rows:
        for number, text in enumerate(("image", "view 1", "view 2")):
            place = (left + number * (tile + _GAP // 2), _HEADING - 4)
            cv2.putText(strip, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, _INK, 1, cv2.LINE_AA)
    return strip


def _columns(cells: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Lay out cells of equal width, each below the shortest column so far."""
    columns: list[list[np.ndarray]] = [[] for _ in range(min(count, len(cells)))]
    for cell in cells:
        min(columns, key=lambda column: sum(len(part) + _GAP for part in column)).append(cell)
    width = cells[0].shape[1]
    height = max(sum(len(part) + _GAP for part in column) for column in columns) + _GAP
    sheet = _blank(height, len(columns) * (width + _GAP) + _GAP)
    for number, column in enumerate(columns):
        top, left = _GAP, _GAP + number * (width + _GAP)
        for part in column:
            sheet[top : top + len(part), left : left + width] = part
            top += len(part) + _GAP
    return sheet


def _write(sheet: np.ndarray, out: Path) -> None:
    encoded = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))[1]
    with atomic_write(out) as file:
        file.write(encoded.tobytes())
