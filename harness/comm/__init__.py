"""Communicators: Horovod, torch.distributed, and a single process."""

from __future__ import annotations

from typing import Literal

from harness import pulse
from harness.comm.base import Communicator, allreduce, broadcast_bytes
from harness.comm.solo import SoloCommunicator
from harness.comm.staged import StagedCommunicator
from harness.environment import promised_world_size, ranks_per_gpu
from harness.errors import LaunchError, RankFailure
from harness.schema import Comm

__all__ = [
    "Communicator",
    "SoloCommunicator",
    "allreduce",
    "broadcast_bytes",
    "open_communicator",
]


def open_communicator(
    settings: Comm | Literal["horovod", "torch", "solo"], timeline: bool = False
) -> Communicator:
    """Join the other ranks, and assert that all that the launcher promised are there.

    A backend's name stands for its default settings; ``timeline``: one may be started by
    `harness.comm.horovod.start_timeline`. A process that no launcher started is alone:
    it gets the solo communicator. Raises LaunchError if Horovod is missing or the ranks cannot find
    each other, RankFailure if the world has another size than promised: a launcher and an MPI that
    do not match give N separate worlds of one rank, without a word.
    """
    if not isinstance(settings, Comm):
        settings = Comm(backend=settings)
    promised = promised_world_size()
    if settings.backend == "solo" or promised is None:
        if promised is not None and promised > 1:
            raise LaunchError(
                f"comm.backend = solo is one process, but {promised} ranks were started; "
                "use comm.backend=horovod"
            )
        return SoloCommunicator()
    pulse.begins("joining")
    with pulse.meeting():
        comm = _join(settings, timeline)
    if comm.size != promised:
        found = comm.size
        comm.close()
        raise RankFailure(
            f"the launcher promised {promised} ranks, but this process sees a world of {found}; "
            "the launcher does not match the MPI that Horovod and mpi4py use (under srun: try "
            "--mpi=pmix, or start with horovodrun or mpirun; under torchrun: comm.backend=torch)"
        )
    if comm.device.type == "cuda" and ranks_per_gpu() > 1:
        return StagedCommunicator(comm)
    return comm


def _join(settings: Comm, timeline: bool) -> Communicator:
    # Imported only where they are used: Horovod may be missing.
    if settings.backend == "torch":
        from harness.comm.torch_dist import TorchCommunicator

        return TorchCommunicator()
    try:
        from harness.comm.horovod import HorovodCommunicator
    except ImportError as error:
        raise LaunchError(
            f"Horovod cannot be imported ({error}); build it with `python -m launch.bootstrap "
            "--horovod-only`, or use comm.backend=torch"
        ) from None
    return HorovodCommunicator(settings, timeline)
