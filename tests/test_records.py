"""The run directory: its lock, its JSON Lines, cutting them back, and replacing files whole."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.checkpoint import load_state, newest_valid
from harness.errors import RunDirectoryError
from harness.files import write_atomic
from harness.journal import Journal
from harness.jsonl import JsonlWriter, encode, read_jsonl, spread_lines, write_json
from harness.records import TRAJECTORY_EVENTS, Position, read_run, rewind
from harness.rundir import RunDirectory
from harness.runlock import RunLock, check_unlocked

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
records = st.dictionaries(st.text(max_size=8), values, max_size=4)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "run").mkdir()
    return RunDirectory(tmp_path / "run")


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict(text: bytes) -> Any:
    return json.loads(text, parse_constant=refuse_constant)


def finite(value: Any) -> Any:
    """What a record should read back as: no NaN, no infinity, lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


@given(records)
def test_a_record_is_one_line_of_strict_json(record: dict[str, Any]) -> None:
    line = encode(record)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    assert strict(line) == finite(record)


@given(values)
def test_a_json_file_holds_no_nan(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert strict(path.read_bytes()) == finite(value)


def test_a_missing_value_is_null_and_never_zero() -> None:
    assert encode({"a": math.nan, "b": [math.inf, -math.inf, 0.0]}) == (
        b'{"a":null,"b":[null,null,0.0]}\n'
    )


@given(st.lists(records, max_size=5))
def test_what_is_appended_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.unlink(missing_ok=True)
    for half in (entries[:2], entries[2:]):  # two attempts: the second goes on, it does not begin
        writer = JsonlWriter(path)
        for record in half:
            writer.append(record)
        writer.sync()
        writer.close()
    assert list(read_jsonl(path)) == [finite(record) for record in entries]


def test_a_line_goes_out_in_one_write(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = os.write

    def spy(fd: int, line: bytes) -> int:
        written.append(line)
        return write(fd, line)

    monkeypatch.setattr(os, "write", spy)
    JsonlWriter(run.metrics).append({"text": "x" * 100_000})
    assert len(written) == 1


def test_a_full_disk_is_an_error_with_the_file_s_name(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JsonlWriter(run.metrics)
    monkeypatch.setattr(os, "write", lambda fd, line: len(line) - 1)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        writer.append({"a": 1})


@pytest.mark.parametrize(
    "line",
    [b"{\n", b'{"a":1}', b"[1]\n", b"null\n", b"\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n",
     b'{"a":' + b"9" * 5000 + b"}\n"],
    ids=["cut", "without end", "list", "null", "empty", "bytes", "deep", "huge"],
)  # fmt: skip
def test_a_broken_line_is_none_and_keeps_its_place(run: RunDirectory, line: bytes) -> None:
    run.metrics.write_bytes(b'{"update":1}\n' + line)
    assert list(read_jsonl(run.metrics)) == [{"update": 1}, None]


def test_a_missing_file_has_no_lines(run: RunDirectory) -> None:
    assert list(read_jsonl(run.metrics)) == []


# Rewinding

kinds = st.sampled_from([*sorted(TRAJECTORY_EVENTS), "start", "resume", "stop", "restart", "fault"])
tails = st.sampled_from(
    [b"", b"{", b'{"kind":"evaluation"', b'{"kind":"end"}', b"\xff", b"\x00" * 9]
)


@given(
    st.lists(st.integers(), max_size=12),
    st.lists(kinds, max_size=12),
    st.integers(0, 14),
    st.integers(0, 14),
    st.integers(0, 14),
    tails,
    tails,
    tails,
)
def test_rewinding_keeps_exactly_what_the_position_says(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[int],
    events: list[str],
    metrics_kept: int,
    events_kept: int,
    layers_kept: int,
    metrics_tail: bytes,
    events_tail: bytes,
    layers_tail: bytes,
) -> None:
    run = RunDirectory(tmp_path_factory.getbasetemp())
    metrics = [encode({"update": i, "value": value}) for i, value in enumerate(lines)]
    entries = [{"kind": kind, "number": i, "lr": 0.1 * i} for i, kind in enumerate(events)]
    run.metrics.write_bytes(b"".join(metrics) + metrics_tail)
    run.events.write_bytes(b"".join(map(encode, entries)) + events_tail)
    layers = [encode({"update": i, "layers": [{"layer": "w"}] * i}) for i in range(len(lines))]
    run.layers.write_bytes(b"".join(layers) + layers_tail)
    wanted, seen = [], 0
    for entry in entries:
        seen += entry["kind"] in TRAJECTORY_EVENTS
        if entry["kind"] not in TRAJECTORY_EVENTS or seen <= events_kept:
            wanted.append(entry)
    for _ in range(2):  # the second time nothing is left to do
        rewind(run, Position(metrics_kept, events_kept, layers_kept))
        assert run.metrics.read_bytes() == b"".join(metrics[:metrics_kept])
        assert run.events.read_bytes() == b"".join(map(encode, wanted))
        assert run.layers.read_bytes() == b"".join(layers[:layers_kept])


def test_rewinding_what_is_not_there_creates_nothing(run: RunDirectory) -> None:
    rewind(run, Position(5, 5, 5))
    assert list(run.path.iterdir()) == []


def test_rewinding_to_the_start_leaves_what_happened_to_the_processes(run: RunDirectory) -> None:
    run.metrics.write_bytes(encode({"update": 1}))
    run.events.write_bytes(b"".join(encode({"kind": k}) for k in ("start", "stage", "evaluation")))
    rewind(run, Position())
    assert run.metrics.read_bytes() == b""
    assert list(read_jsonl(run.events)) == [{"kind": "start"}]


def test_a_checkpoint_from_before_there_were_layers_keeps_none(run: RunDirectory) -> None:
    run.layers.write_bytes(encode({"update": 1}))
    rewind(run, Position(metrics=0, events=0))
    assert run.layers.read_bytes() == b""


@given(st.data())
@pytest.mark.slow
def test_a_journal_that_is_killed_and_resumed_writes_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is recorded between which checkpoints, and wherever it is cut off."""
    run = RunDirectory(tmp_path_factory.mktemp("journal"))
    kinds = st.sampled_from(["metrics", "layers", "save"])
    script = data.draw(st.lists(kinds, max_size=14), label="script")
    at, position = 0, Position()
    while True:
        rewind(run, position)
        journal = Journal(run, True, 2, position)
        stop = data.draw(st.integers(at, len(script)), label="killed before")
        if data.draw(st.booleans(), label="not killed"):
            stop = len(script)
        for update in range(at, stop):
            if script[update] == "save":
                journal.save(update, update, {})
            else:
                getattr(journal, script[update])({"update": update})
        journal.close()
        if stop == len(script):
            break
        found = newest_valid(run.checkpoints, lambda *_: None)
        if found is not None:
            at, position = found.update + 1, Position(**load_state(found.content, "x")["records"])
    for path, kind in ((run.metrics, "metrics"), (run.layers, "layers")):
        wanted = [{"update": i} for i, entry in enumerate(script) if entry == kind]
        assert list(read_jsonl(path)) == wanted
    assert run.layers.exists() == ("layers" in script)


def test_a_second_resume_counts_the_lines_of_all_attempts(run: RunDirectory) -> None:
    position = Position()
    for attempt in range(3):
        rewind(run, position)
        journal = Journal(run, True, 5, position)
        for kept in (True, False):  # the second time after the checkpoint
            journal.metrics({"attempt": attempt, "kept": kept})
            journal.layers({"attempt": attempt, "kept": kept})
            if kept:
                journal.save(attempt, attempt, {})
        journal.close()
        found = newest_valid(run.checkpoints, lambda *_: None)
        assert found is not None
        position = Position(**load_state(found.content, "x")["records"])
        assert (position.metrics, position.layers) == (attempt + 1, attempt + 1)
    rewind(run, position)
    for path in (run.metrics, run.layers):
        assert list(read_jsonl(path)) == [{"attempt": i, "kept": True} for i in range(3)]


def test_only_rank_0_writes(run: RunDirectory) -> None:
    journal = Journal(run, False, 2, Position())
    journal.metrics({"update": 1})
    journal.layers({"update": 1})
    journal.save(1, 1, {})
    journal.close()
    assert list(run.path.iterdir()) == []


@given(st.integers(0, 40), st.integers(2, 9), tails)
def test_spread_lines_keep_the_ends_and_equal_distances(
    tmp_path_factory: pytest.TempPathFactory, total: int, at_most: int, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "spread.jsonl"
    path.write_bytes(b"".join(encode({"i": i}) for i in range(total)) + tail)
    lines, count = spread_lines(path, at_most)
    places = [line["i"] for line in lines if line is not None]
    assert count == total
    assert len(places) == len(lines) == min(total, at_most)
    if total:
        assert (places[0], places[-1]) == (0, total - 1 if len(places) > 1 else 0)
    distances = [b - a for a, b in itertools.pairwise(places)]
    assert not distances or max(distances) - min(distances) <= 1


def test_spread_lines_of_nothing_and_of_what_is_broken(run: RunDirectory) -> None:
    assert spread_lines(run.layers, 5) == ([], 0)
    run.layers.write_bytes(b'{"a":1}\n{\n{"b":2}\n')
    assert spread_lines(run.layers, 5) == ([{"a": 1}, None, {"b": 2}], 3)


def test_cut_records_are_fresh_files(run: RunDirectory) -> None:
    """So that a writer which still has the old ones open changes nothing."""
    files = (run.metrics, run.layers, run.events)
    for path in files:
        path.write_bytes(b'{"kind":"start"}\n' * 3)
    open_ones = [path.open("ab", buffering=0) for path in files]
    rewind(run, Position(metrics=2, layers=2))
    for path, file in zip(files, open_ones, strict=True):
        before = path.read_bytes()
        file.write(b"late\n")
        file.close()
        assert path.read_bytes() == before


# Replacing files


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_file_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, old: bytes, new: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "file"
    for content in (old, new):
        write_atomic(path, content)
        assert path.read_bytes() == content


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes | None, step: str
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == (
        {} if old is None else {"file": old}
    )


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace"])
def test_a_kill_leaves_the_old_bytes_or_the_new_ones(tmp_path: Path, moment: str) -> None:
    """The process dies at the moment it would flush or rename."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import os, pathlib, signal, sys\n"
        "from harness.files import write_atomic\n"
        f"{moment} = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(pathlib.Path(sys.argv[1]), b'new' * 100000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {bytes([byte]) * 500_000 for byte in range(4)}
    write_atomic(path, next(iter(contents)))
    code = (
        "import pathlib, sys\n"
        "from harness.files import write_atomic\n"
        "for i in range(40):\n"
        "    write_atomic(pathlib.Path(sys.argv[1]), bytes([i % 4]) * 500_000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        reads = 0
        while writer.poll() is None or reads == 0:
            assert path.read_bytes() in contents
            reads += 1
    assert writer.returncode == 0


# The lock

HOLD = """
import sys, pathlib
from harness.rundir import RunDirectory
from harness.runlock import RunLock
RunLock(RunDirectory(pathlib.Path(sys.argv[1]))).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(run: RunDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_excluded_and_told_who_holds_the_lock(run: RunDirectory) -> None:
    with holder(run) as process:
        message = rf"is in use by pid {process.pid} on \S+ since .*; wait for that run to end"
        with pytest.raises(RunDirectoryError, match=message):
            RunLock(run).acquire()
        with pytest.raises(RunDirectoryError, match=message):
            check_unlocked(run)


def test_the_lock_goes_with_a_killed_holder(run: RunDirectory) -> None:
    with holder(run) as process:
        process.kill()
        process.wait()
        with RunLock(run):
            check_holds(run)


def check_holds(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match=f"in use by pid {os.getpid()} "):
        RunLock(run).acquire()


def test_patience_waits_for_the_holder_to_go(run: RunDirectory) -> None:
    with holder(run) as process:
        code = f"import time, os; time.sleep(0.5); os.kill({process.pid}, 9)"
        with subprocess.Popen([sys.executable, "-c", code]):
            lock = RunLock(run)
            lock.acquire(patience=60.0)
            check_holds(run)
            lock.release()


def test_patience_ends(run: RunDirectory) -> None:
    with holder(run):
        begun = time.monotonic()
        with pytest.raises(RunDirectoryError, match="in use"):
            RunLock(run).acquire(patience=0.3)
        assert time.monotonic() - begun >= 0.3


def test_the_lock_can_be_taken_again(run: RunDirectory) -> None:
    lock = RunLock(run)
    for _ in range(3):
        with lock:
            check_holds(run)
    lock.release()  # once more does no harm
    check_unlocked(run)


def test_asking_for_the_lock_leaves_no_file(run: RunDirectory) -> None:
    check_unlocked(run)
    assert list(run.path.iterdir()) == []


def test_a_refused_lock_leaks_no_descriptor(run: RunDirectory) -> None:
    with RunLock(run):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            check_holds(run)
        assert len(os.listdir("/proc/self/fd")) == before


def test_what_waits_under_the_name_of_a_lock_is_left_as_it_is(
    run: RunDirectory, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (run.path / "lock").symlink_to(precious)
    with pytest.raises(RunDirectoryError, match="lock: cannot be opened: it is a link"):
        RunLock(run).acquire()
    assert precious.read_bytes() == b"precious"
    (run.path / "lock").unlink()
    os.mkfifo(run.path / "lock")
    with pytest.raises(RunDirectoryError, match="lock: cannot be locked: it is no regular file"):
        RunLock(run).acquire()


def test_a_lock_that_cannot_be_made_is_one_message(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunDirectoryError, match="lock: cannot be opened: No such file"):
        RunLock(RunDirectory(run.path / "gone")).acquire()

    def no_locks(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(RunDirectoryError, match="cannot be locked: No locks available; choose"):
        RunLock(run, needed=True).acquire()
    with RunLock(run):  # attempts are kept apart without it
        pass


def test_who_waited_for_a_lock_that_was_removed_does_not_hold_it(run: RunDirectory) -> None:
    """Its holder gives the directory up, and a third process makes the file anew."""
    first, second, third = RunLock(run), RunLock(run), RunLock(run)
    first.acquire()
    real = fcntl.flock
    taken = []

    def flock(fd: int, operation: int) -> None:
        if not taken:  # the second is about to take what the first one lets go of
            taken.append(fd)
            (run.path / "lock").unlink()
            first.release()
            third.acquire()
        real(fd, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        with pytest.raises(RunDirectoryError, match="is in use by pid"):
            second.acquire()
    third.release()


# May a run start here?


def test_an_empty_or_new_directory_is_usable(run: RunDirectory) -> None:
    run.check_usable(resume=False)
    RunDirectory(run.path / "new").check_usable(resume=False)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints"])
def test_a_directory_with_a_run_needs_resume(run: RunDirectory, name: str) -> None:
    (run.path / name).touch()
    assert run.holds_run
    with pytest.raises(
        RunDirectoryError, match="already holds a run; continue it with --resume or"
    ):
        run.check_usable(resume=False)


def test_resume_needs_a_run(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds no run to resume \(no config.yaml\)"):
        run.check_usable(resume=True)
    run.config.touch()
    run.check_usable(resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_is_no_run_directory(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="is not a directory; choose another --run-dir"):
        RunDirectory(tmp_path / "file").check_usable(resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_name_that_no_directory_can_have(tmp_path: Path, resume: bool) -> None:
    with pytest.raises(RunDirectoryError, match="cannot be used: File name too long"):
        RunDirectory(tmp_path / ("x" * 300)).check_usable(resume)


# Reading a run


def test_a_whole_run_is_read_without_problems(run: RunDirectory) -> None:
    run.config.write_text("name: x\n")
    write_json(run.provenance, {"host": "a"})
    write_json(run.plan, {"stages": []})
    run.metrics.write_bytes(encode({"update": 1}))
    run.events.write_bytes(encode({"kind": "start"}))
    found = read_run(run.path)
    assert (found.config, found.provenance, found.plan) == (
        {"name": "x"}, {"host": "a"}, {"stages": []}
    )  # fmt: skip
    assert (found.metrics, found.events) == ([{"update": 1}], [{"kind": "start"}])
    assert found.problems == []


@pytest.mark.parametrize("name", ["config.yaml", "provenance.json", "plan.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"\xff", b"{", b"[" * 5000, b"a: !!int ''", b"a: !!bool x", b"a: !!timestamp x",
     b"? [a]\n: b", b"!!python/object:os.system x"],
)  # fmt: skip
def test_a_broken_file_is_a_problem_in_words(run: RunDirectory, name: str, content: bytes) -> None:
    run.events.touch()
    (run.path / name).write_bytes(content)
    problems = [problem for problem in read_run(run.path).problems if problem.startswith(name)]
    assert len(problems) == 1
    assert "cannot be read: " in problems[0] or "is not a mapping" in problems[0]


def test_what_is_missing_or_broken_is_counted(run: RunDirectory) -> None:
    run.metrics.write_bytes(b'{"update":1}\n{broken\n{"update":2}\n{"upd')
    found = read_run(run.path)
    assert found.metrics == [{"update": 1}, {"update": 2}]
    assert found.problems == [
        "config.yaml is missing",
        "provenance.json is missing",
        "plan.json is missing",
        "metrics.jsonl: 2 of 4 lines are broken and left out",
        "events.jsonl is missing",
    ]


def test_a_directory_without_a_run_is_refused(run: RunDirectory) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        read_run(run.path)
    with pytest.raises(RunDirectoryError, match="is not a directory; give a run directory"):
        read_run(run.path / "gone")
