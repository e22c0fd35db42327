"""A page of sections with texts, a table, a chart and pictures, as one self-contained HTML file and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loco_det.core.files import atomic_write
from loco_det.report.page import Table, markdown_table, plain, template


@dataclass(frozen=True)
class Picture:
    """A PNG in the page's folder, shown with its title."""

    title: str
    path: Path

    @property
    def data(self) -> str:
        """The file in base64."""
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """A part of a page; `text_columns` of the table hold words, `chart` is SVG of `report.charts`."""

    title: str
    text: Sequence[str] = ()
    table: Table | None = None
    text_columns: Sequence[int] = ()
    chart: str = ""
    pictures: Sequence[Picture] = ()
    points: Sequence[str] = ()
    code: str = ""


def write_sections(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write `path`.html, which holds its pictures, and `path`.md, which names them.

    Raises:
        UserError: a file cannot be written.
    """
    html = template("sections.html.j2").render(title=title, sections=sections)
    for suffix, text in ((".html", html), (".md", _markdown(title, sections))):
        with atomic_write(path.with_name(path.name + suffix), "w") as file:
            file.write(text)


def _markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {plain(title)}"]
    for section in sections:
        parts += [f"## {plain(section.title)}"] if section.title else []
        parts += map(plain, section.text)
        parts += [markdown_table(*section.table)] if section.table else []
        parts += [f"![{plain(picture.title)}]({picture.path.name})" for picture in section.pictures]
        parts += ["\n".join(f"- {plain(point)}" for point in section.points)] if section.points else []
        parts += [f"```text\n{section.code}\n```"] if section.code else []
    return "\n\n".join(parts) + "\n"
