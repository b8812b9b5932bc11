"""Records, whatever is in them: every command that reads them has an answer or one message, and
changes nothing of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import simulated
from fuzzing import LONG, WATCH, command, damaged, fuzz, replaced, tree
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from harness.jsonl import LONGEST_LINE, read_jsonl, spread_lines
from harness.rundir import RunDirectory
from launch.outcome import Ended, judge
from launch.spec import Host, LaunchSpec

DEMO = str(ROOT / "configs" / "adabatch-digits.yaml")
JOBS = {
    "kind": "sweep",
    "directory": "/work",
    "jobs": [
        {
            "name": "sweep", "kind": "sweep", "id": "7", "ranks": 2, "nodes": 1, "segment": None,
            "after": ["6"], "condition": "afterok", "options": {"time": "30"},
            "script": "sweep.sbatch", "time": "2026-01-02T03:04:05", "point": None,
        }
    ],
    "points": [
        {"directory": "0000-a", "settings": ["lr.base=0.1"], "ranks": 2, "nodes": 1},
    ],
    "history": [
        {"time": "t", "job": "7", "restarts": 0, "outcome": "queued again", "reason": "warned"}
    ],
}  # fmt: skip
WORDS = {"rank": 1, "host": "n1", "exit_code": 1, "message": "x", "consequence": False,
         "final": False, "traceback": "Traceback (most recent call last)"}  # fmt: skip
PROBE = {
    "ranks": 2,
    "left_out": {"torch Gloo": "not asked for"},
    "provenance": {"communication": {"hosts": [{}, {}]}},
    "timings": [
        {"operation": name, "bytes": 4**k, "seconds": [1e-5 * 4**k, 2e-5 * 4**k, 3e-5 * 4**k]}
        for k in range(1, 8)
        for name in ("horovod", "horovod_fp16")
    ],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of everything that can be recorded, with its batch jobs, and a bench and a probe."""
    base: Path = tmp_path_factory.mktemp("whole")
    run = simulated.Simulation(epochs=8, measured=True).run(restart_at=60).write(base / "run")
    (run / "config.yaml").write_text((ROOT / "configs" / "adabatch-digits.yaml").read_text())
    (run / "slurm").mkdir()
    (run / "slurm" / "jobs.json").write_text(json.dumps(JOBS))
    simulated.write_bench(base / "bench", simulated.bench())
    (base / "probe").mkdir()
    (base / "probe" / "probe.json").write_text(json.dumps(PROBE))
    for words in reading(base):  # numpy and others look around when they are imported
        command(*words)
    return base


@pytest.fixture
def copies(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    def copy() -> Path:
        target: Path = tmp_path_factory.mktemp("copy") / "all"
        shutil.copytree(whole, target)
        return target

    return copy


def records(base: Path) -> list[Path]:
    return sorted(path for path in base.rglob("*") if path.is_file())


@st.composite
def harm(draw: st.DrawFn, path: Path) -> bytes:
    """A record's file in which values are others, or bytes are."""
    content = path.read_bytes()
    if path.suffix == ".yaml" or draw(st.integers(0, 3)) == 0:
        return draw(damaged(content))
    if path.suffix == ".json":
        return json.dumps(draw(replaced(json.loads(content)))).encode("utf-8", "surrogatepass")
    lines = content.split(b"\n")
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(lines) - 2))
        try:
            line = json.loads(lines[at])
        except ValueError:  # one that was harmed before
            continue
        lines[at] = json.dumps(draw(replaced(line))).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def reading(base: Path) -> Iterator[tuple[object, ...]]:
    """The commands that only read."""
    for path in (base / "run", base):
        yield "watch", path, "--once"
        yield "status", path
        yield "status", path, "--json"
    for name in ("run", "bench"):
        yield "plan", DEMO, "--throughput", base / name
    yield "probe", "--read", base / "probe"


def read_all(base: Path, out: Path, report: bool) -> None:
    before = tree(base)
    with WATCH.watching() as done:
        for words in reading(base):
            command(*words)
    assert [event for event, _ in done if event != "subprocess.Popen"] == []
    started = {str(arguments[0]) for event, arguments in done if event == "subprocess.Popen"}
    assert started <= {"scontrol"}
    if report:
        command("report", base / "run", base / "bench", "-o", out)
    assert tree(base) == before


@fuzz(20)
@given(st.data())
def test_damaged_records(copies: Callable[[], Path], data: st.DataObject) -> None:
    base = copies()
    for path in data.draw(
        st.lists(st.sampled_from(records(base)), min_size=1, max_size=4, unique=True)
    ):
        path.write_bytes(data.draw(harm(path)))
    read_all(base, base.parent / "report", report=False)


@fuzz(2)
@given(st.data())
def test_reports_of_damaged_records(copies: Callable[[], Path], data: st.DataObject) -> None:
    base = copies()
    chosen = [path for path in records(base) if path.parent.name in ("run", "bench")]
    for path in data.draw(st.lists(st.sampled_from(chosen), min_size=3, max_size=8, unique=True)):
        path.write_bytes(data.draw(harm(path)))
    read_all(base, base.parent / "report", report=True)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def locked(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


NAMES = (
    *("config.yaml", "plan.json", "provenance.json", "metrics.jsonl", "events.jsonl"),
    *("layers.jsonl", "slurm/jobs.json", "../bench/bench.json", "../probe/probe.json"),
)


@pytest.mark.parametrize("kind", [pipe, folder, endless, loop, nowhere, locked])
def test_what_is_no_file(kind: Callable[[Path], None], copies: Callable[[], Path]) -> None:
    """Nobody waits for a pipe, or reads a device to its end."""
    base = copies()
    for name in NAMES if LONG else (*NAMES[:1], *NAMES[3:5], *NAMES[6:]):
        (base / "run" / name).unlink()
        kind(base / "run" / name)
    for words in reading(base):
        command(*words)
    command("report", base / "run", "-o", base.parent / "report")
    command("report", base / "bench", "-o", base.parent / "report")


def test_a_line_without_an_end_is_one_broken_line(tmp_path: Path) -> None:
    """However long it is; it is a file with a hole, so that the test needs no room."""
    path = tmp_path / "events.jsonl"
    with path.open("wb") as file:
        file.write(b'{"kind":"start"}\n')
        file.seek(5 * LONGEST_LINE // 2)
        file.write(b'\n{"kind":"end"}\n')
    assert list(read_jsonl(path)) == [{"kind": "start"}, None, {"kind": "end"}]
    assert spread_lines(path, 3) == ([{"kind": "start"}, None, {"kind": "end"}], 3)


def test_an_object_that_is_too_large_is_not_read(copies: Callable[[], Path]) -> None:
    base = copies()
    for name in ("plan.json", "provenance.json", "../bench/bench.json", "../probe/probe.json"):
        os.truncate(base / "run" / name, 1 << 40)
    for words in reading(base):
        command(*words)
    said = command("report", base / "run", "-o", base.parent / "report")
    assert said.code == 0


@fuzz(25)
@given(st.data())
def test_last_words_of_ranks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.failures.mkdir()
    content = json.dumps(data.draw(replaced(WORDS, most=2))).encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    (run.failures / "rank-00001.json").write_bytes(content)
    spec = LaunchSpec(ranks=2, hosts=(Host("n1", 2),), command=("true",))
    assert judge(Ended(1, "words"), spec, run).kind in ("failed", "refused")
    written = {path.name for path in run.failures.iterdir()} - {"rank-00001.json"}
    assert all(name.endswith(".txt") and "/" not in name for name in written)


# Resuming


def try_to_resume(base: Path) -> str:
    """What `--dry-run` says, which looks at all that decides whether a run goes on."""
    before = tree(base)
    said = command(
        "run", DEMO, "launch.mpi=openmpi4", "--run-dir", base / "run", "--resume", "--dry-run",
        "--hosts", "localhost:4",
    )  # fmt: skip
    assert tree(base) == before
    return said.out


def test_a_dry_run_changes_nothing_of_what_has_finished(copies: Callable[[], Path]) -> None:
    assert "has finished already" in try_to_resume(copies())


@fuzz(10)
@given(st.data())
def test_resuming_from_damaged_records(copies: Callable[[], Path], data: st.DataObject) -> None:
    base = copies()
    chosen = [path for path in records(base) if path.parent.name == "run"]
    for path in data.draw(st.lists(st.sampled_from(chosen), min_size=1, max_size=3, unique=True)):
        path.write_bytes(data.draw(harm(path)))
    try_to_resume(base)


# Traces


def trace_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for rank in range(2):
        about: dict[str, Any] = {
            "rank": rank, "host": "n1", "pid": 10 + rank, "session": 5, "updates": [50, 51],
            "pings": [[1000, 2000], [3000, 4000]], "phases": [["forward", 5000, 6000]],
        }  # fmt: skip
        events = [
            {"ph": "X", "name": "op", "pid": 10 + rank, "tid": 1, "ts": 5.5, "dur": 1, "id": 3},
            {"ph": "M", "name": "process_labels", "pid": 10 + rank, "args": {"labels": "CPU"}},
            {"ph": "M", "name": "thread_name", "pid": 10 + rank, "tid": 1, "args": {"name": "x"}},
        ]
        trace = {"baseTimeNanoseconds": 4000, "traceEvents": events}
        (folder / f"rank-{rank:05d}.about.json").write_text(json.dumps(about))
        (folder / f"rank-{rank:05d}.json").write_text(json.dumps(trace))
    horovod = [
        {"name": "process_name", "ph": "M", "pid": 1,
         "args": {"name": "t", "start_time_since_epoch_in_micros": 4}},
        {"ph": "B", "name": "ALLREDUCE", "ts": 1, "pid": 1},
        {"ph": "E", "ts": 3, "pid": 1},
    ]  # fmt: skip
    (folder / "horovod-1.json").write_text(json.dumps(horovod))


@fuzz(30)
@given(st.data())
def test_damaged_traces(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    run = tmp_path_factory.mktemp("run")
    trace_files(run / "traces")
    for path in data.draw(
        st.lists(st.sampled_from(records(run)), min_size=1, max_size=3, unique=True)
    ):
        path.write_bytes(data.draw(harm(path)))
    before = tree(run)
    said = command("trace", run, "-o", run.parent / "merged.json")
    if said.code == 0:
        merged = json.loads((run.parent / "merged.json").read_text())
        assert isinstance(merged["traceEvents"], list)
    assert tree(run) == before


def test_nesting_and_events_without_an_end(tmp_path: Path) -> None:
    trace_files(tmp_path / "traces")
    (tmp_path / "traces" / "horovod-1.json").write_text('{"a":' * 100_000)
    (tmp_path / "traces" / "horovod-2.json").write_text('[{"a": "' + "x" * (1 << 23))
    said = command("trace", tmp_path)
    assert said.code == 0
    assert said.err.count("horovod-") == 2
