"""`loco-det probe` from labelled images to JSON: layouts, backbones, cache, the four protocols, hostile input."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from loco_det.backbones.artifact import backbone_tensors, describe, save_backbone
from loco_det.backbones.resnet import ResNet
from loco_det.cli import main
from loco_det.convert import Stated, read_backbone
from loco_det.core.errors import UserError
from loco_det.evaluation.probes.backbones import load_backbone_for_probe
from loco_det.evaluation.probes.features import Extractor
from loco_det.evaluation.probes.finetune import FineTuning, batch_size, finetune, predict
from loco_det.evaluation.probes.images import open_probe_data
from loco_det.evaluation.probes.ridge import fit_ridge
from loco_det.images.folders import open_source

COLOURS = {"blue": (200, 40, 40), "green": (40, 200, 40), "red": (40, 40, 200)}  # BGR
SIDE = 8


def write_images(folder: Path, count: int, seed: int = 0, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Class folders of noisy patches of one colour each: any sane features tell them apart."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(rng.normal(COLOURS[name], 25, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / name / f"{i}.png"), pixels)
    return folder


def write_splits(root: Path, train: int, val: int) -> Path:
    """A folder of train/ and val/, so many images of each class."""
    write_images(root / "train", train, seed=0)
    write_images(root / "val", val, seed=1)
    return root


def write_artifact(folder: Path) -> Path:
    """A ResNet-18 with the CIFAR stem as pretraining writes it, every tensor random."""
    torch.manual_seed(1)
    model = ResNet(18, stem="cifar")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    path = folder / "backbone.safetensors"
    manifest = describe(model, stem="cifar", method="loco", config={"DATA": {"IMAGE_SIZE": SIDE}})
    save_backbone(path, backbone_tensors(model), manifest)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"), 12, 5)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("backbone"))


def probe(backbone: object, data: Path | str, out: Path, *options: object) -> dict:
    options = options if {"--cache", "--no-cache"} & set(options) else (*options, "--no-cache")
    argv = ["probe", backbone, "--data", data, "--json", out, "--workers", 0, "--quiet", *options]
    assert main([str(a) for a in argv]) == 0
    return json.loads(out.read_text())


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["linear", "knn", "ridge"])
def test_every_stage_of_a_backbone(protocol: str, artifact: Path, images: Path, tmp_path: Path) -> None:
    options = ("--epochs", 10) if protocol == "linear" else ("--k", 5) if protocol == "knn" else ()
    found = probe(artifact, images, tmp_path / "a" / "p.json", "--protocol", protocol, *options)
    assert list(found["stages"]) == ["stem", "res2", "res3", "res4", "res5"]
    for stage, width in zip(found["stages"].values(), (64, 64, 128, 256, 512)):
        assert stage["dimensions"] == width
        assert 0 <= stage["top1_interval"][0] <= stage["top1"] <= stage["top1_interval"][1] <= 100
        assert stage["top5"] == 100
    assert found["stages"]["stem"]["top1"] > 80
    assert found["features"]["image_size"] == SIDE
    assert found["data"]["train_images"] == 36
    assert found["data"]["test_images"] == 15
    assert found["data"]["classes"] == ["blue", "green", "red"]
    assert found["data"]["test_images_are"] == "the folder val"
    assert found["protocol"] == protocol


def test_fine_tuning_on_few_labels(artifact: Path, images: Path, tmp_path: Path) -> None:
    options = ("--protocol", "semi", "--labels", 10, 50, "--epochs", 2)
    found = probe(artifact, images, tmp_path / "p.json", *options)
    assert list(found["stages"]) == ["res5"]
    by_percent = found["stages"]["res5"]["by_percent"]
    assert {k: v["labels"] for k, v in by_percent.items()} == {"10": 6, "50": 18}  # 2 and 6 of each class
    assert found["stages"]["res5"]["percent"] == 50
    assert found["stages"]["res5"]["top1"] == by_percent["50"]["top1"]
    assert probe(artifact, images, tmp_path / "q.json", *options)["stages"] == found["stages"]


@pytest.mark.parametrize(("labels", "size"), [(12811, 256), (2560, 256), (500, 50), (30, 16)])
def test_batches_of_fine_tuning(labels: int, size: int) -> None:
    assert batch_size(labels) == size


def test_fine_tuning_learns_and_leaves_the_backbone(artifact: Path, images: Path) -> None:
    data = open_probe_data(str(images))
    backbone = load_backbone_for_probe(str(artifact))
    before = backbone.weights_hash()
    device = torch.device("cpu")
    recipe = FineTuning(rate=0.1, epochs=8, batch=12)
    model = finetune(backbone, "res2", data.train, 3, SIDE, recipe, device)
    assert backbone.weights_hash() == before
    assert not torch.equal(model.backbone.stem.conv1.weight, backbone.model.stem.conv1.weight)
    extractor = Extractor(backbone, SIDE, device, batch=8, workers=0, cache=None)
    scores = predict(model, extractor, data.test)
    assert (scores.argmax(1) == torch.from_numpy(data.test.labels)).double().mean() > 0.9


def test_the_table_is_printed(artifact: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["probe", str(artifact), "--data", str(images), "--protocol", "ridge", "--stages", "res3", "--no-cache"]
    assert main([*argv, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "res3" in out
    assert "res4" not in out
    assert "lambda" in out


# --- features -----------------------------------------------------------------------------------------------------


def test_features_are_the_means_of_each_stages_output(artifact: Path, images: Path) -> None:
    """Against a loop over single images with a preprocessing of its own."""
    backbone = load_backbone_for_probe(str(artifact))
    data = open_probe_data(str(images))
    found = Extractor(backbone, SIDE, torch.device("cpu"), batch=7, workers=0, cache=None)(
        data.test, ["stem", "res4"], "test"
    )
    model, manifest = read_backbone(artifact)
    for row in range(len(data.test)):
        bgr = cv2.imread(data.test.source.name(int(data.test.index[row])))
        rgb = bgr[:, :, ::-1].astype(np.float64)
        x = torch.from_numpy((rgb - manifest.pixel_mean) / manifest.pixel_std).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            outputs = model(x)
        for stage in ("stem", "res4"):
            expected = outputs[stage].double().mean((2, 3))[0].float()
            torch.testing.assert_close(found[stage][row], expected, rtol=1e-4, atol=1e-5)


def test_features_on_disk(artifact: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = open_probe_data(str(images))

    def extract(stages: list[str], **changes: object) -> dict[str, torch.Tensor]:
        size = changes.get("size", SIDE)
        calls.append(0)
        extractor = Extractor(backbone, size, torch.device("cpu"), batch=64, workers=0, cache=tmp_path)
        return extractor(changes.get("images", data.test), stages, "test")

    calls: list[int] = []
    backbone = load_backbone_for_probe(str(artifact))
    backbone.model.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
    first = extract(["res2", "res3"])
    again = extract(["res3"])
    assert calls == [1, 0]
    torch.testing.assert_close(first["res3"], again["res3"], rtol=0, atol=0)
    extract(["res2", "res4"])  # res4 is new
    extract(["res2"], size=12)
    extract(["res2"], images=data.train)
    assert calls == [1, 0, 1, 1, 1]
    whole = extract(["res2"])["res2"]
    for file in tmp_path.rglob("res2.npy"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert torch.equal(extract(["res2"])["res2"], whole)
    assert "damaged" in caplog.text
    for file in tmp_path.rglob("res2.npy"):
        file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(extract(["res2"])["res2"], whole)
    for file in tmp_path.rglob("res2.json"):
        file.write_text("[")
    assert torch.equal(extract(["res2"])["res2"], whole)
    assert calls[5:] == [0, 1, 1, 1]


def test_changed_images_are_extracted_again(artifact: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data", 3)
    options = ("--protocol", "ridge", "--stages", "stem", "--cache", tmp_path / "cache")
    probe(artifact, tmp_path / "data", tmp_path / "p.json", *options)
    entries = len(list((tmp_path / "cache").iterdir()))
    probe(artifact, tmp_path / "data", tmp_path / "p.json", *options)
    assert len(list((tmp_path / "cache").iterdir())) == entries == 2
    write_images(tmp_path / "data", 3, seed=4)
    probe(artifact, tmp_path / "data", tmp_path / "p.json", *options)
    assert len(list((tmp_path / "cache").iterdir())) > entries


def test_bgr_backbones_see_bgr(tmp_path: Path, images: Path) -> None:
    torch.manual_seed(0)
    model = ResNet(18).eval()
    flipped = ResNet(18).eval()
    flipped.load_state_dict(model.state_dict())
    with torch.no_grad():
        flipped.stem.conv1.weight.copy_(model.stem.conv1.weight.flip(1))
    mean, std = (10.0, 20.0, 30.0), (50.0, 60.0, 70.0)
    for name, net, order, stats in (("a", model, "RGB", (mean, std)), ("b", flipped, "BGR", (mean[::-1], std[::-1]))):
        manifest = describe(net, stem="imagenet", method="loco", channel_order=order, pixel_mean=stats[0],
                            pixel_std=stats[1])  # fmt: skip
        save_backbone(tmp_path / f"{name}.safetensors", backbone_tensors(net), manifest)
    data = open_probe_data(str(images))
    features = [
        Extractor(load_backbone_for_probe(str(tmp_path / f"{name}.safetensors")), 32, torch.device("cpu"), batch=8,
                  workers=0, cache=None)(data.test, ["res3"], "test")["res3"]
        for name in "ab"
    ]  # fmt: skip
    torch.testing.assert_close(*features)


# --- backbones ----------------------------------------------------------------------------------------------------


def test_a_foreign_checkpoint_and_its_pixels(tmp_path: Path, images: Path) -> None:
    """MSRA-like weights of an unknown source need their pixels stated, and the stride is then honoured."""
    torch.manual_seed(0)
    model = ResNet(50, stride_in_1x1=True)
    torch.save({"net." + k: v for k, v in backbone_tensors(model).items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="--channel-order"):
        load_backbone_for_probe(str(tmp_path / "x.pth"), branch="net.")
    stated = Stated("BGR", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0), stride_in_1x1=True)
    found = load_backbone_for_probe(str(tmp_path / "x.pth"), branch="net.", stated=stated)
    x = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(found.model(x)["res5"], model.eval()(x)["res5"])
    assert (found.order, found.mean) == ("BGR", (1.0, 2.0, 3.0))


def test_a_foreign_checkpoint_with_the_configuration_it_was_trained_with(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"net." + k: v for k, v in backbone_tensors(ResNet(18)).items()}, tmp_path / "x.pth")
    keys = {"PIXEL_MEAN": [1.0, 2.0, 3.0], "PIXEL_STD": [1.0, 1.0, 1.0], "RESNETS": {"STRIDE_IN_1X1": False}}
    (tmp_path / "config.yaml").write_text(json.dumps({"INPUT": {"FORMAT": "BGR"}, "MODEL": keys}))
    argv = ["probe", tmp_path / "x.pth", "--branch", "net.", "--data", images, "--protocol", "knn", "--image-size", 32]
    argv = [str(text) for text in (*argv, "--workers", 0, "--no-cache")]
    assert main(argv) == 2
    assert "--d2-config" in capsys.readouterr().err
    out = tmp_path / "out.json"
    assert main([*argv, "--d2-config", str(tmp_path / "config.yaml"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["stages"]["res5"]["top1"] >= 0
    stated = Stated.from_d2_config(tmp_path / "config.yaml")
    found = load_backbone_for_probe(argv[1], branch="net.", stated=stated)
    assert (found.order, tuple(found.mean)) == ("BGR", (1.0, 2.0, 3.0))


@pytest.mark.parametrize("name", ["random:resnet18-cifar", "random:resnet18"])
def test_random_backbones_measure_batchnorm(name: str, images: Path) -> None:
    data = open_probe_data(str(images))
    one, two = (load_backbone_for_probe(name, seed=3) for _ in range(2))
    assert one.weights_hash() == two.weights_hash() != load_backbone_for_probe(name, seed=4).weights_hash()
    extractor = Extractor(one, 32, torch.device("cpu"), batch=64, workers=0, cache=None)
    extractor.measure(data.train, 0)
    features = extractor(data.train, ["stem", "res2"], "train")
    # With one batch the statistics are those of the batch, so each channel before the ReLU has mean 0, deviation 1.
    norm = one.model.stem.conv1.norm
    seen = torch.cat([x for x, _ in extractor.batches(data.train, "again")])
    with torch.no_grad():
        before = norm(nn.functional.conv2d(seen, one.model.stem.conv1.weight, stride=one.model.stem.conv1.stride,
                                           padding=one.model.stem.conv1.padding))  # fmt: skip
    torch.testing.assert_close(before.mean((0, 2, 3)), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(before.std((0, 2, 3)), torch.ones(64), atol=1e-2, rtol=0)
    assert not one.model.training
    assert features["res2"].shape == (36, 64)


def test_timm_models(images: Path, tmp_path: Path) -> None:
    found = probe("random:timm:resnet18", images, tmp_path / "p.json", "--protocol", "ridge", "--image-size", 32)
    assert list(found["stages"]) == ["stem", "res2", "res3", "res4", "res5"]
    model = load_backbone_for_probe("random:timm:resnet18")
    assert model.image_size == 224
    assert model.mean == pytest.approx((123.675, 116.28, 103.53))
    vit = load_backbone_for_probe("random:timm:vit_tiny_patch16_224", image_size=32)
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        outputs = vit.model(x)
    assert {name: tuple(m.shape) for name, m in outputs.items()} == dict.fromkeys(vit.channels, (1, 192, 2, 2))
    assert all(name.startswith("blocks.") for name in vit.channels)


def test_timm_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*_: object, **__: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot be fetched.*random:timm:resnet18"):
        load_backbone_for_probe("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:resnet51", "resnet50"),
        ("random:timm:resnet18x", "no model"),
        ("hub:resnet50", "kind 'hub'"),
        ("nothing.pth", "nothing.pth"),
        ("resnet50", "resnet50"),
    ],
)
def test_backbones_that_are_not(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone_for_probe(name)


# --- layouts ------------------------------------------------------------------------------------------------------


def zipped(folder: Path, path: Path, prefix: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"{prefix}{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("prefix", ["", "cifar10/", "a/b/"])
def test_a_zip_of_splits_equals_the_folders(prefix: str, images: Path, tmp_path: Path) -> None:
    path = zipped(images, tmp_path / "images.zip", prefix)
    one, two = open_probe_data(str(images)), open_probe_data(str(path))
    for half in ("train", "test"):
        a, b = getattr(one, half), getattr(two, half)
        assert (a.labels == b.labels).all()
        assert a.names() == b.names()
        assert a.source.read(3) == b.source.read(3)
    assert f"{prefix}val" in two.split


def test_class_folders_alone_are_split_by_a_rule(tmp_path: Path) -> None:
    write_images(tmp_path / "x", 10)
    data = open_probe_data(str(tmp_path / "x"), seed=2)
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert np.bincount(data.train.labels).tolist() == [8, 8, 8]
    assert not set(data.train.names()) & set(data.test.names())
    assert "seed 2" in data.split
    moved = open_probe_data(str(zipped(tmp_path / "x", tmp_path / "x.zip", "")), seed=2)
    assert moved.test.names() == data.test.names()
    assert open_probe_data(str(tmp_path / "x"), seed=3).test.names() != data.test.names()


def test_val_given_apart_may_lack_a_class(tmp_path: Path) -> None:
    write_images(tmp_path / "x", 4)
    write_images(tmp_path / "y", 3, classes=("green", "red"))
    data = open_probe_data(str(tmp_path / "x"), str(tmp_path / "y"))
    assert data.classes == ["blue", "green", "red"]
    assert data.test.labels.tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(UserError, match="'blue' is not among"):
        open_probe_data(str(tmp_path / "y"), str(tmp_path / "x"))


def test_limit_keeps_the_shares_of_the_classes(images: Path) -> None:
    data = open_probe_data(str(images), limit=6)
    assert np.bincount(data.train.labels).tolist() == [2, 2, 2]
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert set(data.train.names()) < set(open_probe_data(str(images), limit=12).train.names())


def python2_pickle(value: object) -> bytes:
    """As Python 2 pickled CIFAR: byte strings are plain strings."""

    class Pickler(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

        def save_bytes(self, text: bytes) -> None:
            self.write(pickle.BINSTRING + len(text).to_bytes(4, "little") + text)
            self.memoize(text)

        dispatch[bytes] = save_bytes

    import io

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def write_cifar(root: Path, kind: str) -> tuple[np.ndarray, list[int]]:
    """One of CIFAR's four layouts, with 4 images a file; returns what the test file holds."""
    rng = np.random.default_rng(0)
    folder, ten = root / kind, kind.startswith("cifar-10-")
    folder.mkdir()
    suffix = ".bin" if (ten and kind.endswith("bin")) or kind.endswith("binary") else ""
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for name in files:
        pixels, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), [1, 0, 1, 0]
        if suffix:
            before = np.array(labels, np.uint8)[:, None]
            rows = np.hstack([before, pixels] if ten else [before + 7, before, pixels])
            (folder / (name + suffix)).write_bytes(rows.tobytes())
        else:
            content = {b"data": pixels, b"labels" if ten else b"fine_labels": labels, b"filenames": [b"x.png"] * 4}
            (folder / name).write_bytes(python2_pickle(content))
    names = ["cat", "dog"]
    if suffix:
        (folder / ("batches.meta.txt" if ten else "fine_label_names.txt")).write_text("\n".join(names) + "\n")
    else:
        key = b"label_names" if ten else b"fine_label_names"
        meta = python2_pickle({key: [name.encode() for name in names]})
        (folder / ("batches.meta" if ten else "meta")).write_bytes(meta)
    return pixels, labels


CIFAR = ["cifar-10-batches-py", "cifar-100-python", "cifar-10-batches-bin", "cifar-100-binary"]


@pytest.mark.parametrize("kind", CIFAR)
def test_cifar_as_downloaded(kind: str, tmp_path: Path, artifact: Path) -> None:
    pixels, labels = write_cifar(tmp_path, kind)
    data = open_probe_data(str(tmp_path / kind))
    assert data.classes == ["cat", "dog"]
    assert len(data.train) == (20 if "10-" in kind else 4)
    assert data.test.labels.tolist() == labels
    images = [cv2.imdecode(np.frombuffer(data.test.source.read(i), np.uint8), cv2.IMREAD_COLOR) for i in range(4)]
    expected = pixels.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)[..., ::-1]
    assert (np.stack(images) == expected).all()
    out = tmp_path / "p.json"
    probe(artifact, tmp_path / kind, out, "--protocol", "ridge", "--stages", "stem", "--cache", tmp_path / "c")


@pytest.mark.parametrize("kind", CIFAR)
def test_damaged_cifar_is_refused(kind: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, kind)
    file = next(f for f in (tmp_path / kind).iterdir() if f.name.startswith("test"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=file.name):
        open_probe_data(str(tmp_path / kind))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name}.* copy of the data set"):
        open_probe_data(str(tmp_path / kind))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--protocol", "knn", "--epochs", "3"), "--epochs belongs to --protocol linear and semi"),
        (("--protocol", "ridge", "--k", "3"), "--k belongs to --protocol knn"),
        (("--protocol", "knn", "--k", "0"), "--k is 0"),
        (("--protocol", "linear", "--rates", "-1"), "--rates has -1"),
        (("--protocol", "semi", "--labels", "0"), "--labels has 0"),
        (("--protocol", "semi", "--rates", "0.1", "0.2"), "single learning rate"),
        (("--protocol", "knn", "--stages", "res6"), "--stages 'res6'"),
        (("--protocol", "knn", "--image-size", "0"), "--image-size is 0"),
        (("--protocol", "knn", "--limit", "-3"), "--limit is -3"),
        (("--protocol", "knn", "--seed", "-1"), "--seed is -1"),
        (("--protocol", "knn", "--workers", "-1"), "--workers is -1"),
        (("--protocol", "knn", "--temperature", "nan"), "--temperature is nan"),
        (("--protocol", "knn", "--device", "tpu"), "tpu"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], message: str, artifact: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["probe", str(artifact), "--data", str(images), "--workers", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_bad_images(tmp_path: Path, artifact: Path, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "one", 3, classes=("red",))
    with pytest.raises(UserError, match="only the class 'red'"):
        open_probe_data(str(tmp_path / "one"))
    with pytest.raises(UserError, match="single image"):
        open_probe_data(str(write_images(tmp_path / "few", 1)))
    flat = tmp_path / "flat"
    flat.mkdir()
    (tmp_path / "one" / "red" / "0.png").rename(flat / "0.png")
    with pytest.raises(UserError, match="no classes"):
        open_probe_data(str(flat))
    with pytest.raises(UserError, match=r"--data .*nothing"):
        open_probe_data(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"--val .*nothing"):
        open_probe_data(str(tmp_path / "few"), str(tmp_path / "nothing"))
    (flat / "notes.md").write_text("")
    with pytest.raises(UserError, match=r"--data .*notes.md: is no .zip") as info:
        open_probe_data(str(flat / "notes.md"))
    assert "DATA.FORMAT" not in str(info.value)
    write_images(tmp_path / "splits" / "train", 3)
    write_images(tmp_path / "splits" / "val", 3)
    with pytest.raises(UserError, match=r"--data .*splits: holds train and val"):  # not two classes of these names
        open_probe_data(str(tmp_path / "splits"), str(tmp_path / "splits"))
    for file in (tmp_path / "splits" / "train" / "red").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="train: class folder red holds no images"):
        open_probe_data(str(tmp_path / "splits"))
    broken = write_images(tmp_path / "broken", 5)
    (broken / "red" / "1.png").write_bytes(b"\x89PNG")
    for protocol in (("knn",), ("semi", "--labels", "100")):
        argv = ["probe", str(artifact), "--data", str(broken), "--workers", "0", "--no-cache", "--protocol", *protocol]
        assert main(argv) == 2
        assert "1.png" in capsys.readouterr().err


def test_results_that_cannot_be_kept_are_refused_before_the_work(
    artifact: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "p.json", tmp_path):
        argv = ["probe", artifact, "--data", images, "--protocol", "knn", "--no-cache", "--json", out]
        assert main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert f"{out}: cannot be written" in err
        assert "features" not in err


def test_a_cache_that_cannot_be_written_costs_no_result(
    artifact: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    options = ("--protocol", "knn", "--stages", "stem")
    found = probe(artifact, images, tmp_path / "p.json", *options, "--cache", tmp_path / "file")
    assert "these features are not cached" in capsys.readouterr().err
    assert found["stages"] == probe(artifact, images, tmp_path / "q.json", *options)["stages"]


def test_no_more_neighbours_than_there_are(artifact: Path, images: Path, tmp_path: Path) -> None:
    found = probe(artifact, images, tmp_path / "p.json", "--protocol", "knn", "--k", 1000, "--stages", "stem")
    assert found["stages"]["stem"]["k"] == 36


def test_fine_tuning_that_ends_in_nothing_is_no_result(artifact: Path, images: Path) -> None:
    backbone = load_backbone_for_probe(str(artifact))
    extractor = Extractor(backbone, SIDE, torch.device("cpu"), batch=9, workers=0, cache=None)
    diverged = lambda x: torch.full((len(x), 3), torch.nan)  # noqa: E731 (as after a last step that was too long)
    with pytest.raises(UserError, match="not finite; lower --rates"):
        predict(diverged, extractor, open_probe_data(str(images)).test)


def test_fine_tuning_of_damaged_weights_does_not_blame_the_rate(artifact: Path, images: Path) -> None:
    backbone = load_backbone_for_probe(str(artifact))
    with torch.no_grad():
        next(backbone.model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"backbone.safetensors is nan at step 0; take sound weights"):
        finetune(backbone, "res5", open_probe_data(str(images)).train, 3, SIDE, FineTuning(), torch.device("cpu"))


def test_the_list_of_the_pretraining_formats_works_too(tmp_path: Path) -> None:
    write_images(tmp_path / "x", 5)
    files = sorted((tmp_path / "x").rglob("*.png"))
    (tmp_path / "list.txt").write_text("".join(f"{f.relative_to(tmp_path)}\t{f.parent.name}\n" for f in files))
    data = open_probe_data(str(tmp_path / "list.txt"))
    assert data.test.names() == open_probe_data(str(tmp_path / "x")).test.names()
    assert len(open_source(tmp_path / "list.txt")) == 15


def test_ridge_on_features_tells_the_colours_apart(artifact: Path, images: Path) -> None:
    data = open_probe_data(str(images))
    extractor = Extractor(
        load_backbone_for_probe(str(artifact)), SIDE, torch.device("cpu"), batch=9, workers=0, cache=None
    )
    train, test = (extractor(half, ["res2"], "x")["res2"] for half in (data.train, data.test))
    fitted = fit_ridge(train, torch.from_numpy(data.train.labels), 3)
    assert (fitted(test).argmax(1).numpy() == data.test.labels).all()
