"""Where each value of a configuration comes from: a file, an override, a default, or other values.

What `harness config` prints is a configuration again: YAML with a comment behind each value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from harness.config import Resolved
from harness.dataset_table import DATASETS, DEFAULT_SIZES
from harness.schema import Config
from harness.yamlfile import Path_, dump_line

Source = Literal["file", "override", "default", "derived"]

_MOST = 100  # columns at which comments stop moving to the right


@dataclass(frozen=True)
class Origin:
    """One value of a resolved configuration."""

    key: Path_
    value: Any
    """As YAML has it."""
    source: Source
    told: str
    """``file:line``, ``override '…'``, ``default``, or what it was derived from."""

    @property
    def name(self) -> str:
        return ".".join(map(str, self.key))


def origins(resolved: Resolved) -> list[Origin]:
    """Every value, in the schema's order; lists and mappings of options as one."""
    config = resolved.config
    return [_origin(resolved, config, key, value) for key, value in _leaves(config)]


def as_json(found: list[Origin]) -> str:
    """``{KEY: {"value", "source", "told"}}``, keys dotted."""
    told = {one.name: {"value": one.value, "source": one.source, "told": one.told} for one in found}
    return json.dumps(told, indent=2, ensure_ascii=False)


def as_yaml(found: list[Origin]) -> str:
    """A configuration that loads to the same, with comments."""
    rows: list[tuple[str, str]] = []
    before: Path_ = ()
    for one in found:
        shared = sum(1 for a, b in zip(before, one.key[:-1], strict=False) if a == b)
        rows += [
            (f"{'  ' * depth}{one.key[depth]}:", "") for depth in range(shared, len(one.key) - 1)
        ]
        rows.append((f"{'  ' * (len(one.key) - 1)}{one.key[-1]}: {dump_line(one.value)}", one.told))
        before = one.key[:-1]
    width = max((len(text) for text, told in rows if told and len(text) <= _MOST), default=0)
    lines = (f"{text:<{width}}  # {_comment(told)}" if told else text for text, told in rows)
    return "\n".join(lines)


def _comment(told: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in told)


def _leaves(config: Config) -> Iterator[tuple[Path_, Any]]:
    def below(section: Any, plain: Any, key: Path_) -> Iterator[tuple[Path_, Any]]:
        for name in type(section).model_fields:
            value = getattr(section, name)
            here = (*key, name)
            if hasattr(type(value), "model_fields"):
                yield from below(value, plain[name], here)
            else:
                yield here, plain[name]

    return below(config, config.model_dump(mode="json"), ())


def _origin(resolved: Resolved, config: Config, key: Path_, value: Any) -> Origin:
    place = resolved.places.get(key)
    name = ".".join(map(str, key))
    if value is None and name in _DERIVED:
        derived = _DERIVED[name]
        effective = derived.value(config)
        if effective is not None:
            return Origin(key, effective, "derived", f"derived: {derived.told}")
    if place is not None:
        return Origin(key, value, "override" if place.startswith("override ") else "file", place)
    if value != _default(config, key):
        return Origin(key, value, "derived", "derived from the other keys")
    return Origin(key, value, "default", "default")


def _default(config: Config, key: Path_) -> Any:
    """A field's default in its section, whatever the section's own default holds."""
    section: Any = config
    for name in key[:-1]:
        section = getattr(section, str(name))
    last = str(key[-1])
    field = type(section).model_fields[last]
    bare = type(section).model_construct(**{last: field.get_default(call_default_factory=True)})
    return bare.model_dump(mode="json", include={last}, warnings=False)[last]


@dataclass(frozen=True)
class _Derived:
    value: Callable[[Config], Any]
    told: str


def _image_size(config: Config) -> int | None:
    return 224 if "image_size" in DATASETS[config.data.dataset].takes else None


def _of_synthetic(number: int) -> Callable[[Config], int | None]:
    return lambda config: number if config.data.dataset == "synthetic" else None


_DERIVED = {
    "batch.micro": _Derived(
        lambda config: config.batch.micro_batch, "32, or batch.initial where that is less"
    ),
    "ranks.max": _Derived(lambda config: config.ranks.ceiling, "ranks.start"),
    "lr.base_batch": _Derived(lambda config: config.batch.initial, "batch.initial"),
    "lr.warmup.start": _Derived(lambda config: config.lr.base, "lr.base"),
    "data.image_size": _Derived(_image_size, "the usual size for this data set"),
    "data.size": _Derived(
        lambda config: DEFAULT_SIZES.get(config.data.dataset), "as for data that is generated"
    ),
    "data.classes": _Derived(_of_synthetic(1000), "as synthetic has it"),
    "data.channels": _Derived(_of_synthetic(3), "as synthetic has it"),
}
"""What null stands for, where other keys say so."""
