"""metrics.json, and the same numbers in TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from loco_det.cli import run_job
from loco_det.core import metrics
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.core.metrics import append_metrics, trim_metrics, wandb_run
from pretrain.defaults import get_cfg

ROOT = Path(__file__).resolve().parent.parent


def test_every_line_of_metrics_is_valid_json(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"iteration": 0, "loss": float("nan"), "AP": np.float64("inf")})
    append_metrics(tmp_path, {"iteration": 1, "loss": 0.25, "note": "x"})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines == [{"iteration": 0, "loss": None, "AP": None}, {"iteration": 1, "loss": 0.25, "note": "x"}]


def test_trimming_drops_what_will_come_again_and_a_cut_off_line(tmp_path: Path) -> None:
    for iteration in range(6):
        append_metrics(tmp_path, {"iteration": iteration})
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 2, "los')
    trim_metrics(tmp_path, 3)
    assert [json.loads(x)["iteration"] for x in (tmp_path / "metrics.json").read_text().splitlines()] == [0, 1, 2]
    trim_metrics(tmp_path / "absent", 3)


def test_tensorboard_gets_the_same_numbers_and_loses_what_is_trimmed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path))
        events.Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    for iteration in range(5):
        append_metrics(tmp_path, {"iteration": iteration, "loss/a": iteration / 2, "note": "x", "none": None})
    append_metrics(tmp_path, {"AP": 1.0})  # says not when
    assert read() == {"loss/a": [(i, i / 2) for i in range(5)]}
    trim_metrics(tmp_path, 3)
    append_metrics(tmp_path, {"iteration": 3, "loss/a": 7.0, "knn": 50})
    assert read() == {"loss/a": [(0, 0.0), (1, 0.5), (2, 1.0), (3, 7.0)], "knn": [(3, 50.0)]}


def test_without_tensorboard_there_is_no_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    append_metrics(tmp_path, {"iteration": 0, "loss": 1.0})
    trim_metrics(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_metrics_into_a_missing_folder_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        append_metrics(tmp_path / "absent", {"iteration": 0})


# --- Weights & Biases -------------------------------------------------------------------------------------------


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")


def sent(folder: Path) -> dict[str, list]:
    """What the offline runs below a folder would send: histories, summaries, run ids and exit codes, oldest first.

    A .wandb file is a LevelDB log of W&B's protocol buffers: seven bytes, then blocks of 32 KiB of records, each with
    checksum, length and whether it is whole (1), begins (2), goes on (3) or ends (4).
    """
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list] = {"history": [], "summary": [], "run": [], "exit": [], "config": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        data, place, text = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            text += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(text)
                text = b""
                kept = record.WhichOneof("record_type")
                if kept == "history":
                    items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                    found[kept].append({k: v for k, v in items.items() if not k.startswith("_")})
                elif kept == "summary":
                    found[kept] += [{i.key: json.loads(i.value_json)} for i in record.summary.update]
                elif kept == "run":
                    found[kept].append((record.run.project, record.run.display_name, record.run.run_id))
                    found["config"].append({i.key: json.loads(i.value_json) for i in record.run.config.update})
                elif kept == "exit":
                    found[kept].append(record.exit.exit_code)
    return found


@pytest.mark.usefixtures("_offline")
def test_wandb_gets_the_same_numbers_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    cfg = load_config(get_cfg(), "", ["OUTPUT_DIR", str(tmp_path), "SEED", "7"])[0]

    def stopped() -> None:
        with wandb_run(cfg, "backbones"):
            append_metrics(tmp_path, {"iteration": 0, "loss/a": 0.5, "note": "x", "none": None})
            raise UserError("stopped")

    with pytest.raises(UserError, match="stopped"):
        stopped()
    time.sleep(1.1)  # W&B names a run's folder by the second
    with wandb_run(cfg, "backbones", resume=True):
        append_metrics(tmp_path, {"iteration": 1, "loss/a": 0.25})
        append_metrics(tmp_path, {"bbox/AP": 12.5})  # says not when
    append_metrics(tmp_path, {"iteration": 2, "loss/a": 9.0})  # no longer inside
    found = sent(tmp_path)
    assert found["history"] == [{"iteration": 0, "loss/a": 0.5}, {"iteration": 1, "loss/a": 0.25}]
    assert {"bbox/AP": 12.5} in found["summary"]
    assert found["exit"] == [1, 0]
    first, second = found["run"]
    assert first == second
    assert first[:2] == ("backbones", "/".join(tmp_path.parts[-2:]))
    assert found["config"][0]["SEED"] == 7


@pytest.mark.usefixtures("_offline")
def test_pretrain_and_train_send_their_lines_when_asked(tmp_path: Path, tiny_data: Path) -> None:
    import test_pretrain_train
    from tiny_detection import overrides

    images, out = tiny_data / "tiny" / "train", tmp_path / "pretrain"
    assert run_job("pretrain", ["--config-file", "configs/pretrain/loco_r50.yaml", "--wandb", "p",
                                *test_pretrain_train.overrides(images, out)]) == 0  # fmt: skip
    tiny = overrides(OUTPUT_DIR=tmp_path / "train", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    assert run_job("train", ["--config-file", "configs/coco_loco_r50.yaml", "--engine", "torchvision", "--wandb", "p",
                             *tiny]) == 0  # fmt: skip
    for folder, expected in ((out, "loss/res2-res3"), (tmp_path / "train", "bbox/AP")):
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        numbers = [{k: v for k, v in line.items() if isinstance(v, (int, float))} for line in lines]
        found = sent(folder)["history"]
        assert [{k: line[k] for k in old} for line, old in zip(found, numbers, strict=True)] == numbers
        assert expected in found[-1]


@pytest.mark.parametrize("job", ["pretrain", "train"])
def test_without_wandb_one_sentence_names_the_extra_before_anything_is_done(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = {"pretrain": "configs/pretrain/loco_r50.yaml", "train": "configs/coco_loco_r50.yaml"}[job]
    assert run_job(job, ["--config-file", config, "--wandb", "p", "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert "pip install 'loco_det[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Wandb(ModuleType):
    """As much of wandb as `wandb_run` calls: its runs are called 1, 2, ..., and keep what they were told."""

    class errors:
        Error = RuntimeError

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.lines: list[tuple[str, dict]] = []
        self.started: list[str] = []

    Settings = dict

    def init(self, id: str | None, **_: object) -> SimpleNamespace:
        name = id or str(len(set(self.started)) + 1)
        self.started.append(name)

        def told(values: dict) -> None:
            self.lines.append((name, values))

        def ignored(*_: object, **__: object) -> None: ...

        return SimpleNamespace(
            id=name, offline=True, log=told, summary=SimpleNamespace(update=told), define_metric=ignored, finish=ignored
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stub = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_resume_goes_on_in_the_last_wandb_run_that_trained(tmp_path: Path, wandb: Wandb) -> None:
    cfg = load_config(get_cfg(), "", ["OUTPUT_DIR", str(tmp_path)])[0]
    training, evaluation = {"iteration": 0, "loss/a": 0.5}, {"bbox/AP": 12.5}
    for line, resume in ((training, False), (evaluation, False), (None, False), (training, True), (evaluation, True),
                         (training, False), (training, True)):  # fmt: skip
        with wandb_run(cfg, "backbones", resume):
            if line is not None:
                append_metrics(tmp_path, line)
    assert wandb.started == ["1", "2", "3", "1", "1", "4", "4"]
    assert wandb.lines == [("1", training), ("2", evaluation), ("1", training), ("1", evaluation), ("4", training),
                           ("4", training)]  # fmt: skip


def test_the_note_of_a_wandb_run_is_read_once(tmp_path: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, touched = load_config(get_cfg(), "", ["OUTPUT_DIR", str(tmp_path)])[0], []
    note = metrics._wandb_note
    monkeypatch.setattr(metrics, "_wandb_note", lambda folder: touched.append(folder) or note(folder))
    with wandb_run(cfg, "backbones", resume=True):
        touched.clear()
        for iteration in range(4):
            append_metrics(tmp_path, {"iteration": iteration})
        assert len(touched) == 1
    assert note(tmp_path).read_text() == "1\n"


def test_a_pretraining_without_images_leaves_no_wandb_run_to_go_on_in(tmp_path: Path, wandb: Wandb) -> None:
    config = ["--config-file", "configs/pretrain/loco_r50.yaml", "--wandb", "p"]
    overrides = ["OUTPUT_DIR", str(tmp_path / "out"), "DATA.PATH", str(tmp_path / "absent"), "DEVICE", "cpu"]
    for resume in ([], ["--resume"]):
        assert run_job("pretrain", [*config, *resume, *overrides]) == 2
    assert wandb.started == ["1", "2"]
    assert (tmp_path / "out" / "log.txt").read_text().count("of project p") == 2


WITH_WANDB = """
import sys
from loco_det.core.config import load_config
from loco_det.core.metrics import append_metrics, wandb_run
from pretrain.defaults import get_cfg
cfg = load_config(get_cfg(), "", ["OUTPUT_DIR", sys.argv[1]])[0]
with wandb_run(cfg, "backbones"):
    append_metrics(cfg.OUTPUT_DIR, {"iteration": 0, "loss/a": 0.5})
"""


@pytest.mark.parametrize("mode", ["disabled", "online"])
def test_wandb_that_is_off_or_has_no_account(mode: str, tmp_path: Path) -> None:
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
    assert list((tmp_path / "out" / "wandb").glob("*run-*")) == []
    assert (tmp_path / "out" / "metrics.json").read_text().count("\n") == 1
