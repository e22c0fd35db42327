"""The report as one HTML file that needs nothing beside it, and the same numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from loco_det.report import charts

KINDS = {"bbox": "box", "segm": "mask"}
NOTHING = "-"  # in a table's cell
# Of pixel labels, and of rare, common and frequent classes (LVIS).
LABEL_SCORES = tuple(f"sem_seg/{name}" for name in ("IoU", "iIoU", "IoU_sup", "iIoU_sup"))
BY_FREQUENCY = tuple(f"{kind}/AP{letter}" for kind in KINDS for letter in "rcf")
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
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
.charts svg{width:100%;height:auto;display:block;max-width:34rem}
svg text{font-family:inherit!important}
.row{display:grid;gap:.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,11rem),1fr));margin:1rem 0}
figure{margin:0}figure img{width:100%;height:auto;display:block;border-radius:4px}
figcaption{font-size:.8rem}
details{margin:.5rem 0}summary{cursor:pointer}
code{font-size:.85em;background:var(--panel);padding:.1em .3em;border-radius:4px;overflow-wrap:anywhere}
nav a{margin-right:1rem;white-space:nowrap}a{color:inherit}
.missing li{margin:.2rem 0;overflow-wrap:anywhere}
"""


def html_page(report: dict[str, Any], series: dict[str, charts.Series], panels: list[list[dict[str, Any]]]) -> str:
    """The whole page.

    Args:
        report: the numbers, as report.json has them.
        series: title -> curves over steps.
        panels: for each experiment, `report.panels.panels`' rows.
    """
    colours = charts.colour_of(report["backbones"])
    sections = [("results", "Results", _results(report, colours))]
    sections.append(("paired", "Paired differences", _paired(report)))
    sections.append(("errors", "Errors and curves", _apart(report, colours)))
    sections.append(("classes", "Per class", _classes(report)))
    sections.append(("probes", "Probes", _probes(report, colours)))
    drawn = [charts.lines(s, "step", "", title, colours) for title, s in series.items()]
    sections.append(("training", "Training", f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""))
    sections.append(("pictures", "Pictures", "".join(map(_panel_rows, panels))))
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
        f"<p>Made {escape(report['created'])} by loco_det {escape(report['loco_det'])}. "
        "AP in percent; mean ± standard deviation over runs, in brackets the 95 % interval of the mean.</p>"
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
            parts += ["AP per class:", _markdown_table(header, rows)]
    for probe in report["probes"]:
        header, rows = _probe_table(probe)
        parts += [f"## {_probe_title(probe)}", _markdown_table(header, rows)]
    if report["missing"]:
        parts += ["## Missing", "\n".join(f"- {text}" for text in report["missing"])]
    return "\n\n".join(parts) + "\n"


# --- tables: (header, rows of text) -----------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


def _main_table(experiment: dict[str, Any]) -> Table:
    rows = experiment["backbones"]
    keys = [f"{kind}/{name}" for kind in KINDS for name in COLUMNS]
    keys = [key for key in keys if any(key in row["numbers"] for row in rows)]
    others = (*LABEL_SCORES, *BY_FREQUENCY)
    keys += dict.fromkeys(key for row in rows for key in row["numbers"] if "/AR" in key or key in others)
    header = ["backbone", "runs", *map(_column, keys)]
    body = [[r["backbone"], str(len(r["runs"])), *(_number(r["numbers"].get(key)) for key in keys)] for r in rows]
    return header, body


def _column(key: str) -> str:
    kind, _, name = key.partition("/")
    return f"{KINDS.get(kind, kind)} {name}"


def _number(summary: dict[str, Any] | None) -> str:
    if not summary or not summary["n"]:
        return NOTHING
    if summary["std"] is None:
        return f"{summary['mean']:.1f}"
    low, high = summary["ci95"]
    return f"{summary['mean']:.1f} ± {summary['std']:.1f} [{low:.1f}, {high:.1f}]"


def _paired_table(experiment: dict[str, Any]) -> Table:
    kinds = [kind for kind in KINDS if any(kind in pair for pair in experiment["paired"])]
    header = ["backbone", "seed", *(f"{KINDS[kind]} {name}" for kind in kinds for name in COLUMNS)]
    rows = []
    for pair in experiment["paired"]:
        cells = [_difference(pair[kind].get(name)) for kind in kinds for name in COLUMNS]
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
    keys = [key for key in dict.fromkeys(k for r in rows for k in r["numbers"]) if "/AP-" in key or "/IoU-" in key]
    columns = [(measure, row) for measure in dict.fromkeys(key.partition("-")[0] for key in keys) for row in rows]
    header = ["class", *(f"{KINDS.get(m.partition('/')[0], 'IoU')}, {row['backbone']}" for m, row in columns)]
    names = dict.fromkeys(key.partition("-")[2] for key in keys)
    return header, [[n, *(_number(row["numbers"].get(f"{measure}-{n}")) for measure, row in columns)] for n in names]


def _probe_title(probe: dict[str, Any]) -> str:
    return f"{probe['protocol']} probe, {probe['data']}".strip(", ")


def _probe_table(probe: dict[str, Any]) -> Table:
    stages = list(dict.fromkeys(stage for found in probe["backbones"].values() for stage in found))
    rows = [[name, *(_top1(found.get(stage)) for stage in stages)] for name, found in probe["backbones"].items()]
    return ["backbone, top-1", *stages], rows


def _top1(found: dict[str, Any] | None) -> str:
    if not found:
        return NOTHING
    interval = found.get("top1_interval")
    return f"{found['top1']:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


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
        keys = [*(f"{kind}/AP" for kind in KINDS), LABEL_SCORES[0]]
        keys = [key for key in keys if any(key in row["numbers"] for row in rows)]
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
    return f'<div class="charts">{"".join(drawn)}</div>{"".join(tables)}' if drawn else ""


def _panel_rows(rows: list[dict[str, Any]]) -> str:
    parts = []
    for row in rows:
        parts.append('<div class="row">')
        for name, uri in row["pictures"].items():
            text = escape(f"{row['image']}, {name}")
            image = f'<img loading="lazy" alt="{text}" src="{uri}">'
            parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
        parts.append("</div>")
    return "".join(parts)


def _inputs(report: dict[str, Any]) -> str:
    header = ["backbone", "seed", "run", "weights, sha256", "annotations, sha256", "config sha256", "engine", "machine"]
    rows = []
    for found in report["inputs"]:
        weights = found["weights"] or {}
        digest = weights.get("sha256", "")[:12] or "hash not recorded"
        data = "; ".join(f"{name} {d['sha256'][:12]}" for name, d in (found["datasets"] or {}).items())
        cells = [found["backbone"], str(found["seed"]), found["run"], f"{weights.get('path') or 'none'} {digest}"]
        cells += [data or "not recorded", found["config_sha256"][:12], found["engine"] or "not recorded"]
        rows.append([*cells, _machine(found["environment"])])
    return _html_table((header, rows), text_columns=(2, 3, 4, 7)) if rows else ""


def _machine(environment: dict[str, Any] | None) -> str:
    if not environment:
        return "not recorded"
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return f"{environment['device']}, {environment['processes']} processes; Python {environment['python']}, {packages}"


def _missing(report: dict[str, Any], empty: list[str]) -> str:
    told = [*report["missing"], *(f"{title}: nothing was given for this part" for title in empty)]
    return f'<ul class="missing">{"".join(f"<li>{escape(text)}</li>" for text in told)}</ul>' if told else ""
