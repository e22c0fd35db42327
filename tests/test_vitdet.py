"""ViTDet: its recipe at toy size, and its own models and checkpoints with the numbers of Detectron2."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
import vitdet_cases as cases
from detection_cases import detectron2_batch, our_batch
from fvcore.common.config import CfgNode
from record_stock_configs import form
from tiny_detection import TINY

from loco_det.convert.timm_models import convert_timm
from loco_det.core.errors import UserError
from loco_det.detection import solver
from loco_det.detection.foreign_weights import with_own_weights
from loco_det.detection.keys import check_supported, load_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.train import train_net
from loco_det.detection.weights import load_weights

CONFIG = "configs/coco_vitdet_b.yaml"
WINDOWED = "timm:test_vit?drop_path_rate=0.2&window=3&rel_pos=6"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "vitdet.json").read_text())


def configured(**changes: object) -> CfgNode:
    return load_cfg(CONFIG, cases.overrides(**changes))[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as Detectron2 publishes them: arrays under its names, pickled."""
    path = tmp_path_factory.mktemp("vitdet") / "model_final.pkl"
    state = cases.fill(cases.of_vitdet(build_model(configured()).state_dict()))
    content = {"model": {name: tensor.numpy() for name, tensor in state.items()}, "__author__": "Detectron2 Model Zoo"}
    path.write_bytes(pickle.dumps(content))
    return path


def test_the_configuration_is_detectron2s_model() -> None:
    """Every tensor of ViT-B's, by name and shape."""
    cfg = load_cfg(CONFIG)[0]
    with torch.device("meta"):
        model = build_model(cfg)
    assert form(torch.nn.ParameterDict()) != GOLDEN["vit_b"]
    state = cases.of_vitdet(model.state_dict())
    assert form(type("Named", (), {"state_dict": lambda self: state})()) == GOLDEN["vit_b"]
    check_supported(cfg)


def test_a_published_checkpoint_gives_detectron2s_maps_and_detections(checkpoint: Path) -> None:
    cfg = configured(MODEL__WEIGHTS=checkpoint)
    model = build_model(cfg).eval()
    load_weights(model, cfg)
    maps = cases.padded_maps(model.backbone)
    assert {level: list(x.shape) for level, x in maps.items()} == {k: v["shape"] for k, v in GOLDEN["maps"].items()}
    for level, expected in GOLDEN["maps"].items():
        sample = maps[level].flatten()[:: maps[level].numel() // 12]
        assert sample.tolist() == pytest.approx(expected["sample"], rel=1e-4, abs=1e-4), level
    with torch.no_grad():
        found = model(cases.batch())
    for one, expected in zip(found, GOLDEN["detections"], strict=True):
        assert one.classes[:8].tolist() == expected["classes"]
        assert one.scores[:8].tolist() == pytest.approx(expected["scores"], abs=1e-5)
        torch.testing.assert_close(one.boxes[:8], torch.tensor(expected["boxes"]), rtol=0, atol=1e-2)
        pixels = one.masks[:8].sum(dim=(1, 2)).tolist()
        assert pixels == pytest.approx(expected["mask_pixels"], rel=0.01, abs=2)


def test_the_square_matters_and_is_refused_where_it_does_not_fit(checkpoint: Path) -> None:
    cfg = configured(MODEL__WEIGHTS=checkpoint, MODEL__BACKBONE__SQUARE_PAD=96, INPUT__MAX_SIZE_TEST=96)
    model = build_model(cfg).eval()
    with pytest.raises(UserError, match=r"SQUARE_PAD is 96, and an image has 90 x 125 pixels after resizing"):
        model(cases.batch())
    assert build_model(configured()).preprocess(cases.batch()[1:])[0].shape[2:] == (cases.SQUARE, cases.SQUARE)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:test_vit", r"is of ViTDet and MODEL\.BACKBONE\.NAME is timm:test_vit; add window=14, and rel_pos=64"),
        ("timm:test_vit?window=4&rel_pos=8", r"add positions=size behind its \?"),
        (
            "timm:test_vit?window=4&positions=size",
            r"tensor backbone\.net\.model\.blocks\.0\.attn\.rel_pos_h has no place",
        ),
        (
            "timm:test_vit?window=7&rel_pos=8&global_blocks=2,5&positions=size",
            r"rel_pos_h is \(7, 32\) and .*\(13, 32\)",
        ),
        ("timm:test_vit?window=4&rel_pos=8&global_blocks=5&positions=size", r"rel_pos_h is \(15, 32\) and .*\(7, 32\)"),
    ],
)
def test_another_network_than_the_checkpoints_is_one_sentence(name: str, said: str, checkpoint: Path) -> None:
    cfg = configured(MODEL__WEIGHTS=checkpoint, MODEL__BACKBONE__NAME=name)
    with pytest.raises(UserError, match=said):
        load_weights(build_model(cfg), cfg)


def test_rates_and_decays_are_detectron2s() -> None:
    model = build_model(configured())
    optimizer = solver.build_optimizer(configured(), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    for name, expected in GOLDEN["groups"].items():
        assert cases.of_vitdet(found)[name] == pytest.approx(tuple(expected), rel=1e-12), name
    assert len(found) == len(GOLDEN["groups"])


# --- training -----------------------------------------------------------------------------------------------------


def toy(output: Path, weights: Path | str = "", **changes: object) -> CfgNode:
    """The recipe on 80 x 64 images, with AMP off."""
    small = {
        **{key.replace(".", "__"): value for key, value in TINY.items() if "RESNETS" not in key},
        "MODEL__BACKBONE__NAME": WINDOWED,
        "MODEL__BACKBONE__SQUARE_PAD": 96,
        "INPUT__SCALE_JITTER_SIZE": 96,
        "INPUT__MAX_SIZE_TEST": 96,
        "MODEL__PIXEL_MEAN": [127.5] * 3,
        "MODEL__PIXEL_STD": [127.5] * 3,
        "MODEL__WEIGHTS": weights,
        "SOLVER__BASE_LR": 0.001,
        "SOLVER__MAX_ITER": 4,
        "SOLVER__STEPS": (3,),
        "SOLVER__AMP__ENABLED": False,
        "OUTPUT_DIR": output,
        **changes,
    }
    return configured(**small)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "in.pth")
    convert_timm(str(folder / "in.pth"), folder / "vit.safetensors", "timm:test_vit")
    return folder / "vit.safetensors"


def test_a_file_of_another_project_is_converted_without_the_windows(pretrained: Path, tmp_path: Path) -> None:
    cfg = toy(tmp_path, pretrained.with_name("in.pth"), MODEL__BACKBONE__NAME=f"{WINDOWED}&global_blocks=2,5")
    converted = with_own_weights(cfg)
    model = build_model(converted)
    load_weights(model, converted)
    theirs = torch.load(pretrained.with_name("in.pth"), weights_only=True)
    assert torch.equal(
        model.state_dict()["backbone.net.model.blocks.5.mlp.fc1.weight"], theirs["blocks.5.mlp.fc1.weight"]
    )
    bare = toy(tmp_path, pretrained.with_name("in.pth"), MODEL__BACKBONE__NAME="timm:test_vit?window=3")
    load_weights(build_model(bare), with_own_weights(bare))


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_the_recipe_trains_and_resumes_bit_for_bit(pretrained: Path, tiny_data: Path, tmp_path: Path) -> None:
    whole = toy(tmp_path / "a", pretrained, SOLVER__CHECKPOINT_PERIOD=2)
    results = train_net(whole, engine="torchvision")
    assert set(results) == {"bbox", "segm"}
    assert load_cfg(tmp_path / "a" / "config.yaml")[0].dump() == whole.dump()
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "model_0000001.pth", tmp_path / "b")
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000001.pth")
    half = toy(tmp_path / "b", pretrained, SOLVER__CHECKPOINT_PERIOD=2)
    train_net(half, engine="torchvision", resume=True)
    one, other = final(tmp_path / "a"), final(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)
    start = build_model(whole)
    load_weights(start, whole)
    before = start.state_dict()
    assert not any("token" in name for name in before)
    changed = {name for name in before if not torch.equal(before[name], one[name])}
    assert {f"backbone.net.model.blocks.{i}.attn.rel_pos_h" for i in range(6)} <= changed
    assert {"backbone.net.model.pos_embed", "backbone.simfp_2.0.weight"} <= changed
    state = torch.load(tmp_path / "a" / "model_final.pth", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_resuming_with_another_optimiser_is_refused(pretrained: Path, tiny_data: Path, tmp_path: Path) -> None:
    train_net(toy(tmp_path / "a", pretrained, SOLVER__MAX_ITER=1, DATASETS__TEST=()), engine="torchvision")
    for change, key in (
        ({"SOLVER__OPTIMIZER": "SGD"}, r"SOLVER\.OPTIMIZER is AdamW before, absent now"),
        ({"SOLVER__LAYER_DECAY": 0.8}, r"SOLVER\.LAYER_DECAY is 0\.7 before, 0\.8 now"),
        ({"MODEL__BACKBONE__SQUARE_PAD": 128}, r"MODEL\.BACKBONE\.SQUARE_PAD is 96 before, 128 now"),
    ):
        cfg = toy(tmp_path / "a", pretrained, SOLVER__MAX_ITER=2, DATASETS__TEST=(), **change)
        with pytest.raises(UserError, match=key):
            train_net(cfg, engine="torchvision", resume=True)
    trained = tmp_path / "a" / "model_final.pth"
    wider = toy(tmp_path / "b", trained, MODEL__BACKBONE__NAME="timm:test_vit?window=6&rel_pos=6")
    with pytest.raises(UserError, match=r"was made with MODEL\.BACKBONE\.NAME .*window=3"):
        load_weights(build_model(wider), wider)
    name = "timm:test_vit?drop_path_rate=0.2&window=3&rel_pos=6&global_blocks=0,1,2,3"
    others = toy(tmp_path / "b", trained, MODEL__BACKBONE__NAME=name)
    with pytest.raises(UserError, match=r"was made with MODEL\.BACKBONE\.NAME .*window=3"):
        load_weights(build_model(others), others)
    calm = toy(
        tmp_path / "b",
        trained,
        MODEL__BACKBONE__NAME="timm:test_vit?drop_path_rate=0.2&window=3&rel_pos=6&qkv_bias=True",
    )
    load_weights(build_model(calm), calm)


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
def test_detectron2s_lazy_model_gives_the_same_numbers_as_both_engines(tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    from detectron2.config import instantiate

    from loco_det.detection.engine_d2 import Detectron2Engine
    from loco_det.detection.engine_torchvision import TorchvisionEngine

    lazy = instantiate(cases.lazy_model()).eval()
    cases.fill(lazy.state_dict())
    torch.save({"model": lazy.state_dict()}, tmp_path / "model.pth")
    cfg = configured(MODEL__WEIGHTS=tmp_path / "model.pth")
    with torch.no_grad():
        expected = lazy(cases.batch())
        for engine in (TorchvisionEngine(), Detectron2Engine()):
            model = engine.build_model(cfg).eval()
            load_weights(model, cfg)
            for one, item in zip(engine.predict(model, cases.batch()), expected, strict=True):
                theirs = item["instances"]
                assert len(one) == len(theirs) > 5
                assert torch.equal(one.classes, theirs.pred_classes)
                torch.testing.assert_close(one.scores, theirs.scores, rtol=0, atol=1e-5)
                torch.testing.assert_close(one.boxes, theirs.pred_boxes.tensor, rtol=0, atol=1e-2)
                assert (one.masks != theirs.pred_masks).float().mean() < 1e-4


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
def test_a_training_step_is_that_of_detectron2s_lazy_model(tmp_path: Path) -> None:
    """Losses, and the gradient of every parameter."""
    pytest.importorskip("detectron2")
    from detectron2.config import instantiate
    from detectron2.utils.events import EventStorage

    lazy = instantiate(cases.lazy_model()).train()
    cases.fill(lazy.state_dict())
    torch.save({"model": lazy.state_dict()}, tmp_path / "model.pth")
    cfg = configured(MODEL__WEIGHTS=tmp_path / "model.pth")
    model = build_model(cfg).train()
    load_weights(model, cfg)
    torch.manual_seed(0)
    with EventStorage():
        expected = lazy(detectron2_batch(train=True))
    torch.manual_seed(0)
    found = model(our_batch(train=True))
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-6)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    ours = cases.of_vitdet({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, parameter in lazy.named_parameters():
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-3 * size, msg=name)


@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_detectron2s_engine_runs_the_recipe(pretrained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Jitter, square and optimiser with Detectron2's loader and heads; the same parameter groups."""
    pytest.importorskip("detectron2")
    from loco_det.detection.engine_d2 import Detectron2Engine

    cfg = toy(tmp_path / "a", pretrained, SOLVER__MAX_ITER=2)
    assert set(train_net(cfg, engine="detectron2")) == {"bbox", "segm"}
    engine = Detectron2Engine()
    batch = next(iter(engine.train_batches(cfg, 0)))
    assert all(max(item["image"].shape[1:]) <= 96 for item in batch)
    theirs, ours = engine.build_model(cfg), build_model(cfg)
    assert theirs.preprocess_image(batch).tensor.shape[2:] == (96, 96)
    groups = [solver.build_optimizer(cfg, model).param_groups for model in (theirs, ours)]
    assert [len(g["params"]) for g in groups[0]] == [len(g["params"]) for g in groups[1]]
    assert [(g["lr"], g["weight_decay"]) for g in groups[0]] == [(g["lr"], g["weight_decay"]) for g in groups[1]]
