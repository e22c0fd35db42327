"""The command `convert`: a checkpoint to weights for Detectron2, torchvision or timm, or a report of its content."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from loco_det.backbones.own import HF_PREFIX
from loco_det.backbones.timm_models import PREFIX
from loco_det.convert.conversion import convert
from loco_det.convert.hf_models import write_keys
from loco_det.convert.inspect import inspect
from loco_det.convert.report import Account
from loco_det.convert.stated import Stated
from loco_det.convert.timm_models import TimmAccount, convert_timm
from loco_det.core.errors import UserError


def read_stated(args: argparse.Namespace) -> Stated:
    """Read the arguments of `arguments._stated`, given singly or as Detectron2's configuration.

    Raises:
        UserError: both are given, or the configuration cannot be used.
    """
    stated = Stated(
        args.channel_order,
        args.pixel_mean and tuple(args.pixel_mean),
        args.pixel_std and tuple(args.pixel_std),
        None if args.stride_in_1x1 is None else args.stride_in_1x1 == "yes",
    )
    if args.d2_config is None:
        return stated
    if stated:
        raise UserError(f"{args.d2_config}: states pixels and stride; leave --d2-config or the other options out")
    return Stated.from_d2_config(args.d2_config)


def run(args: argparse.Namespace) -> None:
    """Convert, and print the account of every tensor and the numeric proof; with --inspect only report the content.

    Raises:
        UserError: as `convert`, `inspect`, or OUTPUT is given with --inspect or missing without.
    """
    if args.inspect:
        if args.output is not None:
            raise UserError(f"--inspect writes nothing; leave {args.output} out, or leave --inspect out")
        report = inspect(args.input)
        print(json.dumps(report.facts()) if args.json else "\n".join(report.lines()))
        return
    if args.output is None:
        raise UserError(f"{args.input}: give an OUTPUT to convert it to, or --inspect to look at it")
    if args.input.startswith(HF_PREFIX):
        _write_keys(args)
        return
    options = {"branch": args.branch, "drop": args.drop, "stated": read_stated(args)}
    architecture = args.architecture or (args.input if args.input.startswith(PREFIX) else None)
    account: Account | TimmAccount
    if architecture:
        if args.image:
            raise UserError("--image is for the proof of ResNets; leave it out")
        account = convert_timm(args.input, args.output, architecture, **options)
    else:
        account = convert(args.input, args.output, image=args.image, **options)
    written = [args.output]
    if architecture or args.output.endswith(".pkl"):
        written.append(str(Path(args.output).with_suffix(".yaml")))
    if args.json:
        print(json.dumps({**account.facts(), "written": written}))
    elif not args.quiet:
        print("\n".join([*account.lines(), "", f"wrote {' and '.join(written)}"]))


def _write_keys(args: argparse.Namespace) -> None:
    """Write the keys of a model of transformers, and print its stages and what of its checkpoint is not used."""
    given = {
        "--architecture": args.architecture,
        "--branch": args.branch,
        "--drop": args.drop,
        "--image": args.image,
        "the pixels' options": read_stated(args),
    }
    for option, value in given.items():
        if value:
            raise UserError(f"{args.input}: states its network and its pixels itself; leave {option} out")
    backbone = write_keys(args.input, args.output)
    facts = {
        "architecture": backbone.architecture,
        "pixels": {"order": backbone.order, "mean": backbone.pixel_mean, "std": backbone.pixel_std},
        "stages": {name: {"channels": backbone.channels[name], "stride": s} for name, s in backbone.strides.items()},
        "dropped": backbone.dropped,
        "written": [args.output],
    }
    if args.json:
        print(json.dumps(facts))
    elif not args.quiet:
        stages = ", ".join(f"{name} (stride {stride})" for name, stride in backbone.strides.items())
        print(f"backbone   {args.input}\nmaps       {stages}")
        print(f"pixels     {backbone.order}, mean {backbone.pixel_mean}, std {backbone.pixel_std}")
        print(f"not used   {len(backbone.dropped)} tensors {' '.join(backbone.dropped[:3])}\n\nwrote {args.output}")
