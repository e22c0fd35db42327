"""The fast form of a network gives the numbers of its exact form up to rounding, and leaves its parameters alone."""

from __future__ import annotations

import copy
from typing import Any

import detection_cases as cases
import pytest
import torch
from torch import nn
from torchvision.ops import roi_align

from loco_det.backbones.folding import convolve
from loco_det.backbones.resnet import BLOCKS, Conv2d, ResNet, freeze
from loco_det.detection import cpu_speed, solver
from loco_det.detection.cpu_speed import is_fast, predict_cells, speed_up
from loco_det.detection.keys import get_cfg
from loco_det.detection.masks import MaskHead
from loco_det.detection.poolers import RoiPooler
from loco_det.detection.rcnn import build_model
from loco_det.detection.rpn import RPNHead

VARIANTS = {
    "FPN": (cases.FPN,),
    "frozen": (cases.FPN, {"MODEL.BACKBONE.FREEZE_AT": 5}),
    "fine-tuned BN": (
        cases.FPN,
        {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0},
    ),
    "half-frozen BN": (cases.FPN, {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 3}),
    "GN": (cases.FPN, {"MODEL.FPN.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 32}),
    "groups": (cases.FPN, {"MODEL.RESNETS.NUM_GROUPS": 4, "MODEL.RESNETS.STRIDE_IN_1X1": False}),
    "R18": (cases.FPN, cases.R18),
    "C4": (cases.C4,),
    "DC5": (cases.DC5,),
    "deformable": (cases.FPN, cases.DEFORM),
    "two layers in the RPN": (cases.FPN, {"MODEL.RPN.CONV_DIMS": [8, -1]}),
    "class-agnostic": (cases.FPN, {"MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True}),
    "ROIAlign": (
        cases.FPN,
        {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign", "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2},
    ),
    "ROIPool": (cases.FPN, {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool"}),
}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return cases.formula_weights(build_model(cases.configure(get_cfg(), *VARIANTS[request.param])))


def losses_and_gradients(model: nn.Module) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    torch.manual_seed(5)
    losses = model(cases.our_batch(train=True))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, gradients


def test_training_is_the_same_mathematics(model: nn.Module) -> None:
    """In float64, where a wrong term cannot hide behind rounding."""
    model.double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact, exact_gradients = losses_and_gradients(model)
    fast, fast_gradients = losses_and_gradients(speed_up(model))
    assert fast == pytest.approx(exact, rel=1e-8)
    assert fast_gradients.keys() == exact_gradients.keys()
    for name, gradient in exact_gradients.items():
        assert (fast_gradients[name] - gradient).abs().max() <= 1e-7 * gradient.abs().max(), name
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_in_float32_it_differs_by_rounding(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loco_det.detection.roi_heads.BOXES_AT_ONCE", 7)  # several parts and a smaller last one
    monkeypatch.setattr("loco_det.detection.roi_heads.MASKS_AT_ONCE", 3)
    exact, _ = losses_and_gradients(model)
    with torch.inference_mode():
        expected = copy.deepcopy(model).eval()(cases.our_batch(train=False))
    fast, _ = losses_and_gradients(speed_up(model))
    with torch.inference_mode():
        found = model.eval()(cases.our_batch(train=False))
    assert fast == pytest.approx(exact, rel=1e-5)
    for ours, theirs in zip(found, expected):
        assert len(ours) == len(theirs) > 0
        assert torch.equal(ours.classes, theirs.classes)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.boxes, theirs.boxes, rtol=1e-4, atol=1e-3)
        assert (ours.masks != theirs.masks).float().mean() < 1e-3


def test_mixed_precision_trains_everything_and_rounds_no_further(model: nn.Module) -> None:
    """Losses in bfloat16 lie no further from float32's than those of the exact form, and every trained tensor learns.

    5 % is bfloat16's own way from float32 here; it is further where other proposals survive suppression.
    """

    def losses(fast: bool, mixed: bool) -> dict[str, float]:
        trained = speed_up(copy.deepcopy(model), fast).train()
        cfg = get_cfg()
        cfg.SOLVER.AMP.ENABLED = mixed
        torch.manual_seed(5)
        with solver.autocast(cfg, torch.device("cpu"), trained):
            found = trained(cases.our_batch(train=True))
        sum(found.values()).backward()
        assert not [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
        return {name: loss.item() for name, loss in found.items()}

    expected, exact, fast = losses(False, False), losses(False, True), losses(True, True)
    for name, value in expected.items():
        assert abs(fast[name] - value) <= max(2 * abs(exact[name] - value), 0.05 * value), name


def choices(model: nn.Module) -> set[tuple[str, bool]]:
    """(kind, choice) of every part of a network that has two forms."""
    return {(type(part).__name__, part.fast) for part in model.modules() if hasattr(part, "fast")}


@pytest.mark.parametrize("design", [cases.FPN, cases.C4], ids=["FPN", "C4"])
def test_a_network_is_exact_until_it_is_sped_up_as_a_whole(design: dict[str, Any]) -> None:
    kinds = {"GeneralizedRCNN", "ResNetTrunk", "Conv2d", "Conv", "RPN", "RoiPooler", "MaskHead"}
    kinds |= {"StandardROIHeads"} if design is cases.FPN else set()
    exact, fast = ({(kind, choice) for kind in kinds} for choice in (False, True))
    model, other = (build_model(cases.configure(get_cfg(), design)) for _ in range(2))
    assert choices(model) == exact
    assert not is_fast(model)
    assert speed_up(model) is model
    assert choices(model) == fast
    assert is_fast(model)
    assert choices(other) == exact
    assert choices(speed_up(model, False)) == exact


def test_only_a_network_on_a_cpu_has_a_fast_form() -> None:
    model = speed_up(build_model(cases.configure(get_cfg(), cases.FPN)).to("meta"))
    assert {choice for _, choice in choices(model)} == {False}


def test_a_network_without_fast_parts_is_never_fast() -> None:
    """Detectron2's models have none, whatever the command line says."""
    assert not is_fast(speed_up(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))


# --- convolutions -----------------------------------------------------------------------------------------------


def conv_with(norm: str, frozen: bool) -> Conv2d:
    torch.manual_seed(0)
    conv = Conv2d(8, 6, 3, norm, stride=2)
    conv.norm.running_mean.normal_()
    conv.norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(conv.norm.weight)
    nn.init.normal_(conv.norm.bias)
    return freeze(conv) if frozen else conv.eval()


@pytest.fixture(params=[False, True], ids=["other CPUs", "oneDNN"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a folded convolution, where this machine has both."""
    if not request.param:
        monkeypatch.setattr("loco_det.backbones.folding._onednn_takes", lambda *_: False)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_folded_convolution_equals_float64(relu: bool, added: bool) -> None:
    conv = conv_with("BN", frozen=True)
    x, add = torch.randn(2, 8, 9, 7), torch.randn(2, 6, 5, 4) if added else None
    kept = None if add is None else add.clone()
    double = copy.deepcopy(conv).double()
    expected = convolve(double, x.double(), relu=relu, add=None if add is None else add.double())
    conv.fast = True
    found = convolve(conv, x, relu=relu, add=add)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert add is None or torch.equal(add, kept)


@pytest.mark.usefixtures("kernel")
def test_folded_weights_follow_the_parameters() -> None:
    conv, x = conv_with("BN", frozen=True), torch.randn(1, 8, 5, 5)
    changes = [
        lambda: conv.weight.mul_(2),
        lambda: conv.norm.bias.add_(1),
        lambda: conv.norm.running_var.fill_(3),
        lambda: conv.load_state_dict(conv_with("BN", frozen=True).state_dict()),
        lambda: setattr(conv, "weight", nn.Parameter(torch.ones_like(conv.weight), requires_grad=False)),
    ]
    conv.fast = True
    convolve(conv, x)
    for change in changes:
        with torch.no_grad():
            change()
        expected = convolve(speed_up(copy.deepcopy(conv), False), x)
        torch.testing.assert_close(convolve(conv, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernel")
def test_no_regions_give_no_features() -> None:
    conv = speed_up(conv_with("BN", frozen=True))
    assert convolve(conv, torch.zeros(0, 8, 9, 7)).shape == (0, 6, 5, 4)


def test_weights_under_a_frozen_norm_learn_the_same() -> None:
    conv, x = conv_with("FrozenBN", frozen=False), torch.randn(2, 8, 9, 7, requires_grad=True)
    wanted = [conv.weight, x]
    expected = torch.autograd.grad(convolve(conv, x).square().sum(), wanted)
    conv.fast = True
    found = torch.autograd.grad(convolve(conv, x).square().sum(), wanted)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_batchnorm_in_training_is_left_alone() -> None:
    conv, x = conv_with("BN", frozen=False).train(), torch.randn(4, 8, 9, 7)
    other = copy.deepcopy(conv)
    conv.fast = True
    assert torch.equal(convolve(conv, x), convolve(other, x))
    assert torch.equal(conv.norm.running_mean, other.norm.running_mean)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_frozen_network_in_bfloat16_stays_near(depth: int) -> None:
    assert depth in BLOCKS
    torch.manual_seed(0)
    network, x = freeze(ResNet(depth, last_stage="res3")), torch.randn(1, 3, 64, 64)
    expected = network(x)["res3"]
    with torch.autocast("cpu", torch.bfloat16):
        found = speed_up(network)(x)["res3"]
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


# --- regions ----------------------------------------------------------------------------------------------------

BOXES = [
    [3.2, 4.1, 40.7, 33.3],
    [0.0, 0.0, 127.0, 95.0],
    [-30.0, -20.0, 10.0, 12.0],  # across the border
    [100.0, 80.0, 200.0, 190.0],
    [-90.0, -90.0, -50.0, -50.0],  # wholly outside
    [20.0, 20.0, 20.0, 20.0],  # without area
    [30.0, 30.0, 20.0, 25.0],  # inside out
    [5.0, 40.0, 125.0, 43.0],  # many samples along one side
]


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("strides", [[8], [4, 8, 16]])
def test_pooling_equals_torchvisions(kind: str, ratio: int, strides: list[int]) -> None:
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 96 // s, 128 // s, requires_grad=True) for s in strides]
    boxes = [torch.tensor(BOXES), torch.tensor(BOXES[:3]) * 0.9]
    pooler = RoiPooler(7, strides, ratio, kind)
    expected = pooler(features, boxes)
    towards = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, features, towards)
    found = speed_up(pooler)(features, boxes)
    gradients = torch.autograd.grad(found, features, towards)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_pooling_in_float64_terms() -> None:
    """torchvision's own float64 result is as near to ours as to its float32 one."""
    torch.manual_seed(0)
    feature, boxes = torch.randn(1, 2, 12, 16), torch.tensor(BOXES)
    regions = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
    exact = roi_align(feature.double(), regions.double(), (7, 7), 1 / 8, 0, True)
    found = speed_up(RoiPooler(7, [8], 0, "ROIAlignV2"))([feature], [boxes])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_boxes_give_no_regions_and_no_gradient() -> None:
    feature = torch.randn(1, 4, 8, 8, requires_grad=True)
    pooled = speed_up(RoiPooler(7, [8], 0, "ROIAlignV2"))([feature], [torch.zeros(0, 4)])
    assert pooled.shape == (0, 4, 7, 7)
    assert not torch.autograd.grad(pooled.sum(), feature)[0].any()


def test_the_rpn_at_some_anchors_equals_all_of_them() -> None:
    torch.manual_seed(0)
    head = RPNHead(6, 3, [-1])
    features = [torch.randn(2, 6, h, w, requires_grad=True) for h, w in ((5, 7), (3, 4), (1, 1))]
    logits, deltas = (torch.cat(parts, dim=1) for parts in head(features))
    image = torch.tensor([0, 0, 1, 1, 1, 0])
    anchor = torch.tensor([0, 143, 104, 105, 17, 140])  # corners, each level
    expected = logits[image, anchor], deltas[image, anchor]
    found = predict_cells(head.conv, head.objectness_logits, head.anchor_deltas, features, image, anchor)
    wanted = [*features, *head.parameters()]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        ours = torch.autograd.grad(a.square().sum(), wanted, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(b.square().sum(), wanted, retain_graph=True, allow_unused=True)
        for x, y in zip(ours, theirs):
            assert (x is None) == (y is None)
            assert x is None or torch.allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("regions", [0, 3, 4])
def test_masks_of_any_number_of_regions(regions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image in which nothing is found has no masks, and that is no error; two regions at once, and a rest."""
    monkeypatch.setattr(cpu_speed, "MASKS_AT_ONCE", 2)
    torch.manual_seed(0)
    head = MaskHead(cases.configure(get_cfg(), cases.FPN), 8).eval()
    features, classes = torch.randn(regions, 8, 14, 14), torch.arange(regions)
    exact = head(features, classes)
    fast = speed_up(head)(features, classes)
    assert fast.shape == (regions, 28, 28)
    torch.testing.assert_close(fast, exact, rtol=1e-4, atol=1e-6)
