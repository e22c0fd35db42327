"""What `loco-det probe --protocol segmentation` costs beside the backbone's forward: ridge and nearest neighbours.

    python benchmarks/dense_probe.py --json dense_probe.json
    python benchmarks/dense_probe.py --device cuda --backbone random:timm:vit_base_patch16_224 --batch 64

Made-up JPEGs of 500 x 375 pixels with masks of 21 classes, as many training as test images (--images). Sides:
`forward`, the backbone alone on images in memory; `features`, images and masks read from their files, and forwarded;
`ridge` and `knn`, the whole probe from files to counts of pixels. They take turns, in one order and in the other; a
ratio is the median over turns of the ratio within a turn, so a busy machine disturbs little. No data workers, so
reading is not hidden. On a CPU, seconds are the process's processor time.

Figures are for --total training and as many test images: what is done for each image is scaled from --images, what is
done once (ridge's decompositions) is not, and the memory of `knn` is filled up to the patches of --total images.

JSON: {"ratio": {"ridge": {"over_forward", "over_features"}, "knn": {...}}, "seconds": {side: median for --total},
"once": {side: median seconds of what is done once}, "setting": {...}}.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import parser, report
from PIL import Image
from torch.nn.functional import normalize

from loco_det.core.device import keep_freed_memory, resolve_device
from loco_det.evaluation.probes.backbones import load_backbone_for_probe
from loco_det.evaluation.probes.dense import DenseExtractor, Fitter, as_patches, count_pixels
from loco_det.evaluation.probes.dense_knn import NEIGHBOURS, PATCHES, TEMPERATURE, DenseKnn
from loco_det.evaluation.probes.dense_ridge import DenseRidge
from loco_det.evaluation.probes.pixel_images import PixelData, open_pixel_data, patch_counts
from loco_det.evaluation.probes.segmentation import image_size

HEIGHT, WIDTH, CLASSES = 375, 500, 21
Side = Callable[[], tuple[float, float]]  # seconds for all images, and of what is done once


def write_images(root: Path, count: int) -> str:
    """Smooth noise in colours, and masks of large blobs; returns the data set's name."""
    rng = np.random.default_rng(0)
    for folder in ("masks", "images"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        grain = np.asarray(coarse, np.int16) + rng.normal(0, 12, (HEIGHT, WIDTH, 3)).astype(np.int16)
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(root / f"images/{number}.jpg", quality=90)
        blobs = Image.fromarray(rng.integers(0, CLASSES, (4, 5), np.uint8)).resize((WIDTH, HEIGHT), Image.NEAREST)
        blobs.save(root / f"masks/{number}.png")
    (root / "classes.txt").write_text("\n".join(f"class {k}" for k in range(CLASSES)))
    return f"{root}/masks@{root}/images"


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def forward(extractor: DenseExtractor, batches: list[torch.Tensor]) -> tuple[float, float]:
    begun = clock(extractor.device)
    with torch.no_grad():
        for x in batches:
            extractor.backbone.model(x)
    return clock(extractor.device) - begun, 0.0


def features(extractor: DenseExtractor, data: PixelData, stage: str) -> tuple[float, float]:
    begun = clock(extractor.device)
    for images in (data.train, data.test):
        for batch in extractor.batches(images, np.shape, "features"):
            extractor.maps(batch.images, [stage])
    return clock(extractor.device) - begun, 0.0


def probe(
    extractor: DenseExtractor, data: PixelData, stage: str, grid: int, make: Callable[[], Fitter], total: int
) -> tuple[float, float]:
    fitter, begun = make(), clock(extractor.device)
    for batch in extractor.batches(data.train, partial(patch_counts, grid=grid, classes=CLASSES), "training images"):
        maps = extractor.maps(batch.images, [stage])[stage]
        fitter.add(as_patches(maps), torch.stack(batch.targets), batch.places)
    fitted = clock(extractor.device)
    if isinstance(fitter, DenseKnn):
        fill(fitter, PATCHES * total)
    filled = clock(extractor.device)
    head, _ = fitter.finish()
    done = clock(extractor.device)
    count_pixels(extractor, {stage: head}, data.test, CLASSES)
    return fitted - begun + clock(extractor.device) - done, done - filled


def fill(fitter: DenseKnn, patches: int) -> None:
    """Add noise to a memory until it has as many patches."""
    like = fitter.features[0]
    missing = patches - sum(map(len, fitter.features))
    noise = torch.randn(missing, like.shape[1], generator=torch.Generator().manual_seed(0))
    fitter.features.append(normalize(noise, dim=1).to(like.device))
    fitter.shares.append(torch.eye(CLASSES)[torch.arange(missing) % CLASSES].to(like.device))


def build_sides(extractor: DenseExtractor, data: PixelData, stage: str, total: int) -> dict[str, Side]:
    grid, width = extractor.grids([stage])[stage], extractor.backbone.channels[stage]
    inputs = [
        extractor.backbone.input(batch.images, extractor.device)
        for images in (data.train, data.test)
        for batch in extractor.batches(images, np.shape, "images")
    ]
    held = np.arange(len(data.train)) % 10 == 0
    makers = {
        "ridge": lambda: DenseRidge(width, CLASSES, held, extractor.device),
        "knn": lambda: DenseKnn(NEIGHBOURS, TEMPERATURE, PATCHES, seed=0),
    }
    probes = {name: partial(probe, extractor, data, stage, grid, make, total) for name, make in makers.items()}
    return {
        "forward": partial(forward, extractor, inputs),
        "features": partial(features, extractor, data, stage),
        **probes,
    }


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--backbone", default="random:timm:vit_small_patch16_224")
    p.add_argument("--device", default="auto")
    p.add_argument("--images", type=int, default=32)
    p.add_argument("--total", type=int, default=1000)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--turns", type=int, default=5)
    args = p.parse_args()
    keep_freed_memory()
    device = resolve_device(args.device)
    backbone = load_backbone_for_probe(args.backbone)
    stage = list(backbone.channels)[-1]
    extractor = DenseExtractor(backbone, image_size(backbone, [stage]), device, batch=args.batch, workers=0)
    with tempfile.TemporaryDirectory() as folder:
        names = [write_images(Path(folder, half), args.images) for half in ("train", "val")]
        sides = build_sides(extractor, open_pixel_data(*names), stage, args.total)
        for side in sides.values():  # warms up
            side()
        turns = []
        for turn in range(args.turns):
            order = list(sides.items())[:: -1 if turn % 2 else 1]
            turns.append({name: side() for name, side in order})
    scale = args.total / args.images
    whole = [{name: scale * each + once for name, (each, once) in turn.items()} for turn in turns]

    def ratio(a: str, b: str) -> float:
        return statistics.median(turn[a] / turn[b] for turn in whole)

    seconds = {name: statistics.median(turn[name] for turn in whole) for name in sides}
    ratios = {
        name: {f"over_{base}": ratio(name, base) for base in ("forward", "features")} for name in ("ridge", "knn")
    }
    setting = {
        "backbone": args.backbone,
        "stage": stage,
        "image_size": extractor.size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "classes": CLASSES,
        "patches_an_image": PATCHES,
        **{name: getattr(args, name) for name in ("images", "total", "batch", "turns")},
    }
    figures = {
        "ratio": ratios,
        "seconds": seconds,
        "once": {name: statistics.median(turn[name][1] for turn in turns) for name in sides},
        "setting": setting,
    }
    header = ["side", f"s for {args.total} + {args.total} images", "over forward", "over features"]
    rows = [[name, seconds[name], ratio(name, "forward"), ratio(name, "features")] for name in sides]
    report(header, rows, figures, args.json)


if __name__ == "__main__":
    main()
