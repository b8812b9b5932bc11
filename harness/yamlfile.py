"""Reading YAML as plain data, strictly: positions kept, duplicate keys and object tags refused.

Scalars resolve as in YAML 1.2's core schema, so ``1e-3`` is a number and ``no`` is a string.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.errors import ConfigError

Path_ = tuple[str | int, ...]

_MAX_BYTES = 1 << 18
_MAX_NODES = 100_000  # aliases of aliases can stand for more data than memory holds
_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Raises RecursionError early: with each level of brackets, scanning takes longer."""
        self._depth += 1
        if self._depth > _MAX_DEPTH + 2:
            raise RecursionError
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _CoreDumper(yaml.SafeDumper):
    """Quotes text that readers of YAML 1.1 or of the core schema would take for something else."""


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _class in (_CoreLoader, _CoreDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Other styles lose line ends that are not \n.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_CoreDumper.add_representer(str, _represent_text)


@dataclass
class Document:
    """Plain data from a YAML file, and where each value stands: ``file:line`` by key path."""

    data: Any
    places: dict[Path_, str] = field(default_factory=dict)


def parse_yaml(text: str, name: str, lines: bool = True) -> Document:
    """Plain data of one YAML document; raises ConfigError with ``name`` and the line.

    ``lines=False`` is for text that is no file: places are then the name alone.
    """
    document = Document(None)
    builder = _Builder(name, lines, document.places)
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except RecursionError:
        raise ConfigError(f"{name}: nested more than {_MAX_DEPTH} deep") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        place = builder.place(line)
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        place = builder.place(text.count("\n", 0, error.position))
        raise ConfigError(
            f"{place}: not valid YAML: the character U+{ord(text[error.position]):04X} is refused"
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name}: not valid YAML: {one_line(str(error))}") from None
    if node is not None:
        document.data = builder.build(node, ())
    return document


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that ``parse_yaml``, and any reader of YAML 1.1, reads back as it is."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True)


def dump_line(value: Any) -> str:
    """The same on one line, without its end, to stand behind a key."""
    text = yaml.dump(
        [value],
        Dumper=_CoreDumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=True,
        width=float("inf"),
    )
    return str(text).strip()[1:-1]


def shown(value: object) -> str:
    """A value as a message shows it: as YAML has it, on one line, and short."""
    if value == []:
        return "an empty list"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return one_line(repr(value))


def one_line(text: str, limit: int = 80) -> str:
    """Text with everything escaped that does not print, cut where it is long."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: limit + 1])
    return line if len(text) <= limit else f"{line[: limit - 1]}…"


def read_yaml(path: Path) -> Document:
    """``parse_yaml`` of a file; a missing, huge or undecodable file is a ConfigError too, and so is
    a pipe, for whose writer one may wait for ever."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{path}: cannot be read: it is a pipe; give a file")
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_BYTES} bytes; this is no configuration")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    return parse_yaml(text, str(path))


class _Builder:
    def __init__(self, name: str, lines: bool, places: dict[Path_, str]) -> None:
        self._name, self._lines = name, lines
        self._places = places
        self._nodes = 0
        self._open: set[int] = set()

    def place(self, line: int) -> str:
        return f"{self._name}:{line + 1}" if self._lines else self._name

    def build(self, node: yaml.Node, path: Path_) -> Any:
        place = self.place(node.start_mark.line)
        self._nodes += 1
        if self._nodes > _MAX_NODES or id(node) in self._open:
            raise ConfigError(f"{place}: aliases expand to more than a configuration can hold")
        if len(path) > _MAX_DEPTH:
            raise ConfigError(f"{place}: nested more than {_MAX_DEPTH} deep")
        self._places.setdefault(path, place)
        self._open.add(id(node))
        try:
            return self._value(node, path, place)
        finally:
            self._open.discard(id(node))

    def _value(self, node: yaml.Node, path: Path_, place: str) -> Any:
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.build(entry, (*path, i)) for i, entry in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            try:
                return _SCALARS[tag](node.value)
            except (ValueError, KeyError):
                raise ConfigError(
                    f"{place}: {shown(node.value)} cannot be read as {_WORDS[tag]}"
                ) from None
        raise ConfigError(f"{place}: the tag {shown(node.tag)} is refused; write plain values")

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node.start_mark.line)
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise ConfigError(f"{place}: a key must be a plain word")
            if key in result:
                raise ConfigError(f"{place}: the key {shown(key)} stands here twice")
            self._places[(*path, key)] = place
            result[key] = self.build(value_node, (*path, key))
        return result


_SCALARS: dict[str, Any] = {
    "str": str,
    "int": lambda text: int(text.replace("_", "")),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "null": lambda text: None,
}

_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
