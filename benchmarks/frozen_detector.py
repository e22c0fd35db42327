"""A detector on the frozen stages of a network with the CIFAR stem, through the Python API.

    python benchmarks/frozen_detector.py simclr_0/backbone.safetensors --data BCCD --out output/detector --seed 0

Such a network sees images of 32 pixels and has stages of the strides 1, 2, 4 and 8. It is given images of a quarter of
the detector's size, so that objects are of the size that it knows and its stages have the strides of a feature pyramid,
4 to 32.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout it stands in, installed or not

import loco_det
from loco_det.core.errors import UserError

ITERATIONS = 500
STAGES = ("res2", "res3", "res4", "res5")


class Quarter(nn.Module):
    """(B, 3, H, W) normalised images -> the maps of a network's STAGES on their means over 4 x 4 pixels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.network(F.avg_pool2d(images, 4))
        return {stage: maps[stage] for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path, help="backbone.safetensors of a ResNet with the CIFAR stem")
    parser.add_argument("--data", required=True, help="a detection set with the splits train and test")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; the same command continues it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network = loco_det.load_backbone(args.backbone).model
    try:
        found = loco_det.evaluate_detection(
            Quarter(network),
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
