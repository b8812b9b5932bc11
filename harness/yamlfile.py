"""Reading YAML as plain data, strictly: positions kept, duplicate keys and object tags refused.

Scalars resolve as in YAML 1.2's core schema, so ``1e-3`` is a number and ``no`` is a string.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.errors import ConfigError

Path_ = tuple[str | int, ...]

_MAX_BYTES = 1 << 20
_MAX_NODES = 100_000  # aliases of aliases can stand for more data than memory holds
_TAG = "tag:yaml.org,2002:"


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


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
    _CoreLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
        _TAG + _name, re.compile(rf"^(?:{_pattern})$"), _first
    )


@dataclass
class Document:
    """Plain data from a YAML file, and where each value stands: ``file:line`` by key path."""

    data: Any
    places: dict[Path_, str] = field(default_factory=dict)


def parse_yaml(text: str, name: str) -> Document:
    """Plain data of one YAML document; raises ConfigError with ``name`` and the line."""
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{name}{line}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    document = Document(None)
    if node is not None:
        document.data = _Builder(name, document.places).build(node, ())
    return document


def read_yaml(path: Path) -> Document:
    """``parse_yaml`` of a file; a missing, huge or undecodable file is a ConfigError too."""
    try:
        with path.open("rb") as file:
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
    def __init__(self, name: str, places: dict[Path_, str]) -> None:
        self._name = name
        self._places = places
        self._nodes = 0
        self._open: set[int] = set()

    def build(self, node: yaml.Node, path: Path_) -> Any:
        place = f"{self._name}:{node.start_mark.line + 1}"
        self._nodes += 1
        if self._nodes > _MAX_NODES or id(node) in self._open:
            raise ConfigError(f"{place}: aliases expand without end")
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
            except ValueError:
                raise ConfigError(f"{place}: {node.value[:60]!r} is not a {tag}") from None
        raise ConfigError(f"{place}: the tag {node.tag} is refused; write plain values")

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self._name}:{key_node.start_mark.line + 1}"
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise ConfigError(f"{place}: a key must be a plain word")
            if key in result:
                raise ConfigError(f"{place}: the key {key!r} stands here twice")
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
