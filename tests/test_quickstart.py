"""Output and files of `loco-det quickstart`; test_road.py runs all steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loco_det.commands import quickstart
from loco_det.core.log import log, setup_logging

METRICS = {kind: {"AP": 1.0, "AP50": 2.0, "AP75": 0.5} for kind in ("bbox", "segm")}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data, conversion, training or pictures."""

    def train_net(cfg: Any, engine: str) -> dict[str, Any]:
        log.info("trained in %s", cfg.OUTPUT_DIR)
        return METRICS

    for name in ("make_shapes_dataset", "convert", "_draw"):
        monkeypatch.setattr(quickstart, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(quickstart, "train_net", train_net)
    monkeypatch.setattr(quickstart, "pretrain_file", pretrain)


def pretrain(config: str, overrides: list[str]) -> Path:
    folder = Path(overrides[overrides.index("OUTPUT_DIR") + 1])
    setup_logging(folder)
    log.info("pretrained in %s", folder)
    return folder / "backbone.safetensors"


def test_each_run_has_its_log_and_the_whole_has_all(stubs: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(quiet=False)
    quickstart.quickstart(tmp_path)
    whole = (tmp_path / "log.txt").read_text().splitlines()
    assert len(whole) == 3 * len(quickstart.METHODS)
    for at, method in enumerate(quickstart.METHODS):
        pretrained = (tmp_path / method / "pretrain" / "log.txt").read_text().splitlines()
        trained = (tmp_path / method / "detector" / "log.txt").read_text().splitlines()
        assert [line.split(" I ")[1] for line in pretrained + trained] == [
            f"pretrained in {tmp_path / method / 'pretrain'}",
            f"trained in {tmp_path / method / 'detector'}",
        ]
        assert whole[3 * at + 1 : 3 * at + 3] == pretrained + trained
    assert "backbone" in capsys.readouterr().out


def test_quiet_prints_no_table(stubs: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    setup_logging(quiet=True)
    quickstart.quickstart(tmp_path)
    out, err = capsys.readouterr()
    assert out == err == ""
    assert (tmp_path / "results.json").exists()
