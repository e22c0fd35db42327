"""The command line: `loco-det COMMAND ...`, and the same jobs behind the files in tools/.

A job is two functions, one that adds its arguments to a parser and one that runs them; each lives with the code
it starts and is imported only when that job is asked for. What all jobs share is here: `--quiet`, `--debug`, bad
input as one sentence, the exit status. This is the only file of `loco_det` that knows `pretrain`.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from loco_det import __version__
from loco_det.errors import INTERRUPTED, UserError, out_of_memory

BAD_INPUT = 2  # argparse's own status for arguments that it refuses


class Job(NamedTuple):
    """What a subcommand takes and does; `run` returns an exit status, None for 0."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    logs: bool = True  # False: it reads --quiet itself and must work where torch does not


def _quickstart() -> Job:
    from loco_det.quickstart import quickstart
    from pretrain.command import pretrain_file

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for data, runs, results")
        parser.add_argument("--seed", type=int, default=0, metavar="N")

    def run(args: argparse.Namespace) -> None:
        quickstart(args.out, pretrain=pretrain_file, seed=args.seed)

    return Job(add_arguments, run)


def _doctor() -> Job:
    from loco_det import doctor

    return Job(doctor.add_arguments, doctor.run, logs=False)


def _pretrain() -> Job:
    from pretrain import command

    return Job(command.add_arguments, command.run)


def _convert() -> Job:
    from loco_det.convert import command

    return Job(command.add_arguments, command.run)


def _train() -> Job:
    from loco_det.detection import command

    return Job(command.add_arguments, command.run)


def _probe() -> Job:
    from loco_det.evaluation.probes import command

    return Job(command.add_arguments, command.run)


def _report() -> Job:
    from loco_det.report import command

    return Job(command.add_arguments, command.run)


def _data() -> Job:
    from loco_det.report import data_command

    return Job(data_command.add_arguments, data_command.run)


def _predict() -> Job:
    from loco_det import predict

    return Job(predict.add_arguments, predict.run)


def _sweep() -> Job:
    from loco_det import sweep

    return Job(sweep.add_arguments, sweep.run)


# In the order of the help text.
JOBS: dict[str, tuple[str, Callable[[], Job]]] = {
    "quickstart": ("make a data set, pretrain on it, convert, detect: the whole road in minutes on a CPU", _quickstart),
    "doctor": ("check this machine, its data sets and a config with its weights, and say what to do", _doctor),
    "data": (
        "`data check PATH`: read a whole data set, say what is wrong; `data convert SRC OUT`: to COCO's format",
        _data,
    ),
    "pretrain": ("pretrain a backbone on unlabelled images with LoCo, GIM or SimCLR", _pretrain),
    "convert": ("turn a backbone into weights that Detectron2 and `train` read, with proof", _convert),
    "train": ("train and evaluate Faster or Mask R-CNN on a frozen or fine-tuned backbone", _train),
    "predict": ("draw what a trained detector or segmentor finds into images and videos; COCO JSON, ONNX", _predict),
    "probe": ("classify images by a backbone's frozen features, stage by stage", _probe),
    "sweep": ("train and evaluate every backbone with every seed and share of the images, resumably", _sweep),
    "report": ("put runs and probes side by side: one page with intervals, errors, curves and pictures", _report),
}


def main(argv: Sequence[str] | None = None) -> int:
    """`loco-det COMMAND ARGUMENTS`; returns the exit status."""
    width = max(map(len, JOBS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="loco-det",
        usage="loco-det [-h] [--version] COMMAND ...",
        description="How good is this backbone for detection and instance segmentation?",
        epilog=f"commands:\n{commands}\n\n`loco-det COMMAND --help` lists a command's arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loco-det {__version__}")
    parser.add_argument("command", choices=JOBS, metavar="COMMAND", help="one of those below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    return run_job(args.command, args.rest, prog=f"loco-det {args.command}")


def run_job(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse one job's arguments and run it; tools/*.py call this.

    Args:
        name: a key of `JOBS`.
        argv: its arguments; None for the process's own.
        prog: its name in usage and error texts; None for the script's.

    Returns:
        0; 1 where a check failed (`doctor`, `data check`); 2 for bad input and for memory that is short, with one
        sentence on standard error and a traceback only under --debug; 130 when interrupted by SIGINT or SIGTERM. A bug
        raises.
    """
    try:
        with _sigterm_interrupts():
            job, args = _parsed(name, argv, prog)
            return _run(job, args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that nothing half done stays behind."""
    if threading.current_thread() is not threading.main_thread():  # only that one may ask for signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parsed(name: str, argv: Sequence[str] | None, prog: str | None) -> tuple[Job, argparse.Namespace]:
    text, load = JOBS[name]
    job = load()
    parser = argparse.ArgumentParser(prog=prog, description=f"{text[0].upper()}{text[1:]}.")
    job.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="say only what needs attention")
    parser.add_argument("--debug", action="store_true", help="show a traceback for bad input too")
    return job, parser.parse_intermixed_args(argv)  # options may stand between KEY and VALUE pairs


def _run(job: Job, args: argparse.Namespace) -> int:
    if job.logs:
        from loco_det.runtime import log_failure, setup_logging

        setup_logging(quiet=args.quiet)
    try:
        return job.run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        if job.logs:
            log_failure(error)
        told = error if isinstance(error, UserError) else out_of_memory(error)
        if args.debug and (told or isinstance(error, KeyboardInterrupt)):
            traceback.print_exc()
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
