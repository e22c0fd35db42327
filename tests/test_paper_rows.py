"""The paper's rows as configurations: each trains, says the paper's figure, and stands in the documentation's table."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from loco_det.artifact import load_backbone
from loco_det.config import load_config
from pretrain.defaults import get_cfg
from pretrain.paper import ROWS, table
from pretrain.train import pretrain

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "pretrain"
# A small network, few pixels and rows of two images; everything else is the configuration's own.
SMALL = {
    "BACKBONE.NORM": "BN",
    "DECODER.HIDDEN_DIM": 16,
    "DATA.IMAGE_SIZE": 32,
    "DATA.NUM_WORKERS": 0,
    "SOLVER.BATCH_SIZE": 4,
    "SOLVER.MAX_STEPS": 3,
    "SOLVER.AMP": "none",
    "LOG_PERIOD": 1,
    "DEVICE": "cpu",
}
LOSSES = {"simclr": 1, "gim": 4, "loco": 3, "loco_res2": 4, "loco_share1block": 4, "loco_share2blocks": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        cv2.imwrite(str(folder / f"{i}.png"), rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    return folder


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)
def test_every_row_trains(row, images: Path, tmp_path: Path) -> None:
    small = {**SMALL, "DATA.PATH": images, "OUTPUT_DIR": tmp_path}
    if "presnet50" not in row.config:
        small["BACKBONE.NAME"] = "resnet18"
    words = [str(part) for pair in small.items() for part in pair]
    path = pretrain(load_config(get_cfg(), CONFIGS / f"{row.config}.yaml", words))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert len(lines) == 3
    losses = [key for key in lines[0] if key.startswith("loss/")]
    method = row.config.partition("_r50")[0].partition("_presnet50")[0]
    base = next(LOSSES[name] for name in (method, method.partition("_")[0]) if name in LOSSES)
    assert len(losses) == base + (0 if "presnet50" not in row.config or base == 1 else 2)
    assert load_backbone(path)[1].step == 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)
def test_the_header_says_the_papers_figure_and_the_schedule_is_its(row) -> None:
    (result,) = [line for line in (CONFIGS / f"{row.config}.yaml").read_text().splitlines() if "# Result:" in line]
    assert ("the paper plots" if row.top1 is None else f"the paper {row.top1:.1f} %") in result
    assert "ours: not run" in result
    cfg = load_config(get_cfg(), CONFIGS / f"{row.config}.yaml")
    solver = (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.EPOCHS, cfg.SOLVER.WARMUP_EPOCHS)
    assert solver == ("lars", 4096, row.epochs, 10)
    peak = cfg.SOLVER.BASE_LR * cfg.SOLVER.BATCH_SIZE / 256
    assert peak == pytest.approx(4.8)
    assert (cfg.DECODER.OUT_DIM, cfg.DATA.IMAGE_SIZE) == (128, 224)


def test_every_recipe_is_a_row_and_the_page_shows_them() -> None:
    others = ("base_", "evidence_", "quickstart", "random_", "loco_r18_cifar")
    recipes = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(others)}
    assert recipes == {row.config for row in ROWS}
    page = (ROOT / "docs" / "method.md").read_text()
    assert table() in page, "write it: python -m pretrain.paper"
