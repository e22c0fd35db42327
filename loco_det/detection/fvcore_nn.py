"""What the detector takes from fvcore.nn: initialisers, losses and precise BatchNorm, which Detectron2 uses too.

Newer torch warns while fvcore compiles a loss that nothing here uses; importing this package must warn of nothing.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    from fvcore.nn import giou_loss, smooth_l1_loss, update_bn_stats
    from fvcore.nn.precise_bn import get_bn_modules
    from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill

__all__ = ["c2_msra_fill", "c2_xavier_fill", "get_bn_modules", "giou_loss", "smooth_l1_loss", "update_bn_stats"]
