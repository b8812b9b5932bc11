"""Ranks that die under one supervisor: it starts them again, or gives the reason why not."""

from __future__ import annotations

import random
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
from jobs import (
    Job,
    assert_same_run,
    attempts,
    events,
    harness,
    identical,
    last_update,
    rank_processes,
    run_arguments,
    train,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.parallel(4)]

SETTINGS = (
    "batch={initial: 32, max: 256, micro: 8, growth: {policy: geometric, every: 2ep}}",
    "train={duration: 8ep, checkpoint_every: 7up, log_every: 1}",
    "launch.restart_pause=0",
)
UPDATES = 172


def supervised(run_dir: Path, ranks: int | None, *settings: str, restarts: int = 50) -> list[str]:
    return run_arguments(run_dir, ranks, *settings, restarts=restarts)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.long)])
def test_kills_under_one_supervisor_change_nothing(count: int, tmp_path: Path) -> None:
    train(tmp_path / "undisturbed", 4, *SETTINGS)
    directory = tmp_path / "run"
    choice = random.Random(6)
    kills = sorted(choice.sample(range(1, UPDATES - 30), count))
    victims = [choice.randrange(4) for _ in kills]
    with Job(directory, *supervised(directory, 4, *SETTINGS)) as job:
        for number, (update, victim) in enumerate(zip(kills, victims, strict=True), start=1):
            while attempts(directory) < number or last_update(directory) < update:
                assert job.process.poll() is None
                time.sleep(0.005)
            rank_processes(directory)[victim].send_signal(signal.SIGKILL)
        code, output = job.finish()
    assert code == 0, output
    assert_same_run(directory, tmp_path / "undisturbed")
    faults = events(directory, "fault")
    assert [event["rank"] for event in faults] == victims
    assert all("SIGKILL" in event["reason"] for event in faults)
    assert [event["restart"] for event in events(directory, "restart")] == list(range(1, count + 1))
    resumed = events(directory, "resume")
    assert len(resumed) == count
    # A checkpoint every 7 updates: no more than those since the last one are done again.
    assert all(0 <= event["updates_repeated"] <= 7 for event in resumed)
    assert all(event["start_seconds"] > 0 for event in resumed)


def test_ranks_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for launcher in ("horovodrun", "mpirun"):
        resume = ["--resume"] if attempts(directory) else []
        more = ("--launcher", launcher, *resume)
        words = [*supervised(directory, 2, "train.duration=900ep", *SETTINGS[2:]), *more]
        with Job(directory, *words) as job:
            job.wait_for_update(20)
            ranks = list(job.ranks.values())
            assert len(ranks) == 2
            job.process.kill()
            _, alive = psutil.wait_procs(ranks, timeout=60)
            assert alive == []


@pytest.mark.parametrize(
    "words",
    [
        ("--launcher", "mpirun"),
        pytest.param(("--launcher", "horovodrun"), marks=pytest.mark.long),
        pytest.param(("--launcher", "horovodrun", "comm.controller=gloo"), marks=pytest.mark.long),
    ],
)
def test_nor_does_one_that_stands_still(words: tuple[str, ...], tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Job(
        directory, *supervised(directory, 2, "train.duration=900ep", *SETTINGS[2:]), *words
    ) as job:
        job.wait_for_update(20)
        ranks = list(job.ranks.values())
        ranks[1].suspend()
        job.process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=90)
        assert alive == []


DIES = """
import os, signal
from torch import nn

class Dies(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 9 and os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
            {ending}
        return self.layer(x.flatten(1))

def net(num_classes):
    return Dies()
"""


@pytest.mark.parametrize(
    ("ending", "word"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        pytest.param(
            "raise RuntimeError('this GPU has fallen off the bus')",
            "fallen off the bus",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_crash_loop_stops_with_the_last_words(ending: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DIES.format(ending=ending))
    settings = ("model.name=dying:net", "train={duration: 4ep, checkpoint_every: 2ep}")
    directory = tmp_path / "run"
    done = harness(*supervised(directory, 2, *SETTINGS[::2], *settings), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stderr.splitlines()[-1]
    assert "3 launches in a row have died without a new checkpoint" in said
    assert "rank 1" in said
    assert word in said
    assert "--resume" in said
    assert "Traceback" not in done.stdout + done.stderr
    assert attempts(directory) == 3
    assert len(events(directory, "fault")) == 3


def test_what_would_end_in_the_same_way_is_not_started_again(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    settings = ("lr.base=1e30", "lr.warmup=null", "comm.compression=none")
    done = harness(*supervised(directory, 2, *SETTINGS, *settings))
    assert done.returncode == 1
    assert "lower lr.base" in done.stderr
    assert attempts(directory) == 1
    assert events(directory, "restart") == []


def test_a_port_in_use_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        words = supervised(directory, 2, "comm.backend=torch", *SETTINGS)
        done = harness(*words, "--launcher", "mpirun")
    assert done.returncode == 1
    assert "set another MASTER_PORT" in done.stderr
    assert "restart" not in done.stderr
    assert rank_processes(directory) == {}


def test_no_more_restarts_than_are_allowed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with Job(directory, *supervised(directory, 2, *SETTINGS, restarts=1)) as job:
        for number, update in ((1, 20), (2, 40)):
            while attempts(directory) < number or last_update(directory) < update:
                assert job.process.poll() is None
                time.sleep(0.005)
            rank_processes(directory)[1].send_signal(signal.SIGKILL)
        code, output = job.finish()
    assert code == 1
    assert "it has been restarted once, as often as is allowed" in output
    assert attempts(directory) == 2


def test_a_request_to_stop_between_two_launches_is_obeyed(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    settings = (*SETTINGS[:2], "launch.restart_pause=3600")
    with Job(directory, *supervised(directory, 2, *settings)) as job:
        job.wait_for_update(20)
        job.signal_rank(1, signal.SIGKILL)
        while not events(directory, "restart"):
            assert job.process.poll() is None
            time.sleep(0.05)
        job.process.send_signal(signal.SIGTERM)
        code, output = job.finish()
    assert code == 75, output
    assert "between two launches" in output


def test_ranks_do_not_grow_for_less_than_their_start_takes(tmp_path: Path) -> None:
    """The whole run takes less than a start, so it stays on one rank, and learns the same."""
    settings = (
        "comm={compression: none, summation: exact}",
        "batch={initial: 24, max: 96, micro: 24, growth: {policy: geometric, every: 1ep}}",
        "train={duration: 4ep, log_every: 1}",
    )
    found = {}
    for name, restart_seconds in (("weighed", "null"), ("grown", "0")):
        directory = tmp_path / name
        ranks = f"ranks={{start: 1, max: 4, threads: 1, restart_seconds: {restart_seconds}}}"
        done = harness(*supervised(directory, None, *settings, ranks))
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = weights(directory)
    merged = events(tmp_path / "weighed", "merged_segment")
    assert [event["ranks_wanted"] for event in merged] == [2, 4]
    assert all(event["seconds_saved"] < event["restart_seconds"] for event in merged)
    assert attempts(tmp_path / "weighed") == 1
    assert attempts(tmp_path / "grown") == 3
    assert identical(found["weighed"], found["grown"])
