"""Write the tables of this package's own keys, of supported keys and of Detectron2's own files into docs/engines.md.

After a change of either: python tests/record_key_table.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from fvcore.common.config import CfgNode

from loco_det.core.config import flat
from loco_det.core.errors import UserError
from loco_det.core.own_keys import OWN_KEYS
from loco_det.detection.keys import SUPPORTED, check_supported, get_cfg

STOCK = Path(__file__).parent / "golden" / "stock_configs.json"
PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
BEGIN, END = "<!-- keys: tests/record_key_table.py -->", "<!-- /keys -->"
OWN_BEGIN, OWN_END = "<!-- own keys: tests/record_key_table.py -->", "<!-- /own keys -->"


def table() -> str:
    """One row a key: its default, and what the torchvision engine takes."""
    rows = ["| key | default | torchvision engine takes |", "|---|---|---|"]
    for key, default in sorted(flat(get_cfg()).items()):
        allowed = SUPPORTED.get(key, ())
        taken = "any" if allowed is None else ", ".join(f"`{value!r}`" for value in allowed) or "only the default"
        if key in SUPPORTED:
            rows.append(f"| `{key}` | `{default!r}` | {taken} |")
    rest = ", ".join(f"`{key}`" for key in sorted(flat(get_cfg())) if key not in SUPPORTED)
    return "\n".join([*rows, "", f"Every other key must keep its default: {rest}.", "", *stock_rows()])


def own_table() -> str:
    """One row for each key beside Detectron2's."""
    rows = [f"| `{key}` | `{default!r}` | {meaning} |" for key, (default, meaning) in OWN_KEYS.items()]
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows])


def stock_rows() -> list[str]:
    """One row a folder of Detectron2's own YAML files: how many are supported, and why the others are refused."""
    found: dict[str, Counter[str | None]] = {}
    for name, recorded in json.loads(STOCK.read_text())["configs"].items():
        cfg = get_cfg()
        cfg.merge_from_list([item for pair in recorded["sets"].items() for item in pair])
        folder = name.rpartition("/")[0] or "*.yaml"
        found.setdefault(f"configs/{folder}", Counter())[refusal(cfg)] += 1
    rows = ["| Detectron2's files | supported | refused, for |", "|---|---|---|"]
    for folder, counts in found.items():
        refused = "; ".join(f"{count} for {reason}" for reason, count in counts.items() if reason)
        rows.append(f"| `{folder}` | {counts[None]} | {refused or '0'} |")
    return rows


def refusal(cfg: CfgNode) -> str | None:
    """Key and value that the torchvision engine refuses a configuration for; None if it supports all."""
    try:
        check_supported(cfg)
    except UserError as error:
        key, _, rest = str(error).partition(" is ")
        return f"`{key} {re.split('[,;]', rest)[0]}`"
    return None


def with_table(page: str) -> str:
    """The page with the tables between their marks replaced."""
    for begin, end, text in ((OWN_BEGIN, OWN_END, own_table()), (BEGIN, END, table())):
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
