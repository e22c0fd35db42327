"""What a release is made of: one version, the recipe's requirements, the container's and the workflow's lines."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import loco_det
from loco_det import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch", "opencv-python-headless": "py-opencv", "matplotlib": "matplotlib-base"}
NOT_IN_CONDA = {"hotcoco"}


def distribution(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group()


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "loco_det.__version__"}
    assert f"\nversion: {loco_det.__version__}\n" in (ROOT / "CITATION.cff").read_text()  # which cannot refer to it


def test_the_package_is_typed() -> None:
    assert (ROOT / "loco_det" / "py.typed").read_bytes() == b""
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["loco_det"]
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_classifiers_name_the_versions_of_python_that_are_allowed() -> None:
    found = [c.rpartition(":: ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert found[0] == PROJECT["requires-python"].removeprefix(">=")


def test_the_conda_recipe_requires_what_the_wheel_does() -> None:
    text = (ROOT / "conda" / "meta.yaml").read_text()
    recipe = yaml.safe_load(re.sub(r"{%.*?%}|{{.*?}}", "", text, flags=re.DOTALL))
    run = {distribution(line) for line in recipe["requirements"]["run"]} - {"python"}
    wheel = {distribution(line) for line in PROJECT["dependencies"]} - NOT_IN_CONDA
    assert run == {CONDA_NAMES.get(name, name) for name in wheel}
    for name in NOT_IN_CONDA:
        assert f'pip install "{next(d for d in PROJECT["dependencies"] if distribution(d) == name)}"' in text
    assert recipe["build"]["entry_points"] == [f"{name} = {at}" for name, at in PROJECT["scripts"].items()]
    (pattern,) = re.findall(r"regex_pattern='(.*?)'", text)
    assert re.search(pattern, (ROOT / "loco_det" / "__init__.py").read_text()).group(1) == loco_det.__version__


def test_the_containers_commands_are_there() -> None:
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["ARG", "FROM", "COPY", "RUN", "RUN", "RUN", "ENTRYPOINT", "CMD"]
    for line in lines:
        words = shlex.split(line)
        if words[:2] == ["RUN", "loco-det"]:
            assert words[2] in cli.JOBS
            cli._parsed(cli._parser(words[2], words[2]), words[3:])


def test_the_workflow_tests_what_it_publishes() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())["jobs"]
    steps = "\n".join(str(step.get("run", "")) for step in jobs["build"]["steps"])
    for line in ("python -m build", "twine check --strict dist/*", "bin/pytest -m quick", "loco_det.__version__"):
        assert line in steps
    assert jobs["publish"]["needs"] == "build"


@pytest.mark.parametrize("folder", ["tests", "docs", "configs", "tools", "benchmarks", "conda"])
def test_the_source_distribution_has_what_the_tests_read(folder: str) -> None:
    assert f"graft {folder}\n" in (ROOT / "MANIFEST.in").read_text()
