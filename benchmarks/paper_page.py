"""Writes the pages of docs/paper.md, each below its mark, and their pictures from benchmarks/results/evidence/.

python benchmarks/paper_page.py
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from _common import ROOT
from evidence import RESULTS, SEEDS
from evidence_page import read_cells

from loco_det.core.files import atomic_write, write_json
from loco_det.core.run_folder import differences, summary
from loco_det.paper.costs import memory_savings
from loco_det.paper.page import write_page
from loco_det.paper.plan import BACKBONE, SMALL_PROBES, SMALL_RATE, Options, Step, commands_of, plan

PAGE = ROOT / "docs" / "paper.md"
PROSE = re.compile(r"[A-Z]")  # no heading, table, list, picture or code
MARK = re.compile(r"(<!-- page: (\w+) -->\n).*?(?=<!-- |\Z)", re.DOTALL)


def with_pages(text: str, folder: Path) -> str:
    """The text with what follows each mark replaced by the page of that name in `folder`, if there is one.

    Of the sentences that open every page only the first page keeps those that a later one would repeat.
    """
    said: set[str] = set()

    def page(mark: re.Match[str]) -> str:
        file = folder / f"{mark[2]}.md"
        if not file.is_file():
            return mark[0]
        paragraphs = [part for part in inserted(file.read_text()).split("\n\n") if part not in said]
        said.update(part for part in paragraphs if PROSE.match(part))
        return f"{mark[1]}\n" + "\n\n".join(paragraphs) + "\n"

    return MARK.sub(page, text)


def inserted(page: str) -> str:
    """A page with its headings one level down and its pictures under the names that they have in docs/."""
    page = re.sub(r"^#", "##", page, flags=re.MULTILINE)
    return re.sub(r"\]\((\w+\.png)\)", r"](paper_\1)", page)


def write_pages(cells: dict[str, list[dict[str, Any]]], targets: list[str], out: Path) -> None:
    """Write OUT/TARGET.md and its pictures as `loco-det paper TARGET --page` does where the runs are.

    What their commands left is laid out anew in OUT, as far as a page reads it.

    Args:
        cells: {row: the JSON of `evidence.py run` for each seed}.
    """
    done = [cell for some in cells.values() for cell in some]
    for cell in done:
        lay_out(cell, out)
    options, now = Options("small", str(out / "cifar10"), out, SEEDS), {"SOLVER.BASE_LR": SMALL_RATE}
    changed = {f"{cell['row']}_{cell['seed']}": differences({"SOLVER.BASE_LR": cell["rate"]}, now) for cell in done}
    for target in targets:
        rows = plan(target, options)
        planned = {step.made.parent.name for step in commands_of(rows)}
        others = {name: summary(what) for name, what in changed.items() if what and name in planned}
        savings = memory_savings() if target == "memory" else None
        write_page(target, rows, options, done[0]["environment"], savings, others)


def lay_out(cell: dict[str, Any], out: Path) -> None:
    """Write what a page reads of a finished run: losses, probes, hours; in the place of the weights an empty file."""
    folder = out / f"{cell['row']}_{cell['seed']}"
    folder.mkdir(parents=True)
    (folder / BACKBONE).touch()
    (folder / "config.yaml").write_text(f"METHOD: {cell['switches']['METHOD']}\n")
    steps: dict[int, dict[str, float]] = {}
    for unit, points in cell["losses"].items():
        for step, loss in points:
            steps.setdefault(step, {})[f"loss/{unit}"] = loss
    lines = [json.dumps({"iteration": step, **losses}) for step, losses in steps.items()]
    (folder / "metrics.json").write_text("\n".join(lines) + "\n")
    for protocol, stages in cell["probes"].items():
        write_json(folder / f"{protocol}.json", {"protocol": protocol, "stages": stages})
    made = (BACKBONE, *(f"{protocol}.json" for protocol in SMALL_PROBES))
    for name, (_, seconds) in zip(made, cell["commands"], strict=True):
        Step(folder / name, ()).clock.write_text(str(seconds))


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder, text = Path(made), PAGE.read_text()
        write_pages(read_cells(RESULTS), [mark[2] for mark in MARK.finditer(text)], folder)
        text = with_pages(text, folder)
        with atomic_write(PAGE, "w") as file:
            file.write(text)
        for picture in re.findall(r"\]\(paper_(\w+\.png)\)", text):
            shutil.copyfile(folder / picture, PAGE.parent / f"paper_{picture}")


if __name__ == "__main__":
    main()
