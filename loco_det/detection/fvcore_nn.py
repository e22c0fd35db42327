"""What the detector takes from fvcore.nn: initialisers and losses that Detectron2 uses.

Newer torch warns while fvcore compiles a loss that nothing here uses; importing this package must warn of nothing.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
    from fvcore.nn import giou_loss, smooth_l1_loss
    from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill

__all__ = ["c2_msra_fill", "c2_xavier_fill", "giou_loss", "smooth_l1_loss"]
