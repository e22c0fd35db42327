"""loco_det: how good is this backbone for detection and segmentation?"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate_detection", "load_backbone", "probe"]


def __getattr__(name: str) -> Any:
    """Import the functions of `loco_det.api` when they are asked for, because they import torch."""
    if name in __all__:
        return getattr(importlib.import_module("loco_det.api"), name)
    raise AttributeError(f"module 'loco_det' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
