"""Reports the content of a checkpoint without converting it; reads only names, shapes and dtypes."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from loco_det.backbones.artifact import HEADER_KEY, Manifest, decode_manifest, require_resnet
from loco_det.convert.architecture import dtype_name
from loco_det.convert.load import file_kind, left_out, open_tensors, safetensors_metadata
from loco_det.convert.report import left_out_text, take_account
from loco_det.convert.sources import Candidate, Pixels, candidates, network_names
from loco_det.core.errors import UserError

MAX_ROWS = 60
MAX_ENTRIES = 24


@dataclass
class Report:
    """The result of `inspect`.

    Attributes:
        file: its path.
        kind: kind of file, as named by `load.file_kind`.
        size: bytes.
        metadata: plain values beside the tensors, by place: epoch, arch, learning rate.
        left_out: name of a type that is not plain data, and was not constructed -> keys.
        manifest: the manifest of our own file as plain data; empty for any other file.
        backbones: one record for each convertible backbone: source, branch, prefix, architecture, pixels, converted,
            dropped {reason: count}; "problem" has `convert`'s error message if it would fail.
        problem: `convert`'s error message if the file holds no backbone at all, or "".
        groups: one record for each part of the network: place, tensors, values, dtypes, first (name and shape).
    """

    file: str
    kind: str
    size: int
    metadata: dict[str, Any]
    left_out: dict[str, list[str]]
    manifest: dict[str, Any]
    backbones: list[dict[str, Any]]
    problem: str
    groups: list[dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return aligned plain text."""
        tensors, values = (sum(group[key] for group in self.groups) for key in ("tensors", "values"))
        rows = [
            ("file", f"{self.file}: {self.kind}, {self.size:,} bytes, {tensors} tensors, {values:,} values"),
            *(("metadata" if i == 0 else "", f"{k} {v!r}") for i, (k, v) in enumerate(self.metadata.items())),
            *([("left out", left_out_text(self.left_out).strip())] if self.left_out else []),
            *self._manifest_rows(),
            *([("backbone", f"none: {self.problem}")] if self.problem else []),
        ]
        for found in self.backbones:
            place = f"--branch {found['branch'] or found['prefix']}: " if len(self.backbones) > 1 else ""
            if "problem" in found:
                rows.append(("backbone", f"{place}{found['source']}, cannot be converted: {found['problem']}"))
                continue
            where = f"under {found['prefix']!r}" if found["prefix"] else "at the outermost level"
            rows.append(("backbone", f"{place}{found['source']}, {found['architecture']} {where}"))
            if not self.manifest:
                rows.append(("", f"pixels: {found['pixels']}"))
            dropped = ", ".join(f"{count} {reason}" for reason, count in found["dropped"].items())
            rows.append(("", f"would convert {found['converted']} tensors and drop {dropped or 'none'}"))
        lines = [f"{label:<10} {text}" for label, text in rows]
        shown = self.groups[:MAX_ROWS]
        width = max((len(group["place"]) for group in shown), default=0)
        lines += ["", f"{'part':<{width}}  tensors       values  dtypes, first tensor"]
        for group in shown:
            dtypes = " ".join(group["dtypes"])
            lines.append(
                f"{group['place']:<{width}}  {group['tensors']:7d} {group['values']:12,d}  {dtypes}, {group['first']}"
            )
        if len(self.groups) > MAX_ROWS:
            lines.append(f"... and {len(self.groups) - MAX_ROWS} more parts (--json has all)")
        return ["".join(c if c.isprintable() else "?" for c in line) for line in lines]  # names come from the file

    def _manifest_rows(self) -> list[tuple[str, str]]:
        if not self.manifest:
            return []
        m = self.manifest
        pixels = Pixels(m["channel_order"], tuple(m["pixel_mean"]), tuple(m["pixel_std"]), m["stride_in_1x1"])
        trained = f", step {m['step']} on {m['images']:,} images of {m['dataset']}" if m["dataset"] else ""
        rows = [("manifest", f"loco_det {m['loco_det_version']}: {m['architecture']} by {m['method']}{trained}")]
        rows.append(("", f"pixels: {pixels.text()}"))
        rows.append(("", f"proof: {m['proof']['image']}" if "image" in m["proof"] else "not proven"))
        return rows


def inspect(path: str | Path) -> Report:
    """Inspect `path` without reading a tensor's values.

    Raises:
        UserError: not a readable weights file. A file without a usable backbone is no error.
    """
    path = Path(path)
    opened = open_tensors(path)
    tensors = {key: tensor for key, (_, tensor) in network_names(path, opened).items()}
    header = safetensors_metadata(path).get(HEADER_KEY) or opened.get(HEADER_KEY)
    manifest = decode_manifest(header, path) if isinstance(header, str) else None
    found = candidates(path, tensors)
    backbones = [_backbone(path, opened, candidate, manifest) for candidate in found]
    if manifest and len(backbones) == 1:
        backbones[0]["source"] = f"loco_det ({manifest.method})"
    problem = ""
    if not backbones:
        try:
            take_account(path, opened, read=False)
        except UserError as error:
            problem = str(error)
    metadata = dict(list(_scalar_entries(opened))[:MAX_ENTRIES])
    plain = json.loads(msgspec.json.encode(manifest)) if manifest else {}
    return Report(
        file=str(path),
        kind=file_kind(path),
        size=path.stat().st_size,
        metadata=metadata,
        left_out=left_out(opened),
        manifest=plain,
        backbones=backbones,
        problem=problem,
        groups=_groups(tensors, found),
    )


def _backbone(path: Path, opened: dict[str, Any], candidate: Candidate, manifest: Manifest | None) -> dict[str, Any]:
    name = candidate.source.name if candidate.source else "unknown code base"
    found: dict[str, Any] = {"source": name, "branch": candidate.branch, "prefix": candidate.prefix}
    try:
        if manifest:
            require_resnet(path, manifest)
        account, candidate = take_account(path, opened, candidate.prefix, read=False)
    except UserError as error:
        return {**found, "problem": str(error)}
    pixels = candidate.source.pixels if candidate.source else None
    if candidate.source is None:  # or the nearest row does not know every tensor
        found |= {"source": "unknown code base", "branch": candidate.branch}
    else:
        found |= {"source": candidate.source.name, "branch": candidate.branch}
    return {
        **found,
        "architecture": account.architecture.name,
        "pixels": pixels.text() if pixels else "must be stated",
        "converted": len(account.converted) - len(account.made),
        "dropped": {reason: len(keys) for reason, keys in account.dropped.items()},
    }


def _scalar_entries(opened: dict[str, Any], place: str = "", depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Yield the plain values of the outer dictionaries, with their places."""
    for name, value in opened.items():
        where = f"{place}/{name}" if place else str(name)
        if isinstance(value, dict) and depth > 1:
            yield from _scalar_entries(value, where, depth - 1)
        elif isinstance(value, float) and not math.isfinite(value):
            yield where, str(value)  # not representable in JSON
        elif isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64):
            yield where, value
        elif isinstance(value, str) and where != HEADER_KEY:
            yield where, value if len(value) <= 60 else f"{value[:57]}..."


def _groups(tensors: dict[str, Tensor], found: list[Candidate]) -> list[dict[str, Any]]:
    """Group tensors by the part of a network, or the dictionary beside it, that they belong to."""
    groups: dict[str, dict[str, Any]] = {}
    prefixes = sorted((candidate.prefix for candidate in found), key=len, reverse=True)
    for key, tensor in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        container, colon, name = key.rpartition(":")
        if prefix is None:
            prefix = container + colon + ("module." if name.startswith("module.") else "")
        rest = key[len(prefix) :]
        beside = "/" in container and not prefix.endswith(".")  # optimizer/state/7:exp_avg
        place = container.partition("/")[0] if beside else prefix + rest.partition(".")[0]
        group = groups.setdefault(place, {"place": place, "tensors": 0, "values": 0, "dtypes": Counter(), "first": ""})
        group["tensors"] += 1
        group["values"] += math.prod(tensor.shape)
        group["dtypes"][dtype_name(tensor)] += 1
        group["first"] = group["first"] or f"{rest} {list(tensor.shape)}"
    return [{**group, "dtypes": dict(group["dtypes"])} for group in groups.values()]
