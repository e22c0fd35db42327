"""What commands of this package write, which may lie in a folder of data and is none of it.

One folder may hold both, so files are left out one by one: by name, where a file beside them shows by its content that
such a command has been there.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from loco_det.core.files import cache_folder

CONVERTED = "converted by loco-det"  # begins info.description of every file that `data convert` writes
SUMMARY = "conversion.json"
_WRITTEN = {  # by the file that tells of it
    "check.json": ("check.json", "histogram.png", "annotated.png", "two_views.png"),
    SUMMARY: (SUMMARY,),
    "report.json": ("report.json", "report.md", "index.html", "pretraining_losses.png"),
}
_OF_A_RUN = ("config.yaml", "run.json", "metrics.json", "log.txt", "inference", "wandb")
_HEAD = 4096  # bytes within which such a file names the package


def own_names(folder: Path, names: Collection[str]) -> set[str]:
    """Those of the files and folders in `folder`, called `names`, that are this package's output or its cache."""
    found = {name for mark in _WRITTEN if mark in names and _is_marked(folder / mark) for name in _WRITTEN[mark]}
    if "config.yaml" in names and not {"run.json", "metrics.json"}.isdisjoint(names):
        found.update(_OF_A_RUN)
    if folder.name == "annotations" and _is_marked(folder.parent / SUMMARY):
        found.update(name for name in names if name.endswith(".json") and is_converted(folder / name))
    cache = os.path.realpath(cache_folder())
    if os.path.dirname(cache) == os.path.realpath(folder):
        found.add(os.path.basename(cache))
    return found.intersection(names)


def is_converted(file: Path) -> bool:
    """Whether `data convert` wrote a COCO file."""
    return _head(file).startswith(f'{{"info":{{"description":"{CONVERTED}'.encode())


def _is_marked(file: Path) -> bool:
    return b'"loco_det": "' in _head(file)


def _head(file: Path) -> bytes:
    if not os.path.isfile(file):
        return b""
    try:
        with open(file, "rb") as opened:
            return opened.read(_HEAD)
    except OSError:
        return b""
