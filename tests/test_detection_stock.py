"""Every YAML file that comes with Detectron2: the torchvision engine builds the same model or refuses it by name.

What the files set is recorded (tests/record_stock_configs.py), so this runs where Detectron2 is absent.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode
from record_stock_configs import flat, form

from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection import engine_d2
from loco_det.detection.keys import SUPPORTED, check_supported, get_cfg
from loco_det.detection.rcnn import build_model

STOCK = json.loads((Path(__file__).parent / "golden" / "stock_configs.json").read_text())
CONFIGS: dict[str, dict[str, Any]] = STOCK["configs"]

# What this engine is not for, with the key that says so; every other stock file is honoured in full.
REFUSED = {
    "MODEL.META_ARCHITECTURE": ("RetinaNet", "PanopticFPN"),
    "MODEL.KEYPOINT_ON": (True,),
}


def configured(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in CONFIGS[name]["sets"].items() for item in pair])
    return cfg


def reasons(name: str) -> list[str]:
    sets = CONFIGS[name]["sets"]
    return [key for key, values in REFUSED.items() if sets.get(key) in values]


def test_the_record_says_where_it_comes_from() -> None:
    assert len(STOCK["commit"]) == 40
    assert STOCK["detectron2"]
    assert len(CONFIGS) > 70
    assert {name.partition("/")[0] for name in CONFIGS} >= {
        "COCO-Detection", "COCO-InstanceSegmentation", "PascalVOC-Detection", "Cityscapes", "Misc", "quick_schedules",
    }  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stock_config_is_honoured_or_refused_by_name(name: str) -> None:
    if not reasons(name):
        check_supported(configured(name))
        return
    with pytest.raises(UserError) as refused:
        check_supported(configured(name))
    assert any(f"{key} is " in str(refused.value) for key in reasons(name))
    other_engine = "--engine detectron2" in str(refused.value)
    assert other_engine == (CONFIGS[name]["sets"].get("MODEL.META_ARCHITECTURE") == "RetinaNet")
    if not other_engine:
        with pytest.raises(UserError, match="with either engine; use Detectron2 itself"):
            engine_d2.Detectron2Engine().check(configured(name))


def test_the_purpose_of_the_engine_is_honoured_whole() -> None:
    """No Fast, Faster or Mask R-CNN of the four groups is refused."""
    ours = ("COCO-Detection/fast", "COCO-Detection/rpn", "COCO-Inst", "PascalVOC", "Cityscapes", "LVIS", "Base-RCNN")
    names = [name for name in CONFIGS if name.startswith(ours)]
    assert len(names) > 30
    assert not any(reasons(name) for name in names)
    others = {name for name in CONFIGS if not name.startswith(ours) and not reasons(name)}
    assert {name.partition("/")[0] for name in others} == {"Detectron1-Comparisons", "Misc", "quick_schedules"}


def test_every_key_of_a_stock_config_is_in_the_table() -> None:
    used = defaultdict(list)
    for name in CONFIGS:
        for key in [] if reasons(name) else CONFIGS[name]["sets"]:
            used[key].append(name)
    assert len(used) > 60
    assert {key: names for key, names in used.items() if key not in SUPPORTED} == {}


def test_models_have_the_tensors_of_detectron2() -> None:
    """Names and shapes of all tensors, in full size; files that describe the same network are built once."""
    seen: dict[str, dict[str, Any]] = {}
    for name, recorded in CONFIGS.items():
        if reasons(name):
            continue
        network = json.dumps({k: v for k, v in recorded["sets"].items() if k.startswith("MODEL.")}, sort_keys=True)
        if network not in seen:
            with torch.device("meta"):
                seen[network] = form(build_model(configured(name)))
        assert seen[network] == recorded["model"], name
    assert len(seen) > 25


@pytest.mark.detectron2
def test_the_files_themselves_say_what_is_recorded() -> None:
    pytest.importorskip("detectron2")
    from record_stock_configs import stock_configs

    files = stock_configs()
    assert set(files) == set(CONFIGS)
    defaults = flat(get_cfg())
    for name, path in files.items():
        if CONFIGS[name]["sets"].get("MODEL.META_ARCHITECTURE") == "RetinaNet":
            with pytest.raises(UserError, match=r"Base-RetinaNet.yaml, line 8: .* never run here"):
                load_config(get_cfg(), path)  # its anchors' sizes are computed
            continue
        found = flat(load_config(get_cfg(), path)[0])
        assert {k: v for k, v in found.items() if v != defaults[k]} == CONFIGS[name]["sets"], name
