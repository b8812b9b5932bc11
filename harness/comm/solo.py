"""One process, no network: every collective is the identity."""

from __future__ import annotations

import torch

from harness.comm.base import Handle, device_of_rank
from harness.comm.topology import Topology, gather_topology


class SoloCommunicator:
    kind = "solo"
    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    @property
    def device(self) -> torch.device:
        return device_of_rank(0, torch.cuda.is_available())

    @property
    def topology(self) -> Topology:
        return gather_topology(self)

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        return None

    def wait(self, handle: Handle) -> None:
        return

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        return

    def close(self) -> None:
        return
