"""The study of goodput growth: its simulation, and that docs/studies has what it gives."""

from __future__ import annotations

import csv
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
from support import ROOT

from harness.schedule.choices import statistical_efficiency

PAGE = ROOT / "docs" / "studies" / "goodput.md"


def script(name: str) -> ModuleType:
    """benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


simulated: Any = script("goodput_simulated")
runs: Any = script("goodput_runs")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with PAGE.with_suffix(".csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_beside_the_page_is_what_the_simulation_gives(rows: list[dict[str, str]]) -> None:
    world = simulated.worlds(1)[1]
    arms = (
        simulated.fixed(world, 64, 4096),
        simulated.goodput(world, simulated.HALF, "rank_hours"),
    )
    for found in arms:
        (row,) = [
            one
            for one in rows
            if (one["cluster"], one["task"], one["arm"]) == (found.cluster, found.task, found.arm)
            and one["seed"] == "0"
        ]
        assert float(row["hours"]) == pytest.approx(found.hours, rel=1e-5)
        assert float(row["rank_hours"]) == pytest.approx(found.rank_hours, rel=1e-5)


def test_the_page_is_made_of_the_table(rows: list[dict[str, str]]) -> None:
    found = [
        simulated.Outcome(
            int(one["seed"]), one["cluster"], one["task"], one["arm"], float(one["hours"]),
            float(one["rank_hours"]), float(one["samples"] or "nan"), int(one["starts"]),
            int(one["last_batch"]), int(one["last_ranks"]),
        )
        for one in rows
    ]  # fmt: skip
    seeds = len({one.seed for one in found})
    assert simulated.page(found, seeds) == PAGE.read_text(encoding="utf-8")


def test_a_fixed_choice_takes_what_its_samples_are_worth() -> None:
    (world, *_) = simulated.worlds(1)
    one, other = (simulated.fixed(world, 8, batch) for batch in (256, 1024))
    assert one.samples == pytest.approx(simulated.PROGRESS)
    shares = [
        statistical_efficiency(1024, world.noise(simulated.PROGRESS * at), 256)
        for at in (k / 1000 for k in range(1001))
    ]
    assert min(shares) < one.samples / other.samples < max(shares)
    assert one.hours == pytest.approx(one.samples / world.speed(8, 256) / 3600)


def test_no_arm_is_faster_than_hindsight_by_more_than_its_grid() -> None:
    """In hindsight one may choose at 24 places, and of fewer ranks than the policy."""
    for world in simulated.worlds(1):
        found = {one.arm: one for one in simulated.outcomes(world)}
        best = found.pop(simulated.HINDSIGHT).hours
        assert all(one.hours > 0.93 * best for one in found.values())


def reached(arm: str, seed: int, seconds: float, ranks: int = 1, hit: bool = True) -> Any:
    return runs.Reached(
        "no limit", seed, arm, hit, 3.0, 60, seconds, 0.0, seconds * ranks, 64, ranks, 0.98
    )


def test_ratios_are_of_the_same_block() -> None:
    base = runs.REFERENCE
    found = [
        *(reached(base, 0, 10.0), reached("x", 0, 5.0, 2)),
        *(reached(base, 1, 100.0), reached("x", 1, 50.0, 2)),
        *(reached(base, 2, 1.0), reached("x", 2, 9.0, hit=False)),
    ]
    assert [round(2.718281828**one, 3) for one in runs.ratios(found, "x", False)] == [0.5, 0.5]
    assert [round(2.718281828**one, 3) for one in runs.ratios(found, "x", True)] == [1.0, 1.0]
    assert runs.told(runs.ratios(found, "x", False)) == "0.50 (0.50 to 0.50)"
