"""backbone.safetensors: what is written comes back, anything damaged or forged is one sentence, nothing executes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from pathlib import Path

import msgspec
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from loco_det import __version__
from loco_det.backbones.artifact import (
    HEADER_KEY,
    IMAGENET_MEAN,
    Manifest,
    Stage,
    backbone_tensors,
    decode_manifest,
    describe,
    encode_manifest,
    load_backbone,
    save_backbone,
)
from loco_det.backbones.names import to_detectron2
from loco_det.backbones.resnet import ResNet, tensors_hash
from loco_det.core.errors import UserError


def small() -> tuple[dict[str, torch.Tensor], Manifest]:
    """Two tensors and their manifest."""
    tensors = {"conv1.weight": torch.arange(12.0).reshape(3, 4), "bn1.bias": torch.tensor([0.5, -0.0])}
    stages = {"stem": Stage(64, 4)}
    return tensors, Manifest(architecture="resnet18", depth=18, stem="imagenet", stages=stages, method="loco")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    save_backbone(tmp_path / "backbone.safetensors", *small())
    return tmp_path / "backbone.safetensors"


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and tensor bytes of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# --- what is written comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [18, 50])
def test_a_network_comes_back_bit_for_bit_under_torchvisions_names(depth: int, tmp_path: Path) -> None:
    torch.manual_seed(depth)
    network = ResNet(depth, stem="imagenet")
    network.train()(torch.randn(2, 3, 32, 32))  # moves the statistics
    path = tmp_path / "new" / "folder" / "backbone.safetensors"
    units = [["stem", "res2"], ["res3", "res3"]]
    manifest = describe(network, stem="imagenet", method="gim", units=units, step=7, config={"SEED": 3, "A": {"B": []}})
    written = save_backbone(path, backbone_tensors(network), manifest)
    tensors, read = load_backbone(path)
    assert read == written
    assert read == msgspec.structs.replace(manifest, tensors_sha256=read.tensors_sha256)
    assert (read.architecture, read.depth, read.units, read.step) == (f"resnet{depth}", depth, units, 7)
    assert read.stages["res5"] == Stage(512 if depth == 18 else 2048, 32)
    assert read.loco_det_version == __version__
    assert (read.channel_order, read.pixel_mean, read.pixel_std) == ("RGB", IMAGENET_MEAN, (58.395, 57.12, 57.375))

    again = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    wanted = {name for name in again if not name.endswith("num_batches_tracked") and not name.startswith("fc.")}
    assert tensors.keys() == wanted
    state = network.state_dict()
    assert all(torch.equal(tensor, state[to_detectron2(name)]) for name, tensor in tensors.items())
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert read.tensors_sha256 == tensors_hash(tensors.items())
    assert os.listdir(path.parent) == ["backbone.safetensors"]


def test_tensors_of_any_layout_and_type_are_taken() -> None:
    network = ResNet(18).double().to(memory_format=torch.channels_last)
    tensors = backbone_tensors(network)
    assert all(t.is_contiguous() and t.dtype == torch.float32 and not t.requires_grad for t in tensors.values())


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    tensors, manifest = small()
    save_backbone(tmp_path / "a", tensors, manifest)
    save_backbone(tmp_path / "b", dict(reversed(tensors.items())), manifest)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_safetensors_alone_can_read_it(artifact: Path) -> None:
    header, _ = split(artifact.read_bytes())
    manifest = json.loads(header["__metadata__"][HEADER_KEY])
    assert manifest["format"] == 1
    assert manifest["stages"] == {"stem": {"channels": 64, "stride": 4}}


# --- what must not come back ------------------------------------------------------------------------------------


def test_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UserError, match="no such backbone file"):
            load_backbone(path)


class Executed:
    """Unpickling this would leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_nothing_in_a_file_is_executed(kind: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "backbone.safetensors", tmp_path / "mark"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Executed(mark)}))
    else:
        torch.save({"model": Executed(mark)}, path)
    with pytest.raises(UserError, match="not a safetensors file"):
        load_backbone(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 64,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**31) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["empty", "short", "zeros", "2^63", "2^31", "list", "no text", "deep"],
)
def test_no_safetensors_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"backbone\.safetensors: (damaged|has no loco_det manifest)"):
        load_backbone(path)


def test_every_truncation_is_refused(artifact: Path) -> None:
    data = artifact.read_bytes()
    for size in [*range(0, len(data) - 1, 37), len(data) - 1]:
        artifact.write_bytes(data[:size])
        with pytest.raises(UserError, match="damaged"):
            load_backbone(artifact)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_one_sentence_or_changes_no_tensor(artifact: Path, position: int, bit: int) -> None:
    tensors, _ = small()
    data = bytearray(artifact.read_bytes())
    data[position % len(data)] ^= 1 << bit
    flipped = artifact.with_name("flipped.safetensors")
    flipped.write_bytes(data)
    try:
        read, _ = load_backbone(flipped)
    except UserError as error:
        message = str(error)
    else:
        message = f"{flipped}"
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert str(flipped) in message
    assert "\n" not in message


def test_changed_weights_do_not_pass_for_the_pretrained_ones(artifact: Path) -> None:
    header, body = split(artifact.read_bytes())
    artifact.write_bytes(joined(header, body[:-1] + bytes([body[-1] ^ 1])))
    with pytest.raises(UserError, match="do not match the sha256"):
        load_backbone(artifact)
    header["layer1.0.conv1.weight"] = header.pop("conv1.weight")
    artifact.write_bytes(joined(header, body))
    with pytest.raises(UserError, match="do not match the sha256"):
        load_backbone(artifact)


def test_offsets_that_overlap_or_lead_outside(artifact: Path) -> None:
    header, body = split(artifact.read_bytes())
    for offsets in ([0, 48], [8, 4096], [-8, 40], [2**62, 2**62 + 48]):
        forged = {**header, "conv1.weight": {**header["conv1.weight"], "data_offsets": offsets}}
        artifact.write_bytes(joined(forged, body))
        with pytest.raises(UserError, match="damaged"):
            load_backbone(artifact)


def test_a_plain_safetensors_file_is_not_a_backbone_of_ours(tmp_path: Path) -> None:
    save_file(small()[0], tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"plain\.safetensors: has no loco_det manifest"):
        load_backbone(tmp_path / "plain.safetensors")


def manifest_json(**changes: object) -> str:
    return json.dumps({**json.loads(msgspec.json.encode(small()[1])), **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read"),
        ("nonsense", "cannot be read"),
        ("[]", "cannot be read"),
        ("null", "cannot be read"),
        ("{}", "format None is not 1"),
        (manifest_json(format=2), "format 2 is not 1"),
        (manifest_json(format="1"), "format '1' is not 1"),
        (manifest_json(format=True), "cannot be read"),
        (manifest_json(depth="50"), r"cannot be read.*depth"),
        (manifest_json(depth=None), r"cannot be read.*depth"),
        (manifest_json(stages={"stem": {"channels": 64}}), r"cannot be read.*stride"),
        (manifest_json(stages=["stem"]), r"cannot be read.*stages"),
        (manifest_json(pixel_mean=[1, 2]), r"cannot be read.*pixel_mean"),
        (manifest_json(pixel_std=[1, 2, "x"]), r"cannot be read.*pixel_std"),
        (manifest_json(pixel_std=[58, 57, 0]), r"cannot be read.*pixel_std"),
        (manifest_json(channel_order="GBR"), r"cannot be read.*channel_order"),
        (manifest_json(__class__="os.system"), r"cannot be read.*__class__"),
        (manifest_json(colour="RGB"), r"cannot be read.*colour"),
        ('{"format": 1, "depth": 18}', r"cannot be read.*missing"),
        ('{"format": 1, "config": ' + "[" * 200_000 + "]" * 200_000 + "}", "cannot be read"),
        ('{"format": 1, "depth": ' + "9" * 5000 + "}", "cannot be read"),
    ],
    ids=range(21),
)
def test_a_manifest_that_says_nonsense_is_refused_with_the_file_and_the_field(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)^some\.file: .*{reason}") as info:
        decode_manifest(text, "some.file")
    assert "\n" not in str(info.value)


def test_a_forged_header_reaches_the_same_refusal(artifact: Path) -> None:
    header, body = split(artifact.read_bytes())
    for text in ("", "{", manifest_json(format=99), manifest_json(stages=3)):
        header["__metadata__"][HEADER_KEY] = text
        artifact.write_bytes(joined(header, body))
        with pytest.raises(UserError, match=r"backbone\.safetensors: .*manifest"):
            load_backbone(artifact)


def test_a_manifest_survives_its_json() -> None:
    _, manifest = small()
    assert decode_manifest(msgspec.json.encode(manifest), "x") == manifest
    assert decode_manifest(encode_manifest(manifest), "x") == manifest


def test_a_manifest_of_which_a_bit_was_changed_is_refused() -> None:
    text = encode_manifest(small()[1]).encode()
    for at in range(len(text)):
        for bit in (0, 2, 6):
            with pytest.raises(UserError, match=r"^some\.file: "):
                decode_manifest(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :], "some.file")


# --- a disk that fills up ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_backbone_that_was_there(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifact.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    tensors, manifest = small()
    with pytest.raises(UserError, match="No space left on device"):
        save_backbone(artifact, {**tensors, "bn1.bias": torch.ones(2)}, manifest)
    assert artifact.read_bytes() == before
    assert os.listdir(artifact.parent) == ["backbone.safetensors"]
