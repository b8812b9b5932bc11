"""Horovod's collectives. Importing this module needs Horovod; nothing else in harness does."""

from __future__ import annotations

import horovod.torch as hvd
import torch

from harness.comm.base import Handle


class HorovodCommunicator:
    """All ranks that the launcher started, over Horovod with an MPI or Gloo controller."""

    def __init__(self) -> None:
        hvd.init()

    @property
    def kind(self) -> str:
        return "horovod-mpi" if hvd.mpi_enabled() else "horovod-gloo"

    @property
    def rank(self) -> int:
        return int(hvd.rank())

    @property
    def size(self) -> int:
        return int(hvd.size())

    @property
    def local_size(self) -> int:
        return int(hvd.local_size())

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        return hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)

    def wait(self, handle: Handle) -> None:
        hvd.synchronize(handle)

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        hvd.broadcast_(tensor, root_rank=0, name=name)

    def close(self) -> None:
        hvd.shutdown()
