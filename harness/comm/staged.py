"""Collectives of GPU tensors through the host's memory, for ranks that share a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.comm.base import Communicator, Handle

if TYPE_CHECKING:
    from harness.comm.topology import Topology


class StagedCommunicator:
    """Another communicator, which only ever sees tensors on the CPU.

    NCCL wants a GPU for each rank. Where several share one, as the solvers of You et al. 2017
    (LARS), section 4.2, do, gradients are copied to the host, added up there, and copied back.
    Never ran on a GPU.
    """

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner

    @property
    def kind(self) -> str:
        return f"{self._inner.kind}-staged"

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def local_rank(self) -> int:
        return self._inner.local_rank

    @property
    def local_size(self) -> int:
        return self._inner.local_size

    @property
    def device(self) -> torch.device:
        return self._inner.device

    @property
    def topology(self) -> Topology:
        return self._inner.topology

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        staged = self._on_host(tensor)
        return self._inner.allreduce_async(staged, name), staged, tensor

    def wait(self, handle: Handle) -> None:
        inner, staged, tensor = handle
        self._inner.wait(inner)
        if staged is not tensor:
            tensor.copy_(staged)

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        staged = self._on_host(tensor)
        self._inner.broadcast(staged, name)
        if staged is not tensor:
            tensor.copy_(staged)

    def close(self) -> None:
        self._inner.close()

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.device.type == "cpu" else tensor.cpu()
