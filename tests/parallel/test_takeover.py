"""A run that goes on elsewhere while its old processes are frozen, and runs that begin at once."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from jobs import CONFIG, Job, assert_same_run, command, run_arguments, train
from support import require
from testbed import Testbed, missing_for_testbed

from harness.resume import has_finished
from harness.rundir import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

SETTINGS = (
    "batch={initial: 32, max: 128, micro: 16, growth: {policy: geometric, every: 2ep}}",
    "train={duration: 5ep, checkpoint_every: 7up, log_every: 1}",
)


def contents(directory: Path) -> dict[str, bytes]:
    """All that is in a run directory, but what launchers print."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "launch.log"
    }


@pytest.mark.timeout(600)
def test_a_job_that_was_frozen_comes_back_and_harms_nothing(tmp_path: Path) -> None:
    """All of its processes sleep, and its locks are gone, as those of a node that was cut off."""
    train(tmp_path / "undisturbed", 2, *SETTINGS)
    directory = tmp_path / "run"
    with Job(directory, *run_arguments(directory, 2, *SETTINGS)) as job:
        job.wait_for_update(30)
        launching = psutil.Process(job.process.pid)
        frozen = [launching, *launching.children(recursive=True)]
        for process in frozen:
            process.suspend()
        for name in ("lock", "launch.lock"):
            (directory / name).unlink()
        train(directory, 2, *SETTINGS, resume=True)
        before = contents(directory)
        for process in reversed(frozen):
            process.resume()
        code, output = job.finish()
    assert code == 76, output
    assert "has taken the run over" in output
    assert "Traceback" not in output
    assert contents(directory) == before
    assert_same_run(directory, tmp_path / "undisturbed")


AT_ONCE = """
import errno, fcntl, os, pathlib, time

def flock(fd, operation):
    "As on a file system without locks."
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

def rename(source, target, real=os.rename):
    "Nobody takes a number before both are about to."
    if os.path.basename(source).startswith(".new-"):
        here = pathlib.Path(os.environ["MEET"])
        (here / os.environ["NAME"]).touch()
        until = time.monotonic() + 100
        while len(list(here.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.01)
    real(source, target)

fcntl.flock, os.rename = flock, rename
"""


@pytest.mark.timeout(600)
def test_of_two_that_begin_at_once_on_two_hosts_one_goes_on(tmp_path: Path) -> None:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    (tmp_path / "sitecustomize.py").write_text(AT_ONCE)
    meet, directory = tmp_path / "meet", tmp_path / "run"
    with Testbed(2, tmp_path / "bed") as bed, ExitStack() as ended:
        for resume in ([], ["--resume"]):
            meet.mkdir()
            racers = {}
            for host in ("n1", "n2"):
                words = command("train", CONFIG, "train.duration=2ep", "ranks.threads=1")
                words += ["--run-dir", str(directory), *resume]
                variables = [f"PYTHONPATH={tmp_path}", f"MEET={meet}", f"NAME={host}"]
                racers[host] = subprocess.Popen(
                    bed.on(host, ["env", *variables, *words]),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                ended.callback(racers[host].kill)
            said = {host: racer.communicate(timeout=280)[1] for host, racer in racers.items()}
            codes = {host: racer.returncode for host, racer in racers.items()}
            assert sorted(codes.values()) == [0, 2], said
            winner, loser = sorted(codes, key=codes.__getitem__)
            assert f" on {winner} since " in said[loser], said
            assert "Traceback" not in said[loser]
            assert has_finished(RunDirectory(directory))
            shutil.rmtree(meet)
