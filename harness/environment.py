"""What the launcher tells a process by its environment; no other module reads rank variables."""

from __future__ import annotations

import os
import socket
from pathlib import Path

WORLD_SIZE = "HARNESS_WORLD_SIZE"
"""How many ranks `harness run` started; the ranks assert it."""
FAILURE_DIR = "HARNESS_FAILURE_DIR"
"""Where a rank that fails leaves its last words."""
PROGRESS = "HARNESS_PROGRESS"
"""``relay``: rank 0 prints progress as marked lines, which `harness run` turns into a live bar."""
GROW = "HARNESS_GROW"
"""``1``: a supervisor starts the next segment, so stop with code 75 when it wants more ranks."""

_SIZES = (WORLD_SIZE, "OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def _first(names: tuple[str, ...]) -> int | None:
    for name in names:
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return None


def promised_world_size() -> int | None:
    """Ranks that the launcher promised; None if no launcher started this process."""
    return _first(_SIZES)


def launched_rank() -> int:
    """This process's rank as its launcher numbered it; 0 without a launcher.

    For messages before (or without) a working communicator; afterwards ask the communicator.
    """
    return _first(_RANKS) or 0


def launched_local_size() -> int:
    """Ranks on this host as the launcher counted them; 1 without a launcher."""
    return _first(_LOCAL_SIZES) or 1


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
