"""The whole detector on small made-up cases: limits, freezing, refusals, and the numbers of Detectron2's own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import detection_cases as cases
import pytest
import torch
from fvcore.common.config import CfgNode

from loco_det.annotations.instances import Instances
from loco_det.backbones.resnet import FrozenBatchNorm2d, make_stage
from loco_det.core.config import flat
from loco_det.core.errors import UserError
from loco_det.detection.fast_rcnn import BoxPredictor
from loco_det.detection.fpn import build_backbone
from loco_det.detection.keys import MODEL_KEYS, check_supported, get_cfg
from loco_det.detection.rcnn import build_model, postprocess
from loco_det.detection.rpn import RPN
from loco_det.detection.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def small(*settings: dict[str, Any]) -> Any:
    return cases.formula_weights(build_model(cases.configure(get_cfg(), *settings)))


@pytest.mark.parametrize("design", [cases.FPN, cases.C4, cases.DC5], ids=["FPN", "C4", "DC5"])
@pytest.mark.parametrize("masks", [True, False])
def test_losses_and_detections_have_their_form(design: dict[str, Any], masks: bool) -> None:
    model = small(design, {"MODEL.MASK_ON": masks})
    losses = model(cases.our_batch(train=True))
    names = ["loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"]
    assert list(losses) == [name for name in names if masks or name != "loss_mask"]
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    model.eval()
    with torch.no_grad():
        detections = model(cases.our_batch(train=False))
    for found, image in zip(detections, cases.images()):
        height, width = 2 * image.shape[1], 2 * image.shape[2] + 1
        assert found.image_size == (height, width)
        assert 0 < len(found) <= 20
        assert (found.boxes[:, 2] <= width).all()
        assert (found.boxes[:, 3] <= height).all()
        assert found.boxes[:, 2].max() > image.shape[2]  # in the original's pixels, not the network's
        assert (found.scores.diff() <= 0).all()
        assert (found.scores > 0.02).all()
        assert ((found.classes >= 0) & (found.classes < cases.CLASSES)).all()
        if masks:
            assert found.masks.dtype == torch.bool
            assert found.masks.shape == (len(found), height, width)
        else:
            assert found.masks is None


def test_the_seed_alone_decides_the_sample() -> None:
    model = small(cases.FPN)

    def loss(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [v.item() for v in model(cases.our_batch(train=True)).values()]

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)


@pytest.mark.parametrize("design", [cases.FPN, cases.C4], ids=["FPN", "C4"])
def test_images_without_objects_train_background_alone(design: dict[str, Any]) -> None:
    model = small(design)
    batch = cases.our_batch(train=True)
    for item in batch:
        item["instances"] = item["instances"][torch.zeros(0, dtype=torch.int64)]
    losses = model(batch)
    assert losses["loss_box_reg"] == losses["loss_mask"] == losses["loss_rpn_loc"] == 0
    assert losses["loss_cls"] > 0
    assert losses["loss_rpn_cls"] > 0
    sum(losses.values()).backward()  # every parameter still takes part, as distributed training needs
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def saved_by(model: Any, name: str) -> dict[str, bool]:
    """Whether each stage's output belongs to a graph."""
    seen: dict[str, bool] = {}
    trunk = model.get_submodule(name)
    handles = [
        getattr(trunk, stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: seen.__setitem__(stage, output.grad_fn is not None)
        )
        for stage in trunk.stage_names
    ]
    sum(model(cases.our_batch(train=True)).values()).backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("freeze_at", [0, 1, 3, 5])
def test_frozen_stages_build_no_graph_and_do_not_move(norm: str, freeze_at: int) -> None:
    model = small(cases.FPN, {"MODEL.RESNETS.NORM": norm, "MODEL.BACKBONE.FREEZE_AT": freeze_at})
    stages = ["stem", "res2", "res3", "res4", "res5"]
    before = {k: v.clone() for k, v in model.backbone.bottom_up.state_dict().items()}
    assert saved_by(model, "backbone.bottom_up") == {stage: index >= freeze_at for index, stage in enumerate(stages)}
    for index, stage in enumerate(stages):
        module = getattr(model.backbone.bottom_up, stage)
        frozen = index < freeze_at
        assert all(p.requires_grad != frozen and (p.grad is None) == frozen for p in module.parameters())
        if frozen:
            assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules())
            assert any(isinstance(m, FrozenBatchNorm2d) for m in module.modules())
        after = {k: v for k, v in model.backbone.bottom_up.state_dict().items() if k.startswith(stage)}
        moved = any(not torch.equal(before[k], v) for k, v in after.items())
        assert moved == (norm == "BN" and not frozen)
    assert model.backbone.fpn_lateral2.weight.grad is not None


@pytest.mark.parametrize(("design", "names"), [(cases.FPN, ["res2", "res3", "res4", "res5"]), (cases.C4, ["res4"])])
def test_a_trunk_gives_what_is_asked_for_and_nothing_else(design: dict[str, Any], names: list[str]) -> None:
    """What it gives is kept until the heads are done, and is what a feature cache writes."""
    backbone = small(design).backbone
    trunk = getattr(backbone, "bottom_up", backbone)
    assert list(trunk(torch.zeros(1, 3, 64, 64))) == names


def test_c4_freezes_the_trunk_and_trains_its_last_stage() -> None:
    model = small(cases.C4, {"MODEL.BACKBONE.FREEZE_AT": 5})
    assert not any(saved_by(model, "backbone").values())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.roi_heads.res5.parameters())


def test_deformable_stages_without_offsets_are_plain_ones() -> None:
    plain, deformed = small(cases.FPN), small(cases.FPN, cases.DEFORM)
    new = set(deformed.state_dict()) - set(plain.state_dict())
    assert new
    assert all(".conv2_offset." in name for name in new)
    for name, tensor in deformed.state_dict().items():
        if name in new:
            tensor.zero_()
    images, _ = plain.preprocess(cases.our_batch(train=False))
    outputs = [model.backbone(images) for model in (plain, deformed)]
    for name in outputs[0]:
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-4, atol=1e-4)
    for found in outputs:
        sum(feature.square().mean() for feature in found.values()).backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in deformed.backbone.named_parameters(prefix="backbone"):
        if name in new:
            stage = name.split(".")[2]
            assert (parameter.grad is not None) == (stage in ("res3", "res4", "res5"))
        elif parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        deformed.backbone.bottom_up.res4[0].conv2_offset.bias.fill_(1.0)
        assert not torch.allclose(deformed.backbone(images)["p4"], outputs[0]["p4"], atol=1e-2)


def test_a_plain_backbone_fills_deformable_stages(tmp_path: Path) -> None:
    tensors = small(cases.FPN).backbone.bottom_up.state_dict()
    torch.save({"model": tensors}, tmp_path / "backbone.pth")
    cfg = cases.configure(get_cfg(), cases.FPN, cases.DEFORM, {"MODEL.WEIGHTS": str(tmp_path / "backbone.pth")})
    model = build_model(cfg)
    load_weights(model, cfg)
    for name, tensor in model.backbone.bottom_up.state_dict().items():
        assert not tensor.any() if ".conv2_offset." in name else torch.equal(tensor, tensors[name]), name
    del tensors["res4.1.conv2.weight"]
    torch.save({"model": tensors}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=r"res4\.1\.conv2\.weight"):
        load_weights(model, cfg)


def test_images_are_normalised_and_padded_with_zeros() -> None:
    model = small(cases.FPN)
    batch = cases.our_batch(train=False)
    padded, sizes = model.preprocess(batch)
    assert sizes == [(90, 125), (76, 96)]
    assert padded.shape == (2, 3, 96, 128)
    for row, item, (height, width) in zip(padded, batch, sizes):
        for channel, (mean, std) in enumerate(zip((103.53, 116.28, 123.675), (57.0, 58.0, 59.0))):
            expected = (item["image"][channel].double() - mean) / std
            torch.testing.assert_close(row[channel, :height, :width].double(), expected, rtol=1e-6, atol=1e-6)
        assert not row[:, height:].any()
        assert not row[:, :, width:].any()
    assert small(cases.C4).preprocess(batch)[0].shape == (2, 3, 90, 125)


def test_a_batch_of_equal_images_detects_what_each_alone_does() -> None:
    model = small(cases.FPN).eval()
    batch = [{"image": image} for image in cases.images(((64, 96), (64, 96)))]
    with torch.no_grad():
        together = model(batch)
        apart = [model([item])[0] for item in batch]
    for a, b in zip(together, apart):
        torch.testing.assert_close(a.boxes, b.boxes, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(a.classes, b.classes)
        assert a.image_size == (64, 96)  # without a height and width the input is the original


def test_postprocess_scales_limits_and_drops() -> None:
    found = Instances(
        (100, 200),
        boxes=torch.tensor([[10.0, 20, 30, 40], [150, 90, 230, 120], [200, 0, 220, 50]]),
        classes=torch.tensor([0, 1, 2]),
        scores=torch.tensor([0.9, 0.8, 0.7]),
        masks=torch.ones(3, 28, 28),
    )
    result = postprocess(found, 50, 600)
    assert result.boxes.tolist() == [[30, 10, 90, 20], [450, 45, 600, 50]]
    assert result.classes.tolist() == [0, 1]
    assert result.masks.sum(dim=(1, 2)).tolist() == [600, 750]
    assert found.boxes[0].tolist() == [10, 20, 30, 40]  # the input stays as it was


def test_detection_settings_bound_the_output() -> None:
    def detect(**settings: Any) -> Instances:
        keys = {
            "score": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            "nms": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
            "most": "TEST.DETECTIONS_PER_IMAGE",
        }
        model = small(cases.FPN, {keys[k]: v for k, v in settings.items()}).eval()
        with torch.no_grad():
            return model(cases.our_batch(train=False))[0]

    everything = detect(score=0.0, nms=1.0, most=-1)
    assert len(everything) > 150  # 40 proposals, five classes
    assert len(detect(score=0.0, nms=1.0, most=7)) == 7
    threshold = float(everything.scores.median())
    assert len(detect(score=threshold, nms=1.0, most=-1)) == int((everything.scores > threshold).sum())
    assert len(detect(score=0.0, nms=0.3, most=-1)) < len(everything)


def test_undefined_predictions_stop_training_and_are_left_out_of_detections() -> None:
    model = small(cases.FPN)
    with torch.no_grad():
        model.proposal_generator.rpn_head.anchor_deltas.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"diverged.*SOLVER\.BASE_LR"):
        model(cases.our_batch(train=True))
    model.eval()
    with torch.no_grad():
        assert all(torch.isfinite(found.boxes).all() and len(found) for found in model(cases.our_batch(False)))
        model.roi_heads.box_predictor.cls_score.bias.fill_(float("inf"))
        assert [len(found) for found in model(cases.our_batch(train=False))] == [0, 0]


@pytest.mark.parametrize("design", [cases.FPN, cases.C4], ids=["FPN", "C4"])
def test_no_proposals_means_no_detections(design: dict[str, Any]) -> None:
    model = small(design, {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 1000}).eval()
    with torch.no_grad():
        for found, image in zip(model(cases.our_batch(train=False)), cases.images()):
            assert len(found) == 0
            assert found.masks.shape == (0, 2 * image.shape[1], 2 * image.shape[2] + 1)


def test_proposals_are_constants_for_the_second_stage() -> None:
    model = small(cases.FPN)
    images, sizes = model.preprocess(cases.our_batch(train=True))
    targets = [item["instances"] for item in cases.our_batch(train=True)]
    proposals, losses = model.proposal_generator(model.backbone(images), sizes, targets)
    assert all(loss.requires_grad for loss in losses.values())
    assert not any(p.boxes.requires_grad or p.scores.requires_grad for p in proposals)


def test_ground_truth_is_among_the_sampled_regions() -> None:
    model = small(cases.FPN)
    target = cases.our_batch(train=True)[0]["instances"]
    empty = Instances(target.image_size, boxes=torch.zeros(0, 4), scores=torch.zeros(0))
    sample = model.roi_heads.sample([empty], [target])[0]
    order = sample.index.argsort()
    assert torch.equal(sample.boxes[order], target.boxes)
    assert torch.equal(sample.truth[order], target.boxes)
    assert torch.equal(sample.classes[order], target.classes)


def checked_model(cfg: CfgNode) -> torch.nn.Module:
    check_supported(cfg)
    return build_model(cfg)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"MODEL.META_ARCHITECTURE": "RetinaNet"}, r"MODEL\.META_ARCHITECTURE is 'RetinaNet'"),
        ({"MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}, r"needs MODEL\.LOAD_PROPOSALS True"),
        ({**cases.FAST, **cases.RPN_ONLY}, r"MODEL\.META_ARCHITECTURE 'GeneralizedRCNN'"),
        ({"MODEL.KEYPOINT_ON": True}, r"MODEL\.KEYPOINT_ON is True"),
        ({"MODEL.RESNETS.DEPTH": 26}, r"MODEL\.RESNETS\.DEPTH is 26"),
        ({"MODEL.RESNETS.DEPTH": 18}, r"MODEL\.RESNETS\.RES2_OUT_CHANNELS is 16, .*needs 64"),
        ({"MODEL.RESNETS.NORM": "LN"}, r"MODEL\.RESNETS\.NORM is 'LN'"),
        ({**cases.DEFORM, **cases.R18}, r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE .*needs depth 50"),
        ({"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [True]}, r"MODEL\.RESNETS\.DEFORM_ON_PER_STAGE .*four values"),
        ({**cases.DEFORM, "MODEL.RESNETS.DEFORM_MODULATED": True}, r"MODEL\.RESNETS\.DEFORM_MODULATED is True"),
        ({"MODEL.RESNETS.OUT_FEATURES": ["res6"]}, r"MODEL\.RESNETS\.OUT_FEATURES"),
        ({"MODEL.RESNETS.RES5_DILATION": 2}, r"MODEL\.FPN\.IN_FEATURES"),
        ({"MODEL.FPN.IN_FEATURES": ["res2", "res4"]}, r"MODEL\.FPN\.IN_FEATURES"),
        ({"MODEL.FPN.FUSE_TYPE": "max"}, r"MODEL\.FPN\.FUSE_TYPE is 'max'"),
        ({"MODEL.RPN.IN_FEATURES": ["p2", "p9"]}, r"MODEL\.RPN\.IN_FEATURES"),
        ({"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]]}, r"MODEL\.ANCHOR_GENERATOR\.SIZES has 2 lists"),
        ({"MODEL.ROI_HEADS.NAME": "KRCNNConvDeconvUpsampleHead"}, r"MODEL\.ROI_HEADS\.NAME is 'KRCNNConv"),
        ({**cases.CASCADE, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False}, "CLS_AGNOSTIC_BBOX_REG is False"),
        ({**cases.CASCADE, "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5]}, r"MODEL\.ROI_HEADS\.IOU_THRESHOLDS"),
        ({**cases.CASCADE, "MODEL.ROI_HEADS.IOU_LABELS": [-1, 1]}, r"MODEL\.ROI_HEADS\.IOU_THRESHOLDS and IOU_LABELS"),
        ({**cases.CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.2, 0.3)}, "2 IOUS and 3 BBOX_REG_WEIGHTS"),
        ({**cases.CASCADE, "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True}, "TRAIN_ON_PRED_BOXES is True"),
        ({"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"}, r"MODEL\.ROI_HEADS\.IN_FEATURES"),
        ({"MODEL.ROI_BOX_HEAD.NAME": ""}, r"MODEL\.ROI_BOX_HEAD\.NAME is ''"),
        ({"MODEL.ROI_BOX_HEAD.NUM_FC": 0}, r"MODEL\.ROI_BOX_HEAD\.NUM_CONV and NUM_FC"),
        ({"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "l2"}, "BBOX_REG_LOSS_TYPE is 'l2'"),
        ({"MODEL.ROI_MASK_HEAD.POOLER_TYPE": ""}, r"MODEL\.ROI_MASK_HEAD\.POOLER_TYPE is ''"),
        ({"MODEL.PIXEL_STD": [1.0, 0.0, 1.0]}, r"MODEL\.PIXEL_STD"),
    ],
)
def test_what_it_cannot_build_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        checked_model(cases.configure(get_cfg(), cases.FPN, settings))
    assert "\n" not in str(caught.value)


class Recorder:
    """A configuration that notes every key that is read."""

    def __init__(self, node: CfgNode, read: set[str], path: str = "") -> None:
        self.__dict__.update(node=node, read=read, path=path)

    def __getitem__(self, name: str) -> Any:
        value, path = self.node[name], f"{self.path}{name}"
        if isinstance(value, CfgNode):
            return Recorder(value, self.read, path + ".")
        self.read.add(path)
        return value

    def get(self, name: str, default: Any) -> Any:
        return self[name] if name in self.node else default

    __getattr__ = __getitem__


def test_the_table_of_keys_is_what_the_model_reads() -> None:
    read: set[str] = set()
    semantic = {**cases.FPN, "MODEL.META_ARCHITECTURE": "SemanticSegmentor"}
    several = {**cases.FPN, "MODEL.ROI_BOX_HEAD.NUM_CONV": 1}
    for design in (several, cases.C4, {**cases.FPN, **cases.CASCADE}, semantic):
        model = cases.formula_weights(build_model(Recorder(cases.configure(get_cfg(), design), read)))
        model([{**item, "sem_seg": item["image"][0].long() % 54} for item in cases.our_batch(train=True)])
        with torch.no_grad():
            model.eval()(cases.our_batch(train=False))
    # A key with one legal value needs no reading: the check refuses every other one.
    fixed = {key for key, allowed in MODEL_KEYS.items() if allowed is not None and len(allowed) == 1}
    fixed.add("MODEL.ROI_BOX_HEAD.NAME")  # read by the check alone
    assert read - set(MODEL_KEYS) == set()
    assert set(MODEL_KEYS) - read - fixed == set()
    assert set(MODEL_KEYS) <= set(flat(get_cfg()))


def rpn_case(conv_dims: list[int]) -> tuple[list[Instances], dict[str, torch.Tensor]]:
    """The case of Detectron2's tests/modeling/test_rpn.py, with its draws from the generator in its order."""
    cfg = get_cfg()
    cfg.MODEL.RPN.CONV_DIMS = conv_dims
    torch.manual_seed(121)
    backbone = build_backbone(cfg)
    make_stage("res5", 50, norm="FrozenBN")  # Detectron2 initialises res5 here, then drops it
    rpn = RPN(cfg, backbone.channels, backbone.strides)
    torch.rand(2, 20, 30)
    features = {"res4": torch.rand(2, 1024, 1, 2)}
    truth = [[1.0, 1, 3, 3], [2.0, 2, 6, 6]]
    targets = [Instances((15, 15), boxes=torch.tensor([box])) for box in truth]
    return rpn(features, [(10, 10), (20, 30)], targets)


def test_rpn_has_the_numbers_of_detectron2s_test() -> None:
    proposals, losses = rpn_case([-1])
    torch.testing.assert_close(losses["loss_rpn_cls"], torch.tensor(0.08011703193))
    torch.testing.assert_close(losses["loss_rpn_loc"], torch.tensor(0.101470276))
    expected = torch.tensor([[0, 0, 10, 10], [7.2702, 0, 10, 10]])
    torch.testing.assert_close(proposals[0].boxes, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(proposals[0].scores, torch.tensor([0.1596, -0.0007]), rtol=0, atol=1e-4)
    _, losses = rpn_case([64] * 5)
    torch.testing.assert_close(losses["loss_rpn_cls"], torch.tensor(0.08122821152))
    torch.testing.assert_close(losses["loss_rpn_loc"], torch.tensor(0.10064548254))


def test_box_branch_has_the_numbers_of_detectron2s_test() -> None:
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    torch.manual_seed(132)
    predictor = BoxPredictor(cfg, 8)
    scores, deltas = predictor(torch.rand(2, 8))
    boxes = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7, 8]])
    truth = torch.tensor([[1.0, 1, 3, 3], [2, 2, 6, 6]])
    losses = predictor.losses(scores, deltas, boxes, torch.tensor([1, 2]), truth)
    torch.testing.assert_close(losses["loss_cls"], torch.tensor(1.7951188087))
    torch.testing.assert_close(losses["loss_box_reg"], torch.tensor(4.0357131958))


def test_it_learns_one_image() -> None:
    torch.manual_seed(0)
    model = build_model(
        cases.configure(get_cfg(), cases.FPN, {"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0})
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = cases.our_batch(train=True)[:1]
    history = []
    for _ in range(60):
        losses = model(batch)
        history.append({name: loss.item() for name, loss in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(history[-1][name] < 0.8 * history[0][name] for name in ("loss_cls", "loss_mask", "loss_rpn_cls"))
