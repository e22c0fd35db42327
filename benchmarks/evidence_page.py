"""Writes docs/results.md, its pictures and README's table from the figures in benchmarks/results/evidence/.

python benchmarks/evidence_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from evidence import RATE_EPOCHS, RATES, RATES_OF, RESULTS, ROOT, ROWS, SEEDS
from frozen_detector import ITERATIONS
from matplotlib.figure import Figure

from loco_det.core.config import load_config
from loco_det.core.files import atomic_write
from loco_det.paper.data import HELD_OUT, PRETRAINED
from loco_det.paper.figures import ROWS as PAPERS_ROWS
from loco_det.paper.plan import small_name
from loco_det.report.drawing import COLOURS
from loco_det.report.losses import at_end
from loco_det.report.plots import save_figure
from loco_det.report.statistics import summarise
from pretrain.defaults import get_cfg

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
# What the paper says: words, the row and the one it is compared with.
CLAIMS = (
    ("greedy training loses", "gim", "simclr"),
    ("", "gim_blocks", "simclr"),
    ("", "gim_presnet", "simclr_presnet"),
    ("a deeper decoder wins it back", "gim_conv", "gim"),
    ("shared stages win it back", "loco_mlp", "gim"),
    ("both together win it back", "loco", "gim"),
    ("", "loco_blocks", "gim_blocks"),
    ("", "loco_presnet", "gim_presnet"),
    ("shared stages add to the decoder", "loco", "gim_conv"),
    ("LoCo is as good as end to end", "loco", "simclr"),
    ("", "loco_blocks", "simclr"),
    ("", "loco_presnet", "simclr_presnet"),
    ("a loss on res2 besides", "loco_res2", "loco"),
)
DETECTION_ROWS = {"random": "none", **{row: WORDS[row] for row in ROWS if ROWS[row].network == "r18"}}


def write_page() -> None:
    """docs/results.md, docs/results_*.png and the table in README.md."""
    cells = complete(read_cells(RESULTS))
    for name, rows in compared(cells).items():
        save_figure(curves([cell for row in rows for cell in cells[row]]), PAGE.parent / picture(name))
    with atomic_write(PAGE, "w") as file:
        file.write(page())
    text = README.read_text()
    with atomic_write(README, "w") as file:
        file.write(with_table(text, short_table(cells)))


def page() -> str:
    """docs/results.md from the committed figures."""
    calibration, detection = (read(RESULTS, name) for name in ("calibration", "detection"))
    before = read_cells(RESULTS / "before")
    return page_text(complete(read_cells(RESULTS)), read_rates(RESULTS), calibration, detection, before)


def complete(cells: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of which every seed has been run."""
    return {row: some for row, some in cells.items() if {cell["seed"] for cell in some} >= set(SEEDS)}


def compared(cells: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[str, ...]]:
    """The tables of which at least two rows have been run, with those rows."""
    found = {name: tuple(row for row in rows if row in cells) for name, rows in TABLES.items()}
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def read_cells(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{row: its cells in the order of their seeds}."""
    found = {row: [json.loads(file.read_text()) for file in sorted(folder.glob(f"{row}_[0-9].json"))] for row in ROWS}
    return {row: cells for row, cells in found.items() if cells}


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """What a file holds; None if it is not there."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else None


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
    stages = list(cells[rows[0]][0]["probes"][protocol])
    lines = ["| pretraining | seeds | " + " | ".join(stages) + " | minutes |", "|---|--:|" + "--:|" * (len(stages) + 1)]
    for row in rows:
        figures = [number(top1(cells[row], protocol, stage)) for stage in stages]
        figures.append(f"{sum(map(minutes, cells[row])) / len(cells[row]):.0f}")
        lines.append(f"| {WORDS[row]} | {len(cells[row])} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def minutes(cell: dict[str, Any]) -> float:
    """Processor time of a cell's commands."""
    return sum(seconds for _, seconds in cell["commands"]) / 60


def top1(cells: list[dict[str, Any]], protocol: str, stage: str) -> list[float]:
    return [cell["probes"][protocol][stage]["top1"] for cell in cells]


def last(cells: list[dict[str, Any]]) -> str:
    return list(cells[0]["probes"]["linear"])[-1]


def number(values: list[float]) -> str:
    """The mean, and in brackets its 95 % interval where there are several."""
    return spread(summarise(values))


def spread(found: dict[str, Any]) -> str:
    """What `summarise` gave, as a cell of a table."""
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
            told = ", ".join(f"{protocol} {signed(f)}" for protocol, f in found.items())
            lines.append(f"- {WORDS[row]} against {WORDS[rows[0]]}, last stage, seed by seed: {told}.")
    return "\n".join(lines) + "\n"


def signed(found: dict[str, Any]) -> str:
    """A difference, as `summarise` gave it, with its interval."""
    low, high = found["ci95"]
    return f"{found['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"


def claims(cells: dict[str, list[dict[str, Any]]]) -> str:
    """The paper's claims as differences of two rows, the paper's own beside; nothing where none was run."""
    lines, said = [], ""
    papers = {small_name(row.config): row.top1 for row in PAPERS_ROWS if row.epochs == 100}
    for words, row, base in CLAIMS:
        said = words or said
        found = [difference(cells, row, base, protocol) for protocol in ("linear", "knn")]
        if not all(found):
            continue
        ours = [f"**{signed(one)}**" if one["ci95"][0] * one["ci95"][1] > 0 else signed(one) for one in found]
        paper = f"{papers[row] - papers[base]:+.1f}" if {row, base} <= set(papers) else ""
        lines.append(f"| {said} | {label(row)} - {label(base)} | {paper} | {' | '.join(ours)} |")
        said = ""
    if not lines:
        return ""
    head = ["| the paper's claim | difference | the paper | linear | kNN |", "|---|---|--:|--:|--:|"]
    return "\n".join([CLAIMS_HEAD, *head, *lines]) + "\n"


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
    for row in rows:
        ends = {
            unit: sum(at_end([loss for _, loss in cell["losses"][unit]]) for cell in cells[row]) / len(cells[row])
            for unit in cells[row][0]["losses"]
        }
        told = ", ".join(f"{unit.partition('-')[2]} {value:.2f}" for unit, value in ends.items())
        lines.append(f"- {WORDS[row]}: {told}")
    return "\n".join(lines) + "\n"


# --- the page ---------------------------------------------------------------------------------------------------


def page_text(
    cells: dict[str, list[dict[str, Any]]],
    rates: dict[str, dict[float, float]],
    calibration: dict[str, Any] | None = None,
    detection: dict[str, Any] | None = None,
    before: dict[str, list[dict[str, Any]]] | None = None,
) -> str:
    """docs/results.md from the figures alone; `before` are cells that were run again."""
    parts = [HEAD, claims(cells)]
    for name, rows in compared(cells).items():
        parts.append(f"## {name}\n")
        for protocol, words in (("linear", "linear probe"), ("knn", "20 nearest neighbours"), ("ridge", "ridge")):
            parts += [
                f"{words.capitalize()}, top-1 on CIFAR-10's test images, percent:\n",
                full_table(rows, cells, protocol),
            ]
        parts += [verdicts(rows, cells), f"![Losses of every unit]({picture(name)})\n"]
        parts += ["Losses at the end of training:\n", final_losses(rows, cells)]
    parts += [detection_part(detection), how(cells), before_part(before or {}), rates_table(rates)]
    parts += [calibration_part(calibration), TAIL]
    missing = not_run(cells, detection).items()
    parts += [f"- {name}, with every seed: {'; '.join(rows)}." for name, rows in missing]
    return "\n".join(part for part in parts if part)


def not_run(cells: dict[str, list[dict[str, Any]]], detection: dict[str, Any] | None) -> dict[str, list[str]]:
    """{comparison: its rows that this page has no figure of, for want of a seed or of all}."""
    missing = {name: [WORDS[row] for row in rows if row not in cells] for name, rows in TABLES.items()}
    if detection is None:
        missing["Frozen detection"] = list(DETECTION_ROWS.values())
    return {name: rows for name, rows in missing.items() if rows}


def detection_part(found: dict[str, Any] | None) -> str:
    """Detectors on frozen networks: AP over seeds, and each seed's paired bootstrap."""
    if found is None:
        return ""
    rows = {row: words for row, words in DETECTION_ROWS.items() if row in found["rows"]}
    lines = [
        "## Frozen detection\n",
        f"Faster R-CNN on {found['data'].upper()} ({found['images']['train']} training images, "
        f"{found['images']['test']} of test) and the frozen networks of the tables above: {ITERATIONS} iterations of "
        "`evaluate_detection(..., small=True)`. The networks see a quarter of the detector's pixels in each direction, "
        "64 of 256. Box AP on the test images, percent, mean and 95 % interval over seeds "
        f"{', '.join(map(str, found['seeds']))}:\n",
        "| pretraining | AP | AP50 | AP75 |",
        "|---|--:|--:|--:|",
    ]
    for row, words in rows.items():
        figures = (spread(found["rows"][row][f"bbox/{name}"]) for name in ("AP", "AP50", "AP75"))
        lines.append(f"| {words} | {' | '.join(figures)} |")
    lines.append(
        f"\nAP minus that of {WORDS['simclr']}, of the same seed, with the 95 % interval of {found['resamples']:,} "
        "paired resamples of the test images:\n"
    )
    for row, words in rows.items():
        told = [
            f"seed {one['seed']}: {signed({**one['bbox']['AP'], 'mean': one['bbox']['AP']['difference']})}"
            for one in found["paired"]
            if one["backbone"] == row
        ]
        if told:
            lines.append(f"- {words}: {'; '.join(told)}")
    lines.append(
        f"\n{found['seconds'] / 3600:.1f} hours of processor time.\n\n"
        "```sh\npython benchmarks/evidence.py detect --data BCCD --out output/evidence\n```\n"
    )
    return "\n".join(lines)


def how(cells: dict[str, list[dict[str, Any]]]) -> str:
    every = [cell for some in cells.values() for cell in some]
    if not every:
        return ""
    cfg, _ = load_config(get_cfg(), str(ROOT / "configs" / "pretrain" / "evidence_r18.yaml"))
    machine = every[0]["environment"]
    return (
        "## How\n\n"
        f"{PRETRAINED['train.txt']:,} of CIFAR-10's training images, the same of each class (the Progressive ResNet, "
        f"which is slower: {PRETRAINED['train_half.txt']:,}), {cfg.SOLVER.EPOCHS} epochs in batches of "
        f"{cfg.SOLVER.BATCH_SIZE}; `configs/pretrain/evidence_r18.yaml` and `evidence_presnet.yaml` hold what all "
        f"rows share. Probes learn from all 50,000 training images. {len(every)} runs took "
        f"{sum(map(minutes, every)) / 60:.1f} hours of processor time together, one thread each, the longest "
        f"{max(map(minutes, every)):.0f} minutes, on {machine['cores']} cores, torch {machine['packages']['torch']}. "
        "`SOLVER.AMP` bf16 computes in bfloat16 on processors with units for it, in float32 on others. "
        f"{precisions(cells)} "
        "Intervals are 95 % intervals of the mean over seeds (Student's t). What each row sets besides:\n\n"
        + "\n".join(f"- {label(row)}: {told_switches(some[0]['switches'])}" for row, some in cells.items())
        + "\n\n```sh\n"
        "python benchmarks/evidence.py rates --cifar cifar10.zip --out output/evidence\n"
        "python benchmarks/evidence.py run --cifar cifar10.zip --out output/evidence\n"
        "python benchmarks/evidence_page.py\n```\n\nThe commands of one cell:\n\n```text\n"
        + "\n".join(text for text, _ in every[0]["commands"])
        + "\n```\n"
    )


def before_part(cells: dict[str, list[dict[str, Any]]]) -> str:
    """What rows had before they were run again."""
    if not cells:
        return ""
    lines = [
        "## Run again\n",
        "These runs came first on other machines, without a record of their precision, and were made again in float32, "
        "as the other rows; the tables above have the second ones alone. The first, last stage:\n",
        "| pretraining | seeds | linear | kNN | ridge |",
        "|---|--:|--:|--:|--:|",
    ]
    for row, some in cells.items():
        figures = (number(top1(some, protocol, last(some))) for protocol in ("linear", "knn", "ridge"))
        lines.append(f"| {WORDS[row]} | {len(some)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def precisions(cells: dict[str, list[dict[str, Any]]]) -> str:
    """Say which rows were computed in which precision, and of which it was not recorded."""
    rows: dict[str, dict[str, None]] = {}
    for row, some in cells.items():
        for cell in some:
            rows.setdefault(cell.get("precision", "not recorded"), {})[label(row)] = None
    return " ".join(f"{precision.capitalize()}: {'; '.join(labels)}." for precision, labels in sorted(rows.items()))


def label(row: str) -> str:
    return WORDS[row] + ("" if ROWS[row].network == "r18" else ", Progressive ResNet")


def told_switches(switches: dict[str, Any]) -> str:
    """`KEY value`, ...; units by their first and last block."""
    units = (
        {"UNITS": ", ".join("-".join(dict.fromkeys(unit)) for unit in switches["UNITS"])} if "UNITS" in switches else {}
    )
    return ", ".join(f"`{key}` {value}" for key, value in {**switches, **units}.items())


def calibration_part(found: dict[str, Any] | None) -> str:
    """The short runs that the set-up was chosen by."""
    if found is None:
        return ""
    epochs = list(next(iter(found["rows"].values())))
    lines = [
        "## Calibration\n",
        f"The set-up was chosen by two short runs ({found['settings']}): {found['what']}.\n",
        "| pretraining | " + " | ".join(f"epoch {epoch}" for epoch in epochs) + " |",
        "|---|" + "--:|" * len(epochs),
    ]
    lines += [f"| {WORDS[row]} | {' | '.join(f'{v:.1f}' for v in of.values())} |" for row, of in found["rows"].items()]
    return "\n".join(lines) + "\n"


def rates_table(rates: dict[str, dict[float, float]]) -> str:
    lines = [
        "## Learning rates\n",
        f"Chosen for each method by {RATE_EPOCHS} epochs with seed 100 and the ridge probe of the last stage on "
        f"{HELD_OUT:,} training images that no run pretrains on; the test images take no part. Rows of other decoders, "
        "of single blocks and of a loss more have their method's rate. The Progressive ResNet's are sought among the "
        f"first {len(RATES_OF['presnet'])}, where all other rows have their best. Top-1, percent:\n",
        "| pretraining | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " |",
        "|---|" + "--:|" * len(RATES),
    ]
    for row in (row for row in ROWS if row in rates):
        figures = (f"{rates[row][rate]:.1f}" if rate in rates[row] else "" for rate in RATES)
        lines.append(f"| {label(row)} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# What was measured

The paper's claim in small, on real images: narrow networks on CIFAR-10, each row with the decoder that it has
in the paper, learning rates chosen for each method on images held out.
Written by `python benchmarks/evidence_page.py` from the figures in `benchmarks/results/evidence/`.
"""

CLAIMS_HEAD = """\
## The paper's claims

Points of top-1 between two rows at the last stage, seed by seed, mean and 95 % interval; bold where the interval leaves
out 0. The paper's are of its linear probe on ImageNet after 100 epochs; it has no losses of single blocks.
"""

TAIL = """\
## What was not run

- Pretraining on ImageNet, of any method, at any length; so none of the paper's figures were reproduced.
- Transfer to COCO or Cityscapes at full size.
- Any of this on a GPU.
"""


if __name__ == "__main__":
    write_page()
