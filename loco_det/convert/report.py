"""The strict account of a conversion: every tensor that was read is converted, or dropped for a named reason."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loco_det.backbones.names import to_detectron2
from loco_det.convert.architecture import Architecture, check_shapes, checked_tensors, dtype_name, recognise
from loco_det.convert.load import left_out
from loco_det.convert.name_patterns import NAMINGS
from loco_det.convert.sources import (
    COUNTERS,
    HEAD,
    Candidate,
    Pixels,
    Rules,
    candidates,
    choose,
    fitting,
    network_names,
)
from loco_det.core.errors import UserError

MAX_NAMES = 8  # of types left out that are shown
BN_EPS, BN_MOMENTUM = 1e-5, 0.1  # of all sources here and of Detectron2; no file records them
NEW_IN_DETECTOR = (
    ("feature pyramid (FPN models)", "backbone.fpn_lateral2-5, backbone.fpn_output2-5"),
    ("region proposals", "proposal_generator.rpn_head.*"),
    ("box head", "roi_heads.box_head.* (FPN models), roi_heads.box_predictor.*"),
    ("mask head (Mask R-CNN)", "roi_heads.mask_head.*"),
)
"""What a detector has beyond its backbone and so starts from fresh weights: (what, tensor names)."""


@dataclass
class Account:
    """What became of every tensor of a file.

    Attributes:
        source: the recognised code base and the chosen branch.
        architecture: the recognised ResNet.
        read: number of tensors in the file.
        converted: torchvision's name -> tensor.
        keys: torchvision's name -> key in the file.
        dropped: reason -> keys.
        left_out: name of a type that is not plain data, and was not constructed -> keys.
        widened: the narrower dtypes of the file's backbone, "float16" or "bfloat16".
        made: torchvision's names of the statistics added to norms that only scale and shift.
        prefix, naming: the backbone's prefix in the file, and its key in `NAMINGS`.
        timm: whether its network may be timm's.
        network: the file's name for its network, if that may be timm's; "" if none.
        pixels: the pixels of training, and the position of the strides.
        proof: the result of `prove.prove`.
    """

    source: str
    branch: str
    architecture: Architecture
    read: int
    converted: dict[str, Tensor]
    keys: dict[str, str]
    dropped: dict[str, list[str]]
    widened: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    prefix: str = ""
    naming: str = "torchvision"
    timm: bool = False
    network: str = ""
    pixels: Pixels = field(default_factory=Pixels)
    proof: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return account and proof as plain data, for JSON; `converted` maps torchvision's name -> key in the file."""
        return {
            "source": self.source,
            "branch": self.branch,
            "architecture": self.architecture.name,
            "pixels": asdict(self.pixels),
            "batch_norm": {"eps": BN_EPS, "momentum": BN_MOMENTUM},
            "read": self.read,
            "converted": {name: self.keys.get(name, name) for name in self.converted if name not in self.made},
            "widened": self.widened,
            "added": self.made,
            "dropped": self.dropped,
            "left_out": self.left_out,
            "new": dict(NEW_IN_DETECTOR),
            "proof": self.proof,
        }

    def lines(self) -> list[str]:
        """Return account and proof as aligned plain text."""
        dropped = sum(map(len, self.dropped.values()))
        rows = [
            ("source", f"{self.source}, branch {self.branch}" if self.branch else self.source),
            ("backbone", self.architecture.name),
            (
                "",
                f"BatchNorm eps {BN_EPS:g}; momentum {BN_MOMENTUM:g} counts only where the detector does not freeze it",
            ),
            ("pixels", self.pixels.text()),
            ("read", f"{self.read:4d} tensors"),
            ("converted", f"{len(self.converted) - len(self.made):4d}"),
            *([("", f"     of {', '.join(self.widened)}, which float32 holds exactly")] if self.widened else []),
            *(
                [("added", f"{len(self.made):4d} statistics, mean 0 and variance 1: the norms only scale and shift")]
                if self.made
                else []
            ),
            ("dropped", f"{dropped:4d}"),
            *((f"  {len(keys):4d}", f"{why} ({shown(keys)})") for why, keys in self.dropped.items()),
            *([("left out", left_out_text(self.left_out))] if self.left_out else []),
            *(("new" if i == 0 else "", f"{what}: {names}") for i, (what, names) in enumerate(NEW_IN_DETECTOR)),
        ]
        lines = [f"{label:<10} {text}" for label, text in rows]
        if self.proof:
            lines += ["", f"proof: {self.proof['image']} through source and converted backbone"]
            lines += [f"source model: {name}" for name in self.proof["models"]]
            lines += [f"{'':10} {'float64 max|d|':>15} {'relative':>9} {'float32 max|d|':>15} {'relative':>9}"]
            for stage in self.proof["float64"]:
                cells = [self.proof[kind][stage] for kind in ("float64", "float32")]
                numbers = (f"{c['max_abs']:15.2e} {c['relative']:9.2e}" for c in cells)
                lines.append(f"{stage:10} {' '.join(numbers)}")
        return lines


def left_out_text(found: dict[str, list[str]]) -> str:
    """Format the result of `load.left_out`."""
    names = ", ".join(f"{len(keys)} {name}" for name, keys in list(found.items())[:MAX_NAMES])
    more = f" and {len(found) - MAX_NAMES} more kinds" if len(found) > MAX_NAMES else ""
    return f"{sum(map(len, found.values())):4d} settings that are no plain data, unexecuted ({names}{more})"


def shown(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} ..."


def take_account(
    path: object,
    loaded: dict[str, Any],
    branch: str | None = None,
    *,
    drop: Sequence[str] = (),
    read: bool = True,
) -> tuple[Account, Candidate]:
    """Sort every tensor of a loaded or opened file into converted and dropped, and check the converted ones.

    Of the rows that match the prefix, the first that knows every tensor applies. If none does, a `branch` that is the
    prefix itself selects that backbone, and everything outside it is dropped.

    Args:
        drop: shell patterns of tensors to drop, by name in the file or behind the prefix.
        read: False to use only names, shapes and dtypes; `converted` then stays in the file.

    Raises:
        UserError: no or several backbones, or a tensor is unknown, missing, duplicate or invalid.
    """
    original = network_names(path, loaded)
    tensors = {key: tensor for key, (_, tensor) in original.items()}
    objects = left_out(loaded)
    if objects and not tensors:
        raise UserError(
            f"{path}: holds no tensors, but objects that are not read ({next(iter(objects))}); save the model's "
            "state_dict: torch.save(model.state_dict(), 'weights.pth')"
        )
    chosen = choose(path, tensors, branch)
    others = {c.prefix: c.branch or c.prefix for c in candidates(path, tensors) if c.prefix != chosen.prefix}
    chosen = _best_row(tensors, chosen, others, drop, alone=branch == chosen.prefix)
    for kind, places in objects.items():
        for key in places:
            if _place(key, chosen, others)[0] is not None:
                raise UserError(f"{path}: {key!r} is a {kind}, not a plain tensor; save it as one, in float32")
    found, keys, dropped = _sorted(path, original, chosen, others, drop)
    made = _statistics(found) if chosen.source and chosen.source.scale_only else {}
    found |= made
    architecture = recognise(path, found)
    check = checked_tensors if read else check_shapes
    converted = check(path, found, architecture, lambda name: keys.get(name, f"{chosen.prefix}{name}"))
    source = chosen.source.name if chosen.source else "unknown code base"
    account = Account(source, chosen.branch, architecture, len(tensors), converted, keys, dropped)
    account.widened = sorted({dtype_name(tensor) for tensor in found.values()} - {"float32"})
    account.made, account.left_out = list(made), objects
    account.prefix, account.naming = chosen.prefix, chosen.naming
    account.timm = chosen.source is not None and chosen.source.timm
    account.network = _network(path, loaded) if account.timm else ""
    return account, chosen


def _network(path: object, loaded: dict[str, Any]) -> str:
    """Return the network's name in a timm file: its own entry, the config.json beside it, or the file name."""
    for key in ("arch", "architecture"):
        if isinstance(loaded.get(key), str):
            return loaded[key]
    path = Path(str(path))
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((path.parent / "config.json").read_bytes())
        if isinstance(config, dict) and isinstance(config.get("architecture"), str):
            return config["architecture"]
    return re.split(r"[-.]", path.name)[0]


def _statistics(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return mean 0 and variance 1, as in Detectron2, for norms that only scale and shift."""
    scales = [name for name in found if re.search(r"(bn\d|downsample\.1)\.weight$", name)]
    norms = {name.removesuffix("weight"): found[name].shape for name in scales}
    means = {f"{norm}running_mean": torch.zeros(shape) for norm, shape in norms.items()}
    return means | {f"{norm}running_var": torch.ones(shape) for norm, shape in norms.items()}


def _best_row(
    tensors: dict[str, Tensor], chosen: Candidate, others: dict[str, str], drop: Sequence[str], *, alone: bool
) -> Candidate:
    """Return the backbone by the first row that knows every tensor; without one, for `alone`, by no row."""
    rows = list(fitting(tensors, chosen.prefix, chosen.naming))
    if alone or not rows:
        rows.append(_as_no_row(chosen))
    knowing = (row for row in rows if _unknown(tensors, row, others, drop) is None)
    return next(knowing, rows[-1] if alone else rows[0])


def _as_no_row(chosen: Candidate) -> Candidate:
    """The backbone alone, of an unknown code base: what stands outside its prefix is dropped."""
    return Candidate(None, chosen.prefix, chosen.prefix, chosen.naming)


def _sorted(
    path: object,
    original: dict[str, tuple[str, Tensor]],
    chosen: Candidate,
    others: dict[str, str],
    drop: Sequence[str],
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, list[str]]]:
    """Return the backbone by torchvision's names, its keys in the file, and the dropped keys by reason."""
    found: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    dropped: dict[str, list[str]] = {}
    used = set()
    for key, (file_key, tensor) in original.items():
        name, reason = _place(key, chosen, others)
        pattern = _drop_pattern(key, file_key, chosen, drop)
        if pattern is not None:
            used.add(pattern)
            reason = f"as asked by --drop {pattern}"
            if name is not None:
                raise UserError(f"{path}: --drop {pattern} takes {file_key!r}, which the backbone needs; narrow it")
        if name in found:
            raise UserError(f"{path}: {keys[name]!r} and {file_key!r} are the same tensor; remove one of them")
        if name is not None:
            found[name], keys[name] = tensor, file_key
        elif reason is not None:
            dropped.setdefault(reason, []).append(file_key)
        else:
            where = f"a {chosen.source.name} checkpoint, the nearest known" if chosen.source else "this checkpoint"
            # As a whole command, for this file may be read by one that has no such options.
            remedies = [f"leave it out: loco-det convert {shlex.quote(str(path))} backbone.pkl --drop PATTERN"]
            if _unknown(original, _as_no_row(chosen), others, drop) is None:
                remedies.append(f"take the backbone alone with --branch {shlex.quote(chosen.prefix)} in its place")
            raise UserError(f"{path}: tensor {file_key!r} is unknown in {where}; {', or '.join(remedies)}")
    if unused := [pattern for pattern in drop if pattern not in used]:
        raise UserError(f"{path}: --drop {unused[0]} matches no tensor; correct it or leave it out")
    return found, keys, dropped


def _unknown(keys: Iterable[str], chosen: Candidate, others: dict[str, str], drop: Sequence[str]) -> str | None:
    """The first tensor that a row does not know."""
    for key in keys:
        if _place(key, chosen, others) == (None, None) and _drop_pattern(key, key, chosen, drop) is None:
            return key
    return None


def _drop_pattern(key: str, file_key: str, chosen: Candidate, drop: Sequence[str]) -> str | None:
    """Return the user's pattern that drops a tensor, if any."""
    names = (file_key, key.removeprefix(chosen.prefix))
    return next((pattern for pattern in drop if any(fnmatchcase(name, pattern) for name in names)), None)


def _place(key: str, chosen: Candidate, others: dict[str, str]) -> tuple[str | None, str | None]:
    """Return (torchvision's name, None) for the backbone's tensors, (None, reason) for dropped ones, else Nones."""
    source = chosen.source
    container, _, name = key.rpartition(":")
    if key.startswith(chosen.prefix) and container == chosen.prefix.rpartition(":")[0]:
        rest = key[len(chosen.prefix) :]
        renamed = NAMINGS[chosen.naming][2](rest)
        reason = _dropped(rest, (*COUNTERS, *(source.inside if source else (HEAD,))))
        if reason is not None:
            return None, reason
        if _is_backbone(renamed):
            return renamed, None
    for prefix, branch in others.items():
        if key.startswith(prefix) and len(prefix) > (len(chosen.prefix) if key.startswith(chosen.prefix) else -1):
            return None, f"other branch ({branch})"
    if container != chosen.prefix.rpartition(":")[0]:
        return None, f"beside the model ({container.split('/')[0] or 'loose tensors'})"
    if source is None and not key.startswith(chosen.prefix):
        return None, "outside the branch"
    return None, _dropped(name, (*COUNTERS, *(source.outside if source else ())))


def _dropped(name: str, rules: Rules) -> str | None:
    return next((reason for pattern, reason in rules if re.fullmatch(pattern, name)), None)


def _is_backbone(name: str) -> bool:
    try:
        to_detectron2(name)
    except UserError:
        return False
    return True
