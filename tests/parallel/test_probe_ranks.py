"""``harness probe`` on real ranks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import command, harness
from support import require
from testbed import Testbed, missing_for_testbed

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

SHORT = ("probe", "--ranks", "2", "--hosts", "localhost:2", "--max-mb", "1", "--seconds", "1")
LINK = 200e6
"""Bits a second."""
EVERY = {"mpi_alone", "mpi", "horovod", "horovod_fp16", "horovod_broadcast", "torch_gloo"}


def probe(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*SHORT, *more),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, **variables},
    )


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_all_operations_are_measured_on_two_ranks(launcher: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = probe("--launcher", launcher, "-o", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["launch.log", "probe.csv", "probe.json"]
    found: dict[str, Any] = json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert (found["ranks"], found["left_out"]) == (2, {})
    provenance = found["provenance"]
    assert provenance["launcher"] == launcher
    assert provenance["communication"]["kind"] == "horovod-mpi"
    assert provenance["versions"]["horovod"]
    assert [host["ranks"] for host in provenance["communication"]["hosts"]] == [[0, 1]]
    timings = found["timings"]
    sizes = [4**k for k in range(1, 11)]
    assert {(t["operation"], t["bytes"]) for t in timings} == {
        (name, size) for name in EVERY for size in sizes
    }
    assert all(len(t["seconds"]) >= 5 and min(t["seconds"]) > 0 for t in timings)
    for t in timings:  # of two ranks the factor is 1 for either collective
        assert t["bus_bandwidth"] == pytest.approx(t["bytes"] / t["median"])
    by_turns = {t["bytes"]: set() for t in timings}  # type: dict[int, set[int]]
    for t in timings:
        if t["operation"] != "mpi_alone":
            by_turns[t["bytes"]].add(len(t["seconds"]))
    assert all(len(rounds) == 1 for rounds in by_turns.values())
    with (out / "probe.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["operation"], int(row["bytes"])) for row in rows] == [
        (t["operation"], t["bytes"]) for t in timings
    ]
    assert "bus bandwidth, GB/s" in done.stdout
    verdict = found["verdict"]
    assert verdict["fits"].keys() == EVERY
    assert len(verdict["advice"]) == 3
    for sentence in verdict["sentences"]:
        assert sentence.split()[0] in done.stdout.partition("verdict")[2]
    again = subprocess.run(
        command("probe", "--read", str(out)), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.partition("verdict")[2] in done.stdout
    assert "64 KiB" in done.stdout
    assert "\x1b" not in done.stdout


def test_nothing_stays_without_a_directory(tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    done = probe(TMPDIR=str(scratch))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "median" in done.stdout
    assert not list(scratch.glob("*probe*"))


def test_without_horovod_the_message_says_so(tmp_path: Path) -> None:
    package = tmp_path / "path" / "horovod"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no Horovod here')\n")
    out = tmp_path / "out"
    done = probe("--launcher", "mpirun", "-o", str(out), PYTHONPATH=str(package.parent))
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("harness: Horovod cannot be imported (no Horovod here)")
    assert "Traceback" not in done.stdout + done.stderr
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_it_can_be_stopped(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*SHORT[:-1], "200", "--launcher", "mpirun", "-o", str(out)]
    with subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while not (out / "launch.log").exists():  # from then on signals are listened to
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    assert "nothing was written" in output
    assert "Traceback" not in output
    assert not (out / "probe.json").exists()


def rank_1(out: Path) -> psutil.Process | None:
    """The process of rank 1 of the probe with its results in ``out``."""
    for process in psutil.process_iter():
        try:
            words, variables = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        ours = "harness.probe" in words and str(out.resolve()) in words and "python" in words[0]
        if ours and variables.get("OMPI_COMM_WORLD_RANK") == "1":
            return process
    return None


def test_a_dead_rank_ends_it_and_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*SHORT[:-1], "200", "--launcher", "mpirun", "-o", str(out)]
    with subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while (victim := rank_1(out)) is None:
            assert process.poll() is None
            time.sleep(0.05)
        victim.kill()
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    assert output.strip().splitlines()[-1].startswith("harness: rank 1 on ")
    assert "SIGKILL" in output
    assert not (out / "probe.json").exists()


def test_a_rank_without_a_launcher_says_what_to_call(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.probe", tmp_path, "--max-mb", "1", "--seconds", "1"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith(("HARNESS_", "OMPI_"))},
    )
    assert done.returncode == 2, done.stderr
    assert "call harness probe" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    with Testbed(2, tmp_path_factory.mktemp("bed"), rate=f"{LINK:.0f}bit") as hosts:
        yield hosts


def between_hosts(bed: Testbed, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A probe of two hosts, called in a folder that both see."""
    words = ["n1:1,n2:1" if word == "localhost:2" else word for word in SHORT]
    return harness(
        *words, *more, where=lambda command: bed.on("n1", ["env", f"--chdir={folder}", *command])
    )


def test_a_slow_link_between_hosts_carries_no_more_than_its_rate(
    bed: Testbed, tmp_path: Path
) -> None:
    done = between_hosts(bed, tmp_path, "--launcher", "mpirun", "-o", "out")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "probe.json").read_text(encoding="utf-8"))
    hosts = [host["host"] for host in found["provenance"]["communication"]["hosts"]]
    assert hosts == ["n1", "n2"]
    large = {t["operation"]: t for t in found["timings"] if t["bytes"] == 2**20}
    assert large.keys() == EVERY
    for name in ("horovod", "torch_gloo"):
        line = found["verdict"]["fits"][name]["pieces"][-1]
        assert line["beta_seconds_per_byte"][2] > 0.5 * 8 / LINK, name
        assert line["beta_seconds_per_byte"][1] < 4 * 8 / LINK, name
    for name, timing in large.items():
        carried = timing["bus_bandwidth"] / (2 if name == "horovod_fp16" else 1)
        assert carried < 1.5 * LINK / 8, name  # the link lets a quarter of a message pass at once


def test_other_hosts_see_the_directory_that_nobody_named(bed: Testbed, tmp_path: Path) -> None:
    done = between_hosts(bed, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 2 hosts" in done.stdout
    assert list(tmp_path.iterdir()) == []
