"""The test cluster itself: jobs run on all of it, come back after a fault, and give way."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurmbed import SlurmBed, missing_for_pmix, require_slurm
from support import require
from testbed import CTL, assert_ends_with_its_owner

pytestmark = pytest.mark.slow

NODES = 4
# Seconds. Machines stall for longer than any of this takes.
PATIENCE = 120
RANKS = """
import socket, sys
from pathlib import Path
from mpi4py import MPI
total = MPI.COMM_WORLD.allreduce(10 ** MPI.COMM_WORLD.rank)
Path(sys.argv[1], socket.gethostname()).write_text(str(total))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmBed]:
    require_slurm()
    with SlurmBed(NODES, folder=tmp_path_factory.mktemp("slurm"), timeout=5, grace=1) as started:
        yield started


@pytest.fixture
def cluster(slurm: SlurmBed) -> SlurmBed:
    """With all nodes idle."""
    slurm.wait_for_nodes(NODES, PATIENCE)
    return slurm


def test_a_job_runs_on_all_nodes(cluster: SlurmBed, tmp_path: Path) -> None:
    out = tmp_path / "out"
    number = cluster.submit("srun hostname", "-N", str(NODES), "-o", str(out), "-J", "a name = b")
    job = cluster.wait(number, ["COMPLETED", "FAILED"], PATIENCE)
    assert sorted(out.read_text().split()) == list(cluster.nodes)
    assert (job["JobState"], job["JobName"], job["ExitCode"]) == ("COMPLETED", "a name = b", "0:0")
    assert job["NodeList"] == "n[1-4]"


def test_nodes_know_each_other_by_name_and_by_ssh(cluster: SlurmBed) -> None:
    done = cluster.run(["srun", "-N1", "-w", "n2", "ssh", "n3", "hostname"])
    assert (done.stdout, done.stderr) == ("n3\n", "")


@pytest.mark.usefixtures("ranks_available")
def test_srun_starts_the_ranks_of_an_mpi_program(
    cluster: SlurmBed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = missing_for_pmix()
    require(reason is None, str(reason))
    monkeypatch.setenv("SLURM_PMIX_FENCE", "ring")
    monkeypatch.setenv("PMIX_MCA_gds", "hash")
    words = ["srun", "-K", "-N", str(NODES), "-n", str(NODES), "--mpi=pmix"]
    words += [sys.executable, "-c", RANKS, str(tmp_path)]
    done = cluster.run(["timeout", str(PATIENCE), *words], 2 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        cluster.nodes, "1111"
    )


LASTS_ONCE = 'if [ -z "$SLURM_RESTART_COUNT" ]; then sleep 1000; fi'


def test_jobs_are_queued_again_when_their_nodes_fall_silent(cluster: SlurmBed) -> None:
    faults = (cluster.kill_slurmd, cluster.power_off, cluster.cut)
    jobs = [cluster.submit(LASTS_ONCE, "--exclusive", "--requeue") for _ in faults]
    nodes = [cluster.wait(number, ["RUNNING"], PATIENCE)["BatchHost"] for number in jobs]
    assert len(set(nodes)) == len(nodes)
    for fault, node in zip(faults, nodes, strict=True):
        fault(node)
    for number in jobs:
        job = cluster.wait(number, ["COMPLETED", "FAILED"], PATIENCE)
        assert (job["JobState"], job["BatchHost"] in nodes) == ("COMPLETED", False)
        assert int(job["Restarts"]) >= 1
    cluster.mend(nodes[2])
    for node in nodes[:2]:
        cluster.start_slurmd(node)
    cluster.wait_for_nodes(NODES, PATIENCE)


def test_a_job_gives_way_to_a_better_one_and_is_warned(cluster: SlurmBed, tmp_path: Path) -> None:
    ready, warned, again = (tmp_path / name for name in ("ready", "warned", "again"))
    script = f"""
        if [ -n "$SLURM_RESTART_COUNT" ]; then touch {again}; exit; fi
        trap 'touch {warned}' USR2
        touch {ready}
        sleep 1000 & wait; wait"""
    options = ["-N", str(NODES), "--exclusive", "--signal=B:USR2@60", "-t", "60"]
    modest = cluster.submit(script, "-p", "spare", "--requeue", *options)
    cluster.wait(modest, ["RUNNING"], PATIENCE)
    until = time.monotonic() + PATIENCE
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    better = cluster.submit("true", "-N", str(NODES), "--exclusive")
    cluster.wait(better, ["COMPLETED"], PATIENCE)
    job = cluster.wait(modest, ["COMPLETED"], PATIENCE)
    assert int(job["Restarts"]) >= 1
    assert warned.exists()
    assert again.exists()


def test_jobs_see_the_gpus_they_asked_for(tmp_path: Path) -> None:
    require_slurm()
    with SlurmBed(1, gpus=2, folder=tmp_path) as cluster:
        for asked, seen in ((1, "0"), (2, "0,1")):
            done = cluster.run(["srun", f"--gpus={asked}", "printenv", "CUDA_VISIBLE_DEVICES"])
            assert done.stdout.strip() == seen, done.stderr


def test_a_wait_in_vain_shows_the_logs(cluster: SlurmBed) -> None:
    number = cluster.submit("sleep 1000")
    with pytest.raises(TimeoutError, match=r"not COMPLETED\n(.*\n)*--- slurmctld\n"):
        cluster.wait(number, ["COMPLETED"], seconds=0.5)
    assert cluster.run(["scancel", number]).returncode == 0
    assert cluster.wait(number, ["CANCELLED"], PATIENCE)["JobState"] == "CANCELLED"


OWNER = """
from slurmbed import SlurmBed
with SlurmBed(2, folder=folder) as cluster:
    cluster.wait(cluster.submit("srun sleep 1000", "-N2"), ["RUNNING"])
    hold(cluster.bed.first_process(CTL))
"""


def test_it_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    require_slurm()
    assert_ends_with_its_owner(OWNER, tmp_path)


def test_nothing_stays(tmp_path: Path) -> None:
    require_slurm()
    with SlurmBed(2, folder=tmp_path) as cluster:
        inside = psutil.Process(cluster.bed.first_process(CTL)).children(recursive=True)
        names = {process.name() for process in inside}
        assert {"slurmctld", "slurmd", "munged", "sshd"} <= names
    assert [process for process in inside if process.is_running()] == []
