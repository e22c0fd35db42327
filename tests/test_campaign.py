"""A few trials of the reliability campaign (docs/reliability.md); the whole takes an hour."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from campaign import run

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "reliability_cpu.json"
PAGE = ROOT / "docs" / "reliability.md"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="follows processes through Linux's /proc")
def test_a_sample_of_the_campaign_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "tests/campaign/run.py", "--sample", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert {name.partition(":")[0] for name in parts} == {"kill", "fail", "race", "flip", "fuzz"}
    assert all(part["tried"] == part["survived"] > 0 for part in parts.values())
    assert any(part["refused"] for part in parts.values()), "what is damaged is not even read"


def test_every_command_of_the_page_is_one() -> None:
    commands = re.findall(r"^python tests/campaign/run\.py (.*?) *(?:#.*)?$", PAGE.read_text(), re.MULTILINE)
    assert len(commands) > 4
    for command in commands:
        args = run.arguments().parse_args(shlex.split(command))
        assert run.chosen(args.only)


def with_figures(page: str) -> str:
    """The page with its table and the sentence above it as the figures say."""
    figures = json.loads(FIGURES.read_text())
    kinds: dict[str, Counter[str]] = {}
    for name, part in figures["parts"].items():
        for kind in (name.partition(":")[0], "all"):
            kinds.setdefault(kind, Counter()).update({key: part[key] for key in ("tried", *run.OUTCOMES, "minutes")})
    kinds["all"] = kinds.pop("all")  # last
    rows = [
        " | ".join([f"| {kind}", *(f"{sums[key]:,}" for key in ("tried", *run.OUTCOMES)), f"{sums['minutes']:.1f} |"])
        for kind, sums in kinds.items()
    ]
    setting = f"`--hours {figures['hours']:g}` with torch {figures['torch']}"
    page = re.sub(r"`--hours [\d.]+` with torch \S+", setting, page)
    return re.sub(r"(\| kind \|.*\n\|[-|]+\|\n)(?:\|.*\n)+", rf"\1{chr(10).join(rows)}\n", page)


def test_the_table_of_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text() == with_figures(PAGE.read_text()), "run: python tests/test_campaign.py"
    parts = json.loads(FIGURES.read_text())["parts"]
    assert set(parts) == set(run.parts())
    assert all(part["tried"] == part["survived"] for part in parts.values())


if __name__ == "__main__":
    PAGE.write_text(with_figures(PAGE.read_text()))
