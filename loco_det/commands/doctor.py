"""`loco-det doctor`: check this machine and a configuration, with a remedy for each problem.

Every check imports what it tests, so a broken installation becomes a line of the table and not a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loco_det import __version__
from loco_det.core.errors import UserError

PYTHON = (3, 10)
TORCH = (2, 4)
REINSTALL = "reinstall it: pip install --upgrade --force-reinstall "
GIB = 2**30
LINE_WIDTH = 200  # if the output is not a terminal
BASELINE_RATE, BASELINE_IMAGES = 0.02, 16  # of Detectron2's COCO configurations
RATE_SPAN = 2.5  # deviations from the rule by a larger factor get a note
NORM_KEYS = tuple(f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD"))
# In the names of sources and methods of weights that were made with labels, or not trained at all.
SUPERVISED = ("torchvision", "timm", "msra", "caffe2", "detectron2", "hugging face", "random")
NAMED_WEIGHTS = ("timm:", "random:")  # beginnings of weights that train takes and that are no files
SMALL_DISK = 5 * GIB
# Shared memory below which the loader processes of this package's configurations fail, or might.
LITTLE_SHARED_MEMORY, SMALL_SHARED_MEMORY = GIB // 4, GIB
CORES_A_GPU = 6  # for about 1200 images a second at 224 pixels, two views each (docs/scale.md)


class Check(NamedTuple):
    """One line of the table; status is "ok", "note" (works, but read this) or "fail"."""

    name: str
    status: str
    found: str
    advice: str = ""


def run(args: argparse.Namespace) -> int:
    """Check and print; returns 0, or 1 if a check failed.

    Raises:
        UserError: the configuration cannot be read, or a named file is missing.
    """
    if not args.config_file and (args.weights or args.opts):
        raise UserError("--weights and KEY VALUE are checked against a configuration; give --config-file too.")
    if args.weights and not args.weights.startswith(NAMED_WEIGHTS) and not Path(args.weights).is_file():
        raise UserError(f"--weights {args.weights} does not exist; correct the path.")
    with _stdout_to_stderr():  # so that stdout has only the result
        checks = examine()
        if args.config_file:
            checks += examine_config(args.config_file, args.opts, args.weights)
    ok = all(check.status != "fail" for check in checks)
    if args.json:
        print(
            json.dumps({"loco_det": __version__, "ok": ok, "checks": [check._asdict() for check in checks]}, indent=1)
        )
    else:
        _print_table([check for check in checks if check.status != "ok" or not args.quiet])
    return 0 if ok else 1


def examine() -> list[Check]:
    """Run every check of the machine."""
    checks: dict[str, Callable[[], Check]] = {
        "python": _python,
        "torch": _torch,
        "torchvision": _torchvision,
        "opencv": _opencv,
        "hotcoco": _hotcoco,
        "packages": _packages,
        "gpu": _gpu,
        "detectron2": _detectron2,
        "data sets": _data_sets,
        "disk": _disk,
        "shared memory": _shared_memory,
    }
    return [_guarded(name, check) for name, check in checks.items()]


def examine_config(config: str | list[str], overrides: list[str], weights: str | None = None) -> list[Check]:
    """Check a detection configuration, its data sets, and `weights` (None: its MODEL.WEIGHTS).

    Raises:
        UserError: the configuration cannot be read.
    """
    try:
        from loco_det.annotations.classes import check_training_classes, missing_classes
        from loco_det.annotations.loader import check_kind
        from loco_det.annotations.registry import find_dataset
        from loco_det.detection import train
        from loco_det.detection.keys import load_cfg
    except Exception as error:
        return [_broken("config", error)]
    cfg, settings = load_cfg(config, overrides)

    def engine() -> Check:
        chosen = train.choose_engine("auto")
        chosen.check(cfg, settings)
        files = config if isinstance(config, str) else " ".join(config)
        return Check("config", "ok", f"{files} on the {chosen.name} engine")

    def data_set(name: str) -> Check:
        check_kind(cfg, name)
        learned = list(cfg.DATASETS.TRAIN)
        learned = learned[: learned.index(name) + 1] if name in learned else []
        check_training_classes(cfg, [find_dataset(training_set) for training_set in learned])
        missing = missing_classes(cfg, find_dataset(name))
        if missing:
            advice = "AP is over the other classes; is it the right test set?"
            return Check(f"data set {name}", "note", f"has no category for {', '.join(missing)}", advice)
        head = cfg.MODEL.SEM_SEG_HEAD if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor" else cfg.MODEL.ROI_HEADS
        return Check(f"data set {name}", "ok", f"{head.NUM_CLASSES} classes, as in the config")

    names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    checks = [_guarded("config", engine)]
    checks += [_guarded(f"data set {name}", lambda name=name: data_set(name)) for name in names]
    checks.append(_guarded("weights", lambda: _weights(cfg, settings, weights or cfg.MODEL.WEIGHTS)))
    checks.append(_guarded("schedule", lambda: _schedule(cfg)))
    checks.append(_guarded("norm", lambda: _norm(cfg, weights or cfg.MODEL.WEIGHTS)))
    checks.append(_guarded("loaders", lambda: _loaders(cfg)))
    checks.append(_guarded("output", lambda: _disk(Path(cfg.OUTPUT_DIR), "output")))
    return checks


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check()
    except UserError as error:
        return Check(name, "fail", str(error))
    except Exception as error:
        return _broken(name, error)


def _broken(name: str, error: Exception) -> Check:
    lines = str(error).strip().splitlines() or [""]
    return Check(name, "fail", f"{type(error).__name__}: {lines[0]}", f"{REINSTALL}loco_det")


# --- the machine ------------------------------------------------------------------------------------------------


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < PYTHON:
        return Check("python", "fail", found, f"use Python {'.'.join(map(str, PYTHON))} or newer")
    return Check("python", "ok", found)


def _torch() -> Check:
    import torch

    found = f"{torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} CPUs"
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < TORCH:
        return Check("torch", "fail", found, f"upgrade to torch {'.'.join(map(str, TORCH))} or newer")
    return Check("torch", "ok", found)


def _torchvision() -> Check:
    import torch
    import torchvision

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 3.9], [2, 2, 6, 6]], device=device)
        kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)
        ramp = torch.arange(64.0, device=device).view(1, 1, 8, 8)
        pooled = torchvision.ops.roi_align(ramp, [torch.tensor([[2.0, 2, 6, 6]], device=device)], 1, aligned=True)
        # NMS drops the second box; the centre of the box lies between the pixels of rows and columns 3 and 4.
        if kept.tolist() != [0, 2] or abs(pooled.item() - 31.5) > 1e-4:
            return Check(
                "torchvision", "fail", f"operators compute wrongly on {device}", f"{REINSTALL}torch torchvision"
            )
    return Check("torchvision", "ok", f"{torchvision.__version__}, nms and roi_align run on {' and '.join(devices)}")


def _opencv() -> Check:
    import cv2
    import numpy as np

    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    _, data = cv2.imencode(".png", image)
    if not np.array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR), image):
        return Check("opencv", "fail", "PNG does not survive a round trip", f"{REINSTALL}opencv-python-headless")
    return Check("opencv", "ok", cv2.__version__)


def _hotcoco() -> Check:
    from importlib.metadata import version

    from loco_det.evaluation.coco import EVALUATORS, evaluate_coco

    truth = {
        "images": [{"id": 1, "height": 9, "width": 9, "file_name": "a.png"}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 0}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 4], "score": 0.9}]  # IoU 0.8: 7 of the 10 thresholds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(truth))
        ours, theirs = (evaluate_coco(file, found, ["bbox"], evaluator=e)["bbox"]["AP"] for e in EVALUATORS)
    if ours != theirs or abs(ours - 70) > 1e-9:
        advice = "use --evaluator pycocotools, and report it"
        return Check("hotcoco", "fail", f"AP {ours} where pycocotools gives {theirs} and 70 is right", advice)
    return Check("hotcoco", "ok", f"{version('hotcoco')}, AP as pycocotools {version('pycocotools')}")


def _packages() -> Check:
    """Check the other dependencies, which commands import lazily."""
    missing = []
    for name in (
        "fvcore.common.config",
        "jinja2",
        "matplotlib",
        "msgspec",
        "numpy",
        "PIL",
        "rich",
        "safetensors",
        "timm",
        "yaml",
    ):
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name.partition('.')[0]} ({error})")
    if missing:
        return Check("packages", "fail", f"cannot be imported: {', '.join(missing)}", f"{REINSTALL}loco_det")
    return Check("packages", "ok", "every dependency can be imported")


def _gpu() -> Check:
    import torch

    from loco_det.core.device import usable_cores

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = ", ".join(f"{d.name} ({d.total_memory / GIB:.0f} GiB)" for d in devices)
        return Check("gpu", *_gpu_state(f"{names}; CUDA {torch.version.cuda}", usable_cores() / len(devices)))
    if any(Path("/dev").glob("nvidia[0-9]*")):
        advice = "update the driver, or install a torch built for its CUDA version"
        return Check("gpu", "fail", f"an NVIDIA device that torch {torch.__version__} cannot use", advice)
    return Check("gpu", "note", "none: everything runs on the CPU", "use a GPU for more than small data sets")


def _gpu_state(found: str, cores: float) -> tuple[str, ...]:
    """Return status, finding and advice: whether a convolution runs, and the cores for each GPU's images."""
    import torch

    if problem := _gpu_problem():
        return "fail", f"{found}; a convolution fails ({problem})", "install a torch and a driver made for this GPU"
    found += f"; {cores:.0f} cores a GPU"
    if not torch.distributed.is_nccl_available():
        return "note", f"{found}; no NCCL", "several processes need a torch with NCCL"
    if cores < CORES_A_GPU:
        advice = f"pretraining may wait for images below {CORES_A_GPU} cores a GPU: AUGMENT.DEVICE auto, or more cores"
        return "note", found, advice
    return "ok", found


def _gpu_problem() -> str:
    import torch

    try:
        torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3, device="cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # drivers raise various exceptions
        return f"{type(error).__name__}: {error}"
    return ""


def _detectron2() -> Check:
    from loco_det.detection import engine_d2

    if not engine_d2.installed():
        return Check("detectron2", "ok", "not installed; the torchvision engine gives the same numbers")
    try:
        return Check("detectron2", "ok", f"{engine_d2.version()}, its operators load")
    except Exception as error:
        advice = "compile it again for this torch, or pass --engine torchvision"
        return Check("detectron2", "fail", f"{type(error).__name__}: {error}", advice)


def _data_sets() -> Check:
    from loco_det.annotations.registry import datasets_root, present_datasets

    found = present_datasets()
    root = datasets_root().absolute()
    if found:
        return Check("data sets", "ok", f"{', '.join(found)} under {root}")
    advice = "set DETECTRON2_DATASETS to the folder that holds coco/, lvis/, VOC2007/ or cityscapes/"
    return Check("data sets", "note", f"no COCO, LVIS, Pascal VOC or Cityscapes under {root}", advice)


def _disk(folder: Path = Path(), name: str = "disk") -> Check:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check(name, "fail", f"{folder} cannot be written to", "run elsewhere or set OUTPUT_DIR")
    if free < SMALL_DISK:
        return Check(name, "note", found, "free space: a run keeps several checkpoints of up to 0.5 GiB each")
    return Check(name, "ok", found)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", "ok", "this system has no /dev/shm")
    size = shutil.disk_usage(folder)
    found = f"{size.free / GIB:.1f} of {size.total / GIB:.1f} GiB free in {folder}"
    if size.free < SMALL_SHARED_MEMORY:
        advice = "docker run --shm-size=8g, or DATALOADER.NUM_WORKERS 0 (DATA.NUM_WORKERS 0, --workers 0)"
        status = "fail" if size.free < LITTLE_SHARED_MEMORY else "note"
        return Check("shared memory", status, found, f"loader processes find no room: {advice}")
    return Check("shared memory", "ok", found)


# --- the configuration ------------------------------------------------------------------------------------------


def _weights(cfg: Any, settings: Any, path: str) -> Check:
    """Load them into the configured model exactly as training would."""
    from loco_det.backbones.own import WITH_WEIGHTS
    from loco_det.detection.foreign_weights import is_foreign
    from loco_det.detection.keys import check_supported
    from loco_det.detection.rcnn import build_model
    from loco_det.detection.weights import apply_weights, read_weights

    if not path and cfg.MODEL.BACKBONE.NAME.startswith(WITH_WEIGHTS):
        check_supported(cfg, settings)
        build_model(cfg)
        return Check("weights", "ok", f"{cfg.MODEL.BACKBONE.NAME} has its own weights and fits the config")
    if not path:
        return Check("weights", "note", "MODEL.WEIGHTS is empty: random values", "pretrain or convert a backbone")
    if path.startswith("random:"):
        return Check("weights", "ok", f"{path}: train measures its BatchNorm statistics on the training images")
    if is_foreign(path):
        advice = "train converts it, with a proof; look at it first: loco-det convert FILE --inspect"
        return Check("weights", "note", f"{path} is of another project", advice)
    weights = read_weights(path)
    check_supported(cfg, settings)  # because the model is built with the torchvision engine
    apply_weights(build_model(cfg), weights, cfg)
    kind = "backbone" if weights.is_backbone else "detector"
    if weights.is_backbone and weights.manifest is None:
        advice = "check INPUT.FORMAT and PIXEL_MEAN/STD by hand, or convert it with loco-det convert"
        return Check("weights", "note", f"{kind} {path} fits, but does not say what pixels it expects", advice)
    return Check("weights", "ok", f"{kind} {path} fits the config")


def _schedule(cfg: Any) -> Check:
    """Compare SGD's learning rate with the rule of Detectron2's baselines, 0.02 for 16 images, linear in the batch."""
    from loco_det.core.own_keys import own_value

    images, rate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    rule = BASELINE_RATE * images / BASELINE_IMAGES
    found = f"SOLVER.BASE_LR {rate:g} for {images} images a step"
    is_usual = rule / RATE_SPAN <= rate <= rule * RATE_SPAN
    if own_value(cfg, "SOLVER.OPTIMIZER") == "SGD" and not is_usual:
        advice = f"{BASELINE_RATE:g} for {BASELINE_IMAGES} images, scaled with the batch, would be {rule:.3g}"
        return Check("schedule", "note", found, advice)
    late = [step for step in cfg.SOLVER.STEPS if step >= cfg.SOLVER.MAX_ITER]
    if late and cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        advice = f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: the rate never falls there; shorten SOLVER.STEPS too"
        return Check("schedule", "note", f"SOLVER.STEPS {tuple(late)} are never reached", advice)
    return Check("schedule", "ok", found)


def _loaders(cfg: Any) -> Check:
    """Check that shared memory has room for the configuration's batches, as training would."""
    from loco_det.annotations.loader import check_room

    check_room(cfg)
    return Check("loaders", "ok", f"room for the batches of DATALOADER.NUM_WORKERS {cfg.DATALOADER.NUM_WORKERS}")


def _norm(cfg: Any, weights: str) -> Check:
    """Check normalisation that a tuned backbone's recipe needs, or whose statistics depend on the processes."""
    import torch

    from loco_det.core.config import value

    used = {key: value(cfg, key) for key in NORM_KEYS}
    synced = [key for key, norm in used.items() if norm == "SyncBN"]
    shown = ", ".join(f"{key} {norm or 'none'}" for key, norm in used.items())
    if problem := _norm_of_recipes(cfg, weights):
        return Check("norm", "note", *problem)
    if synced and torch.cuda.device_count() < 2:
        advice = (
            f"SyncBN of one process is BN over its {cfg.SOLVER.IMS_PER_BATCH} images; published runs have 16 over 8"
        )
        return Check("norm", "note", f"{', '.join(synced)} is SyncBN, and there is no second GPU here", advice)
    return Check("norm", "ok", shown)


def _norm_of_recipes(cfg: Any, weights: str) -> tuple[str, str] | None:
    """Return what departs from MoCo's and LoCo's recipes of fine-tuning, and the advice; None for a frozen backbone."""
    norm, freeze = cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze >= 5 or cfg.MODEL.BACKBONE.NAME.startswith(("timm:", "hf:", "python:")):
        return None
    if norm == "FrozenBN" and _is_self_supervised(weights):
        found = f"a self-supervised backbone is tuned from stage {freeze} on under MODEL.RESNETS.NORM FrozenBN"
        return found, "its activations are not of supervised scale: set MODEL.RESNETS.NORM SyncBN, as MoCo and LoCo do"
    if norm == "BN" and cfg.SOLVER.IMS_PER_BATCH > 1:
        found = f"MODEL.RESNETS.NORM BN has statistics of each GPU's share of {cfg.SOLVER.IMS_PER_BATCH} images"
        return found, "recipes for tuned backbones have SyncBN"
    if norm == "SyncBN" and "fpn" in cfg.MODEL.BACKBONE.NAME and not cfg.MODEL.FPN.NORM:
        advice = "MoCo and LoCo have SyncBN in new layers too: set MODEL.FPN.NORM SyncBN"
        return "MODEL.RESNETS.NORM is SyncBN and MODEL.FPN.NORM is none", advice
    return None


def _is_self_supervised(path: str) -> bool:
    """Whether a weights file says that it was made without labels: its manifest's method."""
    from loco_det.detection.weights import read_weights

    try:
        manifest = read_weights(path).manifest if path else None
    except UserError:  # the check of the weights says so
        return False
    return manifest is not None and not any(word in manifest.method.lower() for word in SUPERVISED)


# --- output -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect everything this process writes to descriptor 1, also from C, to descriptor 2."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ok": "green", "note": "yellow", "fail": "bold red"}
    table = Table("check", "status", "found", "what to do", box=None, pad_edge=False)
    for check in checks:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, escape(check.found), escape(check.advice))
    Console(width=None if sys.stdout.isatty() else LINE_WIDTH).print(table)
