"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start: several tests at once, each with a
# thread for every core, wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """The dataset root that holds `coco/`, or a skip where no real images are."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute()
    if not (root / "coco" / "annotations" / "instances_val2017.json").is_file():
        pytest.skip(f"no real COCO images under {root} (set DETECTRON2_DATASETS)")
    return root
