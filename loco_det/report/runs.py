"""Finds runs and reads their files for a report; computes nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loco_det.annotations.registry import find_dataset
from loco_det.backbones.artifact import HEADER_KEY, decode_manifest
from loco_det.backbones.own import OTHER_BACKBONES, WITH_WEIGHTS
from loco_det.core.config import read_yaml
from loco_det.core.errors import UserError
from loco_det.core.files import has_checksum, read_regular
from loco_det.core.run_folder import check_sums
from loco_det.report.schemas import DETECTOR_KEYS, LINE, PROBES, ProbeWeights, Record, check

# Keys in which runs of one experiment may differ: machine, seed, and the backbone's own.
_FREE = (
    "OUTPUT_DIR",
    "SEED",
    "VIS_PERIOD",
    "CUDNN_BENCHMARK",
    "DATALOADER.NUM_WORKERS",
    "INPUT.FORMAT",
    "MODEL.DEVICE",
    "MODEL.PIXEL_MEAN",
    "MODEL.PIXEL_STD",
    "MODEL.WEIGHTS",
    "MODEL.RESNETS.DEPTH",
    "MODEL.RESNETS.NUM_GROUPS",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
)
MEASURES = ("/AP", "/IoU")  # suffixes of a detector's main scores in metrics.json
_PLAIN_NAMES = ("backbone", "backbone_d2", "model_final", "model")  # of weights files; the folder's name says more
_PROBE_BYTES = 4 << 20  # no probe's JSON is larger
_OF_A_PROBE = (b'_interval"', b'"batchnorm"')  # keys that only a probe writes into one file


@dataclass
class DetectorRun:
    """One run of `loco-det train`.

    Attributes:
        backbone: its name in the report.
        path: its folder.
        config: every key of config.yaml, "MODEL.MASK_ON" -> True.
        metrics: the lines of metrics.json.
        record: run.json, or None.
    """

    backbone: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(repr=False)
    record: dict[str, Any] | None = field(repr=False)

    @property
    def seed(self) -> int:
        return (self.record or {}).get("seed", self.config["SEED"])

    @property
    def is_segmentor(self) -> bool:
        return self.config["MODEL.META_ARCHITECTURE"] == "SemanticSegmentor"

    @property
    def is_other(self) -> bool:
        """Whether its backbone is no ResNet but timm's or the user's own."""
        return self.config["MODEL.BACKBONE.NAME"].startswith(OTHER_BACKBONES)

    @property
    def form(self) -> str:
        """FPN, the simple feature pyramid of a plain transformer, or a ResNet's C4 or DC5."""
        c = self.config
        if self.is_other:
            stages = c.get("MODEL.FPN.IN_FEATURES") or []
            return "FPN" if any(str(name).startswith("res") for name in stages) else "simple pyramid"
        if "fpn" in c["MODEL.BACKBONE.NAME"]:
            return "FPN"
        return "DC5" if c["MODEL.RESNETS.RES5_DILATION"] > 1 else "C4"

    @property
    def experiment(self) -> dict[str, Any]:
        """The keys that must agree for numbers to be comparable."""
        agreed = {key: value for key, value in self.config.items() if key not in _FREE}
        if self.is_other:  # backbones are what a report compares
            agreed["MODEL.BACKBONE.NAME"] = ""
        return agreed

    @property
    def title(self) -> str:
        """A readable title of the experiment."""
        c = self.config
        kind = "Mask R-CNN" if c["MODEL.MASK_ON"] else "Faster R-CNN"
        if c["MODEL.META_ARCHITECTURE"] == "ProposalNetwork":
            kind = "RPN"
        elif self.is_segmentor:
            kind = "Semantic segmentation"
        elif c["MODEL.ROI_HEADS.NAME"] == "CascadeROIHeads":
            kind = f"Cascade {kind}"
        frozen = c["MODEL.BACKBONE.FREEZE_AT"]
        above = f"stage {frozen}" if self.is_other else f"res{frozen}"
        state = "frozen" if frozen >= 5 else f"fine-tuned above {above}" if frozen >= 2 else "fine-tuned"
        data = ", ".join(c["DATASETS.TRAIN"])
        return f"{kind} {self.form}, {state}, {data}, {c['SOLVER.MAX_ITER']} iterations of {c['SOLVER.IMS_PER_BATCH']}"

    @property
    def recorded(self) -> dict[str, float | None]:
        """The numbers of the last evaluation, "bbox/AP" -> percent; empty without one."""
        for line in reversed(self.metrics):
            found = {
                key: value for key, value in line.items() if any(kind in key for kind in ("/AP", "/AR", "sem_seg/"))
            }
            if found:
                return found
        return {}

    @property
    def results(self) -> Path:
        """The path of the detections, or of a segmentor's folder of labels; it may be missing."""
        return self.path / "inference" / ("sem_seg" if self.is_segmentor else "coco_instances_results.json")

    @property
    def annotations(self) -> Path | None:
        """The COCO ground truth, if the run is evaluated on one data set that still exists."""
        names = self.config["DATASETS.TEST"]
        if len(names) != 1:
            return None
        recorded = ((self.record or {}).get("datasets") or {}).get(names[0])
        if recorded and Path(recorded["path"]).is_file():
            return Path(recorded["path"])
        try:
            return find_dataset(names[0]).annotations
        except UserError:
            return None


@dataclass
class PretrainRun:
    """One run of `loco-det pretrain`.

    Attributes:
        backbone, path, config, metrics: as in `DetectorRun`.
        images: number of training images, from its backbone's manifest; None without one.
    """

    backbone: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]] = field(repr=False)
    images: int | None = None

    @property
    def steps_per_epoch(self) -> int | None:
        """Whole batches per epoch; None if the number of images is unknown."""
        batch = self.config.get("SOLVER.BATCH_SIZE")
        return self.images // batch or None if self.images and isinstance(batch, int) and batch > 0 else None


@dataclass
class Probe:
    """A file of `loco-det probe --json`; `content` has "stages" and "protocol".

    `named`: the user gave the backbone's name.
    `measure`: the key of each stage's number in percent, "top1" or "miou".
    """

    backbone: str
    path: Path
    content: dict[str, Any]
    measure: str
    named: bool = False

    def facts(self, part: str) -> dict[str, Any]:
        """Return its record of "data" or "backbone"."""
        found = self.content.get(part)
        return found if isinstance(found, dict) else {}

    @property
    def protocol(self) -> str:
        """The protocol and what else numbers must have in common: a recipe that is no default, method and pixels."""
        name, recipe = str(self.content.get("protocol", "")), self.content.get("recipe", "sweep")
        features = self.content.get("features")
        if self.measure == "miou" and isinstance(features, dict):
            return f"{name} ({self.content.get('method')}, {features.get('image_size')} pixels)"
        return name if recipe == "sweep" else f"{name} ({recipe} recipe)"

    @property
    def weights(self) -> str | None:
        return self.facts("backbone").get("weights_sha256")

    @property
    def data(self) -> str:
        """A description of the images; numbers for other images are not comparable."""
        name, images = Path(str(self.facts("data").get("path") or "")).name, self.facts("data").get("train_images")
        return f"{name}, {images} images" if images else name


@dataclass
class Runs:
    """Everything found, in the order of the arguments."""

    detectors: list[DetectorRun] = field(default_factory=list)
    pretrainings: list[PretrainRun] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)

    def backbones(self) -> list[str]:
        return list(dict.fromkeys(run.backbone for run in [*self.detectors, *self.pretrainings, *self.probes]))


def find_runs(arguments: Sequence[str]) -> Runs:
    """Find every run in the given places.

    Args:
        arguments: PATH or NAME=PATH; a run's folder, a folder with runs below it at any depth, or a probe's JSON.
            NAME is the backbone's name for everything found there.

    Raises:
        UserError: a path that does not exist or holds no run, an invalid file of a run, or two runs of one name and
            seed with different backbones. (Probes to which the user gave one name may be of several pretraining runs.)
    """
    runs = Runs()
    seen: set[str] = set()
    for argument in arguments:
        name, path = _split(argument)
        if not path.exists():
            raise UserError(f"{path}: there is no such run; give folders of loco-det train, pretrain or probe results")
        before = len(seen)
        for place in _places(path):
            if (real := os.path.realpath(place)) not in seen:
                seen.add(real)
                _read(place, name, runs)
        if len(seen) == before:
            raise UserError(
                f"{path}: holds no run: neither a config.yaml beside metrics.json or run.json nor a probe's JSON, at "
                "any depth"
            )
    _check_names(runs)
    return runs


def _split(argument: str) -> tuple[str | None, Path]:
    name, equals, path = argument.partition("=")
    if equals and name and not Path(argument).exists():
        return name, Path(path)
    return None, Path(argument)


def _places(path: Path) -> Iterator[Path]:
    """Yield config.yaml files and probes' JSON files at or below `path`."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        # run.json exists from a run's start on.
        beside = (file.with_name(name) for name in ("metrics.json", "run.json"))
        if (file.name == "config.yaml" and any(map(Path.is_file, beside))) or _is_probe(file):
            yield file


def _is_probe(file: Path) -> bool:
    if file.suffix != ".json" or file.name == "metrics.json" or not file.is_file():
        return False
    if file.stat().st_size >= _PROBE_BYTES:
        return False
    # `_read` refuses what has the keys alone.
    return _measured(_json(file)) is not None or all(key in read_regular(file) for key in _OF_A_PROBE)


def _measured(content: dict[str, Any] | None) -> str | None:
    """Return the measure that every stage of a probe has; None for what is no probe."""
    stages = (content or {}).get("stages")
    if not stages or not isinstance(stages, dict):
        return None
    found = [stage if isinstance(stage, dict) else {} for stage in stages.values()]
    return next((name for name in PROBES if all(isinstance(one.get(name), (int, float)) for one in found)), None)


def _json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(read_regular(file))
    except (ValueError, OSError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read(place: Path, name: str | None, runs: Runs) -> None:
    if place.suffix == ".json":
        content = _json(place)
        measure = _measured(content)
        if content is None or measure is None:
            raise UserError(f"{place}: is no result of loco-det probe; write one with loco-det probe ... --json PATH")
        if "sha256" in content and not has_checksum(content):
            raise UserError(f"{place}: is not what loco-det probe wrote; take an intact copy, or delete its key sha256")
        check(content, PROBES[measure], place)
        probe = Probe(name or "", place, content, measure, named=name is not None)
        facts = probe.facts("backbone")
        check(facts, ProbeWeights, place)
        ours = {"method": facts.get("source")} if str(facts.get("name")).endswith(".safetensors") else None
        probe.backbone = name or _name_of(str(facts.get("name") or place.stem), ours)
        runs.probes.append(probe)
        return
    folder = place.parent
    check_sums(folder)
    config = dict(_flatten(read_yaml(place)))
    metrics = _lines(folder / "metrics.json")
    if "MODEL.META_ARCHITECTURE" in config:
        lacking = [key for key in DETECTOR_KEYS if key not in config]
        if lacking:
            raise UserError(f"{place}: lacks {lacking[0]}; give a run's folder, whose config.yaml has every key")
        for key, kind in DETECTOR_KEYS.items():
            check(config[key], kind, f"{place}: {key}")
        record = _record(folder / "run.json")
        label = name or _name_of(source_of_weights(config), (record or {}).get("weights"))
        runs.detectors.append(DetectorRun(label, folder, config, metrics, record))
    elif "METHOD" in config:
        check(config["METHOD"], str, f"{place}: METHOD")
        images = _images(folder / "backbone.safetensors")
        runs.pretrainings.append(PretrainRun(name or config["METHOD"], folder, config, metrics, images))


def _record(file: Path) -> dict[str, Any] | None:
    """Read run.json; None if there is none."""
    if not file.is_file():
        return None
    content = _json(file)
    check(content, Record, file, "take an intact copy, or remove it")
    return content


def _images(backbone: Path) -> int | None:
    """Return the number of images a backbone was pretrained on, from its manifest only."""
    try:
        with safe_open(backbone, framework="pt") as file:
            header = (file.metadata() or {})[HEADER_KEY]
        return decode_manifest(header, backbone).images
    except (SafetensorError, OSError, KeyError, UserError):
        return None


def _lines(file: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.json, [] if it is missing; an incomplete last line is dropped."""
    found: list[dict[str, Any]] = []
    if not file.is_file():
        return found
    try:
        lines = read_regular(file).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); take an intact copy") from error
    for number, line in enumerate(lines, 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{file}: line {number} is no JSON object ({error}); take an intact copy") from error
            continue
        check(found[-1], LINE, f"{file}: line {number}")
    return found


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def source_of_weights(config: Mapping[str, Any]) -> str:
    """Return MODEL.WEIGHTS, or the backbone's name if it brings its weights itself; "" for random ones."""
    network = config["MODEL.BACKBONE.NAME"]
    return config["MODEL.WEIGHTS"] or (network if network.startswith(WITH_WEIGHTS) else "")


def _name_of(weights: str, record: dict[str, Any] | None) -> str:
    """Return a backbone's name if the user gave none: its method, else its file's name."""
    if record and record.get("method"):
        return record["method"]
    if not weights:
        return "from scratch"
    if weights.startswith(WITH_WEIGHTS):
        return re.sub(r"(given-\w{8})\w+", r"\1", weights)  # of a module given from Python: its hash
    path = Path(weights)
    return path.parent.name if path.stem in _PLAIN_NAMES and path.parent.name else path.stem


def _check_names(runs: Runs) -> None:
    """Check that no two different backbones share a name."""
    known: dict[tuple, DetectorRun] = {}
    for run in runs.detectors:
        key = (run.backbone, run.seed, json.dumps(run.experiment, sort_keys=True, default=str))
        other = known.setdefault(key, run)
        if other is not run and _weights(other) != _weights(run):
            raise UserError(
                f"{other.path} and {run.path} are both called {run.backbone!r}, with the same seed and different "
                f"weights; name them apart, for instance A={other.path} B={run.path}"
            )

    probes: dict[tuple, Probe] = {}
    for probe in runs.probes:
        for stage in probe.content["stages"]:
            key = (probe.backbone, probe.protocol, probe.data, probe.content.get("seed"), stage)
            other = probes.setdefault(key, probe)
            if other.weights != probe.weights and not (other.named and probe.named):
                raise UserError(
                    f"{other.path} and {probe.path} are both of {probe.backbone!r}, with the same seed and different "
                    f"weights; name them, for instance A={other.path} B={probe.path}, or alike to have their mean"
                )


def _weights(run: DetectorRun) -> str:
    return ((run.record or {}).get("weights") or {}).get("sha256") or source_of_weights(run.config)


def last_scores(folder: Path) -> dict[str, float] | None:
    """Return the last line of metrics.json with AP or IoU as {"bbox/AP": percent, ...}; None without a sound one."""
    try:
        lines = read_regular(folder / "metrics.json").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            return None  # a damaged last evaluation is none
        if isinstance(values, dict) and any(name.endswith(MEASURES) for name in values):
            return {name: value for name, value in values.items() if "/AP" in name or "sem_seg/" in name}
    return None
