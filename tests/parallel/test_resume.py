"""Killing real jobs and going on: nothing is lost but time."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from jobs import (
    Job,
    assert_same_run,
    events,
    harness,
    last_state,
    run_arguments,
    train,
)

# 172 updates of uneven last ones: 1,437 samples divide by none of these batches.
SETTINGS = (
    "batch={initial: 32, max: 256, micro: 8, growth: {policy: geometric, every: 2ep}}",
    "train={duration: 8ep, checkpoint_every: 7up, log_every: 1}",
)
UPDATES = 172


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train(directory, 2, *SETTINGS)
    assert last_state(directory)["update"] == UPDATES
    return directory


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_updates_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    choice = random.Random(2026)
    kills = sorted(choice.sample(range(1, UPDATES - 10), 20))
    for attempt, update in enumerate(kills):
        victim = choice.randrange(2)
        with Job(directory, *run_arguments(directory, 2, *SETTINGS, resume=attempt > 0)) as job:
            job.wait_for_update(update)
            job.signal_rank(victim, signal.SIGKILL)
            code, output = job.finish()
        assert code == 1, output
        assert f"rank {victim}" in output
        assert "SIGKILL" in output
    train(directory, 2, *SETTINGS, resume=True)
    assert_same_run(directory, undisturbed)
    assert len(events(directory, "resume")) == 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_ends_in_a_checkpoint_and_exit_code_75(
    number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    with Job(directory, *run_arguments(directory, 2, *SETTINGS)) as job:
        job.wait_for_update(30)
        job.process.send_signal(number)
        code, output = job.finish()
    assert code == 75, output
    stopped_at = events(directory, "stop")[-1]["update"]
    assert last_state(directory)["update"] == stopped_at
    train(directory, 2, *SETTINGS, resume=True)
    # The stop's own checkpoint is one more than the undisturbed run has; all else is the same.
    extra = [r for r in events(directory, "checkpoint") if r["update"] == stopped_at]
    assert len(extra) == 1
    without_checkpoint_events(directory)
    reference = copy_without_checkpoint_events(undisturbed, tmp_path / "reference")
    assert_same_run(directory, reference)


def without_checkpoint_events(directory: Path) -> None:
    path = directory / "events.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"kind":"checkpoint"' not in line]
    path.write_text("\n".join(kept) + "\n")


def copy_without_checkpoint_events(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    without_checkpoint_events(target)
    return target


@pytest.mark.slow
def test_a_broken_newest_checkpoint_is_passed_over(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Job(directory, *run_arguments(directory, 2, *SETTINGS)) as job:
        job.wait_for_update(40)
        job.signal_rank(0, signal.SIGKILL)
        job.finish()
    newest = max((directory / "checkpoints").glob("*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train(directory, 2, *SETTINGS, resume=True)
    assert_same_run(directory, undisturbed)
    rejected = events(directory, "checkpoint_rejected")
    assert [event["file"] for event in rejected] == [newest.name]


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    train(directory, 2, *SETTINGS, resume=True)
    assert_same_run(directory, undisturbed)


@pytest.mark.slow
def test_resume_refuses_another_configuration(undisturbed: Path) -> None:
    done = harness(*run_arguments(undisturbed, 2, *SETTINGS, "lr.base=0.02", resume=True))
    assert done.returncode == 2
    assert "lr.base: 0.01 → 0.02" in done.stderr
