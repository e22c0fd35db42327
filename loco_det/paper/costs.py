"""What a plan will cost: steps counted from the configurations, hours and memory from one short measured step.

The step is measured on this machine's device on made-up images, two of 224 pixels or as many small ones, in one
process; its time grows with the batch and falls with the number of processes. Reading images is left out, and so are a
readout's own classifiers and the evaluation of a detector.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.annotations.instances import Instances
from loco_det.annotations.masks import PolygonMasks
from loco_det.core import config
from loco_det.core.device import resolve_device
from loco_det.detection import solver
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.paper.data import PRETRAINED
from loco_det.paper.figures import SAVINGS
from loco_det.paper.plan import Step
from loco_det.paper.settings import configuration
from pretrain.memory import SavedBytes, savings
from pretrain.train import LAYOUT, Learner, autocast, local_trainer

IMAGENET = {"train": 1_281_167, "test": 50_000}
CIFAR = {"train": 50_000, "test": 10_000}
MEASURED_IMAGES = 2  # of MEMORY_SIZE in a measured step; as many pixels of other sizes
MEMORY_SIZE = 224  # pixels of the images of `memory_savings`
PAPER_EPOCHS = 100  # of the paper's linear recipe, each a forward of all training images
COPIES = 3  # of every trained weight: itself, its gradient, its momentum


@dataclass(frozen=True)
class Measured:
    """One step of a network.

    Attributes:
        images: in the step.
        seconds: of forward, backward and what lies between; `forward` of the backbone's forward alone.
        saved: bytes that the step keeps for its backward.
        weights: bytes of parameters and buffers, trained ones with gradient and momentum.
    """

    images: int
    seconds: float
    forward: float
    saved: int
    weights: int


@dataclass(frozen=True)
class Cost:
    """What a command takes.

    Attributes:
        steps: optimiser steps, or batches of a readout.
        hours: of all processes together working at once.
        bytes: of the memory of one process's device.
    """

    steps: int
    hours: float
    bytes: int


Measure = Callable[[str, CfgNode], Measured]


def costs(steps: Sequence[Step], processes: int, small: bool, measure: Measure) -> dict[Step, Cost]:
    """Return the cost of every command that is not done.

    Args:
        steps: in the order of their plan, done ones included, since a readout's cost follows from its pretraining.
        processes: of each command.
        small: the images are CIFAR-10's, else ImageNet's, where they cannot be counted.
        measure: measures a step of "pretrain" or "train" with a configuration; called once for each kind of network
            that a command which is not done needs.
    """
    kinds: dict[str, Measured] = {}

    def measured(step: Step) -> Measured:
        job, cfg = step.words[0], configuration(step)
        kind = _kind(job, cfg)
        if kind not in kinds:
            kinds[kind] = measure(job, cfg)
        return kinds[kind]

    found: dict[Step, Cost] = {}
    made_by = {str(step.made): step for step in steps}
    for step in steps:
        if step.made.exists():
            continue
        if step.words[0] == "probe":
            found[step] = _of_probe(step, measured(made_by[step.words[1]]), processes, small)
            continue
        cfg = configuration(step)
        if step.words[0] == "pretrain":
            count = _steps(cfg, _listed(cfg.DATA.PATH) or _unlisted(cfg.DATA.PATH, small))
            found[step] = _scaled(measured(step), count, cfg.SOLVER.BATCH_SIZE, processes)
        else:
            found[step] = _scaled(measured(step), cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, processes)
    return found


def _kind(job: str, cfg: CfgNode) -> str:
    """Return what a step's time depends on, without names, seeds and lengths."""
    free = ["OUTPUT_DIR", "SEED"]
    free += ["DATA", "KNN", "SOLVER.EPOCHS", "SOLVER.BASE_LR"] if job == "pretrain" else ["DATASETS", "MODEL.WEIGHTS"]
    return job + config.without(cfg, free).dump()


def _listed(path: str) -> int:
    """Return the images that a list names; 0 without it."""
    file = Path(path)
    return sum(1 for line in file.read_text().splitlines() if line) if file.is_file() and file.suffix == ".txt" else 0


def _unlisted(path: str, small: bool) -> int:
    """Return the images of a list that is not written yet, or of ImageNet."""
    return PRETRAINED.get(Path(path).name, PRETRAINED["train.txt"]) if small else IMAGENET["train"]


def _steps(cfg: CfgNode, images: int) -> int:
    """Return the optimiser steps of a pretraining: whole batches of every epoch."""
    if cfg.METHOD == "random":
        return 0
    return cfg.SOLVER.MAX_STEPS or cfg.SOLVER.EPOCHS * (images // cfg.SOLVER.BATCH_SIZE)


def _scaled(of: Measured, steps: int, batch: int, processes: int) -> Cost:
    share = math.ceil(batch / processes)
    seconds = steps * of.seconds / of.images * share
    return Cost(steps, seconds / 3600, of.weights + of.saved // of.images * share)


def _of_probe(step: Step, of: Measured, processes: int, small: bool) -> Cost:
    images = CIFAR if small else IMAGENET
    passes = PAPER_EPOCHS if "paper" in step.words else 1
    count = images["train"] * passes + images["test"]
    return Cost(math.ceil(count / 256), count * of.forward / of.images / processes / 3600, of.weights)


# --- one measured step ------------------------------------------------------------------------------------------


def measure_step(job: str, cfg: CfgNode) -> Measured:
    """Measure a step of a configuration of `pretrain` or `train` on made-up images."""
    return _measure_pretraining(cfg) if job == "pretrain" else _measure_detector(cfg)


def _measure_pretraining(cfg: CfgNode) -> Measured:
    device = resolve_device(cfg.DEVICE)
    if cfg.METHOD == "random":
        cfg = config.changed(cfg, METHOD="simclr")  # the same network
    torch.manual_seed(0)
    learner = Learner(cfg).to(device)
    size = cfg.DATA.IMAGE_SIZE
    images = min(max(MEASURED_IMAGES * MEMORY_SIZE**2 // size**2, MEASURED_IMAGES), cfg.SOLVER.BATCH_SIZE)
    x = torch.randn(2 * images, 3, size, size, device=device).to(memory_format=LAYOUT)
    trainer = local_trainer(learner)
    saved, seconds = _timed(learner, device, lambda: trainer.step(x, autocast=autocast(cfg, device)))
    learner.eval()
    with torch.no_grad():
        forward = _seconds(device, lambda: learner.backbone(x[:images]))
    return Measured(images, seconds, forward, saved, _weight_bytes(learner))


def _measure_detector(cfg: CfgNode) -> Measured:
    device = resolve_device("auto")
    cfg = config.changed(cfg, **{"MODEL.DEVICE": str(device)})
    engine = TorchvisionEngine()
    torch.manual_seed(0)
    model = engine.build_model(cfg).train()
    batch = [_made_up(cfg) for _ in range(min(MEASURED_IMAGES, cfg.SOLVER.IMS_PER_BATCH))]

    def step() -> None:
        with solver.autocast(cfg, device, model):
            losses = engine.losses(model, batch)
        sum(losses.values()).backward()

    saved, seconds = _timed(model, device, step)
    return Measured(len(batch), seconds, 0.0, saved, _weight_bytes(model))


def _made_up(cfg: CfgNode) -> dict[str, object]:
    """Return an image of the largest size of training, 4 : 3, with two objects."""
    side = max(cfg.INPUT.MIN_SIZE_TRAIN)
    height, width = side, min(side * 4 // 3, cfg.INPUT.MAX_SIZE_TRAIN)
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.4, 0.9, 0.9]]) * torch.tensor([width, height, width, height])
    polygons = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)] for x0, y0, x1, y1 in boxes.tolist()]
    objects = Instances((height, width), boxes, torch.zeros(2, dtype=torch.int64), masks=PolygonMasks(polygons))
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "instances": objects}


def _timed(model: nn.Module, device: torch.device, step: Callable[[], object]) -> tuple[int, float]:
    """Return the bytes that a first step keeps for its backward, and the seconds of a second one."""
    with SavedBytes([*model.parameters(), *model.buffers()]) as saved:
        step()
    model.zero_grad(set_to_none=True)
    seconds = _seconds(device, step)
    return saved.peak, seconds


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def _weight_bytes(model: nn.Module) -> int:
    def bytes_of(tensors: Sequence[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trained = [p for p in model.parameters() if p.requires_grad]
    still = [p for p in model.parameters() if not p.requires_grad]
    return COPIES * bytes_of(trained) + bytes_of([*still, *model.buffers()])


def memory_savings() -> dict[str, dict[str, dict[str, float]]]:
    """Return what each method saves of the bytes that a step keeps, on the paper's two networks at full size.

    Returns:
        {network: {method: `pretrain.memory.savings`}}
    """
    shape = (2 * MEASURED_IMAGES, 3, MEMORY_SIZE, MEMORY_SIZE)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=LAYOUT)
    return {network: savings(network, x) for network in SAVINGS}
