"""Configuration files: one loader for detection (Detectron2's YAML) and for pretraining.

A file is read as plain data and merged over a tree of defaults, in this order: defaults, `_BASE_` files, the
file itself, `KEY VALUE` overrides. The result is a frozen fvcore `CfgNode`, so `cfg.SOLVER.BASE_LR` works
and code written for Detectron2 can take it. Nothing in a file is ever constructed or called.
"""

from __future__ import annotations

import difflib
from ast import literal_eval
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fvcore.common.config import BASE_KEY, CfgNode

from loco_det.core.errors import UserError

PYTHON_TAG = "tag:yaml.org,2002:python/"
# Far above any real file; stops a few lines of nested aliases from filling the memory.
MAX_NODES = 200_000


class Setting(NamedTuple):
    """A value somebody wrote, and where: "file.yaml, line 3" or "the command line"."""

    value: Any
    origin: str


Settings = Mapping[str, Setting]
"""What the user set, by dotted key."""


def load_config(defaults: CfgNode, path: str | Path, overrides: Sequence[str] = ()) -> tuple[CfgNode, Settings]:
    """Merge a YAML file and `KEY VALUE` overrides over a copy of `defaults`.

    Args:
        defaults: every legal key with its default value; it decides names and types, and is not changed.
        path: the YAML file, as `find_config` understands it; "" for the defaults alone.
        overrides: [key, value, key, value, ...], values as text, e.g. ["SOLVER.BASE_LR", "0.1"].

    Returns:
        A frozen CfgNode, and what the user set in it and where: {"SOLVER.BASE_LR": Setting(0.1, "a.yaml, line 3")}.

    Raises:
        UserError: naming file, line and key, for a file that is missing or not YAML, a key that appears twice
            or does not exist, a value of the wrong type.
    """
    settings = read_settings(path) if path else {}
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


def read_settings(path: str | Path) -> dict[str, Setting]:
    """What a YAML file and its bases set, by dotted key, with no defaults to judge keys and types.

    Raises:
        UserError: a file is missing or not YAML, or a key appears twice.
    """
    return _read_with_bases(find_config(path), ())


def origin(settings: Settings, key: str) -> str:
    """Where the user set a key, as the beginning of an error sentence: "a.yaml, line 3: ", or "" for a default."""
    return f"{settings[key].origin}: " if key in settings else ""


def value(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key: value(cfg, "SOLVER.BASE_LR")."""
    section, last = _place(cfg, key)
    return section[last]


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Every key with its value, in the tree's order and without the sections: {"SOLVER.BASE_LR": 0.001, ...}."""
    found: dict[str, Any] = {}
    for name, item in cfg.items():
        found.update(flat(item, f"{prefix}{name}.") if isinstance(item, CfgNode) else {prefix + name: item})
    return found


def changed(cfg: CfgNode, /, **values: Any) -> CfgNode:
    """A frozen copy with other values for some dotted keys: changed(cfg, SEED=1, **{"MODEL.DEVICE": "cpu"})."""
    cfg = cfg.clone()
    cfg.defrost()
    for key, item in values.items():
        section, last = _place(cfg, key)
        section[last] = item
    cfg.freeze()
    return cfg


def without(cfg: CfgNode, keys: Iterable[str]) -> CfgNode:
    """A frozen copy that lacks some dotted keys or sections."""
    cfg = cfg.clone()
    cfg.defrost()
    for key in keys:
        section, last = _place(cfg, key)
        del section[last]
    cfg.freeze()
    return cfg


def _place(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    """The section that holds a dotted key, and the key's last part; KeyError if there is no such key."""
    *sections, last = key.split(".")
    section = reduce(getitem, sections, cfg)
    if last not in section:
        raise KeyError(key)
    return section, last


def find_config(path: str | Path) -> Path:
    """The file as given, else the file of that name among the configs that come with the software.

    `configs/coco_loco_r50.yaml` and `coco_loco_r50.yaml` both work outside a checkout.

    Raises:
        UserError: neither exists; the message offers the closest name.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    package = Path(__file__).parent.parent
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    folders = [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]
    if not path.is_absolute():
        for folder in folders:
            if (folder / inside).is_file():
                return folder / inside
    known = [f.relative_to(folder).as_posix() for folder in folders for f in sorted(folder.rglob("*.yaml"))]
    close = difflib.get_close_matches(inside.as_posix(), known, n=1)
    hint = f"did you mean configs/{close[0]}" if close else "give the path of a .yaml file"
    raise UserError(f"There is no configuration file {path}; {hint}.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """One YAML file as plain dict, list, tuple, str, int, float, bool and None, `_BASE_` left as it stands.

    Python tags are read as the data they wrap: `!!python/tuple [1, 2]` is (1, 2), an object is the mapping it
    holds, a name is its text. Nothing is imported or called; what a file wants computed is the text of its tag.

    Raises:
        UserError: the file cannot be read, is no YAML mapping, or has a key twice.
    """
    path = Path(path)
    return {key: _without_lines(value) for key, value in _read_mapping(path).items()}


class _Line(NamedTuple):
    """A value as read, with the line of its key, counted from 1."""

    value: Any
    line: int


def _without_lines(item: _Line) -> Any:
    if isinstance(item.value, dict):
        return {key: _without_lines(value) for key, value in item.value.items()}
    return item.value


def _read_mapping(path: Path) -> dict[str, _Line]:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a text file: {error}.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML: {reason}.") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a configuration.") from error
    if root is None:
        return {}
    try:
        value = _PlainReader(path).read(root)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be a configuration.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold KEY: VALUE pairs, and holds a {_kind(value)} instead.")
    return value


class _Code(str):
    """The tag of a value that the file wants Python to compute, which nothing here does; no key takes it."""


class _PlainReader:
    """Turns composed YAML nodes into plain data without ever asking a tag what to do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.open: set[int] = set()
        self.scalars = yaml.constructor.SafeConstructor()

    def read(self, node: yaml.Node) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise UserError(f"{self.path} expands to more than {MAX_NODES} values; remove its nested aliases.")
        if id(node) in self.open:
            raise self.fault(node, "an alias refers to the value that contains it")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.unwrap(node, self.mapping(node))
            if isinstance(node, yaml.SequenceNode):
                if node.tag.startswith(PYTHON_TAG + "object/apply:"):
                    return _Code("!!" + node.tag.removeprefix("tag:yaml.org,2002:"))
                items = [_drop(self.read(child)) for child in node.value]
                return tuple(items) if node.tag == PYTHON_TAG + "tuple" else items
            return self.scalar(node)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.MappingNode) -> dict[str, _Line]:
        values: dict[str, _Line] = {}
        merged: dict[str, _Line] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                children = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for child in reversed(children):
                    value = self.read(child)
                    if not isinstance(value, dict):
                        raise self.fault(child, "`<<` takes a mapping")
                    merged.update(value)
                continue
            key = self.read(key_node)
            if not isinstance(key, str):
                raise self.fault(key_node, f"keys are words, not {key!r}")
            if key in values:
                first = values[key].line
                raise self.fault(key_node, f"the key {key} appears twice (first in line {first}); keep one")
            values[key] = _Line(self.read(value_node), key_node.start_mark.line + 1)
        return {**merged, **values}

    def unwrap(self, node: yaml.MappingNode, values: dict[str, _Line]) -> Any:
        """What a pickled dict or object holds: its items if it has any, else its attributes."""
        if not node.tag.startswith(PYTHON_TAG + "object"):
            return values
        for part in ("dictitems", "listitems"):
            if part in values:
                return values[part].value
        return {} if set(values) <= {"args", "kwds", "state"} else values

    def scalar(self, node: yaml.ScalarNode) -> Any:
        tag = node.tag
        if tag.startswith(PYTHON_TAG):
            kind = tag.removeprefix(PYTHON_TAG)
            if kind in ("int", "long", "float", "bool", "none", "str", "unicode"):
                plain = {"long": "int", "none": "null", "unicode": "str"}.get(kind, kind)
                tag = f"tag:yaml.org,2002:{plain}"
            else:
                return node.value or kind.partition(":")[2]
        if tag.removeprefix("tag:yaml.org,2002:") not in ("int", "float", "bool", "null"):
            return node.value
        try:
            return self.scalars.construct_object(yaml.ScalarNode(tag, node.value, node.start_mark, node.end_mark))
        except (ValueError, KeyError, yaml.YAMLError) as error:
            raise self.fault(node, f"{node.value!r} is no {tag.rpartition(':')[2]}") from error

    def fault(self, node: yaml.Node, reason: str) -> UserError:
        return UserError(f"{self.path}, line {node.start_mark.line + 1}: {reason}.")


def _drop(value: Any) -> Any:
    """A list item without line numbers."""
    return _without_lines(_Line(value, 0))


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> dict[str, Setting]:
    """Settings of a file over those of its bases; `above` are the files that led here."""
    here = path.resolve()
    if here in above:
        chain = " -> ".join(f.name for f in (*above, here))
        raise UserError(f"{path}: {BASE_KEY} leads back to a file that is being read ({chain}); break the circle.")
    mapping = _read_mapping(path)
    bases = mapping.pop(BASE_KEY, _Line([], 0))
    names = [bases.value] if isinstance(bases.value, str) else bases.value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}, line {bases.line}: {BASE_KEY} takes a file name or a list of file names.")
    settings: dict[str, Setting] = {}
    for name in names:
        if "://" in name:
            raise UserError(f"{path}, line {bases.line}: download the {BASE_KEY} {name} and name the local file.")
        base = path.parent / Path(name).expanduser()
        if not base.is_file():
            raise UserError(f"{path}, line {bases.line}: the {BASE_KEY} file {base} does not exist.")
        settings.update(_read_with_bases(base, (*above, here)))
    settings.update(_flatten(mapping, path, ""))
    return settings


def _flatten(mapping: dict[str, _Line], path: Path, prefix: str) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for key, item in mapping.items():
        origin = f"{path}, line {item.line}"
        if "." in key or not key:
            raise UserError(f"{origin}: write {prefix}{key} as nested keys, one line for each part.")
        value = _decode(item.value)
        if isinstance(value, dict) and value:
            settings.update(_flatten(value, path, f"{prefix}{key}."))
        else:
            settings[prefix + key] = Setting(value, origin)
    return settings


def _decode(value: Any) -> Any:
    """Text that is a Python literal becomes its value, as yacs reads "(800, 832)" and "1e-4"."""
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
    """`value` in the type of `default`: as yacs, and an int is also good where a float is expected."""
    if default is None and (value is None or type(value) in (str, bool, int, float, list, tuple)):
        return value
    if type(default) is float and type(value) is int:
        return float(value)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        kinds = {_leaf_kind(leaf) for leaf in _leaves(default)}
        odd = [leaf for leaf in _leaves(value) if _leaf_kind(leaf) not in kinds]
        if len(kinds) == 1 and odd:
            raise UserError(
                f"{origin}: {key} takes a {_kind(default)} of {kinds.pop()}s, and {odd[0]!r} in it is of "
                f"type {_kind(odd[0])}."
            )
        return type(default)(value)
    if type(value) is type(default):
        return value
    expected = "section of keys" if isinstance(default, CfgNode) else f"value of type {_kind(default)}"
    shown = "null" if value is None else f"{value!r} of type {_kind(value)}"
    unquoted = isinstance(default, (list, tuple)) and isinstance(value, str) and value.lstrip()[:1] in ("[", "(")
    todo = "put quotes around the words in it, as in ['a', 'b']" if unquoted else "change the value"
    raise UserError(f"{origin}: {key} takes a {expected}, and was given {shown}; {todo}.")


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
    parts = [name.split(".") for name in flat(cfg)]
    known = dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1))
    upper = key.upper()
    same_word = [k for k in known if k.rpartition(".")[2] == upper.rpartition(".")[2]]
    close = difflib.get_close_matches(upper, same_word or known, n=1, cutoff=0.0 if same_word else 0.6)
    hint = f"did you mean {close[0]}?" if close else "remove it."
    return UserError(f"{setting.origin}: there is no key {key}; {hint}")
