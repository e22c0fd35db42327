"""How fast two views of a JPEG are made, on one core: this package, torchvision (PIL and v2) and lightly.

    python benchmarks/input_pipeline.py --json input_pipeline.json
    python benchmarks/input_pipeline.py --size 32 --folder cifar10/train --json input_pipeline_32.json

Every side starts from the file's bytes in memory and ends with two normalised float32 views, SimCLR's augmentation at
224 pixels; `decode` is OpenCV's full-size decoding alone, the least that a pipeline which looks at every image can do.
Images: COCO's under DETECTRON2_DATASETS, else made-up ones of the same size. Each side runs in a process of its own,
set up as its data workers are, and they take turns on the same images, 32 at a time. Counted is CPU time, of one
thread, and a ratio is the median over all turns of the ratio within a turn, so that a busy machine disturbs little.

With `--size 32` the question is another: what do the views of small images cost beside the network? Per batch of 256
JPEGs (below --folder, else made up): `loco_det`, image by image as AUGMENT.DEVICE workers has it; `batched`, decoded
image by image and augmented at once as AUGMENT.DEVICE cpu has it; `decode`, only what the workers do in that case; and
`step`, one training step of a ResNet-18 (BACKBONE.STEM cifar, BACKBONE.WIDTH 16, METHOD simclr, the decoder's
HIDDEN_DIM 256, SOLVER.AMP bf16) on such views, forward and backward.

JSON of --size 32: {"milliseconds": {side: for a batch}, "ratio": {"batched_over_loco_det", "step_over_loco_det"},
"images": {...}}.

JSON: {"ratio": {"over_pil", "over_v2", "of_decode", "over_lightly"}, "images_per_second": {side: images},
"images": {...}}. over_x: this package's images per second over x's; of_decode: over those of decoding alone; null
where lightly is not installed.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import torch
from _common import parser, report
from PIL import Image
from torchvision import io as tv_io
from torchvision import transforms as v1
from torchvision.transforms import v2

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.core.device import keep_freed_memory
from loco_det.images.batched_views import make_views
from loco_det.images.two_views import DecodedDataset, TwoViewDataset, prepare_worker
from loco_det.images.views import normalise, view_config
from pretrain.defaults import get_cfg
from pretrain.train import LAYOUT, Learner, local_trainer

SIZE = 224
TURN = 32  # images; a data worker does nothing else, so its code and memory are in the caches but at a turn's start
MEAN, STD = [m / 255 for m in IMAGENET_MEAN], [s / 255 for s in IMAGENET_STD]
COLOUR = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}

Side = Callable[[list[bytes]], object]


class InMemory:
    """A source whose files were read before the clock starts."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        return self.files[index]


def loco_det() -> Side:
    epoch = iter(range(10**9))
    config = view_config(SIZE, {"PRESET": "simclr"})

    def run(files: list[bytes]) -> object:
        dataset = TwoViewDataset(InMemory(files), config, seed=0)
        views, bad = dataset[next(epoch), range(len(files))]
        assert not bad
        return normalise(views.views.flatten(0, 1), IMAGENET_MEAN, IMAGENET_STD)

    return run


def torchvision_pil() -> Side:
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
            v1.RandomHorizontalFlip(),
            v1.RandomApply([v1.ColorJitter(**COLOUR)], p=0.8),
            v1.RandomGrayscale(p=0.2),
            v1.RandomApply([v1.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )

    def run(files: list[bytes]) -> object:
        images = (Image.open(io.BytesIO(data)).convert("RGB") for data in files)
        return [(transform(image), transform(image)) for image in images]

    return run


def torchvision_v2() -> Side:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(0.08, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(**COLOUR)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    def run(files: list[bytes]) -> object:
        buffers = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files)
        images = (tv_io.decode_image(buffer, mode=tv_io.ImageReadMode.RGB) for buffer in buffers)
        return [(transform(image), transform(image)) for image in images]

    return run


def lightly() -> Side | None:
    try:
        from lightly.transforms import SimCLRTransform
    except ImportError:
        return None
    transform = SimCLRTransform(
        input_size=SIZE,
        cj_strength=1.0,
        cj_bright=0.8,
        cj_contrast=0.8,
        cj_sat=0.8,
        cj_hue=0.2,
        min_scale=0.08,
        gaussian_blur=0.5,
        sigmas=(0.1, 2.0),
    )

    def run(files: list[bytes]) -> object:
        return [transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]

    return run


def decode() -> Side:
    return lambda files: [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) for data in files]


# --- small images -----------------------------------------------------------------------------------------------


def loco_det_32() -> Side:
    return two_views_of(TwoViewDataset)


def decode_32() -> Side:
    return two_views_of(DecodedDataset)


def batched_32() -> Side:
    decoded = two_views_of(DecodedDataset)

    def run(files: list[bytes]) -> object:
        return make_views(decoded(files), 32)

    return run


def two_views_of(kind: type) -> Side:
    """What a data worker gives, epoch after epoch."""
    epoch = iter(range(10**9))
    config = view_config(32, {"PRESET": "simclr"})

    def run(files: list[bytes]) -> object:
        images, bad = kind(InMemory(files), config, seed=0)[next(epoch), range(len(files))]
        assert not bad
        return images

    return run


def step_32() -> Side:
    keep_freed_memory()
    cfg = get_cfg()
    cfg.METHOD, cfg.DECODER.HIDDEN_DIM, cfg.DATA.IMAGE_SIZE = "simclr", 256, 32
    cfg.BACKBONE.NAME, cfg.BACKBONE.STEM, cfg.BACKBONE.WIDTH = "resnet18", "cifar", 16
    learner = Learner(cfg)
    trainer = local_trainer(learner)
    views: dict[bytes, torch.Tensor] = {}  # made in the round that warms up

    def run(files: list[bytes]) -> object:
        if files[0] not in views:
            both = loco_det_32()(files).views
            views[files[0]] = normalise(both.flatten(0, 1), IMAGENET_MEAN, IMAGENET_STD, LAYOUT)
        learner.zero_grad(set_to_none=True)
        return trainer.step(views[files[0]], autocast=lambda: torch.autocast("cpu", torch.bfloat16))

    return run


def load_small(folder: Path | None, count: int) -> tuple[list[bytes], str]:
    """JPEGs and where they come from."""
    if folder is not None:
        paths = sorted(folder.rglob("*.jpg"))
        chosen = np.random.default_rng(0).permutation(len(paths))[:count]
        return [paths[k].read_bytes() for k in chosen], "/".join(folder.resolve().parts[-2:])
    rng = np.random.default_rng(0)
    images = (cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (32, 32)) for _ in range(count))
    return [cv2.imencode(".jpg", image)[1].tobytes() for image in images], "made up"


# --- measuring --------------------------------------------------------------------------------------------------


def load(count: int) -> tuple[list[bytes], str]:
    """JPEGs and where they come from."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "coco"
    paths = sorted(path for split in ("train2017", "val2017") for path in (root / split).glob("*.jpg"))[:count]
    if paths:
        return [path.read_bytes() for path in paths], "COCO"
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC).astype(float)
        image += rng.normal(0, 8, image.shape)  # about as many bytes as a photograph
        files.append(
            cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        )
    return files, "made up"


def serve(name: str, files: list[bytes], orders: Connection) -> None:
    """One side in a process of its own: times the files[first:last] that it is asked for."""
    if name not in OTHERS:  # decoding gains from our workers' memory settings too; take it at its best
        prepare_worker()
    else:  # what a DataLoader does to its workers
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    side = (SIDES | SMALL)[name]()
    orders.send(side is not None)
    while (turn := orders.recv()) is not None:
        begun = time.process_time()
        side(files[turn[0] : turn[1]])
        orders.send(time.process_time() - begun)


def measure(sides: Iterable[str], files: list[bytes], turn: int, rounds: int) -> dict[str, list[float]]:
    """Side -> CPU seconds per image, one figure for every turn of `turn` images; turns stand in the same order."""
    context = get_context("spawn")
    pipes = {}
    for name in sides:
        pipes[name], end = context.Pipe()
        context.Process(target=serve, args=(name, files, end), daemon=True).start()
    pipes = {name: pipe for name, pipe in pipes.items() if pipe.recv()}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for round_ in range(rounds + 1):
        for at in range(0, len(files) - turn + 1, turn):
            for name, pipe in pipes.items():
                pipe.send((at, at + turn))
                taken = pipe.recv()
                if round_:  # the first round warms up
                    seconds[name].append(taken / turn)
    for pipe in pipes.values():
        pipe.send(None)
    return seconds


SIDES = {
    "loco_det": loco_det,
    "torchvision_pil": torchvision_pil,
    "torchvision_v2": torchvision_v2,
    "lightly": lightly,
    "decode": decode,
}
OTHERS = ("torchvision_pil", "torchvision_v2", "lightly")
SMALL = {"loco_det_32": loco_det_32, "batched_32": batched_32, "decode_32": decode_32, "step_32": step_32}
SMALL_BATCH = 256


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=160)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--size", type=int, choices=(SIZE, 32), default=SIZE)
    options.add_argument("--folder", type=Path, help="of the JPEGs of --size 32")
    args = options.parse_args()
    if args.size == 32:
        small(args)
    else:
        large(args)


def small(args: argparse.Namespace) -> None:
    files, kind = load_small(args.folder, 4 * SMALL_BATCH)
    seconds = measure(SMALL, files, SMALL_BATCH, args.rounds)
    times = {name.removesuffix("_32"): [SMALL_BATCH * x for x in seconds[name]] for name in SMALL}

    def over(name: str) -> float:
        return round(statistics.median(x / ours for x, ours in zip(times[name], times["loco_det"])), 2)

    result = {
        "milliseconds": {name: round(1000 * statistics.median(some), 1) for name, some in times.items()},
        "ratio": {"batched_over_loco_det": over("batched"), "step_over_loco_det": over("step")},
        "images": {"kind": kind, "count": len(files), "mean_bytes": round(statistics.mean(map(len, files)))},
    }
    rows = [[name, value, over(name)] for name, value in result["milliseconds"].items()]
    report(["side", "ms a batch of 256", "over loco_det"], rows, result, args.json)


def large(args: argparse.Namespace) -> None:
    files, kind = load(args.images)
    seconds = measure(SIDES, files, TURN, args.rounds)

    def over(name: str) -> float | None:
        if name not in seconds:
            return None
        return round(statistics.median(x / ours for x, ours in zip(seconds[name], seconds["loco_det"])), 3)

    result = {
        "ratio": {
            "over_pil": over("torchvision_pil"),
            "over_v2": over("torchvision_v2"),
            "of_decode": over("decode"),
            "over_lightly": over("lightly"),
        },
        "images_per_second": {name: round(1 / statistics.median(times), 1) for name, times in seconds.items()},
        "images": {"kind": kind, "count": len(files), "mean_bytes": round(statistics.mean(map(len, files)))},
    }
    rows = [[name, value, over(name) or ""] for name, value in result["images_per_second"].items()]
    report(["side", "images/s", "loco_det over it"], rows, result, args.json)


if __name__ == "__main__":
    main()
