"""From a YAML file with overrides to a configuration, and back."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness.errors import ConfigError
from harness.schema import Config
from harness.yamlfile import (
    Document,
    Path_,
    dump_yaml,
    one_line,
    parse_yaml,
    read_yaml,
    shown,
)


@dataclass(frozen=True)
class Resolved:
    """A configuration, and where what was given for it stands."""

    config: Config
    places: Mapping[Path_, str]
    """``file:line`` or ``override '…'`` by key path, for what files and overrides hold."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, what it ``extends``, and ``KEY=VALUE`` overrides.

    Raises ConfigError with every problem found, each on a line of its own with its place.
    """
    return resolve(path, overrides).config


def resolve(path: Path, overrides: Sequence[str] = ()) -> Resolved:
    """``load_config``, and where each value comes from. Raises the same."""
    document = _read_extended(path, ())
    # Together, so that their order does not matter: growth.every may stand before growth.policy.
    overriding = Document({})
    for override in overrides:
        _merge(overriding, _parse_override(override))
    _merge(document, overriding)
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(explain(error, document, path)) from None
    return Resolved(_placed(config, path), document.places)


def _placed(config: Config, path: Path) -> Config:
    """With the folder of the user's own code written out, so that a copy elsewhere finds it too."""
    if config.code is None and not config.own_parts():
        return config
    return config.model_copy(update={"code": str(path.parent.resolve() / (config.code or ""))})


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_extended(path: Path, chain: tuple[Path, ...]) -> Document:
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{one_line(str(path))}: cannot be read: {error}") from None
    if resolved in chain:
        cycle = " → ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
        raise ConfigError(f"{path}: extends goes in a circle: {cycle}")
    if len(chain) > _MAX_CHAIN:
        raise ConfigError(f"{path}: extends is more than {_MAX_CHAIN} files deep")
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        found = "the file is empty" if document.data is None else f"found {shown(document.data)}"
        raise ConfigError(f"{path}: a configuration is a mapping of keys, but {found}")
    bases = document.data.pop("extends", None)
    if bases is None:
        return document
    place = document.places[("extends",)]
    names = bases if isinstance(bases, list) else [bases]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{place}: extends: must be the name of a YAML file or a list of names, "
            f"not {shown(bases)}"
        )
    merged = Document({})
    for name in names:
        base = path.parent / name
        if not os.path.exists(base):  # Path.exists raises for names that no file can have
            raise ConfigError(f"{place}: extends: no such file: {one_line(str(base), 300)}")
        _merge(merged, _read_extended(base, (*chain, resolved)))
    _merge(merged, document)
    return merged


_MAX_CHAIN = 20


def _parse_override(text: str) -> Document:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    # sbatch's options, which are keys of slurm.options, have dashes.
    names = [parts[0], *(part.replace("-", "_") for part in parts[1:])]
    if not equals or not all(name.isidentifier() for name in names):
        raise ConfigError(
            f"{shown(text)} is not an override; write KEY=VALUE such as batch.initial=128"
        )
    if parts[0] == "extends":
        raise ConfigError(f"{shown(text)}: extends can stand in a file only, not in an override")
    place = f"override {shown(text)}"
    document = parse_yaml(value, place, lines=False)
    data = document.data
    for part in reversed(parts):
        data = {part: data}
    places: dict[Path_, str] = {tuple(parts[:i]): place for i in range(1, len(parts) + 1)}
    places |= {(*parts, *inner): place for inner in document.places}
    return Document(data, places)


# A mapping that names another kind than the one below it replaces it: keys of a geometric growth
# mean nothing to a fixed one.
_KINDS = ("policy", "kind")
_SHARED = ("lr", "warmup")  # both kinds of warmup have the same keys


def _merge(base: Document, over: Document) -> None:
    """Lay ``over`` on ``base``: mappings merge key by key, everything else is replaced."""
    replaced: set[Path_] = set()
    base.data = _merged(base.data, over.data, (), replaced)
    stale = [
        place
        for place in base.places
        if any(place[:end] in replaced for end in range(len(place) + 1))
    ]
    for place in stale:
        del base.places[place]
    base.places |= over.places


def _merged(base: Any, over: Any, path: Path_, replaced: set[Path_]) -> Any:
    both = isinstance(base, dict) and isinstance(over, dict)
    if not both or (
        path != _SHARED
        and any(key in base and key in over and base[key] != over[key] for key in _KINDS)
    ):
        replaced.add(path)
        return over
    return base | {
        key: _merged(base[key], value, (*path, key), replaced) if key in base else value
        for key, value in over.items()
    }


def explain(
    error: ValidationError, document: Document, path: Path, root: type[BaseModel] = Config
) -> str:
    """Every problem that pydantic has found in a file's data, each on a line with its place.

    ``root``: what the data were to be.
    """
    lines = []
    for problem in error.errors(include_url=False):
        loc, sections = _locate(problem["loc"], root)
        sentence = _sentence(problem, loc, sections, root)
        named = _NAMED_KEY.match(sentence)
        key = _as_path(named[0]) if named else loc
        place = _nearest(document, key if key[: len(loc)] == loc else loc)
        lines.append(f"{place or path}: {sentence}")
    return "\n".join(dict.fromkeys(lines))


_NAMED_KEY = re.compile(r"[a-z_]+(\.([a-z_]+|[0-9]+))+(?=[ :])")


def _as_path(key: str) -> Path_:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _locate(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[Path_, list[type[BaseModel]]]:
    """Pydantic's location as the file has it, without the tags of unions, and the sections that may
    stand there: none for a plain value, several for a union whose tag is not known."""
    path: list[int | str] = []
    models: list[type[BaseModel]] = [root]
    for part in loc:
        tagged = [model for model in models if len(models) > 1 and part in own_tags(model)]
        if tagged:
            models = tagged
            continue
        path.append(part)
        if isinstance(part, int):  # an entry of a list: its model is known already
            continue
        fields = [model.model_fields.get(str(part)) for model in models]
        models = [model for field in fields if field for model in sections_of(field.annotation)]
    return tuple(path), models


def _nearest(document: Document, loc: Path_) -> str | None:
    for end in range(len(loc), 0, -1):
        if loc[:end] in document.places:
            return document.places[loc[:end]]
    return None


# What pydantic calls a problem → what the value must be.
_RULES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text without lone surrogates",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "list_type": "a list",
    "too_short": "a list of {min_length} or more",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}


def _sentence(
    problem: Any, loc: Path_, sections: list[type[BaseModel]], root: type[BaseModel]
) -> str:
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    key = one_line(".".join(map(str, loc)))
    if kind == "extra_forbidden":
        valid = _valid_keys(_locate(problem["loc"][:-1], root)[1])
        near = difflib.get_close_matches(str(loc[-1]), valid, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: unknown key; {hint}valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"{key}: missing, but needed"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag, valid_tags = context["discriminator"].strip("'"), _valid_tags(sections)
        if kind == "union_tag_not_found" and tag not in value:
            return f"{key}.{tag}: missing, but needed; valid are {valid_tags}"
        return f"{key}.{tag}: must be one of {valid_tags}, not {shown(value[tag])}"
    if kind == "value_error":
        message = str(context["error"])
        return message if not key or _NAMED_KEY.match(message) else f"{key}: {message}"
    if kind in _RULES:
        quote = kind == "string_type" and isinstance(value, bool | int | float)
        hint = "; put it in quotes" if quote else ""
        limits = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
        return f"{key}: must be {_RULES[kind].format(**limits)}, not {shown(value)}{hint}"
    message = one_line(problem["msg"])
    return f"{key}: {shown(value)} is not valid: {message[0].lower()}{message[1:]}"


def _valid_keys(sections: list[type[BaseModel]]) -> list[str]:
    names = [name for section in sections[:1] for name in section.model_fields]
    return [*names, "extends"] if sections == [Config] else names


def _valid_tags(sections: list[type[BaseModel]]) -> str:
    return ", ".join(str(tag) for section in sections for tag in own_tags(section))


def own_tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return tuple(
        tag
        for kind in _KINDS
        if kind in model.model_fields
        for tag in get_args(model.model_fields[kind].annotation)
    )


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for arg in get_args(annotation) for model in sections_of(arg)]
