"""What a shell may complete of a `harness` command line: argcomplete, told of files and keys.

The shell's script calls the command itself, with the line so far, so it never lags behind the
parser or the schema.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from harness.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_YAML = (".yaml", ".yml")


def script(shell: str) -> str:
    """What ``bash``, ``zsh`` or ``fish`` must read once. Raises UsageError without argcomplete."""
    return str(_argcomplete().shellcode(["harness"], True, shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that has called this process to ask, and end; nothing if none has."""
    for action in _actions(parser):
        told: Any = action
        if action.dest in ("config_path", "study_path"):
            told.completer = _yaml_files
        elif action.dest == "overrides":
            told.completer = _overrides
        elif action.type is not None and getattr(action.type, "__name__", "") == "Path":
            told.completer = _argcomplete().completers.FilesCompleter()
    _finder()(parser, always_complete_options=False)


def _finder() -> Any:
    """argparse takes no overrides behind options, which `harness` does: there a line without its
    options is completed."""

    class Finder(_argcomplete().CompletionFinder):  # type: ignore[misc]
        def _get_completions(
            self, words: list[str], prefix: str, quote: str, wordbreak: int | None
        ) -> list[str]:
            found = super()._get_completions(words, prefix, quote, wordbreak)
            behind_option = words[-1].startswith("-")
            if found or prefix.startswith("-") or (behind_option and not prefix):
                return list(found)
            plain = [word for word in words[2:] if word.endswith(_YAML) or "=" in word]
            plain = [word for word in plain if not word.startswith("-")]
            return list(
                super()._get_completions([*words[:2], *plain], prefix, quote, wordbreak)
                if plain
                else []
            )

    return Finder()


def _argcomplete() -> Any:
    try:
        import argcomplete
    except ImportError:
        raise UsageError(
            "completion needs argcomplete, which is not installed: pip install argcomplete"
        ) from None
    return argcomplete


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


def _yaml_files(prefix: str, **_: object) -> list[str]:
    """Folders, and files that may hold a configuration."""
    folder, begun = prefix.rpartition("/")[::2]
    place = f"{folder}/" if "/" in prefix else ""
    try:
        entries = sorted(os.scandir(place or "."), key=lambda entry: entry.name)
    except OSError:
        return []
    fitting = [entry for entry in entries if entry.name.startswith(begun)]
    hidden = begun.startswith(".")
    return [
        f"{place}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in fitting
        if (hidden or not entry.name.startswith("."))
        and (entry.is_dir() or entry.name.endswith(_YAML))
    ]


def _overrides(prefix: str, **_: object) -> list[str]:
    """Keys with their ``=``; behind it, the values that a key may have, if they are few."""
    from harness.json_schema import keys

    known = keys()
    name, equals, _value = prefix.partition("=")
    if equals:
        return [f"{name}={value}" for value in _values(name, known.get(name, []))]
    sections = {key.rpartition(".")[0] for key in known} - {""}
    return [f"{key}=" for key in known if key not in sections and key.startswith(prefix)]


def _values(name: str, fields: list[FieldInfo]) -> list[str]:
    from harness.dataset_table import DATASETS
    from harness.model_table import OWN, TORCHVISION

    named = {"data.dataset": list(DATASETS), "model.name": [*OWN, *TORCHVISION]}
    chosen = (value for field in fields for value in _choices(field.annotation))
    return named.get(name) or list(dict.fromkeys(chosen))


def _choices(annotation: Any) -> Iterator[str]:
    """Of a key that is a flag, or one of some words."""
    if annotation is bool:
        yield from ("true", "false")
    for one in get_args(annotation):
        if isinstance(one, str):
            yield one
        elif one is type(None):
            yield "null"
        else:
            yield from _choices(one)
