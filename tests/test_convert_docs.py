"""Every command of docs/conversion.md runs unchanged, on a checkpoint of its layout."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from convert_cases import prefixed
from convert_layouts import CASES, Case, backbone_of, moco, resnet
from test_convert_sources import documented

from loco_det.backbones.names import to_detectron2
from loco_det.cli import run_job
from loco_det.convert import Stated, read_backbone, read_backbone_tensors
from loco_det.convert import inspect as inspection
from loco_det.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
D2_CONFIG = """
INPUT: {FORMAT: BGR}
MODEL:
  PIXEL_MEAN: [103.53, 116.28, 123.675]
  PIXEL_STD: !!python/tuple [1.0, 1.0, 1.0]
  RESNETS: {STRIDE_IN_1X1: true, DEPTH: 18}
"""


def documented_lines() -> list[str]:
    """Every line of a shell block that starts the converter, its comment left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "conversion.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("loco-det convert ")]


LINES = documented_lines()


def detector() -> tuple[dict, dict]:
    """mmdetection: a RetinaNet beside the backbone, which no row knows."""
    state, heads = backbone_of(resnet().state_dict()), {"bbox_head.retina_cls.weight": torch.ones(3)}
    return {"meta": {}, "state_dict": prefixed("backbone.", state) | heads}, {"state_dict:backbone.": state}


def blockwise() -> tuple[dict, dict]:
    """facebookresearch/blockwise_ssl: a head of its own behind each stage, inside the ResNet."""
    state = resnet().state_dict()
    return state | {"pool_conv_block1.0.weight": torch.ones(3)}, {"model": state}


NO_ROW = "unknown code base"
OTHERS = [
    Case(NO_ROW, "detector.pth", "state_dict:backbone.", detector),
    Case("torchvision or timm ResNet", "blockwise.pth", "model", blockwise),
]
BY_FILE = {case.file: case for case in (*CASES, *OTHERS)}


def test_every_source_of_the_table_has_a_line() -> None:
    shown = {BY_FILE[shlex.split(line)[2]].source for line in LINES}
    assert shown == {case.source for case in CASES} | {NO_ROW}
    assert shown - {NO_ROW} == documented().keys() - {"source"}
    assert len(LINES) == len(set(LINES))


@pytest.mark.parametrize("line", LINES)
def test_the_line_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, *arguments = shlex.split(line)
    case: Case = BY_FILE[arguments[0]]
    _, branches = case.write(tmp_path)
    (tmp_path / "config.yaml").write_text(D2_CONFIG)
    assert run_job("convert", arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    if "--inspect" in arguments:
        assert [path.name for path in tmp_path.iterdir() if path.name != "config.yaml"] == [arguments[0]]
        return
    branch = arguments[arguments.index("--branch") + 1] if "--branch" in arguments else next(iter(branches))
    expected = backbone_of(branches[branch])
    found, manifest = read_backbone_tensors(arguments[1])
    assert found.keys() == {to_detectron2(name) for name in expected}
    assert all(torch.equal(found[to_detectron2(name)], tensor) for name, tensor in expected.items())
    assert "proof: matplotlib's grace_hopper.jpg (128 x 150)" in printed
    if manifest is not None:
        assert manifest.channel_order == ("BGR" if {"BGR", "--d2-config", "R-50.pkl"} & set(arguments) else "RGB")


def test_the_documented_account_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, _ = BY_FILE["moco_v2_800ep_pretrain.pth.tar"].write(tmp_path)
    assert run_job("convert", [str(path), str(tmp_path / "out.pkl"), "--branch", "query"]) == 0
    page = (ROOT / "docs" / "conversion.md").read_text()
    (block,) = re.findall(r"^```\n(source .*?)\n\.\.\.\n```", page, re.MULTILINE | re.DOTALL)
    assert capsys.readouterr().out.startswith(block)


# --- --inspect ---------------------------------------------------------------------------------------------------


def test_the_documented_report_is_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of the page's example, up to its dots; the file's size depends on torch's release."""
    monkeypatch.chdir(tmp_path)
    BY_FILE["moco_v2_800ep_pretrain.pth.tar"].write(tmp_path)
    page = (ROOT / "docs" / "conversion.md").read_text()
    example = page[page.index("file       moco_v2_800ep") :].partition("```")[0].splitlines()
    printed = inspection.inspect("moco_v2_800ep_pretrain.pth.tar").lines()
    for line in example:
        start = re.sub(r", [\d,]+ bytes.*|\.\.\.$", "", line)
        assert any(found.startswith(start) for found in printed), line


def test_inspection_of_our_own_file(tmp_path: Path) -> None:
    path, _ = BY_FILE["backbone.safetensors"].write(tmp_path)
    report = inspection.inspect(path)
    assert json.loads(json.dumps(report.facts())) == report.facts()
    assert report.manifest["method"] == "loco"
    assert report.backbones[0]["source"] == "loco_det (loco)"
    assert "resnet18 by loco" in "\n".join(report.lines())


def test_inspection_reads_no_value(tmp_path: Path) -> None:
    """A file whose tensors are all damaged is still reported, because no value is read."""
    path = tmp_path / "c.pth"
    file = {"state_dict": {k: v for k, v in moco()[0]["state_dict"].items() if "encoder_k" not in k}, "epoch": 7}
    torch.save(file, path)
    content = bytearray(path.read_bytes())
    values = file["state_dict"]["module.encoder_q.conv1.weight"].numpy().tobytes()
    content[content.index(values) + 100] ^= 1
    path.write_bytes(content)
    report = inspection.inspect(path)
    assert report.backbones[0]["architecture"] == "resnet18"
    assert report.metadata["epoch"] == 7
    assert report.kind == "torch (zip)"


def test_inspection_of_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"weight": torch.ones(3, 3), "note": "x" * 200}, tmp_path / "linear.pth")
    assert run_job("convert", [str(tmp_path / "linear.pth"), "--inspect"]) == 0
    printed = capsys.readouterr().out
    assert "none: " in printed
    assert "holds no ResNet backbone" in printed
    assert "weight [3, 3]" in printed
    state = {k: v.double() for k, v in BY_FILE["resnet50-11ad3fa6.pth"].make()[0].items()}
    torch.save(state, tmp_path / "double.pth")
    (record,) = inspection.inspect(tmp_path / "double.pth").backbones
    assert "'conv1.weight' is float64, not float32" in record["problem"]


def test_inspection_and_conversion_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_job("convert", ["a.pth", "b.pkl", "--inspect"]) == 2
    assert "--inspect writes nothing" in capsys.readouterr().err
    assert run_job("convert", ["a.pth"]) == 2
    assert "give an OUTPUT" in capsys.readouterr().err
    assert run_job("convert", [str(tmp_path / "absent.pth"), "--inspect"]) == 2
    assert "absent.pth: cannot be read" in capsys.readouterr().err


# --- --d2-config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (D2_CONFIG.replace("INPUT: {FORMAT: BGR}\n", ""), "does not set INPUT.FORMAT"),
        (D2_CONFIG.replace("STRIDE_IN_1X1: true, ", ""), "does not set MODEL.RESNETS.STRIDE_IN_1X1"),
        (D2_CONFIG.replace("true", "7"), "STRIDE_IN_1X1 7 is neither true nor false"),
        (D2_CONFIG.replace("[103.53, 116.28, 123.675]", "[1.0, 2.0]"), "PIXEL_MEAN"),
        (D2_CONFIG.replace("[103.53, 116.28, 123.675]", "[a, b, c]"), "PIXEL_MEAN"),
        (D2_CONFIG.replace("BGR", "YUV"), "INPUT.FORMAT 'YUV' is neither RGB nor BGR"),
        (D2_CONFIG.replace("BGR", "null"), "INPUT.FORMAT None is neither RGB nor BGR"),
        (
            D2_CONFIG.replace("[103.53, 116.28, 123.675]", "[0.406, 0.456, 0.485]"),
            "MODEL.PIXEL_MEAN 0.406 .* from 0 to 1",
        ),
        (D2_CONFIG.replace("[103.53, 116.28, 123.675]", "[.inf, 1.0, 1.0]"), r"MODEL.PIXEL_MEAN .*inf.* must be"),
        (D2_CONFIG.replace("tuple [1.0, 1.0, 1.0]", "tuple [0.225, 0.224, 0.229]"), "give MODEL.PIXEL_STD 57.375 "),
        (D2_CONFIG.replace("tuple [1.0, 1.0, 1.0]", "tuple [0, 1, 1]"), r"MODEL.PIXEL_STD .* three positive"),
    ],
)
def test_a_detectron2_configuration_that_does_not_say_it(tmp_path: Path, text: str, said: str) -> None:
    path, _ = BY_FILE["model_final.pth"].write(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=f"config.yaml: .*{said}"):
        read_backbone(path, stated=Stated.from_d2_config(tmp_path / "config.yaml"))
