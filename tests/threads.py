"""Ranks as threads of this process: laws over ranks can be tested without starting processes.

Unlike a real engine it is strict. A collective that does not match the other ranks' (by order,
kind, name, shape or type) fails on all ranks, as does a rank that ends while others wait for it: a
test cannot hang. A tensor that is under way is full of rubbish, so that reading it before ``wait``
shows, and writing to it is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import torch
from hypothesis import Phase
from torch import Tensor

from harness.comm.topology import Topology, gather_topology

T = TypeVar("T")

WITHOUT_EXPLANATION = tuple(phase for phase in Phase if phase is not Phase.explain)
"""Hypothesis explains a failure by tracing each line, which threads make very slow."""


class Mismatch(AssertionError):  # noqa: N818 - a failed test, not an error of the harness
    """The ranks' collectives do not fit together."""


class Abandoned(Exception):  # noqa: N818 - never seen outside: another rank has the reason
    """Another rank has failed, and this one cannot go on."""


@dataclass
class _Operation:
    """One collective, with what the ranks have put in so far."""

    what: tuple[str, str, tuple[int, ...], torch.dtype]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    result: Tensor | None = None


class _World:
    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.operations: list[_Operation] = []
        self.ended: dict[int, int] = {}
        """How many collectives each rank that has ended took part in."""
        self.failed = False

    def join(self, rank: int, index: int, operation: _Operation, tensor: Tensor) -> _Operation:
        """Put a rank's tensor into its ``index``-th collective."""
        with self.changed:
            self.check()
            if index == len(self.operations):
                self.operations.append(operation)
            joined = self.operations[index]
            if joined.what != operation.what:
                self.fail(f"rank {rank} calls {operation.what}, another rank {joined.what}")
            joined.inputs[rank] = tensor.clone()
            if len(joined.inputs) == self.size:
                joined.result = self._result(joined)
            self.changed.notify_all()
        return joined

    def finish(self, rank: int, operation: _Operation) -> Tensor:
        with self.changed:
            while operation.result is None:
                self.check()
                missing = [r for r in self.ended if r not in operation.inputs]
                if missing:
                    self.fail(f"rank {rank} waits for {operation.what}, but {missing} have ended")
                if not self.changed.wait(timeout=60):
                    self.fail(f"rank {rank} has waited a minute for {operation.what}")
            return operation.result

    def end(self, rank: int, calls: int) -> None:
        with self.changed:
            self.ended[rank] = calls
            self.changed.notify_all()

    def check(self) -> None:
        if self.failed:
            raise Abandoned

    def fail(self, message: str) -> NoReturn:
        with self.changed:
            self.failed = True
            self.changed.notify_all()
        raise Mismatch(message)

    def _result(self, operation: _Operation) -> Tensor:
        if operation.what[0] == "broadcast":
            return operation.inputs[0]
        # In the order of ranks and rounded after each, as fp16 is on a real wire.
        total = operation.inputs[0].clone()
        for rank in range(1, self.size):
            total += operation.inputs[rank]
        return total


class ThreadCommunicator:
    """One rank's; ``calls`` and ``sent`` tell what it has done so far."""

    kind = "threads"
    device = torch.device("cpu")

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank = self.local_rank = rank
        self.size = self.local_size = world.size
        self.calls: list[str] = []
        """Names of the collectives, in the order of the calls."""
        self.sent: dict[str, Tensor] = {}
        """What this rank has put in last, by name."""

    @property
    def topology(self) -> Topology:
        return gather_topology(self, through_mpi=False)

    def allreduce_async(self, tensor: Tensor, name: str) -> tuple[_Operation, Tensor]:
        assert tensor.is_contiguous(), name
        operation = self._join("allreduce", tensor, name)
        tensor.fill_(_rubbish(tensor))
        return operation, tensor

    def wait(self, handle: tuple[_Operation, Tensor]) -> None:
        operation, tensor = handle
        result = self._world.finish(self.rank, operation)
        rubbish = tensor.isnan() if tensor.is_floating_point() else tensor == _rubbish(tensor)
        if not rubbish.all():
            self._world.fail(f"{operation.what} was written to while under way")
        tensor.copy_(result)

    def broadcast(self, tensor: Tensor, name: str) -> None:
        tensor.copy_(self._world.finish(self.rank, self._join("broadcast", tensor, name)))

    def close(self) -> None:
        return

    def _join(self, kind: str, tensor: Tensor, name: str) -> _Operation:
        index = len(self.calls)
        self.calls.append(name)
        self.sent[name] = tensor.clone()
        operation = _Operation((kind, name, tuple(tensor.shape), tensor.dtype))
        return self._world.join(self.rank, index, operation, tensor)


def run_ranks(size: int, action: Callable[[ThreadCommunicator], T]) -> list[T]:
    """``action`` on that many ranks at once; what it returns on each.

    Raises what it raises, of several ranks the lowest's; Mismatch if collectives do not fit.
    """
    world = _World(size)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        comm = ThreadCommunicator(world, rank)
        try:
            results[rank] = action(comm)
        except Abandoned:
            pass
        except BaseException as error:
            errors[rank] = error
        world.end(rank, len(comm.calls))  # who waits for this rank will notice

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # A rank that ends early makes another fail by a Mismatch: its own error is the reason.
        raise min(errors.items(), key=lambda item: (isinstance(item[1], Mismatch), item[0]))[1]
    if len(set(world.ended.values())) > 1:
        raise Mismatch(f"numbers of collectives, by rank: {dict(sorted(world.ended.items()))}")
    return [results[rank] for rank in range(size)]


def _rubbish(tensor: Tensor) -> float:
    return float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
