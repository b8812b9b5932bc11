"""The narrow interface through which ranks talk, whatever carries it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

Handle = Any
"""What ``allreduce_async`` returns and ``wait`` takes."""


class Communicator(Protocol):
    """Collectives over all ranks. Every rank makes the same calls with the same names."""

    @property
    def kind(self) -> str:
        """What carries them, for records: ``horovod-mpi``, ``horovod-gloo`` or ``solo``."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def local_size(self) -> int:
        """Ranks on this host."""

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        """Begin to replace ``tensor`` by its sum over ranks, in place. ``name`` is unique among the
        operations under way, and equal on all ranks."""

    def wait(self, handle: Handle) -> None:
        """Return when the operation is done."""

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        """Replace ``tensor`` by rank 0's, in place."""

    def close(self) -> None: ...


def allreduce(comm: Communicator, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Replace ``tensor`` by its sum over ranks, and return it."""
    comm.wait(comm.allreduce_async(tensor, name))
    return tensor


def broadcast_bytes(comm: Communicator, content: bytes | None, name: str) -> bytes:
    """Rank 0's bytes, on every rank; the other ranks pass None."""
    length = torch.tensor([len(content or b"")], dtype=torch.int64)
    comm.broadcast(length, f"{name}.length")
    if not int(length):
        return b""
    if comm.rank == 0 and content is not None:
        payload = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    else:
        payload = torch.empty(int(length), dtype=torch.uint8)
    comm.broadcast(payload, name)
    return content if content is not None else payload.numpy().tobytes()
