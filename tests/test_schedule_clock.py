"""The clock's closed forms against a walk that takes one update at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.schedule.clock import (
    Clock,
    EpochEnd,
    Limit,
    advance,
    step,
    update_size,
    updates_by_size,
    updates_until,
)
from harness.units import Duration

NOWHERE = Limit()
ends = st.sampled_from(["short", "carry"])


def walk(clock: Clock, batch: int, epoch_end: EpochEnd, end: Limit) -> Iterator[Clock]:
    """The points after each update, as the trainer reaches them."""
    while True:
        yield clock
        if end.reached(clock):
            return
        clock = step(clock, update_size(clock, batch, epoch_end, end))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Clock, int]:
    """A point, most often in mid-epoch, and a batch below, at or above the data set's size."""
    size = draw(st.integers(1, 60))
    batch = draw(st.integers(1, 2 * size + 3) | st.just(size) | st.just(size + 1))
    clock = Clock(draw(st.integers(0, 5 * size)), draw(st.integers(0, 100)), size)
    return clock, batch


@given(situations(), ends, st.integers(0, 60), st.integers(1, 400) | st.none())
def test_advance_is_that_many_updates(
    situation: tuple[Clock, int], epoch_end: EpochEnd, updates: int, reach: int | None
) -> None:
    clock, batch = situation
    end = NOWHERE if reach is None else Limit(samples=clock.samples + reach)
    for count, point in enumerate(walk(clock, batch, epoch_end, end)):
        assert advance(clock, batch, count, epoch_end, end) == point
        if count == updates:
            return


@given(situations(), ends, st.integers(1, 400), st.integers(0, 60) | st.none())
def test_updates_until_is_the_first_update_that_reaches_the_limit(
    situation: tuple[Clock, int], epoch_end: EpochEnd, reach: int, updates: int | None
) -> None:
    clock, batch = situation
    limits = [
        Limit(samples=clock.samples + reach),
        Limit(samples=max(0, clock.samples - reach)),
        Limit(samples=clock.samples),
    ]
    if updates is not None:
        limits += [Limit(updates=clock.updates + updates), Limit(updates=0)]
        limits += [Limit(samples=clock.samples + reach, updates=clock.updates + updates)]
    for limit in limits:
        counted = next(
            count
            for count, point in enumerate(walk(clock, batch, epoch_end, NOWHERE))
            if limit.reached(point)
        )
        assert updates_until(clock, batch, limit, epoch_end) == counted


@given(situations(), ends, st.integers(1, 400))
def test_a_run_ends_exactly_at_its_end(
    situation: tuple[Clock, int], epoch_end: EpochEnd, reach: int
) -> None:
    clock, batch = situation
    end = Limit(samples=clock.samples + reach)
    points = list(walk(clock, batch, epoch_end, end))
    assert points[-1].samples == clock.samples + reach
    assert len(points) - 1 == updates_until(clock, batch, end, epoch_end)
    sizes = [after.samples - before.samples for before, after in itertools.pairwise(points)]
    assert all(1 <= size <= batch for size in sizes)


@given(situations(), ends, st.integers(0, 60), st.integers(1, 400) | st.none())
def test_updates_by_size_are_the_sizes_of_the_updates(
    situation: tuple[Clock, int], epoch_end: EpochEnd, updates: int, reach: int | None
) -> None:
    clock, batch = situation
    end = NOWHERE if reach is None else Limit(samples=clock.samples + reach)
    points = list(itertools.islice(walk(clock, batch, epoch_end, end), updates + 1))
    sizes = [after.samples - before.samples for before, after in itertools.pairwise(points)]
    found = updates_by_size(clock, batch, len(sizes), epoch_end, end)
    assert found == Counter(sizes)
    assert sum(found.values()) == len(points) - 1
    assert sum(size * count for size, count in found.items()) == (
        points[-1].samples - points[0].samples
    )
    assert len(found) <= 4


def test_ninety_epochs_of_imagenet_are_counted_at_once() -> None:
    n, batch = 1_281_167, 256
    counts = updates_by_size(Clock(0, 0, n), batch, 90 * 5005, "short", Limit(samples=90 * n))
    assert counts == {256: 90 * 5004, n - 5004 * 256: 90}
    middle = Clock(n // 2, 0, n)  # the epoch's 640,584 samples end with 72, the next with 143
    assert updates_by_size(middle, batch, 2503 + 5005, "short", NOWHERE) == {
        256: 2502 + 5004, 72: 1, 143: 1
    }  # fmt: skip


@given(situations())
def test_short_ends_every_epoch_with_an_update_of_its_own(situation: tuple[Clock, int]) -> None:
    clock, batch = situation
    size = clock.dataset_size
    start = Clock(0, 0, size)
    end = Limit(samples=3 * size)
    samples = {point.samples for point in walk(start, batch, "short", end)}
    if batch <= size:
        assert {size, 2 * size, 3 * size} <= samples
    assert 3 * size in samples


@given(situations())
def test_carry_is_always_full(situation: tuple[Clock, int]) -> None:
    clock, batch = situation
    assert update_size(clock, batch, "carry", NOWHERE) == batch


@pytest.mark.parametrize(
    ("samples", "batch", "epoch_end", "end", "size"),
    [
        (0, 64, "short", None, 64),
        (1408, 64, "short", None, 29),  # 1437 − 22 × 64
        (1408, 64, "carry", None, 64),
        (1437, 64, "short", None, 64),
        (0, 1437, "short", None, 1437),
        (100, 1437, "short", None, 1337),
        (100, 1438, "short", None, 1438),  # larger than the data set: it runs on
        (0, 64, "short", 50, 50),
        (1408, 64, "carry", 1440, 32),
    ],
)
def test_sizes_of_updates(
    samples: int, batch: int, epoch_end: EpochEnd, end: int | None, size: int
) -> None:
    assert update_size(Clock(samples, 0, 1437), batch, epoch_end, Limit(samples=end)) == size


def test_a_billion_samples_are_counted_at_once() -> None:
    clock, end = Clock(0, 0, 10**9), Limit(samples=90 * 10**9)
    updates = updates_until(clock, 7, end, "short")
    assert updates == 90 * 142857143
    assert advance(clock, 7, updates - 1, "short", end).samples == 90 * 10**9 - 6
    assert advance(clock, 7, updates, "short", end).samples == 90 * 10**9


@given(
    st.integers(0, 10**12),
    st.integers(0, 10**9),
    st.integers(1, 10**9),
    st.sampled_from(["1ep", "0.5ep", "0.001ep", "3up", "7sa", "1000003sa"]),
    st.integers(0, 1000),
)
def test_a_multiple_is_reached_exactly_when_it_has_passed(
    samples: int, updates: int, size: int, text: str, index: int
) -> None:
    period, clock = Duration.parse(text), Clock(samples, updates, size)
    assert Limit.multiple(period, index, size).reached(clock) == (clock.passed(period) >= index)


@pytest.mark.parametrize(
    ("length", "fraction"), [("2ep", 0.25), ("1000sa", 0.5), ("40up", 0.125), ("0.5ep", 1.0)]
)
def test_fractions_of_a_run(length: str, fraction: float) -> None:
    assert Clock(500, 5, 1000).fraction(Duration.parse(length)) == fraction


def test_ten_tenths_of_an_epoch_are_the_epoch() -> None:
    tenth = Duration(Fraction(1, 10), "ep")
    assert Clock(1437, 0, 1437).passed(tenth) == 10
    assert Clock(1436, 0, 1437).passed(tenth) == 9


def test_a_limit_nowhere_is_never_reached() -> None:
    assert not NOWHERE.reached(Clock(10**15, 10**15, 1))
