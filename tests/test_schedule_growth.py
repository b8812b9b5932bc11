"""Growth policies that know the whole run, and the stages that a scheduler makes of a policy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.schedule.clock import Clock, EpochEnd, Limit, step, update_size
from harness.schedule.configured import growth_policy, stage_scheduler
from harness.schedule.growth import (
    HUGE,
    BatchDecision,
    Fixed,
    Geometric,
    GrowthPolicy,
    Linear,
    Listed,
    Observation,
    StageScheduler,
)
from harness.schema import Batch
from harness.units import Duration, Unit

P = Duration.parse

factors = st.decimals(1, 4, places=3).map(float)
slopes = st.decimals("0.01", 300, places=2).map(float)
periods = st.one_of(
    st.integers(1, 40).map(lambda n: Duration(Fraction(n), "up")),
    st.integers(1, 400).map(lambda n: Duration(Fraction(n), "sa")),
    st.decimals("0.05", 3, places=2).map(lambda n: Duration(Fraction(n), "ep")),
)
ends = st.sampled_from(["short", "carry"])
batches = st.integers(1, 200)


@st.composite
def stage_lists(draw: st.DrawFn, batches: st.SearchStrategy[int] = batches) -> Listed:
    """Stages with starts that lie on points of their own in data sets of 20 samples or more."""
    unit: Unit = draw(st.sampled_from(["up", "sa", "ep"]))
    starts = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=6)))
    scale = {"up": Fraction(1), "sa": Fraction(7), "ep": Fraction(1, 20)}[unit]
    stages = [(Duration(start * scale, unit), draw(batches)) for start in starts]
    return Listed(draw(batches), tuple(stages))


Known = Fixed | Listed | Geometric | Linear

growing: st.SearchStrategy[Known] = st.one_of(
    st.builds(Fixed, batches),
    st.builds(Geometric, batches, factors, periods),
    st.builds(Linear, batches, slopes, periods),
)
policies: st.SearchStrategy[Known] = growing | stage_lists()


def every(text: str, factor: float = 2.0, initial: int = 64) -> Geometric:
    return Geometric(initial, factor, P(text))


def listed(initial: int, **stages: int) -> Listed:
    """``listed(64, e5=128)`` is 128 from 5ep on; u: updates, s: samples."""
    units = {"e": "ep", "u": "up", "s": "sa"}
    return Listed(
        initial,
        tuple((P(f"{start[1:]}{units[start[0]]}"), batch) for start, batch in stages.items()),
    )


def follow(
    scheduler: StageScheduler, clock: Clock, updates: int, epoch_end: EpochEnd
) -> list[tuple[Clock, BatchDecision]]:
    """Decisions of a number of updates, taken one by one as the trainer does."""
    taken = []
    for _ in range(updates):
        decision = scheduler.decide(clock)
        taken.append((clock, decision))
        clock = step(clock, update_size(clock, decision.batch, epoch_end, Limit()))
    return taken


def batches_at(scheduler: StageScheduler, epochs: Sequence[float]) -> list[int]:
    """The batch at some points of a data set of 1,000 samples, asked for in their order."""
    return [scheduler.decide(Clock(int(epoch * 1000), 0, 1000)).batch for epoch in epochs]


# What policies ask for


@pytest.mark.parametrize(
    ("policy", "samples", "updates", "asked"),
    [
        (Fixed(64), 10**9, 10**6, 64),
        (every("5ep"), 0, 0, 64),
        (every("5ep"), 4999, 0, 64),
        (every("5ep"), 5000, 0, 128),
        (every("5ep"), 25000, 0, 2048),
        (every("10up"), 10**6, 9, 64),
        (every("10up"), 0, 30, 512),
        (every("500sa", 1.5), 1500, 0, 216),
        (every("1ep", 1.1, 100), 2000, 0, 121),  # 121.00000000000001 in floats, which rounds to 122
        (every("1ep", 1.1, 100), 3000, 0, 134),  # ⌈133.1⌉
        (every("1ep", 1.0), 10**9, 0, 64),
        (every("1ep", 4.0), 10**9, 0, 2**53),
        (Linear(64, 8.0, P("1ep")), 0, 0, 64),
        (Linear(64, 8.0, P("1ep")), 999, 0, 64),
        (Linear(64, 8.0, P("1ep")), 1000, 0, 72),
        (Linear(64, 8.0, P("1ep")), 10999, 0, 144),  # 64 + 8 × 10
        (Linear(64, 0.1, P("1up")), 0, 1, 65),  # ⌈64.1⌉
        (Linear(64, 0.1, P("1up")), 0, 10, 65),  # exactly 65
        (Linear(64, 0.1, P("1up")), 0, 11, 66),
        (Linear(64, 0.1, P("1up")), 0, 10_000_000, 1_000_064),
        (Linear(64, 1.1, P("1up")), 0, 10, 75),  # 64 + 11.000000000000002 in floats: 76
        (Linear(1, 0.7, P("3up")), 0, 29, 8),  # ⌈1 + 0.7 × 9⌉
        (Linear(64, 1e30, P("1up")), 0, 1, 2**53),
        (Linear(64, 1e-30, P("1up")), 0, 10**6, 65),
        (listed(64, e5=128, e10=512), 4999, 0, 64),
        (listed(64, e5=128, e10=512), 5000, 0, 128),
        (listed(64, e5=128, e10=512), 9999, 0, 128),
        (listed(64, e5=128, e10=512), 10000, 0, 512),
        (listed(64, e5=128, e10=512), 10**9, 10**9, 512),
        (listed(64, u7=200, u8=32), 10**6, 6, 64),
        (listed(64, u7=200, u8=32), 10**6, 7, 200),
        (listed(64, u7=200, u8=32), 10**6, 8, 32),
        (listed(64, s1=65), 0, 0, 64),
        (listed(64, s1=65), 1, 0, 65),
        (Listed(64, ()), 10**9, 10**9, 64),
    ],
)
def test_asks_for(policy: GrowthPolicy, samples: int, updates: int, asked: int) -> None:
    assert policy.asked(Clock(samples, updates, 1000)) == asked


@given(st.integers(1, 1000), st.decimals(1, 3, places=2), st.integers(0, 30))
def test_geometric_is_the_exact_power_rounded_up(initial: int, factor: float, growths: int) -> None:
    policy = Geometric(initial, float(factor), P("1sa"))
    exact = ceil(initial * Fraction(str(float(factor))) ** growths)
    assert policy.asked(Clock(growths, 0, 1000)) == min(exact, 2**53)


@given(st.integers(1, 1000), st.decimals("0.001", 300, places=3), st.integers(0, 10**7))
def test_linear_is_the_exact_line_rounded_up(initial: int, rate: Any, count: int) -> None:
    policy = Linear(initial, float(rate), P("1sa"))
    assert policy.asked(Clock(count, 0, 1000)) == ceil(initial + Fraction(rate) * count)


@given(growing, st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 500))
def test_never_asks_for_less_than_before(
    policy: GrowthPolicy, samples: int, updates: int, size: int
) -> None:
    earlier = policy.asked(Clock(samples, updates, size))
    assert 1 <= earlier <= policy.asked(Clock(samples + 77, updates + 3, size)) <= 2**53


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        (["5ep", "3ep"], "must ascend"),
        (["5ep", "5ep"], "must ascend"),
        (["1ep", "2ep", "1.5ep"], "must ascend"),
        (["10up", "10up"], "must ascend"),
        (["5ep", "6000sa"], "must all have one unit"),
        (["5ep", "600up"], "must all have one unit"),
    ],
)
def test_listed_stages_in_no_order_are_refused(starts: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Listed(64, tuple((P(start), 128) for start in starts))


# When they ask for something else


def at_limit(clock: Clock, limit: Limit) -> Clock:
    """The first point that reaches a limit, if nothing leaps over it."""
    samples = clock.samples if limit.samples is None else limit.samples
    updates = clock.updates if limit.updates is None else limit.updates
    return Clock(samples, updates, clock.dataset_size)


def between(clock: Clock, limit: Limit, share: Fraction) -> Clock:
    """A point from ``clock`` on and before the limit."""
    at = at_limit(clock, limit)
    samples, updates = (
        max(now, min(then - 1, now + int((then - now) * share)))
        for now, then in ((clock.samples, at.samples), (clock.updates, at.updates))
    )
    return Clock(samples, updates, clock.dataset_size)


@given(
    policies,
    st.integers(0, 5000),
    st.integers(0, 100),
    st.integers(20, 500),
    st.integers(0, 300),
    st.integers(0, 300),
    st.lists(st.fractions(0, 1), max_size=10),
)
def test_the_next_change_is_the_first_point_outside_the_window(
    policy: GrowthPolicy,
    samples: int,
    updates: int,
    size: int,
    below: int,
    above: int,
    shares: list[Fraction],
) -> None:
    clock = Clock(samples, updates, size)
    asked = policy.asked(clock)
    low, high = max(0, asked - 1 - below), asked + above
    change = policy.next_change(clock, low, high)
    if change is None:
        for far in (1, 10, 10**3, 10**6, 10**9):
            assert low < policy.asked(Clock(samples + far, updates + far, size)) <= high
        return
    assert not change.reached(clock)
    for share in (*shares, Fraction(1)):
        assert low < policy.asked(between(clock, change, share)) <= high
    assert not low < policy.asked(at_limit(clock, change)) <= high


@pytest.mark.parametrize(
    ("policy", "samples", "low", "high", "change"),
    [
        (Fixed(64), 0, 63, 64, None),
        (every("5ep"), 0, 0, 64, Limit(samples=5000)),
        (every("5ep"), 0, 0, 127, Limit(samples=5000)),
        (every("5ep"), 0, 0, 128, Limit(samples=10000)),
        (every("5ep"), 6000, 0, 1024, Limit(samples=25000)),
        (every("5ep", 1.0), 0, 0, 64, None),
        (every("7up"), 0, 63, 64, Limit(updates=7)),
        (Linear(64, 0.1, P("1up")), 0, 0, 64, Limit(updates=1)),
        (Linear(64, 0.1, P("1up")), 0, 0, 65, Limit(updates=11)),
        (Linear(64, 0.1, P("1up")), 0, 0, 164, Limit(updates=1001)),
        (Linear(64, 16.0, P("2ep")), 0, 0, 96, Limit(samples=6000)),
        (Linear(64, 16.0, P("2ep")), 3000, 79, 80, Limit(samples=4000)),
        (listed(64, e1=80, e2=100, e3=50), 0, 0, 64, Limit(samples=1000)),
        (listed(64, e1=80, e2=100, e3=50), 0, 0, 80, Limit(samples=2000)),
        (listed(64, e1=80, e2=100, e3=50), 0, 0, 100, None),
        (listed(64, e1=80, e2=100, e3=50), 0, 50, 100, Limit(samples=3000)),
        (listed(64, e1=80, e2=100, e3=50), 3500, 49, 50, None),
    ],
)
def test_next_changes(
    policy: GrowthPolicy, samples: int, low: int, high: int, change: Limit | None
) -> None:
    assert policy.next_change(Clock(samples, 0, 1000), low, high) == change


def test_a_factor_next_to_1_does_not_cost_a_look_at_every_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0
    after = Geometric._after

    def counted(self: Geometric, growths: int) -> int:
        nonlocal looks
        looks += 1
        return after(self, growths)

    monkeypatch.setattr(Geometric, "_after", counted)
    policy = every("1up", 1.000000001)
    change = policy.next_change(Clock(0, 0, 1000), 0, 64)
    assert change is not None
    assert change.updates == 1  # ⌈64.000000064⌉ is 65
    change = policy.next_change(Clock(0, 1, 1000), 0, 65)
    assert change is not None
    assert change.updates == 15504187  # ln(65 / 64) · 10⁹, rounded up
    assert looks < 200


# What the scheduler makes of it


@st.composite
def schedulers(
    draw: st.DrawFn, policies: st.SearchStrategy[Known] = policies
) -> Callable[[], StageScheduler]:
    """Makes the same scheduler each time: any policy, cap, multiple, with shrinking or without."""
    policy, multiple = draw(policies), draw(st.sampled_from([1, 1, 2, 8, 48]))
    policy = replace(policy, initial=-(-policy.initial // multiple) * multiple)
    least = policy.initial // multiple
    cap = draw(st.none() | st.integers(least, least + 3000 // multiple).map(multiple.__mul__))
    shrink = draw(st.booleans())
    return lambda: StageScheduler(policy, cap, multiple, shrink)


@given(schedulers(), st.integers(1, 300), ends, st.integers(0, 60))
def test_a_restored_scheduler_goes_on_as_if_nothing_had_happened(
    make: Callable[[], StageScheduler], size: int, epoch_end: EpochEnd, cut: int
) -> None:
    whole = follow(make(), Clock(0, 0, size), 80, epoch_end)
    first, second = make(), make()
    done = follow(first, Clock(0, 0, size), cut, epoch_end)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert done + follow(second, whole[cut][0], 80 - cut, epoch_end) == whole


@given(
    policies,
    st.sampled_from([1, 2, 8, 48]),
    st.none() | st.integers(0, 60),
    st.booleans(),
    st.integers(1, 300),
    ends,
)
def test_stages_follow_the_laws(
    policy: Known,
    multiple: int,
    room: int | None,
    shrink: bool,
    size: int,
    epoch_end: EpochEnd,
) -> None:
    initial = -(-policy.initial // multiple) * multiple
    policy = replace(policy, initial=initial)
    cap = None if room is None else initial + room * multiple
    most = cap or HUGE - HUGE % multiple
    scheduler = StageScheduler(policy, cap, multiple, shrink)
    followed = follow(scheduler, Clock(0, 0, size), 80, epoch_end)
    taken = [decision for _, decision in followed]
    assert (taken[0].stage, taken[0].growths, taken[0].batch) == (0, 0, initial)
    for before, after in itertools.pairwise(taken):
        assert shrink or before.batch <= after.batch
        assert after.stage - before.stage == (after.batch != before.batch)
        change = (after.batch > before.batch) - (after.batch < before.batch)
        assert after.growths - before.growths == change
    for index, (clock, decision) in enumerate(followed):
        asked = policy.asked(clock)
        asked_so_far = [policy.asked(point) for point, _ in followed[: index + 1]]
        wanted = asked if shrink else max(asked_so_far)
        assert decision.batch % multiple == 0
        assert decision.batch <= most
        assert decision.batch == most or wanted <= decision.batch < wanted + multiple
        assert decision.asked == max(asked, decision.batch)
        assert decision.cap_factor == min(1.0, decision.batch / asked)
        assert (decision.cap_factor < 1) == (asked > most)
        if not shrink:
            assert decision.growths == decision.stage


@given(schedulers(), st.integers(1, 300), ends)
def test_asked_again_at_the_same_point_it_says_the_same(
    make: Callable[[], StageScheduler], size: int, epoch_end: EpochEnd
) -> None:
    once, twice = make(), make()
    clock = Clock(0, 0, size)
    for _ in range(60):
        decision = once.decide(clock)
        assert twice.decide(clock) == twice.decide(clock) == decision
        assert twice.state_dict() == once.state_dict()
        clock = step(clock, update_size(clock, decision.batch, epoch_end, Limit()))


@given(schedulers(), st.integers(1, 300), ends)
def test_the_batch_stays_until_the_scheduler_s_next_change(
    make: Callable[[], StageScheduler], size: int, epoch_end: EpochEnd
) -> None:
    scheduler = make()
    clock, change, batch = Clock(0, 0, size), None, 0
    for _ in range(80):
        decision = scheduler.decide(clock)
        if batch and (change is None or not change.reached(clock)):
            assert decision.batch == batch
        batch, change = decision.batch, scheduler.next_change(clock)
        assert change is None or not change.reached(clock)
        clock = step(clock, update_size(clock, batch, epoch_end, Limit()))


@pytest.mark.parametrize(
    ("scheduler", "samples", "change"),
    [
        (StageScheduler(every("5ep"), cap=200), 5000, Limit(samples=10000)),
        (StageScheduler(every("5ep"), cap=200), 10000, None),  # 256, capped
        (StageScheduler(every("5ep"), cap=200, shrink=True), 10000, None),
        (StageScheduler(Linear(64, 1.0, P("1sa"))), 0, Limit(samples=1)),
        (StageScheduler(Linear(64, 1.0, P("1sa")), multiple_of=64), 0, Limit(samples=1)),
        (StageScheduler(Linear(64, 1.0, P("1sa")), multiple_of=64), 1, Limit(samples=65)),
        (StageScheduler(listed(64, e1=128, e2=32, e3=256)), 1000, Limit(samples=3000)),
        (StageScheduler(listed(64, e1=128, e2=32), shrink=True), 1000, Limit(samples=2000)),
        (StageScheduler(listed(64, e1=999, e2=32), cap=99, shrink=True), 1000, Limit(samples=2000)),
        (StageScheduler(listed(64, e1=999, e2=32), cap=99), 1000, None),
        (StageScheduler(listed(48, e1=90, e2=49), None, 48, True), 1000, None),  # 96, both
        (StageScheduler(listed(48, e1=90, e2=48), None, 48, True), 1000, Limit(samples=2000)),
    ],
)
def test_next_changes_of_a_scheduler(
    scheduler: StageScheduler, samples: int, change: Limit | None
) -> None:
    clock = Clock(samples, 0, 1000)
    scheduler.decide(clock)
    assert scheduler.next_change(clock) == change


def test_a_batch_that_does_not_shrink_has_no_change_below_it() -> None:
    scheduler = StageScheduler(listed(64, e1=128, e2=32, e3=100, e4=256))
    assert batches_at(scheduler, range(3)) == [64, 128, 128]
    assert scheduler.next_change(Clock(2000, 0, 1000)) == Limit(samples=4000)


def test_past_the_cap_the_rest_goes_to_the_rate() -> None:
    scheduler = StageScheduler(every("1ep"), cap=200)
    factors = [scheduler.decide(Clock(epoch * 1000, 0, 1000)).cap_factor for epoch in range(4)]
    assert factors == [1.0, 1.0, 200 / 256, 200 / 512]


def test_growing_past_the_cap_in_one_step_is_one_growth() -> None:
    scheduler = StageScheduler(every("1ep"), cap=200)
    assert scheduler.decide(Clock(0, 0, 1000)).batch == 64
    decision = scheduler.decide(Clock(9000, 0, 1000))
    assert (decision.batch, decision.asked, decision.growths) == (200, 64 * 512, 1)


def test_what_is_asked_for_is_rounded_up_to_a_multiple() -> None:
    scheduler = StageScheduler(listed(64, e1=65, e2=128, e3=129, e4=500), 448, 64)
    decisions = [scheduler.decide(Clock(epoch * 1000, 0, 1000)) for epoch in range(5)]
    assert [decision.batch for decision in decisions] == [64, 128, 128, 192, 448]
    assert [decision.asked for decision in decisions] == [64, 128, 128, 192, 500]
    assert [decision.growths for decision in decisions] == [0, 1, 1, 2, 3]
    assert [decision.cap_factor for decision in decisions] == [1.0, 1.0, 1.0, 1.0, 448 / 500]


def test_without_a_cap_too_it_is_a_multiple_at_all_times() -> None:
    scheduler = StageScheduler(every("1up", 4.0, 48), multiple_of=48)
    for updates in (0, 1, 25, 1000):
        assert scheduler.decide(Clock(0, updates, 1000)).batch % 48 == 0


def test_it_shrinks_only_if_told_to() -> None:
    policy = listed(64, e1=256, e2=128, e3=32, e4=512)
    assert batches_at(StageScheduler(policy), range(5)) == [64, 256, 256, 256, 512]
    scheduler = StageScheduler(policy, shrink=True)
    assert batches_at(scheduler, range(5)) == [64, 256, 128, 32, 512]
    decision = scheduler.decide(Clock(4000, 0, 1000))
    assert (decision.stage, decision.growths) == (4, 0)  # up, down, down, up


def test_it_may_come_to_less_than_it_began_with() -> None:
    scheduler = StageScheduler(listed(64, e1=32, e2=16), shrink=True)
    growths = [scheduler.decide(Clock(epoch * 1000, 0, 1000)).growths for epoch in range(3)]
    assert growths == [0, -1, -2]


@pytest.mark.parametrize(
    ("initial", "cap", "said"), [(64, None, "the initial batch, 64"), (96, 100, "the cap, 100")]
)
def test_initial_batch_and_cap_are_multiples(initial: int, cap: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}, is not a multiple of 48"):
        StageScheduler(Fixed(initial), cap, 48)


@given(schedulers(), st.integers(1, 300), ends)
def test_both_bounds_of_a_policy_that_knows_the_run_are_its_own_growth(
    make: Callable[[], StageScheduler], size: int, epoch_end: EpochEnd
) -> None:
    used = make()
    follow(used, Clock(0, 0, size), 30, epoch_end)
    whole = follow(make(), Clock(0, 0, size), 60, epoch_end)
    for bound in used.bounds():
        assert follow(bound, Clock(0, 0, size), 60, epoch_end) == whole


def test_policies_that_know_the_run_need_no_measurements() -> None:
    scheduler = StageScheduler(every("1up"))
    assert scheduler.measured is None
    asked: list[int] = []
    scheduler.agree = lambda batch: asked.append(batch) or 1  # type: ignore[func-returns-value]
    for updates in range(5):
        clock = Clock(0, updates, 1000)
        assert not scheduler.due(clock)
        assert scheduler.wanted(clock) is None
        assert scheduler.decide(clock).batch == 64 * 2**updates
        scheduler.observe(clock, Observation(64, float("nan"), float("nan")))
    assert asked == []


@pytest.mark.parametrize(
    ("policy", "samples", "reason"),
    [
        (every("5ep"), 5000, "geometric: 64 × 2^1 after 1 × 5ep"),
        (every("5ep"), 10000, "geometric: 64 × 2^2 after 2 × 5ep, capped at 200"),
        (Fixed(64), 0, "fixed at 64"),
        (Linear(64, 0.5, P("100sa")), 350, "linear: 64 + 0.5 × 3 after 3 × 100sa"),
        (Linear(64, 200.0, P("1ep")), 1000, "linear: 64 + 200 × 1 after 1 × 1ep, capped at 200"),
        (listed(64, e5=128), 0, "list: 64 from the start"),
        (listed(64, e5=128), 5000, "list: 128 from 5ep"),
        (listed(64, e5=300), 5000, "list: 300 from 5ep, capped at 200"),
    ],
)
def test_reasons_are_for_people(policy: GrowthPolicy, samples: int, reason: str) -> None:
    assert StageScheduler(policy, cap=200).decide(Clock(samples, 0, 1000)).reason == reason


def test_a_batch_that_does_not_shrink_says_so() -> None:
    scheduler = StageScheduler(listed(64, e1=256, e2=128))
    assert batches_at(scheduler, (0, 1)) == [64, 256]
    assert scheduler.decide(Clock(2000, 0, 1000)).reason == (
        "list: 128 from 2ep, kept at 256: it does not shrink"
    )


def test_the_state_is_plain_integers() -> None:
    scheduler = StageScheduler(every("5ep"))
    scheduler.decide(Clock(0, 0, 1000))
    scheduler.decide(Clock(5000, 0, 1000))
    assert scheduler.state_dict() == {"batch": 128, "stage": 1, "growths": 1}


@pytest.mark.parametrize("key", ["batch", "stage", "growths"])
def test_an_incomplete_state_is_refused(key: str) -> None:
    scheduler = StageScheduler(every("5ep"))
    state = scheduler.state_dict()
    del state[key]
    with pytest.raises(KeyError):
        scheduler.load_state_dict(state)


# What a configuration names


@pytest.mark.parametrize(
    ("growth", "policy"),
    [
        ({"policy": "fixed"}, Fixed(64)),
        ({"policy": "geometric", "factor": 3.0, "every": "2ep"}, Geometric(64, 3.0, P("2ep"))),
        ({"policy": "geometric", "every": "2ep"}, Geometric(64, 2.0, P("2ep"))),
        ({"policy": "linear", "rate": 0.1, "every": "7sa"}, Linear(64, 0.1, P("7sa"))),
        ({"policy": "linear", "rate": 2.0}, Linear(64, 2.0, P("1up"))),
        (
            {"policy": "list", "stages": [{"start": "1ep", "batch": 128}]},
            Listed(64, ((P("1ep"), 128),)),
        ),
    ],
)
def test_the_configuration_names_the_policy(growth: dict[str, Any], policy: GrowthPolicy) -> None:
    assert growth_policy(Batch.model_validate({"initial": 64, "growth": growth})) == policy


def test_the_configuration_has_cap_multiple_and_shrinking() -> None:
    stages = [{"start": "1ep", "batch": 129}, {"start": "2ep", "batch": 80}]
    growth = {"policy": "list", "stages": stages}
    raw = {"initial": 64, "max": 192, "multiple_of": 64, "shrink": True, "growth": growth}
    assert batches_at(stage_scheduler(Batch.model_validate(raw)), range(3)) == [64, 192, 128]
    raw["growth"] = {"policy": "linear", "rate": 70.0, "every": "1ep"}
    assert batches_at(stage_scheduler(Batch.model_validate(raw)), range(4)) == [64, 192, 192, 192]
