"""What launchers say when a rank dies or a host is lost, and how they label the ranks' output."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.errors import LaunchError
from launch.hosts import expand_nodelist


@dataclass(frozen=True)
class Death:
    """A rank's end as its launcher tells it."""

    rank: int | None
    """None: it was one of the host's, and MPICH does not say which."""
    exit_code: int | None = None
    """None with no signal either: it went without a word, such as without MPI_Finalize."""
    signal: int | None = None
    host: str | None = None
    out_of_memory: bool = False
    """The launcher says that the kernel did it because memory ran out."""


# srun writes the signal's name, or Slurm's own word for what the kernel's OOM killer has ended.
_OUT_OF_MEMORY = "Out Of Memory"
_NAMES = {
    **{signal.strsignal(number): int(number) for number in signal.valid_signals()},
    _OUT_OF_MEMORY: int(signal.SIGKILL),
}
_NAMED = "|".join(re.escape(name) for name in _NAMES if name)

_PATTERNS = (
    # Open MPI's mpirun, also under horovodrun --mpi; from version 5 on it is PRRTE's, which breaks
    # its lines elsewhere.
    re.compile(
        r"process rank (?P<rank>\d+) with PID \d+ on\s+node (?P<host>\S+) exited on\s+signal "
        r"(?P<signal>\d+)"
    ),
    re.compile(
        r"process rank (?P<rank>\d+) with PID \d+ on\s+node (?P<host>\S+) exiting\s+improperly"
    ),
    re.compile(
        r"Process name: \[(?:\[\d+,\d+\],|[^\s\[\]]+@\d+,)(?P<rank>\d+)\]\s+"
        r"Exit code:\s+(?P<code>\d+)"
    ),
    re.compile(
        r"MPI_ABORT was invoked on rank (?P<rank>\d+) in communicator [^\n]*\n"
        r"(?:\s*Proc: [^\n]*\n)?\s*(?:with errorcode|Errorcode:) (?P<code>\d+)"
    ),
    # horovodrun --gloo; its first form may be lost behind a rank's last words
    re.compile(r"Process name: (?P<rank>\d+)\s+Exit code:\s+(?P<code>\d+)"),
    re.compile(r"Process (?P<rank>\d+) exit with status code (?P<code>\d+)"),
    # MPICH's hydra. Where it names a signal too, the exit code is that of any rank.
    re.compile(
        r"BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES *\n"
        r"=\s+PID \d+ RUNNING AT (?P<host>\S+) *\n=\s+EXIT CODE: (?P<code>\d+) *"
        r"(?:(?:\n=[^\n]*){0,4}\nYOUR APPLICATION TERMINATED WITH THE EXIT STRING: [^\n]*"
        r"\(signal (?P<signal>\d+)\))?"
    ),
    # srun; tasks of one node that end alike share a line.
    re.compile(
        r"srun: error: (?P<host>[^\s:]+): tasks? (?P<rank>\d+)[-,\d]*: "
        rf"(?:Exited with exit code (?P<code>\d+)|(?P<name>{_NAMED})(?: \(core dumped\))?\s*$)",
        re.MULTILINE,
    ),
    # torchrun; what it names above as failures it has ended itself.
    re.compile(
        r"Root Cause \(first observed failure\):\s+\[\d+\]:\s+time +: [^\n]*\s+host +: "
        r"(?P<host>\S+)\s+rank +: (?P<rank>\d+) [^\n]*\s+exitcode +: (?P<code>-?\d+)"
    ),
)

_LAST_SIGNAL = 64


def first_death(output: str) -> Death | None:
    """The first rank that a launcher's output says has died; None if it names none, or if a host
    was lost before, which takes ranks with it."""
    match = _first(_PATTERNS, output)
    if match is None or _first(_LOST, output[: match.start()]):
        return None
    found = match.groupdict()
    number = _signal(found)
    code = int(found["code"]) if found.get("code") and number is None else None
    rank, host = found.get("rank"), found.get("host")
    # srun tells of several nodes at once where the same has happened on all of them.
    host = None if host and "[" in host else host
    memory = found.get("name") == _OUT_OF_MEMORY
    return Death(int(rank) if rank else None, code, number, host, memory)


def _first(patterns: Iterable[re.Pattern[str]], output: str) -> re.Match[str] | None:
    """The match that stands first in the output."""
    matches = [match for pattern in patterns if (match := pattern.search(output))]
    return min(matches, key=lambda match: match.start(), default=None)


def _signal(found: Mapping[str, str | None]) -> int | None:
    """The signal that a match tells of, in any of the ways to tell one."""
    if number := found.get("signal"):
        return int(number)
    if word := found.get("name"):
        return _NAMES[word]
    code = int(found.get("code") or 0)
    if code < 0:  # as Python's subprocess tells it, and torchrun
        return -code
    return code - 128 if 128 < code <= 128 + _LAST_SIGNAL else None  # as a shell tells it


_HOST = r"(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)"
_LOST = (
    # Open MPI's daemons, and PRRTE's
    re.compile(rf"Remote daemon: \[[^\n]*\] on node {_HOST}"),
    re.compile(
        r"(?:unable to complete a TCP connection|failed to report back after being spawned)"
        rf"[^:]*:\s+Local host: +\S+\s+Remote host: +{_HOST}"
    ),
    # ssh, which mpirun and horovodrun start
    re.compile(rf"ssh: connect to host {_HOST} port \d+: "),
    re.compile(rf"ssh: Could not resolve hostname {_HOST}: ", re.IGNORECASE),
    re.compile(rf"Timeout, server {_HOST} not responding"),
    re.compile(rf"Connection (?:closed|reset) by {_HOST} port \d+"),
    re.compile(rf"Connection to {_HOST} closed by remote host"),
    re.compile(rf"^[^\s@]+@{_HOST}: Permission denied \(", re.MULTILINE),
    re.compile(rf"ssh not successful for host {_HOST}:"),
    # srun
    re.compile(r"error: Node failure on (?P<nodes>\S+)"),
    re.compile(r"error: Nodes (?P<nodes>\S+) are (?:still )?not (?:responding|ready)"),
    re.compile(r"Task launch for \S+ failed on node (?P<nodes>\S+): "),
)


def lost_host(output: str) -> str | None:
    """The first host that a launcher's output says cannot be reached, or no longer; None if it
    names none."""
    match = _first(_LOST, output)
    if match is None:
        return None
    found = match.groupdict()
    if "host" in found:
        return found["host"].rstrip(".")
    try:
        return expand_nodelist(found["nodes"])[0]
    except LaunchError:
        return None


_OPEN_MPI = re.compile(r"\[(?:\d+,)?(\d+)\]<(?:stdout|stderr)>: ?")
_HYDRA = re.compile(r"^\[(\d+)\] ")
_SRUN = re.compile(r"^ *(\d+): ")


def rank_tag(launcher: str, mpi: str = "openmpi4") -> re.Pattern[str] | None:
    """How a launcher labels what a rank prints, with the rank as the group; None: it does not.

    ``mpi``: as in LaunchSpec. Open MPI may label a line several times over; the others' labels are
    looked for at its beginning alone, where a rank's own words are not taken for one.
    """
    if launcher == "local":
        return None
    if launcher == "srun":
        return _SRUN
    return _HYDRA if mpi == "mpich" else _OPEN_MPI
