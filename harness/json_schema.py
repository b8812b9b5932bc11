"""The schema of a configuration as JSON Schema, which editors complete and check by.

A file that `extends` another need not hold what the other has, so nothing is required in it but
that what it holds is valid. All other files must have what a run needs. What depends on several
keys at once, the loader alone refuses.
"""

from __future__ import annotations

import ast
import inspect
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.config import own_tags, sections_of
from harness.dataset_table import DATASETS
from harness.model_table import OWN, TORCHVISION
from harness.optimizer_table import OPTIMIZERS
from harness.schema import Config

FILE_NAME = "harness.schema.json"
DRAFT = "http://json-schema.org/draft-07/schema#"
"""What editors' YAML support knows best."""
_KINDS = ("policy", "kind")


def header(schema: Path) -> str:
    """The first line of a YAML file by which editors find its schema."""
    return f"# yaml-language-server: $schema={schema}"


def as_text() -> str:
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


@cache
def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 7) of a configuration file."""
    generated = Config.model_json_schema()
    definitions = generated.pop("$defs")
    for model in _all_sections(Config):
        if model.__name__ in definitions:
            _describe(definitions[model.__name__], model)
    _describe(generated, Config)
    _name_the_known(definitions)
    generated["properties"] = {"extends": _EXTENDS, **generated["properties"]}
    return {
        "$schema": DRAFT,
        "title": "A training run of the scaling harness",
        **_for_editors(generated),
        "if": {"not": {"required": ["extends"]}},
        "then": _needed(Config),
        "definitions": {name: _for_editors(one) for name, one in definitions.items()},
    }


_EXTENDS = {
    "description": "A file, or several, that this one is laid over; from its directory.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "null"},
    ],
}


def _name_the_known(definitions: dict[str, Any]) -> None:
    """The names that are more than text, beside what is one's own (package.module:callable)."""
    for key, names in named().items():
        section, field = key.split(".")
        known = definitions[section.capitalize()]["properties"][field]
        known |= {"anyOf": [{"enum": names}, {"pattern": ":"}]}


def named() -> dict[str, list[str]]:
    """Key -> the names that it may have, of those whose values are in a table."""
    return {
        "data.dataset": list(DATASETS),
        "model.name": [*OWN, *TORCHVISION],
        "optimizer.name": list(OPTIMIZERS),
    }


def _for_editors(part: Any) -> Any:
    """Pydantic's, without what is required and without titles; in terms of draft 7."""
    if isinstance(part, list):
        return [_for_editors(one) for one in part]
    if isinstance(part, str):
        return part.replace("#/$defs/", "#/definitions/")
    if not isinstance(part, dict):
        return part
    kept = {
        {"oneOf": "anyOf"}.get(key, key): _for_editors(value)
        for key, value in part.items()
        if key not in ("required", "discriminator")
        and not (key == "title" and isinstance(value, str))  # and not a key of that name
        and not (key == "default" and isinstance(value, dict))  # a section's
    }
    if "$ref" in kept and len(kept) > 1:  # beside which draft 7 takes nothing into account
        kept = {"allOf": [{"$ref": kept.pop("$ref")}], **kept}
    return kept


def _needed(model: type[BaseModel]) -> dict[str, Any]:
    """What a file must hold of a section that it has."""
    inner = {name: _needed_of(field.annotation) for name, field in model.model_fields.items()}
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    properties = {name: one for name, one in inner.items() if one}
    return {
        **({"required": required} if required else {}),
        **({"properties": properties} if properties else {}),
    }


def _needed_of(annotation: Any) -> dict[str, Any]:
    sections = sections_of(annotation)
    if len(sections) == 1:
        one = _needed(sections[0])
        return {"items": one} if one and _is_list(annotation) else one
    return {"anyOf": [_needed_of_kind(section) for section in sections]} if sections else {}


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is list


def _needed_of_kind(model: type[BaseModel]) -> dict[str, Any]:
    """Of a section that names its kind, which it must in any case."""
    kind = next(key for key in _KINDS if key in model.model_fields)
    needed = _needed(model)
    return {
        "required": list(dict.fromkeys([kind, *needed.get("required", [])])),
        "properties": {kind: {"enum": list(own_tags(model))}, **needed.get("properties", {})},
    }


# The lines of documentation under each field


def _describe(part: dict[str, Any], model: type[BaseModel]) -> None:
    for name, text in documentation(model).items():
        part["properties"][name]["description"] = text


@cache
def documentation(model: type[BaseModel]) -> dict[str, str]:
    """What stands under each field of a section, and of those that it is made from, on a line."""
    told: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if one is not BaseModel and issubclass(one, BaseModel):
            told |= _under_fields(one)
    return {name: text for name, text in told.items() if name in model.model_fields}


def _under_fields(model: type) -> dict[str, str]:
    (body,) = ast.parse(dedent(inspect.getsource(model))).body
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairwise(getattr(body, "body", []))
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def _all_sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    found = [model]
    for field in model.model_fields.values():
        for section in sections_of(field.annotation):
            found += [one for one in _all_sections(section) if one not in found]
    return found


# Keys


def keys(model: type[BaseModel] = Config, before: str = "") -> dict[str, list[FieldInfo]]:
    """Every key that an override may set, by its dotted name: its field, or those of the kinds of
    section that have it."""
    found: dict[str, list[FieldInfo]] = {}
    for name, field in model.model_fields.items():
        found.setdefault(f"{before}{name}", []).append(field)
        if not _is_list(field.annotation):
            for section in sections_of(field.annotation):
                for key, fields in keys(section, f"{before}{name}.").items():
                    found.setdefault(key, []).extend(fields)
    return found
