"""Converts MODEL.WEIGHTS of another project into OUTPUT_DIR, with account and proof in the log."""

from __future__ import annotations

import os
from pathlib import Path

from fvcore.common.config import CfgNode

from loco_det.backbones.artifact import HEADER_KEY
from loco_det.backbones.own import WITH_WEIGHTS
from loco_det.backbones.timm_models import PREFIX as TIMM
from loco_det.backbones.windows import WINDOW_OPTIONS
from loco_det.convert import Stated, convert
from loco_det.convert.conversion import is_described
from loco_det.convert.load import open_tensors, safetensors_metadata
from loco_det.convert.stated import PixelsUnknown
from loco_det.convert.timm_models import convert_timm
from loco_det.core import config
from loco_det.core.distributed import first_of_all, is_main
from loco_det.core.errors import UserError
from loco_det.core.log import log
from loco_det.detection.weights import PREFIXES, STAGE

NAME = "converted_backbone"


def with_own_weights(cfg: CfgNode) -> CfgNode:
    """Return `cfg` with weights that `load_weights` reads; files of other projects are converted by the main process.

    A file that does not record its pixels is taken to have those of the configuration, with a line in the log.

    Raises:
        UserError: in every process, as `convert`.
    """
    path = str(cfg.MODEL.WEIGHTS)
    if not path or cfg.MODEL.BACKBONE.NAME.startswith(WITH_WEIGHTS) or not is_foreign(path):
        return cfg
    is_timm = path.startswith(TIMM) or cfg.MODEL.BACKBONE.NAME.startswith(TIMM)
    target, problem = Path(cfg.OUTPUT_DIR) / f"{NAME}{'.safetensors' if is_timm else '.pkl'}", None
    if is_main():
        try:
            _convert(cfg, path, target, is_timm)
        except UserError as error:
            problem = str(error)
    if problem := first_of_all(problem):
        raise UserError(problem)
    return config.changed(cfg, **{"MODEL.WEIGHTS": str(target)})


def is_foreign(path: str) -> bool:
    """Whether weights have neither our manifest nor Detectron2's names; False for a file that is not there."""
    if path.startswith(TIMM):
        return True
    path = os.path.expanduser(path)
    if "://" in path or not os.path.isfile(path) or is_described(path):
        return False
    if HEADER_KEY in safetensors_metadata(Path(path)):
        return False
    tensors = open_tensors(path)
    names = tensors["model"] if isinstance(tensors.get("model"), dict) else tensors
    known = (*PREFIXES, "backbone.body.")  # the last are torchvision's detectors, which `read_weights` refuses by name
    return not any(str(name).startswith(known) or STAGE.match(str(name)) for name in names)


def _convert(cfg: CfgNode, path: str, target: Path, is_timm: bool) -> None:
    log.info("MODEL.WEIGHTS %s is not Detectron2's: converting it to %s", path, target)
    if is_timm:
        name = path if path.startswith(TIMM) else _without_windows(cfg.MODEL.BACKBONE.NAME)
        account = convert_timm(path, target, name)
    else:
        try:
            account = convert(path, target)
        except PixelsUnknown:
            pixels = cfg.INPUT.FORMAT, tuple(map(float, cfg.MODEL.PIXEL_MEAN)), tuple(map(float, cfg.MODEL.PIXEL_STD))
            log.warning("%s does not say what pixels it was trained with: taking the configuration's, %s, mean %s, "
                        "std %s; check them", path, *pixels)  # fmt: skip
            account = convert(path, target, stated=Stated(*pixels, bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1)))
    for line in account.lines():
        log.info("%s", line)


def _without_windows(name: str) -> str:
    """The model that a file is of: only a detector adds windows and relative positions to it."""
    model, _, query = name.partition("?")
    kept = [option for option in query.split("&") if option.partition("=")[0] not in WINDOW_OPTIONS]
    return "?".join(filter(None, (model, "&".join(kept))))
