"""Prints the keys of a configuration with their defaults and meanings: `--keys`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping

from fvcore.common.config import CfgNode
from rich.console import Console
from rich.table import Table

from loco_det.core.config import flat, shell_value
from loco_det.core.errors import UserError

WIDTH = 160  # if the output is no terminal


def print_keys(cfg: CfgNode, meanings: Mapping[str, str], section: str) -> None:
    """Print a line for each key below `section` that has a meaning: KEY, default, meaning.

    Args:
        cfg: the defaults.
        meanings: by dotted key.
        section: SOLVER, MODEL.RPN, a single key; "" for all keys.

    Raises:
        UserError: no key has that name or section.
    """
    section = section.upper().strip(".")
    below = f"{section}." if section else ""
    shown = {key: value for key, value in flat(cfg).items() if key in meanings and f"{key}.".startswith(below)}
    if not shown:
        sections = sorted({key.rpartition(".")[0] for key in meanings} - {""} | set(meanings))
        within = [key for key in sections if section in key]
        close = difflib.get_close_matches(section, within or sections, n=1, cutoff=0.0 if within else 0.5)
        hint = f"did you mean {close[0]}?" if close else "leave it out for all keys"
        raise UserError(f"--keys {section}: there is no such section or key; {hint}")
    table = Table("key", "default", "meaning", box=None, pad_edge=False)
    for key, value in shown.items():
        table.add_row(key, shell_value(value), meanings[key])
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False).print(table)
