"""Writes the keys that put a model of transformers, `hf:FOLDER`, under a detector; its weights stay where they are.

loco-det convert hf:facebook/dinov2-small dinov2.yaml
"""

from __future__ import annotations

from pathlib import Path

from loco_det.backbones.hf_models import HfBackbone
from loco_det.backbones.own import HF_PREFIX
from loco_det.convert.export import READ, backbone_name, is_fragment, keys_text
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write


def write_keys(source: str, output: str | Path) -> HfBackbone:
    """Load `source`, "hf:FOLDER" or "hf:NAME", and write `output`, the YAML of its keys; returns the backbone.

    Raises:
        UserError: `output` is no .yaml or is in the way, or the model cannot be loaded.
    """
    output = Path(output)
    if output.suffix != ".yaml":
        raise UserError(
            f"{output}: the weights of {source} stay where they are; give the name of a .yaml for the keys that must "
            "agree with them"
        )
    if output.exists() and not is_fragment(output):
        raise UserError(f"{output}: is in the way of the YAML keys of {source}; give the output another name")
    backbone = HfBackbone(source.removeprefix(HF_PREFIX))
    pixels = backbone.order, backbone.pixel_mean, backbone.pixel_std
    with atomic_write(output, "w") as file:
        file.write(keys_text(f"{source}, {READ}", "", *pixels, backbone_name(source)))
    return backbone
