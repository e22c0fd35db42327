"""Loading a COCO annotation file of train2017's size: the index, first and from the cache, against pycocotools.

The file is made up: 118,287 images, 860,001 annotations in no order, polygons of about 34 points and one crowd RLE in
86, 600 MiB. Every side runs in a process of its own, in turns, and the medians are compared:

- first: `load_coco` without a cache, i.e. parse, check, write the cache, map it;
- cached: `load_coco` again; both list the image folder and check that every image is there;
- pycocotools: `COCO(path)`, which does not look for images.

Seconds are told on the clock and of processors; on a machine that does other things, too, compare the latter.

Memory is the peak of the resident set less what it was before loading, after the imports (`process_mib` is the peak
itself; torch alone is most of it). A worker's memory is what one more process of a DataLoader that goes
through the data set, segmentations included, costs the machine: proportional set sizes (PSS) of all processes with
four workers less those with two, halved, so that what processes share counts once.

    python benchmarks/annotation_index.py --json annotation_index.json        # about two minutes on 2 cores
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import parser, report

IMAGES, ANNOTATIONS, CLASSES = 118_287, 860_001, 80
H, W = 480, 640
MIB = 2**20


# --- the made-up file -------------------------------------------------------------------------------------------


def outline(rng: np.random.Generator) -> str:
    points = int(np.clip(rng.normal(34, 16), 4, 120))
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    around = rng.uniform(20, 200) * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 3, (points, 2))
    return json.dumps((around + np.array([W / 2, H / 2])).round(2).ravel().tolist())


def made_up_file(path: Path, images: int, annotations: int) -> None:
    """Keys, their order and spacing as in COCO's own files."""
    rng = np.random.default_rng(0)
    outlines = [outline(rng) for _ in range(4000)]
    crowd = json.dumps({"counts": rng.integers(1, 900, 300).tolist(), "size": [H, W]})
    box = np.concatenate([rng.uniform(0, 300, (annotations, 2)), rng.uniform(2, 300, (annotations, 2))], 1).round(2)
    columns = zip(
        *(rng.random(annotations).tolist(), rng.integers(0, len(outlines), (annotations, 2)).tolist(), box.tolist()),
        *(rng.integers(1, images + 1, annotations).tolist(), rng.integers(1, CLASSES + 1, annotations).tolist()),
    )

    def annotation(number: int, kind: float, shapes: list[int], box: list[float], image: int, category: int) -> str:
        parts = [outlines[k] for k in shapes[: 2 if kind > 0.9 else 1]]
        is_crowd = kind < 1 / 86
        return (
            f'{{"segmentation": {crowd if is_crowd else "[" + ", ".join(parts) + "]"}, '
            f'"area": {round(box[2] * box[3] / 2, 4)}, "iscrowd": {int(is_crowd)}, "image_id": {image}, '
            f'"bbox": {box}, "category_id": {category}, "id": {number}}}'
        )

    with open(path, "w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        file.write(", ".join(
            f'{{"license": 4, "file_name": "{i:012d}.jpg", "coco_url": "http://images.cocodataset.org/train2017/'
            f'{i:012d}.jpg", "height": {H}, "width": {W}, "date_captured": "2013-11-14 11:18:45", '
            f'"flickr_url": "http://farm9.staticflickr.com/8186/{i}_z.jpg", "id": {i}}}'
            for i in range(1, images + 1)
        ))  # fmt: skip
        file.write('], "annotations": [')
        for number, columns_of_one in enumerate(columns, 1):
            file.write((", " if number > 1 else "") + annotation(number, *columns_of_one))
        file.write('], "categories": [')
        file.write(", ".join(f'{{"supercategory": "thing", "id": {i}, "name": "class{i}"}}' for i in range(1, 81)))
        file.write("]}")


# --- the sides, each in its own process -------------------------------------------------------------------------


def peak() -> float:
    """MiB; `ru_maxrss` would be inherited from the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load_ours(folder: Path) -> Any:
    from loco_det.annotations.coco import load_coco
    from loco_det.annotations.registry import Dataset

    paths = Dataset("made_up", folder / "images", folder / "instances.json")
    return lambda: load_coco(paths)


def load_pycocotools(folder: Path) -> Any:
    import contextlib
    import io

    from pycocotools.coco import COCO

    def load() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(str(folder / "instances.json"))

    return load


def measure_load(side: str, folder: Path) -> dict[str, float]:
    load = (load_pycocotools if side == "pycocotools" else load_ours)(folder)
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    found = load()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert len(found.imgs if side == "pycocotools" else found) > 0
    return {"s": seconds, "cpu_s": cpu, "mib": peak() - before, "process_mib": peak()}


class Walk:
    """Every annotation of every image, as training reads them; a batch is what the process and its siblings cost."""

    def __init__(self, dataset: Any, images: int):
        self.dataset, self.images = dataset, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, i: int) -> int:
        record = self.dataset[i]
        return sum(map(len, record.segmentations)) + int(record.boxes.sum())


def pss(pid: int) -> float:
    """Proportional set size in MiB: of a page that n processes map, each has an nth."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell proportional set sizes")


def measure_workers(side: str, folder: Path) -> dict[str, float]:
    from torch.utils.data import DataLoader

    walk = Walk(dataset := load_ours(folder)(), len(dataset))
    total = {}
    for workers in (2, 4):
        loader = DataLoader(walk, batch_size=1000, num_workers=workers, persistent_workers=True, collate_fn=sum)
        iterator = iter(loader)
        assert sum(iterator) > 0
        children = [worker.pid for worker in iterator._workers]  # all alive: the loader keeps them
        total[workers] = sum(map(pss, [os.getpid(), *children]))
        iterator._shutdown_workers()
    return {"mib": (total[4] - total[2]) / 2}


def in_own_process(side: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    environment = {**os.environ, "LOCO_DET_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout)


# --- together ---------------------------------------------------------------------------------------------------


def run_all(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """{side: {figure: median}}"""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for old in (folder / "cache").glob("*"):
            old.unlink()
        for side, times in (("first", 1), ("pycocotools", 1), ("cached", 3)):
            found.setdefault(side, []).extend(in_own_process(side, folder) for _ in range(times))
    found["worker"] = [in_own_process("worker", folder)]
    return {
        side: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for side, results in found.items()
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=IMAGES)
    arguments.add_argument("--annotations", type=int, default=ANNOTATIONS)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--side", choices=("first", "cached", "pycocotools", "worker"), help="internal")
    arguments.add_argument("--folder", type=Path, help="internal")
    args = arguments.parse_args()
    if args.side:
        print(json.dumps((measure_workers if args.side == "worker" else measure_load)(args.side, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "instances.json"
        made_up_file(path, args.images, args.annotations)
        (folder / "images").mkdir()
        for i in range(1, args.images + 1):
            (folder / "images" / f"{i:012d}.jpg").touch()
        size = path.stat().st_size / MIB
        found = run_all(folder, args.rounds)
        index = max((folder / "cache").iterdir(), key=lambda p: p.stat().st_size).stat().st_size / MIB
    first, cached, peer = found["first"], found["cached"], found["pycocotools"]
    figures = {
        "first_s": first["s"],
        "cached_s": cached["s"],
        "peak_mib": first["mib"],
        "cached_mib": cached["mib"],
        "pycocotools_s": peer["s"],
        "pycocotools_mib": peer["mib"],
        "per_worker_mib": found["worker"]["mib"],
        "first_of_pycocotools": {"time": first["s"] / peer["s"], "memory": first["mib"] / peer["mib"]},
        "cached_of_pycocotools": {"time": cached["s"] / peer["s"], "memory": cached["mib"] / peer["mib"]},
        "cpu_s": {side: found[side]["cpu_s"] for side in ("first", "cached", "pycocotools")},
        "process_mib": {side: found[side]["process_mib"] for side in ("first", "cached", "pycocotools")},
        "file_mib": size,
        "index_mib": index,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(f"{args.images} images, {args.annotations} annotations, {size:.0f} MiB; the index is {index:.0f} MiB")
    print(f"each further worker costs {figures['per_worker_mib']:.1f} MiB")
    rows = [[side, r["s"], r["s"] / peer["s"], r["cpu_s"], r["mib"], r["mib"] / peer["mib"]] for side, r in
            (("pycocotools", peer), ("first", first), ("cached", cached))]  # fmt: skip
    report(["", "s", "ratio", "CPU s", "MiB", "ratio"], rows, figures, args.json)


if __name__ == "__main__":
    main()
