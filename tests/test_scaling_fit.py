"""Fitting the step-time model to clusters whose truth is known: what it finds, what it predicts."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from math import nan
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT

from harness.errors import UsageError
from harness.scaling.fit import Fit, fit_step_time
from harness.scaling.interval import Interval
from harness.scaling.points import Mode, Point
from harness.scaling.predict import knee, leave_out, predict
from harness.scaling.priors import KnownLink
from harness.scaling.steptime import IDEAL, Decomposition, Link, StepTime, Wire

WIRE = Wire(40e6, 4e6)
TRUTH = StepTime(2e-3, 2e-3, 0.02, 2.0, Link(5e-6, 1e-11), Link(1e-4, 1e-9), WIRE)
ENSEMBLE = 60  # enough for what is not about coverage


def true_seconds(model: StepTime, ranks: int, nodes: int, images: float) -> float:
    return float(model.seconds(Decomposition.of(ranks, nodes, images))[0])


def measured(
    model: StepTime = TRUTH,
    counts: tuple[int, ...] = (1, 2, 3),
    width: int = 1,
    mode: Mode = "weak",
    noise: float = 0.02,
    repeats: int = 4,
    seed: int = 0,
) -> list[Point]:
    rng = np.random.default_rng(seed)
    points = []
    for n in counts:
        nodes, images = -(-n // width), 32.0 * n if mode == "weak" else 96.0
        drawn = true_seconds(model, n, nodes, images) * np.exp(noise * rng.standard_normal(repeats))
        points.append(Point(n, nodes, images, tuple(map(float, drawn))))
    return points


def fitted(points: list[Point], **changed: Any) -> Fit:
    return fit_step_time(points, changed.pop("wire", WIRE), **{"ensemble": ENSEMBLE} | changed)


def bounds(interval: Interval) -> tuple[float, float]:
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


# What it finds


@pytest.mark.parametrize("mode", ["weak", "strong"])
def test_the_curve_goes_through_the_points(mode: Mode) -> None:
    points = measured(counts=(1, 2, 4, 8), mode=mode, noise=0.0)
    fit = fitted(points, mode=mode)
    assert fit.misfit < 0.005
    for point in points:
        expected = predict(fit, point.ranks, nodes=point.nodes)
        assert expected.seconds.value == pytest.approx(point.seconds[0], rel=0.01)
        assert expected.notes == ()


@pytest.mark.parametrize("index", range(8))
def test_fitted_on_1_2_3_the_prediction_at_4_is_within_10_percent(index: int) -> None:
    rng = np.random.default_rng([5, index])
    transfer = 10 ** rng.uniform(-9.5, -8)
    model = replace(TRUTH, gamma=rng.uniform(1, 6), between=Link(1e-4, transfer))
    fit = fitted(measured(model, seed=index))
    found = predict(fit, 4)
    assert found.images_per_sec.value == pytest.approx(
        128 / true_seconds(model, 4, 4, 128), rel=0.1
    )


def test_many_points_of_different_work_tell_the_coefficients() -> None:
    """Rank counts × images per rank, hardly any noise: then they can be told apart."""
    rng = np.random.default_rng(1)
    points = [
        Point(n, n, m * n, tuple(true_seconds(TRUTH, n, n, m * n)
                                 * np.exp(0.002 * rng.standard_normal(5))))
        for n in (1, 2, 4, 16, 64)
        for m in (2.0, 32.0, 256.0)
    ]  # fmt: skip
    found = {one.name: one for one in fitted(points).coefficients}
    for name, true in (("per_image", 2e-3), ("between.seconds_per_byte", 1e-9)):
        assert found[name].basis == "measured"
        assert found[name].interval.value == pytest.approx(true, rel=0.1)
    assert found["between.latency"].interval.value == pytest.approx(1e-4, rel=0.2)
    assert found["gamma"].interval.value == pytest.approx(2.0, rel=0.3)
    assert found["within.latency"].basis == "assumed"


def test_it_says_which_coefficients_three_points_do_not_tell() -> None:
    fit = fitted(measured())
    assert {"within.latency", "within.seconds_per_byte", "jitter"} <= set(fit.undetermined)
    given = fitted(measured(), between=KnownLink(1e-4, 1e-9, factor=1.1))
    found = {one.name: one.basis for one in given.coefficients}
    assert (found["between.latency"], found["between.seconds_per_byte"]) == ("given", "given")


def test_a_probe_narrows_what_is_far() -> None:
    points = measured()
    wide = bounds(predict(fitted(points), 64).seconds)
    known = fitted(points, between=KnownLink(1e-4, 1e-9, factor=1.1))
    narrow = bounds(predict(known, 64).seconds)
    assert narrow[1] / narrow[0] < 0.5 * wide[1] / wide[0]
    assert narrow[0] < true_seconds(TRUTH, 64, 64, 64 * 32) < narrow[1]


def test_one_bad_repeat_does_not_pull_the_curve() -> None:
    points = measured(noise=0.005, repeats=5)
    bad = replace(points[2], seconds=(*points[2].seconds[:4], points[2].seconds[4] * 3))
    for ranks in (3, 4):
        clean = predict(fitted(points), ranks).seconds.value
        assert predict(fitted([*points[:2], bad]), ranks).seconds.value == pytest.approx(
            clean, rel=0.03
        )


def test_two_levels_are_told_apart() -> None:
    """Within one node nothing is known of the network between nodes, and it says so."""
    slow = replace(TRUTH, within=Link(1e-5, 5e-10), between=Link(1e-4, 4e-9))
    inside = fitted(measured(slow, (1, 2, 4), width=4))
    across = fitted(measured(slow, (1, 2, 4, 8, 12), width=4))
    beyond = predict(inside, 16)
    assert beyond.nodes == 4
    assert any("nothing was measured between nodes" in note for note in beyond.notes)
    told, guessed = bounds(predict(across, 16).seconds), bounds(beyond.seconds)
    assert told[1] / told[0] < guessed[1] / guessed[0]
    assert predict(across, 16).seconds.value == pytest.approx(
        true_seconds(slow, 16, 4, 512), rel=0.1
    )


# What it may not depend on


@pytest.mark.parametrize("unit", ["seconds", "images", "bytes"])
def test_units_do_not_matter(unit: str) -> None:
    points = measured()
    other, wire = points, WIRE
    if unit == "seconds":
        other = [replace(one, seconds=tuple(60 * s for s in one.seconds)) for one in points]
    elif unit == "images":
        other = [replace(one, images_per_update=one.images_per_update / 8) for one in points]
    else:
        wire = Wire(WIRE.gradient_bytes * 8, 4e6 * 8)
    one, two = fitted(points), fitted(other, wire=wire)
    for ranks in (3, 5, 40):
        before, after = predict(one, ranks), predict(two, ranks)
        assert after.efficiency.value == pytest.approx(before.efficiency.value, rel=1e-3)
        assert bounds(after.efficiency) == pytest.approx(bounds(before.efficiency), rel=0.02)
        factor = 60 if unit == "seconds" else 1
        assert after.seconds.value == pytest.approx(factor * before.seconds.value, rel=1e-3)


def test_the_order_of_points_does_not_matter_and_a_seed_repeats_itself() -> None:
    points = measured()
    one, two = fitted(points, seed=4), fitted(points[::-1], seed=4)
    assert predict(one, 9) == predict(two, 9)
    assert predict(one, 9) != predict(fitted(points, seed=5), 9)


@given(st.integers(0, 100), st.integers(1, 400))
@settings(max_examples=10, deadline=None)
def test_predictions_keep_the_model_s_order(seed: int, ranks: int) -> None:
    """More nodes: never a shorter update in weak scaling, never a higher efficiency."""
    fit = fitted(measured(seed=seed), ensemble=40)
    less, more = predict(fit, ranks + 1), predict(fit, ranks + 2)
    assert more.seconds.value >= less.seconds.value
    assert more.efficiency.value <= less.efficiency.value
    for one in (less, more):
        for interval in (one.seconds, one.images_per_sec, one.efficiency, *one.shares.values()):
            assert interval.covers(interval.value)
        assert sum(share.value for share in one.shares.values()) == pytest.approx(1)


# How sure it is


def test_intervals_widen_with_the_distance_and_with_the_noise() -> None:
    def width(fit: Fit, ranks: int) -> float:
        low, high = bounds(predict(fit, ranks).seconds)
        return high / low

    quiet, loud = fitted(measured(noise=0.005)), fitted(measured(noise=0.05))
    assert width(quiet, 3) < width(quiet, 12) < width(quiet, 200)
    assert width(loud, 3) > width(quiet, 3)


def test_an_interval_for_a_measurement_is_wider_than_for_the_truth() -> None:
    fit = fitted(measured(noise=0.05), ensemble=400)
    truth, one = bounds(predict(fit, 3).seconds), bounds(predict(fit, 3, repeats=1).seconds)
    assert one[1] / one[0] > truth[1] / truth[0]


def test_the_model_s_own_error_counts_only_beyond_what_was_measured() -> None:
    points = measured(noise=0.001)
    sure, doubtful = (fitted(points, model_error=error) for error in (0.0, 0.2))
    assert predict(sure, 3).seconds == predict(doubtful, 3).seconds
    low, high = bounds(predict(doubtful, 12).seconds)
    assert high / low > np.exp(2 * 1.5 * 0.2 * 2)


def test_without_repeats_there_are_values_and_no_intervals() -> None:
    fit = fitted(measured(repeats=1))
    found = predict(fit, 8)
    assert fit.models is None
    assert not found.seconds.known
    assert not found.efficiency.known
    assert not knee(fit).nodes.known
    assert [one.covered for one in leave_out(fit)] == [None] * 3
    assert predict(fitted(measured(repeats=1), noise=0.02), 8).seconds.known


def script() -> ModuleType:
    """benchmarks/ is no package."""
    path = ROOT / "benchmarks" / "scaling_coverage.py"
    spec = importlib.util.spec_from_file_location("scaling_coverage", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_coverage"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_intervals_hold_what_they_promise() -> None:
    """Of machines drawn from the prior, with no error of the formula, a 95 % interval misses 5 of
    100: of 60 campaigns it holds 52 to 60 in all but 1 of 200 tests. benchmarks/README.md has 200.
    """
    found, efficiency = script().campaigns(
        "prior", 40, (1, 2, 3), (4, 16), ensemble=150, model_error=0.0
    )
    assert min(found[4].covered, found[4].measured, found[16].covered) >= 34 / 40
    assert found[4].error[0] < 0.03
    assert 0.88 <= efficiency <= 1


@pytest.mark.slow
def test_intervals_hold_where_the_formula_is_not_exact() -> None:
    """Clusters with exponential stragglers, uneven nodes and a network that varies."""
    found, _ = script().campaigns("simulated", 20, (1, 2, 3), (4, 16), ensemble=150)
    assert min(found[4].covered, found[4].measured, found[16].covered) >= 18 / 20
    assert found[4].error[0] < 0.03


# Extrapolation


def test_it_always_says_how_far_it_is_beyond() -> None:
    fit = fitted(measured(counts=(2, 3, 4)))
    assert predict(fit, 4).notes == ()
    assert predict(fit, 4).beyond == 1.0
    far = predict(fit, 1000)
    assert far.beyond == 250
    assert far.notes == ("250 times the most ranks that were measured (4)",)
    assert predict(fit, 1).notes == ("fewer ranks than the fewest that were measured (2)",)
    other = predict(fit, 4, nodes=2, images_per_update=1024, accumulation=2)
    assert [note.split(";")[0] for note in other.notes] == [
        "2 ranks on a node",
        "256 images per rank",
        "an accumulation of 2, which was not measured",
    ]


def test_a_left_out_point_is_predicted() -> None:
    points = measured(counts=(1, 2, 3, 4), seed=2)
    found = leave_out(fitted(points))
    assert [(one.point.ranks, one.extrapolated) for one in found] == [
        (4, True),
        (3, False),
        (2, False),
        (1, False),
    ]
    assert abs(found[0].error) < 0.1
    assert found[0].measured == pytest.approx(points[3].images_per_sec().value)
    assert leave_out(fitted(points[:2])) == ()


# The knee


def test_the_knee_of_a_perfect_network_lies_beyond() -> None:
    ideal = replace(TRUTH, jitter=0.0, within=IDEAL, between=IDEAL)
    points = measured(ideal, counts=(1, 2, 4, 8, 16), noise=0.0)
    found = knee(fitted(points, wire=Wire(0)), most_nodes=64)
    assert found.open
    assert found.high_open
    assert found.nodes.value == 64


def test_the_knee_is_where_one_more_buys_less_than_half() -> None:
    points = measured(counts=(1, 2, 4, 8, 16), noise=0.002)
    fit = fitted(points)
    found = knee(fit, most_nodes=500)
    speeds = [
        32 * n / float(fit.model.seconds(Decomposition.of(n, n, 32 * n))[0]) for n in range(1, 501)
    ]
    worth = [n for n, (a, b) in enumerate(pairwise(speeds), 2) if b - a >= 0.5 * speeds[0]]
    assert found.nodes.value == worth[-1]
    low, high = bounds(found.nodes)
    assert 1 <= low <= found.nodes.value <= high
    assert found.beyond == pytest.approx(worth[-1] / 16)


def test_a_slower_network_brings_the_knee_closer() -> None:
    knees = [
        knee(fitted(measured(replace(TRUTH, between=Link(latency, 1e-9)), (1, 2, 4, 16, 64))))
        for latency in (1e-6, 1e-5, 1e-4, 1e-3)
    ]
    values = [one.nodes.value for one in knees]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_nodes_that_hold_several_ranks() -> None:
    fit = fitted(measured(counts=(4, 8, 16, 32), width=4))
    found = knee(fit, most_nodes=256)
    assert found.ranks_per_node == 4
    assert found.beyond == pytest.approx(4 * found.nodes.value / 32)


# What cannot be


@pytest.mark.parametrize(
    ("points", "changed", "message"),
    [
        ([], {}, "there are none"),
        (measured(counts=(4,)), {}, "all have 4"),
        (measured(counts=(4,)) * 2, {}, "all have 4"),
        (measured(), {"noise": nan}, "noise is nan"),
        (measured(), {"model_error": -0.1}, "model_error is -0.1"),
        (measured(), {"ensemble": 3}, "an ensemble of 3"),
        (measured(), {"ranks_per_node": 0}, "0 ranks per node"),
        (measured(), {"confidence": 1.0}, "confidence"),
    ],
)
def test_fits_that_cannot_be(points: list[Point], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fitted(points, **changed)


@pytest.mark.parametrize(
    "wrong", [{"latency": 0.0}, {"latency": nan}, {"seconds_per_byte": -1.0}, {"factor": 1.0}]
)
def test_links_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="a link"):
        KnownLink(**wrong)


def test_predictions_that_cannot_be() -> None:
    fit = fitted(measured())
    for arguments in ({"ranks": 0}, {"ranks": 2, "nodes": 3}, {"ranks": 2, "accumulation": 0}):
        with pytest.raises(UsageError):
            predict(fit, **arguments)
    with pytest.raises(UsageError, match="-1 ranks per node"):
        knee(fit, ranks_per_node=-1)
    for most in (1, 10**9):
        with pytest.raises(UsageError, match="a search"):
            knee(fit, most_nodes=most)


any_points = st.lists(
    st.builds(
        lambda ranks, width, images, seconds, steps: Point(
            ranks, -(-ranks // width), images, tuple(seconds), steps
        ),
        st.integers(1, 10**6),
        st.integers(1, 64),
        st.floats(1e-6, 1e15),
        st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3),
        st.integers(1, 100),
    ),
    min_size=1,
    max_size=5,
)


@given(any_points, st.floats(0, 1e18), st.sampled_from(["weak", "strong"]), st.integers(1, 10**6))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_finite_input_ends_in_a_traceback(
    points: list[Point], size: float, mode: Mode, ranks: int
) -> None:
    try:
        fit = fitted(points, wire=Wire(size), mode=mode, ensemble=40)
        found = predict(fit, ranks)
        knee(fit, most_nodes=16)
    except UsageError:
        return
    assert found.seconds.value > 0
    for interval in (found.seconds, found.images_per_sec, found.efficiency):
        assert interval.covers(interval.value) in (None, True)
