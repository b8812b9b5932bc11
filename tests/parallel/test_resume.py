"""Killing real jobs and going on: nothing is lost but time."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from jobs import (
    Job,
    assert_same_run,
    events,
    harness,
    identical,
    last_state,
    rank_processes,
    run_arguments,
    train,
    weights,
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
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.long)])
def test_kills_at_random_updates_change_nothing(
    count: int, undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    choice = random.Random(2026)
    kills = sorted(choice.sample(range(1, UPDATES - 30), count))
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
    assert len(events(directory, "resume")) == count


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
    directory = tmp_path / "run"
    shutil.copytree(undisturbed, directory)
    train(directory, 2, *SETTINGS, resume=True)
    assert_same_run(directory, undisturbed)


@pytest.mark.slow
def test_resume_refuses_another_configuration(undisturbed: Path) -> None:
    done = harness(*run_arguments(undisturbed, 2, *SETTINGS, "lr.base=0.02", resume=True))
    assert done.returncode == 2
    assert "lr.base: 0.01 → 0.02" in done.stderr


BATCH_NORM = """
from torch import nn

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(),
        nn.BatchNorm2d(4, momentum=None), nn.Flatten(), nn.Linear(4 * 49, num_classes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_batch_norm_statistics_survive_too(number: signal.Signals, tmp_path: Path) -> None:
    """Ranks with 2 and 1 micro-batches an update, evaluated with the mean of their statistics."""
    (tmp_path / "mine.py").write_text(BATCH_NORM)
    settings = ("batch={initial: 24, micro: 8}", "batch.growth.policy=fixed", *SETTINGS[1:])
    settings += ("model.name=mine:net", "train.duration=3ep")
    reference, directory = tmp_path / "reference", tmp_path / "run"
    whole = harness(*run_arguments(reference, 2, *settings), cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    with Job(directory, *run_arguments(directory, 2, *settings), cwd=tmp_path) as job:
        job.wait_for_update(90)
        job.signal_rank(1, number)
        code, output = job.finish()
    assert code == (1 if number == signal.SIGKILL else 75), output
    again = harness(*run_arguments(directory, 2, *settings, resume=True), cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    without_checkpoint_events(directory)
    assert_same_run(directory, copy_without_checkpoint_events(reference, tmp_path / "copy"))


@pytest.mark.slow
def test_a_stop_request_during_start_up_is_not_lost(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Job(directory, *run_arguments(directory, 2, *SETTINGS)) as job:
        while not rank_processes(directory):
            assert job.process.poll() is None
        job.process.send_signal(signal.SIGTERM)
        code, output = job.finish()
    assert code == 75, output
    assert last_state(directory)["update"] < UPDATES


@pytest.mark.slow
@pytest.mark.long
def test_killed_in_a_later_segment_it_goes_on_with_the_ranks_of_late(tmp_path: Path) -> None:
    growing = (
        "comm={compression: none, summation: exact}",
        "batch={initial: 24, max: 96, micro: 24, growth: {policy: geometric, every: 2ep}}",
        "train={duration: 6ep, checkpoint_every: 5up, log_every: 1}",
        "ranks.start=1",
    )
    train(tmp_path / "one", 1, *growing)
    directory = tmp_path / "grown"
    arguments = run_arguments(directory, None, *growing, "ranks={start: 1, max: 4, threads: 1}")
    with Job(directory, *arguments) as job:
        while job.process.poll() is None and 3 not in rank_processes(directory):
            pass
        job.signal_rank(3, signal.SIGKILL)
        assert job.finish()[0] == 1
    done = harness(*arguments, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["ranks"] for event in events(directory, "resume")][-1] == 4
    assert identical(weights(directory), weights(tmp_path / "one"))


@pytest.mark.slow
def test_of_two_runs_that_race_for_a_directory_one_wins_undisturbed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    arguments = run_arguments(directory, 1, "train.duration=2ep")
    with Job(directory, *arguments) as one, Job(directory, *arguments) as two:
        ends = [one.finish(), two.finish()]
    assert sorted(code for code, _ in ends) == [0, 2], ends
    assert len(events(directory, "end")) == 1
    loser = next(output for code, output in ends if code == 2)
    assert "in use" in loser or "already holds a run" in loser
