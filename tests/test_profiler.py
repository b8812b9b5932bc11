"""What is measured beside training: phases on a host and on a (made-up) GPU, the spread over ranks
and who is called a straggler, counters; none of it changes what is trained."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import comparable, config, go, go_on_ranks, model, read, same_weights
from threads import ThreadCommunicator, run_ranks

from harness import phases
from harness.comm import SoloCommunicator
from harness.counters import Counters, memory_peak
from harness.data.datasets import to_device
from harness.phases import DeviceClock, HostClock, copies_marked
from harness.profiler import Profiler
from harness.records import PHASES
from harness.schema import Profile
from harness.spread import (
    SLOW,
    RankTime,
    Slowest,
    Stragglers,
    chance_of,
    least_wait,
    lines_needed,
    slowest,
)
from harness.trainer import Trainer


class Ticking:
    """A clock that stands still unless it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    return Ticking(monkeypatch)


class TestTheHostsClock:
    def test_books_the_time_since_the_last_mark(self, ticking: Ticking) -> None:
        clock = HostClock()
        for phase, seconds in (("data", 1.0), ("forward", 2.0), ("data", 4.0)):
            ticking.spend(seconds)
            clock.mark(phase)
        assert clock.take() == {**dict.fromkeys(PHASES, 0.0), "data": 5.0, "forward": 2.0}
        assert set(clock.take().values()) == {0.0}

    def test_leaves_out_what_lies_before_a_restart(self, ticking: Ticking) -> None:
        clock = HostClock()
        ticking.spend(8.0)
        clock.restart()
        ticking.spend(1.0)
        clock.mark("other")
        assert clock.take()["other"] == 1.0

    def test_a_lap_is_what_was_booked_since_the_last_one(self, ticking: Ticking) -> None:
        clock = HostClock()
        ticking.spend(1.0)
        clock.mark("data")
        assert clock.lap() == 1.0
        clock.take()
        ticking.spend(2.0)
        clock.mark("forward")
        assert (clock.lap(), clock.lap()) == (2.0, 0.0)

    def test_remembers_the_last_waits_one_by_one(self, ticking: Ticking) -> None:
        clock = HostClock()
        for seconds in range(15):
            for phase in ("forward", "comm_exposed"):
                ticking.spend(float(seconds))
                clock.mark(phase)
            clock.take()
        assert list(clock.waits) == [float(seconds) for seconds in range(5, 15)]

    @given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 1000))))
    def test_phases_add_up_to_the_time_that_has_passed(
        self, stretches: list[tuple[str, int]]
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            ticking = Ticking(patch)
            clock = HostClock()
            for phase, seconds in stretches:
                ticking.spend(seconds)
                clock.mark(phase)
            assert sum(clock.take().values()) == clock.lap() == ticking.now


@dataclass
class Stream:
    """A GPU that does what it is given in its own time, and the events on it."""

    done: float = 0.0
    """Milliseconds of work that is finished."""
    given: float = 0.0
    """Milliseconds of work that was handed to it."""
    made: int = 0
    waits: int = 0
    queries: int = 0

    def event(self) -> Recorded:
        self.made += 1
        return Recorded(self)


@dataclass
class Recorded:
    stream: Stream
    at: float = field(default=math.nan)

    def record(self) -> None:
        self.at = self.stream.given

    def query(self) -> bool:
        self.stream.queries += 1
        return self.stream.done >= self.at

    def synchronize(self) -> None:
        self.stream.waits += 1
        self.stream.done = max(self.stream.done, self.at)

    def elapsed_time(self, end_event: Recorded, /) -> float:
        # As CUDA has it: an event that is not complete has no time.
        assert self.stream.done >= max(self.at, end_event.at), "cudaErrorNotReady"
        return end_event.at - self.at


class TestTheGpusClock:
    def test_books_what_the_stream_spends_between_marks(self) -> None:
        stream = Stream()
        clock = DeviceClock(stream.event)
        for phase, milliseconds in (("data", 1.0), ("forward", 2.0), ("data", 4.0)):
            stream.given += milliseconds
            clock.mark(phase)
        taken = clock.take()
        assert (taken["data"], taken["forward"]) == (5e-3, 2e-3)
        assert set(clock.take().values()) == {0.0}

    def test_waits_for_nothing_but_a_take(self) -> None:
        stream = Stream()
        clock = DeviceClock(stream.event)
        for _ in range(100):
            stream.given += 1.0
            clock.mark("forward")
        assert stream.waits == 0
        clock.take()
        assert stream.waits == 1

    def test_leaves_out_what_lies_before_a_restart(self) -> None:
        stream = Stream()
        clock = DeviceClock(stream.event)
        stream.given += 8.0
        clock.restart()
        stream.given += 1.0
        clock.mark("other")
        stream.given += 16.0
        clock.restart()
        assert clock.take() == {**dict.fromkeys(PHASES, 0.0), "other": 1e-3}

    def test_remembers_the_last_waits_once_they_are_known(self) -> None:
        stream = Stream()
        clock = DeviceClock(stream.event)
        for milliseconds in (1.0, 2.0):
            stream.given += milliseconds
            clock.mark("comm_exposed")
        assert list(clock.waits) == []
        clock.take()
        assert list(clock.waits) == [1e-3, 2e-3]

    def test_a_lap_is_the_hosts(self, ticking: Ticking) -> None:
        stream = Stream()
        clock = DeviceClock(stream.event)
        ticking.spend(2.0)
        stream.given += 7.0
        clock.mark("forward")
        assert clock.lap() == 2.0
        assert clock.take()["forward"] == 7e-3

    @pytest.mark.parametrize("keeps_up", [True, False])
    def test_a_long_line_holds_few_events_if_the_stream_keeps_up(self, keeps_up: bool) -> None:
        stream = Stream()
        clock = DeviceClock(stream.event)
        for _ in range(5000):
            stream.given += 1.0
            if keeps_up:
                stream.done = stream.given
            clock.mark("forward")
        assert stream.waits == 0
        assert (stream.made < 1100) == keeps_up
        assert clock.take()["forward"] == pytest.approx(5.0)

    @given(
        st.lists(
            st.tuples(st.sampled_from([*PHASES, "restart", "take"]), st.integers(0, 9)),
            max_size=60,
        ),
        st.integers(1, 8),
    )
    def test_phases_add_up_to_what_the_stream_did(
        self, steps: list[tuple[str, int]], held: int
    ) -> None:
        stream, expected, booked = Stream(), 0, 0.0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(phases, "_HELD", held)
            clock = DeviceClock(stream.event)
            before = 0
            for step, milliseconds in steps:
                stream.given += milliseconds
                before += milliseconds
                stream.done = max(stream.done, stream.given - 5)
                if step == "restart":
                    clock.restart()
                    before = 0
                elif step == "take":
                    booked += sum(clock.take().values())
                else:
                    clock.mark(step)
                    expected += before
                    before = 0
            booked += sum(clock.take().values())
        assert booked * 1e3 == pytest.approx(expected)


class TestCopiesToADevice:
    def test_are_told_from_the_data_around_them(self, ticking: Ticking) -> None:
        clock = HostClock()
        with copies_marked(clock):
            ticking.spend(1.0)
            copied = to_device(torch.zeros(3), torch.device("meta"))
        clock.mark("data")
        assert copied.device.type == "meta"
        assert clock.log is None
        assert clock.take()["data"] == 1.0

    def test_are_marked(self, ticking: Ticking) -> None:
        clock = HostClock()
        clock.log = []
        with copies_marked(clock):
            to_device(torch.zeros(3), torch.device("meta"))
            to_device(torch.zeros(3), torch.device("cpu"))  # which is none
        to_device(torch.zeros(3), torch.device("meta"))  # as in evaluation
        assert [phase for phase, _, _ in clock.log] == ["data", "to_device"]


def ranks(*seconds: dict[str, float], samples: int = 8, micro_batches: int = 2) -> list[RankTime]:
    busy = dict.fromkeys((p for p in PHASES if p != "comm_exposed"), 1.0)
    return [RankTime({**busy, **own}, samples, micro_batches) for own in seconds]


class TestTheSlowestRank:
    def test_is_named_with_the_phase_in_which_it_loses(self) -> None:
        worst = slowest(ranks({}, {"data": 4.0, "optimizer": 0.5}, {"forward": 2.0}))
        assert (worst.rank, worst.phase) == (1, "data")
        assert worst.seconds == pytest.approx(8.5 - 6.5)
        assert worst.ratio == pytest.approx(8.5 / 6.5)

    def test_of_two_it_is_set_against_the_other(self) -> None:
        worst = slowest(ranks({"backward": 7.0}, {}))
        assert (worst.rank, worst.phase, worst.ratio) == (0, "backward", 2.0)

    def test_a_rank_with_more_to_do_is_not_slow(self) -> None:
        heavy = RankTime({"forward": 2.0}, samples=64, micro_batches=2)
        light = RankTime({"forward": 1.1}, samples=32, micro_batches=1)
        assert slowest([heavy, light]).rank == 0
        assert slowest([heavy, light]).ratio < 1

    def test_a_rank_whose_pieces_are_larger_is_not_slow(self) -> None:
        whole = RankTime({"forward": 1.0}, samples=32, micro_batches=1)
        rest = RankTime({"forward": 0.2}, samples=2, micro_batches=1)
        assert slowest([whole, rest]).ratio < 1

    def test_a_rank_that_never_had_work_tells_nothing(self) -> None:
        idle = RankTime({"forward": 0.1}, samples=0, micro_batches=0)
        assert slowest([idle, RankTime({"forward": 1.0}, 8, 1)]).ratio == 0

    @given(st.lists(st.floats(0.01, 100), min_size=2, max_size=9))
    def test_is_the_one_that_is_busy_for_longest(self, times: list[float]) -> None:
        worst = slowest([RankTime({"forward": time}, 4, 1) for time in times])
        assert times[worst.rank] == max(times)
        assert worst.seconds >= 0
        assert worst.ratio >= 1
        others = [*times[: worst.rank], *times[worst.rank + 1 :]]
        assert worst.ratio == pytest.approx(max(times) / median(others))


class TestTheLeastWait:
    def test_is_that_of_whoever_comes_last_in_each_update(self) -> None:
        by_turns = [[0.01, 0.31, 0.01], [0.21, 0.01, 0.41]]
        assert least_wait(by_turns) == pytest.approx(0.01)

    def test_is_told_of_updates_that_all_ranks_know(self) -> None:
        assert least_wait([[math.nan, 2.0, 3.0], [1.0, 4.0, 1.0]]) == 1.5
        assert least_wait([[math.nan], [1.0]]) is None
        assert least_wait([[], []]) is None

    @given(st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=5))
    def test_is_no_more_than_any_rank_s_mean(self, waits: list[list[float]]) -> None:
        least = least_wait(waits)
        assert least is not None
        assert all(least <= sum(one) / 4 + 1e-9 for one in waits)


class TestTheChanceOfLot:
    @given(st.integers(1, 40), st.integers(2, 9))
    def test_is_the_binomial_tail_times_the_ranks(self, lines: int, count: int) -> None:
        for times in range(lines + 1):
            ways = [
                math.comb(lines, k) * (count - 1) ** (lines - k) for k in range(times, lines + 1)
            ]
            expected = min(1.0, count * sum(ways) / count**lines)
            assert chance_of(times, lines, count) == pytest.approx(expected, rel=1e-6)

    @given(st.integers(2, 5000))
    def test_of_all_lines_is_what_makes_a_straggler(self, count: int) -> None:
        needed = lines_needed(count)
        assert chance_of(needed, needed, count) == pytest.approx(count ** (1.0 - needed), rel=1e-6)

    def test_can_be_told_of_a_long_run(self) -> None:
        assert chance_of(50_000, 100_000, 2) == 1.0
        assert chance_of(51_000, 100_000, 2) < 1e-8
        assert chance_of(100_000, 100_000, 2) == 0.0


class TestStragglers:
    @given(st.integers(2, 5000))
    def test_chance_alone_seldom_makes_one(self, count: int) -> None:
        needed = lines_needed(count)
        assert needed >= 3
        assert count ** (1 - needed) <= 0.01
        assert needed == 3 or count ** (2 - needed) > 0.01

    def slow(self, rank: int, ratio: float = 1.5, phase: str = "data") -> Slowest:
        return Slowest(rank, phase, ratio, seconds=0.2)

    def test_are_told_once_after_as_many_lines_as_it_takes(self) -> None:
        watch = Stragglers()
        told = [watch.observe(self.slow(3), 4, 10) for _ in range(20)]
        assert [line for line, one in enumerate(told, 1) if one] == [lines_needed(4)]
        (one,) = filter(None, told)
        assert (one.rank, one.phase, one.ratio, one.updates) == (3, "data", 1.5, 50)
        assert one.seconds_per_update == pytest.approx(0.02)

    @pytest.mark.parametrize("break_", [("another", 2, 1.5), ("not slow", 3, SLOW)])
    def test_must_be_slow_without_a_break(self, break_: tuple[str, int, float]) -> None:
        _, rank, ratio = break_
        watch = Stragglers()
        needed = lines_needed(4)
        for line in range(needed * 4):
            broken = line % needed == needed - 1
            one = self.slow(rank, ratio) if broken else self.slow(3)
            assert watch.observe(one, 4, 10) is None

    def test_are_told_again_after_a_break(self) -> None:
        watch = Stragglers()
        pattern = [*[self.slow(0)] * 9, self.slow(0, ratio=1.0), *[self.slow(1)] * 9]
        told = [watch.observe(one, 2, 10) for one in pattern]
        assert [one.rank for one in told if one] == [0, 1]

    def test_lose_in_the_phase_that_has_cost_most(self) -> None:
        watch = Stragglers()
        lines = [Slowest(0, "forward", 1.5, 0.1)] * 6 + [Slowest(0, "data", 1.5, 9.0)] * 2
        told = [watch.observe(one, 2, 10) for one in lines]
        assert told[-1] is not None
        assert told[-1].phase == "data"


class Slowed(HostClock):
    """A clock by which every rank's updates take as long as it is told."""

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self._own = seconds

    def take(self) -> dict[str, float]:
        super().take()
        return {**dict.fromkeys(PHASES, 0.0), **self._own}


def facts(comm: ThreadCommunicator, updates: int, **settings: bool) -> Any:
    profiler = Profiler(Profile(**settings), comm, Path("unused"))
    slow = {"forward": 1.0 + comm.rank, "comm_exposed": 9.0 - comm.rank}
    profiler.clock = Slowed(slow)
    profiler.clock.waits.extend(1.0 if i == comm.rank else 5.0 for i in range(10))
    told = []
    for update in range(1, 31):
        profiler.begin(update)
        profiler.worked(4)
        profiler.end(update)
        if update % updates == 0:
            profiler.take()
            told.append(profiler.facts())
    return told


class TestTheLine:
    def test_compares_the_ranks_and_names_their_slowest(self) -> None:
        lines = run_ranks(3, lambda comm: facts(comm, 10))
        assert [[line.fields["rank_seconds"] for line in rank] for rank in lines[1:]] == [
            [line.fields["rank_seconds"] for line in lines[0]]
        ] * 2
        told = lines[0][0].fields
        assert told["rank_seconds"] == {
            "busy_max": 3.0,
            "busy_median": 2.0,
            "slowest_rank": 2,
            "slowest_host": told["rank_seconds"]["slowest_host"],
            "phase": "forward",
            "ratio": pytest.approx(2.0),
            "updates": 10,
            "wait_least": 3.8,
        }
        assert told["memory_peak_bytes"] > 2**20

    def test_covers_the_updates_since_it_was_told_last_where_lines_are_short(self) -> None:
        lines = run_ranks(2, lambda comm: facts(comm, 4))[0]
        told = [line.fields["rank_seconds"] for line in lines]
        assert [one and one["updates"] for one in told] == [None, None, 12, None, None, 12, None]
        assert told[2]["busy_max"] == 6.0

    def test_one_rank_has_nobody_to_be_compared_with(self) -> None:
        profiler = Profiler(Profile(), SoloCommunicator(), Path("unused"))
        for update in range(10):
            profiler.end(update)
        profiler.take()
        told = profiler.facts()
        assert told.fields["rank_seconds"] is None
        assert told.fields["memory_peak_bytes"] > 0
        assert told.straggler is None

    def test_is_empty_and_costs_no_collective_where_it_is_switched_off(self) -> None:
        def act(comm: ThreadCommunicator) -> tuple[Any, list[str]]:
            return facts(comm, 10, enabled=False), comm.calls

        for lines, calls in run_ranks(2, act):
            assert "profile" not in calls
            for line in lines:
                assert set(line.fields.values()) == {None}
                assert line.straggler is None

    def test_a_rank_that_stays_slow_is_an_event(self) -> None:
        told = run_ranks(4, lambda comm: facts(comm, 10))[0]
        assert [line.straggler for line in told] == [None] * 3  # 4 ranks need 5 lines
        more = run_ranks(16, lambda comm: facts(comm, 10))[0]
        (event,) = [line.straggler for line in more if line.straggler]
        assert (event["rank"], event["phase"], event["updates"]) == (15, "forward", 30)
        assert event["ratio"] == pytest.approx(16 / 8)
        assert event["seconds_per_update"] == pytest.approx(0.8)


class TestCounters:
    def test_are_read_once_a_second(self, ticking: Ticking) -> None:
        counters = Counters(torch.device("cpu"))
        ticking.spend(0.9)
        assert counters.read() is None
        ticking.spend(0.2)
        reading = counters.read()
        assert reading is not None
        assert counters.read() is None
        assert reading["seconds"] == pytest.approx(1.1)
        assert 0 <= reading["cpu_percent"] <= 100
        assert reading["rss_bytes"] > 2**20
        assert min(reading["net_sent_bytes"], reading["net_received_bytes"]) >= 0
        assert reading["gpu_percent"] is reading["gpu_memory_bytes"] is None
        json.dumps(reading)

    @pytest.mark.parametrize("missing", [None, ImportError(), LookupError("not supported")])
    def test_of_a_gpu_are_null_where_it_does_not_tell(
        self, missing: Exception | None, monkeypatch: pytest.MonkeyPatch, ticking: Ticking
    ) -> None:
        def utilization(device: torch.device) -> int:
            if missing is not None:
                raise missing
            return 63

        monkeypatch.setattr(torch.cuda, "utilization", utilization)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
        counters = Counters(torch.device("cuda", 1))
        ticking.spend(2.0)
        reading = counters.read()
        assert reading is not None
        assert reading["gpu_percent"] == (63 if missing is None else None)
        assert reading["gpu_memory_bytes"] == 5 << 30

    def test_the_memory_peak_never_falls(self) -> None:
        before = memory_peak(torch.device("cpu"))
        held = torch.ones(1 << 22)
        assert memory_peak(torch.device("cpu")) >= before
        del held
        assert memory_peak(torch.device("cpu")) >= before


SETTINGS = {
    "off": ("profile.enabled=false",),
    "traced": ("profile.trace={updates: [3, 5]}",),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_it_changes_nothing_of_what_is_trained(case: str, tmp_path: Path) -> None:
    reference, _ = go(config(tmp_path), tmp_path / "on")
    other, _ = go(config(tmp_path, *SETTINGS[case]), tmp_path / case)
    assert same_weights(other, reference)
    traced = [line for line in comparable(tmp_path / case) if line.get("kind") != "trace"]
    assert traced == comparable(tmp_path / "on")


def test_nor_on_ranks(tmp_path: Path) -> None:
    trained = []
    for setting in ("true", "false"):
        cfg = config(tmp_path, f"profile.enabled={setting}")
        ends = go_on_ranks(cfg, tmp_path / setting, 2, net=lambda: model(dropout=0.0))
        assert isinstance(ends[0], Trainer)
        trained.append(ends[0])
    assert same_weights(*trained)
    assert comparable(tmp_path / "true") == comparable(tmp_path / "false")
    told = [line["rank_seconds"] for line in read(tmp_path / "true" / "metrics.jsonl")]
    assert any(told)
    assert not any(line["rank_seconds"] for line in read(tmp_path / "false" / "metrics.jsonl"))


def test_a_line_has_all_phases_and_their_sum_is_its_pace(tmp_path: Path) -> None:
    go(config(tmp_path), tmp_path / "run")
    lines = read(tmp_path / "run" / "metrics.jsonl")
    seen = 0
    for line in lines:
        assert tuple(line["seconds"]) == PHASES
        assert line["seconds"]["to_device"] == 0  # there is none on a CPU
        total = sum(line["seconds"].values())
        assert line["images_per_sec"] == pytest.approx((line["samples_seen"] - seen) / total)
        seen = line["samples_seen"]
