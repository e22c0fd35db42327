"""docs/is_my_backbone_good.md: each line is executed, on a toy data set with few iterations."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision

from loco_det.cli import main
from loco_det.evaluation.probes import backbones

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "is_my_backbone_good.md").read_text()
# Fewer and smaller than on the page.
TOY = {
    "SOLVER.MAX_ITER": "2",
    "SOLVER.STEPS": "(1,)",
    "SOLVER.IMS_PER_BATCH": "2",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
}


def blocks(language: str) -> list[list[str]]:
    return [block.splitlines() for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(autouse=True)
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's folder, drawn by its own line but fewer and smaller images, and its weights; none of timm's."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split("\n".join(blocks("sh")[0]))
    assert words == ["loco-det", "data", "shapes", "cells"]
    assert main([*words[1:], "--train", "4", "--test", "4", "--size", "64"]) == 0
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "mine.pth")
    random = backbones._timm
    monkeypatch.setattr(backbones, "_timm", lambda *args, **kwargs: random(*args, **{**kwargs, "pretrained": False}))
    return tmp_path


def test_there_are_six_lines_each() -> None:
    (_, shell), python = blocks("sh"), blocks("python")
    assert len(shell) == 6
    assert len(python) == 2
    assert all(len([line for line in block if line]) <= 6 for block in python)


def test_the_lines_for_a_file(capsys: pytest.CaptureFixture) -> None:
    variables: dict[str, str] = {}
    for line in blocks("sh")[1]:
        if found := re.fullmatch(r'(\w+)="(.*)"', line):
            variables[found[1]] = found[2]
            continue
        words = [
            word
            for part in shlex.split(line)
            for word in (variables[part[1:]].split() if part.startswith("$") else [part])
        ]
        assert words[0] == "loco-det"
        toy = [word for pair in TOY.items() for word in pair] if words[1] == "train" else []
        if words[1] == "report":
            words += ["--bootstrap", "5"]
        assert main([*words[1:], *toy]) == 0, line
    out = capsys.readouterr().out
    for name in ("random", "mine"):
        assert re.search(rf"cells/@test: bbox AP \d+\.\d.*\nin output/{name}: ", out)
    assert Path("output/report/index.html").is_file()
    assert Path("output/mine/converted_backbone.pkl").is_file()


@pytest.mark.parametrize("number", [0, 1])
def test_the_lines_for_timm_and_for_a_module(number: int, capsys: pytest.CaptureFixture) -> None:
    text = "\n".join(blocks("python")[number])
    toy = {"SOLVER.IMS_PER_BATCH": 2, "INPUT.MIN_SIZE_TRAIN": (64,), "INPUT.MIN_SIZE_TEST": 64}
    assert '"iterations": 200' in text
    exec(text.replace('"iterations": 200', f'"iterations": 2, "settings": {toy}'), {})
    rows = re.findall(r"^bbox +\d+\.\d\d", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == text.count("print(")
