"""Writes docs/results.md, its pictures and README's table from the figures in benchmarks/results/evidence/.

python benchmarks/evidence_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evidence import HELD_OUT, PRETRAINED, RATE_EPOCHS, RATES, RESULTS, ROOT, ROWS
from matplotlib.figure import Figure

from loco_det.report.drawing import COLOURS
from loco_det.report.plots import save_figure
from loco_det.report.statistics import summarise
from loco_det.runtime import atomic_write

PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
MARK = "<!-- evidence table -->"
# What each table compares: its rows, and what its columns probe.
TABLES = {
    "Units of stages": ("simclr", "gim", "gim_conv", "loco_mlp", "loco", "loco_res2"),
    "Units of single blocks": ("simclr", "gim_blocks", "loco_blocks"),
    "Progressive ResNet": ("simclr_presnet", "gim_presnet", "loco_presnet"),
}
WORDS = {
    "simclr": "SimCLR, end to end",
    "gim": "GIM",
    "gim_conv": "GIM with LoCo's decoder",
    "loco_mlp": "LoCo with GIM's decoder",
    "loco": "LoCo",
    "loco_res2": "LoCo, fourth loss on res2",
    "gim_blocks": "GIM, a loss for each block",
    "loco_blocks": "LoCo, a loss for every two blocks",
    "simclr_presnet": "SimCLR, end to end",
    "gim_presnet": "GIM",
    "loco_presnet": "LoCo",
}


def write_page() -> None:
    """docs/results.md, docs/results_*.png and the table in README.md."""
    cells = read_cells(RESULTS)
    for name, rows in TABLES.items():
        present = [cell for row in rows for cell in cells.get(row, [])]
        if present:
            save_figure(curves(present), PAGE.parent / picture(name))
    with atomic_write(PAGE, "w") as file:
        file.write(page_text(cells, read_rates(RESULTS)))
    text = README.read_text()
    with atomic_write(README, "w") as file:
        file.write(with_table(text, short_table(cells)))


def read_cells(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{row: its cells in the order of their seeds}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        if not file.name.startswith("rate_"):
            cell = json.loads(file.read_text())
            found.setdefault(cell["row"], []).append(cell)
    return found


def read_rates(folder: Path) -> dict[str, dict[float, float]]:
    """{row: {rate: top-1 on the images held out}}."""
    found: dict[str, dict[float, float]] = {}
    for file in sorted(folder.glob("rate_*.json")):
        cell = json.loads(file.read_text())
        found.setdefault(cell["row"], {})[cell["rate"]] = cell["held_out_top1"]
    return found


# --- tables -----------------------------------------------------------------------------------------------------


def short_table(cells: dict[str, list[dict[str, Any]]]) -> str:
    """README's: linear and nearest neighbours on the last stage; nothing where no row has been run."""
    lines = ["| pretraining | linear | kNN |", "|---|--:|--:|"]
    for row in dict.fromkeys(row for rows in TABLES.values() for row in rows):
        if row in cells and ROWS[row].network == "r18":
            figures = (number(top1(cells[row], protocol, last(cells[row]))) for protocol in ("linear", "knn"))
            lines.append(f"| {WORDS[row]} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def with_table(text: str, table: str) -> str:
    """README's text with the table that follows the mark replaced."""
    return re.sub(rf"({re.escape(MARK)}\n)(\|.*\n)*", lambda found: found[1] + table, text)


def full_table(rows: tuple[str, ...], cells: dict[str, list[dict[str, Any]]], protocol: str) -> str:
    present = [row for row in rows if row in cells]
    stages = list(cells[present[0]][0]["probes"][protocol])
    lines = ["| pretraining | seeds | " + " | ".join(stages) + " |", "|---|--:|" + "--:|" * len(stages)]
    for row in present:
        figures = (number(top1(cells[row], protocol, stage)) for stage in stages)
        lines.append(f"| {WORDS[row]} | {len(cells[row])} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def top1(cells: list[dict[str, Any]], protocol: str, stage: str) -> list[float]:
    return [cell["probes"][protocol][stage]["top1"] for cell in cells]


def last(cells: list[dict[str, Any]]) -> str:
    return list(cells[0]["probes"]["linear"])[-1]


def number(values: list[float]) -> str:
    """The mean, and in brackets its 95 % interval where there are several."""
    found = summarise(values)
    if found["ci95"] is None:
        return f"{found['mean']:.1f}"
    low, high = found["ci95"]
    return f"{found['mean']:.1f} [{low:.1f}, {high:.1f}]"


def difference(cells: dict[str, list[dict[str, Any]]], row: str, base: str, protocol: str) -> dict[str, Any] | None:
    """Row minus base at the last stage, seed by seed, as `summarise` gives it; None without two common seeds."""
    if row not in cells or base not in cells:
        return None
    of = {
        name: {cell["seed"]: top1([cell], protocol, last(cells[name]))[0] for cell in cells[name]}
        for name in (row, base)
    }
    common = sorted(set(of[row]) & set(of[base]))
    return summarise([of[row][seed] - of[base][seed] for seed in common]) if len(common) > 1 else None


def verdicts(rows: tuple[str, ...], cells: dict[str, list[dict[str, Any]]]) -> str:
    """For each row but the first: how far it is from the first, with the interval of the paired difference."""
    lines = []
    for row in rows[1:]:
        found = {protocol: difference(cells, row, rows[0], protocol) for protocol in ("linear", "knn", "ridge")}
        if all(found.values()):
            told = ", ".join(
                f"{protocol} {f['mean']:+.1f} [{f['ci95'][0]:+.1f}, {f['ci95'][1]:+.1f}]"
                for protocol, f in found.items()
            )
            lines.append(f"- {WORDS[row]} against {WORDS[rows[0]]}, last stage, seed by seed: {told}.")
    return "\n".join(lines) + "\n"


# --- pictures ---------------------------------------------------------------------------------------------------


def picture(name: str) -> str:
    return f"results_{name.lower().replace(' ', '_')}.png"


def curves(cells: list[dict[str, Any]]) -> Figure:
    """Every unit's loss of the first seed over steps, one panel a row; the end-to-end loss dashed in each."""
    rows = list(dict.fromkeys(cell["row"] for cell in cells))
    first = {row: next(cell for cell in cells if cell["row"] == row) for row in rows}
    end_to_end = next((first[row] for row in rows if len(first[row]["losses"]) == 1), None)
    panels = [row for row in rows if len(first[row]["losses"]) > 1] or rows
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for axes, row, colour in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, COLOURS * len(panels)
    ):
        units = first[row]["losses"]
        for place, (unit, points) in enumerate(units.items()):
            alpha = 0.35 + 0.65 * (place + 1) / len(units)
            axes.plot(*zip(*points), color=colour, alpha=alpha, label=unit.partition("-")[2], linewidth=1.2)
        if end_to_end is not None:
            (points,) = end_to_end["losses"].values()
            axes.plot(*zip(*points), color="black", linestyle="--", label="SimCLR", linewidth=1.2)
        axes.set(title=WORDS[row], xlabel="step")
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, ncols=2)
    figure.axes[0].set_ylabel("NT-Xent")
    return figure


def final_losses(rows: tuple[str, ...], cells: dict[str, list[dict[str, Any]]]) -> str:
    """A line a row: each unit's loss at the end, mean over seeds."""
    lines = []
    for row in (row for row in rows if row in cells):
        ends = {
            unit: sum(cell["losses"][unit][-1][1] for cell in cells[row]) / len(cells[row])
            for unit in cells[row][0]["losses"]
        }
        told = ", ".join(f"{unit.partition('-')[2]} {value:.2f}" for unit, value in ends.items())
        lines.append(f"- {WORDS[row]}: {told}")
    return "\n".join(lines) + "\n"


# --- the page ---------------------------------------------------------------------------------------------------


def page_text(cells: dict[str, list[dict[str, Any]]], rates: dict[str, dict[float, float]]) -> str:
    """docs/results.md from the figures alone."""
    parts = [HEAD]
    for name, rows in TABLES.items():
        if not any(row in cells for row in rows):
            continue
        parts.append(f"## {name}\n")
        for protocol, words in (("linear", "linear probe"), ("knn", "20 nearest neighbours"), ("ridge", "ridge")):
            parts += [
                f"{words.capitalize()}, top-1 on CIFAR-10's test images, percent:\n",
                full_table(rows, cells, protocol),
            ]
        parts += [verdicts(rows, cells), f"![Losses of every unit]({picture(name)})\n"]
        parts += ["Losses at the end of training:\n", final_losses(rows, cells)]
    parts += [how(cells), rates_table(rates), TAIL]
    return "\n".join(parts)


def how(cells: dict[str, list[dict[str, Any]]]) -> str:
    every = [cell for some in cells.values() for cell in some]
    if not every:
        return ""
    hours = sum(seconds for cell in every for _, seconds in cell["commands"]) / 3600
    machine = every[0]["environment"]
    longest = max(sum(seconds for _, seconds in cell["commands"]) for cell in every) / 60
    return (
        "## How\n\n"
        f"{PRETRAINED:,} of CIFAR-10's training images, the same of each class, 30 epochs in batches of 128; "
        "`configs/pretrain/evidence_r18.yaml` and `evidence_presnet.yaml` hold what all rows share. Each row's METHOD, "
        "UNITS and DECODER are those of the paper's configuration of its name. Probes learn from all 50,000 training "
        f"images. {len(every)} runs took {hours:.1f} hours of processor time together, one thread each, the longest "
        f"{longest:.0f} minutes, on {machine['cores']} cores, torch {machine['packages']['torch']}. Intervals are 95 % "
        "intervals of the mean over seeds (Student's t).\n\n```sh\n"
        "python benchmarks/evidence.py rates --cifar cifar10.zip --out output/evidence\n"
        "python benchmarks/evidence.py run --cifar cifar10.zip --out output/evidence\n"
        "python benchmarks/evidence_page.py\n```\n\nThe commands of one cell:\n\n```text\n"
        + "\n".join(text for text, _ in every[0]["commands"])
        + "\n```\n"
    )


def rates_table(rates: dict[str, dict[float, float]]) -> str:
    lines = [
        "## Learning rates\n",
        f"Chosen for each row by {RATE_EPOCHS} epochs with seed 100 and the ridge probe of the last stage on "
        f"{HELD_OUT:,} training images that no run pretrains on; the test images take no part. Top-1, percent:\n",
        "| pretraining | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " |",
        "|---|" + "--:|" * len(RATES),
    ]
    for row in (row for row in ROWS if row in rates):
        network = "" if ROWS[row].network == "r18" else ", Progressive ResNet"
        figures = (f"{rates[row][rate]:.1f}" if rate in rates[row] else "" for rate in RATES)
        lines.append(f"| {WORDS[row]}{network} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# What was measured

The paper's claim in small, on real images: a narrow ResNet-18 (16 to 128 channels) and a narrow Progressive ResNet on
CIFAR-10, each method with the paper's own decoder, learning rates chosen for each method on images held out.
Written by `python benchmarks/evidence_page.py` from the figures in `benchmarks/results/evidence/`.
"""

TAIL = """\
## What was not run

- Pretraining on ImageNet, of any method, at any length; so none of the paper's figures were reproduced.
- Transfer to COCO or Cityscapes at full size.
- Any of this on a GPU.
"""


if __name__ == "__main__":
    write_page()
