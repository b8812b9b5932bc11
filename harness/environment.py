"""What the launcher tells a process by its environment; no other module reads rank variables."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from harness.schema import Comm

WORLD_SIZE = "HARNESS_WORLD_SIZE"
"""How many ranks `harness run` started; the ranks assert it."""
FAILURE_DIR = "HARNESS_FAILURE_DIR"
"""Where a rank that fails leaves its last words."""
PROGRESS = "HARNESS_PROGRESS"
"""``relay``: rank 0 prints progress as marked lines, which `harness run` turns into a live bar."""
GROW = "HARNESS_GROW"
"""``1``: a supervisor starts the next segment, so stop with code 75 when it wants more ranks."""

CYCLE_TIME = "HOROVOD_CYCLE_TIME"
"""Milliseconds between two looks for work of Horovod's background thread."""
FUSION = "HOROVOD_FUSION_THRESHOLD"
"""Bytes that Horovod puts together into one operation; 0: no fusion."""
YIELD = "OMPI_MCA_mpi_yield_when_idle"
"""``1``: an MPI process that waits offers its core to others."""

# Each launcher's own names; torchrun's, which have no prefix, are added by _numbered.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID")
_OF_MPI = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")

FORWARDED = ("HOROVOD_", "NCCL_", "GLOO_", "MASTER_ADDR", "MASTER_PORT")
"""Beginnings of the variables by which a user sets up the communication; mpirun takes only those to
other hosts that it is told of, and ranks with different ones wait for each other for ever."""


def _first(names: tuple[str, ...]) -> int | None:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def _numbered(names: tuple[str, ...], torchrun: str) -> int | None:
    """What the launcher says. mpirun may start one torchrun on each host, whose numbers then count;
    elsewhere a variable such as RANK may be left over from something else, and comes last."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _first((torchrun, *names))
    return _first((*names, torchrun))


def promised_world_size() -> int | None:
    """Ranks that `harness run` promised, else the launcher; None if none started this process."""
    return _first((WORLD_SIZE,)) or launched_world_size()


def launched_world_size() -> int | None:
    """Ranks as the launcher counted them; None without a launcher."""
    return _numbered(_SIZES, "WORLD_SIZE")


def launched_rank() -> int:
    """This process's rank as its launcher numbered it; 0 without a launcher.

    For messages before (or without) a working communicator; afterwards ask the communicator.
    """
    return _numbered(_RANKS, "RANK") or 0


def launched_local_size() -> int:
    """Ranks on this host as the launcher counted them; 1 without a launcher."""
    return _numbered(_LOCAL_SIZES, "LOCAL_WORLD_SIZE") or 1


def launched_local_rank() -> int:
    """This rank's number among those on its host; 0 without a launcher."""
    return _numbered(_LOCAL_RANKS, "LOCAL_RANK") or 0


def started_by_mpi() -> bool:
    """Whether an MPI launcher started this process, so that MPI finds the other ranks."""
    return any(name in os.environ for name in _OF_MPI)


def has_master_address() -> bool:
    """Whether someone has said where rank 0 listens, as torchrun does."""
    return "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ


def horovodrun_store() -> tuple[str, int] | None:
    """Address and port of the key-value store that horovodrun keeps for its Gloo ranks."""
    address = os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")
    port = _first(("HOROVOD_GLOO_RENDEZVOUS_PORT",))
    return (address, port) if address and port else None


def communication_settings(comm: Comm) -> dict[str, str]:
    """The variables for what a configuration says about Horovod and MPI.

    Only for keys that it sets. Such a key beats the user's own variable, so that config.yaml tells
    what ran; where it is not set the user's variable stays, and without one the harness's default.
    """
    settings = {}
    if comm.cycle_ms is not None:
        settings[CYCLE_TIME] = f"{comm.cycle_ms:g}"
    if comm.fusion_mb is not None:
        settings[FUSION] = str(int(comm.fusion_mb * 2**20))
    if comm.yield_when_idle is not None:
        settings[YIELD] = str(int(comm.yield_when_idle))
    return settings


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def failure_dir() -> Path | None:
    value = os.environ.get(FAILURE_DIR)
    return Path(value) if value else None


def relays_progress() -> bool:
    return os.environ.get(PROGRESS) == "relay"


def supervised_growth() -> bool:
    return os.environ.get(GROW) == "1"


def host() -> str:
    return socket.gethostname()
