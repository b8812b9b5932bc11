"""Statistical efficiency, goodput, the best ranks, and ranks over a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.scaling.fit import fit_step_time
from harness.scaling.goodput import (
    MeasuredNoise,
    NoiseAt,
    Seen,
    Speed,
    best,
    goodputs,
    measured_speeds,
    noise_over_run,
    recommended_growth,
    samples_to_target,
    speeds_of,
    updates_to_target,
)
from harness.scaling.points import Point
from harness.scaling.steptime import Wire
from harness.schedule.choices import Choice, choices, statistical_efficiency
from harness.schedule.costs import read_throughput

amounts = st.floats(1, 1e6)


def ideal(asked: Sequence[Choice]) -> list[Speed | None]:
    """100 images per second and rank."""
    return [Speed(100.0 * one.ranks) for one in asked]


# The formulas


@given(amounts, amounts, amounts)
def test_statistical_efficiency(batch: float, scale: float, reference: float) -> None:
    found = statistical_efficiency(batch, scale, reference)
    assert (found <= 1) == (batch >= reference)
    assert found > statistical_efficiency(2 * batch, scale, reference)
    assert statistical_efficiency(reference, scale, reference) == 1


@given(amounts, amounts, st.floats(1, 1e9))
def test_mccandlish(batch: float, scale: float, least: float) -> None:
    """S/S_min − 1 = φ/B and E/E_min − 1 = B/φ, with E_min = φ·S_min (equations 2.11 and 2.12)."""
    reference = 32.0
    samples = least * scale * (1 + reference / scale)  # E at the reference
    assert updates_to_target(batch, scale, reference, samples) == pytest.approx(
        least * (1 + scale / batch)
    )
    assert samples_to_target(batch, scale, reference, samples) == pytest.approx(
        least * scale * (1 + batch / scale)
    )


def test_at_the_noise_scale_it_takes_twice_the_least_of_both() -> None:
    """The trade-off's corner."""
    assert samples_to_target(1000, 1000, 1e-9, 5e5) == pytest.approx(1e6)
    assert updates_to_target(1000, 1000, 1e-9, 5e5) == pytest.approx(2 * 5e5 / 1000)


# Choices


def test_choices() -> None:
    found = choices([4, 1, 4], 8, most_accumulation=40, largest_batch=160, ranks_per_node=2)
    assert [(one.ranks, one.nodes, one.accumulation) for one in found if one.ranks == 4] == [
        (4, 2, steps) for steps in range(1, 6)
    ]
    assert [one.accumulation for one in found if one.ranks == 1] == list(range(1, 17))
    steps = [one.accumulation for one in choices([1], 1, most_accumulation=200)]
    assert steps[16:] == [24, 32, 48, 64, 96, 128, 192]
    assert found[-1].batch == 4 * 5 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([4], 64, {"largest_batch": 100}), "no choice of ranks: 4 ranks"),
        (([0], 1, {}), "whole numbers from 1"),
        (([1], 0, {}), "whole numbers from 1"),
        (([], 1, {}), "no choice"),
    ],
)
def test_choices_that_cannot_be(arguments: Any, message: str) -> None:
    ranks, micro, others = arguments
    with pytest.raises(UsageError, match=message):
        choices(ranks, micro, **others)


# Goodput


def test_goodput_by_hand() -> None:
    """Batch 128, φ = 96, reference 32: each sample is worth (96 + 32)/(96 + 128) = 4/7."""
    (found,) = goodputs(
        [Choice(4, 2, 1, 32)], ideal, MeasuredNoise(96), 32, reference_samples=400_000
    )
    assert found.images_per_sec.value == 400
    assert found.statistical_efficiency.value == pytest.approx(4 / 7)
    assert found.goodput.value == pytest.approx(400 * 4 / 7)
    assert found.updates is not None
    assert found.seconds is not None
    assert found.node_hours is not None
    assert found.updates.value == pytest.approx(400_000 * 7 / 4 / 128)
    assert found.seconds.value == pytest.approx(1750)
    assert found.node_hours.value == pytest.approx(2 * 1750 / 3600)
    assert not found.goodput.known


def test_without_a_target_there_is_no_time_to_it() -> None:
    (found,) = goodputs([Choice(4, 2, 1, 32)], ideal, MeasuredNoise(96), 32)
    assert (found.updates, found.seconds, found.node_hours) == (None, None, None)


def test_the_interval_of_the_noise_scale_is_carried_over() -> None:
    (found,) = goodputs(
        [Choice(64, 64, 1, 32)], ideal, MeasuredNoise(1000, 800, 1250), 32, reference_samples=1e6
    )
    ends = [statistical_efficiency(2048, scale, 32) for scale in (800, 1250)]
    share = found.statistical_efficiency
    assert [share.low, share.high] == pytest.approx(ends, rel=0.03)
    assert not found.images_per_sec.known
    assert found.seconds is not None
    assert found.goodput.low is not None
    assert found.seconds.high == pytest.approx(1e6 / found.goodput.low)


def test_the_intervals_of_speed_and_noise_add_up() -> None:
    points = [
        Point(n, n, 32 * n, tuple(0.1 * n**0.1 * (1 + 0.01 * i) for i in range(4)))
        for n in (1, 2, 3)
    ]
    speeds = speeds_of(fit_step_time(points, Wire(1e7), ensemble=200))
    asked = [Choice(16, 16, 1, 32)]
    (sure,) = goodputs(asked, speeds, MeasuredNoise(1000), 32)
    (doubtful,) = goodputs(asked, speeds, MeasuredNoise(1000, 500, 2000), 32)
    assert sure.statistical_efficiency.low == sure.statistical_efficiency.high
    assert None not in (sure.goodput.low, sure.goodput.high, doubtful.goodput.low)
    assert doubtful.goodput.high - doubtful.goodput.low > sure.goodput.high - sure.goodput.low  # type: ignore[operator]
    assert sure.beyond == pytest.approx(16 / 3)


def test_measured_throughput_serves_too(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    line = {"ranks": 2, "accumulation": 1, "micro_batch": 8, "global_batch": 16}
    file.write_text(json.dumps(line | {"images_per_sec": 100.0}) + "\n", "utf-8")
    speeds = measured_speeds(read_throughput(file))
    found = goodputs(choices([1, 2], 8, most_accumulation=2), speeds, MeasuredNoise(100), 16)
    assert [(one.choice.ranks, one.choice.accumulation) for one in found] == [(2, 1), (2, 2)]
    assert [one.images_per_sec.value for one in found] == pytest.approx([100, 100])
    assert best(found).choice.accumulation == 1


@given(amounts, st.integers(1, 6))
def test_more_noise_never_asks_for_fewer_ranks(scale: float, factor: int) -> None:
    def wanted(scale: float) -> int:
        asked = choices([1, 2, 4, 8, 16, 32], 32)
        slower = [Speed(100 * one.ranks / (1 + 0.02 * one.ranks)) for one in asked]
        return best(goodputs(asked, lambda _: list(slower), MeasuredNoise(scale), 32)).choice.ranks

    assert wanted(scale * factor) >= wanted(scale)


def test_the_best_is_the_smallest_of_those_that_are_as_good() -> None:
    asked = choices([1, 2, 4, 8], 32)
    flat = goodputs(asked, lambda _: [Speed(100.0)] * 4, MeasuredNoise(1e9), 32)
    assert best(flat).choice.ranks == 1
    rising = goodputs(asked, ideal, MeasuredNoise(1e9), 32)
    assert best(rising).choice.ranks == 8
    with pytest.raises(UsageError, match="no choice"):
        best([])


@pytest.mark.parametrize("wrong", [(0.0,), (-1.0,), (nan,), (10, 20, 30), (10, 5, None)])
def test_noise_scales_that_cannot_be(wrong: Any) -> None:
    with pytest.raises(UsageError, match="noise scale"):
        MeasuredNoise(*wrong)


@pytest.mark.parametrize("wrong", [{"reference": 0.0}, {"reference": nan},
                                   {"reference": 32, "reference_samples": -1.0}])  # fmt: skip
def test_references_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="reference"):
        goodputs([Choice(1, 1, 1, 1)], ideal, MeasuredNoise(1), **wrong)


# Over a run


def test_the_noise_scale_of_a_run_by_hand() -> None:
    """1,000 samples in batches of the reference size; then 2,000 in batches of 64 with φ = 32, each
    worth (32 + 32)/(32 + 64): progress 1,000 + 2,000 · 2/3."""
    windows = [Seen(500, 32, None), Seen(1000, 32, 100), Seen(3000, 64, 32)]
    noise, end = noise_over_run(windows, 32, stretches=2)
    assert end == pytest.approx(1000 + 2000 * 2 / 3)
    assert noise == [
        NoiseAt(0.0, MeasuredNoise(100.0, 100.0, 100.0)),
        NoiseAt(end / 2, MeasuredNoise(32.0, 32.0, 32.0)),
    ]


@given(
    st.lists(st.tuples(st.floats(1, 1e6), st.floats(1, 1e5), st.none() | st.floats(1, 1e6)),
             min_size=1, max_size=30),
    st.floats(1, 1e4),
    st.integers(1, 12),
)  # fmt: skip
def test_the_noise_scale_of_any_run_leads_to_a_plan(
    steps: list[tuple[float, float, float | None]], reference: float, stretches: int
) -> None:
    samples = itertools.accumulate(length for length, _, _ in steps)
    windows = [
        Seen(seen, batch, scale) for seen, (_, batch, scale) in zip(samples, steps, strict=True)
    ]
    if all(one.noise_scale is None for one in windows):
        with pytest.raises(UsageError, match="no window has a noise scale"):
            noise_over_run(windows, reference, stretches)
        return
    noise, end = noise_over_run(windows, reference, stretches)
    assert 1 <= len(noise) <= stretches
    assert recommended_growth(noise, end, ASKED, saturating, reference).seconds.value > 0


@pytest.mark.parametrize(
    "windows",
    [
        [Seen(10, 1, 5.0), Seen(10, 1, 5.0)],
        [Seen(nan, 1, 5.0)],
        [Seen(10, 0, 5.0)],
        [Seen(10, 1, -5.0)],
        [],
    ],
)
def test_metrics_that_cannot_be(windows: list[Seen]) -> None:
    with pytest.raises(UsageError):
        noise_over_run(windows, 32)


def saturating(asked: Sequence[Choice]) -> list[Speed | None]:
    return [Speed(100 * one.ranks / (1 + 0.01 * one.ranks)) for one in asked]


RUN = [
    NoiseAt(0, MeasuredNoise(50)),
    NoiseAt(1e6, MeasuredNoise(500)),
    NoiseAt(2e6, MeasuredNoise(5000)),
]
ASKED = choices([1, 2, 4, 8, 16, 32, 64], 32, most_accumulation=4)


def test_ranks_grow_with_the_noise_scale() -> None:
    found = recommended_growth(RUN, 3e6, ASKED, saturating, 32)
    ranks = [one.choice.ranks for one in found.steps]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]
    assert found.steps[0].progress == 0
    assert found.seconds.value == pytest.approx(sum(one.seconds for one in found.steps))
    assert found.seconds.value < found.fixed_seconds.value
    for step in found.steps:
        best_now = best(goodputs(ASKED, saturating, MeasuredNoise(step.noise_scale), 32), 0.0)
        assert step.choice == best_now.choice


def test_restarts_that_cost_more_than_they_bring_are_left_out() -> None:
    free = recommended_growth(RUN, 3e6, ASKED, saturating, 32)
    dear = recommended_growth(RUN, 3e6, ASKED, saturating, 32, restart_seconds=1e9)
    assert len({one.choice.ranks for one in free.steps}) > 1
    assert len({one.choice.ranks for one in dear.steps}) == 1
    some = recommended_growth(RUN, 3e6, ASKED, saturating, 32, restart_seconds=10)
    assert free.seconds.value <= some.seconds.value <= dear.seconds.value


def test_node_hours_that_cost_ask_for_fewer_ranks() -> None:
    free = recommended_growth(RUN, 3e6, ASKED, saturating, 32)
    dear = recommended_growth(RUN, 3e6, ASKED, saturating, 32, node_hour_cost=1e6)
    assert dear.node_hours.value <= free.node_hours.value
    assert dear.seconds.value >= free.seconds.value


@given(
    st.lists(st.floats(1, 1e5), min_size=1, max_size=4),
    st.floats(0, 2000),
    st.floats(0, 1e4),
)
def test_no_other_way_through_a_run_is_cheaper(
    scales: list[float], restart: float, cost: float
) -> None:
    """Against every combination."""
    asked = [Choice(n, n, 1, 32) for n in (1, 4, 16)]
    speeds = [100.0, 300.0, 900.0]
    noise = [NoiseAt(1e5 * i, MeasuredNoise(scale)) for i, scale in enumerate(scales)]
    found = recommended_growth(
        noise, 1e5 * len(scales), asked, lambda _: [Speed(one) for one in speeds], 32,
        restart_seconds=restart, node_hour_cost=cost,
    )  # fmt: skip

    def price(way: tuple[int, ...]) -> float:
        total = 0.0
        for i, (scale, index) in enumerate(zip(scales, way, strict=True)):
            one = asked[index]
            seconds = 1e5 / (speeds[index] * statistical_efficiency(one.batch, scale, 32))
            total += seconds * (1 + one.nodes * cost / 3600)
            if i and way[i - 1] != index:
                held = max(one.nodes, asked[way[i - 1]].nodes)
                total += restart * (1 + held * cost / 3600)
        return total

    least = min(map(price, itertools.product(range(3), repeat=len(scales))))
    assert found.seconds.value + found.node_hours.value * cost == pytest.approx(least)


def test_intervals_over_a_run() -> None:
    doubtful = [NoiseAt(one.progress, MeasuredNoise(one.noise.value, one.noise.value / 2,
                                                 one.noise.value * 2)) for one in RUN]  # fmt: skip
    for noise, known in ((RUN, False), (doubtful, True)):
        found = recommended_growth(noise, 3e6, ASKED, saturating, 32, restart_seconds=5)
        assert found.seconds.known == found.node_hours.known == known
        assert found.fixed_seconds.known == known
        assert found.seconds.covers(found.seconds.value) in (None, True)
    rng = np.random.default_rng(0)

    def drawn(asked: Sequence[Choice]) -> list[Speed | None]:
        errors = np.exp(0.1 * rng.standard_normal(500))
        return [Speed(100.0 * one.ranks, 100.0 * one.ranks * errors, 3.0) for one in asked]

    found = recommended_growth(RUN, 3e6, ASKED, drawn, 32)
    assert found.seconds.low is not None
    assert found.seconds.high is not None
    assert found.seconds.high / found.seconds.low == pytest.approx(np.exp(0.2 * 1.96), rel=0.1)
    assert found.beyond == 3.0


@pytest.mark.parametrize(
    ("noise", "end"),
    [([], 1e6), (RUN, 2e6), (RUN, nan), (RUN[1:], 3e6), ([RUN[0], RUN[0]], 3e6), (RUN[::-1], 3e6)],
)
def test_runs_that_cannot_be(noise: list[NoiseAt], end: float) -> None:
    with pytest.raises(UsageError, match="noise scale over a run"):
        recommended_growth(noise, end, ASKED, ideal, 32)


def test_a_run_needs_a_known_speed() -> None:
    with pytest.raises(UsageError, match="whose speed is known"):
        recommended_growth(RUN, 3e6, ASKED, lambda asked: [None] * len(asked), 32)
