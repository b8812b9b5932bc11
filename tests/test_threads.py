"""Ranks as threads: what they compute, and that whatever does not fit is told and does not hang."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from threads import Mismatch, ThreadCommunicator, run_ranks

from harness.comm.base import allreduce


def test_sums_and_broadcasts() -> None:
    def act(comm: ThreadCommunicator) -> tuple[list[float], list[int], list[str]]:
        sums, number = torch.full((2,), 10.0**comm.rank), torch.tensor([comm.rank + 7])
        handle = comm.allreduce_async(sums, "sums")
        assert sums.isnan().all()  # nothing can be read before wait
        comm.wait(handle)
        comm.broadcast(number, "number")
        return sums.tolist(), number.tolist(), comm.calls

    assert run_ranks(3, act) == [([111.0, 111.0], [7], ["sums", "number"])] * 3


def overwritten(comm: ThreadCommunicator) -> None:
    tensor = torch.zeros(2)
    handle = comm.allreduce_async(tensor, "a")
    tensor.zero_()
    comm.wait(handle)


MISFITS: dict[str, tuple[Callable[[ThreadCommunicator], object], str]] = {
    "names": (lambda comm: allreduce(comm, torch.zeros(2), f"a{comm.rank}"), "another rank"),
    "shapes": (lambda comm: allreduce(comm, torch.zeros(2 + comm.rank), "a"), "another rank"),
    "types": (
        lambda comm: allreduce(comm, torch.zeros(2).to([torch.int64, torch.half][comm.rank]), "a"),
        "another rank",
    ),
    "one leaves": (lambda comm: comm.rank or allreduce(comm, torch.zeros(2), "a"), "have ended"),
    "nobody waits": (
        lambda comm: comm.rank or comm.allreduce_async(torch.zeros(2), "a"),
        "numbers of collectives",
    ),
    "overwritten": (overwritten, "written to while under way"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_collectives_that_do_not_fit(case: str) -> None:
    action, message = MISFITS[case]
    with pytest.raises(Mismatch, match=message):
        run_ranks(2, action)


def test_a_failing_rank_is_the_one_that_is_told() -> None:
    def act(comm: ThreadCommunicator) -> None:
        if comm.rank == 1:
            raise KeyError("mine")
        allreduce(comm, torch.zeros(2), "a")

    with pytest.raises(KeyError, match="mine"):
        run_ranks(3, act)
