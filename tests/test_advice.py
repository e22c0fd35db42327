"""Advice that works: what a message names, command, option, package or file, is there for a user of the package."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loco_det import cli
from loco_det.core.config import packaged_configs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = sorted([*(ROOT / "loco_det").rglob("*.py"), *(ROOT / "pretrain").rglob("*.py")])
FILLED = "FILLED"  # for what a message puts in


def messages() -> Iterator[tuple[str, str]]:
    """(file and line, text) of every text in the code that is no docstring; formatted values are `FILLED`."""
    for file in FILES:
        tree = ast.parse(file.read_text())
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
            id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
        }
        for node in ast.walk(tree):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else FILLED for part in node.values)
                yield place, "".join(map(str, parts))
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and id(node) not in documentation | inside
            ):
                yield place, node.value


TEXTS = list(messages())
COMMAND = re.compile(r"(?<!that )loco-det ([a-z]\w*)((?: (?:--[a-z-]+|[A-Z]+(?:\.[A-Z_]+)*|\S*FILLED\S*|[\w.'*/-]+))*)")


def test_the_walk_finds_messages() -> None:
    texts = [text for _, text in TEXTS]
    assert any("loco-det convert FILLED backbone.pkl" in text for text in texts)
    assert any("pip install 'loco_det[onnx]'" in text for text in texts)
    assert not any("Raises:" in text for text in texts)


def test_every_command_and_option_exists() -> None:
    found = [(place, *match) for place, text in TEXTS for match in COMMAND.findall(text)]
    assert len(found) > 15
    for place, command, rest in found:
        if command == "wrote":  # a sentence about it
            continue
        assert command in cli.JOBS, f"{place}: there is no command loco-det {command}"
        known = cli._parser(command, command)._option_string_actions
        for option in re.findall(r"--[a-z][a-z0-9-]*", rest):
            assert option in known, f"{place}: loco-det {command} has no option {option}"


def test_every_option_alone_is_one_of_some_command() -> None:
    known = {option for name in cli.JOBS for option in cli._parser(name, name)._option_string_actions}
    known |= {"--version", "--completion"}
    others = {
        "--shm-size",
        "--upgrade",
        "--force-reinstall",
        "--standalone",
        "--nproc-per-node",
    }  # docker, pip, torchrun
    for place, text in TEXTS:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text):
            assert option in known | others, f"{place}: no command has {option}"


def test_every_package_is_a_dependency_or_an_extra_that_brings_it() -> None:
    extras = PROJECT["optional-dependencies"]
    distributions = {
        re.match(r"[\w-]+", line).group() for lines in (PROJECT["dependencies"], *extras.values()) for line in lines
    } | {"loco_det"}
    found = [(place, rest) for place, text in TEXTS for rest in re.findall(r"pip install ([^;,()]+)", text)]
    assert len(found) > 5
    for place, rest in found:
        for word in shlex.split(rest.rstrip(".") + ("'" if rest.count("'") % 2 else "")):
            if word.startswith("--") or word in ("or", "run", "and", "FILLED"):
                continue
            name, _, extra = word.strip("'\".").partition("[")
            if name not in distributions:
                break  # the sentence goes on
            assert not extra or extra.rstrip("]") in extras, f"{place}: there is no extra {extra}"


def test_every_configuration_named_is_in_the_package() -> None:
    known = packaged_configs()
    for place, text in TEXTS:
        for name in re.findall(r"configs/[\w/]+\.yaml", text):
            assert name in known or FILLED in name, f"{place}: {name} is not there"


def test_no_message_names_what_only_a_checkout_has() -> None:
    for place, text in TEXTS:
        assert not re.search(r"\b(docs|tools|tests|benchmarks)/\w+\.\w+", text), f"{place}: {text}"


@pytest.mark.parametrize("name", cli.JOBS)
def test_help_names_no_such_thing_either(name: str) -> None:
    text = cli._parser(name, name).format_help()
    assert not re.search(r"\b(docs|tools|tests)/\w+\.\w+", text)


# --- the documentation ------------------------------------------------------------------------------------------


def documented() -> Iterator[tuple[str, str]]:
    """(page, command line) of every `loco-det` in the code blocks of README and docs, without variables."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for block in re.findall(r"```(?:sh|text|bash)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:^|[ /&])(loco-det [a-z].*)", line)
                if found and not re.search(r"\.\.\.|\[|\$", found[1]):
                    yield str(page.relative_to(ROOT)), found[1]


LINES = list(documented())


def test_the_pages_have_commands() -> None:
    assert len(LINES) > 40
    assert {page for page, _ in LINES} >= {"README.md", "docs/predict.md", "docs/is_my_backbone_good.md"}


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(LINES)])
def test_a_documented_command_has_arguments_that_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    for stop in ("|", "||", "&&", ";", ">", "&"):
        words = words[: words.index(stop)] if stop in words else words
    assert words[0] in cli.JOBS, f"{page}: {line}"
    args = cli._parsed(cli._parser(words[0], words[0]), words[1:])  # SystemExit for an option that is not there
    for file in getattr(args, "config_file", []):
        assert not file.startswith("configs/") or file in packaged_configs(), f"{page}: {line}"
