"""What detection adds to timm's hierarchical models: windows on images of any size, and a norm behind each map.

timm decides at the size for which a Swin is built which blocks shift their windows: none where the map is one window.
And it shifts before it pads a map to whole windows, so that rows and columns that the shift has joined are no longer
where its mask expects them: the upper border attends to the lower one. `use_any_size` gives its blocks the rules of
Swin's own code: a map is padded first, and blocks with odd numbers shift wherever the map is larger than a window. At
the size for which a model is built nothing changes.
Source: Swin-Transformer-Object-Detection, `mmdet/models/backbones/swin_transformer.py`; detectron2's `swin.py`; for the
norms behind ConvNeXt's maps ConvNeXt's `object_detection/mmdet/models/backbones/convnext.py`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Class of timm's model -> epsilon of the LayerNorm behind each map in its authors' detection code.
LEVEL_NORMS = {"SwinTransformer": 1e-5, "SwinTransformerV2": 1e-5, "ConvNeXt": 1e-6}
SWINS = ("SwinTransformer", "SwinTransformerV2")


def use_any_size(model: nn.Module) -> None:
    """Let a Swin of timm place its windows as Swin's detection code does; other models stay as they are."""
    if type(model).__name__ in SWINS:
        for layer in model.layers:
            for number, block in enumerate(layer.blocks):
                block._attn = MethodType(_windows(type(block)._attn, is_odd=number % 2 == 1), block)


def _windows(attend: Any, is_odd: bool) -> Any:
    def attend_padded(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape."""
        height, width = x.shape[1:3]
        built_for = self.shift_size
        if is_odd and min(height, width) > max(self.window_size):
            self.shift_size = tuple(side // 2 for side in self.window_size)
        down, across = (-side % window for side, window in zip((height, width), self.window_size))
        try:
            return attend(self, F.pad(x, (0, 0, 0, across, 0, down)))[:, :height, :width].contiguous()
        finally:
            self.shift_size = built_for

    return attend_padded
