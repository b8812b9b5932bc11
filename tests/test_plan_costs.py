"""What a plan costs, against runs walked update by update; and ``harness plan --throughput``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support import ROOT

from harness.cli import main
from harness.config import dump_config, load_config
from harness.errors import DataError
from harness.schedule.clock import Clock, step, update_size
from harness.schedule.configured import stage_scheduler
from harness.schedule.costs import (
    Cost,
    PlanCost,
    Throughput,
    UpdateTimes,
    always_even,
    even_settings,
    idle_share,
    price,
    read_throughput,
    total_cost,
)
from harness.schedule.plan import Plan, build_plan, decompose, run_end
from harness.schedule.table import data_size, duration, print_plan
from harness.schema import Config

DEMO = ROOT / "configs" / "adabatch-digits.yaml"

Line = dict[str, Any]


def demo(*overrides: str) -> Config:
    return load_config(DEMO, overrides)


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


def line(seconds: float, **fields: Any) -> Line:
    """A window of ten full updates on 2 × 1 × 32, each of which took so long."""
    found: Line = {"ranks": 2, "accumulation": 1, "micro_batch": 32, "global_batch": 64} | fields
    return found | {"images_per_sec": fields.get("images_per_sec", found["global_batch"] / seconds)}


def accumulated(seconds: float, accumulation: int, **fields: Any) -> Line:
    return line(seconds, accumulation=accumulation, global_batch=64 * accumulation, **fields)


def written(folder: Path, lines: Iterable[Line | str]) -> Path:
    path = folder / "throughput.jsonl"
    text = (one if isinstance(one, str) else json.dumps(one) for one in lines)
    path.write_text("".join(f"{one}\n" for one in text), encoding="utf-8")
    return path


def read(folder: Path, *lines: Line | str) -> Throughput:
    return read_throughput(written(folder, lines))


def timed(found: Throughput, ranks: int, accumulation: int, micro: int = 32) -> Any:
    return found.seconds(ranks, accumulation, micro)


# Times of single updates


def test_the_very_decomposition_is_measured(tmp_path: Path) -> None:
    lines = [accumulated(t, 4) for t in (9.0, 0.2, 0.4, 0.3)]
    found = read(tmp_path, *lines)
    assert timed(found, 2, 4) == (pytest.approx(0.3), "measured")  # 9.0 is the warm-up


def test_the_first_line_counts_if_there_is_no_other(tmp_path: Path) -> None:
    found = read(tmp_path, accumulated(0.5, 1), accumulated(1.0, 4), accumulated(3.0, 4))
    assert timed(found, 2, 1) == (pytest.approx(0.5), "measured")
    assert timed(found, 2, 4) == (pytest.approx(2.0), "measured")


def test_one_accumulation_is_scaled(tmp_path: Path) -> None:
    found = read(tmp_path, accumulated(0.8, 4))
    assert timed(found, 2, 1) == (pytest.approx(0.2), "scaled")
    assert timed(found, 2, 6) == (pytest.approx(1.2), "scaled")


def test_two_accumulations_are_fitted(tmp_path: Path) -> None:
    found = read(tmp_path, accumulated(0.3, 1), accumulated(0.9, 4))
    assert timed(found, 2, 2) == (pytest.approx(0.1 + 2 * 0.2), "fitted")
    assert timed(found, 2, 4) == (pytest.approx(0.9), "measured")


@pytest.mark.parametrize(
    ("one", "four", "eight"),
    [(0.5, 0.2, 0.35), (0.1, 0.8, 8 * (0.1 + 4 * 0.8) / 17)],
    ids=["faster with more: constant", "below zero at none: proportional"],
)
def test_neither_part_of_a_fitted_time_is_negative(
    tmp_path: Path, one: float, four: float, eight: float
) -> None:
    found = read(tmp_path, accumulated(one, 1), accumulated(four, 4))
    assert timed(found, 2, 8) == (pytest.approx(eight), "fitted")


def test_nothing_is_carried_over_to_other_ranks_or_micro_batches(tmp_path: Path) -> None:
    found = read(tmp_path, accumulated(0.3, 1), accumulated(0.9, 4), line(0.2, ranks=4))
    assert found.seconds(3, 1, 32) is None
    assert found.seconds(1, 1, 32) is None
    assert found.seconds(2, 1, 16) is None
    assert timed(found, 4, 2) == (pytest.approx(0.4), "scaled")


def test_two_accumulations_with_the_same_mean_are_no_line(tmp_path: Path) -> None:
    """Eight micro-batches are full, but the only such update was a short one of six."""
    first = line(6.0, ranks=1, micro_batch=4, accumulation=6, global_batch=21)
    second = {**first, "accumulation": 8, "global_batch": 30, "images_per_sec": 23 / 6.0}
    found = read(
        tmp_path,
        first | {"update": 1, "samples_seen": 21},
        first | {"update": 2, "samples_seen": 42},
        second | {"update": 3, "samples_seen": 65},
    )
    assert timed(found, 1, 8, 4) == (pytest.approx(8.0), "measured")
    assert timed(found, 1, 2, 4) == (pytest.approx(2.0), "scaled")


SECONDS = st.floats(1e-6, 1e4)


@given(st.dictionaries(st.integers(1, 64), SECONDS, min_size=1, max_size=6))
def test_more_accumulation_never_takes_less_time_than_was_not_measured(
    tmp_path_factory: pytest.TempPathFactory, measured: dict[int, float]
) -> None:
    found = read(
        tmp_path_factory.mktemp("x"), *(accumulated(t, a) for a, t in measured.items())
    ).times[2, 32]
    others = [found.at(a)[0] for a in range(1, 130) if a not in measured]
    assert others == sorted(others)
    assert all(time > 0 for time in others)
    assert {found.at(a)[1] for a in range(1, 130)} - {"measured"} == {
        "scaled" if len(measured) == 1 else "fitted"
    }
    for accumulation, seconds in measured.items():
        again: Any = found.at(accumulation)
        assert again == (pytest.approx(seconds), "measured")


@given(
    st.floats(0, 10),
    st.floats(1e-3, 10),
    st.lists(st.integers(1, 64), min_size=2, max_size=6, unique=True),
)
def test_a_straight_line_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, fixed: float, per_micro: float, measured: list[int]
) -> None:
    lines = [accumulated(fixed + a * per_micro, a) for a in measured]
    found = read(tmp_path_factory.mktemp("x"), *lines)
    for accumulation in range(1, 130):
        seconds, _ = timed(found, 2, accumulation)
        assert seconds == pytest.approx(fixed + accumulation * per_micro, rel=1e-6)


# Bytes


def test_bytes_per_update_come_from_differences(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        line(1.0, update=10, comm_bytes=99_999),  # of how many updates is not known
        line(1.0, update=20, comm_bytes=1_000),
        line(1.0, update=23, comm_bytes=300),
        line(1.0, update=24, comm_bytes=None),
        line(1.0, update=25, comm_bytes=170),
    )
    assert found.bytes_per_update == 100


@pytest.mark.parametrize(
    "second",
    [
        {"update": 9, "comm_bytes": 5},
        {"update": 20, "samples_seen": 320, "comm_bytes": 5},
        {"update": 20},
        {"comm_bytes": 5},
        {"update": None, "comm_bytes": 5},
    ],
)
def test_bytes_that_cannot_be_known_are_unknown(tmp_path: Path, second: Line) -> None:
    first = line(1.0, update=10, samples_seen=640, comm_bytes=50)
    assert read(tmp_path, first, line(1.0, **second)).bytes_per_update is None


def test_bytes_of_several_ranks_go_before_those_of_one(tmp_path: Path) -> None:
    alone = [line(1.0, ranks=1, update=n, comm_bytes=8) for n in (1, 2, 3)]
    assert read(tmp_path, *alone).bytes_per_update == 8
    assert read(tmp_path, *alone, line(1.0, update=4, comm_bytes=4)).bytes_per_update == 4


# Stages and totals


def steady(seconds: float = 0.5, sent: float | None = 1000.0, *ranks: int) -> Throughput:
    """Every accumulation from 1 on takes so many seconds per micro-batch."""
    times = {(n, 32): UpdateTimes({}, 0.0, seconds, "fitted") for n in ranks or (2,)}
    return Throughput(times, sent)


def test_short_updates_take_their_own_time() -> None:
    made = config(
        batch={"initial": 512, "micro": 32}, ranks={"start": 2}, train={"duration": "3ep"}
    )
    (cost,) = price(made, build_plan(made, 1437), steady()).stages
    # 1437 = 2 × 512 + 413; 413 are 13 micro-batches, 7 on the busier rank
    assert cost.seconds == pytest.approx(3 * (2 * 8 + 7) * 0.5)
    assert cost.bytes_sent == 9 * 2 * 1000


@pytest.mark.parametrize(("per_node", "nodes"), [(None, 1), (1, 4), (3, 2), (4, 1), (8, 1)])
def test_node_hours_count_whole_nodes(per_node: int | None, nodes: int) -> None:
    made = config(batch={"initial": 128, "micro": 32}, ranks={"start": 4, "per_node": per_node})
    total = price(made, build_plan(made, 1280), steady(1.8, None, 4)).total
    assert total.seconds == pytest.approx(36)
    assert total.node_hours == pytest.approx(0.01 * nodes)
    assert total.bytes_sent is None


def test_what_is_unknown_of_one_stage_is_unknown_of_the_whole() -> None:
    made = demo("ranks.max=4")
    cost = price(made, build_plan(made, 1437), steady(0.5, 1000.0, 2))
    assert [one.seconds is None for one in cost.stages] == [False, True, True, True, True]
    assert [one.node_hours is None for one in cost.stages] == [False, True, True, True, True]
    assert (cost.total.seconds, cost.total.seconds_basis) == (None, None)
    assert (cost.total.node_hours, cost.total.idle_seconds) == (None, None)
    # 2 ranks for 115 updates, then 4 for 60, 30, 15 and 20
    assert cost.total.bytes_sent == 1000 * (2 * 115 + 4 * 125)


def test_a_sum_is_as_good_as_its_weakest_part() -> None:
    costs = [Cost(1.0, basis, 0.5, 10, 0.25) for basis in ("measured", "scaled", "fitted")]
    assert total_cost(costs) == Cost(3.0, "scaled", 1.5, 30, 0.75)


def test_seconds_lost_are_the_idle_share() -> None:
    made = config(batch={"initial": 96, "micro": 32}, ranks={"start": 2})
    plan = build_plan(made, 960)
    total = price(made, plan, steady(0.5)).total
    assert total.seconds == pytest.approx(20)
    assert total.idle_seconds == pytest.approx(5)  # 3 micro-batches in 2 × 2 places
    assert idle_share(plan) == pytest.approx(0.25)


def test_growth_from_measurements_has_the_costs_of_its_bounds() -> None:
    made = demo("batch.growth={policy: loss, limit: 2}")
    plan = build_plan(made, 1437)
    cost = price(made, plan, steady())
    assert cost.fastest is not None
    assert plan.fastest is not None
    assert cost.fastest == price(made, plan.fastest, steady())
    priced = cost.as_dict(plan)
    assert priced["fastest"]["totals"]["seconds"] == cost.fastest.total.seconds
    assert priced["totals"]["bytes_sent"] == 690 * 2 * 1000


@st.composite
def configs(draw: st.DrawFn) -> Config:
    initial = draw(st.integers(1, 100))
    growth = draw(
        st.just({"policy": "fixed"})
        | st.builds(
            lambda factor, every: {"policy": "geometric", "factor": factor, "every": every},
            st.sampled_from([1.1, 1.5, 2.0, 3.0]),
            st.sampled_from(["1ep", "0.3ep", "7up", "50sa"]),
        )
    )
    return config(
        batch={
            "initial": initial,
            "micro": draw(st.integers(1, initial)),
            "max": draw(st.integers(initial, 8 * initial)),
            "growth": growth,
            "epoch_end": draw(st.sampled_from(["short", "carry"])),
        },
        ranks={
            "start": 1,
            "max": draw(st.integers(1, 4)),
            "per_node": draw(st.none() | st.integers(1, 3)),
        },
        train={
            "duration": draw(st.sampled_from(["1ep", "2.5ep", "4ep", "33up", "300sa"])),
            "log_every": draw(st.integers(1, 6)),
        },
    )


def run(made: Config, size: int, fixed: float, per_micro: float) -> tuple[list[Line], list[float]]:
    """metrics.jsonl of a run in which an update takes fixed + accumulation × per_micro seconds, as
    the trainer writes it; and the seconds that the stages take."""
    ranks = {row.stage: row.ranks for row in build_plan(made, size).stages}
    end, scheduler, clock = run_end(made, size), stage_scheduler(made.batch), Clock(0, 0, size)
    updates: list[tuple[tuple[int, int], int, int, float, Clock]] = []
    while not end.reached(clock):
        decision = scheduler.decide(clock)
        taken = update_size(clock, decision.batch, made.batch.epoch_end, end)
        pieces = decompose(taken, made.batch.micro_batch, ranks[decision.stage])
        epoch = clock.samples // size
        clock = step(clock, taken)
        seconds = fixed + pieces.accumulation * per_micro
        updates.append(((decision.stage, epoch), decision.batch, taken, seconds, clock))
    lines: list[Line] = []
    for (stage, _), group in groupby(updates, key=lambda update: update[0]):
        rows = list(group)
        for begin in range(0, len(rows), made.train.log_every):
            window = rows[begin : begin + made.train.log_every]
            samples, spent = sum(row[2] for row in window), sum(row[3] for row in window)
            pieces = decompose(window[0][1], made.batch.micro_batch, ranks[stage])
            lines.append({
                "update": window[-1][4].updates, "samples_seen": window[-1][4].samples,
                "ranks": pieces.ranks, "accumulation": pieces.accumulation,
                "micro_batch": pieces.micro_batch, "global_batch": window[0][1],
                "images_per_sec": samples / spent, "comm_bytes": 100 * len(window),
            })  # fmt: skip
    times = [
        sum(row[3] for row in group)
        for _, group in groupby(updates, key=lambda update: update[0][0])
    ]
    return lines, times


@given(configs(), st.integers(1, 150), st.floats(0, 5), st.floats(0.01, 5))
def test_a_run_costs_what_its_own_records_say(
    tmp_path_factory: pytest.TempPathFactory,
    made: Config,
    size: int,
    fixed: float,
    per_micro: float,
) -> None:
    """Exactly where a line can be fitted; with one accumulation only, if time follows it."""

    def measured(fixed: float) -> tuple[list[float], Throughput]:
        lines, times = run(made, size, fixed, per_micro)
        # The line before the first one, from which it is known what its window holds.
        start = {**lines[0], "update": 0, "samples_seen": 0, "images_per_sec": None}
        return times, read(tmp_path_factory.mktemp("x"), start, *lines)

    times, throughput = measured(fixed)
    if any(found.otherwise == "scaled" for found in throughput.times.values()):
        times, throughput = measured(0.0)
    plan = build_plan(made, size)
    cost = price(made, plan, throughput)
    assert [one.seconds for one in cost.stages] == pytest.approx(times)
    for found, row in zip(cost.stages, plan.stages, strict=True):
        begin = Clock(row.start_sample, 0, size)
        first = update_size(begin, row.global_batch, made.batch.epoch_end, run_end(made, size))
        assert found.seconds_basis == "measured" or first < row.global_batch
    assert [one.bytes_sent for one in cost.stages] == [
        100 * row.ranks * row.updates for row in plan.stages
    ]


@given(configs(), st.integers(1, 150), st.floats(0.001, 10), st.none() | st.floats(1, 1e9))
def test_totals_are_sums(made: Config, size: int, seconds: float, sent: float | None) -> None:
    plan = build_plan(made, size)
    times = {
        (ranks, made.batch.micro_batch): UpdateTimes({}, 0.1, seconds, "fitted")
        for ranks in range(1, 5)
    }
    cost = price(made, plan, Throughput(times, sent))
    priced = cost.as_dict(plan)
    for key in ("seconds", "node_hours", "idle_seconds"):
        parts = [row[key] for row in priced["stages"]]
        assert priced["totals"][key] == pytest.approx(sum(parts))
        assert all(part >= 0 for part in parts)
    assert priced["totals"]["bytes_sent"] == (
        None if sent is None else sum(row["bytes_sent"] for row in priced["stages"])
    )
    for row in priced["stages"]:
        nodes = ceil(row["ranks"] / (made.ranks.per_node or row["ranks"]))
        assert row["node_hours"] == pytest.approx(row["seconds"] * nodes / 3600)
        assert row["idle_seconds"] == pytest.approx(row["seconds"] * row["idle"])
        most = row["updates"] * (0.1 + row["accumulation"] * seconds)
        assert row["updates"] * 0.1 < row["seconds"] <= most * (1 + 1e-12)


def test_ninety_epochs_of_imagenet_take_no_time_to_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def seconds(found: Throughput, ranks: int, accumulation: int, micro: int) -> Any:
        calls.append(accumulation)
        return found.times[ranks, micro].at(accumulation)

    made = config(
        batch={
            "initial": 256,
            "micro": 32,
            "growth": {"policy": "geometric", "every": "30ep"},
        },
        ranks={"start": 2},
        train={"duration": "90ep"},
    )
    plan = build_plan(made, 1_281_167)
    monkeypatch.setattr(Throughput, "seconds", seconds)
    total = price(made, plan, steady(0.01)).total
    assert len(calls) <= 4 * len(plan.stages)
    assert total.seconds == pytest.approx(90 * 1_281_167 / 64 * 0.01, rel=1e-4)


# Uneven stages


@given(configs(), st.integers(1, 150))
def test_what_is_called_even_is_even(made: Config, size: int) -> None:
    plan = build_plan(made, size)
    assert always_even(made, plan) == (idle_share(plan) == 0)
    assert 0 <= idle_share(plan) < 1
    if not always_even(made, plan):
        for setting in even_settings(made, plan):
            raw = made.model_dump()
            raw["batch"] |= {
                key.removeprefix("batch."): int(value)
                for key, value in (word.split("=") for word in setting.split())
            }
            assert idle_share(build_plan(Config.model_validate(raw), size)) == 0


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["batch.micro=30"], ["batch.initial=60 batch.max=1020", "batch.micro=32"]),
        (
            ["batch.initial=100", "batch.micro=7", "ranks.start=3"],
            ["batch.initial=105 batch.max=1008"],
        ),
        (["batch.growth={policy: linear, rate: 3}"], ["batch.multiple_of=64"]),
        (["batch.growth={policy: noise}"], ["batch.multiple_of=64"]),
        (["batch.micro=15", "ranks.start=1", "ranks.max=4"],
         ["batch.initial=60 batch.max=1020", "batch.micro=16"]),
        (["batch.initial=7", "batch.micro=1", "ranks.start=5"], ["batch.initial=5 batch.max=1020"]),
    ],
)  # fmt: skip
def test_what_would_be_even(overrides: list[str], settings: list[str]) -> None:
    made = demo(*overrides)
    assert even_settings(made, build_plan(made, 1437)) == settings
    for setting in settings:
        changed = demo(*overrides, *setting.split())
        assert always_even(changed, build_plan(changed, 1437))


def test_batches_between_the_bounds_count() -> None:
    made = demo("batch.growth={policy: loss, limit: 2}")
    plan = build_plan(made, 1437)
    assert idle_share(plan) == 0
    assert not always_even(made, plan)
    rounded = demo("batch.growth={policy: loss, limit: 2}", "batch.multiple_of=64")
    assert always_even(rounded, build_plan(rounded, 1437))


# Files that are not as they should be


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "throughput.jsonl: no line tells a throughput; a line is a JSON object with ranks, "),
        ([line(1.0, images_per_sec=None)], "no line tells a throughput"),
        (["nonsense"], "throughput.jsonl:1: not JSON; a line is"),
        (["[1]"], "throughput.jsonl:1: not a JSON object"),
        (["[" * 100_000], "throughput.jsonl:1: not JSON"),
        (["1" * 5000], "throughput.jsonl:1: not JSON"),
        ([line(1.0), '{"ranks": NaN}'], "throughput.jsonl:2: not JSON"),
        ([line(1.0), ""], "throughput.jsonl:2: not JSON"),
        ([line(1.0), {"ranks": 2}], ":2: no accumulation, micro_batch, global_batch, images_per"),
        ([line(1.0, ranks=0)], ":1: ranks must be a whole number from 1 to 2^62, or null, not 0"),
        ([line(1.0, ranks=True)], "ranks must be a whole number from 1 to 2^62, or null, not true"),
        ([line(1.0, accumulation=1.5)], "accumulation must be a whole number"),
        ([line(1.0, micro_batch="32")], 'micro_batch must be a whole number from 1 to 2^62'),
        ([line(1.0, global_batch=-64, images_per_sec=1)], "not -64"),
        ([line(1.0, images_per_sec=0)], "images_per_sec must be a number from 1e-9 to 1e15"),
        ([line(1.0, images_per_sec=1e300)], "not 1e+300"),
        ([line(1.0, images_per_sec=False)], "not false"),
        ([line(1.0, update=-1)], "update must be a whole number from 0"),
        ([line(1.0, comm_bytes="x" * 100)], f'not "{"x" * 39}…'),
        ([line(1.0, comm_bytes=2**63)], "comm_bytes must be"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Line | str], said: str
) -> None:
    path = written(tmp_path, lines)
    with pytest.raises(DataError, match=r"throughput\.jsonl"):
        read_throughput(path)
    assert main(["plan", str(DEMO), "--throughput", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.startswith("harness: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["gone.jsonl", "x" * 300, "."])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read: .*; give a run directory or a file"):
        read_throughput(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(DataError, match="x:1: not JSON"):
        read_throughput(tmp_path / "x")


def test_a_killed_run_may_leave_half_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, [line(0.5)])
    with path.open("a") as file:
        file.write('{"ranks": 2, "accum')
    assert timed(read_throughput(path), 2, 1) == (pytest.approx(0.5), "measured")


def test_a_last_line_needs_no_end(tmp_path: Path) -> None:
    path = written(tmp_path, [line(0.5)])
    path.write_text(path.read_text().rstrip("\n"))
    assert timed(read_throughput(path), 2, 1) == (pytest.approx(0.5), "measured")


# The command


COSTS = {"seconds", "seconds_basis", "node_hours", "bytes_sent"}


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["plan", str(DEMO), *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def measured(folder: Path) -> Path:
    """0.11 s per update and 0.05 s per micro-batch on 2 ranks with micro-batches of 32."""
    steps = [(1, 10), (1, 20), (2, 30), (4, 40)]
    return written(
        folder,
        [accumulated(0.11 + 0.05 * a, a, update=n, comm_bytes=1_000_000) for a, n in steps],
    )


def test_json_has_the_costs_beside_all_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = as_json(capsys)
    priced = as_json(capsys, "--throughput", str(measured(tmp_path)))
    assert not COSTS & plain["totals"].keys()
    for row, cost in zip(plain["stages"], priced["stages"], strict=True):
        assert row.items() <= cost.items()
        assert cost.keys() >= COSTS
    assert plain["totals"].items() <= priced["totals"].items()
    assert priced["totals"].keys() >= COSTS
    assert priced["segments"] == plain["segments"]
    assert [row["seconds_basis"] for row in priced["stages"]] == [
        "measured", "measured", "measured", "fitted", "fitted"
    ]  # fmt: skip
    assert priced["stages"][0]["seconds"] == pytest.approx(115 * 0.16)
    assert priced["stages"][0]["node_hours"] == pytest.approx(115 * 0.16 / 3600)
    assert priced["stages"][0]["bytes_sent"] == 115 * 2 * 100_000
    # In an epoch two updates of 512 samples and one of 413, which are 13 micro-batches.
    assert priced["stages"][3]["seconds"] == pytest.approx(5 * (3 * 0.11 + (8 + 8 + 7) * 0.05))
    assert priced["totals"]["seconds_basis"] == "fitted"


def test_json_has_null_for_what_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    priced = as_json(capsys, "--throughput", str(written(tmp_path, [line(0.5)])), "ranks.max=4")
    assert [row["seconds"] is None for row in priced["stages"]] == [False, True, True, True, True]
    assert priced["totals"]["seconds"] is None
    assert priced["totals"]["node_hours"] is None
    assert priced["totals"]["bytes_sent"] is None


def test_a_run_directory_is_a_throughput_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path).rename(tmp_path / "metrics.jsonl")
    by_file = as_json(capsys, "--throughput", str(tmp_path / "metrics.jsonl"))
    assert as_json(capsys, "--throughput", str(tmp_path)) == by_file


def test_several_throughput_files_are_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What each tells of its own ranks; the median where both tell of the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    paths = [written(one, [line(0.5), line(0.3)]), written(two, [line(0.1), line(0.7)])]
    both = read_throughput(*paths)
    assert timed(both, 2, 1) == (pytest.approx(0.5), "measured")
    options = [word for path in paths for word in ("--throughput", str(path))]
    priced = as_json(capsys, *options, "ranks.max=2")
    alone = as_json(capsys, *options[:2], "ranks.max=2")
    assert priced["stages"][0]["seconds"] == pytest.approx(
        alone["stages"][0]["seconds"] * 0.5 / timed(read_throughput(paths[0]), 2, 1)[0]
    )


def test_measurements_of_another_model_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = measured(tmp_path).rename(tmp_path / "metrics.jsonl")
    made = load_config(DEMO, ["model.name=my:Net", "comm.compression=none"])
    (tmp_path / "config.yaml").write_text(dump_config(made))
    for path in (tmp_path, metrics):
        assert main(["plan", str(DEMO), "--throughput", str(path), "--json"]) == 0
        told = capsys.readouterr().err
        assert "model.name my:Net (this plan: lenet5)" in told
        assert "comm.compression none (this plan: fp16)" in told
    (tmp_path / "config.yaml").write_text(dump_config(load_config(DEMO)))
    assert main(["plan", str(DEMO), "--throughput", str(tmp_path), "--json"]) == 0
    assert capsys.readouterr().err == ""


def printed(
    made: Config, plan: Plan, cost: PlanCost | None, width: int, terminal: bool = False
) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    print_plan(made, plan, console, cost)
    return "\n".join(text.rstrip() for text in stream.getvalue().splitlines())


def test_the_table_with_costs(tmp_path: Path) -> None:
    made = demo("ranks.per_node=1")
    plan = build_plan(made, 1437)
    text = printed(made, plan, price(made, plan, read_throughput(measured(tmp_path))), 100)
    assert text == TABLE


TABLE = """\
                              adabatch-digits: lenet5 on digits

                                 ranks × accum
 stage   epochs  updates  batch        × micro                   lr      time  node-h   sent
 ───────────────────────────────────────────────────────────────────────────────────────────
     0    0 – 5      115     64     2 × 1 × 32         0.001 → 0.01    18.4 s   0.010  23 MB
     1   5 – 10       60    128     2 × 2 × 32                0.014    12.3 s   0.007  12 MB
     2  10 – 15       30    256     2 × 4 × 32               0.0196    9.05 s   0.005   6 MB
     3  15 – 20       15    512     2 × 8 × 32              0.02744   ≈ 7.4 s   0.004   3 MB
     4  20 – 30       20  1,024    2 × 16 × 32  0.038416 → 0.019208  ≈ 13.7 s   0.008   4 MB

Momentum is 0.9 throughout.
A wider terminal has room for samples.
43,110 samples in 240 updates; a global batch of 64 throughout would take 690 (2.9 ×).
≈ 1 min 1 s and 0.034 node-hours for the updates; evaluations, checkpoints and launches come on top.
48 MB sent: what all ranks together hand to the allreduce.
≈ Stages 3 – 4: fitted to other accumulations of the same ranks and micro-batch.
Stage 4 stays at batch.max = 1,024 where the policy asks for more, up to 2,048: the rate is \
multiplied by max/asked instead."""


def test_the_table_says_what_was_not_measured(tmp_path: Path) -> None:
    made = demo("ranks.start=1", "ranks.max=4")
    plan = build_plan(made, 1437)
    text = printed(made, plan, price(made, plan, read_throughput(measured(tmp_path))), 160)
    assert (
        "? Stages 0, 2 – 4: nothing was measured with 1 rank × micro-batch 32, 4 ranks × "
        "micro-batch 32, only with 2 ranks × micro-batch 32." in text
    )
    assert "node-hours" not in text


def test_the_table_says_what_uneven_stages_cost(tmp_path: Path) -> None:
    made = demo("batch.initial=96", "batch.growth={policy: fixed}")
    plan = build_plan(made, 1440)
    cost = price(made, plan, read(tmp_path, line(1.0, accumulation=2, global_batch=96)))
    assert (
        "Stage 0: the micro-batches do not divide evenly among the ranks. 25.0% of the run's "
        "rank-time (1 min 52 s) is spent waiting; idle is a stage's share.\n"
        "Even would be: batch.initial=128, or batch.micro=24."
    ) in printed(made, plan, cost, 160)


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ranks.start=1", "ranks.max=4", "batch.micro=15"],
        ["batch.growth={policy: linear, rate: 3}"],
        ["batch.growth={policy: loss, limit: 2}"],
        ["optimizer.momentum_scaling=smith_le", "lr.max=0.02"],
    ],
)
@pytest.mark.parametrize("costed", [False, True])
def test_tables_fit_terminals(
    tmp_path: Path, width: int, overrides: list[str], costed: bool
) -> None:
    made = demo(*overrides)
    plan = build_plan(made, 1437)
    cost = price(made, plan, read_throughput(measured(tmp_path))) if costed else None
    text = printed(made, plan, cost, width, terminal=True)
    assert max(map(len, text.splitlines())) <= width
    shown = [word for word in text.splitlines() if " × " in word and word.split()[0].isdigit()]
    rows = [*plan.stages, *(plan.fastest.stages if plan.fastest else ())]
    assert len(shown) == min(len(rows), 30)
    assert all("…" not in word for word in shown)
    assert ("sent" in text) == costed


def test_momentum_that_is_left_out_is_said_in_words() -> None:
    made = demo()
    text = printed(made, build_plan(made, 1437), None, 70)
    assert "momentum" not in text
    assert "Momentum is 0.9 throughout.\nA wider terminal has room for samples.\n" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (12.34, "12.3 s"), (59.94, "59.9 s"),
     (59.96, "1 min"), (72.4, "1 min 12 s"), (3599.7, "1 h"), (4320, "1 h 12 min"),
     (86_399, "1 d"), (97_200, "1 d 3 h"), (1e9, "11,574 d 2 h")],
)  # fmt: skip
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (1234, "1.23 kB"), (3.4e9, "3.4 GB"),
     (999_600, "1 MB"), (5e17, "500 PB"), (1.2e18, "1,200 PB")],
)  # fmt: skip
def test_sizes_as_people_say_them(size: float, text: str) -> None:
    assert data_size(size) == text


def test_what_is_no_regular_file_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="/dev/zero: not a regular file"):
        read_throughput(Path("/dev/zero"))
