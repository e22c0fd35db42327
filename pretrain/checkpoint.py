"""Training state for --resume; the backbone that others read is a separate file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from loco_det.errors import UserError
from loco_det.runtime import atomic_write

KEPT = 2  # the newest, and the one before in case the newest is lost


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write folder/checkpoint_STEP.pth atomically; drop all but the newest two, and what a kill left half-written.

    Args:
        state: tensors, numbers, strings and containers of them, among them "step".
    """
    path = folder / f"checkpoint_{state['step']:08d}.pth"
    with atomic_write(path) as file:
        torch.save(state, file)
    for old in [*sorted(folder.glob("checkpoint_*.pth"))[:-KEPT], *folder.glob(".checkpoint_*.tmp")]:
        old.unlink()
    return path


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state on the CPU, or None.

    Raises:
        UserError: it is damaged; the message names it and the one before.
    """
    paths = sorted(folder.glob("checkpoint_*.pth"))
    if not paths:
        return None
    try:
        return paths[-1], torch.load(paths[-1], map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        before = f"resume from {paths[-2].name}" if len(paths) > 1 else "start again"
        raise UserError(f"{paths[-1]}: damaged ({type(error).__name__}); delete it to {before}") from error
