"""How long an evaluation of docs/is_my_backbone_good.md takes, in processor and wall-clock time.

    OMP_NUM_THREADS=1 python benchmarks/small_evaluation.py --json benchmarks/results/small_evaluation_cpu.json

A ResNet-18 of timm, untrained, and torchvision's as a module, each frozen under the small detector: 200 iterations on
120 made-up images, tested on 40.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from _common import parser, report

import loco_det
from loco_det.annotations.synthetic import make_shapes_dataset

TRAIN, TEST, ITERATIONS = 120, 40, 200


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.manual_seed(0)
    layers = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
    module = torchvision.models._utils.IntermediateLayerGetter(torchvision.models.resnet18(), layers)
    seconds = {}
    with tempfile.TemporaryDirectory() as root:
        make_shapes_dataset(Path(root), train=TRAIN, val=TEST, seed=0)
        os.environ["DETECTRON2_DATASETS"] = root
        data = {"train": "shapes_train", "test": "shapes_val", "iterations": ITERATIONS, "small": True}
        for name, backbone in (("random:timm:resnet18", "random:timm:resnet18"), ("nn.Module", module)):
            cpu, wall = time.process_time(), time.perf_counter()
            loco_det.evaluate_detection(backbone, **data)
            seconds[name] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    rows = [[name, found["cpu"], found["wall"]] for name, found in seconds.items()]
    setting = {"train": TRAIN, "test": TEST, "iterations": ITERATIONS, "threads": torch.get_num_threads()}
    report(["backbone", "processor s", "wall s"], rows, {"seconds": seconds, "setting": setting}, args.json)


if __name__ == "__main__":
    main()
