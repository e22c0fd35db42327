"""Checkpoints in OUTPUT_DIR, in Detectron2's layout: model_0004999.pth, model_final.pth and `last_checkpoint`.

A file holds {"model", "optimizer", "scheduler", "iteration", ...}, and the same state under "trainer" as Detectron2's
DefaultTrainer nests it (tensors are stored once), so that each program can resume the other's run. "iteration" is the
last one finished, counted from 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.checkpoint import PeriodicCheckpointer
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from loco_det.annotations.registry import find_dataset
from loco_det.convert.load import left_out
from loco_det.core.distributed import is_main
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, os_errors
from loco_det.core.log import log
from loco_det.core.run_folder import differences, summary
from loco_det.detection.solver import Schedule
from loco_det.detection.weights import Weights, apply_weights, pixel_facts, read_weights

LAST = "last_checkpoint"
FREE_IN_EVALUATION = ("DATALOADER.", "DATASETS.", "INPUT.", "SOLVER.", "SEED", "VERSION")
IDENTITY = ("config", "annotations")
_LOGGED = ("MODEL.WEIGHTS", "SOLVER.MAX_ITER", "SOLVER.STEPS")  # may differ, with a line in the log
# Keys that may differ on resuming: where and how fast it runs, how long, and testing.
FREE_KEYS = (
    "OUTPUT_DIR",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.TEST",
    "DATASETS.PROPOSAL_FILES_TEST",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "TEST.",
    "CUDNN_BENCHMARK",
    "DETERMINISTIC",
    "FLOAT32_PRECISION",
    "VIS_PERIOD",
)


@dataclass
class Checkpointer:
    """Saves and restores one training run; `note` is extra state that the run stores."""

    cfg: CfgNode
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    note: dict[str, Any]
    path_manager: None = None  # required by fvcore for deleting files, which never happens here

    def save(self, name: str, iteration: int) -> Path:
        """Write OUTPUT_DIR/`name`.pth atomically, and update `last_checkpoint`."""
        path = Path(self.cfg.OUTPUT_DIR) / f"{name}.pth"
        optimizer, schedule = self.optimizer.state_dict(), self.schedule.state_dict()
        trainer = {"iteration": iteration, "optimizer": optimizer}
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": optimizer, "scheduler": schedule}
        if self.scaler.is_enabled():
            state["grad_scaler"] = trainer["grad_scaler"] = self.scaler.state_dict()
        state["iteration"] = iteration
        state["trainer"] = {"iteration": iteration, "hooks": {"LRScheduler": schedule}, "_trainer": trainer}
        state["loco_det"] = {"pixels": pixel_facts(self.cfg), **self.note}
        if is_main():
            with atomic_write(path) as file:
                torch.save(state, file)
            with atomic_write(path.with_name(LAST), "w") as file:
                file.write(path.name)
            log.info("saved %s", path)
        return path

    def periodic(self) -> PeriodicCheckpointer:
        """Return a checkpointer for every SOLVER.CHECKPOINT_PERIOD iterations and, as model_final, the last."""
        if self.cfg.SOLVER.CHECKPOINT_PERIOD < 1:
            raise UserError(f"SOLVER.CHECKPOINT_PERIOD is {self.cfg.SOLVER.CHECKPOINT_PERIOD}; give at least 1.")
        return PeriodicCheckpointer(self, self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.SOLVER.MAX_ITER)

    def restore(self, weights: Weights, drawn: bool = False) -> int:
        """Restore a run from its checkpoint; returns the iteration to continue with.

        Args:
            drawn: this run's SEED was drawn, not set by the user, so it may differ.

        Raises:
            UserError: the file has no training state, or another configuration, data, model or optimiser.
        """
        state = training_state(weights)
        check_same_run(weights.path, state.get("loco_det") or {}, self.note, ("SEED",) if drawn else ())
        apply_weights(self.model, weights, self.cfg)
        try:
            self.optimizer.load_state_dict(_own(state["optimizer"]))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{weights.path}: its optimiser state does not fit ({error}); resume with the configuration the run "
                "was started with."
            ) from error
        # This run chooses the fast or exact optimiser; the state's groups have the writer's choice.
        for group in self.optimizer.param_groups:
            group.update({name: self.optimizer.defaults[name] for name in ("foreach", "fused")})
        self.schedule.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state.get("grad_scaler"):
            self.scaler.load_state_dict(state["grad_scaler"])
        kept = {k: v for k, v in (state.get("loco_det") or {}).items() if k not in ("pixels", *IDENTITY)}
        self.note.update(kept)
        return int(state["iteration"]) + 1


def identity(cfg: CfgNode) -> dict[str, Any]:
    """Return the identity of a run that its checkpoints store: its configuration, and the hash of its training data."""
    found = {name: find_dataset(name).index.file.sha256 for name in cfg.DATASETS.TRAIN}
    return dict(zip(IDENTITY, (cfg.dump(), found)))


def check_same_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], free: Sequence[str] = ()) -> None:
    """Refuse to resume another run's checkpoint; Detectron2's and older ones have no identity.

    Args:
        path: the checkpoint, for messages.
        before: its `identity`, possibly incomplete.
        now: this run's.
        free: keys that may differ besides `FREE_KEYS`.

    Raises:
        UserError: other keys differ, or a training set's annotations.
    """
    advice = "resume with the original ones, or start a new run in another OUTPUT_DIR"
    annotations = before.get("annotations")
    if annotations:  # the same annotations may have another path
        free = (*free, "DATASETS.TRAIN")
    if isinstance(before.get("config"), str):
        one, other = (yaml.safe_load(text) for text in (before["config"], now["config"]))
        found = differences(one, other, (*FREE_KEYS, *free))
        if found:
            raise UserError(f"{path} is a checkpoint of another configuration ({summary(found)}); {advice}.")
        if found := differences(one, other, [key for key in FREE_KEYS if key not in _LOGGED]):
            log.info("resuming with a changed configuration: %s", summary(found))
    if annotations and now.get("annotations") and list(annotations.values()) != list(now["annotations"].values()):
        names = ", ".join(now["annotations"])
        raise UserError(f"{path} is of a run on other annotations than those of {names}; {advice}.")


def retire_checkpoints(output_dir: str | Path) -> None:
    """Start a run anew: an earlier run's checkpoints stay, but --resume does not find them."""
    if is_main() and (Path(output_dir) / LAST).exists():
        log.warning(
            "%s holds a run already; this one begins anew in its place, and --resume continues a run", output_dir
        )
        with os_errors(output_dir):
            (Path(output_dir) / LAST).unlink()


def training_state(weights: Weights) -> dict[str, Any]:
    """Return optimiser, schedule and iteration of our checkpoint or of Detectron2's DefaultTrainer.

    Raises:
        UserError: the file has no training state.
    """
    state = dict(weights.state or {})
    trainer = state.get("trainer")
    if "optimizer" not in state and isinstance(trainer, dict):
        inner = trainer.get("_trainer", {})
        state.update({key: inner[key] for key in ("optimizer", "grad_scaler") if key in inner})
        state["scheduler"] = trainer.get("hooks", {}).get("LRScheduler")
        state["iteration"] = trainer.get("iteration")
    kinds = {"optimizer": dict, "scheduler": dict, "iteration": int}
    lacking = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    if not lacking and left_out({key: state[key] for key in kinds}):
        raise UserError(f"{weights.path}: has objects in its training state; start anew with it as MODEL.WEIGHTS.")
    if lacking:
        raise UserError(f"{weights.path}: has no {lacking[0]} to resume from; start anew with it as MODEL.WEIGHTS.")
    return state


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the file named in OUTPUT_DIR/last_checkpoint; None if no run has saved there.

    Raises:
        UserError: the named file is missing.
    """
    pointer = Path(output_dir) / LAST
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text(errors="replace").strip()
    if not os.path.isfile(path):
        raise UserError(
            f"{pointer} names {path.name}, which is gone; write the name of an existing checkpoint into it."
        )
    return path


def read_last(output_dir: str | Path) -> Weights | None:
    """Read the last checkpoint of OUTPUT_DIR; None if there is none."""
    path = last_checkpoint(output_dir)
    return read_weights(path) if path else None


def _own(value: Any) -> Any:
    """Copy a value so that its tensors no longer share the mapped file."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_own(item) for item in value)
    return value
