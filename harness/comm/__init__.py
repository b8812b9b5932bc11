"""Communicators: Horovod, and a single process."""

from __future__ import annotations

from typing import Literal

from harness.comm.base import Communicator, allreduce, broadcast_bytes
from harness.comm.solo import SoloCommunicator
from harness.environment import promised_world_size
from harness.errors import LaunchError, RankFailure

__all__ = [
    "Communicator",
    "SoloCommunicator",
    "allreduce",
    "broadcast_bytes",
    "open_communicator",
]


def open_communicator(backend: Literal["horovod", "solo"]) -> Communicator:
    """Join the other ranks, and assert that all that the launcher promised are there.

    A process that no launcher started is alone: it gets the solo communicator. Raises LaunchError
    if Horovod is missing, RankFailure if the world has another size than promised: a launcher and
    an MPI that do not match give N separate worlds of one rank, without a word.
    """
    promised = promised_world_size()
    if backend == "solo" or promised is None:
        if promised is not None and promised > 1:
            raise LaunchError(
                f"comm.backend = solo is one process, but {promised} ranks were started; "
                "use comm.backend=horovod"
            )
        return SoloCommunicator()
    try:
        from harness.comm.horovod import HorovodCommunicator
    except ImportError as error:
        raise LaunchError(
            f"Horovod cannot be imported ({error}); build it with `python -m launch.bootstrap "
            "--horovod-only`, or run one process with comm.backend=solo"
        ) from None
    comm = HorovodCommunicator()
    if comm.size != promised:
        found = comm.size
        comm.close()
        raise RankFailure(
            f"the launcher promised {promised} ranks, but this process sees a world of {found}; "
            "the launcher does not match the MPI that Horovod was built with "
            "(under srun: try --mpi=pmix, or start with horovodrun or mpirun)"
        )
    return comm
