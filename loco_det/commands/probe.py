"""The command `probe`: the protocols, and the JSON record."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from loco_det import __version__
from loco_det.arguments import BATCH, DENSE_BATCH, DENSE_METHODS, RECIPES, TSNE_IMAGES
from loco_det.commands.convert import read_stated
from loco_det.core.device import resolve_device
from loco_det.core.distributed import is_main
from loco_det.core.errors import UserError
from loco_det.core.files import cache_folder, check_writable, write_checked_json
from loco_det.core.launch import launch
from loco_det.core.log import Progress, log
from loco_det.evaluation.knn import knn_predict
from loco_det.evaluation.probes.backbones import Backbone, choose_stages, load_backbone_for_probe
from loco_det.evaluation.probes.crops import VIEWS
from loco_det.evaluation.probes.dense import DenseExtractor
from loco_det.evaluation.probes.features import POOLING, Extractor
from loco_det.evaluation.probes.finetune import FineTuning, batch_size, finetune, predict
from loco_det.evaluation.probes.images import ProbeData, open_probe_data
from loco_det.evaluation.probes.linear import RATES, Recipe, Standard, linear_probe, sweep_steps
from loco_det.evaluation.probes.linear_paper import PaperRecipe, paper_probe
from loco_det.evaluation.probes.pixel_images import PixelData, open_pixel_data
from loco_det.evaluation.probes.ridge import fit_ridge
from loco_det.evaluation.probes.scores import top_scores
from loco_det.evaluation.probes.segmentation import MASKS, DenseSettings, image_size, probe_segmentation
from loco_det.evaluation.probes.tsne import balanced, check_tsne, numbers_of, write_tsne

ALONE = ("semi", "segmentation")  # protocols of one process
_SEGMENTATION = "segmentation --method {}"
_DENSE_KNN, _DENSE_LINEAR = _SEGMENTATION.format("knn"), _SEGMENTATION.format("linear")
# Options of single protocols; refused for the others.
_OPTIONS = {
    "recipe": ("linear",),
    "optimizer": ("linear",),
    "rates": ("linear", "semi"),
    "epochs": ("linear", "semi", _DENSE_LINEAR),
    "k": ("knn", _DENSE_KNN),
    "temperature": ("knn", _DENSE_KNN),
    "patches": (_DENSE_KNN,),
    "labels": ("semi",),
}
_OF_THE_SWEEP = ("optimizer", "rates")  # fixed by the paper's recipe


def run(args: argparse.Namespace) -> None:
    """Probe, print one table, and write --json.

    Raises:
        UserError: bad arguments, images or weights.
    """
    if args.json:
        check_writable(args.json)
    if args.num_gpus < 1:
        raise UserError(f"--num-gpus is {args.num_gpus}; give at least 1, which without a GPU means one CPU process")
    if args.protocol in ALONE and (args.num_gpus > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError(f"--num-gpus {args.num_gpus}: --protocol {args.protocol} runs in one process; leave it out")
    launch(_worker, args.num_gpus, args)


def _worker(args: argparse.Namespace) -> None:
    """Probe in this process's share of the job; the main process shows and writes the results."""
    results = probe(args)
    if not is_main():
        return
    if not args.quiet:
        (_print_segmentation if args.protocol == "segmentation" else _print)(results)
    if args.json:
        write_checked_json(args.json, results)


def probe(args: argparse.Namespace, backbone: Backbone | None = None) -> dict[str, Any]:
    """Probe `backbone`, or the one of the arguments; returns the content of --json (docs/probes.md lists the keys)."""
    begun = time.monotonic()
    _name_backbone(args)
    _check(args)
    if args.protocol == "segmentation":
        return {**_segmentation(args, backbone), "seconds": round(time.monotonic() - begun, 1), "loco_det": __version__}
    device = resolve_device(args.device)
    data = open_probe_data(args.data, args.val, limit=args.limit, seed=args.seed)
    backbone = backbone or load_backbone_for_probe(
        args.backbone, seed=args.seed, image_size=args.image_size, branch=args.branch, stated=read_stated(args)
    )
    stages = choose_stages(backbone, args.stages)
    size = args.image_size or backbone.image_size
    batch = args.batch_size or BATCH
    extractor = Extractor(backbone, size, device, batch=batch, workers=args.workers, cache=_cache(args))
    log.info("%s: %d training and %d test images of %d classes (%s)", args.data, len(data.train), len(data.test),
             len(data.classes), data.split)  # fmt: skip
    if backbone.untrained:
        extractor.measure(data.train, args.seed)
    picture = {"tsne": _tsne(args, extractor, stages[-1], data)} if args.tsne else {}
    if args.protocol == "semi":
        found = {stage: _semi(args, extractor, stage, data) for stage in (stages if args.stages else stages[-1:])}
    elif args.recipe == "paper":
        found = _paper(args, extractor, stages, data)
    else:
        found = _frozen(args, extractor, stages, data)
    return {
        "stages": found,
        **picture,
        "protocol": args.protocol,
        **({"recipe": args.recipe or RECIPES[0]} if args.protocol == "linear" else {}),
        "backbone": {"name": args.backbone, **backbone.facts, "weights_sha256": backbone.weights_hash()},
        "data": _data_facts(args, data),
        "features": {
            "pooling": POOLING,
            "image_size": size,
            "views": _views(args),
            "pixels": {"order": backbone.order, "mean": backbone.mean, "std": backbone.std},
            "batchnorm": "measured on training images" if backbone.untrained else "as stored",
        },
        "seed": args.seed,
        "device": str(device),
        "seconds": round(time.monotonic() - begun, 1),
        "loco_det": __version__,
    }


def _name_backbone(args: argparse.Namespace) -> None:
    """Let `args.backbone` be the backbone, however it was given."""
    if (args.backbone is None) == (args.backbone_too is None):
        raise UserError("give one backbone, as BACKBONE or as --weights BACKBONE: a file, timm:NAME or random:resnet50")
    args.backbone = args.backbone or args.backbone_too


def _check(args: argparse.Namespace) -> None:
    if (args.protocol == "segmentation") != (args.method is not None):
        raise UserError(
            f"--protocol segmentation and --method belong together; give both, with one of {', '.join(DENSE_METHODS)}"
        )
    protocol = _SEGMENTATION.format(args.method) if args.method else args.protocol
    for option, protocols in _OPTIONS.items():
        if getattr(args, option) is not None and protocol not in protocols:
            raise UserError(f"--{option} belongs to --protocol {' and '.join(protocols)}, not {protocol}")
    for option in _OF_THE_SWEEP if args.recipe == "paper" else ():
        if getattr(args, option) is not None:
            raise UserError(f"--{option} belongs to --recipe sweep; --recipe paper fixes it, so leave it out")
    positive = {"image-size": args.image_size, "epochs": args.epochs, "k": args.k, "batch-size": args.batch_size,
                "temperature": args.temperature, "tsne-images": args.tsne_images, "patches": args.patches}  # fmt: skip
    for option, value in positive.items():
        if value is not None and not value > 0:  # also refuses NaN
            raise UserError(f"--{option} is {value}; give a number above 0")
    for option, value in {"limit": args.limit, "seed": args.seed, "workers": args.workers}.items():
        if value < 0:
            raise UserError(f"--{option} is {value}; give 0 or more")
    for rate in args.rates or []:
        if not 0 < rate < 1e30:
            raise UserError(f"--rates has {rate}; give learning rates, which are above 0 and seldom above 100")
    for percent in args.labels or []:
        if not 0 < percent <= 100:
            raise UserError(f"--labels has {percent}; give percents above 0, up to 100")
    if args.tsne and args.method:
        raise UserError("--tsne plots pooled features, which --protocol segmentation has none of; leave it out")
    if args.tsne:
        check_tsne(args.tsne)
    elif args.tsne_images is not None:
        raise UserError("--tsne-images belongs to --tsne PNG; give both, or neither")
    if args.tsne and args.json and numbers_of(args.tsne).resolve() == args.json.resolve():
        raise UserError(
            f"--json {args.json}: the numbers of --tsne {args.tsne} go there; give one of them another name"
        )
    if args.protocol == "semi" and len(args.rates or [0]) > 1:
        raise UserError("--rates: fine-tuning takes a single learning rate, for no images are held out; give one")


def _cache(args: argparse.Namespace) -> Path | None:
    if args.no_cache:
        return None
    return args.cache or cache_folder() / "features"


# --- protocols --------------------------------------------------------------------------------------------------


def _frozen(args: argparse.Namespace, extractor: Extractor, stages: list[str], data: ProbeData) -> dict[str, Any]:
    protocol = {"linear": _linear, "knn": _knn, "ridge": _ridge}[args.protocol]
    train, test = (extractor(half, stages, what) for half, what in ((data.train, "training"), (data.test, "test")))
    labels, truth = (torch.from_numpy(half.labels) for half in (data.train, data.test))
    found = {}
    for stage in stages:
        device = extractor.device
        scores, facts = protocol(args, stage, train[stage].to(device), labels.to(device), test[stage].to(device),
                                 len(data.classes))  # fmt: skip
        found[stage] = {**top_scores(scores.cpu(), truth, args.seed), "dimensions": train[stage].shape[1], **facts}
    return found


Outcome = tuple[Tensor, dict[str, Any]]


def _linear(args: argparse.Namespace, stage: str, train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Outcome:
    optimizer = args.optimizer or "sgd"
    recipe = Recipe(optimizer, args.rates or RATES[optimizer], args.epochs or 100, seed=args.seed)
    with Progress(sweep_steps(len(train), recipe), f"linear probe of {stage}") as progress:
        classifier, facts = linear_probe(train, labels, classes, recipe, progress.advance)
    if facts["rate_at_edge"]:
        log.warning("%s: the best learning rate, %g, is at the edge of the sweep; widen --rates", stage, facts["rate"])
    settings = {"optimizer": optimizer, "epochs": recipe.epochs, "batch": recipe.batch, "standardised": True}
    return classifier(test), {**settings, **facts}


def _paper(args: argparse.Namespace, extractor: Extractor, stages: list[str], data: ProbeData) -> dict[str, Any]:
    recipe = PaperRecipe(epochs=args.epochs or PaperRecipe.epochs, seed=args.seed)
    heads = paper_probe(extractor, stages, data.train, len(data.classes), recipe)
    test, truth = extractor(data.test, stages, "test"), torch.from_numpy(data.test.labels)
    facts = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "rate": recipe.rate,
        "divided_by_10_at": recipe.milestones,
        "epochs": recipe.epochs,
        "batch": recipe.batch,
        "standardised": False,
    }
    found = {}
    for stage, head in heads.items():
        with torch.no_grad():
            scores = head(test[stage].to(extractor.device)).cpu()
        found[stage] = {**top_scores(scores, truth, args.seed), "dimensions": test[stage].shape[1], **facts}
    return found


def _knn(args: argparse.Namespace, stage: str, train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Outcome:
    settings = {"k": min(args.k or 20, len(train)), "temperature": args.temperature or 0.07}
    return knn_predict(train, labels, test, classes=classes, **settings), settings


def _ridge(args: argparse.Namespace, stage: str, train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Outcome:
    standard = Standard.of(train)
    ridge = fit_ridge(train, labels, classes, standard=standard)
    strengths = list(ridge.errors)
    facts = {
        "lambda": ridge.strength,
        "lambda_at_edge": ridge.strength in (strengths[0], strengths[-1]),
        "leave_one_out_error": ridge.errors[ridge.strength],
        "standardised": True,
    }
    return ridge(standard(test)), facts


def _tsne(args: argparse.Namespace, extractor: Extractor, stage: str, data: ProbeData) -> dict[str, Any]:
    images = balanced(data.test, args.tsne_images or TSNE_IMAGES, args.seed)
    features = extractor(images, [stage], "t-SNE")[stage].numpy()
    if not is_main():
        return {}
    return write_tsne(args.tsne, features, images, data.classes, args.backbone, stage, args.seed)


def _semi(args: argparse.Namespace, extractor: Extractor, stage: str, data: ProbeData) -> dict[str, Any]:
    found = {}
    for percent in args.labels or (1.0, 10.0):
        few = data.train.part(percent / 100, args.seed)
        recipe = FineTuning(
            rate=args.rates[0] if args.rates else FineTuning.rate,
            epochs=args.epochs or (60 if percent <= 1 else 30),
            batch=batch_size(len(few)),
            seed=args.seed,
        )
        model = finetune(
            extractor.backbone, stage, few, len(data.classes), extractor.size, recipe, extractor.device,
            workers=args.workers,
        )  # fmt: skip
        scores = top_scores(predict(model, extractor, data.test), torch.from_numpy(data.test.labels), args.seed)
        facts = {"labels": len(few), "rate": recipe.rate, "epochs": recipe.epochs, "batch": recipe.batch}
        found[f"{percent:g}"] = {**scores, **facts}
    last = list(found)[-1]
    return {**found[last], "percent": float(last), "by_percent": found}


# --- segmentation -----------------------------------------------------------------------------------------------


def _segmentation(args: argparse.Namespace, backbone: Backbone | None) -> dict[str, Any]:
    device = resolve_device(args.device)
    data = open_pixel_data(args.data, args.val, limit=args.limit, seed=args.seed)
    backbone = backbone or load_backbone_for_probe(
        args.backbone, seed=args.seed, image_size=args.image_size, branch=args.branch, stated=read_stated(args)
    )
    stages = choose_stages(backbone, args.stages)
    stages = stages if args.stages else stages[-1:]
    size = args.image_size or image_size(backbone, stages)
    extractor = DenseExtractor(backbone, size, device, batch=args.batch_size or DENSE_BATCH, workers=args.workers)
    log.info("%s: %d training and %d test images of %d classes (%s)", args.data, len(data.train), len(data.test),
             len(data.classes), data.split)  # fmt: skip
    extractor.grids(stages)  # refuse a size before the work begins
    if backbone.untrained:
        extractor.measure(data.train, args.seed)
    options = {name: getattr(args, name) for name in ("k", "temperature", "patches", "epochs")}
    settings = DenseSettings(args.method, seed=args.seed, **{k: v for k, v in options.items() if v is not None})
    return {
        "stages": probe_segmentation(extractor, stages, data, settings),
        "protocol": args.protocol,
        "method": args.method,
        "backbone": {"name": args.backbone, **backbone.facts, "weights_sha256": backbone.weights_hash()},
        "data": _data_facts(args, data),
        "features": {
            "image_size": size,
            "views": f"whole images, scaled to {size} x {size}",
            "masks": MASKS,
            "pixels": {"order": backbone.order, "mean": backbone.mean, "std": backbone.std},
            "batchnorm": "measured on training images" if backbone.untrained else "as stored",
        },
        "seed": args.seed,
        "device": str(device),
    }


# --- the record -------------------------------------------------------------------------------------------------


def _views(args: argparse.Namespace) -> str:
    if args.protocol == "semi" or args.recipe == "paper":
        return f"training: {VIEWS}; test: centre crop"
    return "features computed once from the centre crop"


def _data_facts(args: argparse.Namespace, data: ProbeData | PixelData) -> dict[str, Any]:
    return {
        "path": args.data,
        "val": args.val,
        "test_images_are": data.split,
        "train_images": len(data.train),
        "test_images": len(data.test),
        "classes": data.classes,
        "limit": args.limit,
    }


_CHOICES = ("rate", "lambda", "k")


def _print(results: dict[str, Any]) -> None:
    data = results["data"]
    table = Table(title=f"{results['backbone']['name']}: {results['protocol']}, {data['test_images']} test images")
    for column in ("stage", "top-1", "95 %", "top-5", "95 %", "chosen"):
        table.add_column(column, justify="left" if column in ("stage", "chosen") else "right")
    for stage, whole in results["stages"].items():
        for percent, found in whole.get("by_percent", {"": whole}).items():
            low, high = found["top1_interval"]
            low5, high5 = found["top5_interval"]
            chosen = next((f"{name} {found[name]:g}" for name in _CHOICES if name in found), "")
            table.add_row(
                f"{stage}, {percent} %" if percent else stage,
                f"{found['top1']:.2f}", f"{low:.2f}-{high:.2f}",
                f"{found['top5']:.2f}", f"{low5:.2f}-{high5:.2f}", chosen,
            )  # fmt: skip
    Console().print(table)


# Of segmentation: the same for all stages, and chosen for each.
_SETTINGS = ("k", "temperature", "patches_an_image", "optimizer", "rate", "weight_decay", "epochs", "batch")
_CHOSEN = ("lambda", "C")


def _print_segmentation(results: dict[str, Any]) -> None:
    data, size, stages = results["data"], results["features"]["image_size"], results["stages"]
    first = next(iter(stages.values()))
    method = " ".join([results["method"], *(f"{name} {first[name]}" for name in _SETTINGS if name in first)])
    table = Table(
        title=f"{results['backbone']['name']}: segmentation, {method}; {data['test_images']} test images of "
        f"{len(data['classes'])} classes, scaled to {size} x {size}; {MASKS}"
    )
    table.add_column("stage", overflow="fold")
    for column in ("norm", "map", "mIoU", "95 %", "accuracy", "chosen"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("mIoU", "95 %", "accuracy") else "left")
    for stage, found in stages.items():
        interval = "-".join(f"{end:.2f}" for end in found["miou_interval"] or ())  # none if few draws have a class
        chosen = "".join(f"{name} {found[name]:.2g}" for name in _CHOSEN if name in found)
        table.add_row(
            stage, found["norm"], f"{found['grid']}x{found['grid']}x{found['dimensions']}", f"{found['miou']:.2f}",
            interval, f"{found['pixel_accuracy']:.2f}", chosen,
        )  # fmt: skip
    Console().print(table)
