"""docs/is_my_backbone_good.md: each line is executed, on a toy data set with few iterations."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from loco_det.cli import main
from loco_det.evaluation.probes import backbones

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "is_my_backbone_good.md").read_text()
# Fewer and smaller than on the page, which is for real images.
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
    """The page's folder, in YOLO's format with two classes, and its weights; no pretrained weights of timm."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "cells" / kind / split).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "cells" / "images" / split / f"{i}.jpg")
            (tmp_path / "cells" / "labels" / split / f"{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.4 0.4\n")
    (tmp_path / "cells" / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [red, white]\n")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    random = backbones._timm
    monkeypatch.setattr(backbones, "_timm", lambda *args, **kwargs: random(*args, **{**kwargs, "pretrained": False}))
    return tmp_path


def test_there_are_six_lines_each() -> None:
    (shell,), python = blocks("sh"), blocks("python")
    assert len(shell) == 6
    assert len(python) == 2
    assert all(len([line for line in block if line]) <= 6 for block in python)


def test_the_lines_for_a_file(capsys: pytest.CaptureFixture) -> None:
    variables: dict[str, str] = {}
    for line in blocks("sh")[0]:
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
        assert re.search(rf"cells/@val: bbox AP \d+\.\d.*\nin output/{name}: ", out)
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
