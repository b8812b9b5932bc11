"""Ranks that come and go under the real horovodrun: no sample is lost, none is counted twice.

Exact summation makes the final weights the same to the last bit on any number of ranks, so equality
with a run that nobody disturbed says that every update had its samples, once. What a test waits for
it waits for by what the run has written, and a run that might end before that is held back by a
brake: a file that makes every pass of the model take its time.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from jobs import (
    CONFIG,
    Job,
    command,
    events,
    harness,
    identical,
    last_state,
    last_update,
    lines,
    metrics,
    rank_processes,
    run_arguments,
    trajectory,
    weights,
)
from support import require, require_ranks
from testbed import Testbed, missing_for_testbed

from launch import elastic
from launch.spec import Host, LaunchSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = """
import time
from pathlib import Path
from torch import nn

class Brake(nn.Module):
    def forward(self, images):
        if Path("brake").exists():
            time.sleep(0.05)
        return images

def net(num_classes):
    return nn.Sequential(
        Brake(), nn.Conv2d(1, 4, 3, stride=4), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 49, num_classes))
"""
# 1,437 samples divide by none of these batches, so the epochs' last updates are uneven.
SETTINGS = (
    "model.name=mine:net",
    "comm={compression: none, summation: exact, controller: gloo}",
    "batch={initial: 24, max: 96, micro: 12, growth: {policy: geometric, every: 3ep}}",
    "train={duration: 9ep, checkpoint_every: 20up, log_every: 1}",
    "ranks={start: 1, max: 2, threads: 1, restart_seconds: 0}",
)
ONE, OTHER = Host("localhost", 1), Host("127.0.0.1", 1)


class ElasticJob:
    """horovodrun in its elastic mode; leaving the ``with`` block ends whatever is left of it."""

    def __init__(
        self,
        run_dir: Path,
        hosts: Sequence[Host],
        ranks: int,
        settings: Sequence[str] = SETTINGS,
        resume: bool = False,
    ) -> None:
        self.run_dir, self.folder = run_dir, run_dir / "elastic"
        run_dir.mkdir(exist_ok=True)
        script = elastic.write_discovery(self.folder, hosts, ranks)
        words = command("train", CONFIG, *settings, "--run-dir", run_dir)
        spec = LaunchSpec(
            ranks,
            tuple(hosts),
            tuple([*words, "--resume"] if resume else words),
            controller="gloo",
            interfaces=("lo",),
        )
        self.output = run_dir.with_name(f"{run_dir.name}.log").open("a+")
        self.process = subprocess.Popen(
            elastic.arguments(spec, 1, 2, script),
            cwd=run_dir.parent,
            env={**os.environ, **elastic.variables(1, 2, self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> ElasticJob:
        return self

    def __exit__(self, *error: object) -> None:
        left = list(rank_processes(self.run_dir).values())
        if self.process.poll() is None:
            left += psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=60)
        self.process.wait()
        self.output.close()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)

    def wait_for_ranks(self, ranks: int) -> None:
        """Return when a world of that many ranks has begun to train, after it did an update."""
        self.wait_until(lambda: worlds(self.run_dir)[-1:] == [ranks])
        begun = last_resumed(self.run_dir)
        self.wait_until(lambda: last_update(self.run_dir) > begun)

    def finish(self) -> int:
        return self.process.wait(300)

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read()


def worlds(run_dir: Path) -> list[int]:
    """Ranks of each world, in order."""
    if not (run_dir / "events.jsonl").exists():
        return []
    begun = [r for r in lines(run_dir / "events.jsonl") if r["kind"] in ("start", "resume")]
    return [event["ranks"] for event in begun]


def last_resumed(run_dir: Path) -> int:
    begun = [r for r in lines(run_dir / "events.jsonl") if r["kind"] in ("start", "resume")]
    return int(begun[-1]["update"])


def assert_same_training(run_dir: Path, reference: Path) -> None:
    """As the reference to the last bit, but for who computed it and when it was saved."""
    assert identical(weights(run_dir), weights(reference))
    assert identical(last_state(run_dir)["optimizer"], last_state(reference)["optimizer"])
    which = ("update", "samples_seen", "epoch", "stage", "global_batch", "lr", "momentum")
    ours, theirs = metrics(run_dir), metrics(reference)
    assert [[r[key] for key in which] for r in ours] == [[r[key] for key in which] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-6)
    by_whom = {"ranks", "accumulation", "loss"}
    ours, theirs = (
        [
            {key: value for key, value in event.items() if key not in by_whom}
            for event in trajectory(directory)
            if event["kind"] != "checkpoint"
        ]
        for directory in (run_dir, reference)
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole training in one process."""
    require_ranks()
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "mine.py").write_text(MODEL)
    done = harness("train", CONFIG, *SETTINGS, "--run-dir", folder / "run", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture
def place(undisturbed: Path, tmp_path: Path) -> Path:
    """A folder to start ranks in."""
    shutil.copy(undisturbed.parent / "mine.py", tmp_path)
    return tmp_path


def test_growth_in_place_is_the_growth_of_a_restart(undisturbed: Path, place: Path) -> None:
    with ElasticJob(place / "run", [Host("localhost", 2)], ranks=1) as job:
        job.wait_until(lambda: worlds(job.run_dir) == [1])
        first = rank_processes(job.run_dir)[0].pid
        assert job.finish() == 0, job.said()
    # Rank 0 of the last world, who held the lock, is the process that began alone.
    assert (place / "run" / "lock").read_text().startswith(f"pid {first} on ")
    assert_same_training(place / "run", undisturbed)
    restarted = harness(*run_arguments(place / "restarted", None, *SETTINGS), cwd=place)
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    assert metrics(place / "run") == metrics(place / "restarted")
    assert trajectory(place / "run") == trajectory(place / "restarted")
    assert worlds(place / "run") == worlds(place / "restarted") == [1, 2]
    assert not events(place / "run", "stop")
    assert events(place / "run", "regroup")[0]["reason"] == "stage 1 wants 2 ranks"


def test_a_host_that_comes_and_goes_changes_nothing(undisturbed: Path, place: Path) -> None:
    (place / "brake").touch()
    with ElasticJob(place / "run", [ONE], ranks=1) as job:
        # As many as both hosts have slots for, from the first update on.
        (job.folder / "wanted").write_text("2\n")
        job.wait_for_ranks(1)
        elastic.set_hosts(job.folder, [ONE, OTHER])
        job.wait_for_ranks(2)
        elastic.set_lost(job.folder, [OTHER.name])
        job.wait_until(lambda: worlds(job.run_dir) == [1, 2, 1])
        job.wait_for_ranks(1)
        (place / "brake").unlink()
        assert job.finish() == 0, job.said()
    assert_same_training(place / "run", undisturbed)
    # Every world began where the one before it had left off.
    resumed = events(place / "run", "resume")
    assert [event["updates_repeated"] for event in resumed] == [0, 0]
    reasons = [event["reason"] for event in events(place / "run", "regroup")]
    assert reasons == ["the hosts have changed"] * 2


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_dies_is_done_without(victim: int, undisturbed: Path, place: Path) -> None:
    (place / "brake").touch()
    with ElasticJob(place / "run", [ONE, OTHER], ranks=2) as job:
        job.wait_until(lambda: last_update(job.run_dir) >= 30)
        processes = rank_processes(job.run_dir)
        processes[victim].send_signal(signal.SIGKILL)
        job.wait_until(lambda: len(worlds(job.run_dir)) > 1)
        assert processes[1 - victim].is_running()
        (place / "brake").unlink()
        assert job.finish() == 0, job.said()
    assert_same_training(place / "run", undisturbed)
    assert worlds(place / "run")[:2] == [2, 1]
    first = events(place / "run", "resume")[0]
    assert first["updates_repeated"] > 0
    assert first["checkpoint"] == "update-00000020.pt"
    fault = events(place / "run", "fault")[0]
    assert fault["reason"] == events(place / "run", "regroup")[0]["reason"]
    assert fault["time"] < first["time"]


def test_a_spare_host_takes_the_place_of_one_that_failed(undisturbed: Path, place: Path) -> None:
    (place / "brake").touch()
    hosts = [ONE, OTHER, Host("127.1", 1)]  # a third name of this machine
    with ElasticJob(place / "run", hosts, ranks=2) as job:
        job.wait_until(lambda: last_update(job.run_dir) >= 10)
        rank_processes(job.run_dir)[1].send_signal(signal.SIGKILL)
        job.wait_until(lambda: worlds(job.run_dir) == [2, 1, 2])
        (place / "brake").unlink()
        assert job.finish() == 0, job.said()
        (failed,) = (job.folder / "failed").read_text().split()
        assert failed in (ONE.name, OTHER.name)
    assert_same_training(place / "run", undisturbed)


@pytest.mark.long
def test_a_rank_dies_while_the_others_wait_for_a_new_one(undisturbed: Path, place: Path) -> None:
    """The newcomer is killed before it has joined: the one that waits for it goes on alone."""
    (place / "brake").touch()
    with ElasticJob(place / "run", [ONE], ranks=1) as job:
        (job.folder / "wanted").write_text("2\n")
        job.wait_for_ranks(1)
        elastic.set_hosts(job.folder, [ONE, OTHER])
        job.wait_until(lambda: 1 in rank_processes(job.run_dir))
        rank_processes(job.run_dir)[1].send_signal(signal.SIGKILL)
        (place / "brake").unlink()
        assert job.finish() == 0, job.said()
    assert_same_training(place / "run", undisturbed)


def test_on_a_single_host_a_dead_rank_ends_the_launch(undisturbed: Path, place: Path) -> None:
    """Horovod gives up a host with the first rank that fails there, and a launch with its last
    host: then the next launch goes on."""
    hosts = [Host("localhost", 2)]
    with ElasticJob(place / "run", hosts, ranks=2) as job:
        job.wait_until(lambda: last_update(job.run_dir) >= 30)
        rank_processes(job.run_dir)[1].send_signal(signal.SIGKILL)
        assert job.finish() != 0
    with ElasticJob(place / "run", hosts, ranks=2, resume=True) as job:
        assert job.finish() == 0, job.said()
    assert_same_training(place / "run", undisturbed)


def test_harness_run_grows_in_place_and_restarts_what_horovod_gives_up(
    undisturbed: Path, place: Path
) -> None:
    (place / "brake").touch()
    words = run_arguments(place / "run", None, *SETTINGS, "launch.elastic=true")
    with Job(place / "run", *words, "--max-restarts", "2", cwd=place) as job:
        job.wait_for_update(10)
        job.signal_rank(0, signal.SIGKILL)
        (place / "brake").unlink()
        code, output = job.finish()
    assert code == 0, output
    assert_same_training(place / "run", undisturbed)
    assert worlds(place / "run") == [1, 1, 2]
    assert len(events(place / "run", "restart")) == 1
    assert not events(place / "run", "stop")


@pytest.mark.long
def test_a_host_that_is_switched_off_is_replaced(
    undisturbed: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ssh, as users have it: growth to a second host, which is lost; the third steps in."""
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    monkeypatch.chdir(place)  # commands on a host begin there too
    run_dir = place / "run"
    settings = (*SETTINGS, "launch={elastic: true, interfaces: [eth0], connect_timeout: 60}")
    words = ["run", str(CONFIG), *settings, "--hosts", "n1:1,n2:1,n3:1", "--run-dir", str(run_dir)]
    with (
        Testbed(3, place) as bed,
        Job(run_dir, *words, cwd=place, where=lambda command: bed.on("n1", command)) as job,
    ):

        def wait_until(happened: Callable[[], bool]) -> None:
            while not happened():
                assert job.process.poll() is None, job.finish()
                time.sleep(0.02)

        wait_until(lambda: worlds(run_dir) == [1])
        (place / "brake").touch()
        wait_until(lambda: worlds(run_dir) == [1, 2])
        wait_until(lambda: last_update(run_dir) > last_resumed(run_dir))
        bed.kill("n2")
        wait_until(lambda: worlds(run_dir) == [1, 2, 1, 2])
        (place / "brake").unlink()
        code, output = job.finish()
    assert code == 0, output
    assert_same_training(run_dir, undisturbed)
    assert (run_dir / "elastic" / "failed").read_text() == "n2\n"
    assert not events(run_dir, "restart")


def test_without_a_slot_to_grow_to_accumulation_goes_on(undisturbed: Path, place: Path) -> None:
    with ElasticJob(place / "run", [ONE], ranks=1) as job:
        assert job.finish() == 0, job.said()
    assert_same_training(place / "run", undisturbed)
    assert worlds(place / "run") == [1]
    told = events(place / "run", "not_grown")
    assert told[0]["reason"] == "stage 1 wants 2 ranks, but there are slots for 1 rank only"
    assert [event["ranks_wanted"] for event in told] == [2, 2]


def test_a_stop_request_ends_an_elastic_run_with_a_checkpoint(
    undisturbed: Path, place: Path
) -> None:
    hosts = [ONE, OTHER]
    (place / "brake").touch()
    with ElasticJob(place / "run", hosts, ranks=2) as job:
        job.wait_until(lambda: last_update(job.run_dir) >= 10)
        (job.run_dir / "stop").touch()
        assert job.finish() != 0
        assert "exit with status code 75" in job.said()
    stopped = events(place / "run", "stop")[-1]
    assert last_state(place / "run")["update"] == stopped["update"]
    (place / "run" / "stop").unlink()
    (place / "brake").unlink()
    with ElasticJob(place / "run", hosts, ranks=2, resume=True) as job:
        assert job.finish() == 0, job.said()
    assert_same_training(place / "run", undisturbed)
