"""The command line: `loco-det COMMAND ...`, and the same jobs for the files in tools/.

A job is a module of `loco_det/commands/` with two functions: `add_arguments` adds its arguments to a parser, `run`
executes it and returns an exit status, None for 0. It is imported only when requested. This module has what all jobs
share: `--quiet`, `--debug`, one-sentence errors, the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType

from loco_det import __version__
from loco_det.core.errors import INTERRUPTED, UserError, out_of_memory

BAD_INPUT = 2  # argparse's own status for arguments that it refuses


# In the order of the help text; each is a file of loco_det/commands/.
JOBS = {
    "quickstart": "make a data set, pretrain on it, convert, detect: all steps in minutes on a CPU",
    "doctor": "check this machine, its data sets and a config with its weights, with remedies",
    "data": "`data check PATH`: validate a whole data set; `data convert SRC OUT`: convert it to COCO's format",
    "pretrain": "pretrain a backbone on unlabelled images with LoCo, GIM or SimCLR",
    "convert": "convert a backbone to weights for Detectron2 and `train`, with a proof",
    "train": "train and evaluate Faster or Mask R-CNN on a frozen or fine-tuned backbone",
    "evaluate": "evaluate any program's results file on a data set, or compare two files",
    "predict": "run a trained detector or segmentor on images and videos; writes pictures, COCO JSON, ONNX",
    "probe": "classify images by a backbone's frozen features, stage by stage",
    "sweep": "train and evaluate every backbone with every seed and share of the images, resumably",
    "paper": "make a table or figure of the LoCo paper, in full or in small, its numbers beside ours",
    "report": "compare runs and probes on one page: intervals, errors, curves and pictures",
}
OWN_LOG = {"doctor"}  # reads --quiet itself: it must work where torch does not


def main(argv: Sequence[str] | None = None) -> int:
    """`loco-det COMMAND ARGUMENTS`; returns the exit status."""
    width = max(map(len, JOBS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in JOBS.items())
    parser = argparse.ArgumentParser(
        prog="loco-det",
        usage="loco-det [-h] [--version] COMMAND ...",
        description="How good is this backbone for detection and instance segmentation?",
        epilog=f"commands:\n{commands}\n\n`loco-det COMMAND --help` lists a command's arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loco-det {__version__}")
    parser.add_argument("command", choices=JOBS, metavar="COMMAND", help="one of the commands below")
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
        0; 1 if a check failed (`doctor`, `data check`); 2 for bad input or insufficient memory, with one sentence on
        standard error and a traceback only under --debug; 130 when interrupted by SIGINT or SIGTERM. A bug raises.
    """
    try:
        with _sigterm_interrupts():
            job = importlib.import_module(f"loco_det.commands.{name}")
            return _run(job, _parsed(job, name, argv, prog), logs=name not in OWN_LOG)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM end the block as Ctrl-C does, so that cleanup runs."""
    if threading.current_thread() is not threading.main_thread():  # signal.signal works in the main thread only
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parsed(job: ModuleType, name: str, argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    text = JOBS[name]
    parser = argparse.ArgumentParser(prog=prog, description=f"{text[0].upper()}{text[1:]}.")
    job.add_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="show only warnings and errors")
    parser.add_argument("--debug", action="store_true", help="show a traceback for bad input, too")
    return parser.parse_intermixed_args(argv)  # allows options between KEY and VALUE pairs


def _run(job: ModuleType, args: argparse.Namespace, logs: bool) -> int:
    if logs:
        from loco_det.core.log import log_failure, setup_logging

        setup_logging(quiet=args.quiet)
    try:
        return job.run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        if logs:
            log_failure(error)
        message = error if isinstance(error, UserError) else out_of_memory(error)
        if args.debug and (message or isinstance(error, KeyboardInterrupt)):
            traceback.print_exc()
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
