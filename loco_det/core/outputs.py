"""Finds this package's own output in a folder of data, so that it is not read as data.

A folder may hold both, so files are excluded one by one: by name, if a marker file beside them has the content that the
command writes.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from loco_det import __version__
from loco_det.core.errors import UserError
from loco_det.core.files import cache_folder, write_json

CONVERTED = "converted by loco-det"  # start of info.description in every file of `data convert`
SUMMARY = "conversion.json"
PREDICTED = "predict.json"  # lists the files that `predict` wrote to its folder
_WRITTEN = {  # marker file -> names that the command writes
    "check.json": ("check.json", "histogram.png", "annotated.png", "two_views.png"),
    SUMMARY: (SUMMARY,),
    "report.json": ("report.json", "report.md", "index.html", "pretraining_losses.png"),
}
_OF_A_RUN = ("config.yaml", "run.json", "metrics.json", "SHA256SUMS", "log.txt", "inference", "wandb")
_HEAD = 4096  # bytes in which a marker file names the package


def own_names(folder: Path, names: Collection[str]) -> set[str]:
    """Return the entries of `folder` among `names` that are this package's output or its cache."""
    found = {name for mark in _WRITTEN if mark in names and _is_marked(folder / mark) for name in _WRITTEN[mark]}
    if "config.yaml" in names and not {"run.json", "metrics.json"}.isdisjoint(names):
        found.update(_OF_A_RUN)
    if folder.name == "annotations" and _is_marked(folder.parent / SUMMARY):
        found.update(name for name in names if name.endswith(".json") and is_converted(folder / name))
    found.update(_predicted(folder, names))
    cache = os.path.realpath(cache_folder())
    if os.path.dirname(cache) == os.path.realpath(folder):
        found.add(os.path.basename(cache))
    return found.intersection(names)


def walk_data(root: Path) -> Iterator[tuple[Path, list[str], set[str]]]:
    """Walk the data folders at and below `root`: yields path, file names, and which of them are our output.

    Links to folders are followed, and each folder is walked once, by its own path if that lies below `root`: cyclic
    links end, and no file comes twice. Hidden entries and our own output folders are skipped.

    Raises:
        UserError: a folder cannot be listed.
    """
    waiting, seen = [root], set()
    while waiting:
        for here, folders, files in os.walk(waiting.pop(0), onerror=_refuse):  # it does not enter links
            if (real := os.path.realpath(here)) in seen:
                folders.clear()
                continue
            seen.add(real)
            own = own_names(Path(here), {*folders, *files})
            hidden = {name for name in (*folders, *files) if name.startswith(".") or name == "__MACOSX"}
            folders[:] = sorted({*folders} - own - hidden)
            yield Path(here), sorted({*files} - own - hidden), own
            waiting += [Path(here, name) for name in folders if os.path.islink(os.path.join(here, name))]


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed: {error.strerror}; make it readable or name another folder.")


def check_written(paths: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Check that no output overwrites an input, by any path.

    Raises:
        UserError: names both.
    """
    read = {os.path.realpath(path): path for path in inputs}
    for path in paths:
        if given := read.get(os.path.realpath(path)):
            raise UserError(f"{path} would be written over the input {given}; name another folder or file to write.")


def check_places(folder: Path, places: Iterable[str]) -> None:
    """Check that no output overwrites a file, relative to `folder`, that `predict` did not write.

    Raises:
        UserError: names the first.
    """
    own = written_by_predict(folder)
    for place in places:
        if place not in own and os.path.lexists(folder / place):
            raise UserError(
                f"{folder / place} is there already and was not written by predict; move it or name another folder."
            )


def record_places(folder: Path, places: Collection[str], *, planned: bool) -> None:
    """Add `places` to predict.json: all that are `planned`, else those that exist; drops listed files that are gone.

    Raises:
        UserError: it cannot be written.
    """
    listed = {place for place in (*places, *written_by_predict(folder)) if os.path.lexists(folder / place)}
    written = sorted(listed.union(places if planned else ()))
    write_json(folder / PREDICTED, {"loco_det": __version__, "written": written})


def written_by_predict(folder: Path) -> frozenset[str]:
    """Return the paths in `predict.json`, relative to `folder`; folders end in "/" and include all below them."""
    file = folder / PREDICTED
    try:
        found = os.stat(file)
    except OSError:
        return frozenset()
    return _listed(file, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=16)
def _listed(file: Path, *_: int) -> frozenset[str]:
    """Return the paths in a predict.json; the other arguments only key the cache by the file's content."""
    if not _is_marked(file):
        return frozenset()
    try:
        written = json.loads(file.read_bytes())["written"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # not a file of ours
        return frozenset()
    return frozenset(name for name in written if isinstance(name, str)) if isinstance(written, list) else frozenset()


def _predicted(folder: Path, names: Collection[str]) -> set[str]:
    """Return those of the `names` in `folder` that a predict.json there or in a parent folder lists."""
    found: set[str] = set()
    real = Path(os.path.realpath(folder))
    for around in (real, *real.parents):
        if written := written_by_predict(around):
            below = PurePosixPath(real.relative_to(around))
            if any(f"{place}/" in written for place in (below, *below.parents)):
                return set(names)
            found.update(name for name in names if not {str(below / name), f"{below / name}/"}.isdisjoint(written))
    return found


def is_converted(file: Path) -> bool:
    """Whether `data convert` wrote this COCO file."""
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
