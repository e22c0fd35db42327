"""Every row of the table of sources, on a checkpoint built as that code base builds it; and the strict account."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from convert_cases import caffe2_name, prefixed, randomised
from convert_layouts import (
    CASES,
    OWN,
    RECORDED,
    Case,
    backbone_of,
    caffe2,
    densecl,
    detectron2_c4,
    detectron2_fpn,
    detectron2_names,
    lightly,
    moco,
    msra,
    resnet,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_det.backbones.artifact import IMAGENET_MEAN, IMAGENET_STD, describe, save_backbone
from loco_det.backbones.names import to_detectron2, to_torchvision
from loco_det.backbones.resnet import ResNet
from loco_det.cli import run_job
from loco_det.convert import read_backbone, read_backbone_tensors, read_checkpoint
from loco_det.convert.inspect import inspect
from loco_det.convert.load import load_tensors, open_tensors
from loco_det.convert.name_patterns import NAMINGS
from loco_det.convert.report import Account, take_account
from loco_det.convert.sources import SOURCES, Pixels, Source
from loco_det.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_caffe2_names_of_bottlenecks() -> None:
    with torch.device("meta"):
        names = [name for name in torchvision.models.resnet50().state_dict() if "num_batches" not in name]
    for name in names[:-2]:  # the classifier is last
        assert NAMINGS["caffe2"][2](caffe2_name(name)) == name


def assert_converted(account: Account, state: dict[str, Tensor]) -> None:
    expected = backbone_of(state)
    assert account.converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(account.converted[name], tensor), name
    assert account.read == len(expected) - len(account.made) + sum(map(len, account.dropped.values()))


def documented() -> dict[str, list[str]]:
    """docs/conversion.md's table of sources: name -> cells (prefixes, branches, pixels)."""
    lines = (ROOT / "docs" / "conversion.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) == 4}


def pixels_text(pixels: Pixels | None) -> str:
    if pixels is None:
        return "must be stated"
    if (pixels.mean, pixels.std) == (IMAGENET_MEAN, IMAGENET_STD):
        assert pixels.order == "RGB"
        return "ImageNet"
    numbers = (
        f"{pixels.order}, mean {' '.join(f'{v:g}' for v in pixels.mean)}, std {' '.join(f'{v:g}' for v in pixels.std)}"
    )
    return numbers + (", stride in the 1x1" if pixels.stride_in_1x1 else "")


@pytest.mark.parametrize("row", SOURCES, ids=lambda row: row.name)
def test_the_documented_table_is_that_of_the_code(row: Source) -> None:
    _, branches, pixels = documented()[row.name]
    assert branches == (", ".join(f"`{b}`" for b in row.branches) if len(row.branches) > 1 else "")
    assert pixels == pixels_text(row.pixels)


FOREIGN = [case for case in CASES if case.source != OWN]


@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.file)
def test_every_source_is_recognised_and_brought_out_whole(case: Case, tmp_path: Path) -> None:
    path, branches = case.write(tmp_path)
    loaded, report = load_tensors(path), inspect(path)
    assert json.loads(json.dumps(report.facts())) == report.facts()
    assert case.source in "\n".join(report.lines())
    if len(branches) > 1:
        with pytest.raises(UserError) as refused:
            take_account(path, loaded)
        assert all(f"--branch {branch}" in str(refused.value) for branch in branches)
    for branch, state in branches.items():
        account, chosen = take_account(path, loaded, branch if len(branches) > 1 else None)
        assert f"`{chosen.prefix or 'none'}`" in documented()[case.source][0]
        assert (account.source, account.branch, account.architecture.name) == (case.source, branch, "resnet18")
        assert_converted(account, state)
        told = next(b for b in report.backbones if b["prefix"] == chosen.prefix)
        assert (told["source"], told["branch"], told["architecture"]) == (case.source, branch, "resnet18")
        assert told["converted"] == len(account.converted) - len(account.made)
        assert told["dropped"] == {reason: len(keys) for reason, keys in account.dropped.items()}
        assert sum(group["tensors"] for group in report.groups) == account.read


def test_every_row_and_every_branch_has_a_case() -> None:
    seen = {(case.source, branch) for case in FOREIGN for branch in case.branches.split(" ")}
    promised = {(row.name, branch) for row in SOURCES for branch in row.branches}
    assert promised - seen == {("DenseCL or OpenSelfSup", "backbone")}  # a second name of the query


@pytest.mark.filterwarnings("ignore::FutureWarning")  # lightly uses the older weight_norm
@pytest.mark.parametrize("library", ["lightly", "transformers"])
def test_the_record_is_what_the_library_makes(library: str) -> None:
    """Names, shapes and dtypes of the checkpoints above, against the library where it is installed."""
    pytest.importorskip(library)
    import record_layouts

    made = getattr(record_layouts, library)()
    record = json.loads(RECORDED.read_text())
    assert {name for name in record if name.startswith(library)} == made.keys()
    for name, model in made.items():
        assert record_layouts.layout(model) == record[name], name


def test_one_backbone_under_two_names_is_no_choice_but_two_backbones_are() -> None:
    file, branches = densecl()
    state = {k: v for k, v in file["state_dict"].items() if not k.startswith("encoder_k")}
    account, _ = take_account("x", {"state_dict": state})
    assert account.branch == "query"
    assert_converted(account, branches["query"])
    state["backbone.layer4.1.bn2.bias"] = state["backbone.layer4.1.bn2.bias"] + 1e-6
    with pytest.raises(UserError, match=r"holds 2 backbones; choose one with --branch query or --branch backbone$"):
        take_account("x", {"state_dict": state})


@pytest.mark.parametrize("depth", [18, 50])
def test_transformers_itself(tmp_path: Path, depth: int) -> None:
    """Names and features of the library's own ResNet, from the folder that it saves."""
    transformers = pytest.importorskip("transformers")
    kind, depths = ("basic", [2, 2, 2, 2]) if depth == 18 else ("bottleneck", [3, 4, 6, 3])
    sizes = [64, 128, 256, 512] if depth == 18 else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(layer_type=kind, depths=depths, hidden_sizes=sizes, num_labels=10)
    model = randomised(transformers.ResNetForImageClassification(config)).eval()
    model.save_pretrained(tmp_path)
    account, _ = take_account("x", load_tensors(tmp_path / "model.safetensors"))
    assert (account.source, account.architecture.name) == ("Hugging Face transformers", f"resnet{depth}")
    source = account.architecture.build()
    source.load_state_dict({to_detectron2(k): v for k, v in account.converted.items()}, strict=False)
    source.eval()
    x = torch.randn(1, 3, 65, 90, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.resnet(x).last_hidden_state, source(x)["res5"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_msra_weights_get_statistics_pixels_and_stride() -> None:
    account, chosen = take_account("x", msra()[0])
    assert len(account.made) == 40
    assert "added        40 statistics" in "\n".join(account.lines())
    assert chosen.source.pixels == Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=True)
    assert take_account("x", caffe2()[0])[1].source.pixels is None


def test_timm_training_run(tmp_path: Path) -> None:
    """A checkpoint as timm's own saver writes it, with an average of the weights beside them."""
    utils = pytest.importorskip("timm.utils")
    model = randomised(pytest.importorskip("timm").create_model("resnet18"), 1)
    average = utils.ModelEmaV3(model)
    randomised(average.module, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = argparse.Namespace(model="resnet18")
    saver = utils.CheckpointSaver(model, optimizer, arguments, average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = tmp_path / "last.pth.tar"
    loaded = load_tensors(path)
    with pytest.raises(UserError, match="--branch model or --branch ema"):
        take_account(path, loaded)
    for branch, state in (("model", model.state_dict()), ("ema", average.module.state_dict())):
        assert_converted(take_account(path, loaded, branch)[0], state)


@pytest.mark.parametrize("place", ["", "model", "state_dict"])
def test_torchs_average_of_the_weights(place: str) -> None:
    average = torch.optim.swa_utils.AveragedModel(resnet())
    average.update_parameters(resnet(1))
    average.update_parameters(resnet(2))
    state = average.state_dict()
    account, _ = take_account("x", {place: state} if place else state)
    assert_converted(account, average.module.state_dict())
    counter = f"{place}:n_averaged" if place else "n_averaged"
    assert account.dropped["counter of averaged weights"] == [counter]


def wrapped(value: object, put: Callable[[str], str]) -> object:
    """Nested data with the names of its tensors changed."""
    if not isinstance(value, dict):
        return value
    named = {key: isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()}
    return {put(key) if named[key] else key: wrapped(item, put) for key, item in value.items()}


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.file)
def test_what_wrappers_put_into_names_is_no_part_of_them(case: Case, wrapper: str, tmp_path: Path) -> None:
    path, branches = case.write(tmp_path)
    loaded = load_tensors(path)
    for put in (f"{wrapper}.{{}}".format, lambda name: name.replace(".", f".{wrapper}.", 1)):
        for branch, state in branches.items():
            account, _ = take_account(path, wrapped(loaded, put), branch if len(branches) > 1 else None)
            assert (account.source, account.branch) == (case.source, branch)
            assert_converted(account, state)
            names = set(account.keys.values())  # the file's own; Caffe2's have no dot
            assert any(wrapper in name for name in names) or "conv1_w" in "".join(names)


def test_a_compiled_network_is_converted_with_its_proof(tmp_path: Path) -> None:
    model = torch.compile(resnet())
    torch.save({"model": model.state_dict()}, tmp_path / "compiled.pth")
    assert all(name.startswith("_orig_mod.") for name in model.state_dict())
    backbones = inspect(tmp_path / "compiled.pth").backbones
    assert [(found["source"], found["prefix"]) for found in backbones] == [("torchvision or timm ResNet", "model:")]
    chain = torch.compile(nn.Sequential(*list(resnet().children())[:-1]))
    torch.save({f"backbone.{name}": t for name, t in chain.state_dict().items()}, tmp_path / "chain.pth")
    told = ["--channel-order", "RGB", "--pixel-mean", "0", "0", "0", "--pixel-std", "255", "255", "255"]
    told += ["--stride-in-1x1", "no", "--branch", "backbone."]
    for name, options in (("compiled", []), ("chain", told)):
        assert run_job("convert", [str(tmp_path / f"{name}.pth"), str(tmp_path / f"{name}.pkl"), *options]) == 0
    one, other = (read_backbone_tensors(tmp_path / f"{name}.pkl")[0] for name in ("compiled", "chain"))
    assert all(torch.equal(one[name], other[name]) for name in {**one, **other})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in resnet().state_dict().items()}
    state["bn1.running_mean"] = state["bn1.running_mean"].float()
    save_file(state, tmp_path / "x.safetensors")
    account, _ = take_account(tmp_path / "x.safetensors", open_tensors(tmp_path / "x.safetensors"))
    assert_converted(account, {k: t.double().float() if t.is_floating_point() else t for k, t in state.items()})
    assert account.widened == account.facts()["widened"] == [name]
    assert f"of {name}, which float32 holds exactly" in "\n".join(account.lines())
    assert all(tensor.dtype == torch.float32 for tensor in account.converted.values())
    assert take_account("x", resnet().state_dict())[0].widened == []
    state["layer4.1.conv2.weight"][0] = torch.inf  # what overflowed
    with pytest.raises(UserError, match=r"'layer4.1.conv2.weight' has NaN or infinite"):
        take_account("x", state)


def test_a_counter_of_averages_elsewhere_is_unknown() -> None:
    with pytest.raises(UserError, match=r"'layer1\.n_averaged' is unknown"):
        take_account("x", {**resnet().state_dict(), "layer1.n_averaged": torch.tensor(3)})


def test_safetensors_of_timm(tmp_path: Path) -> None:
    state = randomised(pytest.importorskip("timm").create_model("resnet18")).state_dict()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_converted(take_account("x", load_tensors(tmp_path / "model.safetensors"))[0], state)


def test_our_own_artifact(tmp_path: Path) -> None:
    state, plain = detectron2_names()
    manifest = describe(ResNet(18), stem="imagenet", method="loco", step=7)
    written = save_backbone(tmp_path / "backbone.safetensors", plain, manifest)
    tensors, found = read_backbone_tensors(tmp_path / "backbone.safetensors")
    assert found == written
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_an_artifact_of_another_depth_than_it_says(tmp_path: Path) -> None:
    manifest = describe(ResNet(34), stem="imagenet", method="loco")
    save_backbone(tmp_path / "b.safetensors", detectron2_names()[1], manifest)
    with pytest.raises(UserError, match="says depth 34, its tensors 18"):
        read_backbone_tensors(tmp_path / "b.safetensors")


def test_an_artifact_without_its_first_convolution(tmp_path: Path) -> None:
    plain = detectron2_names()[1]
    del plain["conv1.weight"]
    save_backbone(tmp_path / "b.safetensors", plain, describe(ResNet(18), stem="imagenet", method="loco"))
    with pytest.raises(UserError, match=r"b\.safetensors: tensor 'conv1.weight' of every ResNet is missing"):
        read_backbone_tensors(tmp_path / "b.safetensors")


@pytest.mark.parametrize("shape", [(64, 128, 3, 3), (0, 64, 3, 3), (64, 0, 3, 3), (1, 64, 3, 3), (64,)])
def test_a_width_that_is_none(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        state = torchvision.models.resnet50().state_dict()
    state["layer1.0.conv2.weight"] = torch.empty(shape, device="meta")
    with pytest.raises(UserError, match=r"'layer1.0.conv2.weight' has shape .* not \[64, 64, 3, 3\]"):
        take_account("x", state, read=False)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"],
)
def test_architectures_are_told_from_shapes(name: str) -> None:
    with torch.device("meta"):
        shapes = getattr(torchvision.models, name)().state_dict()
    state = {key: torch.ones(()).expand(tensor.shape) for key, tensor in shapes.items()}
    state = {key: t.long() if key.endswith("num_batches_tracked") else t for key, t in state.items()}
    assert take_account("x", state)[0].architecture.name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet50d", "stem of three"),
        ("resnet50c", "stem of three"),
        ("resnet50_gn", "no running statistics"),
        ("seresnet50", "attention in its blocks"),
        ("resnet26", r"\[2, 2, 2, 2\] bottleneck blocks"),
        ("resnetv2_50", "pre-activation"),
        ("vit_tiny_patch16_224", "vision transformer"),
        ("efficientnet_b0", "holds no ResNet"),
    ],
)
def test_other_networks_are_refused_with_the_reason(name: str, said: str) -> None:
    with torch.device("meta"):
        shapes = pytest.importorskip("timm").create_model(name).state_dict()
    state = {key: torch.ones(()).expand(tensor.shape) for key, tensor in shapes.items()}
    with pytest.raises(UserError, match=said):
        take_account("x.pth", state)


def test_small_image_stems_are_refused_with_the_reason(tmp_path: Path) -> None:
    backbone = ResNet(18, stem="cifar")
    plain = {to_torchvision(k): v for k, v in backbone.state_dict().items() if "num_batches" not in k}
    save_backbone(tmp_path / "b.safetensors", plain, describe(backbone, stem="cifar", method="loco"))
    with pytest.raises(UserError, match=r"3x3 stem .* BACKBONE.STEM imagenet"):
        read_backbone_tensors(tmp_path / "b.safetensors")


def test_small_image_stems_of_lightly_are_refused() -> None:
    generator = pytest.importorskip("lightly.models").ResNetGenerator("resnet-18")
    with pytest.raises(UserError, match="3x3 stem"):
        take_account("x", {"state_dict": nn.Sequential(*list(generator.children())[:-1]).state_dict()})


def break_missing(state: dict) -> None:
    del state["layer2.0.bn1.running_mean"]


def break_missing_block(state: dict) -> None:
    for name in [name for name in state if name.startswith("layer3.1.")]:
        del state[name]


def break_unknown(state: dict) -> None:
    state["layer2.0.bn1.extra"] = torch.ones(1)


def break_unknown_head(state: dict) -> None:
    state["mystery.weight"] = torch.ones(1)


def break_unknown_block(state: dict) -> None:
    state["layer2.0.conv3.weight"] = torch.ones(1, 1, 1, 1)


def break_shape(state: dict) -> None:
    state["layer2.0.conv1.weight"] = torch.ones(64, 64, 3, 3)


def break_nan(state: dict) -> None:
    state["layer4.1.conv2.weight"][3, 2, 1, 0] = float("nan")


def break_inf(state: dict) -> None:
    state["layer1.0.bn2.weight"][5] = float("inf")


def break_dtype(dtype: torch.dtype) -> Callable[[dict], None]:
    def break_it(state: dict) -> None:
        state["layer1.0.bn2.weight"] = state["layer1.0.bn2.weight"].to(dtype)

    return break_it


def break_variance(state: dict) -> None:
    state["bn1.running_var"][0] = -1


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (break_missing, r"'layer2.0.bn1.running_mean' of a resnet18 is missing"),
        (break_missing_block, r"\[2, 2, 1, 2\] basic blocks"),
        (break_unknown, r"'layer2.0.bn1.extra' is unknown"),
        (break_unknown_head, r"'mystery.weight' is unknown"),
        (break_unknown_block, r"'layer2.0.conv3.weight' is unknown"),
        (break_shape, r"'layer2.0.conv1.weight' has shape \[64, 64, 3, 3\], not \[128, 64, 3, 3\]"),
        (break_nan, r"'layer4.1.conv2.weight' has NaN"),
        (break_inf, r"'layer1.0.bn2.weight' has NaN or infinite"),
        *(
            (break_dtype(getattr(torch, name)), rf"'layer1.0.bn2.weight' is {name}, not float32")
            for name in ("float64", "int64", "uint8", "bool", "complex64", "float8_e4m3fn")
        ),
        (break_variance, r"'bn1.running_var' has negative"),
    ],
)
def test_no_tensor_is_passed_over(break_it: Callable, said: str, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in resnet().state_dict().items()}
    break_it(state)
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    with pytest.raises(UserError, match=said) as refused:
        take_account(path, open_tensors(path))
    assert str(path) in str(refused.value)


def test_the_file_s_own_names_are_in_the_errors() -> None:
    file, _ = moco()
    del file["state_dict"]["module.encoder_q.layer1.0.bn1.bias"]
    with pytest.raises(UserError, match=re.escape("'state_dict:module.encoder_q.layer1.0.bn1.bias'")):
        take_account("x", file, "query")


def test_a_tensor_under_two_names_is_refused() -> None:
    file, _ = detectron2_c4()
    file["model"]["backbone.res5.0.conv1.weight"] = file["model"]["roi_heads.res5.0.conv1.weight"]
    with pytest.raises(UserError, match=r"roi_heads.res5.0.conv1.weight.* are the same tensor"):
        take_account("x", file)


def test_a_tensor_in_two_namings_is_refused() -> None:
    file, _ = lightly("moco", {"online": "backbone"})
    state = {k: v for k, v in file["state_dict"].items() if "momentum" not in k}
    state["backbone.conv1.weight"] = state["backbone.0.weight"]
    with pytest.raises(UserError, match=r"'state_dict:backbone.0.weight' and .* are the same tensor"):
        take_account("x", {"state_dict": state})


def test_an_unknown_prefix_is_never_guessed_but_can_be_named() -> None:
    state = resnet().state_dict()
    file = {"net": {**prefixed("trunk.", state), "head.weight": torch.ones(1)}}
    with pytest.raises(UserError, match=r"--branch net:trunk\."):
        take_account("x", file)
    account, _ = take_account("x", file, "net:trunk.")
    assert_converted(account, state)
    assert account.dropped["outside the branch"] == ["net:head.weight"]


def test_the_prefix_in_an_advice_can_be_typed_in_a_shell() -> None:
    file = {"my net": prefixed("trunk.", resnet().state_dict())}
    with pytest.raises(UserError) as refused:
        take_account("x", file)
    *_, option, prefix = shlex.split(str(refused.value))
    assert (option, take_account("x", file, prefix)[1].prefix) == ("--branch", "my net:trunk.")


def test_two_prefixes_are_never_chosen_between() -> None:
    states = [resnet(seed).state_dict() for seed in (0, 1)]
    file = {"state_dict": prefixed("a.", states[0]) | prefixed("b.", states[1])}
    with pytest.raises(UserError, match=r"holds 2 backbones; choose one with --branch state_dict:a\. or --branch"):
        take_account("x", file)
    with pytest.raises(UserError, match=r"has no branch 'c'; choose --branch"):
        take_account("x", file, "c")
    account, _ = take_account("x", file, "state_dict:b.")
    assert_converted(account, states[1])
    assert "other branch (state_dict:a.)" in account.dropped


def test_load_checkpoint_keeps_names_and_everything_else(tmp_path: Path) -> None:
    file, _ = detectron2_fpn()
    torch.save(file, tmp_path / "model_final.pth")
    loaded = read_checkpoint(tmp_path / "model_final.pth")
    assert loaded["iteration"] == 9
    assert torch.equal(loaded["optimizer"]["state"][0], torch.ones(1))
    assert loaded["model"].keys() == file["model"].keys()
    assert all(torch.equal(loaded["model"][name], file["model"][name]) for name in file["model"])
    torch.save(file["model"], tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "bare.pth")["model"].keys() == file["model"].keys()


def test_load_checkpoint_refuses_what_is_no_model(tmp_path: Path) -> None:
    for number, content in enumerate(({"model": {"a": 1}}, {"epoch": 3}, {"model": {}})):
        torch.save(content, tmp_path / f"{number}.pth")
        with pytest.raises(UserError, match="give a detector's checkpoint"):
            read_checkpoint(tmp_path / f"{number}.pth")


# --- beside and inside the backbone -----------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["SwAV or DeepCluster v2", "VICRegL"])
def test_d9_red_is_divided_by_0_228_where_the_code_says_so(row: str) -> None:
    (found,) = (source.pixels for source in SOURCES if source.name == row)
    assert found.std == pytest.approx((0.228 * 255, 0.224 * 255, 0.225 * 255))
    assert found.mean == pytest.approx((0.485 * 255, 0.456 * 255, 0.406 * 255))


def beside(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(3) for name in names}


MMDETECTION = beside("neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.weight")
RETINANET = beside("neck.fpn_convs.0.conv.weight", "bbox_head.retina_cls.weight")
MMSEGMENTATION = beside("decode_head.conv_seg.weight", "auxiliary_head.convs.0.conv.weight")
OTHER_HEADS = beside("decoder.0.weight", "metric.total")


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        *(("state_dict:backbone.", more) for more in (MMDETECTION, RETINANET, MMSEGMENTATION, OTHER_HEADS)),
        ("state_dict:module.encoder_q.", beside("module.foo.weight")),
        ("model:module.backbone.", beside("module.segmenter.weight", "module.projector.0.weight")),
    ],
    ids=["mmdetection", "retinanet", "mmsegmentation", "lightning", "moco", "barlow"],
)
def test_d4_the_prefix_takes_a_backbone_alone_whatever_stands_beside_it(prefix: str, more: dict) -> None:
    container, _, name = prefix.partition(":")
    state = resnet().state_dict()
    file = {container: prefixed(name, state) | more}
    with pytest.raises(UserError, match=rf"is unknown in .*--drop PATTERN, or .* --branch {re.escape(prefix)} "):
        take_account("x", file)
    account, chosen = take_account("x", file, prefix)
    assert_converted(account, state)
    assert (account.source, chosen.source) == ("unknown code base", None)
    assert sorted(account.dropped["outside the branch"]) == sorted(f"{container}:{key}" for key in more)


def test_d4_a_row_that_knows_the_whole_file_comes_before_one_that_does_not() -> None:
    """MMPretrain's marker is there, but the heads are a Lightning module's."""
    file = {"state_dict": prefixed("backbone.", resnet().state_dict()) | beside("head.fc.weight", "loss_fn.weight")}
    account, _ = take_account("x", file)
    assert account.source == "Lightning module"
    for case in CASES[:12]:  # while the rows' own files keep their rows, by the prefix too
        for branch in case.branches.split() if case.source != OWN else ():
            content = case.make()[0]
            _, chosen = take_account("x", content, branch, read=False)
            assert chosen.source.name == case.source
            assert take_account("x", content, chosen.prefix, read=False)[1] == chosen


def test_d4_a_branch_of_our_own_artifact_is_not_ignored(tmp_path: Path) -> None:
    net = ResNet(18, norm="BN")
    tensors = {to_torchvision(n): t for n, t in net.state_dict().items() if "num_batches" not in n}
    save_backbone(tmp_path / "b.safetensors", tensors, describe(net, stem="imagenet", method="loco"))
    with pytest.raises(UserError, match=r"is one backbone and nothing else; leave --branch out"):
        read_backbone_tensors(tmp_path / "b.safetensors", "teacher")


OTHER_NETWORKS = {
    "a vision transformer": beside("cls_token", "patch_embed.proj.weight"),
    "a resnet-d": beside("conv1.0.weight", "conv1.3.weight", "layer1.0.conv1.weight"),
    "SE blocks": beside("layer1.0.se.fc1.weight"),
    "a ConvNeXt": beside("stages.0.blocks.0.conv_dw.weight"),
}


@pytest.mark.parametrize("kind", OTHER_NETWORKS)
def test_d5_another_network_beside_the_chosen_branch_is_no_matter(kind: str) -> None:
    state = backbone_of(resnet().state_dict())
    file = {"student": prefixed("module.backbone.", state)}
    file["teacher"] = prefixed("module.backbone.", OTHER_NETWORKS[kind])
    assert_converted(take_account("x", file, "student")[0], state)
    both = prefixed("a.", state) | prefixed("b.", OTHER_NETWORKS[kind])
    assert_converted(take_account("x", {"net": both}, "net:a.")[0], state)
    with pytest.raises(UserError, match=r"shows that it|holds no ResNet"):
        take_account("x", {"net": prefixed("b.", OTHER_NETWORKS[kind])})


def test_d5_the_encoder_of_a_unet() -> None:
    state = resnet().state_dict()
    decoder = beside("decoder.blocks.0.conv1.0.weight", "decoder.blocks.0.conv1.3.weight", "segmentation_head.0.weight")
    account, _ = take_account("x", prefixed("encoder.", state) | decoder, "encoder.")
    assert_converted(account, state)
    assert sorted(account.dropped["outside the branch"]) == sorted(decoder)


def test_d6_heads_inside_the_resnet_are_left_out_only_when_named(tmp_path: Path) -> None:
    state = randomised(torchvision.models.resnet18()).state_dict()
    heads = beside("pool_conv_block1.0.weight", "layer3.fpn_lateral.weight", "layer3.fpn_lateral.bias")
    torch.save(state | heads, tmp_path / "heads.pth")
    arguments = [str(tmp_path / "heads.pth"), str(tmp_path / "out.pkl")]
    for read in (read_backbone_tensors, read_backbone):  # for commands without --drop; --branch would not help
        with pytest.raises(UserError, match=rf"loco-det convert {tmp_path}/heads.pth backbone.pkl --drop PATTERN$"):
            read(tmp_path / "heads.pth")
    assert run_job("convert", arguments) == 2
    assert run_job("convert", [*arguments, "--drop", "pool_conv_block*"]) == 2
    assert run_job("convert", [*arguments, "--drop", "pool_conv_block*", "--drop", "*.fpn_*"]) == 0
    tensors, manifest = read_backbone_tensors(tmp_path / "out.pkl")
    expected = {to_detectron2(name): tensor for name, tensor in backbone_of(state).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert manifest.dropped == {
        "as asked by --drop pool_conv_block*": ["pool_conv_block1.0.weight"],
        "as asked by --drop *.fpn_*": ["layer3.fpn_lateral.weight", "layer3.fpn_lateral.bias"],
    }


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("layer3.*", r"takes 'layer3.0.conv1.weight', which the backbone needs"), ("nothing*", "matches no tensor")],
)
def test_d6_a_pattern_must_match_and_may_not_take_the_backbone(pattern: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        take_account("x", resnet().state_dict(), drop=[pattern])
