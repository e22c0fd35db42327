"""Splits that are folders."""

from __future__ import annotations

from pathlib import Path

WHOLE = "all"  # the split of a source that has none
_MEANING = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    "trainval": "",  # which may be any
}


def split_of_folder(path: Path, root: Path) -> tuple[str, ...]:
    """The first folder between `root` and a file that is called as splits are, else `WHOLE`."""
    parts = path.parent.relative_to(root).parts if root in path.parents else ()
    return (next((part for part in parts if part.lower() in _MEANING), WHOLE),)


def are_apart(one: str, other: str) -> bool:
    """Whether two splits, as `split_of_folder` names them, cannot mean the same."""
    meanings = {_MEANING.get(split.lower(), "") for split in (one, other)} - {""}
    return len(meanings) == 2
