"""What every benchmark script does at its start and its end."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout it stands in, installed or not

from loco_det.core.files import write_json

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str) -> argparse.ArgumentParser:
    """A parser that already has `--json PATH`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return made


def report(header: list[str], rows: list[list[Any]], figures: dict[str, Any], path: Path | None) -> None:
    """Print one table and write `figures` to `path` if there is one."""
    cells = [header, *([f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if path is not None:
        write_json(path, figures)
