"""Which cores a rank binds itself to."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.worker import _pin

SAME_PATCH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def bound(monkeypatch: Any, cores: set[int], on_host: int, ranks: int) -> list[set[int]]:
    """By local rank, the cores that it is left with."""
    left = []
    for rank in range(ranks):
        mine = set(cores)
        monkeypatch.setattr(os, "cpu_count", lambda: on_host)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, mine=mine: set(mine))

        def bind(_: int, chosen: Any, mine: set[int] = mine) -> None:
            mine &= set(chosen)

        monkeypatch.setattr(os, "sched_setaffinity", bind)
        _pin(rank, ranks)
        left.append(mine)
    return left


@SAME_PATCH
@given(cores=st.integers(1, 130), ranks=st.integers(1, 17))
def test_cores_are_shared_out_evenly_and_wholly(monkeypatch: Any, cores: int, ranks: int) -> None:
    everything = set(range(cores))
    left = bound(monkeypatch, everything, cores, ranks)
    if ranks > cores:
        assert left == [everything] * ranks
        return
    assert set().union(*left) == everything
    assert sum(map(len, left)) == cores
    assert {len(mine) for mine in left} <= {cores // ranks, -(-cores // ranks)}
    assert all(max(mine) - min(mine) + 1 == len(mine) for mine in left), "side by side"


def test_what_a_launcher_has_bound_stays(monkeypatch: Any) -> None:
    assert bound(monkeypatch, {4, 5, 6, 7}, 16, 2) == [{4, 5, 6, 7}] * 2
