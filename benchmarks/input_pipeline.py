"""How fast two views of a JPEG are made, on one core: this package, torchvision (PIL and v2) and lightly.

    python benchmarks/input_pipeline.py --json input_pipeline.json

Every side starts from the file's bytes in memory and ends with two normalised float32 views, SimCLR's augmentation at
224 pixels; `decode` is OpenCV's full-size decoding alone, the least that a pipeline which looks at every image can do.
Images: COCO's under DETECTRON2_DATASETS, else made-up ones of the same size. The sides take turns on the same few
images, and the medians over all turns are compared, so that a busy machine slows them all alike.

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
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import io as tv_io
from torchvision import transforms as v1
from torchvision.transforms import v2

from loco_det.artifact import IMAGENET_MEAN, IMAGENET_STD
from loco_det.data.twoview import TwoViewDataset, keep_freed_memory
from loco_det.data.views import normalise, view_config
from loco_det.runtime import write_json

SIZE = 224
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
        return [normalise(view, IMAGENET_MEAN, IMAGENET_STD) for view in views[:2]]

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
            cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        )
    return files, "made up"


def measure(sides: dict[str, Side], files: list[bytes], turn: int, rounds: int) -> dict[str, float]:
    """Side -> images per second, the median over rounds x turns of `turn` images."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for at in range(0, len(files) - turn + 1, turn):
            for name, side in sides.items():
                begun = time.perf_counter()
                side(files[at : at + turn])
                if round_:  # the first round warms up
                    seconds[name].append((time.perf_counter() - begun) / turn)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()  # as in a worker of ours; the other sides gain from it too

    files, kind = load(args.images)
    made = {
        "loco_det": loco_det(),
        "torchvision_pil": torchvision_pil(),
        "torchvision_v2": torchvision_v2(),
        "lightly": lightly(),
        "decode": decode(),
    }
    speed = measure({name: side for name, side in made.items() if side}, files, 8, args.rounds)

    def over(name: str) -> float | None:
        return round(speed["loco_det"] / speed[name], 3) if name in speed else None

    result = {
        "ratio": {
            "over_pil": over("torchvision_pil"),
            "over_v2": over("torchvision_v2"),
            "of_decode": over("decode"),
            "over_lightly": over("lightly"),
        },
        "images_per_second": {name: round(value, 1) for name, value in speed.items()},
        "images": {"kind": kind, "count": len(files), "mean_bytes": round(statistics.mean(map(len, files)))},
    }
    for name, value in result["images_per_second"].items():
        print(f"{name:16} {value:8.1f} images/s")
    for name, value in result["ratio"].items():
        print(f"{name:16} {'-' if value is None else f'{value:8.2f}'}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
