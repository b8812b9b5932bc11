"""What to start: hosts, ranks, environment, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from harness.redact import hidden, redacted_words


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
    """Cores that srun gives each rank, and mpirun binds it to; None: what the job says, or one."""
    mpi: Literal["openmpi4", "openmpi5", "mpich"] = "openmpi4"
    """Whose mpirun it is."""
    mpi_prefix: str | None = None
    """Where Open MPI lies on the other hosts, if their shells may not find it."""
    srun_mpi: str = "pmix"
    """What srun starts the ranks as."""
    srun_options: tuple[str, ...] = ()
    """Further words for srun, such as Pyxis's --container-image."""
    like_many: bool = False
    """Whether a single rank is to be started as several would be, which it is compared with."""
    as_root: bool = False
    """Whether root starts them, which Open MPI allows only where it is told to."""

    def as_shell_command(self, argv: Sequence[str]) -> str:
        """A launcher's words with the variables that it is started with, for a shell to take."""
        settings = (f"{name}={value}" for name, value in sorted(self.environment.items()))
        return shlex.join(["env", *settings, *argv])

    def as_log_line(self, argv: Sequence[str]) -> str:
        """The same without secrets, for a log."""
        shown = {name: hidden(name, value) for name, value in self.environment.items()}
        return replace(self, environment=shown).as_shell_command(redacted_words(list(argv)))

    def host_of(self, rank: int) -> str | None:
        """The host that a rank is put on: hosts are filled in order."""
        for host in self.hosts:
            if rank < host.slots:
                return host.name
            rank -= host.slots
        return None
