"""A few trials of the reliability campaign (docs/reliability.md); the whole takes an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="follows processes through Linux's /proc")
def test_a_sample_of_the_campaign_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "tests/campaign/run.py", "--sample", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert {name.partition(":")[0] for name in parts} == {"kill", "fail", "race", "flip", "fuzz"}
    assert all(part["tried"] == part["survived"] > 0 for part in parts.values())
    assert any(part["refused"] for part in parts.values()), "what is damaged is not even read"
