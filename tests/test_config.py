"""Configuration: files, bases, overrides, error messages; the detection tree and its table."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import yaml
from fvcore.common.config import CfgNode

from loco_det.core.config import MAX_NODES, find_config, flat, load_config, read_settings, read_yaml
from loco_det.core.errors import UserError
from loco_det.core.own_keys import OWN_KEYS
from loco_det.detection.keys import SUPPORTED, check_supported, get_cfg, load_cfg

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted(f for folder in ("", "paper", "recipes") for f in (REPOSITORY / "configs" / folder).glob("*.yaml"))
STOCK = [path for path in CONFIGS if not OWN_KEYS.keys() & read_settings(path).keys()]


def defaults() -> CfgNode:
    return CfgNode(
        {
            "NAME": "x",
            "SEED": -1,
            "DECAY": None,
            "SIZES": [[32.0, 64.0]],
            "SOLVER": {"BASE_LR": 0.1, "STEPS": (3, 4), "AMP": {"ENABLED": False}},
        }
    )


@pytest.fixture
def load(tmp_path: Path):
    """Write the text as a.yaml (other files too) and load it over the defaults."""

    def write_and_load(text: str, overrides: list[str] = (), **others: str) -> CfgNode:
        for name, content in {"a": text, **others}.items():
            (tmp_path / f"{name}.yaml").write_text(textwrap.dedent(content))
        return load_config(defaults(), tmp_path / "a.yaml", list(overrides))[0]

    return write_and_load


def test_file_bases_and_overrides_apply_in_this_order(load):
    cfg = load(
        """
        _BASE_: [b.yaml, c.yaml]
        SOLVER: {BASE_LR: 1e-4}
        """,
        ["SOLVER.STEPS", "(7,)", "SEED", "-3"],
        b="SOLVER: {BASE_LR: 5.0, AMP: {ENABLED: True}}\nNAME: from b",
        c="NAME: from c\nSEED: 8",
    )
    assert (cfg.NAME, cfg.SEED) == ("from c", -3)
    assert cfg.SOLVER.BASE_LR == 1e-4  # YAML 1.1 reads 1e-4 as text; yacs and we read a number
    assert cfg.SOLVER.STEPS == (7,)
    assert cfg.SOLVER.AMP.ENABLED is True
    assert cfg.is_frozen()
    assert not defaults().is_frozen()


def test_values_take_the_type_of_their_default(load):
    cfg = load("SOLVER: {BASE_LR: 1, STEPS: [5, 6]}\nDECAY: 0.5\nSIZES: ((1, 2), (3,))")
    assert (cfg.SOLVER.BASE_LR, type(cfg.SOLVER.BASE_LR)) == (1.0, float)
    assert cfg.SOLVER.STEPS == (5, 6)
    assert cfg.DECAY == 0.5
    assert cfg.SIZES == [(1, 2), (3,)]


def test_an_empty_file_is_the_defaults(load):
    assert load("# nothing\n") == defaults()


def test_settings_know_where_they_were_written(tmp_path):
    (tmp_path / "b.yaml").write_text("NAME: b\nSEED: 1\n")
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\nSOLVER:\n  BASE_LR: 2.0\n")
    _, found = load_config(defaults(), tmp_path / "a.yaml", ["SEED", "3"])
    assert {key: s.origin.rpartition("/")[2] for key, s in found.items()} == {
        "NAME": "b.yaml, line 1",
        "SOLVER.BASE_LR": "a.yaml, line 3",
        "SEED": "the command line",
    }


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("SOLVER:\n  BASE_LRR: 1.0", [], ["a.yaml, line 2", "SOLVER.BASE_LRR", "did you mean SOLVER.BASE_LR?"]),
        ("SOLVR: {BASE_LR: 1.0}", [], ["SOLVR.BASE_LR", "did you mean SOLVER.BASE_LR?"]),
        ("BASE_LR: 1.0", [], ["BASE_LR", "did you mean SOLVER.BASE_LR?"]),
        ("solver: {base_lr: 1.0}", [], ["solver.base_lr", "did you mean SOLVER.BASE_LR?"]),
        ("NAME: a", ["SOLVER.LR", "0.1"], ["SOLVER.LR", "did you mean SOLVER.BASE_LR?"]),
        ("SOLVER: {QUITE_ELSE: 1.0}", [], ["SOLVER.QUITE_ELSE", "remove it"]),
        ("QUITE_ELSE: 1.0", [], ["QUITE_ELSE", "remove it"]),
        ("NAME: a\nSEED: 1\nNAME: b", [], ["a.yaml, line 3", "NAME", "twice", "line 1"]),
        ("SOLVER:\n  BASE_LR: 1.0\nSOLVER:\n  AMP: {}", [], ["line 3", "SOLVER", "twice"]),
        ("SOLVER: {BASE_LR: fast}", [], ["SOLVER.BASE_LR", "type float", "'fast' of type str"]),
        ("SEED: 1.5", [], ["SEED", "type int", "1.5 of type float"]),
        ("SEED: true", [], ["SEED", "type int", "bool"]),
        ("SOLVER: {AMP: {ENABLED: 1}}", [], ["SOLVER.AMP.ENABLED", "type bool", "1 of type int"]),
        ("NAME: null", [], ["NAME", "type str", "null"]),
        ("NAME: [a]", [], ["NAME", "type str", "type list"]),
        ("SOLVER: {STEPS: [1, x]}", [], ["SOLVER.STEPS", "numbers", "'x'"]),
        ("SOLVER: 3", [], ["SOLVER", "section", "3 of type int"]),
        ("DECAY: {A: 1}", [], ["DECAY"]),
        ("SOLVER: \"{'BASE_LR': 1.0}\"", [], ["SOLVER", "section"]),
        ("SEED: \"{'A': 1}\"", [], ["a.yaml, line 1", "SEED", "type int"]),
        ("NAME.X: 3", [], ["NAME.X", "nested"]),
        ("1: 3", [], ["keys are words"]),
        ("SEED: !!int ''", [], ["a.yaml, line 1", "'' is not of type int"]),
        ("NAME: x\nSEED: !!int [1]", [], ["a.yaml, line 2", "scalar"]),
        ("[1, 2]", [], ["KEY: VALUE", "list"]),
        ("NAME: [", [], ["a.yaml", "not valid YAML"]),
        ("_BASE_: a.yaml", [], ["_BASE_", "circle"]),
        ("_BASE_: missing.yaml", [], ["line 1", "missing.yaml", "does not exist"]),
        ("_BASE_: https://x.org/a.yaml", [], ["https://x.org/a.yaml", "download"]),
        ("_BASE_: {A: 1}", [], ["_BASE_", "file name"]),
        ("NAME: a", ["SOLVER.STEPS", "[x, y]"], ["SOLVER.STEPS", "type tuple", 'write SOLVER.STEPS "(']),
        ("NAME: a", ["SEED"], ["SEED", "KEY VALUE"]),
        ("NAME: a", ["SEED=3"], ["SEED=3", "KEY VALUE"]),
        ("NAME: a", ["SEDE", "3"], ["the command line", "SEDE", "did you mean SEED?"]),
        ("NAME: a", ["SEED", "many"], ["the command line", "SEED", "type int", "'many'"]),
        ("NAME: a", ["SOLVER", "{'BASE_LR': 1.0}"], ["SOLVER", "section"]),
        ("NAME: a", ["NAME.X", "1"], ["NAME.X", "set NAME itself"]),
        ("NAME: a", ["_BASE_", "b.yaml"], ["_BASE_", "file only"]),
    ],
)
def test_refusals_name_place_key_and_remedy(load, text, overrides, words):
    with pytest.raises(UserError) as refused:
        load(text, overrides)
    for word in words:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_circle_over_three_files_is_found(load):
    with pytest.raises(UserError, match=r"a.yaml -> b.yaml -> c.yaml -> a.yaml"):
        load("_BASE_: b.yaml", b="_BASE_: c.yaml", c="_BASE_: a.yaml")


def test_the_same_base_twice_is_no_circle(load):
    assert load("_BASE_: [b.yaml, c.yaml]", b="_BASE_: d.yaml", c="_BASE_: d.yaml", d="NAME: d").NAME == "d"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"NAME: \x07", b"\t- a"])
def test_what_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.yaml"):
        load_config(defaults(), tmp_path / "a.yaml")


def test_python_tags_are_plain_data_and_nothing_is_constructed(load, tmp_path):
    touched = tmp_path / "touched"
    cfg = load(
        f"""
        !!python/object/new:fvcore.common.config.CfgNode
        dictitems:
          NAME: !!python/name:os.system ''
          SOLVER: !!python/object/new:somewhere.else.CfgNode
            dictitems:
              STEPS: !!python/tuple [5, 6]
              BASE_LR: !!python/float '0.25'
            state: {{__immutable__: false, hook: !!python/object/apply:os.system ["touch {touched}"]}}
        state: &s {{__deprecated_keys__: !!set {{}}, __immutable__: false}}
        """
    )
    assert cfg.NAME == "os.system"
    assert cfg.SOLVER.STEPS == (5, 6)
    assert cfg.SOLVER.BASE_LR == 0.25
    assert not touched.exists()
    with pytest.raises(UserError, match="NAME"):
        load(f"NAME: !!python/object/apply:os.system ['touch {touched}']")
    assert not touched.exists()
    with pytest.raises(UserError, match=r"line 1: SOLVER.STEPS .*python/object/apply:eval' .*never run here"):
        load("SOLVER: {STEPS: !!python/object/apply:eval ['[5 * x for x in (1, 2)]']}")


def test_what_yaml_dumps_of_a_cfgnode_is_read_back(tmp_path):
    changed = defaults()
    changed.SOLVER.STEPS, changed.SEED = (9,), 4
    (tmp_path / "a.yaml").write_text(yaml.dump(changed))
    assert "!!python/object" in (tmp_path / "a.yaml").read_text()
    assert load_config(defaults(), tmp_path / "a.yaml")[0] == changed


def test_merge_keys_and_aliases_are_yaml_as_usual(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &x {A: 1, B: 2}\ny: {<<: *x, B: 3}\nz: [*x, 2001-01-01]\n")
    assert read_yaml(tmp_path / "a.yaml") == {
        "x": {"A": 1, "B": 2},
        "y": {"A": 1, "B": 3},
        "z": [{"A": 1, "B": 2}, "2001-01-01"],
    }


@pytest.mark.parametrize("text", ["a: &a {b: *a}", "a: &a [*a]", "&a {<<: *a}"])
def test_a_value_that_contains_itself_is_refused(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="contains it"):
        read_yaml(tmp_path / "a.yaml")


def test_what_is_too_large_for_a_configuration_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "a.yaml").write_text("a: " + "x" * (1 << 22))
    with pytest.raises(UserError, match=r"a\.yaml has more than 1 MB"):
        read_settings(tmp_path / "a.yaml")


def test_an_alias_bomb_is_refused_before_it_fills_the_memory(tmp_path):
    levels = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "a.yaml").write_text("\n".join(levels))
    with pytest.raises(UserError, match=str(MAX_NODES)):
        read_yaml(tmp_path / "a.yaml")


def test_deep_nesting_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("a: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_yaml(tmp_path / "a.yaml")


def test_the_home_of_nobody_is_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"There is no configuration file ~nosuchuser/x.yaml"):
        load_config(defaults(), "~nosuchuser/x.yaml")
    (tmp_path / "a.yaml").write_text("_BASE_: ~nosuchuser/x.yaml\n")
    with pytest.raises(UserError, match=r"a.yaml, line 1: the _BASE_ file .*nosuchuser/x.yaml does not exist"):
        load_config(defaults(), tmp_path / "a.yaml")


def test_a_base_of_this_package_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text('_BASE_: "configs/base_rcnn_fpn.yaml"\nSEED: 3\n')
    cfg, settings = load_config(get_cfg(), "own.yaml")
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"
    assert "base_rcnn_fpn.yaml" in settings["MODEL.BACKBONE.NAME"].origin
    (tmp_path / "own.yaml").write_text('_BASE_: "configs/base_rcnn_fpm.yaml"\n')
    with pytest.raises(UserError, match=r"own\.yaml, line 1: the _BASE_ file .*base_rcnn_fpm\.yaml does not exist"):
        load_config(get_cfg(), "own.yaml")


def test_configs_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("configs/coco_loco_r50.yaml", "coco_loco_r50.yaml"):
        assert find_config(name).is_file()
    own = tmp_path / "configs" / "coco_loco_r50.yaml"
    own.parent.mkdir()
    own.write_text("NAME: mine")
    assert find_config("configs/coco_loco_r50.yaml").resolve() == own  # the user's own file comes first
    with pytest.raises(UserError, match=r"coco_loko_r50.yaml; did you mean configs/coco_loco_r50.yaml\?$"):
        find_config("coco_loko_r50.yaml")


# --- the detection tree -----------------------------------------------------------------------------------------


def test_get_cfg_gives_independent_copies():
    first = get_cfg()
    first.SOLVER.BASE_LR = 7.0
    assert get_cfg().SOLVER.BASE_LR == 0.001
    assert get_cfg().INPUT.MIN_SIZE_TRAIN == (800,)


def test_every_honoured_key_exists_and_takes_its_default():
    tree = flat(get_cfg())
    for key, allowed in SUPPORTED.items():
        assert key in tree
        default = list(tree[key]) if isinstance(tree[key], tuple) else tree[key]
        assert allowed is None or default in allowed, key


def test_every_honoured_key_is_read_somewhere():
    # An option that nobody reads is worse than one that is refused.
    code = "\n".join(path.read_text() for path in (REPOSITORY / "loco_det").rglob("*.py") if path.name != "keys.py")
    fixed = {key for key, allowed in SUPPORTED.items() if allowed is not None and len(allowed) == 1}
    unread = [key for key in SUPPORTED if key not in fixed and key.rpartition(".")[2] not in code]
    assert not unread


def test_a_key_that_is_not_honoured_is_refused_by_name(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("MODEL:\n  META_ARCHITECTURE: RetinaNet\n")
    with pytest.raises(UserError) as refused:
        check_supported(*load_config(get_cfg(), path))
    for word in ("a.yaml, line 2", "MODEL.META_ARCHITECTURE is 'RetinaNet'", "--engine detectron2"):
        assert word in str(refused.value)
    with pytest.raises(UserError, match=r"GLOBAL.HACK is 2.0; Detectron2 knows this key"):
        check_supported(load_config(get_cfg(), "", ["GLOBAL.HACK", "2.0"])[0])
    with pytest.raises(UserError, match=r"did you mean MODEL.ROI_HEADS.NUM_CLASSES"):
        load_config(get_cfg(), "", ["MODEL.ROI_HEAD.NUM_CLASSES", "3"])


def test_the_dumped_tree_passes_and_comes_back(tmp_path):
    (tmp_path / "config.yaml").write_text(get_cfg().dump())
    cfg = load_config(get_cfg(), tmp_path / "config.yaml")[0]
    check_supported(cfg)
    assert cfg.dump() == get_cfg().dump()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_honoured_and_says_how_to_run_it(path):
    check_supported(load_cfg(path)[0])
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    if path.name.startswith(("coco_", "voc_", "cityscapes_", "lvis_")):
        named = path.relative_to(REPOSITORY).as_posix()
        assert any(line.startswith("# Command:") and named in line for line in head)
        assert any(line.startswith("# Hardware:") for line in head)
        assert any(line.startswith("# Result:") for line in head)
        assert len(path.read_text().splitlines()) - len(head) <= 12  # a short diff over its bases


def test_frozen_and_fine_tuned_differ_where_they_should():
    frozen = flat(load_config(get_cfg(), "configs/coco_loco_r50.yaml")[0])
    tuned = flat(load_config(get_cfg(), "configs/coco_loco_r50_finetune.yaml")[0])
    other = flat(load_config(get_cfg(), "configs/coco_simclr_r50.yaml")[0])
    assert {key for key in frozen if frozen[key] != tuned[key]} == {
        "MODEL.BACKBONE.FREEZE_AT",
        "MODEL.RESNETS.NORM",
        *(f"MODEL.ROI_BOX_HEAD.{key}" for key in ("NUM_CONV", "NUM_FC", "NORM")),  # the frozen one is the paper's
        "MODEL.ROI_MASK_HEAD.NORM",
        "INPUT.MIN_SIZE_TRAIN",
        "OUTPUT_DIR",
    }
    assert {key for key in frozen if frozen[key] != other[key]} == {"MODEL.WEIGHTS", "OUTPUT_DIR"}


def test_cityscapes_has_detectron2s_settings():
    """Source: Detectron2 configs/Cityscapes/mask_rcnn_R_50_FPN.yaml; everything else is as for COCO."""
    coco, found = (flat(load_config(get_cfg(), f"configs/{name}_loco_r50.yaml")[0]) for name in ("coco", "cityscapes"))
    assert {key: found[key] for key in found if found[key] != coco[key]} == {
        "MODEL.ROI_HEADS.NUM_CLASSES": 8,
        "DATASETS.TRAIN": ("cityscapes_fine_instance_seg_train",),
        "DATASETS.TEST": ("cityscapes_fine_instance_seg_val",),
        "INPUT.MIN_SIZE_TRAIN": (800, 832, 864, 896, 928, 960, 992, 1024),
        "INPUT.MIN_SIZE_TEST": 1024,
        "INPUT.MAX_SIZE_TRAIN": 2048,
        "INPUT.MAX_SIZE_TEST": 2048,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.STEPS": (18000,),
        "SOLVER.MAX_ITER": 24000,
        "TEST.EVAL_PERIOD": 8000,
        "OUTPUT_DIR": "output/cityscapes_loco_r50",
    }


@pytest.mark.detectron2
def test_the_recorded_tree_is_detectron2s():
    config = pytest.importorskip("detectron2.config")
    theirs, ours = flat(config.get_cfg()), flat(get_cfg())
    assert theirs == ours
    assert {key: type(value) for key, value in theirs.items()} == {key: type(value) for key, value in ours.items()}


def test_only_recipes_with_adamw_have_keys_beside_detectron2s():
    others = {path.name for path in set(CONFIGS) - set(STOCK)}
    assert others == {"base_vitdet.yaml", "coco_vitdet_b.yaml", "bob_coco_r50_frozen.yaml"}


@pytest.mark.detectron2
@pytest.mark.parametrize("path", STOCK, ids=lambda path: path.stem)
def test_every_shipped_config_means_the_same_to_unmodified_detectron2(path):
    config = pytest.importorskip("detectron2.config")
    theirs = config.get_cfg()
    theirs.merge_from_file(str(path))
    assert flat(theirs) == flat(load_config(get_cfg(), path)[0])


@pytest.mark.detectron2
def test_detectron2s_own_yaml_files_read_the_same():
    config = pytest.importorskip("detectron2.config")
    zoo = pytest.importorskip("detectron2.model_zoo")
    for name in (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
    ):
        path = zoo.get_config_file(name)
        theirs = config.get_cfg()
        theirs.merge_from_file(path)
        assert flat(theirs) == flat(load_config(get_cfg(), path)[0])


def test_the_documented_table_is_the_codes():
    from record_key_table import PAGE, with_table

    page = PAGE.read_text()
    assert page == with_table(page), "run python tests/record_key_table.py"


def test_a_link_to_itself_is_one_sentence(tmp_path):
    (tmp_path / "config.yaml").symlink_to(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_settings(tmp_path / "config.yaml")
