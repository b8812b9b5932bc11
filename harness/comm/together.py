"""Steps that all ranks take together, so that an error of one does not leave the others waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from harness.comm.base import Communicator, allreduce
from harness.errors import HarnessError

T = TypeVar("T")


class AllLeave(Exception):  # noqa: N818 - not an error of this rank: a decision of all
    """Some rank failed in a step that all take together; all ranks raise this."""

    def __init__(self, mine: Exception | None, exit_code: int) -> None:
        super().__init__(str(mine) if mine is not None else "another rank has failed")
        self.mine = mine
        """What this rank has to say, on the one rank that speaks."""
        self.exit_code = exit_code


def together(comm: Communicator, action: Callable[[], T]) -> T:
    """Run an action on every rank; if any fails, all leave, and the lowest of those says why.

    Collective; the action itself must not be.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as problem:
        error = problem
    codes = torch.zeros(comm.size, dtype=torch.float64)
    if error is not None:
        codes[comm.rank] = exit_code_of(error)
    allreduce(comm, codes, "together")
    failed = codes.nonzero().flatten().tolist()
    if not failed:
        return result  # type: ignore[return-value]
    mine = error if failed[0] == comm.rank else None
    raise AllLeave(mine, int(codes[failed[0]])) from mine


def exit_code_of(error: Exception) -> int:
    """What a process ends with for this error."""
    return error.exit_code if isinstance(error, HarnessError) else 1
