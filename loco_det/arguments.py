"""The arguments of every command, in a function of its name; imports nothing heavy, so that `--help` answers at once.

Weights, configuration and overrides are spelled alike everywhere: `--config-file FILE` (several times, later files
win), `--weights FILE`, and `KEY VALUE` anywhere after the command. Older spellings are accepted and not shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

# The choices that commands offer; the modules that act on them have the same names, which a test compares.
ENGINES = ("auto", "torchvision", "detectron2")
EVALUATORS = ("hotcoco", "pycocotools", "cityscapesscripts")
LAUNCHERS = ("local", "torchrun", "submitit")
MASKS = ("auto", "polygon", "bitmask", "none")
MEASURES = ("coco", "lvis", "proposals")
ANNOTATION_FORMATS = ("voc", "yolo", "labelme", "via", "labelstudio", "cvat", "png")
PRESETS = ("simclr", "mocov2")
PROTOCOLS = ("linear", "knn", "semi", "ridge", "segmentation")
DENSE_METHODS = ("ridge", "knn", "logistic", "linear")
PAPER_TARGETS = ("table1", "detection", "few_labels", "decoder", "sharing", "memory", "curves", "tsne", "pictures")
PAPER_SCALES = ("full", "small")
RECIPES = ("sweep", "paper")
OPTIMIZERS = ("sgd", "lars")
BATCH, DENSE_BATCH = 256, 16  # of probes
TSNE_IMAGES, TSNE_CLASSES = 500, 10


def quickstart(parser: argparse.ArgumentParser) -> None:
    """Output folder, data and seed."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for data, runs, results")
    parser.add_argument(
        "--data", metavar="DIR", help="your own COCO, Pascal VOC or YOLO folder instead of made-up images"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")


def doctor(parser: argparse.ArgumentParser) -> None:
    """The optional configuration to check, and the output format."""
    _config(parser, "a detection config to check with its data and weights")
    _weights(parser, "weights to check against it, instead of its MODEL.WEIGHTS")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def configs(parser: argparse.ArgumentParser) -> None:
    """Which of the packaged files to list."""
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="list only files whose name or header has each of them"
    )


def data(parser: argparse.ArgumentParser) -> None:
    """What to check, convert or draw, and the output."""
    parser.add_argument(
        "action",
        choices=["check", "convert", "shapes"],
        help="check: validate a data set and draw samples; convert: annotations to COCO's format; shapes: draw a "
        "made-up data set",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="check: images as for DATA.PATH, or a data set as for DATASETS.TRAIN; convert: a folder or file; "
        "shapes: the new folder, whose splits are PATH/@train and PATH/@test",
    )
    parser.add_argument("to", nargs="?", type=Path, metavar="OUT", help="convert: output folder of annotations/*.json")
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="a COCO file for the images in the folder PATH"
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="FORMAT",
        help=f"check: of an image set, as DATA.FORMAT; convert: auto, {', '.join(ANNOTATION_FORMATS)}",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of check.json and pictures (output/data_check/NAME)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="data workers (default: 4)")
    size = "check: size of a view on the sheet (default: 224); shapes: of the images (default: 128)"
    parser.add_argument("--size", type=int, metavar="PIXELS", help=size)
    parser.add_argument("--train", type=int, metavar="N", help="shapes: training images (default: 120)")
    parser.add_argument("--test", type=int, metavar="N", help="shapes: test images (default: 40)")
    parser.add_argument("--preset", choices=PRESETS, default="simclr", help="the views' augmentation")
    masks = "check for this INPUT.MASK_FORMAT, or boxes only (default: by the file's masks)"
    parser.add_argument("--masks", choices=MASKS, default="auto", help=masks)
    parser.add_argument("--max-bad-share", type=float, default=0.01, metavar="SHARE", help="as DATA.MAX_BAD_SHARE")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the samples and their views, or of the shapes"
    )


def pretrain(parser: argparse.ArgumentParser) -> None:
    """Config, overrides and processes, in Detectron2's style."""
    _config(parser, "YAML file, e.g. configs/pretrain/loco_r50.yaml", "e.g. DATA.PATH images SEED 1")
    _keys(parser)
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR, if any"
    )
    _processes(parser)
    parser.add_argument("--wandb", metavar="PROJECT", help="also log metrics.json to Weights & Biases")


def convert(parser: argparse.ArgumentParser) -> None:
    """INPUT, OUTPUT and the facts that a file does not record."""
    told = "a .pth, .pt, .tar, .ckpt, .bin, .safetensors, .pkl or .npz; timm:NAME for timm's own weights; hf:FOLDER"
    parser.add_argument("input", metavar="INPUT", help=told)
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        nargs="?",
        help="output: .pkl for Detectron2, with a .yaml of the keys that must agree with it; .pth or "
        ".safetensors for torchvision and timm; .safetensors for --architecture",
    )
    parser.add_argument(
        "--architecture",
        metavar="timm:NAME",
        help="the network, if it is no ResNet, e.g. timm:vit_small_patch14_dinov2",
    )
    parser.add_argument("--inspect", action="store_true", help="report the content of INPUT, convert nothing")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="PATTERN", help="drop tensors, e.g. 'layer*.pool_conv*'"
    )
    parser.add_argument("--image", help="image for the proof (default: matplotlib's photograph)")
    _stated(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def train(parser: argparse.ArgumentParser) -> None:
    """Config, weights, engine, overrides and processes."""
    _config(parser, "YAML file with Detectron2's keys", "e.g. SOLVER.BASE_LR 0.01")
    _weights(parser, "instead of MODEL.WEIGHTS: a file of any project, timm:NAME or random:resnet50")
    _keys(parser)
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUTPUT_DIR/last_checkpoint if there is one"
    )
    parser.add_argument(
        "--new-heads",
        action="store_true",
        help="initialise heads of MODEL.WEIGHTS that do not fit, e.g. of other classes",
    )
    _processes(parser)
    parser.add_argument("--evaluator", choices=EVALUATORS, default=EVALUATORS[0])
    parser.add_argument(
        "--exact", action="store_true", help="torchvision engine on a CPU: Detectron2's numbers bit for bit, slower"
    )
    parser.add_argument(
        "--feature-cache",
        type=Path,
        metavar="DIR",
        help="cache the frozen backbone's features of test images in DIR, for later evaluations",
    )
    parser.add_argument(
        "--train-feature-cache",
        type=Path,
        metavar="DIR",
        help="the same of training images, of one size and mirrored at most",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        metavar="S",
        help="torchvision engine: tolerated share of unusable training images, which are replaced (0.01)",
    )
    parser.add_argument("--fraction", type=float, metavar="F", help="train on a share of the images, 0.01 for 1 %%")
    parser.add_argument("--few-shot", type=int, metavar="K", help="train on K objects of each class")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log metrics.json to Weights & Biases")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Results, data set and measure."""
    parser.add_argument(
        "results",
        type=Path,
        metavar="RESULTS",
        help="a COCO results JSON; box_proposals.pkl; for pixel labels a folder",
    )
    parser.add_argument(
        "other", type=Path, nargs="?", metavar="RESULTS2", help="compare it with RESULTS on the same draws"
    )
    parser.add_argument("--data", required=True, metavar="NAME|ANNOTATIONS", help="a data set as in DATASETS.TEST")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to this file")
    parser.add_argument(
        "--iou-type", choices=("bbox", "segm"), help="boxes or masks only (default: what the results have)"
    )
    parser.add_argument("--measure", choices=MEASURES, help="measure to use instead of the data set's own")
    parser.add_argument("--evaluator", choices=EVALUATORS, default=EVALUATORS[0])
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="bootstrap draws of images; 0 for no intervals"
    )


def predict(parser: argparse.ArgumentParser) -> None:
    """The run or its configuration and weights, inputs and outputs."""
    parser.add_argument(
        "inputs", nargs="+", metavar="[RUN] INPUT", help="a folder of `train`, then images, folders of them, videos"
    )
    _config(parser, "the detector's YAML file, instead of RUN's", positional=False)
    _weights(parser, "a checkpoint of either engine, instead of RUN's last")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for pictures and JSON (RUN/predictions, or predictions)"
    )
    parser.add_argument("--score-threshold", type=float, metavar="S", help="minimum score of a detection (0.5)")
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="images per batch (2)")
    parser.add_argument(
        "--classes", type=Path, metavar="FILE", help="class names: a COCO annotation file, or text lines"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write JSON only")
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    parser.add_argument("--exact", action="store_true", help="Detectron2's numbers bit for bit, slower on a CPU")
    parser.add_argument(
        "--export-onnx", type=Path, metavar="PATH", help="also export the detector to ONNX, and check it"
    )
    parser.add_argument("--opts", nargs="*", default=[], help=argparse.SUPPRESS)


def probe(parser: argparse.ArgumentParser) -> None:
    """BACKBONE, data, protocol and the options of each protocol."""
    parser.add_argument("backbone", nargs="?", metavar="BACKBONE", help="weights: a file, timm:NAME or random:resnet50")
    parser.add_argument("--weights", dest="backbone_too", metavar="BACKBONE", help="the same")
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="labelled images: folders, a zip, a list, CIFAR; of pixels MASKS@IMAGES",
    )
    parser.add_argument("--val", metavar="PATH", help="the test images, if --data does not hold them")
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--method", choices=DENSE_METHODS, help="segmentation: the head on the frozen maps")
    parser.add_argument(
        "--stages", nargs="+", metavar="STAGE", help="stem res2 ... (default: all; semi, segmentation: the last)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results to this file")
    parser.add_argument("--image-size", type=int, metavar="N", help="side in pixels (default: the backbone's own)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="use about N images of each split")
    parser.add_argument(
        "--recipe", choices=RECIPES, help="linear: sweep of learning rates (default) or the paper's own"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="linear: sgd (default) or lars")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="learning rates for batches of 256")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="linear: 100 (segmentation: 32); semi: 60 up to 1 %%, 30 above"
    )
    parser.add_argument("--k", type=int, metavar="N", help="knn: neighbours (default 20; segmentation: 30)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="knn: of the votes (default 0.07; segmentation: 0.02)"
    )
    parser.add_argument("--patches", type=int, metavar="N", help="segmentation, knn: kept of each image (default 8)")
    parser.add_argument("--labels", nargs="+", type=float, metavar="PERCENT", help="semi: default 1 10")
    parser.add_argument("--tsne", type=Path, metavar="PNG", help="write a t-SNE plot of the test images' features")
    tsne_images = f"its number of images, of {TSNE_CLASSES} classes (default {TSNE_IMAGES})"
    parser.add_argument("--tsne-images", type=int, metavar="N", help=tsne_images)
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"default {BATCH}; segmentation {DENSE_BATCH}")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="data workers")
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes, one GPU each if available: linear, knn, ridge"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="feature cache (default: ~/.cache/loco_det/features)")
    parser.add_argument("--no-cache", action="store_true", help="do not cache features")
    _stated(parser)


def sweep(parser: argparse.ArgumentParser) -> None:
    """The grid, options for every cell, and the launcher."""
    parser.add_argument(
        "--weights",
        "--backbones",
        dest="backbones",
        nargs="+",
        required=True,
        metavar="[NAME=]BACKBONE",
        help="a file that `convert` reads or wrote, timm:NAME, hf:FOLDER, or python:package.module:function",
    )
    _config(parser, "a detection config, as for `train`", "overrides for every cell")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument(
        "--fractions", nargs="+", type=float, default=[1.0], metavar="F", help="fractions of the training images"
    )
    parser.add_argument("--engine", choices=ENGINES, default="auto")
    _launcher(parser, "cell")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="as for `train`, shared by all cells")
    parser.add_argument("--train-feature-cache", type=Path, metavar="DIR", help="likewise")
    parser.add_argument("--wandb", metavar="PROJECT", help="as for `train`, for every cell")
    parser.add_argument("--set", nargs="*", default=[], help=argparse.SUPPRESS)


def paper(parser: argparse.ArgumentParser) -> None:
    """The table or figure, scale, data, seeds, overrides and launcher."""
    targets = f"one of {', '.join(PAPER_TARGETS)}"
    parser.add_argument("target", nargs="?", choices=PAPER_TARGETS, metavar="TARGET", help=targets)
    parser.add_argument(
        "--scale", choices=PAPER_SCALES, default="small", help="the paper's, or narrow on a CPU (default)"
    )
    parser.add_argument(
        "--data", metavar="PATH", help="full: ImageNet's folder; small: CIFAR-10 (zip, folder), or a detection set"
    )
    parser.add_argument("--out", type=Path, default=Path("output/paper"), metavar="DIR", help="all runs and the page")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it costs, and stop")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page of what is there")
    parser.add_argument("--no-measure", action="store_true", help="do not measure a step for the hours and memory")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: 0 1 2; full: 0; splits: 0 to 4")
    parser.add_argument("--supervised", default="", metavar="FILE", help="full: weights of the supervised rows")
    parser.add_argument("--set-pretrain", nargs="+", default=[], metavar="KEY VALUE", help="for every pretraining")
    parser.add_argument("--set-train", nargs="+", default=[], metavar="KEY VALUE", help="for every detector")
    _launcher(parser, "row and seed")


def report(parser: argparse.ArgumentParser) -> None:
    """Runs, output folder and options."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run's folder, a folder with runs below it, or a probe's JSON; NAME is the backbone's name",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")
    parser.add_argument("--title", default="Backbones for detection and segmentation")
    parser.add_argument("--baseline", metavar="NAME", help="the backbone to compare with (default: the first)")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="bootstrap draws of images; 0 for none"
    )
    parser.add_argument("--images", type=int, default=4, metavar="N", help="number of images shown with predictions")
    parser.add_argument(
        "--score-threshold", type=float, default=0.5, metavar="S", help="minimum score of detections shown"
    )


# --- what commands share ----------------------------------------------------------------------------------------


def _config(
    parser: argparse.ArgumentParser, text: str, example: str = "overrides of its keys", positional: bool = True
) -> None:
    """--config-file and KEY VALUE; without `positional` the command has other positional arguments."""
    parser.add_argument(
        "--config-file", action="append", default=[], metavar="FILE", help=f"{text}; of several, later ones win"
    )
    if positional:
        parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=f"overrides, {example}")


def _weights(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--weights", metavar="FILE", help=text)


def _keys(parser: argparse.ArgumentParser) -> None:
    text = "print the keys (of SECTION, e.g. SOLVER) with their defaults and meanings, and stop"
    parser.add_argument("--keys", nargs="?", const="", metavar="SECTION", help=text)


def _processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="processes to start here, one GPU each if available"
    )


def _launcher(parser: argparse.ArgumentParser, unit: str) -> None:
    """Processes, launcher and its options (`core/jobs.py`); `unit` is what runs at a time."""
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help=f"processes for each {unit}")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help=f"{unit}s at a time; submitit submits all at once"
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local")
    parser.add_argument("--cluster", default=None, help="submitit: slurm or local (default: detected)")
    parser.add_argument("--partition", help="submitit: SLURM partition")
    parser.add_argument(
        "--timeout", type=int, default=24 * 60, metavar="MIN", help=f"submitit: time limit of a {unit}, in minutes"
    )


def _stated(parser: argparse.ArgumentParser) -> None:
    """Facts that a backbone's file may not record; read by `loco_det.commands.convert.read_stated`."""
    parser.add_argument("--branch", help="the backbone, if the file holds several")
    parser.add_argument("--channel-order", choices=("RGB", "BGR"), help="channel order of training")
    for name in ("--pixel-mean", "--pixel-std"):
        parser.add_argument(name, nargs=3, type=float, metavar="X", help="in 0-255 units, in --channel-order")
    parser.add_argument("--stride-in-1x1", choices=("yes", "no"), help="yes for weights from MSRA (Caffe)")
    parser.add_argument(
        "--d2-config", metavar="YAML", help="read order, mean, std and stride from Detectron2's config.yaml of the run"
    )
