"""The metrics of a run: OUTPUT_DIR/metrics.json, TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from loco_det.core.distributed import is_main
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write, os_errors, read_regular
from loco_det.core.log import is_quiet, log


class Sink:
    """A destination for a run's metrics."""

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; `values["iteration"]` is its iteration, if it has one."""
        raise NotImplementedError

    def trim(self, iteration: int) -> None:
        """Drop lines of `iteration` and later, if the sink supports it."""

    def close(self, failed: bool) -> None:
        """End the run; `failed`: by an exception."""


class RunMetrics:
    """The metrics of one run, written by its main process only.

    Open it with `with`, which closes every sink at the end.

    Args:
        cfg: the run's whole configuration; files go to cfg.OUTPUT_DIR, and W&B gets a copy.
        wandb: the W&B project to send the numbers to, or None.
        resume: continue the W&B run that last trained in cfg.OUTPUT_DIR, if any.

    Raises:
        UserError: wandb is not installed, or cannot start a run.
    """

    def __init__(self, cfg: CfgNode, wandb: str | None = None, resume: bool = False) -> None:
        check_wandb(wandb)
        self.sinks: list[Sink] = []
        if not is_main():
            return
        self.sinks.append(JsonLines(cfg.OUTPUT_DIR))
        if importlib.util.find_spec("tensorboard") is not None:
            self.sinks.append(TensorBoard(cfg.OUTPUT_DIR))
        if wandb is not None:
            self.sinks.append(Wandb(cfg, wandb, resume))

    def __enter__(self) -> RunMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in reversed(self.sinks):
            sink.close(failed=kind is not None)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line to every sink.

        Raises:
            UserError: OUTPUT_DIR cannot be written.
        """
        for sink in self.sinks:
            sink.write(values)

    def trim(self, iteration: int) -> None:
        """Drop lines of `iteration` and later, before the run continues there.

        Raises:
            UserError: OUTPUT_DIR cannot be written.
        """
        for sink in self.sinks:
            sink.trim(iteration)


class JsonLines(Sink):
    """metrics.json in `folder`, one JSON object per line, as Detectron2 writes it; non-finite values are null."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "metrics.json"

    def write(self, values: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = json.dumps(finite) + "\n"
        if "iteration" not in values:  # an evaluation alone, which no `trim` precedes
            self._keep(lambda lines: lines[: -1 if _is_cut_or(line.encode(), lines[-1]) else None])
        with os_errors(self.path.parent), open(self.path, "a") as file:
            file.write(line)

    def trim(self, iteration: int) -> None:
        self._keep(lambda lines: [line for line in lines if _iteration(line) < iteration])

    def _keep(self, chosen: Callable[[list[bytes]], list[bytes]]) -> None:
        if not self.path.exists():
            return
        with os_errors(self.path):
            lines = read_regular(self.path).splitlines(keepends=True)
        if lines and (kept := chosen(lines)) != lines:
            with atomic_write(self.path) as file:
                file.writelines(kept)


def _is_cut_or(line: bytes, last: bytes) -> bool:
    """Whether the last line is cut off by a kill, or is `line` already: the command was killed after writing it."""
    return last == line or not last.endswith(b"\n")


def _iteration(line: bytes) -> float:
    try:
        iteration = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # cut off by a kill in the middle of the line, or damaged
    return iteration if isinstance(iteration, (int, float)) else math.inf


class TensorBoard(Sink):
    """Event files in `folder` with the lines that have an iteration; the first line starts a new file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self.writer: Any = None
        self.start: int | None = None  # TensorBoard discards numbers of earlier files from this iteration on

    def write(self, values: dict[str, Any]) -> None:
        if "iteration" not in values:
            return
        with os_errors(self.folder):
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(self.folder, purge_step=self.start)
            for name, value in _numbers(values).items():
                if name != "iteration":
                    self.writer.add_scalar(name, value, values["iteration"])
            self.writer.flush()

    def trim(self, iteration: int) -> None:
        self.close(failed=False)
        self.writer, self.start = None, iteration

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self.writer.close()


class Wandb(Sink):
    """A W&B run. Lines without an iteration go to its summary; the x axis of every curve is the iteration.

    W&B's own settings and environment (WANDB_MODE=offline, WANDB_ENTITY, ...) apply; its files are in OUTPUT_DIR/wandb.
    W&B cannot drop lines, so iterations repeated by a resumed run appear twice.

    OUTPUT_DIR/wandb/run_id.txt has the id of the run to resume. It is written with the first iteration: a run that
    fails before, or only evaluates, is not resumed.

    Args, Raises: as for `RunMetrics`.
    """

    def __init__(self, cfg: CfgNode, project: str, resume: bool) -> None:
        import wandb

        folder = Path(cfg.OUTPUT_DIR)
        self.note = folder / "wandb" / "run_id.txt"
        self.noted = False  # whether run_id.txt has this run's id
        earlier = self.note.read_text().strip() if resume and self.note.is_file() else None
        with os_errors(folder):
            self.note.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
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
                f"--wandb {project}: W&B cannot begin a run ({error}); run `wandb login`, set WANDB_MODE=offline, or "
                "leave --wandb out."
            ) from error
        self.run.define_metric("iteration")
        self.run.define_metric("*", step_metric="iteration")
        where = "offline" if self.run.offline else self.run.url
        log.info("W&B: run %s of project %s, %s", self.run.id, project, where)

    def write(self, values: dict[str, Any]) -> None:
        if "iteration" not in values:
            self.run.summary.update(_numbers(values))
            return
        self.run.log(_numbers(values))
        if not self.noted:
            with atomic_write(self.note, "w") as file:
                file.write(self.run.id + "\n")
            self.noted = True

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def check_wandb(project: str | None) -> None:
    """Raises UserError if a project is named and wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs Weights & Biases; run pip install 'loco_det[wandb]', or leave --wandb out.")
