"""What to start: hosts, ranks, environment, command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Host:
    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


@dataclass(frozen=True)
class LaunchSpec:
    """One launch of all ranks; launchers turn it into an argument list, and nothing else."""

    ranks: int
    hosts: tuple[Host, ...]
    command: tuple[str, ...]
    """What every rank executes."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that every rank gets besides the launching process's own."""
    controller: Literal["mpi", "gloo"] = "mpi"
    interfaces: tuple[str, ...] = ()
    """Network interfaces by name; none: the engines' own choice."""
    bind: Literal["none", "core", "numa", "socket"] = "none"
    """What each rank is bound to."""
    cores_per_rank: int | None = None
    """Cores that srun gives each rank; None: what the job says."""
    mpi: Literal["openmpi4", "openmpi5", "mpich"] = "openmpi4"
    """Whose mpirun it is."""
    srun_mpi: str = "pmix"
    """What srun starts the ranks as."""
    srun_options: tuple[str, ...] = ()
    """Further words for srun, such as Pyxis's --container-image."""
    as_root: bool = False
    """Whether root starts them, which Open MPI allows only where it is told to."""


@dataclass(frozen=True)
class Death:
    """A rank's end as its launcher tells it."""

    rank: int
    exit_code: int | None = None
    signal: int | None = None
    host: str | None = None


_PATTERNS = (
    # Open MPI's mpirun, also under horovodrun --mpi
    re.compile(
        r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on signal "
        r"(?P<signal>\d+)"
    ),
    re.compile(r"Process name: \[\[\d+,\d+\],(?P<rank>\d+)\]\s+Exit code:\s+(?P<code>\d+)"),
    # horovodrun --gloo
    re.compile(r"Process (?P<rank>\d+) exit with status code (?P<code>\d+)"),
)

_LAST_SIGNAL = 64


def first_death(output: str) -> Death | None:
    """The first rank that a launcher's output says has died; None if it names none."""
    matches = [match for pattern in _PATTERNS if (match := pattern.search(output))]
    if not matches:
        return None
    found = min(matches, key=lambda match: match.start()).groupdict()
    code = int(found["code"]) if found.get("code") else None
    number = int(found["signal"]) if found.get("signal") else None
    if code is not None and 128 < code <= 128 + _LAST_SIGNAL:  # the shell's way to tell a signal
        number, code = code - 128, None
    return Death(int(found["rank"]), code, number, found.get("host"))
