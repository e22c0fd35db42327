"""Writes a target's page: the paper's table with ours beside, what was not run, the commands and their hours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loco_det.annotations.coco import load_coco
from loco_det.annotations.registry import find_dataset
from loco_det.core.files import write_json
from loco_det.paper.figures import EVERYWHERE, FINAL_LOSSES, NETWORKS, SAVINGS
from loco_det.paper.plan import DONE, TARGETS, Options, PlannedRow, Step, commands_of
from loco_det.paper.results import Result, losses, mean, results, to_first, to_paper
from loco_det.report import charts
from loco_det.report.losses import losses_figure
from loco_det.report.plots import draw_detections, save_figure
from loco_det.report.sections import Picture, Section, write_sections

NOT_RUN = "not run"
SOURCE = (
    "Source of the paper's figures: Xiong, Ren, Urtasun, LoCo: Local Contrastive Representation Learning, NeurIPS "
    "2020, arXiv 2008.01342."
)
SHOWN_IMAGES, SHOWN_SCORE = (0, 1, 2), 0.3
_CURVES = {"simclr": "SimCLR", "gim": "GIM", "loco_res2": "LoCo, losses after res2 to res5"}  # -> a row's label


def write_page(
    target: str,
    rows: Sequence[PlannedRow],
    options: Options,
    machine: dict[str, Any],
    savings: dict[str, dict[str, dict[str, float]]] | None = None,
    changed: dict[str, str] | None = None,
) -> Path:
    """Write OUT/TARGET.html, TARGET.md and TARGET.json with what is there; returns the path of the Markdown.

    Args:
        machine: from `detection.run_record.environment`.
        savings: of target memory, from `costs.memory_savings`.
        changed: runs that were made with other settings than planned, with a sentence on each.

    Raises:
        UserError: a file is damaged or cannot be written.
    """
    found = results(rows)
    sections = [Section("", text=_introduction(target, options))]
    if target == "memory":
        sections.append(_memory(savings or {}))
    if target == "curves":
        sections += _curves(rows, options)
    else:
        sections += _table(target, found, options)
    if target == "tsne":
        sections.append(_tsne(rows))
    if target == "pictures":
        sections.append(_pictures(rows, options))
    sections += [_not_run(found), _differences(found, changed or {}), _how(target, rows, options, machine)]
    path = options.out / target
    write_sections(path, TARGETS[target][0].upper() + TARGETS[target][1:], [part for part in sections if _has(part)])
    numbers = [{"row": r.row.label, "paper": r.row.paper, "ours": r.ours, "whole": r.is_whole} for r in found]
    content = {"target": target, "scale": options.scale, "rows": numbers, "commands": _commands(commands_of(rows))}
    write_json(path.with_name(f"{target}.json"), content)
    return path.with_name(f"{target}.md")


def _has(section: Section) -> bool:
    return any((section.text, section.table, section.chart, section.pictures, section.points, section.code))


def _introduction(target: str, options: Options) -> list[str]:
    if not options.is_small:
        star = "A star marks a difference to the paper that the 95 % interval over our seeds does not explain."
        return [SOURCE, f"Ours at full scale; mean over seeds, in brackets its 95 % interval. {star}", EVERYWHERE]
    set_up = "narrow networks on CIFAR-10" if target not in ("detection", "few_labels", "pictures") else (
        "ResNet-18 on a small detection set")  # fmt: skip
    return [
        SOURCE,
        f"Ours at small scale: {set_up}, everything narrow and short, so our figures are not to be compared with the "
        "paper's one by one; the differences between rows may be. Mean over seeds, in brackets its 95 % interval.",
        "Differences are to the first row of the same network or share, seed by seed; a star marks those whose 95 % "
        "interval leaves zero out.",
    ]


def _table(target: str, found: Sequence[Result], options: Options) -> list[Section]:
    """Return the table of all rows: the paper's figure and ours for each column, and a difference."""
    columns = list(dict.fromkeys(column for result in found for column in (*result.row.paper, *result.ours)))
    papers = [column for column in columns if any(column in result.row.paper for result in found)]
    measured = [column for column in columns if any(column in result.ours for result in found)]
    measured = measured or papers
    apart = options.is_small or not papers
    header = ["row", *(f"paper, {column}" for column in papers)]
    header += [title for column in measured for title in (f"ours, {column}", "difference")]
    body = []
    for result in found:
        row = [result.row.label, *(_figure(result.row.paper.get(column)) for column in papers)]
        for column in measured:
            ours = result.ours.get(column, {})
            if apart:
                first = next(one for one in found if one.row.group == result.row.group)
                difference = to_first(ours, first.ours.get(column, {})) if result is not first else ""
            else:
                difference = to_paper(ours, result.row.paper.get(column))
            row += [mean(ours) or NOT_RUN, difference]
        body.append(row)
    return [Section("The paper's rows" if target != "tsne" else "Compactness", table=(header, body))]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _memory(savings: dict[str, dict[str, dict[str, float]]]) -> Section:
    """Return the table of savings: peak of the bytes kept for backward, end to end over the method."""
    header = ["network, method", "paper, times less", "ours, times less", "ours, backbone alone", "MB of two images"]
    names = {"resnet50": NETWORKS["r50"], "presnet50": NETWORKS["presnet50"]}
    body = []
    for network, methods in SAVINGS.items():
        for method, paper in methods.items():
            found = savings.get(network, {}).get(method)
            ours = [NOT_RUN, "", ""]
            if found:
                ours = [f"{found['saving']:.2f}", f"{found['backbone_saving']:.2f}", f"{found['bytes'] / 1e6:.0f}"]
            body.append([f"{names[network]}, {method}", f"{paper:.2f}", *ours])
    text = (
        "Counted, at either scale on the full networks: the peak of what autograd keeps for backward in a step of two "
        "images, two views each, each storage once."
    )
    return Section("Memory", text=[text], table=(header, body))


def _curves(rows: Sequence[PlannedRow], options: Options) -> list[Section]:
    curves, x, ends = losses(rows)
    header = ["row, unit", "paper, 800 epochs", "ours"]
    body = []
    for method, units in FINAL_LOSSES.items():
        label = next((row.label for row in rows if row.label.startswith(_CURVES[method])), _CURVES[method])
        for unit, paper in units.items():
            body.append([f"{label}, {unit}", f"{paper:.2f}", mean(ends.get(label, {}).get(unit, {})) or NOT_RUN])
    note = (
        "The paper's were read off its figure, to about 0.02, and its temperature is not stated: compare the order of "
        "the units, and whether LoCo's upper ones lie on SimCLR's and all of GIM's above."
    )
    sections = [Section("Losses at the end", text=[note], table=(header, body))]
    if curves:
        colours = charts.colour_of(list(dict.fromkeys(curve.backbone for curve in curves)))
        save_figure(losses_figure(curves, x, colours), options.out / "curves.png")
        picture = Picture("the loss of each unit, first seed", options.out / "curves.png")
        sections.append(Section("Curves", pictures=[picture]))
    return sections


def _tsne(rows: Sequence[PlannedRow]) -> Section:
    places = [(row.label, row.chains[0].steps[-1].made.with_suffix(".png")) for row in rows if row.chains]
    pictures = [Picture(label, path) for label, path in places if path.is_file()]
    return Section("Pictures", pictures=pictures)


def _pictures(rows: Sequence[PlannedRow], options: Options) -> Section:
    """Draw the detections of every finished detector on the same test images."""
    runs, name = {}, ""
    for row in rows:
        for step in commands_of([row]):
            file = step.made.parent / "inference" / "coco_instances_results.json"
            if step.made.name == DONE and file.is_file():
                runs[row.label] = json.loads(file.read_text())
                name = _test_set(step)
    if not runs:
        return Section("Pictures")
    dataset = load_coco(find_dataset(name))
    path = options.out / "pictures.png"
    shown = [index for index in SHOWN_IMAGES if index < len(dataset)]
    draw_detections(dataset, runs, path, images=shown, threshold=SHOWN_SCORE)
    return Section("Pictures", pictures=[Picture("ground truth, and detections of each frozen detector", path)])


def _test_set(step: Step) -> str:
    words = list(step.words)
    return words[words.index("DATASETS.TEST") + 1].strip("(),'") if "DATASETS.TEST" in words else "coco_2017_val"


def _not_run(found: Sequence[Result]) -> Section:
    missing: dict[str, list[str]] = {}  # what is missing -> the rows that miss it
    for result in found:
        left = [str(chain.seed) for chain in result.row.chains if not chain.done]
        if result.row.why:
            missing.setdefault(result.row.why, []).append(result.row.label)
        elif left:
            missing.setdefault(f"seed {', '.join(left)}", []).append(result.row.label)
    return Section("Not run", points=[f"{'; '.join(labels)}: {what}" for what, labels in missing.items()])


def _differences(found: Sequence[Result], changed: dict[str, str]) -> Section:
    points = [f"{result.row.label}: {result.row.differs}" for result in found if result.row.differs]
    points += [f"{run} was made with other settings than planned: {what}" for run, what in changed.items()]
    return Section("Differences", points=points)


def _how(target: str, rows: Sequence[PlannedRow], options: Options, machine: dict[str, Any]) -> Section:
    steps = commands_of(rows)
    done = [step for step in steps if step.made.exists()]
    hours = sum(float(step.clock.read_text()) for step in done if step.clock.is_file()) / 3600
    packages = {name: version for name, version in machine["packages"].items() if version}
    text = (
        f"{len(done)} of {len(steps)} commands have been run, in {hours:.1f} hours of processor time; this page was "
        f"written on {machine['device']}, {machine['cores']} cores, torch {packages.get('torch', '?')}, loco_det "
        f"{machine['loco_det']}. Those of the first row and seed, OUT for the folder; {target}.json has all:"
    )
    first = next((chain.steps for row in rows for chain in row.chains), ())
    code = "\n".join(_commands(first)).replace(f"{options.out}/", "OUT/").replace(options.data, Path(options.data).name)
    return Section("How", text=[text], code=code)


def _commands(steps: Sequence[Step]) -> list[str]:
    return [" ".join(("loco-det", *step.words)) for step in steps]
