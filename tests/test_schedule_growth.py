"""Growth policies: what they ask for, when they may ask for more, and what a restart remembers."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config import FixedGrowth, GeometricGrowth
from harness.schedule.clock import Clock, EpochEnd, Limit, step, update_size
from harness.schedule.growth import (
    BatchDecision,
    Fixed,
    Geometric,
    GrowthPolicy,
    StageScheduler,
    growth_policy,
)
from harness.units import Duration

factors = st.decimals(1, 4, places=3).map(float)
periods = st.one_of(
    st.integers(1, 40).map(lambda n: Duration(Fraction(n), "up")),
    st.integers(1, 400).map(lambda n: Duration(Fraction(n), "sa")),
    st.decimals("0.05", 3, places=2).map(lambda n: Duration(Fraction(n), "ep")),
)
policies = st.one_of(
    st.builds(Fixed, st.integers(1, 200)),
    st.builds(Geometric, st.integers(1, 200), factors, periods),
)
ends = st.sampled_from(["short", "carry"])


def every(text: str, factor: float = 2.0, initial: int = 64) -> Geometric:
    return Geometric(initial, factor, Duration.parse(text))


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
    ],
)
def test_asks_for(policy: GrowthPolicy, samples: int, updates: int, asked: int) -> None:
    assert policy.asked(Clock(samples, updates, 1000)) == asked


@given(st.integers(1, 1000), st.decimals(1, 3, places=2), st.integers(0, 30))
def test_geometric_is_the_exact_power_rounded_up(initial: int, factor: float, growths: int) -> None:
    policy = Geometric(initial, float(factor), Duration.parse("1sa"))
    exact = ceil(initial * Fraction(str(float(factor))) ** growths)
    assert policy.asked(Clock(growths, 0, 1000)) == min(exact, 2**53)


@given(policies, st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 500))
def test_never_asks_for_less_than_before(
    policy: GrowthPolicy, samples: int, updates: int, size: int
) -> None:
    earlier = policy.asked(Clock(samples, updates, size))
    assert 1 <= earlier <= policy.asked(Clock(samples + 77, updates + 3, size)) <= 2**53


@given(policies, st.integers(0, 5000), st.integers(0, 500), st.integers(1, 500))
def test_asks_for_the_same_until_the_next_change_and_then_for_more(
    policy: GrowthPolicy, samples: int, updates: int, size: int
) -> None:
    clock = Clock(samples, updates, size)
    change, asked = policy.next_change(clock), policy.asked(clock)
    if change is None:
        assert policy.asked(Clock(samples + 10**9, updates + 10**9, size)) == asked
        return
    assert not change.reached(clock)
    at = Clock(change.samples or samples, change.updates or updates, size)
    before = Clock(
        at.samples if change.samples is None else at.samples - 1,
        at.updates if change.updates is None else at.updates - 1,
        size,
    )
    assert policy.asked(before) == asked < policy.asked(at)


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
    change = policy.next_change(Clock(0, 0, 1000))
    assert change is not None
    assert change.updates == 1  # ⌈64.000000064⌉ is 65
    change = policy.next_change(Clock(0, 1, 1000))
    assert change is not None
    assert change.updates == 15504187  # ln(65 / 64) · 10⁹, rounded up
    assert looks < 200


@given(policies, st.integers(1, 3000), st.integers(1, 300), ends, st.integers(0, 60))
def test_a_restored_scheduler_goes_on_as_if_nothing_had_happened(
    policy: GrowthPolicy, cap: int, size: int, epoch_end: EpochEnd, cut: int
) -> None:
    whole = follow(StageScheduler(policy, cap), Clock(0, 0, size), 80, epoch_end)
    first = StageScheduler(policy, cap)
    done = follow(first, Clock(0, 0, size), cut, epoch_end)
    second = StageScheduler(policy, cap)
    second.load_state_dict(first.state_dict())
    assert done + follow(second, whole[cut][0], 80 - cut, epoch_end) == whole


@given(policies, st.integers(1, 3000), st.integers(1, 300), ends)
def test_stages_follow_the_laws(
    policy: GrowthPolicy, cap: int, size: int, epoch_end: EpochEnd
) -> None:
    taken = [d for _, d in follow(StageScheduler(policy, cap), Clock(0, 0, size), 80, epoch_end)]
    assert taken[0].stage == taken[0].growths == 0
    for before, after in itertools.pairwise(taken):
        assert before.batch <= after.batch
        assert after.stage - before.stage == (after.batch > before.batch)
    for decision in taken:
        assert decision.batch <= cap
        assert decision.asked >= decision.batch
        assert 0 < decision.cap_factor <= 1
        assert decision.growths == decision.stage
        assert (decision.cap_factor < 1) == (decision.asked > cap)


def test_past_the_cap_the_rest_goes_to_the_rate() -> None:
    scheduler = StageScheduler(every("1ep"), cap=200)
    factors = [scheduler.decide(Clock(epoch * 1000, 0, 1000)).cap_factor for epoch in range(4)]
    assert factors == [1.0, 1.0, 200 / 256, 200 / 512]


def test_growing_past_the_cap_in_one_step_is_one_growth() -> None:
    scheduler = StageScheduler(every("1ep"), cap=200)
    assert scheduler.decide(Clock(0, 0, 1000)).batch == 64
    decision = scheduler.decide(Clock(9000, 0, 1000))
    assert (decision.batch, decision.asked, decision.growths) == (200, 64 * 512, 1)


def test_reasons_are_for_people() -> None:
    scheduler = StageScheduler(every("5ep"), cap=200)
    assert scheduler.decide(Clock(5000, 0, 1000)).reason == "geometric: 64 × 2^1 after 1 × 5ep"
    assert scheduler.decide(Clock(10000, 0, 1000)).reason == (
        "geometric: 64 × 2^2 after 2 × 5ep, capped at 200"
    )
    assert StageScheduler(Fixed(64)).decide(Clock(0, 0, 1000)).reason == "fixed at 64"


def test_the_state_is_plain_integers() -> None:
    scheduler = StageScheduler(every("5ep"))
    scheduler.decide(Clock(5000, 0, 1000))
    assert scheduler.state_dict() == {"batch": 128, "stage": 0}


def test_the_configuration_names_the_policy() -> None:
    growth = GeometricGrowth(policy="geometric", factor=3.0, every=Duration.parse("2ep"))
    assert growth_policy(64, growth) == Geometric(64, 3.0, Duration.parse("2ep"))
    assert growth_policy(64, FixedGrowth()) == Fixed(64)
