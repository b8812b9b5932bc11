"""A row of the fault matrix: what is done to whom and when, and what is promised of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from faults.scene import Scene


def nothing_is_missing() -> str | None:
    """Every machine can do it."""
    return None


@dataclass(frozen=True)
class Row:
    name: str
    """What it is chosen by."""
    group: str
    stage: Callable[[Scene], None]
    """Does the fault and judges what came of it."""
    quick: bool = False
    """Is among the few that stand for all."""
    missing: Callable[[], str | None] = nothing_is_missing
    """What keeps this machine from trying it, in words."""
