"""The table of ResNet tensor names, torchvision's and Detectron2's.

Rows are (torchvision pattern, Detectron2 pattern), where {n} is a number; stage numbers differ by one (layer1 is res2).
The table is a bijection for both directions. It includes what neither library has: layer5, layer6 and res6, res7 of the
six-stage backbone loco_det/backbones/presnet.py, and side1, side2 of loco_det/backbones/shufflenet.py.
"""

from __future__ import annotations

import re

from loco_det.core.errors import UserError

_ROWS = (
    ("conv1", "stem.conv1"),
    ("bn1", "stem.conv1.norm"),
    ("layer{s}.{b}.conv{k}", "res{s}.{b}.conv{k}"),
    ("layer{s}.{b}.bn{k}", "res{s}.{b}.conv{k}.norm"),
    ("layer{s}.{b}.downsample.0", "res{s}.{b}.shortcut"),
    ("layer{s}.{b}.downsample.1", "res{s}.{b}.shortcut.norm"),
    ("layer{s}.{b}.side{k}", "res{s}.{b}.side{k}"),
    ("layer{s}.{b}.sidebn{k}", "res{s}.{b}.side{k}.norm"),
)
_LEAVES = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
# Numbers without leading zeros; otherwise two names of one side would map to the same name.
_NUMBERS = {"b": "0|[1-9][0-9]{0,2}", "k": "[123]"}
_STAGE_SHIFT = 1


def _pattern(row: str, stages: str) -> re.Pattern[str]:
    regex = re.escape(row)
    for letter, numbers in {**_NUMBERS, "s": stages}.items():
        regex = regex.replace(rf"\{{{letter}\}}", f"(?P<{letter}>{numbers})")
    return re.compile(regex + r"\." + _LEAVES)


_TORCHVISION = [(_pattern(tv, "[1-6]"), d2) for tv, d2 in _ROWS]
_DETECTRON2 = [(_pattern(d2, "[2-7]"), tv) for tv, d2 in _ROWS]


def to_detectron2(name: str) -> str:
    """Convert torchvision's name to Detectron2's: `layer1.0.bn1.bias` -> `res2.0.conv1.norm.bias`.

    Raises:
        UserError: not a ResNet tensor's name.
    """
    return _rename(name, _TORCHVISION, _STAGE_SHIFT, "torchvision")


def to_torchvision(name: str) -> str:
    """Convert Detectron2's name to torchvision's, the inverse of `to_detectron2`.

    Raises:
        UserError: not a ResNet tensor's name.
    """
    return _rename(name, _DETECTRON2, -_STAGE_SHIFT, "Detectron2")


def _rename(name: str, table: list[tuple[re.Pattern[str], str]], shift: int, source: str) -> str:
    for pattern, target in table:
        if match := pattern.fullmatch(name):
            numbers = {k: int(v) for k, v in match.groupdict().items()}
            if "s" in numbers:
                numbers["s"] += shift
            return f"{target.format(**numbers)}.{match.group(match.lastindex)}"
    raise UserError(f"tensor {name!r} is not a {source} ResNet backbone tensor; remove it or name the right source")
