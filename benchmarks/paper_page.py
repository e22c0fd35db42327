"""Put the pages that `loco-det paper` wrote into docs/paper.md, each below its mark, and their pictures beside it.

loco-det paper table1 --data cifar10.zip --out output/evidence      # and decoder, curves, memory, ...
python benchmarks/paper_page.py output/evidence
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

from _common import ROOT

from loco_det.core.files import atomic_write

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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    folder = options.parse_args().folder
    text = with_pages(PAGE.read_text(), folder)
    with atomic_write(PAGE, "w") as file:
        file.write(text)
    for picture in re.findall(r"\]\(paper_(\w+\.png)\)", text):
        if (folder / picture).is_file():
            shutil.copyfile(folder / picture, PAGE.parent / f"paper_{picture}")


if __name__ == "__main__":
    main()
