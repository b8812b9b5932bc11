"""The plan against a run's updates one by one, and ``harness plan`` as its readers see it."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from rich.console import Console
from support import ROOT

from harness.cli import main
from harness.config import load_config
from harness.errors import ConfigError
from harness.schedule import plan as planning
from harness.schedule.clock import Clock, Limit, step, update_size
from harness.schedule.configured import rate_schedule, stage_scheduler
from harness.schedule.growth import BatchDecision, Observation, StageScheduler
from harness.schedule.plan import (
    Plan,
    build_plan,
    decompose,
    ranks_for,
    run_end,
    samples_until_growth,
)
from harness.schedule.rates import Rates
from harness.schedule.table import print_plan
from harness.schema import Batch, Config, Ranks

DEMO = ROOT / "configs" / "adabatch-digits.yaml"


def config(**sections: Any) -> Config:
    raw: dict[str, Any] = {
        "name": "x",
        "data": {"dataset": "digits"},
        "model": {"name": "lenet5"},
        "batch": {"initial": 64},
        "lr": {"base": 0.1},
        "train": {"duration": "2ep"},
    }
    return Config.model_validate(raw | sections)


def geometric(every: str, factor: float = 2.0) -> dict[str, Any]:
    return {"policy": "geometric", "every": every, "factor": factor}


PERIODS = st.one_of(
    st.integers(1, 30).map(lambda n: f"{n}up"),
    st.integers(1, 500).map(lambda n: f"{n}sa"),
    st.decimals("0.05", 3, places=2).map(lambda n: f"{n}ep"),
)
DURATIONS = st.one_of(
    st.integers(1, 60).map(lambda n: f"{n}up"),
    st.integers(1, 500).map(lambda n: f"{n}sa"),
    st.decimals("0.05", 5, places=2).map(lambda n: f"{n}ep"),
)


SCHEDULED = ("fixed", "geometric", "linear", "list", "list")
MEASURED = ("loss", "rolling", "noise", "goodput", "plateau")


@st.composite
def listed(draw: st.DrawFn, least: int, most: int) -> dict[str, Any]:
    unit = draw(st.sampled_from(["up", "sa", "ep"]))
    starts = sorted(draw(st.sets(st.integers(1, 40), min_size=1, max_size=5)))
    scale = {"up": 1, "sa": 11, "ep": 0.125}[unit]
    return {
        "policy": "list",
        "stages": [
            {"start": f"{start * scale:g}{unit}", "batch": draw(st.integers(least, most))}
            for start in starts
        ],
    }


@st.composite
def rates(draw: st.DrawFn, duration: str) -> dict[str, Any]:
    """The lr section of a run of a length: every decay and warmup that goes with it."""
    unit, begin = duration[-2:], "1up" if duration.endswith("up") else "1sa"
    decays: list[dict[str, Any]] = [
        {"kind": "none"},
        {"kind": "poly"},
        {"kind": "poly", "power": 0.5, "end": 0.01, "begin": begin},
        {"kind": "cosine", "begin": begin},
        {"kind": "step", "every": "1ep"},
        {"kind": "step", "every": "3up", "factor": 0.9, "begin": "1up"},
        {"kind": "exponential", "every": "50sa", "begin": "1sa"},
        {"kind": "multistep", "at": ["3up", "9up"]},
        {"kind": "multistep", "at": ["0.25ep", "1.5ep"]},
    ]
    warmups: list[dict[str, Any]] = [
        {"duration": duration, "start": 0.0},
        {"duration": "30sa" if unit == "up" else "3up"},
        {"duration": duration, "kind": "constant", "decayed": False},
    ]
    if unit != "ep":
        warmups.append({"duration": "1ep", "per": "epoch", "decayed": False})
    return draw(
        st.fixed_dictionaries(
            {"base": st.just(0.1), "scaling": st.sampled_from(["linear", "sqrt", "none"])},
            optional={
                "on_growth": st.sampled_from([0.5, 1.25, [0.5], [0.5, 2.0, 0.75]]),
                "decay": st.sampled_from(decays),
                "warmup": st.sampled_from(warmups),
                "max_batch": st.integers(1, 300),
                "max": st.sampled_from([0.1, 0.15]),
                "min": st.just(0.01),
            },
        )
    )


@st.composite
def configs(draw: st.DrawFn, policies: Sequence[str] = SCHEDULED) -> Config:
    multiple = draw(st.sampled_from([1, 1, 8, 12]))
    policy = draw(st.sampled_from(policies))
    least = 2 if policy in ("noise", "goodput") and multiple == 1 else 1
    initial = multiple * draw(st.integers(least, max(2, 150 // multiple)))
    room, shrink = draw(st.integers(0, 500 // multiple)), draw(st.booleans())
    most = initial + multiple * room
    growth = {
        "fixed": st.just({"policy": "fixed"}),
        "geometric": st.builds(
            geometric, PERIODS, st.sampled_from([1.0, 1.01, 1.1, 1.5, 2.0, 3.0])
        ),
        "linear": st.builds(
            lambda every, rate: {"policy": "linear", "every": every, "rate": rate},
            PERIODS | st.just("1up"),
            st.sampled_from([0.1, 0.5, 1, 7.3, 100]),
        ),
        "list": listed(1 if shrink else initial, most),
    }
    drawn = draw(growth[policy]) if policy in growth else draw(measured(policy))
    if policy == "list" and not shrink:
        batches = sorted(stage["batch"] for stage in drawn["stages"])
        for stage, size in zip(drawn["stages"], batches, strict=True):
            stage["batch"] = size
    batch = {
        "initial": initial,
        "micro": draw(st.integers(1, max(1, initial - 1))),
        "max": most if policy not in growth or draw(st.booleans()) else None,
        "growth": drawn,
        "multiple_of": multiple,
        "shrink": shrink,
        "epoch_end": draw(st.sampled_from(["short", "carry"])),
    }
    ranks = {
        "max": draw(st.integers(1, 5)),
        "prefer": draw(st.sampled_from(["ranks", "accumulation"])),
    }
    optimizer = draw(st.sampled_from([{}, {"momentum_scaling": "smith_le"}]))
    duration = draw(DURATIONS)
    return config(
        batch=batch,
        lr=draw(rates(duration)),
        ranks=ranks,
        optimizer=optimizer,
        train={"duration": duration},
    )


def measured(policy: str) -> st.SearchStrategy[dict[str, Any]]:
    settings: dict[str, st.SearchStrategy[Any]] = {"dwell": PERIODS, "wait": st.none() | PERIODS}
    if policy == "plateau":
        settings |= {"patience": st.integers(1, 2), "factor": st.sampled_from([1.1, 2.0, 5.0])}
    else:
        settings |= {"memory": st.just("1sa"), "limit": st.sampled_from([None, 1.1, 2.0, 5.0])}
    if policy == "goodput":
        times = {"per_image": 1e-3, "fixed": 1e-3, "within_latency": 1e-4}
        settings |= {"model": st.just(times), "ranks": st.sampled_from([[1], [1, 2, 4]])}
    return st.fixed_dictionaries({"policy": st.just(policy), **settings})


Update = tuple[Clock, int, BatchDecision, Rates]


def walk(config: Config, size: int, seen: Sequence[Observation] = ()) -> list[Update]:
    """Every update of a run as the trainer takes it: where it starts, its size, batch and rates.

    ``seen`` is what the updates measure, over and over.
    """
    end, rates = run_end(config, size), rate_schedule(config)
    scheduler = stage_scheduler(config.batch)
    clock, updates = Clock(0, 0, size), []
    while not end.reached(clock):
        decision = scheduler.decide(clock)
        taken = update_size(clock, decision.batch, config.batch.epoch_end, end)
        updates.append((clock, taken, decision, rates.at(clock, decision)))
        clock = step(clock, taken)
        if seen:
            scheduler.observe(clock, replace(seen[clock.updates % len(seen)], samples=taken))
    return updates


def plan_of(config: Config, size: int, ranks: int | None = None) -> Plan:
    """The plan of a run that is long enough for its warmup."""
    try:
        return build_plan(config, size, ranks)
    except ConfigError:
        reject()


@given(configs(), st.integers(1, 200))
def test_the_plan_is_what_the_updates_do(config: Config, size: int) -> None:
    plan, updates = plan_of(config, size), walk(config, size)
    warmup = config.lr.warmup
    stages = [list(group) for _, group in groupby(updates, key=lambda update: update[2].stage)]
    assert [row.stage for row in plan.stages] == [group[0][2].stage for group in stages]
    for row, group in zip(plan.stages, stages, strict=True):
        (first, _, decision, rates), (last, size_of_last, at_last, last_rates) = group[0], group[-1]
        assert row.updates == len(group)
        assert {taken.batch for _, _, taken, _ in group} == {row.global_batch}
        assert (row.start_sample, row.end_sample) == (first.samples, last.samples + size_of_last)
        assert row.end_sample - row.start_sample == sum(size for _, size, _, _ in group)
        assert (row.start_epoch, row.end_epoch) == (first.epoch, row.end_sample / size)
        assert (row.lr_start, row.lr_end) == (rates.lr, last_rates.lr)
        assert (row.momentum, row.momentum_end) == (rates.momentum, last_rates.momentum)
        if warmup is not None:
            warm = [rates.lr for clock, _, _, rates in group if clock.passed(warmup.duration)]
            assert row.lr_after_warmup == (warm[0] if 0 < len(warm) < len(group) else None)
        assert row.effective_lr_start == rates.lr / (1 - rates.momentum)
        assert row.effective_lr_end == last_rates.lr / (1 - last_rates.momentum)
        assert row.asked == at_last.asked
        assert row.reason == decision.reason


@given(configs(), st.integers(1, 200))
def test_a_warmup_is_refused_exactly_where_the_updates_do_not_reach_its_end(
    config: Config, size: int
) -> None:
    last, taken, _, _ = walk(config, size)[-1]
    warmup, end = config.lr.warmup, step(last, taken)
    if warmup is None or end.passed(warmup.duration):
        assert build_plan(config, size).fastest is None
        return
    with pytest.raises(ConfigError) as caught:
        build_plan(config, size)
    assert f"lr.warmup.duration = {warmup.duration} is longer than " in str(caught.value)


@given(configs(), st.integers(1, 200))
def test_a_plan_follows_the_laws(config: Config, size: int) -> None:
    plan = plan_of(config, size)
    assert plan.stages[0].start_sample == 0
    assert plan.stages[0].global_batch == config.batch.initial
    assert [row.stage for row in plan.stages] == list(range(len(plan.stages)))
    for before, after in pairwise(plan.stages):
        assert before.end_sample == after.start_sample
        assert before.global_batch != after.global_batch
        assert config.batch.shrink or before.global_batch < after.global_batch
        assert after.segment - before.segment == (after.ranks > before.ranks)
        assert before.ranks <= after.ranks
    for row in plan.stages:
        assert row.updates >= 1
        assert row.global_batch <= (config.batch.max or row.global_batch)
        assert row.global_batch % config.batch.multiple_of == 0
        pieces = ceil(row.global_batch / row.micro_batch)
        assert row.ranks * (row.accumulation - 1) < pieces <= row.ranks * row.accumulation
        assert 0 <= row.idle < 1
    duration = config.train.duration
    totals = plan.as_dict()["totals"]
    if duration.unit == "up":
        assert totals["updates"] == duration.value
    else:
        assert totals["samples"] == duration.boundary(1, size)
    assert totals["updates"] == sum(row.updates for row in plan.stages)
    assert totals["samples"] == sum(row.end_sample - row.start_sample for row in plan.stages)
    if config.batch.growth.policy == "fixed":
        assert totals["updates_at_initial_batch"] == totals["updates"]


@given(configs(), st.integers(1, 200), st.data())
def test_how_long_ranks_last_is_what_the_plan_says(
    config: Config, size: int, data: st.DataObject
) -> None:
    stages = plan_of(config, size).stages
    place = data.draw(st.integers(0, len(stages) - 1))
    ranks = stages[place].ranks
    updates = sum(row.updates for row in stages[:place])
    clock = Clock(stages[place].start_sample, updates, size)
    later = [row.start_sample for row in stages[place:] if row.ranks > ranks]
    end = later[0] if later else stages[-1].end_sample
    assert samples_until_growth(config, clock, ranks) == end - clock.samples


@given(configs(MEASURED), st.integers(1, 200))
def test_growth_from_measurements_is_not_foreseen(config: Config, size: int) -> None:
    end = plan_of(config, size).stages[-1].end_sample
    assert samples_until_growth(config, Clock(0, 0, size), config.ranks.start) == end


@given(configs(), st.integers(1, 200), st.integers(1, 7))
def test_given_ranks_hold_from_start_to_end_and_change_nothing_else(
    config: Config, size: int, ranks: int
) -> None:
    given_ranks, free = plan_of(config, size, ranks), plan_of(config, size)
    assert {(row.ranks, row.segment) for row in given_ranks.stages} == {(ranks, 0)}
    for fixed, row in zip(given_ranks.stages, free.stages, strict=True):
        assert fixed.updates == row.updates
        assert fixed.global_batch == row.global_batch
        assert (fixed.lr_start, fixed.lr_end) == (row.lr_start, row.lr_end)


numbers = st.sampled_from([1e-9, 1.0, 1e9, float("nan")]) | st.floats(1e-3, 1e3)
observations = st.builds(
    Observation, st.just(0), numbers, numbers, st.none() | st.tuples(numbers, numbers)
)


@given(configs(MEASURED), st.integers(1, 200), st.lists(observations, min_size=1, max_size=8))
def test_a_run_that_measures_keeps_to_the_bounds_of_its_plan(
    config: Config, size: int, seen: list[Observation]
) -> None:
    plan = plan_of(config, size)
    assert plan.fastest is not None
    assert {row.global_batch for row in plan.stages} == {config.batch.initial}
    assert all(row.global_batch <= (config.batch.max or 0) for row in plan.fastest.stages)
    fastest = [row.global_batch for row in plan.fastest.stages for _ in range(row.updates)]
    updates = walk(config, size, seen)
    for (_, _, decision, _), most in zip(updates, fastest, strict=False):
        assert config.batch.initial <= decision.batch <= most
    assert len(fastest) <= len(updates) <= sum(row.updates for row in plan.stages)
    last, taken, _, _ = updates[-1]
    slow, fast = plan.stages[-1].end_sample, plan.fastest.stages[-1].end_sample
    assert slow <= last.samples + taken <= fast
    assert plan.as_dict()["fastest"] == plan.fastest.as_dict()


@pytest.mark.parametrize(
    ("growth", "batches", "updates"),
    [
        # Of 1,000 samples in batches of 64 make 16 updates, of 128 eight, of 256 four, 512 two.
        ({"policy": "loss"}, [64, 512], [16, 2 * 9]),
        ({"policy": "loss", "wait": "3ep"}, [64, 512], [48, 2 * 7]),
        ({"policy": "noise"}, [64, 128, 256, 512], [16, 8, 4, 2 * 7]),
        ({"policy": "noise", "wait": "2ep", "limit": 8}, [64, 512], [32, 2 * 8]),
        ({"policy": "rolling", "limit": 4}, [64, 256, 512], [16, 4, 2 * 8]),
        ({"policy": "loss", "optimum": "estimate", "dwell": "2ep"},
         [64, 128, 256, 512], [32, 16, 8, 2 * 4]),
        ({"policy": "plateau", "patience": 2, "factor": 4}, [64, 256, 512], [48, 12, 2 * 4]),
        ({"policy": "plateau", "patience": 9}, [64], [160]),
    ],
)  # fmt: skip
def test_bounds_of_growth_from_measurements(
    growth: dict[str, Any], batches: list[int], updates: list[int]
) -> None:
    batch = {"initial": 64, "max": 512, "growth": growth}
    plan = build_plan(config(batch=batch, train={"duration": "10ep"}), 1000)
    assert [(row.global_batch, row.updates) for row in plan.stages] == [(64, 160)]
    assert plan.fastest is not None
    assert [row.global_batch for row in plan.fastest.stages] == batches
    assert [row.updates for row in plan.fastest.stages] == updates


LISTED = {
    "policy": "list",
    "stages": [{"start": "30ep", "batch": 512}, {"start": "60ep", "batch": 1024},
               {"start": "80ep", "batch": 2048}],
}  # fmt: skip


@pytest.mark.parametrize("epoch_end", ["short", "carry"])
@pytest.mark.parametrize("size", [1281167, 10**9])
@pytest.mark.parametrize(
    ("growth", "most"),
    [
        (geometric("5ep"), 90),
        (geometric("1ep", 1.001), 90),
        (geometric("1sa"), 90),
        (LISTED, 4),
        ({"policy": "linear", "rate": 16, "every": "1ep"}, 90),
        ({"policy": "linear", "rate": 1000}, 1050),
        ({"policy": "linear", "rate": 1e-8, "every": "1sa"}, 1000),
        ({"policy": "loss", "dwell": "1up", "limit": 1.05}, 400),
        ({"policy": "noise"}, 90),
        ({"policy": "plateau", "dwell": "1000sa", "factor": 1.01}, 2000),
    ],
)
def test_ninety_epochs_cost_no_more_than_their_stages(
    monkeypatch: pytest.MonkeyPatch, epoch_end: str, growth: dict[str, Any], size: int, most: int
) -> None:
    calls: dict[str, int] = {}
    for owner, name in (
        (planning, "step"),
        (planning, "advance"),
        (planning, "update_size"),
        (planning, "updates_until"),
        (StageScheduler, "decide"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), name, calls))
    batch = {"initial": 256, "growth": growth, "epoch_end": epoch_end, "max": 2**20}
    plan = build_plan(config(batch=batch, train={"duration": "90ep"}), size)
    stages = plan.stages + (plan.fastest.stages if plan.fastest else ())
    assert stages[-1].end_sample == 90 * size
    assert all(count <= 3 * len(stages) + 10 for count in calls.values())
    assert len(calls) == 5
    assert len(stages) <= most


@pytest.mark.smoke
def test_a_recipe_s_stages_on_imagenet() -> None:
    """⌈1281167 / batch⌉ = 5005, 2503, 1252 and 626 updates in an epoch."""
    batch = {"initial": 256, "growth": LISTED}
    plan = build_plan(config(batch=batch, train={"duration": "90ep"}), 1281167)
    assert [row.updates for row in plan.stages] == [30 * 5005, 30 * 2503, 20 * 1252, 10 * 626]
    assert [row.end_epoch for row in plan.stages] == [30, 60, 80, 90]
    assert plan.updates_at_initial == 90 * 5005


def counted(function: Any, name: str, calls: dict[str, int]) -> Any:
    def call(*arguments: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return function(*arguments)

    return call


@pytest.mark.parametrize(
    ("global_batch", "micro", "ranks", "accumulation", "idle"),
    [
        (64, 32, 2, 1, 0.0),
        (1024, 32, 2, 16, 0.0),
        (100, 7, 2, 8, 1 - 100 / 112),
        (100, 7, 1, 15, 1 - 100 / 105),
        (1, 1, 4, 1, 0.75),
        (96, 32, 2, 2, 0.25),
    ],
)
def test_decomposition(
    global_batch: int, micro: int, ranks: int, accumulation: int, idle: float
) -> None:
    pieces = decompose(global_batch, micro, ranks)
    assert (pieces.ranks, pieces.accumulation, pieces.micro_batch) == (ranks, accumulation, micro)
    assert pieces.idle == pytest.approx(idle)


@pytest.mark.parametrize(
    ("global_batch", "prefer", "ranks"),
    [(64, "ranks", 2), (127, "ranks", 4), (128, "ranks", 4), (160, "ranks", 5), (256, "ranks", 8),
     (1024, "ranks", 8), (1024, "accumulation", 2)],
)  # fmt: skip
def test_ranks_keep_their_share_of_the_initial_batch(
    global_batch: int, prefer: Any, ranks: int
) -> None:
    batch = Batch(initial=64, micro=32)
    assert ranks_for(global_batch, batch, Ranks(start=2, max=8, prefer=prefer)) == ranks


def test_the_rate_goes_on_shrinking_past_the_cap() -> None:
    """Asked for 64, 128, 256, 512 with a cap of 64: the last rate is 0.1 · 64/512."""
    batch = {"initial": 64, "max": 64, "growth": geometric("1ep")}
    (row,) = build_plan(config(batch=batch, train={"duration": "4ep"}), 1437).stages
    assert (row.updates, row.global_batch) == (92, 64)
    assert (row.lr_start, row.lr_end) == pytest.approx((0.1, 0.0125))


def test_segments_are_launches() -> None:
    batch = {"initial": 64, "micro": 32, "growth": geometric("1ep"), "max": 512}
    ranks = {"start": 1, "max": 4}
    plan = build_plan(config(batch=batch, ranks=ranks, train={"duration": "5ep"}), 1437).as_dict()
    assert [(row["stage"], row["segment"], row["ranks"]) for row in plan["stages"]] == [
        (0, 0, 1), (1, 1, 2), (2, 2, 4), (3, 2, 4)
    ]  # fmt: skip
    assert plan["segments"] == [
        {"segment": 0, "ranks": 1, "start_epoch": 0.0, "end_epoch": 1.0, "stages": [0],
         "updates": 23},
        {"segment": 1, "ranks": 2, "start_epoch": 1.0, "end_epoch": 2.0, "stages": [1],
         "updates": 12},
        {"segment": 2, "ranks": 4, "start_epoch": 2.0, "end_epoch": 5.0, "stages": [2, 3],
         "updates": 12},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("warmup", "train", "refused"),
    [("2ep", "3000sa", False), ("2ep", "1999sa", True), ("2001sa", "2ep", True),
     ("2000sa", "2ep", False), ("16up", "1ep", False), ("17up", "1ep", True),
     ("0.32ep", "5up", False), ("0.321ep", "5up", True), ("9ep", "5up", True)],
)  # fmt: skip
def test_a_warmup_longer_than_the_run_in_another_unit(
    warmup: str, train: str, refused: bool
) -> None:
    lr = {"base": 0.1, "warmup": {"duration": warmup}}
    made = config(lr=lr, train={"duration": train})
    if not refused:
        assert build_plan(made, 1000).stages
        return
    with pytest.raises(ConfigError, match=f"lr.warmup.duration = {warmup} is longer than"):
        build_plan(made, 1000)


def test_the_end_of_a_run_is_its_duration() -> None:
    assert run_end(config(train={"duration": "2.5ep"}), 1437) == Limit(samples=3593)
    assert run_end(config(train={"duration": "7up"}), 1437) == Limit(updates=7)


# The command


STAGE_KEYS = {
    "stage", "start_epoch", "end_epoch", "updates", "global_batch", "ranks", "accumulation",
    "micro_batch", "lr_start", "lr_end", "momentum", "segment",
}  # fmt: skip


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", str(DEMO), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found: dict[str, Any] = json.loads(captured.out, parse_constant=refuse_constant)
    return found


@pytest.mark.smoke
def test_json_holds_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json(capsys, "--json")
    assert set(plan) == {"stages", "segments", "totals"}
    assert all(set(row) >= STAGE_KEYS for row in plan["stages"])
    assert [(row["global_batch"], row["accumulation"]) for row in plan["stages"]] == [
        (64, 1), (128, 2), (256, 4), (512, 8), (1024, 16)
    ]  # fmt: skip
    assert [row["updates"] for row in plan["stages"]] == [115, 60, 30, 15, 20]
    assert [row["end_epoch"] for row in plan["stages"]] == [5, 10, 15, 20, 30]
    assert [row["lr_start"] for row in plan["stages"]] == pytest.approx(
        [0.001, 0.014, 0.0196, 0.02744, 0.038416]  # × 2 × 0.7 at each growth, after the warmup
    )
    # From epoch 25 on it asks for 2,048: half the rate instead.
    assert plan["stages"][-1]["lr_end"] == pytest.approx(0.019208)
    assert plan["segments"] == [
        {"segment": 0, "ranks": 2, "start_epoch": 0.0, "end_epoch": 30.0,
         "stages": [0, 1, 2, 3, 4], "updates": 240}
    ]  # fmt: skip
    assert plan["totals"] == {
        "dataset_size": 1437,
        "samples": 43110,
        "epochs": 30.0,
        "updates": 240,
        "updates_at_initial_batch": 690,
    }


@pytest.mark.parametrize(
    "arguments",
    [["batch.initial=128", "seed=3", "--json"], ["--json", "batch.initial=128", "seed=3"],
     ["batch.initial=128", "--json", "seed=3"]],
)  # fmt: skip
def test_overrides_may_stand_on_either_side_of_an_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert as_json(capsys, *arguments)["stages"][0]["global_batch"] == 128


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", str(DEMO), *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def printed(made: Config, plan: Plan, width: int = 100) -> str:
    stream = io.StringIO()
    print_plan(made, plan, Console(file=stream, width=width))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def rows(text: str) -> list[str]:
    """The lines of the tables, with single blanks."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if " × " in line and line.split()[0].isdigit()]


@pytest.mark.smoke
def test_the_table_to_the_letter() -> None:
    made = load_config(DEMO, ["batch.micro=30"])
    assert printed(made, build_plan(made, 1437)) == TABLE


TABLE = """\
                              adabatch-digits: lenet5 on digits

                                          ranks × accum
 stage   epochs  samples  updates  batch        × micro                   lr  momentum   idle
 ────────────────────────────────────────────────────────────────────────────────────────────
     0    0 – 5    7,185      115     64     2 × 2 × 30         0.001 → 0.01       0.9  46.7%
     1   5 – 10    7,185       60    128     2 × 3 × 30                0.014       0.9  28.9%
     2  10 – 15    7,185       30    256     2 × 5 × 30               0.0196       0.9  14.7%
     3  15 – 20    7,185       15    512     2 × 9 × 30              0.02744       0.9   5.2%
     4  20 – 30   14,370       20  1,024    2 × 18 × 30  0.038416 → 0.019208       0.9   5.2%

43,110 samples in 240 updates; a global batch of 64 throughout would take 690 (2.9 ×).
Stage 4 stays at batch.max = 1,024 where the policy asks for more, up to 2,048: the rate is \
multiplied by max/asked instead.
Stages 0 – 4: the micro-batches do not divide evenly among the ranks. 19.6% of the run's \
rank-time is spent waiting; idle is a stage's share.
Even would be: batch.initial=60 batch.max=1020, or batch.micro=32."""


@pytest.mark.parametrize(
    ("batch", "more", "told"),
    [
        (718, (), "only 1 of 718 samples, at the rate of a whole batch. batch.epoch_end=carry"),
        (718, (), "a batch of 719 shares the epoch evenly"),
        (718, ("batch.epoch_end=carry",), None),
        (719, (), None),
        (512, (), None),  # 413 are left
        (1437, (), None),
        (1438, (), None),  # larger than the data set: always full
    ],
)
def test_a_last_update_of_few_samples_is_told(
    batch: int, more: tuple[str, ...], told: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("batch.growth={policy: fixed}", "batch.max=null", "lr.on_growth=1", "ranks.start=1")
    text = table(capsys, *fixed, f"batch.initial={batch}", "batch.micro=1", *more)
    assert ("last update of an epoch" in text) == (told is not None)
    assert told is None or told in " ".join(text.split())


def test_the_table_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys)
    assert rows(text) == [
        "0 0 – 5 7,185 115 64 2 × 1 × 32 0.001 → 0.01 0.9",
        "1 5 – 10 7,185 60 128 2 × 2 × 32 0.014 0.9",
        "2 10 – 15 7,185 30 256 2 × 4 × 32 0.0196 0.9",
        "3 15 – 20 7,185 15 512 2 × 8 × 32 0.02744 0.9",
        "4 20 – 30 14,370 20 1,024 2 × 16 × 32 0.038416 → 0.019208 0.9",
    ]
    assert (
        "\n43,110 samples in 240 updates; a global batch of 64 throughout would take 690 (2.9 ×).\n"
        in text
    )
    assert "adabatch-digits: lenet5 on digits" in text
    for word in ("idle", "segment", "lr/(1−m)", "even", "time", "sent"):
        assert word not in text


def test_the_table_shows_idle_ranks_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "batch.micro=30")
    assert "46.7%" in text  # 64 in micro-batches of 30 are 3 for 2 ranks: 2 × 2 × 30 = 120
    assert "Stages 0 – 4: the micro-batches do not divide evenly among the ranks. " in text
    assert "Even would be: batch.initial=60 batch.max=1020, or batch.micro=32." in text


def test_a_name_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a[/b] [red]c: lenet5" in table(capsys, "name='a[/b] [red]c'")


def test_the_table_fits_a_narrow_terminal() -> None:
    plan = build_plan(config(batch={"initial": 64, "growth": geometric("0.3ep")}), 1437)
    lines = printed(config(), plan, 80).splitlines()
    assert len([line for line in lines if " × 32 " in line]) == len(plan.stages)
    assert all(len(line) <= 80 for line in lines if " × 32 " in line)


@pytest.mark.parametrize(("count", "shown"), [(40, 40), (41, 30), (1000, 30)])
def test_of_many_stages_both_ends_are_printed(count: int, shown: int) -> None:
    row = build_plan(config(), 1437).stages[0]
    text = printed(config(), Plan(tuple(replace(row, stage=i) for i in range(count)), 1437, 1000))
    assert [int(line.split()[0]) for line in rows(text)] == [
        i for i in range(count) if shown == count or not 15 <= i < count - 15
    ]
    (between,) = [line for line in text.splitlines() if line.startswith("⋮")] or [""]
    said = f"⋮ {count - 30:,} stages, 15 – {count - 16}: --json shows them all."
    assert between == (said if shown < count else "")


def test_of_many_launches_both_ends_are_printed() -> None:
    row = build_plan(config(), 1437).stages[0]
    stages = (replace(row, stage=i, segment=i, ranks=i + 1) for i in range(50))
    lines = printed(config(), Plan(tuple(stages), 1437, 1000)).splitlines()
    assert lines.count("⋮ 20 more segments") == 1
    assert len([line for line in lines if line.startswith("segment ")]) == 30
    assert "segment 14: epochs 0 – 2 on 15 ranks (stage 14)" in lines
    assert "segment 35: epochs 0 – 2 on 36 ranks (stage 35)" in lines


def test_launches_are_told_with_their_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "ranks.start=1", "ranks.max=4", "batch.micro=16", "ranks.per_node=2")
    assert rows(text)[2].startswith("2 2 10 – 15 7,185 30 256 4 × 4 × 16")
    assert (
        "segment 0: epochs 0 – 5 on 1 rank, 1 node (stage 0)\n"
        "segment 1: epochs 5 – 10 on 2 ranks, 1 node (stage 1)\n"
        "segment 2: epochs 10 – 30 on 4 ranks, 2 nodes (stages 2 – 4)\n"
    ) in text


def test_the_table_shows_a_momentum_that_changes(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "optimizer.momentum_scaling=smith_le", "lr.max=0.02")
    assert "lr/(1−m)" in text
    assert rows(text)[3:] == [
        "3 15 – 20 7,185 15 512 2 × 8 × 32 0.02 0.92711 0.2744",
        "4 20 – 30 14,370 20 1,024 2 × 16 × 32 0.02 → 0.01 0.94794 0.3842 → 0.1921",
    ]


def test_growth_from_measurements_shows_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "batch.growth={policy: loss, dwell: 2ep, limit: 4}")
    assert (
        "Growth is decided while it trains (policy loss): between 690 updates, where the batch "
        "never grows, and 110, where it grows as fast as it may. The first growth may come at "
        "epoch 2, after 46 updates.\n"
    ) in text
    assert "adabatch-digits: lenet5 on digits: no growth" in text
    assert "adabatch-digits: lenet5 on digits: fastest growth" in text
    assert [" ".join(row.split()[:6]) for row in rows(text)] == [
        "0 0 – 30 43,110 690",
        "0 0 – 2 2,874 46",
        "1 2 – 4 2,874 12",
        "2 4 – 30 37,362 52",
    ]
    assert (
        "Batches between the bounds may not divide evenly among the ranks. Even would be: "
        "batch.multiple_of=64.\n"
    ) in text


def test_growth_that_cannot_come_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "batch.growth={policy: plateau, dwell: 20ep}")
    assert (
        "(policy plateau), but nothing that could grow the batch is decided within the run.\n"
    ) in text
    assert len(rows(text)) == 1
    assert "evenly" not in text


def test_a_recipe_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    paper = (
        "paper={source: 'A and B 2017', place: 'Table 1, row [3]', printed: ["
        "{metric: accuracy, value: 0.73}, {metric: error, below: 0.01, note: of a run}, "
        "{metric: curve}]}"
    )
    assert (
        "Recipe: A and B 2017, Table 1, row [3]; printed there: accuracy 0.73; "
        "error below 0.01 (of a run); curve.\n"
    ) in table(capsys, paper)
    assert "Recipe: A, p. 1.\n" in table(capsys, "paper={source: A, place: p. 1}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.yaml"], "harness: gone.yaml: no such file"),
        ([str(ROOT)], "cannot be read: Is a directory"),
        ([str(DEMO), "batch.intial=1"], "did you mean 'initial'?"),
        ([str(DEMO), "batch.initial=-1"], "batch.initial: must be at least 1, not -1"),
        ([str(DEMO), "batch.micro=65"], "batch.micro = 65 is more than batch.initial = 64"),
        (
            [str(DEMO), "batch.growth.factor=0.5"],
            "batch.growth.factor: must be at least 1, not 0.5",
        ),
        ([str(DEMO), "data.dataset=cifar"], "not known (did you mean cifar10?); valid: digits, "),
        ([str(DEMO), "lr.on_growth=1e20"], "the learning rate is past 3.4e38 in stage 2"),
        ([str(DEMO), "train.duration=100sa"], "lr.warmup.duration = 2ep is longer than"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_bad_input_is_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, form: list[str]
) -> None:
    assert main(["plan", *arguments, *form]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("harness: ")
    assert captured.err.count("\n") == 1


def test_a_list_is_no_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- name: x\n")
    assert main(["plan", str(tmp_path / "list.yaml")]) == 2
    assert "is a mapping of keys, but found a list" in capsys.readouterr().err


@pytest.mark.smoke
def test_a_closed_standard_output_is_no_error() -> None:
    command = shlex.join([sys.executable, "-m", "harness", "plan", str(DEMO)])
    done = subprocess.run(
        ["sh", "-c", f"exec {command} >&-"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
