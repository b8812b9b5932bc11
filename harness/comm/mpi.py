"""MPI itself, through mpi4py, beside the engine that carries the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
