"""What differs between ranks: a model's buffers, and what error feedback owes.

Buffers (batch norm's running statistics) drift apart, as each rank sees its own micro-batches.
Evaluation and saved models use the mean over ranks; training goes on with each rank's own, so that
it does not matter when one evaluates or saves, and a resumed run on as many ranks goes on with each
rank's own too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from harness.comm.base import Communicator, allreduce


def gather_buffers(model: nn.Module, comm: Communicator) -> Tensor | None:
    """All ranks' buffers as float64 (ranks, numbers), on every rank; None if there are none.

    Exact for every type. A collective call.
    """
    flat = [_numbers(buffer) for buffer in model.buffers()]
    if not flat or not sum(map(len, flat)):
        return None
    mine = torch.cat(flat)
    table = torch.zeros(comm.size, len(mine), dtype=torch.float64)
    table[comm.rank] = mine
    return allreduce(comm, table, "buffers")


@contextmanager
def averaged_buffers(model: nn.Module, table: Tensor | None) -> Iterator[None]:
    """Inside, the model's floating-point buffers, complex ones too, are the mean over ranks; others
    are rank 0's."""
    if table is None or len(table) == 1:
        yield
        return
    own = [buffer.clone() for buffer in model.buffers()]
    _fill(model, table[0], integers=True)
    _fill(model, table.mean(dim=0), integers=False)
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), own, strict=True):
            buffer.copy_(value)


def restore_buffers(model: nn.Module, table: Tensor | None, comm: Communicator) -> None:
    """This rank's row of a saved table, if it was saved by as many ranks."""
    if table is not None and len(table) == comm.size:
        _fill(model, table[comm.rank], integers=True)
        _fill(model, table[comm.rank], integers=False)


def _fill(model: nn.Module, row: Tensor, integers: bool) -> None:
    buffers = list(model.buffers())
    pieces = torch.split(row, [_count(buffer) for buffer in buffers])
    for buffer, piece in zip(buffers, pieces, strict=True):
        if _is_integer(buffer) != integers:
            continue
        if buffer.is_complex():
            real, imaginary = piece.view(*buffer.shape, 2).unbind(-1)
            buffer.copy_(torch.complex(real, imaginary))
        elif buffer.dtype == torch.int64:
            high, low = piece.to(torch.int64).view(2, -1)
            buffer.copy_(((high << 32) | low).view_as(buffer))
        else:
            buffer.copy_(piece.view_as(buffer))


def _numbers(buffer: Tensor) -> Tensor:
    """The elements as float64 on the CPU: `_count` of them, from which `_fill` makes them again."""
    values = buffer.detach().cpu().reshape(-1)
    if values.is_complex():
        return torch.view_as_real(values.to(torch.complex128)).reshape(-1)
    if values.dtype == torch.int64:  # float64 holds those up to 2^53 only
        return torch.cat([values >> 32, values & 0xFFFFFFFF]).double()
    return values.double()


def _count(buffer: Tensor) -> int:
    return buffer.numel() * (2 if buffer.is_complex() or buffer.dtype == torch.int64 else 1)


def _is_integer(buffer: Tensor) -> bool:
    return not (buffer.is_floating_point() or buffer.is_complex())


class BuffersBefore:
    """A rank's buffers as they were before the update at hand.

    An update whose gradient is not finite is thrown away on all ranks, but the forward pass that
    met an inf or NaN has put it into batch norm's running statistics, where it would stay for ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for buffer in model.buffers() if buffer.numel()]
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    def keep(self) -> None:
        """An update begins."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore_if_poisoned(self) -> bool:
        """It is thrown away: bring back what was if it has left an inf or NaN on this rank; whether
        it has."""
        # An attention mask, say, holds an inf from the beginning.
        if not any(
            bool((torch.isfinite(kept) & ~torch.isfinite(buffer)).any())
            for buffer, kept in zip(self._buffers, self._kept, strict=True)
        ):
            return False
        torch._foreach_copy_(self._buffers, self._kept)
        return True


def gather_residuals(residuals: Sequence[Tensor], comm: Communicator) -> Tensor | None:
    """All ranks' residuals of error feedback, float32 (ranks, elements), on every rank; None if
    there are none. A collective call."""
    if not residuals:
        return None
    mine = torch.cat([residual.detach().cpu() for residual in residuals])
    table = torch.zeros(comm.size, len(mine))
    table[comm.rank] = mine
    return allreduce(comm, table, "residuals")


def restore_residuals(
    residuals: Sequence[Tensor], table: Tensor | None, comm: Communicator
) -> None:
    """This rank's row of a saved table. On another number of ranks each takes an equal share of
    the sum, so that nothing that is owed is lost."""
    if table is None or not residuals:
        return
    row = table[comm.rank] if len(table) == comm.size else table.sum(dim=0) / comm.size
    for residual, piece in zip(
        residuals, torch.split(row, [len(residual) for residual in residuals]), strict=True
    ):
        residual.copy_(piece)
