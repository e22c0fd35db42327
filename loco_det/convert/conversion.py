"""Any known ResNet checkpoint -> Detectron2's or torchvision's weights: load safely, recognise, account, write, prove.

`convert` is the command; `read_backbone` returns the network, for its features; training reads MODEL.WEIGHTS with
`read_backbone_tensors` and `read_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from loco_det.backbones.artifact import (
    HEADER_KEY,
    Manifest,
    Stage,
    check_hash,
    decode_manifest,
    load_backbone,
    require_resnet,
)
from loco_det.backbones.names import to_detectron2
from loco_det.backbones.networks import OWN_NETWORKS, build_network
from loco_det.backbones.presnet import PRESNET
from loco_det.backbones.resnet import (
    BLOCKS,
    StagedBackbone,
    stage_channels,
    stage_strides,
    tensors_hash,
)
from loco_det.backbones.timm_models import PREFIX
from loco_det.convert.architecture import Architecture, checked_tensors, recognise
from loco_det.convert.export import WRITERS, is_fragment, yaml_text
from loco_det.convert.load import check_sums, in_memory, load_tensors, open_tensors, safetensors_metadata
from loco_det.convert.report import Account, take_account
from loco_det.convert.sources import Pixels
from loco_det.convert.stated import Stated
from loco_det.convert.timm_models import load_timm
from loco_det.core.errors import UserError
from loco_det.core.files import atomic_write


def convert(
    source: str | Path,
    output: str | Path,
    *,
    branch: str | None = None,
    drop: Sequence[str] = (),
    image: str | Path | None = None,
    stated: Stated | None = None,
) -> Account:
    """Convert `source` to `output`; returns the account with the proof.

    The suffix of `output` selects the format: .pkl is Detectron2's, with the YAML fragment written beside it; .pth and
    .safetensors have torchvision's names, which `torchvision.models.resnet*` and timm load, the latter with our
    manifest in its header.

    Args:
        source: our own artifact or any checkpoint that `sources.SOURCES` knows.
        branch: which backbone, if the file holds several; the prefix of its tensors selects it alone.
        drop: patterns of tensors to drop, as for `take_account`.
        image: image for the proof; None for the packaged photograph.
        stated: pixels and stride, if they differ from the source's own.

    Raises:
        UserError: an invalid file or option, or the proof fails; nothing is left at `output`.
    """
    source, output = Path(source), Path(output)
    if output.suffix not in WRITERS:
        raise UserError(
            f"{output}: the name must say the format; end it in .pkl for Detectron2, or in .pth or .safetensors for "
            "torchvision and timm"
        )
    if output.resolve() == source.resolve():
        raise UserError(f"{output}: is the input too; give the output another name")
    for_detectron2, write = output.suffix == ".pkl", WRITERS[output.suffix]
    fragment = output.with_suffix(".yaml")
    if for_detectron2 and fragment.exists() and not is_fragment(fragment):
        raise UserError(f"{fragment}: is in the way of the YAML keys of {output.name}; give the output another name")
    account, manifest, known = _read(source, branch, drop)
    account.pixels = _pixels(source, account, manifest, known, stated)
    manifest = manifest or _describe(account)
    if account.pixels.stride_in_1x1 and not for_detectron2:
        raise UserError(
            f"{output}: these weights have their stride in the 1x1 convolution, which torchvision and timm cannot be "
            "told; write a .pkl for Detectron2"
        )
    tensors = {to_detectron2(n): t for n, t in account.converted.items()} if for_detectron2 else account.converted
    with atomic_write(output) as file:
        write(file, tensors, manifest)
        written = _tensors_in(file.name)
        exported = written if for_detectron2 else {to_detectron2(name): t for name, t in written.items()}
        try:
            from loco_det.convert.prove import prove  # lazy: importing torchvision takes as long as torch

            account.proof = prove(account, exported, image)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        manifest = msgspec.structs.replace(manifest, proof=account.proof)
        write(file, tensors, manifest)
        written = _tensors_in(file.name)
        if written.keys() != tensors.keys() or any(
            not torch.equal(in_memory(written[n]), t) for n, t in tensors.items()
        ):
            raise UserError(f"{output}: the disk gave back other bytes than were written; choose another disk")
    if for_detectron2:
        with atomic_write(fragment, "w") as file:
            file.write(yaml_text(output, manifest, account.architecture))
    return account


def is_described(path: str | Path) -> bool:
    """Whether a weights file has our manifest, which states its pixels."""
    return HEADER_KEY in safetensors_metadata(Path(path)) or isinstance(open_tensors(path).get(HEADER_KEY), str)


def _tensors_in(path: str) -> dict[str, Tensor]:
    """Map the tensors of a file that `convert` wrote, without reading them."""
    opened = open_tensors(path)
    return opened["model"] if isinstance(opened.get("model"), dict) else opened


def read_backbone(
    path: str | Path,
    branch: str | None = None,
    *,
    norm: str = "BN",
    stated: Stated | None = None,
) -> tuple[StagedBackbone, Manifest]:
    """Load the backbone of any checkpoint that `convert` reads, as a network in evaluation mode, with its manifest.

    Also reads our own that `convert` cannot write: those with the CIFAR stem, PResNet-50 and ShuffleNet v2-50.

    Args:
        path, branch, stated: as for `convert`.
        norm: the network's BatchNorm, a name for `backbone.make_norm`: "BN", "SyncBN" or "FrozenBN".

    Returns:
        The network (float32, CPU): (B, 3, H, W), normalised by the manifest's `pixel_mean` and `pixel_std` (0-255
        units) in its `channel_order`, -> every stage's output by name. The manifest is the file's own, or made from
        the known facts of its source.

    Raises:
        UserError: as `convert`.
    """
    path = Path(path)
    header = safetensors_metadata(path).get(HEADER_KEY) if path.is_file() else None
    if header is not None:
        manifest = decode_manifest(header, path)
        if manifest.architecture.startswith(PREFIX):
            _refuse_choices(path, branch)
            if stated:
                raise UserError(f"{path}: its manifest already states the pixels; leave those options out")
            return load_timm(path, load_backbone(path)[0], manifest), manifest
        if manifest.stem == "cifar" or manifest.architecture in OWN_NETWORKS:
            _refuse_choices(path, branch)
            tensors, _ = load_backbone(path)
            account = Account("", "", Architecture(manifest.depth), len(tensors), tensors, {}, {})
            _pixels(path, account, manifest, None, stated)
            return _filled(path, _described(path, tensors, manifest, norm), tensors), manifest
    account, manifest, known = _read(path, branch)
    account.pixels = _pixels(path, account, manifest, known, stated)
    model = account.architecture.build(stride_in_1x1=account.pixels.stride_in_1x1, norm=norm)
    return _filled(path, model, account.converted), manifest or _describe(account)


def _described(path: Path, tensors: dict[str, Tensor], manifest: Manifest, norm: str) -> StagedBackbone:
    """Build the network of our own manifest, with fresh weights: one of OWN_NETWORKS, or a ResNet with CIFAR stem."""
    stem, weight = manifest.stages.get("stem"), tensors.get("conv1.weight")
    if manifest.depth not in BLOCKS or stem is None or weight is None or weight.shape[:1] != (stem.channels,):
        described = f"depth {manifest.depth}, stem {'absent' if stem is None else f'of {stem.channels} channels'}"
        raise UserError(f"{path}: its tensors are not what its manifest says ({described}); write it again")
    name = manifest.architecture if manifest.architecture in OWN_NETWORKS else f"resnet{manifest.depth}"
    width = stem.channels * (2 if name == PRESNET else 1)
    try:
        return build_network(name, stem=manifest.stem, norm=norm, width=width, stride_in_1x1=manifest.stride_in_1x1)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _filled(path: Path, model: StagedBackbone, tensors: dict[str, Tensor]) -> StagedBackbone:
    """Load exactly `tensors` (torchvision's names) into `model`; returns it in evaluation mode."""
    counters = {name: t for name, t in model.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**{to_detectron2(n): t for n, t in tensors.items()}, **counters}, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: its tensors are not what its manifest says ({reason}); write it again") from error
    return model.eval()


def read_backbone_tensors(path: str | Path, branch: str | None = None) -> tuple[dict[str, Tensor], Manifest | None]:
    """Load a backbone's tensors under Detectron2's names in the ResNet (`stem.conv1.weight`), and its manifest.

    Reads everything that `convert` reads; the manifest is None unless the file is loco_det's. Tensors are
    float32 on the CPU, complete and finite for one ResNet.

    Raises:
        UserError: as `convert`.
    """
    account, manifest, _ = _read(Path(path), branch)
    return {to_detectron2(name): tensor for name, tensor in account.converted.items()}, manifest


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint in Detectron2's format (.pth or .pkl): {"model": {name: tensor}, ...}, the rest as stored.

    A bare state dict becomes the "model" entry. Nothing is renamed.

    Raises:
        UserError: unreadable, or no flat dictionary of tensors.
    """
    loaded = load_tensors(path)
    checkpoint = loaded if isinstance(loaded.get("model"), dict) else {"model": loaded}
    remedy = f"give a detector's checkpoint, or convert a backbone: loco-det convert {path} backbone.pkl"
    for name, value in checkpoint["model"].items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise UserError(f"{path}: {name!r:.100} is no tensor of a model; {remedy}")
    if not checkpoint["model"]:
        raise UserError(f"{path}: holds no tensors; {remedy}")
    return checkpoint


def _read(path: Path, branch: str | None, drop: Sequence[str] = ()) -> tuple[Account, Manifest | None, Pixels | None]:
    """Return the account of a file, its manifest if it is ours, and the pixels known for its source."""
    loaded = open_tensors(path)
    check_sums(path)
    header = safetensors_metadata(path).get(HEADER_KEY)
    if header is not None:
        manifest = decode_manifest(header, path)
        require_resnet(path, manifest)
        _refuse_choices(path, branch, drop)
        architecture = recognise(path, loaded)
        tensors = checked_tensors(path, loaded, architecture)
        check_hash(path, tensors, manifest)
        account = Account(f"loco_det ({manifest.method})", "", architecture, len(tensors), tensors, {}, {})
    else:
        account, chosen = take_account(path, loaded, branch, drop=drop)
        manifest = None
        if isinstance(loaded.get(HEADER_KEY), str):
            manifest = decode_manifest(loaded[HEADER_KEY], path)
        elif chosen.source is not None:
            return account, None, chosen.source.pixels
    if manifest is not None and manifest.depth != account.architecture.depth:
        found = f"depth {manifest.depth}, its tensors {account.architecture.depth}"
        raise UserError(f"{path}: the manifest says {found}; take an intact copy")
    return account, manifest, None


def _refuse_choices(path: Path, branch: str | None, drop: Sequence[str] = ()) -> None:
    """Raise UserError for options that do not apply to our own file, which has one backbone."""
    for option in (("--branch",) if branch is not None else ()) + (("--drop",) if drop else ()):
        raise UserError(f"{path}: is one backbone and nothing else; leave {option} out")


def _pixels(
    path: Path, account: Account, manifest: Manifest | None, known: Pixels | None, stated: Stated | None
) -> Pixels:
    """Return the pixels and stride to use: the manifest's, else the user's, else the source's."""
    if manifest is None:
        return (stated or Stated()).complete(path, account.architecture.depth, known)
    if stated:
        raise UserError(f"{path}: its manifest already states pixels and stride; leave those options out")
    return Pixels(manifest.channel_order, manifest.pixel_mean, manifest.pixel_std, manifest.stride_in_1x1)


def _describe(account: Account) -> Manifest:
    depth, strides, pixels = account.architecture.depth, stage_strides(), account.pixels
    return Manifest(
        architecture=account.architecture.name,
        depth=depth,
        stem="imagenet",
        stages={name: Stage(channels, strides[name]) for name, channels in stage_channels(depth).items()},
        method=account.source,
        channel_order=pixels.order,
        pixel_mean=pixels.mean,
        pixel_std=pixels.std,
        stride_in_1x1=pixels.stride_in_1x1,
        tensors_sha256=tensors_hash(account.converted.items()),
        dropped={why: keys for why, keys in account.dropped.items() if why.startswith("as asked")},
    )
