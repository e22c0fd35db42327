"""Stock Detectron2 loads what is exported, every backbone tensor of it, and computes the same features."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torchvision
from convert_cases import caffe2_name, detectron_pkl, randomised

from loco_det.backbones.names import to_torchvision
from loco_det.backbones.resnet import ResNet
from loco_det.convert import Stated, convert, read_backbone_tensors, read_checkpoint
from loco_det.convert.name_patterns import NAMINGS

pytest.importorskip("detectron2")
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("d2")
    torch.save(randomised(torchvision.models.resnet50()).state_dict(), folder / "r50.pth")
    convert(folder / "r50.pth", folder / "r50.pkl")
    return folder


def detector(name: str, fragment: Path) -> torch.nn.Module:
    """A stock Mask R-CNN from Detectron2's own YAML and our fragment, with our weights in it."""
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/mask_rcnn_R_50_{name}_1x.yaml")
    cfg.merge_from_file(str(fragment))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def ours(folder: Path) -> ResNet:
    model = ResNet(50, norm="FrozenBN").eval()
    model.load_state_dict(read_backbone_tensors(folder / "r50.pkl")[0])
    return model


def assert_all_loaded(model: torch.nn.Module, tensors: dict, place: dict[str, str]) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        stage = name.split(".")[0]
        assert torch.equal(state[place.get(stage, place[""]) + name], tensor), name


def assert_same_features(found: dict, expected: dict) -> None:
    assert found
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


def test_fpn(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = detector("FPN", folder / "r50.yaml")
    assert "shape of" not in caplog.text.lower()
    tensors, _ = read_backbone_tensors(folder / "r50.pkl")
    assert_all_loaded(model, tensors, {"": "backbone.bottom_up."})
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    x = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same_features(model.backbone.bottom_up(x), ours(folder)(x))


def test_c4(folder: Path) -> None:
    model = detector("C4", folder / "r50.yaml")
    tensors, _ = read_backbone_tensors(folder / "r50.pkl")
    assert_all_loaded(model, tensors, {"": "backbone.", "res5": "roi_heads."})
    x = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(folder)(x)
        found = model.backbone(x)
        found["res5"] = model.roi_heads.res5(found["res4"])
    assert_same_features(found, expected)


@pytest.mark.parametrize("name", ["FPN", "C4"])
def test_a_checkpoint_that_detectron2_saved_comes_back(folder: Path, tmp_path: Path, name: str) -> None:
    from detectron2.checkpoint import DetectionCheckpointer

    model = detector(name, folder / "r50.yaml")
    DetectionCheckpointer(model, str(tmp_path)).save("model_final", iteration=5)
    loaded = read_checkpoint(tmp_path / "model_final.pth")
    assert loaded["iteration"] == 5
    assert loaded["model"].keys() == model.state_dict().keys()
    tensors, manifest = read_backbone_tensors(tmp_path / "model_final.pth")
    assert manifest is None
    expected, _ = read_backbone_tensors(folder / "r50.pkl")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_msra_stride(folder: Path, tmp_path: Path) -> None:
    tensors, _ = read_backbone_tensors(folder / "r50.pkl")
    torch.save(tensors, tmp_path / "msra.pth")
    stated = Stated("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)
    convert(tmp_path / "msra.pth", tmp_path / "msra.pkl", stated=stated)
    model = detector("FPN", tmp_path / "msra.yaml")
    mine = ResNet(50, norm="FrozenBN", stride_in_1x1=True).eval()
    mine.load_state_dict(read_backbone_tensors(tmp_path / "msra.pkl")[0])
    x = torch.randn(1, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same_features(model.backbone.bottom_up(x), mine(x))


def test_an_msra_file_is_read_as_detectron2_reads_it(tmp_path: Path) -> None:
    """R-50.pkl as Python 2 wrote it: Detectron2's own conversion of Caffe2's names and ours, tensor by tensor."""
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    plain = {n: t for n, t in randomised(torchvision.models.resnet50()).state_dict().items() if "num_batches" not in n}
    blobs = {caffe2_name(n): t for n, t in plain.items() if not n.startswith("fc.") and "running" not in n}
    blobs |= {"conv1_b": torch.zeros(64), "fc1000_w": torch.ones(1000, 2048), "fc1000_b": torch.ones(1000)}
    (tmp_path / "R-50.pkl").write_bytes(detectron_pkl(blobs))
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    convert(tmp_path / "R-50.pkl", tmp_path / "ours.pkl")
    tensors, manifest = read_backbone_tensors(tmp_path / "ours.pkl")
    assert_all_loaded(model, tensors, {"": "backbone.bottom_up."})
    assert (manifest.stride_in_1x1, manifest.channel_order) == (cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.INPUT.FORMAT)
    assert list(manifest.pixel_mean) == pytest.approx(cfg.MODEL.PIXEL_MEAN)
    assert list(manifest.pixel_std) == cfg.MODEL.PIXEL_STD


def test_weights_that_contradict_the_configuration_are_refused_on_this_engine_too(folder: Path) -> None:
    from loco_det.core.config import load_config
    from loco_det.core.errors import UserError
    from loco_det.detection.engine_d2 import Detectron2Engine
    from loco_det.detection.keys import get_cfg
    from loco_det.detection.weights import load_weights

    given = ["MODEL.WEIGHTS", str(folder / "r50.pkl"), "MODEL.DEVICE", "cpu", "INPUT.FORMAT", "BGR"]
    cfg = load_config(get_cfg(), "configs/coco_loco_r50.yaml", given)[0]
    model = Detectron2Engine().build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r'INPUT\.FORMAT "RGB" and the configuration has "BGR"'):
        load_weights(model, cfg)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["coco_loco_r50", "coco_loco_r50_c4", "coco_loco_r50_faster"])
def test_a_detector_goes_to_the_other_engine_and_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Detectron2's checkpoint -> our detector -> a checkpoint -> a fresh detector of Detectron2's."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg as stock_cfg
    from detectron2.modeling import build_model as stock_model

    from loco_det.core.config import load_config
    from loco_det.detection.keys import get_cfg
    from loco_det.detection.rcnn import build_model
    from loco_det.detection.weights import load_weights

    cfg = stock_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    theirs = randomised(stock_model(cfg))
    DetectionCheckpointer(theirs, str(tmp_path)).save("theirs")
    given = ["MODEL.WEIGHTS", str(tmp_path / "theirs.pth"), "MODEL.DEVICE", "cpu"]
    settings = load_config(get_cfg(), f"configs/{name}.yaml", given)[0]
    ours = randomised(build_model(settings), seed=1)
    load_weights(ours, settings)
    torch.save({"model": ours.state_dict()}, tmp_path / "ours.pth")
    back = randomised(stock_model(cfg), seed=2)
    DetectionCheckpointer(back).load(str(tmp_path / "ours.pth"))
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_caffe2_names_are_those_that_detectron2_reads() -> None:
    from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

    with torch.device("meta"):
        names = [to_torchvision(name) for name in ResNet(50, norm="FrozenBN").state_dict()]
    blobs = [caffe2_name(name) for name in names]
    assert [to_torchvision(name) for name in convert_basic_c2_names(blobs)] == names
    assert [NAMINGS["caffe2"][2](blob) for blob in blobs] == names
