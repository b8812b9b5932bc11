"""The plan against a run's updates one by one, and ``harness plan`` as its readers see it."""

from __future__ import annotations

import io
import json
from itertools import groupby, pairwise
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support import ROOT

from harness.cli import main
from harness.config import Batch, Config, Ranks
from harness.errors import ConfigError
from harness.schedule import plan as planning
from harness.schedule.clock import Clock, Limit, step, update_size
from harness.schedule.growth import BatchDecision, StageScheduler, growth_policy
from harness.schedule.plan import Plan, build_plan, decompose, ranks_for, run_end
from harness.schedule.rates import Rates, rate_schedule
from harness.schedule.table import print_plan

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


@st.composite
def configs(draw: st.DrawFn) -> Config:
    initial = draw(st.integers(1, 150))
    growth = draw(
        st.just({"policy": "fixed"})
        | st.builds(geometric, PERIODS, st.sampled_from([1.0, 1.01, 1.1, 1.5, 2.0, 3.0]))
    )
    lr = draw(
        st.fixed_dictionaries(
            {"base": st.just(0.1), "scaling": st.sampled_from(["linear", "sqrt", "none"])},
            optional={
                "on_growth": st.sampled_from([0.5, 1.0, 1.25]),
                "decay": st.sampled_from(
                    [{"kind": "none"}, {"kind": "poly"}, {"kind": "step", "every": "1ep"}]
                ),
            },
        )
    )
    batch = {
        "initial": initial,
        "micro": draw(st.integers(1, initial)),
        "max": draw(st.none() | st.integers(initial, 4 * initial)),
        "growth": growth,
        "epoch_end": draw(st.sampled_from(["short", "carry"])),
    }
    ranks = {
        "max": draw(st.integers(1, 5)),
        "prefer": draw(st.sampled_from(["ranks", "accumulation"])),
    }
    return config(batch=batch, lr=lr, ranks=ranks, train={"duration": draw(DURATIONS)})


Update = tuple[Clock, int, BatchDecision, Rates]


def walk(config: Config, size: int) -> list[Update]:
    """Every update of a run as the trainer takes it: where it starts, its size, batch and rates."""
    end = run_end(config, size)
    scheduler = StageScheduler(
        growth_policy(config.batch.initial, config.batch.growth), config.batch.max
    )
    rates = rate_schedule(config)
    clock, updates = Clock(0, 0, size), []
    while not end.reached(clock):
        decision = scheduler.decide(clock)
        taken = update_size(clock, decision.batch, config.batch.epoch_end, end)
        updates.append((clock, taken, decision, rates.at(clock, decision)))
        clock = step(clock, taken)
    return updates


@given(configs(), st.integers(1, 200))
def test_the_plan_is_what_the_updates_do(config: Config, size: int) -> None:
    plan, updates = build_plan(config, size), walk(config, size)
    stages = [list(group) for _, group in groupby(updates, key=lambda update: update[2].stage)]
    assert [row.stage for row in plan.stages] == [group[0][2].stage for group in stages]
    for row, group in zip(plan.stages, stages, strict=True):
        (first, _, decision, rates), (last, size_of_last, _, last_rates) = group[0], group[-1]
        assert row.updates == len(group)
        assert row.global_batch == decision.batch
        assert (row.start_sample, row.end_sample) == (first.samples, last.samples + size_of_last)
        assert (row.start_epoch, row.end_epoch) == (first.epoch, row.end_sample / size)
        assert (row.lr_start, row.lr_end) == (rates.lr, last_rates.lr)
        assert row.momentum == rates.momentum
        assert row.reason == decision.reason


@given(configs(), st.integers(1, 200))
def test_a_plan_follows_the_laws(config: Config, size: int) -> None:
    plan = build_plan(config, size)
    assert plan.stages[0].start_sample == 0
    assert [row.stage for row in plan.stages] == list(range(len(plan.stages)))
    for before, after in pairwise(plan.stages):
        assert before.end_sample == after.start_sample
        assert before.global_batch < after.global_batch
        assert after.segment - before.segment == (after.ranks > before.ranks)
        assert before.ranks <= after.ranks
    for row in plan.stages:
        assert row.updates >= 1
        assert row.global_batch <= (config.batch.max or row.global_batch)
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
    if config.batch.growth.policy == "fixed":
        assert totals["updates_at_initial_batch"] == totals["updates"]


@given(configs(), st.integers(1, 200), st.integers(1, 7))
def test_given_ranks_hold_from_start_to_end_and_change_nothing_else(
    config: Config, size: int, ranks: int
) -> None:
    given_ranks, free = build_plan(config, size, ranks), build_plan(config, size)
    assert {(row.ranks, row.segment) for row in given_ranks.stages} == {(ranks, 0)}
    for fixed, row in zip(given_ranks.stages, free.stages, strict=True):
        assert fixed.updates == row.updates
        assert fixed.global_batch == row.global_batch
        assert (fixed.lr_start, fixed.lr_end) == (row.lr_start, row.lr_end)


@pytest.mark.parametrize("epoch_end", ["short", "carry"])
@pytest.mark.parametrize("growth", [geometric("5ep"), geometric("1ep", 1.001), geometric("1sa")])
def test_ninety_epochs_of_a_billion_samples_cost_no_more_than_their_stages(
    monkeypatch: pytest.MonkeyPatch, epoch_end: str, growth: dict[str, Any]
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
    plan = build_plan(config(batch=batch, train={"duration": "90ep"}), 10**9)
    assert plan.stages[-1].end_sample == 90 * 10**9
    assert sum(row.updates for row in plan.stages) > 5 * 10**4
    assert all(count <= 3 * len(plan.stages) + 10 for count in calls.values())
    assert len(calls) == 5
    assert len(plan.stages) <= 90


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
     ("2000sa", "2ep", False), ("5up", "1ep", False), ("9ep", "5up", False)],
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


def test_the_table_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys)
    rows = [line.split() for line in text.splitlines() if line.lstrip()[:1].isdigit()]
    assert [" ".join(row) for row in rows] == [
        "0 0 – 5 115 64 2 × 1 × 32 0.001 → 0.01 0.9",
        "1 5 – 10 60 128 2 × 2 × 32 0.014 0.9",
        "2 10 – 15 30 256 2 × 4 × 32 0.0196 0.9",
        "3 15 – 20 15 512 2 × 8 × 32 0.02744 0.9",
        "4 20 – 30 20 1,024 2 × 16 × 32 0.038416 → 0.019208 0.9",
        "43,110 samples in 240 updates; a global batch of 64 throughout would take 690 (2.9 ×).",
    ]
    assert "adabatch-digits: lenet5 on digits" in text
    assert "idle" not in text


def test_the_table_shows_idle_ranks_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "batch.micro=30")
    assert "46.7%" in text  # 64 in micro-batches of 30 are 3 for 2 ranks: 2 × 2 × 30 = 120
    assert "idle: share of rank-time" in text


def test_a_name_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a[/b] [red]c: lenet5" in table(capsys, "name='a[/b] [red]c'")


def test_the_table_fits_a_narrow_terminal() -> None:
    plan = build_plan(config(batch={"initial": 64, "growth": geometric("0.3ep")}), 1437)
    stream = io.StringIO()
    print_plan(config(), plan, Console(file=stream, width=80))
    rows = [line for line in stream.getvalue().splitlines() if " × 32 " in line]
    assert len(rows) == len(plan.stages)
    assert all(len(line) <= 80 for line in rows)


def test_a_thousand_stages_are_printed() -> None:
    row = build_plan(config(), 1437).stages[0]
    stream = io.StringIO()
    print_plan(config(), Plan((row,) * 1000, 1437, 1000), Console(file=stream, width=80))
    assert stream.getvalue().count("1 × 2 × 32") == 1000


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
        ([str(DEMO), "data.dataset=cifar"], "unknown data set 'cifar'; valid: digits, mnist"),
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
