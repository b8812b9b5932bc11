"""One process, no network: every collective is the identity."""

from __future__ import annotations

import torch

from harness.comm.base import Handle


class SoloCommunicator:
    kind = "solo"
    rank = 0
    size = 1
    local_size = 1

    def allreduce_async(self, tensor: torch.Tensor, name: str) -> Handle:
        return None

    def wait(self, handle: Handle) -> None:
        return

    def broadcast(self, tensor: torch.Tensor, name: str) -> None:
        return

    def close(self) -> None:
        return
