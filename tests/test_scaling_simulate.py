"""Simulated clusters against the formula, against each other, and against theory of maxima."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.scaling.simulate import Simulated, Stragglers, simulate
from harness.scaling.steptime import IDEAL, Decomposition, Link, StepTime, Wire

MODEL = StepTime(
    1e-3, 2e-3, 0.0, 3.0, Link(5e-6, 1e-11), Link(2e-5, 1e-10), Wire(1e8, 25e6)
)  # fmt: skip
NO_NETWORK = replace(MODEL, within=IDEAL, between=IDEAL)
KINDS: tuple[Literal["normal", "lognormal", "exponential", "gamma"], ...] = (
    "normal", "lognormal", "exponential", "gamma",
)  # fmt: skip


def run(model: StepTime = MODEL, **changed: Any) -> Simulated:
    return simulate(
        model, **{"nodes": 16, "ranks_per_node": 4, "images_per_rank": 64, "updates": 400} | changed
    )


@pytest.mark.parametrize("accumulation", [1, 4])
def test_without_stragglers_it_is_the_formula(accumulation: int) -> None:
    found = run(accumulation=accumulation)
    where = Decomposition.of(64, 16, 64 * 64, accumulation)
    assert found.seconds == pytest.approx(np.full(400, MODEL.seconds(where)[0]))
    assert found.images_per_sec == pytest.approx(64 * 64 / found.seconds[0])
    assert found.efficiency == pytest.approx(found.alone / found.seconds[0])


def test_the_mean_of_normal_jitter_is_that_of_the_formula() -> None:
    """Without a network the slowest of 64 is 1 + spread · z(64) times the mean."""
    found = run(NO_NETWORK, stragglers=Stragglers(spread=0.03), updates=4000)
    expected = replace(NO_NETWORK, jitter=0.03).seconds(Decomposition.of(64, 16, 64 * 64))[0]
    error = 4 * found.seconds.std() / 4000**0.5
    assert found.seconds.mean() == pytest.approx(expected, abs=error)
    assert error < 0.002 * expected


def test_the_slowest_of_exponential_jitter_is_a_harmonic_sum() -> None:
    """The maximum of n exponential variables has a mean of 1 + 1/2 + … + 1/n."""
    found = run(NO_NETWORK, stragglers=Stragglers("exponential", 0.05), updates=4000)
    harmonic = sum(1 / i for i in range(1, 65))
    expected = 0.066 * (0.95 + 0.05 * harmonic)
    assert found.seconds.mean() == pytest.approx(expected, abs=4 * found.seconds.std() / 4000**0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_jitter_has_the_mean_and_spread_that_it_is_given(kind: Any) -> None:
    drawn = Stragglers(kind, 0.1).factors(np.random.default_rng(2), (200_000,))
    assert drawn.mean() == pytest.approx(1, abs=0.001)
    assert drawn.std() == pytest.approx(0.1, rel=0.02)
    assert drawn.min() > 0


def test_stalls_come_on_top() -> None:
    stragglers = Stragglers(stalls=0.01, stall_factor=5.0)
    drawn = stragglers.factors(np.random.default_rng(2), (200_000,))
    assert set(np.unique(drawn)) == {1.0, 5.0}
    assert (drawn == 5).mean() == pytest.approx(0.01, rel=0.1)
    found = run(NO_NETWORK, stragglers=Stragglers(stalls=1e-9, stall_factor=5.0))
    assert found.efficiency == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_more_ranks_wait_longer(kind: Any) -> None:
    means = [
        run(NO_NETWORK, nodes=nodes, stragglers=Stragglers(kind, 0.05)).seconds.mean()
        for nodes in (1, 8, 64, 512)
    ]
    assert means == sorted(means)
    assert means[-1] > means[0]


def test_accumulation_averages_the_jitter_and_hides_the_network() -> None:
    stragglers = Stragglers(spread=0.05)
    found = [
        run(images_per_rank=16 * steps, accumulation=steps, stragglers=stragglers).efficiency
        for steps in (1, 2, 4, 16)
    ]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_uneven_nodes_and_networks_slow_all_down() -> None:
    plain = run().seconds.mean()
    assert np.ptp(run(stragglers=Stragglers(uneven=0.05)).seconds) == 0
    assert run(stragglers=Stragglers(uneven=0.05)).seconds.mean() > plain
    varied = run(network_spread=0.3)
    assert varied.seconds.mean() > plain
    assert varied.seconds.std() > 0
    assert np.ptp(run(nodes=1, network_spread=0.3).seconds) == 0


def test_thousands_of_nodes() -> None:
    found = run(nodes=4096, ranks_per_node=8, stragglers=Stragglers("lognormal", 0.03), updates=50)
    assert found.ranks == 32768
    assert found.seconds.shape == (50,)
    low, middle, high = found.quantiles(0.05, 0.5, 0.95)
    assert low <= middle <= high
    assert found.throughputs().min() <= found.images_per_sec <= found.throughputs().max()
    efficiencies = found.efficiencies()
    assert efficiencies.min() <= found.efficiency <= efficiencies.max() <= 1.2


def test_a_seed_repeats_itself_whatever_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stragglers = Stragglers("gamma", 0.05, uneven=0.01, stalls=1e-3, stall_factor=2)
    first, again, other = (run(stragglers=stragglers, seed=seed).seconds for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).all()
    monkeypatch.setattr("harness.scaling.simulate._AT_ONCE", 100)
    pieces = run(stragglers=stragglers, seed=1, updates=20)
    assert pieces.seconds.shape == (20,)
    assert pieces.seconds.mean() == pytest.approx(first.mean(), rel=0.05)


@pytest.mark.parametrize(
    "wrong",
    [{"spread": -0.1}, {"spread": nan}, {"stalls": 1.1}, {"kind": "cauchy"}, {"uneven": 2.0}],
)
def test_stragglers_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="stragglers"):
        Stragglers(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"updates": 10**7}, "updates is"),
        ({"nodes": 10**6, "updates": 10**6}, "draws"),
        ({"network_spread": nan}, "network_spread"),
        ({"images_per_rank": 0}, "images_per_update is 0"),
    ],
)
def test_clusters_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(**wrong)


@given(
    st.integers(1, 50),
    st.integers(1, 8),
    st.integers(1, 4),
    st.builds(
        Stragglers,
        st.sampled_from(KINDS),
        st.floats(0, 1),
        st.floats(0, 1),
        st.floats(0, 1),
        st.floats(0, 100),
    ),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_any_cluster_has_positive_times(
    nodes: int, width: int, steps: int, stragglers: Stragglers, spread: float
) -> None:
    found = simulate(
        MODEL,
        nodes=nodes,
        ranks_per_node=width,
        images_per_rank=32,
        accumulation=steps,
        stragglers=stragglers,
        network_spread=spread,
        updates=5,
    )
    assert np.isfinite(found.seconds).all()
    assert (found.seconds >= 0).all()
