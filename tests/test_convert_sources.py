"""Every row of the table of sources, on a checkpoint built as that code base builds it; and the strict account."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from convert_cases import prefixed, randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_det.artifact import describe, save_backbone
from loco_det.backbone import ResNet
from loco_det.convert import load_backbone_weights, load_checkpoint
from loco_det.convert.account import Account, take_account
from loco_det.convert.load import load_tensors
from loco_det.convert.sources import SOURCES
from loco_det.errors import UserError
from loco_det.names import to_torchvision


def resnet(seed: int = 0, **kwargs: object) -> nn.Module:
    return randomised(torchvision.models.resnet18(**kwargs), seed)


def backbone_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision state dict without classifier and counters: what a conversion must bring out."""
    return {k: v for k, v in state.items() if not k.startswith("fc.") and "num_batches" not in k}


def headless(seed: int = 0) -> nn.Module:
    model = resnet(seed)
    model.fc = nn.Identity()
    return model


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def optimizer_of(model: nn.Module) -> dict:
    """The state of a momentum SGD after one step, which holds a tensor for every parameter."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def moco(v2: bool = True) -> tuple[dict, dict]:
    """facebookresearch/moco: two encoders and a queue in one DistributedDataParallel module."""
    model = nn.Module()
    for seed, name in enumerate(("encoder_q", "encoder_k")):
        encoder = resnet(seed, num_classes=128)
        if v2:
            encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), encoder.fc)
        setattr(model, name, encoder)
    model.register_buffer("queue", torch.randn(128, 64))
    model.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    state = prefixed("module.", model.state_dict())
    file = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer_of(model.encoder_q)}
    return file, {"query": model.encoder_q.state_dict(), "momentum": model.encoder_k.state_dict()}


def simsiam() -> tuple[dict, dict]:
    """facebookresearch/simsiam: the projector is the encoder's fc."""
    model = nn.Module()
    model.encoder = resnet(num_classes=2048, zero_init_residual=True)
    model.encoder.fc = nn.Sequential(
        *mlp(512, 512, 512), nn.ReLU(), model.encoder.fc, nn.BatchNorm1d(2048, affine=False)
    )
    model.predictor = mlp(2048, 512, 2048)
    file = {"epoch": 1, "arch": "resnet18", "state_dict": prefixed("module.", model.state_dict())}
    return file, {"encoder": model.encoder.state_dict()}


def swav() -> tuple[dict, dict]:
    """facebookresearch/swav: a released file is the bare state dict with the DDP prefix."""
    model = headless()
    model.projection_head = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))
    model.prototypes = nn.Linear(128, 300, bias=False)
    return prefixed("module.", model.state_dict()), {"model": headless().state_dict()}


def barlow_twins() -> tuple[dict, dict]:
    """facebookresearch/barlowtwins: checkpoint.pth of a training run."""
    model = nn.Module()
    model.backbone = headless()
    model.projector = mlp(512, 128, 128)
    model.bn = nn.BatchNorm1d(128, affine=False)
    state = prefixed("module.", model.state_dict())
    file = {"epoch": 1, "model": state, "optimizer": optimizer_of(model)}
    return file, {"backbone": model.backbone.state_dict()}


def dino() -> tuple[dict, dict]:
    """facebookresearch/dino: student in DDP, teacher bare, settings as a Namespace."""
    parts = {}
    for seed, name in enumerate(("student", "teacher")):
        parts[name] = nn.Module()
        parts[name].backbone = headless(seed)
        parts[name].head = mlp(512, 64, 32)
    file = {
        "student": prefixed("module.", parts["student"].state_dict()),
        "teacher": parts["teacher"].state_dict(),
        "optimizer": optimizer_of(parts["student"]),
        "epoch": 3,
        "args": argparse.Namespace(arch="resnet18", output_dir=Path("out")),
        "dino_loss": {"center": torch.zeros(1, 32)},
    }
    return file, {name: part.backbone.state_dict() for name, part in parts.items()}


def lightly_moco() -> tuple[dict, dict]:
    """lightly's MoCo example: torchvision's children in a Sequential, lightly's heads, a Lightning checkpoint."""
    heads = pytest.importorskip("lightly.models.modules")
    model = nn.Module()
    plain = resnet()
    model.backbone = nn.Sequential(*list(plain.children())[:-1])
    model.projection_head = heads.MoCoProjectionHead(512, 512, 128)
    model.backbone_momentum = copy.deepcopy(model.backbone)
    model.projection_head_momentum = copy.deepcopy(model.projection_head)
    file = {"epoch": 1, "pytorch-lightning_version": "2.0.0", "state_dict": model.state_dict(), "callbacks": {}}
    return file, {"online": plain.state_dict(), "momentum": plain.state_dict()}


def lightly_simclr() -> tuple[dict, dict]:
    """lightly's benchmarks: a headless torchvision ResNet, lightly's projection head, an online classifier."""
    heads = pytest.importorskip("lightly.models.modules")
    model = nn.Module()
    model.backbone = headless()
    model.projection_head = heads.SimCLRProjectionHead(512, 512, 128)
    model.online_classifier = nn.Linear(512, 10)
    return {"state_dict": model.state_dict()}, {"online": model.backbone.state_dict()}


def detectron2_names(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = randomised(ResNet(18, norm="FrozenBN"), seed).state_dict()
    return state, {to_torchvision(name): tensor for name, tensor in state.items()}


def detectron2_fpn() -> tuple[dict, dict]:
    state, plain = detectron2_names()
    model = prefixed("backbone.bottom_up.", state)
    model["backbone.fpn_lateral2.weight"] = torch.ones(2)
    model["proposal_generator.rpn_head.conv.weight"] = torch.ones(2)
    model["roi_heads.box_predictor.cls_score.weight"] = torch.ones(2)
    return {"model": model, "iteration": 9, "optimizer": {"state": {0: torch.ones(1)}}}, {"backbone": plain}


def detectron2_c4() -> tuple[dict, dict]:
    state, plain = detectron2_names()
    model = {("roi_heads." if name.startswith("res5") else "backbone.") + name: t for name, t in state.items()}
    model["roi_heads.mask_head.predictor.weight"] = torch.ones(2)
    return {"model": model}, {"backbone": plain}


def torchvision_plain() -> tuple[dict, dict]:
    state = resnet().state_dict()
    return state, {"model": state}


def torchvision_run() -> tuple[dict, dict]:
    """The ImageNet example of pytorch: DataParallel's prefix inside a training checkpoint."""
    model = resnet()
    state = prefixed("module.", model.state_dict())
    return {"epoch": 90, "state_dict": state, "optimizer": optimizer_of(model)}, {"model": model.state_dict()}


def timm_plain() -> tuple[dict, dict]:
    state = randomised(pytest.importorskip("timm").create_model("resnet18")).state_dict()
    return state, {"model": state}


CASES: list[tuple[str, Callable[[], tuple[dict, dict]]]] = [
    ("MoCo v1/v2", moco),
    ("MoCo v1/v2", lambda: moco(v2=False)),
    ("SimSiam", simsiam),
    ("SwAV", swav),
    ("Barlow Twins or VICReg", barlow_twins),
    ("DINO", dino),
    ("lightly", lightly_moco),
    ("lightly", lightly_simclr),
    ("Detectron2", detectron2_fpn),
    ("Detectron2", detectron2_c4),
    ("Detectron2", lambda: (detectron2_names()[0], {"backbone": detectron2_names()[1]})),
    ("torchvision or timm ResNet", torchvision_plain),
    ("torchvision or timm ResNet", torchvision_run),
    ("torchvision or timm ResNet", timm_plain),
]


def assert_converted(account: Account, state: dict[str, Tensor]) -> None:
    expected = backbone_of(state)
    assert account.converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(account.converted[name], tensor), name
    assert account.read == len(expected) + sum(map(len, account.dropped.values()))


@pytest.mark.parametrize(("source", "make"), CASES)
def test_every_source_is_recognised_and_brought_out_whole(source: str, make: Callable, tmp_path: Path) -> None:
    file, branches = make()
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(file, path)
    loaded = load_tensors(path)
    if len(branches) > 1:
        with pytest.raises(UserError, match=f"--branch {' or --branch '.join(branches)}"):
            take_account(path, loaded)
    for branch, state in branches.items():
        account, _ = take_account(path, loaded, branch if len(branches) > 1 else None)
        assert (account.source, account.branch, account.architecture.name) == (source, branch, "resnet18")
        assert_converted(account, state)


def test_every_row_has_a_case() -> None:
    assert {row.name for row in SOURCES} == {source for source, _ in CASES} | {"timm training run"}


def test_timm_training_run(tmp_path: Path) -> None:
    """A checkpoint as timm's own saver writes it, with an average of the weights beside them."""
    utils = pytest.importorskip("timm.utils")
    model = randomised(pytest.importorskip("timm").create_model("resnet18"), 1)
    average = utils.ModelEmaV3(model)
    randomised(average.module, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = argparse.Namespace(model="resnet18")
    saver = utils.CheckpointSaver(model, optimizer, arguments, average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = tmp_path / "last.pth.tar"
    loaded = load_tensors(path)
    with pytest.raises(UserError, match="--branch model or --branch ema"):
        take_account(path, loaded)
    for branch, state in (("model", model.state_dict()), ("ema", average.module.state_dict())):
        assert_converted(take_account(path, loaded, branch)[0], state)


def test_safetensors_of_timm(tmp_path: Path) -> None:
    state = randomised(pytest.importorskip("timm").create_model("resnet18")).state_dict()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_converted(take_account("x", load_tensors(tmp_path / "model.safetensors"))[0], state)


def test_our_own_artifact(tmp_path: Path) -> None:
    state, plain = detectron2_names()
    manifest = describe(ResNet(18), stem="imagenet", method="loco", step=7)
    written = save_backbone(tmp_path / "backbone.safetensors", plain, manifest)
    tensors, found = load_backbone_weights(tmp_path / "backbone.safetensors")
    assert found == written
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_an_artifact_of_another_depth_than_it_says(tmp_path: Path) -> None:
    manifest = describe(ResNet(34), stem="imagenet", method="loco")
    save_backbone(tmp_path / "b.safetensors", detectron2_names()[1], manifest)
    with pytest.raises(UserError, match="says depth 34, its tensors 18"):
        load_backbone_weights(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"],
)
def test_architectures_are_told_from_shapes(name: str) -> None:
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)().state_dict()
    state = {key: torch.ones(()).expand(tensor.shape) for key, tensor in shapes.items()}
    state = {key: t.long() if key.endswith("num_batches_tracked") else t for key, t in state.items()}
    assert take_account("x", state)[0].architecture.name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50d", "stem of three"),
        ("resnet50c", "stem of three"),
        ("resnet50_gn", "no running statistics"),
        ("seresnet50", "attention in its blocks"),
        ("resnet26", r"\[2, 2, 2, 2\] bottleneck blocks"),
        ("resnetv2_50", "pre-activation"),
        ("vit_tiny_patch16_224", "vision transformer"),
        ("efficientnet_b0", "holds no ResNet"),
    ],
)
def test_other_networks_are_refused_with_the_reason(name: str, said: str) -> None:
    with torch.device("meta"):
        shapes = pytest.importorskip("timm").create_model(name).state_dict()
    state = {key: torch.ones(()).expand(tensor.shape) for key, tensor in shapes.items()}
    with pytest.raises(UserError, match=said):
        take_account("x.pth", state)


def test_small_image_stems_are_refused_with_the_reason(tmp_path: Path) -> None:
    backbone = ResNet(18, stem="cifar")
    plain = {to_torchvision(k): v for k, v in backbone.state_dict().items() if "num_batches" not in k}
    save_backbone(tmp_path / "b.safetensors", plain, describe(backbone, stem="cifar", method="loco"))
    with pytest.raises(UserError, match=r"3x3 stem .* BACKBONE.STEM imagenet"):
        load_backbone_weights(tmp_path / "b.safetensors")


def test_small_image_stems_of_lightly_are_refused() -> None:
    generator = pytest.importorskip("lightly.models").ResNetGenerator("resnet-18")
    with pytest.raises(UserError, match="3x3 stem"):
        take_account("x", {"state_dict": nn.Sequential(*list(generator.children())[:-1]).state_dict()})


def break_missing(state: dict) -> None:
    del state["layer2.0.bn1.running_mean"]


def break_missing_block(state: dict) -> None:
    for name in [name for name in state if name.startswith("layer3.1.")]:
        del state[name]


def break_unknown(state: dict) -> None:
    state["layer2.0.bn1.extra"] = torch.ones(1)


def break_unknown_head(state: dict) -> None:
    state["mystery.weight"] = torch.ones(1)


def break_unknown_block(state: dict) -> None:
    state["layer2.0.conv3.weight"] = torch.ones(1, 1, 1, 1)


def break_shape(state: dict) -> None:
    state["layer2.0.conv1.weight"] = torch.ones(64, 64, 3, 3)


def break_nan(state: dict) -> None:
    state["layer4.1.conv2.weight"][3, 2, 1, 0] = float("nan")


def break_inf(state: dict) -> None:
    state["layer1.0.bn2.weight"][5] = float("inf")


def break_dtype(state: dict) -> None:
    state["layer1.0.bn2.weight"] = state["layer1.0.bn2.weight"].half()


def break_variance(state: dict) -> None:
    state["bn1.running_var"][0] = -1


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (break_missing, r"'layer2.0.bn1.running_mean' of a resnet18 is missing"),
        (break_missing_block, r"\[2, 2, 1, 2\] basic blocks"),
        (break_unknown, r"'layer2.0.bn1.extra' is unknown"),
        (break_unknown_head, r"'mystery.weight' is unknown"),
        (break_unknown_block, r"'layer2.0.conv3.weight' is unknown"),
        (break_shape, r"'layer2.0.conv1.weight' has shape \[64, 64, 3, 3\], not \[128, 64, 3, 3\]"),
        (break_nan, r"'layer4.1.conv2.weight' has NaN"),
        (break_inf, r"'layer1.0.bn2.weight' has NaN or infinite"),
        (break_dtype, r"'layer1.0.bn2.weight' is float16, not float32"),
        (break_variance, r"'bn1.running_var' has negative"),
    ],
)
def test_no_tensor_is_passed_over(break_it: Callable, said: str) -> None:
    state = {name: tensor.clone() for name, tensor in resnet().state_dict().items()}
    break_it(state)
    with pytest.raises(UserError, match=said):
        take_account("x.pth", state)


def test_the_file_s_own_names_are_in_the_errors() -> None:
    file, _ = moco()
    del file["state_dict"]["module.encoder_q.layer1.0.bn1.bias"]
    with pytest.raises(UserError, match=re.escape("'state_dict:module.encoder_q.layer1.0.bn1.bias'")):
        take_account("x", file, "query")


def test_a_tensor_under_two_names_is_refused() -> None:
    file, _ = detectron2_c4()
    file["model"]["backbone.res5.0.conv1.weight"] = file["model"]["roi_heads.res5.0.conv1.weight"]
    with pytest.raises(UserError, match=r"roi_heads.res5.0.conv1.weight.* are the same tensor"):
        take_account("x", file)


def test_a_tensor_in_two_namings_is_refused() -> None:
    file, _ = lightly_moco()
    state = {k: v for k, v in file["state_dict"].items() if "momentum" not in k}
    state["backbone.conv1.weight"] = state["backbone.0.weight"]
    with pytest.raises(UserError, match=r"'state_dict:backbone.0.weight' and .* are the same tensor"):
        take_account("x", {"state_dict": state})


def test_an_unknown_prefix_is_never_guessed_but_can_be_named() -> None:
    state = resnet().state_dict()
    file = {"net": {**prefixed("trunk.", state), "head.weight": torch.ones(1)}}
    with pytest.raises(UserError, match=r"--branch net:trunk\."):
        take_account("x", file)
    account, _ = take_account("x", file, "net:trunk.")
    assert_converted(account, state)
    assert account.dropped["outside the branch"] == ["net:head.weight"]


def test_two_prefixes_are_never_chosen_between() -> None:
    state = resnet().state_dict()
    with pytest.raises(UserError, match="holds 2 backbones"):
        take_account("x", {"state_dict": prefixed("a.", state) | prefixed("b.", state)})
    with pytest.raises(UserError, match=r"has no branch 'c'; choose --branch"):
        take_account("x", {"state_dict": prefixed("a.", state) | prefixed("b.", state)}, "c")


def test_load_checkpoint_keeps_names_and_everything_else(tmp_path: Path) -> None:
    file, _ = detectron2_fpn()
    torch.save(file, tmp_path / "model_final.pth")
    loaded = load_checkpoint(tmp_path / "model_final.pth")
    assert loaded["iteration"] == 9
    assert torch.equal(loaded["optimizer"]["state"][0], torch.ones(1))
    assert loaded["model"].keys() == file["model"].keys()
    assert all(torch.equal(loaded["model"][name], file["model"][name]) for name in file["model"])
    torch.save(file["model"], tmp_path / "bare.pth")
    assert load_checkpoint(tmp_path / "bare.pth")["model"].keys() == file["model"].keys()


def test_load_checkpoint_refuses_what_is_no_model(tmp_path: Path) -> None:
    for number, content in enumerate(({"model": {"a": 1}}, {"epoch": 3}, {"model": {}})):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="give a detector's checkpoint"):
            load_checkpoint(tmp_path / f"{number}.pth")
