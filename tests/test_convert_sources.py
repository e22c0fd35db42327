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
from convert_cases import caffe2_name, prefixed, randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_det.artifact import IMAGENET_MEAN, describe, save_backbone
from loco_det.backbone import ResNet
from loco_det.convert import load_backbone_weights, load_checkpoint
from loco_det.convert.account import Account, take_account
from loco_det.convert.load import load_tensors
from loco_det.convert.namings import NAMINGS
from loco_det.convert.prove import source_model
from loco_det.convert.sources import SOURCES, Pixels, Source
from loco_det.errors import UserError
from loco_det.names import to_torchvision

ROOT = Path(__file__).resolve().parent.parent


def resnet(seed: int = 0, **kwargs: object) -> nn.Module:
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = torchvision.models.resnet18(**kwargs)
    model.to_empty(device="cpu")
    for name, tensor in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
    return randomised(model, seed)


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
    model.backbone_momentum = randomised(copy.deepcopy(model.backbone), 1)
    model.projection_head_momentum = copy.deepcopy(model.projection_head)
    file = {"epoch": 1, "pytorch-lightning_version": "2.0.0", "state_dict": model.state_dict(), "callbacks": {}}
    return file, {"online": plain.state_dict(), "momentum": children_named(model.backbone_momentum)}


def children_named(backbone: nn.Sequential) -> dict[str, Tensor]:
    """The state of `nn.Sequential(*resnet.children())` under torchvision's names."""
    plain = headless()
    nn.Sequential(*list(plain.children())[:-1]).load_state_dict(backbone.state_dict())
    return plain.state_dict()


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


def moco_v3() -> tuple[dict, dict]:
    """facebookresearch/moco-v3: the projector is each encoder's fc, its last norm without scale and shift."""
    model = nn.Module()
    for seed, name in enumerate(("base_encoder", "momentum_encoder")):
        setattr(model, name, resnet(seed))
        getattr(model, name).fc = nn.Sequential(*mlp(512, 64, 32), nn.BatchNorm1d(32, affine=False))
    model.predictor = mlp(32, 64, 32)
    file = {"epoch": 1, "arch": "resnet18", "state_dict": prefixed("module.", model.state_dict())}
    return file, {"base": model.base_encoder.state_dict(), "momentum": model.momentum_encoder.state_dict()}


def densecl() -> tuple[dict, dict]:
    """WXinlong/DenseCL, OpenSelfSup's MoCo: encoder and neck in a Sequential, the query's encoder under two names."""
    model = nn.Module()
    for seed, name in enumerate(("encoder_q", "encoder_k")):
        neck = nn.Module()
        neck.mlp, neck.mlp2 = mlp(512, 64, 32), nn.Sequential(nn.Conv2d(512, 32, 1))
        setattr(model, name, nn.Sequential(headless(seed), neck))
    model.backbone = model.encoder_q[0]
    for name in ("queue", "queue2"):
        model.register_buffer(name, torch.randn(32, 8))
        model.register_buffer(f"{name}_ptr", torch.zeros(1, dtype=torch.long))
    file = {"meta": {"epoch": 1}, "state_dict": model.state_dict(), "optimizer": optimizer_of(model.encoder_q)}
    return file, {"query": model.encoder_q[0].state_dict(), "momentum": model.encoder_k[0].state_dict()}


def openselfsup_byol() -> tuple[dict, dict]:
    """OpenSelfSup's BYOL."""
    model = nn.Module()
    model.online_net = nn.Sequential(headless(0), mlp(512, 64, 32))
    model.target_net = nn.Sequential(headless(1), mlp(512, 64, 32))
    model.backbone = model.online_net[0]
    model.head = nn.Module()
    model.head.predictor = mlp(32, 64, 32)
    branches = {"online": model.online_net[0].state_dict(), "target": model.target_net[0].state_dict()}
    return {"meta": {}, "state_dict": model.state_dict()}, branches


def mmpretrain(momentum: str = "encoder_k") -> tuple[dict, dict]:
    """MMPretrain's MoCo, and its BYOL with "target_net": a running average of backbone and neck together."""
    model = nn.Module()
    model.backbone, model.neck = headless(0), mlp(512, 64, 32)
    average = nn.Module()
    average.module = nn.Sequential(headless(1), mlp(512, 64, 32))
    average.register_buffer("steps", torch.tensor(7))
    setattr(model, momentum, average)
    model.register_buffer("queue", torch.randn(32, 8))
    model.head = nn.Module()
    model.head.predictor = mlp(32, 64, 32)
    file = {"meta": {}, "message_hub": {}, "state_dict": model.state_dict()}
    return file, {"backbone": model.backbone.state_dict(), "momentum": average.module[0].state_dict()}


def mmpretrain_supervised() -> tuple[dict, dict]:
    """MMPretrain's ImageClassifier."""
    model = nn.Module()
    model.backbone = headless()
    model.head = nn.Module()
    model.head.fc = nn.Linear(512, 10)
    return {"meta": {}, "state_dict": model.state_dict()}, {"backbone": model.backbone.state_dict()}


def solo_learn(backbone: str = "backbone") -> tuple[dict, dict]:
    """solo-learn's BYOL, a Lightning module; before version 1.0.4 the backbone was called encoder."""
    model = nn.Module()
    for seed, prefix in enumerate(("", "momentum_")):
        setattr(model, prefix + backbone, headless(seed))
        setattr(model, f"{prefix}projector", mlp(512, 64, 32))
        setattr(model, f"{prefix}classifier", nn.Linear(512, 10))
    model.predictor = mlp(32, 64, 32)
    file = {"epoch": 1, "pytorch-lightning_version": "1.6.4", "state_dict": model.state_dict(), "callbacks": {}}
    online, momentum = getattr(model, backbone), getattr(model, f"momentum_{backbone}")
    return file, {"online": online.state_dict(), "momentum": momentum.state_dict()}


def vissl() -> tuple[dict, dict]:
    """VISSL: a ClassyVision task, trunk and heads in dictionaries of their own."""
    plain = headless().state_dict()
    trunk = prefixed("_feature_blocks.", plain)
    heads = prefixed("0.clf.", nn.Linear(512, 10).state_dict())
    base = {"model": {"trunk": trunk, "heads": heads}, "meters": {}}
    return {"classy_state_dict": {"base_model": base, "optimizer": {}}, "phase_idx": 3}, {"trunk": plain}


def pixpro() -> tuple[dict, dict]:
    """zdaxie/PixPro."""
    model = nn.Module()
    for seed, suffix in enumerate(("", "_k")):
        setattr(model, f"encoder{suffix}", headless(seed))
        for name in ("projector", "projector_instance"):
            setattr(model, name + suffix, nn.Sequential(nn.Conv2d(512, 64, 1), nn.BatchNorm2d(64)))
    model.value_transform = nn.Conv2d(64, 64, 1)
    model.predictor = nn.Conv2d(64, 64, 1)
    file = {"opt": argparse.Namespace(lr=1.0), "model": prefixed("module.", model.state_dict()), "epoch": 1}
    return file, {"encoder": model.encoder.state_dict(), "momentum": model.encoder_k.state_dict()}


def pytorch_byol() -> tuple[dict, dict]:
    """sthalles/PyTorch-BYOL: children in a Sequential, the online encoder saved a second time by itself."""
    states, plain = {}, {}
    for seed, name in enumerate(("online", "target")):
        net, model = headless(seed), nn.Module()
        model.encoder = nn.Sequential(*list(net.children())[:-1])
        model.projetion = nn.Module()
        model.projetion.net = mlp(512, 64, 32)
        states[f"{name}_network_state_dict"], plain[name] = model.state_dict(), net.state_dict()
        if name == "online":
            states["encoder_state_dict"] = model.encoder.state_dict()
    return states, plain


def lucidrains_byol() -> tuple[dict, dict]:
    """lucidrains/byol-pytorch, whose learner a Lightning module holds in its example."""
    model = nn.Module()
    model.learner = nn.Module()
    for seed, name in enumerate(("online", "target")):
        encoder = nn.Module()
        encoder.net, encoder.projector = resnet(seed), mlp(512, 64, 32)
        setattr(model.learner, f"{name}_encoder", encoder)
    model.learner.online_predictor = mlp(32, 64, 32)
    branches = {n: getattr(model.learner, f"{n}_encoder").net.state_dict() for n in ("online", "target")}
    return {"state_dict": model.state_dict()}, branches


def yaox12_byol() -> tuple[dict, dict]:
    """yaox12/BYOL-PyTorch, in a DistributedDataParallel module."""
    model, plain = nn.Module(), {}
    for seed, name in enumerate(("online", "target")):
        net, network = headless(seed), nn.Module()
        network.encoder = nn.Sequential(*list(net.children())[:-1])
        network.projetion = mlp(512, 64, 32)
        setattr(model, f"{name}_network", network)
        plain[name] = net.state_dict()
    model.predictor = mlp(32, 64, 32)
    return {"config": {}, "steps": 1, "model": prefixed("module.", model.state_dict())}, plain


def sthalles_simclr() -> tuple[dict, dict]:
    """sthalles/SimCLR: the projection head is the backbone's fc."""
    model = nn.Module()
    model.backbone = resnet(num_classes=128)
    model.backbone.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), model.backbone.fc)
    file = {"epoch": 1, "arch": "resnet18", "state_dict": model.state_dict(), "optimizer": optimizer_of(model)}
    return file, {"encoder": model.backbone.state_dict()}


def spijkervet_simclr() -> tuple[dict, dict]:
    """Spijkervet/SimCLR: the bare state dict."""
    model = nn.Module()
    model.encoder = headless()
    model.projector = nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 64, bias=False))
    return model.state_dict(), {"encoder": model.encoder.state_dict()}


def transformers_name(name: str) -> str:
    """transformers' name of a tensor of torchvision's ResNet-18."""
    kinds = {"conv": "convolution", "bn": "normalization"}
    if match := re.fullmatch(r"(conv|bn)1\.(.+)", name):
        return f"embedder.embedder.{kinds[match[1]]}.{match[2]}"
    stage, block, part, rest = re.fullmatch(r"layer(\d)\.(\d)\.(.+?)\.(.+)", name).groups()
    start = f"encoder.stages.{int(stage) - 1}.layers.{block}."
    if part == "downsample":
        return start + "shortcut." + rest.replace("0.", "convolution.").replace("1.", "normalization.")
    return f"{start}layer.{int(part[-1]) - 1}.{kinds[part[:-1]]}.{rest}"


def transformers_resnet() -> tuple[dict, dict]:
    """transformers' ResNetForImageClassification, by its names; the library itself has a test below."""
    plain = headless().state_dict()
    state = {f"resnet.{transformers_name(name)}": tensor for name, tensor in plain.items()}
    return state | prefixed("classifier.1.", nn.Linear(512, 10).state_dict()), {"model": plain}


def caffe2_blobs(statistics: bool) -> tuple[dict, dict]:
    """Detectron's R-50.pkl in small: what is in its file before pickling, and torchvision's names."""
    plain = {k: v for k, v in headless().state_dict().items() if "num_batches" not in k}
    blobs = {"conv1_b": torch.zeros(64), "fc1000_w": torch.ones(10, 512), "fc1000_b": torch.ones(10)}
    for name, tensor in plain.items():
        if not statistics and name.endswith(("mean", "var")):
            plain[name] = torch.full_like(tensor, float(name.endswith("var")))
        else:
            blobs[caffe2_name(name)] = tensor
    blobs["res2_0_branch2a_w_momentum"] = torch.ones(1)
    return blobs, plain


def test_caffe2_names_of_bottlenecks() -> None:
    with torch.device("meta"):
        names = [name for name in torchvision.models.resnet50().state_dict() if "num_batches" not in name]
    for name in names[:-2]:  # the classifier is last
        assert NAMINGS["caffe2"][2](caffe2_name(name)) == name


def msra() -> tuple[dict, dict]:
    blobs, plain = caffe2_blobs(statistics=False)
    return blobs, {"model": plain}


def caffe2() -> tuple[dict, dict]:
    blobs, plain = caffe2_blobs(statistics=True)
    return {"blobs": blobs, "cfg": "MODEL: {}"}, {"model": plain}


def lightning() -> tuple[dict, dict]:
    """Somebody's LightningModule with the network as one attribute."""
    model = nn.Module()
    model.net = headless()
    model.head = nn.Linear(512, 10)
    file = {"epoch": 1, "pytorch-lightning_version": "2.2.0", "state_dict": model.state_dict(), "loops": {}}
    return file, {"": model.net.state_dict()}


CASES: list[tuple[str, Callable[[], tuple[dict, dict]]]] = [
    ("MoCo v1/v2", moco),
    ("MoCo v1/v2", lambda: moco(v2=False)),
    ("MoCo v3", moco_v3),
    ("DenseCL or OpenSelfSup", densecl),
    ("DenseCL or OpenSelfSup", openselfsup_byol),
    ("MMPretrain or MMSelfSup", mmpretrain),
    ("MMPretrain or MMSelfSup", lambda: mmpretrain("target_net")),
    ("MMPretrain or MMSelfSup", mmpretrain_supervised),
    ("solo-learn", solo_learn),
    ("solo-learn", lambda: solo_learn("encoder")),
    ("VISSL", vissl),
    ("PixPro", pixpro),
    ("BYOL (PyTorch-BYOL)", pytorch_byol),
    ("BYOL (byol-pytorch, BYOL-PyTorch)", lucidrains_byol),
    ("BYOL (byol-pytorch, BYOL-PyTorch)", yaox12_byol),
    ("SimCLR (PyTorch ports)", sthalles_simclr),
    ("SimCLR (PyTorch ports)", spijkervet_simclr),
    ("Hugging Face transformers", transformers_resnet),
    ("MSRA (Caffe2)", msra),
    ("Caffe2 with BatchNorm statistics", caffe2),
    ("Lightning module", lightning),
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
    assert account.read == len(expected) - len(account.made) + sum(map(len, account.dropped.values()))


def documented() -> dict[str, list[str]]:
    """docs/conversion.md's table of sources: name -> cells (prefixes, branches, pixels, what is dropped)."""
    lines = (ROOT / "docs" / "conversion.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) == 5}


def pixels_text(pixels: Pixels | None) -> str:
    if pixels is None:
        return "must be stated"
    if pixels.mean == IMAGENET_MEAN:
        return f"{pixels.order}, ImageNet's mean and std"
    numbers = (
        f"{pixels.order}, mean {' '.join(f'{v:g}' for v in pixels.mean)}, std {' '.join(f'{v:g}' for v in pixels.std)}"
    )
    return numbers + (", stride in the 1x1" if pixels.stride_in_1x1 else "")


@pytest.mark.parametrize("row", SOURCES, ids=lambda row: row.name)
def test_the_documented_table_is_that_of_the_code(row: Source) -> None:
    _, branches, pixels, dropped = documented()[row.name]
    assert branches == (", ".join(f"`{b}`" for b in row.branches) if len(row.branches) > 1 else "")
    assert pixels == pixels_text(row.pixels)
    assert dropped == ", ".join(dict.fromkeys(reason for _, reason in (*row.inside, *row.outside)))


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
        account, chosen = take_account(path, loaded, branch if len(branches) > 1 else None)
        assert f"`{chosen.prefix or 'none'}`" in documented()[source][0]
        assert (account.source, account.branch, account.architecture.name) == (source, branch, "resnet18")
        assert_converted(account, state)


def test_branches_without_a_case_are_not_in_the_table() -> None:
    seen = {(source, branch) for source, make in CASES for branch in make()[1]}
    promised = {(row.name, branch) for row in SOURCES for branch in row.branches}
    # "backbone" is a second name of the query; lightly's pair and timm's have tests of their own.
    exempt = {("DenseCL or OpenSelfSup", "backbone"), ("lightly", "student"), ("lightly", "teacher")}
    assert promised - seen == exempt | {("timm training run", "model"), ("timm training run", "ema")}


def test_lightly_student_and_teacher() -> None:
    state = {
        f"{n}_backbone.{k}": v
        for s, n in enumerate(("student", "teacher"))
        for k, v in headless(s).state_dict().items()
    }
    state |= prefixed("student_head.", mlp(512, 64, 32).state_dict())
    for seed, name in enumerate(("student", "teacher")):
        account, _ = take_account("x", {"state_dict": state}, name)
        assert account.source == "lightly"
        assert_converted(account, headless(seed).state_dict())


def test_one_backbone_under_two_names_is_no_choice_but_two_backbones_are() -> None:
    file, branches = densecl()
    state = {k: v for k, v in file["state_dict"].items() if not k.startswith("encoder_k")}
    account, _ = take_account("x", {"state_dict": state})
    assert account.branch == "query"
    assert_converted(account, branches["query"])
    state["backbone.layer4.1.bn2.bias"] = state["backbone.layer4.1.bn2.bias"] + 1e-6
    with pytest.raises(UserError, match=r"holds 2 backbones; choose one with --branch query or --branch backbone$"):
        take_account("x", {"state_dict": state})


@pytest.mark.parametrize("depth", [18, 50])
def test_transformers_itself(tmp_path: Path, depth: int) -> None:
    """Names and features of the library's own ResNet, from the folder that it saves."""
    transformers = pytest.importorskip("transformers")
    kind, depths = ("basic", [2, 2, 2, 2]) if depth == 18 else ("bottleneck", [3, 4, 6, 3])
    sizes = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=sizes, num_labels=10)
    model = randomised(transformers.ResNetForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    account, chosen = take_account("x", load_tensors(tmp_path / "model.safetensors"))
    assert (account.source, account.architecture.name) == ("Hugging Face transformers", f"resnet{depth}")
    source = source_model(account.converted, account.architecture, chosen.source.pixels.stride_in_1x1)
    x = torch.randn(1, 3, 65, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.resnet(x).pooler_output.flatten(1), source(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_msra_weights_get_statistics_pixels_and_stride() -> None:
    account, chosen = take_account("x", msra()[0])
    assert len(account.made) == 40
    assert "added        40 statistics" in "\n".join(account.lines())
    assert chosen.source.pixels == Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)
    assert take_account("x", caffe2()[0])[1].source.pixels is None


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
    states = [resnet(seed).state_dict() for seed in (0, 1)]
    file = {"state_dict": prefixed("a.", states[0]) | prefixed("b.", states[1])}
    with pytest.raises(UserError, match=r"holds 2 backbones; choose one with --branch state_dict:a\. or --branch"):
        take_account("x", file)
    with pytest.raises(UserError, match=r"has no branch 'c'; choose --branch"):
        take_account("x", file, "c")
    account, _ = take_account("x", file, "state_dict:b.")
    assert_converted(account, states[1])
    assert "other branch (state_dict:a.)" in account.dropped


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
