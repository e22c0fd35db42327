"""Configuration files: one loader for detection (Detectron2's YAML) and for pretraining.

A file is read as plain data and merged over a tree of defaults, in this order: defaults, `_BASE_` files, the
file itself, `KEY VALUE` overrides. The result is a frozen fvcore `CfgNode`, so `cfg.SOLVER.BASE_LR` works
and code written for Detectron2 can take it. Nothing in a file is ever constructed or called.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import shlex
from ast import literal_eval
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from fvcore.common.config import BASE_KEY, CfgNode

from loco_det.core.errors import UserError
from loco_det.core.files import read_regular

_YAML_TAG = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float")
_PYTHON_SCALARS = {"none": "null", "long": "int"}  # names that YAML spells differently
# Far above any real file; stops a few lines of nested aliases from exhausting memory.
MAX_NODES = 200_000
MAX_BYTES = 1 << 20  # likewise; the reader takes a second for each megabyte
MAX_DIGITS = 100  # of a number as it is written
MAX_BASES = 100  # files of which each is the base of the next
# Sections that only one kind of configuration has, by the command that takes it.
_SECTIONS = {
    "pretrain": ("METHOD", "UNITS", "BACKBONE", "DECODER", "LOSS", "DATA", "AUGMENT", "KNN"),
    "train": ("MODEL", "DATASETS", "DATALOADER", "INPUT", "TEST"),
}
_SORTS = {"pretrain": "pretraining", "train": "detection"}


class Setting(NamedTuple):
    """A value that the user set, and its origin: "file.yaml, line 3" or "the command line"."""

    value: Any
    origin: str


Settings = Mapping[str, Setting]
"""What the user set, by dotted key."""


def load_config(
    defaults: CfgNode, path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()
) -> tuple[CfgNode, Settings]:
    """Merge YAML files and `KEY VALUE` overrides over a copy of `defaults`.

    Args:
        defaults: every legal key with its default value, which decides names and types; not changed.
        path: the YAML file, resolved by `find_config`, or several, of which later ones win; "" for the defaults alone.
        overrides: [key, value, key, value, ...], values as text, e.g. ["SOLVER.BASE_LR", "0.1"].

    Returns:
        A frozen CfgNode, and the user's settings with their origin: {"SOLVER.BASE_LR": Setting(0.1, "a.yaml, line 3")}.

    Raises:
        UserError: naming file, line and key, for a file that is missing or not YAML, a key that appears twice
            or does not exist, a value of the wrong type, or a file for another command.
    """
    settings: dict[str, Setting] = {}
    for file in [path] if isinstance(path, (str, Path)) else path:
        found = read_settings(file) if file else {}
        _check_sort(defaults, found, file)
        settings.update(found)
    if len(overrides) % 2:
        raise UserError(
            f"Overrides come as KEY VALUE pairs separated by a space, and {overrides[-1]!r} has no partner."
        )
    for key, text in zip(overrides[::2], overrides[1::2]):
        if key == BASE_KEY:
            raise UserError(f"{BASE_KEY} can be set in a file only, not on the command line.")
        settings[key] = Setting(_decode(text), "the command line")
    cfg = defaults.clone()
    cfg.defrost()
    for key, setting in settings.items():
        _assign(cfg, key, setting)
    cfg.freeze()
    return cfg, settings


def _check_sort(defaults: CfgNode, settings: Settings, file: str | Path) -> None:
    """Refuse a file of pretraining's keys for detection, and the reverse."""
    for command, sections in _SECTIONS.items():
        others = [
            key for key in settings if key.partition(".")[0] in sections and key.partition(".")[0] not in defaults
        ]
        if others:
            raise UserError(
                f"{file}: this is a {_SORTS[command]} file ({settings[others[0]].origin}: {others[0]}); "
                f"use loco-det {command} --config-file {file}"
            )


def read_settings(path: str | Path) -> dict[str, Setting]:
    """Read the settings of a YAML file and its bases by dotted key, without validating keys and types.

    Raises:
        UserError: a file is missing or not YAML, or a key appears twice.
    """
    return _read_with_bases(find_config(path), (), {})


def refusal(cfg: CfgNode, settings: Settings | None, key: str, reason: str) -> UserError:
    """Return the error for a key's value: "a.yaml, line 3: SEED is 1.5" and `reason`; a default has no origin."""
    place = f"{settings[key].origin}: " if settings and key in settings else ""
    return UserError(f"{place}{key} is {value(cfg, key)!r}{reason}")


def value(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key: value(cfg, "SOLVER.BASE_LR")."""
    section, last = _place(cfg, key)
    return section[last]


def flat(cfg: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map every dotted key to its value, in the tree's order: {"SOLVER.BASE_LR": 0.001, ...}."""
    found: dict[str, Any] = {}
    for name, item in cfg.items():
        found.update(flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item})
    return found


def changed(cfg: CfgNode, /, **values: Any) -> CfgNode:
    """Return a frozen copy with some dotted keys changed: changed(cfg, SEED=1, **{"MODEL.DEVICE": "cpu"})."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, item in values.items():
        section, last = _place(cfg, key)
        section[last] = item
    cfg.freeze()
    return cfg


def without(cfg: CfgNode, keys: Iterable[str]) -> CfgNode:
    """Return a frozen copy without some dotted keys or sections."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in keys:
        section, last = _place(cfg, key)
        del section[last]
    cfg.freeze()
    return cfg


def _place(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """Return the section that holds a dotted key, and the key's last part; KeyError if there is no such key."""
    *sections, last = key.split(".")
    section = reduce(getitem, sections, cfg)
    if last not in section:
        raise KeyError(key)
    return section, last


def find_config(path: str | Path) -> Path:
    """Return the given file, else the packaged config of that name.

    `configs/coco_loco_r50.yaml` and `coco_loco_r50.yaml` both work outside a checkout.

    Raises:
        UserError: neither exists; the message suggests the closest name.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isfile(path):  # a Path raises OSError for a name that is too long
        return path
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if not path.is_absolute():
        for folder in _config_folders():
            if os.path.isfile(folder / inside):
                return folder / inside
    close = difflib.get_close_matches(f"configs/{inside.as_posix()}", packaged_configs(), n=1)
    hint = (
        f"did you mean {close[0]}?"
        if close
        else "give the path of a .yaml file, or a name that loco-det configs lists."
    )
    raise UserError(f"There is no configuration file {path}; {hint}")


def packaged_configs() -> dict[str, Path]:
    """Map the names of this package's configurations, "configs/pretrain/loco_r50.yaml", to their files."""
    return {
        f"configs/{file.relative_to(folder).as_posix()}": file
        for folder in _config_folders()
        for file in sorted(folder.rglob("*.yaml"))
    }


def _config_folders() -> list[Path]:
    """Where they are: in the installed package, or in a checkout."""
    package = Path(__file__).parent.parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file as plain dict, list, tuple, str, int, float, bool and None, without resolving `_BASE_`.

    Python tags are read as the data they wrap: `!!python/tuple [1, 2]` is (1, 2), an object becomes the mapping it
    holds, a name its text. Nothing is imported or called; a tag that requests a computation becomes its text.

    Raises:
        UserError: the file cannot be read, is no YAML mapping, or has a key twice.
    """
    return _without_lines(_read_mapping(Path(path)))


class _Line(NamedTuple):
    """A value, and the 1-based line of its key."""

    value: Any
    line: int


def _without_lines(item: Any) -> Any:
    return {key: _without_lines(line.value) for key, line in item.items()} if isinstance(item, dict) else item


def _read_mapping(path: Path) -> dict[str, _Line]:
    try:
        text = read_regular(path).decode()
        if len(text) > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES >> 20} MB, which is no configuration; name another file.")
        content = yaml.load(text, _PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text file: {error}.") from error
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{path}, line {error.problem_mark.line + 1}: {error.problem}.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a configuration.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold KEY: VALUE pairs, and holds a {_kind(content)} instead.")
    return content


class _Code(str):
    """The tag of a value that Python would have to compute; never executed, and no key accepts it."""


class _PlainLoader(yaml.SafeLoader):
    """Constructs plain data for every node, whatever its tag; mappings hold `_Line`s."""

    count = 0

    def construct_object(self, node: yaml.Node, deep: bool = True) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise _fault(node, f"aliases expand to more than {MAX_NODES} values by here; remove them")
        if node in self.recursive_objects:
            raise _fault(node, "an alias refers to the value that contains it")
        number = node.tag in (f"{_YAML_TAG}int", f"{_YAML_TAG}float")
        if number and len(node.value) > MAX_DIGITS:  # 1:1:1... is one to the base of 60
            raise _fault(node, f"a number of {len(node.value)} characters; write at most {MAX_DIGITS}")
        try:
            made = super().construct_object(node, deep=True)
        except (ValueError, LookupError, OverflowError) as error:  # a scalar whose text does not fit its tag
            raise _fault(node, f"{node.value!r} is not of type {node.tag.rpartition(':')[2]}") from error
        del self.constructed_objects[node]  # so that aliases are constructed, and counted, again
        return made

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[str, _Line]:
        own: dict[str, _Line] = {}
        merged: dict[str, _Line] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_YAML_TAG}merge":
                children = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for child in reversed(children):
                    made = self.construct_object(child)
                    if not isinstance(made, dict):
                        raise _fault(child, "`<<` takes a mapping")
                    merged.update(made)
                continue
            key = self.construct_object(key_node)
            if not isinstance(key, str):
                raise _fault(key_node, f"keys are words, not {key!r}")
            if key in own:
                raise _fault(key_node, f"the key {key} appears twice (first in line {own[key].line}); keep one")
            own[key] = _Line(self.construct_object(value_node), key_node.start_mark.line + 1)
        return merged | own

    def plain(self, node: yaml.Node) -> Any:
        """Construct a node with any tag but Python's."""
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [_without_lines(self.construct_object(child)) for child in node.value]
        return node.value

    def python(self, tag: str, node: yaml.Node) -> Any:
        """Construct `!!python/TAG`: for a pickled dict or object its items if it has any, else its attributes."""
        if isinstance(node, yaml.ScalarNode):
            read = self.yaml_constructors.get(f"{_YAML_TAG}{_PYTHON_SCALARS.get(tag, tag)}")
            return read(self, node) if read else node.value or tag.partition(":")[2]
        if isinstance(node, yaml.SequenceNode) and tag.startswith("object/apply:"):
            return _Code(f"!!python/{tag}")
        made = self.plain(node)
        if tag == "tuple":
            return tuple(made)
        if isinstance(made, dict) and tag.startswith("object"):
            items = made.get("dictitems", made.get("listitems"))
            return items.value if items else {} if set(made) <= {"args", "kwds", "state"} else made
        return made

    yaml_constructors: ClassVar = {
        **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"{_YAML_TAG}{kind}" for kind in _SCALARS)},
        None: plain,
    }
    yaml_multi_constructors: ClassVar = {f"{_YAML_TAG}python/": python}


def _fault(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


def _read_with_bases(path: Path, above: tuple[Path, ...], known: dict[Path, Settings]) -> Settings:
    """Merge a file's settings over its bases'; `above` are the files that include it, `known` those read before."""
    here = Path(os.path.realpath(path))  # of a circle of links too, which cannot be read below
    if here in known:
        return known[here]
    if here in above:
        chain = " -> ".join(f.name for f in (*above, here))
        raise UserError(f"{path}: {BASE_KEY} leads back to a file that is being read ({chain}); break the circle.")
    if len(above) > MAX_BASES:
        raise UserError(f"{path}: is the {BASE_KEY} of more than {MAX_BASES} files, each of the next; leave some out.")
    mapping = _read_mapping(path)
    bases = mapping.pop(BASE_KEY, _Line([], 0))
    names = [bases.value] if isinstance(bases.value, str) else bases.value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}, line {bases.line}: {BASE_KEY} takes a file name or a list of file names.")
    settings: dict[str, Setting] = {}
    for name in names:
        if "://" in name:
            raise UserError(f"{path}, line {bases.line}: download the {BASE_KEY} {name} and name the local file.")
        base = path.parent / os.path.expanduser(name)
        if not os.path.isfile(base) and name.startswith("configs/"):  # of this package, from anywhere
            with contextlib.suppress(UserError):
                base = find_config(name)
        if not os.path.isfile(base):
            raise UserError(f"{path}, line {bases.line}: the {BASE_KEY} file {base} does not exist.")
        settings.update(_read_with_bases(base, (*above, here), known))
    settings.update(_flatten(mapping, path, ""))
    known[here] = settings
    return settings


def _flatten(mapping: dict[str, _Line], path: Path, prefix: str) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for key, item in mapping.items():
        origin = f"{path}, line {item.line}"
        if "." in key or not key:
            raise UserError(f"{origin}: write {prefix}{key} as nested keys, one line for each part.")
        if isinstance(item.value, dict) and item.value:
            settings.update(_flatten(item.value, path, f"{prefix}{key}."))
        else:
            settings[prefix + key] = Setting(_decode(item.value), origin)
    return settings


def _decode(value: Any) -> Any:
    """Evaluate text that is a Python literal, as yacs does for "(800, 832)" and "1e-4"."""
    if not isinstance(value, str):
        return value
    try:
        return literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _assign(cfg: CfgNode, key: str, setting: Setting) -> None:
    node = cfg
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, 1):
        if section not in node:
            raise _no_such_key(cfg, key, setting)
        node = node[section]
        if not isinstance(node, CfgNode):
            name = ".".join(sections[:depth])
            raise UserError(
                f"{setting.origin}: {name} takes a {_kind(node)}, and {key} treats it as a section; set {name} itself."
            )
    if last not in node:
        raise _no_such_key(cfg, key, setting)
    value = setting.value
    if value == {} and isinstance(node[last], CfgNode):
        return  # an empty section changes nothing
    node[last] = _fit(value, node[last], key, setting.origin)


def _fit(value: Any, default: Any, key: str, origin: str) -> Any:
    """Convert `value` to the type of `default` by yacs's rules; an int is also valid for a float."""
    if default is None and (value is None or type(value) in (str, bool, int, float, list, tuple)):
        return value
    if type(default) is float and type(value) is int and abs(value) < 10**MAX_DIGITS:
        return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        kinds = {_leaf_kind(leaf) for leaf in _leaves(default)}
        odd = [leaf for leaf in _leaves(value) if _leaf_kind(leaf) not in kinds]
        if len(kinds) == 1 and odd:
            raise UserError(
                f"{origin}: {key} takes a {_kind(default)} of {kinds.pop()}s, and {odd[0]!r} in it is of "
                f"type {_kind(odd[0])}; write {example(key, value, default)}"
            )
        return type(default)(value)
    if type(value) is type(default):
        return value
    expected = "section of keys" if isinstance(default, CfgNode) else f"value of type {_kind(default)}"
    shown = "null" if value is None else f"{value!r} of type {_kind(value)}"
    todo = "set the keys in it" if isinstance(default, CfgNode) else f"write {example(key, value, default)}"
    raise UserError(f"{origin}: {key} takes a {expected}, and was given {shown}; {todo}")


def example(key: str, value: Any, default: Any) -> str:
    """Return `KEY VALUE` for a shell, with a value of the type of `default` that is as near to `value` as can be.

    example("DATASETS.TRAIN", "x", ()) is `DATASETS.TRAIN "('x',)"`.
    """
    return f"{key} {shell_value(_nearest(value, default))}"


def shell_value(value: Any) -> str:
    """Return a value as one word of a command line that `load_config` reads back as the same value."""
    return shell_word(value if isinstance(value, str) and _decode(value) == value else repr(value))


def shell_word(text: str) -> str:
    """Quote a text for a shell where needed, in double quotes if it needs no escape there: `"('x',)"`."""
    double = re.search(r"[\s'(\[{*?;&|<>~#]", text) and not re.search(r'["$`\\!]', text)
    return f'"{text}"' if double else shlex.quote(text)


def _nearest(value: Any, default: Any) -> Any:
    if isinstance(default, (list, tuple)):
        items = list(value) if isinstance(value, (list, tuple)) else re.findall(r"[^\s,()\[\]'\"]+", str(value))
        kinds = {_leaf_kind(leaf) for leaf in _leaves(default)}
        if kinds == {"number"}:
            items = [item for item in map(_decode, items) if _leaf_kind(item) == "number"]
        elif kinds <= {"str"}:
            items = [str(item) for item in items]
        return type(default)(items or default or ("NAME",))
    if isinstance(default, bool):
        return str(value).lower() not in ("false", "no", "off", "0", "none", "")
    if isinstance(default, str):
        return str(value)
    if isinstance(default, int):
        return int(value) if isinstance(value, float) and math.isfinite(value) else default
    return default


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def _leaf_kind(value: Any) -> str:
    return "number" if type(value) in (int, float) else _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, _Code):
        return "Python code, which is never run here"
    return "mapping" if isinstance(value, dict) else "null" if value is None else type(value).__name__


def _no_such_key(cfg: CfgNode, key: str, setting: Setting) -> UserError:
    leaves = flat(cfg)
    parts, parts_of_key = [name.split(".") for name in leaves], key.split(".")
    known = dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1))
    upper = key.upper()
    section, _, word = upper.rpartition(".")
    same_word = [k for k in known if k.rpartition(".")[2] == word]
    siblings = {k.rpartition(".")[2]: k for k in leaves if section and k.rpartition(".")[0] == section}
    alike = same_word or [k for name, k in siblings.items() if word and word in name]  # LR for BASE_LR
    if siblings and not alike:
        close = [siblings[name] for name in difflib.get_close_matches(word, siblings, n=1)]
    else:
        close = difflib.get_close_matches(upper, alike or known, n=1, cutoff=0.0 if alike else 0.6)
    hint = f"did you mean {close[0]}?" if close else "remove it."
    for command, sections in _SECTIONS.items():
        if parts_of_key[0] in sections and parts_of_key[0] not in cfg:
            hint = f"it is one of {_SORTS[command]}, for loco-det {command}"
    return UserError(f"{setting.origin}: there is no key {key}; {hint}")
