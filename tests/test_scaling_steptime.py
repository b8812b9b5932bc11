"""The formula of an update's time: limits, laws, and values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from harness.errors import UsageError
from harness.scaling.steptime import (
    IDEAL,
    Decomposition,
    Link,
    StepTime,
    Topology,
    Wire,
    expected_maximum,
    together,
)

amounts = st.floats(1e-9, 1e3)
gammas = st.one_of(st.floats(1, 100), st.just(inf))
links = st.builds(Link, st.floats(0, 1e-2), st.floats(0, 1e-6))
topologies = st.sampled_from(["two-level", "ring"])
models = st.builds(
    StepTime,
    per_image=st.floats(1e-6, 1),
    fixed=st.floats(0, 1),
    jitter=st.floats(0, 0.5),
    gamma=gammas,
    within=links,
    between=links,
    wire=st.builds(Wire, st.floats(0, 1e10), st.floats(1e5, 1e9)),
    topology=topologies,
)


def seconds(model: StepTime, ranks: int, nodes: int, images: float, accumulation: int = 1) -> float:
    return float(model.seconds(Decomposition.of(ranks, nodes, images, accumulation))[0])


def test_by_hand() -> None:
    """2 nodes of 4 ranks, 10 buckets: inside 2·3·10·1e-5 + 1.5·1e8·1e-10 = 0.0156 s, between
    2·1·10·1e-4 + 1·1e8·1e-9 = 0.102 s; compute 32·1e-3 + 0.008 = 0.04 s; γ = 2."""
    model = StepTime(
        1e-3, 8e-3, 0.0, 2.0, Link(1e-5, 1e-10), Link(1e-4, 1e-9), Wire(1e8, 1e7)
    )  # fmt: skip
    assert seconds(model, 8, 2, 256) == pytest.approx((0.04**2 + 0.1176**2) ** 0.5)
    # two micro-batches: the first is not overlapped
    assert seconds(model, 8, 2, 512, 2) == pytest.approx(0.036 + (0.036**2 + 0.1176**2) ** 0.5)
    flat = replace(model, topology="ring")
    # 8 in a ring whose slowest link counts: 2·7·10·1e-4 + 1.75·1e8·1e-9 = 0.189 s
    assert seconds(flat, 8, 2, 256) == pytest.approx((0.04**2 + 0.189**2) ** 0.5)
    assert seconds(flat, 4, 1, 128) == pytest.approx(seconds(model, 4, 1, 128))


@given(models, st.floats(0.1, 1e4), st.integers(1, 8))
def test_one_rank_only_computes(model: StepTime, images: float, accumulation: int) -> None:
    expected = model.fixed + model.per_image * images
    assert seconds(model, 1, 1, images, accumulation) == pytest.approx(expected)


@given(models, st.integers(1, 5000))
def test_a_perfect_network_without_jitter_is_ideal(model: StepTime, ranks: int) -> None:
    ideal = replace(model, jitter=0.0, within=IDEAL, between=IDEAL)
    assert seconds(ideal, ranks, ranks, 32 * ranks) == pytest.approx(seconds(ideal, 1, 1, 32))


@given(models, st.integers(1, 64), st.integers(1, 8), st.integers(1, 4))
def test_parts_add_up_and_are_not_negative(
    model: StepTime, nodes: int, width: int, accumulation: int
) -> None:
    where = Decomposition.of(nodes * width, nodes, 32.0 * nodes * width, accumulation)
    parts = model.parts(where)
    total = parts.compute + parts.straggling + parts.exposed
    assert total == pytest.approx(parts.seconds)
    slack = -1e-12 * parts.seconds[0]
    assert min(parts.compute, parts.straggling, parts.communication, parts.exposed)[0] >= slack
    assert parts.exposed[0] <= parts.communication[0] - slack


@given(models, st.integers(1, 500))
def test_weak_scaling_never_gets_faster_with_more_nodes(model: StepTime, nodes: int) -> None:
    """Once there is a network between nodes."""
    few, many = seconds(model, nodes + 1, nodes + 1, 32.0 * (nodes + 1)), seconds(
        model, nodes + 2, nodes + 2, 32.0 * (nodes + 2)
    )  # fmt: skip
    assert many >= few * (1 - 1e-12)


@given(models, st.integers(2, 100), st.floats(1, 10))
def test_slower_networks_and_more_bytes_never_help(
    model: StepTime, ranks: int, factor: float
) -> None:
    now = seconds(model, ranks, ranks, 32.0 * ranks)
    between = Link(model.between.latency * factor, model.between.seconds_per_byte * factor)
    larger = Wire(model.wire.gradient_bytes * factor, model.wire.bucket_bytes)
    for worse in (replace(model, between=between), replace(model, wire=larger)):
        assert seconds(worse, ranks, ranks, 32.0 * ranks) >= now * (1 - 1e-12)


@given(models, st.integers(1, 50), st.integers(1, 8))
def test_more_overlap_never_hurts(model: StepTime, nodes: int, width: int) -> None:
    where = (nodes * width, nodes, 32.0 * nodes * width)
    times = [seconds(replace(model, gamma=gamma), *where) for gamma in (1, 1.5, 3, 10, inf)]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(times))


@given(models, st.floats(1e-3, 1e3), st.integers(1, 50))
def test_units_of_time(model: StepTime, unit: float, nodes: int) -> None:
    scaled = replace(
        model,
        per_image=model.per_image * unit,
        fixed=model.fixed * unit,
        within=Link(model.within.latency * unit, model.within.seconds_per_byte * unit),
        between=Link(model.between.latency * unit, model.between.seconds_per_byte * unit),
    )
    where = (4 * nodes, nodes, 128.0 * nodes)
    assert seconds(scaled, *where) == pytest.approx(unit * seconds(model, *where))


@given(st.integers(1, 4), st.integers(1, 64), topologies)
def test_accumulation_makes_the_network_count_for_less(
    steps: int, nodes: int, topology: Topology
) -> None:
    model = StepTime(1e-3, 0, 0.02, 2.0, Link(1e-6, 1e-11), Link(1e-5, 1e-10), Wire(1e8), topology)
    speeds = [
        32.0 * nodes * a / seconds(model, nodes, nodes, 32.0 * nodes * a, a)
        for a in (steps, steps + 1)
    ]
    assert speeds[1] >= speeds[0] * (1 - 1e-12)


# Overlap


@given(amounts, amounts, gammas)
def test_together_lies_between_the_larger_and_the_sum(a: float, b: float, gamma: float) -> None:
    found = float(together(a, b, gamma))
    assert max(a, b) * (1 - 1e-12) <= found <= (a + b) * (1 + 1e-12)
    assert found == pytest.approx(float(together(b, a, gamma)))


def test_together_at_its_ends() -> None:
    assert float(together(3.0, 4.0, 1.0)) == pytest.approx(7.0)
    assert float(together(3.0, 4.0, 2.0)) == pytest.approx(5.0)
    assert float(together(3.0, 4.0, inf)) == 4.0
    assert float(together(0.0, 0.0, 2.0)) == 0.0
    assert float(together(1e300, 1e300, 50.0)) == pytest.approx(1e300 * 2**0.02)
    assert float(together(1.0, 1e-200, 50.0)) == 1.0


# Stragglers


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 10_000, 10**7])
def test_the_expected_maximum(count: int) -> None:
    def density(x: float) -> float:
        rest = (count - 1) * stats.norm.logcdf(x)
        return float(count * x * stats.norm.pdf(x) * np.exp(rest))

    exact, _ = integrate.quad(density, -10, 10, limit=400, points=[2, 4, 5])
    assert expected_maximum(count)[0] == pytest.approx(exact, abs=1e-8)


def test_the_expected_maximum_keeps_order_and_shape() -> None:
    counts = np.array([[4, 1], [9, 4]])
    found = expected_maximum(counts)
    assert found.shape == (2, 2)
    assert found[0, 0] == found[1, 1]
    assert found[0, 1] == 0
    many = expected_maximum(np.arange(1, 3000))
    assert (np.diff(many) > 0).all()


# Bytes


@pytest.mark.parametrize(
    ("size", "bucket", "buckets"), [(0, 4e6, 1), (1e6, None, 1), (1e7, 4e6, 3), (8e6, 4e6, 2)]
)
def test_buckets(size: float, bucket: float | None, buckets: int) -> None:
    assert Wire(size, bucket).buckets == buckets


@pytest.mark.parametrize("wrong", [(-1.0,), (nan,), (inf,), (1e6, 0.0), (1e6, nan)])
def test_bytes_that_cannot_be(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match="_bytes is"):
        Wire(*wrong)
