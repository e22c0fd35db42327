"""The conversion job: its arguments, and what they start."""

from __future__ import annotations

import argparse
import json

from loco_det.convert.conversion import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """INPUT OUTPUT and what a file cannot say of itself."""
    parser.add_argument("input", metavar="INPUT", help="a .pth, .pt, .tar, .ckpt, .bin, .safetensors or .pkl")
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="what to write: .pkl for Detectron2, with a .yaml of the keys that must agree with it beside it; .pth or "
        ".safetensors for torchvision and timm",
    )
    parser.add_argument("--branch", help="which backbone, where the file holds several")
    parser.add_argument("--image", help="image for the proof (default: one made by a formula)")
    parser.add_argument("--channel-order", choices=("RGB", "BGR"), help="what the backbone was trained to see")
    for name in ("--pixel-mean", "--pixel-std"):
        parser.add_argument(name, nargs=3, type=float, metavar="X", help="in 0-255 units, in --channel-order")
    parser.add_argument("--stride-in-1x1", choices=("yes", "no"), help="yes for weights from MSRA (Caffe)")
    parser.add_argument("--json", action="store_true", help="print account and proof as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Convert, and print the account of every tensor and the numeric proof.

    Raises:
        UserError: as `convert`.
    """
    account = convert(
        args.input,
        args.output,
        branch=args.branch,
        image=args.image,
        channel_order=args.channel_order,
        pixel_mean=args.pixel_mean and tuple(args.pixel_mean),
        pixel_std=args.pixel_std and tuple(args.pixel_std),
        stride_in_1x1=None if args.stride_in_1x1 is None else args.stride_in_1x1 == "yes",
    )
    written = [args.output]
    if args.output.endswith(".pkl"):
        written.append(f"{args.output.removesuffix('.pkl')}.yaml")
    if args.json:
        print(json.dumps({**account.facts(), "written": written}))
    elif not args.quiet:
        print("\n".join([*account.lines(), "", f"wrote {' and '.join(written)}"]))
