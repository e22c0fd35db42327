"""A small detector on the frozen stages of a backbone, through the Python API.

python benchmarks/frozen_detector.py simclr_0/backbone.safetensors --data BCCD --out output/detector --seed 0
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout it stands in, installed or not

import loco_det
from loco_det.core.errors import UserError

ITERATIONS = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path, help="backbone.safetensors of a pretraining")
    parser.add_argument("--data", required=True, help="a detection set with the splits train and test")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same command continues it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        found = loco_det.evaluate_detection(
            args.backbone,
            train=f"{args.data}@train",
            test=f"{args.data}@test",
            iterations=ITERATIONS,
            small=True,
            output=args.out,
            resume=True,
            device="cpu",
            seed=args.seed,
        )
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
