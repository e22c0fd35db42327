"""The decoder against the same layers written out, and its shapes against the paper's rows."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loco_det.backbones.presnet import PResNet
from loco_det.backbones.resnet import BasicBlock, Bottleneck, ResNet, narrow
from loco_det.core import config
from loco_det.core.errors import UserError
from pretrain.check import check
from pretrain.decoders import Decoder, build_decoder, residual_blocks
from pretrain.defaults import get_cfg


def settings(**changed) -> dict:
    return {**get_cfg().DECODER, "HIDDEN_DIM": 16, "OUT_DIM": 8, **changed}


@pytest.mark.parametrize(
    ("layers", "hidden", "widths"),
    [(1, 5, [8, 3]), (2, 5, [8, 5, 3]), (3, 5, [8, 5, 5, 3]), (3, 0, [8, 8, 8, 3]), (4, 5, [8, 5, 5, 5, 3])],
)
def test_blocks_then_the_mean_over_the_map_then_linear_layers(layers: int, hidden: int, widths: list[int]) -> None:
    torch.manual_seed(0)
    blocks = residual_blocks(8, 2, {0})
    decoder = Decoder(8, blocks, mlp_layers=layers, hidden_dim=hidden, out_dim=3).double()
    x = torch.randn(6, 8, 5, 7, dtype=torch.float64) * 3 + 1
    decoder(x)  # the running statistics are now of something
    decoder.eval()
    linear = [layer for layer in decoder.mlp if isinstance(layer, torch.nn.Linear)]
    norms = [layer for layer in decoder.mlp if isinstance(layer, torch.nn.BatchNorm1d)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths
    assert len(decoder.blocks) == 2
    h = decoder.blocks[1](decoder.blocks[0](x))
    assert h.shape == (6, 8, 3, 4)  # 5 x 7 halved
    h = F.adaptive_avg_pool2d(h, 1).flatten(1)
    for layer, norm in zip(linear, norms, strict=False):
        h = (h @ layer.weight.T - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        h = (h * norm.weight + norm.bias).clamp(min=0)
    h = h @ linear[-1].weight.T + linear[-1].bias
    torch.testing.assert_close(decoder(x), h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("depth", "kind"), [(18, BasicBlock), (50, Bottleneck)])
@pytest.mark.parametrize(("downsample", "sides"), [(True, [7, 7]), (False, [14, 14])])
def test_conv_blocks_are_of_the_units_kind_and_the_first_halves_the_map(depth, kind, downsample, sides) -> None:
    decoder = build_decoder(settings(CONV_BLOCKS=2, DOWNSAMPLE=downsample), ResNet(depth), "res4")
    assert [type(block) for block in decoder.blocks] == [kind, kind]
    x = torch.randn(1, ResNet(depth).channels["res4"], 14, 14)
    for block, side in zip(decoder.blocks, sides):
        x = block(x)
        assert x.shape[2:] == (side, side)
    assert x.shape[1] == ResNet(depth).channels["res4"] == decoder.mlp[0].in_features


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: ResNet(18), BasicBlock),
        (lambda: ResNet(50), Bottleneck),
        (lambda: PResNet(stem_channels=4), BasicBlock),
    ],
)
def test_a_unit_of_the_stem_alone_has_the_first_stages_blocks(make, kind) -> None:
    backbone = make()
    decoder = build_decoder(settings(CONV_BLOCKS=1), backbone, "stem")
    assert [type(block) for block in decoder.blocks] == [kind]
    assert decoder(torch.randn(2, backbone.channels["stem"], 8, 8)).shape == (2, 8)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", ["stem", "res2", "res5"])
def test_no_network_is_too_narrow_for_a_bottleneck(width: int, stage: str) -> None:
    backbone = ResNet(50, stem="cifar", **narrow(50, width))
    decoder = build_decoder(settings(CONV_BLOCKS=2), backbone, stage)
    assert decoder(torch.randn(2, backbone.channels[stage], 8, 8)).shape == (2, 8)


@pytest.mark.parametrize("depth", [18, 50])
def test_conv_stage_is_the_next_stage_with_weights_of_its_own(depth: int) -> None:
    torch.manual_seed(0)
    backbone = ResNet(depth)
    before = copy.deepcopy(backbone.state_dict())
    x = torch.randn(2, backbone.channels["res3"], 28, 28)
    backbone.res4(x)  # what the copy must not inherit: weights and running statistics
    decoder = build_decoder(settings(CONV="stage"), backbone, "res3")
    theirs, ours = backbone.res4.state_dict(), decoder.blocks.state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    convolutions = [name for name, module in backbone.res4.named_modules() if isinstance(module, nn.Conv2d)]
    for name in convolutions:
        weight = ours[f"{name}.weight"]
        assert not torch.equal(weight, theirs[f"{name}.weight"])
        expected = (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5  # Kaiming, fan out
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert all(not ours[name].any() for name in ours if name.endswith(("running_mean", "num_batches_tracked")))
    assert decoder(x).shape == (2, 8)
    assert decoder.mlp[0].in_features == backbone.channels["res4"]
    for name in before:  # the backbone keeps its weights
        if "running" not in name and "tracked" not in name:
            assert torch.equal(backbone.state_dict()[name], before[name])


@pytest.mark.parametrize(("conv", "width"), [("blocks", 128), ("full", 128), ("stage", 256)])
def test_hidden_layers_without_a_width_are_as_wide_as_what_is_pooled(conv: str, width: int) -> None:
    decoder = build_decoder(settings(CONV=conv, HIDDEN_DIM=0), ResNet(18), "res3")
    assert (decoder.mlp[0].in_features, decoder.mlp[0].out_features) == (width, width)


def test_the_last_stage_has_as_many_blocks_as_itself_for_a_next_stage() -> None:
    decoder = build_decoder(settings(CONV="stage"), ResNet(50), "res5")
    x = torch.randn(1, 2048, 7, 7)
    sides = [(x := block(x)).shape[1:] for block in decoder.blocks]
    assert sides == [(2048, 4, 4)] * 3


@pytest.mark.parametrize(("stage", "side"), [("res2", 56), ("res4", 14)])
def test_conv_full_is_as_deep_as_the_backbone(stage: str, side: int) -> None:
    with torch.device("meta"):
        backbone = ResNet(50)
        decoder = build_decoder(settings(CONV="full"), backbone, stage)
        x = torch.empty(1, backbone.channels[stage], side, side)
        sides = [(x := block(x)).shape[2] for block in decoder.blocks]
    assert sides == [side] * 3 + [-(-side // 2)] * 4 + [-(-side // 4)] * 6 + [-(-side // 8)] * 3


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"CONV": "deep"}, "DECODER.CONV"),
        ({"CONV": "stage", "CONV_BLOCKS": 1}, "DECODER.CONV_BLOCKS is 1, but DECODER.CONV stage"),
        ({"CONV_BLOCKS": -1}, "DECODER.CONV_BLOCKS"),
        ({"DOWNSAMPLE": False}, "DECODER.DOWNSAMPLE is False"),
        ({"CONV": "full", "DOWNSAMPLE": False}, "DECODER.DOWNSAMPLE is False"),
        ({"MLP_LAYERS": 5}, "DECODER.MLP_LAYERS"),
        ({"OUT_DIM": 0}, "DECODER.OUT_DIM"),
    ],
)
def test_a_key_that_cannot_be_is_named(changed: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(config.changed(get_cfg(), **{f"DECODER.{key}": value for key, value in changed.items()}))


def test_a_sum_that_half_precision_cannot_hold_is_pooled_all_the_same() -> None:
    torch.manual_seed(0)
    decoder = Decoder(8, mlp_layers=2, hidden_dim=4, out_dim=3).eval()
    x = torch.full((2, 8, 64, 64), 100.0)
    assert x[0, 0].half().sum().isinf()
    torch.testing.assert_close(decoder(x.half()), decoder(x))
