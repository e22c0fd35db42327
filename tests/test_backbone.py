"""The ResNets against torchvision's, tensor by tensor and in float64; names, freezing, hash."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loco_det.backbones.names import to_detectron2, to_torchvision
from loco_det.backbones.resnet import (
    BLOCKS,
    STAGES,
    FrozenBatchNorm2d,
    ResNet,
    freeze,
    make_norm,
    make_stage,
    stage_channels,
    stage_strides,
    tensors_hash,
)
from loco_det.core.errors import UserError

WIDE = {
    "resnext50_32x4d": {"groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"groups": 32, "width_per_group": 8},
    "wide_resnet50_2": {"width_per_group": 128},
}
NAMES = [f"resnet{depth}" for depth in BLOCKS]


def theirs(name: str) -> nn.Module:
    with torch.device("meta"):
        return getattr(torchvision.models, name)()


def ours(name: str, **kwargs: object) -> ResNet:
    digits = "".join(c for c in name.split("_")[0] if c.isdigit()) if not name.startswith("wide") else "50"
    return ResNet(int(digits), **WIDE.get(name, {}), **kwargs)


def backbone_state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in network.state_dict().items() if not name.startswith("fc.")}


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *WIDE])
def test_names_are_a_bijection_over_every_tensor_of_torchvision(name: str) -> None:
    state = backbone_state(theirs(name))
    renamed = {to_detectron2(n): t.shape for n, t in state.items()}
    assert len(renamed) == len(state)
    assert [to_torchvision(to_detectron2(n)) for n in state] == list(state)
    with torch.device("meta"):
        mine = ours(name)
    assert renamed == {n: t.shape for n, t in mine.state_dict().items()}


@pytest.mark.parametrize(
    ("torchvision_name", "detectron2_name"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv3.weight", "res2.0.conv3.weight"),
        ("layer2.3.bn2.bias", "res3.3.conv2.norm.bias"),
        ("layer3.22.bn1.num_batches_tracked", "res4.22.conv1.norm.num_batches_tracked"),
        ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
        ("layer4.0.downsample.1.running_mean", "res5.0.shortcut.norm.running_mean"),
        ("layer6.2.conv3.weight", "res7.2.conv3.weight"),  # PResNet-50's, which neither library has
    ],
)
def test_names_as_the_two_libraries_write_them(torchvision_name: str, detectron2_name: str) -> None:
    assert to_detectron2(torchvision_name) == detectron2_name
    assert to_torchvision(detectron2_name) == torchvision_name


REFUSED = [
    "",
    "fc.weight",
    "conv1",
    "conv1.weight ",
    "conv1.weight\n",
    "module.conv1.weight",
    "layer0.0.conv1.weight",
    "layer7.0.conv1.weight",
    "layer1.00.conv1.weight",
    "layer01.0.conv1.weight",
    "layer1.-1.conv1.weight",
    "layer1.0.conv4.weight",
    "layer1.0.downsample.2.weight",
    "layer1.0.se.fc1.weight",
    "layer1.٣.conv1.weight",
    "layer1." + "9" * 5000 + ".conv1.weight",
    "res2.0.conv1.weight",
]


@pytest.mark.parametrize("name", REFUSED, ids=range(len(REFUSED)))
def test_other_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="not a torchvision ResNet backbone tensor"):
        to_detectron2(name)


@pytest.mark.parametrize("name", ["res1.0.conv1.weight", "res8.0.conv1.weight", "conv1.weight", "stem.fc.weight"])
def test_other_detectron2_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a Detectron2 ResNet backbone tensor"):
        to_torchvision(name)


PIECES = [
    "layer",
    "res",
    "stem",
    "conv",
    "bn",
    "norm",
    "shortcut",
    "downsample",
    ".",
    "0",
    "1",
    "2",
    "3",
    "5",
    "weight",
]


@given(st.lists(st.sampled_from(PIECES), max_size=9).map("".join))
def test_a_name_survives_the_way_there_and_back_or_is_refused(name: str) -> None:
    for there, back in ((to_detectron2, to_torchvision), (to_torchvision, to_detectron2)):
        try:
            renamed = there(name)
        except UserError:
            continue
        assert back(renamed) == name


# --- arithmetic -------------------------------------------------------------------------------------------------


def randomise(network: nn.Module) -> None:
    """Statistics and affine terms that an error would show in."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "downsample.1.weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bn3.weight"):
            tensor.uniform_(0.1, 0.3, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("name", [*NAMES, "resnext50_32x4d", "wide_resnet50_2"])
@torch.no_grad()
def test_every_stage_equals_torchvisions_in_float64(name: str) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)().double().eval()
    randomise(reference)
    mine = ours(name).double().eval()
    mine.load_state_dict({to_detectron2(n): t for n, t in backbone_state(reference).items()})
    frozen = freeze(copy.deepcopy(mine))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    outputs, frozen_outputs = mine(x), frozen(x)
    expected = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
    for stage, layer in zip(STAGES, [nn.Identity(), *(getattr(reference, f"layer{i}") for i in range(1, 5))]):
        expected = layer(expected)
        assert outputs[stage].shape == expected.shape
        scale = expected.abs().max()
        assert (outputs[stage] - expected).abs().max() <= 1e-12 * scale
        assert (frozen_outputs[stage] - expected).abs().max() <= 1e-10 * scale
        assert expected.std() > 0.01


def test_training_mode_gives_torchvisions_losses_gradients_and_statistics() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet18().double().train()
    mine = ResNet(18).double().train()
    mine.load_state_dict({to_detectron2(n): t for n, t in backbone_state(reference).items()})
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    reference.fc = nn.Identity()
    reference(x).square().sum().backward()
    mine(x)["res5"].mean((2, 3)).square().sum().backward()
    gradients = dict(mine.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[to_detectron2(name)].grad, parameter.grad, rtol=1e-8, atol=1e-10)
    state = mine.state_dict()
    for name, tensor in backbone_state(reference).items():
        torch.testing.assert_close(state[to_detectron2(name)], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_channels_and_strides_are_those_announced(depth: int, stem: str) -> None:
    network = ResNet(depth, stem=stem).eval()
    with torch.no_grad():
        outputs = network(torch.zeros(2, 3, 64, 32))
    assert list(outputs) == list(STAGES) == list(network.channels) == list(network.strides)
    for name, output in outputs.items():
        stride = network.strides[name]
        assert output.shape == (2, network.channels[name], 64 // stride, 32 // stride)
    assert network.strides == stage_strides(stem)
    assert network.strides["res5"] == (32 if stem == "imagenet" else 8)


def test_a_shorter_network_is_the_longer_one_without_its_end() -> None:
    torch.manual_seed(0)
    full, short = ResNet(18).eval(), ResNet(18, last_stage="res4").eval()
    short.load_state_dict({n: t for n, t in full.state_dict().items() if not n.startswith("res5.")})
    head = make_stage("res5", 18).eval()
    head.load_state_dict(full.res5.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        a, b = full(x), short(x)
        assert list(b) == ["stem", "res2", "res3", "res4"]
        assert torch.equal(a["res4"], b["res4"])
        assert torch.equal(a["res5"], head(b["res4"]))


def test_dilation_keeps_the_resolution_and_sees_the_same_far_pixels() -> None:
    torch.manual_seed(0)
    plain = make_stage("res5", 50).double().eval()
    dilated = make_stage("res5", 50, dilation=2).double().eval()
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 1024, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        a, b = plain(x), dilated(x)
    assert b.shape == (1, 2048, 8, 8)
    assert a.shape == (1, 2048, 4, 4)
    # A 3x3 of dilation 2 reads, around an even pixel, only even pixels: there the dilated stage is a plain one
    # without stride on every other pixel.
    plain[0].conv2.stride = plain[0].shortcut.stride = (1, 1)
    with torch.no_grad():
        torch.testing.assert_close(b[:, :, ::2, ::2], plain(x[:, :, ::2, ::2]), rtol=1e-10, atol=1e-12)
    assert ResNet(50, res5_dilation=2).strides["res5"] == 16


def test_stride_in_1x1_moves_the_stride_and_nothing_else() -> None:
    torch.manual_seed(0)
    caffe, ours_ = (make_stage("res3", 50, stride_in_1x1=flag).double().eval() for flag in (True, False))
    caffe.load_state_dict(ours_.state_dict())
    x = torch.randn(1, 256, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        a = caffe(x)
        assert a.shape == ours_(x).shape == (1, 512, 4, 4)
        assert not torch.allclose(a, ours_(x))
        block = ours_[0]  # by hand: subsample first, then a block without stride
        block.conv2.stride = block.shortcut.stride = (1, 1)
        torch.testing.assert_close(ours_(x[:, :, ::2, ::2]), a, rtol=1e-12, atol=1e-12)


def test_stage_channels() -> None:
    assert stage_channels(50) == {"stem": 64, "res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    assert stage_channels(34)["res5"] == 512
    assert stage_channels(50, 16, 8) == {"stem": 8, "res2": 16, "res3": 32, "res4": 64, "res5": 128}


# --- freezing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_frozen_batchnorm_is_batchnorm_in_evaluation(needs_gradient: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    for tensor in (norm.running_mean, norm.bias.data):
        tensor.normal_()
    for tensor in (norm.running_var, norm.weight.data):
        tensor.uniform_(0.5, 2)
    frozen = freeze(copy.deepcopy(norm)).train()  # its mode must not matter
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=needs_gradient)
    expected = norm.eval()(x)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-12, atol=1e-12)
    if needs_gradient:
        (theirs_,) = torch.autograd.grad(expected.square().sum(), x)
        (mine,) = torch.autograd.grad(frozen(x).square().sum(), x)
        torch.testing.assert_close(mine, theirs_, rtol=1e-10, atol=1e-12)


def test_frozen_batchnorm_keeps_half_precision() -> None:
    frozen = FrozenBatchNorm2d(3)
    for x in (
        torch.ones(1, 3, 2, 2, dtype=torch.bfloat16),
        torch.ones(1, 3, 2, 2, dtype=torch.bfloat16).requires_grad_(),
    ):
        assert frozen(x).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "FrozenBN", "GN"])
def test_a_frozen_network_has_nothing_left_to_train(norm: str) -> None:
    network = ResNet(18, norm=norm)
    before = {n: t.clone() for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert freeze(network) is network
    network.train()
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    out = network(torch.randn(2, 3, 64, 64))["res5"]
    assert not out.requires_grad
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_freezing_one_stage_leaves_the_others() -> None:
    network = ResNet(18).train()
    freeze(network.stem)
    freeze(network.res2)
    network(torch.randn(2, 3, 64, 64))["res5"].sum().backward()
    trained = {n.partition(".")[0] for n, p in network.named_parameters() if p.grad is not None}
    assert trained == {"res3", "res4", "res5"}
    assert isinstance(network.res3[0].conv1.norm, nn.BatchNorm2d)


def test_freezing_keeps_dtype_and_eps() -> None:
    frozen = freeze(nn.BatchNorm2d(3, eps=0.01).double())
    assert isinstance(frozen, FrozenBatchNorm2d)
    assert frozen.eps == 0.01
    assert frozen.running_mean.dtype == torch.float64


def test_a_frozen_norm_loads_the_state_of_a_trained_one() -> None:
    state = nn.BatchNorm2d(3).state_dict()
    FrozenBatchNorm2d(3).load_state_dict(state)
    assert "num_batches_tracked" in state  # the caller's dict is its own


def test_norms_by_their_names() -> None:
    kinds = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "FrozenBN": FrozenBatchNorm2d, "GN": nn.GroupNorm}
    for name, kind in kinds.items():
        assert type(make_norm(name, 64)) is kind


# --- hash -------------------------------------------------------------------------------------------------------


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor(1.5),
        "c": torch.zeros(0),
        "d": torch.ones(2).bool(),
    }


def test_the_hash_knows_only_names_types_shapes_and_values() -> None:
    tensors = some_tensors()
    digest = tensors_hash(tensors.items())
    assert digest == tensors_hash(reversed(list(tensors.items())))
    assert digest == tensors_hash({n: t.clone() for n, t in tensors.items()}.items())
    strided = {**tensors, "a": torch.stack([tensors["a"], tensors["a"]], dim=2)[..., 0]}
    assert not strided["a"].is_contiguous()
    assert digest == tensors_hash(strided.items())
    assert len(digest) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.arange(6.0).reshape(3, 2)},
        {"a": torch.arange(6.0).reshape(2, 3).double()},
        {"a": torch.arange(6.0).reshape(2, 3).int()},
        {"a": torch.nextafter(torch.arange(6.0), torch.tensor(9.0)).reshape(2, 3)},
        {"b": torch.tensor([1.5])},
        {"e": torch.zeros(0)},
        {"d": torch.ones(2, dtype=torch.uint8)},
    ],
)
def test_the_hash_sees_every_change(change: dict[str, torch.Tensor]) -> None:
    tensors = some_tensors()
    assert tensors_hash({**tensors, **change}.items()) != tensors_hash(tensors.items())


def test_the_hash_sees_a_swap_and_a_signed_zero() -> None:
    a, b = torch.zeros(3), torch.ones(3)
    assert tensors_hash([("a", a), ("b", b)]) != tensors_hash([("a", b), ("b", a)])
    assert tensors_hash([("a", a)]) != tensors_hash([("a", -a)])
