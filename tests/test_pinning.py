"""Which cores a rank binds itself to, how many threads it takes, and what shares its GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT

from harness.config import load_config
from harness.worker import _pin, _set_threads, _start_mps

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


@pytest.mark.parametrize(
    ("per_rank", "ranks", "configured", "threads"),
    [
        (None, 4, None, 2),
        ("3", 4, None, 3),
        ("99", 1, None, 8),
        (None, 16, None, 1),
        ("3", 4, 5, 5),
    ],
)
def test_threads_follow_from_what_a_rank_has_of_its_host(
    per_rank: str | None,
    ranks: int,
    configured: int | None,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.environment.usable_cores", lambda: 8)
    monkeypatch.setattr("harness.environment.launched_local_size", lambda: ranks)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if per_rank is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", per_rank)
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    setting = f"ranks.threads={'null' if configured is None else configured}"
    _set_threads(load_config(ROOT / "configs" / "adabatch-digits.yaml", [setting]))
    assert taken == [threads]


@pytest.mark.parametrize(
    ("wanted", "rank", "started"), [("1", "0", True), ("1", "1", False), ("0", "0", False)]
)
def test_mps_is_started_once_on_each_host(
    wanted: str, rank: str, started: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = tmp_path / "nvidia-cuda-mps-control"
    daemon.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/started\n')
    daemon.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HARNESS_MPS", wanted)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", rank)
    _start_mps()
    assert (tmp_path / "started").exists() == started
    if started:
        assert (tmp_path / "started").read_text() == "-d\n"
