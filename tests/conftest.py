"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start: several tests at once, each with a
# thread for every core, wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Commands that tests start find this package compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

# `pytest -m quick`: the method, the losses, the detector's arithmetic, conversion, the house rules; under a minute.
QUICK = (
    "test_architecture.py",
    "test_artifact.py",
    "test_backbone.py::test_every_stage_equals_torchvisions_in_float64[resnet18]",
    "test_detection_anchors.py",
    "test_detection_boxes.py",
    "test_detection_golden.py",
    "test_detection_masks.py",
    "test_loss.py",
    "test_pretrain_decoders.py",
    "test_pretrain_optim.py",
    "test_loco.py::test_every_gradient_equals_that_of_the_units_run_alone",
    "test_paper_rows.py::test_units_decoder_and_sharing_are_the_papers",
    "test_convert_proof.py::test_features_equal_those_of_timm",
    "test_convert_proof.py::test_the_proof",
)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if any(f"/{item.nodeid}".startswith((f"/tests/{name}", f"/{name}")) for name in QUICK):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A test that runs a command sets up logging; the next one must not find that, nor write into a closed stream."""
    log = logging.getLogger("loco_det")
    handlers = list(log.handlers)
    yield
    for handler in [h for h in log.handlers if h not in handlers]:
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.NOTSET)
    log.propagate, log.disabled = True, False
    if log := sys.modules.get("loco_det.core.log"):
        log._quiet = False


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither use nor fill the user's cache of annotation indexes, nor do processes that they start."""
    os.environ["LOCO_DET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """The dataset root that holds `coco/`, or a skip where no real images are."""
    root = datasets_root()
    if not (root / "coco" / "annotations" / "instances_val2017.json").is_file():
        pytest.skip(f"no real COCO images under {root} (set DETECTRON2_DATASETS)")
    return root


def datasets_root() -> Path:
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).absolute()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equality to the last bit may be asked for."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data sets `tiny_train` and `tiny_val`, where every reader finds them; their root."""
    from tiny_detection import write_tiny

    root = write_tiny(tmp_path_factory.mktemp("data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        yield root


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight images of 24 pixels in two class folders, to be read only."""
    import cv2
    import numpy as np

    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for i in range(8):
        (folder / str(i % 2)).mkdir(exist_ok=True)
        cv2.imwrite(str(folder / str(i % 2) / f"{i}.png"), rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    return folder


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `python` and `loco-det`, which start at once: torch is there already (preloaded.py)."""
    root = Path(__file__).resolve().parent.parent
    folder = tmp_path_factory.mktemp("bin")
    served = [str(root / "tests" / "preloaded.py"), str(folder / "socket")]
    for name, module in (("python", ""), ("loco-det", "-m loco_det.cli ")):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{served[0]}" "{served[1]}" run {module}"$@"\n')
        command.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *served], stdin=subprocess.PIPE, env=environment) as server:
        while not (folder / "socket").exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield folder
        server.stdin.close()
