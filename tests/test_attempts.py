"""Attempts at a run: whatever an old one does when it comes back, a newer one is unharmed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.attempts import (
    FORMAT,
    Attempt,
    Draft,
    check_format,
    holder,
    launch_of,
    newest_launch,
    open_launch,
    retire_launches,
    show_launch,
)
from harness.checkpoint import load_state, newest_valid, set_aside
from harness.errors import HarnessError, RunDirectoryError, StorageError, Superseded
from harness.files import write_atomic
from harness.journal import Journal
from harness.jsonl import encode, read_jsonl
from harness.records import Position
from harness.rundir import ITEMS, RunDirectory

KEEP = 2


@dataclass
class Writer:
    """An attempt as rank 0 makes one, step by step: each ``yield`` is a place to be overtaken."""

    run: RunDirectory
    name: str
    updates: int = 4
    attempt: Attempt | None = None
    ended: HarnessError | None = None
    steps: list[str] = field(default_factory=list)

    def go(self) -> Iterator[str]:
        draft = Draft(self.run)
        try:
            yield "draft"
            update, position = 0, Position()
            with draft.making():
                found = newest_valid(draft.run.checkpoints, lambda *_: None)
                if found is not None:
                    set_aside(draft.run.checkpoints, found.update)
                    state = load_state(found.content, "x")
                    update, position = found.update, Position(**state["records"])
                draft.take_records(position)
                write_atomic(draft.run.config, b"name: x\n")
            yield "records"
            self.attempt = draft.commit()
        finally:
            draft.discard()
        yield "commit"
        journal = Journal(self.attempt.run, True, KEEP, position)
        journal.open(self.attempt)
        try:
            for number in range(update + 1, update + self.updates + 1):
                journal.event("stage", number, by=self.name)
                journal.metrics({"update": number, "by": self.name})
                journal.layers({"update": number, "by": self.name})
                yield "line"
                if number % 2 == 0:
                    journal.save(number, number, {"by": self.name, "w": torch.ones(3)})
                    yield "save"
        finally:
            journal.close()

    def finish(self, steps: Iterator[str] | None = None) -> Writer:
        """To the end, or to what ends it."""
        try:
            for step in steps or self.go():
                self.steps.append(step)
        except HarnessError as error:
            self.ended = error
        return self


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_whole(run: RunDirectory) -> None:
    """The run is one trajectory, every line once, and its newest checkpoint is its last save's."""
    newest = run.newest()
    for path in (newest.metrics, newest.layers):
        records = list(read_jsonl(path))
        assert None not in records
        assert [r["update"] for r in records if r] == list(range(1, len(records) + 1))
    stages = [r["update"] for r in read_jsonl(newest.events) if r and r["kind"] == "stage"]
    assert stages == list(range(1, len(stages) + 1))
    told = [r for r in read_jsonl(newest.events) if r and r["kind"] == "checkpoint"]
    rejected: list[object] = []
    found = newest_valid(newest.checkpoints, lambda *why: rejected.append(why))
    assert rejected == []
    if told:
        assert found is not None
        assert found.path.name == told[-1]["file"]


HOOKED = (
    "open", "write", "fsync", "rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir",
    "listdir", "readlink", "lstat",
)  # fmt: skip


@contextmanager
def overtaken(monkeypatch: pytest.MonkeyPatch, at: int, by: Callable[[], object]) -> Iterator[Any]:
    """Before system call number ``at`` that this thread makes, let ``by`` happen."""
    state = {"calls": 0, "busy": False}

    def hook(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if not state["busy"]:
                if state["calls"] == at:
                    state["busy"] = True
                    by()
                    state["busy"] = False
                state["calls"] += 1
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in HOOKED:
            patch.setattr(os, name, hook(name))
        yield state


def begun(path: Path, kind: str) -> RunDirectory:
    """A directory in which an attempt may begin."""
    run = RunDirectory(path)
    path.mkdir()
    if kind == "fresh":
        return run
    Writer(run, "first").finish()
    if kind == "copied":  # as by cp -rL; or from before attempts had folders
        copy = path.with_name(f"{path.name}-copy")
        copy.mkdir()
        for name in ITEMS:
            item = path / name
            if item.is_dir():
                shutil.copytree(item, copy / name)
            elif item.exists():
                shutil.copyfile(item, copy / name)
        return RunDirectory(copy)
    return run


def calls_of(monkeypatch: pytest.MonkeyPatch, run: RunDirectory) -> int:
    with overtaken(monkeypatch, -1, lambda: None) as state:
        Writer(run, "old").finish()
    return int(state["calls"])


# The law


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fresh", "resumed", "copied"])
@pytest.mark.parametrize("each", [11, pytest.param(1, marks=pytest.mark.long)])
def test_frozen_before_any_system_call_an_old_attempt_harms_no_newer_one(
    each: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer attempt does all of its work while the old one sleeps; then that wakes up."""
    calls_of(monkeypatch, begun(tmp_path / "first", kind))  # what it imports is calls, too
    total = calls_of(monkeypatch, begun(tmp_path / "count", kind))
    assert total > 100
    outcomes = set()
    for at in range(0, total, each):
        run = begun(tmp_path / str(at), kind)
        old, new = Writer(run, "old"), Writer(run, "new")
        kept: dict[str, bytes] = {}

        def overtake(run: RunDirectory = run, new: Writer = new, kept: Any = kept) -> None:
            new.finish()
            kept.update(contents(run.newest().place or run.path))

        with overtaken(monkeypatch, at, overtake):
            old.finish()
        outcomes.add((type(old.ended), type(new.ended)))
        check_whole(run)
        if new.ended is None and old.ended is not None:
            assert contents(run.newest().place or run.path) == kept, at
        elif new.ended is None:  # frozen before its first look, it goes on from the new one
            assert run.newest().metrics.read_bytes().startswith(kept["metrics.jsonl"]), at
        third = Writer(run, "third").finish()
        assert third.ended is None, at
        check_whole(run)
        shutil.rmtree(tmp_path / str(at))
    assert (Superseded, type(None)) in outcomes


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(["fresh", "resumed", "copied"]),
    at=st.integers(0, 400),
    pause=st.integers(0, 12),
)
def test_attempts_that_overtake_each_other_half_way(
    kind: str,
    at: int,
    pause: int,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The newer one does a part of its work, the old one wakes up and ends, the newer one goes
    on. One of them goes on to its end, and what the run then holds is whole."""
    run = begun(tmp_path_factory.mktemp("run") / "r", kind)
    old, new = Writer(run, "old"), Writer(run, "new")
    steps = new.go()

    def overtake() -> None:
        new.finish(itertools.islice(steps, pause + 1))

    with overtaken(monkeypatch, at, overtake):
        old.finish()
    if new.ended is None:
        new.finish(steps)
    winners = [writer for writer in (old, new) if writer.ended is None]
    assert winners, (old.ended, new.ended)
    assert not any(isinstance(w.ended, StorageError) for w in (old, new)), (old.ended, new.ended)
    check_whole(run)
    last = list(read_jsonl(run.newest().metrics))[-1]
    assert last is not None
    assert last["by"] in {writer.name for writer in winners}
    assert Writer(run, "third").finish().ended is None
    check_whole(run)


def test_an_old_attempt_ends_with_the_number_and_the_holder_of_the_newer_one(
    tmp_path: Path,
) -> None:
    run = begun(tmp_path / "r", "fresh")
    old = Writer(run, "old", updates=6)
    steps = old.go()
    while next(steps) != "save":
        pass
    new = Writer(run, "new").finish()
    old.finish(steps)
    assert isinstance(old.ended, Superseded)
    assert old.ended.exit_code == 76
    said = f"attempt 1 ends, as attempt 2 (pid {os.getpid()} on "
    assert said in str(old.ended)
    assert new.ended is None
    last = [r["by"] for r in read_jsonl(run.metrics) if r]
    assert last == ["old", "old", "new", "new", "new", "new"]


def test_what_an_old_attempt_has_led_astray_is_set_right_and_never_believed(
    tmp_path: Path,
) -> None:
    run = begun(tmp_path / "r", "resumed")
    new = Writer(run, "new")
    steps = new.go()
    while next(steps) != "line":
        pass
    for name in ITEMS:  # as a rename that was frozen for long
        with suppress(FileNotFoundError):
            (run.path / name).unlink()
            (run.path / name).symlink_to(f"attempts/00000001/{name}")
    assert not run.metrics.exists()
    assert len(list(read_jsonl(run.newest().metrics))) == 5
    while next(steps) != "save":
        pass
    assert len(list(read_jsonl(run.metrics))) == 6
    new.finish(steps)


# Who begins


def test_of_many_that_begin_at_once_one_goes_on(tmp_path: Path) -> None:
    """Without any lock: as on file systems that have none."""
    for kind, number in (("fresh", 1), ("resumed", 2)):
        run = begun(tmp_path / kind, kind)
        drafts = [Draft(run) for _ in range(6)]
        for draft in drafts:
            draft.take_records(Position())
            write_atomic(draft.run.config, b"name: x\n")
        barrier, done, refused = threading.Barrier(len(drafts)), [], []

        def commit(
            draft: Draft, barrier: Any = barrier, done: Any = done, refused: Any = refused
        ) -> None:
            barrier.wait()
            try:
                done.append(draft.commit())
            except RunDirectoryError as error:
                refused.append(str(error))
            finally:
                draft.discard()

        threads = [threading.Thread(target=commit, args=(draft,)) for draft in drafts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [attempt.number for attempt in done] == [number]
        assert len(refused) == 5
        assert all(f"is in use by pid {os.getpid()} on " in said for said in refused)
        assert sorted(path.name for path in run.attempts.iterdir()) == [f"{number:08d}"]
        done[0].check()


def test_a_fresh_run_does_not_go_on_with_one_that_has_begun_meanwhile(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "resumed")
    before = contents(run.path)
    with pytest.raises(RunDirectoryError, match=f"is in use by pid {os.getpid()} on "):
        Draft(run, fresh=True)
    assert contents(run.path) == before


def test_a_draft_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "fresh")
    Draft(run).discard()
    assert list(run.path.iterdir()) == []
    run = begun(tmp_path / "s", "resumed")
    before = contents(run.path)
    draft = Draft(run)
    draft.take_records(Position())
    draft.discard()
    draft.discard()
    assert contents(run.path) == before


def test_an_answer_that_was_lost_counts_as_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server has renamed, its answer is lost, and the client asks once more."""
    run = begun(tmp_path / "r", "fresh")
    draft = Draft(run)
    write_atomic(draft.run.config, b"name: x\n")
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).parent == run.attempts:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(source))

    monkeypatch.setattr(os, "rename", rename)
    attempt = draft.commit()
    assert attempt.number == 1
    attempt.check()


# What a new attempt takes over


def test_nothing_older_is_lost(tmp_path: Path) -> None:
    """All checkpoints up to the one that it goes on from, and what people have put there."""
    run = begun(tmp_path / "r", "resumed")
    (run.checkpoints / "best.pt").write_bytes(b"mine")
    (run.checkpoints / "notes").mkdir()
    (run.checkpoints / "notes" / "a").write_text("b")
    (run.checkpoints / ".update-00000009.pt.1.tmp").write_bytes(b"half")
    names = {path.name for path in run.checkpoints.iterdir()} - {".update-00000009.pt.1.tmp"}
    draft = Draft(run)
    assert {path.name for path in draft.run.checkpoints.iterdir()} == names
    assert (draft.run.checkpoints / "notes" / "a").read_text() == "b"
    draft.discard()
    assert Writer(run, "new").finish().ended is None
    assert (run.checkpoints / "best.pt").read_bytes() == b"mine"


def test_a_checkpoint_that_is_passed_over_is_kept_under_another_name(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "resumed")
    (run.checkpoints / "update-00000004.pt").write_bytes(b"of a newer version, perhaps")
    Writer(run, "new", updates=1).finish()
    found = newest_valid(run.checkpoints, lambda *_: None)
    assert found is not None
    assert found.update == 2
    kept = run.checkpoints / "update-00000004.pt.rejected"
    assert kept.read_bytes() == b"of a newer version, perhaps"
    assert [r["by"] for r in read_jsonl(run.metrics) if r] == ["first", "first", "new"]


def test_without_hard_links_checkpoints_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "r", "resumed")

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    assert Writer(run, "new").finish().ended is None
    check_whole(run)


def test_without_symbolic_links_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "r", "fresh")

    def symlink(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", symlink)
    with pytest.raises(RunDirectoryError, match="r: its file system has no symbolic links; choose"):
        Draft(run)
    assert list(run.path.iterdir()) == []


def test_one_attempt_s_folder_is_all_that_is_left(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "resumed")
    (run.attempts / ".new-00000002-0123abcd").mkdir()  # of one that died as it began
    (run.attempts / ".new-00000007-0123abcd").mkdir()  # of one that is about to begin
    (run.attempts / ".old-00000001-0123abcd").mkdir()
    for _ in range(3):
        assert Writer(run, "new").finish().ended is None
    assert sorted(path.name for path in run.attempts.iterdir()) == [
        ".new-00000007-0123abcd",
        "00000004",
    ]


def test_a_directory_from_before_attempts_had_folders_goes_on(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "copied")
    assert run.newest().place is None
    assert run.holds_run
    before = contents(run.path)
    assert Writer(run, "new").finish().ended is None
    assert run.newest().place == run.attempts / "00000001"
    assert run.metrics.read_bytes().startswith(before["metrics.jsonl"])
    assert (run.path / "checkpoints").is_symlink()
    check_whole(run)


def test_a_file_that_was_put_in_place_of_a_link_counts(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "resumed")
    edited = run.metrics.read_bytes().replace(b"first", b"edits")
    run.metrics.unlink()
    run.metrics.write_bytes(edited)
    assert Writer(run, "new", updates=1).finish().ended is None
    by = [r["by"] for r in read_jsonl(run.metrics) if r]
    assert by == ["edits"] * 4 + ["new"]


# Formats


def test_records_of_a_newer_format_are_refused_by_version(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "resumed")
    check_format(run)
    mark = run.attempts / "00000001" / "attempt.json"
    told = json.loads(mark.read_text())
    assert told["format"] == FORMAT
    mark.write_text(json.dumps(told | {"format": FORMAT + 1, "version": "9.9"}))
    with pytest.raises(
        RunDirectoryError, match=rf"are in format {FORMAT + 1}, written by version 9\.9; .* go on"
    ):
        check_format(run)
    mark.write_text("{")  # says nothing, and the records speak for themselves
    check_format(run)
    check_format(RunDirectory(tmp_path / "nowhere"))


# What fails


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "mounted for writing"),
        (errno.EIO, "look after its file system"),
    ],
)
def test_what_cannot_be_written_ends_the_run_with_what_to_do(
    number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any write, also in a checkpoint; nothing older is lost, and it goes on later."""
    for name in ("write", "fsync"):
        run = begun(tmp_path / name, "resumed")
        before = list(read_jsonl(run.metrics))
        new = Writer(run, "new", updates=4)
        steps = new.go()
        while next(steps) != "line":
            pass

        def fail(fd: int, *_: object) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            new.finish(steps)
        assert isinstance(new.ended, StorageError)
        assert new.ended.exit_code == 74
        assert advice in str(new.ended)
        assert list(read_jsonl(run.metrics))[:4] == before
        assert Writer(run, "third").finish().ended is None
        check_whole(run)


def test_a_directory_that_is_removed_under_way_is_no_traceback(tmp_path: Path) -> None:
    run = begun(tmp_path / "r", "resumed")
    new = Writer(run, "new")
    steps = new.go()
    while next(steps) != "line":
        pass
    shutil.rmtree(run.path)
    new.finish(steps)
    assert isinstance(new.ended, StorageError)
    assert "was moved, removed or unmounted while the run went on" in str(new.ended)


def test_a_full_disk_as_it_begins_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(tmp_path / "r", "resumed")
    before = contents(run.path)

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        new = Writer(run, "new").finish()
    assert isinstance(new.ended, StorageError)
    assert contents(run.path) == before


# Launching processes


def test_each_launching_process_has_a_folder_of_its_own(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.failures.mkdir()
    (run.failures / "rank-00001.txt").write_text("of old")
    first, second = open_launch(run), open_launch(run)
    assert first.stop_relay != second.stop_relay
    first.stop_relay.touch()
    assert not second.stop_relay.exists()
    assert newest_launch(run) == second
    show_launch(second, second.failures)
    (second.failures / "rank-00000.json").touch()
    assert (run.failures / "rank-00000.json").exists()
    retire_launches(second)
    assert [path.name for path in run.launches.iterdir()] == ["00000002"]
    draft = Draft(second)
    write_atomic(draft.run.config, b"name: x\n")
    draft.commit()
    assert launch_of(run.newest()) == "00000002"
    assert holder(run).startswith(f"pid {os.getpid()} on ")


def test_ranks_of_a_launch_that_slept_before_it_started_them_take_nothing_over(
    tmp_path: Path,
) -> None:
    run = begun(tmp_path / "r", "resumed")
    asleep, awake = open_launch(run), open_launch(run)
    for number in (2, 3):  # its own attempts are no reason to end
        draft = Draft(awake, before=1)
        write_atomic(draft.run.config, b"name: x\n")
        assert draft.commit().number == number
    before = contents(run.attempts)
    with pytest.raises(Superseded, match=r"this launch ends, as pid .* has taken the run over"):
        Draft(asleep, before=1)
    assert contents(run.attempts) == before
    Draft(open_launch(run), before=3).discard()


def test_lines_from_elsewhere_are_not_doubled_by_an_old_descriptor(tmp_path: Path) -> None:
    """An old attempt's open file is no longer the one that has the name."""
    run = begun(tmp_path / "r", "resumed")
    fd = os.open(run.metrics, os.O_WRONLY | os.O_APPEND)
    Writer(run, "new").finish()
    before = run.metrics.read_bytes()
    os.write(fd, encode({"update": 5, "by": "old"}))
    os.close(fd)
    assert run.metrics.read_bytes() == before
