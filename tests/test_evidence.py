"""docs/results.md and README's table are what their command writes from the committed figures, and it writes the
right numbers; the rows have the switches of the paper's configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402
import evidence_page  # noqa: E402
import frozen_detector  # noqa: E402

from loco_det.cli import main  # noqa: E402
from loco_det.paper.data import write_lists  # noqa: E402
from loco_det.paper.plan import SWITCHES  # noqa: E402


def cell(row: str, seed: int, top1: float, losses: dict[str, list[list[float]]]) -> dict:
    probe = {
        stage: {"top1": top1 + seed + place, "top1_interval": [0, 1]} for place, stage in enumerate(("res4", "res5"))
    }
    return {
        "row": row,
        "network": "r18",
        "seed": seed,
        "switches": evidence.switches(evidence.ROWS[row]),
        "commands": [[f"loco-det pretrain {row} {seed}", 1200.0], ["loco-det probe", 600.0]],
        "environment": {"cores": 2, "packages": {"torch": "9.9"}},
        "probes": {"linear": probe, "knn": probe, "ridge": probe},
        "losses": losses,
    }


def test_the_page_says_which_rows_had_which_precision(cells) -> None:
    for one in cells["gim"]:
        one["precision"] = "float32"
    cells["simclr"][0]["precision"] = "bfloat16"
    said = "float32 on others. Bfloat16: SimCLR, end to end. Float32: GIM. Not recorded: SimCLR, end to end. "
    assert said in evidence_page.page_text(cells, {})


@pytest.fixture
def cells() -> dict[str, list[dict]]:
    """Two rows, three seeds; differences between them of 4, 5 and 6 points."""
    one = {"res2-res5": [[10, 5.0], [20, 4.0]]}
    several = {"res2-res3": [[10, 5.5], [20, 5.0]], "res3-res5": [[10, 5.2], [20, 4.5]]}
    return {
        "simclr": [cell("simclr", seed, 40.0, one) for seed in range(3)],
        "gim": [cell("gim", seed, 36.0 - seed, several) for seed in range(3)],
    }


def test_tables_have_means_intervals_and_differences_seed_by_seed(cells) -> None:
    text = evidence_page.page_text(cells, {"gim": {0.25: 30.0, 0.5: 31.26}})
    # mean +- 4.3027 / sqrt(3) times the deviation over seeds, which is 1 and 0
    assert "| SimCLR, end to end | 3 | 41.0 [38.5, 43.5] | 42.0 [39.5, 44.5] | 30 |" in text
    assert "| GIM | 3 | 36.0 [36.0, 36.0] | 37.0 [37.0, 37.0] | 30 |" in text
    assert "- GIM against SimCLR, end to end, last stage, seed by seed: linear -5.0 [-7.5, -2.5], knn -5.0" in text
    assert "- GIM: res3 5.00, res5 4.50" in text
    assert "6 runs took 3.0 hours of processor time together, one thread each, the longest 30 minutes" in text
    assert "| GIM |  |  | 30.0 | 31.3 |  |" in text
    assert "loco-det pretrain simclr 0" in text
    assert "- GIM: `METHOD` gim\n" in text
    assert "30 epochs in batches of 128;" in " ".join(text.split())
    assert "## What was not run" in text
    assert "## Units of stages" in text
    assert "## Units of single blocks" not in text, "one row compares nothing"
    assert "- Progressive ResNet, with every seed: SimCLR, end to end; GIM; LoCo." in text
    blocks = "GIM, a loss for each block; LoCo, a loss for every two blocks"
    assert f"- Units of single blocks, with every seed: {blocks}." in text


def test_detection_and_calibration_are_told_where_they_were_run(cells) -> None:
    def numbers(ap: float) -> dict:
        values = {"bbox/AP": ap, "bbox/AP50": 2 * ap, "bbox/AP75": ap / 2}
        return {key: {"mean": value, "ci95": [value - 1, value + 1]} for key, value in values.items()}

    paired = [
        {"backbone": row, "seed": seed, "bbox": {"AP": {"difference": 2.0 + seed, "ci95": [-1.0, 4.0]}}}
        for row in ("random", "gim", "loco")
        for seed in (0, 1)
    ]
    rows = {name: numbers(20.0 + place) for place, name in enumerate(("simclr", "gim", "random", "loco"))}
    found = {"data": "bccd", "seeds": [0, 1], "rows": rows, "paired": paired, "resamples": 1000, "seconds": 7200}
    found["images"] = {"train": 205, "test": 72}
    calibration = {"rows": {"simclr": {"5": 33.44, "10": 38.0}}, "what": "kNN", "settings": "batches of 256"}
    text = evidence_page.page_text(cells, {}, calibration, found)
    assert "Faster R-CNN on BCCD (205 training images, 72 of test)" in text
    table = text[text.index("| pretraining | AP |") :].splitlines()[2:6]
    assert table[0] == "| none | 22.0 [21.0, 23.0] | 44.0 [43.0, 45.0] | 11.0 [10.0, 12.0] |"
    assert [line.split(" | ")[0] for line in table] == ["| none", "| SimCLR, end to end", "| GIM", "| LoCo"]
    assert "- GIM: seed 0: +2.0 [-1.0, +4.0]; seed 1: +3.0 [-1.0, +4.0]\n" in text
    assert "- SimCLR, end to end: seed" not in text, "the others are compared with it"
    assert "1,000 paired resamples" in text
    assert "2.0 hours" in text
    assert "Frozen detection, with every seed" not in text
    assert "| SimCLR, end to end | 33.4 | 38.0 |" in text
    plain = evidence_page.page_text(cells, {})
    assert "## Frozen detection" not in plain
    assert "- Frozen detection, with every seed: none; SimCLR, end to end; GIM;" in plain
    assert "## Calibration" not in plain


def test_claims_are_differences_beside_the_papers_and_bold_where_they_leave_out_zero(cells) -> None:
    def row(name: str, last_stage: tuple[float, ...]) -> list[dict]:
        return [cell(name, seed, value - seed - 1, {}) for seed, value in enumerate(last_stage)]

    # SimCLR has 41, 42, 43 and GIM 37, 37, 37.
    cells["gim_conv"] = row("gim_conv", (36.0, 37.0, 38.0))
    cells["loco"] = row("loco", (40.5, 42.0, 43.5))
    cells["loco_blocks"] = row("loco_blocks", (45.0, 46.0, 47.0))
    plus_5 = "**+5.0 [+1.3, +8.7]**"
    assert [line for line in evidence_page.claims(cells).splitlines() if line.startswith("|")][2:] == [
        "| greedy training loses | GIM - SimCLR, end to end | -4.8 | **-5.0 [-7.5, -2.5]** | **-5.0 [-7.5, -2.5]** |",
        "| a deeper decoder wins it back | GIM with LoCo's decoder - GIM | +4.2 "
        "| +0.0 [-2.5, +2.5] | +0.0 [-2.5, +2.5] |",
        f"| both together win it back | LoCo - GIM | +5.3 | {plus_5} | {plus_5} |",
        "| shared stages add to the decoder | LoCo - GIM with LoCo's decoder | +1.1 "
        "| **+5.0 [+3.8, +6.2]** | **+5.0 [+3.8, +6.2]** |",
        "| LoCo is as good as end to end | LoCo - SimCLR, end to end | +0.5 | +0.0 [-1.2, +1.2] | +0.0 [-1.2, +1.2] |",
        "|  | LoCo, a loss for every two blocks - SimCLR, end to end |  "
        "| **+4.0 [+4.0, +4.0]** | **+4.0 [+4.0, +4.0]** |",
    ]
    assert evidence_page.claims(cells) in evidence_page.page_text(cells, {})
    del cells["loco"]
    first = "| LoCo is as good as end to end | LoCo, a loss for every two blocks - SimCLR"
    assert first in evidence_page.claims(cells), "the claim is told with the first row that was run"
    assert evidence_page.claims({"simclr": cells["simclr"]}) == ""


def test_rows_that_were_run_again_show_what_they_had(cells) -> None:
    text = evidence_page.page_text(cells, {}, before={"gim": [cell("gim", seed, 50.0 - seed, {}) for seed in range(3)]})
    assert "| GIM | 3 | 51.0 [51.0, 51.0] | 51.0 [51.0, 51.0] | 51.0 [51.0, 51.0] |\n" in text
    assert "- GIM against SimCLR, end to end, last stage, seed by seed: linear -5.0" in text, "the second runs alone"
    assert "## Run again" not in evidence_page.page_text(cells, {})


def test_a_row_without_seeds_in_common_has_no_difference(cells) -> None:
    cells["gim"] = cells["gim"][:1]
    assert evidence_page.verdicts(("simclr", "gim"), cells) == "\n"
    assert "| GIM | 1 | 36.0 | 37.0 | 30 |" in evidence_page.page_text(cells, {})


def test_a_row_is_shown_when_all_its_seeds_are_there(cells) -> None:
    cells["gim"] = cells["gim"][:2]
    assert list(evidence_page.complete(cells)) == ["simclr"]


def test_a_commands_time_is_written_down_while_it_runs(tmp_path: Path, monkeypatch) -> None:
    """So that it counts when everything is killed; a command that fails is no cell."""
    commands, clock, popen = evidence.Commands(tmp_path), tmp_path / ".made.seconds", subprocess.Popen
    clock.write_text("100.0")
    seen = []
    monkeypatch.setattr(evidence, "seconds_of", lambda pid: seen.append(pid) or 2.5)
    busy = "import sys; sum(range(10**7)); sys.exit(3)"
    monkeypatch.setattr(evidence.subprocess, "Popen", lambda line, cwd: popen([sys.executable, "-c", busy]))
    with pytest.raises(subprocess.CalledProcessError):
        commands.run(tmp_path / "made", "pretrain")
    assert seen
    assert 100 < float(clock.read_text()) < 160
    assert commands.done == []


def test_commands_are_told_without_the_paths_of_this_machine(tmp_path: Path) -> None:
    commands = evidence.Commands(tmp_path / "out", tmp_path / "sets" / "bccd")
    made = tmp_path / "out" / "made"
    made.parent.mkdir()
    made.touch()
    words = (tmp_path / "out" / "a.safetensors", "--data", tmp_path / "sets" / "bccd", "--config-file", ROOT / "x.yaml")
    commands.run(made, *words, program="benchmarks/frozen_detector.py")
    told = "python benchmarks/frozen_detector.py a.safetensors --data bccd --config-file x.yaml"
    assert commands.done == [(told, 0.0)]


def test_the_processor_time_of_a_child_is_what_the_system_says() -> None:
    busy = (
        "import time; t = time.process_time()\nwhile time.process_time() < t + 0.5: pass\nprint(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 0.4 < evidence.seconds_of(child.pid) < 5
        child.kill()
    assert evidence.seconds_of(child.pid) == 0


def test_readmes_table_is_replaced_and_nothing_else(cells) -> None:
    before = f"# x\n\n{evidence_page.MARK}\n| old | a | b |\n|---|--:|--:|\n| gone | 1 | 2 |\n\nafter | this |\n"
    after = evidence_page.with_table(before, evidence_page.short_table(cells))
    assert after.startswith(f"# x\n\n{evidence_page.MARK}\n| pretraining | linear | kNN |\n")
    assert "| GIM | 37.0 [37.0, 37.0] | 37.0 [37.0, 37.0] |\n\nafter | this |\n" in after
    assert "gone" not in after


def test_the_picture_shows_every_unit_and_the_end_to_end_loss_dashed(cells) -> None:
    figure = evidence_page.curves([cell for some in cells.values() for cell in some])
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["res3", "res5", "SimCLR"]
    assert list(lines["res5"].get_ydata()) == [5.2, 4.5]
    assert lines["SimCLR"].get_linestyle() == "--"
    assert lines["res3"].get_alpha() < lines["res5"].get_alpha()


@pytest.mark.parametrize("name", list(evidence.ROWS))
def test_a_row_has_the_switches_of_the_papers_configuration(name: str) -> None:
    row = evidence.ROWS[name]
    found = evidence.switches(row)
    content = yaml.safe_load((ROOT / "configs" / "pretrain" / f"{row.config}.yaml").read_text())
    for key, value in content.items():
        if isinstance(value, dict) and key in SWITCHES:
            assert all(found[f"{key}.{leaf}"] == value[leaf] for leaf in value)
        elif key in SWITCHES:
            assert found[key] == value
    assert found["METHOD"] in ("simclr", "gim", "loco", "loco_res2")
    block = name in ("gim_conv", "loco", "loco_res2", "loco_blocks", "loco_presnet")
    assert found.get("DECODER.CONV_BLOCKS", 0) == int(block)
    assert ("UNITS" in found) == name.endswith("blocks")


def test_the_lists_share_no_image_and_have_the_same_number_of_each_class(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set/train" / name).mkdir(parents=True)
        for i in range(7):
            (tmp_path / "set/train" / name / f"{i}.jpg").touch()
    write_lists(tmp_path / "set/train", tmp_path, 6, 4)
    train, held = ((tmp_path / file).read_text().split("\n")[:-1] for file in ("train.txt", "held_out.txt"))
    assert (len(train), len(held)) == (6, 4)
    assert not set(train) & set(held)
    for lines in (train, held):
        paths, classes = zip(*(line.split("\t") for line in lines))
        assert all(
            (tmp_path / path).is_file() and Path(path).parent.name == label for path, label in zip(paths, classes)
        )
        assert classes.count("cat") == classes.count("dog")
    before = train
    write_lists(tmp_path / "set/train", tmp_path, 6, 4)
    assert (tmp_path / "train.txt").read_text().split("\n")[:-1] == before


def test_the_rate_of_a_row_is_the_one_with_the_highest_score(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    for rate, score in zip(evidence.RATES, (40.0, 41.8, 38.9, 36.8, 36.7), strict=True):
        (tmp_path / f"rate_gim_{rate:g}.json").write_text(json.dumps({"held_out_top1": score}))
    assert evidence.best_rate("gim") == evidence.RATES[1]


def test_rates_are_chosen_for_methods_and_shown_for_other_rows_when_asked(tmp_path: Path, monkeypatch) -> None:
    options = ["rates", "--cifar", "x.zip", "--out", "x"]
    args = evidence.arguments().parse_args(options)
    assert {evidence.ROWS[row].rate_of for row in evidence.ROWS} == set(args.rows)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "rate_cell", lambda name, rate, _: {"row": name, "held_out_top1": rate})
    args = evidence.arguments().parse_args([*options, "--rows", "gim_blocks", "loco_presnet"])
    args.out = tmp_path
    evidence.choose_rates(args)
    made = {f"rate_gim_blocks_{rate:g}.json" for rate in evidence.RATES}
    made |= {f"rate_loco_presnet_{rate}.json" for rate in ("0.0625", "0.125", "0.25")}
    assert {file.name for file in tmp_path.glob("*.json")} == made
    assert evidence.best_rate("loco_presnet") == 0.25


@pytest.mark.parametrize(("units", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_cell_records_what_this_processor_computes_in(tmp_path: Path, monkeypatch, units, precision) -> None:
    made = {
        "best_rate": 0.25,
        "pretrain": tmp_path / "b.safetensors",
        "probe": {},
        "losses": {},
        "has_bf16_units": units,
    }
    for name, value in made.items():
        monkeypatch.setattr(evidence, name, lambda *_, value=value: value)
    found = evidence.cell("loco", 1, tmp_path, tmp_path)
    assert (found["precision"], found["rate"], found["seed"]) == (precision, 0.25, 1)


@pytest.mark.parametrize(("row", "images"), [("loco", "train.txt"), ("loco_presnet", "train_half.txt")])
def test_a_row_pretrains_and_chooses_its_rate_on_the_images_of_its_network(
    row: str, images: str, tmp_path: Path, monkeypatch
) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(evidence.Commands, "run", lambda _, made, *words: ran.append(tuple(map(str, words))))
    monkeypatch.setattr(
        evidence, "probe", lambda _, backbone, folder, protocol, told: ran.append(told) or {"x": {"top1": 3}}
    )
    assert evidence.rate_cell(row, 0.25, tmp_path)["held_out_top1"] == 3
    (pretrain, probe) = ran
    assert pretrain[pretrain.index("DATA.PATH") + 1] == str(tmp_path / images)
    assert probe == ("--data", tmp_path / images, "--val", tmp_path / "held_out.txt")


@pytest.fixture
def cells_of_blood(tmp_path: Path) -> Path:
    """A detection set in Pascal VOC's folders: three images of training and two of test, a bright box in each."""
    data = tmp_path / "toys"
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (data / folder).mkdir(parents=True)
    for split, names in {"train": "abc", "test": "de"}.items():
        (data / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image = np.random.default_rng(ord(name)).integers(0, 99, (64, 80, 3), dtype=np.uint8)
            image[16:48, 20:60] += 120
            cv2.imwrite(str(data / f"JPEGImages/{name}.jpg"), image)
            box = "<bndbox><xmin>21</xmin><ymin>17</ymin><xmax>60</xmax><ymax>48</ymax></bndbox>"
            text = f"<annotation><filename>{name}.jpg</filename><object><name>cell</name>{box}</object></annotation>"
            (data / f"Annotations/{name}.xml").write_text(text)
    return data


def test_detectors_are_trained_on_the_frozen_networks_and_compared(
    cells_of_blood: Path, tmp_path: Path, monkeypatch
) -> None:
    """All in this process, two iterations each, on narrow networks with random weights."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.txt").write_text("".join(f"{cells_of_blood}/JPEGImages/{name}.jpg\n" for name in "abcd"))
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(frozen_detector, "ITERATIONS", 2)
    ran = []

    def in_process(self, made: Path, *words: object, program: str = "") -> None:
        words = tuple(map(str, words))
        ran.append((program, *words))
        self.done.append((" ".join(words), 1.0))
        if not made.exists() and program:
            monkeypatch.setattr(sys, "argv", [program, *words])
            frozen_detector.main()
        elif not made.exists():
            extra = ["SOLVER.BATCH_SIZE", "2"] if words[0] == "pretrain" else []
            assert main([*words, *extra]) == 0

    monkeypatch.setattr(evidence.Commands, "run", in_process)
    args = evidence.arguments().parse_args(
        ["detect", "--data", str(cells_of_blood), "--out", str(out), "--rows", "simclr", "--seeds", "0", "1"]
    )
    with pytest.raises(SystemExit, match=r"simclr_0.backbone\.safetensors is not there; run: .* run --rows simclr"):
        evidence.detect(args)
    for seed in (0, 1):  # other weights under the names of SimCLR's
        config = ROOT / "configs/pretrain/evidence_r18.yaml"
        words = ["METHOD", "random", "SEED", str(7 + seed), "OUTPUT_DIR", str(out / f"simclr_{seed}"),
                 "DATA.PATH", str(out / "train.txt"), "SOLVER.BATCH_SIZE", "2"]  # fmt: skip
        assert main(["pretrain", "--quiet", "--config-file", str(config), *words]) == 0
    args.seeds = [0]
    evidence.detect(args)
    (tmp_path / "results/detection.json").unlink()
    args.seeds = [0, 1]  # compared anew, though there is a report of the first
    evidence.detect(args)
    found = json.loads((tmp_path / "results/detection.json").read_text())
    assert found["images"] == {"train": 3, "test": 2}
    assert list(found["rows"]) == ["random", "simclr"]
    assert {(one["backbone"], one["seed"]) for one in found["paired"]} == {("random", 0), ("random", 1)}
    names = ("random_0", "random_1", "simclr_0")
    digests = [(out / f"frozen_{name}" / "backbone.sha256").read_text() for name in names]
    assert len(set(digests)) == 3
    before = len(ran)
    evidence.detect(args)
    assert len(ran) == before, "nothing is made again"


def test_only_the_commands_processor_time_counts(tmp_path: Path) -> None:
    before = evidence.processor_seconds()
    subprocess.run([sys.executable, "-c", "import time; time.sleep(0.3)"], check=True)
    idle = evidence.processor_seconds() - before
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert 0 < idle < evidence.processor_seconds() - before


def test_a_cell_is_made_once_and_by_one_process(tmp_path: Path) -> None:
    made = tmp_path / "results" / "gim_0.json"
    (tmp_path / "out").mkdir()
    with evidence.claimed(made, tmp_path / "out") as mine:
        assert mine
        with evidence.claimed(made, tmp_path / "out") as other:
            assert not other
    made.parent.mkdir()
    made.touch()
    with evidence.claimed(made, tmp_path / "out") as again:
        assert not again


def test_losses_are_means_of_the_lines_between_two_points(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    lines = [{"iteration": 10 * i - 1, "loss/a": float(i), "lr": 1.0} for i in range(1, 121)]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 1199, "knn/res5": 3.0}]))
    found = evidence.losses(file)
    assert list(found) == ["a"]
    assert found["a"][0] == [20, 1.5]
    assert found["a"][-1] == [1200, 119.5]
    assert len(found["a"]) == 60


def test_the_committed_pages_are_what_the_committed_figures_say() -> None:
    cells = evidence_page.complete(evidence_page.read_cells(evidence.RESULTS))
    told = "write it: python benchmarks/evidence_page.py"
    assert evidence_page.PAGE.read_text() == evidence_page.page(), told
    readme = evidence_page.README.read_text()
    assert readme == evidence_page.with_table(readme, evidence_page.short_table(cells)), told
    assert evidence_page.MARK in readme
    there = {file.name for file in evidence_page.PAGE.parent.glob("results_*.png")}
    assert there == {evidence_page.picture(name) for name in evidence_page.compared(cells)}, told
    assert "results.md" in (ROOT / "mkdocs.yml").read_text(), "the page is not in the site's navigation"
