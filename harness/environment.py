"""What the launcher tells a process by its environment; no other module reads rank variables."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from harness.schema import Comm

WORLD_SIZE = "HARNESS_WORLD_SIZE"
"""How many ranks `harness run` started; the ranks assert it."""
FAILURE_DIR = "HARNESS_FAILURE_DIR"
"""Where a rank that fails leaves its last words."""
PROGRESS = "HARNESS_PROGRESS"
"""``relay``: rank 0 prints progress as marked lines, which `harness run` turns into a live bar."""
GROW = "HARNESS_GROW"
"""The most ranks that someone can start next, so stop with code 75 when as many are wanted; 0: this
launch goes on to the end."""
LAUNCHED_AT = "HARNESS_LAUNCHED_AT"
"""When the ranks were started, as ``moment`` tells it: what a start costs is measured by it."""
ENDED_AT = "HARNESS_ENDED_AT"
"""When this launching process's last ranks had ended, as ``moment`` tells it."""
ATTEMPTS_BEFORE = "HARNESS_ATTEMPTS_BEFORE"
"""The newest attempt at the run when the launching process began: ranks that find one since then
which is not of its launches have been superseded before they begin."""
RANKS_PER_GPU = "HARNESS_RANKS_PER_GPU"
"""How many ranks share a GPU."""
MPS = "HARNESS_MPS"
"""``1``: start CUDA's MPS on each host."""
MEASURE = "HARNESS_MEASURE"
"""Seconds of steady updates after which a run stops by itself, for `harness bench`."""
HANG = "HARNESS_HANG_SECONDS"
"""Seconds without a sign of any rank after which the launching process ends the job."""
LAUNCHER = "HARNESS_LAUNCHER"
"""What started them, for the provenance."""
ELASTIC = "HARNESS_ELASTIC"
"""``MIN:MAX``: Horovod Elastic has started the ranks, and there may be so many of them."""
DISCOVERY = "HARNESS_DISCOVERY"
"""The folder that tells Horovod Elastic which hosts there are (`launch.elastic`)."""

CYCLE_TIME = "HOROVOD_CYCLE_TIME"
"""Milliseconds between two looks for work of Horovod's background thread."""
FUSION = "HOROVOD_FUSION_THRESHOLD"
"""Bytes that Horovod puts together into one operation; 0: no fusion."""
TIMELINE = "HOROVOD_TIMELINE"
"""Where Horovod writes its timeline; ``DYNAMIC``: where it is told to, once it runs."""
YIELD = "OMPI_MCA_mpi_yield_when_idle"
"""``1``: an MPI process that waits offers its core to others."""

# Each launcher's own names; torchrun's, which have no prefix, are added by _numbered.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "HOROVOD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "HOROVOD_LOCAL_RANK", "SLURM_LOCALID")
_PLACE = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_RANK",
    "HOROVOD_LOCAL_SIZE",
    "HOROVOD_CROSS_RANK",
    "HOROVOD_CROSS_SIZE",
)
_OF_MPI = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")

_LOADED = time.monotonic()

FORWARDED = ("HOROVOD_", "NCCL_", "GLOO_", "MASTER_ADDR", "MASTER_PORT")
"""Beginnings of the variables by which a user sets up the communication; mpirun takes only those to
other hosts that it is told of, and ranks with different ones wait for each other for ever."""


_NUMBER = re.compile("[0-9]{1,9}")
JOB_NUMBER = re.compile("[0-9]{1,18}")
"""Of a job of Slurm's, and of a step of one."""


def _first(names: tuple[str, ...]) -> int | None:
    for name in names:
        value = os.environ.get(name, "")
        if _NUMBER.fullmatch(value):
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


def gloo_interface() -> str | None:
    """The network interface that horovodrun has chosen for its Gloo ranks."""
    return os.environ.get("HOROVOD_GLOO_IFACE")


def elastic_bounds() -> tuple[int, int] | None:
    """The least and the most ranks of an elastic world; None if the world does not change."""
    least, colon, most = os.environ.get(ELASTIC, "").partition(":")
    if not (colon and _NUMBER.fullmatch(least) and _NUMBER.fullmatch(most)):
        return None
    return int(least), int(most)


def discovery_dir() -> Path:
    """Only under Horovod Elastic."""
    return Path(os.environ[DISCOVERY])


def elastic_slot() -> str:
    """By what Horovod Elastic knows this process, whatever rank it has: ``HOST:LOCAL_RANK``."""
    return f"{os.environ['HOROVOD_HOSTNAME']}:{os.environ['HOROVOD_LOCAL_RANK']}"


def take_place(numbers: Sequence[int]) -> None:
    """Write down what Horovod Elastic makes of this process in its next world: rank and size, of
    all, of its host, and across hosts."""
    os.environ.update(zip(_PLACE, map(str, numbers), strict=True))
    # Else Horovod asks for the same place once more, and its driver counts two ranks.
    os.environ["HOROVOD_ELASTIC"] = "0"


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


def promised_cores() -> int | None:
    """Cores that a Slurm job has for each rank; None if it does not say."""
    return _first(("SLURM_CPUS_PER_TASK",))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def failure_dir() -> Path | None:
    value = os.environ.get(FAILURE_DIR)
    return Path(value) if value else None


def relays_progress() -> bool:
    return os.environ.get(PROGRESS) == "relay"


def growth_limit() -> int:
    """The most ranks that this run may ask for; 0 if nobody would start them."""
    return _first((GROW,)) or 0


def moment() -> str:
    """This moment, in a form from which another process can tell how long ago it was."""
    return f"{_boot()},{time.monotonic():.3f},{time.time():.3f}"


def seconds_since(moment: str) -> float | None:
    """How long ago that was; None if it cannot be told.

    On the machine where it was, by the clock that nobody sets. On another one there is only the
    clock on the wall, which may have been set or be wrong: what it says is taken for no less than
    this process's life and no more than ten minutes longer, else for nothing.
    """
    try:
        boot, ticks, wall = moment.split(",")
        if boot == _boot():
            seconds = time.monotonic() - float(ticks)
            return max(0.0, seconds) if math.isfinite(seconds) else None
        seconds, lived = time.time() - float(wall), time.monotonic() - _LOADED
    except ValueError:
        return None
    return seconds if lived <= seconds <= lived + 600.0 else None


def _boot() -> str:
    """Names this start of this machine, within which its clock that nobody sets counts on."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown-" + socket.gethostname()


def attempts_before() -> int | None:
    return _first((ATTEMPTS_BEFORE,))


def seconds_since_launch() -> float | None:
    """How long ago the ranks were started; None if that is not known."""
    return seconds_since(os.environ.get(LAUNCHED_AT, ""))


def seconds_since_end() -> float | None:
    """How long ago the launch before this one ended; None if there was none, or it is not known."""
    return seconds_since(os.environ.get(ENDED_AT, ""))


def launched_now() -> None:
    """Measure by this moment what the next start takes, if it is measured at all."""
    os.environ.pop(ENDED_AT, None)
    if LAUNCHED_AT in os.environ:
        os.environ[LAUNCHED_AT] = moment()


def ranks_per_gpu() -> int:
    return _first((RANKS_PER_GPU,)) or 1


def seconds_to_measure() -> float | None:
    """After how many seconds of steady updates this run is to stop; None: it goes on to its end."""
    return _seconds(MEASURE)


def hang_seconds() -> float | None:
    """After how long a silence of all ranks the launching process ends the job; None: never."""
    return _seconds(HANG)


def _seconds(name: str) -> float | None:
    try:
        seconds = float(os.environ.get(name, ""))
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


def slurm_step() -> str | None:
    """The job step that this rank belongs to, as scancel takes it; None if srun has not started
    it."""
    numbers = [os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    started = launcher() == "srun" and all(map(JOB_NUMBER.fullmatch, numbers))
    return ".".join(numbers) if started else None


def wants_mps() -> bool:
    return os.environ.get(MPS) == "1"


def launcher() -> str | None:
    return os.environ.get(LAUNCHER)


def host() -> str:
    return socket.gethostname()
