"""MPI itself, through mpi4py, beside the engine that carries the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI


def join_world() -> MPI.Intracomm:
    """All processes of the MPI job, in the launcher's order; initialises MPI if nobody has.

    Call ``leave`` at the end. Raises LaunchError if mpi4py is not there.
    """
    mpi = _mpi4py()
    if mpi is None:
        raise LaunchError(
            "mpi4py cannot be imported, and without it the ranks that an MPI launcher started "
            "cannot find each other for comm.backend = torch; install it (`pip install mpi4py`), "
            "or set MASTER_ADDR and MASTER_PORT to where rank 0 may listen"
        )
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    world: MPI.Intracomm = mpi.COMM_WORLD
    return world


def running_world() -> MPI.Intracomm | None:
    """All processes of the MPI job, if MPI runs and this thread may use it; else None.

    Horovod runs MPI in a thread of its own, so it must have been initialised for several threads:
    it is, unless HOROVOD_MPI_THREADS_DISABLE or the MPI library says otherwise.
    """
    mpi = _mpi4py()
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return mpi.COMM_WORLD if mpi.Query_thread() == mpi.THREAD_MULTIPLE else None


def leave() -> None:
    """End MPI, if it runs: mpirun calls a process that ends without this a failed one."""
    mpi = _mpi4py()
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def share_bytes(world: MPI.Intracomm, content: bytes) -> bytes:
    """Rank 0's bytes, on every rank. Collective.

    As buffers, not as objects: those mpi4py would unpickle.
    """
    length = np.array([len(content)], np.int64)
    world.Bcast(length, root=0)
    payload = np.frombuffer(content, np.uint8).copy()
    if world.Get_rank():
        payload = np.empty(int(length[0]), np.uint8)
    world.Bcast(payload, root=0)
    return payload.tobytes()


def gather_bytes(world: MPI.Intracomm, content: bytes) -> list[bytes]:
    """All ranks' bytes, on every rank. Collective; as buffers, as in ``share_bytes``."""
    lengths = np.empty(world.Get_size(), np.int64)
    world.Allgather(np.array([len(content)], np.int64), lengths)
    ends = np.cumsum(lengths)
    payload = np.empty(int(ends[-1]), np.uint8)
    world.Allgatherv(np.frombuffer(content, np.uint8), [payload, lengths.tolist()])
    return [piece.tobytes() for piece in np.split(payload, ends[:-1])]


def raw_allreduce(world: MPI.Intracomm, tensor: torch.Tensor) -> None:
    """Replace a contiguous CPU tensor by its sum over ranks: the baseline that any engine on top of
    MPI is measured against."""
    mpi = _mpi4py()
    assert mpi is not None  # noqa: S101 - there is a world, for the type checker
    world.Allreduce(mpi.IN_PLACE, tensor.numpy(), op=mpi.SUM)


def _mpi4py() -> Any | None:
    """mpi4py's MPI module, None if it cannot be imported.

    By default the import would initialise MPI, and the interpreter's end finalise it. Both are
    Horovod's where Horovod uses MPI, and `join_world`'s and `leave`'s elsewhere.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # the latter: there is no MPI library for it to load
        return None
    return MPI
