"""The narrow interface through which ranks talk, whatever carries it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from harness.errors import LaunchError

if TYPE_CHECKING:
    from harness.comm.topology import Topology

Handle = Any
"""What ``allreduce_async`` returns and ``wait`` takes."""


class Communicator(Protocol):
    """Collectives over all ranks.

    Every rank makes the same calls with the same names, in the same order: Horovod sorts by name
    what comes in another order, torch.distributed would add up what does not belong together.
    Tensors are contiguous and live on ``device`` or on the CPU.
    """

    @property
    def kind(self) -> str:
        """What carries them, for records: ``horovod-mpi``, ``horovod-gloo``, ``torch-gloo``,
        ``torch-nccl`` or ``solo``."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def local_rank(self) -> int:
        """This rank's number among those on its host, from 0."""

    @property
    def local_size(self) -> int:
        """Ranks on this host."""

    @property
    def device(self) -> torch.device:
        """Where a rank computes: its GPU if the engine carries tensors between GPUs by itself, else
        the CPU. An engine that cannot would copy each gradient to the host and back; rather than do
        so without a word, a rank then leaves the GPU alone."""

    @property
    def topology(self) -> Topology:
        """Where all ranks run; gathered when they met."""

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        """Begin to replace ``tensor`` by its sum over ranks, in place. ``name`` is unique among the
        operations under way, and equal on all ranks."""

    def wait(self, handle: Handle) -> None:
        """Return when the operation is done; for a tensor on a GPU, when all work that is given to
        its current stream from now on sees the sum. Raises PeerLost if another rank is gone."""

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


def allgather_bytes(comm: Communicator, content: bytes, name: str) -> list[bytes]:
    """All ranks' bytes: each rank writes its own row of a table of zeros, and the tables add up."""
    lengths = torch.zeros(comm.size, dtype=torch.int64)
    lengths[comm.rank] = len(content)
    allreduce(comm, lengths, f"{name}.lengths")
    # Horovod adds up no type of one byte.
    table = torch.zeros(comm.size, int(lengths.max()), dtype=torch.int32)
    table[comm.rank, : len(content)] = torch.tensor(list(content), dtype=torch.int32)
    allreduce(comm, table, name)
    return [
        bytes(row[:length].tolist()) for row, length in zip(table, lengths.tolist(), strict=True)
    ]


def device_of_rank(local_rank: int, carries_gpus: bool, sharing: int = 1) -> torch.device:
    """See ``Communicator.device``. ``sharing``: ranks on each GPU, neighbours on the same.

    A rank that sees one GPU takes that: its launcher has chosen it (CUDA_VISIBLE_DEVICES). Raises
    LaunchError if a rank sees several, but none is left for it: NCCL wants one for each rank.
    """
    gpus = torch.cuda.device_count() if carries_gpus else 0
    if gpus == 0:
        return torch.device("cpu")
    if gpus > 1 and local_rank >= gpus * sharing:
        raise LaunchError(
            f"rank {local_rank} of this host has no GPU: {gpus} are visible; start at most "
            f"{gpus * sharing} ranks on a host, let several share a GPU (launch.ranks_per_gpu), or "
            "hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on CPUs"
        )
    return torch.device("cuda", local_rank // sharing if gpus > 1 else 0)
