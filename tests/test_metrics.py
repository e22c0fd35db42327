"""metrics.json, and the same numbers in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from loco_det.cli import run_job
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.core.metrics import RunMetrics
from pretrain.defaults import get_cfg

ROOT = Path(__file__).resolve().parent.parent


def opened(folder: Path, wandb: str | None = None, resume: bool = False) -> RunMetrics:
    return RunMetrics(load_config(get_cfg(), "", ["OUTPUT_DIR", str(folder), "SEED", "7"])[0], wandb, resume)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


# --- metrics.json -----------------------------------------------------------------------------------------------


def test_every_line_of_metrics_is_valid_json(tmp_path: Path) -> None:
    with opened(tmp_path) as metrics:
        metrics.write({"iteration": 0, "loss": float("nan"), "AP": np.float64("inf")})
        metrics.write({"iteration": 1, "loss": 0.25, "note": "x"})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert found == [{"iteration": 0, "loss": None, "AP": None}, {"iteration": 1, "loss": 0.25, "note": "x"}]


@pytest.mark.parametrize("left", ['{"bbox/A', '{"bbox/AP": 30.0}\n'], ids=["in the line", "after the line"])
def test_an_evaluation_that_was_killed_and_is_run_again_has_one_line(tmp_path: Path, left: str) -> None:
    with opened(tmp_path) as metrics:
        metrics.write({"iteration": 0})
    with open(tmp_path / "metrics.json", "a") as file:
        file.write(left)
    with opened(tmp_path) as metrics:
        metrics.write({"bbox/AP": 30.0})
        assert lines(tmp_path) == [{"iteration": 0}, {"bbox/AP": 30.0}]
        metrics.write({"bbox/AP": 31.0})  # another one
    assert lines(tmp_path) == [{"iteration": 0}, {"bbox/AP": 30.0}, {"bbox/AP": 31.0}]


def test_trimming_drops_what_will_come_again_and_a_cut_off_line(tmp_path: Path) -> None:
    with opened(tmp_path) as metrics:
        for iteration in range(6):
            metrics.write({"iteration": iteration})
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 2, "los')
    with opened(tmp_path) as metrics:
        metrics.trim(3)
        assert lines(tmp_path) == [{"iteration": i} for i in range(3)]
        metrics.write({"iteration": 3})
    assert lines(tmp_path) == [{"iteration": i} for i in range(4)]


def test_a_run_without_lines_leaves_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "absent") as metrics:
        metrics.trim(3)
    assert not (tmp_path / "absent").exists()


def test_metrics_into_a_missing_folder_are_bad_input(tmp_path: Path) -> None:
    with opened(tmp_path / "absent") as metrics, pytest.raises(UserError, match="cannot be written"):
        metrics.write({"iteration": 0})


# --- TensorBoard ------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_same_numbers_and_loses_what_is_trimmed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    with opened(tmp_path) as metrics:
        for iteration in range(5):
            metrics.write({"iteration": iteration, "loss/a": iteration / 2, "note": "x", "none": None})
        metrics.write({"AP": 1.0})  # without an iteration
        assert read() == {"loss/a": [(i, i / 2) for i in range(5)]}  # while the run is still going
    with opened(tmp_path) as metrics:
        metrics.trim(3)
        metrics.write({"iteration": 3, "loss/a": 7.0, "knn": 50})
    assert read() == {"loss/a": [(0, 0.0), (1, 0.5), (2, 1.0), (3, 7.0)], "knn": [(3, 50.0)]}


def test_without_tensorboard_there_is_no_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with opened(tmp_path) as metrics:
        metrics.write({"iteration": 0, "loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


# --- Weights & Biases -------------------------------------------------------------------------------------------


class Run:
    """A W&B run that records the calls made to it."""

    offline = True

    def __init__(self, id: str, **settings: object) -> None:
        self.id, self.settings = id, settings
        self.lines: list[dict] = []
        self.summary: dict[str, float] = {}
        self.exit_codes: list[int] = []
        self.axes: dict[str, str | None] = {}

    def log(self, values: dict) -> None:
        assert not self.exit_codes, "the run has ended"
        self.lines.append(values)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


class Wandb(ModuleType):
    """As much of wandb as we call; a run without an id gets the next of 1, 2, ..."""

    class errors:
        Error = RuntimeError

    Settings = dict

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: list[Run] = []

    def init(self, id: str | None, **settings: object) -> Run:
        self.runs.append(Run(id or str(len({run.id for run in self.runs}) + 1), **settings))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_wandb_gets_the_configuration_and_the_same_numbers(tmp_path: Path, wandb: Wandb) -> None:
    with opened(tmp_path, "backbones") as metrics:
        metrics.write({"iteration": 0, "loss/a": 0.5, "note": "x", "none": None})
        metrics.write({"bbox/AP": 12.5})  # without an iteration
    (run,) = wandb.runs
    assert run.lines == [{"iteration": 0, "loss/a": 0.5}]
    assert run.summary == {"bbox/AP": 12.5}
    assert run.axes == {"iteration": None, "*": "iteration"}
    assert (run.settings["project"], run.settings["dir"]) == ("backbones", str(tmp_path))
    assert run.settings["name"] == "/".join(tmp_path.parts[-2:])
    assert run.settings["config"]["SEED"] == 7
    assert run.exit_codes == [0]


def test_a_run_that_fails_ends_its_wandb_run_as_failed(tmp_path: Path, wandb: Wandb) -> None:
    with pytest.raises(UserError, match="stopped"), opened(tmp_path, "p"):
        raise UserError("stopped")
    assert wandb.runs[0].exit_codes == [1]


def test_runs_that_are_open_at_once_do_not_mix(tmp_path: Path, wandb: Wandb) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with opened(tmp_path / "a", "p") as first, opened(tmp_path / "b", "p") as second:
        for iteration in range(2):
            first.write({"iteration": iteration, "of": 1})
            second.write({"iteration": iteration, "of": 2})
    with opened(tmp_path / "a") as later:  # without W&B
        later.write({"iteration": 2, "of": 1})
    assert [[line["of"] for line in run.lines] for run in wandb.runs] == [[1, 1], [2, 2]]
    assert [line["of"] for line in lines(tmp_path / "a")] == [1, 1, 1]
    assert [line["of"] for line in lines(tmp_path / "b")] == [2, 2]


def test_resume_goes_on_in_the_last_wandb_run_that_trained(tmp_path: Path, wandb: Wandb) -> None:
    training, evaluation = {"iteration": 0, "loss/a": 0.5}, {"bbox/AP": 12.5}
    for line, resume in ((training, False), (evaluation, False), (None, False), (training, True), (evaluation, True),
                         (training, False), (training, True)):  # fmt: skip
        with opened(tmp_path, "backbones", resume) as metrics:
            if line is not None:
                metrics.write(line)
    assert [run.id for run in wandb.runs] == ["1", "2", "3", "1", "1", "4", "4"]
    assert [run.settings["resume"] for run in wandb.runs] == [None, None, None, "allow", "allow", None, "allow"]
    assert [run.lines for run in wandb.runs] == [[training], [], [], [training], [], [training], [training]]


def test_the_note_of_a_wandb_run_is_written_once(tmp_path: Path, wandb: Wandb) -> None:
    note, seen = tmp_path / "wandb" / "run_id.txt", []
    with opened(tmp_path, "backbones") as metrics:
        for iteration in range(3):
            metrics.write({"iteration": iteration})
            seen.append(note.read_text())
            note.write_text("kept\n")
    assert seen == ["1\n", "kept\n", "kept\n"]


def test_pretrain_and_train_send_their_lines_when_asked(tmp_path: Path, tiny_data: Path, wandb: Wandb) -> None:
    import test_pretrain_train
    from tiny_detection import overrides

    images, out = tiny_data / "tiny" / "train", tmp_path / "pretrain"
    assert run_job("pretrain", ["--config-file", "configs/pretrain/loco_r50.yaml", "--wandb", "p",
                                *test_pretrain_train.overrides(images, out)]) == 0  # fmt: skip
    tiny = overrides(OUTPUT_DIR=tmp_path / "train", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    assert run_job("train", ["--config-file", "configs/coco_loco_r50.yaml", "--engine", "torchvision", "--wandb", "p",
                             *tiny]) == 0  # fmt: skip
    expected = ((out, "loss/res2-res3"), (tmp_path / "train", "bbox/AP"))
    for run, (folder, name) in zip(wandb.runs, expected, strict=True):
        numbers = [{k: v for k, v in line.items() if isinstance(v, (int, float))} for line in lines(folder)]
        assert [{k: line[k] for k in old} for line, old in zip(run.lines, numbers, strict=True)] == numbers
        assert name in numbers[-1]
        assert run.exit_codes == [0]


@pytest.mark.parametrize("job", ["pretrain", "train"])
def test_without_wandb_one_sentence_names_the_extra_before_anything_is_done(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = {"pretrain": "configs/pretrain/loco_r50.yaml", "train": "configs/coco_loco_r50.yaml"}[job]
    assert run_job(job, ["--config-file", config, "--wandb", "p", "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert "pip install 'loco_det[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_pretraining_without_images_leaves_no_wandb_run_to_go_on_in(tmp_path: Path, wandb: Wandb) -> None:
    config = ["--config-file", "configs/pretrain/loco_r50.yaml", "--wandb", "p"]
    overrides = ["OUTPUT_DIR", str(tmp_path / "out"), "DATA.PATH", str(tmp_path / "absent"), "DEVICE", "cpu"]
    for resume in ([], ["--resume"]):
        assert run_job("pretrain", [*config, *resume, *overrides]) == 2
    assert [(run.id, run.exit_codes) for run in wandb.runs] == [("1", [1]), ("2", [1])]
    assert (tmp_path / "out" / "log.txt").read_text().count("of project p") == 2


WITH_WANDB = """
import sys
from loco_det.core.config import load_config
from loco_det.core.metrics import RunMetrics
from pretrain.defaults import get_cfg
cfg = load_config(get_cfg(), "", ["OUTPUT_DIR", sys.argv[1]])[0]
for resume in (False, True):
    with RunMetrics(cfg, "backbones", resume) as metrics:
        metrics.write({"iteration": 0, "loss/a": 0.5})
        metrics.write({"bbox/AP": 12.5})
        print(metrics.sinks[-1].run.id)
"""


@pytest.mark.parametrize("mode", ["offline", "disabled", "online"])
def test_wandb_itself_takes_our_calls_or_has_no_account(mode: str, tmp_path: Path) -> None:
    """In a process of its own, since W&B reads its environment once."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"WANDB_MODE": mode, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITH_WANDB, str(tmp_path / "out")]
    done = subprocess.run(
        command, env={**kept, **own}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    if mode == "online":
        assert re.search(r"UserError: --wandb backbones: W&B cannot begin a run .*wandb login", done.stderr)
        return
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "out")) == 4
    first, second = done.stdout.split()[-2:]
    assert first == second
    assert bool(list((tmp_path / "out" / "wandb").glob("*run-*"))) == (mode == "offline")
