"""Time and memory of one local step against an end-to-end SimCLR step with the same decoder, and lightly's.

    python benchmarks/local_backward.py --json local_backward.json                  # about two minutes on 2 cores
    python benchmarks/local_backward.py --device cuda --json benchmarks/results/CARD.json

A step is forward and backward of two views of each image, without optimizer. The sides take turns, in one order and
in the other; a ratio is the median over turns of the ratio within a turn, so a busy machine disturbs little. On a CPU:
ResNet-50, 128 px, 2 x 16 views, float32, and `peak` is the most that is saved for backward at any time, each storage
once, the weights that autograd saves included. On a GPU: 224 px, 2 x 256 views, bf16, `peak` is the allocator's
maximum, and every side runs once more under torch.compile (`--no-compile` leaves that out, `--compile` asks for it on
a CPU). Layout (channels_last) and memory allocation are those of `loco-det pretrain`, for every side.

Sides: simclr, gim, loco (this package's step), loco_recompute_first (SOLVER.RECOMPUTE first), obvious_loco (every unit
forwarded and differentiated by itself, its input taken from the unit below) and, where it is installed, lightly (its
projection head and loss on the same backbone, one forward for each view as in its tutorial).

JSON: {"resnet50": {side: {"time_ratio", "cpu_ratio", "work_ratio", "peak_ratio"}, "obvious_loco_over_loco": x,
"simclr_over_lightly": x or null}, "seconds": {side: median}, "images_per_second": {side: x}, "peak_bytes": {side:
bytes}, "setting": {...}}. Ratios of a side are against simclr, those of a compiled side (SIDE_compiled) against
compiled simclr; cpu_ratio counts the processor time of all threads (null on a GPU), work_ratio the multiplications of
convolutions and matrix products, which no implementation that gives the same gradients by convolutions can do without.
"""

from __future__ import annotations

import statistics
import time
from argparse import BooleanOptionalAction
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from _common import parser, report
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from loco_det.backbones.resnet import ResNet
from loco_det.core.device import keep_freed_memory, resolve_device
from pretrain.compiling import stage_compiler
from pretrain.defaults import get_cfg
from pretrain.memory import SavedBytes
from pretrain.train import LAYOUT, Learner, local_trainer

TEMPERATURE = 0.1
COMPILED = "_compiled"
Step = Callable[[Tensor], object]
Compiler = Callable[[nn.Module], nn.Module]


def configuration(method: str, conv_blocks: int, recompute: str) -> CfgNode:
    cfg = get_cfg()
    cfg.METHOD, cfg.DECODER.CONV_BLOCKS, cfg.SOLVER.RECOMPUTE = method, conv_blocks, recompute
    return cfg


def our_step(learner: Learner, autocast: Callable, compiler: Compiler | None) -> Step:
    return partial(local_trainer(learner, compiler=compiler).step, autocast=autocast)


def obvious_step(learner: Learner, autocast: Callable, compiler: Compiler | None) -> Step:
    modules = [compiler(stage.module) if compiler else stage.module for stage in learner.stages]

    def step(x: Tensor) -> None:
        inputs = {0: x}
        for i, unit in enumerate(learner.units):
            with autocast():
                h = inputs[unit.first]
                for k in range(unit.first, unit.last + 1):
                    h = modules[k](h)
                    inputs.setdefault(k + 1, h.detach())
                loss = learner.loss(i, h)
            loss.backward()

    return step


class Lightly(nn.Module):
    """SimCLR with lightly's head and loss."""

    def __init__(self) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.backbone = ResNet(50)
        self.head = SimCLRProjectionHead(2048, 2048, 128)
        self.criterion = NTXentLoss(TEMPERATURE)

    def loss(self, x: Tensor) -> Tensor:
        return self.criterion(*(self.head(self.backbone(view)["res5"].mean((2, 3))) for view in x.chunk(2)))


def lightly_step(model: Lightly, autocast: Callable, compiler: Compiler | None) -> Step:
    if compiler:
        model.backbone = compiler(model.backbone)

    def step(x: Tensor) -> None:
        with autocast():
            loss = model.loss(x)
        loss.backward()

    return step


def build_sides(
    args, device: torch.device, autocast: Callable, compiler: Compiler | None = None
) -> dict[str, tuple[nn.Module, Step]]:
    suffix = COMPILED if compiler else ""
    sides: dict[str, tuple[nn.Module, Step]] = {}
    for name, method, recompute, make in (
        ("simclr", "simclr", "none", our_step),
        ("loco", "loco", "none", our_step),
        ("gim", "gim", "none", our_step),
        ("loco_recompute_first", "loco", "first", our_step),
        ("obvious_loco", "loco", "none", obvious_step),
    ):
        torch.manual_seed(0)
        learner = Learner(configuration(method, args.conv_blocks, recompute)).to(device)
        sides[name + suffix] = learner, make(learner, autocast, compiler)
    try:
        model = Lightly().to(device, memory_format=LAYOUT)
        sides["lightly" + suffix] = model, lightly_step(model, autocast, compiler)
    except ImportError:
        print("lightly is not installed; its side is left out")
    return sides


def peak_bytes(model: nn.Module, step: Step, x: Tensor) -> int:
    model.zero_grad(set_to_none=True)
    if x.is_cuda:
        step(x)  # compiles, chooses its kernels
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with SavedBytes() as saved:
            step(x)
        peak = saved.peak
    model.zero_grad(set_to_none=True)
    return peak


class Multiplications(TorchDispatchMode):
    """Counts those of convolutions and matrix products. torch's FlopCounterMode fails where a graph is passed twice."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.count += count(*args, **(kwargs or {}), out_val=out) // 2
        return out


def multiplications(model: nn.Module, step: Step, x: Tensor) -> int:
    with Multiplications() as mode:
        step(x)
    model.zero_grad(set_to_none=True)
    return mode.count


def timed(model: nn.Module, step: Step, x: Tensor) -> tuple[float, float]:
    """(wall, processor) seconds of one step."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step(x)
    wait()
    result = time.perf_counter() - wall, time.process_time() - cpu
    model.zero_grad(set_to_none=True)
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--turns", type=int, default=9, help="steps of each side that count, at most")
    options.add_argument("--seconds", type=float, default=110, help="no new turn after so long, if there were three")
    options.add_argument("--size", type=int, help="pixels (128 on a CPU, 224 on a GPU)")
    options.add_argument("--images", type=int, help="images, two views each (16 on a CPU, 256 on a GPU)")
    options.add_argument("--conv-blocks", type=int, default=0, help="DECODER.CONV_BLOCKS of every side but lightly")
    options.add_argument("--compile", action=BooleanOptionalAction, help="every side once more under torch.compile")
    args = options.parse_args()
    begun = time.perf_counter()
    device = resolve_device(args.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        keep_freed_memory()  # as `loco-det pretrain` does
    size, images = args.size or (224 if on_gpu else 128), args.images or (256 if on_gpu else 16)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if on_gpu else nullcontext
    x = torch.randn(2 * images, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.to(device, memory_format=LAYOUT)
    sides = build_sides(args, device, autocast)
    work = {name: multiplications(model, step, x) for name, (model, step) in sides.items()}
    if on_gpu if args.compile is None else args.compile:
        sides |= build_sides(args, device, autocast, stage_compiler(device))
    peaks = {name: peak_bytes(model, step, x) for name, (model, step) in sides.items()}  # warms up too
    turns: list[dict[str, tuple[float, float]]] = []
    while len(turns) < min(3, args.turns) or (len(turns) < args.turns and time.perf_counter() - begun < args.seconds):
        order = list(sides.items())[:: -1 if len(turns) % 2 else 1]  # no side always runs after the same one
        turns.append({name: timed(model, step, x) for name, (model, step) in order})

    def ratio(a: str, b: str, clock: int = 0) -> float:
        return statistics.median(turn[a][clock] / turn[b][clock] for turn in turns)

    figures: dict[str, object] = {}
    for name in sides:
        base = "simclr" + COMPILED * name.endswith(COMPILED)
        figures[name] = {
            "time_ratio": ratio(name, base),
            "cpu_ratio": None if on_gpu else ratio(name, base, 1),
            "work_ratio": work[name.removesuffix(COMPILED)] / work["simclr"],
            "peak_ratio": peaks[name] / peaks[base],
        }
    seconds = {name: statistics.median(turn[name][0] for turn in turns) for name in sides}
    header = ["side", "ms", "images/s", "time / simclr", "cpu / simclr", "work / simclr", "peak MB", "peak / simclr"]
    rows = [
        [n, seconds[n] * 1e3, images / seconds[n], *list(f.values())[:3], peaks[n] / 1e6, f["peak_ratio"]]
        for n, f in figures.items()
    ]
    figures["obvious_loco_over_loco"] = ratio("obvious_loco", "loco")
    figures["simclr_over_lightly"] = ratio("simclr", "lightly") if "lightly" in sides else None
    setting = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "size": size,
        "images": images,
        "conv_blocks": args.conv_blocks,
        "turns": len(turns),
    }
    result = {
        "resnet50": figures,
        "seconds": seconds,
        "images_per_second": {name: images / value for name, value in seconds.items()},
        "peak_bytes": peaks,
        "setting": setting,
    }
    report(header, rows, result, args.json)


if __name__ == "__main__":
    main()
