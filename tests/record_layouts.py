"""Records tests/recorded_layouts.json: names and shapes of checkpoints as lightly and transformers make them.

python tests/record_layouts.py, with both installed. The tests build checkpoints from the record, so they need neither,
and compare the record with the libraries where they are.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torchvision
from torch import nn

OUTPUT = Path(__file__).resolve().parent / "recorded_layouts.json"


def children() -> nn.Sequential:
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])


def headless() -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model


def lightly() -> dict[str, nn.Module]:
    """As lightly's examples (examples/pytorch_lightning) and its ImageNet benchmarks put their models together."""
    from lightly.loss import DINOLoss, NTXentLoss
    from lightly.models import modules as heads
    from lightly.models.modules import NNMemoryBankModule

    models = {name: nn.Module() for name in ("moco", "simclr", "byol", "swav", "simsiam", "nnclr", "dino", "byol_r50")}
    for name in ("moco", "simclr", "byol", "swav", "simsiam", "nnclr"):
        models[name].backbone = children()
    moco = models["moco"]
    moco.projection_head = heads.MoCoProjectionHead(512, 512, 128)
    moco.backbone_momentum = copy.deepcopy(moco.backbone)
    moco.projection_head_momentum = copy.deepcopy(moco.projection_head)
    moco.criterion = NTXentLoss(memory_bank_size=(64, 128))
    models["simclr"].projection_head = heads.SimCLRProjectionHead(512, 512, 128)
    byol = models["byol"]
    byol.projection_head, byol.prediction_head = heads.BYOLProjectionHead(512), heads.BYOLPredictionHead()
    byol.backbone_momentum = copy.deepcopy(byol.backbone)
    byol.projection_head_momentum = copy.deepcopy(byol.projection_head)
    swav = models["swav"]
    swav.projection_head, swav.prototypes = heads.SwaVProjectionHead(512, 512, 128), heads.SwaVPrototypes(128, 32)
    simsiam = models["simsiam"]
    simsiam.projection_head = heads.SimSiamProjectionHead(512, 512, 128)
    simsiam.prediction_head = heads.SimSiamPredictionHead(128, 64, 128)
    nnclr = models["nnclr"]
    nnclr.projection_head = heads.NNCLRProjectionHead(512, 512, 128)
    nnclr.prediction_head = heads.NNCLRPredictionHead(128, 512, 128)
    nnclr.memory_bank = NNMemoryBankModule(size=(64, 128))
    dino = models["dino"]
    dino.student_backbone, dino.teacher_backbone = children(), children()
    dino.student_head = heads.DINOProjectionHead(512, 512, 64, 128)
    dino.teacher_head = heads.DINOProjectionHead(512, 512, 64, 128)
    dino.criterion = DINOLoss(output_dim=128)
    benchmark = models["byol_r50"]
    benchmark.backbone, benchmark.teacher_backbone = headless(), headless()
    benchmark.projection_head, benchmark.prediction_head = heads.BYOLProjectionHead(512), heads.BYOLPredictionHead()
    benchmark.teacher_projection_head = heads.BYOLProjectionHead(512)
    benchmark.online_classifier = nn.Linear(512, 10)
    return {f"lightly {name}": model for name, model in models.items()}


def transformers() -> dict[str, nn.Module]:
    """transformers' own ResNet-18 and ResNet-50 with their classifier."""
    from transformers import ResNetConfig, ResNetForImageClassification

    small = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    large = {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]}
    made = {18: small, 50: large}
    return {
        f"transformers resnet{depth}": ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))
        for depth, sizes in made.items()
    }


def layout(model: nn.Module) -> dict[str, list]:
    """Name -> [dtype, *shape] of everything in the state dict."""
    return {
        name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in model.state_dict().items()
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    found = {name: layout(model) for name, model in {**lightly(), **transformers()}.items()}
    rows = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in found.items()]
    OUTPUT.write_text("{\n" + ",\n".join(rows) + "\n}\n")
