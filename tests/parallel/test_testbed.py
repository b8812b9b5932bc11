"""The test hosts themselves: they are apart, ssh reaches them, and nothing of them stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support import require
from testbed import CTL, Testbed, assert_ends_with_its_owner, missing_for_testbed

pytestmark = pytest.mark.slow

HOSTS = 4
RANKS = """
import socket, sys
from pathlib import Path
from mpi4py import MPI
total = MPI.COMM_WORLD.allreduce(10 ** MPI.COMM_WORLD.rank)
Path(sys.argv[1], socket.gethostname()).write_text(str(total))
"""


def require_testbed() -> None:
    reason = missing_for_testbed()
    require(reason is None, str(reason))


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    require_testbed()
    with Testbed(HOSTS, tmp_path_factory.mktemp("bed"), rate="1gbit") as started:
        yield started


def ssh(bed: Testbed, source: str, target: str, command: str) -> subprocess.CompletedProcess[str]:
    return bed.run(source, ["ssh", "-o", "BatchMode=yes", target, command])


def reaches(bed: Testbed, source: str, target: str) -> bool:
    return ssh(bed, source, target, "true").returncode == 0


def refusal(bed: Testbed, source: str, target: str) -> str:
    """What ssh says of a host that does not let it in."""
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=1", target, "true"]
    done = bed.run(source, words)
    assert done.returncode == 255
    return done.stderr


def test_ssh_leads_from_each_host_to_each_other(bed: Testbed) -> None:
    for source in (CTL, "n1"):
        for target in bed.hosts:
            done = ssh(bed, source, target, "hostname; pwd")
            assert done.stdout.split() == [target, str(bed.home)], done.stderr
            assert done.stderr == ""


def test_a_host_has_its_own_name_processes_memory_and_link(bed: Testbed, tmp_path: Path) -> None:
    shared = tmp_path / "on disk"
    shared.write_text("seen by all")
    mark = f"/dev/shm/{tmp_path.name}"  # noqa: S108 - on a host of its own
    script = f"sleep 1000 >/dev/null 2>&1 & echo 1 >{mark}; cat '{shared}'"
    assert bed.run("n1", ["sh", "-c", script]).stdout == "seen by all"
    for host, present in (("n1", True), ("n2", False)):
        assert bed.run(host, ["hostname"]).stdout.strip() == host
        assert (bed.run(host, ["test", "-e", mark]).returncode == 0) == present
        seen = bed.run(host, ["sh", "-c", "cat /proc/[0-9]*/cmdline"]).stdout
        assert ("sleep\0001000" in seen) == present
        assert bed.address(host) in bed.run(host, ["ip", "addr", "show", "eth0"]).stdout
        assert "rate 1Gbit" in bed.run(host, ["tc", "qdisc", "show", "dev", "eth0"]).stdout
        assert "rate 1Gbit" in bed.run(CTL, ["tc", "qdisc", "show", "dev", f"v{host}"]).stdout


@pytest.mark.usefixtures("ranks_available")
def test_mpirun_starts_a_rank_on_each_host_over_ssh(bed: Testbed, tmp_path: Path) -> None:
    words = bed.mpirun([sys.executable, "-c", RANKS, str(tmp_path)])
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(
        bed.hosts, "1111"
    )


def test_what_runs_on_a_host_dies_with_what_waits_for_it(bed: Testbed, tmp_path: Path) -> None:
    started = tmp_path / "started"
    words = bed.on("n2", ["sh", "-c", f"touch {started}; exec sleep 2000"])
    with subprocess.Popen(words) as waiting:
        while not started.exists():
            assert waiting.poll() is None
        inside = psutil.Process(waiting.pid).children(recursive=True)
        waiting.kill()
    assert inside
    assert psutil.wait_procs(inside, timeout=60)[1] == []


# Faults


@pytest.mark.parametrize("fault", ["cut", "drop"])
def test_a_host_that_is_cut_off_is_silent_until_it_is_mended(bed: Testbed, fault: str) -> None:
    getattr(bed, fault)("n2")
    try:
        for source, target in ((CTL, "n2"), ("n1", "n2"), ("n2", "n1")):
            assert "refused" not in refusal(bed, source, target)
        assert reaches(bed, "n1", "n3")
    finally:
        bed.mend("n2")
    assert reaches(bed, "n1", "n2")


def test_a_host_without_sshd_refuses(bed: Testbed) -> None:
    bed.stop_sshd("n3")
    assert "refused" in refusal(bed, "n1", "n3")
    bed.start_sshd("n3")
    assert reaches(bed, "n1", "n3")


def test_a_host_that_is_switched_off_comes_back_empty(bed: Testbed) -> None:
    bed.run("n4", ["touch", "/run/before"])
    bed.kill("n4")
    assert not bed.is_up("n4")
    assert "refused" not in refusal(bed, "n1", "n4")
    with pytest.raises(RuntimeError, match="n4 is not there, or is switched off"):
        bed.on("n4", ["true"])
    bed.start("n4")
    assert reaches(bed, "n1", "n4")
    assert bed.run("n4", ["test", "-e", "/run/before"]).returncode == 1


# What stays


def outside() -> list[str]:
    """Links, addresses and mounts of this process's own namespaces, and what is in root's home."""
    told = [
        subprocess.run(["ip", "-o", what, "show"], capture_output=True, text=True).stdout
        for what in ("link", "addr")
    ]
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return [*told, mounts, str(sorted(Path.home().iterdir()))]


def test_nothing_outside_changes_and_nothing_stays(tmp_path: Path) -> None:
    require_testbed()
    before = outside()
    with Testbed(2, tmp_path) as bed:
        inside = psutil.Process(bed.first_process(CTL)).children(recursive=True)
        assert len(inside) > 2 * 2  # each host has a first process and an sshd
        assert outside() == before
    assert [process for process in inside if process.is_running()] == []
    assert outside() == before


OWNER = """
from testbed import Testbed
with Testbed(2, folder) as bed:
    hold(bed.first_process(CTL))
"""


def test_it_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    require_testbed()
    assert_ends_with_its_owner(OWNER, tmp_path)


def test_a_bed_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    require_testbed()
    with pytest.raises(RuntimeError, match="quickly"), Testbed(1, tmp_path, rate="quickly"):
        pass
    mentioned = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]
    assert mentioned == []
