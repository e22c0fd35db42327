"""OUTPUT_DIR/run.json: a run's inputs, so that a number can be traced to them years later.

Written once, when a run starts; `--resume` does not change it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from loco_det import __version__
from loco_det.annotations.registry import find_dataset
from loco_det.core.distributed import is_main, world_size
from loco_det.core.files import file_sha256, write_json
from loco_det.detection.weights import Weights

_PACKAGES = ("torch", "torchvision", "numpy", "hotcoco", "pycocotools", "opencv-python-headless", "detectron2")
_OF_MANIFEST = ("architecture", "method", "units", "step", "dataset", "images", "channel_order", "tensors_sha256")


def write_record(cfg: CfgNode, engine: str, weights: Weights | None) -> None:
    """Write run.json on the main process.

    Args:
        cfg: the effective configuration, with the drawn seed.
        engine: the engine's name.
        weights: the content of MODEL.WEIGHTS; None for random initialisation.
    """
    if not is_main():
        return
    found = None
    if weights is not None:
        manifest = {} if weights.manifest is None else {k: getattr(weights.manifest, k) for k in _OF_MANIFEST}
        found = {**_file(weights.path, file_sha256(weights.path)), **manifest, "new_heads": weights.new_heads}
    record = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "engine": engine,
        "seed": cfg.SEED,
        "weights": found,
        "datasets": {name: _data_set(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)},
        "environment": environment(torch.device(cfg.MODEL.DEVICE)),
    }
    write_json(Path(cfg.OUTPUT_DIR) / "run.json", record)


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and machine, as plain data."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "loco_det": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _data_set(name: str) -> dict[str, Any]:
    """Return a data set's files, with the annotation hash from their index."""
    dataset = find_dataset(name)
    return {**_file(dataset.annotations, dataset.index.file.sha256), "images": str(dataset.images.absolute())}


def _file(path: Path, sha256: str) -> dict[str, Any]:
    return {"path": str(path.absolute()), "bytes": path.stat().st_size, "sha256": sha256}
