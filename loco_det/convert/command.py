"""The arguments of `tools/convert_to_d2.py` and `loco-det convert`, and nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loco_det.convert.conversion import convert
from loco_det.errors import UserError


def parser(prog: str) -> argparse.ArgumentParser:
    """INPUT OUTPUT and what a file cannot say of itself."""
    arguments = argparse.ArgumentParser(
        prog=prog,
        description="Convert a ResNet checkpoint to Detectron2 weights (OUTPUT.pkl) and the YAML keys that must agree "
        "with them (OUTPUT.yaml); prints the account of every tensor and a numeric proof.",
    )
    arguments.add_argument("input", metavar="INPUT", help="a .pth, .pt, .tar, .ckpt, .bin, .safetensors or .pkl")
    arguments.add_argument("output", metavar="OUTPUT", help="the .pkl to write")
    arguments.add_argument("--branch", help="which backbone, where the file holds several")
    arguments.add_argument("--image", help="image for the proof (default: one made by a formula)")
    arguments.add_argument("--channel-order", choices=("RGB", "BGR"), help="what the backbone was trained to see")
    for name in ("--pixel-mean", "--pixel-std"):
        arguments.add_argument(name, nargs=3, type=float, metavar="X", help="in 0-255 units, in --channel-order")
    arguments.add_argument("--stride-in-1x1", choices=("yes", "no"), help="yes for weights from MSRA (Caffe)")
    arguments.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return arguments


def main(argv: Sequence[str] | None = None, prog: str = "convert_to_d2.py") -> int:
    """Run the command; returns the exit status: 0, or 2 after one sentence on standard error."""
    given = parser(prog).parse_args(argv)
    try:
        account = convert(
            given.input,
            given.output,
            branch=given.branch,
            image=given.image,
            channel_order=given.channel_order,
            pixel_mean=given.pixel_mean and tuple(given.pixel_mean),
            pixel_std=given.pixel_std and tuple(given.pixel_std),
            stride_in_1x1=None if given.stride_in_1x1 is None else given.stride_in_1x1 == "yes",
        )
    except UserError as error:
        if given.debug:
            raise
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print("\n".join([*account.lines(), "", f"wrote {given.output} and {given.output.removesuffix('.pkl')}.yaml"]))
    return 0
