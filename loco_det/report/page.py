"""The report as one HTML file that needs nothing beside it, and the same numbers as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from loco_det.report import charts
from loco_det.report.losses import UnitLoss

KINDS = {"bbox": "box", "segm": "mask", "bbox_TTA": "box TTA", "segm_TTA": "mask TTA"}
NOTHING = "-"  # in a table's cell
DETECTIONS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# The table's columns: of detections, of rare, common and frequent classes (LVIS), and of pixel labels.
MEASURES = (*DETECTIONS, "APr", "APc", "APf", "IoU", "iIoU", "IoU_sup", "iIoU_sup")
_OF_CLASS = re.compile(r"(.+?/(?:AP|IoU))-(.+)")  # bbox/AP-person, or NAME/bbox/AP-person with several data sets
_CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#59636e;--paper:#fff;--panel:#f6f8fa;--line:#d1d9e0}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--paper:#0d1117;--panel:#151b23;--line:#3d444d}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line);padding-bottom:.25rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p,figcaption,.soft{color:var(--soft)}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
td.text{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:10rem}
tbody tr:hover{background:var(--panel)}
.best{font-weight:700}
.charts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
.chart svg{width:100%;height:auto;display:block;max-width:52rem}
.charts svg{width:100%;height:auto;display:block;max-width:34rem}
svg text{font-family:inherit!important}
.row{display:grid;gap:.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,11rem),1fr));margin:1rem 0}
figure{margin:0}figure img{width:100%;height:auto;display:block;border-radius:4px}
figcaption{font-size:.8rem}
.none{display:grid;place-items:center;min-height:6rem;height:calc(100% - 1.5rem);color:var(--soft);
background:var(--panel);border-radius:4px}
.legend span{margin-right:.8rem;white-space:nowrap}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em;border-radius:2px;border:1px solid var(--line)}
pre{font-size:.8rem;margin:0}
details{margin:.5rem 0}summary{cursor:pointer}
code{font-size:.85em;background:var(--panel);padding:.1em .3em;border-radius:4px;overflow-wrap:anywhere}
nav a{margin-right:1rem;white-space:nowrap}a{color:inherit}
.missing li{margin:.2rem 0;overflow-wrap:anywhere}
"""


def html_page(
    report: dict[str, Any],
    series: dict[str, dict[str, charts.Series]],
    losses: tuple[list[UnitLoss], str],
    panels: list[dict[str, Any]],
) -> str:
    """The whole page.

    Args:
        report: the numbers, as report.json has them.
        series: heading -> title -> curves over steps.
        losses: of the pretrainings, as `report.losses.unit_losses` gives them.
        panels: for each experiment, what `report.panels.panels` gives.
    """
    colours = charts.colour_of(report["backbones"])
    sections = [("results", "Results", _results(report, colours))]
    sections.append(("paired", "Paired differences", _paired(report)))
    sections.append(("errors", "Errors and curves", _apart(report, colours)))
    sections.append(("classes", "Per class", _classes(report)))
    sections.append(("probes", "Probes", _probes(report, colours)))
    sections.append(("training", "Training", _training(series, losses, colours)))
    sections.append(("pictures", "Pictures", _pictures(report, panels)))
    sections.append(("inputs", "Inputs and environment", _inputs(report)))
    sections.append(("missing", "Missing", _missing(report, [title for _, title, body in sections if not body])))
    shown = [section for section in sections if section[2]]
    links = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in shown)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{text}</section>' for key, title, text in shown)
    title = escape(report["title"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head><body><h1>{title}</h1>"
        f"<p>Made {escape(report['created'])} by loco_det {escape(report['loco_det'])}. AP, IoU and top-1 in percent; "
        "mean ± standard deviation over runs, in brackets the 95 % interval of the mean.</p>"
        f"<nav>{links}</nav>{body}</body></html>\n"
    )


def markdown_page(report: dict[str, Any]) -> str:
    """Tables of the same numbers."""
    parts = [f"# {report['title']}", f"Made {report['created']} by loco_det {report['loco_det']}."]
    for experiment in report["experiments"]:
        header, rows = _main_table(experiment)
        parts += [f"## {experiment['title']}", _markdown_table(header, rows)]
        header, rows = _paired_table(experiment)
        if rows:
            parts += [f"Differences to {experiment['baseline']} ({_bootstrap(experiment)}):"]
            parts.append(_markdown_table(header, rows))
        header, rows = _class_table(experiment)
        if rows:
            parts += ["Per class:", _markdown_table(header, rows)]
    for probe in report["probes"]:
        header, rows = _probe_table(probe)
        parts += [f"## {_probe_title(probe)}", _markdown_table(header, rows)]
    if report["inputs"] or report["other_inputs"]:
        parts += ["## Inputs and environment", _markdown_table(*_inputs_table(report))]
    if report["missing"]:
        parts += ["## Missing", "\n".join(f"- {text}" for text in report["missing"])]
    return "\n\n".join(parts) + "\n"


# --- tables: (header, rows of text) -----------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


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
        return NOTHING
    if summary["std"] is None:
        return f"{summary['mean']:.1f}"
    low, high = summary["ci95"]
    return f"{summary['mean']:.1f} ± {summary['std']:.1f} [{low:.1f}, {high:.1f}]"


def _paired_table(experiment: dict[str, Any]) -> Table:
    names = {"bbox": DETECTIONS, "segm": DETECTIONS, "sem_seg": ("IoU",)}
    keys = [(k, name) for k in names if any(k in pair for pair in experiment["paired"]) for name in names[k]]
    header = ["backbone", "seed", *(_column(f"{kind}/{name}") for kind, name in keys)]
    rows = []
    for pair in experiment["paired"]:
        cells = [_difference(pair[kind].get(name)) for kind, name in keys]
        rows.append([pair["backbone"], str(pair["seed"]), *cells])
    return header, rows


def _difference(found: dict[str, Any] | None) -> str:
    if not found or found["difference"] is None:
        return NOTHING
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
    stages = list(dict.fromkeys(stage for found in probe["backbones"].values() for stage in found))
    rows = []
    for name, found in probe["backbones"].items():
        count = max(one["runs"] for one in found.values())
        rows.append([name, str(count), *(_top1(found.get(stage)) for stage in stages)])
    return ["backbone, top-1", "runs", *stages], rows


def _top1(found: dict[str, Any] | None) -> str:
    if not found:
        return NOTHING
    interval, std = found["top1_interval"], found["top1_std"]
    text = f"{found['top1']:.1f}" + ("" if std is None else f" ± {std:.1f}")
    return text + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html_table(table: Table, text_columns: Sequence[int] = ()) -> str:
    header, rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ("".join(_cell(i, cell, text_columns) for i, cell in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(column: int, text: str, text_columns: Sequence[int]) -> str:
    return f"<td{' class=text' if column in text_columns else ''}>{escape(text)}</td>"


# --- sections; an empty text where there is nothing to show -----------------------------------------------------


def _results(report: dict[str, Any], colours: dict[str, str]) -> str:
    parts = []
    for experiment in report["experiments"]:
        rows = experiment["backbones"]
        keys = dict.fromkeys(k for row in rows for k in row["numbers"] if k.endswith(("/AP", "/IoU")))
        drawn = "".join(charts.seeds(rows, key, _column(key), colours) for key in keys)
        table = _html_table(_main_table(experiment))
        parts.append(f'<h3>{escape(experiment["title"])}</h3><div class="charts">{drawn}</div>{table}')
    return "".join(parts)


def _paired(report: dict[str, Any]) -> str:
    parts = []
    for experiment in report["experiments"]:
        if experiment["paired"]:
            parts.append(f"<h3>{escape(experiment['title'])}: difference to {escape(experiment['baseline'])}</h3>")
            parts.append(
                f"<p>{escape(_bootstrap(experiment))}: both backbones are judged on the same resampled images. "
            )
            parts.append("It measures the luck of the test images, not that of the training seed.</p>")
            parts.append(_html_table(_paired_table(experiment)))
    return "".join(parts)


def _apart(report: dict[str, Any], colours: dict[str, str]) -> str:
    parts = []
    for experiment in report["experiments"]:
        rows = {row["backbone"]: row["apart"] for row in experiment["backbones"] if row["apart"]}
        if not rows:
            continue
        parts.append(f'<h3>{escape(experiment["title"])}</h3><div class="charts">')
        for kind in next(iter(rows.values())):
            found = {name: apart[kind]["errors"] for name, apart in rows.items()}
            parts.append(charts.errors(found, f"{KINDS[kind]}: AP50 lost by kind of error (TIDE)", colours))
            for threshold in next(iter(rows.values()))[kind]["curves"]:
                found = {name: apart[kind]["curves"][threshold] for name, apart in rows.items()}
                parts.append(charts.curves(found, f"{KINDS[kind]}, IoU {threshold}", colours))
        parts.append("</div>")
    return "".join(parts)


def _classes(report: dict[str, Any]) -> str:
    parts = []
    for experiment in report["experiments"]:
        table = _class_table(experiment)
        if table[1]:
            parts.append(f"<details><summary>{escape(experiment['title'])}: {len(table[1])} classes</summary>")
            parts.append(f"{_html_table(table)}</details>")
    return "".join(parts)


def _probes(report: dict[str, Any], colours: dict[str, str]) -> str:
    drawn = [charts.stages(probe["backbones"], _probe_title(probe), colours) for probe in report["probes"]]
    tables = [f"<h3>{escape(_probe_title(p))}</h3>{_html_table(_probe_table(p))}" for p in report["probes"]]
    note = "<p>In brackets 95 %: over test images for one run, of the mean for several.</p>"
    return f'<div class="charts">{"".join(drawn)}</div>{note}{"".join(tables)}' if drawn else ""


def _training(
    series: dict[str, dict[str, charts.Series]], losses: tuple[list[UnitLoss], str], colours: dict[str, str]
) -> str:
    parts = []
    if losses[0]:
        note = "Means over neighbouring values; what is above the axis in the first twentieth of a run is cut off."
        parts.append(f'<h3>Pretraining</h3><p>{note}</p><div class="chart">{charts.losses(*losses, colours)}</div>')
    for heading, titles in series.items():
        drawn = "".join(charts.lines(s, "step", "", title, colours) for title, s in titles.items())
        parts.append(f'<h3>{escape(heading)}</h3><div class="charts">{drawn}</div>')
    return "".join(parts)


def _pictures(report: dict[str, Any], panels: list[dict[str, Any]]) -> str:
    parts = []
    for experiment, panel in zip(report["experiments"], panels):
        if not panel:
            continue
        parts.append(f"<h3>{escape(experiment['title'])}</h3><p>{escape(panel['note'])}</p>")
        plates = (
            f'<span><i style="background:{colour}"></i>{escape(name)}</span> ' for name, colour in panel["legend"]
        )
        parts.append(f'<p class="legend">{"".join(plates)}</p>' if panel["legend"] else "")
        for row in panel["rows"]:
            figures = "".join(_figure(f"{row['image']}, {name}", uri) for name, uri in row["pictures"].items())
            parts.append(f'<div class="row">{figures}</div>')
    return "".join(parts)


def _figure(text: str, uri: str | None) -> str:
    text = escape(text)
    if uri is None:
        return f'<figure><div class="none">missing</div><figcaption>{text}</figcaption></figure>'
    return f'<figure><img loading="lazy" alt="{text}" src="{uri}"><figcaption>{text}</figcaption></figure>'


def _inputs(report: dict[str, Any]) -> str:
    if not report["inputs"] and not report["other_inputs"]:
        return ""
    parts = [_html_table(_inputs_table(report), text_columns=(2, 3, 4, 7))]
    for experiment in report["experiments"]:
        text = "\n".join(f"{key}: {value}" for key, value in experiment["config"].items())
        parts.append(f"<details><summary>Configuration: {escape(experiment['title'])}</summary>")
        parts.append(f'<div class="wide"><pre>{escape(text)}</pre></div></details>')
    return "".join(parts)


def _inputs_table(report: dict[str, Any]) -> Table:
    header = ["backbone", "seed", "run", "weights, sha256", "data, sha256", "config sha256", "engine", "machine"]
    rows = []
    for found in report["inputs"]:
        weights = found["weights"]
        digest = (weights.get("sha256") or "")[:12] or "hash not recorded"
        data = "; ".join(f"{name} {d['sha256'][:12]}" for name, d in (found["datasets"] or {}).items())
        told = f"{weights['path']} {digest}" if weights.get("path") else "none: random weights"
        cells = [found["backbone"], str(found["seed"]), found["run"], told]
        cells += [data or "not recorded", found["config_sha256"][:12], found["engine"] or "not recorded"]
        rows.append([*cells, _machine(found["environment"])])
    for found in report["other_inputs"]:
        digest = (found["sha256"] or "")[:12] or "hash not recorded"
        weights = f"{found['weights']} {digest}" if found["weights"] else NOTHING
        cells = [found["backbone"], str(found["seed"]), found["run"], weights, str(found["data"])]
        rows.append([*cells, (found["config_sha256"] or NOTHING)[:12], NOTHING, NOTHING])
    return header, rows


def _machine(environment: dict[str, Any] | None) -> str:
    if not environment:
        return "not recorded"
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    versions = f"loco_det {environment['loco_det']}, Python {environment['python']}, {packages}"
    return f"{environment['device']}, {environment['processes']} processes; {environment['system']}; {versions}"


def _missing(report: dict[str, Any], empty: list[str]) -> str:
    told = [*report["missing"], *(f"{title}: nothing was given for this part" for title in empty)]
    return f'<ul class="missing">{"".join(f"<li>{escape(text)}</li>" for text in told)}</ul>' if told else ""
