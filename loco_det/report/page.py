"""Renders the report as one self-contained HTML file (page.html.j2), and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from loco_det.report import charts
from loco_det.report.losses import UnitLoss

SECTIONS = {
    "results": "Results",
    "paired": "Paired differences",
    "errors": "Errors and curves",
    "classes": "Per class",
    "probes": "Probes",
    "training": "Training",
    "pictures": "Pictures",
    "inputs": "Inputs and environment",
    "missing": "Missing",
}  # id -> title
KINDS = {"bbox": "box", "segm": "mask", "bbox_TTA": "box TTA", "segm_TTA": "mask TTA"}
EMPTY = "-"  # a table's cell without a number
# Columns in their order: detections, then rare, common and frequent classes (LVIS), then pixel labels.
MEASURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("APr", "APc", "APf"),
    *("IoU", "iIoU", "IoU_sup", "iIoU_sup"),
)
_OF_CLASS = re.compile(r"(.+?/(?:AP|IoU))-(.+)")  # bbox/AP-person, or NAME/bbox/AP-person with several data sets

Table = tuple[list[str], list[list[str]]]  # header, rows


def html_page(
    report: dict[str, Any],
    series: dict[str, dict[str, charts.Series]],
    losses: tuple[list[UnitLoss], str],
    panels: list[dict[str, Any]],
) -> str:
    """Render page.html.j2, which escapes everything but our own charts.

    Args:
        report: the numbers, as in report.json.
        series: heading -> title -> curves over steps.
        losses: pretraining losses from `report.losses.unit_losses`.
        panels: the result of `report.panels.panels` for each experiment.
    """
    colours = charts.colour_of(report["backbones"])
    experiments = report["experiments"]
    content = {
        "results": [_results(experiment, colours) for experiment in experiments],
        "paired": [_paired(experiment) for experiment in experiments if experiment["paired"]],
        "errors": [_errors(experiment, colours) for experiment in experiments if _analysed(experiment)],
        "classes": [found for found in map(_classes, experiments) if found["table"][1]],
        "probes": [_probe(probe, colours) for probe in report["probes"]],
        "training": _training(series, losses, colours),
        "pictures": [{"title": e["title"], **panel} for e, panel in zip(experiments, panels) if panel],
        "inputs": _inputs(report),
    }
    empty = [f"{SECTIONS[key]}: nothing was given for this part" for key, found in content.items() if not found]
    content["missing"] = report["missing"] + empty
    return template("page.html.j2").render(report=report, sections=SECTIONS, content=content)


def template(name: str) -> Template:
    """Return a template of this folder, which escapes all values."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def markdown_page(report: dict[str, Any]) -> str:
    """Render the page's tables as Markdown; `report` as for `html_page`."""
    parts = [f"# {plain(report['title'])}", f"Made {report['created']} by loco_det {report['loco_det']}."]
    for experiment in report["experiments"]:
        header, rows = _main_table(experiment)
        parts += [f"## {plain(experiment['title'])}", markdown_table(header, rows)]
        header, rows = _paired_table(experiment)
        if rows:
            parts += [f"Differences to {plain(experiment['baseline'])} ({_bootstrap(experiment)}):"]
            parts.append(markdown_table(header, rows))
        header, rows = _class_table(experiment)
        if rows:
            parts += ["Per class:", markdown_table(header, rows)]
    for probe in report["probes"]:
        header, rows = _probe_table(probe)
        parts += [f"## {plain(_probe_title(probe))}", markdown_table(header, rows)]
    if report["inputs"] or report["other_inputs"]:
        parts += ["## Inputs and environment", markdown_table(*_inputs_table(report))]
    if report["missing"]:
        parts += ["## Missing", "\n".join(f"- {plain(text)}" for text in report["missing"])]
    return "\n\n".join(parts) + "\n"


# --- tables -----------------------------------------------------------------------------------------------------


def _main_table(experiment: dict[str, Any]) -> Table:
    rows = experiment["backbones"]
    found = dict.fromkeys(key for row in rows for key in row["numbers"])
    kinds = dict.fromkeys(key.rpartition("/")[0] for key in found)
    keys = [f"{kind}/{name}" for kind in kinds for name in MEASURES if f"{kind}/{name}" in found]
    keys += [key for key in found if "/AR" in key]
    header = ["backbone", "runs", *map(_column, keys)]
    body = [[r["backbone"], str(len(r["runs"])), *(_number(r["numbers"].get(key)) for key in keys)] for r in rows]
    return header, body


def _column(key: str) -> str:
    return " ".join(KINDS.get(part, part) for part in key.split("/"))


def _number(summary: dict[str, Any] | None) -> str:
    if not summary or not summary["n"]:
        return EMPTY
    if summary["std"] is None:
        return f"{summary['mean']:.1f}"
    low, high = summary["ci95"]
    return f"{summary['mean']:.1f} ± {summary['std']:.1f} [{low:.1f}, {high:.1f}]"


def _paired_table(experiment: dict[str, Any]) -> Table:
    kinds = [kind for kind in ("bbox", "segm", "sem_seg") if any(kind in pair for pair in experiment["paired"])]
    found = {(kind, name) for pair in experiment["paired"] for kind in kinds for name in pair[kind]}
    keys = [(kind, name) for kind in kinds for name in MEASURES if (kind, name) in found]
    header = ["backbone", "seed", *(_column(f"{kind}/{name}") for kind, name in keys)]
    rows = []
    for pair in experiment["paired"]:
        cells = [_difference(pair[kind].get(name)) for kind, name in keys]
        rows.append([pair["backbone"], str(pair["seed"]), *cells])
    return header, rows


def _difference(found: dict[str, Any] | None) -> str:
    if not found or found["difference"] is None:
        return EMPTY
    low, high = found["ci95"]
    return f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _bootstrap(experiment: dict[str, Any]) -> str:
    images = experiment["paired"][0]["images"]
    return f"paired bootstrap, {experiment['resamples']} resamples of {images} images, 95 % intervals"


def _class_table(experiment: dict[str, Any]) -> Table:
    rows = experiment["backbones"]
    keys = dict.fromkeys(key for row in rows for key in row["numbers"])
    parts = [match.groups() for match in map(_OF_CLASS.fullmatch, keys) if match]
    columns = [(measure, row) for measure in dict.fromkeys(measure for measure, _ in parts) for row in rows]
    header = ["class", *(f"{_column(measure)}, {row['backbone']}" for measure, row in columns)]
    names = dict.fromkeys(name for _, name in parts)
    return header, [[n, *(_number(row["numbers"].get(f"{measure}-{n}")) for measure, row in columns)] for n in names]


def _probe_title(probe: dict[str, Any]) -> str:
    return f"{probe['protocol']} probe, {probe['data']}".strip(", ")


def _probe_table(probe: dict[str, Any]) -> Table:
    stages, measure = charts.stage_order(probe["backbones"]), probe["measure"]
    rows = []
    for name, found in probe["backbones"].items():
        count = max(one["runs"] for one in found.values())
        rows.append([name, str(count), *(_percent(found.get(stage), measure) for stage in stages)])
    return [f"backbone, {charts.MEASURES[measure]}", "runs", *stages], rows


def _percent(found: dict[str, Any] | None, measure: str) -> str:
    if not found:
        return EMPTY
    interval, std = found[f"{measure}_interval"], found[f"{measure}_std"]
    text = f"{found[measure]:.1f}" + ("" if std is None else f" ± {std:.1f}")
    return text + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line: neither HTML nor a link nor the end of a cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`*])|(?<=\])(?=\()", r"\\\1", text)


def _inputs_table(report: dict[str, Any]) -> Table:
    header = ["backbone", "seed", "run", "weights, sha256", "data, sha256", "config sha256", "engine", "machine"]
    rows = []
    for found in report["inputs"]:
        weights = found["weights"]
        digest = (weights.get("sha256") or "")[:12] or "hash not recorded"
        data = "; ".join(f"{name} {d['sha256'][:12]}" for name, d in (found["datasets"] or {}).items())
        source = f"{weights['path']} {digest}" if weights.get("path") else "none: random weights"
        cells = [found["backbone"], str(found["seed"]), found["run"], source]
        cells += [data or "not recorded", found["config_sha256"][:12], found["engine"] or "not recorded"]
        rows.append([*cells, _machine(found["environment"])])
    for found in report["other_inputs"]:
        digest = (found["sha256"] or "")[:12] or "hash not recorded"
        weights = f"{found['weights']} {digest}" if found["weights"] else EMPTY
        cells = [found["backbone"], str(found["seed"]), found["run"], weights, str(found["data"])]
        rows.append([*cells, (found["config_sha256"] or EMPTY)[:12], EMPTY, EMPTY])
    return header, rows


def _machine(environment: dict[str, Any] | None) -> str:
    if not environment:
        return "not recorded"
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    versions = f"loco_det {environment['loco_det']}, Python {environment['python']}, {packages}"
    return f"{environment['device']}, {environment['processes']} processes; {environment['system']}; {versions}"


# --- template data of an experiment or a probe ------------------------------------------------------------------


def _results(experiment: dict[str, Any], colours: dict[str, str]) -> dict[str, Any]:
    rows = experiment["backbones"]
    keys = dict.fromkeys(k for row in rows for k in row["numbers"] if k.endswith(("/AP", "/IoU")))
    drawn = [charts.seeds(rows, key, _column(key), colours) for key in keys]
    return {"title": experiment["title"], "charts": drawn, "table": _main_table(experiment)}


def _paired(experiment: dict[str, Any]) -> dict[str, Any]:
    title = f"{experiment['title']}: difference to {experiment['baseline']}"
    return {"title": title, "bootstrap": _bootstrap(experiment), "table": _paired_table(experiment)}


def _analysed(experiment: dict[str, Any]) -> dict[str, Any]:
    """Map backbone -> errors and curves by IoU type, for backbones whose detections were evaluated again."""
    return {row["backbone"]: row["analysis"] for row in experiment["backbones"] if row["analysis"]}


def _errors(experiment: dict[str, Any], colours: dict[str, str]) -> dict[str, Any]:
    rows, drawn = _analysed(experiment), []
    for kind, first in next(iter(rows.values())).items():
        found = {name: row[kind]["errors"] for name, row in rows.items()}
        drawn.append(charts.errors(found, f"{KINDS[kind]}: AP50 lost by kind of error (TIDE)", colours))
        for threshold in first["curves"]:
            found = {name: row[kind]["curves"][threshold] for name, row in rows.items()}
            drawn.append(charts.curves(found, f"{KINDS[kind]}, IoU {threshold}", colours))
    return {"title": experiment["title"], "charts": drawn}


def _classes(experiment: dict[str, Any]) -> dict[str, Any]:
    return {"title": experiment["title"], "table": _class_table(experiment)}


def _probe(probe: dict[str, Any], colours: dict[str, str]) -> dict[str, Any]:
    title = _probe_title(probe)
    chart = charts.stages(probe["backbones"], probe["measure"], title, colours)
    return {"title": title, "chart": chart, "table": _probe_table(probe)}


def _training(
    series: dict[str, dict[str, charts.Series]], losses: tuple[list[UnitLoss], str], colours: dict[str, str]
) -> dict[str, Any]:
    """Return the chart of pretraining losses, if any, and heading -> charts of each experiment; {} without either."""
    curves = {
        heading: [charts.lines(runs, "step", "", title, colours) for title, runs in titles.items()]
        for heading, titles in series.items()
    }
    pretraining = charts.losses(*losses, colours) if losses[0] else ""
    return {"pretraining": pretraining, "curves": curves} if pretraining or curves else {}


def _inputs(report: dict[str, Any]) -> dict[str, Any]:
    table = _inputs_table(report)
    return {"table": table, "experiments": report["experiments"]} if table[1] else {}
