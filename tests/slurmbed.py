"""A real Slurm on one machine: its controller and one slurmd on each of some test hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType

from support import require
from testbed import CTL, Testbed, completed, daemon, missing_for_testbed, system_tool

_TOOLS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
    "sinfo": "slurm-client",
    "munged": "munge",
}
_START_SECONDS = 60.0
# What stands for GPUs: any device files will do.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")

# What must be each node's own, such as the sockets of job steps, lies in /run: a host has its own,
# and its name is short enough for a socket's.
_CONFIGURATION = """
ClusterName=box
SlurmctldHost=ctl(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
TmpFS=/run
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={logs}/slurmctld
SlurmdLogFile={logs}/%n-slurmd
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
ReturnToService=1
KillOnBadExit=1
SlurmdTimeout={timeout}
MessageTimeout=10
TCPTimeout=2
KillWait=3
MinJobAge=3600
MailProg=/bin/true
{gres}
{nodes}
PartitionName=box Nodes=ALL Default=YES DefaultTime=10 PriorityTier=10 PreemptMode=OFF
PartitionName=spare Nodes=ALL DefaultTime=10 PriorityTier=1 GraceTime={grace}
"""
_FIELD = re.compile(r"([A-Za-z][\w:/-]*)=(.*?)(?= [A-Za-z][\w:/-]*=|$)")


@cache
def missing_for_slurm() -> str | None:
    """What keeps this machine from having a Slurm of its own, in words; None if nothing does."""
    for name, package in _TOOLS.items():
        if system_tool(name) is None:
            return f"a Slurm to test with needs the command {name} (Debian: {package})"
    return missing_for_testbed()


def require_slurm() -> None:
    """Go on if a Slurm can be started here."""
    reason = missing_for_slurm()
    require(reason is None, str(reason))


@cache
def missing_for_pmix() -> str | None:
    """What keeps srun from starting MPI ranks here, in words; None if nothing does.

    ``srun --mpi=list`` names pmix even where the library that it needs is not installed.
    """
    reason = missing_for_slurm()
    if reason is not None:
        return reason
    words = ["srun", "--mpi=pmix", "true"]
    with tempfile.TemporaryDirectory() as folder, SlurmBed(1, folder=Path(folder)) as slurm:
        done = slurm.run(words)
    if done.returncode == 0:
        return None
    said = (done.stderr.strip().splitlines() or ["no word of why"])[0]
    return f"srun cannot start ranks by PMIx (Debian: libpmix-dev has what it needs): {said}"


class SlurmBed:
    """A cluster n1, n2, … with the partitions ``box`` and, preempted by it, ``spare``; leaving the
    ``with`` block ends it."""

    def __init__(
        self,
        nodes: int = 4,
        cpus: int = 2,
        gpus: int = 0,
        *,
        folder: Path,
        timeout: int = 10,
        grace: int = 5,
    ) -> None:
        """``cpus`` and ``gpus``: of each node; the GPUs are pretended ones (at most 4).
        ``folder``: for configuration, state and logs. ``timeout``: seconds after which a silent
        node is down. ``grace``: seconds between a preempted job's warning and its end."""
        self.bed = Testbed(nodes, folder)
        self.nodes = self.bed.hosts
        self.folder = folder.resolve() / "slurm"
        self.logs = self.bed.logs
        self.conf = self.folder / "slurm.conf"
        self._cpus, self._gpus, self._timeout, self._grace = cpus, gpus, timeout, grace

    def __enter__(self) -> SlurmBed:
        self._write_files()
        self.bed.__enter__()
        try:
            self._start()
        except BaseException:
            self.bed.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bed.__exit__(kind, error, trace)

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs ``command`` on a host, where Slurm's commands find this one."""
        return self.bed.on(host, ["env", f"SLURM_CONF={self.conf}", *command])

    def run(
        self, command: Sequence[str], timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command where users log in, to its end, of at most that many seconds."""
        return completed(self.on(CTL, command), timeout)

    def submit(self, script: str, *options: str) -> str:
        """Queue a batch script, given as text; returns the job's number. What it prints is in the
        logs, unless an option says otherwise."""
        path = self.folder / "submitted.sh"
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        words = ["sbatch", "--parsable", "-o", f"{self.logs}/job-%j", *options, str(path)]
        return self._do(CTL, *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """All that the controller tells of a job, by its own names (JobState, NodeList, …)."""
        line = self._do(CTL, "scontrol", "-o", "show", "job", number).strip()
        return dict(_FIELD.findall(line))

    def wait(self, number: str, states: Iterable[str], seconds: float = 60.0) -> dict[str, str]:
        """Wait until a job is in one of these states; returns what ``job`` does.

        Raises TimeoutError, with the ends of the logs.
        """
        wanted, until = set(states), time.monotonic() + seconds
        while True:
            try:
                job = self.job(number)
                if job["JobState"] in wanted:
                    return job
                told = f"is {job['JobState']} ({job['Reason']})"
            except RuntimeError as error:  # a controller that is busy does not answer in time
                told = f"is unknown ({error})"
            if time.monotonic() > until:
                raise TimeoutError(
                    f"job {number} {told} after {seconds:g} s, "
                    f"not {' or '.join(sorted(wanted))}\n{self.bed.log_tails()}"
                )
            time.sleep(0.1)

    def wait_for_nodes(self, number: int, seconds: float = _START_SECONDS) -> None:
        """Wait until that many nodes are idle. Raises TimeoutError, with the ends of the logs."""
        until = time.monotonic() + seconds
        while (idle := self._idle()) < number:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{idle} of {number} nodes are idle after {seconds:g} s\n{self.bed.log_tails()}"
                )
            time.sleep(0.05)

    # Faults, and their ends

    def kill_slurmd(self, node: str) -> None:
        """End a node's slurmd, and nothing else on the node."""
        self._do(node, "sh", "-c", 'kill -KILL "$(cat /run/slurmd.pid)"')

    def start_slurmd(self, node: str) -> None:
        """Bring a node's slurmd back, and the node itself if it is switched off."""
        if not self.bed.is_up(node):
            self.bed.start(node)
            self._start_munged(node)
        self._do(node, daemon("slurmd"), "-N", node)

    def power_off(self, node: str) -> None:
        self.bed.kill(node)

    def cut(self, node: str) -> None:
        """Pull the node's cable out of the switch."""
        self.bed.cut(node)

    def mend(self, node: str) -> None:
        self.bed.mend(node)

    # How it is made

    def _start(self) -> None:
        self._start_munged(CTL)
        self._do(CTL, daemon("slurmctld"), "-c")
        for node in self.nodes:
            self._start_munged(node)
            self.start_slurmd(node)
        self.wait_for_nodes(len(self.nodes))

    def _start_munged(self, host: str) -> None:
        """Each host has its own: one for all would take what two hosts receive for a replay."""
        self._do(
            host,
            daemon("munged"),
            "--force",  # the folder may be one that not all users can enter
            f"--key-file={self.folder}/munge.key",
            f"--seed-file={self.folder}/{host}.seed",
            f"--log-file={self.logs}/{host}-munged",
            "--pid-file=/run/munge/munged.pid",
        )

    def _do(self, host: str, *command: str) -> str:
        return self.bed.do(host, "env", f"SLURM_CONF={self.conf}", *command)

    def _idle(self) -> int:
        said = self.run(["sinfo", "-h", "-p", "box", "-t", "idle", "-o", "%D"]).stdout
        return sum(int(line) for line in said.split())

    def _write_files(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        gpus = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        nodes = [
            f"NodeName={node} NodeAddr={self.bed.address(node)} CPUs={self._cpus}{gpus}"
            for node in self.nodes
        ]
        if self._gpus:
            devices = ",".join(_DEVICES[: self._gpus])
            (self.folder / "gres.conf").write_text(f"Name=gpu File={devices}\n", encoding="utf-8")
        text = _CONFIGURATION.strip().format(
            folder=self.folder,
            logs=self.logs,
            timeout=self._timeout,
            grace=self._grace,
            gres="GresTypes=gpu" if self._gpus else "",
            nodes="\n".join(nodes),
        )
        self.conf.write_text(text + "\n", encoding="utf-8")
