"""Policies that grow the batch by what training measures: values by hand, laws for any sequence."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, exp, inf, isfinite, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.schedule.clock import Clock, EpochEnd, Limit, step, update_size, updates_until
from harness.schedule.configured import growth_policy
from harness.schedule.growth import (
    BatchDecision,
    Fixed,
    LossSample,
    MeasuredPolicy,
    Observation,
    StageScheduler,
)
from harness.schedule.measured import (
    Loss,
    Noise,
    Plateau,
    Rolling,
    Smoothed,
    geometric_limit,
    noise_terms,
)
from harness.schema import Batch, LossGrowth, NoiseGrowth, PlateauGrowth, RollingGrowth
from harness.units import Duration

P = Duration.parse
UPDATE, EPOCH, LAST = P("1up"), P("1ep"), P("1sa")
"""LAST as a memory: batches of 64 and more weigh all before them with less than 1e-27."""


@dataclass(frozen=True)
class Seen:
    """What an update would measure, and the loss over the training set before it."""

    loss: float = nan
    grad_norm: float = nan
    noise: tuple[float, float] | None = None
    full: float = nan

    def of(self, samples: int) -> Observation:
        return Observation(samples, self.loss, self.grad_norm, self.noise)


@dataclass(frozen=True)
class Step:
    clock: Clock
    due: bool
    decision: BatchDecision


def drive(
    scheduler: StageScheduler,
    seen: Sequence[Seen],
    size: int = 1000,
    epoch_end: EpochEnd = "carry",
    start: Clock | None = None,
) -> list[Step]:
    """A run's updates as the trainer takes them, one for each of ``seen``; only what comes before
    ``start`` is left out."""
    clock, taken = start or Clock(0, 0, size), []
    for observed in seen[clock.updates :]:
        due, wanted = scheduler.due(clock), scheduler.wanted(clock)
        decision = scheduler.decide(clock, None if wanted is None else observed.full)
        taken.append(Step(clock, due, decision))
        samples = update_size(clock, decision.batch, epoch_end, Limit())
        clock = step(clock, samples)
        scheduler.observe(clock, observed.of(samples))
    return taken


def batches(scheduler: StageScheduler, seen: Sequence[Seen]) -> list[int]:
    """The batch after each of some updates, with a decision after every one."""
    return [taken.decision.batch for taken in drive(scheduler, [*seen, Seen()])][1:]


def losses(*values: float) -> list[Seen]:
    return [Seen(loss=value, full=value) for value in values]


def norms(*values: tuple[float, float]) -> list[Seen]:
    return [Seen(loss=loss, grad_norm=norm) for norm, loss in values]


def scales(*values: tuple[float, float]) -> list[Seen]:
    return [Seen(noise=terms) for terms in values]


# Laws for all policies and any sequence of observations

lengths = st.one_of(
    st.integers(1, 12).map(lambda n: Duration(Fraction(n), "up")),
    st.integers(1, 400).map(lambda n: Duration(Fraction(n), "sa")),
    st.decimals("0.05", 2, places=2).map(lambda n: Duration(Fraction(n), "ep")),
)
numbers = st.floats(1e-6, 1e4) | st.sampled_from([nan, inf, -inf, 1e100, 1e-300])
observations = st.sampled_from(
    [Seen(1.0, 1.0, (1.0, 1.0), 1.0), Seen(1e-9, 1e-9, (1e9, 1e-9), 1e-9)]
) | st.builds(
    Seen,
    loss=numbers,
    grad_norm=numbers | st.just(0.0),
    noise=st.none() | st.tuples(st.floats(-10, 1000) | numbers, st.floats(-1, 10) | numbers),
    full=numbers,
)
dwells_and_waits = st.one_of(
    st.fixed_dictionaries({"dwell": lengths}, optional={"wait": st.none() | lengths}),
    st.builds(
        lambda unit, dwell, wait: {"dwell": P(f"{dwell}{unit}"), "wait": P(f"{wait}{unit}")},
        st.sampled_from(["up", "sa", "ep"]),
        st.integers(1, 4),
        st.integers(1, 9),
    ),
)
limits = st.none() | st.sampled_from([1.001, 1.1, 1.5, 2.0, 3.0, 100.0])
POLICIES: dict[type[MeasuredPolicy], dict[str, st.SearchStrategy[Any]]] = {
    Loss: {
        "optimum": st.sampled_from([0.0, -1.0, "estimate"]),
        "loss": st.sampled_from(["running", "sample", "full"]),
        "memory": lengths,
        "limit": limits,
    },
    Rolling: {"memory": lengths, "loss_weight": st.floats(0, 1), "limit": limits},
    Noise: {
        "ratio": st.floats(0.01, 10),
        "hysteresis": st.floats(0, 1),
        "limit": limits,
        "memory": lengths,
    },
    Plateau: {
        "factor": st.sampled_from([1.001, 1.1, 1.5, 2.0, 10.0]),
        "patience": st.integers(1, 3),
        "threshold": st.floats(0, 0.5),
    },
}


@dataclass(frozen=True)
class Case:
    """A policy and a run: how it is cut into updates and what they measure."""

    policy: type[Any]
    initial: int
    settings: dict[str, Any]
    room: int
    multiple: int
    shrink: bool
    size: int
    epoch_end: EpochEnd
    first: Seen
    others: tuple[Seen, ...]

    @property
    def seen(self) -> list[Seen]:
        """What the 30 updates measure: the first, and then the others over and over."""
        return [self.first, *itertools.islice(itertools.cycle(self.others), 29)]

    def make(self) -> StageScheduler:
        policy = self.policy(self.initial, **self.settings)
        cap = self.initial + self.room * self.multiple
        return StageScheduler(policy, cap, self.multiple, self.shrink)

    def drive(self, scheduler: StageScheduler, start: Clock | None = None) -> list[Step]:
        return drive(scheduler, self.seen, self.size, self.epoch_end, start)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    policy = draw(st.sampled_from(list(POLICIES)))
    multiple = draw(st.sampled_from([1, 1, 8]))
    return Case(
        policy,
        initial=draw(st.integers(1, 100 // multiple)) * multiple,
        settings=draw(st.fixed_dictionaries(POLICIES[policy])) | draw(dwells_and_waits),
        room=draw(st.integers(0, 2000 // multiple)),
        multiple=multiple,
        shrink=draw(st.booleans()),
        size=draw(st.integers(1, 300)),
        epoch_end=draw(st.sampled_from(["short", "carry"])),
        first=draw(observations),
        others=tuple(draw(st.lists(observations, min_size=1, max_size=10))),
    )


@given(cases())
def test_the_batch_stays_within_its_bounds(case: Case) -> None:
    scheduler = case.make()
    slowest, fastest = scheduler.bounds()
    for taken in case.drive(scheduler):
        low, high = (bound.decide(taken.clock).batch for bound in (slowest, fastest))
        assert case.initial == low <= taken.decision.batch <= high


@given(cases())
def test_a_run_takes_no_more_updates_than_the_slowest_and_no_fewer_than_the_fastest(
    case: Case,
) -> None:
    slowest, fastest = case.make().bounds()
    start = Clock(0, 0, case.size)
    low, high = start, start
    for taken in case.drive(case.make()):
        assert low.samples <= taken.clock.samples <= high.samples
        low, high = (
            step(clock, update_size(clock, bound.decide(clock).batch, case.epoch_end, Limit()))
            for clock, bound in ((low, slowest), (high, fastest))
        )
    assert updates_until(start, case.initial, Limit(updates=30), case.epoch_end) == 30


@given(cases())
def test_stages_follow_the_laws(case: Case) -> None:
    scheduler = case.make()
    cap = case.initial + case.room * case.multiple
    run = case.drive(scheduler)
    first = run[0].decision
    assert (first.batch, first.stage, first.growths) == (case.initial, 0, 0)
    for taken in run:
        assert case.initial <= taken.decision.batch <= cap
        assert taken.decision.batch % case.multiple == 0
        assert 0 < taken.decision.cap_factor <= 1
    for before, after in itertools.pairwise(taken.decision for taken in run):
        assert case.shrink or before.batch <= after.batch
        assert after.stage - before.stage == (after.batch != before.batch)
        change = (after.batch > before.batch) - (after.batch < before.batch)
        assert after.growths - before.growths == change


@given(cases())
def test_it_decides_once_for_every_dwell_and_changes_nothing_in_between(case: Case) -> None:
    dwell, wait = case.settings["dwell"], case.settings.get("wait")
    run = case.drive(case.make())
    assert run[0].due
    for before, after in itertools.pairwise(run):
        assert after.due == (after.clock.passed(dwell) > before.clock.passed(dwell))
        if not after.due:
            assert after.decision == before.decision
        if wait is not None and after.clock.passed(wait) == 0:
            assert after.decision.batch == case.initial


@given(cases())
def test_a_limit_holds_for_each_decision(case: Case) -> None:
    limit = case.settings.get("limit")
    if limit is None and case.settings.get("optimum") == "estimate":
        limit = 2.0
    if limit is None:
        return
    for before, after in itertools.pairwise(taken.decision for taken in case.drive(case.make())):
        most = ceil(before.asked * Fraction(str(limit)))
        assert after.asked <= -(-most // case.multiple) * case.multiple
        if case.policy is Noise and case.shrink:
            assert after.asked >= before.asked / limit


@given(cases())
def test_the_same_measurements_lead_to_the_same_decisions(case: Case) -> None:
    assert case.drive(case.make()) == case.drive(case.make())


@given(cases(), st.integers(0, 29))
def test_a_restored_scheduler_goes_on_as_if_nothing_had_happened(case: Case, cut: int) -> None:
    whole = case.drive(case.make())
    first, second = case.make(), case.make()
    done = drive(first, case.seen[:cut], case.size, case.epoch_end)
    state = json.dumps(first.state_dict(), allow_nan=False)
    second.load_state_dict(json.loads(state))
    assert json.dumps(second.state_dict()) == state
    assert done + case.drive(second, whole[cut].clock) == whole


@given(cases())
def test_asked_again_at_the_same_point_it_says_the_same(case: Case) -> None:
    scheduler = case.make()
    clock = Clock(0, 0, case.size)
    for seen in case.seen:
        wanted = scheduler.wanted(clock)
        decision = scheduler.decide(clock, None if wanted is None else seen.full)
        state = scheduler.state_dict()
        assert not scheduler.due(clock)
        assert scheduler.wanted(clock) is None
        assert scheduler.decide(clock) == scheduler.decide(clock) == decision
        assert scheduler.state_dict() == state
        samples = update_size(clock, decision.batch, case.epoch_end, Limit())
        clock = step(clock, samples)
        scheduler.observe(clock, seen.of(samples))


@given(cases())
def test_what_is_no_number_does_not_enter_the_state(case: Case) -> None:
    scheduler = case.make()
    case.drive(scheduler)
    before = json.dumps(scheduler.state_dict(), allow_nan=False)
    for bad in (nan, inf, -inf):
        clock = Clock(10**6, 10**4, case.size)
        for seen in (
            Observation(64, bad, bad, (bad, bad)),
            Observation(64, bad, bad, (bad, 1.0)),
            Observation(64, bad, bad, (1.0, bad)),
            Observation(64, bad, bad),
        ):
            scheduler.observe(clock, seen)
    assert json.dumps(scheduler.state_dict(), allow_nan=False) == before


@given(cases())
def test_agreement_is_asked_for_when_a_decision_is_due_and_its_result_wins(case: Case) -> None:
    follower, leader = case.make(), case.make()
    decided: list[int] = []
    other = case.initial + 7

    def agree(asked: int) -> int:
        decided.append(asked)
        return other

    follower.agree = agree
    leader.agree = lambda asked: other
    run = case.drive(follower)
    assert len(decided) == sum(taken.due for taken in run)
    assert all(case.initial <= asked <= 2**53 for asked in decided)
    batch = min(-(-other // case.multiple), case.initial // case.multiple + case.room)
    assert {taken.decision.batch for taken in run} == {batch * case.multiple}
    # One that measures something else follows too.
    flat = drive(leader, [Seen(loss=1.0, full=1.0)] * len(run), case.size, case.epoch_end)
    assert [taken.decision.batch for taken in flat] == [taken.decision.batch for taken in run]


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Loss, {"dwell": P("2up"), "wait": P("6up")}),
        (Loss, {"dwell": P("2up"), "limit": 1.5}),
        (Loss, {"dwell": P("2up"), "optimum": "estimate"}),
        (Rolling, {"dwell": P("2up"), "wait": P("4up"), "limit": 3.0}),
        (Rolling, {"dwell": P("2up"), "wait": None}),
        (Noise, {"dwell": P("2up"), "hysteresis": 0.0}),
        (Noise, {"dwell": P("2up"), "wait": P("8up"), "limit": None}),
    ],
)
def test_the_bounds_are_reached(kind: type[Any], settings: dict[str, Any], shrink: bool) -> None:
    policy = kind(48, memory=LAST, **settings)
    scheduler = StageScheduler(policy, 480, 8, shrink)
    _, fastest = scheduler.bounds()
    seen = [Seen(1.0, 1.0, (1.0, 1.0)), *[Seen(1e-9, 1e-9, (1e9, 1e-9))] * 29]
    run = drive(scheduler, seen)
    found = [taken.decision.batch for taken in run]
    assert found == [fastest.decide(taken.clock).batch for taken in run]
    assert (found[0], found[-1]) == (48, 480)


@pytest.mark.parametrize(
    ("dwell", "wait", "size", "batch"),
    [
        ("1ep", "2.5ep", 1000, 900),  # decides at 0.9, 1.8, 2.7
        ("0.3ep", "1ep", 1000, 500),  # decides at 0.5, 1
        ("300sa", "1000sa", 1000, 250),
        ("3up", "4up", 1000, 100),
        ("1ep", "2ep", 1000, 100),
    ],
)
@pytest.mark.parametrize("kind", [Loss, Rolling, Noise, Plateau])
def test_the_bounds_hold_from_the_first_decision_after_the_wait(
    kind: type[Any], dwell: str, wait: str, size: int, batch: int
) -> None:
    settings = {"patience": 1} if kind is Plateau else {"memory": LAST, "limit": 1.5}
    policy = kind(batch, dwell=P(dwell), wait=P(wait), **settings)
    scheduler = StageScheduler(policy, 8 * batch)
    slowest, fastest = scheduler.bounds()
    first, others = Seen(1.0, 1.0, (1.0, 1.0)), Seen(1e-9, 1e-9, (1e9, 1e-9))
    if kind is Plateau:
        others = first
    run = drive(scheduler, [first, *[others] * 60], size)
    for taken in run:
        low, high = (bound.decide(taken.clock).batch for bound in (slowest, fastest))
        assert batch == low <= taken.decision.batch <= high
        assert taken.clock.passed(P(wait)) or taken.decision.batch == batch
    assert run[-1].decision.batch == 8 * batch


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("wait", [None, P("6up")])
def test_the_bounds_of_a_plateau_are_those_of_a_loss_that_never_falls(
    patience: int, wait: Duration | None
) -> None:
    policy = Plateau(48, factor=1.5, patience=patience, dwell=P("2up"), wait=wait)
    scheduler = StageScheduler(policy, 192, 8)
    _, fastest = scheduler.bounds()
    run = drive(scheduler, losses(*[1.0] * 60))
    found = [taken.decision.batch for taken in run]
    assert found == [fastest.decide(taken.clock).batch for taken in run]
    assert sorted(set(found)) == [48, 72, 112, 168, 192]  # each up to a multiple of 8


@pytest.mark.parametrize("policy", [Loss(64), Rolling(64), Noise(64), Plateau(64)])
def test_without_measurements_the_batch_stays(policy: MeasuredPolicy) -> None:
    scheduler = StageScheduler(policy, 1024)
    run = drive(scheduler, [Seen()] * 100, size=300)
    assert {taken.decision.batch for taken in run} == {64}
    assert run[-1].decision.reason.endswith(": 64 until there is a measurement")
    assert scheduler.next_change(Clock(0, 0, 1000)) is None


def test_a_policy_of_one_s_own_is_followed() -> None:
    """Whatever has the methods of a MeasuredPolicy is one: this one grows by 1 per update."""

    class Counting(Fixed):
        needs_noise = False
        count = 0

        def asked(self, clock: Clock) -> int:
            return self.initial + type(self).count

        def due(self, clock: Clock) -> bool:
            return True

        def wants(self, clock: Clock) -> LossSample | None:
            return LossSample(10)

        def observe(self, clock: Clock, seen: Observation) -> None:
            type(self).count += 1

        def revise(self, clock: Clock, batch: int, loss: float | None) -> int:
            return self.asked(clock)

        @property
        def ranks(self) -> int | None:
            return None

        def settle(self, asked: int, ranks: int | None = None) -> None: ...

        def fastest(self, grow: Callable[[int], int], cap: int) -> Fixed:
            return Fixed(cap)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    scheduler = StageScheduler(Counting(8), 12)
    assert scheduler.measured is not None
    assert scheduler.wanted(Clock(0, 0, 100)) == LossSample(10)
    run = drive(scheduler, [Seen()] * 7, size=100)
    assert [taken.decision.batch for taken in run] == [8, 9, 10, 11, 12, 12, 12]


# States


def test_the_state_of_another_policy_is_refused() -> None:
    policies: list[MeasuredPolicy] = [Loss(64), Rolling(64), Noise(64), Plateau(64)]
    for one, other in itertools.permutations(policies, 2):
        with pytest.raises(ValueError, match="the state of a policy"):
            StageScheduler(one, 128).load_state_dict(StageScheduler(other, 128).state_dict())
    known = StageScheduler(Fixed(64))
    with pytest.raises(KeyError):
        StageScheduler(Loss(64), 128).load_state_dict(known.state_dict())
    with pytest.raises((KeyError, ValueError)):
        known.load_state_dict(StageScheduler(Loss(64), 128).state_dict())


def test_the_state_is_plain_values() -> None:
    scheduler = StageScheduler(Plateau(64, dwell=UPDATE), 1024)
    drive(scheduler, losses(2.0, 1.0))
    assert scheduler.state_dict() == {
        "batch": 64,
        "stage": 0,
        "growths": 0,
        "policy": {
            "name": "plateau",
            "asked": 64,
            "reason": "plateau: 64, the loss falls (2)",
            "decided": 1,
            "sum": 64.0,
            "samples": 64,
            "best": 2.0,
            "worse": 0,
        },
    }


# Smoothing


@pytest.mark.parametrize("memory", ["1sa", "7up", "0.1ep", "90ep", "1000000000000ep"])
@given(value=st.floats(-1e10, 1e10), samples=st.integers(1, 1000))
def test_smoothing_begins_with_the_first_value(memory: str, value: float, samples: int) -> None:
    smoothed = Smoothed(P(memory))
    assert smoothed.value is None
    smoothed.add(Clock(samples, 1, 10**6), samples, value)
    assert smoothed.value == pytest.approx(value)


@given(
    st.lists(st.tuples(st.integers(1, 200), st.floats(-100, 100)), min_size=1, max_size=10),
    st.sampled_from(["50sa", "0.05ep", "3up"]),
)
def test_smoothing_is_a_mean_with_weights_that_fall_with_age(
    values: list[tuple[int, float]], memory: str
) -> None:
    smoothed, clock = Smoothed(P(memory)), Clock(0, 0, 1000)
    ages, weights = 0.0, []
    for samples, value in values:
        clock = step(clock, samples)
        smoothed.add(clock, samples, value)
    for samples, _ in reversed(values):
        share = 1 / 3 if memory == "3up" else samples / 50
        weights.append(exp(-ages) * (1 - exp(-share)))
        ages += share
    mean = sum(w * v for w, (_, v) in zip(reversed(weights), values, strict=True)) / sum(weights)
    assert smoothed.value == pytest.approx(mean, abs=1e-9)


@given(st.integers(1, 500), st.integers(1, 500), st.floats(-100, 100))
def test_smoothing_over_samples_does_not_depend_on_how_they_are_cut(
    first: int, second: int, value: float
) -> None:
    whole, parts = Smoothed(P("0.1ep")), Smoothed(P("0.1ep"))
    for smoothed in (whole, parts):
        smoothed.add(Clock(100, 1, 1000), 100, 5.0)
    whole.add(Clock(100 + first + second, 2, 1000), first + second, value)
    parts.add(Clock(100 + first, 2, 1000), first, value)
    parts.add(Clock(100 + first + second, 3, 1000), second, value)
    assert parts.value == pytest.approx(whole.value, abs=1e-9)


# Loss


@pytest.mark.parametrize("loss", ["running", "sample", "full"])
@pytest.mark.parametrize(
    ("optimum", "at_first", "now", "asked"),
    [
        (0.5, 2.5, 2.5, 64),
        (0.5, 2.5, 1.5, 128),  # 64 · 2 / 1
        (0.5, 2.5, 1.0, 256),
        (0.5, 2.5, 0.90625, 316),  # 128 / 0.40625 = 315.08
        (0.5, 2.5, 0.53125, 4096),
        (0.5, 2.5, 2.0, 86),  # 85.33
        (0.0, 2.3, 2.3, 64),
        (0.0, 2.3, 1.15, 128),
        (0.0, 2.3, 0.5, 295),  # 294.4
        (0.0, 2.3, 0.1, 1472),
        (0.1, 2.3, 1.2, 128),
        (0.1, 1.0, 0.3, 288),  # 288.00000000000006 in floats
        (0.2, 1.0, 0.6, 128),
        (0.2, 1.0, 0.3, 512),
        (-1.0, 1.0, 0.0, 128),
        (0.0, 2.0, 4.0, 64),  # never less than at the start
        (0.0, 2.0, 1e-3, 128000),
    ],
)
def test_adadamp(loss: Any, optimum: float, at_first: float, now: float, asked: int) -> None:
    """⌈B0 (F0 − F*) / (F − F*)⌉ with B0 = 64."""
    policy = Loss(64, optimum, loss, memory=LAST, dwell=UPDATE)
    run = drive(StageScheduler(policy, 10**6), losses(at_first, now, nan))
    assert [taken.decision.asked for taken in run] == (
        [64, 64, asked] if loss == "running" else [64, asked, asked]
    )


@given(
    st.integers(1, 1000),
    st.floats(1e-3, 10),
    st.sampled_from([("running", 0.0), ("running", -1.0), ("running", 1e-4), ("full", 0.0),
                     ("full", 1e-4), ("full", "estimate"), ("sample", 1e-4)]),
    lengths,
)  # fmt: skip
def test_a_loss_that_stays_what_it_is_never_grows_the_batch(
    initial: int, value: float, settings: tuple[Any, Any], memory: Duration
) -> None:
    loss, optimum = settings
    policy = Loss(initial, optimum, loss, memory=memory, dwell=UPDATE)
    run = drive(StageScheduler(policy, 10**6), losses(*[value] * 20))
    assert {taken.decision.batch for taken in run} == {initial}


@pytest.mark.parametrize("now", [0.5, 0.4, -3.0])
def test_a_loss_at_its_optimum_or_below_asks_for_the_cap(now: float) -> None:
    policy = Loss(64, 0.5, "full", dwell=UPDATE)
    assert [t.decision.batch for t in drive(StageScheduler(policy, 4096), losses(2.5, now))] == [
        64, 4096
    ]  # fmt: skip


@pytest.mark.parametrize("loss", ["running", "sample", "full"])
@pytest.mark.parametrize("optimum", [2.5, 3.0])
def test_an_optimum_that_is_not_below_the_first_loss_is_refused(loss: Any, optimum: float) -> None:
    policy = Loss(64, optimum, loss, dwell=UPDATE)
    with pytest.raises(ConfigError) as caught:
        drive(StageScheduler(policy, 4096), losses(2.5, 1.5, 1.0))
    assert str(caught.value) == (
        f"batch.growth.optimum = {optimum:g} is not below the loss at the start, 2.5; give the "
        "least loss that can be reached, or 0"
    )


@pytest.mark.parametrize(
    ("values", "asked"),
    [
        # 0.5 + 2 · 2^−k. Before there are three losses, F* is 0: ⌈64 · 2.5 / 1.5⌉.
        ((2.5, 1.5, 1.0, 0.75, 0.625), [64, 107, 256, 512, 1024]),
        # 0.25 + 4 · 4^−k
        ((4.25, 1.25, 0.5, 0.3125), [64, 218, 1024, 4096]),
        # The second 1.2 rises: the last estimate, 0.5, stays.
        ((2.5, 1.5, 1.0, 1.2), [64, 107, 256, 183]),
        # 0.4 is below the estimate, which is then of no use: F* is 0.
        ((2.5, 1.5, 1.0, 1.2, 0.4), [64, 107, 256, 183, 400]),
        # 0.5 − 1.5² / 0.5 is below 0: F* is 0.
        ((4.0, 2.0, 0.5), [64, 128, 512]),
        # Falling ever faster tells nothing of an end.
        ((4.0, 3.5, 2.0), [64, 74, 128]),
        # Above the loss at the start: 2.33, where the training only comes back from a bad start.
        ((1.0, 5.0, 3.0, 2.5), [64, 64, 64, 64]),
    ],
)
@pytest.mark.parametrize("loss", ["running", "full"])
def test_an_estimated_optimum(loss: Any, values: Sequence[float], asked: list[int]) -> None:
    policy = Loss(64, "estimate", loss, memory=LAST, dwell=UPDATE, limit=1e9)
    run = drive(StageScheduler(policy, 10**6, shrink=True), losses(*values, nan))
    found = [taken.decision.asked for taken in run]
    assert found == ([64, *asked] if loss == "running" else [*asked, asked[-1]])


@given(st.integers(-4, 4), st.integers(1, 5), st.integers(0, 3))
def test_the_estimate_is_exact_where_losses_fall_geometrically(
    exponent: int, start: int, optimum: int
) -> None:
    policy = Loss(64, "estimate", "full", dwell=UPDATE, limit=1e9)
    scheduler = StageScheduler(policy, 2**50, shrink=True)
    run = drive(scheduler, losses(*(optimum + start * 2.0 ** (exponent - k) for k in range(8))))
    assert [taken.decision.asked for taken in run][2:] == [64 * 2**k for k in range(2, 8)]


@given(
    st.floats(0, 100),
    st.floats(1e-3, 100),
    st.floats(0.01, 0.99),
    st.integers(0, 10**6),
    st.integers(1, 20),
    st.integers(1, 20),
)
def test_the_limit_of_a_geometric_fall_needs_no_equal_distances(
    limit: float, start: float, ratio: float, begin: int, first: int, second: int
) -> None:
    places = [0, first, first + second]
    values = [limit + start * ratio**k for k in places]
    if values[1] - values[2] < 1e-6 * values[0]:
        return  # nothing but rounding is left of the fall
    found = geometric_limit([begin + k for k in places], values)
    assert found == pytest.approx(limit, abs=1e-6 * values[0])


@pytest.mark.parametrize(
    ("updates", "values", "limit"),
    [
        ((0, 1, 2), (2.5, 1.5, 1.0), 0.5),  # Aitken: 1 − 0.5² / 0.5
        ((0, 10, 20), (2.5, 1.5, 1.0), 0.5),
        ((0, 1, 3), (4.5, 2.5, 1.0), 0.5),  # 0.5 + 4 · 2^−k
        ((0, 2, 3), (4.5, 1.5, 1.0), 0.5),
        ((0, 1, 2), (3.0, 2.0, 1.0), None),  # a line
        ((0, 1, 3), (3.0, 2.0, 0.0), None),
        ((0, 1, 2), (3.0, 2.5, 1.0), None),  # falls faster and faster
        ((0, 1, 2), (3.0, 2.0, 2.0), None),
        ((0, 1, 2), (3.0, 2.0, 2.5), None),
        ((0, 1, 2), (2.0, 3.0, 2.5), None),
        ((0, 10**9, 2 * 10**9), (2.5, 1.5, 1.0), 0.5),
        ((0, 1, 2), (1e300, 1.0, 0.5), 0.5),
    ],
)
def test_limits_of_geometric_falls(
    updates: Sequence[int], values: Sequence[float], limit: float | None
) -> None:
    found = geometric_limit(updates, values)
    assert found == (limit if limit is None else pytest.approx(limit))


@given(
    st.lists(st.integers(0, 10**15), min_size=3, max_size=3, unique=True),
    st.lists(st.floats(-1e300, 1e300), min_size=3, max_size=3),
)
def test_a_geometric_limit_lies_below_the_last_loss(places: list[int], values: list[float]) -> None:
    found = geometric_limit(sorted(places), values)
    assert found is None or found <= values[2]


def test_an_estimate_outlasts_a_restart() -> None:
    """0.5 from the first three losses, which those after them do not replace."""
    seen = losses(2.5, 1.5, 1.0, 1.2, 1.4, 0.9)

    def make() -> StageScheduler:
        policy = Loss(64, "estimate", "full", dwell=UPDATE, limit=1e9)
        return StageScheduler(policy, 10**6, shrink=True)

    whole = drive(make(), seen)
    assert [taken.decision.asked for taken in whole] == [64, 107, 256, 183, 143, 320]
    for cut in range(len(seen)):
        first, second = make(), make()
        done = drive(first, seen[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert done + drive(second, seen, start=whole[cut].clock) == whole


def test_the_estimate_knows_that_decisions_may_lie_apart() -> None:
    """Every 256 samples: after 4 updates of 64, then 2 of 128 or more. F = 1 + 2^(3 − k)."""
    policy = Loss(64, "estimate", "full", dwell=P("256sa"), limit=1e9)
    seen = losses(*(1 + 2.0 ** (3 - k) for k in range(12)))
    run = drive(StageScheduler(policy, 128), seen)
    decided = [taken for taken in run if taken.due]
    assert [taken.clock.updates for taken in decided] == [0, 4, 6, 8, 10]
    assert [taken.decision.reason for taken in decided[1:3]] == [
        "loss: 64 × (9 − 0) / (1.5 − 0), capped at 128",
        "loss: 64 × (9 − 1) / (1.125 − 1), capped at 128",
    ]


def test_an_estimated_optimum_has_a_limit_unless_told() -> None:
    policy = Loss(64, "estimate", "full", dwell=UPDATE)
    run = drive(StageScheduler(policy, 4096), losses(2.5, 1.5, 1.0, 0.75, 0.625, 0.625))
    assert [taken.decision.batch for taken in run] == [64, 107, 214, 428, 856, 1024]
    assert run[2].decision.reason == ("loss: 64 × (2.5 − 0.5) / (1 − 0.5) = 256, limited to × 2")


def test_a_running_loss_is_smoothed_and_begins_with_the_first() -> None:
    """Over 2 updates: weights 1 and e^−½, so F = (1 + 2 e^−½) / (1 + e^−½) = 1.3775 of 2 and 1."""
    policy = Loss(64, memory=P("2up"), dwell=UPDATE)
    assert batches(StageScheduler(policy, 4096), losses(2.0, 1.0)) == [64, 93]  # 92.92


@pytest.mark.parametrize(
    ("loss", "wait", "wanted"),
    [
        ("running", None, [None] * 5),
        ("sample", None, [LossSample(77), None] * 2 + [LossSample(77)]),
        ("full", None, [LossSample(None), None] * 2 + [LossSample(None)]),
        ("full", "3up", [LossSample(None), None, None, None, LossSample(None)]),
    ],
)
def test_which_loss_must_be_measured(loss: Any, wait: str | None, wanted: list[Any]) -> None:
    """Only where a decision is due, and none for nothing while the batch has to wait."""
    policy = Loss(64, 0.0, loss, 77, dwell=P("2up"), wait=P(wait) if wait else None)
    scheduler = StageScheduler(policy, 4096)
    found = []
    for updates in range(5):
        clock = Clock(64 * updates, updates, 1000)
        found.append(scheduler.wanted(clock))
        assert scheduler.decide(clock, 1.0).batch == 64
    assert found == wanted


def test_losses_of_updates_do_not_count_where_the_training_set_s_do() -> None:
    policy = Loss(64, 0.0, "full", dwell=UPDATE)
    seen = [Seen(loss=9.0, full=2.0), Seen(loss=9.0, full=1.0), Seen(loss=0.1, full=nan)]
    found = [taken.decision.batch for taken in drive(StageScheduler(policy, 4096), seen)]
    assert found == [64, 128, 128]


def test_the_loss_waits_and_then_grows_at_once() -> None:
    policy = Loss(64, memory=LAST, dwell=P("2up"), wait=P("5up"))
    run = drive(StageScheduler(policy, 4096), losses(2.0, *[0.5] * 8))
    assert [taken.decision.batch for taken in run] == [64] * 6 + [256] * 3
    assert run[4].decision.reason == "loss: 64 until 5up"
    assert run[6].decision.reason == "loss: 64 × (2 − 0) / (0.5 − 0)"


def test_the_batch_follows_a_rising_loss_only_where_it_may_shrink() -> None:
    seen = losses(2.0, 0.5, 1.0, 4.0)
    assert batches(StageScheduler(Loss(64, memory=LAST, dwell=UPDATE), 200), seen) == [
        64, 200, 200, 200
    ]  # fmt: skip
    scheduler = StageScheduler(Loss(64, memory=LAST, dwell=UPDATE), 200, shrink=True)
    run = drive(scheduler, [*seen, Seen()])[1:]
    assert [taken.decision.batch for taken in run] == [64, 200, 128, 64]
    assert [taken.decision.growths for taken in run] == [0, 1, 0, -1]
    assert [taken.decision.cap_factor for taken in run] == [1.0, 200 / 256, 1.0, 1.0]


# Rolling


def test_radadamp() -> None:
    """q = ‖g‖² + 0.01 · loss of 16, 8 and 6 while it waits: q0 = 10. Then ⌈64 · 10 / q⌉."""
    policy = Rolling(64, memory=LAST, dwell=UPDATE, wait=P("3up"))
    scheduler = StageScheduler(policy, 4096, shrink=True)
    seen = norms((4.0, 0.0), (2.0, 400.0), (2.0, 200.0), (1.0, 400.0), (1.0, 0.0), (3.0, 100.0))
    assert batches(scheduler, seen) == [64, 64, 107, 128, 640, 64]


def test_the_first_fifty_updates_are_q0() -> None:
    policy = Rolling(64, memory=LAST, dwell=P("10up"), loss_weight=0.0)
    scheduler = StageScheduler(policy, 4096)
    # 49 of 1 and one of 101 have a mean of 3; before and after, the rest of the first decade.
    first = norms(*[(1.0, 0.0)] * 49, (101.0**0.5, 0.0), *[(1.0, 0.0)] * 10)
    run = drive(scheduler, [*first, Seen()])
    assert [taken.decision.batch for taken in run[:60]] == [64] * 60
    assert run[60].decision.batch == 192
    assert run[60].decision.reason == "rolling: 64 × 3 / 1"
    assert run[49].decision.reason == "rolling: 64 until 50up"


def test_without_a_wait_q0_is_the_first() -> None:
    policy = Rolling(64, memory=LAST, dwell=UPDATE, wait=None, loss_weight=0.0)
    assert batches(StageScheduler(policy, 4096), norms((4.0, 0.0), (2.0, 0.0), (1.0, 0.0))) == [
        64, 256, 1024
    ]  # fmt: skip


def test_a_wait_in_epochs_is_q0_s_too() -> None:
    """Of 256 samples, four updates of 64 are one epoch: q0 = (7 + 5 + 3 + 1) / 4."""
    policy = Rolling(64, memory=LAST, dwell=UPDATE, wait=EPOCH, loss_weight=1.0)
    seen = norms((0.0, 7.0), (0.0, 5.0), (0.0, 3.0), (0.0, 1.0), (0.0, 0.5))
    run = drive(StageScheduler(policy, 4096), [*seen, Seen()], size=256)
    assert [taken.decision.batch for taken in run] == [64, 64, 64, 64, 256, 512]


def test_q_is_the_mean_over_its_memory() -> None:
    """Over 2 updates: weights 1 and e^−½ make (4 + 16 e^−½) / (1 + e^−½) = 8.531 of 16 and 4."""
    policy = Rolling(64, memory=P("2up"), dwell=UPDATE, wait=None, loss_weight=0.0)
    assert batches(StageScheduler(policy, 4096), norms((4.0, 0.0), (2.0, 0.0))) == [64, 121]


def test_gradients_of_nothing_ask_for_the_cap() -> None:
    policy = Rolling(64, memory=LAST, dwell=UPDATE, wait=None, loss_weight=0.0)
    assert batches(StageScheduler(policy, 4096), norms((4.0, 1.0), (0.0, 1.0))) == [64, 4096]


@given(st.integers(1, 1000), st.floats(1e-3, 1e3), st.floats(0, 10), lengths, lengths)
def test_a_gradient_that_stays_what_it_is_never_grows_the_batch(
    initial: int, norm: float, loss: float, memory: Duration, wait: Duration
) -> None:
    policy = Rolling(initial, memory, dwell=UPDATE, wait=wait)
    run = drive(StageScheduler(policy, 10**6), norms(*[(norm, loss)] * 20))
    assert {taken.decision.batch for taken in run} == {initial}


# Noise


def per_micro_batch(
    gradients: np.ndarray[Any, np.dtype[np.float64]], sizes: Sequence[int]
) -> tuple[Any, Any]:
    """``micro_norm2`` and ``norm2`` of ``noise_terms`` for draws × samples × dimensions."""
    samples = sum(sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    sums = np.add.reduceat(gradients, starts, axis=1) / samples
    return (sums**2).sum((1, 2)), (sums.sum(1) ** 2).sum(1)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 8, 3), (1, 1), (1, 3), (5, 4, 3, 2, 1), (6, 1)])
def test_noise_terms_are_unbiased(sizes: Sequence[int]) -> None:
    """Gradients drawn from N(G, Σ): means over many updates are tr Σ and ‖G‖²."""
    draws, rng = 100_000, np.random.default_rng(20240607)
    mean, spread = np.array([0.5, -1.0, 0.25]), np.array([[1.0, 0, 0], [0.5, 2, 0], [0, -1, 1]])
    trace, norm2 = float((spread**2).sum()), float((mean**2).sum())
    samples, squares = sum(sizes), sum(size * size for size in sizes)
    gradients = mean + rng.standard_normal((draws, samples, 3)) @ spread.T
    found = [
        noise_terms(samples, squares, float(parts), float(whole))
        for parts, whole in zip(*per_micro_batch(gradients, sizes), strict=True)
    ]
    estimates = np.array(found)
    errors = estimates.std(0) / draws**0.5
    assert abs(estimates.mean(0) - [trace, norm2]) == pytest.approx([0, 0], abs=4 * errors.max())
    assert (abs(estimates.mean(0) - [trace, norm2]) < 4 * errors).all()
    assert errors.max() < 0.1  # so that this says something


@given(st.integers(1, 64), st.integers(2, 16), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_noise_terms_of_equal_micro_batches_are_those_of_the_paper(
    size: int, count: int, small_norm2: float, large_norm2: float
) -> None:
    """|G|² and S from the norms at batch sizes b and B (McCandlish et al. 2018, appendix A.1)."""
    b, whole = size, size * count
    norm2 = (whole * large_norm2 - b * small_norm2) / (whole - b)
    trace = (small_norm2 - large_norm2) / (1 / b - 1 / whole)
    terms = noise_terms(whole, count * b * b, small_norm2 / count, large_norm2)
    scale = small_norm2 + large_norm2
    assert terms == pytest.approx((trace, norm2), rel=1e-9, abs=1e-9 * scale * whole)


@given(st.integers(1, 10**6), st.floats(0, 1e6))
def test_one_micro_batch_tells_nothing_of_noise(samples: int, norm2: float) -> None:
    assert noise_terms(samples, samples * samples, norm2, norm2) is None


def test_noise_terms_of_two_samples_by_hand() -> None:
    """g = (3, 0) and (1, 2): the half-sums have ‖·‖² of 9/4 and 5/4, the mean (2, 1) has 5.
    ‖G‖² = g1 · g2 = 3 and tr Σ = ‖g1 − g2‖² / 2 = 4."""
    assert noise_terms(2, 2, 9 / 4 + 5 / 4, 5.0) == pytest.approx((4.0, 3.0))


def test_identical_gradients_have_no_noise() -> None:
    """Micro-batches of 3, 2 and 1 with the gradient (2, 0): (4 · 9 + 4 · 4 + 4 · 1) / 36."""
    assert noise_terms(6, 14, 56 / 36, 4.0) == pytest.approx((0.0, 4.0))


def noise(**settings: Any) -> Noise:
    return Noise(64, **{"memory": LAST, "dwell": UPDATE, "limit": None, **settings})


@pytest.mark.parametrize(
    ("ratio", "terms", "asked"),
    [
        (1.0, (300.0, 2.0), 150),
        (1.0, (1000.0, 3.0), 334),
        (2.0, (300.0, 2.0), 300),
        (0.5, (1000.0, 2.0), 250),
        (1.0, (1.0, 2.0), 64),  # never less than at the start
        (1.0, (-300.0, 2.0), 64),
        (1.0, (1e300, 1e-300), 2**53),
    ],
)
def test_the_noise_scale(ratio: float, terms: tuple[float, float], asked: int) -> None:
    run = drive(StageScheduler(noise(ratio=ratio), 2**53), [*scales(terms), Seen()])
    assert run[1].decision.asked == asked


def test_noise_and_gradient_are_smoothed_before_they_are_divided() -> None:
    policy = Noise(64, memory=P("1000000000up"))
    for terms in ((100.0, 1.0), (100.0, 3.0)):
        policy.observe(Clock(64, 1, 1000), Observation(64, nan, nan, terms))
    assert policy.scale == pytest.approx(50.0)  # not the mean of 100 and 33.3
    policy.observe(Clock(64, 1, 1000), Observation(64, nan, nan, (100.0, -3.0)))
    assert policy.scale == pytest.approx(300.0)  # single estimates may be negative
    policy.observe(Clock(64, 1, 1000), Observation(64, nan, nan, (100.0, -5.0)))
    assert policy.scale is None
    policy.observe(Clock(64, 1, 1000), Observation(64, nan, nan, (-900.0, 9.0)))
    assert policy.scale == 0  # no noise, not less than none


def test_a_gradient_lost_in_noise_changes_nothing() -> None:
    scheduler = StageScheduler(noise(), 4096, shrink=True)
    assert batches(scheduler, scales((300.0, 1.0), (300.0, -0.5), (300.0, -1.0))) == [300] * 3


def test_the_batch_stays_within_the_hysteresis() -> None:
    seen = scales(*((scale, 1.0) for scale in (80, 81, 100, 101, 102, 127, 128, 96, 95)))
    scheduler = StageScheduler(noise(), 4096, shrink=True)
    # 64 ± 16, then 81 ± 20.25, then 102 ± 25.5, then 128 ± 32
    assert batches(scheduler, seen) == [64, 81, 81, 81, 102, 102, 128, 128, 95]
    scheduler = StageScheduler(noise(), 4096)
    assert batches(scheduler, seen) == [64, 81, 81, 81, 102, 102, 128, 128, 128]
    scheduler = StageScheduler(noise(hysteresis=0.0), 4096, shrink=True)
    assert batches(scheduler, seen) == [80, 81, 100, 101, 102, 127, 128, 96, 95]


def test_growing_and_shrinking_are_limited() -> None:
    seen = scales((1000.0, 1.0), (1000.0, 1.0), (1000.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    scheduler = StageScheduler(noise(limit=3.0), 500, shrink=True)
    run = drive(scheduler, [*seen, Seen()])[1:]
    assert [taken.decision.batch for taken in run] == [192, 500, 500, 334, 112, 64]
    assert [taken.decision.asked for taken in run] == [192, 576, 1000, 334, 112, 64]
    assert run[0].decision.reason == ("noise: 1 × a noise scale of 1000 = 1000, limited to × 3")


def test_shrinking_from_beyond_the_cap_begins_at_what_was_asked_for() -> None:
    """So that the rate, which is multiplied with max / asked, comes back step by step too."""
    scheduler = StageScheduler(noise(limit=2.0, hysteresis=0.0), 100, shrink=True)
    seen = scales(*[(800.0, 1.0)] * 4, *[(64.0, 1.0)] * 4)
    run = drive(scheduler, [*seen, Seen()])[1:]
    assert [taken.decision.asked for taken in run] == [128, 256, 512, 800, 400, 200, 100, 64]
    assert [taken.decision.batch for taken in run] == [100] * 7 + [64]


def test_only_the_noise_scale_needs_noise() -> None:
    policies: list[MeasuredPolicy] = [Loss(64), Rolling(64), Noise(64), Plateau(64)]
    assert [policy.needs_noise for policy in policies] == [False, False, True, False]


# Plateau


def plateau(**settings: Any) -> StageScheduler:
    settings = {"patience": 2, "dwell": UPDATE, **settings}
    return StageScheduler(Plateau(64, **settings), 4096)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 0.9, 0.8, 0.7, 0.6), [64] * 5),
        ((1.0, 1.0, 1.0), [64, 64, 128]),
        ((1.0, 0.995, 0.992), [64, 64, 128]),  # none below 0.99
        ((1.0, 0.995, 0.98, 0.98, 0.98), [64, 64, 64, 64, 128]),  # counts anew from a better one
        ((1.0, 1.5, 0.98, 1.5, 0.96, 1.5), [64] * 6),
        ((1.0, 2.0, 3.0), [64, 64, 128]),
        # After a growth there is no best loss: 3.0 is one, and again two that are not better.
        ((1.0, 2.0, 3.0, 3.0, 3.0, 3.0), [64, 64, 128, 128, 128, 256]),
        ((1.0, nan, 1.0, inf, 1.0), [64, 64, 64, 64, 128]),  # no loss, no decision
        ((-1.0, -1.005, -1.02, -1.02, -1.02), [64, 64, 64, 64, 128]),
        ((0.0, 0.0, 0.0), [64, 64, 128]),
    ],
)
def test_plateau(values: Sequence[float], expected: list[int]) -> None:
    assert batches(plateau(), losses(*values)) == expected


def test_a_threshold_of_0_takes_any_fall() -> None:
    values = losses(1.0, 1.0 - 1e-12, 1.0 - 2e-12, 1.0 - 2e-12, 1.0 - 2e-12)
    assert batches(plateau(threshold=0.0), values) == [64, 64, 64, 64, 128]


def test_the_loss_of_a_plateau_is_the_mean_over_samples() -> None:
    """Updates of 100 and 50 samples with losses of 1 and 4 have a mean of 2; 1.99 is no better."""
    policy = Plateau(100, patience=1, dwell=P("2up"))
    for updates, (samples, loss) in enumerate([(100, 1.0), (50, 4.0), (100, 1.99), (100, 1.99)]):
        clock = Clock(100 * updates, updates, 1000)
        if policy.due(clock):
            policy.settle(policy.revise(clock, 100, None))
        policy.observe(
            Clock(100 * updates + samples, updates + 1, 1000), Observation(samples, loss, 0)
        )
        assert policy.asked(clock) == 100
    assert policy.revise(Clock(400, 4, 1000), 100, None) == 200


def test_nothing_is_counted_while_a_plateau_waits() -> None:
    values = losses(*[1.0] * 8)
    assert batches(plateau(wait=P("4up")), values) == [64] * 5 + [128] * 3
    assert batches(plateau(), values) == [64] * 2 + [128] * 3 + [256] * 3


def test_a_plateau_s_factor_is_exact_and_rounded_up() -> None:
    scheduler = StageScheduler(Plateau(10, factor=1.1, patience=1, dwell=UPDATE), 4096)
    assert batches(scheduler, losses(*[1.0] * 6)) == [10, 11, 11, 13, 13, 15]


def test_reasons_of_a_plateau() -> None:
    run = drive(plateau(), losses(*[1.5] * 4))
    assert [taken.decision.reason for taken in run] == [
        "plateau: 64 until there is a measurement",
        "plateau: 64, the loss falls (1.5)",
        "plateau: 64, loss 1.5 against 1.5 at best, 1 of 2",
        "plateau: × 2, no loss below 1.5 in 2 × 1up",
    ]


# What a configuration names


@pytest.mark.parametrize(
    ("section", "policy"),
    [(LossGrowth, Loss), (RollingGrowth, Rolling), (NoiseGrowth, Noise), (PlateauGrowth, Plateau)],
)
def test_the_configuration_has_the_defaults_of_the_policy(
    section: type[LossGrowth], policy: type[Any]
) -> None:
    parameters = dict(inspect.signature(policy).parameters)
    del parameters["initial"]
    fields = dict(section.model_fields)
    name = fields.pop("policy").annotation
    assert {key: parameter.default for key, parameter in parameters.items()} == {
        key: field.default for key, field in fields.items()
    }
    assert policy(64).name in str(name)


@pytest.mark.parametrize(
    ("growth", "kind", "settings"),
    [
        (
            {"policy": "loss", "optimum": "estimate", "loss": "sample", "sample": 7, "wait": "3up"},
            Loss,
            {"optimum": "estimate", "loss": "sample", "sample": 7, "limit": 2.0, "wait": P("3up")},
        ),
        ({"policy": "loss", "limit": 5.0, "dwell": "2sa"}, Loss, {"limit": 5.0, "dwell": P("2sa")}),
        ({"policy": "loss"}, Loss, {"optimum": 0.0, "limit": None, "wait": None, "dwell": EPOCH}),
        ({"policy": "rolling"}, Rolling, {"wait": P("50up"), "loss_weight": 0.01}),
        ({"policy": "rolling", "wait": None}, Rolling, {"wait": None}),
        ({"policy": "noise", "ratio": 3, "limit": None}, Noise, {"ratio": 3.0, "limit": None}),
        ({"policy": "noise"}, Noise, {"hysteresis": 0.25, "limit": 2.0}),
        ({"policy": "plateau", "patience": 5}, Plateau, {"patience": 5, "factor": 2.0}),
    ],
)
def test_the_configuration_names_the_policy(
    growth: dict[str, Any], kind: type[Any], settings: dict[str, Any]
) -> None:
    batch = Batch.model_validate({"initial": 64, "max": 128, "growth": growth})
    policy = growth_policy(batch)
    assert isinstance(policy, kind)
    assert isinstance(policy, MeasuredPolicy)
    assert policy.initial == 64
    assert {key: getattr(policy, key) for key in settings} == settings
    assert growth_policy(batch) is not policy
    assert isfinite(policy.asked(Clock(0, 0, 1000)))
