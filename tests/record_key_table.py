"""Write the tables of this package's own keys, of supported keys and of Detectron2's own files into docs/engines.md.

After a change of either: python tests/record_key_table.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
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
    """The keys that take some values only, with their defaults; those that take any; the others."""
    defaults = flat(get_cfg())
    rows = ["| key | default | torchvision engine takes |", "|---|---|---|"]
    for key, allowed in sorted(SUPPORTED.items()):
        if allowed is not None:
            taken = ", ".join(f"`{value!r}`" for value in allowed) or "only the default"
            rows.append(f"| `{key}` | `{defaults[key]!r}` | {taken} |")
    free = groupby(sorted(key for key, allowed in SUPPORTED.items() if allowed is None), section_of)
    any_value = [f"- {', '.join(f'`{key}`' for key in keys)}" for _, keys in free]
    whole = [section for section in map("MODEL.{}".format, get_cfg().MODEL) if not of_section(section, SUPPORTED)]
    kept = [f"`{section}.*`" for section in whole if of_section(section, defaults)]
    kept += [f"`{key}`" for key in defaults if key not in SUPPORTED and not any(of_section(s, [key]) for s in whole)]
    last = f"Only the default: {', '.join(sorted(kept))}."
    return "\n".join([*rows, "", "Any value of its type:", "", *any_value, "", last, "", *stock_rows()])


def section_of(key: str) -> str:
    """Of `MODEL.RPN.NMS_THRESH` `MODEL.RPN`; of other keys what is in front of the first dot, if anything."""
    *sections, _ = key.split(".")
    return ".".join(sections if key.startswith("MODEL.") else sections[:1])


def of_section(section: str, keys: Iterable[str]) -> list[str]:
    """The keys below a section."""
    return [key for key in keys if key.startswith(f"{section}.")]


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
