"""The house rules: who may import whom, what an import may do, and the contracts that users build on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
ENTRY = re.compile(r"^- `([\w/]+\.py)`:.*\n(?:  .*\n)*", re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

CORE = {"loco_det", "loco_det.core"}
# What the modules of each room may import of this project besides their own room; docs/architecture.md says why.
MAY_IMPORT = {
    "loco_det": set(),
    "loco_det.core": {"loco_det"},
    "loco_det.backbones": CORE,
    "loco_det.images": CORE,
    "loco_det.annotations": CORE | {"loco_det.images"},
    "loco_det.evaluation": CORE | {"loco_det.annotations"},
    "loco_det.convert": CORE | {"loco_det.backbones", "loco_det.images.decode"},
    "loco_det.evaluation.probes": CORE
    | {f"loco_det.{room}" for room in ("backbones", "images", "annotations", "evaluation", "convert")},
    "loco_det.report": CORE | {f"loco_det.{room}" for room in ("backbones", "images", "annotations", "evaluation")},
    "loco_det.detection": CORE | {f"loco_det.{room}" for room in ("backbones", "annotations", "evaluation", "convert")},
    "pretrain": CORE
    | {f"loco_det.{name}" for name in ("backbones", "images", "annotations.subsets", "evaluation.knn", "convert.load")},
    "loco_det.paper": CORE
    | {f"loco_det.{room}" for room in ("annotations", "backbones", "images", "report", "detection")}
    | {"pretrain"},
    "loco_det.commands": CORE
    | {f"loco_det.{room}" for room in ("backbones", "images", "annotations", "evaluation", "convert", "report")}
    | {"loco_det.detection", "loco_det.paper", "loco_det.arguments", "pretrain"},
    "loco_det.cli": CORE | {"loco_det.arguments"},
    "loco_det.__main__": {"loco_det.cli"},
    "loco_det.arguments": set(),
    "loco_det.api": CORE
    | {f"loco_det.{room}" for room in ("backbones", "annotations", "evaluation", "convert", "detection")}
    | {"loco_det.commands.probe", "loco_det.arguments"},
}
# The import name of a distribution, where the two differ.
OPTIONAL = {
    "submitit",
    "webdataset",
    "datasets",
    "shapely",
    "onnx",
    "onnxruntime",
    "wandb",
    "sklearn",
    "pandas",
    "transformers",
    "shtab",
}  # extras, imported when they are called for
IMPORTED_AS = {"pyyaml": "yaml", "pillow": "PIL", "opencv-python-headless": "cv2"}


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(f): f for folder in ("loco_det", "pretrain") for f in sorted((ROOT / folder).rglob("*.py"))}


def imports(module: str, *, at_import: bool = False) -> Iterator[str]:
    """Every module that `module` imports, wherever in the file; with `at_import` only those outside functions."""
    todo: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    while todo:
        node = todo.pop()
        if at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole name"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in FILES else node.module for name in inside)


def room(module: str) -> str:
    """The row of MAY_IMPORT that a module falls under: the longest that fits."""
    found = [name for name in MAY_IMPORT if f"{module}.".startswith(f"{name}.")]
    assert module == "loco_det" or found not in ([], ["loco_det"]), (
        f"{module} is in no room; add a row to MAY_IMPORT and to docs/architecture.md"
    )
    return max(found, key=len)


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("loco_det", "pretrain")


# --- imports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module: str) -> None:
    here = room(module)
    for target in filter(is_ours, imports(module)):
        parts = target.split(".")
        rooms = {".".join(parts[:i]) for i in range(1, len(parts))} - {"loco_det"} | {target}
        allowed = MAY_IMPORT[here] | ({here} if here != "loco_det" else set())
        assert rooms & allowed, f"{module} must not import {target}"


def test_the_walk_sees_what_it_should() -> None:
    """Guards the test above against finding nothing."""
    assert "loco_det.detection.train" in set(imports("loco_det.commands.train"))
    assert "loco_det.core.log" in set(imports("loco_det.cli"))
    assert "loco_det.core.log" not in set(imports("loco_det.cli", at_import=True))
    assert len(FILES) > 40


def test_one_command_knows_pretrain_and_the_plan_of_the_paper() -> None:
    knows = {m for m in FILES if m.startswith("loco_det") and any(i.startswith("pretrain") for i in imports(m))}
    assert knows == {"loco_det.commands.pretrain", "loco_det.paper.costs", "loco_det.paper.settings"}


def test_one_file_imports_detectron2_and_only_when_called() -> None:
    knows = {m for m in FILES if any(i.partition(".")[0] == "detectron2" for i in imports(m))}
    assert knows == {"loco_det.detection.engine_d2"}
    assert not any(i.startswith("detectron2") for i in imports("loco_det.detection.engine_d2", at_import=True))


def test_there_is_no_circle_not_even_through_imports_inside_functions() -> None:
    TopologicalSorter({m: {i for i in imports(m) if i in FILES and i != m} for m in FILES}).prepare()


def test_there_is_no_circle_of_rooms() -> None:
    rooms = {
        here: {room(i) for m in FILES if room(m) == here for i in imports(m) if i in FILES} - {here}
        for here in MAY_IMPORT
    }
    TopologicalSorter(rooms).prepare()


def test_the_locks_of_posix_are_taken_for_granted() -> None:
    """Half of the project cannot run without fcntl, so no part of it makes provision for that."""
    knows = {m for m in FILES if "fcntl" in set(imports(m))}
    top = {
        m for m in FILES if any(ast.unparse(node) == "import fcntl" for node in ast.parse(FILES[m].read_text()).body)
    }
    assert knows == top == {"loco_det.core.files", "loco_det.core.run_folder", "loco_det.core.jobs"}
    assert "Operating System :: POSIX" in PROJECT["project"]["classifiers"]


def test_dependencies_are_those_that_are_imported() -> None:
    declared = {re.match(r"[\w-]+", line).group() for line in PROJECT["project"]["dependencies"]}
    roots = {i.partition(".")[0] for m in FILES for i in imports(m) if not is_ours(i)}
    used = roots - set(sys.stdlib_module_names) - {"detectron2"} - OPTIONAL
    assert used == {IMPORTED_AS.get(name, name) for name in declared}
    at_import = {i.partition(".")[0] for m in FILES for i in imports(m, at_import=True)}
    assert not at_import & OPTIONAL, "what an extra brings is imported only when called"
    page = (ROOT / "docs" / "dependencies.md").read_text()
    extras = {
        re.match(r"[\w-]+", line).group()
        for lines in PROJECT["project"]["optional-dependencies"].values()
        for line in lines
    }
    for name in declared | extras - {"loco_det"}:
        assert f"`{name}`" in page, f"docs/dependencies.md gives no reason for {name}"


PROBE = """
import logging, os, random, signal, sys, warnings
import numpy, torch, cv2, timm, fvcore.common.registry, matplotlib, rich.progress  # it draws a random number
from timm.models import _registry

def state():
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "filters": list(warnings.filters),
        "root log": list(logging.getLogger().handlers),
        "our log": list(logging.getLogger("loco_det").handlers),
        "random": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "torch": torch.random.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), cv2.getNumThreads()),
        "dtype": torch.get_default_dtype(),
        "timm": len(_registry._model_entrypoints),
        "backend": matplotlib.rcParams._get_backend_or_none(),
        "path": list(sys.path),
        "stdout": sys.stdout,
    }

before = state()
registered = []
fvcore.common.registry.Registry._do_register = lambda self, name, thing: registered.append(name)
for module in sys.argv[1:]:
    __import__(module)
after = state()
assert before == after, [k for k in before if before[k] != after[k]]
assert not registered, registered
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
assert "detectron2" not in sys.modules
"""


def test_importing_everything_does_nothing() -> None:
    command = [sys.executable, "-W", "error", "-c", PROBE, *FILES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


# --- contracts --------------------------------------------------------------------------------------------------

CONTRACT = [
    *("setup.py", "pyproject.toml", ".pre-commit-config.yaml", ".ci/run"),
    *("README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("tools/pretrain_net.py", "tools/convert_to_d2.py", "tools/train_net.py"),
    *("configs/coco_loco_r50.yaml", "configs/pretrain/loco_r50.yaml"),
    *(f"docs/{page}.md" for page in ("architecture", "dependencies", "datasets", "engines", "pretraining")),
    *(f"docs/{page}.md" for page in ("conversion", "evaluation")),
]


@pytest.mark.parametrize("path", CONTRACT)
def test_a_file_that_is_promised_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


def sentence(file: str) -> str:
    """The entry of a file in docs/architecture.md: its docstring's first paragraph."""
    said = ast.get_docstring(ast.parse((ROOT / file).read_text())).split("\n\n")[0]
    text = f"`{file}`: {' '.join(said.split())}"
    return textwrap.fill(
        text, 120, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def with_sentences(page: str) -> str:
    """The page with the sentence of every file that it lists taken from that file."""
    return ENTRY.sub(lambda entry: sentence(entry[1]) + "\n", page)


def test_the_architecture_page_has_every_files_own_sentence() -> None:
    page = ARCHITECTURE.read_text()
    files = {f.relative_to(ROOT).as_posix() for f in FILES.values() if f.stem != "__init__"}
    files |= {f"tools/{f.name}" for f in (ROOT / "tools").glob("*.py")}
    listed = ENTRY.findall(page)
    assert len(listed) == len(set(listed)), "files that are listed twice"
    assert set(listed) == files
    assert page == with_sentences(page), "run: python tests/test_architecture.py"


@pytest.mark.parametrize("tool", sorted(f.name for f in (ROOT / "tools").glob("*.py")))
def test_tools_parse_call_and_exit(tool: str) -> None:
    text = (ROOT / "tools" / tool).read_text()
    assert len(text.splitlines()) <= 25
    tree = ast.parse(text)
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For))]
    assert "run_job(" in text


def test_pretraining_keys_are_those_promised() -> None:
    from pretrain.defaults import get_cfg

    promised = {
        "": "METHOD UNITS SEED DEVICE OUTPUT_DIR",
        "BACKBONE": "NAME STEM",
        "DECODER": "CONV_BLOCKS MLP_LAYERS HIDDEN_DIM OUT_DIM",
        "LOSS": "TEMPERATURE",
        "DATA": "PATH FORMAT IMAGE_SIZE NUM_WORKERS",
        "AUGMENT": "",
        "SOLVER": "OPTIMIZER BASE_LR WEIGHT_DECAY BATCH_SIZE EPOCHS MAX_STEPS WARMUP_EPOCHS AMP",
    }
    cfg = get_cfg()
    for section, keys in promised.items():
        assert set(keys.split()) <= set((cfg[section] if section else cfg).keys())


CONFIGS = sorted(f.relative_to(ROOT).as_posix() for f in (ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_opens_with_what_it_is_and_how_it_is_run(path: str) -> None:
    lines = (ROOT / path).read_text().splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line)
    text = "\n".join(header)
    assert header, "no header"
    if Path(path).name.startswith("base_") and "A base" in text:
        return
    for word in ("Command:", "Hardware:", "Result:"):
        assert re.search(rf"^# *{word} +\S", text, re.MULTILINE), f"{path}: no {word}"
    named = re.findall(r"--config-file (\S+)", text)
    if not Path(path).name.startswith("base_"):
        assert path in named or "quickstart" in path or "evidence" in path, f"{path}: its command runs another file"
    for other in named:
        assert (ROOT / other).is_file(), f"{path} names {other}, which is not there"


def test_the_wheel_gets_every_package_and_data_file() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {p: Path(setuptools["package-dir"].get(p, p.replace(".", "/"))) for p in setuptools["packages"]}
    on_disk = {f.parent.relative_to(ROOT) for f in FILES.values()}
    on_disk |= {Path(path).parent for path in CONFIGS}
    assert set(folders.values()) == on_disk
    files = [
        f for top in ("loco_det", "configs") for f in (ROOT / top).rglob("*") if f.suffix in (".yaml", ".j2", ".typed")
    ]
    taken = [
        f for p, patterns in setuptools["package-data"].items() for x in patterns for f in (ROOT / folders[p]).glob(x)
    ]
    assert sorted(taken) == sorted(files)
    assert PROJECT["project"]["scripts"] == {"loco-det": "loco_det.cli:main"}


def test_the_readmes_commands_are_single_lines_that_ci_finds() -> None:
    readme = (ROOT / "README.md").read_text()
    for mark, end in (("quickstart command", "quickstart --out "), ("test command", "pytest")):
        (line,) = re.findall(rf"<!-- {mark} -->\n+```\w*\n(.*)\n```", readme)
        assert line.startswith("python3 -m venv ")
        assert end in line
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text()


def tracked() -> list[str]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    except OSError:
        return []
    return [path for path in done.stdout.split("\0") if path and (ROOT / path).is_file()]


def test_no_file_speaks_of_one_machine() -> None:
    if not tracked():
        pytest.skip("not a git checkout")
    absolute = r"(?<![\w.<])/(?:work|root|home|Users|mnt|scratch)/\w"
    machine, ci = re.compile(absolute + r"|\.\./shared"), re.compile(absolute)
    for path in tracked():
        text = (ROOT / path).read_bytes().decode(errors="ignore")
        found = (ci if path == ".ci/run" else machine).search(text)
        assert not found, f"{path}: {found.group()}"


if __name__ == "__main__":
    ARCHITECTURE.write_text(with_sentences(ARCHITECTURE.read_text()))
