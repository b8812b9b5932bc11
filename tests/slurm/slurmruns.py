"""Runs on a Slurm of their own: submitted, held back, disturbed, looked at."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slurmbed import SlurmBed
from support import ROOT

sys.path.append(str(ROOT / "tests" / "parallel"))

from jobs import CONFIG, attempts, command, events, last_update

PATIENCE = 200.0
"""Seconds; machines stall for longer than most of this takes."""
NODES = 4
SETTINGS = (
    "model.name=mine:net",
    "launch={interfaces: [eth0], restart_pause: 0}",
    # Sums that do not depend on the ranks, so that weights are equal to the last bit.
    "comm={compression: none, summation: exact}",
    "batch={initial: 48, max: 192, micro: 12, growth: {policy: geometric, every: 1ep}}",
    "train={duration: 3ep, checkpoint_every: 5up, log_every: 1}",
)
MODEL = """
import time
from pathlib import Path
from torch import nn
from harness.models.lenet5 import LeNet5

class Brake(nn.Module):
    def forward(self, images):
        try:
            time.sleep(float(Path("brake").read_text()))
        except FileNotFoundError:
            pass
        return images

def net(num_classes):
    return nn.Sequential(Brake(), LeNet5(num_classes, (1, 28, 28)))
"""
"""LeNet-5, each pass of which takes the seconds more that stand in the file ``brake``: a run that
might end before it is disturbed is held back by it."""
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def ranks(start: int, most: int) -> str:
    """The setting for so many ranks, one on each node."""
    return f"ranks={{start: {start}, max: {most}, per_node: 1, threads: 1, restart_seconds: 0}}"


def call(slurm: SlurmBed, *words: str) -> str:
    """What a command prints where users log in; it must succeed."""
    done = slurm.run(words)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def until(condition: Callable[[], bool], what: str, slurm: SlurmBed) -> None:
    """Wait for it. Raises TimeoutError, with the ends of the logs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {what} after {PATIENCE:g} s\n{slurm.bed.log_tails()}")
        time.sleep(0.05)


class SlurmRun:
    """A run directory, and the directory in which its commands are called."""

    def __init__(self, slurm: SlurmBed, folder: Path, name: str = "run") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.py").write_text(MODEL, encoding="utf-8")
        self.slurm, self.folder, self.path = slurm, folder, folder / name

    def brake(self, seconds: float) -> None:
        """Let each pass of the model take so much longer from now on."""
        part = self.folder / "brake.part"
        part.write_text(f"{seconds}", encoding="ascii")
        part.replace(self.folder / "brake")

    def release(self) -> None:
        (self.folder / "brake").unlink(missing_ok=True)

    def harness(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A command of the harness to its end, where users log in."""
        called = ["env", f"--chdir={self.folder}", *command(*words)]
        return self.slurm.run(called, PATIENCE)

    def submit(self, *words: str) -> list[str]:
        """Submit the run with these settings and options; returns the numbers of its jobs."""
        return self._submit(CONFIG, *SETTINGS, *words, "--run-dir", self.path)

    def resume(self) -> list[str]:
        """Submit what is left of the run, as the harness says that it is to be done."""
        config = self.path / "slurm" / "config.yaml"
        return self._submit(config, "--run-dir", self.path, "--resume")

    def _submit(self, *words: object) -> list[str]:
        done = self.harness("submit", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return [job["id"] for job in self.jobs()["jobs"]]

    def jobs(self) -> dict[str, Any]:
        """The list that is kept beside the run."""
        text = (self.path / "slurm" / "jobs.json").read_text(encoding="utf-8")
        listed: dict[str, Any] = json.loads(text)
        return listed

    def status(self) -> dict[str, Any]:
        """What ``harness status --json`` prints."""
        done = self.harness("status", self.path, "--json")
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def output(self) -> str:
        """What the jobs have printed, of one after the other."""
        printed = sorted((self.path / "slurm").glob("*.out"))
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in printed)

    def wait_for_update(self, update: int, attempt: int = 1) -> None:
        """Wait until that attempt has begun, and the run has come so far."""
        until(
            lambda: attempts(self.path) >= attempt and last_update(self.path) >= update,
            f"at update {update} of attempt {attempt}",
            self.slurm,
        )

    def finish(self, *numbers: str) -> None:
        """Wait until these jobs have ended well. Raises AssertionError, with what they printed."""
        for number in numbers:
            job = self.slurm.wait(number, _OVER, PATIENCE)
            assert job["JobState"] == "COMPLETED", f"{job}\n{self.output()}"


Fault = Callable[[SlurmRun, str], None]
"""Gets the run and the number of its job; returns once that is done which a user has to do."""


@dataclass(frozen=True)
class Recovery:
    """How a run came back from a fault."""

    seconds: float
    """From the fault until training went on."""
    updates_repeated: int
    attempts: int
    first_job: str
    """Its number."""
    outcome: str
    """Which job has brought the run to its end."""


def recover(run: SlurmRun, fault: Fault) -> Recovery:
    """Submit a run, disturb it after some updates, and see it through to its end."""
    run.brake(0.1)
    [number] = run.submit(*FAULTS[fault])
    run.wait_for_update(7)
    began = time.time()
    fault(run, number)
    until(lambda: attempts(run.path) >= 2, "going on", run.slurm)
    run.release()
    last = run.jobs()["jobs"][-1]["id"]
    run.finish(last)
    resumes = events(run.path, "resume")
    again = datetime.fromisoformat(resumes[0]["time"]).timestamp()
    repeated = sum(event["updates_repeated"] for event in resumes)
    outcome = "done by the same job" if last == number else "done by a new job"
    return Recovery(again - began, repeated, 1 + len(resumes), number, outcome)


def mend(slurm: SlurmBed) -> None:
    """Bring back the nodes that a fault has taken."""
    for node in call(slurm, "sinfo", "-h", "-N", "-p", "box", "-t", "down", "-o", "%N").split():
        slurm.start_slurmd(node)


# Faults


def cancelled(run: SlurmRun, number: str) -> None:
    """scancel, and on by hand."""
    call(run.slurm, "scancel", number)
    run.slurm.wait(number, ["CANCELLED"], PATIENCE)
    run.resume()


def warned(run: SlurmRun, number: str) -> None:
    """The warning that comes before the time limit."""
    call(run.slurm, "scancel", "--batch", "--signal=USR2", number)


def requeued(run: SlurmRun, number: str) -> None:
    """scontrol requeue by a user."""
    call(run.slurm, "scontrol", "requeue", number)


def preempted(run: SlurmRun, number: str) -> None:
    """A job of the better partition that needs all nodes."""
    run.slurm.submit("true", "-N", str(NODES), "--exclusive")


def slurmd_killed(run: SlurmRun, number: str) -> None:
    """The run's only node falls silent, but its rank lives on."""
    run.brake(1.0)  # so that the run does not end before it is missed
    run.slurm.kill_slurmd(run.slurm.job(number)["BatchHost"])


def switched_off(run: SlurmRun, number: str) -> None:
    """One of two nodes loses its power."""
    run.brake(1.0)
    job = run.slurm.job(number)
    nodes = call(run.slurm, "scontrol", "show", "hostnames", job["NodeList"]).split()
    run.slurm.power_off(next(node for node in nodes if node != job["BatchHost"]))


FAULTS: dict[Fault, tuple[str, ...]] = {
    cancelled: (ranks(1, 1),),
    warned: (ranks(2, 2),),
    requeued: (ranks(1, 1),),
    preempted: (ranks(2, 2), "--partition=spare"),
    slurmd_killed: (ranks(1, 1),),
    switched_off: (ranks(2, 2),),
}
"""Each with the settings of the run that it strikes."""
