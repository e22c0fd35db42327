"""The command line: `loco-det COMMAND ...`, and the same jobs for the files in tools/.

A job has its arguments in `loco_det/arguments.py` and is a module of `loco_det/commands/` with a function `run`, which
executes it and returns an exit status, None for 0. The module is imported only when its arguments have been read. This
module has what all jobs share: `KEY VALUE` anywhere, `--quiet`, `--debug`, one-sentence errors, the exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import os
import re
import select
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType

from loco_det import __version__, arguments
from loco_det.core.errors import INTERRUPTED, UserError, out_of_memory

BROKEN_PIPE = 141  # as a shell reports SIGPIPE
BAD_INPUT = 2  # argparse's own status for arguments that it refuses


# In the order of the help text; each is a file of loco_det/commands/ and a function of loco_det/arguments.py.
JOBS = {
    "quickstart": "make a data set, pretrain on it, convert, detect: all steps in minutes on a CPU",
    "doctor": "check this machine, its data sets and a config with its weights, with remedies",
    "configs": "list the configurations that come with this package",
    "data": "`data check PATH`: validate a data set; `convert SRC OUT`: to COCO's format; `shapes DIR`: draw one",
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
SHELLS = ("bash", "zsh", "tcsh")
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")  # of a configuration, with at least one section


def main(argv: Sequence[str] | None = None) -> int:
    """`loco-det COMMAND ARGUMENTS`; returns the exit status."""
    parser = _main_parser()
    args = parser.parse_args(argv)
    if args.completion:
        return _print_completion(args.completion)
    if args.command is None:
        parser.print_help()
        return 0
    if args.command not in JOBS:
        parser.error(_no_such_command(args.command))
    return run_job(args.command, args.rest, prog=f"loco-det {args.command}")


def _main_parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--completion", choices=SHELLS, metavar="SHELL", help=f"print it for {', '.join(SHELLS)}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _no_such_command(name: str) -> str:
    close = difflib.get_close_matches(name, JOBS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(JOBS)}"
    return f"there is no COMMAND {name!r}; {hint}"


def _print_completion(shell: str) -> int:
    """Print the script that completes commands, options and files in `shell`."""
    try:
        import shtab
    except ImportError:
        print("error: --completion needs shtab; run pip install 'loco_det[completion]'", file=sys.stderr)
        return BAD_INPUT
    parser = argparse.ArgumentParser(prog="loco-det")
    commands = parser.add_subparsers()
    for name, text in JOBS.items():
        job = commands.add_parser(name, help=text)
        _add_arguments(job, name)
        for action in job._actions:
            action.complete = shtab.FILE
    print(shtab.complete(parser, shell))
    return 0


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
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _sigterm_interrupts():
            parser = _parser(name, prog)
            args = _parsed(parser, argv)
            job = importlib.import_module(f"loco_det.commands.{name}")
            status = _run(job, args, logs=name not in OWN_LOG, line=[*parser.prog.split(), *argv])
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return BROKEN_PIPE


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    watch = select.poll()
    try:
        watch.register(sys.stdout, select.POLLOUT)
    except (OSError, ValueError):  # replaced by something without a file descriptor
        return False
    return any(event & select.POLLERR for _, event in watch.poll(0))


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


def _parser(name: str, prog: str | None) -> argparse.ArgumentParser:
    text = JOBS[name]
    parser = argparse.ArgumentParser(prog=prog, description=f"{text[0].upper()}{text[1:]}.")
    _add_arguments(parser, name)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    getattr(arguments, name)(parser)
    parser.add_argument("--quiet", action="store_true", help="show only warnings and errors")
    parser.add_argument("--debug", action="store_true", help="show a traceback for bad input, too")


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    overrides: list[str] = []
    if any(action.dest == "opts" for action in parser._actions):
        argv, overrides = _without_overrides(parser, argv)
    args = parser.parse_intermixed_args(argv)  # allows options between further KEY and VALUE pairs
    if overrides:
        args.opts = [*overrides, *args.opts]
    return args


def _without_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `SECTION.KEY VALUE` out of the arguments, wherever they stand; returns the others, and the pairs.

    A key is no key where it is an option's value or an existing file, and has a value unless an option follows.
    """
    others: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        action = parser._option_string_actions.get(others[-1]) if others else None
        is_value = action is not None and action.nargs != 0
        if is_value or not _KEY.fullmatch(word) or os.path.exists(word):
            others.append(word)
            continue
        value = next(words, None)
        if value is None or value.startswith("--"):
            others += [word] if value is None else [word, value]
        else:
            overrides += [word, value]
    return others, overrides


def _run(job: ModuleType, args: argparse.Namespace, logs: bool, line: Sequence[str]) -> int:
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
        if message.add and hasattr(args, "opts"):  # what to add is KEY VALUE
            print(f"type: {_line_to_type(line, message.add)}", file=sys.stderr)
        return BAD_INPUT


def _line_to_type(line: Sequence[str], add: str) -> str:
    """Return a command line with the pairs `add`, KEY VALUE ..., in place of the values that it gave these keys."""
    from loco_det.core.config import shell_word

    words, added = list(line), shlex.split(add)
    for key, value in zip(added[::2], added[1::2]):
        given = [i for i, word in enumerate(words[:-1]) if word == key]
        if given:
            words[given[-1] + 1] = value  # the last one counts
        else:
            words += [key, value]
    return " ".join(map(shell_word, words))


if __name__ == "__main__":
    sys.exit(main())
