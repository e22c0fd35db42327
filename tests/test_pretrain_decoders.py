"""The decoder against the same layers written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loco_det.backbone import BasicBlock, Bottleneck
from pretrain.decoders import Decoder


@pytest.mark.parametrize(
    ("layers", "hidden", "widths"), [(2, 5, [8, 5, 3]), (3, 5, [8, 5, 5, 3]), (3, 0, [8, 8, 8, 3])]
)
def test_blocks_then_the_mean_over_the_map_then_linear_layers(layers: int, hidden: int, widths: list[int]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(8, conv_blocks=2, mlp_layers=layers, hidden_dim=hidden, out_dim=3).double()
    x = torch.randn(6, 8, 5, 7, dtype=torch.float64) * 3 + 1
    decoder(x)  # the running statistics are now of something
    decoder.eval()
    linear = [layer for layer in decoder.mlp if isinstance(layer, torch.nn.Linear)]
    norms = [layer for layer in decoder.mlp if isinstance(layer, torch.nn.BatchNorm1d)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths
    assert len(decoder.blocks) == 2
    h = decoder.blocks[1](decoder.blocks[0](x))
    assert h.shape == x.shape
    h = F.adaptive_avg_pool2d(h, 1).flatten(1)
    for layer, norm in zip(linear, norms, strict=False):
        h = (h @ layer.weight.T - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        h = (h * norm.weight + norm.bias).clamp(min=0)
    h = h @ linear[-1].weight.T + linear[-1].bias
    torch.testing.assert_close(decoder(x), h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "kind"), [(128, BasicBlock), (256, Bottleneck), (512, Bottleneck)])
def test_blocks_are_of_the_kind_that_the_width_allows(channels: int, kind: type) -> None:
    decoder = Decoder(channels, conv_blocks=1, mlp_layers=2, hidden_dim=4, out_dim=3)
    assert type(decoder.blocks[0]) is kind
    assert decoder.blocks(torch.randn(2, channels, 3, 3)).shape == (2, channels, 3, 3)


def test_a_sum_that_half_precision_cannot_hold_is_pooled_all_the_same() -> None:
    torch.manual_seed(0)
    decoder = Decoder(8, conv_blocks=0, mlp_layers=2, hidden_dim=4, out_dim=3).eval()
    x = torch.full((2, 8, 64, 64), 100.0)
    assert x[0, 0].half().sum().isinf()
    torch.testing.assert_close(decoder(x.half()), decoder(x))
