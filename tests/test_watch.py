"""What ``harness watch`` shows, and that it only reads, and only what is new."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, Group

from harness import follow, watch, watched
from harness.cli import main
from harness.follow import Follower
from harness.jsonl import encode
from harness.records import Position, rewind
from harness.rundir import RunDirectory
from harness.watched import Several, Watched, find_runs, sparkline

NOW = 1_700_000_000.0


def line(samples: int, **more: Any) -> dict[str, Any]:
    return {
        "update": samples // 64, "samples_seen": samples, "epoch": samples / 1000, "stage": 0,
        "ranks": 2, "accumulation": 1, "micro_batch": 32, "global_batch": 64, "lr": 0.1,
        "momentum": 0.9, "loss": 1000 / (samples + 1), "images_per_sec": 100.0,
        "seconds": {"data": 0.1, "forward": 0.2, "backward": 0.6, "comm_exposed": 0.1}, **more,
    }  # fmt: skip


START = {"kind": "start", "ranks": 2, "attempt": 1, "time": "2026-01-02T03:04:05+00:00"}
END = {"kind": "end"}


def evaluation(samples: int, accuracy: float) -> dict[str, Any]:
    return {"kind": "evaluation", "samples_seen": samples, "accuracy": accuracy, "loss": 1.0}


def write(path: Path, metrics: list[Any], events: list[Any], total: int | None = 10_000) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("name: digits\n")
    for name, records in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        (path / name).write_bytes(b"".join(map(encode, records)))
        os.utime(path / name, (NOW, NOW))
    if total is not None:
        (path / "plan.json").write_text(json.dumps({"totals": {"samples": total}}))
    return path


def add(path: Path, *records: Any) -> None:
    with path.open("ab") as file:
        for record in records:
            file.write(record if isinstance(record, bytes) else encode(record))


def text_of(shown: Watched | Several) -> str:
    target = io.StringIO()
    Console(file=target, width=200, soft_wrap=True, color_system=None).print(Group(*shown.show()))
    return target.getvalue()


def seen(path: Path, later: float = 1.0) -> str:
    """What is shown of a run so long after its last line."""
    run = Watched(path, lambda: NOW + later)
    run.refresh()
    return text_of(run)


# Following a file


class TestFollower:
    def test_each_line_is_read_once(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        follower = Follower(path)
        assert follower.read() == (False, [])
        add(path, {"a": 1}, {"a": 2})
        assert follower.read() == (True, [{"a": 1}, {"a": 2}])
        assert follower.read() == (False, [])
        add(path, {"a": 3})
        assert follower.read() == (False, [{"a": 3}])

    def test_half_a_line_waits_for_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        follower = Follower(path)
        add(path, {"a": 1}, b'{"a"')
        assert follower.read() == (True, [{"a": 1}])
        add(path, b": 2}")
        assert follower.read() == (False, [])
        add(path, b"\n")
        assert follower.read() == (False, [{"a": 2}])

    def test_broken_lines_are_counted(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        add(path, b"\0\0\n", {"a": 1}, b"[]\n", b'{"a": 1\n')
        follower = Follower(path)
        assert follower.read() == (True, [{"a": 1}])
        assert follower.broken == 3

    def test_a_file_that_is_cut_and_grows_again_is_taken_up_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        add(path, *({"a": k} for k in range(10)))
        follower = Follower(path)
        follower.read()
        os.truncate(path, len(encode({"a": 0})) * 4)
        add(path, *({"b": k} for k in range(90)))  # longer than before by now
        anew, records = follower.read()
        assert anew
        assert len(records) == 94

    def test_a_file_that_is_replaced_is_taken_up_anew(self, tmp_path: Path) -> None:
        path, other = tmp_path / "a", tmp_path / "b"
        add(path, {"a": 1})
        follower = Follower(path)
        follower.read()
        add(other, {"a": 1}, {"a": 2})
        other.replace(path)
        assert follower.read() == (True, [{"a": 1}, {"a": 2}])
        path.unlink()
        assert follower.read() == (True, [])
        assert follower.read() == (False, [])

    def test_of_a_long_file_only_a_part_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, count = tmp_path / "a", 60_000
        path.write_bytes(b"".join(encode({"a": k, "pad": "x" * 60}) for k in range(count)))
        taken = 0
        pread = os.pread

        def counting(fd: int, size: int, offset: int) -> bytes:
            nonlocal taken
            content = pread(fd, size, offset)
            taken += len(content)
            return content

        monkeypatch.setattr(follow.os, "pread", counting)
        follower = Follower(path)
        _, records = follower.read()
        assert follower.sampled
        assert follower.broken == 0
        values = [record["a"] for record in records]
        assert values == sorted(values)
        assert values[0] < count / 100
        assert values[-1000:] == list(range(count - 1000, count))
        assert taken < path.stat().st_size / 1.5
        assert max(b - a for a, b in pairwise(values)) < count / 50
        taken = 0
        assert follower.read() == (False, [])
        add(path, {"a": count})
        assert follower.read() == (False, [{"a": count}])
        assert taken < 2000

    def test_what_has_no_line_s_end_is_left_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow, "_MOST", 1000)
        path = tmp_path / "a"
        add(path, bytes(5000), b"\n", {"a": 1})
        follower = Follower(path)
        found = [record for _ in range(8) for record in follower.read()[1]]
        assert found == [{"a": 1}]

    @given(steps=st.lists(st.integers(0, 4), max_size=12), data=st.data())
    @settings(deadline=None)
    def test_whatever_a_writer_does_the_records_are_the_file_s(
        self, steps: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        run = RunDirectory(tmp_path_factory.mktemp("run"))
        follower, held, unique = Follower(run.metrics), [], 0
        lines: list[int] = []
        for step in steps:
            if lines and data.draw(st.booleans()):
                kept = data.draw(st.integers(0, len(lines)))
                rewind(run, Position(metrics=kept))
                lines = lines[:kept]
            for _ in range(step):
                unique += 1  # times differ from attempt to attempt
                lines.append(unique)
                add(run.metrics, {"n": unique})
            anew, records = follower.read()
            held = [*([] if anew else held), *(record["n"] for record in records)]
            assert held == lines


# One run


def test_the_newest_readings_are_shown_with_their_age(tmp_path: Path) -> None:
    """Load is read once a second, memory compared every ten updates; lines may come more often."""
    metrics = [line(64 * k, memory_peak_bytes=None, counters=None) for k in range(1, 13)]
    metrics[2] |= {"memory_peak_bytes": 2**29, "counters": {"cpu_percent": 11.0}}
    metrics[4]["counters"] = {"cpu_percent": 87.0, "gpu_percent": None, "net_sent_bytes": 5}
    metrics[9]["memory_peak_bytes"] = 2**30
    shown = seen(write(tmp_path / "r", metrics, [START]), later=20)
    # A line takes a second.
    assert "memory and load: peak 1.00 GiB (22s ago), 87 % CPU (27s ago)" in shown


def test_without_a_reading_nothing_is_said_of_load(tmp_path: Path) -> None:
    assert "memory" not in seen(write(tmp_path / "r", [line(64, counters=[])], [START]))


def test_a_running_job(tmp_path: Path) -> None:
    metrics = [line(64 * k, images_per_sec=90.0 + k) for k in range(1, 21)]
    metrics[-1] |= {
        "rank_seconds": {
            "busy_max": 3.0, "busy_median": 2.0, "slowest_rank": 1, "slowest_host": "n2",
            "phase": "data",
        },
        "memory_peak_bytes": 2**30,
        "counters": {"cpu_percent": 87.0, "gpu_percent": None},
    }  # fmt: skip
    saved = {"kind": "checkpoint", "file": "update-00000020.pt", "samples_seen": 1280}
    stage = {"kind": "stage", "stage": 0, "global_batch": 64, "ranks": 2, "reason": "begins"}
    events = [START, stage, evaluation(640, 0.25), evaluation(1280, 0.75), saved]
    shown = seen(write(tmp_path / "r", metrics, events), later=2.0)
    assert shown.splitlines()[0] == "run: running, last line 2s ago"
    assert "samples seen: 1,280 of 10,000 (13%), epoch 1.28, ETA 1m27s" in shown
    assert "stage 0: batch 64 = 2 × 1 × 32, 110 images/s" in shown
    assert "(of the last 20 lines half are between 96 and 105, median 100)" in shown
    assert "accuracy  ▁█  75.00%, best 75.00%" in shown
    assert "time      data 10%, forward 20%, backward 60%, comm_exposed 10%" in shown
    assert "slowest rank: 1 on n2, in 1 of 1 line; there busy 1.50 × as long" in shown
    assert "peak 1.00 GiB, 87 % CPU" in shown
    assert "newest checkpoint: update-00000020.pt" in shown
    assert "attempts: 1" in shown
    assert "2026-01-02T03:04:05 start: 2 ranks" in shown
    assert "stage: begins, stage 0, batch 64, 2 ranks" in shown
    assert "hangs" not in shown


def test_its_words_are_those_of_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [START, {"kind": "fault", "reason": "rank 1 was killed"}, {"kind": "resume"}]
    path = write(tmp_path / "r", [line(640)], events)
    assert main(["status", str(path)]) == 0
    status = capsys.readouterr().out.splitlines()
    assert main(["watch", str(path), "--once"]) == 0
    shown = capsys.readouterr().out
    for told in status:
        if told.split(":")[0] in ("run", "samples seen", "attempts", "newest checkpoint"):
            assert told in shown
    assert "fault: rank 1 was killed" in shown


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "not started"),
        ([START], "running"),
        ([START, {"kind": "fault", "reason": "x"}], "failed"),
        ([START, {"kind": "stop", "reason": "x"}], "stopped"),
        ([START, END], "done"),
    ],
)
def test_only_a_running_job_can_hang(events: list[Any], state: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], events)
    assert seen(path, later=1e5).startswith(f"run: {state}")
    assert ("it hangs, or its processes are gone" in seen(path, later=1e5)) == (state == "running")
    assert "hangs" not in seen(path, later=30)


def test_patience_grows_with_what_a_line_takes(tmp_path: Path) -> None:
    slow = write(tmp_path / "r", [line(640, seconds={"forward": 100.0})], [START])
    assert "hangs" not in seen(slow, later=900)
    assert "no line for 16m41s, though one takes about 100 s: it hangs" in seen(slow, later=1001)


def test_a_silence_that_a_line_has_ended_is_no_hang_the_next_time(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    ticks = 0.0
    run = Watched(path, lambda: NOW, lambda: ticks)
    run.refresh()
    os.utime(path / "metrics.jsonl", (NOW + 500, NOW + 500))
    ticks = 500.0
    run.refresh()
    ticks = 500.0 + 900
    assert not run.hangs
    ticks = 500.0 + 1100
    assert run.hangs


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_is_set_makes_no_hang_and_hides_none(jump: float, tmp_path: Path) -> None:
    """Neither the one of this machine nor the file server's, once we have looked."""
    path = write(tmp_path / "r", [line(640)], [START])
    wall, ticks = NOW, 0.0
    run = Watched(path, lambda: wall, lambda: ticks)
    run.refresh()
    wall, ticks = NOW + jump, 5.0
    assert run.silence == 5.0
    os.utime(path / "metrics.jsonl", (wall, wall))  # a line
    run.refresh()
    assert run.silence == 0.0
    ticks = 40.0
    assert not run.hangs
    ticks = 5.0 + 120.0
    assert run.hangs


def test_a_clock_that_is_behind_the_file_server_s_shows_no_negative_age(tmp_path: Path) -> None:
    assert "last line 0s ago" in seen(write(tmp_path / "r", [line(640)], [START]), later=-50)


def test_a_run_that_goes_on_from_a_checkpoint_is_shown_from_there(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r",
        [line(64 * k) for k in range(1, 11)],
        [START, evaluation(64, 0.9), evaluation(640, 0.95)],
    )
    run = Watched(path, lambda: NOW)
    run.refresh()
    assert "samples seen: 640" in text_of(run)
    rewind(RunDirectory(path), Position(metrics=5, events=1))
    add(path / "events.jsonl", {"kind": "resume", "ranks": 2, "updates_repeated": 5})
    run.refresh()
    shown = text_of(run)
    assert "samples seen: 320" in shown
    assert "90.00%, best 90.00%" in shown
    assert "attempts: 2, updates repeated: 5" in shown
    add(path / "metrics.jsonl", line(384))
    run.refresh()
    assert "samples seen: 384" in text_of(run)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START], total=None)
    (path / "events.jsonl").unlink()
    add(path / "metrics.jsonl", b"broken\n", b'{"half')
    shown = seen(path)
    assert "events.jsonl is missing" in shown
    assert "metrics.jsonl: 1 line broken and left out" in shown
    assert "ETA" not in shown
    assert "run: not started" in shown


def test_the_end_of_a_run_whose_batches_are_not_known_is_not_either(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    plan = {"totals": {"samples": 9}, "fastest": {"totals": {"samples": 10}}}
    (path / "plan.json").write_text(json.dumps(plan))
    assert "ETA" not in seen(path)


def test_events_cannot_draw_on_the_terminal(tmp_path: Path) -> None:
    evil = {"kind": "fault", "reason": "\x1b[2J[bold]x[/bold]\nrun: done", "time": "\x1b[0m"}
    shown = seen(write(tmp_path / "r", [line(640)], [START, evil]))
    assert "\x1b" not in shown
    assert "[bold]x[/bold]" in shown
    assert "\nrun: done" not in shown


def test_skipped_updates_do_not_drown_the_rest(tmp_path: Path) -> None:
    skipped = {"kind": "skipped_update", "reason": "overflow"}
    shown = seen(write(tmp_path / "r", [line(640)], [START, *[skipped] * 15]))
    assert "skipped_update: overflow (× 15)" in shown
    assert "start: 2 ranks" in shown


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)
known = st.sampled_from(
    [
        *line(1),
        "rank_seconds",
        "memory_peak_bytes",
        "counters",
        "kind",
        "reason",
        "time",
        "accuracy",
    ]
)
kinds = st.sampled_from(["start", "stage", "end", "fault", "evaluation", "checkpoint", "resume"])


@given(
    metrics=st.lists(st.dictionaries(known, json_values), max_size=6),
    events=st.lists(
        st.tuples(st.dictionaries(known, json_values), kinds).map(lambda p: {**p[0], "kind": p[1]}),
        max_size=6,
    ),
    plan=json_values,
)
@settings(deadline=None, max_examples=150)
def test_no_record_breaks_it(
    metrics: list[Any], events: list[Any], plan: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run")
    for name, records in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        (path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "plan.json").write_text(json.dumps({"totals": plan, "fastest": plan}))
    run = Watched(path, lambda: NOW)
    run.refresh()
    assert text_of(run).startswith("run: ")
    list(run.news())


def snapshot(path: Path) -> dict[str, tuple[int, float, bytes]]:
    return {
        str(one.relative_to(path)): (
            one.stat().st_mode,
            one.stat().st_mtime,
            b"" if one.is_dir() else one.read_bytes(),
        )
        for one in sorted(path.rglob("*"))
    }


def test_it_writes_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    before = snapshot(tmp_path)
    assert main(["watch", str(path), "--once"]) == 0
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert snapshot(tmp_path) == before


# Several runs


def test_the_runs_of_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", [line(640)], [START])
    write(tmp_path / "points" / "r0002" / "repeat-0", [line(10_000)], [START, END])
    write(tmp_path / "a" / "inner", [line(640)], [START])  # belongs to a
    (tmp_path / "empty").mkdir()
    assert [str(p.relative_to(tmp_path)) for p in find_runs(tmp_path)] == [
        "a",
        "points/r0002/repeat-0",
    ]
    several = Several(tmp_path, lambda: NOW + 1)
    several.refresh()
    shown = text_of(several)
    assert "points/r0002/repeat-0" in shown
    assert "1 of 2 runs done" in shown
    assert not several.over
    assert len(list(several.news())) == 2
    assert list(several.news()) == []
    add(tmp_path / "a" / "metrics.jsonl", line(1280))
    several.refresh()
    (news,) = several.news()
    assert news.startswith("a  running  13%")


def test_a_new_run_appears_and_one_that_is_gone_goes(tmp_path: Path) -> None:
    clock = 0.0
    (tmp_path / "slurm").mkdir()
    several = Several(tmp_path, ticks=lambda: clock)
    several.refresh()
    assert "0 of 0 runs done" in text_of(several)
    run = write(tmp_path / "a", [line(640)], [START, END])
    clock = 100.0
    several.refresh()
    assert several.over
    run.rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    several.refresh()  # still listed, with nothing to tell
    clock = 200.0
    several.refresh()
    assert "0 of 0 runs done" in text_of(several)


# Curves


@given(
    st.lists(st.tuples(st.floats(0, 1e15), st.floats(-1e9, 1e9)), min_size=1, max_size=200),
    st.integers(1, 80),
)
def test_a_sparkline_is_as_wide_as_it_may_be(curve: list[tuple[float, float]], width: int) -> None:
    shown = sparkline(curve, width)
    assert len(shown) == min(width, len(curve))
    assert set(shown) <= set("▁▂▃▄▅▆▇█")


def test_a_sparkline_goes_from_low_to_high() -> None:
    assert sparkline([(float(k), float(k)) for k in range(8)]) == "▁▂▃▄▅▆▇█"
    assert sparkline([(0.0, 1.0), (10.0, 1.0)]) == "▅▅"
    assert sparkline([(0.0, 0.0), (99.0, 1.0), (100.0, 1.0)]) == "▁▁█"  # nothing between


def test_a_terminal_that_knows_only_ascii_gets_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sparkline([(float(k), float(k)) for k in range(8)]) == "_.-=+*#@"


def test_curves_are_thinned_out(tmp_path: Path) -> None:
    run = watched.Seen()
    run.add([line(k) for k in range(1, 20_000)])
    assert len(run.loss) <= watched._CURVE
    assert run.loss[0][0] == 1
    assert run.loss[-1][0] == 19_999


# The command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "holds no run and no batch jobs"),
        (["."], "holds no run and no batch jobs"),
        (["r", "--interval", "0"], "--interval 0: must be from 0.1"),
        (["r", "--interval", "nan"], "--interval nan: must be from 0.1"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["watch", *words]) == 2
    assert said in capsys.readouterr().err


def started(path: Path, *words: str, **how: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "harness", "watch", str(path), "--interval", "0.1", *words]
    return subprocess.Popen(command, text=True, **how)


def test_plain_lines_tell_what_is_new_until_the_run_is_done(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    with started(path, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines: Iterator[str] = iter(process.stdout)
        assert next(lines).startswith("run: running")
        while "attempts" not in next(lines):
            pass
        assert "start" in next(lines)
        add(path / "metrics.jsonl", line(1280))
        told = next(lines)
        assert "samples seen: 1,280 of 10,000 (13%)" in told
        assert "loss" in told
        add(path / "events.jsonl", {"kind": "fault", "reason": "rank 1 was killed"})
        assert next(lines) == "fault: rank 1 was killed\n"
        add(path / "events.jsonl", START, END)
        assert next(lines).endswith("start: 2 ranks\n")
        assert next(lines) == "end\n"
        assert process.wait(60) == 0


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with started(path, **how) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("run: running")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


# Makes the terminal on standard input the controlling one, which typed keys and sizes need.
CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "harness", "watch", *sys.argv[1:]])
"""
SHOW_CURSOR, OTHER_SCREEN, USUAL_SCREEN = "\x1b[?25h", "\x1b[?1049h", "\x1b[?1049l"


class Terminal:
    """A terminal of that size on which ``harness watch`` runs, until the ``with`` block is left."""

    def __init__(
        self, path: Path, columns: int, rows: int, interval: float = 0.1, term: str = "xterm"
    ) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(columns, rows)
        variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, str(path), "--interval", str(interval)],
            stdin=theirs, stdout=theirs, stderr=theirs, env={**variables, "TERM": term},
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self._heard = bytearray()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.end()
        os.close(self._ours)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str, since: int = 0) -> None:
        deadline = time.monotonic() + 60
        while text not in self.heard[since:]:
            assert time.monotonic() < deadline, self.heard
            time.sleep(0.02)

    def end(self) -> int:
        """The exit code, once all that was written has been heard."""
        code = self.process.wait(60)
        self._listener.join(60)
        return code

    @property
    def heard(self) -> str:
        return self._heard.decode(errors="replace")

    @property
    def frames(self) -> list[list[str]]:
        """The lines of each view that was drawn on the other screen as a whole."""
        drawn = self.heard.partition(USUAL_SCREEN)[0].split("\x1b[H")[1:]
        plain = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text) for text in drawn]
        return [text.split("\r\n") for text in plain if text]

    @property
    def left(self) -> str:
        """What stays on the usual screen."""
        return self.heard.rpartition(USUAL_SCREEN)[2]

    def _listen(self) -> None:
        while True:
            try:
                content = os.read(self._ours, 65536)
            except OSError:
                return
            self._heard.extend(content)


def busy_run(path: Path) -> Path:
    """With something to say on every line of the view."""
    metrics = [line(64 * k, images_per_sec=90.0 + k) for k in range(1, 80)]
    metrics[-1]["counters"] = {"cpu_percent": 87.0}
    told = {"kind": "warning", "reason": "words " * 30}
    events = [START, *(evaluation(640 * k, k / 9) for k in range(1, 9)), *[told] * 9]
    return write(path, metrics, events)


@pytest.fixture(scope="module")
def busy_shown(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    run = Watched(busy_run(tmp_path_factory.mktemp("busy") / "r"), lambda: NOW)
    run.refresh()
    return run


def test_a_terminal_is_redrawn(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    with Terminal(path, 150, 40) as terminal:
        terminal.wait_for("refreshed in")
        add(path / "metrics.jsonl", line(1280))
        terminal.wait_for("1,280")
        terminal.type("\x03")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.heard
    assert "samples seen: 1,280" in terminal.left  # as it was last
    assert terminal.heard.count(OTHER_SCREEN) == terminal.heard.count(USUAL_SCREEN) == 1
    assert SHOW_CURSOR in terminal.heard.rpartition("\x1b[?25l")[2]


def test_the_view_fits_a_terminal_that_changes_its_size(tmp_path: Path) -> None:
    sizes = [(80, 24), (40, 12), (120, 50)]
    path = busy_run(tmp_path / "r")
    with Terminal(path, *sizes[0], interval=3600) as terminal:  # drawn anew when it is resized
        terminal.wait_for("Ctrl-C ends this")
        for size in sizes[1:]:
            before = len(terminal.heard)
            terminal.resize(*size)
            terminal.wait_for("\x1b[H", before)
        terminal.wait_for("Ctrl-C ends this", before)
        terminal.type("\x03")
        assert terminal.end() == 0
        frames = terminal.frames
    assert len(frames) == len(sizes)
    for (columns, rows), frame in zip(sizes, frames, strict=True):
        assert len(frame) == rows
        assert frame[0].startswith("run: running")
        assert all(len(text) <= columns for text in frame[:-1])
    (left_out,) = [text for text in frames[1] if text.startswith("… ")]
    assert left_out.rstrip().endswith(" more lines")
    assert frames[1][-2].strip().startswith("words")  # the end of the newest event
    assert any(text.startswith("memory and load: 87 % CPU") for text in frames[-1])


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_be_redrawn_gets_lines(term: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    with Terminal(path, 80, 24, term=term) as terminal:
        terminal.wait_for("start: 2 ranks")
        add(path / "events.jsonl", END)
        assert terminal.end() == 0
    assert "\x1b" not in terminal.heard
    assert terminal.heard.rstrip().endswith("end")


def test_a_signal_that_ends_it_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    with Terminal(path, 80, 24, interval=3600) as terminal:
        terminal.wait_for("Ctrl-C ends this")
        terminal.process.terminate()
        assert terminal.end() == 143
    assert SHOW_CURSOR in terminal.heard.rpartition("\x1b[?25l")[2]
    assert "samples seen: 640" in terminal.left


def test_ctrl_z_gives_the_terminal_back_until_it_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    with Terminal(path, 80, 24, interval=3600) as terminal:
        terminal.wait_for("Ctrl-C ends this")
        terminal.type("\x1a")
        terminal.wait_for(USUAL_SCREEN)
        watcher = psutil.Process(terminal.process.pid)
        while watcher.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        before = len(terminal.heard)
        watcher.resume()
        terminal.wait_for(OTHER_SCREEN, before)
        terminal.wait_for("Ctrl-C ends this", before)
        terminal.type("\x03")
        assert terminal.end() == 0


@pytest.mark.parametrize("drawn", [True, False])
def test_a_run_directory_that_goes_ends_it_with_a_message(drawn: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "r", [line(640)], [START])
    with Terminal(path, 120, 24, term="xterm" if drawn else "dumb") as terminal:
        terminal.wait_for("start: 2 ranks")
        path.rename(tmp_path / "elsewhere")
        assert terminal.end() == 2
    message = f"harness: {path} is gone: it was moved or deleted while it was watched"
    assert message in " ".join(terminal.left.split("\r\n"))
    assert "Traceback" not in terminal.heard


@given(st.integers(1, 250), st.integers(1, 70))
def test_it_fits_every_size(busy_shown: Watched, columns: int, rows: int) -> None:
    console = Console(file=io.StringIO(), width=columns, height=rows)
    fitted = watch._Fitted(busy_shown.show(columns), "refreshed in 1.0 ms, every 1 s")
    lines = console.render_lines(fitted, console.options, pad=False)
    assert len(lines) <= rows
    assert all(sum(part.cell_length for part in row) <= columns for row in lines)


def test_a_bench_is_the_runs_that_it_consists_of(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}", encoding="utf-8")
    (tmp_path / "config.yaml").write_text("name: a\n", encoding="utf-8")
    launch = tmp_path / "points" / "r0001-a0001-m0032" / "repeat-0"
    launch.mkdir(parents=True)
    (launch / "launch.log").write_text("$ harness train\n", encoding="utf-8")
    assert find_runs(tmp_path) == [launch]  # which has not begun yet
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert main(["watch", str(launch), "--once"]) == 0
