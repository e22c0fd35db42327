"""Splits that are folders."""

from __future__ import annotations

from pathlib import Path

WHOLE = "all"  # the split of a source that has none
_NAMES = ("train", "training", "trn", "val", "valid", "validation", "dev", "test", "testing", "trainval")


def split_of_folder(path: Path, root: Path) -> tuple[str, ...]:
    """The first folder between `root` and a file that is called as splits are, else `WHOLE`."""
    parts = path.parent.relative_to(root).parts if root in path.parents else ()
    return (next((part for part in parts if part.lower() in _NAMES), WHOLE),)
