"""Points, their intervals, speed-up, efficiency and serial fractions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import exp, isfinite, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from harness.errors import UsageError
from harness.scaling.interval import Interval, LogMean, Spread, of_draws, pooled
from harness.scaling.points import Mode, Point, points_of_runs
from harness.scaling.speedup import serial_fraction, speedups
from harness.schedule.costs import read_throughput
from harness.student import student_quantile

MODES: tuple[Mode, ...] = ("weak", "strong")
times = st.floats(1e-4, 1e4)


def images(mode: Mode, ranks: int) -> float:
    return 32.0 * ranks if mode == "weak" else 960.0


def series(mode: Mode, seconds: dict[int, Sequence[float]]) -> list[Point]:
    return [Point(n, n, images(mode, n), tuple(values)) for n, values in seconds.items()]


# Intervals


def test_the_interval_of_a_mean_is_student_s() -> None:
    values = [1.0, 1.1, 1.3, 0.9]
    found = LogMean.of(values).interval(0.95)
    low, high = stats.t.interval(
        0.95, 3, loc=np.mean(np.log(values)), scale=stats.sem(np.log(values))
    )
    assert (found.low, found.high) == pytest.approx((exp(low), exp(high)))
    assert found.value == pytest.approx(stats.gmean(values))


def test_the_interval_of_a_quotient_is_welch_s() -> None:
    over, under = [2.0, 2.2, 2.1], [1.0, 1.3, 0.8, 1.1, 1.2]
    found = LogMean.of(over).over(LogMean.of(under), 0.9)
    test = stats.ttest_ind(np.log(over), np.log(under), equal_var=False)
    low, high = test.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((exp(low), exp(high)))


@given(st.lists(times, min_size=1, max_size=6), st.floats(0.5, 0.999))
def test_an_interval_holds_its_value(values: list[float], confidence: float) -> None:
    found = LogMean.of(values).interval(confidence)
    assert found.covers(found.value) in ((None,) if len(values) == 1 else (True,))


@pytest.mark.parametrize("function", [lambda x: 2 * x + 1, lambda x: 1 / x])
def test_a_monotone_function_keeps_the_ends_in_order(function: Any) -> None:
    found = Interval(2.0, 1.0, 4.0).mapped(function)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.value < found.high
    assert Interval(2.0).mapped(function) == Interval(function(2.0))


def test_draws_that_are_not_all_finite_give_no_interval() -> None:
    assert of_draws(1.0, np.array([1.0, nan, 2.0]), 0.95) == Interval(1.0)


def test_the_pooled_spread_weighs_points_by_their_repeats() -> None:
    means = [LogMean.of([1.0, 1.2]), LogMean.of([1.0]), LogMean.of([2.0, 2.1, 2.3])]
    found = pooled(means)
    assert found is not None
    squares = np.var(np.log([1, 1.2]), ddof=1) + 2 * np.var(np.log([2, 2.1, 2.3]), ddof=1)
    assert (found.sigma, found.dof) == (pytest.approx(sqrt(squares / 3)), 3)
    assert pooled([LogMean.of([1.0])] * 3) is None


def test_normal_draws_with_the_drawn_spread_are_student_s() -> None:
    rng = np.random.default_rng(3)
    drawn = Spread(0.5, 4).draws(rng, 40_000) * rng.standard_normal(40_000)
    ends = np.quantile(drawn, [0.025, 0.975]) / 0.5
    assert ends == pytest.approx([-1, 1] * np.array(student_quantile(4, 0.95)), rel=0.05)


# Points


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ranks": 0}, "ranks is 0"),
        ({"ranks": True}, "ranks is True"),
        ({"ranks": 2.0}, "ranks is 2.0"),
        ({"nodes": 5}, "nodes is 5"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"images_per_update": nan}, "images_per_update is nan"),
        ({"images_per_update": 0}, "images_per_update is 0"),
        ({"seconds": ()}, "no repeats"),
        ({"seconds": (1.0, 0.0)}, "update of 0.0 seconds"),
        ({"seconds": (-1.0,)}, "update of -1.0 seconds"),
        ({"seconds": (float("inf"),)}, "update of inf seconds"),
        ({"seconds": (nan,)}, "update of nan seconds"),
    ],
)
def test_points_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"ranks": 4, "nodes": 2, "images_per_update": 128, "seconds": (1.0,)}
    Point(**good)
    with pytest.raises(UsageError, match=message):
        Point(**(good | wrong))


def test_throughput_files_become_points(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"ranks": n, "accumulation": a, "micro_batch": 8, "global_batch": 8 * a * n,
         "images_per_sec": 100.0 * n}
        for n in (1, 2, 4)
        for a in (1, 2)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    found = points_of_runs(read_throughput(file), ranks_per_node=2)
    assert [(one.ranks, one.nodes, one.accumulation) for one in found] == [
        *((1, 1, 1), (1, 1, 2)),
        *((2, 1, 1), (2, 1, 2)),
        *((4, 2, 1), (4, 2, 2)),
    ]
    speeds = [one.images_per_sec().value for one in found]
    assert speeds == pytest.approx([100, 100, 200, 200, 400, 400])
    assert points_of_runs(read_throughput(file))[-1].nodes == 1


# Speed-up and efficiency


@pytest.mark.parametrize("mode", MODES)
def test_perfect_scaling_has_an_efficiency_of_1(mode: Mode) -> None:
    seconds = {n: [images(mode, n) / n / 100] * 3 for n in (1, 2, 8)}
    found = speedups(series(mode, seconds), mode)
    assert [one.speedup.value for one in found] == pytest.approx([1, 2, 8])
    assert [one.efficiency.value for one in found] == pytest.approx([1, 1, 1])
    assert [one.images_per_sec.value for one in found] == pytest.approx([100, 200, 800])


def test_the_baseline_s_own_scatter_is_in_the_interval() -> None:
    quiet = [0.30, 0.301, 0.302]
    for scatter in (0.001, 0.05):
        points = series("weak", {1: [0.2, 0.2 + scatter, 0.2 - scatter], 4: quiet})
        efficiency = speedups(points, "weak")[1].efficiency
        own = points[1].images_per_sec()
        assert efficiency.low is not None
        assert efficiency.high is not None
        assert own.low is not None
        assert own.high is not None
        widths = efficiency.high / efficiency.low, own.high / own.low
        assert widths[0] > widths[1]
    assert widths[0] > 1.5


def test_a_series_may_begin_with_more_than_one_rank_and_in_any_order() -> None:
    points = series("strong", {8: [0.3, 0.3], 4: [0.4, 0.4]})
    small, large = speedups(points, "strong")
    assert (small.point.ranks, large.baseline_ranks) == (4, 4)
    assert large.speedup.value == pytest.approx(4 / 3)
    assert large.efficiency.value == pytest.approx(2 / 3)


def test_one_repeat_gives_values_without_intervals() -> None:
    first, last = speedups(series("weak", {1: [0.1], 2: [0.2, 0.21]}), "weak")
    assert first.efficiency == Interval(1.0, 1.0, 1.0)
    assert not first.images_per_sec.known
    assert last.images_per_sec.known
    assert not last.efficiency.known


@pytest.mark.parametrize(
    ("points", "mode", "message"),
    [
        ([], "weak", "no points"),
        ([Point(2, 1, 64, (1.0,))] * 2, "weak", "two points of 2 ranks"),
        (series("strong", {1: [1.0], 2: [1.0]}), "weak", "480 images per rank"),
        (series("weak", {1: [1.0], 2: [1.0]}), "strong", "64 images in all"),
    ],
)
def test_what_is_no_series(points: list[Point], mode: Mode, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        speedups(points, mode)


@pytest.mark.parametrize("confidence", [nan, 0.0, 1.0, 95.0])
def test_confidences_that_make_no_sense(confidence: float) -> None:
    with pytest.raises(UsageError, match="confidence"):
        speedups(series("weak", {1: [1.0]}), "weak", confidence)


@given(
    st.sampled_from(MODES),
    st.dictionaries(
        st.integers(1, 10_000), st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=4), min_size=1,
        max_size=5,
    ),
)  # fmt: skip
def test_any_series_has_finite_values_in_their_intervals(
    mode: Mode, seconds: dict[int, list[float]]
) -> None:
    found = speedups(series(mode, seconds), mode)
    for one in found:
        for interval in (one.images_per_sec, one.speedup, one.efficiency):
            assert isfinite(interval.value)
            assert interval.covers(interval.value) in (None, True)
    if len(found) > 1:
        assert serial_fraction(series(mode, seconds), mode).law in ("Amdahl", "Gustafson")


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_of_time_and_images_do_not_matter(time: float, image: float) -> None:
    seconds = {1: (0.2, 0.21), 2: (0.25, 0.24), 4: (0.3, 0.33)}
    plain = [Point(n, n, 32.0 * n, values) for n, values in seconds.items()]
    other = [
        Point(n, n, 32.0 * n * image, tuple(time * one for one in values))
        for n, values in seconds.items()
    ]
    for one, two in zip(speedups(plain, "weak"), speedups(other, "weak"), strict=True):
        assert list(two.efficiency.as_dict().values()) == pytest.approx(
            list(one.efficiency.as_dict().values())
        )


# Serial fractions


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 4, 8), (2, 4, 16)])
def test_the_laws_find_their_own_fraction(fraction: float, counts: tuple[int, ...]) -> None:
    """Amdahl: T(n) = f + (1 − f)/n. Gustafson: X(n) = f + (1 − f)·n."""
    amdahl = {n: [fraction + (1 - fraction) / n] * 2 for n in counts}
    gustafson = {n: [32 * n / (fraction + (1 - fraction) * n)] * 2 for n in counts}
    for mode, seconds in (("strong", amdahl), ("weak", gustafson)):
        found = serial_fraction(series(mode, seconds), mode)  # type: ignore[arg-type]
        assert found.law == {"strong": "Amdahl", "weak": "Gustafson"}[mode]
        assert found.overall.value == pytest.approx(fraction, abs=1e-9)
        assert [ranks for ranks, _ in found.at] == list(counts[1:])
        assert [one.value for _, one in found.at] == pytest.approx(
            [fraction] * (len(counts) - 1), abs=1e-9
        )


def test_a_fraction_at_a_point_is_karp_and_flatt_s() -> None:
    points = series("strong", {1: [1.0, 1.02], 4: [0.4, 0.41]})
    found = serial_fraction(points, "strong")
    speedup = speedups(points, "strong")[1].speedup
    ((_, alone),) = found.at
    for one, two in ((alone.value, speedup.value), (alone.low, speedup.high)):
        assert one is not None
        assert two is not None
        assert one == pytest.approx((1 / two - 1 / 4) / (1 - 1 / 4))


def test_fractions_of_noisy_series_are_covered() -> None:
    """95 % intervals over 300 campaigns of three repeats hold the truth 95 times in a hundred; 3
    standard errors of that are 3.8 points."""
    for mode in MODES:
        hits = 0
        for index in range(300):
            rng = np.random.default_rng([7, index])
            points = []
            for n in (1, 2, 4, 8):
                true = 0.1 + 0.9 / n if mode == "strong" else n / (0.1 + 0.9 * n)
                drawn = true * np.exp(0.03 * rng.standard_normal(3))
                points.append(Point(n, n, images(mode, n), tuple(map(float, drawn))))
            hits += bool(serial_fraction(points, mode, seed=index).overall.covers(0.1))
        assert 0.912 <= hits / 300 <= 0.988


def test_efficiency_is_covered() -> None:
    """As above, with two and with five repeats whose scatter differs."""
    for repeats in (2, 5):
        hits = 0
        for index in range(400):
            rng = np.random.default_rng([11, index])
            points = [
                Point(n, n, 32.0 * n, tuple(map(float, np.exp(s * rng.standard_normal(repeats)))))
                for n, s in ((1, 0.01), (4, 0.04))
            ]
            hits += bool(speedups(points, "weak")[1].efficiency.covers(1.0))
        assert 0.91 <= hits / 400 <= 0.99


def test_a_serial_fraction_needs_two_rank_counts() -> None:
    with pytest.raises(UsageError, match="at least two"):
        serial_fraction(series("weak", {4: [1.0, 1.0]}), "weak")
