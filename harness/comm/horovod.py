"""Horovod's collectives. Importing this module needs Horovod; nothing else in harness does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError

from harness.comm.base import Handle
from harness.errors import PeerLost


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
        with _naming_the_cause():
            return hvd.allreduce_async_(tensor, name=name, op=hvd.Sum)

    def wait(self, handle: Handle) -> None:
        with _naming_the_cause():
            hvd.synchronize(handle)

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        with _naming_the_cause():
            hvd.broadcast_(tensor, root_rank=0, name=name)

    def close(self) -> None:
        hvd.shutdown()


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """Horovod's error for a collective that fails because another rank is gone, in plain words."""
    try:
        yield
    except HorovodInternalError as error:
        raise PeerLost(f"another rank left in the middle of a collective: {error}") from None
