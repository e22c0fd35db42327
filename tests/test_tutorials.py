"""The tutorials of docs/ run unchanged: every `sh` block of a page, in one shell, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cityscapes_cases import write_cityscapes
from conftest import datasets_root
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
MADE = {  # what each page promises to leave behind
    "cityscapes": [
        *("check/annotated.png", "mine.pkl", "runs/mine/model_final.pth"),
        "runs/submission/inference/cityscapes_submission.zip",
    ],
    "from_moco": ["moco.pkl", "moco.yaml", "runs/moco_c4/inference/coco_instances_results.json"],
    "new_method": ["mine.safetensors", "mine.pkl"],
    "own_backbone": ["mine.pkl", "runs/mine_1/model_final.pth", "runs/random_1/model_final.pth", "report/index.html"],
    "own_data": [
        *("check/bccd/annotated.png", "runs/bccd/model_final.pth", "runs/raccoon/model_final.pth"),
        *("coco/bccd/annotations/val.json", "coco/raccoon/annotations/all.json", "report/index.html"),
    ],
    "vit": ["mine.safetensors", "mine.yaml", "runs/mine/model_final.pth", "runs/finetuned/model_final.pth"],
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


def made_up_voc(work: Path) -> None:
    """Stand-ins for the two public sets of the page, in the same layout."""
    rng = np.random.default_rng(0)
    layouts = {
        "bccd": ("Annotations", "JPEGImages", ("RBC", "WBC", "Platelets")),
        "raccoon": ("annotations", "images", ("raccoon",)),
    }
    for name, (labels, images, classes) in layouts.items():
        for k in range(10):
            stem = f"{name}-{k:02d}"
            for folder in (labels, images):
                (work / name / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(
                work / name / images / f"{stem}.jpg"
            )
            objects = "".join(
                f"<object><name>{label}</name><bndbox><xmin>{5 + 3 * k}</xmin><ymin>{4 + k}</ymin><xmax>{40 + k}</xmax>"
                f"<ymax>{40 + k}</ymax></bndbox></object>"
                for label in classes
            )
            size = "<size><width>80</width><height>60</height><depth>3</depth></size>"
            (work / name / labels / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    lists = work / "bccd" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, chosen in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10)), ("trainval", range(8))):
        (lists / f"{split}.txt").write_text("".join(f"bccd-{k:02d}\n" for k in chosen))


def real_voc(work: Path) -> None:
    """The two public sets themselves."""
    root = datasets_root()
    for name in ("bccd", "raccoon"):
        if not (root / name).is_dir():
            pytest.skip(f"no {name} under {root} (set DETECTRON2_DATASETS)")
        (work / name).symlink_to(root / name)


def test_every_page_is_run() -> None:
    assert {page.stem for page in PAGES} == set(MADE)


PREPARED = {"cityscapes": official_zips, "own_data": made_up_voc}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page: Path, commands: Path, tmp_path: Path) -> None:
    if page.stem == "own_data" and all((datasets_root() / name).is_dir() for name in ("bccd", "raccoon")):
        pytest.skip("the test below runs this page on the real sets")
    work = run_page(page, commands, tmp_path, PREPARED.get(page.stem))
    if page.stem == "own_data":
        compare_with_pycocotools(work)


def test_real_annotations_go_from_their_owners_folders_to_an_ap(commands: Path, tmp_path: Path) -> None:
    compare_with_pycocotools(run_page(ROOT / "docs" / "tutorials" / "own_data.md", commands, tmp_path, real_voc))


def compare_with_pycocotools(work: Path) -> None:
    """The AP of the runs on paths is pycocotools' on the converted files, and the same when these are named."""
    for run, file in (("bccd", "bccd/annotations/val.json"), ("raccoon", "raccoon/annotations/all.json")):
        truth = COCO(str(work / "coco" / file))
        found = truth.loadRes(str(work / "runs" / run / "inference" / "coco_instances_results.json"))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert last_metrics(work / "runs" / run)["bbox/AP"] == pytest.approx(100 * evaluation.stats[0], abs=1e-9)
    once, again = (last_metrics(work / "runs" / run) for run in ("bccd", "bccd_again"))
    assert {k: v for k, v in once.items() if "/AP" in k} == {k: v for k, v in again.items() if "/AP" in k}


def last_metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.json").read_text().splitlines()[-1])


def run_page(page: Path, commands: Path, tmp_path: Path, prepare: Callable[[Path], None] | None) -> Path:
    """Run a page's lines; the folder that they ran in."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    work = tmp_path / "work"
    work.mkdir()
    if prepare is not None:
        prepare(work)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "DETECTRON2_DATASETS"},
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
    }
    script = "set -euo pipefail\n" + "".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=work, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert [name for name in MADE[page.stem] if not (work / name).is_file()] == []
    return work


@pytest.mark.parametrize(
    ("line", "status", "out", "err"),
    [
        ("python -c 'print(1); raise SystemExit(3)'", 3, "1\n", r"^$"),
        ("python -c 'import os; print(os.environ[\"FROM\"], os.getcwd()[-4:])'", 0, "here work\n", r"^$"),
        ("echo 'raise ValueError(2)' | python -", 1, "", r"ValueError: 2\n$"),
        ("python -c 'import os; os.kill(os.getpid(), 9)'", 137, "", r"^$"),
        ("loco-det convert absent.pth out.pkl", 2, "", r"^error: .*absent\.pth"),
    ],
)
def test_a_command_ends_as_its_own_process_would(
    line: str, status: int, out: str, err: str, commands: Path, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "FROM": "here"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, out)
    assert re.search(err, done.stderr)
