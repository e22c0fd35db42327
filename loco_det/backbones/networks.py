"""This package's networks by name: ResNets, Progressive ResNet-50 and ShuffleNet v2-50."""

from __future__ import annotations

from loco_det.backbones.presnet import PRESNET, PResNet
from loco_det.backbones.resnet import BLOCKS, STEM_CHANNELS, ResNet, StagedBackbone, narrow
from loco_det.backbones.shufflenet import SHUFFLENET, ShuffleNet

RESNETS = {f"resnet{depth}": depth for depth in BLOCKS}
OWN_NETWORKS = {PRESNET: "Progressive ResNet-50", SHUFFLENET: "ShuffleNet v2-50"}  # no ResNet; title of each
NETWORKS = (*RESNETS, *OWN_NETWORKS)


def build_network(
    name: str, *, stem: str = "imagenet", norm: str = "BN", width: int = STEM_CHANNELS, stride_in_1x1: bool = False
) -> StagedBackbone:
    """Build the network `name`, one of `NETWORKS`, with fresh weights.

    Args:
        stem: imagenet or cifar.
        norm: a name for `resnet.make_norm`.
        width: scales all channels; 64 is full width.
        stride_in_1x1: of a ResNet's bottlenecks.

    Raises:
        UserError: a width that the network cannot have.
    """
    if name == PRESNET:
        return PResNet(stem=stem, norm=norm, stem_channels=width // 2)
    if name == SHUFFLENET:
        return ShuffleNet(stem=stem, norm=norm, stem_channels=width)
    depth = RESNETS[name]
    return ResNet(depth, stem=stem, norm=norm, stride_in_1x1=stride_in_1x1, **narrow(depth, width))
