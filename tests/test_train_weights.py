"""Weights into the detector: every tensor or a refusal that names one; pixels that contradict; checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_detection import RESNET_18, tiny_cfg

from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.convert import convert
from loco_det.core.errors import UserError
from loco_det.detection.checkpoint import LAST, Checkpointer, last_checkpoint, read_last
from loco_det.detection.cpu_speed import speed_up
from loco_det.detection.rcnn import build_model
from loco_det.detection.solver import build_optimizer, build_schedule, grad_scaler
from loco_det.detection.weights import load_weights, read_weights

C4 = {
    "MODEL__BACKBONE__NAME": "build_resnet_backbone",
    "MODEL__RESNETS__OUT_FEATURES": ["res4"],
    "MODEL__ROI_HEADS__NAME": "Res5ROIHeads",
    "MODEL__RPN__IN_FEATURES": ["res4"],
    "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
    "MODEL__ANCHOR_GENERATOR__SIZES": [[8, 16, 32]],
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> dict[str, Path]:
    """A random ResNet-18, as the artifact and as the converter's .pkl; its tensors under Detectron2's names."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(5)
    net = ResNet(18, norm="BN")
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    save_backbone(folder / "b.safetensors", backbone_tensors(net), describe(net, stem="imagenet", method="loco"))
    convert(folder / "b.safetensors", folder / "b.pkl")
    torch.save({"model": net.state_dict(), "matching_heuristics": True}, folder / "b.pth")
    return {"net": net, **{kind: folder / f"b.{kind}" for kind in ("safetensors", "pkl", "pth")}}


@pytest.mark.parametrize("kind", ["safetensors", "pkl", "pth"])
@pytest.mark.parametrize("shape", ["fpn", "c4"])
def test_every_backbone_tensor_arrives_and_nothing_else_changes(backbone, tmp_path, kind, shape):
    cfg = tiny_cfg(tmp_path, **RESNET_18, MODEL__WEIGHTS=backbone[kind], **(C4 if shape == "c4" else {}))
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(model, cfg)
    arrived = set()
    for name, tensor in backbone["net"].state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        place = f"backbone.bottom_up.{name}" if shape == "fpn" else f"backbone.{name}"
        if shape == "c4" and name.startswith("res5"):
            continue  # Detectron2's C4 head is made of bottlenecks, which a ResNet-18 does not have
        assert torch.equal(model.state_dict()[place], tensor), place
        arrived.add(place)
    for name, tensor in model.state_dict().items():
        if name not in arrived:
            assert torch.equal(tensor, before[name]), name


def damaged(tensors: dict[str, torch.Tensor], tmp_path: Path, change) -> Path:
    change(tensors)
    torch.save({"model": tensors}, tmp_path / "damaged.pth")
    return tmp_path / "damaged.pth"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("res3.1.conv2.weight"), ["res3.1.conv2.weight", "not in it"]),
        (lambda t: t.pop("stem.conv1.norm.running_var"), ["stem.conv1.norm.running_var"]),
        (lambda t: t.update({"res3.7.conv1.weight": torch.zeros(1)}), ["res3.7.conv1.weight", "no place"]),
        (lambda t: t.update({"head.weight": torch.zeros(1)}), ["head.weight", "no place"]),
        (
            lambda t: t.update({"res2.0.conv1.weight": torch.zeros(64, 64, 1, 1)}),
            ["res2.0.conv1.weight", "(64, 64, 1, 1)"],
        ),
        (lambda t: t["res4.0.conv1.weight"].data.fill_(float("nan")), ["res4.0.conv1.weight", "not finite"]),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_by_tensor(backbone, tmp_path, change, words):
    state = {name: tensor.clone() for name, tensor in backbone["net"].state_dict().items()}
    path = damaged(state, tmp_path, change)
    cfg = tiny_cfg(tmp_path, **RESNET_18, MODEL__WEIGHTS=path)
    with pytest.raises(UserError) as refused:
        load_weights(build_model(cfg), cfg)
    for word in [str(path), *words]:
        assert word in str(refused.value)


def test_the_classifier_and_step_counters_may_be_left_over(backbone, tmp_path):
    path = damaged(backbone["net"].state_dict(), tmp_path, lambda t: t.update({"stem.fc.weight": torch.zeros(9, 512)}))
    cfg = tiny_cfg(tmp_path, **RESNET_18, MODEL__WEIGHTS=path)
    load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"INPUT__FORMAT": "BGR"}, ["INPUT.FORMAT", '"RGB"', '"BGR"']),
        ({"MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675]}, ["MODEL.PIXEL_MEAN", "123.675"]),
        ({"MODEL__PIXEL_STD": [1.0, 1.0, 1.0]}, ["MODEL.PIXEL_STD", "58.395"]),
        ({"MODEL__RESNETS__DEPTH": 34}, ["MODEL.RESNETS.DEPTH", "18", "34"]),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "pkl"])
def test_weights_that_contradict_the_configuration_are_refused(backbone, tmp_path, changes, words, kind):
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=backbone[kind], **{**RESNET_18, **changes})
    with pytest.raises(UserError) as refused:
        load_weights(build_model(cfg), cfg)
    for word in words:
        assert word in str(refused.value)


def test_a_rounded_mean_is_no_contradiction(backbone, tmp_path):
    cfg = tiny_cfg(tmp_path, **RESNET_18, MODEL__WEIGHTS=backbone["pkl"], MODEL__PIXEL_MEAN=[123.68, 116.28, 103.53])
    load_weights(build_model(cfg), cfg)


def test_the_stride_of_a_bottleneck_must_agree(tmp_path):
    net = ResNet(50, norm="BN")
    manifest = describe(net, stem="imagenet", method="loco")
    save_backbone(tmp_path / "b.safetensors", backbone_tensors(net), manifest)
    changes = {**RESNET_18, "MODEL__RESNETS__DEPTH": 50, "MODEL__RESNETS__RES2_OUT_CHANNELS": 256}
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=tmp_path / "b.safetensors", MODEL__RESNETS__STRIDE_IN_1X1=True, **changes)
    with pytest.raises(UserError, match=r"STRIDE_IN_1X1 false.*true"):
        load_weights(build_model(cfg), cfg)


def test_the_head_of_c4_gets_res5(tmp_path):
    net = ResNet(50, norm="BN")
    save_backbone(tmp_path / "b.safetensors", backbone_tensors(net), describe(net, stem="imagenet", method="loco"))
    depth = {**RESNET_18, "MODEL__RESNETS__DEPTH": 50, "MODEL__RESNETS__RES2_OUT_CHANNELS": 256}
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=tmp_path / "b.safetensors", **depth, **C4)
    model = build_model(cfg)
    load_weights(model, cfg)
    found = model.state_dict()
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(found[f"{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}"], tensor), name


def test_a_cifar_stem_is_refused(tmp_path):
    net = ResNet(18, stem="cifar", norm="BN")
    save_backbone(tmp_path / "b.safetensors", backbone_tensors(net), describe(net, stem="cifar", method="loco"))
    cfg = tiny_cfg(tmp_path, **RESNET_18, MODEL__WEIGHTS=tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="cifar stem"):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", ["detectron2://", "download", "loco-det convert"]),
        ("https://dl.example.org/x.pkl", ["https://", "download"]),
        ("nowhere.pkl", ["nowhere.pkl", "does not exist"]),
    ],
)
def test_what_is_no_local_file_is_refused(weights, words):
    with pytest.raises(UserError) as refused:
        read_weights(weights)
    for word in words:
        assert word in str(refused.value)


def test_torchvision_names_are_sent_to_the_converter(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "r.pth")
    with pytest.raises(UserError, match=r"layer1.0.conv1.weight.*loco-det convert .*r.pth backbone.pkl"):
        read_weights(tmp_path / "r.pth")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"<html>"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.pth"):
        read_weights(tmp_path / "w.pth")


# --- checkpoints ------------------------------------------------------------------------------------------------


def checkpointer(cfg, fast=False) -> Checkpointer:
    torch.manual_seed(1)
    model = speed_up(build_model(cfg), fast)
    optimizer = build_optimizer(cfg, model)
    schedule = build_schedule(cfg, optimizer)
    return Checkpointer(cfg, model, optimizer, schedule, grad_scaler(cfg, torch.device("cpu")), {"seed": 3})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Checkpointer:
    """A run after one step with made-up gradients, saved as model_0000000.pth."""
    run = checkpointer(tiny_cfg(tmp_path_factory.mktemp("saved")))
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.5)
    run.optimizer.step()
    run.schedule.step()
    run.save("model_0000000", 0)
    return run


def test_a_checkpoint_gives_back_model_optimiser_schedule_and_iteration(saved):
    fresh = checkpointer(saved.cfg)
    weights = read_last(saved.cfg.OUTPUT_DIR)
    assert fresh.restore(weights) == 1
    for name, tensor in saved.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], tensor), name
    ours, theirs = (run.optimizer.state_dict() for run in (saved, fresh))
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in ours["state"].items():
        assert torch.equal(state["momentum_buffer"], theirs["state"][key]["momentum_buffer"])
    assert fresh.schedule.state_dict() == saved.schedule.state_dict()
    assert fresh.note["seed"] == 3


@pytest.mark.parametrize("fast", [False, True])
def test_a_resumed_optimiser_computes_as_its_own_run_does(saved, tmp_path, fast):
    """Exact or fast is asked for anew at each start: a checkpoint of the other, or of Detectron2, does not decide."""
    other = checkpointer(saved.cfg, not fast)
    other.restore(read_last(saved.cfg.OUTPUT_DIR))
    other.cfg = tiny_cfg(tmp_path)
    other.save("model_0000000", 0)
    run, uninterrupted = checkpointer(other.cfg, fast), checkpointer(saved.cfg, fast)
    run.restore(read_last(tmp_path))
    ways = [[(group["foreach"], group["fused"]) for group in r.optimizer.param_groups] for r in (run, uninterrupted)]
    assert ways[0] == ways[1] == [(not fast, fast)] * len(ways[0])


def test_the_file_is_in_detectron2s_layout(saved):
    path = last_checkpoint(saved.cfg.OUTPUT_DIR)
    assert path.name == "model_0000000.pth"
    assert (path.parent / LAST).read_text() == path.name  # no newline: Detectron2 reads the name as it stands
    state = torch.load(path, weights_only=True)
    assert {"model", "optimizer", "scheduler", "iteration", "trainer"} <= set(state)
    assert state["trainer"]["iteration"] == state["iteration"] == 0
    assert state["trainer"]["hooks"]["LRScheduler"] == state["scheduler"]
    assert "backbone.bottom_up.res2.0.conv1.weight" in state["model"]
    assert not any(name.startswith("module.") for name in state["model"])


def test_detectron2s_own_nesting_is_resumed_too(saved, tmp_path):
    state = torch.load(last_checkpoint(saved.cfg.OUTPUT_DIR), weights_only=True)
    torch.save({key: state[key] for key in ("model", "trainer", "iteration")}, tmp_path / "model_final.pth")
    assert checkpointer(saved.cfg).restore(read_weights(tmp_path / "model_final.pth")) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 5}, ["2 classes", "MODEL.ROI_HEADS.NUM_CLASSES is 5"]),
        ({"MODEL__MASK_ON": False}, ["mask head", "MODEL.MASK_ON to True"]),
        ({"MODEL__META_ARCHITECTURE": "SemanticSegmentor"}, ["of a GeneralizedRCNN", "is SemanticSegmentor"]),
        ({"MODEL__FPN__OUT_CHANNELS": 32}, ["backbone.fpn_lateral", "32"]),
        ({"INPUT__FORMAT": "BGR"}, ["INPUT.FORMAT", "RGB"]),
        ({"MODEL__ROI_BOX_HEAD__NUM_FC": 1}, ["roi_heads.box_head.fc2", "no place"]),
    ],
)
def test_a_detector_of_another_configuration_is_refused(saved, tmp_path, changes, words):
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=last_checkpoint(saved.cfg.OUTPUT_DIR), **changes)
    with pytest.raises(UserError) as refused:
        load_weights(build_model(cfg), cfg)
    for word in words:
        assert word in str(refused.value)


def test_a_detector_without_masks_does_not_fill_mask_rcnn(tmp_path):
    run = checkpointer(tiny_cfg(tmp_path, MODEL__MASK_ON=False))
    path = run.save("model_final", 0)
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=path)
    with pytest.raises(UserError, match=r"no mask head; set MODEL.MASK_ON to False"):
        load_weights(build_model(cfg), cfg)


ANCHORS = {"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[0.5, 1.0]]}
BOX, RPN = (
    "roi_heads.box_predictor.",
    ("proposal_generator.rpn_head.objectness_logits", "proposal_generator.rpn_head.a"),
)
PREDICTOR, MASK = "roi_heads.mask_head.predictor.", "roi_heads.mask_head."


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 5}, {"box predictor": BOX, "mask predictor": PREDICTOR}),
        (ANCHORS, {"RPN's predictor": RPN}),
        (ANCHORS | {"MODEL__ROI_HEADS__NUM_CLASSES": 5},
         {"box predictor": BOX, "mask predictor": PREDICTOR, "RPN's predictor": RPN}),
        ({"MODEL__ROI_HEADS__NUM_CLASSES": 5, "MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True,
          "MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True}, {"box predictor": BOX, "mask predictor": PREDICTOR}),
        ({"MODEL__MASK_ON": False}, {"mask head": ()}),
        ({}, {}),
    ],
)  # fmt: skip
def test_c5_heads_that_do_not_fit_start_anew_only_when_asked(saved, tmp_path, caplog, changes, heads):
    path = last_checkpoint(saved.cfg.OUTPUT_DIR)
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=path, **changes)
    if heads:
        with pytest.raises(UserError, match=r"loco-det train --new-heads"):
            load_weights(build_model(cfg), cfg)
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = load_weights(model, cfg, new_heads=True)
    given = torch.load(path)["model"]
    new = {title: [name for name in before if name.startswith(starts or "-")] for title, starts in heads.items()}
    assert weights.new_heads == new
    for name, tensor in model.state_dict().items():
        expected = before[name] if any(name in names for names in new.values()) else given[name]
        assert torch.equal(tensor, expected), name


def test_c5_a_detector_without_masks_gets_a_new_mask_head_and_nothing_else(tmp_path):
    path = checkpointer(tiny_cfg(tmp_path, MODEL__MASK_ON=False)).save("model_final", 0)
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=path)
    model = build_model(cfg)
    weights = load_weights(model, cfg, new_heads=True)
    assert weights.new_heads == {"mask head": [name for name in model.state_dict() if name.startswith(MASK)]}
    for name, tensor in torch.load(path)["model"].items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MODEL__FPN__OUT_CHANNELS": 32}, "backbone.fpn_lateral"),
        ({"MODEL__ROI_BOX_HEAD__NUM_FC": 1}, "roi_heads.box_head.fc2"),
        ({"MODEL__ROI_MASK_HEAD__NUM_CONV": 2}, "mask_fcn2"),
        ({"MODEL__META_ARCHITECTURE": "SemanticSegmentor"}, "of a GeneralizedRCNN"),
    ],
)
def test_c5_what_is_no_head_must_fit_even_then(saved, tmp_path, changes, words):
    changes = {"MODEL__ROI_HEADS__NUM_CLASSES": 5} | changes
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=last_checkpoint(saved.cfg.OUTPUT_DIR), **changes)
    with pytest.raises(UserError, match=words):
        load_weights(build_model(cfg), cfg, new_heads=True)


def test_a_segmentor_does_not_fill_mask_rcnn(tmp_path):
    run = checkpointer(tiny_cfg(tmp_path, MODEL__META_ARCHITECTURE="SemanticSegmentor"))
    cfg = tiny_cfg(tmp_path, MODEL__WEIGHTS=run.save("model_final", 0))
    with pytest.raises(UserError, match=r"of a SemanticSegmentor and MODEL.META_ARCHITECTURE is GeneralizedRCNN"):
        load_weights(build_model(cfg), cfg)


def test_weights_alone_cannot_be_resumed(saved, tmp_path):
    torch.save({"model": saved.model.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no optimizer to resume from"):
        checkpointer(saved.cfg).restore(read_weights(tmp_path / "w.pth"))


def test_an_optimiser_of_other_parameters_is_refused(saved, tmp_path):
    run = checkpointer(tiny_cfg(tmp_path, MODEL__BACKBONE__FREEZE_AT=4))
    with pytest.raises(UserError, match="optimiser state does not fit"):
        run.restore(read_last(saved.cfg.OUTPUT_DIR))


def test_a_pointer_to_a_lost_file_is_refused(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / LAST).write_text("model_0000009.pth")
    with pytest.raises(UserError, match=r"model_0000009.pth, which is gone"):
        last_checkpoint(tmp_path)


def test_a_failed_save_leaves_the_last_checkpoint_whole(saved, tmp_path, monkeypatch):
    run = checkpointer(tiny_cfg(tmp_path))
    run.save("model_final", 0)
    good = (tmp_path / "model_final.pth").read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        run.save("model_final", 1)
    assert (tmp_path / "model_final.pth").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == [LAST, "model_final.pth"]
