"""Time and memory of Mask R-CNN R50-FPN, training and inference, against Detectron2 and torchvision's own detector.

    python benchmarks/detection_step.py --json detection_step.json                  # about two minutes on 2 cores
    python benchmarks/detection_step.py --device cuda --json benchmarks/results/CARD.json

Every side is a process of its own, and the sides take turns, one step each; a ratio is the median over turns of the
ratio within a turn, so a busy machine disturbs little. A training step is forward, backward and SGD on two images, an
inference step two images one after the other, as an evaluation does it. All sides get the same images (COCO's
train2017 where DETECTRON2_DATASETS has it, else made-up ones; short side 320 on a CPU, 800 on a GPU), the same weights
(random from a seed, statistics of BatchNorm from a batch, class scores scaled until every image has its
DETECTIONS_PER_IMAGE), the same anchors, numbers of proposals and samples, classes and thresholds.

Sides: frozen (configs/coco_loco_r50.yaml), finetune (configs/coco_loco_r50_finetune.yaml: every layer and
BatchNorm trained) and infer (the latter's model) on this package's engine, in its fast form on a CPU, and on
Detectron2 where it is installed; the latter two on torchvision.models.detection's MaskRCNN too, built with
BatchNorm in backbone and pyramid like the fine-tuned model.

`peak` is, on a CPU, how far the resident memory of the side's process rose above what it was after the imports:
weights, gradients, momentum and activations (Linux's VmHWM); on a GPU the allocator's maximum.

JSON: the ratios train_* (finetune), infer_* and peak_over_detectron2 (the larger of train and infer) of this package
over the other, null where Detectron2 is not installed; frozen_over_finetune, both of this package;
frozen_over_detectron2, both frozen; and "seconds", "peak_bytes", "setting".
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from _common import parser, report
from fvcore.common.config import CfgNode
from torch import nn

from loco_det.annotations.coco import load_coco
from loco_det.annotations.mapper import DetectionMapper, sample_rng
from loco_det.annotations.registry import find_dataset
from loco_det.annotations.synthetic import make_shapes_dataset
from loco_det.core.config import changed, load_config
from loco_det.core.device import keep_freed_memory, resolve_device
from loco_det.core.errors import UserError
from loco_det.detection import engine_d2, solver
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.engine_d2 import Detectron2Engine
from loco_det.detection.engine_torchvision import TorchvisionEngine
from loco_det.detection.keys import get_cfg

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"frozen": "coco_loco_r50.yaml", "finetune": "coco_loco_r50_finetune.yaml"}
IMAGES = 2  # of a step
DETECTIONS = 50  # of an image
Step = Callable[[], None]


def configuration(file: str, device: str, size: int, **more: Any) -> CfgNode:
    """A config on one device, its images of one size, its learning rate next to none, and `more` (KEY__PART=value)."""
    changes = {
        **{key.replace("__", "."): value for key, value in more.items()},
        "MODEL.DEVICE": device,
        "MODEL.WEIGHTS": "",
        "TEST.DETECTIONS_PER_IMAGE": DETECTIONS,
        "INPUT.MIN_SIZE_TRAIN": (size,),
        "INPUT.MAX_SIZE_TRAIN": size * 5 // 3,
        "INPUT.RANDOM_FLIP": "none",
        "SOLVER.BASE_LR": 1e-9,
        "SOLVER.WARMUP_ITERS": 0,
    }
    overrides = [str(part) for pair in changes.items() for part in pair]
    return load_config(get_cfg(), ROOT / "configs" / file, overrides)[0]


def sample_images(cfg: CfgNode, size: int) -> tuple[list[dict[str, Any]], str]:
    """IMAGES annotated images as the mapper hands them over, and where they are from."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            dataset, source = load_coco(find_dataset("coco_2017_train")), "COCO train2017"
        except UserError:
            paths = make_shapes_dataset(folder, train=IMAGES, val=1, size=size)["shapes_train"]
            dataset, source = load_coco(paths), "made up"
            cfg = changed(cfg, **{"INPUT.MASK_FORMAT": "bitmask"})
        mapper = DetectionMapper(cfg, train=True)
        samples: list[dict[str, Any]] = []
        for i in range(len(dataset)):  # landscape, with several objects, so that no side pads more than another
            sample = mapper(dataset[i], sample_rng(0, i))
            height, width = sample["image"].shape[1:]
            if source == "made up" or (len(sample["instances"]) >= 4 and height < width):
                samples.append({**sample, "height": height, "width": width})
            if len(samples) == IMAGES:
                break
    return samples, source


def make_weights(cfgs: dict[str, CfgNode], samples: list[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """Files with a state_dict for each config; the backbones are the same."""
    models = {}
    for kind, cfg in cfgs.items():
        torch.manual_seed(0)
        models[kind] = TorchvisionEngine().build_model(cfg)
    model = models["finetune"]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # the statistics of this batch
        model.train()(samples)
        model.eval()
        predictor = model.roi_heads.box_predictor.cls_score
        while min(len(found) for found in model(samples)) < DETECTIONS:
            predictor.weight *= 1.3
        predictor.weight *= 1.7  # so that rounding and other padding cannot leave one short
    state = model.state_dict()
    frozen = models["frozen"].state_dict()
    for name, tensor in frozen.items():
        if name in state:
            tensor.copy_(state[name])
    paths = {}
    for kind, tensors in (("finetune", state), ("frozen", frozen)):
        paths[kind] = folder / f"{kind}.pt"
        torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, paths[kind])
    return paths


# --- the sides --------------------------------------------------------------------------------------------------


def our_side(
    job: str, cfg: CfgNode, state: dict[str, torch.Tensor], samples: list[dict[str, Any]], keep: bool = True
) -> Step:
    model = speed_up(TorchvisionEngine().build_model(cfg))
    model.load_state_dict(state)
    if keep and job != "infer" and cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()  # as `loco-det train` does
    return engine_step(TorchvisionEngine(), job, cfg, model, samples, solver.optimizer_step)


def detectron2_side(job: str, cfg: CfgNode, state: dict[str, torch.Tensor], samples: list[dict[str, Any]]) -> Step:
    from detectron2.structures import Boxes, Instances, PolygonMasks

    model = Detectron2Engine().build_model(cfg)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("num_batches_tracked" in name or "pixel_" in name for name in missing)
    converted = []
    for sample in samples:
        ours = sample["instances"]
        theirs = Instances(ours.image_size, gt_boxes=Boxes(ours.boxes), gt_classes=ours.classes)
        if hasattr(ours.masks, "polygons"):
            theirs.gt_masks = PolygonMasks(ours.masks.polygons)
        else:
            from detectron2.structures import BitMasks

            theirs.gt_masks = BitMasks(ours.masks.tensor)
        converted.append({**sample, "instances": theirs})
    return engine_step(Detectron2Engine(), job, cfg, model, converted, usual_step)


def usual_step(
    cfg: CfgNode, loss: torch.Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """As Detectron2's SimpleTrainer and torchvision's reference order it: old gradients stay during the forward."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def engine_step(
    engine: Any, job: str, cfg: CfgNode, model: nn.Module, samples: list[dict[str, Any]], step: Callable[..., None]
) -> Step:
    if job == "infer":
        model.eval()
        single = [[{k: v for k, v in sample.items() if k != "instances"}] for sample in samples]

        @torch.inference_mode()
        def infer() -> None:
            for batch in single:
                (found,) = engine.predict(model, batch)
                assert len(found) == DETECTIONS

        return infer
    model.train()
    optimizer = solver.build_optimizer(cfg, model)
    scaler = solver.grad_scaler(cfg, torch.device(cfg.MODEL.DEVICE))

    def train() -> None:
        losses = engine.losses(model, samples)
        step(cfg, sum(losses.values()), optimizer, scaler)

    return train


def torchvision_side(job: str, cfg: CfgNode, state: dict[str, torch.Tensor], samples: list[dict[str, Any]]) -> Step:
    from torchvision.models import resnet50
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    levels = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    body = resnet50(norm_layer=nn.BatchNorm2d)
    model = MaskRCNN(
        BackboneWithFPN(body, levels, [256, 512, 1024, 2048], 256, norm_layer=nn.BatchNorm2d),
        **torchvision_settings(cfg),
    ).to(cfg.MODEL.DEVICE)
    model.load_state_dict(torchvision_names(state, model.state_dict(), classes))
    return torchvision_step(job, cfg, model, samples)


def torchvision_settings(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of MaskRCNN that a configuration states, for images that come normalised and of their final size."""
    size, rpn = cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.MODEL.RPN
    return {
        "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1,
        "min_size": size,
        "max_size": size * 5 // 3,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "_skip_resize": True,
        "rpn_pre_nms_top_n_train": rpn.PRE_NMS_TOPK_TRAIN,
        "rpn_pre_nms_top_n_test": rpn.PRE_NMS_TOPK_TEST,
        "rpn_post_nms_top_n_train": rpn.POST_NMS_TOPK_TRAIN,
        "rpn_post_nms_top_n_test": rpn.POST_NMS_TOPK_TEST,
        "box_detections_per_img": DETECTIONS,
    }


def torchvision_step(job: str, cfg: CfgNode, model: nn.Module, samples: list[dict[str, Any]]) -> Step:
    """A step of one of torchvision's detectors, which gets the images normalised and of their final size."""
    device = cfg.MODEL.DEVICE
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    images = [sample["image"] for sample in samples]
    targets = []
    for sample in samples:
        found = sample["instances"]
        whole = torch.tensor([[0.0, 0.0, found.image_size[1], found.image_size[0]]])
        masks = found.masks.tensor if hasattr(found.masks, "tensor") else bitmaps(found.masks, found.image_size, whole)
        targets.append(
            {
                "boxes": found.boxes.to(device),
                "labels": (found.classes + 1).to(device),
                "masks": masks.to(device, torch.uint8),
            }
        )

    def normalised(image: torch.Tensor) -> torch.Tensor:
        return (image.to(device) - mean.to(device)) / std.to(device)

    if job == "infer":
        model.eval()

        @torch.inference_mode()
        def infer() -> None:
            for image in images:
                (found,) = model([normalised(image)])
                assert len(found["boxes"]) == DETECTIONS
                assert (found["masks"] >= 0.5).any()  # the thresholded mask is what others give

        return infer
    model.train()
    optimizer = solver.build_optimizer(cfg, model)
    scaler = solver.grad_scaler(cfg, torch.device(device))

    def train() -> None:
        losses = model([normalised(image) for image in images], targets)
        usual_step(cfg, sum(losses.values()), optimizer, scaler)

    return train


def bitmaps(masks: Any, image_size: tuple[int, int], whole: torch.Tensor) -> torch.Tensor:
    """(N, H, W) of polygons."""
    from loco_det.annotations.masks import rasterize

    return torch.stack([torch.from_numpy(rasterize(polygons, *image_size)) for polygons in masks.polygons])


def torchvision_names(
    state: dict[str, torch.Tensor], target: dict[str, torch.Tensor], classes: int
) -> dict[str, torch.Tensor]:
    """A state_dict under the names of torchvision's MaskRCNN, whose background is class 0 and not the last."""
    from loco_det.backbones.names import to_torchvision

    result = copy.copy(target)
    renamed = predictors(state, classes)
    for name, tensor in state.items():
        if name.startswith("backbone.bottom_up."):
            renamed["backbone.body." + to_torchvision(name.removeprefix("backbone.bottom_up."))] = tensor
        elif name.startswith("backbone.fpn_"):
            place, leaf = name.removeprefix("backbone.fpn_").split(".", 1)
            blocks = "inner_blocks" if place.startswith("lateral") else "layer_blocks"
            layer = "1." + leaf.removeprefix("norm.") if leaf.startswith("norm.") else f"0.{leaf}"
            renamed[f"backbone.fpn.{blocks}.{int(place[-1]) - 2}.{layer}"] = tensor
    plain = {
        "proposal_generator.rpn_head.conv": "rpn.head.conv.0.0",
        "proposal_generator.rpn_head.objectness_logits": "rpn.head.cls_logits",
        "proposal_generator.rpn_head.anchor_deltas": "rpn.head.bbox_pred",
        "roi_heads.box_head.fc1": "roi_heads.box_head.fc6",
        "roi_heads.box_head.fc2": "roi_heads.box_head.fc7",
        "roi_heads.mask_head.deconv": "roi_heads.mask_predictor.conv5_mask",
        **{f"roi_heads.mask_head.mask_fcn{i}": f"roi_heads.mask_head.{i - 1}.0" for i in range(1, 5)},
    }
    for leaf in ("weight", "bias"):
        renamed.update({f"{new}.{leaf}": state[f"{old}.{leaf}"] for old, new in plain.items()})
    assert set(renamed) == set(target), set(renamed) ^ set(target)
    result.update(renamed)
    return result


def predictors(state: dict[str, torch.Tensor], classes: int) -> dict[str, torch.Tensor]:
    """The layers by class under torchvision's names, with the background first."""
    order, renamed = torch.tensor([classes, *range(classes)]), {}
    for leaf in ("weight", "bias"):
        renamed[f"roi_heads.box_predictor.cls_score.{leaf}"] = state[f"roi_heads.box_predictor.cls_score.{leaf}"][order]
        deltas = state[f"roi_heads.box_predictor.bbox_pred.{leaf}"]
        by_class = deltas.view(classes, 4, *deltas.shape[1:])
        with_background = torch.cat([torch.zeros_like(by_class[:1]), by_class]).flatten(0, 1)
        renamed[f"roi_heads.box_predictor.bbox_pred.{leaf}"] = with_background
        masks = state[f"roi_heads.mask_head.predictor.{leaf}"]
        renamed[f"roi_heads.mask_predictor.mask_fcn_logits.{leaf}"] = torch.cat([torch.zeros_like(masks[:1]), masks])
    return renamed


MAKE = {"ours": our_side, "detectron2": detectron2_side, "torchvision": torchvision_side}


# --- processes --------------------------------------------------------------------------------------------------


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def work(
    name: str, cfg: CfgNode, weights: Path, samples: list[dict[str, Any]], pipe: Connection, clock: str = "wall"
) -> None:
    """One side in its own process: a step and its seconds by `clock` for every message, at the end the peak."""
    library, job = name.split(":")
    device = torch.device(cfg.MODEL.DEVICE)
    start_memory(device)
    step = MAKE[library](job, cfg, torch.load(weights, map_location=device), samples)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.manual_seed(0)
    while pipe.recv():
        wait()
        began = CLOCKS[clock]()
        step()
        wait()
        pipe.send(CLOCKS[clock]() - began)
    pipe.send(peak_memory(device))


_resident = 0


def start_memory(device: torch.device) -> None:
    global _resident
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    _resident = status("VmRSS")


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM") - _resident


def status(field: str) -> int:
    """Bytes that Linux says of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def take_turns(
    sides: list[str],
    cfgs: dict[str, CfgNode],
    weights: dict[str, Path],
    samples: list[dict[str, Any]],
    turns: int,
    clock: str = "wall",
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Seconds of every side in every turn, after one that does not count, and every side's peak in bytes."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in sides:
        kind = "frozen" if name.endswith("frozen") else "finetune"
        pipes[name], theirs = context.Pipe()
        given = (name, cfgs[kind], weights[kind], samples, theirs, clock)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)

    def ask(name: str, go: bool) -> Any:
        pipes[name].send(go)
        return pipes[name].recv()

    seconds = [{name: ask(name, True) for name in sides} for _ in range(turns + 1)][1:]
    peaks = {name: ask(name, False) for name in sides}
    for process in processes:
        process.join()
    return seconds, peaks


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--turns", type=int, default=4, help="steps of each side that count")
    options.add_argument("--size", type=int, help="short side in pixels (320 on a CPU, 800 on a GPU)")
    options.add_argument("--sides", help="only those with this in their name, e.g. ours")
    args = options.parse_args()
    device = resolve_device(args.device)
    size = args.size or (800 if device.type == "cuda" else 320)
    cfgs = {kind: configuration(file, str(device), size) for kind, file in CONFIGS.items()}
    samples, source = sample_images(cfgs["finetune"], size)
    sides = [f"ours:{job}" for job in ("frozen", "finetune", "infer")]
    if engine_d2.installed():
        sides += [f"detectron2:{job}" for job in ("frozen", "finetune", "infer")]
    else:
        print("Detectron2 is not installed; its sides are left out")
    sides += ["torchvision:finetune", "torchvision:infer"]
    sides = [name for name in sides if not args.sides or args.sides in name]
    with tempfile.TemporaryDirectory() as folder:
        weights = make_weights(cfgs, samples, Path(folder))
        turns, peaks = take_turns(sides, cfgs, weights, samples, args.turns)

    def ratio(a: str, b: str) -> float | None:
        return statistics.median(turn[a] / turn[b] for turn in turns) if a in turns[0] and b in turns[0] else None

    ours, d2, tv = "ours", "detectron2", "torchvision"
    memory = {job: peaks[f"{ours}:{job}"] / peaks[f"{d2}:{job}"] for job in ("finetune", "infer")
              if f"{d2}:{job}" in peaks and f"{ours}:{job}" in peaks}  # fmt: skip
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in sides}
    setting = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "images": source,
        "sizes": [list(sample["image"].shape[1:]) for sample in samples],
        "turns": args.turns,
    }
    figures = {
        "frozen_over_finetune": ratio(f"{ours}:frozen", f"{ours}:finetune"),
        "frozen_over_detectron2": ratio(f"{ours}:frozen", f"{d2}:frozen"),
        "train_over_detectron2": ratio(f"{ours}:finetune", f"{d2}:finetune"),
        "infer_over_detectron2": ratio(f"{ours}:infer", f"{d2}:infer"),
        "train_over_torchvision": ratio(f"{ours}:finetune", f"{tv}:finetune"),
        "infer_over_torchvision": ratio(f"{ours}:infer", f"{tv}:infer"),
        "peak_over_detectron2": max((memory[j] for j in ("finetune", "infer") if j in memory), default=None),
        "peaks_over_detectron2": memory,
        "seconds": seconds,
        "seconds_of_turns": turns,
        "peak_bytes": peaks,
        "setting": setting,
    }
    rows = [[name, seconds[name] * 1e3, IMAGES / seconds[name], peaks[name] / 1e6] for name in sides]
    report(["side", "ms", "images/s", "peak MB"], rows, {}, None)
    rows = [[k, v if v is not None else "-"] for k, v in figures.items() if "_over_" in k and not isinstance(v, dict)]
    report(["ratio", ""], rows, figures, args.json)


if __name__ == "__main__":
    main()
