"""Names of a user's own parts of a run, ``package.module:callable``, without importing them."""

from __future__ import annotations

from harness.yamlfile import one_line


def is_own(name: str) -> bool:
    """Whether a name of a configuration means a callable of the user's."""
    return ":" in name


def check_own(key: str, name: str) -> None:
    """Raise ValueError for a name that no callable can have; ``key`` is where it stands."""
    module, _, attribute = name.partition(":")
    parts = attribute.split(".")
    if not all(module.split(".")) or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{key} {one_line(repr(name))}: write package.module:callable")
