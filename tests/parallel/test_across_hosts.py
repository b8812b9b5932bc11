"""Runs over several hosts, started over real ssh: growth from host to host, hosts that are lost."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import (
    CONFIG,
    Job,
    attempts,
    events,
    harness,
    identical,
    last_update,
    rank_processes,
    train,
    weights,
)
from support import require, tool
from testbed import Testbed, missing_for_testbed

pytestmark = [pytest.mark.slow, pytest.mark.parallel(4)]

SETTINGS = (
    "ranks.threads=1",
    "ranks.restart_seconds=0",
    "launch.restart_pause=0",
    "launch.interfaces=[eth0]",
    "train={duration: 3ep, checkpoint_every: 5up, log_every: 1}",
    # Sums that do not depend on the ranks, so that weights are equal to the last bit.
    "comm={compression: none, summation: exact}",
    "batch={initial: 24, max: 96, micro: 6, growth: {policy: geometric, every: 1ep}}",
)
HOSTS = "n1:1,n2:1,n3:1,n4:1"


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    with Testbed(4, tmp_path_factory.mktemp("bed")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    train(directory, 1, *SETTINGS)
    return directory


def arguments(directory: Path, *more: str, hosts: str = HOSTS) -> list[str]:
    words = ["run", str(CONFIG), *SETTINGS, "--hosts", hosts, "--run-dir", str(directory)]
    return [*words, *more]


def used(directory: Path) -> list[int]:
    """Ranks of each launch."""
    return [e["ranks"] for e in [*events(directory, "start"), *events(directory, "resume")]]


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_ranks_grow_from_host_to_host(
    launcher: str, bed: Testbed, alone: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    words = arguments(directory, "ranks={start: 1, max: 4}", "--launcher", launcher)
    done = harness(*words, where=lambda command: bed.on("n1", command))
    assert done.returncode == 0, done.stdout + done.stderr
    assert used(directory) == [1, 2, 4]
    assert identical(weights(directory), weights(alone))
    stops = events(directory, "stop")
    assert [stop["ranks_wanted"] for stop in stops] == [2, 4]
    assert rank_processes(directory) == {}


def test_gloo_grows_from_host_to_host(bed: Testbed, alone: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = arguments(directory, "ranks={start: 1, max: 4}", "comm.controller=gloo")
    done = harness(*words, where=lambda command: bed.on("n1", command))
    assert done.returncode == 0, done.stdout + done.stderr
    assert used(directory) == [1, 2, 4]
    assert identical(weights(directory), weights(alone))


def wait_for(job: Job, directory: Path, attempt: int, update: int) -> None:
    while attempts(directory) < attempt or last_update(directory) < update:
        assert job.process.poll() is None
        time.sleep(0.005)


@pytest.mark.timeout(600)
def test_a_host_that_is_switched_off_is_made_up_for(alone: Path, tmp_path: Path) -> None:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    directory = tmp_path / "run"
    with Testbed(4, tmp_path) as bed:
        words = arguments(
            directory,
            "ranks={start: 4, max: 4}",
            "launch.connect_timeout=3",
            "--launcher",
            "mpirun",
        )
        with Job(directory, *words, where=lambda command: bed.on("n1", command)) as job:
            wait_for(job, directory, attempt=1, update=40)
            bed.kill("n3")
            code, output = job.finish()
    assert code == 0, output
    assert used(directory) == [4, 3]
    left_out = events(directory, "host_left_out")
    assert [event["host"] for event in left_out] == ["n3"]
    assert "going on with 3 ranks on n1:1,n2:1,n4:1 (accumulation makes up for 1)" in output
    assert identical(weights(directory), weights(alone))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_host_on_which_launches_fail_again_and_again_is_left_out(
    bed: Testbed, alone: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    words = arguments(directory, "ranks={start: 4, max: 4}", "--launcher", "mpirun")
    with Job(directory, *words, where=lambda command: bed.on("n1", command)) as job:
        for attempt, update in ((1, 20), (2, 40)):
            wait_for(job, directory, attempt, update)
            rank_processes(directory)[1].send_signal(signal.SIGKILL)
        code, output = job.finish()
    assert code == 0, output
    assert used(directory) == [4, 4, 3]
    assert [event["host"] for event in events(directory, "fault")] == ["n2", "n2"]
    assert [event["host"] for event in events(directory, "host_left_out")] == ["n2"]
    assert identical(weights(directory), weights(alone))


def refused(bed: Testbed, directory: Path, *more: str, hosts: str = HOSTS) -> str:
    """The one message of a launch that cannot be; nothing is created, nothing goes on running."""
    words = arguments(directory, "launch.connect_timeout=3", *more, hosts=hosts)
    done = harness(*words, where=lambda command: bed.on("n1", command))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert rank_processes(directory) == {}
    assert not directory.exists()
    said = done.stderr.strip()
    assert said.startswith("harness: ")
    return said


def test_an_unknown_host_is_named(bed: Testbed, tmp_path: Path) -> None:
    said = refused(bed, tmp_path / "run", hosts="n1:1,n77:1")
    assert said.startswith("harness: host n77: its name is not known here")
    assert "/etc/hosts" in said


def test_a_host_that_does_not_answer_is_named(bed: Testbed, tmp_path: Path) -> None:
    bed.drop("n2")
    try:
        said = refused(bed, tmp_path / "run")
    finally:
        bed.mend("n2")
    assert said == "harness: host n2: it does not answer; is it up, and is its network?"


def test_a_host_that_refuses_ssh_is_named(bed: Testbed, tmp_path: Path) -> None:
    bed.stop_sshd("n3")
    try:
        said = refused(bed, tmp_path / "run")
    finally:
        bed.start_sshd("n3")
    assert said.startswith("harness: host n3: it refuses ssh; start sshd there")


def test_a_host_that_wants_a_password_is_named(bed: Testbed, tmp_path: Path) -> None:
    keys = bed.home / ".ssh" / "authorized_keys"
    shutil.move(keys, keys.with_name("hidden"))
    try:
        said = refused(bed, tmp_path / "run", hosts="n1:1,n4:1")
    finally:
        shutil.move(keys.with_name("hidden"), keys)
    assert said.startswith("harness: host n4: ssh wants a password there")
    assert "ssh-copy-id n4" in said


def test_several_hosts_are_told_of_at_once(bed: Testbed, tmp_path: Path) -> None:
    bed.stop_sshd("n3")
    try:
        said = refused(bed, tmp_path / "run", hosts="n1:1,n3:1,n99:1")
    finally:
        bed.start_sshd("n3")
    assert [line.removeprefix("harness: ")[:9] for line in said.splitlines()] == [
        "host n3: ",
        "host n99:",
    ]


def test_a_run_directory_that_is_not_shared_is_named(bed: Testbed) -> None:
    said = refused(bed, Path("/run/of-this-host-alone"), hosts="n1:1,n2:1")
    assert said.startswith("harness: host n2: does not see /run/of-this-host-alone")
    assert "file system that all hosts share" in said


def test_too_few_slots_are_told_with_the_hosts(bed: Testbed, tmp_path: Path) -> None:
    said = refused(bed, tmp_path / "run", "--ranks", "5", "batch.micro=4")
    assert "5 ranks need 5 slots, but n1:1,n2:1,n3:1,n4:1 has 4" in said


def test_a_host_without_mpi_is_named(bed: Testbed, tmp_path: Path) -> None:
    """Of an Open MPI that is not there on all hosts."""
    daemon = tool("orted")
    assert daemon is not None
    hidden = bed.run("n2", ["mount", "--bind", "/dev/null", daemon])  # on n2 alone
    assert hidden.returncode == 0, hidden.stderr
    try:
        said = refused(bed, tmp_path / "run", hosts="n1:1,n2:1")
    finally:
        bed.run("n2", ["umount", daemon])
    assert said.startswith(f"harness: host n2: has no {daemon}; install the same MPI there")
