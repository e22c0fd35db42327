"""Training state for --resume; the backbone that others read is a separate file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loco_det.convert.load import left_out, load_tensors
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, os_errors

KEPT = 2  # the newest, and the one before in case the newest is lost
EARLIER = "earlier_run_"  # begins the names of an earlier run's, from which nothing resumes
KEYS = {"learner", "optimizer", "scaler", "step", "images", "config_hash"}


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write folder/checkpoint_STEP.pth atomically; drop all but it and the one before, and an earlier run's.

    Args:
        state: what `KEYS` names, as tensors, numbers, strings and containers of them.
    """
    path = folder / f"checkpoint_{state['step']:08d}.pth"
    with atomic_write(path) as file:
        torch.save(state, file)
    found = sorted(folder.glob("checkpoint_*.pth"))
    for old in [*found[:-KEPT], *folder.glob(f"{EARLIER}checkpoint_*.pth")]:
        old.unlink()
    return path


def retire_checkpoints(folder: Path) -> None:
    """A run begins anew: rename the checkpoints of an earlier one, so that no --resume takes its state for this run's.

    They stay until this run has one of its own.
    """
    with os_errors(folder):
        for path in folder.glob("checkpoint_*.pth"):
            path.replace(path.with_name(f"{EARLIER}{path.name}"))


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state on the CPU, or None.

    Raises:
        UserError: it is damaged or of something else; the message names it and the one before.
    """
    paths = sorted(folder.glob("checkpoint_*.pth"))
    if not paths:
        return None
    before = f"resume from {paths[-2].name}" if len(paths) > 1 else "start again"
    try:
        state = load_tensors(paths[-1])
    except UserError as error:
        reason = str(error).removeprefix(f"{paths[-1]}: ").partition(";")[0]
        raise UserError(
            f"{paths[-1]}: damaged, or not a training state of loco-det pretrain ({reason}); delete it to {before}"
        ) from error
    if not state.keys() >= KEYS or left_out(state):
        raise UserError(f"{paths[-1]}: not a training state of loco-det pretrain; move it away to {before}")
    return paths[-1], state
