"""Write the table of honoured keys into docs/engines.md: python tests/record_key_table.py"""

from __future__ import annotations

from pathlib import Path

from loco_det.detection.schema import HONOURED, get_cfg, values

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
BEGIN, END = "<!-- keys: tests/record_key_table.py -->", "<!-- /keys -->"


def table() -> str:
    """One row a key: its default, and what the torchvision engine takes."""
    rows = ["| key | default | torchvision engine takes |", "|---|---|---|"]
    for key, default in sorted(values(get_cfg()).items()):
        allowed = HONOURED.get(key, ())
        taken = "any" if allowed is None else ", ".join(f"`{value!r}`" for value in allowed) or "only the default"
        if key in HONOURED:
            rows.append(f"| `{key}` | `{default!r}` | {taken} |")
    rest = sorted(key for key in values(get_cfg()) if key not in HONOURED)
    sections = sorted({key.rpartition(".")[0] or key for key in rest})
    rows += [
        "",
        f"The other {len(rest)} keys must keep their defaults: those left in {', '.join(f'`{s}`' for s in sections)}.",
    ]
    return "\n".join(rows)


def with_table(page: str) -> str:
    """The page with the table between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
