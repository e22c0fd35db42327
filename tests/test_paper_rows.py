"""The paper's rows as configurations: each trains, says the paper's figure, and stands in the documentation's table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from loco_det.backbones.artifact import load_backbone
from loco_det.core.config import load_config
from loco_det.paper.figures import ROWS, table
from pretrain.defaults import get_cfg
from pretrain.train import build_backbone, pretrain, unit_names

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "pretrain"
# A small network, few pixels and rows of two images; everything else is the configuration's own.
SMALL = {
    "BACKBONE.NORM": "BN",
    "BACKBONE.STEM": "cifar",
    "BACKBONE.WIDTH": 8,
    "DECODER.HIDDEN_DIM": 16,
    "DATA.IMAGE_SIZE": 32,
    "DATA.NUM_WORKERS": 0,
    "SOLVER.BATCH_SIZE": 4,
    "SOLVER.MAX_STEPS": 3,
    "SOLVER.AMP": "none",
    "LOG_PERIOD": 1,
    "DEVICE": "cpu",
}
# What the paper says of each of its rows, written by hand: method; units; layers before the pool, how many blocks,
# whether the first of them halves the map (None: there are none); linear layers; what a stage of two units learns from,
# and the factor of soft's penalty.
END_TO_END, APART = [["res2", "res5"]], [["res2", "res2"], ["res3", "res3"], ["res4", "res4"], ["res5", "res5"]]
PAIRS = [["res2", "res3"], ["res3", "res4"], ["res4", "res5"]]
ONE_BLOCK = [["res2", "res3.0"], ["res3", "res4.0"], ["res4", "res5.0"], ["res5", "res5"]]
TWO_BLOCKS = [["res2", "res3.1"], ["res3", "res4.1"], ["res4", "res5.1"], ["res5", "res5"]]
SIX_APART = [["res2", "res2"], ["res3", "res3"], ["res4", "res4"], ["res5", "res5"], ["res6", "res6"], ["res7", "res7"]]
SIX_PAIRS = [["res2", "res3"], ["res3", "res4"], ["res4", "res5"], ["res5", "res6"], ["res6", "res7"]]
STATED = {
    "simclr_r50": ("simclr", END_TO_END, "blocks", 0, None, 2, "hard", 0),
    "gim_r50": ("gim", APART, "blocks", 0, None, 2, "hard", 0),
    "loco_r50": ("loco", PAIRS, "blocks", 1, True, 2, "hard", 0),
    "loco_res2_r50": ("loco_res2", [["res2", "res2"], *PAIRS], "blocks", 1, True, 2, "hard", 0),
    "simclr_r50_100ep": ("simclr", END_TO_END, "blocks", 0, None, 2, "hard", 0),
    "gim_r50_100ep": ("gim", APART, "blocks", 0, None, 2, "hard", 0),
    "loco_mlp_r50_100ep": ("loco", PAIRS, "blocks", 0, None, 2, "hard", 0),
    "simclr_conv_r50_100ep": ("simclr", END_TO_END, "blocks", 1, True, 2, "hard", 0),
    "gim_conv_nods_r50_100ep": ("gim", APART, "blocks", 1, False, 2, "hard", 0),
    "gim_conv_r50_100ep": ("gim", APART, "blocks", 1, True, 2, "hard", 0),
    "gim_2conv_r50_100ep": ("gim", APART, "blocks", 2, True, 2, "hard", 0),
    "gim_stage_r50_100ep": ("gim", APART, "stage", 0, None, 2, "hard", 0),
    "gim_full_r50_100ep": ("gim", APART, "full", 0, None, 2, "hard", 0),
    "simclr_mlp4_r50_100ep": ("simclr", END_TO_END, "blocks", 0, None, 4, "hard", 0),
    "gim_mlp4_r50_100ep": ("gim", APART, "blocks", 0, None, 4, "hard", 0),
    "loco_r50_100ep": ("loco", PAIRS, "blocks", 1, True, 2, "hard", 0),
    "loco_mlp4_r50_100ep": ("loco", PAIRS, "blocks", 1, True, 4, "hard", 0),
    "loco_upper_r50_100ep": ("loco", PAIRS, "blocks", 1, True, 2, "upper", 0),
    "loco_soft_1e-4_r50_100ep": ("loco", PAIRS, "blocks", 1, True, 2, "soft", 1e-4),
    "loco_soft_1e-3_r50_100ep": ("loco", PAIRS, "blocks", 1, True, 2, "soft", 1e-3),
    "loco_soft_1e-2_r50_100ep": ("loco", PAIRS, "blocks", 1, True, 2, "soft", 1e-2),
    "loco_share1block_r50_100ep": ("loco", ONE_BLOCK, "blocks", 1, True, 2, "hard", 0),
    "loco_share2blocks_r50_100ep": ("loco", TWO_BLOCKS, "blocks", 1, True, 2, "hard", 0),
    **{f"simclr_sh50{e}": ("simclr", END_TO_END, "blocks", 0, None, 2, "hard", 0) for e in ("", "_100ep")},
    **{f"gim_sh50{e}": ("gim", APART, "blocks", 0, None, 2, "hard", 0) for e in ("", "_100ep")},
    **{f"loco_sh50{e}": ("loco", PAIRS, "blocks", 1, True, 2, "hard", 0) for e in ("", "_100ep")},
    "simclr_presnet50_100ep": ("simclr", [["res2", "res7"]], "blocks", 0, None, 2, "hard", 0),
    "gim_presnet50_100ep": ("gim", SIX_APART, "blocks", 0, None, 2, "hard", 0),
    "loco_presnet50_100ep": ("loco", SIX_PAIRS, "blocks", 1, True, 2, "hard", 0),
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
    if "r50" in row.config:
        small["BACKBONE.NAME"] = "resnet18"
    words = [str(part) for pair in small.items() for part in pair]
    path = pretrain(load_config(get_cfg(), CONFIGS / f"{row.config}.yaml", words)[0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert len(lines) == 3
    losses = [key for key in lines[0] if key.startswith("loss/")]
    method = re.split("_(?:r50|presnet50|sh50)", row.config)[0]
    base = next(LOSSES[name] for name in (method, method.partition("_")[0]) if name in LOSSES)
    assert len(losses) == base + (0 if "presnet50" not in row.config or base == 1 else 2)
    assert load_backbone(path)[1].step == 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)
def test_the_header_says_the_papers_figure_and_the_schedule_is_its(row) -> None:
    (result,) = [line for line in (CONFIGS / f"{row.config}.yaml").read_text().splitlines() if "# Result:" in line]
    none = "the paper has no linear readout" if "sh50" in row.config else "the paper plots"
    assert (none if row.top1 is None else f"the paper {row.top1:.1f} %") in result
    assert "ours: not run" in result
    cfg = load_config(get_cfg(), CONFIGS / f"{row.config}.yaml")[0]
    solver = (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BATCH_SIZE, cfg.SOLVER.EPOCHS, cfg.SOLVER.WARMUP_EPOCHS)
    assert solver == ("lars", 4096, row.epochs, 10)
    peak = cfg.SOLVER.BASE_LR * cfg.SOLVER.BATCH_SIZE / 256
    assert peak == pytest.approx(4.8)
    assert (cfg.DECODER.OUT_DIM, cfg.DATA.IMAGE_SIZE) == (128, 224)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)
def test_units_decoder_and_sharing_are_the_papers(row) -> None:
    cfg = load_config(get_cfg(), CONFIGS / f"{row.config}.yaml")[0]
    with torch.device("meta"):
        units = unit_names(cfg, build_backbone(cfg))
    decoder = (cfg.DECODER.CONV, cfg.DECODER.CONV_BLOCKS, cfg.DECODER.DOWNSAMPLE if cfg.DECODER.CONV_BLOCKS else None)
    found = (cfg.METHOD, units, *decoder, cfg.DECODER.MLP_LAYERS, cfg.SHARING.MODE, cfg.SHARING.PENALTY)
    assert found == STATED[row.config]
    assert (cfg.BACKBONE.NAME == "presnet50") == ("presnet50" in row.config)
    assert (cfg.BACKBONE.NAME == "shufflenetv2_50") == ("sh50" in row.config)


def test_every_recipe_is_a_row_and_the_page_shows_them() -> None:
    others = (
        "base_",
        "evidence_",
        "quickstart",
        "random_",
        "loco_r18_cifar",
        "loco_vit_tiny_cifar",
        "one_card",
        "laptop",
    )
    recipes = {path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(others)}
    assert recipes == {row.config for row in ROWS}
    page = (ROOT / "docs" / "method.md").read_text()
    assert table() in page, "write it: python -m loco_det.paper.figures"
