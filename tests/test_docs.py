"""Pages that list what the code has."""

from __future__ import annotations

import re
from pathlib import Path

from fvcore.common.config import CfgNode

from pretrain.defaults import get_cfg
from pretrain.loco import METHODS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def leaves(node: CfgNode, prefix: str = "") -> list[str]:
    """Dotted names of all keys."""
    names = []
    for key, value in node.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return names


def test_every_pretraining_key_is_explained() -> None:
    text = (DOCS / "pretraining.md").read_text()
    for name in leaves(get_cfg()):
        shown = name.removeprefix("AUGMENT.") if name.startswith("AUGMENT.") else name
        assert f"`{shown}`" in text, f"docs/pretraining.md does not explain {name}"
    (methods,) = re.findall(r"\| `METHOD` \|.*", text)
    assert all(re.search(rf"\b{name}\b", methods) for name in (*METHODS, "random"))
