"""Local learning on transformers' models: blocks and gradients against its own modules run alone, and the program.

`python tests/test_pretrain_hf.py` writes the table of docs/tutorials/vit.md from what this finds.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pretrain_timm import OF_FOUR_STAGES, OF_SIX_BLOCKS, check_resumed, config, gradients, written_images
from tiny_detection import overrides
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from loco_det.backbones.artifact import load_backbone, tensors_hash  # noqa: E402
from loco_det.backbones.hf_blocks import HfBlocks  # noqa: E402
from loco_det.cli import main  # noqa: E402
from loco_det.core.config import load_config  # noqa: E402
from loco_det.core.errors import UserError  # noqa: E402
from loco_det.detection.keys import get_cfg as get_detector_cfg  # noqa: E402
from loco_det.detection.rcnn import build_model  # noqa: E402
from loco_det.evaluation.probes.backbones import load_backbone_for_probe  # noqa: E402
from pretrain.decoders import build_decoder  # noqa: E402
from pretrain.defaults import get_cfg  # noqa: E402
from pretrain.loco import METHODS, LocalTrainer, method_units, split_backbone  # noqa: E402
from pretrain.loss import nt_xent  # noqa: E402
from pretrain.sharing import SoftTrainer, private_copies  # noqa: E402
from pretrain.train import Learner, pretrain  # noqa: E402

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorials" / "vit.md"
SIDE = 32
PLAIN = {"hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
FOUR = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", PLAIN),  # a cls token and LayerScale
    "registers": ("Dinov2WithRegisters", PLAIN),
    "dinov3": ("DINOv3ViT", {**PLAIN, "intermediate_size": 48, "num_register_tokens": 2}),  # rotary positions
    "vitdet": ("VitDet", {**PLAIN, "pretrain_image_size": 64, "window_block_indices": [0, 3], "window_size": 3}),
    "convnext": ("ConvNext", FOUR),
    "resnet": ("ResNet", {**FOUR, "embedding_size": 8}),  # BatchNorm
}
BEGIN, END = "<!-- hf: python tests/test_pretrain_hf.py -->\n", "<!-- /hf -->\n"
TABLE = {  # config of each row, small; drop rates of 0
    "DINOv2": ("Dinov2", PLAIN),
    "DINOv2 with registers": ("Dinov2WithRegisters", PLAIN),
    "DINOv3": ("DINOv3ViT", {**PLAIN, "intermediate_size": 48}),
    "BEiT": ("Beit", {**PLAIN, "intermediate_size": 48, "drop_path_rate": 0.0}),
    "ViTDet": ("VitDet", {**PLAIN, "pretrain_image_size": 64}),
    "ConvNeXt": ("ConvNext", FOUR),
    "ConvNeXt v2": ("ConvNextV2", FOUR),
    "ResNet": ("ResNet", {**FOUR, "embedding_size": 8}),
    "BiT": ("Bit", {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "embedding_size": 8, "num_groups": 4}),
    "Swin": ("Swin", {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "drop_path_rate": 0.0}),
    "DINOv3's ConvNeXt": ("DINOv3ConvNext", FOUR),
    "FocalNet": ("FocalNet", {"embed_dim": 8, "depths": [1] * 4, "drop_path_rate": 0.0}),
    "PVT v2": ("PvtV2", {"drop_path_rate": 0.0}),
}
PREFIX = {"dinov2": 1, "registers": 5, "dinov3": 3}  # tokens before the patches
IS_PLAIN = (*PREFIX, "vitdet")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Configurations alone, without weights; the hub is unreachable."""
    root, found = tmp_path_factory.mktemp("hf"), {}
    for kind, (name, options) in KINDS.items():
        found[kind] = written(root / kind, name, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_images(tmp_path_factory.mktemp("images"))


def written(to: Path, name: str, options: dict[str, Any]) -> Path:
    getattr(transformers, f"{name}Config")(**options).save_pretrained(to)
    return to


def backbone(place: Path) -> HfBlocks:
    """The network in float64; always the same weights, far enough from their initial ones to matter."""
    torch.manual_seed(0)
    made = HfBlocks(str(place), image_size=SIDE).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def by_hand(kind: str, model: nn.Module) -> tuple[list[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    """What transformers runs, module by module, and what makes a map of it."""
    if kind == "convnext":
        return [model.embeddings, *model.encoder.stages], lambda x: x
    if kind == "resnet":
        return [model.embedder, *model.encoder.stages], lambda x: x
    if kind == "vitdet":
        return [model.embeddings, *(lambda x, layer=layer: layer(x)[0] for layer in model.encoder.layer)], lambda x: x
    if kind == "dinov3":
        with torch.no_grad():
            of_float32 = copy.deepcopy(model.rope_embeddings).float().eval()(images_in().float())
        dtype = model.norm.weight.dtype
        positions = tuple(part.to(dtype) for part in of_float32)  # recorded in float32
        blocks = [partial(layer, position_embeddings=positions) for layer in model.model.layer]
        norm = model.norm
    else:
        blocks, norm = list(model.encoder.layer), model.layernorm

    def as_map(tokens: Tensor) -> Tensor:
        patches = list(tokens.unbind(1))[PREFIX[kind] :]
        rows = [torch.stack(patches[4 * row : 4 * row + 4], dim=2) for row in range(4)]
        return torch.stack(rows, dim=2)

    return [model.embeddings, *blocks[:-1], lambda x: norm(blocks[-1](x))], as_map


def build(place: Path, units: list[list[str]], recompute: str | None = None):
    """Network, its stages and units, a decoder and loss for each unit."""
    network = backbone(place)
    stages, spans = split_backbone(network, units, recompute)
    settings = {**get_cfg().DECODER, "CONV_BLOCKS": 1, "HIDDEN_DIM": 16, "OUT_DIM": 8}
    decoders = nn.ModuleList(build_decoder(settings, network, stages[unit.last].ends_in) for unit in spans).double()
    losses = [lambda h, d=d: nt_xent(d(h), 0.2) for d in decoders]
    return network, stages, spans, decoders, losses


def images_in() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- blocks and the step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_one_after_another_are_transformers_model(kind: str, folders: dict[str, Path]) -> None:
    network = backbone(folders[kind]).float().eval()
    model, x = network.module.model, images_in().float()
    wanted = {"blocks.0-1": "stage2", "blocks.2-3": "stage4", "blocks.4": "stage5", "blocks.5": "stage6"}
    assert list(network.channels) == (list(wanted) if kind in IS_PLAIN else ["res2", "res3", "res4", "res5"])
    assert network.stage_names == ("stem", *network.channels)
    with torch.no_grad():
        theirs = model(pixel_values=x, output_hidden_states=True)
        maps, y, parts = network(x), x, by_hand(kind, model)[0]
        for number, (_, _, block) in enumerate(network.blocks()):
            x, y = block(x), parts[number](y)
            assert torch.equal(x, y)
            if kind == "resnet":
                assert torch.equal(x, theirs.hidden_states[number])
        if kind in IS_PLAIN:
            assert torch.equal(by_hand(kind, model)[1](x), theirs.feature_maps[-1])
            assert torch.equal(network.to_map()(x) if network.to_map() else x, theirs.feature_maps[-1])
    assert all(torch.equal(a, b) for a, b in zip(maps.values(), theirs.feature_maps))
    assert {name: map_.shape[1:] for name, map_ in maps.items()} == {
        name: (network.channels[name], *[SIDE // network.strides[name]] * 2) for name in network.channels
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_block(kind: str, folders: dict[str, Path]) -> None:
    network = backbone(folders[kind])
    inside = [p for _, _, block in network.blocks() for p in block.parameters()]
    outside = {name for name, p in network.named_parameters() if not any(p is q for q in inside)}
    assert len(inside) == len(set(inside))
    assert all(".hidden_states_norms." in name for name in outside)
    assert bool(outside) == (kind == "convnext")
    assert all(module.training for _, _, block in network.blocks() for module in block.modules())
    for method in METHODS:
        names = OF_SIX_BLOCKS if kind in IS_PLAIN else OF_FOUR_STAGES
        if method in names:
            assert method_units(method, network.stage_names[1:]) == names[method][0]


CASES = [
    *(("dinov2", units) for units in OF_SIX_BLOCKS),
    *((kind, "custom") for kind in ("registers", "dinov3", "vitdet")),
    *((kind, units) for kind in ("convnext", "resnet") for units in ("loco", "nested")),
]


@pytest.mark.parametrize(("kind", "units"), CASES)
def test_every_gradient_is_that_of_the_units_run_alone(kind: str, units: str, folders: dict[str, Path]) -> None:
    names, spans = (OF_SIX_BLOCKS if kind in IS_PLAIN else OF_FOUR_STAGES)[units]
    network, stages, made, decoders, losses = build(folders[kind], names)
    values = LocalTrainer([stage.module for stage in stages], made, losses).step(images_in())
    got = gradients(network, decoders)

    network, _, _, decoders, _ = build(folders[kind], names)
    parts, as_map = by_hand(kind, network.module.model)
    for (first, last), decoder, value in zip(spans, decoders, values):
        h = images_in()
        for part in parts[:first]:
            h = part(h)
        h = h.detach()
        for part in parts[first : last + 1]:
            h = part(h)
        h = as_map(h)
        for module in decoder.blocks:  # those that read maps
            h = module(h) if sum(1 for _ in module.parameters()) else h
        alone = nt_xent(decoder.mlp(h.mean((2, 3))), 0.2)
        alone.backward()
        assert value.item() == pytest.approx(alone.item(), abs=1e-12)
    for want, have in zip(gradients(network, decoders), got):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)
    untrained = {name for name, p in network.named_parameters() if p.grad is None}
    assert all("hidden_states_norms" in name or "mask_token" in name for name in untrained)


@pytest.mark.parametrize("kind", ["registers", "dinov3", "resnet"])
def test_recomputed_is_kept_bit_for_bit(kind: str, folders: dict[str, Path]) -> None:
    units, results = (OF_SIX_BLOCKS if kind in IS_PLAIN else OF_FOUR_STAGES)["loco"][0], []
    for choice in ("none", "all"):
        network, stages, made, decoders, losses = build(folders[kind], units, choice)
        kept = [k for k, stage in enumerate(stages) if stage.recompute]
        values = LocalTrainer([s.module for s in stages], made, losses, recompute=kept).step(images_in())
        results.append([*values, *gradients(network, decoders), *network.buffers()])
    assert all(torch.equal(once, twice) for once, twice in zip(*results))


def test_constants_move_with_their_blocks(folders: dict[str, Path]) -> None:
    """Rotary positions: on another device, and of soft sharing's copies, of which one in float32 is so throughout."""
    _, stages, units, _, losses = build(folders["dinov3"], OF_SIX_BLOCKS["loco"][0])
    modules = [stage.module for stage in stages]
    copies = private_copies(modules, units)
    values = SoftTrainer(modules, copies, units, losses, 0.0).step(images_in())
    assert all(value.isfinite() for value in values)
    network = HfBlocks(str(folders["dinov3"]), image_size=SIDE).to("meta")
    x = images_in().float().to("meta")
    for _, _, block in network.blocks():
        x = block(x)  # raises where a constant has stayed behind
    assert x.device.type == "meta"
    alone = nn.Sequential(*copies[0]).float()
    assert alone(modules[0](images_in()).float().detach()).dtype == torch.float32


# --- the program ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dinov2", "dinov3", "resnet"])
def test_interrupted_and_resumed_is_uninterrupted(
    kind: str, folders: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"BACKBONE__NAME": f"hf:{folders[kind]}", "KNN__PERIOD": 1, "SOLVER__OPTIMIZER": "lars"}
    stages = ["blocks.0-1", "blocks.2-3", "blocks.4", "blocks.5"] if kind in IS_PLAIN else [f"res{i}" for i in "2345"]
    check_resumed(partial(config, folder, **changes), stages, tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pretrained_is_read_back_bit_for_bit(
    kind: str, folders: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    """The run's folder is one of transformers: its own class, the probe and a detector read the same weights."""
    cfg = config(folder, tmp_path, BACKBONE__NAME=f"hf:{folders[kind]}", SOLVER__MAX_STEPS=2, KNN__PERIOD=0)
    path = pretrain(cfg)
    tensors, manifest = load_backbone(path)
    assert (manifest.architecture, manifest.method, manifest.step) == (f"hf:{folders[kind]}", "loco", 2)
    assert manifest.stem == ("patch" if kind in IS_PLAIN else "transformers")

    network = getattr(transformers, f"{KINDS[kind][0]}Backbone")
    theirs, report = network.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not report["unexpected_keys"]
    assert all("num_batches_tracked" in name for name in report["missing_keys"])
    own = {n: t for n, t in theirs.state_dict().items() if not n.endswith("num_batches_tracked")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(tensors, path.name)
    assert tensors_hash(own.items()) == tensors_hash(tensors.items()) == manifest.tensors_sha256
    torch.manual_seed(cfg.SEED)
    random = Learner(cfg).backbone.module.model.state_dict()
    same = {name for name, tensor in tensors.items() if torch.equal(tensor, random[name])}
    assert all("hidden_states_norms" in name or "mask_token" in name for name in same)

    probe = load_backbone_for_probe(f"hf:{tmp_path}")
    x = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    pixels = probe.input(x, torch.device("cpu"))
    assert (probe.image_size, probe.order) == (SIDE, "RGB")
    assert (probe.mean, probe.std) == (
        pytest.approx(manifest.pixel_mean, abs=1e-3),
        pytest.approx(manifest.pixel_std, abs=1e-3),
    )
    with torch.no_grad():
        expected = theirs.eval()(pixel_values=pixels).feature_maps[-1]
        assert torch.equal(list(probe.features(x).values())[-1], expected)


@pytest.mark.parametrize("kind", ["dinov2", "convnext"])
def test_a_detector_reads_the_folder(kind: str, folders: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    cfg = config(folder, tmp_path / "run", BACKBONE__NAME=f"hf:{folders[kind]}", SOLVER__MAX_STEPS=1, KNN__PERIOD=0)
    path = pretrain(cfg)
    name = f"hf:{path.parent}"
    assert main(["convert", name, str(tmp_path / "keys.yaml")]) == 0
    base = "configs/base_rcnn_vit.yaml" if kind in IS_PLAIN else "configs/base_rcnn_fpn.yaml"
    (tmp_path / "detector.yaml").write_text(f'_BASE_: ["{Path(base).resolve()}", "{tmp_path / "keys.yaml"}"]\n')
    given = overrides(MODEL__ROI_BOX_HEAD__CONV_DIM=16, MODEL__MASK_ON=False)
    model = build_model(load_config(get_detector_cfg(), str(tmp_path / "detector.yaml"), given)[0])
    trunk = model.backbone.net if kind in IS_PLAIN else model.backbone.bottom_up
    taken = trunk.module.model.state_dict()
    assert all(torch.equal(taken[key], tensor) for key, tensor in load_backbone(path)[0].items())


def test_the_file_alone_is_refused_with_its_folder(
    folders: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = pretrain(config(folder, tmp_path, BACKBONE__NAME=f"hf:{folders['vitdet']}", METHOD="random"))
    for argv in (
        ["convert", str(path), str(tmp_path / "out.pkl")],
        ["probe", str(path), "--data", str(folder), "--protocol", "knn"],
    ):
        assert main(argv) == 2
        assert f"is a model of transformers; name its folder, which has its configuration too: hf:{tmp_path}" in (
            capsys.readouterr().err
        )


# --- refusals and the page --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("Dinov2", {**PLAIN, "drop_path_rate": 0.1}, r"random layers \(drop_path_rate 0.1\).*set drop_path_rate to 0"),
        ("Dinov2", {**PLAIN, "patch_size": 14}, "in patches of 14 pixels, and these are 32; let DATA.IMAGE_SIZE be a"),
        ("Swin", {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "drop_path_rate": 0.0}, "is no sequence"),
        ("PvtV2", {"drop_path_rate": 0.0}, "has no list of blocks; pretrain another family"),
        ("DINOv3ConvNext", FOUR, "changes what its blocks read; pretrain another"),
        ("Bert", {}, "transformers has no AutoBackbone of a bert"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    name: str, options: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    place = written(tmp_path / "model", name, options)
    with pytest.raises(UserError, match=words) as told:
        pretrain(config(folder, tmp_path / "run", BACKBONE__NAME=f"hf:{place}"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run" / "backbone.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"BACKBONE__STEM": "cifar"}, "BACKBONE.STEM is 'cifar', which is for ResNets"),
        ({"DECODER__CONV": "stage", "DECODER__CONV_BLOCKS": 0}, "DECODER.CONV is 'stage', which is for ResNets"),
        ({"BACKBONE__NORM": "SyncBN"}, "BatchNorm of hf:.* is transformers's own; use BN"),
        ({"UNITS": [["res2", "res6"]]}, "'res6' is not in this backbone"),
        ({"BACKBONE__NAME": "hf:/nowhere"}, "backbone hf:/nowhere: no such folder"),
        ({"BACKBONE__NAME": "dinov2"}, r"BACKBONE\.NAME is 'dinov2'; use one of .*, timm:NAME or hf:FOLDER"),
    ],
)
def test_keys_that_do_not_fit(
    changes: dict, words: str, folders: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        pretrain(config(folder, tmp_path, **{"BACKBONE__NAME": f"hf:{folders['resnet']}", **changes}))


def table(found: dict[str, str]) -> str:
    head = "| model of transformers | local learning |\n|---|---|\n"
    return head + "".join(f"| {title} | {what} |\n" for title, what in found.items())


def local(title: str, place: Path) -> str:
    """What units of local learning are, or that the model is refused."""
    try:
        return "blocks" if HfBlocks(str(written(place, *TABLE[title])), image_size=SIDE).is_plain else "stages"
    except UserError:
        return "-"


def test_the_table_says_what_can_be_cut(tmp_path: Path) -> None:
    page = PAGE.read_text()
    rows = page[page.index(BEGIN) + len(BEGIN) : page.index(END)]
    assert rows == table({title: local(title, tmp_path / title) for title in TABLE}), "run: python " + __file__


def test_a_model_that_gives_other_maps_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the model's own forward pass: a stage whose input is not what the one before gave."""
    encoder = transformers.models.resnet.modeling_resnet.ResNetStage
    forward = encoder.forward
    count = [0]

    def impure(self: nn.Module, x: Tensor) -> Tensor:
        count[0] += 1
        return forward(self, x) + 1e-6 * count[0]

    monkeypatch.setattr(encoder, "forward", impure)
    with pytest.raises(UserError, match="is no sequence of blocks that each read one tensor alone"):
        HfBlocks(str(folders["resnet"]), image_size=SIDE)


@pytest.mark.parametrize("kind", ["dinov2", "convnext"])
def test_a_block_that_overwrites_its_input_is_refused(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputing reads the input again; here with the same values, so that only the writing tells."""
    layer = type(backbone(folders[kind]).blocks()[1][2].module)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x, *args, **named: forward(self, x.mul_(1), *args, **named))
    with pytest.raises(UserError, match="leave it as it is"):
        HfBlocks(str(folders[kind]), image_size=SIDE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        made = table({title: local(title, Path(root) / title) for title in TABLE})
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + made + text[text.index(END) :])
