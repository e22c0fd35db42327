"""One spelling in every command, and answers that lead on: help, keys, configurations, completion, lines to type."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from tiny_detection import RESNET_18, tiny_cfg

from loco_det import arguments, cli
from loco_det.annotations.formats.conversion import FORMATS
from loco_det.cli import JOBS, main
from loco_det.commands import predict
from loco_det.commands import train as train_command
from loco_det.core.config import example, flat, load_config, shell_value
from loco_det.core.errors import UserError
from loco_det.core.own_keys import OWN_KEYS
from loco_det.detection import foreign_weights, keys
from loco_det.detection.train import train_net
from loco_det.evaluation import cityscapes, coco
from loco_det.evaluation.probes import linear, segmentation, tsne
from loco_det.images import views
from loco_det.paper import plan
from pretrain import defaults

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/coco_loco_r50.yaml"


def parsed(name: str, *argv: str) -> argparse.Namespace:
    return cli._parsed(cli._parser(name, name), argv)


# --- one spelling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "doctor", "predict", "sweep"])
def test_weights_config_and_overrides_are_spelled_alike(name: str) -> None:
    needed = {"predict": ["photo.jpg"], "sweep": ["--out", "o"]}.get(name, [])
    argv = ["SOLVER.BASE_LR", "0.5", "--config-file", "a.yaml", *needed, "--weights", "w.pth", "MODEL.MASK_ON", "True"]
    argv += ["--config-file", "b.yaml", "SOLVER.STEPS", "(3,)"]
    args = parsed(name, *argv)
    assert args.config_file == ["a.yaml", "b.yaml"]
    assert args.opts == ["SOLVER.BASE_LR", "0.5", "MODEL.MASK_ON", "True", "SOLVER.STEPS", "(3,)"]
    assert (args.backbones if name == "sweep" else args.weights) == (["w.pth"] if name == "sweep" else "w.pth")
    if name == "predict":
        assert args.inputs == ["photo.jpg"]


def test_old_spellings_are_accepted() -> None:
    args = parsed("predict", "a.jpg", "--config-file", "c.yaml", "--weights", "w", "--opts", "SEED", "3")
    assert args.opts == ["SEED", "3"]
    args = parsed("sweep", "--backbones", "a", "b", "--out", "o", "--set", "SEED", "3", "--config-file", "c.yaml")
    assert (args.backbones, args.set) == (["a", "b"], ["SEED", "3"])
    assert parsed("probe", "w.pth", "--data", "d", "--protocol", "knn").backbone == "w.pth"
    assert parsed("probe", "--weights", "w.pth", "--data", "d", "--protocol", "knn").backbone_too == "w.pth"


def test_a_key_is_no_key_where_it_is_a_value_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("PHOTO.JPG").touch()
    args = parsed("predict", "PHOTO.JPG", "--weights", "MODEL.PTH", "SOLVER.MAX_ITER", "3", "--out", "OUT.DIR")
    assert (args.inputs, args.weights, args.out) == (["PHOTO.JPG"], "MODEL.PTH", Path("OUT.DIR"))
    assert args.opts == ["SOLVER.MAX_ITER", "3"]


def test_a_key_without_a_value_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config-file", CONFIG, "SOLVER.MAX_ITER", "--resume"]) == 2
    assert "'SOLVER.MAX_ITER' has no partner" in capsys.readouterr().err


def test_of_several_files_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("SEED: 3\nSOLVER: {BASE_LR: 0.5}\n")
    (tmp_path / "b.yaml").write_text("SEED: 4\n")
    cfg, settings = load_config(keys.get_cfg(), [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["SOLVER.GAMMA", "0.2"])
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (4, 0.5, 0.2)
    assert settings["SEED"].origin == f"{tmp_path / 'b.yaml'}, line 1"


def test_a_probe_takes_one_backbone(capsys: pytest.CaptureFixture) -> None:
    for backbone in ([], ["a.pth", "--weights", "b.pth"]):
        assert main(["probe", *backbone, "--data", "d", "--protocol", "knn"]) == 2
        assert "give one backbone" in capsys.readouterr().err


def test_the_choices_offered_are_those_that_there_are() -> None:
    assert (*coco.EVALUATORS, cityscapes.OFFICIAL) == arguments.EVALUATORS
    assert tuple(FORMATS) == arguments.ANNOTATION_FORMATS
    assert tuple(plan.TARGETS) == arguments.PAPER_TARGETS
    assert plan.SCALES == arguments.PAPER_SCALES
    assert tuple(views.PRESETS) == arguments.PRESETS
    assert arguments.DENSE_METHODS == segmentation.METHODS
    assert tuple(linear.RATES) == arguments.OPTIMIZERS
    assert (arguments.TSNE_IMAGES, arguments.TSNE_CLASSES) == (tsne.IMAGES, tsne.CLASSES)


# --- help, keys, configurations, completion ---------------------------------------------------------------------


def test_arguments_and_help_import_nothing_heavy() -> None:
    """Neither the parser of any command nor `python -m loco_det` loads torch, NumPy or YAML."""
    code = (
        "import sys, runpy\nfrom loco_det import cli\n"
        "texts = [cli._parser(name, name).format_help() for name in cli.JOBS]\n"
        "sys.argv = ['loco-det']\n"
        "try: runpy.run_module('loco_det', run_name='__main__')\nexcept SystemExit as end: assert end.code == 0\n"
        "print('HEAVY', sorted({'torch', 'numpy', 'cv2', 'rich', 'yaml', 'fvcore', 'pretrain'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.endswith("HEAVY []\n"), done.stderr
    assert done.stdout.startswith("usage: loco-det")  # without arguments: the help
    for name in JOBS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize(("argv", "status"), [(["configs"], 141), (["pretrain", "--keys"], 1)])  # 1: rich's own
def test_a_reader_that_leaves_early_is_no_error(argv: list[str], status: int) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        line = [sys.executable, "-m", "loco_det", *argv]
        done = subprocess.run(line, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (status, "")


def test_another_broken_pipe_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a worker process or a connection, say."""

    def run(_: argparse.Namespace) -> int:
        raise BrokenPipeError("a worker's")

    monkeypatch.setattr("loco_det.commands.configs.run", run)
    with pytest.raises(BrokenPipeError, match="a worker's"):
        main(["configs"])


@pytest.mark.parametrize(("word", "meant"), [("prtrain", "pretrain"), ("tarin", "train"), ("eval", "evaluate")])
def test_a_misspelt_command_is_answered_with_the_right_one(
    word: str, meant: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as info:
        main([word])
    assert info.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_every_key_has_a_meaning() -> None:
    assert set(keys.meanings()) == {*keys.SUPPORTED, *OWN_KEYS}
    assert set(defaults.meanings()) == set(flat(defaults.get_cfg()))
    for text in (*keys.meanings().values(), *defaults.meanings().values()):
        assert len(text) > 4, text


@pytest.mark.parametrize(
    ("argv", "there", "absent"),
    [
        (["train", "--keys", "SOLVER.CLIP_GRADIENTS"], ["SOLVER.CLIP_GRADIENTS.NORM_TYPE", "2.0"], "SOLVER.GAMMA"),
        (["train", "--keys", "seed"], ["SEED", "-1"], "SOLVER"),
        (["train", "--keys"], ["MODEL.WEIGHTS", "SOLVER.GAMMA", "0.1"], "MODEL.RETINANET"),
        (["pretrain", "--keys", "LOSS"], ["LOSS.TEMPERATURE", "0.1", "similarities are divided"], "SOLVER"),
    ],
)
def test_keys_are_printed_with_default_and_meaning(
    argv: list[str], there: list[str], absent: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in there)
    assert absent not in out


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("SLOVER", "did you mean SOLVER?"),
        ("ROI_HEADS.NUM", "did you mean MODEL.ROI_HEADS.NUM_CLASSES?"),
        ("FOO", "leave it out for all keys"),
    ],
)
def test_a_section_that_is_not_there_is_answered_with_one_that_is(
    word: str, hint: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--keys", word]) == 2
    assert hint in capsys.readouterr().err


def test_configs_lists_every_file_with_its_header(capsys: pytest.CaptureFixture) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = {f.relative_to(ROOT).as_posix() for f in (ROOT / "configs").rglob("*.yaml")}
    assert {line.split()[0] for line in lines} == files
    assert all(len(line.split()) > 3 for line in lines)
    assert main(["configs", "pretrain", "simclr"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        name for name in files if "pretrain/" in name and "simclr" in (ROOT / name).read_text().splitlines()[0].lower()
    } | {name for name in files if "pretrain/simclr" in name}
    assert main(["configs", "nothing_of_this_name"]) == 2


def test_completion_knows_commands_and_options(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("shtab")
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", script) for name in JOBS)
    assert "--eval-only" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=60).returncode == 0


# --- configurations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "use"),
    [
        (["train", "--config-file", "configs/pretrain/loco_r50.yaml"], "a pretraining file"),
        (["pretrain", "--config-file", CONFIG], "a detection file"),
    ],
)
def test_a_configuration_of_the_other_kind_is_named(argv: list[str], use: str, capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    err = capsys.readouterr().err
    other = {"train": "pretrain", "pretrain": "train"}[argv[0]]
    assert f"{argv[2]}: this is {use}" in err
    assert err.rstrip().endswith(f"use loco-det {other} --config-file {argv[2]}")


def test_a_key_of_the_other_kind_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config-file", CONFIG, "DATA.PATH", "images"]) == 2
    assert "there is no key DATA.PATH; it is one of pretraining, for loco-det pretrain" in capsys.readouterr().err


BAD_VALUES = {
    "DATASETS.TRAIN": ["x", "[x, y]", "3"],
    "SOLVER.STEPS": ["x", "[x, y]", "5", "60, 80k"],
    "SOLVER.MAX_ITER": ["many", "1.5", "True", "1e5"],
    "SOLVER.BASE_LR": ["fast", "(1,)", "None"],
    "MODEL.MASK_ON": ["1", "yes", "off"],
    "MODEL.WEIGHTS": ["5", "['a']", "None", "1e4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": ["x", "32"],
    "OUTPUT_DIR": ["7"],
}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in BAD_VALUES.items() for text in texts])
def test_the_value_to_write_is_accepted(key: str, text: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(keys.get_cfg(), "", [key, text])
    line = str(refused.value).partition("write ")[2]
    words = shlex.split(line)
    assert words[0] == key
    assert len(words) == 2, line
    load_config(keys.get_cfg(), "", words)


def test_the_value_to_write_is_near_the_one_given() -> None:
    assert example("DATASETS.TRAIN", "x", ()) == "DATASETS.TRAIN \"('x',)\""
    assert example("DATASETS.TEST", "[a, b]", ()) == "DATASETS.TEST \"('a', 'b')\""
    assert example("SOLVER.STEPS", 5, (3,)) == 'SOLVER.STEPS "(5,)"'
    assert example("MODEL.MASK_ON", "off", True) == "MODEL.MASK_ON False"
    assert example("MODEL.WEIGHTS", 5, "") == "MODEL.WEIGHTS \"'5'\""


@pytest.mark.parametrize(
    "value", [1, 0.5, True, None, "a b", "it's", 'say "a"', "$HOME", "1e5", "", (1, "x"), [[32], [64]]]
)
def test_a_value_survives_the_shell(value: object) -> None:
    found = load_config(keys.get_cfg(), "", ["SOLVER.WEIGHT_DECAY_BIAS", *shlex.split(shell_value(value))])[0]
    assert value == found.SOLVER.WEIGHT_DECAY_BIAS


# --- the line to type -------------------------------------------------------------------------------------------


def test_a_batch_that_is_too_large_is_answered_with_the_whole_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line works as it stands: it gets past the check of the batch."""
    from PIL import Image

    for i in range(20):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i} a.png")
    argv = ["pretrain", "--config-file", "configs/pretrain/loco_r50.yaml", "DATA.PATH", str(tmp_path)]
    argv += ["OUTPUT_DIR", str(tmp_path / "the run"), "DATA.NUM_WORKERS", "0", "DEVICE", "cpu"]
    monkeypatch.setattr("pretrain.train.Learner", lambda cfg: torch.nn.Identity())
    assert main(argv) == 2
    message, line = capsys.readouterr().err.splitlines()[-2:]
    assert re.fullmatch(r"error: SOLVER.BATCH_SIZE is 4096 but .* has 20 images; add SOLVER.BATCH_SIZE 4", message)
    assert shlex.split(line) == ["type:", "loco-det", *argv, "SOLVER.BATCH_SIZE", "4"]
    reached = []
    monkeypatch.setattr("pretrain.train._train", lambda cfg, *others: reached.append(cfg.SOLVER.BATCH_SIZE) or 0)
    monkeypatch.setattr("pretrain.train.unit_names", lambda *_: [])
    monkeypatch.setattr("pretrain.train.write_backbone", lambda *_: tmp_path)
    monkeypatch.setattr(torch.nn.Identity, "backbone", None, raising=False)
    assert main(shlex.split(line.partition("loco-det ")[2])) == 0
    assert reached == [4]


# --- weights of another project ---------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def small(tmp_path: Path, weights: Path, **changes: object):
    given = {"MODEL__WEIGHTS": str(weights), "SOLVER__MAX_ITER": 1}
    return tiny_cfg(tmp_path / "run", **{**RESNET_18, **given, **changes})


def test_train_converts_weights_of_another_project_and_says_the_proof(
    foreign: Path, tiny_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A Lightning module does not say its pixels, so the configuration's are taken, and said."""
    tensors = torch.load(foreign)
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in tensors.items()}}, foreign)
    caplog.set_level("INFO", logger="loco_det")
    train_net(small(tmp_path, foreign), engine="torchvision")
    text = caplog.text
    for said in ("converting it to", "does not say what pixels", "proof: ", "float64 max|d|", "loaded 100 backbone"):
        assert said in text, said
    assert (tmp_path / "run" / f"{foreign_weights.NAME}.pkl").is_file()
    assert str(foreign) in (tmp_path / "run" / "config.yaml").read_text()  # what the user gave


def test_all_keys_that_contradict_the_weights_are_in_one_line(foreign: Path, tiny_data: Path, tmp_path: Path) -> None:
    from loco_det.convert import Stated, convert

    convert(foreign, tmp_path / "mine.pkl", stated=Stated("BGR", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), False))
    with pytest.raises(UserError) as refused:
        train_net(small(tmp_path, tmp_path / "mine.pkl"), engine="torchvision")
    assert str(refused.value).endswith(f"; add {refused.value.add}")
    assert {"INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"} <= set(shlex.split(refused.value.add)[::2])
    cfg = load_config(small(tmp_path, tmp_path / "mine.pkl"), "", shlex.split(refused.value.add))[0]
    assert train_net(cfg, engine="torchvision")


def test_only_weights_of_others_are_converted(foreign: Path, tmp_path: Path) -> None:
    from loco_det.convert import Stated, convert

    stated = Stated("RGB", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), False)
    convert(foreign, tmp_path / "a.pkl", stated=stated)
    convert(foreign, tmp_path / "a.safetensors", stated=stated)
    torch.save({"model": {"backbone.fpn_lateral2.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    torch.save({"backbone.body.conv1.weight": torch.zeros(1)}, tmp_path / "torchvision.pth")
    found = [foreign_weights.is_foreign(str(tmp_path / name)) for name in
             ("mine.pth", "a.pkl", "a.safetensors", "detector.pth", "torchvision.pth", "absent.pth")]  # fmt: skip
    assert found == [True, False, False, False, False, False]
    assert foreign_weights.is_foreign("timm:resnet18")


# --- predict finds a run ----------------------------------------------------------------------------------------


def predict_args(*argv: str) -> argparse.Namespace:
    args = parsed("predict", *argv)
    predict._find_run(args)
    return args


def test_predict_finds_config_and_weights_in_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    with pytest.raises(UserError, match=rf"no checkpoint; train it with loco-det train --config-file {run}/config"):
        predict_args(str(run), "a.jpg")
    (run / "model_final.pth").touch()
    args = predict_args(str(run), "a.jpg", "b.jpg")
    assert args.inputs == ["a.jpg", "b.jpg"]
    assert args.config_file == [str(run / "config.yaml")]
    assert (args.weights, args.out) == (str(run / "model_final.pth"), run / "predictions")
    (run / "model_0000004.pth").touch()
    (run / "last_checkpoint").write_text("model_0000004.pth")
    args = predict_args(str(run), "a.jpg", "--out", "o", "--weights", "w.pth")
    assert (args.weights, args.out) == ("w.pth", Path("o"))
    assert predict_args(str(run), "a.jpg").weights == str(run / "model_0000004.pth")
    args = predict_args("a.jpg", "--weights", str(run / "model_final.pth"))
    assert (args.inputs, args.config_file) == (["a.jpg"], [str(run / "config.yaml")])
    args = predict_args(str(run), "--config-file", "c.yaml", "--weights", "w.pth")  # a folder of images
    assert (args.inputs, args.config_file) == ([str(run)], ["c.yaml"])
    with pytest.raises(UserError, match=r"is a run and no image; name images after it: loco-det predict"):
        predict_args(str(run))
    for argv in (["a.jpg"], ["a.jpg", "--config-file", "c.yaml"], ["a.jpg", "--weights", "w.pth"]):
        with pytest.raises(UserError, match="the folder of a run before the images"):
            predict_args(*argv)
    with pytest.raises(UserError, match=rf"^{run}_2 does not exist; name the folder of a run before the images"):
        predict_args(f"{run}_2", "a.jpg")
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"^predict needs a detector; name the folder of a run"):
        predict_args(str(tmp_path / "a.jpg"))


# --- the end of a run -------------------------------------------------------------------------------------------


def test_train_ends_with_its_numbers_its_files_and_what_is_next(tmp_path: Path) -> None:
    cfg = load_config(keys.get_cfg(), "", ["DATASETS.TEST", "('a_val',)", "OUTPUT_DIR", "out put"])[0]
    numbers = {"AP": 31.26, "AP50": 50.0, "AP75": 1.0, "APs": 2.0, "AP-cat": 3.0}
    lines = train_command.last_words(cfg, {"bbox": numbers, "segm": numbers})
    assert lines[0] == "a_val: bbox AP 31.3, AP50 50.0, AP75 1.0; segm AP 31.3, AP50 50.0, AP75 1.0"
    assert lines[1].startswith("in 'out put': ")
    for line in lines[2:]:
        name, *argv = shlex.split(line.removeprefix("next: loco-det "))
        parsed(name, *argv)
    two = load_config(cfg, "", ["DATASETS.TEST", "('a', 'b')"])[0]
    labels = {"sem_seg": {"IoU": 40.0, "IoU-road": 90.0}}
    assert train_command.last_words(two, {"a": labels, "b": labels})[:2] == [
        "a: sem_seg IoU 40.0",
        "b: sem_seg IoU 40.0",
    ]
    assert not any("report" in line for line in train_command.last_words(cfg, {}))


# --- the baseline -----------------------------------------------------------------------------------------------


def test_random_weights_are_the_same_measured_network_everywhere(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm's statistics are plain means over the training images, from the command and from Python."""
    from loco_det import api
    from loco_det.annotations.coco import image_files
    from loco_det.annotations.registry import find_dataset
    from loco_det.backbones.artifact import load_backbone
    from loco_det.evaluation.probes import backbones

    monkeypatch.setattr(backbones, "MEASURED_BATCH", 2)
    cfg = small(tmp_path, "random:resnet18", **{"MODEL__RESNETS__DEPTH": 18, "SEED": 5})
    found = train_command._with_random_weights(cfg, resume=False)
    tensors, manifest = load_backbone(found.MODEL.WEIGHTS)
    assert (manifest.method, manifest.architecture) == ("random", "resnet18")
    backbone = backbones.load_backbone_for_probe("random:resnet18", seed=5)
    pixels = backbones.DatasetSource(image_files(find_dataset("tiny_train")))
    images = torch.cat([b.images for b in backbones.build_plain_loader(pixels, 224, batch_size=6)])
    stem = backbone.model.stem.conv1
    with torch.no_grad():  # all six images at once: the mean of the batches' means
        mean = torch.nn.functional.conv2d(backbone.input(images, torch.device("cpu")), stem.weight, None, 2, 3).mean(
            (0, 2, 3)
        )
    torch.testing.assert_close(tensors["bn1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    seen = []
    monkeypatch.setattr(api, "train_net", lambda cfg, **options: seen.append(api.own._given) or {})
    monkeypatch.setattr(api.own, "given", lambda module, label: seen.append(module) or "python:x")
    api.evaluate_detection(
        backbones.load_backbone_for_probe("random:resnet18", seed=5), train="tiny_train", test="tiny_val", iterations=1,
        output=tmp_path / "b", seed=5,
    )  # fmt: skip
    torch.testing.assert_close(seen[0].stem.conv1.norm.running_mean, tensors["bn1.running_mean"])


def test_wrong_classes_are_refused_before_random_weights_are_measured(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loco_det.evaluation.probes import backbones

    monkeypatch.setattr(backbones, "measure_on", lambda *_: pytest.fail("measured"))
    cfg = small(tmp_path, "random:resnet18", **{"MODEL__RESNETS__DEPTH": 18})
    right = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    wrong = load_config(cfg, "", ["MODEL.ROI_HEADS.NUM_CLASSES", str(right + 1)])[0]
    with pytest.raises(UserError, match=rf"has {right} classes and MODEL.ROI_HEADS.NUM_CLASSES is") as refused:
        train_command._with_random_weights(wrong, resume=False)
    assert refused.value.add == f"MODEL.ROI_HEADS.NUM_CLASSES {right}"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_random_weights_are_measured_once_a_run_by_its_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(train_command, "_write_random", lambda cfg, path: written.append(path))
    cfg = small(tmp_path, "random:resnet18")
    path, run = tmp_path / "run" / "random_backbone.safetensors", tmp_path / "run"
    run.mkdir(exist_ok=True)

    def weights(resume: bool) -> str:
        return train_command._with_random_weights(cfg, resume).MODEL.WEIGHTS

    assert weights(resume=True) == str(path)
    assert written == [path]  # nothing to resume
    (run / "model_0000001.pth").touch()
    (run / "last_checkpoint").write_text("model_0000001.pth")
    assert weights(resume=True) == str(path)
    assert written == [path]
    monkeypatch.setattr(train_command, "is_main", lambda: False)
    assert weights(resume=False) == str(path)
    assert written == [path]
    monkeypatch.setattr(train_command, "is_main", lambda: True)
    weights(resume=False)
    assert written == [path, path]
    (run / "model_0000001.pth").unlink()
    with pytest.raises(UserError, match=r"model_0000001.pth, which is gone"):
        weights(resume=True)
