"""The keys of a detection configuration that are this package's own, beside Detectron2's.

A configuration has Detectron2's whole tree, and of these keys only those that differ from their default: without them
it is plain Detectron2's, in memory and as the config.yaml of a run. `detection.keys.load_cfg` accepts them in YAML and
on the command line, `own_value` reads them, and Detectron2's own code never sees them.
"""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode


class OwnKey(NamedTuple):
    """A key's default value, which also decides its type, and what it means."""

    default: Any
    meaning: str


OWN_KEYS: dict[str, OwnKey] = {
    "DETERMINISTIC": OwnKey(
        False, "on a GPU: the same numbers in every run, slower; torchvision engine (a CPU repeats its numbers anyway)"
    ),
    "SOLVER.OPTIMIZER": OwnKey("SGD", "`SGD` or `AdamW`"),
    "SOLVER.BETAS": OwnKey((0.9, 0.999), "AdamW's decay of the mean gradient and of its square"),
    "SOLVER.LAYER_DECAY": OwnKey(
        1.0,
        "plain transformers of timm: factor of the learning rate from a block to the one below (ViTDet's ViT-B: 0.7)",
    ),
    "SOLVER.WEIGHT_DECAY_POSITIONS": OwnKey(
        None, "weight decay of position embeddings (ViTDet: 0.0); none: as for other weights"
    ),
    "SOLVER.AMP.DTYPE": OwnKey(
        "auto", "of `SOLVER.AMP.ENABLED`: `fp16` (with loss scaling), `bf16`, or `auto`: fp16 on a GPU, bf16 on a CPU"
    ),
    "INPUT.SCALE_JITTER": OwnKey(
        (), "least and largest scale of large-scale jitter (ViTDet: 0.1, 2.0), which replaces `INPUT.MIN_SIZE_TRAIN`"
    ),
    "INPUT.SCALE_JITTER_SIZE": OwnKey(1024, "pixels: scale 1 fits an image into this square; larger ones are cropped"),
    "INPUT.SCALE_JITTER_PAD": OwnKey(False, "pad smaller images to that square, with the value 128"),
    "MODEL.BACKBONE.SQUARE_PAD": OwnKey(
        0, "pixels: side of the square to which the network pads all images (ViTDet: 1024); 0: as small as possible"
    ),
}


def own_value(cfg: CfgNode, key: str) -> Any:
    """Return the value of one of `OWN_KEYS`: its default, unless `cfg` has the key."""
    *sections, last = key.split(".")
    return reduce(getitem, sections, cfg).get(last, OWN_KEYS[key].default)
