"""α and β from rounds whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.alphabeta import LEAST_SIZES, RESAMPLES, Fit, fit, interval, resampled_medians

SIZES = [4**k for k in range(1, 14)]
ALPHA, BETA = 1e-4, 1e-9
Times = dict[int, list[float]]


def simulated(
    seed: int,
    *,
    rounds: int = 50,
    noise: float = 0.2,
    outliers: float = 0.0,
    large: tuple[int, float, float] | None = None,
) -> Times:
    """Rounds of α + β m with noise whose median is 1, some of them many times as long; ``large``:
    (m, α, β) of messages above m bytes."""
    rng = np.random.default_rng(seed)
    found = {}
    for size in SIZES:
        alpha, beta = large[1:] if large is not None and size > large[0] else (ALPHA, BETA)
        seconds = (alpha + beta * size) * np.exp(noise * rng.standard_normal(rounds))
        slow = np.where(rng.random(rounds) < outliers, rng.uniform(3, 30, rounds), 1.0)
        found[size] = (seconds * slow).tolist()
    return found


def test_times_without_noise_give_alpha_and_beta_back() -> None:
    (piece,) = fit(simulated(0, noise=0.0)).pieces
    assert piece.alpha.value == pytest.approx(ALPHA, rel=1e-6)
    assert piece.beta.value == pytest.approx(BETA, rel=1e-6)
    assert (piece.smallest, piece.largest) == (4, 4**13)


@given(
    alpha=st.floats(1e-6, 1e-2),
    beta=st.floats(1e-11, 1e-6),
    factor=st.floats(1e-3, 1e3),
)
@settings(deadline=None, max_examples=20)
def test_the_unit_of_time_does_not_matter(alpha: float, beta: float, factor: float) -> None:
    times = {size: [(alpha + beta * size) * (1 + k / 50) for k in range(7)] for size in SIZES}
    one = fit(times)
    other = fit({size: [value * factor for value in row] for size, row in times.items()})
    for a, b in zip(one.pieces, other.pieces, strict=True):
        assert b.alpha.value == pytest.approx(a.alpha.value * factor, rel=1e-3)
        assert b.beta.value == pytest.approx(a.beta.value * factor, rel=1e-3)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    runs = 80
    fits = [fit(simulated(seed), seed) for seed in range(runs)]
    covered = {"alpha": 0, "beta": 0}
    for one in fits:
        piece = one.pieces[0]
        covered["alpha"] += piece.alpha.low <= ALPHA <= piece.alpha.high
        covered["beta"] += piece.beta.low <= BETA <= piece.beta.high
    # 95 % nominal; a binomial of 80 with 0.9 is below 0.83 in 2 % of cases.
    assert min(covered.values()) >= 0.83 * runs, covered
    assert max(covered.values()) < runs or runs < 60, "far too wide"
    assert sum(len(one.pieces) > 1 for one in fits) <= 0.05 * runs


def test_five_rounds_do_too() -> None:
    runs = 60
    pieces = [fit(simulated(seed, rounds=5), seed).pieces[0] for seed in range(runs)]
    assert sum(p.alpha.low <= ALPHA <= p.alpha.high for p in pieces) >= 0.8 * runs


@pytest.mark.parametrize("seed", range(5))
def test_rounds_that_take_long_hardly_matter(seed: int) -> None:
    (piece,) = fit(simulated(seed, rounds=100, outliers=0.1)).pieces
    assert piece.alpha.value == pytest.approx(ALPHA, rel=0.1)
    assert piece.beta.value == pytest.approx(BETA, rel=0.1)


@pytest.mark.parametrize("place", range(len(SIZES)))
def test_a_size_that_was_disturbed_as_a_whole_bends_nothing(place: int) -> None:
    times = simulated(place)
    times[SIZES[place]] = [value * 5 for value in times[SIZES[place]]]
    found = fit(times)
    assert len(found.pieces) == 1
    assert found.pieces[0].alpha.value == pytest.approx(ALPHA, rel=0.1)
    assert found.pieces[0].beta.value == pytest.approx(BETA, rel=0.1)
    assert found.misfit > 1.05


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("border", [2**10, 2**17])
def test_two_protocols_are_told_apart(border: int, seed: int) -> None:
    found = fit(simulated(seed, large=(border, 5e-4, 3e-9)))
    small, large = found.pieces
    assert small.largest <= border < large.smallest
    assert small.alpha.value == pytest.approx(ALPHA, rel=0.15)
    assert large.alpha.value == pytest.approx(5e-4, rel=0.15)
    assert large.beta.value == pytest.approx(3e-9, rel=0.15)
    assert found.seconds(4**13)[0] == pytest.approx(3e-9 * 4**13, rel=0.15)
    assert found.seconds(4)[0] == pytest.approx(ALPHA, rel=0.15)


def test_what_lies_off_its_line_has_wider_intervals() -> None:
    rng = np.random.default_rng(0)
    bent = {
        size: [value * factor for value in row]
        for (size, row), factor in zip(
            simulated(1).items(), np.exp(0.2 * rng.standard_normal(len(SIZES))), strict=True
        )
    }

    def width(one: Fit) -> float:
        return one.pieces[0].alpha.high / one.pieces[0].alpha.low

    assert fit(bent).misfit > 1.5
    assert width(fit(bent)) > width(fit(simulated(1)))


@given(
    st.dictionaries(
        st.integers(1, 2**30),
        st.lists(st.floats(1e-7, 1e3), min_size=2, max_size=8),
        min_size=LEAST_SIZES,
        max_size=14,
    )
)
@settings(deadline=None, max_examples=30)
def test_whatever_was_measured_estimates_lie_in_their_intervals(times: Times) -> None:
    found = fit(times)
    assert found.misfit >= 1
    for piece in found.pieces:
        for one in (piece.alpha, piece.beta):
            assert 0 <= one.low <= one.value <= one.high < np.inf
    assert (found.seconds(min(times)) > 0).all()
    json.dumps([piece.alpha.as_list() for piece in found.pieces], allow_nan=False)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({4: [1.0], 16: [1.0]}, "at least 3"),
        ({4: [1.0], 16: [1.0], 64: []}, "needs rounds"),
        ({4: [1.0], 16: [1.0], 64: [0.0]}, "more than 0"),
    ],
)
def test_too_little_is_refused(times: Times, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(times)


def test_equal_seeds_draw_equal_rounds() -> None:
    times = simulated(3)
    double = {size: [2 * value for value in row] for size, row in times.items()}
    ratio = resampled_medians(double, 7) / resampled_medians(times, 7)
    assert ratio.shape == (1 + RESAMPLES, len(SIZES))
    assert ratio == pytest.approx(2.0)


def test_an_interval_can_reach_to_never() -> None:
    draws = np.array([5.0] + [4.0] * 900 + [np.inf] * 100)
    one = interval(draws)
    assert (one.value, one.low, one.high) == (5.0, 4.0, np.inf)
