"""A handful of what `make faults` and its cycles do, so that the next change is held against it."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import cycles, matrix

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.long)])
def test_random_kills_change_nothing(count: int, tmp_path: Path) -> None:
    made = cycles.run(tmp_path, count, lanes=2, seed=count)
    assert sum(cycle.struck for cycle in made) >= count
    assert [cycle for cycle in made if cycle.problems] == []
    assert any(cycle.compared for cycle in made)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "names", [("nan-loss",), pytest.param((), marks=pytest.mark.long, id="all that stand for all")]
)
def test_faults_are_survived(names: tuple[str, ...], tmp_path: Path) -> None:
    rows = matrix.chosen(names, quick=True)
    findings = matrix.run(rows, tmp_path, repeats=1, seed=0, anew=False)
    assert [(found.row, found.broken) for found in findings if found.broken] == []
    assert len(findings) == len(rows)
    # What is done is not done again.
    assert matrix.run(rows, tmp_path, repeats=1, seed=0, anew=False) == findings
