"""The keys beside Detectron2's: accepted everywhere, invisible at their defaults, judged, and kept from Detectron2."""

from __future__ import annotations

from pathlib import Path

import pytest

from loco_det.core.config import flat, load_config, read_yaml
from loco_det.core.errors import UserError
from loco_det.core.own_keys import OWN_KEYS, own_value
from loco_det.detection.engine_d2 import Detectron2Engine
from loco_det.detection.keys import check_supported, check_task, get_cfg, load_cfg, stock

ROOT = Path(__file__).parent.parent
VIT = ["MODEL.BACKBONE.NAME", "timm:test_vit", "INPUT.MAX_SIZE_TEST", "1024", "INPUT.MAX_SIZE_TRAIN", "1024"]


def test_no_own_key_is_detectron2s_and_each_is_read_somewhere() -> None:
    assert not OWN_KEYS.keys() & flat(get_cfg()).keys()
    for key in OWN_KEYS:
        readers = [p for p in (ROOT / "loco_det").rglob("*.py") if p.name not in ("keys.py", "own_keys.py")]
        assert any(f'own_value(cfg, "{key}")' in path.read_text() for path in readers), key
        assert own_value(get_cfg(), key) == OWN_KEYS[key].default


def test_at_their_defaults_the_tree_is_detectron2s(tmp_path: Path) -> None:
    assert flat(load_cfg("")[0]) == flat(get_cfg())
    defaults = [text for key, (default, _) in OWN_KEYS.items() for text in (key, str(default))]
    cfg, settings = load_cfg("", defaults)
    assert flat(cfg) == flat(get_cfg())
    assert settings.keys() == OWN_KEYS.keys()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load_config(get_cfg(), tmp_path / "config.yaml")[0].dump() == get_cfg().dump()


def test_what_is_set_is_read_written_and_left_out_for_detectron2(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "SOLVER: {OPTIMIZER: AdamW, BETAS: [0.8, 0.99]}\nINPUT: {SCALE_JITTER: [0.1, 2]}\n"
    )
    cfg, settings = load_cfg(tmp_path / "a.yaml", ["SOLVER.LAYER_DECAY", "0.7", "SOLVER.BASE_LR", "0.5"])
    set_keys = {"SOLVER.OPTIMIZER", "SOLVER.BETAS", "SOLVER.LAYER_DECAY", "INPUT.SCALE_JITTER"}
    assert flat(cfg).keys() - flat(get_cfg()).keys() == set_keys
    assert (own_value(cfg, "SOLVER.BETAS"), own_value(cfg, "INPUT.SCALE_JITTER")) == ((0.8, 0.99), (0.1, 2))
    assert settings["SOLVER.LAYER_DECAY"].origin == "the command line"
    assert "line 1" in settings["SOLVER.OPTIMIZER"].origin
    check_supported(cfg, settings)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert read_yaml(tmp_path / "config.yaml")["SOLVER"]["OPTIMIZER"] == "AdamW"
    assert load_cfg(tmp_path / "config.yaml")[0].dump() == cfg.dump()
    assert flat(stock(cfg)) == flat(get_cfg()) | {"SOLVER.BASE_LR": 0.5}
    assert flat(cfg).keys() > flat(stock(cfg)).keys()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["SOLVER.OPTIMISER", "AdamW"], "there is no key SOLVER.OPTIMISER; did you mean SOLVER.OPTIMIZER"),
        (["SOLVER.OPTIMIZER", "Adam"], "the command line: SOLVER.OPTIMIZER is 'Adam'; use SGD or AdamW"),
        (["SOLVER.OPTIMIZER", "3"], "SOLVER.OPTIMIZER takes a value of type str"),
        (["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BETAS", "(0.9,)"], "give two numbers from 0 to below 1"),
        (["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BETAS", "(0.9, 1.0)"], "give two numbers from 0 to below 1"),
        (["SOLVER.BETAS", "(0.9, 0.99)"], "which SGD does not have; set SOLVER.OPTIMIZER AdamW"),
        (
            ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.NESTEROV", "True"],
            "SOLVER.NESTEROV is True, which AdamW does not have",
        ),
        (["SOLVER.LAYER_DECAY", "0.0"], "SOLVER.LAYER_DECAY is 0.0; give a factor above 0, up to 1"),
        (["SOLVER.LAYER_DECAY", "1.2"], "give a factor above 0, up to 1"),
        (["SOLVER.LAYER_DECAY", "0.7", "SOLVER.BIAS_LR_FACTOR", "2.0"], "needs SOLVER.BIAS_LR_FACTOR 1.0"),
        (["SOLVER.WEIGHT_DECAY_POSITIONS", "some"], "SOLVER.WEIGHT_DECAY_POSITIONS is 'some'; give a finite number"),
        (["SOLVER.WEIGHT_DECAY_POSITIONS", "-1"], "give a finite number that is not negative"),
        (["SOLVER.WEIGHT_DECAY_POSITIONS", "1e999"], "give a finite number that is not negative"),
        (["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "fp8"], "is 'fp8'; use auto, fp16 or bf16"),
        (["SOLVER.AMP.DTYPE", "bf16"], "SOLVER.AMP.DTYPE is 'bf16', but SOLVER.AMP.ENABLED is False; set that to True"),
        (["INPUT.SCALE_JITTER", "(0.1,)"], "give the least and the largest scale"),
        (["INPUT.SCALE_JITTER", "(0.0, 1.0)"], "give the least and the largest scale"),
        (["INPUT.SCALE_JITTER", "(2.0, 0.1)"], "give the least and the largest scale"),
        (["INPUT.SCALE_JITTER", "('a', 2.0)"], "give the least and the largest scale"),
        (["INPUT.SCALE_JITTER", "(0.1, 2.0)", "INPUT.CROP.ENABLED", "True"], "INPUT.SCALE_JITTER crops already"),
        (["INPUT.SCALE_JITTER", "(0.1, 2.0)", "INPUT.SCALE_JITTER_SIZE", "0"], "give a size in pixels"),
        (["INPUT.SCALE_JITTER_PAD", "True"], "INPUT.SCALE_JITTER is off"),
        (["INPUT.SCALE_JITTER_SIZE", "512"], "INPUT.SCALE_JITTER is off"),
        (
            ["MODEL.BACKBONE.SQUARE_PAD", "1024"],
            "which is for a MODEL.BACKBONE.NAME timm:..., hf:..., python:..., presnet50 or",
        ),
        ([*VIT, "MODEL.BACKBONE.SQUARE_PAD", "1000"], "give a multiple of 32 pixels"),
        ([*VIT, "MODEL.BACKBONE.SQUARE_PAD", "-32"], "give a multiple of 32 pixels"),
        ([*VIT, "MODEL.BACKBONE.SQUARE_PAD", "512"], "and INPUT.MAX_SIZE_TEST is 1024; lower INPUT.MAX_SIZE_TEST or"),
        ([*VIT, "MODEL.BACKBONE.SQUARE_PAD", "1024", "INPUT.MAX_SIZE_TRAIN", "1333"], "INPUT.MAX_SIZE_TRAIN is 1333"),
        (
            [
                *VIT,
                "MODEL.BACKBONE.SQUARE_PAD",
                "1024",
                "TEST.AUG.ENABLED",
                "True",
                "MODEL.META_ARCHITECTURE",
                "GeneralizedRCNN",
            ],
            "TEST.AUG.MAX_SIZE is 4000",
        ),
    ],
)
def test_impossible_values_are_one_sentence(overrides: list[str], said: str) -> None:
    """With either engine."""
    with pytest.raises(UserError, match=said.replace(".", r"\.").replace("(", r"\(")) as refused:
        check_task(*load_cfg("", overrides))
    assert str(refused.value).count("\n") == 0


def test_what_vitdet_sets_is_accepted() -> None:
    jitter = ["INPUT.SCALE_JITTER", "(0.1, 2.0)", "INPUT.MAX_SIZE_TRAIN", "1333"]  # which jitter does not read
    check_task(*load_cfg("", [*VIT, *jitter, "MODEL.BACKBONE.SQUARE_PAD", "1024"]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool"], "MODEL.ROI_BOX_HEAD.POOLER_TYPE is 'ROIPool', whose gradient"),
        (["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIPool"], "MODEL.ROI_MASK_HEAD.POOLER_TYPE is 'ROIPool', whose"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "is 'SemanticSegmentor', whose gradient on a GPU differs"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"], "MODEL.RESNETS.DEFORM_ON_PER_STAGE is"),
    ],
)
def test_what_no_gpu_repeats_is_refused_with_deterministic(overrides: list[str], said: str) -> None:
    fits = ["MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
    check_supported(*load_cfg("", [*fits, *overrides]))
    with pytest.raises(UserError, match=said):
        check_supported(*load_cfg("", [*fits, *overrides, "DETERMINISTIC", "True"]))
    check_supported(*load_cfg("", [*fits, "DETERMINISTIC", "True"]))


def test_deterministic_is_the_torchvision_engines() -> None:
    Detectron2Engine().check(*load_cfg("", ["DETERMINISTIC", "False"]))
    with pytest.raises(UserError, match=r"the command line: DETERMINISTIC is True, but .* use --engine torchvision"):
        Detectron2Engine().check(*load_cfg("", ["DETERMINISTIC", "True"]))


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_detectron2_never_sees_them(tmp_path: Path) -> None:
    config = pytest.importorskip("detectron2.config")
    from loco_det.detection.engine_d2 import _native

    cfg, _ = load_cfg("", ["SOLVER.OPTIMIZER", "AdamW", "INPUT.SCALE_JITTER", "(0.1, 2.0)", "SOLVER.BASE_LR", "0.5"])
    native = _native(cfg)
    assert flat(native) == flat(config.get_cfg()) | {"SOLVER.BASE_LR": 0.5}
    (tmp_path / "config.yaml").write_text(load_cfg("", ["SOLVER.BASE_LR", "0.5", "SOLVER.OPTIMIZER", "SGD"])[0].dump())
    theirs = config.get_cfg()
    theirs.merge_from_file(str(tmp_path / "config.yaml"))
    assert theirs.dump() == native.dump()
