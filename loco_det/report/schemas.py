"""What a run's files must hold for a report to use them: each is judged once, when it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from loco_det.core.errors import UserError

Number = int | float


class Weights(msgspec.Struct):
    """Of run.json, what MODEL.WEIGHTS held."""

    path: str | None = None
    sha256: str | None = None
    method: str | None = None


class DataSet(msgspec.Struct):
    """Of run.json, the files of a data set."""

    path: str
    sha256: str
    images: str | None = None


class Environment(msgspec.Struct):
    """Of run.json, versions and machine."""

    loco_det: str
    python: str
    system: str
    packages: dict[str, str | None]
    device: str
    processes: int


class Record(msgspec.Struct):
    """run.json."""

    seed: int | msgspec.UnsetType = msgspec.UNSET
    started: str | None = None
    engine: str | None = None
    weights: Weights | None = None
    datasets: dict[str, DataSet] | None = None
    environment: Environment | None = None


class Accuracy(msgspec.Struct):
    """Of a probe of classes, one stage or one share of labels."""

    top1: Number
    top1_interval: tuple[Number, Number] | None = None
    by_percent: dict[str, Accuracy] = {}


class MeanIoU(msgspec.Struct):
    """Of a segmentation probe, one stage."""

    miou: Number
    miou_interval: tuple[Number, Number] | None = None


class ProbeResult(msgspec.Struct, kw_only=True):
    """What `loco-det probe --json` writes."""

    stages: dict[str, Accuracy]
    protocol: str | None = None
    recipe: str | None = None
    seed: int | None = None


class SegmentationProbeResult(ProbeResult, kw_only=True):
    """What `loco-det probe --protocol segmentation --json` writes."""

    stages: dict[str, MeanIoU]
    method: str | None = None


PROBES = {"top1": ProbeResult, "miou": SegmentationProbeResult}  # by what they measure


class ProbeWeights(msgspec.Struct):
    """Of a probe, its backbone."""

    name: str | None = None
    source: str | None = None
    weights_sha256: str | None = None


# Keys of a detector's config.yaml without which it is none that a run has left.
DETECTOR_KEYS: dict[str, Any] = {
    "DATASETS.TEST": list[str],
    "DATASETS.TRAIN": list[str],
    "MODEL.BACKBONE.FREEZE_AT": int,
    "MODEL.BACKBONE.NAME": str,
    "MODEL.MASK_ON": bool,
    "MODEL.META_ARCHITECTURE": str,
    "MODEL.RESNETS.RES5_DILATION": int,
    "MODEL.ROI_HEADS.NAME": str,
    "MODEL.WEIGHTS": str,
    "SEED": int,
    "SOLVER.IMS_PER_BATCH": int,
    "SOLVER.MAX_ITER": int,
}
LINE = dict[str, Number | None]  # of metrics.json


def check(value: Any, kind: Any, where: Path | str, remedy: str = "take an intact copy") -> None:
    """Refuse with UserError plain data that is not of a type; `where` is the file, or a part of it."""
    try:
        msgspec.convert(value, kind)
    except (ValueError, OverflowError) as error:  # the former also where text cannot be encoded
        raise UserError(f"{where}: is damaged ({error}); {remedy}") from None
