"""Which versions are installed."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

PACKAGE = "scaling-harness"


def installed_version(package: str = PACKAGE) -> str | None:
    """Of a package, by its metadata; None if it is not installed."""
    with suppress(PackageNotFoundError):
        return str(version(package))
    return None
