"""The reliability campaign: python tests/campaign/run.py [--only PART ...] [--hours H] [--json PATH]

Ends, damages and repeats this project's commands and feeds its parsers what nobody should, counts what came of it, and
prints for each failure the command that repeats it. The exit status is 1 if there was one. docs/reliability.md tells
what each part does and what it has found.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch is imported: processes are forked from this one
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import report

from campaign import damage, files, fuzz, hostile
from campaign.jobs import Bench
from campaign.tally import OUTCOMES, Tally

Part = Callable[[Tally, Bench], None]
# For the default suite: some of each kind, with as few trials as there can be.
SAMPLE = ["kill:data convert", "fail:evaluate", "race:index", "flip:backbone", "flip:derived annotations",
          "fuzz:segmentation", "fuzz:voc", "fuzz:checkpoint zip", "fuzz:images", "fuzz:SHA256SUMS"]  # fmt: skip


def parts() -> dict[str, Part]:
    """Every part by its name; what stands before the colon names all of a kind."""
    found: dict[str, Part] = {}
    found |= {f"kill:{name}": partial(files.kill, name=name) for name in files.POINTS}
    found |= {f"fail:{name}": partial(files.fail, name=name) for name in files.POINTS}
    found["full disk"] = files.full_disk
    found |= {f"race:{name}": partial(files.race, name=name) for name in files.RACES}
    found |= {f"flip:{name}": partial(damage.flip, name=name) for name in damage.KEPT}
    found |= {f"fuzz:{name}": partial(fuzz.fuzz, name=name) for name in fuzz.FUZZED}
    found["hostile"] = hostile.hostile
    found["agree"] = files.agree
    return found


def chosen(names: list[str] | None) -> dict[str, Part]:
    """The parts called so, or of a kind called so."""
    every = parts()
    found = {name: part for name, part in every.items() if not names or {name, name.partition(":")[0]} & {*names}}
    if not found:
        sys.exit(f"there is no part {' '.join(names or [])}; take one of {', '.join(every)}")
    return found


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PART", help="e.g. kill, or kill:train")
    parser.add_argument("--hours", type=float, default=1.0, metavar="H", help="how many trials, in hours of one core")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn")
    parser.add_argument("--index", type=int, metavar="N", help="make this one trial of the part")
    parser.add_argument("--sample", action="store_true", help="a few trials of some parts, in seconds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    os.chdir(Path(__file__).resolve().parents[2])
    tallies, share = [], args.hours
    if args.sample:
        args.only, share = SAMPLE, 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        bench = Bench(Path(place) / "work", trained=not args.sample)
        for name, part in chosen(args.only).items():
            tally = Tally(name, share, args.seed, args.index)
            began = time.monotonic()
            part(tally, bench)
            tally.seconds = time.monotonic() - began
            print(
                f"{name}: {tally.tried} tried, {tally.counts['survived']} survived, {tally.seconds:.0f} s", flush=True
            )
            tallies.append(tally)
    figures = {"torch": torch.__version__, "python": sys.version.split()[0], "hours": args.hours, "seed": args.seed}
    rows = [[t.part, t.tried, *(t.counts[name] for name in OUTCOMES), f"{t.seconds / 60:.1f}"] for t in tallies]
    total = [sum(row[k] for row in rows) for k in range(1, 2 + len(OUTCOMES))]
    rows.append(["all", *total, f"{sum(t.seconds for t in tallies) / 60:.1f}"])
    report(
        ["part", "tried", *OUTCOMES, "minutes"],
        rows,
        {**figures, "parts": {t.part: t.plain() for t in tallies}},
        args.json,
    )
    return int(any(t.tried > t.counts["survived"] for t in tallies))


if __name__ == "__main__":
    sys.exit(main())
