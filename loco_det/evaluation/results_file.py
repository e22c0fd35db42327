"""Reads a results file in COCO's format, ours or another program's: a JSON list of detections."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from loco_det.core.device import no_garbage_collection
from loco_det.core.errors import UserError
from loco_det.core.files import read_regular

KEYS = {"bbox": "bbox", "segm": "segmentation"}  # IoU type -> key of a result


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a results file; `coco_checks.check_results` validates them.

    Raises:
        UserError: no such file, invalid JSON, or not a list of objects.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a results file in COCO's format.")
    try:
        content = read_regular(path).removeprefix(b"\xef\xbb\xbf")
        with no_garbage_collection():
            rows = _decoded(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); give a results file in COCO's format.") from None
    if isinstance(rows, dict):
        held = ", ".join(list(rows)[:5])
        raise UserError(f"{path} holds an object with {held}; a results file is a list of detections, one a row.")
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no list; a results file is a list of detections, one a row.")
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: row {wrong} is no object; each row is a detection with image_id, category_id, score.")
    return rows


def _decoded(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except msgspec.DecodeError:
        return json.loads(content)  # accepts NaN, which is reported by row later; otherwise the error has the position


def held_types(path: Path, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the IoU types for which every row has a shape; both if there are no rows.

    Raises:
        UserError: some rows have a shape that others lack.
    """
    held = []
    for iou_type, key in KEYS.items():
        missing = [number for number, row in enumerate(rows, 1) if row.get(key) is None]
        if len(missing) < len(rows) or not rows:
            held.append(iou_type)
        if 0 < len(missing) < len(rows):
            raise UserError(
                f"{path}: row {missing[0]} has no {key}, which other rows have; give it to all rows, or measure "
                f"--iou-type {'segm' if iou_type == 'bbox' else 'bbox'} alone."
            )
    if not held:
        raise UserError(f"{path}: row 1 has neither bbox nor segmentation; give each row one of them.")
    return tuple(held)
