"""What MkDocs does besides while it makes the site.

Configuration keys come from the schema, commands from the parser, and three pages from files that
lie outside docs/. What the navigation lists and is not written yet is left out of it.
"""

from __future__ import annotations

import argparse
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from harness.cli import _parser
from harness.schema import Config
from harness.units import Duration

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site that are files elsewhere.
BORROWED = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what is not written yet."""
    made = {*BORROWED, "reference/configuration.md", "reference/commands.md"}
    docs = Path(config.docs_dir)

    def there(entry: Any) -> Any:
        if isinstance(entry, str):
            return entry if entry in made or (docs / entry).exists() else None
        if isinstance(entry, dict):
            return {name: there(inner) for name, inner in entry.items()}
        return [kept for inner in entry if (kept := there(inner))]

    config.nav = there(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/configuration.md": configuration(),
        "reference/commands.md": commands(),
        **{page: (ROOT / path).read_text("utf-8") for page, path in BORROWED.items()},
    }
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


# ---------------------------------------------------------------- links


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files that are no pages become paths: the site has no address of the sources."""
    here = Path(BORROWED.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent
    pages = {path: name for name, path in BORROWED.items()}

    def target(found: re.Match[str]) -> str:
        text, link, anchor = found.groups()
        path = os.path.normpath(here / link)
        if path == "README.md":
            path = "docs/index.md"
        inside = pages.get(path) or (path[5:] if path.startswith("docs/") else None)
        if inside is None:
            return (
                f"`{path}`" if text.strip("`") in (path, Path(path).name) else f"{text} (`{path}`)"
            )
        return f"[{text}]({os.path.relpath(inside, Path(page.file.src_uri).parent)}{anchor or ''})"

    link = r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)"
    return re.sub(rf"(?<!!){link}", target, markdown)


# ---------------------------------------------------------------- configuration keys


def configuration() -> str:
    """Every key with its type, default and one line on what it is."""
    documented = _Documented()
    parts = [
        "# Configuration keys\n",
        "Made from the schema, `harness/schema.py`. What the keys are for is told in the guides; "
        "`harness plan` checks a file and shows what comes of it. A *length* carries its unit: "
        "`5ep` epochs, `200up` updates, `50000sa` samples. Any key can be set on the command line "
        "as `KEY=VALUE`, and a file builds on others with `extends:`.\n",
        *_section(Config, "", documented),
    ]
    return "\n".join(parts)


class _Documented:
    """What stands in quotes under each field, which Python itself does not keep."""

    def __init__(self) -> None:
        loader = griffe.GriffeLoader(search_paths=[ROOT])
        self.modules = [loader.load(name) for name in ("harness.schema", "harness.launch_schema")]

    def __call__(self, model: type[BaseModel], name: str) -> str:
        for owner in model.__mro__:
            for module in self.modules:
                field = module.members.get(owner.__name__)
                found = field and field.members.get(name)
                if found and found.docstring:
                    return _inline(found.docstring.value)
        return ""


def _inline(text: str) -> str:
    """A docstring in one line of a table."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def _section(model: type[BaseModel], prefix: str, documented: _Documented) -> Iterator[str]:
    rows, inner = [], []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        words = documented(model, name)
        kinds = list(_models(field.annotation))
        if kinds:
            inner.append((key, field, kinds))
            words = f"{words} See [{key}](#{_anchor(key)}).".strip()
            rows.append((key, "section" if len(kinds) == 1 else "one of several", field, words))
        else:
            rows.append((key, _kind(field.annotation, field.metadata), field, words))
    yield "| key | type | default | |\n|---|---|---|---|"
    for key, kind, field, words in rows:
        yield f"| `{key}` | {kind} | {_default(field)} | {words} |"
    yield ""
    for key, field, kinds in inner:
        yield f"{'#' * (2 + key.count('.'))} {key} {{ #{_anchor(key)} }}\n"
        for kind in kinds:
            told = _inline(kind.__doc__ or "") if kind.__doc__ else ""
            tag = next((n for n in ("policy", "kind") if n in kind.model_fields), None)
            if tag and len(kinds) > 1:
                (value,) = get_args(kind.model_fields[tag].annotation)
                yield f"**`{tag}: {value}`** {told}\n"
            elif told:
                yield f"{told}\n"
            plain = "[]." if _listed(field.annotation) else "."
            yield from _section(kind, f"{key}{plain}", documented)


def _anchor(key: str) -> str:
    return key.replace(".", "-").replace("[]", "")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _listed(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _kind(annotation: Any, limits: list[Any]) -> str:
    """A type in the words of someone who writes YAML."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0], list(parts[1:]))
    if origin is Literal:
        return ", ".join(f"`{str(value).lower()}`" for value in parts)
    if origin in (Union, types.UnionType):
        words = [_kind(one, limits) for one in parts if one is not type(None)]
        return " or ".join(words) + (" or `null`" if type(None) in parts else "")
    if origin is list:
        return f"list of {_kind(parts[0], [])}"
    if origin is dict:
        return "mapping"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return ("length" if annotation is Duration else names[annotation]) + _limits(limits)


def _limits(metadata: list[Any]) -> str:
    found = []
    flat = [inner for one in metadata for inner in (getattr(one, "metadata", None) or [one])]
    for one in flat:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            value = getattr(one, name, None)
            if (
                value is not None and abs(value) < 2**53
            ):  # what a float can hold is no limit to tell
                found.append(f"{sign} {value:g}")
    return f", {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    value = field.default
    if isinstance(value, BaseModel):
        tag = next((n for n in ("policy", "kind") if hasattr(value, n)), None)
        return f"`{{{tag}: {getattr(value, tag)}}}`" if tag else ""
    if value is None:
        return "`null`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# ---------------------------------------------------------------- command line


def commands() -> str:
    """The help of every command."""
    os.environ |= {"COLUMNS": "92", "NO_COLOR": "1"}
    parser = _parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in action._choices_actions}
    parts = [
        "# Command line\n",
        "Made from the parser. Exit codes: 0 done; 1 the run failed; 2 bad usage or configuration, "
        "in one message; 74 the run directory cannot be written any more; 75 stopped early on "
        "request, with a checkpoint: run again to go on; 76 a newer attempt has taken the run "
        "over.\n",
        f"```text\n{parser.format_help()}```\n",
    ]
    for name, command in action.choices.items():
        told = helps.get(name) or ""
        parts.append(f"## harness {name}\n\n{told[:1].upper()}{told[1:]}.\n")
        parts.append(f"```text\n{command.format_help()}```\n")
    return "\n".join(parts)
