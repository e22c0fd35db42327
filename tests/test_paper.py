"""`loco-det paper`: every target end to end at a toy size, the plan at full size, its costs, and a page's numbers."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import paper_page
import pytest
from evidence import RESULTS
from evidence_page import read_cells

from loco_det.cli import main
from loco_det.commands import paper
from loco_det.core.errors import UserError
from loco_det.paper import costs, plan
from loco_det.paper.costs import Measured
from loco_det.paper.data import LISTS, prepare, unpack
from loco_det.paper.figures import FEW, FROZEN, ROWS
from loco_det.paper.page import write_page
from loco_det.paper.plan import TARGETS, Chain, Options, PlannedRow, Step, commands_of
from loco_det.paper.settings import changed_from_plan, configuration

TOY = {
    "BACKBONE.WIDTH": 8, "DECODER.HIDDEN_DIM": 8, "DATA.IMAGE_SIZE": 16, "SOLVER.BATCH_SIZE": 4, "SOLVER.EPOCHS": 1,
    "SOLVER.AMP": "none", "LOG_PERIOD": 1,
}  # fmt: skip
TOY_OBJECTS = {"DECODER.HIDDEN_DIM": 8, "DATA.IMAGE_SIZE": 32, "SOLVER.BATCH_SIZE": 2, "SOLVER.MAX_STEPS": 1,
               "SOLVER.AMP": "none"}  # fmt: skip
TOY_DETECTOR = {
    "INPUT.MIN_SIZE_TRAIN": "(48,)", "INPUT.MIN_SIZE_TEST": 48, "SOLVER.IMS_PER_BATCH": 1, "SOLVER.MAX_ITER": 1,
    "SOLVER.STEPS": "()", "MODEL.FPN.OUT_CHANNELS": 8, "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 20, "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
}  # fmt: skip
MACHINE = {"packages": {"torch": "9.9"}, "device": "cpu", "cores": 2, "loco_det": "1"}


def words(settings: dict[str, Any]) -> list[str]:
    return [str(part) for pair in settings.items() for part in pair]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands run in this process, one after another; returns those that were run."""
    run: list[list[str]] = []

    def in_process(command: list[str], output, lock, shown) -> tuple[int, float]:
        assert shown == {}
        assert command[1:3] == ["-m", "loco_det.cli"]
        run.append(command[3:])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return main(command[3:]), 36.0

    monkeypatch.setattr(paper, "run_process", in_process)
    monkeypatch.setattr(paper, "launch_all", lambda args, items, run, **_: [(item, run(item, {})) for item in items])
    return run


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zip like CIFAR-10's: toy/{train,test}/{blue,red}/*.png."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "toy.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 10), ("test", 4)):
            for name, colour in (("blue", (220, 30, 30)), ("red", (30, 30, 220))):
                for i in range(count):
                    pixels = np.clip(rng.normal(colour, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                    file.writestr(f"toy/{split}/{name}/{i}.png", cv2.imencode(".png", pixels)[1].tobytes())
    return path


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detection set in Pascal VOC's folders, of two classes."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("objects") / "toys"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", 6), ("test", 2)):
        names = [f"{split}{i}" for i in range(count)]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            pixels = rng.integers(0, 60, (48, 48, 3), dtype=np.uint8)
            found = ""
            for k, kind in enumerate(("cat", "dog")):
                x, y = (int(v) for v in rng.integers(2, 20, 2))
                pixels[y : y + 20, x : x + 20, k] = 220
                found += (
                    f"<object><name>{kind}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 20}</xmax>"
                    f"<ymax>{y + 20}</ymax></bndbox></object>"
                )
            cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), pixels)
            text = "<size><width>48</width><height>48</height><depth>3</depth></size>"
            text = f"<annotation><filename>{name}.jpg</filename>{text}{found}</annotation>"
            (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


def small(target: str, data: Path, out: Path, *more: object) -> int:
    argv = ["paper", target, "--data", data, "--out", out, "--quiet", "--no-measure", *more]
    return main([str(text) for text in argv])


# --- every target, from images to its page ----------------------------------------------------------------------


def test_without_a_target_it_lists_them(capsys: pytest.CaptureFixture) -> None:
    assert main(["paper"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in TARGETS)


# A row of each kind; tests/test_paper_rows.py trains them all.
SOME = (
    "simclr_r50",
    "loco_r50",
    "gim_sh50",
    "gim_stage_r50_100ep",
    "loco_mlp4_r50_100ep",
    "gim_conv_r50_100ep",
    "loco_soft_1e-3_r50_100ep",
    "loco_share2blocks_r50_100ep",
    "gim_presnet50_100ep",
)


def fake_savings(network: str, x) -> dict[str, dict[str, float]]:
    assert x.shape == (4, 3, 224, 224)
    return {
        method: {"bytes": 1e6, "saving": 2.0, "backbone_bytes": 1, "backbone_saving": 3.0} for method in
        ("simclr", "gim", "loco")
    }  # fmt: skip


def test_targets_of_readouts(
    here: list[list[str]], cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "savings", fake_savings)
    monkeypatch.setattr(plan, "ROWS", [row for row in ROWS if row.config in SOME])
    monkeypatch.setattr(plan, "SHARING_ROWS", [config for config in plan.SHARING_ROWS if config in SOME])
    monkeypatch.setattr(plan, "SMALL_PROBES", {"ridge": (), "linear": ("--epochs", "2")})
    options = ("--seeds", 0, "--set-pretrain", *words(TOY))
    assert small("table1", cifar, tmp_path, *options) == 0, (tmp_path / "simclr_0" / "commands.txt").read_text()
    assert [command[0] for command in here] == ["pretrain", "probe", "probe"] * 3
    table = (tmp_path / "table1.md").read_text()
    numbers = json.loads((tmp_path / "table1.json").read_text())["rows"]
    assert [row["paper"] for row in numbers] == [{"top-1": top1} for top1 in (69.8, 69.5, 63.5)]
    for row, name in zip(numbers, ("simclr", "loco", "gim_sh50")):
        probe = json.loads((tmp_path / f"{name}_0" / "linear.json").read_text())["stages"]
        assert row["ours"]["linear"]["0"] == probe["res5"]["top1"]
        assert row["whole"]
    assert f"| LoCo | 69.5 | {numbers[1]['ours']['ridge']['0']:.1f} |" in table
    assert "in 0.1 hours of processor time" in table  # 9 commands of 36 seconds
    assert "## Not run" not in table
    assert "<td>69.5</td>" in (tmp_path / "table1.html").read_text()
    assert sum(1 for line in (tmp_path / "train.txt").read_text().splitlines() if line) == 16
    here.clear()
    assert small("table1", cifar, tmp_path, *options) == 0  # nothing is made again
    assert here == []
    monkeypatch.setattr(plan, "SMALL_PROBES", {"ridge": ()})
    for target, rows in (("decoder", 3), ("sharing", 3), ("memory", 1)):
        assert small(target, cifar, tmp_path, *options) == 0
        assert len(json.loads((tmp_path / f"{target}.json").read_text())["rows"]) == rows
    made = {command[command.index("OUTPUT_DIR") + 1].rpartition("/")[2] for command in here if command[0] == "pretrain"}
    assert made == {f"{plan.small_name(config)}_0" for config in SOME[3:]}
    assert "two blocks are a whole stage of ResNet-18" in (tmp_path / "sharing.md").read_text()
    assert "| PResNet-50, gim | 4.56 | 2.00 | 3.00 | 1 |" in (tmp_path / "memory.md").read_text()


def test_curves(here: list[list[str]], cifar: Path, tmp_path: Path) -> None:
    """Three epochs of 16 images in batches of 4: as many steps as planned; then a plan with another temperature."""
    settings = {**TOY, "SOLVER.EPOCHS": 3}
    assert small("curves", cifar, tmp_path, "--seeds", 0, "--set-pretrain", *words(settings)) == 0
    text = (tmp_path / "curves.md").read_text()
    assert "(curves.png)" in text
    lines = [json.loads(line) for line in (tmp_path / "loco_res2_0" / "metrics.json").read_text().splitlines()]
    assert f"| LoCo, losses after res2 to res5, res2 | 1.79 | {lines[-1]['loss/res2-res2']:.2f} |" in text
    options = Options("small", str(cifar), tmp_path, (0,), pretrain=tuple(words(settings)))
    steps = commands_of(plan.plan("curves", options))
    assert costs.costs(steps, 1, True, fixed) == {}
    for step in steps:
        again = Step(tmp_path / "again", step.words)
        assert costs.costs([again], 1, True, fixed)[again].steps == 12
        assert len((step.made.parent / "metrics.json").read_text().splitlines()) == 12
        assert changed_from_plan(step) == {}
    other = words({**settings, "LOSS.TEMPERATURE": 0.5, "LOG_PERIOD": 2})
    here.clear()
    assert small("curves", cifar, tmp_path, "--seeds", 0, "--page", "--set-pretrain", *other) == 0
    assert here == []
    text = (tmp_path / "curves.md").read_text()
    assert "gim_0 was made with other settings than planned: LOSS.TEMPERATURE is 0.2 before, 0.5 now" in text
    # The loss of one batch says little: of 40 lines the mean of the last two counts.
    more = [{**lines[-1], "iteration": 12 + i, "loss/res2-res2": 10.0 + i} for i in range(40 - len(lines))]
    metrics = tmp_path / "loco_res2_0" / "metrics.json"
    metrics.write_text("\n".join(json.dumps(line) for line in [*lines, *more]) + "\n")
    (metrics.parent / "SHA256SUMS").unlink()
    assert small("curves", cifar, tmp_path, "--seeds", 0, "--page") == 0
    assert f"res2 | 1.79 | {10 + len(more) - 1.5:.1f} |" in (tmp_path / "curves.md").read_text()


def test_tsne(here: list[list[str]], cifar: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert small("tsne", cifar, tmp_path, "--seeds", 0, "--set-pretrain", *words(TOY)) == 0
    rows = json.loads((tmp_path / "tsne.json").read_text())["rows"]
    facts = json.loads((tmp_path / "loco_0" / "tsne.json").read_text())
    assert rows[2]["ours"]["silhouette"]["0"] == facts["silhouette"]
    assert (tmp_path / "tsne.html").read_text().count("data:image/png;base64,") == 3


def test_targets_of_detection(
    here: list[list[str]], objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "SMALL_DETECTION", ("loco",))
    options = ("--seeds", 0, "--set-pretrain", *words(TOY_OBJECTS), "--set-train", *words(TOY_DETECTOR))
    out = tmp_path / "out"
    assert small("detection", objects, out, *options) == 0
    assert len((out / "toys_train.txt").read_text().split()) == 6
    rows = json.loads((out / "detection.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["LoCo"]
    lines = [json.loads(line) for line in (out / "detect_loco_0/detector/metrics.json").read_text().splitlines()]
    assert rows[0]["ours"]["box AP"]["0"] == pytest.approx(lines[-1]["bbox/AP"])
    assert small("few_labels", objects, out, *options) == 0
    rows = json.loads((out / "few_labels.json").read_text())["rows"]
    assert [row["row"] for row in rows] == ["LoCo, 50 % of the images", "LoCo, 10 % of the images"]
    assert [command[0] for command in here] == ["pretrain", "train", "train", "train"]  # one backbone for all
    config = (out / "few_10k_loco_0" / "config.yaml").read_text()
    assert "@train@50pct_seed0" in config
    assert "FREEZE_AT: 2" in config
    here.clear()
    assert small("pictures", objects, out, *options) == 0
    assert here == []
    assert "data:image/png;base64," in (out / "pictures.html").read_text()


def test_a_failure_is_told_and_the_rest_is_made(
    here: list[list[str]], cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setattr(plan, "SMALL_PROBES", {"ridge": ()})
    (tmp_path / "gim_0").mkdir()
    (tmp_path / "gim_0" / "config.yaml").mkdir()  # in the way
    assert small("curves", cifar, tmp_path, "--seeds", 0, "--set-pretrain", *words(TOY)) == 1
    assert "gim_0: pretrain ended with status 2: error: " in capsys.readouterr().err
    text = (tmp_path / "curves.md").read_text()
    assert "## Not run\n\n- GIM: seed 0" in text
    assert "| GIM, res5 | 1.43 | not run |" in text


def test_a_backbone_that_fails_is_tried_once(
    here: list[list[str]], objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again by each row that needs it."""
    monkeypatch.setattr(plan, "SMALL_DETECTION", ("loco",))
    (tmp_path / "detect_loco_0" / "config.yaml").mkdir(parents=True)  # in the way
    options = ("--seeds", 0, "--set-pretrain", *words(TOY_OBJECTS), "--set-train", *words(TOY_DETECTOR))
    assert small("few_labels", objects, tmp_path, *options) == 1
    assert [command[0] for command in here] == ["pretrain"]
    assert len(json.loads((tmp_path / "few_labels.json").read_text())["rows"]) == 2


# --- the plan ---------------------------------------------------------------------------------------------------

FULL = Options("full", "/data/imagenet", Path("/out"), (0,), supervised="/data/r50.pkl")


def test_few_labels_tune_a_random_network_as_a_whole(objects: Path, tmp_path: Path) -> None:
    options = Options("small", str(objects), tmp_path, (3,))
    for row in plan.plan("few_labels", options):
        cfg = configuration(row.chains[0].steps[-1])
        assert (0 if row.label.startswith("no pretraining") else 2) == cfg.MODEL.BACKBONE.FREEZE_AT
        assert cfg.DATASETS.TRAIN[0].endswith("pct_seed3")
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_every_row_of_the_paper_is_planned_at_full_scale() -> None:
    found = {target: plan.plan(target, FULL) for target in TARGETS}
    told = {target: sorted(value for row in rows for value in row.paper.values()) for target, rows in found.items()}
    assert told["table1"] == [63.5, 64.7, 69.1, 69.3, 69.5, 69.8]
    assert told["sharing"] == [64.8, 65.1, 65.3, 65.3, 65.5, 65.9, 66.0, 66.2]
    assert told["memory"] == [52.6, 66.6, 66.8]
    assert sum(len(by) for by in FROZEN.values()) == len(found["detection"]) == 26
    assert sum(len(by) for by in FEW.values()) == len(found["few_labels"]) == 16
    for target, names in {"detection": ("box AP", "mask AP"), "few_labels": ("box AP", "mask AP")}.items():
        assert all(tuple(row.paper) == names for row in found[target])
    used = {step.words[step.words.index("--config-file") + 1] for rows in found.values() for step in commands_of(rows)
            if step.words[0] == "pretrain"}  # fmt: skip
    assert {f"configs/pretrain/{row.config}.yaml" for row in ROWS} == used


def test_full_scale_has_the_papers_schedules() -> None:
    rows = plan.plan("few_labels", Options(**{**vars(FULL), "seeds": plan.SPLITS}))
    for row in rows:
        assert [chain.seed for chain in row.chains] == [0, 1, 2, 3, 4]
        for chain in row.chains:
            cfg = configuration(chain.steps[-1])
            size = 10_000 if "10K" in row.label else 1_000
            assert (f"coco_2017_train@{size}images_seed{chain.seed}",) == cfg.DATASETS.TRAIN
            assert ({10_000: 60_000, 1_000: 15_000}[size], 16) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH)
            assert (0 if row.label.startswith("random") else 2) == cfg.MODEL.BACKBONE.FREEZE_AT
    frozen = {row.label: row for row in plan.plan("detection", FULL)}
    first, last = frozen["LoCo, ShuffleNet v2-50, 100 epochs, COCO"].chains[0].steps
    assert configuration(first).SOLVER.EPOCHS == 100
    cfg = configuration(last)
    assert (str(first.made), "shufflenetv2_50") == (cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.NAME)
    assert configuration(frozen["supervised, ResNet-50, COCO"].chains[0].steps[0]).MODEL.WEIGHTS == "/data/r50.pkl"
    without = plan.plan("detection", Options(**{**vars(FULL), "supervised": ""}))
    assert [row.label for row in without if row.why] == [
        "supervised, ResNet-50, COCO",
        "supervised, ResNet-50, Cityscapes",
    ]


def test_a_cluster_is_asked_for_the_cores_of_automatic_workers() -> None:
    chains = plan.plan("table1", FULL)[0].chains
    assert configuration(chains[0].steps[0]).DATA.NUM_WORKERS == -1
    assert paper._most_workers(chains) == 8
    assert paper._most_workers(plan.plan("curves", Options("small", "/x", Path("/out"), (0,)))[0].chains) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_full_scale_is_dry_run(target: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    kinds: list[str] = []

    def measure(job: str, cfg) -> Measured:
        kinds.append(job)
        return Measured(2, 1.0, 0.25, 2**30, 2**28)

    monkeypatch.setattr(costs, "measure_step", measure)
    argv = ["paper", target, "--scale", "full", "--data", "/nowhere/imagenet", "--out", tmp_path, "--dry-run"]
    assert main([*map(str, argv), "--num-gpus", "8"]) == 0
    shown = capsys.readouterr()
    assert "0 of them done" in shown.err
    assert "hours one after another, at most" in shown.err
    assert kinds
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["table1"], "--data is missing; give CIFAR-10"),
        (["detection"], "--data is missing; give a detection set"),
        (["table1", "--scale", "full"], "--data is missing; give the folder of ImageNet"),
        (["table1", "--data", "/nowhere"], "there is no such file or folder"),
        (["table1", "--data", "x", "--seeds", "-1"], "--seeds"),
        (["table1", "--data", "x", "--jobs", "0"], "--jobs"),
        (["table1", "--data", "x", "--set-pretrain", "SOLVER.BASE_RATE", "1"], "SOLVER.BASE_RATE"),
        (["detection", "--data", "x", "--set-train", "SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["detection", "--data", "x", "--supervised", "none.pkl"], "no such file"),
    ],
)
def test_bad_arguments(argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["paper", *argv, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


# --- costs ------------------------------------------------------------------------------------------------------


def fixed(job: str, cfg) -> Measured:
    return Measured(images=2, seconds=3.0, forward=0.5, saved=1000, weights=70)


def test_hours_and_memory_follow_batch_processes_and_length() -> None:
    (row,) = [row for row in plan.plan("table1", FULL) if row.label == "LoCo"]
    pretrain, probe = row.chains[0].steps
    found = costs.costs([pretrain, probe], 8, False, fixed)
    steps = 800 * (1_281_167 // 4096)
    assert found[pretrain].steps == steps
    assert found[pretrain].hours == pytest.approx(steps * 3.0 / 2 * 512 / 3600)
    assert found[pretrain].bytes == 70 + 500 * 512
    assert found[probe].hours == pytest.approx((100 * 1_281_167 + 50_000) * 0.25 / 8 / 3600)
    detector = plan.plan("detection", FULL)[1].chains[0].steps[-1]
    assert costs.costs([detector], 8, False, fixed)[detector].hours == pytest.approx(90_000 * 1.5 * 2 / 3600)


def test_only_what_is_not_done_is_measured(tmp_path: Path) -> None:
    """A readout that is not done needs its backbone's network, whether that is pretrained already or not."""
    measured: list[str] = []

    def measure(job: str, cfg) -> Measured:
        measured.append(cfg.METHOD)
        return fixed(job, cfg)

    steps = commands_of(plan.plan("table1", Options("small", "/x/cifar10", tmp_path, (0,))))
    by_name = {f"{step.made.parent.name}/{step.made.stem}": step for step in steps}
    left = {"gim_0/ridge", "loco_0/backbone", "loco_0/ridge"}
    for name, step in by_name.items():
        if name not in left:
            step.made.parent.mkdir(exist_ok=True)
            step.made.touch()
    found = costs.costs(steps, 1, True, measure)
    assert measured == ["gim", "loco"]
    assert set(found) == {by_name[name] for name in left}
    assert found[by_name["gim_0/ridge"]].hours == pytest.approx(60_000 * 0.25 / 3600)


def test_savings_are_counted_on_the_papers_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SAVINGS", {"resnet18": {}})
    monkeypatch.setattr(costs, "MEMORY_SIZE", 32)
    found = costs.memory_savings()["resnet18"]
    assert found["simclr"]["saving"] == 1
    assert found["gim"]["saving"] == found["simclr"]["bytes"] / found["gim"]["bytes"] > 1


def test_a_step_is_measured(objects: Path, tmp_path: Path) -> None:
    options = Options("small", "/x/cifar10.zip", tmp_path, (0,), pretrain=tuple(words(TOY)))
    simclr, gim = (costs.measure_step("pretrain", configuration(row.chains[0].steps[0])) for row in
                   plan.plan("curves", options)[:2])  # fmt: skip
    assert simclr.images == 4  # the whole batch, since they are small
    assert min(simclr.seconds, simclr.forward) > 0
    assert 0 < gim.saved < simclr.saved  # local losses keep less
    options = Options("small", str(objects), tmp_path, (0,), train=tuple(words(TOY_DETECTOR)))
    detector = plan.plan("detection", options)[0].chains[0].steps[-1]
    found = costs.measure_step("train", configuration(detector))
    assert found.images == 1
    assert found.seconds > 0
    assert found.saved > 0
    assert found.weights > 4 * 11_000_000  # ResNet-18, frozen


# --- numbers of a page ------------------------------------------------------------------------------------------


def rows_with(tmp_path: Path, values: dict[str, list[float]], paper_top1: dict[str, float]) -> list[PlannedRow]:
    rows = []
    for label, of_seeds in values.items():
        chains = []
        for seed, value in enumerate(of_seeds):
            made = tmp_path / f"{label}_{seed}" / "linear.json"
            made.parent.mkdir(parents=True)
            made.write_text(json.dumps({"stages": {"res4": {"top1": 0.0}, "res5": {"top1": value}}}))
            chains.append(Chain(seed, (Step(made, ("probe", "--recipe", "paper")),)))
        rows.append(PlannedRow(label, {"top-1": paper_top1[label]}, tuple(chains)))
    return rows


def test_means_intervals_and_stars(tmp_path: Path) -> None:
    """Deviation 1 over three seeds: the interval is 4.3027 / sqrt(3) to either side of the mean."""
    rows = rows_with(tmp_path, {"a": [49.0, 50.0, 51.0], "b": [59.0, 61.0, 60.0]}, {"a": 52.0, "b": 63.0})
    full, small_ = (Options(scale, "/x", tmp_path, (0, 1, 2)) for scale in ("full", "small"))
    text = write_page("table1", rows, full, MACHINE).read_text()
    assert "| a | 52.0 | 50.0 [47.5, 52.5] | -2.0 |" in text
    assert "| b | 63.0 | 60.0 [57.5, 62.5] | -3.0 \\* |" in text
    text = write_page("table1", rows, small_, MACHINE).read_text()
    assert "| a | 52.0 | 50.0 [47.5, 52.5] |  |" in text
    # seed by seed 10, 11, 9
    assert "| b | 63.0 | 60.0 [57.5, 62.5] | +10.0 [+7.5, +12.5] \\* |" in text


def test_small_rows_are_compared_with_the_first_of_their_network(tmp_path: Path) -> None:
    rows = rows_with(tmp_path, {"a": [50.0], "b": [60.0], "c": [65.0]}, {"a": 1.0, "b": 2.0, "c": 3.0})
    rows = [PlannedRow(r.label, r.paper, r.chains, group=group) for r, group in zip(rows, ("r18", "sh50", "sh50"))]
    text = write_page("table1", rows, Options("small", "/x", tmp_path, (0,)), MACHINE).read_text()
    assert "| b | 2.0 | 60.0 |  |" in text
    assert "| c | 3.0 | 65.0 | +5.0 |" in text


def test_what_was_not_run_says_so(tmp_path: Path) -> None:
    rows = rows_with(tmp_path, {"a": [50.0]}, {"a": 52.0})
    absent = Chain(0, (Step(tmp_path / "b_0" / "linear.json", ("probe", "--recipe", "paper")),))
    rows += [PlannedRow("b", {"top-1": 63.0}, (absent,)), PlannedRow("c", {"top-1": 1.0}, why="give its weights")]
    rows += [PlannedRow("d", {"top-1": 63.0}, (absent,))]
    text = write_page("table1", rows, Options("full", "/x", tmp_path, (0,)), MACHINE).read_text()
    assert "| a | 52.0 | 50.0 | -2.0 |" in text
    assert "| b | 63.0 | not run |  |" in text
    assert "## Not run\n\n- b; d: seed 0\n- c: give its weights\n" in text


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    rows = rows_with(tmp_path, {"a": [50.0]}, {"a": 52.0})
    rows[0].chains[0].steps[0].made.write_text("{")
    with pytest.raises(UserError, match=r"a_0/linear\.json: is damaged"):
        write_page("table1", rows, Options("full", "/x", tmp_path, (0,)), MACHINE)


def test_the_lists_are_those_of_the_evidence(tmp_path: Path) -> None:
    """The same images are pretrained on and held out, so that either command uses the other's runs."""
    for name in ("cat", "dog"):
        (tmp_path / "cifar10" / "train" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "cifar10" / "train" / name / f"{i}.png").write_bytes(b"")
    unpack(tmp_path / "cifar10", tmp_path / "cifar10", tmp_path)
    names = ("train", "train_half", "held_out")
    kept, half, held = ((tmp_path / f"{name}.txt").read_text().splitlines() for name in names)
    assert (len(kept), len(half), len(held)) == (16, 8, 4)
    assert set(half) < set(kept)
    assert sum(line.endswith("\tcat") for line in half) == 4
    assert not set(kept) & set(held)
    assert all(line.startswith("cifar10/train/") and line.split("\t")[1] in line for line in kept)


def test_a_folder_without_the_half_list_gets_it_and_keeps_its_images(tmp_path: Path) -> None:
    """As an earlier version left it; runs may be reading the images."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for name in ("cat", "dog"):
            for i in range(10):
                file.writestr(f"toys/train/{name}/{i}.png", b"new")
    unpack(tmp_path / "set.zip", tmp_path / "toys", tmp_path)
    image = tmp_path / "toys/train/cat/3.png"
    image.write_bytes(b"old")
    before = [(tmp_path / name).read_text() for name in LISTS]
    (tmp_path / "train_half.txt").unlink()
    unpack(tmp_path / "set.zip", tmp_path / "toys", tmp_path)
    assert [(tmp_path / name).read_text() for name in LISTS] == before
    assert image.read_bytes() == b"old"


def test_slower_networks_pretrain_on_half_of_the_images(tmp_path: Path) -> None:
    options = Options("small", str(tmp_path / "cifar10"), tmp_path, (0,))
    lists = {"simclr_r50": ("train.txt", 78), "simclr_presnet50_100ep": ("train_half.txt", 39)}
    lists["simclr_sh50"] = lists["simclr_presnet50_100ep"]
    for config, (name, batches) in lists.items():
        step = plan.pretraining(config, 0, options)
        assert step.words[step.words.index("DATA.PATH") + 1] == str(tmp_path / name)
        assert costs.costs([step], 1, True, fixed)[step].steps == 30 * batches, "counted before the list is written"


def test_a_list_of_a_detection_sets_images_is_kept(objects: Path, tmp_path: Path) -> None:
    options = Options("small", str(objects), tmp_path, (1,))
    prepare(options, objects=True)
    listed = tmp_path / "toys_train.txt"
    assert str(listed) == configuration(plan.small_pretraining("gim", 1, options)).DATA.PATH
    assert listed.read_text().split() == [str(objects / "JPEGImages" / f"train{i}.jpg") for i in range(6)]
    listed.write_text("kept")
    prepare(options, objects=True)
    assert listed.read_text() == "kept"


def test_a_zip_has_one_folder(cifar: Path, tmp_path: Path) -> None:
    assert plan.labelled(Options("small", str(cifar), tmp_path, (0,))) == tmp_path / "toy"
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as file:
        for name in ("a/train/x/0.png", "b/train/x/0.png"):
            file.writestr(name, b"")
    with pytest.raises(UserError, match=r"two\.zip: has 2 folders at its top"):
        plan.labelled(Options("small", str(tmp_path / "two.zip"), tmp_path, (0,)))


def test_the_switches_of_a_small_row_are_its_configurations() -> None:
    assert plan.switches("loco_soft_1e-3_r50_100ep") == {
        "METHOD": "loco", "DECODER.CONV_BLOCKS": 1, "SHARING.MODE": "soft", "SHARING.PENALTY": 0.001}  # fmt: skip
    assert plan.switches("gim_mlp4_r50_100ep") == {"METHOD": "gim", "DECODER.MLP_LAYERS": 4}
    names = {row.config: plan.small_name(row.config) for row in ROWS}
    assert names["loco_presnet50_100ep"] == "loco_presnet"
    assert names["loco_r50_100ep"] == names["loco_r50"] == "loco"
    assert plan.small_network("gim_sh50") == "sh50"


def test_pages_are_put_below_their_marks(tmp_path: Path) -> None:
    (tmp_path / "curves.md").write_text(
        "# Losses\n\n## Curves\n\n![x](curves.png)\n\n```text\nloco-det # no heading\n```\n"
    )
    text = "# Page\n\n<!-- page: curves -->\n\nold\n\n<!-- page: table1 -->\n\nkept\n"
    found = paper_page.with_pages(text, tmp_path)
    assert "<!-- page: curves -->\n\n## Losses\n\n### Curves\n\n![x](paper_curves.png)\n" in found
    assert "old" not in found
    assert found.endswith("<!-- page: table1 -->\n\nkept\n")
    assert paper_page.with_pages(found, tmp_path) == found


def test_pages_put_together_say_once_what_opens_all(tmp_path: Path) -> None:
    for name in ("curves", "table1"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n\nMeans.\n\n| a |\n\nOf {name}.\n")
    found = paper_page.with_pages("<!-- page: curves -->\n<!-- page: table1 -->\n", tmp_path)
    assert found == (
        "<!-- page: curves -->\n\n## curves\n\nMeans.\n\n| a |\n\nOf curves.\n\n"
        "<!-- page: table1 -->\n\n## table1\n\n| a |\n\nOf table1.\n\n"
    )


def test_the_pages_in_the_documentation_are_those_of_the_committed_figures(tmp_path: Path) -> None:
    paper_page.write_pages(read_cells(RESULTS), ["table1", "decoder", "curves"], tmp_path)
    assert "# " in (tmp_path / "table1.md").read_text()
    told = "docs/paper.md is not what benchmarks/paper_page.py writes; run it"
    assert paper_page.with_pages(paper_page.PAGE.read_text(), tmp_path) == paper_page.PAGE.read_text(), told


def test_pages_of_committed_figures_are_those_of_the_runs(tmp_path: Path) -> None:
    """Of made-up figures: what the program reads of a folder is what `evidence.py` recorded of it."""
    probes = {name: {"res4": {"top1": 10.0}, "res5": {"top1": 20.0}} for name in ("linear", "knn", "ridge")}
    cells = {
        row: [
            {
                "row": row, "seed": seed, "rate": rate, "switches": {"METHOD": row}, "probes": probes,
                "losses": {"res2-res5": [[step, 5.0 - seed] for step in range(1, 41)]},
                "commands": [["loco-det", 3600.0]] * 4, "environment": MACHINE,
            }
            for seed in (0, 1, 2)
        ]
        for row, rate in (("simclr", 0.125), ("gim", 0.5))
    }  # fmt: skip
    paper_page.write_pages(cells, ["table1", "curves"], tmp_path)
    text = (tmp_path / "table1.md").read_text()
    assert "| SimCLR | 69.8 | 20.0 [20.0, 20.0] |" in text
    assert "24 of 72 commands have been run, in 24.0 hours of processor time" in text
    assert "gim_1 was made with other settings than planned: SOLVER.BASE_LR is 0.5 before, 0.125 now" in text
    assert "simclr_1 was made" not in text
    # the mean of 5, 4 and 3, and 4.3027 / sqrt(3) to either side
    assert "| SimCLR, res5 | 1.22 | 4.00 [1.52, 6.48] |" in (tmp_path / "curves.md").read_text()
