"""docs/results.md is what its command writes from the committed figures, and the command writes the right numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402


def made_up() -> dict:
    """Two methods, three seeds; loco's numbers are 40, 41, 42 with an interval of mean +- 4.3027 / sqrt(3)."""
    cells = []
    for seed in range(3):
        for method, base in (("random", 20.0), ("loco", 40.0)):
            probe = {stage: {"top1": base + seed, "top1_interval": [0, 1]} for stage in ("stem", "res5")}
            cells.append(
                {
                    "method": method,
                    "seed": seed,
                    "commands": [[f"loco-det pretrain METHOD {method} SEED {seed}", 1200.0]],
                    "probes": dict.fromkeys(evidence.PROTOCOLS, probe),
                    "detection": dict.fromkeys(evidence.NUMBERS, base / 10 + seed),
                }
            )
    setting = {"steps": 7, "batch": 8, "size": 9, "limit": 10, "iterations": 11, "device": "cpu"}
    machine = {"device": "cpu", "cores": 2, "threads": 1, "packages": {"torch": "9.9"}, "loco_det": "0.0"}
    return {"setting": setting, "environment": machine, "cells": cells}


def test_the_page_has_means_intervals_commands_and_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, page = tmp_path / "evidence_cpu.json", tmp_path / "results.md"
    source.write_text(json.dumps(made_up()))
    monkeypatch.setattr(sys, "argv", ["evidence.py", "page", str(source), "--out", str(page)])
    evidence.main()
    text = page.read_text()
    assert "| backbone | stem | res5 |" in text
    assert text.count("| loco | 41.0 [38.5, 43.5] | 41.0 [38.5, 43.5] |") == len(evidence.PROTOCOLS)
    assert "| loco | 5.00 [2.52, 7.48] |" in text
    assert "The commands took 2.0 hours together, several at a time or beside other work, on 2 cores" in text
    assert "finds little" not in text
    assert "loco-det pretrain METHOD loco SEED 2" in text
    assert "## What was not run" in text
    assert "--seeds 0 1 2 --steps 7 --batch 8 --size 9 --limit 10 --iterations 11 --device cpu" in text
    assert "](results_cpu.png)" in text
    assert (tmp_path / "results_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_so_where_no_detector_learned() -> None:
    result = made_up()
    for cell in result["cells"]:
        cell["detection"] = dict.fromkeys(evidence.NUMBERS, 0.1 * cell["seed"] if cell["method"] == "loco" else 0.0)
    text = evidence.page_text([result])
    assert "No backbone's mean box AP is above 0.10" in text
    assert "| random | 0.00 [0.00, 0.00] |" in text


def test_the_picture_shows_means_and_intervals() -> None:
    figure = evidence.probe_curves(made_up())
    assert len(figure.axes) == len(evidence.PROTOCOLS)
    for axes in figure.axes:
        random, loco = (container.lines for container in axes.containers)
        assert random[0].get_ydata().tolist() == [21.0, 21.0]
        assert loco[0].get_ydata().tolist() == [41.0, 41.0]
        (bars,) = loco[2]
        (_, low), (_, high) = bars.get_segments()[0]
        assert (low, high) == pytest.approx((41 - 4.3027 / 3**0.5, 41 + 4.3027 / 3**0.5), abs=1e-3)


def test_the_committed_page_is_what_the_committed_figures_say() -> None:
    sources = sorted(RESULTS.glob("evidence_*.json"))
    if not (RESULTS / "evidence_cpu.json").is_file():
        pytest.skip("benchmarks/results/evidence_cpu.json is absent: the evidence has not been measured")
    page = ROOT / "docs" / "results.md"
    wanted = evidence.page_text([json.loads(path.read_text()) for path in sources])
    assert page.read_text() == wanted, "write it: python benchmarks/evidence.py page benchmarks/results/evidence_*.json"
    for source in sources:
        assert (page.parent / evidence.picture(json.loads(source.read_text()))).is_file()
    assert "results.md" in (ROOT / "mkdocs.yml").read_text(), "the page is not in the site's navigation"
