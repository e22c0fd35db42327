"""Local learning on timm's models: blocks and gradients against timm's own modules run alone, and the program."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch
from fvcore.common.config import CfgNode
from tiny_detection import overrides
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from loco_det.backbones.timm_blocks import TimmBlocks
from loco_det.backbones.timm_models import TimmBackbone, parse
from loco_det.convert import read_backbone
from loco_det.core.config import load_config
from loco_det.core.errors import UserError
from loco_det.detection.keys import get_cfg as get_detector_cfg
from loco_det.detection.rcnn import build_model
from loco_det.detection.weights import load_weights
from loco_det.evaluation.probes.backbones import load_backbone_for_probe
from pretrain import train
from pretrain.checkpoint import latest_checkpoint
from pretrain.compiling import stage_compiler
from pretrain.decoders import build_decoder
from pretrain.defaults import get_cfg
from pretrain.loco import METHODS, LocalTrainer, method_units, split_backbone
from pretrain.loss import nt_xent
from pretrain.memory import SavedBytes
from pretrain.sharing import SoftTrainer, UpperTrainer, private_copies
from pretrain.train import Learner, build_backbone, pretrain

SIDE = 32
SWIN = (
    "swin_tiny_patch4_window7_224?img_size=32&embed_dim=12&depths=(1,1,1,1)&num_heads=(1,2,2,4)&window_size=2"
    "&drop_path_rate=0"
)
NAMES = {
    "vit": "test_vit?patch_size=8",
    "registers": "test_vit2?patch_size=8",  # LayerScale, and registers that are left out
    "convnext": "test_convnext",
    "resnet": "test_resnet",  # BatchNorm
    "swin": SWIN,  # maps (B, h, w, C)
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def backbone(name: str) -> TimmBlocks:
    """The network in float64; always the same weights, far enough from their initial ones to matter."""
    torch.manual_seed(0)
    timm_name, options = parse({**NAMES, "two blocks": "test_vit?patch_size=8&depth=2"}[name])
    made = TimmBlocks(timm_name, image_size=SIDE, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def timms_own(name: str, model: nn.Module) -> tuple[list[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """What timm runs, in its own format, and what makes a map of it."""
    if name == "convnext":
        return [model.stem, *model.stages], lambda x: x
    if name == "swin":
        return [model.patch_embed, *model.layers], lambda x: x.permute(0, 3, 1, 2)
    if name == "resnet":
        stem = lambda x: model.act1(model.bn1(model.conv1(x)))  # noqa: E731
        return [stem, lambda x: model.layer1(model.maxpool(x)), model.layer2, model.layer3, model.layer4], lambda x: x

    def as_map(tokens: Tensor) -> Tensor:
        return torch.stack(list(tokens.unbind(1)), dim=2).reshape(len(tokens), -1, 4, 4)

    blocks = list(model.blocks)
    stem = lambda x: model._pos_embed(model.patch_embed(x))  # noqa: E731
    return [stem, *blocks[:-1], lambda x: model.norm(blocks[-1](x))], as_map


# Units by name, and the first and last block of each as a number; the stem is 0. Written by hand.
OF_SIX_BLOCKS = {
    "simclr": ([["blocks.0-1", "blocks.5"]], [(0, 6)]),
    "gim": ([[s, s] for s in ("blocks.0-1", "blocks.2-3", "blocks.4", "blocks.5")], [(0, 2), (3, 4), (5, 5), (6, 6)]),
    "loco": (
        [["blocks.0-1", "blocks.2-3"], ["blocks.2-3", "blocks.4"], ["blocks.4", "blocks.5"]],
        [(0, 4), (3, 5), (5, 6)],
    ),
    "loco_res2": (
        [
            ["blocks.0-1", "blocks.0-1"],
            ["blocks.0-1", "blocks.2-3"],
            ["blocks.2-3", "blocks.4"],
            ["blocks.4", "blocks.5"],
        ],
        [(0, 2), (0, 4), (3, 5), (5, 6)],
    ),
    "custom": (
        [["stem", "blocks.0-2"], ["blocks.1", "blocks.3-4"], ["blocks.3", "blocks"]],
        [(0, 3), (2, 5), (4, 6)],
    ),
    "nested": ([["blocks", "blocks"], ["blocks.2", "blocks.3"]], [(0, 6), (3, 4)]),
    "one block each": ([[f"blocks.{i}"] * 2 for i in range(6)], [(0, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6)]),
}
OF_FOUR_STAGES = {
    "simclr": ([["res2", "res5"]], [(0, 4)]),
    "gim": ([["res2"] * 2, ["res3"] * 2, ["res4"] * 2, ["res5"] * 2], [(0, 1), (2, 2), (3, 3), (4, 4)]),
    "loco": ([["res2", "res3"], ["res3", "res4"], ["res4", "res5"]], [(0, 2), (2, 3), (3, 4)]),
    "nested": ([["stem", "res5"], ["res3", "res4"]], [(0, 4), (2, 3)]),
}
CASES = [
    *(("vit", units) for units in OF_SIX_BLOCKS),
    *((name, units) for name in ("convnext", "resnet", "swin") for units in OF_FOUR_STAGES),
]


def units_of(name: str, units: str) -> tuple[list[list[str]], list[tuple[int, int]]]:
    return (OF_SIX_BLOCKS if name == "vit" else OF_FOUR_STAGES)[units]


def build(name: str, units: list[list[str]], recompute: str | list[str] | None = None):
    """Network, its stages and units, a decoder and loss for each unit."""
    network = backbone(name)
    stages, spans = split_backbone(network, units, recompute)
    settings = {**get_cfg().DECODER, "CONV_BLOCKS": 1, "HIDDEN_DIM": 16, "OUT_DIM": 8}
    decoders = nn.ModuleList(build_decoder(settings, network, stages[unit.last].ends_in) for unit in spans).double()
    losses = [lambda h, d=d: nt_xent(d(h), 0.2) for d in decoders]
    return network, stages, spans, decoders, losses


def gradients(*modules: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]


def images_in() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_blocks_one_after_another_are_timms_model(name: str) -> None:
    network = backbone(name).eval()
    options = parse(NAMES[name])[1]
    if name in ("vit", "registers"):
        options = {**options, "img_size": SIDE, "class_token": False, "reg_tokens": 0, "global_pool": ""}
    whole = timm.create_model(parse(NAMES[name])[0], num_classes=0, **options).double().eval()
    whole.load_state_dict(network.model.state_dict(), strict=False)
    outputs, x = {}, images_in()
    with torch.no_grad():
        for _, stage, block in network.blocks():
            x = outputs[stage] = block(x)
        parts, as_map = timms_own(name, whole)
        if name in ("vit", "registers"):
            tokens = whole.forward_features(images_in())
            assert torch.equal(x, tokens.transpose(1, 2).unflatten(2, (4, 4)))
            assert torch.equal(x, as_map(tokens))
        else:
            y = images_in()
            for map_, part in zip(outputs.values(), parts):
                y = part(y)
                assert torch.equal(map_, as_map(y))
    for stage, channels in network.channels.items():
        assert outputs[stage].shape == (4, channels, *[SIDE // network.strides[stage]] * 2)


def test_every_parameter_is_in_one_block() -> None:
    for name in NAMES:
        network = backbone(name)
        inside = [p for _, _, block in network.blocks() for p in block.parameters()]
        assert len(inside) == len(set(inside)) == len(list(network.parameters()))
        assert set(inside) == set(network.parameters())
        assert all(module.training for _, _, block in network.blocks() for module in block.modules())


def test_methods_are_the_quarters_of_a_plain_transformer() -> None:
    for method in METHODS:
        assert method_units(method, backbone("vit").stage_names[1:]) == OF_SIX_BLOCKS[method][0]
    twelve = TimmBlocks("vit_tiny_patch16_224", image_size=SIDE, patch_size=8, embed_dim=24, num_heads=2)
    assert method_units("loco", twelve.stage_names[1:]) == [
        ["blocks.0-2", "blocks.3-5"],
        ["blocks.3-5", "blocks.6-8"],
        ["blocks.6-8", "blocks.9-11"],
    ]
    assert [stage for _, stage, _ in twelve.blocks()[1:]] == [
        *["blocks.0-2"] * 3,
        *["blocks.3-5"] * 3,
        *["blocks.6-8"] * 3,
        *["blocks.9-11"] * 3,
    ]
    stages, _ = split_backbone(twelve, [["blocks.0-3", "blocks.4-7"], ["blocks.4-7", "blocks.8-11"]])
    assert [(stage.name, stage.ends_in) for stage in stages] == [
        ("stem..blocks.3", "blocks.3-5"),
        ("blocks.4..blocks.7", "blocks.6-8"),
        ("blocks.8..blocks.11", "blocks.9-11"),
    ]


# --- the step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "units"), CASES)
def test_every_gradient_is_that_of_the_units_run_alone_by_timms_modules(name: str, units: str) -> None:
    names, spans = units_of(name, units)
    network, stages, made, decoders, losses = build(name, names)
    values = LocalTrainer([stage.module for stage in stages], made, losses).step(images_in())
    got = gradients(network, decoders)

    network, _, _, decoders, losses = build(name, names)
    parts, as_map = timms_own(name, network.model)
    for (first, last), loss, value in zip(spans, losses, values):
        h = images_in()
        for part in parts[:first]:
            h = part(h)
        h = h.detach()
        for part in parts[first : last + 1]:
            h = part(h)
        alone = loss(as_map(h))
        alone.backward()
        assert value.item() == pytest.approx(alone.item(), abs=1e-12)
    for want, have in zip(gradients(network, decoders), got):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None
        # A window of one token attends to itself, whatever its position.
        assert parameter.grad.abs().max() > 0 or "relative_position" in key


@pytest.mark.parametrize("name", NAMES)
def test_one_unit_over_everything_is_end_to_end(name: str) -> None:
    units = method_units("simclr", backbone(name).stage_names[1:])
    network, stages, made, decoders, losses = build(name, units)
    LocalTrainer([stage.module for stage in stages], made, losses).step(images_in())
    got = gradients(network, decoders)
    network, _, _, decoders, losses = build(name, units)
    losses[0](network(images_in())[network.stage_names[-1]]).backward()
    for want, have in zip(gradients(network, decoders), got):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("recompute", ["first", "all", "last"])
@pytest.mark.parametrize(("name", "units"), [("vit", "loco"), ("vit", "custom"), ("resnet", "loco"), ("swin", "loco")])
def test_recomputed_is_kept_bit_for_bit(name: str, units: str, recompute: str) -> None:
    again = {"last": ["blocks.4-5"] if name == "vit" else ["res5"]}.get(recompute, recompute)
    results = []
    for choice in ("none", again):
        network, stages, made, decoders, losses = build(name, units_of(name, units)[0], choice)
        kept = [k for k, stage in enumerate(stages) if stage.recompute]
        assert bool(kept) == (choice != "none")
        values = LocalTrainer([s.module for s in stages], made, losses, recompute=kept).step(images_in())
        results.append([*values, *gradients(network, decoders), *network.buffers()])
    assert all(torch.equal(once, twice) for once, twice in zip(*results))
    if recompute == "first":
        assert [s.name for s in stages if s.recompute] == (
            ["stem", "blocks.0", "blocks.1"] if name == "vit" else ["stem", "res2"]
        )


def test_sharing_splits_the_gradient_of_shared_blocks() -> None:
    """Copies that are equal get, all together, hard sharing's gradient; the uppermost of them upper sharing's."""
    names, _ = OF_SIX_BLOCKS["loco"]
    found = {}
    for mode in ("hard", "upper", "soft"):
        network, stages, units, _, losses = build("vit", names)
        modules = [stage.module for stage in stages]
        copies = private_copies(modules, units)
        if mode == "soft":
            SoftTrainer(modules, copies, units, losses, 0.0).step(images_in())
            assert len(copies) == 2  # of the second and the third stage
            for stage, copy in zip(modules[1:3], copies):
                for shared, private in zip(stage.parameters(), copy.parameters()):
                    assert private.grad.abs().max() > 0
                    found.setdefault("all", {})[shared] = shared.grad + private.grad
            whole = [found["all"].get(p, p.grad) for p in network.parameters()]
        else:
            (UpperTrainer if mode == "upper" else LocalTrainer)(modules, units, losses).step(images_in())
        found[mode] = gradients(network)
    for hard, together, upper, own in zip(found["hard"], whole, found["upper"], found["soft"]):
        torch.testing.assert_close(hard, together, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(upper, own, rtol=1e-9, atol=1e-13)
    assert not all(torch.allclose(a, b) for a, b in zip(found["hard"], found["upper"]))


def test_compiled_blocks_equal_eager_ones() -> None:
    """Two blocks, of which the upper one is differentiated twice."""
    results = []
    for backend in (None, "aot_eager"):
        torch.compiler.reset()
        network, stages, units, decoders, losses = build(
            "two blocks", [["blocks.0", "blocks.1"], ["blocks.1", "blocks.1"]]
        )
        compiler = stage_compiler(torch.device("cpu"), backend) if backend else lambda module: module
        values = LocalTrainer([compiler(stage.module) for stage in stages], units, losses).step(images_in())
        results.append([*values, *gradients(network, decoders)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)


def bytes_kept(units: str, recompute: str | None = None) -> int:
    network, stages, made, decoders, losses = build("vit", OF_SIX_BLOCKS[units][0], recompute)
    kept = [k for k, stage in enumerate(stages) if stage.recompute]
    with SavedBytes([*network.parameters(), *decoders.parameters()]) as saved:
        LocalTrainer([s.module for s in stages], made, losses, recompute=kept).step(images_in())
    assert saved.now == 0
    return saved.peak


def test_local_losses_and_recomputing_keep_less() -> None:
    simclr, loco, gim = (bytes_kept(method) for method in ("simclr", "loco", "gim"))
    assert gim < loco < simclr
    assert bytes_kept("simclr", "all") < 0.5 * simclr


# --- the program ------------------------------------------------------------------------------------------------

SMALL = {
    "BACKBONE.NAME": "timm:test_vit?patch_size=8",
    "DECODER.CONV_BLOCKS": 1,
    "DECODER.HIDDEN_DIM": 16,
    "DECODER.OUT_DIM": 8,
    "DATA.IMAGE_SIZE": SIDE,
    "DATA.NUM_WORKERS": 0,
    "SOLVER.BATCH_SIZE": 4,
    "SOLVER.MAX_STEPS": 3,
    "SOLVER.OPTIMIZER": "adamw",
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_EPOCHS": 0,
    "KNN.K": 3,
    "LOG_PERIOD": 1,
    "DEVICE": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_images(tmp_path_factory.mktemp("images"))


def written_images(found: Path) -> Path:
    """Twelve images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        (found / str(i % 2)).mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(found / str(i % 2) / f"{i:02d}.png"), cv2.resize(coarse, (48, 40)))
    return found


def config(folder: Path, output: Path, **changes: object):
    settings = {**SMALL, "DATA.PATH": folder, "OUTPUT_DIR": output}
    settings.update({key.replace("__", "."): value for key, value in changes.items()})
    return load_config(get_cfg(), "", [str(part) for pair in settings.items() for part in pair])[0]


def trace(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_share")} for line in lines]


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({"KNN__PERIOD": 1}, ["blocks.0-1", "blocks.2-3", "blocks.4", "blocks.5"]),
        (
            {"METHOD": "gim", "SOLVER__AMP": "bf16", "BACKBONE__NAME": "timm:test_convnext"},
            ["res2", "res3", "res4", "res5"],
        ),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(
    changes: dict, stages: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recompute = {} if "METHOD" in changes else {"SOLVER__RECOMPUTE": "first"}  # may differ: the same bits
    check_resumed(partial(config, folder, **changes), stages, tmp_path, monkeypatch, **recompute)


def check_resumed(
    made: Callable[..., CfgNode], stages: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, **resumed: object
) -> None:
    """A run stopped after its second step and resumed, with `resumed` changed, against one that was not."""
    made = partial(made, CHECKPOINT_PERIOD=2)
    whole = pretrain(made(place / "whole"))
    save = train._save

    def save_and_stop(*args: object) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(made(place / "cut"))
    cut = pretrain(made(place / "cut", **resumed), resume=True)
    assert load_backbone(whole)[1].tensors_sha256 == load_backbone(cut)[1].tensors_sha256
    assert trace(place / "whole") == trace(place / "cut")
    line = trace(place / "cut")[-1]
    assert line["iteration"] == 2
    assert [key for key in line if key.startswith("knn/")] == [f"knn/{stage}" for stage in stages]
    assert [key for key in line if key.startswith("grad_norm/")] == [
        f"grad_norm/{stage}" for stage in ("stem", *stages)
    ]


@pytest.mark.parametrize("mode", ["upper", "soft"])
def test_weaker_sharing_trains(mode: str, folder: Path, tmp_path: Path) -> None:
    """In half precision, too."""
    changes = {"SHARING__MODE": mode, "SHARING__PENALTY": 0.001 if mode == "soft" else 0.0, "SOLVER__AMP": "bf16"}
    tensors, manifest = load_backbone(pretrain(config(folder, tmp_path, SOLVER__MAX_STEPS=2, **changes)))
    assert manifest.step == 2
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def name_of(manifest) -> str:
    return parse(manifest.architecture)[0]


def pretrained(folder: Path, output: Path, **changes: object) -> tuple[Path, TimmBlocks]:
    """A trained artifact, and the network of the training state beside it."""
    cfg = config(folder, output, KNN__PERIOD=0, **changes)
    path = pretrain(cfg)
    learner = Learner(cfg)
    learner.load_state_dict(latest_checkpoint(output)[1]["learner"])
    return path, learner.backbone.eval()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_pretrained_is_read_back_bit_for_bit(name: str, folder: Path, tmp_path: Path) -> None:
    path, network = pretrained(folder, tmp_path, BACKBONE__NAME=f"timm:{NAMES[name]}", SOLVER__MAX_STEPS=2)
    x = torch.randn(2, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    read, manifest = read_backbone(path)
    assert type(read) is TimmBackbone
    assert read.image_size == (
        SIDE if "img_size" in manifest.architecture else timm.get_pretrained_cfg(name_of(manifest)).input_size[1]
    )
    with torch.no_grad():
        last = x
        for _, _, block in network.blocks():
            last = block(last)
        found = read(x)
    assert list(found) == list(manifest.stages) == list(network.channels)
    torch.testing.assert_close(found[network.stage_names[-1]], last, rtol=1e-6, atol=1e-6)
    assert (manifest.architecture, manifest.method) == (network.architecture, "loco")
    assert manifest.stem == ("patch" if name in ("vit", "registers") else "timm")
    names = {n for n in read.model.state_dict() if not n.endswith("num_batches_tracked")}
    assert names == set(load_backbone(path)[0])

    probe = load_backbone_for_probe(str(path))
    assert (probe.image_size, probe.mean, probe.std) == (SIDE, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        again = probe.model(x)
    assert all(torch.equal(again[stage], found[stage]) for stage in found)


def test_a_detector_takes_it_under_its_whole_name(folder: Path, tmp_path: Path) -> None:
    path, network = pretrained(folder, tmp_path / "run", BACKBONE__NAME="timm:test_vit", SOLVER__MAX_STEPS=1)
    assert network.architecture == "timm:test_vit?class_token=False&reg_tokens=0&global_pool=&img_size=32"

    def detector(name: str):
        changes = {"MODEL__BACKBONE__NAME": name, "MODEL__WEIGHTS": path, "OUTPUT_DIR": tmp_path / "detector"}
        changes |= {"MODEL__PIXEL_MEAN": list(IMAGENET_MEAN), "MODEL__PIXEL_STD": list(IMAGENET_STD)}
        cfg = load_config(
            get_detector_cfg(), "configs/base_rcnn_vit.yaml", overrides(MODEL__ROI_BOX_HEAD__CONV_DIM=16, **changes)
        )[0]
        model = build_model(cfg)
        load_weights(model, cfg)
        return model

    for name in (network.architecture, f"{network.architecture}&drop_path_rate=0.1"):
        taken = detector(name).backbone.net.model.state_dict()
        assert all(torch.equal(taken[key], tensor) for key, tensor in load_backbone(path)[0].items())
    with pytest.raises(
        UserError, match=r"MODEL\.BACKBONE\.NAME \"timm:test_vit\?class_token=False&.*has \"timm:test_vit\""
    ):
        detector("timm:test_vit")


def test_random_weights_are_written_too(folder: Path, tmp_path: Path) -> None:
    tensors, manifest = load_backbone(pretrain(config(folder, tmp_path, METHOD="random")))
    assert (manifest.method, manifest.step, len(tensors)) == ("random", 0, 3 + 12 * 6 + 2)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"BACKBONE__NAME": "timm:no_such_model"}, "has no model"),
        ({"BACKBONE__NAME": "timm:test_vit?patch"}, "'patch' is no KEY=VALUE"),
        ({"BACKBONE__NAME": "timm:test_vit?colour=3"}, "colour"),
        ({"BACKBONE__NAME": "timm:test_vit?pretrained=True"}, "pretrained is no option behind the name; leave it out"),
        ({"BACKBONE__NAME": "timm:test_vit?class_token=True&global_pool=token"}, "cls token or registers; leave"),
        ({"BACKBONE__NAME": "timm:test_vit2?reg_tokens=2"}, "cls token or registers; leave"),
        (
            {"BACKBONE__NAME": "timm:test_vit?img_size=64"},
            "takes images of 64 x 64 pixels in patches of 16, and .* 32;",
        ),
        ({"BACKBONE__NAME": "timm:test_vit?patch_size=5"}, "in patches of 5, and these are 32; let DATA.IMAGE_SIZE"),
        (
            {"BACKBONE__NAME": "timm:test_vit?drop_path_rate=0.1"},
            r"random layer \(.*DropPath of 0.02\).*drop_path_rate=0",
        ),
        ({"BACKBONE__NAME": "timm:test_vit?pos_drop_rate=0.1"}, r"random layer \(pos_drop: Dropout of 0.1\)"),
        ({"BACKBONE__NAME": "timm:test_vit?patch_drop_rate=0.5"}, r"random layer \(patch_drop: PatchDropout of 0.5\)"),
        (
            {"BACKBONE__NAME": "timm:eva02_tiny_patch14_224?embed_dim=24&num_heads=2"},
            "is a Eva, and of plain networks only",
        ),
        (
            {"BACKBONE__NAME": "timm:test_maxvit"},
            "takes images of 160 x 160 pixels only.*add img_size=32 to its options",
        ),
        (
            {"BACKBONE__NAME": "timm:test_convnext", "DATA__IMAGE_SIZE": 8},
            r"cannot take images of 8 pixels \(.*IMAGE_SIZE",
        ),
        ({"BACKBONE__NAME": "timm:hiera_tiny_224?embed_dim=16&num_heads=1"}, "blocks.0, is inside another module"),
        ({"BACKBONE__NAME": "timm:test_resnet", "BACKBONE__NORM": "SyncBN"}, "BACKBONE.NORM is 'SyncBN', but"),
        (
            {"BACKBONE__STEM": "cifar"},
            "BACKBONE.STEM is 'cifar', which is for ResNets; leave it imagenet, timm:test_vit",
        ),
        ({"BACKBONE__WIDTH": 8}, "BACKBONE.WIDTH is 8, which is for ResNets; leave it 64"),
        (
            {"BACKBONE__NAME": "vit_tiny"},
            "BACKBONE.NAME is 'vit_tiny'; use one of .*shufflenetv2_50, timm:NAME or hf:FOLDER",
        ),
        ({"DECODER__CONV": "stage", "DECODER__CONV_BLOCKS": 0}, "DECODER.CONV is 'stage', which is for ResNets"),
        ({"UNITS": [["stem", "stem"], ["blocks", "blocks"]]}, "a unit ends in the stem of timm:test_vit.*blocks.0-1"),
        (
            {"UNITS": [["blocks.0", "blocks.6"]]},
            "'blocks.6' is not in this backbone; its blocks are stem, blocks.0 .. b",
        ),
        ({"UNITS": [["res2", "res5"]]}, "'res2' is not in this backbone"),
        ({"UNITS": [["blocks.0", "blocks.3"]]}, "no unit trains blocks.4"),
        ({"SOLVER__RECOMPUTE": "[res2]"}, "SOLVER.RECOMPUTE: 'res2' is not in this backbone"),
        ({"SHARING__MODE": "soft", "SOLVER__RECOMPUTE": "all"}, "SHARING.MODE soft keeps every activation"),
    ],
)
def test_what_cannot_be_is_one_sentence(changes: dict, words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as told:
        pretrain(config(folder, tmp_path, **changes))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "backbone.safetensors").exists()


def test_a_model_that_is_no_sequence_of_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with timm's own forward pass: here a stage that reads what no other stage writes."""
    forward = TimmBackbone.forward
    monkeypatch.setattr(
        TimmBackbone, "forward", lambda self, x: {**forward(self, x), "res4": forward(self, x)["res4"] + 1e-6}
    )
    with pytest.raises(UserError, match="timm:test_convnext: is no sequence of blocks that each read one map alone"):
        TimmBlocks("test_convnext", image_size=SIDE)


def test_a_stage_that_overwrites_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = timm.models.convnext.ConvNeXtStage
    forward = stage.forward
    monkeypatch.setattr(stage, "forward", lambda self, x: forward(self, x.mul_(1)))
    with pytest.raises(UserError, match="timm:test_convnext: its res2 overwrites its input; pretrain another family"):
        TimmBlocks("test_convnext", image_size=SIDE)


def test_the_seed_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_backbone(cfg).state_dict()["model.blocks.0.attn.qkv.weight"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
