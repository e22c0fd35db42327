"""From a file to Detectron2's .pkl and YAML: the output, and that failure leaves nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch
import torchvision
import yaml
from convert_cases import prefixed, randomised
from safetensors.torch import load_file

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, describe, load_backbone, save_backbone
from loco_det.backbones.names import to_detectron2, to_torchvision
from loco_det.backbones.resnet import ResNet
from loco_det.cli import run_job
from loco_det.convert import Stated, conversion, convert, read_backbone, read_backbone_tensors
from loco_det.convert import prove as prove_module
from loco_det.convert.architecture import Architecture
from loco_det.convert.export import yaml_text
from loco_det.convert.prove import TOLERANCE, made_image, prove
from loco_det.convert.report import Account
from loco_det.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MSRA = Stated("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """r50.pth, a torchvision ResNet-50 of random weights, and r50.pkl made of it."""
    folder = tmp_path_factory.mktemp("r50")
    torch.save(randomised(torchvision.models.resnet50()).state_dict(), folder / "r50.pth")
    convert(folder / "r50.pth", folder / "r50.pkl")
    return folder


@pytest.fixture(scope="module")
def r18(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("r18") / "r18.pth"
    torch.save(randomised(torchvision.models.resnet18()).state_dict(), path)
    return path


def backbone_of(path: Path) -> ResNet:
    tensors, manifest = read_backbone_tensors(path)
    model = ResNet(manifest.depth, stride_in_1x1=manifest.stride_in_1x1, norm="FrozenBN").eval()
    model.load_state_dict(tensors, strict=True)
    return model


def test_the_file_is_what_detectron2_s_loader_expects(folder: Path) -> None:
    content = pickle.loads((folder / "r50.pkl").read_bytes(), encoding="latin1")
    assert content["__author__"] == "loco_det"
    assert content["matching_heuristics"] is True
    state = torch.load(folder / "r50.pth", weights_only=True)
    expected = {k: v for k, v in state.items() if not k.startswith("fc.") and "num_batches" not in k}
    assert content["model"].keys() == {to_detectron2(name) for name in expected}
    for name, tensor in expected.items():
        array = content["model"][to_detectron2(name)]
        assert isinstance(array, np.ndarray)
        assert array.flags.writeable  # torch.from_numpy warns of any other
        assert np.array_equal(array, tensor.numpy())


def test_the_file_names_nothing_that_a_numpy_release_lacks(folder: Path) -> None:
    import pickletools

    content = (folder / "r50.pkl").read_bytes()
    words = [arg for op, arg, _ in pickletools.genops(content) if "UNICODE" in op.name]
    assert not any(word.startswith("numpy.") for word in words)


def test_the_manifest_carries_the_proof(folder: Path) -> None:
    manifest = json.loads(pickle.loads((folder / "r50.pkl").read_bytes())["loco_det"])
    assert (manifest["architecture"], manifest["depth"], manifest["channel_order"]) == ("resnet50", 50, "RGB")
    assert manifest["stages"]["res5"] == {"channels": 2048, "stride": 32}
    for kind in ("float64", "float32"):
        assert list(manifest["proof"][kind]) == ["stem", "res2", "res3", "res4", "res5"]
        assert all(0 <= numbers["relative"] <= TOLERANCE for numbers in manifest["proof"][kind].values())


def test_the_yaml_fragment_states_what_the_weights_need(folder: Path) -> None:
    fragment = yaml.safe_load((folder / "r50.yaml").read_text())
    assert fragment == {
        "INPUT": {"FORMAT": "RGB"},
        "MODEL": {
            "WEIGHTS": str((folder / "r50.pkl").absolute()),
            "PIXEL_MEAN": [123.675, 116.28, 103.53],
            "PIXEL_STD": [58.395, 57.12, 57.375],
            "RESNETS": {"DEPTH": 50, "STRIDE_IN_1X1": False, "RES2_OUT_CHANNELS": 256},
        },
    }


def test_features_equal_those_of_timm(folder: Path) -> None:
    """An implementation that the proof does not use."""
    timm = pytest.importorskip("timm")
    other = timm.create_model("resnet50", features_only=True).eval()
    state = torch.load(folder / "r50.pth", weights_only=True)
    other.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = backbone_of(folder / "r50.pkl")(x), other(x)
    for name, tensor in zip(("res2", "res3", "res4", "res5"), expected[1:]):
        assert (found[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max()


def test_any_backbone_as_a_network(folder: Path, tmp_path: Path) -> None:
    """From a foreign checkpoint and from our own .pkl: the same features as torchvision's, and what they need."""
    other = torchvision.models.resnet50().eval()
    other.load_state_dict(torch.load(folder / "r50.pth", weights_only=True))
    layers = torch.nn.Sequential(*list(other.children())[:-2])
    x = torch.randn(1, 3, 65, 90, generator=torch.Generator().manual_seed(0))
    for path in (folder / "r50.pth", folder / "r50.pkl"):
        network, manifest = read_backbone(path)
        assert not network.training
        assert (manifest.architecture, manifest.channel_order) == ("resnet50", "RGB")
        with torch.no_grad():
            found, expected = network(x)["res5"], layers(x)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    tensors, _ = read_backbone_tensors(folder / "r50.pkl")
    torch.save(tensors, tmp_path / "d2.pth")
    with pytest.raises(UserError, match="does not say what pixels"):
        read_backbone(tmp_path / "d2.pth")
    network, manifest = read_backbone(tmp_path / "d2.pth", norm="FrozenBN", stated=replace(MSRA, stride_in_1x1=True))
    assert (manifest.stride_in_1x1, network.res3[0].conv1.stride) == (True, (2, 2))
    assert network.state_dict().keys() == tensors.keys()


def test_converting_what_was_converted_changes_nothing(folder: Path, tmp_path: Path) -> None:
    account = convert(folder / "r50.pkl", tmp_path / "again.pkl")
    (once, first), (twice, again) = (read_backbone_tensors(p) for p in (folder / "r50.pkl", tmp_path / "again.pkl"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert msgspec.structs.replace(again, proof={}) == msgspec.structs.replace(first, proof={})
    assert account.dropped == {}
    convert(folder / "r50.pth", tmp_path / "same.pkl")
    assert (tmp_path / "same.pkl").read_bytes() == (folder / "r50.pkl").read_bytes()


def test_our_artifact_keeps_its_manifest(tmp_path: Path) -> None:
    backbone = randomised(ResNet(18))
    plain = {to_torchvision(k): v for k, v in backbone.state_dict().items() if "num_batches" not in k}
    about = describe(
        backbone, stem="imagenet", method="loco", step=70, dataset="made", images=9, units=[["stem", "res2"]],
        channel_order="BGR", pixel_mean=(1.0, 2.0, 3.0), pixel_std=(50.0, 51.0, 52.0),
    )  # fmt: skip
    save_backbone(tmp_path / "backbone.safetensors", plain, about)
    account = convert(tmp_path / "backbone.safetensors", tmp_path / "b.pkl")
    tensors, manifest = read_backbone_tensors(tmp_path / "b.pkl")
    _, before = load_backbone(tmp_path / "backbone.safetensors")
    assert manifest.proof == account.proof
    for name in before.__struct_fields__:
        assert name == "proof" or getattr(manifest, name) == getattr(before, name)
    assert all(torch.equal(tensors[to_detectron2(name)], tensor) for name, tensor in plain.items())
    fragment = yaml.safe_load((tmp_path / "b.yaml").read_text())
    assert fragment["INPUT"]["FORMAT"] == "BGR"
    assert fragment["MODEL"]["PIXEL_STD"] == [50.0, 51.0, 52.0]
    assert fragment["MODEL"]["RESNETS"] == {"DEPTH": 18, "STRIDE_IN_1X1": False, "RES2_OUT_CHANNELS": 64}
    with pytest.raises(UserError, match="manifest already states"):
        convert(tmp_path / "backbone.safetensors", tmp_path / "c.pkl", stated=MSRA)


def test_detectron2_weights_must_be_told_their_pixels(folder: Path, tmp_path: Path) -> None:
    tensors, _ = read_backbone_tensors(folder / "r50.pkl")
    path = tmp_path / "model_final.pth"
    torch.save({"model": prefixed("backbone.bottom_up.", tensors)}, path)
    for stated in (None, MSRA):
        with pytest.raises(UserError, match="does not say what pixels and stride"):
            convert(path, tmp_path / "out.pkl", stated=stated)
    convert(path, tmp_path / "out.pkl", stated=replace(MSRA, stride_in_1x1=True))
    fragment = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert fragment["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is True
    assert (fragment["INPUT"]["FORMAT"], fragment["MODEL"]["PIXEL_STD"]) == ("BGR", [1.0, 1.0, 1.0])
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [backbone_of(p)(x)["res3"] for p in (tmp_path / "out.pkl", folder / "r50.pkl")]
    assert outputs[0].shape == outputs[1].shape
    assert not torch.allclose(*outputs)  # no shape shows a wrong stride: only the statement does


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stated": Stated("BGR")}, "give all three or none"),
        ({"stated": replace(MSRA, channel_order="GRB")}, "neither RGB nor BGR"),
        ({"stated": replace(MSRA, std=(0.0, 1.0, 1.0))}, "--pixel-std"),
        ({"stated": replace(MSRA, mean=(float("nan"), 1.0, 1.0))}, "--pixel-mean"),
        ({"branch": "query"}, "has no branch 'query'"),
        ({"image": "absent.jpg"}, "absent.jpg"),
    ],
)
def test_options_that_cannot_be_used(r18: Path, tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        convert(r18, tmp_path / "out.pkl", **options)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_used(r18: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"end it in \.pkl for Detectron2, or in \.pth"):
        convert(r18, r18.with_suffix(".onnx"))
    with pytest.raises(UserError, match="is the input too"):
        convert(folder / "r50.pkl", folder / "r50.pkl")
    with pytest.raises(UserError, match="is the input too"):
        convert(folder / "r50.pkl", folder / "." / ".." / folder.name / "r50.pkl")
    with pytest.raises(UserError, match="cannot be written"):
        convert(r18, r18 / "out.pkl")


def test_a_yaml_file_of_somebody_s_is_not_written_over(r18: Path, tmp_path: Path) -> None:
    (tmp_path / "out.yaml").write_text("SOLVER: {MAX_ITER: 90000}\n")
    with pytest.raises(UserError, match=r"out.yaml: is in the way of the YAML keys of out.pkl"):
        convert(r18, tmp_path / "out.pkl")
    assert (tmp_path / "out.yaml").read_text() == "SOLVER: {MAX_ITER: 90000}\n"
    assert not (tmp_path / "out.pkl").exists()
    (tmp_path / "out.yaml").unlink()
    for _ in range(2):  # its own it replaces
        convert(r18, tmp_path / "out.pkl")


def test_the_manifest_s_words_stay_in_their_comment() -> None:
    manifest = describe(ResNet(18), stem="imagenet", method="loco\nOUTPUT_DIR: /\u2028VERSION: 1\r#")
    keys = yaml.safe_load(yaml_text(Path("weights.pkl"), manifest, Architecture(18)))
    assert keys.keys() == {"MODEL", "INPUT"}


def test_a_wrong_name_in_the_table_fails_the_proof(r18: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two norms swapped keep every shape; only the proof can see it, and nothing may be left behind."""
    swap = {"res4.0.conv1.norm": "res4.0.conv2.norm", "res4.0.conv2.norm": "res4.0.conv1.norm"}

    def swapped(name: str) -> str:
        module, leaf = to_detectron2(name).rsplit(".", 1)
        return f"{swap.get(module, module)}.{leaf}"

    monkeypatch.setattr(conversion, "to_detectron2", swapped)
    with pytest.raises(UserError, match="res4 of the converted backbone differs"):
        convert(r18, tmp_path / "out.pkl")
    assert list(tmp_path.iterdir()) == []


def test_an_older_output_survives_a_failure(r18: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.pkl").write_bytes(b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prove_module, "prove", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(r18, tmp_path / "out.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["out.pkl"]
    assert (tmp_path / "out.pkl").read_bytes() == b"old"


def account_of(plain: dict[str, torch.Tensor], arch: Architecture) -> Account:
    return Account("made up", "", arch, len(plain), plain, {}, {})


def test_the_proof_needs_an_output_to_compare() -> None:
    """A backbone that answers nothing proves nothing."""
    model = ResNet(18, norm="FrozenBN")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    plain = {to_torchvision(name): tensor for name, tensor in tensors.items()}
    with pytest.raises(UserError, match="output of stem is 0"):
        prove(account_of(plain, Architecture(18)), tensors)


@pytest.mark.parametrize("arch", [Architecture(50, 32, 4), Architecture(34)])
def test_the_proof_covers_other_architectures(arch: Architecture) -> None:
    tensors = randomised(arch.build(norm="FrozenBN")).state_dict()
    proof = prove(account_of({to_torchvision(n): t for n, t in tensors.items()}, arch), tensors)
    assert max(cell["relative"] for cell in proof["float64"].values()) <= 1e-12


def test_the_made_image_never_changes_and_is_no_flat_picture() -> None:
    image = made_image()
    assert image.dtype == np.uint8
    assert image.shape == (157, 221, 3)
    assert np.array_equal(image, made_image())
    assert image.reshape(-1, 3).std(axis=0).min() > 40
    correlation = np.corrcoef(image.reshape(-1, 3).T)
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.3  # a channel swap must show


def test_a_real_image_in_the_proof(r18: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (600, 1100, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    account = convert(r18, tmp_path / "out.pkl", image=tmp_path / "picture.png")
    assert "picture.png (158 x 86)" in account.proof["image"]


@pytest.fixture
def run_tool(commands: Path) -> Callable[..., subprocess.CompletedProcess]:
    line = [str(commands / "python"), str(ROOT / "tools" / "convert_to_d2.py")]
    return lambda *arguments: subprocess.run([*line, *map(str, arguments)], capture_output=True, text=True)


def test_the_command_prints_account_and_proof(run_tool: Callable, r18: Path, tmp_path: Path) -> None:
    done = run_tool(r18, tmp_path / "out.pkl")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for line in (
        "read        122 tensors",
        "converted   100",
        "dropped      22",
        "    20     batch counters",
        "roi_heads.",
    ):
        assert line in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith(("stem ", "res"))]) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.pkl", "out.yaml"]


def test_the_command_says_one_sentence_and_status_2(run_tool: Callable, tmp_path: Path) -> None:
    done = run_tool(tmp_path / "absent.pth", tmp_path / "out.pkl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "absent.pth" in done.stderr
    assert "Traceback" in run_tool(tmp_path / "absent.pth", tmp_path / "out.pkl", "--debug").stderr


def test_the_command_passes_its_options_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors, _ = read_backbone_tensors(folder / "r50.pkl")
    torch.save(tensors, tmp_path / "plain.pth")
    output = tmp_path / "out.pkl"
    given = ["--channel-order", "BGR", "--pixel-mean", "1", "2", "3", "--pixel-std", "4", "5", "6"]
    assert run_job("convert", [str(tmp_path / "plain.pth"), str(output), *given, "--stride-in-1x1", "yes"]) == 0
    assert "BGR, mean 1 2 3, std 4 5 6" in capsys.readouterr().out
    assert read_backbone_tensors(output)[1].stride_in_1x1 is True


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_backbone_for_torchvision_and_timm(folder: Path, tmp_path: Path, suffix: str) -> None:
    """From Detectron2's names back to torchvision's: every tensor bit for bit, loaded as their users load it."""
    path = tmp_path / f"r50{suffix}"
    account = convert(folder / "r50.pkl", path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert account.proof["float64"]["res5"]["relative"] <= TOLERANCE
    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    before = torch.load(folder / "r50.pth", weights_only=True)
    assert state.keys() == {k for k in before if not k.startswith("fc.") and "num_batches" not in k}
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    model = torchvision.models.resnet50().eval()
    model.fc = torch.nn.Identity()
    model.load_state_dict(state, strict=True)
    timm = pytest.importorskip("timm")
    other = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(path)).eval()  # strict as well
    overlay = {"file": str(path), "num_classes": 0}
    third = timm.create_model("resnet50", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in third.state_dict().items())
    x = torch.randn(1, 3, 65, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        assert (other(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_backbone_of_torchvisions_detector(tmp_path: Path) -> None:
    """Its prefix is no code base's own, so it must be said; what stands beside it is dropped by that."""
    model = randomised(torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    torch.save(model.state_dict(), tmp_path / "maskrcnn.pth")
    with pytest.raises(UserError, match=r"give --branch backbone\.body\."):
        convert(tmp_path / "maskrcnn.pth", tmp_path / "out.pkl")
    stated = Stated("RGB", IMAGENET_MEAN, IMAGENET_STD, stride_in_1x1=False)
    account = convert(tmp_path / "maskrcnn.pth", tmp_path / "out.pkl", branch="backbone.body.", stated=stated)
    body = model.backbone.body.eval()
    x = torch.randn(1, 3, 65, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = body(x)["3"], backbone_of(tmp_path / "out.pkl")(x)["res5"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert account.dropped.keys() == {"batch counters", "outside the branch"}


def test_there_and_back_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """.safetensors is our own artifact, so the manifest goes along."""
    convert(folder / "r50.pkl", tmp_path / "r50.safetensors")
    _, manifest = load_backbone(tmp_path / "r50.safetensors")
    assert manifest.proof["tolerance"] == TOLERANCE
    convert(tmp_path / "r50.safetensors", tmp_path / "r50.pkl")
    tensors, again = read_backbone_tensors(tmp_path / "r50.pkl")
    before, first = read_backbone_tensors(folder / "r50.pkl")
    assert again.tensors_sha256 == manifest.tensors_sha256 == first.tensors_sha256
    assert again.method == manifest.method == first.method
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_a_stride_that_torchvision_lacks_is_not_written_for_it(folder: Path, tmp_path: Path) -> None:
    torch.save(read_backbone_tensors(folder / "r50.pkl")[0], tmp_path / "msra.pth")
    with pytest.raises(UserError, match="torchvision and timm cannot be told"):
        convert(tmp_path / "msra.pth", tmp_path / "out.pth", stated=replace(MSRA, stride_in_1x1=True))
    assert not (tmp_path / "out.pth").exists()


def test_the_account_as_json(r18: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_job("convert", [str(r18), str(tmp_path / "out.pkl"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["source"], facts["architecture"]) == ("torchvision or timm ResNet", "resnet18")
    assert facts["read"] == 122 == len(facts["converted"]) + sum(map(len, facts["dropped"].values()))
    assert facts["converted"]["layer1.0.bn1.bias"] == "layer1.0.bn1.bias"
    assert len(facts["dropped"]["batch counters"]) == 20
    assert facts["pixels"]["order"] == "RGB"
    assert list(facts["proof"]["float32"]) == ["stem", "res2", "res3", "res4", "res5"]
    assert facts["written"] == [str(tmp_path / "out.pkl"), str(tmp_path / "out.yaml")]


# --- what is not in the tensors ---------------------------------------------------------------------------------


def test_d1_the_stated_stride_is_proven_on_a_file_of_torchvisions_names(tmp_path: Path) -> None:
    """Both witnesses stride where it is stated, and the oracle is torchvision with the strides moved by hand."""
    model = randomised(torchvision.models.resnet50()).eval()
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    account = convert(tmp_path / "plain.pth", tmp_path / "out.pkl", stated=replace(MSRA, stride_in_1x1=True))
    assert len(account.proof["models"]) == 2
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    x = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = backbone_of(tmp_path / "out.pkl")(x)["res5"]
        for layer in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(model, layer)(x)
    assert torch.allclose(found, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


@pytest.mark.parametrize("network", ["resnetblur50", "resnetaa50"])
@pytest.mark.parametrize("said", ["name", "entry", "config"])
def test_b4_a_network_with_a_resnets_tensors_and_other_operations_is_refused(tmp_path, network, said) -> None:
    timm = pytest.importorskip("timm")
    state = randomised(timm.create_model(network)).state_dict()
    path = tmp_path / (f"{network}-84f4748f.pth" if said == "name" else "weights.pth")
    torch.save({"arch": network, "state_dict": state} if said == "entry" else state, path)
    if said == "config":
        (tmp_path / "config.json").write_text(json.dumps({"architecture": network}))
    with pytest.raises(UserError, match=rf"timm .* its {network}"):
        convert(path, tmp_path / "out.pkl")
    assert not (tmp_path / "out.pkl").exists()


@pytest.mark.parametrize("name", ["resnet50-19c8e357.pth", "resnet101.pth", "vit_base.pth", "r50.pth"])
def test_b4_a_plain_resnet_converts_whatever_its_file_is_called(folder, tmp_path, name) -> None:
    os.link(folder / "r50.pth", tmp_path / name)
    assert convert(tmp_path / name, tmp_path / "out.pkl").architecture.name == "resnet50"


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "--pixel-mean 0.485 0.456 0.406 .*--pixel-mean 123.675 116.28"),
        ((123.675, 116.28, 103.53), (0.229, 0.224, 0.225), "--pixel-std 0.229 .*--pixel-std 58.395 57.12 57.375"),
        ((0.5, 0.5, 0.5), (127.5, 127.5, 127.5), "--pixel-mean 127.5 127.5 127.5"),
        ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), "--pixel-std 127.5 127.5 127.5"),
    ],
)
def test_b4_pixels_from_0_to_1_are_asked_for_in_255_units(r18, tmp_path, mean, std, words) -> None:
    with pytest.raises(UserError, match=words):
        convert(r18, tmp_path / "out.pkl", stated=Stated("RGB", mean, std))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,) * 3, (255.0,) * 3), ((0.0,) * 3, (1.0,) * 3), ((1.0,) * 3, (9.0,) * 3), (MSRA.mean, MSRA.std)],
)
def test_b4_numbers_that_are_in_255_units_pass(r18, tmp_path, mean, std) -> None:
    assert convert(r18, tmp_path / "out.pkl", stated=Stated("RGB", mean, std)).pixels.mean == mean
