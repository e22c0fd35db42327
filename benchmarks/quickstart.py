"""How long the quickstart takes, in 150 plain training steps of torchvision's ResNet-18.

    python benchmarks/quickstart.py --json benchmarks/results/quickstart_cpu.json

Plain steps (64 images of 64 x 64 pixels, SGD, cross-entropy) are timed before the quickstart and after each of its
backbones, 30 at a time and with the same threads, so that both meet the same load of the machine. Prints processor and
wall-clock time of both, and their ratio; the bound is 4.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import parser, report
from torchvision.models import resnet18

from loco_det.commands import quickstart

STEPS, PARTS = 150, 1 + len(quickstart.METHODS)


class Plain:
    """Plain training steps and what they took.

    Attributes:
        cpu, wall: seconds so far, of the processor and of the clock.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = resnet18()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.images, self.labels = torch.randn(64, 3, 64, 64), torch.randint(0, 1000, (64,))
        self.step()  # warm-up
        self.cpu = self.wall = 0.0

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()

    def run(self, steps: int) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            self.step()
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, default=Path("output/quickstart"))
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    plain, evaluate = Plain(), quickstart._evaluate

    def interleaved(*arguments: object) -> dict[str, object]:
        found = evaluate(*arguments)
        plain.run(STEPS // PARTS)
        return found

    quickstart._evaluate = interleaved
    plain.run(STEPS // PARTS)
    cpu, wall, before = time.process_time(), time.perf_counter(), (plain.cpu, plain.wall)
    results = quickstart.quickstart(args.out, args.seed)
    cpu = time.process_time() - cpu - (plain.cpu - before[0])
    wall = time.perf_counter() - wall - (plain.wall - before[1])
    scores = {
        f"{name}_AP": {method: round(found[kind]["AP"], 1) for method, found in results["frozen"].items()}
        for name, kind in (("box", "bbox"), ("mask", "segm"))
    }
    figures = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "quickstart": {"cpu_s": round(cpu, 1), "wall_s": round(wall, 1)},
        "plain_steps": {"steps": STEPS, "cpu_s": round(plain.cpu, 1), "wall_s": round(plain.wall, 1)},
        "ratio": {"cpu": round(cpu / plain.cpu, 2), "wall": round(wall / plain.wall, 2)},
        **scores,
    }
    rows = [[name, figures[name]["cpu_s"], figures[name]["wall_s"]] for name in ("quickstart", "plain_steps")]
    rows += [["ratio", *figures["ratio"].values()]]
    report(["", "processor s", "wall s"], rows, figures, args.json)


if __name__ == "__main__":
    main()
