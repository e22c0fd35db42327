"""What `import loco_det` offers: load a backbone, look at its features, probe it, detect with it.

The commands `probe` and `train` do the same; here a backbone may also be any `nn.Module` in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from loco_det import arguments
from loco_det.annotations.check import masks_of
from loco_det.annotations.coco import image_files
from loco_det.annotations.registry import Dataset, find_dataset
from loco_det.backbones import own
from loco_det.backbones.artifact import backbone_tensors, save_backbone
from loco_det.backbones.hf_models import HfBackbone
from loco_det.backbones.resnet import ResNet
from loco_det.backbones.timm_models import TimmBackbone
from loco_det.commands import probe as probe_command
from loco_det.convert import Stated, convert
from loco_det.convert.conversion import is_described
from loco_det.convert.sources import Pixels
from loco_det.convert.timm_models import describe_timm
from loco_det.core.config import read_settings
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write
from loco_det.core.log import log, logging_to
from loco_det.detection.checkpoint import LAST
from loco_det.detection.keys import load_cfg
from loco_det.detection.loop import StoppedError
from loco_det.detection.train import train_net
from loco_det.evaluation.probes.backbones import Backbone, load_backbone_for_probe, measure_on, own_backbone

LAPTOP = "configs/laptop.yaml"
FPN_STAGES = ["res2", "res3", "res4", "res5"]
PROTOCOLS = {"frozen": 5, "finetune": 2, "all": 0}  # of detection -> MODEL.BACKBONE.FREEZE_AT


class Result(dict[str, Any]):
    """A dict of numbers and facts that prints as a table.

    Attributes:
        rows: {name of the row: {name of the column: number}}.
        folder: of the run, if it has one.
        notes: lines below the table, on what was run and how to read it.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        rows: Mapping[str, Mapping[str, float]],
        folder: Path | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(content)
        self.rows = {name: dict(row) for name, row in rows.items()}
        self.folder, self.notes = folder, list(notes)

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        table = [["", *columns]]
        table += [[name, *(_shown(row.get(column)) for column in columns)] for name, row in self.rows.items()]
        widths = [max(map(len, cells)) for cells in zip(*table)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in table
        ]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__

    def to_pandas(self) -> Any:
        """Return `rows` as a pandas.DataFrame.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas needs pandas; install it: pip install pandas") from error
        return pandas.DataFrame.from_dict(self.rows, orient="index")


def load_backbone(
    source: str | Path | nn.Module,
    *,
    image_size: int | None = None,
    branch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    order: str = "RGB",
    untrained: bool = False,
) -> Backbone:
    """Load a backbone, in evaluation mode, on the CPU.

    Args:
        source: a weights file of any kind that `loco-det convert` reads or writes, "timm:NAME", "hf:FOLDER",
            "random:resnet50", "random:timm:NAME", or a module: (B, 3, H, W) -> a map, several, or a dict of maps, each
            (B, C, h, w).
        image_size: side of the images, in pixels; None: the backbone's own, 224 for a module.
        branch: of a file with several backbones.
        mean, std: pixels that a module was trained with, in 0-255 units in `order`; None: ImageNet's.
        order: RGB or BGR, of a module.
        untrained: a module's weights are random, so BatchNorm statistics are first measured on the training images, as
            those of "random:resnet50" are.

    Returns:
        `.features(images)` gives its maps, `.channels` their channels; `.model` is the module.

    Raises:
        UserError: no such file or model, unknown or damaged weights, or a module without maps.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UserError(f"image_size {image_size!r}: give a whole number of pixels, at least 1")
    if isinstance(source, nn.Module):
        return own_backbone(source, image_size or 224, order, mean, std, untrained)
    if not isinstance(source, (str, Path)):
        raise UserError(f"backbone {source!r}: give an nn.Module, or a file or a name as text")
    if mean or std or order != "RGB" or untrained:
        raise UserError(f"backbone {source}: mean, std, order and untrained are for a module; weights state their own")
    return load_backbone_for_probe(str(source), image_size=image_size, branch=branch)


def probe(
    backbone: Backbone | str | Path | nn.Module, data: str | Path, *, protocol: str = "linear", **options: Any
) -> Result:
    """Probe a backbone's frozen features, stage by stage; docs/probes.md explains the protocols.

    Args:
        backbone: from `load_backbone`, or what that takes.
        data: labelled images: class folders, a zip, a list, CIFAR.
        protocol: a value of the command's --protocol.
        options: the command's other options by name, `limit=1000`, `stages=["res5"]`; None for its default.

    Returns:
        What the command writes as JSON; prints as a table of the stages.

    Raises:
        UserError: bad options, images or weights.
    """
    if not isinstance(data, (str, Path)):
        raise UserError(f"data {data!r}: give the path of labelled images")
    backbone = backbone if isinstance(backbone, Backbone) else load_backbone(backbone)
    parser = argparse.ArgumentParser(prog="loco_det.probe", exit_on_error=False, add_help=False)
    arguments.probe(parser)
    argv = [backbone.name, "--data", str(data), "--protocol", protocol]
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
        argv += [f"--{name.replace('_', '-')}", *([] if value is True else values)]
    try:
        args, unknown = parser.parse_known_args(argv)
    except (argparse.ArgumentError, SystemExit) as error:
        raise UserError(f"probe: {error}; see loco-det probe --help") from error
    if unknown:
        raise UserError(f"probe: has no option {unknown[0]}; see loco-det probe --help")
    found = probe_command.probe(args, backbone)
    rows = {
        stage: {name: value for name, value in numbers.items() if isinstance(value, (int, float))}
        for stage, numbers in found["stages"].items()
    }
    return Result(found, rows)


def evaluate_detection(
    backbone: Backbone | str | Path | nn.Module,
    *,
    train: str,
    test: str,
    iterations: int,
    protocol: str = "frozen",
    masks: bool = False,
    small: bool = False,
    output: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Train a detector on a backbone and evaluate it; shows progress on standard error, and logs to log.txt.

    Args:
        backbone: from `load_backbone`, or what that takes. Maps of one stride, 16, get the simple feature pyramid;
            maps of strides 4 to 32 the FPN. A ResNet with the CIFAR stem is given images averaged over 4 x 4 pixels.
        train, test: data sets, by name (`coco_2017_train`) or path (docs/datasets.md).
        iterations: of training.
        protocol: "frozen": the readout alone is trained; "finetune": all but the first two stages; "all". A copy of
            the backbone is trained, so the next evaluation begins with the same weights.
        masks: Mask R-CNN instead of Faster R-CNN.
        small: images of 256 pixels, batches of 4 and small heads, as in configs/laptop.yaml: minutes on a CPU.
        output: new folder of the run, with checkpoints and detections; None: a temporary one, removed if the call is
            interrupted or fails before its first checkpoint.
        resume: continue the run in `output` from its last checkpoint, if it has one.
        device: "auto", "cpu" or "cuda".
        seed: of the detector's initial weights and of the order and augmentation of the images.
        settings: further keys of `train`, {"SOLVER.BASE_LR": 0.01, "INPUT.MIN_SIZE_TRAIN": (320,)}.

    Returns:
        {"bbox": {"AP": percent, ...}, "segm": {...}}; prints as a table, and how to read it.

    Raises:
        UserError: bad data, settings or weights, a backbone whose strides no pyramid takes, or another run to resume.
        KeyboardInterrupt: SIGINT (Ctrl-C) or SIGTERM; during training, after a checkpoint.
    """
    _check_arguments(protocol, iterations, {"train": train, "test": test}, settings)
    if resume and output is None:
        raise UserError("resume=True: give the output of the run to continue")
    if not isinstance(backbone, Backbone):  # a copy, since loading puts a module into evaluation mode
        backbone = load_backbone(copy.deepcopy(backbone))
    folder = _run_folder(output, resume)
    with _interruptible(folder, is_temporary=output is None), logging_to(folder):
        data = [find_dataset(name) for name in (train, test)]
        log.info(
            "training %s R-CNN on %s (%s): %d iterations on %s, then a test on %s; in %s",
            *("Mask" if masks else "Faster", backbone.name, protocol, iterations, *map(_counted, data), folder),
        )
        weights = _check_same_backbone(backbone, folder)
        is_plain = getattr(backbone.model, "is_plain", False)
        if backbone.untrained:
            backbone = replace(backbone, model=copy.deepcopy(backbone.model))  # the caller's stays as it is
            measure_on(backbone, image_files(data[0]), seed)
        backbone = _for_a_pyramid(backbone)
        _check_own(backbone)
        keys, _kept = _of_backbone(backbone, folder, protocol, weights)
        chosen = {
            **(_small_keys() if small else {}),
            **keys,
            **_keys_of_data(*data, iterations),
            "MODEL.BACKBONE.FREEZE_AT": PROTOCOLS[protocol],
            "MODEL.MASK_ON": masks,
            "INPUT.MASK_FORMAT": masks_of(data[0].index) or "polygon",
            "MODEL.DEVICE": device,
            "SEED": seed,
            "OUTPUT_DIR": str(folder),
            **(settings or {}),
        }
        base = "base_rcnn_vit.yaml" if is_plain else "base_rcnn_fpn.yaml"
        cfg, _ = load_cfg(base, [text for key, value in chosen.items() for text in (key, str(value))])
        found = train_net(cfg, engine="torchvision", fast=True, resume=resume)
    rows = {kind: {name: v for name, v in numbers.items() if "AP-" not in name} for kind, numbers in found.items()}
    return Result(found, rows, folder, _notes(cfg, rows, backbone))


def _check_arguments(
    protocol: str, iterations: int, data: Mapping[str, str], settings: Mapping[str, Any] | None
) -> None:
    if protocol not in list(PROTOCOLS):
        raise UserError(f"protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")
    if not isinstance(iterations, int) or iterations < 1:
        raise UserError(f"iterations {iterations!r}: give a whole number of at least 1")
    for key, name in data.items():
        if not isinstance(name, str) or not name:
            raise UserError(f"{key} {name!r}: give a data set by name or path, e.g. 'coco_2017_{key}'")
    if settings is not None and not (isinstance(settings, Mapping) and all(isinstance(key, str) for key in settings)):
        raise UserError(f"settings {settings!r}: give a dict of Detectron2's keys, {{'SOLVER.BASE_LR': 0.01}}")


@contextlib.contextmanager
def _interruptible(folder: Path, is_temporary: bool) -> Iterator[None]:
    """Make a stop by a signal a KeyboardInterrupt; a temporary folder is then removed, as is one without a checkpoint.

    Raises:
        KeyboardInterrupt: with what became of the run.
    """
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (StoppedError, KeyboardInterrupt))
        if is_temporary and (stopped or not (folder / LAST).exists()):
            shutil.rmtree(folder, ignore_errors=True)
        if not stopped:
            raise
        what = error.what if isinstance(error, StoppedError) else "interrupted"
        left = (
            "its temporary folder is removed; output=DIR would keep the run"
            if is_temporary
            else f"{folder} holds the run, and the same call with resume=True continues it"
        )
        raise KeyboardInterrupt(f"{what}; {left}") from None


def _check_same_backbone(backbone: Backbone, folder: Path) -> str:
    """Return the hash of a backbone's weights, untrained ones not yet measured; a new run's folder gets it as a file.

    Raises:
        UserError: the run to be resumed is another backbone's, whose checkpoint would replace this one's weights.
    """
    file, weights = folder / "backbone.sha256", backbone.weights_hash()
    if (folder / LAST).exists() and file.exists() and file.read_text().strip() != weights:
        raise UserError(f"{folder}: holds a run of another backbone than {backbone.name}; give another output")
    with atomic_write(file, "w") as written:
        written.write(f"{weights}\n")
    return weights


def _for_a_pyramid(backbone: Backbone) -> Backbone:
    """Return a ResNet with the CIFAR stem, of strides 1 to 8, on images of a quarter of the size; others as given."""
    if not isinstance(backbone.model, ResNet) or backbone.model.strides["res2"] != 1:
        return backbone
    log.info("%s has the CIFAR stem: its images are averaged over 4 x 4 pixels", backbone.name)
    model = own.OwnBackbone(own.Quarter(backbone.model), backbone.name).eval()
    return replace(backbone, model=model, channels=model.channels)


def _check_own(backbone: Backbone) -> None:
    """Run a module of the user as a detector will, and warn of BatchNorm that was never measured.

    Raises:
        UserError: it takes square images alone, or its maps are not finite.
    """
    if not isinstance(backbone.model, own.OwnBackbone):
        return
    bad = [name for name, map_ in backbone.model.on_oblong().items() if not map_.isfinite().all()]
    if bad:
        raise UserError(
            f"backbone {backbone.name}: its map {bad[0]} of an image of one colour is not finite; check its weights"
        )
    norms = [m for m in backbone.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if any(n.track_running_stats and not n.running_mean.any() and bool((n.running_var == 1).all()) for n in norms):
        log.warning(
            "%s: BatchNorm statistics were never measured (mean 0, variance 1); if its weights are random, "
            "load_backbone(module, untrained=True) has them measured on the training images",
            backbone.name,
        )


def _keys_of_data(train: Dataset, test: Dataset, iterations: int) -> dict[str, Any]:
    return {
        "MODEL.ROI_HEADS.NUM_CLASSES": len(train.index.category_names),
        "DATASETS.TRAIN": (train.name,),
        "DATASETS.TEST": (test.name,),
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": sorted({max(1, round(iterations * share)) for share in (2 / 3, 8 / 9)}),
        "SOLVER.WARMUP_ITERS": min(1000, iterations // 10),
    }


def _counted(*datasets: Dataset) -> str:
    return " and ".join(f"the {len(dataset.index.image_id)} images of {dataset.name}" for dataset in datasets)


def _notes(cfg: CfgNode, rows: Mapping[str, Mapping[str, float]], backbone: Backbone) -> list[str]:
    """Return what is printed below the numbers: what was run, and how to read them."""
    train, test = ([find_dataset(name) for name in names] for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    notes = [
        f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, from {_counted(*train)}; tested on "
        f"{_counted(*test) or 'nothing'}; in {cfg.OUTPUT_DIR}"
    ]
    if any(value != value for numbers in rows.values() for value in numbers.values()):
        notes.append(
            "nan: no such object in the test set (APs, APm, APl: areas below 32 x 32 pixels, up to 96 x 96, above)"
        )
    return [*notes, _how_to_read(backbone)]


def _how_to_read(backbone: Backbone) -> str:
    too_few = "where both are near 0, the iterations are too few: raise them until doubling them changes the AP little"
    if backbone.untrained:
        return f"random weights: the AP that a trained backbone has to exceed in the same call; {too_few}"
    model, name = backbone.model, backbone.facts.get("architecture")
    if isinstance(model, (TimmBackbone, ResNet)):
        other = f'evaluate_detection("random:{model.architecture if isinstance(model, TimmBackbone) else name}", ...)'
    else:
        other = "load_backbone(the same module with random weights, untrained=True)"
    return f"compare with the same call on random weights, {other}: the features add what is above; {too_few}"


def _small_keys() -> dict[str, Any]:
    """The keys of configs/laptop.yaml itself, without those of its base and those that the caller sets."""
    own = {key: one.value for key, one in read_settings(LAPTOP).items() if LAPTOP in one.origin}
    set_here = ("MODEL.DEVICE", "MODEL.BACKBONE.FREEZE_AT", "OUTPUT_DIR", "SEED")
    return {key: value for key, value in own.items() if key not in set_here}


def _run_folder(output: str | Path | None, resume: bool) -> Path:
    if output is None:
        return Path(tempfile.mkdtemp(prefix="loco_det_"))
    folder = Path(output)
    if (folder / "config.yaml").exists() and not resume:
        raise UserError(
            f"{folder}: holds another run; give another output, or remove that folder, or continue with resume=True"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made a folder ({error.strerror}); give another output") from error
    return folder


def _of_backbone(
    backbone: Backbone, folder: Path, protocol: str, label: str
) -> tuple[dict[str, Any], nn.Module | None]:
    """The keys that put a backbone under a detector.

    Its weights are written into `folder`, or a copy is `own.given` by its `label`: the second value, which must be kept
    meanwhile.
    """
    pixels = {
        "INPUT.FORMAT": backbone.order,
        "MODEL.PIXEL_MEAN": list(backbone.mean),
        "MODEL.PIXEL_STD": list(backbone.std),
    }
    model = backbone.model
    if isinstance(model, TimmBackbone):
        weights, known = folder / "backbone.safetensors", Pixels(backbone.order, backbone.mean, backbone.std)
        manifest = describe_timm(model, backbone.facts["source"], known)
        save_backbone(weights, backbone_tensors(model), manifest)
        maps = [] if model.is_plain else FPN_STAGES
        keys = {"MODEL.BACKBONE.NAME": model.architecture, "MODEL.WEIGHTS": str(weights)}
        return {**pixels, **keys, "MODEL.FPN.IN_FEATURES": maps}, None
    if isinstance(model, HfBackbone):
        keys = {"MODEL.BACKBONE.NAME": model.architecture, "MODEL.WEIGHTS": ""}
        return {**pixels, **keys, "MODEL.FPN.IN_FEATURES": [] if model.is_plain else FPN_STAGES}, None
    if isinstance(model, ResNet) and Path(backbone.name).is_file():
        weights = folder / "backbone.pkl"
        stated = None if is_described(backbone.name) else Stated(backbone.order, backbone.mean, backbone.std)
        convert(backbone.name, weights, branch=backbone.branch, stated=stated)
        return {key: setting.value for key, setting in read_settings(weights.with_suffix(".yaml")).items()}, None
    if protocol == "finetune":
        raise UserError(
            f"protocol 'finetune': {backbone.name} has no stages that are known here, of which the first two would be "
            "frozen; use frozen or all, or give its weights as a file"
        )
    maps = [] if getattr(model, "is_plain", False) else FPN_STAGES
    missing = [stage for stage in maps if stage not in backbone.channels]
    if missing:
        raise UserError(
            f"backbone {backbone.name}: has no map {missing[0]}; its maps are {', '.join(backbone.channels)}. Return a "
            f"dict of maps called {', '.join(FPN_STAGES)}, of strides 4, 8, 16 and 32, or one map of stride 16"
        )
    copied = copy.deepcopy(model).requires_grad_(True)  # what is frozen is the protocol's choice alone
    keys = {"MODEL.BACKBONE.NAME": own.given(copied, label), "MODEL.WEIGHTS": "", "MODEL.FPN.IN_FEATURES": maps}
    return {**pixels, **keys}, copied


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
