"""`harness doctor`: what is here, what launchers find; with ``--ranks`` a trial of the whole."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.doctor import Finding, datasets, findings
from harness.doctor.looks import look_at
from harness.doctor.machine import machine
from harness.doctor.software import installed_as, software
from harness.doctor.storage import nearest, storage
from harness.errors import HarnessError, LaunchError
from harness.launch_schema import Launch
from harness.schema import Comm
from harness.wording import counted
from launch import detect
from launch.assemble import Launcher, find_hosts, usual_launcher
from launch.preflight import Needs, check_hosts, is_local, mpi_daemon, over_ssh
from launch.spec import Host

_LAUNCH = Launch()
_MPI = "make setup (in a checkout) installs Open MPI; on a cluster: module avail mpi"
_TRIAL = 30.0  # seconds for mpirun to start nothing


@dataclass(frozen=True)
class DoctorRequest:
    """What ``harness doctor`` was asked for."""

    data: Path | None = None
    """Where to look for data sets' files."""
    run_dir: Path = Path("runs")
    """Where runs are to be written."""
    ranks: int | None = None
    """Start so many, and let them meet; None: look only."""
    hosts: str | None = None
    hostfile: Path | None = None
    launcher: Launcher | None = None
    timeout: float = 120.0
    """Seconds for the ranks to come through all checks."""
    quick: bool = False
    """Import nothing, so what is told is what is installed and not whether it loads."""
    json: bool = False


def doctor(request: DoctorRequest) -> int:
    """Look at everything and print it; returns 0 if what a run needs is there, else 1.

    Raises DataError, LaunchError for places and hosts that cannot be understood.
    """
    datasets.check_root(request.data)
    asked = request.hosts is not None or request.hostfile is not None
    hosts = find_hosts(request.hosts, request.hostfile) if asked else ()
    _check(request)
    found = local_findings(request)
    data = datasets.data_sets(request.data, installed_as("scikit-learn", "sklearn") is not None)
    found += _data_finding(request.data, data)
    reachable = reached(hosts, request)
    found += reachable
    if request.ranks is not None:
        found += _tried(request, request.ranks, findings.good(reachable))
    if request.json:
        print(findings.as_json(found, datasets.as_dict(data)))
    else:
        print("\n".join([*findings.as_lines(found), "", *datasets.as_lines(data, request.data)]))
        print("\n".join(["", *findings.wrapped(findings.verdict(found), 0)]))
    return 0 if findings.good(found) else 1


def _check(request: DoctorRequest) -> None:
    if request.ranks is not None and request.ranks < 1:
        raise LaunchError(f"--ranks {request.ranks}: at least 1 rank is needed")
    if not 1 <= request.timeout <= 3600:
        raise LaunchError(f"--timeout {request.timeout:g}: must be from 1 to 3600 seconds")


def local_findings(request: DoctorRequest) -> list[Finding]:
    """All that is known of this machine by itself."""
    of_software = software(request.quick)
    by_name = {finding.name: finding for finding in of_software}
    mpi = _mpi(by_name, request.quick)
    found = [*of_software, *mpi, _slurm(request.quick)]
    found += machine(by_name["torch"], by_name["Horovod"])
    return [*found, *storage(request.run_dir)]


def _data_finding(root: Path | None, data: list[Finding]) -> list[Finding]:
    if root is None:
        return []
    there = [one.name for one in data if one.text.startswith("found in")]
    if there:
        return [Finding("data", f"{', '.join(there)} in {root}", group="storage")]
    remedy = "the list below says which files each data set has"
    text = f"no data set that is known lies in {root}"
    return [Finding("data", text, "warning", remedy, "storage")]


# MPI


def _mpi(software: dict[str, Finding], quick: bool) -> list[Finding]:
    """mpirun, and horovodrun, which calls it."""
    program, facts = detect.program("mpirun"), dict[str, Any]()
    horovodrun = _horovodrun(software["Horovod"])
    if program is None:
        text = "no mpirun on PATH: ranks cannot be started by MPI (horovodrun --gloo would do)"
        return [Finding("MPI", text, "missing", _MPI, facts={"flavour": None}), horovodrun]
    facts["mpirun"] = program
    if quick:
        return [Finding("MPI", f"{program}, not tried", facts=facts), horovodrun]
    try:
        said = detect.mpi_version()
        flavour = detect.mpi_flavour(said)
    except LaunchError as error:
        text, remedy = _divided(str(error))
        return [Finding("MPI", text, "missing", remedy or _MPI, facts=facts), horovodrun]
    number = re.search(r"\d+\.\d+[\w.]*", said)
    facts |= {"flavour": flavour, "version": number[0] if number else None}
    name = "MPICH" if flavour == "mpich" else "Open MPI"
    return [_started(f"{name} {facts['version'] or ''}".strip(), flavour, facts), horovodrun]


def _started(name: str, flavour: str, facts: dict[str, Any]) -> Finding:
    """Whether mpirun starts a process on this machine."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    words = [facts["mpirun"], "-np", "1", sys.executable, "-c", "print('@ {\"started\": true}')"]
    seen = look_at(words, _TRIAL, os.environ | root)
    if not seen.facts:
        remedy = f"try: {facts['mpirun']} -np 1 hostname"
        text = f"{name}, {facts['mpirun']}, starts no process: {seen.failure}"
        return Finding("MPI", text, "missing", remedy, facts=facts)
    if flavour == "openmpi5":
        text = f"{name}, {facts['mpirun']}; horovodrun writes options that it does not read"
        return Finding("MPI", text, "warning", "start with --launcher mpirun", facts=facts)
    return Finding("MPI", f"{name}, {facts['mpirun']}", facts=facts)


def _horovodrun(horovod: Finding) -> Finding:
    program = detect.program("horovodrun")
    if program is None:
        remedy = horovod.remedy or "python -m launch.bootstrap --horovod-only"
        return Finding("horovodrun", "not on PATH: it comes with Horovod", "warning", remedy)
    return Finding("horovodrun", program)


# Slurm


def _slurm(quick: bool) -> Finding:
    program = detect.program("srun")
    if program is None:
        return Finding("Slurm", "none here; only a cluster needs it", facts={"pmi": []})
    facts: dict[str, Any] = {"srun": program, "pmi": []}
    if quick:
        return Finding("Slurm", f"{program}, not tried", facts=facts)
    try:
        listed = detect.srun_mpi_types()
        facts["pmi"] = listed
    except LaunchError as error:
        return Finding("Slurm", f"{program}: {error}", "warning", "scontrol ping", facts=facts)
    text = f"srun has {', '.join(listed) or 'no PMI'}"
    try:
        detect.srun_mpi(" ".join(listed))
    except LaunchError:
        text += ": it starts no MPI ranks"
        remedy = "harness submit with launch.launcher=mpirun; or install Slurm's PMIx plugin"
        return Finding("Slurm", text, "warning", remedy, facts=facts)
    partitions = _partitions()
    if partitions is None:
        text += ", but its controller does not answer"
        remedy = "scontrol ping; SLURM_CONF says which cluster is meant"
        return Finding("Slurm", text, "warning", remedy, facts=facts)
    facts["partitions"] = partitions
    return Finding("Slurm", f"{text}; partitions {', '.join(partitions) or 'none'}", facts=facts)


def _partitions() -> list[str] | None:
    """None: no controller answers."""
    try:
        said = detect.said(["sinfo", "--noheader", "--format=%P"], "", patience=10.0)
    except LaunchError:
        return None
    return sorted({line.strip() for line in said.splitlines() if line.strip()})


# Other hosts


def reached(hosts: Sequence[Host], request: DoctorRequest) -> list[Finding]:
    """Whether ssh gets there, and finds there what ranks need; all hosts at once."""
    launcher = request.launcher or usual_launcher(_LAUNCH, Comm())
    needs = Needs(sys.executable, nearest(request.run_dir), mpi_daemon("mpi"), python_key=None)
    names = [host.name for host in hosts] if over_ssh(launcher) else []
    try:
        troubles = check_hosts(names, needs, _LAUNCH.connect_timeout)
    except LaunchError as error:  # there is no ssh
        troubles = {name: str(error) for name in names if not is_local(name)}
    return [_reached(host, launcher, troubles.get(host.name)) for host in hosts]


def _reached(host: Host, launcher: str, wrong: str | None) -> Finding:
    facts, slots = {"slots": host.slots}, counted(host.slots, "slot")
    if wrong is not None:
        text, remedy = _divided(wrong)
        remedy = f"{remedy + '; ' * bool(remedy)}try: ssh {host.name} true"
        return Finding(host.name, text, "missing", remedy, "hosts", facts)
    if is_local(host.name):
        return Finding(host.name, f"this machine, {slots}", group="hosts", facts=facts)
    if not over_ssh(launcher):
        return Finding(host.name, f"{slots}, reached by {launcher}", group="hosts", facts=facts)
    text = f"answers ssh, has this Python, MPI and directory; {slots}"
    return Finding(host.name, text, group="hosts", facts=facts)


def _divided(message: str) -> tuple[str, str]:
    """What is wrong, and what to do."""
    text, _, remedy = message.partition("; ")
    return text, remedy


def _tried(request: DoctorRequest, ranks: int, reachable: bool) -> list[Finding]:
    """What real ranks say of each other."""
    from launch.twoway import TwoWay

    if not reachable:
        text = "not tried, as a host cannot be used"
        return [Finding("ranks", text, "missing", "put the hosts right first", "ranks")]
    try:
        return TwoWay(ranks, request.hosts, request.hostfile, request.launcher,
                      request.run_dir, request.timeout).findings()  # fmt: skip
    except HarnessError as error:
        text, remedy = _divided(str(error))
        return [Finding("ranks", text, "missing", remedy or "see docs/launch.md", "ranks")]
