"""The configurations of a plan's commands, and how those of finished runs differ from them."""

from __future__ import annotations

import functools

from fvcore.common.config import CfgNode

from loco_det.backbones.artifact import load_backbone
from loco_det.core.config import load_config
from loco_det.detection.keys import load_cfg
from loco_det.paper.plan import Step, config_of
from pretrain.defaults import get_cfg
from pretrain.train import changed_settings


@functools.cache
def configuration(step: Step) -> CfgNode:
    """Return the configuration of a `pretrain` or `train` command, as the command reads it.

    Raises:
        UserError: a wrong key or value.
    """
    file, overrides = config_of(step), step.words[step.words.index("--config-file") + 2 :]
    return (load_config(get_cfg(), file, overrides) if step.words[0] == "pretrain" else load_cfg(file, overrides))[0]


def changed_from_plan(step: Step) -> dict[str, str]:
    """Return the keys in which a finished pretraining differs from its plan: {"SOLVER.BASE_LR": "0.5 before, ..."}.

    Raises:
        UserError: the backbone cannot be read.
    """
    return changed_settings(load_backbone(step.made)[1].config, configuration(step))
