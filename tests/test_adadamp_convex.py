"""The convex check of AdaDamp's theory: its simulation, and what docs/ says came of it."""

from __future__ import annotations

import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import ROOT

from harness.schedule.clock import Clock
from harness.schedule.growth import Fixed
from harness.schedule.measured import Loss
from harness.units import Duration

DOCS = ROOT / "docs"


def script() -> ModuleType:
    """benchmarks/ is no package."""
    path = ROOT / "benchmarks" / "adadamp_convex.py"
    spec = importlib.util.spec_from_file_location("adadamp_convex", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


convex: Any = script()
SMOOTH, STRONG = convex.CASES


@pytest.fixture(scope="module")
def quick() -> list[Any]:
    return [a for case in convex.CASES for a in convex.simulate(case, convex.QUICK)]


def exponent(arrivals: list[Any], problem: Any, method: str, counted: str) -> float:
    curve = convex.curve(arrivals, problem.name, method, counted)
    return statistics.mean(float(slope) for slope in convex.slopes(curve))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "method", "counted", "low", "high"),
    [
        # Around the bound's exponent; lower rather than higher, as start-up and lucky draws shorten
        # what is counted (see docs/adadamp-convex.md).
        (SMOOTH, "SGD", "updates", 1.7, 2.1),
        (SMOOTH, "adaptive", "updates", 0.85, 1.05),
        (SMOOTH, "gradient descent", "updates", 0.95, 1.05),
        (SMOOTH, "adaptive", "samples", 1.8, 2.1),
        (STRONG, "SGD", "updates", 0.9, 1.1),
        (STRONG, "adaptive", "updates", 0.18, 0.33),  # log(1/ε) itself has 0.23 over this range
        (STRONG, "gradient descent", "updates", 0.18, 0.33),
        (STRONG, "adaptive", "samples", 1.0, 1.24),  # log(1/ε)/ε has 1.23
    ],
)
def test_exponents(
    quick: list[Any], problem: Any, method: str, counted: str, low: float, high: float
) -> None:
    assert low < exponent(quick, problem, method, counted) < high


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adaptive", "gradient descent"])
def test_updates_are_a_straight_line_in_log(quick: list[Any], method: str) -> None:
    curve = convex.curve(quick, STRONG.name, method, "updates")
    assert convex.straightness(curve) > 0.99
    assert convex.straightness(convex.curve(quick, STRONG.name, "SGD", "updates")) < 0.9


@pytest.mark.slow
def test_arrivals_are_where_the_talk_counts(quick: list[Any]) -> None:
    assert convex.in_window(quick) == 1


@pytest.mark.parametrize("case", convex.CASES, ids=lambda case: case.name)
def test_a_fixed_batch_at_the_same_step_never_gets_there(case: Any) -> None:
    problem, targets = convex.make_problem(case, 10_000, seed=0), [0.05]
    rate: Callable[[int], float] = lambda _: convex.STEP  # noqa: E731
    grown = convex.descend(problem, convex.adadamp(problem), rate, targets, seed=0, most=100)
    fixed = convex.descend(problem, Fixed(convex.INITIAL), rate, targets, seed=0, most=2000)
    assert (len(grown), len(fixed)) == (1, 0)


class Root(Loss):
    """Grows with the root of what AdaDamp grows with."""

    def revise(self, clock: Clock, batch: int, loss: float | None) -> int:
        return math.ceil(math.sqrt(self.initial * super().revise(clock, batch, loss)))


@pytest.mark.parametrize("case", convex.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("policy", "arrives"), [(Loss, True), (Root, False)])
def test_the_batch_must_grow_as_fast_as_that(case: Any, policy: type[Loss], arrives: bool) -> None:
    problem, every = convex.make_problem(case, 10_000, seed=0), Duration.parse("1up")
    growth = policy(convex.INITIAL, optimum=problem.optimum, loss="full", dwell=every)
    arrived = convex.descend(problem, growth, lambda _: convex.STEP, [0.01], seed=0, most=1000)
    assert bool(arrived) == arrives


@pytest.mark.parametrize("case", convex.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("noise", "arrives"), [(0.5, True), (1.5, False)])
def test_the_first_batch_must_be_large_enough(case: Any, noise: float, arrives: bool) -> None:
    problem = convex.make_problem(case, 10_000, seed=0, noise=noise)
    policy, rate = convex.adadamp(problem), lambda _: convex.STEP
    assert bool(convex.descend(problem, policy, rate, [0.1], seed=0, most=500)) == arrives


def test_the_minimiser_is_where_the_script_says() -> None:
    problem = convex.make_problem(SMOOTH, 5000, seed=3)
    everything = np.arange(5000)
    error = np.random.default_rng(0).standard_normal(convex.DIMENSIONS)
    loss = float(np.mean((problem.rows @ error - problem.residuals) ** 2)) / 2
    assert problem.gradient(0 * error, everything) == pytest.approx(0 * error, abs=1e-12)
    assert problem.gradient(error, everything) == pytest.approx(problem.curvature * error)
    assert problem.optimum + problem.gap(error) == pytest.approx(loss)
    assert problem.gap(problem.start) == pytest.approx(1)


def in_the_mean(
    case: Any, rate: Callable[[int], float], batch: Callable[[float], float], targets: Any
) -> list[int]:
    """When the mean of F(w) − F* arrives: the recursion of E e² for normal data, no draws."""
    problem = convex.make_problem(case, 1000, seed=0)
    curvature, second = problem.curvature, problem.start**2
    arrivals: list[int] = []
    updates, gap = 0, 1.0
    while len(arrivals) < len(targets):
        step = rate(updates)
        noise = curvature**2 * second + curvature * (2 * gap + 2 * problem.optimum)
        second = (1 - step * curvature) ** 2 * second + step**2 / batch(gap) * noise
        updates, gap = updates + 1, 0.5 * float(curvature @ second)
        while len(arrivals) < len(targets) and gap <= targets[len(arrivals)]:
            arrivals.append(updates)
    return arrivals


@pytest.mark.slow
@pytest.mark.parametrize(("method", "predicted"), [("SGD", 2), ("adaptive", 1)])
def test_without_luck_the_exponents_are_the_predicted_ones(
    quick: list[Any], method: str, predicted: int
) -> None:
    if method == "SGD":
        rate, batch = SMOOTH.decay, lambda gap: convex.INITIAL
    else:
        rate, batch = (lambda updates: convex.STEP), (lambda gap: convex.INITIAL / gap)
    targets = 10.0 ** -np.arange(1.25, 2.76, 0.25)
    means = np.array(in_the_mean(SMOOTH, rate, batch, targets))
    assert convex.slope(1 / targets[-5:], means[-5:]) == pytest.approx(predicted, rel=0.025)
    counts = convex.curve(quick, SMOOTH.name, method, "updates").counts.mean(axis=0)
    assert np.all(counts < 1.1 * means[: len(counts)])
    assert np.all(counts > 0.7 * means[: len(counts)])


def test_the_page_shows_the_table_of_the_csv() -> None:
    arrivals = convex.read_csv(DOCS / "adadamp-convex.csv")
    page = (DOCS / "adadamp-convex.md").read_text(encoding="utf-8")
    assert f"{convex.BEGIN}\n{convex.table(arrivals)}{convex.END}" in page


def test_csv_and_page_come_back_as_written(tmp_path: Any) -> None:
    arrivals = convex.read_csv(DOCS / "adadamp-convex.csv")
    convex.write_csv(arrivals, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (DOCS / "adadamp-convex.csv").read_bytes()
    page = tmp_path / "page.md"
    page.write_text(f"before {convex.BEGIN}old{convex.END} after", encoding="utf-8")
    convex.put_table(page, "new\n")
    expected = f"before {convex.BEGIN}\nnew\n{convex.END} after"
    assert page.read_text(encoding="utf-8") == expected
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="lacks"):
        convex.put_table(page, "new\n")


def test_the_figure_is_the_one_of_the_csv(tmp_path: Any) -> None:
    convex.draw(convex.read_csv(DOCS / "adadamp-convex.csv"), tmp_path / "again.svg")
    drawn = (tmp_path / "again.svg").read_text(encoding="utf-8")
    for text in ("smooth convex", "strongly convex", "log(1/ε)/ε"):
        assert text in drawn
