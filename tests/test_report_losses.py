"""The chart of pretraining losses: what is drawn is what metrics.json holds, each unit named, shaded and legible."""

from __future__ import annotations

import colorsys
import json
from itertools import pairwise
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from loco_det.backbones.artifact import describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.cli import main
from loco_det.report.charts import colour_of
from loco_det.report.losses import losses_figure, shade_of, smoothed, unit_losses
from loco_det.report.runs import find_runs

UNITS = {
    "simclr": ["res2-res5"],
    "gim": ["res2-res2", "res3-res3", "res4-res4", "res5-res5"],
    "loco": ["res2-res3", "res3-res4", "res4-res5"],
    "blocks": [f"res{s}.{b}-res{s}.{b}" for s in (2, 3, 4, 5) for b in (0, 1)],
}


def make_run(folder: Path, method: str, steps: range = range(0, 200, 20), units: list[str] | None = None) -> dict:
    """A folder as `loco-det pretrain` leaves it; returns each unit's losses."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"METHOD: {method}\nSEED: 0\nSOLVER: {{BATCH_SIZE: 4}}\nDATA: {{PATH: x}}\n")
    units = UNITS[method] if units is None else units
    rng = np.random.default_rng(len(units))
    losses = {unit: rng.uniform(1, 3, len(steps)).tolist() for unit in units}
    lines = [
        {"iteration": step, **{f"loss/{unit}": y[i] for unit, y in losses.items()}, "std/res2-res3": 0.5, "lr": 0.1}
        for i, step in enumerate(steps)
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return losses


def figure_of(*places: object) -> Figure:
    runs = find_runs([str(place) for place in places])
    return losses_figure(*unit_losses(runs.pretrainings, []), colour_of(runs.backbones()))


def drawn(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    (axes,) = figure.axes
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_lines_are_the_losses_of_metrics_json_named_by_the_last_stage(tmp_path: Path) -> None:
    """Runs of fewer than a hundred lines are not smoothed."""
    losses = {method: make_run(tmp_path / method, method) for method in ("gim", "loco", "simclr")}
    found = drawn(figure_of(tmp_path))
    names = [*(f"gim res{s}" for s in (2, 3, 4, 5)), *(f"loco res{s}" for s in (3, 4, 5)), "simclr res5"]
    assert list(found) == names
    for name, (x, y) in found.items():
        method, stage = name.split()
        (unit,) = (unit for unit in UNITS[method] if unit.endswith(stage))
        assert x == list(range(0, 200, 20))
        assert y == pytest.approx(losses[method][unit], abs=1e-12)


def test_long_runs_are_smoothed_as_a_loop_does() -> None:
    y = np.random.default_rng(0).normal(size=730)
    want = [np.mean([y[j] for j in range(730) if abs(i - j) <= 7]) for i in range(730)]
    np.testing.assert_allclose(smoothed(y), want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(smoothed(np.full(500, 0.25)), 0.25)
    np.testing.assert_array_equal(smoothed(y[:99]) - y[:99], pytest.approx(0, abs=1e-12))


def test_the_run_with_one_unit_is_dashed_and_nothing_else(tmp_path: Path) -> None:
    for method in ("loco", "simclr"):
        make_run(tmp_path / method, method)
    figure = figure_of(tmp_path)
    assert [(line.get_label(), line.get_linestyle()) for line in figure.axes[0].lines] == [
        *((f"loco res{s}", "-") for s in (3, 4, 5)),
        ("simclr res5", "--"),
    ]
    assert "dashed: end to end" in figure.axes[0].get_title()
    assert "dashed" not in figure_of(tmp_path / "loco").axes[0].get_title()


def test_units_of_a_run_share_a_hue_from_light_to_dark(tmp_path: Path) -> None:
    for method in ("gim", "blocks"):
        make_run(tmp_path / method, method)
    colours: dict[str, list[tuple]] = {}
    for line in figure_of(tmp_path).axes[0].lines:
        colour = colorsys.rgb_to_hls(*matplotlib.colors.to_rgb(line.get_color()))
        colours.setdefault(line.get_label().split()[0], []).append(colour)
    hues = {name: {round(hue, 2) for hue, _, _ in found} for name, found in colours.items()}
    assert all(len(hue) == 1 for hue in hues.values())
    assert hues["gim"] != hues["blocks"]
    for found in colours.values():
        lightness = [value for _, value, _ in found]
        assert all(a - b > 0.03 for a, b in pairwise(lightness))
    assert shade_of("#0072B2", 0.5) == matplotlib.colors.to_rgb("#0072B2")


def test_blocks_are_named_and_put_in_order(tmp_path: Path) -> None:
    units = ["res4.10-res4.10", "res2-res3.0", "res4.2-res4.9", "res2-res2.0-1", "stem-stem", "res5-res5", "res4-res5"]
    make_run(tmp_path, "loco", units=units)
    names = [name.removeprefix("loco ") for name in drawn(figure_of(tmp_path))]
    assert names == ["stem", "res2.1", "res3.0", "res4.9", "res4.10", "res5-res5", "res4-res5"]  # two end in res5


def test_seeds_of_a_name_share_a_line_of_the_legend(tmp_path: Path) -> None:
    for seed in range(2):
        make_run(tmp_path / str(seed), "loco")
    (axes,) = figure_of(f"mine={tmp_path}").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"mine res{s}" for s in (3, 4, 5)]
    assert len(axes.lines) == 6
    assert [line.get_color() for line in axes.lines[:3]] == [line.get_color() for line in axes.lines[3:]]


def test_the_fall_at_the_beginning_does_not_squeeze_the_rest(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "loco", range(0, 1000, 10))
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.json").read_text().splitlines()]
    for line in lines[:3]:
        line.update({f"loss/{unit}": 90.0 for unit in UNITS["loco"]})
    (tmp_path / "a/metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (axes,) = figure_of(tmp_path / "a").axes
    low, high = axes.get_ylim()
    assert max(line.get_ydata().max() for line in axes.lines) == 90  # it is drawn, above the axis
    assert all(low < y < high < 3.2 for line in axes.lines for y in line.get_ydata()[5:])


@pytest.mark.parametrize("runs", [1, 4])
def test_the_legend_of_many_units_is_legible(tmp_path: Path, runs: int) -> None:
    """Every entry lies inside the picture, none on another, and they leave at least half of it to the curves."""
    for number in range(runs):
        make_run(tmp_path / f"run{number}", "blocks")
    figure = figure_of(*(f"{place.name}={place}" for place in sorted(tmp_path.iterdir())))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = figure.axes[0].get_legend().get_texts()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(texts) == 8 * runs
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 and figure.bbox.y0 <= b.y0 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(text.get_fontsize() >= 8 for text in texts)
    assert figure.axes[0].get_window_extent().width > figure.bbox.width / 2


# --- epochs or steps ----------------------------------------------------------------------------------------------


def leave_backbone(folder: Path, images: int) -> None:
    manifest = describe(ResNet(18), stem="imagenet", method="loco", images=images)
    save_backbone(folder / "backbone.safetensors", {"few": torch.zeros(1)}, manifest)


def test_x_is_epochs_where_every_run_says_how_many_images_it_saw(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for method, images in (("loco", 43), ("simclr", 80)):  # 10 and 20 batches of 4; three images fill none
        make_run(tmp_path / method, method)
        leave_backbone(tmp_path / method, images)
    figure = figure_of(tmp_path)
    assert figure.axes[0].get_xlabel() == "epoch"
    found = drawn(figure)
    assert found["loco res3"][0] == [step / 10 for step in range(0, 200, 20)]
    assert found["simclr res5"][0] == [step / 20 for step in range(0, 200, 20)]
    for content in (None, b"\x00" * 50):
        (tmp_path / "loco/backbone.safetensors").unlink(missing_ok=True)
        if content:
            (tmp_path / "loco/backbone.safetensors").write_bytes(content)
        figure = figure_of(tmp_path)
        assert figure.axes[0].get_xlabel() == "step"
        assert drawn(figure)["simclr res5"][0] == list(range(0, 200, 20))


# --- the command --------------------------------------------------------------------------------------------------


def test_the_report_has_the_chart_and_its_png(tmp_path: Path) -> None:
    for method in ("loco", "simclr"):
        make_run(tmp_path / method, method)
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "loco"), str(tmp_path / "simclr"), "--out", str(out), "--quiet"]) == 0
    with Image.open(out / "pretraining_losses.png") as picture:
        assert picture.size == (1080, 630)
    page = (out / "index.html").read_text()
    for text in ("<h3>Pretraining</h3>", "loco res3", "simclr res5", "NT-Xent"):
        assert text in page
    assert "Training: nothing was given" not in page


def test_runs_without_losses_are_named_or_train_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "short", "loco", range(0, 1))
    make_run(tmp_path / "random", "random", units=[])
    out = tmp_path / "out"
    assert main(["report", str(tmp_path), "--out", str(out), "--quiet"]) == 0
    missing = json.loads((out / "report.json").read_text())["missing"]
    assert missing == [f"{tmp_path / 'short'}: loco: fewer than two losses in metrics.json, so no curve"]
    assert not (out / "pretraining_losses.png").exists()


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, "simclr")
    lines = [
        {"iteration": 0, "loss/res2-res5": 3.0, "loss/": 1, "loss/res2": 1},
        {"iteration": 1, "loss/res2-res5": None},
        {"loss/res2-res5": 1.0},
        {"iteration": 5, "loss/res2-res5": 2},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert drawn(figure_of(tmp_path)) == {"simclr res5": ([0.0, 5.0], [3.0, 2.0])}
