"""Models of transformers as backbones: the maps are transformers' own, from a folder alone; nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_detection import TINY_HEADS, overrides
from torch import nn

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

import loco_det  # noqa: E402
from loco_det.backbones.hf_models import HfBackbone  # noqa: E402
from loco_det.cli import main  # noqa: E402
from loco_det.core.config import load_config  # noqa: E402
from loco_det.core.errors import UserError  # noqa: E402
from loco_det.detection.keys import get_cfg  # noqa: E402
from loco_det.detection.rcnn import build_model  # noqa: E402

VIT, FPN = "configs/base_rcnn_vit.yaml", "configs/base_rcnn_fpn.yaml"
PIXELS = {"image_mean": [0.5, 0.25, 0.125], "image_std": [0.2, 0.1, 0.4]}
MEAN, STD = [127.5, 63.75, 31.875], [51.0, 25.5, 102.0]
PLAIN = {"hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", {**PLAIN, "image_size": 56, "patch_size": 14}),
    "vitdet": ("VitDet", {**PLAIN, "image_size": 64, "pretrain_image_size": 64, "window_block_indices": [0]}),
    "swin": ("Swin", {"image_size": 64, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2]}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}),
}  # fmt: skip
IS_PLAIN = ("dinov2", "vitdet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Small members with random weights, saved as a classifier's or a model's repository is; the hub is unreachable."""
    root, found = tmp_path_factory.mktemp("hf"), {}
    transformers.utils.logging.set_verbosity_error()
    for kind, (name, options) in KINDS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**options)
        whole = "Model" if kind == "vitdet" else "ForImageClassification"
        model = getattr(transformers, name + whole)(config)
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "running" in n)]:
            tensor.data += 0.1 * torch.rand_like(tensor)
        found[kind] = root / kind
        model.save_pretrained(found[kind])
        side = {"height": 64, "width": 64}
        (found[kind] / "preprocessor_config.json").write_text(json.dumps({**PIXELS, "do_rescale": True, "size": side}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield found


def reference(folder: Path, kind: str) -> tuple[nn.Module, list[str]]:
    """transformers' own backbone class on that folder, and the names of its maps."""
    name = KINDS[kind][0]
    features = [f"stage{i}" for i in ((2, 4, 6, 8) if kind in IS_PLAIN else (1, 2, 3, 4))]
    network = getattr(transformers, f"{name}Backbone")
    return network.from_pretrained(folder, out_features=features, local_files_only=True).eval(), features


@pytest.mark.parametrize("kind", list(KINDS))
def test_maps_are_transformers_own(kind: str, folders: dict[str, Path]) -> None:
    ours = HfBackbone(str(folders[kind])).eval()
    theirs, names = reference(folders[kind], kind)
    x = torch.randn(2, 3, 112, 224) if kind == "dinov2" else torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        found, expected = ours(x), theirs(pixel_values=x).feature_maps
    assert list(found) == (names if kind in IS_PLAIN else ["res2", "res3", "res4", "res5"])
    for (name, map_), other in zip(found.items(), expected):
        assert torch.equal(map_, other)
        assert map_.shape[1] == ours.channels[name]
        assert [side / ours.strides[name] for side in x.shape[2:]] == list(map_.shape[2:])
    assert (ours.order, list(ours.pixel_mean), list(ours.pixel_std)) == ("RGB", pytest.approx(MEAN), pytest.approx(STD))
    assert ours.image_size == 64
    unused = {"dinov2": {"classifier.weight", "classifier.bias"}, "vitdet": set()}
    assert set(ours.dropped) >= unused.get(kind, {"classifier.weight" if kind != "resnet" else "classifier.1.weight"})


def test_a_patch_of_14_gives_stride_16_by_resizing_the_image(folders: dict[str, Path]) -> None:
    ours, own = (HfBackbone(str(folders["dinov2"]), map_stride=stride).eval() for stride in (16, None))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = ours(x)
        expected = own(F.interpolate(x, size=(56, 84), mode="bilinear", align_corners=False, antialias=True))
    assert set(ours.strides.values()) == {16}
    assert set(own.strides.values()) == {14}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert next(iter(found.values())).shape[2:] == (4, 6)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("stages", [0, 1, 3, 5])
def test_stages_are_frozen_in_their_order(kind: str, stages: int, folders: dict[str, Path]) -> None:
    """Embeddings are frozen from 1 on, the blocks of stage N from N + 1 on; the others are trained."""
    ours = HfBackbone(str(folders[kind])).train()
    ours.freeze(stages)
    x = torch.randn(2, 3, 64, 64) if kind != "dinov2" else torch.randn(2, 3, 56, 56)
    maps = list(ours(x).values())
    frozen = {n for n, p in ours.named_parameters() if not p.requires_grad}
    everything = dict(ours.named_parameters())
    assert (not frozen, frozen == set(everything)) == (stages == 0, stages >= 5)
    assert [map_.requires_grad for map_ in maps] == [stages < 5] * 4 or 0 < stages < 5
    if stages < 5:
        sum(map_.sum() for map_ in maps).backward()
    graded = {n for n, p in everything.items() if p.grad is not None}
    for number in range(1, 5):
        last = 2 * number - 1 if kind in IS_PLAIN else number - 1
        blocks = {n for n in everything if f"{_list_of(kind)}.{last}." in n}
        assert blocks
        assert (blocks <= frozen) == (number < stages)
        assert (blocks <= graded) == (number >= stages)
    embeddings = {n for n in everything if ".embedd" in n}
    assert (embeddings <= frozen) == (stages > 0)


def _list_of(kind: str) -> str:
    return {"swin": "encoder.layers", "convnext": "encoder.stages", "resnet": "encoder.stages"}.get(kind, "layer")


def small(name: str, base: str, **changes: object):
    keys = {
        "MODEL__BACKBONE__NAME": name,
        "MODEL__BACKBONE__FREEZE_AT": 5,
        "MODEL__PIXEL_MEAN": MEAN,
        "MODEL__PIXEL_STD": STD,
        "MODEL__ROI_BOX_HEAD__CONV_DIM": 16,
        "MODEL__MASK_ON": False,
    }
    return load_config(get_cfg(), base, overrides(**{**keys, **changes}))[0]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_detector_reads_them(kind: str, folders: dict[str, Path]) -> None:
    cfg = small(f"hf:{folders[kind]}", VIT if kind in IS_PLAIN else FPN)
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        x, _ = model.preprocess([{"image": image}])
        trunk = model.backbone.net if kind in IS_PLAIN else model.backbone.bottom_up
        maps = trunk(x)
        theirs, names = reference(folders[kind], kind)
        seen = F.interpolate(x, scale_factor=14 / 16, mode="bilinear", antialias=True) if kind == "dinov2" else x
        expected = dict(zip(names, theirs(pixel_values=seen).feature_maps))
    wanted = names[-1:] if kind in IS_PLAIN else names
    for map_, name in zip(maps.values(), wanted):
        torch.testing.assert_close(map_, expected[name], rtol=1e-4, atol=1e-5)
    assert len(maps) == len(wanted)
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert model.detect([{"image": image}])[0].boxes.shape[1] == 4


def test_chosen_maps_of_a_plain_one(folders: dict[str, Path]) -> None:
    model = build_model(small(f"hf:{folders['vitdet']}", VIT, MODEL__FPN__IN_FEATURES=["stage3", "stage8"]))
    assert list(model.backbone.net.channels) == ["stage3", "stage8"]
    with pytest.raises(UserError, match="has no map 'stage9'; use stage1 to stage8"):
        build_model(small(f"hf:{folders['vitdet']}", VIT, MODEL__FPN__IN_FEATURES=["stage9"]))


def test_from_python_and_by_command(folders: dict[str, Path], tiny_data: Path, tmp_path: Path, capsys) -> None:
    """load_backbone, probe, evaluate_detection, convert, then the same detector by train."""
    backbone = loco_det.load_backbone(f"hf:{folders['dinov2']}")
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    theirs, _ = reference(folders["dinov2"], "dinov2")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        expected = theirs(pixel_values=(pixels.float() - mean) / std).feature_maps
    found = backbone.features(pixels)
    torch.testing.assert_close(found["stage8"], expected[-1], rtol=1e-4, atol=1e-5)
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{i}.png")
    rows = loco_det.probe(backbone, tmp_path / "images", protocol="knn", workers=0, no_cache=True, k=2).rows
    assert list(rows) == ["stage2", "stage4", "stage6", "stage8"]
    options = {"train": "tiny_train", "test": "tiny_val", "iterations": 1, "device": "cpu", "settings": TINY_HEADS}
    run = loco_det.evaluate_detection(backbone, protocol="finetune", output=tmp_path / "run", **options)
    assert "bbox" in run.rows
    keys = tmp_path / "keys.yaml"
    assert main(["convert", f"hf:{folders['dinov2']}", str(keys), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["stages"]["stage8"] == {"channels": 24, "stride": 14}
    written = load_config(get_cfg(), str(keys), [])[0]
    assert written.MODEL.BACKBONE.NAME == facts["architecture"] == f"hf:{folders['dinov2']}"
    assert list(written.MODEL.PIXEL_STD) == pytest.approx(STD)
    (tmp_path / "detector.yaml").write_text(f'_BASE_: ["configs/base_rcnn_vit.yaml", "{keys}"]\n')
    given = [
        *overrides(SOLVER__MAX_ITER=1, SOLVER__STEPS=(), OUTPUT_DIR=tmp_path / "out"),
        "MODEL.ROI_BOX_HEAD.CONV_DIM",
        "16",
    ]
    argv = ["train", "--engine", "torchvision", "--config-file", str(tmp_path / "detector.yaml"), *given]
    assert main(argv) == 0
    assert (tmp_path / "out" / "model_final.pth").is_file()


# --- refusals ---------------------------------------------------------------------------------------------------


def changed(folder: Path, to: Path, **settings: object) -> Path:
    """A copy of a folder whose config.json has other values; None removes a key."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text()) | settings
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


def refused(source: object, said: str, **options: object) -> None:
    with pytest.raises(UserError, match=said) as error:
        HfBackbone(str(source), **options)
    assert "\n" not in str(error.value)


def test_code_in_a_folder_is_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(
        folders["dinov2"],
        tmp_path / "evil",
        model_type="mine",
        auto_map={"AutoConfig": "evil.Config", "AutoBackbone": "evil.Backbone"},
    )
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\nclass Backbone: pass\n"
    )
    refused(folder, "transformers cannot load it")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_runs_code_is_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["convnext"], tmp_path / "pickled")
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"convnext.embeddings.layernorm.weight": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "transformers cannot load it")
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such folder; give the folder")
    refused("", "no such folder")
    refused("someone/of-the-hub", "transformers cannot load it .*or its name on the hub")
    bert = changed(folders["dinov2"], tmp_path / "bert", model_type="bert")
    refused(bert, r"transformers has no AutoBackbone of a bert; give a model that has one, e\.g\. of dinov2")
    timms = changed(folders["dinov2"], tmp_path / "timm", model_type="timm_backbone")
    refused(timms, "no AutoBackbone of a timm_backbone; .*timm:NAME")
    deeper = changed(folders["dinov2"], tmp_path / "deeper", num_hidden_layers=9)
    refused(deeper, r"has no tensor .*layer\.8\..* in all\)")
    shallower = changed(
        folders["dinov2"], tmp_path / "shallower", num_hidden_layers=7, out_features=None, out_indices=None
    )
    refused(shallower, r"has no place for tensor .*layer\.7\.")
    wider = changed(folders["dinov2"], tmp_path / "wider", hidden_size=32)
    refused(wider, "has another shape of|cannot load it")
    grey = changed(folders["dinov2"], tmp_path / "grey")
    (grey / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    refused(grey, r"states no image_mean and image_std of three numbers")
    (grey / "preprocessor_config.json").unlink()
    refused(grey, r"has no preprocessor_config\.json, which states the pixels; write one")


def test_layer_scale_cannot_be_lost(folders: dict[str, Path], tmp_path: Path) -> None:
    """A gamma that the configuration's network lacks is refused by name (dinov2#65)."""
    from safetensors.torch import load_file, save_file

    folder = changed(folders["vitdet"], tmp_path / "scaled")
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if "layer.0." in key).split("layer.0.")[0] + "layer.0.layer_scale1.lambda1"
    save_file({**tensors, name: torch.ones(24)}, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, rf"has no place for tensor {name} \(1 in all\)")


def test_a_final_norm_that_is_missing_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = changed(folders["dinov2"], tmp_path / "headless")
    tensors = {k: t for k, t in load_file(folder / "model.safetensors").items() if k != "dinov2.layernorm.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"has no tensor .*layernorm\.weight \(1 in all\)")


def test_wrong_pixels_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"was made with MODEL\.PIXEL_MEAN \[127\.5, 63\.75, 31\.\d+\] and the config"):
        build_model(small(f"hf:{folders['convnext']}", FPN, MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53]))
    build_model(small(f"hf:{folders['convnext']}", FPN, MODEL__PIXEL_MEAN=[127.5, 63.75, 31.88]))  # rounded
    with pytest.raises(
        UserError, match=r"INPUT\.FORMAT \"RGB\" and the configuration has \"BGR\"; add INPUT\.FORMAT RGB$"
    ):
        build_model(small(f"hf:{folders['convnext']}", FPN, INPUT__FORMAT="BGR"))


def test_without_the_package_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(tmp_path, r"needs transformers \(.*\); pip install 'loco_det\[hf\]'")


def test_keys_go_to_a_yaml(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = f"hf:{folders['swin']}"
    (tmp_path / "mine.yaml").write_text("SOLVER: {MAX_ITER: 6}\n")
    for argv, said in (
        ([name, str(tmp_path / "out.safetensors")], "stay where they are; give the name of a .yaml"),
        ([name, str(tmp_path / "mine.yaml")], "is in the way of the YAML keys"),
        ([name, str(tmp_path / "out.yaml"), "--branch", "x"], "leave --branch out"),
    ):
        assert main(["convert", *argv]) == 2
        assert said in capsys.readouterr().err
    for _ in range(2):  # its own YAML may be replaced
        assert main(["convert", name, str(tmp_path / "out.yaml")]) == 0
    assert "res2 (stride 4), res3 (stride 8)" in capsys.readouterr().out
    assert "prove" not in (tmp_path / "out.yaml").read_text()
