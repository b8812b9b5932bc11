"""Where warm-up ends, how sure a mean is, and when a repeat has been measured for long enough."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.benchstats import LEAST_STEADY, Enough, find_warmup
from harness.student import mean_interval, student_quantile

SERIES = st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=60)


def noisy(count: int, mean: float, seed: int, spread: float = 0.05) -> list[float]:
    draw = random.Random(seed)
    return [mean * draw.lognormvariate(0, spread) for _ in range(count)]


class TestWarmup:
    @given(SERIES)
    def test_is_never_more_than_half(self, seconds: list[float]) -> None:
        assert 0 <= find_warmup(seconds).windows <= len(seconds) / 2

    @given(SERIES, st.sampled_from([0.25, 2.0, 1024.0]))
    def test_does_not_depend_on_the_unit(self, seconds: list[float], factor: float) -> None:
        assert find_warmup([factor * x for x in seconds]) == find_warmup(seconds)

    @pytest.mark.parametrize("count", [1, 2, 3, 50, 2500])
    def test_of_equal_windows_is_none(self, count: int) -> None:
        assert find_warmup([0.1] * count).windows == 0
        assert find_warmup([0.1] * count).settled

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize(("slow", "count"), [(1, 60), (7, 100), (30, 200), (40, 5000)])
    def test_slow_windows_at_the_front_are_cut(self, slow: int, count: int, seed: int) -> None:
        found = find_warmup(noisy(slow, 0.3, seed) + noisy(count - slow, 0.1, seed + 100))
        assert found.windows >= slow
        assert found.settled

    @pytest.mark.parametrize("seed", range(20))
    def test_a_decaying_start_leaves_little_bias(self, seed: int) -> None:
        draw = random.Random(seed)
        series = [
            0.1 * (1 + 2 * math.exp(-i / 15)) * draw.lognormvariate(0, 0.05) for i in range(400)
        ]
        cut = find_warmup(series).windows
        assert 15 <= cut < 200
        assert statistics.fmean(series[cut:]) == pytest.approx(0.1, rel=0.02)
        assert statistics.fmean(series) > 0.105

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("place", [20, 45])
    def test_one_interruption_does_not_move_it(self, place: int, seed: int) -> None:
        series = noisy(100, 0.1, seed)
        before = find_warmup(series)
        series[place] *= 50
        assert abs(find_warmup(series).windows - before.windows) <= 5

    def test_steady_windows_are_nearly_all_kept(self) -> None:
        cuts = [find_warmup(noisy(300, 0.1, seed)).windows for seed in range(100)]
        assert statistics.fmean(cuts) < 15
        assert all(find_warmup(noisy(300, 0.1, seed)).settled for seed in range(100))

    def test_what_gets_ever_faster_has_not_settled(self) -> None:
        assert not find_warmup([1.0 - 0.005 * i for i in range(150)]).settled

    def test_what_is_cut_off_leaves_no_bias(self) -> None:
        """Over steady series, which have nothing to cut, the mean of what is left is right."""
        means = []
        for seed in range(200):
            series = noisy(60, 0.1, seed, spread=0.2)
            means.append(statistics.fmean(series[find_warmup(series).windows :]))
        true = 0.1 * math.exp(0.2**2 / 2)
        assert statistics.fmean(means) == pytest.approx(true, rel=0.01)


class TestInterval:
    def test_published_quantiles(self) -> None:
        assert student_quantile(1) == pytest.approx(12.706, abs=5e-4)
        assert student_quantile(2) == pytest.approx(4.303, abs=5e-4)
        assert student_quantile(4) == pytest.approx(2.776, abs=5e-4)

    @given(st.lists(st.floats(1, 1e6), min_size=2, max_size=10))
    def test_holds_the_mean(self, values: list[float]) -> None:
        mean, low, high = mean_interval(values)
        assert low is not None
        assert high is not None
        assert low <= mean <= high
        assert mean == pytest.approx(statistics.fmean(values))

    def test_of_one_value_is_not_known(self) -> None:
        assert mean_interval([3.0]) == (3.0, None, None)

    def test_covers_the_truth_as_often_as_it_says(self) -> None:
        draw, hits = random.Random(0), 0
        for _ in range(2000):
            _, low, high = mean_interval([draw.gauss(10, 2) for _ in range(4)])
            hits += low is not None and high is not None and low < 10 < high
        assert 0.93 < hits / 2000 < 0.97


class TestEnough:
    def updates(self, seconds: float, windows: list[float]) -> int | None:
        """After how many of these updates it is enough; None: they do not suffice."""
        now = [0.0]
        enough = Enough(seconds, lambda: now[0])
        for number, window in enumerate([0.0, *windows]):
            now[0] += window
            if enough():
                return number
        return None

    def test_is_that_many_seconds_of_steady_updates(self) -> None:
        done = self.updates(5.0, [0.1] * 1000)
        assert done in (50, 51)  # ten tenths are not quite 1

    @pytest.mark.parametrize("seed", range(10))
    def test_warm_up_does_not_count(self, seed: int) -> None:
        windows = noisy(20, 0.5, seed) + noisy(1000, 0.1, seed + 50)
        done = self.updates(5.0, windows)
        assert done is not None
        found = find_warmup(windows[:done])
        assert sum(windows[found.windows : done]) >= 5.0 - 1e-9
        assert sum(windows[:done]) < 25

    def test_needs_some_windows_however_long_they_are(self) -> None:
        done = self.updates(1.0, [60.0] * 100)
        assert done is not None
        assert LEAST_STEADY <= done <= 2 * LEAST_STEADY

    def test_gives_up_on_what_never_settles(self) -> None:
        windows = [0.2 * 0.999**i for i in range(5000)]
        done = self.updates(1.0, windows)
        assert done is not None
        assert 4.0 <= sum(windows[:done]) < 4.5

    def test_looks_rarely(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = []

        def look(seconds: list[float]) -> object:
            looks.append(len(seconds))
            return find_warmup(seconds)

        monkeypatch.setattr("harness.benchstats.find_warmup", look)
        assert self.updates(5.0, noisy(200, 0.01, 1) + noisy(5000, 0.002, 2)) is not None
        assert len(looks) < 10
