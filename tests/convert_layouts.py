"""Checkpoints in the layouts of the code bases that the converter knows, each built as its own source builds it.

A builder returns (what the file holds, {branch: the backbone's state dict under torchvision's names}).
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from convert_cases import caffe2_name, detectron_pkl, prefixed, randomised
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_det.backbones.artifact import describe, save_backbone
from loco_det.backbones.names import to_torchvision
from loco_det.backbones.resnet import ResNet

OWN = "our own `backbone.safetensors`"
RECORDED = Path(__file__).resolve().parent / "recorded_layouts.json"


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


def swav_run() -> tuple[dict, dict]:
    """facebookresearch/swav: checkpoint.pth.tar of a training run with several groups of prototypes."""
    model = headless()
    model.projection_head = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))
    model.prototypes = nn.Module()
    model.prototypes.prototypes0, model.prototypes.prototypes1 = (nn.Linear(128, 30, bias=False) for _ in range(2))
    file = {"epoch": 1, "state_dict": prefixed("module.", model.state_dict()), "optimizer": optimizer_of(model)}
    return {**file, "amp": {"loss_scaler0": {"loss_scale": 65536.0}}}, {"model": headless().state_dict()}


def barlow_twins() -> tuple[dict, dict]:
    """facebookresearch/barlowtwins: checkpoint.pth of a training run."""
    model = nn.Module()
    model.backbone = headless()
    model.projector = mlp(512, 128, 128)
    model.bn = nn.BatchNorm1d(128, affine=False)
    state = prefixed("module.", model.state_dict())
    file = {"epoch": 1, "model": state, "optimizer": optimizer_of(model)}
    return file, {"backbone": model.backbone.state_dict()}


def vicreg() -> tuple[dict, dict]:
    """facebookresearch/vicreg: model.pth of a training run, with LARS's state."""
    model = nn.Module()
    model.backbone, model.projector = headless(), mlp(512, 128, 128)
    lars = {"state": {i: {"mu": torch.zeros_like(p)} for i, p in enumerate(model.parameters())}, "param_groups": []}
    file = {"epoch": 2, "model": prefixed("module.", model.state_dict()), "optimizer": lars}
    return file, {"backbone": model.backbone.state_dict()}


def vicregl() -> tuple[dict, dict]:
    """facebookresearch/VICRegL: model.pth of a training run, with both projectors and the online classifier."""
    model = nn.Module()
    model.maps_projector, model.projector, model.classifier = mlp(512, 64, 64), mlp(512, 128, 128), nn.Linear(512, 10)
    model.backbone = headless()
    file = {"epoch": 2, "model": prefixed("module.", model.state_dict())}
    return file, {"backbone": model.backbone.state_dict()}


def old_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that torch.nn.utils.weight_norm gave its tensors, without its deprecation warning."""
    parts = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    renamed = {}
    for name, tensor in state.items():
        for new, old in parts.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def dino() -> tuple[dict, dict]:
    """facebookresearch/dino: both in DDP, because a ResNet has BatchNorm; settings as a Namespace."""
    parts = {}
    for seed, name in enumerate(("student", "teacher")):
        parts[name] = nn.Module()
        parts[name].backbone = headless(seed)
        parts[name].head = nn.Module()
        parts[name].head.mlp = nn.Sequential(nn.Linear(512, 64), nn.GELU(), nn.Linear(64, 32))
        parts[name].head.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, 64, bias=False))
    states = {name: prefixed("module.", old_weight_norm(part.state_dict())) for name, part in parts.items()}
    file = {
        **states,
        "optimizer": optimizer_of(parts["student"]),
        "epoch": 3,
        "args": argparse.Namespace(arch="resnet18", output_dir=Path("out")),
        "dino_loss": {"center": torch.zeros(1, 32)},
    }
    return file, {name: part.backbone.state_dict() for name, part in parts.items()}


def children_named(backbone: nn.Sequential) -> dict[str, Tensor]:
    """The state of `nn.Sequential(*resnet.children())` under torchvision's names."""
    plain = headless()
    nn.Sequential(*list(plain.children())[:-1]).load_state_dict(backbone.state_dict())
    return plain.state_dict()


def recorded(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of random values in a layout that `record_layouts.py` took from the library itself."""
    layout = json.loads(RECORDED.read_text())[name]
    state = {key: torch.zeros(shape, dtype=getattr(torch, dtype)) for key, (dtype, *shape) in layout.items()}
    holder = nn.Module()
    holder.state_dict = lambda: state
    randomised(holder, seed)
    return state


def lightly(method: str, branches: dict[str, str]) -> tuple[dict, dict]:
    """A Lightning checkpoint of a model as lightly's examples or benchmarks build it; `branches`: name -> attribute."""
    state = recorded(f"lightly {method}")
    plain = {}
    for branch, attribute in branches.items():
        own = {k.removeprefix(f"{attribute}."): t for k, t in state.items() if k.startswith(f"{attribute}.")}
        sequential = "0.weight" in own
        plain[branch] = own
        if sequential:
            backbone = nn.Sequential(*list(resnet().children())[:-1])
            backbone.load_state_dict(own)
            plain[branch] = children_named(backbone)
    return {"epoch": 1, "pytorch-lightning_version": "2.0.0", "state_dict": state, "callbacks": {}}, plain


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
    state = randomised(timm.create_model("resnet18")).state_dict()
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


def mmselfsup_odc() -> tuple[dict, dict]:
    """MMSelfSup's ODC: a memory of features, and the weights of its loss."""
    model = nn.Module()
    model.backbone, model.neck = headless(), mlp(512, 64, 32)
    model.head, model.memory_bank = nn.Module(), nn.Module()
    model.head.fc_cls = nn.Linear(32, 10)
    model.memory_bank.register_buffer("centroids", torch.zeros(10, 32))
    model.register_buffer("loss_weight", torch.ones(10))
    return {"meta": {}, "state_dict": model.state_dict()}, {"backbone": model.backbone.state_dict()}


def mmpretrain_ema() -> tuple[dict, dict]:
    """MMEngine's EMAHook: the averaged model in a dictionary of its own."""
    model, average = nn.Module(), nn.Module()
    for seed, part in enumerate((model, average)):
        part.backbone, part.head = headless(seed), nn.Module()
        part.head.fc = nn.Linear(512, 10)
    averaged = prefixed("module.", average.state_dict()) | {"steps": torch.tensor(3)}
    file = {"meta": {}, "state_dict": model.state_dict(), "ema_state_dict": averaged}
    return file, {"backbone": model.backbone.state_dict(), "ema": average.backbone.state_dict()}


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


def solo_learn_clusters() -> tuple[dict, dict]:
    """solo-learn's DeepClusterV2: prototypes for every head, and the memory that they are made from."""
    model = nn.Module()
    model.backbone, model.projector, model.classifier = headless(), mlp(512, 64, 32), nn.Linear(512, 10)
    model.prototypes = nn.ModuleList([nn.Linear(32, 20, bias=False) for _ in range(3)])
    model.register_buffer("local_memory_index", torch.zeros(9, dtype=torch.long))
    model.register_buffer("local_memory_embeddings", torch.zeros(2, 9, 32))
    return {"epoch": 1, "state_dict": model.state_dict()}, {"online": model.backbone.state_dict()}


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
    """sthalles/PyTorch-BYOL: children in a Sequential, and so are the two networks' state dicts."""
    states, plain = {}, {}
    for seed, name in enumerate(("online", "target")):
        net, model = headless(seed), nn.Module()
        model.encoder = nn.Sequential(*list(net.children())[:-1])
        model.projetion = nn.Module()
        model.projetion.net = mlp(512, 64, 32)
        states[f"{name}_network_state_dict"], plain[name] = model.state_dict(), net.state_dict()
    return {**states, "optimizer_state_dict": optimizer_of(headless())}, plain


def lucidrains_byol() -> tuple[dict, dict]:
    """lucidrains/byol-pytorch, whose learner a Lightning module holds in its example."""
    model = nn.Module()
    model.learner = nn.Module()
    for seed, name in enumerate(("online", "target")):
        encoder = nn.Module()
        encoder.net, encoder.projector = resnet(seed), mlp(512, 64, 32)
        setattr(model.learner, f"{name}_encoder", encoder)
    model.learner.net = model.learner.online_encoder.net  # the network that was given, kept a second time
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
    model.predictor = nn.Module()
    model.predictor.predictor = mlp(32, 64, 32)
    return {"config": {}, "epoch": 1, "steps": 1, "amp": {}, "model": prefixed("module.", model.state_dict())}, plain


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
    """transformers' ResNetForImageClassification."""
    state = recorded("transformers resnet18")
    return state, {"model": {name: state[f"resnet.{transformers_name(name)}"] for name in headless().state_dict()}}


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


def msra() -> tuple[dict, dict]:
    blobs, plain = caffe2_blobs(statistics=False)
    return blobs, {"model": plain}


def caffe2() -> tuple[dict, dict]:
    blobs, plain = caffe2_blobs(statistics=True)
    return {"blobs": blobs, "cfg": "MODEL: {}\n" * 500}, {"model": plain}


def lightning() -> tuple[dict, dict]:
    """Somebody's LightningModule with the network as one attribute."""
    model = nn.Module()
    model.net = headless()
    model.head = nn.Linear(512, 10)
    file = {"epoch": 1, "pytorch-lightning_version": "2.2.0", "state_dict": model.state_dict(), "loops": {}}
    return file, {"": model.net.state_dict()}


def children() -> tuple[dict, dict]:
    """`nn.Sequential(*model.children())`, whose last child is the classifier."""
    model = resnet()
    return nn.Sequential(*model.children()).state_dict(), {"model": model.state_dict()}


def timm_run() -> tuple[dict, dict]:
    """A checkpoint of timm's train.py: the model and the average of its weights (see test_timm_training_run)."""
    model, average = resnet(0), resnet(1)
    file = {"epoch": 1, "arch": "resnet18", "state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    return {**file, "optimizer": optimizer_of(model)}, {"model": model.state_dict(), "ema": average.state_dict()}


@dataclass(frozen=True)
class Case:
    """A checkpoint of `source`, as a row of the table calls it, under the name that docs/conversion.md gives it.

    `branches` are the names of the backbones in it, in the order that the command offers them.
    """

    source: str
    file: str
    branches: str
    make: Callable[[], tuple[dict, dict]]

    def write(self, folder: Path) -> tuple[Path, dict[str, dict[str, Tensor]]]:
        """The file in the format that its name says, and {branch: the backbone's state dict}."""
        path = folder / self.file
        content, branches = self.make()
        assert self.branches == " ".join(branches)
        if self.source == OWN:
            save_backbone(path, content, describe(ResNet(18), stem="imagenet", method="loco"))
        elif path.suffix == ".safetensors":
            save_file(content, path, metadata={"format": "pt"})
        elif path.suffix != ".pkl":
            torch.save(content, path)
        elif "blobs" in content:
            path.write_bytes(detectron_pkl(content["blobs"], content["cfg"]))
        elif "conv1_w" in content:
            path.write_bytes(detectron_pkl(content))
        else:
            arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
            path.write_bytes(pickle.dumps({**content, "model": arrays}))
        return path, branches


def d2_pkl() -> tuple[dict, dict]:
    """What MoCo's, PixPro's and OpenSelfSup's own converters write for Detectron2."""
    state, plain = detectron2_names()
    return {"model": state, "__author__": "MOCO", "matching_heuristics": True}, {"backbone": plain}


def detectron2_bare() -> tuple[dict, dict]:
    state, plain = detectron2_names()
    return state, {"backbone": plain}


def our_own() -> tuple[dict, dict]:
    """backbone.safetensors, as `loco-det pretrain` leaves it."""
    _, plain = detectron2_names()
    return {name: tensor.clone() for name, tensor in plain.items()}, {"": plain}


_PAIR = {"online": "backbone", "momentum": "backbone_momentum"}
_D2, _MM, _LIGHTLY = "Detectron2", "MMPretrain or MMSelfSup", "lightly"
CASES = [
    Case(OWN, "backbone.safetensors", "", our_own),
    Case("MoCo v1/v2", "moco_v2_800ep_pretrain.pth.tar", "query momentum", moco),
    Case("MoCo v1/v2", "moco_v1_200ep_pretrain.pth.tar", "query momentum", lambda: moco(v2=False)),
    Case("MoCo v3", "r-50-1000ep.pth.tar", "base momentum", moco_v3),
    Case("DenseCL or OpenSelfSup", "densecl_r50_imagenet_200ep.pth", "query momentum", densecl),
    Case("DenseCL or OpenSelfSup", "byol_r50_bs4096_ep200.pth", "online target", openselfsup_byol),
    Case(_MM, "mocov2_resnet50_8xb32-coslr-200e_in1k.pth", "backbone momentum", mmpretrain),
    Case(_MM, "byol_resnet50_16xb256-coslr-200e_in1k.pth", "backbone momentum", lambda: mmpretrain("target_net")),
    Case(
        _MM,
        "mocov3_resnet50_8xb512-amp-coslr-300e_in1k.pth",
        "backbone momentum",
        lambda: mmpretrain("momentum_encoder"),
    ),
    Case(_MM, "odc_resnet50_8xb64-steplr-440e_in1k.pth", "backbone", mmselfsup_odc),
    Case(_MM, "resnet50_8xb32_in1k.pth", "backbone", mmpretrain_supervised),
    Case(_MM, "epoch_100_ema.pth", "backbone ema", mmpretrain_ema),
    Case("solo-learn", "byol-resnet50-imagenet-ep=100.ckpt", "online momentum", solo_learn),
    Case("solo-learn", "simclr-encoder-ep=999.ckpt", "online momentum", lambda: solo_learn("encoder")),
    Case("solo-learn", "deepclusterv2-ep=399.ckpt", "online", solo_learn_clusters),
    Case("VISSL", "model_final_checkpoint_phase199.torch", "trunk", vissl),
    Case("PixPro", "pixpro_base_r50_400ep_md5_919c6612.pth", "encoder momentum", pixpro),
    Case("BYOL (PyTorch-BYOL)", "model.pth", "online target", pytorch_byol),
    Case("BYOL (byol-pytorch, BYOL-PyTorch)", "byol_lightning.ckpt", "online target", lucidrains_byol),
    Case("BYOL (byol-pytorch, BYOL-PyTorch)", "byol_resnet50_300.pth.tar", "online target", yaox12_byol),
    Case("SimCLR (PyTorch ports)", "checkpoint_0200.pth.tar", "encoder", sthalles_simclr),
    Case("SimCLR (PyTorch ports)", "checkpoint_100.tar", "encoder", spijkervet_simclr),
    Case("SimSiam", "checkpoint_0099.pth.tar", "encoder", simsiam),
    Case("SwAV or DeepCluster v2", "swav_800ep_pretrain.pth.tar", "model", swav),
    Case("SwAV or DeepCluster v2", "swav_checkpoint.pth.tar", "model", swav_run),
    Case("Barlow Twins or VICReg", "barlow_checkpoint.pth", "backbone", barlow_twins),
    Case("Barlow Twins or VICReg", "vicreg_model.pth", "backbone", vicreg),
    Case("VICRegL", "vicregl_model.pth", "backbone", vicregl),
    Case("DINO", "dino_resnet50_pretrain_full_checkpoint.pth", "student teacher", dino),
    Case(_LIGHTLY, "moco_lightly.ckpt", "online momentum", lambda: lightly("moco", _PAIR)),
    Case(_LIGHTLY, "simclr_lightly.ckpt", "online", lambda: lightly("simclr", {"online": "backbone"})),
    Case(_LIGHTLY, "byol_lightly.ckpt", "online momentum", lambda: lightly("byol", _PAIR)),
    Case(_LIGHTLY, "swav_lightly.ckpt", "online", lambda: lightly("swav", {"online": "backbone"})),
    Case(_LIGHTLY, "simsiam_lightly.ckpt", "online", lambda: lightly("simsiam", {"online": "backbone"})),
    Case(_LIGHTLY, "nnclr_lightly.ckpt", "online", lambda: lightly("nnclr", {"online": "backbone"})),
    Case(
        _LIGHTLY,
        "dino_lightly.ckpt",
        "student teacher",
        lambda: lightly("dino", {"student": "student_backbone", "teacher": "teacher_backbone"}),
    ),
    Case(
        _LIGHTLY,
        "byol_imagenet_benchmark.ckpt",
        "online teacher",
        lambda: lightly("byol_r50", {"online": "backbone", "teacher": "teacher_backbone"}),
    ),
    Case("Hugging Face transformers", "model.safetensors", "model", transformers_resnet),
    Case("Hugging Face transformers", "pytorch_model.bin", "model", transformers_resnet),
    Case(_D2, "model_final.pth", "backbone", detectron2_fpn),
    Case(_D2, "model_final_c4.pth", "backbone", detectron2_c4),
    Case(_D2, "moco_v2_detectron2.pkl", "backbone", d2_pkl),
    Case(_D2, "backbone_d2_names.pth", "backbone", detectron2_bare),
    Case("MSRA (Caffe2)", "R-50.pkl", "model", msra),
    Case("Caffe2 with BatchNorm statistics", "model_final_caffe2.pkl", "model", caffe2),
    Case("torchvision or timm ResNet", "resnet50-11ad3fa6.pth", "model", torchvision_plain),
    Case("torchvision or timm ResNet", "model_best.pth.tar", "model", torchvision_run),
    Case("torchvision or timm ResNet", "resnet50_a1_in1k.safetensors", "model", timm_plain),
    Case("timm training run", "last.pth.tar", "model ema", timm_run),
    Case("Lightning module", "epoch=99-step=50000.ckpt", "", lightning),
    Case("Sequential ResNet", "children.pth", "model", children),
]
