"""What tests share: how they say that this machine cannot run them."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_STUDIES = ROOT / "configs" / "studies"
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if _STUDIES not in p.parents)
"""The configurations of runs; those in studies/ are of studies."""
STUDIES = sorted(_STUDIES.glob("[a-z]*.yaml"))
REQUIRE = "HARNESS_REQUIRE"
"""``all``: what this machine cannot provide is a failure, not a skip. Unset: a skip."""


def require(condition: object, reason: str) -> None:
    """Go on if the machine can; else skip with the reason, or fail under HARNESS_REQUIRE=all."""
    if condition:
        return
    if os.environ.get(REQUIRE) == "all":
        pytest.fail(f"{REQUIRE}=all, but {reason}", pytrace=False)
    pytest.skip(reason)


def tool(name: str) -> str | None:
    """A command's path, from this interpreter's own folder (an inactive venv's) or from PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")


@cache
def missing_for_ranks() -> str | None:
    """What keeps this machine from starting Horovod ranks, in words; None if nothing does."""
    for package in ("torch", "horovod"):
        if find_spec(package) is None:
            return f"{package} is not installed (`make setup`)"
    for name in ("horovodrun", "mpirun"):
        if tool(name) is None:
            return f"{name} is not on PATH (`make setup`)"
    return None


def require_ranks() -> None:
    """Go on if Horovod ranks can be started here."""
    reason = missing_for_ranks()
    require(reason is None, str(reason))
