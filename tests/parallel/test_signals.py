"""Signals to one rank or to all, at any moment: a stop with a checkpoint, and nothing is lost."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jobs import (
    Job,
    attempts,
    identical,
    last_state,
    last_update,
    metrics,
    rank_processes,
    run_arguments,
    train,
    trajectory,
)

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

SETTINGS = (
    "batch={initial: 32, max: 128, micro: 16, growth: {policy: geometric, every: 2ep}}",
    "train={duration: 3ep, eval_every: 1ep, checkpoint_every: 3up, log_every: 1}",
    "launch.restart_pause=0",
)
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train(directory, 2, *SETTINGS)
    return directory


def assert_nothing_lost(directory: Path, reference: Path) -> None:
    """The same run, but for the checkpoints that a stop makes."""
    ours, theirs = last_state(directory), last_state(reference)
    for key in ("model", "optimizer", "reducer", "growth", "samples_seen", "update"):
        assert identical(ours[key], theirs[key]), key
    assert metrics(directory) == metrics(reference)
    events, wanted = (
        [event for event in trajectory(run) if event["kind"] != "checkpoint"]
        for run in (directory, reference)
    )
    assert events == wanted


def begun(directory: Path) -> bool:
    return (directory / "config.yaml").exists()


def go_on(directory: Path) -> None:
    train(directory, 2, *SETTINGS, resume=begun(directory))


def wait_until(job: Job, condition: Callable[[], object]) -> None:
    while not condition():
        assert job.process.poll() is None, job.finish()[1]
        time.sleep(0.002)


def up(directory: Path, ranks: int = 2) -> list[psutil.Process]:
    """Ranks that have come so far that they listen: their Python has begun to import torch."""
    listening = []
    for process in rank_processes(directory).values():
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGUSR2 - 1) & 1:
            listening.append(process)
    return listening if len(listening) == ranks else []


@pytest.mark.parametrize(
    ("number", "everyone"),
    [
        (signal.SIGTERM, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR2, False, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.long),
    ],
)
def test_a_signal_while_ranks_start_stops_them_with_a_checkpoint(
    number: signal.Signals, everyone: bool, undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    with Job(directory, *run_arguments(directory, 2, *SETTINGS)) as job:
        wait_until(job, lambda: up(directory))
        for process in up(directory)[0 if everyone else 1 :]:
            process.send_signal(number)
        code, output = job.finish()
    assert code == 75, output
    assert last_update(directory) == 1
    assert "Traceback" not in output
    go_on(directory)
    assert_nothing_lost(directory, undisturbed)


def in_checkpoint(directory: Path) -> bool:
    return any((directory / "checkpoints").glob(".update-*.tmp"))


def in_evaluation(directory: Path) -> bool:
    """An evaluation has been made, or is: it follows the epoch's last line of metrics at once."""
    return last_update(directory) >= 45


@pytest.mark.long
@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("moment", [in_checkpoint, in_evaluation])
@pytest.mark.parametrize("backend", ["horovod", "torch"])
def test_a_signal_inside_a_checkpoint_or_an_evaluation(
    number: signal.Signals,
    moment: Callable[[Path], bool],
    backend: str,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "run"
    train(tmp_path / "undisturbed", 2, *SETTINGS, f"comm.backend={backend}")
    words = run_arguments(directory, 2, *SETTINGS, f"comm.backend={backend}")
    with Job(directory, *words) as job:
        wait_until(job, lambda: moment(directory))
        job.signal_rank(0, number)
        code, output = job.finish()
    assert code == 75, output
    train(directory, 2, *SETTINGS, f"comm.backend={backend}", resume=True)
    assert_nothing_lost(directory, tmp_path / "undisturbed")


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(3))
def test_signals_at_random_moments(seed: int, undisturbed: Path, tmp_path: Path) -> None:
    """From the first process on; what a signal ends before it listens, has done nothing yet."""
    choice = random.Random(seed)
    directory = tmp_path / "run"
    codes = []
    for _ in range(12):
        words = run_arguments(directory, 2, *SETTINGS, resume=begun(directory))
        with Job(directory, *words) as job:
            wait = time.monotonic() + choice.uniform(0.0, 8.0)
            while time.monotonic() < wait and job.process.poll() is None:
                time.sleep(0.002)
            victims = list(rank_processes(directory).values())
            if choice.random() < 0.5:
                victims = victims[:1] if choice.random() < 0.5 else victims[1:]
            number = choice.choice(NUMBERS)
            for process in victims:
                try:
                    process.send_signal(number)
                except psutil.NoSuchProcess:
                    continue
            code, output = job.finish()
        codes.append(code)
        assert code in (0, 1, 75), output
        assert "Traceback" not in output
        if code == 1:
            # One that had not begun to listen.
            assert number.name in output, output
        if code == 0:
            break
    if codes[-1] != 0:
        go_on(directory)
    assert attempts(directory) >= 1
    assert_nothing_lost(directory, undisturbed)
