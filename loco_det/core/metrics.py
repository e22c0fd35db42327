"""What a run measures while it runs: OUTPUT_DIR/metrics.json, and the same numbers in TensorBoard and W&B."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from loco_det.core.distributed import is_main
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, os_errors
from loco_det.core.log import is_quiet, log

_event_files: dict[str, Any] = {}  # TensorBoard's writers of the runs in this process, by folder
_wandb_runs: dict[str, Any] = {}  # W&B's, likewise
_noted: set[str] = set()  # the folders whose note names the W&B run above


def append_metrics(output_dir: str | Path, values: dict[str, Any]) -> None:
    """Add one JSON object as a line to OUTPUT_DIR/metrics.json, as Detectron2 does; only on the main process.

    A value that is not finite is written as null, so that every line stays valid JSON. Where tensorboard is
    installed, numbers of a line that has an iteration also go to an event file in the same folder. Inside `wandb_run`
    all numbers go to W&B, those of a line without iteration into the run's summary.
    """
    if not is_main():
        return
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    with os_errors(output_dir), open(Path(output_dir) / "metrics.json", "a") as file:
        file.write(json.dumps(clean) + "\n")
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    board = _event_file(output_dir) if "iteration" in values else None
    if board is not None:
        for name, value in numbers.items():
            if name != "iteration":
                board.add_scalar(name, value, values["iteration"])
        board.flush()
    run = _wandb_runs.get(_key(output_dir))
    if run is not None and "iteration" in values:
        run.log(numbers)
        _note_wandb_run(output_dir, run.id)
    elif run is not None:
        run.summary.update(numbers)


def trim_metrics(output_dir: str | Path, iteration: int) -> None:
    """Before continuing at `iteration`, drop what OUTPUT_DIR/metrics.json and TensorBoard say of it and later.

    W&B takes nothing back: such iterations stand there twice.
    """
    path = Path(output_dir) / "metrics.json"
    if not is_main() or not path.exists():
        return
    _event_file(output_dir, iteration)
    kept = [line for line in path.read_text().splitlines(keepends=True) if _iteration(line) < iteration]
    with atomic_write(path, "w") as file:
        file.writelines(kept)


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill in the middle of the line


def _key(output_dir: str | Path) -> str:
    return str(Path(output_dir).resolve())


def _event_file(output_dir: str | Path, start: int | None = None) -> Any:
    """The TensorBoard writer of this folder, or None without tensorboard.

    With `start` a new file is begun, which takes back what earlier ones say of that iteration and later.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    folder = _key(output_dir)
    if start is not None and folder in _event_files:
        _event_files.pop(folder).close()
    if folder not in _event_files:
        from torch.utils.tensorboard import SummaryWriter

        with os_errors(output_dir):
            _event_files[folder] = SummaryWriter(folder, purge_step=start)
    return _event_files[folder]


# --- Weights & Biases -------------------------------------------------------------------------------------------


def check_wandb(project: str | None) -> None:
    """Raises UserError if a project is named and wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs Weights & Biases; run pip install 'loco_det[wandb]', or leave --wandb out.")


@contextmanager
def wandb_run(cfg: CfgNode, project: str | None, resume: bool = False) -> Iterator[None]:
    """Inside the block what `append_metrics` writes to cfg.OUTPUT_DIR also goes to a W&B run; only on the main process.

    W&B's own settings and environment (WANDB_MODE=offline, WANDB_ENTITY, ...) hold. Its files are in
    OUTPUT_DIR/wandb, and with `resume` the last run there that came to an iteration goes on. The horizontal axis of
    every curve is the iteration.

    Args:
        cfg: the run's whole configuration, which W&B gets too.
        project: where the run is listed; None: nothing is done.

    Raises:
        UserError: wandb is not installed, or will not begin a run.
    """
    check_wandb(project)
    if project is None or not is_main():
        yield
        return
    run = _begin_wandb_run(cfg, project, resume)
    folder = _key(cfg.OUTPUT_DIR)
    _wandb_runs[folder] = run
    status = 1
    try:
        yield
        status = 0
    finally:
        del _wandb_runs[folder]
        _noted.discard(folder)
        run.finish(exit_code=status)


def _begin_wandb_run(cfg: CfgNode, project: str, resume: bool) -> Any:
    import wandb

    folder = Path(cfg.OUTPUT_DIR)
    earlier = _noted_wandb_run(folder) if resume else None
    with os_errors(folder):
        _wandb_note(folder).parent.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=project,
            name="/".join(folder.resolve().parts[-2:]),
            dir=str(folder),
            config=yaml.safe_load(cfg.dump()),
            id=earlier,
            resume="allow" if earlier else None,
            settings=wandb.Settings(silent=is_quiet()),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"--wandb {project}: W&B cannot begin a run ({error}); run `wandb login`, set WANDB_MODE=offline, or leave "
            "--wandb out."
        ) from error
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    log.info("W&B: run %s of project %s, %s", run.id, project, "offline" if run.offline else run.url)
    return run


def _wandb_note(folder: str | Path) -> Path:
    return Path(folder) / "wandb" / "run_id.txt"


def _noted_wandb_run(folder: str | Path) -> str | None:
    note = _wandb_note(folder)
    return note.read_text().strip() if note.is_file() else None


def _note_wandb_run(folder: str | Path, run_id: str) -> None:
    """Keep its id for `resume` once it has an iteration: a run that fails before, or only evaluates, is not kept."""
    if _key(folder) not in _noted:
        with atomic_write(_wandb_note(folder), "w") as file:
            file.write(run_id + "\n")
        _noted.add(_key(folder))
