"""Recognises splits by folder names."""

from __future__ import annotations

from pathlib import Path

WHOLE = "all"  # the split of a source without splits
_MEANING = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "trainval": "",  # any split
}


def split_of_folder(path: Path, root: Path) -> tuple[str, ...]:
    """Return the first folder between `root` and a file that has a split's name, else `WHOLE`."""
    parts = path.parent.relative_to(root).parts if root in path.parents else ()
    return (next((part for part in parts if part.lower() in _MEANING), WHOLE),)


def are_apart(one: str, other: str) -> bool:
    """Whether two splits of `split_of_folder` are certainly different."""
    meanings = {_MEANING.get(split.lower(), "") for split in (one, other)} - {""}
    return len(meanings) == 2
