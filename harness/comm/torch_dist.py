"""torch.distributed's collectives: Gloo for tensors on CPUs, NCCL for those on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from harness import environment, pulse
from harness.comm import mpi
from harness.comm.base import Handle, device_of_rank
from harness.comm.rendezvous import meet
from harness.comm.topology import gather_topology
from harness.errors import PeerLost


class TorchCommunicator:
    """All ranks that the launcher started, over torch.distributed.

    Seen to work with Gloo on CPUs. The same calls go to NCCL on GPUs, which was not measured.
    """

    def __init__(self, patience: float = 300.0) -> None:
        """``patience``: seconds after which ranks that have not come are given up (RankFailure)."""
        meeting = meet(patience)
        self._gpus = torch.cuda.is_available() and dist.is_nccl_available()
        self._device = device_of_rank(
            environment.launched_local_rank(), self._gpus, environment.ranks_per_gpu()
        )
        if self._gpus:
            torch.cuda.set_device(self._device)
        with _naming_the_cause(RuntimeError):
            dist.init_process_group(
                # Small tensors of the bookkeeping stay on the CPU, which NCCL cannot carry.
                "cpu:gloo,cuda:nccl" if self._gpus else "gloo",
                store=meeting.store,
                rank=meeting.rank,
                world_size=meeting.size,
            )
        self.topology = gather_topology(self)

    @property
    def kind(self) -> str:
        return "torch-nccl" if self._gpus else "torch-gloo"

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def local_rank(self) -> int:
        return environment.launched_local_rank()

    @property
    def local_size(self) -> int:
        return environment.launched_local_size()

    @property
    def device(self) -> torch.device:
        return self._device

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        pulse.begins(name)
        with _naming_the_cause(dist.DistError):
            return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True)

    def wait(self, handle: Handle) -> None:
        with pulse.meeting(), _naming_the_cause(RuntimeError):
            handle.wait()

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        pulse.begins(name)
        with _naming_the_cause(dist.DistError):
            handle = dist.broadcast(tensor, src=0, async_op=True)
        self.wait(handle)

    def close(self) -> None:
        # Rank 0 holds the store: it may not go while another rank still uses it.
        with suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()
        mpi.leave()


@contextmanager
def _naming_the_cause(kind: type[RuntimeError]) -> Iterator[None]:
    """An error of a collective that fails because another rank is gone, in plain words.

    Gloo raises plain RuntimeErrors: when an operation begins, of a tensor that it cannot carry;
    while it goes on, of the connection.
    """
    try:
        yield
    except kind as error:
        reason = str(error).partition("\n")[0]
        raise PeerLost(f"another rank left in the middle of a collective: {reason}") from None
