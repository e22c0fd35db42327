"""Training state for --resume; the backbone for other commands is a separate file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loco_det.convert.load import left_out, load_tensors
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, os_errors

KEPT = 2  # the newest, and the previous one as a backup
EARLIER = "earlier_run_"  # prefix of an earlier run's checkpoints, which are not resumed from
KEYS = {"learner", "optimizer", "scaler", "step", "images", "config_hash"}


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write folder/checkpoint_STEP.pth atomically; deletes all but it and the previous one, and an earlier run's.

    Args:
        state: the entries in `KEYS`: tensors, numbers, strings and containers of them.
    """
    path = folder / f"checkpoint_{state['step']:08d}.pth"
    with atomic_write(path) as file:
        torch.save(state, file)
    drop_old_checkpoints(folder)
    return path


def drop_old_checkpoints(folder: Path) -> None:
    """Delete all checkpoints but the `KEPT` newest, and an earlier run's."""
    found = sorted(folder.glob("checkpoint_*.pth"))
    with os_errors(folder):
        for old in [*found[:-KEPT], *folder.glob(f"{EARLIER}checkpoint_*.pth")]:
            old.unlink(missing_ok=True)


def retire_checkpoints(folder: Path) -> None:
    """Rename an earlier run's checkpoints, so that --resume does not mistake them for the new run's.

    They are kept until the new run has its own.
    """
    with os_errors(folder):
        for path in folder.glob("checkpoint_*.pth"):
            path.replace(path.with_name(f"{EARLIER}{path.name}"))


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint and its state on the CPU, or None.

    Raises:
        UserError: damaged or not a checkpoint; names it and the previous one.
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
