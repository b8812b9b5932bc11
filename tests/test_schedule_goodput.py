"""Growth by goodput: what it may choose from, what it chooses, and how a run follows it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise, product
from math import inf, isclose
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError, UsageError
from harness.scaling.steptime import Decomposition, Link, StepTime, Wire
from harness.scaling.steptime import expected_maximum as expected_maxima
from harness.schedule.choices import (
    UpdateTime,
    choices,
    expected_maximum,
    nodes_of,
    rank_counts,
    statistical_efficiency,
)
from harness.schedule.clock import Clock
from harness.schedule.configured import growth_policy, stage_scheduler
from harness.schedule.goodput import Goodput, Option, Options
from harness.schedule.growth import MeasuredPolicy, Observation, StageScheduler
from harness.schema import Batch, GoodputGrowth
from harness.units import Duration

P = Duration.parse
SIZE = 1000

seconds = st.floats(1e-9, 1e-1)
shares = st.floats(0, 1)
scales = st.floats(1e-2, 1e9)
times = st.builds(
    UpdateTime,
    per_image=st.floats(1e-6, 1e-2),
    fixed=st.just(0.0) | seconds,
    jitter=st.floats(0, 0.2),
    gamma=st.floats(1, 10),
    within_latency=st.just(0.0) | seconds,
    within_seconds_per_byte=st.floats(0, 1e-8),
    between_latency=st.just(0.0) | seconds,
    between_seconds_per_byte=st.floats(0, 1e-8),
    gradient_bytes=st.floats(0, 1e9),
    buckets=st.integers(1, 50),
    topology=st.sampled_from(["two-level", "ring"]),
    ranks_per_node=st.none() | st.integers(1, 8),
)
LINEAR = UpdateTime(per_image=1e-3)
USUAL = UpdateTime(
    per_image=1e-3, fixed=5e-3, within_latency=1e-4, within_seconds_per_byte=1e-9,
    between_latency=1e-3, between_seconds_per_byte=1e-8, gradient_bytes=1e6, ranks_per_node=4,
)  # fmt: skip


@st.composite
def options_of(draw: st.DrawFn) -> Options:
    micro = draw(st.sampled_from([1, 8, 32]))
    multiple = draw(st.sampled_from([1, 1, 3 * micro]))
    initial = multiple * draw(st.integers(1, 20))
    most = initial + multiple * draw(st.integers(0, 200))
    ranks = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=6)))
    return Options(initial, micro, draw(times), ranks, most, multiple)


# The time of an update


@given(times, st.integers(1, 5000), st.integers(1, 64), st.integers(1, 512))
def test_the_formula_is_that_of_the_fitted_model(
    time: UpdateTime, ranks: int, accumulation: int, micro: int
) -> None:
    model = StepTime(
        time.per_image,
        time.fixed,
        time.jitter,
        time.gamma,
        Link(time.within_latency, time.within_seconds_per_byte),
        Link(time.between_latency, time.between_seconds_per_byte),
        Wire(time.gradient_bytes),
        time.topology,
    )
    model = replace(model, wire=_Buckets(time.gradient_bytes, time.buckets))
    nodes = nodes_of(ranks, time.ranks_per_node)
    where = Decomposition.of(ranks, nodes, ranks * accumulation * micro, accumulation)
    assert time.seconds(ranks, accumulation, micro) == pytest.approx(
        float(model.seconds(where)[0]), rel=1e-9
    )


class _Buckets(Wire):
    """A wire with so many buckets, whatever their size."""

    def __init__(self, size: float, buckets: int) -> None:
        super().__init__(size)
        object.__setattr__(self, "_count", buckets)

    @property
    def buckets(self) -> int:
        return int(self._count)  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [1, 2, 3, 8, 1000, 10**6])
def test_the_expected_maximum_is_that_of_the_fitted_model(count: int) -> None:
    assert expected_maximum(count) == pytest.approx(float(expected_maxima(count)[0]), abs=1e-9)


@pytest.mark.parametrize(
    ("start", "most", "per_node", "counts"),
    [
        (1, 1, None, (1,)),
        (1, 5, None, (1, 2, 3, 4, 5)),
        (1, 20, None, (1, 2, 3, 4, 6, 8, 12, 16, 20)),
        (2, 20, 4, (2, 4, 8, 12, 16, 20)),
        (3, 7, None, (3, 6, 7)),
        (8, 100, 8, (8, 16, 24, 32, 48, 64, 96, 100)),
    ],
)
def test_rank_counts(start: int, most: int, per_node: int | None, counts: tuple[int, ...]) -> None:
    assert rank_counts(start, most, per_node) == counts


def test_noise_without_end_makes_all_samples_equal() -> None:
    assert statistical_efficiency(4096, inf, 64) == 1
    assert statistical_efficiency(4096, 1e-30, 64) == pytest.approx(64 / 4096)


# What there is to choose from


@given(options_of())
def test_options_lie_within_what_is_allowed_and_are_whole(options: Options) -> None:
    assert options.all[0].batch == options.initial == min(options.batches)
    for one in options.all:
        if one.batch > options.initial:
            assert one.batch == one.ranks * one.accumulation * options.micro
        assert one.images_per_sec > 0
    assert list(options.batches) == sorted(set(options.batches))


def test_options_keep_to_the_cap_and_the_multiple() -> None:
    options = Options(64, 32, LINEAR, (1, 2, 4), 256, 64)
    assert [(one.batch, one.ranks) for one in options.all] == [
        *((64, 1), (64, 2)),
        *((128, 1), (128, 2), (128, 4)),
        *((192, 1), (192, 2)),
        *((256, 1), (256, 2), (256, 4)),
    ]


@given(options_of(), scales, st.sampled_from(["time", "rank_hours"]), st.floats(0.01, 1))
def test_the_choice_is_that_of_trying_everything(
    options: Options, scale: float, objective: Any, efficiency: float
) -> None:
    def goodput(one: Option) -> float:
        seconds = options.times.seconds(one.ranks, one.accumulation, options.micro)
        share = (scale + options.initial) / (scale + one.batch)
        return one.batch / seconds * share

    allowed = list(options.all)
    if objective == "rank_hours":
        most = max(goodput(one) / one.ranks for one in allowed)
        allowed = [
            one for one in allowed if goodput(one) / one.ranks >= efficiency * most * (1 - 1e-9)
        ]
    chosen = options.best(scale, objective, efficiency)
    assert chosen is not None
    assert goodput(chosen) == pytest.approx(max(map(goodput, allowed)), rel=1e-6)


@given(options_of(), scales, scales)
def test_a_larger_noise_scale_never_makes_the_batch_smaller(
    options: Options, one: float, other: float
) -> None:
    low, high = sorted([one, other])
    small, large = options.best(low), options.best(high)
    assert small is not None
    assert large is not None
    if large.batch < small.batch:  # equal but for rounding
        assert large.goodput(high, options.initial) == pytest.approx(
            small.goodput(high, options.initial), rel=1e-9
        )


@given(options_of(), scales, st.floats(1e-3, 1e3))
def test_the_unit_of_time_does_not_matter(options: Options, scale: float, unit: float) -> None:
    names = ("per_image", "fixed", "within_latency", "within_seconds_per_byte",
             "between_latency", "between_seconds_per_byte")  # fmt: skip
    scaled = {name: getattr(options.times, name) * unit for name in names}
    others = Options.__new__(Options)
    others.__dict__ |= options.__dict__ | {"times": replace(options.times, **scaled)}
    others.all = tuple(others.option(one.ranks, one.batch) for one in options.all)
    first, second = options.best(scale), others.best(scale)
    assert first is not None
    assert second is not None
    assert isclose(
        first.goodput(scale, options.initial),
        second.goodput(scale, options.initial) * unit,
        rel_tol=1e-9,
    )


@given(st.sampled_from([2, 4, 16]), scales)
def test_the_unit_of_samples_does_not_matter(times_: int, scale: float) -> None:
    small = Options(64, 8, USUAL, (1, 2, 4, 8), 1024)
    per_image = replace(USUAL, per_image=USUAL.per_image / times_)
    large = Options(64 * times_, 8 * times_, per_image, (1, 2, 4, 8), 1024 * times_)
    first, second = small.best(scale), large.best(scale * times_)
    assert first is not None
    assert second is not None
    assert (first.ranks, first.batch * times_) == (second.ranks, second.batch)


def test_without_an_end_of_noise_linear_throughput_takes_all_there_is() -> None:
    options = Options(64, 32, LINEAR, (1, 2, 4, 8), 1024)
    best = options.best(inf)
    assert best is not None
    # No communication: the batch does not matter, the ranks do.
    assert best.ranks == 8
    flat = Options(64, 32, replace(LINEAR, fixed=1.0), (1, 2, 4, 8), 1024).best(inf)
    assert flat is not None
    assert (flat.ranks, flat.batch) == (8, 1024)


def test_where_nothing_is_gained_by_a_batch_it_stays() -> None:
    """One rank, time in proportion to images: a larger batch only wastes them."""
    options = Options(64, 32, LINEAR, (1,), 1024)
    for scale in (0.1, 100.0, 1e9, inf):
        best = options.best(scale)
        assert best is not None
        assert best.batch == 64


@given(options_of(), scales, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_looser_bound_on_cost_is_never_slower(
    options: Options, scale: float, one: float, other: float
) -> None:
    strict, loose = max(one, other), min(one, other)
    found = [options.best(scale, "rank_hours", bound) for bound in (strict, loose)]
    worth = [o.goodput(scale, options.initial) for o in found if o is not None]
    assert worth[0] <= worth[1] * (1 + 1e-9)
    fastest = options.best(scale)
    assert fastest is not None
    assert worth[1] <= fastest.goodput(scale, options.initial) * (1 + 1e-9)


# The policy


def goodput(options: Options | None = None, **settings: Any) -> Goodput:
    settings = {"dwell": P("1up"), "memory": P("1up"), "limit": None, **settings}
    return Goodput(64, options or Options(64, 32, USUAL, (1, 2, 4, 8), 2048), **settings)


def drive(policy: Goodput, noise: list[float], cap: int = 2048) -> list[tuple[int, int | None]]:
    """(batch, ranks) of each update, whose measurement is tr(Σ) = φ, ‖G‖² = 1."""
    scheduler = StageScheduler(policy, cap, shrink=policy.shrink)
    found, samples = [], 0
    for update, scale in enumerate(noise):
        decision = scheduler.decide(Clock(samples, update, SIZE))
        found.append((decision.batch, decision.ranks))
        samples += decision.batch
        scheduler.observe(
            Clock(samples, update + 1, SIZE), Observation(decision.batch, 1.0, 1.0, (scale, 1.0))
        )
    return found


def test_it_is_a_policy_that_measures() -> None:
    policy = goodput()
    assert isinstance(policy, MeasuredPolicy)
    assert policy.needs_noise
    assert policy.ranks == 1


def test_it_takes_the_best_choice_at_the_noise_scale() -> None:
    policy = goodput(hysteresis=0.0)
    best = policy.options.best(700.0)
    assert best is not None
    assert drive(policy, [700.0, 700.0]) == [(64, 1), (best.batch, best.ranks)]
    assert policy.reason(Clock(0, 0, SIZE)).startswith(
        f"goodput: {best.batch} on {best.ranks} × {best.accumulation} ("
    )
    assert "at a noise scale of 700, against 64 on 1 × 2 (" in policy.reason(Clock(0, 0, SIZE))


@given(st.lists(st.floats(1, 1e6), min_size=2, max_size=12), st.sampled_from([None, 1.5, 2.0]))
def test_ranks_and_batch_only_grow_and_keep_to_the_limit(
    noise: list[float], limit: float | None
) -> None:
    run = drive(goodput(limit=limit), noise)
    for (batch, ranks), (after, then) in pairwise(run):
        assert batch <= after <= (2048 if limit is None else batch * limit)
        assert (ranks or 0) <= (then or 0) <= 8


@given(st.lists(st.floats(0.8, 1.25), min_size=30, max_size=30), st.booleans())
def test_a_noise_scale_that_is_uncertain_does_not_make_it_flap(
    errors: list[float], shrink: bool
) -> None:
    """An estimate that is off by a quarter either way, after a long time at its middle."""
    run = drive(goodput(hysteresis=0.25, shrink=shrink), [900.0] * 3 + [900.0 * e for e in errors])
    assert len(set(run[2:])) == 1


def test_without_hysteresis_it_would() -> None:
    wobbly = [900.0 * (0.8 if k % 2 else 1.25) for k in range(30)]
    run = drive(goodput(hysteresis=0.0, shrink=True), wobbly)
    assert len({batch for batch, _ in run[5:]}) > 1


def test_the_batch_falls_only_where_it_may() -> None:
    noise = [5000.0] * 5 + [50.0] * 10
    assert drive(goodput(), noise)[-1] == drive(goodput(), noise)[5]
    fallen = drive(goodput(shrink=True), noise)
    assert fallen[-1][0] < fallen[5][0]
    assert fallen[-1][1] == fallen[5][1], "ranks are not given back"


def test_nothing_is_decided_before_the_wait_and_without_an_estimate() -> None:
    assert drive(goodput(wait=P("5up")), [900.0] * 6)[:5] == [(64, 1)] * 5
    assert drive(goodput(wait=P("5up")), [900.0] * 7)[-1] != (64, 1)
    policy = goodput()
    scheduler = StageScheduler(policy, 2048)
    for update in range(4):
        clock = Clock(64 * update, update, SIZE)
        assert scheduler.decide(clock).batch == 64
        scheduler.observe(
            replace(clock, updates=update + 1), Observation(64, 1.0, 1.0, (9.0, -1.0))
        )


@given(st.lists(st.floats(1, 1e5), min_size=4, max_size=10), st.integers(1, 9))
def test_a_resumed_policy_goes_on_as_it_would_have(noise: list[float], cut: int) -> None:
    cut = min(cut, len(noise) - 1)
    whole = drive(goodput(), noise)
    first, second = (StageScheduler(goodput(), 2048) for _ in range(2))
    samples, scheduler = 0, first
    for update, scale in enumerate(noise):
        if update == cut:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            scheduler = second
        decision = scheduler.decide(Clock(samples, update, SIZE))
        assert (decision.batch, decision.ranks) == whole[update]
        samples += decision.batch
        scheduler.observe(
            Clock(samples, update + 1, SIZE), Observation(decision.batch, 1.0, 1.0, (scale, 1.0))
        )


def test_all_ranks_follow_rank_0() -> None:
    """Another rank's sums may differ in the last bit, so it takes what it is told."""
    policy = goodput()
    scheduler = StageScheduler(policy, 2048)
    told = iter([96, 4])
    scheduler.agree = lambda mine: next(told)
    scheduler.observe(Clock(64, 1, SIZE), Observation(64, 1.0, 1.0, (1e6, 1.0)))
    decision = scheduler.decide(Clock(64, 1, SIZE))
    assert (decision.batch, decision.ranks) == (96, 4)


@given(options_of(), st.sampled_from([None, 1.3, 2.0]))
def test_the_fastest_growth_stays_on_batches_that_it_may_choose(
    options: Options, limit: float | None
) -> None:
    policy = Goodput(options.initial, options, limit=limit)
    listed: Any = policy.fastest(lambda batch: batch, 10**6)
    batches = [options.initial, *(batch for _, batch in listed.stages)]
    assert set(batches) <= set(options.batches)
    for before, after in pairwise(batches):
        assert before < after <= (inf if limit is None else before * limit + 1)
    if limit is None:
        assert batches[-1] == options.batches[-1]


# From the configuration

MODEL: dict[str, Any] = {
    "per_image": 1e-3,
    "fixed": 5e-3,
    "gradient_bytes": 1e6,
    "within_latency": 1e-4,
}


def test_the_configuration_names_the_policy() -> None:
    growth = {
        "policy": "goodput", "model": MODEL, "ranks": [1, 2], "objective": "rank_hours",
        "efficiency": 0.7, "hysteresis": 0.1, "limit": 3.0, "wait": "2ep",
    }  # fmt: skip
    raw = {"initial": 64, "micro": 16, "max": 512, "shrink": True, "growth": growth}
    policy = growth_policy(Batch.model_validate(raw))
    assert isinstance(policy, Goodput)
    assert (policy.objective, policy.efficiency, policy.hysteresis) == ("rank_hours", 0.7, 0.1)
    assert (policy.limit, policy.wait, policy.dwell) == (3.0, P("2ep"), P("1ep"))
    assert policy.shrink
    assert policy.options.times == UpdateTime(**MODEL)
    expected = {(r, a) for r, a in product((1, 2), range(1, 33)) if 64 < r * a * 16 <= 512}
    found = {(one.ranks, one.accumulation) for one in policy.options.all if one.batch > 64}
    assert found <= expected
    assert stage_scheduler(Batch.model_validate(raw)).decide(Clock(0, 0, SIZE)).ranks == 1


def test_what_is_not_settled_is_refused() -> None:
    growth = {"policy": "goodput", "throughput": ["runs/bench"]}
    with pytest.raises(ConfigError, match="to be settled"):
        growth_policy(Batch.model_validate({"initial": 64, "max": 512, "growth": growth}))


@pytest.mark.parametrize(
    ("key", "default"),
    [("hysteresis", 0.05), ("limit", 2.0), ("objective", "time"), ("efficiency", 0.5)],
)
def test_the_defaults_are_those_of_the_policy(key: str, default: object) -> None:
    assert GoodputGrowth.model_fields[key].default == default
    assert getattr(Goodput(64, Options(64, 32, LINEAR, (1,), 128)), key) == default


def test_choices_of_many_accumulations_are_few() -> None:
    found = choices([1, 1000], 1, most_accumulation=10**6, largest_batch=10**6)
    assert len(found) < 100
    assert np.all(np.diff([one.accumulation for one in found if one.ranks == 1]) > 0)
    with pytest.raises(UsageError, match="already take more"):
        choices([8], 32, largest_batch=128)
