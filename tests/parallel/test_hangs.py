"""Ranks that stand still without dying: found in the set time, named, ended, made up for."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jobs import (
    CONFIG,
    Job,
    assert_same_run,
    attempts,
    events,
    harness,
    last_update,
    rank_processes,
    run_arguments,
    train,
)
from support import require
from testbed import Testbed, missing_for_testbed

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

HANG = 5
SETTINGS = (
    "batch={initial: 32, max: 128, micro: 16, growth: {policy: geometric, every: 2ep}}",
    "train={duration: 4ep, checkpoint_every: 7up, log_every: 1}",
    f"launch={{restart_pause: 0, hang_seconds: {HANG}}}",
)


def supervised(run_dir: Path, *settings: str, restarts: int = 3, launcher: str = "") -> list[str]:
    arguments = run_arguments(run_dir, 2, *SETTINGS, *settings)
    arguments[arguments.index("--max-restarts") + 1] = str(restarts)
    return [*arguments, *(("--launcher", launcher) if launcher else ())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train(directory, 2, *SETTINGS)
    return directory


def stacks(directory: Path, hang: int = 1) -> list[str]:
    """What was written of each rank, of a run that hung."""
    folder = directory / "stacks" / f"hang-{hang}"
    return [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]


STARTS = {
    "horovod": (),
    "torch": ("comm.backend=torch",),
}
MORE_STARTS = {
    "horovod over gloo": ("comm.controller=gloo",),
    "torch over gloo": ("comm.backend=torch", "comm.controller=gloo"),
    "mpirun": ("--launcher", "mpirun"),
    "local": ("comm.backend=torch", "--launcher", "local"),
    "elastic": ("comm.controller=gloo", "launch.elastic=true"),
}


def split(words: tuple[str, ...]) -> tuple[list[str], str]:
    if "--launcher" in words:
        return list(words[:-2]), words[-1]
    return list(words), ""


@pytest.mark.parametrize(
    "start",
    [*STARTS, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_STARTS)],
)
@pytest.mark.parametrize(
    "victim", [1, pytest.param(0, marks=pytest.mark.long)], ids=["other", "rank0"]
)
def test_a_stopped_rank_is_found_and_made_up_for(
    start: str, victim: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = tmp_path / "run"
    settings, launcher = split({**STARTS, **MORE_STARTS}[start])
    with Job(directory, *supervised(directory, *settings, launcher=launcher)) as job:
        ranks = started(job, directory, update=20)
        ranks[victim].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        while not (directory / "stacks" / "hang-1" / "hang.txt").exists():
            assert job.process.poll() is None
            time.sleep(0.02)
        took = time.monotonic() - began
        assert took >= HANG - 1  # not before its time
        _, alive = psutil.wait_procs(ranks.values(), timeout=60)
        assert alive == []
        code, output = job.finish()
    assert code == 0, output
    assert f"rank {victim} on" in output
    assert f"does not answer (pid {ranks[victim].pid} is stopped, as by SIGSTOP)" in output
    (fault,) = events(directory, "fault")
    assert (fault["rank"], fault["hang_seconds"]) == (victim, HANG)
    assert [rank["state"] for rank in fault["stuck"]] == ["T"]
    assert len(events(directory, "restart")) == 1
    told = stacks(directory)
    assert "is stopped" in told[victim]
    assert "waiting for the other ranks for" in told[1 - victim]
    assert "most recent call first" in told[1 - victim]
    if start == "mpirun":  # as many others do; the reference takes its time
        assert_same_run(directory, request.getfixturevalue("undisturbed"))


def started(job: Job, directory: Path, update: int) -> dict[int, psutil.Process]:
    """The ranks' processes, once they have come so far."""
    while attempts(directory) < 1 or last_update(directory) < update:
        assert job.process.poll() is None, job.finish()[1]
        time.sleep(0.005)
    return ranks_of(directory)


def ranks_of(directory: Path) -> dict[int, psutil.Process]:
    """As `rank_processes`, also of ranks that torchrun has started."""
    found = rank_processes(directory)
    if found:
        return found
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        ours = "train" in words and str(directory.resolve()) in words
        if ours and "python" in words[0] and variables.get("LOCAL_RANK", "").isdigit():
            found[int(variables["LOCAL_RANK"])] = process
    return found


STUCK = """
import ctypes, os, signal, time
from torch import nn

RANK = next(
    os.environ[name]
    for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
    if name in os.environ
)

def a_file_that_does_not_come():
    time.sleep(1000)

def held_up():
    ctypes.PyDLL(None).sleep(1000)  # which does not let go of the interpreter

class Stuck(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(784, 10)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if RANK == "1":
            {step}
        return self.layer(x.flatten(1))

def net(num_classes):
    if RANK == "1":
        {start}
    return Stuck()
"""


def with_model(folder: Path, step: str = "pass", start: str = "pass") -> None:
    (folder / "stuck.py").write_text(STUCK.format(step=step, start=start))


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "start", "said", "told"),
    [
        (
            "if self.calls == 9: a_file_that_does_not_come()",
            "pass",
            "has been computing for",
            "a_file_that_does_not_come",
        ),
        ("if self.calls == 9: held_up()", "pass", "does not answer (pid", "held_up"),
        ("pass", "time.sleep(1000)", "has been building the model for", "in net"),
        ("pass", "os.kill(os.getpid(), signal.SIGSTOP)", "is stopped", "is stopped"),
    ],
    ids=["in its own code", "with the interpreter", "as it starts", "stopped as it starts"],
)
def test_what_a_rank_is_stuck_in_is_told(
    step: str, start: str, said: str, told: str, tmp_path: Path
) -> None:
    with_model(tmp_path, step, start)
    directory = tmp_path / "run"
    words = supervised(directory, "model.name=stuck:net", restarts=0)
    done = harness(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert "rank 1 on" in last
    assert said in last
    assert "--resume" in last or "no update was done" in last
    assert "Traceback" not in done.stderr
    assert told in stacks(directory)[1]
    assert rank_processes(directory) == {}


@pytest.mark.long
def test_a_rank_that_is_only_slow_is_waited_for(tmp_path: Path) -> None:
    """Each of its micro-batches is a sign of life, though all others wait for longer."""
    with_model(tmp_path, f"time.sleep({HANG / 4})")
    directory = tmp_path / "run"
    settings = ("batch={initial: 128, micro: 8}", "batch.growth.policy=fixed", "lr.on_growth=1")
    more = ("model.name=stuck:net", "train={duration: 2up, log_every: 1}", "lr.warmup=null")
    done = harness(*supervised(directory, *settings, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert events(directory, "fault") == []
    assert not list((directory / "stacks").glob("*"))


@pytest.mark.long
def test_a_job_that_is_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    """As by a batch system that suspends jobs: all processes stand still, this one's too."""
    directory = tmp_path / "run"
    with Job(directory, *supervised(directory)) as job:
        started(job, directory, update=20)
        whole = psutil.Process(job.process.pid)
        family = [whole, *whole.children(recursive=True)]
        for process in family:
            process.suspend()
        time.sleep(2 * HANG)
        for process in reversed(family):
            process.resume()
        code, output = job.finish()
    assert code == 0, output
    assert events(directory, "fault") == []


@pytest.mark.long
def test_a_run_without_an_end_of_patience_waits(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = supervised(directory, "launch={restart_pause: 0, hang_seconds: null}")
    with Job(directory, *words) as job:
        ranks = started(job, directory, update=20)
        ranks[1].suspend()
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(job.process.pid).wait(timeout=3 * HANG)
        ranks[1].resume()
        code, output = job.finish()
    assert code == 0, output
    assert events(directory, "fault") == []


@pytest.mark.long
def test_restarts_are_limited_for_hangs_too(tmp_path: Path) -> None:
    with_model(tmp_path, "if self.calls == 9: os.kill(os.getpid(), signal.SIGSTOP)")
    directory = tmp_path / "run"
    settings = ("model.name=stuck:net", "train={duration: 4ep, checkpoint_every: 2ep}")
    done = harness(*supervised(directory, *settings, restarts=10), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 launches in a row have died without a new checkpoint" in done.stderr
    assert len(events(directory, "fault")) == 3
    assert len(list((directory / "stacks").glob("hang-*"))) == 3


# On other hosts


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    with Testbed(2, tmp_path_factory.mktemp("bed")) as hosts:
        yield hosts


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "start",
    [
        ("--launcher", "horovodrun"),
        ("--launcher", "mpirun"),
        ("comm.controller=gloo",),
        ("comm.backend=torch", "--launcher", "mpirun"),
    ],
    ids=["horovodrun", "mpirun", "gloo", "torch"],
)
def test_a_stopped_rank_on_another_host(
    start: tuple[str, ...], bed: Testbed, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    words = ["run", str(CONFIG), *SETTINGS, "ranks={start: 2, max: 2, threads: 1}"]
    words += ["launch.interfaces=[eth0]", "--hosts", "n1:1,n2:1", "--run-dir", str(directory)]
    with Job(directory, *words, *start, where=lambda command: bed.on("n1", command)) as job:
        ranks = started(job, directory, update=20)
        ranks[1].suspend()
        while not (directory / "stacks" / "hang-1" / "hang.txt").exists():
            assert job.process.poll() is None
            time.sleep(0.02)
        _, alive = psutil.wait_procs(ranks.values(), timeout=60)
        assert alive == []
        code, output = job.finish()
    assert code == 0, output
    assert "rank 1 on n2 does not answer (pid" in output
    assert "is stopped, as by SIGSTOP" in output
    (fault,) = events(directory, "fault")
    assert (fault["rank"], fault["host"]) == (1, "n2")
