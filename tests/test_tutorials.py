"""The tutorials of docs/ are run as they stand: every `sh` block of a page, in one shell, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cityscapes_cases import write_cityscapes

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
MADE = {  # what each page promises to leave behind
    "cityscapes": [
        *("check/annotated.png", "mine.pkl", "runs/mine/model_final.pth"),
        "runs/submission/inference/cityscapes_submission.zip",
    ],
    "from_moco": ["moco.pkl", "moco.yaml", "runs/moco_c4/inference/coco_instances_results.json"],
    "new_method": ["mine.safetensors", "mine.pkl"],
    "own_backbone": ["mine.pkl", "runs/mine_1/model_final.pth", "runs/scratch_1/model_final.pth", "report/index.html"],
    "own_images": ["pretrain/mine/backbone.safetensors", "loco.pkl", "gim.pkl", "mine.pkl", "report/index.html"],
}


def official_zips(work: Path) -> None:
    """What the page asks its reader to download, made up: both archives, each with a README, as the real ones."""
    pytest.importorskip("shapely", reason="shapely is not installed (extra cityscapes)")
    pytest.importorskip("cityscapesscripts", reason="cityscapesscripts is not installed (extra cityscapes)")
    tree = write_cityscapes(work.parent / "downloads", images=2)
    for kind in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(work / f"{kind}_trainvaltest.zip", "w") as archive:
            archive.writestr("README", "made up")
            for file in sorted((tree / kind).rglob("*.*")):
                archive.write(file, file.relative_to(tree))


def test_every_page_is_run() -> None:
    assert {page.stem for page in PAGES} == set(MADE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, module in (("python", ""), ("loco-det", "-m loco_det.cli ")):
        command = commands / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        command.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    if page.stem == "cityscapes":
        official_zips(work)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "DETECTRON2_DATASETS"},
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    script = "set -euo pipefail\n" + "".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert [name for name in MADE[page.stem] if not (work / name).is_file()] == []
