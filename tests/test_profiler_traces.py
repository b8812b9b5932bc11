"""Traces: what one rank writes, and how ``harness trace`` makes one file of many."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.cli import main
from harness.comm import SoloCommunicator
from harness.errors import RunDirectoryError
from harness.phases import HostClock
from harness.schema import Trace
from harness.trace_merge import merge_traces, offset
from harness.tracing import Tracer, next_timeline

HOUR = 3600 * 10**9
START = 1_790_000_000 * 10**9
"""Nanoseconds since the epoch: more than a float holds exactly."""


@given(
    st.integers(-HOUR, HOUR),
    st.lists(
        st.tuples(*[st.integers(0, 10**7)] * 4),
        min_size=1,
        max_size=10,
    ),
)
def test_the_offset_of_two_clocks_is_as_exact_as_it_says(
    ahead: int, operations: list[tuple[int, int, int, int]]
) -> None:
    a, b, now = [], [], START
    for enter_a, enter_b, leave_a, leave_b in operations:
        done = now + max(enter_a, enter_b)  # nobody leaves before all have entered
        a.append((now + enter_a, done + leave_a))
        b.append((now + enter_b + ahead, done + leave_b + ahead))
        now = done + 10**7
    found, error = offset(a, b)
    assert abs(found - ahead) <= error
    lasted = [sum(left - entered for entered, left in both) for both in zip(a, b, strict=True)]
    assert error <= (min(lasted) + 1) // 2
    assert offset(b, a)[1] == pytest.approx(error, abs=1)


def pings(ahead: int, rank: int, host_error: int = 1000) -> list[list[int]]:
    """Ten operations at which ranks arrive and from which they leave a little apart."""
    choice = random.Random(rank)
    times = []
    for number in range(10):
        begin = START + number * 10**6
        enter, leave = begin + choice.randrange(host_error), begin + host_error
        times.append([enter + ahead, leave + choice.randrange(host_error) + ahead])
    return times


def write_rank(folder: Path, rank: int, ahead: int = 0, session: int = 7) -> None:
    """What a rank leaves whose clock is so far ahead: a phase and an operation of the GPU and the
    host that begin at START + 1 s and take 2 ms."""
    folder.mkdir(parents=True, exist_ok=True)
    begin, base = START + 10**9 + ahead, START - HOUR
    pid = 4000 + rank
    shared = {"ts": (begin - base) / 1e3, "dur": 2000.0}
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "ts": 0, "args": {"name": "s 7"}},
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 0, "args": {"name": "x"}},
        {"ph": "X", "name": "aten::mm", "cat": "cpu_op", "pid": pid, "tid": pid, **shared},
        {"ph": "s", "id": 5, "name": "ac2g", "cat": "ac2g", "pid": pid, "tid": pid, **shared},
        {"ph": "X", "name": "gemm", "cat": "kernel", "pid": 0, "tid": 7, **shared},
        {"ph": "f", "id": 5, "name": "ac2g", "cat": "ac2g", "pid": 0, "tid": 7, **shared},
        {"ph": "M", "name": "process_labels", "pid": 0, "ts": 0, "args": {"labels": "GPU 0"}},
        {"ph": "X", "name": "PyTorch Profiler", "pid": "Spans", "tid": "x", **shared},
    ]
    content = {"baseTimeNanoseconds": base, "traceEvents": events}
    about = {
        "format": 1,
        "session": session,
        "rank": rank,
        "host": f"node{rank}",
        "pid": 4000 + rank,
        "updates": [100, 103],
        "pings": pings(ahead, rank),
        "phases": [["forward", begin, begin + 2 * 10**6]],
    }
    (folder / f"rank-{rank:04d}.json").write_text(json.dumps(content))
    (folder / f"rank-{rank:04d}.about.json").write_text(json.dumps(about))


def write_timeline(folder: Path, complete: bool = True, spread: int = 1) -> None:
    """Two operations on one tensor, one inside the other, at START + 1 s; the like ``spread``
    times, an hour apart."""
    begin = START // 1000
    parts = [
        {
            "name": "process_name",
            "ph": "M",
            "pid": 0,
            "args": {"start_time_since_epoch_in_micros": begin},
        },
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "allreduce.bucket.0"}},
    ]
    for number in range(spread):
        at = 10**6 + number * 3600 * 10**6
        parts += [
            {"ph": "B", "name": "ALLREDUCE", "ts": at, "pid": 1},
            {"ph": "X", "name": "0", "ts": at, "pid": 1, "dur": 0},
            {"ph": "B", "name": "MPI_ALLREDUCE", "ts": at + 1, "pid": 1},
            {"ph": "E", "ts": at + 2, "pid": 1},
            {"ph": "E", "ts": at + 3, "pid": 1, "args": {"dtype": "float32"}},
        ]
    text = "[\n" + ",".join(map(json.dumps, parts))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "horovod-0001.json").write_text(f"{text}]" if complete else f'{text},{{"ph": "B", "')


def merged(run_dir: Path) -> list[dict[str, Any]]:
    path = merge_traces(run_dir).path
    content = json.loads(path.read_text())
    events: list[dict[str, Any]] = content["traceEvents"]
    assert all(isinstance(event["pid"], int) and event["pid"] > 0 for event in events)
    assert all(event["ts"] >= 0 for event in events)
    return events


def names(events: list[dict[str, Any]], kind: str = "process_name") -> list[str]:
    return [event["args"]["name"] for event in events if event["name"] == kind]


class TestMerging:
    def test_makes_each_rank_a_process_with_its_name(self, tmp_path: Path) -> None:
        for rank in (0, 1, 12):
            write_rank(tmp_path / "traces", rank)
        events = merged(tmp_path)
        assert [name for name in names(events) if "GPU" not in name] == [
            "rank 0 on node0",
            "rank 1 on node1",
            "rank 12 on node12",
        ]
        assert "rank 12 on node12, GPU 0" in names(events)
        where = {(event["name"], event["pid"]) for event in events if event["ph"] == "X"}
        pids = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
        assert where == {
            (name, pids[f"rank {rank} on node{rank}{device}"])
            for rank in (0, 1, 12)
            for name, device in (("forward", ""), ("aten::mm", ""), ("gemm", ", GPU 0"))
        }

    def test_sets_clocks_right_that_are_an_hour_apart(self, tmp_path: Path) -> None:
        for rank, ahead in enumerate((0, HOUR, -HOUR // 7)):
            write_rank(tmp_path / "traces", rank, ahead)
        write_timeline(tmp_path / "traces")
        result = merge_traces(tmp_path)
        assert 0 < result.clock_error_ns < 2000
        events = json.loads(result.path.read_text())["traceEvents"]
        begun = [e["ts"] for e in events if e["name"] in ("aten::mm", "forward", "ALLREDUCE")]
        assert len(begun) == 7
        assert max(begun) - min(begun) <= 2 * result.clock_error_ns / 1e3 + 0.5

    def test_keeps_arrows_of_different_ranks_apart(self, tmp_path: Path) -> None:
        for rank in (0, 1):
            write_rank(tmp_path / "traces", rank)
        arrows = [event["id"] for event in merged(tmp_path) if event["ph"] in "sf"]
        assert len(arrows) == 4
        assert len(set(arrows)) == 2

    @pytest.mark.parametrize("complete", [True, False])
    def test_takes_horovods_timeline_whole_or_cut_short(
        self, complete: bool, tmp_path: Path
    ) -> None:
        write_timeline(tmp_path / "traces", complete)
        events = merged(tmp_path)
        assert names(events) == ["Horovod, seen by rank 0"]
        assert names(events, "thread_name") == ["allreduce.bucket.0"]
        told = [(e["name"], e["dur"]) for e in events if e["ph"] == "X"]
        assert told == [("MPI_ALLREDUCE", 1.0), ("ALLREDUCE", 3.0)]

    def test_takes_of_a_long_timeline_what_is_near_the_traced_updates(self, tmp_path: Path) -> None:
        write_timeline(tmp_path / "traces", spread=50)
        assert sum(event["name"] == "ALLREDUCE" for event in merged(tmp_path)) == 50
        write_rank(tmp_path / "traces", 0)
        assert sum(event["name"] == "ALLREDUCE" for event in merged(tmp_path)) == 1

    def test_a_timeline_may_end_anywhere(self, tmp_path: Path) -> None:
        write_timeline(tmp_path / "traces", spread=3)
        write_rank(tmp_path / "traces", 1)
        assert "rank 0 was not traced" in merge_traces(tmp_path).problems[0]
        path = tmp_path / "traces" / "horovod-0001.json"
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            merge_traces(tmp_path)
            json.loads((tmp_path / "traces" / "merged.json").read_text())

    def test_leaves_out_what_an_earlier_attempt_left(self, tmp_path: Path) -> None:
        write_rank(tmp_path / "traces", 0, session=8)
        write_rank(tmp_path / "traces", 1, session=7)
        result = merge_traces(tmp_path)
        assert result.ranks == (0,)
        assert result.problems == ("rank-0001.json is of an earlier attempt; left out",)

    def test_says_what_is_broken_and_goes_on_with_the_rest(self, tmp_path: Path) -> None:
        folder = tmp_path / "traces"
        for rank in range(5):
            write_rank(folder, rank)
        (folder / "rank-0001.json").write_text('{"traceEvents": [')
        (folder / "rank-0002.about.json").write_text("{}")
        (folder / "rank-0003.about.json").write_text("[]")
        (folder / "rank-0004.json").unlink()
        result = merge_traces(tmp_path)
        assert result.ranks == (0, 1)  # of rank 1 the phases are there
        assert len(result.problems) == 4
        events = json.loads(result.path.read_text())["traceEvents"]
        assert sum(event["name"] == "forward" for event in events) == 2

    @pytest.mark.parametrize("value", ["null", "[]", "7", '"x"', '{"a": 1}', "[1, 2]", "[[1]]"])
    @pytest.mark.parametrize(
        "key", ["rank", "pid", "session", "updates", "pings", "phases", "host"]
    )
    def test_no_about_file_ends_in_a_traceback(self, key: str, value: str, tmp_path: Path) -> None:
        write_rank(tmp_path / "traces", 0)
        write_rank(tmp_path / "traces", 1)
        path = tmp_path / "traces" / "rank-0001.about.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: json.loads(value)}))
        assert main(["trace", str(tmp_path)]) in (0, 2)

    @pytest.mark.parametrize(
        "value",
        [
            *("null", "7", '[null, 7, "x", {}, {"pid": 1}]', '{"a": 1}'),
            '[{"ph": "X", "pid": 1, "tid": 1, "ts": NaN, "dur": Infinity, "name": "\t"}]',
            '[{"ph": "X", "pid": 1, "tid": 1, "ts": 1, "dur": NaN, "name": "\t"}]',
        ],
    )
    def test_no_trace_file_ends_in_a_traceback(self, value: str, tmp_path: Path) -> None:
        write_rank(tmp_path / "traces", 0)
        path = tmp_path / "traces" / "rank-0000.json"
        path.write_text(f'{{"traceEvents": {value}}}')
        assert main(["trace", str(tmp_path)]) == 0

    def test_of_nothing_says_how_to_get_something(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["trace", str(tmp_path)]) == 2
        assert "holds no traces; run with profile.trace=" in capsys.readouterr().err
        with pytest.raises(RunDirectoryError):
            merge_traces(tmp_path / "missing")

    def test_the_command_tells_what_it_made(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for rank in (0, 1):
            write_rank(tmp_path / "traces", rank)
        write_timeline(tmp_path / "traces")
        assert main(["trace", str(tmp_path), "-o", str(tmp_path / "out.json")]) == 0
        told = capsys.readouterr().out
        assert told.startswith(f"{tmp_path}/out.json: updates 100 to 103 of ranks 0, 1, clocks ")
        assert "Horovod's timeline" in told


def trace(folder: Path, updates: list[int], of: range) -> None:
    clock = HostClock()
    tracer = Tracer(Trace(updates=updates), SoloCommunicator(), clock, folder)
    for update in of:
        tracer.before(update)
        torch.ones(8, 8) @ torch.ones(8, 8)
        clock.mark("forward")
        tracer.after(update)
    tracer.close()


class TestTracing:
    def test_writes_the_updates_that_are_asked_for(self, tmp_path: Path) -> None:
        trace(tmp_path / "traces", [2, 3], range(1, 6))
        events = merged(tmp_path)
        forward = [event for event in events if event["name"] == "forward"]
        products = [event for event in events if event["name"] == "aten::matmul"]
        assert len(forward) == len(products) == 2
        for phase, product in zip(forward, products, strict=True):
            # The two clocks are the kernel's and the processor's, brought together.
            assert phase["ts"] - 1000 < product["ts"]
            assert product["ts"] + product["dur"] < phase["ts"] + phase["dur"] + 1000

    def test_a_run_that_ends_early_leaves_what_there_is(self, tmp_path: Path) -> None:
        trace(tmp_path / "traces", [2, 50], range(1, 4))
        assert sum(event["name"] == "forward" for event in merged(tmp_path)) == 2

    def test_a_run_that_goes_on_in_the_middle_begins_there(self, tmp_path: Path) -> None:
        trace(tmp_path / "traces", [2, 5], range(4, 9))
        assert sum(event["name"] == "forward" for event in merged(tmp_path)) == 2

    def test_a_rank_that_is_not_asked_for_writes_nothing(self, tmp_path: Path) -> None:
        clock = HostClock()
        tracer = Tracer(Trace(updates=[1, 1], ranks=[1]), SoloCommunicator(), clock, tmp_path)
        tracer.before(1)
        assert tracer.after(1)
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_written_ends_no_training(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "traces").write_text("a file")
        trace(tmp_path / "traces", [1, 1], range(1, 3))
        assert "no trace" in capsys.readouterr().err

    def test_each_start_has_a_timeline_of_its_own(self, tmp_path: Path) -> None:
        for number in (1, 2):
            path = next_timeline(tmp_path / "traces")
            assert path.name == f"horovod-{number:04d}.json"
            path.touch()
